"""A client of ggml's RPC that sends whatever a test wants."""

from __future__ import annotations

import socket
import struct
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from remote_worker import PATIENCE

if TYPE_CHECKING:
    from sllm.rpc.server import RPCServer

ALLOC, ALIGNMENT, MAX_SIZE, BASE, FREE, CLEAR, SET, HASH, GET, COPY, COMPUTE = range(11)
MEMORY, INIT, ALLOC_SIZE, HELLO, COUNT, RECOMPUTE, MEMSET = range(11, 18)

# Of ggml_op at the pin.
ADD, SCALE = 2, 32
FOREIGN = {"MAP_CUSTOM1": 92, "MAP_CUSTOM2": 93, "MAP_CUSTOM3": 94, "CUSTOM": 95}
TRAINING = {"CROSS_ENTROPY_LOSS_BACK": 97, "OPT_STEP_ADAMW": 98}

_TENSOR = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
FIELDS = (
    *("id", "type", "buffer", "ne", "nb", "op", "op_params", "flags", "src", "view_src", "view_offs"),
    *("data", "name", "use_count"),
)


def tensor(**fields: Any) -> bytes:
    """A description: by default 8 numbers of 32 bits in no buffer."""
    values: dict[str, Any] = dict.fromkeys(FIELDS, 0) | {
        "id": 1,
        "ne": (8, 1, 1, 1),
        "nb": (4, 32, 32, 32),
        "op_params": (),
        "src": (),
        "name": b"t",
        **fields,
    }
    flat: list[Any] = []
    for name in FIELDS:
        value = values[name]
        if name in ("op_params", "src"):
            flat += [*value, *(0,) * ((16 if name == "op_params" else 10) - len(value))]
        else:
            flat += value if isinstance(value, tuple) else [value]
    return _TENSOR.pack(*flat)


def graph(nodes: list[int], tensors: list[bytes], device: int = 0) -> bytes:
    return (
        struct.pack(f"<II{len(nodes)}Q", device, len(nodes), *nodes)
        + struct.pack("<I", len(tensors))
        + b"".join(tensors)
    )


class Client:
    """A connection that has been greeted; with a server's own socket, or one that the caller has made."""

    def __init__(self, server: RPCServer | socket.socket, *, greet: bool = True) -> None:
        self.socket = server if isinstance(server, socket.socket) else server.connect()
        self.socket.settimeout(PATIENCE)
        if greet:
            self.hello = self.ask(HELLO, bytes(24))

    def send(self, command: int, request: bytes = b"", size: int | None = None) -> None:
        head = struct.pack("<BQ", command, len(request) if size is None else size)
        self.socket.sendall(head + request)

    def ask(self, command: int, request: bytes = b"") -> bytes:
        self.send(command, request)
        return self.answer()

    def answer(self) -> bytes:
        (size,) = struct.unpack("<Q", self._receive(8))
        return self._receive(size)

    def _receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = self.socket.recv(n - len(data))
            assert part, "the server has hung up"
            data += part
        return data

    def hung_up(self) -> bool:
        """Whether the server closes the connection next, without another word."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    # ---- what honest clients do

    def allocate(self, size: int) -> tuple[int, int]:
        """A buffer's number and where it begins; 0 and 0: it was refused."""
        number, _ = struct.unpack("<QQ", self.ask(ALLOC, struct.pack("<IQ", 0, size)))
        return number, struct.unpack("<Q", self.ask(BASE, struct.pack("<Q", number)))[0] if number else 0

    def set(self, description: bytes, data: bytes, offset: int = 0, *, keep: bool = False) -> None:
        self.send(SET, description + struct.pack("<BQ", keep, offset) + data)

    def get(self, description: bytes, size: int, offset: int = 0) -> bytes:
        return self.ask(GET, description + struct.pack("<QQ", offset, size))

    def has(self, description: bytes, data: bytes, *, name: int = 0, by_digest: bool = True) -> bool:
        digest = sha256(data).digest() if by_digest else b""
        return self.ask(HASH, description + struct.pack("<QQ", 0, name) + digest) == b"\1"

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

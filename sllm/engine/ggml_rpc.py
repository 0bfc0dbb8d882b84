"""ggml's RPC protocol, as far as sllm speaks it itself: probing a server before llama.cpp connects to it.

llama.cpp's own client ends the process when a server cannot be reached, is not an RPC server, or goes away.
So a server is probed first, in plain Python and with a deadline (:func:`probe`), and the process that a model
is isolated in reaches it through a proxy (``sllm.rpc.front.Front``).

The protocol has no document; this follows ``ggml-rpc.cpp`` at the pin. A request is a command (1 byte), a
size (8 bytes, little-endian) and so many bytes; an answer, which only some commands have, a size and so many
bytes.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from sllm.engine import backends
from sllm.engine._ffi import check, ffi, lib
from sllm.errors import RPCError

__all__ = [
    "ANSWERS",
    "DEFAULT_PORT",
    "DIGESTS",
    "HEADER",
    "SIZE",
    "Command",
    "ServerInfo",
    "SilentError",
    "probe",
    "register",
    "resolved",
    "split",
    "version",
]

log = logging.getLogger("sllm.rpc")

DEFAULT_PORT = 50052
"""Where ``sllm rpc-server`` and llama.cpp's own server listen unless told otherwise."""


class Command(IntEnum):
    """The first byte of a request; only the commands that sllm reads or sends."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16


HEADER = struct.Struct("<BQ")
"""Of a request: the command and how many bytes follow."""

SIZE = struct.Struct("<Q")
"""Before an answer: how many bytes follow."""

DIGESTS = 3
"""Where in the answer to HELLO, behind three bytes of version, sllm's servers put 1 if tensors in their cache
can be asked for by SHA-256: in SET_TENSOR_HASH, 32 more bytes behind the FNV-1a, which is not looked at then.
It is padding to llama.cpp, whose servers send 0."""

_CAPABILITIES = 24
"""Bytes of a HELLO that list the transports which the sender supports; all zero: TCP."""

ANSWERS: dict[int, int] = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: 4 + _CAPABILITIES,
    Command.DEVICE_COUNT: 4,
}
"""Commands that are answered, and the answer's size; that of ``GET_TENSOR`` is in the request."""

_MAX_DEVICES = 64
_MAX_MEMORY = 1 << 60


class SilentError(RPCError):
    """The server has accepted the connection and does not reply; it may be serving another client."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server reports about itself.

    Attributes:
        version: of the protocol: major, minor, patch.
        memory: bytes that are free and in all, for each device.

    """

    version: tuple[int, int, int]
    memory: tuple[tuple[int, int], ...]


def version() -> tuple[int, int, int]:
    """The version of the protocol that this build speaks.

    Raises:
        UnsupportedModelError: the build has no RPC backend.

    """
    backends.load()
    numbers = ffi.new("int32_t[3]")
    check(lib.sllm_rpc_version(numbers))
    return (numbers[0], numbers[1], numbers[2])


def split(endpoint: str) -> tuple[str, int]:
    """``HOST:PORT`` as a pair; ggml knows host names and IPv4 alone.

    Raises:
        TypeError, ValueError: not such an endpoint.

    """
    if not isinstance(endpoint, str):
        raise TypeError(f"the endpoint is {endpoint!r}, expected text, HOST:PORT")
    host, colon, digits = endpoint.partition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 6 else -1
    if not colon:
        port = DEFAULT_PORT
    if not host or not 0 < port < 1 << 16 or set(host) & set(" \t\r\n\0/@[]"):
        raise ValueError(
            f"{endpoint!r} is not the HOST:PORT of an RPC server (a name or an IPv4 address, and 1 to 65535)"
        )
    return host, port


def resolved(endpoint: str, timeout: float) -> str:
    """``endpoint`` with the host as an IPv4 address.

    Raises:
        RPCError: no such host, or the resolver takes longer than ``timeout`` seconds.
        ValueError: not ``HOST:PORT``.

    """
    host, port = split(endpoint)
    with suppress(OSError):
        return f"{socket.inet_ntoa(socket.inet_aton(host))}:{port}"
    found: list[str | Exception] = []

    def look() -> None:
        try:
            found.append(str(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]))
        except (OSError, UnicodeError) as error:
            found.append(error)

    # The resolver has no timeout; a thread in which it hangs is abandoned.
    thread = threading.Thread(target=look, name="sllm-resolve", daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        raise RPCError(f"{endpoint}: the name was not resolved in {timeout:g} s")
    if isinstance(found[0], Exception):
        raise RPCError(f"{endpoint}: there is no such host ({found[0]})") from found[0]
    return f"{found[0]}:{port}"


class _UnexpectedReply(Exception):  # noqa: N818 - never leaves this module
    """The reply is not this protocol; carries its first bytes."""


class _NoReply(Exception):  # noqa: N818
    """There was no reply; carries whether the peer has closed the connection."""


class _Stream:
    """A connection with one deadline for everything that is sent and received."""

    def __init__(self, address: tuple[str, int], until: float) -> None:
        self._until = until
        self._socket = socket.create_connection(address, timeout=self._left())
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _left(self) -> float:
        return max(self._until - time.monotonic(), 0.001)

    def send(self, data: bytes) -> None:
        """Send all of ``data``.

        Raises:
            _NoReply: the peer takes no more.

        """
        self._socket.settimeout(self._left())
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise _NoReply(False) from None
        except OSError:
            raise _NoReply(True) from None

    def receive(self, n: int) -> bytes:
        """``n`` bytes.

        Raises:
            _NoReply, _UnexpectedReply: nothing or less than that was received.

        """
        data = b""
        while len(data) < n:
            closed = True
            more = b""
            with suppress(OSError):
                self._socket.settimeout(self._left())
                try:
                    more = self._socket.recv(n - len(data))
                except TimeoutError:
                    closed = False
            if not more:
                raise _UnexpectedReply(data) if data else _NoReply(closed)
            data += more
        return data

    def ask(self, command: int, request: bytes = b"") -> bytes:
        """Send one command and return its answer.

        Raises:
            _NoReply, _UnexpectedReply: the command was not answered.

        """
        self.send(HEADER.pack(command, len(request)) + request)
        head = self.receive(8)
        (size,) = SIZE.unpack(head)
        if size != ANSWERS[command]:
            rest = b""
            if size <= 256:  # it may be the HELLO of another version
                with suppress(_NoReply, _UnexpectedReply):
                    rest = self.receive(size)
            raise _UnexpectedReply(head + rest)
        return self.receive(size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()


def probe(endpoint: str, timeout: float = 5.0) -> ServerInfo:
    """Ask a server for its version and devices; returns or raises within ``timeout`` seconds.

    Raises:
        RPCError: says which: nothing listens there, the host cannot be reached, the peer is not an RPC server
            (and what it seems to be), it speaks another version, or it does not reply
            (:class:`SilentError`).
        ValueError: not ``HOST:PORT``.
        UnsupportedModelError: this build has no RPC backend.

    """
    ours = version()
    until = time.monotonic() + timeout
    address = split(resolved(endpoint, timeout))
    try:
        # The rest of the time is for finding out what a peer is that does not answer.
        with _connect(endpoint, address, time.monotonic() + 0.7 * (until - time.monotonic())) as stream:
            return _handshake(endpoint, stream, ours)
    except _UnexpectedReply as reply:
        raise RPCError(_describe_peer(endpoint, reply.args[0], ours)) from None
    except _NoReply as silence:
        closed = silence.args[0]
    # Servers before version 4 or so expect an empty HELLO, and a web server waits for the end of a line.
    greetings = [HEADER.pack(Command.HELLO, 0)] if closed else []
    for greeting in (*greetings, b"GET / HTTP/1.0\r\n\r\n"):
        banner = _read_banner(address, greeting, until)
        if banner:
            raise RPCError(_describe_peer(endpoint, banner, ours))
    if closed:
        raise RPCError(
            f"{endpoint} hung up when greeted: it is no RPC server, or one of another version than"
            f" {_dotted(ours)}"
        )
    raise SilentError(
        f"{endpoint} took the connection and said nothing for {timeout:g} s: it serves another client (an RPC"
        " server has one at a time), or it is no RPC server"
    )


def _connect(endpoint: str, address: tuple[str, int], until: float) -> _Stream:
    began = time.monotonic()
    try:
        return _Stream(address, until)
    except ConnectionRefusedError:
        raise RPCError(
            f"{endpoint}: nothing listens there (connection refused); is `sllm rpc-server` running, and is"
            " the port right?"
        ) from None
    except TimeoutError:
        seconds = time.monotonic() - began
        raise RPCError(
            f"{endpoint} cannot be reached: no answer in {seconds:.1f} s; is the machine up, and does its"
            " firewall let this port through?"
        ) from None
    except OSError as error:
        raise RPCError(f"{endpoint} cannot be reached: {error.strerror or error}") from None


def _handshake(endpoint: str, stream: _Stream, ours: tuple[int, int, int]) -> ServerInfo:
    hello = stream.ask(Command.HELLO, bytes(_CAPABILITIES))
    theirs = (hello[0], hello[1], hello[2])
    if theirs != ours:
        raise RPCError(_version_mismatch(endpoint, theirs, ours))
    try:
        (n_devices,) = struct.unpack("<I", stream.ask(Command.DEVICE_COUNT))
        if not 1 <= n_devices <= _MAX_DEVICES:
            raise RPCError(f"{endpoint} claims to have {n_devices} devices, expected 1 to {_MAX_DEVICES}")
        memory = []
        for index in range(n_devices):
            answer = stream.ask(Command.GET_DEVICE_MEMORY, struct.pack("<I", index))
            free, total = struct.unpack("<QQ", answer)
            if max(free, total) > _MAX_MEMORY:
                raise RPCError(f"{endpoint} claims that its device {index} has {total} bytes of memory")
            memory.append((free, total))
    except _NoReply:
        raise RPCError(f"{endpoint} greeted and then said nothing more of its devices") from None
    return ServerInfo(theirs, tuple(memory))


def _read_banner(address: tuple[str, int], greeting: bytes, until: float) -> bytes:
    """The first bytes of the reply to ``greeting``, 16 at most, within half of the time that is left."""
    deadline = time.monotonic() + max((until - time.monotonic()) / 2, 0.05)
    banner = b""
    with suppress(OSError, _NoReply), _Stream(address, deadline) as stream:
        stream.send(greeting)
        while len(banner) < 16:
            banner += stream.receive(1)
    return banner


def _describe_peer(endpoint: str, banner: bytes, ours: tuple[int, int, int]) -> str:
    """What the peer is, judged by the first bytes of its reply."""
    if banner.startswith(b"HTTP/"):
        return f"{endpoint} is a web server, not an RPC server"
    if banner.startswith(b"\x15\x03"):
        return f"{endpoint} speaks TLS, which an RPC server does not; a worker's address goes to connect()"
    if banner.startswith(b"SSH-"):
        return f"{endpoint} is an SSH server, not an RPC server"
    if len(banner) >= 11:
        (size,) = SIZE.unpack(banner[:8])
        if 3 <= size <= 256 and len(banner) >= 8 + min(size, 8) and 0 < banner[8] < 100:
            return _version_mismatch(endpoint, (banner[8], banner[9], banner[10]), ours)
    return f"{endpoint} is no RPC server: it answered {banner[:16]!r}"


def _version_mismatch(endpoint: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    return (
        f"{endpoint} speaks version {_dotted(theirs)} of the RPC protocol, expected {_dotted(ours)}: both"
        " ends must be built from llama.cpp of the same version"
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def register(endpoint: str, timeout: float = 5.0) -> list[int]:
    """Register a server with llama.cpp in this process; the indices of its devices for ``sllm_model_load()``.

    From here on its loss ends the process. Probe it first.

    Raises:
        RPCError: it cannot be reached.

    """
    backends.load()
    address = resolved(endpoint, timeout)
    first, count = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.sllm_rpc_add_server(address.encode(), first, count)
    if status == lib.SLLM_ERR_INTERNAL:
        reason = ffi.string(lib.sllm_last_error()).decode("utf-8", "replace")
        raise RPCError(f"{endpoint}: {reason}")
    check(status, endpoint)
    return list(range(first[0], first[0] + count[0]))

"""A proxy between llama.cpp's RPC client and a server, in the process that a model is isolated in.

It detects the loss of a server before llama.cpp does, and silence, which llama.cpp never does; and it does
not send weights that the server has in its cache.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine._ffi import ffi, lib
from sllm.engine.devices import server_of
from sllm.engine.ggml_rpc import ANSWERS, DIGESTS, HEADER, SIZE, Command, resolved, split
from sllm.rpc.loopback import LOOPBACK, LoopbackPort, keep_alive, shut_down

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Front", "FrontStats", "through_fronts"]

_TENSOR = 296
"""Bytes of a tensor's description."""

_NAME = slice(_TENSOR - 4 - 64, _TENSOR - 4)
"""Where in it the name is."""

_SET_HEADER = _TENSOR + 1 + 8
"""A description, the flag that asks the server to cache the data, the offset; the data follow."""

_CHUNK = 1 << 18


@dataclass
class FrontStats:
    """Bytes sent to the server and received from it, and tensors that it had in its cache."""

    bytes_up: int = 0
    bytes_down: int = 0
    n_kept: int = 0


class _LostError(Exception):
    """The connection to the server is lost; carries why."""


class Front:
    """A proxy for a server on a loopback port, made for llama.cpp's client in the same process.

    llama.cpp asks a server whether it has a tensor in its cache only if that is larger than 10 MiB, which the
    tensors of most models are not. The front asks for all weights, many at a time; what belongs to a text
    (activations, and so on) is never cached.

    It serves one connection at a time, as the server does. Other users of this machine cannot use it where
    the system tells whose a connection is (:class:`~sllm.rpc.loopback.LoopbackPort`).

    Args:
        endpoint: the server.
        deadline: seconds within which it has to answer.
        on_loss: called, on a thread of the front, with a sentence when the server is gone or silent. It
            should end the process: llama.cpp is going to.

    Attributes:
        host, port: the front's own.
        stats: running figures.

    """

    host = LOOPBACK

    def __init__(self, endpoint: str, *, deadline: float, on_loss: Callable[[str], object]) -> None:
        self._endpoint = endpoint
        self._address = split(resolved(endpoint, min(deadline, 10.0)))
        self._deadline = deadline
        self._on_loss = on_loss
        self.stats = FrontStats()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        # One connection after the other, as the server accepts them.
        self._port = LoopbackPort(self._serve, "sllm-rpc-front")
        self.port: int = self._port.port

    @property
    def endpoint(self) -> str:
        """``HOST:PORT`` of the front."""
        return self._port.endpoint

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        self._sockets.add(client)
        try:
            if self._closed:
                return
            try:
                server = socket.create_connection(self._address, timeout=min(self._deadline, 10.0))
            except OSError as error:
                raise _LostError(f"cannot be reached any more: {error.strerror or error}") from None
            self._sockets.add(server)
            keep_alive(server)
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(self._deadline)
            _Proxy(client, server, self.stats, self._deadline).run()
        except _LostError as lost:
            if not self._closed:
                self._on_loss(f"the RPC server {self._endpoint} {lost}")
        finally:
            for end in (client, server):
                if end is not None:
                    self._sockets.discard(end)
                    end.close()

    def close(self) -> None:
        """Close both connections."""
        self._closed = True
        self._port.hang_up()
        for one in list(self._sockets):
            shut_down(one)
        self._port.join()


class _Proxy:
    """Forwards one connection of llama.cpp's client, which waits for each answer before it sends the next
    command: one thread is enough.
    """

    _MIN_KEPT = 512
    """Bytes of a tensor; to ask for a smaller one costs as much as to send it."""

    _MAX_KEPT = 16 << 20
    """Bytes of a tensor; for larger ones llama.cpp asks itself, by FNV-1a."""

    _MAX_DIGESTED = 8 << 30
    """The same where the server wants SHA-256, which llama.cpp does not know. One such tensor is held."""

    _MAX_WAITING = 64 << 20
    _MAX_QUERIED = 512

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        stats: FrontStats,
        deadline: float,
    ) -> None:
        self._client, self._server = client, server
        self._stats = stats
        self._deadline = deadline
        self._computed = False  # whether a graph was: tensors that are set from then on are inputs
        self._by_digest = False  # whether the server finds tensors by their SHA-256, as sllm's do
        self._queried: deque[bytearray] = deque()  # requests whose tensors the server was asked for
        self._n_waiting = 0

    def run(self) -> None:
        """Forward until the client closes the connection.

        Raises:
            _LostError: the server has closed it, does not answer, or violates the protocol.

        """
        with selectors.DefaultSelector() as both:
            both.register(self._client, selectors.EVENT_READ)
            both.register(self._server, selectors.EVENT_READ)
            self._forward_all(both)

    def _forward_all(self, both: selectors.BaseSelector) -> None:
        while True:
            try:
                self._await_request(both)
                head = self._read_client(HEADER.size)
            except ConnectionError:
                return
            command, size = HEADER.unpack(head)
            largest = self._MAX_DIGESTED if self._by_digest else self._MAX_KEPT
            if command == Command.SET_TENSOR and not self._computed and _SET_HEADER < size <= largest:
                try:
                    request = self._read_client(size)
                except ConnectionError:
                    return
                if self._may_be_kept(request):
                    self._query(request)
                    continue
                self._send_missing()
                self._write_server(head + request)
                continue
            self._send_missing()
            self._computed = self._computed or command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE)
            try:
                self._forward(command, bytes(head), size)
            except ConnectionError:
                return

    def _await_request(self, both: selectors.BaseSelector) -> None:
        """Wait for the client. A server that is heard of meanwhile, and owes nothing, has gone."""
        if self._queried:
            return
        readable = [key.fileobj for key, _ in both.select()]
        if self._client in readable:
            return
        try:
            said = self._server.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise _LostError(f"went away: {error.strerror or error}") from None
        raise _LostError("said what it was not asked for" if said else "went away: it closed the connection")

    # ---- weights

    def _may_be_kept(self, request: bytearray) -> bool:
        if len(request) - _SET_HEADER < self._MIN_KEPT:
            return False
        if request[_TENSOR]:  # llama.cpp has asked for it; where that was answered here, in vain
            return self._by_digest
        name = bytes(request[_NAME]).partition(b"\0")[0]
        return name.endswith((b".weight", b".bias", b".scale"))

    def _query(self, request: bytearray) -> None:
        data = memoryview(request)[_SET_HEADER:]
        question = bytes(request[:_TENSOR]) + bytes(request[_TENSOR + 1 : _SET_HEADER])
        if self._by_digest:
            question += bytes(8) + hashlib.sha256(data).digest()
        else:
            question += SIZE.pack(lib.sllm_rpc_hash(ffi.from_buffer("uint8_t[]", data), len(data), 0))
        data.release()
        self._write_server(HEADER.pack(Command.SET_TENSOR_HASH, len(question)) + question)
        request[_TENSOR] = 1  # cache it, if it has to be sent
        self._queried.append(request)
        self._n_waiting += len(request)
        if self._n_waiting > self._MAX_WAITING or len(self._queried) >= self._MAX_QUERIED:
            self._send_missing()

    def _send_missing(self) -> None:
        """Read the answers to the queries, and send the tensors that the server does not have."""
        if not self._queried:
            return
        missing = []
        while self._queried:
            request = self._queried.popleft()
            answer = self._read_server(8 + ANSWERS[Command.SET_TENSOR_HASH])
            if SIZE.unpack(answer[:8])[0] != ANSWERS[Command.SET_TENSOR_HASH]:
                raise _LostError(f"answered {bytes(answer)!r}, which is not the protocol")
            if answer[8]:
                self._stats.n_kept += 1
            else:
                missing.append(request)
        self._n_waiting = 0
        for request in missing:
            self._write_server(HEADER.pack(Command.SET_TENSOR, len(request)))
            self._write_server(request)

    # ---- everything else

    def _forward(self, command: int, head: bytes, size: int) -> None:
        begun = b""
        expected = ANSWERS.get(command)
        if size <= _CHUNK:
            begun = bytes(self._read_client(size)) if size else b""
            if command == Command.SET_TENSOR_HASH and self._by_digest:
                self._client.sendall(SIZE.pack(1) + b"\0")  # it will send the tensor, and be asked here
                return
            self._write_server(head + begun)
        else:
            self._write_server(head)
            left = size
            while left:
                piece = self._read_client(min(left, _CHUNK))
                self._write_server(piece)
                left -= len(piece)
        if command == Command.GET_TENSOR and size == _TENSOR + 16:
            (expected,) = SIZE.unpack(begun[-8:])
        if expected is None:
            return
        n: int = SIZE.unpack(self._read_server(8))[0]
        if n != expected:
            raise _LostError(f"answered command {command} with {n} bytes, expected {expected}")
        if n <= _CHUNK:
            answer = self._read_server(n)
            if command == Command.HELLO:
                self._by_digest = answer[DIGESTS] == 1
            self._client.sendall(SIZE.pack(n) + answer)
            return
        self._client.sendall(SIZE.pack(n))
        while n:
            piece = self._read_server(min(n, _CHUNK))
            self._client.sendall(piece)
            n -= len(piece)

    def _read_client(self, n: int) -> bytearray:
        data = bytearray(n)
        view, at = memoryview(data), 0
        while at < n:
            got = self._client.recv_into(view[at:])
            if not got:
                raise ConnectionError
            at += got
        return data

    def _read_server(self, n: int) -> bytearray:
        data = bytearray(n)
        view, at = memoryview(data), 0
        while at < n:
            try:
                got = self._server.recv_into(view[at:])
            except TimeoutError:
                raise _LostError(f"owed an answer for {self._deadline:g} s") from None
            except OSError as error:
                raise _LostError(f"went away: {error.strerror or error}") from None
            if not got:
                raise _LostError("went away: it closed the connection")
            at += got
        self._stats.bytes_down += n
        return data

    def _write_server(self, data: bytes | bytearray) -> None:
        try:
            self._server.sendall(data)
        except TimeoutError:
            raise _LostError(f"took nothing for {self._deadline:g} s") from None
        except OSError as error:
            raise _LostError(f"went away: {error.strerror or error}") from None
        self._stats.bytes_up += len(data)


def through_fronts(
    devices: Sequence[str], *, deadline: float, on_loss: Callable[[str], object]
) -> tuple[list[str], list[Front]]:
    """The names of devices with a front in the place of each RPC server, and the fronts.

    Raises:
        RPCError: a server's name cannot be resolved.

    """
    fronts: dict[str, Front] = {}
    names = []
    for name in devices:
        server = server_of(name)
        if server is not None:
            index, endpoint = server
            if endpoint not in fronts:
                fronts[endpoint] = Front(endpoint, deadline=deadline, on_loss=on_loss)
            name = f"RPC{index}[{fronts[endpoint].endpoint}]"
        names.append(name)
    return names, list(fronts.values())

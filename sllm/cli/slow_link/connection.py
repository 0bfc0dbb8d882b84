"""One client's connection through a link, and the one to the target that belongs to it."""

from __future__ import annotations

import errno
import fcntl
import random
import socket
import struct
import sys
import termios
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import TYPE_CHECKING, Any

from sllm.cli.slow_link.clock import Clock
from sllm.cli.slow_link.settings import LinkStats
from sllm.cli.slow_link.wire import SLACK_BYTES, Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.cli.slow_link.settings import Settings

    Addresses = list[tuple[socket.AddressFamily, tuple[Any, ...]]]

__all__ = ["Connection", "Shared", "with_buffers"]

_TAKEN_SECONDS = 1.0
"""How long a reset waits for a receiver to take what came before it."""


def with_buffers(sock: socket.socket) -> socket.socket:
    """``sock`` as the proxy needs it. Those that a listening socket accepts take over its buffers' sizes."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLACK_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SLACK_BYTES)
    return sock


class Shared:
    """What the connections of a link share.

    Attributes:
        settings: those of the link, as they are now.
        targets: all addresses of what is at the far end.
        seed: of the jitter.
        clock: the link's time.
        selector: what the thread waits with; the data of a key is called with the events.
        counts: the fields of :class:`LinkStats`.
        connections: those that are not dead.
        up_wire, down_wire: the bandwidth of each direction.

    """

    def __init__(self, settings: Settings, targets: Addresses, seed: int) -> None:
        self.settings = settings
        self.targets = targets
        self.seed = seed
        self.clock = Clock()
        self.selector = DefaultSelector()
        self.counts: dict[str, int] = asdict(LinkStats())
        self.connections: set[Connection] = set()
        self.up_wire = Wire(settings, self.clock)
        self.down_wire = Wire(settings, self.clock)


class End:
    """One socket of a connection, and the events that are awaited on it."""

    sock: socket.socket
    reads: Lane
    """What comes from here."""
    writes: Lane
    """What goes here."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._selector = connection.shared.selector
        self._events = 0
        self._attached = False
        self.connected = False

    def attach(self, sock: socket.socket, *, connected: bool) -> None:
        """Take over a socket."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._attached = True
        self.connected = connected
        self.want(EVENT_WRITE, not connected)

    def want(self, event: int, wanted: bool) -> None:
        """Await ``event``, or no longer."""
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


class Lane:
    """One direction of one connection: what was read at one end, until it is due at the other."""

    def __init__(self, connection: Connection, source: End, sink: End, wire: Wire, counter: str) -> None:
        source.reads = sink.writes = self
        self._connection = connection
        self._shared = connection.shared
        self._clock = connection.shared.clock
        self._source = source
        self._sink = sink
        self._wire = wire
        self._counter = counter
        # Its own, so that the jitter of one connection does not depend on what the others do.
        self._random = random.Random(f"{self._shared.seed}/{connection.number}/{counter}")
        self._queue: deque[tuple[float, memoryview | None]] = deque()  # due when; b"": the end, None: a reset
        self._last_due = 0.0
        self._n_queued = 0
        self._timed = False  # the clock will call when the first of the queue is due
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
        if self._wire.full(self._clock.now()):
            self.waits = True
            self._wire.wait(self._resume)
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

    def _resume(self) -> None:
        self.waits = False
        self.update()

    def put(self, data: memoryview | None) -> None:
        """Send something on its way."""
        settings = self._shared.settings
        n_bytes = len(data) if data else 0
        sent = self._wire.send(self._clock.now(), n_bytes)
        due = sent + settings.delay + self._random.uniform(0, settings.jitter)
        self._last_due = max(self._last_due, due)
        self._queue.append((self._last_due, data))
        self._n_queued += n_bytes
        if len(self._queue) == 1:
            self.deliver()
        else:
            self.update()

    def deliver(self) -> None:
        """Hand on what is due, as far as the receiving socket takes it."""
        connection, sink = self._connection, self._sink
        full = False
        while self._queue and sink.connected and not full:
            due, data = self._queue[0]
            if due > self._clock.now():
                if not self._timed:
                    self._timed = True
                    self._clock.at(due, self._come_due)
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


class Connection:
    """A client's connection, and the one to the target that belongs to it."""

    def __init__(self, shared: Shared, client: socket.socket, number: int) -> None:
        self.shared = shared
        self.number = number
        self.dead = False
        self.opened = False  # the client has had the time to learn that it is connected
        self._lost = False  # one of the ends was reset
        self._n_carried = 0
        self._last: str | None = None
        self._client = End(self)
        self._target = End(self)
        self._lanes = [
            Lane(self, self._client, self._target, shared.up_wire, "bytes_up"),
            Lane(self, self._target, self._client, shared.down_wire, "bytes_down"),
        ]
        client.setblocking(False)
        self._client.attach(client, connected=True)
        shared.connections.add(self)
        # TCP's handshake: two delays until the client may send, and one more until the target hears of it.
        clock, settings = shared.clock, shared.settings
        now, delay = clock.now(), settings.delay
        clock.at(now + 2 * delay, self._open)
        clock.at(now + 3 * delay, self._reach)
        if settings.cut_after is not None:
            clock.at(now + settings.cut_after, self.cut)

    def _open(self) -> None:
        self.opened = True
        self._client.reads.update()
        self.carried("bytes_up", 0)

    def _reach(self) -> None:
        self._addresses = iter(self.shared.targets)
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
            with_buffers(sock)
            failed = sock.connect_ex(address)
            if failed in (0, errno.EINPROGRESS):
                self._target.attach(sock, connected=False)
                return
            sock.close()

    def try_target(self) -> None:
        """Find out whether the target has accepted; if not, try its next address."""
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
        limit = self.shared.settings.cut_after_bytes
        return None if limit is None else max(limit - self._n_carried, 0)

    def carried(self, counter: str, n_bytes: int) -> None:
        """Count ``n_bytes`` that were handed on, and cut the connection if it may carry no more."""
        counts = self.shared.counts
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
        deadline = self.shared.clock.now() + _TAKEN_SECONDS

        def look() -> None:
            now = self.shared.clock.now()
            if now < deadline and any(end.n_untaken for end in (self._client, self._target)):
                self.shared.clock.at(now + 0.001, look)
            else:
                reset()

        look()

    def finish(self) -> None:
        """Close both ends, if both have been told that nothing more comes."""
        if all(lane.done for lane in self._lanes):
            self._close(reset=False)

    def lose(self, end: End) -> None:
        """An end was reset. The other learns of it after all that came before."""
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
            self.shared.counts["cuts"] += 1
            self.reset()

    def reset(self) -> None:
        """Reset both ends."""
        self._close(reset=True)

    def _close(self, *, reset: bool) -> None:
        if not self.dead:
            self.dead = True
            self.shared.connections.discard(self)
            for end in (self._client, self._target):
                end.close(reset=reset)
            for lane in self._lanes:
                lane.drop()

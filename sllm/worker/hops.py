"""Rows on their way to the worker with the next layers: the connections, and the stream of one sequence.

What the other worker gets is what the client could have sent it: rows, their positions, and a capability that
is good for this one stream. No token of a user is known here that would be good elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import join
from sllm.errors import BusyError, ClosedError, RemoteError, SllmError
from sllm.extras import needs
from sllm.wire import auth
from sllm.wire.channels import open_channel
from sllm.wire.protocol import method, pb

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.worker.destinations import Destinations

__all__ = ["Hop", "Hops"]

log = logging.getLogger("sllm.worker")

_REACH_SECONDS = 5.0
"""For the next worker to be reached, and to say whether it takes the capability; the client relays the rows
otherwise.
"""

_KNOWN_SECONDS = 15.0
"""For the capability to become known to a worker that says that it is not: the client has a connection of its
own to it, and a busy worker takes its time to open a sequence.
"""

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5
"""Between attempts: the client's own message to the next worker may come later than this one's."""

_KEPT_SECONDS = 2.0
"""For an answer over a connection of a text before; another is made then. What forgets connections that are
quiet, as address translation and firewalls do, tells nobody.
"""

_KEEPALIVE_SECONDS = 10.0

_UNUSED_SECONDS = 300.0
"""A connection that no text uses is kept for so long: the next text need not wait for another."""

_PER_SESSION = 4
"""Streams to other workers, for each text that there may be at once: those of texts that have ended may still
be on their way to a worker that does not answer.
"""

_N_CERTIFICATES = 64
"""That are remembered."""

_BACKLOG = 32
"""Messages with rows that wait to be sent; the sequence waits where there are more."""


class _SilentError(RemoteError):
    """Nothing has come of another worker, neither yes nor no."""


@dataclass(eq=False)
class _Connection:
    """A channel to another worker, and who uses it."""

    address: auth.Address
    channel: grpc.Channel
    n_users: int = 0
    used: float = 0.0  # when the last one left
    kept: bool = False  # by a text before: the way there may have gone meanwhile, unnoticed
    admitted: bool = False  # a stream over it was accepted: the other worker reads all that comes
    broken: bool = False  # no text is to use it any more


class Hops:
    """Connections to other workers, each of which the texts share that go there.

    Args:
        allowed: where they may lead.
        sessions: texts at once; as many connections are kept that none uses.

    """

    def __init__(self, allowed: Destinations, sessions: int) -> None:
        self.allowed = allowed
        self._sessions = sessions
        self._lock = threading.Lock()  # over all that follows
        self._connections: dict[auth.Address, _Connection] = {}
        self._certificates: dict[str, bytes] = {}
        self._hops: set[Hop] = set()
        self._closed = False

    def open(self, target: pb.Hop, on_lost: Callable[[], object]) -> Hop:
        """A stream to the worker that a client names.

        Args:
            target: where it is, and the capability.
            on_lost: called once when rows cannot go there that were to, or nobody was reached there, unless
                the stream was closed.

        Raises:
            ValueError: not an address, a fingerprint and a capability.
            BusyError: there are as many as there may be.

        """
        if len(target.fingerprint) != 32 or len(target.capability) != auth.CAPABILITY_BYTES:
            raise ValueError(
                f"a hop needs a fingerprint of 32 bytes and a capability of {auth.CAPABILITY_BYTES}, and has"
                f" {len(target.fingerprint)} and {len(target.capability)}"
            )
        if not target.host or len(target.host) > 253 or not 0 < target.port < 1 << 16:
            raise ValueError("a hop needs a host and a port")
        hop = Hop(self, target, on_lost)
        with self._lock:
            if self._closed:
                raise ClosedError("the worker is ending; go on elsewhere")
            if len(self._hops) >= _PER_SESSION * self._sessions:
                raise BusyError("the worker is bringing rows to as many others as it may")
            self._hops.add(hop)
        hop.start()
        return hop

    @contextmanager
    def connection(self, target: pb.Hop) -> Iterator[_Connection]:
        """A connection to the worker that a client names. It may take some seconds.

        Raises:
            AuthError: another certificate is there.
            RemoteError: it is not allowed, or nobody answers there.

        """
        ip = self.allowed.resolve(target.host, target.port)
        address = auth.Address(ip, target.port, fingerprint=target.fingerprint.hex())
        found = self._find(address)
        if len(self._certificates) > _N_CERTIFICATES:
            self._certificates.clear()
        if found is None:  # outside of the lock: others need not wait
            channel = open_channel(
                address, _REACH_SECONDS, keepalive=_KEEPALIVE_SECONDS, certificates=self._certificates
            )
            found = self._add(_Connection(address, channel))
        try:
            yield found
        finally:
            self._leave(found)

    def _find(self, address: auth.Address) -> _Connection | None:
        with self._lock:
            found = self._connections.get(address)
            if found is None or found.broken:
                return None
            found.n_users += 1
            found.kept = True
            return found

    def _add(self, made: _Connection) -> _Connection:
        with self._lock:
            if self._closed:
                made.channel.close()
                raise ClosedError("the worker is ending; go on elsewhere")
            found = self._connections.get(made.address)
            if found is None or found.broken:  # whoever uses that one closes it
                found = self._connections[made.address] = made
            found.n_users += 1
        if found is not made:
            made.channel.close()
        return found

    def _leave(self, connection: _Connection) -> None:
        now = time.monotonic()
        with self._lock:
            connection.n_users -= 1
            connection.used = now
            if connection.broken and self._connections.get(connection.address) is connection:
                del self._connections[connection.address]
            unused = sorted(
                (one for one in self._connections.values() if not one.n_users), key=lambda one: one.used
            )
            n_over = len(unused) - self._sessions
            gone = [one for i, one in enumerate(unused) if i < n_over or now - one.used > _UNUSED_SECONDS]
            for one in gone:
                del self._connections[one.address]
            if connection.broken and not connection.n_users:
                gone.append(connection)
        for one in gone:
            one.channel.close()

    def forget(self, hop: Hop) -> None:
        """The thread of a stream has ended."""
        with self._lock:
            self._hops.discard(hop)

    def close(self) -> None:
        """End every stream, and hang up."""
        with self._lock:
            self._closed = True
            hops = list(self._hops)
        for hop in hops:
            hop.close()
        for hop in hops:
            hop.join()
        with self._lock:
            connections = list(self._connections.values())
            self._connections.clear()
        for one in connections:
            one.channel.close()


class Hop:
    """The stream of one sequence to the worker with the next layers; see :meth:`Hops.open`."""

    def __init__(self, hops: Hops, target: pb.Hop, on_lost: Callable[[], object]) -> None:
        self._hops = hops
        self._target = target
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._rows: deque[pb.FeedUp] = deque()  # until the capability is taken, also those that were sent
        self._accepted = False
        self._refused = False  # over this connection: the capability is not known there yet
        self._over = False  # closed, or lost
        self._closed = False
        self._missed = False  # there is something that could not be sent
        self._told = False
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="sllm-hop", daemon=True)

    def start(self) -> None:
        """Connect."""
        self._thread.start()

    def send(self, rows: pb.Rows) -> None:
        """Have rows sent; blocks while many wait. Does nothing once the stream is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._rows) < _BACKLOG)
            if not self._over:
                self._rows.append(pb.FeedUp(rows=rows))
                self._changed.notify_all()
            self._missed |= self._over
        self._tell()

    def close(self) -> None:
        """Send no more. More calls do nothing."""
        with self._changed:
            self._closed = True
        self._end()

    def join(self) -> None:
        """Wait for the stream's thread, which may be looking up a name."""
        if self._thread.ident is not None:
            join(self._thread, _REACH_SECONDS)

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._missed |= bool(self._rows) or not self._accepted
            call = self._call
            self._rows.clear()
            self._changed.notify_all()
        if call is not None:
            call.cancel()

    def _tell(self) -> None:
        """Say that rows cannot be sent, if that is so and was not said."""
        with self._changed:
            news = self._over and self._missed and not (self._closed or self._told)
            self._told |= news
        if news:
            self._on_lost()

    # ---- on its own thread

    def _run(self) -> None:
        reason = "it ended the stream"
        try:
            self._bring()
        except grpc.RpcError as error:
            reason = error.code().name.lower()
            # The other worker ends a stream in this way that is over, and tells the client why, who would
            # take it for a way that is lost if it heard of it from here first.
            ended_there = error.code() is grpc.StatusCode.CANCELLED
            with self._changed:
                self._told |= ended_there
                self._missed |= not ended_there
        except (SllmError, ValueError, RuntimeError) as error:
            reason = str(error)
        finally:
            self._end()
            self._hops.forget(self)
            if not self._closed:
                log.info("no rows can go to the next worker any more: %s", reason)
            self._tell()

    def _bring(self) -> None:
        """Send rows until the stream ends; over a new connection where one that was kept is of no use."""
        until = time.monotonic() + _KNOWN_SECONDS
        while True:
            with self._hops.connection(self._target) as connection:
                kept = connection.kept
                try:
                    self._feed(connection, until, _KEPT_SECONDS if kept else _REACH_SECONDS)
                except _SilentError:
                    connection.broken = True
                    if not kept or time.monotonic() > until:
                        raise
                except grpc.RpcError as error:
                    connection.broken |= error.code() is grpc.StatusCode.UNAVAILABLE
                    # One that has refused the capability is there, and hangs up on who asks too often.
                    again = connection.broken and (kept or self._refused) and not self._accepted
                    if not again or time.monotonic() > until:
                        raise
                else:
                    return

    def _feed(self, connection: _Connection, until: float, patience: float) -> None:
        """Send rows until the stream ends; tries again while the capability is not known there yet."""
        pause = _FIRST_PAUSE
        self._refused = False
        while True:
            try:
                self._attempt(connection, patience)
            except grpc.RpcError as error:
                early = error.code() is grpc.StatusCode.UNAUTHENTICATED and not self._accepted
                self._refused |= early
                if not early or time.monotonic() + pause > until:
                    raise
            else:
                return
            with self._changed:
                if self._changed.wait_for(lambda: self._over, pause):
                    return
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt(self, connection: _Connection, patience: float) -> None:
        stub = connection.channel.stream_stream(
            method("Feed"), pb.FeedUp.SerializeToString, pb.FeedDown.FromString
        )
        ended, silent = threading.Event(), threading.Event()
        with self._changed:
            if self._over:
                return
            call: Any = stub(
                self._outgoing(ended, early=connection.admitted),
                metadata=auth.bearing(self._target.capability),
                wait_for_ready=False,
            )
            self._call = call

        def give_up() -> None:
            silent.set()
            call.cancel()

        late = threading.Timer(patience, give_up)
        late.start()
        try:
            for _ in call:
                late.cancel()
                connection.admitted = True
                with self._changed:
                    self._accepted = True
                    self._changed.notify_all()
            if not self._accepted:
                raise RemoteError("the next worker did not take the capability")
        except grpc.RpcError:
            if silent.is_set() and not self._accepted:
                raise _SilentError("the next worker does not answer") from None
            raise
        finally:
            late.cancel()
            with self._changed:
                ended.set()
                self._changed.notify_all()

    def _outgoing(self, ended: threading.Event, *, early: bool) -> Iterator[pb.FeedUp]:
        """The rows for one attempt; those of an attempt that fails are for the next one.

        Without ``early`` they wait until it is accepted: of a connection over which nothing has been, a
        worker reads 24 KiB and no more (:class:`~sllm.worker.listener.Listener`). Rows beyond that, of an
        attempt that comes before the client has been there, would stand in the way of all later ones.
        """
        n_sent = 0  # of those that are kept
        while True:
            with self._changed:
                while not self._over and not ended.is_set():
                    if self._accepted and n_sent:
                        for _ in range(n_sent):
                            self._rows.popleft()
                        n_sent = 0
                        self._changed.notify_all()
                    if (early or self._accepted) and len(self._rows) > n_sent:
                        break
                    self._changed.wait()
                else:
                    return
                message = self._rows[n_sent]
                n_sent += 1
            yield message

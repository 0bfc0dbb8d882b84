"""A stream that outlives its link: when to connect again, when to wait, and when to give up."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from sllm.engine.handle import join
from sllm.errors import AuthError, BusyError, ClosedError, RemoteError
from sllm.extras import needs
from sllm.wire.protocol import OtherModelError, failure, is_ending, method

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.remote.link import WorkerLink
    from sllm.remote.route import Route
    from sllm.targets.base import RemoteStats

__all__ = [
    "ON_LOSS",
    "ResumableStream",
    "RetryError",
    "StoppedError",
    "StreamLostError",
    "WorkerEndingError",
    "checked_on_loss",
]

log = logging.getLogger("sllm.remote")

_T = TypeVar("_T")

ON_LOSS = ("wait", "raise", "local")
"""What may be done when the link is lost; see :func:`sllm.connect`."""

FIRST_PAUSE = 0.05
"""Seconds before the first attempt to connect again."""

_LONGEST_PAUSE = 2.0
"""Seconds between attempts to connect again, at most."""


def checked_on_loss(value: str) -> str:
    """``value``, if it is one of :data:`ON_LOSS`.

    Raises:
        ValueError: it is not.

    """
    if value not in ON_LOSS:
        raise ValueError(f"on_loss is {value!r}, expected one of {', '.join(ON_LOSS)}")
    return value


def _nothing() -> None:
    """Do nothing."""


class StreamLostError(Exception):
    """Raised by an attempt: the call has broken for the reason given; connect again."""


class WorkerEndingError(StreamLostError):
    """Raised by an attempt: the worker is being shut down, and says so."""

    def __init__(self) -> None:
        super().__init__("the worker is ending")


class RetryError(Exception):
    """Raised by an attempt: the call has ended, and nothing is wrong with the link; make another one."""


class StoppedError(Exception):
    """Raised by :meth:`ResumableStream.run`: :meth:`~ResumableStream.stop` was called."""


class ResumableStream:
    """One bidirectional call to a worker, made anew when it breaks.

    The messages are its owner's business: :meth:`run` calls a function that opens the call
    (:meth:`open_call`), sends what the worker needs to know, and reads. When the call breaks, that function
    is called once more, on a channel that works.

    Args:
        route: on which worker it is, and where it may go.
        stats: where reconnects and the time without a link are counted.
        on_loss: ``"raise"``, or another of :data:`ON_LOSS`, which both mean: wait.
        on_change: called when the link is lost, when it is found, and when the stream is stopped, by the
            thread that notices.
        lost_since: when (``time.monotonic()``) a stream before this one, of the same text, had lost its link
            that was not found again; None: there is none.

    Attributes:
        channel: the one that the call is on; None between calls.
        call: the call; None between calls.
        stopped: set by :meth:`stop`.

    """

    def __init__(
        self,
        route: Route,
        stats: RemoteStats,
        on_loss: str,
        on_change: Callable[[], object] = _nothing,
        lost_since: float | None = None,
    ) -> None:
        self.channel: grpc.Channel | None = None
        self.call: Any = None
        self.stopped = threading.Event()
        self._route = route
        self._stats = stats
        self._on_loss = on_loss
        self._on_change = on_change
        self._outage = _Outage(route, self.stopped, stats, lost_since)
        self._answered = False  # the worker has sent something in this call
        self._progressed = False  # something new has come, in any call
        self._end_outgoing: Callable[[], object] = _nothing
        self._rivals: set[Any] = set()  # calls besides that one; see hedge
        self._link: WorkerLink | None = None  # that the call is on
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether there is no link at the moment."""
        return self._outage.lost

    @property
    def lost_since(self) -> float | None:
        """When the link was lost (``time.monotonic()``); None: it is there."""
        return self._outage.lost_since

    # ---- for the owner

    def run(self, attempt: Callable[[grpc.Channel], _T]) -> _T:
        """Call ``attempt`` with a channel, again after every loss, until it returns; what it returns.

        The call is ended when ``attempt`` raises, and left open when it returns.

        Raises:
            StoppedError: :meth:`stop` was called.
            RemoteError: the link is lost, for longer than the deadline or with ``on_loss="raise"``.
            BusyError: the worker has no place for a new stream, or its user has had what it may. One that had
                got something waits until it may go on, unless that is not before the deadline, or with
                ``on_loss="raise"``.
            ClosedError, AuthError, OtherModelError: the link cannot be renewed any more.
            Exception: what the worker refused with, and whatever else ``attempt`` raises.

        """
        route = self._route
        streams = route.fleet.streams
        channel = route.link.live()
        streams.add(self)
        try:
            while True:
                if self.stopped.is_set():
                    raise StoppedError
                refusal: BusyError | None = None
                try:
                    return self._checked(attempt, channel)
                except RetryError:
                    channel = route.link.live()
                    continue
                except WorkerEndingError as error:  # no loss, where there is another one
                    reason = str(error)
                    route.fleet.note_draining(route.link)
                    other = route.elsewhere(channel)
                    if other is not None:
                        channel = other
                        continue
                except OtherModelError as error:
                    route.fleet.note_other(route.link, error)
                    other = route.elsewhere(channel)
                    if other is None:
                        raise
                    channel = other
                    continue
                except StreamLostError as error:
                    reason = str(error)
                except BusyError as error:
                    other = route.elsewhere(channel, error)
                    if other is not None:
                        channel = other
                        continue
                    if self._on_loss == "raise" or not (self.lost or self._progressed):
                        raise
                    refusal, reason = error, str(error)
                if refusal is None:
                    route.fleet.note_lost(route.link, channel, reason)
                self._mark_lost(reason)
                found = route.elsewhere(channel) if refusal is None else None
                if found is not None:
                    channel = found
                    continue
                # Whatever the reason, an address where not even the call was answered is tried last.
                elsewhere = not self._answered
                channel = self._outage.wait_and_retry(channel, reason, refusal, elsewhere=elsewhere)
        finally:
            if self.call is None and self._thread is None:
                streams.discard(self)

    def _checked(self, attempt: Callable[[grpc.Channel], _T], channel: grpc.Channel) -> _T:
        """One attempt, with gRPC's errors turned into ours."""
        try:
            try:
                return attempt(channel)
            except grpc.RpcError as error:
                if is_ending(error):
                    raise WorkerEndingError from None
                raise failure(error, self._route.link.endpoint) or StreamLostError(
                    error.details() or error.code().name.lower()
                ) from None
        except BaseException:
            self.hang_up()
            if self.stopped.is_set():
                raise StoppedError from None
            raise

    def open_call(
        self,
        channel: grpc.Channel,
        name: str,
        outgoing: Iterator[Any],
        serialize: Callable[[Any], bytes],
        parse: Callable[[bytes], Any] | None,
        *,
        end_outgoing: Callable[[], object],
    ) -> Any:
        """Open the call; what comes is iterated over.

        Args:
            channel: to open it on.
            name: of the method.
            outgoing: the messages to send; gRPC iterates over them on its own thread.
            serialize: of a message.
            parse: of an answer; None: answers are bytes.
            end_outgoing: lets ``outgoing`` end; called when the call is over.

        Raises:
            RetryError: the channel is closed, and the link has another one by now.
            StreamLostError: the channel is closed.

        """
        self._answered = False
        self._end_outgoing = end_outgoing
        link = self._route.link
        stub = channel.stream_stream(method(name), serialize, parse)
        try:
            call = stub(outgoing, metadata=link.metadata, wait_for_ready=False)
        except ValueError:  # another stream has renewed the channel, or the link was closed
            if channel is link.channel:
                raise StreamLostError("the channel was closed") from None
            raise RetryError from None
        self.call, self.channel, self._link = call, channel, link
        if self.stopped.is_set():
            call.cancel()  # type: ignore[no-untyped-call]
        return call

    def open_rival(
        self,
        channel: grpc.Channel,
        link: WorkerLink,
        name: str,
        outgoing: Iterator[Any],
        serialize: Callable[[Any], bytes],
        parse: Callable[[bytes], Any] | None,
    ) -> Any:
        """Open another call for the same messages, on ``link``; arguments as for :meth:`open_call`. It ends
        by :meth:`end_rival`, and by :meth:`stop`.

        Raises:
            StreamLostError: the channel is closed.

        """
        try:
            stub = channel.stream_stream(method(name), serialize, parse)
            call = stub(outgoing, metadata=link.metadata, wait_for_ready=False)
        except ValueError:
            raise StreamLostError("the channel was closed") from None
        self._rivals.add(call)
        if self.stopped.is_set():
            call.cancel()  # type: ignore[no-untyped-call]
        return call

    def end_rival(self, call: Any, *, won: bool) -> None:
        """End that call, unless it has taken the place of the other one."""
        if not won:
            call.cancel()
        self._rivals.discard(call)

    def adopt(
        self, call: Any, link: WorkerLink, channel: grpc.Channel, end_outgoing: Callable[[], object]
    ) -> None:
        """Let the other call, which is on ``link``, take the place of this one, which ends."""
        self.hang_up()
        self._route.move(link)
        self._answered = False
        self._end_outgoing = end_outgoing
        self.call, self.channel, self._link = call, channel, link

    def mark_found(self) -> None:
        """The worker has answered."""
        self._answered = True
        self._route.answered(self._stats)
        if self._outage.mark_found():
            self._on_change()

    def progress(self) -> None:
        """Something new has come over the link: the deadline begins anew."""
        self._progressed = True
        self._route.progress()
        self._outage.progress()

    def _mark_lost(self, reason: str) -> None:
        endpoint = self._route.link.endpoint
        news = self._outage.mark_lost()
        if news:
            self._on_change()
        if self._on_loss == "raise":
            raise RemoteError(f"the link to {endpoint} was lost: {reason}")
        if news:
            log.warning("the link to %s is lost: %s", endpoint, reason)

    def hang_up(self) -> None:
        """End the call, if there is one."""
        call, channel, link = self.call, self.channel, self._link
        self.call = self.channel = self._link = None
        self._end_outgoing()
        self._end_outgoing = _nothing
        if call is not None:
            call.cancel()
        if channel is not None and link is not None:
            link.retire(channel)

    def suspend(self) -> None:
        """End the call while :meth:`run` is not running."""
        self.hang_up()
        self._route.fleet.streams.discard(self)

    # ---- with its own thread

    def start(self, work: Callable[[], object], name: str) -> None:
        """Do ``work`` on a thread, which calls :meth:`run`."""

        def target() -> None:
            try:
                work()
            finally:
                self.suspend()

        self._thread = threading.Thread(target=target, name=name, daemon=True)
        self._route.fleet.streams.add(self)
        self._thread.start()

    # ---- from any thread

    def stop(self) -> None:
        """End the call and whatever :meth:`run` is waiting for."""
        self.stopped.set()
        for call in (self.call, *list(self._rivals)):
            if call is not None:
                call.cancel()
        self._on_change()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the stream's own thread, if it has one."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            join(thread, timeout)


class _Outage:
    """The time without a link."""

    def __init__(
        self, route: Route, stopped: threading.Event, stats: RemoteStats, lost_since: float | None
    ) -> None:
        self._route = route
        self._stopped = stopped
        self._stats = stats
        self.lost_since = lost_since
        self._seconds = 0.0  # without a link since the last progress; the current outage is not in it
        self._pause = FIRST_PAUSE

    @property
    def lost(self) -> bool:
        """Whether there is no link."""
        return self.lost_since is not None

    def mark_lost(self) -> bool:
        """The link is lost; whether that is news."""
        if self.lost_since is not None:
            return False
        self.lost_since = time.monotonic()
        return True

    def mark_found(self) -> bool:
        """The other side has answered; whether that is news."""
        if self.lost_since is None:
            return False
        seconds = time.monotonic() - self.lost_since
        self._seconds += seconds
        self._stats.lost_seconds += seconds
        self._stats.n_reconnects += 1
        self.lost_since = None
        return True

    def progress(self) -> None:
        """Something new has come over the link."""
        self._seconds = 0.0
        self._pause = FIRST_PAUSE

    def wait_and_retry(
        self, channel: grpc.Channel, reason: str, refusal: BusyError | None = None, *, elsewhere: bool
    ) -> grpc.Channel:
        """A channel to try, after a pause.

        Args:
            channel: the one that failed.
            reason: why.
            refusal: the link is there, but the worker takes the stream only later.
            elsewhere: where there are several addresses, the one in use is tried last.

        Raises:
            StoppedError: the stream is not wanted any more.
            RemoteError: the deadline has passed.
            BusyError: ``refusal``, where it says that trying again is of no use before the deadline.
            ClosedError, AuthError, OtherModelError: further attempts are of no use.

        """
        route = self._route
        deadline = route.fleet.deadline
        assert self.lost_since is not None
        while True:
            left = deadline - self._seconds - (time.monotonic() - self.lost_since)
            later = 0.0 if refusal is None else refusal.retry_after or 0.0
            if refusal is not None and left <= later:
                raise refusal
            if left <= 0:
                endpoint = route.link.endpoint
                raise RemoteError(f"{endpoint} was out of reach for {deadline:g} seconds: {reason}")
            # Jittered, so that the clients of a worker that returns do not all come at once.
            if self._stopped.wait(min(later + self._pause * random.uniform(0.5, 1.0), left)):
                raise StoppedError
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            if refusal is not None:
                return route.again(channel)  # others may be using it
            try:
                timeout = max(0.2, min(left, route.fleet.timeout, 5.0))
                return route.renew(channel, timeout, elsewhere=elsewhere)
            except (ClosedError, AuthError, OtherModelError):
                raise
            except (RemoteError, BusyError) as error:
                reason = str(error)

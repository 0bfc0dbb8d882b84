"""A stream that outlives its link, without a network: what is tried, when, and what ends it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import sllm
from sllm.remote import stream as module
from sllm.remote.stream import ResumableStream, RetryError, StoppedError, StreamLostError, WorkerEndingError
from sllm.targets.base import RemoteStats
from sllm.wire.protocol import OtherModelError

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 10.0


class FakeCall:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeChannel:
    """Opens calls, or is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.calls: list[FakeCall] = []

    def stream_stream(self, _method: str, _serialize: Any, _parse: Any) -> Callable[..., FakeCall]:
        def open_call(_outgoing: Any, **_: Any) -> FakeCall:
            if self.closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            self.calls.append(FakeCall())
            return self.calls[-1]

        return open_call


class FakeLink:
    """What a stream needs of a Route, of its Fleet and of the WorkerLink: there is one worker, unless
    ``others`` has channels to more.
    """

    def __init__(self, deadline: float = PATIENCE) -> None:
        self.channel: Any = FakeChannel()
        self.streams: set[Any] = set()
        self.endpoint = "worker:1"
        self.metadata = ()
        self.timeout, self.deadline = 1.0, deadline
        self.closed = False
        self.renewals: list[bool] = []  # elsewhere, of each
        self.errors: list[Exception] = []  # of the next renewals
        self.retired: list[Any] = []
        self.link = self.fleet = self
        self.others: list[FakeChannel] = []
        self.lost: list[tuple[Any, str]] = []  # channels, and why
        self.refusals: list[sllm.BusyError] = []
        self.moves: list[Any] = []
        self.n_answered = self.n_draining = self.n_other = 0

    def elsewhere(self, channel: Any, refusal: sllm.BusyError | None = None) -> Any:
        assert channel is self.channel
        if refusal is not None:
            self.refusals.append(refusal)
        if not self.others:
            return None
        self.channel = self.others.pop(0)
        return self.channel

    def note_lost(self, link: Any, channel: Any, reason: str) -> None:
        assert link is self
        self.lost.append((channel, reason))

    def note_other(self, link: Any, error: OtherModelError) -> None:
        assert link is self
        self.n_other += 1

    def note_draining(self, link: Any) -> None:
        assert link is self
        self.n_draining += 1

    def answered(self, _stats: RemoteStats) -> None:
        self.n_answered += 1

    def progress(self) -> None:
        pass

    def move(self, link: Any) -> None:
        self.moves.append(link)

    def again(self, channel: Any) -> Any:
        return channel

    def live(self) -> Any:
        if self.closed:
            raise sllm.ClosedError("the connection is closed")
        return self.channel

    def renew(self, failed: Any, _timeout: float, *, elsewhere: bool) -> Any:
        self.renewals.append(elsewhere)
        if self.errors:
            raise self.errors.pop(0)
        assert failed is self.channel
        self.channel = FakeChannel()
        return self.channel

    def retire(self, channel: Any) -> None:
        self.retired.append(channel)


class Refused(grpc.RpcError):
    """A call that has failed."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str = "",
        retry_after_ms: int | None = None,
        more: tuple[str, str] | None = None,
    ) -> None:
        self._code, self._details = code, details
        self._retry_after_ms = retry_after_ms
        self._more = () if more is None else (more,)

    def trailing_metadata(self) -> Any:
        later = self._retry_after_ms
        return self._more if later is None else (*self._more, ("sllm-retry-after-ms", str(later)))

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class Script:
    """Attempts that open a call and then do one thing after the other: raise, or return."""

    def __init__(self, stream: ResumableStream, *steps: Any, answered: bool = True) -> None:
        self.stream = stream
        self.steps = list(steps)
        self.answered = answered
        self.channels: list[Any] = []
        self.n_ended = 0  # outgoing messages that were let end

    def __call__(self, channel: Any) -> Any:
        self.channels.append(channel)
        self.stream.open_call(channel, "Generate", iter(()), bytes, bytes, end_outgoing=self.end)
        if self.answered:
            self.stream.mark_found()
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def end(self) -> None:
        self.n_ended += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)


def make(
    link: FakeLink, on_loss: str = "wait", on_change: Callable[[], object] = lambda: None
) -> tuple[ResumableStream, RemoteStats]:
    stats = RemoteStats()
    return ResumableStream(link, stats, on_loss, on_change), stats  # type: ignore[arg-type]


def test_a_call_that_succeeds_is_left_open() -> None:
    link = FakeLink()
    stream, _ = make(link)
    script = Script(stream, "first")
    assert stream.run(script) == "first"
    call = stream.call
    assert call is link.channel.calls[0] and not call.cancelled.is_set()
    assert link.streams == {stream} and stream.channel is link.channel
    stream.suspend()
    assert call.cancelled.is_set() and stream.call is stream.channel is None
    assert script.n_ended == 1 and not link.streams and link.retired == [link.channel]
    stream.suspend()
    assert script.n_ended == 1


@pytest.mark.parametrize(
    "loss",
    [StreamLostError("cut"), Refused(grpc.StatusCode.UNAVAILABLE, "gone"), Refused(grpc.StatusCode.UNKNOWN)],
    ids=["lost", "unavailable", "no details"],
)
def test_a_lost_call_is_made_again(loss: Exception) -> None:
    changes: list[bool] = []
    link = FakeLink()
    stream, stats = make(link, on_change=lambda: changes.append(stream.lost))
    first = link.channel
    script = Script(stream, loss, sllm.RemoteError("never raised"), "text")
    del script.steps[1]
    assert stream.run(script) == "text"
    assert script.channels == [first, link.channel] and link.channel is not first
    assert first.calls[0].cancelled.is_set() and script.n_ended == 1
    assert changes == [True, False] and stats.n_reconnects == 1 and stats.lost_seconds > 0
    assert link.renewals == [False]  # it had answered


def test_an_address_that_did_not_answer_is_tried_last() -> None:
    link = FakeLink()
    stream, _ = make(link)
    assert stream.run(Script(stream, StreamLostError("cut"), 1, answered=False)) == 1
    assert link.renewals == [True]
    assert stream.lost  # still unanswered
    stream.mark_found()
    assert not stream.lost


def test_retrying_is_no_loss() -> None:
    link = FakeLink()
    stream, stats = make(link)
    assert stream.run(Script(stream, RetryError(), RetryError(), 1)) == 1
    assert not link.renewals and stats.n_reconnects == 0 and len(link.channel.calls) == 3


def test_a_channel_that_another_stream_has_renewed() -> None:
    link = FakeLink()
    stream, _ = make(link)
    script = Script(stream, 1)
    stale, fresh = link.channel, FakeChannel()
    stale.closed = True

    def attempt(channel: Any) -> Any:
        if channel is stale:
            link.channel = fresh
        return script(channel)

    assert stream.run(attempt) == 1
    assert script.channels == [stale, fresh] and not link.renewals


def test_a_closed_channel_that_nobody_has_renewed() -> None:
    link = FakeLink()
    link.channel.closed = True
    stream, _ = make(link)
    assert stream.run(Script(stream, 1)) == 1
    assert link.renewals == [True]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("bad grammar"), ValueError),
        (Refused(grpc.StatusCode.INVALID_ARGUMENT, "bad grammar"), ValueError),
        (Refused(grpc.StatusCode.UNAUTHENTICATED), sllm.AuthError),
        (Refused(grpc.StatusCode.RESOURCE_EXHAUSTED), sllm.BusyError),
        (KeyError("a bug"), KeyError),
    ],
    ids=["raised", "refused", "token", "busy", "bug"],
)
def test_what_is_no_loss_is_raised(error: Exception, kind: type[Exception]) -> None:
    link = FakeLink()
    stream, _ = make(link)
    with pytest.raises(kind):
        stream.run(Script(stream, error))
    assert stream.call is None and not link.streams and not link.renewals
    assert link.channel.calls[0].cancelled.is_set()


def test_a_busy_worker_is_waited_for_after_a_loss() -> None:
    """Who had a place waits for another; the channel is used by others and is kept."""
    link = FakeLink()
    stream, _ = make(link)
    busy = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no place")
    script = Script(stream, StreamLostError("cut"), busy, busy, 1, answered=False)
    assert stream.run(script) == 1
    assert len(link.renewals) == 1
    assert len(set(script.channels)) == 2 and len(script.channels) == 4


@pytest.mark.parametrize("later", [None, 30])
def test_who_has_got_something_waits_until_it_may_go_on(later: int | None) -> None:
    link = FakeLink(deadline=20)
    stream, _ = make(link)
    stream.progress()
    busy = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more", later)
    began = time.monotonic()
    assert stream.run(Script(stream, busy, busy, 1, answered=False)) == 1
    assert not link.renewals, "the channel is as good as before"
    assert time.monotonic() - began >= 2 * (later or 0) / 1000


def test_nobody_waits_for_what_comes_after_the_deadline() -> None:
    link = FakeLink(deadline=20)
    stream, _ = make(link)
    stream.progress()
    busy = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more", 20_001)
    with pytest.raises(sllm.BusyError, match="no more") as caught:
        stream.run(Script(stream, busy))
    assert caught.value.retry_after == 20.001


def test_a_worker_that_stays_busy_is_waited_for_until_the_deadline() -> None:
    stream, _ = make(FakeLink(deadline=0.2))
    stream.progress()
    busy = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no place")
    with pytest.raises(sllm.BusyError, match="no place"):
        stream.run(Script(stream, *[busy] * 1000, answered=False))


def test_on_loss_raise_does_not_wait_for_a_busy_worker() -> None:
    stream, _ = make(FakeLink(), "raise")
    stream.progress()
    with pytest.raises(sllm.BusyError, match="no place"):
        stream.run(Script(stream, Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no place")))


# ---- several workers


def test_a_text_goes_on_elsewhere_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pause, and without trying the lost one again."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 1000.0)
    link = FakeLink()
    other = FakeChannel()
    link.others = [other]
    stream, stats = make(link)
    first = link.channel
    script = Script(stream, StreamLostError("cut"), "text")
    assert stream.run(script) == "text"
    assert script.channels == [first, other]
    assert link.lost == [(first, "cut")] and not link.renewals
    assert stats.n_reconnects == 1 and link.n_answered == 2


def test_a_place_is_looked_for_elsewhere() -> None:
    """Before anything was lost, and where all are full that is what is said."""
    link = FakeLink()
    link.others = [FakeChannel(), FakeChannel()]
    stream, stats = make(link, "raise")
    busy = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no place", 2000)
    script = Script(stream, busy, busy, "text")
    assert stream.run(script) == "text"
    assert [error.retry_after for error in link.refusals] == [2.0, 2.0]
    assert not link.lost and stats.n_reconnects == 0
    with pytest.raises(sllm.BusyError, match="no place"):
        stream.run(Script(stream, busy))


@pytest.mark.parametrize("on_loss", ["wait", "raise"])
@pytest.mark.parametrize(
    "how",
    [
        WorkerEndingError(),
        Refused(grpc.StatusCode.UNAVAILABLE, "the worker is ending", more=("sllm-ending", "1")),
    ],
    ids=["ended", "refused"],
)
def test_a_worker_that_is_shut_down_is_no_loss(on_loss: str, how: Exception) -> None:
    changes: list[bool] = []
    link = FakeLink()
    link.others = [FakeChannel()]
    stream, stats = make(link, on_loss, lambda: changes.append(stream.lost))
    script = Script(stream, how, "text")
    assert stream.run(script) == "text"
    assert link.n_draining == 1 and not link.lost
    assert stats.n_reconnects == 0 and not changes
    # It is one where there is nobody else.
    stream, stats = make(link, on_loss)
    if on_loss == "raise":
        with pytest.raises(sllm.RemoteError, match="the worker is ending"):
            stream.run(Script(stream, how))
    else:
        assert stream.run(Script(stream, how, "text")) == "text"
        assert stats.n_reconnects == 1


def test_another_model_is_left_for_another_worker() -> None:
    link = FakeLink()
    link.others = [FakeChannel()]
    stream, _ = make(link, "raise")
    other = Refused(grpc.StatusCode.FAILED_PRECONDITION, "other.gguf", more=("sllm-other-model", "1"))
    assert stream.run(Script(stream, other, "text")) == "text"
    assert link.n_other == 1
    with pytest.raises(OtherModelError, match=r"worker:1: other\.gguf"):
        stream.run(Script(stream, other))


def test_stopping_ends_both_calls_of_a_race() -> None:
    link = FakeLink()
    stream, _ = make(link)

    def attempt(channel: Any) -> Any:
        call = stream.open_call(channel, "Generate", iter(()), bytes, bytes, end_outgoing=lambda: None)
        rival = stream.open_rival(FakeChannel(), link, "Generate", iter(()), bytes, bytes)  # type: ignore[arg-type]
        threading.Timer(0.05, stream.stop).start()
        assert call.cancelled.wait(PATIENCE) and rival.cancelled.wait(PATIENCE)
        late = stream.open_rival(FakeChannel(), link, "Generate", iter(()), bytes, bytes)  # type: ignore[arg-type]
        assert late.cancelled.is_set()
        raise Refused(grpc.StatusCode.CANCELLED)

    with pytest.raises(StoppedError):
        stream.run(attempt)


def test_the_call_that_wins_takes_the_place_of_the_other() -> None:
    link, second = FakeLink(), FakeLink()
    stream, _ = make(link)
    ended: list[str] = []

    def attempt(channel: Any) -> Any:
        call = stream.open_call(
            channel, "Generate", iter(()), bytes, bytes, end_outgoing=lambda: ended.append("first")
        )
        rival = stream.open_rival(second.channel, second, "Generate", iter(()), bytes, bytes)  # type: ignore[arg-type]
        stream.adopt(rival, second, second.channel, lambda: ended.append("second"))  # type: ignore[arg-type]
        stream.end_rival(rival, won=True)
        assert call.cancelled.is_set() and not rival.cancelled.is_set()
        assert stream.call is rival and stream.channel is second.channel and ended == ["first"]
        return "text"

    assert stream.run(attempt) == "text"
    assert link.moves == [second] and link.retired == [link.channel]
    call = stream.call
    stream.suspend()
    assert call.cancelled.is_set() and ended == ["first", "second"] and second.retired == [second.channel]


def test_on_loss_raise() -> None:
    link = FakeLink()
    stream, _ = make(link, "raise")
    with pytest.raises(sllm.RemoteError, match="the link to worker:1 was lost: cut"):
        stream.run(Script(stream, StreamLostError("cut")))
    assert not link.renewals and stream.lost


def test_failed_renewals_are_repeated_until_the_deadline() -> None:
    link = FakeLink(deadline=0.3)
    link.errors = [sllm.RemoteError("refused")] * 1000
    stream, _ = make(link)
    with pytest.raises(sllm.RemoteError, match=r"worker:1 was out of reach for 0\.3 seconds: refused"):
        stream.run(Script(stream, StreamLostError("cut")))
    assert len(link.renewals) >= 2


def test_the_deadline_counts_all_outages_since_the_last_progress() -> None:
    link = FakeLink(deadline=0.3)
    stream, stats = make(link)
    with pytest.raises(sllm.RemoteError, match="out of reach"):
        stream.run(Script(stream, *[StreamLostError("cut") for _ in range(10_000)]))
    assert stats.n_reconnects >= 2
    stream.progress()
    assert stream.run(Script(stream, StreamLostError("cut"), 1)) == 1


@pytest.mark.parametrize(
    "error",
    [sllm.ClosedError("closed"), sllm.AuthError("another"), OtherModelError("other weights")],
    ids=["closed", "certificate", "weights"],
)
def test_renewals_that_are_of_no_use(error: Exception) -> None:
    link = FakeLink()
    link.errors = [sllm.BusyError("busy"), sllm.RemoteError("refused"), error]
    stream, _ = make(link)
    with pytest.raises(type(error)) as caught:
        stream.run(Script(stream, StreamLostError("cut")))
    assert caught.value is error and len(link.renewals) == 3


def test_stopping_ends_a_call() -> None:
    link = FakeLink()
    stream, _ = make(link)

    def attempt(channel: Any) -> Any:
        call = stream.open_call(channel, "Generate", iter(()), bytes, bytes, end_outgoing=lambda: None)
        threading.Timer(0.05, stream.stop).start()
        assert call.cancelled.wait(PATIENCE)
        raise Refused(grpc.StatusCode.CANCELLED)

    with pytest.raises(StoppedError):
        stream.run(attempt)
    with pytest.raises(StoppedError):
        stream.run(attempt)
    assert not link.streams and stream.call is None


def test_stopping_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 1000.0)
    link = FakeLink(deadline=1e5)
    stream, _ = make(link)
    threading.Timer(0.05, stream.stop).start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        stream.run(Script(stream, StreamLostError("cut")))
    assert time.monotonic() - began < PATIENCE
    assert not link.renewals


def test_a_thread_of_its_own() -> None:
    link = FakeLink()
    stream, _ = make(link)
    told: list[object] = []
    going = threading.Event()

    def work() -> None:
        told.append(stream.run(Script(stream, "text")))
        going.wait(PATIENCE)

    stream.start(work, "sllm-remote")
    assert link.streams == {stream}
    stream.join(0.01)
    going.set()
    stream.join()
    assert told == ["text"] and stream.call is None and not link.streams
    assert link.channel.calls[0].cancelled.is_set()

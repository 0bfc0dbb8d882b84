"""What the two schedulers of a worker share: slots for sequences, and the thread that runs the passes.

:mod:`sllm.worker.scheduler` serves whole texts in this way, :mod:`sllm.worker.layer_scheduler` layers of a
model.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from sllm.engine.handle import join
from sllm.errors import CancelledError, ClosedError, ContextFullError
from sllm.wire.traces import raised_at
from sllm.worker.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.sampling import SamplingParams

__all__ = ["Limits", "Pace", "PassLoop", "SchedulerStats", "Slot"]

log = logging.getLogger("sllm.worker")

_MAX_FAILURES = 3
"""Passes that may fail in a row before the worker gives up."""

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Pace:
    """The least that passes take, in seconds: a stand-in for larger models, for tests and benchmarks.

    Attributes:
        pass_seconds: of a pass, and ``row_seconds`` for each of its rows.
        draft_seconds: of a token that the worker drafts itself, for all texts together, and
            ``draft_row_seconds`` for each of these.

    """

    pass_seconds: float = 0.0
    row_seconds: float = 0.0
    draft_seconds: float = 0.0
    draft_row_seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Limits on what a worker's clients may use.

    Attributes:
        sessions: texts at once.
        queue: texts that may wait for a place; further ones are refused.
        max_prompt: tokens of a prompt; None: what fits the context.
        max_hint: tokens of one hint.
        hints_per_s: hints of one session per second, averaged over a few seconds.
        max_grammar: bytes of a grammar or a JSON Schema; 0: both are refused.
        idle_seconds: a session ends after this time without a request that can be computed, or without
            reading by the client; if others wait for a place, once such times add up to it. The same limit
            holds for a call whose request does not arrive.
        queue_seconds: a text that has waited this long for a place is refused.
        keep_seconds: how long the memory of an ended session is kept in case it is resumed.
        backlog: passes by which a session may be ahead of what was sent to its client.
        prefill: maximum number of prompt tokens computed between two passes, for all sessions together.
        connections: connections of clients that have presented a token; calls over further ones are refused.
        strangers: additional connections without a token; half of them may come from one address. If there
            are more, the oldest is closed.
        stranger_seconds: how long a connection may stay without a call that presents a token.
        hops: for a worker of layers: the addresses to which it may send rows directly, if a client asks for
            it (:class:`~sllm.worker.destinations.Destinations` describes the format); empty: clients relay
            the rows.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model:
        ...     limits = sllm.Limits(sessions=2, max_prompt=100)
        ...     with sllm.Worker(model, state=tempfile.mkdtemp(), limits=limits) as worker:
        ...         with sllm.connect(worker.uri) as remote:
        ...             remote.info.sessions, remote.info.max_prompt
        (2, 100)

    """

    sessions: int = 4
    queue: int = 16
    max_prompt: int | None = None
    max_hint: int = 256
    hints_per_s: int = 1000
    max_grammar: int = 1 << 16
    idle_seconds: float = 120.0
    queue_seconds: float = 300.0
    keep_seconds: float = 600.0
    backlog: int = 64
    prefill: int = 256
    connections: int = 256
    strangers: int = 64
    stranger_seconds: float = 10.0
    hops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"sessions": 1, "queue": 0, "max_hint": 0, "hints_per_s": 1, "max_grammar": 0}
        least |= {"idle_seconds": 0, "queue_seconds": 0, "keep_seconds": 0, "backlog": 1, "prefill": 1}
        least |= {"connections": 1, "strangers": 1, "stranger_seconds": 0}
        if self.max_prompt is not None:
            least["max_prompt"] = 1
        for name, low in least.items():
            value = getattr(self, name)
            if not value >= low:  # also true of NaN
                raise ValueError(f"limits.{name} is {value!r}, expected {low} or more")

    def check_prompt(self, n_tokens: int) -> None:
        """Reject a prompt that is too long.

        Raises:
            ContextFullError: longer than ``max_prompt``.

        """
        if self.max_prompt is not None and n_tokens > self.max_prompt:
            raise ContextFullError(
                f"the prompt has {n_tokens} tokens, and the worker takes {self.max_prompt}"
            )

    def check_grammar(self, sampling: SamplingParams) -> None:
        """Reject a grammar or a JSON Schema that is too long.

        Raises:
            ValueError: longer than ``max_grammar`` bytes of UTF-8.

        """
        text = sampling.grammar or sampling.json_schema
        if text is not None and len(str(text).encode("utf-8", "surrogatepass")) > self.max_grammar:
            what = "grammar" if sampling.grammar else "JSON Schema"
            raise ValueError(
                f"the {what} is longer than the {self.max_grammar} bytes that this worker takes"
                if self.max_grammar
                else "this worker takes no grammars"
            )


@dataclass
class SchedulerStats:
    """Statistics of a worker; times are in seconds."""

    sessions_total: int = 0
    refused: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    own_drafted: int = 0
    """Of these, tokens that the worker had drafted itself; the others were clients' hints."""
    own_accepted: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_rows: int = 0
    """Tokens of prompts that were computed."""
    prompt_seconds: float = 0.0
    """Of ``busy_seconds``, what they took."""
    rows: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    """Passes by their rows: element i counts those of at most 2^i and more than 2^(i-1)."""
    busy_seconds: float = 0.0

    def count_pass(self, n_rows: int, seconds: float) -> None:
        """Count one pass of ``n_rows`` rows."""
        self.passes += 1
        self.rows += n_rows
        self.busy_seconds += seconds
        bucket = (n_rows - 1).bit_length()
        self.batch_sizes += [0] * (bucket + 1 - len(self.batch_sizes))
        self.batch_sizes[bucket] += 1

    def count_prompts(self, n_rows: int, seconds: float) -> None:
        """Count a chunk of prompts, ``n_rows`` tokens in all."""
        self.prompt_rows += n_rows
        self.prompt_seconds += seconds
        self.busy_seconds += seconds

    def count_commit(
        self, n_tokens: int, n_drafted: int, n_accepted: int, n_own_drafted: int = 0, n_own_accepted: int = 0
    ) -> None:
        """Count what a pass came to for one sequence: committed, verified and accepted tokens, and how many
        of the latter two the worker had drafted itself.
        """
        self.tokens += n_tokens
        self.drafted += n_drafted
        self.accepted += n_accepted
        self.own_drafted += n_own_drafted
        self.own_accepted += n_own_accepted


@dataclass
class Slot(Generic[Owner]):
    """A sequence of a context's memory, and who uses it at the moment.

    Attributes:
        seq_id: the sequence.
        owner: the session or stream that uses it; None: its memory is kept for one that may return.
        freed: when the last owner left, by ``time.monotonic()``.

    """

    seq_id: int
    owner: Owner | None = None
    freed: float = 0.0


_NEWS_SECONDS = 0.5
"""Of the time that texts are given to end: what is less by no more than this is no news."""


class PassLoop(ABC, Generic[Owner]):
    """A thread that runs passes for the owners of slots, until :meth:`close` or until passes keep failing. A
    subclass starts the thread at the end of its constructor.

    Args:
        limits: what clients may use.
        name: of the thread.
        pass_seconds: no pass takes less, or a whole :class:`Pace`; a stand-in for a larger model, for tests
            and benchmarks.

    Attributes:
        limits: as given.
        stats: running figures.
        progress: of the thread's steps.
        failed: whether several passes in a row have failed: nothing new is taken.
        on_failure: called once when ``failed`` is set, on the loop's thread.

    """

    def __init__(self, limits: Limits, *, name: str, pass_seconds: float | Pace) -> None:
        self.limits = limits
        self.stats = SchedulerStats()
        self.progress = Progress()
        self.failed = False
        self.on_failure: Callable[[], object] | None = None
        self._slots: Sequence[Slot[Owner]] = []
        self._pace = pass_seconds if isinstance(pass_seconds, Pace) else Pace(pass_seconds)
        self._n_failures = 0  # in a row
        self._draining = False
        self._drained_at: float | None = None  # by time.monotonic(): what runs on then is handed back
        self._closing = False
        self._closed = threading.Event()  # set with _closing, for those who wait for time to pass
        self._changed = threading.Condition()  # held to change owners, states and queues; notified after it
        self._news = False  # whether there may be something to do since the thread looked last
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # ---- from any thread

    def running(self) -> list[Owner]:
        """Who has a slot."""
        return [slot.owner for slot in self._slots if slot.owner is not None]

    @property
    def n_queued(self) -> int:
        """How many wait for a slot."""
        return 0

    @property
    def most_rows(self) -> int:
        """Rows that one step may compute."""
        return self.limits.prefill

    def kv_positions(self) -> tuple[int, int]:
        """How many positions of the slots' memory are in use, and how many there are."""
        return 0, 0

    def wake(self) -> None:
        """Let the thread look for something to do."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def drain(self, seconds: float, notice: float | None = None) -> bool:
        """Take nothing new and let what runs end for ``seconds`` at most; whether all of it did.

        Clients are told that what runs has ``notice`` seconds, or ``seconds`` (None).
        """
        with self._changed:
            self._draining = True
            at = time.monotonic() + (seconds if notice is None else notice)
            if self._drained_at is None or at < self._drained_at - _NEWS_SECONDS:
                self._drained_at = at
                self._tell_draining(max(0.0, at - time.monotonic()))
            self.wake()
            return self._changed.wait_for(lambda: not self._at_work(), seconds)

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._draining or self._closing or self.failed

    def close(self) -> None:
        """End what runs, and the thread. More calls do nothing."""
        with self._changed:
            self._closing = True
            self._closed.set()
            self.wake()
        if self._thread.is_alive():
            self._cancel()
            join(self._thread)

    def _check_open(self) -> None:
        if self.draining:
            raise ClosedError("the worker is ending; go on elsewhere")

    # ---- what subclasses define

    def _tell_draining(self, seconds: float) -> None:
        """Let clients know that what runs has ``seconds`` to end."""

    def _at_work(self) -> bool:
        """Whether somebody has a slot or waits for one."""
        return bool(self.running())

    @abstractmethod
    def _cancel(self) -> None:
        """End the computation under way, from another thread."""

    @abstractmethod
    def _patience(self) -> float | None:
        """Seconds until the thread has to look for something to do by itself; None: it need not."""

    @abstractmethod
    def _step(self) -> bool:
        """Do the next piece of work; whether there was anything to do."""

    def _step_failed(self, error: Exception) -> None:
        """An exception has left :meth:`_step`."""
        log.error("a pass failed: %s", raised_at(error))
        self._count_failure()

    @abstractmethod
    def _end_all(self) -> None:
        """End everything that runs or waits, since the thread does."""

    # ---- on the loop's thread

    def _run(self) -> None:
        while self._wait():
            try:
                while not self._closing and self._timed_step():
                    pass
            except CancelledError:  # noqa: PERF203 - by close()
                self._news = True
            except Exception as error:  # noqa: BLE001 - a pass that fails must not take the worker with it
                self._step_failed(error)
                self._news = True  # for those who wait for a slot
        self._end_all()

    def _timed_step(self) -> bool:
        n_before = self.stats.rows + self.stats.prompt_rows
        self.progress.begin()
        try:
            return self._step()
        finally:
            self.progress.end(self.stats.rows + self.stats.prompt_rows - n_before)

    def _wait(self) -> bool:
        """Wait for something to do; False when the loop is to end."""
        with self._changed:
            if not self._news:
                self._changed.wait(self._patience())
            self._news = False
            return not self._closing

    def _count_failure(self) -> None:
        self._n_failures += 1
        if self._n_failures >= _MAX_FAILURES and not self.failed:
            log.error("three passes in a row have failed; the worker takes nothing more")
            self.failed = True
            if self.on_failure is not None:
                self.on_failure()

    def _pass_time(self, began: float, n_rows: int = 0) -> float:
        """Seconds since ``began`` (``time.perf_counter()``), once they are what a pass of ``n_rows`` takes at
        least.
        """
        least = self._pace.pass_seconds + n_rows * self._pace.row_seconds
        seconds = time.perf_counter() - began
        if seconds < least:
            self._closed.wait(least - seconds)
            seconds = max(time.perf_counter() - began, least)
        return seconds

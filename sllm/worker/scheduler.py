"""Scheduling: all sessions of a worker share one context, and each pass serves every one of them (continuous
batching).

A pass decodes the next position of every session that may go on, together with the hinted tokens that are
worth checking. Prompts are computed in chunks between passes, so that a long one does not stall the others. A
sequence keeps its memory after its session has ended, until another one needs the room: who comes back after
a lost connection, or with the next turn of a conversation, pays only for what is new.

Nothing here knows of the network: :mod:`sllm.worker.service` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sllm.draft.length import DraftLength, PassTimes
from sllm.errors import BusyError, CancelledError, ClosedError, ContextFullError, SllmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.sampling import SamplingParams

__all__ = [
    "Committed",
    "Finished",
    "Limits",
    "Opened",
    "Scheduler",
    "SchedulerStats",
    "Scored",
    "Session",
    "rows_to_check",
]

log = logging.getLogger("sllm.worker")

_HINT_ROWS = 16
"""Hinted tokens of one session that one pass checks at most: beyond this a chain is too seldom right to its
end.
"""


@dataclass(frozen=True)
class Limits:
    """What a worker lets its clients use.

    Attributes:
        sessions: texts at once.
        queue: texts that wait for a place; one more is refused.
        max_prompt: tokens; None: what the context holds.
        max_hint: tokens of one hint.
        hints_per_s: hints of one session per second, over a few seconds.
        max_grammar: bytes of a grammar; 0: none are taken.
        idle_seconds: a session that nothing is heard of, or whose client reads nothing, ends after this; and
            a call that does not say what it wants.
        keep_seconds: how long the memory of an ended session is kept for the case that it goes on.
        backlog: passes that a session may be ahead of what its client has been sent.
        prefill: prompt tokens computed between two passes, all sessions together.

    """

    sessions: int = 4
    queue: int = 16
    max_prompt: int | None = None
    max_hint: int = 256
    hints_per_s: int = 1000
    max_grammar: int = 1 << 16
    idle_seconds: float = 120.0
    keep_seconds: float = 600.0
    backlog: int = 64
    prefill: int = 256

    def __post_init__(self) -> None:
        least = {"sessions": 1, "queue": 0, "max_hint": 0, "hints_per_s": 1, "max_grammar": 0}
        least |= {"idle_seconds": 0, "keep_seconds": 0, "backlog": 1, "prefill": 1}
        if self.max_prompt is not None:
            least["max_prompt"] = 1
        for name, low in least.items():
            value = getattr(self, name)
            if not value >= low:  # NaN is not, either
                raise ValueError(f"limits.{name} is {value!r}, expected {low} or more")


@dataclass(frozen=True)
class Opened:
    """The prompt is computed; times are seconds."""

    n_reused: int
    prompt_seconds: float
    queued_seconds: float


@dataclass(frozen=True)
class Committed:
    """Tokens that one pass committed; see :class:`sllm.targets.base.Commit`."""

    pos: int
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    own_draft: bool
    seconds: float


@dataclass(frozen=True)
class Scored:
    """What a text that was to be scored has come to: float32 and int32 (n,), and seconds of computing."""

    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    n_reused: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The end of a text. ``error`` is what went wrong, if something did."""

    reason: str
    error: Exception | None = None


@dataclass
class SchedulerStats:
    """Running figures of a worker; times are seconds."""

    sessions_total: int = 0
    refused: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    rows: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    busy_seconds: float = 0.0

    def count_pass(self, n_rows: int, seconds: float) -> None:
        """One pass of ``n_rows`` rows."""
        self.passes += 1
        self.rows += n_rows
        self.busy_seconds += seconds
        bucket = (n_rows - 1).bit_length()
        self.batch_sizes += [0] * (bucket + 1 - len(self.batch_sizes))
        self.batch_sizes[bucket] += 1


class Session:
    """One text on a worker. Its client's side may be used from any thread: :meth:`hint`, :meth:`cancel`,
    :meth:`events`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokens: npt.NDArray[np.int32],
        start: int,
        sampling: SamplingParams,
        end: int,
        asked_end: int | None,
        run_ahead: bool,
        text_id: int,
    ) -> None:
        self._scheduler = scheduler
        self.text_id = text_id
        self.sampling = sampling
        self.start = start
        self.end = end
        self.asked_end = asked_end
        self.run_ahead = run_ahead
        self.text: list[int] = tokens.tolist()
        self.n_prompt = len(self.text)
        self.n_computed = 0  # of the prompt
        self.slot: _Slot | None = None
        self.created = self.heard = time.monotonic()
        self.queued_seconds = self.prompt_seconds = 0.0
        self.n_reused = 0
        self.n_passes = self.n_drafted = self.n_accepted = 0
        # The newest hint: position, tokens, id, when it came. A session is ready for one more pass per id
        # where it does not run ahead.
        self.hinted: tuple[int, list[int], int, float] = (0, [], 0, self.created)
        self.answered = 0
        self.acceptance = _Acceptance()
        self.length = DraftLength()  # of the worker's own drafts
        self.score_from: int | None = None  # the first token to be scored; None: it is a text to be written
        self.scores: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]] = []
        self.can_draft = True  # False: the worker's own draft could not
        self.on_idle: Callable[[], None] | None = None
        """Called on the scheduler's thread when the session has ended because nothing was heard of it."""
        self.finished = False
        self._events: deque[Opened | Committed | Scored | Finished] = deque()
        self._arrived = threading.Condition()

    # -- the client's side

    def hint(self, pos: int, tokens: list[int], hint_id: int) -> None:
        """What probably comes at ``pos``; replaces every earlier hint."""
        now = time.monotonic()
        self.hinted = (pos, tokens, hint_id, now)
        self.heard = now
        self._scheduler.wake()

    def cancel(self) -> None:
        """End the session; its memory is kept for a while."""
        self._scheduler.end(self, Finished("cancelled"))

    def events(self) -> Iterator[Opened | Committed | Scored | Finished]:
        """What happens to the session, until :class:`Finished`; blocks."""
        while True:
            with self._arrived:
                while not self._events:
                    self._arrived.wait()
                event = self._events.popleft()
                blocked = len(self._events) == self._scheduler.limits.backlog - 1
            self.heard = time.monotonic()
            if blocked:
                self._scheduler.wake()
            yield event
            if isinstance(event, Finished):
                return

    # -- the scheduler's side

    def tell(self, event: Opened | Committed | Scored | Finished) -> None:
        """Hand an event to the client's side."""
        with self._arrived:
            self._events.append(event)
            self._arrived.notify()

    @property
    def scores_next(self) -> bool:
        """Whether the next tokens to be computed are scored."""
        return self.score_from is not None and self.n_computed >= self.score_from - 1

    @property
    def backlog(self) -> int:
        """Events that the client's side has not taken."""
        return len(self._events)

    def candidate(self) -> tuple[list[int], bool, int]:
        """What the newest hint says behind the committed text, whether a pass was asked for, and the hint's
        id.

        A hint that disagrees with the text is none; its sender will see the commit that it disagrees with.
        """
        pos, tokens, hint_id, _ = self.hinted
        known = len(self.text) - pos
        if known < 0 or known > len(tokens) or tokens[:known] != self.text[pos:]:
            return [], False, hint_id
        room = self.end - len(self.text) - 1 if self._scheduler.can_verify else 0
        n_vocab = self._scheduler.n_vocab
        chain: list[int] = []
        for token in tokens[known : known + max(0, min(room, _HINT_ROWS))]:
            if not 0 <= token < n_vocab:
                break
            chain.append(token)
        return chain, known < len(tokens) or hint_id > self.answered, hint_id


class _Acceptance:
    """The running share of hinted tokens that turn out right, where the ones before them did."""

    def __init__(self) -> None:
        self._right = 2.1  # a prior of .7, worth three tokens
        self._tried = 3.0

    @property
    def share(self) -> float:
        return min(self._right / self._tried, 0.999)

    def observe(self, guesses: Sequence[int], truth: Sequence[int]) -> None:
        """Compare, also what was not checked in the pass: the truth at its place is known now."""
        for guess, token in zip(guesses, truth, strict=False):
            self._right = self._right * 0.98 + (guess == token)
            self._tried = self._tried * 0.98 + 1
            if guess != token:
                break


@dataclass
class _Job:
    """One session's part of a pass."""

    slot: _Slot
    session: Session
    hinted: list[int]
    hint_id: int
    chain: list[int] = field(default_factory=list)  # what is checked
    drafted: list[int] = field(default_factory=list)  # by the worker, of which the chain is the beginning
    probs: list[float] = field(default_factory=list)  # what its draft says of that


@dataclass
class _Slot:
    """A sequence of the context, and who has it."""

    seq_id: int
    session: Session | None = None
    held: list[int] = field(default_factory=list)  # tokens in memory, once no session has it
    freed: float = 0.0
    draft_length: int = 0  # committed tokens that the draft's context has


def rows_to_check(times: PassTimes, lengths: Sequence[int], acceptances: Sequence[float]) -> list[int]:
    """How many hinted tokens of each session the next pass should check.

    Args:
        times: what passes take by their number of rows.
        lengths: the hinted tokens that each session has.
        acceptances: for each session the chance of a hinted token to be right where the ones before it are.

    Returns:
        For each session a number up to its length: the ones with the most committed tokens per second, all
        sessions together. A row at depth j of a chain is worth acceptance^j tokens; rows are taken in the
        order of their worth.

    """
    worth = sorted(
        (
            (a**j, i)
            for i, (n, a) in enumerate(zip(lengths, acceptances, strict=True))
            for j in range(1, n + 1)
        ),
        key=lambda row: -row[0],
    )
    n_rows = len(lengths)
    counts = [0] * n_rows
    if not worth or not times.known(n_rows):
        return counts
    tokens = float(n_rows)
    best, best_n = tokens / times.estimate(n_rows), 0
    for n, (value, _) in enumerate(worth, 1):
        tokens += value
        rate = tokens / times.estimate(n_rows + n)
        if rate > best:
            best, best_n = rate, n
    for _, i in worth[:best_n]:
        counts[i] += 1
    return counts


class Scheduler:
    """Runs the sessions of a worker on one context, on a thread of its own.

    Args:
        context: a sequence for each session; the scheduler's alone while it runs, and still the caller's to
            close.
        limits: what sessions may use.
        draft: a context of a smaller model with as many sequences: the worker drafts by itself where a
            session has no usable hint (co-located speculation).
        pass_seconds: no pass takes less; a stand-in for a larger model, for tests and benchmarks.

    """

    def __init__(
        self, context: Context, limits: Limits, *, draft: Context | None = None, pass_seconds: float = 0.0
    ) -> None:
        self.limits = limits
        self.n_vocab = context.model.vocab.n_tokens
        self.stats = SchedulerStats()
        self.failed = False
        self.on_failure: Callable[[], None] | None = None
        """Called on the scheduler's thread once ``failed`` is set."""
        self.can_verify = context.model.can_rollback
        self._context = context
        self._draft = draft
        self._pass_seconds = pass_seconds
        self._times = PassTimes()
        self._slots = [_Slot(i) for i in range(limits.sessions)]
        self._queue: deque[Session] = deque()
        self._ending: deque[tuple[Session, Finished]] = deque()
        self._turn = 0  # which prompt the next chunk begins with
        self._draining = self._closing = False
        self._wake = threading.Condition()
        self._news = False
        self._thread = threading.Thread(target=self._run, name="sllm-scheduler", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(
        self,
        tokens: npt.NDArray[np.int32],
        start: int,
        sampling: SamplingParams,
        max_tokens: int | None,
        *,
        run_ahead: bool,
        text_id: int = 0,
        score_from: int | None = None,
    ) -> Session:
        """A new session behind ``tokens``, int32 (n,), of which those from ``start`` on are generated text.

        With ``score_from``, nothing is generated: it ends with :class:`Scored`, for the tokens from there on.
        It ends a session with the same ``text_id`` (0: none), whose client has lost it.

        Raises:
            BusyError: no place and no room to wait for one.
            ContextFullError: the prompt is too long.
            ValueError: bad tokens, a bad position or a grammar that does not parse.
            ClosedError: the worker is ending.

        """
        n_ctx = self._context.n_ctx_seq
        longest = min(n_ctx, self.limits.max_prompt or n_ctx)
        if len(tokens) == 0:
            raise ValueError("the prompt has no tokens")
        if len(tokens) > longest:
            raise ContextFullError(f"the prompt has {len(tokens)} tokens, and the worker takes {longest}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.n_vocab:
            raise ValueError(f"the prompt holds ids that are not in the vocabulary of {self.n_vocab} tokens")
        if not 0 <= start <= len(tokens):
            raise ValueError(f"the text begins at {start}, and there are {len(tokens)} tokens")
        if sampling.grammar is not None and len(sampling.grammar.encode()) > self.limits.max_grammar:
            raise ValueError(
                f"the grammar is longer than the {self.limits.max_grammar} bytes that this worker takes"
                if self.limits.max_grammar
                else "this worker takes no grammars"
            )
        self._context.model.compiled(sampling)  # a bad grammar is told now
        asked_end = None if max_tokens is None else len(tokens) + max_tokens
        end = n_ctx if asked_end is None else min(asked_end, n_ctx)
        if score_from is not None and not 1 <= score_from < len(tokens):
            raise ValueError(f"the first token to be scored is {score_from}, expected 1 to {len(tokens) - 1}")
        session = Session(self, tokens, start, sampling, end, asked_end, run_ahead, text_id)
        session.score_from = score_from
        with self._wake:
            lost = [s for s in [*self.running(), *self._queue] if text_id and s.text_id == text_id]
            self._ending.extend((one, Finished("cancelled")) for one in lost)
            if self._draining or self._closing or self.failed:
                raise ClosedError("the worker is ending; go on elsewhere")
            n_free = sum(s.session is None for s in self._slots) + len(lost)
            if len(self._queue) >= self.limits.queue + n_free:
                self.stats.refused += 1
                raise BusyError(
                    f"the worker serves {self.limits.sessions} texts at once,"
                    f" {len(self._queue)} more are waiting; try again later"
                )
            self.stats.sessions_total += 1
            self._queue.append(session)
            self._news = True
            self._wake.notify()
        return session

    def wake(self) -> None:
        """There may be something to do."""
        with self._wake:
            self._news = True
            self._wake.notify()

    def end(self, session: Session, event: Finished) -> None:
        """End a session at the next opportunity."""
        with self._wake:
            self._ending.append((session, event))
            self._news = True
            self._wake.notify()

    def running(self) -> list[Session]:
        """The sessions that have a place."""
        return [s.session for s in self._slots if s.session is not None]

    @property
    def n_queued(self) -> int:
        """How many sessions wait for a place."""
        return len(self._queue)

    def drain(self, seconds: float) -> bool:
        """Take no more sessions, let the running ones end for ``seconds`` at most; whether they all did."""
        with self._wake:
            self._draining = True
            self._news = True
            self._wake.notify()
        until = time.monotonic() + seconds
        while self._at_work() and time.monotonic() < until:
            time.sleep(0.01)
        return not self._at_work()

    def _at_work(self) -> bool:
        with self._wake:
            return bool(self._queue or self.running())

    def close(self) -> None:
        """End every session and the thread. More calls do nothing."""
        with self._wake:
            self._closing = True
            self._news = True
            self._wake.notify()
        if self._thread.is_alive() and not self._context.closed:
            self._context.cancel()
            if self._draft is not None:
                self._draft.cancel()
        self._thread.join()

    # ---- on the scheduler's thread

    def _run(self) -> None:
        n_failures = 0
        while n_failures < 3:
            with self._wake:
                if not self._news:
                    self._wake.wait(timeout=self._patience())
                self._news = False
                if self._closing:
                    break
            try:
                while not self._closing and self._step():
                    n_failures = 0
            except CancelledError:
                self._news = True  # close() has cancelled what was being computed
            except Exception as error:  # a pass that fails must not take the worker with it
                n_failures += 1
                log.exception("a pass failed")
                for session in self.running():
                    self._finish(session, Finished("failed", error))
                self._news = True  # for those who wait for a place
        with self._wake:
            self.failed = not self._closing
            self._closing = True  # nobody comes in any more
            left = [*self.running(), *self._queue]
        if self.failed:
            log.error("three passes in a row have failed; the worker takes no more texts")
        for session in left:
            self._finish(session, Finished("closing"))
        if self.failed and self.on_failure is not None:
            self.on_failure()

    def _patience(self) -> float | None:
        """How long to sleep at most: until something has to be given up or forgotten."""
        if self.running():
            return min(1.0, max(self.limits.idle_seconds / 4, 0.01))
        return min(self.limits.keep_seconds, 60.0) if any(s.held for s in self._slots) else None

    def _step(self) -> bool:
        """One chunk of the prompts and one pass; False where there is nothing to do."""
        self._end_sessions()
        self._admit()
        prompts = [
            s for s in self._slots if s.session is not None and s.session.n_computed < len(s.session.text) - 1
        ]
        if prompts:
            self._compute_prompts(prompts)
        jobs: list[_Job] = []
        for slot in self._slots:
            session = slot.session
            if session is None or session.n_computed < len(session.text) - 1:
                continue
            if session.backlog >= self.limits.backlog:
                continue
            hinted, asked, hint_id = session.candidate()
            if session.run_ahead or asked:
                jobs.append(_Job(slot, session, hinted, hint_id))
        if jobs:
            self._pass(jobs)
        return bool(prompts or jobs)

    def _end_sessions(self) -> None:
        with self._wake:
            ending = list(self._ending)
            self._ending.clear()
        for session, event in ending:
            self._finish(session, event)
        now = time.monotonic()
        for session in self.running():
            computed = session.n_computed == len(session.text) - 1
            if now - session.heard > self.limits.idle_seconds and (
                session.backlog >= self.limits.backlog or (computed and not session.run_ahead)
            ):
                self._finish(session, Finished("idle"))
                if session.on_idle is not None:
                    session.on_idle()
        for slot in self._slots:
            if slot.session is None and slot.held and now - slot.freed > self.limits.keep_seconds:
                slot.held = []
                slot.draft_length = 0
                self._context.memory.clear(slot.seq_id)
                if self._draft is not None:
                    self._draft.memory.clear(slot.seq_id)

    def _finish(self, session: Session, event: Finished) -> None:
        if session.finished:
            return
        session.finished = True
        with self._wake:
            if session in self._queue:
                self._queue.remove(session)
        slot = session.slot
        if slot is not None:
            try:
                slot.held = self._context.memory.tokens(slot.seq_id).tolist()
            except SllmError:  # closed under our hands; the client has to be told all the same
                slot.held = []
            slot.freed = time.monotonic()
            slot.session = None  # last: to others a place without a session says what it holds
        session.tell(event)

    # -- places and prompts

    def _admit(self) -> None:
        while True:
            with self._wake:
                if self._draining:
                    waiting = list(self._queue)
                    self._queue.clear()
                else:
                    waiting = []
                free = [s for s in self._slots if s.session is None]
                session = self._queue[0] if self._queue and free else None
            for one in waiting:
                self._finish(one, Finished("closing"))
            if session is None:
                return
            slot, n_same = self._place(session, free)
            with self._wake:  # for others it is always in one place of both
                self._queue.remove(session)
                slot.session, slot.held = session, []
            session.slot = slot
            session.heard = time.monotonic()
            if session.score_from is not None:
                n_same = min(n_same, session.score_from - 1)  # what is scored has to be computed
            session.n_computed = session.n_reused = n_same
            self.stats.prompt_tokens += session.n_prompt
            self.stats.reused_tokens += n_same
            session.queued_seconds = time.monotonic() - session.created
            if n_same == session.n_prompt - 1:
                self._opened(session)

    def _place(self, session: Session, free: list[_Slot]) -> tuple[_Slot, int]:
        """A sequence for a session, and how much of the prompt it holds: the longest common prefix, else the
        one longest unused.
        """
        prompt = session.text[:-1]
        same = {s.seq_id: _common_prefix(s.held, prompt) for s in free}
        best = max(free, key=lambda s: (same[s.seq_id], -s.freed))
        n_same = same[best.seq_id]
        oldest = min(free, key=lambda s: (bool(s.held), s.freed))
        if best is oldest or n_same == 0:
            slot = best if n_same else oldest
        elif 2 * n_same >= len(best.held):
            slot = best
        else:  # most of what it holds would be lost to the one who may come back for it
            self._context.memory.copy(best.seq_id, oldest.seq_id)
            slot = oldest
            slot.draft_length = 0
            if self._draft is not None and best.draft_length > 0:
                self._draft.memory.copy(best.seq_id, oldest.seq_id)
                slot.draft_length = best.draft_length
        slot.draft_length = min(slot.draft_length, n_same)
        return slot, n_same

    def _compute_prompts(self, slots: list[_Slot]) -> None:
        """One chunk: a fair share of the budget to each prompt."""
        first = self._turn % len(slots)
        self._turn += 1
        budget = self.limits.prefill
        chunks: list[tuple[_Slot, Session, npt.NDArray[np.int32]]] = []
        order = slots[first:] + slots[:first]
        for i, slot in enumerate(order):
            session = slot.session
            assert session is not None
            share = max(1, budget // (len(order) - i))
            if session.score_from is not None and session.n_computed < session.score_from - 1:
                share = min(share, session.score_from - 1 - session.n_computed)
            part = session.text[session.n_computed : len(session.text) - 1][:share]
            budget -= len(part)
            chunks.append((slot, session, np.array(part, dtype=np.int32)))
            if budget <= 0:
                break
        began = time.perf_counter()
        scored = [one for one in chunks if one[1].scores_next]
        plain = [one for one in chunks if not one[1].scores_next]
        if plain:
            seq_ids = [slot.seq_id for slot, _, _ in plain]
            arrays = [chunk for _, _, chunk in plain]
            self._context.decode(arrays, seq_id=seq_ids, pos=[s.n_computed for _, s, _ in plain])
        for slot, session, chunk in scored:
            at = session.n_computed
            behind = np.array([*chunk, session.text[at + len(chunk)]], dtype=np.int32)
            session.scores.append(self._context.token_logprobs(behind, seq_id=slot.seq_id, pos=at))
        for slot, session, chunk in plain:
            if self._draft is not None and session.can_draft and slot.draft_length == session.n_computed:
                try:
                    self._draft.decode([chunk], seq_id=[slot.seq_id], pos=[slot.draft_length])
                    slot.draft_length += len(chunk)
                except CancelledError:
                    raise
                except (SllmError, ValueError) as error:
                    self._cannot_draft(session, error)
        seconds = time.perf_counter() - began
        self.stats.busy_seconds += seconds
        for _, session, chunk in chunks:
            session.n_computed += len(chunk)
            session.prompt_seconds += seconds
            if session.n_computed == len(session.text) - 1:
                self._opened(session)

    def _opened(self, session: Session) -> None:
        session.heard = time.monotonic()
        if session.score_from is not None:
            logprobs = np.concatenate([part for part, _ in session.scores])
            ranks = np.concatenate([part for _, part in session.scores])
            session.tell(Scored(logprobs, ranks, session.n_reused, session.prompt_seconds))
            self._finish(session, Finished("scored"))
            return
        session.tell(Opened(session.n_reused, session.prompt_seconds, session.queued_seconds))
        if len(session.text) >= session.end:
            self._finish(session, Finished("length" if session.end == session.asked_end else "context"))

    # -- passes

    def _pass(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        counts = rows_to_check(
            self._times, [len(job.hinted) for job in jobs], [job.session.acceptance.share for job in jobs]
        )
        for job, n in zip(jobs, counts, strict=True):
            job.chain = job.hinted[:n]
        own: list[_Job] = []
        draft_seconds = 0.0
        if self._draft is not None and self.can_verify:
            own, draft_seconds = self._draft_for(self._draft, jobs)
        self._fit(jobs)
        verdicts = self._verify(jobs)
        seconds = time.perf_counter() - began
        if seconds < self._pass_seconds:
            time.sleep(self._pass_seconds - seconds)
            seconds = time.perf_counter() - began
        n_rows = len(jobs) + sum(len(job.chain) for job in jobs)
        self._times.add(n_rows, seconds - draft_seconds)
        self.stats.count_pass(n_rows, seconds)
        vocab = self._context.model.vocab
        for job, verdict in zip(jobs, verdicts, strict=True):
            session, n_checked = job.session, len(job.chain)
            if isinstance(verdict, Exception):
                self._finish(session, Finished("failed", verdict))
                continue
            tokens, n_accepted = verdict
            pos = len(session.text)
            session.acceptance.observe(job.hinted, tokens)
            if self._draft is not None:
                session.length.observe_pass(n_checked, seconds - draft_seconds)
                if job in own:
                    session.length.observe_truth(job.drafted, job.probs, tokens)
                    session.length.observe_round(len(tokens), seconds)
            session.text.extend(tokens)
            session.answered = job.hint_id
            session.n_computed = len(session.text) - 1
            session.n_passes += 1
            session.n_drafted += n_checked
            session.n_accepted += n_accepted
            self.stats.tokens += len(tokens)
            self.stats.drafted += n_checked
            self.stats.accepted += n_accepted
            session.tell(Committed(pos, tuple(tokens), n_accepted, n_checked, job in own, seconds))
            if vocab.is_eog(tokens[-1]):
                self._finish(session, Finished("eog"))
            elif len(session.text) >= session.end:
                self._finish(session, Finished("length" if session.end == session.asked_end else "context"))

    def _fit(self, jobs: list[_Job]) -> None:
        """Shorten the longest chains until the rows fit into what the context can select from at once."""
        excess = len(jobs) + sum(len(job.chain) for job in jobs) - self._context.n_outputs_max
        while excess > 0:
            longest = max(jobs, key=lambda job: len(job.chain))
            if not longest.chain:
                return
            longest.chain.pop()
            excess -= 1

    def _verify(self, jobs: list[_Job]) -> list[tuple[list[int], int] | Exception]:
        """What each session's pass committed, and how much of it was accepted; or why it could not be
        computed.
        """

        def verify(which: list[_Job]) -> list[tuple[list[int], int]]:
            verdict = self._context.verify(
                [job.slot.seq_id for job in which],
                [job.session.text[-1] for job in which],
                [job.chain for job in which] if any(job.chain for job in which) else None,
                sampling=[job.session.sampling for job in which],
                pos=[len(job.session.text) - 1 for job in which],
                start=[job.session.start for job in which],
            )
            return [
                (tokens[: n + 1].tolist(), int(n))
                for tokens, n in zip(verdict.tokens, verdict.n_accepted, strict=True)
            ]

        n_at_once = self._context.n_outputs_max
        results: list[tuple[list[int], int] | Exception] = []
        for first in range(0, len(jobs), n_at_once):
            part = jobs[first : first + n_at_once]
            try:
                results += verify(part)
            except CancelledError:
                raise
            except (SllmError, ValueError) as error:
                if len(part) == 1:
                    results.append(error)
                else:  # one session's trouble (a grammar that is stuck) is not the others': one by one
                    results += [self._verify([job])[0] for job in part]
        return results

    def _cannot_draft(self, session: Session, error: Exception) -> None:
        # A token or a bias that the draft's vocabulary lacks, a text that its context does not hold: the text
        # goes on without its drafts.
        session.can_draft = False
        log.info("the worker cannot draft for a text (%s)", type(error).__name__)

    def _draft_for(self, drafter: Context, jobs: list[_Job]) -> tuple[list[_Job], float]:
        """Draft for the sessions whose client has nothing to say; which they are, and the seconds that it
        took.
        """
        wanted: list[tuple[_Job, int, float]] = []
        for job in jobs:
            session = job.session
            room = min(session.end, drafter.n_ctx_seq) - len(session.text) - 1
            if session.can_draft and not job.hinted and room > 0 and session.length.begin():
                n_max, p_min = session.length.more()
                wanted.append((job, min(n_max, room), p_min))
        if not wanted:
            return [], 0.0

        def draft(which: list[tuple[_Job, int, float]]) -> list[_Job]:
            drafts = drafter.draft(
                [job.slot.seq_id for job, _, _ in which],
                [job.session.text[job.slot.draft_length :] for job, _, _ in which],
                n_max=[n_max for _, n_max, _ in which],
                p_min=[p_min for _, _, p_min in which],
                sampling=[job.session.sampling for job, _, _ in which],
                pos=[job.slot.draft_length for job, _, _ in which],
                start=[job.session.start for job, _, _ in which],
            )
            for row, (job, _, _) in enumerate(which):
                job.slot.draft_length = len(job.session.text)
                job.drafted = drafts.tokens[row, : drafts.lengths[row]].tolist()
                job.probs = drafts.probs[row, : drafts.lengths[row]].tolist()
                job.chain = job.drafted[: job.session.length.keep(job.probs)]
            return [job for job, _, _ in which]

        began = time.perf_counter()
        own: list[_Job] = []
        try:
            own = draft(wanted)
        except CancelledError:
            raise
        except (SllmError, ValueError):
            for one in wanted:
                try:
                    own += draft([one])
                except CancelledError:  # noqa: PERF203
                    raise
                except (SllmError, ValueError) as error:
                    self._cannot_draft(one[0].session, error)
        seconds = time.perf_counter() - began
        for job in own:
            job.session.length.observe_draft(max(len(job.drafted), 1), seconds)
        return own, seconds


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    if n == 0:
        return 0
    differ = np.nonzero(np.array(a[:n]) != np.array(b[:n]))[0]
    return int(differ[0]) if len(differ) else n

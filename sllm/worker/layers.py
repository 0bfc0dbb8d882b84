"""Scheduling for a worker of layers: the rows of all sequences that wait go through the layers together.

A sequence keeps its memory after its stream has broken off, until another one needs the room, so that its
client sends again only what was lost. Nothing here knows of the network:
:mod:`sllm.worker.layer_service` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.errors import BusyError, ClosedError, ContextFullError, SllmError
from sllm.layers import LayerRange, open_layers
from sllm.model import Model
from sllm.worker.scheduler import SchedulerStats

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sllm.sampling import SamplingParams
    from sllm.worker.scheduler import Limits

__all__ = ["Answer", "LayerScheduler", "LayerSequence", "RangeKey", "Request"]

log = logging.getLogger("sllm.worker")

_BACKLOG = 32
"""Requests of one sequence that wait; its reader waits with more."""


@dataclass(frozen=True)
class RangeKey:
    """Layers [start, stop), and with ``output`` the final norm and the head."""

    start: int
    stop: int
    output: bool

    def __str__(self) -> str:
        return f"layers [{self.start}, {self.stop}){' with the output' if self.output else ''}"


@dataclass(frozen=True)
class Request:
    """Hidden states that enter the first layer.

    Attributes:
        pos: of the first.
        hidden: float32 (n, n_embd).
        silent: the hidden states that come out are not needed.
        tokens: with an output, those of the rows.
        n_select: with an output, the last so many rows are the text's last token and drafted ones.

    """

    pos: int
    hidden: npt.NDArray[np.float32]
    silent: bool = False
    tokens: tuple[int, ...] = ()
    n_select: int = 0


@dataclass(frozen=True)
class Answer:
    """What a request came to: hidden states (None: not needed), or selected tokens."""

    pos: int
    n_rows: int
    hidden: npt.NDArray[np.float32] | None
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    seconds: float


class LayerSequence:
    """One sequence on a worker of layers. Its client's side may be used from any thread: :meth:`submit`,
    :meth:`answers`, :meth:`detach`, :meth:`release`.
    """

    def __init__(
        self,
        scheduler: LayerScheduler,
        sequence_id: int,
        slot: _Slot,
        length: int,
        sampling: SamplingParams | None,
        text_start: int,
    ) -> None:
        self._scheduler = scheduler
        self.sequence_id = sequence_id
        self.slot = slot
        self.length = length
        self.sampling = sampling
        self.text_start = text_start
        self.next_pos = length  # behind everything that was asked for
        self.pending: deque[Request] = deque()
        self.ended: str | None = None  # why
        self._answers: deque[Answer | Exception] = deque()
        self._changed = threading.Condition()

    def submit(self, request: Request) -> None:
        """Ask for rows; waits while many requests do.

        Raises:
            ValueError: a position that leaves a gap, no rows, or a wrong number of tokens.
            ContextFullError: no room for them.

        """
        n = len(request.hidden)
        scheduler = self._scheduler
        if not 1 <= n <= scheduler.max_rows:
            raise ValueError(f"{n} rows at once, expected 1 to {scheduler.max_rows}")
        if not 0 <= request.pos <= self.next_pos:
            raise ValueError(
                f"rows at position {request.pos} leave a gap: the sequence ends at {self.next_pos}"
            )
        if request.pos + n > scheduler.n_ctx:
            raise ContextFullError(f"the worker holds {scheduler.n_ctx} positions of a sequence")
        if scheduler.has_output:
            if len(request.tokens) != n or not 0 <= request.n_select <= n:
                raise ValueError(f"{n} rows with {len(request.tokens)} tokens, {request.n_select} to select")
            scheduler.check_tokens(request.tokens)
        elif request.tokens or request.n_select:
            raise ValueError("these layers end before the output: they take no tokens")
        with self._changed:
            self._changed.wait_for(lambda: len(self.pending) < _BACKLOG or self.ended is not None)
            if self.ended is not None:
                return
            self.next_pos = request.pos + n
            self.pending.append(request)
        scheduler.wake()

    def answers(self) -> Iterator[Answer]:
        """What the requests come to, in their order, until the sequence ends; :attr:`ended` then says why.
        Blocks.

        Raises:
            SllmError: the computation failed.

        """
        idle = self._scheduler.idle_seconds
        while True:
            with self._changed:
                heard = self._changed.wait_for(lambda: self._answers or self.ended is not None, idle)
                if self._answers:
                    answer = self._answers.popleft()
                elif self.ended is not None:
                    return
                elif not heard and not self.pending:
                    self.ended = "idle"
                    answer = None
                else:
                    continue
            if answer is None:
                self._scheduler.let_go(self, keep=True)
                return
            if isinstance(answer, Exception):
                self._scheduler.let_go(self, keep=False)
                raise answer
            yield answer

    def detach(self) -> None:
        """The client is gone, perhaps to return; the memory is kept."""
        self.end("detached")
        self._scheduler.let_go(self, keep=True)

    def release(self) -> None:
        """The client needs the sequence no more."""
        self.end("released")
        self._scheduler.let_go(self, keep=False)

    # -- the scheduler's side

    def end(self, reason: str) -> None:
        """No more answers."""
        with self._changed:
            if self.ended is None:
                self.ended = reason
            self._changed.notify_all()

    def take(self) -> Request | None:
        """The next request."""
        with self._changed:
            request = self.pending.popleft() if self.pending and self.ended is None else None
            self._changed.notify_all()
            return request

    def tell(self, answer: Answer | Exception) -> None:
        """Hand an answer to the client's side."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()


@dataclass
class _Slot:
    """A sequence of the range's memory, and who has it or had it last."""

    seq_id: int
    sequence: LayerSequence | None = None
    sequence_id: int = 0  # whose memory it holds; 0: nobody's
    length: int = 0
    freed: float = 0.0


class LayerScheduler:
    """All sequences of a worker of layers, and the thread that computes.

    Args:
        path: the model, or a file of some of its layers.
        layers: the range to serve; None: the one that clients ask for, loaded when the first one does.
        limits: what clients may use.
        n_ctx: positions of one sequence; None: what the model was trained for, at most 4096.
        settings: for :class:`~sllm.LayerRange`: where and how to compute.
        pass_seconds: no pass takes less: a stand-in for a larger model, for tests and benchmarks.

    Raises:
        ModelLoadError, UnsupportedModelError, ValueError: as :class:`~sllm.LayerRange`.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: tuple[int, int] | None,
        limits: Limits,
        *,
        n_ctx: int | None = None,
        settings: dict[str, Any] | None = None,
        pass_seconds: float = 0.0,
    ) -> None:
        self.file = open_layers(path)
        self.limits = limits
        self.fixed = layers
        self.stats = SchedulerStats()
        self.failed = False
        self.on_failure: Callable[[], None] | None = None
        """Called when the worker cannot go on."""
        self._draining = False
        self._asked_n_ctx = n_ctx
        self._settings = dict(settings or {})
        self._pass_seconds = pass_seconds
        self._key: RangeKey | None = None
        self._range: LayerRange | None = None
        self._stack = ExitStack()  # the range and its vocabulary
        self._slots: list[_Slot] = []
        self._work = threading.Condition()
        self._loading = threading.Lock()  # held while a range is made or freed, and a pass computes
        self._closed = False
        self._ending = threading.Event()
        self._n_failures = 0
        if layers is not None:
            self._load(
                RangeKey(*layers, output=layers[1] == self.file.n_layer and self.file.output is not None)
            )
        self._thread = threading.Thread(target=self._run, name="sllm-layers", daemon=True)
        self._thread.start()

    # ---- what is served

    @property
    def has_output(self) -> bool:
        """Whether the range in use ends in the output."""
        return self._key is not None and self._key.output

    @property
    def n_ctx(self) -> int:
        """Positions of one sequence."""
        if self._range is not None:
            return self._range.context.n_ctx_seq
        return self._asked_n_ctx or min(self.file.n_ctx_train or 4096, 4096)

    @property
    def max_rows(self) -> int:
        """Rows of one request."""
        return int(self._settings.get("n_batch", 512))

    @property
    def idle_seconds(self) -> float:
        """After so long without a request a stream ends; its memory is kept."""
        return self.limits.idle_seconds

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise ValueError if one of these is no token."""
        bad = next((token for token in tokens if token >= self.file.n_vocab), None)
        if bad is not None:
            raise ValueError(f"token {bad} is not in the vocabulary of {self.file.n_vocab} tokens")

    def _load(self, key: RangeKey) -> None:
        """Make the range; nothing else is loaded meanwhile."""
        self._stack.close()
        self._stack, self._range, self._key = ExitStack(), None, None
        with ExitStack() as stack:
            n_seq = self.limits.sessions
            vocabulary = None
            if key.output:
                vocabulary = stack.enter_context(Model(self.file.paths[0], vocab_only=True))
            n_ctx = self._asked_n_ctx or min(self.file.n_ctx_train or 4096, 4096)
            made = stack.enter_context(
                LayerRange(
                    self.file,
                    key.start,
                    key.stop,
                    output=key.output,
                    vocabulary=vocabulary,
                    n_ctx=n_ctx * n_seq,
                    n_seq_max=n_seq,
                    **self._settings,
                )
            )
            self._stack = stack.pop_all()
        self._slots = [_Slot(i) for i in range(n_seq)]
        self._key, self._range = key, made
        log.info("serving %s of %s", key, self.file.paths[0].name)

    # ---- for the network's side

    def open(
        self,
        key: RangeKey,
        sequence_id: int,
        sampling: SamplingParams | None = None,
        text_start: int = 0,
    ) -> LayerSequence:
        """Start a sequence, or go on with one whose memory is kept.

        Raises:
            ValueError: no such layers here.
            BusyError: no place, or others use other layers.
            ClosedError.

        """
        if self.fixed is not None and (key.start, key.stop) != self.fixed:
            own = RangeKey(*self.fixed, output=False)
            raise ValueError(f"the worker serves {own}, and {key} were asked for")
        self.file.check_range(key.start, key.stop, output=key.output)
        with self._loading:
            with self._work:
                if self._closed or self._draining:
                    raise ClosedError("the worker is closing")
                if self._key != key and any(slot.sequence is not None for slot in self._slots):
                    self.stats.refused += 1
                    raise BusyError(f"the worker serves {self._key} to others at the moment, not {key}")
            if self._key != key:
                self._load(key)
            with self._work:
                slot = self._place(sequence_id)
                length = slot.length if slot.sequence_id == sequence_id else 0
                sequence = LayerSequence(self, sequence_id, slot, length, sampling, text_start)
                slot.sequence, slot.sequence_id, slot.length = sequence, sequence_id, length
                self.stats.sessions_total += 1
                self.stats.reused_tokens += length
                return sequence

    def _place(self, sequence_id: int) -> _Slot:
        """A slot for a sequence: its own, an empty one, or the one that was left longest ago."""
        for slot in self._slots:
            if slot.sequence_id == sequence_id:
                if slot.sequence is not None:  # its client has lost that stream
                    slot.sequence.end("superseded")
                    slot.length = slot.sequence.length
                return slot
        free = [slot for slot in self._slots if slot.sequence is None]
        if not free:
            self.stats.refused += 1
            raise BusyError(f"the worker serves {len(self._slots)} sequences and has no place for another")
        return min(free, key=lambda slot: (slot.sequence_id != 0, slot.freed))

    def let_go(self, sequence: LayerSequence, *, keep: bool) -> None:
        """The stream of a sequence has ended."""
        with self._work:
            slot = sequence.slot
            if slot.sequence is sequence:
                slot.sequence = None
                slot.freed = time.monotonic()
                slot.length = sequence.length
                if not keep:
                    slot.sequence_id = slot.length = 0
            self._work.notify_all()

    def running(self) -> list[LayerSequence]:
        """The sequences with a stream."""
        with self._work:
            return [slot.sequence for slot in self._slots if slot.sequence is not None]

    def wake(self) -> None:
        """There is something to compute."""
        with self._work:
            self._work.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take no more sequences and let the running ones end for ``seconds``; whether they all did."""
        with self._work:
            self._draining = True
            return self._work.wait_for(lambda: all(slot.sequence is None for slot in self._slots), seconds)

    def close(self) -> None:
        """End every sequence and free the range. More calls do nothing."""
        with self._work:
            if self._closed:
                return
            self._closed = True
            self._ending.set()
            for slot in self._slots:
                if slot.sequence is not None:
                    slot.sequence.end("closing")
            self._work.notify_all()
        if self._range is not None:
            self._range.cancel()
        self._thread.join()
        with self._loading:
            self._stack.close()

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closed or any(s.pending for s in self._at_work()))
                if self._closed:
                    return
            with self._loading:
                batch = self._next_batch()
                if batch:
                    self._compute(batch)

    def _at_work(self) -> list[LayerSequence]:
        return [s.sequence for s in self._slots if s.sequence is not None and s.sequence.ended is None]

    def _next_batch(self) -> list[tuple[LayerSequence, Request]]:
        """One request of each sequence, as many as go through at once."""
        batch: list[tuple[LayerSequence, Request]] = []
        n_rows = 0
        with self._work:
            waiting = [s for s in self._at_work() if s.pending]
        for sequence in sorted(waiting, key=lambda s: len(s.pending[0].hidden) if s.pending else 0):
            first = sequence.pending[0] if sequence.pending else None
            if first is None or (batch and n_rows + len(first.hidden) > self.max_rows):
                continue
            request = sequence.take()
            if request is not None:
                batch.append((sequence, request))
                n_rows += len(request.hidden)
        return batch

    def _compute(self, batch: list[tuple[LayerSequence, Request]]) -> None:
        began = time.monotonic()
        try:
            answers = self._pass(batch)
            self._n_failures = 0
        except Exception as error:  # noqa: BLE001 - whatever it is, the clients must hear of it
            if len(batch) > 1:  # somebody else's fault, perhaps
                for one in batch:
                    self._compute([one])
                return
            if not self._closed:
                log.warning("a pass failed: %s", error)
                self._n_failures += not isinstance(error, ValueError)
                self.failed = self._n_failures >= 3
                if self.failed and self.on_failure is not None:
                    self.on_failure()
            batch[0][0].tell(error if isinstance(error, (SllmError, ValueError)) else SllmError(str(error)))
            return
        seconds = time.monotonic() - began
        if seconds < self._pass_seconds:
            self._ending.wait(self._pass_seconds - seconds)
            seconds = self._pass_seconds
        self.stats.count_pass(sum(len(request.hidden) for _, request in batch), seconds)
        for (sequence, _), answer in zip(batch, answers, strict=True):
            n = answer.n_accepted + 1 if answer.tokens else 0
            self.stats.tokens += n
            self.stats.drafted += answer.n_verified
            self.stats.accepted += answer.n_accepted
            sequence.tell(replace(answer, seconds=seconds))

    def _pass(self, batch: list[tuple[LayerSequence, Request]]) -> list[Answer]:
        assert self._range is not None
        if self.has_output:
            return [self._select(sequence, request) for sequence, request in batch]
        rows = self._range.forward(
            [request.hidden for _, request in batch],
            seq_id=[sequence.slot.seq_id for sequence, _ in batch],
            pos=[request.pos for _, request in batch],
        )
        answers, at = [], 0
        for sequence, request in batch:
            n = len(request.hidden)
            sequence.length = request.pos + n
            hidden = None if request.silent else rows[at : at + n]
            answers.append(Answer(request.pos, n, hidden, (), 0, 0, 0.0))
            at += n
        return answers

    def _select(self, sequence: LayerSequence, request: Request) -> Answer:
        """Write what is text, and select behind it where that is asked for."""
        assert self._range is not None
        seq_id, n, k = sequence.slot.seq_id, len(request.hidden), request.n_select
        context = self._range.context
        tokens = list(request.tokens)
        if n > k:
            context.decode(tokens[: n - k], seq_id=seq_id, pos=request.pos, hidden=request.hidden[: n - k])
            sequence.length = request.pos + n - k
        if k == 0:
            return Answer(request.pos, n, None, (), 0, 0, 0.0)
        at = request.pos + n - k
        verdict = self._range.verify(
            [seq_id],
            [tokens[n - k : n - k + 1]],
            [tokens[n - k + 1 :]],
            hidden=np.ascontiguousarray(request.hidden[n - k :]),
            sampling=sequence.sampling,
            pos=at,
            start=sequence.text_start,
        )
        n_accepted = int(verdict.n_accepted[0])
        sequence.length = at + 1 + n_accepted
        selected = tuple(verdict.tokens[0, : n_accepted + 1].tolist())
        return Answer(at + 1, n, None, selected, n_accepted, k - 1, 0.0)

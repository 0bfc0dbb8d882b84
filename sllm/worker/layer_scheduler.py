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

from sllm.draft.length import PassTimes
from sllm.engine.layers import LayerRange, open_layers
from sllm.engine.model import Model
from sllm.engine.params import context_length
from sllm.engine.sampling import SamplingParams
from sllm.errors import BusyError, ClosedError, ContextFullError, SllmError
from sllm.wire.traces import raised_at
from sllm.worker.passes import PassLoop, Slot
from sllm.worker.sharing import AWAY_SECONDS, FIRST_ROWS, ROUND, coarse, divide, most_rows
from sllm.worker.token_file import DEFAULT_NAME
from sllm.worker.users import Account

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sllm.worker.passes import Limits

__all__ = ["LayerAnswer", "LayerRequest", "LayerScheduler", "LayerSequence", "LayerSlot", "RangeKey"]

log = logging.getLogger("sllm.worker")

_BACKLOG = 32
"""Requests of one sequence whose answers its client has not been sent yet; further ones have to wait."""

_BACKLOG_BYTES = 1 << 26
"""Bytes of their hidden states. One request of any size is taken."""


@dataclass(frozen=True)
class RangeKey:
    """Layers [start, stop), and with ``output`` the final norm and the head."""

    start: int
    stop: int
    output: bool

    def __str__(self) -> str:
        return f"layers [{self.start}, {self.stop}){' with the output' if self.output else ''}"


@dataclass(frozen=True)
class LayerRequest:
    """Hidden states that enter the first layer.

    Attributes:
        pos: of the first.
        hidden: float32 (n, n_embd).
        silent: the hidden states that come out are not needed.
        tokens: with an output, those of the rows.
        n_select: with an output, the last so many rows are the text's last token and drafted ones.
        before: of a request that is computed in parts, what the parts before this one came to.

    """

    pos: int
    hidden: npt.NDArray[np.float32]
    silent: bool = False
    tokens: tuple[int, ...] = ()
    n_select: int = 0
    before: tuple[LayerAnswer, ...] = ()

    def split(self, n: int) -> tuple[LayerRequest, LayerRequest]:
        """The first ``n`` rows, none of which is to be selected after, and the others."""
        first = replace(self, hidden=self.hidden[:n], tokens=self.tokens[:n], n_select=0)
        rest = replace(self, pos=self.pos + n, hidden=self.hidden[n:], tokens=self.tokens[n:])
        return first, rest


@dataclass(frozen=True)
class LayerAnswer:
    """What a request came to: hidden states (None: not needed), or selected tokens."""

    pos: int
    n_rows: int
    hidden: npt.NDArray[np.float32] | None
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    seconds: float

    def after(self, before: tuple[LayerAnswer, ...]) -> LayerAnswer:
        """The answer to a whole request, of which this is the last part."""
        if not before:
            return self
        seconds = self.seconds + sum(part.seconds for part in before)
        n_rows = self.n_rows + sum(part.n_rows for part in before)
        if self.tokens:
            return replace(self, n_rows=n_rows, seconds=seconds)
        parts = [part.hidden for part in (*before, self) if part.hidden is not None]
        hidden = np.concatenate(parts) if parts else None
        return replace(self, pos=before[0].pos, n_rows=n_rows, hidden=hidden, seconds=seconds)


class LayerSequence:
    """The stream of one sequence. Its client's side may be used from any thread: :meth:`submit`,
    :meth:`answers`, :meth:`detach`, :meth:`release`.

    Attributes:
        slot: where its memory is.
        account: of the user whose sequence it is, and ``user``, that one's name.
        n_kept: positions that were in memory when it began.
        pending: requests that no pass has taken.
        ended: why it has ended; None: it has not.

    """

    def __init__(
        self,
        scheduler: LayerScheduler,
        sequence_id: int,
        slot: LayerSlot,
        sampling: SamplingParams | None,
        text_start: int,
        account: Account,
    ) -> None:
        self._scheduler = scheduler
        self.account = account
        self.user = account.name
        self.sequence_id = sequence_id
        self.slot = slot
        self.sampling = sampling
        self.compiled: object = None  # what it is compiled to, which others' then do not push out
        self.text_start = text_start
        self.n_kept = 0
        self.next_pos = 0  # after everything that was asked for
        self.pending: deque[LayerRequest] = deque()
        self.ended: str | None = None
        self.turn = 0  # the pass that it was in last
        self.heard = time.monotonic()  # when it asked for something last
        self._answered = self.heard  # when its client had all that it had asked for
        self._waited = 0.0  # seconds before that in which it had asked for nothing
        self._rest: LayerRequest | None = None  # of the one that is being computed
        self.handed: float | None = None  # when its client's side took the answer that it is sending
        self.on_stuck: Callable[[], object] = lambda: None
        """Called when an answer could not be sent for the idle time: the client does not read."""
        self._answers: deque[LayerAnswer | Exception] = deque()
        self._sizes: deque[int] = deque()  # bytes of the requests whose answers were not sent
        self._finished = False
        self._changed = threading.Condition()

    @property
    def length(self) -> int:
        """Positions in memory."""
        return self.slot.length

    def _is_over(self) -> bool:
        return self.ended is not None

    def submit(self, request: LayerRequest) -> None:
        """Ask for rows; blocks while many requests or answers are waiting. Does nothing once it has ended.

        Raises:
            ValueError: a position that leaves a gap, no rows, or a wrong number of tokens.
            ContextFullError: no room for them.
            BusyError: the user has had its tokens of this minute.

        """
        if self._is_over():
            return  # others may use other layers by now
        self._check(request)
        self.account.check_rate()
        n, size = len(request.hidden), request.hidden.nbytes

        def room() -> bool:
            few = len(self._sizes) < _BACKLOG and sum(self._sizes) + size <= _BACKLOG_BYTES
            return not self._sizes or few or self._is_over()

        with self._changed:
            self._changed.wait_for(room)
            if self._is_over():
                return
            self.next_pos = request.pos + n
            self.heard = time.monotonic()
            if not self._sizes:
                self._waited += self.heard - self._answered
            self._sizes.append(size)
            self.pending.append(request)
        self._scheduler.wake()

    def _check(self, request: LayerRequest) -> None:
        n, scheduler = len(request.hidden), self._scheduler
        if not 1 <= n <= scheduler.max_rows:
            raise ValueError(f"{n} rows at once, expected 1 to {scheduler.max_rows}")
        if not 0 <= request.pos <= self.next_pos:
            raise ValueError(
                f"rows at position {request.pos} leave a gap: the sequence ends at {self.next_pos}"
            )
        if request.pos + n > scheduler.n_ctx:
            raise ContextFullError(f"the worker holds {scheduler.n_ctx} positions of a sequence")
        if scheduler.has_output:
            most = min(n, scheduler.max_select)
            if len(request.tokens) != n or not 0 <= request.n_select <= most:
                raise ValueError(
                    f"{n} rows with {len(request.tokens)} tokens, {request.n_select} to select; expected as"
                    f" many tokens as rows and at most {most} to select"
                )
            scheduler.check_tokens(request.tokens)
        elif request.tokens or request.n_select:
            raise ValueError("these layers end before the output: they take no tokens")

    def finish(self) -> None:
        """Nothing more will be asked for: the sequence ends after the last answer; its memory is kept."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def answers(self) -> Iterator[LayerAnswer]:
        """What the requests come to, in their order, until the sequence ends; :attr:`ended` then says why.
        Blocks.

        Raises:
            SllmError, ValueError: the computation failed.

        """
        idle = self._scheduler.limits.idle_seconds

        def news() -> bool:
            over = self._finished and not self._sizes
            return bool(self._answers) or self.ended is not None or over

        while True:
            with self._changed:
                heard = self._changed.wait_for(news, idle)
                if self._answers:
                    answer = self._answers.popleft()
                    self.handed = time.monotonic()
                elif self.ended is not None:
                    return
                elif not self._sizes and (self._finished or not heard):
                    self.ended = "finished" if self._finished else "idle"
                    break
                else:  # it is being computed
                    continue
            if isinstance(answer, Exception):
                self.handed = None
                self.end("failed")
                self._scheduler.let_go(self, keep=False)
                raise answer
            yield answer
            with self._changed:
                self.handed = None
                self._sizes.popleft()
                self._answered = time.monotonic()
                self._changed.notify_all()
        self._scheduler.let_go(self, keep=True)

    def detach(self) -> None:
        """The client is gone, perhaps to return; the memory is kept."""
        self.end("detached")
        self._scheduler.let_go(self, keep=True)

    def release(self) -> None:
        """The client does not need the sequence any more; its memory is freed."""
        self.end("released")
        self._scheduler.let_go(self, keep=False)

    # ---- the scheduler's side

    def end(self, reason: str) -> None:
        """No more answers."""
        with self._changed:
            if self.ended is None:
                self.ended = reason
            self._changed.notify_all()

    def waited(self) -> float:
        """Seconds, altogether, in which its client has asked for nothing; 0 where it has now."""
        with self._changed:
            return 0.0 if self._sizes else self._waited + time.monotonic() - self._answered

    def take(self, n_rows: int) -> LayerRequest | None:
        """The next request; the first ``n_rows`` of it where they are fewer and it can be split there."""
        with self._changed:
            if not self.pending or self.ended is not None:
                return None
            request = self.pending.popleft()
            n_known = len(request.hidden) - request.n_select
            if n_rows >= len(request.hidden) or n_known == 0:
                self._rest = None
                return request
            first, self._rest = request.split(min(n_rows, n_known))
            return first

    def put_back(self, done: LayerAnswer) -> bool:
        """Let the rest of a request that was split be next; whether there is one."""
        with self._changed:
            rest, self._rest = self._rest, None
            if rest is not None:
                self.pending.appendleft(replace(rest, before=(*rest.before, done)))
            return rest is not None

    def tell(self, answer: LayerAnswer | Exception) -> None:
        """Hand an answer to the client's side."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()


Batch = list[tuple[LayerSequence, LayerRequest]]


@dataclass
class LayerSlot(Slot["LayerSequence"]):
    """A sequence of the range's memory.

    Attributes:
        sequence_id: whose memory it holds; 0: nobody's, or that of one who will not return.
        user: whose sequence that is; another's may have the same number.
        length: positions in memory.
        busy: a pass writes to it, perhaps for a stream that has ended meanwhile.

    """

    sequence_id: int = 0
    user: str = ""
    length: int = 0
    busy: bool = False

    def holds(self, sequence: LayerSequence) -> bool:
        """Whether the memory is that of this stream, or of a later one of the same sequence."""
        return self.owner is sequence or self.is_of(sequence.sequence_id, sequence.user)

    def is_of(self, sequence_id: int, user: str) -> bool:
        """Whether the memory is that of this sequence."""
        return sequence_id != 0 and (sequence_id, user) == (self.sequence_id, self.user)


class LayerScheduler(PassLoop[LayerSequence]):
    """The sequences of a worker of layers, and the thread that computes them.

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
        super().__init__(limits, name="sllm-layers", pass_seconds=pass_seconds)
        self.file = open_layers(path)
        self.fixed = layers
        self._asked_n_ctx = n_ctx
        self._settings = dict(settings or {})
        self._key: RangeKey | None = None
        self._range: LayerRange | None = None
        self._stack = ExitStack()  # the range and its vocabulary
        self._slots: list[LayerSlot] = []
        # Held while a range is made or freed, and a pass computes. A signal handler may call close() in the
        # middle of close().
        self._loading = threading.RLock()
        self._switching = False  # somebody is about to load other layers
        self._n_turns = 0
        self._times = PassTimes()  # of the range in use
        if layers is not None:
            self._load(
                RangeKey(*layers, output=layers[1] == self.file.n_layer and self.file.output is not None)
            )
        self._thread.start()

    # ---- what is served

    @property
    def has_output(self) -> bool:
        """Whether the range in use ends in the output."""
        return self._key is not None and self._key.output

    @property
    def n_ctx(self) -> int:
        """Positions of one sequence."""
        found = self._range  # another thread may be changing it
        if found is not None:
            return found.context.n_ctx_seq
        return self._asked_n_ctx or context_length(self.file.n_ctx_train)

    @property
    def max_rows(self) -> int:
        """Rows of one request."""
        return int(self._settings.get("n_batch", 512))

    @property
    def max_select(self) -> int:
        """Rows of one request after which a token may be selected."""
        found = self._range
        return 0 if found is None else found.context.n_outputs_max

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise ValueError if one of these is outside the vocabulary."""
        bad = next((token for token in tokens if token >= self.file.n_vocab), None)
        if bad is not None:
            raise ValueError(f"token {bad} is not in the vocabulary of {self.file.n_vocab} tokens")

    def _load(self, key: RangeKey) -> None:
        """Make the range; nothing else is loaded meanwhile."""
        stack, self._stack, self._range, self._key = self._stack, ExitStack(), None, None
        stack.close()
        with ExitStack() as stack:
            n_seq = self.limits.sessions
            vocabulary = None
            if key.output:
                vocabulary = stack.enter_context(Model(self.file.paths[0], vocab_only=True))
            made = stack.enter_context(
                LayerRange(
                    self.file,
                    key.start,
                    key.stop,
                    output=key.output,
                    vocabulary=vocabulary,
                    n_ctx=self.n_ctx * n_seq,
                    n_seq_max=n_seq,
                    **self._settings,
                )
            )
            self._stack = stack.pop_all()
        self._slots = [LayerSlot(i) for i in range(n_seq)]
        self._key, self._range, self._times = key, made, PassTimes()
        log.info("serving %s of %s", key, self.file.paths[0].name)

    # ---- for the network's side

    def open(
        self,
        key: RangeKey,
        sequence_id: int,
        sampling: SamplingParams | None = None,
        text_start: int = 0,
        account: Account | None = None,
    ) -> LayerSequence:
        """Start a sequence, or go on with one of the same user (``account``) whose memory is kept.

        Raises:
            ValueError: no such layers here.
            BusyError: no slot is free, other clients use other layers, or the user has what it may.
            ClosedError: the worker is ending, or cannot go on.

        """
        account = account or Account(DEFAULT_NAME)
        if sampling is not None:
            self._check_sampling(sampling, text_start)
            account.check_prompt(0, grammar=sampling.has_grammar)
        account.check_rate()
        sequence = self._begin(key, sequence_id, sampling, text_start, account)
        found = self._range
        if sampling is not None and found is not None and key.output:
            try:
                sequence.compiled = found.context.model.compiled(sampling)  # or reject it
            except BaseException as error:
                # Taken over meanwhile, by one that has gone and others that use other layers: it has ended.
                if not isinstance(error, ClosedError) or sequence.ended is None:
                    sequence.detach()
                    raise
        return sequence

    def _begin(
        self,
        key: RangeKey,
        sequence_id: int,
        sampling: SamplingParams | None,
        text_start: int,
        account: Account,
    ) -> LayerSequence:
        if self.fixed is not None and (key.start, key.stop) != self.fixed:
            own = RangeKey(*self.fixed, output=False)
            raise ValueError(f"the worker serves {own}, and {key} were asked for")
        self.file.check_range(key.start, key.stop, output=key.output)
        with self._changed:
            # Where the layers are loaded already, _loading is not taken: the thread that computes would take
            # it again before others get it. Only a pass that writes to the same slot is waited for.
            while self._may_switch(key):
                if not self._switching:
                    self._switching = True
                    break
                self._changed.wait()
            else:
                return self._start(sequence_id, sampling, text_start, account)
        try:
            with self._loading:
                self._load(key)
        except BaseException:
            with self._changed:
                self._switching = False
                self._changed.notify_all()
            raise
        with self._changed:
            self._switching = False
            self._changed.notify_all()
            self._check_open()
            return self._start(sequence_id, sampling, text_start, account)

    def _check_sampling(self, sampling: SamplingParams, text_start: int) -> None:
        self.limits.check_grammar(sampling)
        if not 0 <= text_start <= self.n_ctx:
            raise ValueError(f"the text begins at {text_start}, and the worker holds {self.n_ctx} positions")

    def _may_switch(self, key: RangeKey) -> bool:
        """Whether other layers than those in use have to be loaded; nobody uses these then."""
        self._check_open()
        if self._key == key and not self._switching:
            return False
        if self.running():
            self.stats.refused += 1
            raise BusyError(f"the worker serves {self._key} to others at the moment, not {key}")
        return True

    def _start(
        self, sequence_id: int, sampling: SamplingParams | None, text_start: int, account: Account
    ) -> LayerSequence:
        """A stream in a slot, as soon as no pass writes to that any more."""
        others = [s for s in self.running() if s.user == account.name and s.sequence_id != sequence_id]
        account.check_sessions(len(others))
        slot = self._place(sequence_id, account.name)
        expired = slot.owner is None and time.monotonic() - slot.freed > self.limits.keep_seconds
        sequence = LayerSequence(self, sequence_id, slot, sampling, text_start, account)
        slot.owner = sequence
        if not slot.is_of(sequence_id, account.name) or expired:
            slot.sequence_id, slot.user, slot.length = sequence_id, account.name, 0
        self._changed.wait_for(lambda: not slot.busy)
        sequence.n_kept = sequence.next_pos = slot.length
        self.stats.sessions_total += 1
        self.stats.reused_tokens += slot.length
        return sequence

    def _place(self, sequence_id: int, user: str) -> LayerSlot:
        """A slot for a sequence: its own, an empty one, the one that was left longest ago, or that of a
        client who has done nothing with it for the idle time, all such times taken together.
        """
        for slot in self._slots:
            if slot.is_of(sequence_id, user):
                if slot.owner is not None:  # its client has lost that stream
                    slot.owner.end("superseded")
                return slot
        free = [slot for slot in self._slots if slot.owner is None]
        if not free:
            waits = {slot.seq_id: slot.owner.waited() for slot in self._slots if slot.owner is not None}
            longest = max(self._slots, key=lambda slot: waits.get(slot.seq_id, 0.0))
            if longest.owner is not None and waits[longest.seq_id] > self.limits.idle_seconds:
                longest.owner.end("idle")  # its client sends again what is missing when it goes on
                return longest
            self.stats.refused += 1
            raise BusyError(f"the worker serves {len(self._slots)} sequences and has no place for another")
        return min(free, key=lambda slot: (slot.sequence_id != 0, slot.freed))

    def let_go(self, sequence: LayerSequence, *, keep: bool) -> None:
        """The stream of a sequence has ended."""
        with self._changed:
            slot = sequence.slot
            if slot.owner is sequence:
                slot.owner = None
                slot.freed = time.monotonic()
                if not keep:
                    slot.sequence_id = slot.length = 0
            self._changed.notify_all()

    @property
    def most_rows(self) -> int:
        """Rows that one step may compute."""
        return self.max_rows

    def kv_positions(self) -> tuple[int, int]:
        """How many positions of the slots' memory are in use, and how many there are."""
        slots = self._slots
        return sum(slot.length for slot in slots), self.n_ctx * self.limits.sessions

    def _cancel(self) -> None:
        found = self._range
        if found is not None:
            found.cancel()

    def close(self) -> None:
        """End every sequence and free the range. More calls do nothing."""
        super().close()
        with self._loading:
            self._stack.close()

    # ---- on the scheduler's thread

    def _patience(self) -> float:
        return min(max(self.limits.idle_seconds / 2, 0.05), 60.0)

    def _step(self) -> bool:
        at_work = any(sequence.pending for sequence in self._open_streams())
        if at_work:
            with self._loading:
                # 1. One request of each sequence, as many as fit.
                batch = self._next_batch()
                # 2. Through the layers together; each answer to its sequence.
                if batch:
                    self._compute(batch)
                # 3. Who waits for one of these slots may have it.
                with self._changed:
                    for sequence, _ in batch:
                        sequence.slot.busy = False
                    self._changed.notify_all()
        # 4. Clients that read nothing lose their slots.
        self._end_stuck()
        return at_work

    def _end_all(self) -> None:
        for sequence in self.running():
            sequence.end("closing")

    def _end_stuck(self) -> None:
        """End the streams of clients that read nothing: each holds a slot and a thread."""
        now = time.monotonic()
        for sequence in self.running():
            handed = sequence.handed
            if handed is not None and now - handed > self.limits.idle_seconds:
                sequence.detach()
                sequence.on_stuck()

    def _open_streams(self) -> list[LayerSequence]:
        return [sequence for sequence in self.running() if sequence.ended is None]

    def _next_batch(self) -> Batch:
        """One request of each sequence, or the beginning of it, as many rows as are fair to all. Those that
        have waited through the most passes come first, so that neither long nor short ones starve the others.
        """
        batch: Batch = []
        self._n_turns += 1
        with self._changed:
            streams = self._open_streams()
            waiting = [(s.turn, len(s.pending[0].hidden), s) for s in streams if s.pending]
            since = time.monotonic() - AWAY_SECONDS
            n_away = sum(s.heard > since for s in streams if not s.pending)
            n_most = left = self._rows_of_a_pass(len(waiting), n_away)
            waiting.sort(key=lambda one: one[:2])
            shares = divide([n for _, n, _ in waiting], n_most)
            for (_, _, sequence), share in zip(waiting, shares, strict=True):
                n_select = sequence.pending[0].n_select  # its rows cannot be parted
                if batch and max(share, n_select) > left:
                    continue
                request = sequence.take(share)
                if request is not None:
                    sequence.turn = self._n_turns
                    sequence.slot.busy = True
                    batch.append((sequence, request))
                    left -= len(request.hidden)
        return batch

    def _rows_of_a_pass(self, n_waiting: int, n_away: int) -> int:
        """How many rows the next pass may have: those of a large request must not hold up the others for
        longer than is their due, nor one whose client may ask for something at any moment.
        """
        n_texts = n_waiting + n_away
        if n_texts < 2:
            return self.max_rows
        if not self._times.seen:
            return min(self.max_rows, FIRST_ROWS * n_texts)
        seconds = n_texts * ROUND * self._times.estimate(1)
        return most_rows(self._times, n_waiting, self.max_rows, seconds)

    def _goes_on(self, sequence: LayerSequence, request: LayerRequest) -> bool:
        """Whether the memory of a sequence is still what its client was told. If not, the stream ends as an
        idle one does: the client opens another and sends again what is missing.

        A recurrent state goes back over the last few rows alone, and is gone after a pass that failed.
        """
        assert self._range is not None
        memory, seq_id = self._range.memory, sequence.slot.seq_id
        if memory.length(seq_id) > request.pos:
            memory.truncate(seq_id, request.pos)
        held = memory.length(seq_id)
        if held >= request.pos or sequence.slot.length < request.pos:  # a gap is the client's mistake
            return True
        self._hold(sequence, held)
        sequence.end("idle")
        return False

    def _compute(self, batch: Batch) -> None:
        batch = [one for one in batch if self._goes_on(*one)]
        if not batch:
            return
        began = time.perf_counter()
        try:
            answers = self._pass(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the clients must hear of it
            if self._closing:
                return  # the streams end with that reason
            if len(batch) > 1:  # one sequence's trouble is not the others': one by one
                for one in batch:
                    self._compute([one])
                return
            log.warning("a pass failed: %s", raised_at(error))
            asked_wrongly = isinstance(error, (ValueError, ContextFullError))
            if isinstance(error, ClosedError) or not asked_wrongly:
                self._count_failure()
            batch[0][0].tell(error if isinstance(error, (SllmError, ValueError)) else SllmError(str(error)))
            return
        self._n_failures = 0
        seconds = self._pass_time(began)
        n_rows = sum(len(request.hidden) for _, request in batch)
        self.stats.count_pass(n_rows, seconds)
        self._times.add(coarse(n_rows), seconds)
        for (sequence, request), answer in zip(batch, answers, strict=True):
            n_tokens = answer.n_accepted + 1 if answer.tokens else 0
            self.stats.count_commit(n_tokens, answer.n_verified, answer.n_accepted)
            sequence.account.spend(answer.n_rows)
            done = replace(answer, seconds=seconds)
            if not sequence.put_back(done):
                sequence.tell(done.after(request.before))

    def _pass(self, batch: Batch) -> list[LayerAnswer]:
        assert self._range is not None
        for sequence, request in batch:  # however the pass ends, what was there is void
            self._hold(sequence, min(sequence.slot.length, request.pos))
        run = LayerPass(self._range, batch, self._hold)
        return run.select() if self.has_output else run.forward()

    def _hold(self, sequence: LayerSequence, length: int) -> None:
        """Note that the first ``length`` positions of a sequence are in memory."""
        with self._changed:
            if sequence.slot.holds(sequence):
                sequence.slot.length = length


class LayerPass:
    """One pass through the layers: one request each of several sequences.

    Args:
        layers: the range.
        batch: the sequences and their requests.
        hold: called with a sequence and how many of its positions are in memory, whenever that has changed.

    """

    def __init__(
        self, layers: LayerRange, batch: Batch, hold: Callable[[LayerSequence, int], object]
    ) -> None:
        self._layers = layers
        self._batch = batch
        self._hold = hold

    def forward(self) -> list[LayerAnswer]:
        """Hidden states in, hidden states out."""
        rows = self._layers.forward(
            [request.hidden for _, request in self._batch],
            seq_id=[sequence.slot.seq_id for sequence, _ in self._batch],
            pos=[request.pos for _, request in self._batch],
        )
        answers, at = [], 0
        for sequence, request in self._batch:
            n = len(request.hidden)
            self._hold(sequence, request.pos + n)
            hidden = None if request.silent else rows[at : at + n]
            answers.append(LayerAnswer(request.pos, n, hidden, (), 0, 0, 0.0))
            at += n
        return answers

    def select(self) -> list[LayerAnswer]:
        """Hidden states in, tokens out: what is text already is decoded, and what is drafted verified."""
        # 1. Decode the rows of known text.
        self._decode([one for one in self._batch if len(one[1].hidden) > one[1].n_select])
        # 2. Verify the others, as many at once as the context keeps logits of.
        committed: dict[LayerSequence, tuple[int, ...]] = {}
        left = [one for one in self._batch if one[1].n_select]
        while left:
            n_fit = self._n_fit(left)
            self._verify(left[:n_fit], committed)
            left = left[n_fit:]
        # 3. Answer in the order of the requests.
        answers = []
        for sequence, request in self._batch:
            n, k = len(request.hidden), request.n_select
            if k == 0:
                answers.append(LayerAnswer(request.pos, n, None, (), 0, 0, 0.0))
            else:
                tokens, pos = committed[sequence], request.pos + n - k + 1
                answers.append(LayerAnswer(pos, n, None, tokens, len(tokens) - 1, k - 1, 0.0))
        return answers

    def _decode(self, batch: Batch) -> None:
        if not batch:
            return
        lengths = [len(request.hidden) - request.n_select for _, request in batch]
        self._layers.context.decode(
            [list(request.tokens[:n]) for (_, request), n in zip(batch, lengths, strict=True)],
            seq_id=[sequence.slot.seq_id for sequence, _ in batch],
            pos=[request.pos for _, request in batch],
            hidden=np.concatenate(
                [request.hidden[:n] for (_, request), n in zip(batch, lengths, strict=True)]
            ),
        )
        for (sequence, request), n in zip(batch, lengths, strict=True):
            self._hold(sequence, request.pos + n)

    def _n_fit(self, left: Batch) -> int:
        """How many of the requests, one at least, the context keeps logits for at once."""
        n_rows = 0
        for n, (_, request) in enumerate(left):
            n_rows += request.n_select
            if n_rows > self._layers.context.n_outputs_max:
                return max(n, 1)
        return len(left)

    def _verify(
        self,
        batch: Batch,
        committed: dict[LayerSequence, tuple[int, ...]],
    ) -> None:
        """Verify the last rows of each request, and note the tokens that this commits."""
        starts = [len(request.hidden) - request.n_select for _, request in batch]
        verdict = self._layers.verify(
            [sequence.slot.seq_id for sequence, _ in batch],
            [[request.tokens[n]] for (_, request), n in zip(batch, starts, strict=True)],
            [list(request.tokens[n + 1 :]) for (_, request), n in zip(batch, starts, strict=True)],
            hidden=np.concatenate(
                [request.hidden[n:] for (_, request), n in zip(batch, starts, strict=True)]
            ),
            sampling=[sequence.sampling or SamplingParams() for sequence, _ in batch],
            pos=[request.pos + n for (_, request), n in zip(batch, starts, strict=True)],
            start=[sequence.text_start for sequence, _ in batch],
        )
        for i, ((sequence, request), n) in enumerate(zip(batch, starts, strict=True)):
            n_accepted = int(verdict.n_accepted[i])
            self._hold(sequence, request.pos + n + 1 + n_accepted)
            committed[sequence] = tuple(verdict.tokens[i, : n_accepted + 1].tolist())

"""Scheduling for a worker of layers: the rows of all sequences that wait go through the layers together.

A sequence keeps its memory after its stream has broken off, until another one needs the room, so that its
client sends again only what was lost. Nothing here knows of the network:
:mod:`sllm.worker.layer_service` does.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sllm.draft.length import PassTimes
from sllm.engine.layers import LayerRange, can_branch, open_layers
from sllm.engine.model import Model
from sllm.engine.params import context_length
from sllm.errors import BusyError, ClosedError, ContextFullError, SllmError
from sllm.wire.traces import raised_at
from sllm.worker.layer_pass import LayerPass
from sllm.worker.layer_sequence import LayerSequence, LayerSlot
from sllm.worker.passes import PassLoop
from sllm.worker.sharing import AWAY_SECONDS, FIRST_ROWS, ROUND, coarse, divide, most_rows
from sllm.worker.token_file import DEFAULT_NAME
from sllm.worker.users import Account

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from sllm.engine.sampling import SamplingParams
    from sllm.worker.layer_sequence import Batch, LayerAnswer, LayerRequest
    from sllm.worker.passes import Limits, Pace

__all__ = ["LayerScheduler", "RangeKey"]

log = logging.getLogger("sllm.worker")


@dataclass(frozen=True)
class RangeKey:
    """Layers [start, stop), and with ``output`` the final norm and the head."""

    start: int
    stop: int
    output: bool

    def __str__(self) -> str:
        return f"layers [{self.start}, {self.stop}){' with the output' if self.output else ''}"


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
        pass_seconds: float | Pace = 0.0,
    ) -> None:
        super().__init__(limits, name="sllm-layers", pass_seconds=pass_seconds)
        self.file = open_layers(path)
        self._branches = can_branch(self.file)
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
    def can_branch(self) -> bool:
        """Whether the layers' memory holds trees."""
        return self._branches

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
                if batch and max(share, sequence.pending[0].n_tied) > left:
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
            done = replace(answer, seconds=seconds + request.spent)
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

"""Scheduling: all sessions of a worker share one context, and each pass serves every one of them (continuous
batching).

A pass decodes the next position of every session that may go on, together with the hinted tokens that are
worth checking. Prompts are computed in chunks between passes, so that a long one does not stall the others. A
sequence keeps its memory after its session has ended, until another one needs the room: who comes back after
a lost connection, or with the next turn of a conversation, pays only for what is new.

Nothing here knows of the network: :mod:`sllm.worker.service` does.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import numpy as np

from sllm.draft.payoff import Payoff
from sllm.engine.arrays import common_prefix
from sllm.engine.mtp import Heads
from sllm.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextFullError,
    InferenceError,
    SllmError,
)
from sllm.targets.base import Commit
from sllm.worker.own_draft import HeadsDraft, Job, OwnDraft
from sllm.worker.passes import PassLoop
from sllm.worker.session import (
    MAX_HINT_ROWS,
    MAX_TREE_ROWS,
    Draining,
    Finished,
    Opened,
    Scored,
    Session,
    TextSlot,
)
from sllm.worker.sharing import AWAY_SECONDS, Shares
from sllm.worker.token_file import DEFAULT_NAME
from sllm.worker.tree_draft import TreeDraft
from sllm.worker.users import Account

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sllm.draft.length import PassTimes
    from sllm.engine.context import Context
    from sllm.engine.sampling import SamplingParams
    from sllm.worker.passes import Limits, Pace

__all__ = ["Scheduler", "rows_to_check"]


class Scheduler(PassLoop[Session]):
    """Runs the sessions of a worker on one context, on a thread of its own.

    Args:
        context: with a sequence for each session; only the scheduler uses it while it runs, and the caller
            closes it.
        limits: what sessions may use.
        draft: a context of a smaller model with as many sequences, or the context's own heads for
            multi-token prediction: the worker drafts by itself where a session has no usable hint (co-located
            speculation), or a worse one.
        pass_seconds: as for :class:`~sllm.worker.passes.PassLoop`.

    Attributes:
        n_vocab: tokens of the vocabulary.
        can_branch: whether a pass checks all branches of a hint that is a tree.

    """

    def __init__(
        self,
        context: Context,
        limits: Limits,
        *,
        draft: Context | Heads | None = None,
        pass_seconds: float | Pace = 0.0,
    ) -> None:
        super().__init__(limits, name="sllm-scheduler", pass_seconds=pass_seconds)
        self.n_vocab = context.model.vocab.n_tokens
        self._context = context
        self.can_branch = context.can_branch
        self._max_draft = min(MAX_TREE_ROWS if self.can_branch else MAX_HINT_ROWS, context.max_draft)
        self._shares = Shares()
        self._draft: OwnDraft | None = None
        if draft is not None:
            self._draft = _drafting(context, draft, self._pace, self._shares.passes)
        self._payoff = Payoff()  # of the worker's own drafts
        self._usual_hinted = 1.0  # tokens of a pass for a text with a hint
        self._slots: list[TextSlot] = [TextSlot(i) for i in range(limits.sessions)]
        self._queue: deque[Session] = deque()
        self._turn = 0  # which prompt the next chunk begins with
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
        account: Account | None = None,
    ) -> Session:
        """A new session that continues ``tokens``, int32 (n,), of which those from ``start`` on are generated
        text.

        With ``score_from``, nothing is generated: it ends with :class:`Scored`, for the tokens from there on.
        It ends a session of the same user (``account``) with the same ``text_id`` (0: none), whose client has
        lost it.

        Raises:
            BusyError: all slots and the queue are full, or the user has what it may.
            ContextFullError: the prompt is too long.
            ValueError: bad tokens, a bad position or a grammar that does not parse.
            ClosedError: the worker is ending.

        """
        account = account or Account(DEFAULT_NAME)
        # A text that has grown here and is taken up again has the prompt that it began with.
        n_prompt = start if account.wrote(text_id, start, len(tokens)) else len(tokens)
        self.limits.check_prompt(n_prompt)
        account.check_prompt(n_prompt, grammar=sampling.has_grammar)
        account.check_rate()
        compiled = self._checked_request(tokens, start, sampling, score_from)  # last: it compiles a grammar
        n_ctx = self._context.n_ctx_seq
        asked_end = None if max_tokens is None else len(tokens) + max_tokens
        end = n_ctx if asked_end is None else min(asked_end, n_ctx)
        session = Session(
            self,
            tokens,
            start,
            sampling,
            end,
            asked_end,
            run_ahead=run_ahead,
            text_id=text_id,
            score_from=score_from,
            can_branch=self.can_branch,
            account=account,
        )
        session.compiled = compiled
        with self._changed:
            own = [s for s in [*self.running(), *self._queue] if s.user == session.user]
            lost = [s for s in own if text_id and s.text_id == text_id]
            for one in lost:
                one.end_with(Finished("cancelled"))
            self._check_open()
            account.check_sessions(len(own) - len(lost))
            n_free = sum(s.owner is None for s in self._slots) + len(lost)
            if len(self._queue) >= self.limits.queue + n_free:
                self.stats.refused += 1
                raise BusyError(
                    f"the worker serves {self.limits.sessions} texts at once,"
                    f" {len(self._queue)} more are waiting; try again later"
                )
            self.stats.sessions_total += 1
            self._queue.append(session)
            self.wake()
        return session

    def _checked_request(
        self, tokens: npt.NDArray[np.int32], start: int, sampling: SamplingParams, score_from: int | None
    ) -> object:
        """What the sampling is compiled to, where everything is as it should be."""
        n_ctx = self._context.n_ctx_seq
        if len(tokens) == 0:
            raise ValueError("the prompt has no tokens")
        if len(tokens) > n_ctx:
            raise ContextFullError(f"the prompt has {len(tokens)} tokens, and the worker takes {n_ctx}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.n_vocab:
            raise ValueError(f"the prompt holds ids that are not in the vocabulary of {self.n_vocab} tokens")
        if not 0 <= start <= len(tokens):
            raise ValueError(f"the text begins at {start}, and there are {len(tokens)} tokens")
        self.limits.check_grammar(sampling)
        compiled = self._context.model.compiled(sampling)  # reject a bad grammar before queuing
        if score_from is not None and not 1 <= score_from < len(tokens):
            raise ValueError(f"the first token to be scored is {score_from}, expected 1 to {len(tokens) - 1}")
        return compiled

    @property
    def n_queued(self) -> int:
        """How many sessions wait for a slot."""
        return len(self._queue)

    def n_free(self, account: Account) -> int:
        """How many texts of a user could begin at once."""
        with self._changed:
            if self.draining:
                return 0
            n_own = sum(s.user == account.name for s in [*self.running(), *self._queue])
            n_free = sum(slot.owner is None for slot in self._slots) - len(self._queue)
        most = account.allowance.sessions
        return max(0, n_free if most is None else min(n_free, most - n_own))

    @property
    def most_rows(self) -> int:
        """Rows that one step may compute: a chunk of the prompts, and a pass."""
        return self.limits.prefill + self.limits.sessions * (1 + self._max_draft)

    def kv_positions(self) -> tuple[int, int]:
        """How many positions of the slots' memory are in use, and how many there are."""
        owners = [(slot.owner, slot.held) for slot in self._slots]
        used = sum(len(held) if owner is None else owner.n_computed for owner, held in owners)
        return used, self._context.n_ctx_seq * len(self._slots)

    def _at_work(self) -> bool:
        return bool(self._queue or self.running())

    def _cancel(self) -> None:
        if not self._context.closed:
            self._context.cancel()
            if self._draft is not None:
                self._draft.context.cancel()

    def _tell_draining(self, seconds: float) -> None:
        for session in self.running():
            session.tell(Draining(seconds))

    # ---- the algorithm, on the scheduler's thread

    def _patience(self) -> float | None:
        if self.running():
            return min(1.0, max(self.limits.idle_seconds / 4, 0.01))
        return min(self.limits.keep_seconds, 60.0) if any(s.held for s in self._slots) else None

    def _step(self) -> bool:
        # 1. Make room: end what is over, and forget what was kept for too long.
        self._end_sessions()
        self._forget_expired()
        # 2. Fill the free slots from the queue.
        self._admit()
        # 3. Compute one chunk of the prompts.
        prompts = [s for s in self._slots if s.owner is not None and s.owner.n_to_compute > 0]
        n_rows = self._prompt_rows(prompts) if prompts else 0
        if n_rows > 0:
            self._compute_prompts(prompts, n_rows)
        # 4. One pass for all sessions that may go on.
        jobs = self._ready()
        if jobs:
            self._pass(jobs, len(prompts))
        if prompts or jobs:
            self._n_failures = 0
            return True
        return False

    def _step_failed(self, error: Exception) -> None:
        super()._step_failed(error)
        # All are told the same, so nothing of its text, which may repeat what one of them has sent.
        kind = ClosedError if isinstance(error, ClosedError) else InferenceError
        told = f"a pass of the worker failed ({type(error).__name__}); its log says where"
        for session in self.running():
            self._finish(session, Finished("failed", kind(told)))
        if self.failed:
            self._closing = True

    def _end_all(self) -> None:
        with self._changed:
            left = [*self.running(), *self._queue]
        for session in left:
            self._finish(session, Finished("closing"))

    # ---- 1. ending and forgetting

    def _end_sessions(self) -> None:
        """End those that were asked to, those that may not go on, and those whose clients keep a place and do
        nothing with it.
        """
        with self._changed:
            ending = [(s, s.ending) for s in [*self.running(), *self._queue] if s.ending is not None]
        for session, event in ending:
            self._finish(session, event)
        now = time.monotonic()
        self._end_refused(now)
        idle = self.limits.idle_seconds
        for session in self.running():
            waits = session.waits_for_client(self.n_vocab)
            session.observe_waiting(now, waits=waits)
            silent = now - session.heard > idle or (self._queue and session.waited_seconds > idle)
            if waits and silent:
                self._finish(session, Finished("idle"))
                if session.is_blocked:
                    session.on_stuck()

    def _end_refused(self, now: float) -> None:
        """End those that have waited for a place for too long, and texts of users who have had their tokens
        of this minute. A prompt is computed to its end all the same: to break off would be to compute it
        again.
        """
        with self._changed:
            waiting = list(self._queue)
        for session in waiting:
            if now - session.created > self.limits.queue_seconds:
                self.stats.refused += 1
                late = BusyError(
                    f"no place has become free in {self.limits.queue_seconds:g} seconds (the worker's"
                    " Limits.queue_seconds, --queue-seconds); try again later"
                )
                self._finish(session, Finished("failed", late))
        for session in [*self.running(), *waiting]:
            if session.slot is None or session.n_to_compute == 0:
                try:
                    session.account.check_rate()
                except BusyError as error:
                    self._finish(session, Finished("failed", error))

    def _finish(self, session: Session, event: Finished) -> None:
        if session.finished:
            return
        session.finished, session.compiled = True, None
        slot = session.slot
        if slot is not None:
            try:
                slot.held = self._context.memory.tokens(slot.seq_id).tolist()
            except SllmError:  # the context was closed meanwhile; the client has to be told all the same
                slot.held = []
        with self._changed:
            if session in self._queue:
                self._queue.remove(session)
            if slot is not None:
                slot.freed = time.monotonic()
                slot.owner = None  # last: a slot without an owner says what it holds
            self._changed.notify_all()
        session.tell(event)

    def _forget_expired(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.owner is None and slot.held and now - slot.freed > self.limits.keep_seconds:
                slot.held = []
                self._context.memory.clear(slot.seq_id)
                if self._draft is not None:
                    self._draft.forget(slot)

    # ---- 2. from the queue into slots

    def _admit(self) -> None:
        if self._draining:
            for waiting in list(self._queue):
                self._finish(waiting, Finished("closing"))
        while True:
            free = [s for s in self._slots if s.owner is None]
            with self._changed:
                # Of those who wait, one whose user has the fewest places: one user's many do not keep the
                # others out.
                if not self._queue or not free:
                    return
                places = Counter(running.user for running in self.running())
                session = min(self._queue, key=lambda s: places[s.user])
            slot, n_same = self._place(session, free)
            with self._changed:  # other threads see it either in the queue or in a slot
                self._queue.remove(session)
                slot.owner, slot.held, slot.user = session, [], session.user
            session.slot = slot
            session.heard = time.monotonic()
            if session.score_from is not None:
                n_same = min(n_same, session.score_from - 1)  # what is scored has to be computed
            session.n_computed = session.n_reused = n_same
            self.stats.prompt_tokens += session.n_prompt
            self.stats.reused_tokens += n_same
            session.queued_seconds = time.monotonic() - session.created
            if session.n_to_compute == 0:
                self._prompt_computed(session)

    def _place(self, session: Session, free: list[TextSlot]) -> tuple[TextSlot, int]:
        """A slot for a session, and how much of the prompt it holds: the one with the longest common prefix,
        else the one longest unused. What others' texts have left is of no use: how long a prompt takes would
        tell what they were.
        """
        prompt = session.text[:-1]
        same = {s.seq_id: common_prefix(s.held, prompt) if s.user == session.user else 0 for s in free}
        best = max(free, key=lambda s: (same[s.seq_id], -s.freed))
        n_same = same[best.seq_id]
        oldest = min(free, key=lambda s: (bool(s.held), s.freed))
        if n_same == 0:
            slot = oldest
        elif best is oldest or 2 * n_same >= len(best.held):
            slot = best
        else:  # most of what it holds would be lost to the one who may come back for it
            self._context.memory.copy(best.seq_id, oldest.seq_id)
            slot = oldest
            if self._draft is not None:
                self._draft.copy(best, slot)
        slot.n_in_draft = min(slot.n_in_draft, n_same)
        return slot, n_same

    # ---- 3. prompts

    def _prompt_rows(self, slots: list[TextSlot]) -> int:
        """How many tokens of these prompts are computed before the next pass."""
        n_left = sum(slot.owner.n_to_compute for slot in slots if slot.owner is not None)
        n_ready = len(self._ready())
        since = time.monotonic() - AWAY_SECONDS
        writing = [s for s in self.running() if s.n_to_compute == 0]
        n_away = sum(s.heard > since for s in writing if s.waits_for_client(self.n_vocab))
        return self._shares.prompt_rows(len(slots), n_ready, n_away, min(n_left, self.limits.prefill))

    def _compute_prompts(self, slots: list[TextSlot], n_rows: int) -> None:
        # 1. A fair share of the rows to each prompt, beginning with another one each time.
        first = self._turn % len(slots)
        self._turn += 1
        chunks = _shares(slots[first:] + slots[:first], n_rows)
        # 2. Compute: prompts of texts together, what is scored one by one.
        began = time.perf_counter()
        scored = [one for one in chunks if one[1].scores_next]
        plain = [one for one in chunks if not one[1].scores_next]
        if plain:
            self._context.decode(
                [chunk for _, _, chunk in plain],
                seq_id=[slot.seq_id for slot, _, _ in plain],
                pos=[session.n_computed for _, session, _ in plain],
            )
        for slot, session, chunk in scored:
            at = session.n_computed
            following = np.array([*chunk, session.text[at + len(chunk)]], dtype=np.int32)
            session.scores.append(self._context.token_logprobs(following, seq_id=slot.seq_id, pos=at))
        # 3. Account, and tell the sessions whose prompt is whole.
        seconds = time.perf_counter() - began
        n_computed = sum(len(chunk) for _, _, chunk in chunks)
        self.stats.count_prompts(n_computed, seconds)
        self._shares.observe_prompts(n_computed, seconds)
        for _, session, chunk in chunks:
            session.account.spend(len(chunk))
            session.n_computed += len(chunk)
            session.prompt_seconds += seconds
            if session.n_to_compute == 0:
                self._prompt_computed(session)

    def _prompt_computed(self, session: Session) -> None:
        session.heard = time.monotonic()
        if session.score_from is not None:
            logprobs = np.concatenate([part for part, _ in session.scores])
            ranks = np.concatenate([part for _, part in session.scores])
            session.tell(Scored(logprobs, ranks, session.n_reused, session.prompt_seconds))
            self._finish(session, Finished("scored"))
            return
        session.tell(Opened(session.n_reused, session.prompt_seconds, session.queued_seconds))
        if session.is_full:
            self._finish(session, Finished(session.end_reason))

    # ---- 4. a pass

    def _ready(self) -> list[Job]:
        """The sessions that may go on: their prompt is computed, their client reads, and has asked for a pass
        unless it lets them run ahead.
        """
        jobs = []
        for slot in self._slots:
            session = slot.owner
            if session is None or session.n_to_compute > 0 or session.is_blocked:
                continue
            # Every branch takes room in memory, also where their tokens are for the same position.
            n_rows = min(self._max_draft, self._context.n_ctx_seq - len(session.text))
            hint, asked, hint_id = session.usable_hint(self.n_vocab, n_rows)
            if session.run_ahead or asked:
                jobs.append(Job(slot, session, hint, hint_id, session.n_again, n_rows))
        return jobs

    def _pass(self, jobs: list[Job], n_prompts: int) -> None:
        started = time.perf_counter()
        # 1. How many hinted tokens of each session are worth checking?
        counts = rows_to_check(
            self._shares.passes,
            [job.session.branches.worths(job.hint) for job in jobs],
            sum(job.n_again for job in jobs),
        )
        for job, n in zip(jobs, counts, strict=True):
            job.draft = job.hint.head(n)
        # 2. Where the worker's own draft is likelier to be right, or goes on after a hint.
        draft_seconds = 0.0
        if self._draft is not None and self._payoff.drafting:
            _, draft_seconds = self._draft.propose(jobs)
        # 3. Not more rows than the context selects from at once, nor than are fair to the others.
        if any(job.draft for job in jobs):
            n_most = self._context.n_outputs_max
            n_again = sum(job.n_again for job in jobs)
            n_fair = self._shares.pass_rows(len(jobs), n_prompts, draft_seconds, n_most + n_again)
            _shorten(jobs, min(n_most, n_fair - n_again))
        # 4. One pass of the model verifies all drafts, and selects a token after each accepted one.
        began = time.perf_counter()
        verdicts = self._verify(jobs)
        # 5. What did it cost?
        n_rows = sum(1 + len(job.draft) + job.n_again for job in jobs)
        seconds = draft_seconds + self._pass_time(began, n_rows)
        self._shares.observe_pass(n_rows, seconds, draft_seconds, n_texts=len(jobs), n_prompts=n_prompts)
        self.stats.count_pass(n_rows, seconds)
        # 6. Learn from the verdicts, commit their tokens, tell the clients.
        n_tokens = 0.0
        for job, verdict in zip(jobs, verdicts, strict=True):
            if isinstance(verdict, Exception):
                self._finish(job.session, Finished("failed", verdict))
                continue
            tokens, n_accepted = verdict
            job.own = {place for place in job.own if place < len(job.draft)}
            job.session.branches.observe_truth(job.hint, tokens)
            if self._draft is not None:
                self._draft.learn(job, tokens)
            self._commit(job, tokens, n_accepted, seconds)
            is_hinted = len(job.own) < len(job.draft)
            n_tokens += self._observe_hinted(len(tokens)) if is_hinted else len(tokens)
        if self._draft is not None:
            self._payoff.observe_pass(len(jobs), n_tokens, time.perf_counter() - started)

    def _verify(self, jobs: list[Job]) -> list[tuple[list[int], int] | Exception]:
        """What each session's pass committed, and how much of it was accepted; or why it could not be
        computed.
        """
        n_at_once = self._context.n_outputs_max
        results: list[tuple[list[int], int] | Exception] = []
        for first in range(0, len(jobs), n_at_once):
            part = jobs[first : first + n_at_once]
            try:
                results += self._verify_together(part)
            except CancelledError:
                raise
            except (SllmError, ValueError) as error:
                if len(part) == 1:
                    results.append(error)
                else:  # one session's trouble (a grammar that is stuck) is not the others': one by one
                    results += [self._verify([job])[0] for job in part]
        return results

    def _verify_together(self, jobs: list[Job]) -> list[tuple[list[int], int]]:
        verdict = self._context.verify(
            [job.slot.seq_id for job in jobs],
            [job.session.text[-1] for job in jobs],
            [job.draft.tokens for job in jobs] if any(job.draft for job in jobs) else None,
            parents=None if all(job.draft.is_chain for job in jobs) else [job.draft.parents for job in jobs],
            sampling=[job.session.sampling for job in jobs],
            pos=[len(job.session.text) - 1 for job in jobs],
            start=[job.session.start for job in jobs],
        )
        return [
            (tokens[: n + 1].tolist(), int(n))
            for tokens, n in zip(verdict.tokens, verdict.n_accepted, strict=True)
        ]

    def _observe_hinted(self, n_tokens: int) -> float:
        """A pass has committed so many tokens to a text with a hint; returns how many that usually are.

        Whether the worker's own drafts pay does not depend on whether hints were good meanwhile.
        """
        self._usual_hinted += 0.05 * (n_tokens - self._usual_hinted)
        return self._usual_hinted

    def _commit(self, job: Job, tokens: list[int], n_accepted: int, seconds: float) -> None:
        session, pos, n_verified = job.session, len(job.session.text), len(job.draft)
        accepted = tokens[:n_accepted]
        n_own_accepted = len(job.own.intersection(job.draft.path(accepted)))
        session.n_again = job.draft.n_beside(accepted)
        session.text.extend(tokens)
        session.answered = job.hint_id
        session.n_computed = len(session.text) - 1
        session.n_passes += 1
        session.n_drafted += n_verified
        session.n_accepted += n_accepted
        session.account.spend(len(tokens))
        session.account.note_text(session.text_id, session.start, len(session.text))
        self.stats.count_commit(len(tokens), n_verified, n_accepted, len(job.own), n_own_accepted)
        own = n_own_accepted, len(job.own)
        session.tell(Commit(pos, tuple(tokens), n_accepted, n_verified, seconds, *own))
        if self._context.model.vocab.is_eog(tokens[-1]):
            self._finish(session, Finished("eog"))
        elif session.is_full:
            self._finish(session, Finished(session.end_reason))


def _drafting(context: Context, draft: Context | Heads, pace: Pace, passes: PassTimes) -> OwnDraft:
    """What drafts for a scheduler of ``context``, whose passes take so long."""
    if isinstance(draft, Heads):
        return HeadsDraft(draft, pace, passes)
    return (TreeDraft if context.can_branch and draft.can_branch else OwnDraft)(draft, pace, passes)


def rows_to_check(times: PassTimes, worths: Sequence[Sequence[float]], n_again: int = 0) -> list[int]:
    """How many hinted tokens of each session the next pass should check.

    Args:
        times: what passes take by their number of rows.
        worths: for each session and each of its hinted tokens the chance of it to be accepted, which falls.
        n_again: rows that the pass has besides, of committed tokens.

    Returns:
        For each session a number up to that of its tokens: the ones with the most committed tokens per
        second, all sessions together. Rows are taken in the order of their worth.

    """
    worth = sorted(
        ((value, i) for i, values in enumerate(worths) for value in values), key=lambda row: -row[0]
    )
    n_rows = len(worths)
    counts = [0] * n_rows
    if not worth or not times.known(n_rows):
        return counts
    tokens = float(n_rows)
    n_rows += n_again
    best, best_n = tokens / times.estimate(n_rows), 0
    for n, (value, _) in enumerate(worth, 1):
        tokens += value
        rate = tokens / times.estimate(n_rows + n)
        if rate > best:
            best, best_n = rate, n
    for _, i in worth[:best_n]:
        counts[i] += 1
    return counts


def _shares(slots: list[TextSlot], budget: int) -> list[tuple[TextSlot, Session, npt.NDArray[np.int32]]]:
    """The next tokens of each prompt, about ``budget`` in all; a chunk is scored as a whole or not at all."""
    chunks: list[tuple[TextSlot, Session, npt.NDArray[np.int32]]] = []
    for i, slot in enumerate(slots):
        session = slot.owner
        assert session is not None
        share = max(1, budget // (len(slots) - i))
        if session.score_from is not None and not session.scores_next:
            share = min(share, session.score_from - 1 - session.n_computed)
        part = session.text[session.n_computed : len(session.text) - 1][:share]
        budget -= len(part)
        chunks.append((slot, session, np.array(part, dtype=np.int32)))
        if budget <= 0:
            break
    return chunks


def _shorten(jobs: list[Job], n_rows_max: int) -> None:
    """Take tokens from the longest drafts until all rows of a pass are at most ``n_rows_max``."""
    excess = len(jobs) + sum(len(job.draft) for job in jobs) - n_rows_max
    while excess > 0:
        longest = max(jobs, key=lambda job: len(job.draft))
        if not longest.draft:
            return
        longest.draft = longest.draft.head(len(longest.draft) - 1)
        excess -= 1

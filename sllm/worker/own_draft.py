"""The worker's own draft, a small model beside the big one or the big one's own heads, for texts whose
clients send no usable hints, or worse ones.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sllm.draft.length import PassTimes
from sllm.draft.tree import DraftedTree
from sllm.engine.tree import MAX_NODES
from sllm.errors import CancelledError, SllmError
from sllm.targets.tree import TokenTree
from sllm.worker.draft_budget import Chance, DraftBudget, Text
from sllm.worker.tree_plan import CLEARLY, SHORT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.draft.length import Price
    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.mtp import Heads
    from sllm.worker.draft_budget import Part
    from sllm.worker.passes import Pace
    from sllm.worker.session import Session, TextSlot

__all__ = ["AGREE", "HeadsDraft", "Job", "OwnDraft"]

log = logging.getLogger("sllm.worker")

_Wanted = TypeVar("_Wanted", bound=tuple[Any, ...])

AGREE = 2
"""A hint that was doubted is taken after all where so many of its tokens are what the own draft says."""


_ALONG = 33
"""Tokens of a text that the draft has not read and that its next pass reads along: what a pass commits."""

_READ = 256
"""Others that it reads before a pass at most, of all texts together."""


@dataclass(eq=False)
class Job:
    """One session's part of a pass.

    Attributes:
        slot, session: whose it is.
        hint: usable tokens of the newest hint, and ``hint_id``, its number.
        n_again: tokens that the pass computes again, since they stood on a side branch of the last tree.
        n_most: drafted tokens for which the pass has room in memory.
        draft: the tokens that the pass verifies, of the hint and of the worker's own draft.
        own: the places in it of those that the worker's draft alone has proposed.
        n_hinted: how many tokens of the hint, along its main path, stand before the worker's own draft.
        proposed: what that says, where it is a chain, after ``own_from`` of the hint's tokens, with its
            probabilities ``probs``.
        tree: the same after ``n_hinted`` of them, where it is a tree.
        shared: the pass is other texts' as well, and ``price``, what it costs them then.
        width, depth: how the draft was asked for: rows of its passes, and how many of these; 0: it was not.

    """

    slot: TextSlot
    session: Session
    hint: TokenTree
    hint_id: int
    n_again: int = 0
    n_most: int = MAX_NODES
    draft: TokenTree = field(default_factory=TokenTree)
    own: set[int] = field(default_factory=set)
    n_hinted: int = 0
    own_from: int = 0
    proposed: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    tree: DraftedTree = field(default_factory=DraftedTree)
    shared: bool = False
    price: Price | None = None
    width: int = 1
    depth: int = 0


class OwnDraft:
    """Drafts for the sessions of a scheduler (co-located speculation), on the scheduler's thread.

    What it cannot do for a text (a token or a logit bias that its vocabulary lacks, a text longer than its
    context), that text goes on without.

    Args:
        context: of the smaller model, with a sequence for each of the scheduler's slots.
        pace: what a token takes at least.
        passes: what the scheduler's passes take by their rows; it goes on measuring.

    """

    WIDTHS: tuple[int, ...] = (1,)
    """Rows of a text in a pass of the draft."""

    def __init__(self, context: Context, pace: Pace, passes: PassTimes | None = None) -> None:
        self.context = context
        self._pace = pace
        self._n_reading = _READ
        self._budget = DraftBudget(passes or PassTimes(), self.WIDTHS)

    def copy(self, source: TextSlot, target: TextSlot) -> None:
        """Give ``target`` the memory of ``source``."""
        target.n_in_draft = 0
        if source.n_in_draft > 0:
            self.context.memory.copy(source.seq_id, target.seq_id)
            target.n_in_draft = source.n_in_draft

    def forget(self, slot: TextSlot) -> None:
        """Free the memory of a sequence."""
        slot.n_in_draft = 0
        self.context.memory.clear(slot.seq_id)

    def propose(self, jobs: Sequence[Job]) -> tuple[list[Job], float]:
        """Draft where the worker's own draft is likelier to be right now than what the client has hinted, or
        goes on where that ends, and drafting is likely to pay.

        Returns:
            The jobs for which something was drafted, and the seconds that it took.

        """
        self._n_reading = _READ
        return self._propose_alone(jobs[0]) if len(jobs) == 1 else self._propose_together(jobs)

    def _propose_alone(self, job: Job) -> tuple[list[Job], float]:
        """:meth:`propose` for a text that has the pass for itself."""
        # 1. Where, how many tokens, and down to which probability?
        length, room, hinted = job.session.draft_length, self._room(job), job.draft
        if room <= 0 or not self._begin(job):
            return [], 0.0
        if not self._has_read(job):
            job.draft = hinted
            return [], 0.0
        after, holds = _given(job)
        n_max, p_min = length.more(after=after, holds=holds)
        job.depth = min(n_max, room - after)
        if job.depth <= 0:
            return [], 0.0
        # 2. Draft.
        began = time.perf_counter()
        drafted = self._each_or_all([(job, job.depth, p_min)], self._draft)
        # 3. What did it cost?
        seconds = self._draft_time(began, self._n_passes(job), len(drafted))
        if drafted:
            length.observe_draft(self._n_passes(job), seconds)
        return drafted, seconds

    def _room(self, job: Job) -> int:
        """How many more tokens a draft may have, hinted ones with it."""
        session = job.session
        if not session.can_draft:
            return 0
        return min(session.end, self.context.n_ctx_seq) - len(session.text) - 1

    def _has_read(self, job: Job) -> bool:
        """Whether the draft has read all of a text but for what it reads along; if not, it reads some of it.

        So nothing is read of a text for which nothing is drafted, and what a pass of the draft takes is not
        what a prompt does.
        """
        slot, session = job.slot, job.session
        begins = self._begins(job)
        n_behind = len(session.text) - begins - _ALONG
        if n_behind <= 0:
            return True
        n = min(n_behind, self._n_reading)
        if n > 0:
            chunk = np.array(session.text[begins : begins + n], dtype=np.int32)
            try:
                self.context.decode([chunk], seq_id=[slot.seq_id], pos=[begins])
            except CancelledError:
                raise
            except (SllmError, ValueError) as error:
                _give_up(session, error)
                return False
            slot.n_in_draft += n
            self._n_reading -= n
        return n == n_behind

    def _propose_together(self, jobs: Sequence[Job]) -> tuple[list[Job], float]:
        """:meth:`propose` for several texts, all of which wait for what is drafted for any of them."""
        # 1. Which of them may draft, from where, and how far is it worth the time of all?
        texts: list[Text] = []
        for job in jobs:
            room = self._room(job)
            weight = self._place(job) if room > 0 else 0.0
            n_tokens = 1 + sum(job.session.branches.worths(job.draft))
            texts.append(Text(n_tokens, weight, self._chances(job), room - job.n_hinted))
        plan = self._budget.plan(texts, sum(1 + len(job.draft) + job.n_again for job in jobs))
        wanted: list[tuple[Job, Part]] = []
        for job, part in zip(jobs, plan.parts, strict=True):
            job.width, job.depth, job.price = plan.width, part.depth, part.price
            if part.depth > 0:
                if self._has_read(job):
                    wanted.append((job, part))
            else:
                self._chances(job)[plan.width].forget()
        if not wanted:
            return [], 0.0
        # 2. All together.
        began = time.perf_counter()
        drafted = self._each_or_all(wanted, self._draft_planned)
        # 3. What did it cost?
        n_passes = max((self._n_passes(job) for job in drafted), default=1)
        seconds = self._draft_time(began, n_passes, len(drafted) * plan.width)
        if drafted:
            n_shown = sum(len(job.own) for job in drafted)
            self._budget.observe(plan.width, len(drafted), n_passes, n_shown, seconds)
        return drafted, seconds

    def _place(self, job: Job) -> float:
        """Choose where a job's own draft begins, after ``n_hinted`` tokens of its hint; returns the chance
        that the text comes there.
        """
        job.n_hinted = len(job.draft)
        if not job.draft:
            doubted = job.session.hint_trust.chance < self._chances(job)[1].value
            return 1.0 if doubted or not job.hint else 0.0
        return _given(job)[1] if self._goes_on(job) else 0.0

    def _draft_planned(self, wanted: list[tuple[Job, Part]]) -> list[Job]:
        return self._draft(
            [(job, part.depth, job.session.draft_length.least(part.least)) for job, part in wanted]
        )

    def _n_passes(self, job: Job) -> int:
        """Passes of the draft that a job has needed."""
        return max(len(job.proposed), 1)

    def learn(self, job: Job, tokens: Sequence[int], seconds: float, draft_seconds: float) -> None:
        """A pass has committed ``tokens`` for a job and has taken so long, what drafting took included."""
        length, n = job.session.draft_length, job.own_from
        if not job.shared:
            length.observe_pass(len(job.draft) + job.n_again, seconds - draft_seconds)
        if not job.proposed:
            return
        if tuple(tokens[:n]) == job.hint.main_path()[:n]:
            self._observe_chance(
                job, length.observe_truth(job.proposed, job.probs, tokens[n:]), len(tokens) - n
            )
        if job.n_hinted == 0 and not job.shared:
            length.observe_round(len(tokens), seconds)

    def _chances(self, job: Job) -> dict[int, Chance]:
        """That what is drafted for a job goes on rightly; at first as for other texts."""
        found = job.session.own_chances
        if not found:
            found.update({width: Chance(usual.value) for width, usual in self._budget.usual.items()})
        return found

    def _observe_chance(self, job: Job, n_right: int, n_true: int) -> None:
        """Of what a job's draft says, ``n_right`` tokens in a row hold, where the pass has committed
        ``n_true``, the last one by itself.
        """
        n_brought = min(n_right, n_true - 1)
        for chance in (self._chances(job)[job.width], self._budget.usual[job.width]):
            chance.observe(n_brought, ended=n_brought < job.depth)

    def _each_or_all(self, wanted: list[_Wanted], draft: Callable[[list[_Wanted]], list[Job]]) -> list[Job]:
        """``draft`` all together; where that fails, one by one: one text's trouble is not the others'."""
        try:
            return draft(wanted)
        except CancelledError:
            raise
        except (SllmError, ValueError):
            drafted: list[Job] = []
            for one in wanted:
                try:
                    drafted += draft([one])
                except CancelledError:  # noqa: PERF203
                    raise
                except (SllmError, ValueError) as error:
                    job: Job = one[0]
                    _give_up(job.session, error)
            return drafted

    def _draft_time(self, began: float, n_passes: int, n_rows: int) -> float:
        """Seconds since passes of the draft, of so many rows each, have begun; waits until they have taken as
        long as they should.
        """
        pass_seconds = self._pace.draft_seconds + n_rows * self._pace.draft_row_seconds
        time.sleep(max(0.0, began + n_passes * pass_seconds - time.perf_counter()))
        return time.perf_counter() - began

    def _begin(self, job: Job) -> bool:
        """Whether to draft for a job, after as much of its hint as ``n_hinted`` says then."""
        length = job.session.draft_length
        job.n_hinted = len(job.draft)
        if not job.draft:  # a hint that is not worth checking leaves room for a likelier draft alone
            doubted = job.session.hint_trust.chance < length.acceptance
            return (doubted or not job.hint) and length.begin()
        goes_on = self._goes_on(job)
        if not length.tried:  # nothing is known of it yet: it may show what it takes after a short hint
            return goes_on and len(job.draft) < SHORT and length.begin()
        given = [job.session.hint_trust.chance] * len(job.draft)
        alone = length.expected(given, drafts=False)
        after = length.expected(given, drafts=True) if goes_on else 0.0
        instead = length.expected([], drafts=True)
        if max(after, instead) <= CLEARLY * alone or not length.begin():
            return False
        if instead > after:
            job.draft, job.n_hinted = TokenTree(), 0
        return True

    def _goes_on(self, job: Job) -> bool:
        """Whether a draft can follow a job's hint, all of which will be checked."""
        whole = job.draft.is_chain and len(job.draft) == len(job.hint)
        return whole and max(job.draft.tokens) < self.context.model.vocab.n_tokens

    def _begins(self, job: Job) -> int:
        """From which position on a text has to be given to what drafts."""
        return job.slot.n_in_draft

    def _drafts(self, jobs: Sequence[Job], **arguments: Any) -> Draft:
        drafts = self.context.draft(**arguments)
        for job in jobs:
            job.slot.n_in_draft = len(job.session.text)
        return drafts

    def _draft(self, wanted: list[tuple[Job, int, float]]) -> list[Job]:
        jobs = [job for job, _, _ in wanted]
        drafts = self._drafts(
            jobs,
            seq_ids=[job.slot.seq_id for job in jobs],
            tokens=[[*job.session.text[self._begins(job) :], *job.draft.tokens] for job in jobs],
            n_max=[n_max for _, n_max, _ in wanted],
            p_min=[p_min for _, _, p_min in wanted],
            sampling=[job.session.sampling for job in jobs],
            pos=[self._begins(job) for job in jobs],
            start=[job.session.start for job in jobs],
        )
        for row, job in enumerate(jobs):
            job.proposed = drafts.tokens[row, : drafts.lengths[row]].tolist()
            job.probs = drafts.probs[row, : drafts.lengths[row]].tolist()
            after, holds = _given(job)
            job.own_from = after
            n = job.session.draft_length.keep(job.probs, after=after, holds=holds, price=job.price)
            kept, hint = tuple(job.proposed[:n]), job.hint
            if after == 0 and AGREE <= n < len(hint) and hint.is_chain and hint.tokens[:n] == kept:
                job.draft, job.n_hinted = hint, len(hint)  # two say so, and one knows more
            else:
                job.draft = TokenTree.chain([*job.draft.tokens, *kept])
                job.own = set(range(after, after + n))
        return jobs


class HeadsDraft(OwnDraft):
    """Drafts by the big model's own heads for multi-token prediction, which follow its memory by themselves.

    Args:
        heads: of the scheduler's context.
        pace, passes: as for :class:`OwnDraft`.

    """

    def __init__(self, heads: Heads, pace: Pace, passes: PassTimes | None = None) -> None:
        super().__init__(heads.context, pace, passes)
        self._heads = heads

    def copy(self, source: TextSlot, target: TextSlot) -> None:
        """The heads have copied what they hold with the context's memory."""

    def forget(self, slot: TextSlot) -> None:
        """The heads have forgotten it with the context's memory."""

    def _begins(self, job: Job) -> int:
        return len(job.session.text) - 1

    def _drafts(self, jobs: Sequence[Job], **arguments: Any) -> Draft:  # noqa: ARG002
        return self._heads.draft(**arguments)


def _given(job: Job) -> tuple[int, float]:
    """How many hinted tokens a job's draft begins with, and the chance that all of them hold."""
    return job.n_hinted, float(job.session.hint_trust.chance**job.n_hinted)


def _give_up(session: Session, error: Exception) -> None:
    session.can_draft = False
    log.info("the worker cannot draft for a text (%s)", type(error).__name__)

"""The worker's own draft, a small model beside the big one or the big one's own heads, for texts whose
clients send no usable hints, or worse ones.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.draft.length import PassTimes
from sllm.draft.tree import DraftedTree
from sllm.engine.tree import MAX_NODES
from sllm.errors import CancelledError, SllmError
from sllm.targets.tree import TokenTree
from sllm.worker.draft_budget import Chance, DraftBudget, Part, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.mtp import Heads
    from sllm.worker.passes import Pace
    from sllm.worker.session import Session, TextSlot

__all__ = ["AGREE", "HeadsDraft", "Job", "OwnDraft"]

log = logging.getLogger("sllm.worker")

AGREE = 2
"""A hint that was doubted is taken after all where so many of its tokens are what the own draft says."""


_LEARN = 16
"""Tokens of which is known whether they held, before what a text's draft says is believed alone."""

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
        width, part: how that was asked for.
        proposed: what it says, where it is a chain, with its probabilities ``probs``.
        tree: the same, where it is a tree.

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
    width: int = 1
    part: Part = field(default_factory=Part)
    proposed: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    tree: DraftedTree = field(default_factory=DraftedTree)


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
        # 1. Which of them may draft, from where, and how far is it worth the time of all?
        texts: list[Text] = []
        for job in jobs:
            room = self._room(job)
            weight = self._place(job) if room > 0 else 0.0
            n_tokens = 1 + sum(job.session.branches.worths(job.draft))
            texts.append(Text(n_tokens, weight, self._chances(job), room - job.n_hinted))
        plan = self._budget.plan(texts, sum(1 + len(job.draft) + job.n_again for job in jobs))
        self._n_reading = _READ
        wanted: list[Job] = []
        for job, part in zip(jobs, plan.parts, strict=True):
            job.width, job.part = plan.width, part
            if part.depth == 0:
                self._chances(job)[plan.width].forget()
            elif self._has_read(job):
                wanted.append(job)
        if not wanted:
            return [], 0.0
        # 2. All together.
        began = time.perf_counter()
        drafted = self._each_or_all(wanted)
        # 3. What did it cost?
        n_passes = max((self._n_passes(job) for job in drafted), default=1)
        seconds = self._draft_time(began, n_passes, len(drafted) * plan.width)
        if drafted:
            n_shown = sum(len(job.own) for job in drafted)
            self._budget.observe(plan.width, len(drafted), n_passes, n_shown, seconds)
        return drafted, seconds

    def learn(self, job: Job, tokens: Sequence[int]) -> None:
        """A pass has committed ``tokens`` for a job."""
        n = job.n_hinted
        if self._n_passes(job) == 0 or tuple(tokens[:n]) != job.hint.main_path()[:n]:
            return
        n_brought = min(self._observe_truth(job, tokens[n:]), len(tokens) - n - 1)
        for chance in (self._chances(job)[job.width], self._budget.usual[job.width]):
            chance.observe(max(n_brought, 0), ended=n_brought < job.part.depth)

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

    def _place(self, job: Job) -> float:
        """Choose where a job's own draft begins, after ``n_hinted`` tokens of its hint; returns the chance
        that the text comes there.
        """
        job.n_hinted = len(job.draft)
        if not job.draft:
            doubted = job.session.hint_trust.chance < self._chances(job)[1].value
            return 1.0 if doubted or not job.hint else 0.0
        # It goes on after a hint that is checked as a whole.
        whole = job.draft.is_chain and len(job.draft) == len(job.hint)
        follows = whole and max(job.draft.tokens) < self.context.model.vocab.n_tokens
        return _hint_holds(job) if follows else 0.0

    def _n_passes(self, job: Job) -> int:
        """Passes of the draft that a job has needed; 0: nothing was drafted."""
        return len(job.proposed)

    def _observe_truth(self, job: Job, truth: Sequence[int]) -> int:
        """In the place of what was drafted came ``truth``; returns how many tokens of a draft hold."""
        return job.session.own_trust.observe_truth(job.proposed, job.probs, truth)

    def _chances(self, job: Job) -> dict[int, Chance]:
        """That what is drafted for a job goes on rightly; at first as for other texts."""
        found = job.session.own_chances
        if not found:
            found.update({width: Chance(usual.value) for width, usual in self._budget.usual.items()})
        return found

    def _each_or_all(self, wanted: list[Job]) -> list[Job]:
        """Draft all together; where that fails, one by one: one text's trouble is not the others'."""
        try:
            return self._draft(wanted)
        except CancelledError:
            raise
        except (SllmError, ValueError):
            drafted: list[Job] = []
            for job in wanted:
                try:
                    drafted += self._draft([job])
                except CancelledError:  # noqa: PERF203
                    raise
                except (SllmError, ValueError) as error:
                    _give_up(job.session, error)
            return drafted

    def _draft_time(self, began: float, n_passes: int, n_rows: int) -> float:
        """Seconds since passes of the draft, of so many rows each, have begun; waits until they have taken as
        long as they should.
        """
        pass_seconds = self._pace.draft_seconds + n_rows * self._pace.draft_row_seconds
        time.sleep(max(0.0, began + n_passes * pass_seconds - time.perf_counter()))
        return time.perf_counter() - began

    def _begins(self, job: Job) -> int:
        """From which position on a text has to be given to what drafts."""
        return job.slot.n_in_draft

    def _drafts(self, jobs: Sequence[Job], **arguments: Any) -> Draft:
        drafts = self.context.draft(**arguments)
        for job in jobs:
            job.slot.n_in_draft = len(job.session.text)
        return drafts

    def _draft(self, jobs: list[Job]) -> list[Job]:
        drafts = self._drafts(
            jobs,
            seq_ids=[job.slot.seq_id for job in jobs],
            tokens=[[*job.session.text[self._begins(job) :], *job.draft.tokens] for job in jobs],
            n_max=[job.part.depth for job in jobs],
            p_min=[_least_prob(job) for job in jobs],
            sampling=[job.session.sampling for job in jobs],
            pos=[self._begins(job) for job in jobs],
            start=[job.session.start for job in jobs],
        )
        for row, job in enumerate(jobs):
            job.proposed = drafts.tokens[row, : drafts.lengths[row]].tolist()
            job.probs = drafts.probs[row, : drafts.lengths[row]].tolist()
            n = _n_worth_checking(job)
            kept, hint = tuple(job.proposed[:n]), job.hint
            if not job.draft and AGREE <= n < len(hint) and hint.is_chain and hint.tokens[:n] == kept:
                job.draft = hint  # two say so, and one knows more
            else:
                job.draft = TokenTree.chain([*job.draft.tokens, *kept])
                job.own = set(range(job.n_hinted, job.n_hinted + n))
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


def _hint_holds(job: Job) -> float:
    """The chance that all hinted tokens hold with which a job's draft begins."""
    return float(job.session.hint_trust.chance**job.n_hinted)


def _least_prob(job: Job) -> float:
    """The draft's probability below which a job's chain ends."""
    trust = job.session.own_trust
    return min(trust.least(job.part.least), 0.8) if trust.n_seen >= _LEARN else 0.0


def _n_worth_checking(job: Job) -> int:
    """How many tokens of a job's drafted chain bring more than their rows cost."""
    trust, holds = job.session.own_trust, _hint_holds(job)
    # Little is known of a new text's draft, and what it says may be of no account.
    usual = trust.acceptance if trust.n_seen < _LEARN else 0.0
    for n, prob in enumerate(job.probs):
        holds *= max(trust.chance(prob), usual)
        if holds <= job.part.row:
            return n
    return len(job.probs)


def _give_up(session: Session, error: Exception) -> None:
    session.can_draft = False
    log.info("the worker cannot draft for a text (%s)", type(error).__name__)

"""The worker's own draft, a small model beside the big one or the big one's own heads, for texts whose
clients send no usable hints, or worse ones.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sllm.draft.tree import DraftedTree
from sllm.engine.tree import MAX_NODES
from sllm.errors import CancelledError, SllmError
from sllm.targets.tree import TokenTree
from sllm.worker.tree_plan import CLEARLY, SHORT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.mtp import Heads
    from sllm.worker.passes import Pace
    from sllm.worker.session import Session, TextSlot

__all__ = ["AGREE", "HeadsDraft", "Job", "OwnDraft"]

log = logging.getLogger("sllm.worker")

_Wanted = TypeVar("_Wanted", bound=tuple[Any, ...])

AGREE = 2
"""A hint that was doubted is taken after all where so many of its tokens are what the own draft says."""


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


class OwnDraft:
    """Drafts for the sessions of a scheduler (co-located speculation), on the scheduler's thread.

    What it cannot do for a text (a token or a logit bias that its vocabulary lacks, a text longer than its
    context), that text goes on without.

    Args:
        context: of the smaller model, with a sequence for each of the scheduler's slots.
        pace: what a token takes at least.

    """

    def __init__(self, context: Context, pace: Pace) -> None:
        self.context = context
        self._pace = pace

    def follow(self, slot: TextSlot, session: Session, chunk: npt.NDArray[np.int32]) -> None:
        """Compute a part of a prompt, int32 (n,), which the big model has just computed."""
        if not session.can_draft or slot.n_in_draft != session.n_computed:
            return
        try:
            self.context.decode([chunk], seq_id=[slot.seq_id], pos=[slot.n_in_draft])
            slot.n_in_draft += len(chunk)
        except CancelledError:
            raise
        except (SllmError, ValueError) as error:
            _give_up(session, error)

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
        # 1. Where, how many tokens, and down to which probability?
        wanted: list[tuple[Job, int, float]] = []
        for job in jobs:
            session, length = job.session, job.session.draft_length
            room = min(session.end, self.context.n_ctx_seq) - len(session.text) - 1
            if not session.can_draft or room <= 0 or not self._begin(job):
                continue
            after, holds = _given(job)
            n_max, p_min = length.more(after=after, holds=holds)
            n_max = min(n_max, room - after)
            if n_max > 0:
                wanted.append((job, n_max, p_min))
        if not wanted:
            return [], 0.0
        # 2. All together.
        began = time.perf_counter()
        drafted = self._each_or_all(wanted, self._draft)
        # 3. What did it cost?
        n_most = max((len(job.proposed) for job in drafted), default=0)
        self._wait(began, max(n_most, 1), len(drafted))
        seconds = time.perf_counter() - began
        for job in drafted:
            job.session.draft_length.observe_draft(max(len(job.proposed), 1), seconds)
        return drafted, seconds

    def learn(self, job: Job, tokens: Sequence[int], seconds: float, draft_seconds: float) -> None:
        """A pass has committed ``tokens`` for a job and has taken so long, what drafting took included."""
        length, n = job.session.draft_length, job.own_from
        length.observe_pass(len(job.draft) + job.n_again, seconds - draft_seconds)
        if not job.proposed:
            return
        if tuple(tokens[:n]) == job.hint.main_path()[:n]:
            length.observe_truth(job.proposed, job.probs, tokens[n:])
        if job.n_hinted == 0:
            length.observe_round(len(tokens), seconds)

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

    def _wait(self, began: float, n_passes: int, n_rows: int) -> None:
        """Until passes of the draft, of so many rows each, have taken as long as they should."""
        pass_seconds = self._pace.draft_seconds + n_rows * self._pace.draft_row_seconds
        time.sleep(max(0.0, began + n_passes * pass_seconds - time.perf_counter()))

    def _begin(self, job: Job) -> bool:
        """Whether to draft for a job, after as much of its hint as ``n_hinted`` says then."""
        length = job.session.draft_length
        job.n_hinted = len(job.draft)
        if not job.draft:  # a hint that is not worth checking leaves room for a likelier draft alone
            doubted = job.session.hint_trust.chance < length.acceptance
            return (doubted or not job.hint) and length.begin()
        whole = job.draft.is_chain and len(job.draft) == len(job.hint)
        goes_on = whole and max(job.draft.tokens) < self.context.model.vocab.n_tokens
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
            n = job.session.draft_length.keep(job.probs, after=after, holds=holds)
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
        pace: as for :class:`OwnDraft`.

    """

    def __init__(self, heads: Heads, pace: Pace) -> None:
        super().__init__(heads.context, pace)
        self._heads = heads

    def follow(self, slot: TextSlot, session: Session, chunk: npt.NDArray[np.int32]) -> None:
        """The heads have followed."""

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

"""The worker's own drafts as trees, also beside what clients hint, where both memories branch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sllm.draft.growth import Shape, TreeGrowth
from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree
from sllm.worker.own_draft import AGREE, OwnDraft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.worker.draft_budget import Part
    from sllm.worker.own_draft import Job

__all__ = ["TreeDraft"]


class TreeDraft(OwnDraft):
    """Drafts trees for the sessions of a scheduler, as :class:`OwnDraft` drafts chains.

    Beside a hint, a tree has its own branches from the end of the text on, where the hint's first token is
    doubtful, or goes on after its main path, where that is likely to hold.
    """

    WIDTHS = TreeGrowth.WIDTHS

    def _propose_alone(self, job: Job) -> tuple[list[Job], float]:
        """See :meth:`OwnDraft.propose`; the job has ``tree`` now."""
        room = self._room(job)
        if room <= 0 or not self._begin_beside(job) or room <= job.n_hinted or not self._has_read(job):
            return [], 0.0
        shape = job.session.tree_plan.growth.shape(room - job.n_hinted)
        job.width, job.depth = shape.width, shape.n_passes
        began = time.perf_counter()
        drafted = self._each_or_all([(job, shape)], self._draft_trees)
        n_passes = max((job.tree.n_passes for job in drafted), default=1)
        seconds = self._draft_time(began, n_passes, len(drafted) * shape.width)
        for job in drafted:
            job.session.tree_plan.growth.observe_draft(job.tree, seconds)
            self._add(job)
        return drafted, seconds

    def _place(self, job: Job) -> float:
        """See :meth:`OwnDraft._place`."""
        job.n_hinted = 0
        if not job.draft:
            return 1.0
        at_root, at_end = self._chances_beside(job)
        if at_end >= at_root:
            job.n_hinted = len(job.draft.main_path())
        return max(at_root, at_end)

    def _draft_planned(self, wanted: list[tuple[Job, Part]]) -> list[Job]:
        shaped = []
        for job, part in wanted:
            p_min = min(max(part.least, TreeGrowth.P_MIN), 0.8)
            shaped.append((job, Shape(part.depth, job.width, TreeGrowth.LIMIT, p_min)))
        drafted = self._draft_trees(shaped)
        for job in drafted:
            self._add(job)
        return drafted

    def _n_passes(self, job: Job) -> int:
        return job.tree.n_passes

    def _chances_beside(self, job: Job) -> tuple[float, float]:
        """Beside a hint: the chances that the text goes on as none of its first tokens says, and that it
        comes to the end of its main path and a draft can follow there (0: none can).
        """
        hinted = _hinted(job)
        shown = job.draft
        main = shown.main_path()
        covered = sum(
            share for share, parent in zip(hinted.shares, hinted.parents, strict=True) if parent < 0
        )
        ends = len(shown) == len(job.hint) and max(main) < self.context.model.vocab.n_tokens
        return 1 - covered, hinted.chances()[shown.path(main)[-1]] if ends else 0.0

    def _begin_beside(self, job: Job) -> bool:
        """Whether to draft for a job, after ``n_hinted`` tokens of its hint's main path."""
        job.n_hinted = 0
        plan = job.session.tree_plan
        if not job.draft:
            return plan.growth.begin()
        where = plan.place(_hinted(job).chances(), *self._chances_beside(job))
        if where is None or not plan.growth.begin():
            return False
        job.n_hinted = len(job.draft.main_path()) if where == "end" else 0
        return True

    def _draft_trees(self, wanted: list[tuple[Job, Shape]]) -> list[Job]:
        jobs = [job for job, _ in wanted]
        before = [job.draft.main_path()[: job.n_hinted] for job in jobs]
        drafts = self._drafts(
            jobs,
            seq_ids=[job.slot.seq_id for job in jobs],
            tokens=[
                [*job.session.text[self._begins(job) :], *main]
                for job, main in zip(jobs, before, strict=True)
            ],
            n_max=[shape.n_passes for _, shape in wanted],
            width=wanted[0][1].width,
            n_nodes=[shape.n_nodes for _, shape in wanted],
            p_min=[shape.p_min for _, shape in wanted],
            sampling=[job.session.sampling for job in jobs],
            pos=[self._begins(job) for job in jobs],
            start=[job.session.start for job in jobs],
        )
        for row, job in enumerate(jobs):
            job.tree = DraftedTree.of_draft(drafts, row)
        return jobs

    def _add(self, job: Job) -> None:
        """Put what of a job's tree is worth checking among the tokens to be verified."""
        plan = job.session.tree_plan
        kept = plan.growth.keep(job.tree, job.price)
        if not job.draft and len(kept.path(job.hint.main_path()[:AGREE])) == AGREE:
            job.draft = job.hint  # it was doubted; but two say so, and one knows more
        hint = job.draft
        if not hint:
            job.draft, job.own = TokenTree(kept.tokens, kept.parents).head(job.n_most), set(range(len(kept)))
            return
        both = _hinted(job).merged(kept.following(hint.main_path()[: job.n_hinted])).balanced()
        places = both.likeliest(min(plan.growth.limit, job.n_most))
        # Tokens of the hint come first in `both`, in their places.
        job.own = {new for new, place in enumerate(places) if place >= len(hint)}
        found = both.take(places)
        job.draft = TokenTree(found.tokens, found.parents)

    def learn(self, job: Job, tokens: Sequence[int], seconds: float, draft_seconds: float) -> None:
        """See :meth:`OwnDraft.learn`."""
        plan = job.session.tree_plan
        if not job.shared:
            plan.growth.observe_pass(len(job.draft) + job.n_again, seconds - draft_seconds)
        if not job.tree:
            return
        n = job.n_hinted
        if tuple(tokens[:n]) == job.hint.main_path()[:n]:
            self._observe_chance(job, len(plan.growth.observe_truth(job.tree, tokens[n:])), len(tokens) - n)
            if n > 0 and len(tokens) > n and not job.shared:
                plan.observe_alone(len(tokens) - 1 - n, len(job.own), draft_seconds)
        if len(job.own) == len(job.draft) and not job.shared:
            plan.growth.observe_round(len(tokens), seconds)
            plan.observe_alone(len(tokens) - 1, len(job.draft), draft_seconds)


def _hinted(job: Job) -> DraftedTree:
    """What of a job's hint will be checked, with what its tokens are worth."""
    hint = job.draft
    return DraftedTree(hint.tokens, hint.parents, tuple(job.session.branches.shares(hint)))

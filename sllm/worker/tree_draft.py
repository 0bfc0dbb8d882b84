"""The worker's own drafts as trees, also beside what clients hint, where both memories branch."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree
from sllm.worker.own_draft import AGREE, OwnDraft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.draft.growth import Shape
    from sllm.worker.own_draft import Job

__all__ = ["TreeDraft"]


class TreeDraft(OwnDraft):
    """Drafts trees for the sessions of a scheduler, as :class:`OwnDraft` drafts chains.

    Beside a hint, a tree has its own branches from the end of the text on, where the hint's first token is
    doubtful, or goes on after its main path, where that is likely to hold.
    """

    def propose(self, jobs: Sequence[Job]) -> tuple[list[Job], float]:
        """See :meth:`OwnDraft.propose`; the jobs have ``tree`` now."""
        # 1. Where, and of what shape?
        wanted: dict[int, list[tuple[Job, Shape]]] = defaultdict(list)  # by width
        for job in jobs:
            session = job.session
            room = min(session.end, self.context.n_ctx_seq) - len(session.text) - 1
            if session.can_draft and room > 0 and self._begin_beside(job) and room > job.n_hinted:
                shape = session.tree_plan.growth.shape(room - job.n_hinted)
                wanted[shape.width].append((job, shape))
        if not wanted:
            return [], 0.0
        # 2. All of one width together.
        began = time.perf_counter()
        drafted: list[Job] = []
        for width, group in wanted.items():
            asked = time.perf_counter()
            made = self._each_or_all(group, self._draft_trees)
            passes = max((job.tree.n_passes for job in made), default=1)
            self._wait(asked, passes, len(made) * width)
            seconds = time.perf_counter() - asked
            for job in made:
                self._add(job, seconds)
            drafted += made
        return drafted, time.perf_counter() - began

    def _begin_beside(self, job: Job) -> bool:
        """Whether to draft for a job, after ``n_hinted`` tokens of its hint's main path."""
        job.n_hinted = 0
        plan, shown = job.session.tree_plan, job.draft
        if not shown:
            return plan.growth.begin()
        main = shown.main_path()
        hinted = _hinted(job)
        chances = hinted.chances()
        covered = sum(
            share for share, parent in zip(hinted.shares, hinted.parents, strict=True) if parent < 0
        )
        ends = len(shown) == len(job.hint) and max(main) < self.context.model.vocab.n_tokens
        where = plan.place(chances, covered, chances[shown.path(main)[-1]] if ends else 0.0)
        if where is None or not plan.growth.begin():
            return False
        job.n_hinted = len(main) if where == "end" else 0
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

    def _add(self, job: Job, seconds: float) -> None:
        """Put what of a job's tree is worth checking among the tokens to be verified."""
        plan = job.session.tree_plan
        plan.growth.observe_draft(job.tree, seconds)
        kept = plan.growth.keep(job.tree)
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
        plan.growth.observe_pass(len(job.draft) + job.n_again, seconds - draft_seconds)
        if not job.tree:
            return
        n = job.n_hinted
        if tuple(tokens[:n]) == job.hint.main_path()[:n]:
            plan.growth.observe_truth(job.tree, tokens[n:])
            if n > 0 and len(tokens) > n:
                plan.observe_alone(len(tokens) - 1 - n, len(job.own), draft_seconds)
        if len(job.own) == len(job.draft):
            plan.growth.observe_round(len(tokens), seconds)
            plan.observe_alone(len(tokens) - 1, len(job.draft), draft_seconds)


def _hinted(job: Job) -> DraftedTree:
    """What of a job's hint will be checked, with what its tokens are worth."""
    hint = job.draft
    return DraftedTree(hint.tokens, hint.parents, tuple(job.session.branches.shares(hint)))

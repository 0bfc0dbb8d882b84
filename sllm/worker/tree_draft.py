"""The worker's own drafts as trees, also beside what clients hint, where both memories branch."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from sllm.draft.growth import TreeGrowth, likeliest_first, n_worth_showing
from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree
from sllm.worker.own_draft import AGREE, OwnDraft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.worker.own_draft import Job

__all__ = ["TreeDraft"]


class TreeDraft(OwnDraft):
    """Drafts trees for the sessions of a scheduler, as :class:`OwnDraft` drafts chains.

    Beside a hint, a tree has its own branches from the end of the text on, where the hint's first token is
    doubtful, or goes on after its main path, where that is likely to hold.
    """

    WIDTHS = TreeGrowth.WIDTHS

    def _place(self, job: Job) -> float:
        """See :meth:`OwnDraft._place`."""
        job.n_hinted = 0
        if not job.draft:
            return 1.0
        at_root, at_end = self._chances_beside(job)
        if at_end >= at_root:
            job.n_hinted = len(job.draft.main_path())
        return max(at_root, at_end)

    def _n_passes(self, job: Job) -> int:
        return job.tree.n_passes

    def _observe_truth(self, job: Job, truth: Sequence[int]) -> int:
        return len(job.session.own_shares.observe(job.tree, truth))

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

    def _draft(self, jobs: list[Job]) -> list[Job]:
        before = [job.draft.main_path()[: job.n_hinted] for job in jobs]
        drafts = self._drafts(
            jobs,
            seq_ids=[job.slot.seq_id for job in jobs],
            tokens=[
                [*job.session.text[self._begins(job) :], *main]
                for job, main in zip(jobs, before, strict=True)
            ],
            n_max=[job.part.depth for job in jobs],
            width=jobs[0].width,
            n_nodes=[TreeGrowth.LIMIT] * len(jobs),
            p_min=[min(max(job.part.least, TreeGrowth.P_MIN), 0.8) for job in jobs],
            sampling=[job.session.sampling for job in jobs],
            pos=[self._begins(job) for job in jobs],
            start=[job.session.start for job in jobs],
        )
        for row, job in enumerate(jobs):
            job.tree = DraftedTree.of_draft(drafts, row)
            self._add(job)
        return jobs

    def _add(self, job: Job) -> None:
        """Put what of a job's tree is worth checking among the tokens to be verified."""
        chances, main = job.session.own_shares.chances(job.tree)
        order = likeliest_first(chances)[: TreeGrowth.LIMIT]
        n = n_worth_showing([(chances[i], main[i]) for i in order], repeat(job.part.row))
        kept = job.tree.take(order[:n])
        if not job.draft and len(kept.path(job.hint.main_path()[:AGREE])) == AGREE:
            job.draft = job.hint  # it was doubted; but two say so, and one knows more
        hint = job.draft
        if not hint:
            job.draft, job.own = TokenTree(kept.tokens, kept.parents).head(job.n_most), set(range(len(kept)))
            return
        both = _hinted(job).merged(kept.following(hint.main_path()[: job.n_hinted])).balanced()
        places = both.likeliest(min(TreeGrowth.LIMIT, job.n_most))
        # Tokens of the hint come first in `both`, in their places.
        job.own = {new for new, place in enumerate(places) if place >= len(hint)}
        found = both.take(places)
        job.draft = TokenTree(found.tokens, found.parents)


def _hinted(job: Job) -> DraftedTree:
    """What of a job's hint will be checked, with what its tokens are worth."""
    hint = job.draft
    return DraftedTree(hint.tokens, hint.parents, tuple(job.session.branches.shares(hint)))

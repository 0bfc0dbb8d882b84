"""The tree that a draft grows while its hints travel to a target that is a round trip away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.growth import Shape, Shares
from sllm.draft.tree import DraftedTree
from sllm.targets.tree import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TreeAhead"]


class TreeAhead:
    """What may follow the text, as far as the draft has come: what of it agrees with a commit stays.

    Behind a link trees are larger than where the target is near (:class:`~sllm.draft.growth.TreeGrowth`): a
    hint has to hold the target's path a round trip later. After a commit the draft begins a new tree at the
    end of the text, with as many passes as the target needs time for one, and then twice as many as long as
    nothing comes; meanwhile the rest of the old tree is what is hinted (benchmarks/RESULTS.md, "Trees").
    """

    WIDTH = 8
    """Tokens that one pass of the draft computes."""

    P_MIN = 0.02
    """Nothing is computed behind a token that is less likely."""

    DEEPEST = 16
    """Passes for one tree at most."""

    _LEAST = 3
    """Passes at first, however slow the draft is: fewer have hardly a branch that overtakes the target."""

    def __init__(self) -> None:
        self.tree = DraftedTree()
        self.version = 0
        """Grows with each tree that was taken."""
        self._n_passes = 0  # that the tree has got since the last commit
        self._asked = 0
        self._shares = Shares()

    def shape(self, room: int, pass_seconds: float, draft_seconds: float) -> Shape | None:
        """How to draft at the end of the text, which may get ``room`` tokens longer; None: the tree is as
        large as it gets.

        Args:
            room: positions.
            pass_seconds: of the target; 0: unknown.
            draft_seconds: of a pass of the draft; 0: unknown.

        """
        most = min(self.DEEPEST, room)
        if self._n_passes >= most:
            return None
        if self._n_passes:
            n = 2 * self._n_passes
        else:
            n = max(int(pass_seconds / draft_seconds) if draft_seconds > 0 else 0, self._LEAST)
        self._asked = min(n, most)
        return Shape(self._asked, self.WIDTH, MAX_NODES, self.P_MIN)

    def take(self, drafted: DraftedTree, since: Sequence[int]) -> bool:
        """The draft has made the tree that was asked for last; ``since`` was committed meanwhile.

        Returns whether any of it may still come.
        """
        rest = drafted.after(since)
        if not since:  # else it is from before the end of the text, and a new one begins
            complete = drafted.n_passes < self._asked
            self._n_passes = self.DEEPEST if complete else self._asked
        if not rest.tokens:
            return False
        self.tree = self.tree.merged(rest)
        self.version += 1
        return True

    def follow(self, tokens: Sequence[int]) -> int:
        """The text goes on with these; returns how many of them were on a path."""
        path = self._shares.observe(self.tree, tokens)
        self.tree = self.tree.after(tokens)
        self._n_passes = 0
        return len(path)

    def likeliest(self, n: int) -> DraftedTree:
        """The ``n`` tokens that are most likely to come, likeliest first."""
        tree = self.tree
        shares = tuple(
            self._shares.corrected(share, first)
            for share, first in zip(tree.shares, tree.firsts(), strict=True)
        )
        tree = DraftedTree(tree.tokens, tree.parents, shares)
        return tree.take(tree.likeliest(min(n, MAX_NODES)))

    def main_path(self) -> tuple[list[int], list[float]]:
        """The tokens that the draft itself would go on with, and their shares."""
        tree = self.tree
        tokens: list[int] = []
        shares: list[float] = []
        at = -1
        while at in tree.parents[at + 1 :]:
            at = tree.parents.index(at, at + 1)
            tokens.append(tree.tokens[at])
            shares.append(tree.shares[at])
        return tokens, shares

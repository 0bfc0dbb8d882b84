"""The tree that a draft grows while its hints travel to a target that is a round trip away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.growth import Shape, Shares
from sllm.draft.tree import DraftedTree
from sllm.engine.context import MOST_DRAFTED

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MOST_SHOWN", "TreeAhead"]


_MOST_KNOWN = 128
"""Tokens of a tree that the draft goes on from; as many as may be new find room beside them."""

MOST_SHOWN = 128
"""Tokens of a hint: more bring little that is still of use when it arrives, and cost bytes."""


class TreeAhead:
    """What may follow the text, as far as the draft has come: what of it agrees with a commit stays.

    Behind a link trees are larger than where the target is near (:class:`~sllm.draft.growth.TreeGrowth`): a
    hint has to hold the target's path a round trip later. The draft goes on from what is left of the tree
    after a commit, in steps of as many passes as take half the time of the target's (benchmarks/RESULTS.md,
    "Trees").
    """

    WIDTH = 8
    """Tokens that one pass of the draft computes."""

    P_MIN = 0.01
    """Nothing is computed behind a token that is less likely."""

    MOST_PASSES = 8
    """Of a step."""

    def __init__(self) -> None:
        self.tree = DraftedTree()
        self.version = 0
        """Grows with each tree that was taken."""
        self.was_cut = False
        """Whether the last hint could not hold all that is of use."""
        self._complete = False  # another step would bring nothing new
        self._shares = Shares()

    def shape(self, room: int, pass_seconds: float, draft_seconds: float) -> Shape | None:
        """How to draft at the end of the text, which may get ``room`` tokens longer; None: the tree is as
        large as it gets.

        Args:
            room: positions.
            pass_seconds: of the target; 0: unknown.
            draft_seconds: of a pass of the draft; 0: unknown.

        """
        if self._complete or room < 1:
            return None
        n = int(pass_seconds / (2 * draft_seconds)) if draft_seconds > 0 else 0
        return Shape(min(max(n, 1), self.MOST_PASSES), self.WIDTH, MOST_DRAFTED, self.P_MIN)

    def known(self) -> DraftedTree:
        """What of the tree the draft has to compute to go on: all tokens that something follows, and the
        likeliest ones at the ends of branches.
        """
        tree = self.tree
        inner = set(tree.parents)
        n_ends = self.WIDTH
        places: list[int] = []
        for place in tree.likeliest(len(tree)):
            if place not in inner:
                n_ends -= 1
                if n_ends < 0:
                    continue
            places.append(place)
        return tree.take(places[:_MOST_KNOWN])

    def take(self, drafted: DraftedTree, since: Sequence[int]) -> bool:
        """The draft has gone on from the tree; ``since`` was committed meanwhile.

        Returns whether any of it may still come.
        """
        rest = drafted.after(since)
        if rest.tokens:
            n_before = len(set(self.tree.parents))
            tree = rest.merged(self.tree)
            self.tree = tree.take(tree.likeliest(MOST_DRAFTED))
            self.version += 1
            n_inner = len(set(self.tree.parents))
            # Each step that brings something computes what nothing followed before.
            self._complete = not since and (n_inner <= n_before or n_inner >= _MOST_KNOWN)
        return bool(rest.tokens)

    def follow(self, tokens: Sequence[int]) -> int:
        """The text goes on with these; returns how many of them were on a path."""
        path = self._shares.observe(self.tree, tokens)
        self.tree = self.tree.after(tokens)
        self._complete = False
        return len(path)

    def hint(self, n: int, n_passed: int) -> DraftedTree:
        """What to tell the target, at most ``n`` tokens, likeliest first.

        Not those that it will have passed when it hears of them (``n_passed`` tokens), unless one that
        may come later follows them.
        """
        tree = self.tree
        shares = tuple(
            self._shares.corrected(share, first)
            for share, first in zip(tree.shares, tree.firsts(), strict=True)
        )
        tree = DraftedTree(tree.tokens, tree.parents, shares)
        of_use = [depth >= n_passed for depth in tree.depths()]
        for place in range(len(tree) - 1, -1, -1):
            if of_use[place] and tree.parents[place] >= 0:
                of_use[tree.parents[place]] = True
        places = [place for place in tree.likeliest(len(tree)) if of_use[place]]
        n = min(n, MOST_SHOWN)
        self.was_cut = len(places) > n
        return tree.take(places[:n])

    def main_path(self) -> tuple[list[int], list[float]]:
        """The tokens that the draft itself would go on with, and their shares."""
        places = self.tree.main_places()
        return [self.tree.tokens[i] for i in places], [self.tree.shares[i] for i in places]

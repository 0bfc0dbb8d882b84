"""A drafter's proposal for targets that can check several continuations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine.tree import TokenPaths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.engine.jobs import Draft

__all__ = ["DraftedTree"]


@dataclass(frozen=True)
class DraftedTree(TokenPaths):
    """Drafted tokens, each with its parent and its probability after the parent.

    Of several tokens that follow the same one, the first is the drafter's own choice.

    Attributes:
        shares: for each token the drafter's estimate of the probability that it follows once the text has
            reached its parent.
        n_passes: passes of the drafter's model that were needed.

    Examples:
        >>> tree = DraftedTree((5, 6, 7, 8), (-1, 0, 0, 2), (0.5, 0.75, 0.25, 1.0))
        >>> tree.chances()
        [0.5, 0.375, 0.125, 0.125]
        >>> tree.after([5]).tokens, tree.after([5, 7]).tokens, tree.after([6]).tokens
        ((6, 7, 8), (8,), ())

    """

    shares: tuple[float, ...] = ()
    n_passes: int = 0

    @classmethod
    def chain(cls, tokens: Sequence[int], shares: Sequence[float], n_passes: int = 0) -> DraftedTree:
        """A tree of one path."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(shares), n_passes)

    @classmethod
    def of_draft(cls, draft: Draft, row: int) -> DraftedTree:
        """The tree that a model has drafted for one sequence."""
        if draft.parents is None or draft.chances is None:
            raise ValueError("the draft is a chain")
        n = int(draft.lengths[row])
        parents, chances = draft.parents[row, :n].tolist(), draft.chances[row, :n].tolist()
        shares = [
            chance if parent < 0 else chance / chances[parent] if chances[parent] > 0 else 0.0
            for chance, parent in zip(chances, parents, strict=True)
        ]
        return cls(tuple(draft.tokens[row, :n].tolist()), tuple(parents), tuple(shares), draft.n_passes)

    def chances(self) -> list[float]:
        """For each token the probability that the text reaches it: the product of the shares along its
        path.
        """
        chances: list[float] = []
        for share, parent in zip(self.shares, self.parents, strict=True):
            chances.append(share if parent < 0 else share * chances[parent])
        return chances

    def firsts(self) -> list[bool]:
        """Which tokens are the drafter's own choice at their position."""
        seen: set[int] = set()
        firsts: list[bool] = []
        for parent in self.parents:
            firsts.append(parent not in seen)
            seen.add(parent)
        return firsts

    def way_to(self, place: int) -> list[int]:
        """The places of the tokens on the way to the one in ``place``, itself the last."""
        way: list[int] = []
        while place >= 0:
            way.append(place)
            place = self.parents[place]
        return way[::-1]

    def take(self, places: Sequence[int], root: int = -1) -> DraftedTree:
        """The tokens in these places, in this order; of each its parent, or ``root``, comes before it."""
        return DraftedTree(
            tuple([self.tokens[i] for i in places]),
            self.parents_of(places, root),
            tuple([self.shares[i] for i in places]),
            self.n_passes,
        )

    def after(self, committed: Sequence[int]) -> DraftedTree:
        """The rest of the tree once the text has continued with ``committed``; empty if that is not on a
        path.
        """
        path = self.path(committed)
        if len(path) < len(committed):
            return DraftedTree()
        if not path:
            return self
        return self.take(self.below(path[-1]), path[-1])

    def following(self, path: Sequence[int]) -> DraftedTree:
        """The same tree after a ``path``, whose tokens are certain.

        Examples:
            >>> DraftedTree.chain([7, 8], [0.5, 0.5]).following([5, 6]).chances()
            [1.0, 1.0, 0.5, 0.25]

        """
        n = len(path)
        return DraftedTree(
            (*path, *self.tokens),
            (*range(-1, n - 1), *(parent + n for parent in self.parents)),
            (*[1.0] * n, *self.shares),
            self.n_passes,
        )

    def balanced(self) -> DraftedTree:
        """The same tokens, with smaller shares where those after one token add up to more than 1."""
        totals: dict[int, float] = {}
        for share, parent in zip(self.shares, self.parents, strict=True):
            totals[parent] = totals.get(parent, 0.0) + share
        shares = [
            share / max(totals[parent], 1.0) for share, parent in zip(self.shares, self.parents, strict=True)
        ]
        return DraftedTree(self.tokens, self.parents, tuple(shares), self.n_passes)

    def likeliest(self, n: int) -> list[int]:
        """The places of the ``n`` likeliest tokens, likeliest first; none comes before the one it follows."""
        chances = self.chances()
        return sorted(range(len(chances)), key=lambda i: (-chances[i], i))[: max(n, 0)]

    def merged(self, other: DraftedTree) -> DraftedTree:
        """Both trees in one, with each common beginning once, at the larger of its two shares."""
        tokens, parents, shares = list(self.tokens), list(self.parents), list(self.shares)
        places = {(parent, token): i for i, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
        here = {-1: -1}  # where the other's tokens are now
        for i, (token, parent, share) in enumerate(
            zip(other.tokens, other.parents, other.shares, strict=True)
        ):
            at = places.setdefault((here[parent], token), len(tokens))
            here[i] = at
            if at < len(tokens):
                shares[at] = max(shares[at], share)
                continue
            tokens.append(token)
            parents.append(here[parent])
            shares.append(share)
        return DraftedTree(tuple(tokens), tuple(parents), tuple(shares), self.n_passes + other.n_passes)

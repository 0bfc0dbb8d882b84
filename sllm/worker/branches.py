"""How likely the branches of a drafted tree are, learnt while a text is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.draft.streak import HintTrust
    from sllm.targets.tree import TokenTree

__all__ = ["Branches"]

_PRIOR = (0.4, 0.25, 0.15)
"""The chance that the first runner-up is right where what came before it in the order was not, of the second,
and of each later one (benchmarks/RESULTS.md, "Trees").
"""

_WORTH = 4.0
"""Tokens that the beginning is worth."""

_KEEP = 0.98
"""What is left of the past with each token."""


class Branches:
    """The chance that the target takes the way to a token of a tree, where nothing but the tree is known: by
    how often the first, the second, ... token after another one was right when it came to them.

    Args:
        first: says how likely the first ones are, and is told of each.

    """

    def __init__(self, first: HintTrust) -> None:
        self._first = first
        self._right = [_WORTH * chance for chance in _PRIOR]
        self._seen = [_WORTH] * len(_PRIOR)

    def worths(self, tree: TokenTree) -> list[float]:
        """For each token of a tree the chance that it is accepted. A token that is likelier than those before
        it, which are checked whenever it is, shares its chance with them: what is cut is cut at the end.
        """
        if tree.is_chain:
            return [self._first.chance**n for n in range(1, len(tree) + 1)]
        chances: list[float] = []
        for share, parent in zip(self.shares(tree), tree.parents, strict=True):
            chances.append(share if parent < 0 else share * chances[parent])
        return _falling(chances)

    def shares(self, tree: TokenTree) -> list[float]:
        """For each token of a tree the chance that the text goes on with it, where it has come to the one
        before.
        """
        first = self._first.chance
        shares = [right / seen for right, seen in zip(self._right, self._seen, strict=True)]
        # Of each parent the chance that all of its tokens so far are wrong, and how many they are.
        left: dict[int, tuple[float, int]] = {}
        found: list[float] = []
        for parent in tree.parents:
            missed, n = left.get(parent, (1.0, 0))
            share = first if n == 0 else shares[min(n, len(shares)) - 1]
            left[parent] = (missed * (1 - share), n + 1)
            found.append(missed * share)
        return found

    def observe_truth(self, tree: TokenTree, truth: Sequence[int]) -> None:
        """In the place of ``tree`` came the tokens ``truth``; those that were not checked count as well."""
        at = -1
        for true in truth:
            children = [i for i in range(at + 1, len(tree)) if tree.parents[i] == at]
            at = -2
            for n, child in enumerate(children):
                right = tree.tokens[child] == true
                if n == 0:
                    self._first.observe(right)
                else:
                    rank = min(n, len(_PRIOR)) - 1
                    self._right[rank] = self._right[rank] * _KEEP + right
                    self._seen[rank] = self._seen[rank] * _KEEP + 1
                if right:
                    at = child
                    break
            if at == -2:
                return


def _falling(values: Sequence[float]) -> list[float]:
    """``values``, each as it is or as the mean of some neighbours, so that they fall (pool adjacent
    violators).

    Examples:
        >>> _falling([0.5, 0.125, 0.375, 0.25])
        [0.5, 0.25, 0.25, 0.25]

    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, n = value, 1
        while pools and pools[-1][0] * n < total * pools[-1][1]:
            before, n_before = pools.pop()
            total, n = total + before, n + n_before
        pools.append((total, n))
    return [total / n for total, n in pools for _ in range(n)]

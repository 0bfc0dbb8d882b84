"""The shape of a tree of tokens, with which a text may go on in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine._ffi import lib

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_NODES", "TokenPaths", "is_chain"]

MAX_NODES: int = lib.SLLM_TREE_NODES
"""A tree that is more than a chain has at most so many tokens where it is computed."""


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each token follows the one before it.

    Examples:
        >>> is_chain([-1, 0, 1]), is_chain([-1, 0, 0]), is_chain([])
        (True, False, True)

    """
    return all(parent == i - 1 for i, parent in enumerate(parents))


@dataclass(frozen=True)
class TokenPaths:
    """Tokens that may follow a text, each with the one that it comes after; nothing of that is checked.

    The *main path* follows each token's first child: what is verified where a memory cannot branch.

    Attributes:
        tokens: the token ids.
        parents: for each the place in ``tokens`` of the one that it follows, always an earlier place; -1: it
            comes right after the text. A chain has -1, 0, 1, ...

    Examples:
        >>> tree = TokenPaths((5, 6, 7, 8), (-1, 0, 0, 2))
        >>> tree.depths(), tree.path([5, 7, 9]), tree.main_places(), tree.n_beside([5, 7, 8])
        ((0, 1, 1, 2), [0, 2], [0, 1], 2)

    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether there is one path alone."""
        return is_chain(self.parents)

    def depths(self) -> tuple[int, ...]:
        """For each token how many come on its way before it."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def child(self, parent: int, token: int) -> int:
        """The place of ``token`` after the one in place ``parent``; -1: it is not there."""
        for i in range(parent + 1, len(self.tokens)):
            if self.tokens[i] == token and self.parents[i] == parent:
                return i
        return -1

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The places of ``tokens``, one after the other from the root on, as far as they are here."""
        places: list[int] = []
        at = -1
        for token in tokens:
            at = self.child(at, token)
            if at < 0:
                break
            places.append(at)
        return places

    def main_places(self) -> list[int]:
        """The places of the tokens on the main path."""
        if self.is_chain:
            return list(range(len(self.tokens)))
        places: list[int] = []
        at = -1
        while at in self.parents[at + 1 :]:
            at = self.parents.index(at, at + 1)
            places.append(at)
        return places

    def main_path(self) -> tuple[int, ...]:
        """The tokens on the main path."""
        return self.tokens if self.is_chain else tuple([self.tokens[i] for i in self.main_places()])

    def n_beside(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, a way from the root, are not on the main path."""
        main = self.main_path()
        n = 0
        while n < min(len(tokens), len(main)) and tokens[n] == main[n]:
            n += 1
        return len(tokens) - n

    def below(self, place: int) -> list[int]:
        """The places of the tokens that follow the one in ``place``, directly or not, in their order."""
        found = {place}
        for i in range(place + 1, len(self.tokens)):
            if self.parents[i] in found:
                found.add(i)
        return sorted(found - {place})

    def parents_of(self, places: Sequence[int], root: int = -1) -> tuple[int, ...]:
        """The parents in a tree of the tokens in these places alone, in this order; of each its parent, or
        ``root``, comes before it.
        """
        new = {root: -1}
        for place in places:
            new[place] = len(new) - 1
        return tuple([new[self.parents[i]] for i in places])

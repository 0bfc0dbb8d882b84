"""Several ways in which a text may go on: what a hint or a draft says where it is more than a chain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_NODES", "TokenTree", "is_chain"]

MAX_NODES = 256
"""A tree that is more than a chain has at most so many tokens (``SLLM_TREE_NODES``)."""


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each token follows the one before it.

    Examples:
        >>> is_chain([-1, 0, 1]), is_chain([-1, 0, 0]), is_chain([])
        (True, False, True)

    """
    return tuple(parents) == tuple(range(-1, len(parents) - 1))


@dataclass(frozen=True)
class TokenTree:
    """Tokens that may follow a text, each with the one that it comes after.

    The *main path* follows each token's first child: what is verified where a memory cannot branch. A draft's
    tokens are in the order of their chances, so that what is left of a tree when it is cut is the best of it.

    Attributes:
        tokens: the token ids.
        parents: for each the place in ``tokens`` of the one that it follows, always an earlier place; -1: it
            comes right after the text. A chain has -1, 0, 1, ...

    Raises:
        ValueError: lengths that differ, a parent that does not come before its child, two equal tokens after
            one parent, or more than :data:`MAX_NODES` tokens that are no chain.

    Examples:
        >>> tree = TokenTree((5, 6, 7, 8), (-1, 0, 0, 2))
        >>> tree.after([5]), tree.after([5, 7, 8]), tree.after([6])
        (TokenTree(tokens=(6, 7, 8), parents=(-1, -1, 1)), TokenTree(tokens=(), parents=()), None)
        >>> tree.main_path()
        (5, 6)

    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"a tree has {len(self.tokens)} tokens and {len(self.parents)} parents")
        if is_chain(self.parents):
            return
        if len(self.tokens) > MAX_NODES:
            raise ValueError(f"a tree has {len(self.tokens)} tokens, expected at most {MAX_NODES}")
        seen: set[tuple[int, int]] = set()
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if not -1 <= parent < i:
                raise ValueError(f"token {i} of a tree has the parent {parent}, expected -1 to {i - 1}")
            if (parent, token) in seen:
                raise ValueError(f"token {i} of a tree is {token}, like another one after the same parent")
            seen.add((parent, token))

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """A tree of one path."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    @classmethod
    def of(cls, tokens: Sequence[int], parents: Sequence[int] | None) -> TokenTree:
        """The tree of these tokens; without ``parents``, a chain. Raises as the class does."""
        return cls.chain(tokens) if parents is None else cls(tuple(tokens), tuple(parents))

    @property
    def is_chain(self) -> bool:
        """Whether there is one path alone."""
        return is_chain(self.parents)

    def __len__(self) -> int:
        return len(self.tokens)

    def head(self, n: int) -> TokenTree:
        """The first ``n`` tokens."""
        if n >= len(self.tokens):
            return self
        return TokenTree(self.tokens[: max(n, 0)], self.parents[: max(n, 0)])

    def usable(self, n_vocab: int, n_deep: int, n_tokens: int) -> TokenTree:
        """What can be verified: tokens of the vocabulary, with none on their way that is not, at most
        ``n_deep`` one after the other, and of those the first ``n_tokens``.

        Examples:
            >>> TokenTree((5, 99, 7, 8), (-1, 0, 0, 1)).usable(10, 8, 8)
            TokenTree(tokens=(5, 7), parents=(-1, 0))

        """
        n_tokens = max(n_tokens, 0)
        if self.is_chain:
            tokens = self.tokens[: max(min(n_deep, n_tokens), 0)]
            if not all(0 <= token < n_vocab for token in tokens):
                tokens = tuple(takewhile(lambda token: 0 <= token < n_vocab, tokens))
            return TokenTree.chain(tokens)
        depths: dict[int, int] = {-1: 0}
        kept: list[int] = []
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent in depths and 0 <= token < n_vocab and depths[parent] < n_deep and len(kept) < n_tokens:
                depths[i] = depths[parent] + 1
                kept.append(i)
        return self._of(kept, -1)

    def depths(self) -> tuple[int, ...]:
        """For each token how many come on its way before it.

        Examples:
            >>> TokenTree((5, 6, 7, 8), (-1, 0, 0, 2)).depths()
            (0, 1, 1, 2)

        """
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def _of(self, kept: Sequence[int], root: int) -> TokenTree:
        """A tree of the tokens in these places, in order; of each its parent or ``root`` is among them."""
        places = {root: -1}
        for i in kept:
            places[i] = len(places) - 1
        return TokenTree(tuple(self.tokens[i] for i in kept), tuple(places[self.parents[i]] for i in kept))

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The places of ``tokens``, one after the other from the root on, as far as they are here.

        Examples:
            >>> TokenTree((5, 6, 7, 8), (-1, 0, 0, 2)).path([5, 7, 9])
            [0, 2]

        """
        places: list[int] = []
        at = -1
        for token in tokens:
            after = range(at + 1, len(self.tokens))
            at = next((i for i in after if self.parents[i] == at and self.tokens[i] == token), -2)
            if at == -2:
                break
            places.append(at)
        return places

    def n_beside(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, a way from the root, are not on the main path.

        Examples:
            >>> TokenTree((5, 6, 7, 8), (-1, 0, 0, 2)).n_beside([5, 7, 8])
            2

        """
        return len(tokens) - next(
            (n for n, (a, b) in enumerate(zip(tokens, self.main_path(), strict=False)) if a != b),
            min(len(tokens), len(self.main_path())),
        )

    def main_path(self) -> tuple[int, ...]:
        """The tokens of the path that follows each token's first child."""
        if self.is_chain:
            return self.tokens
        path: list[int] = []
        at = -1
        while at in self.parents[at + 1 :]:
            at = self.parents.index(at, at + 1)
            path.append(self.tokens[at])
        return tuple(path)

    def after(self, committed: Sequence[int]) -> TokenTree | None:
        """What may follow once the text went on with ``committed``; None where that is not on a path."""
        if self.is_chain:
            n = len(committed)
            return TokenTree.chain(self.tokens[n:]) if self.tokens[:n] == tuple(committed) else None
        way = self.path(committed)
        if len(way) < len(committed):
            return None
        if not way:
            return self
        at = way[-1]
        below = {at}
        for i in range(at + 1, len(self.tokens)):
            if self.parents[i] in below:
                below.add(i)
        return self._of(sorted(below - {at}), at)

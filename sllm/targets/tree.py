"""Several ways in which a text may go on: what a hint or a draft says where it is more than a chain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from sllm.engine.tree import MAX_NODES, TokenPaths

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TokenTree"]


@dataclass(frozen=True)
class TokenTree(TokenPaths):
    """:class:`~sllm.engine.tree.TokenPaths` that were checked: a tree that can be verified.

    Raises:
        ValueError: lengths that differ, a parent that does not come before its child, two equal tokens after
            one parent, or more than :data:`~sllm.engine.tree.MAX_NODES` tokens that are no chain.

    Examples:
        >>> tree = TokenTree((5, 6, 7, 8), (-1, 0, 0, 2))
        >>> tree.after([5]), tree.after([5, 7, 8]), tree.after([6])
        (TokenTree(tokens=(6, 7, 8), parents=(-1, -1, 1)), TokenTree(tokens=(), parents=()), None)
        >>> tree.main_path()
        (5, 6)

    """

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"a tree has {len(self.tokens)} tokens and {len(self.parents)} parents")
        if self.is_chain:
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
        return self._of(kept)

    def _of(self, kept: Sequence[int], root: int = -1) -> TokenTree:
        """A tree of the tokens in these places: see :meth:`parents_of`."""
        return TokenTree(tuple([self.tokens[i] for i in kept]), self.parents_of(kept, root))

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
        return self._of(self.below(way[-1]), way[-1])

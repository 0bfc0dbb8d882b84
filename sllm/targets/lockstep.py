"""Generations whose caller waits for every pass: hint, then take what the pass commits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sllm.errors import CancelledError, ClosedError
from sllm.targets.base import Commit
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from sllm.engine.vocab import Vocab

__all__ = ["LockstepGeneration"]


class LockstepGeneration:
    """Base of generations whose caller waits for every pass; see :class:`~sllm.targets.base.Generation`.

    Args:
        vocab: the target's.
        prompt: token ids.
        max_tokens: at most so many; None: until the model ends or the context is full.
        n_ctx: positions that the target has for the text.
        max_chain: drafted tokens that one pass can check.
        can_branch: whether it can check those of several branches.

    Attributes:
        max_chain, can_branch: as given.
        seq_id: the sequence of the target's context that the text is in.
        own_pace: whether tokens without a hint come at a pace of their own, from an engine that goes on by
            itself, so that what they take says nothing about a pass that checks a hint.

    """

    seq_id = 0
    own_pace = False

    def __init__(
        self,
        vocab: Vocab,
        prompt: list[int],
        max_tokens: int | None,
        n_ctx: int,
        max_chain: int,
        *,
        can_branch: bool = False,
    ) -> None:
        self._vocab = vocab
        self._text = prompt
        self._start = len(prompt)
        self._requested_end = None if max_tokens is None else self._start + max_tokens
        self._end = n_ctx if self._requested_end is None else min(self._requested_end, n_ctx)
        self._n_ctx = n_ctx
        self.max_chain = max_chain
        self.can_branch = can_branch
        self._hint: tuple[int, TokenTree] = (0, TokenTree())
        self._cancelled = False
        self.closed = False
        self.finish_reason: str | None = None
        self._check_end()

    def _verify(self, tree: TokenTree) -> tuple[tuple[int, ...], int]:
        """One pass: the tokens that follow the text, and how many of them are accepted ones of ``tree``,
        which is a chain where :attr:`can_branch` is false.
        """
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether the next commit is there already, so that a draft for it would be in vain."""
        return False

    def _check_end(self) -> None:
        if len(self._text) >= self._end:
            self.finish_reason = "length" if self._end == self._requested_end else "context"

    def __iter__(self) -> Self:
        return self

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`."""
        tree = TokenTree.of(tokens, parents)
        self._hint = (pos, tree if self.can_branch else TokenTree.chain(tree.main_path()))

    def _valid_hint(self) -> TokenTree:
        """The hinted tokens after the committed text, if the hint agrees with that."""
        pos, tree = self._hint
        if not tree:
            return tree
        self._hint = (0, TokenTree())
        n_text = len(self._text)
        rest = tree.after(self._text[pos:]) if 0 <= pos <= n_text else None
        if rest is None:
            return TokenTree()
        # Every branch takes room in memory, also where their tokens are for the same position.
        n_tokens = min(self.max_chain, self._n_ctx - n_text)
        return rest.usable(self._vocab.n_tokens, self._end - n_text - 1, n_tokens)

    def __next__(self) -> Commit:
        if self.closed:
            raise ClosedError("the generation is closed")
        if self._cancelled:
            raise CancelledError("the generation was cancelled")
        if self.finish_reason is not None:
            raise StopIteration
        pos = len(self._text)
        tree = TokenTree() if self.ready else self._valid_hint()
        began = time.perf_counter()
        tokens, n_accepted = self._verify(tree)
        seconds = time.perf_counter() - began
        self._text.extend(tokens)
        if self._vocab.is_eog(tokens[-1]):
            self.finish_reason = "eog"
        else:
            self._check_end()
        return Commit(pos, tokens, n_accepted, len(tree), seconds)

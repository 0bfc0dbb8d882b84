"""Generations whose caller waits for every pass: hint, then take what the pass commits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from sllm.errors import CancelledError, ClosedError
from sllm.targets.base import Commit
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from sllm.engine.vocab import Vocab

__all__ = ["LockstepGeneration", "Verified"]


class Verified(NamedTuple):
    """What one pass has brought.

    Attributes:
        tokens: that follow the text.
        n_accepted: how many of them, from the first on, had been hinted.
        n_verified: hinted tokens that it checked.
        since: when it began (``time.perf_counter()``), if before it was asked for.

    """

    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    since: float | None = None


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
        max_hint: tokens of a hint that can be of use; more than one pass can check where several passes can
            be on their way to the target.
        seq_id: the sequence of the target's context that the text is in.
        n_shared: tokens of the prompt that were in memory.
        own_pace: whether tokens without a hint come at a pace of their own, from an engine that goes on by
            itself, so that what they take says nothing about a pass that checks a hint.

    """

    seq_id = 0
    n_shared = 0
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
        self.max_chain = self.max_hint = max_chain
        self.can_branch = can_branch
        self._hint: tuple[int, TokenTree] = (0, TokenTree())
        self._n_first: int | None = None
        self._cancelled = False
        self.closed = False
        self.finish_reason: str | None = None
        self._check_end()

    def _verify(self, tree: TokenTree) -> Verified:
        """One pass over ``tree``, which is a chain where :attr:`can_branch` is false."""
        raise NotImplementedError

    @property
    def under_way(self) -> bool:
        """Whether the target has been sent something that it has not answered yet."""
        return False

    def push(self) -> float:
        """Let what is hinted go ahead to a target that is far away, without waiting for what it makes of it.

        Returns for how many seconds nothing is to be expected from there: 0 where the target is here.
        """
        return 0.0

    @property
    def ready(self) -> bool:
        """Whether the next commit is there already, so that a draft for it would be in vain."""
        return False

    def _check_end(self) -> None:
        if len(self._text) >= self._end:
            self.finish_reason = "length" if self._end == self._requested_end else "context"

    def __iter__(self) -> Self:
        return self

    def hint(
        self,
        pos: int,
        tokens: Sequence[int],
        parents: Sequence[int] | None = None,
        *,
        n_first: int | None = None,
    ) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`; ``n_first``: a target to which more can be sent
        before it has answered is to check only so many tokens first, and the others behind them.
        """
        tree = TokenTree.of(tokens, parents)
        self._n_first = n_first
        self._hint = (pos, tree if self.can_branch else TokenTree.chain(tree.main_path()))

    def _valid_hint(self) -> TokenTree:
        """The hinted tokens after the committed text, if the hint agrees with that."""
        pos, tree = self._hint
        if not tree:
            return tree
        n_text = len(self._text)
        rest = tree.after(self._text[pos:]) if 0 <= pos <= n_text else None
        if rest is None:
            return TokenTree()
        # Every branch takes room in memory, also where their tokens are for the same position.
        n_tokens = min(self.max_hint, self._n_ctx - n_text)
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
        self._hint = (0, TokenTree())
        began = time.perf_counter()
        tokens, n_accepted, n_verified, since = self._verify(tree)
        seconds = time.perf_counter() - (began if since is None else since)
        self._text.extend(tokens)
        if self._vocab.is_eog(tokens[-1]):
            self.finish_reason = "eog"
        else:
            self._check_end()
        return Commit(pos, tokens, n_accepted, n_verified, seconds)

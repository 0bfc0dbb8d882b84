"""Generations whose caller waits for every pass: hint, then take what the pass commits."""

from __future__ import annotations

import time
from itertools import takewhile
from typing import TYPE_CHECKING

from sllm.errors import CancelledError, ClosedError
from sllm.targets.base import Commit

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

    Attributes:
        max_chain: as given.
        seq_id: the sequence of the target's context that the text is in.

    """

    seq_id = 0

    def __init__(
        self, vocab: Vocab, prompt: list[int], max_tokens: int | None, n_ctx: int, max_chain: int
    ) -> None:
        self._vocab = vocab
        self._text = prompt
        self._start = len(prompt)
        self._requested_end = None if max_tokens is None else self._start + max_tokens
        self._end = n_ctx if self._requested_end is None else min(self._requested_end, n_ctx)
        self.max_chain = max_chain
        self._hint: tuple[int, list[int]] = (0, [])
        self._cancelled = False
        self.closed = False
        self.finish_reason: str | None = None
        self._check_end()

    def _verify(self, chain: list[int]) -> tuple[tuple[int, ...], int]:
        """One pass: the tokens that follow the text, and how many of them are accepted ones of ``chain``."""
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

    def hint(self, pos: int, tokens: Sequence[int]) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`."""
        self._hint = (pos, list(tokens))

    def _valid_hint(self) -> list[int]:
        """The hinted tokens after the committed text, if the hint agrees with that."""
        pos, tokens = self._hint
        if not tokens:
            return []
        self._hint = (0, [])
        known = len(self._text) - pos
        if pos < 0 or known < 0 or tokens[:known] != self._text[pos:]:
            return []
        room = min(self._end - len(self._text) - 1, self.max_chain)
        n_tokens = self._vocab.n_tokens
        valid = takewhile(lambda token: 0 <= token < n_tokens, tokens[known : known + max(room, 0)])
        return list(valid)

    def __next__(self) -> Commit:
        if self.closed:
            raise ClosedError("the generation is closed")
        if self._cancelled:
            raise CancelledError("the generation was cancelled")
        if self.finish_reason is not None:
            raise StopIteration
        pos = len(self._text)
        chain = [] if self.ready else self._valid_hint()
        began = time.perf_counter()
        tokens, n_accepted = self._verify(chain)
        seconds = time.perf_counter() - began
        self._text.extend(tokens)
        if self._vocab.is_eog(tokens[-1]):
            self.finish_reason = "eog"
        else:
            self._check_end()
        return Commit(pos, tokens, n_accepted, len(chain), seconds)

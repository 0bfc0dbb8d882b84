"""A target that writes only as many tokens as a test lets it, whatever the machine is doing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from sllm.errors import CancelledError
from sllm.targets.lockstep import LockstepGeneration, Verified

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    import sllm
    from sllm.targets.tree import TokenTree

__all__ = ["HeldTarget"]


class HeldTarget:
    """A target for any number of texts, each of them ``text`` over and over.

    Args:
        model: whose vocabulary and chat template it has.
        text: what it writes.
        fails: called before each token, with the number of those that the text has already; may raise.

    Attributes:
        opened, ended: how many texts were opened, and how many of them are closed again.
        cancelled: is set where a text is cancelled that waits for its next token.

    """

    def __init__(self, model: sllm.Model, text: str, fails: Callable[[int], object] | None = None) -> None:
        self.vocab, self.chat_template, self.chat = model.vocab, model.chat_template, model.chat
        self.tokens = model.vocab.encode(text).tolist()
        self.fails = fails or (lambda _n: None)
        self.cancelled = threading.Event()
        self.opened = self.ended = 0
        self._allowed = threading.Semaphore(0)

    def let(self, n: int) -> None:
        """Let so many more tokens be written, in whichever texts."""
        self._allowed.release(n)

    def take(self, generation: _HeldGeneration) -> None:
        """Wait for leave to write a token."""
        while not self._allowed.acquire(timeout=0.01):
            if generation.is_cancelled:
                self.cancelled.set()
                raise CancelledError("the text was cancelled")

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: sllm.SamplingParams, max_tokens: int | None
    ) -> Any:
        self.opened += 1
        return _HeldGeneration(self, tokens.tolist(), max_tokens)

    def close(self) -> None:
        """Nothing is held."""


class _HeldGeneration(LockstepGeneration):
    def __init__(self, target: HeldTarget, prompt: list[int], max_tokens: int | None) -> None:
        super().__init__(target.vocab, prompt, max_tokens, 1 << 20, 1)
        self._target = target

    def _verify(self, tree: TokenTree) -> Verified:
        n = len(self._text) - self._start
        self._target.fails(n)
        self._target.take(self)
        return Verified((self._target.tokens[n % len(self._target.tokens)],), 0, 0)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        if not self.closed:
            self._target.ended += 1
        self.closed = True

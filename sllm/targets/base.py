"""The one interface of every source of truth: a local model, a remote worker, a model split over two
machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from numpy import int32

    from sllm.model import Vocab
    from sllm.sampling import SamplingParams

__all__ = ["Commit", "Generation", "Target"]


@dataclass(frozen=True)
class Commit:
    """Tokens that are now part of the text.

    Attributes:
        pos: the absolute position of the first one (the prompt's tokens are 0 .. n-1).
        tokens: at least one token id.
        n_accepted: how many of them, from the first on, had been hinted.
        n_verified: how many hinted tokens the pass checked, accepted or not.
        seconds: how long the pass took.

    """

    pos: int
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    seconds: float


class Generation(Protocol):
    """One text on its way, made by :meth:`Target.open`. All but :meth:`cancel` belong to one thread."""

    finish_reason: str | None
    """None while it goes on; then ``"eog"`` (the model ended it), ``"length"`` (``max_tokens``) or
    ``"context"`` (full)."""

    def __next__(self) -> Commit:
        """The next commit; StopIteration behind the last. Blocks while the target computes."""

    def hint(self, pos: int, tokens: Sequence[int]) -> None:
        """Say what probably comes at ``pos``: the whole unconfirmed chain. It replaces every earlier hint.

        A hint changes when tokens come and never which. It is compared with what is committed by now; where
        it disagrees it is dropped.
        """

    def cancel(self) -> None:
        """End the generation, from any thread; a blocked ``__next__`` raises CancelledError."""

    def close(self) -> None:
        """Let go of what the generation holds."""


@runtime_checkable
class Target(Protocol):
    """What decides a text: a pure function of its weights, the prompt's tokens and the sampling
    parameters.
    """

    @property
    def vocab(self) -> Vocab:
        """The vocabulary, which a draft must share."""

    def open(
        self, tokens: npt.NDArray[int32], sampling: SamplingParams, max_tokens: int | None
    ) -> Generation:
        """Start a text behind ``tokens``, int32 (n,), n >= 1.

        Raises:
            ContextFullError: the prompt does not fit.
            BusyError: the target serves no more generations at once.

        """

    def close(self) -> None:
        """Free what the target holds."""

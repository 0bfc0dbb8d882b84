"""How likely a client's hints are to be right now, by what became of its last ones."""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING

from sllm.draft.confidence import Confidence

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HintTrust"]

_STREAKS = (-5, -2, 0, 1, 4, 12)
_PROBS = (0.05, 0.2, 0.4, 0.6, 0.75, 0.9, 0.97)
"""What stands for the draft's probability of a hinted token, of which hints say nothing, after that many
tokens that held in a row (below 0: hints in a row that were wrong). Where a client quotes what only it knows,
its hints are right for a whole passage and then wrong for a while.
"""


class HintTrust:
    """The chance that a hinted token holds, learnt for each session.

    Examples:
        >>> trust = HintTrust()
        >>> doubtful = trust.chance
        >>> _ = trust.observe_truth([1, 2, 3, 4], [1, 2, 3, 4, 5])
        >>> trust.chance > doubtful
        True

    """

    def __init__(self) -> None:
        self._confidence = Confidence()
        self._streak = 0

    @property
    def chance(self) -> float:
        """That the next hinted token holds, and each further one where those before it do."""
        return self._confidence.chance(self._prob(self._streak))

    def observe_truth(self, hint: Sequence[int], truth: Sequence[int]) -> int:
        """Compare a hint with what came in its place; returns how many of its tokens hold."""
        n = 0
        for token, true in zip(hint, truth, strict=False):
            self.observe(token == true)
            if token != true:
                break
            n += 1
        return n

    def observe(self, right: bool) -> None:
        """A hinted token has held, or has not."""
        self._confidence.observe(self._prob(self._streak), right)
        self._streak = max(self._streak, 0) + 1 if right else min(self._streak, 0) - 1

    @staticmethod
    def _prob(streak: int) -> float:
        return _PROBS[bisect(_STREAKS, streak)]

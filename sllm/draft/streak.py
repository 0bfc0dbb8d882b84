"""How likely tokens are to hold whose proposer says nothing of that: by what became of the last ones."""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING

from sllm.draft.confidence import Confidence

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HintTrust", "Streak"]

_STREAKS = (-5, -2, 0, 1, 4, 12)
_PROBS = (0.05, 0.2, 0.4, 0.6, 0.75, 0.9, 0.97)


class Streak:
    """Tokens that held in a row, or chains in a row that were wrong from the start: where somebody quotes
    what the target does not know, chains are right for a whole passage and then wrong for a while.
    """

    def __init__(self) -> None:
        self._n = 0

    def observe(self, right: bool) -> None:
        """A proposed token has held, or has not, which ends its chain."""
        self._n = max(self._n, 0) + 1 if right else min(self._n, 0) - 1

    @property
    def prob(self) -> float:
        """What stands for a draft's probability of the next token."""
        return _PROBS[bisect(_STREAKS, self._n)]


class HintTrust:
    """The chance that a hinted token holds, learnt for each text.

    Examples:
        >>> trust = HintTrust()
        >>> doubtful = trust.chance
        >>> _ = trust.observe_truth([1, 2, 3, 4], [1, 2, 3, 4, 5])
        >>> trust.chance > doubtful
        True

    """

    def __init__(self) -> None:
        self._confidence = Confidence()
        self._streak = Streak()

    @property
    def chance(self) -> float:
        """That the next hinted token holds, and each further one where those before it do."""
        return self._confidence.chance(self._streak.prob)

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
        self._confidence.observe(self._streak.prob, right)
        self._streak.observe(right)

"""How much a draft's word is worth: the chance that a drafted token holds, learnt while a text is written."""

from __future__ import annotations

import math
from bisect import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["UNKNOWN_PROB", "Confidence"]

UNKNOWN_PROB = 0.7
"""Stands for the probability of a token where the drafter gives none: always the same number, so that it is
soon learnt how many of these tokens are accepted.
"""

_EDGES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_PRIOR = (0.2, 0.3, 0.35, 0.45, 0.6, 0.75, 0.88, 0.95, 0.98)
"""The chance that each bin begins with. In the lower ones it is above the draft's probability: the two models
select with the same noise, so that an unlikely token of the one is often the other's, too.
"""

_WORTH = 4.0
"""Tokens that the beginning is worth."""

_KEEP = 0.98
"""What is left of the past with each token."""


class Confidence:
    """The chance that the target selects a drafted token, given the draft's probability of it.

    Two views are weighed against each other by how well they have foretold what held (Bayes' rule, the past
    fading): that the draft's probability says it, and that all tokens are as likely to hold, whatever the
    draft says. A draft that is right without believing it, or the other way round, is so found out within a
    few tokens. What the two say together is where a histogram over the probability starts from (histogram
    binning, 1706.04599, section 4), so that in the long run every bin has what was seen in it.

    Args:
        acceptance: the share of tokens that are expected to hold, worth three tokens.

    """

    def __init__(self, acceptance: float = 0.7) -> None:
        self._right = [0.0] * len(_PRIOR)
        self._seen = [0.0] * len(_PRIOR)
        self._all_right, self._all_seen = 3.0 * acceptance, 3.0
        self._evidence = 2.0  # for the first view: the logarithm of its odds
        self._trust = 1 / (1 + math.exp(-self._evidence))
        self.n_seen = 0
        """Tokens of which it is known whether they held."""

    @property
    def acceptance(self) -> float:
        """The running share of drafted tokens that hold where the ones before them do."""
        return min(self._all_right / self._all_seen, 0.999)

    def chance(self, prob: float) -> float:
        """The chance that a token holds to which the draft gave ``prob``, where the ones before it do."""
        return self._chance(bisect(_EDGES, prob))

    def _chance(self, i: int) -> float:
        expected = self._trust * _PRIOR[i] + (1 - self._trust) * self._all_right / self._all_seen
        return min((_WORTH * expected + self._right[i]) / (_WORTH + self._seen[i]), 0.999)

    def of_chain(self, probs: Sequence[float]) -> float:
        """The chance that all of a chain holds."""
        chance = 1.0
        for prob in probs:
            chance *= self._chance(bisect(_EDGES, prob))
        return chance

    def least(self, chance: float) -> float:
        """The probability from which on a token is at least so likely to hold; 0: any token is."""
        i = len(_EDGES)
        while i > 0 and self._chance(i - 1) >= chance:
            i -= 1
        return _EDGES[i - 1] if i > 0 else 0.0

    def observe(self, prob: float, right: bool) -> None:
        """A token to which the draft gave ``prob`` has held, or has not."""
        i = bisect(_EDGES, prob)
        said, mean = _PRIOR[i], self.acceptance
        ratio = said / mean if right else (1 - said) / (1 - mean)
        # Bounded, or a change would take as long to be believed as what was before it has lasted.
        self._evidence = min(max(_KEEP * self._evidence + math.log(ratio), -8.0), 3.0)
        self._trust = 1 / (1 + math.exp(-self._evidence))
        self._right[i] = self._right[i] * _KEEP + right
        self._seen[i] = self._seen[i] * _KEEP + 1
        self._all_right = self._all_right * _KEEP + right
        self._all_seen = self._all_seen * _KEEP + 1
        self.n_seen += 1

    def observe_truth(self, chain: Sequence[int], probs: Sequence[float], truth: Sequence[int]) -> int:
        """Compare a chain with what came in its place; returns how many of its tokens hold."""
        n = 0
        for token, prob, true in zip(chain, probs, truth, strict=False):
            self.observe(prob, token == true)
            if token != true:
                break
            n += 1
        return n

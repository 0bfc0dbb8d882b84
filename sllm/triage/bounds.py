"""Exact binomial bounds: how large a share of errors may be, and how many rows it takes to show that."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]

__all__ = ["at_most", "checked_share", "rows_needed", "upper_bound"]

_log_factorials = np.zeros(1)


def _log_factorials_to(n: int) -> Floats:
    """The logarithms of 0! .. n!, float64, at least n + 1 of them."""
    global _log_factorials
    table = _log_factorials
    if len(table) <= n:
        size = max(n + 1, 1024)
        table = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, size, dtype=np.float64)))))
        _log_factorials = table
    return table


@lru_cache(maxsize=1 << 16)
def at_most(wrong: int, n: int, p: float) -> float:
    """The probability of at most ``wrong`` of ``n`` independent events of probability 0 < p < 1 each."""
    if wrong >= n:
        return 1.0
    table = _log_factorials_to(n)
    i = np.arange(wrong + 1)
    terms = table[n] - table[i] - table[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    top = float(terms.max())
    return min(1.0, math.exp(top) * float(np.exp(terms - top).sum()))


def checked_share(value: float, name: str) -> float:
    """``value`` as a float.

    Raises:
        ValueError: not a number between 0 and 1, both excluded.

    """
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}, expected 0 < {name} < 1")
    return float(value)


def upper_bound(wrong: int, n: int, delta: float = 0.05) -> float:
    """The one-sided upper bound of Clopper and Pearson (Biometrika 26, 1934) on a share, at confidence
    ``1 - delta``.

    It is the share p at which at most ``wrong`` of ``n`` have the probability delta; exact, so never below
    its confidence. With nothing observed it is 1.

    Raises:
        ValueError: not 0 <= wrong <= n, or not 0 < delta < 1.

    """
    checked_share(delta, "delta")
    if not 0 <= wrong <= n:
        raise ValueError(f"{wrong} wrong of {n}, expected 0 <= wrong <= n")
    if wrong == n:
        return 1.0
    low, high = wrong / n, 1.0
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high  # the end that errs on the safe side
        if at_most(wrong, n, middle) > delta:
            low = middle
        else:
            high = middle


def rows_needed(alpha: float = 0.05, delta: float = 0.05, wrong: int = 0) -> int:
    """How many rows must pass a threshold, ``wrong`` of them wrong, for :func:`upper_bound` to be at most
    ``alpha``.

    Raises:
        ValueError: alpha or delta is not between 0 and 1.

    """
    checked_share(alpha, "alpha")
    checked_share(delta, "delta")
    high = wrong + 1
    while at_most(wrong, high, alpha) > delta:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at_most(wrong, middle, alpha) <= delta else (middle, high)
    return high

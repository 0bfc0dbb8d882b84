"""The Gumbel noise of sllm's selection: a pure function of (seed, position, token).

The formula is that of ``csrc/select.cpp`` and ``csrc/rows.hpp`` in sllm: a counter-based hash (SplitMix64's
finalizer over a Weyl sequence, Steele, Lea and Flood 2014) gives 52 bits, they give u in (0, 1), and the
noise is -ln(-ln u). Everything is done on signed 64-bit integers, whose products wrap around and whose right
shifts are masked, so that the same code runs on NumPy's arrays and on torch's tensors, wherever they are.
"""

from __future__ import annotations

from typing import Any

__all__ = ["gumbel", "hash_bits", "keys"]


def _signed(x: int) -> int:
    """The signed number of the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _shifted(x: Any, n: int) -> Any:
    """A right shift that brings zeros in."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Any) -> Any:
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def keys(seeds: Any, positions: Any) -> Any:
    """The keys of the hash.

    Args:
        seeds: int64 array or tensor; a seed from 2**63 on as the negative number of the same bits.
        positions: int64, of the same shape: where the selected token will be in the text, the prompt
            included.

    Returns:
        int64, of the same shape.

    """
    return _mix(_mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)


def hash_bits(key: Any, tokens: Any) -> Any:
    """52 random bits for each key and token (int64, broadcast against each other)."""
    return _shifted(_mix(key + (tokens + 1) * _GOLDEN), 12)


def gumbel(key: Any, tokens: Any, xp: Any) -> Any:
    """Standard Gumbel noise, float64, for keys and tokens that are broadcast against each other.

    ``xp`` is the module that the arrays are of: ``numpy`` or ``torch``.
    """
    bits = xp.asarray(hash_bits(key, tokens), dtype=xp.float64)
    u = (bits + 0.5) * 2.0**-52  # exact: 52 bits and a half are 53 bits
    return -xp.log(-xp.log(u))

"""Where a value begins and ends in a text, as parts of patterns.

Python's ``re`` skips to the characters that a pattern can begin with if these are one set; in front of
alternatives and of a look-behind it tries every offset. So a pattern begins with the set of its first
characters, and looks back over the one that it found.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ALONE", "END", "first_of", "rest_of"]

# Behind the first character: neither a letter of ASCII nor a digit is in front of it. Nor behind the last.
ALONE = r"(?<![A-Za-z0-9].)"
END = r"(?![A-Za-z0-9])"

_FIRST = re.compile(r"(\[[^\]]+\]|.)(.+)")


def _split(words: Iterable[str]) -> list[tuple[str, str]]:
    """The first character of each, or the set of these that it begins with, and the rest."""
    return [found.groups() for word in words if (found := _FIRST.fullmatch(word))]  # type: ignore[misc]


def first_of(words: Iterable[str]) -> str:
    """The set of the characters that words, which are patterns, begin with: each with one, or with a set that
    spells its characters out.
    """
    return "[" + "".join(sorted({char for first, _ in _split(words) for char in first.strip("[]")})) + "]"


def rest_of(words: Iterable[str]) -> str:
    """What follows :func:`first_of` them."""
    return "(?:" + "|".join(f"(?<={first}){rest}" for first, rest in _split(words)) + ")"

"""Patterns that are compiled when they are first used, and the parts that several of them share.

Compiling all the patterns of this package takes a second, which an import must not cost: whoever masks
nothing never pays it, and a text pays only for the patterns that it is searched with.

Python's ``re`` skips to the characters that a pattern can begin with if these are one set; before
alternatives and a look-behind it tries every offset. So a pattern begins with the set of its first
characters, and looks back over the one that it found: ``f"[AB]{ALONE}(?:...)"``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, cast

__all__ = ["ALONE", "END", "first_of", "lazy", "rest_of"]

# After the first character: no ASCII letter or digit stands before it. After the last: none follows.
ALONE = r"(?<![A-Za-z0-9].)"
END = r"(?![A-Za-z0-9])"


_METHODS = ("search", "match", "fullmatch", "finditer", "findall", "split", "sub", "subn")


class _Compiled:
    """Has the methods of a compiled pattern as attributes of its own."""


class _Lazy(_Compiled):
    """Compiles its pattern when one of the methods is asked for, and becomes a :class:`_Compiled`: Python is
    slower at reading attributes of classes that have a ``__getattr__``, also those that are found without it.
    """

    def __init__(self, source: str | Callable[[], str], flags: int) -> None:
        self._source = source
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            raise AttributeError(name)
        source = self._source if isinstance(self._source, str) else self._source()
        compiled = re.compile(source, self._flags)
        for method in _METHODS:
            setattr(self, method, getattr(compiled, method))
        self.__class__ = _Compiled  # type: ignore[assignment]
        return getattr(compiled, name)


def lazy(source: str | Callable[[], str], flags: int = 0) -> re.Pattern[str]:
    """A pattern that is compiled when one of its methods is first called; it has no other attributes.

    Args:
        source: the pattern, or what makes it, where word lists have to be read for that.
        flags: of :mod:`re`.

    """
    return cast("re.Pattern[str]", _Lazy(source, flags))


def _split(word: str) -> tuple[str, str]:
    """The first character of a pattern, or the set of characters that it begins with, and the rest."""
    size = word.index("]") + 1 if word[0] == "[" else 1
    return word[:size], word[size:]


def first_of(words: Iterable[str]) -> str:
    """The set of the characters that words begin with.

    Args:
        words: patterns that each begin with one character, or with a set that spells its characters out.

    """
    return "[" + "".join(sorted({char for word in words for char in _split(word)[0].strip("[]")})) + "]"


def rest_of(words: Iterable[str]) -> str:
    """What follows :func:`first_of` the same words."""
    return "(?:" + "|".join(f"(?<={first}){rest}" for first, rest in map(_split, words)) + ")"

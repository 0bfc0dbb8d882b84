"""Patterns that are compiled when they are first used, and the parts that several of them share.

Compiling all the patterns of this package takes a second, which an import must not cost: whoever masks
nothing never pays it, and a text pays only for the patterns that it is searched with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from sllm.privacy import data

__all__ = ["Patterns", "lazy"]

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


class Patterns:
    """The patterns in the section ``patterns`` of a file of rules, as attributes.

    Args:
        file: of ``sllm/privacy/data``, without ``.ini``; read when the first pattern is asked for.

    """

    def __init__(self, file: str) -> None:
        self._file = file

    def __getattr__(self, name: str) -> re.Pattern[str]:
        try:
            pattern = re.compile(data.sections(self._file)["patterns"][name])
        except KeyError:
            raise AttributeError(name) from None
        setattr(self, name, pattern)
        return pattern

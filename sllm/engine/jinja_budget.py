"""What rendering a chat template may take: steps, memory, and characters looked at.

A template comes with a downloaded file and is not trusted. Time is never measured: whether a template is
stopped does not depend on the machine. Sizes are in characters, each of which takes up to four bytes.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from itertools import chain
from typing import Any

__all__ = ["MAX_BITS", "Budget", "LimitError"]

# Far above what a conversation needs, far below what hurts.
_MAX_STEPS = 100_000  # loop rounds, calls and filters,
_MAX_STEPS_PER_MESSAGE = 2_000  # and so many more for each message
_MAX_MADE = 1 << 23  # characters of all values that a template makes,
_MADE_PER_CHARACTER = 32  # and so many more for each character of the conversation;
_MAX_REPEATED = 1 << 25  # some templates make a text longer with each message, and copy it each time
_MAX_SEEN = 1 << 27  # characters that its operations look at,
_SEEN_PER_CHARACTER = 256  # and so many more for each character of the conversation
_MAX_REPEATED_SEEN = 1 << 28
MAX_BITS = 4096
"""Bits of an integer."""

# What objects take besides their characters, in these.
_OBJECT = 14
_CONTAINER = 64
_ITEM = 2
_PAIR = 25
_MEASURED = 64  # measuring an item takes as long as looking at so many
_ESCAPED = 10  # the longest that a character becomes where a text is shown as Python writes it

_VIEWS = (KeysView, ItemsView, ValuesView, set, frozenset)


class LimitError(Exception):
    """The template would take too long or grow too large."""


class Budget:
    """What one rendering has left.

    Every list, tuple and mapping is measured once and remembered (no template can change one): ``size`` is
    that of all that it shows when it is printed or compared, though parts of it may be the same object many
    times over. A value of more than all that may be made is refused when it comes about.

    Args:
        variables: what the template is given, which costs nothing.
        n_messages: of the conversation.

    """

    def __init__(self, variables: Mapping[str, Any], n_messages: int) -> None:
        self._sizes: dict[int, tuple[Any, int, int]] = {}  # by id: the container, its size and its depth
        self._made = self._most = self._seen = sys.maxsize
        n = sum(map(self.size, variables.values()))
        self._max_steps = self._steps = _MAX_STEPS + n_messages * _MAX_STEPS_PER_MESSAGE
        self._most = _MAX_MADE + n * _MADE_PER_CHARACTER + min(n * n_messages, _MAX_REPEATED)
        self._made = self._most
        self._max_seen = _MAX_SEEN + n * _SEEN_PER_CHARACTER + min(n * n_messages, _MAX_REPEATED_SEEN)
        self._seen = self._max_seen

    def forget(self) -> None:
        """Let go of the containers that were measured."""
        self._sizes.clear()

    def step(self) -> None:
        """A round of a loop, a call or a filter."""
        self._steps -= 1
        if self._steps < 0:
            raise LimitError(f"more than {self._max_steps} loop rounds and calls")

    def take(self, n: int) -> None:
        """So many characters are made."""
        self._made -= n
        if self._made < 0:
            raise LimitError(f"more than {self._most} characters made")

    def look(self, n: int) -> None:
        """So many characters are looked at."""
        self._seen -= n
        if self._seen < 0:
            raise LimitError(f"more than {self._max_seen} characters looked at")

    def check(self, n: int) -> None:
        """Refuse what would make so many characters, before it does."""
        if n > self._made:
            raise LimitError(f"a value of {n} characters, where {self._most} of all values are the most")

    def made(self, value: Any) -> Any:
        """The value, which an operation has made."""
        if isinstance(value, (str, bytes)):
            self.take(len(value) + _OBJECT)
        elif isinstance(value, (list, tuple, dict)):
            self.size(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError(f"a number of {value.bit_length()} bits, where {MAX_BITS} is the most")
        elif value is not None:
            self.take(_OBJECT)
        return value

    def size(self, value: Any) -> int:
        """Characters of a value, with all that is in it."""
        if isinstance(value, (str, bytes)):
            return len(value) + _OBJECT
        if isinstance(value, (list, tuple, dict)):
            found = self._sizes.get(id(value))
            return self._measure(value) if found is None else found[1]
        if isinstance(value, int):
            return _OBJECT + value.bit_length() // 8
        if isinstance(value, _VIEWS):
            self.look(len(value))
            return sum(_PAIR + self.size(item) for item in value)
        return _OBJECT

    def depth(self, value: Any) -> int:
        """How deep containers are nested in a value."""
        if not isinstance(value, (list, tuple, dict)):
            return 0
        self.size(value)
        return self._sizes[id(value)][2]

    def text_size(self, value: Any) -> int:
        """At most so many characters has the value as a text."""
        if isinstance(value, str):
            return len(value)
        if value is None or isinstance(value, (bool, float)):
            return 24
        return _ESCAPED * self.size(value)

    def _measure(self, value: Any) -> int:
        """A container that was not seen before, and so takes memory of its own."""
        own = _CONTAINER + len(value) * (_PAIR if isinstance(value, dict) else _ITEM)
        self.take(own)
        self.look(len(value) * _MEASURED)
        if own + len(value) * _OBJECT > self._most:
            raise LimitError(f"a value of more than {self._most} characters")
        if isinstance(value, dict):
            # Numbers can be chosen so that a mapping compares each key with all others.
            self.look(len(value) ** 2 // 16 if len(value) > 1000 else len(value))
            self.look(sum(self.size(key) for key in value if isinstance(key, tuple)))
        total, depth = own, 0
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            total += self.size(item)
            depth = max(depth, self.depth(item))
            if total > self._most:
                raise LimitError(f"a value of more than {self._most} characters")
        self._sizes[id(value)] = (value, total, depth + 1)
        return total

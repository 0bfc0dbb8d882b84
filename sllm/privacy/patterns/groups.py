"""Runs of groups of digits with the gaps that people leave in them, and windows that may be one number."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    import re
    from collections.abc import Container

__all__ = ["Number", "Run", "groupings", "is_date", "is_glued"]

_P = Patterns("numbers")


@functools.cache
def groupings(name: str) -> frozenset[tuple[int, ...]]:
    """How many digits the groups of some numbers have, of ``numbers.json``."""
    return frozenset(tuple(map(int, lengths.split())) for lengths in data.table("numbers")[name])


def is_glued(letters: str) -> bool:
    """Whether these may stand right before a number without a space: tel, QQ."""
    return letters.lower() in data.word_set("numbers", "glued words")


class Run:
    """A run of groups of digits.

    Attributes:
        text: that holds it.
        groups: start and end of each group in the text.
        lengths: how many digits each group has.

    """

    def __init__(self, text: str, start: int, end: int) -> None:
        self.text = text
        self.groups = [found.span() for found in _P.group.finditer(text, start, end)]
        self.lengths = tuple([b - a for a, b in self.groups])
        self._follows: dict[re.Pattern[str], bool] = {}

    def follows(self, words: re.Pattern[str]) -> bool:
        """Whether it comes right after one of some words."""
        known = self._follows.get(words)
        if known is None:
            at = self.groups[0][0]
            known = self._follows[words] = words.search(self.text[max(0, at - 32) : at]) is not None
        return known


class Number:
    """Groups i to j of a run, as one number would have them.

    Attributes:
        text: that holds it.
        start: offset of the first digit.
        end: offset after the last digit.
        left: offset of a bracket right before the first digit, or else ``start``.
        bracket: whether there is one.
        lengths: how many digits each group has.
        total: how many all have.
        digits: all of them.
        groups: the digits of each group.
        gaps: what stands between the groups.

    """

    __slots__ = (
        "_first", "_run", "bracket", "digits", "end", "gaps", "groups", "left", "lengths", "start", "text",
        "total",
    )  # fmt: skip

    def __init__(self, run: Run, i: int, j: int) -> None:
        self._run, self._first = run, i
        self.text = text = run.text
        self.lengths = run.lengths[i:j]
        self.total = sum(self.lengths)
        self.start, self.end = run.groups[i][0], run.groups[j - 1][1]
        self.bracket = text[self.start - 1 : self.start] == "("
        self.left = self.start - 1 if self.bracket else self.start
        self.groups = [text[a:b] for a, b in run.groups[i:j]]
        self.digits = "".join(self.groups)
        self.gaps = [text[run.groups[k][1] : run.groups[k + 1][0]] for k in range(i, j - 1)]

    @property
    def signed(self) -> bool:
        """Whether a plus sign comes before it."""
        ahead = self.text[max(0, self.left - 2) : self.left]
        return ahead[-1:] == "+" or ahead == "+ "

    @property
    def spelled(self) -> bool:
        """Whether there is a gap after every digit or two."""
        return len(self.lengths) >= 9 and max(self.lengths) <= 2

    def grouped_as(self, known: Container[tuple[int, ...]]) -> bool:
        """Whether its groups have one of some lengths, or are one, or are spelled."""
        return len(self.lengths) == 1 or self.lengths in known or self.spelled

    def follows(self, words: re.Pattern[str]) -> bool:
        """Whether it comes right after one of some words; only the first in a run can."""
        return not self._first and self._run.follows(words)

    @property
    def in_a_part_number(self) -> bool:
        """Whether it goes on after letters and digits: P0-001-000016155-9."""
        i, run = self._first, self._run
        first = run.groups[0][0]
        letters = _P.alnum_tail.search(self.text[max(0, first - 12) : first])
        # p13800138000 is a phone, p0-001-... is none.
        if not i or not letters or (run.lengths[0] > 2 and is_glued(letters[0])):
            return False
        return all(self.text[run.groups[k][1] : run.groups[k + 1][0]] == "-" for k in range(i))


def is_date(groups: list[str]) -> bool:
    """Whether groups of digits are a date, or have one at their end."""
    return any(_begins_with_a_date(groups[k:]) for k in range(max(1, len(groups) - 2)))


def _begins_with_a_date(groups: list[str]) -> bool:
    if len(groups) < 3:
        return False
    a, b, c = map(int, groups[:3])
    lengths = tuple(map(len, groups[:3]))
    if lengths[0] == 4 and lengths[1] <= 2 and lengths[2] <= 2:
        return 1000 <= a <= 2100 and 1 <= b <= 12 and 1 <= c <= 31
    if lengths[0] <= 2 and lengths[1] <= 2 and lengths[2] == 4:
        return 1 <= min(a, b) <= 12 and max(a, b) <= 31 and 1000 <= c <= 2100
    return False

"""Numbers: runs of groups of digits with the gaps that people leave in them, read by the rules of
``numbers.ini``.

One pass finds the runs. In each, the rules are tried on a few groups at a time, the longest stretch first, so
that the work for each group is bounded and long runs of anything cost no more than their length.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sllm.extras import needs
from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.patterns.rules import Rule, rules
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("numbers")

_SHORTEST, _LONGEST = 7, 19  # digits of a number
_GROUPS = 7  # of a number that is not a whole run

# How many times phonenumberslite is asked about numbers of one text, by region; after that, form alone
# decides. A check costs a fifth of a millisecond, and a text of nothing but numbers must not cost minutes.
_LOOKUPS = 600
_LOOKUPS_NATIONAL = 12  # regions are asked in turn


@functools.cache
def _phonenumbers() -> Any:
    """The library, imported on first use: it takes a while, and most texts need none of it."""
    with needs("privacy"):
        import phonenumbers
    return phonenumbers


@functools.lru_cache(maxsize=8192)
def _is_phone(digits: str, regions: str) -> bool:
    """Whether digits are a valid number of one of some regions, as written there; "" for a number that begins
    with the code of a country.
    """
    lib = _phonenumbers()
    for region in data.table("numbers")[regions] if regions else (None,):
        try:
            number = lib.parse(digits if region else "+" + digits, region)
        except lib.NumberParseException:
            continue
        mobile = regions != "mobile regions" or lib.number_type(number) == lib.PhoneNumberType.MOBILE
        if mobile and lib.is_valid_number(number):
            return True
    return False


class _Checks:
    """The checks of numbers of one text; of telephone numbers a bounded count is looked up."""

    def __init__(self) -> None:
        self._left = _LOOKUPS

    def valid(self, scheme: str, number: str) -> bool:
        """As :func:`~sllm.privacy.patterns.checksums.valid`, and for ``phone`` and ``phone REGIONS``."""
        kind, _, regions = scheme.partition(" ")
        if kind != "phone":
            return checksums.valid(scheme, number)
        digits = "".join(filter(str.isdigit, number))
        self._left -= _LOOKUPS_NATIONAL if regions else 1
        return self._left < 0 or _is_phone(digits if regions else digits.removeprefix("00"), regions)


@functools.cache
def _by_digits() -> list[list[Rule]]:
    """For each count of digits the rules of numbers that can have so many."""
    return [[rule for rule in rules("numbers") if rule.fewest <= n <= rule.most] for n in range(_LONGEST + 1)]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the digits are not a part of a longer word, or of a number with a fraction."""
    before = text[max(0, start - 12) : start]
    if _P.letter_before.search(before) and not _P.glued_before.search(before):
        return False
    if _P.fraction_before.search(before) and not (before[-1] == "," and _P.long.match(text, start)):
        return False
    return not _P.joined_after.match(text, end) or (text[end] == "," and text[end - 4 : end].isdigit())


class _Run:
    """A run of groups of digits, in a text."""

    def __init__(self, text: str, start: int, end: int, checks: _Checks) -> None:
        self._text = text
        self.groups = [found.span() for found in _P.group.finditer(text, start, end)]
        self._checks = checks

    def number(self, i: int, j: int, n_digits: int) -> Finding | None:
        """What groups i to j are together."""
        text, start, end = self._text, self.groups[i][0], self.groups[j - 1][1]
        lead = _P.lead.search(text, max(0, start - 4), start)
        left = lead.start() if lead else start
        for rule in _by_digits()[n_digits]:
            if rule.whole and j - i < len(self.groups):
                continue
            for at in range(left, start + 1):
                found = rule.pattern.fullmatch(text, at, end)
                one = (
                    found and _stands_alone(text, start, end) and rule.judge(text, found, self._checks.valid)
                )
                if one:
                    return self._with_extension(one) if one.kind == "PHONE" else one
        return None

    def _with_extension(self, one: Finding) -> Finding:
        more = _P.word_extension.match(self._text, one.end)
        if more is None and _P.area_first.match(self._text, one.start):
            more = _P.short_extension.match(self._text, one.end)
        return replace(one, end=more.end()) if more else one

    def numbers(self, budget: Budget) -> Iterator[Finding]:
        """What is in the run: it as a whole, for its gaps suggest that it is one number, or parts of it."""
        lengths = [end - start for start, end in self.groups]
        n, total = len(lengths), sum(lengths)
        whole = self.number(0, n, total) if total <= _LONGEST else None
        if whole or n == 1:
            if whole:
                yield whole
            return
        i = 0
        while i < n:
            best, after, size = None, i + 1, 0
            for j in range(i + 1, min(n, i + _GROUPS) + 1):
                size += lengths[j - 1]
                if size > _LONGEST:
                    break
                if size < _SHORTEST:
                    continue
                if not budget.spend(self.groups[i][0]):
                    yield Finding(self.groups[i][0], self.groups[-1][1], "ACCOUNT", 0.5)
                    return
                one = self.number(i, j, size)
                if one and (best is None or one.checked >= best.checked):
                    best, after = one, j
            if best:
                yield best
            i = after


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    checks, budget = _Checks(), Budget(text)
    for found in _P.run.finditer(text):
        if found.end() - found.start() < _SHORTEST or sum(map(str.isdigit, found[0])) < _SHORTEST:
            continue
        if budget.spend(found.start()):
            yield from _Run(text, *found.span(), checks).numbers(budget)
        else:  # other than letters, digits that were not judged are easily told, and count as found
            yield Finding(*found.span(), "ACCOUNT", 0.5)

"""Numbers: runs of digits with the gaps that people leave in them, sorted by the lengths of their groups.

One pass finds the runs; windows of a few groups are then looked up by their lengths, so that the work for
each group is bounded and long runs of anything cost no more than their length. National numbers with gaps of
their own are rules of ``numbers.ini``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums, phones, rules
from sllm.privacy.patterns.groups import Number, Run, groupings, is_glued
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("numbers")

_LONGEST = 19  # digits of a number
_SHORTEST = 7


def _identity_card(number: Number) -> Finding | None:
    """身份证 of 18 or 15 characters, and a 统一社会信用代码 of digits alone, which is as long."""
    digits, end = number.digits, number.end
    good = None
    if number.total == 17 and (number.lengths in groupings("identity cards with X") or number.spelled):
        tail = _P.x.match(number.text, end)
        if tail:
            good, end = checksums.cn_id(digits + "X"), tail.end()
    elif number.total == 18 and number.grouped_as(groupings("identity cards")):
        good = checksums.cn_id(digits)
        # In the groups of a bank card only a correct number counts.
        if good is False and number.lengths in groupings("cards"):
            good = None
        if good is None and _P.company_digits.fullmatch(digits) and checksums.uscc(digits):
            return Finding(number.start, end, "COMPANYID", 0.9, checked=True)
    elif number.lengths == (15,):
        if checksums.cn_id_15(digits) and number.follows(_P.id_word):
            return Finding(number.start, end, "IDCARD", 0.9, checked=True)
        if _P.nir.match(digits) and checksums.valid("fr.nir", digits):
            return Finding(number.start, end, "NATIONALID", 0.9, checked=True)
    # A wrong check digit makes it the number that the words before it say.
    if good is None or (not good and number.follows(_P.other_number) and not number.follows(_P.id_word)):
        return None
    return Finding(number.start, end, "IDCARD", 1.0 if good else 0.8, checked=good)


def _bank_card(number: Number) -> Finding | None:
    """A payment card: a correct number, or with a typing error one that is called a card."""
    digits, lengths, gaps = number.digits, number.lengths, set(number.gaps)
    called_card = number.follows(_P.card_word)
    if lengths == (12,) and digits[0] in "56" and called_card and checksums.valid("luhn", digits):
        return Finding(number.start, number.end, "CARD", 0.7)  # Maestro has cards of 12 digits
    fits = 13 <= number.total <= _LONGEST and number.grouped_as(groupings("cards"))
    if not fits or len(gaps) > 1 or not gaps <= {" ", "-", " - ", "--", "."}:
        return None
    other = number.follows(_P.other_number)
    if checksums.card(digits) and (called_card or not other):
        return Finding(number.start, number.end, "CARD", 1.0, checked=True)
    # Invented, or mistyped: still somebody's.
    paid = digits[:2] == "62" and number.follows(_P.paid_word)
    whole = lengths in ((16,), (19,), (15,)) and (called_card or (paid and lengths != (15,)))
    grouped = lengths in ((4, 4, 4, 4), (4, 6, 5), (4, 4, 4, 4, 3)) and "." not in gaps
    if (whole or grouped) and digits[0] in "3456" and not other:
        return Finding(number.start, number.end, "CARD", 0.6)
    return None


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the digits are not a part of a longer word, or of a number with a fraction."""
    follow = text[end : end + 1]
    if follow.isascii() and follow.isalpha() and not _P.word_extension.match(text, end):
        tail = text[end : end + 2]
        if tail[0] not in "xX" or (tail[1:].isascii() and tail[1:].isalnum()):
            return False
    before = text[max(0, start - 12) : start]
    letters = _P.alnum_tail.search(before)
    if letters and not is_glued(letters[0]):
        return False
    columns = _P.columns_before.search(before) or (before[-1:] == "," and _P.long.match(text, start))
    if before[-1:] in (".", ",") and before[-2:-1].isdigit() and not columns:
        return False
    if follow in (".", ",") and text[end + 1 : end + 2].isdigit():
        return follow == "," and end - start >= 4 and text[end - 4 : end].isdigit()
    return True


def _judge(run: Run, i: int, j: int, lookups: phones.Lookups) -> Finding | None:
    """What groups i to j are together."""
    number = Number(run, i, j)
    if not _stands_alone(run.text, number.start, number.end):
        return None
    return _identity_card(number) or _bank_card(number) or phones.phone(number, lookups)


@functools.lru_cache(maxsize=65536)
def _known_form(lengths: tuple[int, ...]) -> bool:
    """Whether there is a rule for numbers grouped like this."""
    return (
        (len(lengths) == 1 and lengths[0] in (11, 13, 14, 15, 16, 17, 18, 19))
        or lengths in ((3, 3, 4), (1, 3, 3, 4), (3, 4, 3))
        or any(
            lengths in groupings(name)
            for name in ("cards", "identity cards", "identity cards with X", "mobile phones in China")
        )
    )


def _worth(run: Run, i: int, j: int) -> bool:
    """Whether a window of a longer run can be a number of some kind: the cheap half of judging it."""
    at = run.groups[i][0]
    return (
        i == 0
        or j - i == 1
        or run.text[at] == "0"
        or run.text[max(0, at - 2) : at].strip(" ")[-1:] in ("+", "(")
        or _known_form(run.lengths[i:j])
    )


def _best(run: Run, i: int, lookups: phones.Lookups, budget: Budget) -> tuple[Finding | None, int]:
    """The number that begins with group i, the longest that is as sure as any, and the group after it; the
    rest of the run once nothing is judged any more.
    """
    lengths = run.lengths
    best, after, size = None, i + 1, 0
    # A single digit begins +1 415 ..., 1-800-... and a French number, and nothing else.
    if lengths[i] == 1 and lengths[i : i + 2] not in ((1, 2), (1, 3)):
        return None, after
    for j in range(i + 1, min(len(lengths), i + 7) + 1):
        size += lengths[j - 1]
        if size > _LONGEST:
            break
        if size < _SHORTEST or not _worth(run, i, j):
            continue
        if not budget.spend(run.groups[i][0]):
            return Finding(run.groups[i][0], run.groups[-1][1], "ACCOUNT", 0.5), len(lengths)
        one = _judge(run, i, j, lookups)
        if one and (best is None or one.checked >= best.checked):
            best, after = one, j
    return best, after


def _in_run(run: Run, lookups: phones.Lookups, budget: Budget) -> Iterator[Finding]:
    n, total = len(run.lengths), sum(run.lengths)
    # A run that fits is judged as a whole first: its gaps suggest that it is one number.
    if n <= _LONGEST and total <= _LONGEST:
        whole = _judge(run, 0, n, lookups)
        if whole:
            yield whole
            return
        if n == 1 or (n >= 9 and max(run.lengths) <= 2):
            return
    i = 0
    while i < n:
        best, i = _best(run, i, lookups, budget)
        if best:
            yield best


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from rules.scan(text, "numbers", budget)
    yield from budget.rest("NATIONALID")
    lookups, budget = phones.Lookups(), Budget(text)
    for found in _P.run.finditer(text):
        if found.end() - found.start() < _SHORTEST or sum(map(str.isdigit, found[0])) < _SHORTEST:
            continue
        if budget.spend(found.start()):
            yield from _in_run(Run(text, *found.span()), lookups, budget)
        else:  # other than letters, digits that were not judged are easily told, and count as found
            yield Finding(*found.span(), "ACCOUNT", 0.5)

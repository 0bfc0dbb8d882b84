"""Telephone numbers, by how many digits their groups have, what stands around them, and the tables of
phonenumberslite.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from sllm.extras import needs
from sllm.privacy import data
from sllm.privacy.findings import Finding
from sllm.privacy.patterns.groups import Number, groupings, is_date
from sllm.privacy.regex import Patterns

__all__ = ["Lookups", "phone"]

_P = Patterns("numbers")

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
def _is_international(digits: str) -> bool:
    """Whether the digits after a plus sign are a valid number of some country."""
    lib = _phonenumbers()
    try:
        return bool(lib.is_valid_number(lib.parse("+" + digits)))
    except lib.NumberParseException:
        return False


@functools.lru_cache(maxsize=8192)
def _is_national(digits: str, mobile: bool) -> bool:
    """Whether the digits, as written within a country, are a valid (mobile) number of one of the regions."""
    lib = _phonenumbers()
    for region in data.table("numbers")["mobile regions" if mobile else "regions"]:
        try:
            number = lib.parse(digits, region)
        except lib.NumberParseException:
            continue
        if mobile:
            if lib.number_type(number) == lib.PhoneNumberType.MOBILE:
                return True
        elif lib.is_valid_number(number):
            return True
    return False


class Lookups:
    """Asks the tables of phonenumberslite, a bounded number of times in one text.

    A look-up answers None once the bound is reached.
    """

    def __init__(self) -> None:
        self.left = _LOOKUPS

    def international(self, digits: str) -> bool | None:
        """Whether the digits after a plus sign are a valid number."""
        self.left -= 1
        return _is_international(digits) if self.left >= 0 else None

    def national(self, digits: str, *, mobile: bool = False) -> bool | None:
        """Whether the digits are a valid number of some region without the code of its country."""
        self.left -= _LOOKUPS_NATIONAL
        return _is_national(digits, mobile) if self.left >= 0 else None


def phone(number: Number, lookups: Lookups) -> Finding | None:
    """The telephone number, perhaps with an extension, that some groups of digits are as a whole."""
    found = _phone(number, lookups) if 7 <= number.total <= 16 else None
    if found is None or (not found.checked and number.in_a_part_number):
        return None
    text = number.text
    more = _P.word_extension.match(text, found.end)
    if more is None and number.lengths[0] in (3, 4) and text[number.start] == "0":
        more = _P.extension.match(text, found.end)
    if more and found.end == number.end:
        return replace(found, end=more.end())
    return found


def _phone(number: Number, lookups: Lookups) -> Finding | None:
    lengths, gaps = number.lengths, number.gaps
    if number.signed:
        return _with_sign(number, lookups)
    if is_date(number.groups):
        return None
    if number.digits in "01234567890" or (gaps == ["."] and lengths[0] == 1):
        return None  # 0123456789, and fractions
    if lengths == (3, 2, 4) and gaps in (["-", "-"], [" ", " "], [".", "."]):
        return None  # a social security number
    if lengths == (5, 4) and gaps == ["-"] and number.follows(_P.state):
        return None
    found = _in_china(number) or _with_area_in_brackets(number, lookups)
    if found:
        return found
    # 1 (926) 018-1590: the code of a country, that of an area in brackets.
    if len(gaps) >= 2 and "(" in gaps[0] and ")" in gaps[1] and lengths[0] <= 3 and 9 <= number.total <= 13:
        if not any("(" in gap or ")" in gap for gap in gaps[2:]) and lengths[1] in (2, 3, 4):
            return Finding(number.start, number.end, "PHONE", 0.8)
        return None
    if any("(" in gap or ")" in gap for gap in gaps[1:]):
        return None
    found = _in_america(number) or _with_zeros(number, lookups) or _with_zero(number, lookups)
    if found:
        return found
    announced = number.follows(_P.phone_word) and not number.follows(_P.other_number)
    announced = announced and not _P.amount_after.match(number.text, number.end)
    said_after = len(lengths) >= 2 and min(lengths) >= 3 and _P.phone_after.match(number.text, number.end)
    if (
        (announced or said_after)
        and number.total <= 15
        and len(lengths) <= 7
        and not all(map(_P.year.fullmatch, number.groups))
    ):
        closed = number.bracket and gaps and ")" in gaps[0]
        return Finding(number.left if closed else number.start, number.end, "PHONE", 0.7)
    return None


def _in_china(number: Number) -> Finding | None:
    """中国大陆: mobile, with or without 86; 区号 (area code) and number; 400 and 800."""
    lengths, gaps, digits = number.lengths, number.gaps, number.digits
    mobile = number.grouped_as(groupings("mobile phones in China")) and _P.cn_mobile.fullmatch(digits)
    if mobile and "." not in gaps and "/" not in gaps:
        return Finding(number.left, number.end, "PHONE", 0.95, checked=True)
    landline = lengths in groupings("landlines in China") and set(gaps) <= {"-", " ", ") ", ")", " - ", ")-"}
    if landline and _P.cn_area.match(digits):
        return Finding(number.left, number.end, "PHONE", 0.9)
    if digits[:3] in ("400", "800") and lengths in ((3, 3, 4), (3, 4, 3)):
        return Finding(number.start, number.end, "PHONE", 0.8)
    return None


def _with_area_in_brackets(number: Number, lookups: Lookups) -> Finding | None:
    lengths, total = number.lengths, number.total
    area = number.bracket and len(lengths) >= 2 and ")" in number.gaps[0]
    fits = area and 2 <= lengths[0] <= 5 and total <= 12
    if fits and (total >= 9 or lookups.national(number.digits) is not False):
        return Finding(number.left, number.end, "PHONE", 0.85)
    return None


def _in_america(number: Number) -> Finding | None:
    """North America: three, three and four digits."""
    lengths, gaps = number.lengths, number.gaps
    if lengths == (3, 3, 4) or (lengths == (1, 3, 3, 4) and number.digits[0] == "1"):
        ten = number.digits[-10:]
        dashed = len(set(gaps)) == 1 and gaps[0] in ("-", ".")
        dashed = dashed and (ten[0] in "23456789" or ten == "1234567890")
        likely = dashed or (ten[0] in "23456789" and ten[3] in "23456789")
        if likely and not (gaps[-1] == "." and number.follows(_P.other_number)):
            return Finding(number.left, number.end, "PHONE", 0.8)
    return None


def _with_zeros(number: Number, lookups: Lookups) -> Finding | None:
    """With 00, the international prefix of most countries."""
    lengths, digits, total = number.lengths, number.digits, number.total
    if digits.startswith("001") and len(lengths) >= 3 and total in (13, 14):
        return Finding(number.start, number.end, "PHONE", 0.8)
    if digits.startswith("00") and total >= 10 and lengths[0] >= 2 and len(lengths) <= 7:
        if lookups.international(digits[2:]) is not False:
            return Finding(number.start, number.end, "PHONE", 0.9, checked=True)
        if len(lengths) >= 3 and len(set(number.gaps)) != 1:
            return Finding(number.start, number.end, "PHONE", 0.6)
    return None


def _with_zero(number: Number, lookups: Lookups) -> Finding | None:
    """With 0, the prefix of most countries within them."""
    lengths, digits, gaps = number.lengths, number.digits, number.gaps
    start, end = number.start, number.end
    if digits[0] == "0" and digits[1] != "0" and 9 <= number.total <= 12 and "/" not in gaps[1:]:
        if lengths == (2, 2, 2, 2, 2) and len(set(gaps)) == 1:
            return Finding(start, end, "PHONE", 0.85)
        if len(lengths) >= 2 and 2 <= lengths[0] <= 6 and len(lengths) <= 5 and min(lengths) >= 2:
            if lookups.national(digits) is not False:
                return Finding(start, end, "PHONE", 0.8)
            if len(lengths) >= 3 and "." not in gaps:
                return Finding(start, end, "PHONE", 0.55)
        plain = len(lengths) == 1 and number.total in (10, 11) and not number.follows(_P.other_number)
        if plain and lookups.national(digits, mobile=True) is not False:
            return Finding(start, end, "PHONE", 0.7)
    return None


def _with_sign(number: Number, lookups: Lookups) -> Finding | None:
    """A telephone number after a plus sign."""
    text, end, digits, gaps = number.text, number.end, number.digits, number.gaps
    plus = text.rfind("+", 0, number.left)
    ahead = text[max(0, plus - 2) : plus]
    if ahead.endswith("(") and ")" in text[plus : plus + 6]:
        plus -= 1
        ahead = ahead[:-1]
    # 3 +12345678 and a[i]+12345678 are sums.
    if ahead[-1:].isascii() and (ahead[-1:].isalnum() or ahead.endswith((")", "]"))):
        return None
    if not gaps and ahead.rstrip()[-1:].isascii() and ahead.rstrip()[-1:].isdigit():
        return None
    valid = lookups.international(digits)
    if valid is not False:
        return Finding(plus, end, "PHONE", 1.0, checked=True)
    if 8 <= len(digits) <= 13 and digits[0] != "0" and not any("(" in gap for gap in gaps[2:]):
        return Finding(plus, end, "PHONE", 0.7)
    return None

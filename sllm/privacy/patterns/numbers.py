"""Numbers: runs of digits with the gaps that people leave in them, sorted by the lengths of their groups.

One pass finds the runs; windows of a few groups are then looked up by their lengths, so that the work for
each group is bounded and long runs of anything cost no more than their length.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from sllm.extras import needs
from sllm.privacy.findings import Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("numbers")

# Words that may stand right before a number without a space.
_GLUED_TEXT = (
    "tel mobile mob cell fax phone ph hp m t p id card no num number qq wechat vx wx sfz sfzh call "
    "contact ssn"
)
_GLUED = frozenset(_GLUED_TEXT.split())

# How many times phonenumberslite is asked about numbers of one text, by region; after that, form alone
# decides. A check costs a fifth of a millisecond, and a text of nothing but numbers must not cost minutes.
_LOOKUPS = 600
_LOOKUPS_NATIONAL = 12  # regions are asked in turn
# How many windows of runs are judged in one text; the runs after them count as found.
_WINDOWS = 20_000

_CARD_GROUPS = frozenset(
    [
        (4, 4, 4, 4), (4, 4, 4, 4, 3), (4, 4, 4, 4, 2), (4, 4, 4, 4, 1), (4, 6, 5), (4, 6, 4), (4, 4, 4, 1),
        (6, 13), (6, 10), (4, 3, 3, 3), (4, 5, 6), (4, 4, 8), (8, 8), (4, 12), (4, 4, 7), (6, 4, 6),
        (4, 4, 4, 6, 1), (6, 6, 4), (6, 6, 7), (5, 5, 5, 4), (4, 4, 5),
    ]
)  # fmt: skip
_ID_GROUPS = frozenset(
    [
        (6, 8, 4), (4, 4, 4, 4, 2), (6, 6, 6), (3, 3, 3, 3, 3, 3), (6, 4, 4, 4), (6, 12), (14, 4),
        (3, 3, 4, 4, 4), (6, 4, 2, 2, 4), (10, 8), (3, 3, 8, 4),
    ]
)  # fmt: skip
# The same with X as the last character.
_ID_X_GROUPS = frozenset(
    [(17,), (6, 8, 3), (6, 4, 4, 3), (6, 11), (14, 3), (6, 4, 2, 2, 3), (10, 7), (3, 3, 8, 3)]
)


class _Run:
    """A run of groups of digits.

    Attributes:
        text: that holds it.
        start: offset of the run in the text.
        groups: start and end of each group in the text.
        lengths: how many digits each group has.

    """

    def __init__(self, text: str, start: int, end: int) -> None:
        self.text = text
        self.start = start
        groups = [found.span() for found in _P.group.finditer(text, start, end)]
        self.groups = groups
        self._follows: dict[re.Pattern[str], bool] = {}
        self.lengths = tuple([b - a for a, b in groups])

    def digits(self, i: int, j: int) -> str:
        return "".join([self.text[a:b] for a, b in self.groups[i:j]])

    def in_a_part_number(self, i: int) -> bool:
        """Whether group i goes on after letters and digits: P0-001-000016155-9."""
        first = self.groups[0][0]
        before = self.text[max(0, first - 12) : first]
        letters = _P.alnum_tail.search(before)
        # p13800138000 is a phone, p0-001-... is none.
        if not i or not letters or (self.lengths[0] > 2 and letters[0].lower() in _GLUED):
            return False
        return self.gaps(0, i + 1) == {"-"}

    def gaps(self, i: int, j: int) -> set[str]:
        return {self.text[self.groups[k][1] : self.groups[k + 1][0]] for k in range(i, j - 1)}

    def follows(self, words: re.Pattern[str], i: int) -> bool:
        """Whether group i comes right after one of some words; only the first group of a run can."""
        if i:
            return False
        known = self._follows.get(words)
        if known is None:
            at = self.groups[0][0]
            known = self._follows[words] = words.search(self.text[max(0, at - 32) : at]) is not None
        return known


# Where numbers without a country code are most often from; asked in this order.
_REGIONS = (
    "CN", "GB", "FR", "DE", "JP", "KR", "TW", "AU", "IT", "IN", "BR", "NL", "ES", "CH", "MX", "ZA", "TR",
    "PK",
)  # fmt: skip
_MOBILE_REGIONS = ("GB", "FR", "DE", "JP", "KR", "TW", "AU", "ZA", "TR", "PK", "NL", "CH")


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
    for region in _MOBILE_REGIONS if mobile else _REGIONS:
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


class _Lookups:
    """Asks the tables of phonenumberslite, a bounded number of times in one text.

    A look-up answers None once the bound is reached.
    """

    def __init__(self) -> None:
        self.left = _LOOKUPS
        self.windows = _WINDOWS

    def international(self, digits: str) -> bool | None:
        """Whether the digits after a plus sign are a valid number."""
        self.left -= 1
        return _is_international(digits) if self.left >= 0 else None

    def national(self, digits: str, *, mobile: bool = False) -> bool | None:
        """Whether the digits are a valid number of some region without the code of its country."""
        self.left -= _LOOKUPS_NATIONAL
        return _is_national(digits, mobile) if self.left >= 0 else None


def _mobile_cn(digits: str) -> bool:
    return len(digits) == 11 and digits[0] == "1" and digits[1] in "3456789"


def _dates(lengths: tuple[int, ...], groups: list[str]) -> bool:
    """Whether the groups are a date, or begin with one."""
    if len(lengths) < 3:
        return False
    if lengths[0] == 4 and lengths[1] <= 2 and lengths[2] <= 2:
        return 1000 <= int(groups[0]) <= 2100 and 1 <= int(groups[1]) <= 12 and 1 <= int(groups[2]) <= 31
    if lengths[0] <= 2 and lengths[1] <= 2 and lengths[2] == 4:
        a, b = int(groups[0]), int(groups[1])
        return 1 <= min(a, b) <= 12 and max(a, b) <= 31 and 1000 <= int(groups[2]) <= 2100
    return False


def _years(groups: list[str]) -> bool:
    return all(len(group) == 4 and group[:2] in ("19", "20") for group in groups)


def _window(run: _Run, i: int, j: int) -> Finding | None:
    """The number that groups i to j are together, other than a telephone number."""
    lengths = run.lengths[i:j]
    total = sum(lengths)
    start, end = run.groups[i][0], run.groups[j - 1][1]
    text = run.text
    if total == 17 and lengths in _ID_X_GROUPS:
        tail = _P.x.match(text, end)
        if tail:
            good = checksums.cn_id(run.digits(i, j) + "X")
            if good is not None:
                return _card_of_identity(run, i, tail.end(), good)
    if total == 18 and (lengths == (18,) or lengths in _ID_GROUPS):
        digits = run.digits(i, j)
        good = checksums.cn_id(digits)
        # In the groups of a bank card only a correct number counts.
        if good is not None and (good or lengths not in _CARD_GROUPS):
            return _card_of_identity(run, i, end, good)
        if lengths == (18,) and digits[:2] in _USCC_STARTS and checksums.uscc(digits):
            return Finding(start, end, "COMPANYID", 0.9, checked=True)
    if total == 15 and lengths == (15,):
        digits = run.digits(i, j)
        if checksums.cn_id_15(digits) and run.follows(_P.id_word, i):
            return Finding(start, end, "IDCARD", 0.9, checked=True)
        if digits[0] in "12" and digits[3:5] <= "12" and checksums.valid("fr.nir", digits):
            return Finding(start, end, "NATIONALID", 0.9, checked=True)
    if (
        lengths == (12,)
        and text[start] in "56"
        and run.follows(_P.card_word, i)
        and checksums.valid("luhn", text[start:end])
    ):
        return Finding(start, end, "CARD", 0.7)  # Maestro has cards of 12 digits
    if 13 <= total <= 19 and (len(lengths) == 1 or lengths in _CARD_GROUPS):
        gaps = run.gaps(i, j)
        if gaps <= {" ", "-", " - ", "--", "."} and len(gaps) <= 1:
            digits = run.digits(i, j)
            if checksums.card(digits) and (
                run.follows(_P.card_word, i) or not run.follows(_P.other_number, i)
            ):
                return Finding(start, end, "CARD", 1.0, checked=True)
            # With a typing error, or invented: still somebody's where it is called a card.
            if (
                (lengths in ((15,), (16,), (19,)) and digits[0] in "3456" and run.follows(_P.card_word, i))
                or (lengths in ((16,), (19,)) and digits[:2] == "62" and run.follows(_P.paid_word, i))
            ) and not run.follows(_P.other_number, i):
                return Finding(start, end, "CARD", 0.6)
            grouped = lengths in ((4, 4, 4, 4), (4, 6, 5), (4, 4, 4, 4, 3))
            if grouped and digits[0] in "3456" and "." not in gaps and not run.follows(_P.other_number, i):
                return Finding(start, end, "CARD", 0.6)
    return _national_id(run, i, j, lengths, start, end)


def _card_of_identity(run: _Run, i: int, end: int, good: bool) -> Finding | None:
    """An identity number; a wrong check digit makes it the number that the words before it say."""
    if not good and run.follows(_P.other_number, i) and not run.follows(_P.id_word, i):
        return None
    return Finding(run.groups[i][0], end, "IDCARD", 1.0 if good else 0.8, checked=good)


_USCC_STARTS_TEXT = "11 12 13 19 31 32 33 51 52 53 59 91 92 93"
_USCC_STARTS = frozenset(_USCC_STARTS_TEXT.split())


def _short_date(digits: str) -> bool:
    """Whether the first six digits are a date with its year in two."""
    return any(
        checksums.real_date(century + digits[:2], digits[2:4], digits[4:6]) for century in ("19", "20")
    )


def _national_id(run: _Run, i: int, j: int, lengths: tuple[int, ...], start: int, end: int) -> Finding | None:
    """The national number that groups are, recognised by their lengths and gaps."""
    form = _NATIONAL.get(lengths)
    if form is None:
        return None
    kind, gaps = form
    actual = [run.text[run.groups[k][1] : run.groups[k + 1][0]] for k in range(i, j - 1)]
    if gaps and actual not in gaps:
        return None
    digits = run.digits(i, j)
    checked = False
    if lengths == (3, 2, 4):
        if digits[:3] == "000" or (actual[0] != "-" and (digits[:3] == "666" or digits[0] == "9")):
            return None
    elif lengths == (4, 4, 4):
        if (
            _years([run.text[a:b] for a, b in run.groups[i:j]])
            or digits[0] in "01"
            or not checksums.valid("verhoeff", digits)
        ):
            return None
        checked = True
    elif lengths == (3, 3, 3, 2):
        checked = checksums.valid("br.cpf", digits)
    elif lengths == (2, 3, 3, 4, 2):
        checked = checksums.valid("br.cnpj", digits)
    elif lengths == (3, 3, 3):
        if digits[0] == "0" or not checksums.valid("luhn", digits):
            return None
        checked = True
    elif lengths == (6, 7):
        if digits[6] not in "123456789" or not checksums.real_date(
            "20" + digits[:2], digits[2:4], digits[4:6]
        ):
            return None
    elif lengths in ((6, 4), (8, 4)):
        short = digits[-10:]
        if not _short_date(short) or not checksums.valid("luhn", short):
            return None
        checked = True
    elif lengths == (1, 2, 2, 2, 3, 3, 2):
        if digits[0] not in "12" or not checksums.valid("fr.nir", digits):
            return None
        checked = True
    elif lengths == (2, 6, 6, 1):
        checked = checksums.valid("luhn", digits)
    elif lengths == (3, 4, 4, 2):
        if digits[:3] != "756" or not checksums.valid("ch.ssn", digits):
            return None
        checked = True
    return Finding(start, end, kind, 0.9 if checked else 0.7, checked=checked)


_NATIONAL: dict[tuple[int, ...], tuple[str, list[list[str]]]] = {
    (3, 2, 4): ("SSN", [["-", "-"], [" ", " "], [".", "."]]),
    (4, 4, 4): ("NATIONALID", [[" ", " "], ["-", "-"]]),
    (3, 3, 3, 2): ("NATIONALID", [[".", ".", "-"]]),
    (2, 3, 3, 4, 2): ("COMPANYID", [[".", ".", "/", "-"]]),
    (3, 3, 3): ("NATIONALID", [["-", "-"]]),
    (6, 7): ("NATIONALID", [["-"]]),
    (6, 4): ("NATIONALID", [["-"]]),
    (8, 4): ("NATIONALID", [["-"]]),
    (1, 2, 2, 2, 3, 3, 2): ("NATIONALID", [[" "] * 6]),
    (3, 4, 4, 2): ("NATIONALID", [["."] * 3]),
    (2, 6, 6, 1): ("DEVICE", [["-"] * 3, [" "] * 3]),
}


class _Number:
    """Groups i to j of a run, as one telephone number would have them.

    Attributes:
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

    def __init__(self, run: _Run, i: int, j: int) -> None:
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

    def follows(self, words: re.Pattern[str]) -> bool:
        """Whether it comes right after one of some words."""
        return self._run.follows(words, self._first)

    @property
    def is_a_date(self) -> bool:
        """Whether its groups are a date, or have one at their end."""
        lengths, groups = self.lengths, self.groups
        return any(_dates(lengths[k:], groups[k:]) for k in range(max(1, len(lengths) - 2)))


def _phone(run: _Run, i: int, j: int, lookups: _Lookups) -> Finding | None:
    """A telephone number that groups i to j are as a whole."""
    if not 7 <= sum(run.lengths[i:j]) <= 16:
        return None
    number = _Number(run, i, j)
    lengths, gaps = number.lengths, number.gaps
    if number.signed:
        return _with_sign(number, lookups)
    if number.is_a_date:
        return None
    if number.digits in _COUNTING or (gaps == ["."] and lengths[0] == 1):
        return None  # 0123456789, and fractions
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
    if (announced or said_after) and number.total <= 15 and len(lengths) <= 7 and not _years(number.groups):
        closed = number.bracket and gaps and ")" in gaps[0]
        return Finding(number.left if closed else number.start, number.end, "PHONE", 0.7)
    return None


def _in_china(number: _Number) -> Finding | None:
    """中国大陆: mobile, with or without 86; 区号 (area code) and number; 400 and 800."""
    lengths, gaps, digits = number.lengths, number.gaps, number.digits
    mobile = digits
    for prefix in ("0086", "86"):
        if digits.startswith(prefix) and len(digits) == 11 + len(prefix):
            mobile = digits[len(prefix) :]
    grouped = lengths in _MOBILE_FORMS or (len(lengths) >= 9 and max(lengths) <= 2)
    if grouped and _mobile_cn(mobile) and "." not in gaps and "/" not in gaps:
        return Finding(number.left, number.end, "PHONE", 0.95, checked=True)
    landline = lengths in _LANDLINE_FORMS and set(gaps) <= {"-", " ", ") ", ")", " - ", ")-"}
    if landline and _P.cn_area.match(digits):
        return Finding(number.left, number.end, "PHONE", 0.9)
    if digits[:3] in ("400", "800") and lengths in ((3, 3, 4), (3, 4, 3)):
        return Finding(number.start, number.end, "PHONE", 0.8)
    return None


def _with_area_in_brackets(number: _Number, lookups: _Lookups) -> Finding | None:
    lengths, total = number.lengths, number.total
    area = number.bracket and len(lengths) >= 2 and ")" in number.gaps[0]
    fits = area and 2 <= lengths[0] <= 5 and total <= 12
    if fits and (total >= 9 or lookups.national(number.digits) is not False):
        return Finding(number.left, number.end, "PHONE", 0.85)
    return None


def _in_america(number: _Number) -> Finding | None:
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


def _with_zeros(number: _Number, lookups: _Lookups) -> Finding | None:
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


def _with_zero(number: _Number, lookups: _Lookups) -> Finding | None:
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


_COUNTING = "01234567890"
_MOBILE_FORMS = frozenset(
    [
        (11,), (13,), (15,), (3, 4, 4), (3, 8), (7, 4), (2, 11), (4, 11), (2, 3, 4, 4), (4, 3, 4, 4),
        (2, 3, 8), (3, 3, 5), (4, 4, 3), (3, 2, 2, 2, 2), (5, 6), (3, 4, 2, 2), (3, 5, 3), (5, 4, 4), (5, 8),
        (2, 4, 4, 3), (6, 5),
    ]
)  # fmt: skip
_LANDLINE_FORMS = frozenset([(3, 8), (4, 7), (4, 8), (3, 4, 4), (4, 4, 4), (4, 3, 4), (3, 7)])


def _with_sign(number: _Number, lookups: _Lookups) -> Finding | None:
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


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the digits are not a part of a longer word, or of a number with a fraction."""
    follow = text[end : end + 1]
    if follow.isascii() and follow.isalpha() and not _P.word_extension.match(text, end):
        tail = text[end : end + 2]
        if tail[0] not in "xX" or (tail[1:].isascii() and tail[1:].isalnum()):
            return False
    before = text[max(0, start - 12) : start]
    letters = _P.alnum_tail.search(before)
    if letters and letters[0].lower() not in _GLUED:
        return False
    columns = _P.columns_before.search(before) or (before[-1:] == "," and _P.long.match(text, start))
    if before[-1:] in (".", ",") and before[-2:-1].isdigit() and not columns:
        return False
    if follow == "." and text[end + 1 : end + 2].isdigit():
        return False
    return not (follow == "," and text[end + 1 : end + 2].isdigit() and not _long_tail(text, start, end))


def _long_tail(text: str, start: int, end: int) -> bool:
    return end - start >= 4 and text[end - 4 : end].isdigit()


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    lookups = _Lookups()
    for found in _P.run.finditer(text):
        if found.end() - found.start() >= 7:
            if lookups.windows <= 0:
                if sum(map(str.isdigit, found[0])) >= 7:
                    yield Finding(found.start(), found.end(), "ACCOUNT", 0.5)
                continue
            yield from _run(_Run(text, found.start(), found.end()), lookups)


def _run(run: _Run, lookups: _Lookups) -> Iterator[Finding]:
    lengths = run.lengths
    n = len(lengths)
    total = sum(lengths)
    if total < 7:
        return
    lookups.windows -= 1
    # A run that fits is judged as a whole first: its gaps suggest that it is one number.
    if n <= 19 and total <= 19:
        whole = _judge(run, 0, n, lookups)
        if whole:
            yield whole
            return
        if n == 1:
            return
        if n >= 9 and max(lengths) <= 2:
            yield from _spelled(run)
            return
    i = 0
    while i < n:
        best = None
        size = 0
        if lengths[i] > 1 or lengths[i : i + 2] in ((1, 2), (1, 3)):
            # A single digit begins +1 415 ..., 1-800-... and a French number, and nothing else.
            for j in range(i + 1, min(n, i + 7) + 1):
                size += lengths[j - 1]
                if size > 19:
                    break
                if size < 7 or not _worth(run, i, j):
                    continue
                lookups.windows -= 1
                if lookups.windows <= 0:
                    yield Finding(run.groups[i][0], run.groups[-1][1], "ACCOUNT", 0.5)
                    return
                one = _judge(run, i, j, lookups)
                if one and (best is None or one.checked >= best[0].checked):
                    best = (one, j)
        if best:
            yield best[0]
            i = best[1]
        else:
            i += 1


@functools.lru_cache(maxsize=65536)
def _known_form(lengths: tuple[int, ...]) -> bool:
    """Whether there is a rule for numbers grouped like this."""
    return (
        (len(lengths) == 1 and lengths[0] in (11, 13, 14, 15, 16, 17, 18, 19))
        or lengths in _CARD_GROUPS
        or lengths in _ID_GROUPS
        or lengths in _ID_X_GROUPS
        or lengths in _MOBILE_FORMS
        or lengths in _NATIONAL
        or lengths in ((3, 3, 4), (1, 3, 3, 4), (3, 4, 3))
    )


def _worth(run: _Run, i: int, j: int) -> bool:
    """Whether a window of a longer run can be a number of some kind: the cheap half of judging it."""
    if _known_form(run.lengths[i:j]):
        return True
    at = run.groups[i][0]
    return (
        run.text[at] == "0"
        or run.text[max(0, at - 2) : at].strip(" ")[-1:] in ("+", "(")
        or i == 0
        or j - i == 1
    )


def _spelled(run: _Run) -> Iterator[Finding]:
    """Digits with a gap after every one or two: cards and identity cards."""
    n = len(run.lengths)
    digits = run.digits(0, n)
    start, end = run.groups[0][0], run.groups[-1][1]
    if len(digits) == 18:
        good = checksums.cn_id(digits)
        if good is not None:
            yield Finding(start, end, "IDCARD", 1.0 if good else 0.8, checked=good)
            return
    if len(digits) == 17:
        tail = _P.x.match(run.text, end)
        good = checksums.cn_id(digits + "X")
        if tail and good is not None:
            yield Finding(start, tail.end(), "IDCARD", 1.0 if good else 0.8, checked=good)
            return
    if checksums.card(digits):
        yield Finding(start, end, "CARD", 0.9, checked=True)


def _judge(run: _Run, i: int, j: int, lookups: _Lookups) -> Finding | None:
    text = run.text
    start, end = run.groups[i][0], run.groups[j - 1][1]
    if not _stands_alone(text, start, end):
        return None
    one = _window(run, i, j)
    if one is not None:
        return one
    two = _phone(run, i, j, lookups)
    if two and not two.checked and run.in_a_part_number(i):
        return None
    if two is not None:
        more = _P.word_extension.match(text, two.end)
        if more is None and run.lengths[i:j][0] in (3, 4) and text[start] == "0":
            more = _P.extension.match(text, two.end)
        if more and two.end == end:
            return Finding(two.start, more.end(), "PHONE", two.score, two.checked)
    return two

"""Checks of values by themselves: digits, dates and the tables that their issuers publish.

Those that python-stdnum has are asked there (:func:`valid`). These are checked here: 身份证, because
``stdnum.cn.ric`` refuses valid numbers by its tables of counties; the head of a 统一社会信用代码, because
``stdnum.cn.uscc`` refuses departments that are letters; addresses in Base58, because ``stdnum.bitcoin``
knows no other currency; and what it does not have: the first parts of payment cards, identity cards of Hong
Kong and Taiwan, vehicle numbers.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
from typing import Any

from sllm.extras import needs

__all__ = [
    "base58check",
    "card",
    "cn_id",
    "cn_id_15",
    "hk_id",
    "real_date",
    "tw_id",
    "uscc",
    "valid",
    "vin",
]

# 省级 codes of GB/T 2260, with Taiwan, Hong Kong, Macau, and 91 (of foreign permanent residents: 9).
_PROVINCES_TEXT = (
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 "
    "82 83 91 93"
)
_PROVINCES = frozenset(_PROVINCES_TEXT.split())


@functools.cache
def _stdnum(module: str) -> Any:
    """``stdnum.<module>``, imported on first use: it takes a while, and most texts need none of it."""
    with needs("privacy"):
        return importlib.import_module(f"stdnum.{module}")


@functools.lru_cache(maxsize=4096)
def valid(scheme: str, number: str) -> bool:
    """Whether a number is one of a scheme.

    Args:
        scheme: a check of this module (``tw_id``, ``uscc``, ``vin``), or the module of ``stdnum`` that knows
            the scheme: ``luhn``, ``fr.nir``.
        number: with or without separators.

    Raises:
        ImportError: python-stdnum is not installed.

    """
    own = {"tw_id": tw_id, "uscc": uscc, "vin": vin}.get(scheme)
    if scheme in ("luhn", "verhoeff"):  # those take digits alone
        number = "".join(filter(str.isdigit, number))
    return own(number) if own else bool(_stdnum(scheme).is_valid(number))


def card(digits: str) -> bool:
    """A Luhn number of a length and with a first part that payment cards have."""
    n = len(digits)
    if not 13 <= n <= 19 or len(set(digits)) < 2:
        return False
    first2, first4 = int(digits[:2]), int(digits[:4])
    known = (
        (digits[0] == "4" and n in (13, 16, 19))
        or (51 <= first2 <= 55 and n == 16)
        or (2221 <= first4 <= 2720 and n == 16)
        or (first2 in (34, 37) and n == 15)
        or (first2 in (30, 36, 38, 39) and n in (14, 16, 19))
        or (first2 == 35 and 16 <= n <= 19)
        or (first4 in (1800, 2131) and n == 15)
        or (first2 in (60, 62, 64, 65, 81) and n >= 16)
        or (first2 in (50, 56, 57, 58, 63, 67) and n in (13, 15, 16, 18, 19))
        or (2200 <= first4 <= 2204 and n >= 16)
        # Domestic debit cards of Chinese banks from before UnionPay's 62.
        or (n >= 16 and first2 in (43, 45, 49, 53, 54, 55, 68, 69, 84, 87, 88, 90, 95, 99))
    )
    return known and valid("luhn", digits)


def real_date(year: str, month: str, day: str, *, since: int = 1890) -> bool:
    """Whether there was or will soon be such a day (year of four digits)."""
    try:
        return since <= datetime.date(int(year), int(month), int(day)).year <= 2035
    except ValueError:
        return False


def cn_id(number: str) -> bool | None:
    """身份证 of 18 characters (GB 11643): True if ISO 7064 mod 11-2 agrees, False if only the rest does, None
    if region or date cannot be.
    """
    if number[:2] not in _PROVINCES or not real_date(number[6:10], number[10:12], number[12:14]):
        return None
    rest = 0
    for digit in number[:17]:
        rest = (rest + int(digit)) * 2 % 11
    return (rest + (10 if number[17] in "xX" else int(number[17]))) % 11 == 1


def cn_id_15(number: str) -> bool:
    """身份证 of the first generation, 15 digits without a checksum: region and date can be."""
    return number[:2] in _PROVINCES and real_date("19" + number[6:8], number[8:10], number[10:12])


def uscc(code: str) -> bool:
    """统一社会信用代码 (GB 32100): department, kind and region can be, and the last character agrees.

    Args:
        code: 18 digits and letters, but I, O, S, V and Z.

    """
    code = code.upper()
    if code[0] not in "123456789AGNY" or code[2:4] not in _PROVINCES or not code[2:8].isdigit():
        return False
    return bool(_stdnum("cn.uscc").calc_check_digit(code[:17]) == code[17])


_VIN_VALUES = dict(
    zip("ABCDEFGHJKLMNPRSTUVWXYZ0123456789", "12345678123457923456789" + "0123456789", strict=True)
)
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def vin(code: str) -> bool:
    """ISO 3779 vehicle number whose ninth character agrees (North America, China)."""
    if (
        len(set(code)) < 4
        or not 2 <= sum(map(str.isalpha, code)) <= 14
        or code not in (code.upper(), code.lower())
    ):
        return False
    code = code.upper()
    total = sum(int(_VIN_VALUES[char]) * weight for char, weight in zip(code, _VIN_WEIGHTS, strict=True))
    return code[8] == "0123456789X"[total % 11]


def hk_id(letters: str, digits: str, check: str) -> bool:
    """Identity card of Hong Kong: one or two letters, six digits, a check character 0-9 or A."""
    values = (
        [36] * (2 - len(letters)) + [ord(char) - 55 for char in letters.upper()] + [int(d) for d in digits]
    )
    total = sum(value * weight for value, weight in zip(values, range(9, 1, -1), strict=True))
    return (total + (10 if check in "aA" else int(check))) % 11 == 0


_TW_LETTERS = "ABCDEFGHJKLMNPQRSTUVXYWZIO"


def tw_id(code: str) -> bool:
    """Identity card of Taiwan: a letter and nine digits."""
    first = _TW_LETTERS.find(code[0].upper()) + 10
    digits = [first // 10, first % 10, *map(int, code[1:])]
    return sum(d * w for d, w in zip(digits, (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1), strict=True)) % 10 == 0


_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def base58check(text: str) -> bool:
    """A text whose last four bytes are the start of the double SHA-256 of the others (Bitcoin, Tron)."""
    number = 0
    for char in text:
        number = number * 58 + _BASE58.index(char)
    if number.bit_length() > 200:
        return False
    data = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(data[:-4]).digest()).digest()[:4] == data[-4:]

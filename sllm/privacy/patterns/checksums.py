"""Checks of values by themselves: digits, dates and the tables that their issuers publish.

Those that python-stdnum has are asked there (imported on first use); 身份证 is checked here, because
``stdnum.cn.ric`` refuses valid numbers by its tables of counties.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib

__all__ = [
    "base58check",
    "card",
    "cn_id",
    "cn_id_15",
    "hk_id",
    "iban",
    "luhn",
    "mod97",
    "real_date",
    "stdnum_valid",
    "tw_id",
    "uscc",
    "verhoeff",
    "vin",
]

_LUHN_DOUBLE = str.maketrans("0123456789", "0246813579")
# 省级 codes of GB/T 2260, with Taiwan, Hong Kong, Macau, and 91 (of foreign permanent residents: 9).
_PROVINCES_TEXT = (
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 "
    "82 83 91 93"
)
_PROVINCES = frozenset(_PROVINCES_TEXT.split())


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B."""
    total = sum(map(int, digits[-1::-2])) + sum(map(int, digits[-2::-2].translate(_LUHN_DOUBLE)))
    return total % 10 == 0


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
    return known and luhn(digits)


def real_date(year: str, month: str, day: str, *, since: int = 1890) -> bool:
    """Whether there was or will soon be such a day."""
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


_USCC_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"


def uscc(code: str) -> bool:
    """统一社会信用代码 (GB 32100): department, kind and region can be, and the last character agrees."""
    code = code.upper()
    if code[0] not in "123456789AGNY" or code[2:4] not in _PROVINCES or not code[2:8].isdigit():
        return False
    total = 0
    for i, char in enumerate(code[:17]):
        value = _USCC_ALPHABET.find(char)
        if value < 0:
            return False
        total += value * (3**i % 31)
    return _USCC_ALPHABET.find(code[17]) == (31 - total % 31) % 31


def mod97(text: str) -> bool:
    """ISO 7064 mod 97-10 over an IBAN."""
    return int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def iban(text: str) -> bool:
    """An IBAN without separators, in capitals: the checksum, and length and form of its country."""
    return mod97(text) and stdnum_valid("iban", text)


@functools.lru_cache(maxsize=4096)
def stdnum_valid(module: str, number: str) -> bool:
    """``is_valid`` of ``stdnum.<module>``."""
    return bool(importlib.import_module(f"stdnum.{module}").is_valid(number))


_VERHOEFF_TURNS = [
    "0123456789",
    "1576283094",
    "5803796142",
    "8916043527",
    "9453126870",
    "4286573901",
    "2793806415",
    "7046913258",
]


def verhoeff(digits: str) -> bool:
    """The scheme of J. Verhoeff (1969) over the dihedral group of order 10: Aadhaar."""
    check = 0
    for i, digit in enumerate(reversed(digits)):
        check = _dihedral(check, int(_VERHOEFF_TURNS[i % 8][int(digit)]))
    return check == 0


def _dihedral(a: int, b: int) -> int:
    """The product of two elements of the dihedral group: 0-4 turns, 5-9 reflections."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
    return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5


_VIN_VALUES = dict(
    zip("ABCDEFGHJKLMNPRSTUVWXYZ0123456789", "12345678123457923456789" + "0123456789", strict=True)
)
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def vin(code: str) -> bool:
    """ISO 3779 vehicle number whose ninth character agrees (North America, China)."""
    code = code.upper()
    if len(set(code)) < 4:
        return False
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

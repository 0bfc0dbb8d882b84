"""Checks of values by themselves: those of python-stdnum, and what it does not have.

``stdnum.cn.ric`` refuses valid 身份证 by its tables of counties, ``stdnum.cn.uscc`` departments that are
letters and ``stdnum.bitcoin`` other currencies: of these only the checksum is taken. It knows no identity
cards of Hong Kong and Taiwan and no vehicle numbers.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import ipaddress
import string
from typing import TYPE_CHECKING, Any

from sllm.extras import needs
from sllm.privacy.patterns.secrets import is_coded, is_key, is_lone_secret, looks_random
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["valid"]

_P = Patterns("numbers")


@functools.cache
def _stdnum(module: str) -> Any:
    """``stdnum.<module>``, imported on first use: it takes a while, and most texts need none of it."""
    with needs("privacy"):
        return importlib.import_module(f"stdnum.{module}")


@functools.lru_cache(maxsize=4096)
def valid(scheme: str, number: str) -> bool:
    """Whether a number is one of a scheme.

    Args:
        scheme: a check of this module (:data:`_OWN`), or the module of ``stdnum`` that knows the scheme:
            ``luhn``, ``fr.nir``.
        number: with or without separators.

    Raises:
        ImportError: python-stdnum is not installed.

    """
    if scheme in _AS_WRITTEN:
        return _AS_WRITTEN[scheme](number)
    plain = "".join(filter(str.isalnum, number))
    if scheme in _OWN:
        return _OWN[scheme](plain)
    return bool(_stdnum(scheme).is_valid(plain if scheme in ("luhn", "verhoeff") else number))


def _card(number: str) -> bool:
    """A payment card: a length and first digits that those have, and a Luhn number."""
    return _P.card_number.fullmatch(number) is not None and valid("luhn", number)


def _date(number: str) -> bool:
    """YYYYMMDD is a day on which somebody living can be born or that will come soon."""
    try:
        return 1890 <= datetime.datetime.strptime(number, "%Y%m%d").year <= 2035
    except ValueError:
        return False


def _cn_id_form(number: str) -> bool:
    """身份证 (GB 11643): region and date can be; of the first generation, 15 digits, there is no checksum."""
    date = f"19{number[6:12]}" if len(number) == 15 else number[6:14]
    return _P.cn_province.match(number) is not None and _date(date)


def _cn_id(number: str) -> bool:
    """身份证 of 18 characters of which ISO 7064 mod 11-2 agrees, too."""
    return _cn_id_form(number) and _stdnum("cn.ric").calc_check_digit(number) == number[-1].upper()


def _uscc(code: str) -> bool:
    """统一社会信用代码 (GB 32100): department, kind and region can be, and the last character agrees."""
    code = code.upper()
    return (
        _P.company_number.fullmatch(code) is not None
        and _P.cn_province.match(code, 2) is not None
        and _stdnum("cn.uscc").calc_check_digit(code[:17]) == code[17]
    )


def _weighed(values: Iterable[int], weights: Iterable[int]) -> int:
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


_VIN_VALUES = dict(
    zip(
        "ABCDEFGHJKLMNPRSTUVWXYZ" + string.digits,
        map(int, "12345678123457923456789" + string.digits),
        strict=True,
    )
)


def _vin(code: str) -> bool:
    """ISO 3779 vehicle number whose ninth character agrees (North America, China)."""
    values = [_VIN_VALUES[char] for char in code.upper()]
    rest = _weighed(values, (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)) % 11
    return "0123456789X"[rest] == code[8].upper()


def _hk_id(code: str) -> bool:
    """Identity card of Hong Kong: one or two letters, six digits, a check character 0-9 or A."""
    values = [int(char, 36) for char in code]
    return _weighed([36] * (9 - len(values)) + values, range(9, 0, -1)) % 11 == 0


def _tw_id(code: str) -> bool:
    """Identity card of Taiwan: a letter and nine digits."""
    first = "ABCDEFGHJKLMNPQRSTUVXYWZIO".find(code[0].upper()) + 10
    return _weighed([*divmod(first, 10), *map(int, code[1:])], (1, *range(9, 0, -1), 1)) % 10 == 0


def _base58check(text: str) -> bool:
    """Base58 whose last four bytes are the start of the double SHA-256 of the others (Bitcoin, Tron)."""
    data = _stdnum("bitcoin").b58decode(text)
    double = hashlib.sha256(hashlib.sha256(data[:-4]).digest()).digest()
    return len(data) == 25 and double[:4] == data[-4:]


def _ipv6(address: str) -> bool:
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


_OWN: dict[str, Callable[[str], bool]] = {
    "base58check": _base58check,
    "card": _card,
    "cn_id": _cn_id,
    "cn_id_form": _cn_id_form,
    "date": _date,
    "hk_id": _hk_id,
    "tw_id": _tw_id,
    "uscc": _uscc,
    "vin": _vin,
}
_AS_WRITTEN: dict[str, Callable[[str], bool]] = {
    "coded": is_coded,
    "ipv6": _ipv6,
    "key": is_key,
    "lone secret": is_lone_secret,
    "random": looks_random,
}

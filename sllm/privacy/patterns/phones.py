"""Which digits are a telephone number: forms first, the tables of phonenumberslite only for what is left."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["international", "national"]

# Where numbers without a country code are most often from; asked in this order.
REGIONS = (
    "CN",
    "GB",
    "FR",
    "DE",
    "JP",
    "KR",
    "TW",
    "AU",
    "IT",
    "IN",
    "BR",
    "NL",
    "ES",
    "CH",
    "MX",
    "ZA",
    "TR",
    "PK",
)
MOBILE_REGIONS = ("GB", "FR", "DE", "JP", "KR", "TW", "AU", "ZA", "TR", "PK", "NL", "CH")


@functools.cache
def _library() -> Any:
    import phonenumbers

    return phonenumbers


@functools.lru_cache(maxsize=8192)
def international(digits: str) -> bool:
    """Whether the digits behind a plus sign are a valid number of some country."""
    lib = _library()
    try:
        return bool(lib.is_valid_number(lib.parse("+" + digits)))
    except lib.NumberParseException:
        return False


@functools.lru_cache(maxsize=8192)
def national(digits: str, *, mobile: bool = False) -> bool:
    """Whether the digits, written as at home, are a valid number of one of :data:`REGIONS`; with ``mobile``
    a mobile number.
    """
    lib = _library()
    regions: Iterable[str] = MOBILE_REGIONS if mobile else REGIONS
    for region in regions:
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

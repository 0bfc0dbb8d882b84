"""Whether a place in a text is code or configuration, where a label such as ``name:`` is seldom of people."""

from __future__ import annotations

import re

from sllm.privacy import data
from sllm.privacy.regex import lazy

__all__ = ["in_code"]

# How far from a place lines are read: the head of a file or a block, and what follows.
_BEFORE = 512
_AFTER = 512


def _pattern() -> str:
    table = data.table("code")
    keys = "|".join(table["keys"])
    return (
        rf"^[ \t]*(?:{'|'.join(table['lines'])})"
        rf"|(?:^[ \t]*(?:- )?|[{{,][ ]?)[\"']?(?:{keys})[\"']?[ ]?[:=](?!=)"
        rf"|<(?:{keys})>"
    )


# A line that only code has, or a key that only configuration has.
_CODE = lazy(_pattern, re.M)
# What is said of people: the value has a digit, or is an address.
_OF_PEOPLE = lazy(
    r"(?:phone|mobile|tel|fax|e-?mail|dob|birth[a-z_ ]{0,8}|address|ssn|passport|gender|sex|age|mrn|salary)"
    r"[\"']?[ ]?[:=]"
    r"[ ]?[\"']?(?:[^\n,;]{0,32}[0-9@]|(?:fe)?male)",
    re.I,
)


def in_code(text: str, at: int) -> bool:
    """Whether the lines around an offset are code or configuration, and not a record of somebody."""
    low, high = max(0, at - _BEFORE), at + _AFTER
    low = text.find("\n", low, at) + 1 if low else 0
    return _CODE.search(text, low, high) is not None and _OF_PEOPLE.search(text, low, high) is None

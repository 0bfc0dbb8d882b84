"""Postal addresses in Chinese: built of parts, each a name and what it is the name of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy.findings import Budget, Finding
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("chinese")

_MAX_NAME = 12
_MAX_PARTS = 500
_INNER = "室舍栋幢座层楼元户"


def _name_start(text: str, low: int, marker: int) -> int:
    """Where the name before a suffix begins: after the last word that cannot be part of it."""
    low = max(low, marker - _MAX_NAME)
    name = text[low:marker]
    stop = _P.stop.match(name)
    cut = stop.end() if stop else 0
    known = _P.start.search(name, cut) or _P.start.search(name)
    return low + (known.start() if known else max(cut, *(name.rfind(sign) + 1 for sign in " ()（）-–·")))


def _joins(text: str, address: list[re.Match[str]], part: re.Match[str]) -> bool:
    """Whether a part belongs to an address: a name of up to twelve characters stands between two of them, and
    nothing that ends an address, other than at the end of that; a number follows at once.
    """
    between = text[address[-1].end() : part.start()]
    stop = _P.stop.match(between)
    if part.lastgroup == "number":
        # 22号南京大学3舍: a building with a name of its own.
        numbered = any(one.lastgroup == "number" for one in address)
        inner = numbered and len(between) <= 10 and part[0][-1] in _INNER and not stop
        return len(between) <= 2 or inner
    ends = stop and not between.startswith(("和", "过")) and stop.end() < len(between)
    return len(between) <= _MAX_NAME and not ends


def _found(text: str, first: int, address: list[re.Match[str]], end: int) -> Iterator[Finding]:
    """The address, if it is one: a place that many people share is not private, it needs a house, or three
    levels.
    """
    kinds = [part.lastgroup for part in address]
    numbers, areas = kinds.count("number"), kinds.count("area")
    roads, places = "road" in kinds, "place" in kinds
    good = (numbers and (roads or places or areas >= 2)) or areas >= 3 or (areas and roads and places)
    good = good or (areas >= 2 and (roads or places))
    last = address[-1].end() if address else first
    room = _P.room.match(text, last, end)
    if room and (roads or places):
        good = good or room[0][-1] in "室号房户"
    if not good:
        return
    # 5樓之2: a part of a floor; a postal code on either side.
    for more in (_P.room, _P.flat, _P.code_after):
        found = more.match(text, last, end)
        last = found.end() if found else last
    code = _P.code_before.search(text, max(0, first - 7), first)
    yield Finding(code.start() if code else first, last, "ADDRESS", 0.8)


def _in_stretch(text: str, start: int, end: int, budget: Budget) -> Iterator[Finding]:
    address: list[re.Match[str]] = []
    first = low = start
    for n, part in enumerate(_P.part.finditer(text, start, end)):
        if not budget.spend(start):
            return
        if n >= _MAX_PARTS:
            # Nobody writes that many without a full stop: all of it counts, at no further cost.
            yield Finding(start, end, "ADDRESS", 0.5)
            return
        if address and not _joins(text, address, part):
            yield from _found(text, first, address, end)
            address = []
        if not address:
            # A number begins no address, except one whose name stands before it: 幸福3栋.
            first = part.start() if part.lastgroup == "number" else _name_start(text, low, part.start())
            if first == part.start():
                low = start
                continue
        address.append(part)
        low = part.end()
    yield from _found(text, first, address, end)


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    if text.isascii():
        return
    budget = Budget(text)
    for stretch in _P.stretch.finditer(text):
        if len(stretch[0]) >= 4 and _P.needed.search(text, *stretch.span()):
            yield from _in_stretch(text, *stretch.span(), budget)
            if budget.spent:
                break
    yield from budget.rest("ADDRESS")

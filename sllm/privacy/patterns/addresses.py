"""Postal addresses in Chinese: built of parts, each a name and what it is the name of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy.findings import Budget, Finding
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("chinese")


_MAX_NAME = 12
_MAX_PARTS = 500
_INNER = frozenset("室舍栋幢座层楼元户")


def _name_start(text: str, low: int, marker: int) -> int:
    """Where the name before a suffix begins: after the last word that cannot be part of it."""
    low = max(low, marker - _MAX_NAME)
    name = text[low:marker]
    stop = _P.stop.match(name)
    cut = stop.end() if stop else 0
    known = _P.start.search(name, cut) or _P.start.search(name)
    if known:
        return low + known.start()
    for i in range(len(name) - 1, cut - 1, -1):
        if name[i] in " ()（）-–·":
            cut = i + 1
            break
    return low + cut


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    if text.isascii():
        return
    budget = Budget(text)
    for stretch in _P.stretch.finditer(text):
        if stretch.end() - stretch.start() >= 4 and _P.needed.search(text, *stretch.span()):
            yield from _in_stretch(text, stretch.start(), stretch.end(), budget)
            if budget.spent:
                break
    yield from budget.rest("ADDRESS")


def _in_stretch(text: str, start: int, end: int, budget: Budget) -> Iterator[Finding]:
    first = last = -1  # the address being built
    score: list[str] = []
    for n, part in enumerate(_P.part.finditer(text, start, end)):
        if not budget.spend(start):
            return
        if n >= _MAX_PARTS:
            # Nobody writes that many without a full stop: all of it counts, at no further cost.
            yield Finding(start, end, "ADDRESS", 0.5)
            return
        kind = part.lastgroup or ""
        gap = part.start() - last if last >= 0 else 0
        # A name of up to twelve characters stands between two suffixes; a number follows at once.
        joins = last >= 0 and (gap <= 2 if kind == "number" else gap <= _MAX_NAME)
        if kind == "number" and not joins and last >= 0 and gap <= 10 and part["number"][-1:] in _INNER:
            # 22号南京大学3舍: a building with a name of its own.
            joins = "number" in score and not _P.stop.match(text[last : part.start()])
        if joins and kind != "number":
            between = text[last : part.start()]
            stop = _P.stop.match(between)
            # Nothing that ends an address stands between the parts, other than at their end.
            joins = not stop or between.startswith(("和", "过")) or stop.end() in (0, len(between))
        if not joins:
            done = _finish(text, first, last, score, end)
            if done:
                yield done
            if kind == "number":
                # A number begins no address, except one whose name stands before it: 幸福3栋.
                first, last, score = -1, -1, []
                continue
            first = _name_start(text, start if last < 0 else last, part.start())
            score = []
            if part.start() - first < 1:
                first, last = -1, -1
                continue
        last = part.end()
        score.append(kind)
    done = _finish(text, first, last, score, end)
    if done:
        yield done


def _finish(text: str, first: int, last: int, parts: list[str], end: int) -> Finding | None:
    if first < 0 or not parts:
        return None
    numbers, areas = parts.count("number"), parts.count("area")
    roads, places = parts.count("road"), parts.count("place")
    # A place that many people share is not private: it needs a house, or three levels.
    good = (
        (numbers and (roads or places))
        or (numbers and areas >= 2)
        or (areas >= 2 and (roads or places))
        or (areas and roads and places)
        or areas >= 3
    )
    room = _P.room.match(text, last, end)
    if room and (roads or places or numbers) and room[0].strip(" -"):
        if not good and (roads or places) and room[0][-1:] in "室号房户":
            good = True
        if good:
            last = room.end()
    if not good:
        return None
    # 5樓之2: a part of a floor; a postal code on either side.
    for more in (_P.flat, _P.code_after):
        found = more.match(text, last, end)
        last = found.end() if found else last
    code = _P.code_before.search(text[max(0, first - 7) : first])
    if code:
        first -= len(code[0])
    return Finding(first, last, "ADDRESS", 0.8)

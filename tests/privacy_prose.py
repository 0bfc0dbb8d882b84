"""Sentences of prose, written by hand, in which the names of people are marked: ``privacy/prose_*.txt``.

Five styles, and of each some sentences that name nobody. They were written before anything was measured on
them, and nothing is tuned to them; all people are invented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(r"⟦([^⟦⟧]+)⟧")


@dataclass(frozen=True)
class Sentence:
    """A sentence, its style, and the ranges of the names in it."""

    text: str
    style: str
    names: tuple[tuple[int, int], ...]


def sentences(language: str, *, clean: bool) -> list[Sentence]:
    """Those with names, or those without."""
    found = []
    style = ""
    path = Path(__file__).parent / "privacy" / f"prose_{language}.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            style = line.removeprefix("== ")
        elif line and not line.startswith("#") and style.startswith("clean ") == clean:
            text, last = "", 0
            names = []
            for mark in _MARK.finditer(line):
                text += line[last : mark.start()]
                names.append((len(text), len(text) + len(mark[1])))
                text += mark[1]
                last = mark.end()
            found.append(Sentence(text + line[last:], style.removeprefix("clean "), tuple(names)))
    return found

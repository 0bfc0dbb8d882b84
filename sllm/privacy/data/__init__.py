"""The rules, patterns and word lists that detectors run on: what is a fact of the world and not of the code.

``*.txt`` are lists of words separated by white space; ``*.json`` are tables; ``*.ini`` hold patterns and
rules, a value in one line or in several, which are joined without a gap (a space at the end of a line is
written ``[ ]``). Lines that begin with ``#`` are comments. All are read when the first text is searched.
"""

from __future__ import annotations

import configparser
import functools
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["sections", "table", "word_set", "words"]

_HERE = Path(__file__).parent


def words(name: str) -> list[str]:
    """The words of ``<name>.txt``, in their order."""
    lines = (_HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return " ".join(line for line in lines if not line.startswith("#")).split()


@functools.cache
def table(name: str) -> dict[str, Any]:
    """The rules of ``<name>.json``."""
    rules: dict[str, Any] = json.loads((_HERE / f"{name}.json").read_text(encoding="utf-8"))
    return rules


@functools.cache
def word_set(name: str, key: str) -> frozenset[str]:
    """A list of ``<name>.json``, to look words up in."""
    return frozenset(table(name)[key])


def _from_lists(verb: str, names: str) -> str:
    """What ``<<VERB LIST ...>>`` in a pattern stands for: of the words of some lists, with ``any``
    alternatives, with ``chars`` their characters and with ``heads`` their first ones, as in a class; with
    ``tails`` alternatives of the rest of a word after its first character.
    """
    listed = sorted({word for name in names.split() for word in words(name)})
    listed.sort(key=len, reverse=True)
    if verb == "any":
        return f"(?:{'|'.join(listed)})"
    if verb == "tails":
        return "|".join(f"{word[1:]}(?<={word})" for word in listed)
    return "".join(sorted({char for word in listed for char in (word if verb == "chars" else word[0])}))


@functools.cache
def sections(name: str) -> dict[str, dict[str, str]]:
    """The sections of ``<name>.ini``, each with its values; ``<<part>>`` in a value stands for the value of
    that name in the section ``parts``, which may name others above it, and ``<<any LIST>>`` for words.
    """
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.read_string((_HERE / f"{name}.ini").read_text(encoding="utf-8"))
    parts: dict[str, str] = {}

    def whole(value: str) -> str:
        value = re.sub("<<([a-z]+) ([a-z_ ]+)>>", lambda part: _from_lists(*part.groups()), value)
        return re.sub("<<([a-z0-9_]+)>>", lambda part: parts[part[1]], value)

    joined = {
        section: {key: value.replace("\n", "") for key, value in parser.items(section)}
        for section in sorted(parser.sections(), key=lambda section: section != "parts")
    }
    for key, value in joined.pop("parts", {}).items():
        parts[key] = whole(value)
    return {
        section: {key: whole(value) for key, value in values.items()} for section, values in joined.items()
    }

"""The rules and word lists that detectors run on: what is a fact of the world and not of the code.

``*.json`` are tables of rules; ``*.txt`` are lists of words separated by white space, with comments in lines
that begin with ``#``. They are read when the first text is searched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["table", "words"]

_HERE = Path(__file__).parent


def words(name: str) -> list[str]:
    """The words of ``<name>.txt``, in their order."""
    lines = (_HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return " ".join(line for line in lines if not line.startswith("#")).split()


def table(name: str) -> dict[str, Any]:
    """The rules of ``<name>.json``."""
    rules: dict[str, Any] = json.loads((_HERE / f"{name}.json").read_text(encoding="utf-8"))
    return rules

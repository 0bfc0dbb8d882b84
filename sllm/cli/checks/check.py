"""What a check of ``sllm doctor`` has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAILED", "NOTE", "OK", "Check"]

OK, NOTE, FAILED = "ok", "note", "failed"


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: of the check, a word or two.
        status: ``"ok"``, ``"note"`` (works, and could be better) or ``"failed"``.
        summary: a line.
        details: more, in values that JSON has.
        advice: what to do about it, if anything.

    """

    name: str
    status: str
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)
    advice: str | None = None

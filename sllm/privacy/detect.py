"""Finding what is private in a text: by pattern, by the words around it, by a model.

Detectors look at a plain view of the text (:mod:`sllm.privacy.text`) and hand back offsets of the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy.findings import KINDS, Detector, Finding, LabelScorer
from sllm.privacy.names.detectors import ModelDetector, NameDetector
from sllm.privacy.patterns import addresses, chinese, labels, passwords, phrases
from sllm.privacy.patterns import codes as tokens
from sllm.privacy.patterns import numbers as digits
from sllm.privacy.text import plain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = [
    "KINDS",
    "Detector",
    "Finding",
    "LabelScorer",
    "ModelDetector",
    "NameDetector",
    "PatternDetector",
    "default_detectors",
    "union",
]

_SCANNERS = (tokens, digits, labels, passwords, phrases, chinese, addresses)


class PatternDetector:
    """Everything that a form, a checksum or a label gives away; deterministic, in time linear in the text.

    Args:
        kinds: which of :data:`KINDS` to look for; None is all.
        min_score: findings below it are left out.

    Raises:
        ValueError: a kind that no pattern names.

    """

    def __init__(self, kinds: Collection[str] | None = None, *, min_score: float = 0.0) -> None:
        unknown = sorted(set(kinds or ()) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; known are {sorted(KINDS)}")
        self._kinds = None if kinds is None else frozenset(kinds)
        self._min_score = min_score

    def detect(self, text: str) -> list[Finding]:
        """Findings in the order of their starts; they may overlap."""
        view = plain(text)
        found = []
        for scanner in _SCANNERS:
            for one in scanner.scan(view.text):
                if self._kinds is not None and one.kind not in self._kinds:
                    continue
                if one.score < self._min_score or one.end <= one.start:
                    continue
                if view.offsets is None:
                    found.append(one)
                    continue
                start, end = view.span(one.start, one.end)
                found.append(Finding(start, end, one.kind, one.score, one.checked))
        return sorted(found, key=lambda one: (one.start, -one.end))


def default_detectors() -> tuple[Detector, ...]:
    """What is used where no detectors are named: patterns, and names by context."""
    return PatternDetector(), NameDetector()


def union(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that overlap made one: together they are its range; the longest gives the kind, and one whose
    value was checked comes before all that were not.
    """
    merged: list[Finding] = []
    best: tuple[bool, int, float] = (False, 0, 0.0)
    for one in sorted(findings, key=lambda one: (one.start, -one.end)):
        rank = (one.checked, one.end - one.start, one.score)
        if merged and one.start < merged[-1].end:
            last = merged[-1]
            lead = one if rank > best else last
            best = max(best, rank)
            merged[-1] = Finding(last.start, max(last.end, one.end), lead.kind, lead.score, lead.checked)
        else:
            merged.append(one)
            best = rank
    return merged

"""Presidio's analyzer as a detector; needs the extra ``presidio`` (``pip install 'sllm[presidio]'``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from sllm.extras import needs
from sllm.privacy import data
from sllm.privacy.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PresidioDetector"]


class _Analyzer(Protocol):
    def analyze(self, *, text: str, language: str) -> Sequence[Any]: ...


class PresidioDetector:
    """What a Presidio ``AnalyzerEngine`` finds, under the kinds used here.

    Args:
        analyzer: the engine; anything with its ``analyze(text=..., language=...)``. None makes one, which
            loads Presidio's default language model.
        languages: each is asked in turn.
        min_score: results below it are left out.
        kinds: entity type -> kind, or None to leave the type out; added to the built-in table. Types in
            neither keep their own name, letters only. Dates, plain URLs and NRP are left out unless named
            here.

    Raises:
        ImportError: no analyzer was given and ``presidio_analyzer`` is not installed.

    """

    def __init__(
        self,
        analyzer: _Analyzer | None = None,
        *,
        languages: Sequence[str] = ("en",),
        min_score: float = 0.4,
        kinds: Mapping[str, str | None] | None = None,
    ) -> None:
        if analyzer is None:
            with needs("presidio"):
                from presidio_analyzer import AnalyzerEngine
            analyzer = AnalyzerEngine()
        self._analyzer: _Analyzer = analyzer
        self._languages = tuple(languages)
        self._min_score = min_score
        self._kinds: dict[str, str | None] = {**data.table("presidio")["kinds"], **(kinds or {})}

    def detect(self, text: str) -> list[Finding]:
        """Findings in the order in which Presidio returned them."""
        found = []
        for language in self._languages:
            for result in self._analyzer.analyze(text=text, language=language):
                entity = str(result.entity_type)
                kind = self._kinds.get(entity, re.sub("[^A-Z]", "", entity.upper())[:16])
                score = float(result.score)
                if kind and score >= self._min_score:
                    found.append(Finding(int(result.start), int(result.end), kind, min(score, 1.0)))
        return found

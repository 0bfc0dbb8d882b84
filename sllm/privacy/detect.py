"""Detection of private values in a text: by patterns, by the words around them, by a model.

Detectors search a plain view of the text (:mod:`sllm.privacy.text`) and return offsets in the original.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex

from sllm.errors import LeakError
from sllm.extras import needs
from sllm.privacy.findings import KINDS, LITERAL, Detector, Finding, in_original
from sllm.privacy.names import census, lac
from sllm.privacy.names.census import CensusDetector
from sllm.privacy.names.detectors import NameDetector
from sllm.privacy.names.tagger import TaggerDetector
from sllm.privacy.patterns import addresses, labels, numbers, rules, secrets
from sllm.privacy.regex import lazy
from sllm.privacy.text import decoded, encoded, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from sllm.privacy.findings import Reach

__all__ = ["PatternDetector", "blank", "default_detectors", "detect_all", "search", "union"]

_RULES = ("codes", "labels", "chinese", "addresses", "secrets")
_SCANS: tuple[Callable[[str], Iterator[Finding]], ...] = (
    secrets.scan, numbers.scan, labels.scan, addresses.scan,
    *(functools.partial(rules.scan, file=file) for file in _RULES),
)  # fmt: skip
_KIND = lazy("[A-Z]{2,16}")


def _check_packages() -> None:
    """Raises if a package is missing that is imported only for the first number: there, where detectors fail
    without a message, nobody would be told what to install.
    """
    with needs("privacy"):
        for package in ("ahocorasick_rs", "phonenumbers", "stdnum"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)


class PatternDetector:
    """Finds values with a known form, checksum or label; deterministic, in time linear in the text.

    Args:
        kinds: the :data:`KINDS` to look for; None: all.
        min_score: findings with a lower score are left out.

    Raises:
        ImportError: a package that the checks of numbers need is not installed.
        ValueError: a kind that no pattern names.

    """

    reach: Reach = "words"

    def __init__(self, kinds: Collection[str] | None = None, *, min_score: float = 0.0) -> None:
        _check_packages()
        unknown = sorted(set(kinds or ()) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; known are {sorted(KINDS)}")
        self._kinds = None if kinds is None else frozenset(kinds)
        self._min_score = min_score

    def detect(self, text: str) -> list[Finding]:
        """Findings in the order of their starts; they may overlap."""
        view = plain(text)
        found = [
            one
            for scan in _SCANS
            for one in scan(view.text)
            if one.score >= self._min_score and (self._kinds is None or one.kind in self._kinds)
        ]
        return sorted(in_original(found, view), key=lambda one: (one.start, -one.end))


def default_detectors() -> tuple[Detector, ...]:
    """The default detectors: patterns, names with a cue, and with the extra ``names`` a tagger for Chinese
    names and lists of English ones. Without that extra, the log of ``sllm`` says once what is missing.
    """
    detectors: list[Detector] = [PatternDetector(), NameDetector()]
    has_tagger, has_lists = lac.installed() is not None, census.installed() is not None
    if has_tagger:
        detectors.append(TaggerDetector())
    if has_lists:
        detectors.append(CensusDetector())
    if not (has_tagger and has_lists):
        _tell_missing()
    return tuple(detectors)


@functools.cache
def _tell_missing() -> None:
    """Once in a process."""
    logging.getLogger("sllm").info(
        "names are found only where a label, a title or 'my name is' announces them; those in prose need "
        "pip install 'sllm[names]'"
    )


def union(findings: Iterable[Finding]) -> list[Finding]:
    """Findings with overlapping ones merged into one range; the longest gives the kind, with checked values
    preferred over unchecked ones.
    """
    merged: list[Finding] = []
    best: tuple[bool, int, float] = (False, 0, 0.0)
    for one in sorted(findings, key=lambda one: (one.start, -one.end)):
        rank = (one.checked, one.end - one.start, one.score)
        if merged and one.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = replace(one if rank > best else last, start=last.start, end=max(last.end, one.end))
            best = max(best, rank)
        else:
            merged.append(one)
            best = rank
    return merged


def search(detectors: Sequence[Detector], text: str) -> list[Finding]:
    """What all detectors find in a text, under its escapes, and in what is written in base64.

    Raises:
        LeakError: as :func:`detect_all`.

    """
    found = detect_all(detectors, text)
    if detectors:
        for view in decoded(text):
            found += in_original(detect_all(detectors, view.text), view)
        for start, end, inner in encoded(text):
            within = union(detect_all(detectors, inner))
            if within:
                lead = max(within, key=lambda one: (one.checked, one.end - one.start))
                found.append(replace(lead, start=start, end=end))
    return found


def detect_all(detectors: Sequence[Detector], text: str) -> list[Finding]:
    """What all detectors find.

    Raises:
        LeakError: one of them failed, or returned an invalid finding. The message does not carry the
            detector's own, which may quote the text.

    """
    found: list[Finding] = []
    for detector in detectors:
        name = type(detector).__name__
        failed = None
        try:
            results = list(detector.detect(text))
        except Exception as exc:  # noqa: BLE001 - whatever a detector raises, the text must not pass
            failed, results = type(exc).__name__, []
        if failed is not None:
            raise LeakError(f"{name} failed with {failed}; text that was not searched is not let out")
        if not all(_is_valid(one, len(text)) for one in results):
            raise LeakError(
                f"{name} gave an invalid finding: expected offsets within the {len(text)} characters "
                f"and a kind of 2 to 16 capital letters, other than {LITERAL}"
            )
        found += results
    return found


def _is_valid(one: object, size: int) -> bool:
    """Whether it is a finding in a text of so many characters; a detector may return anything."""
    return (
        isinstance(one, Finding)
        and all(isinstance(number, int | float | Real) for number in (one.start, one.end, one.score))
        and all(isinstance(offset, int | SupportsIndex) for offset in (one.start, one.end))
        and 0 <= one.start < one.end <= size
        and isinstance(one.kind, str)
        and _KIND.fullmatch(one.kind) is not None
        and one.kind != LITERAL
    )


def blank(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with ranges (in order, not overlapping) replaced by as many NUL characters."""
    pieces: list[str] = []
    last = 0
    for start, end in spans:
        pieces += (text[last:start], "\0" * (end - start))
        last = end
    pieces.append(text[last:])
    return "".join(pieces)

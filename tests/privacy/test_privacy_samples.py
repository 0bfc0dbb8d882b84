"""What the detectors find in sentences written by hand: the level that was reached holds for every kind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from privacy_samples import CLEAN, FIRST, SECOND, SECOND_CLEAN, parse

from sllm.privacy import KINDS, Detector, NameDetector, PatternDetector, default_detectors
from sllm.privacy.names import census, lac

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DETECTORS = (PatternDetector(), NameDetector())
with_extra = pytest.mark.skipif(
    None in (lac.installed(), census.installed()), reason="the extra names is not installed"
)

# Values that are not found, by kind; every other one is, whole. Fewer is better, more is a regression. Names
# that nothing announces need the extra.
MISSED_FIRST: dict[str, int] = {"ACCOUNT": 1, "BIRTHDATE": 1, "PHONE": 1}
MISSED_SECOND: dict[str, int] = {"ACCOUNT": 1, "ADDRESS": 1, "BIRTHDATE": 1, "SECRET": 2, "USER": 1}


def _missed(block: str, detectors: Sequence[Detector]) -> list[tuple[str, str, str]]:
    """Kind, value and text of what is not found, or only in part."""
    missed = []
    for sample in parse(block):
        ranges = [(one.start, one.end) for each in detectors for one in each.detect(sample.text)]
        for start, end, kind in sample.spans:
            # Every letter and digit of the value lies in some finding.
            inside = {i for a, b in ranges for i in range(max(a, start), min(b, end))}
            if any(i not in inside and sample.text[i].isalnum() for i in range(start, end)):
                missed.append((kind, sample.text[start:end], sample.text))
    return missed


@pytest.mark.parametrize(
    ("block", "allowed"), [(FIRST, MISSED_FIRST | {"NAME": 8}), (SECOND, MISSED_SECOND | {"NAME": 14})]
)
def test_recall_of_each_kind(block: str, allowed: Mapping[str, int]) -> None:
    missed = _missed(block, DETECTORS)
    assert all(n <= allowed.get(kind, 0) for kind, n in Counter(kind for kind, *_ in missed).items()), missed


@with_extra
@pytest.mark.parametrize(("block", "allowed"), [(FIRST, MISSED_FIRST), (SECOND, MISSED_SECOND)])
def test_every_name_is_found_with_the_extra(block: str, allowed: Mapping[str, int]) -> None:
    missed = _missed(block, default_detectors())
    assert all(n <= allowed.get(kind, 0) for kind, n in Counter(kind for kind, *_ in missed).items()), missed


def test_clean_sentences_are_left_alone() -> None:
    samples = [*parse(CLEAN), *parse(SECOND_CLEAN)]
    wrong = [one.text for one in samples if any(each.detect(one.text) for each in DETECTORS)]
    assert len(wrong) <= 0.005 * len(samples), wrong


def test_the_samples_are_what_they_say() -> None:
    first, second = parse(FIRST), parse(SECOND)
    assert len(first) >= 300 and len(second) >= 150
    assert len(parse(CLEAN)) >= 150
    for sample in (*first, *second):
        assert sample.spans
        assert all(kind in KINDS and start < end for start, end, kind in sample.spans)

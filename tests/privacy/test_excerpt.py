"""The surroundings of ranges: what an excerpt holds, and findings in it in terms of the whole text."""

from __future__ import annotations

import random

from sllm.privacy import Finding, Vault, default_detectors
from sllm.privacy.detect import search
from sllm.privacy.excerpt import around


def _prose(n: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(("word ", "and ", "so on. ", "next\n", "句子。")) for _ in range(n))


def test_offsets_come_back() -> None:
    text = _prose(30_000, 1)
    ranges = [(5_000, 5_010), (5_200, 5_300), (60_000, 60_001), (len(text) - 3, len(text))]
    found = around(text, ranges)
    assert len(found.text) < len(text) / 4 and len(found.parts) == 3
    for start, end in ranges:
        part = next(n for n, (low, high) in enumerate(found.parts) if low <= start and end <= high)
        low, high = found.parts[part]
        at = found.text.index(text[low:high])
        one = Finding(at + start - low, at + end - low, "NAME", 0.5)
        assert list(found.back([one])) == [Finding(start, end, "NAME", 0.5)]


def test_a_finding_over_several_parts() -> None:
    text = _prose(30_000, 2)
    found = around(text, [(5_000, 5_010), (60_000, 60_001)])
    back = list(found.back([Finding(0, len(found.text), "NAME")]))
    assert not list(
        found.back([Finding(0, 3, "NAME"), Finding(len(found.text) - 3, len(found.text), "NAME")])
    )
    assert [(one.start, one.end) for one in back] == list(found.parts)


def test_a_word_is_not_cut() -> None:
    text = "x " * 5_000 + "a" * 3_000 + "\0" * 5 + "b" * 3_000 + " y" * 5_000
    ((low, high),) = around(text, [(13_000, 13_005)]).parts
    assert text[low:high].strip("xy ") == text[10_000:16_005]


def test_of_a_text_that_is_near_its_ranges_all_is_taken() -> None:
    text = _prose(100, 3)
    assert around(text, [(3, 4)]).text == text
    assert around("", []).text == ""


class Cascade:
    """Finds the first letter of a row once the one before it is masked."""

    def detect(self, text: str) -> list[Finding]:
        found = [Finding(at, at + 1, "USER") for at in range(len(text)) if text[at] == "Q"]
        return found + [
            Finding(at, at + 1, "USER")
            for at in range(1, len(text))
            if text[at] == "Z" and text[at - 1] == "\0"
        ]


def test_what_masking_lays_open_far_into_a_long_text() -> None:
    prose = "word and so on. " * 5_000
    masked = Vault([Cascade()]).mask(f"{prose}QZZZ {prose}Z {prose}QZ").text
    assert masked.count("Z") == 1 and "Q" not in masked


def test_what_rules_a_finding_out_may_be_far_from_what_was_masked() -> None:
    steps = "".join(f"  s{n}:\n    name: Quuxify\n" + "    uses: a/b\n" * (n % 12 == 0) for n in range(4_000))
    text = f"jobs:\n{steps}  last:\n    run: mail a.person@example.org\n{steps}on: push\n"
    assert Vault().mask(text).counts == {"EMAIL": 1}


def test_nothing_is_left_to_find_in_a_long_text() -> None:
    rng = random.Random(4)
    detectors = default_detectors()
    for seed in range(5):
        values = [f"call 139{rng.randrange(10**8):08d}-{rng.randrange(99)}x12" for _ in range(8)]
        text = "".join(_prose(4_000, seed * 10 + n) + value for n, value in enumerate(values))
        vault = Vault(detectors)
        masked = vault.mask(text)
        assert vault.restore(masked.text, in_links=True) == text
        assert not [one for one in search(detectors, masked.text) if one.kind == "PHONE"]

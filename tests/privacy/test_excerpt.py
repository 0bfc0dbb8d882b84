"""The surroundings of ranges: what an excerpt holds, and findings in it in terms of the whole text."""

from __future__ import annotations

import random

import pytest
from privacy_corpus import KINDS

from sllm.privacy import Finding, PatternDetector, Vault, default_detectors, egress_check
from sllm.privacy.detect import blank, search
from sllm.privacy.excerpt import around


def _prose(n: int, seed: float) -> str:
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


@pytest.mark.parametrize(
    ("before", "after", "taken"),
    [
        ("we talked to ", ", and so it was said. ", False),
        ("so. My name is ", ". The next one", False),
        ("", "", False),
        ("\n", "\n", False),
        ("it is \0\0 ", " \0\0", False),
        ("as of 1978/7/16 from ", " and so on it goes", True),  # a number three words away
        ("and so on it goes ", " or of Peter", True),
        ("and so on it goes ", "b and so", True),  # what was one word
        ("12", " and so on it goes", True),
        ("that is key=", " and so on it goes", True),
        ("and so on it goes ", "，然后", True),
    ],
)
def test_ordinary_words_beside_a_range_lay_nothing_open(before: str, after: str, taken: bool) -> None:
    prose = _prose(3_000, 5).replace("句子。", "") + ". "
    text = f"{prose}{before}\0\0\0{after} {prose}" if before or after else "\0\0\0"
    at = text.index("\0\0\0")
    assert bool(around(text, [(at, at + 3)], "words").parts) == taken
    assert around(text, [(at, at + 3)], "far").parts


def test_sentences_are_taken_whole() -> None:
    text = "第一句。第二句\0\0说了话！第三句。\n第四句\0。第五句\0"
    found = around(text, [(7, 9), (20, 21), (25, 26)], "sentence")
    assert [text[start:end] for start, end in found.parts] == ["第二句\0\0说了话！", "第四句\0。第五句\0"]
    assert found.near == found.parts


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


class Counting:
    """A detector that counts the characters that it was given."""

    def __init__(self, reach: str | None) -> None:
        self._inner = PatternDetector(["EMAIL"])
        self.n_read = 0
        if reach is not None:
            self.reach = reach

    def detect(self, text: str) -> list[Finding]:
        self.n_read += len(text)
        return self._inner.detect(text)


def test_what_is_read_again_depends_on_the_reach() -> None:
    text = (_prose(400, 6).replace("句子。", "") + "a.b@example.org is it. ") * 20
    read = {}
    for reach in ("words", "sentence", "far", "nonsense", None):
        detector = Counting(reach)
        assert Vault([detector]).mask(text).counts == {"EMAIL": 20}
        read[reach] = detector.n_read - len(text)
    assert read["words"] == 0
    assert read["words"] < read["sentence"] < read["far"] == read["nonsense"] == read[None]


def _clutter(rng: random.Random) -> str:
    """Values and pieces of them, glued to one another or not."""
    pieces = (
        *(make(rng) for make, _ in rng.choices(list(KINDS.values()), k=4)),
        *(
            "my",
            "name: ",
            "call ",
            "Mr ",
            "Smith",
            "姓名：",
            "张伟",
            "password=",
            "1978/7/16",
            "swordfish",
            "12",
        ),
        *("Al", "x@", "the", "0044 "),
    )
    ends = (" ", " ", ", ", ". ", "\n", "", "/", "，")
    return "".join(rng.choice(pieces) + rng.choice(ends) for _ in range(rng.randrange(3, 10)))


@pytest.mark.timeout(300)
def test_masking_is_complete_in_long_texts() -> None:
    """What masking lays open is masked as well, though most of the text is searched once."""
    rng = random.Random(8)
    detectors = default_detectors()
    for _ in range(12):
        text = "".join(_prose(rng.choice([5, 400]), rng.random()) + _clutter(rng) for _ in range(6))
        vault = Vault(detectors)
        masked = vault.mask(text)
        egress_check(masked.text, vault)
        assert vault.restore(masked.text, in_links=True) == text


def test_excerpts_leave_out_nothing_that_is_laid_open() -> None:
    """Beside a search of the whole text once it is masked."""
    rng = random.Random(9)
    detectors = default_detectors()
    laid_open = 0
    for _ in range(60):
        text = "".join(_prose(3, rng.random()) + _clutter(rng) for _ in range(2))
        ranges = sorted({(one.start, one.end) for one in search(detectors, text)})
        ranges = [one for n, one in enumerate(ranges) if n == 0 or one[0] >= max(e for _, e in ranges[:n])]
        body = blank(text, ranges)
        for detector in detectors:
            whole = [one for one in search([detector], body) if "\0" not in body[one.start : one.end]]
            part = around(body, ranges, detector.reach)  # type: ignore[attr-defined]
            found = set(part.back(search([detector], part.text)))
            laid_open += len(whole)
            assert found.issuperset(whole), text
    assert laid_open

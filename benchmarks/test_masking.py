"""What masking and restoring a long text with many values cost beside one search of it by the same detectors.

Ratios of CPU time within one run: both sides read the same text, in turns.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm.privacy import Restorer, Vault, default_detectors
from sllm.privacy.detect import search

from .measure import Benchmark

Report = Callable[[dict[str, Any], dict[str, bool]], None]

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
try:
    import privacy_corpus
finally:
    sys.path.pop(0)

N_CHARS = 200_000
AIM = 1.5
_WORDS_TEXT = (
    "the report of last week says that parser was slower on second run and we looked at why it is so nobody "
    "knows when next release will be out but build passed again"
)
_WORDS = _WORDS_TEXT.split()
_GIVEN = ("Ann", "Peter", "Maria", "Desmond", "Laura")


def _value(rng: random.Random, n: int) -> str:
    kinds = (
        f"mail u{n}.x{rng.randrange(9999)}@example.org",
        f"call 139{rng.randrange(10**8):08d}",
        f"account number {rng.randrange(10**10):010d}",
        f"My name is {rng.choice(_GIVEN)} {''.join(rng.choices('aeioubcdfg', k=7)).title()}",
    )
    return kinds[n % 4]


def _text(n_values: int) -> str:
    """Prose with so many values in it, no two the same."""
    rng = random.Random(7)
    per = N_CHARS // n_values
    pieces = []
    for n in range(n_values):
        value = _value(rng, n)
        words = " ".join(rng.choices(_WORDS, k=per // 4))
        pieces.append(f"{words[: per - len(value) - 4]}. {value}. ")
    return "".join(pieces)


def _dense(*, chinese: bool) -> str:
    """Texts of the corpus, one in each line: a value every 30 to 40 characters, many side by side."""
    texts = [case.text for case in privacy_corpus.cases(4000, seed=11)]
    return "\n".join(text for text in texts if chinese or text.isascii())[:30_000]


TEXTS: dict[str, Callable[[], str]] = {
    **{f"prose, {n} values": functools.partial(_text, n) for n in (14, 140, 1400)},
    "dense, English": functools.partial(_dense, chinese=False),
    "dense, half Chinese": functools.partial(_dense, chinese=True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_masking(benchmark: Benchmark, report_values: Report, name: str) -> None:
    text = TEXTS[name]()
    detectors = default_detectors()
    search(detectors, text)  # reads the lists
    vault = Vault()
    masked = vault.mask(text)
    pieces = [masked.text[i : i + 7] for i in range(0, len(masked.text), 7)]

    def fed() -> None:
        restorer = Restorer(vault.placeholders, in_links=True)
        restored = "".join([*map(restorer.feed, pieces), restorer.finish()])
        assert len(restored) == len(text)

    ways: dict[str, Callable[[], object]] = {
        "search": lambda: search(detectors, text),
        "mask": lambda: Vault(detectors).mask(text),
        "restore": lambda: vault.restore(masked.text, in_links=True),
        "feed": fed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    def rounds() -> Iterator[None]:
        for _ in range(3):
            for name, way in ways.items():
                begun = time.process_time()
                way()
                seconds[name].append(time.process_time() - begun)
            yield

    benchmark.pedantic(lambda: list(rounds()), setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0)
    us = {name: 1e6 * min(times) / len(text) for name, times in seconds.items()}
    ratio = us["mask"] / us["search"]
    report_values(
        {
            "characters": len(text),
            "values": len(vault),
            "ratio": ratio,
            **{f"{name} us/char": each for name, each in us.items()},
        },
        {f"masking at most {AIM:g} x one search": ratio <= AIM},
    )

"""What kernels chosen at load cost beside kernels compiled for this very CPU, and what AMX brings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sllm
from sllm.embedded import TARGET
from sllm.engine import cpu

from . import models, variants
from .measure import Benchmark, Sample, compare
from .peers import PeerError

pytestmark = [pytest.mark.timeout(7200)]

Report = Callable[[dict[str, Any], dict[str, bool]], None]

GREEDY = {"temperature": 0.0}
SAMPLED = {"seed": 1}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Both builds, made beforehand; skips with the reason where one cannot be."""
    try:
        for kind in ("native", "portable"):
            variants.interpreter(kind)
    except PeerError as error:
        pytest.skip(str(error))


def ratio_of(
    benchmark: Benchmark,
    ours: Callable[[], Sample],
    other: Callable[[], Sample],
    rounds: int,
    *,
    same_text: bool = True,
) -> tuple[float, dict[str, float]]:
    """Median of ours / other, neighbours in time; both give the same text, each one every time."""
    figures, our_samples, other_samples = compare(benchmark, ours, other, "", rounds=rounds)
    assert all(sample.n_tokens > 16 for sample in our_samples)  # a text that ends at once is no measure
    assert len({sample.texts for sample in our_samples}) == 1
    assert len({sample.texts for sample in other_samples}) == 1
    if same_text:
        assert our_samples[0].texts == other_samples[0].texts
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(our_samples, other_samples, strict=False)]
    return figures.ratio, {
        "tokens_per_s": figures.tokens_per_s,
        "other_tokens_per_s": figures.peer_tokens_per_s,
        "ratio_spread": statistics.quantiles(ratios, n=4)[2] - statistics.quantiles(ratios, n=4)[0]
        if len(ratios) > 1
        else 0.0,
    }


@pytest.mark.parametrize("what", ["greedy", "sampled", "prompt of 512"])
@pytest.mark.parametrize("model", ["0.5B", "embedded"])
def test_the_variant_chosen_against_a_native_build(
    benchmark: Benchmark, report_values: Report, n_cores: int, model: str, what: str
) -> None:
    path: Path = models.random_qwen2() if model == "0.5B" else TARGET
    n_threads = n_cores if model == "0.5B" else 1
    with sllm.Model(path, vocab_only=True) as named:
        prompt = named.vocab.encode("Once upon a time").tolist()
    with (
        variants.child("portable", path, n_threads=n_threads) as portable,
        variants.child("native", path, n_threads=n_threads) as native,
    ):
        if what == "prompt of 512":
            ours, other = (lambda one=one: one.prompt(512) for one in (portable, native))
        else:
            sampling = GREEDY if what == "greedy" else SAMPLED
            n_tokens = 96 if model == "0.5B" else 256
            ours, other = (
                lambda one=one: one.text(prompt, n_tokens, **sampling) for one in (portable, native)
            )
        # A variant that leaves out an instruction which this CPU has may round otherwise.
        ratio, more = ratio_of(benchmark, ours, other, rounds=15, same_text=False)
        values = {"variant": portable.variant, "ratio_vs_native": ratio, **more}
    report_values(values, {"ratio_vs_native >= 0.98": ratio >= 0.98})


@pytest.mark.skipif("amx_int8" not in cpu.features(), reason="this CPU has no AMX")
@pytest.mark.parametrize("what", ["greedy", "prompt of 512"])
def test_with_amx_and_without(benchmark: Benchmark, report_values: Report, n_cores: int, what: str) -> None:
    """There is no aim: this is what SLLM_AMX=ON is for, in figures."""
    path = models.random_qwen2()
    with (
        variants.child("amx", path, n_threads=n_cores) as with_amx,
        variants.child("native", path, n_threads=n_cores) as without,
    ):
        assert with_amx.amx
        assert not without.amx
        if what == "greedy":
            ours, other = (lambda one=one: one.text([11], 96, **GREEDY) for one in (with_amx, without))
        else:
            ours, other = (lambda one=one: one.prompt(512) for one in (with_amx, without))
        ratio, more = ratio_of(benchmark, ours, other, rounds=15, same_text=False)
    report_values({"variant": "native with AMX", "ratio_vs_native": ratio, **more}, {})

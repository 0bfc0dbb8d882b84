"""Several workers as one: what more of them bring, and what asking a second one brings where one is slow."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

import sllm
from sllm.embedded import TARGET
from sllm.engine import exact
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .measure import Benchmark

PACE = 0.03  # seconds of a pass
N_TEXTS, N_TOKENS = 8, 40
SAMPLING = sllm.SamplingParams(temperature=0.8, seed=5)
PROMPT = "Once upon a time there was a"


@contextmanager
def workers(*paces: float, sessions: int = 4) -> Iterator[list[str]]:
    """Workers on the embedded target, with a pace each; their addresses."""
    settings: dict[str, Any] = {**exact.SETTINGS, "n_threads": 1, "n_ctx": 256}
    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(TARGET))
        limits = Limits(sessions=sessions)
        yield [
            stack.enter_context(
                Worker(model, insecure=True, limits=limits, pass_seconds=pace, **settings)
            ).uri
            for pace in paces
        ]


def write(target: sllm.RemoteTarget, max_tokens: int = N_TOKENS) -> tuple[str, float]:
    """A text, and the seconds until its first token."""
    began = time.perf_counter()
    stream = sllm.generate(target, PROMPT, sampling=SAMPLING, max_tokens=max_tokens)
    first = next(stream)
    seconds = time.perf_counter() - began
    return first.text + stream.text(), seconds


def test_eight_texts_at_once(
    benchmark: Benchmark, report_values: Callable[[dict[str, Any], dict[str, bool]], None]
) -> None:
    """Three workers of four places each against one, which was what a list of three was before."""

    def seconds(uris: list[str]) -> float:
        with sllm.connect(uris) as remote, ThreadPoolExecutor(N_TEXTS) as executor:
            write(remote.target(), 2)
            began = time.perf_counter()
            texts = list(executor.map(lambda _: write(remote.target())[0], range(N_TEXTS)))
            taken = time.perf_counter() - began
        assert len(set(texts)) == 1
        return taken

    one: list[float] = []
    three: list[float] = []
    with workers(PACE, PACE, PACE) as uris:
        benchmark.pedantic(
            lambda: three.append(seconds(uris)), setup=lambda: one.append(seconds(uris[:1])), rounds=3
        )
        if not one:  # --benchmark-disable runs no setup
            one.append(seconds(uris[:1]))
    ratio = statistics.median(one) / statistics.median(three)
    values = {"seconds_one": statistics.median(one), "ratio_vs_one": ratio}
    report_values(values, {"ratio_vs_one >= 1.8": ratio >= 1.8})


@pytest.mark.parametrize("hedge", [False, 0.15], ids=["alone", "hedged"])
def test_first_tokens_where_one_of_two_is_slow(
    benchmark: Benchmark, hedge: float, report_values: Callable[[dict[str, Any], dict[str, bool]], None]
) -> None:
    """One worker's passes take a second. Figures of a round trip and of free places do not show that."""
    firsts: list[float] = []
    hedged: list[int] = []

    with workers(PACE, 1.0) as uris, sllm.connect(uris) as remote:

        def measure() -> None:
            stream = sllm.generate(remote.target(hedge=hedge), PROMPT, sampling=SAMPLING, max_tokens=1)
            began = time.perf_counter()
            stream.text()
            firsts.append(time.perf_counter() - began)
            assert stream.stats.remote is not None
            hedged.append(stream.stats.remote.n_hedged)

        benchmark.pedantic(measure, rounds=30)
    found = sorted(firsts)
    values = {"p50_ms": 1e3 * found[len(found) // 2], "p95_ms": 1e3 * found[int(0.95 * len(found))]}
    values["asked_twice"] = sum(hedged) / len(hedged)
    report_values(values, {})

"""Speculation with recurrent memories: a hybrid target and a hybrid draft behind a slow link, beside a pair
of attention alone, and what it costs to be able to take tokens back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sllm

from . import models
from .far_end import LinkProcess, WorkerProcess
from .measure import Benchmark, RemoteFigures, Tokens, generated
from .test_remote import (
    AT_LEAST_STREAMING,
    DRAFT_SECONDS,
    GAIN_AT_50_MS,
    LONGEST_DRAFT,
    PASS_SECONDS,
    SETTINGS,
    Client,
    Course,
    Texts,
    at_least,
    drafting,
    figures_of,
    n_rounds,
    record,
    simulated,
)

pytestmark = pytest.mark.timeout(3600)

MAX_TOKENS = 72
COST_OF_SNAPSHOTS = 1.05
KINDS = {"attention": ("qwen3", None), "snapshots": ("qwen35", 8), "recompute": ("qwen35", 0)}
"""The architecture, and ``n_rollback``, of each kind of memory."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def pair(kind: str) -> tuple[Path, Path]:
    return models.noisy_pair(KINDS[kind][0])


@pytest.fixture(scope="module")
def hybrid_draft(pair: tuple[Path, Path]) -> Iterator[sllm.Model]:
    with sllm.Model(pair[1]) as model:
        yield model


@pytest.fixture(scope="module")
def sampling(hybrid_draft: sllm.Model) -> sllm.SamplingParams:
    """No text of a random model ends by itself."""
    vocab = hybrid_draft.vocab
    ends = [(token, -np.inf) for token in range(vocab.n_tokens) if vocab.is_eog(token)]
    return sllm.SamplingParams(temperature=0.8, seed=2, logit_bias=ends)


@pytest.fixture(scope="module")
def hybrid_texts(pair: tuple[Path, Path], hybrid_draft: sllm.Model, sampling: sllm.SamplingParams) -> Texts:
    rng = np.random.default_rng(3)
    prompts: list[Tokens] = [rng.integers(10, hybrid_draft.vocab.n_tokens, 40, dtype=np.int32) for _ in "ab"]
    with sllm.LocalTarget(pair[0], n_ctx=1024, **SETTINGS) as target:
        expected = generated(target, prompts, sampling=sampling, max_tokens=MAX_TOKENS).texts
    with drafting(hybrid_draft, paced=False) as drafter:
        recorded = [record(drafter, p, t, sampling) for p, t in zip(prompts, expected, strict=True)]
    return Texts(prompts, expected, recorded)


@pytest.mark.parametrize("rtt_ms", [0, 50])
def test_behind_a_link(
    benchmark: Benchmark,
    report_remote: Callable[[Sequence[RemoteFigures]], None],
    pair: tuple[Path, Path],
    hybrid_draft: sllm.Model,
    hybrid_texts: Texts,
    sampling: sllm.SamplingParams,
    kind: str,
    rtt_ms: int,
) -> None:
    """Paced as test_remote.py's pair: 30 ms for a pass of the target, 10 ms for a drafted token."""
    rtt, n_rollback = rtt_ms / 1e3, KINDS[kind][1]
    options = {**SETTINGS, "n_ctx": 1024, "n_rollback": n_rollback, "pass_seconds": PASS_SECONDS}
    with (
        WorkerProcess(pair[0], sessions=1, **options) as worker,
        LinkProcess(worker.port, rtt=rtt) as link,
        sllm.connect(worker.uri_behind(link)) as remote,
        drafting(hybrid_draft, paced=True) as drafter,
    ):
        client = Client(remote, link, drafter, sampling, rtt)
        course = Course(
            client,
            hybrid_texts.prompts,
            MAX_TOKENS,
            [("stream", "stream", 0), ("hints", "hints", 0), ("wait, n_max 8", "wait", 8)],
            n_rounds(1),
        )
        taken = course.run(benchmark)
        assert {sample.texts for samples in taken.values() for sample in samples} == {hybrid_texts.expected}
        assert drafter.context.can_rollback == ("free" if kind == "attention" else "recompute")
        more = {
            "memory_kind": kind,
            "snapshot_mb": hybrid_draft.state_bytes * (n_rollback or 0) / 1e6,
            "pair_acceptance": hybrid_texts.acceptance,
        }
    where: dict[str, Any] = {"rtt_ms": rtt_ms, "mbit_s": None, "paced": True}
    figures = [figures_of(name, samples, taken, **where) for name, samples in taken.items()]
    for one in figures:
        one.more.update(more)
        if one.mode in ("stream", "hints", "run-ahead"):
            expected = simulated(
                one.mode,  # type: ignore[arg-type]
                hybrid_texts.recorded,
                n_max=LONGEST_DRAFT if n_rollback is None else n_rollback or LONGEST_DRAFT,
                rtt=rtt,
                target_seconds=PASS_SECONDS,
                draft_seconds=DRAFT_SECONDS,
            )
            one.ratio_vs_simulated = one.tokens_per_s / expected
    ours = figures[-1]
    ours.aims_at(f">= {AT_LEAST_STREAMING} x streaming", at_least(ours.ratio_vs_stream, AT_LEAST_STREAMING))
    ours.aims_at(f">= {GAIN_AT_50_MS} x streaming", at_least(ours.ratio_vs_stream, GAIN_AT_50_MS))
    report_remote([ours, *figures[:-1]])


def test_what_snapshots_cost(
    benchmark: Benchmark, report_values: Callable[[dict[str, Any], dict[str, bool]], None], n_cores: int
) -> None:
    """One token after another, and five at once as verifying them takes, at the size of Qwen3.5-0.8B."""
    kept = (0, 4, 8)
    settings = {**SETTINGS, "n_threads": n_cores, "n_threads_batch": n_cores, "n_ctx": 512}
    tokens = np.random.default_rng(1).integers(10, 300, 400, dtype=np.int32)
    with sllm.Model(models.random_qwen35()) as model:
        contexts = {k: model.context(n_rollback=k, **settings) for k in kept}
        rows = {k: c.decode(tokens[:100], logits="last") for k, c in contexts.items()}
        assert all(np.array_equal(row, rows[0]) for row in rows.values())  # type: ignore[arg-type]
        seconds: dict[tuple[int, int], list[float]] = {(k, n): [] for k in kept for n in (1, 5)}

        def once(k: int, n: int) -> None:
            at = contexts[k].memory.length()
            began = time.perf_counter()
            contexts[k].decode(tokens[at : at + n], logits="last")
            seconds[k, n].append(time.perf_counter() - began)

        def others() -> None:
            for k in kept:
                if contexts[k].memory.length() > 380:
                    contexts[k].decode(tokens[:100], pos=0)
                for n in (1, 5):
                    if (k, n) != (8, 1):
                        once(k, n)

        benchmark.pedantic(lambda: once(8, 1), setup=others, rounds=40, iterations=1)
        state = model.state_bytes
        for context in contexts.values():
            context.close()

    def cost(k: int, n: int) -> float:
        return statistics.median(a / b for a, b in zip(seconds[k, n], seconds[0, n], strict=False))

    figures = {f"cost_{n}_tokens_n_rollback_{k}": cost(k, n) for k in kept[1:] for n in (1, 5)}
    report_values(
        {**figures, "memory_kind": "snapshots", "snapshot_mb": state / 1e6, "n_threads": n_cores},
        {f"<= {COST_OF_SNAPSHOTS} x a token without, n_rollback 4": cost(4, 1) <= COST_OF_SNAPSHOTS},
    )

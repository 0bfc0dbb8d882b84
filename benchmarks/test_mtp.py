"""A model's own heads as its draft, against none: one text after another, and a worker with several.

One thread: the models are small, so small that a pass with several rows takes nearly as many times as long,
and what drafts bring is counted in passes. The worker's passes are paced, as those of a large model would be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import sllm
from sllm.engine import exact
from sllm.engine.mtp import has_mtp
from sllm.worker.server import Limits

from . import models
from .measure import Benchmark, Figures, Sample, Tokens, compare, generated, local_target

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not has_mtp(), reason="this build cannot draft with MTP heads"),
]

MAX_TOKENS = 64
PASS_SECONDS = 0.03
TOKENS_PER_PASS = 1.5


@pytest.fixture(scope="module", params=["glm4moe", "qwen35"])
def with_head(request: pytest.FixtureRequest) -> Iterator[sllm.Model]:
    with sllm.Model(models.agreeing_head(request.param)) as model:
        yield model


def prompts_for(model: sllm.Model, n: int) -> list[Tokens]:
    rng = np.random.default_rng(3)
    return [rng.integers(10, model.vocab.n_tokens, 60, dtype=np.int32) for _ in range(n)]


def sampling_for(model: sllm.Model, seed: int = 2) -> sllm.SamplingParams:
    """No text of a random model shall end by itself."""
    ends = [(token, -np.inf) for token in range(model.vocab.n_tokens) if model.vocab.is_eog(token)]
    return sllm.SamplingParams(temperature=0.8, seed=seed, logit_bias=ends)


def hand_in(figures: Figures, model: sllm.Model, report: Callable[[Figures], None]) -> None:
    assert figures.passes_per_token is not None
    figures.more["tokens_per_pass"] = 1 / figures.passes_per_token
    figures.more["memory_kind"] = model.can_rollback
    figures.aim = f"tokens_per_pass >= {TOKENS_PER_PASS}"
    figures.aim_met = figures.more["tokens_per_pass"] >= TOKENS_PER_PASS
    report(figures)


def test_against_none(benchmark: Benchmark, report: Callable[[Figures], None], with_head: sllm.Model) -> None:
    """The same texts with the head and without, taking turns."""
    prompts, sampling = prompts_for(with_head, 3), sampling_for(with_head)
    with (
        local_target(with_head, n_threads=1) as plain,
        local_target(with_head, n_threads=1) as drafted,
    ):

        def run(target: sllm.LocalTarget, draft: str | None) -> Sample:
            return generated(target, prompts, draft=draft, sampling=sampling, max_tokens=MAX_TOKENS)

        figures, ours, theirs = compare(
            benchmark,
            lambda: run(drafted, "mtp"),
            lambda: run(plain, None),
            "generate() without a draft",
            rounds=3,
        )
    assert len({sample.texts for sample in (*ours, *theirs)}) == 1
    hand_in(figures, with_head, report)


def test_a_worker_with_several_texts(
    benchmark: Benchmark, report: Callable[[Figures], None], with_head: sllm.Model
) -> None:
    """Four clients at once that send no hints, of a worker with the head and of one without."""
    prompts = prompts_for(with_head, 4)
    options: dict[str, Any] = {
        "n_ctx": 512,
        "n_threads": 1,
        "insecure": True,
        "pass_seconds": PASS_SECONDS,
        "limits": Limits(sessions=len(prompts)),
        **exact.SETTINGS,
    }
    with (
        sllm.Worker(with_head, mtp=False, **options) as plain,
        sllm.Worker(with_head, mtp=True, **options) as drafting,
        sllm.connect(plain.uri) as to_plain,
        sllm.connect(drafting.uri) as to_drafting,
    ):

        def run(remote: sllm.Remote, worker: sllm.Worker) -> Sample:
            before = worker.stats.passes, worker.stats.own_drafted, worker.stats.own_accepted
            samples: list[Any] = [None] * len(prompts)

            def one(i: int) -> None:
                sampling = sampling_for(with_head, i)
                samples[i] = generated(
                    remote.target(),  # type: ignore[arg-type]
                    [prompts[i]],
                    sampling=sampling,
                    max_tokens=MAX_TOKENS,
                )

            threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            after = worker.stats.passes, worker.stats.own_drafted, worker.stats.own_accepted
            n_passes, n_drafted, n_accepted = (b - a for a, b in zip(before, after, strict=True))
            texts = tuple(sample.texts[0] for sample in samples)
            seconds = max(sample.seconds for sample in samples)
            # A pass is shared: what it commits for one text is what counts.
            return Sample(
                sum(map(len, texts)), seconds, texts, n_passes * len(prompts), n_drafted, n_accepted
            )

        figures, ours, theirs = compare(
            benchmark,
            lambda: run(to_drafting, drafting),
            lambda: run(to_plain, plain),
            "the worker without the head",
            rounds=3,
        )
    assert len({sample.texts for sample in (*ours, *theirs)}) == 1
    hand_in(figures, with_head, report)

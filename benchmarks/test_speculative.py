"""Speculation against none, and against llama.cpp's own; the texts are compared token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.embedded import DRAFT, TARGET

from . import models, peers
from .measure import (
    GREEDY,
    SAMPLED,
    TYPE_KV,
    Benchmark,
    Figures,
    Sample,
    Tokens,
    compare,
    generated,
    local_target,
)

pytestmark = pytest.mark.timeout(3600)

Report = Callable[[Figures], None]

# Openings that the models know how to go on with, in both of their languages, and a chat.
PROMPTS = (
    "Once upon a time, there was a little fox who lived near the river.",
    "In a quiet valley there lived a brave little mouse called Emma.",
    "有一只快乐的小鸟，大家都叫它小兰。",
)
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def encoded(model: sllm.Model) -> list[Tokens]:
    chat = model.chat([{"role": "user", "content": "Tell me a story about a little mouse and a lamp."}])
    return [*(model.vocab.encode(prompt) for prompt in PROMPTS), np.asarray(chat, dtype=np.int32)]


@contextmanager
def model_drafter(model: sllm.Model, *, n_threads: int) -> Iterator[ModelDrafter]:
    kv: dict[str, Any] = {"flash_attn": True, "type_k": TYPE_KV, "type_v": TYPE_KV}
    with ModelDrafter(model, n_ctx=1024, n_threads=n_threads, **kv) as drafter:
        yield drafter


def against_none(
    benchmark: Benchmark,
    target: sllm.LocalTarget,
    draft: Any,
    sampling: sllm.SamplingParams,
    *,
    max_tokens: int,
    rounds: int,
) -> Figures:
    """The same prompts with the draft and without, taking turns; every text has to be the same."""
    prompts = encoded(target.model)

    def run(draft: Any) -> Sample:
        return generated(target, prompts, draft=draft, sampling=sampling, max_tokens=max_tokens)

    figures, ours, plain = compare(
        benchmark, lambda: run(draft), lambda: run(None), "generate() without a draft", rounds=rounds
    )
    assert len({sample.texts for sample in (*ours, *plain)}) == 1
    return figures


@SAMPLINGS
def test_inflated_against_none(
    benchmark: Benchmark,
    report: Report,
    inflated: sllm.Model,
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    n_cores: int,
    sampling: sllm.SamplingParams,
) -> None:
    """A big model's passes with a trained pair's acceptance."""
    max_tokens = 96
    with (
        local_target(inflated, n_threads=n_cores) as target,
        model_drafter(embedded_draft, n_threads=n_cores) as drafter,
    ):
        figures = against_none(benchmark, target, drafter, sampling, max_tokens=max_tokens, rounds=5)
        text = generated(target, encoded(inflated), sampling=sampling, max_tokens=max_tokens).texts
    with local_target(embedded_target, n_threads=1) as small:
        # the added layers add nothing, and the small model's text does not depend on threads either
        assert (
            generated(small, encoded(embedded_target), sampling=sampling, max_tokens=max_tokens).texts == text
        )
    figures.aim, figures.aim_met = "ratio >= 1.3", figures.ratio >= 1.3
    report(figures)


def test_inflated_ngram(benchmark: Benchmark, report: Report, inflated: sllm.Model, n_cores: int) -> None:
    """Prompt lookup needs no draft model; these texts repeat little of themselves."""
    with local_target(inflated, n_threads=n_cores) as target:
        figures = against_none(benchmark, target, "ngram", GREEDY, max_tokens=96, rounds=3)
    report(figures)


def test_inflated_garbage(benchmark: Benchmark, report: Report, inflated: sllm.Model, n_cores: int) -> None:
    """A draft that is always wrong must be given up soon."""
    n_vocab = inflated.vocab.n_tokens

    def garbage(tokens: Tokens, n_max: int) -> Tokens:
        wrong: Tokens = ((tokens[-1] + 7 * np.arange(1, n_max + 1)) % n_vocab).astype(np.int32)
        return wrong

    with local_target(inflated, n_threads=n_cores) as target:
        figures = against_none(benchmark, target, garbage, GREEDY, max_tokens=96, rounds=3)
    report(figures)


@pytest.mark.parametrize("n_max", [3, 8])
def test_inflated_against_llama_speculative_simple(
    benchmark: Benchmark,
    report: Report,
    native_peers: object,  # noqa: ARG001
    inflated: sllm.Model,
    embedded_draft: sllm.Model,
    n_cores: int,
    n_max: int,
) -> None:
    """The same pair in llama.cpp's own example, greedy, with its default draft length and a longer one."""
    max_tokens = 192
    prompt = PROMPTS[0]
    path = models.inflated(TARGET)
    runs: list[peers.SpeculativeRun] = []

    def peer() -> Sample:
        run = peers.llama_speculative_simple(
            path, DRAFT, prompt, n_tokens=max_tokens, n_threads=n_cores, n_max=n_max, type_kv=TYPE_KV
        )
        runs.append(run)
        return Sample(run.n_tokens, run.n_tokens / run.tokens_per_s)

    with (
        local_target(inflated, n_threads=n_cores) as target,
        model_drafter(embedded_draft, n_threads=n_cores) as drafter,
    ):
        tokens = inflated.vocab.encode(prompt)
        figures, ours, _ = compare(
            benchmark,
            lambda: generated(target, [tokens], draft=drafter, max_tokens=max_tokens),
            peer,
            f"llama-speculative-simple, n_max {n_max}",
            rounds=5,
        )
        plain = generated(target, [tokens], max_tokens=max_tokens)
    assert {sample.texts for sample in ours} == {plain.texts}
    ours_text = inflated.vocab.decode(list(plain.texts[0]))
    figures.more = {
        "peer_acceptance": runs[-1].acceptance,
        "peer_passes_per_token": runs[-1].passes_per_token,
        "peer_same_text": all(
            run.text.startswith(ours_text) or ours_text.startswith(run.text) for run in runs
        ),
    }
    report(figures)


@SAMPLINGS
def test_embedded_pair_against_none(
    benchmark: Benchmark,
    report: Report,
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    sampling: sllm.SamplingParams,
) -> None:
    """Passes so cheap that drafting hardly pays: speculation must find out and stay out of the way."""
    with (
        local_target(embedded_target, n_threads=1) as target,
        model_drafter(embedded_draft, n_threads=1) as drafter,
    ):
        figures = against_none(benchmark, target, drafter, sampling, max_tokens=192, rounds=15)
    figures.aim, figures.aim_met = "ratio >= 0.97", figures.ratio >= 0.97
    report(figures)

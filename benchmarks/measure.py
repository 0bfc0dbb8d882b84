"""How two ways are compared on a machine that is never quite still, and the one form of all figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import sllm
from sllm.generation.text_stream import GenerationStats

Tokens = npt.NDArray[np.int32]

# The type of the KV cache everywhere: with it, flash attention and q8_0 or q4_0 weights, a text is the same
# to the last bit however its tokens are grouped into batches.
TYPE_KV = "q8_0"

GREEDY = sllm.SamplingParams(temperature=0.0)
SAMPLED = sllm.SamplingParams(seed=1)  # llama.cpp's default samplers


class Benchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    extra_info: dict[str, Any]
    name: str

    def pedantic(
        self,
        target: Callable[..., Any],
        *,
        setup: Callable[[], None],
        rounds: int,
        iterations: int,
        warmup_rounds: int,
    ) -> Any: ...


@dataclass
class Sample:
    """One timed text, or several as one."""

    n_tokens: int
    seconds: float
    texts: tuple[tuple[int, ...], ...] = ()
    n_passes: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    target_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def joined(samples: Sequence[Sample]) -> Sample:
    """Texts that came one after another."""
    whole = Sample(0, 0.0)
    for sample in samples:
        for name, value in vars(sample).items():
            setattr(whole, name, getattr(whole, name) + value)
    return whole


@dataclass
class Figures:
    """Medians of a comparison; ``ratio`` is that of neighbours in time, so a slow minute hits both."""

    tokens_per_s: float
    peer: str
    peer_tokens_per_s: float
    ratio: float
    acceptance: float | None = None
    passes_per_token: float | None = None
    aim: str | None = None
    aim_met: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def info(self) -> dict[str, Any]:
        """``extra_info``: the same keys in every benchmark, then what only this one has."""
        own = {name: value for name, value in vars(self).items() if name != "more"}
        return {**own, **self.more}


@dataclass
class RemoteFigures:
    """What one mode did over one link: the keys of ``extra_info``, None where they say nothing."""

    rtt_ms: float
    mbit_s: float | None
    paced: bool
    mode: str
    tokens_per_s: float
    acceptance: float | None = None
    passes_per_token: float | None = None
    bytes_up_per_token: float | None = None
    bytes_down_per_token: float | None = None
    ratio_vs_stream: float | None = None
    ratio_vs_wait: float | None = None
    ratio_vs_llama_rpc: float | None = None
    ratio_vs_simulated: float | None = None
    aim: str | None = None
    aim_met: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def aims_at(self, aim: str, met: bool) -> None:
        """One more aim; a missed one is named in ``missed``."""
        self.aim = aim if self.aim is None else f"{self.aim}; {aim}"
        self.aim_met = met and self.aim_met is not False
        if not met:
            self.more["missed"] = "; ".join([*filter(None, [self.more.get("missed")]), aim])

    @property
    def bytes_per_token(self) -> float:
        return (self.bytes_up_per_token or 0.0) + (self.bytes_down_per_token or 0.0)

    def info(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "more"}
        return {**own, **self.more}


@dataclass
class SplitFigures:
    """What one mode of a split model did over one link: the keys of ``extra_info``, None where they say
    nothing.
    """

    rtt_ms: float
    mbit_s: float | None
    mode: str
    codec: str | None
    tokens_per_s: float
    rounds_per_token: float | None = None
    tokens_per_round: float | None = None
    bytes_per_token: float | None = None
    ratio_vs_llama_rpc: float | None = None
    local_rss_mb: float | None = None
    whole_rss_mb: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def aims_at(self, aim: str, met: bool) -> None:
        """One more aim and whether it was met."""
        self.more.setdefault("aims", {})[aim] = met

    def info(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "more"}
        return {**own, **self.more}


def sample_of(stats: GenerationStats, tokens: Sequence[int], seconds: float) -> Sample:
    """One text of ``generate()``, and what it took."""
    return Sample(
        len(tokens),
        seconds,
        (tuple(tokens),),
        stats.n_passes,
        stats.n_drafted,
        stats.n_accepted,
        target_seconds=stats.target_seconds,
    )


def generated(
    target: sllm.LocalTarget,
    prompts: Sequence[Tokens],
    *,
    draft: Any = None,
    sampling: sllm.SamplingParams = GREEDY,
    max_tokens: int,
) -> Sample:
    """The wall time of ``generate()`` from call to last token, texts and all, over all prompts together."""
    texts = []
    n_passes = n_drafted = n_accepted = 0
    began = time.perf_counter()
    for prompt in prompts:
        stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=max_tokens)
        texts.append(tuple(token for run in stream for token in run.tokens))
        n_passes += stream.stats.n_passes
        n_drafted += stream.stats.n_drafted
        n_accepted += stream.stats.n_accepted
    seconds = time.perf_counter() - began
    return Sample(sum(map(len, texts)), seconds, tuple(texts), n_passes, n_drafted, n_accepted)


def compare(
    benchmark: Benchmark, ours: Callable[[], Sample], peer: Callable[[], Sample], name: str, *, rounds: int
) -> tuple[Figures, list[Sample], list[Sample]]:
    """Let the two take turns, ``rounds`` times after one turn unmeasured; pytest-benchmark times ours."""
    our_samples: list[Sample] = []
    peer_samples: list[Sample] = []
    peer()
    ours()
    benchmark.pedantic(
        lambda: our_samples.append(ours()),
        setup=lambda: peer_samples.append(peer()),
        rounds=rounds,
        iterations=1,
        warmup_rounds=0,
    )
    if not peer_samples:  # --benchmark-disable runs no setup
        peer_samples.append(peer())
    figures = Figures(
        tokens_per_s=statistics.median(sample.tokens_per_s for sample in our_samples),
        peer=name,
        peer_tokens_per_s=statistics.median(sample.tokens_per_s for sample in peer_samples),
        ratio=statistics.median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(our_samples, peer_samples, strict=False)
        ),
    )
    drafted = sum(sample.n_drafted for sample in our_samples)
    passes = sum(sample.n_passes for sample in our_samples)
    if passes:
        figures.passes_per_token = passes / sum(sample.n_tokens for sample in our_samples)
    if drafted:
        figures.acceptance = sum(sample.n_accepted for sample in our_samples) / drafted
    return figures, our_samples, peer_samples


@contextmanager
def local_target(model: sllm.Model, *, n_threads: int, n_ctx: int = 1024) -> Iterator[sllm.LocalTarget]:
    with sllm.LocalTarget(
        model, n_ctx=n_ctx, n_threads=n_threads, flash_attn=True, type_k=TYPE_KV, type_v=TYPE_KV
    ) as target:
        yield target

"""Plain decoding: what sllm adds to llama.cpp's own decode, selection of every token included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import sllm
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

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("native_peers")]

Report = Callable[[Figures], None]


def bench_peer(model: Path, n_tokens: int, n_threads: int) -> Callable[[], Sample]:
    """``llama-bench`` decoding random tokens from an empty context, and selecting none."""

    def run() -> Sample:
        (tokens_per_s,) = peers.llama_bench(model, n_gen=n_tokens, n_threads=n_threads, type_kv=TYPE_KV)
        return Sample(n_tokens, n_tokens / tokens_per_s)

    return run


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_half_billion_against_llama_bench(
    benchmark: Benchmark, report: Report, qwen2: sllm.Model, n_cores: int, sampling: sllm.SamplingParams
) -> None:
    """A model whose passes are long, and a vocabulary of 151,936 tokens to select from."""
    n_tokens = 128
    prompt = np.array([9707], dtype=np.int32)
    path = models.random_qwen2()
    with peers.Reference(path, n_ctx=256, n_threads=n_cores, type_kv=TYPE_KV) as reference:
        expected = tuple(reference.greedy(prompt, n_tokens))

    with local_target(qwen2, n_ctx=256, n_threads=n_cores) as target:
        figures, ours, _ = compare(
            benchmark,
            lambda: generated(target, [prompt], sampling=sampling, max_tokens=n_tokens),
            bench_peer(path, n_tokens, n_cores),
            "llama-bench",
            rounds=7,
        )
    assert {sample.n_tokens for sample in ours} == {n_tokens}
    assert len({sample.texts for sample in ours}) == 1
    if sampling is GREEDY:
        assert ours[0].texts == (expected,)
    figures.aim, figures.aim_met = "ratio >= 0.98", figures.ratio >= 0.98
    report(figures)


def test_embedded_against_llama_bench(
    benchmark: Benchmark, report: Report, embedded_target: sllm.Model
) -> None:
    """Passes of about a millisecond: here every microsecond of a call shows."""
    n_tokens = 200
    prompt = embedded_target.vocab.encode("Once")[:1]
    with peers.Reference(TARGET, n_ctx=512, n_threads=1, type_kv=TYPE_KV) as reference:
        expected = reference.greedy(prompt, n_tokens)
    with local_target(embedded_target, n_ctx=512, n_threads=1) as target:
        figures, ours, _ = compare(
            benchmark,
            lambda: generated(target, [prompt], max_tokens=n_tokens),
            bench_peer(TARGET, n_tokens, 1),
            "llama-bench",
            rounds=15,
        )
    assert all(sample.texts == ((*expected[: sample.n_tokens],),) for sample in ours)
    report(figures)


def test_embedded_against_llama_cpp_python(
    benchmark: Benchmark, report: Report, embedded_target: sllm.Model, llama_cpp_python: str
) -> None:
    n_tokens = 200
    prompt = embedded_target.vocab.encode("Once upon a time")
    peer_texts = set()

    def peer() -> Sample:
        run = peers.llama_cpp_python(
            llama_cpp_python, TARGET, prompt.tolist(), n_tokens=n_tokens, n_threads=1, type_kv=TYPE_KV
        )
        peer_texts.add(tuple(run.tokens))
        return Sample(n_tokens, n_tokens / run.tokens_per_s)

    with local_target(embedded_target, n_threads=1) as target:
        figures, ours, _ = compare(
            benchmark,
            lambda: generated(target, [prompt], max_tokens=n_tokens),
            peer,
            "llama-cpp-python",
            rounds=15,
        )
    with peers.Reference(TARGET, n_ctx=1024, n_threads=1, type_kv=TYPE_KV) as reference:
        expected = reference.greedy(prompt, n_tokens)
    assert all(sample.texts == ((*expected[: sample.n_tokens],),) for sample in ours)
    figures.more["peer_same_text"] = peer_texts == {tuple(expected)}
    figures.aim, figures.aim_met = "ratio >= 1.2", figures.ratio >= 1.2
    report(figures)


# --- what one selection costs ---

SELECTIONS = {
    "greedy": GREEDY,
    "defaults": SAMPLED,
    "defaults, repetition": replace(SAMPLED, penalty_repeat=1.1),
    "no filters": replace(SAMPLED, top_k=0, top_p=1.0, min_p=0.0),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection(benchmark: Benchmark, report: Report, qwen2: sllm.Model, name: str) -> None:
    """One token out of 151,936 logits, against the least that it could be: one look at each of them."""
    from sllm.engine._ffi import ffi, lib  # not public: a selection is part of longer calls

    n_vocab = qwen2.vocab.n_tokens
    logits = np.random.default_rng(1).normal(0, 2.5, n_vocab).astype(np.float32)
    row, history = ffi.from_buffer("float[]", logits), ffi.new("int32_t[]", list(range(64)))
    sampling, token = qwen2.compiled(SELECTIONS[name]), ffi.new("int32_t *")
    cold = np.zeros(1 << 20, dtype=np.int32)  # what a pass leaves of the nearest cache
    blocks = Blocks()

    def look() -> float:
        cold.sum()
        began = time.thread_time()
        logits.max()
        return time.thread_time() - began

    def call() -> float:
        cold.sum()
        began = time.thread_time()
        status = lib.sllm_select(sampling, row, n_vocab, len(history), history, 0, token, ffi.NULL)
        seconds = time.thread_time() - began
        assert status == 0
        return seconds

    take_turns(benchmark, (blocks.bare, look), (blocks.call, call))
    ours, bare = statistics.median(blocks.call), statistics.median(blocks.bare)
    figures = Figures(1 / ours, "numpy.max() of the row", 1 / bare, bare / ours)
    figures.more = {"selection_us": ours * 1e6, "look_us": bare * 1e6}
    report(figures)


# --- what one call costs ---
#
# The smallest model there is makes the call stand out. Blocks of our calls and of bare llama_decode() of the
# same tokens at the same positions take turns in one process, so that the caches are as cold for one as for
# the other. What is counted is the CPU time of this thread, which does all the work here: a few microseconds
# are less than what another process takes away.

N_CALLS = 64
N_BLOCKS = 40
N_CTX = 512


@pytest.fixture
def reference() -> Iterator[peers.Reference]:
    with peers.Reference(DRAFT, n_ctx=N_CTX, n_threads=1, type_kv=TYPE_KV) as reference:
        yield reference


@pytest.fixture
def context(embedded_draft: sllm.Model) -> Iterator[sllm.Context]:
    with embedded_draft.context(
        n_ctx=N_CTX, n_threads=1, flash_attn=True, type_k=TYPE_KV, type_v=TYPE_KV
    ) as context:
        yield context


@dataclass
class Blocks:
    """CPU seconds a call, block by block: the Python call, the C function under it, and bare llama.cpp."""

    call: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def figures(self, tokens_per_call: int, passes_per_call: int = 1) -> Figures:
        call, bare = statistics.median(self.call), statistics.median(self.bare)
        beyond = [(a - b) * 1e6 for a, b in zip(self.call, self.bare, strict=True)]
        overhead = statistics.median(beyond)
        figures = Figures(tokens_per_call / call, "llama_decode()", tokens_per_call / bare, bare / call)
        figures.more = {
            "overhead_us": overhead,
            "overhead_us_quartiles": [round(float(q), 1) for q in np.percentile(beyond, [25, 75])],
            "llama_decode_us": bare * 1e6,
        }
        if self.core:
            python = statistics.median(a - b for a, b in zip(self.call, self.core, strict=True))
            figures.more["of_it_python_us"] = python * 1e6
        if passes_per_call > 1:
            figures.more["overhead_us_per_pass"] = overhead / passes_per_call
        figures.aim, figures.aim_met = "overhead <= 20 us a call", overhead <= 20
        return figures


def take_turns(benchmark: Benchmark, *turns: tuple[list[float], Callable[[], float]]) -> None:
    """Let every block run once for each round; the last one is what pytest-benchmark times."""
    *others, (times, last) = turns

    def setup() -> None:
        for other_times, block in others:
            other_times.append(block())

    for _ in range(3):
        setup()
        last()
    for kept, _ in others:
        kept.clear()
    benchmark.pedantic(
        lambda: times.append(last()), setup=setup, rounds=N_BLOCKS, iterations=1, warmup_rounds=0
    )
    if not others[0][0]:  # --benchmark-disable runs no setup
        setup()


@pytest.mark.parametrize("n_drafted", [0, 7])
def test_verify_call(
    benchmark: Benchmark, report: Report, reference: peers.Reference, context: sllm.Context, n_drafted: int
) -> None:
    """One-token passes as plain decoding makes them, and passes with seven drafted tokens, all wrong."""
    prompt = context.model.vocab.encode("Once upon a time")
    begin = len(prompt) - 1
    text = np.array([*prompt, *reference.greedy(prompt, N_CALLS)], dtype=np.int32)
    context.decode(text[:begin])
    steps = []
    for pos in range(begin, begin + N_CALLS):
        wrong = (text[pos + 1] + np.arange(1, n_drafted + 1, dtype=np.int32)) % context.model.vocab.n_tokens
        steps.append((pos, text[pos : pos + 1].copy(), wrong.astype(np.int32)))
    expected = text[begin + 1 : begin + 1 + N_CALLS].tolist()
    blocks = Blocks()

    def call() -> float:
        verdicts = []
        began = time.thread_time()
        for pos, last, wrong in steps:
            draft = [wrong] if n_drafted else None
            verdicts.append(context.verify([0], last, draft, sampling=GREEDY, pos=[pos]))
        seconds = time.thread_time() - began
        assert [int(verdict.tokens[0, 0]) for verdict in verdicts] == expected
        assert not any(verdict.n_accepted[0] for verdict in verdicts)
        return seconds / N_CALLS

    core_verify = CoreVerify(context, n_drafted)

    def core() -> float:
        selected = []
        seconds = 0.0
        for pos, last, wrong in steps:
            seconds += core_verify(pos, last, wrong)
            selected.append(core_verify.selected[0])
        assert selected == expected
        return seconds / N_CALLS

    def bare() -> float:
        seconds = 0.0
        for pos, last, wrong in steps:
            argmax, decode = reference.decode(np.concatenate([last, wrong]), pos)
            assert argmax[0] == text[pos + 1]
            seconds += decode
        return seconds / N_CALLS

    take_turns(benchmark, (blocks.bare, bare), (blocks.core, core), (blocks.call, call))
    report(blocks.figures(tokens_per_call=1))


class CoreVerify:
    """``sllm_verify()`` with its buffers laid out beforehand: what is left of a call without Python."""

    def __init__(self, context: sllm.Context, n_drafted: int) -> None:
        from sllm.engine._ffi import (  # not public: only to tell apart where the time of a public call goes
            ffi,
            lib,
        )

        self.function = lib.sllm_verify
        header = [0, -1, -1, 1, n_drafted]  # see sllm.h
        self.jobs = ffi.new("int32_t[]", [*header, 0, *[0] * n_drafted])
        self.selected = ffi.new("int32_t[]", n_drafted + 1)
        sampling = context.model.compiled(GREEDY)
        self.keep = [sampling, ffi.new("sllm_sampling *[]", [sampling])]
        self.arguments = (
            *(context._live, 1, self.jobs, len(self.jobs), self.keep[1], n_drafted, ffi.NULL),
            *(self.selected, ffi.new("int32_t[1]"), ffi.NULL),
        )

    def __call__(self, pos: int, last: Tokens, draft: Tokens) -> float:
        """Seconds of the call."""
        self.jobs[1] = pos
        for i, token in enumerate([*last, *draft]):
            self.jobs[5 + i] = int(token)
        began = time.thread_time()
        status = self.function(*self.arguments)
        seconds = time.thread_time() - began
        assert status == 0
        return seconds


@pytest.mark.parametrize("n_max", [1, 8])
def test_draft_call(
    benchmark: Benchmark, report: Report, reference: peers.Reference, context: sllm.Context, n_max: int
) -> None:
    """``draft()`` against as many bare passes; selections and probabilities count as overhead."""
    prompt = context.model.vocab.encode("Once upon a time")
    begin = len(prompt) - 1
    text = np.array([*prompt, *reference.greedy(prompt, N_CALLS + n_max)], dtype=np.int32)
    end = begin + N_CALLS
    eog = [i for i in range(begin + 1, len(text)) if context.model.vocab.is_eog(int(text[i]))]
    if eog:  # chains end behind it
        end = min(end, eog[0] - n_max)
    assert end > begin, "the draft model ends its text at once"
    context.decode(text[:begin])
    blocks = Blocks()

    def call() -> float:
        drafts = []
        began = time.thread_time()
        for pos in range(begin, end):
            draft = context.draft([0], text[pos : pos + 1], n_max=n_max, sampling=GREEDY, pos=[pos])
            drafts.append(draft)
        seconds = time.thread_time() - began
        for pos, draft in zip(range(begin, end), drafts, strict=True):
            assert draft.tokens[0].tolist() == text[pos + 1 : pos + 1 + n_max].tolist()
        return seconds / (end - begin)

    def bare() -> float:
        seconds = 0.0
        for pos in range(begin, end):
            for i in range(pos, pos + n_max):
                argmax, decode = reference.decode(text[i : i + 1], i)
                assert argmax[0] == text[i + 1]
                seconds += decode
        return seconds / (end - begin)

    take_turns(benchmark, (blocks.bare, bare), (blocks.call, call))
    report(blocks.figures(tokens_per_call=n_max, passes_per_call=n_max))

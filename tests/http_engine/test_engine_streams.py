"""Texts that an engine streams with its own noise: always its stream's, whatever jumps ahead of it."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from oracles import PLAIN, examples, one_by_one
from remote_worker import n_threads

import sllm
from sllm.http_engine.generation import EngineGeneration
from sllm.http_engine.selection import RowSelector
from sllm.http_engine.streamed import StreamedGeneration, StreamStats
from sllm.targets.base import PipelinedGeneration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.generation.text_stream import TextStream
    from sllm.http_engine.rows import Row

APIS = ("vllm", "sglang")
N = 48
PROMPT = "Once upon a time"
PACE = 0.01


def sampling_of(api: str, **changes: Any) -> sllm.SamplingParams:
    return replace(PLAIN, noise=api, temperature=0.8, top_k=16, seed=5, **changes)


@pytest.fixture(scope="module")
def engines(target_model: sllm.Model) -> Iterator[dict[str, tuple[FakeEngine, sllm.EngineTarget]]]:
    with ExitStack() as stack:
        found = {}
        for api in APIS:
            engine = stack.enter_context(FakeEngine(target_model, api, n_ctx=320))
            target = sllm.EngineTarget(engine.url, target_model, experimental=True)
            found[api] = engine, stack.enter_context(target)
        yield found


@pytest.fixture(params=APIS)
def engine(
    request: pytest.FixtureRequest, engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]]
) -> Iterator[FakeEngine]:
    found = engines[request.param][0]
    found.bodies.clear()
    found.hung_up.clear()
    found.pace = PACE
    yield found
    found.faults.clear()
    found.pace = 0.0


@pytest.fixture
def target(engine: FakeEngine, engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]]) -> sllm.EngineTarget:
    return engines[engine.api][1]


def tokens_of(stream: TextStream) -> list[int]:
    with stream:
        return [token for run in stream for token in run.tokens]


def stats_of(stream: TextStream) -> StreamStats:
    remote = stream.stats.remote
    assert isinstance(remote, StreamStats)
    return remote


def own_text(engine: FakeEngine, prompt: list[int], sampling: sllm.SamplingParams, n: int) -> list[int]:
    """What the engine streams, without anything of ours."""
    pace, engine.pace = engine.pace, 0.0
    try:
        return list(engine.drawn(prompt, n, [], sampling))
    finally:
        engine.pace = pace


class Known:
    """Drafts from a text that is known, with mistakes in some of its tokens."""

    def __init__(self, text: list[int], *, right: float = 1.0, seed: int = 0, longest: int = 32) -> None:
        self._longest = longest
        rng = np.random.default_rng(seed)
        self._text = [t if rng.random() < right else (t + 1) % 300 for t in text]

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        return self._text[len(tokens) : len(tokens) + min(n_max, self._longest)]


def test_the_stream_is_the_text(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model, draft_model: sllm.Model
) -> None:
    prompt = target_model.vocab.encode(PROMPT)
    sampling = sampling_of(engine.api)
    wanted = own_text(engine, prompt.tolist(), sampling, N)
    assert wanted == one_by_one(target_model, prompt, sampling, N)
    engine.bodies.clear()
    stream = sllm.generate(target, prompt, sampling=sampling, max_tokens=N)
    assert tokens_of(stream) == wanted
    assert len(engine.bodies) == 1  # nothing but one stream
    for draft in (draft_model, "ngram"):
        stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=N)
        assert tokens_of(stream) == wanted
        assert stats_of(stream).n_disagreed == 0


def driven(target: sllm.EngineTarget, prompt: list[int], draft: list[int], n: int) -> StreamedGeneration:
    """A text whose every commit is followed by a hint out of ``draft``; its engine is next door."""
    sampling = sampling_of(target.info.api)
    generation = target.open(np.array(prompt, dtype=np.int32), sampling, n)
    assert isinstance(generation, StreamedGeneration)
    generation.remote.round_trip = 0.0
    with closing(generation):
        for commit in generation:
            end = commit.pos + len(commit.tokens)
            generation.hint(end, draft[end : end + 16])
    return generation


def test_a_sure_draft_jumps_ahead(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    prompt = target_model.vocab.encode(PROMPT).tolist()
    wanted = own_text(engine, prompt, sampling_of(engine.api), 2 * N)
    generation = driven(target, prompt, [*prompt, *wanted], 2 * N)
    assert generation._text == [*prompt, *wanted]
    stats = generation.remote
    assert stats.n_jumps > 0
    assert stats.n_jumped > 0
    assert stats.n_disagreed == 0


@examples(15)
@given(
    api=st.sampled_from(APIS),
    right=st.sampled_from([0.0, 0.7, 0.95, 1.0]),
    seed=st.integers(0, 3),
    longest=st.integers(1, 32),
    fault=st.sampled_from([None, "cut", "close", "garbage event", "503 0.01"]),
    at=st.integers(0, 4),
)
def test_whatever_is_drafted_and_breaks_the_text_is_the_streams(
    engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]],
    target_model: sllm.Model,
    api: str,
    right: float,
    seed: int,
    longest: int,
    fault: str | None,
    at: int,
) -> None:
    engine, target = engines[api]
    prompt = target_model.vocab.encode(PROMPT).tolist()
    sampling = replace(sampling_of(api), seed=seed)
    wanted = own_text(engine, prompt, sampling, N)
    engine.faults[:] = [None] * at + [fault]
    engine.pace = 0.003
    try:
        stream = sllm.generate(
            target,
            np.array(prompt, dtype=np.int32),
            draft=Known([*prompt, *wanted], right=right, seed=seed, longest=longest),
            sampling=sampling,
            max_tokens=N,
        )
        assert tokens_of(stream) == wanted
        assert stats_of(stream).n_disagreed == 0
    finally:
        engine.faults.clear()
        engine.pace = 0.0


def test_rows_that_say_something_else_are_counted_and_end_the_jumps(
    engine: FakeEngine,
    target: sllm.EngineTarget,
    target_model: sllm.Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = target_model.vocab.encode(PROMPT).tolist()
    wanted = own_text(engine, prompt, sampling_of(engine.api), N)
    select = RowSelector.select

    def wrong(selector: RowSelector, row: Row, text: list[int]) -> int | None:
        token = select(selector, row, text)
        selector.lead = 9.0
        return None if token is None else (token + 1) % 300

    monkeypatch.setattr(RowSelector, "select", wrong)
    generation = driven(target, prompt, [*prompt, *wanted], N)
    assert len(generation._text) == len(prompt) + N
    assert generation.remote.n_disagreed == 1


def test_an_engine_that_is_gone_is_an_error(target_model: sllm.Model) -> None:
    before = n_threads("sllm-engine")
    engine = FakeEngine(target_model, "vllm", n_ctx=320, pace=0.02)
    with sllm.EngineTarget(engine.url, target_model, experimental=True, deadline=0.5) as target:
        stream = sllm.generate(target, PROMPT, sampling=sampling_of("vllm"), max_tokens=200)
        seen: list[int] = []
        with stream, pytest.raises(sllm.RemoteError):
            for run in stream:
                seen += run.tokens
                if len(seen) == 5:
                    engine.close()
        assert 5 <= len(seen) < 100
    assert n_threads("sllm-engine") == before


def test_one_that_refuses_is_an_error(engine: FakeEngine, target: sllm.EngineTarget) -> None:
    engine.faults[:] = ["400 no such thing"]
    with pytest.raises(sllm.RemoteError, match="no such thing"):
        tokens_of(sllm.generate(target, PROMPT, sampling=sampling_of(engine.api), max_tokens=5))


def test_what_is_left_early_ends_at_the_engine(engine: FakeEngine, target: sllm.EngineTarget) -> None:
    stream = sllm.generate(target, PROMPT, sampling=sampling_of(engine.api), max_tokens=250)
    with stream:
        next(iter(stream))
    assert engine.hung_up.wait(10)


def test_cancelling_ends_a_blocked_wait(engine: FakeEngine, target: sllm.EngineTarget) -> None:
    engine.pace = 0.5
    tokens = np.array([5, 6, 7], dtype=np.int32)
    generation: Any = target.open(tokens, sampling_of(engine.api), 20)
    assert isinstance(generation, PipelinedGeneration)
    next(generation)
    threading.Timer(0.05, generation.cancel).start()
    with pytest.raises(sllm.CancelledError):
        while True:
            next(generation)
    generation.close()
    with pytest.raises(sllm.ClosedError):
        generation.poll()


def test_polling_waits_no_longer_than_it_is_told(engine: FakeEngine, target: sllm.EngineTarget) -> None:
    engine.pace = 0.4
    generation = target.open(np.array([5, 6, 7], dtype=np.int32), sampling_of(engine.api), 2)
    assert isinstance(generation, StreamedGeneration)
    try:
        assert generation.poll(0.0) is None
        generation.wake()
        assert generation.poll(None) is None
        commits = []
        began = time.monotonic()
        while generation.finish_reason is None and time.monotonic() - began < 60:
            commit = generation.poll(0.05)
            if commit is not None:
                commits.append(commit)
        assert [commit.pos for commit in commits] == [3, 4]
        assert generation.finish_reason == "length"
        assert list(generation) == []
    finally:
        generation.close()


def test_a_stream_that_ends_without_its_last_token(
    engine: FakeEngine, target: sllm.EngineTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some engines keep the token that ends a text to themselves: the rows tell it."""
    sampling = sampling_of(engine.api)
    prompt = target.vocab.encode(PROMPT).tolist()
    wanted = own_text(engine, prompt, sampling, 12)
    drawn = engine.drawn

    def keep_last(text: list[int], n: int, *rest: Any) -> Iterator[int]:
        end = len(prompt) + len(wanted)
        yield from drawn(text, min(n, end - 1 - len(text)), *rest)

    monkeypatch.setattr(engine, "drawn", keep_last)
    stream = sllm.generate(target, PROMPT, sampling=sampling, max_tokens=12)
    assert tokens_of(stream) == wanted

    # Where these cannot be had, nothing else says how the text goes on.
    engine.faults = [None, None, "500 on fire"]  # two streams, and then the rows
    stream = sllm.generate(target, PROMPT, sampling=sampling, max_tokens=12)
    with pytest.raises(sllm.RemoteError, match="500"):
        tokens_of(stream)


def test_without_the_word_experimental_tokens_are_selected_here(
    engine: FakeEngine, target_model: sllm.Model
) -> None:
    prompt = target_model.vocab.encode(PROMPT)
    sampling = sampling_of(engine.api)
    engine.pace = 0.0
    with sllm.EngineTarget(engine.url, target_model) as target:
        generation = target.open(prompt, sampling, 5)
        assert isinstance(generation, EngineGeneration)
        generation.close()
        stream = sllm.generate(target, prompt, sampling=sampling, max_tokens=N)
        assert tokens_of(stream) == one_by_one(target_model, prompt, sampling, N)


def test_another_noise_than_the_engines_own_is_selected_here(
    engine: FakeEngine, target: sllm.EngineTarget
) -> None:
    other = "sglang" if engine.api == "vllm" else "vllm"
    for sampling in (sampling_of(other), sampling_of("sllm"), sampling_of(engine.api, logit_bias={7: 1.0})):
        generation = target.open(np.array([5, 6, 7], dtype=np.int32), sampling, 5)
        assert isinstance(generation, EngineGeneration)
        generation.close()

"""Texts of serving engines: those of one token at a time, whatever the engine, the draft, the parameters."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_engine import APIS, FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from oracles import GREEDY, PLAIN, examples, one_by_one

import sllm
from sllm.http_engine.generation import EngineStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.generation.text_stream import TextStream

N = 24
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engines(target_model: sllm.Model) -> Iterator[dict[str, tuple[FakeEngine, sllm.EngineTarget]]]:
    """One of each kind, and a target over it."""
    with ExitStack() as stack:
        found = {}
        for api in APIS:
            engine = stack.enter_context(FakeEngine(target_model, api, slots=4, n_ctx=320))
            found[api] = engine, stack.enter_context(sllm.EngineTarget(engine.url, target_model))
        yield found


@pytest.fixture(params=APIS)
def engine(
    request: pytest.FixtureRequest, engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]]
) -> Iterator[FakeEngine]:
    found = engines[request.param][0]
    found.bodies.clear()
    found.hung_up.clear()
    yield found
    found.faults.clear()


@pytest.fixture
def target(engine: FakeEngine, engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]]) -> sllm.EngineTarget:
    target = engines[engine.api][1]
    target._run = 8
    return target


def tokens_of(stream: TextStream) -> list[int]:
    with stream:
        return [token for run in stream for token in run.tokens]


@st.composite
def hinting(draw: st.DrawFn) -> Any:
    """A draft that is right now and then, and proposes nothing at times."""
    return draw(st.integers(0, 2**32 - 1)), draw(st.floats(0, 1)), draw(st.integers(1, 12))


class SometimesRight:
    """Drafts from a text that is known, with mistakes."""

    def __init__(self, text: list[int], n_vocab: int, seed: int, share: float, longest: int) -> None:
        self._text, self._n_vocab = text, n_vocab
        self._rng = np.random.default_rng(seed)
        self._share, self._longest = share, longest

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        n = int(self._rng.integers(0, min(self._longest, n_max) + 1))
        rest = self._text[len(tokens) : len(tokens) + n]
        return [
            t if self._rng.random() < self._share else int(self._rng.integers(self._n_vocab)) for t in rest
        ]


SAMPLINGS = [
    GREEDY,
    replace(PLAIN, temperature=0.7, top_k=20),
    replace(PLAIN, temperature=1.3, top_k=5, top_p=0.8),
    replace(PLAIN, top_k=1),
    replace(PLAIN, temperature=0.5, min_p=0.2),
    replace(GREEDY, logit_bias={300: 2.0, 301: -3.0}),
    replace(PLAIN, top_k=10, penalty_freq=0.7, penalty_present=0.1),
]


@examples(40)
@given(
    api=st.sampled_from(APIS),
    sampling=st.sampled_from(SAMPLINGS),
    seed=st.integers(0, 3),
    draft=hinting(),
    run=st.sampled_from([1, 3, 8]),
)
def test_a_text_with_a_draft_is_that_of_one_token_at_a_time(
    engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]],
    target_model: sllm.Model,
    api: str,
    sampling: sllm.SamplingParams,
    seed: int,
    draft: tuple[int, float, int],
    run: int,
) -> None:
    target = engines[api][1]
    target._run = run
    params = replace(sampling, seed=seed)
    prompt = target_model.vocab.encode(PROMPT)
    expected = one_by_one(target_model, prompt, params, N)
    drafter = SometimesRight([*prompt.tolist(), *expected], target_model.vocab.n_tokens, *draft)
    for proposing in (None, drafter):
        stream = sllm.generate(target, prompt, draft=proposing, sampling=params, max_tokens=N)
        assert tokens_of(stream) == expected
        stats = stream.stats.remote
        assert isinstance(stats, EngineStats)
        assert stats.n_decided + stats.n_certified >= len(expected)


def test_a_hint_that_is_right_commits_itself_and_one_more_with_one_request(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    params = replace(PLAIN, temperature=0.8, top_k=20, seed=3)
    prompt = target_model.vocab.encode(PROMPT)
    expected = one_by_one(target_model, prompt, params, N)
    target._run = 1
    generation = target.open(prompt, params, N)
    generation.hint(len(prompt), expected[:3])  # the prompt has not been computed: not that many times now
    found = list(next(generation).tokens)
    assert found == expected[:1]
    for n in (3, 2, 3):
        generation.hint(len(prompt) + len(found), expected[len(found) : len(found) + n])
        commit = next(generation)
        assert (commit.n_accepted, commit.n_verified, len(commit.tokens)) == (n, n, n + 1)
        found += commit.tokens
    generation.hint(len(prompt) + len(found), [0, 0, 0])  # and one that is wrong gives one token
    assert next(generation).n_accepted == 0
    generation.close()
    assert found == expected[: len(found)]
    assert generation.remote.n_requests == 5


def test_a_greedy_text_without_a_draft_is_one_stream(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    stream = sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=N)
    assert tokens_of(stream) == one_by_one(target_model, target_model.vocab.encode(PROMPT), GREEDY, N)
    assert [body.get("stream") for body in engine.bodies] == [True]


def test_a_stop_string_ends_the_text_and_the_stream(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    plain = sllm.generate(target_model, PROMPT, sampling=GREEDY, max_tokens=N).text()
    stop = plain[len(plain) // 3 :][:5]
    engine.pace = 0.02  # so that it has not ended by itself
    try:
        with sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=200, stop=stop) as stream:
            assert stream.text() == plain.partition(stop)[0]
            assert stream.stats.finish_reason == "stop"
        assert engine.hung_up.wait(10)
    finally:
        engine.pace = 0


@pytest.mark.parametrize("api", APIS)
def test_a_text_that_ends_by_itself_ends(target_model: sllm.Model, api: str) -> None:
    end = target_model.vocab.eos
    assert end is not None
    with ExitStack() as stack:
        engine = stack.enter_context(FakeEngine(target_model, api, n_ctx=128, max_logprobs=5000))
        target = stack.enter_context(sllm.EngineTarget(engine.url, target_model))
        _check_ends(target, target_model, end)


def _check_ends(target: sllm.EngineTarget, target_model: sllm.Model, end: int) -> None:
    for sampling in (GREEDY, replace(PLAIN, top_k=20)):
        params = replace(sampling, logit_bias={end: 14.0})
        expected = one_by_one(target_model, target_model.vocab.encode(PROMPT), params, 64)
        stream = sllm.generate(target, PROMPT, sampling=params, max_tokens=64)
        assert tokens_of(stream) == expected
        assert len(expected) < 64
        assert stream.stats.finish_reason == "eog"


def test_a_text_of_characters_in_several_tokens_is_whole(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    """llama-server withholds the rows within a character, in runs and in streams."""
    prompt = target_model.vocab.encode("你好，龘")
    for params in (GREEDY, replace(PLAIN, top_k=20, temperature=2.0, seed=7)):
        expected = one_by_one(target_model, prompt, params, 40)
        assert tokens_of(sllm.generate(target, prompt, sampling=params, max_tokens=40)) == expected


def test_more_logprobs_are_asked_for_where_they_decide(target_model: sllm.Model) -> None:
    params = replace(PLAIN, temperature=1.5, seed=11)
    expected = one_by_one(target_model, target_model.vocab.encode(PROMPT), params, N)
    with FakeEngine(target_model, "vllm", max_logprobs=-1) as engine:
        engine.max_logprobs = target_model.vocab.n_tokens
        with sllm.EngineTarget(engine.url, target_model, logprobs=2) as target:
            stream = sllm.generate(target, PROMPT, sampling=params, max_tokens=N)
            assert tokens_of(stream) == expected
    stats = stream.stats.remote
    assert isinstance(stats, EngineStats)
    assert stats.n_raised > 0


def test_what_cannot_be_decided_is_an_error_and_what_was_certain_comes_first(
    target_model: sllm.Model,
) -> None:
    params = replace(PLAIN, temperature=1.5, min_p=0.001, seed=11)
    expected = one_by_one(target_model, target_model.vocab.encode(PROMPT), params, 64)
    with FakeEngine(target_model, "vllm", max_logprobs=3) as engine, ExitStack() as stack:
        target = stack.enter_context(sllm.EngineTarget(engine.url, target_model))
        stream = stack.enter_context(sllm.generate(target, PROMPT, sampling=params, max_tokens=64))
        seen: list[int] = []
        with pytest.raises(sllm.UndecidedError, match=r"top_k=0.* --max-logprobs N") as caught:
            for run in stream:
                seen += run.tokens
        assert seen == expected[: len(seen)]
        assert "use top_k 1 to 3" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"top_k": 0}, sllm.UndecidedError, r"20 log-prob.*top_k=0.*--max-logprobs"),
        ({"top_k": 21}, sllm.UndecidedError, "top_k=21"),
        ({"top_k": 5, "penalty_repeat": 1.1}, sllm.UnsupportedModelError, "penalty_repeat is 1.1"),
    ],
)
def test_what_is_hopeless_is_refused_before_anything_is_sent(
    engines: dict[str, tuple[FakeEngine, sllm.EngineTarget]],
    change: dict[str, Any],
    error: type[Exception],
    what: str,
) -> None:
    engine, target = engines["vllm"]
    before = engine.n_requests
    with pytest.raises(error, match=what):
        sllm.generate(target, PROMPT, sampling=replace(PLAIN, **change), max_tokens=4)
    assert engine.n_requests == before


@pytest.mark.parametrize("api", APIS)
def test_texts_at_the_end_of_the_context(target_model: sllm.Model, api: str) -> None:
    n_prompt = len(target_model.vocab.encode(PROMPT))
    with FakeEngine(target_model, api, n_ctx=32) as engine, ExitStack() as stack:
        target = stack.enter_context(sllm.EngineTarget(engine.url, target_model))
        for params in (GREEDY, replace(PLAIN, top_k=5)):
            stream = sllm.generate(target, PROMPT, sampling=params, draft="ngram")
            assert len(tokens_of(stream)) == 32 - n_prompt
            assert stream.stats.finish_reason == "context"
        with pytest.raises(sllm.ContextFullError, match="takes 31"):
            sllm.generate(target, [5] * 32)


def test_ties_that_the_engine_has_cut_are_counted(target_model: sllm.Model) -> None:
    """Where more are exactly as likely as the last of top_k, the engine says which come first."""
    with FakeEngine(target_model, "vllm", n_ctx=64) as engine, ExitStack() as stack:
        flat = np.full(target_model.vocab.n_tokens, -np.log(target_model.vocab.n_tokens), dtype=np.float32)
        target = stack.enter_context(sllm.EngineTarget(engine.url, target_model))
        engine.logprobs = lambda text: flat  # type: ignore[method-assign]
        stream = sllm.generate(target, PROMPT, sampling=replace(PLAIN, top_k=5), max_tokens=6)
        assert set(tokens_of(stream)) <= set(range(5))
        stats = stream.stats.remote
        assert isinstance(stats, EngineStats)
        assert stats.n_tied == stats.n_decided >= 1

"""What can go wrong with a serving engine: typed errors, nothing wrong in the text, nothing lost."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_engine import APIS, FakeEngine
from oracles import GREEDY, PLAIN, one_by_one

import sllm
from sllm.http_engine import transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = "Once upon a time"
SAMPLED = replace(PLAIN, top_k=20, seed=5)
N = 16


@pytest.fixture(params=APIS)
def engine(request: pytest.FixtureRequest, target_model: sllm.Model) -> Iterator[FakeEngine]:
    with FakeEngine(target_model, request.param, n_ctx=128) as engine:
        yield engine


@pytest.fixture
def target(engine: FakeEngine, target_model: sllm.Model) -> Iterator[sllm.EngineTarget]:
    with sllm.EngineTarget(engine.url, target_model, deadline=20.0) as target:
        engine.bodies.clear()
        engine.n_requests = 0
        yield target


def expected(model: sllm.Model, params: sllm.SamplingParams = SAMPLED) -> list[int]:
    return one_by_one(model, model.vocab.encode(PROMPT), params, N)


def perfect(model: sllm.Model, params: sllm.SamplingParams = SAMPLED) -> Callable[..., list[int]]:
    """A draft that is right."""
    text = [*model.vocab.encode(PROMPT).tolist(), *expected(model, params)]
    return lambda tokens, n: text[len(tokens) : len(tokens) + min(n, 4)]


def tokens_of(stream: Any) -> list[int]:
    with stream:
        return [token for run in stream for token in run.tokens]


# ---- what is sent again


@pytest.mark.parametrize(
    "fault", ["close", "cut", "503 0", "429 0.05", "503", "502 bad", "503 Mon, 01 Jan 2024 00:00:00 GMT"]
)
def test_what_was_lost_is_sent_again(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model, fault: str
) -> None:
    engine.faults = [None, fault, None, fault]
    stream = sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N)
    assert tokens_of(stream) == expected(target_model)
    assert engine.faults == []
    remote = stream.stats.remote
    assert remote is not None
    assert remote.n_reconnects == (2 if fault in ("close", "cut") else 0)


def test_a_refusal_says_how_long_to_wait(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    engine.faults = ["503 0.7"]
    stream = sllm.generate(target, PROMPT, sampling=SAMPLED, max_tokens=N)
    assert tokens_of(stream) == expected(target_model)
    assert stream.stats.remote is not None
    assert stream.stats.remote.lost_seconds >= 0.7


def test_idle_connections_that_were_closed_cost_nothing(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    assert tokens_of(sllm.generate(target, PROMPT, sampling=SAMPLED, max_tokens=N)) == expected(target_model)
    engine.drop_connections()
    assert tokens_of(sllm.generate(target, PROMPT, sampling=SAMPLED, max_tokens=N)) == expected(target_model)


def test_connections_are_used_again(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    before = engine.n_connections
    tokens_of(sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N))
    assert engine.n_requests >= 3
    assert engine.n_connections <= before + 1  # the first run may still be on its way while the next is asked


def test_a_stream_that_breaks_off_loses_nothing(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    engine.faults = ["cut", "cut"]
    stream = sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=N)
    assert tokens_of(stream) == expected(target_model, GREEDY)
    assert engine.faults == []


# ---- what is not an answer

WRONG = {
    "garbage": "something else than JSON",
    "500 on fire": "HTTP status 500: on fire",
    "404 no": "HTTP status 404: no",
    "spoil fewer": "answered with|answered without|an event without",
    "spoil nan": "nan",
    "spoil missing": "log-probabilities of a position, expected",
    "spoil twice": "two log-probabilities of token|log-probabilities of a position, expected",
    "spoil stranger": "for a token, expected an id of the vocabulary",
    "spoil positive": "expected a number <= 0",
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_answer_is_an_error(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model, fault: str, place: int
) -> None:
    # A stream without any event is asked for again, in the other way.
    engine.faults = [None] * place + [fault] * (2 if fault == "garbage" and place == 0 else 1)
    with (
        sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N) as stream,
        pytest.raises(sllm.RemoteError, match=WRONG[fault]) as caught,
    ):
        seen: list[int] = []
        for run in stream:
            seen += run.tokens
    assert seen == expected(target_model)[: len(seen)]
    assert bool(seen) == bool(place)
    assert "127.0.0.1" in str(caught.value)


def test_rows_in_another_order_are_put_in_theirs(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    engine.faults = ["spoil shuffled"] * 50
    stream = sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N)
    assert tokens_of(stream) == expected(target_model)


def test_rows_of_the_same_place_are_an_error(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    engine.faults = [None, "spoil same place twice"]
    stream = sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N)
    with pytest.raises(sllm.RemoteError, match="answered with"):
        tokens_of(stream)


def test_a_garbled_event_is_an_error_after_what_came_before(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    engine.faults = ["event garbage"]
    seen: list[int] = []
    with (
        sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=N) as stream,
        pytest.raises(sllm.RemoteError, match="an event that is no JSON"),
    ):
        for run in stream:
            seen += run.tokens
    assert seen == expected(target_model, GREEDY)[:3]


def test_a_body_beyond_all_measure_is_an_error(
    engine: FakeEngine,
    target: sllm.EngineTarget,
    target_model: sllm.Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "MAX_BODY", 1_000_000)
    monkeypatch.setattr(transport, "MAX_EVENT", 1_000_000)
    for place in (0, 1):
        engine.faults = [None] * place + ["huge"]
        with pytest.raises(sllm.RemoteError, match="more than 1000000 bytes"):
            tokens_of(
                sllm.generate(target, PROMPT, draft=perfect(target_model), sampling=SAMPLED, max_tokens=N)
            )


def test_an_engine_that_is_busy_for_too_long(engine: FakeEngine, target_model: sllm.Model) -> None:
    with sllm.EngineTarget(engine.url, target_model, deadline=1.0) as target:
        for fault, error in (
            ("503 0.2", sllm.BusyError),
            ("429 30", sllm.BusyError),
            ("close", sllm.RemoteError),
        ):
            engine.faults = [fault] * 50
            with pytest.raises(error):
                tokens_of(sllm.generate(target, PROMPT, sampling=SAMPLED, max_tokens=N))
        engine.faults.clear()


def test_an_engine_that_does_not_answer(engine: FakeEngine, target_model: sllm.Model) -> None:
    with sllm.EngineTarget(engine.url, target_model, deadline=0.8) as target:
        for sampling in (SAMPLED, GREEDY):
            engine.hung_up.clear()
            engine.faults = ["hang"]
            with pytest.raises(sllm.RemoteError, match="does not answer in time"):
                tokens_of(sllm.generate(target, PROMPT, sampling=sampling, max_tokens=N))
            assert engine.hung_up.wait(10)


# ---- cancel


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["run", "stream"])
def test_cancel_ends_the_request_that_is_under_way(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model, sampling: sllm.SamplingParams
) -> None:
    engine.faults = ["hang"]
    generation = target.open(target_model.vocab.encode(PROMPT), sampling, N)
    canceller = threading.Timer(0.3, generation.cancel)
    canceller.start()
    began = time.monotonic()
    with pytest.raises(sllm.CancelledError):
        next(generation)
    canceller.join()
    assert time.monotonic() - began < 15
    assert engine.hung_up.wait(10)  # the engine sees that nobody listens
    with pytest.raises(sllm.CancelledError):
        next(generation)
    generation.close()
    assert tokens_of(sllm.generate(target, PROMPT, sampling=sampling, max_tokens=N)) == expected(
        target_model, sampling
    )


def test_close_ends_everything(engine: FakeEngine, target_model: sllm.Model) -> None:
    target = sllm.EngineTarget(engine.url, target_model)
    generation = target.open(target_model.vocab.encode(PROMPT), SAMPLED, N)
    engine.faults = ["hang"]
    failed: list[BaseException] = []

    def read() -> None:
        try:
            next(generation)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    target.close()
    reader.join(10)
    assert [type(error) for error in failed] == [sllm.CancelledError]
    assert engine.hung_up.wait(10)
    assert not [t for t in threading.enumerate() if t.name == "sllm-engine"]
    with pytest.raises(sllm.ClosedError):
        next(generation)
    with pytest.raises(sllm.ClosedError):
        target.open(target_model.vocab.encode(PROMPT), SAMPLED, N)
    target.close()


def test_many_texts_at_once(engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model) -> None:
    texts: dict[int, list[int]] = {}

    def write(seed: int) -> None:
        texts[seed] = tokens_of(
            sllm.generate(target, PROMPT, draft="ngram", sampling=replace(SAMPLED, seed=seed), max_tokens=N)
        )

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {seed: expected(target_model, replace(SAMPLED, seed=seed)) for seed in range(6)}


# ---- scores


def test_scores_are_those_of_the_model(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    text = target_model.vocab.encode("Once upon a time there was a zebra.")
    with sllm.LocalTarget(target_model, n_ctx=128, **sllm.engine.exact.SETTINGS) as local:
        known = local.score(text, 3)
    found = target.score(text, 3)
    np.testing.assert_allclose(found.logprobs, known.logprobs, atol=1e-4)
    told = found.ranks < 2**31 - 1
    assert told.any()
    np.testing.assert_array_equal(found.ranks[told], known.ranks[told])
    if engine.api != "sglang":
        assert told.all()
    for bad in (text[:1], np.array([1, 1 << 20], dtype=np.int32)):
        with pytest.raises(ValueError, match="two tokens or more"):
            target.score(bad, 1)
    with pytest.raises(sllm.ContextFullError):
        target.score(np.full(200, 5, dtype=np.int32), 3)


# ---- opening


def test_who_answers_otherwise_is_told_apart(target_model: sllm.Model) -> None:
    with FakeEngine(target_model, "vllm") as engine:
        engine.shown = {"/version": {"nothing": 1}, "/v1/models": {"data": [{"id": "m", "owned_by": "me"}]}}
        with pytest.raises(sllm.RemoteError, match=r"is not vLLM, SGLang or llama-server.*llama-cpp-python"):
            sllm.EngineTarget(engine.url, target_model)
        with pytest.raises(sllm.RemoteError, match="is not sglang"):
            sllm.EngineTarget(engine.url, target_model, api="sglang")


def test_the_wrong_vocabulary_is_refused(engine: FakeEngine, smollm2_vocab: sllm.Model) -> None:
    with pytest.raises(sllm.VocabMismatchError, match="has another vocabulary"):
        sllm.EngineTarget(engine.url, smollm2_vocab)


@pytest.fixture
def smollm2_vocab(random_model: Callable[..., Any]) -> Iterator[sllm.Model]:
    """A model with another vocabulary."""
    with sllm.Model(random_model("llama"), vocab_only=True) as model:
        yield model


def test_a_key_is_asked_for(target_model: sllm.Model) -> None:
    with FakeEngine(target_model, "vllm", api_key="right", n_ctx=64) as engine:
        for key in (None, "wrong"):
            with pytest.raises(sllm.AuthError, match="refused the key"):
                sllm.EngineTarget(engine.url, target_model, api_key=key)
        with sllm.EngineTarget(engine.url, target_model, api_key="right") as target:
            assert tokens_of(sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=2))


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"api": "tgi"}, ValueError, "api is 'tgi'"),
        ({"run": 0}, ValueError, "run"),
        ({"logprobs": 0}, ValueError, "logprobs"),
        ({"logprobs": 21}, ValueError, r"logprobs is 21, and .* gives 20.*--max-logprobs"),
        ({"deadline": 0}, ValueError, "deadline"),
        ({"api_key": "a\nb"}, ValueError, "no HTTP header"),
    ],
)
def test_arguments_are_checked(
    target_model: sllm.Model, change: dict[str, Any], error: type[Exception], what: str
) -> None:
    with FakeEngine(target_model, "vllm", n_ctx=64) as engine, pytest.raises(error, match=what):
        sllm.EngineTarget(engine.url, target_model, **change)
    assert not [t for t in threading.enumerate() if t.name == "sllm-engine"]


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://user:key@host/v1", "http://"])
def test_what_is_no_address(target_model: sllm.Model, url: str) -> None:
    with pytest.raises(ValueError, match="the address of an engine"):
        sllm.EngineTarget(url, target_model)


def test_what_the_engine_says_of_itself(target_model: sllm.Model) -> None:
    with ExitStack() as stack:
        found = {}
        for api in APIS:
            engine = stack.enter_context(FakeEngine(target_model, api, n_ctx=256, slots=3))
            target = stack.enter_context(sllm.EngineTarget(engine.url, target_model))
            found[api] = target.info
            assert target.info.prefix_cache is True
            assert target.info.tokenizer == "the same"
            assert target.info.n_ctx == 256
    assert [found[api].max_logprobs for api in APIS] == [20, None, None]
    assert [found[api].n_slots for api in APIS] == [None, None, 3]
    assert [found[api].batch_invariant for api in APIS] == [None, True, None]
    assert "--max-logprobs" in " ".join(found["vllm"].advice())
    assert "-np 8" in " ".join(found["llama-server"].advice())
    assert found["sglang"].advice() == []


def test_a_forgotten_target_is_complained_about(target_model: sllm.Model) -> None:
    with FakeEngine(target_model, "vllm", n_ctx=64) as engine:
        target = sllm.EngineTarget(engine.url, target_model)
        with pytest.warns(ResourceWarning, match="unclosed <sllm.EngineTarget of vllm"):
            del target
    assert not [t for t in threading.enumerate() if t.name == "sllm-engine"]

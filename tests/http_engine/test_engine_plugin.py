"""Texts of a vLLM that selects with sllm's noise (examples/vllm-plugin): its own stream is the text."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeEngine
from oracles import GREEDY, PLAIN, one_by_one

import sllm
from sllm.http_engine.generation import EngineGeneration
from sllm.http_engine.streamed import StreamedGeneration, StreamStats
from sllm.http_engine.transport import Call
from sllm.targets.base import RemoteStats

if TYPE_CHECKING:
    from collections.abc import Iterator

N = 40
SAMPLED = replace(PLAIN, temperature=0.8, top_k=16, seed=2**64 - 5)


@pytest.fixture(scope="module")
def engine(target_model: sllm.Model) -> Iterator[FakeEngine]:
    with FakeEngine(target_model, "vllm", n_ctx=320, plugin=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def target(engine: FakeEngine, target_model: sllm.Model) -> Iterator[sllm.EngineTarget]:
    with sllm.EngineTarget(engine.url, target_model) as target:
        yield target


def test_it_is_found_where_it_is(
    engine: FakeEngine, target: sllm.EngineTarget, target_model: sllm.Model
) -> None:
    assert target.info.selects
    for api in ("vllm", "sglang"):
        with (
            FakeEngine(target_model, api, n_ctx=320) as other,
            sllm.EngineTarget(other.url, target_model) as plain,
        ):
            assert not plain.info.selects


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 0}, {"top_k": 0, "min_p": 0.05, "temperature": 1.3}, {"top_p": 0.7, "seed": 0}],
    ids=repr,
)
@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_the_stream_is_the_text(
    engine: FakeEngine,
    target: sllm.EngineTarget,
    target_model: sllm.Model,
    draft_model: sllm.Model,
    changes: dict[str, Any],
    draft: str | None,
) -> None:
    sampling = replace(SAMPLED, **changes)
    prompt = target_model.vocab.encode("Once upon a time")
    engine.bodies.clear()
    stream = sllm.generate(
        target, prompt, draft=draft_model if draft == "model" else draft, sampling=sampling, max_tokens=N
    )
    tokens = [token for run in stream for token in run.tokens]
    assert tokens == one_by_one(target_model, prompt, sampling, N)
    remote = stream.stats.remote
    assert isinstance(remote, StreamStats)
    assert remote.n_disagreed == 0
    if draft is None:
        assert [body["stream"] for body in engine.bodies] == [True]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(SAMPLED, logit_bias={5: 1.0}),
        replace(SAMPLED, penalty_freq=0.1),
        replace(SAMPLED, grammar='root ::= "a"*'),
        replace(SAMPLED, noise="vllm", seed=1),
    ],
    ids=["greedy", "bias", "penalty", "grammar", "vLLM's noise"],
)
def test_what_the_plugin_does_not_do_is_selected_here(
    target: sllm.EngineTarget, target_model: sllm.Model, sampling: sllm.SamplingParams
) -> None:
    generation = target.open(target_model.vocab.encode("Once"), sampling, 4)
    assert isinstance(generation, EngineGeneration)
    generation.close()


def test_what_it_does_is_streamed(target: sllm.EngineTarget, target_model: sllm.Model) -> None:
    generation = target.open(target_model.vocab.encode("Once"), SAMPLED, 4)
    assert isinstance(generation, StreamedGeneration)
    generation.close()


def test_a_request_that_nobody_waits_for_can_be_cancelled(
    engine: FakeEngine, target: sllm.EngineTarget
) -> None:
    link, dialect = target._engine.link, target._engine.dialect
    call, answers = Call(RemoteStats()), queue.SimpleQueue[Any]()
    engine.bodies.clear()
    engine.pace = 2.0
    try:
        link.begin(*dialect.rows_request([5, 6], [], 5), call=call, done=answers.put)
        until = time.monotonic() + 30
        while not engine.bodies and time.monotonic() < until:
            time.sleep(0.01)
        canceller = threading.Thread(target=call.cancel, daemon=True)
        canceller.start()
        canceller.join(30)
        assert not canceller.is_alive()
        assert isinstance(answers.get(timeout=30), sllm.errors.CancelledError)
    finally:
        engine.pace = 0.0

"""The hint loop obeys what is known of a draft's worth, and what it learns stays with the worker."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from oracles import EXACT, PLAIN, one_by_one, without_end

import sllm
from sllm.draft.payoff import Payoff
from sllm.generation import pipelined
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.generation.text_stream import TextStream
    from sllm.remote.connection import Remote

N_CTX = 256
PROMPT = "Once upon a time"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def worker(target_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    state: Path = tmp_path_factory.mktemp("state")
    with Worker(target_model, state=state, n_ctx=N_CTX, pass_seconds=0.005, **EXACT) as worker:
        yield worker


@pytest.fixture
def remote(worker: Worker) -> Iterator[Remote]:
    with sllm.connect(worker.uri) as remote:
        yield remote


@pytest.fixture(scope="module")
def endless(target_model: Model) -> sllm.SamplingParams:
    return replace(without_end(target_model, PLAIN), seed=3)


@pytest.fixture(scope="module")
def wanted(target_model: Model, endless: sllm.SamplingParams) -> list[int]:
    return one_by_one(target_model, target_model.vocab.encode(PROMPT), endless, 60)


class Fixed(Payoff):
    """Has made up its mind."""

    verdict = False

    @property
    def drafting(self) -> bool:
        return self.verdict

    @property
    def prepares(self) -> bool:
        return False


class Favourable(Fixed):
    verdict = True


class Fickle(Payoff):
    """Changes its mind at any time."""

    _dice = random.Random(4)

    @property
    def drafting(self) -> bool:
        return self._dice.random() < 0.5

    @property
    def prepares(self) -> bool:
        return self._dice.random() < 0.5


def tell(
    remote: Remote, draft: Model | str, sampling: sllm.SamplingParams, *, run_ahead: bool = True
) -> TextStream:
    target = remote.target(run_ahead=run_ahead)
    return sllm.generate(target, PROMPT, draft=draft, sampling=sampling, max_tokens=60)


def tokens_in(stream: TextStream) -> list[int]:
    return [token for run in stream for token in run.tokens]


def test_a_draft_that_does_not_pay_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    remote: Remote,
    draft_model: Model,
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    monkeypatch.setattr(pipelined, "Payoff", Fixed)
    stream = tell(remote, draft_model, endless)
    assert tokens_in(stream) == wanted
    assert stream.stats.remote is not None
    assert stream.stats.remote.n_hints == stream.stats.draft_seconds == stream.stats.n_drafted == 0


@pytest.mark.parametrize("run_ahead", [True, False])
def test_one_that_pays_is_used(
    monkeypatch: pytest.MonkeyPatch,
    remote: Remote,
    draft_model: Model,
    endless: sllm.SamplingParams,
    wanted: list[int],
    run_ahead: bool,
) -> None:
    """A target that waits to be asked gets its drafts whatever they cost."""
    monkeypatch.setattr(pipelined, "Payoff", Favourable if run_ahead else Fixed)
    stream = tell(remote, draft_model, endless, run_ahead=run_ahead)
    assert tokens_in(stream) == wanted
    assert stream.stats.n_accepted > 0


@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_whoever_changes_their_mind_gets_the_same_text(
    monkeypatch: pytest.MonkeyPatch,
    remote: Remote,
    draft_model: Model,
    endless: sllm.SamplingParams,
    wanted: list[int],
    draft: str,
) -> None:
    monkeypatch.setattr(pipelined, "Payoff", Fickle)
    for _ in range(4):
        assert tokens_in(tell(remote, draft_model if draft == "model" else draft, endless)) == wanted


def test_what_was_learnt_is_known_to_the_next_text_on_any_connection(
    worker: Worker, draft_model: Model, endless: sllm.SamplingParams
) -> None:
    with sllm.connect(worker.uri) as first, sllm.connect(worker.uri) as second:
        assert first.link.learnt is second.link.learnt
        assert not first.link.learnt
        tokens_in(tell(first, draft_model, endless))
        tokens_in(tell(first, "ngram", endless))
        known = dict(first.link.learnt)
        assert len(known) == 3  # a look-up's worth says nothing of a model's, and there is what passes take
        tokens_in(tell(second, draft_model, endless))
        assert first.link.learnt.keys() == known.keys()
        payoffs = [found for found in first.link.learnt.values() if isinstance(found, Payoff)]
        assert [payoff._n_texts for payoff in payoffs] == [0, 0]
        assert all(payoff in known.values() for payoff in payoffs)
    with sllm.connect(worker.uri) as third:  # with the last connection it is forgotten
        assert not third.link.learnt


def test_a_text_that_is_left_in_the_middle_is_not_counted_any_more(
    remote: Remote, draft_model: Model, endless: sllm.SamplingParams
) -> None:
    with tell(remote, draft_model, endless) as stream:
        next(stream)
    (payoff,) = (found for found in remote.link.learnt.values() if isinstance(found, Payoff))
    assert payoff._n_texts == 0

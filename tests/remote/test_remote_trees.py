"""Hints that are trees, over the link: the text is the target's own whatever they say or the link does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, PLAIN, examples, make_prompt, one_by_one, without_end
from remote_worker import through
from trees import main_path, random_tree
from worker_links import bytes_to_go_on

import sllm
from sllm.cli.slow_link import Link
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote
    from sllm.remote.target import RemoteGeneration

N_CTX = 256


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["", "own draft"])
def worker(
    request: pytest.FixtureRequest,
    target_model: Model,
    draft_model: Model,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Worker]:
    state: Path = tmp_path_factory.mktemp("state")
    draft = draft_model if request.param else None
    limits = Limits(sessions=3, hints_per_s=100_000)
    with Worker(target_model, draft=draft, n_ctx=N_CTX, state=state, limits=limits, **EXACT) as worker:
        yield worker


@pytest.fixture(scope="module")
def remote(worker: Worker) -> Iterator[Remote]:
    with sllm.connect(worker.uri) as remote:
        yield remote


def read(
    generation: RemoteGeneration, at: int, wanted: list[int], rng: np.random.Generator, n_vocab: int
) -> list[int]:
    """The whole text, with trees hinted on the way that often know how it goes on."""
    text: list[int] = []
    while generation.finish_reason is None:
        if rng.random() < 0.3:  # what disagrees with the text, perhaps, and is dropped
            generation.hint(at + len(text) - 1, *random_tree(rng, 9, wanted, n_vocab))
        n_old = int(rng.integers(0, min(len(text), 3) + 1))  # a hint may begin with what is there already
        tokens, parents = random_tree(rng, int(rng.integers(0, 40)), wanted[len(text) :], n_vocab)
        old = text[len(text) - n_old :]
        ways = [*range(-1, n_old - 1), *(parent + n_old for parent in parents)]
        generation.hint(at + len(text) - n_old, [*old, *tokens], ways)
        commit = generation.poll(None)
        if commit is not None:
            assert commit.pos == at + len(text)
            assert 0 <= commit.n_accepted < len(commit.tokens)
            assert commit.n_accepted <= commit.n_verified
            text += commit.tokens
    return text


@examples(10)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 0.7, 1.0]), run_ahead=st.booleans())
def test_texts_are_the_targets_own_whatever_trees_are_hinted(
    remote: Remote, target_model: Model, seed: int, temperature: float, run_ahead: bool
) -> None:
    """Several at once, some of them to the end of the context, where branches have no room."""
    n_vocab = target_model.vocab.n_tokens
    rng = np.random.default_rng(seed)
    jobs = []
    for i in range(3):
        prompt = make_prompt(target_model, int(rng.integers(2, 20)), seed=int(rng.integers(0, 99))).tolist()
        sampling = replace(PLAIN, temperature=temperature, seed=seed + i)
        n_tokens = [30, 60, None][i]
        wanted = one_by_one(target_model, prompt, sampling, n_tokens or N_CTX - len(prompt), n_ctx=N_CTX)
        jobs.append((prompt, sampling, n_tokens, wanted, rng.integers(0, 2**32)))
    target = remote.target(run_ahead=run_ahead)

    def text(job: tuple[list[int], sllm.SamplingParams, int | None, list[int], int]) -> list[int]:
        prompt, sampling, n_tokens, wanted, own = job
        generation = target.open(np.array(prompt, dtype=np.int32), sampling, n_tokens)
        try:
            assert generation.can_branch
            return read(generation, len(prompt), wanted, np.random.default_rng(own), n_vocab)
        finally:
            generation.close()

    with ThreadPoolExecutor(3) as executor:
        for found, job in zip(executor.map(text, jobs), jobs, strict=True):
            assert found == job[3]


@pytest.mark.parametrize("run_ahead", [True, False])
def test_trees_survive_a_link_that_breaks_again_and_again(
    worker: Worker, target_model: Model, run_ahead: bool
) -> None:
    prompt = make_prompt(target_model, 9, seed=2).tolist()
    sampling = without_end(target_model, replace(PLAIN, seed=4))
    wanted = one_by_one(target_model, prompt, sampling, 80, n_ctx=N_CTX)
    host, port = worker.address.host, worker.address.port
    with Link((host, port)) as link, sllm.connect(through(link, worker.uri)) as remote:
        link.cut_after_bytes = bytes_to_go_on(worker, prompt, sampling) + 3000
        generation = remote.target(run_ahead=run_ahead).open(np.array(prompt, dtype=np.int32), sampling, 80)
        rng = np.random.default_rng(5)
        assert read(generation, len(prompt), wanted, rng, target_model.vocab.n_tokens) == wanted
        assert generation.remote.n_reconnects >= 1
        generation.close()


def test_a_worker_that_knows_no_trees_gets_the_main_path(
    worker: Worker, remote: Remote, target_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tuple(name for name in remote.link.info.features if name != "trees")
    monkeypatch.setattr(remote.link, "info", replace(remote.link.info, features=known))
    prompt = make_prompt(target_model, 5, seed=1)
    sampling = without_end(target_model, replace(PLAIN, seed=1))
    wanted = one_by_one(target_model, prompt, sampling, 40, n_ctx=N_CTX)
    generation = remote.target(run_ahead=False).open(prompt, sampling, 40)
    assert not generation.can_branch
    rng = np.random.default_rng(3)
    text: list[int] = []
    while generation.finish_reason is None:
        at = len(prompt) + len(text)
        tokens, parents = random_tree(rng, 20, wanted[len(text) :], target_model.vocab.n_tokens)
        generation.hint(at, tokens, parents)
        message = generation._hint_message().hint
        assert not message.parents
        assert list(message.tokens) == main_path(tokens, parents)
        commit = generation.poll(None)
        text += commit.tokens if commit is not None else ()
    generation.close()
    assert text == wanted


def test_a_tree_is_sent_as_far_as_the_worker_takes_it(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.link, "info", replace(remote.link.info, max_hint=3))
    generation = remote.target(run_ahead=False).open(np.array([5, 6], dtype=np.int32), PLAIN, 4)
    n_vocab = remote.vocab.n_tokens
    generation.hint(2, [7, n_vocab, 9, 10, 11, 12], [-1, -1, 1, 0, 0, 3])
    message = generation._hint_message().hint
    assert (list(message.tokens), list(message.parents)) == ([7, 10, 11], [0, 1, 1])
    with pytest.raises(ValueError, match="parent"):
        generation.hint(2, [7, 8], [1, 0])
    assert generation._hint_message().hint == message  # what was wrong has changed nothing
    generation.cancel()
    generation.close()

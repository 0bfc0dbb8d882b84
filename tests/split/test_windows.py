"""Windows in flight through a split: whatever is sent ahead, the text is that of the whole model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, make_prompt, one_by_one, without_end
from trees import random_tree
from worker_links import N_CTX, cutting, split_over, two_workers

import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.errors import CancelledError
from sllm.split import target as module
from sllm.split.target import SplitGeneration, windows_worth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.cli.slow_link import Link
    from sllm.engine.model import Model
    from sllm.remote.connection import Remote
    from sllm.targets.base import RemoteStats


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Remote], list[Link]]]:
    with two_workers(tmp_path_factory.mktemp("state"), sessions=3, n_ctx=N_CTX) as both:
        yield both


@pytest.fixture(scope="module", autouse=True)
def several() -> Iterator[None]:
    """As many windows as on a link that is far slower than a pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "windows_worth", lambda _round_trip, _pass_seconds: 5)
        yield


def push(generation: SplitGeneration) -> None:
    """Send ahead as if the first worker were free."""
    generation._free_at = 0.0
    assert generation.push() >= 0


def likely_tree(
    rng: np.random.Generator, ahead: list[int], n_vocab: int, p_right: float
) -> tuple[list[int], list[int]]:
    """A long path of which each token is the text's own with this chance, and a random tree beside it."""
    n = int(rng.integers(1, 25))
    tokens = [token if rng.random() < p_right else (token + 1) % n_vocab for token in ahead[:n]]
    parents = list(range(-1, len(tokens) - 1))
    beside, their_parents = random_tree(rng, int(rng.integers(0, 12)), ahead, n_vocab)
    at_root = {token for token, parent in zip(tokens, parents, strict=True) if parent < 0}
    place: dict[int, int] = {-1: -1}
    for i, (token, parent) in enumerate(zip(beside, their_parents, strict=True)):
        if parent in place and not (parent < 0 and token in at_root):
            place[i] = len(tokens)
            tokens.append(token)
            parents.append(place[parent])
    return tokens, parents


def write(
    split: sllm.SplitTarget,
    prompt: Any,
    sampling: sllm.SamplingParams,
    wanted: list[int],
    seed: int,
    p_right: float = 0.85,
) -> RemoteStats:
    """Write the text with windows of random sizes; returns what it has cost."""
    rng = np.random.default_rng(seed)
    generation = split.open(prompt, sampling, len(wanted))
    n_vocab = split.vocab.n_tokens
    text: list[int] = []
    try:
        while generation.finish_reason is None:
            ahead = wanted[len(text) :]
            for _ in range(int(rng.integers(0, 4))):
                tokens, parents = likely_tree(rng, ahead, n_vocab, p_right)
                n_first = int(rng.integers(0, len(tokens) + 1))
                generation.hint(len(prompt) + len(text), tokens, parents, n_first=n_first)
                push(generation)
            commit = next(generation)
            assert commit.pos == len(prompt) + len(text)
            assert 0 <= commit.n_accepted <= len(commit.tokens) - 1
            assert commit.n_accepted <= commit.n_verified
            text += commit.tokens
            assert text == wanted[: len(text)]
    finally:
        generation.close()
    assert text == wanted
    return generation.remote


# ---- the text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "tail"), [(2, 1), (0, 0), (4, 3), (2, None)], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, PLAIN, sllm.SamplingParams(temperature=0.8, seed=4, penalty_repeat=1.3, penalty_last_n=16)],
    ids=["greedy", "plain", "penalties"],
)
def test_the_text_is_that_of_the_whole_model(
    target_model: Model,
    chain: tuple[list[Remote], list[Link]],
    head: int,
    tail: int | None,
    sampling: sllm.SamplingParams,
) -> None:
    sampling = without_end(target_model, sampling)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 60, N_CTX)
    with split_over(chain[0][0], head=head, tail=tail) as split:
        found = [write(split, prompt, sampling, wanted, seed) for seed in range(3)]
        n_ahead, n_void = sum(one.n_ahead for one in found), sum(one.n_void for one in found)
        if tail is None:  # the worker selects: what follows its answer is not known before it
            assert n_ahead == n_void == 0
        else:
            assert n_ahead > n_void > 0


@pytest.mark.parametrize("hops", [False, True])
def test_a_chain_of_workers(target_model: Model, chain: tuple[list[Remote], list[Link]], hops: bool) -> None:
    remotes, links = chain
    sampling = without_end(target_model, PLAIN)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 50, N_CTX)
    with split_over(remotes, hops=[f"127.0.0.1:{links[2].port}"] if hops else False) as split:
        found = write(split, prompt, sampling, wanted, seed=3)
        assert (found.n_ahead > 0) == hops  # else the rows of each pass are carried here


@examples(12)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(2_000, 90_000)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    p_right=st.sampled_from([0.5, 0.9, 1.0]),
    hops=st.booleans(),
)
def test_cuts_of_any_link_change_nothing(
    target_model: Model,
    chain: tuple[list[Remote], list[Link]],
    cuts: list[tuple[int, int]],
    seed: int,
    p_right: float,
    hops: bool,
) -> None:
    remotes, links = chain
    sampling = without_end(target_model, sllm.SamplingParams(temperature=0.8, seed=seed))
    prompt = make_prompt(target_model, 1 + seed % 60, seed % 1000)
    wanted = one_by_one(target_model, prompt, sampling, 40, N_CTX)
    middle: Any = remotes if hops else remotes[0]
    where = {"hops": [f"127.0.0.1:{links[2].port}"]} if hops else {}
    with (
        split_over(middle, head=1, **where) as split,
        cutting([(links[which], n_bytes) for which, n_bytes in cuts]),
    ):
        write(split, prompt, sampling, wanted, seed, p_right)


def test_the_end_of_the_context(target_model: Model, chain: tuple[list[Remote], list[Link]]) -> None:
    sampling = without_end(target_model, GREEDY)
    with split_over(chain[0][0]) as split:
        prompt = make_prompt(target_model, split.n_ctx - 30, 1)
        wanted = one_by_one(target_model, prompt, sampling, 30, N_CTX)
        n_ahead = 0
        for seed in range(6):
            n_ahead += write(split, prompt, sampling, wanted, seed).n_ahead
        assert n_ahead > 0


# ---- what crosses the link ---------------------------------------------------------------------------------


def test_windows_by_hand(target_model: Model, chain: tuple[list[Remote], list[Link]]) -> None:
    """Ten tokens, the eighth is wrong: of windows of three the third one has it, and the fourth is void."""
    sampling = without_end(target_model, GREEDY)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 40, N_CTX)
    with split_over(chain[0][0]) as split:
        generation = split.open(prompt, sampling, 40)
        for _ in range(2):  # the first comes with the prompt; the second tells what a pass takes
            next(generation)
        draft = [*wanted[2:9], (wanted[9] + 1) % split.vocab.n_tokens, *wanted[10:14]]
        for end in (3, 6, 9, 12):
            generation.hint(22, draft[:end], n_first=3)
            push(generation)
        assert (generation.remote.n_ahead, generation.remote.n_void) == (3, 0)
        commits = [next(generation) for _ in range(3)]
        assert [commit.tokens for commit in commits] == [
            tuple(wanted[2:6]),
            tuple(wanted[6:9]),
            tuple(wanted[9:10]),
        ]
        assert [(commit.n_accepted, commit.n_verified) for commit in commits] == [(3, 3), (2, 2), (0, 2)]
        assert generation.remote.n_void == 1
        n_again = generation.remote.n_again
        commit = next(generation)
        assert commit.tokens == (wanted[10],)
        assert generation.remote.n_again == n_again  # all of the text was on the main path
        generation.close()


def test_a_text_that_ends_while_windows_are_on_their_way(
    target_model: Model, chain: tuple[list[Remote], list[Link]]
) -> None:
    """Closed or cancelled, the next text finds nothing of them."""
    sampling = without_end(target_model, GREEDY)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 40, N_CTX)
    with split_over(chain[0][0]) as split:
        for cancels in (False, True):
            generation = split.open(prompt, sampling, 40)
            for _ in range(2):
                next(generation)
            for end in (4, 8, 12):
                generation.hint(22, wanted[2 : 2 + end], n_first=4)
                push(generation)
            assert generation.remote.n_ahead == 2
            if cancels:
                thread = threading.Thread(target=generation.cancel)
                thread.start()
                thread.join()
                with pytest.raises(CancelledError):
                    next(generation)
                assert generation.push() == 0
            generation.close()
            assert generation.push() == 0
            write(split, prompt, sampling, wanted, seed=2)


# ---- the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_sends_ahead_over_a_slow_link(
    target_model: Model,
    draft_model: Model,
    chain: tuple[list[Remote], list[Link]],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    remotes, links = chain
    monkeypatch.setattr(links[0], "delay", 0.05)  # each way
    sampling = without_end(target_model, sllm.SamplingParams(temperature=temperature, seed=2))
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 80, N_CTX)
    with split_over(remotes[0]) as split, ModelDrafter(draft_model, n_ctx=N_CTX, **EXACT) as drafter:
        stream = sllm.generate(split, prompt, draft=drafter, sampling=sampling, max_tokens=80)
        assert [token for run in stream for token in run.tokens] == wanted
        stats = stream.stats
        assert stats.remote is not None
        assert stats.remote.n_ahead > 0
        assert stats.n_tokens == 80


def test_how_many() -> None:
    assert windows_worth(0.0005, 0.02) == 1
    assert windows_worth(0.05, 0.02) == 2
    assert windows_worth(0.1, 0.02) == 5
    assert windows_worth(10.0, 0.02) == 8
    assert windows_worth(0.003, 0.0001) == 1  # a message takes longer than such a link

"""Trees of drafted tokens through a split: the text is that of the whole model, whatever they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, make_prompt, one_by_one, without_end
from random_models import HYBRID
from trees import main_path, n_right, random_tree
from worker_links import N_CTX, cutting, split_over, two_workers

import sllm
from sllm.cli.slow_link import Link
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Remote], list[Link]]]:
    with two_workers(tmp_path_factory.mktemp("state"), sessions=3, n_ctx=N_CTX) as both:
        yield both


def write(
    split: sllm.SplitTarget,
    prompt: Any,
    sampling: sllm.SamplingParams,
    wanted: list[int],
    seed: int,
    n_nodes: int = 20,
) -> tuple[int, int, int]:
    """Write the text with random trees; returns the passes, the accepted tokens, and for how many passes the
    best path of the tree was not its main one.
    """
    rng = np.random.default_rng(seed)
    generation = split.open(prompt, sampling, len(wanted))
    n_vocab = split.vocab.n_tokens
    text: list[int] = []
    n_passes = n_accepted = n_side = 0
    try:
        while generation.finish_reason is None:
            ahead = wanted[len(text) :]
            tokens, parents = random_tree(rng, int(rng.integers(0, n_nodes)), ahead, n_vocab)
            if rng.random() < 0.2:
                tokens, parents = ahead[:4], list(range(-1, len(ahead[:4]) - 1))
            generation.hint(len(prompt) + len(text), tokens, parents)
            at_once = generation.ready
            commit = next(generation)
            main = main_path(tokens, parents)
            on_main = n_right(main, range(-1, len(main) - 1), ahead[:-1])
            best = n_right(tokens, parents, ahead[:-1]) if generation.can_branch else on_main
            assert commit.pos == len(prompt) + len(text)
            if not at_once and n_nodes < generation.max_chain:  # nothing is left out
                assert commit.n_accepted == best
            text += commit.tokens
            assert text == wanted[: len(text)]
            n_passes += 1
            n_accepted += commit.n_accepted
            n_side += best > on_main
    finally:
        generation.close()
    assert text == wanted
    return n_passes, n_accepted, n_side


# ---- the text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "tail"), [(2, 1), (0, 0), (0, None), (4, 3), (2, None)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_the_whole_model(
    target_model: Model,
    chain: tuple[list[Remote], list[Link]],
    head: int,
    tail: int | None,
    temperature: float,
) -> None:
    sampling = without_end(target_model, sllm.SamplingParams(temperature=temperature, seed=4))
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 50, N_CTX)
    with split_over(chain[0][0], head=head, tail=tail) as split:
        n_passes, n_accepted, n_side = write(split, prompt, sampling, wanted, seed=3)
        assert n_side > 0
        assert n_passes < len(wanted)
        assert n_accepted + n_passes == len(wanted)
        other = make_prompt(target_model, 12, 2)
        write(split, other, sampling, one_by_one(target_model, other, sampling, 20, N_CTX), seed=5)
        write(split, prompt, sampling, wanted, seed=6)  # what it shares with the texts before stays


@pytest.mark.parametrize("hops", [False, True])
@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_chain_of_workers(
    target_model: Model, chain: tuple[list[Remote], list[Link]], tail: int | None, hops: bool
) -> None:
    remotes, links = chain
    sampling = without_end(target_model, PLAIN)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 50, N_CTX)
    where = [f"127.0.0.1:{links[2].port}"] if hops else False
    with split_over(remotes, tail=tail, hops=where) as split:
        _, _, n_side = write(split, prompt, sampling, wanted, seed=3)
        assert n_side > 0


@pytest.mark.parametrize("tail", [1, None], ids=str)
@examples(10)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(2_000, 60_000)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    hops=st.booleans(),
)
def test_cuts_of_any_link_change_nothing(
    target_model: Model,
    chain: tuple[list[Remote], list[Link]],
    tail: int | None,
    cuts: list[tuple[int, int]],
    seed: int,
    hops: bool,
) -> None:
    remotes, links = chain
    sampling = without_end(target_model, sllm.SamplingParams(temperature=0.8, seed=seed))
    prompt = make_prompt(target_model, 1 + seed % 60, seed % 1000)
    wanted = one_by_one(target_model, prompt, sampling, 25, N_CTX)
    where = [f"127.0.0.1:{links[2].port}"] if hops else False
    with (
        split_over(remotes, head=1, tail=tail, hops=where) as split,
        cutting([(links[which], n_bytes) for which, n_bytes in cuts]),
    ):
        write(split, prompt, sampling, wanted, seed)


# ---- what crosses the link ---------------------------------------------------------------------------------


def test_each_node_crosses_once_and_an_accepted_branch_twice(
    target_model: Model, chain: tuple[list[Remote], list[Link]]
) -> None:
    sampling = without_end(target_model, GREEDY)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 30, N_CTX)
    with split_over(chain[0][0]) as split:
        row = 4 * split._embedding.n_embd
        generation = split.open(prompt, sampling, len(wanted))
        next(generation)
        sizes = []

        def step(tokens: list[int], parents: list[int]) -> int:
            at = len(generation._text)
            generation.hint(at, tokens, parents)
            before = generation.remote.bytes_up
            found = next(generation)
            sizes.append(generation.remote.bytes_up - before)
            return found.n_accepted

        ahead = wanted[1:]
        wrong = [t for t in range(300, 320) if t not in wanted]
        # 1. A main path of two right tokens, and a side branch of one: 4 rows.
        assert step([*ahead[:2], wrong[0]], [-1, 0, -1]) == 2
        # 2. The right path is a side branch: 5 rows with the last token; the accepted three come again.
        assert step([wrong[0], *ahead[3:6]], [-1, -1, 1, 2]) == 3
        # 3. The last token, and those three.
        assert step([], []) == 0
        # 4. Nothing is left to be sent again.
        assert step([], []) == 0
        assert [round(size / row) for size in sizes] == [4, 5, 4, 1]
        assert generation.remote.n_again == 3
        generation.close()


def test_more_than_a_pass_can_have(target_model: Model, chain: tuple[list[Remote], list[Link]]) -> None:
    """Nodes that a pass has no place for are left out, from the end."""
    sampling = without_end(target_model, GREEDY)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 3, N_CTX)
    side = [t for t in range(300, 363) if t != wanted[1]]
    with split_over(chain[0][0]) as split:
        for tokens, n_accepted in (([wanted[1], *side], 1), ([*side, wanted[1]], 0)):
            generation = split.open(prompt, sampling, 3)
            next(generation)
            generation.hint(len(prompt) + 1, tokens, [-1] * len(tokens))
            commit = next(generation)
            assert (commit.n_accepted, commit.n_verified) == (n_accepted, generation.max_chain)
            generation.close()


def test_the_end_of_the_context(target_model: Model, chain: tuple[list[Remote], list[Link]]) -> None:
    sampling = without_end(target_model, GREEDY)
    with split_over(chain[0][0]) as split:
        prompt = make_prompt(target_model, split.n_ctx - 9, 1)
        wanted = one_by_one(target_model, prompt, sampling, 9, N_CTX)
        for seed in range(6):
            write(split, prompt, sampling, wanted, seed, n_nodes=40)


def test_hints_that_are_no_trees(target_model: Model, chain: tuple[list[Remote], list[Link]]) -> None:
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, GREEDY, 5, N_CTX)
    with split_over(chain[0][0]) as split:
        generation = split.open(prompt, GREEDY, 5)
        for tokens, parents in (([1, 2], [0, -1]), ([1, 1], [-1, -1]), ([1], [-1, 0]), ([1] * 99, [-1] * 99)):
            with pytest.raises(ValueError, match="tree"):
                generation.hint(20, tokens, parents)
        assert [t for commit in generation for t in commit.tokens] == wanted
        generation.close()


# ---- where there are none ----------------------------------------------------------------------------------


def test_a_worker_that_takes_none_gets_the_main_path(
    target_model: Model, chain: tuple[list[Remote], list[Link]], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = chain[0][0].link
    features = tuple(feature for feature in link.info.features if feature != "trees")
    monkeypatch.setattr(link, "info", replace(link.info, features=features))
    sampling = without_end(target_model, PLAIN)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 30, N_CTX)
    with split_over(chain[0][0]) as split:
        generation = split.open(prompt, sampling, 1)
        assert not generation.can_branch
        generation.close()
        write(split, prompt, sampling, wanted, seed=3)


@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_worker_that_takes_none_in_the_place_of_one_that_did(
    target_model: Model,
    chain: tuple[list[Remote], list[Link]],
    monkeypatch: pytest.MonkeyPatch,
    tail: int | None,
) -> None:
    remotes, _ = chain
    link = remotes[0].link
    sampling = without_end(target_model, PLAIN)
    prompt = make_prompt(target_model, 20, 1)
    wanted = one_by_one(target_model, prompt, sampling, 30, N_CTX)
    older = tuple(feature for feature in link.info.features if feature != "trees")
    with split_over(remotes[0], tail=tail) as split:
        generation = split.open(prompt, sampling, len(wanted))
        text = [*next(generation).tokens]
        right = wanted[1:4]
        side = [t for t in (300, 301) if t != right[0]]
        generation.hint(len(prompt) + 1, [side[0], *right], [-1, -1, 1, 2])
        commit = next(generation)
        assert commit.n_accepted == 3
        text += commit.tokens
        # The other worker's Info comes with the connection that takes the place of the lost one.
        monkeypatch.setattr(link, "info", replace(link.info, features=older))
        generation.hint(len(prompt) + len(text), [*wanted[5:7], 300], [-1, 0, -1])
        commit = next(generation)
        assert not generation.can_branch
        assert commit.n_accepted == 2
        text += commit.tokens
        for commit in generation:
            text += commit.tokens
        assert text == wanted
        generation.close()


def test_a_model_with_a_state_gets_the_main_path(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("qwen35")
    cut = HYBRID["qwen35"].cuts()[0]
    options: dict[str, Any] = {"n_ctx": 256, "n_rollback": 4, **EXACT}
    with (
        sllm.Model(path) as model,
        Worker(path, layers=(cut[1], cut[2]), insecure=True, **options) as worker,
        sllm.connect(worker.uri) as remote,
        split_over(
            remote, path=path, head=cut[1], tail=model.n_layer - cut[2], n_ctx=256, n_rollback=4
        ) as split,
    ):
        assert "trees" not in remote.link.info.features
        sampling = without_end(model, PLAIN)
        prompt = make_prompt(model, 20, 1)
        wanted = one_by_one(model, prompt, sampling, 20, 256)
        _, n_accepted, n_side = write(split, prompt, sampling, wanted, seed=3, n_nodes=5)
        assert n_side == 0
        assert n_accepted > 0

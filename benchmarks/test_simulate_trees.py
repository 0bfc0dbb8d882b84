"""The recorder of ranks, and the simulator of trees: by hand, against formulas, and against the other one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sllm
from sllm.embedded import DRAFT, TARGET
from sllm.engine._ffi import lib

from . import ranks, simulate
from .measure import TYPE_KV
from .ranks import N_RANKS, gumbel, pairs, rank_text, shares
from .simulate_trees import Link, Text, Tree, chain, local, main, remote

ROW = [0.6, 0.2, 0.1, 0.05]


def text(ranks: list[int], row: list[float] = ROW) -> Text:
    return Text(ranks, [row] * len(ranks))


def drawn(n: int, seed: int = 1) -> Text:
    """Positions at which each candidate is as likely to be right as its share says."""
    rng = random.Random(seed)
    rank, rows = [], []
    for _ in range(n):
        first = rng.choice([0.35, 0.6, 0.9, 0.97])
        row = [first, *((1 - first) * share for share in (0.5, 0.25, 0.15))]
        rank.append(rng.choices([0, 1, 2, 3, -1], [*row, 1 - sum(row)])[0])
        rows.append(row)
    return Text(rank, rows)


def nowhere() -> Iterator[list[float]]:
    while True:
        yield ROW


# ---- recording


@pytest.mark.parametrize(("seed", "pos"), [(0, 0), (5, 3), (2**63 + 7, 1000), (2**64 - 1, 31)])
def test_the_noise_is_that_of_the_selection(seed: int, pos: int) -> None:
    tokens = np.array([0, 1, 77, 2000, 151_935])
    expected = [lib.sllm_gumbel(seed, pos, int(token)) for token in tokens]
    assert gumbel(seed, pos, tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "sampling",
    [
        sllm.SamplingParams(temperature=0),
        sllm.SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=3),
        sllm.SamplingParams(temperature=0.7, seed=4),
    ],
    ids=["greedy", "plain", "filtered"],
)
def test_the_first_candidate_is_what_the_draft_selects(sampling: sllm.SamplingParams) -> None:
    n = 40
    with sllm.Model(TARGET) as target_model, sllm.Model(DRAFT) as draft_model:
        options: dict[str, Any] = {
            "n_ctx": 256,
            "n_threads": 1,
            "flash_attn": True,
            "type_k": TYPE_KV,
            "type_v": TYPE_KV,
        }
        with target_model.context(**options) as target, draft_model.context(**options) as draft:
            prompt = target_model.vocab.encode("Once upon a time there was a little fox")
            recorded = ranks.record(target, draft, prompt, sampling, n)
            words = list(prompt)
            target.memory.clear()
            target.decode(prompt[:-1])
            for i in range(len(recorded)):
                draft.memory.clear()
                first = draft.draft([0], [words], n_max=1, sampling=sampling, start=[len(prompt)])
                assert recorded.tokens[i, 0] == first.tokens[0, 0]
                assert recorded.probs[i, 0] == pytest.approx(first.probs[0, 0], rel=1e-4)
                words.append(int(target.verify([0], [words[-1]], sampling=sampling).tokens[0, 0]))
                found = np.flatnonzero(recorded.tokens[i] == words[-1])
                assert recorded.rank[i] == (found[0] if len(found) else -1)
    assert len(recorded) == n
    assert (recorded.gaps[:, 0] == 0).all()
    assert (recorded.gaps[:, 1:] >= recorded.gaps[:, :-1]).all()


def test_few_candidates() -> None:
    logits = np.array([[0.0, 5.0, 4.0, -9.0]], dtype=np.float32)
    greedy = rank_text(logits, [2], 7, sllm.SamplingParams(temperature=0))
    assert greedy.tokens[0].tolist() == [1, 2, 0, 3, -1, -1, -1, -1]
    assert greedy.rank.tolist() == [1]
    assert greedy.gaps[0, :4].tolist() == [0, 1, 5, 14]
    assert np.isinf(greedy.gaps[0, 4:]).all()
    kept = rank_text(logits, [0], 7, sllm.SamplingParams(temperature=1, top_k=2, top_p=1, min_p=0))
    assert sorted(kept.tokens[0].tolist()) == [-1] * 6 + [1, 2]
    assert kept.rank.tolist() == [-1]
    assert kept.probs.sum() == pytest.approx(1)


def test_shares() -> None:
    gaps = np.array([[0, 0.5, 2, 5, 8, 9, 10, np.inf], [0, *[np.inf] * 7]], dtype=np.float32)
    for temperature in (0.0, 0.8):
        found = shares(gaps, temperature)
        assert (np.diff(found) <= 0).all()
        assert (found.sum(axis=1) < 1).all()
        assert found[1].tolist() == pytest.approx([1 / 1.01] + [0] * 7)
    assert shares(gaps, 0.0)[0, 0] > shares(gaps, 0.8)[0, 0]


def test_the_shares_foretell_the_embedded_pair() -> None:
    """Against a table for each candidate, made of the same positions: it may know more, and not say much
    better.
    """
    texts = pairs()["embedded"].record(1.0, n_positions=500)
    gaps = np.concatenate([one.gaps for one in texts])
    right = np.concatenate([one.rank for one in texts])[:, None] == np.arange(N_RANKS)
    said = ranks.log_loss(shares(gaps, 1.0), right)
    assert said < 1.1 * ranks.log_loss(ranks.in_hindsight(gaps, right), right)
    assert said < 0.8 * ranks.log_loss(np.tile(right.mean(axis=0), (len(right), 1)), right)


def test_pairs_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.STORIES_FOLDER, raising=False)
    assert list(pairs()) == ["embedded"]
    monkeypatch.setenv(ranks.STORIES_FOLDER, str(tmp_path))
    assert list(pairs()) == ["embedded"]
    for name in ("stories260K-f32.gguf", "llama2xs-tok512-280K-f32.gguf"):
        (tmp_path / name).touch()
    assert list(pairs()) == ["embedded", "stories"]


# ---- in turns


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_all_right_and_all_wrong(depth: int) -> None:
    sure = text([0] * 720, [0.9, 0.05])
    assert chain([sure], depth).tokens_per_pass == depth + 1
    assert local([sure], depth).tokens_per_pass == depth + 1
    assert chain([text([-1] * 50)], depth).tokens_per_pass == 1
    assert local([text([-1] * 50)], depth).tokens_per_pass == 1


def test_a_chain_follows_its_formula() -> None:
    rng = random.Random(3)
    a, depth = 0.7, 5
    found = chain([text([0 if rng.random() < a else 1 for _ in range(40_000)])], depth)
    assert found.tokens_per_pass == pytest.approx((1 - a ** (depth + 1)) / (1 - a), rel=0.02)


def test_the_second_candidate_by_hand() -> None:
    """Always the second is right: the likeliest paths have .6, .36 and then .2, which is its own."""
    seconds = text([1] * 300)
    assert chain([seconds], 2).tokens_per_pass == 1
    assert local([seconds], 2).tokens_per_pass == 3
    assert local([seconds], 2, n_nodes=2).tokens_per_pass == 1
    assert local([seconds], 2, n_nodes=3).tokens_per_pass == 2
    assert local([seconds], 2, n_ranks=1).tokens_per_pass == 1
    assert local([seconds], 2, width=1).tokens_per_pass == 2  # the first candidate is decoded, not the second
    assert local([seconds], 2, worth=0.5).tokens_per_pass == 2
    assert local([seconds], 2, worth=1.1).n_rows == 0


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_trees_are_worth_more_than_chains_and_rows_more_than_few(depth: int) -> None:
    texts = [drawn(1500)]
    found = [chain(texts, depth), *(local(texts, depth, width=width) for width in (1, 4, 16))]
    values = [one.tokens_per_pass for one in found]
    assert values[0] < values[1] <= values[2] * 1.01 <= values[3] * 1.03
    assert values[3] < depth + 1
    few = local(texts, depth, n_nodes=depth).tokens_per_pass
    assert 0.97 * values[0] < few < values[2]  # the likeliest nodes are no worse than the chain's
    assert local(texts, depth, worth=0.1).n_rows < found[2].n_rows


def test_a_tree_follows_the_text() -> None:
    tree = Tree(text([1, 0, 2, 0]), nowhere(), 4)
    tree.decoded(tree.take(1, 0))
    tree.decoded(tree.take(2, 0))  # the first and the second
    assert [node.chance for node in sorted(tree.nodes)[:3]] == pytest.approx([0.6, 0.36, 0.2])
    second = next(node for node in tree.nodes if node.right and node.pos == 0)
    under = [node for node in tree.nodes if node.parent is second]
    flying = tree.take(8, 0)
    tree.follow(1)
    assert tree.root is second
    assert set(map(id, tree.nodes)) == set(map(id, under))
    before = len(tree.nodes)
    tree.decoded(flying)  # of which only those behind the root are of use
    kids = [node for node in tree.nodes if node.parent is not second]
    assert len(tree.nodes) == before + len(kids)
    assert kids
    assert all(node.parent in under for node in kids)
    tree.follow(3)
    flying = tree.take(8, 0)
    tree.start(3)
    tree.decoded(flying)
    assert tree.nodes == []


def test_a_tree_ends_with_the_text() -> None:
    tree = Tree(text([0, 0]), nowhere(), 2)
    for _ in range(5):
        tree.decoded(tree.take(8, 0))
    assert max(node.pos for node in tree.nodes) == 1
    assert tree.take(8, 0) == []


# ---- behind a link


@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("draft_seconds", [0.003, 0.05])
def test_never_below_streaming(rtt: float, draft_seconds: float) -> None:
    n = 200
    streaming = rtt + n * 0.030
    wrong = remote([text([-1] * n)], Link(rtt, draft_seconds=draft_seconds))
    assert wrong.seconds == pytest.approx(streaming)
    assert wrong.n_passes == n
    some = remote([drawn(n)], Link(rtt, draft_seconds=draft_seconds))
    assert some.seconds <= streaming * (1 + 1e-9)


def test_all_right_is_bound_by_the_draft() -> None:
    found = remote([text([0] * 800)], Link(0.05, n_ranks=1, width=1, worth=0.0, draft_seconds=0.01))
    assert found.tokens_per_s == pytest.approx(1 / 0.01, rel=0.06)


@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.1])
def test_chains_are_those_of_the_other_simulator(rtt: float) -> None:
    """Which looks at a hint at other times, and stops a draft that has become void."""
    rng = random.Random(5)
    outcomes = [rng.random() < 0.85 for _ in range(800)]
    other = simulate.simulate(
        "run-ahead", outcomes=outcomes, rtt=rtt, target_seconds=0.03, draft_seconds=0.004
    )
    chains = Link(rtt, draft_seconds=0.004, width=1, n_ranks=1, worth=0.0005, n_nodes=16, timed=False)
    found = remote([text([0 if right else 1 for right in outcomes], [0.85])], chains)
    assert found.tokens_per_s == pytest.approx(other.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("rtt", [0.05, 0.1])
def test_trees_behind_a_link(rtt: float) -> None:
    texts = [drawn(400)]
    times: dict[str, Any] = {"rtt": rtt, "draft_seconds": 0.003}
    chains = remote(texts, Link(**times, width=1, n_ranks=1))
    trees = remote(texts, Link(**times))
    assert trees.tokens_per_s > 1.1 * chains.tokens_per_s
    assert trees.n_hinted <= trees.n_hints * Link(**times).hint_nodes
    short = remote(texts, Link(**times, hint_nodes=8))
    assert short.n_hinted <= 8 * short.n_hints
    assert short.tokens_per_s < trees.tokens_per_s
    often = remote(texts, Link(**times, timed=False))
    assert trees.n_hints < 0.6 * often.n_hints
    assert trees.tokens_per_s > 0.9 * often.tokens_per_s


# ---- the command


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.STORIES_FOLDER, raising=False)
    asked = "trees --temperature 1 --positions 250 --depth 2 --width 2 4 --rtt-ms 50 --draft-ms 3"
    assert simulate.main(asked.split()) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("stories: its models are not here")
    lines = shown.out.splitlines()
    assert lines[1].startswith("embedded, temperature 1, ")
    assert [line.count("|") for line in lines[3:6]] == [5] * 3
    assert lines[5].startswith("| 2 | 2.")
    assert lines[-1].startswith("| 50 ms, 3 ms | ")
    assert main(["--pair", "stories"]) == 0
    assert capsys.readouterr().out == ""

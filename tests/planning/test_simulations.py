"""The simulations behind ``sllm.plan()``: what can be told without one, and what must hold for any pair."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.draft.growth import Shape
from sllm.draft.length import PassTimes
from sllm.planning import in_turns
from sllm.planning.events import Events, Simulated
from sllm.planning.recorded import Position, Recorded, Replay
from sllm.planning.streaming import with_hints

TARGET, DRAFT = 0.030, 0.005
N = 128


def times(first: float, row: float = 0.0) -> PassTimes:
    """A pass of ``first`` seconds, and ``row`` for each further row."""
    found = PassTimes()
    for rows in range(1, 34):
        for _ in range(3):
            found.add(rows, first + row * (rows - 1))
    return found


def hinted(text: Recorded, rtt: float, *, trees: bool, row: float = 0.0, draft: float = DRAFT) -> Simulated:
    return with_hints(text, times(TARGET, row), times(draft), rtt, trees=trees)


acceptances = st.sampled_from([0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
seeds = st.integers(0, 5)
trees_or_chains = st.booleans()


# ---- a draft of a recorded text


def test_a_replay_says_what_was_recorded() -> None:
    positions = [
        Position((5, 6), (0.7, 0.2), 0.6),
        Position((8, 7), (0.6, 0.3), 0.5),
        Position((9,), (1.0,), 0.9),
    ]
    replay = Replay(Recorded((5, 7, 9), tuple(positions)), times(0.01))
    tokens, probs, seconds = replay.chain(0, [], 2)
    assert (tokens, probs) == ([5, 8], [0.6, 0.5])
    assert seconds == pytest.approx(0.02)
    assert replay.chain(0, [5, 7], 4)[0] == [9]  # and then the text is at its end
    assert replay.chain(0, [], 4, p_min=0.55)[0] == [5]
    tree, seconds = replay.tree(0, Shape(1, 4, 8, 0.0))
    assert (tree.tokens, tree.parents, tree.n_passes) == ((5, 6), (-1, -1), 1)
    tree, seconds = replay.tree(0, Shape(3, 4, 32, 0.0))
    assert tree.path([5, 7, 9]) != []
    assert len(tree.path([5, 7, 9])) == 3
    assert seconds == pytest.approx(0.03)
    known = tree.take(tree.likeliest(4))
    again, _ = replay.tree(0, Shape(1, 1, 32, 0.0), known)
    assert set(known.tokens) <= set(again.tokens)
    assert [again.shares[i] for i in again.path([5, 7])] == [tree.shares[i] for i in tree.path([5, 7])]


def test_behind_a_wrong_token_it_says_something_and_always_the_same() -> None:
    replay = Replay(Recorded.drawn(0.5, 40), times(0.01))
    assert replay.chain(3, [77], 5) == replay.chain(3, [77], 5)
    assert replay.tree(3, Shape(4, 4, 64, 0.01)) == replay.tree(3, Shape(4, 4, 64, 0.01))


def test_drawn_texts_have_the_acceptance_that_was_asked_for() -> None:
    assert Recorded.drawn(1.0, 100).acceptance == 1.0
    assert Recorded.drawn(0.0, 100).acceptance == 0.0
    assert Recorded.drawn(0.8, 4000).acceptance == pytest.approx(0.8, abs=0.03)
    assert (
        Recorded.drawn(0.8, 10).repeated(25).truth[:10] == Recorded.drawn(0.8, 10).repeated(25).truth[10:20]
    )
    assert len(Recorded.drawn(0.8, 10).repeated(25).truth) == 25


def test_nothing_happens_for_ever() -> None:
    with pytest.raises(RuntimeError, match="both sides wait"):
        Events().next()


# ---- what must hold


@settings(max_examples=25)
@given(acceptances, seeds, trees_or_chains, st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_where_rows_are_free_hints_never_take_longer_than_streaming(
    acceptance: float, seed: int, trees: bool, rtt: float
) -> None:
    """docs/how-it-works/run-ahead.md proves it."""
    found = hinted(Recorded.drawn(acceptance, N, seed), rtt, trees=trees)
    assert found.seconds <= rtt + N * TARGET + 1e-9
    assert found.n_passes <= N
    assert found.n_accepted + found.n_passes == N


@settings(max_examples=25)
@given(acceptances, seeds, trees_or_chains)
def test_a_longer_way_never_makes_hints_sooner(acceptance: float, seed: int, trees: bool) -> None:
    """But for what luck is in a text: a hint that comes later may fall into a better moment."""
    text = Recorded.drawn(acceptance, N, seed)
    seconds = [hinted(text, rtt, trees=trees).seconds for rtt in (0.0, 0.05, 0.2, 0.6)]
    assert all(after > 0.95 * before for before, after in pairwise(seconds))


@settings(max_examples=25)
@given(acceptances, seeds, trees_or_chains)
def test_a_longer_way_never_makes_a_split_sooner(acceptance: float, seed: int, trees: bool) -> None:
    text = Recorded.drawn(acceptance, N, seed)
    run = in_turns.trees if trees else in_turns.chains
    near = run(text, times(TARGET, 0.001), times(DRAFT))
    far = run(text, times(TARGET + 0.05, 0.001), times(DRAFT))
    assert far.seconds > near.seconds


@settings(max_examples=25)
@given(trees_or_chains, st.sampled_from([0.0, 0.001, 0.004]), st.sampled_from([0.0, 0.05, 0.2]))
def test_a_perfect_draft_never_loses(trees: bool, row: float, rtt: float) -> None:
    text = Recorded.drawn(1.0, N)
    assert hinted(text, rtt, trees=trees, row=row).seconds <= rtt + N * TARGET + 1e-9
    run = in_turns.trees if trees else in_turns.chains
    assert run(text, times(TARGET, row), times(DRAFT)).seconds < 0.6 * N * TARGET


@settings(max_examples=25)
@given(trees_or_chains, st.sampled_from([0.3, 1.0, 2.0]), seeds)
def test_a_useless_draft_is_found_out(trees: bool, dear: float, seed: int) -> None:
    """It costs its tries, which get fewer."""
    run = in_turns.trees if trees else in_turns.chains
    found = run(Recorded.drawn(0.0, 2 * N, seed), times(TARGET, 0.01), times(dear * TARGET))
    assert found.seconds < 1.35 * 2 * N * TARGET
    assert found.n_passes > 1.5 * N


@settings(max_examples=25)
@given(st.sampled_from([0.3, 0.6, 0.8]), seeds)
def test_runners_up_save_passes_where_rows_are_free(acceptance: float, seed: int) -> None:
    text = Recorded.drawn(acceptance, N, seed)
    chain = in_turns.chains(text, times(TARGET), times(0.001))
    tree = in_turns.trees(text, times(TARGET), times(0.001))
    assert tree.n_passes < chain.n_passes


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.9])
def test_turns_are_near_the_best_that_the_formula_has(acceptance: float) -> None:
    """Equation 1 of 2211.17192, for the best length: the runtime has to find that out."""
    text = Recorded.drawn(acceptance, 3000, 1)
    found = in_turns.chains(text, times(TARGET, 0.001), times(DRAFT))

    def rate(k: int) -> float:
        tokens = (1 - acceptance ** (k + 1)) / (1 - acceptance)
        return tokens / (TARGET + k * (DRAFT + 0.001))

    best = max(rate(k) for k in range(17))
    assert 0.9 * best < found.tokens_per_s < 1.05 * best


def test_one_pass_at_a_time_by_hand() -> None:
    """Nothing is right: a pass for each token, and the way there and back once."""
    text = Recorded.of_outcomes([False] * 20, [0.01] * 20)
    found = with_hints(text, times(0.1), times(1.0), 0.4, trees=False)
    assert found.seconds == pytest.approx(0.4 + 20 * 0.1)
    assert found.n_passes == 20
    assert found.bytes_up == 64 * found.n_hints


def test_a_worker_that_waits_is_asked_for_every_pass() -> None:
    text = Recorded.of_outcomes([False] * 20, [0.01] * 20)
    found = with_hints(text, times(0.1), times(0.01), 0.4, trees=False, run_ahead=False)
    assert found.n_passes == 20
    assert found.seconds > 20 * 0.5
    assert found.n_hints >= 20


def test_what_the_worker_drafts_itself_is_counted() -> None:
    text = Recorded.of_outcomes([False] * 80, [0.01] * 80)
    found = with_hints(text, times(0.1), times(1.0), 0.2, trees=False, own=[(4, 0.12), (4, 0.12)])
    assert found.n_passes == 20
    assert found.seconds == pytest.approx(0.2 + 20 * 0.12)


def test_overlapping_hides_the_draft() -> None:
    text = Recorded.drawn(1.0, N)
    apart = in_turns.chains(text, times(TARGET), times(DRAFT))
    beside = in_turns.chains(text, times(TARGET), times(DRAFT), overlaps=True)
    assert beside.seconds < apart.seconds


def test_an_engine_of_its_own_pace_is_not_asked_for_passes_that_it_does_not_need() -> None:
    text = Recorded.drawn(0.0, N)
    found = in_turns.chains(text, times(0.2, 0.01), times(DRAFT), own_pace=TARGET)
    assert found.seconds < 3 * N * TARGET
    assert math.isclose(
        in_turns.chains(Recorded.drawn(0.0, 1), times(0.2), times(DRAFT), own_pace=TARGET).seconds, TARGET
    )

"""Confidence: what a draft's probabilities are found to be worth."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft.confidence import UNKNOWN_PROB, Confidence

PROBS = (1e-6, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.999)
"""One for each bin."""


def taught(chance: Callable[[float], float], n: int, seed: int = 0) -> Confidence:
    """After ``n`` tokens whose probabilities are spread over all bins."""
    rng = random.Random(seed)
    confidence = Confidence()
    for _ in range(n):
        prob = rng.choice(PROBS)
        confidence.observe(prob, rng.random() < chance(prob))
    return confidence


def test_at_first_the_draft_is_believed() -> None:
    chances = [Confidence().chance(prob) for prob in PROBS]

    assert chances == sorted(chances)
    assert chances[0] < 0.3
    assert chances[-1] > 0.9
    assert all(abs(chance - prob) < 0.1 for chance, prob in zip(chances[3:], PROBS[3:], strict=True))


@pytest.mark.parametrize(
    "chance",
    [lambda p: p, lambda p: p * p, lambda p: p**0.25, lambda p: 0.5, lambda p: 1 - p],
    ids=["honest", "boastful", "modest", "random", "the wrong way round"],
)
def test_in_the_long_run_every_bin_has_what_was_seen_in_it(chance: Callable[[float], float]) -> None:
    n_seeds = 20
    means = [0.0] * len(PROBS)
    for seed in range(n_seeds):
        confidence = taught(chance, 1500, seed)
        for i, prob in enumerate(PROBS):
            means[i] += confidence.chance(prob) / n_seeds

    for mean, prob in zip(means, PROBS, strict=True):
        assert mean == pytest.approx(chance(prob), abs=0.08)


def test_a_draft_that_is_right_without_believing_it_is_found_out_within_a_few_tokens() -> None:
    confidence = Confidence()
    confidence.observe_truth([1, 2, 3, 4], [1e-5] * 4, [1, 2, 3, 4, 5])

    assert confidence.chance(1e-5) > 0.85
    assert confidence.chance(0.2) > 0.7  # nothing was seen there, but it is a draft that is right


def test_a_draft_that_believes_what_is_wrong_is_found_out() -> None:
    confidence = Confidence()
    for _ in range(12):
        confidence.observe_truth([1, 2], [0.999, 0.999], [5])

    assert confidence.chance(0.999) < 0.3


def test_a_change_is_believed_after_some_tokens() -> None:
    confidence = taught(lambda _: 1.0, 1000)
    for _ in range(150):
        confidence.observe(0.9, False)

    assert confidence.chance(0.9) < 0.1
    assert confidence.acceptance < 0.1


def test_of_a_chain_the_first_wrong_token_is_the_last_that_is_known() -> None:
    confidence = Confidence()

    assert confidence.observe_truth([1, 2, 3], [0.5] * 3, [1, 9, 3]) == 1
    assert confidence.n_seen == 2
    assert confidence.observe_truth([1, 2, 3], [0.5] * 3, [1]) == 1
    assert confidence.n_seen == 3
    assert confidence.observe_truth([], [], [7]) == 0
    assert confidence.observe_truth([1], [0.5], [1, 2]) == 1
    assert confidence.n_seen == 4


def test_what_the_draft_says_nothing_of_is_worth_its_share() -> None:
    confidence = Confidence()
    rng = random.Random(0)
    for _ in range(600):
        confidence.observe(UNKNOWN_PROB, rng.random() < 0.2)

    assert confidence.chance(UNKNOWN_PROB) == pytest.approx(confidence.acceptance, abs=0.05)


def test_a_chain_holds_where_each_of_its_tokens_does() -> None:
    confidence = taught(lambda p: p, 300)

    assert confidence.of_chain([]) == 1
    product = confidence.chance(0.9) * confidence.chance(0.2)
    assert confidence.of_chain([0.9, 0.2]) == pytest.approx(product)


@examples(60)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=200), st.floats(0, 2))
def test_chances_are_chances_and_the_least_probability_is_one_that_suffices(
    seen: list[tuple[float, bool]], chance: float
) -> None:
    confidence = Confidence()
    for prob, right in seen:
        confidence.observe(prob, right)

    chances = [confidence.chance(prob) for prob in PROBS]
    assert all(0 < c < 1 for c in chances)
    assert 0 < confidence.acceptance < 1
    least = confidence.least(chance)
    enough = [c >= chance for prob, c in zip(PROBS, chances, strict=True) if prob >= least]
    assert all(enough[:-1])
    assert enough[-1] or least == 0.99  # the last bin is never left out

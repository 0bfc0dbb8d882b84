"""Which of several workers takes a text, without a network and without a clock."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.remote.choice import KEEP_SECONDS, Kept, Lateness, Standing, best, expected

TEXT = np.arange(100, dtype=np.int32)


def standing(**fields: object) -> Standing:
    found = Standing(n_places=4, round_trip=0.01, token_seconds=1e-3)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def having(n_tokens: int, **fields: object) -> Standing:
    """A worker that has so many tokens of TEXT in memory."""
    found = standing(kept=Kept(4), **fields)
    found.kept.put(TEXT[:n_tokens].tolist(), 0.0)
    return found


def chosen(
    *standings: Standing, now: float = 0.0, text: np.typing.NDArray[np.int32] = TEXT
) -> set[int | None]:
    """What is chosen, whatever the random numbers."""
    return {best(standings, text, now, random.Random(seed)) for seed in range(50)}


def test_nobody_is_there() -> None:
    assert chosen() == {None}


def test_the_nearest() -> None:
    assert chosen(standing(round_trip=0.05), standing(round_trip=0.2), standing(round_trip=0.01)) == {2}


def test_those_that_are_alike_share_the_texts() -> None:
    counts = Counter(best([standing() for _ in range(4)], TEXT, 0.0, random.Random(i)) for i in range(400))
    assert counts.keys() == {0, 1, 2, 3}
    assert min(counts.values()) > 50


def test_of_those_that_are_alike_the_one_with_most_places_free() -> None:
    assert chosen(standing(n_free=1), standing(n_free=3, round_trip=0.011), standing(n_free=2)) == {1}
    # A share, not a number: the larger one is not to fill up first.
    assert chosen(standing(n_free=3), standing(n_free=30, n_places=64)) == {0}


def test_a_full_one_is_worth_it_if_the_free_one_is_far_enough() -> None:
    full = standing(n_free=0, text_seconds=0.4)  # 0.1 s until a place becomes free
    assert chosen(full, standing(n_free=4, round_trip=0.05)) == {1}
    assert chosen(full, standing(n_free=4, round_trip=0.3)) == {0}
    queue = standing(n_free=0, n_queued=4, text_seconds=0.4)
    assert chosen(queue, standing(n_free=4, round_trip=0.3)) == {1}


def test_our_own_texts_count_at_once() -> None:
    """Those that have begun since the workers were looked at."""
    busy = standing(n_free=4, n_ours=3, n_ours_then=1)
    assert busy.n_left == 2
    assert chosen(busy, standing(n_free=3)) == {1}
    assert standing(n_free=None, n_ours=3).n_left == 1, "one that does not say"


def test_who_has_refused_is_not_asked_before_its_time() -> None:
    full = standing(full_until=10.0)
    far = standing(round_trip=1.0)
    assert chosen(full, far, now=5.0) == {1}
    assert chosen(full, far, now=9.9) == {0}, "waiting is shorter"
    full.observe_look(0.01, 1, 0, 0, 5.0)
    assert chosen(full, far, now=5.0) == {0}, "it says that there is a place"


def test_what_is_in_memory() -> None:
    assert chosen(standing(), having(90, round_trip=0.05)) == {1}
    assert chosen(standing(), having(90, round_trip=0.5)) == {0}, "farther than the prompt is long"
    assert chosen(having(50), having(80), having(10)) == {1}


def test_what_prompts_cost_there_is_what_counts() -> None:
    slow = standing(token_seconds=0.01)
    assert chosen(slow, standing(round_trip=0.2)) == {1}
    # Of one that was not measured yet, what they cost elsewhere.
    unknown = standing(token_seconds=0.0, round_trip=0.0)
    assert chosen(unknown, having(99, token_seconds=0.01, round_trip=0.2)) == {1}


def test_a_text_in_memory_is_forgotten_in_time() -> None:
    kept = Kept(2)
    kept.put(TEXT[:50].tolist(), 0.0)
    assert kept.n_held(TEXT, 1.0) == 50
    assert kept.n_held(TEXT, KEEP_SECONDS) == 50
    assert kept.n_held(TEXT, KEEP_SECONDS + 1) == 0


def test_a_text_that_has_grown_takes_one_place() -> None:
    kept = Kept(2)
    kept.put([7, 7], 0.0)
    for n in range(1, 40):
        kept.put(TEXT[:n].tolist(), float(n))
    assert kept.n_held(TEXT, 40.0) == 39
    assert kept.n_held(np.array([7, 7, 7], dtype=np.int32), 40.0) == 2
    kept.put([8, 8], 41.0)
    assert kept.n_held(np.array([7, 7, 7], dtype=np.int32), 41.0) == 0, "the oldest has made room"


def test_what_the_worker_says_counts() -> None:
    kept = Kept(3)
    kept.put(TEXT[:50].tolist(), 0.0)
    kept.put([*TEXT[:10].tolist(), 5, 5], 0.0)
    kept.correct(TEXT, 10)
    assert kept.n_held(TEXT, 0.0) == 10, "the other one may still be there"
    kept.correct(TEXT, 0)
    assert kept.n_held(TEXT, 0.0) == 0
    kept.put(TEXT.tolist(), 0.0)
    kept.correct(TEXT, 99)
    assert kept.n_held(TEXT, 0.0) == 99, "the last token is always computed"


@examples(100)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12),
    text=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    n_most=st.integers(0, 4),
)
def test_nothing_is_held_that_was_not_put(texts: list[list[int]], text: list[int], n_most: int) -> None:
    kept = Kept(n_most)
    for i, one in enumerate(texts):
        kept.put(one, float(i))
    n = kept.n_held(np.array(text, dtype=np.int32), float(len(texts)))
    assert 0 <= n < len(text)
    assert n == 0 or any(one[:n] == text[:n] for one in texts)
    assert len(kept._texts) <= max(1, n_most)


@examples(200)
@given(
    standings=st.lists(
        st.builds(
            Standing,
            n_places=st.integers(1, 8),
            round_trip=st.floats(0, 2),
            token_seconds=st.floats(0, 0.1),
            text_seconds=st.floats(0, 100),
            n_free=st.none() | st.integers(0, 8),
            n_queued=st.integers(0, 8),
            n_ours=st.integers(0, 8),
            full_until=st.floats(-10, 10),
        ),
        min_size=1,
        max_size=5,
    ),
    n=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_what_is_chosen_is_as_good_as_any(standings: list[Standing], n: int, seed: int) -> None:
    text = np.arange(n, dtype=np.int32)
    at = best(standings, text, 0.0, random.Random(seed))
    assert at is not None
    measured = sorted(one.token_seconds for one in standings if one.token_seconds)
    typical = measured[len(measured) // 2] if measured else 0.0
    seconds = [expected(one, text, 0.0, typical) for one in standings]
    assert all(s >= 0 for s in seconds)
    assert seconds[at] <= 1.2 * min(seconds) + 0.01 + 1e-9


def test_first_answers_that_are_late() -> None:
    lateness = Lateness()
    assert lateness.late_after(0.1) == pytest.approx(0.3), "before anything was measured"
    for _ in range(100):
        lateness.observe(0.11, 0.1)
    assert lateness.late_after(0.2) == pytest.approx(0.22)
    for _ in range(6):
        lateness.observe(1.0, 0.1)
    assert lateness.late_after(0.2) == pytest.approx(2.0), "more than 5 of 100 take that long"
    assert lateness.late_after(0.0) == pytest.approx(0.2), "no sooner than what can be measured"

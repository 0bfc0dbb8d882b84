"""DraftLength: simulated targets and drafts with known costs, and what its choices cost in the end."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft_length import DraftLength


@dataclass
class World:
    """A target and a draft whose costs are known exactly."""

    acceptance: float
    target: float = 1.0
    """Seconds of a pass for one token."""
    row: float = 0.0
    """Seconds that each further row of a pass adds."""
    draft: float = 0.1
    """Seconds of a drafted token."""
    noise: float = 0.0
    seed: int = 1

    def pass_seconds(self, n: int) -> float:
        return self.target + self.row * n

    def rate(self, n: int) -> float:
        """Tokens per second with drafts of n."""
        a = self.acceptance
        tokens = (1 - a ** (n + 1)) / (1 - a) if a < 1 else n + 1
        return tokens / (self.pass_seconds(n) + n * self.draft)

    def run(self, length: DraftLength, n_tokens: int) -> tuple[float, list[int]]:
        """The rate that ``length`` gets, and the drafts that it chose."""
        rng = random.Random(self.seed)
        seconds = 0.0
        done = 0
        chosen = []

        def jitter() -> float:
            return math.exp(rng.gauss(0, self.noise)) * (20 if self.noise and rng.random() < 0.01 else 1)

        while done < n_tokens:
            n, p_min = length.choose()
            assert 0 <= n <= DraftLength.LIMIT
            assert 0 <= p_min <= 0.8
            chosen.append(n)
            drafting = n * self.draft * jitter()
            if n:
                length.observe_draft(n, drafting)
            accepted = 0
            while accepted < n and rng.random() < self.acceptance:
                accepted += 1
            verifying = self.pass_seconds(n) * jitter()
            length.observe_pass(n, accepted, verifying)
            if n:
                length.observe_round(accepted + 1, drafting + verifying)
            seconds += drafting + verifying
            done += accepted + 1
        return done / seconds, chosen


def test_the_first_pass_is_plain_and_the_next_try_a_draft() -> None:
    length = DraftLength()
    assert length.choose() == (0, 0.0)
    length.observe_pass(0, 0, 1.0)
    assert length.choose()[0] > 0


@pytest.mark.parametrize(
    "world",
    [
        World(acceptance=0.9, draft=0.05),
        World(acceptance=0.8, draft=0.1),
        World(acceptance=0.6, draft=0.05),
        World(acceptance=0.7, draft=0.1, row=0.1),
        World(acceptance=0.95, draft=0.02, row=0.02),
        World(acceptance=0.98, target=0.0005, draft=0.00001),
        World(acceptance=1.0, draft=0.1),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_it_comes_close_to_the_best_fixed_length(world: World, noise: float) -> None:
    world.noise = noise
    best = max(world.rate(n) for n in range(DraftLength.LIMIT + 1))
    delays = math.exp(noise**2 / 2) * 1.19 if noise else 1.0  # what noise costs every strategy

    rate, _ = world.run(DraftLength(), 3000)

    assert rate > (0.9 if noise == 0 else 0.7) * best / delays


@pytest.mark.parametrize(
    "world",
    [
        World(acceptance=0.0, draft=0.1),
        World(acceptance=0.3, draft=0.9),
        World(acceptance=0.6, draft=1.0, row=0.3),
        World(acceptance=0.9, draft=2.0),
        World(acceptance=0.8, draft=0.05, row=1.0),  # a pass of two rows costs as much as two passes
    ],
)
def test_where_drafting_loses_it_is_never_noticeably_slower_than_none(world: World) -> None:
    rate, chosen = world.run(DraftLength(), 4000)

    assert rate > 0.97 * world.rate(0)
    assert sum(n > 0 for n in chosen) < 0.05 * len(chosen)
    late = chosen[len(chosen) // 2 :]
    assert sum(n > 0 for n in late) < 0.01 * len(late)  # tries grow rarer


def test_it_begins_to_draft_when_that_begins_to_pay() -> None:
    length = DraftLength()
    World(acceptance=0.0).run(length, 1500)
    _, chosen = World(acceptance=0.95, seed=2).run(length, 6000)

    assert chosen[-1] >= 3
    assert sum(chosen[-50:]) > 150


def test_it_stops_when_drafting_no_longer_pays() -> None:
    length = DraftLength()
    World(acceptance=0.95).run(length, 1500)
    _, chosen = World(acceptance=0.0, seed=2).run(length, 1500)

    assert sum(n > 0 for n in chosen[-300:]) < 15


def test_plain_passes_are_measured_again_now_and_then() -> None:
    _, chosen = World(acceptance=0.95).run(DraftLength(), 6000)

    zeros = [i for i, n in enumerate(chosen) if n == 0]
    assert len(zeros) >= len(chosen) // 200
    assert max(b - a for a, b in pairwise(zeros)) < 200


def test_acceptance_follows_what_is_seen() -> None:
    length = DraftLength()
    for _ in range(400):
        length.observe_pass(4, 4, 1.0)
    assert length.acceptance > 0.95
    for _ in range(400):
        length.observe_pass(4, 0, 1.0)
    assert length.acceptance < 0.1


@examples(40)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 16), st.integers(0, 16), st.floats(0, 1e3), st.integers(0, 16), st.floats(0, 1e3)
        ),
        max_size=100,
    )
)
def test_no_measurement_breaks_it(rounds: list[tuple[int, int, float, int, float]]) -> None:
    """Clocks may say zero, and passes may be of any length: what was chosen is a wish."""
    length = DraftLength()
    for verified, accepted, seconds, drafted, draft_seconds in rounds:
        n, p_min = length.choose()
        assert 0 <= n <= DraftLength.LIMIT
        assert 0 <= p_min <= 0.8
        length.observe_draft(drafted, draft_seconds)
        length.observe_pass(verified, min(accepted, verified), seconds)
        length.observe_round(min(accepted, verified) + 1, seconds + draft_seconds)
        assert 0 <= length.acceptance < 1

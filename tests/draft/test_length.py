"""DraftLength: simulated targets and drafts with known costs, and what its choices cost in the end."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft.confidence import UNKNOWN_PROB
from sllm.draft.length import DraftLength, PassTimes


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
    says: float | None = None
    """The draft's probability of each of its tokens; None: whatever it is worth."""
    easy: float = 0.0
    """The share of tokens that are always right, as the draft says; acceptance is that of the others."""
    noise: float = 0.0
    opening: float = 0.0
    """What the first pass takes besides."""
    seed: int = 1

    def pass_seconds(self, n: int) -> float:
        return self.target + self.row * n

    def rate(self, n: int) -> float:
        """Tokens per second with drafts of n."""
        a = self.easy + (1 - self.easy) * self.acceptance
        tokens = (1 - a ** (n + 1)) / (1 - a) if a < 1 else n + 1
        return tokens / (self.pass_seconds(n) + n * self.draft)

    def run(self, length: DraftLength, n_tokens: int) -> tuple[float, list[int]]:
        """The rate that ``length`` gets, and how many drafted tokens it shows to the target in each round."""
        rng = random.Random(self.seed)
        seconds = 0.0
        done = 0
        chosen = []
        wait = self.opening

        def jitter() -> float:
            return math.exp(rng.gauss(0, self.noise)) * (20 if self.noise and rng.random() < 0.01 else 1)

        def token() -> tuple[float, bool]:
            if rng.random() < self.easy:
                return 0.999, True
            right = rng.random() < self.acceptance
            return (UNKNOWN_PROB if self.says is None else self.says), right

        while done < n_tokens:
            probs: list[float] = []
            outcomes: list[bool] = []
            drafting = 0.0
            drafts = length.begin()
            while drafts:
                n, p_min = length.more(probs)
                assert 0 <= n <= DraftLength.LIMIT - len(probs)
                assert 0 <= p_min <= 0.8
                if n == 0:
                    break
                new: list[tuple[float, bool]] = []
                while len(new) < n and (drafted := token())[0] >= p_min:
                    new.append(drafted)
                n_passes = len(new) + (len(new) < n)
                took = n_passes * self.draft * jitter()
                length.observe_draft(n_passes, took)
                drafting += took
                probs += [prob for prob, _ in new]
                outcomes += [right for _, right in new]
                if len(new) < n:
                    break
            shown = length.keep(probs) if drafts else 0
            assert 0 <= shown <= len(probs)
            chosen.append(shown)
            accepted = len(list(takewhile(bool, outcomes[:shown])))
            verifying = self.pass_seconds(shown) * jitter() + wait
            wait = 0.0
            length.observe_pass(shown, verifying)
            length.observe_truth([int(right) for right in outcomes], probs, [1] * (accepted + 1))
            if drafts:
                length.observe_round(accepted + 1, drafting + verifying)
            seconds += drafting + verifying
            done += accepted + 1
        return done / seconds, chosen


def passes(*seen: tuple[int, float]) -> PassTimes:
    times = PassTimes()
    for count, seconds in seen:
        times.add(count, seconds)
    return times


def test_the_first_pass_is_plain_and_the_next_try_a_draft() -> None:
    length = DraftLength()
    assert not length.begin()
    length.observe_pass(0, 1.0)
    assert length.begin()
    assert length.more()[0] > 0


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
        length.observe_truth([1, 2, 3, 4], [0.5] * 4, [1, 2, 3, 4, 5])
    assert length.acceptance > 0.95
    for _ in range(400):
        length.observe_truth([1, 2, 3, 4], [0.5] * 4, [2])
    assert length.acceptance < 0.1


def test_a_draft_that_is_right_without_believing_it_is_taken_at_what_it_is_worth() -> None:
    """A random model that drafts for itself gives every token a probability near zero."""
    world = World(acceptance=1.0, target=55.0, row=1.2, draft=4.0, says=1e-4)
    short, _ = world.run(DraftLength(), 64)
    long, chosen = world.run(DraftLength(), 1000)

    assert short > 0.6 * world.rate(DraftLength.LIMIT)
    assert long > 0.95 * world.rate(DraftLength.LIMIT)
    assert min(n for n in chosen[8:] if n) >= 12


def test_a_draft_that_believes_what_is_wrong_is_found_out() -> None:
    world = World(acceptance=0.3, target=1.0, row=0.02, draft=0.1, says=0.999)
    best = max(range(DraftLength.LIMIT + 1), key=world.rate)
    rate, chosen = world.run(DraftLength(), 2000)

    assert rate > 0.93 * world.rate(best)
    assert sum(chosen[20:]) / len(chosen[20:]) < best + 1.5


def test_what_the_draft_says_is_worth_more_than_any_fixed_length() -> None:
    """Half of the tokens are certain, and the draft knows which: chains end before the others."""
    world = World(acceptance=0.2, target=1.0, row=0.05, draft=0.15, says=0.25, easy=0.7)
    rate, _ = world.run(DraftLength(), 6000)

    assert rate > 1.1 * max(world.rate(n) for n in range(DraftLength.LIMIT + 1))


def test_tokens_too_unlikely_to_be_drafted_are_tried_now_and_then() -> None:
    """They have been wrong, and from some point on they are right."""
    length = DraftLength()
    world = World(acceptance=0.0, target=1.0, row=0.05, draft=0.15, says=0.05, easy=0.8)
    _, before = world.run(length, 2000)
    world.acceptance = 0.97
    _, after = world.run(length, 4000)

    assert sum(before[-100:]) / 100 < 6
    assert sum(after[-100:]) / 100 > 9


def test_a_first_pass_that_waited_for_its_stream_decides_nothing() -> None:
    """It takes four times as long as a plain pass: drafting would seem to gain where it loses."""
    for world in (World(acceptance=0.6, draft=1.0, row=0.3), World(acceptance=0.9, draft=0.05)):
        _, without = world.run(DraftLength(), 2000)
        world.opening = 3 * world.target
        _, chosen = world.run(DraftLength(), 2000)

        assert abs(sum(chosen[10:]) / len(chosen[10:]) - sum(without[10:]) / len(without[10:])) < 0.5


def test_beyond_the_largest_count_a_falling_line_stays_where_it_was_last() -> None:
    times = passes((1, 2.0), (1, 2.0), (5, 1.0), (5, 1.0))

    assert times.estimate(9) == 1.0
    assert times.estimate(17) == 1.0
    assert times.estimate(3) == 2.0


def test_between_and_beyond_two_counts_times_lie_on_a_line() -> None:
    times = passes((2, 1.0), (2, 1.0), (6, 1.4), (6, 1.4))

    assert [times.estimate(n) for n in (1, 2, 4, 6, 10)] == pytest.approx([0.9, 1.0, 1.2, 1.4, 1.8])


def test_estimates_are_the_same_one_by_one_and_all_at_once() -> None:
    times = passes((2, 1.0), (6, 9.0), (11, 1.5), (11, 1.6), (14, 1.4))

    assert times.up_to(20) == [times.estimate(n) for n in range(1, 21)]
    assert times.estimate(6) == times.estimate(5) + (times.estimate(7) - times.estimate(5)) / 2


def test_one_slow_pass_does_not_make_a_count_dear_and_two_do() -> None:
    first = passes((1, 0.2), (5, 0.06))
    assert first.known(1)
    assert first.estimate(1) < 0.06
    assert passes((1, 0.2), (1, 0.2), (5, 0.06)).estimate(1) == 0.2

    later = passes((1, 0.05), (1, 0.05), (9, 0.3), (17, 0.06))
    assert later.estimate(9) == pytest.approx(0.055)
    later.add(9, 0.3)
    assert later.estimate(9) == 0.3
    later.add(9, 0.055)
    later.add(9, 0.055)
    later.add(9, 0.055)
    assert later.estimate(9) == 0.055

    largest = passes((1, 0.05), (1, 0.05), (17, 0.4))
    assert largest.estimate(17) < 0.1
    largest.add(17, 0.4)
    assert largest.estimate(17) == 0.4


def test_a_count_that_is_dear_is_believed_to_be_in_the_end() -> None:
    """A pass of more than eight rows takes four times as long, as where a kernel takes eight at once."""

    class Steep(World):
        def pass_seconds(self, n: int) -> float:
            return self.target * (4 if n >= 8 else 1)

    _, chosen = Steep(acceptance=0.97, draft=0.02).run(DraftLength(), 2000)

    assert max(chosen[30:]) <= 7
    assert sum(chosen[30:]) / len(chosen[30:]) > 5


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
        probs = [(i * seconds) % 1.0 for i in range(drafted)]
        if length.begin():
            for chain in (probs[:0], probs):
                n, p_min = length.more(chain)
                assert 0 <= n <= DraftLength.LIMIT - len(chain)
                assert 0 <= p_min <= 0.8
            assert 0 <= length.keep(probs) <= drafted
        length.observe_draft(drafted, draft_seconds)
        length.observe_pass(verified, seconds)
        length.observe_truth(list(range(drafted)), probs, [*range(accepted), -1])
        length.observe_round(min(accepted, verified) + 1, seconds + draft_seconds)
        assert 0 <= length.acceptance < 1


# ---- beside tokens of somebody else's ----------------------------------------------------------------------


def settled(acceptance: float, *, draft: float = 0.1, row: float = 0.02) -> DraftLength:
    """Has seen enough of a draft that is right so often, in tenths."""
    length = DraftLength()
    for n in (0, 1, 2, 4, 8, 16) * 2:
        length.observe_pass(n, 1.0 + n * row)
    length.observe_draft(1, draft)
    for i in range(300):
        right = (i * 7) % 10 < round(10 * acceptance)
        length.observe_truth([1], [acceptance], [1 if right else 2])
    return length


def test_what_given_tokens_promise() -> None:
    length = settled(0.8)
    assert length.tried and not DraftLength().tried
    assert length.expected([], drafts=False) == pytest.approx(1.0, rel=0.01)
    assert length.expected([0.999] * 16, drafts=False) > 10
    assert length.expected([0.999] * 16, drafts=True) < length.expected([0.999] * 16, drafts=False)
    by_chance = [length.expected([c] * 4, drafts=False) for c in (0.0, 0.2, 0.5, 0.9)]
    assert by_chance == sorted(by_chance)
    assert length.expected([0.999] * 99, drafts=True) == length.expected([0.999] * 16, drafts=True)


def test_drafts_alone_promise_what_their_lengths_are_chosen_for() -> None:
    length = settled(0.8)
    rate = World(0.8, row=0.02)
    assert length.expected([], drafts=True) == pytest.approx(max(rate.rate(n) for n in range(17)), rel=0.1)


def test_drafts_after_given_tokens_count_on_these() -> None:
    length = settled(0.9)
    assert length.expected([0.95, 0.95], drafts=True) > length.expected([0.95, 0.95], drafts=False)
    likely, _ = length.more(after=4, holds=0.9)
    unlikely, _ = length.more(after=4, holds=0.05)
    assert likely > unlikely == 0
    assert length.more(after=16, holds=1.0) == (0, 0.0)
    assert length.more(after=12, holds=1.0)[0] <= 4
    probs = [0.99] * 16
    assert length.keep(probs, after=10, holds=1.0) <= 6
    assert length.keep(probs, after=4, holds=1.0) > length.keep(probs, after=4, holds=0.02)
    assert length.more(after=0, holds=1.0) == length.more()


def test_the_price_of_a_draft_is_a_pass_where_plain_tokens_come_otherwise() -> None:
    """An engine that streams a token each 30 ms; a request takes 110 ms, which a draft has to earn."""
    length = DraftLength(8, own_pace=True)
    assert not length.begin()
    length.observe_pass(0, 0.030)
    assert length.begin()
    for n in (2, 6):
        length.observe_draft(n, 0.001 * n)
        length.observe_pass(n, 0.110)
    for _ in range(40):
        length.observe_truth([1], [0.9], [1])
    for _ in range(6):  # rounds that gained, so that none is a try
        assert length.begin()
        length.observe_round(8, 0.110)
    assert length.keep([0.9]) == 0
    assert length.keep([0.9] * 8) == 8


def test_without_a_pace_of_its_own_one_row_is_a_pass_like_others() -> None:
    length = DraftLength(8)
    length.observe_pass(0, 0.100)
    length.observe_pass(6, 0.110)
    for _ in range(40):
        length.observe_truth([1], [0.9], [1])
    assert length.keep([0.9]) == 1

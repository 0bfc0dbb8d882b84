"""Drafts that take from their target what they give are stopped, others are not: on a clock of the test's."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.draft.payoff import Payoff


@dataclass
class World:
    """A target that commits one token a pass to each of some texts, and drafts that change that.

    Attributes:
        gives: tokens of a pass with drafts.
        takes: how many times as long it takes with them.
        rtt: until what is done here has an effect there that is seen here.
        noise: of the time of a pass, a standard deviation.
        stalls: the share of passes that take twenty times as long.

    """

    gives: float = 1.0
    takes: float = 1.0
    rtt: float = 0.0
    n_texts: int = 1
    pass_seconds: float = 0.03
    noise: float = 0.0
    stalls: float = 0.0
    seed: int = 0
    payoff: Payoff = field(default_factory=Payoff)
    now: float = 0.0
    n_passes: int = 0
    n_drafting: int = 0
    n_tokens: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._owed = 0.0
        self._switched = (0.0, False)

    def open(self) -> None:
        for _ in range(self.n_texts):
            self.payoff.begin()

    def close(self) -> None:
        for _ in range(self.n_texts):
            self.payoff.end()

    def passes(self, n: int) -> None:
        for _ in range(n):
            drafting = self.payoff.drafting
            if drafting is not self._switched[1]:
                self._switched = (self.now, drafting)
            settled = self.now - self._switched[0] >= self.rtt
            seconds = self.pass_seconds * (self.takes if drafting else 1.0)
            seconds *= 20 if self._random.random() < self.stalls else 1
            self.now += seconds * max(0.2, self._random.gauss(1.0, self.noise))
            for _ in range(self.n_texts):
                self._owed += self.gives if settled and drafting else 1.0
                tokens = int(self._owed)
                self._owed -= tokens
                self.n_tokens += tokens
                self.payoff.observe(tokens, self.now, self.rtt)
            self.n_passes += 1
            self.n_drafting += drafting

    def drafts(self) -> bool:
        return self.payoff.drafting

    @property
    def rate(self) -> float:
        """Tokens per second of a text."""
        return self.n_tokens / self.n_texts / self.now


def passes_until_stopped(world: World, n_most: int = 400) -> int:
    """Passes with drafts before a longer time without."""
    world.open()
    for _ in range(n_most):
        world.passes(1)
        if world.payoff._phase == "stopped":
            return world.n_drafting
    raise AssertionError("it was never stopped")


@pytest.mark.parametrize("n_texts", [1, 2, 8])
@pytest.mark.parametrize(("gives", "takes"), [(1.0, 1.3), (1.2, 1.6), (1.0, 4.0), (2.0, 3.0), (1.0, 1.06)])
def test_what_takes_more_than_it_gives_is_stopped_within_32_passes(
    gives: float, takes: float, n_texts: int
) -> None:
    assert passes_until_stopped(World(gives=gives, takes=takes, n_texts=n_texts)) <= 33


def test_a_clear_loss_is_stopped_sooner() -> None:
    assert passes_until_stopped(World(gives=1.0, takes=1.4)) <= 9


@pytest.mark.parametrize(("rtt", "n"), [(0.02, 18), (0.1, 21), (0.3, 27)])
def test_a_round_trip_is_waited_for_and_not_more(rtt: float, n: int) -> None:
    assert 8 < passes_until_stopped(World(takes=1.4, pass_seconds=0.02, rtt=rtt)) <= n + 4


@pytest.mark.parametrize("n_texts", [1, 3])
@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("gives", "takes"), [(1.7, 1.0), (1.7, 1.3), (1.1, 1.0), (1.0, 1.0), (3.0, 2.5)])
def test_what_gives_more_goes_on(gives: float, takes: float, rtt: float, n_texts: int) -> None:
    world = World(gives=gives, takes=takes, rtt=rtt, n_texts=n_texts)
    world.open()
    world.passes(2000)
    assert world.n_drafting > 0.9 * world.n_passes


@pytest.mark.parametrize("stalls", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(8))
def test_noise_does_not_stop_a_draft_that_gives(seed: int, stalls: float) -> None:
    world = World(gives=1.5, takes=1.1, noise=0.3, stalls=stalls, seed=seed)
    world.open()
    world.passes(2000)
    assert world.n_drafting > 0.8 * world.n_passes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pass_seconds", [0.001, 0.03])
@pytest.mark.parametrize("stalls", [0.0, 0.03])
def test_noise_does_not_keep_a_draft_that_takes(seed: int, pass_seconds: float, stalls: float) -> None:
    world = World(gives=1.05, takes=1.6, noise=0.3, stalls=stalls, seed=seed, pass_seconds=pass_seconds)
    world.open()
    world.passes(3000)
    assert world.n_drafting < 0.15 * world.n_passes


def test_texts_that_lose_are_as_fast_as_without_drafts_in_the_long_run() -> None:
    world = World(gives=1.0, takes=1.5)
    world.open()
    world.passes(4000)
    assert world.rate > 0.98 / world.pass_seconds


def test_what_was_learnt_stays_for_the_next_text() -> None:
    world = World(gives=1.0, takes=1.4)
    passes_until_stopped(world)
    world.close()
    before = world.n_drafting
    world.open()
    world.passes(40)
    assert not world.drafts()
    assert world.n_drafting == before


def test_the_time_between_texts_is_nobodys() -> None:
    world = World(gives=1.2, takes=1.0)
    for _ in range(40):
        world.open()
        world.passes(10)
        world.close()
        world.now += 1000.0
    assert world.drafts()


def test_short_texts_add_up() -> None:
    """Ten passes are not enough for a verdict, the next text's ten go on from there."""
    world = World(gives=1.0, takes=1.3)
    for _ in range(6):
        world.open()
        world.passes(10)
        world.close()
    assert world.payoff._phase == "stopped"


def test_a_draft_that_begins_to_take_is_found_out() -> None:
    world = World(gives=1.3, takes=1.0)
    world.open()
    world.passes(200)
    assert world.drafts()
    world.gives, world.takes = 1.0, 1.5
    before = world.n_drafting
    world.passes(200)
    assert not world.drafts()
    assert world.n_drafting - before < 100


def test_with_many_more_texts_it_is_compared_anew() -> None:
    """A worker whose drafts pay for one text, and not for eight at once."""
    payoff = Payoff()
    for n_texts, gives in ((1, 2.0), (8, 0.7)):
        for _ in range(200):
            drafting = payoff.drafting
            payoff.observe_pass(n_texts, n_texts * 2 if drafting else n_texts, 2 / gives if drafting else 1.0)
        assert payoff.drafting == (gives > 1)


def test_a_draft_that_begins_to_give_is_found_out() -> None:
    world = World(gives=1.0, takes=1.5)
    world.open()
    world.passes(300)
    assert not world.drafts()
    world.gives, world.takes = 2.0, 1.0
    world.passes(600)
    assert world.drafts()


def test_a_slow_moment_of_the_machine_is_not_the_drafts_fault() -> None:
    world = World(gives=1.3, takes=1.0)
    world.open()
    world.passes(5)
    world.pass_seconds *= 3  # from here on, drafts or not
    world.passes(2000)
    assert world.n_drafting > 0.9 * world.n_passes


def test_texts_that_come_and_go_all_the_time_do_not_keep_drafts_off() -> None:
    payoff, now, n_drafting = Payoff(), 0.0, 0
    payoff.begin()
    for i in range(400):
        for _ in range(i % 7):
            payoff.begin()
        for _ in range(4):
            now += 0.03
            payoff.observe(1, now, 0.0)
            n_drafting += payoff.drafting
        for _ in range(i % 7):
            payoff.end()
    assert n_drafting > 800


def test_passes_that_are_only_getting_ready_say_nothing() -> None:
    payoff = Payoff()
    payoff.begin()
    for i in range(100):
        payoff.observe(1, 0.03 * i, None)
    assert not payoff.drafting
    assert payoff.prepares


def test_a_worker_says_itself_what_its_passes_came_to() -> None:
    payoff = Payoff()
    for _ in range(64):
        drafting = payoff.drafting
        payoff.observe_pass(4, 6 if drafting else 4, 0.05 if drafting else 0.03)
    assert not payoff.drafting
    for _ in range(1000):
        drafting = payoff.drafting
        payoff.observe_pass(4, 12 if drafting else 4, 0.05 if drafting else 0.03)
    assert payoff.drafting


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["begin", "end"]),
            st.tuples(
                st.integers(1, 17), st.sampled_from([0.0, 1e-3, 5.0]), st.sampled_from([0.0, None, 0.1])
            ),
        ),
        max_size=200,
    )
)
def test_nothing_that_is_observed_breaks_it(events: list[object]) -> None:
    payoff, now, n = Payoff(), 0.0, 0
    for event in events:
        if event == "begin":
            payoff.begin()
            n += 1
        elif event == "end" and n > 0:
            payoff.end()
            n -= 1
        elif isinstance(event, tuple) and n > 0:
            tokens, seconds, lag = event
            now += seconds
            payoff.observe(tokens, now, lag)
        assert not (payoff.drafting and payoff.prepares)

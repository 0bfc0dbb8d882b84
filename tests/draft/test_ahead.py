"""When drafting ahead of the news is worth it: properties of the rule, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.draft.ahead import DraftAhead


def measured(
    *,
    run_ahead: bool = True,
    target: float = 0.03,
    draft: float = 0.01,
    rtt: float = 0.05,
    acceptance: float = 0.8,
) -> DraftAhead:
    """A rule that has seen enough to know these figures; ``acceptance`` in fifths or tenths."""
    ahead = DraftAhead(run_ahead=run_ahead)
    for _ in range(15):
        ahead.observe_pass(target)
    for i in range(400):
        right = (i * 7) % 10 < round(acceptance * 10)
        ahead.observe_truth([1], [acceptance], [1 if right else 2])
    ahead.observe_draft(1, draft)
    for _ in range(14):
        ahead.observe_draft(1, draft)
    ahead.observe_round_trip(rtt)
    return ahead


def depth(ahead: DraftAhead, prob: float) -> int:
    """How long a chain the rule allows, all of one confidence."""
    n = 0
    while ahead.worth_more([prob] * n):
        n += 1
    return n


def test_nothing_known_yet_drafts() -> None:
    assert DraftAhead(run_ahead=True).worth_more([])
    assert DraftAhead(run_ahead=False).worth_more([])


@pytest.mark.parametrize("run_ahead", [True, False])
def test_better_drafts_go_deeper(run_ahead: bool) -> None:
    depths = [depth(measured(run_ahead=run_ahead, acceptance=a), a) for a in (0.3, 0.6, 0.8, 0.9, 1.0)]
    assert depths == sorted(depths)
    assert depths[0] < depths[-1] == DraftAhead.LIMIT


def test_a_chain_is_long_enough_to_fill_the_round_trip() -> None:
    """At 50 ms and 10 ms a token, five are under way before the first answer can come."""
    assert depth(measured(acceptance=0.9, rtt=0.05), 0.9) > 6


def test_what_cannot_be_overtaken_is_not_chased() -> None:
    assert depth(measured(draft=0.03, acceptance=0.9), 0.9) == 0  # as slow as the target
    assert depth(measured(draft=0.05, acceptance=1.0), 0.99) == 0
    assert depth(measured(rtt=1.0, acceptance=0.6), 0.6) == 0  # fifty tokens behind


def test_a_target_that_waits_for_hints_need_not_be_overtaken() -> None:
    assert depth(measured(run_ahead=False, draft=0.05, rtt=1.0, acceptance=0.9), 0.9) > 8


def test_the_distance_grows_with_the_silence() -> None:
    ahead = measured()
    assert ahead.distance(0.0) == pytest.approx(0.05 / 0.02)
    assert ahead.distance(0.02) > ahead.distance(0.0)
    assert ahead.distance(10.0) == ahead.distance(20.0)  # a lost link says nothing more


def test_what_was_given_up_is_tried_again() -> None:
    ahead = measured(draft=0.05)
    assert not ahead.worth_more([])
    for _ in range(64):
        ahead.observe_pass(0.03)
    assert ahead.worth_more([])
    ahead.observe_draft(1, 0.05)
    assert not ahead.worth_more([])


def test_confidence_is_measured_by_what_the_draft_says() -> None:
    """A draft that is right when it says so, and wrong when it does not, is told apart."""
    ahead = DraftAhead(run_ahead=False)
    for _ in range(100):
        ahead.observe_truth([1], [0.9], [1])
        ahead.observe_truth([1], [0.4], [2])
    assert ahead.confidence([0.9]) > 0.95
    assert ahead.confidence([0.4]) < 0.1
    assert ahead.confidence([0.9, 0.9]) == pytest.approx(ahead.confidence([0.9]) ** 2)
    assert not ahead.worth_more([0.4])


def test_the_truth_is_compared_up_to_the_first_difference() -> None:
    ahead = DraftAhead(run_ahead=True)
    probs = [0.9] * 4
    assert ahead.observe_truth([1, 2, 3, 4], probs, [1, 2, 9]) == 2
    assert ahead.observe_truth([1, 2], probs[:2], [1, 2, 3]) == 2
    assert ahead.observe_truth([], [], [1]) == 0
    assert ahead.observe_truth([5, 2], probs[:2], [1, 2]) == 0


@given(
    st.lists(st.floats(0, 1), max_size=DraftAhead.LIMIT + 2),
    st.booleans(),
    st.floats(1e-4, 1.0),
    st.floats(1e-5, 1.0),
    st.floats(0, 2.0),
    st.floats(0, 10.0),
)
def test_a_decision_is_always_one(
    probs: list[float], run_ahead: bool, target: float, draft: float, rtt: float, waited: float
) -> None:
    ahead = measured(run_ahead=run_ahead, target=target, draft=draft, rtt=rtt)
    assert 0 <= ahead.confidence(probs) <= 1
    assert ahead.distance(waited) >= 0
    assert ahead.worth_more(probs, waited) in (True, False)
    if len(probs) >= DraftAhead.LIMIT:
        assert not ahead.worth_more(probs, waited)
    assert 1 <= ahead.step <= 32
    assert 0 < ahead.interval <= 0.02


def test_a_target_that_drafts_by_itself_is_harder_to_overtake() -> None:
    """Three tokens a pass are one every 10 ms: a draft that takes as long never gets ahead."""
    ahead = measured(acceptance=0.9)
    assert ahead.worth_more([])
    for _ in range(40):
        ahead.observe_pass(0.03, 2)
    assert 0.05 / 0.02 < ahead.distance() < float("inf")
    for _ in range(40):
        ahead.observe_pass(0.03, 3)
        ahead.observe_pass(0.03, None)  # passes with hints say nothing of it
    ahead.observe_draft(1, 0.01)
    assert not ahead.worth_more([])


def test_before_its_first_pass_a_text_counts_on_those_of_the_one_before() -> None:
    fast = measured(target=0.001)
    following = DraftAhead(run_ahead=True, like=fast)
    assert following.pass_seconds == 0.001
    assert following.draft_seconds == 0.0  # this shows at once
    following.observe_draft(1, 0.01)
    assert not following.worth_more([])
    for _ in range(3):
        following.observe_pass(0.03)
    assert following.worth_more([])  # one number of old is soon outweighed
    assert DraftAhead(run_ahead=True, like=DraftAhead(run_ahead=True)).worth_more([])

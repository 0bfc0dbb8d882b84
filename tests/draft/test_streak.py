"""How far a client's hints are trusted: what became of its last ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm.draft.streak import HintTrust

RIGHT, WRONG = ([1, 2, 3, 4], [1, 2, 3, 4, 5]), ([1, 2, 3, 4], [9])


def after(*hints: tuple[list[int], list[int]]) -> HintTrust:
    trust = HintTrust()
    for hint, truth in hints:
        trust.observe_truth(hint, truth)
    return trust


def test_it_follows_what_is_seen() -> None:
    assert after(*[WRONG] * 30).chance < 0.1
    assert after().chance < after(RIGHT).chance < after(*[RIGHT] * 20).chance
    assert after(*[RIGHT] * 20).chance > 0.9


def test_a_client_that_begins_to_quote_is_soon_believed_again() -> None:
    """Passages that only it knows are right to their end, and wrong hints stand between them."""
    passages = [*[RIGHT] * 8, *[WRONG] * 8] * 6
    trust = after(*passages)
    doubtful = trust.chance
    assert doubtful < 0.4
    trust.observe_truth(*RIGHT)
    assert trust.chance > 0.8
    trust.observe_truth(*WRONG)
    trust.observe_truth(*WRONG)
    assert trust.chance < 0.6


def test_how_many_tokens_hold() -> None:
    trust = HintTrust()
    assert trust.observe_truth([1, 2, 3], [1, 2, 9]) == 2
    assert trust.observe_truth([], [1]) == 0
    assert trust.observe_truth([1, 2, 3], [1]) == 1


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6)
        ),
        max_size=60,
    )
)
def test_it_is_always_a_chance(seen: list[tuple[list[int], list[int]]]) -> None:
    trust = HintTrust()
    for hint, truth in seen:
        n = trust.observe_truth(hint, truth)
        assert hint[:n] == truth[:n]
        assert 0 < trust.chance < 1

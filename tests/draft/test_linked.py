"""Passes over a link: what they take is a line, whatever the link's own time varies by."""

from __future__ import annotations

import numpy as np
import pytest

from sllm.draft.growth import TreeGrowth
from sllm.draft.length import PassTimes
from sllm.draft.linked import LinkedPassTimes
from sllm.draft.tree import DraftedTree


def test_before_rows_were_seen_the_round_trip_is_no_part_of_what_they_take() -> None:
    times = LinkedPassTimes(lambda: 0.05)
    times.add(1, 0.06)
    assert times.seen
    assert times.known(1)
    assert times.estimate(1) == pytest.approx(0.06)
    assert times.row_seconds() == pytest.approx(0.05 * 0.01)
    assert times.up_to(3) == pytest.approx([0.06, 0.0605, 0.061])
    unknown = PassTimes()  # as if the link's time were spent on reading weights
    unknown.add(1, 0.06)
    assert unknown.estimate(32) > 2 * times.estimate(32)


@pytest.mark.parametrize("row", [0.0, 0.0002, 0.002, 0.013])
def test_what_a_row_takes_is_found_in_the_noise(row: float) -> None:
    rng = np.random.default_rng(1)
    times = LinkedPassTimes(lambda: 0.1)
    for _ in range(150):
        n = int(rng.integers(1, 33))
        times.add(n, 0.11 + row * (n - 1) + rng.exponential(0.004))
    assert times.row_seconds() == pytest.approx(row, abs=0.0003)
    assert times.estimate(1) == pytest.approx(0.114, abs=0.006)
    assert times.estimate(33) == pytest.approx(0.114 + 32 * row, abs=0.012)
    assert times.up_to(33)[-1] == times.estimate(33)


def test_one_late_pass_makes_no_number_of_rows_dear() -> None:
    times = LinkedPassTimes(lambda: 0.05)
    for n in (1, 8, 12, 9, 12, 4):
        times.add(n, 0.055)
    before = times.estimate(12)
    times.add(12, 3.0)
    assert times.estimate(12) < 2 * before
    for n in (1, 8, 12, 9, 12, 4) * 10:
        times.add(n, 0.055)
    assert times.estimate(12) == pytest.approx(0.055, rel=0.25)


def test_a_link_that_becomes_slower_is_noticed() -> None:
    times = LinkedPassTimes(lambda: 0.05)
    for n in (1, 8, 16, 32) * 20:
        times.add(n, 0.055)
    assert times.row_seconds() < 5e-5
    for n in (1, 8, 16, 32) * 40:
        times.add(n, 0.055 + 0.004 * n)
    assert times.row_seconds() == pytest.approx(0.004, rel=0.15)


def test_rows_never_take_less_than_nothing() -> None:
    times = LinkedPassTimes(lambda: 0.0)
    for n, seconds in ((1, 0.2), (32, 0.05), (16, 0.1), (32, 0.04)):
        times.add(n, seconds)
        assert times.row_seconds() >= 0
        assert all(s > 0 for s in times.up_to(40))


def test_a_narrow_link_keeps_trees_small() -> None:
    """A far link and a slow one: bytes count on the second alone, and with them every node."""
    rng = np.random.default_rng(2)
    chain = DraftedTree.chain([5] * 8, [0.9] * 8, n_passes=8)
    side = DraftedTree(tuple(range(6, 30)), (-1,) * 24, tuple(0.3 / (i + 1) for i in range(24)))
    tree = chain.merged(side)
    shown = {}
    for row in (0.0, 0.0005, 0.005, 0.05):
        growth = TreeGrowth(32, LinkedPassTimes(lambda: 0.1))
        for _ in range(60):
            n = int(rng.integers(0, 32))
            growth.observe_pass(n, 0.11 + row * n + rng.exponential(0.002))
        growth.shape(16)
        shown[row] = len(growth.keep(tree))
    assert shown[0.0] >= shown[0.0005] > shown[0.005] > shown[0.05]
    assert shown[0.0] > 20


def test_where_times_vary_little_a_few_passes_show_what_rows_cost() -> None:
    """Nothing but passes with drafts after the first one: what a plain one takes is known all the same."""
    times = LinkedPassTimes(lambda: 0.0)
    times.add(1, 0.003)
    for i in range(8):
        times.add(6 + i % 3, 0.003 + 0.0008 * (5 + i % 3))
    assert times.estimate(1) == pytest.approx(0.003, rel=0.1)
    assert times.row_seconds() == pytest.approx(0.0008, rel=0.1)
    # Where they vary as much as that, the guess counts.
    noisy = LinkedPassTimes(lambda: 0.0)
    for i in range(9):
        noisy.add(6 + i % 2, 0.05 + 0.02 * (i % 3 - 1))
    assert 0 <= noisy.row_seconds() < 0.004

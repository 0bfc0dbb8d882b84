"""The simulator of windows in flight: by hand, and against formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import ranks, simulate
from .simulate_trees import Text
from .simulate_windows import Split, best, main, run
from .test_simulate_trees import drawn, text

RTT, PASS, DRAFT = 0.1, 0.02, 0.003
ONE = Split((RTT / 2, RTT / 2), (PASS,), DRAFT)
TWO = replace(ONE, ways=(RTT / 2,) * 3, passes=(PASS / 2,) * 2)


@pytest.mark.parametrize("split", [ONE, replace(ONE, n_windows=8)], ids=["one", "several"])
@pytest.mark.parametrize("keeps_all", [False, True])
def test_wrong_drafts_cost_nothing_where_none_is_waited_for(split: Split, keeps_all: bool) -> None:
    n = 50
    found = run([text([-1] * n)], replace(split, first=1.1, grows=False, keeps_all=keeps_all))
    assert found.seconds == pytest.approx(n * (RTT + PASS))
    assert (found.n_windows, found.n_rows, found.n_void) == (n, n, 0)


def test_a_round_by_hand() -> None:
    """Three tokens are drafted, 9 ms; two of them hold, so a round brings three."""
    row = [0.9, 0.1]
    chain = replace(ONE.as_chain(), n_nodes=3, grows=False)
    found = run([Text([0, 0, -1] * 10, [row] * 30)], chain)
    assert found.seconds == pytest.approx(10 * (3 * DRAFT + RTT + PASS))
    assert found.n_windows == 10


def test_all_right_is_bound_by_the_draft_or_by_the_passes() -> None:
    """And not by the link, unless one window has to be waited for."""
    texts = [text([0] * 2000, [1.0])]
    one = replace(ONE.as_chain(), first=0.0)
    alone = run(texts, one)
    assert alone.tokens_per_s == pytest.approx(17 / (RTT + PASS), rel=0.05)
    several = replace(one, n_windows=8, first=1.1)
    assert run(texts, several).tokens_per_s == pytest.approx(1 / DRAFT, rel=0.05)
    fast = replace(several, draft_seconds=1e-5)
    assert run(texts, fast).tokens_per_s == pytest.approx(16 / PASS, rel=0.05)
    # Two workers would take 32 tokens in a pass of one, but eight windows of 16 are on their way at most.
    two = replace(fast, passes=TWO.passes, ways=TWO.ways)
    trip = sum(two.ways) + sum(two.passes)
    assert run(texts, two).tokens_per_s == pytest.approx(8 * 16 / trip, rel=0.05)
    assert run(texts, replace(two, n_windows=32)).seconds == pytest.approx(trip + 2000 * PASS / 32, rel=0.05)


def test_a_window_that_goes_on_from_a_wrong_one_is_void() -> None:
    """The first runner-up is right each time: the main path never is."""
    texts = [Text([1] * 40, [[0.6, 0.4]] * 40)]
    path = replace(ONE, n_windows=8, first=1.1)
    found = run(texts, path)
    assert found.n_void > 0
    kept = run(texts, replace(path, keeps_all=True))
    assert kept.tokens_per_s > 1.2 * found.tokens_per_s


@pytest.mark.parametrize("split", [ONE, ONE.as_chain(), TWO], ids=["trees", "chains", "two workers"])
def test_windows_are_never_much_slower_and_gain_with_long_runs(split: Split) -> None:
    texts = [drawn(250)]
    one = best(texts, split)[1]
    several = best(texts, replace(split, n_windows=8))[1]
    assert several.tokens_per_s > 0.97 * one.tokens_per_s
    assert best(texts, replace(split, grows=False))[1].tokens_per_s < 1.01 * one.tokens_per_s
    easy, fast = [text(([0] * 60 + [-1]) * 10, [0.98, 0.01])], replace(split, draft_seconds=0.001)
    gain = best(easy, replace(fast, n_windows=8))[1].tokens_per_s / best(easy, fast)[1].tokens_per_s
    assert gain > 1.15


def test_two_workers_take_a_way_and_a_half() -> None:
    wrong = [text([-1] * 20)]
    rounds = replace(TWO, first=1.1, grows=False)
    assert run(wrong, rounds).seconds == pytest.approx(20 * (1.5 * RTT + PASS))


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.STORIES_FOLDER, raising=False)
    assert (
        simulate.main(
            ["windows", "--temperature", "1", "--positions", "250", "--rtt-ms", "50", "--draft-ms", "3"]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.err.startswith("stories: its models are not here")
    lines = shown.out.splitlines()
    assert lines[1].startswith("embedded, temperature 1, ")
    assert [line.count("|") for line in lines[3:6]] == [9] * 3
    assert lines[5].startswith("| 50 ms, 3 ms | ")
    assert lines[7] == "Two workers, 50 ms apart"
    assert lines[-1].startswith("| 3 ms | ")
    assert main(["--pair", "stories"]) == 0
    assert capsys.readouterr().out == ""

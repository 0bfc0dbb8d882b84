"""The simulator: what can be told without one, the known figures, and texts of a few tokens by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .simulate import Mode, Simulated, Unconfirmed, at_most, best_wait, main, simulate

WORLD: dict[str, Any] = {"target_seconds": 0.030, "draft_seconds": 0.010}
MODES: list[Mode] = ["stream", "wait", "hints", "run-ahead"]


def few(mode: Mode, outcomes: list[bool], **changes: Any) -> Simulated:
    return simulate(mode, outcomes=outcomes, **{"rtt": 0.1, **WORLD, **changes})


@pytest.mark.parametrize(
    ("rtt", "acceptance", "expected"),
    [
        (0.05, 0.8, (33, 28, 37, 45)),
        (0.05, 0.9, (33, 38, 54, 58)),
        (0.1, 0.8, (33, 21, 27, 39)),
        (0.2, 0.6, (33, 9, 10, 33)),
        (0.2, 0.95, (33, 31, 47, 53)),
    ],
)
def test_known_figures(rtt: float, acceptance: float, expected: tuple[int, ...]) -> None:
    here = {"rtt": rtt, "acceptance": acceptance, **WORLD}
    found = [
        simulate("stream", **here).tokens_per_s,
        best_wait(**here)[1].tokens_per_s,
        simulate("hints", **here).tokens_per_s,
        simulate("run-ahead", **here).tokens_per_s,
    ]
    assert found == pytest.approx(expected, rel=0.03, abs=0.7)  # they are rounded, and of other seeds


@pytest.mark.parametrize("depth", [1, 4, 48, 400])
@pytest.mark.parametrize("draft_seconds", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.3])
def test_run_ahead_is_never_below_streaming(
    rtt: float, acceptance: float, draft_seconds: float, depth: int
) -> None:
    here: dict[str, Any] = {"rtt": rtt, "acceptance": acceptance, **WORLD, "draft_seconds": draft_seconds}
    stream = simulate("stream", n_tokens=500, **here)
    ahead = simulate("run-ahead", n_tokens=500, depth=at_most(depth), **here)
    assert ahead.tokens_per_s >= stream.tokens_per_s * (1 - 1e-9)
    assert ahead.n_passes <= stream.n_passes == 500


def test_waiting_follows_its_formula() -> None:
    n, a = 6, 0.8
    tokens = (1 - a ** (n + 1)) / (1 - a)
    found = simulate("wait", n_max=n, acceptance=a, rtt=0.05, n_tokens=50_000, row_seconds=0.001, **WORLD)
    assert found.tokens_per_s == pytest.approx(tokens / (n * 0.01 + 0.05 + 0.03 + n * 0.001), rel=0.01)
    assert found.passes_per_token == pytest.approx(1 / tokens, rel=0.01)
    assert found.hints_per_token == found.passes_per_token


def test_streaming_needs_no_draft() -> None:
    found = few("stream", [True] * 10)
    assert found.seconds == pytest.approx(0.1 + 10 * 0.030)
    assert (found.n_passes, found.n_hints, found.n_drafted, found.n_accepted) == (10, 0, 0, 0)


def test_one_token_by_hand() -> None:
    """There 50 ms, a pass of 30, back 50; a hint is there after 60, too late for the first pass."""
    assert few("run-ahead", [True]).seconds == pytest.approx(0.130)
    assert few("hints", [True]).seconds == pytest.approx(0.010 + 0.130)
    assert few("wait", [True]).seconds == pytest.approx(0.010 + 0.130)


def test_a_rejection_by_hand() -> None:
    """Three tokens, the second drafted wrong, no run-ahead: the hint of the first goes into a pass at 60 ms,
    which commits two tokens at 90; at 140 the client knows, has drafted the third by 150, and it is there at
    200, committed at 230, known at 280.
    """
    found = few("hints", [True, False, True])
    assert found.seconds == pytest.approx(0.280)
    assert (found.n_passes, found.n_drafted, found.n_accepted, found.n_wasted) == (2, 4, 2, 2)
    assert found.n_hints == 4


def test_everything_right_is_bound_by_the_slower_side() -> None:
    for mode in ("hints", "run-ahead"):
        draft_bound = few(mode, [True] * 2000)
        assert draft_bound.tokens_per_s == pytest.approx(1 / 0.010, rel=0.02)
    target_bound = few("hints", [True] * 2000, draft_seconds=0.0001, n_max=7)
    assert target_bound.tokens_per_s == pytest.approx(8 / 0.030, rel=0.05)


def test_the_depth_rule_is_asked() -> None:
    seen: list[Unconfirmed] = []

    def rule(chain: Unconfirmed) -> bool:
        seen.append(chain)
        return chain.probability > 0.5

    rng = random.Random(1)
    outcomes = [rng.random() < 0.8 for _ in range(300)]
    found = few("run-ahead", outcomes, probabilities=[0.8] * 300, depth=rule)
    assert max(chain.n_tokens for chain in seen) == 4  # .8 ** 4 is below .5
    assert all(chain.probability == pytest.approx(0.8**chain.n_tokens) for chain in seen)
    assert {(c.rtt, c.target_seconds, c.draft_seconds) for c in seen} == {(0.1, 0.030, 0.010)}
    assert found.n_drafted == found.n_hints
    deeper = few("run-ahead", outcomes)
    assert deeper.n_wasted > found.n_wasted


@pytest.mark.parametrize("mode", MODES)
def test_recorded_outcomes_are_like_drawn_ones(mode: Mode) -> None:
    rng = random.Random(7)
    outcomes = [rng.random() < 0.85 for _ in range(700)]
    drawn = simulate(mode, acceptance=0.85, n_tokens=700, seed=7, rtt=0.05, **WORLD)
    assert simulate(mode, outcomes=outcomes, rtt=0.05, **WORLD) == drawn
    assert drawn.n_accepted <= drawn.n_drafted
    assert drawn.n_tokens == 700


@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.2])
def test_the_runtime_is_near_the_fixed_depth(rtt: float, acceptance: float) -> None:
    """It does not send every token at once, and cannot call a void draft back."""
    here: dict[str, Any] = {"rtt": rtt, "acceptance": acceptance, "n_tokens": 1500, **WORLD}
    stream = simulate("stream", **here)
    fixed = simulate("run-ahead", **here)
    runtime = simulate("run-ahead", depth="runtime", **here)
    assert stream.tokens_per_s * (1 - 1e-9) <= runtime.tokens_per_s
    assert 0.85 * fixed.tokens_per_s <= runtime.tokens_per_s <= 1.02 * fixed.tokens_per_s
    asked = simulate("hints", depth="runtime", **here)
    assert 0.8 * simulate("hints", **here).tokens_per_s <= asked.tokens_per_s <= runtime.tokens_per_s * 1.05


@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.2])
def test_the_runtime_waits_as_the_best_fixed_length_does(rtt: float, acceptance: float) -> None:
    """Though it has to find it out, and pauses for a while where bad luck makes drafting look as if it lost;
    what it drafts while it waits comes on top.
    """
    here: dict[str, Any] = {"rtt": rtt, "acceptance": acceptance, "n_tokens": 1500, **WORLD}
    here["row_seconds"] = 0.002
    _, fixed = best_wait(longest=16, **here)
    runtime = simulate("wait", depth="runtime", **here)
    plain = 1 / (rtt + here["target_seconds"])
    assert runtime.tokens_per_s > 0.9 * max(fixed.tokens_per_s, plain)
    assert runtime.n_passes <= 1500
    assert runtime.n_accepted + runtime.n_passes >= 1500


@pytest.mark.parametrize("mode", ["wait", "hints", "run-ahead"])
def test_the_runtime_finds_out_what_the_draft_does_not_believe(mode: Mode) -> None:
    """As a random model that drafts for itself: never wrong, and every probability near zero."""
    here: dict[str, Any] = {"rtt": 0.05, "target_seconds": 0.02, "draft_seconds": 0.004, "depth": "runtime"}
    modest = few(mode, [True] * 200, probabilities=[1e-5] * 200, **here)
    honest = few(mode, [True] * 200, probabilities=[0.999] * 200, **here)
    assert modest.tokens_per_s > 0.9 * honest.tokens_per_s
    assert modest.n_passes < 0.5 * 200


def test_the_runtime_drafts_nothing_that_comes_too_late() -> None:
    """A draft that is no faster than the target never overtakes one that runs ahead."""
    found = few("run-ahead", [True] * 300, draft_seconds=0.04, depth="runtime")
    assert found.n_drafted < 30  # tries, now and then
    assert found.n_accepted == 0


def test_the_runtime_checks_no_rows_that_do_not_pay() -> None:
    found = few("run-ahead", [True] * 300, rtt=0.0, row_seconds=0.030, depth="runtime")
    assert found.n_accepted == 0
    assert found.n_drafted > 0
    assert found.tokens_per_s == pytest.approx(few("stream", [True] * 300, rtt=0.0).tokens_per_s)


def test_the_runtime_asks_where_it_has_nothing_to_say() -> None:
    """Or a worker that does not run ahead would wait for ever."""
    found = few("hints", [False] * 60, probabilities=[0.01] * 60, depth="runtime")
    assert found.n_passes == 60
    assert found.n_drafted < 60
    assert found.n_hints >= 60


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="mode is 'cloud'"):
        few("cloud", [True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either acceptance or outcomes"):
        simulate("stream", rtt=0.1, **WORLD)
    with pytest.raises(ValueError, match="no tokens"):
        few("stream", [])
    with pytest.raises(ValueError, match="1 probabilities for 2 outcomes"):
        few("stream", [True, True], probabilities=[0.5])
    with pytest.raises(ValueError, match="n_max is 0"):
        few("wait", [True], n_max=0)
    with pytest.raises(RuntimeError, match="depth rule"):
        few("hints", [True], depth=at_most(0))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rtt-ms", "50", "--acceptance", "0.8", "0.9", "--tokens", "500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| 50 ms, 0.8 | 3")
    assert main(["--rtt-ms", "50", "--acceptance", "0.8", "--tokens", "500", "--depth", "runtime"]) == 0
    assert capsys.readouterr().out.splitlines()[2] != lines[2]

"""Calibration: the exact bound, the promise on tables with known truth, profiles and what damages them."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

import sllm
from sllm.triage.calibration import (
    CalibrationError,
    Combination,
    Profile,
    ProfileError,
    Row,
    Threshold,
    auroc,
    calibrate,
    calibrate_answers,
    calibrate_verify,
    confidence,
    evaluate,
    evaluate_verify,
    rows_needed,
    upper_bound,
)
from sllm.triage.certify import Scored, certify, split

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

MODEL, TEMPLATE, POLICY = "a" * 64, "b" * 64, "c" * 64
IDS: dict[str, Any] = {"model_id": MODEL, "template_id": TEMPLATE, "policy_id": POLICY}


# ---- the binomial distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "n", "delta", "bound"),
    [  # published two-sided 95 % intervals of Clopper and Pearson have 2.5 % at each end
        (5, 100, 0.025, 0.112835),
        (1, 10, 0.025, 0.445016),
        (10, 20, 0.025, 0.728042),
        (0, 10, 0.025, 0.308497),
        (3, 15, 0.05, 0.439785),
    ],
)
def test_known_bounds(wrong: int, n: int, delta: float, bound: float) -> None:
    assert upper_bound(wrong, n, delta) == pytest.approx(bound, abs=2e-6)


@pytest.mark.parametrize("n", [1, 2, 59, 60, 1000, 100_000])
@pytest.mark.parametrize("delta", [0.5, 0.05, 1e-6])
def test_bounds_with_a_closed_form(n: int, delta: float) -> None:
    assert upper_bound(0, n, delta) == pytest.approx(1 - delta ** (1 / n), rel=1e-9)
    assert upper_bound(n - 1, n, delta) == pytest.approx((1 - delta) ** (1 / n), rel=1e-9)
    assert upper_bound(n, n, delta) == 1.0


@examples(200)
@given(st.integers(1, 60), st.data())
def test_the_bound_against_exact_arithmetic(n: int, data: st.DataObject) -> None:
    wrong = data.draw(st.integers(0, n - 1))
    delta = data.draw(st.sampled_from([0.5, 0.1, 0.05, 0.001]))
    p = upper_bound(wrong, n, delta)
    exact = Fraction(p)
    tail = sum(math.comb(n, i) * exact**i * (1 - exact) ** (n - i) for i in range(wrong + 1))
    assert float(tail) == pytest.approx(delta, rel=1e-9)
    assert p > wrong / n


def test_rows_needed_are_those_of_distribution_free_tolerance_limits() -> None:
    assert [rows_needed(0.05, 0.05, wrong) for wrong in range(5)] == [59, 93, 124, 153, 181]
    assert rows_needed(0.1, 0.1) == 22
    for wrong in range(4):
        n = rows_needed(0.03, 0.2, wrong)
        assert upper_bound(wrong, n, 0.2) <= 0.03 < upper_bound(wrong, n - 1, 0.2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: upper_bound(3, 2),
        lambda: upper_bound(-1, 2),
        lambda: upper_bound(0, 2, 0.0),
        lambda: upper_bound(0, 2, 1.0),
        lambda: upper_bound(0, 2, math.nan),
        lambda: rows_needed(0.0),
        lambda: rows_needed(0.05, 2),
        lambda: calibrate([], alpha=0, **IDS),
        lambda: calibrate([], delta=1, **IDS),
        lambda: calibrate([], hard_alpha=-1, **IDS),
        lambda: evaluate([], alpha=math.inf),
        lambda: calibrate_answers([0.0], [True, False]),
    ],
)
def test_what_is_out_of_range(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        call()


# ---- scores ------------------------------------------------------------------------------------------------


@examples(100)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, kinds = [s for s, _ in rows], [k for _, k in rows]
    good, bad = [s for s, k in rows if k], [s for s, k in rows if not k]
    pairs = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    found = auroc(scores, kinds)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_confidence() -> None:
    assert confidence([-1.0]) == -2.0
    assert confidence([]) == -math.inf
    assert math.isnan(confidence([-1.0, math.nan]))
    assert math.isnan(confidence([-1.0, -math.inf]))
    sure, doubtful = [-0.01] * 20, [-0.01] * 17 + [-2.0] * 3
    assert confidence(doubtful) < confidence(sure)
    assert confidence(doubtful) < confidence([np.mean(doubtful)] * 20)  # the mean alone does not see it
    grown = np.linspace(-3, 0, 11)
    assert confidence(grown) == pytest.approx(grown.mean() + np.quantile(grown, 0.1))


@examples(60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_combination_never_falls_where_a_signal_rises(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(80, k)) * 10.0 ** rng.integers(-3, 4, size=k)
    combination = Combination.fit(signals, signals @ rng.normal(size=k) > rng.normal(size=80))
    assert min(combination.weights) >= 0
    assert np.isfinite([*combination.weights, combination.bias]).all()
    # in use and in calibration to the last bit
    assert [combination.score(row) for row in signals] == combination.scores(signals).tolist()
    raised = signals[0].copy()
    raised[rng.integers(k)] += 1.0
    assert combination.score(raised) >= combination.score(signals[0])


def test_a_combination_finds_the_signal_and_drops_what_points_the_wrong_way() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=600)
    noise = rng.normal(size=600)
    signals = np.column_stack([truth, -truth + 0.1 * noise, np.ones(600), noise])
    found = Combination.fit(signals, truth + 0.3 * rng.normal(size=600) > 0)
    assert found.weights[0] > 1
    assert found.weights[1] == found.weights[2] == 0
    assert auroc(found.scores(signals), truth > 0) > 0.97
    for kind in (True, False):  # all of one kind
        only = Combination.fit(signals, np.full(600, kind))
        assert np.isfinite([*only.weights, only.bias]).all()
        assert (Combination.probability(only.bias) > 0.9) is kind
    assert Combination.probability(-1e6) == 0.0
    assert Combination.probability(1e6) == 1.0


# ---- the promise, on tables with known truth ---------------------------------------------------------------

REPETITIONS = 2000

WORLDS: dict[str, Callable[[Floats], Floats]] = {
    "useful score": lambda x: 0.6 / (1 + np.exp(5 * x + 1)),
    "useless score, all good": lambda x: np.full(len(x), 0.02),
    "useless score, all just too bad": lambda x: np.full(len(x), 0.0501),
    "a cliff": lambda x: np.where(x > 0, 0.01, 0.6),
    "the surest are wrong": lambda x: np.where(x > 2, 0.3, np.where(x > -0.5, 0.01, 0.2)),
}
_XS = np.sort(np.random.default_rng(99).normal(size=200_000))


def truth_above(world: Callable[[Floats], Floats]) -> Callable[[float], tuple[float, float]]:
    """The true coverage and error of a threshold."""
    wrong = world(_XS)
    sums = np.append(np.cumsum(wrong[::-1])[::-1], 0.0)

    def at(threshold: float) -> tuple[float, float]:
        first = int(np.searchsorted(_XS, threshold))
        n = len(_XS) - first
        return n / len(_XS), float(sums[first] / max(n, 1))

    return at


@pytest.mark.parametrize("name", WORLDS)
def test_the_promise_holds_and_bonferroni_covers_less(name: str) -> None:
    """In at least 95 % of 2,000 samples no more than 5 % of what passes is wrong in truth."""
    world, rng = WORLDS[name], np.random.default_rng(7)
    truth = truth_above(world)
    n, alpha, delta = 450, 0.05, 0.05
    broken, covered = (
        {"sequence": 0, "bonferroni": 0, "naive": 0},
        dict.fromkeys(("sequence", "bonferroni"), 0.0),
    )
    for _ in range(REPETITIONS):
        x = rng.normal(size=n)
        wrong = rng.random(n) < world(x)
        fit, test = Scored(x[:150], wrong[:150]), Scored(x[150:], wrong[150:])
        for way in covered:
            found = certify(fit, test, alpha, delta, bonferroni=way == "bonferroni")
            if found is not None:
                assert found.bound <= alpha * (1 + 1e-9)
                coverage, error = truth(found.score)
                broken[way] += error > alpha
                covered[way] += coverage / REPETITIONS
        # What this is not: the lowest threshold that looks good on the sample.
        order = np.argsort(-x)
        shares = np.cumsum(wrong[order]) / np.arange(1, n + 1)
        fine = np.flatnonzero(shares <= alpha)
        broken["naive"] += len(fine) > 0 and truth(float(x[order[fine[-1]]]))[1] > alpha
    print(f"{name}: promise broken in {broken} of {REPETITIONS}, coverage {covered}")
    assert broken["sequence"] <= delta * REPETITIONS
    assert broken["bonferroni"] <= delta * REPETITIONS
    if name != "useless score, all good":
        assert broken["naive"] > 0.15 * REPETITIONS  # the truth can tell the difference
    if name != "useless score, all just too bad":
        assert covered["sequence"] > covered["bonferroni"]


def test_the_promise_holds_for_the_whole_of_calibrate() -> None:
    """Several signals, answers' confidences, a gate for the hard: the answers that stay in tier 1."""
    rng = np.random.default_rng(3)
    names, repetitions, n = ("a", "b"), 400, 900

    def draw(n: int) -> tuple[Floats, Floats, npt.NDArray[Any], npt.NDArray[Any]]:
        ease = rng.normal(size=n)
        signals = np.column_stack([ease + 0.5 * rng.normal(size=n), 0.5 * ease + rng.normal(size=n)])
        wrong = rng.random(n) < 1 / (1 + np.exp(2.5 * ease + 0.5))
        sure = -np.exp(rng.normal(size=n) + 3 * wrong)
        return signals, sure, wrong, ease < -0.8

    big = draw(100_000)
    broken, broken3, coverage, coverage3 = 0, 0, 0.0, 0.0
    for _ in range(repetitions):
        signals, sure, wrong, hard = draw(n)
        columns = zip(signals.tolist(), wrong.tolist(), sure.tolist(), hard.tolist(), strict=True)
        rows = [Row(tuple(s), not w, confidence=c, hard=h) for s, w, c, h in columns]
        profile = calibrate(rows, signals=names, **IDS)
        hard_scores = None if profile.hard is None else profile.hard.scores(-big[0])
        gated = np.zeros(len(big[0]), dtype=bool)
        if hard_scores is not None and profile.gate is not None:
            gated = hard_scores >= profile.gate
        if profile.tier3 is not None:
            coverage3 += gated.mean() / repetitions
            broken3 += (~big[3])[gated].mean() > 0.2
        tier1 = profile.tier1
        if tier1 is not None:
            assert tier1.confidence is not None
            stay = (profile.easy.scores(big[0]) >= tier1.score) & ~gated & (big[1] >= tier1.confidence)
            coverage += stay.mean() / repetitions
            broken += big[2][stay].mean() > 0.05
    print(f"tier 1: broken {broken} of {repetitions}, coverage {coverage:.3f}")
    print(f"tier 3: broken {broken3} of {repetitions}, coverage {coverage3:.3f}")
    assert broken <= 0.05 * repetitions
    assert broken3 <= 0.05 * repetitions
    assert coverage > 0.02
    assert coverage3 > 0.02


def test_thresholds_for_answers() -> None:
    rng = np.random.default_rng(5)
    sure = -np.exp(rng.normal(size=900))
    correct = rng.random(900) < 1 / (1 + np.exp(-4 * (sure + 2)))
    found = calibrate_answers(sure.tolist(), correct.tolist())
    assert found is not None
    assert found.bound <= 0.05
    assert found.coverage > 0.2
    with_empty = calibrate_answers([*sure.tolist(), -math.inf], [*correct.tolist(), True])
    assert with_empty is None or not with_empty.passes(-math.inf)
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError, match="not finite"):
            calibrate_answers([*sure.tolist(), bad], [*correct.tolist(), True])
    assert calibrate_answers([-1.0] * 300, [False] * 300) is None


@pytest.mark.parametrize("shared", [True, False], ids=["the small model's own", "a bigger model's"])
def test_the_promise_holds_for_answers_of_tier_2(shared: bool) -> None:
    """Of what tier 2 gets and nobody verifies; a threshold from all rows does not promise that, for the
    easiest of them are tier 1's.
    """
    rng = np.random.default_rng(11)
    names, repetitions, n = ("a",), 300, 1500
    alpha = 0.3 if shared else 0.1  # what tier 1 does not keep of a model's answers is the worse of them

    def draw(n: int) -> tuple[Any, ...]:
        ease = rng.normal(size=n)
        signal = ease + 0.3 * rng.normal(size=n)
        wrong = rng.random(n) < 1 / (1 + np.exp(3 * ease + 0.5))
        sure = -np.exp(rng.normal(size=n) + 1.5 * wrong)
        if shared:
            return signal, wrong, sure, wrong, sure
        wrong2 = rng.random(n) < 1 / (1 + np.exp(3 * ease + 2.5))
        return signal, wrong, sure, wrong2, -np.exp(rng.normal(size=n) + 1.5 * wrong2)

    big = draw(200_000)
    broken = {"ours": 0, "from all rows": 0}
    coverage = 0.0
    for _ in range(repetitions):
        signal, wrong, sure, wrong2, sure2 = draw(n)
        columns = zip(signal.tolist(), wrong.tolist(), sure.tolist(), strict=True)
        rows = [Row((x,), not w, confidence=c) for x, w, c in columns]
        answers = [(c, not w) for w, c in zip(wrong2.tolist(), sure2.tolist(), strict=True)]
        profile = calibrate(rows, signals=names, **IDS)
        found = calibrate_verify(profile, rows, answers, model_id="d" * 64, alpha=alpha)
        tier2 = np.ones(len(big[0]), dtype=bool)
        if profile.tier1 is not None:
            assert profile.tier1.confidence is not None
            easy = profile.easy.scores(big[0][:, None]) >= profile.tier1.score
            tier2 = ~(easy & (big[2] >= profile.tier1.confidence))
        naive = calibrate_answers([c for c, _ in answers], [right for _, right in answers], alpha=alpha)
        for way, threshold in (("ours", found.verify), ("from all rows", naive)):
            if threshold is not None:
                left = tier2 & (big[4] >= threshold.score)
                broken[way] += bool(big[3][left].mean() > alpha)
                coverage += (way == "ours") * left.sum() / tier2.sum() / repetitions
        assert (found.verify_model_id is None) == (found.verify is None)
        if found.verify is not None:
            assert Profile.from_json(found.to_json()) == found
            assert found.verify.bound <= alpha * (1 + 1e-9)
    print(f"unverified in tier 2: broken in {broken} of {repetitions}, coverage {coverage:.3f}")
    assert broken["ours"] <= 0.05 * repetitions
    assert broken["from all rows"] > 0.2 * repetitions
    assert coverage > 0.05


def test_which_rows_tier_2_gets() -> None:
    """Counted by the profile's own word for each row."""
    rng = np.random.default_rng(2)
    ease = rng.normal(size=1200)
    correct = rng.random(1200) < 1 / (1 + np.exp(-4 * ease))
    sure = -np.exp(rng.normal(size=1200) - 4 * correct)
    columns = list(zip(ease.tolist(), correct.tolist(), sure.tolist(), strict=True))
    rows = [Row((x,), right, confidence=c, hard=x < -1) for x, right, c in columns]
    profile = calibrate(rows, signals=("a",), alpha=0.1, **IDS)
    assert profile.tier1 is not None
    assert profile.tier3 is not None
    assert profile.gate is not None
    assert profile.hard is not None
    answers = [(c + 0.5, right or i % 40 > 0) for i, (_, right, c) in enumerate(columns)]
    found = calibrate_verify(profile, rows, answers, model_id=MODEL)
    assert found.verify is not None
    _, rest = split(1200, 0, 0.1, 0.05)
    left = []
    for i in rest:
        x, _, c = columns[i]
        hard = profile.hard.score((-x,)) >= profile.gate
        kept = profile.easy.score((x,)) >= profile.tier1.score and not profile.escalates(c)
        if not hard and not kept:
            left.append(answers[i])
    assert found.verify.n_tested == len(left)
    passed = [right for c, right in left if not found.verifies(c)]
    assert found.verify.n_passed == len(passed)
    assert found.verify.n_wrong == len(passed) - sum(passed)
    assert found.verify.delta < profile.delta / 26
    evaluation = evaluate_verify(profile, rows, answers)
    assert (evaluation.n, evaluation.scores[0].threshold) == (len(left), found.verify)
    assert evaluation.error == pytest.approx(1 - np.mean([right for _, right in left]))
    assert [one.name for one in evaluation.scores] == ["answer's confidence", "length alone (control)"]
    # Without tier 3 the hard ones are tier 2's.
    without = calibrate_verify(replace(profile, tier3=None), rows, answers, model_id=MODEL)
    assert without.verify is None or without.verify.n_tested > len(left)


def test_answers_of_tier_2_that_prove_nothing() -> None:
    rows = [Row((float(i),), i % 2 > 0, confidence=-1.0) for i in range(200)]
    profile = calibrate(rows, **IDS)
    for right in (False, True):  # as good as can be, and too few for its part of delta
        found = calibrate_verify(profile, rows, [(-1.0, right)] * 200, model_id=MODEL)
        assert (found.verify is None) == (not right or found.verify_model_id is None)
    assert calibrate_verify(profile, rows, [(-1.0, False)] * 200, model_id=MODEL) == profile
    empty = calibrate_verify(profile, rows, [(-math.inf, True)] * 200, model_id=MODEL)
    assert empty.verifies(-math.inf)
    for answers in ([(-1.0, True)] * 199, [(-1.0, True)] * 201):
        with pytest.raises(ValueError, match="expected the 200 rows of the profile"):
            calibrate_verify(profile, rows, answers, model_id=MODEL)
    with pytest.raises(ValueError, match="expected the 200 rows"):
        calibrate_verify(profile, rows[1:], [(-1.0, True)] * 199, model_id=MODEL)
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError, match="row 3 has the confidence"):
            calibrate_verify(profile, rows, [*[(-1.0, True)] * 3, *[(bad, True)] * 197], model_id=MODEL)
    with pytest.raises(ValueError, match="alpha is 2"):
        calibrate_verify(profile, rows, [(-1.0, True)] * 200, model_id=MODEL, alpha=2)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_too_few_rows_says_how_many_are_needed() -> None:
    rows = [Row((0.0,), True)] * 87
    with pytest.raises(CalibrationError, match=r"87 labelled rows, expected at least 88") as caught:
        calibrate(rows, **IDS)
    assert isinstance(caught.value, (sllm.SllmError, ValueError))
    profile = calibrate([*rows, Row((0.0,), True)], **IDS)
    assert profile.tier1 is not None
    assert (profile.tier1.n_wrong, profile.tier1.n_passed) == (0, 59)
    with pytest.raises(CalibrationError, match=r"at least"):
        evaluate(rows)
    with pytest.raises(CalibrationError, match=r"0 labelled rows"):
        calibrate([], **IDS)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (Row((math.nan,), True), "row 7 has a signal that is not finite"),
        (Row((math.inf,), True), "row 7 has a signal that is not finite"),
        (Row((0.0, 1.0), True), "row 7 has 2 signals, expected 1: score"),
        (Row((), True), "row 7 has 0 signals"),
        (Row((0.0,), True, confidence=-1.0), "199 of 200 rows have no confidence"),
        (Row((0.0,), True, hard=True), "199 of 200 rows have no hard"),
    ],
)
def test_odd_rows(odd: Row, said: str) -> None:
    rows = [Row((0.0,), True)] * 200
    rows[7] = odd
    for call in (lambda: calibrate(rows, **IDS), lambda: evaluate(rows)):
        with pytest.raises(CalibrationError, match=said):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_confidence_that_is_no_number(bad: float) -> None:
    rows = [Row((0.0,), True, confidence=-1.0)] * 200
    with pytest.raises(CalibrationError, match="row 0 has the confidence"):
        calibrate([Row((0.0,), True, confidence=bad), *rows], **IDS)


def test_all_wrong_gives_no_tier_1_and_empty_answers_pass_nothing() -> None:
    assert calibrate([Row((0.0,), False)] * 300, **IDS).tier1 is None
    empty = calibrate([Row((float(i),), True, confidence=-math.inf) for i in range(300)], **IDS)
    assert empty.tier1 is None
    assert empty.escalates(0.0)
    everything = calibrate([Row((0.0,), False, hard=True)] * 300, **IDS)
    assert everything.tier3 is not None
    assert everything.tier3.coverage == 1.0


# ---- what it is worth --------------------------------------------------------------------------------------


def test_every_evaluation_has_the_control_beside_it() -> None:
    rng = np.random.default_rng(11)
    length = rng.integers(1, 100, size=600)
    useless = rng.normal(size=(600, 2))
    sure = -rng.random(600)
    rows = [
        Row(tuple(s), bool(n < 50), int(n), confidence=float(c))
        for s, n, c in zip(useless.tolist(), length, sure, strict=True)
    ]
    found = evaluate(rows, signals=("a", "b"))
    by_name = {one.name: one for one in found.scores}
    assert list(by_name) == [
        "signal a",
        "signal b",
        "grade",
        "answer's confidence",
        "grade and answer",
        "length alone (control)",
    ]
    control = by_name["length alone (control)"]
    assert control.auroc == 1.0
    assert control.threshold is not None
    assert control.threshold.n_wrong == 0
    assert abs(by_name["grade"].auroc - 0.5) < 0.1
    assert control.curve[-1] == (1.0, found.error)
    table = found.rows()
    assert table[0] == ("score", "AUROC", "coverage", "error", "upper bound")
    assert table[-1][:2] == ("length alone (control)", "1.000")
    assert table[1][2:] == ("0.000", "-", "-")
    assert [one.name for one in evaluate([Row((0.0,), True)] * 90).scores] == [
        "grade",
        "length alone (control)",
    ]


def test_evaluation_and_calibration_agree() -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=900)
    rows = [
        Row((float(v),), bool(ok), hard=bool(v < -1.3))
        for v, ok in zip(x, rng.random(900) > 0.5 / (1 + np.exp(6 * x)), strict=True)
    ]
    profile = calibrate(rows, seed=3, **IDS)
    grade = evaluate(rows, seed=3).scores[0]
    assert profile.tier1 is not None
    assert grade.threshold == profile.tier1
    assert profile == calibrate(list(rows), seed=3, **IDS)  # deterministic
    assert profile.id != calibrate(rows, seed=4, **IDS).id
    assert profile.hard is not None
    assert profile.gate is not None


# ---- profiles ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile() -> Profile:
    rng = np.random.default_rng(2)
    x = rng.normal(size=900)
    rows = [Row((float(v), 1.0), bool(v > -0.5), confidence=float(-abs(v)), hard=bool(v < -1)) for v in x]
    made = calibrate(rows, signals=("one", "two"), **IDS)
    verify = calibrate_answers([float(v) for v in x], [bool(v > 0) for v in x])
    assert made.tier1 is not None
    assert made.tier3 is not None
    return Profile(**{**made.__dict__, "verify": verify, "verify_model_id": "d" * 64})


def test_a_profile_survives_a_file(profile: Profile, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "profile.json"
    umask = os.umask(0)
    try:
        profile.save(path)
    finally:
        os.umask(umask)
    again = Profile.load(path)
    assert again == profile
    assert again.id == profile.id
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]
    assert path.read_text().isascii()
    with pytest.raises(OSError, match="nowhere"):
        profile.save(tmp_path / "nowhere" / "profile.json")
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none.json")
    if hasattr(os, "getuid"):
        path.chmod(0o666)
        with pytest.raises(PermissionError, match="others on this machine may change it"):
            Profile.load(path)
        path.chmod(0o644)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="not UTF-8"):
        Profile.load(path)


def test_decisions_about_answers(profile: Profile) -> None:
    tier1, verify = profile.tier1, profile.verify
    assert tier1 is not None and tier1.confidence is not None and verify is not None
    assert not profile.escalates(tier1.confidence)
    assert profile.escalates(math.nextafter(tier1.confidence, -math.inf))
    assert profile.escalates(math.nan)
    assert not profile.verifies(verify.score)
    for uncertain in (None, math.nan, -math.inf, math.nextafter(verify.score, -math.inf)):
        assert profile.verifies(uncertain)
    assert not tier1.passes(tier1.score)  # a confidence is asked for
    assert not tier1.passes(math.nan, 0.0)
    plain = Threshold(0.0, None, 0.05, 0.05, 100, 90, 0)
    assert plain.passes(0.0)
    assert (plain.coverage, plain.error) == (0.9, 0.0)


def _set(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = path_and_value

    def edit(content: dict[str, Any]) -> None:
        for key in path:
            content = content[key]
        content[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_set("version", 2), "version 2, expected 1"),
        (_set("extra", 1), "unknown 'extra'"),
        (lambda c: c.pop("tier1"), "lacks 'tier1'"),
        (_set("model_id", "xyz"), "model_id is 'xyz', expected 64 hex digits"),
        (_set("model_id", "A" * 64), "model_id"),
        (_set("template_id", None), "template_id is None"),
        (_set("signals", []), r"signals is \[\]"),
        (_set("signals", ["one", "one"]), "signals"),
        (_set("signals", ["one"]), "easy has the weights"),
        (_set("n", True), "n is True"),
        (_set("n", 0), "n is 0, expected a whole number from 1"),
        (_set("alpha", 1.0), "alpha is 1.0"),
        (_set("alpha", math.nan), "alpha is nan"),
        (_set("delta", "0.05"), "delta is '0.05'"),
        (_set("seed", -1), "seed is -1"),
        (_set("alpha", 0.2), "tier1 keeps another promise"),
        (_set("easy", None), "easy is a NoneType, expected an object"),
        (_set("easy", "weights", [1.0, -0.5]), "easy has the weight -0.5"),
        (_set("easy", "bias", math.inf), "bias is inf"),
        (_set("hard", None), "gate is there and hard, its score, is not"),
        (_set("gate", -99.0), "tier3 begins at"),
        (_set("tier1", "n_wrong", 30), "tier1 promises 0.05, and its rows show"),
        (_set("tier1", "n_passed", 20), "tier1 promises 0.05, and its rows show"),
        (_set("tier1", "n_passed", 10**6), "wrong of 1000000 passed"),
        (_set("tier1", "n_tested", 10**400), "wrong of"),
        (_set("tier1", "score", math.nan), "score is nan"),
        (_set("gate", 10**400), "gate is 1000"),
        (_set("easy", "weights", None), "weights is None, expected finite numbers"),
        (_set("easy", "weights", [True, 0.5]), "weights is"),
        (_set("tier1", "score", -5.0), "its id is"),
        (_set("verify", None), "of verify and verify_model_id one is missing"),
        (_set("id", "0" * 16), "its id is '0000000000000000'"),
    ],
)
def test_a_damaged_profile(profile: Profile, edit: Callable[[dict[str, Any]], None], said: str) -> None:
    content = json.loads(profile.to_json())
    edit(content)
    with pytest.raises(ProfileError, match=said) as caught:
        Profile.from_json(json.dumps(content), name="p.json")
    assert str(caught.value).startswith("p.json is no usable profile: ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "{}", '{"version": 1}'])
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(ProfileError, match="no "):
        Profile.from_json(text)


@examples(150)
@given(data=st.data())
def test_flipped_bytes_are_noticed(profile: Profile, data: st.DataObject) -> None:
    content = bytearray(profile.to_json().encode())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(32, 126).filter(lambda b: b != content[at]))
    with suppress(ProfileError):
        assert Profile.from_json(content.decode()) == profile  # a space, or a digit that rounds away

"""Thresholds with a promise: from labelled requests to a profile that says when the small model may answer.

The promise for tier 1 reads: "of the answers that tier 1 keeps, at most ``alpha`` are wrong; the sample that
led to this threshold misleads about that with a probability of at most ``delta``". It holds for requests
drawn like the rows, whatever the scores are worth: a useless score gives a small share of requests, or none,
and never a broken promise.

Why it holds (:func:`calibrate`):

1. The rows are shuffled by a seed and split. The first part alone decides everything that may be learnt: the
   weights of the signals, from which score on a request counts as hard and is kept out of tier 1, a path of
   candidate thresholds from few requests to many, and where on it to start.
2. On the second part, which is independent of the path, the number of wrong answers among those that pass one
   candidate is binomial, given how many pass. "More than alpha of them are wrong" is rejected where so few
   wrong ones have a probability of at most delta under it, which is the same as an upper bound of Clopper and
   Pearson (Biometrika 26, 1934) of at most alpha.
3. Candidates are tested in the order of the path until the first that is not rejected, and the last rejected
   one is taken. For one that breaks the promise to be taken, the first such on the path must have been
   rejected, which happens with a probability of at most delta: a fixed sequence needs no correction for the
   number of tests. This is "fixed sequence testing" of Learn then Test (Angelopoulos et al., 2110.01052),
   with the sequence learnt on a split; the threshold itself is that of selective classification with
   guaranteed risk (Geifman and El-Yaniv, 1705.08500). Bonferroni's correction over the same path would
   certify fewer requests on samples of a few hundred rows (tests/triage/test_calibration.py prints
   both).

The promise for answers of tier 2 that nobody verifies (:func:`calibrate_verify`) is about tier 2's requests,
which are not drawn like the rows: the easiest and the hardest are gone, by thresholds that the same rows have
decided. So the path is made and tested on the rows that tier 2 gets, and delta is shared among all the ways
in which the thresholds could have come out (Bonferroni): whichever it was, its part of delta was enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.errors import SllmError
from sllm.triage.bounds import at_most, checked_share, rows_needed, upper_bound
from sllm.triage.check_answer import confidence
from sllm.triage.profile import Combination, Profile, ProfileError, Threshold

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from sllm.triage.bounds import Bools, Floats

__all__ = [
    "CalibrationError",
    "Combination",
    "Evaluation",
    "Measured",
    "Profile",
    "ProfileError",
    "Row",
    "Threshold",
    "auroc",
    "calibrate",
    "calibrate_answers",
    "calibrate_verify",
    "confidence",
    "evaluate",
    "evaluate_verify",
    "rows_needed",
    "upper_bound",
]

_FIT_SHARE = 1 / 3
_PATH = 25
"""Candidates on a path: coverage in steps of 4 %. Finer steps cost tests of nearly the same requests."""
_HARD_ALPHA = 0.2


class CalibrationError(SllmError, ValueError):
    """The labelled rows cannot give a threshold; the message says how many, or which, are needed."""


# ---- labelled requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One labelled request.

    Attributes:
        signals: what speaks for the request being easy; each rises with easiness.
        correct: whether the small model's answer to it was right.
        length: tokens (or characters) of the request, for the control that uses nothing else.
        confidence: :func:`confidence` of that answer, or None; for all rows or for none.
        hard: whether the request needs the big model, or None; for all rows or for none.

    """

    signals: tuple[float, ...]
    correct: bool
    length: int = 0
    confidence: float | None = None
    hard: bool | None = None


@dataclass(frozen=True)
class _Table:
    """Rows as arrays: (n, k) signals, and (n,) of everything else."""

    signals: Floats
    correct: Bools
    length: Floats
    confidence: Floats | None
    hard: Bools | None

    def take(self, which: npt.NDArray[np.int64]) -> _Table:
        def some(array: Any) -> Any:
            return None if array is None else array[which]

        return _Table(
            self.signals[which],
            self.correct[which],
            self.length[which],
            some(self.confidence),
            some(self.hard),
        )

    def __len__(self) -> int:
        return len(self.correct)


def _all_or_none(values: list[Any], name: str, kind: Any) -> npt.NDArray[Any] | None:
    missing = sum(value is None for value in values)
    if missing == len(values):
        return None
    if missing:
        raise CalibrationError(
            f"{missing} of {len(values)} rows have no {name}, expected all of them to have one, or none"
        )
    return np.array(values, dtype=kind)


def _table(rows: Iterable[Row], names: Sequence[str]) -> _Table:
    rows = list(rows)
    for i, row in enumerate(rows):
        if len(row.signals) != len(names):
            found = len(row.signals)
            raise CalibrationError(f"row {i} has {found} signals, expected {len(names)}: {', '.join(names)}")
    table = _Table(
        np.array([row.signals for row in rows], dtype=np.float64).reshape(len(rows), len(names)),
        np.array([row.correct for row in rows], dtype=np.bool_),
        np.array([row.length for row in rows], dtype=np.float64),
        _all_or_none([row.confidence for row in rows], "confidence", np.float64),
        _all_or_none([row.hard for row in rows], "hard", np.bool_),
    )
    bad = np.flatnonzero(~np.isfinite(table.signals).all(axis=1))
    if len(bad):
        raise CalibrationError(f"row {bad[0]} has a signal that is not finite: {rows[bad[0]].signals}")
    if table.confidence is not None:
        # An empty answer is no error: it passes no threshold, as it will not in use.
        bad = np.flatnonzero(np.isnan(table.confidence) | (table.confidence == np.inf))
        if len(bad):
            raise CalibrationError(f"row {bad[0]} has the confidence {rows[bad[0]].confidence}")
    return table


# ---- thresholds --------------------------------------------------------------------------------------------


_Candidate = tuple[float, "float | None"]


def _counts(
    path: Sequence[_Candidate], scores: Floats, wrong: Bools, confidences: Floats | None
) -> list[tuple[int, int]]:
    """For each candidate how many pass, and how many of them are wrong."""
    if confidences is None:
        order = np.argsort(-scores, kind="stable")
        sums = np.concatenate(([0], np.cumsum(wrong[order])))
        numbers = np.searchsorted(-scores[order], [-score for score, _ in path], side="right")
        return [(int(n), int(sums[n])) for n in numbers]
    counts = []
    for score, least in path:
        mask = scores >= score
        if least is not None:
            mask &= confidences >= least
        counts.append((int(mask.sum()), int(wrong[mask].sum())))
    return counts


def _path(scores: Floats, wrong: Bools, confidences: Floats | None) -> list[_Candidate]:
    """Candidates from few requests to many, on the part for fitting: for each step of coverage the threshold,
    or the pair of thresholds with the fewest wrong ones.
    """
    n = len(scores)
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    sizes = [max(1, round(n * step / _PATH)) for step in range(1, _PATH + 1)]
    sizes = [size for size in sizes if size <= len(order)]
    if confidences is None:
        return list(dict.fromkeys((float(scores[order[size - 1]]), None) for size in sizes))
    best: dict[int, tuple[int, _Candidate]] = {}
    # The strictest grade first: a looser one, under which more answers are written and thrown away, has to
    # save a wrong one.
    for share in range(1, 11):
        graded = order[: max(1, round(len(order) * share / 10))]
        if len(graded) == 0:
            break
        lowest = float(scores[graded].min())
        graded = graded[np.isfinite(confidences[graded])]
        surest = graded[np.argsort(-confidences[graded], kind="stable")]
        sums = np.cumsum(wrong[surest])
        for size in sizes:
            if size <= len(surest) and (size not in best or sums[size - 1] < best[size][0]):
                best[size] = (int(sums[size - 1]), (lowest, float(confidences[surest[size - 1]])))
    return list(dict.fromkeys(best[size][1] for size in sizes if size in best))


def _expected(counts: list[tuple[int, int]], n_fit: int, n_test: int, alpha: float) -> list[float]:
    """The p-values that the part for fitting lets expect of the other."""
    found = []
    for n, k in counts:
        expected = round(n_test * n / n_fit)
        share = (k + 0.5) / (n + 1)
        found.append(at_most(int(share * expected), expected, alpha) if expected else 1.0)
    return found


def _certify(
    fit: tuple[Floats, Bools, Floats | None],
    test: tuple[Floats, Bools, Floats | None],
    alpha: float,
    delta: float,
    *,
    bonferroni: bool = False,
) -> Threshold | None:
    """The threshold with the most coverage that the rows prove, or None.

    ``fit`` and ``test`` are scores, what is wrong, and confidences. Bonferroni's correction is here to be
    compared with.
    """
    path = _path(*fit)
    n_test = len(test[1])
    if not path:
        return None
    first = 0
    if not bonferroni:  # where the proof should be easiest
        first = int(np.argmin(_expected(_counts(path, *fit), len(fit[1]), n_test, alpha)))
    level = delta / len(path) if bonferroni else delta
    best = None
    for candidate, (n, k) in zip(path[first:], _counts(path[first:], *test), strict=True):
        if n == 0 or at_most(k, n, alpha) > level:
            if bonferroni:
                continue
            break
        best = Threshold(candidate[0], candidate[1], alpha, level, n_test, n, k)
    return best


@dataclass(frozen=True)
class _Graded:
    """What the part for fitting gives: both scores, the gate, and both parts' grades, -inf behind it."""

    easy: Combination
    hard: Combination | None
    gate: float | None
    fit: Floats
    test: Floats


def _grade(fit: _Table, test: _Table, hard_alpha: float, delta: float) -> _Graded:
    easy = Combination.fit(fit.signals, fit.correct)
    hard = gate = None
    scores = [easy.scores(part.signals) for part in (fit, test)]
    if fit.hard is not None and fit.hard.any():
        hard = Combination.fit(-fit.signals, fit.hard)
        of_fit = hard.scores(-fit.signals)
        gate = _gate(of_fit, ~fit.hard, len(test), hard_alpha, delta)
        if gate is not None:
            scores[0] = np.where(of_fit >= gate, -np.inf, scores[0])
            scores[1] = np.where(hard.scores(-test.signals) >= gate, -np.inf, scores[1])
    return _Graded(easy, hard, gate, scores[0], scores[1])


def _gate(scores: Floats, wrong: Bools, n_test: int, alpha: float, delta: float) -> float | None:
    """The lowest score from which on the other rows can be expected to show that few enough are not hard."""
    path = _path(scores, wrong, None)
    expected = _expected(_counts(path, scores, wrong, None), len(scores), n_test, alpha)
    # Half of delta: the test itself will come out a little better or worse than expected.
    likely = [score for (score, _), p in zip(path, expected, strict=True) if p <= delta / 2]
    return min(likely, default=None)


def _split(n: int, seed: int, alpha: float, delta: float) -> tuple[Any, Any]:
    """Which rows are for fitting and which for testing."""
    needed = rows_needed(alpha, delta)
    n_fit = int(n * _FIT_SHARE)
    if n - n_fit < needed:
        least = next(m for m in range(needed, 4 * needed) if m - int(m * _FIT_SHARE) >= needed)
        raise CalibrationError(
            f"{n} labelled rows, expected at least {least}: a third of them is for fitting, and to show that"
            f" at most {alpha:.1%} are wrong with {1 - delta:.0%} confidence takes {needed} of the others"
            " without one wrong answer (with some, or where few requests are easy, several times as many)"
        )
    order = np.random.default_rng(seed).permutation(n)
    return order[:n_fit], order[n_fit:]


def calibrate(
    rows: Iterable[Row],
    *,
    model_id: str,
    template_id: str,
    policy_id: str,
    signals: Sequence[str] = ("score",),
    alpha: float = 0.05,
    delta: float = 0.05,
    hard_alpha: float = _HARD_ALPHA,
    seed: int = 0,
) -> Profile:
    """A profile from labelled rows; the module's docstring says what it promises and why that holds.

    Where the rows have confidences, tier 1's threshold is a pair: a grade, and the confidence below which the
    answer goes on to tier 2. The promise is about the answers that stay.

    Args:
        rows: drawn like the requests of later use, each on its own.
        model_id, template_id, policy_id, signals: see :class:`Profile`.
        alpha: the largest share of wrong answers in tier 1.
        delta: the probability that the rows mislead about it.
        hard_alpha: the largest share of requests that are not hard among those sent straight to the cloud, at
            the same delta, for rows that say which are hard.
        seed: of the split into a third for fitting and the rest for testing. Choose it before looking: the
            best of several seeds keeps no promise.

    Returns:
        The profile; its ``tier1`` is None where no threshold keeps the promise.

    Raises:
        CalibrationError: too few rows (it says how many are needed), or a row with a number that is not
            finite.
        ValueError: alpha, delta or hard_alpha out of range.

    """
    checked_share(alpha, "alpha")
    checked_share(delta, "delta")
    checked_share(hard_alpha, "hard_alpha")
    names = tuple(signals)
    table = _table(rows, names)
    first, rest = _split(len(table), seed, alpha, delta)
    fit, test = table.take(first), table.take(rest)
    graded = _grade(fit, test, hard_alpha, delta)
    tier1 = _certify(
        (graded.fit, ~fit.correct, fit.confidence),
        (graded.test, ~test.correct, test.confidence),
        alpha,
        delta,
    )
    tier3 = None
    if graded.hard is not None and graded.gate is not None and test.hard is not None:
        # One test of one threshold, which the part for fitting chose.
        mask = graded.hard.scores(-test.signals) >= graded.gate
        n, k = int(mask.sum()), int((~test.hard)[mask].sum())
        if n and at_most(k, n, hard_alpha) <= delta:
            tier3 = Threshold(graded.gate, None, hard_alpha, delta, len(test), n, k)
    return Profile(
        model_id,
        template_id,
        policy_id,
        names,
        len(table),
        alpha,
        delta,
        seed,
        graded.easy,
        tier1,
        graded.hard,
        graded.gate,
        tier3,
    )


def calibrate_answers(
    confidences: Sequence[float],
    correct: Sequence[bool],
    *,
    alpha: float = 0.05,
    delta: float = 0.05,
    seed: int = 0,
) -> Threshold | None:
    """The confidence from which a model's answers need no verification, calibrated in the same manner.

    Args:
        confidences: :func:`confidence` of each answer.
        correct: whether it was right.

    Raises:
        CalibrationError: as :func:`calibrate`.

    """
    if len(confidences) != len(correct):
        raise ValueError(f"{len(confidences)} confidences and {len(correct)} answers, expected as many")
    given = [math.nan if c is None else float(c) for c in confidences]
    if any(math.isnan(c) or c == math.inf for c in given):
        raise CalibrationError("a confidence is not finite, expected a log-probability")
    scores = np.array([max(c, -1e300) for c in given])  # an empty answer: a score that passes nothing else
    wrong = ~np.array(correct, dtype=np.bool_)
    first, rest = _split(len(scores), seed, alpha, delta)
    return _certify((scores[first], wrong[first], None), (scores[rest], wrong[rest], None), alpha, delta)


@dataclass(frozen=True)
class _Second:
    """Of the rows that tier 2 gets, the answers of the local main model: both parts' confidences, and what is
    wrong; and the lengths of the requests.
    """

    fit: tuple[Floats, Bools]
    test: tuple[Floats, Bools]
    lengths: tuple[Floats, Floats]
    delta: float


def _second(profile: Profile, rows: Iterable[Row], answers: Sequence[tuple[float, bool]]) -> _Second:
    table = _table(rows, profile.signals)
    if len(table) != profile.n or len(answers) != profile.n:
        raise ValueError(
            f"{len(table)} rows and {len(answers)} answers, expected the {profile.n} rows of the profile"
        )
    confidences = np.array([float(sure) for sure, _ in answers])
    bad = np.flatnonzero(np.isnan(confidences) | (confidences == np.inf))
    if len(bad):
        raise CalibrationError(f"the answer to row {bad[0]} has the confidence {confidences[bad[0]]}")
    confidences = np.maximum(confidences, -1e300)  # an empty answer: a score that passes nothing else
    wrong = ~np.array([right for _, right in answers], dtype=np.bool_)
    first, rest = _split(len(table), profile.seed, profile.alpha, profile.delta)
    asked = _in_tier2(profile, table)
    first, rest = first[asked[first]], rest[asked[rest]]
    # A threshold of tier 1 is one of a path or none; tier 3 is there or not.
    ways = (_PATH + 1) * (1 if profile.gate is None else 2)
    return _Second(
        (confidences[first], wrong[first]),
        (confidences[rest], wrong[rest]),
        (table.length[first], table.length[rest]),
        profile.delta / ways,
    )


def _in_tier2(profile: Profile, table: _Table) -> Bools:
    """Which rows tier 2 gets, those included whose answers tier 1 does not keep."""
    gone = np.zeros(len(table), dtype=np.bool_)
    if profile.hard is not None and profile.gate is not None:
        gone = profile.hard.scores(-table.signals) >= profile.gate
    kept = np.zeros(len(table), dtype=np.bool_)
    if profile.tier1 is not None:
        kept = ~gone & (profile.easy.scores(table.signals) >= profile.tier1.score)
        if profile.tier1.confidence is not None:
            assert table.confidence is not None
            kept &= table.confidence >= profile.tier1.confidence
    return ~kept if profile.tier3 is None else ~kept & ~gone


def calibrate_verify(
    profile: Profile,
    rows: Iterable[Row],
    answers: Sequence[tuple[float, bool]],
    *,
    model_id: str,
    alpha: float | None = None,
) -> Profile:
    """The profile with the confidence from which the local main model's answers need no verification.

    At most ``alpha`` of the answers in tier 2 that are not verified are then wrong; the module's docstring
    says why. Where the rows prove that for no threshold, the profile stays as it is, and all are verified.

    Args:
        profile: what :func:`calibrate` made of ``rows``.
        rows: those rows, in that order.
        answers: for each of them the :func:`confidence` of the local main model's answer to it, and whether
            it was right.
        model_id: :func:`sllm.engine.gguf.model_id` of that model.
        alpha: the largest share of wrong ones; None: the profile's.

    Raises:
        CalibrationError: a confidence that is not finite.
        ValueError: other rows than the profile's, or alpha out of range.

    """
    alpha = profile.alpha if alpha is None else checked_share(alpha, "alpha")
    second = _second(profile, rows, answers)
    verify = _certify((*second.fit, None), (*second.test, None), alpha, second.delta)
    return replace(profile, verify=verify, verify_model_id=None if verify is None else model_id)


# ---- what it is worth --------------------------------------------------------------------------------------


def auroc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """The probability that a positive one scores above a negative one, ties counting half; NaN where one of
    the two kinds is missing.
    """
    values, kind = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.bool_)
    n_positive = int(kind.sum())
    n_negative = len(kind) - n_positive
    if n_positive == 0 or n_negative == 0:
        return math.nan
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    above = float(ranks[kind].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


@dataclass(frozen=True)
class Measured:
    """What one score is worth, on rows that it was not fitted on.

    Attributes:
        name: the score.
        auroc: of right answers against wrong ones; NaN where there is only one kind, or the score is a pair.
        threshold: what it proves at the alpha and delta asked for, or None.
        curve: (coverage, error) pairs, the surest requests first.

    """

    name: str
    auroc: float
    threshold: Threshold | None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Scores side by side, the last of them the control.

    Attributes:
        n: rows that they were tested on.
        error: the share of wrong answers among all of them.
        scores: the measured scores.

    """

    n: int
    error: float
    scores: tuple[Measured, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people, a heading first."""
        table: list[tuple[str, ...]] = [("score", "AUROC", "coverage", "error", "upper bound")]
        for one in self.scores:
            worth = "-" if math.isnan(one.auroc) else f"{one.auroc:.3f}"
            t = one.threshold
            proved = ("0.000", "-", "-") if t is None else _figures(t)
            table.append((one.name, worth, *proved))
        return table


def _figures(t: Threshold) -> tuple[str, str, str]:
    return f"{t.coverage:.3f}", f"{t.error:.3f}", f"{t.bound:.3f}"


def _curve(scores: Floats, wrong: Bools) -> tuple[tuple[float, float], ...]:
    order = np.argsort(-scores, kind="stable")
    errors = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
    ends = np.append(scores[order][1:] != scores[order][:-1], True)  # equal scores pass together
    return tuple(((i + 1) / len(order), float(errors[i])) for i in np.flatnonzero(ends).tolist())


def evaluate(
    rows: Iterable[Row],
    *,
    signals: Sequence[str] = ("score",),
    alpha: float = 0.05,
    delta: float = 0.05,
    hard_alpha: float = _HARD_ALPHA,
    seed: int = 0,
) -> Evaluation:
    """What the grade, the answer's confidence and both together are worth, beside the prompt's length alone.

    With the same arguments the split and the thresholds are those of :func:`calibrate`, and
    every score, the control too, goes through the same procedure. AUROC and coverage are of the rows that
    nothing was fitted on. The control is the sign that routers most often turn out to have learnt: short
    requests are easy.

    Raises:
        CalibrationError, ValueError: as :func:`calibrate`.

    """
    checked_share(alpha, "alpha")
    checked_share(delta, "delta")
    names = tuple(signals)
    table = _table(rows, names)
    first, rest = _split(len(table), seed, alpha, delta)
    fit, test = table.take(first), table.take(rest)
    wrong = ~test.correct
    graded = _grade(fit, test, hard_alpha, delta)
    fit_grade, test_grade = graded.fit, graded.test

    def single(name: str, of_fit: Floats, of_test: Floats) -> Measured:
        threshold = _certify((of_fit, ~fit.correct, None), (of_test, wrong, None), alpha, delta)
        return Measured(name, auroc(of_test, test.correct), threshold, _curve(of_test, wrong))

    scores = []
    if len(names) > 1:
        scores += [
            single(f"signal {name}", fit.signals[:, i], test.signals[:, i]) for i, name in enumerate(names)
        ]
    scores.append(single("grade", fit_grade, test_grade))
    if fit.confidence is not None and test.confidence is not None:
        # An empty answer's -inf would make a path of it; a number below all others passes nothing else.
        of_fit, of_test = (np.maximum(c, -1e300) for c in (fit.confidence, test.confidence))
        scores.append(single("answer's confidence", of_fit, of_test))
        pair = _certify(
            (fit_grade, ~fit.correct, fit.confidence), (test_grade, wrong, test.confidence), alpha, delta
        )
        scores.append(Measured("grade and answer", math.nan, pair))
    scores.append(single("length alone (control)", -fit.length, -test.length))
    return Evaluation(len(test), float(wrong.mean()), tuple(scores))


def evaluate_verify(
    profile: Profile,
    rows: Iterable[Row],
    answers: Sequence[tuple[float, bool]],
    *,
    alpha: float | None = None,
) -> Evaluation:
    """What the confidence of tier 2's answers is worth, beside the prompt's length alone, as
    :func:`calibrate_verify` finds its threshold.

    Raises:
        CalibrationError, ValueError: as :func:`calibrate_verify`.

    """
    alpha = profile.alpha if alpha is None else checked_share(alpha, "alpha")
    second = _second(profile, rows, answers)
    wrong = second.test[1]

    def single(name: str, of_fit: Floats, of_test: Floats) -> Measured:
        fit, test = (of_fit, second.fit[1], None), (of_test, wrong, None)
        curve = _curve(of_test, wrong) if len(wrong) else ()
        return Measured(name, auroc(of_test, ~wrong), _certify(fit, test, alpha, second.delta), curve)

    scores = (
        single("answer's confidence", second.fit[0], second.test[0]),
        single("length alone (control)", -second.lengths[0], -second.lengths[1]),
    )
    return Evaluation(len(wrong), float(wrong.mean()) if len(wrong) else math.nan, scores)

"""The thresholds that labelled rows prove: rows as arrays, their split, the path of candidates and the test.

:mod:`sllm.triage.calibration` says why what is proved here holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.errors import SllmError
from sllm.triage.bounds import at_most, rows_needed
from sllm.triage.profile import Combination, Threshold

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from sllm.triage.bounds import Bools, Floats
    from sllm.triage.profile import Profile

__all__ = [
    "HARD_ALPHA",
    "CalibrationError",
    "Graded",
    "Row",
    "Scored",
    "Table",
    "Tier2Answers",
    "certify",
    "grade",
    "split",
    "tier2_answers",
]

HARD_ALPHA = 0.2
"""The largest share of requests that are not hard among those sent straight to the cloud."""

_FIT_SHARE = 1 / 3
_PATH = 25
"""Candidates on a path: coverage in steps of 4 %. Finer steps cost tests of nearly the same requests."""


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
class Table:
    """Rows as arrays.

    Attributes:
        signals: float64 (n, k).
        correct: bool (n,).
        length: float64 (n,).
        confidence: float64 (n,), or None.
        hard: bool (n,), or None.

    """

    signals: Floats
    correct: Bools
    length: Floats
    confidence: Floats | None
    hard: Bools | None

    @classmethod
    def of(cls, rows: Iterable[Row], names: Sequence[str]) -> Table:
        """The rows, checked; ``names`` are those of their signals.

        Raises:
            CalibrationError: a row with other signals, or with a number that is not finite.

        """
        rows = list(rows)
        for i, row in enumerate(rows):
            if len(row.signals) != len(names):
                raise CalibrationError(
                    f"row {i} has {len(row.signals)} signals, expected {len(names)}: {', '.join(names)}"
                )
        table = cls(
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

    def take(self, which: npt.NDArray[np.int64]) -> Table:
        """Some of the rows, by their numbers."""
        columns = (getattr(self, column.name) for column in fields(self))
        return Table(*(None if column is None else column[which] for column in columns))  # type: ignore[arg-type]

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


def split(
    n: int, seed: int, alpha: float, delta: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The numbers of the rows for fitting and of those for testing, int64.

    Raises:
        CalibrationError: too few rows.

    """
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


# ---- thresholds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Answers and what they are judged by, before any threshold.

    Attributes:
        scores: float64 (n,), the higher the surer.
        wrong: bool (n,), which answers are wrong (or which requests are not hard).
        confidences: float64 (n,), what a second threshold is put to, or None.

    """

    scores: Floats
    wrong: Bools
    confidences: Floats | None = None

    @classmethod
    def by_confidence(cls, confidences: npt.ArrayLike, wrong: Bools) -> Scored:
        """Answers that are judged by their confidences alone.

        An empty answer's -inf becomes a number below all others, which passes nothing that others do not.
        """
        return cls(np.maximum(np.asarray(confidences, dtype=np.float64), -1e300), wrong)

    def __len__(self) -> int:
        return len(self.wrong)


_Candidate = tuple[float, "float | None"]
"""A threshold for the score, and one for the confidence or None."""


def certify(
    fit: Scored, test: Scored, alpha: float, delta: float, *, bonferroni: bool = False
) -> Threshold | None:
    """The threshold with the most coverage that the rows prove, or None.

    Args:
        fit: the part of the rows that chooses the path of candidates.
        test: the other part, on which they are tested.
        alpha: the largest share of wrong answers among those that pass.
        delta: the probability that the rows mislead about it.
        bonferroni: test with Bonferroni's correction instead, to be compared with.

    """
    path = _path(fit)
    if not path:
        return None
    first = 0
    if not bonferroni:  # where the proof should be easiest
        first = int(np.argmin(_expected_p(_counts(path, fit), len(fit), len(test), alpha)))
    level = delta / len(path) if bonferroni else delta
    best = None
    for candidate, (n, k) in zip(path[first:], _counts(path[first:], test), strict=True):
        if n == 0 or at_most(k, n, alpha) > level:
            if bonferroni:
                continue
            break
        best = Threshold(candidate[0], candidate[1], alpha, level, len(test), n, k)
    return best


def _path(fit: Scored) -> list[_Candidate]:
    """Candidates from few requests to many: for each step of coverage the threshold, or the pair of
    thresholds with the fewest wrong ones.
    """
    n = len(fit)
    order = np.argsort(-fit.scores, kind="stable")
    order = order[np.isfinite(fit.scores[order])]
    sizes = [max(1, round(n * step / _PATH)) for step in range(1, _PATH + 1)]
    sizes = [size for size in sizes if size <= len(order)]
    if fit.confidences is None:
        return list(dict.fromkeys((float(fit.scores[order[size - 1]]), None) for size in sizes))
    best: dict[int, tuple[int, _Candidate]] = {}
    # The strictest grade first: a looser one, under which more answers are written and thrown away, has to
    # save a wrong one.
    for share in range(1, 11):
        graded = order[: max(1, round(len(order) * share / 10))]
        if len(graded) == 0:
            break
        lowest = float(fit.scores[graded].min())
        graded = graded[np.isfinite(fit.confidences[graded])]
        surest = graded[np.argsort(-fit.confidences[graded], kind="stable")]
        sums = np.cumsum(fit.wrong[surest])
        for size in sizes:
            if size <= len(surest) and (size not in best or sums[size - 1] < best[size][0]):
                best[size] = (int(sums[size - 1]), (lowest, float(fit.confidences[surest[size - 1]])))
    return list(dict.fromkeys(best[size][1] for size in sizes if size in best))


def _counts(path: Sequence[_Candidate], part: Scored) -> list[tuple[int, int]]:
    """For each candidate how many pass, and how many of them are wrong."""
    if part.confidences is None:
        order = np.argsort(-part.scores, kind="stable")
        sums = np.concatenate(([0], np.cumsum(part.wrong[order])))
        numbers = np.searchsorted(-part.scores[order], [-score for score, _ in path], side="right")
        return [(int(n), int(sums[n])) for n in numbers]
    counts = []
    for score, confidence in path:
        mask = part.scores >= score
        if confidence is not None:
            mask &= part.confidences >= confidence
        counts.append((int(mask.sum()), int(part.wrong[mask].sum())))
    return counts


def _expected_p(counts: list[tuple[int, int]], n_fit: int, n_test: int, alpha: float) -> list[float]:
    """The p-values to be expected of the part for testing, by the counts of the part for fitting."""
    values = []
    for n, k in counts:
        expected = round(n_test * n / n_fit)
        share = (k + 0.5) / (n + 1)
        values.append(at_most(int(share * expected), expected, alpha) if expected else 1.0)
    return values


# ---- grades ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """What the part for fitting gives.

    Attributes:
        easy, hard: both scores.
        gate: from this score for being hard on, a request is not tier 1.
        fit, test: both parts by the grade, which is -inf for requests that the gate keeps out.

    """

    easy: Combination
    hard: Combination | None
    gate: float | None
    fit: Scored
    test: Scored


def graded_parts(
    rows: Iterable[Row], names: Sequence[str], *, alpha: float, delta: float, hard_alpha: float, seed: int
) -> tuple[Table, Table, Graded]:
    """The part of the rows for fitting, the part for testing, and both graded.

    Raises:
        CalibrationError: too few rows, or a row with a number that is not finite.

    """
    table = Table.of(rows, names)
    first, rest = split(len(table), seed, alpha, delta)
    fit, test = table.take(first), table.take(rest)
    return fit, test, grade(fit, test, hard_alpha, delta)


def grade(fit: Table, test: Table, hard_alpha: float, delta: float) -> Graded:
    """Fit the scores and the gate on one part of the rows, and grade both parts with them."""
    easy = Combination.fit(fit.signals, fit.correct)
    hard = gate = None
    scores = [easy.scores(part.signals) for part in (fit, test)]
    if fit.hard is not None and fit.hard.any():
        hard = Combination.fit(-fit.signals, fit.hard)
        of_fit = hard.scores(-fit.signals)
        gate = _gate(Scored(of_fit, ~fit.hard), len(test), hard_alpha, delta)
        if gate is not None:
            scores[0] = np.where(of_fit >= gate, -np.inf, scores[0])
            scores[1] = np.where(hard.scores(-test.signals) >= gate, -np.inf, scores[1])
    return Graded(
        easy,
        hard,
        gate,
        Scored(scores[0], ~fit.correct, fit.confidence),
        Scored(scores[1], ~test.correct, test.confidence),
    )


def _gate(fit: Scored, n_test: int, alpha: float, delta: float) -> float | None:
    """The lowest score from which on the other rows can be expected to show that few enough are not hard."""
    path = _path(fit)
    expected = _expected_p(_counts(path, fit), len(fit), n_test, alpha)
    # Half of delta: the test itself will come out a little better or worse than expected.
    likely = [score for (score, _), p in zip(path, expected, strict=True) if p <= delta / 2]
    return min(likely, default=None)


# ---- tier 2 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier2Answers:
    """The local main model's answers to the rows that tier 2 gets.

    Attributes:
        fit, test: both parts by their confidences.
        lengths: of the requests of both parts, float64.
        delta: the share of the profile's delta that a threshold for them may use.

    """

    fit: Scored
    test: Scored
    lengths: tuple[Floats, Floats]
    delta: float


def tier2_answers(
    profile: Profile, rows: Iterable[Row], answers: Sequence[tuple[float, bool]]
) -> Tier2Answers:
    """Which rows of a profile tier 2 gets, and how the local main model did on them.

    Args:
        profile: it.
        rows: those that it was made of, in that order.
        answers: for each of them the confidence of the answer, and whether it was right.

    Raises:
        CalibrationError: a confidence that is not finite.
        ValueError: other rows than the profile's.

    """
    table = Table.of(rows, profile.signals)
    if len(table) != profile.n or len(answers) != profile.n:
        raise ValueError(
            f"{len(table)} rows and {len(answers)} answers, expected the {profile.n} rows of the profile"
        )
    confidences = np.array([float(confidence) for confidence, _ in answers])
    bad = np.flatnonzero(np.isnan(confidences) | (confidences == np.inf))
    if len(bad):
        raise CalibrationError(f"the answer to row {bad[0]} has the confidence {confidences[bad[0]]}")
    wrong = ~np.array([right for _, right in answers], dtype=np.bool_)
    first, rest = split(len(table), profile.seed, profile.alpha, profile.delta)
    asked = _in_tier2(profile, table)
    first, rest = first[asked[first]], rest[asked[rest]]
    # A threshold of tier 1 is one of a path or none; tier 3 is there or not.
    ways = (_PATH + 1) * (1 if profile.gate is None else 2)
    return Tier2Answers(
        Scored.by_confidence(confidences[first], wrong[first]),
        Scored.by_confidence(confidences[rest], wrong[rest]),
        (table.length[first], table.length[rest]),
        profile.delta / ways,
    )


def _in_tier2(profile: Profile, table: Table) -> Bools:
    """Which rows tier 2 gets, those included whose answers tier 1 does not keep, bool (n,)."""
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

"""What scores are worth: area under the ROC curve, coverage and error, beside the prompt's length alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sllm.triage.bounds import checked_share
from sllm.triage.certify import HARD_ALPHA, Scored, certify, graded_parts, tier2_answers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from sllm.triage.bounds import Bools, Floats
    from sllm.triage.certify import Row
    from sllm.triage.profile import Profile, Threshold

__all__ = ["Evaluation", "Measured", "auroc", "evaluate", "evaluate_verify"]


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
    if len(wrong) == 0:
        return ()
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
    hard_alpha: float = HARD_ALPHA,
    seed: int = 0,
) -> Evaluation:
    """What the grade, the answer's confidence and both together are worth, beside the prompt's length alone.

    With the same arguments the split and the thresholds are those of
    :func:`~sllm.triage.calibration.calibrate`, and every score, the control too, goes through the same
    procedure. AUROC and coverage are of the rows that nothing was fitted on. The control is the sign that
    routers most often turn out to have learnt: short requests are easy.

    Raises:
        CalibrationError, ValueError: as :func:`~sllm.triage.calibration.calibrate`.

    """
    checked_share(alpha, "alpha")
    checked_share(delta, "delta")
    names = tuple(signals)
    fit, test, graded = graded_parts(rows, names, alpha=alpha, delta=delta, hard_alpha=hard_alpha, seed=seed)

    def single(name: str, of_fit: Floats, of_test: Floats) -> Measured:
        return _measured(name, Scored(of_fit, ~fit.correct), Scored(of_test, ~test.correct), alpha, delta)

    scores = []
    if len(names) > 1:
        scores += [
            single(f"signal {name}", fit.signals[:, i], test.signals[:, i]) for i, name in enumerate(names)
        ]
    scores.append(single("grade", graded.fit.scores, graded.test.scores))
    if fit.confidence is not None and test.confidence is not None:
        sure = Scored.by_confidence(fit.confidence, ~fit.correct)
        tested = Scored.by_confidence(test.confidence, ~test.correct)
        scores.append(_measured("answer's confidence", sure, tested, alpha, delta))
        pair = certify(graded.fit, graded.test, alpha, delta)
        scores.append(Measured("grade and answer", math.nan, pair))
    scores.append(single("length alone (control)", -fit.length, -test.length))
    return Evaluation(len(test), float((~test.correct).mean()), tuple(scores))


def evaluate_verify(
    profile: Profile,
    rows: Iterable[Row],
    answers: Sequence[tuple[float, bool]],
    *,
    alpha: float | None = None,
) -> Evaluation:
    """What the confidence of tier 2's answers is worth, beside the prompt's length alone.

    The thresholds are found as by :func:`~sllm.triage.calibration.calibrate_verify`.

    Raises:
        CalibrationError, ValueError: as :func:`~sllm.triage.calibration.calibrate_verify`.

    """
    alpha = profile.alpha if alpha is None else checked_share(alpha, "alpha")
    second = tier2_answers(profile, rows, answers)
    wrong = second.test.wrong
    short, tested = Scored(-second.lengths[0], second.fit.wrong), Scored(-second.lengths[1], wrong)
    scores = (
        _measured("answer's confidence", second.fit, second.test, alpha, second.delta),
        _measured("length alone (control)", short, tested, alpha, second.delta),
    )
    return Evaluation(len(wrong), float(wrong.mean()) if len(wrong) else math.nan, scores)


def _measured(name: str, fit: Scored, test: Scored, alpha: float, delta: float) -> Measured:
    threshold = certify(fit, test, alpha, delta)
    return Measured(name, auroc(test.scores, ~test.wrong), threshold, _curve(test.scores, test.wrong))

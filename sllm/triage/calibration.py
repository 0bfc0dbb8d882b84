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
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sllm.triage.bounds import at_most, checked_share, rows_needed, upper_bound
from sllm.triage.certify import (
    HARD_ALPHA,
    CalibrationError,
    Graded,
    Row,
    Scored,
    Table,
    certify,
    graded_parts,
    split,
    tier2_answers,
)
from sllm.triage.check_answer import confidence
from sllm.triage.evaluation import Evaluation, Measured, auroc, evaluate, evaluate_verify
from sllm.triage.profile import Combination, Profile, ProfileError, Threshold

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def calibrate(
    rows: Iterable[Row],
    *,
    model_id: str,
    template_id: str,
    policy_id: str,
    signals: Sequence[str] = ("score",),
    alpha: float = 0.05,
    delta: float = 0.05,
    hard_alpha: float = HARD_ALPHA,
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
    fit, test, graded = graded_parts(rows, names, alpha=alpha, delta=delta, hard_alpha=hard_alpha, seed=seed)
    return Profile(
        model_id=model_id,
        template_id=template_id,
        policy_id=policy_id,
        signals=names,
        n=len(fit) + len(test),
        alpha=alpha,
        delta=delta,
        seed=seed,
        easy=graded.easy,
        tier1=certify(graded.fit, graded.test, alpha, delta),
        hard=graded.hard,
        gate=graded.gate,
        tier3=_tier3(graded, test, hard_alpha, delta),
    )


def _tier3(graded: Graded, test: Table, hard_alpha: float, delta: float) -> Threshold | None:
    """One test of one threshold, the gate, which the part for fitting has chosen."""
    if graded.hard is None or graded.gate is None or test.hard is None:
        return None
    passed = graded.hard.scores(-test.signals) >= graded.gate
    n, k = int(passed.sum()), int((passed & ~test.hard).sum())
    if not n or at_most(k, n, hard_alpha) > delta:
        return None
    return Threshold(graded.gate, None, hard_alpha, delta, len(test), n, k)


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
    scores, wrong = np.array(given), ~np.array(correct, dtype=np.bool_)
    first, rest = split(len(given), seed, alpha, delta)
    fit = Scored.by_confidence(scores[first], wrong[first])
    return certify(fit, Scored.by_confidence(scores[rest], wrong[rest]), alpha, delta)


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
    second = tier2_answers(profile, rows, answers)
    verify = certify(second.fit, second.test, alpha, second.delta)
    return replace(profile, verify=verify, verify_model_id=None if verify is None else model_id)

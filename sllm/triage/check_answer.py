"""How far an answer that another model has written stands by a target's scores, found in one pass.

The target scores every token of the answer, given the prompt. The answer stands up to the first token that
the target finds too unlikely; from there on the target writes the text, with the rest of the answer as a
draft (:class:`sllm.draft.drafters.AnswerDrafter`). Rolling back to the first token that the big model finds
too unlikely is the rollback policy of BiLD (2302.07863). What stands is not a sample of the target, but holds
nothing that would surprise it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import int32_array

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from sllm.targets.base import Scorer, Scores

__all__ = ["Acceptance", "Checked", "answer_logprobs", "check_answer", "confidence"]


@dataclass(frozen=True)
class Acceptance:
    """When a token of an answer stands: it is among the target's ``max_rank`` likeliest, or its
    log-probability is ``min_logprob`` or more.

    Attributes:
        min_logprob: natural logarithm; ``-math.inf`` lets everything stand.
        max_rank: 0: the rank lets nothing stand.

    Raises:
        ValueError: a logarithm above 0 or NaN, or a negative rank.

    """

    min_logprob: float = math.log(0.02)
    max_rank: int = 1

    def __post_init__(self) -> None:
        if not self.min_logprob <= 0:
            raise ValueError(f"min_logprob is {self.min_logprob}, expected a logarithm <= 0")
        checked_int(self.max_rank, "max_rank", 0)

    @classmethod
    def fitted(cls, answers: Iterable[Scores], *, keep: float = 0.95, max_rank: int = 1) -> Acceptance:
        """The threshold with which ``keep`` of the answers that are right would stand as a whole.

        Args:
            answers: the target's scores of answers that are known to be right.
            keep: 0 < keep < 1.
            max_rank: as for the class.

        Raises:
            ValueError: no answers, or ``keep`` out of range.

        """
        if not 0 < keep < 1:
            raise ValueError(f"keep is {keep}, expected 0 < keep < 1")
        worst = [
            float(one.logprobs[one.ranks >= max_rank].min(initial=0.0))
            for one in answers
            if len(one.logprobs)
        ]
        if not worst:
            raise ValueError("a threshold needs at least one answer")
        return cls(float(np.quantile(worst, 1 - keep, method="lower")), max_rank)

    def n_standing(self, scores: Scores) -> int:
        """How many tokens stand before the first that does not; NaN does not stand."""
        good = (scores.ranks < self.max_rank) | (scores.logprobs >= self.min_logprob)
        bad = np.flatnonzero(~(good & np.isfinite(scores.logprobs)))
        return int(bad[0]) if len(bad) else len(scores.logprobs)


@dataclass(frozen=True)
class Checked:
    """What a target says of an answer.

    Attributes:
        n_kept: the first so many tokens stand.
        scores: of all of them.

    """

    n_kept: int
    scores: Scores

    @property
    def stands(self) -> bool:
        """Whether the whole answer does."""
        return self.n_kept == len(self.scores.logprobs)


def check_answer(
    target: Scorer,
    prompt: npt.ArrayLike,
    answer: npt.ArrayLike,
    *,
    accept: Acceptance | None = None,
) -> Checked:
    """Let ``target`` score an answer, and say how much of it stands.

    To continue, call :func:`sllm.generate` with the prompt and the first ``n_kept`` tokens: the target still
    has them in memory.

    Args:
        target: what scores: a local, remote or split target.
        prompt: int32 (n,), n >= 1.
        answer: int32 (m,), m >= 1, with its end-of-generation token where it has ended by itself.
        accept: None: ``Acceptance()``.

    Raises:
        ValueError: an empty prompt or answer.
        ContextFullError, BusyError, RemoteError: as the target's ``score``.

    """
    head, tail = int32_array(prompt, "prompt"), int32_array(answer, "answer")
    if len(head) == 0 or len(tail) == 0:
        raise ValueError("checking needs a prompt and an answer of at least one token each")
    scores = target.score(np.concatenate([head, tail]), len(head))
    return Checked((accept or Acceptance()).n_standing(scores), scores)


def confidence(logprobs: npt.ArrayLike) -> float:
    """How sure a model was of its answer: the mean of its tokens' log-probabilities plus their 10 % quantile.

    The mean alone hides one doubtful token among many sure ones, which is where a wrong answer shows; the
    quantile sees it (Gupta et al., "Language model cascades: token-level uncertainty and beyond",
    2404.10136). An empty answer has the confidence -inf; what is not finite counts as NaN, which passes no
    threshold.

    Args:
        logprobs: (n,) natural logarithms, at temperature 1.

    """
    values = np.asarray(logprobs, dtype=np.float64).ravel()
    if len(values) == 0:
        return -math.inf
    if not np.isfinite(values).all():
        return math.nan
    return float(values.mean() + np.quantile(values, 0.1))


def answer_logprobs(target: Scorer, prompt: npt.ArrayLike, answer: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The log-probability of each token of an answer under the model that wrote it, float64 (m,).

    For :func:`confidence`. Calibration and use both take it from here, so that a
    threshold is compared with what it was found for.

    Args:
        target: the model.
        prompt: int32 (n,), n >= 1.
        answer: int32 (m,), as it was written, its end-of-generation token included.

    Raises:
        ContextFullError, BusyError, RemoteError: as the target's ``score``.

    """
    head, tail = int32_array(prompt, "prompt"), int32_array(answer, "answer")
    if len(tail) == 0:
        return np.empty(0)
    return np.asarray(target.score(np.concatenate([head, tail]), len(head)).logprobs, dtype=np.float64)

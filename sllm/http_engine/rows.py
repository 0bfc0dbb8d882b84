"""What an engine says of a position: its likeliest tokens and their log-probabilities, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

__all__ = ["Row", "RowReader", "field_of"]


@dataclass(frozen=True)
class Row:
    """The likeliest tokens after a text, the likeliest first, equal ones in the order of their ids.

    Attributes:
        tokens: int32 (k,), no token twice.
        logprobs: float32 (k,), natural logarithms under the unfiltered softmax at temperature 1.
        sampled: the token that the engine itself went on with, where it went on; None: it did not.

    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampled: int | None = None


class RowReader:
    """Makes rows of what an engine sent, or says what is wrong with it.

    Args:
        where: the engine, for messages.
        n_vocab: tokens of the vocabulary.

    """

    def __init__(self, where: str, n_vocab: int) -> None:
        self.where = where
        self.n_vocab = n_vocab

    def wrong(self, what: str) -> RemoteError:
        """The error for an answer that is not what was asked for."""
        return RemoteError(f"{self.where} {what}")

    def token(self, value: Any) -> int:
        """A token id of the vocabulary.

        Raises:
            RemoteError: it is something else.

        """
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.n_vocab:
            raise self.wrong(
                f"sent {str(value)[:40]!r} for a token, expected an id of the vocabulary of {self.n_vocab}"
            )
        return value

    def likeliest(self, value: Any) -> Row:
        """The row of a token of which no more is known than that it is the likeliest."""
        token = self.token(value)
        return Row(np.array([token], dtype=np.int32), np.zeros(1, dtype=np.float32), token)

    def row(self, pairs: Iterable[tuple[Any, Any]], k: int, sampled: Any = None) -> Row:
        """A row of ``k`` tokens, or of more, of which the likeliest are kept.

        Raises:
            RemoteError: too few of them, one of them twice or unknown, or what is no log-probability.

        """
        seen: dict[int, float] = {}
        for given, value in pairs:
            token = self.token(given)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise self.wrong(
                    f"sent {str(value)[:40]!r} for the log-probability of token {token}, expected a number"
                )
            if value > 1e-3:
                raise self.wrong(
                    f"sent {value:g} for the log-probability of token {token}, expected a number <= 0"
                    " (vLLM: --logprobs-mode raw_logprobs)"
                )
            if seen.setdefault(token, value) != value:
                raise self.wrong(f"sent two log-probabilities of token {token}")
        needed = min(k, self.n_vocab)
        if len(seen) < needed:
            raise self.wrong(f"sent {len(seen)} log-probabilities of a position, expected {needed}")
        best = sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:needed]
        tokens = np.array([token for token, _ in best], dtype=np.int32)
        # Probabilities of 0 come as -inf, or as the lowest float.
        with np.errstate(over="ignore"):
            logprobs = np.minimum(np.array([value for _, value in best], dtype=np.float64), 0.0)
            lowest = np.finfo(np.float32).min
            row = np.where(logprobs < lowest, -np.inf, logprobs).astype(np.float32)
        total = float(np.exp(row.astype(np.float64)).sum())
        if total > 1.001:
            raise self.wrong(f"sent probabilities of a position that sum to {total:.3g}")
        return Row(tokens, row, None if sampled is None else self.token(sampled))


def field_of(value: Any, *path: str | int) -> Any:
    """What stands in a JSON value under these keys and places; None where there is no such thing."""
    for key in path:
        if isinstance(key, str):
            value = value.get(key) if isinstance(value, dict) else None
        else:
            value = value[key] if isinstance(value, list) and -len(value) <= key < len(value) else None
    return value

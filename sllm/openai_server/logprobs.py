"""The log-probabilities of tokens and of those that were likelier, of a model in this process.

They are those of the unfiltered softmax at temperature 1, whatever the sampling parameters. The rows are
computed from the text a second time, many at once, since a text is written without rows crossing into Python
(:meth:`sllm.Context.verify`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.vocab import Vocab

__all__ = ["TokenLogprob", "token_logprobs"]

_MOST_ROWS = 32
"""Rows of one pass: each has a number for every token of the vocabulary."""

_LEAST = -9999.0
"""What stands for the logarithm of 0, which JSON cannot hold; as with OpenAI."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was.

    Attributes:
        token: its id.
        piece: its bytes; a control token's are its name.
        logprob: under the unfiltered softmax; None: of a text's first token, before which there is nothing.
        top: the likeliest tokens of the position, the likeliest first, without those of their own.

    """

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; those of a part of a character as U+FFFD."""
        return self.piece.decode("utf-8", "replace")

    def as_chat(self) -> dict[str, Any]:
        """As an entry of ``logprobs.content``."""
        found: dict[str, Any] = {"token": self.text, "logprob": self.logprob, "bytes": list(self.piece)}
        found["top_logprobs"] = [
            {"token": one.text, "logprob": one.logprob, "bytes": list(one.piece)} for one in self.top
        ]
        return found


def token_logprobs(context: Context, tokens: Sequence[int], start: int, n_top: int) -> list[TokenLogprob]:
    """How likely ``tokens[start:]`` are, of a text whose positions before ``start - 1`` are in memory (of
    which no more is used where ``start`` is 0).

    Afterwards the memory holds the text but for its last token, as it does while the text is written.

    Args:
        context: with the text in sequence 0.
        tokens: ids, n >= 1.
        start: the first one to look at, 0 <= start < n.
        n_top: how many of the likeliest tokens to name.

    """
    vocab = context.model.vocab
    found = []
    if start == 0:
        found.append(TokenLogprob(tokens[0], _piece(vocab, tokens[0]), None))
        start = 1
    n_rows = max(1, min(_MOST_ROWS, context.n_outputs_max))
    for at in range(start, len(tokens), n_rows):
        end = min(at + n_rows, len(tokens))
        rows = context.decode(tokens[at - 1 : end - 1], pos=at - 1, logits="all")
        assert rows is not None
        for token, row in zip(tokens[at:end], rows, strict=True):
            found.append(_of_row(vocab, row, token, n_top))
    return found


def _of_row(vocab: Vocab, row: npt.NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    logits = row.astype(np.float64)
    highest = logits.max()
    logprobs = np.maximum(logits - (highest + np.log(np.exp(logits - highest).sum())), _LEAST)
    likeliest: npt.NDArray[np.intp] = np.empty(0, np.intp)
    if n_top:
        best = np.argpartition(-logprobs, min(n_top, len(logprobs)) - 1)[:n_top]
        likeliest = best[np.argsort(-logprobs[best], kind="stable")]
    top = tuple(TokenLogprob(one, _piece(vocab, one), float(logprobs[one])) for one in likeliest.tolist())
    return TokenLogprob(token, _piece(vocab, token), float(logprobs[token]), top)


def _piece(vocab: Vocab, token: int) -> bytes:
    return vocab.piece(token) or vocab.decode([token], special=True).encode()

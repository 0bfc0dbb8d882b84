"""The token that a row of an engine selects, if the row is enough to know it (``csrc/certify.cpp``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import check, ffi, lib
from sllm.errors import UndecidedError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.engine.model import Model
    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.rows import Row

__all__ = ["RowSelector", "check_sampling", "first_k", "is_plain_greedy", "is_plain_noise", "undecided"]

_GREEDY_K = 4
"""Log-probabilities asked for where the likeliest token is selected: room for others that are as likely."""

_MORE = 4
"""Beyond top_k: where several are as likely as the last of it, their ids say which of them count."""

_SOME = 64
"""Log-probabilities asked for at first where no number of them is sure to do."""


class RowSelector:
    """Selects tokens from rows, for one text.

    Args:
        model: with the vocabulary.
        sampling: the parameters.
        start: where the generated text begins, which is what a grammar sees.

    Attributes:
        n_decided: positions at which all that could be selected was known.
        n_certified: positions at which it was not, and no other token could have been selected.
        lead: by how much the last token's score was above any other's, where the engine's own noise selects.
        n_tied: positions at which the last token that counts was as likely as the last of more that are
            known, so that the engine has said which of equal ones count.

    """

    def __init__(self, model: Model, sampling: SamplingParams, start: int) -> None:
        self._compiled = model.compiled(sampling)
        self._n_vocab = model.vocab.n_tokens
        self._start = start
        self._last = 1 if sampling.temperature == 0 else sampling.top_k  # that counts; 0: any number
        self._token = ffi.new("int32_t *")
        self._how = ffi.new("int32_t *")
        self._lead = ffi.new("double *")
        self.lead = 0.0
        self.n_decided = 0
        self.n_certified = 0
        self.n_tied = 0

    def select(self, row: Row, text: Sequence[int]) -> int | None:
        """The token after ``text`` (prompt and all since); None: the row does not decide it.

        Raises:
            ValueError: the text does not match the grammar.
            InferenceError: nothing can be selected.

        """
        history = np.asarray(text, dtype=np.int32)
        check(
            lib.sllm_select_known(
                self._compiled,
                ffi.from_buffer("int32_t[]", row.tokens),
                ffi.from_buffer("float[]", row.logprobs),
                len(row.tokens),
                len(history),
                ffi.from_buffer("int32_t[]", history),
                self._start,
                self._token,
                self._how,
                self._lead,
            )
        )
        self.lead = self._lead[0]
        if self._how[0] == lib.SLLM_UNDECIDED:
            return None
        if self._how[0] == lib.SLLM_DECIDED:
            self.n_decided += 1
            n = len(row.tokens)
            if 0 < self._last < n < self._n_vocab and row.logprobs[self._last - 1] == row.logprobs[-1]:
                self.n_tied += 1
        else:
            self.n_certified += 1
        return int(self._token[0])


def is_plain_greedy(sampling: SamplingParams) -> bool:
    """Whether the likeliest token is selected, whatever came before: what an engine does by itself at
    temperature 0.
    """
    return sampling.temperature == 0 and not _changes(sampling)


def is_plain_noise(sampling: SamplingParams) -> bool:
    """Whether sllm's noise selects from what top-k, top-p and min-p leave of an engine's own logits."""
    repeats = sampling.penalty_last_n > 0 and sampling.penalty_repeat != 1
    return sampling.noise == "sllm" and sampling.temperature > 0 and not _changes(sampling) and not repeats


def _changes(sampling: SamplingParams) -> list[str]:
    """The parameters that change which tokens are the likeliest."""
    penalties = sampling.penalty_last_n > 0
    return [
        name
        for name, used in (
            ("logit_bias", bool(sampling.logit_bias)),
            ("penalty_freq", penalties and sampling.penalty_freq != 0),
            ("penalty_present", penalties and sampling.penalty_present != 0),
            ("a grammar", sampling.has_grammar),
        )
        if used
    ]


def first_k(sampling: SamplingParams, most: int) -> int:
    """How many log-probabilities of a position to ask for at first, ``most`` at most."""
    if is_plain_greedy(sampling):
        return min(_GREEDY_K, most)
    if sampling.temperature > 0 and 1 <= sampling.top_k <= most:
        return min(sampling.top_k + _MORE, most)
    return min(_SOME, most)


def check_sampling(sampling: SamplingParams, most: int, n_vocab: int, where: str, option: str) -> None:
    """Reject what ``most`` log-probabilities of a position cannot decide.

    Raises:
        UndecidedError: a selection among all tokens.
        UnsupportedModelError: a penalty that depends on logits.

    """
    if sampling.penalty_last_n > 0 and sampling.penalty_repeat != 1:
        raise UnsupportedModelError(
            f"penalty_repeat is {sampling.penalty_repeat:g} and divides logits, of which {where} gives"
            " log-probabilities alone; use penalty_freq or penalty_present"
        )
    unfiltered = sampling.top_p >= 1 and sampling.min_p == 0
    if sampling.temperature > 0 and not 1 <= sampling.top_k <= most < n_vocab and unfiltered:
        if most >= n_vocab:
            return
        raise undecided(sampling, most, where, option)


def undecided(sampling: SamplingParams, most: int, where: str, option: str) -> UndecidedError:
    """The error where ``most`` log-probabilities of a position are not enough."""
    named = _changes(sampling)
    if sampling.temperature > 0 and not 1 <= sampling.top_k <= most:
        named = [f"top_k={sampling.top_k}", *named]
    return UndecidedError(
        f"{where} gives {most} log-probabilities of a position, and with {' and '.join(named) or 'these'}"
        f" more can be needed to know the token: use top_k 1 to {most} without what changes logits, or let it"
        f" give more ({option})"
    )

"""Selection from the likeliest tokens of a row: what it says is what the whole row says, or nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import PLAIN, examples, filter_logits, log_softmax, select

from sllm.engine._ffi import check, ffi, lib
from sllm.engine.sampling import SamplingParams
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    import sllm

UNDECIDED, DECIDED, CERTIFIED = lib.SLLM_UNDECIDED, lib.SLLM_DECIDED, lib.SLLM_CERTIFIED


def likeliest(logprobs: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int32]:
    """The k likeliest tokens, equal ones in the order of their ids."""
    return np.lexsort((np.arange(len(logprobs)), -logprobs))[:k].astype(np.int32)


def select_known(
    model: sllm.Model,
    params: SamplingParams,
    tokens: npt.ArrayLike,
    logprobs: npt.ArrayLike,
    history: Sequence[int] = (),
    start: int = 0,
) -> tuple[int, int]:
    """``sllm_select_known``: the token, and how certain it is."""
    ids = np.ascontiguousarray(tokens, dtype=np.int32)
    values = np.ascontiguousarray(logprobs, dtype=np.float32)
    past = np.array(history, dtype=np.int32)
    token, how = ffi.new("int32_t *"), ffi.new("int32_t *")
    check(
        lib.sllm_select_known(
            model.compiled(params),
            ffi.from_buffer("int32_t[]", ids),
            ffi.from_buffer("float[]", values),
            len(ids),
            len(past),
            ffi.from_buffer("int32_t[]", past),
            start,
            token,
            how,
            ffi.NULL,
        )
    )
    return int(token[0]), int(how[0])


def row_of(rng: np.random.Generator, n_vocab: int, scale: float, *, ties: bool) -> npt.NDArray[np.float32]:
    """Log-probabilities as an engine computes them, in float32; with ties, of logits in bfloat16."""
    logits = (rng.normal(size=n_vocab) * scale).astype(np.float32)
    if ties:
        logits = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return log_softmax(logits).astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "scale": draw(st.sampled_from([0.5, 2.0, 4.0, 8.0])),
        "ties": draw(st.booleans()),
        "k": draw(st.sampled_from([1, 2, 5, 20, 100, 1000, 5000])),
        "n_seen": draw(st.sampled_from([0, 0, 3, 30])),
        "params": SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5])),
            top_k=draw(st.sampled_from([0, 1, 5, 20, 40, 2000])),
            top_p=draw(st.sampled_from([1.0, 0.95, 0.7, 0.2])),
            min_p=draw(st.sampled_from([0.0, 0.05, 0.5])),
            penalty_freq=draw(st.sampled_from([0.0, 0.0, 0.5, -0.5])),
            penalty_present=draw(st.sampled_from([0.0, 0.0, 1.0])),
            logit_bias=draw(
                st.sampled_from([{}, {}, {7: 2.0, 8: -math.inf, 9: -3.0}, {100: 9.0}, {5: -math.inf}])
            ),
            seed=draw(st.integers(0, 2**64 - 1)),
        ),
    }


@examples(400)
@given(case=cases())
def test_what_is_decided_is_what_the_whole_row_selects(draft_model: sllm.Model, case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    n_vocab = draft_model.vocab.n_tokens
    row = row_of(rng, n_vocab, case["scale"], ties=case["ties"])
    history = likeliest(row, 200)[rng.integers(200, size=case["n_seen"])].tolist()
    params, k = case["params"], min(case["k"], n_vocab)
    tokens = rng.permutation(likeliest(row, k))
    token, how = select_known(draft_model, params, tokens, row[tokens], history)
    whole, _ = select(draft_model, params, row, len(history), history, with_prob=False)
    clear = params.temperature == 0 or filter_logits(row, params, history).clear_cut
    if how == UNDECIDED:
        assert token == -1
        assert k < n_vocab
    elif clear:
        assert token == whole
    changed = params.logit_bias or (history and (params.penalty_freq or params.penalty_present))
    if not changed and (params.temperature == 0 or 0 < params.top_k <= k or k == n_vocab):
        assert how == DECIDED


def test_the_share_that_is_certified_grows_with_k(draft_model: sllm.Model) -> None:
    """Without any filter, a token is certain where no other can reach it with the noise that it has."""
    rng = np.random.default_rng(1)
    shares = []
    rows = [row_of(rng, draft_model.vocab.n_tokens, 5.0, ties=False) for _ in range(60)]
    for k in (5, 20, 100, 500):
        said = [
            select_known(draft_model, replace(PLAIN, seed=i), likeliest(row, k), row[likeliest(row, k)])[1]
            for i, row in enumerate(rows)
        ]
        assert set(said) <= {UNDECIDED, CERTIFIED}
        shares.append(said.count(CERTIFIED) / len(said))
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[-1]


GRAMMAR = 'root ::= "Once" [a-z ]*'


@examples(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 10, 200, 100_000]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_grammar_is_asked_about_the_others(
    draft_model: sllm.Model, seed: int, k: int, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    row = row_of(rng, draft_model.vocab.n_tokens, 3.0, ties=False)
    params = replace(PLAIN, temperature=temperature, grammar=GRAMMAR, seed=seed)
    tokens = likeliest(row, k)
    token, how = select_known(draft_model, params, tokens, row[tokens])
    assert how == DECIDED or len(tokens) < len(row)
    if how != UNDECIDED:
        assert token == select(draft_model, params, row, 0, with_prob=False)[0]


@pytest.mark.parametrize(
    ("tokens", "logprobs", "what"),
    [
        ([1, 1], [-1.0, -1.0], "named twice"),
        ([1, 1 << 30], [-1.0, -2.0], "a token of the vocabulary"),
        ([-1, 2], [-1.0, -2.0], "a token of the vocabulary"),
        ([1, 2], [-1.0, math.nan], "a number <= 0"),
        ([1, 2], [-1.0, 3.0], "a number <= 0"),
        ([1, 2], [-0.1, -0.1], "sum to 1.8"),
        ([], [], "0 likeliest tokens"),
    ],
)
def test_what_is_no_row_is_refused(
    draft_model: sllm.Model, tokens: list[int], logprobs: list[float], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        select_known(draft_model, PLAIN, tokens, logprobs)


def test_a_penalty_that_divides_logits_is_refused(draft_model: sllm.Model) -> None:
    with pytest.raises(UnsupportedModelError, match="penalty_repeat divides logits"):
        select_known(draft_model, replace(PLAIN, penalty_repeat=1.1), [1], [-0.5])

"""SamplingParams: what is refused, how it compares, what compiling it for a model refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import GREEDY, PLAIN, make_prompt, select

from sllm.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from sllm.engine.model import Model

NAN, INF = math.nan, math.inf


def test_defaults_are_llama_cpp_s() -> None:
    params = SamplingParams()

    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert (params.penalty_last_n, params.penalty_repeat) == (64, 1.0)
    assert (params.penalty_freq, params.penalty_present) == (0.0, 0.0)
    assert params.grammar is None
    assert params.seed == 0


def test_it_is_frozen_and_hashable_and_survives_a_pickle() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={3: 1.0}, grammar='root ::= "a"', seed=2**64 - 1)

    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(dataclasses.replace(params)) == hash(params)
    assert dataclasses.replace(params, seed=0) != params


@given(st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=6), st.randoms())
def test_logit_bias_is_the_same_however_it_is_given(bias: dict[int, float], random: Any) -> None:
    pairs = list(bias.items())
    random.shuffle(pairs)
    forms = [SamplingParams(logit_bias=b) for b in (bias, dict(pairs), pairs, tuple(pairs), iter(pairs))]

    assert len(set(forms)) == 1
    assert forms[0].logit_bias == tuple(sorted(bias.items()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, NAN, INF, -INF, 1e7, 10**400)],
        *[("top_k", v) for v in (-1, 2**31)],
        *[("top_p", v) for v in (0, -0.5, 1.0001, NAN, INF)],
        *[("min_p", v) for v in (-0.001, 1.1, NAN)],
        *[("penalty_last_n", v) for v in (-1, 2**20 + 1)],
        *[("penalty_repeat", v) for v in (0, -1, NAN, INF)],
        *[("penalty_freq", v) for v in (NAN, INF, -INF, 1e7)],
        *[("penalty_present", v) for v in (NAN, INF, -1e7)],
        *[("seed", v) for v in (-1, 2**64)],
        *[("grammar", v) for v in ("", "  \n", "root ::= \0")],
        *[("logit_bias", v) for v in ({1: NAN}, {1: INF})],
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 1.0),
        ("top_k", False),
        ("seed", 1.5),
        ("seed", None),
        ("penalty_last_n", "64"),
        ("grammar", b"root ::= 'a'"),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {"-1": 1.0}),
        ("logit_bias", {"²": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {300: None}),
        ("logit_bias", {300: True}),
        ("logit_bias", {300: "2"}),
        ("logit_bias", {300: "-inf"}),
        ("logit_bias", [[300, [1]]]),
        ("logit_bias", [(1, 2, 3)]),
        ("logit_bias", [5]),
        ("logit_bias", ["12"]),
        ("logit_bias", "300"),
        ("logit_bias", 7),
        ("temperature", np.bool_(True)),
        ("temperature", 1j),
        ("temperature", np.array([1.0])),
        ("top_k", np.bool_(True)),
        ("seed", True),
        ("top_k", np.float32(3)),
        ("penalty_repeat", "1.1"),
        ("penalty_freq", [0.5]),
        ("grammar", 3),
    ],
)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


def test_logit_biases_may_name_tokens_by_numpy_integers(draft_model: Model) -> None:
    params = SamplingParams(logit_bias={np.int32(7): 1.0, 3: np.float32(2.0)})  # type: ignore[arg-type]

    assert params == SamplingParams(logit_bias={3: 2.0, 7: 1.0})
    assert draft_model.compiled(params) is draft_model.compiled(SamplingParams(logit_bias={3: 2.0, 7: 1.0}))


def test_logit_biases_in_the_forms_that_others_take() -> None:
    """OpenAI's API has JSON objects, llama.cpp's server lists of pairs, in which false rules a token out."""
    forms: list[Any] = [
        {"300": -100, "7": 2},
        [[300, -100], [7, 2]],
        [["300", -100.0], (7, np.float32(2))],
        {300: np.int64(-100), np.int32(7): 2},
        json.loads('[[300, -100], ["7", 2.0]]'),
    ]
    for form in forms:
        assert SamplingParams(logit_bias=form).logit_bias == ((7, 2.0), (300, -100.0))
    bans: list[Any] = [[[300, False]], {"300": False}, {300: -INF}, {300: np.float32(-INF)}]
    for ban in bans:
        assert SamplingParams(logit_bias=ban).logit_bias == ((300, -INF),)
    nothing: Any = None
    assert SamplingParams(logit_bias=nothing) == SamplingParams(logit_bias={}) == SamplingParams()


def test_a_ban_is_a_ban(draft_model: Model) -> None:
    row = np.zeros(draft_model.vocab.n_tokens, dtype=np.float32)
    row[300] = 50
    bans: list[Any] = [[[300, False]], {"300": False}]
    for ban in bans:
        params = dataclasses.replace(GREEDY, logit_bias=ban)
        assert select(draft_model, params, row, 0)[0] != 300


def test_numpy_scalars_are_numbers() -> None:
    kinds: list[Any] = [np.float64, np.float32, np.float16]
    for kind in kinds:
        given = {"temperature": 0.5, "top_p": 0.25, "min_p": 0, "penalty_repeat": 1, "penalty_freq": 2}
        params = SamplingParams(**{name: kind(value) for name, value in given.items()})
        assert params == SamplingParams(**given)  # type: ignore[arg-type]
        assert type(params.temperature) is float
    whole: dict[str, Any] = {
        "top_k": np.int64(5),
        "seed": np.uint64(2**64 - 1),
        "penalty_last_n": np.int32(3),
        "temperature": np.int8(1),
    }
    params = SamplingParams(**whole)
    assert params == SamplingParams(top_k=5, seed=2**64 - 1, penalty_last_n=3, temperature=1)
    assert [type(value) for value in (params.top_k, params.seed)] == [int, int]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={10**9: 1.0}), "logit_bias names token 1000000000"),
        (SamplingParams(logit_bias={2560: 1.0}), "the vocabulary has 2560 tokens"),
        (SamplingParams(grammar="root ::= ["), "grammar does not parse"),
        (SamplingParams(grammar='other ::= "a"'), "grammar"),
        (SamplingParams(grammar="root ::= undefined"), "grammar"),
        (SamplingParams(grammar="root ::= root"), "grammar"),  # left recursion
    ],
)
def test_what_does_not_go_with_a_model_is_refused_when_compiled(
    draft_model: Model, params: SamplingParams, message: str
) -> None:
    assert draft_model.vocab.n_tokens == 2560
    with pytest.raises(ValueError, match=message):
        draft_model.compiled(params)


def test_compiling_is_done_once(draft_model: Model) -> None:
    params = SamplingParams(seed=987654321)
    compiled = draft_model.compiled(params)

    assert draft_model.compiled(dataclasses.replace(params)) is compiled
    for seed in range(200):  # more than are kept
        draft_model.compiled(SamplingParams(seed=seed))
    row = np.zeros(draft_model.vocab.n_tokens, dtype=np.float32)
    assert select(draft_model, params, row, 3) == select(draft_model, params, row, 3)
    for wrong in ("greedy", None, 0.7, {"temperature": 1}, [params]):
        with pytest.raises(TypeError, match="expected SamplingParams"):
            draft_model.compiled(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e6),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-300),  # no float32 but 0
        SamplingParams(temperature=1),
        SamplingParams(top_k=2**31 - 1),
        SamplingParams(top_p=1e-30),
        SamplingParams(min_p=1),
        SamplingParams(min_p=1e-300),
        SamplingParams(penalty_last_n=2**20, penalty_repeat=1e6),
        SamplingParams(penalty_repeat=1e-30),
        SamplingParams(penalty_freq=-1e6, penalty_present=1e6),
        SamplingParams(logit_bias={1: 1e6, 2: -1e6}),
        SamplingParams(logit_bias=dict.fromkeys(range(2000), -INF)),
        SamplingParams(seed=2**64 - 1),
    ],
)
def test_extreme_values_select_some_token(draft_model: Model, params: SamplingParams) -> None:
    row = np.random.default_rng(4).normal(0, 5, draft_model.vocab.n_tokens)
    history = make_prompt(draft_model, 100, seed=4)

    token, prob = select(draft_model, params, row, len(history), history)

    assert 0 <= token < draft_model.vocab.n_tokens
    assert select(draft_model, params, row, len(history), history)[0] == token
    assert not prob > 1 + 1e-6


def test_a_tiny_temperature_is_nearly_greedy(draft_model: Model) -> None:
    row = np.random.default_rng(5).normal(0, 5, draft_model.vocab.n_tokens)

    wanted = select(draft_model, GREEDY, row, 0)[0]
    for temperature in (1e-4, 1e-30, 1e-300):
        assert select(draft_model, dataclasses.replace(PLAIN, temperature=temperature), row, 0)[0] == wanted


def test_a_grammar_with_a_trailing_newline_or_comment_compiles(draft_model: Model) -> None:
    for grammar in ('root ::= "a"\n', '# first\nroot ::= "a" # second\n', 'root ::= x\nx ::= "a"'):
        assert draft_model.compiled(SamplingParams(grammar=grammar))

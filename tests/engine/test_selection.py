"""The selection: its distribution, its exact value, its noise, its grammars."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracles import (
    EXACT,
    GGUF,
    GREEDY,
    PLAIN,
    chi_square_p,
    choose,
    examples,
    filter_logits,
    gumbel,
    kolmogorov_smirnov_p,
    log_softmax,
    make_prompt,
    one_by_one,
    select,
)

from sllm import embedded
from sllm.engine._ffi import lib
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from sllm.engine.context import Context

# A correct selection fails one such test in a million; seeds are fixed, so it either does or does not.
P_VALUE = 1e-6

# ---- the distribution --------------------------------------------------------------------------------------

HISTORY = [
    7,
    7,
    7,
    11,
    12,
    13,
    13,
    900,
]  # repeated without end, so that every position looks back on the same tokens

SETTINGS = {
    "temperature 1": PLAIN,
    "temperature 0.7": replace(PLAIN, temperature=0.7),
    "temperature 1.3": replace(PLAIN, temperature=1.3),
    "top_k": replace(PLAIN, top_k=20),
    "top_k of one": replace(PLAIN, top_k=2),
    "long top_k": replace(PLAIN, top_k=1500),
    "top_p": replace(PLAIN, top_p=0.6),
    "min_p": replace(PLAIN, min_p=0.1),
    "repetition": replace(PLAIN, penalty_last_n=8, penalty_repeat=1.5),
    "frequency": replace(PLAIN, penalty_last_n=8, penalty_freq=0.6),
    "presence": replace(PLAIN, penalty_last_n=3, penalty_present=2.0),
    "logit bias": replace(PLAIN, logit_bias={7: -math.inf, 8: 3.0, 13: -1.0, 2000: 6.0}),
    "defaults": SamplingParams(),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=60,
        top_p=0.9,
        min_p=0.01,
        penalty_last_n=8,
        penalty_repeat=1.3,
        penalty_freq=0.2,
        penalty_present=-0.3,
        logit_bias={13: 2.0, 900: 4.0, 5: -math.inf},
    ),
}


def make_row(n_vocab: int) -> npt.NDArray[np.float32]:
    """Logits with a head that holds most of the probability, the tokens of HISTORY in it, and a long tail."""
    rng = np.random.default_rng(1)
    row = rng.normal(-3, 1.5, n_vocab).astype(np.float32)
    row[rng.choice(n_vocab, 40, replace=False)] += 7
    row[[5, 7, 11, 13, 900]] = [5.5, 6, 5, 6.5, 4]
    return row


def draw(model: Model, params: SamplingParams, row: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """How often each token is selected, over many positions under many seeds."""
    counts = np.zeros(len(row), dtype=np.int64)
    past = np.tile(np.array(HISTORY, dtype=np.int32), 60)
    for seed in range(1, 17):
        seeded = replace(params, seed=seed * 0x9E3779B97F4A7C15 % 2**64)
        for pos in range(8, 408):
            # what lies behind is HISTORY at every position
            counts[select(model, seeded, row, pos, past[-pos:])[0]] += 1
    return counts


@pytest.fixture(scope="module")
def row(draft_model: Model) -> npt.NDArray[np.float32]:
    return make_row(draft_model.vocab.n_tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_selected_tokens_follow_the_filtered_softmax(
    draft_model: Model, row: npt.NDArray[np.float32], name: str
) -> None:
    params = SETTINGS[name]
    left = filter_logits(row, params, HISTORY)
    assert left.clear_cut
    probs = np.zeros(len(row))
    probs[left.ids] = left.probs(params.temperature)

    counts = draw(draft_model, params, row)

    assert chi_square_p(counts, probs) > P_VALUE


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature 1", replace(PLAIN, temperature=0.9)),
        ("top_k", replace(PLAIN, top_k=19)),
        ("top_p", replace(PLAIN, top_p=0.65)),
        ("min_p", replace(PLAIN, min_p=0.2)),
        ("presence", replace(PLAIN, penalty_last_n=1, penalty_present=2.0)),
        ("logit bias", replace(PLAIN, logit_bias={7: -math.inf, 8: 3.0, 13: -0.2, 2000: 6.0})),
    ],
)
def test_the_test_of_the_distribution_sees_a_wrong_one(
    draft_model: Model, row: npt.NDArray[np.float32], name: str, wrong: SamplingParams
) -> None:
    left = filter_logits(row, wrong, HISTORY)
    probs = np.zeros(len(row))
    probs[left.ids] = left.probs(wrong.temperature)

    assert chi_square_p(draw(draft_model, SETTINGS[name], row), probs) < P_VALUE


def test_verified_tokens_follow_the_softmax_of_decoded_logits(
    draft_model: Model, make_context: Callable[..., Context]
) -> None:
    n_seqs = 16
    context = make_context(draft_model, n_ctx=64 * n_seqs, n_seq_max=n_seqs)
    prompt = make_prompt(draft_model, 6, seed=3)
    logits = context.decode(prompt, logits="last")
    assert logits is not None
    probs = np.exp(log_softmax(logits))
    for other in range(1, n_seqs):
        context.memory.copy(0, other)
    counts = np.zeros(len(probs), dtype=np.int64)
    for first_seed in range(0, 6000, n_seqs):
        verdict = context.verify(
            range(n_seqs),
            [prompt[-1:]] * n_seqs,
            sampling=[replace(PLAIN, seed=first_seed + i) for i in range(n_seqs)],
            pos=[5] * n_seqs,
        )
        np.add.at(counts, verdict.tokens[:, 0], 1)

    assert chi_square_p(counts, probs) > P_VALUE


# ---- the exact value ---------------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn, n_vocab: int) -> npt.NDArray[np.float32]:
    """Logits of many shapes: flat, peaked, tiny, large, sorted, with -inf, NaN or ties among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="row seed"))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 3.0, 30.0, 1e4]))
    offset = draw(st.sampled_from([0.0, -20.0, 500.0]))
    row = (rng.normal(offset, scale, n_vocab)).astype(np.float32)
    kind = draw(st.sampled_from(["all", "-inf", "nan", "few", "ties", "flat", "rising", "falling"]))
    if kind == "-inf":
        row[rng.random(n_vocab) < 0.7] = -np.inf
    elif kind == "nan":
        row[rng.random(n_vocab) < 0.3] = np.nan
    elif kind == "few":
        row[rng.permutation(n_vocab)[draw(st.integers(1, 5)) :]] = -np.inf
    elif kind == "ties":
        row = np.round(row, 0)
    elif kind == "flat":
        row[:] = np.float32(offset)
    elif kind == "rising":
        row.sort()
    elif kind == "falling":
        row[::-1].sort()
    return row


filterless = st.builds(
    lambda t, seed: replace(PLAIN, temperature=t, seed=seed),
    st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.3, 100.0]),
    st.integers(0, 2**64 - 1),
)


@examples(150)
@given(data=st.data(), params=filterless, pos=st.integers(0, 3000))
def test_choice_without_filters_is_gumbel_max_exactly(
    draft_model: Model, data: st.DataObject, params: SamplingParams, pos: int
) -> None:
    row = data.draw(rows(draft_model.vocab.n_tokens))

    token, prob = select(draft_model, params, row, pos)

    wanted, wanted_prob, _ = choose(row, params, pos)
    assert token == wanted
    assert prob == pytest.approx(wanted_prob, rel=1e-4, abs=1e-6)


@examples(150)
@given(
    data=st.data(),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.3]),
    top_k=st.sampled_from([0, 1, 2, 40, 1024, 1025, 2559, 2560, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    penalties=st.sampled_from([{}, {"penalty_repeat": 1.4}, {"penalty_freq": 0.5, "penalty_present": -0.5}]),
    last_n=st.sampled_from([1, 5, 64]),
    bias=st.dictionaries(st.integers(0, 2559), st.floats(-5, 5) | st.just(-math.inf), max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
def test_choice_with_filters_is_gumbel_max_over_the_survivors(
    draft_model: Model,
    data: st.DataObject,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: dict[str, float],
    last_n: int,
    bias: dict[int, float],
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        penalty_last_n=last_n,
        logit_bias=bias,
        seed=seed,
        **penalties,  # type: ignore[arg-type]
    )
    row = data.draw(rows(draft_model.vocab.n_tokens))
    history = data.draw(st.lists(st.integers(0, 2559), max_size=70))
    assume(len(filter_logits(row, params, history).ids))

    token, prob = select(draft_model, params, row, len(history), history)

    wanted, wanted_prob, clear_cut = choose(row, params, len(history), history)
    assume(clear_cut)
    assert token == wanted
    assert prob == pytest.approx(wanted_prob, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module", params=[100, 1024, 5000, 151_936])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Without a whole stripe of logits (csrc/rows.hpp), of one alone, with a rest, and of a common size."""
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(request.param)
    file.tensors.clear()
    path = file.write(tmp_path_factory.mktemp("vocabularies") / f"{request.param}.gguf")
    with Model(path, vocab_only=True) as model:
        yield model


@st.composite
def settings_of(draw: st.DrawFn, n_vocab: int) -> SamplingParams:
    """What leaves few candidates in any vocabulary, with and without changes to the logits."""
    changes = draw(
        st.sampled_from([{}, {}, {"penalty_repeat": 1.4}, {"penalty_freq": 0.5, "penalty_present": -0.5}])
    )
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8, 1.3])),
        top_k=draw(st.sampled_from([1, 2, 40, 1024, 1025])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5])),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        penalty_last_n=draw(st.sampled_from([1, 64])),
        logit_bias=draw(
            st.just({})
            | st.dictionaries(st.integers(0, n_vocab - 1), st.floats(-5, 5) | st.just(-math.inf), max_size=4)
        ),
        seed=draw(st.integers(0, 2**64 - 1)),
        **changes,  # type: ignore[arg-type]
    )


@examples(60)
@given(data=st.data(), with_prob=st.booleans())
def test_shortcuts_select_what_the_whole_vocabulary_does(
    vocabulary: Model, data: st.DataObject, with_prob: bool
) -> None:
    """The oracle sorts everything; ties go to the smallest id, at the boundary of the top k as well."""
    n_vocab = vocabulary.vocab.n_tokens
    params = data.draw(settings_of(n_vocab))
    row = data.draw(rows(n_vocab))
    likely = np.argsort(-np.nan_to_num(row, nan=-np.inf), kind="stable")[:100].tolist()
    history = data.draw(st.lists(st.sampled_from(likely) | st.integers(0, n_vocab - 1), max_size=70))
    assume(len(filter_logits(row, params, history).ids))

    token, prob = select(vocabulary, params, row, len(history), history, with_prob=with_prob)

    wanted, wanted_prob, clear_cut = choose(row, params, len(history), history)
    assume(clear_cut)
    assert token == wanted
    if with_prob:
        assert prob == pytest.approx(wanted_prob, rel=1e-3, abs=1e-6)


@examples(40)
@given(data=st.data(), min_p=st.sampled_from([1e-6, 0.05, 1.0]), penalty=st.sampled_from([1.0, 1.4]))
def test_min_p_alone_keeps_the_likely(
    draft_model: Model, data: st.DataObject, min_p: float, penalty: float
) -> None:
    row = data.draw(rows(draft_model.vocab.n_tokens))
    params = replace(PLAIN, min_p=min_p, penalty_repeat=penalty, seed=data.draw(st.integers(0, 2**64 - 1)))
    assume(len(filter_logits(row, params, HISTORY).ids))

    token, prob = select(draft_model, params, row, len(HISTORY), HISTORY)

    wanted, wanted_prob, clear_cut = choose(row, params, len(HISTORY), HISTORY)
    assume(clear_cut)
    assert token == wanted
    assert prob == pytest.approx(wanted_prob, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        GREEDY,
        SamplingParams(),
        replace(PLAIN, min_p=0.05),
        replace(GREEDY, penalty_repeat=1.4),
        replace(PLAIN, penalty_repeat=1.4),
    ],
    ids=["plain", "greedy", "defaults", "min_p", "greedy, repetition", "repetition"],
)
@examples(10)
@given(data=st.data(), pos=st.integers(0, 3000))
def test_every_instruction_set_selects_the_same(
    vocabulary: Model, params: SamplingParams, data: st.DataObject, pos: int
) -> None:
    """To the last bit of the probability: a text must not depend on the machine that computes it."""
    row = data.draw(rows(vocabulary.vocab.n_tokens))
    seeded = replace(params, seed=data.draw(st.integers(0, 2**64 - 1)))
    assume(np.isfinite(row).any())
    n = lib.sllm_row_codes()
    try:
        choices = []
        for code in range(n):
            lib.sllm_use_row_code(code)
            choices.append(select(vocabulary, seeded, row, pos))
    finally:
        lib.sllm_use_row_code(n - 1)

    assert len(set(choices)) == 1


def test_every_instruction_set_scores_the_same(
    draft_model: Model, make_context: Callable[..., Context]
) -> None:
    tokens = make_prompt(draft_model, 20, seed=5)
    n = lib.sllm_row_codes()
    try:
        scores = []
        for code in range(n):
            lib.sllm_use_row_code(code)
            scores.append(make_context(draft_model, n_ctx=64).token_logprobs(tokens)[0].tobytes())
    finally:
        lib.sllm_use_row_code(n - 1)

    assert len(set(scores)) == 1


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, logit_bias={0: 0.0}), replace(GREEDY, top_k=3)])
def test_ties_at_temperature_zero_go_to_the_smallest_id(draft_model: Model, params: SamplingParams) -> None:
    row = np.zeros(draft_model.vocab.n_tokens, dtype=np.float32)
    row[[2559, 1000, 37, 1001]] = 4

    assert select(draft_model, params, row, 0)[0] == 37


@pytest.mark.parametrize(
    ("temperature", "prob"), [(0.0, np.exp(2) / (np.exp(2) + 2559)), (1.0, np.exp(2) / (np.exp(2) + 2559))]
)
def test_probability_is_that_among_all_candidates(
    draft_model: Model, temperature: float, prob: float
) -> None:
    assert draft_model.vocab.n_tokens == 2560
    row = np.zeros(2560, dtype=np.float32)
    row[100] = 2
    params = replace(PLAIN, temperature=temperature)
    seed = next(s for s in range(10**4) if select(draft_model, replace(params, seed=s), row, 0)[0] == 100)

    assert select(draft_model, replace(params, seed=seed), row, 0)[1] == pytest.approx(prob, rel=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        GREEDY,
        replace(PLAIN, top_k=5),
        replace(PLAIN, top_p=0.5),
        replace(PLAIN, min_p=0.5),
        replace(PLAIN, penalty_repeat=2.0),
        replace(PLAIN, logit_bias={1: 1.0}),
        replace(GREEDY, logit_bias={1: 1.0}),
        replace(PLAIN, grammar='root ::= "a"'),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_row_with_no_candidate_is_an_error(
    draft_model: Model, params: SamplingParams, value: float
) -> None:
    row = np.full(draft_model.vocab.n_tokens, value, dtype=np.float32)

    with pytest.raises(InferenceError, match="no token can be selected"):
        select(draft_model, params, row, 0)


def test_ruling_out_every_token_is_an_error(draft_model: Model) -> None:
    row = np.full(draft_model.vocab.n_tokens, -np.inf, dtype=np.float32)
    row[5] = 1

    with pytest.raises(InferenceError):
        select(draft_model, replace(PLAIN, logit_bias={5: -math.inf}), row, 0)


@pytest.mark.parametrize(
    "params", [PLAIN, GREEDY, replace(PLAIN, top_k=5), replace(PLAIN, logit_bias={0: 1.0})]
)
def test_nan_never_wins(draft_model: Model, params: SamplingParams) -> None:
    row = np.full(draft_model.vocab.n_tokens, np.nan, dtype=np.float32)
    row[1234] = -50

    assert select(draft_model, params, row, 7) == (1234, 1.0)


def test_a_row_of_another_length_is_refused(draft_model: Model) -> None:
    with pytest.raises(ValueError, match="the row has 10 logits"):
        select(draft_model, PLAIN, np.zeros(10), 0)


# ---- the noise ---------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def unmix(y: int) -> int:
    """The inverse of mix()."""

    def unshift(value: int, by: int) -> int:
        x = value
        for _ in range(64 // by):
            x = value ^ x >> by
        return x

    y = unshift(y, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    y = unshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return unshift(y, 30)


GOLDEN = 0x9E3779B97F4A7C15


def hash_of(seed: int, pos: int, token: int) -> int:
    key = mix((mix((seed + GOLDEN) % 2**64) + GOLDEN * (pos + 1)) % 2**64)
    return mix((key + GOLDEN * (token + 1)) % 2**64)


def seed_for(wanted: int, pos: int, token: int) -> int:
    """The seed under which hash_of(seed, pos, token) is ``wanted``."""
    key = (unmix(wanted) - GOLDEN * (token + 1)) % 2**64
    return (unmix((unmix(key) - GOLDEN * (pos + 1)) % 2**64) - GOLDEN) % 2**64


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
@example(0, 0, 0)
@example(2**64 - 1, 2**31 - 1, 2**31 - 1)
def test_noise_is_the_published_hash(seed: int, pos: int, token: int) -> None:
    """Machines that share a text must agree on it, and so must versions."""
    u = ((hash_of(seed, pos, token) >> 12) + 0.5) / 2**52

    assert lib.sllm_gumbel(seed, pos, token) == pytest.approx(-math.log(-math.log(u)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("wanted", [2**64 - 1, 2**64 - 2**11, 0, 1])
def test_noise_is_finite_at_the_ends_of_the_hash(draft_model: Model, wanted: int) -> None:
    seed = seed_for(wanted, 5, 7)
    assert hash_of(seed, 5, 7) == wanted

    assert -4 < lib.sllm_gumbel(seed, 5, 7) < 38


def draws(n_seeds: int, n_pos: int, n_tokens: int) -> npt.NDArray[np.float64]:
    """Noise over a box of seeds, positions and tokens that lie next to each other, as those in use do."""
    return np.array(
        [
            [gumbel(seed, pos, range(n_tokens)) for pos in range(100, 100 + n_pos)]
            for seed in range(1000, 1000 + n_seeds)
        ]
    )


@pytest.mark.parametrize("shape", [(1, 1, 50_000), (1, 50_000, 1), (50_000, 1, 1), (40, 40, 40)])
def test_noise_has_the_gumbel_distribution(shape: tuple[int, int, int]) -> None:
    sample = draws(*shape).ravel()
    n = len(sample)

    # five standard errors each; the kurtosis of the distribution is 5.4
    assert abs(sample.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(sample.var() - math.pi**2 / 6) < 5 * math.pi**2 / 6 * math.sqrt(4.4 / n)
    assert kolmogorov_smirnov_p(sample, lambda x: np.exp(-np.exp(-x))) > P_VALUE
    assert kolmogorov_smirnov_p(sample, lambda x: np.exp(-np.exp(-x / 1.05))) < P_VALUE  # the test can fail


def test_noise_is_independent_across_seeds_positions_and_tokens() -> None:
    box = draws(48, 48, 48)
    u = np.exp(-np.exp(-box))  # uniform
    assert len(np.unique(u)) == u.size
    assert (
        chi_square_p(np.bincount((u.ravel() * 64).astype(int), minlength=64), np.full(64, 1 / 64)) > P_VALUE
    )

    a = u[:-2, :-2, :-2]
    neighbours = [
        (i, j, k) for i in range(3) for j in range(3) for k in range(3) if (i, j, k) != (0, 0, 0)
    ] + [(0, 1, -1), (1, -1, 0), (1, 0, -1)]
    for shift in neighbours:
        b = np.roll(u, [-s for s in shift], (0, 1, 2))[:-2, :-2, :-2]
        joint = np.bincount((np.floor(a * 8) * 8 + np.floor(b * 8)).astype(int).ravel(), minlength=64)
        assert chi_square_p(joint, np.full(64, 1 / 64)) > P_VALUE, shift
    swapped = np.bincount(
        (np.floor(u * 8) * 8 + np.floor(u.swapaxes(1, 2) * 8)).astype(int).ravel(), minlength=64
    )
    off_diagonal = u.size - 48 * 48
    expected = (np.full(64, off_diagonal / 64) + np.where(np.arange(64) % 9 == 0, 48 * 48 / 8, 0)) / u.size
    # pairs come twice, (a, b) and (b, a): half of them are independent
    assert chi_square_p(swapped / 2, expected) > P_VALUE


def test_noise_belongs_to_the_position_and_not_to_the_order_of_draws(draft_model: Model) -> None:
    rng = np.random.default_rng(8)
    table = rng.normal(size=(20, draft_model.vocab.n_tokens)).astype(np.float32)
    forwards = [select(draft_model, PLAIN, table[i], i) for i in range(20)]
    backwards = [select(draft_model, PLAIN, table[i], i) for i in reversed(range(20))]

    assert forwards == backwards[::-1]


# ---- grammars ----------------------------------------------------------------------------------------------

GRAMMARS = {
    "words": ('root ::= "yes" | "no" | "maybe later"', r"yes|no|maybe later"),
    "digits": ("root ::= [0-9]{1,6}", r"[0-9]{1,6}"),
    "json": (
        (
            'root ::= "{" pair ("," pair)* "}"\npair ::= "\\"" [a-z]{1,5} "\\":" value\n'
            'value ::= [0-9]{1,3} | "true" | "[]"'
        ),
        r'\{"[a-z]{1,5}":([0-9]{1,3}|true|\[\])(,"[a-z]{1,5}":([0-9]{1,3}|true|\[\]))*\}',
    ),
    "chinese": ('root ::= ("你" | "好" | "吗"){2,4} "。"', r"[你好吗]{2,4}。"),
}

_SETTINGS = {
    "greedy": GREEDY,
    "sampled": PLAIN,
    "shortlist": replace(PLAIN, temperature=1.3, top_k=40),
    "one": replace(PLAIN, top_k=1),
    "nucleus": replace(PLAIN, temperature=0.7, top_p=0.8, min_p=0.01),
    "defaults": SamplingParams(),
    "penalties": replace(SamplingParams(), penalty_repeat=1.3, penalty_present=0.5),
}


@pytest.mark.parametrize("how", _SETTINGS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_text_matches_its_grammar(draft_model: Model, name: str, how: str) -> None:
    grammar, pattern = GRAMMARS[name]
    vocab = draft_model.vocab
    for seed in range(4):
        rng = np.random.default_rng(seed)
        params = replace(_SETTINGS[how], grammar=grammar, seed=seed)
        text = make_prompt(draft_model, 3, seed=seed).tolist()
        while True:
            row = rng.normal(0, 3, vocab.n_tokens)
            row[[t for t in range(vocab.n_tokens) if vocab.is_eog(t)]] += rng.choice([-20, 20])
            token, _ = select(draft_model, params, row, len(text), text, start=3)
            text.append(token)
            if vocab.is_eog(token):
                break
            if len(text) > 40:  # a list without end
                assert name == "json"
                break
        shown = vocab.decode(text[3:])
        if vocab.is_eog(text[-1]):
            assert re.fullmatch(pattern, shown)


def test_the_end_comes_only_where_the_grammar_allows_it(draft_model: Model) -> None:
    vocab = draft_model.vocab
    grammar = 'root ::= "yes" | "yes!"'
    row = np.zeros(vocab.n_tokens)
    row[[t for t in range(vocab.n_tokens) if vocab.is_eog(t)]] = 100
    for params in (replace(GREEDY, grammar=grammar), replace(PLAIN, top_k=10, grammar=grammar)):
        unfinished = vocab.encode("ye")
        token, _ = select(draft_model, params, row, len(unfinished), unfinished)
        assert not vocab.is_eog(token)
        finished = vocab.encode("yes")
        token, _ = select(draft_model, params, row, len(finished), finished)
        assert vocab.is_eog(token)
        over = vocab.encode("yes!")
        token, prob = select(draft_model, params, -row, len(over), over)
        assert vocab.is_eog(token)
        assert prob <= 1


@pytest.mark.parametrize(
    "grammar", ["root ::= [a-z ]*", "root ::= [0-9]+", 'root ::= "yes" | "no"', "root ::= [^\\n]*"]
)
def test_grammar_on_a_shortlist_is_grammar_on_all_candidates(draft_model: Model, grammar: str) -> None:
    """Few survivors of a short list, many, and none: the same as filtering the whole vocabulary first."""
    n_vocab = draft_model.vocab.n_tokens
    alone = replace(GREEDY, grammar=grammar)

    def allowed(token: int) -> bool:
        only = np.full(n_vocab, -np.inf, dtype=np.float32)
        only[token] = 0
        try:
            return select(draft_model, alone, only, 0)[0] == token
        except InferenceError:
            return False

    legal = {t for t in range(n_vocab) if allowed(t)}
    assert legal
    for top_k in (0, 1, 3, 40, 300, 1024, 1025):
        for seed in range(8):
            row = np.random.default_rng(seed).normal(0, 4, n_vocab)
            params = replace(PLAIN, temperature=1.1, top_k=top_k, grammar=grammar, seed=seed)
            token, prob = select(draft_model, params, row, 0)
            wanted, wanted_prob, _ = choose(row, params, 0, allowed=legal.__contains__)
            assert token == wanted
            assert prob == pytest.approx(wanted_prob, rel=1e-3)


def test_text_before_start_is_no_business_of_the_grammar(draft_model: Model) -> None:
    vocab = draft_model.vocab
    params = replace(PLAIN, grammar='root ::= "yes"')
    row = np.zeros(vocab.n_tokens)
    prompt = vocab.encode("anything at all: ").tolist()
    yes = vocab.encode("yes").tolist()

    token, _ = select(draft_model, params, row, len(prompt), prompt, start=len(prompt))
    assert vocab.piece(token) and b"yes".startswith(vocab.piece(token))
    history = prompt + yes
    token, _ = select(draft_model, params, row, len(history), history, start=len(prompt))
    assert vocab.is_eog(token)
    with pytest.raises(ValueError, match="does not match the grammar"):
        select(draft_model, params, row, len(history), history, start=0)
    with pytest.raises(ValueError, match="ends where the grammar does not allow it"):
        select(draft_model, params, row, len(prompt) + 1, [*prompt, vocab.eos or 0], start=len(prompt))


def test_penalties_look_back_across_the_start_of_the_text(draft_model: Model) -> None:
    """`start` is for grammars alone: a token of the prompt counts as seen."""
    row = np.zeros(draft_model.vocab.n_tokens)
    row[[10, 20]] = [9, 8]
    params = replace(GREEDY, penalty_last_n=4, penalty_present=3.0)

    assert select(draft_model, params, row, 4, [10, 1, 2, 3], start=4)[0] == 20
    assert select(draft_model, params, row, 5, [10, 1, 2, 3, 4], start=4)[0] == 10  # too long ago


@examples(15)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 40]),
    name=st.sampled_from(sorted(GRAMMARS)),
    data=st.data(),
)
def test_a_grammar_goes_on_behind_rejected_drafts(
    draft_model: Model, seed: int, temperature: float, top_k: int, name: str, data: st.DataObject
) -> None:
    """The parser's state follows the committed text, however much of each draft was right."""
    params = replace(PLAIN, temperature=temperature, top_k=top_k, seed=seed, grammar=GRAMMARS[name][0])
    prompt = make_prompt(draft_model, 5, seed=seed)
    wanted = one_by_one(draft_model, prompt, params, 16)
    text: list[int] = prompt.tolist()
    with draft_model.context(n_ctx=256, **EXACT) as context:
        context.decode(prompt[:-1])
        while len(text) < len(prompt) + len(wanted):
            ahead = wanted[len(text) - len(prompt) :]
            right = data.draw(st.integers(0, min(5, len(ahead))))
            wrong = data.draw(st.lists(st.integers(-1, draft_model.vocab.n_tokens), max_size=3))
            pieces: list[Any] = [ahead[:right] + wrong]
            verdict = context.verify([0], text[-1:], pieces, sampling=params)
            n = int(verdict.n_accepted[0])
            text += verdict.tokens[0, : n + 1].tolist()
            assert n >= min(right, len(ahead) - 1)
            assert context.memory.length() == len(text) - 1

    assert text[len(prompt) :][: len(wanted)] == wanted

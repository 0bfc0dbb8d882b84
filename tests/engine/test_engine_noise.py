"""Selection with another engine's noise: against what its own code gave, and against plain versions."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import EXACT, GGUF, GREEDY, PLAIN, chi_square_p, examples, make_prompt, one_by_one, select

import sllm
from sllm import embedded
from sllm.engine._ffi import lib
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from sllm.engine.context import Context

VECTORS = json.loads((Path(__file__).parent / "engine_noise.json").read_text(encoding="utf-8"))
"""Written by ``benchmarks/engines/noise_vectors.py``."""

SIZES = (100, 1024, 5000)
VLLM = replace(PLAIN, noise="vllm")
SGLANG = replace(PLAIN, noise="sglang")
NOISE = {"vllm": lib.SLLM_NOISE_VLLM, "sglang": lib.SLLM_NOISE_SGLANG}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Model]]:
    """Of each size: without a whole stripe of logits (csrc/rows.hpp), of one alone, and with a rest."""
    models = {}
    for size in SIZES:
        file = GGUF(embedded.DRAFT)
        file.resize_vocab(size)
        file.tensors.clear()
        path = file.write(tmp_path_factory.mktemp("vocabularies") / f"{size}.gguf")
        models[size] = Model(path, vocab_only=True)
    yield models
    for model in models.values():
        model.close()


# ---- what the engines' own code gave -----------------------------------------------------------------------


def row_of(number: int, n_vocab: int, kind: str) -> npt.NDArray[np.float32]:
    """The logits of one draw, as ``noise_vectors.py`` makes them."""
    row = (np.random.RandomState(number).standard_normal(n_vocab) * 3).astype(np.float32)
    if kind == "bfloat16":
        row = (row.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return row


@pytest.mark.parametrize(("engine", "kind"), list(itertools.product(NOISE, ("float32", "bfloat16"))))
def test_tokens_are_those_of_the_engine(vocabularies: dict[int, Model], engine: str, kind: str) -> None:
    recorded = VECTORS[f"{engine} {kind}"]
    wrong = []
    for values in recorded["draws"]:
        draw = dict(zip(recorded["names"], values, strict=True))
        row = row_of(draw["row"], draw["n_vocab"], kind)
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        params = SamplingParams(noise=engine, **{name: draw[name] for name in names})
        token, _ = select(vocabularies[draw["n_vocab"]], params, row, draw["pos"])
        if token != draw["token"]:
            wrong.append(draw)
    assert len(recorded["draws"]) >= 100
    assert not wrong


def test_noise_is_that_of_the_engine() -> None:
    for seed, pos, vllm, sglang in VECTORS["noise"]:
        for index in range(len(vllm)):
            found = lib.sllm_engine_gumbel(NOISE["vllm"], seed, pos, index)
            assert found == pytest.approx(vllm[index], rel=2e-6, abs=2e-6)
            found = lib.sllm_engine_gumbel(NOISE["sglang"], seed, pos, index)
            assert found == pytest.approx(sglang[index], rel=1e-12, abs=1e-12)
    assert math.isnan(lib.sllm_engine_gumbel(lib.SLLM_NOISE_SLLM, 1, 1, 1))


# ---- plain versions ----------------------------------------------------------------------------------------


def noise_of(engine: str, seed: int, pos: int, n: int) -> npt.NDArray[np.float64]:
    return np.array([lib.sllm_engine_gumbel(NOISE[engine], seed, pos, i) for i in range(n)])


def scores_of(
    params: SamplingParams, row: npt.NDArray[np.float32], pos: int
) -> tuple[npt.NDArray[np.float64], bool]:
    """The score of every token, -inf for those that the filters drop; and whether none of them was on a
    border, where rounding decides.
    """
    x = row.copy()
    for token, bias in dict(params.logit_bias).items():
        x[token] += np.float32(bias)
    x = x / np.float32(params.temperature)
    order = np.lexsort((np.arange(len(x)), -x))
    probs = np.exp((x - x.max()).astype(np.float64))
    probs /= probs.sum()
    kept = np.ones(len(x), dtype=bool)
    slack = 1e-4
    clear = True
    if params.min_p > 0:
        ratio = probs / probs.max()
        kept &= ratio >= params.min_p
        clear &= bool(np.all(np.abs(ratio - params.min_p) > slack * params.min_p))
    if params.top_k > 0:
        kept[order[params.top_k :]] = False
    if params.top_p < 1:
        whole = probs if params.noise == "sglang" else np.where(kept, probs, 0) / probs[kept].sum()
        before = np.cumsum(whole[order]) - whole[order]
        kept[order[before >= params.top_p]] = False
        clear &= bool(np.all(np.abs(before - params.top_p) > slack))
        ties = np.diff(whole[order][: int(kept.sum()) + 1])
        clear &= params.noise == "sglang" or len(ties) == 0 or ties[-1] != 0
    noise = noise_of(params.noise, params.seed, pos, len(x))
    if params.noise == "sglang":
        # Rounding may swap two neighbours that are not quite equal, and with them their noise.
        sorted_x = x[order].astype(np.float64)
        gaps = sorted_x[:-1] - np.where(np.isfinite(sorted_x[1:]), sorted_x[1:], -1e9)
        close = np.flatnonzero((gaps > 0) & (gaps < 2e-5))
        swapped = np.concatenate([sorted_x[close] + noise[close + 1], sorted_x[close + 1] + noise[close]])
        places = np.flatnonzero(kept[order])
        reached = sorted_x[places] + noise[places]
        winner = places[np.argmax(reached)]
        clear &= bool(np.all(swapped < reached.max())) and winner not in {*close, *(close + 1)}
        by_token = np.empty_like(noise)
        by_token[order] = noise
        noise = by_token
    scores = np.where(kept & (x > -np.inf), x.astype(np.float64) + noise, -np.inf)
    best = np.sort(scores)[-2:]
    return scores, clear and bool(best[-1] - best[0] > 1e-4)


@st.composite
def cases(draw: st.DrawFn, engine: str) -> tuple[SamplingParams, int, int, int, float]:
    params = SamplingParams(
        noise=engine,
        temperature=draw(st.sampled_from([0.01, 0.5, 1.0, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, 2000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3, 1e-6])),
        min_p=0.0 if engine == "sglang" else draw(st.sampled_from([0.0, 0.0, 0.02, 1.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
        logit_bias=draw(
            st.dictionaries(st.integers(0, 99), st.floats(-5, 5) | st.just(-math.inf), max_size=3)
        ),
    )
    size = draw(st.sampled_from(SIZES))
    spread = draw(st.sampled_from([0.1, 3.0, 30.0]))
    return params, draw(st.integers(1, 3000)), size, draw(st.integers(0, 2**32 - 1)), spread


@pytest.mark.parametrize("engine", NOISE)
@examples(120)
@given(data=st.data())
def test_selection_is_the_largest_score_of_what_the_filters_leave(
    vocabularies: dict[int, Model], engine: str, data: st.DataObject
) -> None:
    params, pos, size, number, spread = data.draw(cases(engine))
    row = (np.random.default_rng(number).normal(0, spread, size)).astype(np.float32)
    scores, clear = scores_of(params, row, pos)
    assume(clear)
    token, prob = select(vocabularies[size], params, row, pos)
    assert token == int(np.argmax(scores))
    assert 0 < prob <= 1


@pytest.mark.parametrize(
    "params",
    [
        replace(VLLM, temperature=0.7),
        replace(VLLM, top_k=8),
        replace(VLLM, top_p=0.7),
        replace(VLLM, min_p=0.02),
        replace(SGLANG, temperature=1.3),
        replace(SGLANG, top_k=8),
        replace(SGLANG, top_p=0.7),
    ],
    ids=lambda params: f"{params.noise} {params.temperature} {params.top_k} {params.top_p} {params.min_p}",
)
def test_selected_tokens_follow_the_filtered_softmax(
    vocabularies: dict[int, Model], params: SamplingParams
) -> None:
    row = (np.random.default_rng(3).normal(0, 2, 100)).astype(np.float32)
    scores, clear = scores_of(params, row, 1)
    assert clear
    kept = scores > -np.inf
    weights = np.where(kept, np.exp(row.astype(np.float64) / params.temperature), 0)
    counts = np.zeros(100, dtype=np.int64)
    for seed, pos in itertools.product(range(40), range(1, 101)):
        counts[select(vocabularies[100], replace(params, seed=seed * 0x9E3779B97F), row, pos)[0]] += 1
    assert chi_square_p(counts, weights / weights.sum()) > 1e-6


@pytest.mark.parametrize("engine", NOISE)
@examples(25)
@given(data=st.data())
def test_every_instruction_set_selects_the_same(
    vocabularies: dict[int, Model], engine: str, data: st.DataObject
) -> None:
    params, pos, size, number, spread = data.draw(cases(engine))
    row = (np.random.default_rng(number).normal(0, spread, size)).astype(np.float32)
    n = lib.sllm_row_codes()
    try:
        choices = set()
        for code in range(n):
            lib.sllm_use_row_code(code)
            choices.add(select(vocabularies[size], params, row, pos))
    finally:
        lib.sllm_use_row_code(n - 1)
    assert len(choices) == 1


@pytest.mark.parametrize("engine", NOISE)
def test_equal_scores_and_strange_rows(vocabularies: dict[int, Model], engine: str) -> None:
    model, params = vocabularies[1024], replace(PLAIN, noise=engine, seed=5)
    row = np.full(1024, -np.inf, dtype=np.float32)
    row[[7, 900]] = [1, -100]
    row[3] = np.nan
    assert select(model, params, row, 4)[0] == 7
    assert select(model, replace(params, top_k=1), np.zeros(1024, dtype=np.float32), 4)[0] == 0
    for value in (-np.inf, np.nan, np.inf):
        with pytest.raises(sllm.InferenceError, match="no token can be selected"):
            select(model, params, np.full(1024, value, dtype=np.float32), 4)


def test_temperatures_that_are_almost_zero(vocabularies: dict[int, Model]) -> None:
    """vLLM has none below 0.01, and SGLang takes the likeliest token."""
    rng = np.random.default_rng(9)
    greedy_too = 0
    for seed in range(200):
        row = rng.normal(0, 0.01, 100).astype(np.float32)
        for top_k in (0, 20):
            vllm = replace(VLLM, seed=seed, top_k=top_k)
            found = select(vocabularies[100], replace(vllm, temperature=1e-4), row, 9)[0]
            assert found == select(vocabularies[100], replace(vllm, temperature=0.01), row, 9)[0]
            greedy_too += found == int(np.argmax(row))
        sglang = replace(SGLANG, seed=seed, temperature=1e-7)
        assert select(vocabularies[100], sglang, row, 9)[0] == int(np.argmax(row))
    assert greedy_too < 400


# ---- in a text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        replace(VLLM, seed=3, temperature=0.7),
        replace(VLLM, seed=4, top_k=40, top_p=0.95, min_p=0.02, temperature=0.8),
        replace(SGLANG, seed=3, temperature=0.7),
        replace(SGLANG, seed=4, top_k=40, top_p=0.95, temperature=0.8),
    ],
)
def test_a_draft_couples_and_changes_no_token(
    target_model: Model, draft_model: Model, sampling: SamplingParams
) -> None:
    prompt = draft_model.vocab.encode("Once upon a time, there was a")
    wanted = one_by_one(target_model, prompt, sampling, 60)
    with sllm.LocalTarget(target_model, n_ctx=128, **EXACT) as target:
        shares = {}
        for name, draft in (("coupled", draft_model), ("none", None)):
            stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=60)
            tokens = [token for run in stream for token in run.tokens]
            assert tokens == wanted
            shares[name] = stream.stats.n_accepted
    assert shares["coupled"] > 0
    assert shares["none"] == 0


@pytest.mark.parametrize("params", [VLLM, replace(VLLM, top_k=30), SGLANG, replace(SGLANG, top_k=30)])
def test_runners_up_are_those_of_the_same_noise(
    draft_model: Model, make_context: Callable[..., Context], params: SamplingParams
) -> None:
    """A tree's branches are the tokens with the next scores."""
    context = make_context(draft_model, n_ctx=64)
    n_clear = 0
    for seed in range(8):
        sampling = replace(params, seed=seed)
        prompt = make_prompt(draft_model, 6, seed=seed)
        row = context.decode(prompt, logits="last", pos=0)
        assert row is not None
        scores, clear = scores_of(sampling, np.asarray(row).reshape(-1), len(prompt))
        tree = context.draft([0], [prompt[-1:]], pos=len(prompt) - 1, sampling=sampling, n_max=1, n_nodes=6)
        n = int(tree.lengths[0])
        assert tree.parents is not None
        roots = [int(t) for t, p in zip(tree.tokens[0, :n], tree.parents[0, :n], strict=True) if p == -1]
        if clear:
            n_clear += 1
            assert len(roots) > 1
            assert set(roots) <= set(np.argsort(-scores)[: 2 * len(roots)].tolist())
            assert roots[0] == int(np.argmax(scores))
    assert n_clear


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        (ValueError, {"noise": "llama"}, "'vllm', 'sglang'"),
        (TypeError, {"noise": None}, "'vllm', 'sglang'"),
        (ValueError, {"noise": "vllm", "seed": 2**63}, r"2\*\*63"),
        (ValueError, {"noise": "vllm", "penalty_repeat": 1.1}, "no penalties"),
        (ValueError, {"noise": "vllm", "grammar": 'root ::= "a"'}, "no grammar"),
        (ValueError, {"noise": "vllm", "json_schema": "{}"}, "no grammar"),
        (ValueError, {"noise": "sglang"}, "min_p=0"),
    ],
)
def test_what_an_engine_has_in_another_way_is_refused(
    kind: type[Exception], settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        SamplingParams(**settings)


def test_what_makes_no_difference_is_taken() -> None:
    SamplingParams(noise="vllm", penalty_repeat=1.1, penalty_last_n=0)
    SamplingParams(noise="sglang", temperature=0)
    assert replace(GREEDY, noise="vllm").noise == "vllm"

"""The one list of parameters: what is taken, what is refused, and that type checkers are told the same."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sllm
from sllm import embedded
from sllm.engine.params import (
    ContextOptions,
    ContextParams,
    LoadOptions,
    LoadParams,
    changes,
    context_length,
    parse,
    parse_both,
)


@pytest.mark.parametrize(("params", "options"), [(ContextParams, ContextOptions), (LoadParams, LoadOptions)])
def test_type_checkers_are_told_the_same(params: type, options: type) -> None:
    assert {field.name: field.type for field in fields(params)} == {
        name: kind.__forward_arg__ for name, kind in options.__annotations__.items()
    }
    assert not getattr(options, "__required_keys__", None)


@given(
    st.fixed_dictionaries(
        {}, optional={"n_ctx": st.integers(1, 9999), "type_k": st.text(), "n_gpu_layers": st.integers()}
    )
)
def test_options_go_where_they_belong(options: dict[str, object]) -> None:
    loading, computing = parse_both(options, LoadParams(), ContextParams())
    usual = {**asdict(LoadParams()), **asdict(ContextParams())}
    changed = {name: value for name, value in options.items() if value != usual[name]}
    assert {**changes(loading), **changes(computing)} == changed
    again = parse_both({**changes(loading), **changes(computing)}, LoadParams(), ContextParams())
    assert again == (loading, computing)


def test_options_count_more_than_params() -> None:
    params = ContextParams(n_ctx=64, type_k="q8_0")
    assert parse({"n_ctx": 128}, params) == replace(params, n_ctx=128)
    assert params.n_ctx == 64


@pytest.mark.parametrize(
    "call",
    [
        lambda model: sllm.Model(embedded.DRAFT, n_layers=1),  # type: ignore[call-arg]
        lambda model: model.context(n_ctxt=5),
        lambda model: sllm.LocalTarget(model, n_seq_max=2),
        lambda model: sllm.LocalTarget(embedded.DRAFT, vocab_only=True),
        lambda model: sllm.LayerRange(embedded.DRAFT, 0, 1, kv_unified=True),
        lambda model: sllm.LayerRange(embedded.DRAFT, 0, 1, use_mmap=False),
    ],
)
def test_what_nobody_takes_is_refused_by_name(draft_model: sllm.Model, call: object) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument '\w+'; there are .*n_"):
        call(draft_model)  # type: ignore[operator]


def test_a_context_with_params_is_one_with_options(draft_model: sllm.Model) -> None:
    params = ContextParams(n_ctx=768, n_seq_max=3, n_threads=1)
    with draft_model.context(params) as one, draft_model.context(params, n_ctx=1536, n_threads=2) as other:
        assert (one.n_ctx, one.n_seq_max, one.n_threads) == (768, 3, 1)
        assert (other.n_ctx, other.n_seq_max, other.n_threads) == (1536, 3, 2)


@pytest.mark.parametrize(("trained", "length"), [(0, 4096), (1024, 1024), (131072, 4096), (4096, 4096)])
def test_the_length_that_nobody_asked_for(trained: int, length: int) -> None:
    assert context_length(trained) == length

"""Drafters: what they propose for a text, however that text came about."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GGUF, GREEDY, PLAIN, examples, make_prompt, one_by_one, without_end

import sllm
from sllm import embedded
from sllm.draft.drafters import CallableDrafter, Drafter, ModelDrafter, NGramDrafter, drafts_trees
from sllm.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sllm.draft.growth import Shape
    from sllm.draft.tree import DraftedTree
    from sllm.engine.model import Model

PARAMS = SamplingParams(temperature=0.9, top_k=30, seed=7)

# ---- n-grams -----------------------------------------------------------------------------------------------


def look_up(text: list[int], chain: list[int], n_max: int, sizes: range) -> list[int]:
    """What followed the longest run of last tokens the last time."""
    last = [*text, *chain]
    for size in sizes:
        if size <= len(last):
            for end in range(len(text) - 1, size - 1, -1):
                if text[end - size : end] == last[-size:]:
                    return text[end : end + n_max]
    return []


@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6),
    chains=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=6, max_size=6),
    n_max=st.integers(0, 10),
    longest=st.integers(1, 5),
    data=st.data(),
)
def test_ngrams_find_the_last_longest_repetition(
    parts: list[list[int]], chains: list[list[int]], n_max: int, longest: int, data: st.DataObject
) -> None:
    shortest = data.draw(st.integers(1, longest))
    drafter = NGramDrafter(n_max=longest, n_min=shortest)
    drafter.open(parts[0], PARAMS)
    text: list[int] = []
    for part, chain in zip(parts, chains, strict=False):
        text += part
        for hint in ([], chain):
            drafted = drafter.draft(text, hint, n_max, 0.0)
            assert drafted == look_up(text, hint, n_max, range(longest, shortest - 1, -1))
    drafter.open([1], PARAMS)
    assert drafter.draft([1, 2, 3], [], 5, 0.0) == []  # nothing is left of the text before


def test_ngrams_need_sensible_sizes() -> None:
    for n_min, n_max in [(0, 4), (5, 4), (-1, -1)]:
        with pytest.raises(ValueError, match="n_min"):
            NGramDrafter(n_min=n_min, n_max=n_max)


def test_documents_are_looked_in_where_the_text_has_nothing_better() -> None:
    documents: list[Any] = [[10, 11, 12, 13, 14, 15], np.array([20, 21, 22, 23], dtype=np.int32)]
    drafter = NGramDrafter(documents=documents)
    drafter.open([1, 2], PARAMS)
    assert drafter.draft([1, 2, 10, 11], [], 3, 0.0) == [12, 13, 14]
    assert drafter.draft([1, 2, 10, 11], [12, 13], 9, 0.0)[:2] == [14, 15]
    assert drafter.draft([1, 2, 20, 21], [], 2, 0.0) == [22, 23]
    assert drafter.draft([1, 2, 3], [], 3, 0.0) == []
    text = [10, 11, 50, 51, 10, 11]  # the text itself comes first, where as many tokens agree
    drafter.open(text, PARAMS)
    assert drafter.draft(text, [], 2, 0.0) == [50, 51]
    text = [11, 12, 50, 51, 10, 11, 12]  # and three that agree are more than two
    drafter.open(text, PARAMS)
    assert drafter.draft(text, [], 2, 0.0) == [13, 14]


@pytest.mark.parametrize("document", ["text", [1.5], [[1]], 7])
def test_documents_are_token_ids(document: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="a document"):
        NGramDrafter(documents=[document])


# ---- callables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ((1, 2), [1, 2]),
        (np.array([4, 5], dtype=np.int32), [4, 5]),
        ([np.int64(4)], [4]),
        ([], []),
        (None, []),
        (range(100), [0, 1, 2, 3]),
        ([-1, 2**31 - 1], [-1, 2**31 - 1]),
    ],
)
def test_callables_may_return_token_ids_in_any_form(returned: Any, wanted: list[int]) -> None:
    seen = []

    def propose(tokens: Any, n_max: int) -> Any:
        seen.append((tokens.dtype, tokens.tolist(), n_max))
        return returned

    drafter = CallableDrafter(propose)
    drafter.open([1, 2], PARAMS)
    assert drafter.draft([1, 2, 3], [4], 4, 0.0) == wanted
    assert seen == [(np.int32, [1, 2, 3, 4], 4)]
    drafter.cancel()
    drafter.close()


@pytest.mark.parametrize(
    "returned", ["abc", [1.5], ["a"], 5, np.array([1.0]), np.array([[1]], dtype=np.int32)]
)
def test_callables_must_return_token_ids(returned: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="the draft"):
        CallableDrafter(lambda _tokens, _n_max: returned).draft([1], [], 4, 0.0)


# ---- models ------------------------------------------------------------------------------------------------


@pytest.fixture
def drafter(draft_model: Model) -> Iterator[ModelDrafter]:
    with ModelDrafter(draft_model, n_ctx=256, **EXACT) as made:
        yield made


def drafted_afresh(
    model: Model, text: list[int], start: int, n_max: int, p_min: float, params: SamplingParams
) -> list[int]:
    with model.context(n_ctx=256, **EXACT) as context:
        draft = context.draft(
            [0], [np.array(text, dtype=np.int32)], n_max=n_max, p_min=p_min, sampling=params, start=[start]
        )
    tokens: list[int] = draft.tokens[0, : draft.lengths[0]].tolist()
    return tokens


@examples(25)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_model_drafts_what_it_would_for_the_text_alone(
    draft_model: Model, data: st.DataObject, seed: int
) -> None:
    """Accepted, half accepted and rejected chains, chains that were never drafted, new texts with and without
    a shared beginning: what the context still holds of earlier calls never shows.
    """
    n_vocab = draft_model.vocab.n_tokens
    ids = st.integers(4, n_vocab - 1)
    with ModelDrafter(draft_model, n_ctx=256, **EXACT) as drafter:
        assert isinstance(drafter, Drafter)
        prompt: list[int] = make_prompt(draft_model, 6, seed=seed).tolist()
        for _ in range(2):
            params = replace(
                PARAMS, seed=data.draw(st.integers(0, 9)), temperature=data.draw(st.sampled_from([0.0, 1.0]))
            )
            drafter.open(prompt, params)
            text, chain = list(prompt), list[int]()
            for _ in range(4):
                n_max = data.draw(st.integers(1, 6))
                p_min = data.draw(st.sampled_from([0.0, 0.05]))
                drafted = drafter.draft(text, chain, n_max, p_min)
                assert drafted == drafted_afresh(draft_model, text + chain, len(prompt), n_max, p_min, params)
                chain += drafted
                keep = data.draw(st.integers(0, len(chain)))
                match data.draw(st.sampled_from(["wait", "accept", "reject", "replace"])):
                    case "accept":
                        text, chain = text + chain[:keep], chain[keep:]
                    case "reject":
                        text, chain = [*text, *chain[:keep], data.draw(ids)], []
                    case "replace":
                        chain = chain[:keep] + data.draw(st.lists(ids, max_size=3))
                text, chain = text[:200], chain[:20]
            prompt = (text if data.draw(st.booleans()) else prompt[:3]) + data.draw(
                st.lists(ids, min_size=1, max_size=4)
            )


def test_a_model_tells_how_much_it_had_to_catch_up(draft_model: Model, drafter: ModelDrafter) -> None:
    params = without_end(draft_model, GREEDY)
    prompt = make_prompt(draft_model, 30, seed=1).tolist()
    drafter.open(prompt, params)
    first = drafter.draft(prompt, [], 4, 0.0)
    assert drafter.n_caught_up == 29
    drafter.draft(prompt + first[:2], [], 4, 0.0)
    assert drafter.n_caught_up <= 2
    drafter.draft([*prompt, *first[:2], 9, 10, 11], [], 4, 0.0)
    assert drafter.n_caught_up == 2  # and the last token


def test_a_model_that_is_full_drafts_nothing(draft_model: Model, drafter: ModelDrafter) -> None:
    size = drafter.context.n_ctx_seq
    params = without_end(draft_model, GREEDY)
    text = make_prompt(draft_model, size - 2, seed=3).tolist()
    own = one_by_one(draft_model, text, params, 3)
    drafter.open(text, params)

    assert drafter.draft(text, [], 16, 0.0) == own
    assert drafter.draft(text + own, [], 16, 0.0) == []  # does not fit
    assert drafter.draft(text, own, 16, 0.0) == []
    assert drafter.draft(text + own[:1], [], 16, 0.0) == own[1:]
    drafter.open(text[:50], params)
    assert drafter.draft(text[:50], [], 4, 0.0) == one_by_one(draft_model, text[:50], params, 4)


def test_a_model_drafts_nothing_behind_tokens_it_does_not_know(tmp_path: Path, draft_model: Model) -> None:
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(2000)
    with (
        sllm.Model(file.write(tmp_path / "short.gguf")) as short,
        ModelDrafter(short, n_ctx=256, **EXACT) as drafter,
    ):
        params = without_end(short, GREEDY)
        drafter.open([5, 6, 7], params)
        first = drafter.draft([5, 6, 7], [], 4, 0.0)
        assert len(first) == 4
        assert drafter.draft([5, 6, 7, 2000], [], 4, 0.0) == []
        assert drafter.draft([5, 6, 7], [2559], 4, 0.0) == []
        assert drafter.draft([5, 6, 7], [], 4, 0.0) == first
        drafter.open([5, 6, 7, 2000], params)
        assert drafter.draft([5, 6, 7, 2000], [], 4, 0.0) == []


def test_a_model_goes_on_after_a_cancel(draft_model: Model) -> None:
    params = replace(without_end(draft_model, PLAIN), seed=3)
    text = make_prompt(draft_model, 900, seed=3).tolist()
    own = one_by_one(draft_model, text, params, 60, n_ctx=1024)
    done = threading.Event()
    with ModelDrafter(draft_model, n_ctx=1024, **EXACT) as drafter:
        drafter.open(text, params)

        def cancel() -> None:
            while not done.wait(0.002):
                drafter.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        shortest = len(own)
        try:
            for _ in range(60):
                drafted = drafter.draft(text, [], len(own), 0.0)
                assert drafted == own[: len(drafted)]
                shortest = min(shortest, len(drafted))
        finally:
            done.set()
            thread.join()
        assert shortest < len(own)
        assert drafter.draft(text, own[:3], 10, 0.0) == own[3:13]
    drafter.cancel()  # closed: nothing to cancel
    drafter.close()
    assert "closed" in repr(drafter)


def test_a_model_knows_what_a_cancelled_draft_has_cost_it(draft_model: Model) -> None:
    """One chain, then another one that is cancelled half way, then the first again."""
    params = replace(without_end(draft_model, PLAIN), seed=3)
    text = make_prompt(draft_model, 10, seed=3).tolist()
    chain, other = (make_prompt(draft_model, 900, seed=s).tolist() for s in (4, 5))
    own = one_by_one(draft_model, text + chain, params, 4, n_ctx=1024)
    n_cancelled = 0
    with ModelDrafter(draft_model, n_ctx=1024, **EXACT) as drafter:
        drafter.open(text, params)
        for attempt in range(300):
            assert drafter.draft(text, chain, 4, 0.0) == own
            timer = threading.Timer(0.001 * (attempt % 20), drafter.cancel)
            timer.start()
            n_cancelled += drafter.draft(text, other, 4, 0.0) == []
            timer.join()
            if n_cancelled == 3:
                break
        assert n_cancelled == 3
        assert drafter.draft(text, chain, 4, 0.0) == own


def test_logit_biases_for_tokens_that_the_draft_does_not_have(tmp_path: Path, target_model: Model) -> None:
    """The target has them, so the parameters are right, and a draft with a shorter vocabulary must cope."""
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(2500)
    params = replace(without_end(target_model, GREEDY), logit_bias={2550: -5.0, 0: -math.inf, 2: -math.inf})
    with (
        sllm.Model(file.write(tmp_path / "short.gguf")) as short,
        sllm.LocalTarget(target_model, n_ctx=256, **EXACT) as target,
        ModelDrafter(short, n_ctx=256, **EXACT) as drafter,
    ):
        plain = sllm.generate(target, [5, 6, 7], sampling=params, max_tokens=8)
        wanted = [t for run in plain for t in run.tokens]
        runs = list(sllm.generate(target, [5, 6, 7], draft=drafter, sampling=params, max_tokens=8))
        assert [t for run in runs for t in run.tokens] == wanted


class _Checked(ModelDrafter):
    """Lets some tokens go no further, as a check of what leaves the machine does."""

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        return [token for token in super().draft(text, chain, n_max, p_min) if token % 2 == 0]


class _CheckedTrees(_Checked):
    def draft_tree(self, text: Sequence[int], shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        return super().draft_tree(text, shape, known)


def test_what_replaces_draft_alone_is_not_gone_past_by_trees(draft_model: sllm.Model) -> None:
    with (
        ModelDrafter(draft_model) as plain,
        _Checked(draft_model) as checked,
        _CheckedTrees(draft_model) as both,
    ):
        assert drafts_trees(plain)
        assert not drafts_trees(checked)
        assert drafts_trees(both)
    assert not drafts_trees(NGramDrafter())
    assert not drafts_trees(None)

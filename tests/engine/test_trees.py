"""Trees of drafted tokens: whatever they hold, the text is the target's own, and memory holds what is
committed.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    EXACT,
    GREEDY,
    PLAIN,
    examples,
    fresh_logits,
    log_softmax,
    make_prompt,
    one_by_one,
    tokens_of,
    without_end,
)
from trees import main_path, n_right, random_tree, shuffled

import sllm
from sllm.engine.context import MOST_DRAFTED
from sllm.engine.sampling import SamplingParams
from sllm.engine.tree import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sllm.engine.context import Context
    from sllm.engine.model import Model

    MakeContext = Callable[..., Context]

GRAMMAR = 'root ::= "{" [a-z ]{0,12} ("," [0-9]{1,4}){0,5} "}"'

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.just(0.0),
    penalty_last_n=st.sampled_from([0, 8, 64]),
    penalty_repeat=st.sampled_from([1.0, 1.2]),
    grammar=st.sampled_from([None, None, None, GRAMMAR]),
    seed=st.integers(0, 2**64 - 1),
)


def as_rows(*rows: Any) -> Any:
    """Token arrays for several sequences, as draft and verify take them."""
    return [np.array(row, dtype=np.int32) for row in rows]


# ---- the text ----------------------------------------------------------------------------------------------


@examples(30)
@given(data=st.data())
def test_text_with_trees_is_the_text_without(target_model: Model, data: st.DataObject) -> None:
    """Ragged batches of sequences with trees, chains and nothing, in ubatches smaller than a tree, in one
    cache for all or one for each."""
    n_seqs = data.draw(st.integers(1, 4), label="sequences")
    n_tokens = 12
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    params = [data.draw(samplings) for _ in range(n_seqs)]
    prompts = [make_prompt(target_model, int(rng.integers(1, 10)), seed=i) for i in range(n_seqs)]
    wanted = [one_by_one(target_model, p, s, n_tokens) for p, s in zip(prompts, params, strict=True)]
    texts: list[list[int]] = [p.tolist() for p in prompts]
    options: dict[str, Any] = {
        "n_ubatch": data.draw(st.sampled_from([1, 5, 64])),
        "kv_unified": data.draw(st.booleans()) and n_seqs > 1,
    }
    n_vocab = target_model.vocab.n_tokens
    with target_model.context(n_ctx=n_seqs * 256, n_seq_max=n_seqs, **options, **EXACT) as context:
        while True:
            going = [
                i
                for i in range(n_seqs)
                if len(texts[i]) < len(prompts[i]) + n_tokens and not target_model.vocab.is_eog(texts[i][-1])
            ]
            if not going:
                break
            seqs = [int(i) for i in rng.permutation(going)[: rng.integers(1, len(going) + 1)]]
            trees = []
            for i in seqs:
                ahead = wanted[i][len(texts[i]) - len(prompts[i]) :]
                tree = random_tree(rng, int(rng.integers(0, 25)), ahead, n_vocab)
                if rng.random() < 0.3:
                    tree = (ahead, list(range(-1, len(ahead) - 1)))
                trees.append(shuffled(rng, *tree))
            verdict = context.verify(
                seqs,
                as_rows(*(texts[i][context.memory.length(i) :] for i in seqs)),
                as_rows(*(tokens for tokens, _ in trees)),
                parents=as_rows(*(parents for _, parents in trees)),
                sampling=[params[i] for i in seqs],
                start=[len(prompts[i]) for i in seqs],
            )
            for row, (i, tree) in enumerate(zip(seqs, trees, strict=True)):
                n = int(verdict.n_accepted[row])
                ahead = wanted[i][len(texts[i]) - len(prompts[i]) :]
                assert n >= n_right(*tree, ahead[:-1])
                new = verdict.tokens[row, : n + 1].tolist()
                assert n_right(*tree, new) >= n
                assert (verdict.tokens[row, n + 1 :] == -1).all()
                texts[i] += new
                assert tokens_of(context, i) == texts[i][:-1]
    for text, prompt, own in zip(texts, prompts, wanted, strict=True):
        new = text[len(prompt) :]
        assert new[: len(own)] == own[: len(new)]
        assert len(new) >= len(own)


@examples(15)
@given(data=st.data())
def test_text_with_drafted_trees_is_the_text_without(
    target_model: Model, draft_model: Model, data: st.DataObject
) -> None:
    """And the draft catches up from wherever its memory stands."""
    n_seqs, n_tokens = data.draw(st.integers(1, 3)), 12
    params = [data.draw(samplings) for _ in range(n_seqs)]
    prompts = [make_prompt(target_model, 3 + i, seed=i) for i in range(n_seqs)]
    wanted = [one_by_one(target_model, p, s, n_tokens) for p, s in zip(prompts, params, strict=True)]
    texts: list[list[int]] = [p.tolist() for p in prompts]
    with (
        target_model.context(n_ctx=n_seqs * 256, n_seq_max=n_seqs, n_outputs_max=256, **EXACT) as target,
        draft_model.context(n_ctx=n_seqs * 256, n_seq_max=n_seqs, n_outputs_max=64, **EXACT) as drafter,
    ):
        while True:
            seqs = [
                i
                for i in range(n_seqs)
                if len(texts[i]) < len(prompts[i]) + n_tokens and not target_model.vocab.is_eog(texts[i][-1])
            ]
            if not seqs:
                break
            used = [params[i] for i in seqs]
            starts = [len(prompts[i]) for i in seqs]
            behind = [
                data.draw(st.integers(0, min(drafter.memory.length(i), len(texts[i]) - 1))) for i in seqs
            ]
            draft = drafter.draft(
                seqs,
                as_rows(*(texts[i][b:] for b, i in zip(behind, seqs, strict=True))),
                n_max=data.draw(st.integers(1, 5)),
                n_nodes=data.draw(st.lists(st.integers(0, 40), min_size=len(seqs), max_size=len(seqs))),
                width=data.draw(st.integers(1, 9)),
                p_min=data.draw(st.sampled_from([0.0, 0.05, 0.4])),
                sampling=used,
                pos=behind,
                start=starts,
            )
            for i in seqs:
                assert tokens_of(drafter, i) == texts[i]
            verdict = target.verify(
                seqs,
                as_rows(*(texts[i][target.memory.length(i) :] for i in seqs)),
                draft,
                sampling=used,
                start=starts,
            )
            for row, i in enumerate(seqs):
                texts[i] += verdict.tokens[row, : verdict.n_accepted[row] + 1].tolist()
                assert tokens_of(target, i) == texts[i][:-1]
    for text, prompt, own in zip(texts, prompts, wanted, strict=True):
        new = text[len(prompt) :]
        assert new[: len(own)] == own[: len(new)]


ATTENTION = [
    name
    for name, shape in random_models.EVERY.items()
    if shape.architecture in {one.architecture for one in random_models.SHAPES.values()}
]


def grow(
    model: Model, context: Context, other: Context | None, seed: int, n_tokens: int = 24
) -> tuple[int, int]:
    """Write a text with random trees; returns for how many passes the best path was another than the main
    one, and how many tokens were accepted. ``other`` verifies the main paths alone.
    """
    params = without_end(model, replace(PLAIN, seed=5))
    prompt = make_prompt(model, 5, seed=2)
    n = len(prompt)
    wanted = one_by_one(model, prompt, params, n_tokens + 4, n_ctx=256)
    rng = np.random.default_rng(seed)
    text = prompt.tolist()
    n_side = n_accepted = 0
    while len(text) < n + n_tokens:
        ahead = wanted[len(text) - n :]
        tokens, parents = random_tree(rng, int(rng.integers(0, 20)), ahead, model.vocab.n_tokens)
        main = main_path(tokens, parents)
        new = as_rows(text[context.memory.length() :])
        verdict = context.verify(
            [0], new, as_rows(tokens), parents=as_rows(parents), sampling=params, start=n
        )
        selected = verdict.tokens[0, : verdict.n_accepted[0] + 1].tolist()
        if other is None:
            assert len(selected) > n_right(tokens, parents, ahead[:-1])
        else:
            chain = other.verify([0], new, as_rows(main), sampling=params, start=n)
            assert selected == chain.tokens[0, : chain.n_accepted[0] + 1].tolist()
        n_side += n_right(main, range(-1, len(main) - 1), selected) < verdict.n_accepted[0]
        n_accepted += len(selected) - 1
        text += selected
        assert tokens_of(context) == text[:-1]
        if other is None:
            assert text[n:] == wanted[: len(text) - n]
    return n_side, n_accepted


@pytest.mark.parametrize("name", ATTENTION)
def test_trees_for_every_architecture(
    random_model: Callable[..., Path], make_context: MakeContext, name: str
) -> None:
    with sllm.Model(random_model(name)) as model:
        context = make_context(model, n_ctx=256)
        assert context.can_branch
        n_side, _ = grow(model, context, None, seed=3)
        assert n_side > 0


@pytest.mark.parametrize("name", [name for name in random_models.EVERY if name not in ATTENTION])
def test_where_a_state_cannot_branch_the_main_path_is_verified(
    random_model: Callable[..., Path], make_context: MakeContext, name: str
) -> None:
    with sllm.Model(random_model(name)) as model:
        contexts = [make_context(model, n_ctx=256) for _ in range(2)]
        assert not any(one.can_branch for one in contexts)
        n_side, n_accepted = grow(model, contexts[0], contexts[1], seed=3)
        assert n_side == 0
        assert n_accepted > 0


def test_an_end_of_generation_ends_a_path(draft_model: Model, make_context: MakeContext) -> None:
    eos = draft_model.vocab.eos
    assert eos is not None
    prompt = make_prompt(draft_model, 5, seed=1)
    forced = replace(GREEDY, logit_bias={eos: 1e6})
    context = make_context(draft_model)
    verdict = context.verify(
        [0],
        as_rows(prompt),
        as_rows([7, eos, eos, 8, 9]),
        parents=as_rows([-1, 0, -1, 2, 2]),
        sampling=forced,
    )
    assert verdict.n_accepted.tolist() == [0]
    assert verdict.tokens[0].tolist() == [eos] + [-1] * 5
    assert tokens_of(context) == prompt.tolist()
    drafted = make_context(draft_model).draft(
        [0], as_rows(prompt), n_max=4, n_nodes=6, width=3, sampling=forced
    )
    n = int(drafted.lengths[0])
    assert drafted.tokens[0, 0] == eos
    assert drafted.parents is not None
    assert 0 not in drafted.parents[0, :n]


def test_log_probabilities_along_a_side_branch(target_model: Model, make_context: MakeContext) -> None:
    params = without_end(target_model, replace(PLAIN, seed=5))
    prompt = make_prompt(target_model, 8, seed=8)
    own = one_by_one(target_model, prompt, params, 4)
    rows = log_softmax(fresh_logits(target_model, [*prompt, *own]))
    context = make_context(target_model)
    verdict = context.verify(
        [0],
        as_rows(prompt),
        as_rows([1, 2, *own[:3]]),
        parents=as_rows([-1, 0, -1, 2, 3]),
        sampling=params,
        logprobs=True,
    )
    assert verdict.n_accepted.tolist() == [3]
    assert verdict.tokens[0, :4].tolist() == own
    assert verdict.logprobs is not None
    for i, token in enumerate(own):
        assert verdict.logprobs[0, i] == pytest.approx(rows[len(prompt) - 1 + i, token], abs=1e-4)


def test_a_context_that_is_nearly_full(draft_model: Model, make_context: MakeContext) -> None:
    """Nodes for which there is no room count as rejected, and those of the main path go first."""
    params = without_end(draft_model, replace(PLAIN, seed=1))
    size = make_context(draft_model, n_ctx=256).n_ctx_seq
    for left in range(5):
        prompt = make_prompt(draft_model, size - left, seed=5)
        wanted = one_by_one(draft_model, prompt, params, left + 1, n_ctx=256)
        context = make_context(draft_model, n_ctx=256)
        side = list(range(3, 33))
        tokens = [*wanted, *(t for t in side if t != wanted[0])]
        parents = [*range(-1, len(wanted) - 1), *([-1] * (len(tokens) - len(wanted)))]
        verdict = context.verify(
            [0], as_rows(prompt), as_rows(tokens), parents=as_rows(parents), sampling=params
        )
        assert verdict.n_accepted.tolist() == [left]
        assert verdict.tokens[0, : left + 1].tolist() == wanted
        assert context.memory.length() == size
        context = make_context(draft_model, n_ctx=256)
        draft = context.draft([0], as_rows(prompt), n_max=6, n_nodes=30, width=8, sampling=params)
        assert tokens_of(context) == prompt.tolist()
        assert draft.lengths[0] > 0


# ---- what is no tree ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parents", "error"),
    [
        ([5, 6], [1, -1], "parent"),
        ([5, 6], [-1, 1], "parent"),
        ([5, 6], [-2, 0], "parent"),
        ([5, 6, 7], [-1, 2, 1], "parent"),
        ([5, 6], [-1, 2**31 - 1], "parent"),
        ([5, 6], [-(2**31), -1], "parent"),
        ([5, 5], [-1, -1], "same"),
        ([4, 5, 5], [-1, 0, 0], "same"),
        ([5, 6], [-1], "one for each"),
        ([5], [-1, 0], "one for each"),
        (list(range(3, 303)), [-1] * 300, f"{MAX_NODES} nodes"),
        (list(range(3, 1003)) * 2, [-1] * 1000 + list(range(1000)), f"{MAX_NODES} nodes"),
    ],
)
def test_adversarial_trees(
    target_model: Model,
    make_context: MakeContext,
    tokens: list[int],
    parents: list[int],
    error: str,
) -> None:
    params = replace(PLAIN, seed=9)
    prompt = make_prompt(target_model, 6, seed=4)
    wanted = one_by_one(target_model, prompt, params, 3)
    context = make_context(target_model, n_seq_max=2, n_ctx=1024)
    context.decode(prompt[:-1], seq_id=1)
    with pytest.raises(ValueError, match=error):
        context.verify(
            [1, 0],
            as_rows(prompt[-1:], prompt),
            as_rows(wanted, tokens),
            parents=as_rows([-1, 0, 1], parents),
            sampling=params,
        )
    assert [context.memory.length(i) for i in (0, 1)] == [0, 5]
    verdict = context.verify([1], as_rows(prompt[-1:]), as_rows(wanted[:2]), sampling=params, start=6)
    assert verdict.tokens[0].tolist() == wanted


def test_tokens_that_are_none_go_with_all_that_follows_them(
    target_model: Model, make_context: MakeContext
) -> None:
    params = replace(PLAIN, seed=9)
    prompt = make_prompt(target_model, 6, seed=4)
    wanted = one_by_one(target_model, prompt, params, 3)
    n_vocab = target_model.vocab.n_tokens
    for bad in (-1, n_vocab, 2**31 - 1, -(2**31)):
        verdict = make_context(target_model).verify(
            [0],
            as_rows(prompt),
            as_rows([bad, 5, 6, *wanted[:2], bad]),
            parents=as_rows([-1, 0, 1, -1, 3, 3]),
            sampling=params,
        )
        assert verdict.tokens[0, : verdict.n_accepted[0] + 1].tolist() == wanted


def test_arguments_of_trees(target_model: Model, make_context: MakeContext) -> None:
    context = make_context(target_model)
    one = as_rows([5])
    with pytest.raises(ValueError, match="no draft"):
        context.verify([0], one, parents=as_rows([-1]))
    tree = context.draft([0], one, n_max=2, n_nodes=4, width=2)
    with pytest.raises(ValueError, match="of its own"):
        context.verify([0], one, tree, parents=as_rows([-1]))
    for wrong in (0, -1, 2**31):
        with pytest.raises((ValueError, OverflowError)):
            context.draft([0], one, n_max=2, n_nodes=4, width=wrong)
    for wrong in (-1, MOST_DRAFTED + 1, 2**31):
        with pytest.raises((ValueError, OverflowError)):
            context.draft([0], one, n_max=2, n_nodes=wrong)
    with pytest.raises(ValueError, match="n_max"):
        context.draft([0], one, n_max=0, n_nodes=3)
    with pytest.raises(ValueError, match="p_min"):
        context.draft([0], one, n_max=2, n_nodes=3, p_min=1.5)
    with pytest.raises(ValueError, match="chain"):
        context.draft([0], one, n_max=2, width=3)


# ---- memory ------------------------------------------------------------------------------------------------


@examples(20)
@given(data=st.data())
def test_memory_after_trees(target_model: Model, data: st.DataObject) -> None:
    """Copies, saved states and truncations between drafted and verified trees change no text."""
    params = replace(PLAIN, seed=data.draw(st.integers(0, 99)))
    params = without_end(target_model, params)
    prompt = make_prompt(target_model, 5, seed=1)
    n = len(prompt)
    wanted = one_by_one(target_model, prompt, params, 24)  # the last of twelve tokens may bring as many more
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    with target_model.context(n_ctx=1024, n_seq_max=2, **EXACT) as context:
        text, seq = prompt.tolist(), 0
        while len(text) < n + 12:
            what = data.draw(st.sampled_from(["verify", "verify", "draft", "copy", "save", "truncate"]))
            length = context.memory.length(seq)
            ahead = wanted[len(text) - n :]
            if what == "draft":
                context.draft(
                    [seq], as_rows(text[min(length, len(text) - 1) :]),
                    pos=[min(length, len(text) - 1)], n_max=4, n_nodes=20, width=5, sampling=params, start=n,
                )  # fmt: skip
                assert tokens_of(context, seq) == text
            elif what == "copy":
                context.memory.copy(seq, 1 - seq)
                assert tokens_of(context, 1 - seq) == tokens_of(context, seq)
                seq = 1 - seq
            elif what == "save" and length:
                state = context.save(seq)
                seq = 1 - seq
                context.load(state, seq)
            elif what == "truncate":
                context.memory.truncate(seq, data.draw(st.integers(0, length)))
            else:
                tokens, parents = random_tree(rng, 12, ahead, target_model.vocab.n_tokens)
                at = min(length, len(text) - 1)
                verdict = context.verify(
                    [seq], as_rows(text[at:]), as_rows(tokens), parents=as_rows(parents), pos=[at],
                    sampling=params, start=n,
                )  # fmt: skip
                text += verdict.tokens[0, : verdict.n_accepted[0] + 1].tolist()
                assert tokens_of(context, seq) == text[:-1]
                assert text[n:] == wanted[: len(text) - n]


def test_a_tree_that_is_cancelled(target_model: Model, make_context: MakeContext) -> None:
    params = without_end(target_model, replace(PLAIN, seed=2))
    prompt = make_prompt(target_model, 100, seed=4)
    wanted = one_by_one(target_model, prompt, params, 3)
    context = make_context(target_model)
    context.decode(prompt[:40])
    side = [t for t in range(3, 53) if t != wanted[0]]
    tokens, parents = [*side, *wanted[:2]], [*([-1] * (len(side) + 1)), len(side)]
    for _ in range(20):
        stop = threading.Timer(0.002, context.cancel)
        stop.start()
        try:
            context.verify(
                [0],
                as_rows(prompt[40:]),
                as_rows(tokens),
                parents=as_rows(parents),
                sampling=params,
                start=100,
            )
            context.memory.truncate(0, 40)
        except sllm.CancelledError:
            pass
        stop.join()
        assert tokens_of(context) == prompt[:40].tolist()
    verdict = context.verify(
        [0], as_rows(prompt[40:]), as_rows(tokens), parents=as_rows(parents), sampling=params, start=100
    )
    assert verdict.tokens[0, :3].tolist() == wanted


# ---- drafted trees -----------------------------------------------------------------------------------------


@examples(30)
@given(
    params=samplings,
    n_max=st.integers(1, 6),
    n_nodes=st.integers(0, MAX_NODES),
    width=st.integers(1, 12),
    p_min=st.sampled_from([0.0, 0.02, 0.2]),
    seed=st.integers(0, 99),
)
def test_what_a_drafted_tree_is(
    draft_model: Model, params: SamplingParams, n_max: int, n_nodes: int, width: int, p_min: float, seed: int
) -> None:
    """Closed under parents, likeliest first, within its bounds; the first children are the chain that the
    model would draft."""
    prompt = make_prompt(draft_model, 6, seed=seed)
    own = one_by_one(draft_model, prompt, params, n_max)
    with draft_model.context(n_ctx=512, **EXACT) as context:
        draft = context.draft(
            [0], as_rows(prompt), n_max=n_max, n_nodes=n_nodes, width=width, p_min=p_min, sampling=params
        )
        assert tokens_of(context) == prompt.tolist()
    assert draft.parents is not None
    assert draft.ranks is not None
    assert draft.chances is not None
    n = int(draft.lengths[0])
    assert n <= n_nodes
    assert draft.tokens.shape == draft.parents.shape == draft.chances.shape == (1, n_nodes)
    assert 1 <= draft.n_passes <= n_max
    tokens, parents = draft.tokens[0, :n].tolist(), draft.parents[0, :n].tolist()
    ranks, chances = draft.ranks[0, :n].tolist(), draft.chances[0, :n].tolist()
    for unused, value in ((draft.tokens, -1), (draft.parents, -1), (draft.ranks, -1), (draft.chances, 0)):
        assert (unused[0, n:] == value).all()
    assert all(-1 <= parent < i for i, parent in enumerate(parents))
    assert len({*zip(parents, tokens, strict=True)}) == n
    assert chances == sorted(chances, reverse=True)
    assert all(0 < c <= 1 for c in chances)
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    assert max(depths, default=-1) < n_max  # a pass goes one token further at most
    computed = {parent for parent in parents if parent >= 0}
    assert len(computed) <= width * (n_max - 1)
    assert all(chances[parent] >= p_min for parent in computed)
    for parent in {-1, *computed}:  # siblings stand in the order of their ranks
        children = [i for i in range(n) if parents[i] == parent]
        assert [ranks[i] for i in children] == list(range(len(children)))
    main = main_path(tokens, parents)
    assert main == own[: len(main)]


def test_a_tree_of_one_path_is_a_chain(draft_model: Model, make_context: MakeContext) -> None:
    prompt = make_prompt(draft_model, 6, seed=1)
    params = without_end(draft_model, GREEDY)
    tree = make_context(draft_model).draft([0], as_rows(prompt), n_max=5, n_nodes=5, width=1, sampling=params)
    assert tree.parents is not None
    assert tree.n_passes <= 5
    chain = make_context(draft_model).draft([0], as_rows(prompt), n_max=5, sampling=params)
    assert chain.parents is None
    main = main_path(tree.tokens[0, : tree.lengths[0]].tolist(), tree.parents[0, : tree.lengths[0]].tolist())
    assert main == chain.tokens[0, : len(main)].tolist()


def test_a_model_with_a_state_drafts_a_chain(
    random_model: Callable[..., Path], make_context: MakeContext
) -> None:
    with sllm.Model(random_model("qwen35")) as model:
        params = without_end(model, PLAIN)
        prompt = make_prompt(model, 6, seed=1)
        tree = make_context(model).draft([0], as_rows(prompt), n_max=4, n_nodes=9, width=5, sampling=params)
        assert tree.parents is not None
        n = int(tree.lengths[0])
        assert tree.parents[0, :n].tolist() == list(range(-1, n - 1))
        assert tree.tokens[0, :n].tolist() == one_by_one(model, prompt, params, n)
        assert n == 4

"""draft and verify: whatever is drafted, the text is the target's own, and memory holds what is committed."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracles import (
    EXACT,
    GGUF,
    GREEDY,
    PLAIN,
    examples,
    fresh_logits,
    log_softmax,
    make_prompt,
    one_by_one,
    select,
    tokens_of,
    without_end,
)

import sllm
from sllm import embedded
from sllm.engine.jobs import Draft
from sllm.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.engine.context import Context
    from sllm.engine.model import Model

    MakeContext = Callable[..., Context]

GRAMMAR = 'root ::= "{" [a-z ]{0,12} ("," [0-9]{1,4}){0,5} "}"'

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty_last_n=st.sampled_from([0, 8, 64]),
    penalty_repeat=st.sampled_from([1.0, 1.2]),
    penalty_present=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((300, 4.0), (5, -math.inf))]),
    grammar=st.sampled_from([None, None, None, GRAMMAR]),
    seed=st.integers(0, 2**64 - 1),
)


def as_rows(*rows: Any) -> Any:
    """Token arrays for several sequences, as draft and verify take them."""
    return [np.array(row, dtype=np.int32) for row in rows]


# ---- the text ----------------------------------------------------------------------------------------------


@examples(30)
@given(data=st.data())
def test_text_with_drafts_is_the_text_without(
    target_model: Model, draft_model: Model, data: st.DataObject
) -> None:
    """Ragged batches of sequences that have samplings, draft lengths and confidences of their own."""
    n_seqs = data.draw(st.integers(1, 4), label="sequences")
    n_tokens = 12
    params = [data.draw(samplings) for _ in range(n_seqs)]
    prompts = [
        make_prompt(target_model, data.draw(st.integers(1, 9)), seed=data.draw(st.integers(0, 999)))
        for _ in range(n_seqs)
    ]
    wanted = [one_by_one(target_model, p, s, n_tokens) for p, s in zip(prompts, params, strict=True)]
    texts: list[list[int]] = [p.tolist() for p in prompts]
    n_batch = data.draw(st.sampled_from([2048, 48]))
    with (
        target_model.context(
            n_ctx=n_seqs * 256, n_seq_max=n_seqs, n_batch=n_batch, n_outputs_max=48, **EXACT
        ) as target,
        draft_model.context(n_ctx=n_seqs * 256, n_seq_max=n_seqs, n_batch=n_batch, **EXACT) as drafter,
    ):
        while True:
            going = [
                i
                for i in range(n_seqs)
                if len(texts[i]) < len(prompts[i]) + n_tokens and not target_model.vocab.is_eog(texts[i][-1])
            ]
            if not going:
                break
            seqs = data.draw(st.permutations(going))
            used = [params[i] for i in seqs]
            starts = [len(prompts[i]) for i in seqs]
            n_max = data.draw(st.lists(st.integers(0, 7), min_size=len(seqs), max_size=len(seqs)))
            p_min = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
            # the draft catches up from any position; what it has cached behind may have turned out wrong
            behind = [
                data.draw(st.integers(0, min(drafter.memory.length(i), len(texts[i]) - 1))) for i in seqs
            ]
            draft = drafter.draft(
                seqs,
                as_rows(*(texts[i][b:] for b, i in zip(behind, seqs, strict=True))),
                n_max=n_max,
                p_min=p_min,
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
                n = int(verdict.n_accepted[row])
                assert 0 <= n <= draft.lengths[row] <= n_max[row]
                new = verdict.tokens[row, : n + 1].tolist()
                assert new[:n] == draft.tokens[row, :n].tolist()
                assert (verdict.tokens[row, n + 1 :] == -1).all()
                texts[i] += new
                assert tokens_of(target, i) == texts[i][:-1]
    for text, prompt, own in zip(texts, prompts, wanted, strict=True):
        assert text[len(prompt) :][: len(own)] == own
        assert len(text) - len(prompt) >= len(own)


@examples(30)
@given(data=st.data(), params=samplings, seed=st.integers(0, 999))
def test_no_draft_whatever_it_holds_changes_the_text(
    draft_model: Model, data: st.DataObject, params: SamplingParams, seed: int
) -> None:
    """Garbage, ids that are no tokens, a right beginning, an end in the middle, far too much, catch-ups."""
    n_tokens, n_vocab = 20, draft_model.vocab.n_tokens
    prompt = make_prompt(draft_model, 4, seed=seed)
    wanted = one_by_one(draft_model, prompt, params, n_tokens)
    text: list[int] = prompt.tolist()
    ids = st.integers(0, n_vocab - 1) | st.sampled_from([-1, -(2**31), n_vocab, 2**31 - 1, 0, 2])
    with draft_model.context(n_ctx=256, **EXACT) as context:
        while len(text) < len(prompt) + len(wanted):
            ahead = wanted[len(text) - len(prompt) :]
            n_right = data.draw(st.integers(0, len(ahead)))
            hint = ahead[:n_right] + data.draw(st.lists(ids, max_size=8))
            back = data.draw(st.integers(0, context.memory.length()))
            verdict = context.verify(
                [0], as_rows(text[back:]), as_rows(hint), sampling=params, pos=[back], start=[len(prompt)]
            )
            n = int(verdict.n_accepted[0])
            assert n >= min(n_right, len(ahead) - 1)
            assert n <= len(hint)
            text += verdict.tokens[0, : n + 1].tolist()
            assert tokens_of(context) == text[:-1]
    assert text[len(prompt) :][: len(wanted)] == wanted


def test_selection_ends_behind_an_end_of_generation(draft_model: Model, make_context: MakeContext) -> None:
    """An end that was drafted, and is right, ends the verdict; what is drafted behind it is not looked at."""
    eos = draft_model.vocab.eos
    assert eos is not None
    prompt = make_prompt(draft_model, 5, seed=1)
    forced = replace(GREEDY, logit_bias={eos: 1e6})
    for hint in ([eos, 7, 8], [eos], [eos, eos, eos], [7, eos], []):
        context = make_context(draft_model)
        verdict = context.verify([0], as_rows(prompt), as_rows(hint), sampling=forced)
        assert verdict.n_accepted.tolist() == [0]
        assert verdict.tokens[0].tolist() == [eos] + [-1] * len(hint)
        assert tokens_of(context) == prompt.tolist()
    draft = make_context(draft_model).draft([0], as_rows(prompt), n_max=6, sampling=forced)
    assert draft.lengths.tolist() == [1]
    assert draft.tokens[0].tolist() == [eos, -1, -1, -1, -1, -1]


def test_drafts_reach_the_end_of_the_context_and_no_further(
    draft_model: Model, make_context: MakeContext
) -> None:
    context = make_context(draft_model, n_ctx=256)
    size = context.n_ctx_seq
    prompt = make_prompt(draft_model, size - 3, seed=5)
    params = without_end(draft_model, GREEDY)
    wanted = one_by_one(draft_model, prompt, params, 4)

    draft = context.draft([0], as_rows(prompt), n_max=16, sampling=params)
    assert draft.tokens[0, : draft.lengths[0]].tolist() == wanted  # the last one is selected, never decoded
    context.memory.clear()
    verdict = context.verify([0], as_rows(prompt), as_rows([*wanted, *wanted]), sampling=params)
    assert verdict.n_accepted.tolist() == [3]
    assert verdict.tokens[0, :4].tolist() == wanted
    assert context.memory.length() == size
    with pytest.raises(sllm.ContextFullError):
        context.verify([0], wanted[-1:], sampling=params)


def test_logprobs_are_those_of_the_plain_softmax(target_model: Model, make_context: MakeContext) -> None:
    params = without_end(target_model, SamplingParams(temperature=0.7, top_k=20, seed=5))
    prompt = make_prompt(target_model, 8, seed=8)
    own = one_by_one(target_model, prompt, params, 6)
    rows = log_softmax(fresh_logits(target_model, [*prompt, *own]))
    context = make_context(target_model)

    verdict = context.verify([0], as_rows(prompt), as_rows([*own[:4], 1]), sampling=params, logprobs=True)

    assert verdict.logprobs is not None
    assert verdict.logprobs.shape == verdict.tokens.shape
    n = int(verdict.n_accepted[0]) + 1
    for i, token in enumerate(verdict.tokens[0, :n]):
        assert verdict.logprobs[0, i] == pytest.approx(rows[len(prompt) - 1 + i, token], abs=1e-4)
    assert (verdict.logprobs[0, n:] == 0).all()
    assert context.verify([0], own[-1:], sampling=params).logprobs is None


# ---- drafting ----------------------------------------------------------------------------------------------


@examples(25)
@given(
    params=samplings,
    n_max=st.integers(0, 9),
    p_min=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_draft_is_what_its_model_would_write(
    draft_model: Model, params: SamplingParams, n_max: int, p_min: float, seed: int
) -> None:
    """Tokens and their probabilities as one selection after another would give them, cut off at p_min."""
    prompt = make_prompt(draft_model, 6, seed=seed)
    own = one_by_one(draft_model, prompt, params, n_max)
    rows = fresh_logits(draft_model, [*prompt, *own])
    with draft_model.context(n_ctx=256, **EXACT) as context:
        draft = context.draft([0], as_rows(prompt), n_max=n_max, p_min=p_min, sampling=params)

    assert draft.tokens.shape == draft.probs.shape == (1, n_max)
    text = prompt.tolist()
    for i, token in enumerate(own):
        chosen, prob = select(draft_model, params, rows[len(text) - 1], len(text), text, start=len(prompt))
        assert chosen == token
        if prob < p_min:
            assert draft.lengths[0] == i
            break
        assert draft.tokens[0, i] == token
        assert draft.probs[0, i] == pytest.approx(prob, rel=1e-5)
        text.append(token)
    else:
        assert draft.lengths[0] == len(own)
    assert (draft.tokens[0, draft.lengths[0] :] == -1).all()
    assert (draft.probs[0, draft.lengths[0] :] == 0).all()


@examples(10)
@given(params=samplings, seed=st.integers(0, 99))
def test_a_chain_ends_before_the_first_token_less_probable_than_p_min(
    draft_model: Model, params: SamplingParams, seed: int
) -> None:
    prompt = as_rows(make_prompt(draft_model, 6, seed=seed))
    start = [6]
    with draft_model.context(n_ctx=256, **EXACT) as context:
        whole = context.draft([0], prompt, n_max=6, sampling=params, start=start)
        probs = whole.probs[0, : whole.lengths[0]]
        for prob in probs:
            for p_min in (prob, np.nextafter(prob, np.float32(2))):
                if p_min > 1:
                    continue
                draft = context.draft(
                    [0], prompt, n_max=6, p_min=float(p_min), sampling=params, pos=[0], start=start
                )
                below = np.flatnonzero(probs < p_min)
                n = int(below[0]) if len(below) else len(probs)
                assert draft.tokens[0].tolist() == [*whole.tokens[0, :n].tolist(), *[-1] * (6 - n)]


@examples(25)
@given(data=st.data(), params=samplings)
def test_drafting_on_from_a_cached_chain_is_drafting_afresh(
    draft_model: Model, data: st.DataObject, params: SamplingParams
) -> None:
    text: list[int] = make_prompt(draft_model, 5, seed=data.draw(st.integers(0, 99))).tolist()
    start = [len(text)]
    new = text
    with draft_model.context(n_ctx=256, **EXACT) as context:
        for _ in range(4):
            n_max = data.draw(st.integers(1, 6))
            draft = context.draft([0], as_rows(new), n_max=n_max, sampling=params, start=start)
            assert tokens_of(context) == text
            with draft_model.context(n_ctx=256, **EXACT) as fresh:
                again = fresh.draft([0], as_rows(text), n_max=n_max, sampling=params, start=start)
            np.testing.assert_array_equal(draft.tokens, again.tokens)
            np.testing.assert_array_equal(draft.lengths, again.lengths)
            np.testing.assert_array_equal(draft.probs, again.probs)
            # the beginning of the chain is accepted, and then comes a token that is right, wrong or far off
            n = data.draw(st.integers(0, int(draft.lengths[0])))
            accepted = draft.tokens[0, :n].tolist()
            if params.grammar is None:
                new = [*accepted, data.draw(st.integers(5, draft_model.vocab.n_tokens - 1))]
            elif accepted and not draft_model.vocab.is_eog(accepted[-1]):
                new = accepted
            else:
                break
            text = text + new


def test_nothing_is_drafted_where_nothing_is_asked_for(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    draft = context.draft([1, 0], as_rows([5, 6, 7], [8]), n_max=0)

    assert draft.tokens.shape == (2, 0)
    assert draft.lengths.tolist() == [0, 0]
    assert [tokens_of(context, i) for i in (0, 1)] == [[8], [5, 6, 7]]
    endless = without_end(draft_model, GREEDY)
    draft = context.draft([0, 1], as_rows([9], [9]), n_max=[0, 3], p_min=[0.0, 0.0], sampling=endless)
    assert draft.lengths.tolist() == [0, 3]
    assert draft.tokens[0].tolist() == [-1, -1, -1]
    draft = context.draft([0], [9], n_max=5, p_min=1.0, sampling=replace(PLAIN, temperature=1.3))
    assert draft.lengths.tolist() == [0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_max": -1},
        {"n_max": [1]},
        {"n_max": 10**6},
        {"p_min": -0.1},
        {"p_min": 1.5},
        {"p_min": math.nan},
        {"p_min": [0.5]},
        {"sampling": [GREEDY]},
        {"pos": [0]},
        {"start": [-1, 0]},
        {"seq_ids": [0, 0]},
        {"seq_ids": [0, 2]},
        {"seq_ids": []},
        {"tokens": [[5], []]},
        {"tokens": [5]},
        {"tokens": [5, 2560]},
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_lost(
    draft_model: Model, make_context: MakeContext, wrong: dict[str, Any]
) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([[1, 3], [4]], seq_id=[0, 1])
    arguments: dict[str, Any] = {"seq_ids": [0, 1], "tokens": [5, 6], "sampling": GREEDY, **wrong}
    seq_ids, tokens = arguments.pop("seq_ids"), arguments.pop("tokens")

    with pytest.raises(ValueError):  # noqa: PT011
        context.draft(seq_ids, tokens, **arguments)
    if not wrong.keys() & {"n_max", "p_min"}:
        with pytest.raises(ValueError):  # noqa: PT011
            context.verify(seq_ids, tokens, [[7], [8, 9]], **arguments)
    assert [tokens_of(context, i) for i in (0, 1)] == [[1, 3], [4]]


def test_samplings_compiled_for_another_model_cannot_get_in(
    draft_model: Model, target_model: Model, make_context: MakeContext
) -> None:
    """They are compiled by the context's own model, so the same object serves both."""
    params = SamplingParams(seed=3, grammar='root ::= "a"*')
    for model in (draft_model, target_model, draft_model):
        make_context(model).verify([0], [5], sampling=params)
    with pytest.raises(TypeError, match="expected SamplingParams"):
        make_context(draft_model).verify([0], [5], sampling=["greedy"])  # type: ignore[list-item]


def test_hints_are_checked_before_anything_is_done(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([[1, 3], [4]], seq_id=[0, 1])
    tokens = np.zeros((2, 3), dtype=np.int32)
    lengths = np.array([1, 3], dtype=np.int32)
    probs = np.zeros((2, 3), dtype=np.float32)
    cases: list[tuple[type[Exception], Any]] = [
        (ValueError, [[1]]),
        (ValueError, [[1], [2], [3]]),
        (TypeError, [[1], ["x"]]),
        (TypeError, [[1], [1.5]]),
        (TypeError, [np.zeros(2), np.zeros(2)]),
        (ValueError, Draft(tokens[:1], lengths[:1], probs)),
        (ValueError, Draft(tokens, np.array([1, 4], dtype=np.int32), probs)),
        (ValueError, Draft(tokens, np.array([-1, 3], dtype=np.int32), probs)),
        (TypeError, Draft(tokens.astype(np.int64), lengths, probs)),
        (TypeError, Draft(tokens[:, ::2], lengths, probs)),
        (TypeError, Draft(tokens, lengths.astype(np.int64), probs)),
    ]
    for error, hints in cases:
        with pytest.raises(error):
            context.verify([0, 1], [5, 6], hints)
        assert [tokens_of(context, i) for i in (0, 1)] == [[1, 3], [4]]


# ---- errors half way ---------------------------------------------------------------------------------------


def test_more_rows_than_n_outputs_max_are_refused_and_nothing_is_lost(
    draft_model: Model, make_context: MakeContext
) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2, n_outputs_max=8)
    context.decode([[1, 3], [4]], seq_id=[0, 1])

    with pytest.raises(ValueError, match=r"9 rows of logits are needed .* the context keeps 8"):
        context.verify([0, 1], [5, 6], as_rows([7] * 4, [7] * 3), sampling=GREEDY)
    assert [tokens_of(context, i) for i in (0, 1)] == [[1, 3], [4]]
    context.verify([0, 1], [5, 6], as_rows([7] * 3, [7] * 3), sampling=GREEDY)
    assert tokens_of(context, 0)[:3] == [1, 3, 5]
    # what cannot be verified needs no row
    context.verify([0], as_rows([5]), as_rows([-1] * 30), sampling=GREEDY)


def stuck_behind(model: Model, text: str) -> SamplingParams:
    """A grammar that asks for ``text`` and then for a 7, and biases that rule out whatever begins one."""
    vocab = model.vocab
    sevens = [t for t in range(vocab.n_tokens) if vocab.piece(t)[:1] == b"7"]
    return replace(GREEDY, grammar=f'root ::= "{text}" "7"', logit_bias=dict.fromkeys(sevens, -math.inf))


def until_stuck(context: Context, prompt: list[int], params: SamplingParams, chain: list[int]) -> list[int]:
    """The text up to where no token can be selected, ``chain`` being offered whole as a draft all along."""
    text = prompt.copy()

    def go_on() -> None:
        while True:
            hints = chain[len(text) - len(prompt) :]
            verdict = context.verify(
                [0],
                [text[-1]],
                as_rows(hints) if hints else None,
                sampling=params,
                pos=len(text) - 1,
                start=len(prompt),
            )
            new = verdict.tokens[0, : verdict.n_accepted[0] + 1].tolist()
            assert verdict.tokens[0, len(new) :].tolist() == [-1] * (len(hints) + 1 - len(new))
            text.extend(new)
            assert tokens_of(context) == text[:-1]

    with pytest.raises(sllm.InferenceError, match="no token can be selected"):
        go_on()
    assert tokens_of(context) == text[:-1]
    return text[len(prompt) :]


@pytest.mark.parametrize("letters", ["a", "ab", "abc"])
def test_a_draft_into_a_dead_end_gives_what_no_draft_gives(
    draft_model: Model, make_context: MakeContext, letters: str
) -> None:
    """The tokens before the dead end first, and only then the error."""
    stuck = stuck_behind(draft_model, letters)
    prompt: list[int] = make_prompt(draft_model, 6, seed=2).tolist()
    wrong = int(draft_model.vocab.encode("!")[0])
    context = make_context(draft_model)
    context.decode(prompt[:-1])
    wanted = until_stuck(context, prompt, stuck, [])
    assert draft_model.vocab.decode(wanted) == letters
    for n in range(len(wanted) + 1):  # chains that end before the dead end, at it, and run past it
        for behind in ([], [wrong], [wrong] * 4):
            assert until_stuck(context, prompt, stuck, [*wanted[:n], *behind]) == wanted
    # the draft itself stops there, too
    draft = context.draft([0], [prompt[-1]], n_max=8, sampling=stuck, pos=len(prompt) - 1, start=len(prompt))
    assert draft.tokens[0, : draft.lengths[0]].tolist() == wanted
    assert until_stuck(context, prompt, stuck, wanted) == wanted
    again = without_end(draft_model, GREEDY)  # and what had stopped half way serves others
    assert context.verify([0], [prompt[-1]], sampling=again, pos=len(prompt) - 1).tokens[
        0
    ].tolist() == one_by_one(draft_model, prompt, again, 1)


def test_generate_says_as_much_with_a_draft_as_without(draft_model: Model, target_model: Model) -> None:
    stuck = stuck_behind(target_model, "abc")
    texts = []
    for draft in (None, draft_model, "ngram", lambda text, n_max: [5] * n_max):
        text: list[int] = []
        with pytest.raises(sllm.InferenceError, match="no token can be selected"):
            for run in sllm.generate(target_model, "Once", draft=draft, sampling=stuck, max_tokens=16):
                text += run.tokens
        texts.append(target_model.vocab.decode(text))
    assert texts == ["abc"] * 4


def test_a_grammar_that_gets_stuck_at_once_is_an_error_that_loses_nothing(
    draft_model: Model, make_context: MakeContext
) -> None:
    """One sequence of a batch, which then commits none of them."""
    vocab = draft_model.vocab
    stuck = stuck_behind(draft_model, "")
    prompt = make_prompt(draft_model, 6, seed=2)
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([prompt[:-1], prompt[:-1]], seq_id=[0, 1])

    with pytest.raises(sllm.InferenceError, match="no token can be selected"):
        context.verify([0, 1], [prompt[-1:]] * 2, as_rows([5], [6]), sampling=[GREEDY, stuck])
    assert [tokens_of(context, i) for i in (0, 1)] == [prompt[:-1].tolist()] * 2
    endless = without_end(draft_model, GREEDY)
    wanted = one_by_one(draft_model, prompt, endless, 3)
    draft = context.draft([0, 1], [prompt[-1:]] * 2, n_max=3, sampling=[endless, stuck])
    assert draft.lengths.tolist() == [3, 0]  # a draft is only a hint
    assert draft.tokens.tolist() == [wanted, [-1] * 3]
    verdict = context.verify(
        [1, 0], [prompt[-1:]] * 2, as_rows(wanted[:2], [1]), sampling=endless, pos=[len(prompt) - 1] * 2
    )
    assert verdict.tokens[0].tolist() == wanted
    assert verdict.tokens[1, 0] == wanted[0]
    with pytest.raises(ValueError, match="does not match the grammar"):
        context.verify(
            [0],
            as_rows([int(vocab.encode("b")[0])]),
            sampling=stuck_behind(draft_model, "a"),
            start=[len(prompt)],
        )


@examples(20)
@given(data=st.data(), temperature=st.sampled_from([0.7, 1.3]), seed=st.integers(0, 99))
def test_a_grammar_and_penalties_follow_a_text_that_is_taken_back(
    draft_model: Model, data: st.DataObject, temperature: float, seed: int
) -> None:
    """To a shorter text, to another one of the same length, and by drafting as well as by verifying."""
    params = replace(
        PLAIN, temperature=temperature, seed=seed, grammar=GRAMMAR, penalty_last_n=4, penalty_present=1.0
    )
    prompt: list[int] = make_prompt(draft_model, 4, seed=seed).tolist()
    branches = [one_by_one(draft_model, prompt, replace(params, seed=s), 8) for s in range(3)]
    with draft_model.context(n_ctx=256, **EXACT) as context:
        for _ in range(6):
            branch = data.draw(st.sampled_from(branches))
            text = prompt + branch[: data.draw(st.integers(0, len(branch) - 1))]
            held = tokens_of(context)
            same = next((i for i, (x, y) in enumerate(zip(held, text, strict=False)) if x != y), len(held))
            back = min(same, len(text) - 1, data.draw(st.integers(0, len(text))))
            row = fresh_logits(draft_model, text)[-1]
            wanted, _ = select(draft_model, params, row, len(text), text, start=len(prompt))
            if data.draw(st.booleans(), label="draft"):
                draft = context.draft(
                    [0], as_rows(text[back:]), n_max=3, sampling=params, pos=[back], start=[len(prompt)]
                )
                assert draft.tokens[0, 0] == wanted
            else:
                verdict = context.verify(
                    [0],
                    as_rows(text[back:]),
                    as_rows([wanted]),
                    sampling=params,
                    pos=[back],
                    start=[len(prompt)],
                )
                assert verdict.tokens[0, 0] == wanted


@pytest.mark.parametrize("how", ["decode", "write at 0", "truncate", "clear", "shorter write"])
def test_where_text_begins_is_remembered_until_the_prompt_changes(
    draft_model: Model, make_context: MakeContext, how: str
) -> None:
    """Without ``start``, text begins behind the first call's tokens; a grammar shows where that is."""
    params = replace(GREEDY, grammar='root ::= "yes" "yes" "yes"')
    yes = b"yesyesyes"
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([5, 6])

    def go_on(tokens: list[int], seq: int = 0, **where: Any) -> tuple[list[int], bytes]:
        verdict = context.verify([seq], as_rows(tokens), sampling=params, **where)
        new: list[int] = verdict.tokens[0].tolist()
        return new, b"".join(draft_model.vocab.piece(t) for t in new)

    last, shown = go_on([7])
    last, more = go_on(last)
    shown += more
    assert yes.startswith(shown)
    assert shown
    context.memory.copy(0, 1)
    _, copied = go_on(last, seq=1)
    assert yes.startswith(shown + copied)
    prompt = make_prompt(draft_model, 9, seed=4).tolist()
    if how == "decode":  # what is decoded is prompt
        context.decode(prompt[:-1])
        _, again = go_on(prompt[-1:])
    elif how == "shorter write":
        _, again = go_on([9], pos=[1])
    else:
        if how == "truncate":
            context.memory.truncate(0, 0)
        elif how == "clear":
            context.memory.clear(0)
        _, again = go_on(prompt, pos=[0])
    assert again
    assert yes.startswith(again)


@pytest.mark.parametrize("what", ["decode", "verify", "draft", "score"])
def test_cancelling_from_another_thread_loses_nothing(
    draft_model: Model, make_context: MakeContext, what: str
) -> None:
    """Nor does it leave anything: what was computed by then is not in the way of the next write."""
    context = make_context(draft_model, n_ctx=1024, n_ubatch=8)
    prompt = make_prompt(draft_model, 8, seed=6).tolist()
    long = make_prompt(draft_model, 900, seed=7)
    other = make_prompt(draft_model, 30, seed=8)
    wanted = fresh_logits(draft_model, [*prompt, *other])[-1]
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: context.decode(long),
        "verify": lambda: context.verify([0], as_rows(long), as_rows([1, 2, 3]), sampling=GREEDY),
        "draft": lambda: context.draft([0], as_rows(long), n_max=8, sampling=GREEDY),
        "score": lambda: context.score(long[:400], [long[400:900]], seq_ids=[0]),
    }
    n_cancelled = 0
    for attempt in range(300):
        context.memory.clear()
        context.decode(prompt)
        timer = threading.Timer(0.001 * (attempt % 20), context.cancel)
        timer.start()
        try:
            calls[what]()
        except sllm.CancelledError:
            n_cancelled += 1
            held = [] if what == "score" else prompt
            assert tokens_of(context) == held
            timer.join()
            out = context.decode(
                other if held else np.array([*prompt, *other], dtype=np.int32), logits="last"
            )
            np.testing.assert_array_equal(out, wanted)
        finally:
            timer.join()
        if n_cancelled == 6:
            break
    assert n_cancelled == 6


def test_a_cancelled_draft_is_a_shorter_draft(target_model: Model, make_context: MakeContext) -> None:
    context = make_context(target_model, n_ctx=1024)
    prompt = make_prompt(target_model, 4, seed=6)
    params = without_end(target_model, GREEDY)
    own = one_by_one(target_model, prompt, params, 500, n_ctx=1024)
    context.decode(prompt)
    lengths = []
    done = threading.Event()

    def cancel() -> None:
        while not done.wait(0.05):
            context.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        for _ in range(50):
            try:
                draft = context.draft([0], prompt[-1:], n_max=500, sampling=params, pos=[3])
            except sllm.CancelledError:  # before the first token
                continue
            lengths.append(int(draft.lengths[0]))
            assert draft.tokens[0, : lengths[-1]].tolist() == own[: lengths[-1]]
            assert (draft.tokens[0, lengths[-1] :] == -1).all()
            assert tokens_of(context) == prompt.tolist()
            if lengths[-1] < 500:
                break
    finally:
        done.set()
        thread.join()
    assert lengths[-1] < 500
    draft = context.draft([0], prompt[-1:], n_max=40, sampling=params, pos=[3])
    assert draft.tokens[0].tolist() == own[:40]


# ---- everything in any order -------------------------------------------------------------------------------


class ContextMachine(RuleBasedStateMachine):
    """One context with several sequences, against lists of tokens, and fresh contexts for what comes next."""

    N_SEQS = 3
    MODEL: sllm.Model

    @initialize(n_batch=st.sampled_from([24, 2048]), n_ubatch=st.sampled_from([8, 512]))
    def begin(self, n_batch: int, n_ubatch: int) -> None:
        self.context = self.MODEL.context(
            n_ctx=self.N_SEQS * 256,
            n_seq_max=self.N_SEQS,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_outputs_max=24,
            **EXACT,
        )
        self.texts: list[list[int]] = [[] for _ in range(self.N_SEQS)]
        self.hints: dict[int, list[int]] = {}
        self.states: list[tuple[list[int], bytes]] = []

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.close()

    seq = st.integers(0, N_SEQS - 1)
    some_tokens = st.lists(st.integers(4, 2559), min_size=1, max_size=10)
    plain_samplings = samplings.map(lambda s: replace(s, grammar=None))

    def _place(self, data: st.DataObject, seq: int) -> int:
        return int(
            data.draw(st.integers(0, len(self.texts[seq])) | st.just(len(self.texts[seq])), label="pos")
        )

    @rule(data=st.data(), seqs=st.lists(seq, min_size=1, max_size=N_SEQS, unique=True))
    def decode(self, data: st.DataObject, seqs: list[int]) -> None:
        parts = [data.draw(self.some_tokens) for _ in seqs]
        pos = [self._place(data, s) for s in seqs]
        out = self.context.decode(parts, seq_id=seqs, pos=pos, logits="last")
        assert out is not None
        for row, s, part, p in zip(out, seqs, parts, pos, strict=True):
            self.texts[s] = self.texts[s][:p] + part
            np.testing.assert_array_equal(row, fresh_logits(self.MODEL, self.texts[s])[-1])

    @rule(data=st.data(), s=seq)
    def decode_again(self, data: st.DataObject, s: int) -> None:
        p = self._place(data, s)
        part = self.texts[s][p:]
        if part:
            out = self.context.decode(part, seq_id=s, pos=p, logits="last")
            np.testing.assert_array_equal(out, fresh_logits(self.MODEL, self.texts[s])[-1])

    @rule(
        data=st.data(),
        seqs=st.lists(seq, min_size=1, max_size=N_SEQS, unique=True),
        n_max=st.integers(0, 6),
        p_min=st.sampled_from([0.0, 0.2]),
    )
    def draft(self, data: st.DataObject, seqs: list[int], n_max: int, p_min: float) -> None:
        parts = [data.draw(self.some_tokens) for _ in seqs]
        pos = [self._place(data, s) for s in seqs]
        params = [data.draw(self.plain_samplings) for _ in seqs]
        draft = self.context.draft(seqs, as_rows(*parts), n_max=n_max, p_min=p_min, sampling=params, pos=pos)
        for row, (s, part, p, how) in enumerate(zip(seqs, parts, pos, params, strict=True)):
            self.texts[s] = self.texts[s][:p] + part
            self.hints[s] = draft.tokens[row, : draft.lengths[row]].tolist()
            with self.MODEL.context(n_ctx=256, **EXACT) as fresh:
                again = fresh.draft([0], as_rows(self.texts[s]), n_max=n_max, p_min=p_min, sampling=how)
            np.testing.assert_array_equal(draft.tokens[row], again.tokens[0])
            np.testing.assert_array_equal(draft.probs[row], again.probs[0])

    @rule(data=st.data(), seqs=st.lists(seq, min_size=1, max_size=N_SEQS, unique=True))
    def verify(self, data: st.DataObject, seqs: list[int]) -> None:
        parts, hints = [], []
        pos = [self._place(data, s) for s in seqs]
        params = [data.draw(self.plain_samplings) for _ in seqs]
        for s, p in zip(seqs, pos, strict=True):
            if p < len(self.texts[s]) and data.draw(st.booleans(), label="go on from what is there"):
                parts.append(self.texts[s][p:])
                hints.append(self.hints.get(s, [])[:7])
            else:
                parts.append(data.draw(self.some_tokens))
                hints.append(data.draw(st.lists(st.integers(-3, 2570), max_size=7)))
        verdict = self.context.verify(seqs, as_rows(*parts), as_rows(*hints), sampling=params, pos=pos)
        for row, (s, part, p, how, hint) in enumerate(zip(seqs, parts, pos, params, hints, strict=True)):
            text = self.texts[s][:p] + part
            n = int(verdict.n_accepted[row])
            own = verdict.tokens[row, : n + 1].tolist()
            logits = fresh_logits(self.MODEL, text + own[:-1])[len(text) - 1 :]
            for i, token in enumerate(own):
                so_far = text + own[:i]
                assert select(self.MODEL, how, logits[i], len(so_far), so_far)[0] == token
            assert own[:n] == hint[:n]
            if n < len(hint):  # rejected where it had to be
                assert own[n] != hint[n] or self.MODEL.vocab.is_eog(own[n])
            self.texts[s] = text + own[:-1]

    @rule(data=st.data(), s=seq)
    def truncate(self, data: st.DataObject, s: int) -> None:
        p = self._place(data, s)
        self.context.memory.truncate(s, p)
        del self.texts[s][p:]

    @rule(source=seq, to=seq)
    def copy(self, source: int, to: int) -> None:
        self.context.memory.copy(source, to)
        self.texts[to] = list(self.texts[source])

    @rule(s=seq)
    def clear(self, s: int) -> None:
        self.context.memory.clear(s)
        self.texts[s] = []

    @rule()
    def clear_all(self) -> None:
        self.context.memory.clear()
        self.texts = [[] for _ in range(self.N_SEQS)]

    @rule(s=seq)
    def save(self, s: int) -> None:
        self.states.append((list(self.texts[s]), self.context.save(s)))

    @precondition(lambda self: bool(self.states))
    @rule(data=st.data(), s=seq)
    def load(self, data: st.DataObject, s: int) -> None:
        text, state = data.draw(st.sampled_from(self.states))
        self.context.load(state, seq_id=s)
        self.texts[s] = list(text)

    @rule(s=seq, data=st.data())
    def refused(self, s: int, data: st.DataObject) -> None:
        """Errors change nothing."""
        with pytest.raises(ValueError, match=r"gap|negative|not in the vocabulary"):
            self.context.decode(
                [data.draw(st.sampled_from([5, -1, 2560])), -5], seq_id=s, pos=len(self.texts[s]) + 1
            )
        with pytest.raises(sllm.ContextFullError):
            self.context.verify([s], as_rows([5] * (257 - len(self.texts[s]))))

    @rule(prefix=some_tokens, part=some_tokens, s=seq)
    def score(self, prefix: list[int], part: list[int], s: int) -> None:
        (score,) = self.context.score(prefix, [part], seq_ids=[s])
        rows = log_softmax(fresh_logits(self.MODEL, prefix + part))
        assert score == pytest.approx(
            sum(rows[len(prefix) - 1 + i, t] for i, t in enumerate(part)), rel=1e-6, abs=1e-4
        )
        self.texts[s] = []

    @invariant()
    def memory_holds_what_was_committed(self) -> None:
        if hasattr(self, "texts"):
            for s, text in enumerate(self.texts):
                assert tokens_of(self.context, s) == text


def test_any_order_of_calls(draft_model: Model) -> None:
    ContextMachine.MODEL = draft_model
    run_state_machine_as_test(ContextMachine, settings=settings(examples(30), stateful_step_count=25))


# ---- vocabularies of different sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [2400, 2624])
def test_a_draft_with_a_padded_or_shorter_vocabulary(
    tmp_path: Any, draft_model: Model, make_context: MakeContext, n_tokens: int
) -> None:
    """What the draft cannot say, or the target does not know, costs acceptance and nothing else."""
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(n_tokens)
    params = without_end(draft_model, replace(PLAIN, seed=4, temperature=2.0))
    prompt = make_prompt(draft_model, 6, seed=3)
    prompt = prompt[prompt < 2400]
    wanted = one_by_one(draft_model, prompt, params, 24)
    with (
        sllm.Model(file.write(tmp_path / "other.gguf")) as other,
        other.context(n_ctx=256, **EXACT) as drafter,
        draft_model.context(n_ctx=256, **EXACT) as target,
    ):
        text = prompt.tolist()
        n_accepted = 0
        while len(text) < len(prompt) + len(wanted):
            known = [t for t in text if t < n_tokens]
            draft = drafter.draft([0], as_rows(known), n_max=4, sampling=params, pos=[0])
            verdict = target.verify([0], as_rows(text), draft, sampling=params, pos=[0])
            n = int(verdict.n_accepted[0])
            n_accepted += n
            text += verdict.tokens[0, : n + 1].tolist()
        assert text[len(prompt) :][: len(wanted)] == wanted
        assert n_accepted > 0

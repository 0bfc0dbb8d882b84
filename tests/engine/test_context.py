"""Contexts: the same logits in every grouping, positions, memory, saved states, scores."""

from __future__ import annotations

import contextlib
import gc
import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, fresh_logits, log_softmax, make_prompt, tokens_of

import sllm
from sllm import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oracles import Floats, Tokens

    from sllm.engine.context import Context
    from sllm.engine.model import Model

    MakeContext = Callable[..., Context]


@pytest.fixture(scope="module")
def text(target_model: Model) -> Tokens:
    return make_prompt(target_model, 60, seed=0)


@pytest.fixture(scope="module")
def rows(target_model: Model, text: Tokens) -> Floats:
    """The logits behind every token of ``text``, computed one token at a time."""
    with target_model.context(n_ctx=256, **EXACT) as context:
        out = []
        for i in range(len(text)):
            row = context.decode(text[i : i + 1], logits="last")
            assert row is not None
            out.append(row.copy())
    return np.array(out)


def decode(context: Context, *args: Any, **kwargs: Any) -> Floats:
    out = context.decode(*args, **kwargs)
    assert out is not None
    return out


@contextlib.contextmanager
def endless_cancels(context: Context) -> Iterator[None]:
    """A thread that cancels whatever computes."""
    done = threading.Event()

    def cancel() -> None:
        while not done.is_set():
            context.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ---- grouping ----------------------------------------------------------------------------------------------


def test_logits_none_last_and_all_agree(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)

    assert context.decode(text) is None
    context.memory.clear()
    last = decode(context, text, logits="last")
    assert last.shape == (target_model.vocab.n_tokens,)
    np.testing.assert_array_equal(last, rows[-1])
    context.memory.clear()
    every = decode(context, text, logits="all")
    assert every.shape == rows.shape
    assert every.dtype == np.float32
    np.testing.assert_array_equal(every, rows)
    one = decode(context, text[:1], pos=0, logits="all")
    assert one.shape == (1, target_model.vocab.n_tokens)


@pytest.mark.parametrize(
    ("n_batch", "n_ubatch", "n_outputs_max"), [(1, 1, 1), (7, 3, 1), (16, 16, 16), (64, 5, 3), (59, 64, 59)]
)
def test_chunks_of_any_size_give_the_same_logits(
    target_model: Model,
    make_context: MakeContext,
    text: Tokens,
    rows: Floats,
    n_batch: int,
    n_ubatch: int,
    n_outputs_max: int,
) -> None:
    context = make_context(target_model, n_batch=n_batch, n_ubatch=n_ubatch, n_outputs_max=n_outputs_max)
    assert context.n_batch <= max(n_batch, 32)

    np.testing.assert_array_equal(decode(context, text, logits="last"), rows[-1])
    np.testing.assert_array_equal(decode(context, text, pos=0, logits="all"), rows)
    context.decode(text[:50], pos=0)
    np.testing.assert_array_equal(decode(context, text[50:], logits="all"), rows[50:])


@examples(20)
@given(data=st.data())
def test_ragged_batches_give_what_single_sequences_give(draft_model: Model, data: st.DataObject) -> None:
    n_seqs = data.draw(st.integers(1, 5))
    kinds = st.sampled_from(["last", "all"])
    with draft_model.context(
        n_ctx=5 * 256, n_seq_max=5, n_batch=data.draw(st.sampled_from([8, 2048])), **EXACT
    ) as context:
        held: list[list[int]] = [[] for _ in range(5)]
        for _ in range(3):
            seqs = data.draw(st.permutations(range(5)))[:n_seqs]
            parts = [
                data.draw(st.lists(st.integers(0, draft_model.vocab.n_tokens - 1), min_size=1, max_size=9))
                for _ in seqs
            ]
            logits = data.draw(kinds)
            if max(len(p) for p in parts) * n_seqs > context.n_outputs_max:
                logits = "last"
            out = decode(context, parts, seq_id=seqs, logits=logits).copy()
            wanted = []
            for seq, part in zip(seqs, parts, strict=True):
                held[seq] += part
                alone = fresh_logits(draft_model, held[seq])
                wanted += list(alone[-1:] if logits == "last" else alone[-len(part) :])
            np.testing.assert_array_equal(out, np.array(wanted))
            assert [tokens_of(context, s) for s in range(5)] == held


def test_an_empty_write_takes_back_what_is_behind_it(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)
    context.decode(text)

    context.decode([], pos=20)
    assert tokens_of(context) == text[:20].tolist()
    np.testing.assert_array_equal(decode(context, text[20:30], logits="all"), rows[20:30])
    context.decode([])
    assert tokens_of(context) == text[:30].tolist()


# ---- views -------------------------------------------------------------------------------------------------


def test_views_are_read_only_and_show_the_newest_logits(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)
    view = decode(context, text[:5], logits="all")

    assert not view.flags.writeable
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    np.testing.assert_array_equal(view, rows[:5])
    again = decode(context, text[5:6], logits="last")
    assert np.shares_memory(view, again)
    np.testing.assert_array_equal(view[0], rows[5])


def test_more_rows_than_n_outputs_max_are_a_copy(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model, n_outputs_max=8)
    kept = decode(context, text[:9], logits="all")

    assert not kept.flags.writeable
    np.testing.assert_array_equal(kept, rows[:9])
    view = decode(context, text[9:17], logits="all")
    assert not np.shares_memory(kept, view)
    np.testing.assert_array_equal(kept, rows[:9])
    np.testing.assert_array_equal(view, rows[9:17])
    context.close()
    np.testing.assert_array_equal(kept, rows[:9])


def test_views_survive_the_context_and_the_model(text: Tokens, rows: Floats) -> None:
    with sllm.Model(embedded.TARGET) as model:
        context = model.context(n_ctx=256, **EXACT)
        first = decode(context, text[:3], logits="all")
        context.close()
        np.testing.assert_array_equal(first, rows[:3])
        other = model.context(n_ctx=256, **EXACT)
        second = decode(other, text[:30], logits="last")
    del model, context, other
    gc.collect()
    np.testing.assert_array_equal(first, rows[:3])
    np.testing.assert_array_equal(second, rows[29])
    part = second[10:20]
    del second, first
    gc.collect()
    np.testing.assert_array_equal(part, rows[29][10:20])


def test_a_view_of_few_rows_survives_a_call_for_many(
    target_model: Model, make_context: MakeContext, text: Tokens
) -> None:
    """llama.cpp moves its buffer when a batch has more rows than any before: that must be over by now."""
    context = make_context(target_model, n_outputs_max=60)
    view = decode(context, text[:1], logits="all")
    pages = decode(context, text[:60], pos=0, logits="all")

    assert np.shares_memory(view, pages)
    np.testing.assert_array_equal(view[0], pages[0])


# ---- positions ---------------------------------------------------------------------------------------------


def test_writing_at_a_position_makes_what_is_behind_it_void(
    target_model: Model, make_context: MakeContext, text: Tokens
) -> None:
    context = make_context(target_model)
    context.decode(text[:40])
    other = make_prompt(target_model, 5, seed=9)

    out = decode(context, other, pos=10, logits="all").copy()

    changed = np.concatenate([text[:10], other])
    assert tokens_of(context) == changed.tolist()
    np.testing.assert_array_equal(out, fresh_logits(target_model, changed)[10:])
    out = decode(context, text[:1], logits="last").copy()
    np.testing.assert_array_equal(out, fresh_logits(target_model, [*changed, text[0]])[-1])


def test_writing_the_same_again_gives_the_same_and_computes_little(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)
    context.decode(text)
    for begin, end in [(0, 60), (0, 30), (29, 31), (30, 60), (59, 60), (10, 40)]:
        np.testing.assert_array_equal(
            decode(context, text[begin:end], pos=begin, logits="last"), rows[end - 1]
        )
        assert tokens_of(context) == text[:end].tolist()
        if end < 60:
            np.testing.assert_array_equal(decode(context, text[end:], logits="all"), rows[end:])


def test_a_repeated_write_computes_nothing(draft_model: Model, make_context: MakeContext) -> None:
    """What computes nothing cannot be cancelled, however hard another thread tries."""
    context = make_context(draft_model, n_ctx=1024)
    long = make_prompt(draft_model, 900, seed=4)
    context.decode(long)
    with endless_cancels(context):
        for _ in range(30):
            context.decode(long, pos=0)
            assert context.memory.length() == 900
            context.decode(long[100:900], pos=100)
            context.decode([], pos=900)
        with pytest.raises(sllm.CancelledError):  # and what computes something can be
            for i in range(100):
                context.decode(np.roll(long, i), pos=0)


@pytest.mark.parametrize("pos", [61, 100, 2**31 - 1])
def test_a_gap_is_refused(target_model: Model, make_context: MakeContext, text: Tokens, pos: int) -> None:
    context = make_context(target_model)
    context.decode(text)

    with pytest.raises(ValueError, match=f"position {pos} leaves a gap: sequence 0 ends at 60"):
        context.decode(text[:1], pos=pos)
    assert tokens_of(context) == text.tolist()


@pytest.mark.parametrize("pos", [-1, -2, -(2**31)])
def test_a_negative_position_is_refused(
    target_model: Model, make_context: MakeContext, text: Tokens, pos: int
) -> None:
    context = make_context(target_model)
    context.decode(text)

    for call in (
        lambda: context.decode(text[:1], pos=pos),
        lambda: context.draft([0], text[:1], pos=[pos]),
        lambda: context.verify([0], text[:1], pos=[pos]),
        lambda: context.memory.truncate(0, pos),
    ):
        with pytest.raises(ValueError, match=r"negative|cannot truncate|expected 0 <= "):
            call()
    assert tokens_of(context) == text.tolist()


def test_a_full_context_refuses_more_and_loses_nothing(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256, n_seq_max=1)
    size = context.n_ctx_seq
    long = make_prompt(draft_model, size + 5, seed=2)
    with pytest.raises(sllm.ContextFullError, match=f"a sequence of this context holds {size}"):
        context.decode(long)
    assert context.memory.length() == 0
    context.decode(long[: size - 1])

    with pytest.raises(sllm.ContextFullError):
        context.decode(long[size - 1 : size + 1])
    assert context.memory.length() == size - 1
    with pytest.raises(sllm.ContextFullError):
        context.verify([0], [long[size - 1 : size + 1]])
    last = context.verify(
        [0], long[size - 1 : size], [[5, 6, 7]], sampling=GREEDY
    )  # room for it, for no draft
    assert last.n_accepted.tolist() == [0]
    assert tokens_of(context) == long[:size].tolist()
    for call in (
        lambda: context.decode(long[:1]),
        lambda: context.draft([0], long[:1]),
        lambda: context.verify([0], long[:1]),
        lambda: context.decode(long[:2], pos=size - 1),
    ):
        with pytest.raises(sllm.ContextFullError):
            call()
    assert tokens_of(context) == long[:size].tolist()
    np.testing.assert_array_equal(
        decode(context, long[size - 3 : size], pos=size - 3, logits="all"),
        fresh_logits(draft_model, long[:size])[-3:],
    )


# ---- memory ------------------------------------------------------------------------------------------------


def test_truncate_copy_and_clear(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model, n_ctx=1024, n_seq_max=3)
    memory = context.memory
    context.decode(text[:30])
    memory.copy(0, 2)
    memory.truncate(0, 10)

    assert [memory.length(i) for i in range(3)] == [10, 0, 30]
    np.testing.assert_array_equal(decode(context, text[10:12], seq_id=0, logits="all"), rows[10:12])
    np.testing.assert_array_equal(decode(context, text[30:31], seq_id=2, logits="last"), rows[30])
    memory.copy(2, 0)
    memory.copy(0, 0)
    memory.clear(2)
    assert tokens_of(context, 0) == text[:31].tolist()
    assert tokens_of(context, 2) == []
    np.testing.assert_array_equal(decode(context, text[31:33], seq_id=0, logits="all"), rows[31:33])
    memory.copy(1, 0)  # of an empty one
    assert memory.length(0) == 0
    np.testing.assert_array_equal(decode(context, text[:3], seq_id=0, logits="all"), rows[:3])
    memory.truncate(0, 3)
    memory.truncate(0, 0)
    np.testing.assert_array_equal(decode(context, text[:3], seq_id=0, logits="all"), rows[:3])
    memory.clear()
    assert [memory.length(i) for i in range(3)] == [0, 0, 0]
    for bad in (11, -1):
        with pytest.raises(ValueError, match="cannot truncate"):
            memory.truncate(0, bad)
    for bad in (3, -1, 2**31 - 1):
        for call in (
            lambda bad=bad: memory.length(bad),
            lambda bad=bad: memory.clear(bad),
            lambda bad=bad: memory.copy(0, bad),
            lambda bad=bad: memory.copy(bad, 0),
            lambda bad=bad: memory.truncate(bad, 0),
            lambda bad=bad: memory.tokens(bad),
        ):
            with pytest.raises(ValueError, match=r"does not exist|expected 0 <= "):
                call()


def test_copies_that_follow_each_other_at_once(
    target_model: Model, make_context: MakeContext, text: Tokens
) -> None:
    """llama.cpp puts copies off until it decodes: chains and swaps must come out as if it did not."""
    context = make_context(target_model, n_ctx=1024, n_seq_max=4)
    a, b = text[:20], text[20:45]
    context.decode([a, b], seq_id=[0, 1])
    context.memory.copy(0, 2)
    context.memory.copy(1, 0)
    context.memory.copy(2, 1)  # swapped
    context.memory.copy(0, 3)
    context.memory.clear(0)

    assert [tokens_of(context, i) for i in range(4)] == [[], a.tolist(), a.tolist(), b.tolist()]
    out = decode(context, [text[50:53]] * 3, seq_id=[1, 2, 3], logits="all")
    of_a = fresh_logits(target_model, [*a, *text[50:53]])[-3:]
    of_b = fresh_logits(target_model, [*b, *text[50:53]])[-3:]
    np.testing.assert_array_equal(out, np.concatenate([of_a, of_a, of_b]))


def test_sequences_that_share_one_pool_keep_apart(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    """With kv_unified a copy shares cells with its source; what happens to one must not happen to the other.
    Only the last bits may depend on other sequences here.
    """
    context = make_context(target_model, n_ctx=256, n_seq_max=3, kv_unified=True)
    assert context.n_ctx_seq == context.n_ctx
    context.decode(text[:30])
    context.memory.copy(0, 1)
    context.memory.copy(1, 2)
    context.memory.truncate(0, 10)
    other = make_prompt(target_model, 5, seed=9)
    context.decode(other, seq_id=0)
    state = context.save(1)
    context.memory.clear(2)

    out = decode(context, text[30:32], seq_id=1, logits="all")
    np.testing.assert_allclose(out, rows[30:32], atol=0.05)
    out = decode(context, text[:2], seq_id=0, logits="all")
    wanted = fresh_logits(target_model, [*text[:10], *other, *text[:2]])[-2:]
    np.testing.assert_allclose(out, wanted, atol=0.05)
    context.load(state, seq_id=2)
    assert [tokens_of(context, i)[:10] for i in range(3)] == [text[:10].tolist()] * 3
    np.testing.assert_allclose(decode(context, text[30:31], seq_id=2, logits="last"), rows[30], atol=0.05)
    with pytest.raises(sllm.ContextFullError):  # each may have it all, but not all of them
        context.decode([np.resize(text, 80)] * 3, seq_id=[0, 1, 2])
    assert [context.memory.length(i) for i in range(3)] == [17, 32, 31]
    np.testing.assert_allclose(decode(context, text[31:32], seq_id=2, logits="last"), rows[31], atol=0.05)


# ---- states ------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on_as_before(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model, n_ctx=1024, n_seq_max=2)
    other = make_context(target_model, n_ctx=512, n_seq_max=2)
    context.decode(text[:40])
    state = context.save()
    context.decode(text[:7], pos=3)

    context.load(state)
    assert tokens_of(context) == text[:40].tolist()
    np.testing.assert_array_equal(decode(context, text[40:45], logits="all"), rows[40:45])
    context.load(state, seq_id=1)
    np.testing.assert_array_equal(decode(context, text[40:45], seq_id=1, logits="all"), rows[40:45])
    np.testing.assert_array_equal(decode(context, text[45:46], seq_id=0, logits="last"), rows[45])
    other.load(state, seq_id=1)
    np.testing.assert_array_equal(decode(other, text[40:45], seq_id=1, logits="all"), rows[40:45])
    other.memory.truncate(1, 20)
    assert other.save(1) == other.save(1)
    np.testing.assert_array_equal(decode(other, text[20:25], seq_id=1, logits="all"), rows[20:25])


def test_a_state_holds_what_is_committed_and_no_draft(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)
    context.decode(text[:20])
    plain = context.save()
    context.draft([0], text[19:20], n_max=8, sampling=GREEDY, pos=[19])

    assert tokens_of(context) == text[:20].tolist()
    assert context.save() == plain
    context.load(plain)
    np.testing.assert_array_equal(decode(context, text[20:22], logits="all"), rows[20:22])


def test_an_empty_state_empties(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model)
    empty = context.save()
    context.decode(text)
    context.load(empty)

    assert context.memory.length() == 0
    np.testing.assert_array_equal(decode(context, text[:5], logits="all"), rows[:5])


@pytest.mark.parametrize("what", ["save", "load into source", "load into target", "clear, load into target"])
def test_states_and_copies_without_a_decode_between(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats, what: str
) -> None:
    """A copy that llama.cpp has put off must not reach over what happens to either sequence meanwhile."""
    context = make_context(target_model, n_ctx=1024, n_seq_max=3)
    context.decode(text[:30], seq_id=0)
    context.decode(text[5:25], seq_id=2)
    foreign = context.save(2)
    context.memory.copy(0, 1)
    held = {0: text[:30], 1: text[:30]}
    if what == "save":
        fresh = make_context(target_model, n_ctx=1024, n_seq_max=3)
        fresh.load(context.save(1), seq_id=2)
        np.testing.assert_array_equal(decode(fresh, text[30:31], seq_id=2, logits="last"), rows[30])
    else:
        into = 0 if "source" in what else 1
        if "clear" in what:
            context.memory.clear(into)
        context.load(foreign, seq_id=into)
        held[into] = text[5:25]
    for seq, tokens in held.items():
        assert tokens_of(context, seq) == tokens.tolist()
        out = decode(context, text[30:31], seq_id=seq, logits="last").copy()
        np.testing.assert_array_equal(out, fresh_logits(target_model, [*tokens, text[30]])[-1])


def test_a_full_sequence_can_be_copied_and_saved(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    full = make_prompt(draft_model, context.n_ctx_seq, seed=1)
    context.decode(full)
    context.memory.copy(0, 1)
    state = context.save(1)
    context.memory.clear()
    context.load(state)
    assert tokens_of(context) == full.tolist()
    context.memory.truncate(0, len(full) - 1)
    out = decode(context, full[-1:], logits="last")
    np.testing.assert_array_equal(out, fresh_logits(draft_model, full)[-1])


def test_damaged_states_are_refused(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model)
    prompt = make_prompt(draft_model, 12, seed=3)
    context.decode(prompt)
    state = context.save()
    keeper = make_context(draft_model)
    keeper.decode(prompt[:5])

    damaged = [b"", state[:7], state[:47], state[:-1], state[: len(state) // 2], state + b"x", b"x" * 1000]
    for at in [*range(48), 60, 100, 200, len(state) // 2, len(state) - 1]:
        flipped = bytearray(state)
        flipped[at] ^= 0x10
        damaged.append(bytes(flipped))
    wrong_lengths = (0, 1, 11, 13, 2**31, 2**32 - 1)
    damaged += [state[:40] + struct.pack("<I", n_tokens) + state[44:] for n_tokens in wrong_lengths]
    for data in damaged:
        with pytest.raises((ValueError, sllm.ContextFullError)):
            keeper.load(data)
        assert tokens_of(keeper) in ([], prompt[:5].tolist())
        keeper.decode(prompt[:5], pos=0)
    np.testing.assert_array_equal(
        decode(keeper, prompt[5:], logits="last"), fresh_logits(draft_model, prompt)[-1]
    )


def test_states_of_other_models_and_types_are_refused(
    draft_model: Model, target_model: Model, make_context: MakeContext
) -> None:
    context = make_context(draft_model)
    context.decode([5, 6, 7])
    state = context.save()

    for other in (make_context(target_model), make_context(draft_model, type_k="f16", type_v="f16")):
        other.decode([1, 2])
        with pytest.raises(ValueError, match="does not fit this context"):
            other.load(state)
        assert tokens_of(other) in ([], [1, 2])
        assert decode(other, [3], logits="last").shape == (2560,)
    context.decode(make_prompt(draft_model, 400, seed=0))
    small = make_context(draft_model, n_ctx=256)
    with pytest.raises((sllm.ContextFullError, ValueError)):
        small.load(context.save())
    for bad in ("text", 5, None):
        with pytest.raises((TypeError, ValueError)):
            context.load(bad)  # type: ignore[arg-type]


# ---- scores ------------------------------------------------------------------------------------------------


def score_by_hand(model: Model, prefix: Tokens, continuation: Tokens) -> float:
    rows = log_softmax(fresh_logits(model, np.concatenate([prefix, continuation])))
    at = np.arange(len(prefix) - 1, len(prefix) + len(continuation) - 1)
    return float(rows[at, continuation].sum())


@examples(15)
@given(
    n_prefix=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    n_seqs=st.integers(1, 4),
    n_outputs_max=st.sampled_from([4, 64]),
    seed=st.integers(0, 10**6),
)
def test_scores_are_sums_of_log_softmax(
    draft_model: Model, n_prefix: int, sizes: list[int], n_seqs: int, n_outputs_max: int, seed: int
) -> None:
    prefix = make_prompt(draft_model, n_prefix, seed=seed)
    parts = [make_prompt(draft_model, n, seed=seed + 1 + i) for i, n in enumerate(sizes)]
    with draft_model.context(
        n_ctx=256 * n_seqs, n_seq_max=n_seqs, n_outputs_max=n_outputs_max, **EXACT
    ) as context:
        scores = context.score(prefix, parts)
        wanted = [score_by_hand(draft_model, prefix, part) for part in parts]

        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, wanted, atol=1e-4, rtol=1e-6)
        np.testing.assert_array_equal(context.score(prefix, parts[::-1]), scores[::-1])
        other = make_prompt(draft_model, 5, seed=seed + 100)
        np.testing.assert_allclose(
            context.score(other, parts[:1]), score_by_hand(draft_model, other, parts[0]), atol=1e-4, rtol=1e-6
        )


def test_scores_sum_to_one(draft_model: Model, make_context: MakeContext) -> None:
    """Every continuation of one token there is."""
    context = make_context(draft_model, n_ctx=8 * 256, n_seq_max=8, n_outputs_max=8)
    scores = context.score([5, 6, 7], [[t] for t in range(draft_model.vocab.n_tokens)])

    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-4)


def test_scoring_leaves_other_sequences_alone(
    target_model: Model, make_context: MakeContext, text: Tokens, rows: Floats
) -> None:
    context = make_context(target_model, n_ctx=1024, n_seq_max=4)
    context.decode(text[:20], seq_id=1)
    parts = [text[:3], text[3:9], text[9:10]]

    scores = context.score(text[20:30], parts)

    assert [tokens_of(context, i) for i in range(4)] == [[], text[:20].tolist(), [], []]
    named = context.score(text[20:30], parts, seq_ids=[3])
    np.testing.assert_array_equal(named, scores)
    np.testing.assert_array_equal(decode(context, text[20:22], seq_id=1, logits="all"), rows[20:22])
    np.testing.assert_array_equal(context.score(text[20:30], parts), scores)


def test_sequences_that_were_scored_in_are_empty_and_the_prefix_is_still_known(
    draft_model: Model, make_context: MakeContext
) -> None:
    context = make_context(draft_model, n_ctx=2048, n_seq_max=2)
    prefix = make_prompt(draft_model, 900, seed=2)
    wanted = context.score(prefix, [[5], [6, 7]])
    assert [tokens_of(context, i) for i in (0, 1)] == [[], []]
    np.testing.assert_array_equal(
        decode(context, [8, 9], logits="all"), fresh_logits(draft_model, [8, 9])
    )  # at 0, not behind the prefix
    context.memory.clear(0)
    np.testing.assert_array_equal(context.score(prefix, [[5], [6, 7]]), wanted)
    with endless_cancels(context):
        context.decode(prefix[:-1], pos=0)  # computes nothing
    np.testing.assert_array_equal(
        decode(context, prefix[-1:], logits="last"), fresh_logits(draft_model, prefix)[-1]
    )


def test_scoring_works_again_after_an_error(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    prefix, parts = [5, 6, 7, 8], [[9, 10], [11]]
    wanted = context.score(prefix, parts)

    for bad_prefix, bad_parts in [
        ([5, 10**6, 7], parts),
        ([10**6], parts),
        (prefix, [[9], [10**6]]),
        (prefix, [[9], [11], [-1]]),
    ]:
        with pytest.raises(ValueError, match="not in the vocabulary"):
            context.score(bad_prefix, bad_parts)
        np.testing.assert_array_equal(context.score(prefix, parts), wanted)
    with pytest.raises(sllm.ContextFullError):
        context.score(prefix, [[1] * 253 + [2] * 2])
    np.testing.assert_array_equal(context.score(prefix, parts), wanted)
    longest = context.score(prefix, [[1] * 253])  # its last token need not be decoded
    assert np.isfinite(longest).all()


@pytest.mark.parametrize(("prefix", "parts"), [([], [[1]]), ([1], []), ([1], [[]]), ([1], [[2], []])])
def test_scoring_nothing_is_refused(
    draft_model: Model, make_context: MakeContext, prefix: list[int], parts: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        make_context(draft_model, n_ctx=256).score(prefix, parts)


def test_scoring_without_a_free_sequence_is_refused(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256)
    context.decode([1, 2, 3])

    with pytest.raises(ValueError, match="every sequence of this context is in use"):
        context.score([1], [[2]])
    assert tokens_of(context) == [1, 2, 3]
    context.score([1], [[2]], seq_ids=[0])
    for bad in ([1], [-1], [0, 0], []):
        with pytest.raises(ValueError, match=r"sequence|seq_ids"):
            context.score([1], [[2], [3]], seq_ids=bad)


# ---- arguments ---------------------------------------------------------------------------------------------


def test_sequences_are_checked(draft_model: Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([[1, 2], [3]], seq_id=[1, 0])
    for seq_id, tokens in [([0, 0], [[1], [1]]), ([2], [[1]]), ([-1], [[1]]), ([], []), ([0, 1], [[1]])]:
        with pytest.raises(ValueError, match=r"sequence|rows"):
            context.decode(tokens, seq_id=seq_id)
    with pytest.raises(ValueError, match="one for each of 2 sequences"):
        context.decode([[1], [2]], seq_id=[0, 1], pos=[0])
    with pytest.raises(ValueError, match="'none', 'last' or 'all'"):
        context.decode([1], logits="some")
    with pytest.raises(ValueError, match="0 tokens"):
        context.decode([], logits="last")
    assert [tokens_of(context, i) for i in (0, 1)] == [[3], [1, 2]]


@pytest.mark.parametrize("token", [-1, 2560, 2**31 - 1])
def test_ids_that_are_no_tokens_are_refused(
    draft_model: Model, make_context: MakeContext, token: int
) -> None:
    context = make_context(draft_model)
    context.decode([1, 2])
    for call in (
        lambda: context.decode([3, token]),
        lambda: context.draft([0], [[3, token]]),
        lambda: context.verify([0], [[3, token]]),
        lambda: context.verify([0], [token]),
    ):
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary of 2560 tokens"):
            call()
    assert tokens_of(context) == [1, 2]


def test_an_error_in_one_sequence_of_a_batch_changes_none(
    draft_model: Model, make_context: MakeContext
) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([[1, 2], [3, 4]], seq_id=[0, 1])
    calls: list[tuple[Any, Any]] = [
        ([[9], [2560]], [1, 1]),
        ([[9], [9]], [1, 3]),
        ([[9], [9] * 300], [1, 1]),
    ]
    for tokens, pos in calls:
        with pytest.raises((ValueError, sllm.ContextFullError)):
            context.decode(tokens, seq_id=[0, 1], pos=pos)
        with pytest.raises((ValueError, sllm.ContextFullError)):
            context.verify([0, 1], tokens, pos=pos, sampling=PLAIN)
        with pytest.raises((ValueError, sllm.ContextFullError)):
            context.draft([0, 1], tokens, pos=pos, sampling=PLAIN)
        assert [tokens_of(context, i) for i in (0, 1)] == [[1, 2], [3, 4]]

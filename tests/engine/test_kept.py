"""What is kept for the next call: what is in use, and the newest of the rest, within a bound."""

from __future__ import annotations

import gc
import threading
import weakref

from sllm import SamplingParams
from sllm.engine._ffi import ffi
from sllm.engine.kept import Kept
from sllm.engine.model import Model


class Value:
    """Something that can be looked at without holding it."""


def test_the_newest_are_kept() -> None:
    kept: Kept[int, Value] = Kept(3, 1000)
    for n in range(5):
        kept.put(n, Value(), 1)
    assert [kept.get(n) is not None for n in range(5)] == [False, False, True, True, True]
    kept.get(2)  # is the newest now
    kept.put(5, Value(), 1)
    assert [kept.get(n) is not None for n in range(6)] == [False, False, True, False, True, True]
    assert len(kept) == 3


def test_bytes_are_bounded_but_for_the_two_newest() -> None:
    kept: Kept[int, Value] = Kept(8, 100)
    for n in range(4):
        kept.put(n, Value(), 40)
    assert [kept.get(n) is not None for n in range(4)] == [False, False, True, True]
    kept.put(4, Value(), 1000)
    kept.put(5, Value(), 1000)
    assert [kept.get(n) is not None for n in range(6)] == [False] * 4 + [True] * 2
    kept.put(5, Value(), 10)  # in the other's place
    kept.put(6, Value(), 10)
    assert [kept.get(n) is not None for n in range(4, 7)] == [False, True, True]


def test_what_is_in_use_is_found_however_many_come() -> None:
    kept: Kept[int, Value] = Kept(2, 100)
    used = Value()
    kept.put(0, used, 1000)
    for n in range(1, 50):
        kept.put(n, Value(), 1000)
    assert kept.get(0) is used
    del used
    assert kept.get(0) is None


def test_clear() -> None:
    kept: Kept[int, Value] = Kept(2, 100)
    value = Value()
    kept.put(0, value, 1)
    gone = weakref.ref(value)
    del value
    kept.clear()
    assert gone() is None
    assert kept.get(0) is None
    assert len(kept) == 0


def test_a_value_that_comes_back_when_it_is_freed() -> None:
    kept: Kept[int, object] = Kept(2, 100)

    class Last:
        def __del__(self) -> None:
            kept.put(0, Value(), 1)

    kept.put(1, Last(), 1)

    def push_out() -> None:
        for n in (2, 3):
            kept.put(n, Value(), 1)

    thread = threading.Thread(target=push_out, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


# ---- compiled samplings and grammars -----------------------------------------------------------------------


def large(n: int) -> SamplingParams:
    """Parameters whose grammar takes some megabytes, by its size."""
    return SamplingParams(grammar=f'root ::= "a" # {n}{"x" * 70_000}')


def test_large_grammars_are_not_kept_for_nobody(draft_model: Model) -> None:
    grammars = [weakref.ref(draft_model.grammars.compiled(large(n).grammar, None)) for n in range(6)]
    for n in range(6, 12):
        draft_model.compiled(large(n))
    gc.collect()  # the first one of a vocabulary looks for chat templates, and what that raises goes round
    assert [one() for one in grammars] == [None] * 6
    assert len(draft_model._samplings) <= 64
    assert len(draft_model.grammars._compiled) <= 2


def test_small_ones_are_kept(draft_model: Model) -> None:
    def compiled(n: int) -> object:
        return draft_model.grammars.compiled(f'root ::= "a" # {n}', None)

    grammars = [weakref.ref(compiled(n)) for n in range(8)]
    assert all(one() is compiled(n) for n, one in enumerate(grammars))


def test_a_sampling_in_use_is_not_compiled_again(draft_model: Model) -> None:
    used = SamplingParams(seed=77, grammar='root ::= "a" # in use')
    held = draft_model.compiled(used)
    grammar = weakref.ref(draft_model.grammars.compiled(used.grammar, None))
    for n in range(80):
        draft_model.compiled(SamplingParams(seed=n, grammar=f'root ::= "a" # {n % 10}'))
    assert draft_model.compiled(used) is held
    assert grammar() is not None
    assert draft_model.grammars.compiled(used.grammar, None) is grammar()


def test_parameters_are_found_by_what_they_are_not_where(draft_model: Model) -> None:
    """Most of these take the place of one that is gone."""
    compiled = [draft_model.compiled(SamplingParams(seed=seed)) for seed in range(3000)]
    assert len({int(ffi.cast("intptr_t", one)) for one in compiled}) == 3000
    assert len(draft_model._asked) <= 1024
    for seed in range(2990, 3000):
        same = SamplingParams(seed=seed)
        assert draft_model.compiled(same) is draft_model.compiled(same) is compiled[seed]


def test_many_biases_count(draft_model: Model) -> None:
    n_vocab = draft_model.vocab.n_tokens
    for seed in range(80):
        biases = [(token % n_vocab, -1.0) for token in range(2000)]
        draft_model.compiled(SamplingParams(seed=seed, logit_bias=biases))
    assert len(draft_model._samplings) < 60

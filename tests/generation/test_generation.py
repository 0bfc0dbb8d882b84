"""generate(): the text does not depend on the draft, and every run says the truth about its part of it."""

from __future__ import annotations

import codecs
import gc
import math
import random
import threading
import zlib
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, make_prompt, one_by_one, without_end

import sllm
from sllm.draft.drafters import CallableDrafter, Drafter, ModelDrafter, NGramDrafter
from sllm.engine import params as engine_params
from sllm.engine.sampling import SamplingParams
from sllm.generation import generate as generation
from sllm.targets.base import Commit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from oracles import Tokens

    from sllm.engine.model import Model
    from sllm.engine.vocab import Vocab
    from sllm.generation.text_stream import Run, TextStream

# Whether speculation pays is measured, and differs from machine to machine. With these it always does.


class ForcedModel(ModelDrafter):
    adaptive = False


class Forced(CallableDrafter):
    adaptive = False


class ForcedNGrams(NGramDrafter):
    adaptive = False

    def __init__(self) -> None:
        super().__init__(n_max=3, n_min=1)


@pytest.fixture(scope="module")
def target(target_model: Model) -> Iterator[sllm.LocalTarget]:
    """One target for all tests of this module, so that each begins with the memory of the one before."""
    with sllm.LocalTarget(target_model, n_ctx=512, **EXACT) as target:
        yield target


@pytest.fixture(scope="module")
def drafter(draft_model: Model) -> Iterator[ForcedModel]:
    with ForcedModel(draft_model, n_ctx=512, **EXACT) as drafter:
        yield drafter


@pytest.fixture(params=[False, True], ids=["in turns", "at once"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the draft goes on while the target verifies, on any number of cores."""
    monkeypatch.setattr(generation, "can_overlap", lambda *_: bool(request.param))
    return bool(request.param)


def tokens_in(runs: list[Run]) -> list[int]:
    return [t for run in runs for t in run.tokens]


def shown_text(vocab: Vocab, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, str, bool]:
    """How many of the tokens are used, what they show, and whether a stop string ended it."""
    for used in range(1, len(tokens) + 1):
        # Half a character is no text yet, and no part of a stop string.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(vocab.piece(t) for t in tokens[:used]))
        found = [at for at in (text.find(s) for s in stop) if at >= 0]
        if found:
            return used, text[: min(found)], True
    return len(tokens), b"".join(vocab.piece(t) for t in tokens).decode("utf-8", "replace"), False


def check_runs(stream: TextStream, runs: list[Run], n_prompt: int, whole: str) -> None:
    """What holds for every text."""
    pos = n_prompt
    for run in runs:
        assert run.pos == pos
        assert run.tokens or run.text
        assert run.source in ("draft", "target")
        assert run.n_accepted == (len(run.tokens) if run.source == "draft" else 0)
        pos += len(run.tokens)
    text = "".join(run.text for run in runs)
    assert text == whole
    if "\ufffd" not in whole:
        assert all("\ufffd" not in run.text for run in runs)
    stats = stream.stats
    assert stats.n_prompt == n_prompt
    assert stats.n_tokens == len(tokens_in(runs))
    assert 0 <= stats.n_accepted <= stats.n_drafted
    assert 0 <= stats.acceptance <= 1
    if stats.finish_reason != "stop":  # that drops what was committed behind it
        assert sum(run.n_accepted for run in runs) == stats.n_accepted
        assert stats.n_tokens == stats.n_passes + stats.n_accepted
    with pytest.raises(StopIteration):
        next(stream)


# ---- the text ----------------------------------------------------------------------------------------------

PROMPTS = [
    "Once upon a time",
    "你好，我的名字是",
    "1 + 2 = ",
    "Q: Wo ist der Fluß? 🙂\nA:",
    "the cat the cat the cat",
    "\n",
]

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty_repeat=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([(), ((0, -math.inf), (2, -math.inf))]),
    grammar=st.sampled_from([None, None, None, "root ::= [a-z ,.]{3,30}", 'root ::= ("你" | "好" | "\\n")*']),
    seed=st.integers(0, 2**64 - 1),
).map(lambda s: replace(s, logit_bias=()) if s.grammar else s)  # a grammar must be able to end


def make_drafts(
    data: st.DataObject, drafter: ForcedModel, wanted: list[int], n_prompt: int, n_vocab: int
) -> Drafter | str | Callable[[Tokens, int], Any] | None:
    """One of everything that may draft."""
    rng = random.Random(data.draw(st.integers(0, 999), label="drafter seed"))

    def perfect(tokens: Tokens, n_max: int) -> list[int]:
        at = len(tokens) - n_prompt
        return wanted[at : at + n_max]

    def garbage(tokens: Tokens, n_max: int) -> list[int]:
        right = perfect(tokens, rng.randint(0, n_max))
        wrong = [
            rng.choice([-1, -(2**31), 2**31 - 1, n_vocab, 0, 2, rng.randrange(n_vocab)])
            for _ in range(rng.randint(0, 40))
        ]
        return right + wrong

    return {
        "none": None,
        "model": drafter,
        "ngram": "ngram",
        "eager ngrams": ForcedNGrams(),
        "perfect": Forced(perfect),
        "garbage": Forced(garbage),
        "empty": Forced(lambda _tokens, _n_max: []),
        "perfect callable": perfect,
        "garbage callable": garbage,
        "empty callable": lambda _tokens, _n_max: None,
    }[
        data.draw(
            st.sampled_from(
                [
                    "model",
                    "model",
                    "model",
                    "ngram",
                    "eager ngrams",
                    "perfect",
                    "garbage",
                    "garbage",
                    "empty",
                    "perfect callable",
                    "garbage callable",
                    "empty callable",
                    "none",
                ]
            ),
            label="drafter",
        )
    ]


@examples(45)
@given(data=st.data(), params=samplings, max_tokens=st.integers(1, 40))
def test_the_text_does_not_depend_on_the_draft(
    overlap: bool,
    target: sllm.LocalTarget,
    drafter: ForcedModel,
    data: st.DataObject,
    params: SamplingParams,
    max_tokens: int,
) -> None:
    vocab = target.vocab
    if data.draw(st.booleans(), label="prompt of text"):
        text = data.draw(st.sampled_from(PROMPTS))
        prompt: Any = text
        ids = vocab.encode(text)
    else:
        prompt = ids = make_prompt(
            target.model, data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 99))
        )
    wanted = one_by_one(target.model, ids, params, max_tokens)
    whole = shown_text(vocab, wanted, ())[1]
    stop: list[str] = data.draw(st.sampled_from([[], [], ["@@never@@"], [" the", "\n\n"]]))
    if whole and data.draw(st.booleans(), label="stop inside the text"):
        at = data.draw(st.integers(0, len(whole) - 1))
        stop = [*stop, whole[at : at + data.draw(st.integers(1, 6))]]
    used, shown, stopped = shown_text(vocab, wanted, stop)

    stream = sllm.generate(
        target,
        prompt,
        draft=make_drafts(data, drafter, wanted, len(ids), vocab.n_tokens),
        sampling=params,
        max_tokens=max_tokens,
        stop=stop,
    )
    runs = list(stream)

    assert tokens_in(runs) == wanted[:used]
    check_runs(stream, runs, len(ids), shown)
    assert stream.stats.target_seconds <= stream.stats.seconds
    reason = "stop" if stopped else "eog" if vocab.is_eog(wanted[-1]) else "length"
    assert stream.stats.finish_reason == reason


def test_drafts_are_really_used(overlap: bool, target: sllm.LocalTarget, draft_model: Model) -> None:
    """A model drafting for itself is right every time; so is whoever knows the text."""
    params = replace(without_end(target.model, PLAIN), seed=11)
    prompt = make_prompt(target.model, 5, seed=11)
    wanted = one_by_one(target.model, prompt, params, 60)
    with ForcedModel(target.model, n_ctx=256, **EXACT) as same:
        for draft in (same, Forced(lambda tokens, n_max: wanted[len(tokens) - 5 :][:n_max])):
            stream = sllm.generate(target, prompt, draft=draft, sampling=params, max_tokens=60)
            runs = list(stream)
            assert tokens_in(runs) == wanted
            # At most 16 and one at once; a tree has other ways to go on besides, in the place of deeper ones.
            branches = draft is same and target.context.can_branch
            assert stream.stats.n_passes <= (8 if branches else 5)
            assert stream.stats.passes_per_token <= stream.stats.n_passes / 60
            assert branches or stream.stats.acceptance == 1
            assert stream.stats.tokens_per_s > 0
            assert sum(run.source == "draft" for run in runs) == stream.stats.n_passes


def test_models_made_into_targets_and_drafters_are_left_to_the_caller(
    target_model: Model, draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_params, "available_cores", lambda: 1)
    params = SamplingParams(temperature=0.0)
    stream = sllm.generate(target_model, "Once", draft=draft_model, sampling=params, max_tokens=12)
    text = stream.text()

    assert not target_model.closed
    assert not draft_model.closed
    assert stream.stats.n_tokens <= 12
    assert text == stream.text() + text  # nothing is left
    assert sllm.generate(
        target_model, target_model.vocab.encode("Once").tolist(), sampling=params, max_tokens=1
    ).text() == (
        sllm.generate(target_model, target_model.vocab.encode("Once"), sampling=params, max_tokens=1).text()
    )


@pytest.mark.parametrize("forced", [False, True])
def test_a_text_ends_where_the_context_is_full(target_model: Model, draft_model: Model, forced: bool) -> None:
    with (
        sllm.LocalTarget(target_model, n_ctx=256, **EXACT) as target,
        ForcedModel(draft_model, n_ctx=256, **EXACT) as drafter,
    ):
        size = target.context.n_ctx_seq
        params = without_end(target_model, GREEDY)
        prompt = make_prompt(target_model, size - 9, seed=1)
        wanted = one_by_one(target_model, prompt, params, 9)
        for draft in (drafter, Forced(lambda _tokens, _n_max: wanted * 3)):
            stream = sllm.generate(target, prompt, draft=draft if forced else None, sampling=params)
            runs = list(stream)
            assert tokens_in(runs) == wanted
            assert stream.stats.finish_reason == "context"
            check_runs(stream, runs, len(prompt), shown_text(target.vocab, wanted, ())[1])
        exact = sllm.generate(
            target, prompt, draft=drafter if forced else None, sampling=params, max_tokens=9
        )
        assert tokens_in(list(exact)) == wanted
        assert exact.stats.finish_reason == "length"
        full = sllm.generate(target, make_prompt(target_model, size, seed=1), sampling=params)
        assert list(full) == []
        assert full.stats.finish_reason == "context"
        with pytest.raises(sllm.ContextFullError):
            sllm.generate(target, make_prompt(target_model, size + 1, seed=1), sampling=params)
        assert tokens_in(list(sllm.generate(target, prompt, sampling=params))) == wanted


def test_a_drafter_with_a_smaller_context_ends_before_the_text_does(
    target_model: Model, draft_model: Model
) -> None:
    with (
        sllm.LocalTarget(target_model, n_ctx=512, **EXACT) as target,
        ForcedModel(draft_model, n_ctx=256, **EXACT) as drafter,
    ):
        params = replace(without_end(target_model, PLAIN), seed=2)
        prompt = make_prompt(target_model, 235, seed=1)
        wanted = one_by_one(target_model, prompt, params, 60)
        stream = sllm.generate(target, prompt, draft=drafter, sampling=params, max_tokens=60)
        assert tokens_in(list(stream)) == wanted


@examples(10)
@given(data=st.data())
def test_texts_one_after_another_share_what_they_can(draft_model: Model, data: st.DataObject) -> None:
    """A conversation, its repetition, its branches: each text is that of a fresh target."""
    params = without_end(draft_model, replace(PLAIN, seed=data.draw(st.integers(0, 99)), top_k=40))
    with (
        sllm.LocalTarget(draft_model, n_ctx=256, **EXACT) as target,
        ForcedModel(draft_model, n_ctx=256, **EXACT) as drafter,
    ):
        history: list[int] = make_prompt(draft_model, 4, seed=1).tolist()
        for _ in range(5):
            history = history[: data.draw(st.integers(1, len(history)))] + data.draw(
                st.lists(st.integers(4, 2559), max_size=4)
            )
            n = data.draw(st.integers(1, 16))
            draft = data.draw(st.sampled_from([None, drafter, "ngram"]))
            stream = sllm.generate(target, history, draft=draft, sampling=params, max_tokens=n)
            got = [
                t
                for run, _ in zip(stream, range(data.draw(st.integers(1, 8))), strict=False)
                for t in run.tokens
            ]
            stream.close()  # perhaps before its end
            assert got == one_by_one(draft_model, history, params, n)[: len(got)]
            assert got
            history += got
            assert target.context.memory.tokens().tolist() == history[:-1] or len(got) < n


# ---- characters and stop strings, over a target that follows a script --------------------------------------


class ScriptedGeneration:
    can_branch = False

    def __init__(self, script: list[int], n_prompt: int, max_tokens: int | None, vocab: Vocab) -> None:
        self._script = script if max_tokens is None else script[:max_tokens]
        self._at = 0
        self._start = n_prompt
        self._vocab = vocab
        self._hint: tuple[int, list[int]] = (0, [])
        self.hints: list[tuple[int, list[int]]] = []
        self.commits: list[Commit] = []
        self.finish_reason: str | None = None
        self.closed = False

    def __next__(self) -> Commit:
        pos, hinted = self._hint
        assert pos in (0, self._start + self._at)
        ahead = self._script[self._at :]
        n = 0
        while n < min(len(hinted), len(ahead) - 1) and hinted[n] == ahead[n]:
            n += 1
        commit = Commit(self._start + self._at, tuple(ahead[: n + 1]), n, len(hinted), 1e-3)
        self.commits.append(commit)
        self._at += n + 1
        if self._at == len(self._script):
            self.finish_reason = "eog" if self._vocab.is_eog(self._script[-1]) else "length"
        return commit

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        self._hint = (pos, list(tokens))
        self.hints.append(self._hint)

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class ScriptedTarget:
    """A target from outside the package: all that generate() may ask for is the protocol."""

    def __init__(self, vocab: Vocab, script: Sequence[int]) -> None:
        self.vocab = vocab
        self.script = list(script)
        self.generations: list[ScriptedGeneration] = []

    def open(self, tokens: Any, sampling: SamplingParams, max_tokens: int | None) -> ScriptedGeneration:
        self.generations.append(ScriptedGeneration(self.script, len(tokens), max_tokens, self.vocab))
        return self.generations[-1]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def byte_tokens(draft_model: Model) -> list[int]:
    """A token for each byte."""
    found = {draft_model.vocab.piece(t): t for t in reversed(range(draft_model.vocab.n_tokens))}
    return [found[bytes([b])] for b in range(256)]


@examples(80)
@given(
    text=st.text(alphabet=st.sampled_from(list("ab .你好😀é\ufffd\n")), min_size=1, max_size=25),
    damage=st.none() | st.tuples(st.integers(0, 60), st.sampled_from([0x80, 0xE4, 0xFF])),
    stop=st.lists(st.text(alphabet=st.sampled_from(list("ab .你好😀")), min_size=1, max_size=4), max_size=3),
    chunk=st.sampled_from([0, 1, 3, 50]),
)
def test_characters_and_stop_strings_spread_over_tokens(
    draft_model: Model,
    byte_tokens: list[int],
    text: str,
    damage: tuple[int, int] | None,
    stop: list[str],
    chunk: int,
) -> None:
    """A token for every byte, committed one at a time or many at once."""
    vocab = draft_model.vocab
    data = bytearray(text.encode())
    if damage is not None:
        data[damage[0] % len(data)] = damage[1]
    script = [byte_tokens[b] for b in data]
    used, shown, stopped = shown_text(vocab, script, stop)
    target = ScriptedTarget(vocab, script)
    assert isinstance(target, sllm.Target)
    perfect = Forced(lambda tokens, n_max: script[len(tokens) - 2 :][: min(n_max, chunk)])

    stream = sllm.generate(target, [5, 6], draft=perfect, stop=stop)
    runs = list(stream)

    assert tokens_in(runs) == script[:used]
    check_runs(stream, runs, 2, shown)
    assert stream.stats.finish_reason == ("stop" if stopped else "length")
    assert target.generations[0].closed
    before = ""
    for run in runs:  # at every moment what is shown is a beginning of the text, and no stop string
        before += run.text
        assert shown.startswith(before)
        assert not any(s in before for s in stop)


def test_text_is_shown_as_soon_as_it_is_certain(draft_model: Model, byte_tokens: list[int]) -> None:
    script = [byte_tokens[b] for b in "xSTOxS你".encode()]
    stream = sllm.generate(ScriptedTarget(draft_model.vocab, script), [5], stop=["STOP", "TO!"])

    assert [run.text for run in stream] == ["x", "", "", "", "STOx", "", "", "", "S你"]


def test_hints_are_what_the_draft_says_behind_the_committed_text(overlap: bool, draft_model: Model) -> None:
    """Token by token, also where a part of the chain was drafted behind something that turned out wrong."""
    script = make_prompt(draft_model, 300, seed=5).tolist()

    def say(tokens: list[int]) -> int:
        """Right three times out of four, and a function of everything before."""
        dice = zlib.crc32(np.array(tokens, dtype=np.int32).tobytes())
        return dice % 2000 + 4 if dice % 4 == 0 or len(tokens) >= 303 else script[len(tokens) - 3]

    def propose(tokens: Tokens, n_max: int) -> list[int]:
        chain: list[int] = tokens.tolist()
        for _ in range(min(n_max, 5)):
            chain.append(say(chain))
        return chain[len(tokens) :]

    target = ScriptedTarget(draft_model.vocab, script)
    stream = sllm.generate(target, [5, 6, 7], draft=Forced(propose))
    assert tokens_in(list(stream)) == script
    made = target.generations[0]
    assert len(made.hints) == len(made.commits) == stream.stats.n_passes
    text = [5, 6, 7, *script]
    for (pos, chain), commit in zip(made.hints, made.commits, strict=True):
        assert pos == commit.pos
        assert 1 <= len(chain) <= 16
        for i, token in enumerate(chain):
            assert token == say(text[:pos] + chain[:i])
    # a chain that was drafted meanwhile goes on from the one that was verified
    assert (max(len(chain) for _, chain in made.hints) > 5) == overlap


def test_arguments_in_the_forms_that_others_take(target: sllm.LocalTarget) -> None:
    count: Any = np.int64(3)
    stream = sllm.generate(target, [5, 6], sampling=GREEDY, max_tokens=count, stop=None)
    assert sum(len(run.tokens) for run in stream) <= 3


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], [None], b"x", 5, [b"x"]])
def test_bad_stop_strings_are_refused(target: sllm.LocalTarget, stop: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        sllm.generate(target, "a", stop=stop)
    assert "stop" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_tokens": 0}, ValueError),
        ({"max_tokens": -1}, ValueError),
        ({"max_tokens": 1.5}, ValueError),
        ({"max_tokens": True}, ValueError),
        ({"sampling": {"temperature": 1}}, TypeError),
        ({"draft": "bigram"}, ValueError),
        ({"draft": 5}, TypeError),
        ({"prompt": ""}, ValueError),
        ({"prompt": []}, ValueError),
        ({"prompt": [2560]}, ValueError),
        ({"prompt": [5, -1]}, ValueError),
        ({"prompt": [5, 2560, 5]}, ValueError),
        ({"prompt": np.array([1.0])}, TypeError),
        ({"prompt": None}, TypeError),
        ({"target": "model.gguf"}, TypeError),
        ({"target": None}, TypeError),
        ({"sampling": SamplingParams(grammar="root ::= [")}, ValueError),
        ({"sampling": SamplingParams(logit_bias={10**6: 1.0})}, ValueError),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_target_free(
    target: sllm.LocalTarget, arguments: dict[str, Any], error: type[Exception]
) -> None:
    good: dict[str, Any] = {"target": target, "prompt": [5, 6], "sampling": GREEDY, "max_tokens": 2}
    given_ = {**good, **arguments}
    with pytest.raises(error):
        sllm.generate(given_.pop("target"), given_.pop("prompt"), **given_).text()
    stream = sllm.generate(target, [5, 6], sampling=GREEDY, max_tokens=2)
    assert tokens_in(list(stream)) == one_by_one(target.model, [5, 6], GREEDY, 2)


# ---- ending early ------------------------------------------------------------------------------------------


def test_one_text_at_a_time(target: sllm.LocalTarget, overlap: bool, drafter: ForcedModel) -> None:
    params = without_end(target.model, GREEDY)
    wanted = one_by_one(target.model, [5, 6, 7], params, 3)

    def is_free() -> bool:
        try:
            with sllm.generate(target, [5, 6, 7], sampling=params, max_tokens=3) as stream:
                assert tokens_in(list(stream)) == wanted
        except sllm.BusyError:
            return False
        return True

    def begin() -> TextStream:
        return sllm.generate(target, "Once upon a time", draft=drafter, sampling=params)

    stream = begin()
    assert not is_free()
    next(stream)
    assert not is_free()
    stream.close()
    assert is_free()
    assert list(stream) == []
    stream.close()
    with begin() as stream:
        next(stream)
    assert is_free()
    stream = begin()
    next(stream)
    del stream
    gc.collect()
    assert is_free()
    for _run in begin():
        break
    gc.collect()
    assert is_free()
    stream = begin()
    del stream  # nothing was read
    gc.collect()
    assert is_free()


def test_what_a_callable_raises_is_raised_where_the_text_is_read(
    target: sllm.LocalTarget, overlap: bool
) -> None:
    params = without_end(target.model, GREEDY)
    wanted = one_by_one(target.model, [5, 6, 7], params, 30)
    for n_good in (0, 1, 2, 5):
        calls = 0

        def propose(_tokens: Tokens, _n_max: int, n_good: int = n_good) -> list[int]:
            nonlocal calls
            calls += 1
            if calls > n_good:
                raise LookupError("no idea")
            return wanted[len(_tokens) - 3 :][:2]

        stream = sllm.generate(target, [5, 6, 7], draft=Forced(propose), sampling=params, max_tokens=30)
        got: list[int] = []
        with pytest.raises(LookupError, match="no idea"):
            for run in stream:
                got += run.tokens
        assert got == wanted[: len(got)]
        assert list(stream) == []
        again = sllm.generate(target, [5, 6, 7], sampling=params, max_tokens=30)
        assert tokens_in(list(again)) == wanted
    for bad in ("abc", [1.5], 7):
        with pytest.raises(TypeError, match="the draft"):
            list(
                sllm.generate(
                    target, [5, 6, 7], draft=lambda _t, _n, bad=bad: bad, sampling=params, max_tokens=30
                )
            )


def test_a_generation_is_cancelled_from_another_thread(target_model: Model) -> None:
    with sllm.LocalTarget(target_model, n_ctx=1024, **EXACT) as target:
        params = without_end(target_model, GREEDY)
        prompt = make_prompt(target_model, 4, seed=1)
        wanted = one_by_one(target_model, prompt, params, 5)
        generation = target.open(prompt, params, None)
        timer = threading.Timer(0.05, generation.cancel)
        timer.start()
        with pytest.raises(sllm.CancelledError):
            while True:
                next(generation)
        timer.join()
        with pytest.raises(sllm.CancelledError):
            next(generation)
        with pytest.raises(sllm.BusyError):
            target.open(prompt, params, None)
        generation.close()
        with pytest.raises(sllm.ClosedError):
            next(generation)
        assert tokens_in(list(sllm.generate(target, prompt, sampling=params, max_tokens=5))) == wanted


# ---- the local target's side of the protocol ---------------------------------------------------------------


def test_hints_are_compared_with_what_is_committed(target: sllm.LocalTarget) -> None:
    params = replace(without_end(target.model, PLAIN), seed=6)
    prompt = make_prompt(target.model, 4, seed=6)
    wanted = one_by_one(target.model, prompt, params, 40)
    text = [*prompt.tolist(), *wanted]
    with ExitStack() as stack:
        generation = target.open(prompt, params, 40)
        stack.callback(generation.close)

        def step(*hints: tuple[int, list[int]]) -> tuple[int, int]:
            for pos, tokens in hints:
                generation.hint(pos, tokens)
            commit = next(generation)
            end = commit.pos + len(commit.tokens)
            assert list(commit.tokens) == text[commit.pos : end]
            assert commit.n_accepted == len(commit.tokens) - 1
            assert commit.n_verified >= commit.n_accepted
            return commit.n_verified, commit.n_accepted

        assert step() == (0, 0)  # 5 are committed
        assert step((5, text[5:8])) == (3, 3)
        assert step() == (0, 0)  # a hint serves once; 10
        assert step((0, text[0:13])) == (3, 3)  # from the beginning of it all; 14
        assert step((12, text[12:17])) == (3, 3)  # agrees with the last two; 18
        assert step((12, [*text[12:17], 9 + text[17], 7])) == (0, 0)  # disagrees in the last; 19
        assert step((20, text[20:24])) == (0, 0)  # leaves a gap; 20
        assert step((-3, text[:24])) == (0, 0)  # 21
        assert step((0, text[:21])) == (0, 0)  # says nothing new; 22
        assert step((22, [])) == (0, 0)  # 23
        assert step((23, text[23:27]), (23, text[23:24])) == (1, 1)  # the newest counts; 25
        assert step((25, [text[25], text[26] + 1, 5])) == (3, 1)  # 27
        assert step((27, [-1, 10**12]))[1] == 0  # 28
        n_verified, n_accepted = step((28, text[28:] + [5] * 50))  # more than may be committed
        assert n_accepted == n_verified == len(text) - 28 - 1
        assert generation.finish_reason == "length"
        with pytest.raises(StopIteration):
            next(generation)


def test_local_targets_hold_what_they_say(target_model: Model) -> None:
    target = sllm.LocalTarget(target_model, n_ctx=256, **EXACT)
    assert isinstance(target, sllm.Target)
    assert target.vocab is target_model.vocab
    assert "target.gguf" in repr(target)
    stream = sllm.generate(target, "a", sampling=GREEDY)
    target.close()
    target.close()
    assert "closed" in repr(target)
    with pytest.raises(sllm.ClosedError):
        next(stream)
    with pytest.raises(sllm.ClosedError):
        sllm.generate(target, "a")

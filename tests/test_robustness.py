"""Input that is wrong, hostile or merely strange ends in a typed error, and the interpreter goes on.

What may crash or hang runs in a process of its own, so that this is one failed test and not the end of all.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import resource
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
from oracles import EXACT, GREEDY
from tiny_models import (
    ARRAY,
    BOOL,
    F32,
    I32,
    N_VOCAB,
    PIECES,
    STRING,
    U32,
    U64,
    Meta,
    Raw,
    TinyModel,
    bert,
    gguf,
    gguf_string,
    gpt2,
    llama,
    mamba,
)

import sllm
from sllm import SamplingParams, embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tiny_models import Floats

    MakeContext: TypeAlias = Callable[..., sllm.Context]

# What bad input may raise.
TYPED = (sllm.SllmError, ValueError, TypeError, MemoryError)


def isolated(call: str, *, timeout: float = 240) -> str:
    """Evaluate ``call`` on this module, as ``t``, in another Python; a crash there fails the test here."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", f"import {Path(__file__).stem} as t\n{call}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    last = ended.stdout.splitlines()[-1:] or [""]
    assert ended.returncode == 0, f"ended with {ended.returncode} after {last[0]!r}:\n{ended.stderr[-3000:]}"
    return ended.stdout


def limit_memory(gigabytes: int) -> None:
    """So that what asks for too much is refused here, and not killed for taking it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ---- a writer of GGUF files, and tiny models with random weights --------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[TinyModel], Path]:
    """Writes a tiny model to a file of its own."""

    def to_file(model: TinyModel) -> Path:
        path = tmp_path / f"tiny{len(list(tmp_path.iterdir()))}.gguf"
        path.write_bytes(gguf(*model))
        return path

    return to_file


# ---- damaged and hostile files ------------------------------------------------------------------------


def use(path: Path) -> str:
    """Do a little of everything with a model file; how far it went."""
    try:
        model = sllm.Model(path)
    except TYPED:
        return "refused"
    with model:
        try:
            assert repr(model) and dict(model.metadata) is not None
            model.vocab.encode("hello \u4f60\n<s> 123", parse_special=True)
            model.vocab.decode([0, 1, 2])
            assert len(model.vocab.fingerprint) == 64
            with model.context(n_ctx=64, n_threads=1, n_seq_max=2) as context:
                n = min(40, context.n_ctx_seq - 8)
                context.decode([5] * n, logits="last")
                draft = context.draft([0], [7], n_max=4, sampling=SamplingParams(penalty_repeat=1.1))
                context.verify([0], [7], draft, pos=[n])
            with sllm.LocalTarget(model, n_ctx=64, n_threads=1) as target:
                sllm.generate(target, [5, 6, 7], draft="ngram", max_tokens=4).text()
        except TYPED:
            return "loaded"
    return "used"


def survive(cases: Iterable[tuple[str, bytes]]) -> None:
    """What ``isolated`` runs: use every file, and say before which one it is."""
    limit_memory(8)
    counts = dict.fromkeys(("refused", "loaded", "used"), 0)
    path = Path(f"/dev/shm/sllm-test-{os.getpid()}.gguf")
    if not path.parent.is_dir():
        path = Path(f"/tmp/sllm-test-{os.getpid()}.gguf")
    try:
        for name, data in cases:
            print(name, flush=True)
            path.write_bytes(data)
            counts[use(path)] += 1
    finally:
        path.unlink(missing_ok=True)
    print(*counts.values())


def header_parts(data: bytes) -> list[int]:
    """The offsets of what is worth damaging: the header without most of its vocabulary."""
    tokens = data.index(b"tokenizer.ggml.tokens") + 60
    after = data.index(b"tokenizer.ggml.bos_token_id") - 60
    end = data.rindex(b"blk.0.") + 60
    chance = random.Random(0)
    return [*range(tokens), *(chance.randrange(tokens, after) for _ in range(200)), *range(after, end)]


def flipped(model: TinyModel, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files with one to four damaged bytes in the header."""
    whole = gguf(*model)
    places = header_parts(whole)
    chance = random.Random(seed)
    for i in range(n):
        damaged = bytearray(whole)
        where = [chance.choice(places) for _ in range(chance.choice([1, 1, 1, 2, 4]))]
        for place in where:
            if chance.random() < 0.5:
                damaged[place] ^= 1 << chance.randrange(8)
            else:
                damaged[place] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        yield f"{i}: bytes {where} (seed {seed})", bytes(damaged)


VALUES: dict[str, Raw] = {
    **{f"u32 {v}": Raw(struct.pack("<II", U32, v)) for v in (0, 1, 3, 33, 1000, 2**31 - 1, 2**31, 2**32 - 1)},
    **{f"f32 {v}": Raw(struct.pack("<If", F32, v)) for v in (0.0, -1.0, 1.5, math.nan, math.inf)},
    "i32 -1": Raw(struct.pack("<Ii", I32, -1)),
    "u64": Raw(struct.pack("<IQ", U64, 2**63)),
    "bool": Raw(struct.pack("<I?", BOOL, True)),
    "text": Raw(struct.pack("<I", STRING) + gguf_string("zzz")),
    "no text": Raw(struct.pack("<I", STRING) + gguf_string("")),
    "long text": Raw(struct.pack("<I", STRING) + gguf_string("a" * 100_000)),
    "no UTF-8": Raw(struct.pack("<I", STRING) + gguf_string(b"\xff\xfe\0x")),
    "endless text": Raw(struct.pack("<IQ", STRING, 2**62)),
    "no items": Raw(struct.pack("<IIQ", ARRAY, I32, 0)),
    "one item": Raw(struct.pack("<IIQi", ARRAY, I32, 1, 1)),
    "zeros": Raw(struct.pack("<IIQ512i", ARRAY, I32, 512, *([0] * 512))),
    "minus ones": Raw(struct.pack(f"<IIQ{N_VOCAB}i", ARRAY, I32, N_VOCAB, *([-1] * N_VOCAB))),
    "NaNs": Raw(struct.pack(f"<IIQ{N_VOCAB}f", ARRAY, F32, N_VOCAB, *([math.nan] * N_VOCAB))),
    "endless array": Raw(struct.pack("<IIQ", ARRAY, I32, 2**60)),
    "array of arrays": Raw(struct.pack("<IIQ", ARRAY, ARRAY, 1)),
    "no type": Raw(struct.pack("<I", 99)),
}
MORE_KEYS = [
    "attention.key_length",
    "attention.value_length",
    "attention.head_count_kv",
    "attention.sliding_window",
    "attention.causal",
    "expert_count",
    "expert_used_count",
    "pooling_type",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "vocab_size",
]


def damaged_metadata(model: TinyModel) -> Iterator[tuple[str, bytes]]:
    """Every key with every strange value, without it, and keys that have no business there."""
    meta, tensors = model
    for key in meta:
        for name, value in VALUES.items():
            yield f"{key} = {name}", gguf({**meta, key: value}, tensors)
        yield f"no {key}", gguf({k: v for k, v in meta.items() if k != key}, tensors)
    for more in MORE_KEYS:
        for name in ("u32 0", "u32 1", "u32 33", "u32 4294967295", "f32 nan", "f32 0.0", "text", "zeros"):
            key = f"{meta['general.architecture']}.{more}"
            yield f"{key} = {name}", gguf({**meta, key: VALUES[name]}, tensors)


def damaged_vocabularies(model: TinyModel) -> Iterator[tuple[str, bytes]]:
    meta, tensors = model
    strange: dict[str, Any] = {
        "all the same": ["a"] * N_VOCAB,
        "all empty": [""] * N_VOCAB,
        "one": ["a"],
        "fewer": PIECES[:100],
        "more": [*PIECES, *"abcdefgh"],
        "long": ["x" * 2000] * N_VOCAB,
        "no UTF-8": [b"\xff\xfe"] * N_VOCAB,
        "NULs": [b"\0"] * N_VOCAB,
    }
    for kind in ("llama", "gpt2", "bert", "t5", "rwkv", "none", "no_vocab", "", "zzz"):
        base: Meta = {**meta, "tokenizer.ggml.model": kind}
        for name, pieces in strange.items():
            yield f"{kind}, {name}", gguf({**base, "tokenizer.ggml.tokens": pieces}, tensors)
        for pre in ("default", "qwen2", "gpt-4o", "zzz"):
            for merges in ([], ["a b", "h e"], ["", " ", "ab", "a b c"]):
                more: Meta = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
                yield f"{kind}, {pre}, {merges}", gguf({**base, **more}, tensors)
    for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "fim_pre", "fim_suf", "mask"):
        for token in (N_VOCAB - 1, N_VOCAB, 2**31 - 1, 2**31, 2**32 - 1):
            yield f"{name} = {token}", gguf({**meta, f"tokenizer.ggml.{name}_token_id": token}, tensors)
    for token in (0, N_VOCAB, 2**31 - 1, -1):
        for name in ("suppress_tokens", "eog_token_ids"):
            yield f"{name} = {token}", gguf({**meta, f"tokenizer.ggml.{name}": [token]}, tensors)


def damaged_tensors(model: TinyModel) -> Iterator[tuple[str, bytes]]:
    meta, tensors = model
    ways: dict[str, Callable[[Floats], Floats]] = {
        "transposed": lambda a: a.T.copy(),
        "half": lambda a: a[: max(1, len(a) // 2)],
        "flat": np.ravel,
        "three dimensions": lambda a: a.reshape(1, *np.atleast_2d(a).shape),
        "no rows": lambda a: a[:0],
        "NaN": lambda a: a * np.float32(math.nan),
        "infinite": lambda a: a * np.float32(math.inf),
    }
    for name, tensor in tensors.items():
        yield f"no {name}", gguf(meta, {k: v for k, v in tensors.items() if k != name})
        for way, damage in ways.items():
            yield f"{name} {way}", gguf(meta, {**tensors, name: damage(tensor)})


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_bytes_in_the_header(seed: int) -> None:
    refused, _, used = map(
        int, isolated(f"t.survive(t.flipped(t.llama(), 200, {seed}))").splitlines()[-1].split()
    )
    assert refused > 100 and used > 2  # the damage is neither always fatal nor never seen


@pytest.mark.parametrize("model", ["llama", "mamba", "gpt2", "bert"])
def test_damaged_metadata(model: str) -> None:
    isolated(f"t.survive(t.damaged_metadata(t.{model}()))")


def test_damaged_vocabularies() -> None:
    isolated("t.survive(t.damaged_vocabularies(t.llama()))")


@pytest.mark.parametrize("model", ["llama", "mamba"])
def test_damaged_tensors(model: str) -> None:
    isolated(f"t.survive(t.damaged_tensors(t.{model}()))")


def decode_on_two_threads(path: str) -> None:
    for n_threads in (1, 2):
        with (
            contextlib.suppress(*TYPED),
            sllm.Model(path) as model,
            model.context(n_ctx=256, n_threads=n_threads) as context,
        ):
            context.decode([5] * 40, logits="last")


@pytest.mark.parametrize("epsilon", [math.nan, -1.0, math.inf])
def test_an_impossible_epsilon(write: Callable[[TinyModel], Path], epsilon: float) -> None:
    # llama.cpp asserts it where it computes, on each of its threads.
    meta, tensors = llama()
    path = write(({**meta, "llama.attention.layer_norm_rms_epsilon": epsilon}, tensors))
    for _ in range(3):
        isolated(f"t.decode_on_two_threads({str(path)!r})")


def test_weights_that_are_not_finite(write: Callable[[TinyModel], Path]) -> None:
    meta, tensors = llama()
    path = write((meta, {**tensors, "output.weight": tensors["output.weight"] * np.float32(math.nan)}))

    with sllm.Model(path) as model, model.context(n_ctx=256, n_threads=1) as context:
        logits = context.decode([5, 6], logits="last")
        assert logits is not None and np.isnan(logits).all()
        for temperature in (0.0, 1.0):
            with pytest.raises(sllm.InferenceError, match="no token can be selected"):
                context.verify([0], [7], sampling=SamplingParams(temperature=temperature))
        assert context.memory.length(0) == 2
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(path, check_tensors=True)


def test_a_context_length_beyond_int32(write: Callable[[TinyModel], Path]) -> None:
    for n_ctx_train in (0, 2**31 - 1, 2**31, 2**32 - 1):
        meta, tensors = llama()
        path = write(({**meta, "llama.context_length": n_ctx_train}, tensors))
        try:
            with sllm.Model(path) as model, model.context(n_threads=1) as context:
                context.decode([5])
        except (sllm.SllmError, ValueError, MemoryError):
            pass


# ---- models that are no decoders, or have their own mind ----------------------------------------------


def test_an_encoder_is_refused(write: Callable[[TinyModel], Path]) -> None:
    path = write(bert())
    with pytest.raises(sllm.UnsupportedModelError), sllm.Model(path) as model:
        model.context(n_ctx=64, n_threads=1)
    with pytest.raises(sllm.UnsupportedModelError), sllm.Model(path) as model:
        sllm.generate(model, "hello")


def test_a_model_of_another_vocabulary_is_no_draft(
    write: Callable[[TinyModel], Path], target_model: sllm.Model
) -> None:
    with (
        sllm.Model(write(llama())) as other,
        sllm.LocalTarget(target_model, n_ctx=256, n_threads=1) as target,
    ):
        for _ in range(2):
            with pytest.raises(sllm.VocabMismatchError, match="token 0 is"):
                sllm.generate(target, "Once", draft=other)
        # Nothing is left open, and the model stays good for other things.
        assert sllm.generate(target, "Once", max_tokens=3).text()
        with pytest.raises(sllm.VocabMismatchError):
            sllm.generate(other, "Once", draft=target_model)
        with other.context(n_ctx=64, n_threads=1) as context:
            context.decode([5])


def learned_positions(path: str) -> None:
    for n_threads in (1, 2):
        with sllm.Model(path) as model, model.context(n_ctx=256, n_threads=n_threads, n_seq_max=2) as context:
            assert context.n_ctx_seq == 16
            context.decode([5] * 16, logits="last")
            for tokens, pos in (([5], 16), ([5] * 17, 0), ([5] * 40, 3)):
                try:
                    context.decode(tokens, pos=pos)
                except sllm.ContextFullError:
                    continue
                raise AssertionError("it fitted")
            draft = context.draft([1], [np.full(10, 5, np.int32)], n_max=16)
            assert draft.lengths[0] <= 7
            assert sllm.generate(model, [5, 6], max_tokens=100).text() is not None


def test_learned_positions_end_where_training_did(write: Callable[[TinyModel], Path]) -> None:
    isolated(f"t.learned_positions({str(write(gpt2()))!r})")


@pytest.mark.parametrize("flash_attn", [None, True, False])
@pytest.mark.parametrize("side", ["type_k", "type_v"])
def test_cache_types_that_do_not_divide_the_head(
    write: Callable[[TinyModel], Path], side: str, flash_attn: bool | None
) -> None:
    with sllm.Model(write(llama(n_embd=48))) as model:  # heads of 24; blocks of 32
        for kind in ("q8_0", "q4_0", "q5_1", "iq4_nl"):
            with pytest.raises(ValueError, match=r"tiny\d+.gguf"):
                model.context(n_ctx=64, n_threads=1, flash_attn=flash_attn, **{side: kind})  # type: ignore[arg-type]
        with model.context(n_ctx=64, n_threads=1, flash_attn=flash_attn) as context:
            context.decode([5, 6])


@pytest.mark.parametrize("name", ["q6_K", "Q8_0", "i8", "", " f16", "f16 ", "fp16", "模型"])
@pytest.mark.parametrize("side", ["type_k", "type_v"])
def test_cache_types_that_do_not_exist(draft_model: sllm.Model, side: str, name: str) -> None:
    with pytest.raises(ValueError, match=side):
        draft_model.context(n_ctx=256, n_threads=1, **{side: name})  # type: ignore[arg-type]


# ---- recurrent models ---------------------------------------------------------------------------------


@pytest.fixture
def recurrent(write: Callable[[TinyModel], Path]) -> Iterator[sllm.Model]:
    with sllm.Model(write(mamba())) as model:
        assert model.can_rollback == "recompute"
        yield model


TEXT = np.random.default_rng(0).integers(3, N_VOCAB, 200).astype(np.int32).tolist()
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_seq_max": 3}


def from_nothing(model: sllm.Model, tokens: list[int]) -> Floats:
    """The logits behind ``tokens`` in a context that has seen nothing else."""
    with model.context(**OPTIONS) as context:
        logits = context.decode(tokens, logits="last")
        assert logits is not None
        return logits.copy()


def close_to(logits: Floats | None, wanted: Floats) -> bool:
    return logits is not None and bool(np.allclose(logits, wanted, atol=1e-3))


def test_a_recurrent_model_that_is_taken_back_computes_again(recurrent: sllm.Model) -> None:
    with recurrent.context(**OPTIONS) as context:
        context.decode(TEXT[:30])
        for n in (30, 29, 28, 15, 1, 0):
            context.memory.truncate(0, n)
            assert context.memory.length(0) == n
            assert close_to(context.decode(TEXT[n:40], logits="last"), from_nothing(recurrent, TEXT[:40]))
            context.memory.truncate(0, min(n, 30))
            context.decode(TEXT[n:30])

        # Written over from the middle on, from the last token on, and with what is there already.
        other = TEXT[:20] + TEXT[50:60]
        assert close_to(context.decode(TEXT[50:60], pos=20, logits="last"), from_nothing(recurrent, other))
        assert close_to(context.decode(TEXT[50:60], pos=20, logits="last"), from_nothing(recurrent, other))
        assert close_to(context.decode(TEXT[59:60], pos=29, logits="last"), from_nothing(recurrent, other))
        assert close_to(
            context.decode(TEXT[70:71], pos=29, logits="last"),
            from_nothing(recurrent, [*other[:29], TEXT[70]]),
        )


def test_several_sequences_of_a_recurrent_model(recurrent: sllm.Model) -> None:
    with recurrent.context(**OPTIONS) as context:
        context.decode([TEXT[:20], TEXT[5:12], TEXT[30:50]], seq_id=[0, 1, 2])
        context.memory.copy(0, 1)
        rows = context.decode([TEXT[20:25], TEXT[40:42], TEXT[50:53]], seq_id=[0, 1, 2], logits="last")
        assert rows is not None
        assert close_to(rows[0], from_nothing(recurrent, TEXT[:25]))
        assert close_to(rows[1], from_nothing(recurrent, TEXT[:20] + TEXT[40:42]))
        assert close_to(rows[2], from_nothing(recurrent, TEXT[30:53]))

        context.memory.truncate(1, 18)
        rows = context.decode([TEXT[25:26], TEXT[60:62]], seq_id=[0, 1], logits="last")
        assert rows is not None
        assert close_to(rows[0], from_nothing(recurrent, TEXT[:26]))
        assert close_to(rows[1], from_nothing(recurrent, TEXT[:18] + TEXT[60:62]))
        assert close_to(
            context.decode(TEXT[53:54], seq_id=2, logits="last"), from_nothing(recurrent, TEXT[30:54])
        )

        state = context.save(2)
        context.load(state, 0)
        assert close_to(context.decode(TEXT[54:56], logits="last"), from_nothing(recurrent, TEXT[30:56]))
        context.memory.truncate(0, 5)
        context.load(context.save(0), 1)
        assert close_to(
            context.decode(TEXT[9:11], seq_id=1, logits="last"),
            from_nothing(recurrent, TEXT[30:35] + TEXT[9:11]),
        )


def greedy(model: sllm.Model, tokens: list[int], n: int) -> list[int]:
    text = list(tokens)
    for _ in range(n):
        text.append(int(from_nothing(model, text).argmax()))
    return text[len(tokens) :]


def test_drafts_of_a_recurrent_model(recurrent: sllm.Model) -> None:
    wanted = greedy(recurrent, TEXT[:11], 14)
    with recurrent.context(**OPTIONS) as context:
        context.decode(TEXT[:10])
        got: list[int] = []
        last = TEXT[10]
        for i in range(6):
            # Right hints, wrong ones, half right ones, and ids outside the vocabulary.
            at = len(got)
            good = wanted[at : at + 2]
            hints = [good, [5, 6, 7], [*good[:1], 5], [-1, N_VOCAB]][i % 4]
            n_right = [2, 0, 1, 0][i % 4]
            verdict = context.verify([0], [last], [hints], sampling=GREEDY)
            assert verdict.n_accepted.tolist() == [n_right]
            got += verdict.tokens[0, : n_right + 1].tolist()
            assert context.memory.length(0) == 10 + len(got)
            last = got[-1]
        assert got == wanted[: len(got)]
        wanted = wanted[:8]

        context.memory.clear()
        draft = context.draft([0], [np.array(TEXT[:11], np.int32)], n_max=8, sampling=GREEDY)
        assert draft.tokens[0].tolist() == wanted
        assert context.memory.length(0) == 11  # and what was drafted is no part of it:
        assert close_to(
            context.decode(wanted[:4], logits="last"), from_nothing(recurrent, TEXT[:11] + wanted[:4])
        )


def test_scores_of_a_recurrent_model(recurrent: sllm.Model) -> None:
    endings = [TEXT[10:14], TEXT[20:22], TEXT[30:33], TEXT[40:41]]

    def score(ending: list[int]) -> float:
        total, text = 0.0, TEXT[:10]
        for token in ending:
            row = from_nothing(recurrent, text).astype(np.float64)
            total += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
            text = [*text, token]
        return total

    with recurrent.context(**OPTIONS) as context:
        for _ in range(2):
            assert np.allclose(context.score(TEXT[:10], endings), [score(e) for e in endings], atol=1e-3)


def test_a_recurrent_model_speculates(recurrent: sllm.Model) -> None:
    wanted = greedy(recurrent, TEXT[:5], 12)
    accepted = {}
    with sllm.LocalTarget(recurrent, n_ctx=256, n_threads=1) as target:
        for draft in ("ngram", lambda _tokens, _n: [5, 6, 7], recurrent, None):
            stream = sllm.generate(target, TEXT[:5], draft=draft, sampling=GREEDY, max_tokens=12)
            assert [token for run in stream for token in run.tokens] == wanted
            accepted[draft] = stream.stats.n_accepted / max(stream.stats.n_drafted, 1)
    assert accepted[recurrent] > 0.9 and accepted[None] == 0


def test_a_cancelled_recurrent_decode_loses_nothing(recurrent: sllm.Model) -> None:
    long = TEXT * 2000
    with recurrent.context(**{**OPTIONS, "n_ctx": len(long) * 3, "n_batch": 64, "n_ubatch": 16}) as context:
        context.decode(TEXT[:50])
        for _ in range(3):
            with Inside(context, long) as call:
                context.cancel()
            assert isinstance(call.error, sllm.CancelledError)
            assert context.memory.tokens(0).tolist() == TEXT[:50]
        assert close_to(context.decode(TEXT[50:60], logits="last"), from_nothing(recurrent, TEXT[:60]))


# ---- several threads in one context -------------------------------------------------------------------


class Inside:
    """A thread that is inside ``context`` while the block runs, and has left it behind the block."""

    def __init__(self, context: sllm.Context, tokens: list[int]) -> None:
        self.context = context
        self.tokens = tokens
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while True:
            try:
                self.context.decode(self.tokens)
            except sllm.BusyError:
                continue  # who looks whether it is inside was in its way
            except sllm.SllmError as error:
                self.error = error
            return

    def __enter__(self) -> Inside:
        self.thread.start()
        with contextlib.suppress(sllm.BusyError):
            while self.thread.is_alive():
                self.context.memory.length(0)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.thread.join()


@pytest.fixture
def slow(target_model: sllm.Model) -> Iterator[sllm.Context]:
    """A context in which 4000 tokens take a while."""
    with target_model.context(n_ctx=4096, n_batch=64, n_ubatch=32, n_threads=1, n_seq_max=1) as context:
        context.decode([5, 6, 7])
        yield context


def test_a_second_thread_is_told_that_the_context_is_busy(slow: sllm.Context) -> None:
    calls: list[Callable[[], object]] = [
        lambda: slow.decode([5]),
        lambda: slow.draft([0], [5]),
        lambda: slow.verify([0], [5]),
        lambda: slow.score([5], [[6]], seq_ids=[0]),
        lambda: slow.memory.length(0),
        lambda: slow.memory.tokens(0),
        lambda: slow.memory.truncate(0, 0),
        lambda: slow.memory.copy(0, 0),
        lambda: slow.memory.clear(),
        lambda: slow.save(0),
        lambda: slow.load(state),
        lambda: slow.set_threads(1),
    ]
    state = slow.save(0)

    with Inside(slow, [9] * 4000) as call:
        try:
            for one in calls:
                with pytest.raises(sllm.BusyError, match="thread"):
                    one()
        finally:
            slow.cancel()

    assert isinstance(call.error, sllm.CancelledError)
    assert slow.memory.tokens(0).tolist() == [5, 6, 7]


def test_a_busy_context_is_not_harmed_by_those_who_knock(draft_model: sllm.Model) -> None:
    tokens = np.random.default_rng(1).integers(4, draft_model.vocab.n_tokens, 1500).astype(np.int32)
    with draft_model.context(n_ctx=2048, n_batch=32, n_ubatch=32, **EXACT) as context:
        wanted = context.decode(tokens, logits="last")
        assert wanted is not None
        wanted = wanted.copy()
        context.memory.clear()
        done = threading.Event()
        seen: list[type[BaseException]] = []

        def knock() -> None:
            while not done.is_set():
                try:
                    context.memory.truncate(0, 10**6)
                except (sllm.BusyError, ValueError) as error:
                    seen.append(type(error))
                done.wait(1e-4)  # without a pause they would be inside nearly all the time themselves

        threads = [threading.Thread(target=knock) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10_000):
                try:
                    got = context.decode(tokens, logits="last")
                except sllm.BusyError:
                    continue
                break
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert got is not None and np.array_equal(got, wanted)
        assert sllm.BusyError in seen


def hammer(seed: int) -> None:
    """Threads that decode, draft, verify, cancel and close whatever they find."""
    chance = random.Random(seed)
    sys.setswitchinterval(1e-5)
    with sllm.Model(embedded.DRAFT) as model:
        for _ in range(12):
            context = model.context(n_ctx=512, n_threads=1, n_seq_max=2, n_ubatch=32)
            start = threading.Barrier(6)
            odd: list[BaseException] = []

            def work(
                what: int, context: sllm.Context, start: threading.Barrier, odd: list[BaseException], n: int
            ) -> None:
                start.wait()
                for i in range(n):
                    try:
                        match what:
                            case 0:
                                rows = context.decode([5, 6, 7 + i % 3] * 20, pos=0, logits="all")
                                assert rows is not None and np.isfinite(rows[0, 0])
                            case 1:
                                context.verify([0, 1], [5, 6], [[7], [8, 9]], pos=[0, 0])
                            case 2:
                                draft = context.draft([1], [5], n_max=6, pos=[0])
                                assert 0 <= draft.lengths[0] <= 6
                            case 3:
                                context.cancel()
                                context.memory.copy(0, 1)
                            case 4:
                                context.load(context.save(0), 1)
                                context.score([5, 6], [[7], [8, 9]], seq_ids=[0])
                            case 5 if i == n - 1:
                                context.close()
                    except sllm.ClosedError:  # noqa: PERF203
                        return
                    except (sllm.BusyError, sllm.CancelledError):
                        pass
                    except BaseException as error:  # noqa: BLE001
                        odd.append(error)
                        return

            threads = [
                threading.Thread(target=work, args=(what, context, start, odd, chance.randrange(1, 60)))
                for what in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not odd, odd
            context.close()
        with model.context(n_ctx=256, **EXACT) as context:
            first = context.decode([5, 6, 7], logits="last")
            assert first is not None
        print("alive", float(first[0]))


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_that_decode_cancel_and_close_one_context(seed: int) -> None:
    assert "alive" in isolated(f"t.hammer({seed})")


def logits_of_a_closed_context() -> None:
    """A thread whose decode has ended waits for Python's lock while another closes the context."""
    sys.setswitchinterval(30)
    with sllm.Model(embedded.DRAFT) as model:
        for _ in range(8):
            context = model.context(n_ctx=256, n_threads=1)
            go = threading.Event()

            def work(context: sllm.Context, go: threading.Event) -> None:
                context.decode([5, 6])
                go.set()
                try:
                    rows = context.decode([7] * 30, pos=0, logits="all")
                except sllm.SllmError:
                    return
                assert rows is not None and np.isfinite(rows).all()

            thread = threading.Thread(target=work, args=(context, go))
            thread.start()
            go.wait()
            sum(range(3_000_000))  # holds the lock for longer than the decode takes
            context.close()
            thread.join()
            gc.collect()


def test_closing_between_a_decode_and_its_logits() -> None:
    isolated("t.logits_of_a_closed_context()")


def test_samplings_are_compiled_by_many_threads_at_once(draft_model: sllm.Model) -> None:
    odd: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(300):
                draft_model.compiled(SamplingParams(seed=(i * 7 + offset) % 90))
        except BaseException as error:  # noqa: BLE001
            odd.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not odd


# ---- contexts that cannot be --------------------------------------------------------------------------

SIZES = [0, -1, 2**31, 2**32, 2**40, 2**70, -(2**40), 1.5, math.nan, "8", b"8"]


@pytest.mark.parametrize("value", SIZES, ids=repr)
@pytest.mark.parametrize(
    "name", ["n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_outputs_max", "n_threads", "n_threads_batch"]
)
def test_sizes_that_are_none(draft_model: sllm.Model, name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        draft_model.context(**{"n_ctx": 256, "n_threads": 1, name: value})


def absurd_sizes() -> None:
    """Numbers, but more than a machine has. A limit on the address space stands for a small machine."""
    limit_memory(6)
    big = 2**31 - 1
    with sllm.Model(embedded.DRAFT) as model:
        for options in (
            {"n_ctx": big},
            {"n_ctx": 2**30},
            {"n_ctx": 2**24},
            {"n_ctx": big, "n_batch": big},
            {"n_ctx": big, "n_batch": big, "n_ubatch": big},
            {"n_ctx": 2**20, "n_batch": 2**20, "n_ubatch": 2**20},
            {"n_ctx": 2**20, "n_batch": 2**20, "n_outputs_max": 2**20},
            {"n_ctx": big, "n_seq_max": 256},
            {"n_ctx": big, "n_seq_max": 256, "kv_unified": True},
        ):
            print(options, flush=True)
            with pytest.raises((MemoryError, ValueError), match=r"."):
                model.context(n_threads=1, **options)  # type: ignore[arg-type]
        for options in (
            {"n_seq_max": big},
            {"n_seq_max": 257},
            {"n_threads": big},
            {"n_threads": 513},
            {"n_batch": 1, "n_seq_max": 2},
            {"n_ctx": 2, "n_seq_max": 3},
            {"n_outputs_max": 1, "n_seq_max": 2},
        ):
            print(options, flush=True)
            with pytest.raises(ValueError, match=r"."):
                model.context(**{"n_threads": 1, **options})  # type: ignore[arg-type]
        # More than is of use is no error.
        for options in ({"n_batch": big}, {"n_ubatch": big}, {"n_outputs_max": big}):
            print(options, flush=True)
            with model.context(n_ctx=256, n_threads=1, **options) as context:  # type: ignore[arg-type]
                context.decode([5, 6], logits="all")
    print("alive")


def test_absurd_sizes_do_not_take_the_machine() -> None:
    assert "alive" in isolated("t.absurd_sizes()")


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 1},
        {"n_batch": 1},
        {"n_batch": 1, "n_ubatch": 1, "n_outputs_max": 1},
        {"n_ctx": 3, "n_seq_max": 3},
        {"n_ctx": 300, "n_seq_max": 7},
        {"n_ctx": 256, "n_seq_max": 4, "n_outputs_max": 300, "n_batch": 512, "kv_unified": True},
        {"n_seq_max": 256, "n_ctx": 256, "kv_unified": True},
        {"n_ctx": 64, "n_seq_max": 16, "n_ubatch": 3},
    ],
    ids=str,
)
def test_the_smallest_contexts_compute_like_any(draft_model: sllm.Model, options: dict[str, Any]) -> None:
    with draft_model.context(n_ctx=256, **EXACT) as context:
        wanted = context.decode([5, 6, 7], logits="last")
        assert wanted is not None
        wanted = wanted.copy()
    with draft_model.context(**{"n_ctx": 256, **EXACT, **options}) as context:
        last = context.n_seq_max - 1
        got = context.decode([5, 6, 7], seq_id=last, logits="last")
        assert got is not None and np.array_equal(got, wanted)
        rows = context.decode(
            [[5, 6, 7][: context.n_ctx_seq]] * min(2, last + 1),
            seq_id=list(range(min(2, last + 1))),
            logits="all",
            pos=[0] * min(2, last + 1),
        )
        assert rows is not None and np.array_equal(rows[-1], wanted)
        with pytest.raises(sllm.ContextFullError):
            context.decode([5] * (context.n_ctx_seq + 1), pos=0)


# ---- arguments of calls -------------------------------------------------------------------------------

INTEGERS = [2**31, -(2**31) - 1, 2**40, -(2**40), 2**70, 1.5, "0", None, math.nan]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_that_are_none(draft_model: sllm.Model, make_context: MakeContext, value: Any) -> None:
    context = make_context(draft_model, n_ctx=256)
    memory, vocab = context.memory, draft_model.vocab
    calls: dict[str, Callable[[], object]] = {
        "decode seq_id": lambda: context.decode([5], seq_id=value),
        "decode seq_ids": lambda: context.decode([[5]], seq_id=[value]),
        "decode pos": lambda: context.decode([[5]], seq_id=[0], pos=[value]),
        "decode token": lambda: context.decode([value]),
        "length": lambda: memory.length(value),
        "tokens": lambda: memory.tokens(value),
        "truncate": lambda: memory.truncate(value, 0),
        "truncate pos": lambda: memory.truncate(0, value),
        "copy source": lambda: memory.copy(value, 0),
        "copy target": lambda: memory.copy(0, value),
        "draft n_max": lambda: context.draft([0], [5], n_max=[value]),
        "draft seq": lambda: context.draft([value], [5]),
        "draft pos": lambda: context.draft([0], [5], pos=[value]),
        "verify start": lambda: context.verify([0], [5], start=[value]),
        "score seq": lambda: context.score([5], [[6]], seq_ids=[value]),
        "set_threads": lambda: context.set_threads(value),
        "save": lambda: context.save(value),
        "load": lambda: context.load(state, value),
        "piece": lambda: vocab.piece(value),
        "is_eog": lambda: vocab.is_eog(value),
        "is_control": lambda: vocab.is_control(value),
        "decode text": lambda: vocab.decode([value]),
        "logit_bias": lambda: draft_model.compiled(SamplingParams(logit_bias={value: 1.0})),
        "top_k": lambda: SamplingParams(top_k=value),
    }
    if value == "0":
        del calls["logit_bias"]  # as JSON writes keys
    state = context.save(0)
    for name, call in calls.items():
        with pytest.raises((ValueError, TypeError)):
            raise RuntimeError(f"{name} gave {call()!r}")
    assert context.memory.length(0) == 0


def test_numpy_integers_are_integers(draft_model: sllm.Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    for kind in (np.int32, np.int64, np.uint8):
        context.decode([5, 6], seq_id=kind(1), pos=kind(0))  # type: ignore[arg-type]
        assert context.memory.length(kind(1)) == 2  # type: ignore[arg-type]
        context.memory.truncate(kind(1), kind(1))  # type: ignore[arg-type]
        assert context.draft([1], [6], n_max=kind(3), sampling=GREEDY).lengths[0] <= 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tokens",
    [
        "5 6",
        b"56",
        None,
        5.0,
        [5.0],
        ["5"],
        [None],
        [[[5]]],
        [2**31],
        [-(2**31) - 1],
        [2**64],
        [-1],
        [10**6],
        np.array([5, 6]),
        np.array([5.0]),
        np.array(["5"]),
        np.array([[[5]]], np.int32),
        np.array(5, np.int32),
        np.arange(4, 12, dtype=np.int32)[::2],
        np.arange(4, 12, dtype=np.int32)[::-1],
        np.array([5], ">i4"),
        np.array([5], np.uint32),
        np.array([(5, 6)], [("a", "i4"), ("b", "i4")])["a"].view("V4"),
    ],
    ids=repr,
)
def test_tokens_that_are_none(draft_model: sllm.Model, make_context: MakeContext, tokens: Any) -> None:
    context = make_context(draft_model, n_ctx=512, n_seq_max=2)
    context.decode([5, 6])
    for call in (
        lambda: context.decode(tokens),
        lambda: context.decode([tokens], seq_id=[0]),
        lambda: context.draft([0], [tokens]),
        lambda: context.verify([0], [tokens]),
        lambda: context.score(tokens, [[5]], seq_ids=[1]),
        lambda: context.score([5], [tokens], seq_ids=[1]),
        lambda: sllm.generate(draft_model, tokens if not isinstance(tokens, str) else b""),
        lambda: draft_model.vocab.decode(tokens),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert context.memory.tokens(0).tolist() == [5, 6]


def test_arrays_with_unusual_but_valid_shapes(draft_model: sllm.Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256)
    read_only = np.array([5, 6, 7], np.int32)
    read_only.flags.writeable = False
    inside = np.arange(12, dtype=np.int32)[5:8]
    unaligned = np.frombuffer(b"\0" + np.array([5, 6, 7], np.int32).tobytes(), np.int32, 3, 1)
    for tokens in (read_only, inside, unaligned, range(5, 8), (5, 6, 7), iter([5, 6, 7])):
        context.decode(tokens, pos=0)  # type: ignore[arg-type]
        assert context.memory.tokens(0).tolist() == [5, 6, 7]


def test_a_full_context(draft_model: sllm.Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256)
    n = context.n_ctx_seq
    context.decode([5] * n)
    for call in (
        lambda: context.decode([5]),
        lambda: context.decode([5] * (n + 1), pos=0),
        lambda: context.draft([0], [5]),
        lambda: context.verify([0], [5]),
        lambda: context.score([5] * n, [[6, 7]], seq_ids=[0]),
    ):
        with pytest.raises(sllm.ContextFullError):
            call()
        assert context.memory.length(0) == n
    context.decode([6], pos=n - 1)
    assert context.verify([0], [6], pos=[n - 1]).n_accepted.tolist() == [0]

    with sllm.LocalTarget(draft_model, n_ctx=256, n_threads=1) as target:
        with pytest.raises(sllm.ContextFullError):
            sllm.generate(target, [5] * (n + 1))
        stream = sllm.generate(target, [5] * n)
        assert stream.text() == "" and stream.stats.n_tokens == 0
        stream = sllm.generate(target, [5] * (n - 1), draft="ngram")
        stream.text()
        assert stream.stats.n_tokens == 1 and stream.stats.finish_reason in ("context", "eog")


def test_more_hints_than_there_is_room_for(draft_model: sllm.Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256, n_outputs_max=8, n_batch=16)
    context.decode([5, 6])
    with pytest.raises(ValueError, match="n_outputs_max"):
        context.verify([0], [7], [[8] * 8])
    with pytest.raises(ValueError, match="n_max"):
        context.draft([0], [7], n_max=257)
    with pytest.raises(ValueError, match="n_max"):
        context.draft([0], [7], n_max=-1)
    assert context.draft([0], [7], n_max=256, sampling=GREEDY).lengths[0] <= 254
    assert context.memory.tokens(0).tolist() == [5, 6, 7]
    assert context.verify([0], [7], [[8] * 7], pos=[2]).tokens.shape == (1, 8)
    # More rows than the context keeps, and more tokens than it decodes at once, are no error by themselves.
    rows = context.decode([5] * 100, pos=0, logits="all")
    assert rows is not None and rows.shape == (100, draft_model.vocab.n_tokens)


# ---- sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "penalty_repeat", "penalty_freq", "penalty_present"]
)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e300, -1e300, 1j, "1", None, True], ids=repr
)
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": -1e-300},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": -0.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"top_k": -1},
        {"top_k": 2**31},
        {"top_k": 1.0},
        {"penalty_last_n": -1},
        {"penalty_last_n": 2**31},
        {"penalty_repeat": 0},
        {"penalty_repeat": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.0},
        {"grammar": ""},
        {"grammar": " \n"},
        {"grammar": 'root ::= "a"\0'},
        {"grammar": b'root ::= "a"'},
        {"grammar": 5},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {5: math.inf}},
        {"logit_bias": {5: "1"}},
        {"logit_bias": {"five": 1.0}},
        {"logit_bias": {"-5": 1.0}},
        {"logit_bias": {5.0: 1.0}},
        {"logit_bias": 5},
        {"logit_bias": [5]},
        {"logit_bias": [(5, 1.0, 2.0)]},
        {"logit_bias": "ab"},
        {"n_predict": 5},
    ],
    ids=str,
)
def test_sampling_parameters_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        SamplingParams(**options)


@pytest.mark.parametrize("token", [-1, 10**6, 2**31 - 1, 2**31, 2**40, -(2**40)])
def test_a_bias_for_no_token(draft_model: sllm.Model, make_context: MakeContext, token: int) -> None:
    context = make_context(draft_model, n_ctx=256)
    with pytest.raises(ValueError, match="logit_bias"):
        context.verify([0], [5], sampling=SamplingParams(logit_bias={token: 1.0}))
    assert context.memory.length(0) == 0


@pytest.mark.parametrize("bias", [1e5, 1e9, 1e30, 3.4e38, 1e300, -1e9, -1e30, -1e300, -math.inf])
@pytest.mark.parametrize("filters", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}], ids=str)
def test_a_strong_bias_decides_or_is_refused(
    draft_model: sllm.Model, make_context: MakeContext, bias: float, filters: dict[str, Any]
) -> None:
    context = make_context(draft_model, n_ctx=256)
    for temperature in (0.0, 1e-30, 1.0, 100.0):
        try:
            sampling = SamplingParams(temperature=temperature, logit_bias={7: bias}, **filters)
        except ValueError:
            assert abs(bias) > 1e6
            continue
        draft = context.draft([0], [5], n_max=2, sampling=sampling, pos=[0])
        assert (draft.tokens[0, 0] == 7) == (bias > 0)
        assert np.isfinite(draft.probs).all()


def test_many_seeds_are_not_kept_for_ever(draft_model: sllm.Model, make_context: MakeContext) -> None:
    context = make_context(draft_model, n_ctx=256)
    seen = {
        int(
            context.verify([0], [5], sampling=SamplingParams(1.5, 0, 1.0, 0.0, seed=seed), pos=[0]).tokens[
                0, 0
            ]
        )
        for seed in range(400)
    }
    assert len(seen) > 50
    assert len(draft_model._samplings) <= 64


GRAMMARS = {
    "syntax": "root ::= = |",
    "no name": '::= "a"',
    "garbage": "\x01\x02 @@@",
    "open literal": 'root ::= "a',
    "open class": "root ::= [a-",
    "open group": 'root ::= ("a"',
    "closed group": 'root ::= "a")',
    "bad escape": r'root ::= "\q"',
    "short escape": r'root ::= "\x"',
    "nothing to repeat": "root ::= *",
    "missing root": 'start ::= "a"',
    "only a comment": "# nothing",
    "undefined rule": "root ::= other",
    "nothing but itself": "root ::= root",
    "huge repetition": 'root ::= ("a" | "b"){99999999999999999999}',
    "negative repetition": 'root ::= "a"{5,2}',
    "negative repetition, spaced": 'root ::= ("a"{ 5 ,\n 2 } )',
    "negative repetition, commented": 'root ::= ("a"{5,# two\n2})',
    "deep groups": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "long chain": "".join(f"r{i} ::= r{i + 1}\n" for i in range(100_000)) + 'r100000 ::= "a"\nroot ::= r0',
    "a surrogate": 'root ::= "\udcff"',
    "no such token": "root ::= <|no such token|>",
}


def bad_grammars() -> None:
    limit_memory(4)
    with sllm.Model(embedded.DRAFT) as model, model.context(n_ctx=256, n_threads=1) as context:
        for name, grammar in GRAMMARS.items():
            print(name, flush=True)
            for _ in range(2):
                with pytest.raises(ValueError, match=r".") as caught:
                    context.verify([0], [5], sampling=SamplingParams(grammar=grammar))
                assert len(str(caught.value)) < 2000
                assert context.memory.length(0) == 0
        context.verify([0], [5], sampling=SamplingParams(grammar='root ::= "a"'))
    if sys.platform == "linux":  # elsewhere it counts bytes
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20
    print("alive")


def test_bad_grammars() -> None:
    assert "alive" in isolated("t.bad_grammars()", timeout=120)


ODD_GRAMMARS = {
    "empty": "root ::=",
    "left recursion": 'root ::= root "a" | "b"',
    "indirect left recursion": 'root ::= a\na ::= b "x"\nb ::= a | "y"',
    "left recursion behind nothing": 'root ::= ("")* root "a" | "b"',
    "repetition of repetitions": 'root ::= (("a"?){0,1000}){0,1000}',
    "an empty literal": 'root ::= ""',
    "twice the same rule": 'root ::= "a"\nroot ::= "b"',
    "stars of stars": 'root ::= (("a"*)*)*',
    "an empty class": "root ::= []",
    "a class that is none": "root ::= [z-a]",
    "no character": r'root ::= "\UFFFFFFFF"',
    "anything but anything": r"root ::= [^\x00-\U0010FFFF]",
    "many alternatives": "root ::= " + " | ".join(['"a"'] * 500),
    "many options": "root ::= " + '"a"? ' * 100,
    "a long literal": 'root ::= "' + "a" * 100_000 + '"',
    "groups": "root ::= " + "(" * 200 + '"a"' + ")?" * 200,
    "brackets in literals": 'root ::= "' + "(" * 5000 + '" | [' + "(" * 5000 + "] # " + "(" * 5000,
    "a token number": "root ::= <[99999999]>",
}


def odd_grammars() -> None:
    with sllm.Model(embedded.DRAFT) as model, model.context(n_ctx=256, n_threads=1) as context:
        for name, grammar in ODD_GRAMMARS.items():
            print(name, flush=True)
            try:
                sampling = SamplingParams(grammar=grammar)
                token = [5]
                for _ in range(4):
                    token = context.verify([0], token, sampling=sampling).tokens[0].tolist()
            except TYPED:
                pass
            context.memory.clear()
    print("alive")


def test_odd_grammars() -> None:
    assert "alive" in isolated("t.odd_grammars()", timeout=120)


# ---- generations and drafters that misbehave ----------------------------------------------------------


@pytest.fixture
def local(draft_model: sllm.Model) -> Iterator[sllm.LocalTarget]:
    with sllm.LocalTarget(draft_model, n_ctx=512, n_threads=1) as target:
        yield target


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": "5"},
        {"max_tokens": True},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [5]},
        {"stop": 5},
        {"stop": b"a"},
        {"sampling": 5},
        {"sampling": {"temperature": 1}},
        {"sampling": SamplingParams(logit_bias={10**6: 1.0})},
        {"sampling": SamplingParams(grammar="root ::= other")},
        {"draft": 5},
        {"draft": "prompt"},
        {"draft": embedded.DRAFT},
        {"draft": [5, 6]},
    ],
    ids=str,
)
def test_generate_checks_its_arguments_and_leaves_the_target_free(
    local: sllm.LocalTarget, options: dict[str, Any]
) -> None:
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)):
            sllm.generate(local, "Once", **options)
    assert sllm.generate(local, "Once", sampling=GREEDY, max_tokens=2).text() is not None


@pytest.mark.parametrize("target", [None, "target.gguf", 5, object(), embedded.TARGET])
def test_targets_that_are_none(target: Any) -> None:
    with pytest.raises(TypeError):
        sllm.generate(target, "Once")


@pytest.mark.parametrize("prompt", [None, 5, b"Once", [1.5], "", []])
def test_prompts_that_are_none(local: sllm.LocalTarget, prompt: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        sllm.generate(local, prompt)


HINTS: list[Any] = [
    None,
    [],
    [-1],
    [10**6],
    [2**31 - 1, 5],
    [-(2**31)],
    range(5, 500),
    np.arange(5, 9, dtype=np.int32),
    [5] * 10_000,
]


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: repr(hint)[:30])
def test_whatever_a_callable_proposes_the_text_is_the_same(local: sllm.LocalTarget, hint: Any) -> None:
    def text(draft: Any) -> list[int]:
        stream = sllm.generate(
            local, "Once upon", draft=draft, sampling=SamplingParams(seed=3), max_tokens=20
        )
        return [token for run in stream for token in run.tokens]

    assert text(lambda _tokens, _n: hint) == text(None)


@pytest.mark.parametrize(
    "hint",
    [5, "text", b"ab", [1.5], ["5"], [[5]], np.array([5.0]), pytest.param(object(), id="object")],
    ids=repr,
)
def test_proposals_of_another_type_are_an_error_of_the_drafter(local: sllm.LocalTarget, hint: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        sllm.generate(local, "Once", draft=lambda _tokens, _n: hint, max_tokens=20).text()
    assert sllm.generate(local, "Once", sampling=GREEDY, max_tokens=2).text() is not None


def test_what_a_callable_raises_comes_out_and_frees_the_target(local: sllm.LocalTarget) -> None:
    class MineError(Exception):
        pass

    calls = 0

    def draft(_tokens: object, _n: int) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MineError
        return [5]

    stream = sllm.generate(local, "Once", draft=draft, max_tokens=200)
    with pytest.raises(MineError):
        for _run in stream:
            pass
    assert list(stream) == []  # it is over
    assert sllm.generate(local, "Once", sampling=GREEDY, max_tokens=2).text() is not None


def test_a_callable_that_uses_the_busy_target(local: sllm.LocalTarget) -> None:
    def draft(_tokens: object, _n: int) -> list[int]:
        sllm.generate(local, "Once")
        return []

    with pytest.raises(sllm.BusyError):
        sllm.generate(local, "Once", draft=draft, max_tokens=20).text()


def test_one_generation_at_a_time(local: sllm.LocalTarget) -> None:
    with sllm.generate(local, "Once", max_tokens=50) as first:
        next(first)
        with pytest.raises(sllm.BusyError):
            sllm.generate(local, "Twice")
        next(first)
    assert sllm.generate(local, "Twice", max_tokens=2).text() is not None


@pytest.mark.parametrize(
    ("pos", "tokens"),
    [
        (0, []),
        (-1, [5]),
        (10**9, [5]),
        (2**70, [5]),
        (2, [5] * 5000),
        (2, [2**40]),
        (2, [2**31]),
        (2, [-(2**40), 5]),
        (2, [-1, 5]),
        (0, [5, 6, 2**70]),
        (1, range(6, 60)),
    ],
)
def test_hints_never_raise_and_never_change_the_text(local: sllm.LocalTarget, pos: int, tokens: Any) -> None:
    prompt = np.array([5, 6], np.int32)

    def text(*, hinted: bool) -> list[int]:
        generation = local.open(prompt, GREEDY, 8)
        try:
            out: list[int] = []
            while generation.finish_reason is None:
                if hinted:
                    generation.hint(pos, tokens)
                out += next(generation).tokens
            return out
        finally:
            generation.close()

    assert text(hinted=True) == text(hinted=False)


def test_a_closed_generation_has_no_say_in_the_next(local: sllm.LocalTarget) -> None:
    prompt = np.array([5, 6], np.int32)
    old = local.open(prompt, GREEDY, 50)
    old.close()
    new = local.open(prompt, GREEDY, 50)
    before = local.context.memory.length(0)
    cancelled: list[object] = []
    done = threading.Event()

    def pester() -> None:
        while not done.is_set():
            old.cancel()
            cancelled.append(None)

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        while new.finish_reason is None:
            next(new)
    finally:
        done.set()
        thread.join()
    assert cancelled and local.context.memory.length(0) > before
    with pytest.raises(sllm.ClosedError):
        next(old)
    new.close()


def test_a_cancelled_generation_stays_cancelled(local: sllm.LocalTarget) -> None:
    generation = local.open(np.array([5, 6], np.int32), GREEDY, 50)
    next(generation)
    generation.cancel()
    for _ in range(2):
        with pytest.raises(sllm.CancelledError):
            next(generation)
    generation.close()
    assert sllm.generate(local, "Once", max_tokens=2).text() is not None


# ---- saved states -------------------------------------------------------------------------------------


def damaged_states() -> None:
    """States whose checksum is right and whose contents are not."""
    chance = random.Random(4)
    with sllm.Model(embedded.DRAFT) as model, model.context(n_ctx=256, n_seq_max=2, n_threads=1) as context:
        context.decode([5, 6, 7, 8] * 4)
        state = context.save(0)
        head, body = state[:40], state[48:]
        for i in range(300):
            damaged = bytearray(body)
            for _ in range(chance.choice([1, 2, 4])):
                place = chance.randrange(min(len(damaged), chance.choice([64, 200, 1000, len(damaged)])))
                damaged[place] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
            if i % 10 == 0:
                del damaged[chance.randrange(len(damaged)) :]
            n_tokens = chance.choice([16, 16, 16, 0, 1, 17, 300, 2**31, 2**32 - 1]) if i % 3 == 0 else 16
            print(i, flush=True)
            with contextlib.suppress(ValueError, sllm.ContextFullError):
                context.load(head + struct.pack("<II", n_tokens, zlib.crc32(damaged)) + bytes(damaged), 1)
            n = context.memory.length(1)
            with contextlib.suppress(sllm.SllmError):
                context.decode([9], seq_id=1)
                assert context.memory.length(1) == n + 1
        assert context.memory.tokens(0).tolist() == [5, 6, 7, 8] * 4
        context.load(state, 1)
        context.decode([9], seq_id=1)
    print("alive")


def test_damaged_states_with_a_right_checksum() -> None:
    assert "alive" in isolated("t.damaged_states()")


@pytest.mark.parametrize(
    "data", [None, 5, "text", b"", b"sllmseq1", bytes(100), pytest.param(object(), id="object")], ids=repr
)
def test_states_that_are_none(draft_model: sllm.Model, make_context: MakeContext, data: Any) -> None:
    context = make_context(draft_model, n_ctx=256)
    context.decode([5, 6])
    with pytest.raises((ValueError, TypeError)):
        context.load(data)
    assert context.memory.tokens(0).tolist() == [5, 6]


# ---- text ---------------------------------------------------------------------------------------------


def long_texts() -> None:
    with sllm.Model(embedded.TARGET) as model:
        for text in (
            "a" * 200_000,
            " " * 200_000,
            "\n" * 100_000,
            "1" * 200_000,
            "你" * 100_000,
            "a1 ?!\t" * 30_000,
            "\U0001f600" * 50_000,
            "\0" * 50_000,
            "<|im_start|>" * 5_000,
            "é\u0301\u0302" * 30_000,
            "'s'S'll " * 20_000,
        ):
            print(repr(text[:12]), flush=True)
            tokens = model.vocab.encode(text)
            assert model.vocab.decode(tokens) == text
    print("alive")


def test_long_texts_come_back_from_their_tokens() -> None:
    assert "alive" in isolated("t.long_texts()")

"""Some layers of a model: equal to the whole to the last bit, from whatever file, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples
from random_models import EVERY, N_VOCAB, SHAPES

import sllm
from sllm import embedded
from sllm.engine import gguf
from sllm.engine.architectures import ARCHITECTURES, REFUSED
from sllm.engine.layers import Embedding, LayerRange, export_layers, open_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from oracles import Floats, Tokens

    from sllm.engine.layer_file import LayeredFile

OPTIONS: dict[str, Any] = {"n_ctx": 128, **EXACT}
BATCHES = (8, 1, 1, 32, 5, 17, 2)


class Split:
    """A whole model out of ranges: those between the cuts, and the last one with the output."""

    def __init__(
        self,
        files: Path | LayeredFile | Sequence[Path],
        cuts: Sequence[int],
        vocabulary: sllm.Model | None = None,
        **options: Any,
    ) -> None:
        ranges = list(itertools.pairwise(cuts))
        given = [files] * len(ranges) if isinstance(files, Path) or not hasattr(files, "__len__") else files
        sources = [open_layers(one) if isinstance(one, Path) else one for one in given]  # type: ignore[union-attr]
        with ExitStack() as stack:
            self.embedding = stack.enter_context(Embedding(sources[0]))
            self.ranges = [
                stack.enter_context(
                    LayerRange(
                        source,
                        *ends,
                        output=ends is ranges[-1],
                        vocabulary=vocabulary if ends is ranges[-1] else None,
                        **{**OPTIONS, **options},
                    )
                )
                for source, ends in zip(sources, ranges, strict=True)
            ]
            self._stack = stack.pop_all()

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def hidden(self, tokens: Tokens | Sequence[Tokens], **where: Any) -> Any:
        """What enters the last range, for one sequence or for several."""
        several = not isinstance(tokens, np.ndarray)
        hidden: Any = [self.embedding.rows(t) for t in tokens] if several else self.embedding.rows(tokens)
        for one in self.ranges[:-1]:
            out = one.forward(hidden, **where)
            hidden = np.split(out, np.cumsum([len(t) for t in tokens])[:-1]) if several else out
        return hidden

    def logits(self, tokens: Tokens | Sequence[Tokens], **where: Any) -> Floats:
        """Logits behind every token."""
        return self.ranges[-1].forward(self.hidden(tokens, **where), **where)


def whole(context: sllm.Context, tokens: Tokens | Sequence[Tokens], **where: Any) -> Floats:
    """Logits behind every token, from the whole model."""
    rows = context.decode(tokens, logits="all", **where)
    assert rows is not None
    return rows.copy()


def some_tokens(n: int, seed: int = 0, n_vocab: int = N_VOCAB) -> Tokens:
    return np.random.default_rng(seed).integers(0, n_vocab, n).astype(np.int32)


def assert_equal_texts(path: Path, split: Split, *, again: bool = True, **options: Any) -> None:
    """Batches of 1 to 32, then again from the middle with other tokens."""
    tokens = some_tokens(sum(BATCHES))
    with sllm.Model(path) as model, model.context(**{**OPTIONS, **options}) as context:
        pos = 0
        for n in BATCHES:
            part = tokens[pos : pos + n]
            rows = whole(context, part)
            assert (
                np.ptp(rows, axis=0).max() > 0.1 or n == 1
            )  # a model that says the same to all proves nothing
            assert np.array_equal(split.logits(part, pos=pos), rows)
            pos += n
        if again:
            assert np.array_equal(split.logits(tokens[:9], pos=30), whole(context, tokens[:9], pos=30))


# ---- equal to the whole ------------------------------------------------------------------------------------


SPLIT = {name: shape for name, shape in EVERY.items() if shape.architecture in ARCHITECTURES}


def test_every_architecture_is_tested() -> None:
    assert {shape.architecture for shape in SPLIT.values()} == set(ARCHITECTURES)
    assert {*SHAPES} <= {*SPLIT}


def test_the_page_names_every_architecture() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layer-split.md").read_text(encoding="utf-8")
    can, refused = page.split("## Refused")
    named = set(re.findall(r"[\w-]+", can.split("## Cut anywhere")[1]))
    assert set(ARCHITECTURES) <= named
    assert set(REFUSED) <= set(re.findall(r"[\w-]+", refused))


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_is_the_whole(random_model: Callable[..., Path], name: str) -> None:
    path = random_model(name)
    file, n = open_layers(path), SPLIT[name].n_layer
    assert (file.architecture, file.n_layer, file.n_vocab) == (SPLIT[name].architecture, n, N_VOCAB)
    for cuts in SPLIT[name].cuts():
        with Split(file, cuts) as split:
            assert_equal_texts(path, split, again=name in SHAPES)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("gemma3")])
def test_a_cut_anywhere_in_the_period_of_a_sliding_window(
    random_model: Callable[..., Path], name: str
) -> None:
    path = random_model(name)
    for at in range(1, SHAPES[name].n_layer):
        with Split(open_layers(path), (0, at, SHAPES[name].n_layer)) as split:
            assert_equal_texts(path, split)


def test_the_sliding_windows_matter(random_model: Callable[..., Path]) -> None:
    """Or the tests above would show nothing: another pattern is another model."""
    names = ("gemma3", "gemma3, period 3", "gemma3, any pattern", "gemma3, no window")
    logits = []
    for name in names:
        with sllm.Model(random_model(name)) as model, model.context(**OPTIONS) as context:
            logits.append(whole(context, some_tokens(20))[-1])
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.combinations(logits, 2))


@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "q4_0", "q4_K"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "llama, experts"])
def test_weights_of_every_kind(random_model: Callable[..., Path], name: str, weights: str) -> None:
    """Whole and split are asked for the same batches, so it does not matter whether the kernels for one row
    and for several agree."""
    wide = {"n_embd": 256, "n_ff": 256, "n_head": 8} if weights == "q4_K" else {}
    path = random_model(name, weights=weights, **wide)
    with Split(path, (0, 1, 3, SHAPES[name].n_layer)) as split:
        assert_equal_texts(path, split)


@pytest.mark.parametrize(
    "options", [{"flash_attn": False, "type_v": "f16"}, {"type_k": "f16", "type_v": "f16"}]
)
def test_other_caches(llama: Path, options: dict[str, Any]) -> None:
    with Split(llama, (0, 2, 4), **options) as split:
        assert_equal_texts(llama, split, **options)


def test_several_threads(llama: Path) -> None:
    with (
        Split(llama, (0, 2, 4), n_threads=2) as split,
        sllm.Model(llama) as model,
        model.context(**{**OPTIONS, "n_threads": 2}) as context,
    ):
        for n in (4, 1):
            assert np.array_equal(split.logits(some_tokens(n)), whole(context, some_tokens(n)))


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3", "gemma2", "glm4", "glm4, sections", "bloom", "qwen35", "lfm2", "granitehybrid"],
)
@examples(12)
@given(data=st.data())
def test_several_sequences_of_any_lengths(
    random_model: Callable[..., Path], name: str, data: st.DataObject
) -> None:
    """In any order, and in more batches and ubatches than one: hidden states come out in the order of
    llama.cpp's ubatches."""
    path = random_model(name)
    n_rollback = data.draw(st.sampled_from([0, 3]))
    n_ubatch = data.draw(st.integers(n_rollback + 2 if n_rollback else 1, 12))
    options: dict[str, Any] = {
        "n_rollback": n_rollback,
        "n_seq_max": 4,
        "n_ctx": 512,
        "n_ubatch": n_ubatch,
        "n_batch": data.draw(st.integers(12, 64)),
    }
    calls = data.draw(
        st.lists(
            st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).flatmap(
                lambda seqs: st.tuples(
                    st.just(seqs), st.lists(st.integers(1, 13), min_size=len(seqs), max_size=len(seqs))
                )
            ),
            min_size=1,
            max_size=3,
        )
    )
    with (
        Split(path, SPLIT[name].cuts()[0], **options) as split,
        sllm.Model(path) as model,
        model.context(**{**OPTIONS, **options}) as context,
    ):
        for i, (seqs, lengths) in enumerate(calls):
            texts = [some_tokens(length, 10 * i + seq) for seq, length in zip(seqs, lengths, strict=True)]
            assert np.array_equal(split.logits(texts, seq_id=seqs), whole(context, texts, seq_id=seqs))


def test_sequences_do_not_see_one_another(llama: Path) -> None:
    texts = [some_tokens(n, n) for n in (5, 19, 11)]
    with Split(llama, (0, 1, 4, 4), n_seq_max=3, n_ctx=384, n_ubatch=8) as split:
        together = np.split(split.logits(texts, seq_id=[2, 0, 1]), [5, 24])
    for text, rows in zip(texts, together, strict=True):
        with Split(llama, (0, 1, 4, 4)) as split:
            assert np.array_equal(split.logits(text), rows)


def test_writes_in_the_middle_truncations_and_copies(llama: Path) -> None:
    options: dict[str, Any] = {"n_seq_max": 2, "n_ctx": 256}
    with (
        Split(llama, (0, 2, 3, 4), **options) as split,
        sllm.Model(llama) as model,
        model.context(**{**OPTIONS, **options}) as context,
    ):

        def both(tokens: Tokens, **where: Any) -> None:
            assert np.array_equal(split.logits(tokens, **where), whole(context, tokens, **where))
            assert {m.length(where.get("seq_id", 0)) for m in memories} == {
                context.memory.length(where.get("seq_id", 0))
            }

        memories = [one.memory for one in split.ranges]
        both(some_tokens(40))
        both(some_tokens(3, 1), pos=20)
        both(some_tokens(12, 2))
        for memory in (*memories, context.memory):
            memory.truncate(0, 9)
        both(some_tokens(2, 3))
        for memory in (*memories, context.memory):
            memory.copy(0, 1)
        both(some_tokens(6, 4), seq_id=1, pos=5)
        both(some_tokens(6, 5), seq_id=0)
        both(some_tokens(30, 6), seq_id=1)
        for memory in (*memories, context.memory):
            memory.clear(1)
        both(some_tokens(30, 7), seq_id=1, pos=0)
        for memory in (*memories, context.memory):
            memory.clear()
        both(some_tokens(30, 8), seq_id=0)


def test_a_recurrent_state_goes_back_over_the_last_rows_alone(random_model: Callable[..., Path]) -> None:
    """Layers do not keep what they were sent: what they cannot take back, they say to be sent again."""
    path = random_model("qwen35")
    rows = np.random.default_rng(0).standard_normal((40, 64), dtype=np.float32)
    with (
        LayerRange(path, 4, 12, n_rollback=3, **OPTIONS) as one,
        LayerRange(path, 4, 12, n_rollback=0, **OPTIONS) as other,
    ):
        expected = other.forward(rows)
        other.memory.clear()
        for n, back in (
            (20, 0),
            (4, 3),
            (4, 2),
            (1, 0),
            (5, 3),
            (3, 2),
        ):  # never more than the call had, less one
            pos = one.memory.length()
            found = one.forward(rows[pos : pos + n])
            assert np.array_equal(found, expected[pos : pos + n])
            one.memory.truncate(0, pos + n - back)
            assert one.memory.length() == pos + n - back
        pos = one.memory.length()
        one.forward(rows[pos : pos + 2])
        with pytest.raises(
            ValueError, match=rf"goes back from {pos + 2} positions to 0 at most, not to {pos - 1}"
        ):
            one.forward(rows[pos - 1 : pos], pos=pos - 1)
        assert one.memory.length() == 0
        assert np.array_equal(one.forward(rows), expected)
        other.forward(rows[:10])
        with pytest.raises(ValueError, match="not to 9: send the rows from there on again"):
            other.forward(rows[9:10], pos=9)


def test_the_same_rows_again_are_computed_again(llama: Path) -> None:
    """What was in the memory says nothing about other hidden states at the same place."""
    file = open_layers(llama)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6, 64), dtype=np.float32)
    for output in (False, True):
        with LayerRange(file, 2, 4, output=output, **OPTIONS) as tail:
            first = tail.forward(a)
            assert not np.array_equal(tail.forward(b, pos=0), first)
            assert np.array_equal(tail.forward(a, pos=0), first)


@examples(12)
@given(data=st.data())
def test_any_cuts_of_the_embedded_target(target_model: sllm.Model, data: st.DataObject) -> None:
    n = target_model.n_layer
    inner = data.draw(st.sets(st.integers(1, n), max_size=4))
    cuts = [0, *sorted(inner), n] if inner else [0, n]
    options: dict[str, Any] = {
        "n_seq_max": 2,
        "n_ctx": 192,
        "n_batch": 32,
        "n_ubatch": data.draw(st.sampled_from([5, 32])),
    }
    with (
        Split(Path(embedded.TARGET), cuts, **options) as split,
        target_model.context(**{**OPTIONS, **options}) as context,
    ):
        memories = [one.memory for one in split.ranges]
        for step in range(data.draw(st.integers(2, 6))):
            seq = data.draw(st.integers(0, 1))
            length = context.memory.length(seq)
            what = data.draw(st.sampled_from(["write", "write", "write", "truncate", "copy"]))
            pos = data.draw(st.integers(0, length))
            if what == "write":
                n_tokens = data.draw(st.integers(1, 40))
                if pos + n_tokens > 96:
                    for run in (split.logits, lambda *a, **k: whole(context, *a, **k)):
                        with pytest.raises(sllm.errors.ContextFullError):
                            run(some_tokens(n_tokens, step), seq_id=seq, pos=pos)
                    continue
                tokens = some_tokens(n_tokens, step, target_model.vocab.n_tokens)
                rows = whole(context, tokens, seq_id=seq, pos=pos)
                assert np.array_equal(split.logits(tokens, seq_id=seq, pos=pos), rows)
            for memory in (*memories, context.memory):
                if what == "truncate":
                    memory.truncate(seq, pos)
                elif what == "copy":
                    memory.copy(seq, 1 - seq)
            assert all(m.length(seq) == context.memory.length(seq) for m in memories)


# ---- the embedding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_rows_of_the_embedding(random_model: Callable[..., Path], name: str, weights: str) -> None:
    path = random_model(name, weights=weights)
    shape = dataclasses.replace(SHAPES[name], weights=weights)
    _dims, _kind, data = random_models.make(shape).tensors[b"token_embd.weight"]
    expected = random_models.decoded(data, weights).reshape(N_VOCAB, shape.n_embd)
    scale = {"llama": 1.0, "gemma3": shape.n_embd**0.5, "granite": 12.0}[name]
    with Embedding(open_layers(path)) as embedding:
        assert (embedding.n_tokens, embedding.n_embd) == (N_VOCAB, shape.n_embd)
        everything = embedding.rows(np.arange(N_VOCAB, dtype=np.int32))
        assert everything.dtype == np.float32
        assert np.array_equal(everything, expected * np.float32(scale))
        some = some_tokens(50)
        assert np.array_equal(embedding.rows(some), everything[some])
        assert np.array_equal(embedding.rows([3, 3]), everything[[3, 3]])
        assert embedding.rows([]).shape == (0, shape.n_embd)
        for bad in ([-1], [0, N_VOCAB], [2**31 - 1]):
            with pytest.raises(ValueError, match=f"token {bad[-1]} is not in the vocabulary of {N_VOCAB}"):
                embedding.rows(bad)
        with pytest.raises(TypeError, match="tokens"):
            embedding.rows(np.zeros(3))
    with pytest.raises(sllm.errors.ClosedError, match="closed"):
        embedding.rows([1])
    embedding.close()


# ---- files of a range --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama", "qwen2", "qwen2, tied", "qwen3moe", "gemma3, period 3", "starcoder2", "bloom", "gpt2", "mpt",
        "mpt, positions", "phi2", "cohere2", "glm4", "deepseek2", "gemma4", "lfm2", "nemotron_h", "qwen35",
        "qwen35, head", "glm4moe, head",
    ],
)  # fmt: skip
def test_exported_files_are_as_good_as_the_whole(
    random_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path, n, cuts = random_model(name), SPLIT[name].n_layer, SPLIT[name].cuts()[0]
    parts = [tmp_path / f"{i}.gguf" for i in range(len(cuts) - 1)]
    for (start, stop), part in zip(itertools.pairwise(cuts), parts, strict=True):
        shown: list[float] = []
        size = export_layers(path, part, start, stop, progress=shown.append)
        assert part.stat().st_size == size
        assert shown == sorted(shown)
        assert shown[-1] == 1.0
        assert gguf.model_id(part) == gguf.model_id(path)
        file = open_layers(part)
        assert (file.n_layer, file.layers, file.n_embd) == (n, range(start, stop), SPLIT[name].n_embd)
        assert (file.embedding is not None, file.output is not None) == (start == 0, stop == n)
        header = gguf.read_header(part)
        assert any(key.startswith("tokenizer.") for key in header.pairs) == (start == 0 or stop == n)
    with Split(parts, cuts) as split:
        assert_equal_texts(path, split, again=name in SHAPES)
    assert sorted(tmp_path.iterdir()) == parts


def test_the_vocabulary_of_a_part(tmp_path: Path, target_model: sllm.Model) -> None:
    """The first and the last part can say what their tokens mean, those between cannot."""
    parts = [tmp_path / f"{i}.gguf" for i in range(3)]
    for part, (start, stop) in zip(parts, ((0, 2), (2, 7), (7, 8)), strict=True):
        export_layers(embedded.TARGET, part, start, stop)
    for part in (parts[0], parts[2]):
        with sllm.Model(part, vocab_only=True) as vocabulary:
            assert vocabulary.vocab.fingerprint == target_model.vocab.fingerprint
            with (
                Split(parts, (0, 2, 7, 8), vocabulary=vocabulary) as split,
                target_model.context(**OPTIONS) as context,
            ):
                prompt = vocabulary.vocab.encode("Once upon a time")
                found = split.ranges[-1].verify([0], [prompt], hidden=split.hidden(prompt))
                assert np.array_equal(found.tokens, context.verify([0], [prompt]).tokens)
    with pytest.raises((sllm.ModelLoadError, sllm.UnsupportedModelError)), sllm.Model(parts[1]) as model:
        model.vocab.encode("Once")
    assert b"Once" not in parts[1].read_bytes()


# One of each kind of end (sllm.engine.architectures.ENDS), and one that is scaled by what llama.cpp derives.
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "minicpm", "gemma2", "starcoder2", "mpt", "phi2", "cohere2", "olmo", "lfm2"]
)
def test_norm_and_head_in_a_file_of_their_own(
    random_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path, n = random_model(name), SPLIT[name].n_layer
    parts = [tmp_path / "layers.gguf", tmp_path / "head.gguf"]
    export_layers(path, parts[0], 0, n)
    export_layers(path, parts[1], n, n)
    assert open_layers(parts[1]).layers == range(0)
    with Split(parts, (0, n, n)) as split:
        assert_equal_texts(path, split, again=name in SHAPES)


def test_a_part_of_a_part(llama: Path, tmp_path: Path) -> None:
    whole_part, again, direct = (tmp_path / name for name in ("1-4.gguf", "again.gguf", "direct.gguf"))
    export_layers(llama, whole_part, 1, 4)
    export_layers(whole_part, again, 2, 4)
    export_layers(llama, direct, 2, 4)
    assert again.read_bytes() == direct.read_bytes()
    with Split([llama, again], (0, 2, 4)) as split:
        assert_equal_texts(llama, split)
    export_layers(whole_part, again, 2, 3)  # over what is there
    export_layers(llama, direct, 2, 3)
    assert again.read_bytes() == direct.read_bytes()


@pytest.mark.parametrize("name", ["llama", "bloom", "lfm2", "qwen35, head"])
def test_a_part_of_all_layers_is_a_model(
    random_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path, model, n = tmp_path / "all.gguf", random_model(name), SPLIT[name].n_layer
    export_layers(model, path, 0, n)
    assert {*gguf.read_header(path).tensors} == {*gguf.read_header(model).tensors}
    with sllm.Model(path) as copy, copy.context(**OPTIONS) as context, Split(model, (0, n)) as split:
        tokens = some_tokens(20)
        assert np.array_equal(split.logits(tokens), whole(context, tokens))


def test_a_model_in_several_files(llama: Path, tmp_path: Path) -> None:
    first = random_models.write_in_parts(tmp_path, "m", SHAPES["llama"], 3)
    file = open_layers(first)
    assert len(file.paths) == 3
    with Split(file, (0, 1, 3, 4)) as split:
        assert_equal_texts(first, split)
        assert_equal_texts(llama, split)
    part = tmp_path / "middle.gguf"
    export_layers(first, part, 1, 3)
    assert len(open_layers(part).paths) == 1
    assert gguf.model_id(part) == gguf.model_id(first)
    with Split([first, part, first], (0, 1, 3, 4)) as split:
        assert_equal_texts(llama, split)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(OSError, match="m-00002-of-00003"):
        open_layers(first)


@pytest.mark.parametrize(("alignment", "behind"), [(32, 0), (64, 0), (4096, 0), (32, 100_000)])
def test_tensors_of_any_size_at_any_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int, behind: int
) -> None:
    """A file has an alignment of its own, and what is put together has the usual one."""
    odd = dataclasses.replace(SHAPES["llama, biases"], weights="f32", n_ff=33)
    file = random_models.make(odd)
    file.metadata[b"general.alignment"] = (4, alignment)
    monkeypatch.setattr(file, "_aligned", lambda n: -(-n // alignment) * alignment)
    path = file.write(tmp_path / "m.gguf")
    with path.open("ab") as more:
        more.write(b"\xff" * behind)
    parts = [tmp_path / f"{i}.gguf" for i in range(2)]
    for i, part in enumerate(parts):
        export_layers(path, part, 2 * i, 2 * i + 2)
    with Split(path, (0, 2, 4)) as split, Split(parts, (0, 2, 4)) as from_parts:
        assert_equal_texts(path, split)
        assert_equal_texts(path, from_parts)


# ---- verify ------------------------------------------------------------------------------------------------


SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": dataclasses.replace(PLAIN, seed=7),
    "penalties": dataclasses.replace(
        PLAIN, seed=3, temperature=0.8, top_k=40, penalty_last_n=32, penalty_repeat=1.3, penalty_freq=0.2
    ),
    "grammar": dataclasses.replace(PLAIN, seed=1, grammar='root ::= ([a-z] | " ")*'),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("cuts", [(0, 3, 7, 8), (0, 8, 8)])
def test_a_tail_verifies_like_the_whole(
    target_model: sllm.Model, sampling: sllm.SamplingParams, cuts: tuple[int, ...]
) -> None:
    """With drafts that are right, wrong, right at first and too long."""
    prompt = target_model.vocab.encode("Once upon a time there was")
    rng = np.random.default_rng(0)
    with (
        sllm.Model(embedded.TARGET, vocab_only=True) as vocabulary,
        Split(Path(embedded.TARGET), cuts, vocabulary=vocabulary) as split,
        target_model.context(**OPTIONS) as context,
        target_model.context(**OPTIONS) as teacher,
    ):
        tail, n = split.ranges[-1], len(prompt)
        text = [int(t) for t in prompt]
        teacher.decode(prompt[:-1])
        while len(text) < n + 50:  # what will be selected
            step = teacher.verify([0], [text[-1]], sampling=sampling, start=[n])
            text.append(int(step.tokens[0, 0]))
        context.decode(prompt[:-1])
        split.logits(prompt[:-1])
        # A grammar and penalties look at the tokens before, so the tail has to know them.
        tail.context.decode(prompt[:-1], pos=0, hidden=split.hidden(prompt[:-1], pos=0))
        at = n - 1
        n_right = []
        while at < n + 40:
            k = int(rng.integers(0, 7))
            chain = np.array(text[at + 1 : at + 1 + k], dtype=np.int32)
            if k and rng.random() < 0.5:
                chain[rng.integers(0, k)] = rng.integers(0, 2000)
            last = np.array([text[at]], dtype=np.int32)
            expected = context.verify([0], last, [chain], sampling=sampling, start=[n], logprobs=True)
            hidden = split.hidden(np.concatenate([last, chain]), pos=at)
            found = tail.verify(
                [0], last, [chain], hidden=hidden, sampling=sampling, start=[n], logprobs=True
            )
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.n_accepted, expected.n_accepted)
            assert found.logprobs is not None
            assert expected.logprobs is not None
            assert np.array_equal(found.logprobs, expected.logprobs)
            n_right.append(int(found.n_accepted[0]))
            assert found.tokens[0, : n_right[-1] + 1].tolist() == text[at + 1 : at + 2 + n_right[-1]]
            at += n_right[-1] + 1
            assert tail.memory.length() == context.memory.length() == at
        assert max(n_right) >= 2
        assert np.array_equal(tail.memory.tokens(), context.memory.tokens())


def test_several_sequences_are_verified_at_once(target_model: sllm.Model) -> None:
    options: dict[str, Any] = {"n_seq_max": 3, "n_ctx": 384}
    prompts = [target_model.vocab.encode(text) for text in ("Once", "The sun is", "One day a little")]
    seqs = [2, 0, 1]
    sampling = [dataclasses.replace(PLAIN, seed=i) for i in range(3)]
    with (
        Split(Path(embedded.TARGET), (0, 2, 7, 8), vocabulary=target_model, **options) as split,
        target_model.context(**{**OPTIONS, **options}) as context,
    ):
        tail = split.ranges[-1]
        last = [int(p[-1]) for p in prompts]
        for one, seq in zip(prompts, seqs, strict=True):
            if len(one) > 1:
                context.decode(one[:-1], seq_id=seq)
                split.logits(one[:-1], seq_id=seq)
        for step in range(8):
            drafts = [some_tokens(n, step, 2000) for n in (step % 3, 4, 0)]
            rows = [np.array([t, *d], dtype=np.int32) for t, d in zip(last, drafts, strict=True)]
            pos = [tail.memory.length(seq) for seq in seqs]
            hidden = np.concatenate(split.hidden(rows, seq_id=seqs, pos=pos))
            found = tail.verify(seqs, last, drafts, hidden=hidden, sampling=sampling)
            expected = context.verify(seqs, last, drafts, sampling=sampling)
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.n_accepted, expected.n_accepted)
            last = [int(found.tokens[i, found.n_accepted[i]]) for i in range(3)]


# ---- only what is needed -----------------------------------------------------------------------------------


def test_a_range_holds_its_own_layers_alone(llama: Path) -> None:
    file = open_layers(llama)
    header = gguf.read_header(llama)

    def weights(*begins: str) -> int:
        return sum(t.size for name, t in header.tensors.items() if name.startswith(begins))

    ends = 32 * 64 * 4 + weights("output_norm")  # the head that is never computed, and the norm
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        with LayerRange(file, start, stop, **OPTIONS) as one:
            assert one.size_bytes == weights(*(f"blk.{i}." for i in range(start, stop))) + ends
    with LayerRange(file, 3, 4, output=True, **OPTIONS) as tail:
        assert tail.size_bytes == weights("blk.3.", "output")


_READ = """
import sys
from sllm.engine.layers import LayerRange, open_layers

def rchar():
    return int(open("/proc/self/io").read().split()[1])

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

file = open_layers(sys.argv[1])
LayerRange(sys.argv[2], 0, 1, n_ctx=64, n_threads=1).close()
read, held = rchar(), anonymous()
with LayerRange(file, int(sys.argv[3]), int(sys.argv[4]), n_ctx=64, n_threads=1) as one:
    print(rchar() - read, anonymous() - held, one.size_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_other_layers_are_not_read(random_model: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
    big = random_model("llama", n_embd=512, n_head=16, n_ff=1536, n_layer=12)  # about 36 MB
    ended = subprocess.run(
        [sys.executable, "-c", _READ, str(big), str(llama), "5", "7"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
    )
    read, held, size = (int(n) for n in ended.stdout.split())
    assert size < big.stat().st_size * 0.19
    assert size <= read < 1.1 * size + 100_000
    assert held < 1.3 * size + 4_000_000  # the weights, and what computes with them

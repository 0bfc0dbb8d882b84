"""A model's own heads as its draft: the text is what it is without them, and they follow the memory.

q8_0 weights, flash attention and a q8_0 KV cache on one thread: results do not depend on how tokens are
grouped into batches, so texts are compared to the bit.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import random_models
from random_models import HEADS, N_VOCAB

import sllm
from sllm.engine.layers import Embedding, open_layers
from sllm.engine.mtp import Heads, has_mtp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sllm.engine.jobs import Draft

EXACT: dict[str, Any] = {"n_threads": 1, "flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}
N_CTX = 256
NONE = "there are no MTP heads among the weights"

pytestmark = pytest.mark.skipif(not has_mtp(), reason="this build cannot draft with MTP heads")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], sllm.Model]]:
    """Models whose head agrees with them most of the time."""
    folder = tmp_path_factory.mktemp("models")
    opened: dict[str, sllm.Model] = {}
    with ExitStack() as stack:

        def load(name: str) -> sllm.Model:
            if name not in opened:
                # Routers are float32 in real files, whose products depend on the number of rows on some CPUs.
                file = random_models.make_agreeing(replace(HEADS[name], routers="q8_0"))
                path = file.write(folder / f"{len(opened)}.gguf")
                opened[name] = stack.enter_context(sllm.Model(path))
            return opened[name]

        yield load


@pytest.fixture(scope="module")
def glm(model_of: Callable[[str], sllm.Model]) -> sllm.Model:
    """One whose memory is attention alone."""
    return model_of("glm4moe, head")


def sampling_of(model: sllm.Model, seed: int, **more: Any) -> sllm.SamplingParams:
    """No text of a random model shall end by itself."""
    ends = [(token, -np.inf) for token in range(N_VOCAB) if model.vocab.is_eog(token)]
    return sllm.SamplingParams(temperature=1.0, top_k=0, top_p=1, min_p=0, seed=seed, logit_bias=ends, **more)


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(10, N_VOCAB, n).tolist() for n in lengths]


class Texts:
    """Texts in the sequences of a context, drafted by its heads or not at all."""

    def __init__(
        self, context: sllm.Context, prompts: list[list[int]], heads: Heads | None, **more: Any
    ) -> None:
        self.context, self.heads = context, heads
        self.seqs = list(range(len(prompts)))
        self.starts = [len(prompt) for prompt in prompts]
        self.texts = [list(prompt) for prompt in prompts]
        model = cast("sllm.Model", context.model)
        self.sampling = [sampling_of(model, seed, **more) for seed in self.seqs]
        self.n_passes = self.n_drafted = self.n_accepted = 0
        context.decode([prompt[:-1] for prompt in prompts], seq_id=self.seqs, pos=[0] * len(prompts))

    def round(self, n_max: int | Sequence[int] = 3) -> None:
        last = [text[-1] for text in self.texts]
        draft = None
        if self.heads is not None:
            draft = self.heads.draft(self.seqs, last, n_max=n_max, sampling=self.sampling, start=self.starts)
            self.n_drafted += int(draft.lengths.sum())
        verdict = self.context.verify(self.seqs, last, draft, sampling=self.sampling, start=self.starts)
        self.n_passes += 1
        for text, tokens, n in zip(self.texts, verdict.tokens, verdict.n_accepted, strict=True):
            self.n_accepted += int(n)
            text += tokens[: n + 1].tolist()
        for seq, text in zip(self.seqs, self.texts, strict=True):
            assert self.context.memory.length(seq) == len(text) - 1

    def until(self, n_tokens: int, n_max: int | Sequence[int] = 3) -> list[list[int]]:
        while any(len(text) < start + n_tokens for text, start in zip(self.texts, self.starts, strict=True)):
            self.round(n_max)
        return [text[: start + n_tokens] for text, start in zip(self.texts, self.starts, strict=True)]


def plain(model: sllm.Model, prompts: list[list[int]], n_tokens: int, **more: Any) -> list[list[int]]:
    with model.context(n_ctx=N_CTX * len(prompts), n_seq_max=len(prompts), **EXACT) as context:
        return Texts(context, prompts, None, **more).until(n_tokens)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_the_text_is_what_it_is_without_them(
    model_of: Callable[[str], sllm.Model], name: str, unified: bool
) -> None:
    model = model_of(name)
    assert model.n_mtp == 1
    prompts = prompts_of(1, 150, 40)  # the second one takes several batches
    expected = plain(model, prompts, 60)
    sizes: dict[str, Any] = {"n_ctx": 3 * N_CTX, "n_seq_max": 3, "n_batch": 48, "n_ubatch": 32}
    with model.context(**sizes, kv_unified=unified, **EXACT) as context:
        texts = Texts(context, prompts, Heads(context))
        assert texts.until(60) == expected
        assert texts.n_accepted > 0.5 * texts.n_drafted
        assert texts.n_passes <= 60 / 1.5


def test_a_head_that_knows_nothing_changes_nothing(tmp_path: Path) -> None:
    path = random_models.write(tmp_path / "random.gguf", replace(HEADS["glm4moe, head"], routers="q8_0"))
    with sllm.Model(path) as model, model.context(n_ctx=N_CTX, **EXACT) as context:
        prompts = prompts_of(20)
        texts = Texts(context, prompts, Heads(context))
        assert texts.until(40, 4) == plain(model, prompts, 40)


@pytest.mark.parametrize("n_max", [0, 1, 8, [5, 0, 2]])
def test_any_length_of_a_draft(glm: sllm.Model, n_max: int | list[int]) -> None:
    prompts = prompts_of(9, 30, 17)
    with glm.context(n_ctx=3 * N_CTX, n_seq_max=3, **EXACT) as context:
        assert Texts(context, prompts, Heads(context)).until(30, n_max) == plain(glm, prompts, 30)


@pytest.mark.parametrize(
    "more",
    [
        {"penalty_last_n": 16, "penalty_repeat": 1.3, "penalty_present": 0.5},
        {"grammar": 'root ::= ("a" | "e" | "t" | "th" | " " | "s")*'},
    ],
)
def test_penalties_and_grammars(glm: sllm.Model, more: dict[str, Any]) -> None:
    prompts = prompts_of(12, 25)
    with glm.context(n_ctx=2 * N_CTX, n_seq_max=2, **EXACT) as context:
        texts = Texts(context, prompts, Heads(context), **more)
        assert texts.until(40) == plain(glm, prompts, 40, **more)
        assert texts.n_accepted > 0


def test_a_draft_goes_on_from_its_own_chain_and_from_any_other(glm: sllm.Model) -> None:
    prompt = prompts_of(50)[0]
    sampling = sampling_of(glm, 4)
    with glm.context(n_ctx=N_CTX, **EXACT) as context:
        heads = Heads(context)
        context.decode(prompt[:-1])

        def drafted(chain: list[int], n_max: int) -> list[int]:
            draft = heads.draft([0], [[prompt[-1], *chain]], n_max=n_max, sampling=sampling)
            tokens: list[int] = draft.tokens[0].tolist()
            return tokens

        whole = drafted([], 8)
        for n in (1, 3, 7):
            assert drafted([], n) == whole[:n]
            assert drafted(whole[:n], 8 - n) == whole[n:]
        assert drafted(whole[:5], 3) == whole[5:]  # not the last one's
        other = [whole[0] + 1, *whole[1:3]]
        assert drafted(other, 4) == drafted(other, 4)
        assert drafted(whole[:2], 6) == whole[2:]
        assert context.memory.length() == len(prompt) - 1


def test_a_draft_depends_on_the_text_alone(model_of: Callable[[str], sllm.Model]) -> None:
    """However it came about: at once, token by token, copied, after a wrong draft, without any for long."""
    for name in HEADS:
        model = model_of(name)
        text = prompts_of(130)[0]
        sampling = sampling_of(model, 7)
        n_seq = 5
        with model.context(n_ctx=n_seq * N_CTX, n_seq_max=n_seq, n_rollback=4, **EXACT) as context:
            heads = Heads(context)
            context.decode(text[:-1], seq_id=0)
            for token in text[:-1]:
                context.decode([token], seq_id=1)
            context.decode(text[:60], seq_id=2)
            context.verify([2], [text[60]], [[1, 2, 3]], sampling=sampling)
            context.decode(text[61:-1], seq_id=2)
            context.decode(text[:60], seq_id=3)
            heads.draft([3], [text[60]], n_max=5, sampling=sampling)
            context.decode(text[60:-1], seq_id=3)
            context.memory.copy(3, 4)
            drafts = heads.draft(range(n_seq), [text[-1]] * n_seq, n_max=5, sampling=sampling)
            assert (drafts.tokens == drafts.tokens[0]).all(), name
            assert np.ptp(drafts.probs, axis=0).max() == 0, name


def test_after_taking_back_clearing_and_loading(model_of: Callable[[str], sllm.Model]) -> None:
    for name in HEADS:
        model = model_of(name)
        prompts = prompts_of(70, 30)
        expected = plain(model, prompts, 30)
        with model.context(n_ctx=2 * N_CTX, n_seq_max=2, **EXACT) as context:
            heads = Heads(context)
            Texts(context, prompts_of(90, 90), heads).until(10)
            context.memory.truncate(0, 50)
            context.memory.clear(1)
            assert Texts(context, prompts, heads).until(30) == expected
            context.memory.clear()
            texts = Texts(context, prompts, heads)
            saved = context.save(0)
            texts.until(10)
            context.load(saved, 0)
            heads.draft([0], [prompts[0][-1]], sampling=texts.sampling[0])
            assert Texts(context, prompts, heads).until(30) == expected


def test_a_text_up_to_the_end_of_the_context(glm: sllm.Model) -> None:
    prompt = prompts_of(230)[0]
    with glm.context(n_ctx=256, **EXACT) as small, glm.context(n_ctx=512, **EXACT) as large:
        expected = Texts(large, [prompt], None).until(40)[0]
        texts = Texts(small, [prompt], Heads(small))
        while len(texts.texts[0]) <= small.n_ctx_seq:
            texts.round(8)
        assert texts.texts[0] == expected[: len(texts.texts[0])]
        with pytest.raises(sllm.ContextFullError):
            texts.round(8)


def test_cancelled_at_any_moment_nothing_is_lost(model_of: Callable[[str], sllm.Model]) -> None:
    for name in ("glm4moe, head", "qwen35, head"):
        model = model_of(name)
        prompts = prompts_of(80, 60)
        expected = plain(model, prompts, 50)
        with model.context(n_ctx=2 * N_CTX, n_seq_max=2, n_batch=64, **EXACT) as context:
            heads = Heads(context)
            texts = Texts(context, prompts, heads)
            ended = threading.Event()

            def cancel(context: sllm.Context = context, ended: threading.Event = ended) -> None:
                while not ended.wait(0.002):
                    context.cancel()

            thread = threading.Thread(target=cancel)
            thread.start()
            try:
                for _ in range(60):
                    if max(map(len, texts.texts)) > N_CTX - 8:
                        break  # on a busy machine few rounds are cancelled, and the texts come to their end
                    try:
                        texts.round(6)
                    except sllm.CancelledError:
                        assert [context.memory.length(seq) for seq in texts.seqs] == [
                            len(text) - 1 for text in texts.texts
                        ]
            finally:
                ended.set()
                thread.join()
            assert texts.until(50) == expected


def test_what_cannot_draft_says_what_is_missing(tmp_path: Path, glm: sllm.Model) -> None:
    shape = HEADS["glm4moe, head"]
    file = random_models.make(shape)
    heads = {name: tensor for name, tensor in file.tensors.items() if b".nextn." in name}
    at = f"blk.{shape.n_layer}.".encode()
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(at)}
    trunk = file.write(tmp_path / "trunk.gguf")
    whole = random_models.write(tmp_path / "whole.gguf", shape)
    for path, load_mtp in ((trunk, True), (whole, False), (sllm.embedded.DRAFT, True)):
        with sllm.Model(path, load_mtp=load_mtp) as model, model.context(n_ctx=64) as context:
            assert model.n_mtp == 0
            with pytest.raises(sllm.UnsupportedModelError, match=NONE):
                Heads(context)
            context.decode([5, 6])  # it goes on as it was
    file.tensors = heads
    with pytest.raises(sllm.ModelLoadError, match="MTP heads without the model"):
        sllm.Model(file.write(tmp_path / "heads.gguf"))
    with (
        sllm.LayerRange(sllm.embedded.DRAFT, 0, 1, n_ctx=64) as layers,
        pytest.raises(sllm.UnsupportedModelError, match="layers"),
    ):
        Heads(layers.context)
    with sllm.LayerRange(whole, 3, 4, output=True, n_ctx=64) as layers:
        assert layers.context.model.n_mtp == 0
        with pytest.raises(sllm.UnsupportedModelError, match=f"{NONE} .*load_mtp"):
            Heads(layers.context)
    with glm.context(n_ctx=64) as context:
        rows = context.decode([5, 6], logits="last")
        with pytest.raises(ValueError, match="logits"):
            Heads(context)
        del rows
        Heads(context)


@pytest.mark.parametrize("architecture", ["eagle3", "dflash", "gemma4-assistant"])
def test_other_drafts_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    file = random_models.make(random_models.SHAPES["llama"])
    file.metadata[b"general.architecture"] = (8, architecture.encode())
    path = file.write(tmp_path / "draft.gguf")
    with pytest.raises(sllm.UnsupportedModelError, match=architecture):
        sllm.Model(path)


def test_several_heads_are_refused(tmp_path: Path) -> None:
    shape = replace(HEADS["glm4moe, head"], n_heads=2)
    with sllm.Model(random_models.write(tmp_path / "two.gguf", shape)) as model:
        assert model.n_mtp == 2
        with (
            model.context(n_ctx=64) as context,
            pytest.raises(sllm.UnsupportedModelError, match="2 MTP heads"),
        ):
            Heads(context)


def test_a_model_in_several_files_has_its_heads(tmp_path: Path) -> None:
    path = random_models.write_in_parts(tmp_path, "parts", HEADS["glm4moe, head"], 3)
    with sllm.Model(path) as model, model.context(n_ctx=64) as context:
        assert model.n_mtp == 1
        context.decode([5, 6])
        assert Heads(context).draft([0], [7], n_max=2).lengths.tolist() == [2]


def test_wrong_arguments_are_refused_and_nothing_is_lost(glm: sllm.Model) -> None:
    with glm.context(n_ctx=128, n_seq_max=2, **EXACT) as context:
        heads = Heads(context)
        context.decode([5, 6, 7])
        wrong: list[tuple[list[int], Any]] = [
            ([2], [5]),
            ([0, 0], [5, 5]),
            ([0], [N_VOCAB]),
            ([0], [[]]),
            ([0], [[5, -1]]),
        ]
        for seq_ids, tokens in wrong:
            with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
                heads.draft(seq_ids, tokens)
        with pytest.raises(ValueError, match="p_min"):
            heads.draft([0], [5], p_min=2.0)
        with pytest.raises(ValueError, match="gap"):
            heads.draft([0], [5], pos=4)
        assert context.memory.length() == 3
        assert heads.draft([0], [5], pos=2, n_max=3).lengths.tolist() == [3]
        assert context.memory.length() == 2  # what came after it is void
        assert repr(context) in repr(heads)
    with pytest.raises(sllm.ClosedError):
        heads.draft([0], [5])


def test_a_second_opening_keeps_the_memory(glm: sllm.Model) -> None:
    with glm.context(n_ctx=128, **EXACT) as context:
        context.decode([5, 6, 7])
        Heads(context)
        assert context.memory.length() == 0
        context.decode([5, 6, 7])
        Heads(context)
        assert context.memory.length() == 3
        context.set_threads(2)


# ---- of a model's last layers


def last_layers(path: Path, stack: ExitStack, n_seq: int) -> tuple[Any, Any, Any]:
    """The embedding, the first layers, and the last with their head, as few as run apart."""
    file = open_layers(path)
    n = file.n_layer
    cut = next(k for k in range(n - 1, 0, -1) if not file.obstacle(k, n) and not file.obstacle(0, k))
    settings: dict[str, Any] = {"n_ctx": N_CTX * n_seq, "n_seq_max": n_seq, "n_batch": 48, **EXACT}
    vocabulary = stack.enter_context(sllm.Model(path, vocab_only=True))
    embedding = stack.enter_context(Embedding(file))
    first = stack.enter_context(sllm.LayerRange(file, 0, cut, **settings))
    last = stack.enter_context(
        sllm.LayerRange(file, cut, n, output=True, vocabulary=vocabulary, load_mtp=True, **settings)
    )
    return embedding, first, last


def drafts_of_both(path: Path) -> tuple[Draft, Draft]:
    """What the heads of a whole model draft after three texts, and those of its last layers."""
    prompts = prompts_of(3, 150, 40)
    seqs = list(range(len(prompts)))
    n = len(prompts)
    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(path))
        whole = stack.enter_context(model.context(n_ctx=N_CTX * n, n_seq_max=n, n_batch=48, **EXACT))
        embedding, first, last = last_layers(path, stack, n)
        there, here = Heads(whole), Heads(last.context, embedding)
        texts = [prompt[:-1] for prompt in prompts]
        whole.decode(texts, seq_id=seqs)
        hidden = first.forward([embedding.rows(text) for text in texts], seq_id=seqs)
        last.context.decode(texts, seq_id=seqs, hidden=hidden)
        ends = [prompt[-1] for prompt in prompts]
        sampling = sampling_of(model, 3)
        embedding.close()  # the heads have the file open themselves
        one = there.draft(seqs, ends, n_max=[6, 2, 5], sampling=sampling)
        other = here.draft(seqs, ends, n_max=[6, 2, 5], sampling=sampling)
    return one, other


@pytest.mark.parametrize("name", HEADS)
def test_the_last_layers_draft_what_the_whole_model_drafts(
    model_of: Callable[[str], sllm.Model], name: str
) -> None:
    whole, last = drafts_of_both(model_of(name).path)
    assert np.array_equal(whole.tokens, last.tokens)
    assert np.array_equal(whole.probs, last.probs)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q4_0"])
@pytest.mark.parametrize("where", ["of the model", "tied", "of the head"])
def test_embeddings_of_every_kind(tmp_path: Path, kind: str, where: str) -> None:
    """The model's, one that is the output as well, and one that the head has for itself."""
    file = random_models.make_agreeing(replace(HEADS["glm4moe, head"], routers="q8_0"))
    rows = np.random.default_rng(2).standard_normal((N_VOCAB, 64), dtype=np.float32)
    number = {"f32": 0, "f16": 1, "q4_0": 2, "bf16": 30}[kind]
    tensor = ([64, N_VOCAB], number, random_models.encoded(rows, kind))
    file.tensors[b"blk.4.nextn.embed_tokens.weight" if where == "of the head" else b"token_embd.weight"] = (
        tensor
    )
    if where == "tied":
        del file.tensors[b"output.weight"]
    whole, last = drafts_of_both(file.write(tmp_path / "model.gguf"))
    assert np.array_equal(whole.tokens, last.tokens)
    assert np.array_equal(whole.probs, last.probs)


def test_last_layers_need_the_embedding_of_their_model(tmp_path: Path, glm: sllm.Model) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(glm.path.read_bytes())
    with ExitStack() as stack:
        embedding, first, last = last_layers(copy, stack, 1)
        with pytest.raises(ValueError, match="embedding"):
            Heads(last.context)
        with Embedding(open_layers(sllm.embedded.DRAFT)) as other, pytest.raises(ValueError, match="rows"):
            Heads(last.context, other)
        heads = Heads(last.context, embedding)
        text = prompts_of(20)[0]
        hidden = first.forward(embedding.rows(text[:-1]))
        last.context.decode(text[:-1], hidden=hidden)
        with copy.open("r+b") as file:
            file.truncate(64)  # of a file that changes, no row is made up
        with pytest.raises(sllm.InferenceError, match="embedding"):
            heads.draft([0], [text[-1]])
        assert last.memory.length() == len(text) - 1
        copy.write_bytes(glm.path.read_bytes())
        assert heads.draft([0], [text[-1]], n_max=3).lengths.tolist() == [3]
        embedding.close()
        with pytest.raises(sllm.ClosedError):
            Heads(last.context, embedding)


def test_heads_take_no_memory_for_the_embedding(tmp_path: Path) -> None:
    """Of one that is not the output as well, llama.cpp has zeros of its smallest type."""
    path = random_models.write(tmp_path / "model.gguf", HEADS["qwen35, head"])
    file = open_layers(path)
    n = file.n_layer
    sizes = {}
    for load_mtp in (False, True):
        with sllm.LayerRange(file, n - 2, n, output=True, n_ctx=64, load_mtp=load_mtp) as layers:
            sizes[load_mtp] = layers.size_bytes
    head = sum(tensor.size for name, (_, tensor) in file.tensors.items() if name.startswith(f"blk.{n}."))
    assert sizes[True] - sizes[False] == head

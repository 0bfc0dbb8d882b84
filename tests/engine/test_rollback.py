"""Taking tokens back where the memory is a recurrent state: by snapshots, by checkpoints, and never wrongly.

What a context says is compared with one that has never taken anything back, to the bit: q8_0 weights, flash
attention and a q8_0 KV cache on one thread do not depend on how tokens are grouped into batches.
"""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import EVERY, HYBRID, N_VOCAB, RECURRENT

import sllm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

EXACT: dict[str, Any] = {"n_threads": 1, "flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}
GREEDY = sllm.SamplingParams(temperature=0)
N_CTX = 256
STATEFUL = [*HYBRID, *RECURRENT]
ATTENTION = ["llama", "gemma3"]  # the second with a sliding window
WITH_SNAPSHOTS = {"qwen35", "qwen35moe", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe"}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], sllm.Model]]:
    folder = tmp_path_factory.mktemp("models")
    opened: dict[str, sllm.Model] = {}

    def load(name: str) -> sllm.Model:
        if name not in opened:
            # Routers are float32 in real files, whose products depend on the number of rows on some CPUs.
            shape = replace(EVERY[name], routers="q8_0")
            path = random_models.write(folder / f"{len(opened)}.gguf", shape)
            opened[name] = sllm.Model(path)
        return opened[name]

    yield load
    for model in opened.values():
        model.close()


class Truth:
    """What a model says after a text, by a context that only ever goes on."""

    def __init__(self, model: sllm.Model) -> None:
        self._context = model.context(n_ctx=N_CTX, n_rollback=0, **EXACT)
        self._rows: dict[tuple[int, ...], npt.NDArray[np.float32]] = {}

    def row(self, text: list[int]) -> npt.NDArray[np.float32]:
        key = tuple(text)
        if key not in self._rows:
            held = self._context.memory.tokens().tolist()
            n = len(held) if len(held) < len(text) and text[: len(held)] == held else 0
            if n == 0:
                self._context.memory.clear()
            row = self._context.decode(text[n:], logits="last")
            assert row is not None
            self._rows[key] = row.copy()
        return self._rows[key]

    def next(self, text: list[int]) -> int:
        return int(self.row(text).argmax())

    def says(self, row: npt.NDArray[np.float32] | None, text: list[int]) -> bool:
        """Whether ``row`` is what the model says after ``text``."""
        return row is not None and np.array_equal(row, self.row(text))

    def close(self) -> None:
        self._context.close()


class Player:
    """Does random things with the sequences of a context, and compares all that comes out with the truth."""

    def __init__(self, context: sllm.Context, truth: Truth, rng: random.Random) -> None:
        self.context, self.truth, self.rng = context, truth, rng
        self.texts: list[list[int]] = [[] for _ in range(context.n_seq_max)]

    def play(self, n_moves: int) -> None:
        moves = [self.decode, self.verify, self.verify, self.verify, self.draft, self.draft, self.truncate]
        moves += [self.copy, self.state, self.cancel]
        for _ in range(n_moves):
            seqs = self.rng.sample(range(len(self.texts)), self.rng.randint(1, len(self.texts)))
            self.rng.choice(moves)(seqs)
            for seq, text in enumerate(self.texts):
                assert self.context.memory.tokens(seq).tolist() == text
                if len(text) > N_CTX - 80:
                    self.context.memory.clear(seq)
                    text.clear()
        self.decode(list(range(len(self.texts))))

    def words(self, *lengths: int) -> list[int]:
        return [self.rng.randrange(10, N_VOCAB) for _ in range(self.rng.choice(lengths))]

    def decode(self, seqs: list[int]) -> None:
        new = [self.words(1, 2, 5, 30) for _ in seqs]
        rows = self.context.decode(new, seq_id=seqs, logits="last")
        assert rows is not None
        for seq, tokens, row in zip(seqs, new, rows, strict=True):
            self.texts[seq] += tokens
            assert self.truth.says(row, self.texts[seq])

    def verify(self, seqs: list[int]) -> None:
        new, chains = [], []
        for seq in seqs:
            new.append(self.words(1, 1, 1, 2, 25))
            text = self.texts[seq] + new[-1]
            chain: list[int] = []
            for _ in range(self.rng.choice([0, 1, 2, 3, 4, 6])):
                right = self.rng.random() < 0.6
                chain.append(self.truth.next(text + chain) if right else self.rng.randrange(10, N_VOCAB))
            chains.append(chain)
        verdict = self.context.verify(seqs, new, chains, sampling=GREEDY)
        for seq, tokens, chain, said, n in zip(
            seqs, new, chains, verdict.tokens.tolist(), verdict.n_accepted.tolist(), strict=True
        ):
            text = self.texts[seq] + tokens
            assert said[:n] == chain[:n]
            assert said[: n + 1] == [self.truth.next(text + chain[:i]) for i in range(n + 1)]
            shown = chain[: self.context.max_draft]
            ended = self.context.model.vocab.is_eog(said[n])
            assert ended or n == len(shown) or shown[n] != said[n]
            self.texts[seq] = text + chain[:n]

    def draft(self, seqs: list[int]) -> None:
        new = [self.words(1, 1, 3) for _ in seqs]
        draft = self.context.draft(seqs, new, n_max=self.rng.choice([1, 3, 6]), p_min=0, sampling=GREEDY)
        for i, seq in enumerate(seqs):
            self.texts[seq] += new[i]
            text = self.texts[seq]
            chain = draft.tokens[i, : draft.lengths[i]].tolist()
            assert chain == [self.truth.next(text + chain[:n]) for n in range(len(chain))]
            if self.rng.random() < 0.6:  # some of it held
                kept = [*chain[: self.rng.randint(0, len(chain))], 77]
                row = self.context.decode(kept, seq_id=seq, logits="last")
                self.texts[seq] += kept
                assert self.truth.says(row, self.texts[seq])

    def truncate(self, seqs: list[int]) -> None:
        text = self.texts[seqs[0]]
        length = max(0, len(text) - self.rng.choice([0, 1, 2, 3, 4, 5, 20, 100]))
        self.context.memory.truncate(seqs[0], length)
        del text[length:]

    def copy(self, seqs: list[int]) -> None:
        if len(seqs) > 1:
            source, target = self.rng.sample(seqs, 2)
            self.context.memory.copy(source, target)
            self.texts[target] = list(self.texts[source])

    def state(self, seqs: list[int]) -> None:
        source, target = self.rng.choice(seqs), self.rng.choice(seqs)
        if self.texts[source]:
            self.context.load(self.context.save(source), target)
            self.texts[target] = list(self.texts[source])

    def cancel(self, seqs: list[int]) -> None:
        """A call that ends somewhere inside, or did not hear of it."""
        new = [self.words(1, 5, 60) for _ in seqs]
        timer = threading.Timer(self.rng.random() * 0.01, self.context.cancel)
        timer.start()
        try:
            self.context.decode(new, seq_id=seqs)
        except sllm.CancelledError:
            pass
        else:
            for seq, tokens in zip(seqs, new, strict=True):
                self.texts[seq] += tokens
        timer.join()


@pytest.mark.parametrize("n_rollback", [0, 4])
@pytest.mark.parametrize("name", [*ATTENTION, *STATEFUL])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_is_taken_back_the_text_is_the_same(
    model_of: Callable[[str], sllm.Model], name: str, n_rollback: int, seed: int
) -> None:
    model = model_of(name)
    if n_rollback and model.can_rollback != "snapshots":
        pytest.skip("llama.cpp has no snapshots of this architecture")
    truth = Truth(model)
    with model.context(n_ctx=3 * N_CTX, n_seq_max=3, n_rollback=n_rollback, **EXACT) as context:
        Player(context, truth, random.Random(seed)).play(25)
    truth.close()


@pytest.mark.parametrize("name", STATEFUL)
def test_the_kind_of_a_model_is_that_of_its_contexts(
    model_of: Callable[[str], sllm.Model], name: str
) -> None:
    model = model_of(name)
    kind = "snapshots" if model.architecture in WITH_SNAPSHOTS else "recompute"
    assert model.can_rollback == kind
    for given_, wanted in ((3, 3), (None, 8), (0, 0)):
        with model.context(n_ctx=64, n_rollback=given_) as context:
            assert context.can_rollback == ("snapshots" if wanted and kind == "snapshots" else "recompute")
            assert context.n_rollback == (wanted if kind == "snapshots" else 0)
            assert context.max_draft == (wanted if context.n_rollback else context.n_outputs_max - 1)
            assert context.state_bytes == 0
            context.decode([11])
            headers = 12 * EVERY[name].n_layer + 200  # llama.cpp's saved state says what it is
            assert 0 <= context.state_bytes - model.state_bytes < headers
            assert model.state_bytes > 1000


@pytest.mark.parametrize("name", [n for n in STATEFUL if EVERY[n].architecture in WITH_SNAPSHOTS])
def test_every_length_of_a_rollback(model_of: Callable[[str], sllm.Model], name: str) -> None:
    """Facts of llama.cpp that corrupt silently where they are not respected: one rollback between two
    decodes, and only as far as the last decode's own rows."""
    model, k = model_of(name), 4
    truth = Truth(model)
    rng = random.Random(name)
    text = [rng.randrange(10, N_VOCAB) for _ in range(40)]
    with model.context(n_ctx=N_CTX, n_rollback=k, **EXACT) as context:
        for n_rows in range(1, k + 4):
            for back in range(n_rows + 3):
                context.memory.clear()
                context.decode(text)
                new = [rng.randrange(10, N_VOCAB) for _ in range(n_rows)]
                context.decode(new)
                left = len(text) + n_rows - back
                context.memory.truncate(0, left)
                once_more = rng.randint(0, 2)
                context.memory.truncate(0, left - once_more)
                now = (text + new)[: left - once_more]
                row = context.decode([99], logits="last")
                assert truth.says(row, [*now, 99]), (n_rows, back, once_more)
    truth.close()


@pytest.mark.parametrize("kv_unified", [False, True])
def test_snapshots_of_one_are_not_lost_to_others(tmp_path: Path, kv_unified: bool) -> None:
    """llama.cpp gathers the states of the sequences of a graph side by side, and moves what stood there; not
    the snapshots. Which are moved depends on who came first and on how many rows each has."""
    # With float32 all along, what others do changes hardly a bit where the cache is unified.
    path = random_models.write(tmp_path / "f32.gguf", replace(EVERY["lfm2"], weights="f32"))
    options: dict[str, Any] = {"n_threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn": False}
    rng = random.Random(3)

    def words(n: int) -> list[int]:
        return [rng.randrange(10, N_VOCAB) for _ in range(n)]

    with (
        sllm.Model(path) as model,
        model.context(n_ctx=256, n_rollback=0, **options) as other,
        model.context(n_ctx=768, n_seq_max=3, n_rollback=4, kv_unified=kv_unified, **options) as context,
    ):
        for order in itertools.permutations(range(3)):
            for rows in ((3, 5, 5), (5, 3, 5), (2, 3, 4), (1, 5, 5), (5, 5, 5), (7, 9, 7), (5, 5, 12)):
                context.memory.clear()
                texts = [words(9) for _ in range(3)]
                for seq in order:
                    context.decode(texts[seq], seq_id=seq)
                for _ in range(12):
                    together = rng.choice([[0, 1, 2], [2, 0], [1, 2], [0], [1], [2], list(order)])
                    new = [words(rows[seq]) for seq in together]
                    if rng.random() < 0.5:
                        heads = [tokens[: max(1, len(tokens) - 2)] for tokens in new]
                        chains = [tokens[max(1, len(tokens) - 2) :] for tokens in new]
                        context.verify(together, heads, chains, sampling=GREEDY)
                    else:
                        context.decode(new, seq_id=together)
                    for seq, tokens in zip(together, new, strict=True):
                        texts[seq] += tokens
                    if rng.random() < 0.5:
                        left = rng.randrange(3)
                        context.memory.truncate(left, max(context.memory.length(left) - rng.randint(1, 4), 0))
                    texts = [context.memory.tokens(seq).tolist() for seq in range(3)]
                for seq in range(3):
                    row = context.decode([99], seq_id=seq, logits="last")
                    other.memory.clear()
                    wanted = other.decode([*texts[seq], 99], logits="last")
                    assert row is not None and wanted is not None
                    assert np.allclose(row, wanted, atol=1e-3), (order, rows, seq)


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "mamba2"])
@pytest.mark.parametrize("kv_unified", [False, True])
def test_a_cancelled_decode_leaves_no_trace(
    model_of: Callable[[str], sllm.Model], name: str, kv_unified: bool
) -> None:
    """An aborted graph has overwritten states, those of sequences outside the batch among them where the
    cache is unified, and llama.cpp says that all is well."""
    model = model_of(name)
    rng = random.Random(1)
    texts = [[rng.randrange(10, N_VOCAB) for _ in range(40)] for _ in range(3)]
    long = [rng.randrange(10, N_VOCAB) for _ in range(120)]
    options = {**EXACT, "n_ctx": 3 * N_CTX, "n_seq_max": 3, "kv_unified": kv_unified, "n_ubatch": 16}
    with model.context(**options) as context, model.context(**{**options, "n_rollback": 0}) as other:
        for seq, text in enumerate(texts):
            context.decode(text, seq_id=seq)
            other.decode(text, seq_id=seq)
        n_cancelled = 0
        for attempt in range(200):
            timer = threading.Timer(rng.random() * 0.01, context.cancel)
            timer.start()
            try:
                context.decode([long, long], seq_id=[0, 2])
            except sllm.CancelledError:
                n_cancelled += 1
            timer.join()
            for seq, text in enumerate(texts):
                context.memory.truncate(seq, len(text))
            if n_cancelled == 5 or attempt > 100:
                break
        assert n_cancelled > 0
        for seq, text in enumerate(texts):
            rows = [c.decode([99], seq_id=seq, pos=len(text), logits="last") for c in (context, other)]
            assert rows[0] is not None and rows[1] is not None
            assert np.allclose(rows[0], rows[1], atol=0.3 if kv_unified else 0)


@pytest.mark.parametrize("name", STATEFUL)
def test_two_sequences_in_one_batch_are_two_texts(model_of: Callable[[str], sllm.Model], name: str) -> None:
    """On CPUs with AMX, kernels mixed the rows of sequences up where weights meet an input of three
    dimensions."""
    model = model_of(name)
    rng = random.Random(2)
    texts = [[rng.randrange(10, N_VOCAB) for _ in range(12)] for _ in range(3)]
    truth = Truth(model)
    with model.context(n_ctx=3 * N_CTX, n_seq_max=3, **EXACT) as context:
        rows = context.decode(texts, seq_id=[0, 1, 2], logits="last")
        assert rows is not None
        for text, row in zip(texts, rows, strict=True):
            assert truth.says(row, text)
        rows = context.decode([[11, 12]] * 3, seq_id=[0, 1, 2], logits="last")
        assert rows is not None
        for text, row in zip(texts, rows, strict=True):
            assert truth.says(row, [*text, 11, 12])
    truth.close()


@pytest.mark.parametrize("name", ["gemma3", "qwen35", "lfm2", "granitehybrid", "mamba2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_with_a_draft_is_the_text_without(
    model_of: Callable[[str], sllm.Model], tmp_path: Path, name: str, temperature: float
) -> None:
    model = model_of(name)
    ends = [(token, -np.inf) for token in range(N_VOCAB) if model.vocab.is_eog(token)]
    sampling = sllm.SamplingParams(temperature=temperature, seed=5, logit_bias=ends)
    prompt = [10 + i * 7 % 200 for i in range(30)]
    other = random_models.write(tmp_path / "other.gguf", EVERY[name], seed=1)
    with sllm.Model(other) as stranger, sllm.LocalTarget(model, n_ctx=N_CTX, **EXACT) as target:

        def text(draft: Any) -> list[int]:
            stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=60)
            return [token for run in stream for token in run.tokens]

        plain = text(None)
        assert len(plain) == 60
        for draft in (model, stranger, "ngram", lambda _text, _n: plain[: random.randint(0, 9)]):
            assert text(draft) == plain


def test_bad_values_are_refused(
    model_of: Callable[[str], sllm.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen35")
    for bad in (-1, 65, 1.5, "4"):
        with pytest.raises((TypeError, ValueError), match="n_rollback"):
            model.context(n_ctx=64, n_rollback=bad)  # type: ignore[arg-type]
    monkeypatch.setattr(sllm.Model, "state_bytes", 1 << 33)
    with pytest.raises(MemoryError, match=r"recurrent states.*lower n_rollback"):
        model.context(n_ctx=1024, n_seq_max=16, n_rollback=64)
    monkeypatch.undo()
    with model.context(n_ctx=64, n_batch=4, n_ubatch=2, n_rollback=16) as context:
        assert context.n_rollback == 16 and context.n_ubatch >= 18  # llama.cpp would assert
        context.decode([11] * 20)

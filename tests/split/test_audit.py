"""The attacks on hidden states: that they find what there is to find, and say what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sllm
from sllm import embedded
from sllm.cli.audit import SAMPLE
from sllm.engine.layers import Embedding, LayerRange, export_layers, open_layers
from sllm.split import attacks, audit
from sllm.split.ends import checked_head
from sllm.wire.codec import CODECS, across

if TYPE_CHECKING:
    import pathlib

    import numpy.typing as npt

TEXT = "Once upon a time a fox called Oscar lived in the forest. 从前有一只小狐狸，它很勇敢。"
ONE: dict[str, Any] = {"n_threads": 1}


@pytest.fixture(scope="module")
def tokens(target_model: sllm.Model) -> npt.NDArray[np.int32]:
    return target_model.vocab.encode(TEXT)[:16]


# ---- nearest embedding


def test_hidden_states_before_any_layer_are_read_off(tokens: npt.NDArray[np.int32]) -> None:
    with Embedding(open_layers(embedded.TARGET)) as embedding:
        for codec in CODECS:
            seen = across(embedding.rows(tokens), codec)
            found = attacks.nearest_embedding(embedding, seen)
            assert found.cosine.tolist() == tokens.tolist()
            assert found.l2.tolist() == tokens.tolist()


@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_the_nearest_are_those_of_the_whole_matrix(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_BLOCK_NUMBERS", block)
    with Embedding(open_layers(embedded.DRAFT)) as embedding:
        matrix = embedding.rows(np.arange(embedding.n_tokens, dtype=np.int32)).astype(np.float64)
        rows = np.random.default_rng(1).normal(size=(5, embedding.n_embd)).astype(np.float32)
        found = attacks.nearest_embedding(embedding, rows, 7)
    products = rows.astype(np.float64) @ matrix.T
    assert found.dot.tolist() == products.argmax(axis=1).tolist()
    cosines = products / np.linalg.norm(matrix, axis=1)
    assert found.order.tolist() == np.argsort(-cosines, axis=1)[:, :7].tolist()
    assert found.cosine.tolist() == found.order[:, 0].tolist()
    apart = np.linalg.norm(rows[:, None] - matrix[None], axis=2)
    assert found.l2.tolist() == apart.argmin(axis=1).tolist()


@pytest.mark.parametrize("n_best", [0, 2561])
def test_there_are_only_so_many_tokens(n_best: int) -> None:
    with Embedding(open_layers(embedded.DRAFT)) as embedding, pytest.raises(ValueError, match="n_best"):
        attacks.nearest_embedding(embedding, np.zeros((1, embedding.n_embd), np.float32), n_best)


# ---- vocabulary matching


@pytest.mark.parametrize(("n_layers", "codec"), [(1, "f32"), (2, "f32"), (2, "q8"), (2, "q4")])
def test_matching_finds_the_text(n_layers: int, codec: str, tokens: npt.NDArray[np.int32]) -> None:
    file = open_layers(embedded.TARGET)
    with (
        Embedding(file) as embedding,
        LayerRange(file, 0, n_layers, n_seq_max=32, n_ctx=32 * len(tokens), **ONE) as layers,
    ):
        seen = across(layers.forward(embedding.rows(tokens)), codec)
        near = attacks.nearest_embedding(embedding, seen, 2560)
        assert (near.cosine == tokens).mean() < 0.8  # which the simpler attack does not
        found = attacks.match_vocabulary(layers, embedding, seen, near.order, codec=codec)
        assert found.tokens.tolist() == tokens.tolist()
        assert 2560 < found.n_tried < 2560 * len(tokens) / 2


def test_tokens_that_are_nearly_alike_are_distinguished(target_model: sllm.Model) -> None:
    """Two that training hardly saw: either is far nearer to the other than the rest are."""
    tokens = target_model.vocab.encode(SAMPLE)[:40]
    file = open_layers(embedded.TARGET)
    with (
        Embedding(file) as embedding,
        LayerRange(file, 0, 1, n_seq_max=32, n_ctx=32 * len(tokens), **ONE) as layers,
    ):
        rare, twin = (target_model.vocab.encode(piece)[0] for piece in (" v", "urt"))
        matrix = embedding.rows(np.arange(embedding.n_tokens, dtype=np.int32))
        apart = np.linalg.norm(matrix - matrix[rare], axis=1)
        assert rare in tokens
        assert apart[twin] < np.median(apart) / 4
        seen = across(layers.forward(embedding.rows(tokens)), "q8")
        near = attacks.nearest_embedding(embedding, seen, embedding.n_tokens)
        found = attacks.match_vocabulary(layers, embedding, seen, near.order, codec="q8")
    assert found.tokens.tolist() == tokens.tolist()


def test_matching_continues_after_errors_or_after_the_truth(tokens: npt.NDArray[np.int32]) -> None:
    file = open_layers(embedded.TARGET)
    wrong = 4  # the position whose token is not among the candidates
    others = np.random.default_rng(0).integers(0, 2560, (len(tokens), 39))
    candidates = np.concatenate([others, tokens[:, None]], axis=1).astype(np.int32)
    candidates[wrong][candidates[wrong] == tokens[wrong]] = (tokens[wrong] + 1) % 2560
    with (
        Embedding(file) as embedding,
        LayerRange(file, 0, 2, n_seq_max=8, n_ctx=8 * len(tokens), **ONE) as layers,
    ):
        seen = layers.forward(embedding.rows(tokens))

        def match(**more: Any) -> npt.NDArray[np.int32]:
            layers.memory.clear()
            return attacks.match_vocabulary(layers, embedding, seen, candidates, codec="f32", **more).tokens

        helped = match(prefix=tokens)
        assert np.flatnonzero(helped != tokens).tolist() == [wrong]
        own = match()
        assert own[:wrong].tolist() == tokens[:wrong].tolist()
        assert own[wrong] in candidates[wrong]
        assert own[wrong] != tokens[wrong]
        known = match(known=tokens[: wrong + 1])
        assert known.tolist() == tokens.tolist()


def test_arrays_that_do_not_fit_together(tokens: npt.NDArray[np.int32]) -> None:
    with Embedding(open_layers(embedded.DRAFT)) as embedding:
        rows = embedding.rows(tokens)
        for candidates in (
            np.zeros(5, np.int32),
            np.zeros((3, 2), np.int32),
            np.zeros((len(rows), 0), np.int32),
        ):
            with pytest.raises(ValueError, match="candidates has shape"):
                attacks.match_vocabulary(None, embedding, rows, candidates, codec="f32")
        with pytest.raises(ValueError, match="prefix has 2 tokens"):
            some = np.zeros((len(rows), 1), np.int32)
            attacks.match_vocabulary(None, embedding, rows, some, codec="f32", prefix=[1, 2])


# ---- logit lens


def test_the_lens_after_the_last_layer_shows_the_models_choice(
    tokens: npt.NDArray[np.int32], target_model: sllm.Model
) -> None:
    file = open_layers(embedded.TARGET)
    with target_model.context(n_ctx=64, **ONE) as context:
        logits = context.decode(tokens, logits="all")
        assert logits is not None
        choice = logits.argmax(axis=1)
    with Embedding(file) as embedding, LayerRange(file, 0, 7, n_ctx=64, **ONE) as layers:
        before = layers.forward(embedding.rows(tokens))
    with LayerRange(file, 7, 8, n_ctx=64, **ONE) as layers:
        behind = layers.forward(before)
    assert attacks.logit_lens(file, behind, **ONE).tolist() == choice.tolist()
    assert attacks.logit_lens(file, before, 7, **ONE).tolist() == choice.tolist()


# ---- all of them


def test_the_report(target_model: sllm.Model) -> None:
    told: list[float] = []
    options: dict[str, Any] = {"head": 1, "tail": 2, "codec": "f32", "max_tokens": 10, "n_threads": 1}
    report = audit.audit(embedded.TARGET, TEXT, progress=told.append, **options)
    tokens = target_model.vocab.encode(TEXT)[:10]
    assert (report.n_layer, report.n_vocab, report.n_tokens, report.n_candidates) == (8, 2560, 10, 2560)
    assert [one.layers for one in report.heads] == [0, 1, 2, 4]
    assert [one.layers for one in report.tails] == [0, 1, 2, 4]
    assert told == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert report.text == report.recovered == target_model.vocab.decode(tokens)
    for head in report.heads:
        shares = (head.cosine, head.dot, head.l2, head.matched_true_prefix, head.among_candidates)
        assert all(0 <= share <= 1 for share in shares)
        assert head.matched == 1
    assert report.heads[0].cosine == 1
    assert report.heads[-1].cosine < 0.5
    assert report.tails[0].lens == 1
    assert all(tail.run == 1 for tail in report.tails)  # nothing is lost on the way
    assert 0 <= report.tails[-1].lens < 1
    assert report.tails[0].lens_text == report.choice_text


def test_candidates_limit_what_matching_finds_and_the_report_repeats() -> None:
    options: dict[str, Any] = {"head": 1, "tail": 0, "codec": "q8", "max_tokens": 12, "n_threads": 1}
    report = audit.audit(embedded.DRAFT, TEXT, candidates=3, **options)
    assert report.n_candidates == 3
    assert any(one.among_candidates < 1 for one in report.heads)
    for one in report.heads:
        assert one.matched <= one.among_candidates
        assert one.matched_true_prefix <= one.among_candidates
        assert one.tried_per_token <= 3
    assert audit.audit(embedded.DRAFT, TEXT, candidates=3, **options) == report


@pytest.mark.parametrize(
    ("value", "limit", "numbers"),
    [
        (6, 25, [0, 1, 2, 4, 6, 8, 12]),
        (6, 7, [0, 1, 2, 4, 6, 7]),
        (1, 7, [0, 1, 2, 4]),
        (0, 1, [0, 1]),
        (3, 9, [0, 1, 2, 3, 4, 6]),
    ],
)
def test_numbers_of_layers(value: int, limit: int, numbers: list[int]) -> None:
    assert audit._sweep(value, limit) == numbers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": 7, "tail": 1}, "head 7 and tail 1 leave none of the 8 layers of target.gguf"),
        ({"head": 9}, "head 9 and tail 1"),
        ({"head": -1}, "expected 0 or more"),
        ({"tail": -1, "head": 2}, "expected 0 or more"),
        ({"codec": "q2"}, "codec is 'q2'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"text": ""}, "the text has no tokens"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        audit.audit(embedded.TARGET, **{"text": TEXT, **options})


def test_a_part_of_a_model_is_not_enough(tmp_path: pathlib.Path) -> None:
    for start, stop in ((0, 1), (1, 2), (0, 2)):
        part = tmp_path / f"part{start}{stop}.gguf"
        export_layers(embedded.DRAFT, part, start, stop)
        if (start, stop) == (0, 2):
            assert checked_head(open_layers(part), 0, 1) == 0
        else:
            with pytest.raises(ValueError, match="expected a whole model"):
                audit.audit(part, TEXT)

"""What the codecs do to the text: the figures against a plain computation of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import sllm
from sllm import embedded
from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.split import codec_report as module
from sllm.split.codec_report import CodecFigures, codec_report
from sllm.wire.codec import CODECS, decode, encode, row_bytes

TEXT = "Once upon a time a fox called Oscar lived in the forest. One day he found a red kite. " * 2
ONE: dict[str, Any] = {"n_threads": 1}


def by_name(report: module.CodecReport) -> dict[str, CodecFigures]:
    return {one.codec: one for one in report.codecs}


def test_nothing_is_lost_with_f32_and_more_with_fewer_bits() -> None:
    report = codec_report(embedded.TARGET, TEXT, head=3, tail=2, **ONE)
    assert (report.head, report.tail, report.n_layer, report.n_embd) == (3, 2, 8, 256)
    assert [one.codec for one in report.codecs] == list(CODECS)
    found = by_name(report)
    assert (found["f32"].kl, found["f32"].kl_max, found["f32"].same_choice) == (0, 0, 1)
    assert found["f32"].perplexity == report.perplexity > 1
    assert 0 < found["f16"].kl < found["q8"].kl < found["q4"].kl < 0.1
    for one in report.codecs:
        assert one.refused is None
        assert one.kl <= one.kl_max
        assert 0.5 < one.same_choice <= 1
        assert one.row_bytes == row_bytes(one.codec, 256)
    assert codec_report(embedded.TARGET, TEXT, head=3, tail=2, **ONE) == report


def log_probabilities(logits: Any) -> Any:
    wide = np.asarray(logits, dtype=np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


def test_the_figures_are_those_of_their_definitions(
    draft_model: sllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_NUMBERS", 7 * 2560)  # rows that do not divide the batch
    report = codec_report(embedded.DRAFT, TEXT, head=0, tail=1, codecs=["q4"], **ONE)
    tokens = draft_model.vocab.encode(TEXT)
    assert report.n_positions == report.n_tokens == len(tokens) < 64
    with draft_model.context(n_ctx=64, **ONE) as context:
        p = log_probabilities(context.decode(tokens, logits="all"))
    file = open_layers(embedded.DRAFT)
    with (
        Embedding(file) as embedding,
        LayerRange(file, 0, 1, n_ctx=64, **ONE) as middle,
        LayerRange(file, 1, 2, output=True, n_ctx=64, **ONE) as tail,
    ):
        up = decode(encode(embedding.rows(tokens), "q4"), len(tokens), file.n_embd, "q4")
        down = decode(encode(middle.forward(up), "q4"), len(tokens), file.n_embd, "q4")
        q = log_probabilities(tail.forward(down))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    found = report.codecs[0]
    assert found.kl == pytest.approx(kl.mean())
    assert found.kl_max == pytest.approx(kl.max())
    assert found.same_choice == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    at = np.arange(len(tokens) - 1)
    assert found.perplexity == pytest.approx(math.exp(-q[at, tokens[1:]].mean()))
    assert report.perplexity == pytest.approx(math.exp(-p[at, tokens[1:]].mean()))


def test_long_texts_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 100)
    shares: list[float] = []
    text = TEXT * 6
    report = codec_report(embedded.DRAFT, text, codecs=["f32", "q8"], progress=shares.append, **ONE)
    assert (report.head, report.tail) == (0, 1)
    assert report.n_tokens > 200
    assert report.n_positions == report.n_tokens
    assert len(shares) == math.ceil(report.n_tokens / 100)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    found = by_name(report)
    assert found["f32"].kl == 0
    assert found["f32"].perplexity == report.perplexity
    assert 0 < found["q8"].kl < 0.01


def test_a_codec_that_does_not_take_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    def across(rows: Any, codec: str) -> Any:
        if codec == "f16":
            raise ValueError("a hidden state of 1e+06 is too large for float16")
        return rows

    monkeypatch.setattr(module, "across", across)
    found = by_name(codec_report(embedded.DRAFT, TEXT, codecs=["f16", "q8"], **ONE))
    assert found["f16"].refused == "a hidden state of 1e+06 is too large for float16"
    assert math.isnan(found["f16"].kl)
    assert found["q8"].kl == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": 1, "tail": 1}, "leave none of the 2 layers"),
        ({"tail": 5}, "leave none of the 2 layers"),
        ({"head": -1}, "expected 0 or more"),
        ({"codecs": ["q8", "q3"]}, "codec is 'q3'"),
        ({"codecs": []}, "codecs is empty"),
        ({"text": ""}, "the text has no tokens, expected at least 2"),
        ({"text": "a"}, "the text has 1 token, expected at least 2"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codec_report(embedded.DRAFT, **{"text": TEXT, **options})

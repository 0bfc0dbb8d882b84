"""Vocabularies: texts to tokens and back, special tokens, and whether two are the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import vocabularies
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import GGUF, examples

import sllm
from sllm import embedded
from sllm.engine import vocab as vocab_module

if TYPE_CHECKING:
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.engine.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(draft_model: Model) -> Vocab:
    return draft_model.vocab


texts = st.text() | st.text(
    alphabet=st.sampled_from([*list("ab Z\n\t09.,'!-_<|>/"), "你", "好", "。", "é", "😀", "\u200d", "\x00"]),
    max_size=60,
)


@examples(200)
@given(texts)
@example("")
@example("\x00")
@example("a\x00b")
@example(" . , ! ? 'm 's don 't  ")  # what clean-up of spaces would change
@example("<|im_start|>user<|im_end|>")
@example("\r\n\r\n  \t")
@example("👩‍👩‍👧‍👦 Ünïcödé 你好 ﷽ \u202e")
@example("a" * 3000)
def test_text_comes_back_from_its_tokens(vocab: Vocab, text: str) -> None:
    tokens = vocab.encode(text)

    assert tokens.dtype == np.int32
    assert vocab.decode(tokens) == text
    assert b"".join(vocab.piece(int(t)) for t in tokens) == text.encode()
    assert vocab.decode(tokens, special=True) == text  # no control token among them
    assert not any(vocab.is_control(int(t)) for t in tokens)


@examples(50)
@given(st.lists(st.integers(0, 2559), max_size=40))
def test_any_tokens_decode_to_their_pieces(vocab: Vocab, tokens: list[int]) -> None:
    pieces = b"".join(vocab.piece(t) for t in tokens)

    assert vocab.decode(tokens) == pieces.decode("utf-8", "replace")
    assert vocab.decode(np.array(tokens, dtype=np.int32)) == vocab.decode(tokens)


def test_every_byte_has_a_token(vocab: Vocab) -> None:
    pieces = {vocab.piece(t) for t in range(vocab.n_tokens)}

    assert {bytes([b]) for b in range(256)} <= pieces


def test_control_tokens_are_parsed_only_when_asked_for(vocab: Vocab) -> None:
    assert vocab.eot is not None
    text = vocab.decode([vocab.eot], special=True)

    assert text
    assert vocab.encode(f"a{text}b", parse_special=True).tolist().count(vocab.eot) == 1
    assert vocab.eot not in vocab.encode(f"a{text}b").tolist()
    assert vocab.decode([vocab.eot]) == ""
    assert vocab.piece(vocab.eot) == b""
    assert vocab.is_control(vocab.eot)
    assert vocab.is_eog(vocab.eot)
    assert text in vocab.special_pieces


def test_add_special_is_what_the_file_asks_for(vocab: Vocab) -> None:
    assert not vocab.add_bos
    assert not vocab.add_eos
    assert vocab.encode("abc", add_special=True).tolist() == vocab.encode("abc", add_special=False).tolist()


def test_bos_is_added_where_the_file_asks_for_it(tmp_path: Path, vocab: Vocab) -> None:
    file = GGUF(embedded.DRAFT)
    file.metadata[b"tokenizer.ggml.add_bos_token"] = (7, True)
    with sllm.Model(file.write(tmp_path / "bos.gguf")) as model:
        assert model.vocab.add_bos
        assert model.vocab.encode("abc").tolist() == [model.vocab.bos, *vocab.encode("abc").tolist()]
        assert model.vocab.encode("abc", add_special=False).tolist() == vocab.encode("abc").tolist()
        assert model.vocab.decode(model.vocab.encode("abc")) == "abc"


@pytest.fixture
def not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has been warned about."""
    monkeypatch.setattr(vocab_module, "_warned_missing", set())


@pytest.mark.usefixtures("not_warned")
def test_ids_that_the_file_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp takes token 11 of a BPE vocabulary, here a comma, for BOS and EOS; nothing stops there."""
    values = {"add_bos_token": True, "add_eos_token": True}
    for _ in range(2):
        with sllm.Model(
            vocabularies.write(tmp_path / "lacks.gguf", "bpe", values=values), vocab_only=True
        ) as m:
            vocab = m.vocab
            assert (vocab.bos, vocab.eos, vocab.eot, vocab.pad) == (None, None, None, None)
            assert not vocab.add_bos
            assert not vocab.add_eos
            assert vocab.encode("a,+b").tolist() == [ord(char) for char in "a,+b"]
            assert not any(vocab.is_eog(token) for token in range(vocab.n_tokens))
            with pytest.raises(sllm.UnsupportedModelError, match="token that ends the text"):
                m.compiled(sllm.SamplingParams(grammar='root ::= "a"'))
    said = [record.getMessage() for record in caplog.records if record.name == "sllm"]
    assert len(said) == 1
    assert said[0].startswith(
        "lacks.gguf names no token that ends a text (tokenizer.ggml.eos_token_id), and no"
    )


@pytest.mark.usefixtures("not_warned")
def test_ids_that_the_file_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = [
        ("<|b|>", vocabularies.CONTROL),
        ("<|e|>", vocabularies.CONTROL),
        ("<|im_end|>", vocabularies.CONTROL),
    ]
    values = {"add_bos_token": True, "add_eos_token": True}
    cases: list[dict[str, str | int]] = [
        {"bos": "<|b|>", "eos": "<|e|>"},
        {"bos": 11, "eos": 11},
        {"bos": 11, "eos": "<|e|>"},
    ]
    for ids in cases:
        path = vocabularies.write(tmp_path / "names.gguf", "bpe", extra=extra, ids=ids, values=values)
        with sllm.Model(path, vocab_only=True) as m:
            bos, eos = m.vocab.bos, m.vocab.eos
            assert bos is not None
            assert eos is not None
            assert bos == (ids["bos"] if ids["bos"] == 11 else bos)
            assert m.vocab.encode("a").tolist() == [bos, ord("a"), eos]
            assert m.vocab.is_eog(eos)
            assert m.vocab.is_eog(11) == (ids["eos"] == 11)
    # An EOS that is missing beside ends that are found by their texts.
    path = vocabularies.write(tmp_path / "turns.gguf", "bpe", extra=extra, ids={"bos": "<|b|>"})
    with sllm.Model(path, vocab_only=True) as m:
        assert m.vocab.eos is None
        assert m.vocab.eot == next(t for t in range(m.vocab.n_tokens) if m.vocab.is_eog(t))
        assert not m.vocab.is_eog(11)
    assert [record.getMessage()[:34] for record in caplog.records if record.name == "sllm"] == [
        "turns.gguf names no token that end"
    ]


@pytest.mark.parametrize("kind", ["spm", "ugm", "wpm", "plamo2", "rwkv"])
def test_ids_of_the_kinds_that_have_had_them_for_ever(tmp_path: Path, kind: str) -> None:
    """Where llama.cpp expects one and a control token stands there, it is that one; encoding never aborts."""
    values = {"add_bos_token": True, "add_eos_token": True}
    with sllm.Model(vocabularies.write(tmp_path / "x.gguf", kind, values=values), vocab_only=True) as model:
        ids = {"spm": (1, 2), "plamo2": (1, 2), "ugm": (None, 1)}.get(kind, (None, None))
        assert (model.vocab.bos, model.vocab.eos) == ids
        assert model.vocab.decode(model.vocab.encode("the")) == "the"


@pytest.mark.parametrize("token", [-1, 2560, 2**31 - 1])
def test_ids_that_are_no_tokens_are_refused(vocab: Vocab, token: int) -> None:
    assert vocab.n_tokens == 2560
    for ask in (vocab.piece, vocab.is_eog, vocab.is_control, lambda t: vocab.decode([t])):
        with pytest.raises(ValueError, match="not in the vocabulary of 2560 tokens"):
            ask(token)


def test_only_text_is_encoded(vocab: Vocab) -> None:
    for value in (b"abc", None, 5, ["a"]):
        with pytest.raises(TypeError, match="expected str"):
            vocab.encode(value)  # type: ignore[arg-type]


def test_lone_surrogates_do_not_stop_encoding(vocab: Vocab) -> None:
    assert vocab.decode(vocab.encode("a\ud800b")) in ("a?b", "a\ufffdb")


def test_many_threads_may_encode_at_once(vocab: Vocab) -> None:
    lines = [f"line {i}: 你好 {'x' * i}" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for line, tokens in zip(lines, pool.map(vocab.encode, lines), strict=True):
            assert vocab.decode(tokens) == line


# ---- the same vocabulary? ----------------------------------------------------------------------------------


def test_the_embedded_pair_shares_a_vocabulary(target_model: Model, draft_model: Model) -> None:
    assert target_model.vocab.fingerprint == draft_model.vocab.fingerprint
    assert len(draft_model.vocab.fingerprint) == 64
    target_model.vocab.check_same(draft_model.vocab)
    draft_model.vocab.check_same(target_model.vocab)


@pytest.mark.parametrize("token", [300, 2559])
def test_the_first_token_that_differs_is_named(tmp_path: Path, target_model: Model, token: int) -> None:
    file = GGUF(embedded.DRAFT)
    tokens = file.array("tokenizer.ggml.tokens")
    for changed in {token, 2559}:
        tokens[changed] = b"@@" + str(changed).encode()
    with sllm.Model(file.write(tmp_path / "other.gguf")) as other:
        assert other.vocab.fingerprint != target_model.vocab.fingerprint
        mine, theirs = target_model.vocab.piece(token), f"@@{token}".encode()
        with pytest.raises(sllm.VocabMismatchError) as error:
            target_model.vocab.check_same(other.vocab)
        for part in (f"token {token} is", repr(mine), repr(theirs), "target.gguf", "other.gguf"):
            assert part in str(error.value)
        with pytest.raises(sllm.VocabMismatchError, match=f"token {token} "):
            other.vocab.check_same(target_model.vocab)
        with pytest.raises(sllm.VocabMismatchError), sllm.LocalTarget(target_model, n_ctx=64) as target:
            sllm.generate(target, "a", draft=other)
        with pytest.raises(ValueError, match=f"token {token} "):  # as the builtin that it also is
            sllm.generate(target_model, "a", draft=other, max_tokens=1)


def test_one_byte_of_one_token_is_a_difference(tmp_path: Path, draft_model: Model) -> None:
    """Edited in place, so that nothing but that byte of the file differs."""
    data = bytearray(embedded.DRAFT.read_bytes())
    texts = GGUF(embedded.DRAFT).array("tokenizer.ggml.tokens")
    token = next(i for i in range(600, 2560) if texts[i].isalpha() and len(texts[i]) >= 4)
    entry = len(texts[token]).to_bytes(8, "little") + texts[token]
    at = data.index(entry)
    assert data.count(entry) == 1
    data[at + len(entry) - 1] = ord("~")
    path = tmp_path / "edited.gguf"
    path.write_bytes(data)
    with (
        sllm.Model(path) as edited,
        pytest.raises(sllm.VocabMismatchError, match=f"token {token} is"),
    ):
        draft_model.vocab.check_same(edited.vocab)


def test_a_token_of_another_kind_is_a_difference(tmp_path: Path, draft_model: Model) -> None:
    file = GGUF(embedded.DRAFT)
    texts = file.array("tokenizer.ggml.tokens")
    token = next(i for i in range(300, 2560) if texts[i].isalpha())
    file.array("tokenizer.ggml.token_type")[token] = 3  # control
    with (
        sllm.Model(file.write(tmp_path / "kind.gguf")) as other,
        pytest.raises(sllm.VocabMismatchError, match=f"token {token} .*of different kinds"),
    ):
        draft_model.vocab.check_same(other.vocab)


@pytest.mark.parametrize("n_tokens", [2500, 2592])
def test_a_shared_prefix_of_a_padded_vocabulary_is_enough(
    tmp_path: Path, target_model: Model, n_tokens: int
) -> None:
    file = GGUF(embedded.DRAFT)
    file.resize_vocab(n_tokens)
    with sllm.Model(file.write(tmp_path / "padded.gguf")) as padded:
        assert padded.vocab.n_tokens == n_tokens
        assert padded.vocab.fingerprint != target_model.vocab.fingerprint
        target_model.vocab.check_same(padded.vocab)
        padded.vocab.check_same(target_model.vocab)

"""A text is its tokens: for every tokenizer and pre-tokenizer of llama.cpp, decode() undoes encode() and is
what a stream of the same tokens shows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import vocabularies
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import GGUF, examples
from pinned_source import VENDOR

import sllm
from sllm.generation.text_stream import TextBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.vocab import Vocab

LOST = {
    "spm": "▁ is how it writes a space",
    "raw-bpe": "▁ is how it writes a space",
    "ugm": "no bytes: a character that it does not know is <unk>; its normalisation drops more in real files",
    "wpm": "lower case, no accents, words apart by one space: BERT's normalisation",
    "whitespace": "words alone, without what is between them",
}
"""What tokenizers themselves lose; the others lose nothing."""


@pytest.fixture(scope="module")
def open_vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Vocab]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    models: dict[tuple[str, str], sllm.Model] = {}

    def make(kind: str, pre: str) -> Vocab:
        if (kind, pre) not in models:
            path = vocabularies.write(folder / f"{kind}-{pre}.gguf", kind, pre=pre)
            models[kind, pre] = sllm.Model(path, vocab_only=True)
        return models[kind, pre].vocab

    yield make
    for model in models.values():
        model.close()


CODE = [
    *"ab Z\n\t09.,'!?-_<|>/()",
    "the",
    " the",
    "'s",
    " 'm ",
    "n't",
    " ' ",
    "好",
    "é",
    "😀",
    "\u200d",
    "\0",
]
TEXTS = st.lists(st.sampled_from(CODE), max_size=30).map("".join) | st.text(max_size=20)


@pytest.mark.parametrize(("kind", "pre"), vocabularies.KINDS, ids=lambda value: value or "-")
@examples(12)
@given(text=TEXTS)
@example("if x != y : 'social' is 's .")  # llama_detokenize: `if x!= y : 'social' is's.`
@example("we 'll , they 've ! ' quoted ' ? I 'm")
@example("  two\n\n three   ")
@example("")
def test_a_text_comes_back(open_vocab: Callable[[str, str], Vocab], kind: str, pre: str, text: str) -> None:
    vocab = open_vocab(kind, pre)
    tokens = vocab.encode(text)
    decoded = vocab.decode(tokens)
    joined = b"".join(vocab.piece(int(token)) for token in tokens).decode("utf-8", "replace")

    if kind in ("spm", "wpm"):
        joined = joined.removeprefix(" ")
    assert decoded == joined
    if kind not in LOST:
        assert decoded == text
    elif kind in ("spm", "raw-bpe"):
        assert decoded == text.replace("▁", " ")


@pytest.mark.parametrize("kind", ["ugm", "wpm"])
def test_plain_words_come_back_from_those_that_lose_something(
    open_vocab: Callable[[str, str], Vocab], kind: str
) -> None:
    vocab = open_vocab(kind, "")
    for text in ("the theater", "and then there is an ounce of it", "x"):
        assert vocab.decode(vocab.encode(text)) == text


@pytest.mark.parametrize(("kind", "pre"), vocabularies.KINDS, ids=lambda value: value or "-")
@examples(8)
@given(data=st.data())
def test_a_stream_shows_what_its_tokens_are(
    open_vocab: Callable[[str, str], Vocab], kind: str, pre: str, data: st.DataObject
) -> None:
    vocab = open_vocab(kind, pre)
    tokens = data.draw(st.lists(st.integers(0, vocab.n_tokens - 1), max_size=40))
    shown = TextBuilder.after([], vocab, (), None, special=False)

    parts = [part for token in tokens for part in shown.feed(token)[1]] + shown.finish()
    text = "".join(said for _, said in parts)
    assert text == vocab.decode(tokens, goes_on=True)
    assert vocab.decode(tokens) in (text, text.removeprefix(" "))
    for cut in range(1, len(tokens)):
        halves = [
            vocab.decode(tokens[:cut], special=True),
            vocab.decode(tokens[cut:], special=True, goes_on=True),
        ]
        if "\ufffd" not in "".join(halves):  # within a character
            assert "".join(halves) == vocab.decode(tokens, special=True)


def test_no_pre_tokenizer_is_left_out() -> None:
    source = VENDOR / "source/src/llama-vocab.cpp"
    if not source.exists():
        pytest.skip("llama.cpp's source is not here")
    found = re.findall(r'tokenizer_pre == "([^"]+)"', source.read_text(encoding="utf-8"))
    assert set(found) == set(vocabularies.PRE_TOKENIZERS)


def test_the_space_before_a_text(open_vocab: Callable[[str, str], Vocab]) -> None:
    vocab = open_vocab("spm", "")
    assert vocab.bos is not None
    tokens = vocab.encode("the")
    assert tokens[0] == vocab.bos
    assert vocab.decode(tokens) == vocab.decode(tokens[1:]) == "the"
    assert vocab.decode(tokens, goes_on=True) == " the"
    assert vocab.decode(tokens, special=True) == "<s> the"
    assert vocab.decode(vocab.encode("  the")) == "  the"
    assert vocab.decode(vocab.encode(" ")) == " "
    assert vocab.decode([]) == vocab.decode(vocab.encode("")) == ""


def test_an_rwkv_vocabulary_without_every_byte_is_refused(tmp_path: Path) -> None:
    """llama.cpp would look for "t" in it for ever, since "the" begins with it, and add a token each time."""
    file = GGUF(vocabularies.write(tmp_path / "whole.gguf", "rwkv"))
    tokens = file.array("tokenizer.ggml.tokens")
    assert tokens[1 + ord("t")] == b"\\x74"
    tokens[1 + ord("t")] = b"tt"
    with sllm.Model(file.write(tmp_path / "holes.gguf"), vocab_only=True) as model:
        with pytest.raises(sllm.UnsupportedModelError, match="every byte"):
            model.vocab.encode("tea")
        assert model.vocab.decode([1 + ord("a"), 1 + ord("b")]) == "ab"

"""Reading GGUF headers: damage of every kind, the vocabulary alone, and what makes two models the same."""

from __future__ import annotations

import random
import shutil
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import GGUF, PLAIN, examples

import sllm
from sllm import embedded
from sllm.engine import gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = [Path(embedded.TARGET), Path(embedded.DRAFT)]
MESSAGES = [
    {"role": "user", "content": "Tell me a story."},
    {"role": "assistant", "content": "Once upon a time"},
]


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(pairs: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(pairs))
    return b"GGUF" + counts + b"".join(pairs) + b"".join(tensors)


SMALL = header(
    [
        pair(b"a.byte", 0, b"\x01"),
        pair(b"a.double", 12, struct.pack("<d", 0.5)),
        pair(b"a.text", 8, text(b"hello")),
        pair(b"a.numbers", 9, struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, 2, 3)),
        pair(b"a.texts", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"")),
        pair("schlüssel".encode(), 7, b"\x00"),
    ],
    [text(b"weight") + struct.pack("<I2QIQ", 2, 32, 4, 0, 0)],
)


# ---- headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=["target", "draft"])
def test_the_header_of_a_model(path: Path) -> None:
    found, known = gguf.read_header(path), GGUF(path)
    assert list(found.pairs) == [key.decode() for key in known.metadata]
    assert list(found.tensors) == [key.decode() for key in known.tensors]
    assert found.version == 3
    data = path.read_bytes()
    body = data[24 : found.size]
    assert body.startswith(b"".join(found.pairs.values()))
    assert found.size < len(data)


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL + b"data")
    found = gguf.read_header(path)
    assert found.size == len(SMALL)
    assert list(found.pairs) == ["a.byte", "a.double", "a.text", "a.numbers", "a.texts", "schlüssel"]
    assert found.pairs["a.text"] == pair(b"a.text", 8, text(b"hello"))
    for kind, size in gguf._SCALAR_SIZES.items():
        for value in (bytes(size), struct.pack("<IQ", kind, 3) + bytes(3 * size)):
            which = kind if len(value) == size else 9
            path.write_bytes(header([pair(b"k", which, value)], []))
            assert gguf.read_header(path).pairs == {"k": pair(b"k", which, value)}


def test_long_arrays_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    numbers = struct.pack("<IQ", 4, 20_000) + struct.pack("<20000I", *range(20_000))
    texts = struct.pack("<IQ", 8, 9_000) + b"".join(text(b"token %d" % i) for i in range(9_000))
    pairs = [
        pair(b"a", 4, bytes(4)),
        pair(b"texts", 9, texts),
        pair(b"\xff numbers", 9, numbers),  # no UTF-8
        pair(b"z", 7, b"\x01"),
    ]
    path.write_bytes(header(pairs, []))
    tracemalloc.start()
    found = gguf.read_header(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 30_000
    assert list(found.pairs) == ["a", "texts", "\ufffd numbers", "z"]
    assert list(found.pairs.values()) == pairs
    assert found.value("\ufffd numbers") == list(range(20_000))
    assert found.value("texts") is None
    assert (found.value("a"), found.value("z")) == (0, True)
    assert gguf.vocabulary_only(path) == path.read_bytes()[:24] + b"".join(pairs)

    path.write_bytes(header(pairs[::-1], []))
    with pytest.raises(sllm.ModelLoadError, match=r"long\.gguf has been changed"):
        found.value("texts")
    path.write_bytes(header(pairs[:1], []))
    with pytest.raises(sllm.ModelLoadError, match=r"long\.gguf has been changed"):
        found.pairs["texts"]


def test_a_header_cut_anywhere_is_a_load_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for n in range(len(SMALL)):
        path.write_bytes(SMALL[:n])
        with pytest.raises(sllm.ModelLoadError, match=r"cut\.gguf"):
            gguf.read_header(path)
    for whole in (path.read_bytes() for path in FILES):
        size = gguf.read_header(FILES[0]).size
        for n in random.Random(0).sample(range(min(size, len(whole))), 15):
            path.write_bytes(whole[:n])
            with suppress(sllm.ModelLoadError):  # the draft's header is shorter than the target's
                assert gguf.read_header(path).size <= n
            with suppress(sllm.ModelLoadError):
                gguf.vocabulary_only(path)
            with suppress(sllm.ModelLoadError):
                gguf.model_id(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + SMALL[4:], "not a GGUF file"),
        (b"FUGG" + SMALL[4:], "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + SMALL[8:], "version"),
        (header([], [], version=1), "version 1"),
        (header([], [], version=4), "version 4"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "pairs"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**64 - 1), "a text of"),
        (header([pair(b"k", 8, struct.pack("<Q", 2**62))], []), "a text of"),
        (header([pair(b"k", 9, struct.pack("<IQ", 0, 2**62))], []), "an array of"),
        (header([pair(b"k", 9, struct.pack("<IQ", 8, 2**62))], []), "an array of"),
        (header([pair(b"k", 9, struct.pack("<IQ", 8, 2**24) + bytes(100))], []), "ends in its header"),
        (header([pair(b"k", 9, struct.pack("<IQ", 9, 1))], []), "an array of the unknown type"),
        (header([pair(b"k", 13, b"")], []), "a value of the unknown type 13"),
        (header([pair(b"k", 2**32 - 1, b"")], []), "unknown type"),
        (header([], [text(b"w") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    ],
)
def test_what_a_damaged_header_says(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    for read in (gguf.read_header, gguf.vocabulary_only, gguf.model_id):
        with pytest.raises(sllm.ModelLoadError, match=said) as caught:
            read(path)
        assert "bad.gguf" in str(caught.value)


@examples(300)
@given(data=st.data())
def test_flipped_bytes_are_a_header_or_a_load_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never an error of another kind, and never an answer that takes more than the file."""
    content = bytearray(SMALL)
    for at in data.draw(st.lists(st.integers(0, len(SMALL) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    with suppress(sllm.ModelLoadError):
        assert gguf.read_header(path).size <= len(content)
        assert len(gguf.vocabulary_only(path)) <= len(content)
        assert len(gguf.model_id(path)) == 64


def test_flipped_bytes_in_a_real_header(tmp_path: Path) -> None:
    whole = FILES[1].read_bytes()
    size = gguf.read_header(FILES[1]).size
    rng = random.Random(1)
    path = tmp_path / "flipped.gguf"
    for _ in range(40):
        content = bytearray(whole[: size + 100])
        content[rng.choice([rng.randrange(24, 400), rng.randrange(size)])] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with suppress(sllm.ModelLoadError):
            gguf.vocabulary_only(path)


def test_no_file_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        for read in (gguf.read_header, gguf.vocabulary_only, gguf.model_id):
            with pytest.raises(OSError, match=path.name):
                read(path)


# ---- the vocabulary alone ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sllm.Model]:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    path.write_bytes(gguf.vocabulary_only(FILES[0]))
    with sllm.Model(path, vocab_only=True) as model:
        yield model


def test_the_vocabulary_alone_is_the_whole_vocabulary(
    vocabulary: sllm.Model, target_model: sllm.Model
) -> None:
    ours, whole = vocabulary.vocab, target_model.vocab
    assert ours.fingerprint == whole.fingerprint
    ours.check_same(whole)
    for name in ("n_tokens", "bos", "eos", "eot", "pad", "add_bos", "add_eos", "special_pieces"):
        assert getattr(ours, name) == getattr(whole, name)
    for said in ("Once upon a time", "Es war einmal", "你好，世界", "<|im_end|>", "\n\t \0"):
        for special in (False, True):
            tokens = whole.encode(said, parse_special=special)
            assert np.array_equal(ours.encode(said, parse_special=special), tokens)
            assert ours.decode(tokens) == whole.decode(tokens)
    assert np.array_equal(vocabulary.chat(MESSAGES), target_model.chat(MESSAGES))
    assert vocabulary.path.stat().st_size < FILES[0].stat().st_size / 10


def test_without_weights_every_property_has_an_answer(
    vocabulary: sllm.Model, target_model: sllm.Model
) -> None:
    """And none of them aborts."""
    assert vocabulary.architecture == target_model.architecture
    assert dict(vocabulary.metadata) == dict(target_model.metadata)
    assert vocabulary.n_params == 0
    assert vocabulary.size_bytes == 0
    assert isinstance(vocabulary.description, str)
    for name in ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ctx_train"):
        assert getattr(vocabulary, name) >= 0
    for name in ("offloaded", "closed"):
        assert isinstance(getattr(vocabulary, name), bool)
    assert vocabulary.can_rollback == "free"
    assert "vocabulary.gguf" in repr(vocabulary)
    assert str(vocabulary.vocab.n_tokens) in repr(vocabulary.vocab)
    assert vocabulary.compiled(PLAIN) is not None


@pytest.mark.parametrize("model_path", [None, FILES[1]], ids=["no tensors", "tensors left"])
def test_without_weights_there_is_no_context(vocabulary: sllm.Model, model_path: Path | None) -> None:
    with sllm.Model(model_path or vocabulary.path, vocab_only=True) as model:
        for make in (lambda: model.context(n_ctx=64), lambda: sllm.LocalTarget(model)):
            with pytest.raises(ValueError, match="without its weights"):
                make()
        with pytest.raises(ValueError, match="without its weights"):
            sllm.generate(model, "Once", max_tokens=1).text()


def test_a_vocabulary_is_no_model(vocabulary: sllm.Model) -> None:
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(vocabulary.path)


def test_nothing_of_a_split_file_is_left_in_its_vocabulary(tmp_path: Path) -> None:
    file = GGUF(FILES[1])
    file.metadata[b"split.no"] = (2, 0)
    file.metadata[b"split.count"] = (2, 2)
    file.metadata[b"split.tensors.count"] = (5, len(file.tensors))
    first = file.write(tmp_path / "m-00001-of-00002.gguf")
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf.vocabulary_only(first))
    with sllm.Model(path, vocab_only=True) as model, sllm.Model(FILES[1]) as whole:
        assert model.vocab.fingerprint == whole.vocab.fingerprint


@pytest.mark.parametrize("n_tokens", [100, 2561])
def test_the_vocabulary_of_another_size(tmp_path: Path, n_tokens: int) -> None:
    file = GGUF(FILES[1])
    file.resize_vocab(n_tokens)
    whole = file.write(tmp_path / "whole.gguf")
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf.vocabulary_only(whole))
    with sllm.Model(path, vocab_only=True) as model, sllm.Model(whole) as big:
        assert model.vocab.n_tokens == big.vocab.n_tokens == n_tokens
        assert model.vocab.fingerprint == big.vocab.fingerprint


# ---- identity ----------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    copies = [gguf.model_id(Path(shutil.copy(path, tmp_path / path.name))) for path in FILES]
    assert copies == [gguf.model_id(path) for path in FILES]
    assert len(set(copies)) == 2
    assert all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in copies)


def test_another_byte_is_another_model(tmp_path: Path) -> None:
    data = FILES[1].read_bytes()
    size = gguf.read_header(FILES[1]).size
    path = tmp_path / "model.gguf"
    seen = {gguf.model_id(FILES[1])}
    # This file is smaller than all samples together, so every byte of it counts.
    for at in (8, 100, size - 1, size, size + 1, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with suppress(sllm.ModelLoadError):
            found = gguf.model_id(path)
            assert found not in seen
            seen.add(found)
    for content in (data[:-1], data + b"\0"):
        path.write_bytes(content)
        assert gguf.model_id(path) not in seen
    assert len(seen) >= 6


def test_samples_reach_both_ends_of_a_large_file(tmp_path: Path) -> None:
    n_bytes = 64 << 20  # most of it is never read, nor written: the file is sparse
    path = tmp_path / "large.gguf"

    def identity(at: int | None) -> str:
        with path.open("wb") as file:
            file.write(SMALL)
            file.truncate(n_bytes)
            if at is not None:
                file.seek(at)
                file.write(b"x")
        return gguf.model_id(path)

    first, last = len(SMALL), n_bytes - 1
    plain = identity(None)
    assert identity(None) == plain
    ends = [identity(at) for at in (first, first + (1 << 16) - 1, last, last - (1 << 16) + 1)]
    assert len({plain, *ends}) == 5
    assert identity(first + (1 << 16) + 1000) == plain  # between two samples


def test_a_model_in_several_files_is_all_of_them(tmp_path: Path) -> None:
    def write(
        last_byte: int, names: tuple[str, str] = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    ) -> Any:
        for i, name in enumerate(names):
            pairs = [
                pair(b"split.no", 2, struct.pack("<H", i)),
                pair(b"split.count", 2, struct.pack("<H", 2)),
            ]
            (tmp_path / name).write_bytes(header(pairs, []) + bytes(1000) + bytes([last_byte * i]))
        return gguf.model_id(tmp_path / names[0])

    assert write(1) == write(1)
    assert write(1) != write(2)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(OSError, match="m-00002-of-00002"):
        gguf.model_id(tmp_path / "m-00001-of-00002.gguf")
    assert len(write(1, ("renamed.gguf", "other.gguf"))) == 64  # then it is one file to us

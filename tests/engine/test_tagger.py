"""The tagger of the core: the best path as NumPy finds it, on every instruction set; files of every kind."""

from __future__ import annotations

import random
import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from random_models import decoded, encoded
from taggers import contents, path_score, random_weights, scores, write

import sllm
from sllm.engine._ffi import lib
from sllm.engine.tagger import MOST_CHARACTERS, Tagger
from sllm.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(params=range(lib.sllm_row_codes()))
def variant(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each instruction set that this machine has, in use."""
    lib.sllm_use_row_code(request.param)
    yield request.param
    lib.sllm_use_row_code(lib.sllm_row_codes() - 1)


def texts(seed: int, n: int, *, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcxyz王一二😀", k=rng.randint(1, longest))) for _ in range(n)]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_units": 7, "n_embd": 5, "n_labels": 3},
        {"n_units": 48, "n_layers": 1, "n_labels": 17},
        {"n_layers": 3, "n_labels": 1},
        {"n_embd": 40, "n_units": 33, "n_labels": 40},
    ],
    ids=str,
)
def test_labels_are_the_best_path(tmp_path: Path, variant: int, shape: dict[str, int]) -> None:
    weights = random_weights(variant, **shape)
    tagger = Tagger(write(tmp_path / "tagger.gguf", *contents(weights)))
    assert tagger.labels == tuple(weights.labels)
    sentences = texts(variant, 30)
    labels = tagger.run("".join(sentences), [len(one) for one in sentences]).tolist()
    at = 0
    for sentence in sentences:
        said = scores(weights, sentence)
        path = labels[at : at + len(sentence)]
        at += len(sentence)
        # Of two paths that are as good, rounding may take either.
        assert path_score(weights, said, path) >= path_score(weights, said) - 1e-3


def test_a_sentence_has_the_same_labels_alone_and_among_others(tmp_path: Path, variant: int) -> None:
    tagger = Tagger(write(tmp_path / "tagger.gguf", *contents(random_weights(variant))))
    sentences = ["", *texts(1, 50), "a" * 700]
    together = tagger.run("".join(sentences), [len(one) for one in sentences]).tolist()
    assert together == [label for one in sentences for label in tagger.run(one, [len(one)]).tolist()]


def test_every_instruction_set_gives_the_same_labels(tmp_path: Path) -> None:
    tagger = Tagger(write(tmp_path / "tagger.gguf", *contents(random_weights(3, n_labels=20))))
    sentences = texts(2, 200)
    found = []
    try:
        for code in range(lib.sllm_row_codes()):
            lib.sllm_use_row_code(code)
            found.append(tagger.run("".join(sentences), [len(one) for one in sentences]).tobytes())
    finally:
        lib.sllm_use_row_code(lib.sllm_row_codes() - 1)
    assert len(set(found)) == 1


def test_quantised_rows_are_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    weights = random_weights(5)

    def rounded(values: np.ndarray) -> np.ndarray:
        return decoded(encoded(values.ravel(), "q8_0"), "q8_0").reshape(values.shape).astype(np.float32)

    same = replace(
        weights,
        embd=rounded(weights.embd),
        out=rounded(weights.out),
        layers=[[(rounded(a), b, rounded(c)) for a, b, c in layer] for layer in weights.layers],
    )
    quantised = Tagger(write(tmp_path / "q8_0.gguf", *contents(weights, "q8_0")))
    plain = Tagger(write(tmp_path / "f32.gguf", *contents(same)))
    text = "".join(texts(4, 40))
    assert quantised.run(text, [len(text)]).tolist() == plain.run(text, [len(text)]).tolist()


def test_threads_share_a_tagger(tmp_path: Path) -> None:
    tagger = Tagger(write(tmp_path / "tagger.gguf", *contents(random_weights(6))))
    text = "".join(texts(7, 60))
    expected = tagger.run(text, [len(text)]).tobytes()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(tagger.run(text, [len(text)]).tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# ---- what callers hand over --------------------------------------------------------------------------------


def test_lengths_have_to_be_those_of_the_text(tmp_path: Path) -> None:
    tagger = Tagger(write(tmp_path / "tagger.gguf", *contents(random_weights(8))))
    for lengths in ([2], [3, 1], [4, -1], []):
        with pytest.raises(ValueError, match="expected the text's 3"):
            tagger.run("abc", lengths)
    with pytest.raises(TypeError, match="lengths"):
        tagger.run("abc", [3.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected 0 to 65536"):
        tagger.run("a" * (MOST_CHARACTERS + 1), [MOST_CHARACTERS + 1])
    assert tagger.run("", []).tolist() == tagger.run("", [0, 0]).tolist() == []
    assert len(tagger.run("\ud800\U0010ffff\0", [3])) == 3


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda p, t: p.update({"general.architecture": struct.pack("<IQ", 8, 5) + b"llama"}),
            "is a llama, not an",
        ),
        (lambda p, t: p.pop("general.architecture"), "no general.architecture of type str"),
        (lambda p, t: p.update({"sllm-tagger.version": struct.pack("<If", 6, 1.0)}), "version of type u32"),
        (lambda p, t: p.update({"sllm-tagger.labels": struct.pack("<IIQ", 9, 8, 0)}), "has 0 texts"),
        (lambda p, t: p.update({"sllm-tagger.labels": struct.pack("<IIQI", 9, 4, 1, 7)}), "has 0 texts"),
        (
            lambda p, t: p.update({"sllm-tagger.unknown": struct.pack("<II", 4, 1 << 31)}),
            "is not one of the embedding's",
        ),
        (lambda p, t: t.pop("out"), "has no tensor out"),
        (lambda p, t: t.pop("gru.0.forward.in"), "has no tensor gru.0.forward.in"),
        (lambda p, t: t.pop("gru.1.backward.bias"), "has no tensor gru.1.backward.bias"),
        (lambda p, t: t.update(embd=([32, 1], 0, bytes(128))), "a character's row is not"),
        (
            lambda p, t: t.update(chars=([2], 26, struct.pack("<ii", 5, 5)), rows=([2], 26, bytes(8))),
            "rising order",
        ),
        (
            lambda p, t: t.update(chars=([1], 26, struct.pack("<i", -1)), rows=([1], 26, bytes(4))),
            "rising order",
        ),
        (
            lambda p, t: t.update(chars=([1], 26, struct.pack("<i", 0x110000)), rows=([1], 26, bytes(4))),
            "rising",
        ),
        (lambda p, t: t.update(rows=([3], 26, bytes(12))), "rows has 3 x 1 numbers, expected 29 x 1"),
        (
            lambda p, t: t.update(rows=(t["rows"][0], 26, struct.pack("<i", -1) * 29)),
            "a character's row is not",
        ),
        (lambda p, t: t.update(start=([5], 0, struct.pack("<f", np.nan) * 5)), "beyond a million, or none"),
        (lambda p, t: t.update(end=([5], 0, struct.pack("<f", np.inf) * 5)), "beyond a million"),
        (lambda p, t: t.update(transitions=([5, 4], 0, bytes(80))), "has 5 x 4 numbers, expected 5 x 5"),
        (lambda p, t: t.update(out_bias=([5], 1, bytes(10))), "of type f16, expected f32 or q8_0"),
        (lambda p, t: t.update(embd=([4, 2, 2], 0, bytes(64))), "expected a matrix"),
        (
            lambda p, t: t.update({"gru.0.forward.recurrent": ([5000, 1], 0, bytes(20000))}),
            "beyond what taggers have",
        ),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, change: Callable[..., object], why: str) -> None:
    pairs, tensors = contents(random_weights(9))
    change(pairs, tensors)
    path = write(tmp_path / "bad.gguf", pairs, tensors)
    with pytest.raises(ModelLoadError, match=why) as caught:
        Tagger(path)
    assert str(path) in str(caught.value)


def test_another_version_is_not_supported(tmp_path: Path) -> None:
    pairs, tensors = contents(random_weights(9))
    pairs["sllm-tagger.version"] = struct.pack("<II", 4, 2)
    with pytest.raises(UnsupportedModelError, match="version 2 of the layout, expected 1"):
        Tagger(write(tmp_path / "new.gguf", pairs, tensors))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="No such file"):
        Tagger(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelLoadError):
        Tagger(tmp_path)
    (tmp_path / "text").write_text("This is no model.")
    with pytest.raises(ModelLoadError):
        Tagger(tmp_path / "text")


def test_damaged_files_are_refused_or_run(tmp_path: Path) -> None:
    """Whatever a file says: an error that is ours, or labels."""
    weights = random_weights(10, n_embd=4, n_units=4, n_layers=1, n_labels=3)
    whole = write(tmp_path / "whole.gguf", *contents(weights)).read_bytes()
    header = len(whole) - sum(len(data) + -len(data) % 32 for _, _, data in contents(weights)[1].values())
    rng = random.Random(11)
    path = tmp_path / "mutant.gguf"
    n_refused = 0
    for n in range(3000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(header if n % 4 else len(data))
            if n % 3 == 0:
                data[at] ^= 1 << rng.randrange(8)
            else:
                number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
                size = rng.choice((1, 4, 8))
                data[at : at + size] = (number % 256**size).to_bytes(size, "little")
        if n % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            tagger = Tagger(path)
        except (sllm.SllmError, MemoryError):
            n_refused += 1
            continue
        labels = tagger.run("abc王\0xyz", [8])
        assert ((labels >= 0) & (labels < len(tagger.labels))).all()
    assert 1500 < n_refused < 3000

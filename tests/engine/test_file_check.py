"""Files that were taken for models, named as what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import random_models
from hypothesis import given
from hypothesis import strategies as st
from random_models import SHAPES
from tiny_models import gguf as small_gguf

import sllm
from sllm import embedded
from sllm.engine import gguf
from sllm.engine.file_check import check_file
from sllm.engine.file_kind import not_gguf
from sllm.engine.layers import open_layers

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = embedded.DRAFT.read_bytes()

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4920739232\n"
)


def _zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, b"x")
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("m.gguf"))
    return out.getvalue()


def _safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


KINDS = {
    "lfs": (POINTER, ["Git LFS pointer", "4,920,739,232 bytes", "git lfs pull"]),
    "lfs older": (POINTER.replace(b"\noid", b"\next-0 x\noid"), ["Git LFS pointer"]),
    "html": (
        b"<!DOCTYPE html>\n<html><head><title>Sign in\n - Hub</title>",
        ["an HTML page ('Sign in - Hub')"],
    ),
    "html of the start": (b"\xef\xbb\xbf\r\n <HTML lang=en>", ["an HTML page;", "with a token"]),
    "html after a comment": (b"<!-- x --><html>", ["an HTML page"]),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', ["it is XML (", "AccessDenied"]),
    "json": (b'{"error":"Repository not found"}', ["""JSON ('{"error":"Repository not found"}')"""]),
    "text": (b"Invalid username or password.", ["begins with b'Inva', expected b'GGUF'"]),
    "gzip": (gzip.compress(MODEL[:99]), ["a gzip archive", "extract it"]),
    "bzip2": (bz2.compress(MODEL[:99]), ["a bzip2 archive"]),
    "xz": (lzma.compress(MODEL[:99]), ["an xz archive"]),
    "zip": (_zip("m.gguf"), ["a zip archive"]),
    "pytorch": (_zip("archive/data.pkl"), ["PyTorch checkpoint", "convert_hf_to_gguf"]),
    "pickle": (pickle.dumps({"w": 1}, 2), ["pickled PyTorch checkpoint"]),
    "tar": (_tar(), ["a tar archive"]),
    "safetensors": (_safetensors(), ["a safetensors file", "convert_hf_to_gguf"]),
    "ggjt": (struct.pack("<II", 0x67676A74, 3), ["of the format before GGUF"]),
    "ggml": (struct.pack("<I", 0x67676D6C), ["of the format before GGUF"]),
    "zeros": (bytes(4096), ["begins with zeros", "a download does that has not ended"]),
    "bytes": (b"\x00\x01\x02\xff" * 20, [r"begins with b'\x00\x01\x02\xff'"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds(kind: str, tmp_path: Path) -> None:
    content, words = KINDS[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for use in (sllm.Model, open_layers, gguf.read_header):
        with pytest.raises(sllm.ModelLoadError) as refused:
            use(path)
        text = str(refused.value)
        assert text.startswith(f"{path} is not a GGUF file: it ")
        assert "\n" not in text
        for word in words:
            assert word in text


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    for use in (sllm.Model, open_layers, gguf.read_header):
        with pytest.raises(sllm.ModelLoadError, match="is empty"):
            use(path)


@given(st.binary(min_size=1, max_size=600))
def test_any_bytes_have_a_name(head: bytes) -> None:
    assert "\n" not in not_gguf(head)


def refusal(path: Path, use: Callable[[Path], object] = sllm.Model) -> str:
    with pytest.raises(sllm.ModelLoadError) as refused:
        use(path)
    text = str(refused.value)
    assert text.startswith(str(path.parent))
    assert "\n" not in text
    return text


# ---- downloads that were cut off


@pytest.mark.parametrize("size", [len(MODEL) - 1, len(MODEL) // 2, 300_000])
def test_a_file_that_ends_too_soon(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(MODEL[:size])
    text = refusal(path)
    assert f"is not complete: it has {size:,} bytes, and its last tensor ends at" in text
    assert "download it again (llama_model_load: " in text  # and llama.cpp's own words


def test_a_file_that_ends_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(MODEL[:1000])
    assert "is damaged: it ends in its header" in refusal(path)


def test_the_other_byte_order_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + MODEL[8:])
    assert "is a big-endian GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + MODEL[8:])
    assert "GGUF version 1, expected 2 or 3" in refusal(path)


# ---- GGUF files that are no models


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"general.type": "adapter", "general.architecture": "llama"}, "is a LoRA adapter"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "is a projector for images"),
        ({"general.architecture": "clip"}, "is a projector for images"),
        ({"general.type": "imatrix"}, "is an importance matrix"),
    ],
)
def test_files_that_belong_to_models(tmp_path: Path, meta: dict[str, str], words: str) -> None:
    path = tmp_path / "beside.gguf"
    path.write_bytes(small_gguf(meta, {}))
    assert words in refusal(path)


def test_a_file_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "layers.gguf"
    sllm.export_layers(embedded.DRAFT, path, 0, 1)
    text = refusal(path)
    assert "holds layers [0, 1) of a model, and no whole one" in text
    assert "sllm worker --layers" in text


# ---- folders


def test_folders_say_what_is_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    assert refusal(folder) == f"{folder} is a directory, expected a GGUF file"
    (folder / "model.safetensors").touch()
    assert "it holds a safetensors checkpoint" in refusal(folder)
    (folder / "b.gguf").touch()
    assert refusal(folder).endswith("; b.gguf is in it")
    for i in range(8):
        (folder / f"a{i}.gguf").touch()
    assert refusal(folder).endswith("; a0.gguf, a1.gguf, a2.gguf, a3.gguf, a4.gguf and 4 more are in it")


def test_names_that_may_have_meant_the_hub() -> None:
    for name, words in [
        ("me/it", "; one on the Hugging Face hub is named hf://me/it"),
        ("me/it/m.gguf", "; one on the Hugging Face hub is named hf://me/it/m.gguf"),
        ("llama3.2:1b", "; one on the Hugging Face hub: expected hf://owner/repo"),
        ("m.gguf", ""),
        ("folder/m.gguf", ""),
        ("/folder/of/m.gguf", ""),
    ]:
        with pytest.raises(sllm.ModelLoadError) as refused:
            sllm.Model(name)
        assert str(refused.value).startswith(f"{name} does not exist, expected a GGUF file{words}")
        assert words or str(refused.value).endswith("expected a GGUF file")


# ---- models in several files


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    random_models.write_in_parts(tmp_path, "m", SHAPES["llama"], 3)
    return sorted(tmp_path.iterdir())


USES = [sllm.Model, open_layers]


def test_the_first_part_is_the_whole(parts: list[Path], llama: Path) -> None:
    with sllm.Model(parts[0]) as model, sllm.Model(llama) as whole:
        assert model.n_params == whole.n_params
        assert model.size_bytes == whole.size_bytes


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("i", [1, 2])
def test_a_later_part_names_the_first(parts: list[Path], i: int, use: Callable[[Path], object]) -> None:
    text = refusal(parts[i], use)
    assert text == f"{parts[i]} is part {i + 1} of 3 of a split model; name the first part, {parts[0]}"


@pytest.mark.parametrize("use", USES)
def test_missing_parts_are_named(parts: list[Path], use: Callable[[Path], object]) -> None:
    parts[1].unlink()
    assert f"the first of 3 parts of a model, and {parts[1].name} is missing beside it" in refusal(
        parts[0], use
    )
    parts[2].unlink()
    assert f"and {parts[1].name}, {parts[2].name} are missing beside it" in refusal(parts[0], use)


@pytest.mark.parametrize("use", USES)
def test_a_part_that_is_something_else(parts: list[Path], use: Callable[[Path], object]) -> None:
    parts[2].write_bytes(POINTER)
    assert refusal(parts[0], use).startswith(f"{parts[2]} is not a GGUF file: it is a Git LFS pointer")


def test_a_part_that_is_cut_off(parts: list[Path]) -> None:
    data = parts[1].read_bytes()
    parts[1].write_bytes(data[:-100])
    assert f"{parts[1]} is not complete" in refusal(parts[0])


def test_parts_that_were_renamed(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "model.gguf")
    assert "was renamed" in refusal(renamed)
    assert "-00001-of-00003.gguf" in refusal(renamed)
    other = renamed.rename(tmp_path / "m-00001-of-00002.gguf")
    assert "a part of a model in 3 files, and its name says 2" in refusal(other)


def test_a_whole_model_that_is_called_a_part(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    shutil.copyfile(embedded.DRAFT, path)
    check_file(path)
    with sllm.Model(path) as model:
        assert model.n_layer

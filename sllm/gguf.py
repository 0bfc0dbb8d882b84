"""GGUF files without loading them: the header, a model's identity, and the vocabulary alone.

The format is llama.cpp's (``ggml/include/gguf.h``): magic, version, the numbers of tensors and of key-value
pairs, the pairs, a description of each tensor, and behind that the data.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Header", "model_id", "read_header", "vocabulary_only"]

_SCALAR_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

# Far above what real files have; a damaged one must not make us allocate.
_MAX_PAIRS = 1 << 16
_MAX_ITEMS = 1 << 24
_MAX_STRING = 1 << 26
_MAX_DIMS = 8

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
        version: of the format, 2 or 3.
        pairs: key -> the pair as it stands in the file, key included.
        n_tensors: how many tensors are described.
        size: bytes up to the end of the descriptions.

    """

    version: int
    pairs: dict[str, bytes]
    n_tensors: int
    size: int


class _Reader:
    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self._name} is damaged: {what}")

    def take(self, n: int) -> bytes:
        data = self._file.read(n)
        if len(data) != n:
            raise self.fail("it ends in its header")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> bytes:
        raw = self.take(8)
        n = int.from_bytes(raw, "little")
        if n > _MAX_STRING:
            raise self.fail(f"a text of {n} bytes")
        return raw + self.take(n)

    def value(self, kind: int) -> bytes:
        if kind in _SCALAR_SIZES:
            return self.take(_SCALAR_SIZES[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"a value of the unknown type {kind}")
        head = self.take(12)
        item, count = struct.unpack("<IQ", head)
        if count > _MAX_ITEMS:
            raise self.fail(f"an array of {count} items")
        if item in _SCALAR_SIZES:
            return head + self.take(_SCALAR_SIZES[item] * count)
        if item != _STRING:
            raise self.fail(f"an array of the unknown type {item}")
        return head + b"".join(self.string() for _ in range(count))


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        ModelLoadError: no GGUF file, or a damaged one.
        OSError: it cannot be read.

    """
    with path.open("rb") as file:
        read = _Reader(file, str(path))
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file")
        version = read.number("<I")
        if version not in (2, 3):
            raise ModelLoadError(f"{path} is GGUF version {version}, expected 2 or 3")
        n_tensors, n_pairs = read.number("<Q"), read.number("<Q")
        if n_tensors > _MAX_ITEMS or n_pairs > _MAX_PAIRS:
            raise read.fail(f"{n_tensors} tensors and {n_pairs} pairs")
        pairs: dict[str, bytes] = {}
        for _ in range(n_pairs):
            key = read.string()
            kind = read.take(4)
            pairs[key[8:].decode("utf-8", "replace")] = (
                key + kind + read.value(int.from_bytes(kind, "little"))
            )
        for _ in range(n_tensors):
            read.string()
            n_dims = read.number("<I")
            if n_dims > _MAX_DIMS:
                raise read.fail(f"a tensor of {n_dims} dimensions")
            read.take(8 * n_dims + 4 + 8)
        return Header(version, pairs, n_tensors, file.tell())


def vocabulary_only(path: Path) -> bytes:
    """The file without its tensors: vocabulary, chat template and the other metadata, as a GGUF of its own.

    Raises:
        ModelLoadError, OSError: as :func:`read_header`.

    """
    header = read_header(path)
    # What says that the model goes on in other files would make a loader look for them.
    pairs = [pair for key, pair in header.pairs.items() if not key.startswith("split.")]
    return b"GGUF" + struct.pack("<IQQ", header.version, 0, len(pairs)) + b"".join(pairs)


def model_id(path: Path) -> str:
    """SHA-256 (hex) that tells models apart: over the header, the size, and 64 samples of the weights of 64
    KiB, evenly spread.

    Reading all of a large file would take minutes; two files that differ in no sample are taken for the same.
    Of a model in several files, each one counts.

    Raises:
        ModelLoadError, OSError: as :func:`read_header`.

    """
    digest = hashlib.sha256()
    for part in _parts(path):
        header = read_header(part)
        with part.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest.update(file.read(header.size) + size.to_bytes(8, "little"))
            body = max(size - header.size - _SAMPLE_BYTES, 0)
            for i in range(_SAMPLES):
                file.seek(header.size + body * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _parts(path: Path) -> list[Path]:
    """All files of a model: more than one where llama.cpp's gguf-split has split it."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name, re.DOTALL)
    count = read_header(path).pairs.get("split.count", b"")[-2:]  # a uint16
    if found is None or int.from_bytes(count, "little") != int(found[2]):
        return [path]
    return [path.with_name(f"{found[1]}-{i:05d}-of-{found[2]}.gguf") for i in range(1, int(found[2]) + 1)]

"""GGUF files without loading them: the header, a model's identity, and the vocabulary alone.

The format is llama.cpp's (``ggml/include/gguf.h``): magic, version, the numbers of tensors and of key-value
pairs, the pairs, a description of each tensor, and after that the data.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sllm.engine.file_kind import N_BYTES, not_gguf
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sllm.engine.hub import HubFile

__all__ = ["Header", "Tensor", "model_id", "pair", "parts", "read_header", "string", "vocabulary_only"]

_SCALAR_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_SCALAR_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Far above what real files have; a damaged one must not make us allocate.
_MAX_PAIRS = 1 << 16
_MAX_ITEMS = 1 << 24
_MAX_STRING = 1 << 26
_MAX_DIMS = 8
_MAX_ALIGNMENT = 1 << 20

SOURCE_KEY = "sllm.layers.source"
"""Of a file with some of a model's layers: the identity of the model."""

_MOST_HELD = 1 << 16
"""Bytes of a pair that is kept in memory. The vocabulary's are megabytes, and few ask for them."""

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file.

    Attributes:
        dims: ggml's order, the rows' width first.
        kind: ggml's number of its type.
        offset: of its first byte in the file.
        size: bytes up to the next tensor, so with the padding after it.

    """

    dims: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
        version: of the format, 2 or 3.
        pairs: key -> the pair as it stands in the file, key included. Long arrays, such as the vocabulary's,
            are read from the file when they are asked for.
        tensors: name -> the tensor, in the order of the file.
        size: bytes up to the end of the descriptions.

    """

    version: int
    pairs: Mapping[str, bytes]
    tensors: dict[str, Tensor]
    size: int

    def value(self, key: str) -> Any:
        """The value of ``key``: a number, bool, str, or a list of them (of numbers and bools only); None
        where there is none.
        """
        raw = self.pairs.get(key)
        if raw is None:
            return None
        body = raw[8 + int.from_bytes(raw[:8], "little") :]
        kind, body = int.from_bytes(body[:4], "little"), body[4:]
        if kind == _STRING:
            return body[8:].decode("utf-8", "replace")
        if kind == _ARRAY:
            item, count = struct.unpack_from("<IQ", body)
            if item not in _SCALAR_FORMS:
                return None
            return list(struct.unpack_from(f"<{count}{_SCALAR_FORMS[item]}", body, 12))
        return struct.unpack_from("<" + _SCALAR_FORMS[kind], body)[0]


def string(text: str) -> bytes:
    """``text`` as GGUF writes it."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def pair(key: str, value: str | float | Sequence[int] | Sequence[bool] | Sequence[str]) -> bytes:
    """A key and its value, as GGUF writes them: text, a uint32, a float32, or an array of text, uint32 or
    bool.
    """
    if isinstance(value, str):
        return string(key) + struct.pack("<I", _STRING) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return string(key) + struct.pack("<II", 4, value)
    texts = [item for item in value if isinstance(item, str)]
    if texts:
        return string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(string, texts))
    kind = 7 if all(isinstance(item, bool) for item in value) else 4
    body = struct.pack(f"<{len(value)}{_SCALAR_FORMS[kind]}", *value)
    return string(key) + struct.pack("<IIQ", _ARRAY, kind, len(value)) + body


@dataclass(frozen=True)
class _Place:
    offset: int
    size: int
    begin: bytes  # of what is there


class _Pairs(Mapping[str, bytes]):
    """Key-value pairs, of which long ones stay in the file."""

    def __init__(self, path: Path | HubFile, found: dict[str, bytes | _Place]) -> None:
        self._path = path
        self._found = found

    def __getitem__(self, key: str) -> bytes:
        value = self._found[key]
        if isinstance(value, bytes):
            return value
        with self._path.open("rb") as file:
            file.seek(value.offset)
            raw = file.read(value.size)
        if len(raw) != value.size or not raw.startswith(value.begin):
            raise ModelLoadError(f"{self._path} has been changed while it was in use: {key} is not there now")
        return raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


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

    def value(self, kind: int) -> bytearray:
        """The bytes of a value. No object for each of many strings: what they leave behind in the heap stays
        with the process.
        """
        raw = bytearray()
        if kind in _SCALAR_SIZES:
            raw += self.take(_SCALAR_SIZES[kind])
        elif kind == _STRING:
            raw += self.string()
        elif kind == _ARRAY:
            raw += self.take(12)
            item, count = struct.unpack("<IQ", raw)
            if count > _MAX_ITEMS:
                raise self.fail(f"an array of {count} items")
            if item in _SCALAR_SIZES:
                raw += self.take(_SCALAR_SIZES[item] * count)
            elif item == _STRING:
                for _ in range(count):
                    raw += self.string()
            else:
                raise self.fail(f"an array of the unknown type {item}")
        else:
            raise self.fail(f"a value of the unknown type {kind}")
        return raw


def read_header(path: Path | HubFile) -> Header:
    """Read a file's header.

    Raises:
        ModelLoadError: no GGUF file, or a damaged one.
        OSError: it cannot be read.

    """
    with path.open("rb") as file:
        read = _Reader(file, str(path))
        magic = file.read(4)
        if magic != b"GGUF":
            file.seek(0)
            head = file.read(N_BYTES)
            raise ModelLoadError(
                f"{path} is not a GGUF file: {not_gguf(head)}"
                if head
                else f"{path} is empty, not a GGUF file"
            )
        version = read.number("<I")
        if version in (2 << 24, 3 << 24):
            raise ModelLoadError(
                f"{path} is a big-endian GGUF file of version {version >> 24}, which this machine cannot"
                " load; look for the model without 'be' in its name"
            )
        if version not in (2, 3):
            raise ModelLoadError(f"{path} is GGUF version {version}, expected 2 or 3")
        n_tensors, n_pairs = read.number("<Q"), read.number("<Q")
        if n_tensors > _MAX_ITEMS or n_pairs > _MAX_PAIRS:
            raise read.fail(f"{n_tensors} tensors and {n_pairs} pairs")
        again = isinstance(path, Path)  # of one that is far away, nothing is asked for twice
        pairs: dict[str, bytes | _Place] = {}
        for _ in range(n_pairs):
            begin = file.tell()
            key = read.string()
            kind = read.take(4)
            value = read.value(int.from_bytes(kind, "little"))
            size = len(key) + len(kind) + len(value)
            held = size <= _MOST_HELD or not again
            pairs[key[8:].decode("utf-8", "replace")] = (
                key + kind + value if held else _Place(begin, size, key + kind)
            )
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name = read.string()[8:].decode("utf-8", "replace")
            n_dims = read.number("<I")
            if n_dims > _MAX_DIMS:
                raise read.fail(f"a tensor of {n_dims} dimensions")
            dims = struct.unpack(f"<{n_dims}Q", read.take(8 * n_dims))
            found[name] = (dims, read.number("<I"), read.number("<Q"))
        header = Header(version, _Pairs(path, pairs), {}, file.tell())
        alignment = header.value("general.alignment") or 32
        if not isinstance(alignment, int) or alignment <= 0 or alignment > _MAX_ALIGNMENT:
            raise read.fail(f"general.alignment is {alignment!r}")
        data = -(-header.size // alignment) * alignment
        end = file.seek(0, os.SEEK_END)
        ends = [*sorted({data + offset for _, _, offset in found.values()}), end]
        for name, (dims, tensor_kind, offset) in found.items():
            begin = data + offset
            following = ends[bisect.bisect_right(ends, begin, 0, len(ends) - 1)]
            header.tensors[name] = Tensor(dims, tensor_kind, begin, max(following - begin, 0))
        return header


def vocabulary_only(path: Path) -> bytes:
    """The file without its tensors: vocabulary, chat template and the other metadata, as a GGUF of its own.

    Raises:
        ModelLoadError, OSError: as :func:`read_header`.

    """
    header = read_header(path)
    # What says that the model goes on in other files would make a loader look for them.
    pairs = [pair for key, pair in header.pairs.items() if not key.startswith("split.")]
    return b"GGUF" + struct.pack("<IQQ", header.version, 0, len(pairs)) + b"".join(pairs)


def model_id(path: Path | HubFile) -> str:
    """SHA-256 (hex) that tells models apart: over the header, the size, and 64 samples of the weights of 64
    KiB, evenly spread.

    Reading all of a large file would take minutes; two files that differ in no sample are taken for the same.
    Of a model in several files, each one counts. A file of some of a model's layers
    (:func:`sllm.export_layers`) has the identity of the model.

    Raises:
        ModelLoadError, OSError: as :func:`read_header`.

    """
    source = read_header(path).value(SOURCE_KEY)
    if isinstance(source, str):
        return source
    digest = hashlib.sha256()
    for part in parts(path):
        header = read_header(part)
        with part.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for at in range(0, header.size, _SAMPLE_BYTES):
                digest.update(file.read(min(_SAMPLE_BYTES, header.size - at)))
            digest.update(size.to_bytes(8, "little"))
            body = max(size - header.size - _SAMPLE_BYTES, 0)
            for i in range(_SAMPLES):
                file.seek(header.size + body * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def parts(path: Path | HubFile) -> list[Any]:
    """All files of a model: more than one where llama.cpp's gguf-split has split it.

    Raises:
        ModelLoadError, OSError: as :func:`read_header`.

    """
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if found is None or read_header(path).value("split.count") != int(found[2]):
        return [path]
    return [path.with_name(f"{found[1]}-{i:05d}-of-{found[2]}.gguf") for i in range(1, int(found[2]) + 1)]

"""The weights of a tagger for Chinese that the package ``jieba`` carries, as a file for our own core.

They are LAC's smaller ones (Jiao, Sun and Sun 2018, arXiv:1807.01882): words, parts of speech, people, places
and organisations by characters. The files are read where the package is installed, and none of its code is
imported. The result is kept in the cache folder; its hash says that both it and the files are what they were
when this was written.
"""

from __future__ import annotations

import hashlib
import math
import struct
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine.gguf import pair, string
from sllm.errors import ModelLoadError
from sllm.extras import needs, package_folders
from sllm.folders import cache_folder, replacing
from sllm.privacy.data import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

__all__ = ["convert", "installed", "weights"]

_SHA256 = "5ee17760cdcf52e673fe6ccee49bcd7ccb49fe31f960df1894c50a72a4ef6f5d"
_NAME = "lac-small-1.gguf"
_TYPES = {np.dtype("<f4"): 0, np.dtype("<i4"): 26}  # ggml's numbers
_ALIGNMENT = 32
_WIDTH = 128  # of the embedding, and the units of each direction


def installed() -> Path | None:
    """The folder of the weights in the installed package; None where it is not installed."""
    folders = (folder / "lac_small" for folder in package_folders("jieba"))
    return next((folder for folder in folders if folder.is_dir()), None)


def weights() -> Path:
    """The converted weights, made where they are not there yet.

    Raises:
        ImportError: the package is not installed; says what to type.
        ModelLoadError: its files are others than those of version 0.42.1.
        OSError: the cache folder cannot be written.

    """
    path = cache_folder("taggers") / _NAME
    if path.is_file() and _hash(path.read_bytes()) == _SHA256:
        return path
    folder = installed()
    if folder is None:
        with needs("names"):
            raise ModuleNotFoundError("No module named 'jieba'", name="jieba")
    data = convert(folder)
    if _hash(data) != _SHA256:
        raise ModelLoadError(
            f"the weights in {folder} are not those of jieba 0.42.1: they give a file with SHA-256 "
            f"{_hash(data)}, expected {_SHA256}; install that version anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(data)
    return path


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def convert(folder: Path) -> bytes:
    """The weights in a folder as a GGUF of the layout of ``sllm_tagger_load`` (``csrc/sllm.h``).

    Raises:
        ModelLoadError: a file is missing, or is not what LAC writes.

    """
    labels = [label for _, label in sorted(_numbered(folder / "tag.dic").items())]
    vocabulary = {char: row for row, char in _numbered(folder / "word.dic").items()}
    if "OOV" not in vocabulary:
        raise ModelLoadError(f"{folder / 'word.dic'} names no OOV: it is no vocabulary of LAC")
    unknown = vocabulary["OOV"]
    rows = {ord(char): row for char, row in vocabulary.items() if len(char) == 1}
    rows.update(_compatible(rows))
    chars = sorted(rows)

    def tensor(name: str, *shape: int) -> npt.NDArray[np.float32]:
        return _tensor(folder / "model_baseline" / name, shape)

    tensors: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]] = {
        "chars": np.array(chars, dtype="<i4"),
        "rows": np.array([rows[char] for char in chars], dtype="<i4"),
        "embd": tensor("word_emb", max(vocabulary.values()) + 1, _WIDTH),
    }
    for n in range(4):
        name = f"gru.{n // 2}.{'backward' if n % 2 else 'forward'}."
        n_in = 2 * _WIDTH if n >= 2 else _WIDTH
        # Paddle keeps the two gates' weights before the candidate's, each as a matrix of its own.
        flat = tensor(f"gru_{n}.w_0", 3 * _WIDTH * _WIDTH)
        gates = flat[: 2 * _WIDTH * _WIDTH].reshape(_WIDTH, 2 * _WIDTH)
        candidate = flat[2 * _WIDTH * _WIDTH :].reshape(_WIDTH, _WIDTH)
        tensors[name + "in"] = tensor(f"fc_{n}.w_0", n_in, 3 * _WIDTH).T
        tensors[name + "bias"] = tensor(f"fc_{n}.b_0", 3 * _WIDTH) + tensor(f"gru_{n}.b_0", 3 * _WIDTH)
        tensors[name + "recurrent"] = np.concatenate([gates, candidate], axis=1).T
    n_labels = len(labels)
    crf = tensor("crfw", n_labels + 2, n_labels)
    tensors["out"] = tensor("fc_4.w_0", 2 * _WIDTH, n_labels).T
    tensors["out_bias"] = tensor("fc_4.b_0", n_labels)
    tensors["start"], tensors["end"], tensors["transitions"] = crf[0], crf[1], crf[2:]
    return _gguf(labels, unknown, tensors)


def _numbered(path: Path) -> dict[int, str]:
    """Number -> word, of a file with a number and a word in each line."""
    words: dict[int, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            number, _, word = line.partition("\t")
            if word:
                words[int(number)] = word
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not a numbered list of words: {error!r}") from None
    return words


def _compatible(rows: Mapping[int, int]) -> dict[int, int]:
    """The rows of characters that count as another one: full-width forms, signs of Chinese, and traditional
    characters, of which LAC has seen few.
    """
    same = {ord(pair[0]): pair[1] for pair in words("chars_zh_same")}
    for code in range(0x80, 0x10000):
        form = unicodedata.normalize("NFKC", chr(code))
        if len(form) == 1 and ord(form) != code:
            same.setdefault(code, form)
    return {code: rows[ord(form)] for code, form in same.items() if ord(form) in rows}


def _tensor(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A tensor as Paddle saves one (``framework/lod_tensor.cc``): two versions and the number of levels, all
    0; the size of a description; that; the numbers.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    start = 20 + int.from_bytes(data[16:20], "little")
    if any(data[:16]) or len(data) != start + 4 * math.prod(shape):
        raise ModelLoadError(f"{path} is not a float32 tensor of Paddle's with {shape} numbers")
    return np.frombuffer(data, dtype="<f4", offset=start).reshape(shape)


def _gguf(
    labels: list[str], unknown: int, tensors: Mapping[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]
) -> bytes:
    pairs = (
        pair("general.architecture", "sllm-tagger"),
        pair("sllm-tagger.version", 1),
        pair("sllm-tagger.labels", labels),
        pair("sllm-tagger.unknown", unknown),
    )
    described, bodies, offset = [], [], 0
    for name, numbers in tensors.items():
        body = np.ascontiguousarray(numbers).tobytes()
        dims = numbers.shape[::-1]
        described.append(
            string(name)
            + struct.pack(
                f"<I{len(dims)}QIQ", len(dims), *dims, _TYPES[numbers.dtype.newbyteorder("<")], offset
            )
        )
        body += bytes(-len(body) % _ALIGNMENT)
        bodies.append(body)
        offset += len(body)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(described)
    return head + bytes(-len(head) % _ALIGNMENT) + b"".join(bodies)

"""Taggers of characters in NumPy, as the equations have them, and as files for the core."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from random_models import encoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["Weights", "contents", "path_score", "random_weights", "scores", "write"]

_KINDS = {"f32": 0, "q8_0": 8, "i32": 26}


@dataclass
class Weights:
    """A tagger's numbers. Matrices have a row for each output.

    Attributes:
        rows: code point -> row of the embedding.
        unknown: the row of other characters.
        layers: of each layer and direction: from the input, the bias, from the state; update, reset and
            candidate.
        crf: what labels add at the start, at the end, and (row: from, column: to) between.

    """

    labels: list[str]
    rows: dict[int, int]
    unknown: int
    embd: npt.NDArray[np.float32]
    layers: list[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]]]
    out: npt.NDArray[np.float32]
    out_bias: npt.NDArray[np.float32]
    crf: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def random_weights(
    seed: int, *, n_embd: int = 32, n_units: int = 32, n_layers: int = 2, n_labels: int = 5
) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.5) -> npt.NDArray[np.float32]:
        return rng.normal(0, scale, shape).astype(np.float32)

    chars = sorted({*range(ord("a"), ord("z") + 1), 0x4E00, 0x738B, 0x1F600})
    layers = []
    n_in = n_embd
    for _ in range(n_layers):
        layers.append(
            [(draw(3 * n_units, n_in), draw(3 * n_units), draw(3 * n_units, n_units)) for _ in range(2)]
        )
        n_in = 2 * n_units
    return Weights(
        labels=[f"label {n}" for n in range(n_labels)],
        rows={char: n for n, char in enumerate(rng.permutation(chars).tolist())},
        unknown=len(chars),
        embd=draw(len(chars) + 1, n_embd, scale=1),
        layers=layers,
        out=draw(n_labels, 2 * n_units),
        out_bias=draw(n_labels),
        crf=(draw(n_labels), draw(n_labels), draw(n_labels, n_labels)),
    )


def _scan(
    x: npt.NDArray[Any], parts: Sequence[npt.NDArray[np.float32]], *, backward: bool
) -> npt.NDArray[Any]:
    weights, bias, recurrent = (part.astype(np.float64) for part in parts)
    width = len(bias) // 3
    sums = x @ weights.T + bias
    state = np.zeros(width)
    states = np.zeros((len(x), width))
    for t in reversed(range(len(x))) if backward else range(len(x)):
        gates = 1 / (1 + np.exp(-(sums[t, : 2 * width] + recurrent[: 2 * width] @ state)))
        update, reset = gates[:width], gates[width:]
        candidate = np.tanh(sums[t, 2 * width :] + recurrent[2 * width :] @ (reset * state))
        state = (1 - update) * state + update * candidate
        states[t] = state
    return states


def scores(weights: Weights, text: str) -> npt.NDArray[np.float64]:
    """float64 (n_chars, n_labels): what each label adds to a path at each character, transitions aside."""
    rows = [weights.rows.get(ord(char), weights.unknown) for char in text]
    x: npt.NDArray[Any] = weights.embd[rows].astype(np.float64)
    for forward, backward in weights.layers:
        x = np.concatenate([_scan(x, forward, backward=False), _scan(x, backward, backward=True)], axis=1)
    result: npt.NDArray[Any] = x @ weights.out.T + weights.out_bias
    result[0] += weights.crf[0]
    result[-1] += weights.crf[1]
    return result


def path_score(weights: Weights, said: npt.NDArray[np.float64], path: Sequence[int] | None = None) -> float:
    """The score of a path, or without one of the best, by dynamic programming."""
    between = weights.crf[2].astype(np.float64)
    if path is not None:
        return float(said[range(len(path)), path].sum() + between[path[:-1], path[1:]].sum())
    best: npt.NDArray[Any] = said[0]
    for row in said[1:]:
        best = (best[:, None] + between).max(axis=0) + row
    return float(best.max())


def contents(
    weights: Weights, kind: str = "f32"
) -> tuple[dict[str, bytes], dict[str, tuple[list[int], int, bytes]]]:
    """The pairs and tensors of a file, to be changed before it is written."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    labels = struct.pack("<IIQ", 9, 8, len(weights.labels)) + b"".join(map(text, weights.labels))
    pairs = {
        "general.architecture": struct.pack("<I", 8) + text("sllm-tagger"),
        "sllm-tagger.version": struct.pack("<II", 4, 1),
        "sllm-tagger.labels": labels,
        "sllm-tagger.unknown": struct.pack("<II", 4, weights.unknown),
    }
    tensors: dict[str, tuple[list[int], int, bytes]] = {}

    def put(name: str, values: npt.NDArray[Any], kind: str = kind) -> None:
        kind = kind if values.ndim == 2 or kind == "i32" else "f32"
        data = values.astype("<i4").tobytes() if kind == "i32" else encoded(values.ravel(), kind)
        tensors[name] = (list(values.shape[::-1]), _KINDS[kind], data)

    chars = np.array(sorted(weights.rows))
    put("chars", chars, "i32")
    put("rows", np.array([weights.rows[char] for char in chars.tolist()]), "i32")
    put("embd", weights.embd)
    for n, layer in enumerate(weights.layers):
        for direction, parts in zip(("forward", "backward"), layer, strict=True):
            for part, values in zip(("in", "bias", "recurrent"), parts, strict=True):
                put(f"gru.{n}.{direction}.{part}", values)
    put("out", weights.out)
    put("out_bias", weights.out_bias)
    for part, values in zip(("start", "end", "transitions"), weights.crf, strict=True):
        put(part, values, "f32")
    return pairs, tensors


def write(
    path: Path, pairs: Mapping[str, bytes], tensors: Mapping[str, tuple[list[int], int, bytes]]
) -> Path:
    """A GGUF file of these."""

    def name(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
    for key, value in pairs.items():
        out += name(key) + value
    body = bytearray()
    for key, (dims, kind, data) in tensors.items():
        out += name(key) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        body += data + bytes(-len(data) % 32)
    out += bytes(-len(out) % 32) + body
    path.write_bytes(out)
    return path

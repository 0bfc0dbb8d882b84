"""Small models with random weights and the vocabulary of the embedded pair, cut short; their shapes are in
:mod:`model_shapes`.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from model_shapes import HEADS, HYBRID, N_EXPERT, N_VOCAB, RECURRENT, SHAPES, Shape
from oracles import GGUF

from sllm import embedded

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "EVERY",
    "HEADS",
    "HYBRID",
    "N_VOCAB",
    "RECURRENT",
    "SHAPES",
    "Shape",
    "decoded",
    "encoded",
    "make",
    "make_agreeing",
    "write",
    "write_in_parts",
]

EVERY: dict[str, Shape] = {**SHAPES, **HYBRID, **RECURRENT, **HEADS}

_KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ROUTERS = ("ffn_gate_inp",)
_SMALL = ("ssm_conv1d", "shortconv.conv", "time_mix_lerp_fused", "channel_mix_lerp_k", "ssm_norm")
"""Tensors that are float32 in every file, though they have more than one dimension."""


# ---- weights -----------------------------------------------------------------------------------------------


def encoded(values: npt.NDArray[np.float32], kind: str) -> bytes:
    """Weights in one of ggml's types; for q4_K, which has no simple inverse, bytes that make weights of about
    this size."""
    if kind == "f32":
        return values.astype("<f4").tobytes()
    if kind == "f16":
        return values.astype("<f2").tobytes()
    if kind == "bf16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if kind == "q4_K":
        rng = np.random.default_rng(values.size)
        n = values.size // 256
        scales = np.array([[4e-4, 3e-3]], dtype="<f2").repeat(n, 0).view(np.uint8)
        return np.concatenate([scales, rng.integers(0, 256, (n, 140), dtype=np.uint8)], axis=1).tobytes()
    blocks = values.reshape(-1, 32)
    if kind == "q8_0":
        scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
        codes = np.rint(blocks / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
        return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()
    assert kind == "q4_0"
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype("<f2")
    digits = (np.rint(blocks / scale.astype(np.float32)) + 8).clip(0, 15).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), digits[:, :16] | (digits[:, 16:] << 4)], axis=1).tobytes()


def decoded(data: bytes, kind: str) -> npt.NDArray[np.float32]:
    """The inverse of :func:`encoded`, flat; not of q4_K."""
    if kind in ("f32", "f16"):
        return np.frombuffer(data, dtype="<f4" if kind == "f32" else "<f2").astype(np.float32)
    if kind == "bf16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    raw = np.frombuffer(data, dtype=np.uint8).reshape(-1, 34 if kind == "q8_0" else 18)
    scale = np.ascontiguousarray(raw[:, :2]).view("<f2").astype(np.float32)
    codes = raw[:, 2:]
    if kind == "q8_0":
        return (codes.view(np.int8).astype(np.float32) * scale).ravel()
    digits = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8
    return np.asarray(digits * scale).ravel()


class _Weights:
    """The tensors of a model, drawn one after the other."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._shape = shape
        self._dims = {
            "E": shape.n_embd,
            "Q": shape.n_head * shape.head,
            "K": shape.n_head_kv * shape.head,
            "H": shape.head,
            "F": shape.n_ff,
            "M": shape.n_ff,
            "X": N_EXPERT,
            "V": N_VOCAB,
            **shape.dims,
        }
        self.tensors: dict[bytes, tuple[list[int], int, bytes]] = {}

    def _number(self, formula: str) -> int:
        """The sum of some products, with one division at most: ``2*G*S+R``, ``I/G``."""
        product, _, divisor = formula.partition("/")
        total = sum(
            math.prod(int(one) if one.isdigit() else self._dims[one] for one in term.split("*"))
            for term in product.split("+")
        )
        return total // (self._number(divisor) if divisor else 1)

    def put_all(self, tensors: str, at: str = "") -> None:
        for tensor in tensors.split():
            name, _, formulas = tensor.partition(":")
            self._put(name, at, [self._number(formula) for formula in formulas.split(",")])

    def put_embedding(self) -> None:
        self._keep(
            "token_embd.weight", [self._dims["E"], N_VOCAB], self._normal((N_VOCAB, self._dims["E"]), 0.5)
        )

    def _put(self, name: str, at: str, dims: list[int]) -> None:
        called = at + (name.removesuffix(".") if name.endswith((".", ".bias")) else f"{name}.weight")
        shape = tuple(reversed(dims))
        if name == "rope_freqs":
            self._keep(called, dims, np.linspace(1, 8, dims[0], dtype=np.float32), "f32")
        elif name == "ssm_a.":  # what a state is multiplied with is exp(this times something positive)
            self._keep(called, dims, self._rng.uniform(-1, -0.05, shape).astype(np.float32), "f32")
        elif "norm" in name and not name.endswith(".bias"):
            self._keep(called, dims, 1 + self._normal(shape, 0.2), "f32")
        elif len(dims) == 1 or name.endswith((".", ".bias")):
            self._keep(called, dims, self._normal(shape, 0.3), "f32")
        else:
            kind = "f32" if name in _SMALL else self._shape.routers if name in _ROUTERS else None
            self._keep(called, dims, self._normal(shape, 1.5 / math.sqrt(dims[0])), kind)

    def _normal(self, shape: tuple[int, ...], scale: float) -> npt.NDArray[np.float32]:
        return self._rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def _keep(
        self, name: str, dims: list[int], values: npt.NDArray[np.float32], kind: str | None = None
    ) -> None:
        kind = kind or self._shape.weights
        self.tensors[name.encode()] = (dims, _KINDS[kind], encoded(values, kind))


# ---- files -------------------------------------------------------------------------------------------------


def _typed(value: Any) -> tuple[int, Any]:
    if isinstance(value, list):
        return _ARRAY, (_typed(value[0])[0], value)
    if isinstance(value, str):
        return _STRING, value.encode()
    return (_BOOL if isinstance(value, bool) else _UINT32 if isinstance(value, int) else _FLOAT32), value


@functools.cache
def _vocabulary() -> dict[bytes, tuple[int, Any]]:
    file = GGUF(Path(embedded.DRAFT))
    file.resize_vocab(N_VOCAB)
    del file.array("tokenizer.ggml.merges")[100:]
    return {key: value for key, value in file.metadata.items() if key.startswith(b"tokenizer.")}


def _hyperparameters(shape: Shape) -> dict[str, Any]:
    n = shape.n_layer + shape.n_heads
    values = {
        "vocab_size": N_VOCAB,
        "context_length": 512,
        "embedding_length": shape.n_embd,
        "block_count": n,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head,
        "rope.freq_base": 10000.0,
        "nextn_predict_layers": shape.n_heads or None,
        **shape.values,
    }
    found = {}
    for key, value in values.items():
        # A head is a layer of the last one's kind.
        of_layers = isinstance(value, dict)
        found[key] = (
            [value[shape.letter(min(i, shape.n_layer - 1))] for i in range(n)] if of_layers else value
        )
    return {key: value for key, value in found.items() if value is not None}


def make(shape: Shape, seed: int = 0) -> GGUF:
    """The file of a model, to be changed or written."""
    file = GGUF(Path(embedded.DRAFT))  # for its writer; nothing of it stays
    weights = _Weights(shape, seed)
    weights.put_embedding()
    for i in range(shape.n_layer):
        weights.put_all(shape.tensors[shape.letter(i)], f"blk.{i}.")
    for i in range(shape.n_layer, shape.n_layer + shape.n_heads):
        weights.put_all(shape.head_tensors, f"blk.{i}.")
    weights.put_all(shape.ends)
    file.metadata = {
        b"general.architecture": _typed(shape.architecture),
        b"general.name": _typed("random"),
        b"general.alignment": _typed(32),
        **{
            (key[1:] if key.startswith(".") else f"{shape.architecture}.{key}").encode(): _typed(value)
            for key, value in _hyperparameters(shape).items()
        },
        **_vocabulary(),
    }
    file.tensors = weights.tensors
    return file


def make_agreeing(shape: Shape, seed: int = 0, quiet: float = 0.02) -> GGUF:
    """The file of a model whose head says most of the tokens that the model itself says.

    Its layers add little (``quiet``) to the residual stream, which so remains the embedding of the last
    token, and the head passes on just that: of what it is given, the embedding and not the hidden state.
    """
    file = make(shape, seed)
    outputs = (b"attn_output.weight", b"ssm_out.weight", b"ffn_down.weight", b"_exps.weight", b"shexp.weight")
    for name, (dims, kind, data) in file.tensors.items():
        if kind == _KINDS["q8_0"] and name.endswith(outputs):
            weights = decoded(data, "q8_0") * np.float32(quiet)
            file.tensors[name] = (dims, kind, encoded(weights, "q8_0"))
    width, at = shape.n_embd, f"blk.{shape.n_layer}.nextn.".encode()
    pick = np.eye(width, 2 * width, dtype=np.float32) + np.float32(1e-3)  # a block of zeros has no scale
    dims, kind, _ = file.tensors[at + b"eh_proj.weight"]
    file.tensors[at + b"eh_proj.weight"] = (dims, kind, encoded(pick.ravel(), "q8_0"))
    ones = encoded(np.ones(width, dtype=np.float32), "f32")
    file.tensors[at + b"enorm.weight"] = ([width], _KINDS["f32"], ones)
    file.tensors[at + b"shared_head_norm.weight"] = file.tensors[b"output_norm.weight"]
    return file


def write(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a model of this shape; the same seed makes the same file."""
    return make(shape, seed).write(path)


def write_in_parts(folder: Path, name: str, shape: Shape, n_parts: int, seed: int = 0) -> Path:
    """Write a model into several files, named and marked as gguf-split does it; returns the first."""
    file = make(shape, seed)
    metadata, tensors = file.metadata, list(file.tensors.items())
    size = -(-len(tensors) // n_parts)
    paths = []
    for i in range(n_parts):
        split = {
            b"split.no": (2, i),
            b"split.count": (2, n_parts),
            b"split.tensors.count": (5, len(tensors)),
        }
        file.metadata = {**(metadata if i == 0 else {}), **split}
        file.tensors = dict(tensors[i * size : (i + 1) * size])
        paths.append(file.write(folder / f"{name}-{i + 1:05d}-of-{n_parts:05d}.gguf"))
    return paths[0]

"""Small models of every shape that can be split by layers, with random weights and the vocabulary of the
embedded pair, cut short.

What tensors and hyperparameters a shape has is what llama.cpp's src/models/*.cpp asks for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from oracles import GGUF

from sllm import embedded

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["N_VOCAB", "SHAPES", "Shape", "decoded", "encoded", "make", "write", "write_in_parts"]

N_VOCAB = 304  # a multiple of 8, so that q4_0 is repacked
_N_EXPERT = 4
_KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9


@dataclass(frozen=True)
class Shape:
    """A kind of model: its architecture, how large it is, and what it has besides the usual.

    Attributes:
        values: further hyperparameters; bool, int, float, or a list of one of these.
        tied: the embedding is the output as well.
        qkv_bias, biases: biases of these three, or of everything.
        output_bias: a bias of the output.
        rope_freqs: a tensor of factors for the rotary frequencies.

    """

    architecture: str
    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 2
    n_head_kv: int = 1
    head: int = 32
    n_ff: int = 96
    values: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    qkv_bias: bool = False
    biases: bool = False
    output_bias: bool = False
    rope_freqs: bool = False
    experts: bool = False
    weights: str = "q8_0"


def _gemma3(**more: Any) -> Shape:
    values = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 8,
        "rope.freq_base_swa": 5000.0,
        **more,
    }
    return Shape("gemma3", n_layer=8, n_embd=96, n_head=2, values=values, tied=True)


_EXPERTS = {"expert_count": _N_EXPERT, "expert_used_count": 2}
_MIXED = [True, False, False, True, True, False, True, True]

SHAPES: dict[str, Shape] = {
    "llama": Shape("llama"),
    "llama, tied": Shape("llama", tied=True),
    "llama, rope_freqs": Shape("llama", rope_freqs=True, tied=True),
    "llama, biases": Shape("llama", biases=True),
    "llama, experts": Shape("llama", experts=True, values=_EXPERTS),
    "mistral3": Shape(
        "mistral3",
        values={
            "attention.temperature_scale": 0.3,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
    ),
    "llama, numbers of each layer": Shape(
        "llama", values={"feed_forward_length": [96] * 4, "attention.head_count_kv": [1] * 4}
    ),
    "qwen2": Shape("qwen2", qkv_bias=True, output_bias=True),
    "qwen2, tied": Shape("qwen2", qkv_bias=True, tied=True),
    "qwen3": Shape("qwen3", head=64, values={"attention.key_length": 64, "attention.value_length": 64}),
    "qwen3moe": Shape(
        "qwen3moe",
        experts=True,
        n_head=3,
        values={
            **_EXPERTS,
            "expert_feed_forward_length": 32,
            "attention.key_length": 32,
            "attention.value_length": 32,
        },
    ),
    "gemma3": _gemma3(),
    "gemma3, period 3": _gemma3(**{"attention.sliding_window_pattern": 3}),
    "gemma3, any pattern": _gemma3(**{"attention.sliding_window_pattern": _MIXED}),
    "gemma3, pattern of numbers": _gemma3(
        **{"attention.sliding_window_pattern": [int(one) for one in _MIXED]}
    ),
    "gemma3, no window": _gemma3(**{"attention.sliding_window": 0, "final_logit_softcapping": 20.0}),
    "granite": Shape(
        "granite",
        tied=True,
        values={
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 6.0,
            "attention.scale": 0.125,
        },
    ),
    "granite, plain": Shape("granite", values={"logit_scale": 8.0}),
    "phi3": Shape("phi3", values={"attention.sliding_window": 16}),
    "starcoder2": Shape("starcoder2", biases=True),
    "starcoder2, tied": Shape("starcoder2", biases=True, tied=True),
}


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
        self._kind = shape.weights
        self.tensors: dict[bytes, tuple[list[int], int, bytes]] = {}

    def put(self, name: str, *dims: int, kind: str | None = None, scale: float | None = None) -> None:
        width = dims[0]
        values = self._rng.standard_normal(math.prod(dims), dtype=np.float32)
        values *= np.float32(1.5 / math.sqrt(width) if scale is None else scale)
        kind = kind or self._kind
        self.tensors[name.encode()] = (list(dims), _KINDS[kind], encoded(values, kind))

    def norm(self, name: str, width: int) -> None:
        values = 1 + 0.2 * self._rng.standard_normal(width, dtype=np.float32)
        self.tensors[name.encode()] = ([width], 0, encoded(values, "f32"))

    def bias(self, name: str, width: int) -> None:
        self.put(name, width, kind="f32", scale=0.3)


def _layer(weights: _Weights, shape: Shape, at: str) -> None:
    width, q, kv = shape.n_embd, shape.n_head * shape.head, shape.n_head_kv * shape.head
    fused, normed = shape.architecture == "phi3", shape.architecture in ("qwen3", "qwen3moe", "gemma3")
    outputs = {"attn_output": width, "ffn_down": width}
    weights.norm(f"{at}.attn_norm.weight", width)
    weights.norm(f"{at}.ffn_norm.weight", width)
    if fused:
        weights.put(f"{at}.attn_qkv.weight", width, q + 2 * kv)
    else:
        outputs |= {"attn_q": q, "attn_k": kv, "attn_v": kv}
        for name in ("attn_q", "attn_k", "attn_v"):
            weights.put(f"{at}.{name}.weight", width, outputs[name])
    weights.put(f"{at}.attn_output.weight", q, width)
    if normed:
        weights.norm(f"{at}.attn_q_norm.weight", shape.head)
        weights.norm(f"{at}.attn_k_norm.weight", shape.head)
    if shape.architecture == "gemma3":
        weights.norm(f"{at}.post_attention_norm.weight", width)
        weights.norm(f"{at}.post_ffw_norm.weight", width)
    if shape.experts:
        n_ff = shape.values.get("expert_feed_forward_length", shape.n_ff)
        weights.put(f"{at}.ffn_gate_inp.weight", width, _N_EXPERT, kind="f32")
        weights.put(f"{at}.ffn_gate_exps.weight", width, n_ff, _N_EXPERT)
        weights.put(f"{at}.ffn_up_exps.weight", width, n_ff, _N_EXPERT)
        weights.put(f"{at}.ffn_down_exps.weight", n_ff, width, _N_EXPERT)
    else:
        outputs["ffn_up"] = shape.n_ff * (2 if fused else 1)
        weights.put(f"{at}.ffn_up.weight", width, outputs["ffn_up"])
        weights.put(f"{at}.ffn_down.weight", shape.n_ff, width)
        if not fused and shape.architecture != "starcoder2":
            outputs["ffn_gate"] = shape.n_ff
            weights.put(f"{at}.ffn_gate.weight", width, shape.n_ff)
    if shape.architecture == "starcoder2":
        outputs |= {"attn_norm": width, "ffn_norm": width}
    if shape.biases or shape.qkv_bias:
        names = outputs if shape.biases else ("attn_q", "attn_k", "attn_v")
        for name in names:
            weights.bias(f"{at}.{name}.bias", outputs[name])


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


def make(shape: Shape, seed: int = 0) -> GGUF:
    """The file of a model, to be changed or written."""
    file = GGUF(Path(embedded.DRAFT))  # for its writer; nothing of it stays
    weights = _Weights(shape, seed)
    weights.put("token_embd.weight", shape.n_embd, N_VOCAB, scale=0.5)
    for i in range(shape.n_layer):
        _layer(weights, shape, f"blk.{i}")
    weights.norm("output_norm.weight", shape.n_embd)
    if shape.architecture == "starcoder2":
        weights.bias("output_norm.bias", shape.n_embd)
    if not shape.tied:
        weights.put("output.weight", shape.n_embd, N_VOCAB)
    if shape.output_bias:
        weights.bias("output.bias", N_VOCAB)
    if shape.rope_freqs:
        factors = np.linspace(1, 8, shape.head // 2, dtype=np.float32)
        weights.tensors[b"rope_freqs.weight"] = ([len(factors)], 0, encoded(factors, "f32"))
    norm = "" if shape.architecture == "starcoder2" else "rms_"
    values = {
        "vocab_size": N_VOCAB,
        "context_length": 512,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        f"attention.layer_norm_{norm}epsilon": 1e-5,
        "rope.dimension_count": shape.head,
        "rope.freq_base": 10000.0,
        **shape.values,
    }
    file.metadata = {
        b"general.architecture": _typed(shape.architecture),
        b"general.name": _typed("random"),
        b"general.alignment": _typed(32),
        **{f"{shape.architecture}.{key}".encode(): _typed(value) for key, value in values.items()},
        **_vocabulary(),
    }
    file.tensors = weights.tensors
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

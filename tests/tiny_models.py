"""A writer of GGUF files, and tiny models of several architectures with random weights."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

import sllm

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float32]
    MakeContext: TypeAlias = Callable[..., sllm.Context]


class Raw(bytes):
    """A metadata value as it stands in the file: its type and its bytes."""


Meta: TypeAlias = dict[str, Any]


TinyModel: TypeAlias = "tuple[Meta, dict[str, Floats]]"


U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    match value:
        case Raw():
            return bytes(value)
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", U32, value)
        case float():
            return struct.pack("<If", F32, value)
        case str() | bytes():
            return struct.pack("<I", STRING) + gguf_string(value)
        case [str() | bytes(), *_]:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(gguf_string, value))
        case [float(), *_]:
            return struct.pack(f"<IIQ{len(value)}f", ARRAY, F32, len(value), *value)
        case _:
            return struct.pack(f"<IIQ{len(value)}i", ARRAY, I32, len(value), *value)


def gguf(meta: Meta, tensors: dict[str, Floats]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, value in meta.items():
        head += gguf_string(key) + gguf_value(value)
    data = b""
    for name, tensor in tensors.items():
        head += gguf_string(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *tensor.shape[::-1])
        head += struct.pack("<IQ", 0, len(data))  # type f32, offset
        data += tensor.astype("<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + data


PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]


N_VOCAB = len(PIECES)


N_EMBD = 32


def tokenizer() -> Meta:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [0.0] * N_VOCAB,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def random_weights(seed: int) -> Callable[..., Floats]:
    chance = np.random.default_rng(seed)
    return lambda *shape, gain=1.0: (gain * chance.standard_normal(shape) / math.sqrt(shape[-1])).astype(
        np.float32
    )


def llama(n_embd: int = N_EMBD, n_head: int = 2, n_head_kv: int = 1) -> TinyModel:
    weights = random_weights(0)
    head, n_ff = n_embd // n_head, 2 * n_embd
    meta: Meta = {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": n_embd,
        "llama.block_count": 1,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head,
        **tokenizer(),
    }
    one = np.ones(n_embd, np.float32)
    return meta, {
        "token_embd.weight": weights(N_VOCAB, n_embd, gain=4),
        "output_norm.weight": one,
        "output.weight": weights(N_VOCAB, n_embd, gain=4),
        "blk.0.attn_norm.weight": one,
        "blk.0.attn_q.weight": weights(n_embd, n_embd),
        "blk.0.attn_k.weight": weights(n_head_kv * head, n_embd),
        "blk.0.attn_v.weight": weights(n_head_kv * head, n_embd),
        "blk.0.attn_output.weight": weights(n_embd, n_embd),
        "blk.0.ffn_norm.weight": one,
        "blk.0.ffn_gate.weight": weights(n_ff, n_embd),
        "blk.0.ffn_up.weight": weights(n_ff, n_embd),
        "blk.0.ffn_down.weight": weights(n_embd, n_ff),
    }


def mamba() -> TinyModel:
    """A recurrent model, whose state is a sum over all tokens."""
    weights = random_weights(1)
    n_inner, n_state, n_conv, rank = 2 * N_EMBD, 8, 4, 4
    meta: Meta = {
        "general.architecture": "mamba",
        "mamba.context_length": 256,
        "mamba.embedding_length": N_EMBD,
        "mamba.block_count": 2,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.ssm.conv_kernel": n_conv,
        "mamba.ssm.inner_size": n_inner,
        "mamba.ssm.state_size": n_state,
        "mamba.ssm.time_step_rank": rank,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        **tokenizer(),
    }
    one = np.ones(N_EMBD, np.float32)
    tensors = {
        "token_embd.weight": weights(N_VOCAB, N_EMBD, gain=4),
        "output_norm.weight": one,
        "output.weight": weights(N_VOCAB, N_EMBD, gain=4),
    }
    for blk in ("blk.0.", "blk.1."):
        tensors |= {
            blk + "attn_norm.weight": one,
            blk + "ssm_in.weight": weights(2 * n_inner, N_EMBD, gain=2),
            blk + "ssm_conv1d.weight": weights(n_inner, n_conv),
            blk + "ssm_conv1d.bias": weights(n_inner),
            blk + "ssm_x.weight": weights(rank + 2 * n_state, n_inner, gain=2),
            blk + "ssm_dt.weight": weights(n_inner, rank),
            blk + "ssm_dt.bias": weights(n_inner),
            blk + "ssm_a": -np.exp(weights(n_inner, n_state)),
            blk + "ssm_d": np.ones(n_inner, np.float32),
            blk + "ssm_out.weight": weights(N_EMBD, n_inner, gain=2),
        }
    return meta, tensors


def gpt2(n_ctx_train: int = 16) -> TinyModel:
    """A model with learned positions: there are no more of them than it was trained for."""
    weights = random_weights(2)
    n_ff = 2 * N_EMBD
    meta: Meta = {
        "general.architecture": "gpt2",
        "gpt2.context_length": n_ctx_train,
        "gpt2.embedding_length": N_EMBD,
        "gpt2.block_count": 1,
        "gpt2.feed_forward_length": n_ff,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        **tokenizer(),
    }
    one, zero = np.ones(N_EMBD, np.float32), np.zeros(N_EMBD, np.float32)
    return meta, {
        "token_embd.weight": weights(N_VOCAB, N_EMBD, gain=4),
        "position_embd.weight": weights(n_ctx_train, N_EMBD),
        "output_norm.weight": one,
        "output_norm.bias": zero,
        "output.weight": weights(N_VOCAB, N_EMBD, gain=4),
        "blk.0.attn_norm.weight": one,
        "blk.0.attn_norm.bias": zero,
        "blk.0.attn_qkv.weight": weights(3 * N_EMBD, N_EMBD),
        "blk.0.attn_qkv.bias": np.zeros(3 * N_EMBD, np.float32),
        "blk.0.attn_output.weight": weights(N_EMBD, N_EMBD),
        "blk.0.attn_output.bias": zero,
        "blk.0.ffn_norm.weight": one,
        "blk.0.ffn_norm.bias": zero,
        "blk.0.ffn_up.weight": weights(n_ff, N_EMBD),
        "blk.0.ffn_up.bias": np.zeros(n_ff, np.float32),
        "blk.0.ffn_down.weight": weights(N_EMBD, n_ff),
        "blk.0.ffn_down.bias": zero,
    }


def bert() -> TinyModel:
    """An encoder, which has no next token."""
    weights = random_weights(3)
    n_ff, n_ctx_train = 2 * N_EMBD, 64
    meta: Meta = {
        "general.architecture": "bert",
        "bert.context_length": n_ctx_train,
        "bert.embedding_length": N_EMBD,
        "bert.block_count": 1,
        "bert.feed_forward_length": n_ff,
        "bert.attention.head_count": 2,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        **tokenizer(),
        "tokenizer.ggml.token_type_count": 2,
    }
    one, zero = np.ones(N_EMBD, np.float32), np.zeros(N_EMBD, np.float32)
    tensors = {
        "token_embd.weight": weights(N_VOCAB, N_EMBD),
        "token_types.weight": weights(2, N_EMBD),
        "position_embd.weight": weights(n_ctx_train, N_EMBD),
        "token_embd_norm.weight": one,
        "token_embd_norm.bias": zero,
        "blk.0.attn_output_norm.weight": one,
        "blk.0.attn_output_norm.bias": zero,
        "blk.0.ffn_up.weight": weights(n_ff, N_EMBD),
        "blk.0.ffn_up.bias": np.zeros(n_ff, np.float32),
        "blk.0.ffn_down.weight": weights(N_EMBD, n_ff),
        "blk.0.ffn_down.bias": zero,
        "blk.0.layer_output_norm.weight": one,
        "blk.0.layer_output_norm.bias": zero,
    }
    for name in ("q", "k", "v", "output"):
        tensors[f"blk.0.attn_{name}.weight"] = weights(N_EMBD, N_EMBD)
        tensors[f"blk.0.attn_{name}.bias"] = zero
    return meta, tensors

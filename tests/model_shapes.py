"""Shapes of small models: which tensors each has and of what dimensions, in llama.cpp's names.

What a shape has is what llama.cpp's src/models/*.cpp asks for. A tensor is ``name:dims``, dims in ggml's
order (the rows' width first), with these letters: E n_embd, Q and K the widths of queries and keys, H that of
a head, F the width of the feed-forward part, M of an expert, X the number of experts, V the vocabulary; a
shape may have letters of its own (``Shape.dims``). ``name`` is ``name.weight`` unless it ends in ``.bias``;
``name.`` is ``name`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["HEADS", "HYBRID", "N_EXPERT", "N_VOCAB", "RECURRENT", "SHAPES", "Shape"]

N_VOCAB = 304  # a multiple of 8, so that q4_0 is repacked
N_EXPERT = 4


def _joined(*tensors: str) -> str:
    return " ".join(tensors)


def _biased(tensors: str) -> str:
    """Each of these tensors, and a bias of it."""
    return " ".join(
        f"{one} {one.split(':')[0]}.bias:{one.split(',')[-1].split(':')[-1]}" for one in tensors.split()
    )


_QKV = "attn_q:E,Q attn_k:E,K attn_v:E,K"
_ATTENTION = _joined("attn_norm:E", _QKV, "attn_output:Q,E")
_QK_NORM = "attn_q_norm:H attn_k_norm:H"
_GATED = "ffn_gate:E,F ffn_up:E,F ffn_down:F,E"
_FFN = _joined("ffn_norm:E", _GATED)
_EXPERTS = "ffn_gate_inp:E,X ffn_gate_exps:E,M,X ffn_up_exps:E,M,X ffn_down_exps:M,E,X"
_SHARED = "ffn_gate_shexp:E,M ffn_up_shexp:E,M ffn_down_shexp:M,E"
_LAYER = _joined(_ATTENTION, _FFN)
_TIED = "output_norm:E"
_ENDS = "output_norm:E output:E,V"


@dataclass(frozen=True)
class Shape:
    """A kind of model: its architecture, how large it is, and what it has.

    Attributes:
        layers: a letter for each layer, repeated where there are more: which of ``tensors`` it has.
        tensors: of a layer with this letter.
        ends: what stands after the layers. The embedding is always there.
        n_layer: layers that the model runs; ``n_heads`` more predict further tokens, with ``head_tensors``.
        values: hyperparameters besides the usual, without the architecture's name: bool, int, float, str, a
            list of one of these, None for one that the file does not have, or a dict: for each layer, what
            stands there for its letter.
        dims: letters for dimensions besides the usual.
        weights: ggml's type of the matrices; ``routers``: of the small ones that choose experts.

    """

    architecture: str
    tensors: dict[str, str] = field(default_factory=lambda: {"a": _LAYER})
    ends: str = _ENDS
    layers: str = "a"
    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 2
    n_head_kv: int = 1
    head: int = 32
    n_ff: int = 96
    n_heads: int = 0
    head_tensors: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    weights: str = "q8_0"
    routers: str = "f32"

    def letter(self, layer: int) -> str:
        """The kind of a layer, a key of ``tensors``; of a head, an empty text."""
        return self.layers[layer % len(self.layers)] if layer < self.n_layer else ""


def _plain(architecture: str, *tensors: str, **more: Any) -> Shape:
    """A shape whose layers are all alike."""
    return Shape(architecture, {"a": _joined(*tensors) if tensors else _LAYER}, **more)


def _lengths(head: int = 32) -> dict[str, int]:
    return {"attention.key_length": head, "attention.value_length": head}


def _gemma3(**more: Any) -> Shape:
    values = {**_lengths(), "attention.sliding_window": 8, "rope.freq_base_swa": 5000.0, **more}
    norms = "post_attention_norm:E post_ffw_norm:E"
    return _plain("gemma3", _LAYER, _QK_NORM, norms, n_layer=8, n_embd=96, values=values, ends=_TIED)


_CHOOSING = {"expert_count": N_EXPERT, "expert_used_count": 2}
_MIXED = [True, False, False, True, True, False, True, True]
_QWEN2 = _joined("attn_norm:E", _biased(_QKV), "attn_output:Q,E", _FFN)
_STARCODER2 = _biased(_joined(_ATTENTION, "ffn_norm:E ffn_up:E,F ffn_down:F,E"))
_LAYER_NORM = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}

SHAPES: dict[str, Shape] = {
    "llama": _plain("llama"),
    "llama, tied": _plain("llama", ends=_TIED),
    "llama, rope_freqs": _plain("llama", ends="output_norm:E rope_freqs:H/2"),
    "llama, biases": _plain(
        "llama", "attn_norm:E", _biased(_QKV + " attn_output:Q,E"), "ffn_norm:E", _biased(_GATED)
    ),
    "llama, experts": _plain("llama", _ATTENTION, "ffn_norm:E", _EXPERTS, values=_CHOOSING),
    "mistral3": _plain(
        "mistral3",
        values={
            "attention.temperature_scale": 0.3,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
    ),
    "llama, numbers of each layer": _plain(
        "llama", values={"feed_forward_length": {"a": 96}, "attention.head_count_kv": {"a": 1}}
    ),
    "qwen2": _plain("qwen2", _QWEN2, ends=_joined(_ENDS, "output.bias:V")),
    "qwen2, tied": _plain("qwen2", _QWEN2, ends=_TIED),
    "qwen3": _plain("qwen3", _LAYER, _QK_NORM, head=64, values=_lengths(64)),
    "qwen3moe": _plain(
        "qwen3moe",
        _joined(_ATTENTION, _QK_NORM, "ffn_norm:E", _EXPERTS),
        n_head=3,
        values={**_CHOOSING, "expert_feed_forward_length": 32, **_lengths()},
        dims={"M": 32},
    ),
    "gemma3": _gemma3(),
    "gemma3, period 3": _gemma3(**{"attention.sliding_window_pattern": 3}),
    "gemma3, any pattern": _gemma3(**{"attention.sliding_window_pattern": _MIXED}),
    "gemma3, pattern of numbers": _gemma3(
        **{"attention.sliding_window_pattern": [int(one) for one in _MIXED]}
    ),
    "gemma3, no window": _gemma3(**{"attention.sliding_window": 0, "final_logit_softcapping": 20.0}),
    "granite": _plain(
        "granite",
        ends=_TIED,
        values={
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 6.0,
            "attention.scale": 0.125,
        },
    ),
    "granite, plain": _plain("granite", values={"logit_scale": 8.0}),
    "phi3": _plain(
        "phi3",
        "attn_norm:E attn_qkv:E,Q+2*K attn_output:Q,E ffn_norm:E ffn_up:E,2*F ffn_down:F,E",
        values={"attention.sliding_window": 16},
    ),
    "starcoder2": _plain(
        "starcoder2", _STARCODER2, ends=_biased("output_norm:E") + " output:E,V", values=_LAYER_NORM
    ),
    "starcoder2, tied": _plain("starcoder2", _STARCODER2, ends=_biased("output_norm:E"), values=_LAYER_NORM),
}
"""Those that can be split by layers."""


# ---- memories that are not attention alone -----------------------------------------------------------------


def _state(inner: int, size: int, n_heads: int, n_groups: int = 1) -> tuple[dict[str, Any], dict[str, int]]:
    """Hyperparameters of a state-space part, and its letters: C is the width of its convolution."""
    values = {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": inner,
        "ssm.state_size": size,
        "ssm.time_step_rank": n_heads,
        "ssm.group_count": n_groups,
    }
    return values, {"C": 4, "I": inner, "S": size, "R": n_heads, "G": n_groups}


_MAMBA = (
    "ssm_in:E,2*I ssm_conv1d:C,I ssm_conv1d.bias:I ssm_x:I,R+2*S ssm_dt:R,I ssm_dt.bias:I ssm_a.:S,I ssm_d.:I"
    " ssm_out:I,E"
)
_MAMBA2 = (
    "ssm_in:E,2*I+2*G*S+R ssm_conv1d:C,I+2*G*S ssm_conv1d.bias:I+2*G*S ssm_dt.bias:R ssm_a.:1,R ssm_d.:1,R"
    " ssm_norm:I/G,G ssm_out:I,E"
)
_DELTA = _joined(
    "attn_qkv:E,2*G*S+R*S attn_gate:E,R*S ssm_conv1d:C,2*G*S+R*S ssm_dt.bias:R ssm_a.:R ssm_norm:S",
    "ssm_out:R*S,E",
)
_ALPHA_BETA = "ssm_alpha:E,R ssm_beta:E,R"
_TWICE = "attn_norm:E post_attention_norm:E attn_q:E,2*Q attn_k:E,K attn_v:E,K attn_output:Q,E " + _QK_NORM
_RWKV7 = _joined(
    _biased("attn_norm:E attn_norm_2:E time_mix_ln:E"),
    "time_mix_w0:E time_mix_w1:E,W time_mix_w2:W,E time_mix_a0:E time_mix_a1:E,W time_mix_a2:W,E",
    "time_mix_v0:E time_mix_v1:E,W time_mix_v2:W,E time_mix_g1:E,W time_mix_g2:W,E",
    "time_mix_lerp_fused:E,1,1,6 time_mix_k_k:E time_mix_k_a:E time_mix_r_k:E time_mix_key:E,E",
    "time_mix_value:E,E time_mix_receptance:E,E time_mix_output:E,E",
    "channel_mix_lerp_k:E,1,1 channel_mix_key:E,F channel_mix_value:F,E",
)
_SHORT_CONVOLUTION = "attn_norm:E shortconv.conv:3,E shortconv.in_proj:E,3*E shortconv.out_proj:E,E"
_GATED_SHARED = _joined(_EXPERTS, _SHARED, "ffn_gate_inp_shexp:E")
_NEXTN = "nextn.eh_proj:2*E,E nextn.enorm:E nextn.hnorm:E nextn.shared_head_norm:E"


def _qwen35(architecture: str, ffn: str, **more: Any) -> Shape:
    """Three layers of a delta rule, then one of attention."""
    values, dims = _state(4 * 32, 32, 4, 2)
    values |= {**_lengths(), "full_attention_interval": 4, "rope.dimension_count": 16}
    values |= {"rope.dimension_sections": [4, 4, 0, 0], **more.pop("values", {})}
    recurrent = _joined("attn_norm:E post_attention_norm:E", _DELTA, more.pop("small", _ALPHA_BETA), ffn)
    tensors = {"r": recurrent, "a": _joined(_TWICE, ffn)}
    dims |= {"M": 32, **more.pop("dims", {})}
    return Shape(architecture, tensors, layers="rrra", n_layer=8, values=values, dims=dims, **more)


def _of_kinds(kinds: str) -> dict[str, dict[str, int]]:
    """Which layers have attention, said by their numbers of heads: those of the letter a."""
    return {"attention.head_count_kv": {kind: int(kind == "a") for kind in kinds}}


_MOE = {**_CHOOSING, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
_MAMBA2_64 = _state(128, 32, 4)
_LFM2 = {"shortconv.l_cache": 3, **_of_kinds("ra")}

HYBRID: dict[str, Shape] = {
    "qwen35": _qwen35("qwen35", _GATED),
    "qwen35moe": _qwen35("qwen35moe", _GATED_SHARED, values=_MOE),
    "qwen3next": _qwen35(
        "qwen3next", _GATED_SHARED, values={**_MOE, "rope.dimension_sections": None}, small="ssm_ba:E,2*R"
    ),
    "lfm2": Shape(
        "lfm2",
        {"r": _joined(_SHORT_CONVOLUTION, _FFN), "a": _joined(_LAYER, _QK_NORM)},
        layers="rra",
        n_layer=6,
        ends="token_embd_norm:E",
        values=_LFM2,
    ),
    "lfm2moe": Shape(
        "lfm2moe",
        {
            "d": _joined(_SHORT_CONVOLUTION, _FFN),
            "r": _joined(_SHORT_CONVOLUTION, "ffn_norm:E", _EXPERTS, "exp_probs_b.bias:X"),
            "a": _joined(_ATTENTION, _QK_NORM, "ffn_norm:E", _EXPERTS, "exp_probs_b.bias:X"),
        },
        layers="drarra",
        n_layer=6,
        ends="token_embd_norm:E",
        values={
            **_LFM2,
            **_of_kinds("dra"),
            **_CHOOSING,
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
        },
        dims={"M": 32},
    ),
    "nemotron_h": Shape(
        "nemotron_h",
        {"r": _joined("attn_norm:E", _MAMBA2), "a": _ATTENTION, "f": "attn_norm:E ffn_up:E,F ffn_down:F,E"},
        layers="rfraf",
        n_layer=10,
        values={
            **_state(128, 32, 4, 2)[0],
            **_lengths(),
            **_of_kinds("raf"),
            "feed_forward_length": {"r": 0, "a": 0, "f": 96},
            "attention.layer_norm_epsilon": 1e-5,
        },
        dims=_state(128, 32, 4, 2)[1],
    ),
    "granitehybrid": Shape(
        "granitehybrid",
        {"r": _joined("attn_norm:E", _MAMBA2, _FFN), "a": _LAYER},
        layers="rra",
        n_layer=6,
        values={**_MAMBA2_64[0], **_of_kinds("ra")},
        dims=_MAMBA2_64[1],
    ),
    "jamba": Shape(
        "jamba",
        {"r": _joined("attn_norm:E", _MAMBA, "ssm_dt_norm:R ssm_b_norm:S ssm_c_norm:S", _FFN), "a": _LAYER},
        layers="rra",
        n_layer=6,
        values={**_state(128, 16, 32)[0], **_of_kinds("ra")},
        dims=_state(128, 16, 32)[1],
    ),
    "falcon-h1": _plain(
        "falcon-h1",
        _MAMBA2,
        _ATTENTION,
        "ffn_norm.:E",
        _GATED,
        values={**_MAMBA2_64[0], **_lengths()},
        dims=_MAMBA2_64[1],
    ),
}
"""Layers of attention beside layers that hold one state for a sequence; in falcon-h1 each layer has both."""

_NO_ATTENTION = {"attention.head_count": 0, "attention.head_count_kv": 0}

RECURRENT: dict[str, Shape] = {
    "mamba": _plain(
        "mamba",
        "attn_norm:E",
        _MAMBA,
        values={**_state(128, 16, 32)[0], **_NO_ATTENTION},
        dims=_state(128, 16, 32)[1],
    ),
    "mamba2": _plain(
        "mamba2", "attn_norm:E", _MAMBA2, values={**_MAMBA2_64[0], **_NO_ATTENTION}, dims=_MAMBA2_64[1]
    ),
    "rwkv7": _plain(
        "rwkv7",
        _RWKV7,
        ends=_biased("token_embd_norm:E output_norm:E") + " output:E,V",
        dims={"W": 32},
        values={
            **_NO_ATTENTION,
            **_LAYER_NORM,
            "wkv.head_size": 32,
            "attention.decay_lora_rank": 32,
            "attention.iclr_lora_rank": 32,
            "attention.value_residual_mix_lora_rank": 32,
            "attention.gate_lora_rank": 32,
            "token_shift_count": 2,
        },
    ),
}
"""Layers that hold one state for a sequence and nothing else."""

HEADS: dict[str, Shape] = {
    "qwen35, head": _qwen35("qwen35", _GATED, n_heads=1, head_tensors=_joined(_TWICE, _GATED, _NEXTN)),
    "qwen35moe, head": _qwen35(
        "qwen35moe",
        _GATED_SHARED,
        values=_MOE,
        n_heads=1,
        head_tensors=_joined(_TWICE, _GATED_SHARED, _NEXTN),
    ),
    "qwen3next, head": _qwen35(
        "qwen3next",
        _GATED_SHARED,
        values={**_MOE, "rope.dimension_sections": None},
        small="ssm_ba:E,2*R",
        n_heads=1,
        head_tensors=_joined(_TWICE, _GATED_SHARED, _NEXTN),
    ),
    "glm4moe, head": Shape(
        "glm4moe",
        {
            "d": _joined(_ATTENTION, "post_attention_norm:E", _GATED),
            "a": _joined(_ATTENTION, "post_attention_norm:E", _EXPERTS, _SHARED, "exp_probs_b.bias:X"),
        },
        layers="daaa",
        n_heads=1,
        head_tensors=_joined(
            _ATTENTION, "post_attention_norm:E", _EXPERTS, _SHARED, "exp_probs_b.bias:X", _NEXTN
        ),
        values={
            **_CHOOSING,
            **_lengths(),
            "rope.dimension_count": 16,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 32,
            "leading_dense_block_count": 1,
            "expert_weights_scale": 1.0,
        },
        dims={"M": 32},
    ),
}
"""Models with a head behind their layers that predicts a further token."""

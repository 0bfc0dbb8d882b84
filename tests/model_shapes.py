"""Shapes of small models: which tensors each has and of what dimensions, in llama.cpp's names.

What a shape has is what llama.cpp's src/models/*.cpp asks for. A tensor is ``name:dims``, dims in ggml's
order (the rows' width first), with these letters: E n_embd, Q and K the widths of queries and keys, H that of
a head, F the width of the feed-forward part, M of an expert, X the number of experts, V the vocabulary; a
shape may have letters of its own (``Shape.dims``). ``name`` is ``name.weight`` unless it ends in ``.bias``;
``name.`` is ``name`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        values: hyperparameters besides the usual, without the architecture's name, which those that begin
            with a point do not have: bool, int, float, str, a
            list of one of these, None for one that the file does not have, or a dict: for each layer, what
            stands there for its letter.
        dims: letters for dimensions besides the usual.
        inner: two ways to cut it into ranges that can be run; none: any layer may be the first of one.
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
    inner: tuple[tuple[int, ...], ...] = ()
    weights: str = "q8_0"
    routers: str = "f32"

    def cuts(self) -> list[tuple[int, ...]]:
        """Two ways to split: the ends of the ranges. In the second the norm and the head are alone."""
        n = self.n_layer
        one, other = self.inner or ((1, n - 1), (n // 2,))
        return [(0, *one, n), (0, *other, n, n)]

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

_GPT = _biased("attn_norm:E attn_qkv:E,Q+2*K attn_output:Q,E ffn_norm:E ffn_up:E,F ffn_down:F,E")
_PARALLEL = _joined(_ATTENTION, _GATED)
_UP_DOWN = "ffn_norm:E ffn_up:E,F ffn_down:F,E"
_POST_NORMS = "post_attention_norm:E post_ffw_norm:E"
_NORM_AND_BIAS = _biased("output_norm:E")
_LAYER_NORM_ENDS = _joined(_NORM_AND_BIAS, "output:E,V")
_POSITIONS = "position_embd:E,512"
_ROUTED: dict[str, Any] = {**_CHOOSING, "expert_feed_forward_length": 32, "expert_shared_count": 1}
_MOE_LAYER = _joined(_ATTENTION, "ffn_norm:E", _EXPERTS, _SHARED)
_MLA = _joined(
    "attn_norm:E attn_kv_a_mqa:E,32+32 attn_kv_a_norm:32 attn_k_b:32,32,2 attn_v_b:32,32,2",
    "attn_output:2*32,E attn_q_a:E,32 attn_q_a_norm:32 attn_q_b:32,2*64 ffn_norm:E",
)
_NO_MLA = _joined(
    "attn_norm:E attn_q:E,2*64 attn_kv_a_mqa:E,32+32 attn_kv_a_norm:32 attn_kv_b:32,2*64 attn_output:2*32,E",
    "ffn_norm:E",
)
_OSS_EXPERTS = _joined(
    _EXPERTS, "ffn_gate_inp.bias:X ffn_gate_exps.bias:M,X ffn_up_exps.bias:M,X ffn_down_exps.bias:E,X"
)
_GEMMA4 = _joined(_FFN, _POST_NORMS, "layer_output_scale:1 attn_norm:E")


def _dense_first(architecture: str, *layer: str, **more: Any) -> Shape:
    """A shape whose first layer has no experts, as said by leading_dense_block_count."""
    common = _joined(*layer)
    values = {**_ROUTED, "leading_dense_block_count": 1, **more.pop("values", {})}
    experts = _joined(_EXPERTS, _SHARED, more.pop("also", ""))
    tensors = {"d": _joined(common, _GATED), "a": _joined(common, experts)}
    layers = more.pop("layers", "daaa")
    return Shape(architecture, tensors, layers=layers, values=values, dims={"M": 32}, **more)


_MORE: dict[str, Shape] = {
    "apertus": _plain(
        "apertus",
        _joined(_ATTENTION, _QK_NORM, _UP_DOWN),
        values={f".xielu.{name}": {"a": 0.5} for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    "arcee": _plain("arcee", _ATTENTION, _UP_DOWN),
    "bailingmoe": _plain("bailingmoe", _MOE_LAYER, values=_ROUTED, dims={"M": 32}),
    "bloom": _plain(
        "bloom", _GPT, ends=_joined(_biased("token_embd_norm:E"), _LAYER_NORM_ENDS), values=_LAYER_NORM
    ),
    "cohere2": _plain(
        "cohere2",
        _PARALLEL,
        n_layer=8,
        inner=((1, 6), (4,)),
        ends=_TIED,
        values={**_LAYER_NORM, "attention.sliding_window": 8, "logit_scale": 0.25},
    ),
    "command-r": _plain("command-r", _PARALLEL, ends=_TIED, values={**_LAYER_NORM, "logit_scale": 0.0625}),
    "deepseek": _dense_first("deepseek", _ATTENTION, "ffn_norm:E"),
    "deepseek2": _dense_first(
        "deepseek2",
        _MLA,
        values={
            "attention.q_lora_rank": 32,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 64,
            "attention.value_length": 32,
            "attention.key_length_mla": 64,
            "attention.value_length_mla": 32,
            "expert_gating_func": 2,
        },
    ),
    "deepseek2, lite": _dense_first(
        "deepseek2",
        _NO_MLA,
        n_layer=27,
        n_head_kv=2,
        layers="d" + 26 * "a",
        values={"attention.kv_lora_rank": 32, "attention.key_length": 64, "attention.value_length": 32},
    ),
    "dots1": _dense_first(
        "dots1", _ATTENTION, _QK_NORM, "ffn_norm:E", n_head_kv=2, values={"expert_gating_func": 2}
    ),
    "ernie4_5": _plain("ernie4_5"),
    "ernie4_5-moe": _dense_first(
        "ernie4_5-moe",
        _ATTENTION,
        "ffn_norm:E",
        values={"interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": 32},
    ),
    "exaone": _plain("exaone", ends="output_norm:E rope_freqs:H/2"),
    "exaone4": _plain("exaone4", _QKV, "attn_output:Q,E", _QK_NORM, _POST_NORMS, _GATED),
    "falcon": _plain(
        "falcon",
        _biased("attn_norm:E attn_norm_2:E"),
        "attn_qkv:E,Q+2*K attn_output:Q,E ffn_up:E,F ffn_down:F,E",
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "gemma": _plain("gemma", ends=_TIED),
    "gemma2": _plain(
        "gemma2",
        _LAYER,
        _POST_NORMS,
        n_layer=8,
        inner=((1, 6), (4,)),
        ends=_TIED,
        values={
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4": Shape(
        "gemma4",
        {
            "s": _joined(_GEMMA4, _QKV, "attn_output:Q,E", _QK_NORM),
            "a": _joined(
                _GEMMA4, "attn_q:E,2*Q attn_k:E,2*K attn_output:2*Q,E attn_q_norm:2*H attn_k_norm:2*H"
            ),
        },
        layers="ssa",
        n_layer=6,
        inner=((3,), (4,)),
        ends="output_norm:E rope_freqs:H",
        values={
            **_lengths(64),
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "rope.dimension_count": 64,
            "rope.dimension_count_swa": 32,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": {"s": True, "a": False},
            "embedding_length_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "glm4": _plain("glm4", _ATTENTION, _POST_NORMS, "ffn_norm:E ffn_up:E,2*F ffn_down:F,E"),
    "glm4, sections": _plain(
        "glm4",
        _ATTENTION,
        _POST_NORMS,
        "ffn_norm:E ffn_up:E,2*F ffn_down:F,E",
        values={"rope.dimension_sections": [4, 6, 6, 0]},
    ),
    "glm4moe": _dense_first(
        "glm4moe",
        _ATTENTION,
        "post_attention_norm:E",
        also="exp_probs_b.bias:X",
        values={"rope.dimension_count": 16, "expert_weights_scale": 1.0},
    ),
    "gpt-oss": _plain(
        "gpt-oss",
        "attn_norm:E post_attention_norm:E",
        _biased(_QKV + " attn_output:Q,E"),
        "attn_sinks:2",
        _OSS_EXPERTS,
        n_layer=8,
        inner=((1, 6), (4,)),
        values={**_CHOOSING, "expert_feed_forward_length": 32, "attention.sliding_window": 8},
        dims={"M": 32},
    ),
    "gpt2": _plain("gpt2", _GPT, ends=_joined(_POSITIONS, _NORM_AND_BIAS), values=_LAYER_NORM),
    "gptneox": _plain(
        "gptneox", _GPT, ends=_LAYER_NORM_ENDS, values={**_LAYER_NORM, "use_parallel_residual": True}
    ),
    "gptneox, in a row": _plain(
        "gptneox", _GPT, ends=_LAYER_NORM_ENDS, values={**_LAYER_NORM, "use_parallel_residual": False}
    ),
    "granitemoe": _plain(
        "granitemoe",
        _MOE_LAYER,
        values={
            **_CHOOSING,
            "expert_shared_feed_forward_length": 96,
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 6.0,
            "attention.scale": 0.125,
        },
    ),
    "hunyuan-dense": _plain("hunyuan-dense", _LAYER, _QK_NORM),
    "hunyuan-moe": _plain(
        "hunyuan-moe",
        _MOE_LAYER,
        _QK_NORM,
        values={**_CHOOSING, "expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 96},
    ),
    "internlm2": _plain("internlm2"),
    "llama4": Shape(
        "llama4",
        {"d": _LAYER, "a": _MOE_LAYER},
        layers="da",
        n_layer=8,
        values={**_CHOOSING, "expert_feed_forward_length": 32, "interleave_moe_layer_step": 2},
        dims={"M": 32},
        inner=((4,), (4,)),
    ),
    "minicpm": _plain("minicpm", ends=_TIED),
    "minicpm, said": _plain(
        "minicpm", values={"embedding_scale": 8.0, "residual_scale": 0.3, "logit_scale": 0.5}
    ),
    "mpt": _plain(
        "mpt",
        "attn_norm:E attn_qkv:E,Q+2*K attn_output:Q,E",
        _UP_DOWN,
        ends=_TIED,
        values={**_LAYER_NORM, "attention.max_alibi_bias": 8.0},
    ),
    "mpt, positions": _plain("mpt", _GPT, ends=_joined(_POSITIONS, _LAYER_NORM_ENDS), values=_LAYER_NORM),
    "nemotron": _plain(
        "nemotron",
        _biased("attn_norm:E ffn_norm:E"),
        _QKV,
        "attn_output:Q,E ffn_up:E,F ffn_down:F,E",
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "olmo": _plain(
        "olmo",
        _QKV,
        "attn_output:Q,E",
        _GATED,
        ends="output:E,V",
        values={**_LAYER_NORM, "attention.clamp_kqv": 8.0},
    ),
    "olmo2": _plain("olmo2", _QKV, "attn_output:Q,E attn_q_norm:Q attn_k_norm:K", _POST_NORMS, _GATED),
    "olmo2, window": _plain(
        "olmo2",
        _QKV,
        "attn_output:Q,E attn_q_norm:Q attn_k_norm:K",
        _POST_NORMS,
        _GATED,
        n_layer=8,
        values={"attention.sliding_window": 8},
    ),
    "olmoe": _plain(
        "olmoe",
        _ATTENTION,
        "attn_q_norm:Q attn_k_norm:K ffn_norm:E",
        _EXPERTS,
        n_head_kv=2,
        values=_CHOOSING,
    ),
    "orion": _plain(
        "orion",
        _biased("attn_norm:E ffn_norm:E"),
        _QKV,
        "attn_output:Q,E",
        _GATED,
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "phi2": _plain(
        "phi2",
        _biased(_joined(_ATTENTION, "ffn_up:E,F ffn_down:F,E")),
        ends=_joined(_LAYER_NORM_ENDS, "output.bias:V"),
        values=_LAYER_NORM,
    ),
    "plamo": _plain("plamo", _PARALLEL),
    "qwen": _plain(
        "qwen",
        "attn_norm:E attn_qkv:E,3*E attn_qkv.bias:3*E attn_output:Q,E ffn_norm:E",
        _GATED,
        n_head_kv=2,
        values={"feed_forward_length": 192},
    ),
    "qwen2moe": _plain(
        "qwen2moe",
        "attn_norm:E",
        _biased(_QKV),
        "attn_output:Q,E ffn_norm:E",
        _EXPERTS,
        _SHARED,
        "ffn_gate_inp_shexp:E",
        values={**_CHOOSING, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32},
        dims={"M": 32},
    ),
    "qwen2vl": _plain("qwen2vl", _QWEN2, values={"rope.dimension_sections": [4, 6, 6, 0]}),
    "seed_oss": _plain("seed_oss", _ATTENTION, "post_attention_norm:E", _GATED),
    "smollm3": _plain("smollm3", n_layer=8, ends=_TIED, inner=((4,), (4,))),
    "stablelm": _plain(
        "stablelm",
        _biased("attn_norm:E ffn_norm:E"),
        _QKV,
        "attn_output:Q,E",
        _GATED,
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "stablelm, in parallel": _plain(
        "stablelm",
        _biased("attn_norm:E"),
        _QKV,
        "attn_output:Q,E attn_q_norm:H,2 attn_k_norm:H,1",
        _GATED,
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "starcoder": _plain("starcoder", _GPT, ends=_joined(_POSITIONS, _LAYER_NORM_ENDS), values=_LAYER_NORM),
    "xverse": _plain("xverse"),
    "arctic": _plain(
        "arctic",
        _ATTENTION,
        "ffn_norm:E ffn_gate:E,E ffn_up:E,E ffn_down:E,E ffn_norm_exps:E",
        _EXPERTS,
        values=_CHOOSING,
    ),
    "bailingmoe2": _dense_first(
        "bailingmoe2",
        "attn_norm:E attn_qkv:E,Q+2*K attn_output:Q,E ffn_norm:E",
        _QK_NORM,
        also="exp_probs_b.bias:X",
        values={"expert_gating_func": 2},
    ),
    "chatglm": _plain(
        "chatglm", "attn_norm:E", _biased(_QKV), "attn_output:Q,E ffn_norm:E ffn_up:E,2*F ffn_down:F,E"
    ),
    "codeshell": _plain(
        "codeshell",
        _biased(_joined(_ATTENTION, "ffn_norm:E ffn_up:E,F ffn_down:F,E")),
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "dbrx": _plain(
        "dbrx",
        "attn_norm:E attn_qkv:E,Q+2*K attn_output:Q,E attn_output_norm:E",
        _EXPERTS,
        values={**_LAYER_NORM, **_CHOOSING, "attention.clamp_kqv": 8.0},
    ),
    "exaone-moe": _dense_first(
        "exaone-moe",
        _ATTENTION,
        _QK_NORM,
        "ffn_norm:E",
        layers="daaaaaaa",
        n_layer=8,
        inner=((1, 6), (4,)),
        values={"attention.sliding_window": 8, "expert_gating_func": 2},
    ),
    "hunyuan_vl": _plain("hunyuan_vl", _LAYER, _QK_NORM, values={"rope.dimension_sections": [4, 4, 4, 4]}),
    "jais2": _plain(
        "jais2",
        _biased(_joined("attn_norm:E", _QKV, "attn_output:Q,E ffn_norm:E ffn_up:E,F ffn_down:F,E")),
        ends=_LAYER_NORM_ENDS,
        values=_LAYER_NORM,
    ),
    "mimo2": Shape(
        "mimo2",
        {
            "d": _joined(_ATTENTION, _FFN),
            "s": _joined(_ATTENTION, "attn_sinks:2 ffn_norm:E", _EXPERTS, "exp_probs_b.bias:X"),
        },
        layers="dsssds",
        n_layer=6,
        inner=((2, 4), (3,)),
        values={
            **_CHOOSING,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": {"d": False, "s": True},
        },
        dims={"M": 32},
    ),
    "minimax-m2": _plain(
        "minimax-m2",
        _ATTENTION,
        "attn_q_norm:Q attn_k_norm:K ffn_norm:E",
        _EXPERTS,
        "exp_probs_b.bias:X",
        values={**_CHOOSING, "expert_feed_forward_length": 96, "expert_gating_func": 2},
    ),
    "qwen3vl": _plain(
        "qwen3vl",
        _LAYER,
        _QK_NORM,
        values={"rope.dimension_sections": [4, 6, 6, 0], "n_deepstack_layers": 2},
    ),
    "qwen3vlmoe": _plain(
        "qwen3vlmoe",
        _ATTENTION,
        _QK_NORM,
        "ffn_norm:E",
        _EXPERTS,
        values={
            **_CHOOSING,
            "expert_feed_forward_length": 32,
            "rope.dimension_sections": [4, 6, 6, 0],
            "n_deepstack_layers": 2,
        },
        dims={"M": 32},
    ),
    "refact": _plain("refact", ends=_TIED),
    "smallthinker": _plain(
        "smallthinker",
        _ATTENTION,
        "ffn_norm:E",
        _EXPERTS,
        n_layer=16,
        inner=((8,), (8,)),
        values={
            **_CHOOSING,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
            "attention.sliding_window": 4096,
        },
        dims={"M": 32},
    ),
}

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
    **_MORE,
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
_UNGATED_EXPERTS = _joined(
    "ffn_gate_inp:E,X exp_probs_b.bias:X ffn_down_exps:M,E,X ffn_up_exps:E,M,X",
    "ffn_down_shexp:M,E ffn_up_shexp:E,M",
)
_NEXTN = "nextn.eh_proj:2*E,E nextn.enorm:E nextn.hnorm:E nextn.shared_head_norm:E"


def _qwen35(architecture: str, ffn: str, **more: Any) -> Shape:
    """Three layers of a delta rule, then one of attention."""
    values, dims = _state(4 * 32, 32, 4, 2)
    values |= {**_lengths(), "full_attention_interval": 4, "rope.dimension_count": 16}
    values |= {"rope.dimension_sections": [4, 4, 0, 0], **more.pop("values", {})}
    recurrent = _joined("attn_norm:E post_attention_norm:E", _DELTA, more.pop("small", _ALPHA_BETA), ffn)
    tensors = {"r": recurrent, "a": _joined(_TWICE, ffn)}
    dims |= {"M": 32, **more.pop("dims", {})}
    return Shape(
        architecture,
        tensors,
        layers="rrra",
        n_layer=12,
        inner=((4, 9), (6,)),
        values=values,
        dims=dims,
        **more,
    )


def _of_kinds(kinds: str) -> dict[str, dict[str, int]]:
    """Which layers have attention, said by their numbers of heads: those of the letter a."""
    return {"attention.head_count_kv": {kind: int(kind == "a") for kind in kinds}}


_MOE = {**_CHOOSING, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
_MAMBA2_64 = _state(128, 32, 4)
_LFM2 = {"shortconv.l_cache": 3, **_of_kinds("ra")}

HYBRID: dict[str, Shape] = {
    "qwen35": _qwen35("qwen35", _GATED),
    "qwen35, in any order": replace(
        _qwen35("qwen35", _GATED, values={"attention.recurrent_layers": {"r": True, "a": False}}),
        layers="arrarara",
        n_layer=8,
        inner=((2, 5), (4,)),
    ),
    "qwen35moe": _qwen35("qwen35moe", _GATED_SHARED, values=_MOE),
    "qwen3next": _qwen35(
        "qwen3next", _GATED_SHARED, values={**_MOE, "rope.dimension_sections": None}, small="ssm_ba:E,2*R"
    ),
    "lfm2": Shape(
        "lfm2",
        {"r": _joined(_SHORT_CONVOLUTION, _FFN), "a": _joined(_LAYER, _QK_NORM)},
        layers="rra",
        n_layer=9,
        inner=((4, 7), (3,)),
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
        inner=((3,), (4,)),
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
        inner=((4,), (7,)),
        values={
            **_state(128, 32, 4, 2)[0],
            **_lengths(),
            **_of_kinds("raf"),
            "feed_forward_length": {"r": 0, "a": 0, "f": 96},
            "attention.layer_norm_epsilon": 1e-5,
        },
        dims=_state(128, 32, 4, 2)[1],
    ),
    "nemotron_h_moe": Shape(
        "nemotron_h_moe",
        {
            "r": _joined("attn_norm:E", _MAMBA2),
            "a": _ATTENTION,
            "f": "attn_norm:E ffn_gate_inp:E,X exp_probs_b.bias:X ffn_up_exps:E,M,X ffn_down_exps:M,E,X"
            " ffn_up_shexp:E,M ffn_down_shexp:M,E",
        },
        layers="rfraf",
        n_layer=10,
        inner=((4,), (7,)),
        values={
            **_state(128, 32, 4, 2)[0],
            **_lengths(),
            **_of_kinds("raf"),
            **_CHOOSING,
            "feed_forward_length": {"r": 0, "a": 0, "f": 32},
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "expert_gating_func": 2,
            "attention.layer_norm_epsilon": 1e-5,
        },
        dims={**_state(128, 32, 4, 2)[1], "M": 32},
    ),
    "granitehybrid": Shape(
        "granitehybrid",
        {"r": _joined("attn_norm:E", _MAMBA2, _FFN), "a": _LAYER},
        layers="rra",
        n_layer=9,
        inner=((4, 7), (3,)),
        values={**_MAMBA2_64[0], **_of_kinds("ra")},
        dims=_MAMBA2_64[1],
    ),
    "jamba": Shape(
        "jamba",
        {"r": _joined("attn_norm:E", _MAMBA, "ssm_dt_norm:R ssm_b_norm:S ssm_c_norm:S", _FFN), "a": _LAYER},
        layers="rra",
        n_layer=9,
        inner=((4, 7), (3,)),
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
            "wkv.head_size": 64,
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
    "deepseek2, head": replace(
        _MORE["deepseek2"], n_heads=1, head_tensors=_joined(_MLA, _EXPERTS, _SHARED, _NEXTN)
    ),
    "nemotron_h_moe, head": Shape(
        "nemotron_h_moe",
        {
            "r": _joined("attn_norm:E", _MAMBA2),
            "a": _ATTENTION,
            "f": _joined("attn_norm:E", _UNGATED_EXPERTS),
        },
        layers="rfra",
        n_layer=8,
        inner=((4,), (4,)),
        n_heads=1,
        head_tensors=_joined(_ATTENTION, "post_attention_norm:E", _UNGATED_EXPERTS, _NEXTN),
        values={
            **_state(128, 32, 4, 2)[0],
            **_lengths(),
            **_of_kinds("raf"),
            **_CHOOSING,
            "feed_forward_length": {"r": 0, "a": 0, "f": 96},
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "attention.layer_norm_epsilon": 1e-5,
        },
        dims={**_state(128, 32, 4, 2)[1], "M": 32},
    ),
}
"""Models with a head behind their layers that predicts a further token."""

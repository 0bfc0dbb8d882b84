"""What a range of some layers has to know of each of llama.cpp's architectures (src/models/*.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["ARCHITECTURES", "ENDS", "REFUSED", "Architecture", "End"]

Default = Callable[[int, int, int], Any]
"""A value that llama.cpp makes up where a file says nothing, from (n_layer, n_embd, n_vocab) of the model."""


@dataclass(frozen=True)
class Architecture:
    """What a range of an architecture's layers has to know.

    Attributes:
        scale: what the rows of the embedding are multiplied by: ``"sqrt"`` of n_embd, or the value
            ``"embedding_scale"`` of the file; empty: by nothing.
        input: the tensor of the graph that hidden states replace, for architectures that change, or refuse,
            embeddings that come in their place; empty: llama.cpp takes them as they are.
        output: the tensor of the graph behind each layer.
        begins: tensors that llama.cpp applies to the embedding before the first layer. The first range has
            them, and to others they do nothing.
        norm: the name of the final norm.
        head: where the output may stand: ``"either"`` as output.weight or as the embedding, ``"own"`` as the
            first alone, ``"tied"`` as the second alone.
        output_bias: there is always a bias of the output.
        end: a key of :data:`ENDS`: what runs the norm and the head alone.
        window_period: each so many layers there is one without a sliding window, where the file does not say.
        dense_first: that layer is the first of the period, not the last.
        window_optional: llama.cpp also computes without any sliding window.
        window: positions that a sliding window has where the file does not say.
        period: what the layers are is counted from the first one, and comes back after so many: a range
            begins at a multiple of it.
        period_key: as ``period``, said by the file.
        least: layers that a range has at least.
        sizes: numbers of layers by which llama.cpp knows how to compute; ``sizes_said``: a range of a model
            of such a size can be told by ``defaults``.
        always_windowed: without a sliding window, what a layer is depends on the number of layers.
        begins_windowed: the first layer of a range has a sliding window: llama.cpp takes its heads for those
            of all.
        full_rope_freqs: only layers without a sliding window ask for the factors of the frequencies.
        defaults: hyperparameters that llama.cpp derives from those of the whole where a file has none.
        recurrent: of hybrid models, what says which layers are recurrent: ``"interval"`` or ``"heads"``.
        zeros: hyperparameters that say what an input besides tokens adds to the layers: 0 in a range.
        heads: a model may have heads that predict further tokens behind its layers.

    """

    scale: str = ""
    input: str = ""
    output: str = "l_out"
    begins: tuple[str, ...] = ()
    norm: str = "output_norm"
    head: str = "either"
    output_bias: bool = False
    end: str = "llama"
    window_period: int = 0
    dense_first: bool = False
    window_optional: bool = False
    window: int = 0
    period: int = 1
    period_key: str = ""
    least: int = 1
    sizes: frozenset[int] = frozenset()
    sizes_said: bool = False
    always_windowed: bool = False
    begins_windowed: bool = False
    full_rope_freqs: bool = False
    defaults: Mapping[str, Default] = field(default_factory=lambda: MappingProxyType({}))
    recurrent: str = ""
    zeros: tuple[str, ...] = ()
    heads: bool = False


def _minicpm_defaults() -> Mapping[str, Default]:
    """As in models/minicpm.cpp, in its precision."""
    return MappingProxyType(
        {
            "embedding_scale": lambda _n_layer, _n_embd, _n_vocab: 12.0,
            "residual_scale": lambda n_layer, _n_embd, _n_vocab: float(
                np.float32(1.4) / np.sqrt(np.float32(n_layer))
            ),
            "logit_scale": lambda _n_layer, n_embd, _n_vocab: float(np.float32(256) / np.float32(n_embd)),
        }
    )


_LITE = frozenset({26, 27})
_GLM_LITE_VOCAB = 154880


def _deepseek2_defaults() -> Mapping[str, Default]:
    """As in models/deepseek2.cpp: 1 is softmax and 2 sigmoid, and lite models have no ranks of queries."""
    return MappingProxyType(
        {
            "attention.q_lora_rank": lambda _n_layer, _n_embd, _n_vocab: 0,
            "expert_gating_func": lambda n_layer, _n_embd, n_vocab: (
                2 if n_layer in (47, 48) and n_vocab == _GLM_LITE_VOCAB else 1
            ),
        }
    )


_DEEPSTACK = Architecture(zeros=("n_deepstack_layers",))
_PLAIN = Architecture()
_OWN_HEAD = Architecture(head="own")
_LAYER_NORM = Architecture(end="starcoder2")
_LEARNED_POSITIONS = Architecture(input="inpL", begins=("position_embd.weight",), end="starcoder2")

ARCHITECTURES: dict[str, Architecture] = {
    "apertus": _OWN_HEAD,
    "arcee": _PLAIN,
    "arctic": _PLAIN,
    "bailingmoe": _OWN_HEAD,
    "bailingmoe2": Architecture(head="own", heads=True),
    "bloom": Architecture(
        input="inp_norm-0", begins=("token_embd_norm.weight", "token_embd_norm.bias"), end="starcoder2"
    ),
    "chatglm": _PLAIN,
    "codeshell": Architecture(head="own", end="starcoder2"),
    "cohere2": Architecture(head="tied", end="command-r", window_period=4),
    "command-r": Architecture(head="tied", end="command-r", sizes=frozenset(range(64, 512))),
    "dbrx": Architecture(head="own", end="command-r"),
    "deepseek": _PLAIN,
    "deepseek2": Architecture(sizes=_LITE, sizes_said=True, defaults=_deepseek2_defaults(), heads=True),
    "dots1": _OWN_HEAD,
    "ernie4_5": _PLAIN,
    "ernie4_5-moe": Architecture(period_key="interleave_moe_layer_step"),
    "exaone": _PLAIN,
    "exaone-moe": Architecture(head="own", window_period=4, window=128, heads=True),
    "exaone4": Architecture(sizes=frozenset({64}), heads=True),
    "falcon": _LAYER_NORM,
    "gemma": Architecture(scale="sqrt", input="inp_scaled", head="tied"),
    "gemma2": Architecture(
        scale="sqrt",
        input="inp_scaled",
        head="tied",
        end="gemma3",
        window_period=2,
        window=4096,
        sizes=frozenset({46}),
    ),
    "gemma3": Architecture(
        scale="sqrt", end="gemma3", window_period=6, window_optional=True, sizes=frozenset({62})
    ),
    "gemma4": Architecture(
        scale="sqrt", end="gemma3", window_period=6, least=2, begins_windowed=True, full_rope_freqs=True
    ),
    "glm4": Architecture(input="embd", heads=True),
    "glm4moe": Architecture(input="embd", heads=True),
    "gpt-oss": Architecture(head="own", window_period=2),
    "gpt2": _LEARNED_POSITIONS,
    "gptneox": Architecture(head="own", end="starcoder2"),
    "granite": Architecture(scale="embedding_scale", end="granite"),
    "granitemoe": Architecture(scale="embedding_scale", end="granite"),
    "hunyuan-dense": _PLAIN,
    "hunyuan-moe": _PLAIN,
    "hunyuan_vl": _PLAIN,
    "internlm2": _OWN_HEAD,
    "jais2": _LAYER_NORM,
    "llama": _PLAIN,
    "llama4": Architecture(
        window_period=4,
        window=8192,
        always_windowed=True,
        period=4,
        period_key="interleave_moe_layer_step",
    ),
    "mimo2": Architecture(head="own", window_period=4, heads=True),
    "minicpm": Architecture(scale="embedding_scale", end="granite", defaults=_minicpm_defaults()),
    "minimax-m2": _OWN_HEAD,
    "mistral3": _PLAIN,
    "mpt": Architecture(input="inpL", begins=("position_embd.weight",), end="starcoder2"),
    "nemotron": Architecture(head="own", end="starcoder2"),
    "olmo": Architecture(norm="", end="olmo"),
    "olmo2": Architecture(head="own", window_period=4, window_optional=True),
    "olmoe": _OWN_HEAD,
    "orion": Architecture(head="own", end="starcoder2"),
    "phi2": Architecture(head="own", output_bias=True, end="phi2"),
    "phi3": _PLAIN,
    "plamo": _OWN_HEAD,
    "qwen": _OWN_HEAD,
    "qwen2": _PLAIN,
    "qwen2moe": _OWN_HEAD,
    "qwen2vl": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "qwen3vl": _DEEPSTACK,
    "qwen3vlmoe": _DEEPSTACK,
    "refact": _PLAIN,
    "seed_oss": _PLAIN,
    "smallthinker": Architecture(
        window_period=4,
        window_optional=True,
        dense_first=True,
        always_windowed=True,
        period=4,
        sizes=frozenset({4}),
    ),
    "smollm3": Architecture(period=4),
    "stablelm": Architecture(head="own", end="starcoder2"),
    "starcoder": _LEARNED_POSITIONS,
    "starcoder2": _LAYER_NORM,
    "xverse": _OWN_HEAD,
    "lfm2": Architecture(norm="token_embd_norm", recurrent="heads"),
    "lfm2moe": Architecture(norm="token_embd_norm", recurrent="heads"),
    "falcon-h1": _PLAIN,
    "granitehybrid": Architecture(scale="embedding_scale", end="granite", recurrent="heads"),
    "jamba": Architecture(recurrent="heads"),
    "mamba": _PLAIN,
    "mamba2": _PLAIN,
    "qwen3next": Architecture(recurrent="interval", heads=True),
    "nemotron_h": Architecture(output="nemotron_h_block_out", recurrent="heads", heads=True),
    "nemotron_h_moe": Architecture(output="nemotron_h_block_out", recurrent="heads", heads=True),
    "qwen35": Architecture(recurrent="interval", heads=True),
    "qwen35moe": Architecture(recurrent="interval", heads=True),
}
"""Those whose split is proved equal to the whole by tests/engine/test_layers.py."""

REFUSED = {
    "baichuan": "how its layers find positions is known by their number",
    "gemma3n": "every layer looks up embeddings of the tokens",
    "minicpm3": "its layers are scaled by their number",
    "phimoe": "its norm has a bias that no simple architecture has",
}
"""Why others cannot be split, where there is more to say than that no test proves it."""


@dataclass(frozen=True)
class End:
    """An architecture that ends in the same norm and head as others do, to run these alone behind a layer of
    zeros, which changes nothing.

    Attributes:
        tensors: of the layer: name -> dimensions, each n_embd (``"E"``), the width of all heads or of one
            (``"Q"``, ``"K"``), or a number.
        biased: each of them has a bias, too.
        square: the attention is as wide as a hidden state.
        values: hyperparameters besides the usual.
        zeros: tensors at the end that there have to be, and do nothing where the model has none.

    """

    tensors: Mapping[str, tuple[str | int, ...]]
    biased: bool = False
    square: bool = False
    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    zeros: tuple[str, ...] = ()


_FFN = 32
_ATTENTION: dict[str, tuple[str | int, ...]] = {
    "attn_norm": ("E",),
    "attn_q": ("E", "Q"),
    "attn_k": ("E", "K"),
    "attn_v": ("E", "K"),
    "attn_output": ("Q", "E"),
}
_UP_DOWN: dict[str, tuple[str | int, ...]] = {"ffn_up": ("E", _FFN), "ffn_down": (_FFN, "E")}
_GATED: dict[str, tuple[str | int, ...]] = {"ffn_gate": ("E", _FFN), **_UP_DOWN}
_NORM: dict[str, tuple[str | int, ...]] = {"ffn_norm": ("E",)}
_LLAMA = _ATTENTION | _NORM | _GATED
_GEMMA3: dict[str, tuple[str | int, ...]] = {
    "attn_q_norm": ("K",),
    "attn_k_norm": ("K",),
    "post_attention_norm": ("E",),
    "post_ffw_norm": ("E",),
}

ENDS: dict[str, End] = {
    "llama": End(_LLAMA),
    "qwen2": End(_LLAMA, square=True),
    "granite": End(_LLAMA, values=MappingProxyType({"logit_scale": 1.0})),
    "gemma3": End(_LLAMA | _GEMMA3),
    "starcoder2": End(_ATTENTION | _NORM | _UP_DOWN, biased=True, square=True, zeros=("output_norm.bias",)),
    "phi2": End(_ATTENTION | _UP_DOWN, biased=True, square=True),
    "command-r": End(_ATTENTION | _GATED, square=True),
    "olmo": End({k: v for k, v in (_ATTENTION | _GATED).items() if k != "attn_norm"}, square=True),
}
"""RMS norm (``llama``), with a bias of the output (``qwen2``), with scaled logits (``granite``), with capped
ones (``gemma3``); layer norm with a bias (``starcoder2``), with one of the output besides (``phi2``), without
one and with scaled logits (``command-r``), without weights (``olmo``)."""

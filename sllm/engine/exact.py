"""Exactly the same text: the one place that says when.

The logits under a selection are floating-point sums, and the order of a sum can depend on how many rows are
computed together: on how tokens were grouped into batches, so on what a draft proposed, on the neighbours of
a session, on whether a model runs whole or in parts. Where no sum does, the text is the same to the last bit
whatever the draft, the link and the worker's other clients do.

On the CPU that takes three things:

* **Weights** in q8_0 or q4_0: ggml computes one row of such a product as it computes eight. K-quants, f16,
  bf16 and f32 have different kernels for one row and for many (``ggml_compute_forward_mul_mat``: llamafile's
  sgemm, tiled, repacked against ``vec_dot``).
* **Attention** by ggml's flash attention over a q8_0 cache (:data:`SETTINGS`): over an f16 cache, the sum
  over positions is cut in as many pieces as there are threads (``use_split_kv_path`` in ggml-cpu/ops.cpp).
* **Kernels** that keep to that: all that are compiled by default do, each for itself; those for AMX do not.

Between two machines, or two variants of kernels, bits may differ. One text is computed by one of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sllm.engine import cpu, gguf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["SETTINGS", "obstacles"]

SETTINGS: Mapping[str, Any] = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}
"""The arguments of a context (:meth:`sllm.Model.context`, :class:`sllm.LocalTarget`, :class:`sllm.Worker`)
under which results can be exact."""

_EXACT_KINDS = (2, 8)
_KINDS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_K", 11: "q3_K"}
_KINDS |= {12: "q4_K", 13: "q5_K", 14: "q6_K", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16", 39: "mxfp4"}

# Matrices that are looked up, convolved or multiplied number by number, and not with rows of the batch.
_NO_PRODUCT = re.compile(
    r"(^|\.)(token_types|position_embd|ssm_conv1d\w*|shortconv\.conv|rope_\w+|\w+_norm|\w+_lerp_\w+)\.weight$"
)


def _product_kinds(header: gguf.Header) -> dict[int, tuple[str, int]]:
    """The types of the matrices that rows are multiplied with: an example and the number of each."""
    tied = "output.weight" not in header.tensors
    found: dict[int, tuple[str, int]] = {}
    for name, tensor in header.tensors.items():
        matrix = len([n for n in tensor.dims if n > 1]) > 1 and name.endswith(".weight")
        if not matrix or _NO_PRODUCT.search(name) or (name == "token_embd.weight" and not tied):
            continue
        example, count = found.get(tensor.kind, (name, 0))
        found[tensor.kind] = (example, count + 1)
    return found


def obstacles(path: Path, *, offloaded: bool = False) -> tuple[str, ...]:
    """Why a model's results are not exact here even with :data:`SETTINGS`, each reason as a sentence; none:
    they are.

    Args:
        path: a GGUF file, or the first of several, of which only that one is looked at.
        offloaded: whether layers of it are on a GPU.

    Raises:
        ModelLoadError: the file is damaged.
        OSError: it cannot be read.

    """
    found = []
    for kind, (example, count) in sorted(_product_kinds(gguf.read_header(path)).items()):
        if kind not in _EXACT_KINDS:
            others = f" and {count - 1} more are" if count > 1 else " is"
            found.append(f"{example}{others} {_KINDS.get(kind, f'of type {kind}')}, not q8_0 or q4_0")
    if offloaded:
        found.append("layers are on a GPU, whose kernels are others for one row than for many")
    if cpu.build().amx and "amx_int8" in cpu.features():
        found.append("the build has kernels that use AMX (SLLM_AMX=ON), and this CPU has it")
    return tuple(found)

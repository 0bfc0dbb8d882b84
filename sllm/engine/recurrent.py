"""How large the recurrent state of a model is, by what its file says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.engine import gguf
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["state_bytes"]

_RECURRENT = re.compile(r"blk\.(\d+)\.(ssm|shortconv|time_mix)_?\.?")

_NO_GROUPS = ("jamba", "mamba")  # llama.cpp does not read their ssm.group_count


def state_bytes(path: Path) -> int:
    """Bytes of the recurrent state of one sequence (``llama_hparams::n_embd_r`` and ``n_embd_s``, float32, of
    each recurrent layer); 0 for a model that has none.

    Every snapshot (``n_rollback`` of :class:`~sllm.ContextParams`) and every checkpoint takes as much again.

    Args:
        path: a GGUF file, or the first of several.

    Raises:
        ModelLoadError: the file is damaged.
        OSError: it cannot be read.

    Examples:
        >>> from sllm.engine.recurrent import state_bytes
        >>> state_bytes(sllm.embedded.TARGET)
        0

    """
    header = gguf.read_header(path)
    architecture = header.value("general.architecture")

    def value(name: str, otherwise: int = 0) -> int:
        found = header.value(f"{architecture}.{name}")
        if isinstance(found, list):
            found = max(found, default=0)
        return otherwise if found is None else int(found)

    width, wkv = value("embedding_length"), value("wkv.head_size")
    kda = value("kda.head_dim")
    kernel = value("ssm.conv_kernel")
    if wkv:
        numbers = (value("token_shift_count", 2) + wkv) * width
    elif value("shortconv.l_cache"):
        numbers = (value("shortconv.l_cache") - 1) * width
    elif kda:
        n_head = value("attention.head_count")
        numbers = (3 * (kernel - 1 if kernel else 3) * kda + kda * kda) * n_head
    else:
        inner, state = value("ssm.inner_size"), value("ssm.state_size")
        n_group = 0 if architecture in _NO_GROUPS else value("ssm.group_count")
        numbers = max(kernel - 1, 0) * (inner + 2 * n_group * state) + state * inner
    layers: set[str] = set()
    for part in gguf.parts(path):
        tensors = header.tensors if part == path else gguf.read_header(part).tensors
        layers |= {match[1] for name in tensors if (match := _RECURRENT.match(name))}
    n_bytes = 4 * numbers * len(layers)
    if not 0 <= n_bytes < 1 << 63:
        raise ModelLoadError(f"{path.name}: by its hyperparameters a recurrent state has {n_bytes} bytes")
    return n_bytes

"""A model's file as far as its layers go: its tensors, and what llama.cpp takes each layer for."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.engine import gguf
from sllm.engine._ffi import ffi, lib
from sllm.engine.architectures import ARCHITECTURES, REFUSED
from sllm.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from sllm.engine.architectures import Architecture
    from sllm.engine.hub import HubFile

__all__ = ["ModelFile"]

_F32 = 0
_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)", re.ASCII)

_REFUSED_VALUES = {
    "deepstack_mapping": "what an image adds to its layers would be lost",
    "embedding_length_per_layer_input": "every layer looks up embeddings of the tokens",
    "attention.shared_kv_layers": "some of its layers look at the memory of others",
}
"""Hyperparameters that a model's layers cannot be run apart with."""

_MAX_NUMBER = 1 << 22  # far above what real files have; a damaged one must not make us allocate


class ModelFile:
    """A model's file, or a file of some of its layers: what is in it.

    Args:
        path: the file; of a model in several files, the first. A :class:`sllm.hub.HubFile` can be exported
            from, and not run.

    Raises:
        ModelLoadError: no GGUF file, or a damaged one.
        UnsupportedModelError: its layers cannot be run apart from one another; says why.
        OSError: it cannot be read.

    Attributes:
        path: as given.
        paths: all of its files.
        architecture: the name, a key of :data:`~sllm.engine.architectures.ARCHITECTURES`.
        facts: what is known of it.
        tensors: name -> the number of the file, and where in it the tensor is.
        header: what the first file says of itself.
        n_layer: layers of the model, without heads behind them that predict further tokens.
        n_heads: those.
        n_heads_here: heads of which the weights are here: all, or none.
        layers: those that are here.
        n_embd: the width of a hidden state.
        n_ctx_train: positions that the model was trained for; 0 where the file does not say.
        n_vocab: tokens of the vocabulary; 0 where neither embedding nor output is here.
        embedding, output: name of the tensor, or None where it is not here.

    """

    def __init__(self, path: Path | HubFile) -> None:
        self.paths: list[Any] = gguf.parts(path)
        headers = [gguf.read_header(p) for p in self.paths]
        self.header = header = headers[0]
        self.tensors = {
            name: (i, tensor) for i, head in enumerate(headers) for name, tensor in head.tensors.items()
        }
        self.architecture = str(header.value("general.architecture"))
        self.path = path
        self.facts = self._supported()
        self.n_heads = self.number("nextn_predict_layers", 0)
        self.n_layer = self.number("block_count") - self.n_heads
        if self.n_layer < 1:
            raise self.damaged(f"all of its {self.n_layer + self.n_heads} layers predict further tokens")
        self.n_embd = self.number("embedding_length")
        self.n_ctx_train = self.number("context_length", 0)
        self._check_supported()
        here = {int(found[1]) for name in self.tensors if (found := _LAYER.fullmatch(name))}
        here &= set(range(self.n_layer))
        self.layers = range(min(here), max(here) + 1) if here else range(0)
        heads = range(self.n_layer, self.n_layer + self.n_heads)
        whole = all(f"blk.{i}.nextn.eh_proj.weight" in self.tensors for i in heads)
        self.n_heads_here = self.n_heads if whole else 0
        embedding, output = "token_embd.weight", "output.weight"
        part = header.value("sllm.layers.start") is not None
        ends = not part or header.value("sllm.layers.stop") == self.n_layer
        begins = not part or header.value("sllm.layers.start") == 0
        self.embedding = embedding if begins and embedding in self.tensors else None
        self.output = next((n for n in (output, embedding) if n in self.tensors), None) if ends else None
        self._check_tensors()
        known = self.embedding or self.output
        self.n_vocab = self.tensors[known][1].dims[-1] if known is not None else 0
        for name in filter(None, (self.embedding, self.output)):
            dims = self.tensors[name][1].dims
            if dims != (self.n_embd, self.n_vocab):
                raise self.damaged(f"{name} has the shape {dims}, expected ({self.n_embd}, n_vocab)")

    def damaged(self, what: str) -> ModelLoadError:
        """The error to raise where the file says what cannot be."""
        return ModelLoadError(f"{self.path} is damaged: {what}; download or export it again")

    def _check_tensors(self) -> None:
        """Raise ModelLoadError if a tensor does not end where its shape says, as in a file that was cut
        short. llama.cpp would say so only of the layers that it loads, and a part that is written not at all.

        From here on the size of a tensor is without the padding after it, which may be another in the file.
        """
        for name, (index, tensor) in list(self.tensors.items()):
            if not tensor.dims or not all(0 < dim < 1 << 31 for dim in tensor.dims):
                raise self.damaged(f"{name} has the shape {tensor.dims}")
            known = tensor.kind < 1 << 31
            row = lib.sllm_row_size(tensor.kind, tensor.dims[0]) if known else 0
            if row == 0:
                raise self.damaged(
                    f"{name} has rows of {tensor.dims[0]} numbers of ggml's type {tensor.kind}, which this"
                    " build does not know"
                )
            # llama.cpp would load integers too, and crash when it computes.
            readable = lib.sllm_dequantize(tensor.kind, ffi.NULL, 0, 0, tensor.dims[0], ffi.NULL)
            if readable != lib.SLLM_OK or (len(tensor.dims) == 1 and tensor.kind != _F32):
                raise self.damaged(f"{name} is of ggml's type {tensor.kind}, which is not for such weights")
            expected = row * math.prod(tensor.dims[1:])
            if tensor.size < expected:
                raise self.damaged(
                    f"{self.paths[index].name} has {tensor.size} bytes for {name}, expected {expected}"
                )
            self.tensors[name] = (index, replace(tensor, size=expected))

    def _supported(self) -> Architecture:
        facts = ARCHITECTURES.get(self.architecture)
        if facts is None:
            reason = REFUSED.get(self.architecture, "no test proves it equal to the whole")
            raise self._unsupported(reason)
        return facts

    def _check_supported(self) -> None:
        """Raise UnsupportedModelError for what a model of a known architecture may have, and a range not."""
        for name in ("rope.dimension_count", "rope.dimension_count_swa"):
            self.number(name, 1)  # with 0 llama.cpp never ends
        if self.n_heads and not self.facts.heads:
            raise self._unsupported("it has layers that predict further tokens")
        if {"output.scale", "output.input_scale"} & self.tensors.keys():
            raise self._unsupported("its output has a scale of its own")
        if "rope_factors_long.weight" in self.tensors:
            raise self._unsupported("its rotary factors depend on the length of the context")
        for name, reason in _REFUSED_VALUES.items():
            if self.value(name) not in (None, 0):
                raise self._unsupported(reason)
        n, facts = self.n_layer, self.facts
        known = {
            "token_embd.weight",
            "output.weight",
            "output.bias",
            "rope_freqs.weight",
            f"{facts.norm}.weight",
            f"{facts.norm}.bias",
            *facts.begins,
        }
        unknown = sorted(name for name in self.tensors.keys() - known if not _LAYER.fullmatch(name))
        if unknown:
            raise self._unsupported(f"no range would have its {unknown[0]}")
        if n in facts.sizes and not facts.sizes_said:
            raise self._unsupported(f"how a model of {n} layers computes is known by that number")
        if facts.always_windowed and not self.has_windows:
            raise self._unsupported("which of its layers rotate is known by their number")

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path}: layers of this {self.architecture} model do not run apart: {reason};"
            f" expected one of {', '.join(ARCHITECTURES)}"
        )

    def number(self, name: str, default: int | None = None) -> int:
        """A hyperparameter, of some for each layer the largest; it may be 0 where ``default`` is."""
        value = self.header.value(f"{self.architecture}.{name}")
        if isinstance(value, list):  # of a value for each layer
            value = max(value, default=0)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or not (0 if default == 0 else 1) <= value <= _MAX_NUMBER:
            raise self.damaged(
                f"{self.architecture}.{name} is {value!r}, expected {0 if default == 0 else 1}..{_MAX_NUMBER}"
            )
        return value

    def value(self, name: str) -> Any:
        """What the file says of its architecture; None: nothing."""
        return self.header.value(f"{self.architecture}.{name}")

    def real(self, name: str) -> float | None:
        """A hyperparameter that is any finite number; None where the file does not say."""
        said = self.value(name)
        if said is not None and not (isinstance(said, (int, float)) and abs(said) < 1e30):
            raise self.damaged(f"{self.architecture}.{name} is {said!r}, expected a number")
        return None if said is None else float(said)

    def derived(self, name: str) -> Any:
        """What llama.cpp takes for a hyperparameter that the file does not have, by the size of the model."""
        n_vocab = self.number("vocab_size", 0) or self.n_vocab
        return self.facts.defaults[name](self.n_layer, self.n_embd, n_vocab)

    @property
    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied with."""
        if self.facts.scale == "sqrt":
            return float(self.n_embd**0.5)
        if self.facts.scale != "embedding_scale":
            return 1.0
        said = self.real("embedding_scale")
        if not said and "embedding_scale" in self.facts.defaults:
            said = self.derived("embedding_scale")
        return float(said or 1.0)

    @property
    def has_windows(self) -> bool:
        """Whether some layers look through a sliding window."""
        facts = self.facts
        said = self.value("attention.sliding_window")
        width = facts.window if said is None else self.number("attention.sliding_window", 0)
        return bool(facts.window_period) and width > 0

    def windows(self) -> list[bool]:
        """For each layer, whether it looks through a sliding window, where llama.cpp has to be told."""
        said = self.value("attention.sliding_window_pattern")
        if isinstance(said, list):
            return [bool(item) for item in said]
        period = said if isinstance(said, int) else self.facts.window_period
        # llama.cpp's set_swa_pattern()
        full = 0 if self.facts.dense_first else period - 1
        return [period == 0 or i % period != full for i in range(self.n_layer)]

    def recurrent(self) -> list[bool]:
        """For each layer of a hybrid model, whether it is recurrent (models/qwen35.cpp, models/lfm2.cpp)."""
        return [kind == "recurrent" for kind in self.kinds()]

    def kinds(self) -> list[str]:
        """For each layer of a hybrid model: "recurrent", "attention" or "neither"."""
        n = self.n_layer
        if self.facts.recurrent == "interval":
            said = self.value("attention.recurrent_layers")
            interval = self.number("full_attention_interval", 4)
            flags = said if isinstance(said, list) else [(i + 1) % interval != 0 for i in range(n)]
            return ["recurrent" if flag else "attention" for flag in flags[:n]]
        heads, widths = self._of_each("attention.head_count_kv"), self._of_each("feed_forward_length")
        only_one = self.architecture.startswith(
            "nemotron_h"
        )  # a layer is of one kind, and a feed-forward part is one
        return [
            "attention" if n_heads else "neither" if only_one and width else "recurrent"
            for n_heads, width in zip(heads, widths, strict=True)
        ]

    def _of_each(self, name: str) -> list[int]:
        """A hyperparameter for each layer."""
        said = self.value(name)
        values = said if isinstance(said, list) else [said or 0] * self.n_layer
        if len(values) < self.n_layer:
            raise self.damaged(f"{self.architecture}.{name} has {len(values)} items")
        return values[: self.n_layer]

    def names_of(self, start: int, stop: int) -> list[tuple[str, str]]:
        """The tensors of the layers [start, stop), and what they are called where the first is number 0."""
        return [
            (name, f"blk.{int(found[1]) - start}.{found[2]}")
            for name in self.tensors
            if (found := _LAYER.fullmatch(name)) and start <= int(found[1]) < stop
        ]

    def tensor(self, name: str) -> tuple[Path, gguf.Tensor]:
        """Where a tensor is."""
        index, tensor = self.tensors[name]
        return self.paths[index], tensor

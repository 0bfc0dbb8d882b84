"""The layers [start, stop) of a model, as a GGUF file of their own: put together while it is read, or
written.

llama.cpp runs such a file like any model: its hyperparameters are those of the whole, but for the number of
layers and what is said for each layer; its layers are called 0, 1, ...; it has no vocabulary, and where the
model's output is not a part of it, a head of 32 zeros that is never computed.
"""

from __future__ import annotations

import math
import re
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.engine import gguf
from sllm.engine._ffi import ffi, lib
from sllm.errors import ModelLoadError, UnsupportedModelError
from sllm.folders import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sllm.engine.hub import HubFile

__all__ = ["ARCHITECTURES", "FilePiece", "LayerView", "LayeredFile"]

_ALIGNMENT = 32
_F32, _Q4_0, _Q1_0 = 0, 2, 41
_Q1_0_BLOCK = 128
_ZEROS = {_F32: (1, 4), _Q4_0: (32, 18), _Q1_0: (_Q1_0_BLOCK, 18)}
"""Types that tensors of zeros have: numbers and bytes of a block."""

_REPACKED = {2, 10, 12, 13, 14, 20, 39}
"""Types that ggml packs anew for some CPUs: Q4_0, Q2_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4 (repack.cpp)."""

_NO_VOCABULARY = 32  # tokens that a file without a vocabulary pretends to have
_SMALL_FFN = 32  # the width of a layer that does nothing

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)", re.ASCII)
_GLOBALS = ("output_norm.weight", "output_norm.bias", "rope_freqs.weight")
"""What every range gets: the loader asks for the norm, and the layers for the frequencies."""

_COPY_BYTES = 1 << 23

# Far above what real files have; a damaged one must not make us allocate.
_MAX_NUMBER = 1 << 22
_MAX_ZEROS = 1 << 32


@dataclass(frozen=True)
class Architecture:
    """What a range of an architecture's layers has to know.

    Attributes:
        scales_embedding: the rows of the embedding are multiplied by sqrt(n_embd).
        embedding_scale: the file says what they are multiplied by.
        window_period: each so many layers there is one without a sliding window, where the file does not say.
        fused_qkv, gate, biases, qk_norm, post_norms, experts: which tensors its layers have.

    """

    scales_embedding: bool = False
    embedding_scale: bool = False
    window_period: int = 0
    fused_qkv: bool = False
    gate: bool = True
    biases: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    experts: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral3": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(qk_norm=True),
    "qwen3moe": Architecture(qk_norm=True, experts=True),
    "gemma3": Architecture(scales_embedding=True, window_period=6, qk_norm=True, post_norms=True),
    "granite": Architecture(embedding_scale=True),
    "phi3": Architecture(fused_qkv=True, gate=False),
    "starcoder2": Architecture(gate=False, biases=True),
}
"""Those whose split is proved equal to the whole by tests/test_layers.py."""

_REFUSED = {
    "gemma": "it scales whatever enters its first layer",
    "gemma2": "it scales whatever enters its first layer",
    "gemma3n": "every layer looks up embeddings of the tokens",
    "gemma4": "every layer looks up embeddings of the tokens",
    "minicpm": "its layers are scaled by their number",
    "olmo2": "llama.cpp asks for both an embedding and an output of it",
    "internlm2": "llama.cpp asks for both an embedding and an output of it",
    "qwen2moe": "llama.cpp asks for both an embedding and an output of it",
    "qwen2vl": "its positions have several dimensions",
    "qwen3vl": "its positions have several dimensions",
    "smollm3": "which of its layers rotate is counted from the first",
    "llama4": "which of its layers rotate is counted from the first",
}


@dataclass(frozen=True)
class FilePiece:
    """``size`` bytes at ``offset`` of the file with the number ``file``, or of zeros (-1)."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class LayerView:
    """A GGUF file that exists nowhere as a whole: ``header``, and after it the bytes of ``pieces``."""

    header: bytes
    pieces: tuple[FilePiece, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file that is being put together; ``piece`` None: zeros."""

    name: str
    dims: tuple[int, ...]
    kind: int
    piece: FilePiece | None

    @property
    def size(self) -> int:
        if self.piece is not None:
            return self.piece.size
        n = 1
        for dim in self.dims:
            n *= dim
        block, size = _ZEROS[self.kind]
        return n // block * size


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _assemble(pairs: Iterable[bytes], entries: list[_Entry]) -> LayerView:
    pairs = list(pairs)
    head = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(pairs)), *pairs]
    pieces: list[FilePiece] = []

    def put(piece: FilePiece) -> None:
        if piece.size == 0:
            return
        last = pieces[-1] if pieces else None
        if (
            last is not None
            and last.file == piece.file
            and (piece.file < 0 or last.offset + last.size == piece.offset)
        ):
            pieces[-1] = FilePiece(last.file, last.offset, last.size + piece.size)
        else:
            pieces.append(piece)

    offset = 0
    for entry in entries:
        head.append(gguf.string(entry.name))
        head.append(struct.pack(f"<I{len(entry.dims)}QIQ", len(entry.dims), *entry.dims, entry.kind, offset))
        put(entry.piece or FilePiece(-1, 0, entry.size))
        put(FilePiece(-1, 0, _padded(entry.size) - entry.size))
        offset += _padded(entry.size)
    header = b"".join(head)
    return LayerView(header + bytes(_padded(len(header)) - len(header)), tuple(pieces))


class LayeredFile:
    """A model's file, or a file of some of its layers, to take layers from.

    Args:
        path: the file; of a model in several files, the first. A :class:`sllm.hub.HubFile` can be exported
            from, and not run.

    Raises:
        ModelLoadError: no GGUF file, or a damaged one.
        UnsupportedModelError: its layers cannot be run apart from one another; says why.
        OSError: it cannot be read.

    Attributes:
        paths: all of its files.
        architecture: the name, a key of :data:`ARCHITECTURES`.
        n_layer: layers of the model.
        layers: those that are here.
        n_embd: the width of a hidden state.
        n_ctx_train: positions that the model was trained for; 0 where the file does not say.
        n_vocab: tokens of the vocabulary; 0 where neither embedding nor output is here.
        embedding, output: name of the tensor, or None where it is not here.

    """

    def __init__(self, path: Path | HubFile) -> None:
        self.paths: list[Any] = gguf.parts(path)
        headers = [gguf.read_header(p) for p in self.paths]
        self._header = header = headers[0]
        self._tensors = {
            name: (i, tensor) for i, head in enumerate(headers) for name, tensor in head.tensors.items()
        }
        self.architecture = str(header.value("general.architecture"))
        self._path = path
        self._facts = self._supported()
        self.n_layer = self._number("block_count")
        self.n_embd = self._number("embedding_length")
        self.n_ctx_train = self._number("context_length", 0)
        if self._number("nextn_predict_layers", 0):
            raise self._unsupported("it has layers that predict further tokens")
        for name in ("rope.dimension_count", "rope.dimension_count_swa"):
            self._number(name, 1)  # with 0 llama.cpp never ends
        if {"output.scale", "output.input_scale"} & self._tensors.keys():
            raise self._unsupported("its output has a scale of its own")
        if "rope_factors_long.weight" in self._tensors:
            raise self._unsupported("its rotary factors depend on the length of the context")
        if self._header.value(f"{self.architecture}.deepstack_mapping") is not None:
            raise self._unsupported("what an image adds to its layers would be lost")
        if self.architecture == "gemma3" and self.n_layer == 62:
            raise self._unsupported("how a model of 62 layers scales attention is known by that number")
        here = {int(found[1]) for name in self._tensors if (found := _LAYER.fullmatch(name))}
        self.layers = range(min(here), max(here) + 1) if here else range(0)
        embedding, output = "token_embd.weight", "output.weight"
        part = header.value("sllm.layers.start") is not None
        ends = not part or header.value("sllm.layers.stop") == self.n_layer
        begins = not part or header.value("sllm.layers.start") == 0
        self.embedding = embedding if begins and embedding in self._tensors else None
        self.output = next((n for n in (output, embedding) if n in self._tensors), None) if ends else None
        self._check_tensors()
        known = self.embedding or self.output
        self.n_vocab = self._tensors[known][1].dims[-1] if known is not None else 0
        for name in filter(None, (self.embedding, self.output)):
            dims = self._tensors[name][1].dims
            if dims != (self.n_embd, self.n_vocab):
                raise self._damaged(f"{name} has the shape {dims}, expected ({self.n_embd}, n_vocab)")

    def _damaged(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path} is damaged: {what}; download or export it again")

    def _check_tensors(self) -> None:
        """Raise ModelLoadError if a tensor does not end where its shape says, as in a file that was cut
        short. llama.cpp would say so only of the layers that it loads, and a part that is written not at all.

        From here on the size of a tensor is without the padding after it, which may be another in the file.
        """
        for name, (index, tensor) in list(self._tensors.items()):
            if not tensor.dims or not all(0 < dim < 1 << 31 for dim in tensor.dims):
                raise self._damaged(f"{name} has the shape {tensor.dims}")
            known = tensor.kind < 1 << 31
            row = lib.sllm_row_size(tensor.kind, tensor.dims[0]) if known else 0
            if row == 0:
                raise self._damaged(
                    f"{name} has rows of {tensor.dims[0]} numbers of ggml's type {tensor.kind}, which this"
                    " build does not know"
                )
            # llama.cpp would load integers too, and crash when it computes.
            readable = lib.sllm_dequantize(tensor.kind, ffi.NULL, 0, 0, tensor.dims[0], ffi.NULL)
            if readable != lib.SLLM_OK or (len(tensor.dims) == 1 and tensor.kind != _F32):
                raise self._damaged(f"{name} is of ggml's type {tensor.kind}, which is not for such weights")
            expected = row * math.prod(tensor.dims[1:])
            if tensor.size < expected:
                raise self._damaged(
                    f"{self.paths[index].name} has {tensor.size} bytes for {name}, expected {expected}"
                )
            self._tensors[name] = (index, replace(tensor, size=expected))

    def _supported(self) -> Architecture:
        facts = ARCHITECTURES.get(self.architecture)
        if facts is None:
            reason = _REFUSED.get(self.architecture, "no test proves it equal to the whole")
            raise self._unsupported(reason)
        return facts

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._path}: layers of this {self.architecture} model do not run apart: {reason};"
            f" expected one of {', '.join(ARCHITECTURES)}"
        )

    def _number(self, name: str, default: int | None = None) -> int:
        value = self._header.value(f"{self.architecture}.{name}")
        if isinstance(value, list):  # of a value for each layer
            value = max(value, default=0)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or not (0 if default == 0 else 1) <= value <= _MAX_NUMBER:
            raise self._damaged(
                f"{self.architecture}.{name} is {value!r}, expected {0 if default == 0 else 1}..{_MAX_NUMBER}"
            )
        return value

    @property
    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied with."""
        if self._facts.scales_embedding:
            return float(self.n_embd**0.5)
        if not self._facts.embedding_scale:
            return 1.0
        said = self._header.value(f"{self.architecture}.embedding_scale")
        if said is not None and not (isinstance(said, (int, float)) and abs(said) < 1e30):
            raise self._damaged(f"{self.architecture}.embedding_scale is {said!r}, expected a number")
        return float(said or 1.0)

    def tensor(self, name: str) -> tuple[Path, gguf.Tensor]:
        """Where a tensor is."""
        index, tensor = self._tensors[name]
        return self.paths[index], tensor

    def check_range(self, start: int, stop: int, *, output: bool) -> None:
        """Raise ValueError if these layers are none of the model, or not in this file."""
        n = self.n_layer
        if not 0 <= start <= stop <= n or (start == stop and not (output and stop == n)):
            raise ValueError(
                f"layers [{start}, {stop}) are not a range of the {n} layers of {self._path.name}:"
                f" expected 0 <= start < stop <= {n}"
            )
        if output and stop != n:
            raise ValueError(f"the output follows layer {n - 1}, and the range ends at {stop}")
        if start < stop and (start not in self.layers or stop - 1 not in self.layers):
            here = f"layers [{self.layers.start}, {self.layers.stop})" if self.layers else "no layers"
            raise ValueError(f"{self._path.name} holds {here}, and [{start}, {stop}) were asked for")
        if output and self.output is None:
            raise ValueError(f"{self._path.name} holds no output, which is with the model's last layers")

    # ---- running a range

    def view(self, start: int, stop: int, *, output: bool) -> LayerView:
        """The layers as a file that llama.cpp can run. With ``output``, the final norm and the head too; then
        there need not be layers.

        Raises:
            ValueError: no such layers here.

        """
        self.check_range(start, stop, output=output)
        if start < stop:
            entries = [
                self._entry(name, f"blk.{int(found[1]) - start}.{found[2]}")
                for name in self._tensors
                if (found := _LAYER.fullmatch(name)) and start <= int(found[1]) < stop
            ]
        else:
            entries = self._identity()
        globals_ = [
            name for name in (*_GLOBALS, *(["output.bias"] if output else [])) if name in self._tensors
        ]
        entries += [self._entry(name, name) for name in globals_]
        if output:
            assert self.output is not None
            entries += self._output_entries()
        else:
            entries.append(_Entry("token_embd.weight", (self.n_embd, _NO_VOCABULARY), _F32, None))
        return _assemble(self._range_pairs(start, stop, output=output), entries)

    def _output_entries(self) -> list[_Entry]:
        """The head, and the embedding that llama.cpp asks for besides and never reads a row of.

        One matrix serves as both, unless ggml would keep it twice: as it is, and packed anew for the product.
        Then zeros of the smallest type stand in for the embedding.
        """
        assert self.output is not None
        dims, kind = (getattr(self._tensors[self.output][1], name) for name in ("dims", "kind"))
        if kind not in _REPACKED or dims[0] % _Q1_0_BLOCK:
            return [self._entry(self.output, "token_embd.weight")]
        return [
            self._entry(self.output, "output.weight"),
            _Entry("token_embd.weight", dims, _Q1_0, None),
        ]

    def _entry(self, name: str, called: str) -> _Entry:
        index, tensor = self._tensors[name]
        return _Entry(called, tensor.dims, tensor.kind, FilePiece(index, tensor.offset, tensor.size))

    def _range_pairs(self, start: int, stop: int, *, output: bool) -> list[bytes]:
        prefix = f"{self.architecture}."
        n = self.n_layer
        identity = start == stop
        first, last = (n - 1, n) if identity else (start, stop)
        own: dict[str, bytes] = {
            f"{prefix}block_count": gguf.pair(f"{prefix}block_count", last - first),
            f"{prefix}vocab_size": gguf.pair(
                f"{prefix}vocab_size", self.n_vocab if output else _NO_VOCABULARY
            ),
            "tokenizer.ggml.model": gguf.pair("tokenizer.ggml.model", "no_vocab"),
        }
        windows = self._windows()
        if windows is not None:
            key = f"{prefix}attention.sliding_window_pattern"
            own[key] = gguf.pair(key, windows[first:last])
        if identity:
            for name in ("feed_forward_length", "expert_feed_forward_length"):
                own[prefix + name] = gguf.pair(prefix + name, _SMALL_FFN)
            if not self._facts.experts:
                for name in ("expert_count", "expert_used_count"):
                    own[prefix + name] = gguf.pair(prefix + name, 0)
        pairs = list(own.values())
        for key in self._header.pairs:
            if key in own or key == f"{prefix}embedding_scale" or key == "general.alignment":
                continue
            if key.startswith("general."):
                pairs.append(self._header.pairs[key])
            elif key.startswith(prefix):
                pairs.append(self._of_layers(key, self._header.pairs[key], first, last))
        return pairs

    def _of_layers(self, key: str, raw: bytes, first: int, last: int) -> bytes:
        """A pair, which may be an array of one item for each layer."""
        values = self._header.value(key)
        if not isinstance(values, list) or len(values) != self.n_layer or key.endswith("dimension_sections"):
            return raw
        head = 8 + len(key.encode()) + 4 + 4 + 8
        size = (len(raw) - head) // len(values)
        return (
            raw[: head - 8]
            + (last - first).to_bytes(8, "little")
            + raw[head + first * size : head + last * size]
        )

    def _windows(self) -> list[bool] | None:
        """For each layer, whether it looks through a sliding window; None: no layer does."""
        if not self._facts.window_period or not self._number("attention.sliding_window", 0):
            return None
        said = self._header.value(f"{self.architecture}.attention.sliding_window_pattern")
        if isinstance(said, list):
            return [bool(item) for item in said]
        period = said if isinstance(said, int) else self._facts.window_period
        # llama.cpp's set_swa_pattern()
        return [period == 0 or i % period < period - 1 for i in range(self.n_layer)]

    def _identity(self) -> list[_Entry]:
        """A layer of zeros: what enters it comes out of it.

        llama.cpp loads no model without layers, so this one stands where there are none.
        """
        facts, width, ffn = self._facts, self.n_embd, _SMALL_FFN
        n_head = self._number("attention.head_count")
        n_kv = self._number("attention.head_count_kv", n_head)
        key = self._number("attention.key_length", width // n_head)
        value = self._number("attention.value_length", width // n_head)
        q, k, v = n_head * key, n_kv * key, n_kv * value
        shapes: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,)}
        if facts.fused_qkv:
            shapes["attn_qkv"] = (width, q + k + v)
        else:
            shapes |= {"attn_q": (width, q), "attn_k": (width, k), "attn_v": (width, v)}
        shapes["attn_output"] = (n_head * value, width)
        if facts.qk_norm:
            shapes |= {"attn_q_norm": (key,), "attn_k_norm": (key,)}
        if facts.post_norms:
            shapes |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
        if facts.experts:
            n_expert = self._number("expert_count")
            shapes["ffn_gate_inp"] = (width, n_expert)
            shapes["ffn_gate_exps"] = shapes["ffn_up_exps"] = (width, ffn, n_expert)
            shapes["ffn_down_exps"] = (ffn, width, n_expert)
        else:
            shapes["ffn_up"] = (width, ffn if facts.gate or facts.biases else 2 * ffn)
            shapes["ffn_down"] = (ffn, width)
            if facts.gate:
                shapes["ffn_gate"] = (width, ffn)
        entries = [
            _Entry(
                f"blk.0.{name}.weight",
                dims,
                _Q4_0 if len(dims) > 1 and dims[0] % 32 == 0 and name != "ffn_gate_inp" else _F32,
                None,
            )
            for name, dims in shapes.items()
        ]
        if facts.biases:
            entries += [
                _Entry(f"blk.0.{name}.bias", (dims[-1],), _F32, None) for name, dims in shapes.items()
            ]
        if sum(entry.size for entry in entries) > _MAX_ZEROS:
            raise self._damaged(f"its attention has {n_head} heads of {key} and {value} numbers")
        return entries

    # ---- writing a range

    def export(
        self, out: Path, start: int, stop: int, progress: Callable[[float], object] | None = None
    ) -> int:
        """Write the layers [start, stop) into a file that :class:`LayeredFile` reads; returns its size.

        With the first layer goes the embedding, with the last one the final norm and the output, and with
        either the vocabulary. A file without them cannot make text.

        Raises:
            ValueError: no such layers here.
            OSError: ``out`` cannot be written, or is the model itself; nothing is left of it then.

        """
        self.check_range(start, stop, output=start == stop)
        n = self.n_layer
        if start < stop and stop == n and self.output is None:
            raise ValueError(f"{self._path.name} holds no output, which is with the model's last layers")
        if any(isinstance(path, Path) and out.exists() and out.samefile(path) for path in self.paths):
            raise FileExistsError(f"{out} is the model itself; write the layers elsewhere")
        names = [
            name
            for name in self._tensors
            if (found := _LAYER.fullmatch(name)) and start <= int(found[1]) < stop
        ]
        names += [name for name in _GLOBALS if name in self._tensors]
        ends = {self.embedding} if start == 0 else set()
        if stop == n:
            ends |= {self.output, "output.bias"}
        names += [name for name in sorted(filter(None, ends)) if name in self._tensors]
        pairs = [
            self._header.pairs[key]
            for key in self._header.pairs
            if not key.startswith(("split.", "sllm.layers."))
            and key != "general.alignment"
            and (ends or not key.startswith("tokenizer."))
        ]
        pairs.append(gguf.pair("sllm.layers.start", start))
        pairs.append(gguf.pair("sllm.layers.stop", stop))
        pairs.append(gguf.pair(gguf.SOURCE_KEY, gguf.model_id(self._path)))
        view = _assemble(pairs, [self._entry(name, name) for name in names])
        total = len(view.header) + sum(piece.size for piece in view.pieces)
        with replacing(out) as draft, ExitStack() as stack:
            target = stack.enter_context(draft.open("xb"))
            target.write(view.header)
            done = len(view.header)
            for data in self._contents(view, stack):
                target.write(data)
                done += len(data)
                if progress is not None:
                    progress(done / total)
        return total

    def _contents(self, view: LayerView, stack: ExitStack) -> Iterator[bytes]:
        """The bytes of a view's pieces, one after the other, of files that ``stack`` closes."""
        files = [stack.enter_context(path.open("rb")) for path in self.paths]
        for piece in view.pieces:
            left = piece.size
            if piece.file >= 0:
                files[piece.file].seek(piece.offset)
            while left > 0:
                n_bytes = min(left, _COPY_BYTES)
                data = bytes(n_bytes) if piece.file < 0 else files[piece.file].read(n_bytes)
                if not data:
                    raise ModelLoadError(f"{self.paths[piece.file]} ends before its tensors do")
                left -= len(data)
                yield data

"""The layers [start, stop) of a model as a GGUF file that exists nowhere as a whole: put together while it is
read.

llama.cpp runs such a file like any model: its hyperparameters are those of the whole, but for the number of
layers and what is said for each layer; its layers are called 0, 1, ...; it has no vocabulary, and where the
model's output is not a part of it, a head of 32 zeros that is never computed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sllm.engine import gguf
from sllm.engine.architectures import ENDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sllm.engine.architectures import End
    from sllm.engine.model_file import ModelFile

__all__ = ["Entry", "FilePiece", "LayerView", "assembled", "entry_of", "range_view"]

_ALIGNMENT = 32
_F32, _Q4_0, _Q1_0 = 0, 2, 41
_Q1_0_BLOCK = 128
_ZEROS = {_F32: (1, 4), _Q4_0: (32, 18), _Q1_0: (_Q1_0_BLOCK, 18)}
"""Types that tensors of zeros have: numbers and bytes of a block."""

_REPACKED = {2, 10, 12, 13, 14, 20, 39}
"""Types that ggml packs anew for some CPUs: Q4_0, Q2_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4 (repack.cpp)."""

_NO_VOCABULARY = 32  # tokens that a file without a vocabulary pretends to have
_HEAD = 32  # the width of a head of a layer that does nothing
_MAX_ZEROS = 1 << 32  # bytes, far above what real files need; a damaged one must not make us allocate

_WITHOUT_ARCHITECTURE = ("xielu.",)  # hyperparameters whose names do not begin with that of the architecture

_END_VALUES = (
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "final_logit_softcapping",
    "logit_scale",
)
"""Hyperparameters that the norm and the head look at."""


@dataclass(frozen=True)
class FilePiece:
    """``size`` bytes at ``offset`` of the file with the number ``file``, or of zeros (-1)."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class LayerView:
    """A GGUF file that exists nowhere as a whole: ``header``, and after it the bytes of ``pieces``.

    ``input`` is the tensor of llama.cpp's graph that hidden states replace; empty: they are the embeddings of
    a batch. ``n_heads``: heads for multi-token prediction behind the layers.
    """

    header: bytes
    pieces: tuple[FilePiece, ...]
    input: str = ""
    n_heads: int = 0


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is being put together; ``piece`` None: zeros."""

    name: str
    dims: tuple[int, ...]
    kind: int
    piece: FilePiece | None

    @property
    def size(self) -> int:
        """Bytes."""
        if self.piece is not None:
            return self.piece.size
        n = 1
        for dim in self.dims:
            n *= dim
        block, size = _ZEROS[self.kind]
        return n // block * size


def entry_of(file: ModelFile, name: str, called: str) -> Entry:
    """A tensor of a file for one that is being put together."""
    index, tensor = file.tensors[name]
    return Entry(called, tensor.dims, tensor.kind, FilePiece(index, tensor.offset, tensor.size))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def assembled(pairs: Iterable[bytes], entries: list[Entry], input_name: str = "") -> LayerView:
    """The file with these key-value pairs and tensors, in this order."""
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
    return LayerView(header + bytes(_padded(len(header)) - len(header)), tuple(pieces), input_name)


def _zeros(name: str, dims: tuple[int, ...], *, of_tokens: bool = False) -> Entry:
    """A tensor of zeros, of a small type where llama.cpp allows one. With ``of_tokens``, of the smallest."""
    kind = _F32
    if len(dims) > 1 and dims[0] % _Q1_0_BLOCK == 0 and of_tokens:
        kind = _Q1_0
    elif len(dims) > 1 and dims[0] % 32 == 0:
        kind = _Q4_0
    return Entry(name, dims, kind, None)


def range_view(file: ModelFile, start: int, stop: int, *, output: bool, n_heads: int = 0) -> LayerView:
    """The layers [start, stop) of a file, which has been asked whether they can be run, and behind the last
    layer of a model its ``n_heads`` heads.
    """
    if start == stop:
        return _end_view(file)
    facts = file.facts
    entries = [entry_of(file, name, called) for name, called in file.names_of(start, stop + n_heads)]
    own = [f"{facts.norm}.weight", f"{facts.norm}.bias", "rope_freqs.weight"]
    if facts.full_rope_freqs and all(file.windows()[start:stop]):
        own.remove("rope_freqs.weight")
    if output:
        own.append("output.bias")
    entries += [entry_of(file, name, name) for name in own if name in file.tensors]
    if start > 0:
        # They have to be there, and what they do is replaced.
        positions = (file.n_embd, max(file.n_ctx_train, 1))
        entries += [
            _zeros(name, positions if name.startswith("position") else positions[:1]) for name in facts.begins
        ]
    else:
        entries += [entry_of(file, name, name) for name in facts.begins if name in file.tensors]
    if output:
        entries += _output_entries(file, facts.head)
    else:
        stand_in = (file.n_embd, _NO_VOCABULARY)
        entries.append(Entry("token_embd.weight", stand_in, _F32, None))
        if facts.head == "own":
            entries.append(Entry("output.weight", stand_in, _F32, None))
        if facts.output_bias:
            entries.append(Entry("output.bias", (_NO_VOCABULARY,), _F32, None))
    pairs = _range_pairs(file, start, stop, output=output, n_heads=n_heads)
    view = assembled(pairs, entries, "" if start == 0 and facts.begins else facts.input)
    return replace(view, n_heads=n_heads)


def _output_entries(file: ModelFile, head: str) -> list[Entry]:
    """The head, and the embedding that llama.cpp asks for besides and never reads a row of.

    One matrix serves as both, unless llama.cpp asks for both, or ggml would keep it twice: as it is, and
    packed anew for the product. Then zeros of the smallest type stand in for the embedding.
    """
    assert file.output is not None
    tensor = file.tensors[file.output][1]
    twice = head == "either" and tensor.kind in _REPACKED and tensor.dims[0] % _Q1_0_BLOCK == 0
    if head != "own" and not twice:
        return [entry_of(file, file.output, "token_embd.weight")]
    return [
        entry_of(file, file.output, "output.weight"),
        _zeros("token_embd.weight", tensor.dims, of_tokens=True),
    ]


# ---- hyperparameters ---------------------------------------------------------------------------------------


def _replaced(file: ModelFile, start: int, stop: int, *, output: bool, n_heads: int) -> dict[str, Any]:
    """What a range says otherwise than the model, without the architecture's name; None: not at all."""
    facts = file.facts
    own: dict[str, Any] = {
        "block_count": stop - start + n_heads,
        "nextn_predict_layers": n_heads or None,
        "vocab_size": file.n_vocab if output else _NO_VOCABULARY,
    }
    for name in facts.defaults:
        if not file.value(name):
            own[name] = file.derived(name)
    own |= dict.fromkeys(facts.zeros, 0)
    if facts.scale == "embedding_scale":
        own["embedding_scale"] = 0.0  # for llama.cpp: none
    if file.has_windows:
        windows = file.windows()[start : stop + n_heads]
        windows += [False] * (stop - start + n_heads - len(windows))  # set_swa_pattern(), of heads
        own["attention.sliding_window_pattern"] = windows
        if not any(windows) and facts.window_optional:  # llama.cpp would look for the layers that have one
            own["attention.sliding_window"] = 0
    if facts.recurrent == "interval":
        own["attention.recurrent_layers"] = file.recurrent()[start:stop] + [False] * n_heads
    dense = file.value("leading_dense_block_count")
    if isinstance(dense, int):
        own["leading_dense_block_count"] = max(0, min(dense, stop) - start)
    return own


def _range_pairs(file: ModelFile, start: int, stop: int, *, output: bool, n_heads: int) -> list[bytes]:
    prefix = f"{file.architecture}."
    values = _replaced(file, start, stop, output=output, n_heads=n_heads)
    replaced = {prefix + name: value for name, value in values.items()}
    pairs = [gguf.pair("tokenizer.ggml.model", "no_vocab")]
    pairs += [gguf.pair(key, value) for key, value in replaced.items() if value is not None]
    for key, raw in file.header.pairs.items():
        if key.startswith("general.") and key != "general.alignment":
            pairs.append(raw)
        elif key.startswith((prefix, *_WITHOUT_ARCHITECTURE)) and key not in replaced:
            pairs.append(_of_layers(file, key, raw, start, stop + n_heads))
    return pairs


def _of_layers(file: ModelFile, key: str, raw: bytes, start: int, stop: int) -> bytes:
    """A pair, which may be an array of one item for each layer."""
    values = file.header.value(key)
    n_all = (file.n_layer, file.n_layer + file.n_heads)
    if not isinstance(values, list) or len(values) not in n_all or key.endswith("dimension_sections"):
        return raw
    head = 8 + len(key.encode()) + 4 + 4 + 8
    size = (len(raw) - head) // len(values)
    return (
        raw[: head - 8] + (stop - start).to_bytes(8, "little") + raw[head + start * size : head + stop * size]
    )


# ---- the norm and the head alone ---------------------------------------------------------------------------


def _end_view(file: ModelFile) -> LayerView:
    """The final norm and the head, behind a layer of zeros: what enters it comes out of it.

    llama.cpp loads no model without layers, so this one stands where there are none. It is of an architecture
    that is simple, and ends as the model does.
    """
    facts, name = file.facts, file.facts.end
    if name == "llama" and "output.bias" in file.tensors:
        name = "qwen2"
    end = ENDS[name]
    entries, n_head = _zero_layer(file, end)
    for suffix in ("weight", "bias"):
        there, called = f"{facts.norm}.{suffix}", f"output_norm.{suffix}"
        if there in file.tensors:
            entries.append(entry_of(file, there, called))
        elif called in end.zeros:
            entries.append(_zeros(called, (file.n_embd,)))
    if "output.bias" in file.tensors:
        entries.append(entry_of(file, "output.bias", "output.bias"))
    # Of these, none but phi2 asks for a head of its own, and none but command-r for one that is tied.
    entries += _output_entries(file, {"phi2": "own", "command-r": "tied"}.get(name, "either"))
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": max(file.n_ctx_train, 1),
        "embedding_length": file.n_embd,
        "feed_forward_length": _HEAD,
        "attention.head_count": n_head,
        "attention.head_count_kv": 1,
        "vocab_size": file.n_vocab,
        **end.values,
    }
    if not end.square:
        values |= {"attention.key_length": _HEAD, "attention.value_length": _HEAD}
    for key in _END_VALUES:
        said = file.real(key)
        if not said and key in facts.defaults:
            said = float(file.derived(key))
        if said is not None:
            values[key] = said
    pairs = [gguf.pair("general.architecture", name), gguf.pair("tokenizer.ggml.model", "no_vocab")]
    pairs += [gguf.pair(f"{name}.{key}", value) for key, value in values.items()]
    return assembled(pairs, entries)


def _zero_layer(file: ModelFile, end: End) -> tuple[list[Entry], int]:
    """The tensors of a layer that does nothing, and its number of heads."""
    width = file.n_embd
    n_head = 1
    if end.square:
        n_head = width // _HEAD if width % _HEAD == 0 else file.number("attention.head_count")
    head = width // n_head if end.square else _HEAD
    known = {"E": width, "Q": n_head * head, "K": head}
    entries = []
    for name, dims in end.tensors.items():
        sizes = tuple(known[dim] if isinstance(dim, str) else dim for dim in dims)
        entries.append(_zeros(f"blk.0.{name}.weight", sizes))
        if end.biased:
            entries.append(Entry(f"blk.0.{name}.bias", (sizes[-1],), _F32, None))
    if sum(entry.size for entry in entries) > _MAX_ZEROS:
        raise file.damaged(f"its hidden states have {width} numbers")
    return entries, n_head

"""The models that the benchmarks run, made once and kept in a cache folder outside the repository.

``random_qwen2()`` has the shape, the types and the vocabulary of a 0.5B model and random weights: what a pass
costs depends on nothing else. ``tiny_qwen2()`` has the vocabulary and hardly a model under it.

``first_layers()`` makes a draft of a model: its first layers, and its own head behind them.

``inflated()`` has the text of the embedded target and the cost of a big model. Layers are added whose
``attn_output`` and ``ffn_down`` are zero, so that each adds exactly nothing to the residual stream, while
every one of its matrices is still read and multiplied. So acceptance is a trained pair's, the passes are
memory-bound, and no gigabytes are needed.

Run ``python -m benchmarks.models`` to make them beforehand, or with ``--remove`` to delete them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from . import smollm2

ROOT = Path(__file__).resolve().parent.parent
QWEN2_VOCAB = ROOT / "vendor/llama.cpp/source/models/ggml-vocab-qwen2.gguf"

# Part of every file name: raise it when the same call would write something else.
RECIPE = 1

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def cache_dir() -> Path:
    """``$SLLM_BENCH_CACHE``, or ``sllm/bench`` in the user's cache folder."""
    named = os.environ.get("SLLM_BENCH_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sllm" / "bench"


# --- writing ---


@contextmanager
def _writer(path: Path, arch: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file gets its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, arch)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _copy_metadata(
    reader: gguf.GGUFReader, writer: gguf.GGUFWriter, prefixes: tuple[str, ...], skip: set[str]
) -> None:
    for key, field in reader.fields.items():
        # the writer writes these itself
        if key.startswith(prefixes) and key not in skip | {"general.architecture"}:
            sub_type = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Floats:
    weights = rng.standard_normal(shape, dtype=np.float32)
    weights *= np.float32(std)
    return weights


def _quantised(weights: Floats, kind: Type) -> Bytes:
    data: Bytes = gguf.quants.quantize(weights, kind)
    return data


def _zeros(rows: int, columns: int, kind: Type) -> Bytes:
    """A zero matrix: all bytes of a block, its scale with them, are zero in every type used here."""
    return np.zeros(gguf.quant_shape_to_byte_shape((rows, columns), kind), dtype=np.uint8)


# --- random weights with a real vocabulary ---


def random_qwen2(folder: Path | None = None) -> Path:
    """Qwen2-0.5B's shape with random weights: Q4_0, and Q8_0 for the embedding and output matrix.

    That is what ``llama-quantize`` makes of this shape at Q4_0: the output matrix would be Q6_K, whose blocks
    do not fit 896 columns, and Q8_0 takes its place. The vocabulary is the real one, 151,936 tokens.
    """
    path = (folder or cache_dir()) / f"qwen2-0.5b-random-q4_0-r{RECIPE}.gguf"
    if not path.exists():
        shape = {"n_layer": 24, "n_embd": 896, "n_ff": 4864, "n_head": 14, "n_head_kv": 2}
        _write_qwen2(path, "random weights in the shape of Qwen2-0.5B", kind=Type.Q4_0, **shape)
    return path


def tiny_qwen2(folder: Path | None = None) -> Path:
    """Next to no layers under the same vocabulary, Q8_0: what it costs over a network is what crosses it."""
    path = (folder or cache_dir()) / f"qwen2-tiny-random-q8_0-r{RECIPE}.gguf"
    if not path.exists():
        shape = {"n_layer": 4, "n_embd": 128, "n_ff": 512, "n_head": 4, "n_head_kv": 2}
        _write_qwen2(path, "random weights in a tiny shape of qwen2", kind=Type.Q8_0, **shape)
    return path


def _write_qwen2(
    path: Path, name: str, *, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int, kind: Type
) -> None:
    if not QWEN2_VOCAB.exists():
        raise FileNotFoundError(f"{QWEN2_VOCAB} is missing; run: python vendor/llama.cpp/fetch.py --peers")

    n_kv = n_embd // n_head * n_head_kv
    vocab = gguf.GGUFReader(QWEN2_VOCAB)
    n_vocab = len(vocab.fields["tokenizer.ggml.tokens"].data)
    rng = np.random.default_rng(0)

    with _writer(path, "qwen2") as writer:
        _copy_metadata(vocab, writer, ("tokenizer.",), skip=set())
        writer.add_name(name)
        writer.add_file_type(
            gguf.LlamaFileType.MOSTLY_Q4_0 if kind == Type.Q4_0 else gguf.LlamaFileType.MOSTLY_Q8_0
        )
        writer.add_block_count(n_layer)
        writer.add_context_length(32768)
        writer.add_embedding_length(n_embd)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(n_head)
        writer.add_head_count_kv(n_head_kv)
        writer.add_rope_freq_base(1e6)
        writer.add_layer_norm_rms_eps(1e-6)

        # Small next to what the layers add, so that the likeliest next token is not simply the last one
        # again.
        rows = 8192
        chunks = [min(rows, n_vocab - begin) for begin in range(0, n_vocab, rows)]
        embedding = np.concatenate([_quantised(_normal(rng, (n, n_embd), 0.02), Type.Q8_0) for n in chunks])
        writer.add_tensor("token_embd.weight", embedding, raw_dtype=Type.Q8_0)
        writer.add_tensor("output_norm.weight", np.ones(n_embd, dtype=np.float32))
        for i in range(n_layer):
            for part in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{i}.{part}.weight", np.ones(n_embd, dtype=np.float32))
            for part, n_out, n_in in (
                ("attn_q", n_embd, n_embd),
                ("attn_k", n_kv, n_embd),
                ("attn_v", n_kv, n_embd),
                ("attn_output", n_embd, n_embd),
                ("ffn_gate", n_ff, n_embd),
                ("ffn_up", n_ff, n_embd),
                ("ffn_down", n_embd, n_ff),
            ):
                weights = _quantised(_normal(rng, (n_out, n_in), n_in**-0.5), kind)
                writer.add_tensor(f"blk.{i}.{part}.weight", weights, raw_dtype=kind)
            for part, n_out in (("attn_q", n_embd), ("attn_k", n_kv), ("attn_v", n_kv)):
                writer.add_tensor(f"blk.{i}.{part}.bias", _normal(rng, (n_out,), 0.02))


# --- hybrid models ---


def noisy_pair(architecture: str, folder: Path | None = None) -> tuple[Path, Path]:
    """A small model with random weights, and a draft for it: the same weights with a little noise, which says
    four of five tokens of its texts. ``"qwen35"`` has recurrent layers, and every fourth one is attention;
    ``"qwen3"`` has attention alone.

    The layers add little to the residual stream, or the noise would leave nothing in common.
    """
    noise = {"qwen3": 0.04, "qwen35": 0.035}[architecture]
    from random_models import EVERY  # of tests/, which pytest has on its path

    shape = replace(EVERY[architecture], n_embd=128, n_layer=8)
    paths = []
    for name, amount in (("target", 0.0), ("draft", noise)):
        path = (folder or cache_dir()) / f"{architecture}-small-random-{name}-{amount:g}-r{RECIPE}.gguf"
        paths.append(path)
        if not path.exists():
            _write_quiet(path, shape, amount)
    return paths[0], paths[1]


def _write_quiet(path: Path, shape: Any, noise: float) -> None:
    import random_models

    file = random_models.make(shape)
    rng = np.random.default_rng(1)
    for name, (dims, kind, data) in file.tensors.items():
        if kind != Type.Q8_0:
            continue
        weights = random_models.decoded(data, "q8_0")
        if name.endswith((b"attn_output.weight", b"ssm_out.weight", b"ffn_down.weight")):
            weights = weights * np.float32(0.1)
        weights = weights + np.float32(noise) * weights.std() * _normal(rng, weights.shape, 1)
        file.tensors[name] = (dims, kind, random_models.encoded(weights, "q8_0"))
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(path)


def agreeing_head(architecture: str, folder: Path | None = None) -> Path:
    """A model with random weights whose own head says four of five of its tokens, of a size at which a pass
    takes some milliseconds. ``"qwen35"`` has recurrent layers, ``"glm4moe"`` attention and experts.
    """
    import random_models
    from random_models import HEADS

    path = (folder or cache_dir()) / f"{architecture}-agreeing-head-q8_0-r{RECIPE}.gguf"
    if not path.exists():
        base = HEADS[f"{architecture}, head"]
        # Routers are float32 in real files, whose products depend on the number of rows on some CPUs.
        shape = replace(base, n_layer=12, n_embd=512, n_ff=1024, routers="q8_0")
        if architecture == "glm4moe":
            values = {**base.values, "expert_feed_forward_length": 256}
            shape = replace(shape, layers="d" + 11 * "a", values=values, dims={"M": 256})
        path.parent.mkdir(parents=True, exist_ok=True)
        random_models.make_agreeing(shape, quiet={"qwen35": 0.004, "glm4moe": 0.006}[architecture]).write(
            path
        )
    return path


def random_qwen35(folder: Path | None = None) -> Path:
    """Random weights with the dimensions of Qwen3.5-0.8B, Q8_0, and a vocabulary of 304 tokens."""
    import random_models
    from random_models import HYBRID

    path = (folder or cache_dir()) / f"qwen35-0.8b-random-q8_0-r{RECIPE}.gguf"
    if not path.exists():
        base = HYBRID["qwen35"]
        values = {
            "ssm.inner_size": 2048,
            "ssm.state_size": 128,
            "ssm.time_step_rank": 16,
            "ssm.group_count": 16,
            "attention.key_length": 256,
            "attention.value_length": 256,
            "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0],
        }
        shape = replace(
            base,
            n_layer=24,
            n_embd=1024,
            n_ff=3584,
            n_head=8,
            n_head_kv=2,
            head=256,
            values={**base.values, **values},
            dims={**base.dims, "I": 2048, "S": 128, "R": 16, "G": 16},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        random_models.write(path, shape)
    return path


# --- the inflated target ---

# Chosen so that a pass with two threads costs what one of a model of some billions of parameters costs a
# bigger machine.
INFLATED_LAYERS = 72
INFLATED_FF = 8192


def inflated(
    source: Path, folder: Path | None = None, *, n_added: int = INFLATED_LAYERS, n_ff: int = INFLATED_FF
) -> Path:
    """``source`` (a ``llama`` in Q8_0) with ``n_added`` identity layers in Q4_0 behind its own, and wider.

    llama.cpp's ``llama`` has one feed-forward width for all layers, so the model's own layers are padded to
    ``n_ff``: more rows in ``ffn_gate`` and ``ffn_up``, and zero columns in ``ffn_down`` that drop what these
    compute. All that the source holds is copied bit for bit, and nothing but zeros is ever added to it, so
    the text is the source's own.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    prefix = f"inflated-{n_added}x{n_ff}"
    path = (folder or cache_dir()) / f"{prefix}-{digest}-r{RECIPE}.gguf"
    if path.exists():
        return path
    for outdated in path.parent.glob(f"{prefix}-*.gguf"):  # the source was trained anew
        outdated.unlink()

    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())

    def number(key: str) -> int:
        return int(reader.fields[f"{arch}.{key}"].contents())

    n_layer, n_embd = number("block_count"), number("embedding_length")
    n_ff_source = number("feed_forward_length")
    n_kv = n_embd // number("attention.head_count") * number("attention.head_count_kv")
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    types = {tensor.tensor_type for tensor in tensors.values()}
    if arch != "llama" or not types <= {Type.Q8_0, Type.F32} or n_ff < n_ff_source:
        raise ValueError(f"{source} is no llama in Q8_0 with a feed-forward of at most {n_ff}")
    rng = np.random.default_rng(0)

    def random(n_out: int, n_in: int, kind: Type) -> Bytes:
        return _quantised(_normal(rng, (n_out, n_in), n_in**-0.5), kind)

    with _writer(path, arch) as writer:
        changed = {f"{arch}.block_count", f"{arch}.feed_forward_length"}
        _copy_metadata(reader, writer, ("general.", f"{arch}.", "tokenizer."), skip=changed)
        writer.add_block_count(n_layer + n_added)
        writer.add_feed_forward_length(n_ff)

        pad = n_ff - n_ff_source
        for name, tensor in tensors.items():
            data = tensor.data
            if name.endswith(("ffn_gate.weight", "ffn_up.weight")):
                data = np.concatenate([data, random(pad, n_embd, Type.Q8_0)])
            elif name.endswith("ffn_down.weight"):
                data = np.concatenate([data, _zeros(n_embd, pad, Type.Q8_0)], axis=1)
            writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)

        for i in range(n_layer, n_layer + n_added):
            for name in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(n_embd, dtype=np.float32))
            for name, weights in (
                ("attn_q", random(n_embd, n_embd, Type.Q4_0)),
                ("attn_k", random(n_kv, n_embd, Type.Q4_0)),
                ("attn_v", random(n_kv, n_embd, Type.Q4_0)),
                ("attn_output", _zeros(n_embd, n_embd, Type.Q4_0)),
                ("ffn_gate", random(n_ff, n_embd, Type.Q4_0)),
                ("ffn_up", random(n_ff, n_embd, Type.Q4_0)),
                ("ffn_down", _zeros(n_embd, n_ff, Type.Q4_0)),
            ):
                writer.add_tensor(f"blk.{i}.{name}.weight", weights, raw_dtype=Type.Q4_0)
    return path


# --- a draft out of the target itself ---


def first_layers(source: Path, n_layer: int, folder: Path | None = None) -> Path:
    """The first ``n_layer`` layers of a model with its own norm and head behind them, as a model: a draft
    that needs no training, and shares the vocabulary by nature ("early exit", as in LayerSkip, 2404.16710,
    but of a model that was not trained for it).
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    path = (folder or cache_dir()) / f"first-{n_layer}-layers-{digest}-r{RECIPE}.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    count = int(reader.fields[f"{arch}.block_count"].contents())
    if not 0 < n_layer < count:
        raise ValueError(f"{source} has {count} layers, so a part of it has 1 to {count - 1}, not {n_layer}")
    beyond = tuple(f"blk.{i}." for i in range(n_layer, count))
    with _writer(path, arch) as writer:
        _copy_metadata(reader, writer, ("general.", f"{arch}.", "tokenizer."), skip={f"{arch}.block_count"})
        writer.add_block_count(n_layer)
        for tensor in reader.tensors:
            if not tensor.name.startswith(beyond):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description="Make the models that the benchmarks run."
    )
    parser.add_argument(
        "--cache", type=Path, default=cache_dir(), help="the folder to keep them in (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=ROOT / "sllm/embedded/target.gguf",
        help="the model to inflate (default: the embedded target)",
    )
    parser.add_argument(
        "--layers", type=int, default=INFLATED_LAYERS, help="layers to add to it (default: %(default)s)"
    )
    parser.add_argument(
        "--n-ff", type=int, default=INFLATED_FF, help="its feed-forward width (default: %(default)s)"
    )
    parser.add_argument("--remove", action="store_true", help="delete what the cache folder holds instead")
    options = parser.parse_args(arguments)
    if options.remove:
        for path in options.cache.glob("*.gguf"):
            print(f"removing {path}")
            path.unlink()
        return 0
    target = inflated(options.target, options.cache, n_added=options.layers, n_ff=options.n_ff)
    for path in (target, random_qwen2(options.cache), tiny_qwen2(options.cache)):
        print(f"{path}  {path.stat().st_size / 1e6:.0f} MB")
    print(smollm2.find() or smollm2.MISSING)
    return 0


if __name__ == "__main__":
    sys.exit(main())

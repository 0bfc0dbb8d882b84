"""Damaged model files: mutants of the random models, each made from a number alone, and what becomes of them.

``python tests/gguf_mutants.py 0 20000`` tries so many, each in 1, 2 or 4 threads, in a process that begins
anew where a file has ended it; the numbers of those files are printed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import math
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import random_models

import sllm
from sllm.engine._ffi import lib
from sllm.engine.mtp import Heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["SHAPES", "Found", "Mutant", "mutant", "sized", "try_all"]

SHAPES = tuple(random_models.EVERY)
TYPED = (sllm.SllmError, ValueError, TypeError, MemoryError)

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10
_N_TYPES = 43  # of ggml, some of which are no longer in use
_HANG = 120.0  # seconds; a mutant takes some hundredths
_MEMORY = 12 << 30


# ---- files -------------------------------------------------------------------------------------------------


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@dataclass
class Mutant:
    """A model file taken apart.

    Attributes:
        name: the shape, and what was done to it.
        pairs: key -> type and value, as they stand in the file.
        tensors: name -> dims, ggml's type, data.
        threads: to use it with.

    """

    name: str
    pairs: dict[bytes, bytes]
    tensors: dict[bytes, tuple[list[int], int, bytes]]
    threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    damage: Callable[[bytearray, int], None] | None = None

    def bytes(self) -> bytes:
        """The file."""
        out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.pairs)))
        for key, value in self.pairs.items():
            out += _string(key) + value
        offset = 0
        for name, (dims, kind, data) in self.tensors.items():
            out += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
            offset += len(data) + -len(data) % 32
        header = len(out)
        for _, _, data in self.tensors.values():
            out += bytes(-len(out) % 32) + data
        out += bytes(-len(out) % 32)
        if self.damage is not None:
            self.damage(out, header)
        return bytes(out)


@functools.cache
def _whole(name: str) -> tuple[dict[bytes, bytes], dict[bytes, tuple[list[int], int, bytes]]]:
    file = random_models.make(random_models.EVERY[name])
    pairs = {
        key: struct.pack("<I", kind) + file.packed(kind, value)
        for key, (kind, value) in file.metadata.items()
    }
    return pairs, file.tensors


# ---- damage ------------------------------------------------------------------------------------------------

_WORDS = (0, 1, 2, 3, 7, 16, 31, 33, 64, 100, 255, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, math.inf, -math.inf, math.nan)
_HALVES = (b"\x00\x00", b"\xff\xff", b"\x00\x7c", b"\x00\xfc", b"\x00\x7e", b"\xff\x7b", b"\xff\xfb")


def _value(chance: random.Random) -> bytes:
    """A type and a value of a pair."""
    kind = chance.choice([_UINT32, _UINT32, _UINT32, _FLOAT32, _FLOAT32, _INT32, _BOOL, _STRING, _ARRAY, 64])
    if kind == _UINT32:
        return struct.pack("<II", kind, chance.choice(_WORDS))
    if kind == _FLOAT32:
        return struct.pack("<If", kind, chance.choice(_REALS))
    if kind == _INT32:
        return struct.pack("<Ii", kind, chance.choice([-1, -(1 << 31), 5]))
    if kind == _BOOL:
        return struct.pack("<IB", kind, chance.choice([0, 1, 2]))
    if kind == _STRING:
        return struct.pack("<I", kind) + _string(
            chance.choice([b"", b"linear", b"yarn", b"\xff\0", b"x" * 300])
        )
    n = chance.choice([0, 1, 2, 4, 5, 64, 512])
    items = [chance.choice(_WORDS) for _ in range(n)]
    return struct.pack(f"<IIQ{n}I", _ARRAY, _UINT32, n, *items) + (b"\xff" if kind == 64 else b"")


def sized(dims: Sequence[int], kind: int, data: bytes) -> bytes:
    """``data`` as long as a tensor of this type has to be, as far as there is such a tensor."""
    if not dims or not 0 < dims[0] < 1 << 31 or not 0 <= kind < 1 << 31:
        return data
    size = int(lib.sllm_row_size(kind, dims[0])) * math.prod(dims[1:])
    if not 0 < size < 1 << 24:
        return data
    return (data * (size // max(len(data), 1) + 1))[:size]


def _same_place(name: bytes) -> bytes:
    """A tensor's name without its layer."""
    parts = name.split(b".")
    return b".".join(parts[2:]) if parts[0] == b"blk" else name


def _other_type(chance: random.Random, it: Mutant) -> str:
    name = chance.choice(list(it.tensors))
    kind = chance.choice([0, 1, 2, 8, 30, chance.randrange(_N_TYPES), chance.randrange(_N_TYPES)])
    everywhere = chance.random() < 0.4
    for other, (dims, _, data) in it.tensors.items():
        if other == name or (everywhere and _same_place(other) == _same_place(name)):
            it.tensors[other] = (dims, kind, sized(dims, kind, data))
    return f"{name.decode()}{' everywhere' if everywhere else ''} of type {kind}"


def _other_shape(chance: random.Random, it: Mutant) -> str:
    name = chance.choice(list(it.tensors))
    dims, kind, data = it.tensors[name]
    dims = list(dims)
    at = chance.randrange(len(dims))
    way = chance.randrange(7)
    if way == 0:
        dims.reverse()
    elif way == 1:
        dims[at] = max(1, dims[at] // 2)
    elif way == 2:
        dims[at] = dims[at] * 2 % (1 << 64)
    elif way == 3:
        dims.insert(chance.randrange(len(dims) + 1), 1)
    elif way == 4:
        dims[at] = chance.choice([0, 1, 1 << 20, 1 << 31, 1 << 32, (1 << 64) - 1])
    elif way == 5:
        dims = [math.prod(dims) % (1 << 64)]
    else:
        dims = [*dims[:at], dims[at] + chance.choice([-32, -1, 1, 32]) & 0xFFFF, *dims[at + 1 :]]
    it.tensors[name] = (dims, kind, sized(dims, kind, data))
    return f"{name.decode()} of shape {dims}"


def _other_pair(chance: random.Random, it: Mutant) -> str:
    architecture = it.pairs[b"general.architecture"][12:] + b"."
    own = [key for key in it.pairs if key.startswith(architecture)]
    key = chance.choice(own if own and chance.random() < 0.8 else list(it.pairs))
    if chance.random() < 0.15:
        del it.pairs[key]
        return f"no {key.decode()}"
    if chance.random() < 0.15:
        key = architecture + chance.choice(_MORE_KEYS)
    value = it.pairs[key] = _value(chance)
    return f"{key.decode()} = {value[:40]!r}"


_MORE_KEYS = tuple(
    key.encode()
    for key in re.findall(
        r"\S+",
        "attention.key_length attention.value_length attention.sliding_window attention.causal"
        " attention.clamp_kqv attention.max_alibi_bias attention.group_norm_groups attention.scale"
        " attention.sliding_window_pattern attention.output_scale attention.temperature_length"
        " attention.shared_kv_layers attn_logit_softcapping final_logit_softcapping logit_scale"
        " residual_scale embedding_scale expert_count expert_used_count expert_shared_count"
        " expert_group_count expert_group_used_count expert_weights_norm expert_weights_scale"
        " expert_gating_func experts_per_group interleave_moe_layer_step leading_dense_block_count"
        " moe_every_n_layers pooling_type rope.dimension_count rope.dimension_sections rope.freq_base"
        " rope.freq_base_swa rope.scaling.type rope.scaling.factor rope.scaling.attn_factor"
        " rope.scaling.original_context_length rope.scaling.yarn_log_multiplier ssm.conv_kernel"
        " ssm.group_count ssm.inner_size ssm.state_size ssm.time_step_rank swin_norm tensor_data_layout"
        " use_parallel_residual vocab_size wkv.head_size full_attention_interval nextn_predict_layers"
        " shortconv.l_cache token_shift_count attention.recurrent_layers",
    )
)


def _other_data(chance: random.Random, it: Mutant) -> str:
    name = chance.choice(list(it.tensors))
    dims, kind, data = it.tensors[name]
    way = chance.randrange(5)
    if way == 0:
        data = bytes(len(data))
    elif way == 1:
        data = chance.randbytes(len(data))
    elif way == 2:
        pattern = chance.choice(_HALVES)
        data = (pattern * (len(data) // 2 + 1))[: len(data)]
    elif way == 3:
        pattern = struct.pack("<f", chance.choice([math.nan, math.inf, -math.inf, 3e38, 1e-40]))
        data = (pattern * (len(data) // 4 + 1))[: len(data)]
    else:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 8, 64])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        data = bytes(changed)
    it.tensors[name] = (dims, kind, data)
    return f"{name.decode()} holds something else ({way})"


def _other_names(chance: random.Random, it: Mutant) -> str:
    names = list(it.tensors)
    one, other = chance.choice(names), chance.choice(names)
    way = chance.randrange(4)
    if way == 0:
        del it.tensors[one]
        return f"no {one.decode()}"
    if way == 1:
        it.tensors[one], it.tensors[other] = it.tensors[other], it.tensors[one]
        return f"{one.decode()} and {other.decode()} in each other's place"
    if way == 2:  # one that llama.cpp takes where it is there
        stem = one.removesuffix(b".weight")
        new = stem + chance.choice([b".bias", b".scale", b".input_scale", b".weight.scale"])
    else:
        new = chance.choice(
            [b"rope_freqs.weight", b"output.bias", b"output_norm.bias", b"token_embd_norm.weight"]
        )
    width = chance.choice([1, it.tensors[one][0][-1], it.tensors[one][0][0], it.tensors[other][0][0]])
    kind = chance.choice([0, 0, 1, 2, 8, 24, 26, 28, 30, chance.randrange(_N_TYPES)])
    it.tensors[new] = ([width], kind, sized([width], kind, it.tensors[other][2]))
    return f"{new.decode()} of {width} and type {kind} besides"


def _bytes_of_header(chance: random.Random, it: Mutant) -> str:
    places = [(chance.random(), chance.randrange(256)) for _ in range(chance.choice([1, 1, 2, 4]))]
    late = chance.random() < 0.7  # the descriptions of the tensors, else anywhere in front of the data

    def damage(out: bytearray, header: int) -> None:
        begin = header * 3 // 4 if late else 0
        for place, byte in places:
            out[begin + int(place * (header - begin))] = byte

    it.damage = damage
    return f"bytes {places} of the header"


def _cut(chance: random.Random, it: Mutant) -> str:
    share = chance.random()
    in_header = chance.random() < 0.5

    def damage(out: bytearray, header: int) -> None:
        del out[int(share * (header if in_header else len(out))) :]

    it.damage = damage
    return f"cut at {share:.3f}"


_WAYS = (
    (_other_type, 30),
    (_other_shape, 12),
    (_other_pair, 25),
    (_other_data, 15),
    (_other_names, 10),
    (_bytes_of_header, 6),
    (_cut, 2),
)


def mutant(number: int, shapes: Sequence[str] = SHAPES) -> Mutant:
    """The mutant with this number: the same one every time."""
    chance = random.Random(number)
    shape = shapes[number % len(shapes)]
    pairs, tensors = _whole(shape)
    it = Mutant(shape, dict(pairs), dict(tensors), threads=(1, 2, 4)[number // len(shapes) % 3])
    ways, weights = zip(*_WAYS, strict=True)
    done = [way(chance, it) for way in chance.choices(ways, weights, k=chance.choice([1, 1, 1, 2]))]
    it.name = f"{shape}: {'; '.join(done)}"
    it.options = {
        "flash_attn": chance.choice([True, True, False]),
        "type_k": chance.choice(["f16", "f16", "f32", "q8_0"]),
        "n_rollback": chance.choice([0, 0, 4]),
        "n_ctx": chance.choice([64, 128, 1024]),
    }
    return it


# ---- what becomes of them ----------------------------------------------------------------------------------


def use(path: Path, it: Mutant) -> str:
    """Do what a program does with a model; how far it went."""
    how_far = "refused"
    try:
        with sllm.Model(path, load_mtp="head" in it.name) as model:
            how_far = "loaded"
            model.vocab.encode("Once 1 \u4f60 <s>", parse_special=True)
            options = {**it.options, "n_threads": it.threads, "n_threads_batch": it.threads}
            with model.context(n_seq_max=2, **options) as context:
                tokens = [i % model.vocab.n_tokens for i in range(5, 45)]
                context.decode(tokens)
                how_far = "used"
                context.verify([0], [7], [[8, 9]], pos=[40])
                context.decode(tokens[:3], seq_id=1)
                if model.n_mtp:
                    heads = Heads(context)
                    context.decode(tokens[:9])
                    heads.draft([0], [7], n_max=2)
    except TYPED:
        pass
    return how_far


def _try_here(numbers: Iterable[int], path: Path) -> None:
    """In a process of its own: use each, saying before which one it is and after it how far it went."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number in numbers:
        print(number, end=" ", flush=True)
        faulthandler.dump_traceback_later(_HANG, exit=True)
        it = mutant(number)
        path.write_bytes(it.bytes())
        print(use(path, it), flush=True)
    faulthandler.cancel_dump_traceback_later()


@dataclass
class Found:
    """What became of mutants: how many were refused, loaded but not computed with, and used; and of those
    that ended their process: the number, what it was, and how it ended.
    """

    counts: dict[str, int] = field(default_factory=lambda: {"refused": 0, "loaded": 0, "used": 0})
    deaths: list[tuple[int, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {how_far}" for how_far, n in self.counts.items())
        return f"{sum(self.counts.values()) + len(self.deaths)} mutants: {counts}, {len(self.deaths)} deaths"


def try_all(start: int, stop: int, *, on_death: Callable[[str], object] | None = None) -> Found:
    """Use the mutants [start, stop), and go on where one of them ends the process."""
    found = Found()
    # Threads that wait by spinning would starve each other where there are fewer cores.
    quiet = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as at:
        while start < stop:
            command = [sys.executable, "-X", "faulthandler", __file__, "--here", str(start), str(stop), at]
            ended = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
            last = start - 1
            for line in ended.stdout.splitlines():
                number, _, how_far = line.partition(" ")
                last = int(number)
                if how_far:
                    found.counts[how_far] += 1
                else:
                    said = " ".join(ended.stderr.split("Fatal Python error")[0].split())[-300:]
                    found.deaths.append((last, mutant(last).name, f"{ended.returncode}: {said}"))
                    if on_death is not None:
                        on_death(str(found.deaths[-1]))
            assert last >= start, ended.stderr
            start = last + 1
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        _try_here(range(int(sys.argv[2]), int(sys.argv[3])), Path(sys.argv[4]) / "mutant.gguf")
    else:
        print(try_all(int(sys.argv[1]), int(sys.argv[2]), on_death=functools.partial(print, flush=True)))

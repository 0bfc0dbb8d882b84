"""Damaged calls: mutants of what honest clients send to a worker, each made from a number alone, and what a
worker makes of them.

``python tests/wire_mutants.py texts 0 20000`` (or ``layers``) sends so many to a worker in a process of its
own, and prints what they came to.
"""

from __future__ import annotations

import collections
import math
import random
import struct
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from raw_client import Client, Code
from remote_worker import WorkerProcess

from sllm import embedded
from sllm.engine import gguf
from sllm.wire import auth, codec
from sllm.wire.protocol import PROTOCOL, method, padded, pb, size_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from google.protobuf.descriptor import Descriptor, FieldDescriptor

__all__ = ["KINDS", "N_CTX", "REFUSALS", "Attack", "Found", "Mutant", "mutant"]

N_CTX = 256
N_EMBD = 256
N_VOCAB = 2560
MODEL_ID = gguf.model_id(embedded.TARGET)

KINDS = ("texts", "layers")

REFUSALS = frozenset(
    [
        Code.INVALID_ARGUMENT,
        Code.OUT_OF_RANGE,
        Code.RESOURCE_EXHAUSTED,
        Code.FAILED_PRECONDITION,
        Code.UNIMPLEMENTED,
        Code.ABORTED,
    ]
)
"""What a worker that is well may refuse a call with."""

_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
_UNKNOWN_FIELDS = (0, 9, 14, 16, 29, 100, 19_000, (1 << 29) - 1)


@dataclass
class Mutant:
    """One call.

    Attributes:
        what: what was done to it, for people.
        call: the method.
        frames: the messages up, of which one is a mutant, or their order is.

    """

    what: str
    call: str
    frames: list[bytes]


# ---- honest calls ------------------------------------------------------------------------------------------


def _sampling(chance: random.Random) -> pb.Sampling:
    sampling = pb.Sampling(
        temperature=chance.choice([0.0, 0.7, 1.0]),
        top_k=chance.choice([0, 40]),
        top_p=chance.choice([1.0, 0.95]),
        min_p=chance.choice([0.0, 0.05]),
        penalty_last_n=64,
        penalty_repeat=1.1,
        seed=chance.getrandbits(64),
    )
    if chance.random() < 0.2:
        sampling.bias_tokens.extend([7, 8])
        sampling.bias_values.extend([1.0, -math.inf])
    if chance.random() < 0.1:
        sampling.grammar = 'root ::= "a" root | "b"'
    elif chance.random() < 0.1:
        sampling.json_schema = '{"type": "integer"}'
    return sampling


def _prompt(chance: random.Random) -> list[int]:
    return [chance.randrange(3, N_VOCAB) for _ in range(chance.randint(1, 12))]


def _text(chance: random.Random) -> list[Any]:
    prompt = _prompt(chance)
    opening = pb.Open(
        tokens=prompt,
        start=len(prompt),
        sampling=_sampling(chance),
        max_tokens=chance.randint(1, 6),
        run_ahead=chance.random() < 0.8,
        model_id=chance.choice(["", MODEL_ID]),
        text_id=chance.choice([0, chance.randrange(1, 4)]),
    )
    hints = []
    for i in range(chance.randint(0, 3)):
        tokens = list(dict.fromkeys(_prompt(chance)))
        parents = [chance.randint(0, k) for k in range(len(tokens))] if chance.random() < 0.5 else []
        hint = pb.Hint(pos=len(prompt) + chance.randint(0, 4), tokens=tokens, parents=parents, id=i + 1)
        hints.append(pb.Up(hint=hint))
    return [pb.Up(open=opening), *hints]


def _sequence(chance: random.Random) -> list[Any]:
    output = chance.random() < 0.4
    name = chance.choice(codec.CODECS)
    opening = pb.LayersOpen(
        model_id=MODEL_ID,
        start=2,
        stop=8 if output else 7,
        output=output,
        codec=name,
        sampling=_sampling(chance) if output else None,
        text_start=0,
        sequence_id=chance.randrange(6),
    )
    frames: list[Any] = [pb.LayersUp(open=opening)]
    pos = 0
    numbers = np.random.default_rng(chance.getrandbits(32))
    for _ in range(chance.randint(1, 3)):
        n = chance.randint(1, 5)
        hidden = numbers.normal(0, 1, (n, N_EMBD)).astype(np.float32)
        rows = pb.Rows(pos=pos, n_rows=n, data=codec.encode(hidden, name), silent=chance.random() < 0.3)
        if output:
            rows.tokens.extend(chance.randrange(3, N_VOCAB) for _ in range(n))
            rows.n_select = chance.randint(0, n)
        frames.append(pb.LayersUp(rows=rows))
        pos += n
    return frames


def _score(chance: random.Random) -> list[Any]:
    prompt = [*_prompt(chance), 5]
    return [pb.ScoreRequest(tokens=prompt, start=chance.randint(1, len(prompt) - 1), model_id=MODEL_ID)]


_SMALL: dict[str, Callable[[random.Random], Any]] = {
    "Info": lambda _chance: pb.InfoRequest(protocol=PROTOCOL),
    "Status": lambda _chance: pb.StatusRequest(),
    "Vocabulary": lambda _chance: pb.VocabularyRequest(),
    "Echo": lambda chance: pb.EchoRequest(reply_bytes=chance.randrange(2000)),
    "Relay": lambda chance: pb.Piece(data=chance.randbytes(chance.randrange(100))),
}


def _honest(kind: str, chance: random.Random) -> tuple[str, list[Any]]:
    """A call to a worker of texts or of layers, sometimes one that it does not offer."""
    draw = chance.random()
    if draw < 0.1:
        call = chance.choice(list(_SMALL))
        return call, [_SMALL[call](chance)]
    if (draw < 0.75) if kind == "texts" else (draw < 0.15):
        return "Generate", _text(chance)
    if (draw < 0.95) if kind == "texts" else (draw < 0.2):
        return "Score", _score(chance)
    return "Layers", _sequence(chance)


# ---- what is done to the values of a message ---------------------------------------------------------------

_NUMBERS = (0, 1, 2, N_CTX - 1, N_CTX, N_CTX + 1, 511, 512, 513, N_VOCAB - 1, N_VOCAB)
_EDGES = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_FLOATS = (math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38, -3.4e38, -1.0, 1e30, 2.0)
_STRINGS = (
    "\0",
    "root ::= root",
    'root ::= "a',
    "root ::= " + "(" * 3000,
    "root ::= [^\\x00-\U0010ffff]",
    "{}",
    "[" * 20_000,
    '{"$ref": "#"}',
    '{"type": "integer", "multipleOf": NaN}',
    '{"minItems": 1e308, "type": "array"}',
    "\U0010ffff" * 300,
    "%s%n{0}",
)


def _value(one: FieldDescriptor, chance: random.Random) -> Any:
    """An extreme value for a field that is no message."""
    if one.type in (one.TYPE_FLOAT, one.TYPE_DOUBLE):
        return chance.choice(_FLOATS)
    if one.type == one.TYPE_BOOL:
        return chance.random() < 0.5
    if one.type == one.TYPE_STRING:
        return (
            "x" * (60_000 + chance.randrange(10_000)) if chance.random() < 0.05 else chance.choice(_STRINGS)
        )
    if one.type == one.TYPE_BYTES:
        return _blob(chance)
    if one.type == one.TYPE_FIXED64:
        return chance.choice([0, 1, 1 << 63, (1 << 64) - 1])
    return chance.choice([*_NUMBERS, *_EDGES])


def _blob(chance: random.Random) -> bytes:
    n_rows = chance.randint(1, 4)
    bits = [0x7F800000, 0x7FC00000, 0xFF7FFFFF, 0x7F000000, 0x00000001, 0x501502F9]  # inf, NaN, ..., 1e10
    made: list[Callable[[], bytes]] = [
        lambda: chance.randbytes(n_rows * codec.row_bytes(chance.choice(codec.CODECS), N_EMBD)),
        lambda: struct.pack("<I", chance.choice(bits)) * (n_rows * N_EMBD),
        lambda: struct.pack("<e", 60_000.0) * (n_rows * N_EMBD),
        lambda: bytes(chance.randrange(3000)),
    ]
    return chance.choice(made)()


def _messages(message: Any) -> Iterator[Any]:
    """A message, and those in it."""
    yield message
    for one, value in message.ListFields():
        if one.message_type is not None:
            for inner in value if one.is_repeated else [value]:
                yield from _messages(inner)


def _extreme(message: Any, chance: random.Random) -> str:
    """Give a field of a message, or of one in it, a value that no client would; says which."""
    found = [m for m in _messages(message) if any(f.message_type is None for f in m.DESCRIPTOR.fields)]
    inner = chance.choice(found)
    one = chance.choice([f for f in inner.DESCRIPTOR.fields if f.message_type is None])
    if not one.is_repeated:
        setattr(inner, one.name, _value(one, chance))
        return f"extreme {one.full_name}"
    values = getattr(inner, one.name)
    how = chance.randrange(4)
    if how == 0:
        del values[:]
    elif how == 1 and len(values):
        values[chance.randrange(len(values))] = _value(one, chance)
    elif how == 2:  # as many as the size of a message allows, now and then
        n = (N_CTX * 20) if chance.random() < 0.1 else chance.choice([N_CTX - 1, N_CTX, N_CTX + 1, 65])
        values.extend([_value(one, chance)] * n)
    else:
        values.extend(_value(one, chance) for _ in range(chance.randint(1, 9)))
    return f"extreme {one.full_name}"


def _hidden(message: Any, chance: random.Random) -> str:
    """Rows that are as many as they say, of numbers that no model has."""
    if not isinstance(message, pb.LayersUp) or message.WhichOneof("kind") != "rows":
        return _extreme(message, chance)
    n = max(len(message.rows.data) // max(message.rows.n_rows, 1), 1) * message.rows.n_rows
    pattern = struct.pack("<f", chance.choice([3e38, 1e30, 1e19, -1e38, 1e-45, 6e4]))
    if chance.random() < 0.3:
        pattern = chance.randbytes(chance.choice([2, 4, 8]))
    message.rows.data = (pattern * n)[:n]
    return "extreme hidden states"


# ---- what is done to its bytes -----------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


Wire = tuple[
    int, int, bytes
]  # number, wire type, the value as it stands there (of bytes: without the length)


def _take_apart(data: bytes) -> list[Wire]:
    """The fields of a message that is whole."""
    fields, at = [], 0
    while at < len(data):
        key, at = _read_varint(data, at)
        begin = at
        if key & 7 == _BYTES:
            n, begin = _read_varint(data, at)
            at = begin + n
        elif key & 7 == _VARINT:
            at = _read_varint(data, at)[1]
        else:
            at += 8 if key & 7 == _FIXED64 else 4
        fields.append((key >> 3, key & 7, data[begin:at]))
    return fields


def _joined(fields: Sequence[Wire]) -> bytes:
    return b"".join(
        _varint(number << 3 | kind) + (_varint(len(value)) if kind == _BYTES else b"") + value
        for number, kind, value in fields
    )


def _odd_field(chance: random.Random) -> bytes:
    """A field that nobody knows, or none at all."""
    number = chance.choice([*_UNKNOWN_FIELDS, 1, 2, 3, 15])
    deep = chance.choice([1, 50, 200, 5000])
    return chance.choice(
        [
            _varint(number << 3) + b"\xff" * chance.choice([8, 9, 10, 11, 40]) + b"\x01",
            _varint(number << 3 | _BYTES)
            + _varint(chance.choice([1, 1 << 20, (1 << 31) - 1, 1 << 32, 1 << 63])),
            _varint(number << 3 | _GROUP) * deep,
            _varint(number << 3 | _GROUP) * deep + _varint(number << 3 | _END_GROUP) * deep,
            _varint(number << 3 | _END_GROUP),
            _varint(number << 3 | chance.choice([6, 7])) + b"12345678",
            _varint(number << 3 | _FIXED32) + b"123",
            b"\xff" * 10,
        ]
    )


def _rewired(data: bytes, of: Descriptor, chance: random.Random) -> tuple[str, bytes]:
    """Do something to one field of a message, or of one in it."""
    fields = _take_apart(data)
    if not fields:
        return "odd field", _odd_field(chance)
    at = chance.randrange(len(fields))
    number, kind, value = fields[at]
    known = of.fields_by_number.get(number)
    if known is not None and known.message_type is not None and chance.random() < 0.7:
        what, inner = _rewired(value, known.message_type, chance)
        fields[at] = (number, kind, inner)
        return f"{known.name}: {what}", _joined(fields)
    what = chance.choice(["duplicate", "many", "drop", "shuffle", "type", "varint", "number", "odd", "value"])
    if what == "duplicate":
        fields.insert(chance.randrange(len(fields) + 1), fields[at])
    elif what == "many":
        fields[at:at] = [fields[at]] * min(1000, max(1, 20_000 // (len(value) + 1)))
    elif what == "drop":
        del fields[at]
    elif what == "shuffle":
        chance.shuffle(fields)
    elif what == "type":
        kind = chance.choice([k for k in range(8) if k != kind])
        fields[at] = (number, kind, value)
    elif what == "varint":
        fields[at] = (
            number,
            _VARINT,
            b"\xff" * chance.choice([4, 8, 9, 10]) + bytes([chance.choice([0, 1, 15])]),
        )
    elif what == "number":
        fields[at] = (chance.choice(_UNKNOWN_FIELDS), kind, value)
    elif what == "value":
        fields[at] = (number, kind, chance.randbytes(len(value)))
    else:
        return "odd field", _joined(fields[:at]) + _odd_field(chance) + _joined(fields[at:])
    return f"{what} field {number}", _joined(fields)


def _damaged(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Do something to the bytes, whatever they mean."""
    what = chance.choice(["flip", "flip", "flips", "cut", "random", "insert", "after", "middle", "empty"])
    changed = bytearray(data)
    if what == "random":
        return what, chance.randbytes(chance.choice([1, 2, 10, 64, 300, 5000]))
    if what == "empty" or not data:
        return what, b""
    at = chance.randrange(len(data))
    if what == "flip":
        changed[at] ^= 1 << chance.randrange(8)
    elif what == "flips":
        for _ in range(chance.randint(2, 30)):
            changed[chance.randrange(len(data))] = chance.getrandbits(8)
    elif what == "cut":
        del changed[at:]
    elif what == "insert":
        changed[at:at] = chance.randbytes(chance.randint(1, 9))
    elif what == "after":
        changed += chance.randbytes(chance.randint(1, 40))
    else:
        del changed[at : at + chance.randint(1, 9)]
    return what, bytes(changed)


def _disordered(frames: list[bytes], call: str, chance: random.Random) -> str:
    """Messages that are as they should be, and not where they should be."""
    what = chance.choice(["twice", "backwards", "cancel first", "none", "foreign", "without the first"])
    if what == "twice":
        frames.insert(chance.randrange(len(frames) + 1), frames[chance.randrange(len(frames))])
    elif what == "backwards":
        frames.reverse()
    elif what == "cancel first":
        frames.insert(0, CANCEL.get(call, b""))
    elif what == "none":
        frames.clear()
    elif what == "foreign":
        other = chance.choice([_text, _sequence, _score])(chance)[-1]
        frames.insert(chance.randrange(len(frames) + 1), other.SerializeToString())
    else:
        del frames[0]
    return what


CANCEL = {
    "Generate": padded(pb.Up(cancel=pb.Cancel())).SerializeToString(),
    "Layers": pb.LayersUp(cancel=pb.Cancel()).SerializeToString(),
}
"""What ends a call."""


def mutant(kind: str, number: int) -> Mutant:
    """The mutant of this number among the calls to a worker of texts or of layers."""
    chance = random.Random(f"{kind} {number}")
    call, messages = _honest(kind, chance)
    at = chance.randrange(len(messages))
    how = chance.random()
    if how < 0.4:
        what = (_hidden if chance.random() < 0.3 else _extreme)(messages[at], chance)
        if chance.random() < 0.3:
            what += f", {_extreme(messages[at], chance)}"
    frames = [message.SerializeToString() for message in messages]
    if 0.4 <= how < 0.65:
        what, frames[at] = _rewired(frames[at], messages[at].DESCRIPTOR, chance)
    elif 0.65 <= how < 0.9:
        what, frames[at] = _damaged(frames[at], chance)
    elif how >= 0.9:
        what = _disordered(frames, call, chance)
    most = size_limit(N_CTX) if kind == "texts" else 1 << 22
    frames = [frame[:most] for frame in frames]
    return Mutant(f"{kind} {number}: {call}, {what}", call, frames)


# ---- what becomes of them ----------------------------------------------------------------------------------


@dataclass
class Found:
    """What became of mutants: how many calls ended with which status; which ended as none may."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {code}" for code, n in sorted(self.counts.items()))
        return f"{self.counts.total()} mutants: {counts}; {len(self.wrong)} ended as none may"


class Attack:
    """Sends mutants to a worker over one connection, several at once; a context manager.

    Args:
        kind: of the worker.
        address: of it.
        n_threads: calls at once.

    Attributes:
        found: what they have come to.

    """

    LINGER = 0.05
    """Seconds until a call that gets no answer is cancelled: a text may wait for a hint, say."""

    PATIENCE = 60.0
    """Seconds until one that has been cancelled and goes on is taken to hang."""

    def __init__(self, kind: str, address: auth.Address, *, n_threads: int = 4) -> None:
        self.kind = kind
        self.found = Found()
        self._client = Client(address, token=address.token)
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="mutants")
        self._lock = threading.Lock()

    def send(self, numbers: Sequence[int]) -> None:
        """Send these, and wait until all their calls have ended."""
        for _ in self._pool.map(self._one, numbers):
            pass

    def _one(self, number: int) -> None:
        it = mutant(self.kind, number)
        answered = threading.Event()

        def up() -> Iterator[bytes]:
            yield from it.frames
            if it.call in CANCEL:
                answered.wait(self.LINGER)
                yield CANCEL[it.call]

        call: Any = self._client.channel.stream_stream(method(it.call), None, None)(
            up(), metadata=self._client.metadata, timeout=self.PATIENCE
        )
        code, details = Code.OK, ""
        try:
            for reply in call:
                if not _is_only_opened(it.call, reply):
                    answered.set()
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
        answered.set()
        with self._lock:
            self.found.counts[code.name] += 1
            if code not in REFUSALS and code is not Code.OK:
                self.found.wrong.append(f"{it.what}: {code.name}, {details}")

    def __enter__(self) -> Attack:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown()
        self._client.__exit__()


def _is_only_opened(call: str, reply: bytes) -> bool:
    kinds: dict[str, Any] = {"Generate": pb.Down, "Layers": pb.LayersDown}
    return call in kinds and bool(kinds[call].FromString(reply).WhichOneof("kind") == "opened")


def _main(kind: str, start: int, stop: int) -> None:
    with (
        tempfile.TemporaryDirectory() as state,
        WorkerProcess(Path(state), n_ctx=N_CTX, layers=kind == "layers", limits={"sessions": 8}) as process,
        Attack(kind, auth.Address.parse(process.uri)) as attack,
    ):
        for at in range(start, stop, 1000):
            attack.send(range(at, min(at + 1000, stop)))
            print(attack.found, *attack.found.wrong, sep="\n", flush=True)
            attack.found.wrong.clear()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""What the tests compare sllm with: slow and plain versions of what it does, and a few statistics."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from hypothesis import settings

from sllm.engine import exact
from sllm.engine._ffi import check, ffi, lib
from sllm.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.model import Model

    Tokens: TypeAlias = npt.NDArray[np.int32]
    Floats: TypeAlias = npt.NDArray[np.float32]

# With q8_0 weights and these, results on the CPU are the same to the last bit however tokens are grouped.
EXACT: dict[str, Any] = {**exact.SETTINGS, "n_threads": 1}

EFFORT = int(os.environ.get("SLLM_TEST_EFFORT", "1"))


def examples(n: int) -> settings:
    """So many examples of a property; SLLM_TEST_EFFORT multiplies them."""
    return settings(max_examples=n * EFFORT)


PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = dataclasses.replace(PLAIN, temperature=0.0)


# ---- selection ---------------------------------------------------------------------------------------------


def select(
    model: Model,
    params: SamplingParams,
    logits: npt.NDArray[Any],
    pos: int,
    history: Sequence[int] | Tokens | None = None,
    start: int = 0,
    *,
    with_prob: bool = True,
) -> tuple[int, float]:
    """``sllm_select``: the token and its probability, 0 if not asked for. Without a history, it is
    ``pos`` times token 0.
    """
    row = np.ascontiguousarray(logits, dtype=np.float32)
    past = np.zeros(pos, dtype=np.int32) if history is None else np.array(history, dtype=np.int32)
    assert len(past) == pos
    token = ffi.new("int32_t *")
    prob = ffi.new("float *")
    check(
        lib.sllm_select(
            model.compiled(params),
            ffi.from_buffer("float[]", row),
            len(row),
            pos,
            ffi.from_buffer("int32_t[]", past),
            start,
            token,
            prob if with_prob else ffi.NULL,
        )
    )
    return int(token[0]), float(prob[0])


def gumbel(seed: int, pos: int, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """``sllm_gumbel`` of many tokens."""
    return np.array([lib.sllm_gumbel(seed, pos, int(v)) for v in np.asarray(tokens)])


@dataclasses.dataclass(frozen=True)
class Filtered:
    """The candidates that llama.cpp's samplers leave, likeliest first."""

    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    clear_cut: bool
    """Whether neither rounding could have moved a boundary of top-p or min-p, nor, without a top-k, ties that
    of top-p (which of equal candidates llama.cpp keeps there is its own affair; with a top-k they are in the
    order of their ids)."""

    def probs(self, temperature: float) -> npt.NDArray[np.float64]:
        """Softmax of the candidates; at temperature 0, that at temperature 1."""
        scaled = self.logits.astype(np.float64) / (float(np.float32(temperature)) or 1.0)
        weights = np.exp(scaled - scaled.max())
        return np.asarray(weights / weights.sum())


def biases_of(params: SamplingParams) -> dict[int, float]:
    """The logit biases, which the class keeps as pairs."""
    return dict(params.logit_bias)


def filter_logits(
    logits: npt.NDArray[Any],
    params: SamplingParams,
    history: Sequence[int] | Tokens = (),
    allowed: Callable[[int], bool] | None = None,
) -> Filtered:
    """Logit bias, penalties, grammar (``allowed``), top-k, top-p, min-p, as llama.cpp does them."""
    x = np.array(logits, dtype=np.float32)
    for token, bias in biases_of(params).items():
        x[token] += np.float32(bias)
    if params.penalty_last_n > 0:
        seen, counts = np.unique(
            np.asarray(history, dtype=np.int64)[-params.penalty_last_n :], return_counts=True
        )
        for token, count in zip(seen, counts, strict=True):
            repeat = np.float32(params.penalty_repeat)
            x[token] = x[token] * repeat if x[token] <= 0 else x[token] / repeat
            x[token] -= np.float32(count) * np.float32(params.penalty_freq) + np.float32(
                params.penalty_present
            )
    with np.errstate(invalid="ignore"):
        ids = np.flatnonzero(x > -np.inf)
    if allowed is not None:
        ids = np.array([v for v in ids if allowed(int(v))], dtype=np.int64)
    ids = ids[np.lexsort((ids, -x[ids]))]
    clear_cut = True
    if params.temperature > 0 and len(ids):  # none of them ever drops the likeliest token
        if params.top_k > 0:
            ids = ids[: params.top_k]
        if params.top_p < 1:
            weights = np.exp(x[ids].astype(np.float64) - float(x[ids[0]]))
            below = np.cumsum(weights / weights.sum())
            clear_cut &= bool(np.abs(below - params.top_p).min() > 1e-5)
            n = int(np.searchsorted(below, params.top_p)) + 1
            clear_cut &= params.top_k > 0 or n >= len(ids) or bool(x[ids[n - 1]] > x[ids[n]])
            ids = ids[:n]
        if params.min_p > 0:
            gap = x[ids].astype(np.float64) - (float(x[ids[0]]) + math.log(params.min_p))
            clear_cut &= bool(np.abs(gap).min() > 1e-5)
            ids = ids[gap >= 0]
    return Filtered(ids, x[ids], clear_cut)


def choose(
    logits: npt.NDArray[Any],
    params: SamplingParams,
    pos: int,
    history: Sequence[int] | Tokens = (),
    allowed: Callable[[int], bool] | None = None,
) -> tuple[int, float, bool]:
    """The Gumbel-max choice in plain NumPy: token, probability, and Filtered.clear_cut."""
    left = filter_logits(logits, params, history, allowed)
    scores = left.logits.astype(np.float64)
    if params.temperature > 0:
        scores = scores / float(np.float32(params.temperature)) + gumbel(params.seed, pos, left.ids)
    best = np.flatnonzero(scores == scores.max())
    at = best[np.argmin(left.ids[best])]
    return int(left.ids[at]), float(left.probs(params.temperature)[at]), left.clear_cut


def without_end(model: Model, params: SamplingParams) -> SamplingParams:
    """``params`` for texts that never end by themselves, whatever the weights."""
    ends = {t: -math.inf for t in range(model.vocab.n_tokens) if model.vocab.is_eog(t)}
    return dataclasses.replace(params, logit_bias={**biases_of(params), **ends})


# ---- texts -------------------------------------------------------------------------------------------------


def make_prompt(model: Model, size: int, seed: int) -> Tokens:
    """Tokens in no order at all, none of them special."""
    usable = np.array(
        [
            v
            for v in range(model.vocab.n_tokens)
            if not model.vocab.is_control(v) and not model.vocab.is_eog(v)
        ],
        dtype=np.int32,
    )
    return np.asarray(np.random.default_rng(seed).choice(usable, size), dtype=np.int32)


def one_by_one(
    model: Model, prompt: Sequence[int] | Tokens, sampling: SamplingParams, n_tokens: int, n_ctx: int = 512
) -> list[int]:
    """The text itself, one token at a time in a context of its own, up to an end-of-generation token."""
    text = [int(t) for t in prompt]
    with model.context(n_ctx=n_ctx, **EXACT) as context:
        if len(text) > 1:
            context.decode(np.array(text[:-1], dtype=np.int32))
        for _ in range(n_tokens):
            verdict = context.verify([0], [text[-1]], sampling=sampling, start=[len(prompt)])
            text.append(int(verdict.tokens[0, 0]))
            if model.vocab.is_eog(text[-1]):
                break
    return text[len(prompt) :]


def fresh_logits(model: Model, text: Sequence[int] | Tokens) -> Floats:
    """Logits behind every token of a text, from a context that has seen nothing else."""
    with model.context(n_ctx=len(text), **EXACT) as context:
        rows = context.decode(np.array(text, dtype=np.int32), logits="all")
        assert rows is not None
        return rows.copy()


def log_softmax(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Of each row, in double precision."""
    x = rows.astype(np.float64)
    top = x.max(axis=-1, keepdims=True)
    return np.asarray(x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))


def tokens_of(context: Context, seq_id: int = 0) -> list[int]:
    """What a sequence holds; its length is asked for too."""
    tokens: list[int] = context.memory.tokens(seq_id).tolist()
    assert context.memory.length(seq_id) == len(tokens)
    return tokens


# ---- statistics --------------------------------------------------------------------------------------------


def chi_square_p(observed: npt.ArrayLike, probs: npt.ArrayLike) -> float:
    """The p-value of counts against probabilities; neighbours are pooled until every bin expects ten.

    An outcome of probability zero that was observed gives 0. The tail of the distribution is Wilson and
    Hilferty's cube-root approximation, good to a few per cent of the exponent where it matters here.
    """
    counts = np.asarray(observed, dtype=np.float64)
    expected = np.asarray(probs, dtype=np.float64) * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    order = np.argsort(-expected)
    bins: list[tuple[float, float]] = []
    have = want = 0.0
    for at in order:
        have += counts[at]
        want += expected[at]
        if want >= 10:
            bins.append((have, want))
            have = want = 0.0
    if bins and want > 0:
        bins[-1] = (bins[-1][0] + have, bins[-1][1] + want)
    df = len(bins) - 1
    assert df >= 1, "too few samples for a test"
    statistic = sum((h - w) ** 2 / w for h, w in bins)
    z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


def kolmogorov_smirnov_p(sample: npt.ArrayLike, cdf: Callable[[Any], Any]) -> float:
    """An upper bound of the two-sided p-value (Massart's inequality)."""
    values = np.sort(np.asarray(sample, dtype=np.float64))
    n = len(values)
    theory = cdf(values)
    steps = np.arange(n + 1) / n
    distance = max(np.abs(theory - steps[1:]).max(), np.abs(theory - steps[:-1]).max())
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


# ---- model files -------------------------------------------------------------------------------------------

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_Q8_0, _BLOCK_VALUES, _BLOCK_BYTES = 8, 32, 34


class GGUF:
    """A GGUF file taken apart, to be written again with something changed. Knows F32 and Q8_0 tensors."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._at = 0
        magic, self._version, n_tensors, n_pairs = struct.unpack("<4sIQQ", self._take(24))
        assert magic == b"GGUF"
        self.metadata: dict[bytes, tuple[int, Any]] = {}
        for _ in range(n_pairs):
            name = self._string()
            kind = self._scalar("<I")
            self.metadata[name] = (kind, self._value(kind))
        infos = []
        for _ in range(n_tensors):
            name = self._string()
            shape = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            infos.append((name, shape, self._scalar("<I"), self._scalar("<Q")))
        base = self._aligned(self._at)
        self.tensors: dict[bytes, tuple[list[int], int, bytes]] = {}
        for name, shape, kind, offset in infos:
            size = math.prod(shape) * 4
            if kind == _Q8_0:
                size = math.prod(shape) // _BLOCK_VALUES * _BLOCK_BYTES
            else:
                assert kind == 0
            self.tensors[name] = (shape, kind, self._data[base + offset : base + offset + size])

    def _aligned(self, n: int) -> int:
        return (n + 31) // 32 * 32

    def _take(self, n: int) -> bytes:
        self._at += n
        return self._data[self._at - n : self._at]

    def _scalar(self, fmt: str) -> Any:
        return struct.unpack(fmt, self._take(struct.calcsize(fmt)))[0]

    def _string(self) -> bytes:
        return self._take(self._scalar("<Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner = self._scalar("<I")
            return inner, [self._value(inner) for _ in range(self._scalar("<Q"))]
        return self._scalar(_SCALARS[kind])

    def packed(self, kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return struct.pack("<Q", len(value)) + bytes(value)
        if kind == _ARRAY:
            inner, items = value
            return struct.pack("<IQ", inner, len(items)) + b"".join(self.packed(inner, i) for i in items)
        return struct.pack(_SCALARS[kind], value)

    def array(self, name: str) -> list[Any]:
        """The items of an array in the metadata; changing them changes the file."""
        items: list[Any] = self.metadata[name.encode()][1][1]
        return items

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        out = bytearray(struct.pack("<4sIQQ", b"GGUF", self._version, len(self.tensors), len(self.metadata)))
        for name, (kind, value) in self.metadata.items():
            out += self.packed(_STRING, name) + struct.pack("<I", kind) + self.packed(kind, value)
        offset = 0
        for name, (shape, kind, data) in self.tensors.items():
            out += self.packed(_STRING, name) + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
            )
            offset = self._aligned(offset + len(data))
        for _, _, data in self.tensors.values():
            out += bytes(self._aligned(len(out)) - len(out)) + data
        out += bytes(self._aligned(len(out)) - len(out))
        path.write_bytes(out)
        return path

    def resize_vocab(self, n_tokens: int) -> None:
        """Cut off the last tokens, or add padding tokens; the rows of the tensors follow."""
        texts, types = self.array("tokenizer.ggml.tokens"), self.array("tokenizer.ggml.token_type")
        n_before = len(texts)
        texts[n_tokens:] = [f"[PAD{i}]".encode() for i in range(n_before, n_tokens)]
        types[n_tokens:] = [5] * max(0, n_tokens - n_before)  # unused
        for name in (b"token_embd.weight", b"output.weight"):
            if name in self.tensors:
                (width, rows), kind, data = self.tensors[name]
                assert rows == n_before
                row = len(data) // rows
                self.tensors[name] = (
                    [width, n_tokens],
                    kind,
                    (data + bytes(row * n_tokens))[: row * n_tokens],
                )
        for name in list(self.metadata):
            if name.endswith(b".vocab_size"):
                self.metadata[name] = (self.metadata[name][0], n_tokens)

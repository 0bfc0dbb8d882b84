"""How a token is selected from logits: the parameters, and their compiled form for one vocabulary."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllm.engine._ffi import check, checked_int, ffi, lib

__all__ = ["SamplingParams", "compile_sampling"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are selected; frozen, hashable, with llama.cpp's names and defaults.

    The token at absolute position ``pos`` is the argmax, over the candidates v that survive llama.cpp's
    samplers (logit bias, penalties, grammar, top-k, top-p, min-p, in that order), of ``logit(v) / temperature
    + G(seed, pos, v)``, with G standard Gumbel noise from a counter-based hash (the Gumbel-max trick). So the
    token is a sample of the filtered softmax at this temperature, and the same one for everybody who has the
    same logits, in whatever order positions are tried.

    Attributes:
        temperature: divides the logits; 0 selects the likeliest token and uses no noise.
        top_k: keep the k likeliest tokens; 0: all.
        top_p: keep the likeliest tokens whose probabilities together reach p (nucleus sampling, 1904.09751);
            1: all.
        min_p: keep tokens with at least min_p times the probability of the likeliest; 0: all.
        penalty_last_n: how many tokens back the penalties look, prompt included; 0: no penalties.
        penalty_repeat: divides (negative: multiplies) the logits of tokens seen there; 1: off.
        penalty_freq: is subtracted from a logit once for each time its token was seen; 0: off.
        penalty_present: is subtracted once from the logit of every token seen; 0: off.
        logit_bias: token id -> what is added to its logit; ``-math.inf`` or False rules it out. Any mapping
            or pairs, of OpenAI's form (``{"300": -100}``) or llama.cpp's (``[[300, False]]``); kept as a
            tuple of pairs, sorted.
        grammar: a GBNF grammar with a rule ``root`` that the generated text must match, or None. llama.cpp
            takes exponential time for some ambiguous grammars, so take none from strangers.
        seed: of the noise, 0 <= seed < 2**64.

    Raises:
        ValueError: a value out of its range, or NaN.
        TypeError: a value of another type.

    Examples:
        >>> sllm.SamplingParams(temperature=0.7, seed=1) == sllm.SamplingParams(seed=1, temperature=0.7)
        True

    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    penalty_last_n: int = 64
    penalty_repeat: float = 1.0
    penalty_freq: float = 0.0
    penalty_present: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    grammar: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def set_number(name: str, low: float, high: float, *, low_open: bool = False) -> None:
            value = _number(name, getattr(self, name))
            inside = (low < value if low_open else low <= value) and value <= high
            if not (inside and math.isfinite(value)):
                bound = f"{'>' if low_open else '>='} {low} and <= {high}"
                raise ValueError(f"{name} is {value!r}, expected a finite number {bound}")
            object.__setattr__(self, name, value)

        def set_integer(name: str, high: int) -> None:
            value = getattr(self, name)
            if isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected an integer")
            object.__setattr__(self, name, checked_int(value, name, 0, high))

        set_number("temperature", 0, 1e6)
        set_number("top_p", 0, 1, low_open=True)
        set_number("min_p", 0, 1)
        set_number("penalty_repeat", 0, 1e6, low_open=True)
        set_number("penalty_freq", -1e6, 1e6)
        set_number("penalty_present", -1e6, 1e6)
        set_integer("top_k", 2**31 - 1)
        set_integer("penalty_last_n", 2**20)
        set_integer("seed", 2**64 - 1)
        if self.grammar is not None:
            if not isinstance(self.grammar, str):
                raise TypeError(f"grammar is {self.grammar!r}, expected GBNF text")
            if not self.grammar.strip() or "\0" in self.grammar:
                raise ValueError("grammar is empty or holds a NUL character")
        object.__setattr__(self, "logit_bias", tuple(sorted(_biases(self.logit_bias).items())))


def _number(name: str, value: Any) -> float:
    # NumPy's scalars are such numbers, too, and its truth values are not.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _biases(given: Any) -> dict[int, float]:
    """Token id -> bias, of a mapping or pairs, in the forms that OpenAI's API and llama.cpp's server take."""
    biases: dict[int, float] = {}
    pairs = given.items() if isinstance(given, Mapping) else () if given is None else given
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise TypeError(f"logit_bias is {given!r}, expected a mapping of token ids to numbers, or such pairs")
    for pair in pairs:
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"logit_bias holds {pair!r}, expected pairs of a token id and a number")
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit():
            token = int(token)  # JSON has no other keys
        if isinstance(token, (bool, str)):
            raise TypeError(f"logit_bias names {token!r}, expected a token id (see Vocab.encode)")
        token = checked_int(token, "the token of a logit_bias", 0)
        name = f"logit_bias of token {token}"
        value = -math.inf if bias is False else _number(name, bias)
        if not (-1e6 <= value <= 1e6 or value == -math.inf):
            raise ValueError(f"{name} is {bias!r}, expected -1e6 to 1e6, or -inf or False to rule it out")
        biases[token] = value
    return biases


def compile_sampling(model: Any, params: SamplingParams) -> Any:
    """:class:`SamplingParams` for one model's vocabulary: an ``sllm_sampling *`` that frees itself with its
    last reference.

    ``model`` is a live ``sllm_model *``.

    Raises:
        ValueError: a grammar that does not parse, or a bias for a token that the vocabulary does not have.

    """
    biases: tuple[tuple[int, float], ...] = tuple(params.logit_bias)  # type: ignore[arg-type]
    tokens = ffi.new("int32_t[]", [token for token, _ in biases])
    values = ffi.new("float[]", [bias for _, bias in biases])
    grammar = ffi.NULL if params.grammar is None else ffi.new("char[]", params.grammar.encode())
    struct = ffi.new(
        "struct sllm_sampling_params *",
        {
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "penalty_last_n": params.penalty_last_n,
            "penalty_repeat": params.penalty_repeat,
            "penalty_freq": params.penalty_freq,
            "penalty_present": params.penalty_present,
            "seed": params.seed,
            "bias_tokens": tokens,
            "bias_values": values,
            "n_bias": len(biases),
            "grammar": grammar,
        },
    )
    out = ffi.new("sllm_sampling **")
    check(lib.sllm_sampling_new(model, struct, out))
    return ffi.gc(out[0], lib.sllm_sampling_free)

"""How a token is selected from logits: the parameters, and their compiled form for one vocabulary."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.engine._ffi import check, checked_int, ffi, lib
from sllm.engine.grammar import Asked, complaint
from sllm.engine.grammar import kept_bytes as grammar_bytes

if TYPE_CHECKING:
    from sllm.engine.grammar import Grammars

__all__ = ["SamplingParams", "check_grammar", "compile_sampling", "kept_bytes"]

_NOISES = {
    "sllm": lib.SLLM_NOISE_SLLM,
    "vllm": lib.SLLM_NOISE_VLLM,
    "sglang": lib.SLLM_NOISE_SGLANG,
}

_BYTES, _BYTES_PER_BIAS = 2000, 150
"""What parameters and one more bias take, compiled and not."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are selected; frozen, hashable, with llama.cpp's names and defaults.

    The token at absolute position ``pos`` is the argmax, over the candidates v that survive llama.cpp's
    samplers (logit bias, penalties, grammar, top-k, top-p, min-p, in that order), of ``logit(v) / temperature
    + G(seed, pos, v)``, with G standard Gumbel noise from a counter-based hash (the Gumbel-max trick). So the
    token is a sample of the filtered softmax at this temperature, and depends only on the logits, the seed
    and the position, not on the order in which positions are computed.

    Attributes:
        temperature: divides the logits; 0 selects the most likely token without noise.
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the most likely tokens whose probabilities together reach p (nucleus sampling,
            1904.09751); 1: all.
        min_p: keep tokens with at least min_p times the probability of the most likely one; 0: all.
        penalty_last_n: how many tokens back the penalties look, prompt included; 0: no penalties.
        penalty_repeat: divides (negative: multiplies) the logits of tokens seen there; 1: off.
        penalty_freq: is subtracted from a logit once for each time its token was seen; 0: off.
        penalty_present: is subtracted once from the logit of every token seen; 0: off.
        logit_bias: token id -> what is added to its logit; ``-math.inf`` or False rules it out. Any mapping
            or pairs, of OpenAI's form (``{"300": -100}``) or llama.cpp's (``[[300, False]]``); kept as a
            tuple of pairs, sorted.
        grammar: a GBNF grammar with a rule ``root`` that the generated text must match, or None. One that
            needs too much time or memory, when it is compiled or for a text, raises a ValueError. Needs
            ``sllm[grammar]``.
        json_schema: a JSON Schema (draft 2020-12) that the generated text must be an instance of, as a
            mapping or as JSON text, or None; kept as text. Properties come in the schema's order. An
            unsupported keyword raises a ValueError when the schema is compiled. Not with ``grammar``. Needs
            ``sllm[grammar]``.
        seed: of the noise, 0 <= seed < 2**64; with another engine's noise, 0 <= seed < 2**63.
        noise: ``"sllm"``, or the engine whose selection to reproduce: ``"vllm"`` or ``"sglang"``, see below.

    **Another engine's noise.** vLLM's second model runner and SGLang select the tokens of a request with a
    seed with Gumbel noise as well, keyed by seed, position and token. With ``noise="vllm"`` or ``"sglang"``
    the selection here does the same in the same arithmetic, so a local draft selects what the engine would
    select from the same logits (MurmurHash3; the formulas and their sources are in
    ``csrc/engine_noise.cpp``). It works with ``logit_bias``, but not with penalties and grammars, which these
    engines implement differently.

    - ``"vllm"``, as in vLLM 0.32.0 (``vllm/v1/worker/gpu/sample/gumbel.py``): temperature, then min-p, top-k,
      top-p. A temperature below 0.01 counts as 0.01, unless it is 0.
    - ``"sglang"``, as in SGLang 0.5.23 with ``--enable-deterministic-inference``
      (``sglang/srt/layers/sampler.py``): temperature, top-k, and top-p over all tokens; the noise is keyed by
      a token's rank by probability. ``min_p`` must be 0, which SGLang requires of requests with a seed.

    Both are checked against numbers that the engines' own code gives on a CPU. On a GPU exponentials and sums
    have other last bits, so a different token may be taken where two are nearly tied.

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
    json_schema: Mapping[str, Any] | str | None = None
    seed: int = 0
    noise: str = "sllm"

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
        if self.json_schema is not None:
            if self.grammar is not None:
                raise ValueError("grammar and json_schema exclude each other")
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        object.__setattr__(self, "logit_bias", tuple(sorted(_biases(self.logit_bias).items())))
        self._check_noise()

    def _check_noise(self) -> None:
        if not isinstance(self.noise, str):
            raise TypeError(f"noise is {self.noise!r}, expected one of {', '.join(map(repr, _NOISES))}")
        if self.noise not in _NOISES:
            raise ValueError(f"noise is {self.noise!r}, expected one of {', '.join(map(repr, _NOISES))}")
        if self.noise == "sllm":
            return
        penalties = (self.penalty_repeat, self.penalty_freq, self.penalty_present)
        if self.has_grammar or (self.penalty_last_n > 0 and penalties != (1.0, 0.0, 0.0)):
            raise ValueError(
                f"noise={self.noise!r} goes with no penalties and no grammar, which it has in another way"
            )
        if self.seed >= 1 << 63:
            raise ValueError(
                f"seed is {self.seed}, and with noise={self.noise!r} less than 2**63 is expected"
            )
        if self.noise == "sglang" and self.min_p > 0 and self.temperature > 0:
            raise ValueError(
                f"min_p is {self.min_p}, and SGLang selects by a seed with min_p=0 alone: set that"
            )

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar or a JSON Schema constrains the text."""
        return self.grammar is not None or self.json_schema is not None


def _schema_text(given: Any) -> str:
    """A JSON Schema as JSON text, its properties in their order."""
    if not isinstance(given, (str, Mapping)):
        raise TypeError(f"json_schema is {type(given).__name__}, expected a mapping or JSON text")
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(schema, allow_nan=False, separators=(",", ":"), default=_mapping)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json_schema is not JSON: {str(error)[:200]}") from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"json_schema is {text[:40]}, expected an object")
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it holds a {type(value).__name__}")


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


def _schema_of(params: SamplingParams) -> str | None:
    """The JSON Schema, which is text by now."""
    return None if params.json_schema is None else str(params.json_schema)


def check_grammar(params: SamplingParams) -> None:
    """Check a grammar or a JSON Schema without a vocabulary, before it is sent to one.

    Raises:
        ValueError: it does not parse, or needs too much.

    Examples:
        >>> check_grammar(sllm.SamplingParams(grammar='root ::= "a'))
        Traceback (most recent call last):
        ValueError: the grammar does not parse: line 1: a literal without an end

    """
    if params.has_grammar:
        found = complaint(params.grammar, _schema_of(params))
        if found:
            raise ValueError(found)


def kept_bytes(params: SamplingParams) -> int:
    """About what they take with what they are compiled to."""
    n_biases = len(tuple(params.logit_bias))
    return _BYTES + _BYTES_PER_BIAS * n_biases + grammar_bytes(params.grammar, _schema_of(params))


def compile_sampling(model: Any, params: SamplingParams, grammars: Grammars) -> Any:
    """:class:`SamplingParams` for one model's vocabulary: an ``sllm_sampling *`` that frees itself with its
    last reference.

    ``model`` is a live ``sllm_model *``, and ``grammars`` are those of its vocabulary.

    Raises:
        ValueError: a grammar that does not parse or needs too much, or a bias for a token that the vocabulary
            does not have.
        UnsupportedModelError: a grammar, and no vocabulary or no token that ends a text.
        ImportError: a grammar, and no package for it.

    """
    biases: tuple[tuple[int, float], ...] = tuple(params.logit_bias)  # type: ignore[arg-type]
    tokens = ffi.new("int32_t[]", [token for token, _ in biases])
    values = ffi.new("float[]", [bias for _, bias in biases])
    asked = Asked() if params.has_grammar else None
    handle = ffi.NULL if asked is None else ffi.new_handle(asked)
    struct = ffi.new(
        "struct sllm_sampling_params *",
        {
            "noise": _NOISES[params.noise],
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
            "grammar": ffi.NULL if asked is None else lib.sllm_py_allowed,
            "grammar_user_data": handle,
        },
    )
    out = ffi.new("sllm_sampling **")
    check(lib.sllm_sampling_new(model, struct, out))

    def free(sampling: Any, _handle: Any = handle) -> None:  # which C uses as long
        lib.sllm_sampling_free(sampling)

    sampling = ffi.gc(out[0], free)
    if asked is not None:
        asked.grammar = grammars.compiled(params.grammar, _schema_of(params))
        asked.n_words = grammars.n_words
    return sampling

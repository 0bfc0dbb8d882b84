"""What a request says to the plugin, in ``vllm_xargs``: read by the server, written by the client.

Only the standard library is used: vLLM's front end reads the arguments in a process that should not load
torch, and clients have neither torch nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Draft", "Selection", "request_fields"]

PREFIX = "sllm_"


@dataclass(frozen=True)
class Selection:
    """How the tokens of a request are selected: sllm's ``SamplingParams``, as far as a logits processor can.

    In ``vllm_xargs`` the names are those of the attributes with ``sllm_`` before them. ``sllm_seed`` turns
    the selection on, and what is left out has the value that ``SamplingParams`` gives it.
    """

    seed: int
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    def __post_init__(self) -> None:
        for name, high in (("seed", 2**64 - 1), ("top_k", 2**31 - 1)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), high))
        for name, low, high in (("temperature", 0.0, 1e6), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            value = _number(name, getattr(self, name))
            if not low <= value <= high or (name == "top_p" and value == 0):
                bound = "> 0 and <= 1" if name == "top_p" else f"a number from {low:g} to {high:g}"
                raise ValueError(f"{PREFIX}{name} is {value!r}, expected {bound}")
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, xargs: Mapping[str, Any] | None) -> Selection | None:
        """Of a request's ``vllm_xargs``; None where they say nothing of a selection.

        Raises:
            ValueError: a value of another type or out of its range, or a name that the plugin does not know,
                which may be a misspelt one.

        """
        given = _given(xargs, {field.name for field in fields(cls)})
        if not given:
            return None
        if "seed" not in given:
            raise ValueError(
                f"vllm_xargs has {', '.join(PREFIX + name for name in given)} and no {PREFIX}seed,"
                " which turns the selection on"
            )
        return cls(**given)

    def xargs(self) -> dict[str, Any]:
        """The same as ``vllm_xargs``; the seed as text, since JSON's numbers may be doubles on their way."""
        named = {PREFIX + field.name: getattr(self, field.name) for field in fields(self)}
        return {**named, PREFIX + "seed": str(self.seed)}


@dataclass(frozen=True)
class Draft:
    """What a client expects of a text, or of another request's text.

    Attributes:
        tokens: token ids, what the text is expected to go on with (``sllm_draft``).
        pos: where in the text the first of them would be, the prompt included (``sllm_pos``); None: behind
            the prompt of the request.
        stream: a name for the text (``sllm_stream``) that nobody else uses; drafts that come later refer to
            it.
        about: the name of the text that the draft is about (``sllm_about``), where it comes in a request of
            its own, sent while the text is written; a prompt of one token and ``max_tokens`` 1 will do for
            it.

    """

    tokens: tuple[int, ...]
    pos: int | None = None
    stream: str | None = None
    about: str | None = None

    @classmethod
    def parse(cls, xargs: Mapping[str, Any] | None, n_vocab: int) -> Draft | None:
        """Of a request's ``vllm_xargs``; None where they hold no draft and no name of a text.

        ``n_vocab`` is how many tokens the vocabulary has.

        Raises:
            ValueError: a token that the vocabulary does not have, or a value of another type or out of range.

        """
        given = _given(xargs, {"draft", "pos", "stream", "about"})
        if not given:
            return None
        tokens = given.get("draft", [])
        if not isinstance(tokens, (list, tuple)):
            raise ValueError(f"{PREFIX}draft is {tokens!r}, expected a list of token ids")
        for token in tokens:
            if type(token) is not int or not 0 <= token < n_vocab:
                raise ValueError(f"{PREFIX}draft holds {token!r}, expected token ids from 0 to {n_vocab - 1}")
        for name in ("stream", "about"):
            if not isinstance(given.get(name, ""), str):
                raise ValueError(f"{PREFIX}{name} is {given[name]!r}, expected text")
        pos = given.get("pos")
        if "about" in given and (pos is None or "stream" in given):
            raise ValueError(f"{PREFIX}about needs {PREFIX}pos and excludes {PREFIX}stream")
        return cls(
            tuple(tokens),
            None if pos is None else _integer("pos", pos, 2**31 - 1),
            given.get("stream"),
            given.get("about"),
        )

    def xargs(self) -> dict[str, Any]:
        """The same as ``vllm_xargs``."""
        named = {"draft": list(self.tokens), "pos": self.pos, "stream": self.stream, "about": self.about}
        return {PREFIX + name: value for name, value in named.items() if value is not None}


def request_fields(sampling: Any, ends: Iterable[int]) -> dict[str, Any]:
    """The fields of a completion request whose text is selected as ``sllm.SamplingParams`` say.

    Args:
        sampling: a ``sllm.SamplingParams``.
        ends: the tokens that end a text in the client's vocabulary. An engine stops at those that its own
            configuration names, which are often fewer: a chat model's file has ``<|im_end|>`` and
            ``<|endoftext|>``, and ``config.json`` one of them.

    Returns:
        Fields to send along with ``prompt`` and ``max_tokens``. Whatever a model's ``generation_config.json``
        would set on the server is set here to what changes nothing.

    Raises:
        ValueError: a penalty, a grammar or a bias that vLLM would not apply as sllm does.

    """
    if sampling.penalty_last_n and (
        sampling.penalty_repeat != 1 or sampling.penalty_freq or sampling.penalty_present
    ):
        raise ValueError("vLLM's penalties look at the whole text, sllm's at its last tokens: leave them out")
    if sampling.grammar is not None or sampling.json_schema is not None:
        raise ValueError("grammar and json_schema are sllm's own: use an engine that answers sllm's requests")
    bias = {str(token): value for token, value in sampling.logit_bias}
    if any(not -100 <= value <= 100 for value in bias.values()):
        raise ValueError("logit_bias goes beyond -100 to 100, which is what vLLM cuts it to")
    chosen = Selection(sampling.seed, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return {
        # The processor leaves one token, and the greedy way is vLLM's quickest way to take it.
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stop_token_ids": sorted(ends),
        "vllm_xargs": chosen.xargs(),
        **({"logit_bias": bias} if bias else {}),
    }


def check_no_penalties(params: Any) -> None:
    """Refuse vLLM's penalties beside sllm's selection: they would have no effect, or another one.

    Raises:
        ValueError: ``params`` (a ``vllm.SamplingParams``) has one.

    """
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    for name, value in neutral.items():
        if getattr(params, name) != value:
            raise ValueError(
                f"{name} is {getattr(params, name)!r} beside {PREFIX}seed, expected {value}: the model's"
                " generation_config.json may have set it; send it, or start the server with"
                " --generation-config vllm"
            )


def _given(xargs: Mapping[str, Any] | None, names: set[str]) -> dict[str, Any]:
    """Those of the arguments that have one of the names, without the prefix."""
    found = {
        name.removeprefix(PREFIX): value for name, value in (xargs or {}).items() if name.startswith(PREFIX)
    }
    known = {field.name for field in fields(Selection)} | {field.name for field in fields(Draft)}
    known = (known - {"tokens"}) | {"draft"}
    unknown = found.keys() - known
    if unknown:
        raise ValueError(
            f"vllm_xargs has {', '.join(PREFIX + name for name in sorted(unknown))}; known are"
            f" {', '.join(PREFIX + name for name in sorted(known))}"
        )
    return {name: value for name, value in found.items() if name in names}


def _integer(name: str, value: Any, high: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise ValueError(f"{PREFIX}{name} is {value!r}, expected an integer from 0 to {high}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{PREFIX}{name} is {value!r}, expected a finite number")
    return float(value)

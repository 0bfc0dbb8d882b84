"""What a request asks for, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sllm.openai_server.body import Fields, wrong
from sllm.openai_server.tool_calls import calls_schema

__all__ = ["Asked", "ChatAsked", "CompletionAsked", "asked_chat", "asked_completion"]

MAX_CHOICES = 128
"""Texts of one request: prompts times ``n``."""

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
_MOST = 2**31 - 1
_LEAST_TOP_P = 1e-9
"""What a ``top_p`` of 0 means: the likeliest token alone."""


_NO_INFLUENCE = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
"""Fields that say nothing about the text: bookkeeping of OpenAI's."""

_UNSUPPORTED = frozenset(
    {
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "suffix",
        "verbosity",
        "web_search_options",
    }
)


@dataclass(frozen=True)
class Asked:
    """What both kinds of requests ask for.

    Attributes:
        model: its name; None: whichever is served.
        n: texts for each prompt.
        stream: whether the text is sent as it is written.
        include_usage: whether a stream ends with what it has taken.
        max_tokens: of each text; None: no limit of its own. 0: the prompt alone, of a completion with echo.
        stop: what ends a text.
        sampling: fields of :class:`~sllm.SamplingParams`; those that are absent are for the server to say.
        schema_from: the field that a grammar came from, for errors; None: there is none.
        logprobs: so many of the likeliest tokens of each position are asked for; None: no log-probabilities.
        prompt_field: the field that the prompt comes from.

    """

    prompt_field: ClassVar[str]

    model: str | None
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Mapping[str, Any]
    schema_from: str | None
    logprobs: int | None


@dataclass(frozen=True)
class ChatAsked(Asked):
    """A request for ``/v1/chat/completions``.

    Attributes:
        messages: the conversation, of which :meth:`sllm.Model.chat` makes a prompt.
        tools: what the model may call; empty: nothing.
        demands_call: whether the answer has to be a call of one of them.
        several_calls: whether there may be more than one.
        variables: of the chat template.
        reasoning_effort: a variable that some templates have, as OpenAI's API names it.

    """

    prompt_field = "messages"

    messages: list[Any] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    demands_call: bool = False
    several_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None


@dataclass(frozen=True)
class CompletionAsked(Asked):
    """A request for ``/v1/completions``.

    Attributes:
        prompts: texts, or token ids.
        echo: whether the prompt comes before each text.

    """

    prompt_field = "prompt"

    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False


def asked_chat(body: Mapping[str, Any]) -> ChatAsked:
    """Read a request for ``/v1/chat/completions``.

    Raises:
        RequestError: a field is of another type, out of range, or not known.

    """
    fields = Fields(body)
    most = fields.whole("max_completion_tokens", 1, _MOST)
    older = fields.whole("max_tokens", 1, _MOST)  # its name before there was reasoning
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "it needs logprobs to be true")
    schema, schema_from = _response_schema(fields.take("response_format"))
    tools, demands_call = _tools(fields)
    if tools and schema is not None:
        raise wrong("response_format", "it excludes tools, whose calls are not JSON alone")
    if demands_call:
        schema, schema_from = _calls_schema(tools), "tools"
    several_calls = fields.flag("parallel_tool_calls") is not False
    if fields.take("modalities") not in (None, ["text"]):
        raise wrong("modalities", "this server writes text alone")
    messages = fields.take("messages")
    if not isinstance(messages, list):
        raise wrong("messages", "expected a list of messages")
    variables = fields.take("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise wrong("chat_template_kwargs", "expected an object")
    common = _common(fields, schema)
    asked = ChatAsked(
        **common,
        max_tokens=older if most is None else most,
        schema_from=schema_from,
        logprobs=(top or 0) if wanted else None,
        messages=[_message(message) for message in messages],
        tools=tools,
        demands_call=demands_call,
        several_calls=several_calls,
        variables=variables or {},
        reasoning_effort=fields.text("reasoning_effort"),
    )
    fields.done(_UNSUPPORTED)
    return asked


def asked_completion(body: Mapping[str, Any]) -> CompletionAsked:
    """Read a request for ``/v1/completions``.

    Raises:
        RequestError: a field is of another type, out of range, or not known.

    """
    fields = Fields(body)
    echo = bool(fields.flag("echo"))
    most = fields.whole("max_tokens", 0 if echo else 1, _MOST)
    best_of = fields.whole("best_of", 1, MAX_CHOICES)
    schema, schema_from = _response_schema(fields.take("response_format"))
    prompts = _prompts(fields.take("prompt"))
    common = _common(fields, schema)
    if best_of is not None and best_of != common["n"]:
        raise wrong("best_of", "this server returns every text that it writes: leave it out, or make it n")
    if len(prompts) * common["n"] > MAX_CHOICES:
        raise wrong("prompt", f"expected at most {MAX_CHOICES} texts, n of each prompt")
    asked = CompletionAsked(
        **common,
        max_tokens=most,
        schema_from=schema_from,
        logprobs=fields.whole("logprobs", 0, MAX_TOP_LOGPROBS),
        prompts=prompts,
        echo=echo,
    )
    fields.done(_UNSUPPORTED)
    return asked


def _common(fields: Fields, schema: Any) -> dict[str, Any]:
    """What both kinds of requests have in the same way."""
    stream = bool(fields.flag("stream"))
    options = fields.take("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise wrong("stream_options", "expected an object, with stream true")
    details = Fields(options or {})
    include_usage = bool(details.flag("include_usage"))
    details.flag("include_obfuscation")  # padding against whoever watches the sizes; there is none
    details.done(())
    if fields.flag("store"):
        raise wrong("store", "this server keeps nothing")
    for name in _NO_INFLUENCE:
        fields.take(name)
    return {
        "model": fields.text("model"),
        "n": fields.whole("n", 1, MAX_CHOICES) or 1,
        "stream": stream,
        "include_usage": include_usage,
        "stop": _stops(fields.take("stop")),
        "sampling": _sampling(fields, schema),
    }


def _sampling(fields: Fields, schema: Any) -> dict[str, Any]:
    found = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, _MOST),
        "min_p": fields.number("min_p", 0, 1),
        "penalty_freq": fields.number("frequency_penalty", -2, 2),
        "penalty_present": fields.number("presence_penalty", -2, 2),
        "seed": fields.whole("seed", -(2**63), 2**64 - 1),
        "logit_bias": fields.take("logit_bias"),
        "json_schema": schema,
    }
    if found["top_p"] == 0:
        found["top_p"] = _LEAST_TOP_P
    if found["seed"] is not None:
        found["seed"] %= 2**64
    if found["logit_bias"] is not None:
        found["logit_bias"] = _biases(found["logit_bias"])
    return {name: value for name, value in found.items() if value is not None}


def _biases(given: Any) -> dict[int, float]:
    expected = "expected an object of token ids and numbers from -100 to 100"
    if not isinstance(given, dict):
        raise wrong("logit_bias", expected)
    biases = {}
    for token, bias in given.items():
        number = not isinstance(bias, bool) and isinstance(bias, (int, float)) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number):
            raise wrong("logit_bias", expected)
        biases[int(token)] = float(bias)
    return biases


def _stops(given: Any) -> tuple[str, ...]:
    found = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) and one for one in found):
        raise wrong("stop", "expected a string, or a list of strings, none of them empty")
    if len(found) > MAX_STOPS:
        raise wrong("stop", f"expected at most {MAX_STOPS} strings")
    return tuple(found)


def _response_schema(given: Any) -> tuple[Any, str | None]:
    """The JSON Schema that a ``response_format`` asks for, and the field that it came from."""
    if given is None:
        return None, None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None, None
    if kind == "json_object":
        return {"type": "object"}, "response_format"
    if kind != "json_schema":
        raise wrong("response_format", "expected an object with type text, json_object or json_schema")
    wrapped = given.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise wrong("response_format", "expected a JSON Schema in json_schema.schema")
    return schema, "response_format"


def _tools(fields: Fields) -> tuple[list[Any], bool]:
    """The tools that may be called, and whether one has to be."""
    tools, choice = fields.take("tools"), fields.take("tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_function, tools))):
        raise wrong(
            "tools", "expected a list of functions, each with a name, and parameters that are an object"
        )
    tools = tools or []
    if choice in (None, "auto", "none"):
        return [] if choice == "none" else tools, False
    if choice == "required":
        allowed, demanded = tools, True
    elif _is_function(choice):
        allowed, demanded = _named(tools, [choice]), True
    else:
        allowed, demanded = _allowed(tools, choice)
    if not allowed:
        raise wrong("tool_choice", "there is no such tool in tools")
    return allowed, demanded


def _allowed(tools: list[Any], choice: Any) -> tuple[list[Any], bool]:
    """What a ``tool_choice`` of type ``allowed_tools`` leaves."""
    given = choice.get("allowed_tools") if isinstance(choice, dict) else None
    mode, named = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(named, list) or not all(map(_is_function, named)):
        raise wrong("tool_choice", "expected none, auto, required, or an object that names functions")
    return _named(tools, named), mode == "required"


def _named(tools: list[Any], named: list[Any]) -> list[Any]:
    names = [one["function"]["name"] for one in named]
    found = [tool for tool in tools if tool["function"]["name"] in names]
    return found if len({tool["function"]["name"] for tool in found}) == len(set(names)) else []


def _calls_schema(tools: list[Any]) -> dict[str, Any]:
    try:
        return calls_schema(tools)
    except RecursionError:
        raise wrong("tools", "the parameters are nested too deeply") from None


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("parameters"), (dict, type(None)))


def _message(message: Any) -> Any:
    """A message in the form that chat templates know; what is wrong with it they say."""
    if isinstance(message, dict) and message.get("role") == "developer":
        return {**message, "role": "system"}  # OpenAI's newer name of it
    return message


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    found: list[Any] = given if isinstance(given, list) else [given]
    if found and all(_is_token(one) for one in found):
        found = [found]
    prompts: list[str | tuple[int, ...]] = []
    for one in found:
        if isinstance(one, list) and one and all(_is_token(token) for token in one):
            prompts.append(tuple(one))
        elif isinstance(one, str):
            prompts.append(one)
        else:
            prompts.clear()
            break
    if not prompts:
        raise wrong("prompt", "expected a string, a list of token ids, or a list of these")
    return tuple(prompts)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST

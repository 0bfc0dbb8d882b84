"""Calls of tools in an answer, where the chat template itself says how the model writes them.

One form is read: that of Hermes, which Qwen and others have taken over, a JSON object between two marks::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A template that prints an assistant's calls so has a model that was trained to write them so. Elsewhere an
answer stays text, and so does what stands between the marks and is not a call of a tool that there is.

A call that the client demands is the whole answer, and needs no template that knows any: the text is held to
a JSON Schema of such objects, as vLLM does it (``tool_choice`` in its ``ToolParser``).
"""

from __future__ import annotations

import json
import re
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sllm.engine import chat_template
from sllm.errors import UnsupportedModelError
from sllm.generation.reasoning import starts_with

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sllm.engine.vocab import Vocab

__all__ = ["DemandedCall", "ToolCalls", "calls_schema", "writes_tool_calls"]

_BEGIN, _END = "<tool_call>", "</tool_call>"

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "A question."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00000",
                "type": "function",
                "function": {"name": "probe_tool", "arguments": {"probe_key": "probe value"}},
            }
        ],
    },
]

# As `json.dumps` writes it, and models have seen it; with more freedom, small ones get lost in spaces.
_SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}

_INNER = re.compile(r"#(?=/|$)")  # what a reference to a place in the same schema begins with

_COMBINED = frozenset({"$dynamicRef", "$ref", "allOf", "anyOf", "oneOf", "patternProperties"})


def writes_tool_calls(template: str | None, vocab: Vocab) -> bool:
    """Whether a model with this chat template writes calls in the form that is read here, in text that can
    be seen (where the marks are control tokens, they are not in it).
    """
    if template is None or not _prints_calls(template):
        return False
    marks = [vocab.encode(mark, add_special=False, parse_special=True) for mark in (_BEGIN, _END)]
    return not any(vocab.is_control(int(token)) for tokens in marks for token in tokens)


@lru_cache(maxsize=64)
def _prints_calls(template: str) -> bool:
    try:
        shown = chat_template.render(template, _PROBE, tools=[_PROBE_TOOL], add_generation_prompt=False)
    except (UnsupportedModelError, ValueError):
        return False
    # Of several, the last is the assistant's: instructions may have an example before it.
    found = re.findall(f"{_BEGIN}(.*?){_END}", shown, re.DOTALL)
    return bool(found) and _call(found[-1]) == ("probe_tool", {"probe_key": "probe value"})


def _call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call, if the text is one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return (found["name"], arguments) if isinstance(arguments, dict) else None


def calls_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON Schema of a call of one of these tools, without arguments that its parameters do not name
    unless they say that there may be others.

    Args:
        tools: n >= 1 of them, as OpenAI's API has them.

    """
    calls = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        parameters = function.get("parameters") or {"properties": {}}
        # A function has the parameters that it names. Where parts are put together, each is open to others.
        closed = {} if _COMBINED & parameters.keys() else {"additionalProperties": False}
        place = "#/properties/arguments" if len(tools) == 1 else f"#/anyOf/{i}/properties/arguments"
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"type": "object", **closed, **_moved(parameters, place)},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {**_SPACING, **(calls[0] if len(calls) == 1 else {"anyOf": calls})}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it is a part of another one, at ``place``."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _INNER.sub(place, value) if key == "$ref" and isinstance(value, str) else _moved(value, place)
        for key, value in schema.items()
    }


class DemandedCall:
    """Reads an answer that is a call and nothing else, held to :func:`calls_schema`.

    Attributes:
        n_calls: 1 when it was read.

    """

    def __init__(self) -> None:
        self._text = ""
        self.n_calls = 0

    def feed(self, text: str) -> tuple[str, list[Mapping[str, Any]]]:
        """Nothing, before all is there."""
        self._text += text
        return "", []

    def finish(self) -> tuple[str, list[Mapping[str, Any]]]:
        """The call; or the text, where that ends too soon to be one."""
        found = _call(self._text)
        if found is None:
            return self._text, []
        self.n_calls = 1
        return "", [_as_call(0, *found)]


class ToolCalls:
    """Takes the calls of tools out of a text that comes piece by piece.

    Args:
        names: of the tools that there are.

    Attributes:
        n_calls: how many were found so far.

    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._space: str | None = None  # since the last call
        self.n_calls = 0

    def feed(self, text: str) -> tuple[str, list[Mapping[str, Any]]]:
        """What of the text is certain to be none of a call, and the calls that end with it."""
        self._held += text
        shown = ""
        calls: list[Mapping[str, Any]] = []
        while True:
            before, begin, after = self._held.partition(_BEGIN)
            if not begin:
                n = len(before) - starts_with(before, (_BEGIN,))
                shown += self._between(before[:n])
                self._held = before[n:]
                return shown, calls
            inside, end, rest = after.partition(_END)
            if not end:
                shown += self._between(before)
                self._held = begin + after
                return shown, calls
            shown += self._between(before)
            found = _call(inside)
            if found is None or found[0] not in self._names:
                shown += self._between(begin + inside + end)
            else:
                calls.append(_as_call(self.n_calls, *found))
                self.n_calls += 1
                self._space = ""
            self._held = rest

    def finish(self) -> tuple[str, list[Mapping[str, Any]]]:
        """What is left at the end of the text: a call without an end is text."""
        rest, self._held = self._held, ""
        return self._between(rest), []

    def _between(self, text: str) -> str:
        """Text before, between and after calls; line ends between calls, and after the last, are no text."""
        if self._space is None:
            return text
        self._space += text
        if not self._space.strip():
            return ""
        shown, self._space = self._space, None
        return shown


def _as_call(index: int, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }

"""Calls of tools in an answer, where the chat template itself says how the model writes them.

One form is read: that of Hermes, which Qwen and others have taken over, a JSON object between two marks::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A template that prints an assistant's calls so has a model that was trained to write them so. Elsewhere an
answer stays text, and so does what stands between the marks and is not a call of a tool that there is.
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
    from collections.abc import Collection, Mapping

    from sllm.engine.vocab import Vocab

__all__ = ["ToolCalls", "writes_tool_calls"]

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
                calls.append(self._as_call(*found))
            self._held = rest

    def finish(self) -> str:
        """What is left at the end of the text: a call without an end is text."""
        rest, self._held = self._held, ""
        return self._between(rest)

    def _between(self, text: str) -> str:
        """Text before, between and after calls; line ends between calls, and after the last, are no text."""
        if self._space is None:
            return text
        self._space += text
        if not self._space.strip():
            return ""
        shown, self._space = self._space, None
        return shown

    def _as_call(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        self.n_calls += 1
        self._space = ""
        return {
            "index": self.n_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }

"""What a chat template is given: the messages in the form that it prints, and the variables it may read.

Messages come the way programs and other engines write them: keys that are null, a tool call's arguments as a
JSON text or as a mapping, reasoning under one of three names. A template was written for one of these forms.
The normal form here is that of ``transformers.apply_chat_template``; where a template cannot print that, it
gets the form that it can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm.messages import REASONING_FIELDS, MessageError, kind_of, map_texts

if TYPE_CHECKING:
    from sllm.engine.jinja_sandbox import Template
    from sllm.messages import Messages

__all__ = [
    "THINKING_OFF",
    "checked_variables",
    "continuation_tag",
    "continued_field",
    "cut_at_tag",
    "prepared",
    "tagged",
]

THINKING_OFF: dict[str, Any] = {
    "enable_thinking": False,  # Qwen3, GLM, Nemotron, Hunyuan, SmolLM3
    "thinking": False,  # Granite, DeepSeek, Kimi
    "thinking_mode": "disabled",  # MiniMax
    "thinking_option": "off",  # Ling
    "thinking_budget": 0,  # Seed
}
"""Variables by which published templates let a model answer without reasoning first, and their values."""

_ARGUMENTS = (
    "messages",
    "tools",
    "bos_token",
    "eos_token",
    "add_generation_prompt",
    "continue_final_message",
)
_FUNCTIONS = (
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "cycler",
    "joiner",
    "lipsum",
    "loop",
    "self",
    "caller",
)


def checked_variables(variables: object) -> dict[str, Any]:
    """A copy of a template's extra variables.

    Raises:
        MessageError: not a mapping, a name that belongs to the renderer, or a value that JSON cannot hold.

    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise MessageError(f"variables is {kind_of(variables)}; expected a mapping of names to values")
    checked = {}
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise MessageError(f"variables has the key {name!r}; expected names such as 'enable_thinking'")
        if name in _ARGUMENTS:
            raise MessageError(f"variables holds {name!r}, which is an argument of its own; pass it as that")
        if name in _FUNCTIONS:
            raise MessageError(f"variables holds {name!r}, which every template is given already")
        checked[name] = map_texts(value, lambda text: text, where=f"variables[{name!r}]")
    return checked


def prepared(messages: Messages, template: Template) -> list[dict[str, Any]]:
    """The messages as this template prints them; what was given is left alone.

    - A key that is None is absent. An assistant's message that has tool calls and no content keeps a None, or
      gets an empty text, where the template needs that.
    - Reasoning given as ``thinking`` or ``reasoning`` is also ``reasoning_content``, and this is also
      ``thinking``.
    - A tool call's arguments that are a JSON object as text become a mapping for a template that prints
      mappings, and a mapping becomes text for one that prints texts. A template that can print both gets them
      as they were given.
    """
    return [_prepared(message, template) for message in messages]


def _prepared(given: Mapping[str, Any], template: Template) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    calls = message.get("tool_calls")
    if "content" in message and not calls:
        return message
    form = template.tool_call_form
    if "content" not in message and form.content == "empty":
        message["content"] = ""
    elif not message.get("content") and form.content == "none":
        message["content"] = None
    if isinstance(calls, (list, tuple)):
        message["tool_calls"] = [_prepared_call(call, form.arguments) for call in calls]
    return message


def _prepared_call(given: Any, arguments: str) -> Any:
    if not isinstance(given, Mapping):
        return given
    call = {key: value for key, value in given.items() if value is not None}
    for key, value in call.items():
        if key == "function" and isinstance(value, Mapping):
            call[key] = _prepared_call(value, arguments)
        elif key == "arguments" and isinstance(value, str) and arguments == "mapping":
            call[key] = _parsed(value)
        elif key == "arguments" and isinstance(value, Mapping) and arguments == "text":
            call[key] = json.dumps(map_texts(value, lambda text: text, where=key), ensure_ascii=False)
    return call


def _parsed(text: str) -> Any:
    """The object that a JSON text is; the text itself where it is none (what a model wrote need not be)."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


# ---- a message that goes on


def continued_field(continue_final_message: bool | str, messages: Messages) -> str | None:
    """The field of the last message that the answer goes on from; None: the answer is a message of its own.

    Raises:
        MessageError: the last message is not an assistant's, or the field has no text.

    """
    if continue_final_message is False:
        return None
    field = "content" if continue_final_message is True else continue_final_message
    if not isinstance(field, str) or not field:
        raise MessageError(
            f"continue_final_message is {kind_of(field)}; expected True, or a field such as"
            " 'reasoning_content'"
        )
    last, where = messages[-1], f"messages[{len(messages) - 1}]"
    if last["role"] != "assistant":
        raise MessageError(
            f"{where}['role'] is {last['role']!r}; continue_final_message goes on with a last message of the"
            " role 'assistant'"
        )
    if not _texts(last.get(field)):
        raise MessageError(f"{where}[{field!r}] has no text; continue_final_message is to go on with it")
    return field


def _texts(value: Any) -> list[str]:
    """The texts of a field; an empty one counts."""
    if isinstance(value, str):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else []
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def continuation_tag(texts: Sequence[str]) -> str:
    """What marks the end of a message that is to go on, which none of the texts holds.

    It is transformers' own where that can be, since templates look for it. The space at its end shows whether
    the template trims what it prints.
    """
    tag, n = "CONTINUE_FINAL_MESSAGE_TAG", 1
    while any(tag in text for text in texts):
        tag, n = f"CONTINUE_FINAL_MESSAGE_TAG_{n}", n + 1
    return f"{tag} "


def tagged(message: dict[str, Any], field: str, tag: str) -> str:
    """Mark the end of a field of a message, a copy that may be changed; returns its last text."""
    fields = [field]
    if field in REASONING_FIELDS:  # the template may read any of its names
        fields = [name for name in REASONING_FIELDS if message.get(name) == message[field]]
    text = _texts(message[field])[-1]
    for name in fields:
        if isinstance(message[name], str):
            message[name] += tag
        else:
            part = next(part for part in reversed(message[name]) if isinstance(part.get("text"), str))
            part["text"] += tag
    return text


def cut_at_tag(rendered: str, text: str, tag: str) -> str | None:
    """The rendered text up to where ``text``, which :func:`tagged` returned, goes on; None where the template
    dropped or changed it.
    """
    at = rendered.rfind(tag.rstrip())
    if at < 0 or text.strip() not in rendered:
        return None
    before = rendered[:at].replace(tag, "").replace(tag.rstrip(), "")  # where the text stands twice
    if tag.rstrip().casefold() in before.casefold():
        return None  # there it is changed
    return before if rendered.startswith(tag, at) else before.rstrip()

"""Chat messages: checked, walked over, and written as one text.

The one place that knows how a conversation is built: what chat templates and OpenAI's API take, a list of
mappings, each with a ``"role"`` and a ``"content"``, which is a text, a list of
``{"type": "text", "text": ...}`` parts, or None beside ``"tool_calls"``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = [
    "REASONING_FIELDS",
    "ChatOptions",
    "MessageError",
    "Messages",
    "NotTextError",
    "checked_mappings",
    "checked_messages",
    "conversation_text",
    "kind_of",
    "map_texts",
    "text_parts",
    "texts_of",
]

Messages = Sequence[Mapping[str, Any]]
"""A conversation in the form that chat templates and OpenAI's API take."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which programs pass an assistant's reasoning; the first is the one that most templates read."""


class ChatOptions(TypedDict, total=False):
    """The options of :meth:`sllm.Model.chat`, which says what they mean; the ``chat`` of a connection or a
    target takes them, too.
    """

    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None
    continue_final_message: bool | str
    add_generation_prompt: bool


_MAX_DEPTH = 64

_FORMAT_VALUES = frozenset(["role", "type", "id", "tool_call_id", "index", "object", "finish_reason"])
"""Fields whose values are names of the format and not said by anybody."""

_FORMAT_FIELDS = _FORMAT_VALUES | {"arguments", "content", "function", "name", "text", "tool_calls"}
"""Fields that the format itself has; other keys are texts of the conversation (a tool's arguments)."""

_DATA_FIELDS = frozenset(["arguments", "content", "input"])
"""Fields whose value, where it is a mapping, is all data: an ``"id"`` in it is somebody's and not a
message's.
"""


class MessageError(TypeError, ValueError):
    """Malformed messages. A TypeError and a ValueError, for there are callers that promise either."""


class NotTextError(ValueError):
    """A conversation that cannot be written as one text; the message may be shown, it quotes nothing."""


# ---- checks ------------------------------------------------------------------------------------------------


def checked_mappings(value: object, name: str, of: str) -> Messages:
    """``value``, if it is a sequence of mappings.

    Args:
        value: anything.
        name: what to call it in an error.
        of: what the mappings are, for an error.

    Raises:
        MessageError: it is not.

    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise MessageError(f"{name} is {kind_of(value)}; expected a list of {of}")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise MessageError(f"{name}[{i}] is {kind_of(item)}; expected {name} to be a list of {of}")
    return value


def checked_messages(messages: object, *, contents: bool = False) -> Messages:
    """The messages, if they are mappings with a role and a content, and at least one.

    Args:
        messages: anything.
        contents: also check that each role has a name and each content is text.

    Raises:
        MessageError: they are not.

    """
    checked = checked_mappings(messages, "messages", "mappings with 'role' and 'content'")
    if not checked:
        raise MessageError("messages is empty; expected at least one message")
    for i, message in enumerate(checked):
        role = message.get("role")
        if not isinstance(role, str) or (contents and not role):
            raise MessageError(f"messages[{i}]['role'] is {kind_of(role)}; expected a string such as 'user'")
        if contents:
            _check_content(message, f"messages[{i}]['content']")
        elif "content" not in message and "tool_calls" not in message:
            raise MessageError(f"messages[{i}] has no content")
    return checked


def _check_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    others = ("tool_calls", *REASONING_FIELDS)
    if isinstance(content, str) or (content is None and any(message.get(name) for name in others)):
        return
    if not isinstance(content, (list, tuple)):
        raise MessageError(
            f"{where} is {kind_of(content)}; expected a string or a list of text parts"
            " (None only beside 'tool_calls' or 'reasoning_content')"
        )
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            what = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else kind_of(part)
            raise MessageError(
                f"{where}[{i}] is {what}; expected {{'type': 'text', 'text': ...}},"
                " the only kind of part that is supported"
            )
        if not isinstance(part.get("text"), str):
            raise MessageError(f"{where}[{i}]['text'] is {kind_of(part.get('text'))}; expected a string")


def kind_of(value: object) -> str:
    """What a value is, for an error that must not quote it."""
    if value is None:
        return "missing or None"
    if value == "":
        return "an empty string"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---- every text in messages --------------------------------------------------------------------------------


def map_texts(
    value: Any,
    change: Callable[[str], str],
    *,
    format_names: bool = True,
    change_number: Callable[[str], str] | None = None,
    check_mapping: Callable[[Mapping[str, Any]], object] | None = None,
    where: str | None = None,
) -> Any:
    """A copy of messages, made of dicts, lists and scalars, in which every text is replaced.

    Texts are all strings: contents, parts, tool calls and other fields, and the keys of mappings. ``change``
    gets them in a fixed order, a key before its value, so that two calls on the same messages see the same
    texts one after the other.

    Args:
        value: messages, one message, or any part of one.
        change: called with each text; returns what stands in its place.
        format_names: whether ``change`` also gets what belongs to the format and is not said by anybody:
            roles, types and ids, and the keys that the format has. False: these stay as they are, but not in
            the arguments of tools and in contents that are mappings, where nothing is of the format.
        change_number: called with each number, as text; one whose text changes becomes that text. None:
            numbers stay as they are.
        check_mapping: called with each mapping before anything in it; raises to refuse a part.
        where: how to name ``value`` in an error, which then names the place by its keys; None: an error
            quotes no key, for keys may be private, too.

    Raises:
        MessageError: something that JSON cannot hold, or nested more than 64 levels deep; and what ``change``
            and ``check_mapping`` raise.

    """
    return _Walk(change, format_names, change_number, check_mapping).copy(value, "", where, 0)


def texts_of(
    value: Any,
    *,
    format_names: bool = True,
    numbers: bool = False,
    check_mapping: Callable[[Mapping[str, Any]], object] | None = None,
) -> list[str]:
    """Every text in messages, in the order in which :func:`map_texts` replaces them.

    Raises:
        MessageError: as :func:`map_texts`.

    """
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    map_texts(
        value,
        note,
        format_names=format_names,
        change_number=note if numbers else None,
        check_mapping=check_mapping,
    )
    return texts


@dataclass(frozen=True)
class _Walk:
    """One walk of :func:`map_texts`."""

    change: Callable[[str], str]
    format_names: bool
    change_number: Callable[[str], str] | None
    check_mapping: Callable[[Mapping[str, Any]], object] | None

    def copy(self, value: object, field: str, where: str | None, depth: int) -> Any:
        """A copy of a value; ``field`` is the key under which it stands, in a list too, or empty."""
        kept = not self.format_names and field in _FORMAT_VALUES
        if isinstance(value, str):
            # The characters of a subclass (an Enum, say), whatever it prints as.
            return value if kept else self.change(str.__str__(value))
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float)):
            return self._number(value)
        if depth == _MAX_DEPTH:
            what = "a message" if where is None else f"{where[:60]}..."
            raise MessageError(f"{what} is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            if self.check_mapping is not None:
                self.check_mapping(value)
            if not self.format_names and field in _DATA_FIELDS:
                return dataclasses.replace(self, format_names=True).copy(value, field, where, depth)
            return {
                self._key(key, where): self.copy(item, key, where and f"{where}[{key!r}]", depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
            return [
                self.copy(item, field if kept else "", where and f"{where}[{i}]", depth + 1)
                for i, item in enumerate(value)
            ]
        raise _bad(value, where, "is")

    def _number(self, value: float) -> float | str:
        if self.change_number is None:
            return value
        text = str(value)
        changed = self.change_number(text)
        return value if changed == text else changed

    def _key(self, key: object, where: str | None) -> str:
        if not isinstance(key, str):
            raise _bad(key, where, "has a key that is")
        if not self.format_names and key in _FORMAT_FIELDS:
            return key
        return self.change(str.__str__(key))


def _bad(value: object, where: str | None, verb: str) -> MessageError:
    if where is None:
        return MessageError(
            f"a message holds a {type(value).__name__};"
            " expected text, numbers, lists and mappings with text keys"
        )
    expected = "what JSON can hold" if verb == "is" else "strings"
    return MessageError(f"{where} {verb} {kind_of(value)}; expected {expected}")


# ---- as one text -------------------------------------------------------------------------------------------


def text_parts(content: object) -> list[str]:
    """The texts of a message's content, which is a text, or a list of texts and text parts.

    Raises:
        NotTextError: something else, such as an image.

    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise NotTextError(f"a message's content is {type(content).__name__}, expected text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise NotTextError("a part of a message is no text")
        texts.append(text)
    return texts


def conversation_text(messages: Messages) -> str:
    """The conversation as one text: what the user says as it is, everything else with its role.

    Args:
        messages: as :func:`checked_messages` returns them.

    Raises:
        NotTextError: a part that is not text, text that is not valid Unicode, or none at all.

    """
    lines = []
    for message in messages:
        role, content = message["role"], message.get("content")
        # What else a message carries leaves the machine with it, so it is judged with it.
        more = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content") and value is not None
        }
        if more:
            lines.append(f"{role}: {json.dumps(more, ensure_ascii=False)}")
        if content is not None:
            lines += [text if role == "user" else f"{role}: {text}" for text in text_parts(content)]
    whole = "\n".join(lines).rstrip()
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise NotTextError("the text is no valid Unicode") from None
    if not whole:
        raise NotTextError("there is no text")
    return whole

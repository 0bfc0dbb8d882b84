"""Messages of a chat: checked, and walked over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Messages", "checked_messages"]

Messages = Sequence[Mapping[str, Any]]
"""A conversation in the form that chat templates and OpenAI's API take."""


class _Refusal(Exception):  # noqa: N818 - no error: a reason to fail closed
    """Why a request cannot be judged; the text may be shown."""


def checked_messages(messages: Messages) -> list[Mapping[str, Any]]:
    """The messages, if they are mappings with a role and a content, and at least one.

    Raises:
        TypeError, ValueError: they are not.

    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages is {type(messages).__name__}, expected a list of mappings with role and content"
        )
    if not messages:
        raise ValueError("messages is empty, expected at least one")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] is {type(message).__name__}, expected a mapping")
        role = message.get("role")
        if not isinstance(role, str):
            raise ValueError(f"messages[{i}] has the role {role!r}, expected a text")
        if not {"content", "tool_calls"} & set(message):
            raise ValueError(f"messages[{i}] has no content")
        found.append(message)
    return found


def _text(messages: list[Mapping[str, Any]]) -> str:
    """The conversation as one text: what the user says as it is, everything else with its role."""
    lines = []
    for message in messages:
        role, content = message["role"], message.get("content")
        # What else a message carries leaves the machine with it, so it is judged with it.
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        if more:
            lines.append(f"{role}: {json.dumps(more, ensure_ascii=False)}")
        if content is None:
            continue
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise _Refusal(f"a message's content is {type(content).__name__}, and only text is judged")
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
            if not isinstance(text, str):
                raise _Refusal("a part of a message is no text")
            lines.append(text if role == "user" else f"{role}: {text}")
    whole = "\n".join(lines).rstrip()
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise _Refusal("the text is no valid Unicode") from None
    if not whole:
        raise _Refusal("there is no text")
    return whole

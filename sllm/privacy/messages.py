"""The texts of chat messages, replaced one by one: the only place that knows how messages are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sllm.errors import LeakError

__all__ = ["replace_texts"]

# Keys of a message, and of its parts, whose values are names of the format.
_STRUCTURE = frozenset(["role", "type", "id", "tool_call_id", "index", "object", "finish_reason"])
# Keys that are names of the format themselves.
_FIELDS = frozenset(["arguments", "content", "function", "name", "text", "tool_calls"])
# Kinds of parts that are not text.
_OPAQUE = ("image", "input_image", "audio", "input_audio", "file", "video")


def replace_texts(value: Any, each: Callable[[str], str | None], key: str = "") -> Any:
    """A copy of a message with every text in it replaced by what ``each`` returns for it.

    Args:
        value: the message, or a value within it.
        each: called for the texts in a fixed order, numbers written out among them. A caller that only
            collects them returns None and drops the copy.
        key: under which the value stands in its mapping.

    Raises:
        LeakError: a part that is not text, such as an image.
        TypeError: a value of a type that messages do not have.

    """
    if isinstance(value, str):
        return value if key in _STRUCTURE else each(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        text = each(str(value))
        return value if text is None or text == str(value) else text
    if isinstance(value, Mapping):
        kind = value.get("type")
        if isinstance(kind, str) and kind.startswith(_OPAQUE):
            raise LeakError(
                f"a message has a part of type {kind}, which cannot be searched; only text can be masked"
            )
        return {_key(name, each): replace_texts(item, each, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_texts(item, each, key if key in _STRUCTURE else "") for item in value]
    return _wrong_type(value)


def _key(name: object, each: Callable[[str], str | None]) -> Any:
    if not isinstance(name, str):
        return _wrong_type(name)
    return name if name in _STRUCTURE or name in _FIELDS else each(name)


def _wrong_type(value: object) -> NoReturn:
    raise TypeError(
        f"a message holds a {type(value).__name__}; expected text, numbers, lists and mappings with text keys"
    )

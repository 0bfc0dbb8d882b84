"""Chat templates: messages in, the text that the model was trained on out.

The template is the Jinja2 text in a GGUF's ``tokenizer.chat_template``. It is rendered as transformers and
llama.cpp do, in Jinja2's sandbox, with limits on what it may loop, call and print: it comes with a downloaded
file and is not trusted. (It is no jail for memory: a hostile template can still waste some.)

:func:`render` gives the text. :func:`segments` gives the same text cut so that a user who types
``<|im_end|>`` has typed ten characters and not ended a turn. jinja2 is imported on first use, so that
importing sllm stays fast.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm.engine.chat_inputs import (
    checked_variables,
    continued_field,
    cut_at_continuation,
    prepared,
    tagged,
)
from sllm.errors import UnsupportedModelError
from sllm.messages import checked_mappings, checked_messages, kind_of, map_texts

if TYPE_CHECKING:
    from sllm.engine.jinja_sandbox import Template

__all__ = ["render", "segments"]

_log = logging.getLogger("sllm.chat_template")


_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    continue_final_message: bool | str = False,
) -> str:
    """Return the prompt text for a conversation.

    ``template`` is the Jinja2 text; ``messages`` the conversation, each message a mapping with a ``"role"``
    and a ``"content"``: a string, or a list of ``{"type": "text", "text": ...}`` parts; it may be None beside
    ``"tool_calls"``. Parts are joined by line ends for a template that knows strings only. ``bos_token`` and
    ``eos_token`` are the texts of those tokens, for the templates that print them. ``add_generation_prompt``
    ends the text where the assistant's answer begins. ``tools`` are JSON schemas for the templates that take
    tools, and ``variables`` whatever else a template documents, such as ``{"enable_thinking": False}``.

    Raises ValueError when an argument is malformed, before the template sees it, and UnsupportedModelError
    when there is no template or it cannot be rendered: a syntax error, a refusal (``raise_exception``), an
    operation that the sandbox forbids, an endless loop. Both say what was found, in one line.
    """
    request = _Request(
        template,
        messages,
        bos_token,
        eos_token,
        add_generation_prompt,
        tools,
        variables,
        continue_final_message,
    )
    return request.render(_same)


def segments(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    special_pieces: Iterable[str],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    continue_final_message: bool | str = False,
) -> list[tuple[str, bool]]:
    """Return the prompt text as ``(text, parse_special)`` segments, a guard against prompt injection.

    ``special_pieces`` are the texts of the vocabulary's control tokens. Where the template wrote one, its
    segment has ``parse_special`` True and the tokenizer makes a token of it; where it came from the messages
    or the tools (any string in them: contents, names, arguments, keys), it stands alone in a segment with
    False and is tokenized as plain text. A text without such pieces is one segment, so its tokens are those
    of :func:`render`.

    The segments' texts joined are :func:`render`'s, with one exception: a template that itself looks for a
    control token in a message does not find it there. A token that the template puts together from a literal
    and a message (``'<|' + role + '|>'``) counts as the template's. The other arguments and the exceptions
    are those of :func:`render`; ValueError also when ``special_pieces`` is not an iterable of strings.
    """
    request = _Request(
        template,
        messages,
        bos_token,
        eos_token,
        add_generation_prompt,
        tools,
        variables,
        continue_final_message,
    )
    pieces = _pieces(special_pieces)
    plain = request.render(_same)
    if not plain:
        return []
    from_messages = "\n".join(request.strings)
    starts = {piece[0] for piece in pieces} & set(from_messages)
    if not starts:
        return [(plain, True)]

    # Characters of the messages are exchanged for private-use ones that occur nowhere, the text is rendered,
    # and the characters are changed back: what was exchanged came from a message. One for one, so that a
    # template may cut, trim and measure.
    #
    # At first every character that a piece could start with: that catches pieces which come about by
    # rendering (two parts set side by side, something between them cut out). A template that looks at such
    # characters ("<think>") prints something else then; for it only whole pieces are exchanged.
    lengths = sorted({len(piece) for piece in pieces}, reverse=True)
    exchange = _exchange(starts, (plain, from_messages, template or ""))
    try:
        marked = request.render(lambda string: string.translate(exchange))
    except UnsupportedModelError:
        marked = ""
    text = _changed_back(marked, exchange)
    if text != plain:
        _log.debug("the chat template looks into the messages' text; only whole pieces are guarded in it")
        found = (_piece_at(from_messages, i, pieces, lengths) for i in range(len(from_messages)))
        present = sorted({piece for piece in found if piece}, key=len, reverse=True)
        if not present:
            return [(plain, True)]
        whole = re.compile("|".join(map(re.escape, present)))
        exchange = _exchange(set("".join(present)), (plain, from_messages, template or ""))
        marked = request.render(lambda string: whole.sub(lambda match: match[0].translate(exchange), string))
        text = _changed_back(marked, exchange)

    # A piece that begins with an exchanged character is set apart; pieces that touch or overlap, together.
    result: list[tuple[str, bool]] = []
    secret = set(map(chr, exchange.values()))
    done = first = last = 0  # what is cut already, and the span of pieces after it that is being collected
    for start, char in enumerate(marked):
        piece = _piece_at(text, start, pieces, lengths) if char in secret else ""
        if not piece:
            continue
        if start > last:
            result += [(text[done:first], True), (text[first:last], False)]
            done, first = last, start
        last = max(last, start + len(piece))
    result += [(text[done:first], True), (text[first:last], False), (text[last:], True)]
    return [segment for segment in result if segment[0]]


def _pieces(special_pieces: Iterable[str]) -> set[str]:
    """The special pieces without doubles and without the empty ones, which some vocabularies have."""
    pieces: set[object] = {None} if isinstance(special_pieces, str) else set(special_pieces)
    texts = {piece for piece in pieces if isinstance(piece, str)}
    if len(texts) < len(pieces):
        raise ValueError("special_pieces must be a list of strings, and is or holds something else")
    return texts - {""}


def _piece_at(text: str, start: int, pieces: set[str], lengths: Iterable[int]) -> str:
    """The longest of the pieces that stands in the text at ``start``, or nothing; ``lengths`` are falling."""
    for length in lengths:
        piece = text[start : start + length]
        if piece in pieces:
            return piece
    return ""


def _changed_back(marked: str, exchange: Mapping[int, int]) -> str:
    return marked.translate({new: old for old, new in exchange.items()})


def _exchange(chars: set[str], texts: Iterable[str]) -> dict[int, int]:
    """A table for str.translate: each character to a private-use one that occurs in none of the texts."""
    taken = {ord(char) for text in texts for char in set(text)}
    free = (code for codes in _PRIVATE_USE for code in codes if code not in taken)
    return {ord(char): next(free) for char in sorted(chars)}


def _same(text: str) -> str:
    return text


class _Request:
    """The checked arguments of one call; ``render`` renders them with each string of the messages changed."""

    def __init__(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        bos_token: str,
        eos_token: str,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        continue_final_message: bool | str,
    ) -> None:
        checked_messages(messages, contents=True)
        if tools is not None:
            checked_mappings(tools, "tools", "mappings (JSON schemas)")
        self._continued = continued_field(continue_final_message, messages)
        # transformers gives every template tools and documents, and templates ask whether they are none.
        self._variables: dict[str, Any] = {"documents": None, **checked_variables(variables)}
        self._variables |= {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt and self._continued is None,
        }
        map_texts(messages, _same, where="messages")  # what cannot be copied is refused as it was given
        self._template = _compile(template)
        self._messages = prepared(messages, self._template)
        self._tools = tools
        self.strings: list[str] = []
        self._copies(self._note)

    def render(self, change: Callable[[str], str]) -> str:
        messages, tools = self._copies(change)
        text = "" if self._continued is None else tagged(messages[-1], self._continued)
        for message in messages:
            if "content" in message:
                message["content"] = self._template.shaped(message["content"])
        rendered = self._template.render({**self._variables, "messages": messages, "tools": tools})
        if self._continued is None:
            return rendered
        begun = cut_at_continuation(rendered, text)
        if begun is None:
            raise UnsupportedModelError(
                f"the model's chat template drops or changes the last message's {self._continued!r},"
                " so no answer can go on from it"
            )
        return begun

    def _copies(self, change: Callable[[str], str]) -> tuple[Any, Any]:
        messages = map_texts(self._messages, change, where="messages")
        return messages, None if self._tools is None else map_texts(self._tools, change, where="tools")

    def _note(self, text: str) -> str:
        self.strings.append(text)
        return text


def _compile(template: str | None) -> Template:
    if template is None or template == "":
        raise UnsupportedModelError(
            "the model has no chat template (tokenizer.chat_template is missing or empty);"
            " give it plain text, or a template of your own"
        )
    if not isinstance(template, str):
        raise ValueError(f"template is {kind_of(template)}; expected Jinja2 text")
    return _compiled(template)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    from sllm.engine.jinja_sandbox import Template  # jinja2 takes a third of the time of `import sllm`

    return Template(template)

"""Chat templates: messages in, the text that the model was trained on out.

The template is the Jinja2 text in a GGUF's ``tokenizer.chat_template``. It is rendered as transformers and
llama.cpp do, in Jinja2's sandbox, with a budget of steps, of memory and of what it looks at: it comes with a
downloaded file and is not trusted. Whatever it does, it is stopped within about a second, and takes some tens
of megabytes at most, and more only for long conversations (:mod:`sllm.engine.jinja_budget`).

:func:`render` gives the text. :func:`segments` gives the same text cut so that a user who types
``<|im_end|>`` has typed ten characters and not ended a turn. jinja2 is imported on first use, so that
importing sllm stays fast.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm.engine.chat_guard import Marks, checked_pieces, cut, pieces_in
from sllm.engine.chat_inputs import (
    THINKING_OFF,
    checked_variables,
    continuation_tag,
    continued_field,
    cut_at_tag,
    prepared,
    tagged,
)
from sllm.errors import UnsupportedModelError
from sllm.messages import checked_mappings, checked_messages, kind_of, map_texts

if TYPE_CHECKING:
    from sllm.engine.jinja_sandbox import Template

__all__ = ["literals_of", "render", "segments", "thinking_off"]

_log = logging.getLogger("sllm.chat_template")


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
    operation that the sandbox forbids, or more than its budget. Both say what was found, in one line.
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
    segment has ``parse_special`` True and the tokenizer makes a token of it; where it came from the
    messages, the tools or the variables (any string in them: contents, names, arguments, keys), it stands
    alone in a segment with False and is tokenized as plain text. A text without such pieces is one segment,
    so its tokens are those of :func:`render`.

    The segments' texts joined are :func:`render`'s. A token that the template puts together around a role
    (``'<|' + role + '|>'``) counts as the template's. The other arguments and the exceptions are those of
    :func:`render`; ValueError also when ``special_pieces`` is not an iterable of strings, and
    UnsupportedModelError also when a template that changes its own literals (``'<|im_end|>' | urlencode``)
    is given messages with control tokens in them.
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
    pieces = checked_pieces(special_pieces)
    plain = request.render(_same)
    if not plain or not pieces:
        return [(plain, True)] if plain else []
    literals = "".join([*request.literals, bos_token, eos_token])
    marks = Marks.free_in(pieces, literals, (plain, *request.strings))
    if marks is not None:
        try:
            marked = request.render(_same, marks)
        except UnsupportedModelError as error:
            marked = ""
            _log.debug("marked, %s", error)
        if marked.translate(marks.back) == plain:
            # What may stand inside a control token that the template puts together: a role, a word of its.
            return cut(plain, marked, marks, [*request.roles, *request.literals])

    # The template does something to its own literals that it does not do to the marks. It is read as it is
    # if nothing in the messages makes a difference to which control tokens come out.
    starts = str.maketrans({piece[0]: "_" for piece in pieces})
    without = request.render(lambda string: string.translate(starts))
    found = [[text[i:j] for i, j in pieces_in(text, pieces)] for text in (plain, without)]
    if found[0] != found[1]:
        raise UnsupportedModelError(
            "the model's chat template treats its own control tokens in a way that does not let them be told"
            f" from {found[0][0] if found[0] else found[1][0]!r} in a message; take that out of the messages"
        )
    return [(plain, True)]


def literals_of(template: str | None) -> list[str]:
    """What is written in a template, as text or as strings.

    Raises:
        UnsupportedModelError: there is none, or it does not compile.

    """
    return _compile(template).literals


def thinking_off(template: str | None) -> dict[str, Any]:
    """The variables that tell this template to let the model answer without reasoning first, for
    ``variables``; none where it reads no such variable, or there is no template.

    Raises:
        UnsupportedModelError: the template has a syntax error.

    """
    if not template:
        return {}
    read = _compile(template).variables
    return {name: value for name, value in THINKING_OFF.items() if name in read}


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
        self.literals = self._template.literals
        self.roles = [message["role"] for message in messages]
        self._messages = prepared(messages, self._template)
        self._tools = tools
        self.strings: list[str] = []
        self._copies(self._note)
        self._tag = continuation_tag(self.strings)

    def render(self, change: Callable[[str], str], marks: Marks | None = None) -> str:
        messages, tools = self._copies(change)
        text = "" if self._continued is None else tagged(messages[-1], self._continued, self._tag)
        for message in messages:
            if "content" in message:
                message["content"] = self._template.shaped(message["content"])
        given = {**self._variables, "messages": messages, "tools": tools}
        if marks is None:
            rendered = self._template.render(given)
        else:
            own = {name: marks.mark(given[name]) for name in ("bos_token", "eos_token")}
            rendered = _compiled(self._template.text, marks).render({**given, **own})
        if self._continued is None:
            return rendered
        begun = cut_at_tag(rendered, text, self._tag)
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
def _compiled(template: str, marks: Marks | None = None) -> Template:
    from sllm.engine.jinja_sandbox import Template  # jinja2 takes a third of the time of `import sllm`

    return Template(template, marks)

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
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm.engine.messages import checked_mappings, checked_messages, kind_of, map_texts
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["render", "segments"]

_log = logging.getLogger("sllm.chat_template")

# Far above what a conversation needs, far below what hurts.
_MAX_STEPS = 100_000  # loop rounds and calls,
_MAX_STEPS_PER_MESSAGE = 2_000  # and so many more for each message
_MAX_CHARS = 1 << 25  # printed, or in any one string
_MAX_WIDTH = 1_000_000  # a number given to what pads and repeats
_MAX_BITS = 4096  # of a product or a power

# Where the budget lies among a template's variables; no template can spell a name with a space in it.
_BUDGET = "sllm budget"

# In a format string: a number of seven digits, or a width that is given as an argument.
_WIDTH = re.compile(r"\d{7}|%[-+ #0]*[\d.]*\*")

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
    request = _Request(template, messages, bos_token, eos_token, add_generation_prompt, tools, variables)
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
    request = _Request(template, messages, bos_token, eos_token, add_generation_prompt, tools, variables)
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
    ) -> None:
        checked_messages(messages, contents=True)
        if tools is not None:
            checked_mappings(tools, "tools", "mappings (JSON schemas)")
        self._messages = messages
        self._tools = tools
        # transformers gives every template tools and documents, and templates ask whether they are none.
        self._variables: dict[str, Any] = {"documents": None}
        own = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
        for name, value in (variables or {}).items():
            if name in own or name in ("messages", "tools"):
                raise ValueError(
                    f"variables holds {name!r}, which is an argument of its own; pass it as that"
                )
            self._variables[name] = map_texts(value, _same, where=f"variables[{name!r}]")
        self._variables |= own
        self.strings: list[str] = []
        self._copies(self._note)
        self._template = _compile(template)

    def render(self, change: Callable[[str], str]) -> str:
        messages, tools = self._copies(change)
        for message in messages:
            if "content" in message:
                message["content"] = self._template.shaped(message["content"])
        return self._template.render({**self._variables, "messages": messages, "tools": tools})

    def _copies(self, change: Callable[[str], str]) -> tuple[Any, Any]:
        messages = map_texts(self._messages, change, where="messages")
        return messages, None if self._tools is None else map_texts(self._tools, change, where="tools")

    def _note(self, text: str) -> str:
        self.strings.append(text)
        return text


class _RefusalError(Exception):
    """The template called ``raise_exception``."""


class _LimitError(Exception):
    """The template would take too long or grow too large."""


class _Budget:
    """What one rendering has left."""

    def __init__(self, n_messages: int) -> None:
        self._max_steps = self._steps = _MAX_STEPS + n_messages * _MAX_STEPS_PER_MESSAGE
        self._chars = _MAX_CHARS

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise _LimitError(f"more than {self._max_steps} loop rounds and calls")

    def write(self, text: str) -> None:
        self._chars -= len(text)
        if self._chars < 0:
            raise _LimitError(f"more than {_MAX_CHARS} characters printed")


class _Template:
    """A compiled template, and which kinds of message content it can print."""

    def __init__(self, text: str) -> None:
        from jinja2 import TemplateSyntaxError, nodes

        environment = _environment()
        try:
            tree = environment.parse(text)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "sllm_counted", [], [], None, None, lineno=loop.lineno)
            for concat in list(tree.find_all(nodes.Concat)):
                parts = nodes.List(concat.nodes, lineno=concat.lineno)
                concat.nodes = [nodes.Filter(parts, "sllm_joined", [], [], None, None, lineno=concat.lineno)]
            self._compiled = environment.from_string(tree)
        except TemplateSyntaxError as error:
            told = f"has a syntax error in line {error.lineno}: {_told(error)}"
            raise UnsupportedModelError(f"the model's chat template {told}") from error
        # The parser and Python's compiler have limits of their own (of nesting, say), each with its own
        # error.
        except Exception as error:
            raise UnsupportedModelError(
                f"the model's chat template does not compile: {_told(error)}"
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        budget = _Budget(len(variables["messages"]))
        chunks = []
        try:
            for chunk in self._compiled.generate({**variables, _BUDGET: budget}):
                budget.write(chunk)
                chunks.append(chunk)
        # A template is a program, which can fail in any way.
        except Exception as error:
            raise UnsupportedModelError(f"the model's chat template {_failure(error)}") from error
        return "".join(chunks)

    def shaped(self, content: Any) -> Any:
        """The content in the form that this template prints: most know strings only, a few parts only."""
        if isinstance(content, list) and not self._prints_parts:
            return "\n".join(part["text"] for part in content)
        if isinstance(content, str) and not self._prints_strings and self._prints_parts:
            return [{"type": "text", "text": content}]
        return content

    @functools.cached_property
    def _prints_strings(self) -> bool:
        return "probe" in self._probe("probe")

    @functools.cached_property
    def _prints_parts(self) -> bool:
        printed = self._probe([{"type": "text", "text": "probe"}])
        # A list shown as Python or JSON would write it is not what the model was trained on.
        return "probe" in printed and "'text'" not in printed and '"text"' not in printed

    def _probe(self, content: object) -> str:
        message = {"role": "user", "content": content}
        given = {"bos_token": "", "eos_token": "", "add_generation_prompt": False}
        try:
            return self.render({**given, "messages": [message], "tools": None, "documents": None})
        except UnsupportedModelError:
            return ""


def _failure(error: Exception) -> str:
    """Why a template could not be rendered, in one line."""
    if isinstance(error, _RefusalError):
        return f"refuses these messages: {_told(error)}"
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    what = "was stopped" if isinstance(error, _LimitError) else "failed"
    where = f" in line {lines[-1]}" if lines else ""
    return f"{what}{where}: {_told(error)}"


def _told(error: Exception) -> str:
    """An exception's text on one line of bounded length, with its type where that says something."""
    from jinja2 import TemplateSyntaxError

    text = str(error.message if isinstance(error, TemplateSyntaxError) else error)
    text = " ".join(text.split())[:300]
    if isinstance(error, (_RefusalError, _LimitError, TemplateSyntaxError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _compile(template: str | None) -> _Template:
    if template is None or template == "":
        raise UnsupportedModelError(
            "the model has no chat template (tokenizer.chat_template is missing or empty);"
            " give it plain text, or a template of your own"
        )
    if not isinstance(template, str):
        raise ValueError(f"template is {kind_of(template)}; expected Jinja2 text")
    return _compiled(template)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> _Template:
    return _Template(template)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers renders chat templates in, with limits."""
    from datetime import datetime
    from types import BuiltinMethodType

    from jinja2 import pass_context
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which tells a trainer what the model wrote; here it is its body."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            _check_growth(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
            __context.parent[_BUDGET].step()
            method = getattr(__obj, "__wrapped__", __obj)  # str.format comes in the sandbox's wrapping
            if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, (str, int)):
                _check_numbers(*args, *options.values())
            return super().call(__context, __obj, *args, **options)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_widths(value.__self__)
            return wrapped

    @pass_context
    def printed(context: Context, value: Any) -> Any:
        if isinstance(value, str):
            context.parent[_BUDGET].write(value)
        return value

    @pass_context
    def counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
        budget = context.parent[_BUDGET]
        for item in items:
            budget.step()
            yield item

    def joined(parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def formatted(form: Any, *args: Any, **options: Any) -> Any:
        _check_widths(form)
        return python_format(form, *args, **options)

    def raise_exception(message: object) -> None:
        raise _RefusalError(message)

    def strftime_now(form: str) -> str:
        _check_widths(form)
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Not Jinja2's own, which writes & < > ' as escapes for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            _check_numbers(*args, *options.values())
            return function(*args, **options)

        return checked

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printed,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    filters = environment.filters
    filters.update(tojson=tojson, sllm_counted=counted, sllm_joined=joined)
    for name in ("batch", "center", "indent", "slice", "wordwrap"):
        filters[name] = bounded(filters[name])
    python_format = filters["format"]
    filters["format"] = formatted
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def _check_growth(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be huge."""
    if operator == "%" and isinstance(left, str):
        _check_widths(left)
    elif isinstance(left, int) and isinstance(right, int):
        if operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise _LimitError(f"a number of {bits} bits, where {_MAX_BITS} is the most")
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _check_size(len(left) + len(right))
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if hasattr(items, "__len__") and isinstance(times, int):
                _check_size(len(items) * times)


def _check_size(size: int) -> None:
    if size > _MAX_CHARS:
        raise _LimitError(f"a value of size {size}, where {_MAX_CHARS} is the most")


def _check_numbers(*values: Any) -> None:
    """Refuse numbers that can only be meant to make something huge: widths and counts."""
    for value in values:
        if isinstance(value, int) and value > _MAX_WIDTH:
            raise _LimitError(f"a width or count of {value}, where {_MAX_WIDTH} is the most")


def _check_widths(form: object) -> None:
    if _WIDTH.search(str(form)):
        raise _LimitError("a format that asks for a huge width")

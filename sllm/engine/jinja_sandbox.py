"""Jinja2's sandbox for chat templates, with limits on what a template may loop, call and print.

A template comes with a downloaded file and is not trusted. Jinja2 is what transformers renders templates
with, and what they are written for. minijinja, which counts steps and bounds memory by itself, was tried
against it on the 70 templates that llama.cpp tests with, six conversations each: it fails on those of
Qwen3-Coder and Nemotron (``none is iterable`` is true there), and prints None, indented JSON and escapes in
other ways in seven more, which would change prompts without a word.
"""

from __future__ import annotations

import functools
import json
import re
import traceback
from dataclasses import dataclass
from datetime import datetime
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta, nodes, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from sllm.engine.chat_guard import Marks

__all__ = ["Template", "ToolCallForm"]

# Far above what a conversation needs, far below what hurts.
_MAX_STEPS = 100_000  # loop rounds and calls,
_MAX_STEPS_PER_MESSAGE = 2_000  # and so many more for each message
_MAX_CHARS = 1 << 25  # printed, or in any one string
_MAX_WIDTH = 1_000_000  # a number given to what pads and repeats
_MAX_BITS = 4096  # of a product or a power

# Where the budget lies among a template's variables; no template can spell a name with a space in it.
_BUDGET = "sllm budget"

# Where the marks lie that stand for control tokens, see chat_guard.
_MARKS = "sllm marks"

# Methods of texts that look for their arguments in them.
_SEARCHES = frozenset(
    [
        *("count", "endswith", "find", "index", "rfind", "rindex", "startswith"),
        *("lstrip", "removeprefix", "removesuffix", "replace", "rstrip", "strip"),
        *("partition", "rpartition", "rsplit", "split"),
    ]
)

# In a format string: a number of seven digits, or a width that is given as an argument.
_WIDTH = re.compile(r"\d{7}|%[-+ #0]*[\d.]*\*")


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


_NO_CONTENT = ("absent", "none", "empty")
"""What may stand for the content of a message that has tool calls alone, in the order of preference."""


@dataclass(frozen=True)
class ToolCallForm:
    """How a template wants an assistant's message with tool calls.

    Attributes:
        content: what stands for a content that there is not: ``"absent"``, ``"none"`` or ``"empty"``.
        arguments: ``"mapping"``, ``"text"`` (JSON), or ``"either"``.

    """

    content: str
    arguments: str


class Template:
    """A compiled template, and which forms of messages it can print.

    Attributes:
        text: the Jinja2 text.
        literals: what is written in it, as text or as a string.

    """

    def __init__(self, text: str, marks: Marks | None = None) -> None:
        self.text = text
        self._marks = marks
        environment = _environment()
        try:
            tree = environment.parse(text)
            self.literals = [node.data for node in tree.find_all(nodes.TemplateData)] + [
                node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
            ]
            if marks is not None:
                _mark(tree, marks)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "sllm_counted", [], [], None, None, lineno=loop.lineno)
            for concat in list(tree.find_all(nodes.Concat)):
                parts = nodes.List(concat.nodes, lineno=concat.lineno)
                concat.nodes = [nodes.Filter(parts, "sllm_joined", [], [], None, None, lineno=concat.lineno)]
            self._compiled = environment.from_string(tree)
        except TemplateSyntaxError as error:
            reason = f"has a syntax error in line {error.lineno}: {_one_line(error)}"
            raise UnsupportedModelError(f"the model's chat template {reason}") from error
        # The parser and Python's compiler have limits of their own (of nesting, say), each with its own
        # error.
        except Exception as error:
            raise UnsupportedModelError(
                f"the model's chat template does not compile: {_one_line(error)}"
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text that the template makes of these variables.

        Raises:
            UnsupportedModelError: it fails, refuses, or would take too long.

        """
        budget = _Budget(len(variables["messages"]))
        chunks = []
        try:
            for chunk in self._compiled.generate({**variables, _BUDGET: budget, _MARKS: self._marks}):
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
        return "probe" in self._probe_content("probe")

    @functools.cached_property
    def _prints_parts(self) -> bool:
        printed = self._probe_content([{"type": "text", "text": "probe"}])
        # A list shown as Python or JSON would write it is not what the model was trained on.
        return "probe" in printed and "'text'" not in printed and '"text"' not in printed

    @functools.cached_property
    def variables(self) -> set[str]:
        """The names that it reads and does not itself set."""
        # Of a tree of its own, which this changes.
        return meta.find_undeclared_variables(_environment().parse(self.text))

    @functools.cached_property
    def tool_call_form(self) -> ToolCallForm:
        """The form of tool calls that this template prints: found by trying, for templates say it nowhere."""
        rendered = []
        for content in _NO_CONTENT:
            shown = {kind: self._probe_call(content, kind) for kind in ("mapping", "text")}
            calls = [kind for kind, text in shown.items() if _is_call(text)]
            if calls:
                return ToolCallForm(content, calls[0] if len(calls) == 1 else "either")
            rendered += [content] if any(shown.values()) else []
        # A template that knows no tool calls may still want a content.
        return ToolCallForm(rendered[0] if rendered else "absent", "either")

    def _probe_call(self, content: str, arguments: str) -> str:
        """What follows a question in a conversation with a tool call of this form."""
        given: Any = {"probe_key": "probe value"}
        function = {
            "name": "probe_name",
            "arguments": given if arguments == "mapping" else json.dumps(given),
        }
        call: dict[str, Any] = {
            "role": "assistant",
            "tool_calls": [{"id": "probe0001", "type": "function", "function": function}],
        }
        if content != "absent":
            call["content"] = None if content == "none" else ""
        question = {"role": "user", "content": "probe question"}
        result = {
            "role": "tool",
            "name": "probe_name",
            "tool_call_id": "probe0001",
            "content": "probe result",
        }
        schema = {"type": "object", "properties": {"probe_key": {"type": "string", "description": ""}}}
        tool = {"name": "declared", "description": "", "parameters": schema}
        printed = self._probe([question, call, result], [{"type": "function", "function": tool}])
        after = printed.partition("probe question")[2] or printed
        return "" if content == "none" and ("None" in after or "null" in after) else after

    def _probe_content(self, content: object) -> str:
        return self._probe([{"role": "user", "content": content}], None)

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """What the template makes of messages; nothing where it fails."""
        given = {"bos_token": "", "eos_token": "", "add_generation_prompt": False, "documents": None}
        try:
            return self.render({**given, "messages": messages, "tools": tools})
        except UnsupportedModelError:
            return ""


def _is_call(printed: str) -> bool:
    """Whether the call of a probe is there, its arguments neither as JSON within JSON, whose quotes are
    escaped, nor as Python writes a mapping.
    """
    wrong = ('\\"probe_key', "'probe_key'")
    return "probe_name" in printed and "probe_key" in printed and not any(text in printed for text in wrong)


def _failure(error: Exception) -> str:
    """Why a template could not be rendered, in one line."""
    if isinstance(error, _RefusalError):
        return f"refuses these messages: {_one_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    what = "was stopped" if isinstance(error, _LimitError) else "failed"
    where = f" in line {lines[-1]}" if lines else ""
    return f"{what}{where}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """An exception's text on one line of bounded length, with its type where that says something."""
    text = str(error.message if isinstance(error, TemplateSyntaxError) else error)
    text = " ".join(text.split())[:300]
    if isinstance(error, (_RefusalError, _LimitError, TemplateSyntaxError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Generation(Extension):
    """``{% generation %}``, which tells a trainer what the model wrote; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as a call block is: what is set inside ends there.
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        __context.parent[_BUDGET].step()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes in the sandbox's wrapping
        marks = __context.parent[_MARKS]
        if marks is not None and isinstance(method, BuiltinMethodType):
            args = _searched(method, args, marks)
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, (str, int)):
            _check_numbers(*args, *options.values())
        return super().call(__context, __obj, *args, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The environment that transformers renders chat templates in, with limits."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    filters = environment.filters
    filters.update(tojson=_tojson, sllm_counted=_counted, sllm_joined=_joined, sllm_unmarked=_unmarked)
    for name in ("batch", "center", "indent", "slice", "wordwrap"):
        filters[name] = _bounded(filters[name])
    python_format = filters["format"]

    def formatted(form: Any, *args: Any, **options: Any) -> Any:
        _check_widths(form)
        return python_format(form, *args, **options)

    filters["format"] = formatted
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


# ---- marks, see chat_guard


def _mark(tree: nodes.Template, marks: Marks) -> None:
    """Mark the control tokens in what a template writes, but not in what it only compares with."""
    names = {id(pair.key) for pair in tree.find_all(nodes.Pair)}
    names |= {id(item.arg) for item in tree.find_all(nodes.Getitem)}
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        if node.name not in ("d", "default", "join"):
            args = node.args[:1] if node.name == "replace" else node.args
            names |= {id(const) for arg in args for const in (arg, *arg.find_all(nodes.Const))}
    for data in tree.find_all(nodes.TemplateData):
        data.data = marks.mark(data.data)
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, str) and id(const) not in names:
            const.value = marks.mark(const.value)
    side: Any
    for side in list(tree.find_all((nodes.Compare, nodes.Operand))):
        side.expr = nodes.Filter(side.expr, "sllm_unmarked", [], [], None, None, lineno=side.lineno)


def _without_marks(value: Any, marks: Marks) -> Any:
    if isinstance(value, str):
        return value.translate(marks.back)
    if isinstance(value, (list, tuple)):
        return type(value)([_without_marks(item, marks) for item in value])
    return value


@pass_context
def _unmarked(context: Context, value: Any) -> Any:
    return _without_marks(value, context.parent[_MARKS])


def _searched(method: BuiltinMethodType, args: tuple[Any, ...], marks: Marks) -> tuple[Any, ...]:
    """The arguments as they stand in the text, the list or the mapping in which they are looked for."""
    inside = method.__self__
    if isinstance(inside, (dict, list, tuple)) or (isinstance(inside, str) and method.__name__ in _SEARCHES):
        n = 1 if method.__name__ == "replace" else len(args)  # what it puts there instead is written
        sought = [
            arg if isinstance(arg, str) and arg in inside else _without_marks(arg, marks) for arg in args
        ]
        return (*sought[:n], *args[n:])
    return args


# ---- filters and functions of templates


@pass_context
def _printed(context: Context, value: Any) -> Any:
    if isinstance(value, str):
        context.parent[_BUDGET].write(value)
    return value


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context.parent[_BUDGET]
    for item in items:
        budget.step()
        yield item


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _raise_exception(message: object) -> None:
    raise _RefusalError(message)


def _strftime_now(form: str) -> str:
    _check_widths(form)
    return datetime.now().strftime(form)


def _tojson(
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


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        _check_numbers(*args, *options.values())
        return function(*args, **options)

    return checked


# ---- limits


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

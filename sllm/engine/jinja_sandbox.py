"""Jinja2's sandbox for chat templates, with a budget for each rendering.

A template comes with a downloaded file and is not trusted. Jinja2 is what transformers renders templates
with, and what they are written for. minijinja, whose fuel bounds steps and memory by itself, was tried
against it on the 70 templates that llama.cpp tests with: it has no ``{% generation %}``, fails on those of
Qwen3-Coder and Nemotron (``none is iterable`` is true there), and prints None, indented JSON and escapes in
other ways in seven more, which would change prompts without a word. Nor does it show the parsed template,
whose literals are marked for the guard of control tokens (:mod:`sllm.engine.chat_guard`). A process with
limits of its own would take longer to start than all of a prompt takes to render.

So the budget is taken where a template does something: calls, operators and filters are the environment's;
loops, slices, literals, comparisons and the text that is written are found in the parsed template.
"""

from __future__ import annotations

import functools
import json
import reprlib
import sys
import traceback
from dataclasses import dataclass
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateSyntaxError, meta, nodes, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from sllm.engine.jinja_budget import Budget, LimitError
from sllm.engine.jinja_guards import (
    BUDGET,
    check_format,
    check_method,
    check_operator,
    formatted,
    guarded_filter,
    guarded_test,
)
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from sllm.engine.chat_guard import Marks

__all__ = ["Template", "ToolCallForm"]

_MAX_SOURCE = 1 << 17
"""Characters of a template; the longest published ones have 20,000."""

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


class _RefusalError(Exception):
    """The template called ``raise_exception``."""


class _StoppedError(UnsupportedModelError):
    """The template would take too long or grow too large."""


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
        if len(text) > _MAX_SOURCE:
            raise UnsupportedModelError(
                f"the model's chat template has {len(text)} characters, where {_MAX_SOURCE} are the most"
            )
        try:
            tree = environment.parse(text)
            self.literals = [node.data for node in tree.find_all(nodes.TemplateData)] + [
                node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
            ]
            if marks is not None:
                _mark(tree, marks)
            self._compiled = environment.from_string(_Guarded(marked=marks is not None).visit(tree))
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
        budget = Budget(variables, len(variables["messages"]))
        try:
            return "".join(self._compiled.generate({**variables, BUDGET: budget, _MARKS: self._marks}))
        # A template is a program, which can fail in any way.
        except Exception as error:
            stopped = isinstance(error, LimitError)
            failure = (_StoppedError if stopped else UnsupportedModelError)(
                f"the model's chat template {_failure(error)}"
            )
            # What it has made goes now, whoever keeps the error.
            error.__traceback__ = None
            raise failure from error
        finally:
            budget.forget()

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
        """What the template makes of messages; nothing where it fails, unless it would take too long."""
        given = {"bos_token": "", "eos_token": "", "add_generation_prompt": False, "documents": None}
        try:
            return self.render({**given, "messages": messages, "tools": tools})
        except _StoppedError:
            raise  # and not once for each of the probes
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
    what = "was stopped" if isinstance(error, LimitError) else "failed"
    where = f" in line {lines[-1]}" if lines else ""
    return f"{what}{where}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """An exception's text on one line of bounded length, with its type where that says something."""
    text = str(error.message if isinstance(error, TemplateSyntaxError) else error)
    text = " ".join(text[:2000].split())[:300]
    if isinstance(error, (_RefusalError, LimitError, TemplateSyntaxError)):
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


class _Guarded(NodeTransformer):
    """Makes a template keep within its budget where it does things that no environment is asked for."""

    def __init__(self, *, marked: bool) -> None:
        self._marked = marked

    def generic_visit(self, node: Node, *args: Any, **options: Any) -> Node:
        super().generic_visit(node, *args, **options)
        for name in () if isinstance(node, nodes.Template) else ("body", "else_"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                _count_text(body)
        return node

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802 - as the base class looks for it
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "sllm_counted")
        if node.recursive:  # what goes into it again does not come that way
            node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(0), "sllm_text"), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "sllm_joined")

    def visit_Compare(self, node: nodes.Compare) -> Node:  # noqa: N802
        self.generic_visit(node)
        side: Any
        for side in (node, *node.ops):
            if self._marked or not isinstance(side.expr, nodes.Const):
                side.expr = _filtered(side.expr, "sllm_compared")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, "sllm_made")
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filtered(node.arg, "sllm_key")
        return node

    def _container(self, node: Node) -> Node:
        self.generic_visit(node)
        written = all(isinstance(part, _LITERAL) for part in node.find_all(nodes.Node))
        return node if written or getattr(node, "ctx", "load") != "load" else _filtered(node, "sllm_made")

    visit_List = visit_Tuple = visit_Dict = _container  # noqa: N815


_LITERAL = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _count_text(body: list[Node]) -> None:
    """Let a part that may be printed again and again begin with taking what is written in it."""
    written = [output.nodes for output in body if isinstance(output, nodes.Output)]
    n = sum(len(data.data) for parts in written for data in parts if isinstance(data, nodes.TemplateData))
    if n:
        body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(n), "sllm_text"), lineno=body[0].lineno))


class _QuietNamespace(Namespace):
    """One that may hold itself, and does not show what it holds. What a text that is replaced took is given
    back: some templates make one longer with each message.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        old = object.__getattribute__(self, "_Namespace__attrs").get(name)
        super().__setitem__(name, value)
        # Held here alone (and by the call that asks).
        if type(old) is str and old is not value and sys.getrefcount(old) == 2:
            object.__getattribute__(self, "__dict__")["budget"].take(-len(old))

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = context.parent[BUDGET]
        check_operator(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        budget = __context.parent[BUDGET]
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes in the sandbox's wrapping
        marks = __context.parent[_MARKS]
        if marks is not None and isinstance(method, BuiltinMethodType):
            args = _searched(method, args, marks)
        owner = getattr(method, "__self__", None)
        of_type = isinstance(method, BuiltinMethodType) and (owner is None or isinstance(owner, type))
        if of_type or (isinstance(owner, _BUILT_IN) and isinstance(method, (BuiltinMethodType, MethodType))):
            named = {name: value for name, value in options.items() if name not in _JINJA_OWN}
            args = check_method(budget, method, args, named)
            if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
                return budget.made(formatted(__self, budget, method, args, named))
        elif not isinstance(__obj, Macro):
            budget.look(sum(map(budget.size, args)))
            if __obj is dict and args and hasattr(args[0], "__len__"):
                budget.check(25 * len(args[0]))
                budget.look(len(args[0]) ** 2 // 16 if len(args[0]) > 1000 else 0)
        result = super().call(__context, __obj, *args, **options)
        if isinstance(result, _QuietNamespace):
            object.__getattribute__(result, "__dict__").setdefault("budget", budget)
        return budget.made(result)


_JINJA_OWN = ("_loop_vars", "_block_vars")  # what its compiled code passes on besides
_BUILT_IN = (str, int, float, list, tuple, dict, range, bytes)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The environment that transformers renders chat templates in, with limits."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: guarded_filter(name, f) for name, f in environment.filters.items()}
    environment.tests = {name: guarded_test(name, cast("Any", f)) for name, f in environment.tests.items()}
    environment.filters.update(
        sllm_compared=_compared,
        sllm_counted=_counted,
        sllm_joined=_joined,
        sllm_key=_key,
        sllm_made=_made,
        sllm_text=_text,
    )
    del environment.globals["lipsum"]  # words at random
    environment.globals.update(
        namespace=_QuietNamespace, raise_exception=_raise_exception, strftime_now=_strftime_now
    )
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


def _without_marks(value: Any, marks: Marks) -> Any:
    if isinstance(value, str):
        return value.translate(marks.back)
    if isinstance(value, (list, tuple)):
        return type(value)([_without_marks(item, marks) for item in value])
    return value


@pass_context
def _compared(context: Context, value: Any) -> Any:
    budget = context.parent[BUDGET]
    if isinstance(value, str):
        budget.look(len(value))
    elif value is not None and not isinstance(value, (int, float)):
        budget.look(budget.size(value))
    marks = context.parent[_MARKS]
    return value if marks is None else _without_marks(value, marks)


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
    budget = context.parent[BUDGET]
    if not isinstance(value, str):
        budget.check(budget.text_size(value))
        value = str(value)
    budget.take(len(value))
    return value


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context.parent[BUDGET]
    for item in items:
        budget.step()
        if isinstance(item, (list, tuple, dict)):
            budget.size(item)  # where it was made on the way, it is taken
        yield item


@pass_context
def _text(context: Context, n: int) -> None:
    budget = context.parent[BUDGET]
    budget.take(n)
    if n == 0:
        budget.step()


@pass_context
def _made(context: Context, value: Any) -> Any:
    budget = context.parent[BUDGET]
    if hasattr(value, "__len__"):
        budget.look(len(value))
    return budget.made(value)


@pass_context
def _key(context: Context, value: Any) -> Any:
    if isinstance(value, tuple):  # it is hashed
        budget = context.parent[BUDGET]
        budget.look(budget.size(value))
    return value


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    budget = context.parent[BUDGET]
    budget.check(sum(map(budget.text_size, parts)))
    text: str = budget.made("".join(map(str, parts)))
    return text


def _raise_exception(message: object) -> None:
    raise _RefusalError(message[:2000] if isinstance(message, str) else reprlib.repr(message))


def _strftime_now(form: str) -> str:
    check_format(form)
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

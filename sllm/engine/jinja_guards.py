"""Before a chat template's operation: what it would make and look at, held against the rendering's budget.

For each operator, method of a text and filter of Jinja2 that can make much of little, or take long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import pass_context
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter
from markupsafe import EscapeFormatter, Markup

from sllm.engine.jinja_budget import MAX_BITS, Budget, LimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.runtime import Context

__all__ = [
    "BUDGET",
    "check_format",
    "check_method",
    "check_operator",
    "formatted",
    "guarded_filter",
    "guarded_test",
    "joined",
]

BUDGET = "sllm budget"
"""Where the budget lies among a template's variables; no template can spell a name with a space in it."""

_PIECE = 16  # what a short text takes besides its characters
_CHARACTER = 20  # what a text of one character takes
_MARKUP = 5  # the longest that a character becomes where it is escaped for HTML
_MAX_PRECISION = 4096
_MAX_FORM = 1000  # characters of a date's format, of which C makes 256 times as many at most
_SQUARED = 64  # so much of the square of a text's length costs what goes over it again and again

_REFUSED = frozenset(["translate", "maketrans", "to_bytes", "from_bytes", "fromkeys"])
"""Methods that no chat has a use for, and that make much of little."""

_ENCODINGS = frozenset(
    [
        *("ascii", "latin_1", "raw_unicode_escape", "unicode_escape", "utf_8"),
        *("utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le"),
    ]
)
"""Encodings that take a time that grows with the text alone."""

_BACKWARDS = frozenset(["rfind", "rindex", "rpartition", "rsplit"])
"""Python looks at each character up to once for each of what it is looking for."""

_FORWARDS = frozenset(["count", "find", "index", "partition", "replace", "split"])
_STRIPS = frozenset(["strip", "lstrip", "rstrip"])
_CASES = frozenset(["upper", "lower", "title", "swapcase", "capitalize", "casefold"])
_PADS = frozenset(["center", "ljust", "rjust", "zfill"])

_SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f"
_WIDE_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

_NUMBER = re.compile(r"\d+", re.ASCII)
_SPEC = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?[-+ #0]*(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d*))?[hlL]?(?P<kind>.)",
    re.ASCII | re.DOTALL,
)


def _int(value: Any) -> int:
    """A number that was given as one; Python will refuse what is none."""
    return value if isinstance(value, int) else 0


def _number(digits: str, most: int) -> int:
    """A number in a format."""
    if len(digits) > 8 or int(digits) > most:
        raise LimitError(f"a format with the number {digits[:20]}, where {most} is the most")
    return int(digits)


# ---- operators


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be huge.

    Raises:
        LimitError: it would.

    """
    if isinstance(left, int) and isinstance(right, int):
        bits = max(left.bit_length(), right.bit_length())
        if operator == "*":
            bits = left.bit_length() + right.bit_length()
        elif operator == "**":
            bits = max(bits, left.bit_length() * right)
        if bits > MAX_BITS:
            raise LimitError(f"a number of {bits} bits, where {MAX_BITS} is the most")
    elif operator == "%" and isinstance(left, bytes):
        raise LimitError("bytes are not for formats")
    elif operator == "%" and isinstance(left, str):
        _check_percent(budget, left, right)
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        n = (len(left) + len(right)) * (1 if isinstance(left, str) else 2)
        budget.look(n)
        budget.check(n * (_MARKUP if isinstance(left, Markup) or isinstance(right, Markup) else 1))
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if hasattr(items, "__len__") and isinstance(times, int):
                budget.check(len(items) * times * (1 if isinstance(items, str) else 2))
    elif isinstance(left, (set, frozenset)) or hasattr(left, "isdisjoint"):  # of views of a mapping
        budget.look(budget.size(left) + budget.size(right) + len(left) ** 2 // 16)


def _check_percent(budget: Budget, form: str, args: Any) -> None:
    """``form % args``, by the size of what goes into each place."""
    values = iter(args) if isinstance(args, tuple) else iter((args,))
    grows = _MARKUP if isinstance(form, Markup) else 1
    total = len(form)
    for spec in _SPEC.finditer(form):
        budget.step()
        if "*" in (spec["width"], spec["precision"]) or "(" in (spec["key"] or ""):
            raise LimitError("a format with a width that is an argument, or a name with a bracket in it")
        total += _number(spec["width"] or "0", 1_000_000)
        if spec["kind"] == "%":
            continue
        if spec["kind"] not in "sra":
            total += _MAX_PRECISION + _number(spec["precision"] or "0", _MAX_PRECISION)
        if spec["key"] is None:
            value = next(values, None)
        else:
            value = args.get(spec["key"]) if isinstance(args, Mapping) else None
        total += budget.text_size(value) * grows
        budget.check(total)
    budget.look(total)


def check_format(form: object) -> None:
    """A format of a date, whose widths C would fill up.

    Raises:
        LimitError: a long one, or one that asks for a large width.

    """
    text = str(form)
    if len(text) > _MAX_FORM or any(len(digits) > 3 for digits in _NUMBER.findall(text)):
        raise LimitError("a format of a date that is long, or asks for a huge width")


class _Formatter(SandboxedFormatter):
    """``str.format``, field by field."""

    def __init__(self, environment: SandboxedEnvironment, budget: Budget, **more: Any) -> None:
        super().__init__(environment, **more)
        self._budget = budget

    def parse(self, format_string: Any) -> Iterator[Any]:
        for part in super().parse(format_string):
            self._budget.step()
            self._budget.take(len(part[0]))
            yield part

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._budget.check(self._budget.text_size(value) * 10)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        most = _MAX_PRECISION if isinstance(value, (int, float)) else 1_000_000
        self._budget.check(sum(_number(digits, most) for digits in _NUMBER.findall(str(format_spec))))
        self._budget.check(self._budget.text_size(value))
        return self._budget.made(super().format_field(value, format_spec))


class _MarkupFormatter(_Formatter, EscapeFormatter):
    pass


def formatted(
    environment: SandboxedEnvironment,
    budget: Budget,
    method: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> str:
    """``str.format`` or ``str.format_map``, which ``method`` is, in the sandbox.

    Raises:
        LimitError: it would make too much.

    """
    form = method.__self__
    budget.look(len(form))
    if method.__name__ == "format_map":
        if len(args) != 1 or options:
            raise TypeError("format_map() takes one argument")
        given: Any = args[0]
        args, options = (), given
    if isinstance(form, Markup):
        return Markup(_MarkupFormatter(environment, budget, escape=form.escape).vformat(form, args, options))
    return _Formatter(environment, budget).vformat(form, args, options)


# ---- methods


def check_method(budget: Budget, method: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The arguments for a method of a text, a number or a container.

    Raises:
        LimitError: it would make too much, look at too much, or is none for templates.

    """
    owner, name = method.__self__, method.__name__
    if name in _REFUSED or (isinstance(owner, bytes) and name not in ("decode", "hex")):
        raise LimitError(f"{name}() is not for chat templates")
    if name in ("encode", "decode"):
        _check_encoding(budget, len(owner), *args, **options)
    if isinstance(owner, str):
        return _checked_text_method(budget, name, owner, args, options)
    budget.look(sum(map(budget.size, args)))
    if isinstance(owner, (list, tuple, range)):
        deep = name in ("index", "count") and not isinstance(owner, range)
        budget.look(budget.size(owner) if deep else len(owner))
    elif isinstance(owner, dict) and name == "copy":
        budget.check(len(owner) * 25)
    return args


def _check_encoding(budget: Budget, n: int, encoding: Any = "utf-8", errors: Any = "strict") -> None:
    if str(encoding)[:40].lower().replace("-", "_") not in _ENCODINGS:
        raise LimitError(f"the encoding {str(encoding)[:40]!r} is not for chat templates")
    budget.look(n)
    budget.check(n * (12 if errors == "strict" else 100))


def _checked_text_method(
    budget: Budget, name: str, text: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    grows = _MARKUP if isinstance(text, Markup) else 1
    n = len(text)
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    budget.look(n + longest)
    first = args[0] if args else None
    if name == "join":
        items, total = joined(budget, first, text)
        budget.check(total * grows)
        args = (items, *args[1:])
    elif name in _BACKWARDS or name in _STRIPS:
        budget.look(n * longest // 8)
    elif name in _FORWARDS:
        budget.look(n * min(longest, 100) // 16)
    elif name in _PADS:
        budget.check(max(n, _int(first)) * grows)
    elif name in _CASES:
        budget.check(3 * n)
    elif name == "expandtabs":
        budget.check(n + text.count("\t") * max(_int(first if args else options.get("tabsize", 8)), 0))
    elif name in ("striptags", "unescape"):
        _look_squared(budget, n)
    if name == "replace" and len(args) > 1 and isinstance(first, str) and isinstance(args[1], str):
        budget.check(_replaced(text, first, args[1], args[2] if len(args) > 2 else -1) * grows)
    elif name in ("split", "rsplit", "splitlines"):
        at_most = _int(args[1] if len(args) > 1 else options.get("maxsplit", -1))
        budget.check(n + _PIECE * _pieces(text, first if name != "splitlines" else None, at_most))
    return args


def _look_squared(budget: Budget, n: int) -> None:
    budget.look(_SQUARED * n + n * n // _SQUARED)


def _replaced(text: str, old: str, new: str, count: Any) -> int:
    """At most so long is ``text.replace(old, new, count)``."""
    n = text.count(old)
    if _int(count) >= 0 and count is not None:
        n = min(n, _int(count)) if isinstance(count, int) else n
    return len(text) + n * max(len(new) - len(old), 0)


def _pieces(text: str, separator: Any, at_most: int) -> int:
    """At most into so many pieces splits a text, by white space where there is no separator."""
    if isinstance(separator, str) and separator:
        n = text.count(separator)
    else:
        spaces = _SPACES if text.isascii() else _SPACES + _WIDE_SPACES
        n = sum(map(text.count, spaces))
    return 1 + (min(n, at_most) if at_most >= 0 else n)


def joined(budget: Budget, items: Any, separator: Any) -> tuple[Any, int]:
    """The items, as a list where they come one by one, and at most how long they are as one text.

    Raises:
        LimitError: they are too many.

    """
    if isinstance(items, str):
        budget.check(len(items) * _CHARACTER)
    if not isinstance(items, (list, tuple)):
        items = _listed(budget, items)
    between = len(items) * budget.text_size(separator)
    budget.look(budget.size(items))
    return items, between + sum(map(budget.text_size, items))


def _listed(budget: Budget, items: Iterable[Any]) -> list[Any]:
    found = []
    for item in items:
        budget.take(2)
        found.append(item)
    return found


# ---- filters and tests


@dataclass(frozen=True)
class _Cost:
    """What a filter costs.

    Attributes:
        deep: it looks at all that is in its value, and not at the outermost items alone.
        weight: so often.
        grows: of one that makes a text: the longest that a character of its value may become; 0: of others.
        squared: it goes over its value again and again.

    """

    deep: bool = False
    weight: int = 1
    grows: int = 0
    squared: bool = False


_PLAIN = _Cost()
_EACH = _Cost(weight=32)
_ORDERED = _Cost(deep=True, weight=32)
_SLOW = _Cost(deep=True, grows=32, squared=True)
_ESCAPES = _Cost(deep=True, weight=4, grows=_MARKUP)
_COSTS: dict[str, _Cost] = {
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr", "batch", "slice"), _EACH),
    **dict.fromkeys(("sort", "dictsort", "groupby", "min", "max"), _ORDERED),
    **dict.fromkeys(("striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr", "pprint"), _SLOW),
    **dict.fromkeys(("e", "escape", "forceescape"), _ESCAPES),
    **dict.fromkeys(("upper", "lower", "capitalize"), _Cost(grows=3)),
    "string": _Cost(deep=True, weight=4, grows=1),
    "tojson": _Cost(deep=True, weight=8),
    "trim": _Cost(grows=1),
    "truncate": _Cost(grows=2),
    "urlencode": _Cost(deep=True, weight=64, grows=20),
}


def _checked_center(budget: Budget, value: Any, width: Any = 80) -> tuple[Any, ...]:
    budget.check(max(budget.text_size(value), _int(width)))
    return value, width


def _checked_format(budget: Budget, form: Any, *args: Any, **options: Any) -> tuple[Any, ...]:
    form = form if isinstance(form, str) else _as_text(budget, form)
    _check_percent(budget, form, options or args)
    return form, *args


def _checked_indent(
    budget: Budget, text: Any, width: Any = 4, first: Any = False, blank: Any = False
) -> tuple[Any, ...]:
    prefix = len(width) if isinstance(width, str) else _int(width)
    if isinstance(text, str):
        budget.check(len(text) + (_pieces(text, None, -1) + 1) * max(prefix, 0))
    return text, width, first, blank


def _checked_join(budget: Budget, items: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    items, total = joined(budget, items, d)
    budget.check(total)
    return items, d, attribute


def _checked_replace(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> tuple[Any, ...]:
    parts = [part if isinstance(part, str) else _as_text(budget, part) for part in (text, old, new)]
    budget.look(len(parts[0]) * min(len(parts[1]), 100) // 16)
    grows = _MARKUP if isinstance(text, Markup) else 1
    budget.check(_replaced(parts[0], parts[1], parts[2], count) * grows)
    return *parts, count


def _as_text(budget: Budget, value: Any) -> str:
    budget.check(budget.text_size(value))
    return cast("str", budget.made(str(value)))


def _checked_round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> tuple[Any, ...]:
    budget.step()
    if abs(_int(precision)) > 400:
        raise LimitError(f"a number rounded to {precision} digits")
    return value, precision, method


def _checked_sum(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> tuple[Any, ...]:
    items = items if isinstance(items, (list, tuple)) else _listed(budget, items)
    if hasattr(start, "__len__"):  # each of the sums is a copy of the last one
        budget.look(len(items) * budget.size(items))
        budget.check(budget.size(items))
    return items, attribute, start


def _checked_tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> tuple[Any, ...]:
    width = len(indent) if isinstance(indent, str) else _int(indent)
    if width > 64 or any(len(part) > 64 for part in separators or () if isinstance(part, str)):
        raise LimitError("JSON with an indent or a separator of more than 64 characters")
    between = sum(len(part) for part in separators or () if isinstance(part, str))
    size = budget.size(value)
    budget.check(6 * size + size // 2 * (between + max(width, 0) * budget.depth(value)))
    return value, ensure_ascii, indent, separators, sort_keys


def _checked_trim(budget: Budget, value: Any, chars: Any = None) -> tuple[Any, ...]:
    if isinstance(chars, str):
        budget.look(budget.text_size(value) * len(chars) // 8)
    return value, chars


def _checked_unique(
    budget: Budget, value: Any, case_sensitive: Any = False, attribute: Any = None
) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple)) else _listed(budget, value)
    budget.look(budget.size(items) + len(items) ** 2 // 16)
    return items, case_sensitive, attribute


def _checked_wordwrap(
    budget: Budget,
    text: Any,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> tuple[Any, ...]:
    if isinstance(wrapstring, str):
        budget.check(len(wrapstring) * (budget.text_size(text) + 1))
    return text, width, break_long_words, wrapstring, break_on_hyphens


def _checked_count(budget: Budget, value: Any, count: Any, fill_with: Any = None) -> tuple[Any, ...]:
    budget.check(_int(count) * _PIECE)
    return value, count, fill_with


_CHECKS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "batch": _checked_count,
    "slice": _checked_count,
    "center": _checked_center,
    "format": _checked_format,
    "indent": _checked_indent,
    "join": _checked_join,
    "replace": _checked_replace,
    "round": _checked_round,
    "sum": _checked_sum,
    "tojson": _checked_tojson,
    "trim": _checked_trim,
    "unique": _checked_unique,
    "wordwrap": _checked_wordwrap,
}

_LISTS = frozenset(["batch", "dictsort", "groupby", "list", "reverse", "slice", "sort", "unique"])

_COMPARING = frozenset(
    [
        *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le"),
        *("lessthan", "lower", "lt", "ne", "upper"),
    ]
)
"""Tests that look at all of what they are given."""


def guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja2 that keeps within the budget of the rendering."""
    cost, check = _COSTS.get(name, _PLAIN), _CHECKS.get(name)
    lead = getattr(function, "jinja_pass_arg", None)  # what it wants before its value
    wanted = "" if lead is None else lead.name

    @pass_context
    @functools.wraps(function)
    def guarded(context: Context, *args: Any, **options: Any) -> Any:
        budget = context.parent[BUDGET]
        budget.step()
        if check is not None:
            args = check(budget, *args, **options)
            options = options if name == "format" else {}
        args = _looked_at(budget, name, cost, args)
        given = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        before = (given[wanted],) if wanted else ()
        return budget.made(function(*before, *args, **options))

    return guarded


def _looked_at(budget: Budget, name: str, cost: _Cost, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a filter, whose costs are taken."""
    value = args[0] if args else None
    if cost is _ORDERED and hasattr(value, "__next__"):
        value = _listed(budget, cast("Any", value))
        args = (value, *args[1:])
    if isinstance(value, str):
        n = len(value)
    elif cost.deep:
        n = budget.size(value)
    else:
        n = 2 * len(cast("Any", value)) if hasattr(value, "__len__") else 8
    budget.look(n * cost.weight + sum(len(arg) for arg in args[1:] if isinstance(arg, str)))
    if cost.squared:
        _look_squared(budget, n)
    if cost.grows:
        budget.check(budget.text_size(value) * cost.grows)
    if name in _LISTS and not isinstance(value, list):
        budget.check(n * _CHARACTER)
    return args


def guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test of Jinja2 that keeps within the budget of the rendering; most cost nothing."""
    if name not in _COMPARING:
        return function

    @pass_context
    def guarded(context: Context, *args: Any) -> Any:
        budget = context.parent[BUDGET]
        budget.look(sum(map(budget.size, args)))
        return function(*args)

    return guarded

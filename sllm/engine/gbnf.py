"""GBNF, llama.cpp's grammars, in the syntax of llguidance (Lark).

A character of the text is a terminal of its own there. llguidance reads its terminals greedily, as a lexer
does, so ``("a" | "ab") "bc"`` with terminals of two characters would not match ``abc``; with single
characters there is nothing to be greedy about, and the language is the same to the last text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["to_lark"]

MAX_RULES = 4096
MAX_DEPTH = 256
MAX_SYMBOLS = 20_000
MAX_REPETITIONS = 10_000
MAX_OPEN = 300
"""What a grammar may hold: rules, groups in groups, characters and names in all, and ``n`` of ``{m,n}``; and
the most places in it where the next character of a text may be. An Earley parser takes time by the square of
those where a grammar is ambiguous.
"""

_GAP = r"(?:[ \t\r\n]|\#[^\r\n]*)*"
_PIECES = re.compile(
    rf"""
      (?P<space>   [ \t]+ | \#[^\r\n]* )
    | (?P<newline> \r\n | \r | \n )
    | (?P<define>  ::= )
    | (?P<literal> " (?: [^"\\] | \\. )* " )
    | (?P<chars>   \[ (?: [^\]\\] | \\. )* \] )
    | (?P<token>   !? < [^<>\r\n]+ > )
    | (?P<name>    [A-Za-z0-9_-]+ )
    | (?P<repeat>  [*+?] | \{{ {_GAP} \d+ {_GAP} (?: , {_GAP} \d* {_GAP} )? \}} )
    | (?P<mark>    [().|] )
    """,
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r'\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([trn\\"\[\]-]))|([^\\])', re.DOTALL
)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}
_LAST = 0x10FFFF


class _Piece(NamedTuple):
    kind: str
    text: str
    line: int


class _Item(NamedTuple):
    """A symbol and how often it may come; ``high`` None: without end."""

    symbol: int | str  # a rule's number, or a terminal of Lark; "": none, which nothing matches
    low: int = 1
    high: int | None = 1


_Sequence = list[_Item]


def _fail(line: int, what: str) -> NoReturn:
    raise ValueError(f"the grammar does not parse: line {line}: {what}")


def _pieces(text: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    at, line = 0, 1
    while at < len(text):
        found = _PIECES.match(text, at)
        if found is None:
            what = {'"': "a literal without an end", "[": "a character class without an end"}.get(text[at])
            _fail(line, what or f"{text[at : at + 20]!r} is not part of a grammar")
        kind = found.lastgroup or ""
        if kind != "space":
            pieces.append(_Piece(kind, found[0], line))
        line += found[0].count("\n") + (found[0] == "\r")
        at = found.end()
    pieces.append(_Piece("newline", "", line))
    pieces.append(_Piece("end", "the end", line))
    return pieces


def _characters(text: str, line: int) -> list[tuple[int, bool]]:
    """The code points of a literal or class, and whether each was written as an escape."""
    found: list[tuple[int, bool]] = []
    at = 0
    while at < len(text):
        match = _CHARACTER.match(text, at)
        if match is None:
            _fail(line, f"{text[at : at + 10]!r} is no escape of GBNF")
        code = next((int(digits, 16) for digits in match.groups()[:3] if digits), None)
        if code is None:
            escaped, plain = match[4], match[5]
            code = ord(plain if escaped is None else _ESCAPES.get(escaped, escaped))
        if code > _LAST or 0xD800 <= code <= 0xDFFF:
            _fail(line, f"U+{code:X} is no character")
        found.append((code, match[5] is None))
        at = match.end()
    return found


def _terminal(ranges: list[tuple[int, int]], *, inverse: bool) -> str:
    """A regular expression for one character, or "" where there is none to match."""
    whole = [(0, 0xD7FF), (0xE000, _LAST)]
    if inverse:
        merged: list[tuple[int, int]] = []
        at = 0
        for low, high in sorted(ranges):
            if low > at:
                merged.append((at, low - 1))
            at = max(at, high + 1)
        ranges = [*merged, (at, _LAST)]
    parts = [
        (max(low, first), min(high, last))
        for low, high in ranges
        for first, last in whole
        if max(low, first) <= min(high, last)
    ]
    written = "".join(f"\\u{{{low:X}}}-\\u{{{high:X}}}" for low, high in parts)
    return f"/[{written}]/" if parts else ""


def _char_class(piece: _Piece) -> str:
    """The terminal of ``[...]``."""
    inner = piece.text[1:-1]
    inverse = inner.startswith("^")
    characters = _characters(inner[inverse:], piece.line)
    ranges: list[tuple[int, int]] = []
    i = 0
    while i < len(characters):
        low = high = characters[i][0]
        if i + 2 < len(characters) and characters[i + 1] == (ord("-"), False):
            high = characters[i + 2][0]
            i += 2
        ranges.append((low, high))
        i += 1
    return _terminal(ranges, inverse=inverse)


class _Reader:
    """Reads a grammar into rules: for each its alternatives, which are sequences of items."""

    def __init__(self, text: str, token_id: Callable[[str], int | None]) -> None:
        self._token_id = token_id
        self._pieces = _pieces(text)
        self._at = 0
        self._n_symbols = 0
        self.rules: list[list[_Sequence]] = []
        self.names: dict[str, int] = {}
        self.literals: set[int] = set()
        self._used: dict[str, int] = {}  # name -> the line where it was first used
        self.lines: dict[str, int] = {}  # name -> the line of its rule
        self._read()

    def _new_rule(self, alternatives: list[_Sequence]) -> int:
        self.rules.append(alternatives)
        return len(self.rules) - 1

    def _number(self, name: str) -> int:
        found = self.names.get(name)
        if found is None:
            found = self.names[name] = self._new_rule([])
        return found

    def _skip_newlines(self) -> None:
        while self._pieces[self._at].kind == "newline":
            self._at += 1

    def _read(self) -> None:
        self._skip_newlines()
        while self._pieces[self._at].kind != "end":
            name = self._pieces[self._at]
            if name.kind != "name":
                _fail(name.line, f"{name.text[:20]!r} where the name of a rule was expected")
            if self._pieces[self._at + 1].kind != "define":
                _fail(name.line, f"::= was expected behind {name.text[:40]!r}")
            self._at += 2
            self._skip_newlines()
            if len(self.lines) == MAX_RULES:
                _fail(name.line, f"there are more than {MAX_RULES} rules")
            self.lines[name.text] = name.line
            self.rules[self._number(name.text)] = self._alternatives()
            self._skip_newlines()
        for used, line in self._used.items():
            if used not in self.lines:
                _fail(line, f"undefined rule {used[:40]!r}")
        if "root" not in self.lines:
            _fail(1, "there is no rule named root")

    def _alternatives(self) -> list[_Sequence]:
        """What stands behind ``::=``, up to the end of the line."""
        open_groups: list[list[_Sequence]] = []
        alternatives: list[_Sequence] = [[]]
        while True:
            piece = self._pieces[self._at]
            self._at += 1
            if piece.kind == "newline":
                if not open_groups:
                    return alternatives
            elif piece.text == "|":
                alternatives.append([])
                self._skip_newlines()
            elif piece.text == "(":
                if len(open_groups) == MAX_DEPTH:
                    _fail(piece.line, f"groups nest more than {MAX_DEPTH} levels deep")
                open_groups.append(alternatives)
                alternatives = [[]]
            elif piece.text == ")":
                if not open_groups:
                    _fail(piece.line, "a group ends that did not begin")
                group = _Item(self._new_rule(alternatives))
                alternatives = open_groups.pop()
                alternatives[-1].append(group)
            elif piece.kind == "repeat":
                self._repeat(alternatives[-1], piece)
            elif piece.kind == "end":
                if open_groups:
                    _fail(piece.line, "a group has no end")
                self._at -= 1
                return alternatives
            else:
                alternatives[-1].append(self._item(piece))

    def _item(self, piece: _Piece) -> _Item:
        self._n_symbols += 1 if piece.kind == "name" else len(piece.text)
        if self._n_symbols > MAX_SYMBOLS:
            _fail(piece.line, f"there are more than {MAX_SYMBOLS} characters and names")
        if piece.text == ".":
            return _Item(_terminal([(0, _LAST)], inverse=False))
        if piece.kind == "name":
            self._used.setdefault(piece.text, piece.line)
            return _Item(self._number(piece.text))
        if piece.kind == "chars":
            return _Item(_char_class(piece))
        if piece.kind == "literal":
            codes = [code for code, _ in _characters(piece.text[1:-1], piece.line)]
            terminals = [_Item(_terminal([(code, code)], inverse=False)) for code in codes]
            if len(terminals) == 1:
                return terminals[0]
            literal = self._new_rule([terminals])
            self.literals.add(literal)
            return _Item(literal)
        if piece.kind == "token":
            return _Item(self._token(piece))
        _fail(piece.line, f"{piece.text[:20]!r} does not belong here")

    def _token(self, piece: _Piece) -> str:
        """``<[123]>`` or ``<think>``: one token, or with ``!`` any other."""
        name = piece.text.removeprefix("!")
        number = re.fullmatch(r"<\[(\d{1,9})\]>", name)
        token = self._token_id(name) if number is None else int(number[1])
        if token is None:
            _fail(piece.line, f"{name[:40]!r} is not one token of the vocabulary")
        return f"<[^{token}]>" if piece.text.startswith("!") else f"<[{token}]>"

    def _repeat(self, sequence: _Sequence, piece: _Piece) -> None:
        if not sequence:
            _fail(piece.line, f"there is nothing to repeat before {piece.text[:20]!r}")
        if piece.text in ("*", "+", "?"):
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[piece.text]
        else:
            numbers = re.findall(r"\d+|,", re.sub(r"#[^\r\n]*", "", piece.text))
            if any(len(number) > 9 for number in numbers):
                _fail(piece.line, f"a repetition has more than {MAX_REPETITIONS} times")
            low = int(numbers[0])
            high = low if len(numbers) == 1 else int(numbers[2]) if len(numbers) == 3 else None
            if high is not None and high < low:
                _fail(piece.line, f"a repetition has at least {low} and at most {high} times")
            if max(low, high or 0) > MAX_REPETITIONS:
                _fail(piece.line, f"a repetition has more than {MAX_REPETITIONS} times")
        last = sequence.pop()
        if (last.low, last.high) != (1, 1):
            last = _Item(self._new_rule([[last]]))
        sequence.append(_Item(last.symbol, low, high))


def _without_dead_ends(rules: list[list[_Sequence]]) -> list[list[_Sequence]]:
    """The rules without alternatives that need an empty class, which nothing matches; a rule may have none
    left.
    """
    users: dict[int, list[int]] = {}
    for number, alternatives in enumerate(rules):
        for sequence in alternatives:
            for item in sequence:
                if isinstance(item.symbol, int):
                    users.setdefault(item.symbol, []).append(number)
    kept = rules
    dead: set[int | str] = {""}
    waiting = list(range(len(rules)))
    while waiting:
        number = waiting.pop()
        if number in dead:
            continue
        kept[number] = [
            sequence
            for sequence in kept[number]
            if not any(item.symbol in dead and item.low > 0 for item in sequence)
        ]
        if not kept[number]:
            dead.add(number)
            waiting += users.get(number, [])
    return [
        [[item for item in sequence if item.symbol not in dead] for sequence in alternatives]
        for alternatives in kept
    ]


def _factored(rules: list[list[_Sequence]], literals: set[int]) -> None:
    """Write literals out, and let alternatives that begin with the same character share it."""
    for alternatives in rules:
        for sequence in alternatives:
            sequence[:] = [
                part
                for item in sequence
                for part in (
                    rules[item.symbol][0]
                    if item.symbol in literals
                    and (item.low, item.high) == (1, 1)
                    and isinstance(item.symbol, int)
                    else [item]
                )
            ]
    at = 0
    while at < len(rules):  # which grows
        groups: dict[tuple[_Item, ...], list[_Sequence]] = {}
        for sequence in rules[at]:
            first = sequence[:1]
            shared = first and isinstance(first[0].symbol, str) and (first[0].low, first[0].high) == (1, 1)
            if sequence[-1:] == [_Item(at)]:  # it becomes a repetition
                shared = False
            groups.setdefault(tuple(first if shared else sequence), []).append(sequence)
        rules[at] = []
        for head, members in groups.items():
            rests = list(dict.fromkeys(tuple(sequence[len(head) :]) for sequence in members))
            if len(rests) == 1:
                rules[at].append([*head, *rests[0]])
            else:
                rules.append([list(rest) for rest in rests])
                rules[at].append([*head, _Item(len(rules) - 1)])
        at += 1


def _nullable(rules: list[list[_Sequence]]) -> set[int | str]:
    """The rules that may be empty: a fixpoint, by those that use a rule that turned out to be."""
    users: dict[int | str, set[int]] = {}
    for number, alternatives in enumerate(rules):
        for sequence in alternatives:
            for item in sequence:
                users.setdefault(item.symbol, set()).add(number)
    found: set[int | str] = set()
    waiting = list(range(len(rules)))
    while waiting:
        number = waiting.pop()
        if number not in found and any(
            all(item.low == 0 or item.symbol in found for item in sequence) for sequence in rules[number]
        ):
            found.add(number)
            waiting += users.get(number, ())
    return found


def _check_open(rules: list[list[_Sequence]]) -> None:
    """Refuse a grammar that has more than :data:`MAX_OPEN` places open where a rule begins."""
    nullable = _nullable(rules)
    firsts: list[set[int]] = []  # of each rule: those that may begin where it does
    weights: list[int] = []
    for alternatives in rules:
        begin: set[int] = set()
        weight = 0
        for sequence in alternatives:
            for item in sequence:
                repeats = 1 if item.high == 1 else 4 if item.high is None else 2 * item.high.bit_length() + 2
                weight += repeats
                if isinstance(item.symbol, int):
                    begin.add(item.symbol)
                if item.low > 0 and item.symbol not in nullable:
                    break
        firsts.append(begin)
        weights.append(weight)
    for number in range(len(rules)):
        seen, waiting, total = {number}, [number], 0
        while waiting:
            at = waiting.pop()
            total += weights[at]
            if total > MAX_OPEN:
                raise ValueError(
                    "the grammar needs too much: the next character of a text may be at more than"
                    f" {MAX_OPEN} places of it at once"
                )
            new = firsts[at] - seen
            seen |= new
            waiting += new


def _reachable(rules: list[list[_Sequence]], root: int) -> set[int]:
    """The rules that a text can come to.

    Raises:
        ValueError: they are too many, groups among them.

    """
    found, waiting = {root}, [root]
    while waiting:
        for sequence in rules[waiting.pop()]:
            for item in sequence:
                if isinstance(item.symbol, int) and item.symbol not in found:
                    found.add(item.symbol)
                    waiting.append(item.symbol)
    if len(found) > MAX_RULES:
        raise ValueError(f"the grammar needs too much: it has more than {MAX_RULES} rules and groups")
    return found


def _lark_item(item: _Item, names: Callable[[int | str], str]) -> str:
    name = names(item.symbol)
    suffixes: dict[tuple[int, int | None], str] = {(1, 1): "", (0, None): "*", (1, None): "+", (0, 1): "?"}
    suffix = suffixes.get((item.low, item.high))
    if suffix is None:
        suffix = f"{{{item.low},{'' if item.high is None else item.high}}}"
    return name + suffix


def to_lark(text: str, token_id: Callable[[str], int | None]) -> str | None:
    r"""A GBNF grammar (llama.cpp's ``grammars/README.md``) in Lark's syntax as llguidance reads it.

    Rules that end in themselves, ``list ::= item list | item``, become repetitions (Arden's lemma): the
    parser takes these in constant memory for each character.

    Args:
        text: the grammar, with a rule ``root``.
        token_id: the id of the one token that a text like ``<think>`` is, or None.

    Returns:
        The grammar, or None for one that allows nothing at all (``root ::= []``).

    Raises:
        ValueError: it does not parse, with the line and what is wrong there; or it is too large.

    Examples:
        >>> print(to_lark('root ::= [0-9]+', lambda name: None))
        start: T0+
        T0: /[\u{30}-\u{39}]/

    """
    reader = _Reader(text, token_id)
    rules = _without_dead_ends(reader.rules)
    root = reader.names["root"]
    if not rules[root]:
        return None
    _factored(rules, reader.literals)
    used = _reachable(rules, root)
    _check_open(rules)
    terminals: dict[str, str] = {}

    def name_of(symbol: int | str) -> str:
        if isinstance(symbol, int):
            return "start" if symbol == root else f"r{symbol}"
        if symbol.startswith("<"):
            return symbol
        return terminals.setdefault(symbol, f"T{len(terminals)}")

    def written(sequence: _Sequence) -> str:
        parts = [_lark_item(item, name_of) for item in sequence if item.high != 0]
        return " ".join(parts) or '""'

    lines = []
    for number, alternatives in enumerate(rules):
        itself = _Item(number)
        ends = [s for s in alternatives if not s or s[-1] != itself]
        again = [s[:-1] for s in alternatives if len(s) > 1 and s[-1] == itself]
        if alternatives and not ends and not again:
            name = next(name for name, n in reader.names.items() if n == number)
            _fail(reader.lines[name], f"the rule {name[:40]!r} is nothing but itself")
        if number not in used:
            continue
        if again and ends:
            lines.append(f"again{number}: {' | '.join(written(s) for s in again)}")
            lines.append(f"{name_of(number)}: again{number}* end{number}")
            lines.append(f"end{number}: {' | '.join(written(s) for s in ends)}")
        elif alternatives:
            lines.append(f"{name_of(number)}: {' | '.join(written(s) for s in alternatives)}")
    lines += [f"{name}: {terminal}" for terminal, name in terminals.items()]
    return "\n".join(lines)

"""Which control tokens in a rendered chat are the template's own, and which stand in what a message says.

The template's own literals are marked: the control tokens in its source are written in private-use characters
that occur nowhere else, one for one, the template is rendered once more, and the marks are taken away again.
Nothing that a filter does to a message (``tojson``, ``urlencode``, ``upper``, a slice) can make a mark, so
what carries none is not the template's. What the model gets is always the text of the plain rendering.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Marks", "checked_pieces", "cut", "pieces_in"]

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


def checked_pieces(special_pieces: Iterable[str]) -> frozenset[str]:
    """The texts of control tokens, each once.

    Without those that are white space alone: they say nothing about roles, and templates trim them.

    Raises:
        ValueError: no iterable of strings.

    """
    pieces: set[object] = {None} if isinstance(special_pieces, str) else set(special_pieces)
    texts = {piece for piece in pieces if isinstance(piece, str)}
    if len(texts) < len(pieces):
        raise ValueError("special_pieces must be a list of strings, and is or holds something else")
    return frozenset(piece for piece in texts if piece.strip())


@dataclass(frozen=True)
class _Shapes:
    """What is looked up for every text: first characters, lengths, longest first, and parts of pieces."""

    starts: frozenset[str]
    lengths: tuple[int, ...]
    prefixes: frozenset[str]
    suffixes: frozenset[str]


@functools.lru_cache(maxsize=4)
def _shapes(pieces: frozenset[str]) -> _Shapes:
    def parts(of: Iterator[str]) -> frozenset[str]:
        # A word alone is no part of a token that anybody would put together.
        return frozenset(part for part in of if not part.isalnum() and part.strip())

    return _Shapes(
        frozenset(piece[0] for piece in pieces),
        tuple(sorted({len(piece) for piece in pieces}, reverse=True)),
        parts(piece[:n] for piece in pieces for n in range(1, len(piece))),
        parts(piece[n:] for piece in pieces for n in range(1, len(piece))),
    )


def pieces_in(text: str, pieces: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Where pieces stand in a text, (begin, end): at each place all of them, the longest first."""
    shapes = _shapes(pieces)
    if not shapes.starts:
        return
    for found in re.finditer("[" + "".join(map(re.escape, sorted(shapes.starts))) + "]", text):
        begin = found.start()
        for length in shapes.lengths:
            if text[begin : begin + length] in pieces:
                yield begin, begin + length


@dataclass(frozen=True)
class Marks:
    """Private-use characters for the control tokens in a template's literals; hashable.

    Attributes:
        pieces: the texts of the control tokens.
        exchange: each of their characters, and the one that stands for it.

    """

    pieces: frozenset[str]
    exchange: tuple[tuple[str, str], ...]

    @classmethod
    def free_in(cls, pieces: frozenset[str], literals: str, texts: Iterable[str]) -> Marks | None:
        """Marks for what a template writes, its ``literals``, of characters that none of the texts has; None
        where they have all of them.
        """
        chars = {char for piece in pieces for char in piece if not char.isspace()} & set(literals)
        taken = set().union(literals, *texts)
        free = (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in taken)
        exchange = tuple(zip(sorted(chars), free))  # noqa: B905 - either may be the longer one
        return cls(pieces, exchange) if len(exchange) == len(chars) else None

    @functools.cached_property
    def _to(self) -> dict[int, str]:
        return {ord(char): mark for char, mark in self.exchange}

    @functools.cached_property
    def back(self) -> dict[int, str]:
        """For str.translate: the marks to what they stand for."""
        return {ord(mark): char for char, mark in self.exchange}

    def mark(self, literal: str) -> str:
        """A literal of the template with its control tokens marked, and the halves of one at its ends, which
        it may put together: ``'<|' + message.role + '|>'``.
        """
        spans = list(pieces_in(literal, self.pieces))
        shapes = _shapes(self.pieces)
        for n in range(min(len(literal), shapes.lengths[0] - 1), 0, -1) if shapes.lengths else ():
            if literal[:n] in shapes.suffixes:
                spans.append((0, n))
            if literal[-n:] in shapes.prefixes:
                spans.append((len(literal) - n, len(literal)))
        chars = list(literal)
        for begin, end in spans:
            chars[begin:end] = literal[begin:end].translate(self._to)
        return "".join(chars)


def cut(plain: str, marked: str, marks: Marks, words: Iterable[str]) -> list[tuple[str, bool]]:
    """Cut a rendered text into (text, whether its control tokens are the template's).

    ``marked`` is ``plain`` with the marks in it, character for character. A token counts as the template's if
    it is marked, or begins and ends with marks around one of ``words``: roles, and other words of the
    template's own. Where a token of the template's and one of a message overlap, the template's stays whole.
    """
    secret = marks.back.keys()
    known = {word.casefold() for word in words}

    def is_own(begin: int, end: int) -> bool:
        text = marked[begin:end].strip()
        if ord(text[0]) not in secret or ord(text[-1]) not in secret:
            return False
        runs = "".join(char if ord(char) not in secret else "\0" for char in text).split("\0")
        return all(run.casefold() in known for run in runs if run.strip())

    barred = bytearray(len(plain))
    own = []
    for begin, end in pieces_in(plain, marks.pieces):
        if is_own(begin, end):
            own.append((begin, end))
        else:
            barred[begin:end] = b"\1" * (end - begin)
    for begin, end in own:
        barred[begin:end] = bytes(end - begin)
    return [
        (plain[run.start() : run.end()], not barred[run.start()])
        for run in re.finditer(rb"\x00+|\x01+", bytes(barred))
    ]

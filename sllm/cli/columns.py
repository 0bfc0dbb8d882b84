"""Text in the columns of a terminal: how wide it is, and where a line may end.

Chinese characters take two columns each. A line ends between words, and between Chinese characters, except
in front of closing punctuation and behind opening punctuation (the rule of CLREQ, the W3C's requirements for
Chinese text layout, without its finer points).
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Wrapper", "width", "wrapped"]

_BEGINS_NO_LINE = frozenset("，。、；：？！）」』》〉】〕”’…·,.;:?!)]}")
_ENDS_NO_LINE = frozenset("（「『《〈【〔“‘([{")


def width(text: str) -> int:
    """The columns that a text takes: two for wide characters, none for combining and invisible ones."""
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


class Wrapper:
    """Text that arrives in pieces, written in lines that are no wider than a terminal.

    A word is written when it is known where it ends, so a piece that ends in the middle of one is held back
    until the next; :meth:`end` writes what is left.
    """

    def __init__(self, write: Callable[[str, str], None], columns: int) -> None:
        """Set it up.

        Args:
            write: takes text and its style.
            columns: how wide a line may be.

        """
        self._write, self._columns = write, columns
        self._column = 0
        self._is_empty = True  # the line holds nothing but what it begins with
        self._spaces: list[tuple[str, str]] = []
        self._word: list[tuple[str, str]] = []

    def __call__(self, text: str, style: str = "") -> None:
        """Take a piece of text."""
        for character in text:
            if character == "\n":
                self._end_word()
                self._end_line()
            elif character.isspace():
                self._end_word()
                self._spaces.append((" ", style))
            else:
                if self._may_break_before(character):
                    self._end_word()
                self._word.append((character, style))

    def end(self) -> None:
        """Write the last word."""
        self._end_word()
        self._spaces.clear()

    def _may_break_before(self, character: str) -> bool:
        if not self._word or character in _BEGINS_NO_LINE:
            return False
        last = self._word[-1][0]
        return last not in _ENDS_NO_LINE and (
            _columns_of(character) == 2 or any(_columns_of(one) == 2 for one, _ in self._word)
        )

    def _end_line(self) -> None:
        self._spaces.clear()
        self._write("\n", "")
        self._column, self._is_empty = 0, True

    def _end_word(self) -> None:
        if not self._word:
            return
        needed = sum(_columns_of(one) for one, _ in self._word)
        if not self._is_empty and self._column + len(self._spaces) + needed > self._columns:
            self._end_line()
        self._put([*self._spaces, *self._word])
        self._spaces.clear()
        self._word.clear()

    def _put(self, characters: Iterable[tuple[str, str]]) -> None:
        """Write characters, pieces of one style together; what is wider than a line is broken anywhere."""
        piece, piece_style = "", ""
        for character, style in characters:
            needed = _columns_of(character)
            full = not self._is_empty and self._column + needed > self._columns
            if piece and (full or style != piece_style):
                self._write(piece, piece_style)
                piece = ""
            if full:
                self._end_line()
            piece, piece_style = piece + character, style
            self._column, self._is_empty = self._column + needed, False
        if piece:
            self._write(piece, piece_style)


def wrapped(text: str, columns: int, first: str = "") -> list[str]:
    """The lines of a text.

    Args:
        text: of one or more lines.
        columns: how wide a line may be, with what it begins with.
        first: what the first line begins with; the others begin with as many spaces.

    """
    pieces: list[str] = []
    indent = width(first)
    wrapper = Wrapper(lambda piece, _style: pieces.append(piece), max(columns - indent, 1))
    wrapper(text)
    wrapper.end()
    head, *rest = "".join(pieces).split("\n")
    return [first + head, *(" " * indent + line if line else "" for line in rest)]

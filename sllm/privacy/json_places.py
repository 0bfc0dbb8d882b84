"""Where in a text there is JSON, so that what is masked or put back leaves it valid.

JSON (RFC 8259) may be all of a text, a line of it, or stand within a sentence: an object is taken for JSON
from ``{`` on where a text in double quotes follows, an array where ``[`` begins a line. The first character
that JSON cannot have there ends it, and everything behind is ordinary text again. All is decided by what
stands before, so it is the same however a text is cut into pieces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from sllm.privacy.regex import lazy

__all__ = ["JsonPlaces", "Segment", "decoded_string", "encoded_string", "segments"]

SegmentKind = Literal["string", "scalar", "structure"]

_SPACE = frozenset(" \t\r\n")
_SCALAR = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.")
_IS_SCALAR = lazy(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_BEGINS_SCALAR = lazy(
    r"t(?:r(?:ue?)?)?|f(?:a(?:l(?:se?)?)?)?|n(?:u(?:ll?)?)?"
    r"|-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+)?)?(?:(?<=[0-9])[eE](?:[+-]?[0-9]*)?)?)?"
)
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_MAX_DEPTH = 512
_MAX_SCALAR = 400  # characters; a longer number is none

# Outside of JSON nothing matters but what can begin it, and whether a line has begun.
_OUTSIDE = lazy(r"[^{\[\n]+")
_IN_STRING = lazy(r'[^"\\\x00-\x1f]+')


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text that is JSON.

    Attributes:
        start, end: offsets.
        kind: ``"string"``: what stands between quotes; ``"scalar"``: a number, true, false or null;
            ``"structure"``: quotes, brackets, commas, colons and spaces.

    """

    start: int
    end: int
    kind: SegmentKind


class JsonPlaces:
    """Follows a text, and tells what may come next in the JSON that it is in.

    Attributes:
        place: ``""``: outside of JSON; ``"string"``: in a string; ``"escape"``: in a string, behind a part of
            an escape; ``"value"``: where a value has to come or may come; ``"key"``: where a key has to;
            ``"scalar"``: in a number, true, false or null; ``"colon"``, ``"comma"``: where these have to
            come, or the end of what is open.
        certain: whether something other than brackets and spaces says that this is JSON.

    """

    def __init__(self) -> None:
        self._blank = True  # whether the line has only spaces so far
        self._leave()

    def _leave(self) -> None:
        self.place = ""
        self.certain = False
        self._open: list[str] = []
        self._is_key = False
        self._may_end = False  # whether what is open may end here, being empty
        self._scalar = ""
        self._left = 0  # hexadecimal digits of an escape that are missing

    def feed(self, text: str) -> None:
        """Take the next piece of the text."""
        at = 0
        while at < len(text):
            at = self.step(text, at)

    def step(self, text: str, at: int) -> int:
        """Take the character at an offset, and more if they leave the place as it is; the offset behind."""
        skip = None
        if not self.place:
            skip = _OUTSIDE.match(text, at)
            if skip is not None and self._blank:
                self._blank = not skip[0].strip(" \t\r")
        elif self.place == "string":
            skip = _IN_STRING.match(text, at)
        if skip is not None:
            return skip.end()
        self._take(text[at])
        return at + 1

    def _take(self, char: str) -> None:
        if self.place == "scalar":
            if char in _SCALAR:
                self._scalar += char
                if not self._begins_scalar():
                    self._outside(char)
                return
            if not _IS_SCALAR.fullmatch(self._scalar):
                self._leave()
            else:
                self._scalar = ""
                self.certain = True
                self.place = "comma"
        if self.place == "string":
            if char == '"':
                self.place = "colon" if self._is_key else "comma"
                self.certain = True
            elif char == "\\":
                self.place, self._left = "escape", 0
            elif char < " ":
                self._outside(char)
        elif self.place == "escape":
            self._take_escape(char)
        elif not self.place or not self._take_structure(char):
            self._outside(char)

    def _take_escape(self, char: str) -> None:
        if self._left:
            self._left -= 1
            if char not in _HEX:
                self._outside(char)
            elif not self._left:
                self.place = "string"
        elif char == "u":
            self._left = 4
        elif char in _ESCAPES:
            self.place = "string"
        else:
            self._outside(char)

    def _take_structure(self, char: str) -> bool:
        """Takes a character between strings and scalars; False: JSON has none such there."""
        if char in _SPACE:
            if char == "\n":
                self._blank = True
            return True
        ends = self._open[-1]
        if char == ends and (self.place == "comma" or self._may_end):
            self._open.pop()
            self._may_end = False
            if self._open:
                self.place = "comma"
            else:
                self._leave()
                self._blank = False
            return True
        self._may_end = False
        if self.place == "comma" and char == ",":
            self.place = "key" if ends == "}" else "value"
        elif self.place == "colon" and char == ":":
            self.place = "value"
        elif char == '"' and self.place in ("key", "value"):
            self._is_key = self.place == "key"
            self.place = "string"
        elif self.place == "value" and char in "{[" and len(self._open) < _MAX_DEPTH:
            self._begin(char)
        elif self.place == "value" and char in _SCALAR:
            self.place, self._scalar = "scalar", char
            return self._begins_scalar()
        else:
            return False
        return True

    def _begins_scalar(self) -> bool:
        return len(self._scalar) <= _MAX_SCALAR and _BEGINS_SCALAR.fullmatch(self._scalar) is not None

    def _begin(self, char: str) -> None:
        self._open.append("}" if char == "{" else "]")
        self.place = "key" if char == "{" else "value"
        self._may_end = True

    def _outside(self, char: str) -> None:
        """Takes a character that is none of the JSON before it."""
        if self.place:
            self._leave()
            self._blank = False
        if char == "{" or (char == "[" and self._blank):
            self._begin(char)
        elif char == "\n":
            self._blank = True
        elif char not in " \t\r":
            self._blank = False


_BEGINS = lazy(r'\{[ \t\r\n]*["}]|^[ \t\r]*\[', re.M)


def segments(text: str) -> list[Segment]:
    """The parts of a text that are JSON, in order; what is between them is not."""
    found: list[Segment] = []
    if _BEGINS.search(text) is None:
        return found
    places = JsonPlaces()
    at = 0
    while at < len(text):
        start, before = at, places.place
        at = places.step(text, start)
        kind = _kind(before, places.place, text[start])
        if kind is not None:
            if found and found[-1].end == start and found[-1].kind == kind:
                start = found.pop().start
            found.append(Segment(start, at, kind))
    return [one for one in found if one.kind != "scalar" or _is_whole(text, one)]


def _is_whole(text: str, scalar: Segment) -> bool:
    """Whether nothing goes on behind it that makes something else of it: ``[2024-06-17 12:00]`` begins a line
    of a log.
    """
    after = text[scalar.end : scalar.end + 1]
    whole = _IS_SCALAR.fullmatch(text, scalar.start, scalar.end) is not None
    return whole and (not after or after in ",]}" or after in _SPACE)


def _kind(before: str, after: str, char: str) -> SegmentKind | None:
    """What a character is, by the places before it and after it."""
    if before in ("string", "escape"):
        if after in ("string", "escape"):
            return "string"
        return "structure" if char == '"' else None
    if after == "scalar":
        return "scalar"
    if before or after:
        return "structure" if char in '{}[],:"' or char in _SPACE else None
    return None


def encoded_string(value: str) -> str:
    """What stands between the quotes of a JSON string for a text."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def decoded_string(text: str) -> str | None:
    """What a JSON string says, from what stands between its quotes; None: it is not valid, or says something
    that UTF-8 cannot.
    """
    try:
        value = json.loads(f'"{text}"')
        value.encode()
    except ValueError:
        return None
    return str(value)

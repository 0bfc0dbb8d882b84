"""Where in a text there is JSON, so that what is masked or put back leaves it valid.

JSON (RFC 8259) may be all of a text, a line of it, or stand within a sentence: an object is taken for JSON
from ``{`` on where a text in double quotes follows, an array where ``[`` begins a line. The first character
that JSON cannot have there ends it, and everything behind is ordinary text again.
"""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

from sllm.privacy.regex import lazy

__all__ = ["JsonPlaces", "Segment", "decoded_string", "encoded_string"]

_BEGIN = lazy(r'\{(?=[ \t\r\n]*(?:["}]|\Z))|(?<=\n)[ \t\r]*\[')
_ARRAY = lazy(r"[ \t\r]*\[")
_STRING = lazy(r'(?:[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_SPACE = lazy(r"[ \t\r\n]+")
# What goes on behind it makes something else of it: "[2024-06-17 12:00]" begins a line of a log.
_SCALAR = lazy(
    r"(?:true|false|null|-?(?:0|[1-9][0-9]{0,399})(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,9})?)(?=[\s,\]}]|\Z)"
)
_MAX_DEPTH = 512


class Segment(NamedTuple):
    """A part of a text that is JSON.

    Attributes:
        start, end: offsets.
        kind: ``"string"``: what stands between quotes; ``"scalar"``: a number, true, false or null;
            ``"structure"``: quotes, brackets, commas, colons and spaces.

    """

    start: int
    end: int
    kind: Literal["string", "scalar", "structure"]


class JsonPlaces:
    """Follows a text, and tells what may come next in the JSON that it is in.

    Attributes:
        place: ``""``: outside of JSON; ``"string"``: in a string; ``"value"``: where a value has to come or
            may come; ``"key"``: where a key has to; ``"colon"``, ``"comma"``: where these have to come, or
            the end of what is open.
        certain: whether something other than brackets and spaces says that this is JSON.

    """

    def __init__(self) -> None:
        self._blank = True  # whether the line has only spaces so far
        self._leave()

    def _leave(self) -> None:
        self.place = ""
        self.certain = False
        self._open: list[str] = []  # what has to close what is open
        self._is_key = False
        self._may_end = False  # whether what is open may end here, being empty

    def feed(self, text: str) -> list[Segment]:
        """Takes the next piece of the text, and returns what of it is JSON, in order. A piece may end within
        a string, but not within an escape, a number or a word.
        """
        found: list[Segment] = []
        at = 0
        while at < len(text):
            if not self.place:
                start, at = self._enter(text, at)
                kind = "structure"
            elif self.place == "string" and text[at] != '"':
                start, at = at, _STRING.match(text, at).end()  # type: ignore[union-attr]
                kind = "string"
                if start == at:
                    self._leave()
            else:
                is_scalar = self.place == "value" and _SCALAR.match(text, at)
                start, at = at, self._take(text, at)
                kind = "scalar" if is_scalar else "structure"
            if start < at and found and found[-1].end == start and found[-1].kind == kind:
                start = found.pop().start
            if start < at:
                found.append(Segment(start, at, kind))  # type: ignore[arg-type]
        return found

    def _enter(self, text: str, at: int) -> tuple[int, int]:
        """Where JSON begins, from an offset on, and the offset behind the bracket."""
        found = (_ARRAY.match(text) if at == 0 and self._blank else None) or _BEGIN.search(text, at)
        if found is None:
            _, newline, line = text[at:].rpartition("\n")
            self._blank = (bool(newline) or self._blank) and not line.strip(" \t\r")
            return len(text), len(text)
        self._blank = False
        self._begin(text[found.end() - 1])
        return found.end() - 1, found.end()

    def _begin(self, bracket: str) -> None:
        self._open.append("}" if bracket == "{" else "]")
        self.place = "key" if bracket == "{" else "value"
        self._may_end = True

    def _take(self, text: str, at: int) -> int:
        """Takes what stands at an offset outside of strings; the offset behind it, or the same one where JSON
        has nothing like it and so has ended.
        """
        if space := _SPACE.match(text, at):
            return space.end()
        char = text[at]
        may_end, self._may_end = self._may_end, False
        if self.place == "string":
            self.place, self.certain = "colon" if self._is_key else "comma", True
        elif char == self._open[-1] and (self.place == "comma" or may_end):
            self._open.pop()
            self.place = "comma"
            if not self._open:
                self._leave()
        elif self.place == "comma" and char == ",":
            self.place = "key" if self._open[-1] == "}" else "value"
        elif self.place == "colon" and char == ":":
            self.place = "value"
        elif char == '"' and self.place in ("key", "value"):
            self._is_key = self.place == "key"
            self.place = "string"
        elif self.place == "value" and char in "{[" and len(self._open) < _MAX_DEPTH:
            self._begin(char)
        elif self.place == "value" and (scalar := _SCALAR.match(text, at)):
            self.place, self.certain = "comma", True
            return scalar.end()
        else:
            self._leave()
            return at
        return at + 1


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

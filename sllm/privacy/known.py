"""Values that were found once, found again wherever they stand and however they are written.

The vault masks by this and the last check before sending looks by this, so that what the one leaves the other
does not complain about.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding
from sllm.privacy.normal import View, decoded, folded, packed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LITERAL", "KnownValues"]

# The kind of a piece of the user's text that looks like a part of a placeholder; it is masked for exactness
# and is no secret.
LITERAL = "TEXT"

# From so many characters on a value is looked for inside longer words too.
_LONG = 8
# From so many digits on a value is looked for by its digits alone.
_DIGITS = 7
# From so many bytes on a value is looked for in base64 and hexadecimal.
_PACKED = 6
_NUMBER = re.compile(r"[0-9](?:[ \t\-._()/,:+]{0,3}[0-9])*")
_ASCII_WORD = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


@dataclass(frozen=True, slots=True)
class _Known:
    form: str  # folded
    kind: str
    bounded: bool  # only as a word of its own
    cased: str | None  # without case folding, where the case has to agree


class KnownValues:
    """A set of values with their kinds, and the search for them.

    Values of one character are not looked for. Short ones that begin or end with an ASCII letter or digit
    count only where no other follows there; short words of letters only (Will, May) only in their own case.
    """

    def __init__(self) -> None:
        self._values: dict[str, _Known] = {}
        self._digits: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: str, kind: str) -> bool:
        """Takes a value in; False if it, or one that is compared as the same, was there."""
        form = folded(value).text
        if len(form.strip()) < 2:
            return False
        short = len(form) < _LONG
        cased = value if short and value.isascii() and value.isalpha() else None
        key = cased or form
        if key in self._values:
            return False
        self._values[key] = _Known(form, kind, short, cased)
        digits = "".join(char for char in form if "0" <= char <= "9")
        # The digits of a street address are no number that anybody writes.
        if len(digits) >= _DIGITS and len(digits) >= 0.6 * sum(char.isalnum() for char in form):
            self._digits.setdefault(digits, kind)
        return True

    def add_all(self, texts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> None:
        """Takes in what was found in each of the texts, but for pieces of placeholders."""
        for text, found in zip(texts, findings, strict=True):
            for one in found:
                if one.kind != LITERAL:
                    self.add(text[one.start : one.end], one.kind)

    def update(self, other: KnownValues) -> None:
        """Takes in what another set holds; what was here keeps its kind."""
        self._values = {**other._values, **self._values}
        self._digits = {**other._digits, **self._digits}

    def copy(self) -> KnownValues:
        """A set of its own with the same values."""
        other = KnownValues()
        other.update(self)
        return other

    def findings(self, text: str, view: View | None = None) -> Iterator[Finding]:
        """Where the values stand in a text, plainly or under an encoding.

        Args:
            text: to search.
            view: its :func:`~sllm.privacy.normal.folded` view, if the caller has it.

        """
        if not self._values:
            return
        yield from self._in_view(text, view or folded(text))
        others = list(decoded(text))
        if "+" in text:  # for a space, as in the queries of URLs
            others.append(View(text.replace("+", " "), None))
        for other in others:
            for one in self._in_view(other.text, folded(other.text)):
                yield Finding(*other.span(one.start, one.end), one.kind)
        yield from self._in_packed(text)

    def _in_view(self, text: str, view: View) -> Iterator[Finding]:
        body = view.text
        for known in self._values.values():
            form = known.form
            at = body.find(form)
            while at >= 0:
                end = at + len(form)
                if _stands(body, at, end, known):
                    start, stop = view.span(at, end)
                    if known.cased is None or known.cased in (text[start:stop], _upright(text[start:stop])):
                        yield Finding(start, stop, known.kind)
                        at = body.find(form, end)
                        continue
                at = body.find(form, at + 1)
        if self._digits:
            yield from self._by_digits(view)

    def _in_packed(self, text: str) -> Iterator[Finding]:
        """Runs of base64 or hexadecimal that hold a value. Short values turn up in noise and are left out."""
        long = [known for known in self._values.values() if len(known.form.encode()) >= _PACKED]
        if not long:
            return
        runs = list(packed(text))
        bodies = [folded(body).text for _, _, body in runs]
        everything = "\n".join(bodies)
        for known in long:
            if known.form in everything:
                for (start, end, _), body in zip(runs, bodies, strict=True):
                    if known.form in body:
                        yield Finding(start, end, known.kind)

    def _by_digits(self, view: View) -> Iterator[Finding]:
        numbers: list[str] = []
        places: list[int] = []
        for run in _NUMBER.finditer(view.text):
            if run.end() - run.start() < _DIGITS:
                continue
            raw = run[0]
            if raw.isdigit():
                numbers.append(raw)
                places.extend(range(run.start(), run.end()))
            else:
                at = [i for i, char in enumerate(raw, run.start()) if "0" <= char <= "9"]
                numbers.append("".join([view.text[i] for i in at]))
                places.extend(at)
            numbers.append(" ")
            places.append(-1)
        body = "".join(numbers)
        for digits, kind in self._digits.items():
            first = body.find(digits)
            while first >= 0:
                last = first + len(digits)
                yield Finding(*view.span(places[first], places[last - 1] + 1), kind)
                first = body.find(digits, last)


def _stands(body: str, at: int, end: int, known: _Known) -> bool:
    """Whether a short value stands there as a word of its own."""
    if not known.bounded:
        return True
    if at and known.form[0] in _ASCII_WORD and body[at - 1] in _ASCII_WORD:
        return False
    return not (known.form[-1] in _ASCII_WORD and body[end : end + 1] in _ASCII_WORD)


def _upright(text: str) -> str:
    """The text with full-width letters made ASCII and what has no width left out, in its own case."""
    return "".join(unicodedata.normalize("NFKC", char) for char in text if folded(char).text)

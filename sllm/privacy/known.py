"""Finds values that were found once wherever they occur again, however they are written.

The vault masks by this, and the last check before sending searches by this: so the check does not complain
about what masking leaves.
"""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

from sllm.extras import needs
from sllm.privacy.findings import LITERAL, Finding
from sllm.privacy.names.persons import parts
from sllm.privacy.regex import lazy
from sllm.privacy.text import View, compact, decoded, folded, joined_numbers, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

__all__ = ["KnownValues"]

# At this many characters a value is also searched inside longer words.
_LONG = 8
# At this many digits a value is also searched by its digits alone.
_DIGITS = 7
# At this many bytes a value is also searched in base64 and hexadecimal.
_PACKED = 6
# At this many letters and digits, ASCII or other, a value is also searched spelled out.
_SPELLED = 8
_SPELLED_OTHER = 3
_DIGIT = lazy("[0-9]")
_ASCII_WORD = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


class _Known(NamedTuple):
    form: str  # folded
    kind: str
    bounded: bool  # only as a word of its own
    cased: str | None  # without case folding, where the case has to agree


class _Finder:
    """Finds many strings in a text, all in one pass (Aho and Corasick, 1975)."""

    # So many characters are searched at a time, which bounds how many matches are held.
    _PIECE = 1 << 16

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}  # of each string
        self._automaton: tuple[int, list[str], Any] = (0, [], None)

    def copy(self) -> _Finder:
        """Another one with the same strings."""
        other = _Finder()
        other.kinds, other._automaton = self.kinds.copy(), self._automaton
        return other

    def add(self, form: str, kind: str) -> None:
        """Adds a string of two or more characters; one that is there keeps its kind."""
        self.kinds.setdefault(form, kind)

    def find(
        self, body: str, kind_at: Callable[[int, str], str | None] | None = None
    ) -> Iterator[tuple[int, int, str]]:
        """Start, end and kind of each occurrence; those of one string do not overlap.

        Args:
            body: to search.
            kind_at: for an offset and the string that stands there: its kind there, or None; None: the
                string's own kind.

        """
        if not self.kinds:
            return
        ends: dict[int, int] = {}
        longest, forms, automaton = self._compiled()
        for low in range(0, len(body), self._PIECE):
            piece = body[low : low + self._PIECE + longest - 1]
            for n, first, last in automaton.find_matches_as_indexes(piece, overlapping=True):
                at = low + first
                if first < self._PIECE and at >= ends.get(n, 0):
                    kind = kind_at(at, forms[n]) if kind_at else self.kinds[forms[n]]
                    if kind is not None:
                        ends[n] = low + last
                        yield at, low + last, kind

    def _compiled(self) -> tuple[int, list[str], Any]:
        """The length of the longest string, all of them, and their automaton."""
        if len(self._automaton[1]) != len(self.kinds):
            with needs("privacy"):
                from ahocorasick_rs import AhoCorasick
            forms = list(self.kinds)
            self._automaton = max(map(len, forms)), forms, AhoCorasick(forms)
        return self._automaton


class KnownValues:
    """A set of values with their kinds, and the search for them.

    Values of one character are not searched. Short ones that begin or end with an ASCII letter or digit count
    only where no other adjoins there; short words of letters only (Will, May) only in their own case.
    """

    def __init__(self) -> None:
        self._values: dict[str, _Known] = {}
        self._forms: dict[str, tuple[_Known, ...]] = {}
        self._plain, self._packed, self._digits, self._spelled = (_Finder() for _ in range(4))

    def copy(self) -> KnownValues:
        """Another set with the same values."""
        other = KnownValues()
        other._values, other._forms = self._values.copy(), self._forms.copy()
        finders = (self._plain, self._packed, self._digits, self._spelled)
        other._plain, other._packed, other._digits, other._spelled = (one.copy() for one in finders)
        return other

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: str, kind: str) -> None:
        """Adds a value, unless it, or one that compares equal, is there already; of a whole name the given
        name and the surname, too.
        """
        if kind == "NAME":
            for part in parts(value):
                self.add(part, kind)
        form = folded(value).text
        if len(form.strip()) < 2:
            return
        short = len(form) < _LONG
        cased = value if short and value.isascii() and value.isalpha() else None
        key = cased or form
        if key in self._values:
            return
        known = self._values[key] = _Known(form, kind, short, cased)
        self._forms[form] = (*self._forms.get(form, ()), known)
        self._plain.add(form, kind)
        if len(form.encode()) >= _PACKED:
            self._packed.add(form, kind)
        digits = "".join(_DIGIT.findall(form))
        # Nobody writes the digits of a street address by themselves.
        if len(digits) >= _DIGITS and len(digits) >= 0.6 * sum(char.isalnum() for char in form):
            self._digits.add(digits, kind)
        spelled = compact(View(form, None)).text
        others = 0 if spelled.isascii() else sum(not c.isascii() and c.isalnum() for c in spelled)
        if others >= _SPELLED_OTHER or others + sum(map(str.isalnum, spelled)) >= _SPELLED:
            self._spelled.add(spelled, kind)

    def add_all(self, text: str, findings: Iterable[Finding]) -> None:
        """Adds what was found in a text, except for pieces of placeholders."""
        for one in findings:
            if one.kind != LITERAL:
                self.add(text[one.start : one.end], one.kind)

    def findings(self, text: str, view: View | None = None) -> Iterator[Finding]:
        """Where the values occur in a text, plainly or under an encoding.

        Args:
            text: to search.
            view: its :func:`~sllm.privacy.text.folded` view, if the caller has it.

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
        if self._packed.kinds:  # short values turn up in noise and are left out
            runs = list(unpacked(text))
            bodies = [folded(body).text for _, body in runs]
            starts = list(itertools.accumulate([len(body) + 1 for body in bodies], initial=0))
            for at, _, kind in self._packed.find("\n".join(bodies)):
                yield Finding(*runs[bisect.bisect_right(starts, at) - 1][0], kind)

    def _in_view(self, text: str, view: View) -> Iterator[Finding]:
        body = view.text

        def kind_at(at: int, form: str) -> str | None:
            for known in self._forms[form]:
                if known.bounded and not _is_word(body, at, at + len(form), known):
                    continue
                if known.cased is None:
                    return known.kind
                start, end = view.span(at, at + len(form))
                if known.cased in (text[start:end], _half_width(text[start:end])):
                    return known.kind
            return None

        plain = {view.span(start, end): kind for start, end, kind in self._plain.find(body, kind_at)}
        for span, kind in plain.items():
            yield Finding(*span, kind)
        if self._digits.kinds:
            yield from self._closer(self._digits, joined_numbers(view), plain)
        if self._spelled.kinds:
            yield from self._closer(self._spelled, compact(view), plain)

    def _closer(self, finder: _Finder, view: View, plain: Container[tuple[int, int]]) -> Iterator[Finding]:
        """What is found in a view without what stands between letters or digits, and not elsewhere."""
        for start, end, kind in finder.find(view.text):
            span = view.span(start, end)
            if span not in plain:
                yield Finding(*span, kind)


def _is_word(body: str, at: int, end: int, known: _Known) -> bool:
    """Whether a value that has to be a word of its own is one there."""
    if at and known.form[0] in _ASCII_WORD and body[at - 1] in _ASCII_WORD:
        return False
    return not (known.form[-1] in _ASCII_WORD and body[end : end + 1] in _ASCII_WORD)


def _half_width(text: str) -> str:
    """The text with full-width letters as ASCII, and without characters of no width; the case stays."""
    return "".join(unicodedata.normalize("NFKC", char) for char in text if folded(char).text)

"""Chinese people whom something announces (a label, a form of address, 我叫, a phone number right behind the
name), and companies by the form that ends their name, by the rules of ``names_zh.ini``. Other names need the
tagger of the extra ``names``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding
from sllm.privacy.names.word_lists import ENGLISH
from sllm.privacy.patterns import rules
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["candidates", "scan"]

_P = Patterns("names_zh")
_MOST_LISTED = 50


def candidates(text: str) -> Iterator[tuple[int, int]]:
    """Ranges that can be a name: a surname and one or two characters more."""
    for found in _P.candidate.finditer(text):
        start, end = found.span("name")
        if end - start > 2:
            yield start, end - 1
        yield start, end


def _listed(text: str, at: int) -> Iterator[Finding]:
    """The other names of a list, after its first."""
    for _ in range(_MOST_LISTED):
        found = _P.next.match(text, at)
        if not found:
            return
        at = found.end("name")
        yield Finding(*found.span("name"), "NAME", 0.7)


def _is_latin_name(check: str, name: str) -> bool:
    return check == "latin name" and ENGLISH.not_names.isdisjoint(name.split(" "))


def scan(text: str) -> Iterator[Finding]:
    """People and companies in a plain view (:func:`sllm.privacy.text.plain`)."""
    listed = 0  # the end of the last list
    for one in rules.scan(text, "names_zh", _is_latin_name):
        yield one
        if one.kind == "NAME" and one.end > listed:
            for other in _listed(text, one.end):
                listed = other.end
                yield other

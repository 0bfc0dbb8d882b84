"""Values that the words before them announce: "passport no. ...", "生日：...", "password = ...".

A value after a clear label needs no checksum. Labels are looked up word by word (English, and the keys of
JSON, of environments and of code) or found by one pattern (Chinese); a value is only searched after a label.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns.rules import Rule, rules
from sllm.privacy.patterns.secrets import secret_at
from sllm.privacy.regex import Patterns, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("labels")
_SCORE = 0.85


class _Label(NamedTuple):
    """A label, what may follow it up to the value, and the forms that the value can have.

    Attributes:
        kind: of the value.
        pattern: of the label and what follows it.
        loose: it is an ordinary word, too: not within another one.
        forms: rules of which the first that fits decides.

    """

    kind: str
    pattern: re.Pattern[str]
    loose: bool
    forms: list[Rule]

    def value(self, text: str, at: int) -> Finding | None:
        """The value of the label that is at an offset, if there is one."""
        link = self.pattern.match(text, at)
        end = link.end() if link else len(text)
        for form in self.forms:
            found = form.pattern.match(text, end)
            one = form.judge(text, found) if found else None
            if one:
                return Finding(one.start, one.end, self.kind, _SCORE)
        return None


@functools.cache
def _labels(language: str) -> dict[str, list[_Label]]:
    """What a label begins with (in English its first word, in Chinese all of it) -> the labels, the longest
    first.

    The words of a label are separated by "_", "-", a space or nothing, so that passport_number and
    passportNumber count.
    """
    table: defaultdict[str, list[_Label]] = defaultdict(list)
    link = data.sections("labels")["links"][language]
    forms = {form.name: form for form in rules("labels", "form ")}
    rows = [(label, row) for row in data.table("labels")[language] for label in row["labels"]]
    for label, row in sorted(rows, key=lambda pair: -len(pair[0])):
        begin = re.match("[a-z]+[0-9]?", label) if language == "english" else None
        words = r"[ _.-]?".join(map(re.escape, label.split(" ")))
        table[begin[0] if begin else label].append(
            _Label(
                row["kind"],
                lazy(words + link, re.I),
                row.get("loose", False),
                [forms[name] for name in row["forms"]],
            )
        )
    return dict(table)


# Plain words only, the longest first: so the engine can skip to their first characters.
_CHINESE_ANY = lazy(lambda: "|".join(_labels("chinese")))


def _after_english(text: str, budget: Budget) -> Iterator[Finding]:
    done = 0  # the end of the last secret: what it is made of is not a label
    english, secret_words = _labels("english"), data.word_set("secrets", "words")
    for word in _P.camel.finditer(text):
        lower = word[0].lower()
        labels = english.get(lower)
        if not labels and lower not in secret_words:
            continue
        start = word.start()
        if not budget.spend(start):
            return
        if lower in secret_words and start >= done:
            one = secret_at(text, start, word.end(), lower)
            if one:
                done = one.end
                yield one
        before = text[start - 1 : start]
        inside = before.isascii() and before.isalpha()
        if not labels or (inside and word[0][0].islower()) or (labels[0].loose and (inside or before == "_")):
            continue  # std_handle, newLine
        found = (label.value(text, start) for label in labels)
        yield from [one for one in found if one][:1]


def _after_chinese(text: str, budget: Budget) -> Iterator[Finding]:
    labels = _labels("chinese")
    for label in budget.each(_CHINESE_ANY.finditer(text)):
        if label[0][0].isascii():  # vx, QQ, LINE: not inside another word
            before, after = (
                text[max(0, label.start() - 1) : label.start()],
                text[label.end() : label.end() + 1],
            )
            if (before.isascii() and before.isalpha()) or "a" <= after <= "z":
                continue
        found = (one.value(text, label.start()) for one in labels[label[0]])
        yield from [one for one in found if one][:1]


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _after_english(text, budget)
    if not text.isascii():
        yield from _after_chinese(text, budget)
    yield from budget.rest("ACCOUNT")

"""People in Latin script whom something announces: a title, a label, a phrase, a greeting, the end of a
letter. The words of a name alone say nothing here; :class:`~sllm.privacy.CensusDetector` reads those.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.names.word_lists import (
    ENGLISH,
    looks_like_surname,
    not_a_common_word,
    trimmed,
)
from sllm.privacy.patterns import rules
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("names_en")
_FILE = "names_en_context"
# How far from a word its other uses are looked for, and on each side lines that say whether it is in code.
_FAR, _NEAR = 4096, 512
_QUOTES = " \"'*`\n\t({["
_SIGNS = {"=": ":", ">": ":"}  # name="Ada", <name>Ada: as after a colon
_SEPARATORS = frozenset(
    [", ", " and ", ", and ", "; ", " & ", " / ", "/", "\n", "\n- ", ",\n", " or ", " with "]
)
_CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")
_PARTICLES = ("van", "von", "de", "di", "la", "le", "al")


@functools.cache
def _phrases() -> dict[tuple[str, str], list[tuple[str, float]]]:
    """Sign after a phrase, or "", and last word of it -> the phrases that a name follows, the longest first,
    and how surely: after a loose one many other things than a name stand.
    """
    ends: defaultdict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    loose = data.word_set(_FILE, "loose")
    for sign, phrases in data.table(_FILE)["phrases"].items():
        for phrase in sorted(phrases, key=len, reverse=True):
            score = 0.9 if sign == "." else 0.6 if phrase + sign in loose else 0.8
            ends[sign, phrase.rpartition(" ")[2]].append((phrase, score))
    return dict(ends)


def _announced(before: str) -> tuple[float, str]:
    """How surely a name is announced right before a capitalised word (0, or .6 to .9), and by what: a phrase
    and the sign after it.
    """
    head = before.rstrip(_QUOTES)
    sign = head[-1:]
    if sign in ".:=>?,":
        head = head[:-1].rstrip(" \"'*`")
    else:
        # The end of a letter: Regards, and a line below it a name.
        sign = "," if "\n" in before[len(head) :] else ""
    sign = _SIGNS.get(sign, sign)
    found = _P.last_word.search(head)
    last = found[0] if found else ""
    if sign != ".":  # 30 ms. is no title
        head, last = head.lower(), last.lower()
    for phrase, score in _phrases().get((sign, last), ()):
        # A word begins at a capital, too: customerName.
        if head.endswith(phrase) and (phrase == last or not head[: -len(phrase)][-1:].isalpha()):
            return score, phrase + sign
    return 0.0, ""


def _known(word: str) -> bool:
    return word in ENGLISH.given or word in ENGLISH.surnames or looks_like_surname(word)


class _Reader:
    """Reads the runs of capitalised words of one text in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.budget = Budget(text)
        self._last = -1  # the end of the last name found
        self._listed = False  # whether more may follow it in a list
        self._code: tuple[int, bool] = (-2, False)

    def run(self, run: str, start: int) -> Finding | None:
        """The name in the next run, which begins at an offset."""
        greeting = run in data.word_set(_FILE, "greetings")  # also below "Thanks,"
        if greeting or run in ENGLISH.not_names or not self.budget.spend(start):
            return None
        words, end = run.split(" "), start + len(run)
        n, score = self._addressed(words, end)
        start += sum(len(word) + 1 for word in words[:n])
        words = words[n:]
        score = score or (self._by_what_is_around(words, start, end) if words else 0.0)
        span = trimmed(" ".join(words), start, sure=score == 0.8) if score else None
        value = self.text[slice(*span)] if span else ""
        if not span or (value.isupper() and " " not in value):
            return None
        self._last, self._listed = span[1], score >= 0.7
        if score == 0.8:
            span = span[0], self._with_second(span[1], value)
            self._last = span[1]
        return Finding(*span, "NAME", score)

    def _addressed(self, words: list[str], end: int) -> tuple[int, float]:
        """How many titles or greetings the run begins with, and the score that they give it."""
        n = next(
            (i for i, word in enumerate(words) if word not in data.word_set(_FILE, "titles")), len(words)
        )
        if n or len(words) == 1:
            return n, 0.9 if n else 0.0
        first, last = words[1], words[-1]
        if words[0] in data.word_set(_FILE, "greetings"):
            follow = self.text[end : end + 1]
            if follow not in ",!.\n—:" or first in data.word_set(_FILE, "not people"):
                return 1, 0.0
            known = 0.8 if _known(first) else 0.6 if follow in (",", "!") else 0.0
            return 1, known if not_a_common_word(first) else 0.0
        ranked = words[0] in data.word_set(_FILE, "ranks") and (len(words) > 2 or _known(first))
        ranked = ranked and not_a_common_word(first) and not_a_common_word(last)
        return (1, 0.8) if ranked else (0, 0.0)

    def _by_what_is_around(self, words: list[str], start: int, end: int) -> float:
        text = self.text
        free = all(map(not_a_common_word, words))  # its letters alone do not rule a name out
        if self._listed and start - self._last <= 6 and text[self._last : start] in _SEPARATORS and free:
            # Another one in a list of people.
            return 0.7 if len(words) >= 2 or words[0] in ENGLISH.given else 0.0
        if 2 <= len(words) <= 5 and words[-1] not in ENGLISH.not_names and _P.mailbox.match(text, end):
            return 0.6
        before = text[max(0, start - 40) : start]
        score, phrase = _announced(before) if before.endswith(tuple(" :=,\"'*\n\t>`({[")) else (0.0, "")
        if phrase.endswith(":") and not self._fits_its_label(words, start, end, free):
            return 0.0
        if phrase == "this is":
            called = text.startswith(_CALLING, end) or (len(words) >= 2 and _known(words[-1]))
            return 0.7 if called else 0.0
        sure = score >= 0.8 or (free and (len(words) >= 2 or _known(words[0])))
        return score if sure else 0.0

    def _fits_its_label(self, words: list[str], start: int, end: int, free: bool) -> bool:
        """Whether what follows a label can be a name. A label in code or configuration says little, and there
        it has to look like one; so has a word that the text also uses without a capital.
        """
        word, text = words[0], self.text
        if free and (word in ENGLISH.given or _known(words[-1])):
            return True
        if len(words) == 1:
            if text[end : end + 1] in ("[", "(") or (_P.inner_capital.search(word) and not free):
                return False  # client = Client(, name: TargetMachine
            around, lower = text[max(0, start - _FAR) : end + _FAR], word.lower()
            if lower in around and re.search(rf"(?<![A-Za-z]){lower}(?![A-Za-z])", around):
                return False
        line = text.rfind("\n", 0, start)
        if self._code[0] != line:  # one answer for each line
            self._code = line, self._in_code(start)
        return not self._code[1]

    def _in_code(self, at: int) -> bool:
        """Whether the lines around an offset are code or configuration, and not a record of somebody."""
        low, high = max(0, at - _NEAR), at + _NEAR
        low = self.text.find("\n", low, at) + 1 if low else 0
        return bool(_P.code.search(self.text, low, high)) and not _P.of_people.search(self.text, low, high)

    def _with_second(self, end: int, value: str) -> int:
        """The end with the given name after a comma: O'Donnell, Fergus."""
        second = None
        if " " not in value or value.lower().startswith(_PARTICLES):
            second = _P.second.match(self.text, end)
        return second.end() if second and second["word"].split(" ")[0] not in ENGLISH.not_names else end


def _lower(text: str) -> Iterator[Finding]:
    for found in _P.lower.finditer(text):
        said, first, second = found["said"], found["first"], found["second"]
        whole = second is not None and second.capitalize() in ENGLISH.surnames
        given = first.capitalize() in ENGLISH.sure_given and (whole or not said or said.lower() != "this is")
        if given or (not said and first.capitalize() in ENGLISH.surnames):
            yield Finding(found.start("first"), found.end("second" if whole else "first"), "NAME", 0.6)


def _is(check: str, name: str) -> bool:
    """Whether the first word of a sentence about a person is a name."""
    pronoun = name in data.word_set(_FILE, "pronouns") or name in ENGLISH.famous
    return check == "person" and not pronoun and not_a_common_word(name)


def scan(text: str) -> Iterator[Finding]:
    """People and companies in a plain view (:func:`sllm.privacy.text.plain`)."""
    yield from _lower(text)
    reader = _Reader(text)
    for run in _P.candidate.finditer(text):
        found = reader.run(run[0], run.start())
        if found:
            yield found
        if reader.budget.spent:
            break
    yield from reader.budget.rest("NAME")
    yield from rules.scan(text, "names_en", _is)

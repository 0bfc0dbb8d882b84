"""People in Latin script whom something announces: a title, a label, a phrase, a greeting, the end of a
letter. The words of a name alone say nothing here; :class:`~sllm.privacy.CensusDetector` reads those.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.names.code import in_code
from sllm.privacy.names.word_lists import (
    CANDIDATE,
    CAP,
    ENGLISH,
    INNER_CAPITAL,
    LETTER,
    looks_like_surname,
    not_a_common_word,
    trimmed,
)
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_Endings = dict[str, tuple[str, ...]]


def _by_end(phrases: list[str]) -> _Endings:
    """Their last two characters -> the phrases, the longest first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return {end: tuple(p for p in longest_first if p.endswith(end)) for end in {p[-2:] for p in phrases}}


class _Context(NamedTuple):
    """The words around names, of ``names_en_context.json``.

    Attributes:
        titles: titles that are nothing else: Mr, Dr.
        stopped: titles with a full stop, as they end the text before a name.
        ranks: titles that are ordinary words too: what follows has to be no ordinary word.
        greetings: what people are greeted with.
        not_people: names that are greeted and are not people: assistants and models.
        pronouns: what a sentence about people begins with, other than a name.
        loose: phrases that many other things than a name follow; labels with a colon.
        after: a sign, or "" for none -> the phrases that a name follows after that sign, by end.
        last: their last words: one look-up decides for most text.

    """

    titles: frozenset[str]
    stopped: tuple[str, ...]
    ranks: frozenset[str]
    greetings: frozenset[str]
    not_people: frozenset[str]
    pronouns: frozenset[str]
    loose: frozenset[str]
    after: dict[str, _Endings]
    last: frozenset[str]


@functools.cache
def _context() -> _Context:
    table: dict[str, list[str]] = data.table("names_en_context")
    labels = table["labels"]
    after = {"": table["verbs"], ":": labels, "=": labels, "?": table["questions"], ",": table["closings"]}
    return _Context(
        titles=frozenset(table["titles"]),
        stopped=tuple(f"{title}. " for title in table["titles with a full stop"]),
        ranks=frozenset(table["ranks"]),
        greetings=frozenset(table["greetings"]),
        not_people=frozenset(table["not people"]),
        pronouns=frozenset(table["pronouns"]),
        loose=frozenset([*table["loose verbs"], *(f"{label}:" for label in table["loose labels"])]),
        after={sign: _by_end(phrases) for sign, phrases in after.items()},
        last=frozenset(re.split("[ /]", phrase)[-1] for each in after.values() for phrase in each),
    )


_AM_BEFORE = ("I am ", "I'm ", "I’m ", "i am ", "i'm ")
_LAST_WORD = lazy(r"[a-zé']+\Z")
_TAG = lazy(r"<(?:[a-z]{0,20}_?[Nn]ame|patient|contact|author|customer|sender|recipient|owner)>\Z")
_LINE_CLOSED = lazy(
    r"(?:sincerely|regards|wishes|truly|faithfully|cheers|thanks|love|best|yours|cordially|respectfully|"
    r"warmly|thank you|signed)[,.!]?[ \t]*\n\s*\Z",
    re.I,
)
_SEPARATORS = frozenset(
    [", ", " and ", ", and ", "; ", " & ", " / ", "/", "\n", "\n- ", ",\n", " or ", " with "]
)
_CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")


def _announced(before: str, word: str, follow: str) -> float:
    """How surely a name is announced right before a capitalised word: 0, 0.6 or 0.8.

    Args:
        before: the text before the word.
        word: the first word of the run.
        follow: the character after the run.

    """
    head = before.rstrip(" \"'*`\n\t({[")
    sign = head[-1:]
    if sign == ">":
        return 0.8 if _TAG.search(head) else 0.0
    context = _context()
    if sign == "=" and (before[-1] in "= " or INNER_CAPITAL.search(word)) and follow == "(":
        return 0.0  # client = Client(
    if sign in context.after:
        head = head[:-1].rstrip(" \"'*`")
        if sign == "?" and head.endswith("User"):
            head = head[:-4].rstrip(" ?")
    elif "\n" in before[len(head) :]:
        return 0.8 if _LINE_CLOSED.search(before) else 0.0
    else:
        sign = ""
    written = head
    head = head.lower()
    last = _LAST_WORD.search(head)
    key = last[0] if last else ""
    if key not in context.last and not key.endswith(("name", "by", "to")) and head[-1:] != "o":
        return 0.0
    said = next((p for p in context.after[sign].get(head[-2:], ()) if head.endswith(p)), "")
    ahead = head[-len(said) - 1 : -len(said)] if said else ""
    # firstName: a capital begins a word as a space does.
    inside = ahead.isascii() and ahead.isalpha() and not (sign and written[-len(said)].isupper())
    if not said or inside:
        return 0.0
    if sign == ",":
        # "Thanks, Monday is fine": these close a letter only at the beginning of a line.
        return 0.8 if said not in ("best", "love", "signed", "kindly") or ahead in ("", "\n") else 0.0
    return 0.6 if (f"{said}:" if sign else said) in context.loose else 0.8


# <ann@example.org> after a name, and the columns of a table.
_MAILBOX = lazy(
    r"[\"']?(?: ?<[^\s<>@]{1,64}@|[,|;\t] ?\"?(?:[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]|\+[0-9]|"
    r"\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}))| \([A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]"
)
# HOLLIS, MARGARET in a line of its own before the next field.
_IN_CAPITALS = lazy(
    r"^[ \t]*(?P<name>[A-Z][A-Z'-]{1,24}, ?[A-Z][A-Z'-]{1,24}(?: [A-Z]\.?)?)(?=[ \t|;(]*\n?[ \t]*"
    r"(?:DOB|MRN|SSN|ID|Sex|Gender|Age|Date of [Bb]irth)(?![A-Za-z]))",
    re.M,
)
# How far from a word its other uses are looked for.
_FAR = 4096
_ATTRIBUTE = lazy(r"\.[A-Za-z_]|::|<[A-Za-z]")
_PIECE = lazy("[A-Z][a-z]+")
_SECOND = lazy(rf", (?P<word>[{CAP}][{LETTER}'’-]{{1,24}}(?: [A-Z]\.?(?![A-Za-z]))?)(?![{LETTER}])")


class _Reader:
    """Reads the runs of capitalised words of one text in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.budget = Budget(text)
        self._last = -1  # the end of the last name found
        self._listed = False  # whether more may follow it in a list
        self._code: tuple[int, bool] = (-2, False)
        self._not_names = ENGLISH.not_names

    def run(self, run: str, start: int) -> Finding | None:
        """The name in the next run, which begins at an offset."""
        if run in self._not_names:
            return None
        if not self.budget.spend(start):
            return None
        found = self._in_run(run.split(" "), start)
        if found:
            self._last = found.end
            self._listed = found.score >= 0.7
        return found

    def _in_run(self, parts: list[str], start: int) -> Finding | None:
        parts, start, score = self._without_titles(parts, start)
        rest = " ".join(parts)
        end = start + len(rest)
        score = score or (self._by_what_is_before(parts, start, end) if parts else 0.0)
        span = trimmed(rest, start, sure=score == 0.8) if score else None
        if span is None:
            return None
        value = self.text[slice(*span)]
        if value.isupper() and " " not in value:
            return None
        return Finding(*(self._with_second(span, value) if score == 0.8 else span), "NAME", score)

    def _without_titles(self, parts: list[str], start: int) -> tuple[list[str], int, float]:
        """The run without titles and greetings, where that begins, and the score that they give it."""
        context = _context()
        n, score = 0, 0.0
        while n < len(parts) and parts[n] in context.titles:
            n, score = n + 1, 0.9
        rest = parts[n + 1 :]
        if rest and not score:
            if parts[n] in context.greetings:
                n, score = n + 1, self._greeted(rest, start + len(" ".join(parts)))
            elif len(rest) >= 2 and parts[n] in ("I'm", "I’m", "It's", "It’s"):
                n, score = n + 1, 0.7 if rest[-1] not in ENGLISH.not_names else 0.0
            elif (
                parts[n] in context.ranks
                and not_a_common_word(rest[0])
                and not_a_common_word(rest[-1])
                and (len(rest) >= 2 or _known(rest[0]))
            ):
                n, score = n + 1, 0.8
        return parts[n:], start + sum(len(part) + 1 for part in parts[:n]), score

    def _greeted(self, parts: list[str], end: int) -> float:
        follow = self.text[end : end + 1]
        first = parts[0]
        if follow not in ",!.\n—:" or first in _context().not_people or not not_a_common_word(first):
            return 0.0
        if _known(first):
            return 0.8
        return 0.6 if follow == "," or (follow == "!" and len(parts) == 1) else 0.0

    def _by_what_is_before(self, parts: list[str], start: int, end: int) -> float:
        text = self.text
        free = all(map(not_a_common_word, parts))  # its letters alone do not rule a name out
        if self._listed and start - self._last <= 6 and text[self._last : start] in _SEPARATORS and free:
            # Another one in a list of people.
            return 0.7 if len(parts) >= 2 or parts[0] in ENGLISH.given else 0.0
        if 2 <= len(parts) <= 5 and parts[-1] not in ENGLISH.not_names and _MAILBOX.match(text, end):
            return 0.6
        before = text[max(0, start - 40) : start]
        if not before.endswith(tuple(" :=,\"'*\n\t>`({[")):
            return 0.0
        if before.endswith(_context().stopped):
            return 0.9
        said = _announced(before, parts[0], text[end : end + 1])
        if said and not self._fits_its_label(parts, before, start, end, free):
            said = 0.0
        if said == 0.8 or (said and free and (len(parts) >= 2 or _known(parts[0]))):
            return said
        sure = parts[0] in ENGLISH.sure_given and parts[0] not in ENGLISH.plain
        if before.endswith(_AM_BEFORE) and (len(parts) >= 2 or sure):
            return 0.7
        called = text.startswith(_CALLING, end) or (len(parts) >= 2 and _known(parts[-1]))
        return 0.7 if called and before.endswith(("this is ", "This is ")) else 0.0

    def _fits_its_label(self, parts: list[str], before: str, start: int, end: int, free: bool) -> bool:
        """Whether what follows a label can be a name. A label in code or configuration says little, and there
        it has to look like one; so has a word that the text also uses without a capital.
        """
        text = self.text
        label = before.rstrip(" \"'*`\n\t({[")
        if label[-1:] not in tuple(":=>"):
            return True
        word = parts[0]
        if len(parts) == 1:
            if text[end : end + 1] in ("[", "(") or _ATTRIBUTE.match(text, end):
                return False  # name: Optional[str], client = Client(
            if label[:-1].rstrip(" \"'").lower().endswith(word.lower()):
                return False  # contact: Contact
            if INNER_CAPITAL.search(word) and not free and ENGLISH.given.isdisjoint(_PIECE.findall(word)):
                return False  # name: TargetMachine
        if free and (word in ENGLISH.given or _known(parts[-1])):
            return True
        if len(parts) == 1:
            around = text[max(0, start - _FAR) : end + _FAR]
            lower = word.lower()
            if lower in around and re.search(rf"(?<![A-Za-z]){lower}(?![A-Za-z])", around):
                return False
        return not self._in_code(start)

    def _in_code(self, start: int) -> bool:
        """Whether the text around an offset is code; one answer for each line."""
        line = self.text.rfind("\n", 0, start)
        if self._code[0] != line:
            self._code = line, in_code(self.text, start)
        return self._code[1]

    def _with_second(self, span: tuple[int, int], value: str) -> tuple[int, int]:
        """The range with the given name after a comma: O'Donnell, Fergus."""
        if " " in value and not value.lower().startswith(("van", "von", "de", "di", "la", "le", "al")):
            return span
        second = _SECOND.match(self.text, span[1])
        if second and second["word"].split(" ")[0] not in ENGLISH.not_names:
            return span[0], second.end()
        return span


def _known(word: str) -> bool:
    return word in ENGLISH.given or word in ENGLISH.surnames or looks_like_surname(word)


# After what can only announce one, a name that was written without capitals; in what a form sends, too.
_LOWER = lazy(
    r"(?<![A-Za-z])(?:(?P<said>[Mm]y name is|[Mm]y name'?s|[Tt]his is|[Ii] am|[Ii]'m|[Cc]all me|[Nn]ame:|"
    r"[Aa]sk|[Tt]ell|[Ee]mail|[Rr]emind|[Tt]hank|[Ii]nvite|[Mm]eet) |"
    r"(?:[Ff](?:irst|ull|amily)|[Ll]ast|[Gg]iven|[Ss]ur)[_ -]?[Nn]ame[\"']? ?[:=] ?[\"']?)"
    r"(?P<first>[a-z]{3,14})(?:[ +](?P<second>[a-z]{2,16}))?(?![A-Za-z])"
)
# A sentence about a person: its first word is one, whatever it is, unless it is an ordinary word.
_ABOUT = lazy(
    rf"(?:\A|(?<=[.!?] )|(?<=\n))(?P<name>[{CAP}][{LETTER}'’-]{{2,20}}) (?:is (?:originally )?from (?=[A-Z])"
    r"|comes from (?=[A-Z])|lives (?:in|on|at|with|near) |works (?:at|for|as) |was born (?:in|on) |grew up )"
)


def _lower(text: str) -> Iterator[Finding]:
    for found in _LOWER.finditer(text):
        said, first, second = found["said"], found["first"], found["second"]
        whole = second in ENGLISH.lower_surnames
        given = first in ENGLISH.lower_given and (whole or not said or said.lower() != "this is")
        if given or (not said and first in ENGLISH.lower_surnames):
            yield Finding(found.start("first"), found.end("second" if whole else "first"), "NAME", 0.6)


def scan(text: str) -> Iterator[Finding]:
    """People in a plain view (:func:`sllm.privacy.text.plain`)."""
    yield from _lower(text)
    reader = _Reader(text)
    for run in CANDIDATE.finditer(text):
        found = reader.run(run[0], run.start())
        if found:
            yield found
        if reader.budget.spent:
            break
    yield from reader.budget.rest("NAME")
    for about in _ABOUT.finditer(text):
        name = about["name"]
        if name not in _context().pronouns and name not in ENGLISH.famous and not_a_common_word(name):
            yield Finding(*about.span("name"), "NAME", 0.5)
    for capitals in _IN_CAPITALS.finditer(text):
        yield Finding(*capitals.span("name"), "NAME", 0.6)

"""People in Latin script, found without a model: by what announces them, and by what their words look like.

Runs of capitalised words are read one after another. A run is a person where a title, a label, a verb, a
greeting or the end of a letter says so; or where its own words do: a given name and a second word, a surname
after a word that is not a common one, letters that English does not write. A given name alone counts where
the sentence is between people ("Rachel, can you call me?").
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy.findings import Budget, Finding
from sllm.privacy.names.announced import (
    AM_BEFORE,
    CALLING,
    CONTEXT,
    HUMAN_AFTER,
    SEPARATORS,
    SPOKEN_TO,
    TOLD,
    TOLD_AFTER,
    announced,
    mentioned,
    of_people,
)
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

# <ann@example.org> after a name, and the columns of a table.
_MAILBOX = lazy(
    r"[\"']?(?: ?<[^\s<>@]{1,64}@|[,|;\t] ?\"?(?:[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]|\+[0-9]|"
    r"\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}))"
    r"| \([A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]"
)
_PIECE = lazy("[A-Z][a-z]+")
# How far from a word its other uses are looked for.
_FAR = 4096
_ATTRIBUTE = lazy(r"\.[A-Za-z_]|::|<[A-Za-z]")
_BORN = lazy(r",? \(?(?:born|b\.|DOB|aged|age|d\.o\.b|née|nee)(?![a-z])")
_SECOND = lazy(rf", (?P<word>[{CAP}][{LETTER}'’-]{{1,24}}(?: [A-Z]\.?(?![A-Za-z]))?)(?![{LETTER}])")
# HOLLIS, MARGARET on a line of its own, or before the next field.
_CAPITAL = lazy(f"[{CAP}]")
_CAPITALS_EN = lazy(
    r"^[ \t]*(?P<name>[A-Z][A-Z'-]{1,24}, ?[A-Z][A-Z'-]{1,24}(?: [A-Z]\.?)?)(?=[ \t|"
    r";(]*\n?[ \t]*(?:DOB|MRN|SSN|ID|Sex|Gender|Age|Date of [Bb]irth)(?![A-Za-z]))",
    re.M,
)
_LOWER = lazy(
    r"(?<![A-Za-z])(?P<said>[Mm]y name is|[Mm]y name'?s|[Tt]his is|[Ii] am|[Ii]'m|[Cc]all me|[Nn]ame:|"
    r"[Aa]sk|[Tt]ell|[Ee]mail|[Rr]emind|[Tt]hank|[Ii]nvite|[Mm]eet) "
    r"(?P<first>[a-z]{3,14})(?: (?P<second>[a-z]{2,16}))?(?![A-Za-z])"
)
_LOWER_SAID = (
    "name",
    "his is",
    "am ",
    "'m ",
    "all me",
    "sk ",
    "ell ",
    "mail ",
    "mind ",
    "hank ",
    "vite ",
    "eet ",
)
# A sentence about a person: its first word is one, whatever it is, unless it is an ordinary word.
_ABOUT = lazy(
    rf"(?:\A|(?<=[.!?] )|(?<=\n))(?P<name>[{CAP}][{LETTER}'’-]{{2,20}}) (?:is (?:originally )?from (?=[A-Z])"
    r"|comes from (?=[A-Z])|lives (?:in|on|at|with|near) |works (?:at|for|as) |was born (?:in|on) |grew up )"
)
_PRONOUNS = frozenset(
    ["He", "She", "They", "You", "Who", "One", "Each", "Neither", "Either", "Both", "None", "Some", "Many",
    "Most",
     "This", "That", "These", "Those", "Here", "There", "What", "Which", "Where", "Whoever", "Somebody",
     "Someone", "Anybody", "Anyone", "Everybody", "Everyone", "Nobody"]
)  # fmt: skip
# Words of a sentence that people say to each other.
_PERSONAL = lazy(
    r"(?<![A-Za-z])(?:[Ii]|I'm|I've|I'll|[Mm]e|[Mm]y|[Ww]e|[Uu]s|[Oo]ur|[Yy]ou|[Yy]our|[Pp]lease|[Tt]hanks|"
    r"[Rr]egards|[Hh]i|[Hh]ello|[Dd]ear)(?![A-Za-z])"
)
# What may follow a name at once: a mailbox, a column, a date of birth.
_OPENING = frozenset("<|;,(\t\"'’")


class _Reader:
    """Reads the runs of one text in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.last = -1  # the end of the last name found
        self.listed = False  # whether more may follow it in a list
        self.budget = Budget(text)
        self._personal: tuple[int, int, bool] = (0, 0, False)
        self._code: tuple[int, bool] = (-2, False)
        # For every capitalised word: here they are read faster than from the lists.
        self._not_names, self._given, self._leading = ENGLISH.not_names, ENGLISH.given, CONTEXT.leading

    def personal(self, start: int) -> bool:
        """Whether the text around an offset (a block of 256 characters) is what people say to each other."""
        block = start // 256 * 256
        low, high, known = self._personal
        if (low, high) != (block, block + 256):
            known = _PERSONAL.search(self.text, max(0, block - 64), block + 320) is not None
            self._personal = block, block + 256, known
        return known

    def run(self, run: str, start: int) -> Iterator[Finding]:
        """The names in the next run of capitalised words, which begins at an offset."""
        if " " not in run and self._idle(run, start):
            return
        if not self.budget.spend(start):
            return
        for one in self._run(run, start):
            self.last = one.end
            self.listed = one.score >= 0.7
            yield one

    def _idle(self, word: str, start: int) -> bool:
        """Whether a capitalised word needs no closer look: it is not a known name, and the word before it
        does not announce one.
        """
        if word in self._not_names:
            return True
        if word[-2:-1] in "'’" and word[-1] == "s":
            word = word[:-2]
        if word in self._given or self.listed:
            return False
        text = self.text
        if start < 2 or text[start - 1] != " ":
            return False
        low = max(0, start - 16)
        ahead = text[low : start - 1].rpartition(" ")[2].lower().removesuffix(",")
        return (
            start > 16
            and ahead.isalnum()
            and ahead not in self._leading
            and not ahead.endswith(("name", "by", "to"))
            and text[start + len(word) : start + len(word) + 1] not in _OPENING
        )

    def _run(self, run: str, start: int) -> Iterator[Finding]:
        text = self.text
        parts = run.split(" ")
        score = 0.0
        greeted = False
        while parts and parts[0] in CONTEXT.titles:
            start += len(parts[0]) + 1
            parts.pop(0)
            score = 0.9
        if not parts:
            return
        if len(parts) >= 2 and parts[0] in CONTEXT.greetings and not score:
            start += len(parts[0]) + 1
            parts.pop(0)
            greeted = True
        elif len(parts) >= 3 and parts[0] in ("I'm", "I’m", "It's", "It’s"):
            start += len(parts[0]) + 1
            parts.pop(0)
            score = 0.7 if parts[-1] not in ENGLISH.not_names else 0.0
        if len(parts) >= 2 and parts[0] in CONTEXT.ranks and not score:
            rest = parts[1:]
            if (
                not_a_common_word(rest[-1])
                and not_a_common_word(rest[0])
                and (len(rest) >= 2 or self._known(rest[0]))
            ):
                start += len(parts[0]) + 1
                parts = rest
                score = 0.8
        rest_text = " ".join(parts)
        end = start + len(rest_text)
        if greeted and not score:
            follow = text[end : end + 1]
            first = parts[0]
            if (
                (follow in ",!.\n—:" or not follow)
                and first not in CONTEXT.not_people
                and not_a_common_word(first)
            ):
                known = first in ENGLISH.given or self._known(first)
                score = 0.8 if known else 0.6 if follow == "," or (follow == "!" and len(parts) == 1) else 0.0
        if not score:
            free = all(map(not_a_common_word, parts))  # its letters alone do not rule a name out
            score = self._by_what_is_before(parts, start, end, free) or self._as_a_person(
                parts, start, end, free
            )
        if score:
            span = trimmed(rest_text, start, sure=score == 0.8)
            if span and not (text[span[0] : span[1]].isupper() and " " not in text[span[0] : span[1]]):
                one = self._with_second(span, score)
                yield Finding(*one, "NAME", score)
                return
        yield from self._by_its_words(parts, start)

    def _as_a_person(self, parts: list[str], start: int, end: int, free: bool) -> float:
        """The score of a run by what is said of people only; 0 if nothing is."""
        text = self.text
        before = text[max(0, start - 64) : start]
        if 2 <= len(parts) <= 5:
            if not free or " ".join(parts[:2]) in ENGLISH.pairs:
                return 0.0
            if parts[0].isupper() or parts[-1].isupper():
                return 0.0
            if HUMAN_AFTER.match(text, end) or (before[-1:] == " " and of_people(before)):
                return 0.5
            return 0.0
        word = parts[0]
        if len(parts) != 1 or not free or word.isupper():
            return 0.0
        if before[-1:] == " ":
            if TOLD.search(before) and text.startswith(TOLD_AFTER, end):
                return 0.5
            if word in ENGLISH.sure_given and of_people(before):
                return 0.5
        elif (
            word in ENGLISH.sure_given and before[-1:] in ("", "\n", '"', "“") and SPOKEN_TO.match(text, end)
        ):
            return 0.5
        if word in ENGLISH.sure_given and word not in ENGLISH.famous and HUMAN_AFTER.match(text, end):
            return 0.5
        return 0.0

    def _known(self, word: str) -> bool:
        return word in ENGLISH.given or word in ENGLISH.surnames or looks_like_surname(word)

    def _by_what_is_before(self, parts: list[str], start: int, end: int, free: bool) -> float:
        text = self.text
        before = text[max(0, start - 40) : start]
        tail = before[-1:]
        if self.listed and start - self.last <= 6 and text[self.last : start] in SEPARATORS:
            # Another one in a list of people.
            if len(parts) >= 2 and free:
                return 0.7
            if len(parts) == 1 and parts[0] in ENGLISH.given and parts[0] not in ENGLISH.plain:
                return 0.7
        if tail == " " or (tail and tail in ":=,\"'*\n\t>`({["):
            if before.endswith(CONTEXT.titles_before):
                return 0.9
            said = announced(before, parts[0], text[end : end + 1])
            if said and not self._fits_its_label(parts, before, start, end, free):
                said = 0.0
            if said == 0.8:
                return said
            if said and free and (len(parts) >= 2 or self._known(parts[0])):
                return said
            if before.endswith(AM_BEFORE) and (
                len(parts) >= 2 or (parts[0] in ENGLISH.sure_given and parts[0] not in ENGLISH.plain)
            ):
                return 0.7
            if before.endswith(("this is ", "This is ")) and (
                text.startswith(CALLING, end) or (len(parts) >= 2 and self._known(parts[-1]))
            ):
                return 0.7
            if (
                2 <= len(parts) <= 4
                and parts[-1] not in ENGLISH.not_names
                and before.endswith(" ")
                and mentioned(text, before, end)
            ):
                return 0.6
        if 2 <= len(parts) <= 5 and parts[-1] not in ENGLISH.not_names:
            if _MAILBOX.match(text, end):
                return 0.6
            if free and _BORN.match(text, end):
                return 0.6
        return 0.0

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
            if (
                INNER_CAPITAL.search(word)
                and not free
                and not any(p in ENGLISH.given for p in _PIECE.findall(word))
            ):
                return False  # name: TargetMachine
        known = free and (word in ENGLISH.given or self._known(parts[-1]))
        if known:
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
        at, known = self._code
        if at != line:
            known = in_code(self.text, start)
            self._code = line, known
        return known

    def _with_second(self, span: tuple[int, int], score: float) -> tuple[int, int]:
        """The range with the given name after a comma: O'Donnell, Fergus."""
        if score != 0.8:
            return span
        value = self.text[span[0] : span[1]]
        if " " in value and not value.split(" ")[0].lower().startswith(
            ("van", "von", "de", "di", "la", "le", "al")
        ):
            return span
        second = _SECOND.match(self.text, span[1])
        if second and second["word"].split(" ")[0] not in ENGLISH.not_names:
            return span[0], second.end()
        return span

    def _by_its_words(self, parts: list[str], start: int) -> Iterator[Finding]:
        """A given name and what follows it; a surname and what comes before; letters of other languages."""
        at = start
        for i, word in enumerate(parts):
            score = self._begins_a_name(parts, i)
            if score:
                span = trimmed(" ".join(parts[i:]), at)
                if span and " " in self.text[span[0] : span[1]]:
                    yield Finding(*span, "NAME", score)
                    return
            at += len(word) + 1
        if _has_initials(parts):
            span = trimmed(" ".join(parts), start)
            if span and not parts[-1].isupper():
                yield Finding(*span, "NAME", 0.6)
                return
        if len(parts) == 1:
            word = _without_s(parts[0])
            if (
                word in ENGLISH.alone
                and self.personal(start)
                and not self.text.startswith((" of ", " (disamb"), start + len(word))
            ):
                yield Finding(start, start + len(word), "NAME", 0.5)

    def _begins_a_name(self, parts: list[str], i: int) -> float:
        """The score of the words from i on, if they are a given name or a surname with others; else 0."""
        word, n = parts[i], len(parts)
        if i + 1 == n:
            return 0.0
        capitals = len(word) > 2 and word.isupper()
        if (word.title() if capitals else word) in ENGLISH.given:
            return 0.7 if _follows_given(parts, i, capitals=capitals) else 0.0
        if capitals or n - i > 4:
            return 0.0
        end = _without_s(parts[-1])
        known = end in ENGLISH.surnames and end not in ENGLISH.common
        if looks_like_surname(end) or (known and i == 0 and (len(word) > 2 or looks_like_surname(word))):
            return 0.6 if all(map(not_a_common_word, parts[i:-1])) else 0.0
        return 0.0


def _follows_given(parts: list[str], i: int, *, capitals: bool) -> bool:
    """Whether the words after a given name make a person of it."""
    word, follow = parts[i], parts[i + 1]
    if capitals:
        return word.title() in ENGLISH.sure_given and follow.isupper() and follow.title() in ENGLISH.surnames
    if word in ENGLISH.ambiguous or word in ENGLISH.plain:
        last = _without_s(next(part for part in reversed(parts) if len(part) > 2 or part == word))
        return (
            last not in ENGLISH.common
            and last != word
            and (last in ENGLISH.surnames or looks_like_surname(last))
        )
    return follow.rstrip(".") not in ENGLISH.plain or follow in ENGLISH.surnames


def _has_initials(parts: list[str]) -> bool:
    """J. R. Pemberton."""
    if len(parts) < 2 or not _is_initial(parts[0]) or not not_a_common_word(parts[-1]):
        return False
    if len(parts) == 2:
        return parts[1] in ENGLISH.surnames or looks_like_surname(parts[1])
    return len(parts) == 3 and _is_initial(parts[1])


def _is_initial(word: str) -> bool:
    return len(word) == 2 and word.endswith(".")


def _without_s(word: str) -> str:
    return word.removesuffix("'s").removesuffix("’s")


def scan(text: str) -> Iterator[Finding]:
    """People in a plain view (:func:`sllm.privacy.text.plain`)."""
    if not _CAPITAL.search(text):
        yield from _lower(text)
        return
    reader = _Reader(text)
    for run in CANDIDATE.finditer(text):
        yield from reader.run(run[0], run.start())
        if reader.budget.spent:
            break
    yield from reader.budget.rest("NAME")
    for found in _ABOUT.finditer(text):
        name = found["name"]
        if name not in _PRONOUNS and name not in ENGLISH.famous and not_a_common_word(name):
            yield Finding(found.start("name"), found.end("name"), "NAME", 0.5)
    for found in _CAPITALS_EN.finditer(text):
        yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)
    yield from _lower(text)


def _lower(text: str) -> Iterator[Finding]:
    """Names that were written without capitals, after what can only announce one."""
    if not any(said in text for said in _LOWER_SAID):
        return
    for found in _LOWER.finditer(text):
        said, first, second = found["said"].lower(), found["first"], found["second"]
        if first in ENGLISH.lower_given and (not said.startswith("this") or second in ENGLISH.lower_surnames):
            end = found.end("second") if second in ENGLISH.lower_surnames else found.end("first")
            yield Finding(found.start("first"), end, "NAME", 0.6)

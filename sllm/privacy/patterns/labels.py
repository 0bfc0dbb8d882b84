"""Values that the words before them announce: "passport no. ...", "生日：...", "password = ...".

A value after a clear label needs no checksum. Labels are looked up word by word (English, and the keys of
JSON, of environments and of code) or found by one pattern (Chinese); a value is only searched after a label.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns.passwords import secret_at
from sllm.privacy.regex import Patterns, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("labels")


class _Label(NamedTuple):
    """A label with what may follow it up to the value, and what that value is."""

    pattern: re.Pattern[str]
    kind: str
    form: str


@functools.cache
def _english() -> dict[str, list[_Label]]:
    """First word -> the labels that begin with it, the longest first."""
    phrases: dict[str, list[tuple[str, str, str]]] = {}
    for rule in data.table("labels")["english"]:
        for phrase in rule["labels"]:
            first = re.findall(r"[a-z]+[0-9]?", phrase)[0]
            phrases.setdefault(first, []).append((phrase, rule["kind"], rule["form"]))
    table = {}
    for word, entries in phrases.items():
        entries.sort(key=lambda entry: -len(entry[0]))
        table[word] = [_Label(lazy(_with_link(phrase), re.I), kind, form) for phrase, kind, form in entries]
    return table


def _with_link(phrase: str) -> str:
    """A pattern of a label and what may stand between it and its value.

    The words of a label are separated by "_", "-", a space or nothing, so that passport_number and
    passportNumber count.
    """
    link = data.sections("labels")["patterns"]["english_link"]
    words = r"[ _.-]?".join(re.escape(word) for word in phrase.split(" "))
    return f"{words}(?![a-z])s?{link}"


@functools.cache
def _first_words() -> frozenset[str]:
    """The words at which a search for English labels stops."""
    return data.word_set("secrets", "words") | frozenset(_english())


@functools.cache
def _chinese() -> dict[str, tuple[str, str]]:
    """Label -> kind and form of the value; of two rules with the same label the first counts."""
    rows = reversed(data.table("labels")["chinese"])
    return {label: (rule["kind"], rule["form"]) for rule in rows for label in rule["labels"]}


# Plain words only, the longest first: so the engine can skip to their first characters.
_CHINESE_ANY = lazy(lambda: "|".join(sorted(_chinese(), key=len, reverse=True)))


def _trim(kind: str, form: str, text: str, start: int, end: int, *, bare: bool) -> Finding | None:
    """The value after a label, if its form is one that such a label has.

    Args:
        kind: of the value.
        form: the name of a pattern, without ``form_``.
        text: that holds it.
        start: where it begins.
        end: where it ends at the latest.
        bare: it is assigned without quotes, as in code.

    """
    value = text[start:end]
    if form == "code":
        return _code(kind, value, start)
    n_digits = _count_digits(value)
    if form == "digits":
        fewest = {"SSN": 9, "PHONE": 7, "CARD": 4 if n_digits == 4 else 12}.get(kind, 4)
        if n_digits < fewest or _P.only_date.fullmatch(value):
            return None
    elif form == "token":
        if not n_digits and bare:
            return None
        if value.lower() in data.word_set("labels", "ordinary words") or not (
            n_digits or "_" in value or "." in value or "@" in value or len(value) >= 5
        ):
            return None
        value = value.rstrip(".-")
    elif form == "plate":
        if n_digits < 2 or not any(c.isalpha() for c in value) or value != value.upper():
            value = value.split(" ")[0]
            if _count_digits(value) < 2 or not any(c.isalpha() for c in value):
                return None
    elif form == "hash" and (n_digits < 3 or not any(c.isalpha() for c in value)):
        return None
    return Finding(start, start + len(value), kind, 0.85)


def _code(kind: str, value: str, start: int) -> Finding | None:
    """A value of letters and digits, without the words of the sentence that follow it."""
    # Words without a digit belong to the sentence, except for short capitals: AB 12 34 56 C.
    words = value.split(" ")
    keep = 1
    while keep < len(words) and (
        _P.digit.search(words[keep]) or (len(words[keep]) <= 2 and words[keep].isupper())
    ):
        keep += 1
    while keep > 1 and not _P.digit.search(words[keep - 1]) and len(words[keep - 1]) > 1:
        keep -= 1
    value = " ".join(words[:keep])
    cut = value.rfind("/")
    if cut > 0 and not _P.digit.search(value[cut:]):
        value = value[:cut]
    head = value.split(" ")[0]
    if len(head) > 3 and head.isalpha() and head != head.upper():
        return None
    if len(head) <= 3 and head.isalpha() and head.islower():
        return None
    if kind == "ACCOUNT" and value.isalpha() and value.isupper() and len(value) in (8, 11):
        return Finding(start, start + len(value), kind, 0.6)  # SWIFT and BIC
    enough = 2 if kind == "DEVICE" and len(value) >= 8 else 3 if kind in ("ACCOUNT", "LICENCE") else 4
    if _count_digits(value) < enough or len(value) < _SHORTEST.get(kind, 0):
        return None
    return Finding(start, start + len(value), kind, 0.85)


def _count_digits(value: str) -> int:
    return sum("0" <= c <= "9" for c in value)


_SHORTEST = {"PASSPORT": 5, "LICENCE": 5, "VIN": 5, "NATIONALID": 7}
_SIGN_NEEDED = frozenset(["USER", "SECRET"])


def _labelled(text: str, link_end: int, link: str, kind: str, form: str, label: str = "") -> Finding | None:
    found = getattr(_P, f"form_{form}").match(text, link_end)
    if kind == "SSN" and (not found or text[found.end() : found.end() + 1].isalnum()):
        # Other countries have letters in such a number: ZZ 12 34 56 A, 131052-308T.
        found = _P.form_code.match(text, link_end)
        form = "code"
    if not found or text.startswith(("://", "(", "["), found.end()):
        return None
    if form == "token" and (_P.of_object.match(found[0]) or _P.unquoted.search(link)):
        return None  # an expression of code
    named = kind == "USER" and label in ("user", "username", "login", "handle", "account")
    signed = any(c in link for c in ":：=#为是“\"'") or " is " in link or "叫" in link
    if kind in _SIGN_NEEDED and not signed and not (kind == "SECRET" and text[link_end - 1] == " "):
        # login jdoe42 is a name, and so is octo-fan22; login id1 and login table_2 are not.
        if kind == "USER" and named and _P.handle_alone.match(found[0]):
            return _trim(kind, form, text, found.start(), found.end(), bare=False)
        spoken = kind == "SECRET" and len(found[0]) >= 4 and not link.isascii()
        if spoken and not _P.counted.match(text, found.end()):
            return _trim(kind, form, text, found.start(), found.end(), bare=False)
        # 微信 wxid_abc, QQ12345: a handle right after its label, recognised by its digits.
        chinese = kind == "USER" and (not link.isascii() or link.upper().startswith("QQ"))
        handle = _P.handle_or_number.fullmatch(found[0])
        marked = found[0][0] == "@" or found[0][-5:-4] == "#"
        if not marked and not (chinese and handle and len(found[0]) >= 5):
            return None
    loose = label in data.word_set("labels", "loose users") and not _P.marked.search(found[0])
    # handle: BinaryIO is a type.
    if loose and (not any(c in link for c in ":=#") or _P.inner_capital.search(found[0])):
        return None
    # login = lexer.token is code: what is assigned without quotes needs a digit to be a name.
    bare = "=" in link and not any(c in link for c in "\"'“")
    return _trim(kind, form, text, found.start(), found.end(), bare=bare)


def _after_english(text: str, budget: Budget) -> Iterator[Finding]:
    done = 0  # the end of the last secret: what it is made of is not a label
    english, first_words = _english(), _first_words()
    loose_users = data.word_set("labels", "loose users")
    secret_words = data.word_set("secrets", "words")
    for word in _P.camel.finditer(text):
        lower = word[0].lower()
        if lower not in first_words:
            continue
        start = word.start()
        if lower in secret_words and start >= done:
            if not budget.spend(start):
                return
            one = secret_at(text, start, word.end(), lower)
            if one:
                done = one.end
                yield one
        entries = english.get(lower)
        if entries is None or (
            start and text[start - 1].isascii() and text[start - 1].isalpha() and word[0][0].islower()
        ):
            continue
        if lower in loose_users and start and (text[start - 1] == "_" or text[start - 1].isalpha()):
            continue  # std_handle, newLine
        if not budget.spend(start):
            return
        for pattern, kind, form in entries:
            link = pattern.match(text, start)
            if link:
                one = _labelled(text, link.end(), link[0][len(lower) :], kind, form, lower)
                if one:
                    yield one
                    break


def _after_chinese(text: str, budget: Budget) -> Iterator[Finding]:
    labels = _chinese()
    for label in budget.each(_CHINESE_ANY.finditer(text)):
        if label[0][0].isascii():
            # vx, QQ, LINE: not inside another word.
            around = text[max(0, label.start() - 1) : label.start()], text[label.end() : label.end() + 1]
            if (around[0].isascii() and around[0].isalpha()) or "a" <= around[1] <= "z":
                continue
        link = _P.chinese_link.match(text, label.end())
        kind, form = labels[label[0]]
        one = _labelled(text, link.end(), label[0] + link[0], kind, form) if link else None
        if one is None and link and label[0] in data.word_set("labels", "logins"):
            one = _labelled(text, link.end(), label[0] + link[0], "USER", "token")
            if one and not any(c.isdigit() or c in "_@" for c in text[one.start : one.end]):
                one = None
        if one:
            yield one


def _born(text: str) -> Iterator[Finding]:
    low = 0
    for word in _P.born.finditer(text):
        # No character is read twice, however many of these words there are.
        low = max(low, word.start() - 32)
        date = _P.date_before.search(text[low : word.start()])
        if date:
            yield Finding(low + date.start(), word.start(), "BIRTHDATE", 0.9)
        low = word.end()


def _logs(text: str) -> Iterator[Finding]:
    """Users in the lines of logs."""
    for sign in _P.log_from.finditer(text):
        at = max(0, sign.start() - 72)
        found = _P.log_user.search(text[at : sign.start()])
        if found:
            yield Finding(at + found.start("user"), at + found.end("user"), "USER", 0.8)


def _coordinates(text: str) -> Iterator[Finding]:
    for middle in _P.pair.finditer(text):
        at = max(0, middle.start() - 6)
        head = _P.pair_before.search(text[at : middle.start()])
        if not head:
            continue
        value = head[0] + middle[0]
        first, second = (abs(float(part)) for part in value.split(","))
        # A place on earth; two readings of an instrument are seldom negative or over ninety.
        far = "-" in value or second > 90
        if far and first <= 90 and second <= 180 and max(first, second) > 10:
            yield Finding(at + head.start(), middle.end(), "GEO", 0.6)


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _logs(text)
    yield from _coordinates(text)
    yield from _after_english(text, budget)
    if not text.isascii():
        yield from _after_chinese(text, budget)
        yield from _born(text)
    yield from budget.rest("ACCOUNT")

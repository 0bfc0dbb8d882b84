"""Postal addresses in Latin script: in English, and by the street names of other countries."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_P = Patterns("addresses")

_MAX_TOKENS = 24


def _announced(text: str, budget: Budget) -> Iterator[Finding]:
    """Addresses of any country, after words that announce one."""
    small_words = data.word_set("addresses", "small words")
    no_address = data.word_set("addresses", "no address")
    done = 0
    for lead in _P.at.finditer(text):
        if lead.start() < done:
            continue
        if not budget.spend(lead.start()):
            return
        start = end = lead.end()
        numbers = names = 0
        kept = start
        for n in range(_MAX_TOKENS):
            token = _P.address_token.match(text, end)
            if not token:
                break
            word = token[1]
            bare = word.strip(".,")
            if word[0].islower() and bare not in small_words:
                break
            if not n and bare in no_address:
                break
            if any(c.isdigit() for c in word):
                numbers += 1
            elif len(bare) >= 3 and bare[1:].islower() and bare not in no_address:
                names += 1
            end = token.end()
            if not word[0].islower():
                kept = end
            # A full stop after a long word ends the sentence.
            if word.endswith(".") and len(word) > 5 and text[end : end + 1] in (" ", ""):
                kept -= 1
                break
        if numbers and names and kept - start >= 7:
            done = kept
            yield Finding(start, kept, "ADDRESS", 0.6)


@functools.cache
def _suffixes() -> frozenset[str]:
    """What the name of a street ends in."""
    return frozenset(data.words("addresses_en_streets"))


def _streets(text: str, budget: Budget) -> Iterator[Finding]:
    suffixes = _suffixes()
    # These name little else: after a number they are enough. The others need two words before them, so that
    # "3 Key Points" is not an address.
    sure = data.word_set("addresses", "sure suffixes")
    for found in budget.each(_P.street.finditer(text)):
        words = found["name"].split(" ")
        at = found.start("name")
        # The last word of the name that is a kind of street ends it.
        ends = []
        for i, word in enumerate(words):
            at += len(word)
            bare = word.rstrip(".,")
            if i and (bare in suffixes or bare.removesuffix("s") in suffixes) and (bare in sure or i >= 1):
                ends.append((at - (len(word) - len(bare)), bare, i))
            at += 1
        if not ends:
            # Whatever the street is called, if a flat, or a town with its code, follows.
            whole = _P.with_town.match(text, found.end("number"))
            if whole:
                yield Finding(found.start(), whole.end(), "ADDRESS", 0.7)
            continue
        end, suffix, n = ends[-1]
        tail = _P.after.match(text, end)
        stop = tail.end() if tail else end
        if suffix not in sure and n < 2 and stop - end < 5 and not _more(text, stop):
            # "221 Baker Street" is one; "12 Golden Valley" only with a number of three digits or more.
            digits = sum(char.isdigit() for char in text[found.start() : found.start("name")])
            if digits < 3:
                continue
        yield Finding(found.start(), stop, "ADDRESS", 0.8)


def _more(text: str, at: int) -> bool:
    return text[at : at + 2] == ", " and text[at + 2 : at + 3].isupper()


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    if not _P.any.search(text):
        return
    budget = Budget(text)
    yield from _streets(text, budget)
    yield from _announced(text, budget)
    done = 0
    for label in _P.label.finditer(text):
        if label.start() < done:
            continue
        if not budget.spend(label.start()):
            break
        line = _P.line.match(text, label.end())
        if not line:
            continue
        done = line.end()
        value = _P.sentence_end.split(line[0])[0].rstrip(" .,")
        if (
            _P.likely.match(value)
            and "@" not in value
            and "://" not in value
            and any(c.isdigit() for c in value)
            and sum(c.isalpha() for c in value) >= 4
            and " " in value
        ):
            yield Finding(label.end(), label.end() + len(value), "ADDRESS", 0.6)
    yield from budget.rest("ADDRESS")

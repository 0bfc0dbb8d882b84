"""Chinese names in Latin letters: Zhang Wei, Li Xiaoming, Xiaoming Li, Ouyang Feng.

A surname of the list, before or behind a given name of one or two syllables of pinyin (GB/T 28039: the given
name is one word, with one capital letter).
"""

from __future__ import annotations

import functools

from sllm.privacy import data
from sllm.privacy.names.word_lists import ENGLISH
from sllm.privacy.regex import lazy

__all__ = ["is_name", "is_place"]

_SYLLABLE = (
    r"(?:(?:[bpm]|[dtnl]|[gkh]|[zcs]h?|[fry])?"
    r"(?:a(?:i|o|n|ng)?|o(?:u|ng)?|e(?:i|n|ng)?|u(?:a|o|ai|i|an|n|ang)?|i(?:a|e|ao|u|an|n|ang|ng)?)"
    r"|[jqx](?:i(?:a|e|ao|u|an|n|ang|ng|ong)?|u(?:e|an|n)?)|[nl](?:v|ue?|üe?)"
    r"|w(?:u|a(?:i|n|ng)?|o|e(?:i|n|ng))|r(?:i|ui)|y(?:i(?:n|ng)?|u(?:e|an|n)?|ou|ong|a(?:o|n|ng)?|e)|er)"
)
_GIVEN = lazy(rf"(?=[A-Z])(?i:{_SYLLABLE}(?:['’-]?{_SYLLABLE})?)\Z")

_SURE = 5  # letters of a given name that hardly any word of English is


@functools.cache
def _surnames() -> frozenset[str]:
    return frozenset(data.words("names_zh_pinyin_surnames"))


@functools.cache
def _not_names() -> tuple[frozenset[str], frozenset[str]]:
    """Words that are no given name, and pairs that are no person."""
    table = data.table("names_zh_pinyin")
    return frozenset(table["words"]), frozenset(table["pairs"])


def is_place(first: str, second: str) -> bool:
    """Whether two capitalised words are known as something else than a person: Shan Dong."""
    return f"{first} {second}".title() in _not_names()[1]


def is_name(first: str, second: str) -> bool:
    """Whether two capitalised words are a surname and a given name, in either order."""
    words = _not_names()[0]
    return not is_place(first, second) and any(
        surname in _surnames()
        and given not in words
        and given not in ENGLISH.plain
        and _GIVEN.match(given) is not None
        # "He Made": a surname that is a word as well needs a given name that can be nothing else.
        and (surname not in words or len(given) >= _SURE)
        for surname, given in ((first, second), (second, first))
    )

"""Names in Latin script that nothing announces, by lists of the US Census and of Chinese surnames in pinyin;
needs the extra ``names``.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

from sllm.extras import needs, package_folders
from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding, Reach, in_original
from sllm.privacy.names.word_lists import ENGLISH, looks_like_surname, not_a_common_word, trimmed
from sllm.privacy.regex import Patterns
from sllm.privacy.text import plain

__all__ = ["CensusDetector", "installed", "is_pinyin"]

# Frequent given names and surnames of the census of 1990, as the package ``names`` carries them.
_FILES = ("dist.female.first", "dist.male.first", "dist.all.last")
_SHA256 = "f15be13baaa2c18c4b761900d9d7e61347fbe75bc68f16689a6b169b3bbc130a"
_SCORE = 0.5
_P = Patterns("names_en")
_SURE = 5  # letters of a given name in pinyin that hardly any word of English is


class _Lists(NamedTuple):
    given: frozenset[str]
    surnames: frozenset[str]


def installed() -> Path | None:
    """The folder of the lists in the installed package; None where it is not installed, or only another
    package of that name is.
    """
    for folder in package_folders("names"):
        if all((folder / name).is_file() for name in _FILES):
            return folder
    return None


@functools.cache
def _lists() -> _Lists:
    """Both lists, as names are written.

    Raises:
        ImportError: the package is not installed, or its lists are not those of version 0.3.0; says what to
            type.

    """
    folder = installed()
    if folder is None:
        with needs("names"):
            raise ModuleNotFoundError("No module named 'names'", name="names")
    files = [(folder / name).read_bytes() for name in _FILES]
    if hashlib.sha256(b"".join(files)).hexdigest() != _SHA256:
        raise ImportError(f"the lists in {folder} are not those of names 0.3.0; install that version anew")
    female, male, last = (
        frozenset(line.split()[0].capitalize() for line in data.decode("ascii").splitlines() if line.strip())
        for data in files
    )
    return _Lists(female | male, last)


@functools.cache
def _pinyin_surnames() -> frozenset[str]:
    return frozenset(data.words("names_zh_pinyin_surnames"))


def is_pinyin(first: str, second: str) -> bool:
    """Whether two capitalised words are a Chinese surname and a given name, in either order: Zhang Wei,
    Xiaoming Li, Ouyang Feng.
    """
    words = data.word_set("names_zh_pinyin", "words")
    return any(
        surname in _pinyin_surnames()
        and given not in words
        and given not in ENGLISH.plain
        and _P.pinyin_given.match(given) is not None
        # "He Made": a surname that is a word as well needs a given name that can be nothing else.
        and (surname not in words or len(given) >= _SURE)
        for surname, given in ((first, second), (second, first))
    )


class CensusDetector:
    """People whose given name or surname is in the lists of the US Census of 1990.

    A given name of the list with another word, two words of which the last is one of 88,799 surnames or looks
    like one, a Chinese surname and given name in pinyin, and a given name alone that is neither a word nor a
    place: wherever they stand, with nothing that announces them. So it finds names in prose that
    :class:`~sllm.privacy.NameDetector` cannot, and takes some titles of works and makes for people.

    Raises:
        ImportError: the package ``names`` is not installed (``pip install 'sllm[names]'``), or is not the
            version that is known.

    """

    reach: Reach = "words"

    def __init__(self) -> None:
        self._lists = _lists()

    def detect(self, text: str) -> list[Finding]:
        """Findings of kind NAME, in the order of their starts."""
        view = plain(text)
        budget = Budget(view.text)
        spans = [trimmed(run[0], run.start()) for run in budget.each(_P.candidate.finditer(view.text))]
        people = [span for span in spans if span and self._is_person(view.text[slice(*span)].split(" "))]
        found = [*(Finding(*span, "NAME", _SCORE) for span in people), *budget.rest("NAME")]
        return list(in_original(found, view))

    def _is_person(self, words: list[str]) -> bool:
        if len(words) == 2 and " ".join(words).title() in data.word_set("names_zh_pinyin", "pairs"):
            return False  # Shan Dong
        if len(words) == 2 and is_pinyin(*words):
            return True
        first = words[0]
        last = next((word for word in reversed(words) if len(word) > 2), first)  # Paul Brenner M. D.
        if not all(not_a_common_word(word) for word in words):
            return False
        is_given = first in ENGLISH.given or first in self._lists.given
        is_also_a_word = first in ENGLISH.ambiguous or first in ENGLISH.famous
        if len(words) == 1:
            return is_given and not is_also_a_word and first not in ENGLISH.common
        if is_given:
            return not is_also_a_word or last in self._lists.surnames
        # Two surnames are a firm or a place more often than a person.
        is_place = first in self._lists.surnames or first in ENGLISH.places
        return not is_place and (last in self._lists.surnames or looks_like_surname(last))

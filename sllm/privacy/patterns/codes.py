"""What looks like a key: strings that a generator made, and not people."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Finding
from sllm.privacy.regex import Patterns, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["entropy", "is_coded", "is_key", "is_lone_secret", "looks_random", "mixed", "scan"]

_P = Patterns("secrets")

_CLASSES = tuple(lazy(chars) for chars in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9_.-]"))
# Alternatives: the prefixes that services publish so that scanners can find their keys.
_KEYS = lazy(
    lambda: rf"(?<![A-Za-z0-9_-])(?:{'|'.join(rule['pattern'] for rule in data.table('secrets')['keys'])})"
)


def mixed(value: str) -> int:
    """How many of these occur: lower case, capitals, digits, signs other than those between words."""
    return sum(pattern.search(value) is not None for pattern in _CLASSES)


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits per character."""
    n = len(value)
    repeated = sum(count * math.log2(count) for count in Counter(value).values() if count > 1)
    return math.log2(n) - repeated / n if n else 0.0


def looks_random(value: str) -> bool:
    """Whether letters and digits are mixed as a generator of keys mixes them, and words do not.

    Identifiers are made of words: cut where a capital or a digit begins, their pieces are four characters
    long and more, and a third of their letters are vowels. In base 62 pieces have two characters, and one
    letter in five is a vowel. Only the longest run without signs counts, so that several short words and
    numbers joined by signs are not random; digits of hexadecimal alone are a checksum as often as a key, and
    are not either.
    """
    run = max(_P.alnum_run.findall(value), key=len, default="")
    if len(run) < 12 or _P.hex_only.match(run) or run.isdigit() or entropy(run) < 3:
        return False
    words = _P.piece.findall(run)
    pieces = len(words)
    letters = sum(map(str.isalpha, run))
    vowels = len(_P.vowel.findall(run))
    if run.islower() or run.isupper():  # with digits between
        return (
            letters < len(run) < (3.7 if vowels < 0.25 * letters else 3.2) * pieces
            and vowels < 0.42 * letters
        )
    short = sum(len(piece) <= 2 for piece in words)
    if letters < len(run) < 2.2 * pieces:
        return True
    last = _P.last_word.search(run)
    if last and len(_P.vowel.findall(last[0])) >= 0.3 * len(last[0]):
        return False  # Wav2Vec2ConformerConfig
    if len(run) >= 16 and short >= 0.5 * pieces and len(run) < 3.4 * pieces and vowels < 0.42 * letters:
        return True
    return (letters < len(run) < 2.4 * pieces) or (len(run) < 4 * pieces and vowels < 0.34 * letters)


def is_key(value: str) -> bool:
    """Whether a value has digits in it, and not only as the numbers of versions, or looks random:
    sk-learn-style-pipeline and sk-model-v2-large are words with signs between.
    """
    coded = _P.digit.search(value) and mixed(value) >= 2 and not _P.words_joined.match(value)
    return entropy(value) > 2.5 and (bool(coded) or looks_random(value))


def is_coded(value: str) -> bool:
    """Whether digits and letters are mixed as in hexadecimal."""
    return mixed(value) >= 2 and _P.digit.search(value) is not None and entropy(value) >= 3


def is_lone_secret(value: str) -> bool:
    """Whether a word that only the sentence around it calls a secret looks like one."""
    return (
        _P.mixed.match(value) is not None
        and not _P.looks_like_code.search(value)
        and (_P.three.match(value) is not None or not _P.not_secret.match(value))
        and entropy(value) >= 2.8
    )


def scan(text: str) -> Iterator[Finding]:
    """Keys with the prefixes of services in a plain view (:func:`sllm.privacy.text.plain`)."""
    for run in _P.key_run.finditer(text):
        for found in _KEYS.finditer(text, *run.span()):
            if is_key(found[0]):
                yield Finding(*found.span(), "SECRET", 1.0, checked=True)

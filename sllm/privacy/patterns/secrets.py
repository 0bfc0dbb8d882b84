"""Passwords, keys and codes: by the prefixes of services, after words that announce them, and what only looks
like one: code, examples, masks. What is assigned or spoken of without such a word is a rule of
``secrets.ini``.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Finding
from sllm.privacy.regex import Patterns, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_coded", "is_key", "is_lone_secret", "looks_random", "scan", "secret_at"]

_P = Patterns("secrets")

_CLASSES = tuple(lazy(chars) for chars in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9_.-]"))
# Alternatives: the prefixes that services publish so that scanners can find their keys.
_KEYS = lazy(
    lambda: rf"(?<![A-Za-z0-9_-])(?:{'|'.join(rule['pattern'] for rule in data.table('secrets')['keys'])})"
)


def _mixed(value: str) -> int:
    """How many of these occur: lower case, capitals, digits, signs other than those between words."""
    return sum(pattern.search(value) is not None for pattern in _CLASSES)


def _entropy(value: str) -> float:
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
    letters = sum(map(str.isalpha, run))
    of_one_case = run.islower() or run.isupper()  # pieces are longer there, between digits
    if len(run) < 12 or _P.hex_only.match(run) or not letters or _entropy(run) < 3:
        return False
    if of_one_case and letters == len(run):
        return False
    wordy = len(run) / len(_P.piece.findall(run)) + 4 * len(_P.vowel.findall(run)) / letters
    return wordy < (5.3 if of_one_case else 4.4)


def is_key(value: str) -> bool:
    """Whether a value has digits in it, and not only as the numbers of versions, or looks random:
    sk-learn-style-pipeline and sk-model-v2-large are words with signs between.
    """
    coded = _P.digit.search(value) and _mixed(value) >= 2 and not _P.words_joined.match(value)
    return _entropy(value) > 2.5 and (bool(coded) or looks_random(value))


def is_coded(value: str) -> bool:
    """Whether digits and letters are mixed as in hexadecimal."""
    return _mixed(value) >= 2 and _P.digit.search(value) is not None and _entropy(value) >= 3


def is_lone_secret(value: str) -> bool:
    """Whether a word that only the sentence around it calls a secret looks like one."""
    return (
        _P.mixed.match(value) is not None
        and not _P.looks_like_code.search(value)
        and (_P.three.match(value) is not None or not _P.not_secret.match(value))
        and _entropy(value) >= 2.8
    )


def _secret(text: str, at: int, quote: str, strong: bool, sign: bool) -> Finding | None:
    """The secret that begins at an offset, if there is one."""
    opening = quote[-1:]
    closing = {"“": "”", "‘": "’", "「": "」"}.get(opening, opening)
    han = (_P.han_quoted if opening else _P.han_secret).match(text, at) if strong and sign else None
    if han and not han[0].isascii() and (not opening or text[han.end()] == closing):
        return Finding(at, at + len(han[0].rstrip(".,;:)]}")), "SECRET", 0.7)
    found = _P.secret_value.match(text, at)
    if not found:
        return None
    value = found[0]
    ends = [one.start() - at for one in _P.closing.finditer(text, at, found.end() + 1) if one[0] == closing]
    cut = ends[0] if ends else value.find(closing) if opening else -1
    quoted = cut >= 0
    if quoted:
        value = value[:cut]
    else:
        stop = _P.value_end.search(value)
        value = value[: stop.start() if stop else None].rstrip(".,;:)]}")
    random = len(value) >= 8 and _P.three.match(value) is not None and not _P.looks_like_code.search(value)
    is_code = _P.code_expression.match(value) or _P.not_secret.match(value)
    if len(value) < 4 or (is_code and not random) or (_P.dotted.match(value) and not quoted):
        return None
    coded = _P.digit.search(value) is not None and _mixed(value) >= 2
    if strong and quoted:
        good = sign or not (value.isalpha() and value.islower())
    elif strong and sign:
        odd = any(not c.isalnum() and c not in "_-./" for c in value) or len(value) >= 12
        good = coded or (odd and _mixed(value) >= 2) or value.isdigit()
    elif strong:
        good = coded and len(value) >= 6
    elif not quoted and _P.identifier.match(value):
        good = False
    elif len(value) >= 20 and (looks_random(value) or (value.isalnum() and is_coded(value))):
        good = True
    else:
        plain = " " not in value if quoted else sign and _entropy(value) >= 2.8
        good = len(value) >= 8 and coded and plain
    return Finding(at, at + len(value), "SECRET", 0.8) if good else None


def secret_at(text: str, start: int, end: int, word: str) -> Finding | None:
    """The secret after a word that announces one, which is ``text[start:end]``, if there is one."""
    weak = word in data.word_set("secrets", "weak words")
    if weak and not _P.key_before.search(text[max(0, start - 40) : start]):
        return None
    link = _P.secret_link.match(text, end)
    sign = link["sign"] or "" if link else ""
    if not link or (sign == ":" and text.startswith("::", link.start("sign"))):
        return None  # pass::Fuse is a name of code
    if word in ("pass", "pw") and sign not in (":", "=", "："):
        return None
    if not sign and not link["quote"] and text[link.end() - 1] not in " \t":
        return None
    # "is" needs a value that cannot be the rest of a sentence.
    strong = word in data.word_set("secrets", "strong words")
    return _secret(text, link.end(), link["quote"], strong, sign != "" and not sign[0].isalpha())


def scan(text: str) -> Iterator[Finding]:
    """Keys of services, and secrets in a pair with a login and after Chinese labels, in a plain view
    (:func:`sllm.privacy.text.plain`).
    """
    for run in _P.key_run.finditer(text):
        for found in _KEYS.finditer(text, *run.span()):
            if is_key(found[0]):
                yield Finding(*found.span(), "SECRET", 1.0, checked=True)
    for pattern, sign in ((_P.login_pair, False), (_P.han_label, True), (_P.han_label_space, False)):
        for link in pattern.finditer(text):
            one = _secret(text, link.end(), link["quote"], True, sign)
            if one:
                yield one

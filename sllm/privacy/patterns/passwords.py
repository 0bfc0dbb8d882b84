"""Passwords, keys and codes that words announce, and what only looks like one: code, examples, masks. What is
assigned or spoken of without them are rules of ``secrets.ini``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Finding
from sllm.privacy.patterns.codes import entropy, is_coded, looks_random, mixed
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan", "secret_at"]

_P = Patterns("secrets")


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
    quoted = False
    if opening:
        cut = next(
            (one.start() - at for one in _P.closing.finditer(text, at, found.end() + 1) if one[0] == closing),
            value.find(closing),
        )
        if cut >= 0:
            value = value[:cut]
            quoted = True
    if not quoted:
        stop = _P.value_end.search(value)
        if stop:
            value = value[: stop.start()]
        value = value.rstrip(".,;:)]}")
    random = len(value) >= 8 and _P.three.match(value) is not None and not _P.looks_like_code.search(value)
    if len(value) < 4 or (_P.not_secret.match(value) and not random):
        return None
    digit = _P.digit.search(value) is not None
    kinds = mixed(value)
    if not strong and not quoted and _P.identifier.match(value):
        return None
    if (_P.code_expression.match(value) and not random) or (_P.dotted.match(value) and not quoted):
        return None
    if strong:
        if quoted:
            good = not (value.isalpha() and value.islower() and not sign)
        elif sign:
            good = kinds >= 2 and (
                digit or any(not c.isalnum() and c not in "_-./" for c in value) or len(value) >= 12
            )
            good = good or (value.isdigit() and len(value) >= 4)
        else:
            good = digit and kinds >= 2 and len(value) >= 6
    elif len(value) >= 20 and (looks_random(value) or (value.isalnum() and is_coded(value))):
        good = True
    elif quoted:
        good = len(value) >= 8 and digit and kinds >= 2 and " " not in value
    else:
        good = len(value) >= 8 and digit and kinds >= 2 and sign and entropy(value) >= 2.8
    return Finding(at, at + len(value), "SECRET", 0.8) if good else None


def secret_at(text: str, start: int, end: int, word: str) -> Finding | None:
    """The secret after a word that announces one, which is ``text[start:end]``, if there is one."""
    strong = word in data.word_set("secrets", "strong words")
    weak = word in data.word_set("secrets", "weak words")
    if weak and not _P.key_before.search(text[max(0, start - 40) : start]):
        return None
    link = _P.secret_link.match(text, end)
    if not link:
        return None
    if text.startswith("::", link.start("sign")) and link["sign"] == ":":
        return None  # pass::Fuse is a name of code
    sign = link["sign"] is not None
    if word in ("pass", "pw") and not (sign and link["sign"] in (":", "=", "：")):
        return None
    if not sign and not link["quote"] and text[link.end() - 1 : link.end()] not in (" ", "\t"):
        return None
    # "is" needs a value that cannot be the rest of a sentence.
    worded = sign and link["sign"][:1].isalpha()
    return _secret(text, link.end(), link["quote"], strong, sign and not worded)


def scan(text: str) -> Iterator[Finding]:
    """Secrets in a plain view: in a pair with a login, and after Chinese labels."""
    for pattern, sign in ((_P.login_pair, False), (_P.han_label, True), (_P.han_label_space, False)):
        for link in pattern.finditer(text):
            one = _secret(text, link.end(), link["quote"], True, sign)
            if one:
                yield one

r"""Identifiers that are recognised by their letters and signs: e-mail, network addresses, keys, codes.

Every pattern begins with an ASCII look-behind for the characters that it repeats, and every repetition is
bounded or over characters that what follows it does not match: so each stretch of text is read once.
``\b`` is not used, because it does not fire between a Han character and an ASCII one.
"""

from __future__ import annotations

import functools
import ipaddress
import math
from collections import Counter
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums, rules
from sllm.privacy.regex import Patterns, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["entropy", "looks_random", "mixed", "scan"]

_P = Patterns("codes")

# Letters of Latin script beyond ASCII, as internationalised addresses have them (RFC 6531).
_LATIN = "".join(chr(c) for c in range(0xC0, 0x250) if chr(c).isalpha())
_LOCAL = f"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{{|}}~-{_LATIN}"
# git@ at these hosts is the same for everyone.
_FORGES = ("github.com", "gitlab.com", "bitbucket.org", "gitee.com", "ssh.dev.azure.com", "codeberg.org")
_SPOKEN_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"


def _emails(text: str) -> Iterator[Finding]:
    for sign in _P.at.finditer(text):
        at = sign.start()
        before = text[max(0, at - 64) : at]
        local = before[len(before.rstrip(_LOCAL)) :].lstrip(".!#$%&'*+/=?^`{|}~-")
        found = _P.domain.match(text, at + 1)
        # Scheme and path of an address stay outside: mailto:a@b.c, https://x.y/a@b.c.
        local = local.rsplit("/", 1)[-1].rsplit("=", 1)[-1]
        if local and not local.endswith(".") and found:
            domain = found[0].rstrip(".-")
            labels = domain.split(".")
            # The pattern also takes what follows the domain in Latin script without a gap. A last label that
            # does not have the form of a top-level domain (lodash@4.17.21) makes it something else.
            if (
                len(labels) >= 2
                and all(0 < len(label) < 64 for label in labels)
                and labels[-1].isalpha()
                and 2 <= len(labels[-1]) <= 24
                and not (
                    local == "git"
                    and (text.startswith(":", at + 1 + len(domain)) or text.startswith(_FORGES, at + 1))
                )
            ):
                yield Finding(at - len(local), at + 1 + len(domain), "EMAIL", 1.0)
    for spoken in _P.spoken_at.finditer(text):
        before = text[max(0, spoken.start() - 66) : spoken.start()].removesuffix(" ")
        head = before[len(before.rstrip(_SPOKEN_CHARS)) :]
        tail = _P.spoken_domain.match(text, spoken.end()) if head else None
        if tail:
            gap = text[spoken.start() - 1] == " "
            start = spoken.start() - gap - len(head)
            more = _P.spoken_head.search(text[max(0, start - 40) : start])
            yield Finding(start - (len(more[0]) if more else 0), tail.end(), "EMAIL", 0.9)


def _urls(text: str) -> Iterator[Finding]:
    at = text.find("://")
    while at >= 0:
        done = at + 3
        scheme = _P.scheme.search(text[max(0, at - 22) : at])
        if scheme:
            found = _P.userinfo.match(text, at + 3)
            if found:
                yield Finding(at - len(scheme[0]), found.end(), "URL", 1.0, checked=True)
                done = found.end()  # addresses within it are found with it
            else:
                found = _P.profile.match(text, at + 3)
                if found:
                    yield Finding(at - len(scheme[0]), found.end(), "USER", 0.8)
        at = text.find("://", done)


def _ipv4(text: str) -> Iterator[Finding]:
    for found in _P.ipv4.finditer(text):
        parts = [int(part) for part in found[0].split(".")]
        if max(parts) > 255 or parts[0] in (0, 127, 255) or any(p[0] == "0" < p for p in found[0].split(".")):
            continue
        before = text[max(0, found.start() - 40) : found.start()]
        # python:3.11.4.20-slim, 1.2.3.45-beta: a version, or the tag of an image.
        if parts[0] < 10 and (_P.tag_after.match(text, found.end()) or _P.image_before.search(before)):
            continue
        if not _P.ip_before.search(before):
            if _P.version_before.search(before) or (parts[0] < 10 and _P.package_before.search(before)):
                continue
            # Four small parts are a version or a section number more often than an address.
            if max(parts) < 20 or parts[1:] == [0, 0, 0]:
                continue
            if before[-1:].isascii() and (before[-1:].isalpha() or before[-1:] in "_"):
                continue
        yield Finding(found.start(), found.end(), "IP", 0.9, checked=True)


def _ipv6(text: str) -> Iterator[Finding]:
    if ":" not in text:
        return
    for found in _P.ipv6.finditer(text):
        address = found[0]
        follow = text[found.end() : found.end() + 1]
        if follow.isascii() and (follow.isalnum() or follow == "_"):
            continue
        # A colon that ends a clause is not part of it.
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        groups = [group for group in address.split(":") if group]
        if address.count(":") < 2 or (
            len(groups) < 3 and not address.lower().startswith(("fe80:", "20", "fd", "fc"))
        ):
            continue
        if not any(char.isdigit() for char in address) or (len(groups) < 8 and "::" not in address):
            continue
        if len(groups) < 3 and max(map(len, groups), default=0) < 3:
            continue
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            continue
        end = found.start() + len(address)
        zone = _P.ipv6_zone.match(text, end)
        yield Finding(found.start(), zone.end() if zone else end, "IP", 0.95, checked=True)


@functools.cache
def _iban_lengths() -> dict[str, int]:
    """Country -> length of its IBANs, as the registry (SWIFT, ISO 13616) gives them."""
    lengths = data.table("codes")["iban lengths"].items()
    return {country: int(length) for length, countries in lengths for country in countries.split()}


_SEPARATORS = str.maketrans("", "", " -")


def _ibans(text: str, budget: Budget) -> Iterator[Finding]:
    lengths = _iban_lengths()
    done = 0
    for head in _P.iban_start.finditer(text):
        start = head.start()
        length = lengths.get(head[0][:2].upper())
        if start < done or length is None:
            continue
        if not budget.spend(start):
            return
        # As many letters and digits as the country's numbers have, whatever follows.
        end, n = head.end(), 4
        for group in _P.iban_group.finditer(text, end, end + 50):
            if group.start() != end or n >= length:
                break
            n += len(group[0].translate(_SEPARATORS))
            end = group.end()
        number = text[start:end].translate(_SEPARATORS).upper()
        labelled = _P.iban_label.search(text[max(0, start - 10) : start]) is not None
        follow = text[end : end + 1]
        whole = n == length and not (follow.isascii() and follow.isalnum())
        good = whole and checksums.valid("iban", number)
        # Of the right form, in capitals: with a typing error it is still somebody's account.
        if whole and (good or labelled or (head[0].isupper() and sum(map(str.isdigit, number)) >= 0.6 * n)):
            done = end
        elif labelled and not whole:
            rest = _P.iban_rest.match(text, head.end())
            token = text[start : rest.end() if rest else end].split(" ")[0]
            done = start + len(token) if len(token) >= 15 else done
        if done > start:
            yield Finding(start, done, "IBAN", 1.0 if good else 0.6, checked=good)


_CLASSES = tuple(lazy(chars) for chars in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9_.-]"))


def mixed(value: str) -> int:
    """How many of these occur: lower case, capitals, digits, signs other than those between words."""
    return sum(pattern.search(value) is not None for pattern in _CLASSES)


def _wallets(text: str) -> Iterator[Finding]:
    """Addresses in Base58."""
    for found in _P.base58.finditer(text):
        value = found[0]
        good = checksums.valid("base58check", value)
        if good or (mixed(value) == 3 and value[0] in "13LM" and entropy(value) > 3.5):
            yield Finding(*found.span(), "WALLET", 1.0 if good else 0.7, checked=good)


@functools.cache
def _prefixes() -> str:
    """Alternatives: the prefixes that services publish so that scanners can find their keys."""
    return "|".join(rule["pattern"] for rule in data.table("secrets")["keys"])


_KEYS = lazy(lambda: rf"(?<![A-Za-z0-9_-])(?:{_prefixes()})")


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


def _keys(text: str) -> Iterator[Finding]:
    for run in _P.key_run.finditer(text):
        for found in _KEYS.finditer(text, *run.span()):
            value = found[0]
            # sk-learn-style-pipeline and sk-model-v2-large are words with signs between.
            if entropy(value) > 2.5 and (_is_coded(value) or looks_random(value)):
                yield Finding(found.start(), found.end(), "SECRET", 1.0, checked=True)
    for found in _P.bearer.finditer(text):
        value = found[1]
        if _P.digit.search(value) and mixed(value) >= 2 and entropy(value) > 2.5:
            yield Finding(*found.span(1), "SECRET", 0.9)


def _is_coded(value: str) -> bool:
    """Whether a value has digits in it, and not only as the numbers of versions."""
    return _P.digit.search(value) is not None and mixed(value) >= 2 and not _P.words_joined.match(value)


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    for one in (_emails, _urls, _ipv4, _ipv6, _wallets, _keys):
        yield from one(text)
    budget = Budget(text)
    yield from _ibans(text, budget)
    yield from budget.rest("IBAN")
    budget = Budget(text)
    yield from rules.scan(text, "codes", budget)
    yield from budget.rest("ACCOUNT")

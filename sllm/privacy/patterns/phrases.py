"""Users and places that a whole phrase gives away: lines of logs, handles, pairs of coordinates."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding
from sllm.privacy.patterns.labels import COMMON, DEGREES

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

# Lines of logs: Failed password for jdoe from 192.0.2.1, user=jdoe from 192.0.2.1.
_FROM = re.compile(r" (?:from|at|by|on) (?=[0-9]{1,3}\.[0-9]{1,3}\.|[0-9a-fA-F]{1,4}:[0-9a-fA-F:]{4})")
_LOG_USER = re.compile(
    r"(?: for (?:invalid user |user )?|[Uu]ser[= ])(?P<user>[A-Za-z][A-Za-z0-9_.-]{2,31})"
    r"(?: (?:logged in|connected|login|signed in))?\Z"
)
# A handle in a sentence; at the start of a line it is a decorator, before a slash a package.
_HANDLE = re.compile(r"@(?=[A-Za-z0-9.]{0,30}[0-9_])[A-Za-z][A-Za-z0-9_.]{2,30}(?![A-Za-z0-9_/@(-])")
_HANDLE_BEFORE = re.compile(r"(?:[a-z:,(\u4e00-\u9fff] |[\u4e00-\u9fff:])\Z")
_HAN_HANDLE = re.compile(
    r"(?:微博|抖音|小红书|B站|快手|知乎|豆瓣|公众号)[号名]?[:：是 ]{0,2}@([\u4e00-\u9fffA-Za-z0-9_-]{2,20})"
)
_PAIR = re.compile(r"\.[0-9]{4,10} ?, ?[-+]?[0-9]{1,3}\.[0-9]{4,10}(?![0-9]|\.[0-9]| ?, ?[-+]?[0-9])")
_PAIR_BEFORE = re.compile(r"(?<![0-9.,+-])(?<![0-9.,] )[-+]?[0-9]{1,3}\Z")
_ACTIVE_USER = re.compile(
    r"(?<![A-Za-z])[Uu]ser (?P<user>[A-Za-z][A-Za-z0-9_.-]{3,31}) (?:logged|signed|has logged|registered|"
    r"connected|joined)(?![a-z])"
)
_DMS = re.compile(DEGREES)
_ADDED = re.compile(
    r"加[我他她下一个这那联系\u4e00-\u9fff]{0,5}(?:[vV][xX信]?|[微薇威][信芯]?)[:：是 ]{1,3}"
    r"(?P<user>[A-Za-z0-9_][A-Za-z0-9_-]{4,24})"
)


def scan(text: str) -> Iterator[Finding]:
    """What a whole phrase gives away."""
    for sign in _FROM.finditer(text):
        at = max(0, sign.start() - 72)
        found = _LOG_USER.search(text[at : sign.start()])
        if found:
            yield Finding(at + found.start("user"), at + found.end("user"), "USER", 0.8)
    if "@" in text:
        for found in _HANDLE.finditer(text):
            before = _HANDLE_BEFORE.search(text[max(0, found.start() - 2) : found.start()])
            if before and any(c.isdigit() or c == "_" for c in found[0]):
                yield Finding(found.start(), found.start() + len(found[0].rstrip(".")), "USER", 0.6)
        for found in _HAN_HANDLE.finditer(text):
            yield Finding(found.start(1), found.end(1), "USER", 0.7)
    for found in _ACTIVE_USER.finditer(text) if "ser " in text else ():
        if found["user"].lower() not in COMMON:
            yield Finding(found.start("user"), found.end("user"), "USER", 0.7)
    if "加" in text:
        for found in _ADDED.finditer(text):
            yield Finding(found.start("user"), found.end("user"), "USER", 0.8)
    if "°" in text:
        for found in _DMS.finditer(text):
            yield Finding(found.start(), found.end(), "GEO", 0.8)
    for middle in _PAIR.finditer(text):
        at = max(0, middle.start() - 6)
        head = _PAIR_BEFORE.search(text[at : middle.start()])
        if not head:
            continue
        value = head[0] + middle[0]
        first, second = (abs(float(part)) for part in value.split(","))
        # A place on earth; two readings of an instrument are seldom negative or over ninety.
        far = "-" in value or second > 90
        if far and first <= 90 and second <= 180 and max(first, second) > 10:
            yield Finding(at + head.start(), middle.end(), "GEO", 0.6)

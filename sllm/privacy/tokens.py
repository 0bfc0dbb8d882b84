"""Identifiers that are told by their letters and signs: e-mail, addresses of the network, keys, codes.

Every pattern starts behind an ASCII look-behind of the characters that it repeats, and every repetition is
bounded or over characters that what follows it does not take: so each stretch of text is walked over once.
``\\b`` is not used, because it does not fire between a Han character and an ASCII one.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from sllm.privacy import checksums
from sllm.privacy.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["entropy", "scan"]

_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{|}~-"
_DOMAIN = re.compile(r"[A-Za-z0-9.-]{1,253}")
_SPOKEN_AT = re.compile(r"[\[({<] ?(?:at|AT|@) ?[\])}>]")
_SPOKEN_LOCAL = re.compile(r"[A-Za-z0-9._+-]{1,64} ?\Z")
_SPOKEN_DOMAIN = re.compile(
    r" ?[A-Za-z0-9-]{1,63}(?:(?: ?[\[({<] ?(?:dot|DOT|\.) ?[\])}>] ?|\.| dot )[A-Za-z0-9-]{1,63}){1,5}"
)


def _emails(text: str) -> Iterator[Finding]:
    at = text.find("@")
    while at >= 0:
        before = text[max(0, at - 64) : at]
        local = before[len(before.rstrip(_LOCAL)) :].lstrip(".!#$%&'*+/=?^`{|}~-")
        found = _DOMAIN.match(text, at + 1)
        # Scheme and path of an address stay outside: mailto:a@b.c, https://x.y/a@b.c.
        local = local.rsplit("/", 1)[-1].rsplit("=", 1)[-1]
        if local and not local.endswith(".") and found:
            domain = found[0].rstrip(".-")
            labels = domain.split(".")
            # What follows the domain in Latin script without a gap was taken by the pattern; a last label
            # that is no top-level domain by its form (lodash@4.17.21) is none.
            if (
                len(labels) >= 2
                and all(0 < len(label) < 64 for label in labels)
                and labels[-1].isalpha()
                and 2 <= len(labels[-1]) <= 24
                and not (local == "git" and text[at + 1 + len(domain) : at + 2 + len(domain)] == ":")
            ):
                yield Finding(at - len(local), at + 1 + len(domain), "EMAIL", 1.0)
        at = text.find("@", at + 1)
    for spoken in _SPOKEN_AT.finditer(text):
        head = _SPOKEN_LOCAL.search(text[max(0, spoken.start() - 66) : spoken.start()])
        tail = _SPOKEN_DOMAIN.match(text, spoken.end())
        if head and tail:
            start = spoken.start() - len(head[0])
            yield Finding(start, tail.end(), "EMAIL", 0.9)


_USERINFO = re.compile(r"[^\s\0/@:?#\"'<>]{0,100}(?::[^\s\0/@\"'<>]{1,200})?@[^\s\0\"'<>，。；、）】》]{1,2000}")
_PROFILE = re.compile(
    r"(?:www\.)?(?:linkedin\.com/in|facebook\.com|instagram\.com|weibo\.com/u|t\.me|wa\.me)/[A-Za-z0-9._%-]{2,60}"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}\Z")


def _urls(text: str) -> Iterator[Finding]:
    at = text.find("://")
    while at >= 0:
        scheme = _SCHEME.search(text[max(0, at - 22) : at])
        if scheme:
            found = _USERINFO.match(text, at + 3)
            if found:
                yield Finding(at - len(scheme[0]), found.end(), "URL", 1.0, checked=True)
            else:
                found = _PROFILE.match(text, at + 3)
                if found:
                    yield Finding(at - len(scheme[0]), found.end(), "USER", 0.8)
        at = text.find("://", at + 3)


_IPV4 = re.compile(r"(?<![0-9.])[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9])(?!\.[0-9])")
_VERSION_BEFORE = re.compile(
    r"(?:[Vv]|ver\.?|[Vv]ersion|VERSION|版本号?|固件|build|release|[A-Za-z]/|==|>=|<=|~=|第|section|Section|§)"
    r"[ :：=]{0,2}\Z"
)
_IP_BEFORE = re.compile(r"(?:ip|host|server|address|ping|ssh|dns|gateway|地址|服务器|网关|主机)[^0-9]{0,12}\Z", re.I)


def _ipv4(text: str) -> Iterator[Finding]:
    for found in _IPV4.finditer(text):
        parts = [int(part) for part in found[0].split(".")]
        if max(parts) > 255 or parts[0] in (0, 127, 255) or any(p[0] == "0" < p for p in found[0].split(".")):
            continue
        before = text[max(0, found.start() - 24) : found.start()]
        if not _IP_BEFORE.search(before):
            if _VERSION_BEFORE.search(before):
                continue
            # Four small parts are a version or a section number more often than an address.
            if max(parts) < 20 or parts[1:] == [0, 0, 0]:
                continue
            if before[-1:].isascii() and (before[-1:].isalpha() or before[-1:] in "_"):
                continue
        yield Finding(found.start(), found.end(), "IP", 0.9, checked=True)


_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{1,4}|:):[0-9A-Fa-f:]{1,37}(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3})?")
_IPV6_ZONE = re.compile(r"%[A-Za-z0-9]{1,15}")


def _ipv6(text: str) -> Iterator[Finding]:
    for found in _IPV6.finditer(text):
        address = found[0]
        follow = text[found.end() : found.end() + 1]
        if follow.isascii() and (follow.isalnum() or follow == "_"):
            continue
        # A colon that ends a clause is not part of it.
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        groups = [group for group in address.split(":") if group]
        if address.count(":") < 2 or (len(groups) < 3 and not address.lower().startswith(("fe80:", "20", "fd", "fc"))):
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
        zone = _IPV6_ZONE.match(text, end)
        yield Finding(found.start(), zone.end() if zone else end, "IP", 0.95, checked=True)


_MAC = re.compile(
    r"(?<![0-9A-Za-z:-])[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}(?![0-9A-Za-z]|[:-][0-9A-Fa-f]{2})"
    r"|(?<![0-9A-Za-z.])[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}(?![0-9A-Za-z]|\.[0-9])"
)


def _macs(text: str) -> Iterator[Finding]:
    for found in _MAC.finditer(text):
        value = found[0]
        # 1234.5678.9012 could be any grouped number.
        if "." in value and not any(char.isalpha() for char in value):
            continue
        yield Finding(found.start(), found.end(), "MAC", 0.9, checked=True)


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}(?![A-Za-z0-9])")
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}[ -]?[A-Za-z0-9]{1,4}(?=[ -A-Za-z0-9])")
_IBAN_REST = re.compile(r"(?:[ -]?[A-Za-z0-9]){0,36}")
_SEPARATORS = str.maketrans("", "", " -")
_IBAN_LABEL = re.compile(r"iban[^A-Za-z0-9]{0,4}\Z", re.I)


def _ibans(text: str) -> Iterator[Finding]:
    end = 0
    for head in _IBAN_START.finditer(text):
        start = head.start()
        if start < end:
            continue
        rest = _IBAN_REST.match(text, head.end())
        stop = rest.end() if rest else head.end()
        raw = text[start:stop]
        compact = raw.translate(_SEPARATORS).upper()
        if len(compact) < 15 or not any(char.isdigit() for char in compact[4:]):
            continue
        labelled = _IBAN_LABEL.search(text[max(0, start - 10) : start]) is not None
        # The words behind it look like more groups of it: every end of a group is tried, the longest first.
        ends = [i for i in range(len(raw), 14, -1) if not raw[i : i + 1].isalnum() and raw[i - 1].isalnum()]
        if text[stop : stop + 1].isascii() and text[stop : stop + 1].isalnum():
            ends = [i for i in ends if i < len(raw)]
        for i in ends[:14]:
            number = raw[:i].translate(_SEPARATORS).upper()
            if 15 <= len(number) <= 34 and checksums.mod97(number) and checksums.stdnum_valid("iban", number):
                end = start + i
                yield Finding(start, end, "IBAN", 1.0, checked=True)
                break
        else:
            # Of an IBAN's form, in capitals, most of it digits: a slip of the pen is still somebody's account.
            token = raw.split(" ")[0] if len(raw.split(" ")[0]) >= 15 else raw
            number = token.translate(_SEPARATORS)
            upper = number == number.upper() and number[:2].isalpha()
            if labelled or (upper and 15 <= len(number) <= 34 and sum(c.isdigit() for c in number) >= 0.6 * len(number)):
                end = start + len(token)
                yield Finding(start, end, "IBAN", 0.6)


_BASE58 = re.compile(r"(?<![A-Za-z0-9])[13LMDT][1-9A-HJ-NP-Za-km-z]{25,34}(?![A-Za-z0-9])")
_BECH32 = re.compile(r"(?<![A-Za-z0-9])(?:bc1|tb1|ltc1|BC1|addr1)[a-zA-Z0-9]{11,100}(?![A-Za-z0-9])")
_HEX_WALLET = re.compile(r"(?<![A-Za-z0-9])0x[0-9a-fA-F]{40}(?![A-Za-z0-9])")
_MONERO = re.compile(r"(?<![A-Za-z0-9])[48][0-9AB][1-9A-HJ-NP-Za-km-z]{93}(?![A-Za-z0-9])")


def _mixed(value: str) -> int:
    """How many of lower case, capitals, digits and signs occur."""
    lower = any("a" <= char <= "z" for char in value)
    upper = any("A" <= char <= "Z" for char in value)
    digit = any("0" <= char <= "9" for char in value)
    return lower + upper + digit + any(not char.isalnum() for char in value)


def _wallets(text: str) -> Iterator[Finding]:
    for found in _BASE58.finditer(text):
        good = checksums.base58check(found[0])
        if good or (_mixed(found[0]) == 3 and found[0][0] in "13LM" and entropy(found[0]) > 3.5):
            yield Finding(found.start(), found.end(), "WALLET", 1.0 if good else 0.7, checked=good)
    for pattern in (_BECH32, _HEX_WALLET, _MONERO):
        for found in pattern.finditer(text):
            if any(char.isdigit() for char in found[0][4:]):
                yield Finding(found.start(), found.end(), "WALLET", 0.9)


_VIN = re.compile(r"(?<![A-Za-z0-9])[A-HJ-NPR-Z0-9]{17}(?![A-Za-z0-9])|(?<![A-Za-z0-9])[a-hj-npr-z0-9]{17}(?![A-Za-z0-9])")


def _vins(text: str) -> Iterator[Finding]:
    for found in _VIN.finditer(text):
        letters = sum(char.isalpha() for char in found[0])
        if 2 <= letters <= 14 and checksums.vin(found[0]):
            yield Finding(found.start(), found.end(), "VIN", 0.95, checked=True)


# Prefixes that services publish so that scanners can find their keys.
_KEYS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-[A-Za-z0-9_-]{16,200}|(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10,200}|whsec_[A-Za-z0-9+/=]{16,100}"
    r"|gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_[A-Za-z0-9_]{20,255}|glpat-[A-Za-z0-9_-]{16,100}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-[A-Za-z0-9-]{10,250}"
    r"|(?:AKIA|ASIA|AGPA|AIDA|AROA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[A-Za-z0-9_-]{30,45}|ya29\.[A-Za-z0-9_-]{20,300}"
    r"|GOCSPX-[A-Za-z0-9_-]{20,40}|eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{4,4000}(?:\.[A-Za-z0-9_-]{0,4000})?"
    r"|hf_[A-Za-z0-9]{20,60}|npm_[A-Za-z0-9]{30,60}|pypi-[A-Za-z0-9_-]{30,300}|dckr_pat_[A-Za-z0-9_-]{20,60}"
    r"|SG\.[A-Za-z0-9_-]{16,40}\.[A-Za-z0-9_-]{16,60}|key-[0-9a-f]{32}|(?:AC|SK)[0-9a-f]{32}(?![0-9A-Za-z])"
    r"|LTAI[A-Za-z0-9]{12,30}|AKID[A-Za-z0-9]{13,50}|dop_v1_[0-9a-f]{32,80}|shp(?:at|ss|ca|pa)_[A-Fa-f0-9]{20,60}"
    r"|gsk_[A-Za-z0-9]{20,80}|xai-[A-Za-z0-9]{20,120}|nvapi-[A-Za-z0-9_-]{20,120}|r8_[A-Za-z0-9]{20,60}|pplx-[A-Za-z0-9]{20,80}"
    r"|tvly-[A-Za-z0-9-]{16,60}|ATATT[A-Za-z0-9_=-]{20,300}|lin_api_[A-Za-z0-9]{20,60}|secret_[A-Za-z0-9]{30,60}"
    r"|EAA[A-Za-z0-9]{30,300}|[0-9]{8,10}:AA[A-Za-z0-9_-]{30,40}|tskey-[A-Za-z0-9-]{16,80}|hvs\.[A-Za-z0-9_-]{20,200}"
    r")"
)
_WEBHOOK = re.compile(
    r"https://(?:hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/|oapi\.dingtalk\.com/robot/send\?|"
    r"qyapi\.weixin\.qq\.com/cgi-bin/webhook/send\?|open\.feishu\.cn/open-apis/bot/)[A-Za-z0-9_/?=&.-]{8,300}"
)
_BEARER = re.compile(r"(?<![A-Za-z0-9])(?:[Bb]earer|BEARER|[Bb]asic) +([A-Za-z0-9_.~+/=-]{12,4000})")
_BLOCK_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_BLOCK_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits for each."""
    n = len(value)
    return -sum(count / n * math.log2(count / n) for count in Counter(value).values())


def _keys(text: str) -> Iterator[Finding]:
    for found in _KEYS.finditer(text):
        value = found[0]
        # sk-learn-like words and kebab-case names have no digit or hardly any variety.
        if _mixed(value) >= 2 and any(char.isdigit() for char in value) and entropy(value) > 2.5:
            yield Finding(found.start(), found.end(), "SECRET", 1.0, checked=True)
    for found in _WEBHOOK.finditer(text):
        yield Finding(found.start(), found.end(), "SECRET", 1.0, checked=True)
    for found in _BEARER.finditer(text):
        value = found[1]
        if any(char.isdigit() for char in value) and _mixed(value) >= 2 and entropy(value) > 2.5:
            yield Finding(found.start(1), found.end(1), "SECRET", 0.9)
    begin = _BLOCK_BEGIN.search(text)
    while begin:
        # A block that has no end goes on to the end of the text.
        close = _BLOCK_END.search(text, begin.end())
        stop = close.end() if close else len(text)
        yield Finding(begin.start(), stop, "SECRET", 1.0, checked=True)
        begin = _BLOCK_BEGIN.search(text, stop)


_B = r"(?<![A-Za-z0-9])"
_E = r"(?![A-Za-z0-9])"
_CODES: tuple[tuple[re.Pattern[str], str, str], ...] = (
    # Spain (DNI, NIE), Italy, India (PAN), United Kingdom, Mexico (CURP), Finland.
    (re.compile(rf"{_B}(?:[0-9]{{8}}-?[A-HJ-NP-TV-Z]|[XYZ]-?[0-9]{{7}}-?[A-HJ-NP-TV-Z]){_E}"), "NATIONALID", "es"),
    (re.compile(rf"{_B}[A-Z]{{6}}[0-9]{{2}}[A-EHLMPRST][0-9]{{2}}[A-Z][0-9]{{3}}[A-Z]{_E}"), "NATIONALID", ""),
    (re.compile(rf"{_B}[A-Z]{{3}}[ABCFGHLJPTK][A-Z][0-9]{{4}}[A-Z]{_E}"), "NATIONALID", ""),
    (
        re.compile(rf"{_B}[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{{2}} ?[0-9]{{2}} ?[0-9]{{2}} ?[A-D]{_E}"),
        "NATIONALID",
        "",
    ),
    (re.compile(rf"{_B}[A-Z]{{4}}[0-9]{{6}}[HMX][A-Z]{{5}}[A-Z0-9][0-9]{_E}"), "NATIONALID", ""),
    (re.compile(rf"{_B}[0-9]{{6}}[A+][0-9]{{3}}[0-9A-FHJ-NPR-Y]{_E}"), "NATIONALID", "fi.hetu"),
    # The two machine-readable lines of a passport.
    (re.compile(r"(?<![A-Z0-9<])P[A-Z<][A-Z]{3}[A-Z<]{30,39}<"), "PASSPORT", ""),
    (re.compile(r"(?<![A-Z0-9<])[A-Z0-9<]{9}[0-9][A-Z]{3}[0-9]{7}[MFX<][0-9]{7}[A-Z0-9<]{14,16}"), "PASSPORT", ""),
    # Driving licence of the United Kingdom.
    (re.compile(rf"{_B}[A-Z9]{{5}}[0-9][0156][0-9][0-3][0-9]{{2}}[A-Z9]{{2}}[0-9A-Z]{{3}}{_E}"), "LICENCE", ""),
)
_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"


def _codes(text: str) -> Iterator[Finding]:
    for pattern, kind, check in _CODES:
        for found in pattern.finditer(text):
            value = found[0].replace("-", "").replace(" ", "")
            checked = False
            if check == "es":
                body = value[:-1].translate(str.maketrans("XYZ", "012"))
                if _DNI[int(body) % 23] != value[-1]:
                    continue
                checked = True
            elif check:
                if not checksums.stdnum_valid(check, value):
                    continue
                checked = True
            yield Finding(found.start(), found.end(), kind, 0.9, checked=checked)


_SCANS: tuple[Callable[[str], Iterator[Finding]], ...] = (
    _emails, _urls, _ipv4, _ipv6, _macs, _ibans, _wallets, _vins, _keys, _codes,
)  # fmt: skip


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.normal.plain`)."""
    for one in _SCANS:
        yield from one(text)

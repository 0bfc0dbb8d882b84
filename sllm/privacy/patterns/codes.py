r"""Identifiers that are recognised by their letters and signs: e-mail, network addresses, keys, codes.

Every pattern begins with an ASCII look-behind for the characters that it repeats, and every repetition is
bounded or over characters that what follows it does not match: so each stretch of text is read once.
``\b`` is not used, because it does not fire between a Han character and an ASCII one.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.regex import ALONE, END, lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["entropy", "looks_random", "scan"]

# Letters of Latin script beyond ASCII, as internationalised addresses have them (RFC 6531).
_LATIN = "".join(chr(c) for c in range(0xC0, 0x250) if chr(c).isalpha())
_LOCAL = f"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{{|}}~-{_LATIN}"
_AT = lazy(rf"(?<=[A-Za-z0-9_+\-!#$%&'*/=?^`{{|}}~{_LATIN}])@(?=[A-Za-z0-9{_LATIN}])")
_DOMAIN = lazy(rf"[A-Za-z0-9.{_LATIN}-]{{1,253}}")
# git@ at these hosts is the same for everyone.
_FORGES = ("github.com", "gitlab.com", "bitbucket.org", "gitee.com", "ssh.dev.azure.com", "codeberg.org")
_SPOKEN_AT = lazy(r"[\[({<] ?(?:at|AT|@) ?[\])}>]")
_SPOKEN_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"
_SPOKEN_DOMAIN = lazy(
    r" ?[A-Za-z0-9-]{1,63}(?:(?: ?[\[({<] ?(?:dot|DOT|\.) ?[\])}>] ?|\.| dot )[A-Za-z0-9-]{1,63}){1,5}"
)

# priya [dot] nair: what comes before the last word of a local part that is spelled out.
_SPOKEN_HEAD = lazy(r"[A-Za-z0-9_+-]{1,24} ?[\[({<] ?(?:dot|DOT|\.) ?[\])}>] ?\Z")
_TLD = (
    r"(?:com|org|net|edu|gov|info|biz|io|me|dev|app|co|ai|cn|hk|tw|uk|de|fr|es|it|nl|eu|us|ca|au|jp|kr|in|br|"
    r"ru|ch|se|no|pl|be|at|ie|sg|nz|mx)(?![A-Za-z0-9])"
)
# tom at example dot com; 张三艾特qq点com.
_SAID = lazy(
    r"(?<![A-Za-z0-9._+-])[A-Za-z0-9][A-Za-z0-9._+-]{0,40}(?: (?:dot|DOT|Dot) [A-Za-z0-9_-]{1,24}){0,3}"
    r"(?: (?:at|AT|At|\(at\)) |艾特|小老鼠|圈[aA])"
    r"[A-Za-z0-9-]{1,40}(?:(?: (?:dot|DOT|Dot) |\.|点| 点 )[A-Za-z0-9-]{1,24}){0,3}"
    rf"(?: (?:dot|DOT|Dot) |点| 点 ){_TLD}"
)
_DOTS = (" dot ", " DOT ", " Dot ", "点")
_PROVIDERS = (
    r"(?:qq|163|126|139|189|gmail|foxmail|sina|sohu|yeah|aliyun|outlook|hotmail|yahoo|icloud|"
    r"live|msn|protonmail)"
)
# Written against harvesting: liuyang#163.com; and with spaces around the sign.
_OTHER_AT = lazy(
    rf"(?<![A-Za-z0-9._+-])[A-Za-z0-9][A-Za-z0-9._+-]{{1,40}}(?: ?[#&*] ?{_PROVIDERS}\.(?:com|net|"
    rf"cn)(?![A-Za-z0-9])"
    rf"| ?@ ?(?:[A-Za-z0-9-]{{1,40}} ?\. ?){{1,3}}{_TLD})"
)


def _emails(text: str) -> Iterator[Finding]:
    for sign in _AT.finditer(text):
        at = sign.start()
        before = text[max(0, at - 64) : at]
        local = before[len(before.rstrip(_LOCAL)) :].lstrip(".!#$%&'*+/=?^`{|}~-")
        found = _DOMAIN.match(text, at + 1)
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
    for spoken in _SPOKEN_AT.finditer(text):
        before = text[max(0, spoken.start() - 66) : spoken.start()].removesuffix(" ")
        head = before[len(before.rstrip(_SPOKEN_CHARS)) :]
        tail = _SPOKEN_DOMAIN.match(text, spoken.end()) if head else None
        if tail:
            gap = text[spoken.start() - 1] == " "
            start = spoken.start() - gap - len(head)
            more = _SPOKEN_HEAD.search(text[max(0, start - 40) : start])
            yield Finding(start - (len(more[0]) if more else 0), tail.end(), "EMAIL", 0.9)
    if any(dot in text for dot in _DOTS):
        for found in _SAID.finditer(text):
            yield Finding(found.start(), found.end(), "EMAIL", 0.8)
    if "#" in text or " @ " in text or "@ " in text:
        for found in _OTHER_AT.finditer(text):
            yield Finding(found.start(), found.end(), "EMAIL", 0.8)


_USERINFO = lazy(r"[^\s\0/@:?#\"'<>]{0,100}(?::[^\s\0/@\"'<>]{1,200})?@[^\s\0\"'<>，。；、）】》]{1,2000}")
_PROFILE = lazy(
    r"(?:www\.)?(?:linkedin\.com/in|facebook\.com|instagram\.com|weibo\.com/u|t\.me|"
    r"wa\.me)/[A-Za-z0-9._%-]{2,60}"
)
_SCHEME = lazy(r"[A-Za-z][A-Za-z0-9+.-]{1,20}\Z")


def _urls(text: str) -> Iterator[Finding]:
    at = text.find("://")
    while at >= 0:
        done = at + 3
        scheme = _SCHEME.search(text[max(0, at - 22) : at])
        if scheme:
            found = _USERINFO.match(text, at + 3)
            if found:
                yield Finding(at - len(scheme[0]), found.end(), "URL", 1.0, checked=True)
                done = found.end()  # addresses within it are found with it
            else:
                found = _PROFILE.match(text, at + 3)
                if found:
                    yield Finding(at - len(scheme[0]), found.end(), "USER", 0.8)
        at = text.find("://", done)


_IPV4 = lazy(r"(?<![0-9.])[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9])(?!\.[0-9])")
_VERSION_BEFORE = lazy(
    r"(?:[Vv]|ver\.?|[Vv]ersion|VERSION|版本号?|固件|build|release|[A-Za-z]/|==|>=|<=|~=|第|"
    r"section|Section|§)"
    r"[ :：=]{0,2}\Z"
)
_IP_BEFORE = lazy(
    r"(?:ip|src|dst|addr|peer|inet|remote|from|host|server|address|ping|ssh|dns|gateway|地址|服务器|网关|主机)[^0-9]{0,12}\Z",
    re.I,
)


_TAG_AFTER = lazy(r"-[a-z]{2,}")
_PACKAGE_BEFORE = lazy(r"(?<![A-Za-z0-9_.])[a-z][a-z0-9_-]{1,30}[:-]\Z")
_IMAGE_BEFORE = lazy(r"(?:FROM|image[\"']?:|docker pull|docker run)[ \"'][A-Za-z0-9._/-]{1,30}:\Z")


def _ipv4(text: str) -> Iterator[Finding]:
    for found in _IPV4.finditer(text):
        parts = [int(part) for part in found[0].split(".")]
        if max(parts) > 255 or parts[0] in (0, 127, 255) or any(p[0] == "0" < p for p in found[0].split(".")):
            continue
        before = text[max(0, found.start() - 40) : found.start()]
        # python:3.11.4.20-slim, 1.2.3.45-beta: a version, or the tag of an image.
        if parts[0] < 10 and (_TAG_AFTER.match(text, found.end()) or _IMAGE_BEFORE.search(before)):
            continue
        if not _IP_BEFORE.search(before):
            if _VERSION_BEFORE.search(before) or (parts[0] < 10 and _PACKAGE_BEFORE.search(before)):
                continue
            # Four small parts are a version or a section number more often than an address.
            if max(parts) < 20 or parts[1:] == [0, 0, 0]:
                continue
            if before[-1:].isascii() and (before[-1:].isalpha() or before[-1:] in "_"):
                continue
        yield Finding(found.start(), found.end(), "IP", 0.9, checked=True)


_IPV6 = lazy(
    # A label may come right before it: addr:2001:db8::1, IPv6：fe80::1 (the colon is ASCII in the plain
    # view).
    r"(?<![0-9A-Za-z.])(?:(?<![0-9A-Fa-f:]:)|(?<=[Vv]6:))(?:[0-9A-Fa-f]{1,4}|:):[0-9A-Fa-f:]{1,37}(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3})?"
)
_IPV6_ZONE = lazy(r"%[A-Za-z0-9]{1,15}")


def _ipv6(text: str) -> Iterator[Finding]:
    if ":" not in text:
        return
    for found in _IPV6.finditer(text):
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
        zone = _IPV6_ZONE.match(text, end)
        yield Finding(found.start(), zone.end() if zone else end, "IP", 0.95, checked=True)


_MAC_START = lazy("[0-9A-Fa-f]{2}[:.-][0-9A-Fa-f]{2}")
_MAC = lazy(
    r"(?<![0-9A-Za-z-])(?<![0-9A-Fa-f]:)[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}(?![0-9A-Za-z]|"
    r"[:-][0-9A-Fa-f]{2})"
    r"|(?<![0-9A-Za-z.])[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}(?![0-9A-Za-z]|\.[0-9])"
)


def _macs(text: str) -> Iterator[Finding]:
    if not _MAC_START.search(text):
        return
    for found in _MAC.finditer(text):
        value = found[0]
        # 1234.5678.9012 could be any grouped number.
        if "." in value and not any(char.isalpha() for char in value):
            continue
        yield Finding(found.start(), found.end(), "MAC", 0.9, checked=True)


@functools.cache
def _iban_lengths() -> dict[str, int]:
    """Country -> length of its IBANs, as the registry (SWIFT, ISO 13616) gives them."""
    lengths = data.table("codes")["iban lengths"].items()
    return {country: int(length) for length, countries in lengths for country in countries.split()}


_IBAN_START = lazy(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ -]?[A-Za-z0-9]{2})")
_IBAN_REST = lazy(r"(?:[ -]?[A-Za-z0-9]){0,30}")
_SEPARATORS = str.maketrans("", "", " -")
_IBAN_LABEL = lazy(r"iban[^A-Za-z0-9]{0,4}\Z", re.I)


def _ibans(text: str) -> Iterator[Finding]:
    lengths = _iban_lengths()
    done = judged = 0
    for head in _IBAN_START.finditer(text):
        start = head.start()
        length = lengths.get(head[0][:2].upper())
        if start < done or length is None:
            continue
        judged += 1
        if judged > _MAX_IBANS:
            yield Finding(start, len(text), "IBAN", 0.5)
            return
        # As many letters and digits as the country's numbers have, whatever follows.
        end, n = head.end(), 4
        for group in _IBAN_GROUP.finditer(text, end, end + 50):
            if group.start() != end:
                break
            n += len(group[0].translate(_SEPARATORS))
            end = group.end()
            if n >= length:
                break
        number = text[start:end].translate(_SEPARATORS).upper()
        labelled = _IBAN_LABEL.search(text[max(0, start - 10) : start]) is not None
        follow = text[end : end + 1]
        if n == length and not (follow.isascii() and follow.isalnum()):
            if checksums.valid("iban", number):
                done = end
                yield Finding(start, end, "IBAN", 1.0, checked=True)
            # Of the right form, in capitals: with a typing error it is still somebody's account.
            elif labelled or (head[0].isupper() and sum(map(str.isdigit, number)) >= 0.6 * n):
                done = end
                yield Finding(start, end, "IBAN", 0.6)
        elif labelled:
            rest = _IBAN_REST.match(text, head.end())
            token = text[start : rest.end() if rest else end].split(" ")[0]
            if len(token) >= 15:
                done = start + len(token)
                yield Finding(start, done, "IBAN", 0.6)


# How many candidates in one text are checked; everything after them counts as found, so that a text of
# nothing but beginnings of numbers costs bounded time and leaks nothing.
_MAX_IBANS = 5000
_IBAN_GROUP = lazy(r"[ -]?[A-Za-z0-9]{1,30}")


_BASE58 = lazy(r"[13LMDT][1-9A-HJ-NP-Za-km-z]{25,34}")
_WALLET = lazy(
    r"(?:bc1|tb1|ltc1)[ac-hj-np-z02-9]{11,71}|BC1[AC-HJ-NP-Z02-9]{11,71}|addr1[a-z0-9]{50,100}|"
    r"0x[0-9a-fA-F]{40}|[48][0-9AB][1-9A-HJ-NP-Za-km-z]{93}"
)


_CLASSES = tuple(lazy(chars) for chars in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9]"))


def _mixed(value: str) -> int:
    """How many of these occur: lower case, capitals, digits, signs."""
    return sum(pattern.search(value) is not None for pattern in _CLASSES)


_VIN = lazy(r"[A-HJ-NPR-Z0-9]{17}|[a-hj-npr-z0-9]{17}")


@functools.cache
def _national_words() -> dict[int, list[tuple[re.Pattern[str], str]]]:
    """Length -> patterns of national numbers that are one word of letters and digits, with their kinds."""
    words: dict[int, list[tuple[re.Pattern[str], str]]] = {}
    for rule in data.table("codes")["words"]:
        words.setdefault(rule["length"], []).append((lazy(rule["pattern"]), rule["kind"]))
    return words


_WORD = lazy(r"[A-Za-z0-9]{10,}")


def _words(text: str) -> Iterator[Finding]:
    """Words of ten or more letters and digits, mixed."""
    national = _national_words()
    for found in _WORD.finditer(text):
        value = found[0]
        if len(value) > 110 or value.isalpha() or value.isdigit():
            continue
        start, end = found.span()
        for pattern, kind in national.get(len(value), ()):
            if pattern.fullmatch(value):
                yield Finding(start, end, kind, 0.9)
        if len(value) == 17 and _VIN.fullmatch(value):
            letters = sum(map(str.isalpha, value))
            if 2 <= letters <= 14 and checksums.vin(value):
                yield Finding(start, end, "VIN", 0.95, checked=True)
        elif 26 <= len(value) <= 35 and _BASE58.fullmatch(value):
            good = checksums.base58check(value)
            if good or (_mixed(value) == 3 and value[0] in "13LM" and entropy(value) > 3.5):
                yield Finding(start, end, "WALLET", 1.0 if good else 0.7, checked=good)
        if _WALLET.fullmatch(value) and any(char.isdigit() for char in value[4:]):
            yield Finding(start, end, "WALLET", 0.9)


def _patterns(name: str) -> str:
    """Alternatives: the prefixes that services publish so that scanners can find their keys."""
    return "|".join(rule["pattern"] for rule in data.table("secrets")[name])


_KEYS = lazy(lambda: rf"(?<![A-Za-z0-9_-])(?:{_patterns('keys')})")
_KEY_RUN = lazy(r"[A-Za-z0-9_.\-:+/=]{14,}")
_DIGIT = lazy("[0-9]")
_WEBHOOK = lazy(lambda: rf"https://(?:{_patterns('webhooks')})[A-Za-z0-9_/?=&.-]{{8,300}}")
_BEARER = lazy(r"(?<![A-Za-z0-9])(?:[Bb]earer|BEARER|[Bb]asic) +([A-Za-z0-9_.~+/=-]{12,4000})")
_BLOCK_BEGIN = lazy(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_BLOCK_END = lazy(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits per character."""
    n = len(value)
    repeated = sum(count * math.log2(count) for count in Counter(value).values() if count > 1)
    return math.log2(n) - repeated / n if n else 0.0


_ALNUM_RUN = lazy(r"[A-Za-z0-9]+")
_PIECE = lazy(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_LAST_WORD = lazy(r"[A-Z][a-z]{4,}\Z")
_VOWEL = lazy("[aeiouAEIOU]")
_HEX_ONLY = lazy(r"[0-9a-fA-F]+\Z")


def looks_random(value: str) -> bool:
    """Whether letters and digits are mixed as a generator of keys mixes them, and words do not.

    Identifiers are made of words: cut where a capital or a digit begins, their pieces are four characters
    long and more, and a third of their letters are vowels. In base 62 pieces have two characters, and one
    letter in five is a vowel. Only the longest run without signs counts, so that several short words and
    numbers joined by signs are not random; digits of hexadecimal alone are a checksum as often as a key, and
    are not either.
    """
    run = max(_ALNUM_RUN.findall(value), key=len, default="")
    if len(run) < 12 or _HEX_ONLY.match(run) or run.isdigit() or entropy(run) < 3:
        return False
    words = _PIECE.findall(run)
    pieces = len(words)
    letters = sum(map(str.isalpha, run))
    vowels = len(_VOWEL.findall(run))
    if run.islower() or run.isupper():  # with digits between
        return (
            letters < len(run) < (3.7 if vowels < 0.25 * letters else 3.2) * pieces
            and vowels < 0.42 * letters
        )
    short = sum(len(piece) <= 2 for piece in words)
    if letters < len(run) < 2.2 * pieces:
        return True
    last = _LAST_WORD.search(run)
    if last and len(_VOWEL.findall(last[0])) >= 0.3 * len(last[0]):
        return False  # Wav2Vec2ConformerConfig
    if len(run) >= 16 and short >= 0.5 * pieces and len(run) < 3.4 * pieces and vowels < 0.42 * letters:
        return True
    return (letters < len(run) < 2.4 * pieces) or (len(run) < 4 * pieces and vowels < 0.34 * letters)


def _keys(text: str) -> Iterator[Finding]:
    for run in _KEY_RUN.finditer(text):
        for found in _KEYS.finditer(text, *run.span()):
            value = found[0]
            # sk-learn-style-pipeline and sk-model-v2-large are words with signs between.
            if entropy(value) > 2.5 and (_is_coded(value) or looks_random(value)):
                yield Finding(found.start(), found.end(), "SECRET", 1.0, checked=True)
    if (
        "://" not in text
        and "earer" not in text
        and "EARER" not in text
        and "asic" not in text
        and "-----" not in text
    ):
        return
    for found in _WEBHOOK.finditer(text):
        yield Finding(found.start(), found.end(), "SECRET", 1.0, checked=True)
    for found in _BEARER.finditer(text):
        value = found[1]
        if any(char.isdigit() for char in value) and _mixed(value) >= 2 and entropy(value) > 2.5:
            yield Finding(found.start(1), found.end(1), "SECRET", 0.9)
    begin = _BLOCK_BEGIN.search(text)
    while begin:
        # A block without an end extends to the end of the text.
        close = _BLOCK_END.search(text, begin.end())
        stop = close.end() if close else len(text)
        yield Finding(begin.start(), stop, "SECRET", 1.0, checked=True)
        begin = _BLOCK_BEGIN.search(text, stop)


_WORDS_JOINED = lazy(
    r"(?:[A-Za-z]{1,24}|[A-Za-z]{0,3}[0-9]{1,4}[A-Za-z]?)(?:[-_.](?:[A-Za-z]{1,24}|[A-Za-z]{0,3}[0-9]{1,4}[A-Za-z]?))*\Z"
)


def _is_coded(value: str) -> bool:
    """Whether a value has digits in it, and not only as the numbers of versions."""
    return _DIGIT.search(value) is not None and _mixed(value) >= 2 and not _WORDS_JOINED.match(value)


@functools.cache
def _lettered_codes() -> list[tuple[re.Pattern[str], str, str]]:
    """Patterns of numbers with letters in them, their kinds, and their checks in ``stdnum``."""
    table = data.table("codes")
    return [
        (lazy(rule["first"] + ALONE + rule["rest"] + END), rule["kind"], rule["check"])
        for rule in (*table["national"], *table["of an organisation"])
    ]


# The two machine-readable lines of a passport.
_MACHINE_READABLE = (
    lazy(r"(?<![A-Z0-9<])P[A-Z<][A-Z]{3}[A-Z<]{30,39}<"),
    lazy(r"(?<![A-Z0-9<])[A-Z0-9<]{9}[0-9][A-Z]{3}[0-9]{7}[MFX<][0-9]{7}[A-Z0-9<]{14,16}"),
)


def _codes(text: str) -> Iterator[Finding]:
    if "<<" in text:
        for pattern in _MACHINE_READABLE:
            for found in pattern.finditer(text):
                yield Finding(found.start(), found.end(), "PASSPORT", 0.9)
    if not _DIGIT.search(text):
        return
    for pattern, kind, check in _lettered_codes():
        for found in pattern.finditer(text):
            value = found[0].replace(" ", "")
            if check != "fi.hetu":  # its sign is the century
                value = value.replace("-", "")
            if not check or checksums.valid(check, value):
                yield Finding(found.start(), found.end(), kind, 0.9, checked=bool(check))


_SCANS: tuple[Callable[[str], Iterator[Finding]], ...] = (
    _emails, _urls, _ipv4, _ipv6, _macs, _ibans, _words, _keys, _codes,
)  # fmt: skip


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    for one in _SCANS:
        yield from one(text)

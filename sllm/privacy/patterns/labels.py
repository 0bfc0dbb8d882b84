"""Values that the words before them announce: "passport no. ...", "生日：...", "password = ...".

A value after a clear label needs no checksum. Labels are looked up word by word (English, and the keys of
JSON, of environments and of code) or found by one pattern (Chinese); a value is only searched after a label.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns.passwords import SECRET_WORDS, secret_at
from sllm.privacy.regex import END, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan", "scan_phrases"]

_DIGIT = lazy("[0-9]")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
_DATE = (
    r"(?:[0-9]{4} ?[-/.年] ?[0-9]{1,2} ?[-/.月] ?[0-9]{1,2}(?: ?[日号])?(?![0-9])"
    r"|[0-9]{1,2} ?[-/.] ?[0-9]{1,2} ?[-/.] ?(?:[0-9]{4}|[0-9]{2})(?![0-9])"
    r"|(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?![0-9])"
    rf"|[0-9]{{1,2}}(?:st|nd|rd|th)?(?: of)?[ -]{_MONTH}\.?,?[ -](?:[0-9]{{4}}|[0-9]{{2}})(?![0-9])"
    rf"|{_MONTH}\.?[ /-][0-9]{{1,2}}(?:st|nd|rd|th)?(?:,? ?|[/-])(?:[0-9]{{4}})(?![0-9])"
    r"|[〇零一二三四五六七八九]{4}年[一二三四五六七八九十]{1,2}月[一二三四五六七八九十]{1,3}[日号]"
    r"|[0-9]{1,2}月[0-9]{1,2}[日号]"
    r"|(?:民[国國])?[0-9]{2,3}年[0-9]{1,2}月[0-9]{1,2}日"
    r")"
)
# What may stand between a label and its value: more of the label, a verb, a sign, quotes.
_LINK = (
    r"\.?(?:号码?|码|號碼?)?[\"'”’*`]{0,3}(?:[ _.-]{0,2}(?:numbers?|nos?\.?|num|nr\.?|id|code|card|details?|"
    r"value|address|#)(?![a-z])){0,2}[\"'”’*`)\]]{0,3}[ \t]{0,3}(?:(?:is|was|are|of|on|it['’]s|it is|"
    r"ending in|[:：=#>]|->|-|=>|为|是)[ \t]{0,3}){0,3}[\"'“‘(*`\[]{0,3}[ \t]?"
)
_CN_LINK = (
    r"(?:号码|号|编号|信息|码|號碼|號|編號|ID|id|UID|帐号|账号|名|昵称)?[\"'”’*]{0,3}[ \t]{0,2}"
    r"(?:[(（][^()（）\n]{1,8}[)）])?[ \t]{0,2}(?:(?:应该是|改成|改为|换成|设为|设成|设置为|就是|分别是|"
    r"分别为|[:：=]|为|是|叫|填|写|:)[ \t]{0,2}){0,2}[\"'“‘「(（*]{0,3}[ \t]?"
)
# 48°51'24.5"N 2°21'03"E
_DEGREES = (
    r"[0-9]{1,2}° ?[0-9]{1,2}[′'’] ?[0-9]{1,2}(?:\.[0-9]{1,4})?[″\"”]? ?[NS][ ,]{1,2}"
    r"[0-9]{1,3}° ?[0-9]{1,2}[′'’] ?[0-9]{1,2}(?:\.[0-9]{1,4})?[″\"”]? ?[EW]"
)
_FORMS = {
    # Letters and digits, with the separators of forms that people fill in.
    "code": rf"[A-Za-z0-9](?:[ ./-]?[A-Za-z0-9]){{3,30}}{END}",
    "digits": r"[0-9](?:[ .-]{0,2}[0-9]){2,24}(?![0-9])",
    "token": r"(?:live:)?[A-Za-z0-9@_][A-Za-z0-9._@+-]{1,40}[A-Za-z0-9_](?:#[0-9]{4}(?![0-9]))?",
    "date": (
        rf"(?:{_DATE}|(?:19|20)[0-9]{{2}} ?[-/.年] ?(?:1[0-2]|0?[1-9])(?:月|(?![0-9]))"
        rf"|{_MONTH}\.?,? (?:19|20)[0-9]{{2}}(?![0-9]))"
    ),
    "plate": r"[A-Za-z0-9](?:[ ·•-]?[A-Za-z0-9]){3,9}(?![A-Za-z0-9])",
    "pin": r"(?:[A-Z]-)?[0-9]{3,8}(?![0-9])|[0-9]{2,4}(?:[ -][0-9]{2,4}){1,2}(?![0-9])",
    "zip": (
        r"(?:[0-9]{4,6}(?:-[0-9]{3,4})?|[A-Za-z]{1,2}[0-9][A-Za-z0-9]? ?[0-9][A-Za-z]{2}|"
        r"[A-Za-z][0-9][A-Za-z] ?[0-9][A-Za-z][0-9])"
        r"(?![A-Za-z0-9])"
    ),
    "geo": (
        r"[-+]?[0-9]{1,3}\.[0-9]{2,10}°?[ ]?[NSns]?(?:[ ]?[,;/，][ ]?|"
        r"[ ])[-+]?[0-9]{1,3}\.[0-9]{2,10}°?[ ]?[EWew]?"
        r"|[-+]?[0-9]{1,3}\.[0-9]{3,10}"
        rf"|{_DEGREES}"
    ),
    "hash": r"[A-Za-z0-9:]{20,110}",
}
_VALUES = {form: lazy(pattern) for form, pattern in _FORMS.items()}
# The words of English labels: passport_number and passportNumber are two words each.
_CAMEL = lazy(r"[A-Z]?[a-z]+[0-9]?|[A-Z]+(?![a-z])[0-9]?")
_CHINESE_LINK = lazy(_CN_LINK)


class _Label(NamedTuple):
    """A label with what may follow it up to the value, and what that value is."""

    pattern: re.Pattern[str]
    kind: str
    form: str


@functools.cache
def _english() -> dict[str, list[_Label]]:
    """First word -> the labels that begin with it, the longest first."""
    phrases: dict[str, list[tuple[str, str, str]]] = {}
    for rule in data.table("labels")["english"]:
        for phrase in rule["labels"]:
            first = re.findall(r"[a-z]+[0-9]?", phrase)[0]
            phrases.setdefault(first, []).append((phrase, rule["kind"], rule["form"]))
    table = {}
    for word, entries in phrases.items():
        entries.sort(key=lambda entry: -len(entry[0]))
        table[word] = [_Label(lazy(_with_link(phrase), re.I), kind, form) for phrase, kind, form in entries]
    return table


def _with_link(phrase: str) -> str:
    """A pattern of a label and what may stand between it and its value.

    The words of a label are separated by "_", "-", a space or nothing, so that passport_number and
    passportNumber count.
    """
    words = r"[ _.-]?".join(re.escape(word) for word in phrase.split(" "))
    return f"{words}(?![a-z])s?{_LINK}"


@functools.cache
def _first_words() -> frozenset[str]:
    """The words at which a search for English labels stops."""
    return frozenset(SECRET_WORDS) | frozenset(_english())


@functools.cache
def _chinese() -> dict[str, tuple[str, str]]:
    """Label -> kind and form of the value; of two rules with the same label the first counts."""
    rules = reversed(data.table("labels")["chinese"])
    return {label: (rule["kind"], rule["form"]) for rule in rules for label in rule["labels"]}


# Plain words only, the longest first: so the engine can skip to their first characters.
_CHINESE_ANY = lazy(lambda: "|".join(sorted(_chinese(), key=len, reverse=True)))


def _trim(kind: str, form: str, text: str, start: int, end: int, *, bare: bool) -> Finding | None:
    """The value after a label, if its form is one that such a label has.

    Args:
        kind: of the value.
        form: one of the keys of ``_FORMS``.
        text: that holds it.
        start: where it begins.
        end: where it ends at the latest.
        bare: it is assigned without quotes, as in code.

    """
    value = text[start:end]
    if form == "code":
        return _code(kind, value, start)
    n_digits = _count_digits(value)
    if form == "digits":
        if n_digits < (9 if kind == "SSN" else 7 if kind == "PHONE" else 4):
            return None
        if kind == "CARD" and n_digits != 4 and n_digits < 12:
            return None
        if _ONLY_DATE.fullmatch(value):
            return None
    elif form == "token":
        if not n_digits and bare:
            return None
        if value.lower() in _ORDINARY or not (
            n_digits or "_" in value or "." in value or "@" in value or len(value) >= 5
        ):
            return None
        value = value.rstrip(".-")
    elif form == "plate":
        if n_digits < 2 or not any(c.isalpha() for c in value) or value != value.upper():
            value = value.split(" ")[0]
            if _count_digits(value) < 2 or not any(c.isalpha() for c in value):
                return None
    elif form == "hash" and (n_digits < 3 or not any(c.isalpha() for c in value)):
        return None
    return Finding(start, start + len(value), kind, 0.85)


def _code(kind: str, value: str, start: int) -> Finding | None:
    """A value of letters and digits, without the words of the sentence that follow it."""
    # Words without a digit belong to the sentence, except for short capitals: AB 12 34 56 C.
    words = value.split(" ")
    keep = 1
    while keep < len(words) and (
        _DIGIT.search(words[keep]) or (len(words[keep]) <= 2 and words[keep].isupper())
    ):
        keep += 1
    while keep > 1 and not _DIGIT.search(words[keep - 1]) and len(words[keep - 1]) > 1:
        keep -= 1
    value = " ".join(words[:keep])
    cut = value.rfind("/")
    if cut > 0 and not _DIGIT.search(value[cut:]):
        value = value[:cut]
    head = value.split(" ")[0]
    if len(head) > 3 and head.isalpha() and head != head.upper():
        return None
    if len(head) <= 3 and head.isalpha() and head.islower():
        return None
    if kind == "ACCOUNT" and value.isalpha() and value.isupper() and len(value) in (8, 11):
        return Finding(start, start + len(value), kind, 0.6)  # SWIFT and BIC
    enough = 2 if kind == "DEVICE" and len(value) >= 8 else 3 if kind in ("ACCOUNT", "LICENCE") else 4
    if _count_digits(value) < enough or len(value) < _SHORTEST.get(kind, 0):
        return None
    return Finding(start, start + len(value), kind, 0.85)


def _count_digits(value: str) -> int:
    return sum("0" <= c <= "9" for c in value)


_SHORTEST = {"PASSPORT": 5, "LICENCE": 5, "VIN": 5, "NATIONALID": 7}
_ONLY_DATE = lazy(_DATE)
_ORDINARY_TEXT = (
    "is not and the for with your you are was name password from this that page form field must should "
    "will can be required string username admin root user system error failed success here there page "
    "button screen required invalid missing unique already taken between after before using via through "
    "handle login account"
)
_ORDINARY = frozenset(_ORDINARY_TEXT.split())
# 1991年7月出生: the rare word is searched, and then a date before it.
_BORN = lazy(r" ?(?:出生|生人|生，|生,|生于|诞生|生。)")
_DATE_BEFORE = lazy(rf"(?:{_DATE}|(?:19|20)[0-9]{{2}}年[0-9]{{1,2}}月)\Z")
_HANDLE_ALONE = lazy(
    r"(?!(?:[vV][0-9.]+|[A-Za-z]+_?[0-9])\Z)"
    r"(?=[A-Za-z0-9._-]{0,40}[0-9])[A-Za-z][A-Za-z_-]{2,30}[._-]?[A-Za-z0-9_-]{1,30}\Z"
)
_HANDLE_OR_NUMBER = lazy(r"[A-Za-z_][A-Za-z0-9_-]*[0-9_][A-Za-z0-9_-]*|[0-9]{5,11}")
_MARKED = lazy("[0-9_@]")
_INNER_CAPITAL = lazy("[a-z.][A-Z]")
_COUNTED = lazy("[位个分秒小天次条年月日%]")
_SIGN_NEEDED = frozenset(["USER", "SECRET"])
# Labels of a user that are ordinary words too.
_LOOSE_USER = frozenset(
    ["line", "signal", "handle", "login", "slack", "reddit", "twitch", "snap", "ig", "ins", "github", "git",
     "xbox", "discord", "twitter", "telegram", "kakao", "imessage"]
)  # fmt: skip


def _labelled(text: str, link_end: int, link: str, kind: str, form: str, label: str = "") -> Finding | None:
    found = _VALUES[form].match(text, link_end)
    if kind == "SSN" and (not found or text[found.end() : found.end() + 1].isalnum()):
        # Other countries have letters in such a number: ZZ 12 34 56 A, 131052-308T.
        found = _VALUES["code"].match(text, link_end)
        form = "code"
    if not found or text.startswith(("://", "(", "["), found.end()):
        return None
    if form == "token" and (_OF_OBJECT.match(found[0]) or _UNQUOTED.search(link)):
        return None  # an expression of code
    named = kind == "USER" and label in ("user", "username", "login", "handle", "account")
    signed = any(c in link for c in ":：=#为是“\"'") or " is " in link or "叫" in link
    if kind in _SIGN_NEEDED and not signed and not (kind == "SECRET" and text[link_end - 1] == " "):
        # login jdoe42 is a name, and so is octo-fan22; login id1 and login table_2 are not.
        if kind == "USER" and named and _HANDLE_ALONE.match(found[0]):
            return _trim(kind, form, text, found.start(), found.end(), bare=False)
        if (
            kind == "SECRET"
            and not link.isascii()
            and len(found[0]) >= 4
            and not _COUNTED.match(text, found.end())
        ):
            return _trim(kind, form, text, found.start(), found.end(), bare=False)
        # 微信 wxid_abc, QQ12345: a handle right after its label, recognised by its digits.
        chinese = kind == "USER" and (not link.isascii() or link.upper().startswith("QQ"))
        handle = _HANDLE_OR_NUMBER.fullmatch(found[0])
        marked = found[0][0] == "@" or found[0][-5:-4] == "#"
        if not marked and not (chinese and handle and len(found[0]) >= 5):
            return None
    if label in _LOOSE_USER and not any(c in link for c in ":=#") and not _MARKED.search(found[0]):
        return None
    # handle: BinaryIO is a type.
    if label in _LOOSE_USER and not _MARKED.search(found[0]) and _INNER_CAPITAL.search(found[0]):
        return None
    # login = lexer.token is code: what is assigned without quotes needs a digit to be a name.
    bare = "=" in link and not any(c in link for c in "\"'“")
    return _trim(kind, form, text, found.start(), found.end(), bare=bare)


_OF_OBJECT = lazy(
    r"(?:self|this|cls|super|request|req|config|cfg|conf|settings|args|kwargs|opts|options|os|env|process|params|ctx|"
    r"context|session|form|body|props|state|event|data|user|account|vars?|local|global|module|input|output|secrets|"
    r"github|inputs|steps|matrix|values)\.[A-Za-z_]"
)
# The key of a mapping in quotes, and a value without: {"user": user_1}.
_UNQUOTED = lazy(r"[\"'][ \t]*[:=][ \t]*\Z")
# Numbers of a bank, and as often the name of a user.
_LOGINS = frozenset(["账号", "帐号", "账户", "帐户", "帳號"])


def _after_english(text: str, budget: Budget) -> Iterator[Finding]:
    done = 0  # the end of the last secret: what it is made of is not a label
    english, first_words = _english(), _first_words()
    for word in _CAMEL.finditer(text):
        lower = word[0].lower()
        if lower not in first_words:
            continue
        start = word.start()
        if lower in SECRET_WORDS and start >= done:
            if not budget.spend(start):
                return
            one = secret_at(text, start, word.end(), lower)
            if one:
                done = one.end
                yield one
        entries = english.get(lower)
        if entries is None or (
            start and text[start - 1].isascii() and text[start - 1].isalpha() and word[0][0].islower()
        ):
            continue
        if lower in _LOOSE_USER and start and (text[start - 1] == "_" or text[start - 1].isalpha()):
            continue  # std_handle, newLine
        if not budget.spend(start):
            return
        for pattern, kind, form in entries:
            link = pattern.match(text, start)
            if link:
                one = _labelled(text, link.end(), link[0][len(lower) :], kind, form, lower)
                if one:
                    yield one
                    break


def _after_chinese(text: str, budget: Budget) -> Iterator[Finding]:
    labels = _chinese()
    for label in budget.each(_CHINESE_ANY.finditer(text)):
        if label[0][0].isascii():
            # vx, QQ, LINE: not inside another word.
            around = text[max(0, label.start() - 1) : label.start()], text[label.end() : label.end() + 1]
            if (around[0].isascii() and around[0].isalpha()) or "a" <= around[1] <= "z":
                continue
        link = _CHINESE_LINK.match(text, label.end())
        kind, form = labels[label[0]]
        one = _labelled(text, link.end(), label[0] + link[0], kind, form) if link else None
        if one is None and link and label[0] in _LOGINS:
            one = _labelled(text, link.end(), label[0] + link[0], "USER", "token")
            if one and not any(c.isdigit() or c in "_@" for c in text[one.start : one.end]):
                one = None
        if one:
            yield one


def _born(text: str) -> Iterator[Finding]:
    low = 0
    for word in _BORN.finditer(text):
        # No character is read twice, however many of these words there are.
        low = max(low, word.start() - 32)
        date = _DATE_BEFORE.search(text[low : word.start()])
        if date:
            yield Finding(low + date.start(), word.start(), "BIRTHDATE", 0.9)
        low = word.end()


# Lines of logs: Failed password for jdoe from 192.0.2.1, user=jdoe from 192.0.2.1.
_FROM = lazy(r" (?:from|at|by|on) (?=[0-9]{1,3}\.[0-9]{1,3}\.|[0-9a-fA-F]{1,4}:[0-9a-fA-F:]{4})")
_LOG_USER = lazy(
    r"(?: for (?:invalid user |user )?|[Uu]ser[= ])(?P<user>[A-Za-z][A-Za-z0-9_.-]{2,31})"
    r"(?: (?:logged in|connected|login|signed in))?\Z"
)
# A handle in a sentence; at the start of a line it is a decorator, before a slash a package.
_HANDLE = lazy(r"@(?=[A-Za-z0-9.]{0,30}[0-9_])[A-Za-z][A-Za-z0-9_.]{2,30}(?![A-Za-z0-9_/@(-])")
_HANDLE_BEFORE = lazy(r"(?:[a-z:,(\u4e00-\u9fff] |[\u4e00-\u9fff:])\Z")
_HAN_HANDLE = lazy(
    r"(?:微博|抖音|小红书|B站|快手|知乎|豆瓣|公众号)[号名]?[:：是 ]{0,2}@([\u4e00-\u9fffA-Za-z0-9_-]{2,20})"
)
_PAIR = lazy(r"\.[0-9]{4,10} ?, ?[-+]?[0-9]{1,3}\.[0-9]{4,10}(?![0-9]|\.[0-9]| ?, ?[-+]?[0-9])")
_PAIR_BEFORE = lazy(r"(?<![0-9.,+-])(?<![0-9.,] )[-+]?[0-9]{1,3}\Z")
_ACTIVE_USER = lazy(
    r"(?<![A-Za-z])[Uu]ser (?P<user>[A-Za-z][A-Za-z0-9_.-]{3,31}) (?:logged|signed|has logged|registered|"
    r"connected|joined)(?![a-z])"
)
# Lines of netrc, which may be broken: machine example.org login jdoe password ...
_NETRC = lazy(r"(?<![A-Za-z])login\s{1,8}(?P<user>[^\s:=]{2,64})\s{1,8}(?:password|account)\s")
_DMS = lazy(_DEGREES)
_ADDED = lazy(
    r"加[我他她下一个这那联系\u4e00-\u9fff]{0,5}(?:[vV][xX信]?|[微薇威][信芯]?)[:：是 ]{1,3}"
    r"(?P<user>[A-Za-z0-9_][A-Za-z0-9_-]{4,24})"
)


def scan_phrases(text: str) -> Iterator[Finding]:
    """Users and places that a whole phrase identifies: lines of logs, handles, pairs of coordinates."""
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
        if found["user"].lower() not in _ORDINARY:
            yield Finding(found.start("user"), found.end("user"), "USER", 0.7)
    for found in _NETRC.finditer(text) if "login" in text else ():
        yield Finding(found.start("user"), found.end("user"), "USER", 0.8)
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


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _after_english(text, budget)
    if not text.isascii():
        yield from _after_chinese(text, budget)
        yield from _born(text)
    yield from budget.rest("ACCOUNT")

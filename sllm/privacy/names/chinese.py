"""Chinese people whom something announces (a label, a form of address, 我叫, a phone number right behind the
name), and companies by the form that ends their name. Other names need the tagger of the extra ``names``.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.names.word_lists import CANDIDATE, trimmed
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["double_surnames", "given_length", "is_word", "scan", "single_surnames", "surname"]

_HAN = "\u4e00-\u9fff"
_DOTTED = rf"[{_HAN}]{{1,8}}(?:[·•・][{_HAN}]{{1,8}}){{1,3}}"  # 古丽·买买提
_STOP = r"(?=[，。；、,;.\s（(）)|/<\"”】\]]|\Z)"
# Which one of several it is, after a label or a name: 甲方（出租方）, 张伟（组长）.
_WHICH = r"(?:[（(][^()（）\n]{1,8}[)）])?"


@functools.cache
def _any_of(name: str) -> str:
    """Alternatives, the longest first, of ``names_zh.json``."""
    words: list[str] = data.table("names_zh")[name]
    return "|".join(sorted(words, key=len, reverse=True))


@functools.cache
def double_surnames() -> tuple[str, ...]:
    """Surnames of two characters and more."""
    return tuple(data.words("names_zh_double_surnames"))


@functools.cache
def single_surnames(*, rare: bool) -> str:
    """Surnames of one character; ``rare``: with those that are more often ordinary words."""
    lists = ["names_zh_surnames", *(["names_zh_rare_surnames"] if rare else [])]
    return "".join("".join(data.words(name)) for name in lists)


@functools.cache
def surname(*, rare: bool = False) -> str:
    """A pattern of surnames; it begins with one set of characters, which the search can skip to."""
    single, double = single_surnames(rare=rare), double_surnames()
    first = "".join(sorted({*single, *(name[0] for name in double)}))
    ends = "|".join(f"{name[1:]}(?<={name})" for name in double)
    return f"[{first}](?:{ends}|(?<=[{single}]))"


# After a sign or in a cell, a tag or a line of its own: 姓名：张伟, 姓名|张伟, 【姓名】张伟, <姓名>张伟.
_FILLED = lazy(
    rf"(?P<sign>[：:]|[|\t=】》>—\n-])[ \t\"“|*]{{0,4}}"
    rf"(?P<name>{_DOTTED}|[{_HAN}]{{2,4}}|[{_HAN}] {{1,4}}[{_HAN}]){_STOP}"
)
_TAGS = lazy(r"(?:</?[A-Za-z]{1,10}>?)+\Z")
# A field with such a label holds a person.
_FIELD = lazy(
    lambda: (
        rf"(?:{_any_of('labels')}|姓 {{0,4}}名){_WHICH}\Z"
        r"|(?:name|xm|user|contact|customer|patient|receiver|sender|owner|holder)[\"']?[ ]?(?-i:\Z)"
    ),
    re.I,
)
# Other labels, of which the end says that a person fills the field: 提货人, 值班员, 买方. Labels of people in
# books and in the news (作者, 导演) are left out: these are public.
_PERSONS = lazy(lambda: rf"(?:{_any_of('persons')})(?:姓名|名字|名称|名)?{_WHICH}\Z")
_EMPTY = lazy(lambda: rf".*(?:{_any_of('empty')})")
_PERSON = lazy(
    lambda: rf"(?:{surname()}(?P<given>[{_HAN}]{{1,2}})|{surname(rare=True)}(?P<two>[{_HAN}]{{2}}))\Z"
)
_NEXT = lazy(
    lambda: (
        rf"{_WHICH}[、，,和与及/ ]{{1,2}}(?P<name>{surname(rare=True)}[{_HAN}]{{1,2}})"
        rf"(?=[、，,。；;和与及/\s（(）)]|\Z|等)"
    )
)
_SAID = lazy(
    lambda: (
        rf"(?P<lead>{_any_of('said')}|{_any_of('loosely said')}|{_any_of('labels')})"
        rf"[是为：: “\"]{{0,3}}(?:(?P<dotted>{_DOTTED}?)(?=[^{_HAN}·•・]|\Z|[的是在和与及说了来])"
        rf"|(?P<surname>{surname()})(?P<given>[{_HAN}]{{1,2}}))"
    )
)
_CALLED = lazy(
    lambda: (
        rf"(?:我|本人|她|他|免贵)姓(?P<name>{surname(rare=True)})(?=[，,。；;！!、\s]|的|\Z)"
        rf"(?:[，, ]{{0,2}}(?:名|叫)?(?P<full>{surname()}[{_HAN}]{{1,2}}))?"
    )
)
_TITLED = lazy(
    lambda: (
        rf"(?P<name>{surname()}(?:[{_HAN}]{{1,2}}?(?:{_any_of('titles')})"
        rf"|(?=(?P<alone>{_any_of('titles after a surname')})(?!(?<=总)[{_HAN}]))))"
    )
)
_TITLE = lazy(lambda: rf"(?:{_any_of('titles')})\Z")
# A surname alone with a form of address is no person at the end of a word: 语文老师, 基金经理.
_BEFORE_TITLED = frozenset("找系给请问与和是跟叫让由被栋室户号元楼层为的致")
# A name right before its owner's number, sex or age.
_BESIDE = lazy(
    lambda: (
        rf"(?:^|(?<=[，。；、：:,;\s|（(\"“0-9]))(?P<name>{surname()}[{_HAN}]{{1,2}})(?=1[3-9][0-9]{{9}}(?![0-9])"
        rf"|[，,、（(\s|]{{1,3}}(?:性别)?(?:[男女](?![{_HAN}])|[0-9]{{2}}岁|身份证|手机|手機|(?:联系)?电话|電話|出生|"
        r"生于|住址|汉族|联系方式|聯絡|微信|邮箱|[0-9]{17}|(?:\+?86[ -]?)?1[3-9][0-9][ -]?[0-9]{4}|"
        r"9[0-9]{3} [0-9]{4}|[A-Za-z0-9._+-]{1,40}@))"
    ),
    re.M,
)
# After the number of an account, and in a list in which each has one.
_AFTER_NUMBER = lazy(
    lambda: rf"(?<=[0-9]{{5}}[ ,，|\t])(?P<name>{surname()}[{_HAN}]{{1,2}})(?=\s*(?:$|[，,。；;|\t\n]))", re.M
)
_NUMBERED = lazy(
    lambda: (
        rf"^[ \t]*[0-9]{{1,3}}[.、,，) \t|]{{1,2}} ?(?P<name>{surname()}[{_HAN}]{{1,2}})"
        r"(?=[ ,，\t|][^\n]{0,40}?(?:1[3-9][0-9][ -]?[0-9]{4}|[0-9]{17}))"
    ),
    re.M,
)
# 我叫CHEN XIAOMING, 姓名：Ada Obi.
_LATIN = lazy(
    lambda: (
        rf"(?:{_any_of('said')}|英文名字?|拼音|我是|叫|{_any_of('labels')}){_WHICH}[是为：: ]{{0,3}}(?=[A-Z])"
    )
)
_CAPITALS = lazy(r"[A-Z]{2,15}[ ,/]{1,2}[A-Z]{2,20}(?: [A-Z]{2,20})?(?![A-Za-z])")
_WORD = lazy(lambda: "|".join(data.words("names_zh_not_names")))
_ORG_END = lazy(
    r"有限责任公司|股份有限公司|有限公司|集团公司|分公司|律师事务所|会计师事务所|研究院|研究所|事务所"
)
_ORG_NAME = lazy(rf"[{_HAN}A-Za-z0-9（）()]{{2,24}}\Z")
_ORG_LEAD = lazy(
    r".*(?:就职于|任职于|供职于|工作于|单位是|单位[:：为]|公司[:：是为]|我在|他在|她在|加入|来自|毕业于|就读于|"
    r"入职|是|在|于|从|向|与|和|给|为|由|对|被|到|的|了)",
    re.S,
)


# At the end of a clause these end a name, too: 冯志刚, 魏来.
_GIVEN_AT_END = frozenset("刚来信月可为有正如若先得博")


@functools.cache
def _not_given() -> frozenset[str]:
    """Characters that are hardly ever part of a given name."""
    return frozenset("".join(data.words("names_zh_not_given")))


def given_length(text: str, at: int, longest: int) -> int:
    """How many characters from ``at`` can be a given name: none to two."""
    n = 0
    while n < min(2, longest) and text[at + n : at + n + 1]:
        last = text[at + n] in _GIVEN_AT_END and not _is_han(text, at + n + 1)
        if text[at + n] in _not_given() and not last:
            break
        n += 1
    return n


def is_word(text: str, at: int) -> bool:
    """Whether an ordinary word begins at an offset and not a name."""
    return _WORD.match(text, at) is not None


def _is_han(text: str, at: int) -> bool:
    return at >= 0 and "\u4e00" <= text[at : at + 1] <= "\u9fff"


def _looks_like_a_name(value: str) -> bool:
    found = _PERSON.match(value)
    if not found or is_word(value, 0):
        return False
    given = found["given"] or found["two"]
    return given_length(value, len(value) - len(given), 2) == len(given)


def _fills_field(text: str, found: re.Match[str]) -> bool:
    name = found["name"]
    if _EMPTY.match(name):
        return False
    ahead = text[max(0, found.start() - 24) : found.start()].rstrip(" \t\"'”*`")
    if found["sign"] in "：:" and _FIELD.search(ahead):
        return not name.isascii()
    ahead = _TAGS.sub("", ahead)
    # Without a colon, or after a label of another kind, the value has to look like a name.
    dotted = any(joint in name for joint in "·•・")
    return (dotted or _looks_like_a_name(name)) and (
        _FIELD.search(ahead) is not None or _PERSONS.search(ahead) is not None
    )


def _said(text: str, found: re.Match[str]) -> tuple[int, int] | None:
    """The range of the name after 我叫 and the like."""
    if found["dotted"]:
        return found.span("dotted")
    start, given = found.start("surname"), found.start("given")
    n = given_length(text, given, len(found["given"]))
    if not n or is_word(text, start):
        return None
    end = given + n
    sure = found["lead"] in data.word_set("names_zh", "said")
    if not sure and _is_han(text, end) and text[end] not in _not_given():
        return None  # 我是高中生
    return start, end


def _titled(text: str, found: re.Match[str]) -> tuple[int, int] | None:
    """The range of the name before a form of address; a surname alone is a name together with that."""
    start, end = found.span("name")
    if found["alone"]:
        free = not _is_han(text, start - 1) or text[start - 1] in _BEFORE_TITLED
        return (start, end + len(found["alone"])) if free and not is_word(text, start) else None
    title = _TITLE.search(found["name"])
    end -= len(title[0]) if title else 0
    return (start, end) if _is_free(text[start:end]) else None


def _is_free(name: str) -> bool:
    """Whether no ordinary word begins where a name is, and no character that names do not have is in it."""
    inner = name[1:-1] if name[-1] in _GIVEN_AT_END else name[1:]
    return not is_word(name, 0) and _not_given().isdisjoint(inner)


def _listed(text: str, at: int) -> Iterator[tuple[int, int]]:
    """The other names of a list, after its first."""
    for _ in range(50):
        found = _NEXT.match(text, at)
        if not found or is_word(text, found.start("name")):
            return
        at = found.end("name")
        yield found.span("name")


def _people(text: str, budget: Budget) -> Iterator[tuple[int, int]]:
    for found in budget.each(_FILLED.finditer(text)):
        if _fills_field(text, found):
            yield found.span("name")
    for pattern, judge in ((_SAID, _said), (_TITLED, _titled)):
        for found in budget.each(pattern.finditer(text)):
            span = judge(text, found)
            if span:
                yield span
    for found in budget.each(_CALLED.finditer(text)):
        yield found.span("name")
        if found["full"] and found["full"].startswith(found["name"]):
            yield found.span("full")
    for pattern in (_BESIDE, _AFTER_NUMBER, _NUMBERED):
        for found in budget.each(pattern.finditer(text)):
            if _is_free(found["name"]):
                yield found.span("name")
    for label in budget.each(_LATIN.finditer(text)):
        capitals = _CAPITALS.match(text, label.end())
        run = CANDIDATE.match(text, label.end())
        span = trimmed(run[0], label.end()) if run else None
        if capitals:
            yield capitals.span()
        elif span and span[0] == label.end() and not text[slice(*span)].isupper():
            yield span


def _companies(text: str, budget: Budget) -> Iterator[Finding]:
    done = 0
    for suffix in budget.each(_ORG_END.finditer(text)):
        low = max(done, suffix.start() - 24)
        done = suffix.end()
        ahead = _ORG_NAME.search(text[low : suffix.start()])
        if ahead:
            begin = low + ahead.start()
            lead = _ORG_LEAD.match(text[begin : suffix.end() - 4])
            start = begin + (lead.end() if lead else 0)
            if suffix.end() - start >= 4:
                yield Finding(start, suffix.end(), "ORG", 0.7)


def scan(text: str) -> Iterator[Finding]:
    """People and companies in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    listed = 0  # the end of the last list
    for span in _people(text, budget):
        yield Finding(*span, "NAME", 0.8)
        if span[1] > listed:
            for one in _listed(text, span[1]):
                listed = one[1]
                yield Finding(*one, "NAME", 0.7)
    yield from _companies(text, budget)
    yield from budget.rest("NAME")

"""Chinese people and companies, found without a model: by labels, roles, forms of address and signatures, and
by characters that are hardly used outside of given names.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy.findings import Budget, Finding
from sllm.privacy.names.word_lists import CANDIDATE, CHINESE, trimmed
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["fills", "given_length", "is_label", "is_typical", "is_word", "scan", "surname"]

_HAN = "\u4e00-\u9fff"


def _surname(single: str) -> str:
    """A pattern of surnames: those of two characters or more, and of one.

    Args:
        single: the surnames of one character.

    """
    double = CHINESE.double_surnames
    first = "".join(sorted({*single, *(name[0] for name in double)}))
    two = [name for name in double if len(name) == 2]
    second = "".join(sorted({name[1] for name in two}))
    ends = [f"[{second}](?<={'|'.join(two)})"]
    ends += [f"{name[1:]}(?<={name})" for name in double if len(name) > 2]
    return f"[{first}](?:{'|'.join(ends)}|(?<=[{single}]))"


@functools.cache
def surname() -> str:
    """A pattern of the common surnames."""
    return _surname(CHINESE.surnames)


@functools.cache
def _of_names() -> str:
    """A set of the characters of given names."""
    return f"[{CHINESE.given}{CHINESE.given_sure}]"


@functools.cache
def _field_labels() -> str:
    """Alternatives of labels, the longest first. After a colon, what fills the field is a name whatever its
    characters, unless it says that the field is empty.
    """
    return "|".join(sorted(CHINESE.field_labels, key=len, reverse=True))


@functools.cache
def _any_surname() -> str:
    """With those that are ordinary words too, for where something else says that a name follows."""
    return _surname(CHINESE.surnames + CHINESE.rare_surnames)


_GIVEN = f"[{_HAN}]"
# Which one of several it is, after a role or a name: 甲方（出租方）, 张伟（组长）.
_WHICH = r"(?:[（(][^()（）\n]{1,8}[)）])?"
_WORDS_CN = lazy(lambda: CHINESE.not_names)
_CN_BEFORE = lazy(
    lambda: (
        rf"(?:{'|'.join(CHINESE.roles)})"
        rf"{_WHICH}"
        r"(?P<link>[\"'”：:是为係為叫“\"（( ]{0,4})(?=(?P<surname>"
        + surname()
        + rf")(?P<given>{_GIVEN}{{1,3}}))"
    )
)
_CN_TITLE = lazy(
    lambda: (
        rf"(?P<name>{surname()}{_GIVEN}{{1,2}}?)(?:先生|女士|小姐|太太|老师|医生|教授|经理|主任|律师|"
        rf"同学|师傅|护士|局长|院长|警官|博士|老師|醫生|醫師|經理|同學|師傅|"
        rf"同志|夫人|阿姨|总监|校长|大夫|法官|检察官|会计|教练|部长|处长|科长|董事长|总经理|妈妈|爸爸|家长)"
    )
)
# A surname alone with a form of address is a person too, unless it is the end of a word: 语文老师, 基金经理.
_CN_ADDRESSED = lazy(
    lambda: (
        "(?P<name>"
        + _surname(CHINESE.addressed)
        + "(?:先生|女士|小姐|太太|老师|医生|教授|律师|师傅|警官|阿姨|大夫|老師|醫生|總|"
        + rf"总(?![{_HAN}])))"
    )
)
_BEFORE_ADDRESSED = frozenset("找系给请问与和是跟叫让由被栋室户号元楼层为的致")
# A name next to a number of its owner: in a column, on the label of a parcel, after an account.
_CN_BESIDE = lazy(
    lambda: rf"[ ,，|/、:\t](?P<name>{surname()}{_GIVEN}{{1,2}})(?=\s*(?:$|[，,。；;|\t\n]| [0-9]))", re.M
)
_BESIDE_BEFORE = lazy(r"[0-9]{5}[0-9X]\Z")
_CN_LISTED = lazy(
    lambda: (
        rf"^[ \t]*(?:[0-9]{{1,3}}[.、,，) \t|]{{1,2}} ?)(?P<name>{surname()}{_GIVEN}{{1,2}})(?=[ ,，\t|"
        rf"][^\n]{{0,40}}?"
        r"(?:1[3-9][0-9][ -]?[0-9]{4}|[0-9]{17}))"
    ),
    re.M,
)
_CN_JSON = lazy(lambda: rf"[:=] ?[\"']?(?P<name>{surname()}{_GIVEN}{{1,2}})(?=[\"',;&}}\s]|\Z)")
_JSON_BEFORE = lazy(
    r"(?:name|xm|user|contact|customer|patient|receiver|sender|owner|holder)[\"']?[ ]?\Z", re.I
)
_CN_MY = lazy(
    lambda: (
        rf"(?:我|本人|她|他)姓(?P<name>{surname()})(?![名{_HAN}])(?:[，, ]{{0,2}}(?:名|"
        rf"叫)?(?P<full>{surname()}{_GIVEN}{{1,2}}))?"
    )
)
_CN_FIELD = lazy(
    lambda: (
        rf"(?:^|(?<=[，。；、：:,;\s|（(\"“]))(?P<name>{surname()}{_GIVEN}{{1,2}})(?=1[3-9][0-9]{{9}}(?![0-9])|[，,、（(\s|"
        rf"]{{1,3}}(?:性别)?(?:[男女](?![{_HAN}])|[0-9]{{2}}岁|"
        rf"身份证|手机|电话|联系电话|出生|生于|1[3-9][0-9]{{9}}|[0-9]{{17}}|住址|汉族|"
        rf"(?:\+?86[ -]?)?1[3-9][0-9][ -]?[0-9]{{4}}|联系方式|聯絡|電話|手機|微信|邮箱|"
        rf"[A-Za-z0-9._+-]{{1,40}}@|9[0-9]{{3}} [0-9]{{4}}))"
    ),
    re.M,
)
_CN_ORG_END = lazy(
    r"有限责任公司|股份有限公司|有限公司|集团公司|分公司|律师事务所|会计师事务所|研究院|研究所|事务所"
)
_CN_ORG_NAME = lazy(rf"[{_HAN}A-Za-z0-9（）()]{{2,24}}\Z")
_ORG_LEAD = lazy(
    (
        r".*(?:就职于|任职于|供职于|工作于|单位是|单位[:：为]|公司[:：是为]|我在|他在|她在|加入|来自|"
        r"毕业于|就读于|入职|是|在|于|从|向|与|和|给|为|由|对|被|到|的|了)"
    ),
    re.S,
)


_DOTTED = rf"[{_HAN}]{{1,8}}(?:[·•・][{_HAN}]{{1,8}}){{1,3}}"
_FIELD_STOP = r"(?=[，。；、,;.\s（(）)|/<\"”】\]]|\Z)"
_CN_FILLED = lazy(
    rf"[：:][ \t\"“]{{0,3}}(?P<name>[{_HAN}]{{2,4}}|[{_HAN}] {{1,4}}[{_HAN}]|{_DOTTED}){_FIELD_STOP}"
)
# In a cell, a tag or a line of its own after the label: 姓名|张伟, 【姓名】张伟, <姓名>张伟.
_CN_BELOW = lazy(rf"[|\t=】》>—\n-][ \t\"“|*]{{0,4}}(?P<name>[{_HAN}]{{2,4}}){_FIELD_STOP}")
_TAGS = lazy(r"(?:</?[A-Za-z]{1,10}>?)+\Z")
_ETHNIC_NAME = lazy(rf"{_DOTTED}\Z")
_FIELD_END = lazy(lambda: rf"(?:{_field_labels()}|姓 {{0,4}}名){_WHICH}\Z")
# Other labels, of which the end says that a person fills the field: 提货人, 值班员, 买方. What fills it has
# to look like a name. Labels of people in books and in the news (作者, 导演) are left out: these are public.
_PERSONS_ENDS = (
    r"(?<=报名)人|(?<![诗名古伟艺词机器文猎商])(?<!创始)(?<!发明)(?<!代言)(?<!传承)(?<!第一)(?<!主持)人|"
    r"(?<![作译编学读笔记])者|(?<![演议委动官])员|师|(?<!器)(?<!感)(?<!五)官|"
    r"[甲乙丙丁买卖收寄发供需借贷租聘]方|[收寄]件方|(?<![时全身周边特专成增])长|[考学新医养]生|研究生|"
    r"博士生|硕士生|实习生|[房车户业雇货失机事船]主|[员职护]工|[选助帮舵对]手|[民交辅狱刑特武法]警|"
    r"[朋男女校战室网好队亲病]友|[股房]东|[监董理]事|儿子|妻子|孩子|子女|女儿|[长次养继]女|[长次养继]子|"
    r"祖父|祖母|父母|岳父|岳母|丈夫|保姆|新郎|新娘|伴侣|代表|会计|出纳|教练|客服|销售|财务|经办|审核|复核|"
    r"校对|制表|秘书|助理|顾问|主治|主刀|主任|负责|跟进|值班|对接|联系|客户|账户|用户|联系方"
)
_PERSONS = lazy(rf"(?:{_PERSONS_ENDS})(?:姓名|名字|名称|名)?{_WHICH}\Z")
# Looking up the last character spares most candidates the search. After 女儿 _CN_BEFORE finds the name.
_PERSONS_LAST = frozenset(end[-1] for end in _PERSONS_ENDS.split("|")) - {"儿"}
# 提货人张伟, 对接人是石磊, 值班员（夜班）欧阳静.
_CN_ROLE = lazy(lambda: rf"(?P<name>{surname()}{_of_names()}(?:{_of_names()}(?!天))?)")
_LINK_BEFORE = lazy(rf"{_WHICH}(?:分别是|分别为|包括|有|为|是|叫)?\Z")
_PERSON = lazy(lambda: rf"(?:{surname()}(?P<given>[{_HAN}]{{1,2}})|{_any_surname()}(?P<two>[{_HAN}]{{2}}))\Z")
_EMPTY = lazy(
    r".*(?:[无未请待见暂空必选填某同详略缺]|公司|单位|部门|本人|客户|用户|匿名|保密|先生们|全体|各位|如下|"
    r"以上|以下|上述|不详|不明|自己|其他|人员|管理员|[部局司处科组院校队会厂店行室站所网]\Z)"
)
_ETHNIC = lazy(
    lambda: (
        rf"(?P<lead>我叫|我是|名叫|叫|{_field_labels()}|同事|朋友|客户|老师|同学)[是为：: ]{{0,3}}"
        rf"(?P<name>[{_HAN}]{{1,8}}(?:[·•・][{_HAN}]{{1,8}}){{1,3}}?)(?=[^{_HAN}·•・]|\Z|[的是在和与及说了来])"
    )
)
_CN_SAID = lazy(
    lambda: (
        rf"(?:据|记者|通讯员|编辑|摄影)(?P<name>{_any_surname()}[{_HAN}]{{1,2}})(?=介绍|表示|透露|回忆|"
        rf"反映|陈述|交代|讲述|称|说|[ 　）)/，]|\Z)"
    )
)
_CN_OWNER = lazy(lambda: rf"(?P<name>{_any_surname()}[{_HAN}]{{1,2}}?)的(?:{'|'.join(CHINESE.belongings)})")
_CN_CALLED = lazy(
    lambda: rf"(?:(?<=免贵)|(?<![百贵同何老异]))姓(?P<name>{_any_surname()})(?=[，,。；;！!、\s]|的|\Z)"
)
_CN_POLITE = lazy(lambda: rf"(?P<name>{_any_surname()}[{_HAN}]{{0,2}}?)(?:先生|女士|小姐|太太)")
_CN_PET = lazy(rf"叫(?P<name>[小阿][{_HAN}])(?=[，。,.！!？?；\s]|\Z|的)")
# Of two characters: only between words that come before and after people.
_CN_SHORT = lazy(
    lambda: (
        rf"(?<=[和与跟给让请找被对向问叫把替约见帮由于告])(?P<name>{surname()}[{CHINESE.given_sure}])"
        rf"(?=[的说是在和与及跟把被给去来已将要会想也都就刚一负批借][{_HAN}]|明天|今天|昨天)"
    )
)
_CN_FRAMED = lazy(
    lambda: (
        rf"(?:(?<=由)(?P<a>{surname()}[{_HAN}]{{1,2}}?)(?=负责|主持|担任|承办|接待|陪同|代理|签字|保管|"
        rf"执行|签收|陈述)|(?:转告|转交给?|通知|告诉|邀请|拜访|致电|感谢|"
        rf"抄送)(?P<b>{surname()}[{_HAN}]{{1,2}}?)(?=明天|今天|后天|下周|一声|[，。,；！\s]|\Z)|"
        rf"(?<=[和与跟])(?P<c>{surname()}[{_HAN}]{{1,2}}?)(?=一起|一块|一同|聊天|谈话|见面|商量|吵架|约好|"
        rf"结婚|离婚|合作))"
    )
)
# A name on a line of its own, after the end of a letter or before its date.
_CN_SIGNED = lazy(
    lambda: (
        rf"(?:(?:敬礼|此致|祝好|商祺|顺颂|谨启|敬上|谨上|致谢|谢谢|感谢|顺祝[{_HAN}]{{2,4}}|"
        rf"祝[{_HAN}]{{2,6}}|敬禮|"
        rf"落款)[！!。：:，,]?[ \t]*\n\s*)(?P<name>{_any_surname()}[{_HAN}]{{1,2}})[ \t]*(?=\n|\Z|"
        rf"[ 　]*[0-9]{{4}})"
    )
)
_CN_DATED = lazy(
    lambda: (
        rf"^[ \t　]*(?P<name>{_any_surname()}[{_HAN}]{{1,2}})[ \t　]*(?=\n[ \t　]*[0-9]{{4}} ?[年.-]|"
        rf"(?:敬上|谨上|谨启|上)[ \t]*$)"
    ),
    re.M,
)
_CN_LATIN = lazy(
    lambda: (
        rf"(?:我叫|名叫|叫做|英文名字?|姓名拼音|拼音|我是|叫|{_field_labels()})"
        rf"{_WHICH}[是为：: ]{{0,3}}(?=[A-Z])"
    )
)
_CN_PARCEL = lazy(
    lambda: rf"(?P<name>{_any_surname()}[{_HAN}]{{1,2}})(?:亲启|台启|敬启|收)(?=[\s，。,.）)]|\Z)"
)
_LATIN_CAPITALS = lazy(r"[A-Z]{2,15}[ ,/]{1,2}[A-Z]{2,20}(?: [A-Z]{2,20})?(?![A-Za-z])")
# The next name of a list.
_CN_NEXT = lazy(
    lambda: (
        rf"{_WHICH}[、，,和与及/ ]{{1,2}}(?P<name>{_any_surname()}[{_HAN}]{{1,2}})"
        rf"(?=[、，,。；;和与及/\s（(）)]|\Z|等)"
    )
)
# A surname and two characters of given names, one of which is hardly used elsewhere: where no other word
# continues around them, it is a person even if nothing announces it.
_CN_TYPICAL = lazy(
    lambda: (
        rf"(?P<name>{surname()}(?:[{CHINESE.given}][{CHINESE.given_sure}]|"
        rf"[{CHINESE.given_sure}][{CHINESE.given}]))"
    )
)
_CN_TWO = lazy(lambda: rf"(?P<name>{surname()}[{CHINESE.given_sure}])(?![{CHINESE.given}])")
_CN_BOTH = lazy(lambda: rf"{surname()}[{CHINESE.given_sure}]{{2}}")
_GOES_ON = frozenset(
    "的说是在和与及跟把被给去来已将要会想也都就刚请打问找叫让为对从向等、曾因于先女老同医教经主律负批一借收付汇还签支提带送接不没昨今明"
)
_AHEAD = frozenset("和与及跟给让请找由被对向问是为叫把替约见、据说到帮从和同经与，")
_BEFORE = {_CN_BESIDE: _BESIDE_BEFORE, _CN_JSON: _JSON_BEFORE}


def _no_longer_word(text: str, start: int, end: int) -> bool:
    """Whether the characters next to a range do not make it a part of a longer word."""
    before, follow = text[max(0, start - 1) : start], text[end : end + 1]
    return (before in _AHEAD or not "\u4e00" <= before <= "\u9fff") and (
        follow in _GOES_ON or not "\u4e00" <= follow <= "\u9fff"
    )


# Surnames that more often say when something was done.
_ADVERBS = frozenset("曾常")
_CN_GIVEN = lazy(lambda: f"{_of_names()}{{2}}")


def given_length(text: str, at: int, longest: int) -> int:
    """How many characters from ``at`` can be a given name: none to two."""
    n = 0
    while n < min(2, longest) and text[at + n : at + n + 1]:
        char = text[at + n]
        # 冯志刚, 魏来: at the end of a clause these end a name.
        last = char in _GIVEN_AT_END and not "\u4e00" <= text[at + n + 1 : at + n + 2] <= "\u9fff"
        if char in CHINESE.not_given and not last:
            break
        n += 1
    return n


_GIVEN_AT_END = frozenset("刚来信月可为有正如若先得博")


def is_word(text: str, at: int) -> bool:
    """Whether an ordinary word begins at an offset and not a name."""
    return _WORDS_CN.match(text, at) is not None


def _by_role(text: str, budget: Budget) -> Iterator[Finding]:
    for found in budget.each(_CN_BEFORE.finditer(text)):
        start = found.end()
        given = start + len(found["surname"])
        n = given_length(text, given, len(found["given"]))
        if not n or _WORDS_CN.match(text, start):
            continue
        word = text[found.start() : found.start("link")]
        follow = text[given + n : given + n + 1]
        signed = any(c in found["link"] for c in "：:是为係為叫")
        if found["surname"] in _ADVERBS and not signed and not _CN_GIVEN.fullmatch(text, given, given + n):
            continue  # 导师曾批评
        if (
            word in CHINESE.weak_roles
            and not signed
            and "\u4e00" <= follow <= "\u9fff"
            and follow not in CHINESE.not_given
        ):
            typical = _CN_TYPICAL.match(text, start) or _CN_TWO.match(text, start)
            if typical:
                yield Finding(start, typical.end(), "NAME", 0.7)
            continue
        yield Finding(start, given + n, "NAME", 0.8)
    for pattern in (_CN_TITLE, _CN_FIELD, _CN_BESIDE, _CN_LISTED, _CN_JSON):
        for found in budget.each(pattern.finditer(text)):
            before = _BEFORE.get(pattern)
            if before and not before.search(text[max(0, found.start() - 24) : found.start()]):
                continue
            name = found["name"]
            inner = name[1:-1] if pattern is not _CN_TITLE and name[-1] in _GIVEN_AT_END else name[1:]
            if not any(c in CHINESE.not_given for c in inner) and not _WORDS_CN.match(name):
                yield Finding(found.start("name"), found.end("name"), "NAME", 0.8)
    for found in budget.each(_CN_ADDRESSED.finditer(text)):
        left = text[max(0, found.start() - 1) : found.start()]
        if "\u4e00" <= left <= "\u9fff" and left not in _BEFORE_ADDRESSED:
            continue
        yield Finding(found.start("name"), found.end("name"), "NAME", 0.7)
    if "姓" in text:
        for found in budget.each(_CN_MY.finditer(text)):
            yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)
            if found["full"] and found["full"].startswith(found["name"]):
                yield Finding(found.start("full"), found.end("full"), "NAME", 0.7)
    done = 0
    for suffix in budget.each(_CN_ORG_END.finditer(text)):
        low = max(done, suffix.start() - 24)
        done = suffix.end()
        ahead = _CN_ORG_NAME.search(text[low : suffix.start()])
        if not ahead:
            continue
        begin = low + ahead.start()
        lead = _ORG_LEAD.match(text[begin : suffix.end() - 4])
        start = begin + (lead.end() if lead else 0)
        if suffix.end() - start >= 4:
            yield Finding(start, suffix.end(), "ORG", 0.7)


def _fills_field(text: str, found: re.Match[str]) -> bool:
    name, ahead = found["name"], _before(text, found.start())
    return not _EMPTY.match(name) and (
        _FIELD_END.search(ahead) is not None
        or (_looks_like_a_name(name) and _PERSONS.search(ahead) is not None)
    )


def _fills_cell(text: str, found: re.Match[str]) -> bool:
    ahead = _before(text, found.start())
    return fills(found["name"]) and (is_label(_TAGS.sub("", ahead)) or _JSON_BEFORE.search(ahead) is not None)


def _has_a_role(text: str, found: re.Match[str]) -> bool:
    """Whether a label comes right before a name, or a label and a word that joins them."""
    start, end = found.span("name")
    if end - start == 2 and text[start] in _ADVERBS and _han(text, end) and text[end] not in _GOES_ON:
        return False  # 主任曾强调
    label = _LINK_BEFORE.sub("", text[max(0, start - 20) : start], count=1)
    return (
        label[-1:] in _PERSONS_LAST
        and _PERSONS.search(label) is not None
        and not is_word(text, start)
        and found["name"] not in CHINESE.words_of_two
    )


def _is_addressed(text: str, found: re.Match[str]) -> bool:
    start = found.start("name")
    free = not _han(text, start - 1) or text[start - 1 : start] in _BEFORE_ADDRESSED
    return free and _has_no_other_word(text, start, found["name"][1:])


def _is_apart(text: str, found: re.Match[str]) -> bool:
    """Whether no longer word continues around a name, or both characters are those of given names."""
    start, end = found.span("name")
    return _has_no_other_word(text, start, found["name"][1:]) and (
        _no_longer_word(text, start, end)
        or (_CN_BOTH.fullmatch(found["name"]) is not None and _after_somebody(text, start))
    )


def _is_apart_or_first(text: str, found: re.Match[str]) -> bool:
    """The same, or no Chinese character comes before the name."""
    start = found.start("name")
    first = not _han(text, start - 1) and _has_no_other_word(text, start, found["name"][1:])
    return first or _is_apart(text, found)


def _is_no_word(text: str, found: re.Match[str]) -> bool:
    return _has_no_other_word(text, found.start("name"), found["name"][1:-1])


def _has_no_other_word(text: str, start: int, inner: str) -> bool:
    """Whether no ordinary word begins at an offset, and no character that names do not have is in them."""
    return not is_word(text, start) and not any(c in CHINESE.not_given for c in inner)


class _Form(NamedTuple):
    """How a name can be recognised that needs no role before it."""

    pattern: re.Pattern[str]
    score: float
    signs: str  # of these, separated by |, the text needs one: that spares most texts most patterns
    accept: Callable[[str, re.Match[str]], bool] | None  # further conditions


_FORMS = (
    _Form(_CN_FILLED, 0.8, ":|：", _fills_field),
    _Form(_CN_BELOW, 0.7, "", _fills_cell),
    _Form(_CN_ROLE, 0.7, "", _has_a_role),
    _Form(_ETHNIC, 0.8, "·|•|・", None),
    _Form(_CN_SAID, 0.7, "据|记者|通讯员|编辑|摄影", _is_no_word),
    _Form(_CN_OWNER, 0.6, "的", _is_apart_or_first),
    _Form(_CN_CALLED, 0.6, "姓", _is_no_word),
    _Form(_CN_POLITE, 0.7, "先生|女士|小姐|太太", _is_addressed),
    _Form(_CN_PET, 0.6, "叫小|叫阿", _is_no_word),
    _Form(_CN_PARCEL, 0.6, "收|启", _is_apart_or_first),
    _Form(_CN_SHORT, 0.6, "", _is_no_word),
    _Form(_CN_SIGNED, 0.8, "\n", _is_no_word),
    _Form(_CN_DATED, 0.7, "\n|上|启", _is_no_word),
    _Form(_CN_TYPICAL, 0.6, "", _is_apart),
)


def _by_form(text: str, budget: Budget) -> Iterator[Finding]:
    """Names that need no role before them."""
    listed = 0  # the end of the last list
    for form in _FORMS:
        if not any(sign in text for sign in form.signs.split("|")):
            continue
        for found in budget.each(form.pattern.finditer(text)):
            if form.accept is None or form.accept(text, found):
                start, end = found.span("name")
                yield Finding(start, end, "NAME", form.score)
                if end > listed:
                    for one in _listed(text, end):
                        listed = one.end
                        yield one
    for found in budget.each(_CN_FRAMED.finditer(text)):
        group = found.lastgroup or "a"
        name = found[group]
        if not is_word(name, 0) and not any(c in CHINESE.not_given for c in name[1:]):
            yield Finding(*found.span(group), "NAME", 0.6)
    for label in budget.each(_CN_LATIN.finditer(text)):
        run = CANDIDATE.match(text, label.end())
        span = trimmed(run[0], label.end()) if run else None
        capitals = _LATIN_CAPITALS.match(text, label.end())
        if capitals:
            yield Finding(capitals.start(), capitals.end(), "NAME", 0.7)
        elif span and span[0] == label.end() and not text[span[0] : span[1]].isupper():
            yield Finding(*span, "NAME", 0.7)


def _before(text: str, at: int) -> str:
    """The end of the text before a sign, where a label may be."""
    return text[max(0, at - 24) : at].rstrip(" \t\"'”*`")


def _looks_like_a_name(value: str) -> bool:
    found = _PERSON.match(value)
    if not found or is_word(value, 0) or value in CHINESE.words_of_two:
        return False
    given = found["given"] or found["two"]
    return given_length(value, len(value) - len(given), 2) == len(given)


def is_label(text: str) -> bool:
    """Whether the label of a field, or the head of a column, ends in one of people."""
    return _FIELD_END.search(text) is not None or _PERSONS.search(text) is not None


def is_typical(value: str) -> bool:
    """Whether a text is a surname and one or two characters of given names, one of which is hardly used
    elsewhere.
    """
    found = _CN_TYPICAL.fullmatch(value) or _CN_TWO.fullmatch(value)
    return found is not None and not is_word(value, 0)


def fills(value: str) -> bool:
    """Whether the value of a field, or of a cell below such a head, is a name."""
    return not _EMPTY.match(value) and (_ETHNIC_NAME.match(value) is not None or _looks_like_a_name(value))


def _after_somebody(text: str, start: int) -> bool:
    return text[max(0, start - 1) : start] in _AHEAD or not _han(text, start - 1)


def _han(text: str, at: int) -> bool:
    return at >= 0 and "\u4e00" <= text[at : at + 1] <= "\u9fff"


def _listed(text: str, at: int) -> Iterator[Finding]:
    """The other names of a list, after its first."""
    for _ in range(50):
        found = _CN_NEXT.match(text, at)
        if not found or is_word(text, found.start("name")):
            return
        at = found.end("name")
        yield Finding(found.start("name"), at, "NAME", 0.7)


def scan(text: str) -> Iterator[Finding]:
    """People and companies in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _by_role(text, budget)
    yield from _by_form(text, budget)
    yield from budget.rest("NAME")

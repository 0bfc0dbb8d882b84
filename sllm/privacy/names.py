"""Names of people and organisations: by the words around them, or by asking a language model.

:class:`NameDetector` needs no model and takes only what strong context gives away. :class:`ModelDetector`
lets a scorer judge candidates one by one: the labels' probabilities are compared, no text of the model is
parsed.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from sllm.privacy import words
from sllm.privacy.findings import Finding, LabelScorer
from sllm.privacy.normal import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ModelDetector", "NameDetector"]

_SURNAME = f"(?:{words.DOUBLE_SURNAMES}|[{words.SURNAMES}])"
_HAN = "\u4e00-\u9fff"
_GIVEN = f"[{_HAN}]"
_WORDS_CN = re.compile(words.NOT_NAMES_CN)
_CN_BEFORE = re.compile(
    r"(?:我叫|我是|名叫|叫做|名字是|名字叫|名字|姓名|本人|联系人|收件人|收货人|寄件人|发件人|患者|"
    r"病人|客户|申请人|法定代表人|法人代表|法人|负责人|经办人|"
    r"持卡人|开户名|户名|投保人|被保险人|受益人|学生|同事|朋友|员工|嫌疑人|当事人|原告|被告|父亲|"
    r"母亲|爸爸|妈妈|妻子|丈夫|老公|老婆|儿子|女儿|"
    r"哥哥|弟弟|姐姐|妹妹|签名|署名|签字|经理|主任|医生|老师|教授|律师|紧急联系人|监护人|家长|"
    r"业主|租客|房东|乘客|旅客|客人|候选人|应聘者|借款人|"
    r"担保人|委托人|代理人|证人|死者|伤者|司机|车主|户主|投诉人|举报人|推荐人|真名|全名|中文名|"
    r"曾用名|他叫|她叫|叫|致|尊敬的|收款人|付款人|汇款人|开户人|联络人|医师|护士长|护士|亲属|家属|表哥|表弟|表姐|表妹|堂哥|堂弟|"
    r"堂姐|堂妹|叔叔|舅舅|姑姑|爷爷|奶奶|外公|外婆|邻居|室友|男朋友|女朋友|男友|女友|老板|秘书|助理|领导|班主任|校长|签收人|"
    r"参会人|审核者|检验人|记录者|应聘人|被告人|原告人|团购|保证人|监护者|投保者|受访者|访客|来访人|报告人|检验者|审核人|审批人|制单人|配偶|出租方|承租方|甲方|乙方|被害人|报案人|报警人|被询问人|询问人|记录人|见证人|"
    r"联络窗口|聯絡人|聯繫人|聯系人|負責人|經辦人|監護人|簽名|簽收人|收貨人|寄件者|收件者|醫師|醫生|老師|經理|護理師|客戶|戶名|病患|"
    r"我係|找|@)"
    # Roles are often followed by what kind they are: 甲方（出租方）：
    r"(?:[（(][^()（）\n]{1,8}[)）])?"
    r"(?P<link>[\"'”：:是为係為叫“\"（( ]{0,4})(?=(?P<surname>" + _SURNAME + rf")(?P<given>{_GIVEN}{{1,3}}))"
)
# All sorts of things follow these; a name is taken behind them only where a sign or an end comes after it.
_CN_WEAK = frozenset(words.CN_WEAK.split())
_CN_TITLE = re.compile(
    rf"(?P<name>{_SURNAME}{_GIVEN}{{1,2}}?)(?:先生|女士|小姐|太太|老师|医生|教授|经理|主任|律师|"
    rf"同学|师傅|护士|局长|院长|警官|博士|老師|醫生|醫師|經理|同學|師傅|"
    rf"同志|夫人|阿姨|总监|校长|大夫|法官|检察官|会计|教练|部长|处长|科长|董事长|总经理|妈妈|爸爸|家长)"
)
# A surname alone with a form of address is a person too, unless it is the end of a word: 语文老师, 基金经理.
_CN_ADDRESSED = re.compile(
    r"(?P<name>(?:[王李张刘陈杨黄赵吴周徐孙马朱胡郭何林罗郑梁谢宋唐许韩冯邓曹彭曾肖董袁潘蒋蔡余杜叶程苏魏吕丁沈姚卢姜崔钟谭陆汪范石"
    r"廖贾夏韦付邹孟熊秦邱尹薛闫雷侯龙陶黎贺顾龚邵钱严覃武戴莫孔汤康赖施洪辛柯庄葛樊聂梅盛霍翁邢殷俞倪"
    rf"張劉陳楊黃趙吳孫馬羅鄭謝許韓馮鄧葉蘇呂盧鍾譚陸]|{words.DOUBLE_SURNAMES})(?:先生|女士|小姐|太太|老师|医生|教授|律师|师傅|"
    r"警官|阿姨|大夫|老師|醫生|總|总(?![{_HAN}])))".replace("{_HAN}", _HAN)
)
_ADDRESSED_BEHIND = frozenset("找系给请问与和是跟叫让由被栋室户号元楼层为的致")
# A name beside a number of its owner: in a column, on a label of a parcel, behind an account.
_CN_BESIDE = re.compile(
    rf"[ ,，|/、:\t](?P<name>{_SURNAME}{_GIVEN}{{1,2}})(?=\s*(?:$|[，,。；;|\t\n]| [0-9]))", re.M
)
_BESIDE_BEFORE = re.compile(r"[0-9]{5}[0-9X]\Z")
_CN_LISTED = re.compile(
    rf"^[ \t]*(?:[0-9]{{1,3}}[.、,，) \t|]{{1,2}} ?)(?P<name>{_SURNAME}{_GIVEN}{{1,2}})(?=[ ,，\t|"
    rf"][^\n]{{0,40}}?"
    r"(?:1[3-9][0-9][ -]?[0-9]{4}|[0-9]{17}))",
    re.M,
)
_CN_JSON = re.compile(rf"[:=] ?[\"']?(?P<name>{_SURNAME}{_GIVEN}{{1,2}})(?=[\"',;&}}\s]|\Z)")
_JSON_BEFORE = re.compile(
    r"(?:name|xm|user|contact|customer|patient|receiver|sender|owner|holder)[\"']?[ ]?\Z", re.I
)
_CN_MY = re.compile(
    rf"(?:我|本人|她|他)姓(?P<name>{_SURNAME})(?![名{_HAN}])(?:[，, ]{{0,2}}(?:名|"
    rf"叫)?(?P<full>{_SURNAME}{_GIVEN}{{1,2}}))?"
)
_CN_FIELD = re.compile(
    rf"(?:^|(?<=[，。；、：:,;\s|（(\"“]))(?P<name>{_SURNAME}{_GIVEN}{{1,2}})(?=[，,、（(\s|"
    rf"]{{1,3}}(?:性别)?(?:[男女](?![{_HAN}])|[0-9]{{2}}岁|"
    rf"身份证|手机|电话|联系电话|出生|生于|1[3-9][0-9]{{9}}|[0-9]{{17}}|住址|汉族|"
    rf"(?:\+?86[ -]?)?1[3-9][0-9][ -]?[0-9]{{4}}|联系方式|聯絡|電話|手機|微信|邮箱|"
    rf"[A-Za-z0-9._+-]{{1,40}}@|9[0-9]{{3}} [0-9]{{4}}))",
    re.M,
)
_CN_ORG_END = re.compile(
    r"有限责任公司|股份有限公司|有限公司|集团公司|分公司|律师事务所|会计师事务所|研究院|研究所|事务所"
)
_CN_ORG_NAME = re.compile(rf"[{_HAN}A-Za-z0-9（）()]{{2,24}}\Z")
# Candidates of one pattern in one text that are judged. What comes behind them counts as found: a text so
# full
# of names costs bounded time and leaks nothing.
_MAX_JUDGED = 30_000
_ORG_LEAD = re.compile(
    (
        r".*(?:就职于|任职于|供职于|工作于|单位是|单位[:：为]|公司[:：是为]|我在|他在|她在|加入|来自|"
        r"毕业于|就读于|入职|是|在|于|从|向|与|和|给|为|由|对|被|到|的|了)"
    ),
    re.S,
)

_W = r"[A-ZÀ-ÖØ-Þ][A-Za-zÀ-ÿ'’-]{1,24}"
_NAME = (
    rf"{_W}(?: (?:[A-Z]\.?(?!['’])|(?:van|von|de|der|den|da|di|del|la|le|bin|ibn|al|el|dos|"
    rf"ten)(?: (?:der|den|"
    rf"la))?(?= [A-Z])|{_W})){{0,3}}"
)
_TITLES_TEXT = "Mr Mrs Ms Mx Miss Dr Prof Sir Madam Mister Professor Doctor Rev Capt Sgt Lt Dear"
_TITLES = frozenset(_TITLES_TEXT.split())
_RUN_EN = re.compile(rf"(?<![A-Za-zÀ-ÿ]){_NAME}(?![A-Za-zÀ-ÿ])")
_TITLE_BEFORE = tuple(
    f"{title}. " for title in ("Mr", "Mrs", "Ms", "Mx", "Dr", "Prof", "Rev", "Capt", "Sgt", "Lt")
)
_AM_BEFORE = ("I am ", "I'm ", "I’m ")
# In front of a colon or equals sign, of a comma, and of nothing.
_LABELS_EN = (
    "name", "surname", "patient", "contact person", "contact", "attn", "attention", "recipient", "cardholder",
    "signed by",
    "signed", "applicant", "employee", "customer", "guardian", "spouse", "beneficiary", "sender",
    "account holder", "tenant", "landlord", "buyer", "seller", "attending", "physician", "passenger",
    "witness", "plaintiff", "defendant",
    "insured", "payee", "payer", "borrower", "lender", "subscriber", "emergency contact", "firstname",
    "lastname", "fullname", "next of kin", "referring physician", "doctor", "nurse", "caller",
)  # fmt: skip
_CLOSINGS_EN = (
    "sincerely",
    "regards",
    "yours truly",
    "best wishes",
    "cheers",
    "thanks",
    "love",
    "faithfully",
)
_VERBS_EN = (
    "name is", "name's", "i am called", "is called", "named", "names are", "last name", "first name",
    "full name",
    "given name", "family name", "ask for", "asked for", "speak to", "speak with", "spoke to", "spoke with",
    "speaking with", "talked to", "dictated by", "seen by", "referred by", "signed by", "my wife",
    "my husband",
    "my son", "my daughter", "my mother", "my father", "my brother", "my sister", "my boss", "my colleague",
    "my friend", "his wife", "her husband", "my boyfriend", "my girlfriend", "my partner", "my neighbor",
    "my neighbour", "my roommate", "my landlord", "my doctor", "my manager", "my mom", "my dad", "my uncle",
    "my aunt", "my cousin", "the patient", "care of", "c/o", "attn", "the suspect", "reservation under",
)  # fmt: skip


def _announced(before: str) -> bool:
    """Whether the text right before a capitalised word says that a name comes."""
    head = before.rstrip(" \"'*\n\t")
    endings: tuple[str, ...]
    sign = head[-1:]
    if sign == ">":
        endings = ()
    elif sign in (":", "="):
        endings, head = _LABELS_EN, head[:-1].rstrip(" \"'*")
    elif sign == ",":
        endings, head = _CLOSINGS_EN, head[:-1]
    else:
        endings = _VERBS_EN
    written = head
    head = head.lower()
    if sign == ">":
        # <name>, <lastName>
        tag = _TAG.search(written)
        return tag is not None
    if not head.endswith(endings):
        return False
    word = max((word for word in endings if head.endswith(word)), key=len)
    if len(head) <= len(word):
        return True
    follow = head[-len(word) - 1]
    # firstName: a capital begins a word as a space does.
    return not (follow.isascii() and follow.isalpha()) or (
        sign in (":", "=") and written[-len(word)].isupper()
    )


_TAG = re.compile(r"<(?:[a-z]{0,20}_?[Nn]ame|patient|contact|author|customer|sender|recipient|owner)>\Z")
# <ann@example.org> behind a name, and the columns of a table.
_MAILBOX = re.compile(
    r"[\"']?(?: ?<[^\s<>@]{1,64}@|[,|;\t] ?\"?(?:[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]|\+[0-9]|"
    r"\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}))"
    r"| \([A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]"
)
_SECOND = re.compile(r", (?P<word>[A-Z][A-Za-z'’-]{1,24}(?: [A-Z]\.?(?![A-Za-z]))?)(?![A-Za-z])")
# HOLLIS, MARGARET on a line of its own, or in front of the next field.
_CAPITALS_EN = re.compile(
    r"^[ \t]*(?P<name>[A-Z][A-Z'-]{1,24}, ?[A-Z][A-Z'-]{1,24}(?: [A-Z]\.?)?)(?=[ \t|"
    r";(]*\n?[ \t]*(?:DOB|MRN|SSN|ID|Sex|Gender|Age|Date of [Bb]irth)(?![A-Za-z]))",
    re.M,
)

# One of these and a capitalised word behind it are a person.
_GIVEN_EN = frozenset(words.GIVEN_EN.split())
_NOT_NAMES = frozenset(words.NOT_NAMES.split())
_EN_ORG = re.compile(
    rf"(?<![A-Za-z])(?:{_W}|[A-Z]{{2,8}})(?:,? (?:(?:and|&|of) )?(?:{_W}|[A-Z]{{2,8}})){{0,4}}?,? "
    r"(?:Inc|LLC|Ltd|Limited|Corp|Corporation|PLC|Plc|GmbH|LLP|Co|AG|BV|SA|Pty Ltd)(?:\.|(?![A-Za-z]))"
)
_EN_ORG_END = re.compile(
    r" (?:Inc|LLC|Ltd|Limited|Corp|Corporation|PLC|Plc|GmbH|LLP|Co|AG|BV|SA)(?![A-Za-z])"
)


def _trim_name(name: str, start: int) -> tuple[int, int] | None:
    """The part of a run of capitalised words that can be a name."""
    parts = name.split(" ")
    while parts and parts[0].rstrip(".,") in _NOT_NAMES:
        start += len(parts[0]) + 1
        parts.pop(0)
    for i, word in enumerate(parts):
        if word in _NOT_NAMES or word.endswith(("'s", "’s")):
            if word.endswith(("'s", "’s")) and word not in _NOT_NAMES:
                parts = [*parts[:i], word[:-2]]
            else:
                parts = parts[:i]
            break
    text = " ".join(parts).rstrip("'’-")
    return (start, start + len(text)) if len(text) >= 2 else None


def _english(text: str, run: str, start: int) -> Iterator[Finding]:
    """Names in a run of capitalised words."""
    parts = run.split(" ")
    score = 0.0
    while parts and parts[0] in _TITLES:
        start += len(parts[0]) + 1
        parts.pop(0)
        score = 0.9
    if not parts:
        return
    rest = " ".join(parts)
    if len(parts) >= 3 and parts[0] in ("I'm", "I’m", "It's", "It’s"):
        start += len(parts[0]) + 1
        parts.pop(0)
        rest = " ".join(parts)
        score = 0.7 if parts[-1] not in _NOT_NAMES else 0.0
    if not score:
        before = text[max(0, start - 40) : start]
        tail = before[-1:]
        if tail == " " or tail in ":=,\"'*\n\t>":
            if before.endswith(_TITLE_BEFORE):
                score = 0.9
            elif _announced(before):
                score = 0.8
            elif (len(parts) >= 2 and before.endswith(_AM_BEFORE)) or (
                before.endswith(("this is ", "This is ")) and text.startswith(_CALLING, start + len(rest))
            ):
                score = 0.7
            elif (
                2 <= len(parts) <= 4
                and parts[-1] not in _NOT_NAMES
                and (
                    _MAILBOX.match(text, start + len(rest))
                    or (before.endswith(" ") and _mentioned(text, before, start + len(rest)))
                )
            ):
                score = 0.6
        if not score and 2 <= len(parts) <= 4 and _MAILBOX.match(text, start + len(rest)):
            score = 0.6
    if parts[0] in ("Hi", "Hello", "Hey") and 2 <= len(parts) <= 3:
        follow = text[start + len(rest) : start + len(rest) + 1]
        if follow in (",", "!") and follow:
            start += len(parts[0]) + 1
            rest = " ".join(parts[1:])
            score = 0.6 if follow == "," else 0.0
    if score:
        span = _trim_name(rest, start)
        if span and not (text[span[0] : span[1]].isupper() and " " not in text[span[0] : span[1]]):
            second = (
                _SECOND.match(text, span[1]) if score == 0.8 and " " not in text[span[0] : span[1]] else None
            )
            if second and second["word"].split(" ")[0] not in _NOT_NAMES:
                span = span[0], second.end()
            yield Finding(*span, "NAME", score)
            return
    for i, word in enumerate(parts[:-1]):
        if word in _GIVEN_EN:
            span = _trim_name(" ".join(parts[i:]), start)
            if span and " " in text[span[0] : span[1]]:
                yield Finding(*span, "NAME", 0.7)
                return
        start += len(word) + 1


_CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")


def _mentioned(text: str, before: str, end: int) -> bool:
    """Whether two capitalised words or more are spoken of as somebody is: contact ... at, call ... on."""
    head = before[:-1].lower()
    if not head.endswith(("contact", "call", "email", "reach", "met", "meet", "notify", "ask")):
        return False
    return text.startswith((" at ", " on ", " via ", " by ", " (", " for ", " directly"), end)


def _given_length(text: str, at: int, longest: int) -> int:
    """How many characters from ``at`` are a given name: one or two, up to what cannot be in one."""
    n = 0
    while n < min(2, longest) and text[at + n : at + n + 1]:
        char = text[at + n]
        # 冯志刚, 魏来: at the end of a clause these are the end of a name.
        last = char in _GIVEN_AT_END and not "\u4e00" <= text[at + n + 1 : at + n + 2] <= "\u9fff"
        if char in words.NOT_GIVEN and not last:
            break
        n += 1
    return n


_GIVEN_AT_END = frozenset("刚来信月可为有正如若先得博")


class NameDetector:
    """People and companies that the words around them give away: 我叫, 姓名, 联系人, my name is, Mr, Dear,
    Inc., 有限公司; in English also a common given name with a capitalised word behind it.

    A name that nothing announces needs a :class:`ModelDetector`.
    """

    def detect(self, text: str) -> list[Finding]:
        """Findings of kinds NAME and ORG."""
        view = plain(text)
        found = []
        for one in self._scan(view.text):
            start, end = view.span(one.start, one.end)
            found.append(Finding(start, end, one.kind, one.score))
        return found

    def _scan(self, text: str) -> Iterator[Finding]:
        for run in _RUN_EN.finditer(text):
            yield from _english(text, run[0], run.start())
        for found in _CAPITALS_EN.finditer(text):
            yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)
        for end in _EN_ORG_END.finditer(text):
            # The words in front of the form of the company: a few, so each stretch is looked at once.
            at = max(0, end.start() - 60)
            for found in _EN_ORG.finditer(text, at, end.end() + 1):
                if found.end() >= end.end():
                    yield Finding(found.start(), found.end(), "ORG", 0.7)
        if text.isascii():
            return
        for judged, found in enumerate(_CN_BEFORE.finditer(text)):
            if judged >= _MAX_JUDGED:
                yield Finding(found.start(), len(text), "NAME", 0.5)
                break
            start = found.end()
            given = start + len(found["surname"])
            n = _given_length(text, given, len(found["given"]))
            if not n or _WORDS_CN.match(text, start):
                continue
            word = text[found.start() : found.start("link")]
            follow = text[given + n : given + n + 1]
            signed = any(c in found["link"] for c in "：:是为係為叫")
            if (
                word in _CN_WEAK
                and not signed
                and "\u4e00" <= follow <= "\u9fff"
                and follow not in words.NOT_GIVEN
            ):
                continue
            yield Finding(start, given + n, "NAME", 0.8)
        for pattern in (_CN_TITLE, _CN_FIELD, _CN_BESIDE, _CN_LISTED, _CN_JSON):
            for judged, found in enumerate(pattern.finditer(text)):
                if judged >= _MAX_JUDGED:
                    yield Finding(found.start(), len(text), "NAME", 0.5)
                    break
                before = _BEFORE.get(pattern)
                if before and not before.search(text[max(0, found.start() - 24) : found.start()]):
                    continue
                name = found["name"]
                inner = name[1:-1] if pattern is not _CN_TITLE and name[-1] in _GIVEN_AT_END else name[1:]
                if not any(c in words.NOT_GIVEN for c in inner) and not _WORDS_CN.match(name):
                    yield Finding(found.start("name"), found.end("name"), "NAME", 0.8)
        for found in _CN_ADDRESSED.finditer(text):
            left = text[max(0, found.start() - 1) : found.start()]
            if "\u4e00" <= left <= "\u9fff" and left not in _ADDRESSED_BEHIND:
                continue
            yield Finding(found.start("name"), found.end("name"), "NAME", 0.7)
        if "姓" in text:
            for found in _CN_MY.finditer(text):
                yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)
                if found["full"] and found["full"].startswith(found["name"]):
                    yield Finding(found.start("full"), found.end("full"), "NAME", 0.7)
        done = 0
        for suffix in _CN_ORG_END.finditer(text):
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


_BEFORE = {_CN_BESIDE: _BESIDE_BEFORE, _CN_JSON: _JSON_BEFORE}
_CANDIDATE_CN = re.compile(f"(?={_SURNAME}{_GIVEN})")
_CANDIDATE_ORG = re.compile(
    rf"[{_HAN}]{{2,14}}?(?:公司|集团|大学|学院|医院|银行|中学|小学|法院|研究院|委员会|协会|事务所|工厂|酒店)"
)
_CANDIDATE_ADDRESS = re.compile(
    rf"[{_HAN}]{{2,8}}?(?:省|市|区|县|镇|乡|村|路|街|小区|花园|大厦)(?:[{_HAN}0-9]{{0,10}}?[0-9]+号)?"
)
_CANDIDATE_EN = re.compile(rf"(?<![A-Za-zÀ-ÿ]){_NAME}(?![A-Za-zÀ-ÿ])")


class ModelDetector:
    """Names, organisations and addresses as a language model judges them.

    Candidates are found by rule (a surname and one or two characters, runs of capitalised words, suffixes
    such as 公司 and University), and each is put to the model in its sentence: the log-probabilities of four
    labels are compared, after subtracting what the model gives them for an empty candidate (contextual
    calibration, Zhao et al. 2021, arXiv:2102.09690).

    Args:
        scorer: the model; see :class:`~sllm.privacy.findings.LabelScorer`.
        threshold: probability of being a name, organisation or address, among the labels, from which a
            candidate counts.
        max_candidates: of one text; those beyond it count as found without asking, so that a long text costs
            bounded time and leaks nothing.
        window: characters of context on each side that the model is shown.

    """

    _LABELS_EN = (
        " a person's name",
        " the name of an organisation",
        " a postal address",
        " an ordinary word",
    )
    _LABELS_CN = ("人名", "机构名称", "地址", "普通词语")
    _KINDS = ("NAME", "ORG", "ADDRESS")

    def __init__(
        self, scorer: LabelScorer, *, threshold: float = 0.5, max_candidates: int = 256, window: int = 60
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected a probability between 0 and 1")
        if max_candidates < 0 or window < 0:
            raise ValueError(
                f"max_candidates is {max_candidates} and window {window}, expected no negative numbers"
            )
        self._scorer = scorer
        self._threshold = threshold
        self._max = max_candidates
        self._window = window
        self._neutral: dict[bool, list[float]] = {}

    def detect(self, text: str) -> list[Finding]:
        """Findings of kinds NAME, ORG and ADDRESS.

        Raises:
            ValueError: the scorer gave another number of scores than there are labels, or NaN.
            Exception: whatever the scorer raises.

        """
        view = plain(text)
        judged: list[tuple[float, Finding]] = []
        for n, (start, end, kind) in enumerate(self._candidates(view.text)):
            if n >= self._max:
                judged.append((self._threshold, Finding(start, end, kind, self._threshold)))
                continue
            shares = self._judge(view.text, start, end)
            best = max(range(3), key=shares.__getitem__)
            score = sum(shares[:3])
            if score >= self._threshold:
                judged.append((score, Finding(start, end, self._KINDS[best], min(score, 1.0))))
        # Of readings that overlap (张伟, 张伟东) the likelier one stands.
        judged.sort(key=lambda pair: (-pair[0], pair[1].start - pair[1].end))
        taken: list[Finding] = []
        for _, one in judged:
            if all(one.end <= other.start or other.end <= one.start for other in taken):
                taken.append(one)
        spans = [(view.span(one.start, one.end), one) for one in taken]
        return sorted((Finding(*span, one.kind, one.score) for span, one in spans), key=lambda one: one.start)

    def _candidates(self, text: str) -> list[tuple[int, int, str]]:
        found: dict[tuple[int, int], str] = {}
        for match in _CANDIDATE_CN.finditer(text):
            start = match.start()
            size = 2 if re.match(words.DOUBLE_SURNAMES, text[start : start + 2]) else 1
            longest = 0 if _WORDS_CN.match(text, start) else _given_length(text, start + size, 2)
            for n in range(1, longest + 1):
                if "\u4e00" <= text[start + size + n - 1] <= "\u9fff":
                    found.setdefault((start, start + size + n), "NAME")
        for pattern, kind in ((_CANDIDATE_ORG, "ORG"), (_CANDIDATE_ADDRESS, "ADDRESS")):
            for match in pattern.finditer(text):
                found.setdefault(match.span(), kind)
        for match in _CANDIDATE_EN.finditer(text):
            span = _trim_name(match[0], match.start())
            if span:
                found.setdefault(span, "NAME")
        return sorted((start, end, kind) for (start, end), kind in found.items())

    def _prompt(self, before: str, span: str, after: str, chinese: bool) -> tuple[str, Sequence[str]]:
        if chinese:
            return f"文本：{before}「{span}」{after}\n在上面的文本中，「{span}」是", self._LABELS_CN
        return f'Text: {before}"{span}"{after}\nIn the text above, "{span}" is', self._LABELS_EN

    def _score(self, prompt: str, labels: Sequence[str]) -> list[float]:
        scores = [float(score) for score in self._scorer.label_logprobs(prompt, labels)]
        if len(scores) != len(labels):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(labels)} labels")
        if any(math.isnan(score) or score == math.inf for score in scores):
            raise ValueError("the scorer gave a score that is no log-probability")
        return scores

    def _judge(self, text: str, start: int, end: int) -> list[float]:
        """The share of each label, calibrated."""
        chinese = any("\u4e00" <= char <= "\u9fff" for char in text[start:end])
        neutral = self._neutral.get(chinese)
        if neutral is None:
            neutral = self._score(*self._prompt("", "……" if chinese else "...", "", chinese))
            self._neutral[chinese] = neutral
        before = text[max(0, start - self._window) : start].replace("\n", " ")
        after = text[end : end + self._window].replace("\n", " ")
        scores = self._score(*self._prompt(before, text[start:end], after, chinese))
        shifted = [s - n if n > -math.inf else s for s, n in zip(scores, neutral, strict=True)]
        top = max(shifted)
        if top == -math.inf:
            raise ValueError("the scorer finds every label impossible")
        weights = [math.exp(value - top) for value in shifted]
        return [weight / sum(weights) for weight in weights]

"""Chinese people and companies, told without a model: by labels, roles, forms of address and signatures, and
by characters that are hardly anything but a given name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy.bounds import Budget
from sllm.privacy.findings import Finding
from sllm.privacy.names import name_words
from sllm.privacy.names import word_lists as words

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SURNAME", "fills", "given_length", "is_label", "is_typical", "is_word", "scan"]

_HAN = "\u4e00-\u9fff"


def _surname(single: str) -> str:
    """A pattern of those of two characters or one.

    It begins with one set of characters: the engine skips to these, which it does not do in front of
    alternatives.
    """
    double = words.DOUBLE_SURNAMES.split("|")
    first = "".join(sorted({*single, *(name[0] for name in double)}))
    two = [name for name in double if len(name) == 2]
    second = "".join(sorted({name[1] for name in two}))
    ends = [f"[{second}](?<={'|'.join(two)})"]
    ends += [f"{name[1:]}(?<={name})" for name in double if len(name) > 2]
    return f"[{first}](?:{'|'.join(ends)}|(?<=[{single}]))"


SURNAME = _SURNAME = _surname(words.SURNAMES)
# With those that are ordinary words too; only where something else says that a name comes.
_ANY_SURNAME = _surname(words.SURNAMES + words.RARE_SURNAMES)
_GIVEN = f"[{_HAN}]"
# Which one of several it is, behind a role or a name: 甲方（出租方）, 张伟（组长）.
_WHICH = r"(?:[（(][^()（）\n]{1,8}[)）])?"
_WORDS_CN = re.compile(words.NOT_NAMES_CN)
_CN_BEFORE = re.compile(
    r"(?:我叫|我是|名叫|叫做|名字是|名字叫|名字|姓名|本人|联系人|收件人|收货人|寄件人|发件人|患者|病人|客户|"
    r"申请人|法定代表人|法人代表|法人|负责人|经办人|持卡人|开户名|户名|投保人|被保险人|受益人|学生|同事|朋友|"
    r"员工|嫌疑人|当事人|原告|被告|父亲|母亲|爸爸|妈妈|妻子|丈夫|老公|老婆|儿子|女儿|哥哥|弟弟|姐姐|妹妹|"
    r"签名|署名|签字|经理|主任|医生|老师|教授|律师|紧急联系人|监护人|家长|业主|租客|房东|乘客|旅客|客人|"
    r"候选人|应聘者|借款人|担保人|委托人|代理人|证人|死者|伤者|司机|车主|户主|投诉人|举报人|推荐人|真名|全名|"
    r"中文名|曾用名|他叫|她叫|叫|致|尊敬的|收款人|付款人|汇款人|开户人|联络人|医师|护士长|护士|亲属|家属|"
    r"表哥|表弟|表姐|表妹|堂哥|堂弟|堂姐|堂妹|叔叔|舅舅|姑姑|爷爷|奶奶|外公|外婆|邻居|室友|男朋友|女朋友|"
    r"男友|女友|老板|秘书|助理|领导|班主任|校长|签收人|参会人|审核者|检验人|记录者|应聘人|被告人|原告人|团购|"
    r"保证人|监护者|投保者|受访者|访客|来访人|报告人|检验者|审核人|审批人|制单人|配偶|出租方|承租方|甲方|"
    r"乙方|被害人|报案人|报警人|被询问人|询问人|记录人|见证人|联络窗口|聯絡人|聯繫人|聯系人|負責人|經辦人|"
    r"監護人|簽名|簽收人|收貨人|寄件者|收件者|醫師|醫生|老師|經理|護理師|客戶|戶名|病患|我係|找|@)"
    rf"{_WHICH}"
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
    "(?P<name>"
    + _surname(
        "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林罗郑梁谢宋唐许韩冯邓曹彭曾肖董袁潘蒋蔡余杜叶程苏魏吕丁沈姚"
        "卢姜崔钟谭陆汪范石廖贾夏韦付邹孟熊秦邱尹薛闫雷侯龙陶黎贺顾龚邵钱严覃武戴莫孔汤康赖施洪辛柯庄葛樊聂梅盛霍翁邢殷俞倪"
        "張劉陳楊黃趙吳孫馬羅鄭謝許韓馮鄧葉蘇呂盧鍾譚陸"
    )
    + "(?:先生|女士|小姐|太太|老师|医生|教授|律师|师傅|警官|阿姨|大夫|老師|醫生|總|"
    + rf"总(?![{_HAN}])))"
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
_ORG_LEAD = re.compile(
    (
        r".*(?:就职于|任职于|供职于|工作于|单位是|单位[:：为]|公司[:：是为]|我在|他在|她在|加入|来自|"
        r"毕业于|就读于|入职|是|在|于|从|向|与|和|给|为|由|对|被|到|的|了)"
    ),
    re.S,
)


# A label with a colon: what fills the field is a name whatever its characters, unless it says that there is
# none.
_FIELD_LABELS = (
    "姓名|姓 名|名字|真实姓名|客户姓名|学生姓名|患者姓名|联系人|联络人|紧急联系人|收件人|收货人|寄件人|"
    "发件人|患者|病人|申请人|法定代表人|法人代表|法人|负责人|经办人|持卡人|户名|开户名|账户名|投保人|"
    "被保险人|受益人|当事人|犯罪嫌疑人|嫌疑人|原告|被告|被告人|原告人|被害人|签名|署名|签字|签章|监护人|户主|"
    "车主|业主|配偶|收款人|付款人|汇款人|借款人|出借人|担保人|保证人|委托人|受托人|代理人|证人|乙方|甲方|"
    "出租人|承租人|出租方|承租方|乘客|旅客|乘机人|入住人|投诉人|举报人|推荐人|中文名|真名|全名|曾用名|班主任|"
    "主治医生|主治医师|管床医生|责任护士|审核人|审批人|制单人|记录人|填表人|报销人|领用人|签收人|承办人|"
    "申报人|参保人|缴费人|报案人|应聘人|候选人|员工姓名|员工|学生|教师|导师|家长|父亲|母亲|丈夫|妻子|"
    "姓名（中文）|聯絡人|聯繫人|收貨人|負責人|經辦人|監護人|簽名|戶名"
)
_FIELD_LABELS = "|".join(sorted(_FIELD_LABELS.split("|"), key=len, reverse=True))
_DOTTED = rf"[{_HAN}]{{1,8}}(?:[·•・][{_HAN}]{{1,8}}){{1,3}}"
_FIELD_STOP = r"(?=[，。；、,;.\s（(）)|/<\"”】\]]|\Z)"
_CN_FILLED = re.compile(
    rf"[：:][ \t\"“]{{0,3}}(?P<name>[{_HAN}]{{2,4}}|[{_HAN}] {{1,4}}[{_HAN}]|{_DOTTED}){_FIELD_STOP}"
)
# In a cell, a tag or a line of its own behind the label: 姓名|张伟, 【姓名】张伟, <姓名>张伟.
_CN_BELOW = re.compile(rf"[|\t=】》>—\n-][ \t\"“|*]{{0,4}}(?P<name>[{_HAN}]{{2,4}}){_FIELD_STOP}")
_TAGS = re.compile(r"(?:</?[A-Za-z]{1,10}>?)+\Z")
_ETHNIC_NAME = re.compile(rf"{_DOTTED}\Z")
_FIELD_END = re.compile(rf"(?:{_FIELD_LABELS}|姓 {{0,4}}名){_WHICH}\Z")
# A label that is none of these and says by its end that somebody fills the field: 提货人, 值班员, 买方. What
# fills it has to look like a name. Not the labels of people in books and in the news: who asks about them
# means them.
_PERSONS_ENDS = (
    r"(?<=报名)人|(?<![诗名古伟艺词机器文猎商])(?<!创始)(?<!发明)(?<!代言)(?<!传承)(?<!第一)(?<!主持)人|(?<![作译编学读笔记])者|"
    r"(?<![演议委动官])员|师|(?<!器)(?<!感)(?<!五)官|[甲乙丙丁买卖收寄发供需借贷租聘]方|[收寄]件方|"
    r"(?<![时全身周边特专成增])长|[考学新医养]生|研究生|博士生|硕士生|实习生|[房车户业雇货失机事船]主|"
    r"[员职护]工|[选助帮舵对]手|[民交辅狱刑特武法]警|[朋男女校战室网好队亲病]友|[股房]东|[监董理]事|"
    r"儿子|妻子|孩子|子女|女儿|[长次养继]女|[长次养继]子|祖父|祖母|父母|岳父|岳母|丈夫|保姆|新郎|新娘|伴侣|"
    r"代表|会计|出纳|教练|客服|销售|财务|经办|审核|复核|校对|制表|秘书|助理|顾问|主治|主刀|主任|负责|跟进|"
    r"值班|对接|联系|客户|账户|用户|联系方"
)
_PERSONS = re.compile(rf"(?:{_PERSONS_ENDS})(?:姓名|名字|名称|名)?{_WHICH}\Z")
# One look at the last character spares most candidates the search. Behind 女儿 _CN_BEFORE finds the name.
_PERSONS_LAST = frozenset(end[-1] for end in _PERSONS_ENDS.split("|")) - {"儿"}
# 提货人张伟, 对接人是石磊, 值班员（夜班）欧阳静.
_OF_NAMES = f"[{words.GIVEN_CN}{words.GIVEN_CN_SURE}]"
_CN_ROLE = re.compile(rf"(?P<name>{_SURNAME}{_OF_NAMES}(?:{_OF_NAMES}(?!天))?)")
_LINK_BEFORE = re.compile(rf"{_WHICH}(?:分别是|分别为|包括|有|为|是|叫)?\Z")
_PERSON = re.compile(rf"(?:{_SURNAME}(?P<given>[{_HAN}]{{1,2}})|{_ANY_SURNAME}(?P<two>[{_HAN}]{{2}}))\Z")
_EMPTY = re.compile(
    r".*(?:[无未请待见暂空必选填某同详略缺]|公司|单位|部门|本人|客户|用户|匿名|保密|先生们|全体|各位|如下|"
    r"以上|以下|上述|不详|不明|自己|其他|人员|管理员|[部局司处科组院校队会厂店行室站所网]\Z)"
)
_ETHNIC = re.compile(
    rf"(?P<lead>我叫|我是|名叫|叫|{_FIELD_LABELS}|同事|朋友|客户|老师|同学)[是为：: ]{{0,3}}"
    rf"(?P<name>[{_HAN}]{{1,8}}(?:[·•・][{_HAN}]{{1,8}}){{1,3}}?)(?=[^{_HAN}·•・]|\Z|[的是在和与及说了来])"
)
_CN_SAID = re.compile(
    rf"(?:据|记者|通讯员|编辑|摄影)(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}})(?=介绍|表示|透露|回忆|反映|陈述|"
    rf"交代|讲述|称|说|[ 　）)/，]|\Z)"
)
_OWNED = (
    "电话|手机|邮箱|身份证|住址|地址|家庭住址|微信|号码|银行卡|卡号|生日|护照|病历|账号|账户|工资|联系方式|"
    "简历|快递|血型|学号|工号|社保|车牌|密码|邮件|合同|档案|体检|化验|成绩单|报销|房产|车|老公|老婆|妻子|"
    "丈夫|儿子|女儿|父亲|母亲|妈妈|爸爸"
)
_CN_OWNER = re.compile(rf"(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}}?)的(?:{_OWNED})")
_CN_CALLED = re.compile(
    rf"(?:(?<=免贵)|(?<![百贵同何老异]))姓(?P<name>{_ANY_SURNAME})(?=[，,。；;！!、\s]|的|\Z)"
)
_CN_POLITE = re.compile(rf"(?P<name>{_ANY_SURNAME}[{_HAN}]{{0,2}}?)(?:先生|女士|小姐|太太)")
_CN_PET = re.compile(rf"叫(?P<name>[小阿][{_HAN}])(?=[，。,.！!？?；\s]|\Z|的)")
# Of two characters: only between words that stand before and behind somebody.
_CN_SHORT = re.compile(
    rf"(?<=[和与跟给让请找被对向问叫把替约见帮由于告])(?P<name>{_SURNAME}[{words.GIVEN_CN_SURE}])"
    rf"(?=[的说是在和与及跟把被给去来已将要会想也都就刚一负批借][{_HAN}]|明天|今天|昨天)"
)
_CN_FRAMED = re.compile(
    rf"(?:(?<=由)(?P<a>{_SURNAME}[{_HAN}]{{1,2}}?)(?=负责|主持|担任|承办|接待|陪同|代理|签字|保管|执行|签收|"
    rf"陈述)|(?:转告|转交给?|通知|告诉|邀请|拜访|致电|感谢|抄送)(?P<b>{_SURNAME}[{_HAN}]{{1,2}}?)(?=明天|"
    rf"今天|后天|下周|一声|[，。,；！\s]|\Z)|(?<=[和与跟])(?P<c>{_SURNAME}[{_HAN}]{{1,2}}?)(?=一起|一块|一同|"
    rf"聊天|谈话|见面|商量|吵架|约好|结婚|离婚|合作))"
)
# A name on a line of its own, behind the end of a letter or in front of its date.
_CN_SIGNED = re.compile(
    rf"(?:(?:敬礼|此致|祝好|商祺|顺颂|谨启|敬上|谨上|致谢|谢谢|感谢|顺祝[{_HAN}]{{2,4}}|祝[{_HAN}]{{2,6}}|"
    rf"敬禮|落款)[！!。：:，,]?[ \t]*\n\s*)(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}})[ \t]*(?=\n|\Z|"
    rf"[ 　]*[0-9]{{4}})"
)
_CN_DATED = re.compile(
    rf"^[ \t　]*(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}})[ \t　]*(?=\n[ \t　]*[0-9]{{4}} ?[年.-]|(?:敬上|谨上|"
    rf"谨启|上)[ \t]*$)",
    re.M,
)
_CN_LATIN = re.compile(
    rf"(?:我叫|名叫|叫做|英文名字?|姓名拼音|拼音|我是|叫|{_FIELD_LABELS})"
    rf"{_WHICH}[是为：: ]{{0,3}}(?=[A-Z])"
)
_CN_PARCEL = re.compile(rf"(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}})(?:亲启|台启|敬启|收)(?=[\s，。,.）)]|\Z)")
_LATIN_CAPITALS = re.compile(r"[A-Z]{2,15}[ ,/]{1,2}[A-Z]{2,20}(?: [A-Z]{2,20})?(?![A-Za-z])")
# What goes on behind a name: the next one of a list.
_CN_NEXT = re.compile(
    rf"{_WHICH}[、，,和与及/ ]{{1,2}}(?P<name>{_ANY_SURNAME}[{_HAN}]{{1,2}})"
    rf"(?=[、，,。；;和与及/\s（(）)]|\Z|等)"
)
# Characters of given names. Where two stand behind a surname, one of them of the second list, and no word
# goes on around them, it is a person whatever announces it.
_CN_TYPICAL = re.compile(
    rf"(?P<name>{_SURNAME}(?:[{words.GIVEN_CN}][{words.GIVEN_CN_SURE}]|"
    rf"[{words.GIVEN_CN_SURE}][{words.GIVEN_CN}]))"
)
_CN_TWO = re.compile(rf"(?P<name>{_SURNAME}[{words.GIVEN_CN_SURE}])(?![{words.GIVEN_CN}])")
_CN_BOTH = re.compile(rf"{_SURNAME}[{words.GIVEN_CN_SURE}]{{2}}")
_GOES_ON = frozenset(
    "的说是在和与及跟把被给去来已将要会想也都就刚请打问找叫让为对从向等、曾因于先女老同医教经主律负批一借收付汇还签支提带送接不没昨今明"
)
_WORDS_OF_TWO = frozenset(words.WORDS_OF_TWO_CN.split())
_AHEAD = frozenset("和与及跟给让请找由被对向问是为叫把替约见、据说到帮从和同经与，")
_BEFORE = {_CN_BESIDE: _BESIDE_BEFORE, _CN_JSON: _JSON_BEFORE}


def _apart(text: str, start: int, end: int) -> bool:
    """Whether no word goes on around a range, for all that its neighbours say."""
    before, follow = text[max(0, start - 1) : start], text[end : end + 1]
    return (before in _AHEAD or not "\u4e00" <= before <= "\u9fff") and (
        follow in _GOES_ON or not "\u4e00" <= follow <= "\u9fff"
    )


def given_length(text: str, at: int, longest: int) -> int:
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


def is_word(text: str, at: int) -> bool:
    """Whether an ordinary word begins at an offset, rather than a name."""
    return _WORDS_CN.match(text, at) is not None


def _people(text: str, budget: Budget) -> Iterator[Finding]:
    for found in budget.each(_CN_BEFORE.finditer(text)):
        start = found.end()
        given = start + len(found["surname"])
        n = given_length(text, given, len(found["given"]))
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
            if not any(c in words.NOT_GIVEN for c in inner) and not _WORDS_CN.match(name):
                yield Finding(found.start("name"), found.end("name"), "NAME", 0.8)
    for found in budget.each(_CN_ADDRESSED.finditer(text)):
        left = text[max(0, found.start() - 1) : found.start()]
        if "\u4e00" <= left <= "\u9fff" and left not in _ADDRESSED_BEHIND:
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


# Each with its score, and signs of which a text needs one: most texts are spared most patterns.
_PLAINLY: tuple[tuple[re.Pattern[str], float, str], ...] = (
    (_CN_FILLED, 0.8, ":|："), (_CN_BELOW, 0.7, ""), (_CN_ROLE, 0.7, ""),
    (_ETHNIC, 0.8, "·|•|・"), (_CN_SAID, 0.7, "据|记者|通讯员|编辑|摄影"),
    (_CN_OWNER, 0.6, "的"),
    (_CN_CALLED, 0.6, "姓"), (_CN_POLITE, 0.7, "先生|女士|小姐|太太"), (_CN_PET, 0.6, "叫小|叫阿"),
    (_CN_PARCEL, 0.6, "收|启"), (_CN_SHORT, 0.6, ""), (_CN_SIGNED, 0.8, "\n"), (_CN_DATED, 0.7, "\n|上|启"),
    (_CN_TYPICAL, 0.6, ""),
)  # fmt: skip


def _plainly(text: str, budget: Budget) -> Iterator[Finding]:
    """What needs no list of roles in front of it."""
    listed = 0  # up to here lists were followed
    for pattern, score, signs in _PLAINLY:
        if not any(sign in text for sign in signs.split("|")):
            continue
        for found in budget.each(pattern.finditer(text)):
            start, end = found.span("name")
            name = found["name"]
            if pattern is _CN_FILLED:
                ahead = _before(text, found.start())
                good = not _EMPTY.match(name) and (
                    _FIELD_END.search(ahead) is not None
                    or (_looks_like_a_name(name) and _PERSONS.search(ahead) is not None)
                )
            elif pattern is _CN_BELOW:
                ahead = _before(text, found.start())
                good = fills(name) and (
                    is_label(_TAGS.sub("", ahead)) or _JSON_BEFORE.search(ahead) is not None
                )
            elif pattern is _CN_ROLE:
                good = _has_a_role(text, start, name)
            elif pattern is _ETHNIC:
                good = True
            elif pattern is _CN_POLITE:
                ahead = text[start - 1 : start]
                good = (
                    (not _han(text, start - 1) or ahead in _ADDRESSED_BEHIND)
                    and not is_word(text, start)
                    and not any(c in words.NOT_GIVEN for c in name[1:])
                )
            elif pattern in (_CN_OWNER, _CN_TYPICAL, _CN_PARCEL):
                good = (
                    not is_word(text, start)
                    and not any(c in words.NOT_GIVEN for c in name[1:])
                    and (
                        _apart(text, start, end)
                        or (pattern is not _CN_TYPICAL and not _han(text, start - 1))
                        or (_CN_BOTH.fullmatch(name) is not None and _after_somebody(text, start))
                    )
                )
            else:
                good = not is_word(text, start) and not any(c in words.NOT_GIVEN for c in name[1:-1])
            if good:
                yield Finding(start, end, "NAME", score)
                if end > listed:
                    for one in _listed(text, end):
                        listed = one.end
                        yield one
    for found in budget.each(_CN_FRAMED.finditer(text)):
        group = found.lastgroup or "a"
        name = found[group]
        if not is_word(name, 0) and not any(c in words.NOT_GIVEN for c in name[1:]):
            yield Finding(*found.span(group), "NAME", 0.6)
    for label in budget.each(_CN_LATIN.finditer(text)):
        run = name_words.CANDIDATE.match(text, label.end())
        span = name_words.trimmed(run[0], label.end()) if run else None
        capitals = _LATIN_CAPITALS.match(text, label.end())
        if capitals:
            yield Finding(capitals.start(), capitals.end(), "NAME", 0.7)
        elif span and span[0] == label.end() and not text[span[0] : span[1]].isupper():
            yield Finding(*span, "NAME", 0.7)


def _before(text: str, at: int) -> str:
    """The end of what stands in front of a sign, where a label may be."""
    return text[max(0, at - 24) : at].rstrip(" \t\"'”*`")


def _looks_like_a_name(value: str) -> bool:
    found = _PERSON.match(value)
    if not found or is_word(value, 0) or value in _WORDS_OF_TWO:
        return False
    given = found["given"] or found["two"]
    return given_length(value, len(value) - len(given), 2) == len(given)


def is_label(text: str) -> bool:
    """Whether a label of a field, or a head of a column, is one of people."""
    return _FIELD_END.search(text) is not None or _PERSONS.search(text) is not None


def is_typical(value: str) -> bool:
    """Whether a text is a surname and one or two characters of given names, of which one is hardly anything
    else.
    """
    found = _CN_TYPICAL.fullmatch(value) or _CN_TWO.fullmatch(value)
    return found is not None and not is_word(value, 0)


def _has_a_role(text: str, start: int, name: str) -> bool:
    """Whether a name that begins here has a label right before it, or one and a word that joins them."""
    label = _LINK_BEFORE.sub("", text[max(0, start - 20) : start], count=1)
    return (
        label[-1:] in _PERSONS_LAST
        and _PERSONS.search(label) is not None
        and not is_word(text, start)
        and name not in _WORDS_OF_TWO
    )


def fills(value: str) -> bool:
    """Whether what stands below such a head is a name."""
    return not _EMPTY.match(value) and (_ETHNIC_NAME.match(value) is not None or _looks_like_a_name(value))


def _after_somebody(text: str, start: int) -> bool:
    return text[max(0, start - 1) : start] in _AHEAD or not _han(text, start - 1)


def _han(text: str, at: int) -> bool:
    return at >= 0 and "\u4e00" <= text[at : at + 1] <= "\u9fff"


def _listed(text: str, at: int) -> Iterator[Finding]:
    """The other names of a list, behind its first."""
    for _ in range(50):
        found = _CN_NEXT.match(text, at)
        if not found or is_word(text, found.start("name")):
            return
        at = found.end("name")
        yield Finding(found.start("name"), at, "NAME", 0.7)


def scan(text: str) -> Iterator[Finding]:
    """People and companies in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _people(text, budget)
    yield from _plainly(text, budget)
    yield from budget.rest("NAME")

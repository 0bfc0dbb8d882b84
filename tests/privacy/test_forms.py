"""Forms of private values one by one: a text with one that is found whole, and one like it with nothing
private.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from stdnum import luhn

from sllm.privacy import Detector, NameDetector, PatternDetector, default_detectors
from sllm.privacy.detect import union
from sllm.privacy.names import census, lac

DETECTORS = (PatternDetector(), NameDetector())


def found(text: str, detectors: Sequence[Detector] = DETECTORS) -> list[tuple[str, str]]:
    """Kind and value of everything found."""
    joined = union([one for detector in detectors for one in detector.detect(text)])
    return [(one.kind, text[one.start : one.end]) for one in joined]


JCB = "213112345678904"

# What it is, a text with it, all that is private in that text, and a text that looks alike.
FORMS: list[tuple[str, str, list[tuple[str, str]], str]] = [
    # --- people, by what is written around them ---
    (
        "a rank",
        "In the end Detective Kowalczyk took the statement.",
        [("NAME", "Kowalczyk")],
        "In the end the Detective Novel Prize went to nobody.",
    ),
    (
        "a list",
        "Attendees: Ingrid Solberg, Tom Hale and Mirela Popescu",
        [("NAME", "Ingrid Solberg"), ("NAME", "Tom Hale"), ("NAME", "Mirela Popescu")],
        "Toppings: Cheddar Cheese, Red Onion and Black Pepper",
    ),
    (
        "the end of a letter",
        "See you on Friday.\n\nWarmly,\nOdalys",
        [("NAME", "Odalys")],
        "See you on Friday.\n\nWarmly,\nThe Sales Team",
    ),
    (
        "a label of whoever it may be",
        "提货人：张伟，值班员（夜班）：欧阳静；买方代表：李娜、王芳。",
        [("NAME", "张伟"), ("NAME", "欧阳静"), ("NAME", "李娜"), ("NAME", "王芳")],
        "提货人：若干，值班员（夜班）：周末，买方代表：方便时；作者：鲁迅。诗人：李白。特长：文学。",
    ),
    (
        "a label of a name behind a role",
        "学员姓名：任远\n紧急对接人: 石磊",
        [("NAME", "任远"), ("NAME", "石磊")],
        "学员姓名：任命时填写\n主治：石膏，分析师：金融，官方：江苏卫视。",
    ),
    (
        "keys of a record",
        '{"assignee": "Siobhan", "first_name": "clara", "值班员": "欧阳静"}',
        [("NAME", "Siobhan"), ("NAME", "clara"), ("NAME", "欧阳静")],
        '{"assignee": "nobody", "driver": "overlay", "members": ["read", "write"], "值班员": "周末"}',
    ),
    (
        "what a form sends",
        "first_name=clara&last_name=nguyen&page=2",
        [("NAME", "clara"), ("NAME", "nguyen")],
        "first_name=string&last_name=required&page=2",
    ),
    (
        "a label with its value below or beside it",
        "姓名\n张伟\n【联系人】欧阳静，<值班员>石磊</值班员>",
        [("NAME", "张伟"), ("NAME", "欧阳静"), ("NAME", "石磊")],
        "姓名\n部门\n【联系人】部门经理，<值班员>周末</值班员>",
    ),
    ("a name with a gap", "姓  名：张 伟，电话另附。", [("NAME", "张 伟")], "品  名：茶 叶，电话另附。"),
    (
        "members of a team with what they do",
        "组员：张伟（组长），石磊（记录）。",
        [("NAME", "张伟"), ("NAME", "石磊")],
        "组成：石膏（两份），石英（一份）。",
    ),
    ("a greeting", "Bonjour Éloïse,", [("NAME", "Éloïse")], "Hello World,"),
    ("family", "I met his brother Anselm there.", [("NAME", "Anselm")], "I met his brother there."),
    (
        "without capitals",
        "my name is margaret johnson and i moved",
        [("NAME", "margaret johnson")],
        "my name is on the list and i moved",
    ),
    # --- people, by their words ---
    # --- Chinese people ---
    ("a name with a dot", "姓名：古丽·买买提", [("NAME", "古丽·买买提")], "姓名：无"),
    (
        "a Chinese list",
        "联系人：李建军、孙丽华、钱雅芳",
        [("NAME", "李建军"), ("NAME", "孙丽华"), ("NAME", "钱雅芳")],
        "颜色：黄色、白色、蓝色",
    ),
    ("a surname told", "他说免贵姓贺，想约周三", [("NAME", "贺")], "您贵姓，想约周几"),
    (
        "Latin letters behind a Chinese label",
        "我叫CHEN XIAOMING",
        [("NAME", "CHEN XIAOMING")],
        "我用的是HTML",
    ),
    ("pinyin", "拼音：Wang Xiaoyu", [("NAME", "Wang Xiaoyu")], "拼音：ni hao"),
    # --- addresses ---
    ("a rare kind of street", "100 Maple Wynd", [("ADDRESS", "100 Maple Wynd")], "100 Maple Syrups"),
    (
        "a street without its kind",
        "4410 Larkspur, Dayton, OH 45402",
        [("ADDRESS", "4410 Larkspur, Dayton, OH 45402")],
        "4410 Larkspur, Tulips, and 45402 other flowers",
    ),
    (
        "where somebody lives",
        "She lives at Kossuth Lajos utca 14, Budapest now.",
        [("ADDRESS", "Kossuth Lajos utca 14, Budapest")],
        "She lives in Budapest now.",
    ),
    (
        "where it is sent",
        "Drop me off at 77 Nørrebrogade, Copenhagen",
        [("ADDRESS", "77 Nørrebrogade, Copenhagen")],
        "Drop me off at Terminal 3 Gate 12",
    ),
    ("Nordic", "Storgatan 12", [("ADDRESS", "Storgatan 12")], "Storgatan"),
    ("Dutch", "Keizersgracht 174-2", [("ADDRESS", "Keizersgracht 174-2")], "Keizersgracht"),
    ("Italian", "Strada Nuova 21", [("ADDRESS", "Strada Nuova 21")], "Strada 21"),
    (
        "part of a floor",
        "高雄市前金區中正四路211號8樓之1",
        [("ADDRESS", "高雄市前金區中正四路211號8樓之1")],
        "8樓之1",
    ),
    (
        "a code in front",
        "106台北市大安區新生南路一段1號",
        [("ADDRESS", "106台北市大安區新生南路一段1號")],
        "106台北市很大",
    ),
    (
        "a code behind",
        "北京市朝阳区建国路88号 100022",
        [("ADDRESS", "北京市朝阳区建国路88号 100022")],
        "北京市有 100022 人",
    ),
    # --- secrets ---
    (
        "spoken of",
        "The temporary password for the lab is still Vq7mZr2pX",
        [("SECRET", "Vq7mZr2pX")],
        "The password policy for the lab is in security-2024.html",
    ),
    (
        "as the password",
        "use Kd83nWq1Lp as the password",
        [("SECRET", "Kd83nWq1Lp")],
        "use something as the password",
    ),
    (
        "a phrase",
        "recovery phrase: ribbon candle orbit meadow copper lantern",
        [("SECRET", "ribbon candle orbit meadow copper lantern")],
        "the recovery phrase is hard to guess and to write",
    ),
    (
        "a quoted phrase",
        'the passphrase is "never on one sunny morning"',
        [("SECRET", "never on one sunny morning")],
        "the passphrase is never on a page of ours",
    ),
    ("a network's key", "wifi key: 7hTg29xQ", [("SECRET", "7hTg29xQ")], "piano key: F sharp"),
    ("a spaced PIN", "PIN 48 15 62", [("SECRET", "48 15 62")], "a pin for 3 walls"),
    # --- users and places ---
    ("added", "加我vx qiulan77", [("USER", "qiulan77")], "加我一个好友"),
    ("logged in", "User mthompson logged in twice", [("USER", "mthompson")], "User has logged in twice"),
    ("a login", "login octo-fan22", [("USER", "octo-fan22")], "login id1"),
    ("a service", "twitch: moss_and_fern", [("USER", "moss_and_fern")], "I watch twitch and reddit"),
    (
        "degrees",
        "40°26'46\"N 79°58'56\"W",
        [("GEO", "40°26'46\"N 79°58'56\"W")],
        "between 40° and 79° north",
    ),
    # --- numbers ---
    (
        "a code of an area in brackets",
        "my number is 1 (926) 018-1590",
        [("PHONE", "1 (926) 018-1590")],
        "f is 1 (926) + 15",
    ),
    (
        "a card with a slip",
        "charge it to cc 4716253849501828",
        [("CARD", "4716253849501828")],
        "see order 4716253849501828",
    ),
    (
        "paid to",
        "把钱打到6222021234567890123",
        [("CARD", "6222021234567890123")],
        "一共有6222021234567890123种",
    ),
    (
        "a card of 12 digits",
        "maestro card 501800000009",
        [("CARD", "501800000009")],
        "maestro card 501800000008",
    ),
    ("JCB of 15 digits", f"JCB {JCB}", [("CARD", JCB)], "JCB 213112345678905"),
    (
        "a Finnish number",
        "hetu 131052-308T",
        [("NATIONALID", "131052-308T")],
        "hetu 131052-308U",
    ),
    (
        "letters in a social number",
        "social security 131052-999T",
        [("SSN", "131052-999T")],
        "social security is 131 years old",
    ),
    ("a month of birth", "born Sept 1991", [("BIRTHDATE", "Sept 1991")], "prices rose in Sept 1991"),
    ("a Chinese month of birth", "1991年7月出生", [("BIRTHDATE", "1991年7月")], "1991年7月开业"),
    (
        "a soldier",
        "南参字第20231178号",
        [("LICENCE", "南参字第20231178号")],
        "南方的字很美，共20231178个",
    ),
    (
        "an address of mail beyond ASCII",
        "write to jürgen.groß@münchen.example.de",
        [("EMAIL", "jürgen.groß@münchen.example.de")],
        "write to us @ münchen",
    ),
]

# The same of people whom nothing announces, or only a table, a list or a chat: with the extra names.
WITH_EXTRA: list[tuple[str, str, list[tuple[str, str]], str]] = [
    (
        "a column",
        "姓名,部门\n张伟,销售部\n李秀英,财务部",
        [("NAME", "张伟"), ("NAME", "李秀英")],
        "名称,部门\n方案,销售部\n石膏,财务部",
    ),
    (
        "a list under its head",
        "参会人员：\n- 张伟（销售）\n\n- 欧阳静\n材料：\n1. 水",
        [("NAME", "张伟"), ("NAME", "欧阳静")],
        "参会须知：\n- 方案（草稿）\n\n1. 喝水\n2. 石膏",
    ),
    (
        "told",
        "Please remind Priya to sign the form.",
        [("NAME", "Priya")],
        "Please remind Everyone to sign the form.",
    ),
    (
        "what only people do",
        "Rasheeda Oduya was admitted on Tuesday.",
        [("NAME", "Rasheeda Oduya")],
        "Quantum Physics was admitted as a subject on Tuesday.",
    ),
    (
        "a table in Markdown",
        "| 姓名 | 部门 |\n|---|---|\n| 张伟 | IT |\n| **石磊** | IT |\n\n| 省 | 人口 |\n|-|-|\n| 江苏 | 多 |",
        [("NAME", "张伟"), ("NAME", "石磊")],
        "| 名称 | 部门 |\n|---|---|\n| 方案 | 销售 |\n| 石膏 | 财务 |\n\n| 省 | 人口 |\n|-|-|\n| 江苏 | 多 |",
    ),
    (
        "a column of a role",
        "Case\tAssigned to\n12\tMirela Popescu\n13\tPriya\n14\tnobody",
        [("NAME", "Mirela Popescu"), ("NAME", "Priya")],
        "Case\tAssigned on\n12\tMonday Morning\n13\tFriday\n14\tnobody",
    ),
    (
        "a list under its head in English",
        "**Attendees:**\n* Ada Obi (lead)\n* Tunde\n",
        [("NAME", "Ada Obi"), ("NAME", "Tunde")],
        "**Ingredients:**\n* Flour (white)\n* Button Mushrooms\n",
    ),
    (
        "a chat",
        "[10:32] 张伟: 你好\n[10:33] 李娜：收到",
        [("NAME", "张伟"), ("NAME", "李娜")],
        "[10:32] 方案: 你好\n[10:33] 水平：收到",
    ),
    (
        "a chat in English",
        "Ada Obi: hello\nTunde Bako (10:33): ok\nAda Obi: bye",
        [("NAME", "Ada Obi"), ("NAME", "Tunde Bako"), ("NAME", "Ada Obi")],
        "Gradient Descent: follows the slope\nRandom Forest: many trees\nMerge Sort: two halves",
    ),
    (
        "a role and a name without a sign",
        "提货人张伟明天到，乙方代表为石磊，请联系欧阳静（财务）。",
        [("NAME", "张伟"), ("NAME", "石磊"), ("NAME", "欧阳静")],
        "提货人方便时到，乙方代表为高级经理，请联系平台（财务），考生安静，工程师严明。",
    ),
    (
        "tags",
        "<td>姓名</td><td>石磊</td> <name>张伟</name>",
        [("NAME", "石磊"), ("NAME", "张伟")],
        "<td>品名</td><td>石膏</td> <name>方案</name>",
    ),
    (
        "spoken to",
        "Rachel, can you call me back?",
        [("NAME", "Rachel")],
        "Yesterday, can you call that a day?",
    ),
    ("initials", "J. R. Pemberton wrote to us", [("NAME", "J. R. Pemberton")], "U. S. Law is on our side"),
    (
        "foreign letters",
        "Łukasz Wiśniewski has a new flat",
        [("NAME", "Łukasz Wiśniewski")],
        "Zürich has a new tram",
    ),
    (
        "the ending of a surname",
        "We saw Temurkan Gelashvili at the fair",
        [("NAME", "Temurkan Gelashvili")],
        "We saw Tropical Storm warnings at the fair",
    ),
    ("said", "据记者陈思远介绍", [("NAME", "陈思远")], "据记者介绍"),
    ("handed on", "请转告刘志远明天开会", [("NAME", "刘志远")], "请转告大家明天开会"),
    ("in charge", "由赵雅琪负责接待", [("NAME", "赵雅琪")], "由学校负责接待"),
    ("an owner", "周雅婷的手机丢了", [("NAME", "周雅婷")], "周末的手机丢了"),
    ("signed", "此致\n敬礼\n高梓涵", [("NAME", "高梓涵")], "此致\n敬礼\n谢谢"),
    ("a parcel", "何静怡收", [("NAME", "何静怡")], "明天收"),
    (
        "characters of given names",
        "昨天和黄浩然一起吃饭",
        [("NAME", "黄浩然")],
        "昨天和同学一起吃饭",
    ),
    ("a pet name", "我女儿叫小美，三岁", [("NAME", "小美")], "外面叫小声点，谢谢"),
]


@pytest.mark.parametrize(("text", "expected"), [form[1:3] for form in FORMS], ids=[form[0] for form in FORMS])
def test_a_form_is_found(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize("text", [form[3] for form in FORMS], ids=[form[0] for form in FORMS])
def test_what_looks_alike_is_left_alone(text: str) -> None:
    assert found(text) == []


@pytest.mark.skipif(None in (lac.installed(), census.installed()), reason="the extra names is not installed")
@pytest.mark.parametrize(
    ("text", "expected", "alike"), [form[1:] for form in WITH_EXTRA], ids=[form[0] for form in WITH_EXTRA]
)
def test_a_form_is_found_with_the_extra(text: str, expected: list[tuple[str, str]], alike: str) -> None:
    assert found(text, default_detectors()) == expected
    assert found(alike, default_detectors()) == []


def test_the_forms_are_what_they_say() -> None:
    assert luhn.is_valid(JCB) and luhn.is_valid("501800000009")
    assert not luhn.is_valid("4716253849501828") and not luhn.is_valid("6222021234567890123")


@pytest.mark.parametrize(
    "text",
    [
        "Detective ",
        "lives at 1 Aa ",
        "4410 Aa, ",
        "Aastraße ",
        "ul. Aa ",
        "Attendees: Aa Bb, ",
        "Aa van der ",
        "A. ",
        "O'Aa ",
        "密码是",
        "password as the ",
        "姓名：张伟 ",
        "和张浩然",
        "加我微信",
        "姓王，",
        "DE12 3456 ",
        "http://a:b@c.d/ ",
        "12°34'56\"",
        "\u00e9@\u00e9.",
        "生，",
        "1990-01-01生于",
        "name,phone\n",
        "姓名|张伟\n",
        "a,b\n",
        '"members": ["Ada Obi", ',
        '"name":"a","members":',
        "first_name=clara ",
        "Attendees:\n- Ada Obi\n",
        "[10:32] 张伟: 好\n",
        "- ",
        "提货人张伟",
        "联系人",
    ],
)
@pytest.mark.timeout(60)  # a pattern that is not linear takes hours
def test_hostile_text_of_these_forms_is_scanned(text: str) -> None:
    hostile = text * (250_000 // len(text))
    for detector in DETECTORS:
        assert all(0 <= one.start < one.end <= len(hostile) for one in detector.detect(hostile))


@pytest.mark.parametrize(
    ("first", "flood"),
    [
        # A value that a later pattern would find, in front of more candidates than are judged.
        ("Hauptstraße 12, 10115 Berlin. ", "PO Box 1 "),
        ("Postcode SW1A 1AA. ", "PO Box 1 "),
        ("address: 12 Green Hill Farm\n", "Apt 4 "),
        ("She set qX7wLr92kT as the password. ", "the password is the "),
        ("微信：wxid_abc123，", "account no account "),
        ("张浩然，男，", "王先生"),
        ("12 Elm Street. ", "1 Ab "),
    ],
)
@pytest.mark.timeout(60)
def test_no_pattern_is_left_out_once_nothing_is_judged_any_more(first: str, flood: str) -> None:
    """Each pattern looks at a text from its beginning: where an earlier one gave up at its middle says
    nothing of what is in front of that.
    """
    alone = {(one.start, one.end) for detector in DETECTORS for one in detector.detect(first)}
    assert alone
    text = first + flood * (600_000 // len(flood))
    found = [one for detector in DETECTORS for one in detector.detect(text)]
    for start, end in alone:
        assert any(one.start <= start and end <= one.end for one in found), (first[start:end], found[-3:])
    assert max(one.end for one in found) == len(text)  # nothing that nobody looked at stays in view

"""Detectors: what they find and leave, offsets under odd writing, models as judges, hostile input."""

from __future__ import annotations

import base64
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples
from privacy_corpus import cases, clean
from stdnum.cn import uscc as stdnum_uscc

from sllm.privacy import (
    KINDS,
    Detector,
    Finding,
    ModelDetector,
    NameDetector,
    PatternDetector,
)
from sllm.privacy.detect import union
from sllm.privacy.patterns import checksums
from sllm.privacy.presidio import PresidioDetector
from sllm.privacy.regex import Patterns, lazy
from sllm.privacy.text import compact, decoded, folded, plain, unpacked

if TYPE_CHECKING:
    from collections.abc import Sequence

DETECTORS = (PatternDetector(), NameDetector())


def found(text: str) -> list[tuple[str, str]]:
    """Kind and value of everything found."""
    joined = union([one for detector in DETECTORS for one in detector.detect(text)])
    return [(one.kind, text[one.start : one.end]) for one in joined]


# ---- the generated set -------------------------------------------------------------------------------------


def test_recall_of_each_kind() -> None:
    total: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    missed = []
    for case in cases(10_000, seed=20):
        joined = union([one for detector in DETECTORS for one in detector.detect(case.text)])
        for start, end, name in case.spans:
            total[name] += 1
            kind = name.split("/")[0]
            if any(one.start <= start and end <= one.end and one.kind == kind for one in joined):
                hit[name] += 1
            else:
                missed.append((name, case.text))
    assert sum(total.values()) == 10_000
    for name, n in total.items():
        assert hit[name] >= 0.995 * n, [text for missing, text in missed if missing == name][:5]


def test_false_positives_on_clean_texts() -> None:
    texts = list(clean(10_000, seed=21))
    wrong = [(text, found(text)) for text in texts if any(detector.detect(text) for detector in DETECTORS)]
    assert len(wrong) <= 0.005 * len(texts), wrong[:5]


# ---- by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我的手机13800138000,邮箱a.b@qq.com谢谢", [("PHONE", "13800138000"), ("EMAIL", "a.b@qq.com")]),
        ("请打010-62781234转8001找我", [("PHONE", "010-62781234转8001")]),
        ("一三八零零一三八零零零", [("PHONE", "一三八零零一三八零零零")]),
        ("1 3 8 0 0 1 3 8 0 0 0", [("PHONE", "1 3 8 0 0 1 3 8 0 0 0")]),
        (
            "(020) 7946 0958 or +44 20 7946 0958",
            [("PHONE", "(020) 7946 0958"), ("PHONE", "+44 20 7946 0958")],
        ),
        (
            "call 06 12 34 56 78 or 555-123-4567 x89",
            [("PHONE", "06 12 34 56 78"), ("PHONE", "555-123-4567 x89")],
        ),
        ("user [at] example [dot] com", [("EMAIL", "user [at] example [dot] com")]),
        ("身份证：110105194912310021", [("IDCARD", "110105194912310021")]),  # a wrong check digit
        ("旧身份证130503670401001", [("IDCARD", "130503670401001")]),
        ("HKID A123456(3)", [("IDCARD", "A123456(3)")]),
        ("ID A123456789 of Taiwan", [("IDCARD", "A123456789")]),
        (
            "CPF 529.982.247-25, CNPJ 11.222.333/0001-81",
            [("NATIONALID", "529.982.247-25"), ("COMPANYID", "11.222.333/0001-81")],
        ),
        ("Aadhaar 2345 6789 0124", [("NATIONALID", "2345 6789 0124")]),
        ("NI number AB 12 34 56 C", [("NATIONALID", "AB 12 34 56 C")]),
        ("codice RSSMRA85T10A562S", [("NATIONALID", "RSSMRA85T10A562S")]),
        ("AHV 756.9217.0769.85", [("NATIONALID", "756.9217.0769.85")]),
        ("driver's license number D1234567", [("LICENCE", "D1234567")]),
        ("passport no. X1234567", [("PASSPORT", "X1234567")]),
        (
            '{"passport_number": "AB123456", "userName": "bob_99"}',
            [("PASSPORT", "AB123456"), ("USER", "bob_99")],
        ),
        ("IMEI 49-015420-323751-8", [("DEVICE", "49-015420-323751-8")]),
        ("account number 12345678, sort code 12-34-56", [("ACCOUNT", "12345678"), ("ACCOUNT", "12-34-56")]),
        ("微信号：zhangsan_88，QQ：123456789", [("USER", "zhangsan_88"), ("USER", "123456789")]),
        ("工号A10023，邮编100080", [("ACCOUNT", "A10023"), ("ADDRESS", "100080")]),
        ("验证码 483920，CVV: 123", [("SECRET", "483920"), ("SECRET", "123")]),
        ("Bearer abcdef1234567890ABCDEF", [("SECRET", "abcdef1234567890ABCDEF")]),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- x",
            [("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----")],
        ),
        ("221B Baker Street, London NW1 6XE.", [("ADDRESS", "221B Baker Street, London NW1 6XE")]),
        ("P.O. Box 123, Springfield, IL 62704", [("ADDRESS", "P.O. Box 123, Springfield, IL 62704")]),
        ("Hauptstraße 12, 10115 Berlin", [("ADDRESS", "Hauptstraße 12, 10115 Berlin")]),
        ("12 rue de la Paix, 75002 Paris", [("ADDRESS", "12 rue de la Paix, 75002 Paris")]),
        (
            "寄到上海市浦东新区张江镇祖冲之路887弄84号。",
            [("ADDRESS", "上海市浦东新区张江镇祖冲之路887弄84号")],
        ),
        ("家住朝阳区望京街道花家地小区5号楼", [("ADDRESS", "朝阳区望京街道花家地小区5号楼")]),
        ("我叫欧阳娜娜，联系人：王芳", [("NAME", "欧阳娜娜"), ("NAME", "王芳")]),
        ("请转交李小明先生", [("NAME", "李小明")]),
        ("张三丰，男，1980年生", [("NAME", "张三丰")]),
        ("My name is John Smith. Dear Mrs. Johnson,", [("NAME", "John Smith"), ("NAME", "Johnson")]),
        (
            "Acme Widgets Inc. and 华兴科技有限公司",
            [("ORG", "Acme Widgets Inc."), ("ORG", "华兴科技有限公司")],
        ),
        ("born on 3 March 1985", [("BIRTHDATE", "3 March 1985")]),
        ("1985年3月4日出生", [("BIRTHDATE", "1985年3月4日")]),
        ("GPS: 31.2304, 121.4737", [("GEO", "31.2304, 121.4737")]),
    ],
)
def test_found(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x[1::2], std::vector, a::b::c, 12:30:45",
        "version 1.2.3.4, Chrome/120.0.0.0, 127.0.0.1, lodash@4.17.21",
        "d41d8cd98f00b204e9800998ecf8427e",
        "password = os.environ['PW']; token: str = None; api_key=get_key()",
        "忘记密码怎么办？密码是什么？",
        "password is required",
        "3号线换乘10号线",
        "从南京路到人民广场",
        "北京市海淀区有很多大学",
        "3.14159265358979323846",
        "1700000000 and 1700000000000",
        "订单号202411251234567890",
        "ISBN 9787111547426",
        "2020 2021 2022 2023",
        "git@github.com:user/repo.git",
        "@property",
        "550e8400-e29b-41d4-a716-446655440000",
        "高中老师和同学",
        "我是学生",
        "The Next Big Thing In Town",
        "3 Key Points",
        "1/2 + 3/4",
        "床前明月光",
        "f(x) = 2x + 1",
        "2024-11-25 07:04:39",
        "$1,299.00 and €5",
        "max_tokens=4096",
        "https://example.com/a?b=c",
    ],
)
def test_left_alone(text: str) -> None:
    assert found(text) == []


def test_kinds_and_scores() -> None:
    only = PatternDetector(["EMAIL"])
    assert [one.kind for one in only.detect("a@b.com 13800138000")] == ["EMAIL"]
    sure = PatternDetector(min_score=0.9)
    assert {one.kind for one in sure.detect("a@b.com, card 4111 1111 1111 1112")} == {"EMAIL"}
    with pytest.raises(ValueError, match="unknown kinds"):
        PatternDetector(["COLOUR"])
    assert isinstance(only, Detector) and isinstance(NameDetector(), Detector)


@pytest.mark.parametrize("package", ["ahocorasick_rs", "phonenumbers", "stdnum"])
def test_a_missing_package_is_named_before_any_text(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is missing, .*sllm\[privacy\]"):
        PatternDetector()


# ---- checksums against python-stdnum -----------------------------------------------------------------------


def test_checksums_agree_with_stdnum() -> None:
    rng = random.Random(0)
    good = 0
    for _ in range(3000):
        code = "9111010566" + "".join(rng.choice("0123456789ABCDEFGHJKLMNPQRTUWXY") for _ in range(8))
        assert checksums.valid("uscc", code) == stdnum_uscc.is_valid(code)
        good += checksums.valid("uscc", code)
    assert good > 30
    assert not checksums.valid("uscc", "9A110105662345678X")
    assert checksums.valid("uscc", "A1110000600037341" + stdnum_uscc.calc_check_digit("A1110000600037341"))


def test_checksums_by_stdnum() -> None:
    for scheme, right, wrong in (
        ("luhn", "4111111111111111", "4111111111111112"),
        ("verhoeff", "2363", "2364"),
        ("iban", "DE89370400440532013000", "DE88370400440532013000"),
        ("es.dni", "12345678Z", "12345678A"),
        ("es.nie", "X1234567L", "X1234567A"),
        ("fr.nir", "295109912611193", "295109912611194"),
        ("ch.ssn", "7569217076985", "7569217076986"),
    ):
        assert checksums.valid(scheme, right) and not checksums.valid(scheme, wrong)


@pytest.mark.parametrize(
    ("scheme", "right", "wrong"),
    [
        ("cn_id", "11010519491231002X", "110105194912310021"),
        ("cn_id_form", "110105194912310021", "11010519491331002X"),  # no such month
        ("cn_id_form", "130503670401001", "19010519491231002X"),  # no such province
        ("hk_id", "A123456(3)", "A123456(4)"),
        ("tw_id", "A123456789", "A123456788"),
        ("vin", "1HGCM82633A004352", "1HGCM82633A004353"),
        ("base58check", "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2", "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN3"),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1112"),
        ("card", "6011000990139424", "0000000000000000"),
    ],
)
def test_checks_of_our_own(scheme: str, right: str, wrong: str) -> None:
    assert checksums.valid(scheme, right) and not checksums.valid(scheme, wrong)


# ---- views -------------------------------------------------------------------------------------------------


@given(st.text(max_size=40))
@examples(500)
def test_views_map_back(text: str) -> None:
    for view in (plain(text), folded(text), *decoded(text)):
        last = 0
        for i in range(len(view.text)):
            start, end = view.span(i, i + 1)
            assert 0 <= start < end <= len(text)
            assert start >= last or view.text[i] != text[start]
            last = max(last, start)
        if view.text:
            start, end = view.span(0, len(view.text))
            assert 0 <= start < end <= len(text)


def test_views() -> None:
    assert plain("１３８\u200b００\u3000Ａ–b，").text == "13800 A-b，"
    assert folded("ＡＢＣ\u200b é ß Σ").text == folded("abc e\u0301 SS ς").text
    assert [view.text for view in decoded(r"\u5f20\n%E5%BC%A0&amp;")] == [
        "张\n%E5%BC%A0&amp;",
        r"\u5f20\n张&amp;",
        r"\u5f20\n%E5%BC%A0&",
    ]
    view = next(decoded(r"a\\u5f20b"))
    assert view.text == r"a\u5f20b"
    twice = list(decoded(r"a\\u5f20b"))[1]
    assert twice.text == "a张b"
    assert twice.span(1, 2) == (1, 8)


@given(st.text(max_size=60))
@examples(300)
def test_findings_are_ranges_of_the_text(text: str) -> None:
    for detector in DETECTORS:
        for one in detector.detect(text):
            assert 0 <= one.start < one.end <= len(text)
            assert one.kind in KINDS and 0 < one.score <= 1


# ---- models ------------------------------------------------------------------------------------------------


class Oracle:
    """A scorer that knows which of the quoted words are what."""

    def __init__(self, **kinds: str) -> None:
        self.kinds = kinds
        self.prompts: list[str] = []

    def label_logprobs(self, prompt: str, labels: Sequence[str]) -> list[float]:
        self.prompts.append(prompt)
        assert len(labels) == 4
        # The model leans towards the first label whatever it is asked.
        scores = [-1.0, -4.0, -4.0, -4.0]
        for name, span in self.kinds.items():
            if (
                prompt.split("\n")[-1].find(f"「{span}」") >= 0
                or prompt.split("\n")[-1].find(f'"{span}"') >= 0
            ):
                scores[("NAME", "ORG", "ADDRESS").index(name)] += 6
                return scores
        if "「……」" not in prompt and '"..."' not in prompt:
            scores[3] += 6
        return scores


def test_a_model_judges_candidates() -> None:
    text = "昨天张伟东在清华大学见到了 Mary Poppins，说起王国的事"
    oracle = Oracle(NAME="张伟东", ORG="清华大学")
    got = [(one.kind, text[one.start : one.end]) for one in ModelDetector(oracle).detect(text)]
    assert ("NAME", "张伟东") in got and not any("Mary" in value or "王国" in value for _, value in got)
    assert any("张伟东" in prompt and "Mary" in prompt for prompt in oracle.prompts)
    english = Oracle(NAME="Mary Poppins")
    got = [(one.kind, text[one.start : one.end]) for one in ModelDetector(english).detect(text)]
    assert got == [("NAME", "Mary Poppins")]
    # The bias towards the first label alone finds nothing.
    assert ModelDetector(Oracle()).detect(text) == []


def test_candidates_beyond_the_limit_count_as_found() -> None:
    oracle = Oracle()
    detector = ModelDetector(oracle, max_candidates=3)
    text = "Alpha one. Beta two. Gamma three. Delta four. Omega five."
    got = [text[one.start : one.end] for one in detector.detect(text)]
    assert got == ["Delta", "Omega"]
    assert len(oracle.prompts) == 4  # and the neutral one


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.0, 0.0], "2 scores for 4"),
        ([float("nan")] * 4, "no log-probability"),
        ([float("inf")] * 4, "no log-prob"),
        ([-float("inf")] * 4, "impossible"),
    ],
)
def test_invalid_scores(scores: list[float], said: str) -> None:
    class Bad:
        def label_logprobs(self, prompt: str, labels: Sequence[str]) -> list[float]:
            return scores

    with pytest.raises(ValueError, match=said):
        ModelDetector(Bad()).detect("Hello Mary")
    with pytest.raises(ValueError, match="threshold"):
        ModelDetector(Bad(), threshold=1.5)
    with pytest.raises(ValueError, match="negative"):
        ModelDetector(Bad(), window=-1)


@dataclass
class Result:
    entity_type: str
    start: int
    end: int
    score: float


class Analyzer:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def analyze(self, *, text: str, language: str) -> list[Any]:
        self.asked.append((text, language))
        return [
            Result("PERSON", 0, 4, 0.85),
            Result("US_SSN", 5, 9, 0.5),
            Result("URL", 0, 2, 0.9),
            Result("PERSON", 0, 1, 0.1),
            Result("MY_CUSTOM_ID2", 1, 3, 0.7),
        ]


def test_presidio() -> None:
    analyzer = Analyzer()
    detector = PresidioDetector(analyzer, languages=("en", "zh"), kinds={"US_SSN": "NATIONALID"})
    got = detector.detect("Anna 1234")
    assert analyzer.asked == [("Anna 1234", "en"), ("Anna 1234", "zh")]
    assert got[:3] == [
        Finding(0, 4, "NAME", 0.85),
        Finding(5, 9, "NATIONALID", 0.5),
        Finding(1, 3, "MYCUSTOMID", 0.7),
    ]
    assert isinstance(detector, Detector)


def test_presidio_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ImportError, match=r"sllm\[presidio\]"):
        PresidioDetector()


# ---- cost --------------------------------------------------------------------------------------------------

MEGABYTE = 10**6
RNG = random.Random(3)
HOSTILE = {
    "digits": "1",
    "groups of digits": "123456789 ",
    "1-": "1-",
    "at": "@",
    "a.": "a.",
    "a@a.": "a@a.",
    "a": "a",
    "plus": "+1234567 ",
    "scheme": "http://a:",
    "colons": "1::",
    "brackets": "(1)",
    "spoken": "[at]",
    "label": "password=",
    "中文标签": "密码：",
    "路": "路",
    "路号": "路1号",
    "王": "王",
    "我叫王": "我叫王",
    "caps": "Ab ",
    "streets": "1 Ab ",
    "iban": "GB82 ",
    "key": "sk-",
    "block": "-----BEGIN PRIVATE KEY-----",
    "escape": r"\u0041",
    "percent": "%41",
    "zero width": "1\u200b",
    "numerals": "一",
    "company": "Aa, ",
    "公司": "有限公司",
    "spaces": " ",
    "passport": "passport ",
    "names": "Name: Aa ",
    "noise": "".join(chr(RNG.randrange(32, 0x9FFF)) for _ in range(5000)),
    "ascii noise": "".join(chr(RNG.randrange(32, 127)) for _ in range(5000)),
    "digit noise": "".join(RNG.choice("0123456789 -") for _ in range(50_000)),
}


@pytest.mark.timeout(60)  # a pattern that is not linear takes hours
@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_scanned(unit: str) -> None:
    text = unit * (MEGABYTE // 4 // len(unit))
    for detector in DETECTORS:
        for one in detector.detect(text):
            assert one.end <= len(text)


def test_import_compiles_no_pattern_and_reads_no_rules() -> None:
    code = (
        "import re, sys\n"
        "compile, compiled, opened = re.compile, [], []\n"
        "def spy(*args):\n"
        "    compiled.append(sys._getframe(1).f_globals['__name__'])\n"
        "    return compile(*args)\n"
        "re.compile = spy\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import sllm.privacy, sllm.cli.main\n"
        "def ours(): return [name for name in compiled if name.startswith('sllm.privacy')]\n"
        "assert not ours(), ours()\n"
        "assert not [path for path in opened if path.endswith(('.txt', '.ini', 'labels.json'))]\n"
        "sllm.Vault().mask('我叫张伟, my name is Ada Obi')\n"
        "assert len(ours()) > 50\n"
        "n = len(ours())\n"
        "sllm.Vault().mask('我叫张伟, my name is Ada Obi')\n"
        "assert len(ours()) <= n + 2  # those with the nonces of a vault\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lazy_patterns() -> None:
    made: list[int] = []

    def source() -> str:
        made.append(1)
        return "a(b+)"

    pattern = lazy(source, re.I)
    assert not made
    assert pattern.sub("x", "ABB c") == "x c" and [found[1] for found in pattern.finditer("ab abb")] == [
        "b",
        "bb",
    ]
    assert made == [1]
    assert not hasattr(lazy("("), "flags")
    patterns = Patterns("numbers")
    assert patterns.group.findall("12 3") == ["12", "3"] and not hasattr(patterns, "no_such_pattern")


def test_import_is_light() -> None:
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(event) if "
        "event.startswith('socket.') else None)\n"
        "import sllm.privacy, sllm\n"
        "sllm.Vault().mask('nothing here')\n"
        "heavy = {'phonenumbers', 'stdnum', 'grpc', 'presidio_analyzer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert sllm.Vault().mask('IBAN DE89370400440532013000, +1 415 555 2671').counts == "
        "{'IBAN': 1, 'PHONE': 1}\n"
        "assert {'phonenumbers', 'stdnum'} <= set(sys.modules)\n"
        "assert not opened, opened\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@given(st.text(alphabet="ab1 -_</>é\u0301\u200bаｘ王·", max_size=40))
@examples(500)
def test_texts_moved_together_map_back(text: str) -> None:
    close = compact(folded(text))
    for at, char in enumerate(close.text):
        start, end = close.span(at, at + 1)
        assert char in compact(folded(text[start:end])).text


@given(st.binary(max_size=5), st.text(min_size=6, max_size=12), st.sampled_from(["", "x", "ab-", " "]))
@examples(300)
def test_what_base64_and_hexadecimal_hold(before: bytes, value: str, around: str) -> None:
    value = value.replace("\0", "0")
    data = before + value.encode()
    for run in (base64.b64encode(data), base64.urlsafe_b64encode(data).rstrip(b"="), data.hex().encode()):
        text = f"{around}{run.decode()}{around}"
        found = [span for span, inner in unpacked(text) if value in inner]
        assert found and all(end - start >= len(run.rstrip(b"=")) for start, end in found), text

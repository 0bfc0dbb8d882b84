"""The vault: masking and restoring are exact inverses, found values are masked everywhere, and nothing gets
out.
"""

from __future__ import annotations

import base64
import copy
import json
import logging
import pickle
import random
import re
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples
from privacy_corpus import KINDS, cases

import sllm
from sllm.privacy import Finding, Masked, Restorer, Vault, egress_check
from sllm.privacy.detect import union
from sllm.privacy.known import KnownValues

if TYPE_CHECKING:
    from collections.abc import Sequence


class Fixed:
    """Finds given words wherever they stand."""

    def __init__(self, **words: str) -> None:
        self.words = words

    def detect(self, text: str) -> list[Finding]:
        return [
            Finding(m.start(), m.end(), kind)
            for kind, word in self.words.items()
            for m in re.finditer(re.escape(word), text)
        ]


class Given:
    """Hands back what it was given, for the text that it was given for."""

    def __init__(self, findings: Sequence[object], text: str | None = None) -> None:
        self.findings = findings
        self.text = text

    def detect(self, text: str) -> Any:
        return self.findings if self.text in (None, text) else []


class Failing:
    def detect(self, text: str) -> list[Finding]:
        raise RuntimeError(f"cannot handle {text}")


TEXT = "我叫张伟，手机13800138000，邮箱zhang@example.com。张伟的卡是4111 1111 1111 1111"


# ---- masking -----------------------------------------------------------------------------------------------


def test_masking_and_restoring() -> None:
    vault = Vault()
    masked = vault.mask(TEXT)
    assert masked.counts == {"NAME": 2, "PHONE": 1, "EMAIL": 1, "CARD": 1}
    for value in ("张伟", "13800138000", "zhang@example.com", "4111"):
        assert value not in masked.text
    n = vault.placeholders.nonces[-1]
    assert masked.text == (
        f"我叫[NAME_1_{n}]，手机[PHONE_2_{n}]，邮箱[EMAIL_3_{n}]。[NAME_1_{n}]的卡是[CARD_4_{n}]"
    )
    assert vault.restore(masked.text) == TEXT
    assert vault.counts == {"NAME": 1, "PHONE": 1, "EMAIL": 1, "CARD": 1}
    assert len(vault) == 4
    vault.clear()
    assert vault.restore(masked.text) == masked.text
    assert len(vault) == 0


def test_the_same_value_keeps_its_placeholder() -> None:
    vault = Vault()
    first = vault.mask("邮箱a@b.com").text.removeprefix("邮箱")
    assert vault.mask("mail a@b.com and c@d.com").text.startswith(f"mail {first} and [EMAIL_2_")
    # Written otherwise it is another placeholder, so that it comes back as it was.
    spaced = vault.mask("电话 13800138000 / 138 0013 8000")
    assert spaced.counts == {"PHONE": 2}
    assert vault.restore(spaced.text) == "电话 13800138000 / 138 0013 8000"


def test_nothing_private_nothing_changed() -> None:
    vault = Vault()
    for text in ("", "今天天气很好", "x = [1, 2]"):
        assert vault.mask(text) == Masked(text, {})


def test_known_values_are_masked_everywhere() -> None:
    vault = Vault([Fixed(NAME="张伟", PHONE="13800138000", EMAIL="Anna.Schmidt@example.com")])
    vault.mask("张伟 13800138000 Anna.Schmidt@example.com")
    vault._detectors = ()  # from here on no detector fires
    for text in (
        "昨天见到张伟了",
        "张\u200b伟",
        "1-380-013-8000",
        "１３８００１３８０００",
        "tel:13800138000x",
        "(138) 0013.8000",
        "ANNA.SCHMIDT@EXAMPLE.COM",
        "anna．schmidt＠example．com",
        "%E5%BC%A0%E4%BC%9F",
        r"\u5f20\u4f1f",
        "&#24352;&#20255;",
        json.dumps({"a": json.dumps({"b": "张伟"})}),
        base64.b64encode("联系张伟".encode()).decode(),
        "张伟".encode().hex(),
        r"\xe5\xbc\xa0\xe4\xbc\x9f",
        r"\345\274\240\344\274\237",
        r"\u{5f20}\u{4f1f}",
        r"\U00005f20\U00004f1f",
        "=E5=BC=A0=E4=BC=9F",
        "=E5=BC=\n=A0=E4=BC=9F",
        "%25E5%25BC%25A0%25E4%25BC%259F",
        "&amp;#24352;&amp;#20255;",
        "&#24352&#20255 ",
        "张伟".encode().hex(":"),
        base64.b64encode("Anna.Schmidt@example.com".encode("utf-16-le")).decode(),
        "A-n-n-a . S c h m i d t @ example . com",
        "<b>Anna</b>.Schmidt@example.com",
        "\u0430nna.schmidt@example.com",  # a Cyrillic letter
        "1380\n0138000",
    ):
        masked = vault.mask(text)
        assert sum(masked.counts.values()) == 1, text
        assert vault.restore(masked.text, in_links=True) == text
        egress_check(masked.text, vault)
        with pytest.raises(sllm.LeakError, match="1 of kind"):
            egress_check(text, vault)


def test_words_that_share_the_letters_of_a_value_are_left_alone() -> None:
    vault = Vault([Fixed(NAME="张伟", EMAIL="an@n.com", USER="therapist")])
    vault.mask("张伟 an@n.com therapist")
    vault._detectors = ()
    # A sign that ends a clause parts two words; four letters are too few to be spelled out.
    for text in ("the, rapist", "张、伟", "nothing at all", r"\xe5\xbc\xa0", "=E5=BC=A0", "%25E5"):
        assert vault.mask(text).counts == {}, text


def test_short_values_need_to_stand_alone() -> None:
    vault = Vault([Fixed(NAME="Al", SECRET="1234", USER="Will")])
    vault.mask("Al 1234 Will")
    vault._detectors = ()
    assert vault.mask("Also 12345, A12345, it will").counts == {}
    assert vault.mask("ask Al, pin 1234, Will").counts == {"NAME": 1, "SECRET": 1, "USER": 1}


def test_messages_earlier_and_later() -> None:
    vault = Vault()
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "张伟 is the user"},
        {"role": "user", "content": [{"type": "text", "text": "我叫张伟，手机13800138000"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"who": "张伟"}'},
                }
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": {"phone": 13800138000, "张伟": [True, 1.5, None]},
        },
    ]
    before = copy.deepcopy(messages)
    masked = vault.mask_messages(messages)
    assert messages == before
    assert "张伟" not in str(masked.messages) and "13800138000" not in str(masked.messages)
    assert masked.counts == {"NAME": 4, "PHONE": 2}
    assert masked.messages[2]["tool_calls"][0]["id"] == "call_1"
    n, m = vault.placeholders.nonces  # the number in JSON has the second: it comes back as a number
    assert masked.messages[3]["content"] == {"phone": f"[PHONE_2_{m}]", f"[NAME_1_{n}]": [True, 1.5, None]}
    assert json.loads(vault.restore(json.dumps(masked.messages[3]["content"]))) == messages[3]["content"]
    assert vault.restore(masked.messages[0]["content"]) == "张伟 is the user"
    egress_check(json.dumps(masked.messages), vault)
    with pytest.raises(sllm.LeakError, match="NAME"):
        egress_check(json.dumps(messages), vault)


def test_what_a_later_message_makes_known_beside_a_masked_value() -> None:
    # Al stands alone only once the number behind it is masked.
    vault = Vault([Fixed(PHONE="13800138000"), Given([Finding(0, 2, "NAME")], "Al is here")])
    masked = vault.mask_messages(
        [{"role": "user", "content": text} for text in ("Al13800138000", "Al is here")]
    )
    assert masked.counts == {"PHONE": 1, "NAME": 2}
    for one in masked.messages:
        egress_check(one["content"], vault, [])


def test_messages_that_cannot_be_searched() -> None:
    vault = Vault()
    with pytest.raises(sllm.LeakError, match="image_url"):
        vault.mask_messages(
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
        )
    for bad in (["text"], [{"role": "user", "content": b"bytes"}], [{1: "x"}], [{"content": {"a": {1, 2}}}]):
        with pytest.raises(TypeError, match="expected"):
            vault.mask_messages(bad)  # type: ignore[arg-type]


def test_overlaps() -> None:
    def joined(*findings: Finding) -> list[tuple[int, int, str]]:
        return [(one.start, one.end, one.kind) for one in union(findings)]

    assert joined(Finding(0, 4, "NAME"), Finding(2, 9, "ADDRESS")) == [(0, 9, "ADDRESS")]
    assert joined(Finding(0, 9, "ADDRESS"), Finding(2, 6, "PHONE", checked=True)) == [(0, 9, "PHONE")]
    assert joined(Finding(0, 5, "CARD", checked=True), Finding(0, 9, "IDCARD", checked=True)) == [
        (0, 9, "IDCARD")
    ]
    assert joined(Finding(0, 3, "NAME"), Finding(3, 5, "ORG")) == [(0, 3, "NAME"), (3, 5, "ORG")]
    assert joined(Finding(5, 8, "NAME"), Finding(0, 6, "ORG"), Finding(7, 9, "USER")) == [(0, 9, "ORG")]
    assert joined() == []


def test_many_values_are_found_like_few() -> None:
    few, many = KnownValues(), KnownValues()
    values = ["张伟", "Al", "13800138000", "a@b.com", "abcdefghij", "aaaa", "王小明", "x1"]
    for value in values:
        few.add(value, "NAME")
        many.add(value, "NAME")
    for i in range(500):
        many.add(f"other-{i}-value", "ORG")
    rng = random.Random(5)
    pieces = [
        *values,
        "A@B.COM",
        "Also",
        "aaaaaaaaa",
        "1-380-013-8000",
        "王",
        " ",
        "，",
        "张\u200b伟",
        "xabcdefghijx",
        "x12",
    ]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
        one, other = (sorted({(f.start, f.end) for f in known.findings(text)}) for known in (few, many))
        assert one == other, text


@pytest.mark.timeout(120)  # reading the text once for each value would take hours
def test_masking_a_text_of_many_values() -> None:
    text = " ".join(f"user{i}@example.com" for i in range(4000))
    vault = Vault()
    masked = vault.mask(text)
    assert masked.counts == {"EMAIL": 4000}
    assert vault.restore(masked.text, in_links=True) == text
    egress_check(masked.text, vault)


# ---- nonces ------------------------------------------------------------------------------------------------


def test_a_nonce_in_a_later_text() -> None:
    vault = Vault()
    old = vault.mask("a@b.com").text
    nonce = vault.placeholders.nonces[0]
    for text in (
        f"say {old} twice: {old}",
        nonce,
        f"[EMAIL_1_{nonce.upper()}]",
        f"{nonce[:2]}\u200b{nonce[2:]}",
        f"a@b.com{nonce}",
    ):
        masked = vault.mask(text)
        # It stands there only where the value that was masked first does.
        assert nonce not in masked.text.replace(old, "")
        assert vault.restore(masked.text, in_links=True) == text
        egress_check(masked.text, vault)
    # What was masked before still comes back.
    assert vault.restore(old) == "a@b.com"
    assert len(set(vault.placeholders.nonces)) == len(vault.placeholders.nonces) > 2


def test_a_text_that_holds_every_short_nonce() -> None:
    letters, numbers = "bcdfghjkmnpqrtvwxz", "23456789"
    every = " ".join(a + b + c + d for a in letters for b in numbers for c in letters for d in numbers)
    vault = Vault()
    text = f"{every} a@b.com"
    masked = vault.mask(text)
    assert len(vault.placeholders.nonces[0]) > 4
    assert vault.restore(masked.text, in_links=True) == text


# ---- nothing gets out of it --------------------------------------------------------------------------------


def test_no_copies(caplog: pytest.LogCaptureFixture) -> None:
    vault = Vault()
    with caplog.at_level(logging.DEBUG):
        vault.mask(TEXT)
    assert not caplog.records
    for copier in (copy.copy, copy.deepcopy, pickle.dumps, lambda v: copy.copy([v])[0].__reduce_ex__(2)):
        for one in (vault, vault.placeholders):
            with pytest.raises(TypeError, match="memory only"):
                copier(one)
    assert repr(vault) == str(vault) == "<Vault of 4 values: CARD: 1, EMAIL: 1, NAME: 1, PHONE: 1>"
    assert repr(Vault()) == "<Vault of 0 values>"
    assert sllm.Vault is Vault


def test_a_failing_detector_lets_nothing_out() -> None:
    vault = Vault([Fixed(NAME="Bob"), Failing()])
    with pytest.raises(sllm.LeakError, match="Failing failed with RuntimeError") as caught:
        vault.mask("the secret of Bob")
    assert "secret" not in str(caught.value) and caught.value.__cause__ is caught.value.__context__ is None
    assert len(vault) == 0 and vault.placeholders.nonces == ()
    with pytest.raises(sllm.LeakError, match="Failing"):
        vault.mask_messages([{"role": "user", "content": "x"}])
    with pytest.raises(sllm.LeakError, match="Failing"):
        egress_check("x", Vault([]), [Failing()])


@pytest.mark.parametrize(
    "findings",
    [
        [Finding(-1, 2, "NAME")],
        [Finding(0, 99, "NAME")],
        [Finding(2, 2, "NAME")],
        [Finding(3, 2, "NAME")],
        ["NAME"],
        [None],
        [Finding(0, 1, "name")],
        [Finding(0, 1, "")],
        [Finding(0, 1, "A]")],
        [Finding(0, 1, "TEXT")],
    ],
)
def test_invalid_findings(findings: list[Any]) -> None:
    with pytest.raises(sllm.LeakError, match="Given gave an invalid finding"):
        Vault([Given(findings)]).mask("a text")


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="no detector"):
        Vault([object()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected a text, got bytes"):
        Vault().mask(b"x")  # type: ignore[arg-type]
    with pytest.raises(sllm.LeakError, match="surrogates"):
        Vault().mask("\ud800")
    with pytest.raises(TypeError, match="expected text or bytes, got int"):
        egress_check(3, Vault())  # type: ignore[arg-type]


def test_several_threads() -> None:
    vault = Vault([Fixed(**{f"K{chr(65 + i)}": f"value{i}" for i in range(20)})])
    texts = [f"value{i} and value{(i * 7) % 20}" for i in range(20)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            text = rng.choice(texts)
            if vault.restore(vault.mask(text).text) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(vault.counts.values()) == [1] * 20


# ---- the last check ----------------------------------------------------------------------------------------


def test_egress_in_every_form() -> None:
    vault = Vault()
    masked = vault.mask(TEXT)
    egress_check(masked.text, vault)
    egress_check(masked.text.encode(), vault)
    egress_check(json.dumps({"messages": [{"content": masked.text}]}), vault)
    egress_check(json.dumps({"messages": [{"content": masked.text}]}, ensure_ascii=False).encode(), vault)
    for leak in (
        TEXT,
        TEXT.encode(),
        json.dumps({"a": TEXT}),
        urllib.parse.quote(TEXT),
        urllib.parse.quote_plus("张伟 hello"),
        base64.b64encode(b"zhang@example.com"),
        base64.urlsafe_b64encode(b"xx 13800138000 yy").decode(),
        "xyz" + base64.b64encode(b"13800138000").decode(),
        b"zhang@example.com".hex(),
        "ZHANG@EXAMPLE.COM",
        "1 3 8 0 0 1 3 8 0 0 0",
        "41111111 11111111",
        "ｚｈａｎｇ@example.com",
        "张 伟 张伟",
        "&#x5f20;&#x4f1f;",
        "13800\u200d138000",
    ):
        with pytest.raises(sllm.LeakError, match=r"still holds \d+ of kind") as caught:
            egress_check(leak, vault, [])
        for value in ("张伟", "13800138000", "zhang", "4111"):
            assert value not in str(caught.value)


def test_egress_scans_again() -> None:
    with pytest.raises(sllm.LeakError, match="1 of kind EMAIL"):
        egress_check("new@example.org", Vault())
    egress_check("new@example.org", Vault(), [])
    with pytest.raises(sllm.LeakError, match="1 of kind NAME"):
        egress_check("Bob", Vault([]), [Fixed(NAME="Bob")])
    with pytest.raises(sllm.LeakError, match="IDCARD"):
        egress_check(json.dumps("我的身份证是11010519491231002X"), Vault())


def test_bytes_that_are_no_text() -> None:
    for data in (b"\xff\xfe", b"abc\x80", "张".encode()[:2]):
        with pytest.raises(sllm.LeakError, match="no UTF-8"):
            egress_check(data, Vault([]))


def test_foreign_placeholders_are_text() -> None:
    vault = Vault()
    vault.mask("a@b.com")
    egress_check(f"[EMAIL_9_{vault.placeholders.nonces[0]}] [EMAIL_1_b2c3]", vault)


# ---- round trips -------------------------------------------------------------------------------------------

RNG = random.Random(7)
SAMPLES = [make(RNG) for make, _ in KINDS.values() for _ in range(12)]
PIECES = st.one_of(
    st.sampled_from(SAMPLES),
    st.text(max_size=8),
    st.sampled_from(
        [
            "我叫张伟",
            "张伟",
            "姓名：李小明",
            "密码：",
            "password=",
            "电话",
            " ",
            "\n",
            "，",
            "[",
            "]",
            "\\",
            "_",
            "[EMAIL_1_",
            "EMAIL_1",
            "\u200b",
            "\0",
            "%41",
            "\\u0041",
            "\\n",
            "&#49;",
            "Mr Smith",
            "1",
            "138",
            "@",
            "a@b.com",
            "９",
            "·",
            "Dear Anna Miller",
            "\u0130",
            "ß",
            "ﬁ",
            "é",
        ]
    ),
)
TEXTS = st.lists(PIECES, max_size=10).map("".join)


@given(TEXTS)
@examples(1000)
def test_round_trip(text: str) -> None:
    vault = Vault()
    masked = vault.mask(text)
    assert vault.restore(masked.text, in_links=True) == text
    chunks = Restorer(vault.placeholders, in_links=True)
    assert "".join(map(chunks.feed, masked.text)) + chunks.finish() == text
    assert chunks.n_restored >= sum(masked.counts.values())
    # Masking is complete: the second scan and the comparison find nothing.
    egress_check(masked.text, vault)
    egress_check(masked.text.encode(), vault, [])


class Runs:
    """Finds every run of x and y, and every digit: so that findings lie side by side and within words."""

    def detect(self, text: str) -> list[Finding]:
        return [
            Finding(m.start(), m.end(), "NAME" if m[0][0] in "xy" else "PHONE")
            for m in re.finditer("[xy]+|[0-9]", text)
        ]


@pytest.mark.timeout(900)
@given(
    st.text(alphabet="xyXY01 [_]\\NAMEPHOTXnameq\u200b１ｘ", max_size=10),
    st.lists(st.integers(0, 1000), min_size=1, max_size=2),
)
@examples(3500)
def test_round_trip_in_one_conversation(text: str, picks: list[int]) -> None:
    vault = Vault([Runs()])
    vault.mask("xy 1 y 0")
    for pick in picks:
        # Nonces, placeholders and pieces of them that the conversation has seen are part of the text.
        nonce = vault.placeholders.nonces[-1]
        seen = [
            nonce,
            f"[NAME_1_{nonce}]",
            f"name 1 {nonce.upper()}",
            "[NAME_1_",
            "[PHONE_1_",
            nonce[:2],
            nonce[2:],
            f"1_{nonce}]",
        ]
        at = pick % (len(text) + 1)
        text = f"{text[:at]}{seen[pick % len(seen)]}{text[at:]}"
        masked = vault.mask(text)
        assert vault.restore(masked.text, in_links=True) == text
    egress_check(masked.text, vault)  # of the last text, which holds all the others


def test_round_trip_of_the_corpus() -> None:
    vault = Vault()
    for case in cases(600, seed=11):
        masked = vault.mask(case.text)
        assert vault.restore(masked.text, in_links=True) == case.text
        for start, end, _ in case.spans:
            assert case.text[start:end] not in masked.text
        egress_check(masked.text, vault)

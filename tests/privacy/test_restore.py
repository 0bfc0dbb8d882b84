"""Restoring a stream: every chunking gives the same text, what models do to placeholders is undone, nothing
is guessed.
"""

from __future__ import annotations

import random
import re
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.privacy import Finding, Restorer, Vault


class Marked:
    """Finds what stands between « and »; the kind is told by the first letter."""

    KINDS: ClassVar = {"e": "EMAIL", "p": "PHONE", "n": "NAME", "a": "ADDRESS", "j": "PROJECT"}

    def detect(self, text: str) -> list[Finding]:
        return [
            Finding(m.start(), m.end(), self.KINDS.get(m[1][:1], "NAME"))
            for m in re.finditer("«([^«»\0]+)»", text)
        ]


def vault_with(*values: str) -> tuple[Vault, list[str]]:
    """A vault that holds the values, and their placeholders."""
    vault = Vault([Marked()])
    placeholders = [vault.mask(f"«{value}»").text for value in values]
    return vault, placeholders


MANY = ["n1", *(f"n{i}x" for i in range(2, 130)), "e1", "p1", "a1"]  # indices 1 to 132
VAULT, PLACEHOLDERS = vault_with(*MANY)
VALUES = [f"«{value}»" for value in MANY]
NONCE = VAULT.placeholders.nonces[0]


def pieces(text: str, cuts: list[int]) -> list[str]:
    at = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def restored(vault: Vault, chunks: list[str]) -> tuple[str, int, int]:
    restorer = Restorer(vault.placeholders)
    text = "".join(restorer.feed(chunk) for chunk in chunks) + restorer.finish()
    return text, restorer.n_restored, restorer.n_unknown


# ---- manglings ---------------------------------------------------------------------------------------------

WIDE = {ord(c): ord(c) + 0xFEE0 for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_[]"}


def mangle(placeholder: str, rng: random.Random) -> str:
    """One or two of the things that models and Markdown do to a placeholder."""
    parts = placeholder[1:-1].split("_")
    kind, index, nonce = parts[0], parts[1], parts[2]
    opening, closing, joint = "[", "]", "_"
    for how in rng.sample(range(11), rng.choice([1, 1, 2])):
        if how == 0:
            kind = kind.lower()
        elif how == 1:
            kind, nonce = kind.title(), nonce.upper()
        elif how == 2:
            opening, closing = "[ ", " ]"
        elif how == 3:
            opening = closing = ""
        elif how == 4:
            opening, closing = rng.choice([("【", "】"), ("［", "］"), ("〔", "〕")])
        elif how == 5:
            joint = "\\_"
        elif how == 6:
            index = index.zfill(rng.choice([2, 3, 4]))
        elif how == 7:
            kind, index, nonce = (part.translate(WIDE) for part in (kind, index, nonce))
        elif how == 8:
            joint = rng.choice([" ", "-", " _ ", "＿", "_\u200b"])
        elif how == 9:
            opening, closing = rng.choice([("[", ""), ("", "]")])
        else:
            opening, closing, joint = "\\[", "\\]", "\\_"
    return f"{opening}{kind}{joint}{index}{joint}{nonce}{closing}"


def test_mangled_placeholders_are_restored() -> None:
    rng = random.Random(0)
    right = wrong = 0
    for n in range(6000):
        i = rng.randrange(len(VALUES))
        before, after = rng.choice(
            [("请联系", "。"), ("Write to ", ", please"), ("", ""), ("(", ")"), ("“", "”"), ("**", "**")]
        )
        if before == "**":
            before, after = "** ", " **"
        mangled = mangle(PLACEHOLDERS[i], rng)
        text = f"{before}{mangled}{after}"
        got, *_ = restored(VAULT, list(text) if n % 2 else [text])
        right += got == f"{before}{VALUES[i]}{after}"
        # Another value than the right one must never appear.
        wrong += any(value in got for value in VALUES if value != VALUES[i])
    assert wrong == 0
    assert right >= 0.99 * 6000, right


@pytest.mark.parametrize(
    ("form", "n_restored"),
    [
        ("[NAME_2_{n}]", 1),
        ("[NAME_20_{n}]", 1),
        ("[NAME_1234_{n}]", 0),  # never issued
        ("[NAME_0_{n}]", 0),
        ("[NAME_2{n}]", 1),  # the joints were lost, and still only one reading is possible
        ("[NAME_2_{n}x]", 0),
        ("[NAME_2_x{n}]", 0),
        ("[NAME_2_]", 0),
        ("[NAME_{n}]", 0),
        ("[NAME_2a_{n}]", 0),
        ("[NAME_2.0_{n}]", 0),
        ("[A name that is far too long_2_{n}]", 0),
        ("[N.A.M.E._2_{n}]", 0),
        ("name2_2_{n}", 0),
        ("person_2_{n}", 0),  # without brackets: neither issued nor with a capital letter
        ("Call 2 {n}", 0),  # a word of the text
        ("Call\n_2_{n}", 0),
        ("NAME_2_{n}3", 0),
        ("A_name_that_is_far_too_long_2_{n}", 0),
        ("Customer_1_1_{n}", 0),  # two indices
        ("联系人_2_{n}", 0),
        ("2_{n}", 0),
        ("[NAME\n" + 30 * "\n" + "_2_{n}]", 0),
        ("%5BNAME_2_{n}x%5D", 0),
    ],
)
def test_nothing_is_guessed(form: str, n_restored: int) -> None:
    text = form.format(n=NONCE)
    for chunks in ([text], list(text)):
        got, n, _ = restored(VAULT, chunks)
        assert n == n_restored
        if not n_restored:
            assert got == text


@pytest.mark.parametrize(
    "form",
    [
        "[NAMES_2_{n}]",
        "[XNAME_2_{n}]",
        "PERSON_2_{n}",
        "[CONTACT_2_{n}]",
        "[nom_2_{n}]",
        "[Имя_2_{n}]",
        "[姓名_2_{n}]",
        "【人名 2 {n}】",
        "[Name der Person_2_{n}]",
        "[FULL_NAME_2_{n}]",
        "[FULL NAME 2 {n}]",
        "[2_{n}]",
        "[_2_{n}]",
        "%5BNAME_2_{n}%5D",
        "%5bNAME_2_{n}%5d",
        "%5BNAME_2_{n}",
        "\\u005bNAME_2_{n}\\u005d",
        "\\u005B姓名_2_{n}\\u005D",
        "&#91;NAME_2_{n}&#93;",
        "[NAME_2_\n{n}]",
        "[NAME_2_\\n{n}]",
        "[NAME_\r\n2_{n}]",
        "[\nNAME\n_2_{n}\n]",
        "[NAME_2\n  _{n}]",
        "Patient_2_{n}",
        "Patient-2-{n}",
        "Patient\\_2\\_{n}",
        "FULL_NAME_2_{n}",
        "PERSONAME_NAME_2_{n}",
        "Name_of_patient_2_{n}",
        "name_of_patient_2_{n}",
    ],
)
def test_index_and_nonce_say_what_it_is(form: str) -> None:
    for before, after in (("", ""), ("Write to ", ", please"), ("请联系", "。")):
        text = before + form.format(n=NONCE) + after
        for chunks in ([text], list(text)):
            got, n_restored, n_unknown = restored(VAULT, chunks)
            # Capital letters behind Chinese ones are a word of their own; behind others they would not be.
            assert (got, n_restored, n_unknown) == (f"{before}«n2x»{after}", 1, 0)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("[NAME_2_{n}_address]", "[«n2x»_address]"),
        ('"MADAM_2_{n}_1"', '"«n2x»_1"'),
        ("[NAME_2_{n}_moved_to_NAME_3_{n}]", "[«n2x»_moved_to_«n3x»]"),
        ("_NAME_2_{n}_", "_«n2x»_"),
        ("send_to_NAME_2_{n}()", "send_to_«n2x»()"),
        ("Full_name 2 {n}", "Full_«n2x»"),
        ("NAME_2_NAME_3_{n}", "NAME_2_«n3x»"),
    ],
)
def test_what_is_joined_to_a_placeholder_stays(form: str, expected: str) -> None:
    text = form.format(n=NONCE)
    for chunks in ([text], list(text), pieces(text, [3, 8, 15])):
        assert restored(VAULT, chunks) == (expected, expected.count("«"), 0)


def test_a_kind_that_contradicts_the_index() -> None:
    """The one phone is meant, not the name with that index; of many names it could be any."""
    for form, expected, unknown in (
        ("[PHONE_1_{n}]", "«p1»", 0),
        ("phone 2 {n}", "«p1»", 0),
        ("[NAME_131_{n}]", "[NAME_131_{n}]", 1),
        ("[TELEPHONE_131_{n}]", "«p1»", 0),
    ):
        text, expected = form.format(n=NONCE), expected.format(n=NONCE)
        for chunks in ([text], list(text)):
            assert restored(VAULT, chunks)[::2] == (expected, unknown)


def test_a_kind_that_was_not_issued() -> None:
    """Any word may stand for the kind, but for another of ours that the value cannot be."""
    vault, _ = vault_with("n1", "e1", "j1")
    n = vault.placeholders.nonces[0]
    for kind, index, expected in (
        ("PERSON", 1, "«n1»"),
        ("姓名", 1, "«n1»"),
        ("ORG", 1, "«n1»"),
        ("USER", 2, "«e1»"),
        ("URL", 2, "«e1»"),
        ("PHONE", 3, "«j1»"),  # of a kind of somebody else's nothing is known
        ("PHONE", 1, None),
        ("address", 1, None),
        ("PHONE", 2, None),
        ("PLACE", 2, None),
    ):
        text = f"[{kind}_{index}_{n}]"
        for chunks in ([text], list(text)):
            assert restored(vault, chunks) == (expected or text, bool(expected), not expected)


def test_an_index_that_begins_another() -> None:
    for i in (1, 2, 3, 12, 13, 99, 100, 128):
        # Behind NAME_1 (n1) come n2x, n3x and so on.
        value = "«n1»" if i == 1 else f"«n{i}x»"
        for text in (f"[NAME_{i}_{NONCE}]", f"NAME_{i}_{NONCE}", f"name {i} {NONCE}"):
            assert restored(VAULT, list(text))[0] == value


def test_brackets_of_the_text_stay() -> None:
    placeholder = f"NAME_2_{NONCE}"
    for text, expected in [
        (f"[[{placeholder}]]", "[«n2x»]"),
        (f"[see {placeholder}]", "[see «n2x»]"),
        (f"[{placeholder}](mailto:{placeholder})", f"«n2x»(mailto:{placeholder})"),
        (f"({placeholder})", "(«n2x»)"),
        (f"<{placeholder}>", "<«n2x»>"),
        (rf"\[{placeholder}]", r"\«n2x»"),
        (rf"\[{placeholder}\]", "«n2x»"),
        (f"{placeholder}]", "«n2x»"),
        (f"[{placeholder}", "«n2x»"),
        (f"{placeholder} ]", "«n2x» ]"),
        (f"[{placeholder} and", "«n2x» and"),
        (f"a[1] {placeholder}]", "a[1] «n2x»"),
    ]:
        assert restored(VAULT, [text])[0] == expected
        assert restored(VAULT, list(text))[0] == expected


def test_restored_text_is_not_looked_at_again() -> None:
    vault = Vault([Marked()])
    first = vault.mask("«nA»").text
    # The second value is the text of the first one's placeholder, with the nonce masked inside it.
    tricky = f"«n{first}»"
    second = vault.mask(tricky).text
    assert NONCE not in second
    assert vault.restore(second) == tricky
    assert vault.restore(f"{second} {first}") == f"{tricky} «nA»"


def test_unknown_placeholders_stay_and_are_counted() -> None:
    text = f"[EMAIL_777_{NONCE}] and [PHONE_3_b7c8], [NAME_2_{NONCE}], name 555 {NONCE}, a[1], [see_it], [x]"
    for chunks in ([text], list(text), pieces(text, [5, 9, 30, 44])):
        got, n_restored, n_unknown = restored(VAULT, chunks)
        assert got == text.replace(f"[NAME_2_{NONCE}]", "«n2x»")
        assert (n_restored, n_unknown) == (1, 3)


@pytest.mark.parametrize(
    ("form", "n_unknown"),
    [
        ("[NAME_1]", 1),
        ("[ name_01 ]", 1),
        ("[NAME\n_1]", 1),
        ("%5BNAME_1%5D", 1),
        ("\\u005bNAME_1\\u005d", 1),
        ("[NAME_999]", 0),  # none has this index
        ("[FIG_1]", 0),
        ("[步骤_1]", 0),
        ("a[1]", 0),
        ("[NAME_{n}]", 1),
        ("the one with {n}", 1),
        ("%5BNAME_999_{n}%5D", 1),
        ("[NAME_2_{n}x] [NAME_2_x{n}]", 2),
        ("{n}{n}", 2),
        ("[NOM_1_b7c8] %5BNOM_1_b7c8%5D \\u005bNAME_1_b7c8\\u005d [NAME_1_\nb7c8] [NAME_1_\\nb7c8]", 5),
    ],
)
def test_every_miss_is_counted(form: str, n_unknown: int) -> None:
    text = form.format(n=NONCE)
    for chunks in ([text], list(text), pieces(text, [3, 7, 12])):
        assert restored(VAULT, chunks) == (text, 0, n_unknown)


def test_only_what_can_become_a_placeholder_is_held_back() -> None:
    for text, held in [
        ("hello", ""),
        ("hello [", "["),
        ("hello [x", "[x"),
        ("hello [x.", ""),
        ("hello [NA", "[NA"),
        ("hello [NAX", "[NAX"),
        ("hello NAX", "NAX"),
        ("hello nax", ""),
        ("hello Nax", "Nax"),
        ("hello Nax ", ""),
        ("hello Nax_", "Nax_"),
        ("hello Nax_of", "Nax_of"),
        ("Nax_" * 7, "Nax_" * 5),
        ("NAME_", "NAME_"),
        ("[NAME_12", "[NAME_12"),
        ("[NAME_999", "[NAME_999"),
        ("[NAME_999,", ""),
        ("[PHONE_1", "[PHONE_1"),
        ("[FAX_1", "[FAX_1"),
        (f"[NAME_1_{NONCE[:2]}", f"[NAME_1_{NONCE[:2]}"),
        ("[NAME_1_0", ""),
        (f"[NAME_1_{NONCE}", f"[NAME_1_{NONCE}"),
        (f"[NAME_1_{NONCE}] ", ""),
        ("ends with a backslash \\", "\\"),
        ("unnamed", ""),
        ("a \\x", ""),
        ("[" * 50, "["),
        ("[" + "a" * 30, ""),
        ("%5", "%5"),
        ("%50", ""),
        ("name" + " " * 10, ""),
        ("[NAME_" + 20 * "0", ""),
    ]:
        restorer = Restorer(VAULT.placeholders)
        out = restorer.feed(text)
        assert restorer.finish() != "" or held == ""
        if NONCE not in text or held:
            assert out == text[: len(text) - len(held)]


@pytest.mark.parametrize(("in_links", "bound"), [(True, 160), (False, 160 + 512)])
def test_what_is_held_back_is_bounded(in_links: bool, bound: int) -> None:
    """Where links matter, the rest of a host name is held back too."""
    rng = random.Random(1)
    alphabet = ["[", "NAME", "_", "1", "0", " ", "\\", NONCE, NONCE[:2], "]", "n", "\u200b", "＿", "é"]
    longest = 0
    for _ in range(300):
        restorer = Restorer(VAULT.placeholders, in_links=in_links)
        n_in = n_out = 0
        for _ in range(60):
            piece = rng.choice(alphabet)
            n_in += len(piece)
            before = restorer.n_restored
            out = restorer.feed(piece)
            n_out += len(out)
            if restorer.n_restored == before == 0:
                longest = max(longest, n_in - n_out)
    assert 0 < longest <= bound


def test_an_empty_vault_changes_nothing() -> None:
    text = "[EMAIL_1_k7q4] \\[NAME"
    restorer = Restorer(Vault([]).placeholders)
    assert restorer.feed(text) == text
    assert restorer.finish() == ""
    assert restorer.n_unknown == 1


def test_placeholders_issued_while_restoring() -> None:
    vault = Vault([Marked()])
    restorer = Restorer(vault.placeholders)
    assert restorer.feed("none so far. ") == "none so far. "
    placeholder = vault.mask("«e9»").text
    assert restorer.feed(placeholder) + restorer.finish() == "«e9»"


def test_feed_after_finish_is_refused() -> None:
    restorer = Restorer(VAULT.placeholders)
    restorer.feed("[NAME_1")
    assert restorer.finish() == "[NAME_1"
    assert restorer.finish() == ""
    with pytest.raises(ValueError, match="finished"):
        restorer.feed("x")
    with pytest.raises(TypeError, match="bytes"):
        Restorer(VAULT.placeholders).feed(b"x")  # type: ignore[arg-type]
    assert "n1" not in repr(restorer)


# ---- every chunking ----------------------------------------------------------------------------------------

BITS = [
    "[",
    "]",
    "\\",
    "_",
    " ",
    "【",
    "［",
    "NAME",
    "name_",
    "EMAIL_1",
    "[PHONE_",
    "0",
    "00",
    "1",
    NONCE,
    NONCE.upper(),
    "\\_",
    "\n",
    "是",
    "x",
    "Na",
    "[e",
    f"[NAME_9999_{NONCE}]",
    "[NAME_1_b2c3]",
    "\u200b",
    "ＮＡＭＥ",
    "Patient_1_",
    "_of_",
]
PARTS = st.one_of(
    st.sampled_from(PLACEHOLDERS),
    st.sampled_from(PLACEHOLDERS).flatmap(
        lambda p: st.integers(0, 10**6).map(lambda s: mangle(p, random.Random(s)))
    ),
    st.sampled_from(BITS),
    st.text(max_size=3),
)
STREAMS = st.lists(PARTS, max_size=6).map("".join)


ODD = "aé１\u0301ß中\U0001f600 K\t0İ"


def stream(data: bytes) -> str:
    """A text of placeholders, mangled ones, pieces and odd characters: one of them for each byte."""
    parts = []
    for byte in data:
        name = PLACEHOLDERS[byte % len(PLACEHOLDERS)]
        parts.append(
            name
            if byte < 60
            else mangle(name, random.Random(byte))
            if byte < 130
            else BITS[byte % len(BITS)]
            if byte < 240
            else ODD[byte % len(ODD)]
        )
    return "".join(parts)


# Bytes, because drawing each part from a strategy of its own costs several times what the test does.
@given(st.binary(max_size=8), st.binary(max_size=6))
@examples(5500)
def test_every_chunking_gives_the_same(data: bytes, at: bytes) -> None:
    text = stream(data)
    cuts = [one * 257 + i for i, one in enumerate(at)]
    whole = restored(VAULT, [text])
    assert restored(VAULT, pieces(text, cuts)) == whole
    assert restored(VAULT, list(text)) == whole


@given(STREAMS)
@examples(500)
def test_every_single_cut(text: str) -> None:
    whole = restored(VAULT, [text])
    for cut in range(len(text) + 1):
        assert restored(VAULT, [text[:cut], text[cut:]]) == whole

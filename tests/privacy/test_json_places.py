"""JSON within texts: found as it is, masked so that it stays valid, restored so that it says the same."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import examples

from sllm.privacy import Finding, Restorer, Vault, egress_check
from sllm.privacy.json_places import JsonPlaces

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["«a»", '"«b\\c»"', "x\n«d\t»", "«\\»«/é»", "\u2028«é»", "«\U0001f600»"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.builds(
    lambda value, escaped, indent: json.dumps(value, ensure_ascii=escaped, indent=indent),
    st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=6), VALUES, min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
)


class Anything:
    """Finds what a pattern matches, wherever that begins and ends: within escapes, across quotes."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.S)

    def detect(self, text: str) -> list[Finding]:
        return [
            Finding(found.start(), found.end(), "NAME") for found in self.pattern.finditer(text) if found[0]
        ]


def kinds(text: str) -> list[tuple[str, str]]:
    return [(text[part.start : part.end], part.kind) for part in JsonPlaces().feed(text)]


# ---- where there is JSON -----------------------------------------------------------------------------------


@given(DOCUMENTS)
@examples(200)
def test_documents_are_json_from_end_to_end(text: str) -> None:
    parts = JsonPlaces().feed(text)
    assert "".join(text[part.start : part.end] for part in parts) == text
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert sum(one.kind == "string" for one in parts) == sum(map(bool, strings))


@given(DOCUMENTS)
@examples(200)
def test_cuts_within_strings_change_nothing(text: str) -> None:
    """As placeholders cut them."""
    strings = [one for one in JsonPlaces().feed(text) if one.kind == "string"]
    cuts = [(one.start + one.end) // 2 for one in strings if "\\" not in text[one.start : one.end]]
    places = JsonPlaces()
    for start, end in itertools.pairwise([0, *cuts]):
        places.feed(text[start:end])
        assert places.place == "string"
    places.feed(text[[0, *cuts][-1] :])
    assert (places.place, places.certain) == ("", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('log: {"a": 1} done', [('{"', "structure"), ("a", "string"), ('": ', "structure"), ("1", "scalar"),
                                ("}", "structure")]),
        ('x\n  [1.5e3, null]', [("[", "structure"), ("1.5e3", "scalar"), (", ", "structure"),
                                ("null", "scalar"), ("]", "structure")]),
        ("see [1] and f(x) { return 1; }", []),
        ("[2024-06-17 12:00] up", [("[", "structure")]),
        ("a [x", []),
    ],
)  # fmt: skip
def test_what_is_json_in_a_text(text: str, expected: list[tuple[str, str]]) -> None:
    assert kinds(text) == expected


def test_deep_nesting_is_no_matter_of_recursion() -> None:
    text = '{"a": ' + "[" * 100_000
    assert "".join(part for part, _ in kinds(text)).startswith('{"a": [[')


# ---- masking and restoring ---------------------------------------------------------------------------------


def same(vault: Vault, text: str) -> None:
    """The text is masked and restored, in one piece, in many, and as anybody would do it who uses JSON."""
    masked = vault.mask(text).text
    value = json.loads(masked)
    assert vault.restore(masked, in_links=True) == text
    restorer = Restorer(vault.placeholders, in_links=True)
    assert "".join(map(restorer.feed, masked)) + restorer.finish() == text
    assert restorer.n_unknown == 0
    # A program on the other side reads it and writes it in its own way.
    again = vault.restore(json.dumps(value, ensure_ascii=len(text) % 2 == 0), in_links=True)
    assert json.loads(again) == json.loads(text)


PATTERNS = [r"«[^»]*»|\d{3,}", r"[^a]{1,5}", r"\\.|e", r"\W+", r".+", r"[0-9tfn\"]", r"u...", r"[,:] ?.."]


@given(DOCUMENTS, st.sampled_from(PATTERNS))
@examples(150)
def test_json_in_json_out(text: str, pattern: str) -> None:
    same(Vault([Anything(pattern)]), text)


def made_up(rng: random.Random, depth: int) -> Any:
    """A value of JSON, of as many kinds as there are and with much to trip over in its texts."""
    if depth and rng.random() < 0.7:
        if rng.random() < 0.5:
            return [made_up(rng, depth - 1) for _ in range(rng.randrange(4))]
        return {made_up_text(rng): made_up(rng, depth - 1) for _ in range(rng.randrange(4))}
    pick = rng.randrange(5)
    if pick < 2:
        return made_up_text(rng)
    return (rng.randrange(-(10**12), 10**12), rng.random() * 10 ** rng.randrange(-9, 9), bool(depth))[
        pick - 2
    ]


ODD = [
    "a",
    "«é»",
    '"',
    "\\",
    "\n",
    "张",
    "\U0001f600",
    "{",
    "]",
    ":",
    ", ",
    "123",
    "\x01",
    "/",
    "null",
    "\u2028",
]


def made_up_text(rng: random.Random) -> str:
    return "".join(rng.choice(ODD) for _ in range(rng.randrange(6)))


def test_json_in_json_out_ten_thousand_times() -> None:
    rng = random.Random(17)
    for n in range(10_000):
        value = [made_up(rng, 1)] if n % 3 else {made_up_text(rng): made_up(rng, 1)}
        text = json.dumps(value, ensure_ascii=bool(n % 2), indent=2 if n % 5 == 0 else None)
        vault = Vault([Anything(PATTERNS[n % len(PATTERNS)])])
        masked = vault.mask(text).text
        json.loads(masked)
        assert json.loads(vault.restore(masked, in_links=True)) == value


@given(st.text(alphabet='{}[]",:\\\n «»0123456789.-eE+truefalsnNAME_\x00张', max_size=40))
@example('{"«\n»')
@example('{"a": "x«\x01c» d"}')
@example('{"a": «x»}')
@examples(500)
def test_what_is_nearly_json_comes_back_as_it_was(text: str) -> None:
    vault = Vault([Anything(r"«[^»]*»|\d{2,}|张")])
    masked = vault.mask(text).text
    assert vault.restore(masked, in_links=True) == text
    restorer = Restorer(vault.placeholders, in_links=True)
    assert "".join(map(restorer.feed, masked)) + restorer.finish() == text


def test_the_detectors_of_every_day() -> None:
    vault = Vault()
    order = {
        "customer": {"name": "Desmond Hargrove", "phone": 13812345670, "id": "order-1"},
        "note": '他说："电话是13812345670"\n密码：Tx4\\kQ!92ab',
        "amounts": [1, 2.5, 13812345670],
    }
    for text in (json.dumps(order), json.dumps(order, ensure_ascii=False, indent=1)):
        masked = vault.mask(text).text
        assert "13812345670" not in masked and "92ab" not in masked
        egress_check(masked, vault)
        assert json.loads(vault.restore(masked)) == order
        assert vault.restore(masked, in_links=True) == text
    # One number is one thing to the model, whatever stands around it.
    indices = set(re.findall(r"PHONE_(\d+)", masked))
    assert len(indices) == 1


def test_arguments_of_tools() -> None:
    vault = Vault()
    arguments = {"phone": 13812345670, "n": 3, "who": {"id": "zhang@example.com", "type": "13812345670"}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    masked = vault.mask_messages([{"role": "assistant", "tool_calls": [call]}]).messages[0]["tool_calls"][0]
    assert masked["id"] == "c1" and masked["type"] == "function"
    sent = json.loads(masked["function"]["arguments"])
    assert sent["n"] == 3 and "138" not in str(sent) and "zhang" not in str(sent)
    assert json.loads(vault.restore(masked["function"]["arguments"])) == arguments
    # As a mapping, where nothing is of the format.
    call["function"] = {"name": "f", "arguments": arguments}
    masked = vault.mask_messages([{"role": "assistant", "tool_calls": [call]}]).messages[0]["tool_calls"][0]
    assert "138" not in str(masked) and "zhang" not in str(masked)
    assert json.loads(vault.restore(json.dumps(masked["function"]["arguments"]))) == arguments


def vault_of(value: str) -> tuple[Vault, str]:
    vault = Vault([Anything(re.escape(value))])
    return vault, vault.mask(value).text


@pytest.mark.parametrize("value", ['a"b', "a\\b", "line\nbreak", "tab\t", "\x07", "张伟", "</x>", "\u2028"])
def test_what_a_model_writes_as_json_stays_valid(value: str) -> None:
    vault, placeholder = vault_of(value)
    for text, expected in (
        (f'{{"x": "{placeholder}"}}', {"x": value}),
        (f'{{"x": "for {placeholder}, \\"him\\""}}', {"x": f'for {value}, "him"'}),
        (f'{{"{placeholder}": 1}}', {value: 1}),
        (f'["a", "{placeholder}"]', ["a", value]),
        # Quotes forgotten.
        (f'{{"x": {placeholder}, "y": [{placeholder}]}}', {"x": value, "y": [value]}),
        (placeholder.replace("[", '{"x": "\\u005b').replace("]", '\\u005d"}'), {"x": value}),
    ):
        for pieces in ([text], list(text)):
            restorer = Restorer(vault.placeholders)
            got = "".join(map(restorer.feed, pieces)) + restorer.finish()
            assert json.loads(got) == expected
    # In ordinary text, and behind JSON, it is written as it is.
    for before, after in (
        ("", ""),
        ("x ", ""),
        ('he said "', '"'),
        ('{"a": 1} ', ""),
        ("[", "]"),
        ("{", "}"),
    ):
        assert vault.restore(f"{before}{placeholder}{after}") == f"{before}{value}{after}"


def test_a_number_has_no_quotes_only_where_it_is_a_value() -> None:
    vault = Vault([Anything("1381234")])
    masked: Any = json.loads(vault.mask('{"n": 1381234}').text)
    number = masked["n"]
    for text, expected in (
        (f'{{"m": "{number}"}}', '{"m": 1381234}'),
        (f'{{"m": {number}}}', '{"m": 1381234}'),
        (f'{{"m": "n {number}"}}', '{"m": "n 1381234"}'),
        (f'{{"m": "{number} n"}}', '{"m": "1381234 n"}'),
        (f'{{"{number}": 1}}', '{"1381234": 1}'),
        (f'call "{number}" now', 'call "1381234" now'),
        (f"call {number} now", "call 1381234 now"),
    ):
        for pieces in ([text], list(text)):
            restorer = Restorer(vault.placeholders)
            assert "".join(map(restorer.feed, pieces)) + restorer.finish() == expected


def test_a_value_with_escapes_is_known_without_them() -> None:
    vault = Vault([Anything(r"pa.{1,2}ss\d")])
    vault.mask(r'{"p": "pa\\ss7"}')
    vault._detectors = ()
    assert "ss7" not in vault.mask(r"later, in prose: pa\ss7").text
    assert "ss7" not in vault.mask(r'{"again": "pa\\ss7"}').text

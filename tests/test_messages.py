"""Chat messages: what is malformed, every text in them, and a conversation as one text."""

from __future__ import annotations

import copy
import enum
import json
from collections import UserDict, UserList
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.messages import (
    MessageError,
    NotTextError,
    checked_messages,
    conversation_text,
    map_texts,
    text_parts,
    texts_of,
)

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "text", "text": "And when?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "index": 0,
                "function": {"name": "look_up", "arguments": {"who": "Ann", "born": 1969, "alive": True}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "{}", "name": "look_up"},
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


# ---- every text


@examples(200)
@given(JSON)
def test_what_changes_nothing_makes_a_copy(value: Any) -> None:
    options: dict[str, Any]
    for options in ({}, {"change_number": str}, {"format_names": False}, {"where": "messages"}):
        made = map_texts(value, lambda text: text, **options)
        assert made == value
        assert repr(made) == repr(value)  # no number has become a text, no text a number
        assert made is not value or not isinstance(value, (list, dict))


@examples(200)
@given(JSON)
def test_texts_come_in_the_order_in_which_they_are_replaced(value: Any) -> None:
    """Two walks, one to collect and one to replace, as a vault makes them."""
    for vault in (False, True):
        texts = texts_of(value, numbers=vault, format_names=not vault)
        each = iter(texts)

        def check(text: str, each: Any = each) -> str:
            assert text == next(each)
            return text

        map_texts(value, check, change_number=check if vault else None, format_names=not vault)
        assert next(each, None) is None


def test_every_text_of_a_conversation() -> None:
    before = copy.deepcopy(TALK)
    said = ["Be brief.", "Who?", "And when?", "look_up", "who", "Ann", "born", "alive", "{}", "look_up"]
    assert texts_of(TALK, format_names=False) == said
    with_numbers = texts_of(TALK, format_names=False, numbers=True)
    assert [text for text in with_numbers if text not in said] == ["0", "1969"]
    everything = texts_of(TALK)
    assert {"role", "system", "type", "function", "tool_call_id", "call_1"} <= set(everything)

    made = map_texts(TALK, str.upper, format_names=False)
    assert made[0] == {"role": "system", "content": "BE BRIEF."}
    assert made[1]["content"] == [{"type": "text", "text": "WHO?"}, {"type": "text", "text": "AND WHEN?"}]
    call = made[2]["tool_calls"][0]
    assert (call["id"], call["type"], call["index"]) == ("call_1", "function", 0)
    assert call["function"] == {"name": "LOOK_UP", "arguments": {"WHO": "ANN", "BORN": 1969, "ALIVE": True}}
    assert before == TALK


def test_numbers_become_texts_only_where_they_change() -> None:
    value = [1, 2.5, True, None, 13800138000]
    made = map_texts(value, str, change_number=lambda text: "[PHONE]" if len(text) == 11 else text)
    assert made == [1, 2.5, True, None, "[PHONE]"]
    assert [type(item) for item in made] == [int, float, bool, type(None), str]


def test_in_what_is_data_nothing_is_of_the_format() -> None:
    """An id in a tool's arguments or in its answer is somebody's, and not the message's."""
    call = {"id": "call_1", "type": "function"}
    data = {"id": "a", "type": "b", "role": ["c"], "index": 7, "name": {"content": "d"}, "text": {"id": "e"}}
    upper = {
        "ID": "A", "TYPE": "B", "ROLE": ["C"], "INDEX": "7!", "NAME": {"CONTENT": "D"}, "TEXT": {"ID": "E"}
    }  # fmt: skip
    for before, after in (
        ({**call, "function": {"arguments": data}}, {**call, "function": {"arguments": upper}}),
        ({**call, "content": data}, {**call, "content": upper}),
        ({**call, "input": data}, {**call, "INPUT": upper}),
        # Parts of a content are of the format.
        ({"content": [{"type": "text", "id": "a"}]}, {"content": [{"type": "text", "id": "a"}]}),
    ):
        made = map_texts([before], str.upper, format_names=False, change_number=lambda text: f"{text}!"[-2:])
        assert made == [after]


def test_what_mappings_sequences_and_strings_there_are() -> None:
    class Role(str, enum.Enum):
        USER = "user"

    value = UserDict({"role": Role.USER, "content": UserList([("x", Role.USER)])})
    made = map_texts(value, lambda text: text)
    assert made == {"role": "user", "content": [["x", "user"]]}
    assert type(made) is dict and type(made["role"]) is str
    assert json.dumps(made) == '{"role": "user", "content": [["x", "user"]]}'


@pytest.mark.parametrize("bad", [b"bytes", bytearray(b"x"), {1, 2}, object(), 3.5j])
def test_what_is_no_text(bad: Any) -> None:
    with pytest.raises(MessageError, match=f"holds a {type(bad).__name__}; expected text"):
        map_texts([{"role": "user", "content": bad}], str)
    with pytest.raises(MessageError, match=r"^messages\[0\]\['content'\] is an? .*; expected what JSON"):
        map_texts([{"role": "user", "content": bad}], str, where="messages")


def test_an_error_quotes_no_key_unless_asked_to() -> None:
    for bad in ({"secret": {"secret": b""}}, {"secret": {b"secret": ""}}):
        with pytest.raises(MessageError) as caught:
            texts_of([bad])
        assert "secret" not in str(caught.value)
    with pytest.raises(MessageError, match=r"^tools\[0\]\['known'\] has a key that is an int"):
        map_texts([{"known": {1: "x"}}], str, where="tools")


def test_what_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(MessageError, match="a message is nested more than 64 levels deep"):
        texts_of(loop)
    with pytest.raises(MessageError, match=r"^messages\[0\]\[0\].*\.\.\. is nested more than 64 levels deep"):
        map_texts(loop, str, where="messages")


def test_mappings_are_shown_before_what_is_in_them() -> None:
    def no_images(mapping: Any) -> None:
        if mapping.get("type") == "image_url":
            raise PermissionError("image_url")

    content = [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": {"url": object()}}]
    with pytest.raises(PermissionError, match="image_url"):
        texts_of([{"role": "user", "content": content}], check_mapping=no_images)


# ---- checks


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "messages is a str; expected a list"),
        (None, "messages is missing or None; expected a list"),
        ([], "messages is empty"),
        ([["user", "x"]], r"messages\[0\] is a list"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] is missing"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
    ],
)
def test_malformed_messages(messages: Any, said: str) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=said):
            checked_messages(messages)


def test_contents_are_checked_where_that_is_asked_for() -> None:
    assert checked_messages(TALK) is TALK
    assert checked_messages(TALK, contents=True) is TALK
    oddities: list[dict[str, Any]] = [
        {"role": "", "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": None, "tool_calls": []},
    ]
    for odd in oddities:
        assert checked_messages([odd]) == [odd]
        with pytest.raises(MessageError, match="expected"):
            checked_messages([odd], contents=True)


# ---- as one text


def test_the_conversation_as_one_text() -> None:
    assert conversation_text(TALK[:2]) == "system: Be brief.\nWho?\nAnd when?"
    assert (
        conversation_text([{"role": "user", "content": "Who?", "name": None, "tool_calls": None}]) == "Who?"
    )
    whole = conversation_text(TALK)
    assert '"arguments": {"who": "Ann", "born": 1969, "alive": true}' in whole
    assert whole.endswith("tool: {}")
    assert text_parts("x") == ["x"]
    assert text_parts(["x", {"type": "text", "text": "y"}]) == ["x", "y"]


@pytest.mark.parametrize("content", ["", " \n", None, [], "\ud800", 7, b"x", [{"type": "image_url"}], [3]])
def test_no_text(content: Any) -> None:
    with pytest.raises(NotTextError):
        conversation_text([{"role": "user", "content": content}])

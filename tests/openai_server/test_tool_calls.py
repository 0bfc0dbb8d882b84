"""Calls of tools: read where the template says how they are written, and text everywhere else."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from chat_models import HERMES
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

import sllm
from sllm.openai_server.tool_calls import DemandedCall, ToolCalls, calls_schema, writes_tool_calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


def read(*pieces: str, names: tuple[str, ...] = ("weather",)) -> tuple[str, list[tuple[str, Any]]]:
    """The text that is left, and the calls."""
    reader, texts, calls = ToolCalls(names), [], []
    for piece in pieces:
        text, found = reader.feed(piece)
        texts.append(text)
        calls += [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found]
    assert reader.n_calls == len(calls)
    return "".join([*texts, reader.finish()[0]]), calls


def test_a_demanded_call_is_all_there_is() -> None:
    for text, calls in [('{"name": "weather", "arguments": {"city": "巴黎"}}', 1), ('{"name": "weat', 0)]:
        reader = DemandedCall()
        assert [reader.feed(character) for character in text] == [("", [])] * len(text)
        left, found = reader.finish()
        assert reader.n_calls == len(found) == calls
        assert left == ("" if calls else text)
        assert [json.loads(call["function"]["arguments"]) for call in found] == [PARIS[1]] * calls


def test_references_of_parameters_hold_where_they_are_put() -> None:
    def tool(name: str) -> Any:
        inner = {"type": "array", "items": {"$ref": "#/$defs/Inner"}}
        parameters = {
            "properties": {
                "a": {"$ref": "#/$defs/Inner"},
                "b": {"$ref": "#"},
                "$ref": {"const": "#"},
                "c": inner,
            },
            "$defs": {"Inner": {"type": "string"}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    def found(schema: Any) -> list[str]:
        if isinstance(schema, list):
            return [ref for item in schema for ref in found(item)]
        if not isinstance(schema, dict):
            return []
        here = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return here + [ref for item in schema.values() for ref in found(item)]

    for tools, places in [
        ([tool("f")], ["#/properties/arguments"]),
        ([tool("f"), tool("g")], [f"#/anyOf/{i}/properties/arguments" for i in range(2)]),
    ]:
        schema = calls_schema(tools)
        expected = [f"{place}{rest}" for place in places for rest in ("/$defs/Inner", "", "/$defs/Inner")]
        assert found(schema) == expected
        for ref in expected:
            at: Any = schema
            for step in ref.removeprefix("#/").split("/"):
                at = at[int(step) if isinstance(at, list) else step]


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        (None, False),
        ({}, False),
        ({"type": "object", "properties": {"a": {}}}, False),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, True),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, None),
    ],
)
def test_arguments_are_those_that_are_named(parameters: Any, closed: bool | None) -> None:
    schema = calls_schema([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert schema["properties"]["arguments"].get("additionalProperties") is closed
    sllm.SamplingParams(json_schema=schema)


PARIS = ("weather", {"city": "巴黎"})


@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        (CALL, "", [PARIS]),
        (f"I look.\n{CALL}\n{CALL}\n", "I look.\n", [PARIS, PARIS]),
        (f"{CALL} Done.", " Done.", [PARIS]),
        ("no call <tool", "no call <tool", []),
        ("<tool_call>\nnot JSON\n</tool_call>", None, []),
        ('<tool_call>{"name": "weather"}</tool_call>', "", [("weather", {})]),
        ('<tool_call>{"name": "weather", "arguments": "text"}</tool_call>', None, []),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": 1}</tool_call>', None, []),
        (f"<tool_call>{'[' * 10_000}</tool_call>", None, []),
        ('<tool_call>\n{"name": "weather"', None, []),
    ],
)
def test_what_is_read(text: str, left: str | None, calls: list[Any]) -> None:
    assert read(text) == (text if left is None else left, calls)


@examples(100)
@given(st.lists(st.integers(0, 200), max_size=12))
def test_where_the_pieces_end_makes_no_difference(cuts: list[int]) -> None:
    text = f"First <tool {CALL}\n<tool_call>nothing</tool_call> then {CALL} end <tool_call>{{"
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(*(text[a:b] for a, b in pairwise(at))) == read(text)


def test_nothing_is_shown_before_it_is_certain() -> None:
    reader = ToolCalls(["weather"])
    assert reader.feed("I look. <tool") == ("I look. ", [])
    assert reader.feed("box> <") == ("<toolbox> ", [])
    assert reader.finish() == ("<", [])


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (HERMES, True),
        (HERMES.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>"), False),
        (HERMES.replace('"arguments"', '"parameters"'), False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("Call tools like this: <tool_call>{}</tool_call>", False),
        ("{% if %}", False),
        ("{{ raise_exception('no tools') }}", False),
        (None, False),
    ],
)
def test_the_template_says_whether_calls_are_read(
    template: str | None, reads: bool, target_model: sllm.Model
) -> None:
    assert writes_tool_calls(template, target_model.vocab) is reads

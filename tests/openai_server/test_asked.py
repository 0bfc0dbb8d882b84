"""What a request may ask for, and what it is told where it may not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.engine.sampling import SamplingParams
from sllm.openai_server.asked import asked_chat, asked_completion
from sllm.openai_server.problems import RequestError

HI = [{"role": "user", "content": "hi"}]


def chat(**body: Any) -> Any:
    return asked_chat({"messages": HI, **body})


def completion(**body: Any) -> Any:
    return asked_completion({"prompt": "Once", **body})


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function(n) for n in names]}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


def test_what_is_left_out_is_left_open() -> None:
    asked = chat()
    assert (asked.n, asked.stream, asked.max_tokens, asked.stop, asked.logprobs) == (1, False, None, (), None)
    assert asked.sampling == {} and asked.model is None
    assert completion(temperature=None, stop=None, n=None) == completion()


def test_names_are_translated() -> None:
    asked = chat(
        model="m",
        max_completion_tokens=7,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        frequency_penalty=1,
        presence_penalty=-1,
        seed=-1,
        logit_bias={"5": -100, "6": 1.5},
        stop="end",
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=4,
        user="somebody",
        store=False,
        parallel_tool_calls=True,
    )
    assert (asked.model, asked.max_tokens, asked.stop, asked.logprobs) == ("m", 7, ("end",), 4)
    assert asked.stream and asked.include_usage
    params = SamplingParams(**asked.sampling)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 3, 0.1)
    assert (params.penalty_freq, params.penalty_present, params.seed) == (1, -1, 2**64 - 1)
    assert params.logit_bias == ((5, -100.0), (6, 1.5))


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_response_format(given: Any, schema: Any) -> None:
    assert chat(response_format=given).sampling.get("json_schema") == schema


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ("Once",)),
        ([1, 2], ((1, 2),)),
        (["Once", "Twice"], ("Once", "Twice")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["Once", [1]], ("Once", (1,))),
    ],
)
def test_prompts(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("choice", "names", "demanded"),
    [
        (None, ["f", "g"], False),
        ("auto", ["f", "g"], False),
        ("none", [], False),
        ("required", ["f", "g"], True),
        (function("g"), ["g"], True),
        (allowed("auto", "f"), ["f"], False),
        (allowed("required", "g", "f"), ["f", "g"], True),
    ],
)
def test_which_tools_may_be_called(choice: Any, names: list[str], *, demanded: bool) -> None:
    asked = chat(tools=[function("f"), function("g")], tool_choice=choice)
    assert [tool["function"]["name"] for tool in asked.tools] == names
    assert asked.demands_call is demanded
    assert ("json_schema" in asked.sampling) is demanded
    assert asked.several_calls
    assert not chat(parallel_tool_calls=False).several_calls


def test_a_developer_is_the_system_that_templates_know() -> None:
    assert chat(messages=[{"role": "developer", "content": "x"}]).messages == [
        {"role": "system", "content": "x"}
    ]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"logit_bias": []}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": None}}, "logit_bias", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"more": 1}}, "more", "unknown_parameter"),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "invalid_value"),
        ({"tools": "all"}, "tools", "invalid_value"),
        ({"tools": [function("f", parameters=[])]}, "tools", "invalid_value"),
        (
            {"tools": [function("f", parameters=deep(3000))], "tool_choice": "required"},
            "tools",
            "invalid_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": function("f")}, "tool_choice", "invalid_value"),
        ({"tools": [function("f")], "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tools": [function("f")], "tool_choice": function("g")}, "tool_choice", "invalid_value"),
        (
            {"tools": [function("f")], "tool_choice": allowed("auto", "f", "g")},
            "tool_choice",
            "invalid_value",
        ),
        ({"tools": [function("f")], "tool_choice": allowed("any", "f")}, "tool_choice", "invalid_value"),
        ({"parallel_tool_calls": 0}, "parallel_tool_calls", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities", "invalid_value"),
        ({"store": True}, "store", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"tempreature": 1}, "tempreature", "unknown_parameter"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "invalid_value"),
        ({"model": 3}, "model", "invalid_value"),
    ],
)
def test_what_a_chat_may_not_ask_for(body: Any, param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**body)
    problem = caught.value
    assert (problem.status, problem.param, problem.code) == (400, param, code)
    assert problem.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"messages": HI}, "messages"),
    ],
)
def test_what_a_completion_may_not_ask_for(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_value_is_not_repeated() -> None:
    with pytest.raises(RequestError) as caught:
        chat(stop=["a secret", ""])
    assert "secret" not in str(caught.value.body())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    "messages",
    "prompt",
    "model",
    "n",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "temperature",
    "top_p",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "echo",
    "best_of",
    "suffix",
    "chat_template_kwargs",
    "reasoning_effort",
    "modalities",
    "store",
    "frequency_penalty",
]


@examples(300)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=6))
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    for read, base in ((asked_chat, {"messages": HI}), (asked_completion, {"prompt": "Once"})):
        with suppress(RequestError):  # and nothing else
            SamplingParams(**read({**base, **body}).sampling)

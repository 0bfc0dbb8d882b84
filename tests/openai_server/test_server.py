"""The server over a model in this process, by the real client: the same text as generate(), in OpenAI's
objects, and nothing left behind.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chat_models import HERMES, with_templates
from held_target import HeldTarget
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, examples, log_softmax
from remote_worker import wait_until

import sllm

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from sllm.openai_server import server as server_module  # noqa: E402
from sllm.openai_server.server import OpenAIServer, ServeLimits  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_core")

PROMPT = "Once upon a time"
ASK = [{"role": "user", "content": "Tell me a story."}]
KEY = "a-key-that-nobody-guesses"


def client(server: OpenAIServer, key: str = "none") -> Any:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60)


def threads() -> set[threading.Thread]:
    ours = ("sllm-openai", "sllm-async")
    return {one for one in threading.enumerate() if one.name.startswith(ours)}


@pytest.fixture(scope="module")
def server(target_model: sllm.Model, draft_model: sllm.Model) -> Iterator[OpenAIServer]:
    with (
        sllm.LocalTarget(target_model, **EXACT) as target,
        OpenAIServer(target, draft=draft_model, name="pair", port=0, limits=ServeLimits(queue=64)) as served,
    ):
        yield served
    wait_until(lambda: not threads(), "the end of the threads")


@pytest.fixture(scope="module")
def ask(server: OpenAIServer) -> Iterator[Any]:
    with client(server) as made:
        yield made


@pytest.fixture
def serve() -> Iterator[Callable[..., OpenAIServer]]:
    """Makes servers, and closes them."""
    before = threads()
    made: list[OpenAIServer] = []

    def run(target: Any, **options: Any) -> OpenAIServer:
        made.append(OpenAIServer(target, port=0, **options))
        return made[-1]

    yield run
    for one in made:
        one.close()
    wait_until(lambda: not threads() - before, "the end of the threads")


def expected(model: sllm.Model, prompt: Any, *, n: int = 32, **params: Any) -> str:
    with sllm.LocalTarget(model, **EXACT) as target:
        sampling = sllm.SamplingParams(**params)
        return sllm.generate(target, prompt, sampling=sampling, max_tokens=n).text()


def raw(
    server: OpenAIServer,
    method: str,
    path: str,
    body: Any = None,
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a request as it is written here."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        if data is not None:
            names = {"content-type": "application/json", **names}
        connection.request(method, path, data, names)
        reply = connection.getresponse()
        text = reply.read()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, found, json.loads(text) if text[:1] == b"{" else text.decode()
    finally:
        connection.close()


# ---- the same text


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_completion_is_the_librarys_text(ask: Any, target_model: sllm.Model, temperature: float) -> None:
    got = ask.completions.create(model="pair", prompt=PROMPT, max_tokens=32, temperature=temperature, seed=7)
    assert got.choices[0].text == expected(target_model, PROMPT, temperature=temperature, seed=7)
    assert got.usage.prompt_tokens == len(target_model.vocab.encode(PROMPT))
    assert got.usage.completion_tokens == 32
    assert got.choices[0].finish_reason == "length"


def test_a_chat_streams_the_same_text(ask: Any, target_model: sllm.Model) -> None:
    options: dict[str, Any] = {"model": "pair", "messages": ASK, "max_tokens": 48, "seed": 3}
    whole = ask.chat.completions.create(**options)
    chunks = list(ask.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = expected(target_model, target_model.chat(ASK), seed=3, n=48)
    assert whole.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_stream_ends_as_openais_does(server: OpenAIServer) -> None:
    _, headers, text = raw(
        server, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    )
    assert headers["content-type"] == "text/event-stream"
    events = text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    objects = [json.loads(event.removeprefix("data: "))["object"] for event in events[:-2]]
    assert set(objects) == {"text_completion"}


def test_without_a_seed_texts_differ(ask: Any) -> None:
    texts = {
        ask.completions.create(model="pair", prompt=PROMPT, max_tokens=24, temperature=1.5).choices[0].text
        for _ in range(4)
    }
    assert len(texts) > 1


def test_several_texts_of_several_prompts(ask: Any, target_model: sllm.Model) -> None:
    got = ask.completions.create(model="pair", prompt=["Once", "The"], max_tokens=8, n=2, seed=5)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices] == [
        expected(target_model, prompt, n=8, seed=seed) for prompt in ("Once", "The") for seed in (5, 6)
    ]
    assert got.usage.completion_tokens == 32


def test_token_ids_are_a_prompt(ask: Any, target_model: sllm.Model) -> None:
    tokens = target_model.vocab.encode(PROMPT).tolist()
    got = ask.completions.create(model="pair", prompt=tokens, max_tokens=8, seed=1, echo=True)
    assert got.choices[0].text == PROMPT + expected(target_model, PROMPT, n=8, seed=1)


def test_a_stop_string_over_the_borders_of_tokens(ask: Any, target_model: sllm.Model) -> None:
    text = expected(target_model, PROMPT, temperature=0, n=64)
    at = len(text) // 2
    stop = text[at : at + 9]  # some characters of one token, and of others
    for stream in (False, True):
        got = ask.completions.create(
            model="pair", prompt=PROMPT, max_tokens=64, temperature=0, stop=[stop, "never"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in got] if stream else got.choices
        shown = "".join(choice.text for choice in choices)
        assert shown == text[: text.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_schema_is_kept_to(ask: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for form in (named, {"type": "json_object"}):
        got = ask.chat.completions.create(
            model="pair", messages=ASK, response_format=form, max_tokens=64, temperature=0
        )
        if form is named:
            assert set(json.loads(got.choices[0].message.content)) == {"n", "b"}
        else:
            assert got.choices[0].message.content.startswith("{")


def test_a_bias_rules_a_token_in(ask: Any, target_model: sllm.Model) -> None:
    token = int(target_model.vocab.encode("The")[0])
    got = ask.completions.create(
        model="pair", prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert got.choices[0].text == "TheTheThe"


def test_a_conversation_costs_what_is_new(server: OpenAIServer, ask: Any) -> None:
    first = ask.chat.completions.create(model="pair", messages=ASK, max_tokens=24, seed=1)
    answer = first.choices[0].message.content
    more = [*ASK, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    second = ask.chat.completions.create(model="pair", messages=more, max_tokens=4, seed=1)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens < cached < second.usage.prompt_tokens


# ---- log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models(
    ask: Any, target_model: sllm.Model, make_context: Callable[..., sllm.Context], *, stream: bool
) -> None:
    options = {"model": "pair", "messages": ASK, "max_tokens": 20, "seed": 2, "temperature": 0.9}
    got = ask.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=stream)
    choices = [chunk.choices[0] for chunk in got] if stream else got.choices
    entries = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    vocab = target_model.vocab
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    # That they are asked for makes no other text.
    assert text == expected(target_model, target_model.chat(ASK), n=20, seed=2, temperature=0.9)

    tokens = target_model.chat(ASK).tolist()
    context = make_context(target_model)
    pieces: dict[bytes, int] = {}
    for token in range(vocab.n_tokens):
        pieces.setdefault(vocab.piece(token), token)
    rows = []
    context.decode(tokens[:-1])
    for entry in entries:
        logits = context.decode(tokens[-1:], logits="last")
        assert logits is not None
        row = log_softmax(logits)
        rows.append(row)
        tokens.append(pieces[bytes(entry.bytes)])
    for entry, row, token in zip(entries, rows, tokens[-len(entries) :], strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        best = np.sort(row)[::-1][:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.tolist(), abs=1e-3)


def test_a_prompt_is_scored(ask: Any, target_model: sllm.Model) -> None:
    got = ask.completions.create(model="pair", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    found = got.choices[0].logprobs
    assert got.choices[0].text == PROMPT and got.usage.completion_tokens == 0
    assert "".join(found.tokens) == PROMPT and found.text_offset[1] == len(found.tokens[0])
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    with sllm.LocalTarget(target_model, **EXACT) as target:
        scores = target.score(target_model.vocab.encode(PROMPT), 1)
    assert found.token_logprobs[1:] == pytest.approx(scores.logprobs.tolist(), abs=1e-3)


# ---- reasoning and tools


def test_reasoning_stands_apart(tmp_path: Path, serve: Callable[..., OpenAIServer]) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{# <think> </think> #}"
    )
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": template}, weights=True)
    grammar = 'root ::= "<think>I see.</think>Yes."'
    with sllm.Model(path) as model:
        server = serve(model, sampling=sllm.SamplingParams(grammar=grammar))
        with client(server) as asking:
            message = asking.chat.completions.create(model="m", messages=ASK).choices[0].message
            assert (message.content, message.reasoning_content) == ("Yes.", "I see.")
            chunks = asking.chat.completions.create(model="m", messages=ASK, stream=True)
            deltas = [chunk.choices[0].delta for chunk in chunks]
            assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "I see."
            assert "".join(d.content or "" for d in deltas) == "Yes."
        server.close()


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(tmp_path: Path, serve: Callable[..., OpenAIServer], *, stream: bool) -> None:
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": HERMES}, weights=True)
    grammar = (
        'root ::= "Look. <tool_call>\\n{\\"name\\": \\"weather\\", \\"arguments\\":'
        ' {\\"city\\": \\"Oslo\\"}}\\n</tool_call>"'
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with sllm.Model(path) as model:
        server = serve(model, sampling=sllm.SamplingParams(grammar=grammar))
        with client(server) as asking:
            options: dict[str, Any] = {"model": "m", "messages": ASK, "stream": stream}
            got = asking.chat.completions.create(**options, tools=[tool])
            if stream:
                choices = [chunk.choices[0] for chunk in got]
                text = "".join(choice.delta.content or "" for choice in choices)
                calls = [call for choice in choices for call in choice.delta.tool_calls or []]
                reason = choices[-1].finish_reason
            else:
                text, calls = got.choices[0].message.content, got.choices[0].message.tool_calls
                reason = got.choices[0].finish_reason
            assert (text, reason, len(calls)) == ("Look. ", "tool_calls", 1)
            assert calls[0].function.name == "weather"
            assert json.loads(calls[0].function.arguments) == {"city": "Oslo"}
            if not stream:
                # What was called and what came of it goes into the next prompt; without tools it is text.
                said = got.choices[0].message.model_dump(exclude_none=True)
                result = {"role": "tool", "tool_call_id": calls[0].id, "content": "Rain."}
                again = asking.chat.completions.create(model="m", messages=[*ASK, said, result])
                assert "<tool_call>" in again.choices[0].message.content
        server.close()


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/Unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"Unit": {"enum": ["C", "F"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, {"now"}),
    ],
)
def test_a_call_that_is_demanded(ask: Any, choice: Any, names: set[str], *, stream: bool) -> None:
    """By any model: this one knows nothing of tools."""
    for seed in range(4):
        got = ask.chat.completions.create(
            model="pair", messages=ASK, tools=[WEATHER, NOW], tool_choice=choice, seed=seed, stream=stream,
            parallel_tool_calls=False, max_tokens=200,
        )  # fmt: skip
        if stream:
            choices = [chunk.choices[0] for chunk in got]
            assert not any(one.delta.content for one in choices)
            calls = [call for one in choices for call in one.delta.tool_calls or []]
            reason = choices[-1].finish_reason
        else:
            assert got.choices[0].message.content is None
            calls, reason = got.choices[0].message.tool_calls, got.choices[0].finish_reason
        assert len(calls) == 1 and calls[0].function.name in names and reason == "tool_calls"
        arguments = json.loads(calls[0].function.arguments)
        if calls[0].function.name == "weather":
            assert len(arguments.pop("city")) <= 8 and arguments in ({"unit": "C"}, {"unit": "F"})
        else:
            assert arguments == {}


def test_a_demanded_call_that_is_cut_off_is_text(ask: Any) -> None:
    got = ask.chat.completions.create(
        model="pair", messages=ASK, tools=[WEATHER], tool_choice="required", max_tokens=4
    )
    message = got.choices[0].message
    assert (message.tool_calls, got.choices[0].finish_reason) == (None, "length")
    assert message.content.startswith('{"')


def test_one_call_and_no_more(tmp_path: Path, serve: Callable[..., OpenAIServer]) -> None:
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": HERMES}, weights=True)
    call = '<tool_call>{\\"name\\": \\"now\\", \\"arguments\\": {}}</tool_call>'
    with sllm.Model(path) as model:
        server = serve(model, sampling=sllm.SamplingParams(grammar=f'root ::= "{call}\\n{call} Done."'))
        with client(server) as asking:
            for parallel, said in ((True, (2, " Done.")), (False, (1, None))):
                got = asking.chat.completions.create(
                    model="m", messages=ASK, tools=[NOW], parallel_tool_calls=parallel
                )
                message = got.choices[0].message
                assert (len(message.tool_calls), message.content) == said
                assert got.choices[0].finish_reason == "tool_calls"
        server.close()


def test_a_schema_leaves_no_room_for_reasoning(tmp_path: Path, serve: Callable[..., OpenAIServer]) -> None:
    """The prompt has begun with it, and the text that is held to the schema is the answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n<think>\n{# </think> #}"
    )
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": template}, weights=True)
    with sllm.Model(path) as model:
        server = serve(model)
        with client(server) as asking:
            options: dict[str, Any] = {"model": "m", "messages": ASK, "max_tokens": 32, "seed": 1}
            thought = asking.chat.completions.create(**options).choices[0].message
            assert thought.reasoning_content and not thought.content
            schema = {
                "name": "n",
                "schema": {"type": "object", "properties": {}, "additionalProperties": False},
            }
            said = asking.chat.completions.create(
                **options, response_format={"type": "json_schema", "json_schema": schema}
            )
            assert json.loads(said.choices[0].message.content) == {}
            assert said.usage.completion_tokens_details.reasoning_tokens == 0
        server.close()


def test_the_template_is_told(tmp_path: Path, serve: Callable[..., OpenAIServer]) -> None:
    """Its variables, and how much to reason: what it makes of them is what is counted."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ mood }}{{ reasoning_effort }}{% if enable_thinking == false %}off{% endif %}"
        "<|im_start|>assistant\n"
    )
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": template}, weights=True)
    with sllm.Model(path) as model:
        server = serve(model)
        told: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"chat_template_kwargs": {"mood": "calm"}}, {"mood": "calm"}),
            ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
            ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ]
        for fields, variables in told:
            body = {"messages": ASK, "max_tokens": 1, **fields}
            status, _, said = raw(server, "POST", "/v1/chat/completions", body)
            assert status == 200
            assert said["usage"]["prompt_tokens"] == len(model.chat(ASK, variables=variables))
            assert said["usage"]["prompt_tokens"] > len(model.chat(ASK))
        body = {"messages": ASK, "chat_template_kwargs": {"messages": []}}
        assert raw(server, "POST", "/v1/chat/completions", body)[0] == 400
        server.close()


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "invalid_value"),
        ("chat/completions", {"messages": ASK, "model": "gpt-4"}, 404, "model", "model_not_found"),
        ("chat/completions", {"messages": ASK, "reasoning_effort": "low"}, 400, "reasoning_effort", None),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "word " * 5000}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ("completions", {"prompt": "x", "logit_bias": {"99999999": 1}}, 400, "logit_bias", "invalid_value"),
        ("completions", {"prompt": [99999999]}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": ""}, 400, "prompt", "invalid_value"),
        (
            "completions",
            {
                "prompt": "x",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
            },
            400,
            "response_format",
            "invalid_value",
        ),
    ],
)
def test_refusals(
    server: OpenAIServer, path: str, body: Any, status: int, param: str, code: str | None
) -> None:
    for stream in (False, True):
        got, headers, said = raw(server, "POST", f"/v1/{path}", {**body, "stream": stream})
        error = said["error"]
        assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error")
        assert code is None or error["code"] == code
        assert error["message"] and headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
        (b'{"prompt": "' + b"x" * (9 << 20) + b'"}', 413),
    ],
)
def test_what_is_no_request(server: OpenAIServer, body: bytes, status: int) -> None:
    got, _, said = raw(server, "POST", "/v1/completions", body)
    assert got == status and said["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name", "reasoning_content"]),
    st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
    max_size=4,
)


@examples(40)
@given(
    st.lists(MESSAGE | JSON, max_size=3),
    st.dictionaries(
        st.sampled_from(["temperature", "stop", "logit_bias", "tools", "response_format", "n", "logprobs"]),
        JSON,
        max_size=2,
    ),
)
def test_no_body_fails_the_server(server: OpenAIServer, messages: Any, more: Any) -> None:
    status, _, said = raw(
        server, "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **more}
    )
    assert status in (200, 400), said
    assert status == 200 or said["error"]["code"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{",
    ],
)
def test_what_is_no_http(server: OpenAIServer, data: bytes) -> None:
    with socket.create_connection(server.address, 60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    assert raw(server, "GET", "/health")[0] == 200


def test_half_a_character_is_echoed_as_one(server: OpenAIServer) -> None:
    body = b'{"prompt": "a\\ud800b", "max_tokens": 1, "echo": true}'
    status, _, said = raw(server, "POST", "/v1/completions", body)
    assert status == 200 and said["choices"][0]["text"].startswith("a?b")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/v1/models/other", 404)],
)
def test_other_addresses(server: OpenAIServer, method: str, path: str, status: int) -> None:
    got, _, said = raw(server, method, path)
    assert got == status and said["error"]["type"] == "invalid_request_error"


def test_the_base_url_is_named(server: OpenAIServer) -> None:
    for path, named in (("/chat/completions", True), ("/v1/responses", False)):
        status, _, said = raw(server, "POST", path, {})
        assert status == 404 and "only /v1/chat/completions" in said["error"]["message"]
        assert ("the base URL of a client ends with /v1" in said["error"]["message"]) is named


def test_models_and_health(server: OpenAIServer, ask: Any) -> None:
    assert [model.id for model in ask.models.list()] == ["pair"]
    assert ask.models.retrieve("pair").owned_by == "sllm"
    assert raw(server, "GET", "/health")[2] == {"status": "ok"}


# ---- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:80"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "["}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost"}, 403),
    ],
)
def test_no_web_page_may(server: OpenAIServer, headers: dict[str, str], status: int) -> None:
    for path in ("/v1/models", "/health"):
        got, found, _ = raw(server, "GET", path, **headers)
        assert got == status
        assert not any(name.startswith("access-control") for name in found)


def test_a_form_of_a_web_page_is_no_request(server: OpenAIServer) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert raw(server, "POST", "/v1/completions", body, content_type=kind)[0] == 415


def test_a_page_that_is_let_in(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    page = "https://app.example"
    server = serve(draft_model, cors_origins=[page], api_key=KEY, allowed_hosts=["proxy.example"])
    asks = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    status, headers, _ = raw(server, "OPTIONS", "/v1/completions", origin=page, **asks)
    assert status == 200 and headers["access-control-allow-origin"] == page
    assert raw(server, "OPTIONS", "/v1/completions", origin="https://evil.example", **asks)[0] == 403
    status, headers, _ = raw(server, "GET", "/v1/models", origin=page, authorization=f"Bearer {KEY}")
    assert status == 200 and headers["access-control-allow-origin"] == page
    assert raw(server, "GET", "/v1/models", origin=page)[0] == 401
    assert raw(server, "GET", "/health", host="proxy.example")[0] == 200
    assert raw(server, "GET", "/health", host="other.example")[0] == 403


@pytest.mark.parametrize("given", [None, "", KEY, "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"])
def test_without_the_key(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model, given: str | None
) -> None:
    server = serve(draft_model, api_key=KEY)
    headers = {} if given is None else {"authorization": given}
    status, found, said = raw(server, "POST", "/v1/completions", {"prompt": "x"}, **headers)
    assert (status, said["error"]["code"], found["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert raw(server, "GET", "/health")[0] == 200


def test_with_the_key(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    server = serve(draft_model, api_key=KEY)
    with client(server, KEY) as asking:
        assert asking.completions.create(model=server.name, prompt=PROMPT, max_tokens=1).choices
    with client(server, "other") as asking, pytest.raises(openai.AuthenticationError):
        asking.models.list()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "needs an API key"),
        ({"cors_origins": ["*"]}, "any web page"),
        ({"api_key": "short"}, "16 or more"),
        ({"api_key": "with a space in between"}, "has spaces"),
        ({"texts": 0}, "texts is 0"),
        ({"texts": 2}, "writes one text at a time"),
    ],
)
def test_how_it_may_not_be_opened(draft_model: sllm.Model, options: dict[str, Any], said: str) -> None:
    before = threads()
    with pytest.raises(ValueError, match=said):
        OpenAIServer(draft_model, **options)
    assert not threads() - before


def test_a_port_that_is_taken(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    server = serve(draft_model)
    with pytest.raises(OSError, match="in use"):
        OpenAIServer(draft_model, port=server.address[1])


# ---- several clients, and those that leave


def test_eight_clients_at_once(ask: Any, target_model: sllm.Model) -> None:
    def one(number: int) -> str:
        options = {"model": "pair", "prompt": PROMPT, "max_tokens": 16, "seed": number}
        if number % 2:
            return "".join(c.choices[0].text for c in ask.completions.create(**options, stream=True))
        return str(ask.completions.create(**options).choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(8)))
    assert texts == [expected(target_model, PROMPT, n=16, seed=number) for number in range(8)]


def test_what_is_left_changes_no_text_after_it(ask: Any, target_model: sllm.Model) -> None:
    asks: dict[str, Any] = {"model": "pair", "prompt": PROMPT, "temperature": 0.9}
    for seed in range(4):
        logprobs = 1 if seed % 2 else None
        chunks = ask.completions.create(**asks, seed=seed, stream=True, logprobs=logprobs)
        for _ in range(seed + 1):
            next(chunks)
        chunks.close()
        got = ask.completions.create(**asks, seed=seed, max_tokens=24)
        assert got.choices[0].text == expected(target_model, PROMPT, temperature=0.9, seed=seed, n=24)


def held(draft_model: sllm.Model, **more: Any) -> HeldTarget:
    return HeldTarget(draft_model, " and on", **more)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_text(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model, *, stream: bool
) -> None:
    target = held(draft_model)
    server = serve(target, limits=ServeLimits(queue=0))
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    target.let(2)
    if stream:
        reply = connection.getresponse()
        assert reply.readline().startswith(b"data: ")
        reply.close()
    else:
        wait_until(lambda: target.opened == 1)
    connection.close()
    wait_until(lambda: target.ended == 1)
    # And the place is free again.
    target.let(100)
    assert raw(server, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 3})[0] == 200


def test_who_leaves_while_waiting_is_not_served(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model
) -> None:
    target = held(draft_model)
    server = serve(target, limits=ServeLimits(queue=1))
    kinds = {"content-type": "application/json"}
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    first, second = (http.client.HTTPConnection(*server.address, timeout=60) for _ in range(2))
    first.request("POST", "/v1/completions", body, kinds)
    wait_until(lambda: target.opened == 1)
    second.request("POST", "/v1/completions", body, kinds)
    wait_until(lambda: raw(server, "POST", "/v1/completions", {"prompt": "x"})[0] == 429)
    second.close()
    target.let(100)
    assert first.getresponse().status == 200
    first.close()
    assert raw(server, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
    assert target.opened == 2


def test_who_comes_when_all_is_taken(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    target = held(draft_model)
    server = serve(target, texts=2, limits=ServeLimits(queue=0))
    with client(server) as asking, ThreadPoolExecutor(2) as pool:
        texts = [
            pool.submit(asking.completions.create, model="sllm", prompt="x", max_tokens=2) for _ in range(2)
        ]
        wait_until(lambda: target.opened == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            asking.completions.create(model="sllm", prompt="x")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        target.let(100)
        assert all(text.result().choices[0].text for text in texts)


def test_a_prompt_is_left_in_the_middle(
    serve: Callable[..., OpenAIServer], target_model: sllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, cancelled = threading.Event(), threading.Event()
    with sllm.LocalTarget(target_model) as target:

        def decode(*_: Any, **__: Any) -> None:
            inside.set()
            assert cancelled.wait(30)
            raise sllm.CancelledError("cancelled")

        def cancel() -> None:
            real_cancel()
            cancelled.set()

        real_decode, real_cancel = target.context.decode, target.context.cancel
        monkeypatch.setattr(target.context, "decode", decode)
        monkeypatch.setattr(target.context, "cancel", cancel)
        server = serve(target)
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        body = json.dumps({"prompt": "a prompt"}).encode()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        assert inside.wait(30)
        connection.close()
        assert cancelled.wait(30)
        monkeypatch.setattr(target.context, "decode", real_decode)
        assert raw(server, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
        server.close()


def test_no_text_is_longer_than_is_allowed(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model
) -> None:
    target = held(draft_model)
    target.let(100)
    server = serve(target, limits=ServeLimits(max_tokens=3))
    for asked, got in ((None, 3), (2, 2), (50, 3)):
        body = {"prompt": "x", "max_tokens": asked}
        said = raw(server, "POST", "/v1/completions", body)[2]
        assert said["usage"]["completion_tokens"] == got
        assert said["choices"][0]["finish_reason"] == "length"


def test_a_seed_of_the_servers(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.5}
    server = serve(draft_model, seed=4)
    texts = [
        raw(server, "POST", "/v1/completions", {**body, **more})[2]["choices"][0]["text"]
        for more in ({}, {}, {"seed": 4}, {"seed": 5})
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_a_text_that_takes_too_long(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    target = held(draft_model)
    server = serve(target, limits=ServeLimits(text_seconds=0.3))
    status, _, said = raw(server, "POST", "/v1/completions", {"prompt": "x"})
    assert (status, said["error"]["code"], said["error"]["type"]) == (504, "timeout", "server_error")
    wait_until(lambda: target.ended == 1)


def test_a_request_that_does_not_come(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    server = serve(draft_model, limits=ServeLimits(body_seconds=0.3))
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_connection_that_asks_for_nothing(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_FIRST_REQUEST_SECONDS", 0.3)
    server = serve(draft_model)
    for said in (b"", b"GET / HT"):
        with socket.create_connection(server.address, 60) as silent:
            silent.sendall(said)
            with suppress(ConnectionResetError):
                assert silent.recv(1) == b""


# ---- what fails on the way


def fails_with(error: Exception, at: int) -> Callable[[int], None]:
    def check(n: int) -> None:
        if n == at:
            raise error

    return check


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (sllm.RemoteError("host 10.1.2.3 is lost"), 503, "target_lost"),
        (sllm.AuthError("10.1.2.3 refuses"), 503, "target_lost"),
        (sllm.BusyError("no place"), 429, "rate_limit_exceeded"),
        (sllm.UndecidedError("too few"), 400, "unsupported_value"),
        (sllm.LeakError("stays"), 403, "stays_local"),
        (RuntimeError("10.1.2.3: a bug with a prompt in it"), 500, "internal_error"),
    ],
)
def test_a_target_that_fails(
    serve: Callable[..., OpenAIServer],
    draft_model: sllm.Model,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    code: str,
) -> None:
    at_once, later = (held(draft_model, fails=fails_with(error, at)) for at in (0, 2))
    later.let(100)
    for stream in (False, True):
        server = serve(at_once)
        got, headers, said = raw(server, "POST", "/v1/completions", {"prompt": "x", "stream": stream})
        assert (got, said["error"]["code"]) == (status, code)
        assert ("retry-after" in headers) == (status in (429, 503))
        assert "10.1.2.3" not in json.dumps(said)
    server = serve(later)
    with client(server) as asking:
        chunks = asking.completions.create(model="sllm", prompt="x", stream=True)
        with pytest.raises(openai.APIError) as caught:
            [chunk.choices[0].text for chunk in chunks]
        assert caught.value.code == code  # in the stream, which had begun
    assert "prompt in it" not in caplog.text
    wait_until(lambda: later.ended == 1)


def test_nothing_that_is_said_is_logged(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "zanzibar"
    for path, body in [
        ("chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}),
        ("completions", {"prompt": secret, "max_tokens": 2, "stream": True}),
        ("completions", {"prompt": [secret, 3.5]}),
        ("chat/completions", {"messages": [{"role": secret, "content": [secret]}]}),
        (f"models/{secret}?{secret}", None),
    ]:
        raw(server, "GET" if body is None else "POST", f"/v1/{path}", body)
    assert "sllm" in caplog.text and secret not in caplog.text


# ---- the end


def test_the_end_in_mid_stream(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    target = held(draft_model)
    server = serve(target)
    target.let(2)
    with client(server) as asking:
        chunks = asking.completions.create(model="sllm", prompt="x", stream=True)
        assert next(chunks).choices[0].text
        server.close()
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
        assert caught.value.code == "shutting_down"
    assert target.ended == 1
    with pytest.raises(ConnectionRefusedError):
        raw(server, "GET", "/health")


def test_texts_have_time_to_end(serve: Callable[..., OpenAIServer], draft_model: sllm.Model) -> None:
    target = held(draft_model)
    server = serve(target)
    target.let(1)
    with client(server) as asking, ThreadPoolExecutor(1) as pool:
        chunks = asking.completions.create(model="sllm", prompt="x", max_tokens=4, stream=True)
        assert next(chunks).choices[0].text
        draining = pool.submit(server.drain, 60.0)
        assert not server.drain(0.0)
        target.let(100)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert draining.result()


def test_a_client_that_reads_nothing_holds_nobody_up(
    serve: Callable[..., OpenAIServer], draft_model: sllm.Model
) -> None:
    target = HeldTarget(draft_model, " and on" * 1000)
    target.let(1_000_000)
    server = serve(target)
    body = json.dumps({"prompt": "x", "stream": True, "logit_bias": {}}).encode()
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    wait_until(lambda: target.opened == 1)
    time.sleep(0.3)
    server.close()
    assert target.ended == 1
    connection.close()

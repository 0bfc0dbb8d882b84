"""A cloud behind an OpenAI-compatible API: the real package against an endpoint on loopback, and a stand-in
of the package for what needs no endpoint.
"""

from __future__ import annotations

import importlib.util
import re
import socket
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from chat_server import ChatServer

import sllm
from sllm.triage.hybrid import ChatCloud, Hybrid
from sllm.triage.openai_cloud import OpenAICloud
from sllm.triage.triage import Grade, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.engine.model import Model

needs_openai = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None,
    reason="the optional extra is not installed: pip install 'sllm[openai]'",
)

QUESTION = [{"role": "user", "content": "Was kommt nach dem Fruehling? 春天之后呢?"}]
PHONE, EMAIL, ID = "13800138000", "li.wei@example.com", "11010519491231002X"
CHINESE = f"我的手机号是{PHONE},邮箱{EMAIL},身份证号{ID}。写一封信。"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of the machine's own."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(lambda _: "Summer comes, 夏天来了。") as made:
        yield made


@pytest.fixture
def cloud(server: ChatServer) -> Iterator[OpenAICloud]:
    with OpenAICloud("big", base_url=server.url, api_key="sk-test", timeout=20) as made:
        made._client.max_retries = 0  # a test need not wait for the second time
        yield made


# ---- the real package


@needs_openai
def test_pieces(cloud: OpenAICloud, server: ChatServer) -> None:
    """The last event tells the usage, and has no choices."""
    assert isinstance(cloud, ChatCloud)
    pieces = list(cloud.stream(QUESTION, 17))
    assert len(pieces) > 3
    assert "".join(pieces) == "Summer comes, 夏天来了。"
    (asked,) = server.requests
    assert asked["model"] == "big"
    assert asked["max_tokens"] == 17
    assert asked["messages"] == QUESTION
    server.answer = lambda _: ""
    assert list(cloud.stream(QUESTION, 17)) == []


@needs_openai
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (401, sllm.AuthError, "HTTP status 401"),
        (403, sllm.AuthError, "HTTP status 403"),
        (429, sllm.RemoteError, "HTTP status 429"),
        (500, sllm.RemoteError, "HTTP status 500"),
        ("break", sllm.RemoteError, "big: "),
        ("cut", sllm.RemoteError, "the stream ended before the answer did"),
        ("garbage", sllm.RemoteError, "JSONDecodeError"),
        ("event", sllm.RemoteError, "APIError"),
    ],
)
def test_faults(
    cloud: OpenAICloud, server: ChatServer, fault: int | str, kind: type[Exception], words: str
) -> None:
    server.fault = fault
    pieces = []
    with pytest.raises(sllm.RemoteError, match=words) as caught:
        for piece in cloud.stream(QUESTION, 8):
            pieces.append(piece)  # noqa: PERF402 - what came before the fault
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None
    assert "".join(pieces) == ("" if isinstance(fault, int) else "Summer")
    for quoted in ("Fruehling", "春天", "comes", "夏天", "sk-test"):
        assert quoted not in str(caught.value)


@needs_openai
def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with OpenAICloud("big", base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-test") as cloud:
        cloud._client.max_retries = 0
        with pytest.raises(sllm.RemoteError, match=r"^big: APIConnectionError$"):
            list(cloud.stream(QUESTION, 8))


@needs_openai
@pytest.mark.parametrize("key", ["Schlüssel", "sk-\n"])
def test_a_key_that_no_header_can_hold(server: ChatServer, key: str) -> None:
    with OpenAICloud("big", base_url=server.url, api_key=key) as cloud:
        cloud._client.max_retries = 0
        with pytest.raises(sllm.RemoteError) as caught:
            list(cloud.stream(QUESTION, 8))
        assert key not in str(caught.value)
    assert server.received == b""


@needs_openai
def test_keys(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sllm.AuthError, match=f"no client of {re.escape(server.url)}"):
        OpenAICloud("big", base_url=server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    with OpenAICloud("big") as cloud:
        assert "".join(cloud.stream(QUESTION, 8)).startswith("Summer")


@needs_openai
def test_a_stream_that_is_left(cloud: OpenAICloud, server: ChatServer) -> None:
    server.answer = lambda _: "again " * 2000
    pieces = cloud.stream(QUESTION, 8)
    assert next(pieces) == "aga"
    pieces.close()  # type: ignore[attr-defined]
    server.answer = lambda _: "next"
    assert "".join(cloud.stream(QUESTION, 8)) == "next"


# ---- behind Hybrid


class Hard:
    """A triage that finds everything hard, or routine."""

    scorer = None
    tier = Tier.HARD

    def assess(self, messages: Any, *, findings: Any = None) -> Grade:
        return Grade(self.tier, 0.0, 1.0, "private" if findings else "public", (), None)

    def finds_private(self, messages: Any) -> bool:
        return False

    def verifies(self, grade: Grade, verify: str, answer_logprobs: Any = None) -> bool:
        return True


@pytest.fixture
def hybrid(draft_model: Model, cloud: OpenAICloud) -> Iterator[Hybrid]:
    triage: Any = Hard()
    with Hybrid(
        draft_model, cloud=cloud, triage=triage, privacy="deidentify", max_tokens=16, n_threads=1
    ) as made:
        yield made


def _echo(messages: list[dict[str, Any]]) -> str:
    found = re.findall(r"\[[A-Z_]+_\d+_\w+\]", str(messages[-1]["content"]))
    return f"你好 {' '.join(found)}!"


@needs_openai
def test_masked_there_and_restored_here(hybrid: Hybrid, server: ChatServer) -> None:
    server.answer = _echo
    answer = hybrid.ask([{"role": "user", "content": CHINESE}])
    text = answer.text()
    assert answer.route == ["cloud"]
    assert sum(answer.masked.values()) == answer.stats.n_restored == 3
    assert text == f"你好 {PHONE} {EMAIL} {ID}!"
    assert len(server.received) > 200
    sent = bytes(server.received)
    for value in (PHONE, EMAIL, ID):
        assert value.encode() not in sent
        assert value[3:].encode() not in sent
    assert "写一封信".encode() in sent


@needs_openai
@pytest.mark.parametrize(("said", "route"), [("ACCEPT", "verified"), ("Summer.", "corrected")])
def test_verified(hybrid: Hybrid, server: ChatServer, said: str, route: str) -> None:
    hybrid.triage.tier = Tier.ROUTINE  # type: ignore[attr-defined]
    server.answer = lambda _: said
    answer = hybrid.ask([{"role": "user", "content": CHINESE}])
    answer.text()
    assert answer.route == ["local", route]
    assert PHONE.encode() not in server.received
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user", "assistant", "user"]


@needs_openai
@pytest.mark.parametrize("fault", [401, 500])
def test_the_local_model_stands_in(hybrid: Hybrid, server: ChatServer, fault: int) -> None:
    server.fault = fault
    answer = hybrid.ask([{"role": "user", "content": CHINESE}])
    assert answer.text()
    assert answer.route == ["local"]
    assert any("the cloud does not answer" in reason for reason in answer.reasons)


@needs_openai
def test_an_answer_that_breaks_off(hybrid: Hybrid, server: ChatServer) -> None:
    """What was shown cannot be taken back, so it is an error and no answer."""
    server.fault = "cut"
    server.answer = lambda _: "Summer comes after spring."
    answer = hybrid.ask([{"role": "user", "content": CHINESE}])
    with pytest.raises(sllm.RemoteError, match="before the answer did"):
        answer.text()
    assert answer.route == ["cloud"]


@needs_openai
def test_an_empty_answer_is_the_clouds_too(hybrid: Hybrid, server: ChatServer) -> None:
    server.answer = lambda _: ""
    answer = hybrid.ask([{"role": "user", "content": CHINESE}])
    assert answer.text() == ""
    assert answer.route == ["cloud"]


# ---- without the package


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with as much as :class:`OpenAICloud` uses."""
    fake: Any = types.ModuleType("openai")

    class OpenAIError(Exception):
        pass

    class APIStatusError(OpenAIError):
        def __init__(self, status_code: int) -> None:
            super().__init__("quotes the request")
            self.status_code = status_code

    class OpenAI:
        def __init__(self, **options: Any) -> None:
            if options["api_key"] is None:
                raise OpenAIError("there is no key")
            self.options = options
            self.closed = False

        def close(self) -> None:
            self.closed = True

    fake.OpenAIError, fake.APIStatusError, fake.OpenAI = OpenAIError, APIStatusError, OpenAI
    monkeypatch.setitem(sys.modules, "openai", fake)
    return fake


def test_what_the_client_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    with OpenAICloud("big", base_url="https://host/v1", api_key="k", timeout=3) as cloud:
        client = cloud._client
        options = client.options
        assert (options["base_url"], options["api_key"], options["timeout"]) == ("https://host/v1", "k", 3)
    assert client.closed
    with pytest.raises(sllm.AuthError, match="no client of the default endpoint: there is no key"):
        OpenAICloud("big")


@pytest.mark.parametrize("status", [401, 500])
def test_a_client_of_ones_own(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    fake = _stand_in(monkeypatch)

    class Completions:
        def create(self, **_options: Any) -> Any:
            raise fake.APIStatusError(status)

    client = types.SimpleNamespace(chat=types.SimpleNamespace(completions=Completions()))
    cloud = OpenAICloud("big", client=client)
    with pytest.raises(
        sllm.RemoteError, match=rf"^big: the endpoint answered with HTTP status {status}$"
    ) as e:
        list(cloud.stream(QUESTION, 8))
    assert isinstance(e.value, sllm.AuthError) == (status == 401)


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'sllm\[openai\]'"):
        OpenAICloud("big")


def test_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    cloud = OpenAICloud("big", api_key="k")
    assert [cloud.count(text) for text in ("", "a", "four", "fives", "春天", "a春")] == [0, 1, 1, 2, 2, 2]

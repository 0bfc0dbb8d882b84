"""``sllm serve`` as a process: its lines, its key, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE, PATIENCE

import sllm
from sllm import embedded

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVE = ("serve", *ONE, "--listen", "127.0.0.1:0")
ASK = [{"role": "user", "content": "Tell me a story."}]


def line_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def ended(process: subprocess.Popen[bytes], number: signal.Signals) -> str:
    """Ends it by a signal, in good order; what it has written to stderr."""
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 0), stderr
    assert b"Traceback" not in stderr
    return stderr.decode()


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


def test_the_embedded_pair(start: Callable[..., subprocess.Popen[bytes]], target_model: sllm.Model) -> None:
    process = start(*SERVE, "--temperature", "0", "--seed", "1")
    with client(line_of(process)) as asking:
        assert [model.id for model in asking.models.list()] == ["target"]
        got = asking.chat.completions.create(model="target", messages=ASK, max_tokens=16)
    sampling = sllm.SamplingParams(temperature=0)
    text = sllm.generate(target_model, target_model.chat(ASK), sampling=sampling, max_tokens=16).text()
    assert got.choices[0].message.content == text
    said = ended(process, signal.SIGTERM)
    assert "serving 'target'" in said and "there is no key" in said


def test_a_port_in_use(command: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        refused = command("serve", *ONE, "--listen", where)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"sllm: cannot listen on {where}: Address already in use\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("drain", ["0", "30"])
def test_a_signal_in_mid_stream(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, number: signal.Signals, drain: str
) -> None:
    (tmp_path / "endless.gbnf").write_text('root ::= "again " root\n')
    process = start(
        *SERVE, "--draft", "none", "--grammar-file", "endless.gbnf", "--drain", drain, "--n-ctx", "16384"
    )
    with client(line_of(process)) as asking:
        chunks = asking.completions.create(model="target", prompt="x", stream=True)
        assert next(chunks).choices[0].text is not None
        process.send_signal(number)
        if drain == "30":
            assert process.stderr is not None
            while b"texts have 30 s to end" not in process.stderr.readline():
                pass
            process.send_signal(number)  # a second one: at once
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
        assert caught.value.code == "shutting_down"
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if number == signal.SIGINT else 0)


def test_a_key(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = start(*SERVE, "--generate-key", "--listen", "0.0.0.0:0", str(embedded.DRAFT))
    url, key = line_of(process).replace("0.0.0.0", "127.0.0.1"), line_of(process)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/models", timeout=60)
    assert caught.value.code == 401
    caught.value.close()
    with client(url, key) as asking:
        assert [model.id for model in asking.models.list()] == ["draft"]
    assert "no TLS" in (said := ended(process, signal.SIGTERM))
    assert key not in said

    # One in a file, which is made, and one in the environment.
    for more, env in ((("--api-key-file", "key"), {}), ((), {"SLLM_API_KEY": key})):
        process = start(*SERVE, str(embedded.DRAFT), *more, env=env)
        url = line_of(process)
        known = (tmp_path / "key").read_text().strip() if more else key
        with client(url, known) as asking:
            assert asking.models.list().data
        with client(url, "other") as asking, pytest.raises(openai.AuthenticationError):
            asking.models.list()
        ended(process, signal.SIGINT)
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def test_tiers(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start(*SERVE, "--ask", "--name", "tiers", "-n", "8")
    request = urllib.request.Request(
        f"{line_of(process)}/chat/completions",
        json.dumps({"messages": ASK}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        body = json.load(reply)
        assert reply.headers["x-sllm-route"] == ", ".join(body["sllm"]["route"])
    assert body["model"] == "tiers" and body["choices"][0]["finish_reason"] == "length"
    assert body["sllm"]["tier"] in (1, 2, 3)
    ended(process, signal.SIGTERM)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--listen", "0.0.0.0:0"], "not a loopback address"),
        (["--cors-origin", "*"], "any web page"),
        (["--listen", "nonsense:x"], "is not HOST:PORT"),
        (["--generate-key", "--api-key-file", "x"], "exclude each other"),
        (["--small", "x.gguf"], "--small is for --ask"),
        (["--ask", "--draft", "ngram"], "--draft is not for --ask"),
        (["--on-loss", "local", "--remote", "sllm://x@127.0.0.1:1"], "cannot be"),
        (["--texts", "2"], "one text at a time"),
        (["a.gguf", "--target", "b.gguf"], "name two models"),
        (["missing.gguf"], "missing.gguf does not exist"),
    ],
)
def test_what_does_not_go_together(refused: Callable[..., str], args: list[str], said: str) -> None:
    assert said in refused("serve", *args)

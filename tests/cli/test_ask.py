"""``sllm ask`` as a user meets it: who answers, what is told, and that no value is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from chat_server import ChatServer
from oracles import EXACT
from processes import ONE, interrupt

import sllm
from sllm import embedded
from sllm.cli import ask as cli_ask
from sllm.cli import main as cli
from sllm.engine import gguf
from sllm.triage.calibration import Profile
from sllm.worker.server import Worker

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

    from sllm.engine.model import Model

EASY = "How many legs does a spider have?"
PHONE, EMAIL = "13800138000", "li.wei@example.com"
PRIVATE = f"My phone is {PHONE} and my mail is {EMAIL}. What comes after spring?"
CHINESE = f"我的手机号是{PHONE},邮箱{EMAIL}。春天之后是什么季节?"
SHORT = (*ONE, "-n", "12")


@pytest.fixture(scope="module")
def worker(target_model: Model) -> Iterator[str]:
    with Worker(target_model, insecure=True, n_ctx=1024, **EXACT) as made:
        yield made.uri


@pytest.fixture
def profile(tmp_path: pathlib.Path) -> Callable[[int], tuple[str, str]]:
    """Arguments of a profile with which every request is of a tier."""

    def make(tier: int) -> tuple[str, str]:
        ours = Profile.load(embedded.TARGET_PROFILE)
        assert ours.tier1 is not None
        assert ours.tier3 is not None
        easy = dataclasses.replace(ours.tier1, score=-1e9, confidence=-1e9)
        hard = dataclasses.replace(ours.tier3, score=-1e9)
        changes: dict[int, dict[str, Any]] = {
            1: {"tier1": easy, "tier3": None, "gate": None},
            2: {"tier1": None, "tier3": None, "gate": None},
            3: {"tier1": None, "tier3": hard, "gate": -1e9},
        }
        path = tmp_path / f"tier{tier}.json"
        dataclasses.replace(ours, **changes[tier]).save(path)
        return ("--profile", str(path))

    return make


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs ``sllm ask --json`` in this process: the object, and stderr."""

    def run(*args: str) -> tuple[dict[str, Any], str]:
        assert cli.main(["ask", "--json", "--explain", *SHORT, *args]) == 0
        shown = capfd.readouterr()
        assert shown.out.count("\n") == 1
        found = json.loads(shown.out)
        assert list(found) == ["text", "tier", "route", "reasons", "masked", "stats"]
        for value in (PHONE, EMAIL, "spring", "春天", "spider"):
            assert value not in shown.err
        return found, shown.err

    return run


def test_the_tiers(ask: Callable[..., Any], profile: Callable[[int], tuple[str, str]], worker: str) -> None:
    for tier, route in ((1, ["small"]), (2, ["local", "verified"]), (3, ["cloud"])):
        found, told = ask(*profile(tier), "--remote", worker, "--verify", "always", EASY)
        assert (found["tier"], found["route"]) == (tier, route)
        assert found["text"]
        assert found["masked"] == {}
        assert (found["stats"]["cloud_in"] > 0) == (tier > 1)
        lines = dict(line.split(": ", 1) for line in told.splitlines())
        assert lines["route"] == " > ".join(route)
        assert lines["tier"].startswith(f"{tier} (easy ")
        assert lines["privacy"] == "public"
        assert lines["masked"] == "nothing"
        sent, received = found["stats"]["cloud_in"], found["stats"]["cloud_out"]
        assert lines["cloud"] == f"{sent} tokens sent, {received} received"


def test_sure_answers_are_not_verified(ask: Callable[..., Any], worker: str, tmp_path: pathlib.Path) -> None:
    """By the profile's threshold, where it is for the model that answers."""
    ours = Profile.load(embedded.TARGET_PROFILE)
    assert ours.tier1 is not None
    changes: dict[str, Any] = {"tier1": None, "tier3": None, "gate": None}
    for score, model, route in (
        (-1e9, embedded.TARGET, ["local"]),
        (0.0, embedded.TARGET, ["local", "verified"]),
        (-1e9, embedded.DRAFT, ["local", "verified"]),
    ):
        verify = dataclasses.replace(ours.tier1, score=score, confidence=None)
        profile = dataclasses.replace(ours, verify=verify, verify_model_id=gguf.model_id(model), **changes)
        profile.save(tmp_path / "p.json")
        found, _ = ask("--profile", str(tmp_path / "p.json"), "--remote", worker, EASY)
        assert found["route"] == route


@pytest.mark.parametrize("prompt", [PRIVATE, CHINESE], ids=["en", "zh"])
def test_privacy(
    ask: Callable[..., Any],
    refused: Callable[..., str],
    profile: Callable[[int], tuple[str, str]],
    worker: str,
    prompt: str,
) -> None:
    args = (*profile(3), "--remote", worker)
    found, told = ask(*args, prompt)
    assert (found["route"], found["masked"], found["stats"]["cloud_in"]) == (["local"], {}, 0)
    assert "\nprivacy: private\n" in told
    found, told = ask(*args, "--privacy", "deidentify", prompt)
    assert (found["route"], found["masked"]) == (["cloud"], {"EMAIL": 1, "PHONE": 1})
    assert "\nmasked: EMAIL 1, PHONE 1\n" in told
    line = refused("ask", *args, "--privacy", "refuse", *SHORT, prompt)
    assert line.startswith("the request is private and needs the cloud")
    assert "EMAIL" in line
    assert "PHONE" in line
    assert PHONE not in line
    assert EMAIL not in line


def test_text_and_stdin(command: Callable[..., Any]) -> None:
    """Real processes: without a profile's promise, the local model's greedy answer, and nothing else."""
    args = ("ask", *SHORT, "--small", str(embedded.DRAFT), "--local", str(embedded.TARGET))
    shown = [
        command(*args, EASY),
        command(*args, "-", typed=f"{EASY}\n"),
        command(*args, "--explain", typed=EASY),
    ]
    with sllm.Model(embedded.TARGET) as model:
        sampling = sllm.SamplingParams(temperature=0)
        prompt = model.chat([{"role": "user", "content": EASY}])
        text = sllm.generate(model, prompt, sampling=sampling, max_tokens=12).text()
    assert [(one.returncode, one.stdout) for one in shown] == [(0, f"{text}\n")] * 3
    assert shown[0].stderr == shown[1].stderr == ""
    assert "no profile, so no promise: tier 2" in shown[2].stderr


def test_ctrl_c(start: Callable[..., Any]) -> None:
    process = start("ask", *ONE, stdin=subprocess.PIPE)
    process.stdin.write(b"Once " * 20_000)
    process.stdin.flush()
    assert interrupt(process) == ("", "")


def test_a_worker_that_is_not_there(ask: Callable[..., Any], profile: Callable[[int], Any]) -> None:
    found, told = ask(*profile(3), "--remote", "sllm://127.0.0.1:1#insecure", EASY)
    assert found["route"] == ["local"]
    assert {"the worker does not answer", "stays here: there is no cloud"} <= set(found["reasons"])
    assert told.splitlines()[0].endswith("; answering without it")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["my", "phone", "is", PHONE], "there are 4 prompts; put the words of one in quotes"),
        (["--privacy", "none", "x"], "invalid choice: 'none'"),
        (["--no-thinking", "x"], "--no-thinking: no model's chat template has a switch for reasoning"),
        (["--verify", "maybe", "x"], "invalid choice: 'maybe'"),
        (["--cloud-model", "big", "x"], "--cloud-model needs --cloud-url"),
        (["--cloud-url", "http://h/v1", "x"], "--cloud-url needs --cloud-model"),
        (["--cloud-url", "h", "--cloud-model", "big", "x"], "--cloud-url is not an address"),
        (["--cloud-url", "http://h:x", "--cloud-model", "big", "x"], "--cloud-url is not an address"),
        (["--cloud-url", "http://u:pw@h/v1", "--cloud-model", "big", "x"], "holds a user or a key"),
        (["--cloud-url", "http://h", "--remote", "sllm://a@h:1", "x"], "exclude each other"),
        (["--remote", "nowhere", "x"], "the address of a worker begins with sllm://"),
        (["--max-tokens", "0", "x"], "--max-tokens: 0 is out of range"),
        (["--max-cloud-tokens", "0", "x"], "--max-cloud-tokens: 0 is out of range"),
        (["--temperature=-1", "x"], "temperature is -1.0"),
        (["--small", "nothing.gguf", "x"], "nothing.gguf does not exist"),
        (["--local", "nothing.gguf", "x"], "nothing.gguf does not exist"),
        (["--profile", "nothing.json", "x"], "nothing.json"),
        (["--small", str(embedded.DRAFT), "--profile", str(embedded.TARGET_PROFILE), "x"], "calibrate again"),
        ([" \n"], "the request is empty"),
        (["bad \udcff bytes"], "the prompt is not UTF-8: invalid start byte at byte 4"),
    ],
)
def test_wrong_arguments(
    refused: Callable[..., str],
    args: list[str],
    words: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused("ask", *ONE, *args)
    assert words in line
    assert PHONE not in line
    assert "pw" not in line.split()


def test_no_openai_package(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    line = refused("ask", "--cloud-url", "http://127.0.0.1:1/v1", "--cloud-model", "big", PRIVATE)
    assert line == "OpenAICloud needs the openai package: pip install 'sllm[openai]'"


@pytest.mark.skipif(
    importlib.util.find_spec("openai") is None,
    reason="the optional extra is not installed: pip install 'sllm[openai]'",
)
def test_an_endpoint(
    ask: Callable[..., Any],
    refused: Callable[..., str],
    profile: Callable[[int], tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_ADMIN_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def echo(messages: list[dict[str, Any]]) -> str:
        return f"Wrote to {re.findall(r'.EMAIL_[0-9A-Za-z_]+.', str(messages[-1]['content']))[0]} now."

    with ChatServer(echo) as server:
        args = (*profile(3), "--cloud-url", server.url, "--cloud-model", "big", "--privacy", "deidentify")
        assert "no client of http://127.0.0.1" in refused("ask", *SHORT, *args, PRIVATE)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        found, told = ask(*args, PRIVATE)
        assert found["text"] == f"Wrote to {EMAIL} now."
        assert "\nrestored: 1 placeholder\n" in told
        assert EMAIL.encode() not in server.received
        assert PHONE.encode() not in server.received
        server.fault = 401
        found, told = ask(*args, PRIVATE)
        assert found["route"] == ["local"]
        assert told.startswith("sllm: stays here: the cloud does not answer (AuthError)\n")


def test_help_shows_the_options(command: Callable[..., Any]) -> None:
    shown = command("ask", "--help").stdout
    for option in ("--small", "--local", "--profile", "--remote", "--cloud-url", "--privacy", "--explain"):
        assert option in shown
    assert cli_ask.EPILOG.split(".")[0].split()[0] in shown

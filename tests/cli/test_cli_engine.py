"""``sllm run``, ``ask`` and ``ping`` with a serving engine, as a user meets them."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import TYPE_CHECKING

import pytest
from fake_engine import APIS, FakeEngine
from oracles import GREEDY, one_by_one
from processes import ONE

import sllm
from sllm import embedded
from sllm.cli import main as cli
from sllm.triage.calibration import Profile

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

PROMPT = "Once upon a time"


@pytest.fixture(params=APIS)
def engine(request: pytest.FixtureRequest, target_model: sllm.Model) -> Iterator[FakeEngine]:
    with FakeEngine(target_model, request.param, n_ctx=512, api_key="the-key") as engine:
        yield engine


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_ENGINE_KEY", "the-key")


@pytest.mark.parametrize("draft", [(), ("--draft", "none"), ("--draft", "ngram")])
def test_run_writes_the_engines_text(
    engine: FakeEngine, target_model: sllm.Model, capfd: pytest.CaptureFixture[str], draft: tuple[str, ...]
) -> None:
    prompt = target_model.vocab.encode(PROMPT)
    expected = target_model.vocab.decode(one_by_one(target_model, prompt, GREEDY, 16), goes_on=True)
    arguments = ("run", "--engine", engine.url, *ONE, *draft, "-n", "16", "--temperature", "0", "--stats")
    assert cli.main([*arguments, PROMPT]) == 0
    shown = capfd.readouterr()
    assert shown.out.strip() == expected.strip()
    assert "16 tokens" in shown.err


def test_chat_has_the_engine_answer(
    engine: FakeEngine,
    target_model: sllm.Model,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = target_model.chat([{"role": "user", "content": "Hi"}])
    expected = target_model.vocab.decode(one_by_one(target_model, prompt, GREEDY, 8), goes_on=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n/stats\n")))
    assert cli.main(["chat", "--engine", engine.url, *ONE, "-n", "8", "--temperature", "0"]) == 0
    answer, _, figures = capfd.readouterr().out.partition("prompt: ")
    assert answer.strip() == expected.strip()
    assert "link: " in figures


@pytest.mark.parametrize("tier", [2, 3])
def test_ask_has_the_engine_as_its_cloud(
    engine: FakeEngine, capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path, tier: int
) -> None:
    """An answer of tier 2 is scored by it, one of tier 3 written."""
    ours = Profile.load(embedded.TARGET_PROFILE)
    assert ours.tier3 is not None
    hard = dataclasses.replace(ours.tier3, score=-1e9) if tier == 3 else None
    gate = -1e9 if tier == 3 else None
    path = tmp_path / "profile.json"
    dataclasses.replace(ours, tier1=None, tier3=hard, gate=gate).save(path)
    arguments = ("--profile", str(path), *ONE, "-n", "12", "--verify", "always", "--json")
    assert cli.main(["ask", "--engine", engine.url, *arguments, "What comes after spring?"]) == 0
    account = json.loads(capfd.readouterr().out)
    assert account["tier"] == tier
    assert account["route"][-1] in (("verified", "corrected") if tier == 2 else ("cloud",))
    assert account["stats"]["cloud_in"] > 0
    assert engine.n_requests > 0


def test_ask_answers_without_an_engine_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "--engine", "http://127.0.0.1:1/v1", *ONE, "-n", "4", "What is 2 and 2?"]) == 0
    assert "nothing answers at 127.0.0.1:1" in capfd.readouterr().err


@pytest.mark.parametrize("vocab", [(), ("--vocab", str(embedded.TARGET))])
def test_ping_shows_what_the_engine_is(
    engine: FakeEngine, capfd: pytest.CaptureFixture[str], vocab: tuple[str, ...]
) -> None:
    assert cli.main(["ping", engine.url, *vocab]) == 0
    out = capfd.readouterr().out
    assert engine.api in out
    assert "512 tokens" in out
    assert ("the same" if vocab else "not compared") in out
    assert "prefix cache       yes" in out
    if engine.api == "vllm":
        assert "20 at most of a position" in out
        assert "--max-logprobs 64" in out


def test_a_wrong_key_is_told(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("SLLM_ENGINE_KEY", "another")
    assert "refused the key" in refused("ping", engine.url)
    assert "refused the key" in refused("run", "--engine", engine.url, PROMPT)
    assert "refused the key" in refused("ask", "--engine", engine.url, *ONE, PROMPT)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ("run", "--engine", "http://127.0.0.1:1", "--remote", "sllm://x", "Hi"),
            "--engine excludes --remote",
        ),
        (("run", "--engine", "http://127.0.0.1:1", "--head", "1", "Hi"), "--engine excludes"),
        (("run", "--engine", "http://127.0.0.1:1", "--on-loss", "wait", "Hi"), "--on-loss is for --remote"),
        (("run", "--engine", "http://127.0.0.1:1", "Hi"), "nothing answers at 127.0.0.1:1"),
        (("run", "--engine", "no address", "Hi"), "the address of an engine"),
        (("run", "--engine-model", "m", "Hi"), "--engine-model needs --engine"),
        (("ask", "--engine-vocab", "x.gguf", "Hi"), "need --engine"),
        (("ask", "--engine", "http://x", "--cloud-url", "http://y", "Hi"), "exclude each other"),
        (("ping", "http://127.0.0.1:1/v1"), "nothing answers at 127.0.0.1:1"),
        (("ping", "--vocab", "x.gguf", "sllm://127.0.0.1:1#insecure"), "--vocab and --engine-model are for"),
    ],
)
def test_what_does_not_go_together_is_refused(
    refused: Callable[..., str], arguments: tuple[str, ...], what: str
) -> None:
    assert what in refused(*arguments)

"""``sllm plan`` as a user meets it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from processes import interrupt, one_line
from remote_worker import wait_until

import sllm
from sllm.embedded import DRAFT, TARGET

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., subprocess.CompletedProcess[str]]

MODELS = ("--draft", str(DRAFT), "--target", str(TARGET), "-n", "16")


def test_a_table(command: Command) -> None:
    done = command("plan", *MODELS, "Once upon a time")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80 or str(TARGET) in done.stdout
    assert done.stdout.startswith("way ")
    assert "\nnot worker, stream: there is no worker (remote=)\n" in done.stdout


def test_json(command: Command) -> None:
    with sllm.Worker(TARGET) as worker:
        done = command("plan", *MODELS, "--chat", "--json", "Hello!", "--remote", worker.uri)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["best"] in [way["name"] for way in told["ways"] if way["why_not"] is None]
    assert "worker_round_trip" in told["measured"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "what decides the texts"),
        (("--layers", "sllm://t@h:1#sha256=" + "0" * 64), "needs target="),
        (("--remote", "worker"), "begins with sllm://"),
        (("--target", str(TARGET), "--acceptance", "2"), "acceptance is 2.0"),
        (("--draft", "none.gguf", "--target", str(TARGET)), "none.gguf"),
        (("--target", str(TARGET), "caf\udce9"), "PROMPT: it is not UTF-8"),
    ],
)
def test_what_cannot_be_planned(command: Command, args: tuple[str, ...], says: str) -> None:
    done = command("plan", *args)
    assert done.returncode == 2
    assert says in one_line(done.stderr)


def test_no_way_is_an_exit_status(command: Command) -> None:
    done = command("plan", "--target", "none.gguf")
    assert done.returncode == 1
    assert "not here: none.gguf does not exist" in done.stdout
    assert "no way is possible" in one_line(done.stderr)


def test_ctrl_c_ends_it(start: Callable[..., Any], tmp_path: Path) -> None:
    address = tmp_path / "line"
    with sllm.Worker(TARGET, pass_seconds=0.5) as worker, sllm.connect(worker.uri) as remote:
        address.write_text(worker.uri)
        process = start("plan", "--draft", str(DRAFT), "--remote", f"@{address}")
        wait_until(lambda: remote.status().sessions == 1, "a text to begin")
        interrupt(process)
        wait_until(lambda: remote.status().sessions == 0, "it to end")

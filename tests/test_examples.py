"""The examples run as they are, and end without a word on stderr."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """One thread for each model: those that wait spin, and would starve what runs beside the tests."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run(name: str, folder: pathlib.Path, typed: str = "") -> str:
    """What the example writes, run in a folder where nothing of the repository is in the way."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        input=typed,
        capture_output=True,
        encoding="utf-8",
        errors="strict",
        timeout=240,
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONUTF8": "1"},
        check=False,
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    return ended.stdout


def test_all_are_known() -> None:
    assert SCRIPTS == ["chat.py", "draft_verify.py", "prompt_lookup.py", "speculative.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


def test_speculative(tmp_path: pathlib.Path) -> None:
    shown = run("speculative.py", tmp_path)
    assert shown.endswith("same text: True\n")
    assert " of the draft accepted\n" in shown


def test_draft_verify(tmp_path: pathlib.Path) -> None:
    shown = run("draft_verify.py", tmp_path)
    assert shown.startswith("Once upon a time there was")
    assert "\n从前有一只" in shown
    n_tokens, n_passes = (int(word) for word in shown.splitlines()[-1].split() if word.isdigit())
    assert 0 < n_passes < n_tokens


def test_chat(tmp_path: pathlib.Path) -> None:
    shown = run("chat.py", tmp_path, "What comes after spring?\nThank you!\n")
    assert shown.count("> ") == 3  # two answers, and the question that the end of stdin answers
    assert shown.endswith("> \n")


def test_prompt_lookup(tmp_path: pathlib.Path) -> None:
    lines = run("prompt_lookup.py", tmp_path).splitlines()
    assert [line.split(" passes")[0].rsplit(None, 1)[0] for line in lines] == [
        "no draft",
        "ngram",
        "callable",
    ]
    texts = {line.partition(": ")[2] for line in lines}
    assert len(texts) == 1  # whatever drafts, the text is the target's

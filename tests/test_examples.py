"""The examples run as they are, and end without a word on stderr."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sllm import embedded

if TYPE_CHECKING:
    pass

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
pytestmark = pytest.mark.usefixtures("one_core")


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
    assert SCRIPTS == [
        "ask.py",
        "chat.py",
        "draft_verify.py",
        "prompt_lookup.py",
        "remote.py",
        "speculative.py",
        "split.py",
        "worker.py",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


def test_ask(tmp_path: pathlib.Path) -> None:
    written = run("ask.py", tmp_path)
    told = re.findall(
        r"^-- tier (\d), local > (verified|corrected), masked: (.*)$", written, flags=re.MULTILINE
    )
    assert [tier for tier, _, _ in told] == ["2", "2", "2"]
    assert [masked for _, _, masked in told] == ["{}", "{'EMAIL': 1}", "{'PHONE': 1}"]
    assert not re.search(r"\[(EMAIL|PHONE)_", written)  # what the cloud has seen does not come back


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


def test_remote(tmp_path: pathlib.Path) -> None:
    written = run("remote.py", tmp_path)
    first, told, second, told_again, _end = re.split(r"^(-- .*)\n+", written, flags=re.MULTILINE)
    assert first == second
    assert re.fullmatch(r"-- no draft: \d+ tokens/s, \d+ passes, \d+ bytes", told)
    assert re.fullmatch(r"-- with draft: \d+ tokens/s, \d+ passes, \d+ bytes", told_again)


def test_split(tmp_path: pathlib.Path) -> None:
    written = run("split.py", tmp_path)
    first, told, second, told_again, _end = re.split(r"^(-- .*)\n+", written, flags=re.MULTILINE)
    assert first == second
    n_alone, n_drafted = (
        int(re.fullmatch(rf"-- {how} draft: \d+ tokens/s, (\d+) round trips, \d+ bytes", line)[1])  # type: ignore[index]
        for how, line in (("no", told), ("with", told_again))
    )
    assert n_drafted < n_alone / 2


def test_worker(tmp_path: pathlib.Path) -> None:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where it is ignored, children ignore it
    try:
        worker = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "worker.py")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "error", "SLLM_STATE": str(tmp_path / "state")},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with worker:
        try:
            assert worker.stdout is not None
            assert re.fullmatch(
                r"sllm://[\w-]+@127\.0\.0\.1:\d+#sha256=[0-9a-f]{64}\n", worker.stdout.readline()
            )
            worker.send_signal(signal.SIGINT)
            assert worker.communicate(timeout=60) == ("", "")
        finally:
            worker.kill()
    assert worker.returncode == 0


# ---- the notebook


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "colab_worker.ipynb").read_text(encoding="utf-8"))
    return found


def code(notebook: dict[str, Any]) -> list[str]:
    """Its code cells, without what is for IPython."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells]


def test_notebook_is_valid(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    for cell in notebook["cells"]:
        extra = {"code": {"execution_count", "outputs"}, "markdown": set()}[cell["cell_type"]]
        assert set(cell) == {"cell_type", "metadata", "source"} | extra
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        # As it is before anybody has run it: no line of somebody's worker in it.
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    for text in code(notebook):
        compile(text, "cell", "exec")


def test_notebook_serves(notebook: dict[str, Any], tmp_path: pathlib.Path) -> None:
    if not pathlib.Path(sys.executable).with_name("sllm").exists():
        pytest.skip("the package is not installed beside this interpreter")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = "\n".join(code(notebook))
    script = re.sub(r"^MODEL = .*$", f"MODEL = {str(embedded.DRAFT)!r}", script, flags=re.MULTILINE)
    script = re.sub(r"^PORT = .*$", f"PORT = {port}", script, flags=re.MULTILINE)
    folder = pathlib.Path(sys.executable).parent
    ended = subprocess.run(
        [sys.executable, "-c", f"{script}\nprint(worker.returncode)"],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    )
    assert ended.stderr == ""
    *_, line, status = ended.stdout.splitlines()
    assert re.fullmatch(r"sllm://[\w-]{32}@bore\.pub:12345#sha256=[0-9a-f]{64}", line)
    assert status == "0"

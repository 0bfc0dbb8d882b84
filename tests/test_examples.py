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
from typing import Any

import pytest

from sllm import embedded

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SHARED = "arguments.py"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != SHARED)
pytestmark = pytest.mark.usefixtures("one_core")


def start(name: str, folder: pathlib.Path, *args: str) -> subprocess.Popen[str]:
    """An example, in a folder where nothing of the repository is in the way."""
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where it is ignored, children ignore it
    more = {
        "PYTHONWARNINGS": "error",
        "PYTHONUTF8": "1",
        "SLLM_STATE": str(folder / "state"),
        "COLUMNS": "80",
    }
    try:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=folder,
            env={**os.environ, **more},
        )
    finally:
        signal.signal(signal.SIGINT, before)


def end(started: subprocess.Popen[str], typed: str = "") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of an example that gets this on stdin."""
    with started:
        try:
            out, err = started.communicate(typed, timeout=240)
        finally:
            started.kill()
    return started.returncode, out, err


def run(name: str, folder: pathlib.Path, typed: str = "", *args: str) -> str:
    """What an example writes that ends well."""
    status, out, err = end(start(name, folder, *args), typed)
    assert err == ""
    assert status == 0
    return out


def test_all_are_known() -> None:
    assert SCRIPTS == [
        "ask.py",
        "async_chat.py",
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
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_how_to_run_it(name: str, tmp_path: pathlib.Path) -> None:
    written = run(name, tmp_path, "", "--help")
    assert f"python examples/{name} [" in written
    assert "hf://owner/repo/file.gguf" in written


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_that_is_not_there_is_said_in_a_line(name: str, tmp_path: pathlib.Path) -> None:
    n_models = len(re.findall(r"\.gguf", run(name, tmp_path, "", "--help").splitlines()[0]))
    status, out, err = end(start(name, tmp_path, *["nothing.gguf"] * n_models))
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"\S*{name}: nothing\.gguf does not exist, expected a GGUF file\n", err)


def test_one_model_where_two_are_needed(tmp_path: pathlib.Path) -> None:
    status, out, err = end(start("speculative.py", tmp_path, str(embedded.TARGET)))
    assert (status, out) == (2, "")
    assert "error: TARGET and DRAFT go together, since they need the same vocabulary" in err


def test_ctrl_c_is_said_in_a_line(tmp_path: pathlib.Path) -> None:
    example = start("remote.py", tmp_path)
    assert example.stdout is not None
    assert example.stdout.read(1)  # it is at its text
    example.send_signal(signal.SIGINT)
    status, _out, err = end(example)
    assert (status, err) == (-signal.SIGINT, "\nended by Ctrl-C\n")


def test_ask(tmp_path: pathlib.Path) -> None:
    written = run("ask.py", tmp_path)
    told = re.findall(
        r"^    -- tier (\d), (.*), masked: (\{.*\}), (\d+) tokens sent", written, flags=re.MULTILINE
    )
    assert [masked for _, _, masked, _ in told] == ["{}", "{}", "{'NAME': 2, 'PHONE': 1}", "{}"]
    # All three tiers; which model answers which request is for the training of the pair to say.
    assert {tier for tier, *_ in told} == {"1", "2", "3"}
    assert [n_sent == "0" for tier, route, _, n_sent in told] == [route == "small" for _, route, *_ in told]


def test_speculative(tmp_path: pathlib.Path) -> None:
    shown = run("speculative.py", tmp_path)
    assert " of the drafted tokens were accepted; same text without draft: True\n" in shown
    drafted, alone = (
        [int(n) for n in re.findall(r"\d+", found)]
        for found in re.findall(r"draft +(\d+ tokens in \d+ passes, \d+) tokens/s\n", shown)
    )
    assert drafted[0] == alone[0] == alone[1]
    assert drafted[1] <= alone[1]
    assert "No gain in time" in shown or drafted[2] > 1.1 * alone[2]  # it says so where there is none


def test_draft_verify(tmp_path: pathlib.Path) -> None:
    shown = run("draft_verify.py", tmp_path)
    assert shown.startswith("Once upon a time there was")
    assert "\n从前有一只" in shown
    last = shown.splitlines()[-1]
    found = re.fullmatch(r"(\d+) passes over both texts, (\d+) without drafts; same texts: True", last)
    assert found
    assert int(found[1]) < int(found[2]) / 1.5


def test_chat(tmp_path: pathlib.Path) -> None:
    shown = run("chat.py", tmp_path, "What comes after spring?\nThank you!\n", str(embedded.TARGET))
    assert shown.count("> ") == 3  # two answers, and the question that the end of stdin answers
    assert shown.endswith("> \n")


def test_chat_forgets_its_beginning_where_the_context_is_full(tmp_path: pathlib.Path) -> None:
    shown = run("chat.py", tmp_path, "Tell me a story about a fox.\n" * 9, str(embedded.TARGET))
    assert shown.count("> ") == 10


def test_ctrl_c_ends_an_answer_and_not_the_chat(tmp_path: pathlib.Path) -> None:
    chat = start("chat.py", tmp_path, str(embedded.TARGET))
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write("Tell me a story about a fox.\n")
    chat.stdin.flush()
    assert chat.stdout.read(6)  # the prompt and the beginning of the answer
    chat.send_signal(signal.SIGINT)
    status, out, err = end(chat, "What comes after spring?\n")
    assert (status, err) == (0, "")
    assert out.count("> ") == 2
    assert out.endswith("> \n")


def test_async_chat(tmp_path: pathlib.Path) -> None:
    shown = run("async_chat.py", tmp_path)
    assert (
        len(re.findall(r"[?？.]\n    \w", shown)) == 3
    )  # each question with its answer, or the beginning of it
    assert re.search(r"^\d+ tokens in \d+\.\d s, all conversations together\n$", shown, flags=re.MULTILINE)


def test_prompt_lookup(tmp_path: pathlib.Path) -> None:
    lines = run("prompt_lookup.py", tmp_path, "", str(embedded.TARGET)).splitlines()
    line = r"(.+?) +(\d+) passes, (\d+) drafted tokens accepted, \d+ tokens/s: (.*)"
    found = [re.fullmatch(line, one) for one in lines]
    names, passes, accepted, texts = zip(*(one.groups() for one in found if one), strict=True)
    assert names == ("no draft", "ngram", "callable")
    assert len(set(texts)) == 1  # whatever drafts, the text is the target's
    assert int(passes[0]) == int(passes[1]) + int(accepted[1]) == int(passes[2]) + int(accepted[2])


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
    worker = start("worker.py", tmp_path)
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert re.fullmatch(r"sllm://[\w-]+@127\.0\.0\.1:\d+#sha256=[0-9a-f]{64}\n", line)
    worker.send_signal(signal.SIGINT)
    assert end(worker) == (0, "", "")


# ---- the notebook


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "colab_worker.ipynb").read_text(encoding="utf-8"))
    return found


def code(notebook: dict[str, Any]) -> list[str]:
    """Its code cells, without what is for IPython."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells]


def with_sllm() -> dict[str, str]:
    """An environment in which the command is found."""
    return {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


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


def test_notebook_says_what_it_misses(notebook: dict[str, Any], tmp_path: pathlib.Path) -> None:
    [install] = [cell for cell in code(notebook) if "WHEEL = " in cell]
    [serve] = [cell for cell in code(notebook) if "MODEL = " in cell]
    commands = {"no wheels/sllm-*.whl: build one": install}
    if pathlib.Path(sys.executable).with_name("sllm").exists():
        script = re.sub(r"^MODEL = .*$", 'MODEL = "nothing.gguf"', serve, flags=re.MULTILINE)
        commands["the worker has ended with exit status 2"] = f"import pathlib\n{script}"
    for said, script in commands.items():
        ended = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            cwd=tmp_path,
            env=with_sllm(),
            check=False,
        )
        assert said in ended.stderr
        assert ended.returncode == 1
        if "worker" in said:
            assert "nothing.gguf does not exist" in ended.stdout


def test_notebook_serves(notebook: dict[str, Any], tmp_path: pathlib.Path) -> None:
    if not pathlib.Path(sys.executable).with_name("sllm").exists():
        pytest.skip("the package is not installed beside this interpreter")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "sllm-0-cp310-abi3-linux_x86_64.whl").touch()  # the line that installs it is pip's
    script = "\n".join(code(notebook))
    script = re.sub(r"^MODEL = .*$", f"MODEL = {str(embedded.DRAFT)!r}", script, flags=re.MULTILINE)
    script = re.sub(r"^PORT = .*$", f"PORT = {port}", script, flags=re.MULTILINE)
    ended = subprocess.run(
        [sys.executable, "-c", f"{script}\nprint(worker.returncode)"],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        cwd=tmp_path,
        env=with_sllm(),
        check=False,
    )
    assert ended.stderr == ""
    *_, line, status = ended.stdout.splitlines()
    assert re.fullmatch(r"sllm://[\w-]{32}@bore\.pub:12345#sha256=[0-9a-f]{64}", line)
    assert status == "0"

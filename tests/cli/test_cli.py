"""The command line as a user meets it: real processes, their output, their exit status."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE, interrupt, one_line
from terminal import Terminal

import sllm
from sllm import embedded
from sllm.cli import arguments, console
from sllm.cli import devices as devices_command
from sllm.cli import main as cli
from sllm.engine.devices import devices

if TYPE_CHECKING:
    from collections.abc import Callable

GREETING = ("run", "--chat", *ONE, "Tell me a short story about a lost kite.")
# Takes minutes to compute.
LONG_PROMPT = "word and other words. " * 4_000


# ---- sllm run


def test_run_writes_the_text_and_nothing_else(command: Callable[..., Any]) -> None:
    ended = command(*GREETING, "-n", "12")
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert ended.stdout.endswith("\n")
    assert ended.stdout.strip()


def test_text_depends_on_the_seed_and_not_on_the_draft(command: Callable[..., Any]) -> None:
    def text(*args: str) -> str:
        ended = command(*GREETING, "-n", "40", "--temperature", "1.2", *args)
        assert (ended.returncode, ended.stderr) == (0, "")
        shown: str = ended.stdout
        return shown

    first = text("--seed", "7")
    assert text("--seed", "7") == first
    assert text("--seed", "7", "--draft", "none") == first
    assert text("--seed", "7", "--draft", "ngram") == first
    assert text("--seed", "7", "--draft", str(embedded.DRAFT)) == first
    assert text("--seed", "8") != first


def test_prompt_from_stdin(command: Callable[..., Any]) -> None:
    args = ("run", *ONE, "-n", "8", "--temperature", "0")
    texts = [
        command(*args, "从前有一只").stdout,
        command(*args, typed="从前有一只").stdout,
        command(*args, typed="从前有一只\n").stdout,
        command(*args, "-", typed="从前有一只\n").stdout,
        command(*args, "--", "从前有一只", typed="something else").stdout,
    ]
    assert texts[0].strip()
    assert len(set(texts)) == 1


def test_no_prompt(command: Callable[..., Any], start: Callable[..., Any]) -> None:
    ended = command("run", *ONE)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert one_line(ended.stderr).startswith("there is no prompt: none is named, and stdin is empty")
    assert one_line(command("run", *ONE, "-").stderr) == "the prompt has no tokens"

    ended = command("run", *ONE, typed=b"caf\xe9")
    assert ended.returncode == 2
    assert one_line(ended.stderr) == "stdin is not UTF-8: unexpected end of data at byte 3"

    controller, terminal = pty.openpty()
    try:
        process = start("run", *ONE, stdin=terminal)
        _, stderr = process.communicate(timeout=240)
    finally:
        os.close(controller)
        os.close(terminal)
    assert process.returncode == 2
    assert one_line(stderr.decode()).startswith("there is no prompt: ")


def test_stats(command: Callable[..., Any]) -> None:
    plain = command(*GREETING, "-n", "30", "--draft", "none", "--stats")
    assert plain.returncode == 0
    prompt, text, passes, ended_by = plain.stderr.splitlines()
    assert re.fullmatch(r"prompt: \d+ tokens, \d+\.\d\d s", prompt)
    assert re.fullmatch(r"text: \d+ tokens, \d+\.\d\d s, \d+\.\d tokens/s", text)
    assert re.fullmatch(r"passes of the target: \d+, 1\.00 per token", passes)
    assert ended_by in ("ended by: --max-tokens", "ended by: the model ended the text")

    drafted = command(*GREETING, "-n", "30", "--stats")
    assert drafted.stdout == plain.stdout
    assert re.search(
        r"^draft: \d+ of \d+ accepted \([01]\.\d\d\), \d+\.\d\d s$", drafted.stderr, re.MULTILINE
    )


def test_stop_and_grammar(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    grammar = tmp_path / "count.gbnf"
    grammar.write_text('root ::= "one, two, three, four"', encoding="utf-8")
    args = ("run", *ONE, "--grammar-file", str(grammar), "Count!")
    assert command(*args).stdout == "one, two, three, four\n"
    ended = command(*args, "--stop", "four", "--stop", ", three", "--stats")
    assert ended.stdout == "one, two\n"
    assert ended.stderr.endswith("ended by: --stop\n")


def test_context_that_fills_up(command: Callable[..., Any], endless: tuple[str, ...]) -> None:
    ended = command(*endless, "--n-ctx", "256", "--stats")
    assert ended.returncode == 0
    assert ended.stdout.startswith("again again ")
    assert ended.stderr.endswith("ended by: the context is full (--n-ctx)\n")


def test_who_wants_an_answer_is_told_of_chats(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    (tmp_path / "nothing.gbnf").write_text('root ::= ""')
    (tmp_path / "fox.gbnf").write_text('root ::= "fox"')
    told = "sllm run goes on with the prompt; for an answer to it there is --chat, or sllm chat"
    nothing, fox = (("run", *ONE, "--grammar-file", f"{name}.gbnf") for name in ("nothing", "fox"))
    ended = command(*nothing, "Who?")
    assert (ended.returncode, ended.stdout.strip()) == (0, "")
    assert ended.stderr == f"sllm: the model has ended the text at once; {told}\n"
    assert command(*nothing, "--chat", "Who?").stderr == ""
    assert command(*fox, "Who?").stderr == ""
    with Terminal(tmp_path, *fox, "Who?") as terminal:
        terminal.expect(f"({told})")
        assert terminal.ended() == 0
    with Terminal(tmp_path, *fox, "--chat", "Who?") as terminal:
        assert terminal.ended() == 0
        assert terminal.shown == "fox\n"


def test_unencodable_text(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    grammar = tmp_path / "fox.gbnf"
    grammar.write_text('root ::= "fox 狐狸."', encoding="utf-8")
    args = ("run", *ONE, "--grammar-file", str(grammar), "Say it!")
    ended = command(*args, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fox ??.\n", "")
    assert command(*args).stdout == "fox 狐狸.\n"

    # Where Python takes arguments for ASCII, they are what was typed all the same.
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    args = ("run", *ONE, "-n", "8", "从前有一只")
    assert command(*args, **ascii_alone).stdout == command(*args).stdout != "\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["walk"], "walk is no command (see sllm --help)"),
        (["notes.txt"], "notes.txt is no command, and no model: it is not a GGUF file (see sllm --help)"),
        (["chta"], "chta is no command: was `sllm chat` meant?"),
        (["me/it"], "me/it is no command, and there is no model of that name; was `sllm hf://me/it` meant"),
        (["./x/y/z"], "./x/y/z is no command, and there is no model of that name (see sllm --help)"),
        (["--model", "x.gguf"], "--model is no option of sllm itself: was `sllm x.gguf` meant?"),
        (["--target", "x.gguf", "Hi"], "--target is no option of sllm itself: was `sllm x.gguf` meant?"),
        (["--seed", "run", "x"], "--seed is no option of sllm itself: was `sllm run --seed ...` meant?"),
        (["--seed"], "--seed is no option of sllm itself: was `sllm chat --seed ...` meant?"),
        (["run", "--model", "x.gguf", "x"], "unrecognized arguments: --model; was --target meant?"),
        (["run", "--tempo", "1", "x"], "unrecognized arguments: --tempo; was --temperature meant?"),
        (["run", "--temp=1", "x"], "unrecognized arguments: --temp=1; was --temperature meant?"),
        (["run", "--maxtokens", "1", "x"], "unrecognized arguments: --maxtokens; was --max-tokens meant?"),
        (["serve", "--key", "x"], "arguments: --key; was --api-key-file or --generate-key meant?"),
        (["run", "--zzz", "x"], "unrecognized arguments: --zzz (see sllm run --help)"),
        (["run", "one", "two\nthree"], "there are 2 prompts; put the words of one in quotes"),
        (["run", "--temperature", "warm", "x"], "--temperature: invalid float value: 'warm'"),
        (["run", "--temperature", "nan", "x"], "temperature is nan, expected a finite number"),
        (["run", "--temperature=-1", "x"], "temperature is -1.0, expected"),
        (["run", "--top-p", "0", "x"], "top_p is 0.0, expected"),
        (["run", "--min-p", "1.5", "x"], "min_p is 1.5, expected"),
        (["run", "--top-k=-1", "x"], "top_k is -1, expected"),
        (["run", "--seed=-1", "x"], "seed is -1, expected"),
        (["run", "--seed", str(2**64), "x"], "seed is 18446744073709551616, expected"),
        (["run", "-n", "0", "x"], "-n/--max-tokens: 0 is out of range, expected 1 to 2147483647"),
        (["run", "-n", "4294967296", "x"], "4294967296 is out of range"),
        (["run", "-n", "many", "x"], "'many' is not an integer"),
        (["run", "--n-ctx", "0", "x"], "--n-ctx: 0 is out of range"),
        (["run", "--n-ctx", "2000000000", "x"], "out of memory: "),
        (["run", "--threads", "0", "x"], "--threads: 0 is out of range"),
        (["run", "--threads", "100000", "x"], "n_threads"),
        (["run", "--n-gpu-layers=-2", "x"], "--n-gpu-layers: -2 is out of range"),
        (["run", "--stop", "", "x"], "--stop is empty"),
        (["run", "--stop", "caf\udce9", "x"], "--stop: it is not UTF-8: unexpected end of data at byte 3"),
        (["run", "caf\udce9"], "the prompt is not UTF-8: unexpected end of data at byte 3"),
        (["run", "--n-ctx", "256", "--threads", "1", "word " * 400], "256"),
        (["run", "--draft", "nothing", "x"], "--draft: nothing does not exist, expected a GGUF"),
        (["run", "--target", "hf://fox", "x"], "cannot load 'hf://fox': "),
        (["run", "--target", "me/it", "x"], "me/it does not exist, expected a GGUF file; one on the Hugging"),
        (["run", "--target", "s3://me/it", "x"], "no such kind of address is known; expected hf://owner/repo"),
        (["run", "x.gguf"], "was `sllm run --target x.gguf PROMPT` meant? (A conversation: `sllm x.gguf`.)"),
        (["run", "x.gguf", "Say hello", "-n", "3"], "was `sllm run --target x.gguf 'Say hello'` meant?"),
        (["run", "x.gguf", "-n", "3", "Hello"], "was `sllm run --target x.gguf Hello` meant?"),
        (["run", "Say", "-n", "3", "hello"], "there are 2 prompts; put the words of one in quotes"),
        (["run", "a b/x.gguf", "Hello"], "there are 2 prompts; put the words of one in quotes"),
        (["run", "me/it:Q4_K_M"], "was `sllm run --target me/it:Q4_K_M PROMPT` meant?"),
        (["run", "file:///x.gguf"], "was `sllm run --target file:///x.gguf PROMPT` meant?"),
        (["run", "Say", "hello"], "there are 2 prompts; put the words of one in quotes"),
        (["run", "--target", "x.gguf", "y.gguf"], "x.gguf does not exist"),
        (["ask", "x.gguf", "Hello"], "was `sllm ask --small x.gguf Hello` meant?"),
        (["demo", "-n", "0"], "-n/--max-tokens: 0 is out of range"),
        (["demo", "--temperature", "inf"], "temperature is inf, expected a finite number"),
        (["inspect"], "the following arguments are required: GGUF (see sllm inspect --help)"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    refused: Callable[..., str],
    args: list[str],
    words: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Buy milk.", encoding="utf-8")
    assert words in refused(*args)


@pytest.mark.parametrize("before", [["run", "x", "--target"], ["run", "x", "--draft"], ["inspect"]])
def test_wrong_models(refused: Callable[..., str], before: list[str], tmp_path: pathlib.Path) -> None:
    text = tmp_path / "some\ntext.gguf"
    text.write_text("Once upon a time", encoding="utf-8")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    cut = tmp_path / "cut.gguf"
    data = embedded.DRAFT.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    assert "missing.gguf does not exist, expected a GGUF file" in refused(
        *before, str(tmp_path / "missing.gguf")
    )
    assert f"{tmp_path} is a directory, expected a GGUF file" in refused(*before, str(tmp_path))
    assert "text.gguf is not a GGUF file: it begins with b'Once'" in refused(*before, str(text))
    assert "empty.gguf is empty, expected a GGUF file" in refused(*before, str(empty))
    assert "cut.gguf" in refused(*before, str(cut))


def test_wrong_grammars(refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    grammar = tmp_path / "g.gbnf"
    args = ("run", "x", "--grammar-file")
    assert refused(*args, str(grammar)) == f"{grammar}: No such file or directory"
    assert refused(*args, str(tmp_path)) == f"{tmp_path}: Is a directory"
    grammar.write_bytes(b"root ::= \xff")
    assert refused(*args, str(grammar)).startswith(f"{grammar} is not UTF-8: ")
    grammar.write_text("  ", encoding="utf-8")
    assert "grammar is empty" in refused(*args, str(grammar))
    grammar.write_text("root ::= fox", encoding="utf-8")
    assert refused(*args, str(grammar)).startswith(f"{grammar}: ")
    assert "'fox'" in refused(*args, str(grammar))


def test_a_json_schema(
    command: Callable[..., Any], refused: Callable[..., str], tmp_path: pathlib.Path
) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('{"enum": ["fox 狐狸"]}', encoding="utf-8")
    args = ("run", *ONE, "Say it!", "--json-schema", str(schema))
    assert command(*args).stdout == '"fox 狐狸"\n'
    assert "exclude each other" in refused(*args, "--grammar-file", str(schema))
    for text, complaint in (
        ("{", "json_schema is not JSON"),
        ("[1]", "json_schema is [1], expected an object"),
        ('{"type": "fox"}', "fox"),
    ):
        schema.write_text(text, encoding="utf-8")
        told = refused(*args)
        assert told.startswith(f"{schema}: ")
        assert complaint in told
    assert refused("run", "x", "--json-schema", str(tmp_path / "none")).endswith("No such file or directory")


def test_draft_with_another_vocabulary(refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    data = embedded.DRAFT.read_bytes()
    with sllm.Model(embedded.DRAFT) as model:
        pieces = [model.vocab.piece(token) for token in range(model.vocab.n_tokens)]

    def entry(text: bytes) -> bytes:
        """A string as it lies in a GGUF."""
        return struct.pack("<Q", len(text)) + text

    piece = next(p for p in pieces if len(p) > 4 and p.isalpha() and data.count(entry(p)) == 1)
    other = piece[:-1] + (b"q" if piece[-1:] != b"q" else b"k")
    assert other not in pieces
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(data.replace(entry(piece), entry(other)))
    for args in (["run", "x"], ["chat"]):  # which says so before anything is typed
        found = refused(*args, "--draft", str(strange))
        assert found.startswith(
            f"token {pieces.index(piece)} is {piece!r} in target.gguf and {other!r} in strange.gguf"
        )


def test_one_refusal_for_real(command: Callable[..., Any]) -> None:
    for args in (["run", "--target", "missing.gguf", "x"], ["run", "-n", "x"], ["run", "--seed=-1", "x"]):
        ended = command(*args)
        assert (ended.returncode, ended.stdout) == (2, "")
        one_line(ended.stderr)


# ---- ends


def test_ctrl_c_while_it_writes(start: Callable[..., Any], endless: tuple[str, ...]) -> None:
    process = start(*endless, stdin=subprocess.DEVNULL)
    assert process.stdout.read(1) == b"a"
    _, stderr = interrupt(process)
    assert stderr == ""


def test_ctrl_c_during_a_long_prefill(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text(LONG_PROMPT, encoding="utf-8")
    with prompt.open("rb") as stdin:
        # llama.cpp's log says when the context is there; the prompt is next.
        process = start(
            "run", *ONE, "--draft", "none", "--n-ctx", "65536", stdin=stdin, env={"SLLM_DEBUG": "1"}
        )
        for line in process.stderr:
            if b"sched_reserve" in line:
                break
        else:
            pytest.fail("the context was never made")
        time.sleep(0.5)
        stdout, _ = interrupt(process)
    assert stdout == ""


def test_ctrl_c_while_it_reads(start: Callable[..., Any]) -> None:
    process = start("run", *ONE)
    process.stdin.write(b"Once " * 200_000)  # returns when most of it was read: a pipe holds far less
    process.stdin.flush()
    _, stderr = interrupt(process)
    assert stderr == ""


STUCK = """
import ctypes, sys, time
from sllm.cli import devices as command
from sllm.cli import main as cli

def devices():
    sys.stdout.write("x")
    sys.stdout.flush()
    try:
        time.sleep(60)
    finally:
        ctypes.CDLL(None).sleep(60)

command.devices = devices
sys.exit(cli.main(["devices"]))
"""


def test_call_that_does_not_come_back(start: Callable[..., Any]) -> None:
    process = start(program=["-c", STUCK])
    assert process.stdout.read(1) == b"x"
    assert interrupt(process) == ("", "")


def test_reader_that_goes_away(start: Callable[..., Any], endless: tuple[str, ...]) -> None:
    process = start(*endless, stdin=subprocess.DEVNULL)
    assert process.stdout.read(1) == b"a"
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk(start: Callable[..., Any]) -> None:
    with pathlib.Path("/dev/full").open("wb") as full:
        process = start("devices", stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert one_line(stderr.decode()) == f"cannot write to stdout: {os.strerror(errno.ENOSPC)}"


# ---- sllm alone


def test_the_help_of_all_commands(command: Callable[..., Any]) -> None:
    alone = command(COLUMNS="200")
    assert (alone.returncode, alone.stderr) == (0, "")
    assert command("--help").stdout == command("help").stdout == alone.stdout
    assert command("help", "worker", "token").stdout == command("worker", "token", "--help").stdout
    lines = alone.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split("  ")[1] for line in lines if re.match(r"  \S", line)]
    assert set(cli._COMMANDS) | {"--version"} == set(shown)
    for purpose in ("Text:", "Workers:", "Models:", "This machine:"):
        assert purpose in lines


# ---- sllm devices, sllm inspect, sllm --version


def test_devices(command: Callable[..., Any]) -> None:
    ended = command("devices")
    assert (ended.returncode, ended.stderr) == (0, "")
    heading, *rows = ended.stdout.splitlines()
    assert heading.split() == ["name", "type", "free", "total", "description"]
    assert len(rows) == len(devices())
    assert any(row.split()[:3] == [str(i), "CPU", "cpu"] for i, row in enumerate(rows))


def test_inspect(command: Callable[..., Any]) -> None:
    with sllm.Model(embedded.TARGET, n_gpu_layers=0) as model:
        found = json.loads(command("inspect", "--json", str(embedded.TARGET)).stdout)
        assert found["file"] == str(embedded.TARGET)
        assert found["file_bytes"] == embedded.TARGET.stat().st_size
        assert found["architecture"] == "llama"
        assert found["n_layer"] == model.n_layer
        assert found["n_ctx_train"] == model.n_ctx_train
        assert found["n_vocab"] == model.vocab.n_tokens
        assert found["vocab_fingerprint"] == model.vocab.fingerprint
        assert found["chat_template"] is True
        assert found["can_rollback"] == "free"
        assert found["n_mtp"] == 0

        ended = command("inspect", str(embedded.TARGET))
        assert (ended.returncode, ended.stderr) == (0, "")
        rows = dict(re.split(r"  +", line, maxsplit=1) for line in ended.stdout.splitlines())
        assert rows["architecture"] == "llama"
        assert rows["layers"] == str(model.n_layer)
        assert rows["context"] == f"{model.n_ctx_train} tokens"
        assert rows["fingerprint"] == model.vocab.fingerprint
        assert rows["chat template"] == "yes"
        assert rows["MTP heads"] == "0"


def test_version_and_help(command: Callable[..., Any]) -> None:
    ended = command("--version")
    assert ended.returncode == 0
    assert ended.stdout == f"sllm {sllm.__version__} (llama.cpp {sllm.llama_cpp_commit})\n"
    ended = command("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for name in ("demo", "run", "worker", "status", "ping", "devices", "inspect"):
        assert re.search(rf"^ +{name} ", ended.stdout, re.MULTILINE)


def test_installed_command() -> None:
    script = pathlib.Path(sys.executable).with_name("sllm")
    if not script.exists():
        pytest.skip("the package is not installed beside this interpreter")
    shown = subprocess.run(
        [str(script), "--version"], capture_output=True, encoding="utf-8", check=True, timeout=60
    )
    assert shown.stdout.startswith("sllm ")


# ---- pieces


def test_table() -> None:
    assert console.table([("", "left", "right"), ("a", "b", "c")], right=(2,)) == [
        "   left  right",
        "a  b         c",
    ]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_823_936, "5.8 MB"), (25 * 10**9, "25.0 GB")],
)
def test_size(n_bytes: int, text: str) -> None:
    assert console.size(n_bytes) == text


def test_whole() -> None:
    assert arguments.whole(0)("0") == 0
    assert arguments.whole(1)(str(2**31 - 1)) == 2**31 - 1
    for text in ("-1", "x", "1.5", "", str(2**31)):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.whole(0)(text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (sllm.ContextFullError("full"), "full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\nb"), "a b: No such file"),
        (MemoryError(), "out of memory"),
        (MemoryError("7 GB"), "out of memory: 7 GB"),
        (KeyError("fox"), "KeyError: 'fox' (unexpected; SLLM_DEBUG=1 shows where)"),
        (ValueError(), "ValueError:  (unexpected; SLLM_DEBUG=1 shows where)"),
        (sllm.ModelLoadError("\x1b[2Jcleared"), "\ufffd[2Jcleared"),
    ],
)
def test_reason(error: Exception, text: str) -> None:
    assert console.reason(error) == text


def test_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(devices_command, "devices", broken)
    monkeypatch.delenv("SLLM_DEBUG", raising=False)
    assert refused("devices") == "ZeroDivisionError: oops (unexpected; SLLM_DEBUG=1 shows where)"
    monkeypatch.setenv("SLLM_DEBUG", "1")
    assert cli.main(["devices"]) == 2
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert "in broken\n" in shown


def test_nothing_is_left_behind(refused: Callable[..., str]) -> None:
    handlers = logging.getLogger("sllm").handlers[:]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    threads = threading.active_count()
    refused("run", "--seed=-1", "x")
    assert logging.getLogger("sllm").handlers == handlers
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert threading.active_count() == threads


def test_log(capfd: pytest.CaptureFixture[str]) -> None:
    out = console.Output()
    with cli._shown_log(out, debug=False):
        logging.getLogger("sllm").warning("%s cannot\ntake back tokens", "m.gguf")
        logging.getLogger("sllm.llama_cpp").warning("chatter")
        logging.getLogger("sllm").info("detail")
    assert one_line(capfd.readouterr().err) == "warning: m.gguf cannot take back tokens"


def test_controls_reach_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    out = console.Output()
    out.text("a\x1b[2J\tb\n")
    out.terminal = out.colour = True
    out.text("a\x1b[2J\tb\x9b\n")
    out.text("drafted", style="\x1b[32m")
    assert capfd.readouterr().out == "a\x1b[2J\tb\na\ufffd[2J\tb\ufffd\n\x1b[32mdrafted\x1b[0m"

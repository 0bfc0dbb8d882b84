"""``sllm demo`` as a user meets it, and what it leaves behind: nothing."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import os
import pathlib
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE, PATIENCE, environment, first_byte, interrupt, one_line, read_terminal

from sllm.cli import console, demo, demo_triage
from sllm.cli import main as cli
from sllm.cli.columns import width
from sllm.cli.demo_ways import WrittenText
from sllm.privacy import placeholders
from sllm.triage import hybrid

if TYPE_CHECKING:
    from collections.abc import Callable

FIGURES = r" +(\d+\.\d) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+)"


def test_demo(command: Callable[..., Any]) -> None:
    args = ("-n", "32", "--seed", "3", *ONE, "Tell me a short story about a lost kite.")
    ended = command("demo", "--rtt", "20", *args)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert max(map(width, ended.stdout.splitlines())) <= 80
    ways, _, who = ended.stdout.partition("\n\nWho answers: ")
    head, question, rest = ways.split("\n\n", 2)
    answer, why, table = rest.rsplit("\n\n", 2)
    assert "behind a link of 20 ms round trip" in joined(head)
    assert (
        "pace: that of large models: each pass of the target takes 30 ms and each drafted token 10 ms"
        in joined(head)
    )
    assert "[in brackets]: drafted here" in head
    assert why == "(cut at 32 tokens, in the middle of the text: -n N allows more)"
    assert question == "> Tell me a short story about a lost kite."
    heading, streaming, wait, hints, ahead, *said = table.splitlines()
    assert heading.split() == ["tokens/s", "x", "streaming", "passes/token", "bytes/token"]
    found = []
    for how, line in [
        ("cloud streaming", streaming),
        ("draft, then wait", wait),
        ("hints", hints),
        (r"hints \+ run-ahead", ahead),
    ]:
        figures = re.fullmatch(f"{how}{FIGURES}", line)
        assert figures is not None
        found.append([float(one) for one in figures.groups()])
    assert found[0][1:3] == [1.0, 1.0]
    assert found[0][0] < 100  # it is paced: a pass takes a millisecond or two
    assert found[1][2] < 1.0  # passes per token; those of hints depend on when they come
    assert all(figures[2] <= 1.0 for figures in found)
    assert re.fullmatch(
        r"(The gain: .*|Hints bring little in this run.*)"
        r" All 4 texts are the same, the target's own: \d+ tokens?, compared one by one\.",
        joined("\n".join(said)),
    )
    check_tiers(who)

    # ... and what it showed is what `run` writes.
    alone = command("run", "--chat", "--draft", "none", "--temperature", "0.4", *args)
    assert joined(re.sub(r"[][]", "", answer)) == joined(alone.stdout)


def joined(text: str) -> str:
    """A wrapped text in one line, without the spaces and line ends between Chinese characters."""
    text = re.sub(r"(?<=[^\x00-\u2fff])\s+(?=[^\x00-\u2fff])", "", text)
    return " ".join(text.split())


def unwrapped(lines: list[str], column: int) -> list[list[str]]:
    """The rows of a table whose last column, which begins at ``column``, is wrapped."""
    rows: list[list[str]] = []
    for line in lines:
        first, last = line[:column].split("  "), line[column:]
        if line[:column].strip():
            rows.append([*(cell.strip() for cell in first if cell.strip()), last])
        else:
            rows[-1][-1] += f"\n{last}"
    return [[*row[:-1], joined(row[-1])] for row in rows]


def check_tiers(who: str, language: str = "en") -> None:
    """What is shown of who answers, whatever nonce the placeholder has."""
    table, private = who.split("\n\n")
    lines = table.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("tier  route"))
    rows = unwrapped(lines[heading + 1 :], lines[heading].index("request"))
    asked = [*demo_triage.REQUESTS, demo_triage.PRIVATE[language].text]
    secrets = demo_triage.PRIVATE[language].secrets
    assert [row[3].partition(" -> ")[0] for row in rows] == [joined(one) for one in asked]
    routes = {"1": "small", "2": "local > ", "3": "cloud"}
    assert all(row[1].startswith(routes[row[0]]) for row in rows)
    assert all((int(row[2]) > 0) == (row[0] != "1") for row in rows)  # what stays here costs no cloud tokens
    for chinese in (False, True):
        assert {row[0] for row in rows[:-1] if row[3].partition(" -> ")[0].isascii() != chinese} == {
            "1",
            "2",
            "3",
        }
    shown = private_lines(private)
    assert shown["asked here"] == joined(asked[-1])
    assert all(secret in shown["asked here"] for secret in secrets)
    assert re.search(r"\[NAME_1_[a-z0-9]+\].*\[PHONE_2_[a-z0-9]+\]", shown["sent"])
    assert not any(secret in shown["sent"] for secret in secrets)
    assert re.fullmatch(r"\d+ of the \d+ tokens .* stand", shown["verdict"])
    assert not any(secret in shown.get("came back", "") for secret in secrets)
    assert re.search(
        r"Of \d+ texts that the connection was handed for the worker, none holds the name or the number\.$",
        joined(private),
    )


def private_lines(text: str) -> dict[str, str]:
    """What the demo shows of the private request, by what stands before it."""
    parts = re.split(r"^(asked here|sent|verdict|came back|shown here):", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], map(joined, parts[2::2]), strict=True))
    # Behind the answer stand the two sentences on what was put back and what was sent.
    found["shown here"] = re.split(
        r" (?:\d+ placeholders? put back|The answer holds no placeholder)", found["shown here"]
    )[0]
    return found


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_fits_the_terminal(start: Callable[..., Any], columns: int) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    args = ("-n", "40", "--unpaced", "--rtt", "0", "--language", "zh", *ONE)
    process = start("demo", *args, stdout=terminal, env={"COLUMNS": ""})
    os.close(terminal)
    shown = re.sub("\x1b\\[[0-9;]*m", "", read_terminal(controller).decode("utf-8"))
    assert process.wait(timeout=60) == 0
    widths = [width(line.rstrip("\r")) for line in shown.split("\n")]
    assert max(widths) <= min(columns, 80)
    assert max(widths) > min(columns, 80) - 4  # and it uses what there is
    assert "乐乐" in shown


def test_without_chinese(start: Callable[..., Any]) -> None:
    """Where stdout cannot have them, characters are question marks, and that is said."""
    process = start(
        "demo", "-n", "8", "--unpaced", "--rtt", "0", *ONE, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    )
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, b"")
    assert b"Chinese text is shown as question marks" in joined(out.decode("ascii")).encode()
    assert b"-> ????????" in out


@pytest.mark.parametrize("language", sorted(demo.PROMPTS))
def test_its_own_requests_are_answered(capfd: pytest.CaptureFixture[str], language: str) -> None:
    """The story is about what was asked for and has an end; what is not hard is answered right."""
    assert cli.main(["demo", "--unpaced", "--rtt", "0", *ONE, "--language", language]) == 0
    shown = joined(re.sub(r"[][]", "", capfd.readouterr().out))
    assert "(ended by the target itself, after " in shown
    story = shown.partition("(ended by")[0].rpartition("> ")[2]
    named = {
        "en": ("Oscar", "fox", "red kite", "the kite was gone", "Thank you"),
        "zh": ("乐乐", "小狐狸", "许一个愿"),
    }[language]
    assert all(word in story for word in named)
    for answer in (
        "Summer comes after spring.",
        "德国的首都是柏林。",
        "女孩在图书馆里看书。",
        "The cat is sleeping in the kitchen.",
    ):
        assert f"-> {answer}" in shown


def test_in_a_checkout(tmp_path: pathlib.Path) -> None:
    """As the README has it, where a folder sllm/ lies that is not what is installed."""
    decoy = tmp_path / "sllm"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise ImportError('the wrong sllm')\n", encoding="utf-8")
    # What an installed script does: the folder that it is called in is not where it imports from.
    script = "import sys; del sys.path[0]; from sllm.cli.main import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", script, "demo", "-n", "8", "--unpaced", "--rtt", "0", *ONE],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment(),
        timeout=240,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "All 4 texts are the same" in ended.stdout


@pytest.mark.parametrize("more", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours(start: Callable[..., Any], more: dict[str, str]) -> None:
    controller, terminal = pty.openpty()
    process = start("demo", "-n", "8", "--unpaced", "--rtt", "0", *ONE, stdout=terminal, env=more)
    os.close(terminal)
    shown = read_terminal(controller)
    assert process.wait(timeout=60) == 0
    assert b"pace:" not in shown
    if more:
        assert b"\x1b" not in shown
        assert b"[in brackets]: drafted" in shown
    else:
        assert b"\x1b[32mgreen\x1b[0m: drafted" in shown
        assert shown.count(b"\x1b[32m") == shown.count(b"\x1b[0m")


# ---- who answers

QUICK = ("demo", "--unpaced", "--rtt", "0", "-n", "3", *ONE)


@pytest.mark.parametrize("language", sorted(demo_triage.PRIVATE))
def test_a_placeholder_comes_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], language: str
) -> None:
    digits = random.Random(5)  # of the nonce, which takes its turn in deciding what so small a model says
    monkeypatch.setattr(placeholders, "secrets", digits)
    assert cli.main([*QUICK, "--language", language]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    check_tiers(shown.out.partition("\n\nWho answers: ")[2], language)
    line = private_lines(shown.out.rpartition("\n\n")[2])
    # The answer names the sender, the number, and what was lost.
    assert all(secret in line["shown here"] for secret in demo_triage.PRIVATE[language].secrets)
    assert {"en": "your umbrella", "zh": "您的雨伞"}[language] in line["shown here"]
    assert re.search(r"^2 placeholders put back\.", shown.out, re.MULTILINE)


def test_what_leaks_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without detectors nothing is masked, and the demo sees the number in what it has sent."""
    monkeypatch.setattr(demo_triage, "Hybrid", functools.partial(hybrid.Hybrid, detectors=()))
    assert cli.main([*QUICK]) == 1
    shown = capfd.readouterr()
    assert re.fullmatch(r"private values are in [1-9]\d* of \d+ texts for the worker", one_line(shown.err))
    assert "none holds" not in shown.out


def test_what_stays_here_is_told() -> None:
    asked = demo_triage._Asked(
        "ask", 2, "local", 0, "answer", ("failed closed: X", "stays here"), 0, (), "", 0, 0
    )
    assert demo_triage._private_lines(asked)[1:] == [
        ("", "nothing of it was sent: failed closed: X; stays here")
    ]
    unrestored = dataclasses.replace(asked, sent=("[PHONE_1_a1b2]",), received="[PHONE_1]", reasons=())
    assert demo_triage._private_lines(unrestored)[1:] == [
        ("sent:        ", "[PHONE_1_a1b2]"),
        ("came back:   ", "[PHONE_1]"),
        ("shown here:  ", "answer"),
        ("", "The answer holds no placeholder that was sent, so none was put back."),
    ]
    verified = dataclasses.replace(unrestored, received="", n_kept=5, n_checked=5, n_restored=1)
    assert demo_triage._private_lines(verified)[2:] == [
        ("verdict:     ", "5 of the 5 tokens of the answer from here stand"),
        ("shown here:  ", "answer"),
        ("", "1 placeholder put back."),
    ]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("call 415-555-0147", True),
        ("call 415 555 01 47.", True),
        ("call [PHONE_1_k7q4]", False),
        ("415-555-0148", False),
        ("", False),
    ],
)
def test_what_holds_a_number(text: str, held: bool) -> None:
    assert demo_triage._holds(text, "415-555-0147") is held
    assert not demo_triage._holds(text, "Clara")  # no digits are not those of every text


# ---- its end


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(true: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (value := true()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return value


def read_until(process: subprocess.Popen[bytes], words: bytes) -> None:
    assert process.stdout is not None
    seen = b""
    while words not in seen:
        block = os.read(process.stdout.fileno(), 4096)
        assert block
        seen += block


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="there is no /proc")
@pytest.mark.parametrize("when", [b"draft:", b"\n\n> ", b"\n\n> Tell me"])
def test_ctrl_c_leaves_nothing(start: Callable[..., Any], tmp_path: pathlib.Path, when: bytes) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start("demo", *ONE, "-n", "1000", env={"TMPDIR": str(temporary)})
    assert first_byte(process) == b"t"
    read_until(process, when)
    (worker,) = wait_for(lambda: children(process.pid))
    if when.endswith(b"me"):
        read_until(process, b"\n\n")  # the answer is on its way
    _, stderr = interrupt(process)
    assert stderr == ""
    wait_for(lambda: not alive(worker))
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_worker_ends_with_a_killed_demo(start: Callable[..., Any]) -> None:
    process = start("demo", *ONE, "-n", "1000")
    read_until(process, b"\n\n> ")
    (worker,) = children(process.pid)
    process.kill()
    wait_for(lambda: not alive(worker))


def test_reader_that_goes_away(start: Callable[..., Any]) -> None:
    process = start("demo", *ONE, "-n", "1000")
    read_until(process, b"\n\n> ")
    process.stdout.close()
    began = time.monotonic()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert time.monotonic() - began < PATIENCE
    assert process.stderr.read() == b""


def test_worker_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    broken = tmp_path / "python"
    for script, reason in [
        ("exit 3", "exit status 3"),
        ("echo 'sllm: no luck today' >&2; exit 2", "no luck today"),
    ]:
        broken.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        assert cli.main(["demo", *ONE]) == 2
        assert one_line(capfd.readouterr().err) == f"the demo's worker did not start: {reason}"


# ---- its verdict


def told(*tokens: int, how: str = "drafting") -> WrittenText:
    return WrittenText(how, tokens)


def test_demo_says_when_the_texts_differ(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "written_alone", lambda *_args: told(1, 2, 3))
    assert cli.main(["demo", "--unpaced", "--rtt", "0", "-n", "3", *ONE]) == 1
    shown = capfd.readouterr()
    assert "the same" not in shown.out
    assert one_line(shown.err) == (
        "the text by 'cloud streaming' is NOT the target's own: it differs from token 0 of the answer on"
    )


def test_difference() -> None:
    assert demo._difference(told(1, 2), told(1, 2)) is None
    assert "from token 1 " in (demo._difference(told(1), told(1, 2)) or "")
    assert "from token 1 " in (demo._difference(told(1, 3), told(1, 2)) or "")
    assert "by 'drafting' is NOT" in (demo._difference(told(1, 2, 3), told(1, 2)) or "")


def test_figures_and_gain() -> None:
    streaming = WrittenText("cloud streaming", (1,) * 30, 30, 1.0, 3000)
    slow, quick = (WrittenText("hints", (1,) * 30, 10, seconds, 6000) for seconds in (1.0, 0.5))
    assert demo._figures([streaming, quick])[1:] == [
        ("cloud streaming", "30.0", "1.00", "1.00", "100"),
        ("hints", "60.0", "2.00", "0.33", "200"),
    ]
    said = demo._gain([streaming, quick], paced=False)
    assert said == "The gain: 2.0 x the tokens per second of streaming, for 2.0 x its bytes."
    assert "the pace above" in demo._gain([streaming, quick], paced=True)
    assert demo._gain([streaming, slow], paced=True).startswith("Hints bring little in this run")
    lucky = dataclasses.replace(quick, n_passes=30)  # quicker, and not by drafts
    assert demo._gain([streaming, lucky], paced=True).startswith("Hints bring little in this run")
    # A text of no time at all divides by nothing.
    nothing = [WrittenText("cloud streaming", ())]
    assert demo._figures(nothing)[1][1:] == ("0.0", "-", "0.00", "0")
    assert demo._gain(nothing, paced=True).startswith("Hints bring little in this run")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("eog", "(ended by the target itself, after 3 tokens)"),
        ("length", "(cut at 9 tokens, in the middle of the text: -n N allows more)"),
        ("context", "(cut after 3 tokens: the context of the model is full)"),
    ],
)
def test_why_it_ended(reason: str, said: str) -> None:
    text = dataclasses.replace(told(1, 2, 3), finish_reason=reason)
    assert demo._why_it_ended(text, 9) == said


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        (" upon a time", " [upon a time]"),
        ("end.\n\n", "[end.]\n\n"),
        (" ", " "),
        ("", ""),
        ("\n\nTwo  words ", "\n\n[Two  words] "),
        ("狐狸", "[狐狸]"),
    ],
)
def test_brackets(text: str, marked: str) -> None:
    assert demo._bracketed(text) == marked


def test_prompt_reaches_no_terminal_raw(capfd: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(
        prompt="a\x1b[2J\nb",
        language="en",
        temperature=0.0,
        seed=1,
        max_tokens=2,
        rtt=0.0,
        unpaced=True,
        threads=1,
    )
    assert demo.run(args, console.Output()) == 0
    assert "\n\n> a\ufffd[2J b\n\n" in capfd.readouterr().out

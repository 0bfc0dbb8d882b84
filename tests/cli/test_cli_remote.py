"""``sllm worker`` and its clients as a user meets them: real processes on both ends."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hostile_grammars import HOSTILE
from processes import ENDLESS, ONE, PATIENCE, environment, first_byte, interrupt, one_line, read_terminal

import sllm
from sllm import embedded
from sllm.cli import console, status
from sllm.cli import main as cli
from sllm.cli import worker as worker_command
from sllm.cli.addresses import worker_addresses
from sllm.cli.console import CommandError
from sllm.cli.run_report import ShownText, summary
from sllm.cli.slow_link import Link
from sllm.generation.text_stream import GenerationStats, Run
from sllm.targets.base import RemoteStats
from sllm.wire import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINE = re.compile(r"sllm://[\w-]{32}@127\.0\.0\.1:\d+#sha256=[0-9a-f]{64}\n")
QUESTION = "Tell me a short story about a lost kite."
GREETING = ("run", "--chat", *ONE, "-n", "40", "--temperature", "1.2", "--seed", "7", QUESTION)
TWO = ("--head", "1", "--remote", "sllm://h", "--remote", "sllm://i")
SLOW = ("--pass-seconds", "0.1")  # so that a text is not over before something can happen to it


def serve(start: Callable[..., Any], folder: pathlib.Path, *args: str, **more: Any) -> tuple[Any, str]:
    """A worker on the embedded target, and the line that it has printed."""
    listen = () if "--listen" in args else ("--listen", "127.0.0.1:0")
    process = start("worker", *listen, "--state", str(folder / "state"), *ONE, *args, **more)
    return process, process.stdout.readline().decode()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A worker for all tests that do it no harm; its address."""
    folder = tmp_path_factory.mktemp("worker")
    process = subprocess.Popen(
        [sys.executable, "-m", "sllm", "worker", "--listen", "127.0.0.1:0", "--state", str(folder), *ONE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def line_file(worker: str, tmp_path: pathlib.Path) -> str:
    """``@FILE`` for that worker."""
    path = tmp_path / "line"
    path.write_text(f"{worker}\n", encoding="utf-8")
    return f"@{path}"


@pytest.fixture(scope="module")
def local_text() -> str:
    """What GREETING writes without a worker."""
    ended = subprocess.run(
        [sys.executable, "-m", "sllm", *GREETING, "--draft", "none"],
        capture_output=True,
        env=environment(),
        check=True,
        timeout=240,
    )
    return ended.stdout.decode()


@pytest.fixture
def endless_remote(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Arguments of a text that only the worker's context ends; ``--remote URI`` comes after them."""
    grammar = tmp_path / "endless.gbnf"
    grammar.write_text(ENDLESS, encoding="utf-8")
    return ("run", *ONE, "--draft", "none", "--grammar-file", str(grammar), "Once", "--remote")


# ---- sllm run --remote


def test_run_writes_the_local_text(
    command: Callable[..., Any], worker: str, line_file: str, local_text: str
) -> None:
    for args in (
        [worker],
        [line_file, "--draft", "none"],
        [line_file, "--draft", "ngram"],
        [line_file, "--draft", str(embedded.DRAFT), "--n-ctx", "512"],
        [line_file, "--no-run-ahead", "--on-loss", "raise", "--deadline", "5"],
        [line_file, "--on-loss", "local"],
    ):
        ended = command(*GREETING, "--remote", *args)
        assert (ended.stdout, ended.stderr, ended.returncode) == (local_text, "", 0)
    ended = command(*GREETING, "--remote", SLLM_REMOTE=worker)
    assert (ended.stdout, ended.stderr) == (local_text, "")
    ended = command(*GREETING, "--remote", SLLM_REMOTE=line_file)
    assert (ended.stdout, ended.stderr) == (local_text, "")
    # A vocabulary that cannot be kept is fetched each time.
    ended = command(*GREETING, "--remote", worker, SLLM_CACHE="/dev/null/nowhere")
    assert (ended.stdout, ended.stderr) == (local_text, "")


def test_stats(command: Callable[..., Any], line_file: str) -> None:
    # Without run-ahead the worker waits for hints, however late a busy machine makes them. On one that is
    # very busy the draft, the package's own by default, may pause from the beginning.
    for _ in range(5):
        ended = command(*GREETING, "--stats", "--no-run-ahead", "--remote", line_file)
        assert ended.returncode == 0
        if re.search(r"^draft: \d+ of \d+ accepted ", ended.stderr, re.MULTILINE):
            break
    else:
        raise AssertionError(ended.stderr)
    assert re.search(r"^tokens: \d+ drafted here, \d+ the target's own$", ended.stderr, re.MULTILINE)
    assert re.search(
        r"^link: (\d+\.\d ms round trip, )?[\d.]+ k?B of messages up, [\d.]+ k?B down,"
        r" \d+ bytes per token, \d+ hints?$",
        ended.stderr,
        re.MULTILINE,
    )
    assert re.search(r"^lost to rejections: \d+\.\d\d s of the draft's time$", ended.stderr, re.MULTILINE)
    assert "link lost" not in ended.stderr


def test_stats_of_a_chain() -> None:
    stats = GenerationStats(remote=RemoteStats(n_hops=2, relayed=("a:1 to b:2: it is older",)))
    lines = summary(stats)
    assert "rows from worker to worker: 2 hops" in lines
    assert "rows through here, from a:1 to b:2: it is older" in lines
    assert not any("rows" in line for line in summary(GenerationStats(remote=RemoteStats())))


def test_a_split_between_several_workers(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path, local_text: str
) -> None:
    """The workers, each a process of its own, pass hidden states on where they may; the rest goes through
    here, and the report says which way it was.
    """
    here = ("--hops", "127.0.0.1")
    lines = [
        serve(start, tmp_path, "--layers", layers, "--n-ctx", "512", *hops)[1].strip()
        for layers, hops in (("2:3", here), ("3:5", ()), ("5:7", here))
    ]
    ends = [auth.Address.parse(line).endpoint for line in lines]
    workers = [word for line in lines for word in ("--remote", line)]
    split = (*GREETING, "--head", "2", "--codec", "f32", "--stats", *workers)

    def ways(*args: str) -> list[str]:
        ended = command(*split, *args)
        assert (ended.stdout, ended.returncode) == (local_text, 0)
        return [line for line in ended.stderr.splitlines() if line.startswith("rows ")]

    no_hops = f"rows through here, from {ends[1]} to {ends[2]}: {ends[1]} connects to no other worker"
    assert ways() == ["rows from worker to worker: 1 hop", f"{no_hops} (sllm worker --hops)"]
    assert ways("--hops", "none", "--draft", "none") == [
        f"rows through here, from {ends[i]} to {ends[i + 1]}: SplitTarget(hops=False), --hops none"
        for i in range(2)
    ]
    # As the one before it sees a worker: by another address, which may as well be one with nobody there.
    other = f"127.0.0.1:{ends[1].rpartition(':')[2]}"
    assert ways("--hops", other, "--hops", "same")[0] == "rows from worker to worker: 1 hop"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    lost, older = ways("--hops", nobody, "--hops", "same")
    assert lost.startswith(f"rows through here, from {ends[0]} to {nobody}: ")
    assert older.startswith(no_hops)
    wrong = command(*split[:-2])
    assert "the workers have layers [2, 3), [3, 5), and [2, 7) lie between" in one_line(wrong.stderr)


def test_a_split_whose_file_says_what_is_here(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    part = tmp_path / "part.gguf"
    sllm.export_layers(embedded.TARGET, part, 0, 2)
    line = serve(start, tmp_path, "--layers", "2:8", "--n-ctx", "512")[1].strip()
    split = (*GREETING, "--tail", "none", "--codec", "f32", "--remote", line, "--target")
    whole = command(*split, str(embedded.TARGET), "--head", "2")
    ended = command(*split, str(part))
    assert (ended.stdout, ended.returncode) == (whole.stdout, 0)
    assert len(ended.stdout) > 10
    more = command(*split, str(part), "--head", "3")
    assert "head is 3, and part.gguf holds the first 2 layers alone" in one_line(more.stderr)
    told = one_line(command(*split, str(embedded.TARGET)).stderr)
    assert told == "--target and --remote exclude each other, except for a split: name --head"


def test_grammar_is_checked_before_anything_is_sent(
    refused: Callable[..., str], line_file: str, tmp_path: pathlib.Path
) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text("root ::= fox", encoding="utf-8")
    told = refused("run", "x", "--grammar-file", str(grammar), "--remote", line_file)
    assert told.startswith(f"{grammar}: ")
    assert "'fox'" in told


def test_ctrl_c(start: Callable[..., Any], tmp_path: pathlib.Path, endless_remote: tuple[str, ...]) -> None:
    _, line = serve(start, tmp_path, *SLOW)
    process = start(*endless_remote, line.strip(), stdin=subprocess.DEVNULL)
    assert first_byte(process) == b"a"
    _, stderr = interrupt(process)
    assert stderr == ""


def test_worker_that_is_killed_and_comes_back(
    start: Callable[..., Any], tmp_path: pathlib.Path, local_text: str
) -> None:
    process, line = serve(start, tmp_path, *SLOW)
    address = auth.Address.parse(line)
    client = start(
        *GREETING, "--draft", "none", "--stats", "--remote", line.strip(), stdin=subprocess.DEVNULL
    )
    shown = first_byte(client)
    process.kill()
    process.wait()
    serve(start, tmp_path, "--listen", address.endpoint)
    stdout, stderr = client.communicate(timeout=120)
    assert client.returncode == 0
    assert (shown + stdout).decode() == local_text
    warning = f"sllm: warning: the link to {address.endpoint} is lost: "
    assert stderr.decode().startswith(warning)
    assert re.search(r"^link lost: 1 time, \d+\.\d\d s$", stderr.decode(), re.MULTILINE)


def test_run_local_while_the_link_is_lost(
    start: Callable[..., Any], local_text: str, tmp_path: pathlib.Path
) -> None:
    """A pipe gets the target's text alone; a terminal is shown what the draft says meanwhile, dim."""
    address = auth.Address.parse(serve(start, tmp_path, *SLOW)[1])

    def through(link: Link, **more: Any) -> tuple[Any, Callable[[], None]]:
        there = auth.Address(link.host, link.port, address.token, address.fingerprint)
        client = start(
            *(*GREETING, "--on-loss", "local", "--stats", "--remote", there.uri),
            stdin=subprocess.DEVNULL,
            **more,
        )

        def lose() -> None:
            link.down()
            link.cut()
            time.sleep(1.0)  # for the draft to say something
            link.up()

        return client, lose

    with Link((address.host, address.port)) as link:
        client, lose = through(link)
        first = first_byte(client)
        lose()
        stdout, _ = client.communicate(timeout=120)
        assert client.returncode == 0
        assert (first + stdout).decode() == local_text

        controller, terminal = pty.openpty()
        client, lose = through(link, stdout=terminal)
        os.close(terminal)
        shown = os.read(controller, 1)
        lose()
        shown += read_terminal(controller)
        assert client.wait(timeout=120) == 0
        told: str = client.stderr.read().decode()
    text = shown.decode().replace("\r\n", "\n")
    if "withdrawn" not in told:  # everything had been committed before the link was lost
        assert text == local_text
        return
    withdrawn = re.search(r"^sllm: the link is back; withdrawn: the last (\d+) tokens?, ", told, re.MULTILINE)
    assert withdrawn is not None
    assert 0 < int(withdrawn[1]) <= 40  # the draft alone, too, keeps to --max-tokens
    assert re.search(r"^link lost: 1 time, .* by the draft alone, withdrawn$", told, re.MULTILINE)
    before, after = re.fullmatch(r"([^\x1b]*)(?:\x1b\[2m[^\x1b]*\x1b\[0m)+\n?([^\x1b]*)", text).groups()  # type: ignore[union-attr]
    certain = before.rpartition("\n")[2]
    assert after.startswith(certain)
    assert before + after.removeprefix(certain) == local_text


def test_answer_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    def run(text: str, source: str, withdrawn: tuple[Run, ...] = ()) -> Run:
        return Run(0, (1,), text, 0, source, withdrawn)

    def show(**more: bool) -> str:
        out = console.Output()
        for name, value in more.items():
            setattr(out, name, value)
        answer = ShownText(out)
        local = (run("a do", "local"), run("g", "local"))
        for one in (run("Hi!\nOnce ", "target"), *local, run("a cat", "draft", local), run(".\n", "target")):
            answer.add(one)
        return capfd.readouterr().out

    assert show() == "Hi!\nOnce a cat.\n"
    assert show(terminal=True) == "Hi!\nOnce [a dog]\nOnce a cat.\n"
    assert show(terminal=True, colour=True) == ("Hi!\nOnce \x1b[2ma do\x1b[0m\x1b[2mg\x1b[0m\nOnce a cat.\n")


# ---- sllm ping, sllm status


def rows(stdout: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in stdout.splitlines() if line)


def test_ping(command: Callable[..., Any], worker: str, line_file: str) -> None:
    ended = command("ping", line_file)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = rows(ended.stdout)
    assert found["worker"] == auth.Address.parse(worker).endpoint
    assert re.fullmatch(r"\d+\.\d ms", found["round trip"])
    assert re.fullmatch(r"(over )?[\d.]+ Mbit/s up, (over )?[\d.]+ Mbit/s down", found["bandwidth"])
    assert found["model"].startswith("target.gguf, 5.4 M parameters, ")
    assert found["texts at once"] == "4"
    assert "run-ahead" in found["features"]
    assert found["software"] == f"sllm {sllm.__version__}"
    assert command("ping", SLLM_REMOTE=worker).returncode == 0


def test_several_workers(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path, local_text: str
) -> None:
    """``run`` takes them as one, and ``ping`` shows each."""
    started = [serve(start, tmp_path, "--pass-seconds", "0.05") for _ in range(2)]
    lines = [line.strip() for _, line in started]
    ends = [auth.Address.parse(line).endpoint for line in lines]
    path = tmp_path / "both"
    path.write_text("\n".join(lines), encoding="utf-8")
    ended = command("ping", *lines)
    assert (ended.returncode, ended.stderr) == (0, "")
    shown = [re.split(r"  +", line) for line in ended.stdout.splitlines()]
    assert shown[0] == ["worker", "round trip", "bandwidth", "places", "model"]
    assert [(row[0], row[3], row[4]) for row in shown[1:]] == [
        (end, "4 of 4 free", "target.gguf") for end in ends
    ]
    for given in (("--remote", lines[0], "--remote", lines[1]), ("--remote", f"@{path}")):
        ended = command(*GREETING, *given, "--hedge", "0.001", "--stats")
        assert (ended.stdout, ended.returncode) == (local_text, 0)
        assert "a second worker was asked 1 time" in ended.stderr
    # One of them goes in the middle of a text.
    client = start(*GREETING, "--remote", f"@{path}", "--stats", stdin=subprocess.DEVNULL)
    first = first_byte(client)
    places = [json.loads(command("status", "--json", line).stdout)["sessions"] for line in lines]
    gone = places.index(1) if 1 in places else 0  # it may be at its end already
    started[gone][0].terminate()
    text, _ = client.communicate(timeout=PATIENCE)
    assert (first + text).decode() == local_text
    assert client.returncode == 0
    started[gone][0].wait(PATIENCE)
    ended = command("ping", *lines)
    assert ended.returncode == 1
    assert ends[1 - gone] in ended.stdout
    assert ends[gone] not in ended.stdout
    assert ends[gone] in one_line(ended.stderr)
    ended = command(*GREETING, "--remote", f"@{path}")
    assert (ended.stdout, ended.returncode) == (local_text, 0)


def test_ping_of_one_worker_by_two_addresses(command: Callable[..., Any], worker: str) -> None:
    address = auth.Address.parse(worker)
    with Link((address.host, address.port)) as link:
        there = auth.Address(link.host, link.port, address.token, address.fingerprint)
        ended = command("ping", worker, there.uri)
    assert ended.returncode == 0
    assert "lead to the same worker, which counts once in a list" in one_line(ended.stderr)


def test_ping_measures_the_link(command: Callable[..., Any], worker: str) -> None:
    address = auth.Address.parse(worker)
    with Link((address.host, address.port), delay=0.05, mbit_s=20) as link:
        there = auth.Address(link.host, link.port, address.token, address.fingerprint)
        found = rows(command("ping", there.uri).stdout)
    assert 100 <= float(found["round trip"].split()[0]) < 2000
    up, down = re.findall(r"([\d.]+) Mbit/s", found["bandwidth"])
    assert 0.1 < float(up) < 25
    assert 0.1 < float(down) < 25


def test_status(
    command: Callable[..., Any],
    start: Callable[..., Any],
    tmp_path: pathlib.Path,
    endless_remote: tuple[str, ...],
) -> None:
    _, line = serve(start, tmp_path, "--sessions", "2", *SLOW)
    uri = line.strip()
    idle = json.loads(command("status", "--json", uri).stdout)
    assert (idle["model_name"], idle["n_places"]) == ("target.gguf", 2)
    assert (idle["sessions"], idle["sessions_total"], idle["tokens"], idle["running"]) == (0, 0, 0, [])
    client = start(*endless_remote, uri, stdin=subprocess.DEVNULL)
    assert first_byte(client) == b"a"
    ended = command("status", uri)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = rows(ended.stdout.partition("\n\n")[0])
    assert found["texts"] == "1 of 2 places, 0 waiting; 1 could begin at once"
    assert re.fullmatch(r"\d+ in \d+ pass(es)?, 1\.00 per token", found["tokens"])
    assert ended.stdout.partition("\n\n")[2].splitlines()[0].split() == [
        *("text", "prompt", "tokens", "passes", "accepted", "seconds"),
    ]
    busy = json.loads(command("status", "--json", uri).stdout)
    assert busy["sessions"] == 1
    assert busy["running"][0]["n_tokens"] > 0
    assert sum(busy["batch_sizes"]) == busy["passes"] > 0


def test_batches() -> None:
    assert status._batches([]) == "-"
    assert status._batches([40, 3, 20, 0, 1]) == "1: 40, 2: 3, 3-4: 20, 9-16: 1"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0.0 s"), (59.96, "60.0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert status._duration(seconds) == text


# ---- sllm worker


def test_worker_prints_one_line(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    process, line = serve(start, tmp_path)
    assert LINE.fullmatch(line)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, b"")
    assert b"is for the client, and a secret" in stderr
    assert all(one.startswith(b"sllm: ") for one in stderr.splitlines())

    # The next one with the same state is the same worker, but for its port.
    _, again = serve(start, tmp_path)
    first, second = auth.Address.parse(line), auth.Address.parse(again)
    assert (first.token, first.fingerprint) == (second.token, second.fingerprint)


def test_hops(start: Callable[..., Any], refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    process, line = serve(start, tmp_path, "--layers", "2:7", "--hops", "127.0.0.1", "--hops", "10.0.0.0/8")
    with sllm.connect(line.strip()) as remote:
        assert "hop-out" in remote.info.features
    process.kill()
    told = refused("worker", "--listen", "127.0.0.1:0", "--hops", "127.0.0.1")
    assert told == "--hops is for layers: give --layers, too, or leave it out"
    told = refused("worker", "--listen", "127.0.0.1:0", "--layers", "--hops", "a/b")
    assert told.startswith("limits.hops holds 'a/b', expected HOST, ")


def test_worker_ends_by_ctrl_c(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    process, _ = serve(start, tmp_path)
    _, stderr = interrupt(process)
    assert "ending" not in stderr  # there was nothing to wait for


def test_ctrl_c_before_the_worker_serves(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    process = start("worker", "--listen", "127.0.0.1:0", "--state", str(tmp_path), env={"SLLM_DEBUG": "1"})
    for line in process.stderr:
        if b"llama" in line:  # it loads the model
            break
    interrupt(process)


def test_sigterm_lets_a_text_end(start: Callable[..., Any], tmp_path: pathlib.Path, local_text: str) -> None:
    process, line = serve(start, tmp_path, *SLOW, "--drain", "100")
    client = start(*GREETING, "--draft", "none", "--remote", line.strip(), stdin=subprocess.DEVNULL)
    first = first_byte(client)
    process.terminate()
    stdout, stderr = client.communicate(timeout=120)
    assert (client.returncode, (first + stdout).decode(), stderr) == (0, local_text, b"")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"sllm: ending; texts have 100 s to end" in stderr
    assert b"handed back" not in stderr


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_hands_a_text_back(
    start: Callable[..., Any], tmp_path: pathlib.Path, endless_remote: tuple[str, ...], signals: int
) -> None:
    process, line = serve(start, tmp_path, *SLOW, "--drain", "0.3" if signals == 1 else "100")
    client = start(*endless_remote, line.strip(), "--on-loss", "raise", stdin=subprocess.DEVNULL)
    assert first_byte(client) == b"a"
    began = time.monotonic()
    process.terminate()
    if signals == 2:
        for shown in process.stderr:
            if b"a second signal" in shown:
                break
        process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < PATIENCE
    assert process.returncode == 0
    assert stderr.decode().endswith("sllm: handed back the texts that were not at their end\n")
    _, stderr = client.communicate(timeout=60)
    assert client.returncode == 2
    endpoint = auth.Address.parse(line).endpoint
    assert one_line(stderr.decode()).startswith(f"the link to {endpoint} was lost: ")


def test_worker_ends_with_its_parent(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    process, _ = serve(start, tmp_path, "--until-eof")
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="there is no /proc")
def test_token_is_nowhere(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    process, line = serve(start, tmp_path, *SLOW, env={"SLLM_DEBUG": "1"})
    address = auth.Address.parse(line)
    assert address.token is not None
    told = tmp_path / "line"
    told.write_text(line, encoding="utf-8")
    client = start(
        *(*GREETING, "--draft", "none", "--on-loss", "raise", "--remote", f"@{told}"),
        env={"SLLM_DEBUG": "1"},
        stdin=subprocess.DEVNULL,
    )
    seen = first_byte(client)
    for one in (process, client):
        assert address.token.encode() not in pathlib.Path(f"/proc/{one.pid}/cmdline").read_bytes()
    process.kill()  # so that the client has something to complain about
    seen += b"".join(client.communicate(timeout=60)) + b"".join(process.communicate(timeout=60))
    assert b"was lost: " in seen
    for args in (
        ["status", line.strip()],  # nobody there
        ["status", line.strip().replace("@", ":@")],
        ["status", "--json", line.strip(), line.strip()],
        ["status", line.strip()[:-1]],
        ["status", line.strip() + "/"],
        ["status", line.strip().replace("sllm", "slm", 1)],
        ["status", f"sllm://{address.host}:{address.token}"],
        ["run", "x", "--remote", line.strip(), "--target", "y"],
        ["run", "x", "--deadline", line.strip()],
    ):
        ended = command(*args, SLLM_DEBUG="1")
        assert ended.returncode == 2
        assert ended.stderr
        seen += ended.stdout.encode() + ended.stderr.encode()
    assert address.token.encode() not in seen


def test_insecure(start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    process, line = serve(start, tmp_path, "--insecure")
    assert re.fullmatch(r"sllm://127\.0\.0\.1:\d+#insecure\n", line)
    assert not (tmp_path / "state").exists()
    assert command("ping", line.strip()).returncode == 0
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert b"sllm: warning: --insecure: no TLS and no token; " in stderr


def certificate(folder: pathlib.Path, name: str) -> tuple[str, str]:
    chain, key = auth.load_or_make_certificate(folder / name)
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(chain)
    paths[1].write_bytes(key)
    paths[1].chmod(0o600)
    return str(paths[0]), str(paths[1])


def test_certificate_and_token_of_ones_own(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    cert, key = certificate(tmp_path, "mine")
    token = tmp_path / "token"
    token.write_text("a token of one's own".replace(" ", "-"), encoding="utf-8")
    token.chmod(0o600)
    process, line = serve(start, tmp_path, "--cert", cert, "--key", key, "--token-file", str(token))
    address = auth.Address.parse(line)
    assert address.token == "a-token-of-one's-own"
    assert address.fingerprint == auth.fingerprint(pathlib.Path(cert).read_bytes())
    assert command("ping", line.strip()).returncode == 0
    assert not (tmp_path / "state").exists()
    process.terminate()
    process.communicate(timeout=60)

    wrong = auth.Address(address.host, address.port, "x" * 20, address.fingerprint)
    serve(start, tmp_path, "--cert", cert, "--key", key, "--listen", address.endpoint)
    told = one_line(command("ping", wrong.uri).stderr)
    assert told == f"{address.endpoint}: the token is missing or wrong"


def test_a_worker_ends_while_hostile_grammars_are_at_work(
    start: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    process, line = serve(start, tmp_path, "--sessions", "4", "--n-ctx", "512")
    hostile = [{"grammar": text["grammar"]} for text in HOSTILE.values() if "grammar" in text]
    with sllm.connect(line.strip()) as remote:
        streams = []
        for more in hostile:
            with contextlib.suppress(ValueError):
                sampling = sllm.SamplingParams(temperature=1.0, **more)
                streams.append(sllm.generate(remote.target(), "Once", sampling=sampling, max_tokens=400))
        assert streams
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
        for stream in streams:
            stream.close()


def test_own_draft_and_limits(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    _, line = serve(
        *(start, tmp_path, "--draft", str(embedded.DRAFT), "--sessions", "1", "--no-grammars"),
        *("--n-ctx", "512", "--max-prompt", "40", "--exact"),
    )
    found = rows(command("ping", line.strip()).stdout)
    assert found["context"] == "512 tokens, 40 of them the prompt's at most"
    assert "worker-draft" in found["features"]
    assert "grammar" not in found["features"]
    ended = command("run", *ONE, "-n", "5", "word " * 60, "--remote", line.strip())
    assert "and the worker takes 40" in one_line(ended.stderr)
    grammar = tmp_path / "g"
    grammar.write_text('root ::= "fox"', encoding="utf-8")
    ended = command("run", *ONE, "x", "--grammar-file", str(grammar), "--remote", line.strip())
    assert "this worker takes no grammars" in one_line(ended.stderr)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ping"], "there is no address of a worker: name its sllm:// line, @FILE with it, or"),
        (["status", "http://x"], "the address of a worker begins with sllm://"),
        (["status", "sllm://"], "names no host"),
        (["status", "@missing"], "missing: No such file or directory"),
        (["status", "@empty"], "empty does not hold the sllm:// line"),
        (["status", "@binary"], "binary does not hold the sllm:// line"),
        (["status", "sllm://127.0.0.1:1#insecure"], "127.0.0.1:1"),
        (["status", "--timeout", "0"], "--timeout: 0 is out of range, expected more than 0"),
        (["run", "--remote", "a prompt"], "and write --remote after the prompt"),
        (["run", "x", "--remote", "sllm://h", "--target", "y"], "--target and --remote exclude each other"),
        (["ping", "sllm://h", "ftp://h"], "the address of a worker begins with sllm://"),
        (["ping", "sllm://h", "https://h"], "an engine is asked alone"),
        (["ping", "sllm://h#insecure", "sllm://i"], "for loopback alone, and the address names h"),
        (["run", "x", *TWO[2:], "--hops", "none"], "--hops is for a split with several workers"),
        (["run", "x", *TWO[:4], "--hops", "none"], "--hops is for a split with several workers"),
        (["run", "x", "--remote", "sllm://h#insecure", *TWO[4:]], "number 1 of 2: #insecure is"),
        (["run", "x", "--hedge"], "--hedge is for --remote alone"),
        (["run", "x", "--hedge", "0", "--remote", "sllm://h"], "--hedge: 0 is out of range"),
        (["run", "x", *TWO, "--hedge"], "--no-run-ahead, --hedge and --on-loss local are not for a split"),
        (["run", "x", *TWO, "--hops", "a:1", "--hops", "b:2"], "--hops is given 2 times, expected 1: once"),
        (["run", "x", *TWO, "--hops", "a:1", "--hops", "none"], "--hops none says all there is to say"),
        (["run", "x", *TWO, "--hops", "nowhere"], "'nowhere' is not HOST:PORT, and neither same nor none"),
        (["run", "x", *TWO, "--remote", "h"], "the address of a worker begins with sllm://"),
        (["run", "x", "--head", "1"], "--head splits a model with workers: name each by --remote"),
        (["run", "x", "--on-loss", "local"], "--on-loss is for --remote alone"),
        (["run", "x", "--on-loss", "cry", "--remote", "y"], "invalid choice: 'cry'"),
        (["run", "x", "--no-run-ahead"], "--no-run-ahead is for --remote alone"),
        (["run", "x", "--deadline", "3"], "--deadline is for --remote alone"),
        (["run", "x", "--deadline", "soon"], "--deadline: 'soon' is not a number"),
        (["worker", "missing.gguf", "--listen", "127.0.0.1:0"], "missing.gguf does not exist"),
        (["worker", "--listen", "127.0.0.1:0", "--draft", "missing.gguf"], "missing.gguf does not exist"),
        (["worker", "--listen", "here/there"], "'here/there' is not HOST:PORT"),
        (["worker", "--listen", "127.0.0.1:99999"], "'127.0.0.1:99999' is not HOST:PORT"),
        (["worker", "--listen", "192.0.2.1:0"], "cannot listen on 192.0.2.1:0: "),
        (["worker", "--listen", "0.0.0.0:0", "--insecure"], "is for loopback alone, and 0.0.0.0 is not"),
        (["worker", "--insecure", "--public", "example.com"], "is for loopback alone, and example.com"),
        (["worker", "--insecure", "--token-file", "t"], "--insecure means neither a token nor a certificate"),
        (["worker", "--public", ":50052"], "--public names no host"),
        (["worker", "--cert", "x"], "--cert and --key belong together"),
        (["worker", "--listen", "127.0.0.1:0", "--cert", "missing", "--key", "empty"], "missing: No"),
        (["worker", "--listen", "127.0.0.1:0", "--cert", "empty", "--key", "empty"], "are not a certificate"),
        (["worker", "--listen", "127.0.0.1:0", "--token-file", "empty"], "empty holds no token: "),
        (["worker", "--listen", "127.0.0.1:0", "--state", "empty"], "empty"),
        (["worker", "--sessions", "0"], "--sessions: 0 is out of range"),
        (["worker", "--drain=-1"], "--drain: -1 is out of range, expected 0 or more"),
        (["worker", "--token=secret"], "unrecognized arguments: --token=secret"),
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
    monkeypatch.delenv("SLLM_REMOTE", raising=False)
    pathlib.Path("empty").touch(0o600)
    pathlib.Path("binary").write_bytes(b"sllm://\xff")
    assert words in refused(*args)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions as of POSIX")
def test_keys_and_tokens_that_others_may_use(refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    cert, key = certificate(tmp_path, "mine")
    token = tmp_path / "token"
    token.write_text("t" * 20, encoding="utf-8")
    token.chmod(0o644)
    told = refused("worker", "--listen", "127.0.0.1:0", "--token-file", str(token))
    assert f"{token} holds a secret" in told
    assert f"chmod 600 {token}" in told
    pathlib.Path(key).chmod(0o666)
    told = refused("worker", "--listen", "127.0.0.1:0", "--cert", cert, "--key", key)
    assert f"chmod 600 {key}" in told
    pathlib.Path(key).chmod(0o600)
    tmp_path.chmod(0o777)
    told = refused("worker", "--listen", "127.0.0.1:0", "--cert", cert, "--key", key)
    assert f"chmod go-w {tmp_path}" in told


def test_wrong_key_and_port_in_use(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    (cert, _), (_, other) = certificate(tmp_path, "one"), certificate(tmp_path, "other")
    ended = command("worker", "--listen", "127.0.0.1:0", "--cert", cert, "--key", other)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert one_line(ended.stderr) == f"{other} is not the key of {cert}"

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = command("worker", "--listen", f"127.0.0.1:{port}", "--state", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert one_line(ended.stderr) == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_local_needs_a_draft(refused: Callable[..., str], line_file: str) -> None:
    told = refused("run", "x", "--remote", line_file, "--on-loss", "local", "--draft", "none")
    assert told == "--on-loss local lets the draft go on alone, and there is none: name it by --draft"


def test_every_interface(
    start: Callable[..., Any], command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    _, line = serve(start, tmp_path, "--listen", "0.0.0.0:0", "--public", "localhost")
    assert auth.Address.parse(line).host == "localhost"
    assert command("ping", line.strip()).returncode == 0


def test_public_address() -> None:
    def public(host: str, name: str | None) -> str:
        bound = auth.Address("127.0.0.1" if host == "0.0.0.0" else host, 5000, "t" * 16, "0" * 64)
        return worker_command._public(bound, host, name).endpoint

    assert public("10.0.0.1", None) == "10.0.0.1:5000"
    assert public("0.0.0.0", None) == f"{socket.gethostname()}:5000"
    assert public("0.0.0.0", "example.com") == "example.com:5000"
    assert public("127.0.0.1", "example.com:443") == "example.com:443"
    assert public("127.0.0.1", "[2001:db8::1]") == "[2001:db8::1]:5000"


def test_addresses(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = "sllm://a:1#insecure", "sllm://b:2#insecure"
    told = tmp_path / "lines"
    told.write_text(f"{one}\n{other}\n", encoding="utf-8")
    monkeypatch.delenv("SLLM_REMOTE", raising=False)
    with pytest.raises(CommandError):
        worker_addresses(None)
    assert worker_addresses(one) == [one]
    assert worker_addresses(f"@{told}") == [one, other]
    monkeypatch.setenv("SLLM_REMOTE", other)
    assert worker_addresses("") == [other]
    assert worker_addresses(one) == [one]


def test_failed_worker_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(sllm.Worker, "failed", True)
    threads = threading.active_count()
    assert cli.main(["worker", "--listen", "127.0.0.1:0", "--state", str(tmp_path), *ONE]) == 2
    shown = capfd.readouterr()
    assert LINE.fullmatch(shown.out)
    assert shown.err.endswith("sllm: three passes in a row have failed; the worker ends\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert threading.active_count() <= threads

"""``sllm rpc-server``, ``sllm worker --rpc`` and ``sllm run --rpc`` as a user meets them."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE, PATIENCE
from rpc_endpoints import gone, refuses

from sllm.rpc import server as rpc

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

TEXT = ("run", *ONE, "-n", "30", "--temperature", "0.8", "--seed", "3", "--draft", "none", "Once upon a time")


def first_line(process: Any) -> str:
    return str(process.stdout.readline().decode().rstrip("\n"))


def heard(process: Any, words: bytes) -> bytes:
    """What a process says on stderr until it says these words."""
    said = b""
    while words not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def test_a_server_and_its_client(
    start: Callable[..., Any], command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    here = command(*TEXT)
    server = start("rpc-server", "--port", "0", "--cache", str(tmp_path / "cache"), *ONE)
    endpoint = first_line(server)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", endpoint)
    for layers in (("--n-gpu-layers", "3"), ()):
        there = command(*TEXT, "--rpc", endpoint, *layers)
        assert (there.returncode, there.stderr) == (0, "")
        assert there.stdout == here.stdout
    assert len(list((tmp_path / "cache").iterdir())) > 1
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=PATIENCE)
    assert (server.returncode, out) == (0, b"")
    assert b"serving 1 device to one client at a time" in err
    assert b"the process that serves is " in err
    assert refuses(endpoint)


def test_a_worker_on_servers_that_one_loses(
    start: Callable[..., Any], command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    here = command(*TEXT)
    there = [start("rpc-server", "--port", "0", "--no-cache", *ONE) for _ in range(2)]
    endpoints = [first_line(server) for server in there]
    devices = ",".join(["cpu", *(f"rpc://{endpoint}" for endpoint in endpoints)])
    where = ("--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"))
    worker = start("worker", *where, "--devices", devices, "--drain", "0", "--no-mtp", *ONE)
    line = tmp_path / "line"
    line.write_text(first_line(worker))
    found = command(*TEXT, "--remote", f"@{line}")
    assert (found.returncode, found.stdout) == (0, here.stdout)
    there[1].kill()
    there[1].wait(PATIENCE)
    lost = re.escape(endpoints[1])
    said = heard(worker, b"clients wait until the model is back")
    assert re.search(rf"the RPC server {lost} went away".encode(), said)
    found = command(*TEXT, "--remote", f"@{line}")
    assert found.returncode == 2
    assert re.match(rf"sllm: .*the worker waits for its model to come back: .*{lost}", found.stderr)
    again = start("rpc-server", "--port", endpoints[1].rpartition(":")[2], "--no-cache", *ONE)
    assert first_line(again) == endpoints[1]
    heard(worker, b"serving again")
    found = command(*TEXT, "--remote", f"@{line}")
    assert (found.returncode, found.stdout) == (0, here.stdout)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("gpu9", "there is no device 'gpu9'; there are CPU"),
        ("CPU,,x", "'CPU,,x' is not a list of devices"),
        ("rpc://", "'rpc://' is not a list of devices"),
        ("rpc://127.0.0.1:1", "127.0.0.1:1: nothing listens there"),
        ("rpc://127.0.0.1:port", "port"),
    ],
)
def test_devices_of_a_worker_that_are_not_there(
    refused: Callable[..., str], tmp_path: Path, devices: str, words: str
) -> None:
    where = ("--listen", "127.0.0.1:0", "--state", str(tmp_path))
    assert words in refused("worker", *where, "--devices", devices)


def test_devices_go_with_a_whole_model(refused: Callable[..., str]) -> None:
    for other in ("--layers", "--rpc"):
        assert f"leave {other} out" in refused("worker", "--devices", "CPU", other)


def test_a_server_that_loses_its_process_says_so(start: Callable[..., Any]) -> None:
    server = start("rpc-server", "--port", "0", "--no-cache")
    endpoint = first_line(server)
    (child,) = children(server.pid)
    os.kill(child, signal.SIGKILL)
    _, err = server.communicate(timeout=PATIENCE)
    assert server.returncode == 2
    assert b"the RPC server has ended by itself" in err
    assert gone(child) and refuses(endpoint)


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


def test_a_worker_relays(
    start: Callable[..., Any], command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    worker = start(
        "worker",
        "--rpc",
        "--listen",
        "127.0.0.1:0",
        "--state",
        str(tmp_path),
        *ONE,
        env={"SLLM_CACHE": str(tmp_path)},
    )
    (tmp_path / "address").write_text(first_line(worker) + "\n", encoding="utf-8")
    here, there = command(*TEXT), command(*TEXT, "--rpc", f"@{tmp_path / 'address'}")
    assert (there.returncode, there.stderr) == (0, "")
    assert there.stdout == here.stdout
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0


def test_what_is_refused(refused: Callable[..., str]) -> None:
    with rpc.RPCServer(cache=False) as server:
        taken = server.port
        assert f"cannot listen on 127.0.0.1:{taken}" in refused("rpc-server", "--port", str(taken))
    assert "nothing listens there" in refused(*TEXT, "--rpc", f"127.0.0.1:{taken}")
    assert "HOST:PORT" in refused(*TEXT, "--rpc", "127.0.0.1:x")
    assert "without a password" in refused("rpc-server", "--host", "0.0.0.0")
    assert "'TPU7'" in refused("rpc-server", "--devices", "CPU,TPU7")
    assert "n_threads is 0" in refused("rpc-server", "--threads", "0")
    assert "sllm: " not in refused("rpc-server", "--port", "x")
    assert "--remote names one that does not" in refused(
        "run", "--rpc", "127.0.0.1:5", "Hello", "--remote", "sllm://127.0.0.1:5#insecure"
    )


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(start: Callable[..., Any], signal_number: int) -> None:
    server = start("rpc-server", "--port", "0", "--no-cache")
    endpoint = first_line(server)
    server.send_signal(signal_number)
    server.communicate(timeout=PATIENCE)
    assert server.returncode == (130 if signal_number == signal.SIGINT else 0)
    assert refuses(endpoint)

"""``sllm worker`` as those meet it who run it: hangs, hard stops, systemd, figures, probes, renewed files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from certificates import authority
from processes import ONE
from raw_client import Client, opening, wait_until

from sllm.cli.systemd import Notifier
from sllm.remote.health import is_serving
from sllm.wire import auth
from sllm.worker.watch import HUNG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The program, but passes of its model never end, in C.
HANGS = """
import ctypes, sys
from sllm.engine.context import Context
from sllm.cli import worker
from sllm.cli.main import main
sleep = ctypes.CDLL(None).sleep
def verify(*_args, **_options):
    while True:
        sleep(1000)
Context.verify = verify
worker._CLOSING_SECONDS = 0.5
sys.exit(main())
"""


def serve(start: Callable[..., Any], folder: Path, *args: str, **more: Any) -> tuple[Any, auth.Address]:
    state = ("--listen", "127.0.0.1:0", "--state", str(folder / "state"))
    process = start("worker", *state, *ONE, *args, **more)
    return process, auth.Address.parse(process.stdout.readline().decode())


def descendants(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if after[1] == str(pid):
            found.append(int(stat.parent.name))
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def begin_a_hang(address: auth.Address) -> Iterator[None]:
    with Client(address, token=address.token) as client:
        stream = client.generate(opening(max_tokens=5))
        wait_until(lambda: client.status().sessions == 1)
        try:
            yield
        finally:
            stream.cancel()


def test_sigterm_while_a_pass_hangs(start: Callable[..., Any], tmp_path: Path) -> None:
    process, address = serve(start, tmp_path, "--rpc", "--drain", "0.5", program=("-c", HANGS))
    children = descendants(process.pid)
    assert children  # the RPC server
    with begin_a_hang(address):
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == HUNG
    assert stderr.decode().endswith("sllm: it has not ended in the time for it; the process ends\n")
    wait_until(lambda: not any(map(running, children)))


def test_a_pass_that_hangs_ends_the_process(start: Callable[..., Any], tmp_path: Path) -> None:
    process, address = serve(
        start, tmp_path, "--pass-limit", "0.5", "--pass-grace", "1", program=("-c", HANGS)
    )
    with begin_a_hang(address):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == HUNG
    assert re.search(r"sllm: error: a pass has taken \d+ s and counts as hung\n", stderr.decode())
    assert re.search(r"sllm: a pass has not ended in \d+ s; the process ends\n", stderr.decode())


def test_health_for_probes(start: Callable[..., Any], command: Callable[..., Any], tmp_path: Path) -> None:
    process, address = serve(start, tmp_path, "--pass-limit", "0.5", program=("-c", HANGS))
    probe = f"sllm://127.0.0.1:{address.port}"  # knows no secret
    well = command("status", "--health", probe)
    assert (well.returncode, well.stdout, well.stderr) == (0, "serving\n", "")
    with begin_a_hang(address):
        wait_until(lambda: not is_serving(address, 60))
        ill = command("status", "--health", address.uri)
        assert (ill.returncode, ill.stdout) == (1, "not serving\n")
    process.kill()
    process.wait()
    gone = command("status", "--health", probe)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith(f"sllm: 127.0.0.1:{address.port} cannot be reached")
    other = address.uri[:-4] + ("0000" if not address.uri.endswith("0000") else "1111")
    _, again = serve(start, tmp_path, "--listen", f"127.0.0.1:{address.port}")
    assert command("status", "--health", other).returncode == 1
    assert again.port == address.port


def test_systemd_is_told(start: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(60)
        env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "600000"}
        args = ("--pass-limit", "1", "--pass-grace", "1000", "--drain", "0")
        process, address = serve(start, tmp_path, *args, program=("-c", HANGS), env=env)
        told = [manager.recv(100) for _ in range(3)]
        assert told == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        with begin_a_hang(address):
            wait_until(lambda: not is_serving(address, 60))
            manager.settimeout(1.5)  # what was sent before; then no more
            with pytest.raises(TimeoutError):
                while manager.recv(100) == b"WATCHDOG=1":
                    pass
            manager.settimeout(60)
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(60) == HUNG


def test_a_manager_that_does_not_listen_is_no_trouble(tmp_path: Path) -> None:
    full = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for one in full:
        one.close()
    for address in ("", "relative", str(tmp_path / "none"), "@sllm-none", "vsock:1:2", "/" + "x" * 300):
        Notifier({"NOTIFY_SOCKET": address}).tell("READY=1")
    ours = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000"}
    assert Notifier(ours).interval == Notifier({**ours, "WATCHDOG_PID": str(os.getpid())}).interval == 3.0
    for other in ({"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}):
        assert Notifier({**ours, **other}).interval is None


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0sllm-test-{os.getpid()}")
        Notifier({"NOTIFY_SOCKET": f"@sllm-test-{os.getpid()}"}).tell("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_figures_log_and_a_renewed_certificate(start: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    first, second = authority(tmp_path), authority(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(first[0])
    key.write_bytes(first[1])
    key.chmod(0o600)
    log = tmp_path / "access.log"
    process, address = serve(
        start,
        tmp_path,
        *("--metrics", "127.0.0.1:0", "--access-log", str(log), "--cert", str(cert), "--key", str(key)),
    )
    notes = b""
    while b"Prometheus" not in notes:
        notes = process.stderr.readline()
    url = notes.decode().split()[-1]
    with Client(address, token=address.token) as client:
        client.generate(opening(max_tokens=5)).run()
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert b"\nsllm_tokens_total 5.0\n" in answer.read()
    wait_until(log.exists)
    wait_until(log.read_text)
    record = json.loads(log.read_text())
    assert (record["kind"], record["tokens_out"], record["ended"]) == ("generate", 5, "length")

    cert.write_bytes(second[0])
    key.write_bytes(second[1])
    renewed = auth.Address.parse(process.stdout.readline().decode())
    assert renewed.fingerprint == auth.fingerprint(second[0])
    assert (renewed.token, renewed.port) == (address.token, address.port)
    assert is_serving(renewed, 60)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"the certificate was renewed" in stderr


def test_killed_and_started_again_on_the_same_ports(start: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = ("--metrics", f"127.0.0.1:{port}", "--access-log", "-")
    process, address = serve(start, tmp_path, *args)
    process.kill()
    process.wait()
    again, found = serve(start, tmp_path, *args, "--listen", address.endpoint)
    assert found == address
    again.terminate()
    _, stderr = again.communicate(timeout=60)
    assert (again.returncode, b"Traceback" in stderr) == (0, False)


def test_options_out_of_range(refused: Callable[..., str]) -> None:
    for option, value, said in (
        ("--pass-limit", "0", "0 is out of range, expected more than 0"),
        ("--pass-grace", "-1", "-1 is out of range, expected 0 or more"),
        ("--metrics", "9464", "'9464' is not HOST:PORT"),
    ):
        code_and_line = _refusal(option, value, refused)
        assert f"{option}: {said}" in code_and_line


def _refusal(option: str, value: str, refused: Callable[..., str]) -> str:
    return refused("worker", f"{option}={value}")

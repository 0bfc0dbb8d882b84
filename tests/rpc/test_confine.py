"""What the process that serves RPC can still reach, tried from inside, and who can reach it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from remote_worker import PATIENCE
from rpc_client import COUNT, Client
from rpc_endpoints import OURS, gone

import sllm
from sllm import embedded
from sllm.engine import ggml_rpc
from sllm.rpc import confine
from sllm.rpc.child import Child, ParentLink
from sllm.rpc.loopback import TELLS_USERS
from sllm.rpc.server import RPCServer

if TYPE_CHECKING:
    from collections.abc import Callable

CANARY = "sllm://user:canary-4711@example.com"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing but Linux confines a process")


# ---- what the child runs ---------------------------------------------------------------------------------


def attempts(secret: str, parent: int) -> dict[str, Callable[[], Any]]:
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(status: int) -> int:
        if status < 0:
            raise OSError(ctypes.get_errno(), "refused")
        return status

    return {
        "the secret": lambda: Path(secret).read_bytes(),
        "its folder": lambda: list(Path(secret).parent.iterdir()),
        "a new file": lambda: Path(secret + ".new").write_bytes(b"x"),
        "the secret's end": lambda: Path(secret).unlink(),
        "the parent's variables": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "the parent's memory": lambda: Path(f"/proc/{parent}/mem").open("rb").read(1),
        "the parent's files": lambda: list(Path(f"/proc/{parent}/fd").iterdir()),
        "tracing the parent": lambda: checked(libc.ptrace(16, parent, 0, 0)),
        "a signal to the parent": lambda: os.kill(parent, 0),
        "a signal to all": lambda: os.kill(-1, 0),
        "a program": lambda: os.execv("/bin/true", ["true"]),
        "a process": os.fork,
        "a spawned program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "a socket": socket.socket,
        "a Unix socket": lambda: socket.socket(socket.AF_UNIX),
        "another namespace": lambda: checked(libc.unshare(0x10000000)),
        "io_uring": lambda: checked(libc.syscall(425, 1, ctypes.create_string_buffer(120))),
        "another user": lambda: os.setuid(0),
        "passwords": lambda: Path("/etc/passwd").read_bytes(),
    }


def outcome(attempt: Callable[[], Any]) -> str:
    try:
        return f"succeeded: {attempt()!r}"[:80]
    except OSError as error:
        return type(error).__name__


def try_all(parent: int, *, secret: str, calls: bool) -> None:
    """As ``sllm.rpc.serving.serve`` does, and in place of serving: everything that should not succeed."""
    tries = attempts(secret, parent)
    landlock = confine.files()
    link = ParentLink(parent)
    seccomp = confine.calls(opens_files=False) if calls else False
    outcomes = {name: outcome(attempt) for name, attempt in tries.items()}
    threads = [threading.Thread(target=str) for _ in range(3)]  # still there for computing
    for thread in threads:
        thread.start()
        thread.join()
    link.send({"landlock": landlock, "seccomp": seccomp, "outcomes": outcomes, "env": dict(os.environ)})


def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, calls: bool) -> dict[str, Any]:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.setenv("SLLM_REMOTE", CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    secret = tmp_path / "token"
    secret.write_text(CANARY, encoding="utf-8")
    secret.chmod(0o600)
    options = {"secret": str(secret), "calls": calls}
    with Child("test_confine:try_all", options, environment=confine.environment()) as child:
        said: dict[str, Any] = child.receive(PATIENCE)
    assert secret.read_text(encoding="utf-8") == CANARY and len(list(tmp_path.iterdir())) == 1
    assert CANARY not in str(said)
    return said


def test_a_confined_process_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = outcomes(tmp_path, monkeypatch, calls=True)
    if not said["seccomp"]:
        pytest.skip("this system has no seccomp")
    assert {name: text for name, text in said["outcomes"].items() if text.startswith("succeeded")} == {}


def test_landlock_alone_keeps_files_and_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for GPU drivers, which have to open files."""
    said = outcomes(tmp_path, monkeypatch, calls=False)
    if not said["landlock"]:
        pytest.skip("this system has no Landlock")
    closed = [name for name in said["outcomes"] if name.startswith(("the ", "its ", "a new", "tracing"))]
    closed += ["passwords", "a program"]
    assert {name: said["outcomes"][name] for name in closed} == dict.fromkeys(closed, "PermissionError")


def test_what_a_server_s_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_REMOTE", CANARY)
    with (Path(__file__)).open("rb") as _held, RPCServer(port=None, cache=False) as server:
        process = Path(f"/proc/{server.pid}")
        assert CANARY.encode() not in (process / "environ").read_bytes()
        assert CANARY.encode() not in (process / "cmdline").read_bytes()
        kinds = {str(entry.readlink()).partition(":")[0] for entry in (process / "fd").iterdir()}
        assert kinds == {"pipe", "socket"}
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert (status["Seccomp"] == "2") == server.confinement.seccomp
        assert (process / "oom_score_adj").read_text().strip() == "800"
        for thread in (process / "task").iterdir():  # every one
            assert ("Seccomp:\t2" in (thread / "status").read_text()) == server.confinement.seccomp


def test_a_worker_says_what_confines_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    with sllm.Worker(embedded.TARGET, n_ctx=64, rpc=True, state=tmp_path) as worker:
        assert worker.rpc_confinement is not None
        assert str(worker.rpc_confinement).startswith(("confined by ", "not confined, since "))
        own = Path(f"/proc/{worker._relay._server.pid}/net/tcp").read_text().splitlines()[1:]  # type: ignore[union-attr]
        inodes = {line.split()[9] for line in own}
        fds = Path(f"/proc/{worker._relay._server.pid}/fd")  # type: ignore[union-attr]
        held = {str(entry.readlink()) for entry in fds.iterdir()}
        assert not {f"socket:[{inode}]" for inode in inodes} & held  # no port at all
    with sllm.Worker(embedded.TARGET, n_ctx=64, insecure=True) as worker:
        assert worker.rpc_confinement is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((7, True, False), "confined by Landlock 7 and seccomp"),
        ((0, True, False), "confined by seccomp"),
        ((0, True, True), "not confined, since there is seccomp alone: a client"),
        ((3, False, True), "not confined, since there is Landlock 3 alone: a client"),
        ((0, False, True), "not confined, since there is neither Landlock nor seccomp: a client"),
    ],
)
def test_what_is_said(found: tuple[int, bool, bool], words: str) -> None:
    assert str(confine.Confinement(*found)).startswith(words)
    assert confine.Confinement(*found).complete == words.startswith("confined")


# ---- who can reach it ------------------------------------------------------------------------------------

STRANGER = """
import os, socket, struct, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
family = socket.AF_INET6 if sys.argv[2] == "v6" else socket.AF_INET
host = "::ffff:127.0.0.1" if sys.argv[2] == "v6" else "127.0.0.1"
with socket.socket(family) as client:
    client.settimeout(60)
    client.connect((host, int(sys.argv[1])))
    try:
        client.sendall(struct.pack("<BQ", 14, 24) + bytes(24))
        print(len(client.recv(64)))
    except ConnectionError:
        print(0)
"""


@pytest.mark.skipif(not TELLS_USERS, reason="this system does not tell whose a connection is")
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_another_user_is_refused(family: str) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with RPCServer(cache=False, n_threads=1) as server:
        command = [sys.executable, "-c", STRANGER, str(server.port), family]
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert said.stdout == "0\n"
        assert ggml_rpc.probe(server.endpoint).memory == server.memory  # this one is served


@pytest.mark.skipif(not TELLS_USERS, reason="this system does not tell whose a connection is")
@pytest.mark.skipif(not socket.has_ipv6, reason="this system has no IPv6")
def test_this_user_is_served_from_an_ipv6_socket_too() -> None:
    with RPCServer(cache=False, n_threads=1) as server, socket.socket(socket.AF_INET6) as connection:
        connection.connect(("::ffff:127.0.0.1", server.port))
        assert Client(connection).hello[:3] == OURS


def test_nothing_is_left_of_a_server_whose_process_was_killed() -> None:
    with RPCServer(cache=False, n_threads=1) as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        waiting = socket.create_connection((server.host, server.port or 0))
        os.kill(pid, signal.SIGKILL)
        assert server.wait(PATIENCE) and not server.alive
        with waiting:
            assert Client(waiting, greet=False).hung_up()
    assert gone(pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port or 0))
    with RPCServer(port=None, cache=False) as other, Client(other) as client:
        assert client.ask(COUNT)
        with pytest.raises(ValueError, match="listens on no port"):
            _ = other.endpoint

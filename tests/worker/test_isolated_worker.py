"""A worker whose model spans machines by RPC: the same text, and servers that go away and come back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from oracles import EXACT, GREEDY
from remote_worker import PATIENCE, n_threads, wait_until
from rpc_endpoints import gone

import sllm
from sllm import embedded
from sllm.rpc import server as rpc
from sllm.wire import auth
from sllm.worker.isolated import IsolatedWorker
from sllm.worker.server import Limits, Monitoring

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from sllm.remote.connection import Remote

PROMPT = "Once upon a time"
SAMPLED = sllm.SamplingParams(temperature=0.9, seed=11)
PACE = 0.02  # seconds of a pass: a text of 60 tokens is still being written when a server is killed


class RPCProcess:
    """``sllm rpc-server``, as on another machine; a context manager. It can be killed and started again."""

    def __init__(self, port: int = 0) -> None:
        arguments = ["rpc-server", "--no-cache", "--threads", "1", "--until-eof", "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sllm", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().decode().strip()
        assert self.endpoint, "the RPC server did not start"
        self.port = int(self.endpoint.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def again(self, stack: ExitStack) -> None:
        """Start another one at the same endpoint."""
        stack.enter_context(RPCProcess(self.port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self.process:
            self.kill()


@pytest.fixture
def servers() -> Iterator[tuple[RPCProcess, RPCProcess]]:
    with RPCProcess() as one, RPCProcess() as other:
        yield one, other


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A test leaves neither a thread nor a child process behind."""
    names = ("sllm-child", "sllm-isolated", "sllm-worker", "sllm-listener", "sllm-metrics", "sllm-remote")
    before = {name: n_threads(name) for name in names}
    yield
    wait_until(lambda: {name: n_threads(name) for name in names} == before, "the threads' end")


def children_of(parent: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if stat.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(stat.parent.name))
    return found


def names_of(*found: RPCProcess) -> list[str]:
    return [device.name for one in found for device in rpc.add_server(one.endpoint)]


def spanning(folder: Path, devices: list[str], **more: Any) -> IsolatedWorker:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "deadline": 20.0, "pass_seconds": PACE, **EXACT}
    return IsolatedWorker(embedded.TARGET, devices, state=folder, **{**options, **more})


def text_of(target: Any, sampling: sllm.SamplingParams, n: int = 60, **options: Any) -> str:
    return sllm.generate(target, PROMPT, sampling=sampling, max_tokens=n, **options).text()


@pytest.fixture(scope="module")
def expected(target_model: sllm.Model) -> dict[sllm.SamplingParams, str]:
    with sllm.LocalTarget(target_model, n_ctx=512, **EXACT) as target:
        return {sampling: text_of(target, sampling) for sampling in (GREEDY, SAMPLED)}


class Client(threading.Thread):
    """Writes a text, and holds what came of it."""

    def __init__(self, remote: Remote, sampling: sllm.SamplingParams) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.text = ""
        self.error: Exception | None = None
        self._remote, self._sampling = remote, sampling
        self.start()

    def run(self) -> None:
        try:
            stream = sllm.generate(
                self._remote.target(), PROMPT, sampling=self._sampling, max_tokens=60, draft="ngram"
            )
            for one in stream:
                self.text += one.text
                if len(self.text) > 20:
                    self.begun.set()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.begun.set()


def refusal(uri: str) -> str:
    """What a new client is told."""
    try:
        sllm.connect(uri, timeout=5).close()
    except sllm.RemoteError as error:
        return str(error)
    return ""


# ---- the same text


def test_a_model_on_two_servers_and_here(
    servers: tuple[RPCProcess, RPCProcess],
    tmp_path: Path,
    draft_model: sllm.Model,
    expected: dict[sllm.SamplingParams, str],
    nothing_left: None,
) -> None:
    with spanning(tmp_path, ["CPU", *names_of(*servers)], draft=embedded.DRAFT, pass_seconds=0.0) as worker:
        assert worker.pid not in (None, os.getpid()) and worker.away is None and not worker.failed
        with sllm.connect(worker.uri) as remote:
            assert {"worker-draft", "trees"} <= set(remote.info.features)
            for sampling, text in expected.items():
                assert text_of(remote.target(), sampling) == text
                assert text_of(remote.target(), sampling, draft=draft_model) == text
        pid = worker.pid
    assert pid is not None and gone(pid) and worker.closed and worker.wait(0)
    worker.close()
    with pytest.raises(sllm.RemoteError):
        sllm.connect(worker.uri, timeout=1)


# ---- loss


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_killed_in_the_middle_of_texts(
    servers: tuple[RPCProcess, RPCProcess],
    tmp_path: Path,
    expected: dict[sllm.SamplingParams, str],
    nothing_left: None,
    which: int,
) -> None:
    lost = servers[which]
    with ExitStack() as stack:
        worker = stack.enter_context(spanning(tmp_path, names_of(*servers)))
        first = worker.pid
        remote = stack.enter_context(sllm.connect(worker.uri, deadline=PATIENCE))
        clients = [Client(remote, sampling) for sampling in (GREEDY, SAMPLED)]
        for client in clients:
            assert client.begun.wait(PATIENCE)
        assert all(client.is_alive() for client in clients)
        lost.kill()
        wait_until(lambda: worker.away, "the loss")
        assert lost.endpoint in str(worker.away) and first is not None and not worker.failed
        # The port is held: a new client is told what is the matter.
        told = rf"waits for its model.*{re.escape(lost.endpoint)}"
        wait_until(lambda: re.search(told, refusal(worker.uri)), "the refusal")
        assert gone(first)
        with pytest.raises(sllm.AuthError):
            sllm.connect(worker.uri.replace("sllm://", "sllm://x", 1), timeout=5)
        assert all(client.is_alive() for client in clients)
        lost.again(stack)
        for client in clients:
            client.join(PATIENCE)
        assert [client.error for client in clients] == [None, None]
        assert [client.text for client in clients] == [expected[GREEDY], expected[SAMPLED]]
        assert worker.pid != first
        assert (worker.n_starts, worker.away) == (2, None)
        assert text_of(remote.target(), SAMPLED) == expected[SAMPLED]


def test_a_server_that_hangs(
    servers: tuple[RPCProcess, RPCProcess],
    tmp_path: Path,
    expected: dict[sllm.SamplingParams, str],
    nothing_left: None,
) -> None:
    stopped = [servers[1].process.pid, *children_of(servers[1].process.pid)]
    assert len(stopped) == 2
    with (
        spanning(tmp_path, names_of(*servers), deadline=3.0) as worker,
        sllm.connect(worker.uri, deadline=PATIENCE) as remote,
    ):
        client = Client(remote, SAMPLED)
        assert client.begun.wait(PATIENCE)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: worker.away, "the loss")
        assert "owed an answer for 3 s" in str(worker.away)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        client.join(PATIENCE)
        assert (client.error, client.text) == (None, expected[SAMPLED])


def test_who_does_not_wait_gets_a_typed_error(
    servers: tuple[RPCProcess, RPCProcess], tmp_path: Path, nothing_left: None
) -> None:
    with (
        spanning(tmp_path, names_of(*servers)) as worker,
        sllm.connect(worker.uri, on_loss="raise") as raising,
        sllm.connect(worker.uri, deadline=2.0) as waiting,
    ):
        clients = [Client(raising, GREEDY), Client(waiting, SAMPLED)]
        for client in clients:
            assert client.begun.wait(PATIENCE)
        servers[1].kill()
        for client in clients:
            client.join(PATIENCE)
        assert all(isinstance(client.error, sllm.RemoteError) for client in clients)
        assert "waits for its model" in str(clients[1].error)
        assert servers[1].endpoint in str(clients[1].error)


def test_a_loss_between_texts_is_noticed(
    servers: tuple[RPCProcess, RPCProcess],
    tmp_path: Path,
    expected: dict[sllm.SamplingParams, str],
    nothing_left: None,
) -> None:
    pytest.importorskip("prometheus_client")
    monitoring = Monitoring(metrics=("127.0.0.1", 0), access_log=tmp_path / "log")
    with (
        ExitStack() as stack,
        spanning(tmp_path, names_of(servers[0]), monitoring=monitoring) as worker,
    ):
        assert worker.metrics_address is not None
        host, port = worker.metrics_address

        def status(path: str) -> int:
            try:
                with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=PATIENCE) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                error.close()
                return error.code
            except OSError:
                return 0  # between the one and the other

        assert (status("/health"), status("/live")) == (200, 200)
        servers[0].kill()  # and nobody asks for anything
        wait_until(lambda: status("/health") == 503, "the loss")
        assert (status("/live"), status("/metrics")) == (200, 200)
        wait_until(lambda: "waits for its model" in refusal(worker.uri), "the refusal")
        servers[0].again(stack)
        wait_until(lambda: worker.n_starts == 2, "the return")
        wait_until(lambda: status("/health") == 200, "the figures")
        assert worker.metrics_address == (host, port)
        with sllm.connect(worker.uri) as remote:
            assert text_of(remote.target(), GREEDY) == expected[GREEDY]
    ended = [json.loads(line)["ended"] for line in (tmp_path / "log").read_text().splitlines()]
    assert "ending" in ended and ended[-1] == "length"  # refused while it was away, and answered after


def test_a_child_that_is_killed_is_started_again(
    servers: tuple[RPCProcess, RPCProcess],
    tmp_path: Path,
    expected: dict[sllm.SamplingParams, str],
    nothing_left: None,
) -> None:
    with (
        spanning(tmp_path, names_of(servers[0]), limits=Limits(sessions=2)) as worker,
        sllm.connect(worker.uri, deadline=PATIENCE) as remote,
    ):
        client = Client(remote, SAMPLED)
        assert client.begun.wait(PATIENCE) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        client.join(PATIENCE)
        assert (client.error, client.text) == (None, expected[SAMPLED])
        assert worker.n_starts == 2
        for n in (2, 3):
            wait_until(lambda: worker.pid is not None, "the child")
            assert worker.n_starts == n
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: worker.pid is None, "its end")
        wait_until(lambda: worker.failed, "the end of patience")
        assert "signal 9" in str(worker.away)


# ---- ends


def test_a_drain_hands_texts_back(
    servers: tuple[RPCProcess, RPCProcess], tmp_path: Path, nothing_left: None
) -> None:
    with spanning(tmp_path, names_of(servers[0])) as worker, sllm.connect(worker.uri, deadline=1.0) as remote:
        client = Client(remote, GREEDY)
        assert client.begun.wait(PATIENCE)
        assert not worker.drain(0)
        with sllm.connect(worker.uri, on_loss="raise") as late, pytest.raises(sllm.RemoteError):
            text_of(late.target(), GREEDY)  # no new ones
        assert worker.drain(PATIENCE)
        client.join(PATIENCE)
        assert client.error is None


def test_a_worker_that_waits_can_be_closed(
    servers: tuple[RPCProcess, RPCProcess], tmp_path: Path, nothing_left: None
) -> None:
    with spanning(tmp_path, names_of(servers[0])) as worker:
        servers[0].kill()
        wait_until(lambda: worker.away, "the loss")
        assert worker.drain(0)


def test_what_is_wrong_is_said(servers: tuple[RPCProcess, RPCProcess], tmp_path: Path) -> None:
    devices = names_of(servers[0])
    with pytest.raises(ValueError, match="at least one of an RPC server"):
        spanning(tmp_path, ["CPU"])
    with pytest.raises(ValueError, match="there is no device"):
        spanning(tmp_path, [*devices, "GPU7"])
    with pytest.raises(ValueError, match="n_ctx"):
        spanning(tmp_path, devices, n_ctx=-1)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(sllm.ModelLoadError):
        IsolatedWorker(tmp_path / "bad.gguf", devices, state=tmp_path)
    servers[0].kill()
    with pytest.raises(sllm.RPCError, match=re.escape(servers[0].endpoint)):
        spanning(tmp_path, devices)


def test_its_port_is_its_own(servers: tuple[RPCProcess, RPCProcess], tmp_path: Path) -> None:
    with sllm.Worker(embedded.DRAFT, n_ctx=64, state=tmp_path) as other:
        port = auth.Address.parse(other.uri).port
        with pytest.raises(OSError, match="in use"):
            spanning(tmp_path, names_of(servers[0]), port=port)

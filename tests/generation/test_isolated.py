"""Models in a process of their own: the same text, and what happens when that process or a server dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GREEDY
from remote_worker import PATIENCE, WorkerProcess, n_threads, through, wait_until
from rpc_endpoints import Fake, gone, greeted, listening, refuses
from tiny_models import gguf, llama

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.engine import ggml_rpc
from sllm.generation import isolated
from sllm.rpc import server as rpc
from sllm.wire.protocol import method, pb

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = "Once upon a time"
SAMPLED = sllm.SamplingParams(temperature=0.9, seed=11)
ENDLESS = sllm.SamplingParams(temperature=1.0, seed=5, grammar='root ::= "again " root\n')
SETTINGS: dict[str, Any] = {"n_ctx": 512, **EXACT}
LONG: dict[str, Any] = {**SETTINGS, "n_ctx": 8192}  # a text of which much is left when something is lost
OURS = ("sllm-child", "sllm-remote", "sllm-relay", "sllm-rpc-front")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rpc.RPCServer]:
    with rpc.RPCServer(cache=tmp_path_factory.mktemp("cache"), n_threads=1) as server:
        yield server


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A test leaves no thread behind and no child process."""
    before = {name: n_threads(name) for name in OURS}
    children = child_processes()
    yield
    wait_until(lambda: {name: n_threads(name) for name in OURS} == before, "the threads' end")
    assert child_processes() <= children


def child_processes() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(folder.name))
    return found


def text_of(target: Any, sampling: sllm.SamplingParams, **options: Any) -> str:
    return sllm.generate(target, PROMPT, sampling=sampling, max_tokens=60, **options).text()


@pytest.fixture(scope="module")
def expected(target_model: sllm.Model) -> dict[sllm.SamplingParams, str]:
    with sllm.LocalTarget(target_model, **SETTINGS) as target:
        return {sampling: text_of(target, sampling) for sampling in (GREEDY, SAMPLED)}


# ---- the same text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_gpu_layers", [3, None])
def test_layers_on_a_server_say_the_same(
    server: rpc.RPCServer,
    draft_model: sllm.Model,
    expected: dict[sllm.SamplingParams, str],
    n_gpu_layers: int | None,
    nothing_left: None,
) -> None:
    devices = rpc.add_server(server.endpoint)
    options: dict[str, Any] = {"devices": devices, "n_gpu_layers": n_gpu_layers, "use_mmap": False}
    options["tensor_split"] = np.array([1.0])
    with sllm.LocalTarget(embedded.TARGET, **options, **SETTINGS) as target:
        assert target.isolated and target.pid != os.getpid() and not gone(target.pid)
        for sampling, text in expected.items():
            assert text_of(target, sampling) == text
            assert text_of(target, sampling, draft=draft_model) == text
            assert text_of(target, sampling, draft="ngram") == text
        assert rpc.add_server(server.endpoint) == devices  # at work for us, it has no time to answer
    assert gone(target.pid) and target.closed
    target.close()


def test_a_process_of_its_own_needs_no_server(
    expected: dict[sllm.SamplingParams, str], draft_model: sllm.Model, nothing_left: None
) -> None:
    with sllm.LocalTarget(embedded.TARGET, isolated=True, **SETTINGS) as target:
        assert "process" in repr(target)
        assert target.vocab.fingerprint == target.model.vocab.fingerprint
        for sampling, text in expected.items():
            assert text_of(target, sampling, draft=draft_model) == text
        with pytest.raises(sllm.UnsupportedModelError, match="process of its own"):
            _ = target.context


def test_a_path_is_loaded_for_the_target(expected: dict[sllm.SamplingParams, str]) -> None:
    with sllm.LocalTarget(embedded.TARGET, n_gpu_layers=0, **SETTINGS) as target:
        assert not target.isolated and target.pid == os.getpid()
        assert text_of(target, SAMPLED) == expected[SAMPLED]
    assert target.model.closed and target.closed


def test_one_text_at_a_time(nothing_left: None) -> None:
    with sllm.LocalTarget(embedded.DRAFT, isolated=True, **SETTINGS) as target:
        tokens = target.vocab.encode(PROMPT)
        stream = sllm.generate(target, PROMPT, sampling=ENDLESS)
        next(stream)
        with pytest.raises(sllm.BusyError):
            target.open(tokens, GREEDY, 5)
        stream.close()
        assert text_of(target, GREEDY)  # and the next one waits for nothing
        with pytest.raises(sllm.ContextFullError):
            target.open(np.resize(tokens, 600), GREEDY, 5)
        with pytest.raises(ValueError, match="no tokens"):
            target.open(tokens[:0], GREEDY, 5)
        with pytest.raises(ValueError, match="grammar"):
            target.open(tokens, sllm.SamplingParams(grammar="root ::= ("), 5)
        biased = sllm.SamplingParams(grammar='root ::= "a"', logit_bias=dict.fromkeys(range(2560), -np.inf))
        with pytest.raises(sllm.InferenceError, match=r"^draft\.gguf: no token can be selected"):
            text_of(target, biased)
        generation = target.open(tokens, ENDLESS, None)
        generation.cancel()
        with pytest.raises(sllm.CancelledError):
            while True:
                next(generation)


def test_a_second_load_sends_next_to_nothing(tmp_path: Path, nothing_left: None) -> None:
    meta, tensors = llama(512, 4, 2)
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf(meta, tensors))
    sent, texts = [], []
    for _ in range(2):
        with ExitStack() as stack:  # a server that remembers nothing but what it has kept on the disk
            server = stack.enter_context(rpc.RPCServer(cache=tmp_path / "cache", n_threads=1))
            link = stack.enter_context(Link(ggml_rpc.split(server.endpoint)))
            devices = rpc.add_server(f"{link.host}:{link.port}")
            link.reset_stats()
            target = stack.enter_context(sllm.LocalTarget(path, devices=devices, n_ctx=64, n_threads=1))
            sent.append(link.stats.bytes_up)
            texts.append(sllm.generate(target, "abc", sampling=GREEDY, max_tokens=20).text())
    assert sent[0] > 0.9 * path.stat().st_size - tensors["token_embd.weight"].nbytes
    assert sent[1] < 0.01 * sent[0]
    assert texts[0] == texts[1] and texts[0]
    kept = [p for p in (tmp_path / "cache").iterdir() if len(p.name) == 64]
    # Weights alone: nothing that a text has to do with.
    sizes = {tensor.nbytes for tensor in tensors.values()}
    assert kept and {p.stat().st_size for p in kept} <= sizes


# ---- loss ----------------------------------------------------------------------------------------------


ON_AND_ON = sllm.SamplingParams(temperature=1.0, seed=5, grammar="root ::= [a-zA-Z ,.] root")
"""Of what a model writes of this, however fast, much is left when it has been read in part."""

NEVER = 3600.0
"""Seconds after which silence would tell of a loss: it is the connection's end that has to."""


def lose(target: sllm.LocalTarget, loss: Any) -> tuple[sllm.RPCError, list[int]]:
    """Read a text, lose something in the middle of it; the error and what was read."""
    read: list[int] = []
    overdue = threading.Timer(PATIENCE, target.cancel)  # which raises another error
    overdue.start()
    try:
        with pytest.raises(sllm.RPCError) as caught:
            lost = False
            for run in sllm.generate(target, PROMPT, sampling=ON_AND_ON):
                read += run.tokens
                if len(read) >= 5 and not lost:
                    lost = True
                    loss()
    finally:
        overdue.cancel()
        overdue.join()
    return caught.value, read


def test_a_killed_server_is_an_error_and_the_text_goes_on_elsewhere(
    target_model: sllm.Model, nothing_left: None
) -> None:
    with (
        rpc.RPCServer(cache=False, n_threads=1) as server,
        sllm.LocalTarget(
            embedded.TARGET,
            devices=rpc.add_server(server.endpoint),
            n_gpu_layers=4,
            deadline=NEVER,
            **LONG,
        ) as target,
    ):
        error, read = lose(target, lambda: os.kill(server.pid, signal.SIGKILL))
        assert f"the RPC server {server.endpoint} " in str(error) and "target.gguf" in str(error)
        assert list(error.tokens[: len(read)]) == read
        assert error.text == target.vocab.decode(list(error.tokens))
        with pytest.raises(sllm.RPCError, match="make a new target"):
            text_of(target, GREEDY)
        assert gone(target.pid)
    prompt = target_model.vocab.encode(PROMPT).tolist()
    n = len(error.tokens) + 30
    with sllm.LocalTarget(target_model, **LONG) as elsewhere:
        whole = [
            t
            for run in sllm.generate(elsewhere, prompt, sampling=ON_AND_ON, max_tokens=n)
            for t in run.tokens
        ]
        assert whole[: len(error.tokens)] == list(error.tokens)


def test_a_server_that_stops_answering_is_an_error(nothing_left: None) -> None:
    """It neither closes the connection nor says anything, as a machine that hangs."""
    with (
        rpc.RPCServer(cache=False, n_threads=1) as server,
        sllm.LocalTarget(
            embedded.TARGET, devices=rpc.add_server(server.endpoint), deadline=1.0, **LONG
        ) as target,
    ):
        error, _ = lose(target, lambda: os.kill(server.pid, signal.SIGSTOP))
        assert "owed an answer for 1 s" in str(error)


def test_a_killed_process_is_an_error(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_KEEPALIVE_SECONDS", NEVER)
    with sllm.LocalTarget(embedded.TARGET, isolated=True, **LONG) as target:
        error, read = lose(target, lambda: os.kill(target.pid, signal.SIGKILL))
        assert "ended by signal 9" in str(error)
        assert list(error.tokens[: len(read)]) == read


def test_a_load_that_fails_is_reported(server: rpc.RPCServer, tmp_path: Path, nothing_left: None) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    with pytest.raises(sllm.ModelLoadError, match=r"no\.gguf is not a GGUF file"):
        sllm.LocalTarget(tmp_path / "no.gguf", isolated=True)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(embedded.TARGET.read_bytes()[:-1000])
    with pytest.raises(sllm.ModelLoadError, match=r"damaged\.gguf"):
        sllm.LocalTarget(damaged, isolated=True)
    with pytest.raises(ValueError, match="type_k"):
        sllm.LocalTarget(embedded.DRAFT, isolated=True, type_k="f17")
    with pytest.raises(ValueError, match="RPC7"):
        sllm.LocalTarget(embedded.DRAFT, devices=[f"RPC7[{server.endpoint}]"])
    with rpc.RPCServer(cache=False) as other:
        devices = rpc.add_server(other.endpoint)
    with pytest.raises(sllm.RPCError, match=f"{other.endpoint} cannot be reached"):
        sllm.LocalTarget(embedded.DRAFT, devices=devices)


def test_a_server_that_hangs_up_during_the_load_is_reported(nothing_left: None) -> None:
    with listening(Fake()) as endpoint:
        devices = rpc.add_server(endpoint)
        with pytest.raises(sllm.RPCError, match=f"the RPC server {endpoint} went away"):
            sllm.LocalTarget(embedded.DRAFT, devices=devices)


def liar(server: rpc.RPCServer, command: int, lie: bytes) -> Any:
    """Passes everything on, but for the first answer to a command."""

    def answer(client: socket.socket) -> None:
        with socket.create_connection((server.host, server.port)) as honest:
            while request := greeted(client):
                honest.sendall(request)
                if request[0] not in ggml_rpc.ANSWERS and request[0] != GET_TENSOR:
                    continue
                head = honest.recv(8, socket.MSG_WAITALL)
                if not head:
                    return
                size = int.from_bytes(head, "little")
                data = honest.recv(size, socket.MSG_WAITALL)
                if request[0] == command and told:
                    data = (told.pop() * size)[:size]
                client.sendall(head + data)

    told = [lie]
    return answer


GET_TENSOR = 8


@pytest.mark.parametrize(
    ("command", "lie"),
    [(0, b"\xff"), (0, b"\0"), (1, b"\0"), (2, b"\0"), (3, b"\x10\0"), (3, b"\0"), (GET_TENSOR, b"\xff")],
)
def test_a_server_that_lies_ends_nothing_but_its_target(command: int, lie: bytes, nothing_left: None) -> None:
    """Where a buffer is, how large one may be, what was computed: some lies kill the process."""
    with (
        rpc.RPCServer(cache=False, n_threads=1) as server,
        listening(liar(server, command, lie)) as endpoint,
        suppress(sllm.SllmError, ValueError, MemoryError),  # whatever llama.cpp makes of it
    ):
        devices = rpc.add_server(endpoint)
        with sllm.LocalTarget(embedded.DRAFT, devices=devices, deadline=5.0, n_ctx=64) as target:
            sllm.generate(target, PROMPT, sampling=GREEDY, max_tokens=5).text()


def test_arguments_that_do_not_go_together(draft_model: sllm.Model, server: rpc.RPCServer) -> None:
    with pytest.raises(TypeError, match="takes the path"):
        sllm.LocalTarget(draft_model, isolated=True)
    with pytest.raises(TypeError, match="n_gpu_layers, use_mmap belong to loading"):
        sllm.LocalTarget(draft_model, n_gpu_layers=3, use_mmap=False)
    with pytest.raises(TypeError, match="JSON"):
        sllm.LocalTarget(embedded.DRAFT, isolated=True, n_batch=object())  # type: ignore[arg-type]
    for deadline in (0, -1, float("nan"), "5", True):
        with pytest.raises(ValueError, match="deadline"):
            sllm.LocalTarget(embedded.DRAFT, isolated=True, deadline=deadline)  # type: ignore[arg-type]


PARENT = """
import sys, time, sllm
from sllm import embedded
target = sllm.LocalTarget(embedded.DRAFT, isolated=True, n_ctx=64)
print(target.pid, flush=True)
time.sleep(60)
"""


def test_the_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        wait_until(lambda: gone(pid), "the process's end")


# ---- through a worker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(folder / "cache"))
        with WorkerProcess(folder / "state", model=embedded.DRAFT, rpc=True) as worker:
            yield worker


def test_layers_through_a_relay_give_the_same_text(
    worker: WorkerProcess, expected: dict[sllm.SamplingParams, str], nothing_left: None
) -> None:
    with sllm.connect(worker.uri) as remote:
        assert "rpc" in remote.info.features
        devices = remote.rpc_devices()
        assert remote.rpc_devices() == devices
        with sllm.LocalTarget(embedded.TARGET, devices=devices, n_gpu_layers=5, **SETTINGS) as target:
            for sampling, text in expected.items():
                assert text_of(target, sampling) == text
            # The worker's own model is still there for everybody.
            assert text_of(remote.target(), GREEDY)
        endpoint = devices[0].endpoint
        assert endpoint is not None and not refuses(endpoint)
    assert refuses(endpoint)


def test_nobody_gets_past_the_token(worker: WorkerProcess) -> None:
    import grpc

    with sllm.connect(worker.uri) as remote:
        channel = remote.link.open_channel(5.0)
        stub = channel.stream_stream(method("Relay"), pb.Piece.SerializeToString, pb.Piece.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(iter([pb.Piece(data=b"\x0e" + bytes(8))])))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        channel.close()


def test_one_client_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draft_model: sllm.Model, nothing_left: None
) -> None:
    monkeypatch.setattr("sllm.worker.relay._TURN_SECONDS", 0.3)
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    with (
        sllm.Worker(draft_model, state=tmp_path, n_ctx=128, rpc=True, **EXACT) as worker,
        sllm.connect(worker.uri) as one,
        sllm.connect(worker.uri) as other,
    ):

        def served() -> bool:
            """Whether it is the other one's turn, which the first one's end may not have given back yet."""
            with suppress(sllm.BusyError):
                return len(other.rpc_devices()) == 1
            return False

        with sllm.LocalTarget(embedded.DRAFT, devices=one.rpc_devices(), **SETTINGS) as target:
            assert text_of(target, GREEDY)
            with pytest.raises(sllm.BusyError, match="serves another client"):
                other.rpc_devices(timeout=PATIENCE)
        wait_until(served)
        # A server that was crashed is replaced.
        assert worker._relay is not None
        pid = worker._relay._server.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gone(pid))
        wait_until(served)


def test_a_worker_without_rpc(tmp_path: Path, draft_model: sllm.Model) -> None:
    with (
        sllm.Worker(draft_model, state=tmp_path, n_ctx=128, **EXACT) as worker,
        sllm.connect(worker.uri) as remote,
    ):
        assert "rpc" not in remote.info.features
        with pytest.raises(sllm.UnsupportedModelError, match="sllm worker --rpc"):
            remote.rpc_devices()
        remote.close()
        with pytest.raises(sllm.ClosedError):
            remote.rpc_devices()


@pytest.mark.parametrize("how", ["worker", "link"])
def test_a_lost_worker_is_an_error(tmp_path: Path, how: str, nothing_left: None) -> None:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
        worker = stack.enter_context(WorkerProcess(tmp_path, model=embedded.DRAFT, rpc=True))
        link = stack.enter_context(Link(worker.address))
        remote = stack.enter_context(sllm.connect(through(link, worker.uri), keepalive=NEVER))
        devices = remote.rpc_devices()
        options: dict[str, Any] = {"devices": devices, "deadline": NEVER, **LONG}
        target = stack.enter_context(sllm.LocalTarget(embedded.TARGET, **options))
        error, read = lose(target, worker.kill if how == "worker" else link.cut)
        assert f"behind 127.0.0.1:{link.port}" in str(error)
        assert list(error.tokens[: len(read)]) == read

"""RPC servers: starting and ending them, asking them, and everything that can be at an endpoint instead."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, examples
from remote_worker import PATIENCE, n_threads, wait_until
from rpc_endpoints import (
    DEVICE_COUNT,
    DEVICE_MEMORY,
    HELLO,
    OURS,
    Fake,
    gone,
    greeted,
    listening,
    refuses,
    said,
)

import sllm
from sllm import embedded
from sllm.engine import ggml_rpc
from sllm.engine._ffi import lib
from sllm.rpc import server as rpc
from sllm.rpc.front import Front

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLED = sllm.SamplingParams(temperature=0.9, seed=11)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rpc.RPCServer]:
    with rpc.RPCServer(cache=tmp_path_factory.mktemp("cache"), n_threads=1) as server:
        yield server


# ---- servers -------------------------------------------------------------------------------------------


def test_a_server_says_where_it_is_and_what_it_has(server: rpc.RPCServer) -> None:
    assert server.alive and not gone(server.pid)
    assert server.endpoint == f"127.0.0.1:{server.port}"
    (device,) = rpc.add_server(server.endpoint)
    assert device.endpoint == server.endpoint
    assert device.name == f"RPC0[{server.endpoint}]"
    assert 0 < device.memory_free <= device.memory_total
    assert [total for _, total in server.memory] == [device.memory_total]
    assert rpc.add_server(server.endpoint) == [device]
    assert rpc.devices(server.endpoint) == [device]
    assert device in rpc.devices()
    assert device not in sllm.engine.devices.devices()  # it would be asked for its memory


def test_nothing_is_left_of_a_closed_server() -> None:
    before = n_threads("sllm-child")
    server = rpc.RPCServer(cache=False)
    pid, endpoint = server.pid, server.endpoint
    server.close()
    server.close()
    assert server.closed and not server.alive
    assert gone(pid) and refuses(endpoint)
    assert n_threads("sllm-child") == before
    with pytest.raises(sllm.RPCError, match="nothing listens there"):
        rpc.add_server(endpoint)
    with pytest.raises(ValueError, match="closed"):
        _ = server.pid


def test_a_forgotten_server_ends_with_a_warning() -> None:
    server = rpc.RPCServer(cache=False)
    pid = server.pid
    with pytest.warns(ResourceWarning, match="unclosed"):
        del server
    wait_until(lambda: gone(pid))


PARENT = """
import os, sys, time
from sllm.rpc.server import RPCServer
server = RPCServer(cache=False)
if "fork" in sys.argv and os.fork() == 0:  # holds the other end of the server's stdin
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(server.pid, server.endpoint, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_server_ends_with_its_parent(how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with parent:
        assert parent.stdout is not None
        pid, endpoint = parent.stdout.readline().split()
        assert not gone(int(pid))
        parent.kill()
        parent.wait(PATIENCE)
        wait_until(lambda: gone(int(pid)) and refuses(endpoint), "the server's end")
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_the_folder_that_it_is_started_in_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sllm").mkdir()
    (tmp_path / "sllm" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with rpc.RPCServer(cache=False) as server:
        assert rpc.add_server(server.endpoint)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"host": "0.0.0.0"}, ValueError, "without a password"),
        ({"host": "192.0.2.1"}, ValueError, "sllm worker --rpc"),
        ({"host": "192.0.2.1", "allow_public": True}, OSError, "cannot listen on 192.0.2.1"),
        ({"host": "::1"}, ValueError, "expected an IPv4 address"),
        ({"host": "nonsense", "allow_public": True}, ValueError, "expected an IPv4 address"),
        ({"port": -1}, ValueError, "port is -1"),
        ({"port": 70000}, ValueError, "port is 70000"),
        ({"port": "1"}, TypeError, "port"),
        ({"n_threads": 0}, ValueError, "n_threads is 0"),
        ({"devices": ["TPU7"]}, ValueError, "'TPU7' to serve; there are CPU"),
        ({"devices": []}, ValueError, "devices is empty"),
        ({"cache": "/dev/null/folder"}, OSError, "/dev/null/folder"),
        ({"cache_size": 0}, ValueError, "cache_size is 0"),
    ],
)
def test_servers_that_cannot_be(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    before = n_threads("sllm-child")
    with pytest.raises(kind) as caught:
        rpc.RPCServer(**options)
    assert said in str(caught.value)
    assert n_threads("sllm-child") == before


def test_a_port_in_use_is_reported(server: rpc.RPCServer) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        rpc.RPCServer(port=server.port)


@given(st.binary(max_size=200))
@examples(50)
def test_the_hash_is_fnv_1a(data: bytes) -> None:
    expected = 0xCBF29CE484222325
    for byte in data:
        expected = (expected ^ byte) * 0x100000001B3 % 2**64
    assert lib.sllm_rpc_hash(data, len(data), 0) == expected
    front = lib.sllm_rpc_hash(data[:70], len(data[:70]), 0)
    assert lib.sllm_rpc_hash(data[70:], len(data[70:]), front) == expected


# ---- what may be at an endpoint ------------------------------------------------------------------------


def silent(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def test_an_honest_fake_passes() -> None:
    """So that the ones below fail for what they say."""
    with listening(Fake()) as endpoint:
        assert ggml_rpc.probe(endpoint).memory == ((1000, 2000),)


def test_a_closed_port_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(sllm.RPCError, match=f"{endpoint}: nothing listens there .connection refused"):
        rpc.add_server(endpoint)


def test_a_web_server_is_recognised() -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            with pytest.raises(sllm.RPCError, match="is a web server"):
                rpc.add_server(f"127.0.0.1:{web.server_port}", timeout=1.0)
        finally:
            web.shutdown()
            thread.join()


def old(connection: socket.socket) -> None:
    """Servers of version 3 wanted an empty greeting, and hung up on others."""
    if greeted(connection) == struct.pack("<BQ", HELLO, 0):
        connection.sendall(said(bytes([3, 6, 0])))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Fake(hello=said(bytes([OURS[0] + 1, 0, 0]) + bytes(25))),
            [f"version {OURS[0] + 1}.0.0", "expected"],
        ),
        (Fake(hello=said(OURS[:2] + b"\1" + bytes(25))), [f"version {OURS[0]}.{OURS[1]}.1 ", "expected"]),
        (Fake(hello=said(bytes([9, 1, 2]) + bytes(40))), ["version 9.1.2", "expected"]),  # a larger greeting
        (Fake(hello=said(bytes([4, 0, 1, 0]))), ["version 4.0.1", "expected"]),
        (old, ["version 3.6.0", "expected"]),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" + b" " * 20), ["is an SSH server"]),
        (lambda c: (greeted(c), c.sendall(b"\x15\x03\x01\x00\x02\x02\x46" * 3)), ["speaks TLS"]),
        (lambda c: (greeted(c), c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")), ["is a web server"]),
        (lambda c: None, ["hung up when greeted", "another version"]),
        (silent, ["said nothing for 0.4 s", "serves another client"]),
        (Fake(count=said(struct.pack("<I", 0))), ["claims to have 0 devices"]),
        (Fake(count=said(struct.pack("<I", 2**32 - 1))), ["claims to have 4294967295 devices"]),
        (Fake(count=said(b"")), ["is no RPC server"]),
        (Fake(count=None), ["greeted and then said nothing more"]),
        (Fake(memory=said(struct.pack("<QQ", 1, 2**64 - 1))), ["claims", "bytes of memory"]),
    ],
)
def test_other_peers_are_described(answer: Any, words: list[str]) -> None:
    with listening(answer) as endpoint, pytest.raises(sllm.RPCError) as caught:
        rpc.add_server(endpoint, timeout=0.4)
    text = str(caught.value)
    assert text.startswith(endpoint) and "\n" not in text
    assert all(word in text for word in words), text
    assert rpc.devices(endpoint) == []


def drip(connection: socket.socket) -> None:
    """One byte at a time, for ever."""
    with suppress(OSError):
        while True:
            connection.sendall(b"\0")
            time.sleep(0.02)


@pytest.mark.parametrize("answer", [silent, drip], ids=["silent", "drip"])
def test_asking_ends_in_time(answer: Any) -> None:
    with listening(answer) as endpoint:
        began = time.monotonic()
        with pytest.raises(sllm.RPCError):
            rpc.add_server(endpoint, timeout=0.5)
        assert time.monotonic() - began < 5  # and not for ever


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(said)), st.integers(0, 2))
@examples(60)
def test_no_answer_is_too_strange(data: bytes, at: int) -> None:
    fake = Fake()
    fake.answers[(HELLO, DEVICE_COUNT, DEVICE_MEMORY)[at]] = data

    def answer(connection: socket.socket) -> None:
        request = greeted(connection)
        while request:
            connection.sendall(fake.answers.get(request[0], b"") or b"")
            if fake.answers.get(request[0]) == data:
                return
            request = greeted(connection)

    with listening(answer) as endpoint, suppress(sllm.RPCError):
        assert ggml_rpc.probe(endpoint, 1.0).memory
        assert at > 0  # it is an answer to a later question


@pytest.mark.parametrize(
    "endpoint", ["", ":5", "host:", "host:0", "host:65536", "host:x", "[::1]:50052", "a b:5", "http://host:5"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        rpc.add_server(endpoint)


def test_what_is_no_argument() -> None:
    with pytest.raises(TypeError, match="HOST:PORT"):
        rpc.add_server(5)  # type: ignore[arg-type]
    for timeout in (0, -1, float("nan"), None, "5", True):
        with pytest.raises(ValueError, match="timeout"):
            rpc.add_server("127.0.0.1:1", timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(sllm.RPCError, match=r"no such host|not resolved"):
        rpc.add_server("no-such-host.invalid:5", timeout=2.0)


# ---- models of this process ----------------------------------------------------------------------------


def text_of(model: sllm.Model, sampling: sllm.SamplingParams) -> str:
    with sllm.LocalTarget(model, n_ctx=256, **EXACT) as target:
        return sllm.generate(target, "Once upon a time", sampling=sampling, max_tokens=40).text()


def test_layers_on_servers_say_the_same(server: rpc.RPCServer, target_model: sllm.Model) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(rpc.RPCServer(cache=False, n_threads=1))
        here, there = rpc.add_server(server.endpoint), rpc.add_server(other.endpoint)
        ways: list[dict[str, Any]] = [
            {"devices": here, "n_gpu_layers": 3, "use_mmap": False},
            {"devices": here},
            {"devices": [*here, *there], "tensor_split": [1, 3]},
            {"devices": [there[0].name], "n_gpu_layers": 0},
        ]
        for sampling in (GREEDY, SAMPLED):
            expected = text_of(target_model, sampling)
            for way in ways:
                with sllm.Model(embedded.TARGET, **way) as model:
                    assert text_of(model, sampling) == expected
                    assert model.offloaded == (way.get("n_gpu_layers") != 0)


@pytest.mark.parametrize("shape", ["qwen35", "gpt-oss", "lfm2moe", "deepseek2", "gemma3, pattern of numbers"])
def test_other_kinds_of_models_say_the_same(
    server: rpc.RPCServer, random_model: Callable[..., Path], shape: str
) -> None:
    path, texts = random_model(shape), []
    for devices in ([], rpc.add_server(server.endpoint)):
        options: dict[str, Any] = {"devices": devices} if devices else {}
        with sllm.Model(path, n_gpu_layers=99 if devices else 0, **options) as model:
            texts.append(text_of(model, SAMPLED))
    assert texts[0] == texts[1]


def test_two_models_of_one_process_share_a_server(server: rpc.RPCServer, target_model: sllm.Model) -> None:
    devices = rpc.add_server(server.endpoint)
    with sllm.Model(embedded.TARGET, devices=devices) as one:
        assert rpc.add_server(server.endpoint) == devices  # it is at work and says nothing
        with sllm.Model(embedded.DRAFT, devices=devices) as two:
            assert text_of(one, SAMPLED) == text_of(target_model, SAMPLED)
            assert text_of(two, SAMPLED)


def test_a_missing_server_is_reported_before_llama_cpp_connects() -> None:
    with rpc.RPCServer(cache=False) as server:
        devices = rpc.add_server(server.endpoint)
        with pytest.raises(ValueError, match="RPC7"):
            sllm.Model(embedded.DRAFT, devices=[f"RPC7[{server.endpoint}]"])
    with pytest.raises(sllm.RPCError, match="nothing listens there"):
        sllm.Model(embedded.DRAFT, devices=devices)
    with (
        listening(Fake(hello=said(b"\1\2\3" + bytes(25)))) as endpoint,
        pytest.raises(sllm.RPCError, match=r"version 1\.2\.3"),
    ):
        sllm.Model(embedded.DRAFT, devices=[f"RPC0[{endpoint}]"])
    with pytest.raises(ValueError, match="no device 5"):
        sllm.Model(embedded.DRAFT, devices=[5])  # type: ignore[list-item]


# ---- the front -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Fake(count=None), "went away"),
        (Fake(count=said(b"12345")), "with 5 bytes, expected 4"),
        (Fake(count=struct.pack("<Q", 4)), "owed an answer for 0.5 s"),
    ],
)
def test_the_front_says_how_a_server_was_lost(answer: Any, said: str) -> None:
    lost: list[str] = []
    with listening(answer) as endpoint:
        front = Front(endpoint, deadline=0.5, on_loss=lost.append)
        try:
            with pytest.raises(sllm.RPCError):
                ggml_rpc.probe(front.endpoint, 5.0)
            wait_until(lambda: lost)
        finally:
            front.close()
    assert lost[0].startswith(f"the RPC server {endpoint} ") and said in lost[0]
    assert n_threads("sllm-rpc-front") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="whose a connection is, is read from /proc")
def test_the_front_is_for_its_own_user(server: rpc.RPCServer, monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(server.endpoint, deadline=PATIENCE, on_loss=print)
    try:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(sllm.RPCError, match="hung up"):
            ggml_rpc.probe(front.endpoint)
        monkeypatch.undo()
        assert ggml_rpc.probe(front.endpoint).memory
    finally:
        front.close()


def test_the_front_passes_everything_on(server: rpc.RPCServer) -> None:
    lost: list[str] = []
    front = Front(server.endpoint, deadline=PATIENCE, on_loss=lost.append)
    try:
        assert ggml_rpc.probe(front.endpoint) == ggml_rpc.probe(server.endpoint)
        assert front.stats.bytes_up > 0 and front.stats.bytes_down > 0
    finally:
        front.close()
    assert refuses(front.endpoint)
    assert not lost

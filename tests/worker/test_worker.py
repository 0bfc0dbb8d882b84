"""The worker over the real wire: strangers, broken clients and crowds leave it and others' texts alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import random
import socket
import ssl
import struct
import threading
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from certificates import authority, has_ipv6
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GGUF, GREEDY, PLAIN, examples, make_prompt, one_by_one, without_end
from raw_client import PATIENCE, TOKEN, Client, Code, hint, opening, wait_until

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.engine import gguf
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, PROTOCOL, method, pb, size_limit
from sllm.worker.rate import Rate
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.engine.model import Model

OPTIONS: dict[str, Any] = {"n_ctx": 256, "token": TOKEN, **EXACT}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def worker(state: Path) -> Iterator[Worker]:
    """One worker for all tests that do not change it: whatever they do to it, the next one finds it well."""
    limits = Limits(sessions=4, queue=8, hints_per_s=200, max_hint=64, max_grammar=2000)
    with Worker(embedded.TARGET, state=state, limits=limits, **OPTIONS) as worker:
        yield worker


def own_worker(model: Model, state: Path, **options: Any) -> Worker:
    limits = Limits(**options.pop("limits", {}))
    return Worker(model, state=state, limits=limits, **{**OPTIONS, **options})


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with Client(worker.address) as client:
        yield client


@pytest.fixture
def steady(worker: Worker, target_model: Model) -> Iterator[Callable[[], None]]:
    """A long text that runs meanwhile; calling it checks that the text has gone on, and is exact."""
    sampling = without_end(target_model, replace(PLAIN, seed=11))
    prompt = make_prompt(target_model, 6, seed=11).tolist()
    wanted = one_by_one(target_model, prompt, sampling, 240, n_ctx=256)
    with Client(worker.address) as client:
        stream = client.generate(opening(prompt, sampling, 240, run_ahead=False))
        asked = [0]

        def check() -> None:
            n = len(stream.text)
            asked[0] += 1
            stream.send(hint(len(prompt) + n, [], asked[0]))
            stream.until(n + 1)
            assert stream.text == wanted[: len(stream.text)]

        check()
        yield check
        for _ in range(3):
            check()
        stream.cancel()
    wait_until(lambda: not worker._scheduler.running())


# ---- who may call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", f"bearer {TOKEN}"),),
        (("authorization", f"Bearer {TOKEN}x"),),
        (("authorization", f"Bearer {TOKEN[:-1]}"),),
        (("authorization", "Bearer " + "x" * 1000),),
        (("token", TOKEN),),
        (("authorization-bin", f"Bearer {TOKEN}".encode()),),
    ],
)
def test_without_the_token_nothing_is_answered(client: Client, metadata: Any) -> None:
    client.metadata = metadata
    for name in ("Info", "Status", "Echo", "Vocabulary", "Nothing", "/grpc.health.v1.Health/Watch", "/x/y"):
        with pytest.raises(grpc.RpcError) as caught:
            client.call(name, b"")
        assert caught.value.code() is Code.UNAUTHENTICATED
        assert TOKEN not in str(caught.value)
    assert client.generate(opening()).end()[0] is Code.UNAUTHENTICATED
    assert client.generate(b"\xff\xff").end()[0] is Code.UNAUTHENTICATED


def test_with_the_token_what_is_there_is_answered(client: Client) -> None:
    assert client.info().protocol == PROTOCOL
    for name in ("Nothing", "/sllm.v2.Worker/Info", "/x/y"):
        with pytest.raises(grpc.RpcError) as caught:
            client.call(name, b"")
        assert caught.value.code() is Code.UNIMPLEMENTED


def test_health_is_open_to_all_and_says_when_the_worker_ends(draft_model: Model, state: Path) -> None:
    request = health_pb2.HealthCheckRequest()
    serving = health_pb2.HealthCheckResponse.ServingStatus
    with own_worker(draft_model, state) as worker:
        for token in (None, "x" * 20, TOKEN):
            with Client(worker.address, token=token) as client:
                stub = health_pb2_grpc.HealthStub(client.channel)
                assert (
                    stub.Check(request, metadata=client.metadata, timeout=PATIENCE).status == serving.SERVING
                )
        assert worker.drain(0)
        for token in (None, TOKEN):
            with Client(worker.address, token=token) as client:
                stub = health_pb2_grpc.HealthStub(client.channel)
                answer = stub.Check(request, metadata=client.metadata, timeout=PATIENCE)
                assert answer.status == serving.NOT_SERVING
        with Client(worker.address) as client:
            assert client.info().n_ctx == 256  # what runs may go on
            assert client.generate(opening()).end()[0] is Code.UNAVAILABLE


def test_health_says_when_the_worker_cannot_go_on(draft_model: Model, state: Path) -> None:
    with own_worker(draft_model, state) as worker, Client(worker.address, token=None) as client:
        worker._scheduler._context.close()
        with Client(worker.address) as known:
            codes = {known.generate(opening()).end()[0] for _ in range(5)}
        assert codes <= {Code.UNAVAILABLE, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.ABORTED}
        wait_until(lambda: worker._scheduler.failed)
        stub = health_pb2_grpc.HealthStub(client.channel)
        wait_until(lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == 2)


def test_strangers_cannot_hold_the_workers_threads(draft_model: Model, state: Path) -> None:
    """More calls than it has threads, that send nothing and wait: only those with the token may wait."""
    never: queue.SimpleQueue[Any] = queue.SimpleQueue()
    paths = [method("Generate"), method("Info"), *(f"/grpc.health.v1.Health/{n}" for n in ("Check", "Watch"))]
    with (
        own_worker(draft_model, state, limits={"sessions": 1, "queue": 0}) as worker,
        Client(worker.address, token=None) as stranger,
        Client(worker.address) as client,
    ):
        calls: list[Any] = [
            stranger.channel.stream_stream(path, None, None)(iter(never.get, None), timeout=PATIENCE)
            for path in paths
            for _ in range(12)
        ]
        for _ in range(3):
            assert client.info().protocol == PROTOCOL
            client.generate(opening()).run()
        for call in calls:
            call.cancel()
            never.put(None)


def test_the_worker_is_known_by_its_fingerprint(worker: Worker) -> None:
    address = auth.Address.parse(worker.uri)
    assert address == worker.address
    assert address.fingerprint is not None
    with pytest.raises(sllm.AuthError, match=address.fingerprint):
        sllm.connect(replace(address, fingerprint="0" * 64).uri, timeout=PATIENCE)
    with pytest.raises(sllm.AuthError, match="token"):
        sllm.connect(replace(address, token="x" * 20).uri, timeout=PATIENCE)
    assert TOKEN not in repr(worker)
    assert TOKEN in worker.uri


@pytest.mark.parametrize("names", [[x509.DNSName("worker.example")], []], ids=["named", "nameless"])
def test_a_certificate_of_ones_own(draft_model: Model, tmp_path: Path, names: list[x509.GeneralName]) -> None:
    """Issued by an authority, with its chain, for a host that is not this one."""
    chain, key = authority(tmp_path, *names)
    files = tmp_path / "chain.pem", tmp_path / "key.pem"
    for path, data in zip(files, (chain, key), strict=True):
        path.write_bytes(data)
    files[1].chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        own_worker(draft_model, tmp_path, certificate=files)
    files[1].chmod(0o600)
    with (
        own_worker(draft_model, tmp_path, certificate=files) as worker,
        Client(worker.address) as client,
    ):
        assert worker.address.fingerprint == auth.fingerprint(chain)
        assert client.info().n_vocab == draft_model.vocab.n_tokens
    assert not (tmp_path / "worker.pem").exists()


def test_the_certificate_and_the_token_stay_the_same(draft_model: Model, tmp_path: Path) -> None:
    uris = []
    for _ in range(2):
        with own_worker(draft_model, tmp_path, token=None) as worker:
            uris.append(worker.uri.replace(f":{worker.address.port}", ""))
    assert uris[0] == uris[1]
    assert (tmp_path / "token").read_text().strip() in uris[0]


def test_insecure_is_for_loopback_alone(draft_model: Model, state: Path) -> None:
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "example.com"):
        with pytest.raises(ValueError, match="loopback"):
            own_worker(draft_model, state, host=host, insecure=True, token=None)
    for more in ({"token": TOKEN}, {"token": None, "certificate": ("a", "b")}):
        with pytest.raises(ValueError, match="neither a token nor a certificate"):
            own_worker(draft_model, state, insecure=True, **more)
    with own_worker(draft_model, state, insecure=True, token=None) as worker:
        assert worker.uri == f"sllm://127.0.0.1:{worker.address.port}#insecure"
        with Client(worker.address, token=None) as client:
            assert client.info().protocol == PROTOCOL
            assert len(client.generate(opening(max_tokens=2)).run()) <= 2


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_the_other_loopback(draft_model: Model, state: Path) -> None:
    with own_worker(draft_model, state, host="::1") as worker, Client(worker.address) as client:
        assert worker.address.endpoint == f"[::1]:{worker.address.port}"
        assert client.info().protocol == PROTOCOL


def test_the_address_for_clients_may_be_another(draft_model: Model, state: Path) -> None:
    with own_worker(draft_model, state, host="0.0.0.0", public_host="worker.example") as worker:
        assert worker.address.host == "worker.example"
    with own_worker(draft_model, state, host="0.0.0.0") as worker, Client(worker.address) as client:
        assert worker.address.host == "127.0.0.1"
        assert client.info().protocol == PROTOCOL


# ---- what does not even speak the language -----------------------------------------------------------------


def hello(address: auth.Address) -> bytes:
    """The first message of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("kind", ["nothing", "http", "http2", "noise", "half", "twice", "grpc without tls"])
def test_noise_on_the_port(worker: Worker, steady: Callable[[], None], kind: str) -> None:
    data = {
        "nothing": b"",
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "noise": random.Random(1).randbytes(100_000),
        "half": hello(worker.address)[:100],
        "twice": hello(worker.address) * 2,
    }.get(kind)
    where = worker.address.host, worker.address.port
    if data is None:
        with grpc.insecure_channel(worker.address.endpoint, CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method("Info"), None, None)(
                    b"", metadata=auth.bearer(TOKEN), timeout=PATIENCE
                )
            assert caught.value.code() is Code.UNAVAILABLE
        steady()
        return
    sockets = []
    for i in range(8):
        sock = socket.create_connection(where, PATIENCE)
        sockets.append(sock)
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        if i % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()  # with a reset
        steady()
    for sock in sockets:
        sock.close()
    steady()


def test_noise_inside_tls(worker: Worker, steady: Callable[[], None]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    rng = random.Random(2)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for data in (
        rng.randbytes(5000),
        preface + rng.randbytes(5000),
        preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + rng.randbytes(5000),
        preface + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with (
            socket.create_connection((worker.address.host, worker.address.port), PATIENCE) as plain,
            contextlib.suppress(OSError),
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(data)
            secure.recv(100)
        steady()


# ---- messages that are none --------------------------------------------------------------------------------


@examples(40)
@given(data=st.binary(min_size=1, max_size=300))
def test_random_bytes_are_refused_or_understood(worker: Worker, shared: Client, data: bytes) -> None:
    code = None
    stream = shared.generate(data)
    try:
        stream.run()
    except grpc.RpcError as error:
        code = error.code()
    assert code in (
        Code.INVALID_ARGUMENT,
        Code.OUT_OF_RANGE,
        Code.UNIMPLEMENTED,
        Code.FAILED_PRECONDITION,
        None,
    )


@pytest.fixture(scope="module")
def shared(worker: Worker) -> Iterator[Client]:
    with Client(worker.address) as client:
        yield client


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\x00" * 50])
def test_malformed_messages_everywhere(client: Client, steady: Callable[[], None], data: bytes) -> None:
    for name in ("Info", "Status", "Echo"):
        with pytest.raises(grpc.RpcError) as caught:
            client.call(name, data)
        assert caught.value.code() is Code.INVALID_ARGUMENT
        assert "version 1 of the protocol" in str(caught.value.details())
    assert client.generate(data).end()[0] is Code.INVALID_ARGUMENT
    stream = client.generate(opening(max_tokens=200, run_ahead=False))
    stream.next()
    stream.send(data)
    assert stream.end()[0] is Code.INVALID_ARGUMENT
    vocabulary: Any = client.channel.unary_stream(method("Vocabulary"), None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(vocabulary(data, metadata=client.metadata, timeout=PATIENCE))
    assert caught.value.code() is Code.INVALID_ARGUMENT
    steady()


UNKNOWN = b"\x2a\x02\x08\x01"  # a field that this version does not know

FIRST: list[tuple[Any, grpc.StatusCode, str]] = [
    (b"", Code.INVALID_ARGUMENT, "begins with Open"),
    (UNKNOWN, Code.INVALID_ARGUMENT, "begins with Open"),
    (pb.Up(cancel=pb.Cancel()), Code.INVALID_ARGUMENT, "begins with Open"),
    (hint(0, [5], 1), Code.INVALID_ARGUMENT, "begins with Open"),
    (pb.Up(open=pb.Open()), Code.INVALID_ARGUMENT, ""),
    (pb.Up(open=pb.Open(tokens=[5])), Code.INVALID_ARGUMENT, "top_p"),
    (opening([]), Code.INVALID_ARGUMENT, "no tokens"),
    (opening([2560]), Code.INVALID_ARGUMENT, "2560 tokens"),
    (opening([2**31 - 1]), Code.INVALID_ARGUMENT, "vocabulary"),
    (opening([5, 2**31]), Code.INVALID_ARGUMENT, "vocabulary"),
    (opening([2**32 - 1]), Code.INVALID_ARGUMENT, "vocabulary"),
    (opening(start=4), Code.INVALID_ARGUMENT, "begins at 4"),
    (opening(start=2**32 - 1), Code.INVALID_ARGUMENT, "begins at"),
    (opening([5] * 257), Code.OUT_OF_RANGE, "257 tokens"),
    (opening(model_id="f" * 64), Code.FAILED_PRECONDITION, "another model"),
    (opening(require=["hints", "tree"]), Code.UNIMPLEMENTED, "'tree'"),
    (opening(require=["x" * 100_000]), Code.UNIMPLEMENTED, "does not offer"),
    (opening(sampling=replace(GREEDY, grammar="root ::= (")), Code.INVALID_ARGUMENT, "grammar"),
    (opening(sampling=replace(GREEDY, grammar="root ::= [" + "x" * 1900)), Code.INVALID_ARGUMENT, "grammar"),
    (
        opening(sampling=replace(GREEDY, grammar='root ::= "' + "x" * 2000 + '"')),
        Code.INVALID_ARGUMENT,
        "longer",
    ),
    (opening(sampling=replace(GREEDY, logit_bias={2560: 1.0})), Code.INVALID_ARGUMENT, "2560"),
    (opening(sampling=replace(GREEDY, grammar="root ::= [z-a]")), Code.INVALID_ARGUMENT, ""),
]


@pytest.mark.parametrize(("first", "code", "said"), FIRST)
def test_a_first_message_that_begins_nothing(
    client: Client, steady: Callable[[], None], first: Any, code: grpc.StatusCode, said: str
) -> None:
    for more in ((), (hint(3, [5], 1),)):
        found, details = client.generate(first, *more).end()
        assert found is code or (not said and found is Code.ABORTED)
        assert said in details
    steady()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -1.0},
        {"top_k": 2**32 - 1},
        {"penalty_last_n": 2**32 - 1},
        {"bias_tokens": [1, 2, 3]},
        {"bias_values": [1.0]},
        {"bias_tokens": [2**32 - 1], "bias_values": [1.0]},
        {"grammar": "\0"},
    ],
)
def test_invalid_samplings(client: Client, change: dict[str, Any]) -> None:
    message = opening()
    message.open.sampling.MergeFrom(pb.Sampling(**change))
    code, details = client.generate(message).end()
    assert code is Code.INVALID_ARGUMENT
    assert next(iter(change)).partition("_")[0] in details


def test_the_largest_numbers_are_numbers(client: Client, target_model: Model) -> None:
    stream = client.generate(opening([5, 6], max_tokens=2**32 - 1, text_id=2**64 - 1))
    text = stream.run()
    wanted = one_by_one(target_model, [5, 6], GREEDY, 300, n_ctx=256)[:254]
    assert text == wanted
    assert stream.reason == ("eog" if target_model.vocab.is_eog(text[-1]) else "context")


def test_a_message_that_is_too_large_is_refused_before_it_is_read(
    worker: Worker, client: Client, steady: Callable[[], None]
) -> None:
    limit = size_limit(256)
    client.call("Echo", pb.EchoRequest(padding=bytes(limit - 100)))
    for n in (limit + 1, 4 << 20):
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Echo", pb.EchoRequest(padding=bytes(n)))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        code, details = client.generate(pb.Up(padding=bytes(n)).SerializeToString()).end()
        assert code is Code.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        steady()


BEHIND: list[tuple[list[Any], str]] = [
    ([opening()], "after Open"),
    ([UNKNOWN], "after Open"),
    ([b""], "after Open"),
    ([hint(3, [5] * 65, 1)], "65 tokens"),
    ([hint(3, list(range(40_000)), 1)], "40000 tokens"),
    ([hint(3, [], i) for i in range(1200)], "200 hints per second"),
    ([hint(3, [], 1, [0])], "0 tokens and 1 parents"),
    ([hint(3, [5, 6], 1, [0])], "2 tokens and 1 parents"),
    ([hint(3, [5, 6], 1, [0, 0, 1])], "2 tokens and 3 parents"),
    ([hint(3, [5, 6], 1, [2, 1])], "the parent 1, expected -1 to -1"),  # each follows the other
    ([hint(3, [5, 6], 1, [0, 2])], "the parent 1, expected -1 to 0"),  # it follows itself
    ([hint(3, [5, 6, 7], 1, [0, 3, 1])], "the parent 2, expected -1 to 0"),  # it comes before its parent
    ([hint(3, [5, 6, 7], 1, [0, 1, 2**32 - 1])], "the parent 4294967294"),
    ([hint(3, [5, 6, 6], 1, [0, 1, 1])], "like another one after the same parent"),
    ([hint(3, [5, 5], 1, [0, 0])], "like another one after the same parent"),
    ([hint(3, [2**32 - 1] * 2, 1, [0, 0])], "like another one after the same parent"),
    ([hint(3, range(65), 1, [0] * 65)], "65 tokens"),
    ([hint(3, range(10_000), 1, [i // 2 for i in range(10_000)])], "10000 tokens"),
    ([hint(3, [5], 1, [1] * 10_000)], "1 tokens and 10000 parents"),
]


@pytest.mark.parametrize(("messages", "said"), BEHIND)
def test_what_may_not_follow_open_ends_its_text_alone(
    client: Client, steady: Callable[[], None], messages: list[Any], said: str
) -> None:
    stream = client.generate(opening(max_tokens=250, run_ahead=False))
    stream.next()
    for message in messages:
        stream.send(message)
    code, details = stream.end()
    assert code is Code.INVALID_ARGUMENT
    assert said in details
    steady()


@examples(10)
@given(data=st.data())
def test_hints_out_of_range_change_nothing(
    worker: Worker, shared: Client, target_model: Model, data: st.DataObject
) -> None:
    prompt = make_prompt(target_model, 5, seed=data.draw(st.integers(0, 9))).tolist()
    sampling = without_end(target_model, replace(PLAIN, seed=data.draw(st.integers(0, 9))))
    wanted = one_by_one(target_model, prompt, sampling, 30)
    numbers = st.sampled_from([0, 1, 2559, 2560, 2**31 - 1, 2**31, 2**32 - 1]) | st.integers(0, 2559)
    stream = shared.generate(opening(prompt, sampling, 30))
    for number in range(data.draw(st.integers(1, 20))):
        pos = data.draw(numbers | st.integers(0, 40))
        tokens = data.draw(st.lists(numbers, max_size=20))
        parents: list[int] = []
        if data.draw(st.booleans()):
            tokens = list(dict.fromkeys(tokens))
            parents = [data.draw(st.integers(0, i)) for i in range(len(tokens))]
        stream.send(hint(pos, tokens, data.draw(numbers | st.just(number)), parents))
        if data.draw(st.booleans()) and stream.reason is None:
            stream.next()
    assert stream.run() == wanted


def test_a_client_may_stop_speaking_and_go_on_listening(client: Client, target_model: Model) -> None:
    sampling = without_end(target_model, GREEDY)
    stream = client.generate(opening([5, 6], sampling, 30))
    stream._outbox.put(None)
    assert stream.run() == one_by_one(target_model, [5, 6], sampling, 30)
    silent = client.generate()
    silent._outbox.put(None)
    code, details = silent.end()
    assert code is Code.INVALID_ARGUMENT
    assert "begins with Open" in details


def test_a_text_ends_when_its_client_says_so(
    worker: Worker, client: Client, steady: Callable[[], None]
) -> None:
    stream = client.generate(opening(max_tokens=200, run_ahead=False))
    stream.next()
    stream.send(pb.Up(cancel=pb.Cancel()))
    stream.run()
    assert stream.reason == "cancelled"
    wait_until(lambda: len(worker._scheduler.running()) == 1)
    steady()


def test_a_text_that_is_opened_again_replaces_itself(draft_model: Model, state: Path) -> None:
    """There is one place, and its client has lost the connection without the worker knowing."""
    sampling = without_end(draft_model, GREEDY)
    wanted = one_by_one(draft_model, [5, 6], sampling, 40)
    limits = {"sessions": 1, "queue": 0}
    with (
        own_worker(draft_model, state, limits=limits, pass_seconds=0.003) as worker,
        Client(worker.address) as lost,
        Client(worker.address) as client,
    ):
        first = lost.generate(opening([5, 6], sampling, 200, text_id=5))
        first.until(4)
        assert client.generate(opening([5, 6], sampling, 2, text_id=6)).end()[0] is Code.RESOURCE_EXHAUSTED
        second = client.generate(opening([5, 6, *wanted[:4]], sampling, 36, start=2, text_id=5))
        assert second.run() == wanted[4:]
        assert second.opened.n_reused >= 5
        first.run()
        assert first.reason == "cancelled"


def test_the_rate_of_hints_allows_for_bursts() -> None:
    began = time.monotonic()
    rate = Rate(50)
    n = 0
    while rate.take():
        n += 1
    assert 200 <= n <= 201 + 50 * (time.monotonic() - began)
    rate._last -= 1.0
    assert all(rate.take() for _ in range(49))
    rate._last -= 1000.0
    for _ in range(2):
        assert rate.take()
        rate.give_back()
    rate.give_back()  # never more than a burst
    n = sum(rate.take() for _ in range(1000))
    assert 199 <= n <= 201 + 50 * (time.monotonic() - began)
    rate.give_back()
    assert rate.take()


def test_a_call_that_says_nothing_ends(draft_model: Model, state: Path) -> None:
    limits = {"sessions": 1, "queue": 0, "idle_seconds": 0.3}
    with own_worker(draft_model, state, limits=limits) as worker, Client(worker.address) as client:
        streams = [client.generate() for _ in range(5)]
        for stream in streams:
            code, details = stream.end()
            assert code is Code.INVALID_ARGUMENT
            assert "none came" in details
        stream = client.generate(opening(run_ahead=False))
        stream.run()
        assert stream.reason == "idle"
        wait_until(lambda: n_session_threads() == 0)


def test_a_call_without_its_request_ends(draft_model: Model, state: Path) -> None:
    """More of them than there are threads; then the worker is there for others again."""
    limits = {"sessions": 1, "queue": 0, "idle_seconds": 0.3}
    calls = ["Info", "Status", "Echo", "Score", "Vocabulary"] * 4
    with own_worker(draft_model, state, limits=limits) as worker, Client(worker.address) as client:
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        silent: list[Any] = [
            client.channel.stream_stream(method(name), None, None)(
                iter(waiting.get, None), metadata=client.metadata, timeout=PATIENCE
            )
            for name in calls
        ]
        told = set()
        for call in silent:
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            told.add((caught.value.code(), str(caught.value.details()).partition(",")[2]))
        refused = {one for one in told if one[0] is Code.RESOURCE_EXHAUSTED}
        assert told - refused == {(Code.INVALID_ARGUMENT, " and none came in 0.3 seconds")}
        assert client.info().sessions == 1
        wait_until(lambda: not any(thread.name == "sllm-request" for thread in threading.enumerate()))
        for _ in silent:
            waiting.put(None)


# ---- what it tells -----------------------------------------------------------------------------------------


def test_what_it_says_of_itself(worker: Worker, client: Client, target_model: Model) -> None:
    info = client.info()
    assert info.software == f"sllm {sllm.__version__}"
    assert list(info.features) == [
        "generate", "hints", "run-ahead", "score", "vocabulary", "status", "echo", "noise-vllm",
        "noise-sglang", "grammar", "json-schema", "trees",
    ]  # fmt: skip
    assert info.model_name == "target.gguf"
    assert info.model_id == gguf.model_id(Path(embedded.TARGET))
    assert info.vocab_fingerprint == target_model.vocab.fingerprint
    assert (info.n_vocab, info.n_ctx, info.sessions) == (target_model.vocab.n_tokens, 256, 4)
    assert (info.n_params, info.size_bytes) == (target_model.n_params, target_model.size_bytes)
    assert (info.max_prompt, info.max_hint) == (256, 64)
    assert info.ByteSize().bit_count() == 1


def test_features_depend_on_its_options(target_model: Model, draft_model: Model, state: Path) -> None:
    limits = {"max_grammar": 0, "max_prompt": 10, "sessions": 2}
    with (
        own_worker(target_model, state, draft=draft_model, limits=limits) as worker,
        Client(worker.address) as client,
    ):
        features = list(client.info().features)
        assert "worker-draft" in features
        assert not {"grammar", "json-schema"} & set(features)
        assert client.info().max_prompt == 10
        code, details = client.generate(opening(sampling=replace(GREEDY, grammar="root ::= [a-z]"))).end()
        assert code is Code.INVALID_ARGUMENT
        assert "no grammars" in details
        code, details = client.generate(opening(sampling=replace(GREEDY, json_schema={}))).end()
        assert code is Code.INVALID_ARGUMENT
        assert "no grammars" in details
        assert client.generate(opening([5] * 11)).end()[0] is Code.OUT_OF_RANGE
        assert client.generate(opening(require=["grammar"])).end()[0] is Code.UNIMPLEMENTED
        stream = client.generate(opening(require=["worker-draft"], max_tokens=60))
        assert stream.run() == one_by_one(target_model, [5, 6, 7], GREEDY, 60)


@pytest.mark.parametrize("version", [0, PROTOCOL + 1, 2**32 - 1])
def test_another_version_of_the_protocol(client: Client, version: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("Info", pb.InfoRequest(protocol=version))
    assert caught.value.code() is Code.FAILED_PRECONDITION
    assert str(version) in str(caught.value.details())
    assert "same version" in str(caught.value.details())


def test_its_vocabulary(client: Client, target_model: Model, tmp_path: Path) -> None:
    stream = client.channel.unary_stream(method("Vocabulary"), None, pb.Piece.FromString)
    data = b"".join(p.data for p in stream(b"", metadata=client.metadata, timeout=PATIENCE))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(zlib.decompress(data))
    assert path.read_bytes() == gguf.vocabulary_only(Path(embedded.TARGET))
    with sllm.Model(path, vocab_only=True) as model:
        assert model.vocab.fingerprint == client.info().vocab_fingerprint


def test_its_echo(client: Client) -> None:
    for n in (0, 1, 63, 1000, 1 << 20):
        reply = client.call("Echo", pb.EchoRequest(reply_bytes=n), pb.EchoReply)
        assert reply.padding == bytes(n)
    for n in ((1 << 20) + 1, 2**32 - 1):
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Echo", pb.EchoRequest(reply_bytes=n))
        assert caught.value.code() is Code.INVALID_ARGUMENT


def test_its_figures(draft_model: Model, state: Path) -> None:
    with own_worker(draft_model, state, limits={"sessions": 1}) as worker, Client(worker.address) as client:
        before = client.status()
        assert (before.sessions, before.queued, before.passes, before.tokens) == (0, 0, 0, 0)
        sampling = without_end(draft_model, GREEDY)
        client.generate(opening(sampling=sampling, max_tokens=10)).run()
        stream = client.generate(opening([5, 6, 7, 8], sampling, 20, run_ahead=False))
        stream.next()
        waiting = client.generate(opening(sampling=sampling))
        wait_until(lambda: client.status().queued == 1)
        stream.send(hint(4, [], 1))
        stream.until(1)
        status = client.status()
        assert (status.sessions, status.sessions_total, status.refused) == (1, 3, 0)
        assert status.tokens == status.passes == 11
        assert status.rows == 11
        assert list(status.batch_sizes) == [11]
        assert status.prompt_tokens == 3 + 4
        assert status.reused_tokens == 3
        assert status.busy_s > 0 and status.uptime_s >= status.busy_s
        (one,) = status.running
        assert (one.n_prompt, one.n_tokens, one.n_passes, one.n_drafted) == (4, 1, 1, 0)
        stream.cancel()
        waiting.run()
        assert worker.stats.tokens == 19


def test_a_commit_tells_how_it_came_about(worker: Worker, client: Client, target_model: Model) -> None:
    sampling = without_end(target_model, GREEDY)
    wanted = one_by_one(target_model, [5, 6, 7], sampling, 20)
    stream = client.generate(opening([5, 6, 7], sampling, 20, run_ahead=False))
    opened = stream.next().opened
    assert opened.queued_us >= 0 and opened.n_reused <= 2
    stream.send(hint(3, [], 7))
    first = stream.next().commit
    assert (first.pos, list(first.tokens), first.n_accepted, first.n_verified) == (3, wanted[:1], 0, 0)
    assert first.hint_id == 7
    assert first.pass_us > 0
    assert not first.own_draft
    stream.send(hint(4, wanted[1:19], 8))
    accepted = 0
    while len(stream.text) < 19:
        commit = stream.next().commit
        assert commit.hint_id == 8
        accepted += commit.n_accepted
        assert commit.n_accepted <= commit.n_verified
    assert stream.text[:19] == wanted[:19]
    stream.cancel()


# ---- crowds ------------------------------------------------------------------------------------------------


def test_fifty_clients_at_once(target_model: Model, state: Path) -> None:
    """Some are served, and exactly; the rest are refused at once and told so."""
    sampling = without_end(target_model, replace(PLAIN, seed=1))
    wanted = {i: one_by_one(target_model, [5 + i], sampling, 12) for i in range(5)}
    ends: list[Any] = []
    with own_worker(target_model, state, limits={"sessions": 4, "queue": 4}, pass_seconds=0.01) as worker:
        clients = [Client(worker.address) for _ in range(10)]
        start = threading.Barrier(50)

        def one(i: int) -> None:
            start.wait(PATIENCE)
            stream = clients[i % 10].generate(opening([5 + i % 5], sampling, 12))
            try:
                ends.append((i, stream.run()))
            except grpc.RpcError as error:
                ends.append((i, error.code()))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        served = [(i, text) for i, text in ends if isinstance(text, list)]
        assert len(ends) == 50
        assert len(served) >= 4
        for i, text in served:
            assert text == wanted[i % 5]
        refused = {code for _, code in ends if not isinstance(code, list)}
        assert refused <= {Code.RESOURCE_EXHAUSTED}
        wait_until(lambda: clients[0].status().sessions == 0)
        assert clients[0].generate(opening([5], sampling, 12)).run() == wanted[0]
        for client in clients:
            client.channel.close()


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def n_session_threads() -> int:
    return sum(thread.name == "sllm-session" for thread in threading.enumerate())


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts by /proc")


@needs_proc
def test_clients_that_are_killed_leave_nothing_behind(draft_model: Model, state: Path) -> None:
    """Thirty a round, cut off at any moment, by the client and by the link."""
    sampling = without_end(draft_model, GREEDY)
    rng = random.Random(5)
    with own_worker(draft_model, state, limits={"sessions": 4, "queue": 30}) as worker:
        scheduler = worker._scheduler

        def kill(n: int) -> None:
            with Link((worker.address.host, worker.address.port)) as link:
                for i in range(n):
                    client = Client(worker.address, port=link.port)
                    size = rng.randrange(1, 200)
                    stream = client.generate(opening([5 + i] * size, sampling, 200))
                    for _ in range(rng.randrange(3)):
                        stream.send(hint(rng.randrange(250), [5] * rng.randrange(20), 1))
                    time.sleep(rng.choice([0, 0.001, 0.01]))
                    if rng.random() < 0.4:
                        with contextlib.suppress(grpc.RpcError):
                            stream.until(rng.randrange(3))
                    how = rng.randrange(3)
                    if how == 0:
                        stream.cancel()
                    elif how == 1:
                        link.cut()
                    stream._outbox.put(None)
                    client.channel.close()
            wait_until(lambda: not scheduler.running() and scheduler.n_queued == 0)
            wait_until(lambda: n_session_threads() == 0)

        kill(30)
        gc.collect()
        before, memory = n_descriptors(), resident_bytes()
        for _ in range(3):
            kill(30)
        gc.collect()
        wait_until(lambda: n_descriptors() <= before + 4)
        assert resident_bytes() - memory < 40e6
        assert not scheduler.running()
        with Client(worker.address) as client:
            text = client.generate(opening([5, 6], sampling, 20)).run()
            assert text == one_by_one(draft_model, [5, 6], sampling, 20)


def test_a_client_that_does_not_read_costs_its_backlog_and_no_more(draft_model: Model, state: Path) -> None:
    """Behind a link that stalls: what the sockets hold, and then the text waits."""
    sampling = without_end(draft_model, GREEDY)
    limits = {"sessions": 2, "backlog": 6}
    with (
        own_worker(draft_model, state, n_ctx=1024, limits=limits) as worker,
        Link((worker.address.host, worker.address.port)) as link,
        Client(worker.address, port=link.port) as slow,
        Client(worker.address) as client,
    ):
        stream = slow.generate(opening([5], sampling, 1000))
        stream.until(1)
        (session,) = worker._scheduler.running()
        link.stall()
        for _ in range(5):
            assert client.generate(opening([6, 7], sampling, 100)).run() == one_by_one(
                draft_model, [6, 7], sampling, 100
            )
            assert session.backlog <= limits["backlog"]
        link.resume()
        assert stream.run() == one_by_one(draft_model, [5], sampling, 1000, n_ctx=1024)


def test_a_client_that_never_reads_is_cut_off(draft_model: Model, state: Path) -> None:
    """Its call would hold a thread for as long as the connection stands."""
    sampling = without_end(draft_model, GREEDY)
    limits = {"sessions": 1, "queue": 0, "backlog": 4, "idle_seconds": 0.5, "max_prompt": 8}
    with (
        own_worker(draft_model, state, n_ctx=4096, limits=limits) as worker,
        Client(worker.address) as client,
    ):
        scheduler = worker._scheduler
        # A call of which nothing is read: the window of the stream is 64 KiB, a thousand commits of 64 bytes.
        stream = client.generate(opening([5], sampling, 4000))
        wait_until(lambda: bool(scheduler.running()))
        wait_until(lambda: not scheduler.running())
        wait_until(lambda: n_session_threads() == 0)
        stream.cancel()
        assert len(client.generate(opening([5], sampling, 5)).run()) == 5


# ---- logs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_logs_hold_no_text_and_no_token(
    target_model: Model, draft_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    prompt = [1234, 2345, 1357]
    sampling = without_end(target_model, GREEDY)
    with (
        caplog.at_level(level),
        own_worker(target_model, tmp_path, token=None, draft=draft_model) as worker,
    ):
        token = worker.address.token
        assert token is not None
        with Client(worker.address, token=token) as client:
            text = client.generate(opening(prompt, sampling, 30)).run()
            for message, _, _ in FIRST:
                with contextlib.suppress(grpc.RpcError):
                    client.generate(message).run()
            stream = client.generate(opening(prompt, sampling, 200))
            stream.until(3)
            stream.cancel()
        with Client(worker.address, token="wrong-token-wrong-token") as client, pytest.raises(grpc.RpcError):
            client.info()
        wait_until(lambda: not worker._scheduler.running())
    ours = [r for r in caplog.records if r.name.startswith("sllm") and r.name != "sllm.llama_cpp"]
    said = "\n".join(record.getMessage() + str(record.exc_text or "") for record in ours)
    assert "serving" in said
    assert token not in caplog.text
    assert "wrong-token" not in caplog.text
    for number in {*prompt, *text}:
        assert number < 1000 or str(number) not in said
    assert not [record for record in ours if record.levelno >= logging.WARNING]


# ---- beginnings and ends -----------------------------------------------------------------------------------


def test_the_port_of_another_is_an_os_error(worker: Worker, draft_model: Model, state: Path) -> None:
    with pytest.raises(OSError, match=str(worker.address.port)):
        own_worker(draft_model, state, port=worker.address.port)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        own_worker(draft_model, state, port=taken.getsockname()[1])
    with pytest.raises(OSError, match="cannot listen"):
        own_worker(draft_model, state, host="192.0.2.1")


def unfit(tmp_path: Path) -> Path:
    file = GGUF(Path(embedded.DRAFT))
    tokens = file.array("tokenizer.ggml.tokens")
    tokens[300], tokens[301] = tokens[301], tokens[300]
    return file.write(tmp_path / "unfit.gguf")


def test_what_cannot_be_made_leaves_nothing_behind(target_model: Model, tmp_path: Path) -> None:
    chain, key = auth.load_or_make_certificate(tmp_path / "one")
    _, other = auth.load_or_make_certificate(tmp_path / "two")
    files = {"chain": chain, "key": key, "other": other, "garbage": b"hello"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "worker.pem").write_bytes(b"hello")
    (tmp_path / "damaged" / "worker.pem").chmod(0o600)
    (tmp_path / "token-less").mkdir()
    (tmp_path / "token-less" / "token").write_text("short")
    (tmp_path / "token-less" / "token").chmod(0o600)
    for path in tmp_path.iterdir():
        if path.is_file():
            path.chmod(0o600)
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"draft": unfit(tmp_path)}, sllm.VocabMismatchError),
        ({"draft": tmp_path / "none.gguf"}, sllm.ModelLoadError),
        ({"model": tmp_path / "none.gguf"}, sllm.ModelLoadError),
        ({"token": "short"}, ValueError),
        ({"token": "a token with spaces in it"}, ValueError),
        ({"token": None, "state": tmp_path / "token-less"}, ValueError),
        ({"state": tmp_path / "damaged"}, ValueError),
        ({"certificate": (tmp_path / "none", tmp_path / "key")}, OSError),
        ({"certificate": (tmp_path / "chain", tmp_path / "other")}, ValueError),
        ({"certificate": (tmp_path / "chain", tmp_path / "garbage")}, ValueError),
        ({"certificate": (tmp_path / "garbage", tmp_path / "key")}, ValueError),
        ({"n_ctx": 0}, ValueError),
        ({"type_k": "f99"}, ValueError),
        ({"port": 70_000}, ValueError),
        ({"port": -1}, ValueError),
    ]

    def attempt() -> None:
        for options, error in wrong:
            arguments = {"model": target_model, "state": tmp_path, **OPTIONS, **options}
            with pytest.raises(error) as caught:
                Worker(**arguments)
            assert "spaces in it" not in str(caught.value)
        gc.collect()

    attempt()
    threads, descriptors = threading.active_count(), n_descriptors() if Path("/proc/self/fd").exists() else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            attempt()
    assert threading.active_count() <= threads
    if descriptors:
        assert n_descriptors() <= descriptors + 1
    with target_model.context(n_ctx=256) as context:
        context.decode([5])


def test_a_model_stays_its_callers(draft_model: Model, state: Path) -> None:
    with own_worker(draft_model, state):
        pass
    assert not draft_model.closed


def test_use_after_close(draft_model: Model, state: Path) -> None:
    worker = own_worker(draft_model, state)
    assert not worker.wait(0)
    client = Client(worker.address)
    worker.close()
    worker.close()
    assert worker.closed
    assert worker.wait(PATIENCE)
    assert worker.drain(0)
    assert "closed" in repr(worker)
    assert worker.stats.tokens == 0
    assert worker.uri
    with pytest.raises(grpc.RpcError) as caught:
        client.info()
    assert caught.value.code() is Code.UNAVAILABLE
    client.channel.close()
    with own_worker(draft_model, state, port=worker.address.port) as again:
        assert again.address == worker.address


def test_a_worker_that_is_forgotten_is_closed_aloud(draft_model: Model, state: Path) -> None:
    worker = own_worker(draft_model, state)
    port = worker.address.port
    forgotten = [worker]
    del worker

    def forget() -> None:
        forgotten.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed <sllm.Worker"):
        forget()
    with pytest.raises(OSError, match=r".+"):
        socket.create_connection(("127.0.0.1", port), 1).close()


@pytest.mark.parametrize("seed", range(6))
def test_closing_while_calls_run_tells_everybody(draft_model: Model, state: Path, seed: int) -> None:
    rng = random.Random(seed)
    sampling = without_end(draft_model, GREEDY)
    ends: list[Any] = []
    with (
        own_worker(draft_model, state, limits={"sessions": 2, "queue": 3}) as worker,
        Client(worker.address) as client,
    ):

        def call(i: int) -> None:
            try:
                if i % 3 == 0:
                    for _ in range(50):
                        client.status()
                    ends.append("asked")
                else:
                    stream = client.generate(opening([5] * rng.randrange(1, 200), sampling, 0))
                    stream.run()
                    ends.append(stream.reason)
            except grpc.RpcError as error:
                ends.append(error.code())

        threads = [threading.Thread(target=call, args=(i,)) for i in range(9)]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 0.1))
        closers = [threading.Thread(target=worker.close) for _ in range(2)]
        for thread in (*closers, *threads):
            if thread in closers:
                thread.start()
        for thread in (*closers, *threads):
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert len(ends) == 9
        assert set(ends) <= {
            "asked", "closing", "context", Code.UNAVAILABLE, Code.CANCELLED, Code.RESOURCE_EXHAUSTED,
        }  # fmt: skip
        assert n_session_threads() == 0
        assert not worker._scheduler._thread.is_alive()


def test_draining_ends_running_texts_in_peace(draft_model: Model, state: Path) -> None:
    sampling = without_end(draft_model, GREEDY)
    with own_worker(draft_model, state, pass_seconds=0.002) as worker, Client(worker.address) as client:
        stream = client.generate(opening([5], sampling, 60))
        stream.until(1)
        assert not worker.drain(0.01)
        assert client.generate(opening()).end()[0] is Code.UNAVAILABLE
        done = threading.Thread(target=stream.run)
        done.start()
        assert worker.drain(PATIENCE)
        done.join(PATIENCE)
        assert stream.reason == "length"
        assert stream.text == one_by_one(draft_model, [5], sampling, 60)

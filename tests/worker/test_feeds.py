"""Rows from worker to worker: who may bring them, and what each side gets to see."""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from oracles import EXACT, GREEDY, make_prompt
from raw_client import PATIENCE, Client, Code
from remote_worker import n_threads, wait_until

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.engine import gguf
from sllm.wire import auth, codec
from sllm.wire.protocol import PROTOCOL, SERVICE, method, pb
from sllm.worker import feeds, hops
from sllm.worker import listener as listening
from sllm.worker.destinations import Destinations
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.model import Model

N_CTX = 256
N_EMBD = 256
TOKEN = "a-token-that-is-long-enough"
HERE = ("127.0.0.1",)
N_PROMPT = 150
"""Tokens, of two chunks."""


@pytest.fixture(scope="module")
def model_id() -> str:
    return gguf.model_id(embedded.TARGET)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(
        embedded.TARGET,
        layers=(2, 7),
        token=TOKEN,
        state=tmp_path,
        limits=Limits(sessions=2, hops=HERE),
        n_ctx=N_CTX,
        **EXACT,
    ) as made:
        yield made
    assert n_threads("sllm-hop") == 0


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    made = Client(worker.address)
    yield made
    made.channel.close()


class Stream:
    """One call of bytes or messages, as a test wants them."""

    def __init__(self, client: Client, name: str, metadata: Any, *messages: Any) -> None:
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in messages:
            self.send(message)
        stub: Any = client.channel.stream_stream(method(name), None, None)
        self.call: Any = stub(iter(self.outbox.get, None), metadata=metadata, timeout=PATIENCE)

    def send(self, message: Any) -> None:
        self.outbox.put(message if isinstance(message, bytes) else message.SerializeToString())

    def next(self) -> Any:
        return pb.LayersDown.FromString(next(self.call))

    def taken(self) -> None:
        """The other side has let a feed in."""
        pb.FeedDown.FromString(next(self.call))

    def code(self) -> grpc.StatusCode:
        """The status that the call ends with."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error.code()
        finally:
            self.outbox.put(None)
        return Code.OK

    def end(self) -> None:
        self.call.cancel()
        self.outbox.put(None)


def opening(known: str, **more: Any) -> Any:
    fields: dict[str, Any] = {"model_id": known, "start": 2, "stop": 7, "codec": "f32", "sequence_id": 1234}
    return pb.LayersUp(open=pb.LayersOpen(**{**fields, **more}))


def accepting(known: str, capability: bytes, **more: Any) -> Any:
    return opening(known, accept=hashlib.sha256(capability).digest(), **more)


def noise(n: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (n, N_EMBD)).astype(np.float32)


def fed(pos: int, hidden: Any, **more: Any) -> Any:
    return pb.FeedUp(
        rows=pb.Rows(**{"pos": pos, "n_rows": len(hidden), "data": codec.encode(hidden, "f32"), **more})
    )


def announced(pos: int, n_rows: int, **more: Any) -> Any:
    return pb.LayersUp(rows=pb.Rows(pos=pos, n_rows=n_rows, **more))


@pytest.fixture
def capability() -> bytes:
    return secrets.token_bytes(auth.CAPABILITY_BYTES)


def test_rows_of_another_worker_are_computed_for_the_client(
    client: Client, model_id: str, capability: bytes
) -> None:
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 5))
    assert stream.next().opened.n_ctx == N_CTX
    feed = Stream(client, "Feed", auth.bearing(capability), fed(0, noise(5, 1)), fed(5, noise(2, 2)))
    feed.taken()
    first = stream.next().rows
    stream.send(announced(5, 2))  # what has come already
    second = stream.next().rows
    with sllm.LayerRange(embedded.TARGET, 2, 7, n_ctx=N_CTX, **EXACT) as layers:
        for found, pos, rows in ((first, 0, noise(5, 1)), (second, 5, noise(2, 2))):
            wanted = layers.forward(rows, pos=pos)
            assert np.array_equal(codec.decode(found.data, len(rows), N_EMBD, "f32"), wanted)
    stream.end()
    assert feed.code() is not Code.OK


# ---- capabilities


def well(client: Client, model_id: str) -> None:
    """The worker serves whoever has the token."""
    rows = pb.LayersUp(rows=pb.Rows(pos=0, n_rows=1, data=codec.encode(noise(1, 1), "f32")))
    stream = Stream(client, "Layers", client.metadata, opening(model_id, sequence_id=99), rows)
    assert stream.next().WhichOneof("kind") == "opened"
    assert stream.next().rows.n_rows == 1
    stream.end()


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        auth.bearer(TOKEN),  # a token is none
        auth.bearing(bytes(32)),
        auth.bearing(b"short"),
        (("authorization", "Hop "),),
        (("authorization", "Hop " + "x" * 64),),
        (("authorization", f"Hop {TOKEN}"),),
    ],
    ids=range(7),
)
def test_forged_capabilities(client: Client, model_id: str, capability: bytes, metadata: Any) -> None:
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 1))
    stream.next()
    forged = Stream(client, "Feed", metadata, fed(0, noise(1, 1)))
    assert forged.code() is Code.UNAUTHENTICATED
    true = Stream(client, "Feed", auth.bearing(capability), fed(0, noise(1, 1)))
    true.taken()
    assert stream.next().rows.n_rows == 1
    stream.end()


def test_a_capability_is_good_for_one_call_alone(client: Client, model_id: str, capability: bytes) -> None:
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability))
    stream.next()
    feed = Stream(client, "Feed", auth.bearing(capability))
    feed.taken()
    assert Stream(client, "Feed", auth.bearing(capability)).code() is Code.UNAUTHENTICATED
    for name in ("Info", "Status", "Echo"):
        with pytest.raises(grpc.RpcError) as caught:
            client.call(name, b"", metadata=auth.bearing(capability))
        assert caught.value.code() is Code.UNAUTHENTICATED
    other = Stream(client, "Layers", auth.bearing(capability), opening(model_id, sequence_id=5))
    assert other.code() is Code.UNAUTHENTICATED
    feed.end()
    stream.send(announced(0, 1))
    assert stream.next().done.reason == "feed"
    assert Stream(client, "Feed", auth.bearing(capability)).code() is Code.UNAUTHENTICATED
    well(client, model_id)


def test_a_capability_ends_with_its_stream(client: Client, model_id: str, capability: bytes) -> None:
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability))
    stream.next()
    stream.end()
    wait_until(lambda: Stream(client, "Feed", auth.bearing(capability)).code() is Code.UNAUTHENTICATED)


def test_a_capability_expires(
    client: Client, model_id: str, capability: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_CLAIM_SECONDS", -1.0)
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability))
    stream.next()
    assert Stream(client, "Feed", auth.bearing(capability)).code() is Code.UNAUTHENTICATED
    stream.end()


@pytest.mark.parametrize("digest", [b"x", bytes(31), bytes(33)])
def test_hashes_that_are_none(client: Client, model_id: str, digest: bytes) -> None:
    stream = Stream(client, "Layers", client.metadata, opening(model_id, accept=digest))
    assert stream.code() is Code.INVALID_ARGUMENT
    well(client, model_id)


def test_a_capability_of_another_stream_cannot_be_taken_over(
    client: Client, model_id: str, capability: bytes
) -> None:
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 1))
    stream.next()
    thief = Stream(client, "Layers", client.metadata, accepting(model_id, capability, sequence_id=7))
    assert thief.code() is Code.INVALID_ARGUMENT
    feed = Stream(client, "Feed", auth.bearing(capability), fed(0, noise(1, 1)))
    feed.taken()
    assert stream.next().rows.n_rows == 1
    stream.end()


# ---- whoever brings rows


BROUGHT: dict[str, Any] = {
    "another position": fed(1, noise(2, 1)),
    "more rows": fed(0, noise(3, 1)),
    "fewer rows": fed(0, noise(1, 1)),
    "too few bytes": fed(0, noise(2, 1), data=b"1234"),
    "no bytes": fed(0, noise(2, 1), data=b""),
    "nan": fed(0, noise(2, 1), data=np.full((2, N_EMBD), np.nan, np.float32).tobytes()),
    "nothing": pb.FeedUp(),
    "garbage": b"\xff\xff",
}


@pytest.mark.parametrize("rows", BROUGHT.values(), ids=BROUGHT.keys())
def test_rows_that_nobody_asked_for(client: Client, model_id: str, capability: bytes, rows: Any) -> None:
    """The client hears that none come any more; nothing else happens to anybody."""
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 2))
    stream.next()
    feed = Stream(client, "Feed", auth.bearing(capability), rows)
    assert stream.next().done.reason == "feed"
    code = feed.code()
    # gRPC ends the call itself if a message cannot be parsed, and the handler only sees that no more come:
    # the status is that of whichever comes first.
    assert code is not Code.OK or rows == BROUGHT["garbage"]
    assert client.status().rows == 0
    well(client, model_id)


def test_more_rows_than_anybody_asked_for(
    worker: Worker, client: Client, model_id: str, capability: bytes
) -> None:
    """They wait, and are not read beyond a bound."""
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability))
    stream.next()
    feed = Stream(client, "Feed", auth.bearing(capability))
    feed.taken()
    for i in range(200):
        feed.send(fed(i, noise(1, i)))
    (sequence,) = worker._scheduler.running()
    assert sequence.length == 0
    stream.send(announced(0, 1))
    assert stream.next().rows.n_rows == 1
    assert client.status().rows == 1
    well(client, model_id)
    stream.end()
    assert feed.code() is not Code.OK


def test_the_client_sends_no_numbers_itself(client: Client, model_id: str, capability: bytes) -> None:
    data = codec.encode(noise(1, 1), "f32")
    stream = Stream(
        client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 1, data=data)
    )
    assert stream.code() is Code.INVALID_ARGUMENT
    well(client, model_id)


def test_the_limits_of_the_user_hold_for_what_others_bring(tmp_path: Path, model_id: str) -> None:
    from sllm.worker.token_file import Allowance

    with Worker(embedded.TARGET, layers=(2, 7), token=TOKEN, state=tmp_path, n_ctx=N_CTX, **EXACT) as worker:
        worker._users._default.allowance = Allowance(tokens_per_minute=5)
        client, capability = Client(worker.address), secrets.token_bytes(32)
        stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 10))
        stream.next()
        feed = Stream(client, "Feed", auth.bearing(capability), fed(0, noise(10, 1)))
        assert stream.next().rows.n_rows == 10
        stream.send(announced(10, 1))
        feed.send(fed(10, noise(1, 1)))
        assert stream.code() is Code.RESOURCE_EXHAUSTED
        feed.end()
        client.channel.close()


def test_a_tree_needs_a_row_before_it(client: Client, model_id: str) -> None:
    rows = pb.Rows(pos=0, n_rows=1, data=codec.encode(noise(1, 1), "f32"), parents=[-1])
    stream = Stream(client, "Layers", client.metadata, opening(model_id), pb.LayersUp(rows=rows))
    assert stream.code() is Code.INVALID_ARGUMENT


def test_rows_that_come_too_early_are_told(client: Client, model_id: str) -> None:
    """The client takes positions to be there that are not."""
    data = codec.encode(noise(2, 1), "f32")
    rows = pb.LayersUp(rows=pb.Rows(pos=30, n_rows=2, data=data))
    stream = Stream(client, "Layers", client.metadata, opening(model_id, held=30), rows)
    assert stream.next().opened.length == 0
    assert stream.next().done.reason == "idle"
    assert stream.code() is Code.OK
    assert client.status().rows == 0


@pytest.fixture
def bringing(
    worker: Worker, capability: bytes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[hops.Hop, Link, threading.Event]]:
    """Rows that a worker before has for this one, over a link: more than this one reads of strangers. An
    event tells that they cannot be brought.
    """
    monkeypatch.setattr(hops, "_REACH_SECONDS", PATIENCE)
    monkeypatch.setattr(hops, "_KNOWN_SECONDS", PATIENCE)
    address = worker.address
    assert address.fingerprint is not None
    lost = threading.Event()
    with Link((address.host, address.port), delay=0.02) as link:  # so that what is sent is under way
        fingerprint = bytes.fromhex(address.fingerprint)
        target = pb.Hop(host=link.host, port=link.port, fingerprint=fingerprint, capability=capability)
        others = hops.Hops(Destinations(HERE), 1)
        found = others.open(target, lost.set)
        found.send(fed(0, noise(200, 1)).rows)
        yield found, link, lost
        others.close()


def taken_late(
    bringing: tuple[hops.Hop, Link, threading.Event], client: Client, model_id: str, capability: bytes
) -> None:
    """The client comes, and the rows do as well."""
    hop, _, lost = bringing
    stream = Stream(client, "Layers", client.metadata, accepting(model_id, capability), announced(0, 200))
    assert stream.next().opened.n_ctx == N_CTX
    assert stream.next().rows.n_rows == 200
    hop.send(fed(200, noise(3, 2)).rows)
    stream.send(announced(200, 3))
    assert stream.next().rows.n_rows == 3
    assert not lost.is_set()
    stream.end()


@pytest.mark.parametrize("n_early", [1, 5])
def test_a_worker_that_is_there_before_the_client_brings_its_rows_later(
    worker: Worker, client: Client, model_id: str, capability: bytes, bringing: Any, n_early: int
) -> None:
    """What it has tried before does not stand in the way."""
    wait_until(lambda: worker._monitor.calls.totals().refused["token"] >= n_early)
    taken_late(bringing, client, model_id, capability)
    _, link, _ = bringing
    assert link.stats.connections == 2  # one has fetched the certificate


def test_a_worker_that_asks_too_often_is_let_in_in_the_end(
    client: Client, model_id: str, capability: bytes, bringing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hung up on as a stranger is, and comes again until the client has been there."""
    monkeypatch.setattr(listening, "_REFUSALS", 2)
    _, link, _ = bringing
    wait_until(lambda: link.stats.connections >= 4)  # one fetches the certificate
    taken_late(bringing, client, model_id, capability)


# ---- whoever gets them


def hop(**more: Any) -> pb.Hop:
    fields = {"host": "127.0.0.1", "port": 1, "fingerprint": bytes(32), "capability": bytes(32)}
    return pb.Hop(**{**fields, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"host": ""},
        {"host": "a" * 300},
        {"port": 0},
        {"port": 70000},
        {"fingerprint": b""},  # no connection without one
        {"fingerprint": bytes(31)},
        {"capability": b""},
        {"capability": bytes(33)},
    ],
    ids=str,
)
def test_hops_that_are_none(client: Client, model_id: str, more: Any) -> None:
    stream = Stream(client, "Layers", client.metadata, opening(model_id, next=hop(**more)))
    assert stream.code() is Code.INVALID_ARGUMENT
    well(client, model_id)


@pytest.mark.parametrize(
    "host", ["10.1.2.3", "localhost.invalid", "::1", "169.254.169.254", "\x00", "127.0.0.1"]
)
def test_hops_that_lead_nowhere(client: Client, model_id: str, host: str) -> None:
    """The client is told that it is the hop, and no more: not whether anybody is there."""
    stream = Stream(client, "Layers", client.metadata, opening(model_id, next=hop(host=host)))
    assert stream.next().WhichOneof("kind") == "opened"
    assert stream.next().done.reason == "hop"
    assert stream.code() is Code.OK
    well(client, model_id)


def test_hops_that_lead_nowhere_are_few(
    worker: Worker, client: Client, model_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that end at once leave attempts behind, each of which takes its time."""
    held, go = [], threading.Event()

    def fetch(address: auth.Address, _timeout: float) -> bytes:
        held.append(address)
        go.wait(PATIENCE)
        raise sllm.RemoteError("nobody is there")

    monkeypatch.setattr(auth, "fetch_certificate", fetch)
    for i in range(8):
        stream = Stream(client, "Layers", client.metadata, opening(model_id, next=hop()))
        assert stream.next().WhichOneof("kind") == "opened"
        wait_until(lambda i=i: len(held) == i + 1)  # type: ignore[misc]
        stream.end()
        wait_until(lambda: not worker._scheduler.running())
    stream = Stream(client, "Layers", client.metadata, opening(model_id, next=hop()))
    assert stream.code() is Code.RESOURCE_EXHAUSTED
    go.set()
    wait_until(lambda: n_threads("sllm-hop") == 0)
    well(client, model_id)


def test_a_worker_that_may_connect_nowhere(tmp_path: Path, model_id: str) -> None:
    with Worker(embedded.TARGET, layers=(2, 7), token=TOKEN, state=tmp_path, n_ctx=N_CTX, **EXACT) as worker:
        client = Client(worker.address)
        assert "hop-out" not in client.info().features
        stream = Stream(client, "Layers", client.metadata, opening(model_id, next=hop()))
        assert stream.code() is Code.UNIMPLEMENTED
        client.channel.close()


class Recorder:
    """A worker with TLS that says what a test wants it to, and keeps what it was told."""

    def __init__(self, folder: Path, known: str, says: str) -> None:
        certificate, key = auth.load_or_make_certificate(folder)
        self.metadata: list[Any] = []
        self.feeds: list[Any] = []
        self.announced: list[Any] = []
        self.over = threading.Event()
        answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        info = pb.InfoReply(
            protocol=PROTOCOL,
            features=["layers", "early-rows", "hop-in"],
            model_id=known,
            n_ctx=N_CTX,
            layers=pb.LayersInfo(
                n_layer=8, n_embd=N_EMBD, start=0, stop=8, output=True, max_rows=512, fixed=False
            ),
        )

        def feed(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            self.metadata.append(dict(context.invocation_metadata()))
            if says == "no feed":
                context.abort(Code.UNAUTHENTICATED, "no")
            if says == "silent feed":
                self.over.wait(PATIENCE)
                return
            yield b""
            for data in requests:
                self.feeds.append(data)
                answered.put(pb.FeedUp.FromString(data).rows)

        def layers(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            def read() -> None:
                try:
                    self.announced.extend(requests)
                except Exception:  # noqa: BLE001 - the call is over
                    return

            threading.Thread(target=read, daemon=True).start()
            if says == "late":
                early = [answered.get(timeout=PATIENCE)]
                while sum(rows.n_rows for rows in early) < N_PROMPT:
                    early.append(answered.get(timeout=PATIENCE))
                for rows in early:
                    answered.put(rows)
            yield pb.LayersDown(opened=pb.LayersOpened(n_ctx=N_CTX)).SerializeToString()
            context.add_callback(lambda: answered.put(None))
            while (rows := answered.get()) is not None:
                rows.compute_us = 0
                if says == "nan":
                    rows.data = np.full((rows.n_rows, N_EMBD), np.nan, np.float32).tobytes()
                elif says == "garbage":
                    yield b"\xff\xff"
                elif says == "other rows":
                    rows.pos += 1
                elif says == "no end":
                    self.over.wait(PATIENCE)
                    return
                yield pb.LayersDown(rows=rows).SerializeToString()

        def raw(handler: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(handler, None, None)

        handlers = {
            "Info": grpc.unary_unary_rpc_method_handler(lambda *_: info.SerializeToString(), None, None),
            "Feed": raw(feed),
            "Layers": raw(layers),
        }
        self._threads = ThreadPoolExecutor(8)
        self._server = grpc.server(
            self._threads, handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)]
        )
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        self.uri = f"sllm://{TOKEN}-of-its-own@127.0.0.1:{self.port}#sha256={auth.fingerprint(certificate)}"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.over.set()
        self._server.stop(grace=None).wait()
        self._threads.shutdown()


@pytest.fixture
def make_chain(tmp_path: Path, model_id: str) -> Iterator[Callable[..., Any]]:
    """A chain of an honest worker and one that says something, and that one."""
    with ExitStack() as stack:

        def make(says: str, **options: Any) -> Any:
            options = {"layers": (2, 4), "limits": Limits(hops=HERE), "n_ctx": N_CTX, **options}
            first = stack.enter_context(
                Worker(embedded.TARGET, token=TOKEN, state=tmp_path / "first", **options, **EXACT)
            )
            (tmp_path / "second").mkdir()
            second = stack.enter_context(Recorder(tmp_path / "second", model_id, says))
            remotes = [
                stack.enter_context(sllm.connect(uri, deadline=0.5)) for uri in (first.uri, second.uri)
            ]
            split = stack.enter_context(
                sllm.SplitTarget(
                    embedded.TARGET, head=2, tail=1, middle=remotes, codec="f32", n_ctx=N_CTX, **EXACT
                )
            )
            return split, second

        yield make
    assert n_threads("sllm-hop") == 0


def test_the_next_worker_gets_rows_and_a_capability_and_nothing_else(
    make_chain: Callable[..., Any], target_model: Model
) -> None:
    split, second = make_chain("true")
    generation = split.open(make_prompt(target_model, 20, 7), GREEDY, 6)
    for _ in generation:
        pass
    generation.close()
    (headers,) = second.metadata
    assert set(headers) <= {"authorization", "user-agent"}
    scheme, capability = headers["authorization"].split()
    assert scheme == "Hop"
    opens = [pb.LayersUp.FromString(data) for data in second.announced]
    (opened,) = [message.open for message in opens if message.WhichOneof("kind") == "open"]
    assert opened.accept == hashlib.sha256(bytes.fromhex(capability)).digest()
    assert not opened.HasField("sampling")
    assert not opened.HasField("next")
    sent = [pb.FeedUp.FromString(data) for data in second.feeds]
    assert sum(message.rows.n_rows for message in sent) == 20 + 5
    for brought in sent:
        named = {field.name for field, _ in brought.rows.ListFields()}
        assert named <= {"pos", "n_rows", "data", "compute_us"}
    for data, told in zip(second.announced[1:], opens[1:], strict=True):
        assert len(data) == 64  # whatever it says
        named = {field.name for field, _ in told.rows.ListFields()}
        assert named <= {"pos", "n_rows"}


@pytest.mark.parametrize("says", ["nan", "garbage", "other rows"])
def test_a_next_worker_that_answers_nonsense(
    make_chain: Callable[..., Any], target_model: Model, says: str
) -> None:
    split, _ = make_chain(says)
    for _ in range(2):
        with pytest.raises(sllm.RemoteError):
            split.open(make_prompt(target_model, 20, 7), GREEDY, 6)


@pytest.mark.parametrize("says", ["no feed", "silent feed"])
def test_a_next_worker_that_lets_nobody_in(
    make_chain: Callable[..., Any], target_model: Model, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows go through the client; there it can be silent too, and that is no news."""
    monkeypatch.setattr(hops, "_REACH_SECONDS", 0.3)
    monkeypatch.setattr(hops, "_KNOWN_SECONDS", 0.3)
    split, second = make_chain(says)
    opened = threading.Event()

    def write() -> None:
        with pytest.raises((sllm.CancelledError, sllm.ClosedError)):
            split.open(make_prompt(target_model, 20, 7), GREEDY, 6)
        opened.set()

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: any(pb.LayersUp.FromString(data).rows.data for data in second.announced))
    (generation,) = [slot.generation for slot in split._slots]
    assert len(generation.remote.relayed) == 1
    generation.cancel()
    thread.join(PATIENCE)
    assert opened.is_set()


def test_one_round_trip_before_the_first_token(make_chain: Callable[..., Any], target_model: Model) -> None:
    """A worker that answers nothing, not even the opening, until it has all of the prompt."""
    split, second = make_chain("late", n_ctx=200)
    generation = split.open(make_prompt(target_model, N_PROMPT, 7), GREEDY, 6)
    assert generation.ready
    assert sum(pb.FeedUp.FromString(data).rows.n_rows for data in second.feeds) == N_PROMPT
    generation.close()


@pytest.mark.parametrize(("seconds", "n_connections"), [(300.0, 2), (-1.0, 4)])
def test_texts_share_a_connection_between_workers_for_a_while(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target_model: Model,
    seconds: float,
    n_connections: int,
) -> None:
    """The first text also fetches the certificate."""
    monkeypatch.setattr(hops, "_UNUSED_SECONDS", seconds)
    options: dict[str, Any] = {"state": tmp_path, "limits": Limits(hops=HERE), "n_ctx": N_CTX, **EXACT}
    with (
        Worker(embedded.TARGET, layers=(2, 4), **options) as first,
        Worker(embedded.TARGET, layers=(4, 7), **options) as second,
        Link(("127.0.0.1", second.address.port)) as link,
        sllm.connect(first.uri) as a,
        sllm.connect(second.uri) as b,
        sllm.SplitTarget(
            embedded.TARGET,
            head=2,
            middle=[a, b],
            hops=[f"127.0.0.1:{link.port}"],
            codec="f32",
            n_ctx=N_CTX,
            **EXACT,
        ) as split,
    ):
        for i in range(3):
            stream = sllm.generate(split, make_prompt(target_model, 20, i), sampling=GREEDY, max_tokens=5)
            stream.text()
            assert stream.stats.remote is not None
            assert stream.stats.remote.n_hops == 1
            wait_until(lambda: n_threads("sllm-hop") == 0)
        assert link.stats.connections == n_connections

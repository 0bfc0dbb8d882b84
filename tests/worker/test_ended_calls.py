"""Nothing keeps a call that has ended: gRPC counts it among its connection's until Python lets it go."""

from __future__ import annotations

import gc
import queue
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from oracles import EXACT
from raw_client import TOKEN, Client, Code, hint, opening, wait_until
from remote_worker import n_threads

from sllm import embedded
from sllm.engine import gguf
from sllm.wire.protocol import method, pb
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

N_STREAMS = 32  # that a connection may have at once, under these limits

OPTIONS: dict[str, Any] = {"n_ctx": 256, "token": TOKEN, "limits": Limits(sessions=4, queue=8), **EXACT}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(embedded.TARGET, state=tmp_path_factory.mktemp("state"), rpc=True, **OPTIONS) as worker:
        yield worker


@pytest.fixture
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def n_calls() -> int:
    """Calls that Python has not let go of."""
    return sum(issubclass(type(one), grpc.ServicerContext) for one in gc.get_objects())


def stream(client: Client, name: str, messages: Iterable[bytes] = ()) -> Any:
    return client.channel.stream_stream(method(name), None, None)(iter(messages), metadata=client.metadata)


def ended(client: Client) -> None:
    client.generate(opening()).run()


def cancelled(client: Client) -> None:
    text = client.generate(opening(max_tokens=0))
    text.until(3)
    text.cancel()


def asked_to_end(client: Client) -> None:
    text = client.generate(opening(max_tokens=0))
    text.until(3)
    text.send(pb.Up(cancel=pb.Cancel()))
    text.run()


def wrong_hint(client: Client) -> None:
    text = client.generate(opening(run_ahead=False), hint(3, [5] * 10_000, 1))
    assert text.end()[0] is Code.INVALID_ARGUMENT


def no_message(client: Client) -> None:
    text = client.generate(hint(0, [5], 1))
    assert text.end()[0] is Code.INVALID_ARGUMENT


def unreadable(client: Client) -> None:
    assert client.generate(b"\xff" * 9).end()[0] is Code.INVALID_ARGUMENT


def too_long(client: Client) -> None:
    assert client.generate(opening(range(300))).end()[0] is Code.OUT_OF_RANGE


def nothing_sent(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        next(stream(client, "Generate"))


def score(client: Client) -> None:
    client.call("Score", pb.ScoreRequest(tokens=range(5, 15), start=2))


def wrong_score(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        client.call("Score", pb.ScoreRequest(tokens=range(5, 15), start=99))


def vocabulary(client: Client) -> None:
    call: Any = client.channel.unary_stream(method("Vocabulary"), None, None)(b"", metadata=client.metadata)
    assert sum(map(len, call)) > 0


def echo(client: Client) -> None:
    client.call("Echo", pb.EchoRequest(reply_bytes=100))


def no_such_call(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        client.call("Nothing", b"")


def relay(client: Client) -> None:
    assert list(stream(client, "Relay")) == []


def relay_cut(client: Client) -> None:
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = stream(client, "Relay", iter(sent.get, None))
    wait_until(lambda: n_threads("sllm-relay") > 0)
    call.cancel()
    sent.put(None)


def layers(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        next(stream(client, "Layers"))


def without_token(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        client.call("Info", b"", metadata=())


def health(client: Client) -> None:
    client.call("/grpc.health.v1.Health/Check", b"")


CALLS: list[Callable[[Client], object]] = [
    ended,
    cancelled,
    asked_to_end,
    wrong_hint,
    no_message,
    unreadable,
    too_long,
    nothing_sent,
    score,
    wrong_score,
    vocabulary,
    echo,
    no_such_call,
    relay,
    relay_cut,
    layers,
    health,
    Client.info,
    Client.status,
    without_token,
]


def check_let_go(worker: Worker, call: Callable[[Client], object]) -> None:
    """Make a call four times: nothing is left of those that have ended."""
    before = n_calls()
    with Client(worker.address) as client:
        for _ in range(4):
            call(client)
    wait_until(lambda: n_calls() <= before, f"calls that let go, of {before}", patience=10.0)


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_has_ended_is_let_go(worker: Worker, call: Callable[[Client], object]) -> None:
    check_let_go(worker, call)


@pytest.mark.usefixtures("without_collection")
def test_one_connection_has_many_calls_one_after_the_other(worker: Worker) -> None:
    with Client(worker.address) as client:
        for _ in range(2 * N_STREAMS):
            ended(client)


@pytest.mark.usefixtures("without_collection")
def test_calls_of_clients_that_went_away(worker: Worker) -> None:
    before = n_calls()
    for _ in range(4):
        with Client(worker.address) as client:
            client.generate(opening(max_tokens=0)).until(2)
    wait_until(lambda: n_calls() <= before, patience=10.0)


# ---- layers


@pytest.fixture(scope="module")
def layer_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    state = tmp_path_factory.mktemp("state")
    with Worker(embedded.TARGET, state=state, layers=(2, 7), **OPTIONS) as worker:
        yield worker


def layers_opening() -> bytes:
    opened = pb.LayersOpen(model_id=gguf.model_id(embedded.TARGET), start=2, stop=7, codec="f32")
    return pb.LayersUp(open=opened).SerializeToString()


def rows_until(client: Client, *last: bytes) -> None:
    """A sequence that ends after ``last``."""
    for _ in stream(client, "Layers", iter([layers_opening(), *last])):
        pass


def wrong_rows(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        rows_until(client, pb.LayersUp(rows=pb.Rows(n_rows=0)).SerializeToString())


def unreadable_rows(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        rows_until(client, b"\xff" * 9)


def let_go(client: Client) -> None:
    rows_until(client, pb.LayersUp(cancel=pb.Cancel()).SerializeToString())


def sequence_cut(client: Client) -> None:
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    sent.put(layers_opening())
    call = stream(client, "Layers", iter(sent.get, None))
    next(call)
    call.cancel()
    sent.put(None)


LAYER_CALLS: list[Callable[[Client], object]] = [
    rows_until,
    wrong_rows,
    unreadable_rows,
    let_go,
    sequence_cut,
    layers,
]


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("call", LAYER_CALLS)
def test_calls_to_layers_are_let_go(layer_worker: Worker, call: Callable[[Client], object]) -> None:
    check_let_go(layer_worker, call)

"""The client of a worker of layers: whatever a worker says, there is a text or a typed error, and an end."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GREEDY, make_prompt, one_by_one, without_end
from remote_worker import FakeWorker, n_threads, wait_until

import sllm
from sllm import embedded
from sllm.engine import gguf
from sllm.wire.protocol import pb
from sllm.worker.layer_scheduler import RangeKey
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.engine.model import Model

N_CTX = 128
N_EMBD = 256
LAYERS = {"n_layer": 8, "n_embd": N_EMBD, "start": 0, "stop": 8, "output": True, "max_rows": 512}


@pytest.fixture
def connected(draft_model: Model) -> Iterator[Callable[..., Any]]:
    """Connections to workers that lie, as told."""
    model_id = gguf.model_id(embedded.TARGET)
    with ExitStack() as stack:

        def connect(layers: Any = None, info: dict[str, Any] | None = None, **lies: Any) -> Any:
            fields = {"features": ["layers"], "model_id": model_id, "n_ctx": N_CTX, **(info or {})}
            fields["layers"] = pb.LayersInfo(**{**LAYERS, **(lies.pop("said", {}))})
            fake = stack.enter_context(FakeWorker(draft_model, info=fields, layers=layers))
            remote = stack.enter_context(sllm.connect(fake.uri, deadline=0.5))
            stack.callback(lambda: wait_until(lambda: fake.n_calls == 0, "the end of every call"))
            return remote

        yield connect
    assert n_threads("sllm-remote") == 0


def split_of(remote: Any, tail: int | None = 1, **options: Any) -> sllm.SplitTarget:
    options = {"head": 2, "codec": "f32", "n_ctx": N_CTX, **EXACT, **options}
    return sllm.SplitTarget(embedded.TARGET, tail=tail, middle=remote, **options)


def opened(**more: Any) -> pb.LayersDown:
    return pb.LayersDown(opened=pb.LayersOpened(**{"n_ctx": N_CTX, **more}))


def answer(asked: pb.Rows, **more: Any) -> pb.LayersDown:
    """What an honest worker whose layers do nothing would say."""
    fields = {"pos": asked.pos, "n_rows": asked.n_rows, "data": asked.data, **more}
    return pb.LayersDown(rows=pb.Rows(**fields))


def commit(asked: pb.Rows, tokens: list[int], **more: Any) -> pb.LayersDown:
    at = asked.pos + asked.n_rows - asked.n_select + 1
    return pb.LayersDown(
        commit=pb.Commit(**{"pos": at, "tokens": tokens, "n_accepted": len(tokens) - 1, **more})
    )


def saying(*lies: Callable[[pb.Rows], Any], first: Any = None) -> Callable[..., Iterator[Any]]:
    """A worker that answers each Rows with the next of these, and the last again and again."""

    def run(messages: Iterator[pb.LayersUp]) -> Iterator[Any]:
        next(messages)
        yield opened() if first is None else first
        for i, message in enumerate(messages):
            if message.WhichOneof("kind") != "rows":
                return
            said = lies[min(i, len(lies) - 1)](message.rows)
            if said is None:
                return
            yield from said if isinstance(said, list) else [said]

    return run


NAN = np.full(N_EMBD, np.nan, dtype=np.float32).tobytes()

ROWS: dict[str, Callable[[pb.Rows], Any]] = {
    "pos": lambda r: answer(r, pos=r.pos + 1),
    "huge pos": lambda r: answer(r, pos=2**32 - 1),
    "n_rows": lambda r: answer(r, n_rows=r.n_rows + 1),
    "no rows": lambda r: answer(r, n_rows=0),
    "huge n_rows": lambda r: answer(r, n_rows=2**32 - 1),
    "too few bytes": lambda r: answer(r, data=r.data[:-1]),
    "no bytes": lambda r: answer(r, data=b""),
    "too many bytes": lambda r: answer(r, data=r.data + b"x"),
    "nan": lambda r: answer(r, data=NAN * r.n_rows),
    "a selection": lambda r: commit(r, [5]),
    "opened again": lambda _r: opened(),
    "nothing known": lambda _r: pb.LayersDown(),
    "garbage": lambda _r: b"\xff\xff",
    "unknown reason": lambda _r: pb.LayersDown(done=pb.Done(reason="tired")),
    "no reason": lambda _r: pb.LayersDown(done=pb.Done()),
    "idle": lambda _r: pb.LayersDown(done=pb.Done(reason="idle")),
    "closing": lambda _r: pb.LayersDown(done=pb.Done(reason="closing")),
    "an early end": lambda _r: None,
    "endless": lambda r: [answer(r, pos=r.pos + i) for i in range(1, 5000)],
}


LOSSES = ("idle", "closing", "an early end")


@pytest.mark.parametrize("name", LOSSES)
def test_a_worker_that_ends_every_stream_after_a_while_serves_the_text(
    connected: Callable[..., Any], target_model: sllm.Model, name: str
) -> None:
    endless = without_end(target_model, GREEDY)
    with split_of(connected(saying(answer, answer, ROWS[name]))) as split:
        generation = split.open(np.array([5, 6, 7], dtype=np.int32), endless, 12)
        assert sum(len(one.tokens) for one in generation) == 12
        generation.close()


@pytest.mark.parametrize(
    ("name", "n_true"), [(name, n) for name in ROWS for n in (0, 2) if n == 0 or name not in LOSSES]
)
def test_invalid_rows(connected: Callable[..., Any], name: str, n_true: int) -> None:
    remote = connected(saying(*[answer] * n_true, ROWS[name]))
    with split_of(remote) as split:
        for _ in range(2):  # once more after an error: no hang either
            with pytest.raises(sllm.RemoteError):
                read(split)
        assert not remote.link.streams


def read(split: sllm.SplitTarget) -> None:
    """Begin a text and read it."""
    with closing(split.open(np.array([5, 6, 7], dtype=np.int32), GREEDY, 20)) as generation:
        for _ in range(20):
            next(generation)


COMMITS: dict[str, Callable[[pb.Rows], Any]] = {
    "rows": answer,
    "pos": lambda r: commit(r, [5], pos=r.pos),
    "no tokens": lambda r: commit(r, [], n_accepted=0),
    "n_accepted": lambda r: commit(r, [5], n_accepted=1),
    "huge n_accepted": lambda r: commit(r, [5], n_accepted=2**32 - 1),
    "too many tokens": lambda r: commit(r, [5] * (r.n_select + 1)),
    "no token": lambda r: commit(r, [2560]),
    "huge token": lambda r: commit(r, [2**32 - 1]),
    "not drafted": lambda r: commit(r, [9, 5]),
}


@pytest.mark.parametrize("lie", COMMITS.values(), ids=COMMITS.keys())
def test_invalid_selections(connected: Callable[..., Any], lie: Any) -> None:
    remote = connected(saying(lambda r: lie(r) if r.n_rows == r.n_select else commit(r, [9])))
    with split_of(remote, None) as split:
        generation = split.open(np.array([5, 6, 7], dtype=np.int32), GREEDY, 20)
        assert next(generation).tokens == (9,)
        for _ in range(2):
            generation.hint(4, [8, 8])
            with pytest.raises(sllm.RemoteError):
                next(generation)
        generation.close()
        assert not remote.link.streams


@pytest.mark.parametrize(
    "first",
    [
        answer(pb.Rows(pos=0, n_rows=1)),
        commit(pb.Rows(pos=0, n_rows=1, n_select=1), [5]),
        pb.LayersDown(),
        pb.LayersDown(done=pb.Done(reason="idle")),
        pb.LayersDown(done=pb.Done(reason="closing")),
        opened(n_ctx=0),
        b"\xff",
    ],
    ids=["rows", "commit", "nothing", "idle", "closing", "no room", "garbage"],
)
def test_invalid_openings(connected: Callable[..., Any], first: Any) -> None:
    with split_of(connected(saying(answer, first=first))) as split, pytest.raises(sllm.RemoteError):
        read(split)


def test_an_impossible_length(connected: Callable[..., Any]) -> None:
    remote = connected(saying(answer, first=opened(length=2**32 - 1, n_ctx=2**32 - 1)))
    with split_of(remote) as split:
        generation = split.open(np.array([5, 6, 7], dtype=np.int32), GREEDY, 20)
        assert next(generation).tokens
        assert generation.remote.n_reused == 0
        generation.close()


@pytest.mark.parametrize("scale", [1e9, 1e38])
def test_hidden_states_as_large_as_there_are(connected: Callable[..., Any], scale: float) -> None:
    large = np.full(N_EMBD, scale, dtype=np.float32).tobytes()
    with split_of(connected(saying(lambda r: answer(r, data=large * r.n_rows)))) as split:
        generation = split.open(np.array([5, 6, 7], dtype=np.int32), GREEDY, 3)
        try:
            next(generation)
        except (sllm.SllmError, ValueError) as error:
            assert str(error)  # noqa: PT017
        generation.close()


@pytest.mark.parametrize(
    ("said", "info"),
    [
        ({"n_embd": 0}, {}),
        ({"n_embd": 2**32 - 1}, {}),
        ({"n_layer": 0}, {}),
        ({"n_layer": 0, "start": 0, "stop": 0}, {}),
        ({"max_rows": 0}, {}),
        ({"start": 7, "stop": 2}, {}),
        ({"start": 7, "stop": 2, "fixed": True}, {}),
        ({"stop": 9}, {}),
        ({"stop": 2**32 - 1, "fixed": True}, {}),
        ({}, {"n_ctx": 0}),
        ({}, {"model_id": ""}),
    ],
    ids=str,
)
def test_impossible_workers(connected: Callable[..., Any], said: Any, info: Any) -> None:
    with pytest.raises(sllm.RemoteError):
        split_of(connected(said=said, info=info))


def test_a_worker_that_does_not_let_go(connected: Callable[..., Any]) -> None:
    """It keeps the call open after the client has said that it needs nothing more."""
    over = threading.Event()

    def run(messages: Iterator[pb.LayersUp]) -> Iterator[Any]:
        next(messages)
        yield opened()
        for message in messages:
            if message.WhichOneof("kind") == "rows":
                yield answer(message.rows)
        over.wait(30)

    split = split_of(connected(run))
    generation = split.open(np.array([5, 6, 7], dtype=np.int32), GREEDY, 20)
    next(generation)
    split.close()
    assert split.closed
    over.set()


def test_closing_frees_the_workers_memory(target_model: Model) -> None:
    with (
        Worker(embedded.TARGET, layers=True, insecure=True, n_ctx=N_CTX, **EXACT) as worker,
        sllm.connect(worker.uri) as remote,
    ):
        split = split_of(remote)
        generation = split.open(make_prompt(target_model, 10, 1), GREEDY, 20)
        next(generation)
        split.close()
        wait_until(lambda: not worker._scheduler.running())
        assert [slot.sequence_id for slot in worker._scheduler._slots] == [0] * 4


def test_a_chain_goes_on_after_its_second_worker_was_busy(target_model: Model) -> None:
    """Answers of the first, on their way when the second refused, are not taken for later ones."""
    prompt = make_prompt(target_model, 100, 1)
    options: dict[str, Any] = {"insecure": True, "n_ctx": N_CTX, **EXACT}
    with (
        Worker(embedded.TARGET, layers=(2, 4), **options) as first,
        Worker(embedded.TARGET, layers=(4, 7), limits=Limits(sessions=1), **options) as second,
        sllm.connect(first.uri) as a,
        sllm.connect(second.uri) as b,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sllm.split.target._CHUNK", 7)
        holder = second._scheduler.open(RangeKey(4, 7, output=False), 1)
        with split_of([a, b]) as split:
            for _ in range(2):
                with pytest.raises(sllm.BusyError, match="no place"):
                    split.open(prompt, GREEDY, 8)
            holder.release()
            generation = split.open(prompt, GREEDY, 8)
            found = [token for one in generation for token in one.tokens]
            assert found == one_by_one(target_model, prompt, GREEDY, 8, N_CTX)
            generation.close()

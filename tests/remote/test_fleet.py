"""Several workers as one: who gets a text, where it goes on, and what is left of those that are lost."""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from certificates import authority
from cryptography import x509
from oracles import EXACT, GREEDY, PLAIN, make_prompt, one_by_one, without_end
from remote_worker import (
    PATIENCE,
    FakeWorker,
    WorkerProcess,
    commit,
    done,
    n_threads,
    opened,
    through,
    vocabulary_kept,
    wait_until,
)

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.remote import members as module
from sllm.remote.places import places, places_of_name
from sllm.wire import auth
from sllm.wire.protocol import OtherModelError, pb, to_sampling
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote
    from sllm.targets.base import RemoteStats

N_CTX = 512
TOKEN = "a-token-nobody-may-read"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module", autouse=True)
def cache(target_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every client has the vocabulary already."""
    with vocabulary_kept(tmp_path_factory.mktemp("cache"), target_model):
        yield


def none_left(name: str) -> bool:
    return n_threads(name) == 0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    for name in ("sllm-fleet", "sllm-remote", "sllm-hedge"):
        wait_until(partial(none_left, name), f"the end of {name}", 5.0)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def make_worker(target_model: Model, state: Path) -> Iterator[Callable[..., Worker]]:
    """Makes workers with one certificate and token."""
    with ExitStack() as stack:

        def make(model: Model = target_model, **options: Any) -> Worker:
            options = {"state": state, "token": TOKEN, "n_ctx": N_CTX, "pass_seconds": 0.005, **options}
            return stack.enter_context(Worker(model, **{**EXACT, **options}))

        yield make


@pytest.fixture
def connected() -> Iterator[Callable[..., Remote]]:
    """Connections, closed at the end."""
    with ExitStack() as stack:

        def connect(workers: Sequence[Worker | FakeWorker | str], **options: Any) -> Remote:
            uris = [one if isinstance(one, str) else one.uri for one in workers]
            return stack.enter_context(sllm.connect(uris, **options))

        yield connect


@pytest.fixture(scope="module")
def endless(target_model: Model) -> sllm.SamplingParams:
    return replace(without_end(target_model, PLAIN), seed=3)


@pytest.fixture(scope="module")
def wanted(target_model: Model, endless: sllm.SamplingParams) -> list[int]:
    """The text after PROMPT."""
    return one_by_one(target_model, PROMPT, endless, 60)


def tokens_of(stream: Any) -> list[int]:
    return [t for run in stream for t in run.tokens]


def stats_of(stream: Any) -> RemoteStats:
    found: RemoteStats = stream.stats.remote
    assert found is not None
    return found


def states(remote: Remote) -> list[str]:
    return [one.state for one in remote.workers]


def level(remote: Remote) -> None:
    """Let the workers be equally far and their prompts cost the same: on a busy machine, measurements say
    otherwise.
    """
    for member in remote.fleet._members.all:
        member.standing.round_trip, member.standing.token_seconds = 0.001, 0.001
        member.standing.looked = float("inf")


def by_endpoint(workers: Sequence[Worker], endpoint: str) -> Worker:
    return next(worker for worker in workers if worker.address.endpoint == endpoint)


# ---- who gets a text ---------------------------------------------------------------------------------------


def test_texts_at_once_go_to_different_workers(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    workers = [make_worker(limits=Limits(sessions=2)) for _ in range(3)]
    remote = connected(workers)
    assert states(remote) == ["up"] * 3
    level(remote)
    streams = [sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60) for _ in range(3)]
    runs = [[next(stream)] for stream in streams]  # all have a place
    assert [worker.stats.sessions_total for worker in workers] == [1, 1, 1]
    assert sum(one.n_texts for one in remote.workers) == 3
    for first, stream in zip(runs, streams, strict=True):
        assert tokens_of([*first, *stream]) == wanted
        assert len(stats_of(stream).workers) == 1 and stats_of(stream).n_moves == 0
    wait_until(lambda: all(one.n_texts == 0 for one in remote.workers))


def test_one_without_a_place_is_passed_over(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    """Also where that is known only when it refuses; where all refuse, they are busy."""
    workers = [make_worker(limits=Limits(sessions=1, queue=0)) for _ in range(2)]
    remote = connected(workers)
    guests = [connected([worker]) for worker in workers]
    taken = sllm.generate(guests[0].target(), PROMPT, sampling=endless)
    next(taken)
    for _ in range(3):
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=10)
        assert tokens_of(stream) == wanted[:10]
        assert stats_of(stream).workers == (workers[1].address.endpoint,)
        assert stats_of(stream).n_reconnects == 0
    also = sllm.generate(guests[1].target(), PROMPT, sampling=endless)
    next(also)
    with pytest.raises(sllm.BusyError, match="serves 1 texts at once"):
        sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=10).text()
    taken.close()
    also.close()


def test_a_conversation_stays_where_it_is_in_memory(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], target_model: Model
) -> None:
    workers = [make_worker(pass_seconds=0.0) for _ in range(3)]
    remote = connected(workers)
    for seed in range(2):
        text = make_prompt(target_model, 300, seed).tolist()
        served = set()
        for turn in range(4):
            level(remote)
            stream = sllm.generate(remote.target(), text, sampling=GREEDY, max_tokens=4)
            text += tokens_of(stream)
            served |= set(stats_of(stream).workers)
            assert stats_of(stream).n_reused >= (0 if turn == 0 else 300)
            text += make_prompt(target_model, 10, turn).tolist()
        assert len(served) == 1


def test_nobody_hears_of_a_text_that_it_does_not_get(target_model: Model, connected: Any) -> None:
    """To ask what it has in memory would tell it."""

    def tell(opening: pb.Open) -> Iterator[pb.Down]:
        return iter([opened(), commit(len(opening.tokens), [70])])

    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeWorker(target_model, generate=tell)) for _ in range(3)]
        remote = connected(fakes)
        text = make_prompt(target_model, 200, 1)
        assert tokens_of(sllm.generate(remote.target(), text, max_tokens=1)) == [70]
        assert sorted(len(fake.opens) for fake in fakes) == [0, 0, 1]
        assert [opening.tokens for fake in fakes for opening in fake.opens] == [text.tolist()]


def test_a_prompt_goes_where_it_fits(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    target_model: Model,
    endless: sllm.SamplingParams,
) -> None:
    small, large = make_worker(n_ctx=256), make_worker()
    remote = connected([small, large])
    prompt = make_prompt(target_model, 300, 1)
    for _ in range(3):
        stream = sllm.generate(remote.target(), prompt, sampling=endless, max_tokens=5)
        assert tokens_of(stream) == one_by_one(target_model, prompt, endless, 5)
    # One that is to become longer than the one has, too.
    stream = sllm.generate(remote.target(), prompt[:200], sampling=endless, max_tokens=100)
    assert len(tokens_of(stream)) == 100
    assert small.stats.sessions_total == 0
    with pytest.raises(sllm.ContextFullError, match="600 tokens, and the worker takes 512"):
        sllm.generate(remote.target(), make_prompt(target_model, 600, 1), max_tokens=1)


def test_scores(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], target_model: Model
) -> None:
    """A lost worker is no reason to fail: to score is to ask something."""
    text = make_prompt(target_model, 40, 2)
    with ExitStack() as stack:
        workers = [make_worker() for _ in range(2)]
        links = [stack.enter_context(Link((w.address.host, w.address.port))) for w in workers]
        remote = connected([through(link, w.uri) for link, w in zip(links, workers, strict=True)])
        expected = connected([workers[0]]).score(text, 5)
        for link in links:
            found = remote.score(text, 5)
            assert found.logprobs.tolist() == expected.logprobs.tolist()
            assert found.ranks.tolist() == expected.ranks.tolist()
            link.down()
            link.cut()
            if link is links[0]:
                continue
            with pytest.raises(sllm.RemoteError):
                remote.score(text, 5)
        links[1].up()
        wait_until(lambda: "up" in states(remote))
        assert remote.score(text, 5).ranks.tolist() == expected.ranks.tolist()


# ---- where it goes on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "told to end"])
def test_workers_in_processes_of_their_own(
    state: Path,
    connected: Callable[..., Remote],
    target_model: Model,
    endless: sllm.SamplingParams,
    how: str,
) -> None:
    wanted = one_by_one(target_model, PROMPT, endless, 400)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(WorkerProcess(state, token=TOKEN, n_ctx=N_CTX, pass_seconds=0.02))
            for _ in range(3)
        ]
        remote = connected([one.uri for one in processes])
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=400)
        runs = [next(stream)]
        for n_moved in (1, 2):
            assert len(stats_of(stream).workers) == n_moved
            at = stats_of(stream).workers[-1]
            process = next(one for one in processes if "{}:{}".format(*one.address) == at)
            if how == "killed":
                process.kill()
            else:
                process.terminate()
                assert process.process.wait(PATIENCE) == 0
            while len(stats_of(stream).workers) == n_moved:
                runs.append(next(stream))
        assert tokens_of([*runs, *stream]) == wanted
        stats = stats_of(stream)
        assert stats.n_moves == 2 and len(set(stats.workers)) == 3
        assert stats.n_reconnects == (2 if how == "killed" else 0)
        assert sorted(states(remote)).count("up") == 1


def test_a_text_without_time_leaves_a_worker_that_drains(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    """At once, and nothing is lost: the worker need not be waited for."""
    workers = [make_worker(pass_seconds=0.02) for _ in range(2)]
    remote = connected(workers, on_loss="raise")
    stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
    runs = [next(stream), next(stream)]
    first = by_endpoint(workers, stats_of(stream).workers[0])
    assert first.drain(PATIENCE, notice=0.01), "it left before its end"
    assert tokens_of([*runs, *stream]) == wanted
    stats = stats_of(stream)
    assert (stats.n_moves, stats.n_reconnects, stats.lost_seconds) == (1, 0, 0.0)
    assert len(set(stats.workers)) == 2
    assert sorted(states(remote)) == ["draining", "up"]
    # The next one knows, and one that is there still, with nowhere to go, ends in its own time.
    other = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=20)
    runs = [next(other)]
    second = by_endpoint(workers, stats_of(other).workers[0])
    assert second is not first
    draining = threading.Thread(target=second.drain, args=(PATIENCE,), kwargs={"notice": 0.0})
    draining.start()
    assert tokens_of([*runs, *other]) == wanted[:20]
    draining.join(PATIENCE)
    assert not draining.is_alive()


def test_a_worker_that_drains_comes_back(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    first, second = make_worker(), make_worker()
    with Link((first.address.host, first.address.port)) as link:
        remote = connected([through(link, first.uri), second.uri])
        first.drain(0)
        while "draining" not in states(remote):  # who refuses a text for that has said so
            assert (
                tokens_of(sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=5))
                == wanted[:5]
            )
        first.close()
        third = make_worker()
        link.retarget((third.address.host, third.address.port))
        wait_until(lambda: states(remote) == ["up", "up"])
        second.drain(0)
        assert (
            tokens_of(sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=20)) == wanted[:20]
        )
        assert third.stats.sessions_total >= 1


def test_what_on_loss_says_holds_for_losses(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], endless: sllm.SamplingParams
) -> None:
    with ExitStack() as stack:
        workers = [make_worker() for _ in range(2)]
        links = [stack.enter_context(Link((w.address.host, w.address.port))) for w in workers]
        remote = connected(
            [through(link, w.uri) for link, w in zip(links, workers, strict=True)], on_loss="raise"
        )
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless)
        next(stream)
        lost = stats_of(stream).workers[0]
        for link in links:
            if lost.endswith(f":{link.port}"):
                link.down()
                link.cut()
        with pytest.raises(sllm.RemoteError, match="was lost"):
            stream.text()
        # The next text goes elsewhere.
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=5)
        assert len(tokens_of(stream)) == 5 and lost not in stats_of(stream).workers


def test_all_lost_and_one_found(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    with ExitStack() as stack:
        workers = [make_worker() for _ in range(2)]
        links = [stack.enter_context(Link((w.address.host, w.address.port))) for w in workers]
        remote = connected([through(link, w.uri) for link, w in zip(links, workers, strict=True)])
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        for link in links:
            link.down()
        for link in links:
            link.cut()
        wait_until(lambda: "up" not in states(remote))
        back = next(link for link in links if not stats_of(stream).workers[0].endswith(f":{link.port}"))
        back.up()
        assert tokens_of([*runs, *stream]) == wanted
        assert stats_of(stream).n_moves == 1 and stats_of(stream).n_reconnects == 1
        assert stats_of(stream).lost_seconds > 0


def test_a_long_text_is_worth_a_second_try(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    target_model: Model,
    endless: sllm.SamplingParams,
) -> None:
    """Its worker has it in memory, and may have lost nothing but a connection."""
    prompt = make_prompt(target_model, 400, 1)
    with ExitStack() as stack:
        workers = [make_worker() for _ in range(2)]
        links = [stack.enter_context(Link((w.address.host, w.address.port))) for w in workers]
        remote = connected([through(link, w.uri) for link, w in zip(links, workers, strict=True)])
        stream = sllm.generate(remote.target(), prompt, sampling=endless, max_tokens=40)
        runs = [next(stream)]
        for member in remote.fleet._members.all:
            member.standing.token_seconds = 1.0  # as a slow machine would have told
        for link in links:
            link.cut()
        assert tokens_of([*runs, *stream]) == one_by_one(target_model, prompt, endless, 40)
        assert stats_of(stream).n_moves == 0 and stats_of(stream).n_reconnects == 1


# ---- a second worker for the first token ------------------------------------------------------------------


class Lanes:
    """Two fake workers of which the one that is asked first is to behave in one way, the other in another."""

    def __init__(self, model: Model, first: Any, second: Any, stack: ExitStack) -> None:
        self.over = threading.Event()
        self._ways = [first, second]
        self._lock = threading.Lock()
        self.fakes = [stack.enter_context(FakeWorker(model, generate=self._tell)) for _ in range(2)]
        stack.callback(self.over.set)

    def _tell(self, opening: pb.Open) -> Iterator[pb.Down]:
        with self._lock:
            way = self._ways.pop(0)
        yield from way(self, opening)

    def silent(self, _opening: pb.Open) -> Iterator[pb.Down]:
        yield opened()  # which is no token yet
        self.over.wait(PATIENCE)
        yield done("cancelled")

    def late(self, opening: pb.Open) -> Iterator[pb.Down]:
        """Answers once the other one was asked."""
        while self._ways:
            time.sleep(0.005)
        yield from self.quick(opening)

    def quick(self, opening: pb.Open) -> Iterator[pb.Down]:
        yield opened()
        yield commit(len(opening.tokens), [70])
        yield commit(len(opening.tokens) + 1, [71, 72])

    def _broken(self) -> Iterator[pb.Down]:
        raise RuntimeError("a bug")

    def failing(self, _opening: pb.Open) -> Iterator[pb.Down]:
        yield from self._broken()

    def failing_late(self, _opening: pb.Open) -> Iterator[pb.Down]:
        while self._ways:
            time.sleep(0.005)
        yield from self._broken()


@pytest.fixture
def lanes(target_model: Model) -> Iterator[Callable[..., Lanes]]:
    with ExitStack() as stack:
        yield lambda first, second: Lanes(target_model, first, second, stack)


@pytest.mark.parametrize(
    ("first", "second", "n_won"),
    [
        (Lanes.silent, Lanes.quick, 1),
        (Lanes.late, Lanes.silent, 0),
        (Lanes.failing_late, Lanes.quick, 1),
        (Lanes.late, Lanes.failing, 0),
    ],
    ids=["a silent one", "a late one", "one that fails", "the second fails"],
)
def test_a_second_worker_is_asked(
    lanes: Callable[..., Lanes], connected: Callable[..., Remote], first: Any, second: Any, n_won: int
) -> None:
    found = lanes(first, second)
    remote = connected(found.fakes)
    stream = sllm.generate(remote.target(hedge=0.05), PROMPT, max_tokens=3)
    assert tokens_of(stream) == [70, 71, 72]
    stats = stats_of(stream)
    assert (stats.n_hedged, stats.n_hedges_won) == (1, n_won)
    assert stats.hedge_tokens == len(PROMPT)
    assert len(stats.workers) == 1 and stats.n_moves == 0
    assert [len(fake.opens) for fake in found.fakes] == [1, 1]
    assert found.fakes[0].opens[0].tokens == found.fakes[1].opens[0].tokens
    found.over.set()
    wait_until(lambda: all(fake.n_calls == 0 for fake in found.fakes))


def test_the_slower_call_is_cancelled(lanes: Callable[..., Lanes], connected: Callable[..., Remote]) -> None:
    """While it is still waiting for its answer."""
    found = lanes(Lanes.silent, Lanes.quick)
    remote = connected(found.fakes, hedge=0.05)
    assert tokens_of(sllm.generate(remote.target(), PROMPT, max_tokens=3)) == [70, 71, 72]
    wait_until(lambda: all(fake.n_calls == 0 for fake in found.fakes))
    assert not found.over.is_set()


def test_nobody_is_asked_twice_without_need(
    lanes: Callable[..., Lanes], connected: Callable[..., Remote]
) -> None:
    found = lanes(Lanes.quick, Lanes.quick)
    remote = connected(found.fakes)
    for hedge in (PATIENCE, False):
        stream = sllm.generate(remote.target(hedge=hedge), PROMPT, max_tokens=3)
        assert tokens_of(stream) == [70, 71, 72]
        assert stats_of(stream).n_hedged == stats_of(stream).hedge_tokens == 0


@pytest.mark.parametrize("how", ["cancel", "close", "hang up"])
def test_a_race_that_nobody_wants_any_more(
    lanes: Callable[..., Lanes], connected: Callable[..., Remote], how: str
) -> None:
    found = lanes(Lanes.silent, Lanes.silent)
    remote = connected(found.fakes)
    generation = remote.target(hedge=0.01).open(np.array(PROMPT, dtype=np.int32), GREEDY, 3)
    wait_until(lambda: sum(fake.n_calls for fake in found.fakes) == 2)
    if how == "cancel":
        generation.cancel()
        with pytest.raises(sllm.CancelledError):
            next(generation)
    elif how == "close":
        generation.close()
    else:
        remote.close()
    wait_until(lambda: n_threads("sllm-hedge") == n_threads("sllm-remote") == 0)
    wait_until(lambda: sum(fake.n_calls for fake in found.fakes) == 0)
    generation.close()


def test_a_hint_reaches_the_one_that_won(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    """Without run-ahead a text goes on for hints alone, and those before the answer count."""
    workers = [make_worker() for _ in range(2)]
    remote = connected(workers)
    for _ in range(4):
        generation = remote.target(run_ahead=False, hedge=0.001).open(
            np.array(PROMPT, dtype=np.int32), endless, 12
        )
        generation.hint(len(PROMPT), wanted[:6])
        tokens: list[int] = []
        while len(tokens) < 12:
            tokens += next(generation).tokens
            generation.hint(len(PROMPT) + len(tokens), wanted[len(tokens) : len(tokens) + 6])
        assert tokens == wanted[:12]
        generation.close()


@pytest.mark.parametrize(
    ("hedge", "kind"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("yes", TypeError)]
)
def test_a_bad_hedge(target_model: Model, hedge: Any, kind: type[Exception]) -> None:
    with FakeWorker(target_model) as fake, sllm.connect(fake.uri) as remote:
        with pytest.raises(kind, match="hedge is"):
            remote.target(hedge=hedge)
        with pytest.raises(kind, match="hedge is"):
            sllm.connect(fake.uri, hedge=hedge)


# ---- lists -------------------------------------------------------------------------------------------------


def test_a_bad_address_in_a_list() -> None:
    good = "sllm://secret@h#insecure"
    with pytest.raises(ValueError, match="needs the address of a worker"):
        sllm.connect([])
    with pytest.raises(ValueError, match=r"number 2 of 3: .* does not begin with sllm://") as caught:
        sllm.connect(["sllm://127.0.0.1:1#insecure", "secret@h", "sllm://127.0.0.1:1#insecure"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="number 1 of 2: #insecure is for loopback") as caught:
        sllm.connect([good, good])
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="number 2 of 2: the address of a worker is int"):
        sllm.connect(["sllm://127.0.0.1:1#insecure", 5])  # type: ignore[list-item]


def refused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def test_nobody_answers() -> None:
    ports = [refused_port() for _ in range(3)]
    with pytest.raises(sllm.RemoteError, match="none of the 3 workers can be used") as caught:
        sllm.connect([f"sllm://127.0.0.1:{port}#insecure" for port in ports])
    assert all(f"127.0.0.1:{port}" in str(caught.value) for port in ports)


def test_wrong_tokens(make_worker: Callable[..., Worker], connected: Callable[..., Remote]) -> None:
    workers = [make_worker() for _ in range(2)]
    wrong = [replace(worker.address, token="another-token-of-some-length").uri for worker in workers]
    with pytest.raises(sllm.AuthError, match="none of the 2 workers can be used") as caught:
        sllm.connect(wrong)
    assert "another-token" not in str(caught.value)
    # One is left out, and why is said.
    remote = connected([workers[0].uri, wrong[1]])
    assert states(remote) == ["up", "lost"]
    assert "token" in remote.workers[1].reason
    assert "another-token" not in repr(remote.workers) and TOKEN not in repr(remote.workers)


def test_one_that_is_not_there_yet(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = make_worker(), make_worker()
    with Link((second.address.host, second.address.port)) as link:
        link.down()
        with caplog.at_level(logging.WARNING, "sllm.remote"):
            remote = connected([first.uri, through(link, second.uri)])
            assert states(remote) == ["up", "lost"]
            wait_until(lambda: caplog.records)
        assert f"127.0.0.1:{link.port} is left out" in caplog.text
        unknown = remote.workers[1]
        assert unknown.info is None and unknown.round_trip is None
        link.up()
        wait_until(lambda: states(remote) == ["up", "up"])
        known = remote.workers[1]
        assert known.info is not None and known.reason == ""
        assert len([one for one in caplog.records if "left out" in one.message]) == 1, "said once"


def test_a_silent_address_holds_nobody_up(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], endless: sllm.SamplingParams
) -> None:
    worker = make_worker()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        silent_uri = replace(worker.address, port=silent.getsockname()[1]).uri
        began = time.monotonic()
        remote = connected([silent_uri, worker.uri], timeout=2 * PATIENCE)
        assert time.monotonic() - began < PATIENCE
        assert states(remote) == ["lost", "up"]
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=5)
        assert len(tokens_of(stream)) == 5


def other_model(target_model: Model, tmp_path: Path) -> sllm.Model:
    data = bytearray(Path(embedded.TARGET).read_bytes())
    data[-1000] ^= 1
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    return sllm.Model(path)


def test_another_model_in_a_list(
    make_worker: Callable[..., Worker], target_model: Model, tmp_path: Path
) -> None:
    with other_model(target_model, tmp_path) as other:
        workers = [make_worker(), make_worker(other), make_worker()]
        with pytest.raises(OtherModelError, match="another model") as caught:
            sllm.connect([worker.uri for worker in workers])
        assert isinstance(caught.value, sllm.RemoteError)
        for word in (workers[1].address.endpoint, "other.gguf", "target.gguf", "take one of them out"):
            assert word in str(caught.value)
        workers[1].close()


def test_a_worker_that_comes_back_with_another_model(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    target_model: Model,
    tmp_path: Path,
    endless: sllm.SamplingParams,
    wanted: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is left out, and texts go on elsewhere."""
    first, second = make_worker(), make_worker()
    with other_model(target_model, tmp_path) as other, Link((first.address.host, first.address.port)) as link:
        third = make_worker(other)
        remote = connected([through(link, first.uri), second.uri])
        link.retarget((third.address.host, third.address.port))
        while "other" not in states(remote):
            link.cut()
            stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=20)
            assert tokens_of(stream) == wanted[:20]
        assert states(remote) == ["other", "up"]
        assert "now has another model" in remote.workers[0].reason
        assert f"127.0.0.1:{link.port} is left out" in caplog.text
        assert third.stats.tokens == 0
        second.close()
        with pytest.raises(sllm.RemoteError):
            remote.target(on_loss="raise").open(np.array(PROMPT, dtype=np.int32), endless, 5).__next__()
        third.close()


def test_the_same_worker_twice(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], endless: sllm.SamplingParams
) -> None:
    """By another name: it is one worker, and has its places once."""
    worker = make_worker()
    with Link((worker.address.host, worker.address.port)) as link:
        remote = connected([worker.uri, worker.uri, through(link, worker.uri)])
        assert sorted(states(remote)) == ["same", "up"], "an address that is there twice counts once"
        stream = sllm.generate(remote.target(hedge=0.001), PROMPT, sampling=endless, max_tokens=5)
        assert len(tokens_of(stream)) == 5
        assert stats_of(stream).n_hedged == 0, "there is nobody else to ask"
        assert worker.stats.sessions_total == 1


# ---- names -------------------------------------------------------------------------------------------------


class Names:
    """What DNS says of ``workers.test``; every other name is as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[str] = []
        real = socket.getaddrinfo

        def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host != "workers.test":
                return real(host, port, *args, **options)
            if not self.hosts:
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return [found for one in self.hosts for found in real(one, port, *args, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def test_a_name_of_several_workers(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    names: Names,
    endless: sllm.SamplingParams,
    wanted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_NAME_SECONDS", 0.0)
    first = make_worker(host="127.0.0.2")
    port = first.address.port
    second = make_worker(host="127.0.0.3", port=port)
    names.hosts = ["127.0.0.2", "127.0.0.3"]
    uri = replace(first.address, host="workers.test").uri
    remote = connected([uri])
    assert [one.endpoint for one in remote.workers] == [f"127.0.0.2:{port}", f"127.0.0.3:{port}"]
    assert states(remote) == ["up", "up"]
    stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
    runs = [next(stream)]
    third = make_worker(host="127.0.0.4", port=port)
    # One goes and another one comes, as pods do.
    gone = by_endpoint([first, second], stats_of(stream).workers[0])
    stays = second if gone is first else first
    names.hosts = [stays.address.host, third.address.host]
    gone.close()
    assert tokens_of([*runs, *stream]) == wanted

    def known() -> list[tuple[str, str]]:
        assert len(tokens_of(sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=2))) == 2
        return sorted((one.endpoint, one.state) for one in remote.workers)

    expected = sorted((one.address.endpoint, "up") for one in (stays, third))
    wait_until(lambda: known() == expected)
    # DNS that is out of order takes nobody away.
    names.hosts = []
    for _ in range(3):
        assert known() == expected


@pytest.mark.parametrize(
    ("hosts", "found"),
    [
        (
            ["::1", "127.0.0.1"],
            ["workers.test"],
        ),  # one worker, and gRPC finds out which address is the better
        (["127.0.0.1"], ["workers.test"]),
        ([], ["workers.test"]),
        (["127.0.0.1", "127.0.0.1"], ["workers.test"]),
        (["127.0.0.2", "127.0.0.1"], ["127.0.0.2", "127.0.0.1"]),
        (["::2", "::1", "127.0.0.2", "127.0.0.1"], ["::2", "::1"]),
        (["::1", "127.0.0.2", "127.0.0.1"], ["127.0.0.2", "127.0.0.1"]),
    ],
)
def test_what_a_name_stands_for(names: Names, hosts: list[str], found: list[str]) -> None:
    names.hosts = hosts
    address = auth.Address("workers.test", 7, "token", "0" * 64)
    stands_for = places(address)
    assert [place.address for place in stands_for] == [replace(address, host=host) for host in found]
    assert {place.name for place in stands_for} == ({None} if len(found) == 1 else {"workers.test"})
    assert places_of_name(replace(address, host="127.0.0.1")) == []


def test_a_certificate_of_a_name(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    names: Names,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a fingerprint it has to be valid for the name, not for the numbers that stand for it."""
    chain, key = authority(tmp_path, x509.DNSName("workers.test"))
    files = [tmp_path / name for name in ("chain.pem", "key.pem")]
    for path, data in zip(files, (chain, key), strict=True):
        path.touch(0o600)
        path.write_bytes(data)
    real = grpc.ssl_channel_credentials
    monkeypatch.setattr(grpc, "ssl_channel_credentials", lambda *_: real(chain))
    first = make_worker(host="127.0.0.2", certificate=files)
    make_worker(host="127.0.0.3", port=first.address.port, certificate=files)
    names.hosts = ["127.0.0.2", "127.0.0.3"]
    remote = connected([replace(first.address, host="workers.test", fingerprint=None).uri])
    assert states(remote) == ["up", "up"]
    with pytest.raises(sllm.RemoteError, match=r"127\.0\.0\.2"):
        sllm.connect(replace(first.address, fingerprint=None).uri, timeout=5)


def test_a_name_that_nobody_knows(names: Names) -> None:
    uri = f"sllm://{TOKEN}@workers.test:5#sha256={'0' * 64}"
    with pytest.raises(sllm.RemoteError, match=r"workers\.test:5"):
        sllm.connect(uri, timeout=5)


def test_models_behind_a_name(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Remote],
    names: Names,
    target_model: Model,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody has put these into a list: the model that most have is the one."""
    with other_model(target_model, tmp_path) as other:
        first = make_worker(other, host="127.0.0.2")
        port = first.address.port
        for i in (3, 4):
            make_worker(host=f"127.0.0.{i}", port=port)
        names.hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        remote = connected([replace(first.address, host="workers.test").uri])
        assert states(remote) == ["other", "up", "up"]
        assert "127.0.0.2" in caplog.text and "left out" in caplog.text
        assert remote.info.model_id == target_model.id
        remote.close()
        first.close()


# ---- layers ------------------------------------------------------------------------------------------------


def test_the_middle_of_a_split(
    state: Path, connected: Callable[..., Remote], target_model: Model, endless: sllm.SamplingParams
) -> None:
    """Of two workers with the same layers one is lost in the middle of a text, and the other one later."""
    wanted = one_by_one(target_model, PROMPT, endless, 40)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(embedded.TARGET, layers=True, state=state, token=TOKEN, n_ctx=N_CTX, **EXACT)
            )
            for _ in range(2)
        ]
        links = [stack.enter_context(Link((w.address.host, w.address.port))) for w in workers]
        remote = connected([through(link, w.uri) for link, w in zip(links, workers, strict=True)])
        assert states(remote) == ["up", "up"]
        with sllm.SplitTarget(
            embedded.TARGET, head=2, tail=1, middle=remote, codec="f32", n_seq_max=2, **EXACT
        ) as split:
            level(remote)
            others = [sllm.generate(split, PROMPT, sampling=endless, max_tokens=40) for _ in range(2)]
            runs = [[next(stream)] for stream in others]
            assert {stats_of(stream).workers for stream in others} == {
                (one.endpoint,) for one in remote.workers
            }, "one each"
            links[0].down()
            links[0].cut()
            for first, stream in zip(runs, others, strict=True):
                assert tokens_of([*first, *stream]) == wanted
            assert sorted(stats_of(stream).n_moves for stream in others) == [0, 1]
            links[0].up()
            wait_until(lambda: states(remote) == ["up", "up"])
            links[1].down()
            links[1].cut()
            assert tokens_of(sllm.generate(split, PROMPT, sampling=endless, max_tokens=40)) == wanted


def test_layers_and_texts_are_not_the_same(make_worker: Callable[..., Worker], state: Path) -> None:
    texts = make_worker()
    with Worker(embedded.TARGET, layers=(2, 7), state=state, token=TOKEN, n_ctx=N_CTX, **EXACT) as layers:
        with pytest.raises(OtherModelError, match="layers in place of texts"):
            sllm.connect([texts.uri, layers.uri])
        with (
            Worker(embedded.TARGET, layers=(3, 7), state=state, token=TOKEN, n_ctx=N_CTX, **EXACT) as others,
            pytest.raises(OtherModelError, match=r"other layers \(\[3, 7\)\)"),
        ):
            sllm.connect([layers.uri, others.uri])


# ---- what a worker says ------------------------------------------------------------------------------------


def test_places_and_draining(
    make_worker: Callable[..., Worker], connected: Callable[..., Remote], endless: sllm.SamplingParams
) -> None:
    worker = make_worker(limits=Limits(sessions=3), pass_seconds=0.02)
    remote = connected([worker])
    assert (remote.status().free, remote.status().draining) == (3, False)
    streams = [sllm.generate(remote.target(), PROMPT, sampling=endless) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert remote.status().free == 1
    worker.drain(0, notice=PATIENCE)
    assert (remote.status().free, remote.status().draining) == (0, True)
    for stream in streams:
        next(stream)
        stream.close()


def test_a_worker_says_how_much_time_there_is(
    make_worker: Callable[..., Worker], target_model: Model
) -> None:
    """Once, and again where it becomes less."""
    worker = make_worker(insecure=True, token=None, state=None, pass_seconds=0.01)
    sampling = to_sampling(without_end(target_model, PLAIN))
    up = [pb.Up(open=pb.Open(tokens=PROMPT, run_ahead=True, sampling=sampling))]
    over = threading.Event()

    def outgoing() -> Iterator[pb.Up]:
        yield from up
        over.wait(PATIENCE)

    with grpc.insecure_channel(worker.address.endpoint) as channel, ThreadPoolExecutor(1) as executor:
        stub = channel.stream_stream("/sllm.v1.Worker/Generate", pb.Up.SerializeToString, pb.Down.FromString)
        call = stub(outgoing())
        for message in call:
            if message.WhichOneof("kind") == "commit":
                break
        told: list[int] = []

        def listen() -> None:
            for message in call:
                if message.WhichOneof("kind") == "draining":
                    told.append(message.draining.milliseconds)
                if message.WhichOneof("kind") == "done":
                    return

        listening = executor.submit(listen)
        for notice in (30.0, 30.0, 29.9, 5.0, 10.0):
            worker.drain(0, notice=notice)
        wait_until(lambda: len(told) >= 2)
        worker.close()
        listening.result(PATIENCE)
        over.set()
    assert len(told) == 2 and 29_000 < told[0] <= 30_000 and 4_000 < told[1] <= 5_000


def test_the_end_is_quick(make_worker: Callable[..., Worker]) -> None:
    """Also while a worker is looked for that is not there, and nothing is left of it."""
    worker = make_worker()
    gone = replace(worker.address, port=refused_port()).uri
    remote = sllm.connect([worker.uri, gone])
    wait_until(lambda: n_threads("sllm-fleet") == 1)
    remote.close()
    assert n_threads("sllm-fleet") == 0
    assert remote.closed
    remote.close()
    with pytest.raises(sllm.ClosedError):
        remote.target()
    with pytest.raises(sllm.ClosedError):
        remote.score([1, 2, 3], 1)  # type: ignore[arg-type]
    assert auth.Address.parse(gone).endpoint in repr(remote.workers)

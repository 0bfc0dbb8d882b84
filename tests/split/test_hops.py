"""A chain of workers that pass the rows on to each other: the same text as ever, whatever happens to them and
between them; and where they cannot reach each other, the client carries the rows and says so.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, examples, make_prompt, one_by_one, without_end
from remote_worker import WorkerProcess, n_threads, wait_until
from worker_links import HERE, cutting, two_workers

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.split import chain
from sllm.wire import auth
from sllm.worker import hops as outgoing
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.model import Model

N_CTX = 512
SAMPLED = sllm.SamplingParams(temperature=0.9, top_k=40, seed=11, penalty_repeat=1.1, penalty_last_n=32)
CUTS = {2: [(2, 4), (4, 7)], 3: [(2, 3), (3, 5), (5, 7)]}


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Makes workers of the embedded target's layers, with TLS, that may connect to others on this machine."""
    before = n_threads("sllm-layers")
    with ExitStack() as stack:

        def make(layers: bool | tuple[int, int] = True, **limits: Any) -> Worker:
            options = {"limits": Limits(**{"hops": HERE, **limits}), "n_ctx": N_CTX, **EXACT}
            return stack.enter_context(
                Worker(embedded.TARGET, layers=layers, state=tmp_path / "state", **options)
            )

        yield make
    assert n_threads("sllm-hop") == 0
    assert n_threads("sllm-layers") == before


@pytest.fixture
def connected() -> Iterator[Callable[..., Any]]:
    """Connections, closed at the end."""
    with ExitStack() as stack:
        yield lambda uri, **options: stack.enter_context(sllm.connect(uri, **options))


@pytest.fixture
def make_split() -> Iterator[Callable[..., sllm.SplitTarget]]:
    with ExitStack() as stack:

        def make(middle: Any, **options: Any) -> sllm.SplitTarget:
            options = {"head": 2, "tail": 1, "codec": "f32", "n_ctx": N_CTX, **EXACT, **options}
            return stack.enter_context(sllm.SplitTarget(embedded.TARGET, middle=middle, **options))

        yield make
    assert n_threads("sllm-hop-reader") == 0


def nobody(worker: Worker) -> bool:
    """Whether no sequence of a worker is open."""
    return not worker._scheduler.running()


def text_of(
    target: sllm.Target, prompt: Any, n: int, sampling: sllm.SamplingParams, draft: Any = None
) -> tuple[list[int], Any]:
    stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=n)
    found = [token for run in stream for token in run.tokens]
    return found, stream.stats.remote


# ---- the same text


@pytest.mark.parametrize("n_workers", [2, 3])
@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_the_text_is_that_of_the_whole_model(
    target_model: Model,
    draft_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    n_workers: int,
    tail: int | None,
) -> None:
    cuts = list(CUTS[n_workers])
    if tail is None:
        cuts[-1] = (cuts[-1][0], 8)
    workers = [make_worker(cut) for cut in cuts]
    remotes = [connected(worker.uri) for worker in workers]
    split = make_split(remotes, tail=tail)
    for n_prompt, sampling in ((300, GREEDY), (20, SAMPLED)):
        prompt = make_prompt(target_model, n_prompt, n_prompt)
        expected = one_by_one(target_model, prompt, sampling, 30, N_CTX)
        rows = [worker.stats.rows for worker in workers]
        for draft in (None, draft_model, "ngram"):
            found, stats = text_of(split, prompt, 30, sampling, draft)
            assert found == expected
            assert (stats.n_hops, stats.relayed, stats.n_reconnects) == (n_workers - 1, (), 0)
        computed = {worker.stats.rows - before for worker, before in zip(workers, rows, strict=True)}
        assert len(computed) == 1
    assert [worker.stats.refused for worker in workers] == [0] * n_workers


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_codecs_cross_hops_as_well(
    draft_model: Model,
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    encoding: str,
) -> None:
    remotes = [connected(make_worker(cut).uri) for cut in CUTS[2]]
    prompt = make_prompt(target_model, 40, 3)
    split = make_split(remotes, codec=encoding)
    found, stats = text_of(split, prompt, 30, GREEDY)
    assert text_of(split, prompt, 30, GREEDY, draft_model)[0] == found
    relayed, by_client = text_of(make_split(remotes, codec=encoding, hops=False), prompt, 30, GREEDY)
    if encoding == "f16":  # what was rounded once is not rounded again
        assert relayed == found
    assert (stats.n_hops, by_client.n_hops) == (1, 0)
    assert "hops=False" in by_client.relayed[0]
    assert stats.bytes_up + stats.bytes_down < 0.75 * (by_client.bytes_up + by_client.bytes_down)


def test_several_texts_at_once_and_one_after_the_other(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    workers = [make_worker(cut) for cut in CUTS[2]]
    split = make_split([connected(worker.uri) for worker in workers], n_seq_max=3)
    prompts = [make_prompt(target_model, 20 + 30 * i, i) for i in range(3)]
    expected = [one_by_one(target_model, prompt, GREEDY, 20, N_CTX) for prompt in prompts]
    for _ in range(2):
        found: dict[int, list[int]] = {}

        def write(i: int) -> None:
            found[i] = text_of(split, prompts[i], 20, GREEDY)[0]  # noqa: B023

        threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(3)] == expected
    accepted = workers[1]._scheduler  # the texts share one connection between the workers
    assert accepted.stats.refused == 0


def test_what_is_shared_with_the_text_before_is_not_sent_again(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    workers = [make_worker(cut) for cut in CUTS[2]]
    split = make_split([connected(worker.uri) for worker in workers])
    prompt = make_prompt(target_model, 150, 5)
    text_of(split, prompt, 5, GREEDY)
    rows = [worker.stats.rows for worker in workers]
    longer = [*prompt.tolist(), 20, 21]
    found, stats = text_of(split, longer, 5, GREEDY)
    assert found == one_by_one(target_model, longer, GREEDY, 5, N_CTX)
    assert stats.n_reused >= 150
    assert all(worker.stats.rows - before <= 10 for worker, before in zip(workers, rows, strict=True))


# ---- where there is no way


def relayed(
    split: sllm.SplitTarget, target_model: Model, reason: str, *, n_prompt: int = 40, n: int = 12
) -> Any:
    """A text over a chain whose workers do not reach each other."""
    prompt = make_prompt(target_model, n_prompt, 7)
    found, stats = text_of(split, prompt, n, SAMPLED)
    assert found == one_by_one(target_model, prompt, SAMPLED, n, N_CTX)
    assert stats.n_hops == 0
    assert len(stats.relayed) == 1
    assert reason in stats.relayed[0]
    return stats


@pytest.mark.parametrize("hops", [(), ("10.0.0.0/8", "*"), ("127.0.0.1:1",)], ids=str)
def test_a_worker_connects_only_where_it_may(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    hops: tuple[str, ...],
) -> None:
    first, second = (make_worker(cut, hops=hops) for cut in CUTS[2])
    with Link(("127.0.0.1", second.address.port)) as link:
        split = make_split([connected(first.uri), connected(second.uri)], hops=[f"127.0.0.1:{link.port}"])
        reason = "cannot reach the next worker" if hops else "connects to no other worker"
        relayed(split, target_model, reason)
        assert link.stats.connections == 0


def test_a_worker_that_cannot_be_reached_from_the_other(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(chain, "_FIRST_PAUSE", 3600.0)
    first, second = (make_worker(cut) for cut in CUTS[2])
    with Link(("127.0.0.1", 1)) as link:  # where nobody listens
        split = make_split([connected(first.uri), connected(second.uri)], hops=[f"127.0.0.1:{link.port}"])
        with caplog.at_level(logging.WARNING, "sllm.remote"):
            relayed(split, target_model, "cannot reach the next worker")
        assert "go through here" in caplog.text
        link.retarget(("127.0.0.1", second.address.port))
        relayed(split, target_model, "cannot reach the next worker")
        found_again(split)
        # Another text, that shares nothing.
        prompt = make_prompt(target_model, 20, 8)
        found, stats = text_of(split, prompt, 12, GREEDY)
        assert found == one_by_one(target_model, prompt, GREEDY, 12, N_CTX)
        assert (stats.n_hops, stats.relayed) == (1, ())


def found_again(split: sllm.SplitTarget) -> None:
    """Let the time come at which what has failed between workers is tried again."""
    for slot in split._slots:
        failed = slot.relays._failed
        assert failed
        for pair, (reason, _) in failed.items():
            failed[pair] = reason, 0.0


@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_hop_is_tried_again_with_nothing_computed_twice(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    monkeypatch: pytest.MonkeyPatch,
    tail: int | None,
) -> None:
    """In the middle of a text, and with one that goes on from it; also where it fails again."""
    monkeypatch.setattr(chain, "_FIRST_PAUSE", 3600.0)
    cuts = [CUTS[2][0], (4, 7 if tail else 8)]
    first, second = workers = [make_worker(cut) for cut in cuts]
    nowhere, there = ("127.0.0.1", 1), ("127.0.0.1", second.address.port)
    prompt = make_prompt(target_model, 150, 3)
    sampling = without_end(target_model, SAMPLED)
    with Link(nowhere) as link:
        split = make_split(
            [connected(first.uri), connected(second.uri)], hops=[f"127.0.0.1:{link.port}"], tail=tail
        )
        generation = split.open(prompt, sampling, 40)
        found: list[int] = []

        def read(n: int) -> None:
            while len(found) < n:
                found.extend(next(generation).tokens)

        read(5)
        rows = [worker.stats.rows for worker in workers]
        found_again(split)
        read(15)  # it fails once more
        assert generation.remote.n_hops == 0
        link.retarget(there)
        found_again(split)
        read(25)
        assert (generation.remote.n_hops, generation.remote.relayed) == (1, ())
        link.retarget(nowhere)
        link.cut()
        read(40)
        generation.close()
        assert generation.remote.n_hops == 0  # lost for good, which costs the text once
        assert found == one_by_one(target_model, prompt, sampling, 40, N_CTX)
        link.retarget(there)
        found_again(split)
        longer = np.array([*prompt.tolist(), *found], dtype=np.int32)
        again, stats = text_of(split, longer, 20, sampling)
        assert again == one_by_one(target_model, longer, sampling, 20, N_CTX)
        assert (stats.n_hops, stats.relayed) == (1, ())
        assert stats.n_reused >= len(longer) - 2
    for worker, before in zip(workers, rows, strict=True):
        assert worker.stats.rows - before <= len(longer) + 60 + 10


def part_of(host: str) -> Any:
    """A worker of a chain that takes rows from the one before and brings them to the next."""
    address = SimpleNamespace(host=host, fingerprint="00" * 32, endpoint=f"{host}:1")
    info = SimpleNamespace(features=("hop-out", "hop-in", "early-rows"))
    link = SimpleNamespace(endpoint=address.endpoint, address=address, info=info)
    return SimpleNamespace(link=link, hop_address=None, seen_at=(host, 1))


def test_the_time_between_attempts_grows_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(chain, "time", SimpleNamespace(monotonic=lambda: now[0]))
    relays = chain.Relays([part_of("10.0.0.1"), part_of("10.0.0.2")], allowed=True)
    pauses = []
    for _ in range(6):
        relays.fail(relays.parts[0], "no way")
        began = now[0]
        while not relays.forgive():
            assert relays.reasons() == {0: "no way"}
            now[0] += 1.0
        assert relays.reasons() == {}
        pauses.append(now[0] - began)
    assert pauses == [6, 21, 81, 301, 301, 301]
    relays.got_through()
    relays.fail(relays.parts[0], "no way")
    now[0] += 6
    assert relays.forgive()


def test_the_way_between_the_workers_is_lost_in_the_middle_of_a_text(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    first, second = (make_worker(cut) for cut in CUTS[2])
    prompt = make_prompt(target_model, 150, 0)
    with Link(("127.0.0.1", second.address.port)) as link:
        split = make_split([connected(first.uri), connected(second.uri)], hops=[f"127.0.0.1:{link.port}"])
        generation = split.open(prompt, SAMPLED, 24)
        found = [*next(generation).tokens, *next(generation).tokens]
        assert generation.remote.n_hops == 1
        link.cut()  # once: they find each other again
        found += [*next(generation).tokens, *next(generation).tokens]
        assert generation.remote.n_hops == 1
        link.retarget(("127.0.0.1", 1))
        link.cut()  # for good
        for commit in generation:
            found += commit.tokens
        generation.close()
        assert found == one_by_one(target_model, prompt, SAMPLED, 24, N_CTX)
        assert generation.remote.n_hops == 0
        assert len(generation.remote.relayed) == 1


def test_a_connection_between_workers_that_is_dead_without_a_sign(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As what translates addresses leaves one behind that was quiet: the next text makes another."""
    first, second = (make_worker(cut) for cut in CUTS[2])
    there = ("127.0.0.1", second.address.port)
    prompts = [make_prompt(target_model, 40, i) for i in range(3)]
    with Link(there) as old, Link(("127.0.0.1", old.port)) as link:
        split = make_split([connected(first.uri), connected(second.uri)], hops=[f"127.0.0.1:{link.port}"])
        for i, prompt in enumerate(prompts):
            if i == 1:
                old.stall()
                link.retarget(there)
            monkeypatch.setattr(outgoing, "_KEPT_SECONDS", 0.2 if i == 1 else 60.0)
            found, stats = text_of(split, prompt, 12, GREEDY)
            assert found == one_by_one(target_model, prompt, GREEDY, 12, N_CTX)
            assert (stats.n_hops, stats.relayed) == (1, ())
        assert old.stats.connections == 2  # of which one fetched the certificate
        assert link.stats.connections == 3
        old.resume()


@pytest.mark.parametrize("hops", [["127.0.0.1:1", None], [7], "127.0.0.1:1", ["a b/c"]], ids=str)
def test_hops_that_are_none(
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    hops: Any,
) -> None:
    remotes = [connected(make_worker(cut).uri) for cut in CUTS[2]]
    with pytest.raises((ValueError, TypeError)):
        make_split(remotes, hops=hops)


def test_another_certificate_than_the_client_knows(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    tmp_path: Path,
) -> None:
    """Whoever answers there gets no rows, and no capability."""
    first, second = (make_worker(cut) for cut in CUTS[2])
    with Worker(embedded.TARGET, layers=(4, 7), state=tmp_path / "other", n_ctx=N_CTX, **EXACT) as impostor:
        there = f"127.0.0.1:{impostor.address.port}"
        split = make_split([connected(first.uri), connected(second.uri)], hops=[there])
        relayed(split, target_model, "cannot reach the next worker")
        assert impostor._monitor.calls.totals().calls == {}


# ---- losses


@pytest.mark.parametrize("tail", [1, None], ids=str)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_any_worker_is_killed_and_another_has_its_layers(
    target_model: Model,
    draft_model: Model,
    tmp_path: Path,
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    lost: int,
    tail: int | None,
) -> None:
    prompt = make_prompt(target_model, 150, 0)
    n = 200  # many more than are on their way when the worker is lost
    sampling = without_end(target_model, SAMPLED)
    expected = one_by_one(target_model, prompt, sampling, n, N_CTX)
    options: dict[str, Any] = {"layers": True, "n_ctx": N_CTX, "limits": {"hops": HERE}}
    with ExitStack() as stack:
        processes = [stack.enter_context(WorkerProcess(tmp_path, **options)) for _ in range(4)]
        spare = processes.pop()
        two = {auth.Address.parse(one.uri): one for one in (processes[lost], spare)}
        remotes = [
            connected([one.uri, spare.uri] if i == lost else one.uri) for i, one in enumerate(processes)
        ]
        split = make_split(remotes, tail=tail)
        stream = sllm.generate(split, prompt, draft=draft_model, sampling=sampling, max_tokens=n)
        found: list[int] = []
        for run in stream:
            if not found:
                killed = remotes[lost].address
                two[killed].kill()
            found += run.tokens
        assert found == expected
        stats = stream.stats.remote
        assert stats is not None
        assert stats.n_reconnects >= 1
        assert stats.n_moves == 1
        assert {killed, remotes[lost].address} == two.keys()


def test_a_loss_that_is_to_be_raised(
    target_model: Model,
    tmp_path: Path,
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    options: dict[str, Any] = {"layers": True, "limits": {"hops": HERE}}
    for lost in (0, 1):
        with WorkerProcess(tmp_path, **options) as first, WorkerProcess(tmp_path, **options) as second:
            remotes = [connected(one.uri) for one in (first, second)]
            split = make_split(remotes, on_loss="raise")
            generation = split.open(make_prompt(target_model, 10, 7), GREEDY, 20)
            next(generation)
            (first, second)[lost].kill()
            with pytest.raises(sllm.RemoteError, match="was lost"):
                for _ in range(3):
                    next(generation)
            generation.close()
            assert not any(remote.link.streams for remote in remotes)


def test_memory_that_both_workers_have_lost_is_made_good(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    """Each says what it has; neither is taken for one that ends every stream."""
    workers = [make_worker(cut) for cut in CUTS[2]]
    split = make_split([connected(worker.uri) for worker in workers], on_loss="raise")
    prompt = make_prompt(target_model, 50, 4)
    text_of(split, prompt, 3, GREEDY)
    for worker, length in zip(workers, (30, 10), strict=True):
        wait_until(partial(nobody, worker))
        for slot in worker._scheduler._slots:
            slot.length = min(slot.length, length)
    found, stats = text_of(split, prompt, 12, GREEDY)
    assert found == one_by_one(target_model, prompt, GREEDY, 12, N_CTX)
    assert (stats.n_hops, stats.n_reconnects) == (1, 0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], list[Link]]]:
    with two_workers(tmp_path_factory.mktemp("state"), sessions=2, n_ctx=N_CTX) as both:
        yield both


@pytest.mark.parametrize("tail", [1, None], ids=str)
@examples(12)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(2_000, 60_000)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    n_prompt=st.integers(1, 60),
    draft=st.sampled_from([None, "model", "ngram"]),
)
def test_cuts_of_any_link_change_nothing(
    target_model: Model,
    draft_model: Model,
    shared: tuple[list[Any], list[Link]],
    tail: int | None,
    cuts: list[tuple[int, int]],
    seed: int,
    n_prompt: int,
    draft: str | None,
) -> None:
    remotes, links = shared
    sampling = sllm.SamplingParams(temperature=0.8, seed=seed)
    prompt = make_prompt(target_model, n_prompt, seed % 1000)
    expected = one_by_one(target_model, prompt, sampling, 25, N_CTX)
    between = f"127.0.0.1:{links[2].port}"
    options: dict[str, Any] = {"codec": "f32", "n_ctx": N_CTX, "hops": [between], **EXACT}
    with sllm.SplitTarget(embedded.TARGET, head=1, tail=tail, middle=remotes, **options) as split:
        drafter = draft_model if draft == "model" else draft
        stream = sllm.generate(split, prompt, draft=drafter, sampling=sampling, max_tokens=25)
        with cutting([(links[i], n_bytes) for i, n_bytes in cuts]):
            found = [token for run in stream for token in run.tokens]
        assert found == expected


def test_cancel_from_another_thread(
    target_model: Model,
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(
                    embedded.TARGET,
                    layers=cut,
                    state=tmp_path,
                    limits=Limits(hops=HERE),
                    n_ctx=N_CTX,
                    pass_seconds=pause,
                    **EXACT,
                )
            )
            for cut, pause in zip(CUTS[2], (0.0, 5.0), strict=True)
        ]
        split = make_split([connected(worker.uri) for worker in workers])
        generation = split.open(make_prompt(target_model, 10, 7), GREEDY, 10)
        next(generation)
        timer = threading.Timer(0.2, generation.cancel)
        timer.start()
        with pytest.raises(sllm.CancelledError):
            next(generation)
        generation.close()
        timer.join()


def test_closing_one_of_the_connections_ends_a_text(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    workers = [make_worker(cut) for cut in CUTS[2]]
    for closed in (0, 1):
        remotes = [connected(worker.uri) for worker in workers]
        generation = make_split(remotes).open(make_prompt(target_model, 10, 7), GREEDY, 10)
        next(generation)
        remotes[closed].close()
        with pytest.raises(sllm.ClosedError):
            next(generation)
        generation.close()


def test_closing_frees_the_memory_of_all(
    target_model: Model,
    make_worker: Callable[..., Worker],
    connected: Callable[..., Any],
    make_split: Callable[..., sllm.SplitTarget],
) -> None:
    workers = [make_worker(cut) for cut in CUTS[2]]
    split = make_split([connected(worker.uri) for worker in workers])
    generation = split.open(make_prompt(target_model, 10, 7), GREEDY, 20)
    next(generation)
    split.close()
    for worker in workers:
        wait_until(partial(nobody, worker))
        assert [slot.sequence_id for slot in worker._scheduler._slots] == [0] * 4

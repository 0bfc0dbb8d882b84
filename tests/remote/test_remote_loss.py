"""The loss of the link and of the worker, one way at a time: what the reader sees, and what is left."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GREEDY, PLAIN, make_prompt, one_by_one, without_end
from remote_worker import (
    PATIENCE,
    FakeWorker,
    Spares,
    WorkerProcess,
    commit,
    n_threads,
    opened,
    settled,
    through,
    vocabulary_kept,
    wait_until,
)
from worker_links import bytes_to_go_on

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oracles import Tokens

    from sllm.engine.model import Model
    from sllm.generation.text_stream import Run, TextStream
    from sllm.wire.protocol import pb

N_CTX = 512
TOKEN = "a-token-nobody-may-read"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module", autouse=True)
def cache(target_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every client has the vocabulary already."""
    with vocabulary_kept(tmp_path_factory.mktemp("cache"), target_model):
        yield


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
    assert n_threads("sllm-remote") == 0
    assert n_threads("sllm-draft") == 0


@pytest.fixture(scope="module")
def spares(state: Path) -> Iterator[Spares]:
    limits = {"prefill": 1}
    start = lambda: WorkerProcess(state, token=TOKEN, n_ctx=N_CTX, pass_seconds=0.01, limits=limits)  # noqa: E731
    with Spares(start) as spares:
        yield spares


@pytest.fixture(scope="module")
def endless(target_model: Model) -> sllm.SamplingParams:
    """A text that does not end by itself."""
    return replace(without_end(target_model, PLAIN), seed=3)


@pytest.fixture(scope="module")
def wanted(target_model: Model, endless: sllm.SamplingParams) -> list[int]:
    """That text after PROMPT."""
    return one_by_one(target_model, PROMPT, endless, 60)


@pytest.fixture(scope="module")
def drafter(draft_model: Model) -> Iterator[ModelDrafter]:
    with ModelDrafter(draft_model, n_ctx=N_CTX, **EXACT) as drafter:
        yield drafter


def address_of(worker: Worker) -> tuple[str, int]:
    return worker.address.host, worker.address.port


def tokens_in(runs: list[Run]) -> list[int]:
    return [t for run in runs for t in run.tokens]


def break_for_long(link: Link) -> None:
    link.down()
    link.cut()


# ---- the worker dies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["before open", "in the prompt", "in a pass"])
def test_a_worker_killed(
    spares: Spares, target_model: Model, endless: sllm.SamplingParams, stage: str
) -> None:
    prompt = make_prompt(target_model, 400, 1)
    with (
        Link(spares.current.address) as link,
        sllm.connect(through(link, spares.current.uri)) as remote,
        sllm.connect(spares.current.uri) as other,
    ):

        def kill() -> None:
            spares.kill()
            link.retarget(spares.current.address)

        if stage == "before open":
            kill()
        generation = remote.target().open(prompt, endless, 20)
        tokens: list[int] = []
        if stage == "in the prompt":
            wait_until(lambda: other.status().sessions == 1)
            kill()
        elif stage == "in a pass":
            for _ in range(4):
                tokens += next(generation).tokens
            kill()
        for told in generation:
            assert told.pos == len(prompt) + len(tokens)
            tokens += told.tokens
        assert tokens == one_by_one(target_model, prompt, endless, 20)
        assert generation.remote.n_reconnects <= 1
        generation.close()


@pytest.mark.parametrize("on_loss", ["wait", "raise"])
def test_a_worker_that_dies_after_the_last_token(target_model: Model, on_loss: str) -> None:
    """Nothing is missing, so nobody needs to know."""

    def tell(_opening: pb.Open) -> Iterator[pb.Down]:
        return iter([opened(), commit(3, [70, 71]), commit(5, [72])])

    with FakeWorker(target_model, generate=tell) as fake, sllm.connect(fake.uri, on_loss=on_loss) as remote:
        stream = sllm.generate(remote.target(), PROMPT, max_tokens=3)
        wait_until(lambda: n_threads("sllm-remote") == 0)
        assert tokens_in(list(stream)) == [70, 71, 72]
        assert stream.stats.finish_reason == "length"
        assert [opening.max_tokens for opening in fake.opens] == [3]


def test_a_worker_ends_in_order(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """It says so, and the client continues with the one that is started then."""
    first = make_worker()
    with Link(address_of(first)) as link, sllm.connect(through(link, first.uri)) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream) for _ in range(5)]
        first.close()
        second = make_worker()
        link.retarget(address_of(second))
        runs += stream
        assert tokens_in(settled(runs, 3)) == wanted
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reconnects == 1
        assert second.stats.sessions_total == 1


def test_a_worker_told_to_end(spares: Spares, endless: sllm.SamplingParams, wanted: list[int]) -> None:
    with Link(spares.current.address) as link, sllm.connect(through(link, spares.current.uri)) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream) for _ in range(5)]
        spares.current.terminate()
        assert spares.current.process.wait(PATIENCE) == 0
        spares.kill()
        link.retarget(spares.current.address)
        assert tokens_in(settled([*runs, *stream], 3)) == wanted


def test_texts_of_a_worker_that_drains_are_left_to_it(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """A new one on the same connection goes elsewhere and takes nobody along."""
    workers = [make_worker(pass_seconds=0.02) for _ in range(2)]
    with sllm.connect([worker.uri for worker in workers]) as remote, ThreadPoolExecutor(1) as executor:
        old = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(old)]
        first, second = sorted(workers, key=lambda worker: worker.address != remote.address)
        draining = executor.submit(first.drain, PATIENCE)
        wait_until(lambda: first._scheduler._draining)
        new = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=20)
        assert tokens_in(list(new)) == wanted[:20]
        assert remote.address == second.address
        assert tokens_in([*runs, *old]) == wanted
        assert old.stats.remote is not None
        assert old.stats.remote.workers == (first.address.endpoint,)
        assert old.stats.remote.n_reconnects == 0
        assert draining.result(PATIENCE)
        assert second.stats.sessions_total == 1


def test_a_second_address(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    first, second = make_worker(), make_worker()
    with Link(address_of(first)) as link, sllm.connect([through(link, first.uri), second.uri]) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream) for _ in range(3)]
        break_for_long(link)
        runs += stream
        assert tokens_in(settled(runs, 3)) == wanted
        assert remote.address == second.address
        assert stream.stats.remote is not None
        assert stream.stats.remote.workers[-1] == second.address.endpoint
    with Link(address_of(first)) as link:
        link.down()
        with sllm.connect([through(link, first.uri), second.uri]) as remote:
            assert remote.address == second.address


# ---- another one answers -----------------------------------------------------------------------------------


def test_other_weights(
    make_worker: Callable[..., Worker], tmp_path: Path, endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """Never a mixture of two texts."""
    data = bytearray(Path(embedded.TARGET).read_bytes())
    data[-1000] ^= 1
    path = tmp_path / "target.gguf"
    path.write_bytes(data)
    first = make_worker()
    with sllm.Model(path) as other, Link(address_of(first)) as link:
        second = make_worker(other)
        with sllm.connect(through(link, first.uri)) as remote:
            stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
            runs = [next(stream)]
            link.retarget(address_of(second))
            link.cut()
            with pytest.raises(sllm.RemoteError, match="another model"):
                runs.extend(stream)
            told = tokens_in(runs)
            assert told == wanted[: len(told)]
            # Not in a new text either, of which the client knows only that it is behind the same address.
            with pytest.raises(sllm.RemoteError, match="another model"):
                sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60).text()
        assert second.stats.tokens == 0
        second.close()


@pytest.mark.parametrize("what", ["certificate", "token"])
def test_another_certificate_or_token(
    make_worker: Callable[..., Worker], tmp_path: Path, endless: sllm.SamplingParams, what: str
) -> None:
    first = make_worker()
    second = make_worker(state=tmp_path) if what == "certificate" else make_worker(token="another-good-token")
    with Link(address_of(first)) as link, sllm.connect(through(link, first.uri)) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless)
        next(stream)
        link.retarget(address_of(second))
        link.cut()
        with pytest.raises(sllm.AuthError, match="fingerprint" if what == "certificate" else "token"):
            stream.text()
        assert second.stats.sessions_total == 0


def test_no_place_at_the_moment(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """Who has a text on its way waits for one."""
    first = make_worker()
    second = make_worker(limits=Limits(sessions=1, queue=0))
    with (
        Link(address_of(first)) as link,
        sllm.connect(through(link, first.uri)) as remote,
        sllm.connect(second.uri) as other,
    ):
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        guest = sllm.generate(other.target(), [9], sampling=endless)
        next(guest)
        link.retarget(address_of(second))
        link.cut()
        with ThreadPoolExecutor(1) as executor:
            rest = executor.submit(list, stream)
            wait_until(lambda: second.stats.refused >= 2)
            assert not rest.done()
            guest.close()
            runs += rest.result(PATIENCE)
        assert tokens_in(settled(runs, 3)) == wanted


def test_a_shorter_context(
    make_worker: Callable[..., Worker], target_model: Model, endless: sllm.SamplingParams
) -> None:
    first, second = make_worker(pass_seconds=0.02), make_worker(n_ctx=256)
    prompt = make_prompt(target_model, 200, 4)
    with Link(address_of(first)) as link, sllm.connect(through(link, first.uri)) as remote:
        stream = sllm.generate(remote.target(), prompt, sampling=endless, max_tokens=100)
        runs = [next(stream)]
        link.retarget(address_of(second))
        link.cut()
        runs += stream
        assert tokens_in(runs) == one_by_one(target_model, prompt, endless, 56)
        assert stream.stats.finish_reason == "context"


# ---- the link breaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [1, 10, 100, 1000, 2500, 4000])
def test_connecting_over_a_link_that_breaks(make_worker: Callable[..., Worker], n_bytes: int) -> None:
    worker = make_worker()
    with Link(address_of(worker), cut_after_bytes=n_bytes) as link:
        with pytest.raises(sllm.RemoteError):
            sllm.connect(through(link, worker.uri), timeout=3.0)
        link.cut_after_bytes = None
        with sllm.connect(through(link, worker.uri)) as remote:
            assert remote.ping().round_trip > 0


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("n_more", [1500, 3000, 6000])
def test_every_connection_breaks(
    make_worker: Callable[..., Worker],
    drafter: ModelDrafter,
    endless: sllm.SamplingParams,
    wanted: list[int],
    n_more: int,
    drafting: bool,
) -> None:
    worker = make_worker()
    n_bytes = bytes_to_go_on(worker, PROMPT, endless) + n_more
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        link.cut_after_bytes = n_bytes
        stream = sllm.generate(
            remote.target(), PROMPT, draft=drafter if drafting else None, sampling=endless, max_tokens=60
        )
        runs = list(stream)
        assert tokens_in(settled(runs, 3)) == wanted
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reconnects <= link.stats.cuts
        # A text that one connection may carry whole need not break.
        assert stream.stats.remote.n_reconnects >= 1 or n_more > 1500


def test_a_link_that_never_brings_anything(target_model: Model) -> None:
    """It is there again and again, and the text is given up all the same."""

    def tell(_opening: pb.Open) -> Iterator[pb.Down]:
        return iter([opened()])

    with FakeWorker(target_model, generate=tell) as fake, sllm.connect(fake.uri, deadline=1.0) as remote:
        stream = sllm.generate(remote.target(), PROMPT, max_tokens=3)
        with pytest.raises(sllm.RemoteError, match="1 seconds"):
            stream.text()
        assert 2 <= len(fake.opens) < 50


def test_a_stalled_link(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    worker = make_worker(pass_seconds=0.1)
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), keepalive=0.5) as remote:
        generation = remote.target().open(np.array(PROMPT, dtype=np.int32), endless, 60)
        tokens = list(next(generation).tokens)
        link.stall()
        began = time.monotonic()
        while not generation.lost:
            told = generation.poll(0.1)
            tokens += told.tokens if told else ()
            assert generation.finish_reason is None
            assert time.monotonic() - began < PATIENCE
        link.resume()
        for told in generation:
            tokens += told.tokens
        assert tokens == wanted
        generation.close()


@pytest.mark.parametrize("drafting", [False, True])
def test_a_link_that_stays_away(
    make_worker: Callable[..., Worker],
    drafter: ModelDrafter,
    endless: sllm.SamplingParams,
    wanted: list[int],
    drafting: bool,
) -> None:
    worker = make_worker()
    draft = drafter if drafting else None
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), deadline=0.5) as remote:
        stream = sllm.generate(remote.target(), PROMPT, draft=draft, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        break_for_long(link)
        began = time.monotonic()
        with pytest.raises(sllm.RemoteError, match=r"out of reach for 0\.5 seconds"):
            runs.extend(stream)
        assert 0.4 < time.monotonic() - began < PATIENCE
        assert tokens_in(runs) == wanted[: len(tokens_in(runs))]
        link.up()
        stream = sllm.generate(remote.target(), PROMPT, draft=draft, sampling=endless, max_tokens=60)
        assert tokens_in(list(stream)) == wanted


def test_on_loss_raise(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    worker = make_worker()
    with (
        Link(address_of(worker)) as link,
        sllm.connect(through(link, worker.uri), on_loss="raise") as remote,
    ):
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        link.cut()
        with pytest.raises(sllm.RemoteError, match="lost"):
            runs.extend(stream)
        assert tokens_in(runs) == wanted[: len(tokens_in(runs))]
        stream = sllm.generate(remote.target(on_loss="wait"), PROMPT, sampling=endless, max_tokens=60)
        assert tokens_in(list(stream)) == wanted


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("drafting", [False, True])
def test_a_link_that_is_lost_before_the_first_word(
    make_worker: Callable[..., Worker],
    drafter: ModelDrafter,
    endless: sllm.SamplingParams,
    wanted: list[int],
    drafting: bool,
    run_ahead: bool,
) -> None:
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        break_for_long(link)
        target = remote.target(run_ahead=run_ahead)
        draft = drafter if drafting else None
        stream = sllm.generate(target, PROMPT, draft=draft, sampling=endless, max_tokens=20)
        with ThreadPoolExecutor(1) as executor:
            told = executor.submit(list, stream)
            time.sleep(0.1)
            link.up()
            assert tokens_in(told.result(PATIENCE)) == wanted[:20]


def test_several_texts_lose_one_link(
    make_worker: Callable[..., Worker], target_model: Model, endless: sllm.SamplingParams
) -> None:
    worker = make_worker(limits=Limits(sessions=4), pass_seconds=0.01)
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:

        def tell(i: int) -> list[int]:
            stream = sllm.generate(remote.target(), [5, i], sampling=endless, max_tokens=40)
            return tokens_in(list(stream))

        with ThreadPoolExecutor(4) as executor:
            told = [executor.submit(tell, i) for i in range(4)]
            for _ in range(3):
                wait_until(lambda: len(worker._scheduler.running()) == 4 or all(t.done() for t in told))
                before = link.stats.connections
                link.cut()
                wait_until(lambda: link.stats.connections > before or all(t.done() for t in told))  # noqa: B023
            for i, one in enumerate(told):
                assert one.result(PATIENCE) == one_by_one(target_model, [5, i], endless, 40)
        # One connection for all of them, and two more for one that came at the wrong moment.
        assert link.stats.connections <= 2 + 3 * 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_attempts_leave_no_open_files(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, tmp_path: Path
) -> None:
    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless)
        next(stream)
        before = n_open()
        link.cut_after_bytes = 3000  # in the middle of the handshake
        wait_until(lambda: link.stats.cuts >= 6)
        stream.close()
        link.cut_after_bytes = None
        link.cut()
        wait_until(lambda: n_open() <= before + 2, "the closing of sockets")


def test_a_reader_who_does_not_read(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """The text arrives, link or no link, and waits for its reader."""
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        wait_until(lambda: worker.stats.tokens >= 10)
        link.cut()
        wait_until(lambda: n_threads("sllm-remote") == 0, "the end of the text")
        assert not worker._scheduler.running()
        break_for_long(link)
        assert tokens_in(list(stream)) == wanted


# ---- the draft alone ---------------------------------------------------------------------------------------


def told_locally(stream: TextStream, n: int) -> list[Run]:
    """Read until ``n`` unverified tokens have been shown in a row."""
    runs: list[Run] = []
    n_local = 0
    while n_local < n:
        run = next(stream)
        runs.append(run)
        n_local = n_local + len(run.tokens) if run.source == "local" else 0
    return runs


@pytest.mark.parametrize("run_ahead", [True, False])
def test_the_draft_goes_on_alone(
    make_worker: Callable[..., Worker],
    drafter: ModelDrafter,
    endless: sllm.SamplingParams,
    wanted: list[int],
    run_ahead: bool,
) -> None:
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), on_loss="local") as remote:
        target = remote.target(run_ahead=run_ahead)
        assert target.on_loss == "local"
        stream = sllm.generate(target, PROMPT, draft=drafter, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        for n_local in (10, 3):
            break_for_long(link)
            runs += told_locally(stream, n_local)
            assert all(run.source == "local" and run.n_accepted == 0 for run in runs[-n_local:])
            assert stream.stats.n_tokens < 60
            link.up()
            while runs[-1].source == "local":
                runs.append(next(stream))
            assert len(runs[-1].withdrawn) >= n_local
            assert runs[-1].pos == runs[-1].withdrawn[0].pos
        runs += stream
        assert tokens_in(settled(runs, 3)) == wanted
        assert stream.stats.n_local == sum(len(run.tokens) for run in runs if run.source == "local")
        assert stream.stats.n_tokens == 60
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reconnects >= 2


def test_text_leaves_out_what_was_withdrawn(
    make_worker: Callable[..., Worker],
    target_model: Model,
    drafter: ModelDrafter,
    endless: sllm.SamplingParams,
    wanted: list[int],
) -> None:
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        for begin in (0, 8):  # before and behind the beginning of what is withdrawn
            stream = sllm.generate(
                remote.target(on_loss="local"), PROMPT, draft=drafter, sampling=endless, max_tokens=60
            )
            runs = [next(stream)]
            break_for_long(link)
            runs += told_locally(stream, begin) if begin else []
            with ThreadPoolExecutor(1) as executor:
                rest = executor.submit(stream.text)
                wait_until(lambda s=stream: s.stats.n_local >= 12)  # type: ignore[misc]
                link.up()
                text = rest.result(PATIENCE)
            known = "".join(run.text for run in runs if run.source != "local")
            expected = b"".join(map(target_model.vocab.piece, wanted)).decode("utf-8", "replace")
            assert known + text == expected


def test_the_draft_waits_where_its_text_ends(
    make_worker: Callable[..., Worker], target_model: Model, endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    """At a token that ends it, a stop string, and as many tokens as were asked for."""
    vocab = target_model.vocab
    eog = next(t for t in range(vocab.n_tokens) if vocab.is_eog(t))
    letters = vocab.encode("a b c STOP d e f", add_special=False).tolist()
    worker = make_worker(pass_seconds=0.03)
    cases: list[tuple[Callable[[Tokens, int], list[int]], tuple[str, ...]]] = [
        (lambda tokens, _n: [letters[0], eog, letters[0]], ()),
        (lambda tokens, _n: letters, ("STOP",)),
        (lambda tokens, n: [letters[0]] * n, ()),
        (lambda tokens, n: [letters[0], -1], ()),
        (lambda tokens, n: [], ()),
    ]
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), on_loss="local") as remote:
        for i, (draft, stop) in enumerate(cases):
            stream = sllm.generate(
                remote.target(), PROMPT, draft=draft, sampling=endless, max_tokens=30, stop=stop
            )
            runs = [next(stream)]
            break_for_long(link)
            with ThreadPoolExecutor(1) as executor:
                rest = executor.submit(list, stream)
                time.sleep(0.4)
                assert not rest.done()
                n_local = stream.stats.n_local
                time.sleep(0.1)
                assert stream.stats.n_local == n_local <= 30
                link.up()
                runs += rest.result(PATIENCE)
            assert tokens_in(settled(runs, 3)) == wanted[:30]
            local = [run for run in runs if run.source == "local"]
            for run in local:
                assert run.pos < 3 + 30
                assert "STOP" not in run.text
            if i == 0:
                assert [run.tokens[0] for run in local].count(eog) <= stream.stats.n_local > 0
                assert not local or local[-1].tokens[-1] == eog
            if i == 2:
                assert local[-1].pos == 3 + 30 - 1


def test_without_a_draft_local_is_wait(
    make_worker: Callable[..., Worker], endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), on_loss="local") as remote:
        stream = sllm.generate(remote.target(), PROMPT, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        break_for_long(link)
        threading.Timer(0.2, link.up).start()
        runs += stream
        assert tokens_in(runs) == wanted
        assert all(run.source == "target" and not run.withdrawn for run in runs)
        assert stream.stats.n_local == 0


def test_the_draft_alone_until_the_deadline(
    make_worker: Callable[..., Worker], drafter: ModelDrafter, endless: sllm.SamplingParams, wanted: list[int]
) -> None:
    worker = make_worker()
    with (
        Link(address_of(worker)) as link,
        sllm.connect(through(link, worker.uri), on_loss="local", deadline=0.5) as remote,
    ):
        stream = sllm.generate(remote.target(), PROMPT, draft=drafter, sampling=endless, max_tokens=60)
        runs = [next(stream)]
        break_for_long(link)
        with pytest.raises(sllm.RemoteError, match="out of reach"):
            runs.extend(stream)
        verified = [run for run in runs if run.source != "local"]
        assert len(verified) < len(runs)
        assert tokens_in(verified) == wanted[: len(tokens_in(verified))]
        assert tokens_in(runs[: len(verified)]) == tokens_in(verified)


def test_closing_while_the_draft_is_alone(
    make_worker: Callable[..., Worker], drafter: ModelDrafter, endless: sllm.SamplingParams
) -> None:
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri), on_loss="local") as remote:
        stream = sllm.generate(remote.target(), PROMPT, draft=drafter, sampling=endless)
        next(stream)
        break_for_long(link)
        told_locally(stream, 3)
        stream.close()
        assert n_threads("sllm-draft") == 0
        link.up()
        assert sllm.generate(remote.target(), PROMPT, sampling=GREEDY, max_tokens=3).text()

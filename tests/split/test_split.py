"""A model split by layers: the same text as the whole one, whatever happens to the link and the middle."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, make_prompt, one_by_one
from remote_worker import PATIENCE, WorkerProcess, n_threads, through, wait_until
from worker_links import cutting

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.split import target as module
from sllm.targets.base import RemoteWork
from sllm.wire import codec
from sllm.wire.protocol import pb
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote

N_CTX = 512
N_LAYER = 8
SAMPLED = sllm.SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, min_p=0.02, seed=11, penalty_repeat=1.1, penalty_last_n=32
)


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    """Makes workers of the embedded target's layers."""
    before = n_threads("sllm-layers")
    with ExitStack() as stack:

        def make(layers: bool | tuple[int, int] = True, **options: Any) -> Worker:
            model = options.pop("model", embedded.TARGET)
            options = {"insecure": True, "n_ctx": N_CTX, **EXACT, **options}
            return stack.enter_context(Worker(model, layers=layers, **options))

        yield make
    assert n_threads("sllm-layers") == before
    assert n_threads("sllm-draft") == 0


@pytest.fixture
def make_split() -> Iterator[Callable[..., sllm.SplitTarget]]:
    """Makes splits with the conditions of exactness."""
    with ExitStack() as stack:

        def make(middle: Remote | list[Remote], **options: Any) -> sllm.SplitTarget:
            path = options.pop("path", embedded.TARGET)
            options = {"head": 2, "tail": 1, "codec": "f32", "n_ctx": N_CTX, **EXACT, **options}
            return stack.enter_context(sllm.SplitTarget(path, middle=middle, **options))

        yield make


@pytest.fixture
def remote(make_worker: Callable[..., Worker]) -> Iterator[Remote]:
    with sllm.connect(make_worker().uri) as connection:
        yield connection


def text_of(
    target: sllm.Target, prompt: Any, n: int, sampling: sllm.SamplingParams, draft: Any = None
) -> list[int]:
    stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=n)
    return [token for run in stream for token in run.tokens]


# ---- the same text


@pytest.mark.parametrize(
    ("head", "tail"), [(2, 1), (0, 0), (0, 1), (1, 0), (4, 3), (2, None), (0, None)], ids=str
)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_the_whole_model(
    target_model: Model,
    draft_model: Model,
    remote: Remote,
    make_split: Callable[..., sllm.SplitTarget],
    head: int,
    tail: int | None,
    sampling: sllm.SamplingParams,
) -> None:
    prompt = target_model.vocab.encode("Once upon a time there was a fox. One day")
    expected = one_by_one(target_model, prompt, sampling, 40, N_CTX)
    split = make_split(remote, head=head, tail=tail)
    assert text_of(split, prompt, 40, sampling) == expected
    assert text_of(split, prompt, 40, sampling, draft_model) == expected
    assert text_of(split, prompt, 40, sampling, "ngram") == expected


def test_one_round_trip_a_pass(
    target_model: Model,
    draft_model: Model,
    make_worker: Callable[..., Worker],
    make_split: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is sent ahead of the answers (tests/split/test_windows.py)."""
    monkeypatch.setattr(module, "windows_worth", lambda _round_trip, _pass_seconds: 1)
    worker = make_worker((2, 7))
    prompt = target_model.vocab.encode("Once upon a time")
    with sllm.connect(worker.uri) as connection, ModelDrafter(draft_model, n_ctx=N_CTX) as drafter:
        drafter.adaptive = False  # as much as it can, however long it takes
        split = make_split(connection)
        stream = sllm.generate(split, prompt, draft=drafter, sampling=GREEDY, max_tokens=60)
        stream.text()
        assert worker.stats.passes == stream.stats.n_passes  # the prompt is a part of the first one
        assert stream.stats.n_tokens / stream.stats.n_passes > 2
        assert stream.stats.n_accepted > 0
        spent = stream.stats.remote
        assert spent is not None
        rows = (len(prompt) - 1) + stream.stats.n_passes + stream.stats.n_drafted + spent.n_again
        size = codec.row_bytes("f32", 256)
        assert rows * size <= spent.bytes_up <= rows * size + 64 * (worker.stats.passes + 1) + 128
        assert rows * size <= spent.bytes_down <= rows * size + 64 * (worker.stats.passes + 1) + 128


def test_neither_tokens_nor_logits_cross_the_link(
    target_model: Model, remote: Remote, make_split: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[pb.LayersUp] = []
    serialize = pb.LayersUp.SerializeToString

    def listen(message: pb.LayersUp) -> bytes:
        said.append(message)
        return serialize(message)

    monkeypatch.setattr(pb.LayersUp, "SerializeToString", listen)
    text_of(make_split(remote), target_model.vocab.encode("One day a cat"), 20, SAMPLED)
    rows = [message.rows for message in said if message.WhichOneof("kind") == "rows"]
    assert len(rows) > 10
    assert not any(row.tokens or row.n_select for row in rows)
    opens = [message.open for message in said if message.WhichOneof("kind") == "open"]
    assert all(not opened.HasField("sampling") for opened in opens)


def test_what_texts_share_is_computed_once(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker()
    with sllm.connect(worker.uri) as connection:
        split = make_split(connection)
        first = make_prompt(target_model, 100, 1).tolist()
        text_of(split, first, 5, GREEDY)
        before = worker.stats.rows
        longer = [*first, *make_prompt(target_model, 20, 2).tolist()]
        assert text_of(split, longer, 5, GREEDY) == one_by_one(target_model, longer, GREEDY, 5, N_CTX)
        assert worker.stats.rows - before <= 20 + 5
        shorter = longer[:50]  # and back
        assert text_of(split, shorter, 5, GREEDY) == one_by_one(target_model, shorter, GREEDY, 5, N_CTX)


def test_a_long_prompt_goes_in_chunks(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker()
    prompt = make_prompt(target_model, 450, 3)
    expected = one_by_one(target_model, prompt, GREEDY, 10, N_CTX)
    with sllm.connect(worker.uri) as connection:
        for tail in (1, None):
            passes = worker.stats.passes
            split = make_split(connection, tail=tail)
            assert text_of(split, prompt, 10, GREEDY) == expected
            assert worker.stats.passes - passes >= 4
            split.close()


def test_several_texts_at_once(
    target_model: Model, draft_model: Model, remote: Remote, make_split: Callable[..., Any]
) -> None:
    split = make_split(remote, n_seq_max=3)
    prompts = [target_model.vocab.encode(text) for text in ("Once upon a time", "The cat", "One day, Theo")]
    expected = [one_by_one(target_model, prompt, SAMPLED, 30, N_CTX) for prompt in prompts]
    found: dict[int, list[int]] = {}

    def run(i: int) -> None:
        found[i] = text_of(split, prompts[i], 30, SAMPLED, "ngram")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found[i] for i in range(3)] == expected
    generations = [split.open(prompt, GREEDY, 5) for prompt in prompts]
    with pytest.raises(sllm.BusyError, match="3 generations open"):
        split.open(prompts[0], GREEDY, 5)
    for generation in generations:
        generation.close()


def test_a_chain_of_workers(
    target_model: Model,
    draft_model: Model,
    make_worker: Callable[..., Worker],
    make_split: Callable[..., Any],
) -> None:
    prompt = target_model.vocab.encode("Once upon a time")
    expected = one_by_one(target_model, prompt, SAMPLED, 30, N_CTX)
    with ExitStack() as stack:
        first, second, third = (
            stack.enter_context(sllm.connect(make_worker(layers).uri)) for layers in ((2, 4), True, (6, 7))
        )
        split = make_split([first, second, third])
        assert split.ranges == [(2, 4), (4, 6), (6, 7)]
        assert text_of(split, prompt, 30, SAMPLED, draft_model) == expected
        split.close()
        ends = stack.enter_context(sllm.connect(make_worker((4, 8)).uri))
        split = make_split([first, ends], tail=None)
        assert text_of(split, prompt, 30, SAMPLED, draft_model) == expected


def test_from_files_of_the_layers_alone(
    target_model: Model, tmp_path: Path, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    parts = [(0, 2), (2, 7), (7, 8)]
    names = [tmp_path / f"{a}-{b}.gguf" for a, b in parts]
    for name, (a, b) in zip(names, parts, strict=True):
        sllm.export_layers(embedded.TARGET, name, a, b)
    assert sum(name.stat().st_size for name in names) < 1.5 * embedded.TARGET.stat().st_size
    prompt = target_model.vocab.encode("The fox")
    worker = make_worker(model=names[1])
    with sllm.connect(worker.uri) as connection:
        assert connection.info.layers is not None
        assert (connection.info.layers.start, connection.info.layers.stop) == (2, 7)
        for head in (2, None):
            split = make_split(connection, path=names[0], tail_path=names[2], head=head)
            assert split.head == 2
            assert text_of(split, prompt, 20, SAMPLED) == one_by_one(target_model, prompt, SAMPLED, 20, N_CTX)
            split.close()


def test_a_head_that_the_file_does_not_say_or_contradicts(remote: Remote, tmp_path: Path) -> None:
    first, middle = tmp_path / "first.gguf", tmp_path / "middle.gguf"
    sllm.export_layers(embedded.TARGET, first, 0, 2)
    sllm.export_layers(embedded.TARGET, middle, 2, 7)
    for path, head, words in [
        (embedded.TARGET, None, r"target\.gguf holds the whole model, .* give head"),
        (middle, None, r"middle\.gguf holds other layers than the first, .* give head"),
        (first, 3, r"head is 3, and first\.gguf holds the first 2 layers alone: leave head out"),
    ]:
        with pytest.raises(ValueError, match=words):
            sllm.SplitTarget(path, head=head, tail_path=embedded.TARGET, middle=remote)
    with sllm.SplitTarget(first, head=1, tail_path=embedded.TARGET, middle=remote, n_ctx=64) as split:
        assert (split.head, split.ranges) == (1, [(1, 7)])


@pytest.mark.parametrize("name", ["f16", "q8", "q4"])
def test_other_codecs_take_less(
    target_model: Model, remote: Remote, make_split: Callable[..., Any], name: str
) -> None:
    stream = sllm.generate(make_split(remote, codec=name), "Once upon a time", sampling=GREEDY, max_tokens=20)
    assert len(stream.text()) > 10
    spent = stream.stats.remote
    assert spent is not None
    n_rows = stream.stats.n_prompt - 1 + stream.stats.n_passes
    assert spent.bytes_up <= n_rows * codec.row_bytes(name, 256) + 64 * (n_rows + 4)
    assert spent.bytes_down <= n_rows * codec.row_bytes(name, 256) + 64 * (n_rows + 4)


def test_the_ends_of_a_text(target_model: Model, remote: Remote, make_split: Callable[..., Any]) -> None:
    for tail in (1, None):
        split = make_split(remote, n_ctx=40, tail=tail)
        stream = sllm.generate(split, make_prompt(target_model, 30, 1), sampling=PLAIN)
        n = sum(len(run.tokens) for run in stream)
        assert stream.stats.finish_reason in ("context", "eog")
        assert n == 10 or stream.stats.finish_reason == "eog"
        with pytest.raises(sllm.ContextFullError, match="holds 40"):
            sllm.generate(split, make_prompt(target_model, 41, 1))
        full = sllm.generate(split, make_prompt(target_model, 40, 1))
        assert full.text() == ""
        split.close()


@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_grammar(
    remote: Remote, make_split: Callable[..., Any], draft_model: Model, tail: int | None
) -> None:
    sampling = sllm.SamplingParams(temperature=1.0, seed=4, grammar='root ::= ("yes" | "no")')
    split = make_split(remote, tail=tail)
    text = sllm.generate(split, "Is it?", draft=draft_model, sampling=sampling, max_tokens=10).text()
    assert text in ("yes", "no")
    with pytest.raises(ValueError, match="grammar"):
        sllm.generate(split, "Is it?", sampling=sllm.SamplingParams(grammar="root ::= ("))


@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_schema(
    remote: Remote,
    make_split: Callable[..., Any],
    draft_model: Model,
    tail: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = sllm.SamplingParams(seed=4, json_schema={"enum": ["yes", "no"]})
    split = make_split(remote, tail=tail)
    text = sllm.generate(split, "Is it?", draft=draft_model, sampling=sampling, max_tokens=10).text()
    assert text in ('"yes"', '"no"')
    # A worker of an earlier version would pass over the schema.
    link = remote.link
    older = tuple(name for name in link.info.features if name != "json-schema")
    monkeypatch.setattr(link, "info", replace(link.info, features=older))
    if tail is None:
        with pytest.raises(sllm.UnsupportedModelError, match="json-schema"):
            sllm.generate(split, "Is it?", sampling=sampling, max_tokens=10)
    else:
        assert sllm.generate(split, "Is it?", sampling=sampling, max_tokens=10).text() == text


# ---- lost links


@pytest.mark.parametrize("tail", [1, None], ids=str)
@examples(12)
@given(
    cuts=st.lists(st.integers(2_000, 90_000), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    n_prompt=st.integers(1, 60),
    draft=st.sampled_from([None, "model", "ngram"]),
)
def test_cuts_of_the_link_change_nothing(
    target_model: Model,
    draft_model: Model,
    shared: tuple[Worker, Remote, Link],
    make_split: Callable[..., Any],
    tail: int | None,
    cuts: list[int],
    seed: int,
    n_prompt: int,
    draft: str | None,
) -> None:
    _, connection, link = shared
    sampling = sllm.SamplingParams(temperature=0.8, seed=seed)
    prompt = make_prompt(target_model, n_prompt, seed % 1000)
    expected = one_by_one(target_model, prompt, sampling, 25, N_CTX)
    with sllm.SplitTarget(
        embedded.TARGET, head=1, tail=tail, middle=connection, codec="f32", n_ctx=N_CTX, **EXACT
    ) as split:
        drafter = draft_model if draft == "model" else draft
        stream = sllm.generate(split, prompt, draft=drafter, sampling=sampling, max_tokens=25)
        with cutting([(link, n_bytes) for n_bytes in cuts]):
            found = [token for run in stream for token in run.tokens]
        assert found == expected


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Worker, Remote, Link]]:
    """A worker behind a link, for many texts."""
    with (
        Worker(
            embedded.TARGET, layers=True, insecure=True, n_ctx=N_CTX, limits=Limits(sessions=2), **EXACT
        ) as worker,
        Link(("127.0.0.1", worker.address.port)) as link,
        sllm.connect(through(link, worker.uri)) as connection,
    ):
        yield worker, connection, link


def test_after_a_cut_only_what_was_lost_is_sent_again(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker()
    with (
        Link(("127.0.0.1", worker.address.port)) as link,
        sllm.connect(through(link, worker.uri)) as connection,
    ):
        prompt = make_prompt(target_model, 200, 5)
        split = make_split(connection)
        generation = split.open(prompt, GREEDY, 20)
        found = [*next(generation).tokens, *next(generation).tokens]
        rows = worker.stats.rows
        link.cut()
        for commit in generation:
            found += commit.tokens
        generation.close()
        assert found == one_by_one(target_model, prompt, GREEDY, 20, N_CTX)
        assert worker.stats.rows - rows <= 20
        assert generation.remote.n_reconnects == 1
        assert worker.stats.reused_tokens >= 200


@pytest.mark.parametrize("tail", [1, None], ids=str)
def test_a_killed_worker_that_comes_back(
    target_model: Model, draft_model: Model, tmp_path: Path, make_split: Callable[..., Any], tail: int | None
) -> None:
    prompt = make_prompt(target_model, 150, 6)
    expected = one_by_one(target_model, prompt, SAMPLED, 40, N_CTX)
    options: dict[str, Any] = {"layers": True, "n_ctx": N_CTX}
    with (
        WorkerProcess(tmp_path, **options) as first,
        WorkerProcess(tmp_path, **options) as second,
        Link(first.address) as link,
        sllm.connect(through(link, first.uri)) as connection,
    ):
        split = make_split(connection, tail=tail)
        stream = sllm.generate(split, prompt, draft=draft_model, sampling=SAMPLED, max_tokens=40)
        found: list[int] = []
        for run in stream:
            if not found:
                link.retarget(second.address)
                first.kill()
            found += run.tokens
        assert found == expected
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reconnects >= 1
        assert stream.stats.remote.lost_seconds > 0


def test_a_loss_that_is_to_be_raised(
    target_model: Model, make_split: Callable[..., Any], tmp_path: Path
) -> None:
    with WorkerProcess(tmp_path, layers=True) as process, sllm.connect(process.uri) as connection:
        split = make_split(connection, on_loss="raise")
        generation = split.open(make_prompt(target_model, 10, 1), PLAIN, 20)
        first = next(generation)
        process.kill()
        with pytest.raises(sllm.RemoteError, match="was lost"):
            next(generation)
        with pytest.raises(sllm.RemoteError):
            next(generation)
        assert first.tokens
        generation.close()


def test_a_worker_that_stays_away(
    target_model: Model, make_split: Callable[..., Any], tmp_path: Path
) -> None:
    with (
        WorkerProcess(tmp_path, layers=True) as process,
        sllm.connect(process.uri, deadline=0.5) as connection,
    ):
        split = make_split(connection)
        generation = split.open(make_prompt(target_model, 10, 1), PLAIN, 20)
        next(generation)
        process.kill()
        with pytest.raises(sllm.RemoteError, match=r"out of reach for 0.5 seconds"):
            next(generation)
        generation.close()


def test_a_worker_that_ends_in_good_order(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker, other = make_worker(), make_worker()
    prompt = make_prompt(target_model, 20, 8)
    with (
        Link(("127.0.0.1", worker.address.port)) as link,
        sllm.connect(through(link, worker.uri)) as connection,
    ):
        generation = make_split(connection).open(prompt, GREEDY, 12)
        found = list(next(generation).tokens)
        link.retarget(("127.0.0.1", other.address.port))
        worker.close()
        for commit in generation:
            found += commit.tokens
        assert found == one_by_one(target_model, prompt, GREEDY, 12, N_CTX)
        generation.close()


def test_an_idle_stream_ends_and_goes_on(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker(limits=Limits(sessions=1, idle_seconds=0.6))
    prompt = make_prompt(target_model, 20, 9)
    with sllm.connect(worker.uri) as connection:
        split = make_split(connection)
        generation = split.open(prompt, GREEDY, 10)
        found = list(next(generation).tokens)
        wait_until(lambda: not worker._scheduler.running(), "the end of the idle stream")
        for commit in generation:
            found += commit.tokens
        assert found == one_by_one(target_model, prompt, GREEDY, 10, N_CTX)
        assert generation.remote.n_reconnects == 0  # nothing was lost
        generation.close()


# ---- cancel, close


def test_cancel_from_another_thread(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker(pass_seconds=5.0)
    with sllm.connect(worker.uri) as connection:
        split = make_split(connection)
        generation = split.open(make_prompt(target_model, 5, 1), GREEDY, 10)
        next(generation)
        timer = threading.Timer(0.2, generation.cancel)
        timer.start()
        began = time.monotonic()
        with pytest.raises(sllm.CancelledError):
            next(generation)
        assert time.monotonic() - began < 4
        with pytest.raises(sllm.CancelledError):
            next(generation)
        generation.close()
        timer.join()


def test_a_prompt_is_cancelled_while_it_is_computed(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker(pass_seconds=20.0)
    with sllm.connect(worker.uri) as connection:
        split = make_split(connection)
        timer = threading.Timer(0.5, split.cancel)
        timer.start()
        began = time.monotonic()
        with pytest.raises(sllm.CancelledError):
            sllm.generate(split, make_prompt(target_model, 5, 1))
        assert time.monotonic() - began < 15
        timer.join()
    split.cancel()  # nothing is open


def test_the_stream_of_a_text_ends_with_it(
    target_model: Model, make_worker: Callable[..., Worker], make_split: Callable[..., Any]
) -> None:
    worker = make_worker(limits=Limits(sessions=1))
    with sllm.connect(worker.uri) as connection:
        one, other = make_split(connection), make_split(connection)
        prompt = make_prompt(target_model, 5, 1)
        first = one.open(prompt, GREEDY, 10)
        next(first)
        with pytest.raises(sllm.BusyError, match="no place"):
            other.open(prompt, GREEDY, 10)
        first.close()
        wait_until(lambda: not worker._scheduler.running(), "the end of the stream")
        second = other.open(prompt, GREEDY, 10)
        found = [token for commit in second for token in commit.tokens]
        assert found == one_by_one(target_model, prompt, GREEDY, 10, N_CTX)
        second.close()
        with pytest.raises(sllm.ClosedError):
            next(first)


def test_close_frees_everything(target_model: Model, remote: Remote) -> None:
    split = sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, n_ctx=64)
    generation = split.open(make_prompt(target_model, 5, 1), GREEDY, 10)
    assert isinstance(generation, RemoteWork)
    next(generation)
    split.close()
    split.close()
    assert split.closed
    assert "closed" in repr(split)
    with pytest.raises(sllm.ClosedError):
        next(generation)
    with pytest.raises(sllm.ClosedError):
        split.open(make_prompt(target_model, 5, 1), GREEDY, 10)
    assert not remote.link.streams


def test_closing_the_connection_ends_a_text(target_model: Model, make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(pass_seconds=5.0)
    with (
        sllm.connect(worker.uri) as connection,
        sllm.SplitTarget(embedded.TARGET, head=1, middle=connection, n_ctx=64, **EXACT) as split,
    ):
        generation = split.open(make_prompt(target_model, 5, 1), GREEDY, 10)
        next(generation)
        timer = threading.Timer(0.2, connection.close)
        timer.start()
        with pytest.raises(sllm.ClosedError):
            next(generation)
        timer.join()
        with pytest.raises(sllm.ClosedError):
            next(generation)


def test_an_unclosed_split_warns(remote: Remote) -> None:
    with pytest.warns(ResourceWarning, match="unclosed <sllm.SplitTarget"):
        sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, n_ctx=64).__del__()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_local_pieces_hold_only_their_layers(
    target_model: Model, remote: Remote, make_split: Callable[..., Any]
) -> None:
    split = make_split(remote, head=1, tail=1)
    with sllm.LayerRange(embedded.TARGET, 0, 2, n_ctx=64) as two:
        head = embedded.TARGET.stat().st_size
        assert split.size_bytes < 0.5 * head  # two of eight layers, and the output's matrix
        assert two.size_bytes < split.size_bytes


# ---- what does not fit


def test_counts_of_layers_that_do_not_fit(remote: Remote) -> None:
    for head, tail, words in [
        (8, 0, "leave some for the middle"),
        (4, 4, "leave some for the middle"),
        (-1, 1, "head is -1"),
        (2, -1, "tail is -1"),
        (2.0, 1, "head is 2.0"),
        (True, 1, "head is True"),
    ]:
        with pytest.raises(ValueError, match=words):
            sllm.SplitTarget(embedded.TARGET, head=head, tail=tail, middle=remote)  # type: ignore[arg-type]


def test_other_arguments_that_do_not_fit(
    remote: Remote, make_worker: Callable[..., Worker], target_model: Model
) -> None:
    with pytest.raises(ValueError, match="codec is 'zip'"):
        sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, codec="zip")
    with pytest.raises(ValueError, match="on_loss is 'cry'"):
        sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, on_loss="cry")
    with pytest.raises(ValueError, match="no worker"):
        sllm.SplitTarget(embedded.TARGET, head=1, middle=[])
    with pytest.raises(ValueError, match="n_ctx is 0"):
        sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, n_ctx=0)
    for wrong in ("sllm://TOKEN@HOST:50051", None, [remote, "sllm://TOKEN@HOST:50051"]):
        with pytest.raises(TypeError, match=r"expected what sllm\.connect\(\) returns"):
            sllm.SplitTarget(embedded.TARGET, head=1, middle=wrong)  # type: ignore[arg-type]
    with sllm.SplitTarget(embedded.TARGET, head=1, middle=remote, n_ctx=64) as split:
        for prompt in ([], [-1], [target_model.vocab.n_tokens]):
            with pytest.raises(ValueError, match=r"no tokens|not in the vocabulary"):
                sllm.generate(split, prompt)
        with pytest.raises(TypeError):
            sllm.generate(split, np.zeros(3, dtype=np.int64))


def test_a_worker_with_other_layers(make_worker: Callable[..., Worker]) -> None:
    with sllm.connect(make_worker((2, 6)).uri) as connection:
        with pytest.raises(ValueError, match=r"\[2, 6\), and \[2, 7\) lie between"):
            sllm.SplitTarget(embedded.TARGET, head=2, tail=1, middle=connection)
        with pytest.raises(ValueError, match=r"have layers \[2, 6\)"):
            sllm.SplitTarget(embedded.TARGET, head=1, tail=2, middle=connection)
        with pytest.raises(ValueError, match="lie between"):
            sllm.SplitTarget(embedded.TARGET, head=2, tail=None, middle=connection)


def test_a_worker_without_the_output(tmp_path: Path, make_worker: Callable[..., Worker]) -> None:
    part = tmp_path / "part.gguf"
    sllm.export_layers(embedded.TARGET, part, 2, 7)
    with sllm.connect(make_worker(model=part).uri) as connection:
        with pytest.raises(ValueError, match=r"lie between|needed"):
            sllm.SplitTarget(embedded.TARGET, head=2, tail=None, middle=connection)
        with pytest.raises(ValueError, match=r"has layers \[2, 7\), and \[1, 7\) are needed"):
            sllm.SplitTarget(embedded.TARGET, head=1, tail=1, middle=connection)


def test_a_worker_with_another_model(make_worker: Callable[..., Worker], tmp_path: Path) -> None:
    with (
        sllm.connect(make_worker(model=embedded.DRAFT).uri) as connection,
        pytest.raises(sllm.RemoteError, match="has a model of 2 layers"),
    ):
        sllm.SplitTarget(embedded.TARGET, head=2, tail=1, middle=connection)
    other = tmp_path / "other.gguf"
    data = bytearray(embedded.TARGET.read_bytes())
    data[-1000] ^= 1  # one weight
    other.write_bytes(data)
    with (
        sllm.connect(make_worker(model=other).uri) as connection,
        pytest.raises(sllm.RemoteError, match=r"layers of another model, other\.gguf"),
    ):
        sllm.SplitTarget(embedded.TARGET, head=2, tail=1, middle=connection)


def test_workers_of_texts_and_of_layers_are_distinguished(
    target_model: Model, remote: Remote, tmp_path: Path
) -> None:
    with pytest.raises(sllm.UnsupportedModelError, match="serves layers of a model, not texts"):
        remote.target()
    with pytest.raises(sllm.UnsupportedModelError, match="serves layers"):
        _ = remote.vocab
    with (
        Worker(target_model, insecure=True, n_ctx=64) as worker,
        sllm.connect(worker.uri) as texts,
        pytest.raises(ValueError, match="serves texts, not layers"),
    ):
        sllm.SplitTarget(embedded.TARGET, head=2, middle=texts)


def test_hidden_states_too_large_for_the_codec(
    target_model: Model, remote: Remote, make_split: Callable[..., Any]
) -> None:
    split = make_split(remote, codec="f16")
    generation = split.open(make_prompt(target_model, 10, 1), GREEDY, 5)
    next(generation)
    embedding = split._embedding.rows
    split._embedding.rows = lambda tokens: embedding(tokens) * np.float32(1e9)
    split._head.forward = lambda hidden, **_: hidden
    with pytest.raises(ValueError, match="too large for"):
        next(generation)
    generation.close()

"""A worker of layers: strangers, broken clients and crowds leave it and the sequences of others alone."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, make_prompt, one_by_one
from raw_client import PATIENCE, Client, Code
from remote_worker import n_threads, wait_until
from trees import main_path, n_right, random_tree

import sllm
from sllm import embedded
from sllm.engine import gguf
from sllm.engine.layers import Embedding, open_layers
from sllm.wire import codec
from sllm.wire.protocol import PROTOCOL, method, pb, to_sampling
from sllm.worker import layer_scheduler, layer_sequence
from sllm.worker.layer_scheduler import LayerScheduler, RangeKey
from sllm.worker.layer_sequence import LayerAnswer, LayerRequest, LayerSequence
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from sllm.engine.model import Model

    Floats = npt.NDArray[np.float32]

N_CTX = 256
N_EMBD = 256
TOKEN = "a-token-that-is-long-enough"
MIDDLE = RangeKey(2, 7, output=False)
END = RangeKey(2, 8, output=True)
SETTINGS = {"n_batch": 512, **EXACT}


@pytest.fixture(scope="module")
def model_id() -> str:
    return gguf.model_id(embedded.TARGET)


@pytest.fixture(scope="module")
def alone() -> Iterator[sllm.LayerRange]:
    """The layers in the middle, without a worker."""
    with sllm.LayerRange(embedded.TARGET, 2, 7, n_ctx=N_CTX, **EXACT) as layers:
        yield layers


@pytest.fixture(scope="module")
def enter() -> Iterator[Callable[[Any], Floats]]:
    """What tokens become in front of layer 2."""
    with (
        Embedding(open_layers(embedded.TARGET)) as embedding,
        sllm.LayerRange(embedded.TARGET, 0, 2, n_ctx=N_CTX, **EXACT) as head,
    ):
        yield lambda tokens: head.forward(embedding.rows(tokens), pos=0)


# ---- the scheduler, without a network


@pytest.fixture
def make() -> Iterator[Callable[..., LayerScheduler]]:
    before = n_threads("sllm-layers")
    with ExitStack() as stack:

        def scheduler(layers: tuple[int, int] | None = None, **options: Any) -> LayerScheduler:
            limits = Limits(**{"sessions": 4, **options.pop("limits", {})})
            options = {"n_ctx": N_CTX, "settings": SETTINGS, **options}
            made = LayerScheduler(embedded.TARGET, layers, limits, **options)
            stack.callback(made.close)
            return made

        yield scheduler
    assert n_threads("sllm-layers") == before


class Gate:
    """Holds the scheduler's thread between passes, so that requests come together."""

    def __init__(self, scheduler: LayerScheduler) -> None:
        self._lock = scheduler._loading

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_exception: object) -> None:
        self._lock.release()


def take(sequence: LayerSequence, n: int) -> list[LayerAnswer]:
    """The next answers. The generator is left behind each, as a client's side that has sent it."""
    found: list[LayerAnswer] = []
    for answer in sequence.answers():
        found.append(answer)
        if len(found) == n:
            break
    else:
        pytest.fail(f"the sequence has ended: {sequence.ended}")
    sequence.handed = None
    while len(sequence._sizes) > len(sequence.pending) + len(sequence._answers):
        sequence._sizes.popleft()
    return found


def ask(sequence: LayerSequence, pos: int, rows: Floats, **more: Any) -> LayerAnswer:
    sequence.submit(LayerRequest(pos, rows, **more))
    return take(sequence, 1)[0]


def noise(n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, (n, N_EMBD)).astype(np.float32)


def test_sequences_go_through_together_and_each_as_if_alone(
    make: Callable[..., LayerScheduler], alone: sllm.LayerRange
) -> None:
    scheduler = make()
    sequences = [scheduler.open(MIDDLE, i + 1) for i in range(4)]
    rows = [noise(3 + 5 * i, i) for i in range(4)]
    with Gate(scheduler):
        for sequence, own in zip(sequences, rows, strict=True):
            sequence.submit(LayerRequest(0, own))
            sequence.submit(LayerRequest(len(own), own[:2]))
            sequence.submit(LayerRequest(1, own[:1], silent=True))
    found = [take(sequence, 3) for sequence in sequences]
    assert scheduler.stats.passes == 3
    assert scheduler.stats.rows == sum(len(own) + 3 for own in rows)
    for own, (first, second, third) in zip(rows, found, strict=True):
        assert first.hidden is not None
        assert second.hidden is not None
        assert np.array_equal(first.hidden, alone.forward(own, pos=0))
        assert np.array_equal(second.hidden, alone.forward(own[:2], pos=len(own)))
        assert (third.pos, third.n_rows, third.hidden) == (1, 1, None)
    assert [sequence.length for sequence in sequences] == [2] * 4


@examples(12)
@given(data=st.data())
def test_selections_are_those_of_each_alone(
    target_model: Model, enter: Callable[[Any], Floats], data: st.DataObject
) -> None:
    """Whatever mixture of prompts and drafts, right and wrong ones, goes through together."""
    texts = data.draw(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 9)), min_size=1, max_size=4))
    with closing(
        LayerScheduler(embedded.TARGET, (2, 8), Limits(sessions=4), n_ctx=N_CTX, settings=SETTINGS)
    ) as scheduler:
        jobs = []
        for i, (n, seed) in enumerate(texts):
            sampling = sllm.SamplingParams(temperature=0.8, seed=seed) if i % 2 else GREEDY
            prompt = make_prompt(target_model, n, seed).tolist()
            wanted = one_by_one(target_model, prompt, sampling, 6, N_CTX)
            n_right = data.draw(st.integers(0, 5))
            draft = [*wanted[: min(n_right, len(wanted) - 1)], *data.draw(st.sampled_from([(), (7, 8)]))]
            whole = [*prompt, *draft]
            sequence = scheduler.open(END, i + 1, sampling, n)
            # The prompt on its own, or together with what is to be selected.
            cut = data.draw(st.sampled_from([0, n - 1]))
            jobs.append((sequence, enter(whole), whole, cut, len(draft) + 1, draft, wanted))
        with Gate(scheduler):
            for sequence, rows, whole, cut, k, _, _ in jobs:
                if cut:
                    sequence.submit(LayerRequest(0, rows[:cut], True, tuple(whole[:cut])))
                sequence.submit(LayerRequest(cut, rows[cut:], False, tuple(whole[cut:]), k))
        for sequence, _, whole, cut, k, draft, wanted in jobs:
            answer = take(sequence, 1 + bool(cut))[-1]
            n_prompt = len(whole) - k + 1
            assert answer.pos == n_prompt
            assert list(answer.tokens) == wanted[: len(answer.tokens)]
            n_same = next((i for i, (a, b) in enumerate(zip(draft, wanted)) if a != b), len(draft))  # noqa: B905
            assert answer.n_accepted == n_same == len(answer.tokens) - 1
            assert answer.n_verified == k - 1
            assert sequence.length == n_prompt + n_same
        assert scheduler.stats.rows == sum(len(whole) for _, _, whole, *_ in jobs)


def test_trees_and_chains_go_through_together(
    make: Callable[..., LayerScheduler], alone: sllm.LayerRange
) -> None:
    rng = np.random.default_rng(0)
    scheduler = make()
    scheduler._rows_of_a_pass = lambda *_: scheduler.max_rows  # type: ignore[method-assign]
    sequences = [scheduler.open(MIDDLE, i + 1) for i in range(4)]
    prompts = [noise(2 + 3 * i, i) for i in range(4)]
    trees = [random_tree(rng, n, [], 10**6)[1] for n in (0, 12, 30, 5)]
    rows = [noise(1 + len(parents), 10 + i) for i, parents in enumerate(trees)]
    more = noise(3, 20)
    with Gate(scheduler):
        for sequence, prompt, own, parents in zip(sequences, prompts, rows, trees, strict=True):
            sequence.submit(LayerRequest(0, prompt))
            sequence.submit(LayerRequest(len(prompt), own, parents=tuple(parents)))
    found = [take(sequence, 2)[1] for sequence in sequences]
    for sequence, prompt, own, parents, answer in zip(sequences, prompts, rows, trees, found, strict=True):
        alone.forward(prompt, pos=0)
        assert answer.hidden is not None
        assert np.array_equal(answer.hidden, alone.forward(own, pos=len(prompt), parents=parents))
        # The next rows may begin anywhere up to the end of the main path, and nowhere after.
        n_main = len(main_path(range(len(parents)), parents))
        end = len(prompt) + 1 + n_main
        assert sequence.length == end == alone.memory.length()
        with pytest.raises(ValueError, match="gap"):
            sequence.submit(LayerRequest(end + 1, more))
        at = end - n_main // 2
        after = ask(sequence, at, more)
        assert after.hidden is not None
        assert np.array_equal(after.hidden, alone.forward(more, pos=at))
    assert scheduler.stats.passes == 2 + 4


def test_a_tree_is_not_parted(make: Callable[..., LayerScheduler], alone: sllm.LayerRange) -> None:
    """Where a pass may have fewer rows than a request, what is before its tree goes by itself."""
    scheduler = make()
    scheduler._rows_of_a_pass = lambda *_: 8  # type: ignore[method-assign]
    sequence = scheduler.open(MIDDLE, 1)
    rows, parents = noise(40, 1), tuple(i // 2 - 1 for i in range(20))
    answer = ask(sequence, 0, rows, parents=parents)
    assert answer.n_rows == 40
    assert answer.hidden is not None
    assert np.array_equal(answer.hidden, alone.forward(rows, pos=0, parents=parents))
    assert scheduler.stats.passes == 4  # 8, 8, 3 and 21


@examples(12)
@given(data=st.data())
def test_selections_from_trees(
    target_model: Model, enter: Callable[[Any], Floats], data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    with (
        closing(
            LayerScheduler(embedded.TARGET, (2, 8), Limits(sessions=3), n_ctx=N_CTX, settings=SETTINGS)
        ) as scheduler,
        Embedding(open_layers(embedded.TARGET)) as embedding,
        sllm.LayerRange(embedded.TARGET, 0, 2, n_ctx=N_CTX, **EXACT) as head,
    ):
        jobs = []
        for i in range(data.draw(st.integers(1, 3))):
            sampling = replace(PLAIN, seed=i)
            prompt = make_prompt(target_model, int(rng.integers(1, 20)), i).tolist()
            wanted = one_by_one(target_model, prompt, sampling, 6, N_CTX)
            tokens, parents = random_tree(rng, int(rng.integers(1, 20)), wanted, 2560)
            whole = [*prompt, *tokens]
            hidden = head.forward(embedding.rows(whole), pos=0, parents=parents)
            jobs.append(
                (scheduler.open(END, i + 1, sampling, len(prompt)), hidden, prompt, tokens, parents, wanted)
            )
        with Gate(scheduler):
            for sequence, hidden, prompt, tokens, parents, _ in jobs:
                links = () if parents == list(range(-1, len(parents) - 1)) else tuple(parents)
                request = LayerRequest(0, hidden, False, (*prompt, *tokens), 1 + len(tokens), links)
                sequence.submit(request)
        for sequence, _, prompt, tokens, parents, wanted in jobs:
            (answer,) = take(sequence, 1)
            n = answer.n_accepted
            assert answer.pos == len(prompt)
            assert list(answer.tokens) == wanted[: n + 1]
            assert n == min(n_right(tokens, parents, wanted[:-1]), len(answer.tokens) - 1)
            main = main_path(tokens, parents)
            assert sequence.length == len(prompt) + n_right(main, range(-1, len(main) - 1), wanted[:n])


def test_more_selections_than_logits_are_kept_of(
    make: Callable[..., LayerScheduler], enter: Callable[[Any], Floats], target_model: Model
) -> None:
    scheduler = make((2, 8), limits={"sessions": 3})
    scheduler._rows_of_a_pass = lambda *_: scheduler.max_rows  # type: ignore[method-assign]
    most = scheduler.max_select
    assert most == 64
    tokens = make_prompt(target_model, most, 1).tolist()
    rows = enter(tokens)
    sequences = [scheduler.open(END, i + 1, GREEDY) for i in range(3)]
    with Gate(scheduler):
        for sequence in sequences:
            sequence.submit(LayerRequest(0, rows, False, tuple(tokens), most - 10))
    found = [take(sequence, 1)[0] for sequence in sequences]
    assert scheduler.stats.passes == 1
    assert len({answer.tokens for answer in found}) == 1
    wanted = one_by_one(target_model, tokens[:11], GREEDY, 1, N_CTX)
    assert list(found[0].tokens[:1]) == wanted
    longer = make_prompt(target_model, most + 1, 1).tolist()
    with pytest.raises(ValueError, match=f"at most {most} to select"):
        sequences[0].submit(LayerRequest(0, enter(longer), False, tuple(longer), most + 1))


def test_one_bad_request_does_not_fail_the_others(
    make: Callable[..., LayerScheduler], alone: sllm.LayerRange, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    good, bad, other = (scheduler.open(MIDDLE, i) for i in (1, 2, 3))
    forward = sllm.LayerRange.forward

    def marked(self: sllm.LayerRange, hidden: Any, **more: Any) -> Any:
        if any(rows[0, 0] == 666 for rows in hidden):
            raise sllm.InferenceError("a bad row")
        return forward(self, hidden, **more)

    monkeypatch.setattr(sllm.LayerRange, "forward", marked)
    rows, poison = noise(4, 1), noise(4, 2)
    poison[0, 0] = 666
    with Gate(scheduler):
        for sequence, own in ((good, rows), (bad, poison), (other, rows)):
            sequence.submit(LayerRequest(0, own))
    for sequence in (good, other):
        found = take(sequence, 1)[0].hidden
        assert found is not None
        assert np.array_equal(found, forward(alone, rows, pos=0))
    with pytest.raises(sllm.InferenceError, match="a bad row"):
        list(bad.answers())
    assert bad.ended == "failed"
    assert not scheduler.failed
    assert len(scheduler.running()) == 2
    assert scheduler.open(MIDDLE, 2).n_kept == 0


def test_a_released_sequence_is_forgotten_whoever_leaves_first(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call may be over before the thread that has read the release leaves the slot."""
    scheduler = make()
    sequence = scheduler.open(MIDDLE, 7)
    let_go = scheduler.let_go

    def late(sequence: LayerSequence, *, keep: bool) -> None:
        monkeypatch.setattr(scheduler, "let_go", let_go)
        sequence.detach()
        let_go(sequence, keep=keep)

    monkeypatch.setattr(scheduler, "let_go", late)
    sequence.release()
    assert {slot.sequence_id for slot in scheduler._slots} == {0}
    assert scheduler.open(MIDDLE, 7).n_kept == 0


def test_several_failures_in_a_row_are_the_end(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    scheduler = make()
    scheduler.on_failure = lambda: told.append(scheduler.failed)
    wrong: list[Exception] = [
        *[ValueError("asked for wrongly")] * 5,  # a client's fault, however often
        sllm.InferenceError("once"),
        sllm.InferenceError("twice"),
        RuntimeError("three times"),
    ]

    def forward(_self: sllm.LayerRange, _hidden: Any, **_more: Any) -> Any:
        raise wrong.pop(0)

    monkeypatch.setattr(sllm.LayerRange, "forward", forward)
    for i in range(8):
        assert not scheduler.failed
        sequence = scheduler.open(MIDDLE, i + 1)
        sequence.submit(LayerRequest(0, noise(1, 1)))
        with pytest.raises((sllm.SllmError, ValueError)):
            list(sequence.answers())
    assert scheduler.failed
    assert told == [True]
    with pytest.raises(sllm.ClosedError, match="go on elsewhere"):
        scheduler.open(MIDDLE, 99)


def test_who_does_not_take_answers_waits(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    sequence, other = scheduler.open(MIDDLE, 1), scheduler.open(MIDDLE, 2)
    n = layer_sequence._BACKLOG
    sent: list[int] = []

    def flood() -> None:
        for i in range(10 * n):
            sequence.submit(LayerRequest(0, noise(1, i)))
            sent.append(i)

    thread = threading.Thread(target=flood)
    thread.start()
    wait_until(lambda: len(sequence._answers) == n)
    for _ in range(20):  # it is the flood that waits, and nobody else
        assert ask(other, other.length, noise(1, 1)).n_rows == 1
    assert len(sent) == n
    assert len(sequence._answers) == n
    sequence.detach()
    thread.join(PATIENCE)
    assert len(sent) == 10 * n  # without effect
    assert scheduler.running() == [other]


def test_the_bytes_that_wait_are_bounded(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_sequence, "_BACKLOG_BYTES", 3 * 100 * 4 * N_EMBD)
    scheduler = make()
    sequence = scheduler.open(MIDDLE, 1)
    rows = noise(100, 1)
    for _ in range(3):
        sequence.submit(LayerRequest(0, rows))
    thread = threading.Thread(target=sequence.submit, args=(LayerRequest(0, rows),))
    thread.start()
    wait_until(lambda: len(sequence._answers) == 3)
    assert thread.is_alive()
    assert len(sequence._sizes) == 3
    take(sequence, 1)
    sequence.finish()  # wakes whoever waits
    thread.join(PATIENCE)
    assert not thread.is_alive()
    monkeypatch.setattr(layer_sequence, "_BACKLOG_BYTES", 1)
    other = scheduler.open(MIDDLE, 2)
    assert ask(other, 0, rows).n_rows == 100  # one goes in any case


def test_a_client_that_stops_reading_loses_its_place(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(limits={"idle_seconds": 0.1, "sessions": 1})
    sequence = scheduler.open(MIDDLE, 1)
    stuck = threading.Event()
    sequence.on_stuck = stuck.set
    sequence.submit(LayerRequest(0, noise(2, 1)))
    answers = sequence.answers()
    assert next(answers).n_rows == 2  # and it does not come back for the next
    assert stuck.wait(PATIENCE)
    assert not scheduler.running()
    assert scheduler.open(MIDDLE, 1).n_kept == 2


def test_computing_is_not_idleness(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(limits={"idle_seconds": 0.05}, pass_seconds=0.3)
    sequence = scheduler.open(MIDDLE, 1)
    assert ask(sequence, 0, noise(1, 1)).n_rows == 1
    assert list(sequence.answers()) == []
    assert sequence.ended == "idle"
    assert not scheduler.running()


def test_the_sequence_left_longest_ago_makes_room(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(limits={"sessions": 2})
    for i in (1, 2):
        sequence = scheduler.open(MIDDLE, i)
        ask(sequence, 0, noise(10 + i, i))
        sequence.detach()
    assert scheduler.open(MIDDLE, 3).n_kept == 0  # in the place of 1
    with pytest.raises(ValueError, match="leave a gap: the sequence ends at 12"):
        scheduler.open(MIDDLE, 2).submit(LayerRequest(13, noise(1, 1)))
    with pytest.raises(sllm.BusyError, match="serves 2 sequences"):
        scheduler.open(MIDDLE, 1)
    assert scheduler.stats.refused == 1
    for sequence in scheduler.running():
        sequence.detach()
    assert scheduler.open(MIDDLE, 1).n_kept == 0


def test_what_is_kept_and_what_is_not(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    for leave, kept in (
        (LayerSequence.detach, 5),
        (LayerSequence.release, 0),
        (LayerSequence.finish, 5),
    ):
        sequence = scheduler.open(MIDDLE, 7)
        assert ask(sequence, 0, noise(5, 1)).n_rows == 5
        leave(sequence)
        assert list(sequence.answers()) == []
        assert not scheduler.running()
        assert scheduler.open(MIDDLE, 7).n_kept == kept
        scheduler.running()[0].release()
    first = scheduler.open(MIDDLE, 7)
    ask(first, 0, noise(5, 1))
    second = scheduler.open(MIDDLE, 7)  # its client has lost the first
    assert (first.ended, second.n_kept) == ("superseded", 5)
    first.release()  # late, and of no effect
    assert scheduler.running() == [second]
    assert ask(second, 5, noise(1, 1)).n_rows == 1


def test_memory_is_kept_for_a_while_only(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(limits={"keep_seconds": 0.0})
    sequence = scheduler.open(MIDDLE, 7)
    ask(sequence, 0, noise(5, 1))
    sequence.detach()
    wait_until(lambda: scheduler._slots[0].freed < time.monotonic())
    assert scheduler.open(MIDDLE, 7).n_kept == 0


def test_clients_without_an_id_have_nothing_in_common(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    one, other = scheduler.open(MIDDLE, 0), scheduler.open(MIDDLE, 0)
    assert one.slot is not other.slot
    assert one.ended is None
    ask(one, 0, noise(5, 1))
    one.detach()
    assert scheduler.open(MIDDLE, 0).n_kept == 0
    assert other.ended is None


def test_who_returns_waits_for_the_pass_of_the_lost_stream(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of a stream that was lost goes on, and shortens what its successor finds."""
    scheduler = make()
    sequence = scheduler.open(MIDDLE, 7)
    ask(sequence, 0, noise(20, 1))
    at_work, go = threading.Event(), threading.Event()
    forward = sllm.LayerRange.forward

    def slow(self: sllm.LayerRange, hidden: Any, **more: Any) -> Any:
        at_work.set()
        go.wait(PATIENCE)
        return forward(self, hidden, **more)

    monkeypatch.setattr(sllm.LayerRange, "forward", slow)
    sequence.submit(LayerRequest(3, noise(2, 2)))
    assert at_work.wait(PATIENCE)
    stranger = scheduler.open(MIDDLE, 8)  # does not wait for that
    assert stranger.n_kept == 0
    found: list[LayerSequence] = []
    threads = [threading.Thread(target=lambda: found.append(scheduler.open(MIDDLE, 7))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sequence.ended == "superseded")
    assert not found
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert [one.n_kept for one in found] == [5, 5]
    assert sorted(str(one.ended) for one in found) == ["None", "superseded"]


def test_a_failed_pass_leaves_only_what_was_before_it(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    sequence = scheduler.open(MIDDLE, 7)
    ask(sequence, 0, noise(20, 1))

    def forward(_self: sllm.LayerRange, _hidden: Any, **_more: Any) -> Any:
        raise sllm.InferenceError("no")

    monkeypatch.setattr(sllm.LayerRange, "forward", forward)
    sequence.submit(LayerRequest(3, noise(2, 2)))
    wait_until(lambda: len(sequence._answers) > 0)
    sequence.detach()  # before it has heard of it
    assert scheduler.open(MIDDLE, 7).n_kept == 3


def test_long_requests_get_their_turn_and_short_ones_theirs(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(settings={**SETTINGS, "n_batch": 64})
    long, *short = (scheduler.open(MIDDLE, i + 1) for i in range(3))
    with Gate(scheduler):
        for _ in range(6):
            long.submit(LayerRequest(0, noise(64, 1)))
            for sequence in short:
                sequence.submit(LayerRequest(0, noise(2, 2)))
    take(long, 6)
    for sequence in short:
        take(sequence, 6)
    # Together, the long ones in parts: the short ones do not wait for the end of them.
    assert scheduler.stats.rows == 6 * (64 + 2 + 2)
    assert scheduler.stats.passes > 6
    assert short[0].turn < long.turn


def test_others_get_in_while_one_is_always_at_work(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make(pass_seconds=0.02)
    busy = scheduler.open(MIDDLE, 1)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            busy.submit(LayerRequest(0, noise(8, 1)))

    def read() -> None:
        for _ in busy.answers():
            pass

    threads = [threading.Thread(target=work), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    wait_until(lambda: scheduler.stats.passes > 2)
    for i in range(50):
        before = scheduler.stats.passes
        sequence = scheduler.open(MIDDLE, 2 + i)
        assert scheduler.stats.passes - before <= 3
        sequence.release()
    over.set()
    busy.release()
    for thread in threads:
        thread.join(PATIENCE)


def test_other_layers_are_loaded_when_nobody_uses_these(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    one = scheduler.open(MIDDLE, 1)
    ask(one, 0, noise(4, 1))
    with pytest.raises(sllm.BusyError, match=r"layers \[2, 7\) to others at the moment, not layers \[3, 5\)"):
        scheduler.open(RangeKey(3, 5, output=False), 2)
    one.detach()
    other = scheduler.open(RangeKey(3, 5, output=False), 1)
    assert other.n_kept == 0  # of other layers
    with sllm.LayerRange(embedded.TARGET, 3, 5, n_ctx=N_CTX, **EXACT) as layers:
        found = ask(other, 0, noise(4, 1)).hidden
        assert found is not None
        assert np.array_equal(found, layers.forward(noise(4, 1), pos=0))


def test_one_that_is_taken_over_while_its_sampling_is_compiled(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor has gone, and others use other layers: no model is there to compile it for."""
    scheduler = make()
    scheduler.open(END, 1).release()
    layers = scheduler._range
    assert layers is not None
    model = layers.context.model
    compiled = model.compiled
    others: list[LayerSequence] = []

    def late(sampling: sllm.SamplingParams) -> Any:
        monkeypatch.undo()
        scheduler.open(END, 1).release()
        others.append(scheduler.open(MIDDLE, 2))
        return compiled(sampling)

    monkeypatch.setattr(model, "compiled", late)
    sequence = scheduler.open(END, 1, sllm.SamplingParams(seed=1))
    assert sequence.ended == "superseded"
    assert list(sequence.answers()) == []
    sequence.detach()
    assert ask(others[0], 0, noise(4, 1)).hidden is not None


def test_two_ranges_asked_for_at_once(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    keys = [RangeKey(1, 2 + i % 3, output=False) for i in range(12)]
    found: list[tuple[RangeKey, LayerSequence]] = []
    refused: list[Exception] = []

    def run(i: int) -> None:
        try:
            found.append((keys[i], scheduler.open(keys[i], i + 1)))
        except sllm.BusyError as error:
            refused.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(found) + len(refused) == len(keys)
    assert {key for key, _ in found} == {scheduler._key}
    assert {sequence for _, sequence in found} == set(scheduler.running())
    for _, sequence in found:
        assert ask(sequence, 0, noise(2, 1)).n_rows == 2


def test_layers_that_do_not_load(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    with monkeypatch.context() as patch:

        def fail(*_args: Any, **_more: Any) -> Any:
            raise MemoryError("no room for the cache")

        patch.setattr(layer_scheduler, "LayerRange", fail)
        with pytest.raises(MemoryError):
            scheduler.open(MIDDLE, 1)
    assert scheduler.n_ctx == N_CTX
    assert ask(scheduler.open(MIDDLE, 1), 0, noise(2, 1)).n_rows == 2


def test_closing_while_layers_are_loaded(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    at_it, go = threading.Event(), threading.Event()
    made = sllm.LayerRange

    def slow(*args: Any, **more: Any) -> Any:
        at_it.set()
        go.wait(PATIENCE)
        return made(*args, **more)

    monkeypatch.setattr(layer_scheduler, "LayerRange", slow)
    trouble: list[Exception] = []

    def run() -> None:
        try:
            scheduler.open(MIDDLE, 1)
        except sllm.ClosedError as error:
            trouble.append(error)

    opener, closer = threading.Thread(target=run), threading.Thread(target=scheduler.close)
    opener.start()
    assert at_it.wait(PATIENCE)
    closer.start()
    wait_until(lambda: scheduler._closing)
    go.set()
    opener.join(PATIENCE)
    closer.join(PATIENCE)
    assert len(trouble) == 1
    assert scheduler._range is None or scheduler._range.closed


def test_closing_in_the_middle_of_a_pass(
    make: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    sequences = [scheduler.open(MIDDLE, i + 1) for i in range(3)]
    at_work, cancelled = threading.Event(), threading.Event()

    def forward(_self: sllm.LayerRange, _hidden: Any, **_more: Any) -> Any:
        at_work.set()
        assert cancelled.wait(PATIENCE)
        raise sllm.CancelledError("cancelled by another thread")

    monkeypatch.setattr(sllm.LayerRange, "forward", forward)
    monkeypatch.setattr(sllm.LayerRange, "cancel", lambda _self: cancelled.set())
    with Gate(scheduler):
        for sequence in sequences:
            sequence.submit(LayerRequest(0, noise(2, 1)))
    assert at_work.wait(PATIENCE)
    scheduler.close()
    for sequence in sequences:
        assert list(sequence.answers()) == []  # not an error: the client goes on elsewhere
        assert sequence.ended == "closing"


def test_draining_waits_for_the_last(make: Callable[..., LayerScheduler]) -> None:
    scheduler = make()
    sequence = scheduler.open(MIDDLE, 1)
    assert not scheduler.drain(0.01)
    with pytest.raises(sllm.ClosedError):
        scheduler.open(MIDDLE, 2)
    assert ask(sequence, 0, noise(2, 1)).n_rows == 2
    timer = threading.Timer(0.05, sequence.detach)
    timer.start()
    assert scheduler.drain(PATIENCE)
    timer.join()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (LayerRequest(0, noise(0, 1)), "0 rows at once, expected 1 to 512"),
        (LayerRequest(0, noise(513, 1)), "513 rows at once"),
        (LayerRequest(1, noise(1, 1)), "position 1 leave a gap"),
        (LayerRequest(-1, noise(1, 1)), "position -1"),
        (LayerRequest(2**32 - 1, noise(1, 1)), "leave a gap"),
        (LayerRequest(0, noise(1, 1), tokens=(5,)), "take no tokens"),
        (LayerRequest(0, noise(1, 1), n_select=1), "take no tokens"),
        (LayerRequest(0, noise(257, 1)), "holds 256 positions"),
    ],
)
def test_requests_that_are_none(
    make: Callable[..., LayerScheduler], request_: LayerRequest, words: str
) -> None:
    sequence = make().open(MIDDLE, 1)
    with pytest.raises((ValueError, sllm.ContextFullError), match=words):
        sequence.submit(request_)
    assert ask(sequence, 0, noise(1, 1)).n_rows == 1


# ---- over the wire


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all tests that do not change it: whatever they do to it, the next one finds it well."""
    limits = Limits(sessions=4, queue=4, max_grammar=2000)
    with Worker(
        embedded.TARGET,
        layers=True,
        state=tmp_path_factory.mktemp("state"),
        limits=limits,
        n_ctx=N_CTX,
        token=TOKEN,
        **EXACT,
    ) as worker:
        yield worker


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with Client(worker.address) as client:
        yield client
    wait_until(lambda: not worker._scheduler.running(), "the end of every stream")


@pytest.fixture
def well(worker: Worker, target_model: Model) -> Callable[[], None]:
    """Checks that a split on the worker has the text of the whole model."""
    prompt = make_prompt(target_model, 40, 3)
    sampling = replace(PLAIN, seed=5)
    wanted = one_by_one(target_model, prompt, sampling, 8, N_CTX)

    def check(tail: int | None = 1) -> None:
        with (
            sllm.connect(worker.uri, timeout=PATIENCE) as remote,
            sllm.SplitTarget(
                embedded.TARGET, head=2, tail=tail, middle=remote, codec="f32", n_ctx=N_CTX, **EXACT
            ) as split,
        ):
            stream = sllm.generate(split, prompt, draft="ngram", sampling=sampling, max_tokens=8)
            assert [token for run in stream for token in run.tokens] == wanted
        wait_until(lambda: not worker._scheduler.running(), "the end of the split's stream")

    return check


class Stream:
    """One Layers call, raw: what goes up is bytes or messages."""

    def __init__(self, client: Client, *messages: Any) -> None:
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in messages:
            self.send(message)
        stub: Any = client.channel.stream_stream(method("Layers"), None, None)
        self.call: Any = stub(iter(self._outbox.get, None), metadata=client.metadata, timeout=PATIENCE)

    def send(self, message: Any) -> None:
        self._outbox.put(message if isinstance(message, bytes) else message.SerializeToString())

    def finish(self) -> None:
        self._outbox.put(None)

    def next(self) -> Any:
        return pb.LayersDown.FromString(next(self.call))

    def end(self) -> tuple[grpc.StatusCode, str]:
        """The status of a call that has to fail."""
        with pytest.raises(grpc.RpcError) as caught:
            while True:
                self.next()
        self.finish()
        return caught.value.code(), caught.value.details() or ""

    def cancel(self) -> None:
        self.call.cancel()
        self.finish()


def opening(known: str, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "model_id": known,
        "start": 2,
        "stop": 7,
        "codec": "f32",
        "sequence_id": 1234,
        **more,
    }
    return pb.LayersUp(open=pb.LayersOpen(**fields))


def selecting(known: str, **more: Any) -> Any:
    fields = {"stop": 8, "output": True, "sampling": to_sampling(GREEDY), **more}
    return opening(known, **fields)


def rows(pos: int, hidden: Floats, **more: Any) -> Any:
    fields = {"pos": pos, "n_rows": len(hidden), "data": codec.encode(hidden, "f32"), **more}
    return pb.LayersUp(rows=pb.Rows(**fields))


@pytest.mark.parametrize("metadata", [(), (("authorization", f"Bearer {TOKEN}x"),)])
def test_without_the_token_no_layers(
    client: Client, model_id: str, well: Callable[..., None], metadata: Any
) -> None:
    known, client.metadata = client.metadata, metadata
    assert Stream(client, opening(model_id)).end()[0] is Code.UNAUTHENTICATED
    assert Stream(client, b"\xff\xff").end()[0] is Code.UNAUTHENTICATED
    client.metadata = known
    well()


def test_a_worker_of_layers_has_no_texts(client: Client, well: Callable[..., None]) -> None:
    generate: Any = client.channel.stream_stream(method("Generate"), None, None)
    vocabulary: Any = client.channel.unary_stream(method("Vocabulary"), None, None)
    for call in (
        generate(iter([b""]), metadata=client.metadata, timeout=PATIENCE),
        vocabulary(b"", metadata=client.metadata, timeout=PATIENCE),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is Code.UNIMPLEMENTED
        assert "serves layers" in str(caught.value.details())
    assert client.info().protocol == PROTOCOL
    assert client.status().sessions == 0
    well()


BAD_OPENINGS: list[tuple[Any, grpc.StatusCode, str]] = [
    (b"", Code.INVALID_ARGUMENT, "begins with LayersOpen"),
    (b"\xff\xff", Code.INVALID_ARGUMENT, "not a LayersUp"),
    (pb.LayersUp(cancel=pb.Cancel()), Code.INVALID_ARGUMENT, "begins with LayersOpen"),
    (pb.LayersUp(rows=pb.Rows(n_rows=1)), Code.INVALID_ARGUMENT, "begins with LayersOpen"),
    ({"model_id": ""}, Code.FAILED_PRECONDITION, "another model"),
    ({"model_id": "f" * 64}, Code.FAILED_PRECONDITION, "another model"),
    ({"start": 0, "stop": 0}, Code.INVALID_ARGUMENT, "are not a range"),
    ({"start": 7, "stop": 2}, Code.INVALID_ARGUMENT, "are not a range"),
    ({"start": 2, "stop": 9}, Code.INVALID_ARGUMENT, "are not a range"),
    ({"start": 2**32 - 1, "stop": 2**32 - 1}, Code.INVALID_ARGUMENT, "are not a range"),
    ({"codec": ""}, Code.UNIMPLEMENTED, "codec"),
    ({"codec": "x" * 9999}, Code.UNIMPLEMENTED, "codec"),
    ({"output": True, "sampling": to_sampling(GREEDY)}, Code.INVALID_ARGUMENT, "the output follows layer 7"),
    ({"output": True, "stop": 8}, Code.INVALID_ARGUMENT, "top_p"),
]


@pytest.mark.parametrize(("first", "code", "said"), BAD_OPENINGS)
def test_a_first_message_that_begins_nothing(
    client: Client, model_id: str, well: Callable[..., None], first: Any, code: grpc.StatusCode, said: str
) -> None:
    message = opening(model_id, **first) if isinstance(first, dict) else first
    found, details = Stream(client, message).end()
    assert found is code
    assert said in details
    well()


@pytest.mark.parametrize(
    ("sampling", "more", "said"),
    [
        (replace(GREEDY, grammar="root ::= ("), {}, "grammar"),
        (replace(GREEDY, grammar='root ::= "' + "x" * 2000 + '"'), {}, "longer than the 2000 bytes"),
        (replace(GREEDY, logit_bias={2560: 1.0}), {}, "2560"),
        (GREEDY, {"text_start": 2**32 - 1}, "begins at"),
    ],
)
def test_invalid_sampling(
    client: Client, model_id: str, well: Callable[..., None], sampling: Any, more: Any, said: str
) -> None:
    found, details = Stream(client, selecting(model_id, sampling=to_sampling(sampling), **more)).end()
    assert found is Code.INVALID_ARGUMENT
    assert said in details
    well(None)


NAN = noise(1, 1)
NAN[0, 7] = np.nan
ONE = noise(1, 1)
BAD_ROWS: list[tuple[Any, str]] = [
    (b"\xff", "not a LayersUp"),
    (b"", "only Rows and Cancel may come"),
    (opening("x"), "only Rows and Cancel may come"),
    (rows(1, ONE), "leave a gap"),
    (rows(2**32 - 1, ONE), "leave a gap"),
    (rows(0, ONE, n_rows=0), "0 rows at once"),
    (rows(0, ONE, n_rows=2), "not 1024"),
    (rows(0, ONE, n_rows=513), "513 rows at once"),
    (rows(0, ONE, n_rows=2**32 - 1), "rows at once"),
    (rows(0, ONE, data=b""), "not 0"),
    (rows(0, ONE, data=bytes(1023)), "not 1023"),
    (rows(0, ONE, data=NAN.tobytes()), "not finite"),
    (rows(0, ONE, data=(NAN * np.float32(np.inf)).tobytes()), "not finite"),
    (rows(0, ONE, tokens=[5]), "take no tokens"),
    (rows(0, ONE, n_select=1), "take no tokens"),
    (rows(0, ONE, parents=[-1]), "one is before a tree"),
    (rows(0, noise(3, 1), parents=[-1] * 3), "one is before a tree"),
    (rows(0, ONE, parents=[0] * 10_000), "one is before a tree"),
    (rows(0, noise(4, 1), parents=[-1, 1, 0]), "has the parent 1"),
    (rows(0, noise(4, 1), parents=[-1, 2, 1]), "has the parent 2"),
    (rows(0, noise(4, 1), parents=[-2, -1]), "has the parent -2"),
    (rows(0, noise(4, 1), parents=[-1, 2**31 - 1]), f"has the parent {2**31 - 1}"),
    (rows(0, noise(4, 1), parents=[-(2**31), 0]), f"has the parent {-(2**31)}"),
]


@pytest.mark.parametrize(("message", "said"), BAD_ROWS, ids=[said for _, said in BAD_ROWS])
def test_invalid_rows(
    client: Client, model_id: str, well: Callable[..., None], message: Any, said: str
) -> None:
    other = Stream(client, opening(model_id, sequence_id=99))
    other.next()
    stream = Stream(client, opening(model_id), message)
    found, details = stream.end()
    assert found is Code.INVALID_ARGUMENT
    assert said in details
    other.send(rows(0, ONE))
    assert other.next().rows.n_rows == 1
    other.cancel()
    well()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tokens": [5, 6]},
        {"tokens": [2560]},
        {"tokens": [2**32 - 1], "n_select": 1},
        {"tokens": [5], "n_select": 2},
        {"n_select": 1},
        {"tokens": [5], "n_select": 2**32 - 1},
        {"tokens": [5, 6, 7, 8], "parents": [-1, -1]},
        {"tokens": [5, 6, 7, 8], "parents": [-1, -1], "n_select": 4},
        {"tokens": [5, 6, 7, 8], "parents": [-1, -1], "n_select": 1},
        {"tokens": [5, 6, 7, 7], "parents": [-1, -1], "n_select": 3},
        {"tokens": [5, 6, 7, 2560], "parents": [-1, -1], "n_select": 3},
    ],
)
def test_invalid_tokens(client: Client, model_id: str, well: Callable[..., None], more: Any) -> None:
    hidden = noise(max(len(more.get("tokens", ())), 1) if "parents" in more else 1, 1)
    stream = Stream(client, selecting(model_id), rows(0, hidden, **more))
    found, details = stream.end()
    assert found is Code.INVALID_ARGUMENT
    assert "token" in details
    well(None)


def test_rows_after_rejected_tokens(client: Client, model_id: str, well: Callable[..., None]) -> None:
    """The worker has dropped the rows of rejected tokens: those after them leave a gap."""
    stream = Stream(
        client,
        selecting(model_id),
        rows(0, noise(8, 1), tokens=[5] * 8, n_select=8),
        rows(8, ONE, tokens=[5], n_select=1),
    )
    stream.next()
    first = stream.next().commit
    assert 1 <= len(first.tokens) < 8
    assert stream.end()[0] is Code.INVALID_ARGUMENT
    well(None)


def test_numbers_as_large_as_there_are_harm_only_their_sender(
    client: Client, model_id: str, alone: sllm.LayerRange, well: Callable[..., None]
) -> None:
    huge = np.full((4, N_EMBD), np.finfo(np.float32).max, dtype=np.float32)
    streams = [Stream(client, opening(model_id, sequence_id=i + 1), rows(0, huge)) for i in range(4)]
    for stream in streams:
        stream.next()
        try:
            stream.next()
        except grpc.RpcError as error:
            assert error.code() is Code.INVALID_ARGUMENT  # noqa: PT017
        stream.cancel()
    wait_until(lambda: client.status().sessions == 0)
    good = Stream(client, opening(model_id, sequence_id=7), rows(0, noise(5, 1)))
    good.next()
    found = codec.decode(good.next().rows.data, 5, N_EMBD, "f32")
    assert np.array_equal(found, alone.forward(noise(5, 1), pos=0))
    good.cancel()
    well()


@examples(40)
@given(data=st.binary(max_size=200), opened=st.booleans())
def test_random_bytes_are_refused_or_understood(
    worker: Worker, model_id: str, data: bytes, opened: bool
) -> None:
    with Client(worker.address) as client:
        stream = Stream(client, *([opening(model_id, sequence_id=0)] if opened else []), data)
        stream.finish()
        try:
            while True:
                stream.next()
        except StopIteration:
            pass
        except grpc.RpcError as error:
            assert error.code() in (  # noqa: PT017
                Code.INVALID_ARGUMENT,
                Code.FAILED_PRECONDITION,
                Code.UNIMPLEMENTED,
            )


def test_a_message_beyond_the_limit(client: Client, model_id: str, well: Callable[..., None]) -> None:
    stream = Stream(client, opening(model_id), rows(0, ONE, data=bytes((1 << 22) + 1)))
    assert stream.end()[0] in (Code.RESOURCE_EXHAUSTED, Code.CANCELLED, Code.UNKNOWN)
    well()


def test_more_clients_than_places(client: Client, model_id: str, well: Callable[..., None]) -> None:
    streams = [Stream(client, opening(model_id, sequence_id=i + 1)) for i in range(4)]
    for stream in streams:
        assert stream.next().opened.n_ctx == N_CTX
    found, details = Stream(client, opening(model_id, sequence_id=9)).end()
    assert (found, "no place" in details) == (Code.RESOURCE_EXHAUSTED, True)
    found, details = Stream(client, opening(model_id, start=3, sequence_id=9)).end()
    assert (found, "to others" in details) == (Code.RESOURCE_EXHAUSTED, True)
    again = Stream(client, opening(model_id, sequence_id=2))  # but one's own place is one's own
    assert again.next().opened.length == 0
    with pytest.raises(StopIteration):
        streams[1].next()
    streams[0].send(rows(0, ONE))
    assert streams[0].next().rows.n_rows == 1
    for stream in [*streams, again]:
        stream.cancel()
    wait_until(lambda: client.status().sessions == 0)
    well()
    other = Stream(client, opening(model_id, start=3))
    assert other.next().opened.length == 0
    other.cancel()


def test_a_client_that_says_no_more(client: Client, model_id: str) -> None:
    stream = Stream(client, opening(model_id), rows(0, noise(3, 1)))
    stream.finish()
    assert stream.next().WhichOneof("kind") == "opened"
    assert stream.next().rows.n_rows == 3
    with pytest.raises(StopIteration):  # at once, not when it counts as idle
        stream.next()
    back = Stream(client, opening(model_id))
    assert back.next().opened.length == 3
    back.send(pb.LayersUp(cancel=pb.Cancel()))
    with pytest.raises(StopIteration):
        back.next()
    back.finish()


def test_silence_and_deafness_end_a_stream(tmp_path: Path, model_id: str) -> None:
    limits = Limits(sessions=1, queue=0, idle_seconds=0.8)
    with (
        Worker(
            embedded.TARGET, layers=(2, 7), limits=limits, n_ctx=N_CTX, token=TOKEN, state=tmp_path, **EXACT
        ) as worker,
        Client(worker.address) as client,
        Client(worker.address) as other,
    ):
        found, details = Stream(client).end()
        assert found is Code.INVALID_ARGUMENT
        assert "none came in 0.8 seconds" in details
        silent = Stream(client, opening(model_id))
        silent.next()
        assert silent.next().done.reason == "idle"
        assert Stream(client, opening(model_id, start=3)).end()[1].startswith("the worker serves layers [2")
        deaf = Stream(client, opening(model_id), *[rows(0, noise(200, 1)) for _ in range(100)])
        wait_until(lambda: worker.stats.passes > 1)
        wait_until(lambda: not worker._scheduler.running(), "the end of a client that reads nothing")
        assert worker.stats.passes < 100
        stream = Stream(other, opening(model_id, sequence_id=5), rows(0, ONE))
        stream.next()
        assert stream.next().rows.n_rows == 1
        stream.cancel()
        deaf.cancel()


def test_closing_while_clients_are_at_it(tmp_path: Path, model_id: str) -> None:
    before = n_threads("sllm-layers")
    options: dict[str, Any] = {"n_ctx": N_CTX, "token": TOKEN, "state": tmp_path, **EXACT}
    with (
        Worker(embedded.TARGET, layers=(2, 7), pass_seconds=30.0, **options) as worker,
        Client(worker.address) as client,
    ):
        streams = [Stream(client, opening(model_id, sequence_id=i + 1), rows(0, ONE)) for i in range(3)]
        for stream in streams:
            stream.next()
        wait_until(lambda: any(slot.busy for slot in worker._scheduler._slots))
        assert not worker.drain(0)
        assert Stream(client, opening(model_id, sequence_id=9)).end()[0] is Code.UNAVAILABLE
        worker.close()
        for stream in streams:
            messages = []
            try:
                while True:
                    messages.append(stream.next())
            except (StopIteration, grpc.RpcError) as error:
                assert not isinstance(error, grpc.RpcError) or error.code() is not Code.INTERNAL  # noqa: PT017
            assert all(message.done.reason == "closing" for message in messages[-1:])
            stream.cancel()
    assert n_threads("sllm-layers") == before


@pytest.mark.parametrize("layers", [(2, 2), (7, 2), (-1, 3), (2, 9), (2.5, 4), (2,), 3, "2:7", (True, 4)])
def test_layers_that_no_worker_can_serve(layers: Any) -> None:
    with pytest.raises(ValueError, match="layers"):
        Worker(embedded.TARGET, layers=layers, insecure=True, n_ctx=N_CTX)

"""How a worker's passes are shared: rows are counted, by a clock that says what each of them costs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, examples, make_prompt, one_by_one, without_end
from raw_client import wait_until

import sllm
from sllm import embedded
from sllm.draft.length import PassTimes
from sllm.targets.base import Commit
from sllm.worker import layer_pass, passes, scheduler
from sllm.worker.layer_scheduler import LayerScheduler, RangeKey
from sllm.worker.layer_sequence import LayerRequest
from sllm.worker.passes import Limits
from sllm.worker.scheduler import Scheduler
from sllm.worker.session import Finished
from sllm.worker.sharing import Shares, divide, most_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.engine.model import Model

# What a pass of n rows costs, in passes of one row.
COSTS: dict[str, Callable[[int], float]] = {
    "a GPU": lambda n: 0.998 + 0.002 * n,
    "a CPU": lambda n: 0.75 + 0.25 * n,
    "rows alone": float,
}


@examples(200)
@given(
    points=st.lists(st.tuples(st.integers(1, 99), st.floats(0, 9)), min_size=1, max_size=5),
    least=st.integers(0, 9),
    more=st.integers(0, 90),
    seconds=st.floats(-1, 99),
)
def test_rows_are_within_what_is_asked(
    points: list[tuple[int, float]], least: int, more: int, seconds: float
) -> None:
    times = PassTimes()
    for n, t in points:
        times.add(n, t)
    found = most_rows(times, least, least + more, seconds)
    assert least <= found <= least + more
    assert found == least or times.estimate(found) <= seconds * 1.001


@examples(200)
@given(wanted=st.lists(st.integers(1, 300), min_size=1, max_size=9), n_rows=st.integers(1, 400))
def test_dividing_is_fair(wanted: list[int], n_rows: int) -> None:
    found = divide(wanted, n_rows)
    assert all(1 <= got <= want for got, want in zip(found, wanted, strict=True))
    assert sum(found) <= max(n_rows, len(wanted))
    assert sum(found) == min(n_rows, sum(wanted)) or n_rows < len(wanted)
    short = [got for got, want in zip(found, wanted, strict=True) if got < want]
    assert not short or max(found) - min(short) <= 1


@examples(100)
@given(
    per_row=st.floats(0.0005, 1.0),
    n_plain=st.integers(0, 4),
    hints=st.lists(st.integers(1, 16), max_size=3),
    n_prompts=st.integers(0, 3),
)
def test_nobody_gets_less_than_half_of_its_due(
    per_row: float, n_plain: int, hints: list[int], n_prompts: int
) -> None:
    """Texts of a row a pass, with hints that are all right, and prompts without an end, on machines where
    rows cost nothing up to everything.
    """
    n_texts = n_plain + len(hints)
    n = n_texts + n_prompts

    def cost(rows: int) -> float:
        return (1 - per_row) + per_row * rows

    shares = Shares()
    shares.observe_pass(1, cost(1), 0.0, n_texts=1, n_prompts=0)
    elapsed, rounds = 0.0, 0
    prompt_rows = 0
    hinted = [0.0] * len(hints)
    for step in range(400):
        if step == 100:  # what the machine is like is known
            elapsed, rounds, prompt_rows, hinted = 0.0, 0, 0, [0.0] * len(hints)
        rows = shares.prompt_rows(n_prompts, n_texts, 0, 256) if n_prompts else 0
        assert 0 <= rows <= 256
        if rows:
            shares.observe_prompts(rows, cost(rows))
            elapsed += cost(rows)
            prompt_rows += rows
        if n_texts:
            most = shares.pass_rows(n_texts, n_prompts, 0.0, 68)
            drafts = (
                divide(hints, most - n_texts) if hints and most - n_texts >= len(hints) else [0] * len(hints)
            )
            n_rows = n_texts + sum(drafts)
            assert n_rows <= 68
            shares.observe_pass(n_rows, cost(n_rows), 0.0, n_texts=n_texts, n_prompts=n_prompts)
            elapsed += cost(n_rows)
            rounds += 1
            hinted = [had + 1 + got for had, got in zip(hinted, drafts, strict=True)]
    if n < 2 or elapsed == 0:
        return
    half = elapsed / (2 * n)  # of the time
    if n_plain:
        assert rounds >= half / cost(1)
    for had, k in zip(hinted, hints, strict=True):
        assert had >= half * (1 + k) / cost(1 + k) * 0.99
    if n_prompts:
        assert prompt_rows / n_prompts >= half * 256 / cost(256) * 0.99


# ---- the scheduler of texts


class Clock:
    """Time as the computations say; everything else sees the real one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.monotonic = time.monotonic

    def perf_counter(self) -> float:
        return self.now


class Costly:
    """A context whose computations take what they are said to cost, and which counts rows.

    Attributes:
        rows: by sequence: of prompts, and of passes.

    """

    def __init__(self, context: Any, clock: Clock, cost: Callable[[int], float]) -> None:
        self._context, self._clock, self._cost = context, clock, cost
        self.prompt_rows: dict[int, int] = {}
        self.hold = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, tokens: Any, *, seq_id: Any, pos: Any) -> Any:
        with self.hold:
            self._clock.now += self._cost(sum(map(len, tokens)))
            for seq, chunk in zip(seq_id, tokens, strict=True):
                self.prompt_rows[seq] = self.prompt_rows.get(seq, 0) + len(chunk)
        return self._context.decode(tokens, seq_id=seq_id, pos=pos)

    def verify(self, seq_ids: Any, tokens: Any, drafts: Any, **options: Any) -> Any:
        with self.hold:
            self._clock.now += self._cost(len(seq_ids) + sum(map(len, drafts or [])))
        return self._context.verify(seq_ids, tokens, drafts, **options)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (scheduler, passes):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def known(target_model: Model) -> tuple[list[int], list[int]]:
    """A prompt and the 500 tokens after it."""
    prompt = make_prompt(target_model, 6, seed=1).tolist()
    sampling = without_end(target_model, GREEDY)
    return prompt, one_by_one(target_model, prompt, sampling, 500, n_ctx=512)


@pytest.mark.parametrize("machine", COSTS)
def test_a_huge_prompt_giant_hints_and_a_small_text(
    target_model: Model, clock: Clock, known: tuple[list[int], list[int]], machine: str
) -> None:
    """While the prompt is computed, each of the three gets half of a third of what it would get alone."""
    cost = COSTS[machine]
    sampling = without_end(target_model, GREEDY)
    hinted, wanted = known
    long = make_prompt(target_model, 400, seed=2)
    n_small: list[int] = []
    n_hinted: list[int] = []
    with target_model.context(n_ctx=3 * 512, n_seq_max=3, n_outputs_max=64, **EXACT) as context:
        costly = Costly(context, clock, cost)
        texts = Scheduler(costly, Limits(sessions=3))  # type: ignore[arg-type]
        try:
            small = texts.submit(np.array([5, 6], np.int32), 2, sampling, 500, run_ahead=True)
            giant = texts.submit(np.array(hinted, np.int32), 6, sampling, 500, run_ahead=True)
            giant.hint(6, wanted, 1)  # all that comes, at once

            def read(session: Any, counts: list[int]) -> None:
                counts.extend(len(e.tokens) for e in session.events() if isinstance(e, Commit))

            readers = [
                threading.Thread(target=read, args=one) for one in ((small, n_small), (giant, n_hinted))
            ]
            for reader in readers:
                reader.start()
            wait_until(lambda: small.n_passes > 3 and giant.n_passes > 3)
            with costly.hold:  # between two computations
                huge = texts.submit(long, 400, sampling, 1, run_ahead=True)
            wait_until(lambda: costly.prompt_rows.get(2, 0) > 60)  # what the machine is like is known
            with costly.hold:
                began = clock.now, len(small.text), len(giant.text), costly.prompt_rows[2]
            wait_until(lambda: costly.prompt_rows[2] > 300 or giant.finished)
            with costly.hold:
                ended = clock.now, len(small.text), len(giant.text), costly.prompt_rows[2]
            for session in (small, giant, huge):
                session.cancel()
            for reader in readers:
                reader.join()
        finally:
            texts.close()
    seconds, of_small, of_giant, of_prompt = (e - b for b, e in zip(began, ended, strict=True))
    half = seconds / 6
    slack = 2 * 17  # tokens of a pass that was under way at either end
    assert of_small + 2 >= half / cost(1)
    assert of_giant + slack >= half * 17 / cost(17)
    assert of_prompt + 256 >= half * 256 / cost(256)


def test_hints_of_one_do_not_hold_up_another(
    target_model: Model, clock: Clock, known: tuple[list[int], list[int]]
) -> None:
    """A neighbour whose giant hints are all right would like passes of 18 rows, each as long as 5 plain ones:
    a text of a row a pass would get less than the quarter that is half of its due.
    """
    sampling = without_end(target_model, GREEDY)
    prompt, wanted = known
    with target_model.context(n_ctx=2 * 512, n_seq_max=2, n_outputs_max=64, **EXACT) as context:
        texts = Scheduler(Costly(context, clock, COSTS["a CPU"]), Limits(sessions=2))  # type: ignore[arg-type]
        try:
            with texts._changed:  # they begin at once
                small = texts.submit(np.array([5, 6], np.int32), 2, sampling, 500, run_ahead=True)
                giant = texts.submit(np.array(prompt, np.int32), 6, sampling, 500, run_ahead=True)
                giant.hint(6, wanted, 1)
            thread = threading.Thread(target=lambda: list(small.events()))
            thread.start()
            list(giant.events())
            n_small, seconds = len(small.text), clock.now
            small.cancel()
            thread.join()
        finally:
            texts.close()
    assert giant.n_accepted > 400, "the hints are checked all the same"
    assert n_small >= seconds / 4


# ---- places and the queue


def endless(model: Model) -> Any:
    return without_end(model, GREEDY)


@pytest.fixture
def texts(draft_model: Model) -> Iterator[Callable[..., Scheduler]]:
    made: list[Any] = []

    def make(**limits: Any) -> Scheduler:
        n = limits.setdefault("sessions", 1)
        context = draft_model.context(n_ctx=256 * n, n_seq_max=n, **EXACT)
        made.append(context)
        found = Scheduler(context, Limits(**limits))
        made.append(found)
        return found

    yield make
    for one in reversed(made):
        one.close()


def start(texts: Scheduler, model: Model, **options: Any) -> Any:
    return texts.submit(
        np.array([5, 6], np.int32), 2, endless(model), None, **{"run_ahead": False, **options}
    )


def end_of(session: Any) -> Finished:
    last = list(session.events())[-1]
    assert isinstance(last, Finished)
    return last


def test_hints_that_ask_for_nothing_do_not_keep_a_place(
    texts: Callable[..., Scheduler], draft_model: Model
) -> None:
    """Empty, wrong, of the past and of the future, ten a second."""
    found = texts(idle_seconds=0.6, sessions=2)
    session = start(found, draft_model)
    over = threading.Event()

    def pester() -> None:
        number = 1
        session.hint(2, [], number)  # one that asks
        while not over.wait(0.02):
            number += 1
            session.hint(3 + 5 * (number % 2), [], 1)
            session.hint(2, [1, 2, 3], number)
            session.hint(200, [], number)

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        assert end_of(session) == Finished("idle")
    finally:
        over.set()
        thread.join()


def test_who_asks_now_and_then_loses_its_place_to_those_who_wait(
    texts: Callable[..., Scheduler], draft_model: Model
) -> None:
    found = texts(idle_seconds=1.0)
    slow = start(found, draft_model)
    over = threading.Event()

    def drip() -> None:
        number = 0
        while not over.wait(0.1):  # each time before the idle time is over
            number += 1
            slow.hint(len(slow.text), [], number)

    thread = threading.Thread(target=drip)
    thread.start()
    reader = threading.Thread(target=lambda: ends.append(end_of(slow)))
    ends: list[Finished] = []
    reader.start()
    try:
        wait_until(lambda: slow.waited_seconds > 1.1)
        assert not slow.finished  # nobody else wants the place
        assert end_of(start(found, draft_model, run_ahead=True)).reason == "context"
        reader.join()
        assert ends == [Finished("idle")]
    finally:
        over.set()
        thread.join()


def test_the_queue_has_an_end(texts: Callable[..., Scheduler], draft_model: Model) -> None:
    found = texts(queue_seconds=0.3)
    first = start(found, draft_model)
    wait_until(lambda: first.slot is not None)
    late = end_of(start(found, draft_model))
    assert late.reason == "failed"
    assert "no place has become free in 0.3 seconds" in str(late.error)
    assert "--queue-seconds" in str(late.error) and "Limits.queue_seconds" in str(late.error)
    assert found.stats.refused == 1 and found.n_queued == 0
    first.cancel()
    assert end_of(first) == Finished("cancelled")
    assert end_of(start(found, draft_model, run_ahead=True)).reason == "context"


# ---- the scheduler of layers

MIDDLE = RangeKey(2, 7, output=False)


@pytest.fixture
def layers() -> Iterator[Callable[..., LayerScheduler]]:
    made: list[LayerScheduler] = []

    def make(**limits: Any) -> LayerScheduler:
        found = LayerScheduler(
            embedded.TARGET,
            None,
            Limits(**{"sessions": 3, **limits}),
            n_ctx=768,
            settings={"n_batch": 512, **EXACT},
        )
        made.append(found)
        return found

    yield make
    for one in made:
        one.close()


def rows(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (n, 256)).astype(np.float32)


def answers_of(sequence: Any, n: int) -> list[Any]:
    sequence.finish()
    found = list(sequence.answers())
    assert len(found) == n
    return found


@pytest.mark.parametrize("machine", COSTS)
def test_large_requests_leave_small_ones_their_due(
    layers: Callable[..., LayerScheduler], monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """Rows of each sequence over many passes, both with all of their requests there at once; and what is
    computed in parts is what it would be as a whole.
    """
    cost = COSTS[machine]
    found = layers()
    shown: list[tuple[float, dict[int, int]]] = []
    forward = layer_pass.LayerPass.forward

    def noting(self: Any) -> Any:
        by = {sequence.sequence_id: len(request.hidden) for sequence, request in self._batch}
        shown.append((cost(sum(by.values())), by))
        return forward(self)

    monkeypatch.setattr(layer_pass.LayerPass, "forward", noting)
    monkeypatch.setattr(found, "_pass_time", lambda _began: shown[-1][0])
    large, small = found.open(MIDDLE, 1), found.open(MIDDLE, 2)
    with found._loading:
        for i in range(3):
            large.submit(LayerRequest(200 * i, rows(200, i)))
        for i in range(30):
            small.submit(LayerRequest(i, rows(1, i)))
    ends = [answers_of(small, 30), answers_of(large, 3)]
    # The first few show what the machine is like.
    together = [(seconds, by) for seconds, by in shown[5:] if {1, 2} <= by.keys()]
    half = sum(seconds for seconds, _ in together) / 4
    assert sum(by[2] for _, by in together) >= half / cost(1)
    assert sum(by[1] for _, by in together) >= half * 200 / cost(200)
    assert together or machine == "a GPU"  # where there is room for both as they are
    assert sum(by.get(1, 0) for _, by in shown) == 3 * 200
    with sllm.LayerRange(embedded.TARGET, 2, 7, n_ctx=768, **EXACT) as alone:
        for i, answer in enumerate(ends[1]):
            assert (answer.pos, answer.n_rows) == (200 * i, 200)
            assert np.array_equal(answer.hidden, alone.forward(rows(200, i), pos=200 * i))


def test_a_sequence_that_is_never_used_gives_its_place_away(layers: Callable[..., LayerScheduler]) -> None:
    found = layers(sessions=1, idle_seconds=0.3)
    first = found.open(MIDDLE, 1)
    for _ in range(4):  # each time before the idle time is over
        time.sleep(0.1)
        first.submit(LayerRequest(0, rows(1)))
        wait_until(lambda: first._answers)
        next(iter(first.answers()))
        first._sizes.clear()
        first._answered = time.monotonic()
    time.sleep(0.05)
    second = found.open(MIDDLE, 2)
    assert first.ended == "idle"
    assert second.n_kept == 0
    second.detach()

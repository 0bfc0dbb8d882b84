"""The loop under both schedulers: waking, draining, failing and closing, with a subclass that only counts."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import sllm
from sllm.worker.passes import Limits, PassLoop, SchedulerStats, Slot

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0


class Task:
    """Takes so many steps."""

    def __init__(self, n_steps: int) -> None:
        self.left = n_steps
        self.ended: str | None = None
        self.over = threading.Event()


class Loop(PassLoop[Task]):
    """One step of each task in a pass."""

    def __init__(self, n_slots: int = 1, *, pass_seconds: float = 0.0) -> None:
        super().__init__(Limits(), name="test-loop", pass_seconds=pass_seconds)
        self._slots: list[Slot[Task]] = [Slot(i) for i in range(n_slots)]
        self.run_pass: Callable[[], object] = lambda: None
        self.cancelled = threading.Event()
        self._thread.start()

    def add(self, task: Task) -> None:
        with self._changed:
            self._check_open()
            next(slot for slot in self._slots if slot.owner is None).owner = task
            self.wake()

    def _cancel(self) -> None:
        self.cancelled.set()

    def _patience(self) -> float | None:
        return None

    def _step(self) -> bool:
        tasks = self.running()
        if not tasks:
            return False
        began = time.perf_counter()
        self.run_pass()
        self.stats.count_pass(len(tasks), self._pass_time(began))
        self._n_failures = 0
        for task in tasks:
            task.left -= 1
            if task.left == 0:
                self._end(task, "done")
        return True

    def _step_failed(self, error: Exception) -> None:
        super()._step_failed(error)
        for task in self.running():
            self._end(task, "failed")

    def _end_all(self) -> None:
        for task in self.running():
            self._end(task, "closing")

    def _end(self, task: Task, reason: str) -> None:
        with self._changed:
            task.ended = reason
            for slot in self._slots:
                if slot.owner is task:
                    slot.owner = None
            self._changed.notify_all()
        task.over.set()


def test_it_runs_passes_while_there_is_work() -> None:
    loop = Loop(2)
    tasks = [Task(3), Task(5)]
    for task in tasks:
        loop.add(task)
    assert loop.drain(PATIENCE)
    assert [task.ended for task in tasks] == ["done", "done"]
    assert loop.stats.rows == 8
    with pytest.raises(sllm.ClosedError, match="go on elsewhere"):
        loop.add(Task(1))
    loop.close()
    loop.close()
    assert not loop._thread.is_alive()


def test_draining_waits_no_longer_than_it_may() -> None:
    loop = Loop(pass_seconds=0.01)
    task = Task(10**6)
    loop.add(task)
    assert not loop.drain(0.05)
    loop.close()
    assert task.ended == "closing"


def test_closing_cancels_the_pass_under_way() -> None:
    loop = Loop()
    at_work = threading.Event()

    def hang() -> None:
        at_work.set()
        assert loop.cancelled.wait(PATIENCE)
        raise sllm.CancelledError("cancelled")

    loop.run_pass = hang
    task = Task(1)
    loop.add(task)
    assert at_work.wait(PATIENCE)
    loop.close()
    assert task.ended == "closing"
    assert not loop.failed


def test_closing_does_not_wait_for_the_least_time_of_a_pass() -> None:
    loop = Loop(pass_seconds=3600.0)
    loop.add(Task(2))
    loop.close()
    assert not loop._thread.is_alive()


def test_three_failures_in_a_row_are_one_too_many(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    told: list[bool] = []
    loop.on_failure = lambda: told.append(loop.failed)
    outcomes: list[Exception | None] = [
        ValueError("a canary"),
        ValueError("b"),
        None,
        *[ValueError("c")] * 3,
    ]

    def fail() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    loop.run_pass = fail
    ended = []
    for _ in range(6):
        assert not loop.failed
        task = Task(1)
        loop.add(task)
        assert task.over.wait(PATIENCE)
        ended.append(task.ended)
    assert ended == ["failed", "failed", "done", "failed", "failed", "failed"]
    assert loop.failed
    assert told == [True]
    assert "three passes in a row" in caplog.text
    assert "ValueError at test_passes.py" in caplog.text
    assert "a canary" not in caplog.text  # an error may repeat what a client has sent
    with pytest.raises(sllm.ClosedError):
        loop.add(Task(1))
    loop.close()


def test_passes_are_counted_by_their_rows() -> None:
    stats = SchedulerStats()
    for n_rows in (1, 2, 3, 4, 5, 8, 9):
        stats.count_pass(n_rows, 0.5)
    assert stats.batch_sizes == [1, 1, 2, 2, 1]
    assert (stats.passes, stats.rows, stats.busy_seconds) == (7, 32, 3.5)
    stats.count_commit(3, 5, 2)
    assert (stats.tokens, stats.drafted, stats.accepted) == (3, 5, 2)

"""Passes that hang: what they do to the health, and to the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from raw_client import TOKEN, Client, opening, wait_until

import sllm
from sllm import embedded
from sllm.engine.context import Context
from sllm.remote.health import is_serving
from sllm.worker.layer_scheduler import LayerScheduler
from sllm.worker.monitoring import Monitoring
from sllm.worker.progress import Progress
from sllm.worker.server import Worker
from sllm.worker.watch import HUNG, HardStop, Watch

if TYPE_CHECKING:
    from pathlib import Path

# ---- how long a pass may take


def test_the_time_scales_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sllm.worker.progress.monotonic", lambda: clock[0])
    progress = Progress()
    progress.most_rows, progress.size_bytes = 300, 40 * 10**9

    def step(n_rows: int, seconds: float) -> None:
        progress.begin()
        clock[0] += seconds
        progress.end(n_rows)

    assert progress.allowed == pytest.approx(60 + 800)  # nothing is known but that the model is large
    for _ in range(4):
        step(1, 2.0)
    assert progress.allowed == pytest.approx(60 + 10 * 300 * 2.0)  # a slow machine
    for _ in range(64):
        step(300, 0.3)
    assert progress.allowed == pytest.approx(60 + 10 * 300 * 0.001)  # a fast one
    step(1, 3600.0)  # once, say because the machine was asleep
    step(0, 3600.0)
    assert progress.allowed == pytest.approx(63)
    progress.limit = 0.5
    assert progress.allowed == 0.5


def test_a_stopped_process_has_not_hung() -> None:
    """``kill -STOP`` for an hour is one look at the clock."""
    progress = Progress()
    progress.limit = 1.0
    told: list[bool] = []
    watch = Watch(progress, told.append, grace=2.0)
    watch.close()  # the looks are the test's
    progress.begin()
    watch._look(3600.0)  # it has begun since
    watch._look(0.5)
    assert not watch.hung
    watch._look(0.6)
    assert (watch.hung, told) == (True, [True])
    progress.end(1)
    progress.begin()  # the next one
    watch._look(0.2)
    assert (watch.hung, told) == (False, [True, False])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pass_limit": 0}, "monitoring.pass_limit is 0, expected more than 0"),
        ({"pass_limit": float("nan")}, "monitoring.pass_limit is nan"),
        ({"pass_grace": -1}, "monitoring.pass_grace is -1, expected 0 or more"),
        ({"pass_grace": float("inf")}, "monitoring.pass_grace is inf"),
        ({"metrics": ("127.0.0.1", 65536)}, "monitoring.metrics has port 65536"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Monitoring(**wrong)


# ---- a worker whose pass hangs


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Passes do not end before this event."""
    go_on = threading.Event()
    verify = Context.verify

    def hanging(self: Context, *args: Any, **options: Any) -> Any:
        assert go_on.wait(120)
        return verify(self, *args, **options)

    monkeypatch.setattr(Context, "verify", hanging)
    return go_on


def test_health_follows_the_passes(tmp_path: Path, hang: threading.Event) -> None:
    watched = Monitoring(pass_limit=0.2)
    with (
        Worker(embedded.DRAFT, state=tmp_path, token=TOKEN, n_ctx=64, monitoring=watched) as worker,
        Client(worker.address) as client,
    ):
        time.sleep(0.5)  # nothing to do is no hang
        assert is_serving(worker.address, 60)
        stream = client.generate(opening(max_tokens=4))
        wait_until(lambda: worker.hung)
        assert not is_serving(worker.address, 60)
        assert client.status().sessions == 1  # it still answers
        hang.set()
        assert len(stream.run()) == 4
        wait_until(lambda: not worker.hung)
        assert is_serving(worker.address, 60)
        # One that ends is not healthy again because a pass has ended.
        worker.drain(0)
        worker._health.set_hung(hung=True)
        worker._health.set_hung(hung=False)
        assert not is_serving(worker.address, 60)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sllm-watch") for name in names)


def test_a_chunk_of_a_prompt_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    decode = Context.decode

    def hanging(self: Context, *args: Any, **options: Any) -> Any:
        assert go_on.wait(120)
        return decode(self, *args, **options)

    monkeypatch.setattr(Context, "decode", hanging)
    watched = Monitoring(pass_limit=0.2)
    with (
        Worker(embedded.DRAFT, state=tmp_path, token=TOKEN, n_ctx=64, monitoring=watched) as worker,
        Client(worker.address) as client,
    ):
        stream = client.generate(opening(max_tokens=1))
        wait_until(lambda: worker.hung)
        go_on.set()
        assert len(stream.run()) == 1


def test_layers_are_watched_as_texts_are(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    computed = LayerScheduler._pass

    def hanging(self: LayerScheduler, batch: Any) -> Any:
        assert go_on.wait(120)
        return computed(self, batch)

    monkeypatch.setattr(LayerScheduler, "_pass", hanging)
    watched = Monitoring(pass_limit=0.2)
    with (
        Worker(llama, layers=True, state=tmp_path, n_ctx=256, monitoring=watched) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.SplitTarget(llama, head=1, tail=1, middle=remote, n_ctx=256) as target,
    ):
        made: list[str] = []
        thread = threading.Thread(
            target=lambda: made.append(sllm.generate(target, "Once", max_tokens=3).text())
        )
        thread.start()
        try:
            wait_until(lambda: worker.hung)
        finally:
            go_on.set()
            thread.join()
        wait_until(lambda: not worker.hung)
        assert worker._scheduler.kv_positions()[0] > 0
    assert made


# ---- the process


ENDS = """
import ctypes, sys, threading
from sllm.worker.{where} import {what}
libc = ctypes.CDLL(None)
{rest}
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_grace_ends_the_process() -> None:
    rest = """
progress = Progress()
progress.limit = 0.1
watch = Watch(progress, lambda hung: print("hung", hung, flush=True), grace=0.2)
progress.begin()
libc.sleep(100)
"""
    code = "from sllm.worker.progress import Progress" + ENDS.format(where="watch", what="Watch", rest=rest)
    found = ended(code)
    assert (found.returncode, found.stdout) == (HUNG, "hung True\n")
    assert found.stderr.splitlines()[-1].endswith("; the process ends")
    assert "sllm: a pass has not ended in 0 s; the process ends" in found.stderr


def test_a_hard_stop_ends_the_process() -> None:
    rest = """
with HardStop() as stop:
    stop.arm(100)
    stop.arm(0.2)
    stop.arm(100)
    libc.sleep(100)
"""
    found = ended(ENDS.format(where="watch", what="HardStop", rest=rest))
    assert (found.returncode, found.stdout) == (HUNG, "")
    assert found.stderr == "sllm: it has not ended in the time for it; the process ends\n"


def test_what_ends_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.worker.watch.end_process", pytest.fail)
    with HardStop():
        pass
    with HardStop() as stop:
        stop.arm(100)
        thread: Any = stop._thread
        assert thread.is_alive()
    assert not thread.is_alive()

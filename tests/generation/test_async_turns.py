"""``async for`` over a text: the same text, under asyncio and trio, and nothing left behind by a cancelled
task.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import sllm

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "Once upon a time"
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def run(backend: str, main: Callable[[], Any]) -> Any:
    if backend == "trio":
        pytest.importorskip("trio")
    return anyio.run(main, backend=backend)


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("sllm-async")]


def no_threads() -> bool:
    """Whether the threads end; they are told to, and not waited for."""
    until = time.monotonic() + 10
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not threads()


@BACKENDS
def test_the_same_text(backend: str, target_model: sllm.Model, draft_model: sllm.Model) -> None:
    expected = sllm.generate(target_model, PROMPT, max_tokens=40).text()
    seen: set[str] = set()

    async def main() -> str:
        parts: list[str] = []
        async with sllm.generate(target_model, PROMPT, draft=draft_model, max_tokens=40) as stream:
            async for one in stream:
                parts.append(one.text)
                seen.update(threads())
        return "".join(parts)

    assert run(backend, main) == expected
    assert len(seen) == 1  # a thread for the text, not for each run
    assert no_threads()


@BACKENDS
def test_the_loop_goes_on_meanwhile(backend: str, target_model: sllm.Model) -> None:
    async def main() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.sleep(0)

        async with anyio.create_task_group() as group:
            group.start_soon(count)
            async for _ in sllm.generate(target_model, PROMPT, max_tokens=20):
                pass
            group.cancel_scope.cancel()
        return turns

    assert run(backend, main) > 20


class Stuck:
    """A target whose next token comes when it is cancelled."""

    def __init__(self, model: sllm.Model) -> None:
        self.vocab = model.vocab
        self.cancelled = threading.Event()
        self.closed = False
        self.finish_reason: str | None = None
        self.can_branch = False

    def open(self, *_: object) -> Stuck:
        return self

    def __next__(self) -> Any:
        assert self.cancelled.wait(30)
        raise sllm.CancelledError("the generation was cancelled")

    def hint(self, *_: object) -> None:
        pass

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True


@BACKENDS
def test_a_cancelled_task_ends_the_text(backend: str, target_model: sllm.Model) -> None:
    target = Stuck(target_model)

    async def main() -> bool:
        with anyio.move_on_after(0.2) as scope:
            async for _ in sllm.generate(target, PROMPT, max_tokens=5):
                raise AssertionError("no run can come")
        return scope.cancelled_caught

    assert run(backend, main)
    assert target.cancelled.is_set() and target.closed
    assert no_threads()


@BACKENDS
def test_errors_come_through(backend: str, target_model: sllm.Model) -> None:
    target = Stuck(target_model)
    target.cancel()

    async def main() -> None:
        async for _ in sllm.generate(target, PROMPT, max_tokens=5):
            pass

    with pytest.raises(sllm.CancelledError):
        run(backend, main)
    assert target.closed and no_threads()


@BACKENDS
def test_leaving_the_loop_and_going_on(backend: str, target_model: sllm.Model) -> None:
    async def main() -> str:
        stream = sllm.generate(target_model, PROMPT, max_tokens=12)
        parts = []
        async for one in stream:
            parts.append(one.text)
            break
        parts += [one.text async for one in stream]
        assert [one async for one in stream] == []
        return "".join(parts)

    assert run(backend, main) == sllm.generate(target_model, PROMPT, max_tokens=12).text()
    assert no_threads()


def test_a_loop_that_is_closed_over_a_text(
    target_model: sllm.Model, caplog: pytest.LogCaptureFixture
) -> None:
    target = Stuck(target_model)
    loop = asyncio.new_event_loop()
    task: Any = loop.create_task(sllm.generate(target, PROMPT, max_tokens=5).__anext__())
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    target.cancel()
    task._log_destroy_pending = False  # asyncio's own complaint about such a program
    del task
    until = time.monotonic() + 10
    while not target.closed and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert target.closed and no_threads()
    assert caplog.records == []


@BACKENDS
def test_cancelled_at_any_moment(backend: str, target_model: sllm.Model, draft_model: sllm.Model) -> None:
    expected = sllm.generate(target_model, PROMPT, max_tokens=30).text()
    moments = random.Random(1)

    async def main() -> None:
        for _ in range(12):
            with anyio.move_on_after(moments.random() * 0.06):
                stream = sllm.generate(target_model, PROMPT, draft=draft_model, max_tokens=30)
                assert "".join([one.text async for one in stream]) == expected
        texts: list[str] = []

        async def write(draft: Any) -> None:
            async with sllm.generate(target_model, PROMPT, draft=draft, max_tokens=30) as stream:
                texts.append("".join([one.text async for one in stream]))

        async with anyio.create_task_group() as group:
            group.start_soon(write, draft_model)
            group.start_soon(write, None)
        assert texts == [expected, expected]

    run(backend, main)
    assert no_threads()


def test_without_a_loop(target_model: sllm.Model) -> None:
    stream = sllm.generate(target_model, PROMPT, max_tokens=2)
    with pytest.raises(RuntimeError, match="no running event loop"):
        stream.__anext__().send(None)
    assert no_threads()

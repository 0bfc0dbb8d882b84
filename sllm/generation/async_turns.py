"""Blocking calls for ``async`` code, one after the other on one thread, under asyncio or trio."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["AsyncTurns"]

_T = TypeVar("_T")


class AsyncTurns:
    """One thread, which starts with the first call and ends with :meth:`close`, or when this is forgotten."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sllm-async")

    async def call(self, work: Callable[[], _T], cancel: Callable[[], None]) -> _T:
        """What ``work`` returns or raises, called on the thread.

        Where the task is cancelled meanwhile, ``cancel`` is called, ``work`` comes to its end, and then the
        task goes on being cancelled: nothing is left running.

        Raises:
            RuntimeError: there is no event loop of asyncio or trio.

        """
        if _in_trio():
            end = _end_in_trio
        else:
            asyncio.get_running_loop()  # raises before anything is begun
            end = _end_in_asyncio
        future = self._executor.submit(work)
        await end(future, cancel)
        return future.result()

    def close(self) -> None:
        """End the thread, once its call has returned. More calls do nothing."""
        self._executor.shutdown(wait=False)


def _in_trio() -> bool:
    trio: Any = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def _tell(call_soon: Callable[[Callable[[], object]], object], what: Callable[[], object]) -> None:
    """Have a loop call something; nothing, where it is closed and has left its tasks behind."""
    with suppress(RuntimeError):
        call_soon(what)


async def _end_in_asyncio(future: Future[Any], cancel: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    future.add_done_callback(lambda _: _tell(loop.call_soon_threadsafe, over.set))
    cancelled: asyncio.CancelledError | None = None
    while not over.is_set():
        try:
            await over.wait()
        except asyncio.CancelledError as error:  # noqa: PERF203 - each is held back until the thread is done
            cancelled = error
            cancel()
    if cancelled is not None:
        future.exception()  # seen: it is what the cancelling has brought
        raise cancelled


async def _end_in_trio(future: Future[Any], cancel: Callable[[], None]) -> None:
    trio: Any = sys.modules["trio"]
    token = trio.lowlevel.current_trio_token()
    over = trio.Event()
    future.add_done_callback(lambda _: _tell(token.run_sync_soon, over.set))
    try:
        await over.wait()
    except trio.Cancelled:
        cancel()
        with trio.CancelScope(shield=True):
            await over.wait()
        future.exception()
        raise

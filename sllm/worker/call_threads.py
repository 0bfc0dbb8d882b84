"""The threads on which a worker answers calls."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, TypeVar

from sllm.engine.handle import join

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import ParamSpec

    P = ParamSpec("P")

__all__ = ["CallThreads"]

T = TypeVar("T")


class CallThreads(Executor):
    """Runs each call on a daemon thread of its own; gRPC bounds how many calls there are.

    The interpreter joins the threads of a :class:`~concurrent.futures.ThreadPoolExecutor` before anything
    else when a program ends. Those of calls end when their texts do, or when the worker closes: a program
    that ends with a worker open would wait for its clients.

    Args:
        name: of the threads.

    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn``. Where no thread can be started, the future has the exception.

        Raises:
            RuntimeError: after :meth:`shutdown`.

        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                found = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - the future has it
                future.set_exception(error)
            else:
                future.set_result(found)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        with self._lock:
            if self._closed:
                raise RuntimeError("a call came after the worker was closed")
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError as error:
                # Not raised: it would end the thread of gRPC that takes calls, and with it the server.
                self._threads.discard(thread)
                failure = error
            else:
                return future
        future.set_exception(failure)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Take no more calls, and wait until those under way have ended."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        if wait:
            for thread in threads:
                join(thread)

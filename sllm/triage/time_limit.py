"""A deadline for calls that may hang, such as detectors from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["TimeLimit"]

_T = TypeVar("_T")


class TimeLimit:
    """Runs a call on a helper thread with a deadline, so that one that hangs holds up nobody.

    Several threads may use it, one after the other.

    Args:
        seconds: that a call may take; None: any time.

    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._ended: threading.Event | None = None  # of the last call
        self._turn = threading.Lock()

    def run(self, search: Callable[[], _T]) -> _T:
        """What ``search`` returns or raises.

        Raises:
            TimeoutError: it took longer, or an earlier call that took longer has not ended yet.

        """
        if self.seconds is None:
            return search()
        with self._turn:
            return self._run(search, self.seconds)

    def _run(self, search: Callable[[], _T], seconds: float) -> _T:
        if self._ended is not None and not self._ended.is_set():
            raise TimeoutError("an earlier search still hangs")
        found: list[_T] = []
        trouble: list[Exception] = []
        # No join(): in Python 3.11 a thread is taken for dead when Ctrl-C ends the waiting for it.
        ended = self._ended = threading.Event()

        def run() -> None:
            try:
                found.append(search())
            except Exception as error:  # noqa: BLE001 - raised again below
                trouble.append(error)
            except BaseException as error:  # noqa: BLE001 - one that asks to exit must not be obeyed
                trouble.append(RuntimeError(type(error).__name__))
            finally:
                ended.set()

        thread = threading.Thread(target=run, name="sllm-detect", daemon=True)
        try:
            thread.start()
        except BaseException:
            if not thread.is_alive():
                ended.set()
            raise
        if not ended.wait(seconds):
            raise TimeoutError(f"no result within {seconds:g} seconds")
        if trouble:
            raise trouble[0]
        return found[0]

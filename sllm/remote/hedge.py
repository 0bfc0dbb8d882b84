"""Which of several calls answers first."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Answer", "FirstAnswers", "checked_hedge"]


def checked_hedge(value: bool | float) -> bool | float:
    """``value``, if it says whether, or after how many seconds, a second worker is asked.

    Raises:
        ValueError, TypeError: it does not.

    """
    if isinstance(value, bool):
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"hedge is {type(value).__name__}, expected bool, or seconds")
    if not 0 < value < float("inf"):
        raise ValueError(f"hedge is {value}, expected True, False or seconds above 0")
    return value


@dataclass(frozen=True)
class Answer:
    """What has come of a call up to its answer: messages, and what it has failed with, if it has."""

    call: Any
    messages: list[Any]
    error: BaseException | None


class FirstAnswers:
    """Reads each call up to its answer, on a thread of its own: gRPC's iterators wait without a limit.

    Whoever goes on reading a call does so after its answer has been given out.

    Args:
        is_answer: whether a message is one, or only says that one will come.

    """

    def __init__(self, is_answer: Callable[[Any], bool]) -> None:
        self._is_answer = is_answer
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def watch(self, call: Iterator[Any]) -> None:
        """Read a call up to its answer."""

        def read() -> None:
            messages: list[Any] = []
            error: BaseException | None = None
            try:
                while not messages or not self._is_answer(messages[-1]):
                    messages.append(next(call))
            except BaseException as found:  # noqa: BLE001 - whoever waits is to have it
                error = found
            self._answers.put(Answer(call, messages, error))

        thread = threading.Thread(target=read, name="sllm-hedge", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, timeout: float | None) -> Answer | None:
        """The next answer; None: there was none in ``timeout`` seconds."""
        try:
            return self._answers.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Wait for the threads; the calls that have not answered are to be cancelled before."""
        for thread in self._threads:
            join(thread)

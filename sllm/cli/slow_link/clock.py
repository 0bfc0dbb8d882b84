"""The time of a link, and what is to be done when."""

from __future__ import annotations

import itertools
import time
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """A clock that stands still while the link is stalled, and the calls that are due at some time of it."""

    def __init__(self) -> None:
        self._numbers = itertools.count()  # calls for the same time keep their order
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._stalled_at: float | None = None
        self._stalled_for = 0.0

    @property
    def stalled(self) -> bool:
        """Whether the clock stands still."""
        return self._stalled_at is not None

    def stall(self) -> None:
        """Let the clock stand still."""
        if self._stalled_at is None:
            self._stalled_at = time.monotonic()

    def resume(self) -> None:
        """End what :meth:`stall` began."""
        if self._stalled_at is not None:
            self._stalled_for += time.monotonic() - self._stalled_at
            self._stalled_at = None

    def now(self) -> float:
        """The time, in seconds."""
        now = time.monotonic() if self._stalled_at is None else self._stalled_at
        return now - self._stalled_for

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Have ``call`` called at ``when``."""
        heappush(self._calls, (when, next(self._numbers), call))

    def run_due(self) -> float | None:
        """Make the calls that are due; the seconds until the next one, or None where there is none."""
        while self._calls:
            left = self._calls[0][0] - self.now()
            if left > 0:
                return left
            heappop(self._calls)[2]()
        return None

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

"""The clock of the simulations."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Events:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Let ``call`` happen so much later; in order, where at the same time."""
        self._n += 1
        heappush(self._queue, (self.now + seconds, self._n, call))

    def next(self) -> None:
        if not self._queue:
            raise RuntimeError("both sides wait for the other: the depth rule allows not even one token")
        self.now, _, call = heappop(self._queue)
        call()

"""Who may have a text written now, and who waits: so many places, and a queue with a bound."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from sllm.openai_server.problems import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["Places"]

_T = TypeVar("_T")


class Places(Generic[_T]):
    """Hands out places in the order in which they are asked for; for one event loop.

    Args:
        places: what there is, such as drafters that serve one text at a time.
        queue: so many may wait for one.
        seconds: for so long.

    """

    def __init__(self, places: Sequence[_T], queue: int, seconds: float) -> None:
        self._n_places = len(places)
        self._free = deque(places)
        self._waiting: deque[asyncio.Future[_T]] = deque()
        self._queue, self._seconds = queue, seconds
        self._mean_seconds = 1.0

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[_T]:
        """A place, for as long as the block lasts.

        Raises:
            RequestError: as many wait as may, or it took too long.

        """
        place = await self._take()
        began = time.monotonic()
        try:
            yield place
        finally:
            self._mean_seconds += 0.25 * (time.monotonic() - began - self._mean_seconds)
            self._give(place)

    async def _take(self) -> _T:
        if self._free and not self._waiting:
            return self._free.popleft()
        if len(self._waiting) >= self._queue:
            raise self._busy(f"{self._n_places} being written and {len(self._waiting)} waiting")
        turn: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait([turn], timeout=self._seconds)
        except asyncio.CancelledError:
            if turn.done():
                self._give(turn.result())
            else:
                self._waiting.remove(turn)
            raise
        if turn.done():
            return turn.result()
        self._waiting.remove(turn)
        raise self._busy(f"none was free within {self._seconds:g} s")

    def _give(self, place: _T) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(place)
        else:
            self._free.append(place)

    def _busy(self, why: str) -> RequestError:
        retry_after = self._mean_seconds * (len(self._waiting) + 1) / self._n_places
        return RequestError(
            429,
            f"the server is busy with other texts: {why}; try again later",
            code="rate_limit_exceeded",
            retry_after=retry_after,
        )

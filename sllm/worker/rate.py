"""A rate that is kept on average."""

from __future__ import annotations

import time

__all__ = ["Rate"]


class Rate:
    """A token bucket: ``per_second`` on average, and so many seconds' worth in one burst."""

    def __init__(self, per_second: float, seconds: float = 4.0) -> None:
        self._per_second = per_second
        self._left = self._most = seconds * per_second
        self._last = time.monotonic()

    def take(self) -> bool:
        """Take one; False where none is left."""
        self._fill()
        if self._left < 1:
            self._left = min(self._left, 0.0)
            return False
        self._left -= 1
        return True

    def charge(self) -> None:
        """Count one that could not be prevented; what is owed comes off those to come, a burst at most."""
        self._fill()
        self._left = max(-self._most, self._left - 1)

    def give_back(self) -> None:
        """One that was taken does not count."""
        self._left = min(self._most, self._left + 1)

    @property
    def is_full(self) -> bool:
        """Whether nothing was taken for as long as it takes to fill up."""
        self._fill()
        return self._left >= self._most

    def _fill(self) -> None:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._last) * self._per_second)
        self._last = now

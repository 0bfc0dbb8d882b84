"""The bandwidth of a link: one wire in each direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.cli.slow_link.clock import Clock
    from sllm.cli.slow_link.settings import Settings

__all__ = ["SLACK_BYTES", "Wire"]

_CHUNK_BYTES = 1 << 16
"""The most that is read at once."""

_CHUNK_SECONDS = 0.002
"""And the most in time on the wire, or the far end would see a slow link move in large leaps."""

_PACKET_BYTES = 1448
"""But a packet's worth in any case."""

_QUEUE_SECONDS = 0.02
"""How far the wire is booked ahead, as in a router's queue. Enough for the thread to be late now and then
without the wire running dry."""

SLACK_BYTES = 1 << 18
"""What a connection may have under way beyond what fills the wire; also the size of the sockets' buffers,
which would otherwise grow to megabytes and hide a slow link from its sender."""

_UNLIMITED_MBIT_S = 1000.0
"""A link without a rate has room for what this rate puts under way."""


class Wire:
    """One direction of the link, which all connections share: it sends one chunk after the other."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._free_at = 0.0
        self._waiting: list[Callable[[], None]] = []

    @property
    def chunk(self) -> int:
        """The bytes to read at once."""
        rate = self._settings.mbit_s
        if rate is None:
            return _CHUNK_BYTES
        return min(max(int(rate * 1e6 / 8 * _CHUNK_SECONDS), _PACKET_BYTES), _CHUNK_BYTES)

    @property
    def window(self) -> int:
        """The bytes that a connection may have under way."""
        rate = self._settings.mbit_s or _UNLIMITED_MBIT_S
        seconds = self._settings.delay + self._settings.jitter + _QUEUE_SECONDS
        return int(rate * 1e6 / 8 * seconds) + SLACK_BYTES

    def send(self, now: float, n_bytes: int) -> float:
        """Book ``n_bytes``; the time at which the last of them will have been sent."""
        self._free_at = max(self._free_at, now)
        rate = self._settings.mbit_s
        if rate is not None:
            self._free_at += n_bytes * 8 / (rate * 1e6)
        return self._free_at

    def full(self, now: float) -> bool:
        """Whether no more can be booked now."""
        return self._free_at - now > _QUEUE_SECONDS

    def wait(self, resume: Callable[[], None]) -> None:
        """Have ``resume`` called when half of what is booked has been sent."""
        if not self._waiting:
            self._clock.at(self._free_at - _QUEUE_SECONDS / 2, self._resume)
        self._waiting.append(resume)

    def _resume(self) -> None:
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume()

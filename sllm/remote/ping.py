"""Measurements of a link: its round trip and its bandwidths."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.wire.protocol import pb

if TYPE_CHECKING:
    from sllm.remote.link import WorkerLink

__all__ = ["Ping", "measure"]

_SMALL = 16  # bytes
_LARGE_UP = 1 << 17
_LARGE_DOWN = 1 << 19


@dataclass(frozen=True)
class Ping:
    """A measurement of the link: round trip in seconds (median), bandwidths in Mbit/s, None if not
    measured.
    """

    round_trip: float
    mbit_s_up: float | None
    mbit_s_down: float | None


def measure(link: WorkerLink, n: int, *, bandwidth: bool) -> Ping:
    """``n`` round trips, at least one, and with ``bandwidth`` also 256 KiB up and 1 MiB down.

    Raises:
        RemoteError: the worker does not answer.

    """

    def echo(up: int, down: int) -> float:
        began = time.perf_counter()
        request = pb.EchoRequest(reply_bytes=down, padding=bytes(up))
        link.call("Echo", request, pb.EchoReply, link.timeout + 30)
        return time.perf_counter() - began

    times = sorted(echo(_SMALL, _SMALL) for _ in range(max(n, 1)))
    round_trip = times[len(times) // 2]
    if not bandwidth:
        return Ping(round_trip, None, None)
    # Each way twice, because the first opens TCP's window; what counts is the time beyond the shortest round
    # trip: what a busy machine adds to another one is no time of the link's.
    up = min(echo(_LARGE_UP, _SMALL), echo(_LARGE_UP, _SMALL))
    down = min(echo(_SMALL, _LARGE_DOWN), echo(_SMALL, _LARGE_DOWN))
    return Ping(
        round_trip,
        _LARGE_UP * 8e-6 / max(up - times[0], 1e-6),
        _LARGE_DOWN * 8e-6 / max(down - times[0], 1e-6),
    )

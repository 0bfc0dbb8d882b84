"""The settings of a link, and its counters."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinkStats", "Settings"]


@dataclass(frozen=True)
class LinkStats:
    """What a link has carried since it was made or its counters were reset."""

    bytes_up: int = 0
    """Handed to the target."""
    bytes_down: int = 0
    """Handed to clients."""
    connections: int = 0
    """Accepted from clients."""
    turns: int = 0
    """How often bytes of a connection went the other way than those before them; a ping and its answer are
    one, and n of them in a row 2n - 1."""
    cuts: int = 0
    """Connections that the link has cut."""


class Settings:
    """What the thread looks up for every chunk; the attributes are those of ``Link``.

    Not the ``Link`` itself: a thread that knew it would keep it alive.
    """

    delay: float
    jitter: float
    mbit_s: float | None
    cut_after: float | None
    cut_after_bytes: int | None

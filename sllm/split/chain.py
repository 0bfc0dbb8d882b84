"""The workers of a split, and between which of them rows go directly."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sllm.hosts import host_port, is_loopback, split_host_port

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from sllm.remote.link import WorkerLink
    from sllm.remote.route import Route

__all__ = ["Part", "Relays", "hop_addresses", "obstacle"]

log = logging.getLogger("sllm.remote")

_FIRST_PAUSE, _FACTOR, _LONGEST_PAUSE = 5.0, 4, 300.0
"""Seconds after which a hop that has failed is tried again, how many times as long it takes each time that it
fails again, and the longest. An attempt at a way that a firewall blocks takes a worker 5 seconds.
"""

_NOT_WANTED = "SplitTarget(hops=False), --hops none"


@dataclass(frozen=True)
class Part:
    """What one worker has of a split.

    Attributes:
        route: which worker that is, of several that have the same layers.
        start, stop: its layers.
        output: the model's output is there, too.
        on_loss: ``"wait"`` or ``"raise"``.
        hop_address: where the worker before reaches it; None: where the client does.
        sequence_id: what the worker knows the sequence by.

    """

    route: Route
    start: int
    stop: int
    output: bool
    on_loss: str
    hop_address: tuple[str, int] | None = None
    sequence_id: int = field(default_factory=lambda: secrets.randbits(64) or 1)

    @property
    def link(self) -> WorkerLink:
        """To the worker that has the sequence now."""
        return self.route.link

    @property
    def seen_at(self) -> tuple[str, int]:
        """Host and port of the worker, as the one before sees it."""
        address = self.link.address
        return self.hop_address or (address.host, address.port)


def hop_addresses(hops: bool | Sequence[str | None], n_workers: int) -> list[tuple[str, int] | None] | None:
    """``hops`` of a split, for each worker; None: there are to be none.

    Raises:
        ValueError, TypeError: neither a bool nor an address (or None) for each worker after the first.

    """
    if isinstance(hops, bool):
        return [None] * n_workers if hops else None
    if isinstance(hops, str) or len(hops) != n_workers - 1:
        raise ValueError(
            f"hops is {hops!r}, expected True, False, or HOST:PORT (or None) for each of the {n_workers - 1}"
            " workers after the first, as the one before it sees it"
        )
    return [None, *(None if hop is None else split_host_port(hop) for hop in hops)]


def obstacle(part: Part, following: Part) -> str | None:
    """Why rows cannot go from one worker to the next; None: as far as can be known, they can."""
    there = following.link.address
    if "hop-out" not in part.link.info.features:
        return f"{part.link.endpoint} connects to no other worker (sllm worker --hops)"
    if not {"hop-in", "early-rows"} <= set(following.link.info.features):
        return f"{there.endpoint} takes no rows from other workers: its version is older"
    if there.fingerprint is None:
        return f"{there.endpoint} is known by no fingerprint of a certificate"
    if following.hop_address is None and is_loopback(there.host) and not is_loopback(part.link.address.host):
        return f"{there.endpoint} is another machine for {part.link.endpoint}: name it by hops= (--hops)"
    return None


class Relays:
    """Between which workers the client carries the rows, and why. One for each slot of a split.

    Args:
        parts: the workers, in their order.
        allowed: whether rows may go directly at all.

    """

    def __init__(self, parts: Sequence[Part], *, allowed: bool) -> None:
        self.parts = list(parts)
        self._allowed = allowed
        self._failed: dict[int, tuple[str, float]] = {}  # pair -> why, and when to try again
        self._pauses: dict[int, float] = {}  # pair -> the next pause, where it has failed lately

    def reasons(self) -> dict[int, str]:
        """Why the client carries rows from worker i to worker i + 1, for each i where it has to."""
        found: dict[int, str] = {}
        for i, (part, following) in enumerate(zip(self.parts, self.parts[1:])):  # noqa: B905
            reason = obstacle(part, following) if self._allowed else _NOT_WANTED
            if reason is None and i in self._failed:
                reason = self._failed[i][0]
            if reason is not None:
                found[i] = reason
        return found

    def groups(self, reasons: Container[int]) -> list[list[Part]]:
        """The workers, those together among which rows go directly: all but those of ``reasons``."""
        found: list[list[Part]] = [[]]
        for i, part in enumerate(self.parts):
            found[-1].append(part)
            if i in reasons:
                found.append([])
        return found

    def fail(self, part: Part, reason: str) -> None:
        """Rows did not get from ``part`` to the next worker."""
        i = self.parts.index(part)
        following = host_port(*self.parts[i + 1].seen_at)
        log.warning("rows from %s to %s go through here: %s", part.link.endpoint, following, reason)
        pause = self._pauses.get(i, _FIRST_PAUSE)
        self._failed[i] = reason, time.monotonic() + pause
        self._pauses[i] = min(_FACTOR * pause, _LONGEST_PAUSE)

    def forgive(self) -> bool:
        """Forget failures that are long enough ago; whether there are any."""
        now, n = time.monotonic(), len(self._failed)
        self._failed = {i: (reason, until) for i, (reason, until) in self._failed.items() if now <= until}
        return len(self._failed) < n

    def got_through(self) -> None:
        """Rows came back from all workers: a hop that fails from now on is tried again soon."""
        self._pauses = {i: pause for i, pause in self._pauses.items() if i in self._failed}

"""The time without a link: when to try again, and when to give up."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from sllm.errors import AuthError, BusyError, ClosedError, RemoteError

if TYPE_CHECKING:
    import threading

    import grpc

    from sllm.remote.connection import Remote
    from sllm.targets.base import RemoteStats

__all__ = ["OtherModelError", "Reconnection"]

_LONGEST_PAUSE = 2.0
"""Seconds between attempts to connect again, at most."""


class OtherModelError(RemoteError):
    """The worker has come back with other weights: the text cannot go on."""


class Reconnection:
    """Finds the link of one stream again.

    Args:
        remote: the connection.
        gone: set when the stream is not wanted any more.
        stats: where reconnects and the time without a link are counted.

    """

    FIRST_PAUSE = 0.05
    """Seconds before the first attempt."""

    def __init__(self, remote: Remote, gone: threading.Event, stats: RemoteStats) -> None:
        self._remote = remote
        self._gone = gone
        self._stats = stats
        self._lost_since: float | None = None
        self._spent = 0.0  # seconds without a link, since the last progress and up to the last loss
        self._pause = self.FIRST_PAUSE

    @property
    def lost(self) -> bool:
        """Whether there is no link."""
        return self._lost_since is not None

    def lose(self) -> bool:
        """The link is lost; whether that is news."""
        if self._lost_since is not None:
            return False
        self._lost_since = time.monotonic()
        return True

    def find(self) -> bool:
        """The other side has answered; whether that is news."""
        if self._lost_since is None:
            return False
        seconds = time.monotonic() - self._lost_since
        self._spent += seconds
        self._stats.lost_seconds += seconds
        self._stats.n_reconnects += 1
        self._lost_since = None
        return True

    def progress(self) -> None:
        """Something new has come over the link: the deadline begins anew."""
        self._spent = 0.0
        self._pause = self.FIRST_PAUSE

    def again(
        self, channel: grpc.Channel, trouble: object, *, busy: bool, elsewhere: bool
    ) -> grpc.Channel | None:
        """A channel to try, after a pause; None: the stream is not wanted any more.

        Args:
            channel: the one that failed.
            trouble: why.
            busy: the link is there, but the worker has no place yet.
            elsewhere: where there are several addresses, the one in use is not the first to be tried.

        Raises:
            RemoteError: the deadline has passed.
            ClosedError, AuthError, OtherModelError: there is no use in trying.

        """
        remote = self._remote
        assert self._lost_since is not None
        while True:
            left = remote.deadline - self._spent - (time.monotonic() - self._lost_since)
            if left <= 0:
                raise RemoteError(
                    f"{remote.address.endpoint} was out of reach for {remote.deadline:g} seconds: {trouble}"
                )
            # Jittered, so that the clients of a worker that returns do not all come at once.
            if self._gone.wait(min(self._pause * random.uniform(0.5, 1.0), left)):
                return None
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            if busy:
                return channel  # others may be using it
            try:
                return remote._renew(channel, max(0.2, min(left, remote.timeout, 5.0)), elsewhere=elsewhere)
            except (ClosedError, AuthError, OtherModelError):
                raise
            except (RemoteError, BusyError) as error:
                trouble = str(error)

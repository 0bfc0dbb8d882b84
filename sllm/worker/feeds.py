"""Rows that come from the worker with the layers before: who may bring them, and which request each is for.

A client that has a token says on its own stream which rows are to come, and by whose hands: it registers the
hash of a capability. Whoever shows that one brings the numbers, and nothing more: how much is computed, and
for whom, is what the client has asked for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from sllm.errors import AuthError
from sllm.wire import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.wire.protocol import pb

__all__ = ["Feed", "Feeds"]

_CLAIM_SECONDS = 30.0
"""A capability that nobody has shown for so long is void."""

_BACKLOG = 32
_BACKLOG_BYTES = 1 << 26
"""What may wait: of rows whose request has not come, and of requests whose rows have not come. One message of
any size is taken.
"""


class Feed:
    """Pairs the rows that a client has announced with those that the worker before brings. Both sides come in
    the same order.

    Args:
        submit: called with what was announced and what was brought, one pair at a time. It may block. False:
            the rows are not what was announced; nothing more is taken of that worker.
        on_lost: called once when rows cannot come that were announced, unless the feed was closed. Until any
            are, nobody misses a worker that is gone, as it is when the client has ended all of its streams.

    Attributes:
        user: for the access log: whose sequence it is.

    """

    def __init__(
        self, user: str, submit: Callable[[pb.Rows, pb.Rows], bool], on_lost: Callable[[], object]
    ) -> None:
        self.user = user
        self._submit = submit
        self._on_lost = on_lost
        self._hang_up: Callable[[], object] = lambda: None
        self._changed = threading.Condition()
        self._announced: deque[pb.Rows] = deque()
        self._brought: deque[pb.Rows] = deque()
        self._over = self._gone = False
        self._submitting = threading.Lock()  # pairs keep their order

    def announce(self, asked: pb.Rows) -> None:
        """The client says which rows are to come; blocks while many have not."""
        self._put(self._announced, asked, 0)

    def bring(self, rows: pb.Rows) -> None:
        """Rows have come; blocks while many wait for their request."""
        self._put(self._brought, rows, len(rows.data))

    def _put(self, waiting: deque[pb.Rows], rows: pb.Rows, size: int) -> None:
        def room() -> bool:
            few = len(waiting) < _BACKLOG and sum(len(one.data) for one in waiting) + size <= _BACKLOG_BYTES
            return self._over or not waiting or few

        with self._changed:
            self._changed.wait_for(room)
            if self._over:
                return
            waiting.append(rows)
        self._match()

    def _match(self) -> None:
        """Hand on what has come of what was announced."""
        while True:
            with self._submitting:
                with self._changed:
                    if self._over or not self._announced or not (self._brought or self._gone):
                        return
                    pair = None
                    if self._brought:
                        pair = self._announced.popleft(), self._brought.popleft()
                        self._changed.notify_all()
                fits = pair is not None and self._submit(*pair)
            if not fits and self._end():
                self._on_lost()

    def attach(self, hang_up: Callable[[], object]) -> None:
        """The other worker is there; ``hang_up`` ends its call."""
        with self._changed:
            self._hang_up = hang_up
            over = self._over
        if over:
            hang_up()

    def lose(self) -> None:
        """The other worker will bring no more."""
        with self._changed:
            self._gone = True
        self._match()

    def close(self) -> None:
        """The sequence has ended. More calls do nothing."""
        self._end()

    def _end(self) -> bool:
        """Take nothing more; whether that is news."""
        with self._changed:
            over, self._over = self._over, True
            self._announced.clear()
            self._brought.clear()
            self._changed.notify_all()
        if not over:
            self._hang_up()
        return not over


class Feeds:
    """The feeds that are open, by the hashes of their capabilities. Each is good for one call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._feeds: dict[bytes, tuple[Feed, float]] = {}  # those that nobody has claimed, and until when

    def register(self, digest: bytes, feed: Feed) -> None:
        """Let whoever shows the capability with this SHA-256 bring rows to ``feed``, for a while.

        Raises:
            ValueError: not a SHA-256, or that of a capability which is known already.

        """
        if len(digest) != 32:
            raise ValueError(f"the hash of a capability has {len(digest)} bytes, expected 32")
        with self._lock:
            if digest in self._feeds:
                raise ValueError("the capability is in use already: each is good for one stream")
            self._feeds[digest] = feed, time.monotonic() + _CLAIM_SECONDS

    def drop(self, digest: bytes) -> None:
        """Forget a capability, used or not."""
        with self._lock:
            self._feeds.pop(digest, None)

    def knows(self, header: str | bytes | None) -> bool:
        """Whether an ``authorization`` header carries a capability that is good now. The hash of one is
        looked up, so the time that it takes tells nothing about it.
        """
        with self._lock:
            found = self._feeds.get(auth.capability_digest(header))
            return found is not None and time.monotonic() <= found[1]

    def name_of(self, metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
        """The name of the user whose sequence a call brings rows to; None: of nobody's."""
        with self._lock:
            found = self._feeds.get(auth.capability_digest(dict(metadata).get("authorization")))
            return None if found is None else found[0].user

    def claim(self, header: str | bytes | None) -> Feed:
        """The feed of a capability, which is void from now on.

        Raises:
            AuthError: it is unknown, used, or too old.

        """
        with self._lock:
            found = self._feeds.pop(auth.capability_digest(header), None)
        if found is None or time.monotonic() > found[1]:
            raise AuthError("the capability is unknown, used, or too old")
        return found[0]

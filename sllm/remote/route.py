"""Where one text of a fleet is, and where it goes on when its worker is lost, full, or being shut down."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from sllm.errors import AuthError, BusyError, RemoteError
from sllm.wire.protocol import OtherModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import grpc

    from sllm.remote.fleet import Fleet
    from sllm.remote.link import WorkerLink
    from sllm.targets.base import RemoteStats

__all__ = ["Route"]

log = logging.getLogger("sllm.remote")

_WORTH_CONNECTING = 1.0
"""Seconds that going on elsewhere has to cost more, for a lost worker to be tried again first: it may have
all of the text in memory.
"""

_RECONNECT_SECONDS = 5.0
"""And so long at most."""


class Route:
    """On which worker of a fleet one text is, or one sequence of layers, and where it may go. Its methods
    belong to the thread of the text.

    Args:
        fleet: the workers.
        text: gives the tokens so far; layers have none.
        needs: features that its worker has to have.
        end: gives the length that it may come to.

    Attributes:
        fleet: as given.
        link: to the worker that has it now.

    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        text: Callable[[], Sequence[int]] = tuple,
        needs: Collection[str] = (),
        end: Callable[[], int] = int,
    ) -> None:
        self.fleet = fleet
        self.link = fleet.link
        self._text = text
        self._needs = needs
        self._end = end
        self._tried: set[WorkerLink] = set()  # since something new has come
        self._at_work: WorkerLink | None = None  # counted as one of its texts
        self._began = 0.0
        self._expected: float | None = None  # seconds until the first answer, before it
        self._served_by: WorkerLink | None = None

    # ---- the way of a text

    def begin(self, *, stay: bool = False, again: bool = False) -> None:
        """Choose the worker that a text begins on; ``stay``: where the one before was, if that is up;
        ``again``: it is the same text, which begins anew.
        """
        self._tried.clear()
        if not again:
            self._served_by = None
        if not (stay and self.link in self.fleet.links):
            self.link = self._chosen(fresh=True) or self.fleet.link
        if not self.fleet.is_one:
            self._expected = self.fleet.expected(self.link, self._text())
        self._count()

    def _chosen(self, *, fresh: bool = False, without: Iterable[WorkerLink] = ()) -> WorkerLink | None:
        return self.fleet.choose(
            self._text(), needs=self._needs, n_positions=self._end(), without=without, fresh=fresh
        )

    def _count(self) -> None:
        """Let the text count as one of the worker that has it."""
        if self._at_work is not self.link:
            self._uncount()
            self.fleet.count_text(self.link, 1)
            self._at_work, self._began = self.link, time.monotonic()

    def _uncount(self) -> None:
        if self._at_work is not None:
            self.fleet.count_text(self._at_work, -1)
            self._at_work = None

    def answered(self, stats: RemoteStats) -> None:
        """The worker has answered."""
        if self._served_by is not self.link:
            moved = self._served_by is not None
            stats.n_moves += moved
            if moved or self.link.endpoint not in stats.workers:  # a split begins anew where hops fail
                stats.workers = (*stats.workers, self.link.endpoint)
            self._served_by = self.link

    def first_answer(self) -> None:
        """What a text waits for has come; calls after the first do nothing."""
        expected, self._expected = self._expected, None
        if expected is not None:
            self.fleet.lateness.observe(time.monotonic() - self._began, expected)

    def progress(self) -> None:
        """Something new has come."""
        self._tried.clear()

    def opened(self, n_prompt: int, n_reused: int, prompt_seconds: float) -> None:
        """The worker has computed the text so far, of which it had ``n_reused`` tokens."""
        if not self.fleet.is_one:
            self.fleet.note_prompt(self.link, self._text()[:n_prompt], n_reused, prompt_seconds)

    def end(self) -> None:
        """The text is over. What there is of it stays in the worker's memory for a while."""
        served = self._at_work
        if served is not None and served is self._served_by and not self.fleet.is_one:
            self.fleet.note_text(served, self._text(), time.monotonic() - self._began)
        self._uncount()

    # ---- what streams ask

    def elsewhere(
        self, channel: grpc.Channel | None, refusal: BusyError | None = None
    ) -> grpc.Channel | None:
        """The channel of another worker that may have the text at once; None: there is none.

        Args:
            channel: on which its call was, which has broken.
            refusal: or which the worker has refused for lack of a place.

        """
        if refusal is not None:
            self.fleet.note_full(self.link, refusal)
        if self.fleet.is_one:
            return None
        again = self.link not in self._tried
        self._tried.add(self.link)
        other = self._chosen(without=self._tried)
        if other is None:
            return None
        if refusal is None and again:
            found = self._reconnected(channel, other)
            if found is not None:
                return found
        return self._go(other)

    def _reconnected(self, channel: grpc.Channel | None, other: WorkerLink) -> grpc.Channel | None:
        """A new channel to the worker that is lost, if it is worth waiting for and is there."""
        fleet = self.fleet
        if self._served_by is not self.link or channel is None or fleet.is_draining(self.link):
            return None
        saved = fleet.expected(other, self._text()) - 4 * fleet.standing(self.link).round_trip
        if saved < _WORTH_CONNECTING:
            return None
        try:
            found = self.link.renew(channel, min(saved, _RECONNECT_SECONDS))
        except (RemoteError, BusyError) as error:
            log.debug("%s was tried again: %s", self.link.endpoint, error)
            return None
        fleet.note_found(self.link)
        return found

    def leave(self) -> bool:
        """Go elsewhere from a worker that is being shut down; whether there is another one with a place."""
        if self.fleet.is_one:
            return False
        other = self._chosen(without={self.link, *self._tried})
        if other is None or self.fleet.standing(other).n_left <= 0:
            return False
        self._go(other)
        return True

    def _go(self, link: WorkerLink) -> grpc.Channel:
        log.info("a text goes on from %s to %s", self.link.endpoint, link.endpoint)
        self.link = link
        self._count()
        return link.live()

    def move(self, link: WorkerLink) -> None:
        """The text is on another worker by now."""
        self.link = link
        self._count()

    @property
    def patience(self) -> float:
        """Seconds after which the first answer is late."""
        return self.fleet.lateness.late_after(self._expected or 0.0)

    def rival(self) -> WorkerLink | None:
        """Another worker for the same text; None: there is none."""
        return None if self.fleet.is_one else self._chosen(without={self.link, *self._tried})

    def again(self, channel: grpc.Channel) -> grpc.Channel:
        """The channel to try after a worker had no place: the best one's; ``channel`` where there is one
        worker alone.
        """
        self._tried.clear()
        if self.fleet.is_one:
            return channel
        self.link = self._chosen(fresh=True) or self.link
        self._count()
        return self.link.live()

    def renew(self, failed: grpc.Channel | None, timeout: float, *, elsewhere: bool = False) -> grpc.Channel:
        """A channel in place of one that failed, to this worker or to another one.

        Args:
            failed: the channel that is of no use any more.
            timeout: seconds for each worker.
            elsewhere: where there are several workers, this one is tried last.

        Raises:
            BusyError, RemoteError: none can be reached now; a later attempt may succeed.
            AuthError, OtherModelError: others answer; later attempts are of no use.
            ClosedError: the connection is closed.

        """
        self._tried.clear()
        failures: list[Exception] = []
        for link in self.fleet.order(self.link, elsewhere=elsewhere):
            useless = failed if link is self.link else self.fleet.failed_channel(link)
            try:
                channel = link.renew(useless, timeout)
            except (RemoteError, BusyError) as error:
                failures.append(error)
                continue
            self.fleet.note_found(link)
            self.move(link)
            return channel
        # A worker that may yet answer is a reason to try again.
        final = (AuthError, OtherModelError)
        raise next((f for f in failures if not isinstance(f, final)), failures[-1])

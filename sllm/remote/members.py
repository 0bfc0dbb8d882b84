"""The workers of a fleet and their state: up, lost, being shut down, or with another model; and their
measurements.

A thread of its own keeps trying to reach a worker that does not answer, and ends when it is back.
Measurements (round trip, free places) are requested only when texts begin: an idle connection sends nothing
but gRPC's keepalive.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine.handle import join
from sllm.errors import AuthError, BusyError, ClosedError, RemoteError, SllmError
from sllm.remote.choice import Kept, Standing
from sllm.remote.places import places, places_of_name
from sllm.wire.protocol import OtherModelError, padded, pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

    from sllm.remote.info import WorkerInfo
    from sllm.remote.link import WorkerLink
    from sllm.remote.places import Place
    from sllm.wire.auth import Address

__all__ = ["Member", "Members", "WorkerState"]

log = logging.getLogger("sllm.remote")

_LATE_SECONDS = 0.5
"""So much later than the first one that answers, a worker may answer for connecting to wait for it."""

_FRESH_SECONDS = 1.0
"""Figures are asked for anew after so long, when a text begins."""

_STALE_SECONDS = 10.0
"""And after so long the text waits for them, for about a round trip."""

_LOOK_TIMEOUT = 5.0
"""Seconds for a worker to say what its figures are."""

_ATTEMPT_SECONDS = 5.0
"""Seconds for one of several workers to be reached, as for one whose link is renewed."""

_FIRST_PAUSE, _LONGEST_PAUSE, _FINAL_PAUSE = 0.05, 5.0, 30.0
"""Seconds between attempts to find a worker again: the first, the longest, and where it has another model or
refuses the token, which somebody has to mend.
"""

_NAME_SECONDS = 30.0
"""A name is looked up again after so long at the earliest, as gRPC does it."""


@dataclass(frozen=True)
class WorkerState:
    """The state of one of a connection's workers.

    Attributes:
        endpoint: ``HOST:PORT``.
        state: ``"up"``, ``"draining"`` (it is being shut down), ``"lost"`` (it does not answer), ``"other"``
            (it has another model) or ``"same"`` (another address of a worker that is there already).
        reason: why it is not up.
        round_trip: seconds; None: not measured.
        n_free: texts that it could begin at once, by its last report; None: unknown.
        n_texts: texts of this connection on it.
        info: what it offers; None: it has not answered yet.

    """

    endpoint: str
    state: str
    reason: str
    round_trip: float | None
    n_free: int | None
    n_texts: int
    info: WorkerInfo | None


class Member:
    """A worker of a fleet.

    Attributes:
        place: where it is.
        link: to it.
        standing: what is known of it.
        state: see :class:`WorkerState`.
        error: why it is not up.
        failed: a channel of the link that is of no use; None: the one there is may be.
        leaving: its name in DNS does not stand for it any more; texts that are there may end.

    """

    def __init__(self, place: Place, link: WorkerLink) -> None:
        self.place = place
        self.link = link
        self.standing = Standing()
        self.state = "lost"
        self.error: Exception | None = None
        self.failed: grpc.Channel | None = None
        self.leaving = False
        self._instance = 0  # which process it is, as far as is known
        self.looking = False  # a call for its figures is under way
        self.seeker: threading.Thread | None = None

    @property
    def is_up(self) -> bool:
        """Whether it may have new texts."""
        return self.state == "up" and not self.leaving

    def enter(self, *, is_twin: bool) -> None:
        """It has answered; ``is_twin``: by another address it is there already."""
        info = self.link.info
        if info.instance == 0 or info.instance != self._instance:  # it has been started anew
            self.standing.kept, self._instance = Kept(info.sessions), info.instance
        self.standing.n_places = max(1, info.sessions)
        self.state, self.error = ("same" if is_twin else "up"), None

    def leave(self, error: Exception) -> None:
        """It cannot be used."""
        self.error, self.state = error, "lost"
        if isinstance(error, OtherModelError):  # next time it is to be asked anew
            self.state, self.failed = "other", self.link.channel

    def shown(self) -> WorkerState:
        """What is known of it."""
        standing = self.standing
        return WorkerState(
            self.link.endpoint,
            self.state,
            "" if self.error is None else str(self.error),
            standing.round_trip or None,
            None if standing.n_free is None else max(0, standing.n_left),
            standing.n_ours,
            getattr(self.link, "info", None),
        )


class Members:
    """The workers of a fleet. Any number of threads may use it.

    Args:
        addresses: of the workers.
        timeout: seconds for connecting.
        make: makes the link to the worker at a place.

    Attributes:
        all: the workers, in the order of the list; names may change it.
        changed: held while they change; notified after it.

    """

    def __init__(
        self, addresses: Sequence[Address], timeout: float, make: Callable[[Place], WorkerLink]
    ) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._timeout = timeout
        self._make = make
        self._pid = os.getpid()
        self._over = threading.Event()
        self._addresses = list(dict.fromkeys(addresses))
        self._model: WorkerInfo | None = None  # what all have to offer; None: not known yet
        self._looked_up = time.monotonic()  # the names
        self._looker: threading.Thread | None = None
        found = [place for address in self._addresses for place in places(address)]
        self.all = [Member(place, make(place)) for place in found]

    @property
    def is_one(self) -> bool:
        """Whether there is one worker alone."""
        return len(self.all) == 1

    def of(self, link: WorkerLink) -> Member | None:
        """The worker of a link; None: it has left."""
        return next((m for m in self.all if m.link is link), None)

    # ---- connecting

    def connect(self) -> Member:
        """Connect to the workers; the first one that can be used.

        Those that do not answer, or later than others, are looked for.

        Raises:
            AuthError, BusyError, RemoteError: none of them can be used.
            OtherModelError: of those that answer, one has another model than the others.

        """
        until = time.monotonic() + self._timeout
        if self.is_one:
            only = self.all[0]
            only.link.renew(None, self._timeout)
            self._model = only.link.info
            self.enter(only)
            return only
        for member in self.all:
            self.seek(member, until)
        with self.changed:
            self.changed.wait_for(lambda: self._any_up() or self._all_tried(), self._timeout)
            self.changed.wait_for(self._all_tried, min(_LATE_SECONDS, max(0.0, until - time.monotonic())))
            up = [m for m in self.all if m.state == "up"]
            if not up:
                raise _none_answers(self.all)
            return self._settled(up)

    def _any_up(self) -> bool:
        return any(m.state == "up" for m in self.all)

    def _all_tried(self) -> bool:
        return all(m.state != "lost" or m.error is not None for m in self.all)

    def _settled(self, up: list[Member]) -> Member:
        """Find the model that all are to have among the workers that have answered; one that has it."""
        votes = [sum(_difference(m.link.info, other.link.info) == "" for other in up) for m in up]
        first = up[votes.index(max(votes))]  # the first of the list, where there are as many
        for member in up:
            reason = _difference(first.link.info, member.link.info)
            if not reason:
                continue
            error = OtherModelError(
                f"{member.link.endpoint} has {reason} ({member.link.info.model_name}) than"
                f" {first.link.endpoint} ({first.link.info.model_name})"
            )
            if member.place.name is None:  # somebody has put it into the list
                raise OtherModelError(f"{error}: all workers of a list need the same; take one of them out")
            member.leave(error)
            self.seek(member)
        self._model = first.link.info
        for member in self.all:
            if member.error is not None:
                _say(member)
        return first

    def check(self, link: WorkerLink, info: WorkerInfo) -> None:
        """Raise OtherModelError where a worker that answers is not one of this fleet."""
        if self._model is None:
            return
        if self.is_one:
            reason = "" if info.model_id == self._model.model_id else "another model"
        else:
            reason = _difference(self._model, info)
        if reason:
            raise OtherModelError(f"{link.endpoint} now has {reason}: {info.model_name}")

    def enter(self, member: Member) -> None:
        """A worker has answered.

        Raises:
            OtherModelError: it is not one of this fleet.

        """
        with self.changed:
            info = member.link.info
            self.check(member.link, info)  # what is expected may not have been known when it answered
            others = {m.link.info.instance for m in self.all if m is not member and m.is_up}
            member.enter(is_twin=info.instance != 0 and info.instance in others)
            self.changed.notify_all()

    def leave(self, member: Member, error: Exception) -> None:
        """A worker that was up cannot be used any more. It is looked for."""
        with self.changed:
            was_up = member.state == "up"
            member.leave(error)
            self.changed.notify_all()
            twins = [m for m in self.all if m.state == "same"] if was_up else []
            for twin in twins:  # it may be the other way that is lost
                twin.state = "lost"
        for one in (member, *twins):
            self.seek(one)

    # ---- looking for workers

    def seek(self, member: Member, first_until: float | None = None) -> None:
        """Look for a worker until it is up, on a thread of its own.

        Args:
            member: the worker.
            first_until: when the first attempt has to be over, by ``time.monotonic()``; it begins at once.

        """
        with self.changed:
            if member.seeker is not None or self._over.is_set() or self._pid != os.getpid():
                return
            member.seeker = threading.Thread(
                target=self._seek, args=(member, first_until), name="sllm-fleet", daemon=True
            )
            member.seeker.start()

    def _seek(self, member: Member, first_until: float | None) -> None:
        pause = _FIRST_PAUSE if first_until is None else 0.0
        while not self._over.wait(pause * random.uniform(0.5, 1.0)):
            left = _ATTEMPT_SECONDS if first_until is None else first_until - time.monotonic()
            first_until = None
            if self._found(member, left):
                return
            final = isinstance(member.error, (AuthError, OtherModelError))
            pause = _FINAL_PAUSE if final else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        with self.changed:
            member.seeker = None

    def _found(self, member: Member, seconds: float) -> bool:
        """Whether a worker need not be looked for any more, after one more attempt."""
        with self.changed:
            if member.state in ("up", "same") or member not in self.all:
                member.seeker = None
                return True
        before = member.link.channel
        try:
            # Not for long: close() may have to wait for it.
            seconds = max(0.1, min(seconds, self._timeout, _ATTEMPT_SECONDS))
            channel = member.link.renew(member.failed, seconds)
            draining = self._look(member, is_new=channel is not before)
            with self.changed:
                if draining:
                    member.state, member.error = "draining", RemoteError("it is being shut down")
                    self.changed.notify_all()
                    return False
                self.enter(member)
                member.seeker = None
                return True
        except (SllmError, ValueError) as error:
            self._note_error(member, error)
            return False

    def _note_error(self, member: Member, error: Exception) -> None:
        with self.changed:
            if self._over.is_set():
                return
            news = member.error is None or type(member.error) is not type(error)
            member.leave(error)
            self.changed.notify_all()
        if news and self._model is not None:
            _say(member)

    # ---- figures

    def _look(self, member: Member, *, is_new: bool) -> bool:
        """Ask a worker for its figures and wait for them; whether it is being shut down.

        Args:
            member: the worker.
            is_new: it has just answered on a new channel, which is enough where it has no figures.

        Raises:
            RemoteError, BusyError: it does not answer.

        """
        began = time.monotonic()
        n_ours = member.standing.n_ours
        try:
            reply = member.link.call("Status", padded(pb.StatusRequest()), pb.StatusReply, _LOOK_TIMEOUT)
        except (RemoteError, BusyError):
            if is_new:
                return False
            member.failed = member.link.channel
            raise
        return self._take_figures(member, reply, began, n_ours)

    def _take_figures(self, member: Member, reply: pb.StatusReply, began: float, n_ours: int) -> bool:
        now = time.monotonic()
        n_free = reply.free if reply.HasField("free") else None
        with self.changed:
            member.standing.observe_look(now - began, n_free, reply.queued, n_ours, now)
            self.changed.notify_all()
        return reply.draining

    def refresh(self) -> None:
        """See to it that the figures of all workers that are up are not too old, and that names are looked up
        now and then.
        """
        self.follow_names()
        now = time.monotonic()
        with self.changed:
            up = [m for m in self.all if m.is_up]
            asked = [m for m in up if now - m.standing.looked > _FRESH_SECONDS and not m.looking]
            for member in asked:
                member.looking = True
        for member in asked:
            self._ask(member, now)
        stale = [m for m in up if now - m.standing.looked > _STALE_SECONDS]
        if stale:
            nearest = min((m.standing.round_trip for m in up if m.standing.round_trip), default=0.1)
            with self.changed:
                self.changed.wait_for(lambda: not any(m.looking for m in stale), 2 * nearest + 0.01)

    def _ask(self, member: Member, began: float) -> None:
        n_ours = member.standing.n_ours

        def take(reply: pb.StatusReply | None) -> None:
            with self.changed:
                member.looking = False
                member.standing.looked = time.monotonic()
                self.changed.notify_all()
            if reply is not None and self._take_figures(member, reply, began, n_ours):
                self.drain(member)

        try:
            member.link.ask("Status", padded(pb.StatusRequest()), pb.StatusReply, _LOOK_TIMEOUT, take)
        except ClosedError:
            member.looking = False

    def drain(self, member: Member) -> None:
        """A worker is being shut down, and is looked for."""
        with self.changed:
            if member.state != "up":
                return
            log.info("%s is being shut down", member.link.endpoint)
            member.state, member.error = "draining", RemoteError("it is being shut down")
        self.seek(member)

    # ---- names

    def follow_names(self) -> None:
        """Look up again the names that have several addresses, on a thread of its own, if that was a while
        ago.
        """
        with self.changed:
            now = time.monotonic()
            named = any(m.place.name is not None for m in self.all)
            busy = self._looker is not None or self._over.is_set()
            if not named or busy or now - self._looked_up < _NAME_SECONDS:
                return
            self._looked_up = now
            self._looker = threading.Thread(target=self._follow_names, name="sllm-fleet", daemon=True)
            self._looker.start()

    def _follow_names(self) -> None:
        try:
            names = {m.place.name for m in self.all} - {None}
            found = [places_of_name(address) for address in self._addresses if address.host in names]
            if not all(found):  # DNS itself may be out of order
                return
            now = {place.address: place for several in found for place in several}
            with self.changed:
                if self._over.is_set():
                    return
                known = {m.place.address for m in self.all}
                for member in self.all:
                    member.leaving = member.place.name is not None and member.place.address not in now
                gone = [m for m in self.all if m.leaving and m.state == "lost"]
                new = [
                    Member(place, self._make(place)) for address, place in now.items() if address not in known
                ]
                self.all = [m for m in self.all if m not in gone] + new
            for member in gone:
                member.link.close()
            for member in new:
                self.seek(member)
        finally:
            with self.changed:
                self._looker = None

    # ---- the end

    def stop(self) -> list[threading.Thread]:
        """Let nothing new begin, and cancel the calls; the threads that end now."""
        self._over.set()
        with self.changed:
            threads = [m.seeker for m in self.all if m.seeker is not None]
            threads += [] if self._looker is None else [self._looker]
            members = list(self.all)
            self.changed.notify_all()
        for member in members:
            member.link.stop()
        return threads

    def close(self, threads: Sequence[threading.Thread]) -> None:
        """Wait for the threads of :meth:`stop`, and hang up; the streams are to be over."""
        for thread in threads:
            join(thread)
        for member in self.all:
            member.link.close()


def _say(member: Member) -> None:
    log.warning("%s is left out: %s", member.link.endpoint, member.error)


def _difference(first: WorkerInfo, other: WorkerInfo) -> str:
    """How what a worker offers is another thing than what the first does; nothing where it is not."""
    if other.model_id != first.model_id:
        return "another model"
    if (other.layers is None) != (first.layers is None):
        return "texts in place of layers" if other.layers is None else "layers in place of texts"
    if other.layers is not None and first.layers is not None:
        theirs, ours = other.layers, first.layers
        ranges = [(one.start, one.stop, one.fixed, one.output) for one in (theirs, ours)]
        if ranges[0] != ranges[1]:
            return f"other layers ([{theirs.start}, {theirs.stop}))"
    return "" if other.vocab_fingerprint == first.vocab_fingerprint else "another vocabulary"


def _none_answers(members: Sequence[Member]) -> Exception:
    """What connecting to a list fails with where none of its workers can be used."""
    slow = RemoteError("no answer")
    errors = [m.error or slow for m in members]
    text = "; ".join(
        str(e) if m.link.endpoint in str(e) else f"{m.link.endpoint}: {e}"
        for m, e in zip(members, errors, strict=True)
    )
    kind: Callable[[str], Exception] = RemoteError
    if all(isinstance(e, AuthError) for e in errors):
        kind = AuthError
    elif all(isinstance(e, BusyError) for e in errors):
        kind = BusyError
    return kind(f"none of the {len(members)} workers can be used: {text}")

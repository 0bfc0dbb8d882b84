"""Several workers with the same model as one: which of them are there, and which takes a text.

Every worker has a link of its own, and every text a :class:`~sllm.remote.route.Route`, which says on which of
them it is. A text begins where its first token is expected soonest (:mod:`sllm.remote.choice`). Of a worker
that is lost, or that says that it is being shut down, texts go on elsewhere at once: a position and a seed
decide every token, so it is the same text. A worker that is lost is looked for on a thread of its own until
it is back.

gRPC has policies for balancing the load among the addresses of one channel, and they were looked at first.
They are not used between workers, because

- ``round_robin`` picks the next address for every call, whatever the round trip, the free places and what is
  in memory, and does not tell which one: a text that has to leave a worker could not say so;
- ``weighted_round_robin`` takes its weights from ORCA reports, which gRPC for Python does not send;
- ``ring_hash`` keeps calls together by the hash of one header, where it is the longest common beginning of
  texts that counts;
- hedging by service config is not there in gRPC's C core, and retries end with the first answer of a stream,
  which is where ours begin;
- client-side health checks watch ``grpc.health.v1`` without the token, which a worker does not allow: each
  would hold one of its threads.

What gRPC does do: it looks names up and connects to the first address of a worker that answers
(:mod:`sllm.remote.places` says where that ends), keeps connections alive, and finds those that are dead.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.handle import join
from sllm.errors import AuthError, BusyError, ClosedError, RemoteError, SllmError
from sllm.remote import choice
from sllm.remote.choice import Kept, Lateness, Standing
from sllm.remote.link import WorkerLink
from sllm.remote.places import Place, places, places_of_name
from sllm.wire.protocol import OtherModelError, padded, pb

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import grpc

    from sllm.remote.info import WorkerInfo
    from sllm.remote.link import LiveStream
    from sllm.wire.auth import Address

__all__ = ["Fleet", "WorkerState"]

log = logging.getLogger("sllm.remote")

_LATE_SECONDS = 0.5
"""So much later than the first one that answers, a worker may answer for connecting to wait for it."""

_FRESH_SECONDS = 1.0
"""What is known of free places is asked for anew after so long, when a text begins."""

_STALE_SECONDS = 10.0
"""And after so long the text waits for it, for about a round trip."""

_LOOK_TIMEOUT = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE, _FINAL_PAUSE = 0.05, 5.0, 30.0
"""Seconds between attempts to find a worker again: the first, the longest, and where it has another model or
refuses the token, which somebody has to mend.
"""

_NAME_SECONDS = 30.0
"""A name is looked up again after so long at the earliest, as gRPC does it."""


@dataclass(frozen=True)
class WorkerState:
    """What a connection knows of one of its workers.

    Attributes:
        endpoint: ``HOST:PORT``.
        state: ``"up"``, ``"draining"`` (it is being shut down), ``"lost"`` (it does not answer), ``"other"``
            (it has another model) or ``"same"`` (another address of a worker that is there already).
        reason: why it is not up.
        round_trip: seconds; None: not measured.
        n_free: texts that it could begin at once, as far as is known; None: not known.
        n_texts: texts of this connection that are there.
        info: what it offers; None: it has not answered yet.

    """

    endpoint: str
    state: str
    reason: str
    round_trip: float | None
    n_free: int | None
    n_texts: int
    info: WorkerInfo | None


class _Member:
    """A worker of the fleet."""

    def __init__(self, place: Place, link: WorkerLink) -> None:
        self.place = place
        self.link = link
        self.standing = Standing()
        self.state = "lost"
        self.error: Exception | None = None  # why it is not up
        self.failed: grpc.Channel | None = None  # a channel of the link that is of no use
        self.leaving = False  # its name does not stand for it any more
        self.looking = False  # a call for its figures is under way
        self.instance = 0  # the one that is known
        self.seeker: threading.Thread | None = None

    @property
    def is_up(self) -> bool:
        return self.state == "up" and not self.leaving


class Fleet:
    """Links to one worker or to several with the same model. Any number of threads may use it.

    Args:
        addresses: of the workers.
        timeout: seconds for connecting.
        deadline: seconds without a link after which a stream is given up.
        keepalive: seconds of silence after which a worker is asked whether it is still there.

    Raises:
        AuthError, BusyError, RemoteError: none of the workers can be used.
        OtherModelError: of those that answer, one has another model than the others.

    Attributes:
        timeout, deadline: as given.
        streams: those that are running; :meth:`close` ends them.
        closed: whether :meth:`close` was called.
        rng: for choices between workers that are alike.
        lateness: how much later than expected first answers come.

    """

    def __init__(
        self, addresses: Sequence[Address], *, timeout: float, deadline: float, keepalive: float
    ) -> None:
        self.timeout, self.deadline = timeout, deadline
        self.streams: set[LiveStream] = set()
        self.closed = False
        self.rng = random.Random()
        self.lateness = Lateness()
        self.pid = os.getpid()
        self._keepalive = keepalive
        self._over = threading.Event()
        self._changed = threading.Condition(threading.RLock())  # over all that follows
        self._addresses = list(dict.fromkeys(addresses))
        self._model: WorkerInfo | None = None  # what all have to offer; None: not known yet
        self._looked_up = time.monotonic()  # the names
        self._looker: threading.Thread | None = None
        self._members = [self._member(place) for address in self._addresses for place in places(address)]
        self._recent = self._members[0]
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _member(self, place: Place) -> _Member:
        link = WorkerLink(
            place.address,
            timeout=self.timeout,
            deadline=self.deadline,
            keepalive=self._keepalive,
            streams=self.streams,
            server_name=place.name,
            check=self._check,
        )
        return _Member(place, link)

    @property
    def is_one(self) -> bool:
        """Whether there is one worker alone."""
        return len(self._members) == 1

    @property
    def link(self) -> WorkerLink:
        """To the worker that took a text last, or to another one while that is lost."""
        with self._changed:
            if not self._recent.is_up:
                self._recent = next((m for m in self._members if m.is_up), self._recent)
            return self._recent.link

    @property
    def links(self) -> list[WorkerLink]:
        """To all workers that are up."""
        with self._changed:
            return [m.link for m in self._members if m.state == "up"]

    @property
    def offers(self) -> list[WorkerInfo]:
        """What the workers offer that are up, at least one: where none is, that which was in use."""
        return [link.info for link in self.links] or [self.link.info]

    def states(self) -> list[WorkerState]:
        """What is known of each worker."""
        with self._changed:
            return [
                WorkerState(
                    m.link.endpoint,
                    m.state,
                    "" if m.error is None else str(m.error),
                    m.standing.round_trip or None,
                    None if m.standing.n_free is None else max(0, m.standing.n_left),
                    m.standing.n_ours,
                    getattr(m.link, "info", None),
                )
                for m in self._members
            ]

    # ---- connecting

    def _connect(self) -> None:
        until = time.monotonic() + self.timeout
        if self.is_one:
            self._recent.link.renew(None, self.timeout)
            self._model = self._recent.link.info
            self._enter(self._recent)
            return
        for member in self._members:
            self._start_seeking(member, until)
        with self._changed:
            self._changed.wait_for(lambda: self._n_up() or self._all_tried(), self.timeout)
            self._changed.wait_for(self._all_tried, min(_LATE_SECONDS, max(0.0, until - time.monotonic())))
            up = [m for m in self._members if m.state == "up"]
            if not up:
                raise _none_answers(self._members)
            self._settle(up)
            self._changed.notify_all()

    def _n_up(self) -> int:
        return sum(m.state == "up" for m in self._members)

    def _all_tried(self) -> bool:
        return all(m.state != "lost" or m.error is not None for m in self._members)

    def _settle(self, up: list[_Member]) -> None:
        """Find the model that all are to have among the workers that have answered."""
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
            log.warning("%s is left out: %s", member.link.endpoint, error)
            self._leave_out(member, error)
            self._start_seeking(member)
        self._model = first.link.info
        self._recent = first
        for member in self._members:
            if member.state == "lost" and member.error is not None:
                log.warning("%s is left out: %s", member.link.endpoint, member.error)

    def _check(self, link: WorkerLink, info: WorkerInfo) -> None:
        """Raise OtherModelError where a worker that answers is not one of this fleet."""
        if self._model is None:
            return
        if self.is_one:
            reason = "" if info.model_id == self._model.model_id else "another model"
        else:
            reason = _difference(self._model, info)
        if reason:
            raise OtherModelError(f"{link.endpoint} now has {reason}: {info.model_name}")

    def _enter(self, member: _Member) -> None:
        """A worker has answered; raises OtherModelError where it is not one of this fleet."""
        with self._changed:
            info = member.link.info
            self._check(member.link, info)  # what is expected may not have been known when it answered
            instances = {m.link.info.instance for m in self._members if m is not member and m.is_up}
            if info.instance == 0 or info.instance != member.instance:  # it has been started anew
                member.standing.kept, member.instance = Kept(info.sessions), info.instance
            member.standing.n_places = max(1, info.sessions)
            is_twin = info.instance != 0 and info.instance in instances
            member.state, member.error = ("same" if is_twin else "up"), None
            self._changed.notify_all()

    # ---- looking for workers

    def _start_seeking(self, member: _Member, first_until: float | None = None) -> None:
        """Look for a worker until it is back, on a thread of its own.

        Args:
            member: the worker.
            first_until: when the first attempt has to be over, by ``time.monotonic()``; it begins at once.

        """
        with self._changed:
            if member.seeker is not None or self._over.is_set() or self.pid != os.getpid():
                return
            thread = threading.Thread(
                target=self._seek, args=(member, first_until), name="sllm-fleet", daemon=True
            )
            member.seeker = thread
            thread.start()

    def _seek(self, member: _Member, first_until: float | None) -> None:
        pause = _FIRST_PAUSE if first_until is None else 0.0
        while not self._over.wait(pause * random.uniform(0.5, 1.0)):
            with self._changed:
                if member.state in ("up", "same") or member not in self._members:
                    member.seeker = None
                    return
            left = _LOOK_TIMEOUT if first_until is None else first_until - time.monotonic()
            first_until = None
            try:
                # Half the time: close() may have to wait for it.
                member.link.renew(member.failed, max(0.1, min(left, self.timeout / 2)))
                if self._look(member):
                    member.state = "draining"
                    self._notify()
                else:
                    with self._changed:
                        self._enter(member)
                        member.seeker = None
                    return
            except (SllmError, ValueError) as error:
                self._note_error(member, error)
            final = isinstance(member.error, (AuthError, OtherModelError))
            pause = _FINAL_PAUSE if final else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        with self._changed:
            member.seeker = None

    def _note_error(self, member: _Member, error: Exception) -> None:
        with self._changed:
            if self._over.is_set():
                return
            news = member.error is None or type(member.error) is not type(error)
            self._leave_out(member, error)
        if news and self._model is not None:
            log.warning("%s is left out: %s", member.link.endpoint, error)

    def _leave_out(self, member: _Member, error: Exception) -> None:
        with self._changed:
            member.error = error
            member.state = "lost"
            if isinstance(error, OtherModelError):
                # Next time it is to be asked anew.
                member.state, member.failed = "other", member.link.channel
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _look(self, member: _Member) -> bool:
        """Ask a worker for its figures and wait for them; whether it is being shut down.

        Raises:
            RemoteError: it was up to now being shut down, and does not answer any more.

        """
        began = time.monotonic()
        n_ours = member.standing.n_ours
        try:
            reply = member.link.call("Status", padded(pb.StatusRequest()), pb.StatusReply, _LOOK_TIMEOUT)
        except (RemoteError, BusyError):
            if member.state == "draining":
                member.failed = member.link.channel
                raise
            return False  # it has answered Info, which is enough
        return self._take_figures(member, reply, began, n_ours)

    def _take_figures(self, member: _Member, reply: pb.StatusReply, began: float, n_ours: int) -> bool:
        now = time.monotonic()
        n_free = reply.free if reply.HasField("free") else None
        with self._changed:
            member.standing.observe_look(now - began, n_free, reply.queued, n_ours, now)
            self._changed.notify_all()
        return reply.draining

    def _look_at_all(self) -> None:
        """See to it that the figures of all workers that are up are not too old."""
        now = time.monotonic()
        with self._changed:
            up = [m for m in self._members if m.is_up]
            asked = [m for m in up if now - m.standing.looked > _FRESH_SECONDS and not m.looking]
            for member in asked:
                member.looking = True
        for member in asked:
            self._ask(member, now)
        stale = [m for m in up if now - m.standing.looked > _STALE_SECONDS]
        if stale:
            nearest = min((m.standing.round_trip for m in up if m.standing.round_trip), default=0.1)
            with self._changed:
                self._changed.wait_for(lambda: not any(m.looking for m in stale), 2 * nearest + 0.01)

    def _ask(self, member: _Member, began: float) -> None:
        n_ours = member.standing.n_ours

        def take(reply: pb.StatusReply | None) -> None:
            with self._changed:
                member.looking = False
                member.standing.looked = time.monotonic()
                self._changed.notify_all()
            if reply is not None and self._take_figures(member, reply, began, n_ours):
                self.note_draining(member.link)

        try:
            member.link.ask("Status", padded(pb.StatusRequest()), pb.StatusReply, _LOOK_TIMEOUT, take)
        except ClosedError:
            member.looking = False

    def _look_up_again(self) -> None:
        """Look the names up, on a thread of its own, if that was a while ago."""
        with self._changed:
            now = time.monotonic()
            named = any(m.place.name is not None for m in self._members)
            busy = self._looker is not None or self._over.is_set()
            if not named or busy or now - self._looked_up < _NAME_SECONDS:
                return
            self._looked_up = now
            self._looker = threading.Thread(target=self._follow_names, name="sllm-fleet", daemon=True)
            self._looker.start()

    def _follow_names(self) -> None:
        try:
            names = {m.place.name for m in self._members} - {None}
            found = [places_of_name(address) for address in self._addresses if address.host in names]
            if not all(found):  # DNS itself may be out of order
                return
            now = {place.address: place for several in found for place in several}
            with self._changed:
                if self._over.is_set():
                    return
                known = {m.place.address for m in self._members}
                for member in self._members:
                    member.leaving = member.place.name is not None and member.place.address not in now
                gone = [m for m in self._members if m.leaving and m.state == "lost"]
                new = [self._member(place) for address, place in now.items() if address not in known]
                self._members = [m for m in self._members if m not in gone] + new
            for member in gone:
                member.link.close()
            for member in new:
                self._start_seeking(member)
        finally:
            with self._changed:
                self._looker = None

    # ---- what becomes known on the way

    def _of(self, link: WorkerLink) -> _Member | None:
        return next((m for m in self._members if m.link is link), None)

    def standing(self, link: WorkerLink) -> Standing:
        """What is known of a worker."""
        with self._changed:
            member = self._of(link)
            return Standing() if member is None else member.standing

    def note_lost(self, link: WorkerLink, channel: grpc.Channel | None, reason: str) -> None:
        """A call over this channel has broken. The worker is looked for, and gets no new texts before."""
        with self._changed:
            member = self._of(link)
            if self.is_one or member is None or link.channel is not channel:
                return
            if member.state == "up":
                log.info("%s is lost: %s", link.endpoint, reason)
                member.state, member.error = "lost", RemoteError(reason)
            member.failed = channel
        self._start_seeking(member)
        self._look_up_again()

    def note_found(self, link: WorkerLink) -> None:
        """A worker has answered on a new channel."""
        member = self._of(link)
        if member is not None and member.state not in ("up", "draining"):
            self._enter(member)

    def note_draining(self, link: WorkerLink) -> None:
        """A worker has said that it is being shut down."""
        with self._changed:
            member = self._of(link)
            if self.is_one or member is None or member.state != "up":
                return
            log.info("%s is being shut down", link.endpoint)
            member.state, member.error = "draining", RemoteError("it is being shut down")
        self._start_seeking(member)

    def note_other(self, link: WorkerLink, error: OtherModelError) -> None:
        """A worker has another model by now; it was started anew, and gRPC has connected again by itself."""
        with self._changed:
            member = self._of(link)
            if self.is_one or member is None or member.state != "up":
                return
            log.warning("%s is left out: %s", link.endpoint, error)
            self._leave_out(member, error)
        self._start_seeking(member)

    def note_full(self, link: WorkerLink, refusal: BusyError) -> None:
        """A worker has refused a text for lack of a place."""
        with self._changed:
            self.standing(link).full_until = time.monotonic() + (refusal.retry_after or _FRESH_SECONDS)

    # ---- choosing

    def choose(
        self,
        text: Sequence[int],
        *,
        needs: Collection[str] = (),
        n_positions: int = 0,
        without: Iterable[WorkerLink] = (),
        fresh: bool = False,
    ) -> WorkerLink | None:
        """The worker that is to take a text.

        Args:
            text: its tokens so far.
            needs: features that the worker has to have.
            n_positions: the text may become so long; workers with less are taken where no other is.
            without: workers that are not to.
            fresh: what is known of the workers may be asked for before.

        Returns:
            None: there is none now.

        """
        if fresh and not self.is_one:
            self._look_up_again()
            self._look_at_all()
        tokens = np.array(text, dtype=np.int32)
        skip = set(without)
        with self._changed:
            fit = [m for m in self._members if m.is_up and m.link not in skip]
            fit = [m for m in fit if _fits(m.link.info, len(tokens), needs)]
            fit = [m for m in fit if m.link.info.n_ctx >= n_positions] or fit
            at = choice.best([m.standing for m in fit], tokens, time.monotonic(), self.rng)
            if at is None:
                return None
            self._recent = fit[at]
            return fit[at].link

    def expected(self, link: WorkerLink, text: Sequence[int]) -> float:
        """Seconds until the first token that a worker would write after ``text``."""
        with self._changed:
            tokens = np.array(text, dtype=np.int32)
            return choice.expected(self.standing(link), tokens, time.monotonic())

    def order(self, link: WorkerLink, *, elsewhere: bool) -> list[WorkerLink]:
        """All workers, in the order in which one is to be tried whose stream has failed on ``link``: that one
        first, or last where it was not even answered; those that are being shut down, or have another model,
        after all others.
        """
        with self._changed:
            rank = {"up": 0, "lost": 0, "same": 1, "draining": 2, "other": 3}
            at = next((i for i, m in enumerate(self._members) if m.link is link), 0) + elsewhere
            turned = [*self._members[at:], *self._members[:at]]
            return [m.link for m in sorted(turned, key=lambda m: rank[m.state])]

    def failed_channel(self, link: WorkerLink) -> grpc.Channel | None:
        """The channel of a link that is known to be of no use."""
        member = self._of(link)
        return None if member is None else member.failed

    def is_draining(self, link: WorkerLink) -> bool:
        """Whether a worker is being shut down."""
        member = self._of(link)
        return member is not None and member.state == "draining"

    # ---- calls

    def call(
        self, name: str, request: Any, reply: Any, timeout: float | None, text: Sequence[int] = ()
    ) -> Any:
        """One unary call of the service, about ``text``, on the best worker for that; on another one where
        that is lost or has no place. Raises as :meth:`WorkerLink.call`.
        """
        if self.is_one:
            return self.link.call(name, request, reply, timeout)
        tried: list[WorkerLink] = []
        first: Exception | None = None
        while (link := self.choose(text, without=tried, fresh=not tried)) is not None:
            tried.append(link)
            channel = link.channel
            try:
                return link.call(name, request, reply, timeout)
            except BusyError as error:
                self.note_full(link, error)
                first = first or error
            except RemoteError as error:
                if isinstance(error, AuthError):
                    raise
                self.note_lost(link, channel, str(error))
                first = first or error
        if first is not None:
            raise first
        return self.link.call(name, request, reply, timeout)

    # ---- the end

    def close(self) -> None:
        """Cancel the calls, end the streams and hang up. More calls do nothing."""
        if self.pid != os.getpid():
            return
        self._over.set()
        with self._changed:
            self.closed = True
            members = list(self._members)
            threads = [m.seeker for m in members if m.seeker is not None]
            threads += [] if self._looker is None else [self._looker]
            self._changed.notify_all()
        for member in members:
            member.link.stop()
        streams = list(self.streams)
        for stream in streams:
            stream.stop()
        for stream in streams:
            stream.join()
        for thread in threads:
            join(thread)
        for member in members:
            member.link.close()


def _fits(info: WorkerInfo, n_tokens: int, needs: Collection[str]) -> bool:
    return set(needs) <= set(info.features) and (info.layers is not None or n_tokens <= info.max_prompt)


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


def _none_answers(members: Sequence[_Member]) -> Exception:
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

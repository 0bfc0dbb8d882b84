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
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.errors import AuthError, BusyError, RemoteError
from sllm.remote import choice
from sllm.remote.choice import Lateness, Standing
from sllm.remote.link import WorkerLink
from sllm.remote.members import Members

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    import grpc

    from sllm.remote.info import WorkerInfo
    from sllm.remote.link import LiveStream
    from sllm.remote.members import WorkerState
    from sllm.remote.places import Place
    from sllm.wire.auth import Address
    from sllm.wire.protocol import OtherModelError

__all__ = ["Fleet"]

log = logging.getLogger("sllm.remote")

_FULL_SECONDS = 1.0
"""A worker without a place for a text is not asked before, unless it says when."""


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
        self._pid = os.getpid()
        self._keepalive = keepalive
        self._members = Members(addresses, timeout, self._link)
        try:
            self._recent = self._members.connect()
        except BaseException:
            self.close()
            raise

    def _link(self, place: Place) -> WorkerLink:
        return WorkerLink(
            place.address,
            timeout=self.timeout,
            deadline=self.deadline,
            keepalive=self._keepalive,
            streams=self.streams,
            server_name=place.name,
            check=lambda link, info: self._members.check(link, info),
        )

    @property
    def is_one(self) -> bool:
        """Whether there is one worker alone."""
        return self._members.is_one

    # What follows takes no lock: in a fork it might be held for ever.

    @property
    def link(self) -> WorkerLink:
        """To the worker that took a text last, or to another one while that is lost."""
        recent = self._recent
        if not recent.is_up:
            recent = self._recent = next((m for m in self._members.all if m.is_up), recent)
        return recent.link

    @property
    def links(self) -> list[WorkerLink]:
        """To all workers that are up."""
        return [m.link for m in self._members.all if m.state == "up"]

    @property
    def offers(self) -> list[WorkerInfo]:
        """What the workers offer that are up, at least one: where none is, that which was in use."""
        return [link.info for link in self.links] or [self.link.info]

    def states(self) -> list[WorkerState]:
        """What is known of each worker."""
        return [m.shown() for m in self._members.all]

    # ---- what becomes known on the way

    def standing(self, link: WorkerLink) -> Standing:
        """What is known of a worker."""
        member = self._members.of(link)
        return Standing() if member is None else member.standing

    def count_text(self, link: WorkerLink, n: int) -> None:
        """A worker has ``n`` texts of ours more."""
        with self._members.changed:
            self.standing(link).n_ours += n

    def note_prompt(self, link: WorkerLink, text: Sequence[int], n_reused: int, seconds: float) -> None:
        """A worker had ``n_reused`` tokens of ``text``, and computing the rest took ``seconds``."""
        with self._members.changed:
            standing = self.standing(link)
            standing.observe_prompt(len(text) - n_reused, seconds)
            standing.kept.correct(np.array(text, dtype=np.int32), n_reused)

    def note_text(self, link: WorkerLink, text: Sequence[int], seconds: float) -> None:
        """A worker has had a text, which it keeps for a while, for ``seconds``; layers have none of it."""
        with self._members.changed:
            standing = self.standing(link)
            standing.observe_text(seconds)
            if text:
                standing.kept.put(text, time.monotonic())

    def n_to_compute(self, link: WorkerLink, text: Sequence[int]) -> int:
        """Tokens of a text that a worker probably has to compute before it answers."""
        with self._members.changed:
            tokens = np.array(text, dtype=np.int32)
            return len(text) - self.standing(link).kept.n_held(tokens, time.monotonic())

    def note_lost(self, link: WorkerLink, channel: grpc.Channel | None, reason: str) -> None:
        """A call over this channel has broken. The worker is looked for, and gets no new texts before."""
        members = self._members
        with members.changed:
            member = members.of(link)
            if self.is_one or member is None or link.channel is not channel:
                return
            member.failed = channel
            if member.state != "up":
                return
            log.info("%s is lost: %s", link.endpoint, reason)
            members.leave(member, RemoteError(reason))
        members.follow_names()

    def note_found(self, link: WorkerLink) -> None:
        """A worker has answered on a new channel."""
        member = self._members.of(link)
        if member is not None and member.state not in ("up", "draining"):
            self._members.enter(member)

    def note_draining(self, link: WorkerLink) -> None:
        """A worker has said that it is being shut down."""
        member = self._members.of(link)
        if member is not None and not self.is_one:
            self._members.drain(member)

    def note_other(self, link: WorkerLink, error: OtherModelError) -> None:
        """A worker has another model by now; it was started anew, and gRPC has connected again by itself."""
        member = self._members.of(link)
        if member is not None and not self.is_one and member.state == "up":
            log.warning("%s is left out: %s", link.endpoint, error)
            self._members.leave(member, error)

    def note_full(self, link: WorkerLink, refusal: BusyError) -> None:
        """A worker has refused a text for lack of a place."""
        self.standing(link).full_until = time.monotonic() + (refusal.retry_after or _FULL_SECONDS)

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
            fresh: the workers may be asked for their figures before.

        Returns:
            None: there is none now.

        Raises:
            ClosedError: the connection is closed, or belongs to the parent of this process.

        """
        members = self._members
        self._recent.link.check_open()
        if fresh and not self.is_one:
            members.refresh()
        tokens = np.array(text, dtype=np.int32)
        skip = set(without)
        with members.changed:
            fit = [m for m in members.all if m.is_up and m.link not in skip]
            fit = [m for m in fit if _fits(m.link.info, len(tokens), needs)]
            fit = [m for m in fit if m.link.info.n_ctx >= n_positions] or fit
            at = choice.best([m.standing for m in fit], tokens, time.monotonic(), self.rng)
            if at is None:
                return None
            self._recent = fit[at]
            return fit[at].link

    def expected(self, link: WorkerLink, text: Sequence[int]) -> float:
        """Seconds until the first token that a worker would write after ``text``."""
        with self._members.changed:
            tokens = np.array(text, dtype=np.int32)
            return choice.expected(self.standing(link), tokens, time.monotonic())

    def order(self, link: WorkerLink, *, elsewhere: bool) -> list[WorkerLink]:
        """All workers, in the order in which one is to be tried whose stream has failed on ``link``: that one
        first, or last where it was not even answered; those that are being shut down, or have another model,
        after all others.
        """
        rank = {"up": 0, "lost": 0, "same": 1, "draining": 2, "other": 3}
        members = self._members.all
        at = next((i for i, m in enumerate(members) if m.link is link), 0) + elsewhere
        turned = [*members[at:], *members[:at]]
        return [m.link for m in sorted(turned, key=lambda m: rank[m.state])]

    def failed_channel(self, link: WorkerLink) -> grpc.Channel | None:
        """The channel of a link that is known to be of no use."""
        member = self._members.of(link)
        return None if member is None else member.failed

    def is_draining(self, link: WorkerLink) -> bool:
        """Whether a worker is being shut down."""
        member = self._members.of(link)
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
        until = None if timeout is None else time.monotonic() + timeout
        tried: list[WorkerLink] = []
        first: Exception | None = None
        while (link := self.choose(text, without=tried, fresh=not tried)) is not None:
            tried.append(link)
            channel = link.channel
            left = None if until is None else until - time.monotonic()
            if first is not None and left is not None and left <= 0:
                break
            try:
                return link.call(name, request, reply, left)
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
        if self._pid != os.getpid():
            return
        self.closed = True
        threads = self._members.stop()
        streams = list(self.streams)
        for stream in streams:
            stream.stop()
        for stream in streams:
            stream.join()
        self._members.close(threads)


def _fits(info: WorkerInfo, n_tokens: int, needs: Collection[str]) -> bool:
    return set(needs) <= set(info.features) and (info.layers is not None or n_tokens <= info.max_prompt)

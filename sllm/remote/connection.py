"""A connection to a worker: texts, scores, its RPC server, and measurements."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sllm.engine._ffi import checked_seconds
from sllm.engine.handle import Closing
from sllm.errors import RPCError, UnsupportedModelError
from sllm.remote import ping, scoring
from sllm.remote.fleet import Fleet
from sllm.remote.hedge import checked_hedge
from sllm.remote.info import LayersInfo, WorkerInfo
from sllm.remote.members import WorkerState
from sllm.remote.ping import Ping
from sllm.remote.relay import RelayEnd
from sllm.remote.stream import checked_on_loss
from sllm.remote.target import RemoteTarget
from sllm.remote.vocabulary import RemoteVocabulary
from sllm.rpc import server as rpc
from sllm.wire import auth
from sllm.wire.protocol import padded, pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from sllm.engine.devices import Device
    from sllm.engine.model import Model
    from sllm.engine.vocab import Vocab
    from sllm.messages import ChatOptions
    from sllm.remote.link import WorkerLink
    from sllm.targets.base import Scores

__all__ = ["LayersInfo", "Ping", "Remote", "WorkerInfo", "WorkerState", "connect"]


def connect(
    uri: str | Sequence[str],
    *,
    timeout: float = 10.0,
    on_loss: str = "wait",
    deadline: float = 60.0,
    keepalive: float = 10.0,
    hedge: bool | float = False,
) -> Remote:
    """Connect to a worker, or to several with the same model, which then serve as one.

    Args:
        uri: the line that the worker printed, ``sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT``. Without a
            fingerprint the certificate must be valid for the host. Several lines, or a host name with several
            addresses in DNS, mean several workers with the same model. A text goes to the one that is
            expected to answer first, and continues on another one if that is lost or shut down; workers that
            do not answer are left out until they do (:attr:`Remote.workers`).
        timeout: seconds for connecting.
        on_loss: what a text does when the link is lost: ``"wait"`` (reconnect and continue, for ``deadline``
            seconds), ``"raise"``, or ``"local"`` (meanwhile the draft writes alone; these runs are withdrawn
            when the link is back).
        deadline: seconds without a link after which a text is given up.
        keepalive: seconds of silence after which the other side is pinged; after as many more without an
            answer the link counts as lost.
        hedge: with several workers, whether to ask a second one if the first does not answer a text in time:
            if its delay over the expected time exceeds the 95th percentile so far. A number is that limit in
            seconds. The slower call is cancelled; ``stats.remote`` counts the cost.

    Raises:
        ValueError: a malformed address, or an argument out of range.
        AuthError: the worker refuses the token, or its certificate has another fingerprint or is not valid at
            the time of this machine's clock.
        BusyError: the worker takes no more calls at the moment.
        RemoteError: nothing answers at the address, or no sllm worker, or one of another version; or one of
            several workers has another model than the others.

    Examples:
        >>> with sllm.Worker(sllm.embedded.TARGET) as worker, sllm.connect(worker.uri) as remote:
        ...     remote.info.n_vocab == remote.vocab.n_tokens
        True

    """
    uris = [uri] if isinstance(uri, str) else list(uri)
    if not uris:
        raise ValueError("connect() needs the address of a worker")
    checked_on_loss(on_loss)
    for name, value in (("timeout", timeout), ("deadline", deadline), ("keepalive", keepalive)):
        checked_seconds(value, name)
    checked_hedge(hedge)
    addresses = [_address(one, i, len(uris)) for i, one in enumerate(uris, 1)]
    fleet = Fleet(addresses, timeout=timeout, deadline=deadline, keepalive=keepalive)
    return Remote(fleet, on_loss, hedge)


def _address(uri: str, number: int, n_uris: int) -> auth.Address:
    """One address of a list; the error for a bad one says which, as it must not repeat it."""
    try:
        return auth.Address.parse(uri)
    except (ValueError, TypeError) as error:
        if n_uris == 1:
            raise
        raise type(error)(f"number {number} of {n_uris}: {error}") from None


class Remote(Closing):
    """A connection to one or several workers with the same model, made by :func:`connect`. Any number of
    threads and texts may use it.

    Attributes:
        fleet: the workers; used by targets.
        vocabulary: their model without its weights; used by targets.
        on_loss, hedge: as given to :func:`connect`.

    """

    def __init__(self, fleet: Fleet, on_loss: str, hedge: bool | float = False) -> None:
        self.fleet = fleet
        self.vocabulary = RemoteVocabulary(fleet)
        self.on_loss = on_loss
        self.hedge = hedge
        self._relay: RelayEnd | None = None
        self._opening_relay = threading.Lock()
        super().__init__()

    @property
    def link(self) -> WorkerLink:
        """The link to the worker that took a text last."""
        return self.fleet.link

    @property
    def address(self) -> auth.Address:
        """The address of the worker that took a text last (without the token)."""
        return self.link.address

    @property
    def workers(self) -> list[WorkerState]:
        """The state of each worker: whether it is up, its round trip, its free places."""
        return self.fleet.states()

    @property
    def info(self) -> WorkerInfo:
        """What the worker offers."""
        return self.link.info

    # ---- texts

    @property
    def vocab(self) -> Vocab:
        """The worker's vocabulary, downloaded once and cached by its fingerprint in the user's cache folder.

        Raises:
            RemoteError: it could not be fetched, or does not have the fingerprint that the worker gave.

        """
        return self.vocabulary.model().vocab

    def vocabulary_model(self) -> Model:
        """The worker's model without its weights: vocabulary, metadata and chat template. Closed with the
        connection.
        """
        return self.vocabulary.model()

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation, made with the worker's chat template; see :meth:`sllm.Model.chat`."""
        return self.vocabulary.model().chat(messages, **options)

    def score(self, tokens: npt.NDArray[np.int32], start: int, *, timeout: float | None = None) -> Scores:
        """Let the worker compute how likely ``tokens[start:]`` are, in one pass.

        Token ids go up, a log-probability and a rank for each come back. The worker keeps the text in memory
        for a while, so for a longer text that begins with it only the new tokens are computed.

        Args:
            tokens: int32 (n,).
            start: the first token to be scored, 1 <= start < n.
            timeout: seconds; None: no limit.

        Raises:
            ValueError: no such start, or a token outside the vocabulary.
            ContextFullError: the text is longer than the worker takes.
            BusyError: the worker has no place for it.
            UnsupportedModelError: the worker does not score.
            RemoteError: the link is lost.

        """
        return scoring.score(self.fleet, tokens, start, timeout)

    def target(
        self, *, run_ahead: bool = True, on_loss: str | None = None, hedge: bool | float | None = None
    ) -> RemoteTarget:
        """The worker as a :class:`~sllm.Target`.

        Args:
            run_ahead: the worker decodes without waiting for hints, and streams; False: it computes only
                hinted tokens, and others one by one on request, which takes fewer passes, and is cheaper and
                slower.
            on_loss, hedge: as for :func:`connect`; None: the values given there.

        Raises:
            UnsupportedModelError: the worker serves layers of a model, not texts.

        """
        self.link.live_for_texts()
        return RemoteTarget(self, run_ahead=run_ahead, on_loss=on_loss, hedge=hedge)

    # ---- the worker's RPC server

    def rpc_devices(self, *, timeout: float = 10.0) -> list[Device]:
        """The worker's devices, for a model in this process: ``LocalTarget(path, devices=...)``.

        A port on 127.0.0.1 forwards to the worker's RPC server, over this connection's TLS and token. Until
        the connection is closed, every program of this user can use the port (and, except on Linux, of other
        users). A worker's RPC server serves one client at a time.

        Raises:
            UnsupportedModelError: the worker has no RPC server.
            BusyError: it serves another client.
            RPCError: the server does not answer, or has another version.
            RemoteError: the link was lost.

        """
        self.link.live()
        endpoint = self.link.endpoint
        if "rpc" not in self.info.features:
            raise UnsupportedModelError(f"{endpoint} offers no RPC server; start it with `sllm worker --rpc`")
        with self._opening_relay:
            self.link.live()  # close() may have been called while another thread had the lock
            if self._relay is None:
                self._relay = RelayEnd(self.link)
            relay = self._relay
        relay.error = None
        try:
            found = rpc.add_server(relay.endpoint, timeout=timeout)
        except RPCError:
            if relay.error is not None:
                raise relay.error from None
            raise
        return [
            replace(device, description=f"device {device.index} of the RPC server behind {endpoint}")
            for device in found
        ]

    # ---- the worker and the link

    def ping(self, *, n: int = 5, bandwidth: bool = False) -> Ping:
        """Measure the link: ``n`` round trips, and with ``bandwidth`` also 256 KiB up and 1 MiB down.

        Raises:
            RemoteError: the worker does not answer.

        """
        return ping.measure(self.link, n, bandwidth=bandwidth)

    def status(self) -> pb.StatusReply:
        """The worker's current statistics: the message ``StatusReply`` of ``sllm.proto``.

        Raises:
            RemoteError: the worker does not answer.

        """
        reply: pb.StatusReply = self.link.call(
            "Status", padded(pb.StatusRequest()), pb.StatusReply, self.link.timeout
        )
        return reply

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self.fleet.closed

    def close(self) -> None:
        """Cancel running texts and disconnect. Further calls, and calls in a forked child, do nothing."""
        if self._in_fork:
            return
        self.fleet.close()
        with self._opening_relay:
            relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()
        self.vocabulary.close()

    def __repr__(self) -> str:
        return f"<sllm.Remote {self.link.endpoint}{', closed' if self.closed else ''}>"

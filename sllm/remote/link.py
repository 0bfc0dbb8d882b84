"""The link to one worker: certificate, token, handshake, and one channel for all streams and calls."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from sllm.errors import (
    BusyError,
    ClosedError,
    RemoteError,
    SllmError,
    UnsupportedModelError,
)
from sllm.extras import needs
from sllm.remote.info import WorkerInfo
from sllm.wire import auth
from sllm.wire.channels import open_channel
from sllm.wire.protocol import PROTOCOL, failure, method, padded, pb

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["LiveStream", "WorkerLink"]


class LiveStream(Protocol):
    """What the link knows of a stream that is running."""

    channel: grpc.Channel | None
    """The one that its call is on; None between calls."""

    def stop(self) -> None:
        """End the stream, from any thread, without waiting."""

    def join(self) -> None:
        """Wait for the stream's own thread, if it has one."""


class _Learnt(dict[str, Any]):
    """What is known of a worker; ``place`` says of which."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place


_LEARNT: WeakValueDictionary[str, _Learnt] = WeakValueDictionary()


class WorkerLink:
    """One channel to a worker, replaced when it fails. Any number of threads may use it. :meth:`renew` makes
    the first one, too.

    Args:
        address: where the worker is.
        timeout: seconds for connecting.
        deadline: seconds without a link after which a stream is given up.
        keepalive: seconds of silence after which the other side is asked whether it is still there; as many
            later the link counts as lost.
        streams: those that are running, on this link and on others of its fleet.
        server_name: what the certificate has to be valid for, where the address has no fingerprint; None: its
            host.
        check: raises OtherModelError where the worker that answers is not one that is expected here.

    Attributes:
        address: as given.
        info: what the worker offers; there is none before the first channel.
        channel: the current one; None: none yet, or closed.
        streams: as given.
        round_trip: seconds, as the last stream has measured; 0: none has.

    """

    info: WorkerInfo

    def __init__(
        self,
        address: auth.Address,
        *,
        timeout: float,
        deadline: float,
        keepalive: float,
        streams: set[LiveStream],
        server_name: str | None = None,
        check: Callable[[WorkerLink, WorkerInfo], None] = lambda _link, _info: None,
    ) -> None:
        self.address = address
        self.timeout, self.deadline = timeout, deadline
        self.channel: grpc.Channel | None = None
        self.streams = streams
        self.round_trip = 0.0
        self._learnt: _Learnt | None = None
        self.closed = False
        self.pid = os.getpid()
        self._server_name = server_name
        self._check = check
        self._keepalive = keepalive
        self._lock = threading.Lock()  # over the channel and `closed`
        self._renewing = threading.Lock()
        self._last_failure: tuple[float, Exception] | None = None  # when and why renewing failed
        self._certificates: dict[str, bytes] = {}  # fingerprint -> PEM
        self._calls: set[grpc.Future[Any]] = set()

    @property
    def endpoint(self) -> str:
        """``HOST:PORT`` of the worker, for messages."""
        return self.address.endpoint

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries: the token."""
        return auth.bearer(self.address.token)

    @property
    def learnt(self) -> dict[str, Any]:
        """What is known of the worker: shared by all links of this process to it, and forgotten when
        the last of them is closed.
        """
        place = f"{self.endpoint} {self.info.model_id} {self.pid}"  # a fork's locks may be held for ever
        if self._learnt is None or self._learnt.place != place:
            self._learnt = _LEARNT.setdefault(place, _Learnt(place))
        return self._learnt

    # ---- channels

    def open_channel(self, timeout: float, options: Sequence[tuple[str, int]] = ()) -> grpc.Channel:
        """A new channel. Nothing but the certificate, where one is pinned, has crossed the link yet.

        Raises:
            AuthError: another certificate.
            RemoteError: nobody answers there.

        """
        return open_channel(
            self.address,
            timeout,
            keepalive=self._keepalive,
            certificates=self._certificates,
            server_name=self._server_name,
            options=options,
        )

    def _reach(self, timeout: float) -> tuple[grpc.Channel, WorkerInfo]:
        """A channel to a worker that answers, and is one that is expected here.

        Raises:
            AuthError, BusyError, RemoteError.

        """
        until = time.monotonic() + timeout
        channel = self.open_channel(timeout)
        try:
            info = self._handshake(channel, max(until - time.monotonic(), 0.1))
            self._check(self, info)
        except BaseException:
            channel.close()
            raise
        return channel, info

    def _handshake(self, channel: grpc.Channel, timeout: float) -> WorkerInfo:
        try:
            reply: pb.InfoReply = self._call(
                channel, "Info", padded(pb.InfoRequest(protocol=PROTOCOL)), pb.InfoReply, timeout
            )
        except (RemoteError, BusyError, ClosedError):
            raise
        except (SllmError, ValueError) as error:  # it speaks gRPC, but not this protocol
            raise RemoteError(f"{self.endpoint} is not an sllm worker: {error}") from error
        return WorkerInfo.from_reply(reply, self.endpoint)

    def live(self) -> grpc.Channel:
        """The current channel.

        Raises:
            ClosedError: the link is closed, or belongs to the parent of this process.

        """
        self.check_open()
        channel = self.channel
        if channel is None:
            raise ClosedError("the connection is closed")
        return channel

    def check_open(self) -> None:
        """Raise ClosedError where the link is closed, or belongs to the parent of this process."""
        if self.pid != os.getpid():
            raise ClosedError(f"the connection belongs to process {self.pid}; connect again in its fork")
        if self.closed:
            raise ClosedError("the connection is closed")

    def live_for_texts(self) -> grpc.Channel:
        """The current channel, of a worker that serves texts.

        Raises:
            UnsupportedModelError: it serves layers.
            ClosedError: as :meth:`live`.

        """
        channel = self.live()
        if self.info.layers is not None:
            raise UnsupportedModelError(
                f"{self.endpoint} serves layers of a model, not texts: use SplitTarget(middle=...)"
            )
        return channel

    def renew(self, failed: grpc.Channel | None, timeout: float) -> grpc.Channel:
        """A channel in place of one that failed. The first of several streams to ask makes it for all.

        Args:
            failed: the channel that is of no use any more; None: there has been none.
            timeout: seconds.

        Raises:
            BusyError, RemoteError: the worker cannot be reached now; a later attempt may succeed.
            AuthError, OtherModelError: another worker answers; later attempts are of no use.
            ClosedError: the link is closed.

        """
        asked = time.monotonic()
        with self._renewing:
            self.check_open()
            if self.channel is not None and self.channel is not failed:
                return self.channel
            if self._last_failure is not None and self._last_failure[0] > asked:  # another stream just tried
                raise self._last_failure[1]
            try:
                new, info = self._reach(timeout)
            except (RemoteError, BusyError) as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    self._certificates.clear()  # so that the next attempt fetches the new one
                self._last_failure = time.monotonic(), error
                raise
            with self._lock:
                if self.closed:
                    new.close()
                    raise ClosedError("the connection is closed")
                self.channel, self.info = new, info
            if failed is not None:
                self.retire(failed)
            return new

    def retire(self, channel: grpc.Channel) -> None:
        """Close a channel that was replaced, once no stream is on it: a worker that drains lets them end."""
        if channel is not self.channel and not any(s.channel is channel for s in list(self.streams)):
            channel.close()

    # ---- calls

    def call(self, name: str, request: Any, reply: Any, timeout: float | None) -> Any:
        """One unary call of the service.

        Args:
            name: of the method.
            request: the message that it takes.
            reply: the class of the message that it returns.
            timeout: seconds; None: any time.

        Raises:
            RemoteError: the link is lost, or one of its subclasses, or what the worker refused with.
            ClosedError: :meth:`close` was called.

        """
        return self._call(self.live(), name, request, reply, timeout)

    def _call(self, channel: grpc.Channel, name: str, request: Any, reply: Any, timeout: float | None) -> Any:
        with self.errors_of(self.endpoint):
            call = self._future(channel, name, request, reply, timeout)
            with self.cancellable(call):
                return call.result()

    def _future(
        self, channel: grpc.Channel, name: str, request: Any, reply: Any, timeout: float | None
    ) -> Any:
        stub = channel.unary_unary(method(name), type(request).SerializeToString, reply.FromString)
        return stub.future(request, timeout=timeout, metadata=self.metadata)

    def ask(
        self, name: str, request: Any, reply: Any, timeout: float, on_answer: Callable[[Any], object]
    ) -> None:
        """A unary call that nobody waits for.

        Args:
            name, request, reply, timeout: as for :meth:`call`.
            on_answer: gets what the worker answers, or None where it does not, on a thread of gRPC's.

        Raises:
            ClosedError: :meth:`close` was called.

        """
        try:
            call = self._future(self.live(), name, request, reply, timeout)
        except ValueError as error:  # gRPC: the channel was closed meanwhile
            raise ClosedError("the connection is closed") from error
        self._calls.add(call)

        def finish(done: Any) -> None:
            self._calls.discard(done)
            failed = done.cancelled() or done.exception() is not None
            on_answer(None if failed else done.result())

        call.add_done_callback(finish)
        if self.closed:  # close() may have missed this one
            call.cancel()

    @contextmanager
    def errors_of(self, endpoint: str) -> Iterator[None]:
        """Around a call: raise the exception that a failed one stands for.

        Raises:
            RemoteError: the link is lost, or one of its subclasses, or what the worker refused with.
            ClosedError: the link was closed meanwhile.

        """
        try:
            yield
        except grpc.FutureCancelledError:
            raise ClosedError("the connection is closed") from None
        except grpc.RpcError as error:
            if self.closed:
                raise ClosedError("the connection is closed") from None
            raise failure(error, endpoint) or RemoteError(
                f"{endpoint}: {error.details() or 'no answer'} ({error.code().name.lower()})"
            ) from None
        except ValueError as error:  # gRPC: the channel was closed meanwhile
            raise ClosedError("the connection is closed") from error

    @contextmanager
    def cancellable(self, call: Any) -> Iterator[None]:
        """Let :meth:`close` cancel a call meanwhile."""
        self._calls.add(call)
        try:
            if self.closed:  # close() may have missed this one
                call.cancel()
            yield
        finally:
            self._calls.discard(call)

    def stop(self) -> None:
        """Let nothing new begin, and cancel the calls; :meth:`close` is to follow."""
        with self._lock:
            self.closed = True
        for call in list(self._calls):
            call.cancel()

    def close(self) -> None:
        """Cancel the calls and hang up; the streams are to be over. More calls do nothing."""
        if self.pid != os.getpid():
            return
        self.stop()
        with self._lock:
            if self.channel is not None:
                self.channel.close()
                self.channel = None
            self._learnt = None

"""The link to a worker: certificate, token, handshake, and one channel for all streams and calls."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from sllm.errors import (
    AuthError,
    BusyError,
    ClosedError,
    RemoteError,
    SllmError,
    UnsupportedModelError,
)
from sllm.extras import needs
from sllm.remote.info import WorkerInfo
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, PROTOCOL, failure, method, padded, pb

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LiveStream", "OtherModelError", "WorkerLink"]


class OtherModelError(RemoteError):
    """The worker has come back with other weights: the text cannot be continued."""


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
    """One channel to a worker, replaced when it fails. Any number of threads may use it.

    Args:
        addresses: where the worker is, or several with the same weights, tried in turn.
        timeout: seconds for connecting.
        deadline: seconds without a link after which a stream is given up.
        keepalive: seconds of silence after which the other side is asked whether it is still there; as many
            later the link counts as lost.

    Raises:
        AuthError, BusyError, RemoteError: as :func:`sllm.connect`.

    Attributes:
        address: of the worker in use.
        info: what it offers.
        channel: the current one; None: closed.
        streams: those that are running; :meth:`close` ends them.
        round_trip: seconds, as the last stream has measured; 0: none has.

    """

    address: auth.Address
    info: WorkerInfo

    def __init__(
        self, addresses: Sequence[auth.Address], *, timeout: float, deadline: float, keepalive: float
    ) -> None:
        self.timeout, self.deadline = timeout, deadline
        self.channel: grpc.Channel | None = None
        self.streams: set[LiveStream] = set()
        self.round_trip = 0.0
        self._learnt: _Learnt | None = None
        self.closed = False
        self.pid = os.getpid()
        self._addresses = list(addresses)
        self._keepalive = keepalive
        self._lock = threading.Lock()  # over the channel and `closed`
        self._renewing = threading.Lock()
        self._last_failure: tuple[float, Exception] | None = None  # when and why renewing failed
        self._certificates: dict[str, bytes] = {}  # fingerprint -> PEM
        self._calls: set[grpc.Future[Any]] = set()
        until = time.monotonic() + timeout
        n = len(self._addresses)
        for i, address in enumerate(self._addresses):
            share = max(until - time.monotonic(), 0.1) / (n - i)  # leaves time for the other addresses
            try:
                self.channel, self.info = self._reach(address, share)
            except BaseException as error:
                if i == n - 1 or not isinstance(error, (RemoteError, BusyError)):
                    self.closed = True
                    raise
            else:
                self.address = address
                return

    @property
    def endpoint(self) -> str:
        """``HOST:PORT`` of the worker in use, for messages."""
        return self.address.endpoint

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries: the token."""
        return auth.bearer(self.address.token)

    @property
    def learnt(self) -> dict[str, Any]:
        """What is known of the worker in use: shared by all links of this process to it, and forgotten when
        the last of them is closed.
        """
        place = f"{self.endpoint} {self.info.model_id} {self.pid}"  # a fork's locks may be held for ever
        if self._learnt is None or self._learnt.place != place:
            self._learnt = _LEARNT.setdefault(place, _Learnt(place))
        return self._learnt

    # ---- channels

    def open_channel(
        self, address: auth.Address, timeout: float, options: Sequence[tuple[str, int]] = ()
    ) -> grpc.Channel:
        """A new channel. Nothing but the certificate, where one is pinned, has crossed the link yet.

        Raises:
            AuthError: another certificate.
            RemoteError: nobody answers there.

        """
        milliseconds = int(self._keepalive * 1000)
        settings: list[tuple[str, Any]] = [
            *CHANNEL_OPTIONS,
            *options,
            ("grpc.use_local_subchannel_pool", 1),  # a new channel means a new connection
            ("grpc.enable_retries", 0),  # streams are resumed by ResumableStream
            ("grpc.keepalive_time_ms", milliseconds),
            ("grpc.keepalive_timeout_ms", milliseconds),
            ("grpc.http2.ping_timeout_ms", milliseconds),  # grpc/grpc#39239: it alone ends a connection
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", 1 << 22),
        ]
        if address.insecure:
            return grpc.insecure_channel(address.endpoint, settings)
        if address.fingerprint is None:
            return grpc.secure_channel(address.endpoint, grpc.ssl_channel_credentials(), settings)
        pem = self._certificates.get(address.fingerprint)
        if pem is None:
            pem = self._certificates[address.fingerprint] = auth.fetch_certificate(address, timeout)
        credentials, name = auth.client_credentials(pem)
        settings.append(("grpc.ssl_target_name_override", name))
        return grpc.secure_channel(address.endpoint, credentials, settings)

    def _reach(self, address: auth.Address, timeout: float) -> tuple[grpc.Channel, WorkerInfo]:
        """A channel to a worker that answers.

        Raises:
            AuthError, BusyError, RemoteError.

        """
        until = time.monotonic() + timeout
        channel = self.open_channel(address, timeout)
        try:
            return channel, self._handshake(channel, address, max(until - time.monotonic(), 0.1))
        except BaseException:
            channel.close()
            raise

    def _handshake(self, channel: grpc.Channel, address: auth.Address, timeout: float) -> WorkerInfo:
        try:
            reply: pb.InfoReply = self._call(
                channel, address, "Info", padded(pb.InfoRequest(protocol=PROTOCOL)), pb.InfoReply, timeout
            )
        except (RemoteError, BusyError, ClosedError):
            raise
        except (SllmError, ValueError) as error:  # it speaks gRPC, but not this protocol
            raise RemoteError(f"{address.endpoint} is not an sllm worker: {error}") from error
        return WorkerInfo.from_reply(reply, address.endpoint)

    def live(self) -> grpc.Channel:
        """The current channel.

        Raises:
            ClosedError: the link is closed, or belongs to the parent of this process.

        """
        if self.pid != os.getpid():
            raise ClosedError(f"the connection belongs to process {self.pid}; connect again in its fork")
        channel = self.channel
        if self.closed or channel is None:
            raise ClosedError("the connection is closed")
        return channel

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

    def renew(self, failed: grpc.Channel, timeout: float, *, elsewhere: bool = False) -> grpc.Channel:
        """A channel in place of one that failed. The first of several streams to ask makes it for all.

        Args:
            failed: the channel that is of no use any more.
            timeout: seconds for each address.
            elsewhere: where there are several addresses, the one in use is tried last.

        Raises:
            BusyError, RemoteError: the worker cannot be reached now; a later attempt may succeed.
            AuthError, OtherModelError: another worker answers; later attempts are of no use.
            ClosedError: the link is closed.

        """
        asked = time.monotonic()
        with self._renewing:
            channel = self.live()
            if channel is not failed:
                return channel
            if self._last_failure is not None and self._last_failure[0] > asked:  # another stream just tried
                raise self._last_failure[1]
            failures: list[Exception] = []
            n = len(self._addresses)
            at = self._addresses.index(self.address) + elsewhere
            for address in (self._addresses[(at + i) % n] for i in range(n)):
                try:
                    new, info = self._reach(address, timeout)
                except (RemoteError, BusyError) as error:
                    if "CERTIFICATE_VERIFY_FAILED" in str(error):
                        self._certificates.clear()  # so that the next attempt fetches the new one
                    failures.append(error)
                    continue
                if info.model_id != self.info.model_id:
                    new.close()
                    failures.append(
                        OtherModelError(f"{address.endpoint} now has another model, {info.model_name}")
                    )
                    continue
                with self._lock:
                    if self.closed:
                        new.close()
                        raise ClosedError("the connection is closed")
                    self.channel, self.address, self.info = new, address, info
                self.retire(failed)
                return new
            # An address that may yet answer is a reason to try again.
            final = (AuthError, OtherModelError)
            reason = next((f for f in failures if not isinstance(f, final)), failures[-1])
            self._last_failure = time.monotonic(), reason
            raise reason

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
        return self._call(self.live(), self.address, name, request, reply, timeout)

    def _call(
        self,
        channel: grpc.Channel,
        address: auth.Address,
        name: str,
        request: Any,
        reply: Any,
        timeout: float | None,
    ) -> Any:
        stub = channel.unary_unary(method(name), type(request).SerializeToString, reply.FromString)
        with self.errors_of(address.endpoint):
            call = stub.future(request, timeout=timeout, metadata=auth.bearer(address.token))
            with self.cancellable(call):
                return call.result()

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

    def close(self) -> None:
        """Cancel the calls, end the streams and hang up. More calls do nothing."""
        if self.pid != os.getpid():
            return
        with self._lock:
            self.closed = True
        streams = list(self.streams)
        for stream in streams:
            stream.stop()
        for call in list(self._calls):
            call.cancel()
        for stream in streams:
            stream.join()
        with self._lock:
            if self.channel is not None:
                self.channel.close()
                self.channel = None
            self._learnt = None

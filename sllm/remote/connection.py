"""The connection to a worker: certificate, token, vocabulary, and one channel for all texts."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import time
import warnings
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import int32_array
from sllm.engine.model import Model
from sllm.errors import (
    AuthError,
    BusyError,
    ClosedError,
    ContextFullError,
    RemoteError,
    RPCError,
    SllmError,
    UnsupportedModelError,
)
from sllm.remote.relay import RelayEnd
from sllm.remote.stream import OtherModelError
from sllm.remote.target import RemoteTarget, checked_on_loss
from sllm.rpc import server as rpc
from sllm.targets.base import Scores
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, PROTOCOL, RELAY_OPTIONS, failure, method, padded, pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import grpc
    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.engine.devices import Device
    from sllm.engine.vocab import Vocab

__all__ = ["LayersInfo", "Ping", "Remote", "WorkerInfo", "connect"]

log = logging.getLogger("sllm.remote")

_MAX_VOCABULARY = 1 << 28
"""Bytes of a vocabulary, far above the largest; a worker must not make its clients run out of memory."""

_VOCABULARY_SECONDS = 120.0
"""What a vocabulary may take on a slow link."""


class _Stream(Protocol):
    """What a connection knows of the calls that are on their way."""

    _channel: grpc.Channel | None
    """The one in use."""

    def _hang_up(self) -> None:
        """End the call, from any thread."""

    def _join(self) -> None:
        """Wait for the thread that it has, if it has one."""


@dataclass(frozen=True)
class LayersInfo:
    """Which layers a worker serves.

    Attributes:
        n_layer: layers of the whole model.
        n_embd: numbers of a hidden state.
        start, stop: what it has: layers [start, stop).
        fixed: it serves these and no range among them.
        output: it has the final norm and the head.
        max_rows: hidden states in one message.

    """

    n_layer: int
    n_embd: int
    start: int
    stop: int
    fixed: bool
    output: bool
    max_rows: int


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker offers.

    Attributes:
        software: the worker's own words.
        features: names from ``sllm.proto``.
        model_name: the file's name.
        model_id: equal where the weights are (:func:`sllm.engine.gguf.model_id`).
        vocab_fingerprint: equal where the vocabulary is (:attr:`sllm.Vocab.fingerprint`).
        n_vocab, n_params, size_bytes: of the model.
        chat_template: its chat template, or None; :meth:`Remote.chat` renders it.
        n_ctx: positions of one text.
        max_prompt, max_hint: tokens that the worker takes.
        sessions: texts at once, or sequences.
        layers: the layers that it serves to :class:`~sllm.SplitTarget`, or None: it serves texts.

    """

    software: str
    features: tuple[str, ...]
    model_name: str
    model_id: str
    vocab_fingerprint: str
    n_vocab: int
    n_ctx: int
    max_prompt: int
    max_hint: int
    sessions: int
    n_params: int
    size_bytes: int
    chat_template: str | None
    layers: LayersInfo | None = None


@dataclass(frozen=True)
class Ping:
    """What the link can do: round trip in seconds (median), bandwidths in Mbit/s, None where not measured."""

    round_trip: float
    mbit_s_up: float | None
    mbit_s_down: float | None


def connect(
    uri: str | Sequence[str],
    *,
    timeout: float = 10.0,
    on_loss: str = "wait",
    deadline: float = 60.0,
    keepalive: float = 10.0,
) -> Remote:
    """Connect to a worker.

    Args:
        uri: the line that the worker printed, ``sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT``; several: the
            addresses of workers with the same weights, tried in turn. Without a fingerprint the certificate
            must be valid for the host.
        timeout: seconds for connecting.
        on_loss: what a text does when the link is lost: ``"wait"`` (reconnect and go on, for ``deadline``
            seconds), ``"raise"``, or ``"local"`` (meanwhile the draft alone goes on; these runs are withdrawn
            when the link is back).
        deadline: seconds without a link after which a text is given up.
        keepalive: seconds of silence after which the other side is asked whether it is still there; as many
            later the link counts as lost.

    Raises:
        ValueError: no such address.
        AuthError: the worker refuses the token, or has another certificate.
        BusyError: it takes no more calls at the moment.
        RemoteError: nobody there, no worker, or one of another version.

    """
    uris = [uri] if isinstance(uri, str) else list(uri)
    if not uris:
        raise ValueError("connect() needs the address of a worker")
    checked_on_loss(on_loss)
    for name, value in (("timeout", timeout), ("deadline", deadline), ("keepalive", keepalive)):
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < 1e6):
            raise ValueError(f"{name} is {value!r}, expected a number of seconds > 0")
    return Remote([auth.Address.parse(one) for one in uris], timeout, on_loss, deadline, keepalive)


class Remote:
    """A connection to a worker, made by :func:`connect`. Any number of threads and texts may use it.

    Attributes:
        address: where the worker is (the token is not shown).
        info: what it offers.

    """

    def __init__(
        self, addresses: list[auth.Address], timeout: float, on_loss: str, deadline: float, keepalive: float
    ) -> None:
        self.address = addresses[0]
        self.timeout, self.on_loss, self.deadline = timeout, on_loss, deadline
        self._addresses = addresses
        self._keepalive = keepalive
        self._pid = os.getpid()
        self._lock = threading.Lock()  # over the channel and what is closed
        self._loading = threading.Lock()  # over the vocabulary
        self._renewing = threading.Lock()
        self._trouble: tuple[float, Exception] | None = None  # when and why renewing has failed
        self._round_trip = 0.0  # what the last text has measured
        self._certificates: dict[str, bytes] = {}  # fingerprint -> PEM
        self._channel: grpc.Channel | None = None
        self._model: Model | None = None
        self._relay: RelayEnd | None = None
        self._relay_channel: grpc.Channel | None = None
        self._streams: set[_Stream] = set()
        self._calls: set[grpc.Future[Any]] = set()
        self._closed = False
        self.info: WorkerInfo
        until = time.monotonic() + timeout
        n = len(addresses)
        for i, address in enumerate(addresses):
            left = max(until - time.monotonic(), 0.1) / (n - i)  # the others want time, too
            try:
                self._channel, self.info = self._reach(address, left)
            except BaseException as error:
                if i == n - 1 or not isinstance(error, (RemoteError, BusyError)):
                    self._closed = True
                    raise
            else:
                self.address = address
                return

    # ---- the channel

    def _open_channel(
        self, address: auth.Address, timeout: float, more: Sequence[tuple[str, int]] = ()
    ) -> grpc.Channel:
        """A channel; nothing but the certificate has crossed the link yet.

        Raises:
            AuthError, RemoteError.

        """
        import grpc

        milliseconds = int(self._keepalive * 1000)
        options: list[tuple[str, Any]] = [
            *CHANNEL_OPTIONS,
            *more,
            ("grpc.use_local_subchannel_pool", 1),  # a new channel means a new connection
            ("grpc.enable_retries", 0),  # what has to be done again, we do
            ("grpc.keepalive_time_ms", milliseconds),
            ("grpc.keepalive_timeout_ms", milliseconds),
            ("grpc.http2.ping_timeout_ms", milliseconds),  # grpc/grpc#39239: it alone ends a connection
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", 1 << 22),
        ]
        if address.insecure:
            return grpc.insecure_channel(address.endpoint, options)
        if address.fingerprint is None:
            return grpc.secure_channel(address.endpoint, grpc.ssl_channel_credentials(), options)
        pem = self._certificates.get(address.fingerprint)
        if pem is None:
            pem = self._certificates[address.fingerprint] = auth.fetch_certificate(address, timeout)
        credentials, name = auth.client_credentials(pem)
        options.append(("grpc.ssl_target_name_override", name))
        return grpc.secure_channel(address.endpoint, credentials, options)

    def _reach(self, address: auth.Address, timeout: float) -> tuple[grpc.Channel, WorkerInfo]:
        """A channel to a worker that answers.

        Raises:
            AuthError, BusyError, RemoteError.

        """
        until = time.monotonic() + timeout
        channel = self._open_channel(address, timeout)
        try:
            return channel, self._ask(channel, address, max(until - time.monotonic(), 0.1))
        except BaseException:
            channel.close()
            raise

    def _ask(self, channel: grpc.Channel, address: auth.Address, timeout: float) -> WorkerInfo:
        try:
            reply: pb.InfoReply = self._call(
                channel, address, "Info", padded(pb.InfoRequest(protocol=PROTOCOL)), pb.InfoReply, timeout
            )
        except (RemoteError, BusyError, ClosedError):
            raise
        except (SllmError, ValueError) as error:  # it speaks gRPC, but not with us
            raise RemoteError(f"{address.endpoint} is no worker: {error}") from error
        if reply.protocol != PROTOCOL:
            raise RemoteError(
                f"{address.endpoint} speaks version {reply.protocol} of the protocol, expected {PROTOCOL}:"
                " install the same version of sllm on both sides"
            )
        layers = None
        if "layers" in reply.features:
            said = reply.layers
            layers = LayersInfo(
                said.n_layer, said.n_embd, said.start, said.stop, said.fixed, said.output, said.max_rows
            )
        # It names a file in the cache folder.
        elif not re.fullmatch("[0-9a-f]{64}", reply.vocab_fingerprint):
            raise RemoteError(f"{address.endpoint} has no valid fingerprint of its vocabulary")
        return WorkerInfo(
            reply.software,
            tuple(reply.features),
            reply.model_name,
            reply.model_id,
            reply.vocab_fingerprint,
            reply.n_vocab,
            reply.n_ctx,
            reply.max_prompt,
            reply.max_hint,
            reply.sessions,
            reply.n_params,
            reply.size_bytes,
            reply.chat_template or None,
            layers,
        )

    def _call(
        self,
        channel: grpc.Channel,
        address: auth.Address,
        name: str,
        request: Any,
        reply: Any,
        timeout: float | None,
    ) -> Any:
        """One unary call.

        Raises:
            RemoteError: or one of its subclasses, or what the worker refused with.

        """
        import grpc

        stub = channel.unary_unary(method(name), type(request).SerializeToString, reply.FromString)
        try:
            call = stub.future(request, timeout=timeout, metadata=auth.bearer(address.token))
            with self._cancellable(call):
                return call.result()
        except grpc.FutureCancelledError:
            raise ClosedError("the connection is closed") from None
        except grpc.RpcError as error:
            if self._closed:
                raise ClosedError("the connection is closed") from None
            raise failure(error, address.endpoint) or RemoteError(
                f"{address.endpoint}: {error.details() or 'no answer'} ({error.code().name.lower()})"
            ) from None
        except ValueError as error:  # the channel was closed meanwhile
            raise ClosedError("the connection is closed") from error

    @contextmanager
    def _cancellable(self, call: Any) -> Iterator[None]:
        """Let :meth:`close` cancel a call meanwhile."""
        self._calls.add(call)
        try:
            if self._closed:  # just now: close() may have missed this one
                call.cancel()
            yield
        finally:
            self._calls.discard(call)

    def _live(self) -> grpc.Channel:
        if self._pid != os.getpid():
            raise ClosedError(f"the connection belongs to process {self._pid}; connect again in its fork")
        channel = self._channel
        if self._closed or channel is None:
            raise ClosedError("the connection is closed")
        return channel

    def _renew(self, failed: grpc.Channel, timeout: float, *, elsewhere: bool = False) -> grpc.Channel:
        """A channel in place of one that failed; the first of several texts to ask makes it for all.

        ``elsewhere``: where there are several addresses, the one in use is not the first to be tried.

        Raises:
            BusyError, RemoteError: not yet. AuthError, OtherModelError: not any more.

        """
        asked = time.monotonic()
        with self._renewing:
            channel = self._live()
            if channel is not failed:
                return channel
            if self._trouble is not None and self._trouble[0] > asked:  # another text has just tried
                raise self._trouble[1]
            troubles: list[Exception] = []
            n = len(self._addresses)
            at = self._addresses.index(self.address) + elsewhere
            for address in (self._addresses[(at + i) % n] for i in range(n)):
                try:
                    new, info = self._reach(address, timeout)
                except (RemoteError, BusyError) as error:
                    if "CERTIFICATE_VERIFY_FAILED" in str(error):
                        self._certificates.clear()  # looked at again, and told apart, the next time
                    troubles.append(error)
                    continue
                if info.model_id != self.info.model_id:
                    new.close()
                    troubles.append(
                        OtherModelError(f"{address.endpoint} now has another model, {info.model_name}")
                    )
                    continue
                with self._lock:
                    if self._closed:
                        new.close()
                        raise ClosedError("the connection is closed")
                    self._channel, self.address, self.info = new, address, info
                self._retire(failed)
                return new
            # One that may yet come back is a reason to go on trying.
            trouble = next(
                (t for t in troubles if not isinstance(t, (AuthError, OtherModelError))), troubles[-1]
            )
            self._trouble = time.monotonic(), trouble
            raise trouble

    def _retire(self, channel: grpc.Channel) -> None:
        """Close a channel that was replaced, once no text is on it: a worker that drains lets them end."""
        if channel is not self._channel and not any(s._channel is channel for s in list(self._streams)):
            channel.close()

    # ---- for callers

    @property
    def vocab(self) -> Vocab:
        """The worker's vocabulary, fetched once and kept in the user's cache folder by its fingerprint.

        Raises:
            RemoteError: it could not be fetched, or is not what the worker said.

        """
        return self.vocabulary_model().vocab

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation by the worker's chat template; see :meth:`sllm.Model.chat`."""
        return self.vocabulary_model().chat(messages, add_generation_prompt=add_generation_prompt)

    def vocabulary_model(self) -> Model:
        """The worker's model without its weights: vocabulary, metadata and chat template. Closed with the
        connection.
        """
        with self._loading:
            channel = self._live()
            if self.info.layers is not None:
                raise self._no_texts()
            if self._model is None:
                self._model = self._load_vocabulary(channel)
            return self._model

    def _load_vocabulary(self, channel: grpc.Channel) -> Model:
        path = cache_folder() / f"{self.info.vocab_fingerprint}.gguf"
        with suppress(OSError, SllmError, ValueError):
            return self._checked_vocabulary(path)
        data = self._fetch_vocabulary(channel)
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = self._written(data, path.parent, stack)
            except OSError as error:
                log.info("%s cannot be written, so the vocabulary is not kept: %s", path.parent, error)
                part = self._written(data, None, stack)
            try:
                model = self._checked_vocabulary(part)
            except (OSError, SllmError, ValueError) as error:
                raise RemoteError(
                    f"{self.address.endpoint} sent a vocabulary that does not load or is not its own: {error}"
                ) from error
            with suppress(OSError):
                if part.parent == path.parent:
                    os.replace(part, path)
            model.path = path
            return model

    def _written(self, data: bytes, folder: Path | None, stack: ExitStack) -> Path:
        """A file with ``data``, deleted with ``stack``."""
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
        stack.callback(Path(name).unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return Path(name)

    def _checked_vocabulary(self, path: Path) -> Model:
        model = Model(path, vocab_only=True)
        try:
            found, n_vocab = model.vocab.fingerprint, model.vocab.n_tokens
            if (found, n_vocab) != (self.info.vocab_fingerprint, self.info.n_vocab):
                raise RemoteError(
                    f"a vocabulary of {n_vocab} tokens with the fingerprint {found},"
                    f" expected {self.info.n_vocab} and {self.info.vocab_fingerprint}"
                )
        except BaseException:
            model.close()
            raise
        return model

    def _fetch_vocabulary(self, channel: grpc.Channel) -> bytes:
        import grpc

        call = channel.unary_stream(
            method("Vocabulary"), pb.VocabularyRequest.SerializeToString, pb.Piece.FromString
        )
        inflate = zlib.decompressobj()
        data = bytearray()
        try:
            pieces = call(
                padded(pb.VocabularyRequest()),
                metadata=auth.bearer(self.address.token),
                timeout=self.timeout + _VOCABULARY_SECONDS,
            )
            with self._cancellable(pieces):
                try:
                    for piece in pieces:
                        # With nothing left zlib would take 0 for "no limit".
                        data += inflate.decompress(piece.data, max(_MAX_VOCABULARY - len(data), 1))
                        if inflate.unconsumed_tail or len(data) > _MAX_VOCABULARY:
                            raise RemoteError(f"{self.address.endpoint} sends a vocabulary without an end")
                finally:
                    pieces.cancel()  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            if self._closed:
                raise ClosedError("the connection is closed") from None
            raise failure(error, self.address.endpoint) or RemoteError(
                f"{self.address.endpoint}: the vocabulary did not arrive: {error.details()}"
            ) from None
        except ValueError as error:  # the channel was closed meanwhile
            raise ClosedError("the connection is closed") from error
        except zlib.error as error:
            raise RemoteError(f"{self.address.endpoint} sent a damaged vocabulary: {error}") from error
        return bytes(data)

    def score(self, tokens: npt.NDArray[np.int32], start: int, *, timeout: float | None = None) -> Scores:
        """Let the worker say how likely it finds ``tokens[start:]``, in one pass.

        Token ids go up, a log-probability and a rank for each come back. The worker keeps the text in memory
        for a while, so going on from it costs only what is new.

        Args:
            tokens: int32 (n,).
            start: the first token to be scored, 1 <= start < n.
            timeout: seconds; None: any time.

        Raises:
            ValueError: no such start, or a token that is none.
            ContextFullError: the text is longer than the worker takes.
            BusyError: no place.
            UnsupportedModelError: the worker does not score.
            RemoteError: the link is lost.

        """
        info = self.info
        if "score" not in info.features:
            raise UnsupportedModelError(f"{self.address.endpoint} does not score texts; update sllm there")
        text = int32_array(tokens, "tokens")
        checked_int(start, "start", 1, max(len(text) - 1, 1))
        if len(text) > info.max_prompt:
            raise ContextFullError(f"the text has {len(text)} tokens, and the worker takes {info.max_prompt}")
        if len(text) < 2 or int(text.min()) < 0 or int(text.max()) >= info.n_vocab:
            raise ValueError(f"the text needs two tokens or more, all of the vocabulary of {info.n_vocab}")
        request = padded(pb.ScoreRequest(tokens=text.tolist(), start=start, model_id=info.model_id))
        reply: pb.ScoreReply = self._call(
            self._live(), self.address, "Score", request, pb.ScoreReply, timeout
        )
        n = len(text) - start
        logprobs = np.array(reply.logprobs, dtype=np.float32)
        ranks = np.array(reply.ranks, dtype=np.int64)
        # Rounding may lift the logarithm of a probability next to 1 a little above 0.
        if (
            len(logprobs) != n
            or len(ranks) != n
            or not (np.isfinite(logprobs) & (logprobs < 1e-3)).all()
            or ranks.max() >= info.n_vocab
        ):
            raise RemoteError(
                f"{self.address.endpoint} sent {len(logprobs)} log-probabilities and {len(ranks)} ranks,"
                f" expected {n} of each, finite and <= 0, and below {info.n_vocab}"
            )
        return Scores(logprobs, ranks.astype(np.int32), reply.n_reused, reply.compute_us * 1e-6)

    def target(self, *, run_ahead: bool = True, on_loss: str | None = None) -> RemoteTarget:
        """The worker as a :class:`~sllm.Target`.

        Args:
            run_ahead: the worker goes on by itself and streams; False: it computes only what is hinted, or
                asked for one by one: fewer passes, cheaper, and slower.
            on_loss: as for :func:`connect`; None: what was said there.

        Raises:
            UnsupportedModelError: the worker serves layers of a model, and no texts.

        """
        self._live()
        if self.info.layers is not None:
            raise self._no_texts()
        return RemoteTarget(self, run_ahead=run_ahead, on_loss=on_loss)

    def _no_texts(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.address.endpoint} serves layers of a model, not texts: use SplitTarget(middle=...)"
        )

    # ---- the worker's RPC server

    def rpc_devices(self, *, timeout: float = 10.0) -> list[Device]:
        """The devices behind the worker, for a model that runs here: ``LocalTarget(path, devices=...)``.

        A port on 127.0.0.1 stands for the worker's RPC server; what goes through it travels over this
        connection's TLS and token. Until the connection is closed, every program of this user can use the
        port (and of others, except on Linux). A worker's RPC server serves one client at a time.

        Raises:
            UnsupportedModelError: the worker has no RPC server.
            BusyError: it serves another client.
            RPCError: it does not answer, or is of another version.
            RemoteError: the link was lost.

        """
        self._live()
        if "rpc" not in self.info.features:
            raise UnsupportedModelError(
                f"{self.address.endpoint} offers no RPC server; start it with `sllm worker --rpc`"
            )
        with self._loading:
            if self._relay is None:
                self._relay, self._relay_channel = self._open_relay()
            relay = self._relay
        relay.trouble = None
        try:
            found = rpc.add_server(relay.endpoint, timeout=timeout)
            where = f"of the RPC server behind {self.address.endpoint}"
            return [replace(device, description=f"device {device.index} {where}") for device in found]
        except RPCError:
            if relay.trouble is not None:
                raise relay.trouble from None
            raise

    def _open_relay(self) -> tuple[RelayEnd, grpc.Channel]:
        address = self.address
        channel = self._open_channel(address, self.timeout, RELAY_OPTIONS)
        stub = channel.stream_stream(method("Relay"), pb.Piece.SerializeToString, pb.Piece.FromString)
        return (
            RelayEnd(lambda pieces: stub(pieces, metadata=auth.bearer(address.token)), address.endpoint),
            channel,
        )

    def ping(self, *, n: int = 5, bandwidth: bool = False) -> Ping:
        """Measure the link: ``n`` round trips, and with ``bandwidth`` also 256 KiB up and 1 MiB down.

        Raises:
            RemoteError: the worker does not answer.

        """
        channel, address = self._live(), self.address

        def echo(up: int, down: int) -> float:
            began = time.perf_counter()
            request = pb.EchoRequest(reply_bytes=down, padding=bytes(up))
            self._call(channel, address, "Echo", request, pb.EchoReply, self.timeout + 30)
            return time.perf_counter() - began

        times = sorted(echo(16, 16) for _ in range(max(n, 1)))
        round_trip = times[len(times) // 2]
        if not bandwidth:
            return Ping(round_trip, None, None)
        # Each way twice, because the first opens TCP's window; what counts is the time beyond the round trip.
        n_up, n_down = 1 << 17, 1 << 19
        up = min(echo(n_up, 16), echo(n_up, 16))
        down = min(echo(16, n_down), echo(16, n_down))
        return Ping(
            round_trip,
            n_up * 8e-6 / max(up - round_trip, 1e-6),
            n_down * 8e-6 / max(down - round_trip, 1e-6),
        )

    def status(self) -> pb.StatusReply:
        """The worker's running figures: the message ``StatusReply`` of ``sllm.proto``.

        Raises:
            RemoteError: the worker does not answer.

        """
        reply: pb.StatusReply = self._call(
            self._live(), self.address, "Status", padded(pb.StatusRequest()), pb.StatusReply, self.timeout
        )
        return reply

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Cancel the texts that are on their way and hang up. More calls do nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
        streams = list(self._streams)
        for stream in streams:
            stream._hang_up()
        for call in list(self._calls):
            call.cancel()
        for stream in streams:
            stream._join()
        with self._loading, self._lock:
            if self._relay is not None and self._relay_channel is not None:
                self._relay.close()
                self._relay_channel.close()
                self._relay = self._relay_channel = None
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            if self._model is not None:
                self._model.close()
                self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_channel", None) is not None and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<sllm.Remote {self.address.endpoint}{', closed' if self._closed else ''}>"


def cache_folder() -> Path:
    """Where vocabularies are kept: ``$SLLM_CACHE``, or ``sllm`` in the user's cache folder."""
    own = os.environ.get("SLLM_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sllm"
    return base / "vocabularies"

"""The big machine's side: a model that answers to others over the network."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.model import Model
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, RELAY_OPTIONS, size_limit
from sllm.worker.scheduler import Limits, Scheduler, SchedulerStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from sllm.worker.relay import Relay

__all__ = ["Limits", "Worker"]

log = logging.getLogger("sllm.worker")


class Worker:
    """Serves a model to clients (:func:`sllm.connect`) over gRPC, from the constructor's return until
    :meth:`close`.

    TLS and a token guard every address but loopback with ``insecure=True``. What the worker sees of its
    clients are token ids: the text, to anybody who has the vocabulary. It logs neither these nor tokens of
    access.

    Args:
        model: a model or its path. A :class:`~sllm.Model` stays the caller's to close.
        draft: a smaller model or its path: the worker drafts by itself where a client has no usable hint.
        host, port: where to listen; port 0: any that is free, see :attr:`address`.
        token: what clients must know, 16 visible characters or more; None: made at random and kept in
            ``state``.
        certificate: paths of a certificate chain and its key (PEM); None: a self-signed one is made once and
            kept in ``state``.
        state: the folder for both; None: ``$SLLM_STATE``, or ``sllm`` in the user's state folder.
        insecure: neither TLS nor a token; loopback only.
        public_host: the name or address that :attr:`uri` tells clients; None: ``host``.
        limits: what clients may use.
        n_ctx: positions of one text; None: what the model was trained for, at most 4096.
        n_batch, n_ubatch, n_threads, n_threads_batch, flash_attn, type_k, type_v, offload_kqv: as for
            :class:`~sllm.Context`. Texts that do not depend on drafts and neighbours to the last bit need
            what :class:`~sllm.LocalTarget` says.
        draft_threads: CPU threads of the draft; None: as for :class:`~sllm.Context`.
        rpc: keep an RPC server (:class:`sllm.rpc.RPCServer`) for this machine's devices, too, for clients
            that run a model themselves: :meth:`Remote.rpc_devices`. Whoever has the token can then crash that
            server's process, and do what it may do.
        pass_seconds: no pass takes less: a stand-in for a larger model, for tests and benchmarks.

    Raises:
        ValueError: an argument out of range; no TLS on an address that others can reach.
        VocabMismatchError: ``draft`` has another vocabulary.
        OSError: the address is in use, or a file cannot be read or written.
        RPCError: the RPC server does not start.

    Attributes:
        address: where the worker is; its ``port`` is the one in use.

    """

    _relay: Relay | None = None

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        *,
        draft: Model | str | os.PathLike[str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        state: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        public_host: str | None = None,
        limits: Limits | None = None,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        draft_threads: int | None = None,
        flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kqv: bool = True,
        rpc: bool = False,
        pass_seconds: float = 0.0,
    ) -> None:
        if insecure and not auth.is_loopback(host):
            raise ValueError(
                f"insecure is for loopback alone, and the worker is to listen on {host};"
                " leave it out, or use 127.0.0.1"
            )
        if insecure and (token is not None or certificate is not None):
            raise ValueError("insecure means neither a token nor a certificate; leave it out to use yours")
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}, expected 0 to 65535")
        limits = limits or Limits()
        self._closed = threading.Event()
        self._lock = threading.RLock()  # a signal handler may call close() in the middle of it
        self._pid = os.getpid()
        folder = Path(state) if state is not None else auth.state_folder()
        credentials = found = None
        if not insecure:
            token = (
                auth.checked_token(token) if token is not None else auth.load_or_make_token(folder / "token")
            )
            if certificate is None:
                chain, key = auth.load_or_make_certificate(folder)
            else:
                chain, key = (Path(p).read_bytes() for p in certificate)
                if not auth.belong_together(chain, key):
                    raise ValueError(
                        f"{certificate[0]} and {certificate[1]} are no certificate (PEM) and its key"
                        " (without a password)"
                    )
            credentials = (chain, key)
            found = auth.fingerprint(chain)
        with ExitStack() as stack:
            big = model if isinstance(model, Model) else stack.enter_context(Model(model))
            n_ctx = min(big.n_ctx_train or 4096, 4096) if n_ctx is None else n_ctx
            settings: dict[str, Any] = {"n_batch": n_batch, "n_ubatch": n_ubatch, "flash_attn": flash_attn}
            settings |= {"type_k": type_k, "type_v": type_v, "offload_kqv": offload_kqv}
            context = stack.enter_context(
                big.context(
                    n_ctx=n_ctx * limits.sessions,
                    n_seq_max=limits.sessions,
                    n_outputs_max=min(n_batch, 17 * limits.sessions),
                    n_threads=n_threads,
                    n_threads_batch=n_threads_batch,
                    **settings,
                )
            )
            drafting = None
            if draft is not None:
                small = draft if isinstance(draft, Model) else stack.enter_context(Model(draft))
                big.vocab.check_same(small.vocab)
                drafting = stack.enter_context(
                    small.context(
                        n_ctx=min(n_ctx, small.n_ctx_train or n_ctx) * limits.sessions,
                        n_seq_max=limits.sessions,
                        n_threads=draft_threads,
                        **settings,
                    )
                )
            self._scheduler = Scheduler(context, limits, draft=drafting, pass_seconds=pass_seconds)
            stack.callback(self._scheduler.close)
            if rpc:
                from sllm.worker.relay import Relay

                self._relay = stack.enter_context(Relay(n_threads))
            self._listen(big, context.n_ctx_seq, host, port, token, credentials, drafting is not None, stack)
            self._stack = stack.pop_all()
        bound = self._port
        self.address = auth.Address(
            public_host or ("127.0.0.1" if host in ("0.0.0.0", "::", "") else host),
            bound,
            token,
            found,
            insecure,
        )
        log.info("serving %s on %s", big.path.name, self.address.endpoint)

    def _listen(
        self,
        model: Model,
        n_ctx: int,
        host: str,
        port: int,
        token: str | None,
        credentials: tuple[bytes, bytes] | None,
        own_draft: bool,
        stack: ExitStack,
    ) -> None:
        import grpc
        from grpc_health.v1 import health_pb2_grpc

        import sllm
        from sllm.worker.service import Authentication, Health, Service

        limits = self._scheduler.limits
        service = Service(
            model,
            self._scheduler,
            n_ctx,
            own_draft=own_draft,
            software=f"sllm {sllm.__version__}",
            relay=self._relay,
        )
        n_calls = limits.sessions + limits.queue + 8
        # Nothing that the server or the scheduler holds leads back to this object, or it could never be
        # found forgotten.
        self._health = Health()
        self._scheduler.on_failure = partial(self._health.set, serving=False)
        executor = stack.enter_context(ThreadPoolExecutor(n_calls, thread_name_prefix="sllm-worker"))
        self._server = grpc.server(
            executor,
            handlers=[service.handlers()],
            interceptors=[Authentication(token, self._health)],
            maximum_concurrent_rpcs=n_calls,
            options=[
                *CHANNEL_OPTIONS,
                *(() if self._relay is None else RELAY_OPTIONS),
                ("grpc.so_reuseport", 0),  # a second worker on the same port is an error
                ("grpc.max_receive_message_length", size_limit(n_ctx)),
                ("grpc.max_metadata_size", 4096),
                ("grpc.server_handshake_timeout_ms", 10_000),
                # Clients may ask every second whether the link still stands; whether they do, so do we.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.ping_timeout_ms", 10_000),  # grpc/grpc#39239: it alone ends a connection
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._server)
        endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self._port = self._server.add_insecure_port(endpoint)
            else:
                chain, key = credentials
                self._port = self._server.add_secure_port(
                    endpoint, grpc.ssl_server_credentials([(key, chain)])
                )
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {endpoint}: is the port in use, and the host this machine?"
            ) from error
        if self._port == 0:
            raise OSError(f"cannot listen on {endpoint}")
        self._server.start()
        stack.callback(self._stop)

    def _stop(self) -> None:
        self._server.stop(grace=0.5).wait()

    @property
    def uri(self) -> str:
        """The line for the client. It holds the token: show it to nobody else."""
        return self.address.uri

    @property
    def stats(self) -> SchedulerStats:
        """Running figures."""
        return self._scheduler.stats

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed.is_set()

    @property
    def failed(self) -> bool:
        """Whether the worker cannot go on: several passes in a row have failed."""
        return self._scheduler.failed

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker is closed, ``timeout`` seconds at most; whether it is."""
        return self._closed.wait(timeout)

    def drain(self, seconds: float) -> bool:
        """Take no more texts and let the running ones end for ``seconds``; whether they all did.

        Those that go on after it are handed back when the worker closes: their clients go on elsewhere, or
        wait for it to return.
        """
        self._health.set(serving=False)
        return self._scheduler.drain(seconds)

    def close(self) -> None:
        """End every text and free what the worker holds. More calls do nothing."""
        with self._lock:
            if self._closed.is_set() or self._pid != os.getpid():
                return
            # Sessions end first, so that clients are told why; the stack then stops the server and frees the
            # model.
            self._scheduler.close()
            self._stack.close()
            self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stack") and not self.closed and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<sllm.Worker at {self.address.endpoint}{', closed' if self.closed else ''}>"

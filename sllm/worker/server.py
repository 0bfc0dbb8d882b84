"""The big machine's side: a model that answers to others over the network."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm import hosts
from sllm.engine.handle import Closing
from sllm.engine.model import Model
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, RELAY_OPTIONS, size_limit
from sllm.worker.layer_scheduler import LayerScheduler
from sllm.worker.passes import Limits, SchedulerStats
from sllm.worker.scheduler import Scheduler

if TYPE_CHECKING:
    import os

    from sllm.worker.layer_service import LayerService
    from sllm.worker.relay import Relay
    from sllm.worker.service import Service

__all__ = ["Limits", "Worker"]

log = logging.getLogger("sllm.worker")

_LAYER_ROWS = 512
"""Rows that go through layers at once; logits of none of them are needed, so more gain little."""

_LAYER_BYTES = 1 << 22
"""Of a message with hidden states; clients send a quarter of it at most."""


def _checked_layers(layers: object) -> tuple[int, int] | None:
    """A range as it was given, or None for any.

    Raises:
        ValueError: it is none.

    """
    if layers is True:
        return None
    if isinstance(layers, (tuple, list)) and len(layers) == 2 and all(type(n) is int for n in layers):
        return layers[0], layers[1]
    raise ValueError(f"layers is {layers!r}, expected (start, stop), or True for those that clients ask for")


class Worker(Closing):
    """Serves a model to clients (:func:`sllm.connect`) over gRPC, from the constructor's return until
    :meth:`close`.

    TLS and a token guard every address but loopback with ``insecure=True``. What the worker sees of its
    clients are token ids: the text, to anybody who has the vocabulary. It logs neither these nor tokens of
    access.

    Args:
        model: a model or its path. A :class:`~sllm.Model` stays the caller's to close.
        layers: serve layers to :class:`~sllm.SplitTarget` instead of texts: (start, stop), or True for those
            that clients ask for. ``model`` is then a path, of the model or of a file of
            :func:`~sllm.export_layers`, and of its weights only these layers are loaded.
        n_gpu_layers: as for :class:`~sllm.Model`, where the worker loads the model.
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
        UnsupportedModelError: the model's layers cannot be run apart from one another.
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
        layers: bool | tuple[int, int] = False,
        n_gpu_layers: int | None = None,
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
        import sllm
        from sllm.worker.layer_service import LayerService
        from sllm.worker.service import Service

        if insecure and not hosts.is_loopback(host):
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
        settings: dict[str, Any] = {"n_batch": n_batch, "n_ubatch": n_ubatch, "flash_attn": flash_attn}
        settings |= {"type_k": type_k, "type_v": type_v, "offload_kqv": offload_kqv}
        threads: dict[str, Any] = {"n_threads": n_threads, "n_threads_batch": n_threads_batch}
        software = f"sllm {sllm.__version__}"
        with ExitStack() as stack:
            service: LayerService | Service
            if layers is not False:
                if isinstance(model, Model) or draft is not None or rpc:
                    raise ValueError("layers are served from a file, and with neither a draft nor rpc")
                settings["n_batch"] = min(n_batch, _LAYER_ROWS)
                self._scheduler: Any = LayerScheduler(
                    model,
                    _checked_layers(layers),
                    limits,
                    n_ctx=n_ctx,
                    settings=settings | threads | {"n_gpu_layers": n_gpu_layers},
                    pass_seconds=pass_seconds,
                )
                stack.callback(self._scheduler.close)
                service = LayerService(self._scheduler, software=software)
                name, n_ctx = self._scheduler.file.paths[0].name, self._scheduler.n_ctx
            else:
                big = (
                    model
                    if isinstance(model, Model)
                    else stack.enter_context(Model(model, n_gpu_layers=n_gpu_layers))
                )
                n_ctx = min(big.n_ctx_train or 4096, 4096) if n_ctx is None else n_ctx
                context = stack.enter_context(
                    big.context(
                        n_ctx=n_ctx * limits.sessions,
                        n_seq_max=limits.sessions,
                        # Rows that one pass of verifying needs, and enough for scoring in few passes.
                        n_outputs_max=min(n_batch, max(64, 17 * limits.sessions)),
                        **threads,
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
                name, n_ctx = big.path.name, context.n_ctx_seq
                if rpc:
                    from sllm.worker.relay import Relay

                    self._relay = stack.enter_context(Relay(n_threads))
                service = Service(
                    big,
                    self._scheduler,
                    n_ctx,
                    own_draft=drafting is not None,
                    software=software,
                    relay=self._relay,
                )
            self._listen(service, n_ctx, host, port, token, credentials, stack)
            self._stack = stack.pop_all()
        bound = self._port
        self.address = auth.Address(
            public_host or ("127.0.0.1" if host in ("0.0.0.0", "::", "") else host),
            bound,
            token,
            found,
            insecure,
        )
        super().__init__()
        log.info("serving %s on %s", name, self.address.endpoint)

    def _listen(
        self,
        service: LayerService | Service,
        n_ctx: int,
        host: str,
        port: int,
        token: str | None,
        credentials: tuple[bytes, bytes] | None,
        stack: ExitStack,
    ) -> None:
        import grpc
        from grpc_health.v1 import health_pb2_grpc

        from sllm.worker.layer_service import LayerService
        from sllm.worker.service import Authentication, Health

        limits = self._scheduler.limits
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
                (
                    "grpc.max_receive_message_length",
                    _LAYER_BYTES if isinstance(service, LayerService) else size_limit(n_ctx),
                ),
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
        stats: SchedulerStats = self._scheduler.stats
        return stats

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed.is_set()

    @property
    def failed(self) -> bool:
        """Whether the worker cannot go on: several passes in a row have failed."""
        return bool(self._scheduler.failed)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker is closed, ``timeout`` seconds at most; whether it is."""
        return self._closed.wait(timeout)

    def drain(self, seconds: float) -> bool:
        """Take no more texts and let the running ones end for ``seconds``; whether they all did.

        Those that go on after it are handed back when the worker closes: their clients go on elsewhere, or
        wait for it to return.
        """
        self._health.set(serving=False)
        return bool(self._scheduler.drain(seconds))

    def close(self) -> None:
        """End every text and free what the worker holds. More calls do nothing."""
        with self._lock:
            if self.closed or self._in_fork:
                return
            # Sessions end first, so that clients are told why; the stack then stops the server and frees the
            # model.
            self._scheduler.close()
            self._stack.close()
            self._closed.set()

    def __repr__(self) -> str:
        return f"<sllm.Worker at {self.address.endpoint}{', closed' if self.closed else ''}>"

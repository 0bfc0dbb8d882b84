"""The big machine's side: a model served over the network."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sllm.engine._ffi import ffi, lib
from sllm.engine.handle import Closing
from sllm.engine.model import Model
from sllm.engine.mtp import Heads
from sllm.engine.params import ContextParams, changes, context_length, parse
from sllm.errors import UnsupportedModelError
from sllm.rpc.cache import DEFAULT_BYTES
from sllm.wire import auth
from sllm.wire.protocol import RELAY_OPTIONS, size_limit
from sllm.worker.certificate import Certificate
from sllm.worker.layer_scheduler import LayerScheduler
from sllm.worker.layer_service import LayerService
from sllm.worker.monitoring import Monitor, Monitoring
from sllm.worker.open_port import NO_ACCESS_CONTROL, Offer, access_of, check_reachable, listen
from sllm.worker.passes import Limits
from sllm.worker.relay import Relay
from sllm.worker.scheduler import Scheduler
from sllm.worker.service import Health, Service
from sllm.worker.users import Users

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from sllm.engine.context import Context
    from sllm.engine.params import ContextOptions
    from sllm.rpc.confine import Confinement
    from sllm.worker.feeds import Feeds
    from sllm.worker.passes import Pace, SchedulerStats

__all__ = ["Limits", "Monitoring", "Worker"]

log = logging.getLogger("sllm.worker")

_LAYER_ROWS = 512
"""Rows that go through layers at once; logits of none of them are needed, so more gain little."""

_LAYER_BYTES = 1 << 22
"""Largest message with hidden states; clients send a quarter of it at most."""

_SOFTWARE = f"sllm {ffi.string(lib.sllm_version()).decode()}"


class Worker(Closing):
    """Serves a model to clients (:func:`sllm.connect`) over gRPC, from the constructor's return until
    :meth:`close`.

    TLS and a token guard every address but loopback with ``insecure=True``. The worker sees token ids, which
    are the text to anyone who has the vocabulary. It logs nothing that clients send; gRPC's own log, which
    does, is off unless ``GRPC_VERBOSITY`` is set or the program has imported ``grpc`` before.

    Clients without a token get few resources: see ``strangers`` of :class:`Limits`. Each connection takes
    three of the process's file descriptors. Each call has a thread, and glibc retains freed memory per thread
    arena: start a long-running program of your own with ``MALLOC_ARENA_MAX=2``. ``sllm worker`` does so
    itself.

    Args:
        model: a model or its path. The caller closes a :class:`~sllm.Model`.
        layers: serve layers to :class:`~sllm.SplitTarget` instead of texts: (start, stop), or True for those
            that clients request. ``model`` is then the path of the model or of a file of
            :func:`~sllm.export_layers`, from which only these layers are loaded.
        n_gpu_layers: as for :class:`~sllm.Model`, if the worker loads the model.
        draft: a smaller model or its path, with which the worker drafts if a client has no usable hint or a
            worse one, as long as that pays off.
        mtp: draft with the model's own heads for multi-token prediction (:class:`sllm.engine.mtp.Heads`);
            None: if there is no ``draft`` and the model has a usable head.
        host, port: the address to listen on; port 0: any free port, see :attr:`address`.
        token: the secret that gives access, 16 visible characters or more; None: a random one, stored in
            ``state``. Its user is called ``default`` and has no limits of its own.
        tokens: the file of further tokens, with names and limits, which ``sllm worker token`` writes
            (:class:`sllm.worker.token_file.TokenFile`). Changes take effect within seconds: new tokens are
            accepted, and texts under a revoked token are ended. None: ``tokens.json`` in ``state``, or no
            file if ``token`` is given. The file need not exist.
        certificate: paths of a certificate chain and its key (PEM), which may be renewed while the worker
            runs; None: a self-signed one is made once and stored in ``state``.
        state: the folder for token and certificate; None: ``$SLLM_STATE``, or ``sllm`` in the user's state
            folder.
        insecure: neither TLS nor a token; loopback only.
        public_host: the name or address in :attr:`uri`; None: ``host``.
        limits: what clients may use.
        draft_threads: CPU threads of the draft; None: as for :class:`~sllm.Context`.
        rpc: also run an RPC server (:class:`sllm.rpc.RPCServer`) for this machine's devices, for clients that
            run a model themselves: :meth:`Remote.rpc_devices`. Anyone with the token can then crash that
            server's process, and do whatever that process is allowed to do, see :attr:`rpc_confinement`.
        rpc_cache_size: bytes of weights that the RPC server caches.
        monitoring: detection of hanging passes, metrics, an access log.
        pass_seconds: minimum duration of a pass, or a whole :class:`~sllm.worker.passes.Pace`: simulates a
            larger model, for tests and benchmarks.
        options: how to compute: fields of :class:`~sllm.engine.params.ContextParams`, except ``n_seq_max``,
            ``n_outputs_max`` and ``kv_unified``; ``n_ctx`` is the number of positions per text. For texts
            that do not depend on drafts and other texts, to the last bit, use the settings given at
            :class:`~sllm.LocalTarget`.

    Raises:
        ValueError: an argument out of range; no TLS on an address that others can reach.
        VocabMismatchError: ``draft`` has another vocabulary.
        UnsupportedModelError: the model's layers cannot be run separately; or ``mtp``, but the model has no
            head that can draft.
        OSError: the address is in use, or a file cannot be read or written.
        PermissionError: other users of this machine can read or replace the key or the token.
        RPCError: the RPC server does not start.
        ImportError: ``monitoring`` requests metrics, but the extra ``metrics`` is not installed.

    Examples:
        >>> with sllm.Worker(sllm.embedded.TARGET) as worker:
        ...     worker.address.host, worker.uri.startswith("sllm://")
        ('127.0.0.1', True)

    """

    _relay: Relay | None = None

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        *,
        layers: bool | tuple[int, int] = False,
        n_gpu_layers: int | None = None,
        draft: Model | str | os.PathLike[str] | None = None,
        mtp: bool | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        tokens: str | os.PathLike[str] | None = None,
        certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        state: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        public_host: str | None = None,
        limits: Limits | None = None,
        draft_threads: int | None = None,
        rpc: bool = False,
        rpc_cache_size: int = DEFAULT_BYTES,
        monitoring: Monitoring | None = None,
        pass_seconds: float | Pace = 0.0,
        **options: Unpack[ContextOptions],
    ) -> None:
        computing = parse(options, ContextParams(), without=("n_seq_max", "n_outputs_max", "kv_unified"))
        check_reachable(host, port, token, tokens, certificate, insecure=insecure)
        limits = limits or Limits()
        self._closed = threading.Event()
        self._lock = threading.RLock()  # a signal handler may call close() in the middle of it
        access = NO_ACCESS_CONTROL if insecure else access_of(token, tokens, certificate, state)
        with ExitStack() as stack:
            users = Users(access.token, access.tokens, open_to_all=insecure)
            stack.callback(users.close)
            if layers is not False:
                if isinstance(model, Model) or draft is not None or mtp or rpc:
                    raise ValueError("layers are served from a file, and with neither a draft nor rpc")
                served = _layers(model, layers, limits, users, n_gpu_layers, computing, pass_seconds, stack)
            else:
                if draft is not None and mtp:
                    raise ValueError("draft and mtp are two drafts for the same texts; leave one of them out")
                load_mtp = mtp is not False and draft is None
                big = _opened(model, stack, n_gpu_layers=n_gpu_layers, load_mtp=load_mtp)
                small = None if draft is None else _opened(draft, stack)
                contexts = _contexts(big, small, limits, computing, draft_threads, stack, mtp=mtp)
                self._relay = stack.enter_context(Relay(computing.n_threads, rpc_cache_size)) if rpc else None
                served = _texts(big, *contexts, limits, users, self._relay, pass_seconds, stack)
            # Nothing that the server or the scheduler holds leads back to this object, or it could never be
            # found forgotten.
            self._users = users
            self._scheduler: Any = served.scheduler  # of texts or of layers
            self._health = Health()
            self._scheduler.on_failure = partial(self._health.set, serving=False)
            shown = None if access.certificate is None else Certificate(*access.certificate, certificate)
            self._certificate = shown
            self._monitor = Monitor(
                monitoring or Monitoring(),
                served.scheduler,
                self._health,
                size_bytes=served.size_bytes,
                user_of=partial(_name_of, users, served.offer.feeds),
                build={"version": _SOFTWARE.removeprefix("sllm "), "model": served.name},
                chores=(lambda: None) if shown is None else shown.reload,
            )
            stack.callback(self._monitor.close)
            calls = self._monitor.calls
            bound = listen(served.offer, self._health, calls, users, access, shown, host, port, stack)
            self._stack = stack.pop_all()
        name = public_host or ("127.0.0.1" if host in ("0.0.0.0", "::", "") else host)
        self._address = auth.Address(name, bound, access.token, access.fingerprint, insecure)
        super().__init__()
        log.info("serving %s on %s", served.name, self.address.endpoint)

    @property
    def address(self) -> auth.Address:
        """The worker's address, with the port in use and the fingerprint of the current certificate."""
        shown = self._certificate
        return self._address if shown is None else replace(self._address, fingerprint=shown.fingerprint)

    @property
    def uri(self) -> str:
        """The line for clients. It contains the token: keep it secret."""
        return self.address.uri

    @property
    def rpc_confinement(self) -> Confinement | None:
        """The sandbox of the process that serves RPC; None: there is no such process."""
        return None if self._relay is None else self._relay.confinement

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
        """Whether the worker cannot continue because several passes in a row have failed."""
        return bool(self._scheduler.failed)

    @property
    def hung(self) -> bool:
        """Whether the running pass exceeds its time limit; see :class:`Monitoring`."""
        return self._monitor.watch.hung

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """The address of the metrics for Prometheus; None: there are none."""
        found = self._monitor.metrics
        return None if found is None else (found.host, found.port)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker is closed, at most ``timeout`` seconds; return whether it is."""
        return self._closed.wait(timeout)

    def drain(self, seconds: float, notice: float | None = None) -> bool:
        """Take no more texts and give the running ones ``seconds`` to end; return whether they all did.

        Clients are told how long their texts have. Texts that would not end in that time move at once, if the
        client has another worker with the same model. Texts that are still running afterwards are handed back
        when the worker closes: their clients continue elsewhere, or wait for it to return.

        Args:
            seconds: to wait.
            notice: the time in seconds that clients are told; None: ``seconds``.

        """
        self._health.set(serving=False)
        return bool(self._scheduler.drain(seconds, notice))

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


# ---- what is served


@dataclass(frozen=True)
class _Served:
    """What clients call, and what the server has to know of it.

    Attributes:
        scheduler: computes.
        offer: what clients call.
        name: of the file, for logs.
        size_bytes: of the weights.

    """

    scheduler: Scheduler | LayerScheduler
    offer: Offer
    name: str
    size_bytes: int


def _layers(
    path: str | os.PathLike[str],
    layers: object,
    limits: Limits,
    users: Users,
    n_gpu_layers: int | None,
    computing: ContextParams,
    pass_seconds: float | Pace,
    stack: ExitStack,
) -> _Served:
    settings = changes(replace(computing, n_ctx=None, n_batch=min(computing.n_batch, _LAYER_ROWS)))
    scheduler = LayerScheduler(
        path,
        _checked_range(layers),
        limits,
        n_ctx=computing.n_ctx,
        settings={**settings, "n_gpu_layers": n_gpu_layers},
        pass_seconds=pass_seconds,
    )
    stack.callback(scheduler.close)
    service = LayerService(scheduler, users, software=_SOFTWARE)
    stack.callback(service.close)
    size_bytes = sum(path.stat().st_size for path in scheduler.file.paths)
    name = scheduler.file.paths[0].name
    offer = Offer(service.handlers(), scheduler.limits, _LAYER_BYTES, feeds=service.feeds)
    return _Served(scheduler, offer, name, size_bytes)


def _checked_range(layers: object) -> tuple[int, int] | None:
    """(start, stop) as given, or None for those that clients ask for.

    Raises:
        ValueError: neither such a pair nor True.

    """
    if layers is True:
        return None
    if isinstance(layers, (tuple, list)) and len(layers) == 2 and all(type(n) is int for n in layers):
        return layers[0], layers[1]
    raise ValueError(f"layers is {layers!r}, expected (start, stop), or True for those that clients ask for")


def _opened(model: Model | str | os.PathLike[str], stack: ExitStack, **options: Any) -> Model:
    """``model``, or the one at that path, which ``stack`` closes."""
    return model if isinstance(model, Model) else stack.enter_context(Model(model, **options))


def _contexts(
    model: Model,
    draft: Model | None,
    limits: Limits,
    computing: ContextParams,
    draft_threads: int | None,
    stack: ExitStack,
    *,
    mtp: bool | None,
) -> tuple[Context, Context | Heads | None]:
    """A sequence for each session, in a context of the model, and what drafts for it."""
    if draft is not None:
        model.vocab.check_same(draft.vocab)
    n_seq = limits.sessions
    n_ctx = context_length(model.n_ctx_train) if computing.n_ctx is None else computing.n_ctx
    computing = replace(computing, n_ctx=n_ctx * n_seq, n_seq_max=n_seq)
    # Rows that one pass of verifying needs, and enough for scoring in few passes.
    n_outputs = min(computing.n_batch, max(64, 17 * n_seq))
    context = stack.enter_context(model.context(computing, n_outputs_max=n_outputs))
    if draft is None:
        return context, _heads(context, wanted=mtp)
    n_draft = min(n_ctx, draft.n_ctx_train or n_ctx)
    computing = replace(
        computing, n_ctx=n_draft * n_seq, n_threads=draft_threads, n_threads_batch=None, n_rollback=0
    )
    drafting = stack.enter_context(draft.context(computing))
    return context, drafting


def _heads(context: Context, *, wanted: bool | None) -> Heads | None:
    """The heads of the context's model: asked for, or where it has some that can draft."""
    if wanted is False or (wanted is None and context.model.n_mtp == 0):
        return None
    try:
        return Heads(context)
    except UnsupportedModelError as error:
        if wanted:
            raise
        log.info("the worker does not draft by MTP heads: %s", error)
        return None


def _texts(
    model: Model,
    context: Context,
    drafting: Context | Heads | None,
    limits: Limits,
    users: Users,
    relay: Relay | None,
    pass_seconds: float | Pace,
    stack: ExitStack,
) -> _Served:
    scheduler = Scheduler(context, limits, draft=drafting, pass_seconds=pass_seconds)
    stack.callback(scheduler.close)
    n_ctx = context.n_ctx_seq
    service = Service(
        model, scheduler, users, n_ctx, own_draft=drafting is not None, software=_SOFTWARE, relay=relay
    )
    options = () if relay is None else RELAY_OPTIONS
    offer = Offer(service.handlers(), scheduler.limits, size_limit(n_ctx), options)
    return _Served(scheduler, offer, model.path.name, model.size_bytes)


def _name_of(users: Users, feeds: Feeds | None, metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """Whose call it is: of a user, or of a worker that brings a user's rows; None: of a stranger."""
    return users.name_of(metadata) or (None if feeds is None else feeds.name_of(metadata))

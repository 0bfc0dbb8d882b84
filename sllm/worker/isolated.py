"""A worker whose model spans machines by ggml's RPC: it runs in a child process, which may be lost.

llama.cpp ends the process when an RPC server goes away, and no callback can prevent that (docs/rpc.md). So
the whole worker runs in a child, which reaches the servers through a :class:`~sllm.rpc.front.Front` each, and
this process keeps what clients know: address, token and certificate.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sllm.engine import ggml_rpc, hub
from sllm.engine._ffi import checked_seconds
from sllm.engine.devices import server_of
from sllm.engine.handle import Closing, join
from sllm.engine.model import Model
from sllm.engine.params import ContextParams, changes, parse
from sllm.errors import RPCError, SllmError
from sllm.rpc.child import MAX_MESSAGE, Child, ChildEndedError, ParentLink, error_of, leave_no_core_file
from sllm.rpc.front import through_fronts
from sllm.wire import auth
from sllm.worker.monitoring import Monitoring
from sllm.worker.open_port import check_reachable
from sllm.worker.passes import Limits
from sllm.worker.server import Worker
from sllm.worker.standby import Standby

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from sllm.engine.params import ContextOptions

__all__ = ["IsolatedWorker"]

log = logging.getLogger("sllm.worker")

_TICK_SECONDS = 0.25
"""How often the thread that keeps the child looks whether it is to end."""

_CLOSING_SECONDS = 8.0
"""What the child may take to hand back its texts and free the model; it is killed after that."""

_PROBE_SECONDS = 2.0
_LONGEST_PAUSE = 10.0
"""Between two attempts to load the model again."""

_MAX_FAILURES = 3
"""Ends of the child in a row that no RPC server explains, until the worker gives up."""

_STEADY_SECONDS = 60.0
"""A child that has served for so long has not failed at once."""


class IsolatedWorker(Closing):
    """A :class:`~sllm.Worker` in a child process, with layers on the devices of RPC servers.

    When a server is lost, the child ends, and with it the connections of the clients. From then on this
    process answers at the same port: new calls are refused by a status (UNAVAILABLE) and a text that says
    which server is away and why, so that clients with several addresses go on elsewhere and the others wait,
    as for any lost worker (``on_loss`` of :func:`sllm.connect`). Once all servers answer again a child loads
    the model anew, and the texts go on where they were. A child that ends for another reason is started
    again, too, but not more than three times in a row.

    Args:
        model: path of the model.
        devices: names of devices: those of RPC servers (:func:`sllm.rpc.add_server`), and of this machine.
        deadline: seconds for which an RPC server may owe an answer, until it counts as lost.
        n_gpu_layers: layers that go to ``devices``; None: all.
        tensor_split: proportions of the model for each device; None: by their free memory.
        draft: path of a smaller model, which is loaded on this machine.
        mtp, draft_threads: as for :class:`~sllm.Worker`.
        host, port, token, tokens, certificate, state, insecure, public_host: as for it, too.
        limits, monitoring, pass_seconds: as for it, too.
        options: how to compute, as for :class:`~sllm.Worker`.

    Raises:
        RPCError: a server is not there, or was lost during the load.
        ValueError, OSError, PermissionError, ImportError, VocabMismatchError, UnsupportedModelError,
            ModelLoadError, MemoryError, TypeError: as for Model and Worker.

    Attributes:
        away: why the model cannot be used at the moment; None: it can.
        n_starts: children that have served so far.

    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        devices: Sequence[str],
        *,
        deadline: float = 60.0,
        n_gpu_layers: int | None = None,
        tensor_split: Sequence[float] | None = None,
        draft: str | os.PathLike[str] | None = None,
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
        monitoring: Monitoring | None = None,
        pass_seconds: float = 0.0,
        **options: Unpack[ContextOptions],
    ) -> None:
        checked_seconds(deadline, "deadline")
        computing = parse(options, ContextParams(), without=("n_seq_max", "n_outputs_max", "kv_unified"))
        check_reachable(host, port, token, tokens, certificate, insecure=insecure)
        servers = [server_of(device) for device in devices]
        self._endpoints = list(dict.fromkeys(server[1] for server in servers if server is not None))
        if not self._endpoints:
            raise ValueError(f"devices is {devices!r}, expected at least one of an RPC server")
        self._limits, self._monitoring = limits or Limits(), monitoring or Monitoring()
        self._host = host
        self._network: dict[str, Any] = {
            "token": token,
            "tokens": _text(tokens),
            "certificate": None if certificate is None else [os.fspath(path) for path in certificate],
            "state": _text(state),
            "insecure": insecure,
        }
        path = hub.resolve(model).absolute()
        self._name = path.name
        self._options: dict[str, Any] = {
            "path": str(path),
            "draft": None if draft is None else str(hub.resolve(draft).absolute()),
            "draft_layers": 0 if n_gpu_layers == 0 else None,
            "devices": list(devices),
            "deadline": deadline,
            "loading": {
                "n_gpu_layers": n_gpu_layers,
                "tensor_split": None if tensor_split is None else [float(part) for part in tensor_split],
                "load_mtp": mtp is not False and draft is None,
            },
            "serving": {
                **self._network,
                **changes(computing),
                "mtp": mtp,
                "public_host": public_host,
                "draft_threads": draft_threads,
                "pass_seconds": pass_seconds,
                "limits": asdict(self._limits),
            },
        }
        self.away: str | None = None
        self.n_starts = 0
        self._failed = False
        self._over = threading.Event()
        self._draining = threading.Event()
        self._notice = 0.0  # seconds that clients are told their texts have, when it drains
        self._idle = threading.Event()  # the child has no text any more
        self._ended = threading.Event()
        self._child: Child | None = None
        child = self._load()
        try:
            self._serve(child, port, self._monitoring.metrics)
        except BaseException:
            child.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(child,), name="sllm-isolated", daemon=True)
        self._thread.start()
        super().__init__()

    # ---- what a Worker has

    @property
    def address(self) -> auth.Address:
        """Where the worker is; the fingerprint is that of the certificate which was shown last."""
        return self._address

    @property
    def uri(self) -> str:
        """The line for the client. It holds the token: show it to nobody else."""
        return self._address.uri

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Where the figures for Prometheus are; None: nowhere."""
        return self._metrics

    @property
    def pid(self) -> int | None:
        """The process that has the model; None: there is none at the moment."""
        child = self._child
        return None if child is None else child.pid

    @property
    def rpc_confinement(self) -> None:
        """None: it keeps no RPC server for others."""
        return None

    @property
    def hung(self) -> bool:
        """False: a child whose pass hangs ends by itself (``pass_grace``), and another is started."""
        return False

    @property
    def failed(self) -> bool:
        """Whether the worker has given up: its child has ended three times in a row, with no server lost."""
        return self._failed

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker is closed, ``timeout`` seconds at most; whether it is."""
        return self._ended.wait(timeout)

    def drain(self, seconds: float, notice: float | None = None) -> bool:
        """See :meth:`Worker.drain`; without a child there is nothing to wait for."""
        if not self._draining.is_set():
            self._notice = seconds if notice is None else notice
            self._draining.set()  # first: _serve() looks at it after it has set the child
            child = self._child
            if child is not None:
                child.send({"drain": self._notice})
        until = time.monotonic() + seconds
        while self._child is not None and not self._idle.is_set():
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._idle.wait(min(left, _TICK_SECONDS))
        return True

    def close(self) -> None:
        """End every text, the child and the port. More calls do nothing."""
        if self._in_fork:
            return
        self._over.set()
        join(self._thread)
        self._ended.set()

    def __repr__(self) -> str:
        return f"<isolated worker at {self._address.endpoint}{', closed' if self.closed else ''}>"

    # ---- the child

    def _load(self) -> Child:
        """A child that has loaded the model, and listens nowhere yet.

        Raises:
            Exception: as the constructor.

        """
        monitoring = self._monitoring
        shown = None if monitoring.access_log is None else os.fspath(monitoring.access_log)
        settings = {**asdict(monitoring), "access_log": shown}
        # Its stderr is ours: for an access log, and for what the C library says where it ends the process.
        stderr = os.dup(2)
        try:
            options = {**self._options, "monitoring": settings, "stderr": stderr}
            child = Child("sllm.worker.isolated:_serve", options, descriptors=[stderr])
        finally:
            os.close(stderr)
        try:
            self._expect(child, "loaded")
        except BaseException:
            child.close()
            raise
        return child

    def _serve(self, child: Child, port: int, metrics: tuple[str, int] | None) -> None:
        """Have a child listen.

        Raises:
            Exception: as the constructor.

        """
        child.send({"port": port, "host": self._host, "metrics": metrics})
        reply = self._expect(child, "uri")
        self._address = auth.Address.parse(reply["uri"])
        found = reply["metrics"]
        self._metrics: tuple[str, int] | None = None if found is None else (found[0], found[1])
        self.n_starts += 1
        self.away = None
        self._child = child
        if self._draining.is_set():
            child.send({"drain": self._notice})

    def _expect(self, child: Child, key: str) -> dict[str, Any]:
        """The child's message that has ``key``, with what it logs meanwhile logged here.

        Raises:
            Exception: what it has failed with.
            RPCError: it has lost a server.
            ChildEndedError: it has ended.
            _OverError: the worker is to end.

        """
        while not self._over.is_set():
            with suppress(TimeoutError):
                message = child.receive(_TICK_SECONDS)
                if key in message:
                    found: dict[str, Any] = message
                    return found
                if "error" in message:
                    raise error_of(message)
                self._take(message)
        raise _OverError

    def _take(self, message: dict[str, Any]) -> None:
        """A message of a child that serves."""
        if "log" in message:
            level, text = message["log"]
            log.log(level, "%s", text)
        elif "lost" in message:
            raise RPCError(message["lost"])
        elif "renewed" in message:
            self._address = auth.Address.parse(message["renewed"])
        elif "idle" in message:
            self._idle.set()

    # ---- the thread

    def _run(self, child: Child | None) -> None:
        failures = 0
        try:
            while child is not None:
                began = time.monotonic()
                try:
                    self._watch(child)
                except RPCError as error:
                    failures = 0
                    self.away = str(error)
                except (ChildEndedError, SllmError) as error:
                    failures = 1 if time.monotonic() - began > _STEADY_SECONDS else failures + 1
                    self.away = str(error)
                finally:
                    self._child = None
                    child.close()
                if self._over.is_set() or self._draining.is_set():
                    return
                if failures >= _MAX_FAILURES:
                    self._give_up()
                    return
                child = self._bring_back()
        except Exception as error:
            log.exception("the worker cannot go on")
            self.away = str(error)
            self._give_up()

    def _give_up(self) -> None:
        log.error("the worker gives up: %s", self.away)
        self._failed = True

    def _watch(self, child: Child) -> None:
        """Take what a child says until the worker is to end.

        Raises:
            RPCError: the child has lost a server.
            ChildEndedError, SllmError: it has ended otherwise.

        """
        while not self._over.is_set():
            with suppress(TimeoutError):
                message = child.receive(_TICK_SECONDS)
                if "error" in message:
                    raise error_of(message)
                self._take(message)
        child.send("close")
        child.has_ended(_CLOSING_SECONDS)

    def _bring_back(self) -> Child | None:
        """Hold the port until a child has loaded the model again; None: the worker is to end.

        What goes wrong meanwhile is what clients are told, and is tried again.
        """
        began = time.monotonic()
        log.warning("%s; clients wait until the model is back", self.away)
        port, metrics = self._address.port, self._metrics
        pause = 0.5
        while not self._over.is_set() and not self._draining.is_set():
            with ExitStack() as stack, suppress(_OverError):
                try:
                    standby = stack.enter_context(self._standby(port, metrics))
                    child = stack.enter_context(self._back(standby))
                    standby.close()
                    self._serve(child, port, metrics)
                except _OverError:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, it may be over next time
                    self._say(str(error) or type(error).__name__)
                else:
                    stack.pop_all()
                    log.warning("serving again after %.0f s", time.monotonic() - began)
                    return child
            self._over.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return None

    def _standby(self, port: int, metrics: tuple[str, int] | None) -> Standby:
        return Standby(
            self._name,
            host=self._host,
            port=port,
            **self._network,
            limits=self._limits,
            monitoring=replace(self._monitoring, metrics=metrics),
            reason=self._reason(),
        )

    def _reason(self) -> str:
        return f"the worker waits for its model to come back: {self.away}"

    def _say(self, away: str) -> None:
        if away != self.away:
            log.warning("still waiting: %s", away)
        self.away = away

    def _back(self, standby: Standby) -> Child:
        """A child that has loaded the model, once all servers answer.

        Raises:
            _OverError: the worker is to end.
            Exception: the load has failed.

        """
        pause = 0.5
        while (away := self._first_away()) is not None:
            if self._over.wait(pause) or self._draining.is_set():
                raise _OverError
            pause = min(1.5 * pause, 2.0)
            self._say(away)
            standby.reason = self._reason()
        standby.reason = "the worker's servers are back, and it loads its model"
        return self._load()

    def _first_away(self) -> str | None:
        """What is wrong with the first server that does not answer; None: all do."""
        return next(filter(None, map(_trouble, self._endpoints)), None)


class _OverError(Exception):
    """The worker is to end."""


def _trouble(endpoint: str) -> str | None:
    try:
        ggml_rpc.probe(endpoint, _PROBE_SECONDS)
    except RPCError as error:
        return str(error)
    return None


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


# ---- the child


class _ToParent(logging.Handler):
    """The child's warnings, for the parent's log."""

    def __init__(self, link: ParentLink) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):
            self._link.send({"log": [record.levelno, record.getMessage()[:MAX_MESSAGE]]})


def _serve(
    parent: int,
    *,
    path: str,
    draft: str | None,
    draft_layers: int | None,
    devices: list[str],
    deadline: float,
    loading: dict[str, Any],
    serving: dict[str, Any],
    monitoring: dict[str, Any],
    stderr: int,
) -> None:
    """What the child process runs."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = ParentLink(parent, told.put)
    os.dup2(stderr, 2)
    os.close(stderr)
    leave_no_core_file()
    logging.getLogger("sllm").addHandler(_ToParent(link))

    def lost(reason: str) -> None:
        link.send({"lost": reason})
        os._exit(1)

    with ExitStack() as stack:
        try:
            # Before llama.cpp knows the servers: the draft is for this machine.
            small = None
            if draft is not None:
                small = stack.enter_context(Model(draft, n_gpu_layers=draft_layers))
            names, _fronts = through_fronts(devices, deadline=deadline, on_loss=lost)
            model = stack.enter_context(Model(path, devices=names, **loading))
            link.send({"loaded": True})
            network = told.get()
            metrics = network.pop("metrics")
            shown = Monitoring(**{**monitoring, "metrics": None if metrics is None else tuple(metrics)})
            limits = Limits(**{**serving.pop("limits"), "hops": ()})
            worker = stack.enter_context(
                Worker(model, draft=small, limits=limits, monitoring=shown, **network, **serving)
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
            link.send_error(error)
            os._exit(1)
        link.send({"uri": worker.uri, "metrics": worker.metrics_address})
        _until_told(worker, link, told)
    os._exit(0)  # the fronts' threads go with it


def _until_told(worker: Worker, link: ParentLink, told: queue.SimpleQueue[Any]) -> None:
    """Serve until the parent says that it is over."""
    uri, idle = worker.uri, False
    until: float | None = None  # clients are told that their texts have so long; None: it does not drain
    while True:
        with suppress(queue.Empty):
            command = told.get(timeout=1.0 if until is None or idle else 0.05)
            if command == "close":
                return
            until = time.monotonic() + command["drain"]
        if worker.failed:
            link.send_error(SllmError("three passes in a row have failed"))
            os._exit(1)
        if until is not None and not idle and worker.drain(0, max(0.0, until - time.monotonic())):
            idle = True
            link.send({"idle": True})
        if worker.uri != uri:
            uri = worker.uri
            link.send({"renewed": uri})

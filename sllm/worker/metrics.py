"""A worker's figures for Prometheus, and whether it is well, over HTTP."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from sllm import hosts
from sllm.engine.handle import join
from sllm.extras import needs

with needs("metrics"):
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sllm.worker.access_log import AccessLog
    from sllm.worker.calls import Calls
    from sllm.worker.passes import PassLoop, SchedulerStats
    from sllm.worker.service import Health
    from sllm.worker.watch import Watch

__all__ = ["Figures", "FiguresAway", "MetricsServer"]

_CONNECTIONS = 16
"""Requests at once; further connections are closed."""

_REQUEST_SECONDS = 5.0
"""How long a connection may take, from the first byte to the last."""


class Figures(Collector):
    """What a worker is and has done, read when it is asked for. Labels have a few values each: none is a
    client's to choose.

    Args:
        loop: what computes.
        calls: what crossed the wire.
        health: whether texts are taken.
        watch: whether a pass hangs.
        access_log: whose lost records count; None: there is none.
        build: of ``sllm_build_info``: the software, the model.

    """

    def __init__(
        self,
        loop: PassLoop[Any],
        calls: Calls,
        health: Health,
        watch: Watch,
        access_log: AccessLog | None,
        build: Mapping[str, str],
    ) -> None:
        self._loop = loop
        self._calls = calls
        self._health = health
        self._watch = watch
        self._access_log = access_log
        self._build = dict(build)

    @property
    def serving(self) -> bool:
        """Whether texts are taken."""
        return self._health.serving

    @property
    def alive(self) -> bool:
        """Whether the worker can go on: no pass hangs, and they do not fail."""
        return not (self._watch.hung or self._loop.failed)

    def collect(self) -> Iterable[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        loop = self._loop
        yield InfoMetricFamily("sllm_build", "The software and the model.", self._build)
        yield _gauge("sllm_serving", "1 where texts are taken, as the health says.", self.serving)
        yield _gauge("sllm_hung", "1 while a pass takes longer than it may.", self._watch.hung)
        yield _gauge("sllm_pass_limit_seconds", "What a pass may take.", loop.progress.allowed)
        yield _gauge("sllm_sessions", "Texts or sequences that have a place.", len(loop.running()))
        yield _gauge("sllm_session_places", "Places for texts or sequences.", loop.limits.sessions)
        yield _gauge("sllm_queue_length", "Texts that wait for a place.", loop.n_queued)
        yield _gauge("sllm_queue_places", "Texts that may wait.", loop.limits.queue)
        held, room = loop.kv_positions()
        cells = GaugeMetricFamily("sllm_kv_cells", "Positions of the KV cache.", labels=["state"])
        cells.add_metric(["used"], held)
        cells.add_metric(["free"], max(room - held, 0))
        yield cells
        yield from _computed(loop.stats)
        yield from self._wire()

    def _wire(self) -> Iterator[Metric]:
        totals = self._calls.totals()
        yield _counter("sllm_received_bytes", "Bytes of messages from clients.", totals.bytes_in)
        yield _counter("sllm_sent_bytes", "Bytes of messages to clients.", totals.bytes_out)
        yield _counter("sllm_round_trips", "Messages of clients that ask for an answer.", totals.round_trips)
        yield _labelled("sllm_calls", "Calls.", "kind", totals.calls)
        yield _labelled("sllm_ended", "Texts, sequences and scores, by how they ended.", "how", totals.ended)
        yield _labelled("sllm_refused", "Calls that ended in an error.", "reason", totals.refused)
        yield _labelled("sllm_user_tokens", "Tokens of each named user's texts.", "user", totals.user_tokens)
        lost = 0 if self._access_log is None else self._access_log.lost
        yield _counter("sllm_access_log_lost", "Records that the access log could not take.", lost)


class FiguresAway(Collector):
    """What is left to tell while the process with the model is away, and comes back: ``/live`` is well,
    ``/health`` is not.

    Args:
        build: as for :class:`Figures`.

    """

    serving = False
    alive = True

    def __init__(self, build: Mapping[str, str]) -> None:
        self._build = dict(build)

    def collect(self) -> Iterable[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        yield InfoMetricFamily("sllm_build", "The software and the model.", self._build)
        yield _gauge("sllm_serving", "1 where texts are taken, as the health says.", self.serving)


def _computed(stats: SchedulerStats) -> Iterator[Metric]:
    yield _counter("sllm_sessions_opened", "Texts or sequences opened.", stats.sessions_total)
    yield _counter("sllm_tokens", "Tokens committed.", stats.tokens)
    own_drafted, own_accepted = stats.own_drafted, stats.own_accepted
    drafted = {"client": stats.drafted - own_drafted, "worker": own_drafted}
    accepted = {"client": stats.accepted - own_accepted, "worker": own_accepted}
    yield _labelled("sllm_drafted_tokens", "Drafted tokens verified, by who drafted.", "by", drafted)
    yield _labelled("sllm_accepted_tokens", "Of these, accepted.", "by", accepted)
    prompts = {"computed": stats.prompt_rows, "reused": stats.reused_tokens}
    yield _labelled("sllm_prompt_tokens", "Tokens of prompts: computed, or still in memory.", "how", prompts)
    yield _counter("sllm_prompt_seconds", "Seconds of computing prompts.", stats.prompt_seconds)
    decode = stats.busy_seconds - stats.prompt_seconds
    yield _counter("sllm_decode_seconds", "Seconds of passes.", max(decode, 0.0))
    yield _counter("sllm_passes", "Passes.", stats.passes)
    yield _counter("sllm_rows", "Rows of all passes.", stats.rows)
    rows = HistogramMetricFamily("sllm_pass_rows", "Passes by their rows.")
    sizes, n = [], 0
    for i, size in enumerate(list(stats.batch_sizes)):
        n += size
        sizes.append((str(float(1 << i)), float(n)))
    rows.add_metric([], [*sizes, ("+Inf", float(n))], sum_value=stats.rows)
    yield rows


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, float(value))


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, float(value))


def _labelled(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


class MetricsServer:
    """Answers ``GET`` of three paths, over HTTP without TLS or a token.

    - ``/metrics``: the figures, and those of the process (memory, CPU, descriptors).
    - ``/health``: 200 while texts are taken, else 503: for whoever chooses among workers.
    - ``/live``: 503 where the worker cannot go on, also 200 while it ends: for whoever restarts workers.

    Args:
        host, port: where to listen; port 0: any that is free.
        figures: what to tell.

    Raises:
        OSError: the address is in use or not this machine's.

    Attributes:
        host, port: where it listens.

    """

    def __init__(self, host: str, port: int, figures: Figures | FiguresAway) -> None:
        registry = CollectorRegistry()
        registry.register(figures)
        ProcessCollector(registry=registry)

        def answer(path: str) -> tuple[int, bytes]:
            if path == "/metrics":
                return 200, generate_latest(registry)
            if path in ("/health", "/live"):
                well = figures.serving if path == "/health" else figures.alive
                return (200, b"ok\n") if well else (503, b"not ok\n")
            return 404, b"there are /metrics, /health and /live\n"

        class Handler(_Handler):
            answered = staticmethod(answer)

        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, address, Handler)
        except OSError as error:
            where = hosts.host_port(host, port)
            raise OSError(
                error.errno, f"cannot listen on {where} for metrics: {error.strerror or error}"
            ) from error
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.25,), name="sllm-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the server and its connections. More calls do nothing."""
        self._server.shutdown()
        join(self._thread)
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_version = "sllm"
    sys_version = ""
    answered: Any

    def do_GET(self) -> None:
        """Answer; called by http.server."""
        status, body = self.answered(self.path.partition("?")[0])
        self.send_response(status)
        figures = status == 200 and body[:1] == b"#"
        self.send_header("Content-Type", CONTENT_TYPE_LATEST if figures else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a line for each scrape tells nobody anything, and a stranger could choose it."""


class _Server(socketserver.ThreadingTCPServer):
    """A thread for each request, of which there are few, and none lasts."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, address: Any, handler: type[_Handler]) -> None:
        self.address_family = family
        self._lock = threading.Lock()
        self._live: dict[socket.socket, tuple[float, threading.Thread]] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="sllm-metrics",
            daemon=True,
        )
        with self._lock:
            full = len(self._live) >= _CONNECTIONS
            if not full:
                self._live[request] = (time.monotonic(), thread)
        if full:
            self.shutdown_request(request)
        else:
            thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._live.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called four times a second: hang up on whoever takes too long."""
        self._hang_up(time.monotonic() - _REQUEST_SECONDS)

    def server_close(self) -> None:
        super().server_close()
        for thread in self._hang_up(time.monotonic()):
            join(thread)

    def _hang_up(self, latest: float) -> list[threading.Thread]:
        """Shut down the connections that began before; their threads."""
        with self._lock:
            late = [(one, thread) for one, (began, thread) in self._live.items() if began <= latest]
            for one, _ in late:
                with suppress(OSError):  # its client was sooner
                    one.shutdown(socket.SHUT_RDWR)
        return [thread for _, thread in late]

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A client that has gone away is nobody's trouble."""

"""Figures for Prometheus: true, one worker's alone, bounded in their labels, and never in the way."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from raw_client import TOKEN, Client, hint, opening, wait_until

import sllm
from sllm.wire.protocol import pb
from sllm.worker import metrics
from sllm.worker.calls import KINDS, REFUSALS
from sllm.worker.monitoring import Monitoring
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sllm.engine.model import Model

parser = pytest.importorskip("prometheus_client.parser")

MEASURED = Monitoring(metrics=("127.0.0.1", 0))
OPTIONS: dict[str, Any] = {"n_ctx": 64, "token": TOKEN, "monitoring": MEASURED}


def get(worker: Worker, path: str) -> tuple[int, str]:
    assert worker.metrics_address is not None
    connection = http.client.HTTPConnection(*worker.metrics_address, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def figures(worker: Worker) -> dict[str, float]:
    """What a scrape shows: ``name{label=value}`` and the number."""
    status, text = get(worker, "/metrics")
    assert status == 200
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_the_figures_are_true(tmp_path: Path, draft_model: Model) -> None:
    with (
        Worker(draft_model, state=tmp_path, limits=Limits(sessions=2, queue=1), **OPTIONS) as worker,
        Client(worker.address) as client,
    ):
        before = figures(worker)
        assert before["sllm_sessions_opened_total"] == before["sllm_queue_length"] == 0
        assert before["sllm_session_places"] == 2
        assert before["sllm_kv_cells{state=used}"] == 0
        assert before["sllm_kv_cells{state=free}"] == 2 * client.info().n_ctx
        assert before[f"sllm_build_info{{model={draft_model.path.name},version={sllm.__version__}}}"] == 1

        text = client.generate(opening((5, 6, 7, 8), max_tokens=10)).run()
        client.call("Score", pb.ScoreRequest(tokens=[5, 6, 7, 8], start=1))
        with pytest.raises(grpc.RpcError):
            client.call("Score", pb.ScoreRequest(tokens=[5], start=9))
        with pytest.raises(grpc.RpcError):
            client.call("Nothing", b"")
        with Client(worker.address, token=None) as stranger, pytest.raises(grpc.RpcError):
            stranger.info()
        streams = [client.generate(opening(max_tokens=9, run_ahead=False)) for _ in range(2)]
        for stream in streams:
            stream.until(0)
        streams.append(client.generate(opening(max_tokens=9, run_ahead=False)))
        wait_until(lambda: worker._scheduler.n_queued == 1)
        assert client.generate(opening()).end()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        now = figures(worker)
        assert now["sllm_sessions"] == 2
        assert now["sllm_queue_length"] == 1
        for stream in streams:
            stream.cancel()

        stats = worker.stats
        wait_until(lambda: figures(worker).get("sllm_ended_total{how=gone}") == 3)
        after = figures(worker)
        assert after["sllm_tokens_total"] == stats.tokens >= len(text) == 10
        assert after["sllm_passes_total"] == stats.passes == after["sllm_pass_rows_count"]
        assert after["sllm_rows_total"] == stats.rows
        assert after["sllm_sessions_opened_total"] == stats.sessions_total
        assert after["sllm_prompt_tokens_total{how=computed}"] > 0
        assert after["sllm_prompt_seconds_total"] > 0 < after["sllm_decode_seconds_total"]
        assert after["sllm_ended_total{how=length}"] == 1
        assert after["sllm_ended_total{how=ok}"] == 1  # the score
        refused = {name: n for name, n in after.items() if name.startswith("sllm_refused")}
        assert refused == {
            f"sllm_refused_total{{reason={reason}}}": 1.0
            for reason in ("token", "invalid", "not_offered", "busy")
        }
        assert after["sllm_calls_total{kind=generate}"] == 5
        assert after["sllm_calls_total{kind=score}"] == 2
        assert after["sllm_received_bytes_total"] >= 64 * 5
        assert after["sllm_sent_bytes_total"] >= 64 * 11
        assert after["sllm_kv_cells{state=used}"] > 0
        assert after["sllm_hung"] == 0 < after["sllm_pass_limit_seconds"]
        if sys.platform == "linux":
            assert after["process_resident_memory_bytes"] > 1e6


def test_drafts_are_told_by_who_made_them(tmp_path: Path, draft_model: Model) -> None:
    with (
        Worker(draft_model, draft=draft_model, state=tmp_path, **OPTIONS) as worker,
        Client(worker.address) as client,
    ):
        text = client.generate(opening(max_tokens=20)).run()
        # The same text again, with its own first tokens as the hint.
        stream = client.generate(opening(max_tokens=20, run_ahead=False))
        stream.send(hint(3, text[:12], 1))
        stream.until(1)
        stream.cancel()
        wait_until(lambda: not worker._scheduler.running(), "the end of the text")
        found = figures(worker)
        stats = worker.stats
        by_worker = found["sllm_drafted_tokens_total{by=worker}"]
        assert by_worker == stats.own_drafted > 0
        assert found["sllm_drafted_tokens_total{by=client}"] == stats.drafted - stats.own_drafted
        assert found["sllm_accepted_tokens_total{by=worker}"] == stats.own_accepted


def test_two_workers_in_one_process(tmp_path: Path, draft_model: Model) -> None:
    with Worker(draft_model, state=tmp_path, **OPTIONS) as one:
        with Worker(draft_model, state=tmp_path, **OPTIONS) as two, Client(two.address) as client:
            client.generate(opening(max_tokens=5)).run()
            assert figures(one)["sllm_sessions_opened_total"] == 0
            assert figures(two)["sllm_sessions_opened_total"] == 1
        assert figures(one)["sllm_sessions_opened_total"] == 0
    with pytest.raises(ConnectionRefusedError):
        get(one, "/metrics")
    assert not [t for t in threading.enumerate() if t.name.startswith("sllm-metrics")]


def test_no_label_is_a_clients_to_choose(tmp_path: Path, draft_model: Model) -> None:
    with Worker(draft_model, state=tmp_path, **OPTIONS) as worker, Client(worker.address) as client:
        for i in range(30):
            client.metadata = (*client.metadata, (f"x-{i}", f"word{i}"))
            for name in (f"Method{i}", f"/service{i}.x/Call"):
                with pytest.raises(grpc.RpcError):
                    client.call(name, b"")
        names = set(figures(worker))
        assert figures(worker)["sllm_calls_total{kind=other}"] == 60
    assert not [name for name in names if "word" in name or "Method" in name or "service" in name]
    kinds = {name for name in names if name.startswith("sllm_calls_total")}
    assert kinds <= {f"sllm_calls_total{{kind={kind}}}" for kind in [*KINDS.values(), "other"]}
    assert len(set(REFUSALS.values())) == len(REFUSALS)


def test_probes(tmp_path: Path, draft_model: Model) -> None:
    with Worker(draft_model, state=tmp_path, **OPTIONS) as worker:
        assert get(worker, "/health") == get(worker, "/live?x=1") == (200, "ok\n")
        assert get(worker, "/nothing")[0] == get(worker, "/metrics/")[0] == 404
        worker._health.set_hung(hung=True)
        assert get(worker, "/health")[0] == 503
        worker._health.set_hung(hung=False)
        worker.drain(0)  # whoever chooses among workers takes another one; nobody restarts this one
        assert get(worker, "/health") == (503, "not ok\n")
        assert get(worker, "/live")[0] == 200
        worker._scheduler.failed = True
        assert get(worker, "/live")[0] == 503


def test_who_says_nothing_is_hung_up_on(
    tmp_path: Path, draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(metrics, "_CONNECTIONS", 4)
    with contextlib.ExitStack() as stack:
        with Worker(draft_model, state=tmp_path, **OPTIONS) as worker:
            address: Any = worker.metrics_address
            silent = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(8)]
            for one in silent:
                with contextlib.suppress(OSError):
                    one.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            for one in silent:
                with contextlib.suppress(OSError):  # reset, where it was one too many
                    assert one.recv(100) == b""
            wait_until(lambda: _answers(worker))
            last = stack.enter_context(socket.create_connection(address, timeout=60))
        with contextlib.suppress(OSError):
            assert last.recv(100) == b""


def _answers(worker: Worker) -> bool:
    try:
        return get(worker, "/metrics")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_hang_is_seen_while_it_lasts(
    tmp_path: Path, draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    verify = sllm.Context.verify

    def hanging(self: Any, *args: Any, **options: Any) -> Any:
        assert go_on.wait(120)
        return verify(self, *args, **options)

    monkeypatch.setattr(sllm.Context, "verify", hanging)
    watched = Monitoring(metrics=("127.0.0.1", 0), pass_limit=0.1)
    with (
        Worker(draft_model, state=tmp_path, n_ctx=64, token=TOKEN, monitoring=watched) as worker,
        Client(worker.address) as client,
    ):
        stream = client.generate(opening(max_tokens=2))
        wait_until(lambda: worker.hung)
        assert figures(worker)["sllm_hung"] == 1 > figures(worker)["sllm_serving"]
        assert get(worker, "/live")[0] == get(worker, "/health")[0] == 503
        go_on.set()
        stream.run()
        wait_until(lambda: get(worker, "/health")[0] == 200)


def test_an_address_in_use_is_an_error(tmp_path: Path, draft_model: Model) -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, said in (("127.0.0.1", "in use"), ("192.0.2.1", "assign")):
            options = {**OPTIONS, "monitoring": Monitoring(metrics=(host, port))}
            with pytest.raises(OSError, match=f"cannot listen on {host}:{port} for metrics: .*({said})"):
                Worker(draft_model, state=tmp_path, **options)
    assert threading.active_count() == before


def test_without_the_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.delitem(sys.modules, "sllm.worker.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    said = refused("worker", "--listen", "127.0.0.1:0", "--state", str(tmp_path), "--metrics", "127.0.0.1:0")
    assert said == (
        "the package prometheus_client is missing, for a worker's figures for Prometheus:"
        " pip install 'sllm[metrics]'"
    )


def test_a_scrape_during_work_costs_nobody_a_thread(tmp_path: Path, draft_model: Model) -> None:
    with Worker(draft_model, state=tmp_path, **OPTIONS) as worker, Client(worker.address) as client:
        stream = client.generate(opening(max_tokens=50))
        for _ in range(20):
            figures(worker)
        assert len(stream.run()) <= 50
        until = time.monotonic() + 60
        while sum(t.name == "sllm-metrics" for t in threading.enumerate()) > 1:
            assert time.monotonic() < until

"""The access log: what was done, nothing of what was said, and no trouble where it cannot be written."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from raw_client import TOKEN, Client, opening, wait_until

import sllm
from sllm.wire.protocol import pb
from sllm.worker import access_log, calls
from sllm.worker.access_log import AccessLog
from sllm.worker.monitoring import Monitoring
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from pathlib import Path

    from sllm.engine.model import Model

KEYS = {
    *("time", "peer", "user", "kind", "model", "ended", "seconds", "tokens_in", "tokens_reused"),
    *("tokens_out", "rows", "passes", "bytes_in", "bytes_out"),
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(model: Model | Path, path: Path, **options: Any) -> Worker:
    monitoring = Monitoring(access_log=path)
    more = {"n_ctx": 128, "token": TOKEN, "state": path.parent / "state", **options}
    return Worker(model, monitoring=monitoring, **more)


def test_a_line_for_each_call(tmp_path: Path, draft_model: Model) -> None:
    path = tmp_path / "access.log"
    prompt = [5, 6, 7, 8]
    with logged(draft_model, path) as worker, Client(worker.address) as client:
        text = client.generate(opening(prompt, max_tokens=10)).run()
        client.call("Score", pb.ScoreRequest(tokens=prompt, start=1))
        client.info()
        assert client.generate(opening((5, 10**6))).end()[0] is grpc.StatusCode.INVALID_ARGUMENT
        stream = client.generate(opening(max_tokens=9, run_ahead=False))
        wait_until(lambda: worker._scheduler.running())
        stream.cancel()
        wait_until(lambda: len(lines(path)) == 5)
        client.call("/grpc.health.v1.Health/Check", b"")  # every few seconds by every probe: no line
        passes = worker.stats.passes
    records = lines(path)
    assert all(set(record) == KEYS for record in records)
    assert [record["kind"] for record in records] == ["generate", "score", "info", "generate", "generate"]
    assert [record["ended"] for record in records] == ["length", "ok", "ok", "invalid", "gone"]
    first, score = records[:2]
    assert first["model"] == draft_model.path.name
    assert (first["tokens_in"], first["tokens_out"], first["passes"]) == (4, len(text), passes)
    assert first["rows"] >= first["passes"]
    assert first["bytes_in"] >= 64 and first["bytes_out"] >= 64 * (passes + 1)
    assert score["tokens_in"] == 4 and score["rows"] == 3
    assert re.fullmatch(r"127\.0\.0\.1:\d+", first["peer"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert all(0 <= record["seconds"] < 300 for record in records)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [t for t in threading.enumerate() if t.name.startswith("sllm-access")]


def test_nothing_of_a_text_is_in_it(tmp_path: Path, target_model: Model) -> None:
    path = tmp_path / "access.log"
    canary = "zebra quartz"
    grammar = f'root ::= "{canary}"'
    with logged(target_model, path) as worker, sllm.connect(worker.uri) as remote:
        sampling = sllm.SamplingParams(grammar=grammar)
        prompt = f"My number is 13800138000, {canary}."
        made = sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=20)
        assert made.text() == canary
        tokens = target_model.vocab.encode(prompt).tolist()
        with Client(worker.address) as client:
            client.metadata = (*client.metadata, ("user-agent", canary), ("x-canary", canary))
            for name in (canary.replace(" ", ""), "Info"):
                with pytest.raises(grpc.RpcError):
                    client.call(name, canary.encode())
            stream = client.generate(opening(tokens, max_tokens=1, text_id=13800138000, model_id=canary))
            assert stream.end()[0] is grpc.StatusCode.FAILED_PRECONDITION
            wait_until(lambda: any(record["ended"] == "other_model" for record in lines(path)))
    written = path.read_text()
    for secret in ("zebra", "quartz", "13800138000", TOKEN, "root"):
        assert secret not in written
    # Every value is a number, or a word of a list.
    for record in lines(path):
        words = {name: value for name, value in record.items() if isinstance(value, str)}
        assert set(words) <= {"time", "peer", "user", "kind", "model", "ended"}


def test_layers_have_lines_too(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "access.log"
    with (
        logged(llama, path, layers=True, n_ctx=256) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.SplitTarget(llama, head=1, tail=1, middle=remote, n_ctx=256) as target,
    ):
        assert sllm.generate(target, "Once", max_tokens=3).text()
        wait_until(lambda: any(record["kind"] == "layers" for record in lines(path)))
    record = next(record for record in lines(path) if record["kind"] == "layers")
    assert record["rows"] == record["tokens_in"] > 0
    assert record["passes"] > 0 < record["bytes_in"]


def test_strangers_do_not_fill_the_disk(
    tmp_path: Path, draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_STRANGERS_PER_SECOND", 0)
    path = tmp_path / "access.log"
    with logged(draft_model, path) as worker, Client(worker.address, token="wrong" * 5) as stranger:
        for _ in range(12):
            with pytest.raises(grpc.RpcError):
                stranger.info()
        wait_until(lambda: worker._monitor.calls.totals().refused["token"] == 12)
        with Client(worker.address) as client:
            client.info()  # is written however many there were
            wait_until(lambda: any(record["ended"] == "ok" for record in lines(path)))
            monkeypatch.setattr(calls, "_STRANGERS_PER_SECOND", 1000)
            with pytest.raises(grpc.RpcError):
                stranger.info()
            wait_until(lambda: any(record["ended"] == "token" for record in lines(path)))
    refused = [record for record in lines(path) if record["ended"] == "token"]
    assert [record["unlogged"] for record in refused] == [12]
    assert set(refused[0]) == KEYS | {"unlogged"}


# ---- the file


def written(log: AccessLog, path: Path, *numbers: int) -> list[int]:
    """Write records, and wait until they are in the file, or lost."""
    for n in numbers:
        log.write({"n": n})
    wait_until(lambda: log._records.empty())
    log.close()
    return [record["n"] for record in lines(path)]


def test_rotation(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    log = AccessLog(path)
    log.write({"n": 1})
    wait_until(lambda: len(lines(path)) == 1)
    path.rename(old)
    log.write({"n": 2})
    wait_until(lambda: len(lines(path)) == 1)
    os.truncate(path, 0)  # logrotate's copytruncate
    log.write({"n": 3})
    wait_until(lambda: lines(path) == [{"n": 3}])
    path.unlink()
    assert written(log, path, 4) == [4]
    assert (lines(old), log.lost) == ([{"n": 1}], 0)


def test_a_folder_that_goes_and_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "log"
    log = AccessLog(path)
    path.unlink()
    folder.rmdir()
    for n in range(3):
        log.write({"n": n})
    wait_until(lambda: log.lost == 3)
    folder.mkdir()
    assert written(log, path, 3) == [3]
    assert [record.getMessage() for record in caplog.records] == [
        "the access log cannot be written: No such file or directory"
    ]


def test_more_than_it_can_take_is_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_WAITING", 2)
    go_on = threading.Event()
    write = os.write

    def slow(descriptor: int, data: bytes) -> int:
        go_on.wait(60)
        return write(descriptor, data)

    path = tmp_path / "log"
    log = AccessLog(path)
    monkeypatch.setattr(os, "write", slow)
    for n in range(10):
        log.write({"n": n})  # returns at once
    assert log.lost >= 7
    go_on.set()
    assert written(log, path) == list(range(10 - log.lost))


def test_a_disk_that_hangs_does_not_keep_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_LAST_SECONDS", 0.2)
    go_on = threading.Event()
    monkeypatch.setattr(os, "write", lambda _descriptor, data: go_on.wait(60) and len(data))
    log = AccessLog(tmp_path / "log")
    log.write({"n": 1})
    log.close()  # returns
    go_on.set()
    log._thread.join()


@pytest.mark.parametrize("kind", ["folder", "pipe", "nowhere", "socket"])
def test_what_is_no_file_is_refused_at_the_start(tmp_path: Path, kind: str, draft_model: Model) -> None:
    path = tmp_path / "log"
    before = threading.active_count()
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            bound.bind(str(path))
        else:
            path = tmp_path / "no" / "log"
        with pytest.raises(OSError, match=re.escape(str(path))):
            logged(draft_model, path, state=tmp_path / "state")
    assert threading.active_count() == before


FULL = """
import resource, sys
from pathlib import Path
import sllm
from sllm import embedded
from sllm.worker.monitoring import Monitoring
from sllm.worker.server import Worker
path, state = sys.argv[1:]
with Worker(embedded.DRAFT, n_ctx=64, state=state, monitoring=Monitoring(access_log=path)) as worker:
    with sllm.connect(worker.uri) as remote:
        first = sllm.generate(remote.target(), "Once", max_tokens=5).text()
        while b"generate" not in Path(path).read_bytes():
            pass
        size = Path(path).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))  # the disk is full
        for _ in range(5):
            assert sllm.generate(remote.target(), "Once", max_tokens=5).text() == first
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert sllm.generate(remote.target(), "Once", max_tokens=5).text() == first
"""


def test_a_full_disk_hurts_no_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL, str(path), str(tmp_path / "state")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")
    assert found.stderr == ""  # the log's warning is for whoever listens to the logger
    found_lines = path.read_text().splitlines()
    good = [json.loads(line) for line in found_lines if line.endswith("}")]
    torn = [line for line in found_lines if not line.endswith("}")]
    assert len(torn) == 1 and len(torn[0]) == 100  # what there was room for; then whole lines again
    assert sum(record["kind"] == "generate" for record in good) >= 2


def test_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    log = AccessLog(access_log.STDERR)
    log.write({"n": 1})
    log.close()
    log.close()
    assert capfd.readouterr().err == '{"n": 1}\n'

"""Damaged calls to a worker: each ends with a refusal that says why, or with an answer; nobody else notices,
and nothing is left of them.

SLLM_SOAK_FRAMES sets how many there are in the long run (100,000: half to texts, half to layers).
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from oracles import EXACT
from raw_client import TOKEN, Client, Code, opening
from remote_worker import WorkerProcess, wait_until
from wire_mutants import KINDS, MODEL_ID, N_CTX, N_EMBD, Attack, mutant

from sllm import embedded
from sllm.wire import auth
from sllm.wire.protocol import method, pb
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMES = int(os.environ.get("SLLM_SOAK_FRAMES", "100000"))
LIMITS: dict[str, Any] = {"sessions": 8}
BATCH = 250


class Honest:
    """What a client with an honest request of its own gets, again and again, while a ``with`` lasts."""

    def __init__(self, kind: str, client: Client) -> None:
        self._kind, self._client = kind, client
        self._wanted = self._ask()
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self.n = 0

    def _ask(self) -> Any:
        if self._kind == "texts":
            return self._client.generate(opening(range(5, 25), max_tokens=8)).run()
        return self._layers()

    def _layers(self) -> bytes:
        hidden = np.random.default_rng(1).normal(0, 1, (4, N_EMBD)).astype("<f4").tobytes()
        first = pb.LayersUp(open=pb.LayersOpen(model_id=MODEL_ID, start=2, stop=7, codec="f32"))
        rows = pb.LayersUp(rows=pb.Rows(pos=0, n_rows=4, data=hidden))
        stub: Any = self._client.channel.stream_stream(method("Layers"), None, None)
        up = [message.SerializeToString() for message in (first, rows)]
        opened, answer = map(
            pb.LayersDown.FromString, stub(iter(up), metadata=self._client.metadata, timeout=60)
        )
        assert opened.opened.n_ctx == N_CTX
        found: bytes = answer.rows.data
        assert len(found) == len(hidden)
        return found

    def check(self) -> None:
        """The answer is what it was. Other layers are in use now and then, as long as others use them."""
        wait_until(self._is_answered, "an answer")
        self.n += 1

    def _is_answered(self) -> bool:
        try:
            assert self._ask() == self._wanted
        except grpc.RpcError as error:
            if self._kind == "texts" or error.code() is not Code.RESOURCE_EXHAUSTED:
                raise
            return False
        return True

    def _run(self) -> None:
        try:
            while not self._over.wait(0.05):
                self.check()
        except BaseException as error:  # noqa: BLE001 - for the test's thread
            self._errors.append(error)

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()
        if self._errors:
            raise self._errors[0]
        self.check()


@contextmanager
def attacked(kind: str, address: auth.Address) -> Iterator[tuple[Attack, Honest]]:
    """An attack on a worker beside an honest client; afterwards the worker is as it was before."""
    with ExitStack() as stack:
        client = stack.enter_context(Client(address, token=address.token))
        attack = stack.enter_context(Attack(kind, address))
        with Honest(kind, client) as honest:
            yield attack, honest
        wait_until(lambda: client.status().sessions == client.status().queued == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    options: dict[str, Any] = {"n_ctx": N_CTX, "token": TOKEN, "limits": Limits(**LIMITS), **EXACT}
    with Worker(embedded.TARGET, layers=kind == "layers", state=tmp_path, **options) as worker:
        with attacked(kind, worker.address) as (attack, honest):
            attack.send(range(200))
        assert attack.found.wrong == []
        assert not worker.failed
        assert honest.n > 1
    assert attack.found.counts["OK"] > 25
    assert attack.found.counts["INVALID_ARGUMENT"] > 50
    assert [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_is_not_used_up_by_calls_that_were_refused(kind: str, tmp_path: Path) -> None:
    """gRPC counts a call among a connection's streams until it is freed, which has to be before the garbage
    collector comes by.
    """
    options: dict[str, Any] = {"n_ctx": N_CTX, "token": TOKEN, "limits": Limits(**LIMITS), **EXACT}
    refused = {"texts": ("Generate", "Score", "Info"), "layers": ("Layers", "Generate", "Info")}[kind]
    with Worker(embedded.TARGET, layers=kind == "layers", state=tmp_path, **options) as worker:
        gc.collect()
        gc.disable()
        try:
            with Client(worker.address) as client:
                for n in range(60):
                    stub: Any = client.channel.stream_stream(method(refused[n % 3]), None, None)
                    with pytest.raises(grpc.RpcError) as caught:
                        list(stub(iter([b"\xff"]), metadata=client.metadata, timeout=60))
                    assert caught.value.code() in (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED)
                    del caught
                    client.status()
        finally:
            gc.enable()


def test_a_mutant_is_made_from_its_number_alone() -> None:
    for kind in KINDS:
        first = [mutant(kind, n) for n in range(200)]
        assert first == [mutant(kind, n) for n in range(200)]
        assert len({one.what.partition(",")[2] for one in first}) > 50
        assert {one.call for one in first} >= {"Generate", "Layers", "Score", "Info", "Relay"}


def resident(pid: int) -> int:
    """Bytes of memory that a process takes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of another process is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_mutants(kind: str, tmp_path: Path) -> None:
    """50,000 of each kind took 9 minutes on two busy cores. With glibc's arenas as they are by default memory
    goes from 115 to 147 MiB (texts) and from 325 to 358 MiB (layers).
    """
    seen = []
    n = FRAMES // 2
    with (
        tempfile.TemporaryFile() as log,
        WorkerProcess(tmp_path, n_ctx=N_CTX, layers=kind == "layers", limits=LIMITS, stderr=log) as process,
        attacked(kind, auth.Address.parse(process.uri)) as (attack, honest),
    ):
        for at in range(1000, 1000 + n, BATCH):
            attack.send(range(at, min(at + BATCH, 1000 + n)))
            seen.append(resident(process.process.pid))
            assert attack.found.wrong == []
            assert process.process.poll() is None
        log.seek(0)
        said = log.read().decode()
    tenth = max(len(seen) // 10, 1)
    early, late = (statistics.median(part) for part in (seen[tenth : 2 * tenth], seen[-tenth:]))
    print(f"{kind}: {attack.found}; {honest.n} honest; {early / 2**20:.1f} MiB, then {late / 2**20:.1f} MiB")
    assert "Traceback" not in said
    assert "a call failed" not in said
    assert late < 1.05 * early

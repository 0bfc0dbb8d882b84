"""Floods of strangers at a worker's open port: it stays small, and its clients do not notice."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import floods
import grpc
import pytest
from raw_client import Client, Code, opening
from remote_worker import WorkerProcess

from sllm.wire import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

LINUX = sys.platform == "linux"

MOST = 1.5
"""Memory under a flood, of what the worker takes while its clients alone are at work."""

PROMPT = tuple(range(5, 25))


class Honest:
    """Two clients at work until the ``with`` ends: one on a connection that stands, one that makes a new one
    for each text.

    Attributes:
        seconds: that the texts took, of both.
        n_lost: texts that ended as they do where the link is lost; our own client goes on with them.

    """

    def __init__(self, uri: str) -> None:
        self._address = auth.Address.parse(uri)
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self.n_lost = 0
        self.seconds: tuple[list[float], list[float]] = ([], [])
        with self._client() as client:
            self._wanted = self._text(client)
        works = (self._stay, self._come_and_go)
        # Where floods come from the same address, they may take its share of the places.
        self._threads = [threading.Thread(target=self._checked, args=(w,)) for w in works[: 1 + LINUX]]

    def _client(self) -> Client:
        return Client(self._address, token=self._address.token)

    @staticmethod
    def _text(client: Client) -> list[int]:
        return client.generate(opening(PROMPT, max_tokens=12)).run()

    def _checked(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - for the test's thread
            self._errors.append(error)

    def _stay(self) -> None:
        with self._client() as client:
            while not self._over.is_set():
                self._one(client, 0)

    def _come_and_go(self) -> None:
        while not self._over.is_set():
            with self._client() as client:
                self._one(client, 1)
            self._over.wait(0.05)

    def _one(self, client: Client, which: int) -> None:
        began = time.monotonic()
        try:
            assert self._text(client) == self._wanted
        except grpc.RpcError as error:
            if error.code() is not Code.UNAVAILABLE:
                raise
            self.n_lost += 1
            return
        self.seconds[which].append(time.monotonic() - began)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        assert all(self.seconds[: len(self._threads)]), "a client came to nothing"


class Memory:
    """What a process takes, looked at ten times a second until the ``with`` ends; bytes."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.seen: list[int] = []

    def now(self) -> int:
        lines = dict(line.split(":", 1) for line in self._status.read_text(encoding="ascii").splitlines())
        return int(lines["VmRSS"].split()[0]) << 10

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.seen.append(self.now())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()


class Attacked:
    """A worker in a process of its own, and what it takes while its clients alone are at work."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.uri = process.uri
        self.memory = Memory(process.process.pid)
        with Honest(self.uri) as honest:
            time.sleep(1.0)
        self.alone = honest.seconds
        self.idle = self.memory.now() if LINUX else 0

    def flood(self, kind: str, seconds: float) -> dict[str, Any]:
        """Run a flood beside two honest clients; what was measured. Memory stays within its bound."""
        host, port = self.process.address
        command = [sys.executable, floods.__file__, kind, host, str(port), str(seconds)]
        with Honest(self.uri) as honest, Memory(self.process.process.pid) as memory:
            ended = subprocess.run(command, capture_output=True, timeout=seconds + 60, check=False)
        assert ended.returncode == 0, ended.stderr.decode()
        assert self.process.process.poll() is None
        peak = max(memory.seen)
        assert peak < MOST * self.idle, f"{kind}: {peak >> 20} MiB, and {self.idle >> 20} MiB without it"
        ratios = [
            round(statistics.median(now) / statistics.median(alone), 2)
            for alone, now in zip(self.alone, honest.seconds, strict=True)
        ]
        return {
            "idle_mib": self.idle >> 20,
            "peak_mib": peak >> 20,
            "seen": memory.seen,
            "latency_ratios": ratios,
            "lost": honest.n_lost,
            "texts": [len(s) for s in honest.seconds],
            **json.loads(ended.stdout),
        }


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    if not LINUX:
        pytest.skip("the memory of another process is read from /proc")
    with WorkerProcess(tmp_path_factory.mktemp("state"), limits={"stranger_seconds": 5.0}) as process:
        yield Attacked(process)


@pytest.mark.parametrize("kind", floods.FLOODS)
def test_a_short_flood(attacked: Attacked, kind: str) -> None:
    assert attacked.flood(kind, 0.7)["lost"] == 0


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", floods.FLOODS)
def test_a_minute_of_a_flood(attacked: Attacked, kind: str) -> None:
    found = attacked.flood(kind, 60.0)
    seen = found.pop("seen")
    quarter = len(seen) // 4
    early, late = (statistics.mean(part) for part in (seen[quarter : 2 * quarter], seen[-quarter:]))
    print(json.dumps({"kind": kind, "growth": round(late / early - 1, 3), **found}))
    assert late < 1.05 * early
    assert found["lost"] == 0

"""examples/deploy/ray_serve.py on a real Ray of this machine: texts are whole and equal, whatever dies.

Skipped where Ray is not installed: ``pip install -r examples/deploy/ray-requirements.txt``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT
from remote_worker import PATIENCE, wait_until

import sllm
from sllm.wire import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
INSTALLED = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not INSTALLED, reason="Ray is not installed: pip install -r examples/deploy/ray-requirements.txt"
)
pytestmark = [
    pytest.mark.skipif(not DEPLOY.is_dir(), reason="there is no source tree here"),
    pytest.mark.timeout(600),
]

PROMPT = "Once upon a time"
N_CLIENTS = 8
N_TOKENS = 200
TOKEN = "a-token-for-this-test-alone"
PAUSE = 0.02
"""Between two runs of a client, so that texts are still being written when something is done to them."""


class Cluster:
    """Runs tests/ray_cluster.py; a context manager.

    Attributes:
        token_file, fingerprint: what clients know besides the URL.
        url: of the ingress.

    """

    def __init__(self, folder: Path, **settings: object) -> None:
        chain, key = auth.load_or_make_certificate(folder / "made")
        files = {"token": TOKEN.encode(), "cert": chain, "key": key}
        for name, data in files.items():
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o600)
        self.fingerprint = auth.fingerprint(chain)
        given = {name: str(folder / name) for name in files}
        given |= {"host": "127.0.0.1", "exact": "true", "drain": "1"}
        given |= {name: str(value) for name, value in settings.items()}
        self._log = (folder / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(DEPLOY), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
                "PYTHONPATH": str(DEPLOY),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_DISABLE_IMPORT_WARNING": "1",
            },
        )
        self.url = ""

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._log.flush()
        assert line, Path(self._log.name).read_text(errors="replace")[-4000:]
        return json.loads(line)

    def replicas(self) -> dict[str, int]:
        """Addresses, and the processes there."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return {one["address"]: one["pid"] for one in self._heard()}

    def lines(self) -> list[str]:
        """What a client makes of the ingress's answer, as README.md says."""
        with urllib.request.urlopen(self.url, timeout=PATIENCE) as answer:
            addresses = json.load(answer)["addresses"]
        return [f"sllm://{TOKEN}@{address}#sha256={self.fingerprint}" for address in addresses]

    def __enter__(self) -> Self:
        try:
            self.url = self._heard()["url"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.communicate(timeout=120)
        self._log.close()


class Client(threading.Thread):
    """Writes a text at its own pace."""

    def __init__(self, lines: Sequence[str], sampling: sllm.SamplingParams) -> None:
        super().__init__()
        self.sampling = sampling
        self.tokens: list[int] = []
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.n_reconnects = 0
        self._lines = lines
        self.start()

    def run(self) -> None:
        try:
            with sllm.connect(self._lines, deadline=PATIENCE) as remote:
                # The worker computes what is asked for, and so does not run ahead of this pace.
                target = remote.target(run_ahead=False)
                stream = sllm.generate(
                    target, PROMPT, sampling=self.sampling, max_tokens=N_TOKENS, draft="ngram"
                )
                for one in stream:
                    self.tokens += one.tokens
                    if len(self.tokens) >= 5:
                        self.begun.set()
                    time.sleep(PAUSE)
                assert stream.stats.remote is not None
                self.n_reconnects = stream.stats.remote.n_reconnects
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.begun.set()


def samplings(model: sllm.Model) -> list[sllm.SamplingParams]:
    """For each client one, of texts that do not end by themselves."""
    no_end = {token: -np.inf for token in range(model.vocab.n_tokens) if model.vocab.is_eog(token)}
    temperatures = [0.0, *[0.9] * (N_CLIENTS - 1)]
    return [
        sllm.SamplingParams(temperature=t, seed=seed, logit_bias=no_end)
        for seed, t in enumerate(temperatures)
    ]


def running(line: str) -> int:
    with sllm.connect(line) as one:
        return int(one.status().sessions)


@needs_ray
def test_a_replica_killed_in_the_middle_of_texts(
    tmp_path: Path, target_model: sllm.Model, record_property: Callable[[str, object], None]
) -> None:
    wanted = samplings(target_model)
    with sllm.LocalTarget(target_model, n_ctx=512, **EXACT) as local:
        expected = [
            [
                token
                for run in sllm.generate(local, PROMPT, sampling=sampling, max_tokens=N_TOKENS)
                for token in run.tokens
            ]
            for sampling in wanted
        ]
    assert len({tuple(tokens) for tokens in expected}) == N_CLIENTS
    with Cluster(tmp_path, min_replicas=2, max_replicas=2, sessions=N_CLIENTS, n_ctx=512) as cluster:
        before = cluster.replicas()
        assert len(before) == 2
        lines = cluster.lines()
        assert sorted(auth.Address.parse(line).endpoint for line in lines) == sorted(before)
        # Half of the clients begin at either replica.
        clients = [Client(lines[i % 2 :] + lines[: i % 2], sampling) for i, sampling in enumerate(wanted)]
        assert all(client.begun.wait(PATIENCE) for client in clients)
        busiest = max(lines, key=running)
        victim = auth.Address.parse(busiest).endpoint
        n_running = running(busiest)
        assert n_running > 0
        os.kill(before[victim], signal.SIGKILL)
        for client in clients:
            client.join(2 * PATIENCE)
        assert [client.error for client in clients] == [None] * N_CLIENTS
        assert [client.tokens for client in clients] == expected
        n_reconnects = sum(client.n_reconnects for client in clients)
        assert n_reconnects >= n_running
        record_property("running on the killed one", n_running)
        record_property("reconnects", n_reconnects)
        # Serve puts another one in its place, and the ingress hands out where that is.
        wait_until(lambda: len(set(cluster.replicas()) - {victim}) == 2, "the replacement")
        after = cluster.lines()
        assert victim not in {auth.Address.parse(line).endpoint for line in after} and len(after) == 2
        late = [Client([line], wanted[0]) for line in after]
        for client in late:
            client.join(PATIENCE)
        assert [client.tokens for client in late] == [expected[0]] * 2


@needs_ray
def test_more_replicas_where_texts_wait(tmp_path: Path, target_model: sllm.Model) -> None:
    wanted = samplings(target_model)[:3]
    with Cluster(tmp_path, min_replicas=1, max_replicas=2, sessions=1, n_ctx=512) as cluster:
        assert len(cluster.replicas()) == 1
        lines = cluster.lines()
        over = threading.Event()

        def write_again_and_again(sampling: sllm.SamplingParams) -> None:
            while not over.is_set():
                Client(lines, sampling).join()

        threads = [threading.Thread(target=write_again_and_again, args=(sampling,)) for sampling in wanted]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(cluster.replicas()) == 2, "the second replica", 3 * PATIENCE)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert len(cluster.lines()) == 2


@needs_ray
def test_a_text_ends_before_its_replica_is_taken_away(tmp_path: Path, target_model: sllm.Model) -> None:
    (sampling, *_) = samplings(target_model)
    with Cluster(tmp_path, max_replicas=1, n_ctx=512, drain=60) as cluster:
        client = Client(cluster.lines(), sampling)
        assert client.begun.wait(PATIENCE) and client.is_alive()
    client.join(PATIENCE)
    assert (client.error, client.n_reconnects) == (None, 0)
    assert len(client.tokens) == N_TOKENS


@needs_ray
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 2}, "there is no setting 'replicas'; there are model, token"),
        ({"sessions": "many"}, "invalid literal for int"),
        ({"exact": "maybe"}, "exact is 'maybe', expected true or false"),
    ],
)
def test_settings_that_there_are_not(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        Cluster(tmp_path, **settings).__enter__()


def test_it_says_what_it_needs() -> None:
    """Also where Ray is not installed: the file parses, and its requirements name what it imports."""
    compile((DEPLOY / "ray_serve.py").read_text(encoding="utf-8"), "ray_serve.py", "exec")
    requirements = (DEPLOY / "ray-requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in requirements if not line.startswith("#")] == ["ray[serve]>=2.60"]

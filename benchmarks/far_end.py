"""What is far away, in processes of their own: a worker or an engine, and the emulated link to it; and
clients whose memory is looked at.

Run as a script this file is such a process, told what to be by one line of JSON and ended by the end of its
standard input, so that none is left over when a benchmark dies. In the process of the client, threads that
compute in Python would hold up the link for milliseconds at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import sllm
from sllm.cli.slow_link import Link
from sllm.worker.passes import Limits, Pace

STOP_SECONDS = 30


class JsonChild:
    """A process that answers each line of JSON with one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._child = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            RuntimeError: the process has ended.

        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the process for {request} has ended with status {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Process(JsonChild):
    """One that plays a part of this file's own."""

    def __init__(self, **job: Any) -> None:
        # By its path, and with this process's sllm: the one in the repository's folder may not be compiled
        here = str(Path(sllm.__file__).resolve().parents[1])
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        super().__init__(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self.first = self.ask(**job)

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # of a child that has died; what was asked of it has said so
            self._child.stdin.close()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerProcess(_Process):
    """``sllm.Worker(model, **settings)``; ``sessions`` of them at once, ``hops`` where it may bring rows."""

    def __init__(
        self,
        model: Path,
        *,
        sessions: int = 4,
        draft: Path | None = None,
        pace: Pace | None = None,
        hops: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        if draft is not None:
            settings["draft"] = str(draft)
        super().__init__(
            role="worker",
            model=str(model),
            limits={"sessions": sessions, "hops": list(hops)},
            pace=asdict(pace or Pace()),
            settings=settings,
        )
        self.uri: str = self.first["uri"]
        self.port: int = self.first["port"]

    def uri_behind(self, link: LinkProcess) -> str:
        return self.uri.replace(f":{self.port}", f":{link.port}")


class EngineProcess(_Process):
    """A serving engine over a model, as the tests have it (``tests/fake_engine.py``); ``pace`` seconds a
    pass.
    """

    def __init__(self, model: Path, api: str, *, pace: float, **settings: Any) -> None:
        super().__init__(role="engine", model=str(model), api=api, pace=pace, settings=settings)
        self.port: int = self.first["port"]


class LinkProcess(_Process):
    """``sllm.cli.slow_link.Link`` in front of a port of this machine."""

    def __init__(self, port: int, *, rtt: float = 0.0, mbit_s: float | None = None) -> None:
        super().__init__(role="link", port=port, delay=rtt / 2, mbit_s=mbit_s)
        self.port: int = self.first["port"]

    def reset(self) -> None:
        """Count from 0 again."""
        self.ask(reset=True)

    def turns(self) -> int:
        """How often bytes went the other way than those before them, since then."""
        n: int = self.ask()["turns"]
        return n

    def carried(self) -> tuple[int, int]:
        """Bytes up and down since it was made or the counters were reset."""
        stats = self.ask()
        return stats["bytes_up"], stats["bytes_down"]


class ClientProcess(_Process):
    """Nothing but a vocabulary (``hold="vocabulary"``), a whole model, mapped (``"whole"``) or read
    (``"whole, read"``), or the local part of a split one (``"split"``), with the settings of its target.
    """

    def __init__(
        self,
        model: Path,
        hold: Literal["vocabulary", "whole", "whole, read", "split"],
        *,
        uri: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(role="client", model=str(model), hold=hold, uri=uri, settings=settings)

    def generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], float]:
        """A greedy text, and how many seconds it took."""
        answer = self.ask(prompt=list(map(int, prompt)), max_tokens=max_tokens)
        return answer["tokens"], answer["seconds"]

    def memory_mb(self) -> dict[str, float]:
        """What of it is in memory now (``VmRSS``), the most that ever was (``VmHWM``), and the part that no
        file backs (``RssAnon``), as Linux names them; in 10^6 bytes.
        """
        answer: dict[str, float] = self.ask(memory=True)
        return answer


# ---- in the child


def _worker(job: dict[str, Any]) -> None:
    with (
        tempfile.TemporaryDirectory() as state,  # keys of its own, not the user's
        sllm.Worker(
            job["model"],
            state=state,
            limits=Limits(**job["limits"]),
            **{"pass_seconds": Pace(**job["pace"]), **job["settings"]},
        ) as worker,
    ):
        _say(uri=worker.uri, port=worker.address.port)
        sys.stdin.read()


def _engine(job: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from fake_engine import FakeEngine

    with (
        sllm.Model(job["model"]) as model,
        FakeEngine(model, job["api"], pace=job["pace"], **job["settings"]) as engine,
    ):
        _say(port=engine.port)
        sys.stdin.read()


def _link(job: dict[str, Any]) -> None:
    with Link(("127.0.0.1", job["port"]), delay=job["delay"], mbit_s=job["mbit_s"]) as link:
        _say(port=link.port)
        for line in sys.stdin:
            _say(**asdict(link.reset_stats() if json.loads(line).get("reset") else link.stats))


def _client(job: dict[str, Any]) -> None:
    target: Any = None
    with ExitStack() as stack:
        remote = stack.enter_context(sllm.connect(job["uri"])) if job["uri"] is not None else None
        if job["hold"] == "vocabulary":
            stack.enter_context(sllm.Model(job["model"], vocab_only=True))
        elif job["hold"].startswith("whole"):
            model = stack.enter_context(sllm.Model(job["model"], use_mmap=job["hold"] == "whole"))
            target = stack.enter_context(sllm.LocalTarget(model, **job["settings"]))
        else:
            target = stack.enter_context(sllm.SplitTarget(job["model"], middle=remote, **job["settings"]))
        _say(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("memory"):
                _say(**_memory())
                continue
            began = time.perf_counter()
            with sllm.generate(
                target,
                request["prompt"],
                sampling=sllm.SamplingParams(temperature=0.0),
                max_tokens=request["max_tokens"],
            ) as stream:
                tokens = [token for run in stream for token in run.tokens]
            _say(tokens=tokens, seconds=time.perf_counter() - began)


def _memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM", "RssAnon")}


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    job = json.loads(sys.stdin.readline())
    {"worker": _worker, "engine": _engine, "link": _link, "client": _client}[job["role"]](job)

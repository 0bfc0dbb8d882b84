"""Other builds of sllm to compare this one with, each in an environment and a process of its own.

A build takes minutes, the first time; it is kept in ``build/variants``. ``$SLLM_BENCH_NATIVE`` and
``$SLLM_BENCH_PORTABLE`` name interpreters that have such builds already.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wheel_environment import unpack  # of tests/, which pytest has on the path

from .far_end import JsonChild
from .measure import TYPE_KV, Sample
from .peers import ROOT, PeerError

BUILDS = ROOT / "build/variants"

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "native": {},
    "portable": {"SLLM_PORTABLE": "ON"},
    "amx": {"SLLM_AMX": "ON"},
}


def _sources() -> str:
    """What a build was made from."""
    digest = hashlib.sha256()
    paths = [ROOT / "CMakeLists.txt", ROOT / "vendor/llama.cpp/pin.json", ROOT / "pyproject.toml"]
    for folder in ("csrc", "cmake", "sllm"):
        paths += sorted(
            p
            for p in (ROOT / folder).rglob("*")
            if p.suffix in {".c", ".cpp", ".h", ".hpp", ".cmake", ".py", ".map", ".json", ".txt"}
        )
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def interpreter(kind: str) -> str:
    """A Python that has sllm built as ``kind`` of :data:`OPTIONS`, and otherwise this one's packages.

    Raises:
        PeerError: it cannot be built; with the last lines of pip's output.

    """
    given = os.environ.get(f"SLLM_BENCH_{kind.upper()}")
    if given:
        return given
    folder = BUILDS / kind
    python = folder / "bin/python"
    stamp = folder / "sllm-sources"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == _sources():
        return str(python)
    wheels = BUILDS / f"{kind}-wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels]
    command += ["-C", f"build-dir={BUILDS / f'{kind}-tree'}", ROOT]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLLM_")} | dict(OPTIONS[kind])
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        end = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        raise PeerError(f"sllm could not be built as {kind}:\n{end}")
    unpack(next(wheels.glob("*.whl")), folder)
    stamp.write_text(_sources(), encoding="utf-8")
    return str(python)


# Answers each line of JSON with one. The prompt's decode and the text's are timed apart.
_CHILD = """
import json, sys, time
import sllm
from sllm.engine import cpu
from sllm.engine.model import Model
first = json.loads(sys.stdin.readline())
model = Model(first["model"])
target = sllm.LocalTarget(model, n_ctx=first["n_ctx"], n_threads=first["n_threads"], flash_attn=True,
                          type_k=first["type_kv"], type_v=first["type_kv"])
context = model.context(n_ctx=first["n_ctx"], n_threads=first["n_threads"], flash_attn=True,
                        type_k=first["type_kv"], type_v=first["type_kv"])
print(json.dumps({"variant": cpu.choose().variant.name, "amx": cpu.build().amx}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["n_prompt"]:
        tokens = [(7 * i + 11) % 256 for i in range(job["n_prompt"])]
        context.memory.clear(0)
        began = time.perf_counter()
        context.decode(tokens, seq_id=0, logits="last")
        answer = {"seconds": time.perf_counter() - began, "n": len(tokens), "tokens": []}
    else:
        sampling = sllm.SamplingParams(**job["sampling"])
        began = time.perf_counter()
        stream = sllm.generate(target, job["prompt"], sampling=sampling, max_tokens=job["n_gen"])
        tokens = [token for run in stream for token in run.tokens]
        answer = {"seconds": time.perf_counter() - began, "n": len(tokens), "tokens": tokens}
    print(json.dumps(answer), flush=True)
"""


class Child(JsonChild):
    """One build at work on one model."""

    def __init__(self, process: subprocess.Popen[str], **first: Any) -> None:
        super().__init__(process)
        answer = self.ask(**first)
        self.variant: str = answer["variant"]
        self.amx: bool = answer["amx"]

    def text(self, prompt: Sequence[int], n_tokens: int, **sampling: Any) -> Sample:
        """Some tokens behind a prompt, one by one."""
        answer = self.ask(n_prompt=0, prompt=list(prompt), n_gen=n_tokens, sampling=sampling)
        return Sample(answer["n"], answer["seconds"], (tuple(answer["tokens"]),))

    def prompt(self, n_tokens: int) -> Sample:
        """A prompt in one batch."""
        answer = self.ask(n_prompt=n_tokens)
        return Sample(answer["n"], answer["seconds"])


@contextmanager
def child(
    kind: str, model: Path, *, n_threads: int, n_ctx: int = 1024, variant: str | None = None
) -> Iterator[Child]:
    """A process with that build, which has loaded ``model``; ``variant`` forces its kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "SLLM_CPU_VARIANT"}
    if variant is not None:
        environment["SLLM_CPU_VARIANT"] = variant
    process = subprocess.Popen(
        [interpreter(kind), "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=BUILDS,
    )
    try:
        yield Child(process, model=str(model), n_threads=n_threads, n_ctx=n_ctx, type_kv=TYPE_KV)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()

"""The programs that sllm is measured against, and how each is run.

``llama-bench``, ``llama-speculative-simple``, ``ggml-rpc-server`` and ``reference`` (bare ``llama_decode()``
for the benchmark's own process) are built from the pinned sources into ``build/peers`` when they are first
needed. ``llama-cpp-python`` and ``presidio-analyzer`` take part where they are installed: in this
environment, or in the ones whose interpreters ``$SLLM_BENCH_LLAMA_CPP_PYTHON`` and ``$SLLM_BENCH_PRESIDIO``
name.

Run ``python -m benchmarks.peers`` to build them beforehand.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NATIVE = HERE / "native"
PIN = ROOT / "vendor/llama.cpp/pin.json"
FETCH = ROOT / "vendor/llama.cpp/fetch.py"
BUILD_DIR = ROOT / "build/peers"
BIN = BUILD_DIR / "bin"
TIMEOUT_S = 600

Tokens = npt.NDArray[np.int32]


class PeerError(Exception):
    """A peer cannot be had, or did not say what it should have; the message says what to do."""


# --- building ---


def _state() -> str:
    """What a build was made from."""
    parts = [PIN, *sorted(path for path in NATIVE.iterdir() if path.is_file())]
    source = os.environ.get("SLLM_LLAMA_CPP_SOURCE_DIR", "")
    return hashlib.sha256(b"\0".join([source.encode(), *(path.read_bytes() for path in parts)])).hexdigest()


def _step(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        end = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        raise PeerError(f"the peers could not be built: {' '.join(map(str, command))} failed:\n{end}")


@functools.cache
def build() -> Path:
    """Build what is missing or stale (minutes, the first time); returns the folder of the programs.

    Raises:
        PeerError: no CMake, no compiler, no sources, or a failing build; with the last lines of its output.
    """
    stamp = BUILD_DIR / "sllm-peers.stamp"
    state = _state()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == state:
        return BIN
    # CMake from the Python package index lies beside the interpreter, which need not be on PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise PeerError("no CMake to build the peers with; run: pip install -r benchmarks/requirements.txt")
    options = []
    source = os.environ.get("SLLM_LLAMA_CPP_SOURCE_DIR")
    if source:
        options.append(f"-DSLLM_LLAMA_CPP_SOURCE_DIR={Path(source).resolve()}")
    else:
        _step([sys.executable, FETCH, "--peers"])
    ninja = shutil.which("ninja", path=path)
    if ninja is not None and not (BUILD_DIR / "CMakeCache.txt").exists():
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _step([cmake, "-S", NATIVE, "-B", BUILD_DIR, *options])
    _step([cmake, "--build", BUILD_DIR, "--target", "peers", "--parallel", str(os.cpu_count() or 1)])
    stamp.write_text(state, encoding="utf-8")
    return BIN


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{command[0]} did not end within {TIMEOUT_S} s") from None
    if result.returncode != 0:
        end = "\n".join(result.stderr.splitlines()[-10:])
        raise PeerError(f"{' '.join(map(str, command))} ended with status {result.returncode}:\n{end}")
    return result


# --- llama-bench ---


def llama_bench(
    model: Path,
    *,
    n_gen: int = 0,
    n_prompt: int = 0,
    n_threads: int,
    type_kv: str = "f16",
    repetitions: int = 1,
    rpc: str | None = None,
    rpc_layers: int = 99,
) -> list[float]:
    """Tokens/s of each repetition: ``n_gen`` passes of one token, or one of ``n_prompt``; no selection.

    ``rpc`` is the endpoint of a server that gets the last ``rpc_layers``, the output counted as one.
    """
    command: list[str | Path] = [build() / "llama-bench", "-m", model, "-n", str(n_gen), "-p", str(n_prompt)]
    command += ["-t", str(n_threads), "-fa", "1", "-ctk", type_kv, "-ctv", type_kv]
    command += ["-r", str(repetitions), "-o", "json"]
    if rpc is not None:
        command += ["--rpc", rpc, "-ngl", str(rpc_layers)]
    output = _run(command).stdout
    try:
        (test,) = json.loads(output)
        return [float(tokens_per_s) for tokens_per_s in test["samples_ts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"llama-bench printed no result of one test: {output[-500:]!r}") from error


# --- llama-speculative-simple ---


@dataclass(frozen=True)
class SpeculativeRun:
    """What one run of ``llama-speculative-simple`` reports about itself, the prompt's time left out."""

    text: str
    n_tokens: int
    tokens_per_s: float
    n_drafted: int
    n_accepted: int

    @property
    def acceptance(self) -> float:
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def passes_per_token(self) -> float:
        """Every pass commits one token besides the accepted ones."""
        return (self.n_tokens - self.n_accepted) / self.n_tokens


def llama_speculative_simple(
    target: Path,
    draft: Path,
    prompt: str,
    *,
    n_tokens: int,
    n_threads: int,
    n_max: int,
    type_kv: str = "q8_0",
    n_ctx: int = 1024,
    rpc: str | None = None,
    rpc_layers: int = 99,
) -> SpeculativeRun:
    """Greedy speculation with a draft model that llama.cpp's own example runs, ``n_max`` tokens a draft.

    ``rpc`` is the endpoint of a server that gets the target's last ``rpc_layers``, the output counted as one;
    the draft stays here.
    """
    command: list[str | Path] = [
        build() / "llama-speculative-simple",
        "-m",
        target,
        "-md",
        draft,
        "-p",
        prompt,
    ]
    command += ["--spec-type", "draft-simple", "--spec-draft-n-max", str(n_max), "-n", str(n_tokens)]
    command += ["-t", str(n_threads), "-td", str(n_threads), "-c", str(n_ctx), "-fa", "on"]
    command += ["-ctk", type_kv, "-ctv", type_kv, "-ctkd", type_kv, "-ctvd", type_kv]
    command += ["--temp", "0", "--top-k", "1", "--color", "off"]
    if rpc is not None:
        command += ["--rpc", rpc, "-ngl", str(rpc_layers), "-devd", "none", "-ngld", "0"]
    for _ in range(
        5
    ):  # its log thread is not waited for: now and then the last lines, or all of them, are lost
        result = _run(command)
        log = result.stderr + result.stdout
        if "n_accept " in log:
            break

    def number(pattern: str) -> float:
        found = re.search(pattern, log)
        if found is None:
            raise PeerError(f"llama-speculative-simple printed no {pattern!r}; it ended with {log[-500:]!r}")
        return float(found.group(1))

    start = result.stdout.find(prompt)
    text = result.stdout[start + len(prompt) :] if start >= 0 else ""
    return SpeculativeRun(
        text=text.rstrip("\n"),
        n_tokens=int(number(r"decoded\s+(\d+) tokens")),
        tokens_per_s=number(r"decoded\s+\d+ tokens in\s+[\d.]+ seconds, speed:\s+([\d.]+)"),
        n_drafted=int(number(r"n_drafted\s*=\s*(\d+)")),
        n_accepted=int(number(r"n_accept\s*=\s*(\d+)")),
    )


# --- rpc-server ---


@contextmanager
def rpc_server(cache: Path, *, n_threads: int) -> Iterator[int]:
    """llama.cpp's RPC server with this machine's CPU; its port.

    It keeps the weights that it was sent in ``cache``, so that they cross a slow link once.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    server = subprocess.Popen(
        [build() / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", str(n_threads), "-c"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LLAMA_CACHE": str(cache)},
    )
    try:
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    raise PeerError("ggml-rpc-server does not listen") from None
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


# --- llama-cpp-python ---

# Runs in an interpreter that need not have sllm, and in a process of its own: two OpenMP teams in one process
# take each other's cores. Llama.generate() is its loop without chat, text and stop strings, so the comparison
# flatters the peer.
_LLAMA_CPP_PYTHON = """
import json, sys, time
import llama_cpp
job = json.load(sys.stdin)
kv = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[job["type_kv"]]
n_threads = job["n_threads"]
llm = llama_cpp.Llama(job["model"], n_ctx=job["n_ctx"], n_threads=n_threads, n_threads_batch=n_threads,
                      flash_attn=True, type_k=kv, type_v=kv, verbose=False)
def run(n):
    tokens, start = [], time.perf_counter()
    for token in llm.generate(job["prompt"], temp=0.0):
        tokens.append(token)
        if len(tokens) == n:
            return tokens, time.perf_counter() - start
run(8)
tokens, seconds = run(job["n_tokens"])
json.dump({"tokens": tokens, "seconds": seconds, "version": llama_cpp.__version__}, sys.stdout)
"""


@dataclass(frozen=True)
class PythonRun:
    tokens: list[int]
    tokens_per_s: float
    version: str


def llama_cpp_python_interpreter() -> str:
    """The interpreter that has ``llama_cpp``.

    Raises:
        PeerError: it is not there, or it is and cannot be imported, for want of a dependency say.
    """
    return _interpreter("SLLM_BENCH_LLAMA_CPP_PYTHON", "llama_cpp", "llama-cpp-python")


def _interpreter(variable: str, module: str, package: str) -> str:
    named = os.environ.get(variable)
    interpreter = named or sys.executable
    try:
        # not only looked for: a package without its dependencies is there, and of no use
        result = subprocess.run(
            [interpreter, "-c", f"import {module}"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise PeerError(f"${variable} is {interpreter}, which does not run: {error.strerror}") from error
    if result.returncode == 0:
        return interpreter
    reason = (result.stderr.strip() or f"status {result.returncode}").splitlines()[-1]
    if f"No module named '{module}'" in reason:
        where = f"for {named}" if named else f"here, nor named by {variable}"
        raise PeerError(f"{package} is not installed {where} (see benchmarks/README.md)")
    raise PeerError(f"{package} cannot be imported by {interpreter}: {reason}")


def llama_cpp_python(
    interpreter: str,
    model: Path,
    prompt: Sequence[int],
    *,
    n_tokens: int,
    n_threads: int,
    type_kv: str = "q8_0",
    n_ctx: int = 1024,
) -> PythonRun:
    """Greedy tokens from ``Llama.generate()``; its warm-up has the prompt computed, as sllm's has."""
    job = {
        "model": str(model),
        "prompt": list(map(int, prompt)),
        "n_tokens": n_tokens,
        "n_threads": n_threads,
        "type_kv": type_kv,
        "n_ctx": n_ctx,
    }
    result = subprocess.run(
        [interpreter, "-c", _LLAMA_CPP_PYTHON],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if result.returncode != 0:
        raise PeerError(f"llama-cpp-python failed:\n{result.stderr[-1000:]}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return PythonRun(answer["tokens"], n_tokens / answer["seconds"], answer["version"])


# --- presidio-analyzer ---

# Patterns alone, with the words of context that they know: its language models are not in the package, and
# come from elsewhere. Its own list of domains serves, so nothing is fetched. Phones of China are added to the
# regions that it looks for; it has no other recognizer for Chinese. What counts is what our adapter
# (sllm/privacy/presidio.py) lets count.
_PRESIDIO = """
import importlib.metadata, json, sys, time
import spacy
import tldextract.tldextract as domains
domains.TLD_EXTRACTOR = domains.TLDExtract(suffix_list_urls=(), cache_dir=None)
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import PhoneRecognizer
class Blank(SpacyNlpEngine):
    def load(self):
        self.nlp = {"en": spacy.blank("en")}
        self.nlp["en"].max_length = 10**8
nlp = Blank(models=[{"lang_code": "en", "model_name": "blank"}])
nlp.load()
registry = RecognizerRegistry(supported_languages=["en"])
registry.load_predefined_recognizers(languages=["en"])
registry.remove_recognizer("PhoneRecognizer")
regions = (*PhoneRecognizer.DEFAULT_SUPPORTED_REGIONS, "CN")
registry.add_recognizer(PhoneRecognizer(supported_regions=regions))
engine = AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])
def ranges(text):
    return [(one.start, one.end) for one in engine.analyze(text=text, language="en")
            if one.score >= 0.4 and one.entity_type not in ("DATE_TIME", "NRP", "URL")]
job = json.load(sys.stdin)
ranges("a warm-up")
found, seconds = [], []
for text in job["texts"]:
    began = time.process_time()
    found.append(ranges(text))
    seconds.append(time.process_time() - began)
json.dump({"found": found, "seconds": seconds, "version": importlib.metadata.version("presidio-analyzer")},
          sys.stdout)
"""


@dataclass(frozen=True)
class ScanRun:
    """Half-open ranges found in each text, and the processor's seconds for each."""

    found: list[list[tuple[int, int]]]
    seconds: list[float]
    version: str


def presidio_interpreter() -> str:
    """The interpreter that has ``presidio_analyzer``.

    Raises:
        PeerError: as :func:`llama_cpp_python_interpreter`.
    """
    return _interpreter("SLLM_BENCH_PRESIDIO", "presidio_analyzer", "presidio-analyzer")


def presidio(interpreter: str, texts: Sequence[str]) -> ScanRun:
    """What Presidio's patterns find in ``texts``, each scanned by itself."""
    result = subprocess.run(
        [interpreter, "-c", _PRESIDIO],
        input=json.dumps({"texts": list(texts)}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if result.returncode != 0:
        raise PeerError(f"presidio-analyzer failed:\n{result.stderr[-1000:]}")
    answer: dict[str, Any] = json.loads(result.stdout)
    found = [[(start, end) for start, end in ranges] for ranges in answer["found"]]
    return ScanRun(found, answer["seconds"], answer["version"])


# --- reference ---


@functools.cache
def _library() -> ctypes.CDLL:
    (path,) = build().glob("libreference.*")
    lib = ctypes.CDLL(str(path))
    lib.reference_open.restype = ctypes.c_void_p
    lib.reference_open.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p]
    lib.reference_close.restype = None
    lib.reference_close.argtypes = [ctypes.c_void_p]
    lib.reference_pass.restype = ctypes.c_int64
    lib.reference_pass.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
    ]
    return lib


class Reference:
    """Bare ``llama_decode()`` in this process: one sequence, flash attention, nothing around it."""

    def __init__(self, model: Path, *, n_ctx: int, n_threads: int, type_kv: str = "q8_0") -> None:
        self._lib = _library()
        self._handle = self._lib.reference_open(os.fsencode(model), n_ctx, n_threads, type_kv.encode())
        if not self._handle:
            raise PeerError(f"the reference could not open {model} with a {type_kv} cache")

    def decode(self, tokens: Tokens, pos: int) -> tuple[Tokens, float]:
        """The likeliest token behind each of ``tokens``, and the CPU seconds of ``llama_decode()``."""
        argmax = np.empty(len(tokens), dtype=np.int32)
        ns: int = self._lib.reference_pass(
            self._handle, tokens.ctypes.data, len(tokens), pos, argmax.ctypes.data
        )
        if ns < 0:
            raise PeerError(f"llama_decode() of {len(tokens)} tokens at {pos} failed in the reference")
        return argmax, ns * 1e-9

    def greedy(self, prompt: Tokens, n_tokens: int) -> list[int]:
        """The text that llama.cpp itself gives, one token at a time."""
        tokens = list(map(int, prompt))
        for pos, token in enumerate(
            tokens
        ):  # one by one: an expected text must not depend on how batches round
            argmax, _ = self.decode(np.array([token], dtype=np.int32), pos)
        text = [int(argmax[0])]
        while len(text) < n_tokens:
            argmax, _ = self.decode(np.array(text[-1:], dtype=np.int32), len(tokens) + len(text) - 1)
            text.append(int(argmax[0]))
        return text

    def close(self) -> None:
        if self._handle:
            self._lib.reference_close(self._handle)
            self._handle = None

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> int:
    try:
        print(build())
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        print(llama_cpp_python_interpreter())
    except PeerError as error:  # takes part where it is there
        print(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

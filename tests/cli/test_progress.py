"""Progress bars as a terminal sees them, and what a program that embeds the library does not see."""

from __future__ import annotations

import fcntl
import inspect
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from modelscope_server import ModelScopeServer

import sllm
from sllm import embedded
from sllm.cli.console import Output, Progress
from sllm.progress import told_to
from sllm.split.audit import audit
from sllm.split.codec_report import codec_report

CLEAR = "\r\x1b[K"
SIZE = 2 << 20


class Terminal:
    """A terminal of so many columns; what was written to it is in ``text`` after ``close()``."""

    def __init__(self, columns: int) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._read = bytearray()
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        try:
            while data := os.read(self._master, 1 << 16):
                self._read += data
        except OSError:  # EIO: nobody has the other end any more
            pass

    def close(self) -> str:
        os.close(self.slave)
        self._thread.join()
        os.close(self._master)
        return self._read.decode("utf-8")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelScopeServer]:
    """A site whose file of the embedded draft takes more than a second."""
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ModelScopeServer() as site:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", site.endpoint)
        data = embedded.DRAFT.read_bytes()
        site.repos["me/it", "master"] = {"model.gguf": data}
        site.pause = 1.5 / (len(data) / (1 << 16))
        yield site


def run(code: list[str], columns: int = 80, **more: Any) -> tuple[str, str]:
    """Stdout, and what a terminal at stderr saw."""
    terminal = Terminal(columns)
    try:
        ended = subprocess.run(
            [sys.executable, *code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal.slave,
            text=True,
            check=False,
            **more,
        )
    finally:
        seen = terminal.close()
    assert ended.returncode == 0, seen
    return ended.stdout, seen


def shown(seen: str) -> list[str]:
    """The lines that took each other's place; the last one is what is left."""
    first, *lines = seen.split(CLEAR)
    assert first == ""
    return lines


@pytest.mark.parametrize("columns", [80, 30, 12])
def test_a_download_on_a_terminal(slow: ModelScopeServer, columns: int) -> None:
    out, seen = run(["-m", "sllm", "inspect", "ms://me/it/model.gguf"], columns)
    lines = shown(seen)
    assert lines[-1] == ""  # and nothing is left
    bars = [line for line in lines if "%" in line]
    assert len(bars) > 2
    assert all(len(line) < columns for line in bars)
    percents = [int(line.partition("%")[0].split()[-1]) for line in bars]
    assert percents == sorted(percents)
    if columns == 80:
        assert all(line.startswith("downloading model.gguf  [#") for line in bars if "100 %" in line)
        assert any(line.endswith(" left") for line in bars)
    assert "%" not in out
    assert CLEAR not in out


def test_layers_that_are_fetched_alone(slow: ModelScopeServer, tmp_path: Path) -> None:
    args = ["split", "ms://me/it/model.gguf", "--layers", "0:1"]
    out, seen = run(["-m", "sllm", *args], cwd=tmp_path)
    assert out.startswith("model-layers-0-1.gguf")
    lines = shown(seen)
    assert lines[-1] == ""
    assert any(line.startswith("writing model-layers-0-1.gguf  [") for line in lines)


def test_a_download_elsewhere_than_on_a_terminal(slow: ModelScopeServer) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sllm", "inspect", "ms://me/it/model.gguf"], capture_output=True, check=True
    )
    assert ended.stderr == b""


def test_a_terminal_that_can_do_nothing(slow: ModelScopeServer) -> None:
    _, seen = run(["-m", "sllm", "inspect", "ms://me/it/model.gguf"], env={**os.environ, "TERM": "dumb"})
    assert seen == ""


# Earlier ones have bars of their own, which cannot be had out of the way.
tells = pytest.mark.skipif(
    "tqdm_class" not in inspect.signature(huggingface_hub.hf_hub_download).parameters,
    reason="this huggingface_hub tells nobody how far a download is",
)


@pytest.mark.parametrize("hub", ["ms", pytest.param("hf", marks=tells)])
def test_a_program_that_embeds_the_library_has_its_terminal_to_itself(
    slow: ModelScopeServer, hub: str, tmp_path: Path
) -> None:
    name, more = "ms://me/it/model.gguf", {}
    if hub == "hf":
        from hub_server import HubServer

        with HubServer() as server:
            server.repo("me/it").commit({"model.gguf": embedded.DRAFT.read_bytes()})
            more = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
            name = "hf://me/it/model.gguf"
            _, seen = run(["-c", f"import sllm; sllm.Model({name!r}).close()"], env={**os.environ, **more})
    else:
        _, seen = run(["-c", f"import sllm; sllm.Model({name!r}).close()"])
    assert seen == ""


@tells
def test_the_hugging_face_hub_tells_how_far_it_is(tmp_path: Path) -> None:
    from hub_server import HubServer

    code = "import sllm; print(sllm.hub.resolve('hf://me/it/m.gguf', progress=lambda s: print('at', s)))"
    with HubServer() as server:
        server.repo("me/it").commit({"m.gguf": bytes(SIZE)})
        more = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        out, seen = run(["-c", code], env={**os.environ, "NO_PROXY": "127.0.0.1", **more})
    assert seen == ""
    shares = [float(line.split()[1]) for line in out.splitlines() if line.startswith("at ")]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# ---- the bar itself


def test_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal = Terminal(60)
    with os.fdopen(os.dup(terminal.slave), "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with Progress(Output(), "a name of\nsome length", after=0.3) as progress:
            for at, share in [(0, 0), (0.2, 0.1), (1, 0.25), (1, 0.251), (30, 0.5), (7200, 0.52), (8000, 7)]:
                now[0] = at
                progress(share)
        with Progress(Output(), "sooner") as progress:
            progress(1.0)
    assert shown(terminal.close()) == [
        f"a name of some length  [{'#' * 7}{'-' * 21}]  25 %",
        f"a name of some length  [{'#' * 8}{'-' * 9}]  50 %, 0:30 left",
        f"a name of some length  [{'#' * 7}{'-' * 7}]  52 %, 1:50:46 left",
        f"a name of some length  [{'#' * 28}] 100 %",
        "",
    ]


# ---- the library


def test_what_takes_its_time_is_told_to_who_watches(tmp_path: Path) -> None:
    told: dict[str, list[float]] = {}

    @contextmanager
    def watcher(what: str) -> Iterator[Callable[[float], object]]:
        shares = told.setdefault(what, [])
        yield shares.append
        shares.append(2.0)  # it has ended

    def steps() -> dict[str, list[float]]:
        found = dict(told)
        told.clear()
        return found

    one: dict[str, Any] = {"head": 1, "tail": 0, "n_threads": 1}
    with told_to(watcher):
        sllm.Model(embedded.DRAFT).close()
        loading = f"loading {embedded.DRAFT.name}"
        found = steps()
        assert set(found) == {loading}
        assert found[loading][-2:] == [1.0, 2.0]
        sllm.LayerRange(embedded.DRAFT, 0, 1, n_ctx=32).close()
        assert set(steps()) == {loading}
        sllm.export_layers(embedded.DRAFT, tmp_path / "part.gguf", 0, 1)
        assert set(steps()) == {"writing part.gguf"}
        codec_report(embedded.DRAFT, "Once upon a time", codecs=["f32"], **one)
        assert steps().keys() > {"measuring the codecs"}
        audit(embedded.DRAFT, "Once upon a time", max_tokens=4, **one)
        assert steps()["attacking"][-2:] == [1.0, 2.0]
        own: list[float] = []
        sllm.export_layers(embedded.DRAFT, tmp_path / "part.gguf", 0, 1, progress=own.append)
        assert own
        assert not steps()
        with pytest.raises(sllm.ModelLoadError):
            sllm.Model(tmp_path / "none.gguf")
        assert not steps()
    sllm.Model(embedded.DRAFT).close()
    assert not told


def test_other_threads_tell_nobody() -> None:
    told: list[str] = []

    @contextmanager
    def watcher(what: str) -> Iterator[Callable[[float], object]]:
        told.append(what)
        yield lambda _share: None

    with told_to(watcher):
        thread = threading.Thread(target=lambda: sllm.Model(embedded.DRAFT).close())
        thread.start()
        thread.join()
    assert told == []

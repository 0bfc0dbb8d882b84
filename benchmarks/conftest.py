"""Fixtures: models, peers, and the report at the end of the run. Nothing here is timed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sllm
from sllm.embedded import DRAFT, TARGET

from . import models, peers
from .measure import Benchmark, Figures

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

_reported: list[tuple[str, Figures]] = []


@pytest.fixture(scope="session")
def n_cores() -> int:
    """Threads for big models: ``$SLLM_BENCH_THREADS``, or the cores that this process may use."""
    wanted = os.environ.get("SLLM_BENCH_THREADS")
    if wanted:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(scope="session")
def native_peers() -> Path:
    """The folder with the peers, built here the first time; skips with the reason where they cannot be."""
    try:
        return peers.build()
    except peers.PeerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def llama_cpp_python() -> str:
    """The interpreter that has llama-cpp-python; skips with the reason where none has."""
    try:
        return peers.llama_cpp_python_interpreter()
    except peers.PeerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def embedded_target() -> Iterator[sllm.Model]:
    with sllm.Model(TARGET) as model:
        yield model


@pytest.fixture(scope="session")
def embedded_draft() -> Iterator[sllm.Model]:
    with sllm.Model(DRAFT) as model:
        yield model


@pytest.fixture(scope="module")
def qwen2() -> Iterator[sllm.Model]:
    with sllm.Model(models.random_qwen2()) as model:
        yield model


@pytest.fixture(scope="module")
def inflated() -> Iterator[sllm.Model]:
    with sllm.Model(models.inflated(TARGET)) as model:
        yield model


@pytest.fixture
def report(benchmark: Benchmark, request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Hand in the figures of a benchmark. They decide nothing: a slow machine is no failure."""

    def hand_in(figures: Figures) -> None:
        benchmark.extra_info.update(figures.info())
        _reported.append((request.node.name, figures))

    return hand_in


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if not _reported:
        return
    terminalreporter.section(
        f"sllm {sllm.__version__} on {platform.machine()}, llama.cpp {sllm.llama_cpp_commit[:9]}"
    )

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        ("benchmark", "tokens/s", "peer", "its tokens/s", "ratio", "acceptance", "passes/token", "aim", "")
    ]
    for name, f in _reported:
        met = "" if f.aim_met is None else "met" if f.aim_met else "MISSED"
        numbers = (
            cell(f.tokens_per_s, ".1f"),
            f.peer,
            cell(f.peer_tokens_per_s, ".1f"),
            cell(f.ratio, ".3f"),
        )
        rows.append(
            (name, *numbers, cell(f.acceptance, ".3f"), cell(f.passes_per_token, ".3f"), f.aim or "", met)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        terminalreporter.write_line(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    for name, f in _reported:
        if f.more:
            details = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in f.more.items()
            )
            terminalreporter.write_line(f"{name}: {details}")

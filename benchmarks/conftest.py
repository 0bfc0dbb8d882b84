"""Fixtures: models, peers, and the report at the end of the run. Nothing here is timed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sllm
from sllm.embedded import DRAFT, TARGET

from . import models, peers
from .measure import Benchmark, Figures, RemoteFigures, SplitFigures

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


def pytest_xdist_auto_num_workers() -> int:
    """One process: benchmarks beside each other would measure each other."""
    return 0


_reported: list[tuple[str, Figures]] = []
_reported_remote: list[tuple[str, list[RemoteFigures]]] = []
_reported_split: list[tuple[str, list[SplitFigures]]] = []
_reported_values: list[tuple[str, dict[str, Any], dict[str, bool]]] = []


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
def presidio() -> str:
    """The interpreter that has presidio-analyzer; skips with the reason where none has."""
    try:
        return peers.presidio_interpreter()
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


@pytest.fixture
def report_remote(
    benchmark: Benchmark, request: pytest.FixtureRequest
) -> Callable[[Sequence[RemoteFigures]], None]:
    """Hand in the figures of all modes over one link, that of what the benchmark has timed first."""

    def hand_in(figures: Sequence[RemoteFigures]) -> None:
        benchmark.extra_info.update(figures[0].info(), modes=[f.info() for f in figures])
        _reported_remote.append((request.node.name, list(figures)))

    return hand_in


@pytest.fixture
def report_split(
    benchmark: Benchmark, request: pytest.FixtureRequest
) -> Callable[[Sequence[SplitFigures]], None]:
    """As ``report_remote``, for split models."""

    def hand_in(figures: Sequence[SplitFigures]) -> None:
        benchmark.extra_info.update(figures[0].info(), modes=[f.info() for f in figures])
        _reported_split.append((request.node.name, list(figures)))

    return hand_in


@pytest.fixture
def report_values(
    benchmark: Benchmark, request: pytest.FixtureRequest
) -> Callable[[dict[str, Any], dict[str, bool]], None]:
    """Hand in figures that stand beside no peer's speed, and which aims were met."""

    def hand_in(values: dict[str, Any], aims: dict[str, bool]) -> None:
        benchmark.extra_info.update(values)
        if aims:
            benchmark.extra_info.update(aim="; ".join(aims), aim_met=all(aims.values()))
        _reported_values.append((request.node.name, values, aims))

    return hand_in


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if _reported or _reported_remote or _reported_split or _reported_values:
        terminalreporter.section(
            f"sllm {sllm.__version__} on {platform.machine()}, llama.cpp {sllm.llama_cpp_commit[:9]}"
        )
    if _reported:
        _show(terminalreporter)
    if _reported_remote:
        _show_remote(terminalreporter)
    if _reported_split:
        _show_split(terminalreporter)
    for name, values, aims in _reported_values:
        told = {aim: "met" if met else "MISSED" for aim, met in aims.items()}
        _show_more(terminalreporter, name, {**values, **told})


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _met(aim_met: bool | None) -> str:
    return "" if aim_met is None else "met" if aim_met else "MISSED"


def _write_table(terminalreporter: TerminalReporter, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        terminalreporter.write_line(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def _show(terminalreporter: TerminalReporter) -> None:
    rows = [
        ("benchmark", "tokens/s", "peer", "its tokens/s", "ratio", "acceptance", "passes/token", "aim", "")
    ]
    for name, f in _reported:
        numbers = (
            _cell(f.tokens_per_s, ".1f"),
            f.peer,
            _cell(f.peer_tokens_per_s, ".1f"),
            _cell(f.ratio, ".3f"),
        )
        rows.append(
            (
                name,
                *numbers,
                _cell(f.acceptance, ".3f"),
                _cell(f.passes_per_token, ".3f"),
                f.aim or "",
                _met(f.aim_met),
            )
        )
    _write_table(terminalreporter, rows)
    for name, f in _reported:
        _show_more(terminalreporter, name, f.more)


def _show_more(terminalreporter: TerminalReporter, name: str, more: dict[str, Any]) -> None:
    if more:
        details = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in more.items()
        )
        terminalreporter.write_line(f"{name}: {details}")


def _show_remote(terminalreporter: TerminalReporter) -> None:
    heads = ("benchmark", "mode", "tokens/s", "acceptance", "passes/token", "bytes up", "down", "/ stream")
    rows = [(*heads, "/ wait", "/ llama rpc", "/ simulated", "sessions", "fairness", "aims")]
    for name, modes in _reported_remote:
        for i, f in enumerate(modes):
            rows.append(
                (
                    "" if i else name,
                    f.mode,
                    _cell(f.tokens_per_s, ".1f"),
                    _cell(f.acceptance, ".3f"),
                    _cell(f.passes_per_token, ".3f"),
                    _cell(f.bytes_up_per_token, ".0f"),
                    _cell(f.bytes_down_per_token, ".0f"),
                    _cell(f.ratio_vs_stream, ".3f"),
                    _cell(f.ratio_vs_wait, ".3f"),
                    _cell(f.ratio_vs_llama_rpc, ".1f"),
                    _cell(f.ratio_vs_simulated, ".3f"),
                    _cell(f.more.get("sessions"), "d"),
                    _cell(f.more.get("fairness"), ".3f"),
                    f"MISSED: {f.more['missed']}" if "missed" in f.more else _met(f.aim_met),
                )
            )
    _write_table(terminalreporter, rows)


def _show_split(terminalreporter: TerminalReporter) -> None:
    heads = ("benchmark", "mode", "codec", "tokens/s", "tokens/round", "bytes/token", "/ llama rpc")
    rows = [(*heads, "local MB", "whole MB", "aims")]
    for name, modes in _reported_split:
        for i, f in enumerate(modes):
            aims = f.more.get("aims", {})
            rows.append(
                (
                    "" if i else name,
                    f.mode,
                    f.codec or "",
                    _cell(f.tokens_per_s, ".1f"),
                    _cell(f.tokens_per_round, ".2f"),
                    _cell(f.bytes_per_token, ".0f"),
                    _cell(f.ratio_vs_llama_rpc, ".2f"),
                    _cell(f.local_rss_mb, ".0f"),
                    _cell(f.whole_rss_mb, ".0f"),
                    "; ".join(f"{'met' if met else 'MISSED'}: {aim}" for aim, met in aims.items()),
                )
            )
    _write_table(terminalreporter, rows)
    for name, modes in _reported_split:
        for f in modes:
            more = {key: value for key, value in f.more.items() if key != "aims"}
            _show_more(terminalreporter, f"{name} {f.mode} {f.codec or ''}".rstrip(), more)

"""What ``pytest --benchmark-json`` has written, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool


class ReportError(Exception):
    """A file is no result of ``pytest --benchmark-json``, or lacks what is asked for; says what to do."""


@dataclass(frozen=True)
class Entry:
    """What one benchmark measured, or one of the modes that it compared.

    Attributes:
        module: the file of the benchmark.
        name: of the benchmark, with its parameters.
        function: of the benchmark, without.
        params: these by name.
        mode: "" for a benchmark without modes.
        values: the figures, ``median_s`` (of what pytest-benchmark has timed) among them; None is left out.

    """

    module: str
    name: str
    function: str
    params: Mapping[str, Any]
    mode: str
    values: Mapping[str, Scalar]

    def number(self, name: str) -> float | None:
        """A figure, where there is one of this name and it is a number."""
        value = self.values.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called in every file."""
        return self.module, self.name, self.mode


@dataclass(frozen=True)
class Results:
    """A file.

    Attributes:
        path: the file.
        commit: the first nine digits of what was measured, with a ``+`` where files had been changed; ""
            where the file does not say.
        date: the day.
        cpu: its name and the number of its cores, and what it has of AVX-512 and AMX.
        system: the operating system, and the Python.
        entries: what was measured.

    """

    path: Path
    commit: str
    date: str
    cpu: str
    system: str
    entries: list[Entry]


def read(path: Path) -> Results:
    """One file.

    Raises:
        ReportError: it cannot be read, or is something else.

    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ReportError(f"{path} is not JSON ({error}); {_EXPECTED}") from error
    try:
        if not isinstance(found["benchmarks"], list):
            raise TypeError
        machine, commit = found["machine_info"], found["commit_info"]
        results = Results(
            path,
            (str(commit.get("id") or ""))[:9] + ("+" if commit.get("dirty") else ""),
            str(found["datetime"])[:10],
            _cpu(machine),
            f"{machine['system']} {machine['machine']}, Python {machine['python_version']}",
            [entry for one in found["benchmarks"] for entry in _entries(one)],
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ReportError(f"{path} is JSON, but no result of pytest-benchmark; {_EXPECTED}") from error
    if not results.entries:
        raise ReportError(f"{path} holds no benchmark: all were skipped or have failed")
    return results


_EXPECTED = "expected a file that `pytest benchmarks --benchmark-json FILE` has written"


def _cpu(machine: Mapping[str, Any]) -> str:
    cpu = machine.get("cpu") or {}
    flags = set(cpu.get("flags") or ())
    words = [str(cpu.get("brand_raw") or machine.get("processor") or machine["machine"])]
    if cpu.get("count"):
        words.append(f"{cpu['count']} core{'s' if cpu['count'] != 1 else ''}")
    if flags:
        words.append("AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2")
        if "avx512f" in flags:
            words.append("AMX" if "amx_tile" in flags else "no AMX")
    return ", ".join(words)


def _entries(one: Mapping[str, Any]) -> list[Entry]:
    module, _, name = str(one["fullname"]).partition("::")
    info = dict(one["extra_info"])
    modes = info.pop("modes", None)
    median = {"median_s": one["stats"]["median"]}

    def entry(mode: str, values: Mapping[str, Any]) -> Entry:
        return Entry(module, name, name.partition("[")[0], one["params"] or {}, mode, _scalars(values))

    if not modes:
        return [entry("", {**median, **info})]
    # What has been timed is the first of the modes.
    found = [entry(mode["mode"], {**(median if i == 0 else {}), **mode}) for i, mode in enumerate(modes)]
    return sorted(found, key=lambda entry: entry.mode != info.get("mode"))


def _scalars(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """Without tables, and without what is not known."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (str, int, float))
        and name != "mode"
        and not (isinstance(value, float) and not math.isfinite(value))
    }

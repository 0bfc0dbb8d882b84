"""Checks of this machine: its CPU, what of it this process may use, and the limit of open files."""

from __future__ import annotations

import os
import platform
from typing import Any

from sllm.cli.checks.check import FAILED, NOTE, OK, Check
from sllm.cli.checks.cpu_quota import cpu_quota
from sllm.engine import cpu
from sllm.errors import UnsupportedCPUError

__all__ = ["limits", "processor", "threads"]


def processor() -> Check:
    """Which kernels run on this CPU, why, and what of it they do not use."""
    built = cpu.build()
    details: dict[str, Any] = {
        "cpu": cpu.brand() or platform.processor(),
        "features": list(cpu.features()),
        "variants": [variant.name for variant in built.variants],
    }
    try:
        choice = cpu.choose()
    except UnsupportedCPUError as error:
        return Check("CPU", FAILED, str(error), details)
    unused = sorted(set(cpu.features()) & _SPEED - set(choice.variant.needs))
    details |= {
        "variant": choice.variant.name,
        "reason": choice.reason,
        "passed_over": {variant.name: list(missing) for variant, missing in choice.passed_over},
        "unused": unused,
    }
    summary = f"{details['cpu']}: kernels {choice.variant.name!r}, {choice.reason}"
    amx = [feature for feature in unused if feature.startswith("amx")]
    others = [feature for feature in unused if feature not in amx]
    if built.kind == "system":
        return Check("CPU", OK, f"{summary} (the system's llama.cpp chooses by itself)", details)
    if others:
        advice = f"the kernels leave {', '.join(others)} unused: " + (
            f"unset ${cpu.VARIABLE}"
            if os.environ.get(cpu.VARIABLE)
            else "install sllm again on this machine (pip install --force-reinstall --no-cache-dir .)"
        )
        return Check("CPU", NOTE, summary, details, advice)
    if amx:
        advice = "AMX is left unused, since results would not be exact; SLLM_AMX=ON at build time turns it on"
        return Check("CPU", OK, summary, details, advice)
    return Check("CPU", OK, summary, details)


# What kernels are quicker with; the rest of cpu.features() comes along with these.
_SPEED = {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi"}
_SPEED |= {"avx512_vnni", "avx512_bf16", "amx_int8", "amx_tile", "asimddp", "asimdhp", "i8mm", "sve"}


def threads() -> Check:
    """How many cores this process may use, and how many threads a model takes by default."""
    cores, allowed = os.cpu_count() or 1, cpu.available_cores()
    quota = cpu_quota()
    details: dict[str, Any] = {"cores": cores, "allowed": allowed, "quota": quota, "default": allowed}
    omp = os.environ.get("OMP_NUM_THREADS")
    if quota is not None and quota < allowed:
        return Check(
            "threads",
            NOTE,
            f"{allowed} threads by default, and a quota of {quota:g} cores for this container",
            details,
            f"pass n_threads={max(1, int(quota))} (--threads): threads that wait for a core by spinning slow"
            " each other down",
        )
    if omp:
        details["OMP_NUM_THREADS"] = omp
    return Check("threads", OK, f"{allowed} of {cores} cores, one thread each", details)


def limits() -> Check:
    """How many files and connections this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return Check("open files", OK, "no limit is known")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    details = {"soft": soft, "hard": hard}
    if soft < 1024:
        advice = "ulimit -n 4096 before a worker starts: each client takes two or three"
        return Check("open files", NOTE, f"at most {soft}", details, advice)
    return Check("open files", OK, f"at most {soft}", details)

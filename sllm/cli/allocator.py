"""How the memory of a server of ours is managed."""

from __future__ import annotations

import os

from sllm.engine._ffi import lib

__all__ = ["bound_arenas"]

_ARENAS = 2
"""One for the main thread and one for all others: what one of them has freed, the next one takes."""

_LARGE = 1 << 20
"""Bytes from which on memory goes back to the system when it is freed."""

_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def bound_arenas() -> bool:
    """Keep the memory of this process together; whether that could be done.

    A worker answers each call on a thread of its own, and glibc gives threads arenas of their own, up to
    eight for each core. What is free in one is of no use to the others, so that a worker grows for hours
    without holding more (tests/worker/test_wire_mutants.py). Of other C libraries nothing is asked. Who has
    set any of this in the environment knows better.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    return bool(lib.sllm_bound_arenas(_ARENAS, _LARGE))

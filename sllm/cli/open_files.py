"""How many files the process may have open."""

from __future__ import annotations

import resource

__all__ = ["raise_file_limit"]

_WHERE_UNLIMITED = 10_240
"""macOS has an unlimited hard limit, and refuses to set the soft one to more than this."""


def raise_file_limit() -> int:
    """Let this process have as many open files, connections among them, as it may: its hard limit.

    Returns how many that are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WHERE_UNLIMITED if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # more than the system lets a process have
        return soft
    return wanted

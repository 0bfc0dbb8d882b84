"""What this build and this machine are, and what is wrong with them.

Each check is a function that returns a :class:`Check`; :func:`examine` runs them all. Nothing secret is in a
result: no token, and the home folder is written ``~``, since people paste this into reports.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.checks.check import FAILED, NOTE, OK, Check
from sllm.cli.checks.installation import broken_build, build, command, folders, names, packages
from sllm.cli.checks.kernels import devices, link, speculation
from sllm.cli.checks.machine import limits, processor, threads
from sllm.errors import UnsupportedCPUError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["CHECKS", "FAILED", "NOTE", "OK", "Check", "examine", "without_core"]

CHECKS: tuple[Callable[[], Check], ...] = (
    build,
    processor,
    threads,
    devices,
    speculation,
    link,
    folders,
    command,
    packages,
    names,
    limits,
)


def examine(
    checks: Iterable[Callable[[], Check]] = CHECKS, started: Callable[[str], None] | None = None
) -> list[Check]:
    """Run the checks; one that raises is a failed one.

    Args:
        checks: which.
        started: called with the name of each before it runs.

    """
    found = []
    for check in checks:
        if started is not None:
            started(check.__name__)
        try:
            result = check()
        except Exception as error:  # noqa: BLE001 - what is wrong with the machine may be anything
            result = Check(check.__name__, FAILED, f"{type(error).__name__}: {error}")
        found.append(
            replace(
                result,
                summary=_home_hidden(result.summary),
                details=_home_hidden(dict(result.details)),
                advice=_home_hidden(result.advice),
            )
        )
    return found


def _home_hidden(value: Any) -> Any:
    """``value`` with the user's home folder written ``~``, in all texts that it holds."""
    if isinstance(value, str):
        home = str(Path("~").expanduser())
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: _home_hidden(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_home_hidden(item) for item in value]
    return value


def without_core(error: ImportError) -> list[Check]:
    """What can be found out where the package cannot be imported, which is what ``error`` says."""
    if isinstance(error, UnsupportedCPUError):
        return examine((processor, command, packages))

    def broken() -> Check:
        return broken_build(error)

    return examine((broken, processor, command, packages))

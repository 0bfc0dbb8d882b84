"""The command ``sllm doctor``, also where the compiled core cannot be loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.cli import checks
from sllm.cli.columns import wrapped
from sllm.cli.console import GREEN, RED, YELLOW, Output, one_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["add_arguments", "run", "tell_instead"]

EPILOG = "Exit status: 0 where nothing has failed, 1 where something has."

_LEAST_COLUMNS = 16  # of a text that is wrapped

_STYLES = {checks.OK: GREEN, checks.NOTE: YELLOW, checks.FAILED: RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm doctor``."""
    parser.add_argument("--json", action="store_true", help="all that was found, as a JSON object")


def run(args: argparse.Namespace, out: Output) -> int:
    """Examine this build and this machine and show what was found; 1 where something has failed."""
    found = checks.examine(started=lambda name: out.status(f"looking at: {name}"))
    out.status("")
    return _show(found, out, as_json=args.json)


def _show(found: Sequence[checks.Check], out: Output, *, as_json: bool) -> int:
    failed = [check for check in found if check.status == checks.FAILED]
    if as_json:
        figures = [{**vars(check), "details": dict(check.details)} for check in found]
        out.line(json.dumps({"ok": not failed, "checks": figures}, indent=2, default=str))
        return 1 if failed else 0
    width = max(len(check.name) for check in found)
    for check in found:
        out.text(f"{check.status:<6}", style=_STYLES[check.status])
        first, *others = _lines(check.summary, f"  {check.name:<{width}}  ", len("failed"), out)
        if check.advice is not None:
            others += _lines(check.advice, f"  {'':<{width}}  -> ", len("failed"), out)
        out.line(first)
        for line in others:
            out.line(f"{'':<6}{line}")
    if failed:
        out.line(f"\nFailed: {', '.join(check.name for check in failed)}")
    else:
        out.line("\nNothing has failed.")
    return 1 if failed else 0


def _lines(text: str, first: str, used: int, out: Output) -> list[str]:
    """A text behind ``first``, in lines of the terminal's width but for what is ``used`` of it; elsewhere as
    one line, for programs.
    """
    text = one_line(text)
    if not out.terminal:
        return [first + text]
    columns = shutil.get_terminal_size().columns - used
    return wrapped(text, max(columns, len(first) + _LEAST_COLUMNS), first)


def tell_instead(error: ImportError) -> None:
    """Called where the package cannot be imported: end the command ``sllm`` with one line, and
    ``sllm doctor`` with what it can still find out. In any other program it returns, and the error is raised.
    """
    module = sys.argv[:1] == ["-m"] and "sllm" in getattr(sys, "orig_argv", [])
    if not module and Path(sys.argv[0] if sys.argv else "").name not in ("sllm", "sllm.exe"):
        return
    if sys.argv[1:2] == ["doctor"]:
        sys.exit(_show(checks.without_core(error), Output(), as_json="--json" in sys.argv[2:]))
    sys.stderr.write(f"sllm: {one_line(error)} (sllm doctor tells more)\n")
    sys.exit(2)

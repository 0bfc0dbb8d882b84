"""``sllm devices``: the devices that models can run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.cli.console import size, table
from sllm.engine.devices import devices

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm devices``: it has none."""


def run(args: argparse.Namespace, out: Output) -> int:  # noqa: ARG001 - as all commands
    """List the devices."""
    rows = [("", "name", "type", "free", "total", "description")]
    for device in devices():
        free, total = (size(n) if n else "-" for n in (device.memory_free, device.memory_total))
        rows.append((str(device.index), device.name, device.type, free, total, device.description))
    for line in table(rows, right=(0, 3, 4)):
        out.line(line)
    return 0

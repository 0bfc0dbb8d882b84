"""What ``sllm split``, ``audit`` and ``codec-report`` share: options, the text to measure with, one line of
output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.cli.arguments import add_gpu_layers, add_threads, whole
from sllm.cli.console import CommandError, expected_utf8, one_line

if TYPE_CHECKING:
    import argparse

    from sllm.split.audit import AuditReport
    from sllm.split.codec_report import CodecReport

__all__ = ["add_ends", "add_machine", "read_text", "split_line"]


def add_ends(parser: argparse.ArgumentParser) -> None:
    """Declare ``--head`` and ``--tail``: the layers on this side of a split."""
    parser.add_argument(
        "--head",
        metavar="N",
        type=whole(0),
        help="layers before the link (default: 6; in a small model all that leave one to the other side)",
    )
    parser.add_argument(
        "--tail", metavar="N", type=whole(0), default=1, help="layers after the link (default: 1)"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declare what of this machine a measurement may use."""
    machine = parser.add_argument_group("machine")
    add_threads(machine)
    add_gpu_layers(machine)


def read_text(name: str) -> str:
    """The text of a file, or of stdin (``-``).

    Raises:
        CommandError: it is empty, or not UTF-8.

    """
    if name == "-":
        if sys.stdin is None:
            raise CommandError("there is no stdin to read the text from")
        data, shown = sys.stdin.buffer.read(), "stdin"
    else:
        data, shown = Path(name).read_bytes(), name
    with expected_utf8(shown):
        text = data.decode("utf-8")
    if not text.strip():
        raise CommandError(f"{shown} is empty, expected a text")
    return text


def split_line(report: AuditReport | CodecReport) -> str:
    """Which layers are where."""
    middle = report.n_layer - report.head - report.tail
    name = one_line(report.model)
    return f"{name}: {report.head} + {middle} + {report.tail} layers, the {middle} on the other side"

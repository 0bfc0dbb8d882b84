"""``sllm codec-report``: what the codecs of hidden states do to the text of a split model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sllm.cli.arguments import MODEL, add_json
from sllm.cli.console import count, one_line, paragraph, table
from sllm.cli.layers import add_ends, add_machine, read_text, split_line
from sllm.split.codec_report import codec_report

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.split.codec_report import CodecReport

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm codec-report``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("text", metavar="TEXT", help="a file, UTF-8; '-': stdin")
    add_ends(parser)
    add_json(parser)
    add_machine(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print what each wire codec does to the next-token distributions along a text."""
    text = read_text(args.text)
    report = codec_report(
        args.model,
        text,
        head=args.head,
        tail=args.tail,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )
    if args.json:
        out.line(json.dumps(_finite(asdict(report)), indent=2, allow_nan=False))
        return 0
    for line in _lines(report):
        out.line(line)
    return 0


def _finite(value: Any) -> Any:
    """``value`` with null for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(report: CodecReport) -> list[str]:
    rows: list[tuple[str, ...]] = [("codec", "bytes", "KL", "largest", "same choice", "perplexity")]
    rows.append(("whole", "", "", "", "", f"{report.perplexity:.4f}"))
    for one in report.codecs:
        if one.refused is None:
            shown = (
                f"{one.kl:.2g}",
                f"{one.kl_max:.2g}",
                f"{one.same_choice:.2%}",
                f"{one.perplexity:.4f}",
            )
            rows.append((one.codec, str(one.row_bytes), *shown))
        else:
            rows.append((one.codec, str(one.row_bytes or "-"), "-", "-", "-", "-"))
    return [
        split_line(report),
        f"{count(report.n_tokens, 'token')}, {report.n_positions} positions compared",
        "",
        *table(rows, right=range(1, 6)),
        *[f"{one.codec}: {one_line(one.refused)}" for one in report.codecs if one.refused is not None],
        "",
        *paragraph(
            "bytes: of a position, in each direction. KL: of the split's next-token distribution from the"
            " whole model's, in nats: the mean over all positions, and the largest. same choice: both have"
            " the same likeliest token."
        ),
    ]

"""``sllm audit``: what the hidden states of a split tell of the text to whoever receives them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.cli.arguments import DEFAULT, MODEL, add_json, whole
from sllm.cli.console import CommandError, count, one_line, paragraph, table
from sllm.cli.layers import add_ends, add_machine, read_text, split_line
from sllm.cli.plot import Axis, Curve, Panel, figure
from sllm.split.audit import audit
from sllm.wire.codec import CODECS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sllm.cli.console import Output
    from sllm.split.audit import AuditReport

__all__ = ["EPILOG", "SAMPLE", "add_arguments", "plot", "run"]

EPILOG = None

SAMPLE = (
    "Dear Dr Okafor, the lab called about Mary's blood test. Her iron is low again, so please move her visit"
    " from Thursday to Monday at half past nine, and do not tell her brother. My number is 555 0136. In the"
    " evening we will walk along the river with the dog, and I hope that the rain stops before then. Helen"
)
"""What ``sllm audit`` tries to recover where no text is given: a letter that others should not read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm audit``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add_ends(parser)
    add("--text", metavar="FILE", help="what is to be recovered, UTF-8; '-': stdin (default: a short letter)")
    add("--codec", choices=CODECS, default="q8", help=f"how hidden states cross the link {DEFAULT}")
    add("--tokens", metavar="N", type=whole(1), default=64, help=f"of the text, the first N tokens {DEFAULT}")
    add(
        "--candidates",
        metavar="N",
        type=whole(1),
        help="tokens that vocabulary matching tries at most for each, those with the nearest embeddings first"
        " (default: all of up to 4096, else 512)",
    )
    add("--plot", metavar="FILE", help="draw the tables, as SVG")
    add_json(parser)
    add_machine(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Attack a split of one's own and print what was recovered."""
    text = SAMPLE if args.text is None else read_text(args.text)
    if args.plot is not None and (Path(args.plot).is_dir() or not Path(args.plot).parent.is_dir()):
        raise CommandError(f"--plot {args.plot} cannot be written: it, or no folder for it, is a directory")
    report = audit(
        args.model,
        text,
        head=args.head,
        tail=args.tail,
        codec=args.codec,
        max_tokens=args.tokens,
        candidates=args.candidates,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )
    if args.plot is not None:
        Path(args.plot).write_text(plot(report), encoding="utf-8")
    if args.json:
        out.line(json.dumps(asdict(report), indent=2))
        return 0
    for line in _lines(report):
        out.line(line)
    return 0


def _lines(report: AuditReport) -> list[str]:
    return [
        f"{split_line(report)} (*)",
        f"{count(report.n_tokens, 'token')} of text, hidden states as {report.codec}",
        "",
        *_sent_lines(report),
        "",
        *_received_lines(report),
        "",
        f"recovered after {count(report.head, 'layer')}: {one_line(report.recovered)}",
        "",
        *_conclusion(report),
    ]


def _sent_lines(report: AuditReport) -> list[str]:
    """What the attacks on the hidden states that are sent have recovered."""
    every = report.n_candidates == report.n_vocab
    tried = (
        f"all {report.n_vocab} tokens"
        if every
        else f"the {report.n_candidates} of {report.n_vocab} tokens with the nearest embeddings"
    )
    rows: list[tuple[str, ...]] = [
        ("head layers", "cosine", "dot", "L2", "matching", "true prefix", *(() if every else ("at best",)))
    ]
    for one in report.heads:
        shares = [one.cosine, one.dot, one.l2, one.matched, one.matched_true_prefix]
        if not every:
            shares.append(one.among_candidates)
        mark = " *" if one.layers == report.head else "  "
        rows.append((f"{one.layers}{mark}", *(f"{share:.1%}" for share in shares)))
    return [
        "What goes up: tokens recovered from the hidden states after so many layers",
        *table(rows, right=range(len(rows[0]))),
        *paragraph(
            "cosine, dot, L2: the token with the nearest embedding. matching: the token with which the hidden"
            f" state is the same after what was recovered so far, of {tried}. true prefix: the same, had"
            " every token before it been known."
            + ("" if every else " at best: the token was among those tried.")
        ),
    ]


def _received_lines(report: AuditReport) -> list[str]:
    """What the attacks on the hidden states that come back have recovered."""
    rows: list[tuple[str, ...]] = [("tail layers", "logit lens", "of the text", "last layers run")]
    for one in report.tails:
        mark = " *" if one.layers == report.tail else "  "
        shown = (f"{share:.1%}" for share in (one.lens, one.lens_text, one.run))
        rows.append((f"{one.layers}{mark}", *shown))
    return [
        "What comes back: next tokens told by the hidden states before the last so many layers",
        *table(rows, right=range(4)),
        *paragraph(
            "logit lens: the output applied at once shows the whole model's choice. of the text: it shows the"
            f" text's next token (the whole model's choice is that in {report.choice_text:.1%}). last layers"
            " run: whoever has the weights runs the last layers as this side does, and sees what it sees;"
            " what is missing to 100% is what the codec changes in the text."
        ),
    ]


def _conclusion(report: AuditReport) -> list[str]:
    ours = next(one for one in report.heads if one.layers == report.head)
    best = max(ours.cosine, ours.dot, ours.l2, ours.matched)
    return paragraph(
        f"These simple attacks recovered {best:.1%} of the text from this split, and there are better ones."
        " From hidden states, anyone who has the weights can usually reconstruct the text: a split is not"
        " confidentiality, whatever the figures above are. To keep a secret from the other side, keep the"
        " text here, or take the secret out of it."
    )


def plot(report: AuditReport) -> str:
    """The two tables as an SVG image: shares recovered over head layers, and over tail layers."""
    heads, tails = report.heads, report.tails
    sent = [
        ("nearest embedding (cosine)", [(one.layers, one.cosine) for one in heads]),
        ("nearest embedding (L2)", [(one.layers, one.l2) for one in heads]),
        ("vocabulary matching", [(one.layers, one.matched) for one in heads]),
    ]
    received = [
        ("logit lens", [(one.layers, one.lens) for one in tails]),
        ("last layers run", [(one.layers, one.run) for one in tails]),
    ]
    panels = [
        _panel(60, "head layers", "tokens recovered from what goes up", report.head, sent),
        _panel(430, "tail layers", "model's choices told by what comes back", report.tail, received),
    ]
    title = one_line(f"{report.model}, {report.codec}: what hidden states tell")
    return figure(720, 320, panels, title)


def _panel(
    left: int,
    label: str,
    title: str,
    ours: int,
    curves: Sequence[tuple[str, Sequence[tuple[int, float]]]],
) -> Panel:
    """Shares over numbers of layers, with a line at the number of this split."""
    right, top, bottom = left + 280, 30, 270
    numbers = [number for number, _ in curves[0][1]]
    shares = (0, 0.25, 0.5, 0.75, 1)
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c")
    return Panel(
        *(left, top, right, bottom),
        x=Axis(label, max(*numbers, 1), [(number, str(number)) for number in numbers]),
        y=Axis("", 1, [(share, f"{share:.0%}") for share in shares]),
        curves=[
            Curve(name, colour, points, dots=points)
            for (name, points), colour in zip(curves, colours, strict=False)
        ],
        title=title,
        marker=ours,
        legend=(right - 8, bottom - 0.8 * (bottom - top), "end"),
    )

"""``sllm split``, ``audit``, ``codec-report``: a model's layers in files of their own, and what a split costs
in privacy and in quality.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from sllm.cli.console import CommandError, count, one_line, size, table
from sllm.engine.layers import open_layers
from sllm.split.audit import audit as run_audit
from sllm.split.codec_report import codec_report as run_codec_report
from sllm.wire.codec import CODECS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.cli.console import Output
    from sllm.engine.layer_file import LayeredFile
    from sllm.split.audit import AuditReport
    from sllm.split.codec_report import CodecReport

__all__ = ["add_audit", "add_codec_report", "add_split", "audit", "codec_report", "plot", "split"]

SAMPLE = (
    "Dear Dr Okafor, the lab called about Mary's blood test. Her iron is low again, so please move her visit"
    " from Thursday to Monday at half past nine, and do not tell her brother. My number is 555 0136. In the"
    " evening we will walk along the river with the dog, and I hope that the rain stops before then. Helen"
)
"""What ``sllm audit`` tries to recover where no text is given: of the kind that one would not want to be
read.
"""

_MODEL = "a GGUF file or hf://owner/repo/file.gguf"
_SHOWN = "(default: %(default)s)"


def _machine(parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", metavar="N", type=whole(1), help="CPU threads (default: all cores)")
    machine.add_argument(
        "--n-gpu-layers", metavar="N", type=whole(0), help="layers on GPUs; 0: nothing (default: all)"
    )


def _ends(parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]) -> None:
    parser.add_argument(
        "--head",
        metavar="N",
        type=whole(0),
        help="layers before the link (default: 6; in a small model all that leave one to the other side)",
    )
    parser.add_argument(
        "--tail", metavar="N", type=whole(0), default=1, help="layers behind the link (default: 1)"
    )


# ---- sllm split


def add_split(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm split``."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--layers", metavar="START:STOP", type=_range, help="one file, of the layers START to STOP - 1"
    )
    which.add_argument(
        "--parts",
        metavar="N,N,...",
        type=_numbers,
        help="as many files, of so many layers each, all layers together; a last 0: the output alone",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE|PREFIX",
        help="with --layers the file, with --parts what the files' names begin with (default: the model's"
        " name, in this folder: MODEL-layers-0-6.gguf)",
    )
    parser.add_argument("--json", action="store_true", help="as a JSON object")


def _range(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not (colon and _digits(start) and _digits(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers, expected START:STOP")
    return int(start), int(stop)


def _numbers(text: str) -> list[int]:
    items = text.split(",")
    if not all(_digits(item) for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of layers, such as 6,18,1")
    return [int(item) for item in items]


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


@dataclass(frozen=True)
class _Part:
    """A file to write."""

    start: int
    stop: int
    path: Path

    def holds(self, file: LayeredFile) -> str:
        """What goes into it."""
        n = self.stop - self.start
        inside = (
            [f"layers {self.start} to {self.stop - 1}"] if n > 1 else [f"layer {self.start}"] if n else []
        )
        if self.start == 0:
            inside.insert(0, "the embedding")
        if self.stop == file.n_layer:
            inside.append("the output")
        return ", ".join(inside) if len(inside) < 2 else f"{', '.join(inside[:-1])} and {inside[-1]}"

    def knows(self, file: LayeredFile) -> str:
        """What its holder can do with it alone."""
        if self.start == 0 and self.stop == file.n_layer:
            return "the whole model"
        if self.start == 0:
            return "turns text into hidden states; has the vocabulary"
        if self.stop == file.n_layer:
            return "turns hidden states into text; has the vocabulary"
        return "hidden states in and out; no vocabulary"


def split(args: argparse.Namespace, out: Output) -> int:
    """Write layers of a model into files."""
    file = open_layers(args.model)
    parts = _parts(args, file)
    for part in parts:  # all of them, before the first is written
        file.check_range(part.start, part.stop, output=part.start == part.stop)
        if any(part.path.exists() and part.path.samefile(path) for path in file.paths):
            raise CommandError(f"{part.path} is the model itself; name another file by -o")
        if part.path.is_dir():
            raise CommandError(f"{part.path} is a directory, expected a file's name")
        if not part.path.parent.is_dir():
            raise CommandError(f"{part.path.parent} is not a directory, so {part.path} cannot be written")
    written = []
    for part in parts:
        with _Progress(out, part.path.name) as progress:
            n_bytes = file.export(part.path, part.start, part.stop, progress)
        written.append((part, n_bytes))
    if args.json:
        found = {
            "model": str(file.paths[0]),
            "n_layer": file.n_layer,
            "files": [
                {
                    "file": str(part.path),
                    "start": part.start,
                    "stop": part.stop,
                    "bytes": n_bytes,
                    "embedding": part.start == 0,
                    "output": part.stop == file.n_layer,
                    "vocabulary": part.start == 0 or part.stop == file.n_layer,
                }
                for part, n_bytes in written
            ],
        }
        out.line(json.dumps(found, indent=2))
        return 0
    rows = [(str(part.path), size(n_bytes), part.holds(file), part.knows(file)) for part, n_bytes in written]
    for line in table([tuple(one_line(cell) for cell in row) for row in rows], right=(1,)):
        out.line(line)
    return 0


def _parts(args: argparse.Namespace, file: LayeredFile) -> list[_Part]:
    if args.layers is not None:
        start, stop = args.layers
        return [_Part(start, stop, Path(args.out) if args.out else _named(None, file, start, stop))]
    n = file.n_layer
    if sum(args.parts) != n:
        shown = "+".join(map(str, args.parts))
        raise CommandError(
            f"--parts {shown} are {count(sum(args.parts), 'layer')}, and {file.paths[0].name} has {n}"
        )
    if 0 in args.parts[:-1]:
        raise CommandError("--parts has a part of 0 layers, which only the last one may be: the output alone")
    parts, start = [], 0
    for number in args.parts:
        parts.append(_Part(start, start + number, _named(args.out, file, start, start + number)))
        start += number
    return parts


def _named(prefix: str | None, file: LayeredFile, start: int, stop: int) -> Path:
    beginning = Path(prefix) if prefix else Path(file.paths[0].stem)
    return beginning.with_name(f"{beginning.name}-layers-{start}-{stop}.gguf")


class _Progress:
    """A share of something, on the terminal alone, in one line that is gone afterwards."""

    def __init__(self, out: Output, what: str) -> None:
        self._out = out
        self._what = one_line(what)
        self._shown = -1

    def __call__(self, share: float) -> None:
        percent = int(share * 100)
        if percent != self._shown:
            self._shown = percent
            self._out.status(f"{self._what}: {percent} %")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._out.status("")


# ---- texts


def _text(name: str) -> str:
    """The text of a file, or of stdin (``-``)."""
    if name == "-":
        if sys.stdin is None:
            raise CommandError("there is no stdin to read the text from")
        data, shown = sys.stdin.buffer.read(), "stdin"
    else:
        data, shown = Path(name).read_bytes(), name
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{shown} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise CommandError(f"{shown} is empty, expected a text")
    return text


# ---- sllm codec-report


def add_codec_report(parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]) -> None:
    """Declare the arguments of ``sllm codec-report``; ``whole(low)`` is a type for integers from there."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("text", metavar="TEXT", help="a file, UTF-8; '-': stdin")
    _ends(parser, whole)
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    _machine(parser, whole)


def codec_report(args: argparse.Namespace, out: Output) -> int:
    """Print what each wire codec does to the next-token distributions along a text."""
    text = _text(args.text)
    with _Progress(out, "measuring") as progress:
        report = run_codec_report(
            args.model,
            text,
            head=args.head,
            tail=args.tail,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            progress=progress,
        )
    if args.json:
        out.line(json.dumps(_finite(asdict(report)), indent=2, allow_nan=False))
        return 0
    for line in _codec_lines(report):
        out.line(line)
    return 0


def _finite(value: Any) -> Any:
    """``value`` with null for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _split_line(report: AuditReport | CodecReport) -> str:
    middle = report.n_layer - report.head - report.tail
    name = one_line(report.model)
    return f"{name}: {report.head} + {middle} + {report.tail} layers, the {middle} on the other side"


def _codec_lines(report: CodecReport) -> list[str]:
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
        _split_line(report),
        f"{count(report.n_tokens, 'token')}, {report.n_positions} positions compared",
        "",
        *table(rows, right=range(1, 6)),
        *[f"{one.codec}: {one_line(one.refused)}" for one in report.codecs if one.refused is not None],
        "",
        *_paragraph(
            "bytes: of a position, in each direction. KL: of the split's next-token distribution from the"
            " whole model's, in nats: the mean over all positions, and the largest. same choice: both have"
            " the same likeliest token."
        ),
    ]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_on_hyphens=False)


# ---- sllm audit


def add_audit(parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]) -> None:
    """Declare the arguments of ``sllm audit``; ``whole(low)`` is a type for integers from there."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    _ends(parser, whole)
    add("--text", metavar="FILE", help="what is to be recovered, UTF-8; '-': stdin (default: a short letter)")
    add("--codec", choices=CODECS, default="q8", help=f"how hidden states cross the link {_SHOWN}")
    add("--tokens", metavar="N", type=whole(1), default=64, help=f"of the text, the first N tokens {_SHOWN}")
    add(
        "--candidates",
        metavar="N",
        type=whole(1),
        help="tokens that vocabulary matching tries at most for each, those with the nearest embeddings first"
        " (default: all of up to 4096, else 512)",
    )
    add("--plot", metavar="FILE", help="draw the tables, as SVG")
    add("--json", action="store_true", help="as a JSON object")
    _machine(parser, whole)


def audit(args: argparse.Namespace, out: Output) -> int:
    """Attack a split of one's own and print what was recovered."""
    text = SAMPLE if args.text is None else _text(args.text)
    if args.plot is not None and (Path(args.plot).is_dir() or not Path(args.plot).parent.is_dir()):
        raise CommandError(f"--plot {args.plot} cannot be written: it, or no folder for it, is a directory")
    try:
        report = run_audit(
            args.model,
            text,
            head=args.head,
            tail=args.tail,
            codec=args.codec,
            max_tokens=args.tokens,
            candidates=args.candidates,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            progress=lambda what: out.status(f"attacking: {what}"),
        )
    finally:
        out.status("")
    if args.plot is not None:
        Path(args.plot).write_text(plot(report), encoding="utf-8")
    if args.json:
        out.line(json.dumps(asdict(report), indent=2))
        return 0
    for line in _audit_lines(report):
        out.line(line)
    return 0


def _audit_lines(report: AuditReport) -> list[str]:
    every = report.n_candidates == report.n_vocab
    tried = (
        f"all {report.n_vocab} tokens"
        if every
        else f"the {report.n_candidates} of {report.n_vocab} tokens with the nearest embeddings"
    )
    up: list[tuple[str, ...]] = [
        ("head layers", "cosine", "dot", "L2", "matching", "true prefix", *(() if every else ("at best",)))
    ]
    for one in report.heads:
        shares = [one.cosine, one.dot, one.l2, one.matched, one.matched_true_prefix]
        if not every:
            shares.append(one.among_candidates)
        mark = " *" if one.layers == report.head else "  "
        up.append((f"{one.layers}{mark}", *(f"{share:.1%}" for share in shares)))
    down: list[tuple[str, ...]] = [("tail layers", "logit lens", "of the text", "last layers run")]
    for tail in report.tails:
        mark = " *" if tail.layers == report.tail else "  "
        shown = (f"{share:.1%}" for share in (tail.lens, tail.lens_text, tail.run))
        down.append((f"{tail.layers}{mark}", *shown))
    return [
        f"{_split_line(report)} (*)",
        f"{count(report.n_tokens, 'token')} of text, hidden states as {report.codec}",
        "",
        "What goes up: tokens recovered from the hidden states behind so many layers",
        *table(up, right=range(8)[: len(up[0])]),
        *_paragraph(
            "cosine, dot, L2: the token with the nearest embedding. matching: the token with which the hidden"
            f" state is the same behind what was recovered so far, of {tried}. true prefix: the same, had"
            " every token before it been known."
            + ("" if every else " at best: the token was among those tried.")
        ),
        "",
        "What comes back: next tokens told by the hidden states before the last so many layers",
        *table(down, right=range(4)),
        *_paragraph(
            "logit lens: the output applied at once shows the whole model's choice. of the text: it shows the"
            f" text's next token (the whole model's choice is that in {report.choice_text:.1%}). last layers"
            " run: whoever has the weights runs the last layers as this side does, and sees what it sees;"
            " what is missing to 100% is what the codec changes in the text."
        ),
        "",
        f"recovered behind {count(report.head, 'layer')}: {one_line(report.recovered)}",
        "",
        *_conclusion(report),
    ]


def _conclusion(report: AuditReport) -> list[str]:
    ours = next(one for one in report.heads if one.layers == report.head)
    best = max(ours.cosine, ours.dot, ours.l2, ours.matched)
    return _paragraph(
        f"These simple attacks recovered {best:.1%} of the text from this split, and there are better ones."
        " From hidden states, anyone who has the weights can usually reconstruct the text: a split is not"
        " confidentiality, whatever the figures above are. To keep a secret from the other side, keep the"
        " text here, or take the secret out of it."
    )


# ---- the plot

_WIDTH, _HEIGHT = 720, 320
_TOP, _BOTTOM = 30, 50
_PANELS = ((60, 340), (430, 710))  # from x to x
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def plot(report: AuditReport) -> str:
    """The two tables as an SVG image: shares recovered over head layers, and over tail layers."""
    heads, tails = report.heads, report.tails
    xs = [one.layers for one in heads]
    up = [
        ("nearest embedding (cosine)", [one.cosine for one in heads]),
        ("nearest embedding (L2)", [one.l2 for one in heads]),
        ("vocabulary matching", [one.matched for one in heads]),
    ]
    down = [
        ("logit lens", [one.lens for one in tails]),
        ("last layers run", [one.run for one in tails]),
    ]
    title = escape(one_line(f"{report.model}, {report.codec}: what hidden states tell"))
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
            f' viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        ),
        f"<title>{title}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_panel(_PANELS[0], "head layers", "tokens recovered from what goes up", xs, report.head, up),
        *_panel(
            _PANELS[1],
            "tail layers",
            "model's choices told by what comes back",
            [one.layers for one in tails],
            report.tail,
            down,
        ),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def _panel(
    sides: tuple[int, int],
    label: str,
    title: str,
    numbers: Sequence[int],
    ours: int,
    curves: Sequence[tuple[str, Sequence[float]]],
) -> list[str]:
    left, right = sides
    low, high = _HEIGHT - _BOTTOM, _TOP
    top = max(*numbers, 1)

    def x(number: float) -> float:
        return left + (right - left) * number / top

    def y(share: float) -> float:
        return low - (low - high) * share

    parts = [f'<text x="{(left + right) / 2}" y="{high - 12}" text-anchor="middle">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{left} {y(share):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<path d="M{x(ours):.1f} {high}V{low}" stroke="#888" stroke-dasharray="4 3"/>')
    parts.append(f'<path d="M{left} {high}V{low}H{right}" fill="none" stroke="black"/>')
    parts += [
        f'<text x="{x(number):.1f}" y="{low + 16}" text-anchor="middle">{number}</text>' for number in numbers
    ]
    parts.append(f'<text x="{(left + right) / 2}" y="{low + 36}" text-anchor="middle">{label}</text>')
    for i, ((name, shares), colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        points = " ".join(f"{x(n):.1f},{y(s):.1f}" for n, s in zip(numbers, shares, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(n):.1f}" cy="{y(s):.1f}" r="3" fill="{colour}"/>'
            for n, s in zip(numbers, shares, strict=True)
        ]
        at = f'x="{right - 8}" y="{y(0.8) + 16 * i:.1f}" text-anchor="end"'
        parts.append(f'<text {at} fill="{colour}">{escape(name)}</text>')
    return parts

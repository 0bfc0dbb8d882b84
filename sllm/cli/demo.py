"""``sllm demo``: a worker, a slow link and a draft on one machine, and what each way over the link brings.

After it :mod:`sllm.cli.demo_triage` shows with the same worker who answers what, and what leaves the
machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import sllm
from sllm import embedded
from sllm.cli.arguments import DEFAULT, add_threads, number, whole
from sllm.cli.columns import Wrapper
from sllm.cli.console import GREEN, count, one_line, parameters, size, table
from sllm.cli.demo_triage import show_triage
from sllm.cli.demo_ways import (
    DRAFT_SECONDS,
    PASS_SECONDS,
    PacedDrafter,
    Stage,
    WrittenText,
    draft_then_wait,
    pipelined,
    written_alone,
)
from sllm.cli.demo_worker import demo_worker
from sllm.cli.slow_link import Link
from sllm.engine.cpu import available_cores
from sllm.remote.connection import connect
from sllm.wire.auth import Address

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sllm.cli.console import Output
    from sllm.generation.text_stream import Run
    from sllm.remote.connection import Remote

__all__ = ["EPILOG", "PROMPTS", "add_arguments", "run"]

EPILOG = None

PROMPTS = {
    "en": "Tell me a short story about a little fox called Oscar who loses a red kite.",
    "zh": "请讲一个小狐狸乐乐许愿的故事。",
}
"""What is asked by default, by language: of the world that the pair was trained on."""

_FAILED = 1

_STREAMING = "cloud streaming"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm demo``."""
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what to answer (default: a story is asked for)")
    add(
        "--language",
        choices=sorted(PROMPTS),
        default="en",
        help="what is asked by default, and the private message, in English or Chinese (default: en)",
    )
    add("-n", "--max-tokens", metavar="N", type=whole(1), default=320, help="at most N tokens (default: 320)")
    add("--temperature", metavar="T", type=float, default=0.4, help=DEFAULT)
    add("--seed", metavar="N", type=int, default=1, help=DEFAULT)
    add(
        "--rtt",
        metavar="MS",
        type=number(above_zero=False),
        default=50.0,
        help="the link's round trip in milliseconds (default: 50)",
    )
    add(
        "--unpaced",
        action="store_true",
        help="let the models be as quick as they are; else each pass of the target takes"
        f" {PASS_SECONDS * 1e3:.0f} ms and each drafted token {DRAFT_SECONDS * 1e3:.0f} ms, as those of large"
        " models do",
    )
    add_threads(parser, models=2)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the text arrive, compare the ways, and show who answers what."""
    sampling = sllm.SamplingParams(temperature=args.temperature, seed=args.seed)
    asked = PROMPTS[args.language] if args.prompt is None else args.prompt
    # Worker and draft work at the same time, and threads that wait by spinning take each other's cores.
    n_threads = args.threads or max(1, min(4, available_cores() // 2))
    with ExitStack() as stack:
        target = stack.enter_context(sllm.Model(embedded.TARGET))
        draft = stack.enter_context(sllm.Model(embedded.DRAFT))
        _introduce(target, draft, args, out)
        link, remote, drafter = _set_up(draft, n_threads, args, stack)
        prompt = remote.chat([{"role": "user", "content": asked}])
        stage = Stage(remote, link, drafter, prompt, sampling, args.max_tokens)
        ways = _write(stage, asked, out)
        alone = written_alone(target, stage, n_threads)
        for line in table(_figures(ways), right=(1, 2, 3, 4), columns=out.columns):
            out.line(line)
        out.paragraph(_gain(ways, paced=not args.unpaced))
        for one in ways:
            difference = _difference(one, alone)
            if difference is not None:
                out.note(f"sllm: {difference}")
                return _FAILED
        tokens = count(len(alone.tokens), "token")
        out.paragraph(f"All {len(ways)} texts are the same, the target's own: {tokens}, compared one by one.")
        out.line()
        return 0 if show_triage(stage.remote, target, n_threads, out, args.language) else _FAILED


def _introduce(target: sllm.Model, draft: sllm.Model, args: argparse.Namespace, out: Output) -> None:
    out.paragraph(f"{_model_line(target)}, behind a link of {args.rtt:g} ms round trip", "target: ")
    out.paragraph(f"{_model_line(draft)}, on this side of it", "draft:  ")
    if not args.unpaced:
        out.paragraph(
            f"that of large models: each pass of the target takes {PASS_SECONDS * 1e3:.0f} ms and"
            f" each drafted token {DRAFT_SECONDS * 1e3:.0f} ms (see --unpaced)",
            "pace:   ",
        )
    if not out.shows_chinese:
        out.paragraph("Chinese text is shown as question marks: stdout's encoding does not have it.")


def _set_up(
    draft: sllm.Model, n_threads: int, args: argparse.Namespace, stack: ExitStack
) -> tuple[Link, Remote, PacedDrafter]:
    """Start the worker, put a link in front of it, and connect."""
    uri = stack.enter_context(demo_worker(0.0 if args.unpaced else PASS_SECONDS, n_threads))
    address = Address.parse(uri)
    link = stack.enter_context(Link((address.host, address.port), delay=args.rtt / 2e3))
    remote = stack.enter_context(connect(replace(address, host=link.host, port=link.port).uri, timeout=30))
    drafter = stack.enter_context(PacedDrafter(draft, n_threads=n_threads))
    drafter.seconds_per_token = 0.0 if args.unpaced else DRAFT_SECONDS
    return link, remote, drafter


def _write(stage: Stage, prompt: str, out: Output) -> list[WrittenText]:
    """Write the text by each of the ways, and show it arrive by the last one."""
    # Untimed: the first text pays for pages, graphs and code that the others find ready.
    pipelined("warm-up", replace(stage, max_tokens=min(stage.max_tokens, 8)), draft=True)

    wrapper = Wrapper(lambda text, style: out.text(text, style=style), out.columns)
    wrapper("green" if out.colour else "[in brackets]", GREEN)
    wrapper(": drafted here, and accepted by the target; everything else is the target's own\n\n")
    out.paragraph(one_line(prompt), "> ")
    out.line()

    def show(part: Run) -> None:
        drafted = part.source == "draft"
        text = _bracketed(part.text) if drafted and not out.colour else part.text
        wrapper(text, GREEN if drafted else "")

    ahead = pipelined("hints + run-ahead", stage, draft=True, show=show)
    wrapper.end()
    out.end_line()
    out.line()
    out.paragraph(_why_it_ended(ahead, stage.max_tokens))
    out.line()
    return [
        pipelined(_STREAMING, stage, draft=False),
        draft_then_wait("draft, then wait", stage),
        pipelined("hints", stage, draft=True, run_ahead=False),
        ahead,
    ]


def _why_it_ended(text: WrittenText, max_tokens: int) -> str:
    if text.finish_reason == "length":
        return f"(cut at {count(max_tokens, 'token')}, in the middle of the text: -n N allows more)"
    if text.finish_reason == "context":
        return f"(cut after {count(len(text.tokens), 'token')}: the context of the model is full)"
    return f"(ended by the target itself, after {count(len(text.tokens), 'token')})"


def _bracketed(text: str) -> str:
    """Mark drafted text where there are no colours; space around it stays outside, so that it reads well."""
    inside = text.strip()
    if not inside:
        return text
    before, _, after = text.partition(inside)
    return f"{before}[{inside}]{after}"


def _model_line(model: sllm.Model) -> str:
    weights = f"{parameters(model.n_params)} parameters, {size(model.size_bytes)}"
    return f"{model.path.name}, {model.n_layer} layers, {weights}"


def _streaming(ways: Sequence[WrittenText]) -> WrittenText:
    return next(one for one in ways if one.how == _STREAMING)


def _figures(ways: Sequence[WrittenText]) -> list[tuple[str, ...]]:
    """The rows of the demo's table."""
    streaming = _streaming(ways)
    rows: list[tuple[str, ...]] = [("", "tokens/s", "x streaming", "passes/token", "bytes/token")]
    for one in ways:
        n = max(len(one.tokens), 1)
        ratio = f"{one.tokens_per_s / streaming.tokens_per_s:.2f}" if streaming.tokens_per_s else "-"
        rows.append(
            (one.how, f"{one.tokens_per_s:.1f}", ratio, f"{one.n_passes / n:.2f}", f"{one.n_bytes / n:.0f}")
        )
    return rows


def _gain(ways: Sequence[WrittenText], *, paced: bool) -> str:
    """In words what the table does and does not show."""
    streaming, best = _streaming(ways), ways[-1]
    quicker = best.tokens_per_s > 1.1 * streaming.tokens_per_s
    # With as many passes it is the machine's noise that makes one quicker.
    if not streaming.tokens_per_s or not quicker or best.n_passes > 0.9 * streaming.n_passes:
        return (
            "Hints bring little in this run: they pay where a pass of the target takes longer than a drafted"
            " token."
        )
    gain = f"{best.tokens_per_s / streaming.tokens_per_s:.1f}"
    cost = f"{best.n_bytes / max(streaming.n_bytes, 1):.1f}"
    said = f"The gain: {gain} x the tokens per second of streaming, for {cost} x its bytes."
    if paced:
        said += " It is that of the pace above; this small pair itself gains less (see --unpaced)."
    return said


def _difference(one: WrittenText, alone: WrittenText) -> str | None:
    """Where two texts differ, in words, or None where they do not."""
    if one.tokens == alone.tokens:
        return None
    pairs = enumerate(zip(one.tokens, alone.tokens, strict=False))
    shorter = min(len(one.tokens), len(alone.tokens))
    at = next((index for index, (mine, other) in pairs if mine != other), shorter)
    return f"the text by {one.how!r} is NOT the target's own: it differs from token {at} of the answer on"

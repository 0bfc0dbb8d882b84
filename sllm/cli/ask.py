"""``sllm ask``: an answer by the model that suits the request, and an account of what left the machine."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.arguments import (
    ENGINE,
    ENGINE_SECRET,
    URI,
    add_engine_model,
    add_remote,
    add_threads,
    utf8,
    whole,
)
from sllm.cli.ask_arguments import add_triage, check_cloud
from sllm.cli.ask_models import open_hybrid
from sllm.cli.console import CommandError, count, one_line, read_prompt
from sllm.cli.run_report import style_of

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.triage.hybrid import Answer

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    "Without --small the package's own model grades and answers, with the profile that comes with it."
    " Without a profile nothing is promised, and every request is tier 2. The key for --cloud-url is taken"
    f" from OPENAI_API_KEY. {ENGINE_SECRET} A worker's sllm:// line is a secret, too, and @FILE or"
    " SLLM_REMOTE keep it from the machine's other users. Where the cloud does not answer, a line on stderr"
    " says so, and the local model answers."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm ask``."""
    add = parser.add_argument
    # Any number of words, so that the ones of a prompt without quotes are not repeated by argparse's error.
    add("prompt", metavar="PROMPT", nargs="*", help="the request; '-', or none and a pipe: stdin")
    add("--system", metavar="TEXT", type=utf8, help="a system message before it")
    models = parser.add_argument_group("models")
    cloud = parser.add_argument_group("cloud")
    add_remote(cloud, f"a worker: {URI}. It may be repeated: workers with the same model, as one")
    cloud.add_argument("--engine", metavar="URL", help=ENGINE)
    add_engine_model(cloud)
    add_triage(models, cloud)
    models.add_argument(
        "--local",
        metavar="GGUF",
        help="answers tier 2, and what must not leave this machine (default: --small)",
    )
    add("-n", "--max-tokens", metavar="N", type=whole(1), default=512, help="of the answer (default: 512)")
    # A profile is made of answers at temperature 0, and promises nothing of others.
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="what a profile promises holds at 0 (default: 0)",
    )
    add(
        "--no-thinking",
        action="store_true",
        help="answer without reasoning first, where a model's template has a switch for that (not for"
        " --cloud-url)",
    )
    add("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    add("--n-ctx", metavar="N", type=whole(1), help="positions of the contexts here")
    add_threads(parser, models=2)
    add(
        "--explain",
        action="store_true",
        help="say on stderr who answered, why, and what was masked: kinds and counts, never values",
    )
    add("--json", action="store_true", help="answer and account as a JSON object")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm ask``."""
    sampling = sllm.SamplingParams(temperature=args.temperature, seed=args.seed)
    check_cloud(args)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    option = "--small" if args.small is None and args.local is None else None
    messages.append({"role": "user", "content": _prompt(args.prompt, option)})
    with ExitStack() as stack:
        hybrid, _, trouble = open_hybrid(args, sampling, out, stack)
        answer = stack.enter_context(hybrid.ask(messages))
        if trouble is not None:
            answer.reasons.append(trouble)
        parts = []
        for part in answer:
            if args.json:
                parts.append(part.text)
            else:
                out.text(part.text, style=style_of(part))
        if args.json:
            out.line(json.dumps(_account(answer, "".join(parts)), ensure_ascii=False))
        else:
            out.end_line()
        for reason in answer.reasons:
            if "does not answer" in reason and reason != trouble:  # said already when it was met
                out.note(f"sllm: {reason}")
        if args.explain:
            for line in explained(answer):
                out.note(line)
    return 0


def _prompt(words: list[str], model_option: str | None) -> str:
    prompt = read_prompt(words, "ask", model_option=model_option)
    if not prompt.strip():
        raise CommandError("the request is empty")
    return prompt


# ---- output


def _account(answer: Answer, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "tier": int(answer.grade.tier),
        "route": answer.route,
        "reasons": answer.reasons,
        "masked": answer.masked,
        "stats": asdict(answer.stats),
    }


def explained(answer: Answer) -> list[str]:
    """Who answered and why, for people: kinds, counts and numbers."""
    grade, stats = answer.grade, answer.stats
    masked = ", ".join(f"{kind} {n}" for kind, n in sorted(answer.masked.items()))
    lines = [
        f"tier: {int(grade.tier)} (easy {grade.p_easy:.2f}, hard {grade.p_hard:.2f})",
        f"privacy: {grade.privacy}",
        f"reasons: {one_line('; '.join(answer.reasons))}",
        f"route: {' > '.join(answer.route)}",
        f"masked: {masked or 'nothing'}",
        f"cloud: {count(stats.cloud_in, 'token')} sent, {stats.cloud_out} received",
    ]
    if stats.n_checked:
        lines.append(f"verified: {stats.n_kept} of {count(stats.n_checked, 'token')} stood")
    if stats.n_restored:
        lines.append(f"restored: {count(stats.n_restored, 'placeholder')}")
    if stats.n_in_links:
        lines.append(f"not restored in links: {count(stats.n_in_links, 'placeholder')}")
    lines.append(f"time: {stats.seconds:.2f} s, {stats.grade_seconds:.2f} s of it for the grade")
    return lines

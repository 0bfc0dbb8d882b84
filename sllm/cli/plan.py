"""``sllm plan``: which way to a text is the fastest here, predicted from what is measured now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import sllm
from sllm.cli.addresses import engine_key, worker_addresses
from sllm.cli.arguments import (
    DEFAULT,
    ENGINE,
    ENGINE_SECRET,
    MODEL,
    SECRET,
    URI,
    add_json,
    add_remote,
    layers_or_none,
    number,
    utf8,
    whole,
)
from sllm.cli.run_arguments import add_sampling, sampling_of
from sllm.wire.codec import CODECS

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"{SECRET} {ENGINE_SECRET}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm plan``."""
    add = parser.add_argument
    add(
        "prompts",
        metavar="PROMPT",
        nargs="*",
        type=utf8,
        help="what your texts begin with: the more like them, the better the prediction (default: three of"
        " our own)",
    )
    add("--chat", action="store_true", help="each PROMPT is a message, for the model's chat template")
    add("--draft", metavar="GGUF|ngram", help=f"the small model here: {MODEL}; or prompt lookup")
    add("--target", metavar="GGUF", help=f"the main model, if it is here: {MODEL}")
    add_remote(parser, f"a worker with the whole main model: {URI}")
    add(
        "--layers",
        metavar="URI",
        action="append",
        help="a worker with layers of --target (sllm worker MODEL --layers); may be repeated, in their order",
    )
    add(
        "--head",
        metavar="N",
        type=whole(0),
        default=1,
        help=f"of a split: the first N layers run here {DEFAULT}",
    )
    add(
        "--tail",
        metavar="N|none",
        type=layers_or_none,
        default=1,
        help=f"of a split: the last N layers run here, and the output; none: the worker selects {DEFAULT}",
    )
    add(
        "--codec",
        choices=CODECS,
        default="f16",
        help=f"of a split: how hidden states cross the link {DEFAULT}",
    )
    add("--engine", metavar="URL", help=f"{ENGINE}; --target or --draft has its vocabulary")
    add(
        "-n",
        "--max-tokens",
        metavar="N",
        type=whole(1),
        default=256,
        help=f"tokens of the texts that are planned for {DEFAULT}",
    )
    add(
        "--acceptance",
        metavar="SHARE",
        type=float,
        help="of the draft's tokens that are right, if you know it (default: measured)",
    )
    seconds = number(above_zero=True)
    add(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=20.0,
        help=f"for connecting, and of silence {DEFAULT}",
    )
    add_json(parser)
    add_sampling(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure, predict, and show the ways; 1 if none of them is possible."""
    prompts: list[object] = list(args.prompts)
    if args.chat:
        prompts = [[{"role": "user", "content": text}] for text in args.prompts]
    remote = [uri for given in args.remote or () for uri in worker_addresses(given)]
    layers = [uri for given in args.layers or () for uri in worker_addresses(given)]
    found = sllm.plan(
        args.draft,
        target=args.target,
        remote=remote or None,
        layers=layers or None,
        head=args.head,
        tail=args.tail,
        codec=args.codec,
        engine=args.engine,
        api_key=engine_key(),
        prompts=prompts or None,  # type: ignore[arg-type]
        sampling=sampling_of(args),
        max_tokens=args.max_tokens,
        acceptance=args.acceptance,
        timeout=args.timeout,
    )
    out.line(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if args.json else str(found))
    if found.best is None:
        out.note("sllm: no way is possible here")
        return 1
    return 0

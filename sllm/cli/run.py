"""``sllm run``: the text that follows a prompt, by a model here, a worker's, an engine's, or one split."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import sllm
from sllm.cli.addresses import worker_addresses
from sllm.cli.arguments import (
    DEFAULT,
    ENGINE,
    ENGINE_SECRET,
    MODEL,
    SECRET,
    URI,
    add_engine_model,
    add_gpu_layers,
    add_threads,
    layers_or_none,
    number,
    whole,
)
from sllm.cli.chat_arguments import add_chat, chat_prompt, check_chat
from sllm.cli.console import CommandError, expected_utf8, read_prompt
from sllm.cli.run_models import open_engine, open_local, open_remote, open_split
from sllm.cli.run_report import ShownText, summary
from sllm.draft.drafters import ModelDrafter
from sllm.wire.codec import CODECS

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"{SECRET} {ENGINE_SECRET}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm run``."""
    add = parser.add_argument
    # Any number of words, so that what is meant by `sllm run model.gguf 'Hello'` can be said.
    add("prompt", metavar="PROMPT", nargs="*", help="the prompt; '-', or none and a pipe: stdin")
    add("--target", metavar="GGUF", help=f"{MODEL} (default: the package's own small model)")
    add("--remote", metavar="URI", nargs="?", const="", help=f"a worker: {URI}")
    add(
        "--engine",
        metavar="URL",
        help=f"{ENGINE}; --target is then a model with its vocabulary, of which nothing else is loaded",
    )
    add_engine_model(parser)
    add(
        "--experimental",
        action="store_true",
        help="with --engine and its own --noise: what it streams is the text, ahead of which the draft jumps",
    )
    add(
        "--draft",
        metavar="GGUF|mtp|ngram|none",
        help=f"{MODEL}, the target's own heads for multi-token prediction (sllm inspect says whether it has"
        " any), prompt lookup, or nothing (default: the package's own if the target has its vocabulary, else"
        " none)",
    )
    add("--chat", action="store_true", help="PROMPT is a message, for the model's chat template")
    add("-n", "--max-tokens", metavar="N", type=whole(1), help="at most N tokens")
    add("--stop", metavar="S", action="append", default=[], help="end before S; may be repeated")
    add_chat(parser)
    _add_sampling(parser)
    add(
        "--rpc",
        metavar="HOST:PORT|URI",
        help="run layers of --target (see --n-gpu-layers) on the devices of an RPC server, or of a worker"
        " that was started with --rpc (its sllm:// line, or @FILE)",
    )
    _add_link(parser)
    _add_split(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--n-ctx",
        metavar="N",
        type=whole(1),
        help="positions of the context (with --remote: the draft's)",
    )
    add_threads(machine, models=2)
    add_gpu_layers(machine, of=" of the target", draft=True)
    add("--stats", action="store_true", help="write to stderr what the text took: seconds, passes, bytes")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    default = sllm.SamplingParams()
    sampling = parser.add_argument_group("sampling")
    for option, metavar, kind, value in [
        ("--temperature", "T", float, default.temperature),
        ("--top-k", "K", int, default.top_k),
        ("--top-p", "P", float, default.top_p),
        ("--min-p", "P", float, default.min_p),
        ("--seed", "N", int, default.seed),
    ]:
        sampling.add_argument(option, metavar=metavar, type=kind, default=value, help=DEFAULT)
    sampling.add_argument(
        "--noise",
        choices=("sllm", "vllm", "sglang"),
        default=default.noise,
        help="whose: with that of another engine, tokens are selected as it does for a request with this seed"
        f" {DEFAULT}",
    )
    sampling.add_argument("--grammar-file", metavar="FILE", help="a GBNF grammar that the text must match")
    sampling.add_argument(
        "--json-schema", metavar="FILE", help="a JSON Schema that the text must be an instance of"
    )


def _add_link(parser: argparse.ArgumentParser) -> None:
    link = parser.add_argument_group("link (with --remote)")
    link.add_argument(
        "--no-run-ahead",
        action="store_true",
        help="let the worker compute only what is asked for: fewer passes, cheaper, and slower",
    )
    link.add_argument(
        "--on-loss",
        choices=("wait", "raise", "local"),
        help="when the link is lost: connect again and go on; give up; or show in the meantime what the draft"
        " writes alone, on a terminal, until the worker takes over again (default: wait)",
    )
    link.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=number(above_zero=True),
        help="give the text up after so long without a link (default: 60)",
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    split = parser.add_argument_group(
        "split by layers (with --target, and --remote for a worker that was started with --layers)"
    )
    split.add_argument("--head", metavar="N", type=whole(0), help="the first N layers run here")
    split.add_argument(
        "--tail",
        metavar="N|none",
        type=layers_or_none,
        default=1,
        help="the last N layers run here, and the output; none: the worker selects the tokens, and so knows"
        " the text (default: 1)",
    )
    split.add_argument(
        "--codec",
        choices=CODECS,
        default="f16",
        help="how hidden states cross the link; see sllm codec-report (default: f16)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm run``."""
    if args.grammar_file is not None and args.json_schema is not None:
        raise CommandError("--grammar-file and --json-schema exclude each other")
    sampling = sllm.SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        noise=args.noise,
        grammar=None if args.grammar_file is None else _read_text(Path(args.grammar_file)),
        json_schema=None if args.json_schema is None else _read_schema(Path(args.json_schema)),
    )
    if "" in args.stop:
        raise CommandError("--stop is empty")
    check_chat(args)
    uris = None if args.remote is None else worker_addresses(args.remote)
    if uris is not None and args.target is not None and args.head is None:
        raise CommandError("--target and --remote exclude each other, except for a split: name --head")
    if args.engine is None and args.engine_model is not None:
        raise CommandError("--engine-model needs --engine, the address of the engine")
    if args.engine is None and args.experimental:
        raise CommandError("--experimental needs --engine, the address of the engine")
    if args.engine is not None and (uris is not None or args.rpc is not None or args.head is not None):
        raise CommandError("--engine excludes --remote, --rpc and --head")
    if args.head is not None and uris is None:
        raise CommandError("--head splits a model with a worker: name that by --remote")
    option = "--target" if args.target is None and args.remote is None else None
    text = read_prompt(args.prompt, "run", model_option=option)
    with ExitStack() as stack:
        if args.engine is not None:
            model, target, draft = open_engine(args, sampling, stack)
        elif uris is None:
            model, target, draft = open_local(args, sampling, stack)
        elif args.head is None:
            model, target, draft = open_remote(uris, args, sampling, stack)
        else:
            model, target, draft = open_split(uris, args, sampling, stack)
        prompt = chat_prompt(args, model, text) if args.chat else text
        drafter: sllm.Model | ModelDrafter | str | None = draft
        elsewhere = uris is not None or args.engine is not None
        if isinstance(draft, sllm.Model) and (args.threads is not None or elsewhere):
            n_ctx = min(n for n in (args.n_ctx, draft.n_ctx_train, 4096) if n)
            drafter = stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=args.threads))
        stream = stack.enter_context(
            sllm.generate(
                target, prompt, draft=drafter, sampling=sampling, max_tokens=args.max_tokens, stop=args.stop
            )
        )
        shown = ShownText(out)
        if args.prefill is not None:
            shown.add(sllm.Run(0, (), args.prefill, 0, "target"))
        for part in stream:
            shown.add(part)
        out.end_line()
        if args.stats:
            for line in summary(stream.stats):
                out.note(line)
    return 0


def _read_text(path: Path) -> str:
    with expected_utf8(path):
        return path.read_text(encoding="utf-8")


def _read_schema(path: Path) -> str:
    text = _read_text(path)
    try:
        sllm.SamplingParams(json_schema=text)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None
    return text

"""The options of ``sllm run`` and ``sllm chat``: where the model is, what drafts, how tokens are selected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sllm
from sllm.cli.addresses import worker_addresses
from sllm.cli.arguments import (
    DEFAULT,
    ENGINE,
    MODEL,
    NO_HOPS,
    URI,
    add_engine_model,
    add_gpu_layers,
    add_remote,
    add_threads,
    hop,
    layers_or_none,
    number,
    utf8,
    whole,
)
from sllm.cli.console import CommandError, count, expected_utf8
from sllm.engine import model_name
from sllm.engine.layers import open_layers
from sllm.wire.codec import CODECS

if TYPE_CHECKING:
    import argparse

__all__ = ["add_models", "add_places", "add_sampling", "add_text", "check_models", "is_split", "sampling_of"]


def add_models(parser: argparse.ArgumentParser) -> None:
    """Declare what decides the text and what drafts it."""
    add = parser.add_argument
    add("--target", metavar="GGUF", help=f"{MODEL} (default: the package's own small model)")
    add_remote(
        parser,
        f"a worker: {URI}. It may be repeated: workers with the same model, as one; with --head, workers"
        " that have the layers between, in their order",
    )
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


def add_text(parser: argparse.ArgumentParser) -> None:
    """Declare where a text ends."""
    parser.add_argument("-n", "--max-tokens", metavar="N", type=whole(1), help="at most N tokens")
    parser.add_argument(
        "--stop",
        metavar="S",
        type=utf8,
        action="append",
        default=[],
        help="end before S; may be repeated",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are selected."""
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


def add_places(parser: argparse.ArgumentParser) -> None:
    """Declare which machines compute, and how."""
    parser.add_argument(
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
        "--hedge",
        metavar="SECONDS",
        nargs="?",
        const=True,
        type=number(above_zero=True),
        help="of several workers, ask a second one, too, where the first one has not answered after SECONDS;"
        " without: where it is later than usual",
    )
    link.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=number(above_zero=True),
        help="give the text up after so long without a link (default: 60)",
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    split = parser.add_argument_group(
        "split by layers (with --target, and --remote for each worker that was started with --layers)"
    )
    split.add_argument(
        "--head",
        metavar="N",
        type=whole(0),
        help="the first N layers run here (default: those that --target holds, if sllm split has written it"
        " with the first layers alone)",
    )
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
    split.add_argument(
        "--hops",
        metavar="HOST:PORT|same|none",
        type=hop,
        action="append",
        help="of several workers, each passes hidden states on to the next where it may (sllm worker --hops)."
        " Where it reaches that one, once for each worker but the first: at an address of its own, or at the"
        " same as this side does; none: all hidden states go through here (default: same for all). --stats"
        " says which way they went",
    )


def check_models(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        CommandError: an option that needs another one, or excludes it.

    """
    if "" in args.stop:
        raise CommandError("--stop is empty")
    for given in args.remote or ():
        worker_addresses(given)
    _check_engine(args)
    _check_workers(args)


def _check_engine(args: argparse.Namespace) -> None:
    """Whether the options for a serving engine go together."""
    if args.engine is None and args.engine_model is not None:
        raise CommandError("--engine-model needs --engine, the address of the engine")
    if args.engine is None and args.experimental:
        raise CommandError("--experimental needs --engine, the address of the engine")
    if args.engine is not None and (args.remote or args.rpc is not None or args.head is not None):
        raise CommandError("--engine excludes --remote, --rpc and --head")


def _check_workers(args: argparse.Namespace) -> None:
    """Whether what is said of workers goes together."""
    n_workers = len(args.remote or ())
    if n_workers and args.target is not None and args.head is None and not _says_head(args.target):
        raise CommandError("--target and --remote exclude each other, except for a split: name --head")
    if args.head is not None and not n_workers:
        raise CommandError("--head splits a model with workers: name each by --remote")
    hops = args.hops or []
    if hops and (n_workers < 2 or not is_split(args)):
        raise CommandError("--hops is for a split with several workers: name --head, and each by --remote")
    if NO_HOPS in hops:
        if len(hops) > 1:
            raise CommandError("--hops none says all there is to say: leave the others out")
    elif hops and len(hops) != n_workers - 1:
        raise CommandError(
            f"--hops is given {count(len(hops), 'time')}, expected {n_workers - 1}: once for each of the"
            f" {n_workers} workers but the first, or none"
        )


def is_split(args: argparse.Namespace) -> bool:
    """Whether the options, which :func:`check_models` has seen, split a model between here and workers."""
    return args.head is not None or bool(args.remote and args.target is not None)


def _says_head(name: str) -> bool:
    """Whether a file of this machine holds the first layers of a model alone."""
    try:
        found = model_name.parse(name)
        return not isinstance(found, model_name.HubName) and open_layers(found).n_first is not None
    except (sllm.SllmError, OSError):  # whatever it is, it is not that
        return False


def sampling_of(args: argparse.Namespace) -> sllm.SamplingParams:
    """The sampling parameters.

    Raises:
        CommandError: two grammars, or a file that holds something else.
        OSError: a file cannot be read.
        ValueError: a parameter is out of range.

    """
    if args.grammar_file is not None and args.json_schema is not None:
        raise CommandError("--grammar-file and --json-schema exclude each other")
    return sllm.SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        noise=args.noise,
        grammar=None if args.grammar_file is None else _read_text(Path(args.grammar_file)),
        json_schema=None if args.json_schema is None else _read_schema(Path(args.json_schema)),
    )


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

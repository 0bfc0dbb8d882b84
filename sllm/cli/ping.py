"""``sllm ping``: the link to a worker or an engine, measured, and what it offers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import sllm
from sllm.cli.addresses import engine_key, worker_addresses
from sllm.cli.arguments import ENGINE_SECRET, MODEL, SECRET, add_engine_model, add_worker
from sllm.cli.console import CommandError, one_line, parameters, size, table
from sllm.remote.connection import connect
from sllm.targets.base import RemoteStats

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.remote.connection import Ping, WorkerInfo

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"{SECRET} {ENGINE_SECRET}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm ping``."""
    add_worker(parser, also=", or the http:// address of a serving engine, such as http://host:8000/v1")
    engine = parser.add_argument_group("serving engine")
    engine.add_argument(
        "--vocab",
        metavar="GGUF",
        help=f"compare its tokens with those of a model's: {MODEL} (default: do not)",
    )
    add_engine_model(engine)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure the link to a worker or an engine and show what it offers."""
    if args.uri is not None and args.uri.startswith(("http://", "https://")):
        return _ping_engine(args, out)
    if args.vocab is not None or args.engine_model is not None:
        raise CommandError("--vocab and --engine-model are for the http:// address of an engine")
    with connect(worker_addresses(args.uri), timeout=args.timeout) as remote:
        measured, info, endpoint = remote.ping(bandwidth=True), remote.info, remote.address.endpoint
    rows = [
        ("worker", endpoint),
        ("round trip", f"{measured.round_trip * 1e3:.1f} ms"),
        ("bandwidth", _bandwidth(measured)),
        *_offer(info),
        ("features", ", ".join(info.features)),
        ("software", info.software),
    ]
    for line in table([(name, one_line(value)) for name, value in rows]):
        out.line(line)
    return 0


def _ping_engine(args: argparse.Namespace, out: Output) -> int:
    """What stands at the address of an engine, and what would make it better for sllm."""
    from sllm.http_engine.probe import look
    from sllm.http_engine.transport import Call, EngineLink

    with ExitStack() as stack:
        vocab = None
        if args.vocab is not None:
            vocab = stack.enter_context(sllm.Model(args.vocab, vocab_only=True)).vocab
        link = stack.enter_context(EngineLink(args.uri, api_key=engine_key(), deadline=args.timeout))
        _, info = look(link, Call(RemoteStats()), vocab, "auto", args.engine_model)
        most = "any number" if info.max_logprobs is None else f"{info.max_logprobs} at most"
        rows = [
            ("engine", f"{info.api} {info.version}".rstrip()),
            ("address", link.endpoint),
            ("round trip", f"{info.round_trip * 1e3:.1f} ms"),
            ("model", info.model),
            ("context", "unknown" if info.n_ctx is None else f"{info.n_ctx} tokens"),
            ("log-probabilities", f"{most} of a position"),
            ("prompts at once", "many" if info.n_slots is None else str(info.n_slots)),
            ("vocabulary", info.tokenizer),
            ("prefix cache", _known(info.prefix_cache)),
            ("batch-invariant", _known(info.batch_invariant)),
            ("sllm's plugin", "yes" if info.selects else "no"),
        ]
    for line in table([(name, one_line(value)) for name, value in rows]):
        out.line(line)
    for advice in info.advice():
        out.line(advice)
    return 0


def _known(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "it does not say"}[value]


def _offer(info: WorkerInfo) -> list[tuple[str, str]]:
    """What a worker serves, texts or layers."""
    if info.layers is not None:
        has = info.layers
        which = "" if has.fixed else "any of "
        output = ", and the output" if has.output else ""
        return [
            ("model", info.model_name),
            ("layers", f"{which}{has.start} to {has.stop - 1} of {has.n_layer}, {has.n_embd} wide{output}"),
            ("context", f"{info.n_ctx} positions"),
            ("sequences at once", str(info.sessions)),
        ]
    return [
        ("model", f"{info.model_name}, {parameters(info.n_params)} parameters, {size(info.size_bytes)}"),
        ("context", f"{info.n_ctx} tokens, {info.max_prompt} of them the prompt's at most"),
        ("texts at once", str(info.sessions)),
        ("vocabulary", f"{info.n_vocab} tokens, {info.vocab_fingerprint}"),
    ]


def _bandwidth(measured: Ping) -> str:
    def shown(mbit_s: float | None) -> str:
        # Beyond this the time beyond the round trip is too short to mean something.
        return "over 1000" if mbit_s is None or mbit_s > 1000 else f"{mbit_s:.3g}"

    return f"{shown(measured.mbit_s_up)} Mbit/s up, {shown(measured.mbit_s_down)} Mbit/s down"

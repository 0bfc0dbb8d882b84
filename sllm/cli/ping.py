"""``sllm ping``: the link to a worker, measured, and what the worker offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.cli.addresses import worker_addresses
from sllm.cli.arguments import SECRET, add_worker
from sllm.cli.console import one_line, parameters, size, table
from sllm.remote.connection import connect

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.remote.connection import Ping, WorkerInfo

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = SECRET


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm ping``."""
    add_worker(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure the link to a worker and show what it offers."""
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

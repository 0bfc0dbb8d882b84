"""``sllm ping``: the links to workers or an engine, measured, and what these offer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sllm
from sllm.cli.addresses import all_addresses, engine_key
from sllm.cli.arguments import ENGINE_SECRET, MODEL, SECRET, add_engine_model, add_worker
from sllm.cli.console import CommandError, one_line, parameters, size, table
from sllm.errors import BusyError, RemoteError
from sllm.remote import ping
from sllm.remote.connection import connect
from sllm.targets.base import RemoteStats
from sllm.wire import auth
from sllm.wire.protocol import padded, pb

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.remote.connection import Ping, Remote, WorkerInfo

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"{SECRET} {ENGINE_SECRET}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm ping``."""
    also = ", or the http:// address of a serving engine, such as http://host:8000/v1"
    add_worker(parser, several=True, also=also)
    engine = parser.add_argument_group("serving engine")
    engine.add_argument(
        "--vocab",
        metavar="GGUF",
        help=f"compare its tokens with those of a model's: {MODEL} (default: do not)",
    )
    add_engine_model(engine)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure the links to workers, or to an engine, and show what they offer."""
    engines = [uri for uri in args.uri if uri.startswith(("http://", "https://"))]
    if engines:
        if len(args.uri) > 1:
            raise CommandError("an engine is asked alone: give one http:// address, or addresses of workers")
        return _ping_engine(engines[0], args, out)
    if args.vocab is not None or args.engine_model is not None:
        raise CommandError("--vocab and --engine-model are for the http:// address of an engine")
    uris = all_addresses(args.uri)
    if len(uris) > 1:
        return _compare(uris, args.timeout, out)
    with connect(uris, timeout=args.timeout) as remote:
        if not remote.fleet.is_one:  # a name that stands for several
            return _show(_measured(remote), [], out)
        measured, info, endpoint = remote.ping(bandwidth=True), remote.info, remote.address.endpoint
    rows = [
        ("worker", endpoint),
        ("round trip", _milliseconds(measured)),
        ("bandwidth", _bandwidth(measured)),
        *_offer(info),
        ("features", ", ".join(info.features)),
        ("software", info.software),
    ]
    for line in table([(name, one_line(value)) for name, value in rows]):
        out.line(line)
    return 0


# ---- several


def _compare(uris: list[str], timeout: float, out: Output) -> int:
    """Measure the links to several workers, each as if it were alone; 1 where they cannot be used as one."""
    addresses = [auth.Address.parse(uri) for uri in uris]  # all of them, before the first is asked
    found: list[_Found] = []
    failures: list[str] = []
    for address in addresses:
        try:
            with connect(address.uri, timeout=timeout) as remote:
                found += _measured(remote)
        except (RemoteError, BusyError) as error:  # noqa: PERF203 - the others are to be asked
            text = one_line(str(error))
            failures.append(text if address.endpoint in text else f"{address.endpoint}: {text}")
    return _show(found, failures, out)


def _measured(remote: Remote) -> list[_Found]:
    """The workers of a connection."""
    found = []
    for link in remote.fleet.links:
        measured = ping.measure(link, 5, bandwidth=True)
        status = link.call("Status", padded(pb.StatusRequest()), pb.StatusReply, link.timeout)
        found.append(_Found(link.endpoint, measured, status, link.info))
    return found


def _show(found: list[_Found], failures: list[str], out: Output) -> int:
    """Show several workers, and say what keeps them from being used as one; the exit status."""
    if found:
        shown: list[tuple[str, ...]] = [("worker", "round trip", "bandwidth", "places", "model")]
        shown += [
            (one.endpoint, _milliseconds(one.measured), _bandwidth(one.measured), one.places, one.model)
            for one in found
        ]
        for line in table([tuple(one_line(cell) for cell in row) for row in shown]):
            out.line(line)
    for failure in failures:
        out.note(f"sllm: {failure}")
    models = {(one.info.model_id, one.info.layers) for one in found}
    if len(models) > 1:
        out.note("sllm: these workers have different models, or layers: they cannot be used as one")
    instances = [one.info.instance for one in found if one.info.instance]
    if len(set(instances)) < len(instances):
        out.note("sllm: some of these addresses lead to the same worker, which counts once in a list")
    return 1 if failures or len(models) > 1 else 0


@dataclass(frozen=True)
class _Found:
    """A worker that has answered."""

    endpoint: str
    measured: Ping
    status: pb.StatusReply
    info: WorkerInfo

    @property
    def places(self) -> str:
        """How many are free."""
        if self.status.draining:
            return "shutting down"
        return f"{self.status.free if self.status.HasField('free') else '?'} of {self.info.sessions} free"

    @property
    def model(self) -> str:
        """Its name, and what of it is there."""
        has = self.info.layers
        return self.info.model_name + ("" if has is None else f", layers {has.start} to {has.stop - 1}")


# ---- an engine


def _ping_engine(url: str, args: argparse.Namespace, out: Output) -> int:
    """What stands at the address of an engine, and what would make it better for sllm."""
    from sllm.http_engine.probe import look
    from sllm.http_engine.transport import Call, EngineLink

    with ExitStack() as stack:
        vocab = None
        if args.vocab is not None:
            vocab = stack.enter_context(sllm.Model(args.vocab, vocab_only=True)).vocab
        link = stack.enter_context(EngineLink(url, api_key=engine_key(), deadline=args.timeout))
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


# ---- figures


def _milliseconds(measured: Ping) -> str:
    return f"{measured.round_trip * 1e3:.1f} ms"


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

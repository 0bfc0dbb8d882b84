"""``sllm status``: what a worker is doing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sllm.cli.addresses import worker_addresses
from sllm.cli.arguments import SECRET, add_json, add_worker
from sllm.cli.console import count, one_line, table
from sllm.errors import RemoteError
from sllm.remote.connection import connect
from sllm.remote.health import is_serving
from sllm.wire import auth

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.remote.connection import WorkerInfo
    from sllm.wire.protocol import pb

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    f"{SECRET} --health needs no secret: sllm://127.0.0.1:PORT will do, and its exit status is 0 where texts"
    " are taken, else 1: for probes and health checks."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm status``."""
    add_json(parser)
    parser.add_argument(
        "--health",
        action="store_true",
        help="only whether it takes texts: the exit status is 1 where it does not, or does not answer",
    )
    add_worker(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show what a worker is doing."""
    if args.health:
        return _health(worker_addresses(args.uri), args.timeout, out)
    with connect(worker_addresses(args.uri), timeout=args.timeout) as remote:
        found, info, endpoint = remote.status(), remote.info, remote.address.endpoint
    if args.json:
        out.line(json.dumps(_figures(found, info, endpoint), indent=2))
        return 0
    rows = [
        ("worker", endpoint),
        ("model", info.model_name),
        ("up for", _duration(found.uptime_s)),
        ("texts", f"{found.sessions} of {info.sessions} places, {found.queued} waiting{_places(found)}"),
        ("so far", f"{count(found.sessions_total, 'text')}, {found.refused} refused"),
        ("prompts", f"{count(found.prompt_tokens, 'token')}, {found.reused_tokens} of them still in memory"),
        ("tokens", f"{found.tokens} in {count(found.passes, 'pass', 'passes')}{_ratio(found)}"),
        ("drafted", f"{found.accepted} of {found.drafted} accepted{_share(found.accepted, found.drafted)}"),
        ("its own drafts", _own_drafts(found, info)),
        ("busy", f"{_duration(found.busy_s)}{_share(found.busy_s, found.uptime_s)}"),
        ("rows in a pass", _batches(list(found.batch_sizes))),
    ]
    for line in table([(name, one_line(value)) for name, value in rows]):
        out.line(line)
    if found.running:
        out.line()
        texts: list[tuple[str, ...]] = [("text", "prompt", "tokens", "passes", "accepted", "seconds")]
        for i, one in enumerate(found.running, 1):
            accepted = f"{one.n_accepted}/{one.n_drafted}"
            texts.append(
                (
                    str(i),
                    str(one.n_prompt),
                    str(one.n_tokens),
                    str(one.n_passes),
                    accepted,
                    f"{one.seconds:.1f}",
                )
            )
        for line in table(texts, right=range(6)):
            out.line(line)
    return 0


def _health(addresses: list[str], timeout: float, out: Output) -> int:
    """Say whether one of the workers takes texts; the exit status."""
    for address in [auth.Address.parse(one) for one in addresses]:
        try:
            serving = is_serving(address, timeout)
        except RemoteError as error:
            out.note(f"sllm: {one_line(error)}")
            continue
        out.line("serving" if serving else "not serving")
        if serving:
            return 0
    return 1


def _places(found: pb.StatusReply) -> str:
    """How many texts could begin at once, which others' texts, not shown, leave."""
    if found.draining:
        return "; it is being shut down"
    return f"; {found.free} could begin at once" if found.HasField("free") else ""


def _own_drafts(found: pb.StatusReply, info: WorkerInfo) -> str:
    """How many of the drafted tokens the worker has drafted itself."""
    if "worker-draft" not in info.features:
        return "none: it has no draft (sllm worker --draft, --mtp)"
    return (
        f"{found.own_accepted} of {found.own_drafted} accepted{_share(found.own_accepted, found.own_drafted)}"
    )


def _figures(found: pb.StatusReply, info: WorkerInfo, endpoint: str) -> dict[str, Any]:
    """The message as an object, with the names of ``sllm.proto``."""
    figures: dict[str, Any] = {"worker": endpoint, "model_name": info.model_name, "n_places": info.sessions}
    for field in found.DESCRIPTOR.fields:
        if field.name not in ("running", "padding", "batch_sizes"):
            figures[field.name] = getattr(found, field.name)
    figures["batch_sizes"] = list(found.batch_sizes)
    figures["running"] = [
        {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields} for one in found.running
    ]
    return figures


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _share(part: float, whole: float) -> str:
    return f" ({part / whole:.2f})" if whole else ""


def _ratio(found: pb.StatusReply) -> str:
    return f", {found.passes / found.tokens:.2f} per token" if found.tokens else ""


def _batches(sizes: list[int]) -> str:
    """How many passes had so many rows: 1: 40, 2: 3, 3-4: 20."""
    shown = []
    for i, n in enumerate(sizes):
        low, high = (1 << (i - 1)) + 1 if i else 1, 1 << i
        if n:
            shown.append(f"{low if low >= high else f'{low}-{high}'}: {n}")
    return ", ".join(shown) or "-"

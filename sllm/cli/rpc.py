"""The commands about ggml RPC: ``sllm rpc-server``, and ``--rpc`` of ``sllm run``."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli import remote as cli_remote
from sllm.cli.console import CommandError, count, size
from sllm.rpc import server as rpc

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from contextlib import ExitStack

    from sllm.cli.console import Output

__all__ = ["add_rpc_server", "local_target", "rpc_server"]


def add_rpc_server(parser: argparse.ArgumentParser) -> None:
    """The options of ``sllm rpc-server``."""
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add("--host", metavar="IPV4", default="127.0.0.1", help=f"where to listen {shown}")
    add("--port", metavar="N", type=int, default=rpc.DEFAULT_PORT, help=f"0: any that is free {shown}")
    add(
        "--allow-public",
        action="store_true",
        help="listen on an address that others can reach: they can use this machine, and more, unasked",
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        metavar="DIR",
        help="where uploaded weights are kept (default: rpc in $SLLM_CACHE, or in sllm in your cache folder)",
    )
    cache.add_argument("--no-cache", action="store_true", help="keep nothing")
    add(
        "--devices",
        metavar="NAME[,NAME]",
        help="what to serve, see sllm devices (default: the GPUs, or the CPU where there is none)",
    )
    add("--threads", metavar="N", type=int, help="CPU threads (default: all cores)")
    add("--until-eof", action="store_true", help="end when stdin does")


def rpc_server(args: argparse.Namespace, out: Output) -> int:
    """Serve this machine's devices until a signal comes."""
    names = None if args.devices is None else [name.strip() for name in args.devices.split(",")]
    cache = False if args.no_cache else args.cache or True
    with (
        rpc.RPCServer(
            args.host, args.port, cache, names, args.threads, allow_public=args.allow_public
        ) as server,
        cli_remote.signals(watch_stdin=args.until_eof) as received,
    ):
        out.line(server.endpoint)
        memory = ", ".join(size(free) for free, _ in server.memory) or "unknown"
        n_devices = count(len(server.memory), "device")
        out.note(f"sllm: serving {n_devices} to one client at a time; free: {memory}")
        if args.allow_public:
            out.note("sllm: warning: whoever reaches this port can use the server, without a password")
        while (number := received(1.0)) is None:
            if not server.alive:
                raise CommandError("the RPC server has ended by itself; did a client crash it?")
    return 128 + signal.SIGINT if number == signal.SIGINT else 0


def local_target(
    args: argparse.Namespace, name: Any, settings: Mapping[str, Any], stack: ExitStack
) -> sllm.LocalTarget:
    """A model that runs in a process of its own, with layers on the devices that ``--rpc`` names: HOST:PORT
    of a server, or the address of a worker that relays to one.
    """
    if args.rpc.startswith(("sllm://", "@")):
        cli_remote.quiet_grpc()
        remote = stack.enter_context(sllm.connect(cli_remote.addresses(args.rpc)))
        devices = remote.rpc_devices()
    else:
        devices = rpc.add_server(args.rpc)
    cli_remote.quiet_grpc()
    target = sllm.LocalTarget(
        name,
        devices=devices,
        n_gpu_layers=args.n_gpu_layers,
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        **settings,
    )
    return stack.enter_context(target)

"""``sllm rpc-server``: this machine's devices, served by ggml's RPC."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from sllm.cli.arguments import DEFAULT, number
from sllm.cli.console import CommandError, count, size
from sllm.cli.signals import INTERRUPTED, ending_signals
from sllm.rpc import server as rpc
from sllm.rpc.cache import DEFAULT_BYTES
from sllm.rpc.loopback import TELLS_USERS

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    "The line on stdout is HOST:PORT. For other machines use sllm worker --rpc, which relays to such a server"
    " over TLS with a token."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm rpc-server``."""
    add = parser.add_argument
    add("--host", metavar="IPV4", default="127.0.0.1", help=f"where to listen {DEFAULT}")
    add("--port", metavar="N", type=int, default=rpc.DEFAULT_PORT, help=f"0: any that is free {DEFAULT}")
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
        "--cache-size",
        metavar="GIB",
        type=number(above_zero=True),
        default=DEFAULT_BYTES >> 30,
        help=f"of all kept weights together; the least recently used go first {DEFAULT}",
    )
    add(
        "--devices",
        metavar="NAME[,NAME]",
        help="what to serve, see sllm devices (default: the GPUs, or the CPU where there is none)",
    )
    add("--threads", metavar="N", type=int, help="CPU threads (default: all cores)")
    add("--until-eof", action="store_true", help="end when stdin does")


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve this machine's devices until a signal comes."""
    names = None if args.devices is None else [name.strip() for name in args.devices.split(",")]
    cache = False if args.no_cache else args.cache or True
    with (
        rpc.RPCServer(
            args.host,
            args.port,
            cache,
            names,
            args.threads,
            allow_public=args.allow_public,
            cache_size=max(1, int(args.cache_size * (1 << 30))),
        ) as server,
        ending_signals(watch_stdin=args.until_eof) as received,
    ):
        out.line(server.endpoint)
        memory = ", ".join(size(free) for free, _ in server.memory) or "unknown"
        n_devices = count(len(server.memory), "device")
        out.note(f"sllm: serving {n_devices} to one client at a time; free: {memory}")
        out.note(f"sllm: the process that serves is {server.confinement}")
        if not TELLS_USERS and not args.allow_public:
            out.note(
                "sllm: warning: this system does not tell whose a connection is: every user of this machine"
                " can use the server"
            )
        if args.allow_public:
            out.note("sllm: warning: whoever reaches this port can use the server, without a password")
        while (number := received(1.0)) is None:
            if not server.alive:
                raise CommandError("the RPC server has ended by itself; did a client crash it?")
    return INTERRUPTED if number == signal.SIGINT else 0

"""``sllm worker``: a model served to clients over the network."""

from __future__ import annotations

import argparse
import signal
import socket
import ssl
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sllm
from sllm import embedded, hosts
from sllm.cli.allocator import bound_arenas
from sllm.cli.arguments import (
    DEFAULT,
    MODEL,
    REMOTE_VARIABLE,
    add_gpu_layers,
    add_threads,
    device_names,
    endpoint,
    layer_range,
    number,
    whole,
)
from sllm.cli.console import CommandError, count, one_line
from sllm.cli.open_files import raise_file_limit
from sllm.cli.signals import INTERRUPTED, ending_signals
from sllm.cli.systemd import Notifier
from sllm.cli.worker_token import tokens_path
from sllm.engine import exact, hub
from sllm.engine.devices import devices, server_of
from sllm.folders import read_private
from sllm.rpc import server as rpc
from sllm.rpc.cache import DEFAULT_BYTES
from sllm.wire import auth
from sllm.wire.tokens import load_or_make_token
from sllm.worker.isolated import IsolatedWorker
from sllm.worker.server import Limits, Monitoring, Worker
from sllm.worker.token_file import FILE_NAME
from sllm.worker.watch import HUNG, HardStop

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    "The one line on stdout, sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT, is what a client needs, and a secret."
    " SIGTERM and Ctrl-C give the running texts some time to end, and hand back those that have not ended:"
    " their clients go on elsewhere, or when the worker is back. What has not ended 10 s after that is ended"
    f" hard, with exit status {HUNG}, as is a worker whose pass hangs (--pass-grace)."
)

_ALL_INTERFACES = ("0.0.0.0", "::")

_CLOSING_SECONDS = 10.0
"""How long the worker may take to close when its texts have ended or were handed back."""

_GRACE_SECONDS = 30.0
"""How long a pass that hangs may go on, unless the user says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm worker``."""
    add = parser.add_argument
    add("model", metavar="GGUF", nargs="?", help=f"{MODEL} (default: the package's own small model)")
    add("--draft", metavar="GGUF", help=f"{MODEL}: the worker drafts, too, where a client has no better hint")
    add(
        "--mtp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draft with the model's own heads for multi-token prediction where a client has no better hint"
        " (default: without --draft, where the model has some)",
    )
    add(
        "--layers",
        metavar="START:STOP",
        nargs="?",
        const=True,
        default=False,
        type=layer_range,
        help="serve these layers of the model, and no texts (sllm run --head); without a range: those that"
        " clients ask for. Of a file of some layers (sllm split), they must be in it",
    )
    add(
        "--rpc",
        action="store_true",
        help="keep an RPC server, too, that no port leads to, for clients that run a model themselves and"
        " want this machine's devices for it; whoever has the token can use it",
    )
    add(
        "--rpc-cache-size",
        metavar="GIB",
        type=number(above_zero=True),
        default=DEFAULT_BYTES >> 30,
        help=f"with --rpc: of all kept weights together; the least recently used go first {DEFAULT}",
    )
    _add_network(parser)
    _add_limits(parser)
    _add_watching(parser)
    machine = parser.add_argument_group("machine")
    add_threads(machine, models=2)
    add_gpu_layers(machine, of=" of the model", draft=True)
    machine.add_argument(
        "--devices",
        metavar="NAME[,NAME]",
        type=device_names,
        help="where the model's layers go: devices of this machine (sllm devices), and rpc://HOST:PORT for"
        " all of an RPC server (sllm rpc-server), in a network of your own: its protocol has neither"
        " encryption nor a password. Where such a server is lost, clients wait until it is back",
    )
    machine.add_argument(
        "--n-rollback",
        metavar="N",
        type=whole(0),
        help="of a hybrid model: drafted tokens of a text that are checked at once; each holds one more"
        " state of every text (sllm inspect says how large). 0: states are computed again instead"
        " (default: 8 for one text, 4 for more)",
    )
    machine.add_argument(
        "--exact",
        action="store_true",
        help="flash attention and a q8_0 KV cache: half the memory, and on a CPU with q8_0 or q4_0 weights a"
        " text is to the last bit what it is without drafts and neighbours",
    )
    # For the demo and benchmarks: a stand-in for a larger model, and a worker that ends with its parent.
    seconds = number(above_zero=False)
    add("--pass-seconds", type=seconds, default=0.0, metavar="SECONDS", help=argparse.SUPPRESS)
    add("--until-eof", action="store_true", help=argparse.SUPPRESS)


def _add_network(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network")
    network.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=f"127.0.0.1:{hosts.DEFAULT_PORT}",
        help="0.0.0.0:PORT: every interface; port 0: any that is free (default: %(default)s)",
    )
    network.add_argument(
        "--public",
        metavar="HOST[:PORT]",
        help="where clients find the worker, for the printed line (a tunnel's end; default: --listen, or this"
        " machine's name)",
    )
    network.add_argument(
        "--token-file",
        metavar="FILE",
        help="holds the token that clients must know; not open to others (chmod 600); made if it does not"
        " exist (default: one in --state)",
    )
    network.add_argument(
        "--tokens",
        metavar="FILE",
        help="further tokens, with names and limits, which `sllm worker token` writes; the file is watched"
        f" (default: {FILE_NAME} in --state)",
    )
    network.add_argument(
        "--cert",
        metavar="FILE",
        help="a certificate chain, PEM; taken anew when it is renewed (default: one of our own)",
    )
    network.add_argument("--key", metavar="FILE", help="its key, PEM; not open to others (chmod 600)")
    network.add_argument(
        "--state",
        metavar="DIR",
        help="where token and certificate are kept (default: $SLLM_STATE, or sllm in your state folder)",
    )
    network.add_argument(
        "--hops",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="with --layers: another worker that this one may bring its hidden states to where a client names"
        " it: HOST, HOST:PORT, NETWORK/BITS or NETWORK/BITS:PORT; several times for several. *: any but this"
        " machine's (default: none, and clients carry them)",
    )
    network.add_argument("--insecure", action="store_true", help="no TLS, no token; loopback only")
    network.add_argument(
        "--no-print-line",
        action="store_true",
        help="keep the sllm:// line, which holds the token, off stdout (it may end in a log)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    sessions, queue = Limits.sessions, Limits.queue
    limits.add_argument(
        "--sessions", metavar="N", type=whole(1), default=sessions, help=f"texts at once {DEFAULT}"
    )
    limits.add_argument(
        "--queue", metavar="N", type=whole(0), default=queue, help=f"texts that may wait {DEFAULT}"
    )
    seconds = number(above_zero=True)
    limits.add_argument(
        "--queue-seconds",
        metavar="SECONDS",
        type=seconds,
        default=Limits.queue_seconds,
        help=f"how long a text waits for a place before it is refused {DEFAULT}",
    )
    limits.add_argument(
        "--idle-seconds",
        metavar="SECONDS",
        type=seconds,
        default=Limits.idle_seconds,
        help="how long a text keeps its place while its client asks for nothing or reads nothing; altogether,"
        f" where others wait for one {DEFAULT}",
    )
    limits.add_argument(
        "--n-ctx",
        metavar="N",
        type=whole(1),
        help="positions of a text (default: the model's, up to 4096)",
    )
    limits.add_argument("--max-prompt", metavar="N", type=whole(1), help="tokens (default: --n-ctx)")
    limits.add_argument(
        "--max-connections",
        metavar="N",
        type=whole(1),
        default=Limits.connections,
        help=f"of clients that have shown the token {DEFAULT}; besides, {Limits.strangers} of others, which"
        " are closed within seconds",
    )
    limits.add_argument(
        "--no-grammars", action="store_true", help="accept no grammars and JSON Schemas from clients"
    )
    limits.add_argument(
        "--drain",
        metavar="SECONDS",
        type=number(above_zero=False),
        default=10.0,
        help="how long texts may go on after SIGTERM or Ctrl-C (default: 10)",
    )


def _add_watching(parser: argparse.ArgumentParser) -> None:
    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=endpoint,
        help="figures for Prometheus, at http://HOST:PORT/metrics, and /health and /live for probes: neither"
        " TLS nor a token, so a loopback address or one of a network of your own (needs sllm[metrics])",
    )
    watching.add_argument(
        "--access-log",
        metavar="FILE",
        help="a line of JSON for each call: who, how much, how it ended; no text and no tokens. -: stderr",
    )
    watching.add_argument(
        "--pass-limit",
        metavar="SECONDS",
        type=number(above_zero=True),
        help="a pass that takes longer counts as hung: the worker is not healthy until it ends (default: by"
        " the model's size, then by what passes take; a minute at least)",
    )
    watching.add_argument(
        "--pass-grace",
        metavar="SECONDS",
        type=number(above_zero=False),
        default=_GRACE_SECONDS,
        help="a pass that hangs for so much longer ends the process (default: 30)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve a model until a signal comes."""
    raise_file_limit()
    bound_arenas()
    host, port = hosts.split_host_port(args.listen)
    _check_address(host, port, args)
    certificate = _checked_certificate(args.cert, args.key)
    token = None if args.token_file is None else load_or_make_token(Path(args.token_file))
    if args.layers is not False and args.draft is not None:
        raise CommandError("--draft is for texts, and --layers serves none; leave one of them out")
    if args.hops and args.layers is False:
        raise CommandError("--hops is for layers: give --layers, too, or leave it out")
    if args.mtp and (args.draft is not None or args.layers is not False):
        other = "--layers serves no texts" if args.draft is None else "--draft is another draft"
        raise CommandError(f"--mtp drafts for texts, and {other}; leave one of them out")
    if args.devices is not None and (args.layers is not False or args.rpc):
        other = "--layers" if args.layers is not False else "--rpc"
        raise CommandError(f"--devices is for a whole model that this worker computes; leave {other} out")
    name = embedded.TARGET if args.model is None else args.model
    with HardStop() as hard_stop, ExitStack() as stack:
        network = {"host": host, "port": port, "certificate": certificate, "token": token}
        network["tokens"] = None if args.insecure else tokens_path(args.tokens, args.state)
        serving = _open(args, name, network, out, stack)
        manager = Notifier()
        with ending_signals(watch_stdin=args.until_eof) as received:
            if not args.no_print_line:
                out.line(_public(serving.address, host, args.public).uri)
            _introduce(serving, Path(name).name, args, out)
            manager.tell("READY=1")
            signal_number = _serve(serving, args, received, manager, out, hard_stop)
            manager.tell("STOPPING=1")
            _end(serving, args.drain, received, out, hard_stop)
    return INTERRUPTED if signal_number == signal.SIGINT else 0


def _serve(
    serving: Worker | IsolatedWorker,
    args: argparse.Namespace,
    received: Callable[[float], int | None],
    manager: Notifier,
    out: Output,
    hard_stop: HardStop,
) -> int:
    """Wait for a signal, and meanwhile tell who is to know how the worker is; the signal."""
    host = hosts.split_host_port(args.listen)[0]
    address = serving.address
    period = 1.0 if manager.interval is None else min(1.0, manager.interval / 3)
    while (signal_number := received(period)) is None:
        if serving.failed:
            hard_stop.arm(_CLOSING_SECONDS)
            raise CommandError(f"{_why_failed(serving)}; the worker ends")
        if not serving.hung:
            manager.tell("WATCHDOG=1")
        if serving.address != address:
            address = serving.address
            out.note("sllm: the certificate was renewed, and clients that know the old one need the new line")
            out.line(_public(address, host, args.public).uri)
    return signal_number


def _why_failed(serving: Worker | IsolatedWorker) -> str:
    if isinstance(serving, IsolatedWorker):
        return f"the process with the model has ended again and again: {serving.away}"
    return "three passes in a row have failed"


def _devices(wanted: list[str]) -> list[str]:
    """The names by which models take devices; those of RPC servers are asked for."""
    ours = {device.name.casefold(): device.name for device in devices()}
    found = []
    for name in wanted:
        scheme, _, server = name.rpartition("rpc://")
        if name.startswith("rpc://"):
            found += [device.name for device in rpc.add_server(server)]
        elif not scheme and name.casefold() in ours:
            found.append(ours[name.casefold()])
        else:
            raise CommandError(
                f"there is no device {name!r}; there are {', '.join(ours.values())}, and rpc://HOST:PORT"
            )
    return found


def _open(
    args: argparse.Namespace,
    name: str | os.PathLike[str],
    network: Mapping[str, Any],
    out: Output,
    stack: ExitStack,
) -> Worker | IsolatedWorker:
    """Load the models and start the worker."""
    wanted = None if args.devices is None else _devices(args.devices)
    limits = Limits(
        sessions=args.sessions,
        queue=args.queue,
        queue_seconds=args.queue_seconds,
        idle_seconds=args.idle_seconds,
        max_prompt=args.max_prompt,
        connections=args.max_connections,
        hops=tuple(args.hops),
        max_grammar=0 if args.no_grammars else Limits.max_grammar,
    )
    monitoring = Monitoring(
        pass_limit=args.pass_limit,
        pass_grace=args.pass_grace,
        metrics=args.metrics,
        access_log=args.access_log,
    )
    options = {
        "mtp": args.mtp,
        "state": args.state,
        "insecure": args.insecure,
        "limits": limits,
        "n_ctx": args.n_ctx,
        "n_rollback": args.n_rollback,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "draft_threads": args.threads,
        "monitoring": monitoring,
        "pass_seconds": args.pass_seconds,
        **network,
        **(exact.SETTINGS if args.exact or args.model is None else {}),
    }
    serving: Worker | IsolatedWorker
    if wanted is not None and any(map(server_of, wanted)):
        serving = IsolatedWorker(name, wanted, n_gpu_layers=args.n_gpu_layers, draft=args.draft, **options)
        offloaded = True
    else:
        model, draft = _loaded(args, name, wanted, stack)
        serving = Worker(
            model,
            layers=args.layers,
            n_gpu_layers=args.n_gpu_layers,
            draft=draft,
            rpc=args.rpc,
            rpc_cache_size=max(1, int(args.rpc_cache_size * (1 << 30))),
            **options,
        )
        offloaded = isinstance(model, sllm.Model) and model.offloaded
    stack.enter_context(serving)
    if args.exact:
        for obstacle in exact.obstacles(hub.resolve(name), offloaded=offloaded):
            out.note(f"--exact: texts may depend on drafts and neighbours: {obstacle}")
    return serving


def _loaded(
    args: argparse.Namespace, name: str | os.PathLike[str], wanted: list[str] | None, stack: ExitStack
) -> tuple[sllm.Model | str | os.PathLike[str], sllm.Model | None]:
    """The model and its draft in this process; of a model by layers the path."""
    model: sllm.Model | str | os.PathLike[str] = name
    if args.layers is False:
        load_mtp = args.mtp is not False and args.draft is None
        loading = {"n_gpu_layers": args.n_gpu_layers, "devices": wanted, "load_mtp": load_mtp}
        model = stack.enter_context(sllm.Model(name, **loading))
    draft = None
    if args.draft is not None:
        on_cpu = 0 if args.n_gpu_layers == 0 else None
        draft = stack.enter_context(sllm.Model(args.draft, n_gpu_layers=on_cpu))
    return model, draft


def _check_address(host: str, port: int, args: argparse.Namespace) -> None:
    """Find out what is wrong with an address before a large model is loaded for it."""
    public = host if args.public is None else hosts.split_host_port(args.public)[0]
    if args.public is not None and public in _ALL_INTERFACES:
        raise CommandError("--public names no host, expected the one that clients are to connect to")
    if args.insecure:
        if not (hosts.is_loopback(host) and hosts.is_loopback(public)):
            where = host if not hosts.is_loopback(host) else public
            raise CommandError(f"--insecure is for loopback alone, and {where} is not; leave it out")
        if any(given is not None for given in (args.token_file, args.tokens, args.cert)):
            raise CommandError("--insecure means neither a token nor a certificate; leave it out")
    endpoint = hosts.host_port(host, port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)  # bind() alone succeeds beside a listener that allows it
    except OSError as error:
        raise CommandError(f"cannot listen on {endpoint}: {error.strerror or error}") from error


def _checked_certificate(cert: str | None, key: str | None) -> tuple[str, str] | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise CommandError("--cert and --key belong together; one of them is missing")
    # Their errors name the file; that of ssl does not.
    Path(cert).read_bytes()
    read_private(Path(key))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CommandError(f"{key} is not the key of {cert}") from error
        raise CommandError(
            f"{cert} and {key} are not a certificate and its key in PEM form, without a passphrase"
        ) from error
    return cert, key


def _public(address: auth.Address, host: str, public: str | None) -> auth.Address:
    """The address to print, by which clients find the worker."""
    if public is not None:
        name, port = hosts.split_host_port(public, address.port)
        return replace(address, host=name, port=port)
    return replace(address, host=socket.gethostname()) if host in _ALL_INTERFACES else address


def _introduce(serving: Worker | IsolatedWorker, name: str, args: argparse.Namespace, out: Output) -> None:
    """Say what is served, and what the line on stdout is for."""
    layers: bool | tuple[int, int] = args.layers
    texts = count(args.sessions, "text" if layers is False else "sequence") + " at once"
    what = one_line(name)
    if layers is not False:
        what = f"layers{'' if layers is True else f' {layers[0]} to {layers[1] - 1}'} of {what}"
    out.note(f"sllm: serving {what} on {serving.address.endpoint}, {texts}")
    if serving.rpc_confinement is not None:
        out.note(f"sllm: the process that serves RPC is {serving.rpc_confinement}")
    if args.insecure:
        out.note(
            "sllm: warning: --insecure: no TLS and no token; every program on this machine can use the"
            " worker and read what its clients write"
        )
    elif args.no_print_line:
        out.note(
            "sllm: the sllm:// line is not printed; one for a client is what"
            " `sllm worker token add NAME --public HOST:PORT` prints"
        )
    else:
        out.note(
            "sllm: the sllm:// line on stdout is for the client, and a secret: whoever has it can use this"
            " worker"
        )
    if serving.metrics_address is not None:
        name, port = serving.metrics_address
        out.note(f"sllm: figures for Prometheus: http://{hosts.host_port(name, port)}/metrics")
        if not hosts.is_loopback(name):
            out.note("sllm: warning: whoever reaches that address can read them: there is no token")
    there = "sllm run --chat 'Hello!' --remote"
    if layers is not False:
        there = "sllm run 'Hello!' --target GGUF --head N --tail N --remote"
    out.note(f"sllm: on the client: export {REMOTE_VARIABLE}='the line'; sllm ping; {there}")


def _end(
    serving: Worker | IsolatedWorker,
    seconds: float,
    received: Callable[[float], int | None],
    out: Output,
    hard_stop: HardStop,
) -> None:
    """Give the running texts some seconds to end; the others go on elsewhere, or later."""
    until = time.monotonic() + seconds
    hard_stop.arm(seconds + _CLOSING_SECONDS)
    if seconds > 0 and not serving.drain(0, notice=seconds):
        out.note(f"sllm: ending; texts have {seconds:g} s to end (a second signal: none)")
        while (left := until - time.monotonic()) > 0 and not serving.drain(0, notice=left):
            if received(min(0.05, left)) is not None:
                break
    ended = serving.drain(0)
    hard_stop.arm(_CLOSING_SECONDS)
    serving.close()
    if not ended:
        out.note("sllm: handed back the texts that were not at their end")

"""``sllm serve``: any target, with a draft, or tiers, for programs that speak OpenAI's API."""

from __future__ import annotations

import os
import secrets
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import sllm
from sllm import hosts
from sllm.cli.arguments import DEFAULT, ENGINE_SECRET, MODEL, SECRET, number, whole
from sllm.cli.ask_arguments import add_triage, check_tiers
from sllm.cli.ask_models import open_hybrid
from sllm.cli.console import CommandError, count
from sllm.cli.run_arguments import add_models, add_places, add_sampling, sampling_of
from sllm.cli.run_models import open_models
from sllm.cli.signals import INTERRUPTED, ending_signals
from sllm.extras import needs
from sllm.wire.tokens import load_or_make_token

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from sllm.cli.console import Output
    from sllm.openai_server.server import OpenAIServer

__all__ = ["EPILOG", "add_arguments", "run"]

KEY_VARIABLE = "SLLM_API_KEY"

EPILOG = (
    "Stdout gets one line, the base URL for clients, and with --generate-key a second one, the key. SIGTERM"
    f" and Ctrl-C give the texts that are being written some time to end. {SECRET} {ENGINE_SECRET}"
)

_DEFAULT_PORT = 8080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm serve``."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=f"{MODEL} (default: the package's own small model)")
    add("--name", metavar="NAME", help="what clients call the model (default: its file's name)")
    _add_access(parser)
    _add_limits(parser)
    add_models(parser)
    add_sampling(parser)
    add_places(parser)
    tiers = parser.add_argument_group("tiers (MODEL is the one that answers tier 2)")
    tiers.add_argument(
        "--ask",
        action="store_true",
        help="answer each request by the model that suits it, here or in a cloud (--remote, --engine or"
        " --cloud-url), as sllm ask does; at temperature 0 unless another one is named",
    )
    add_triage(tiers, tiers)
    parser.set_defaults(temperature=None, seed=None, stop=[], var=[], no_thinking=False)


def _add_access(parser: argparse.ArgumentParser) -> None:
    access = parser.add_argument_group("access")
    access.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=f"127.0.0.1:{_DEFAULT_PORT}",
        help="an address that is not loopback needs a key; there is no TLS here, so put what does that in"
        " front; port 0: any that is free (default: %(default)s)",
    )
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="holds the key that clients have to show; not open to others (chmod 600); made if it does not"
        f" exist (default: what ${KEY_VARIABLE} holds; on loopback none)",
    )
    access.add_argument(
        "--generate-key", action="store_true", help="make a key for this run, and print it on stdout"
    )
    access.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name besides localhost by which clients may ask for this, such as that of a proxy in front;"
        " may be repeated (default: on loopback none, and elsewhere any)",
    )
    access.add_argument(
        "--cors-origin",
        metavar="URL",
        action="append",
        default=[],
        help="let web pages from there ask, such as https://app.example; *: from anywhere, which needs a key;"
        " may be repeated (default: no web page)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--texts",
        metavar="N",
        type=whole(1),
        default=1,
        help=f"written at once, where workers or an engine compute; a model here writes one {DEFAULT}",
    )
    limits.add_argument(
        "--queue", metavar="N", type=whole(0), default=16, help=f"requests that may wait {DEFAULT}"
    )
    seconds = number(above_zero=True)
    limits.add_argument(
        "--queue-seconds",
        metavar="SECONDS",
        type=seconds,
        default=60.0,
        help=f"how long a request waits before it is refused {DEFAULT}",
    )
    limits.add_argument(
        "--text-seconds",
        metavar="SECONDS",
        type=seconds,
        default=3600.0,
        help=f"how long a request may take {DEFAULT}",
    )
    limits.add_argument(
        "-n", "--max-tokens", metavar="N", type=whole(1), help="of a text, whatever a request asks for"
    )
    limits.add_argument(
        "--drain",
        metavar="SECONDS",
        type=number(above_zero=False),
        default=10.0,
        help=f"how long texts may go on after SIGTERM or Ctrl-C {DEFAULT}",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until a signal comes."""
    with needs("serve"):
        import uvicorn as _uvicorn  # noqa: F401 - missing packages are told of before a model is loaded
    if args.model is not None and args.target is not None:
        raise CommandError(f"{args.model} and --target name two models; leave one out")
    args.target = args.model if args.target is None else args.target
    check_tiers(args)
    if args.on_loss == "local":
        raise CommandError("--on-loss local may take text back, and what was sent to a client cannot be")
    host, port = hosts.split_host_port(args.listen, _DEFAULT_PORT)
    key = _key(args)
    _check_access(host, key, args)
    with ExitStack() as stack:
        server = _open(args, host, port, key, out, stack)
        with ending_signals(watch_stdin=False) as received:
            out.line(server.url)
            if args.generate_key:
                out.line(key or "")
            _introduce(server, host, key, args, out)
            while (ended_by := received(1.0)) is None:
                if not server.running:
                    raise CommandError("the server has ended by itself; SLLM_DEBUG=1 shows more")
            _end(server, args.drain, received, out)
    return INTERRUPTED if ended_by == signal.SIGINT else 0


def _key(args: argparse.Namespace) -> str | None:
    """The key that clients have to show."""
    if args.generate_key:
        if args.api_key_file is not None:
            raise CommandError("--generate-key and --api-key-file exclude each other")
        return secrets.token_urlsafe(24)
    if args.api_key_file is not None:
        return load_or_make_token(Path(args.api_key_file))
    return os.environ.get(KEY_VARIABLE) or None


def _check_access(host: str, key: str | None, args: argparse.Namespace) -> None:
    """Refuse an address that is open to others, before a model is loaded."""
    from sllm.openai_server.server import check_access

    try:
        check_access(host, key, args.cors_origin)
    except ValueError as error:
        how = f" (--api-key-file FILE, --generate-key or ${KEY_VARIABLE})"
        raise CommandError(f"{error}{how}") from None


def _open(
    args: argparse.Namespace, host: str, port: int, key: str | None, out: Output, stack: ExitStack
) -> OpenAIServer:
    """The models, and the server over them."""
    from sllm.openai_server.server import OpenAIServer, ServeLimits

    seed, args.seed = args.seed, 0  # that of the sampling parameters is each request's own
    if args.temperature is None:
        args.temperature = 0.0 if args.ask else sllm.SamplingParams().temperature
    sampling = sampling_of(args)
    target: sllm.Model | sllm.Target | sllm.Hybrid
    draft: sllm.Model | str | None = None
    if args.ask:
        target, model, _ = open_hybrid(args, sampling, out, stack)
        name = args.name or model.path.stem
    else:
        model, target, draft = open_models(args, sampling, stack)
        name = args.name or (model.path.stem if isinstance(target, sllm.SplitTarget) else None)
    return stack.enter_context(
        OpenAIServer(
            target,
            draft=draft,
            name=name,
            host=host,
            port=port,
            api_key=key,
            sampling=sampling,
            seed=seed,
            texts=args.texts,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            limits=ServeLimits(
                queue=args.queue,
                queue_seconds=args.queue_seconds,
                text_seconds=args.text_seconds,
                max_tokens=args.max_tokens,
            ),
            allowed_hosts=args.allowed_host,
            cors_origins=args.cors_origin,
        )
    )


def _introduce(
    server: OpenAIServer, host: str, key: str | None, args: argparse.Namespace, out: Output
) -> None:
    """Say what is served, and to whom."""
    texts = count(args.texts, "text")
    out.note(f"sllm: serving {server.name!r}, {texts} at once; what is supported: docs/guides/serve.md")
    if not hosts.is_loopback(host):
        out.note("sllm: warning: there is no TLS here: whoever is on the way can read texts and the key")
    elif key is None:
        out.note("sllm: there is no key: every program of this machine can use it, and no web page")


def _end(server: OpenAIServer, seconds: float, received: Callable[[float], int | None], out: Output) -> None:
    """Give the texts some seconds to end; a second signal: none."""
    until = time.monotonic() + seconds
    if not server.drain(0.2) and seconds > 0:
        out.note(f"sllm: ending; texts have {seconds:g} s to end (a second signal: none)")
        while time.monotonic() < until and not server.drain(0.05):
            if received(0.0) is not None:
                break
    server.close()

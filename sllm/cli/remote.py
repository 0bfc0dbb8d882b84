"""The commands about workers: ``sllm worker``, ``sllm status``, ``sllm ping``."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import ssl
import stat
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sllm
from sllm import embedded, hosts
from sllm.cli.console import CommandError, count, one_line, parameters, size, table
from sllm.engine import exact, hub
from sllm.remote.connection import connect
from sllm.wire import auth
from sllm.worker.passes import Limits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from sllm.cli.console import Output
    from sllm.remote.connection import Ping, WorkerInfo
    from sllm.wire.protocol import pb
    from sllm.worker.server import Worker

__all__ = ["VARIABLE", "addresses", "ping", "quiet_grpc", "signals", "status", "worker"]

VARIABLE = "SLLM_REMOTE"
"""The environment variable that holds a worker's address: other users of the machine do not see it."""

_INTERRUPTED = 128 + signal.SIGINT

_EVERYWHERE = ("0.0.0.0", "::")


def quiet_grpc() -> None:
    """Keep gRPC's core from writing to stderr: what matters of it comes back as an exception."""
    if not os.environ.get("SLLM_DEBUG"):
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def addresses(given: str | None) -> list[str]:
    """The addresses that ``URI``, ``@FILE`` or nothing on the command line stand for.

    Raises:
        CommandError: none; the message repeats nothing that may be a token.

    """
    text = given or os.environ.get(VARIABLE, "")
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            lines = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            lines = []
        if not any(line.startswith("sllm://") for line in lines):
            raise CommandError(f"{path} does not hold the sllm:// line that a worker printed")
        return [line for line in lines if line.startswith("sllm://")]
    if not text:
        raise CommandError(
            f"there is no address of a worker: name its sllm:// line, @FILE with it, or set {VARIABLE}"
        )
    if not text.startswith("sllm://"):
        raise CommandError(
            "the address of a worker begins with sllm:// (the line that it printed) or @ (a file with it);"
            f" to use what {VARIABLE} holds, leave it out, and write --remote behind the prompt"
        )
    return [text]


# ---- sllm worker


def worker(args: argparse.Namespace, out: Output) -> int:
    """Serve a model until a signal comes."""
    quiet_grpc()
    host, port = hosts.split_host_port(args.listen)
    _check_address(host, port, args)
    certificate = _checked_certificate(args.cert, args.key)
    token = None if args.token_file is None else _token(Path(args.token_file), out)
    limits = Limits(
        sessions=args.sessions,
        queue=args.queue,
        max_prompt=args.max_prompt,
        max_grammar=0 if args.no_grammars else Limits.max_grammar,
    )
    layers = args.layers
    if layers is not False and args.draft is not None:
        raise CommandError("--draft is for texts, and --layers serves none; leave one of them out")
    with ExitStack() as stack:
        name = embedded.TARGET if args.model is None else args.model
        model: sllm.Model | str | os.PathLike[str] = name
        if layers is False:
            model = stack.enter_context(sllm.Model(name, n_gpu_layers=args.n_gpu_layers))
        draft = None
        if args.draft is not None:
            on_cpu = 0 if args.n_gpu_layers == 0 else None
            draft = stack.enter_context(sllm.Model(args.draft, n_gpu_layers=on_cpu))
        serving = stack.enter_context(
            sllm.Worker(
                model,
                layers=layers,
                n_gpu_layers=args.n_gpu_layers,
                draft=draft,
                host=host,
                port=port,
                token=token,
                certificate=certificate,
                state=args.state,
                insecure=args.insecure,
                limits=limits,
                n_ctx=args.n_ctx,
                n_threads=args.threads,
                n_threads_batch=args.threads,
                draft_threads=args.threads,
                rpc=args.rpc,
                pass_seconds=args.pass_seconds,
                **(exact.SETTINGS if args.exact or args.model is None else {}),
            )
        )
        if args.exact:
            offloaded = isinstance(model, sllm.Model) and model.offloaded
            for obstacle in exact.obstacles(hub.resolve(name), offloaded=offloaded):
                out.note(f"--exact: texts may depend on drafts and neighbours: {obstacle}")
        with signals(watch_stdin=args.until_eof) as received:
            out.line(_public(serving.address, host, args.public).uri)
            _introduce(serving, Path(name).name, layers, args, out)
            while (number := received(1.0)) is None:
                if serving.failed:
                    raise CommandError("three passes in a row have failed; the worker ends")
            _end(serving, args.drain, received, out)
    return _INTERRUPTED if number == signal.SIGINT else 0


def _check_address(host: str, port: int, args: argparse.Namespace) -> None:
    """Find out what is wrong with an address before a large model is loaded for it."""
    public = host if args.public is None else hosts.split_host_port(args.public)[0]
    if args.public is not None and public in _EVERYWHERE:
        raise CommandError("--public names no host, expected the one that clients are to connect to")
    if args.insecure:
        if not (hosts.is_loopback(host) and hosts.is_loopback(public)):
            where = host if not hosts.is_loopback(host) else public
            raise CommandError(f"--insecure is for loopback alone, and {where} is not; leave it out")
        if args.token_file is not None or args.cert is not None:
            raise CommandError("--insecure means neither a token nor a certificate; leave it out")
    endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
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
    for name in (cert, key):
        Path(name).read_bytes()  # its error names the file; that of ssl does not
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CommandError(f"{key} is not the key of {cert}") from error
        raise CommandError(
            f"{cert} and {key} are not a certificate and its key in PEM form, without a passphrase"
        ) from error
    return cert, key


def _token(path: Path, out: Output) -> str:
    token = auth.load_or_make_token(path)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        out.note(f"sllm: warning: others on this machine may read the token in {path}; see chmod 600")
    return token


def _public(address: auth.Address, host: str, public: str | None) -> auth.Address:
    """The address as clients are to be told it."""
    if public is not None:
        name, port = hosts.split_host_port(public, address.port)
        return replace(address, host=name, port=port)
    return replace(address, host=socket.gethostname()) if host in _EVERYWHERE else address


def _introduce(
    serving: Worker, name: str, layers: bool | tuple[int, int], args: argparse.Namespace, out: Output
) -> None:
    """Say what there is now, and what the line on stdout is for."""
    texts = count(args.sessions, "text" if layers is False else "sequence") + " at once"
    what = one_line(name)
    if layers is not False:
        what = f"layers{'' if layers is True else f' {layers[0]} to {layers[1] - 1}'} of {what}"
    out.note(f"sllm: serving {what} on {serving.address.endpoint}, {texts}")
    if args.insecure:
        out.note(
            "sllm: warning: --insecure: no TLS and no token; every program on this machine can use the"
            " worker and read what its clients write"
        )
    else:
        out.note(
            "sllm: the sllm:// line on stdout is for the client, and a secret: whoever has it can use this"
            " worker"
        )
    there = "sllm run --chat 'Hello!' --remote"
    if layers is not False:
        there = "sllm run 'Hello!' --target GGUF --head N --tail N --remote"
    out.note(f"sllm: there: export {VARIABLE}='the line'; sllm ping; {there}")


def _end(serving: Worker, seconds: float, received: Callable[[float], int | None], out: Output) -> None:
    """Let the texts end that are on their way, for so long; the others go on elsewhere, or later."""
    until = time.monotonic() + seconds
    if seconds > 0 and not serving.drain(0):
        out.note(f"sllm: ending; texts have {seconds:g} s to end (a second signal: none)")
        while not serving.drain(0) and (left := until - time.monotonic()) > 0:
            if received(min(0.05, left)) is not None:
                break
    ended = serving.drain(0)
    serving.close()
    if not ended:
        out.note("sllm: handed back the texts that were not at their end")


@contextmanager
def signals(*, watch_stdin: bool) -> Iterator[Callable[[float], int | None]]:
    """From now on signals that end a program are only told: by a function that waits for one so long.

    With ``watch_stdin`` the end of stdin counts as SIGTERM: whoever started this program has ended.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = [reader, 0] if watch_stdin else [reader]

    def received(timeout: float) -> int | None:
        readable = select.select(watched, [], [], timeout)[0]
        if reader in readable:
            return os.read(reader, 1)[0]
        if 0 in readable and not os.read(0, 4096):
            watched.remove(0)
            return signal.SIGTERM
        return None

    before: dict[signal.Signals, Any] = {}
    # Who has had them ignored (nohup, a shell script's background) wants them to be.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda _number, _frame: None)
    # This takes them from the one who ends the program in less than a second; see cli.py.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


# ---- sllm status, sllm ping


def status(args: argparse.Namespace, out: Output) -> int:
    """Show what a worker is doing."""
    quiet_grpc()
    with connect(addresses(args.uri), timeout=args.timeout) as remote:
        found, info, endpoint = remote.status(), remote.info, remote.address.endpoint
    if args.json:
        out.line(json.dumps(_figures(found, info, endpoint), indent=2))
        return 0
    rows = [
        ("worker", endpoint),
        ("model", info.model_name),
        ("up for", _duration(found.uptime_s)),
        ("texts", f"{found.sessions} of {info.sessions} places, {found.queued} waiting"),
        ("so far", f"{count(found.sessions_total, 'text')}, {found.refused} refused"),
        ("prompts", f"{count(found.prompt_tokens, 'token')}, {found.reused_tokens} of them still in memory"),
        ("tokens", f"{found.tokens} in {count(found.passes, 'pass', 'passes')}{_ratio(found)}"),
        ("drafted", f"{found.accepted} of {found.drafted} accepted{_share(found.accepted, found.drafted)}"),
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


def ping(args: argparse.Namespace, out: Output) -> int:
    """Measure the link to a worker and show what it offers."""
    quiet_grpc()
    with connect(addresses(args.uri), timeout=args.timeout) as remote:
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

"""The command line: ``sllm demo``, ``run``, ``ask``, ``worker``, ``rpc-server``, ``status``, ``ping``,
``split``, ``audit``, ``codec-report``, ``calibrate``, ``devices``, ``inspect``, ``doctor``.

Text goes to stdout as it comes; everything about it goes to stderr. An error is one line there and exit
status 2, Ctrl-C is exit status 130 within a second, and a reader that goes away (``sllm run ... | head -1``)
ends the program without a word.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import tempfile
import threading
import traceback
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import sllm
from sllm import embedded
from sllm.cli import ask as cli_ask
from sllm.cli import demo
from sllm.cli import doctor as cli_doctor
from sllm.cli import layers as cli_layers
from sllm.cli import remote as cli_remote
from sllm.cli import rpc as cli_rpc
from sllm.cli import triage as cli_triage
from sllm.cli.console import (
    DIM,
    CommandError,
    Output,
    WriteError,
    count,
    hide_tokens,
    one_line,
    parameters,
    read_prompt,
    size,
    table,
)
from sllm.cli.remote import VARIABLE
from sllm.draft.drafters import ModelDrafter
from sllm.engine import exact
from sllm.engine.devices import devices
from sllm.hosts import DEFAULT_PORT
from sllm.wire.codec import CODECS
from sllm.worker.passes import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.generation.text_stream import GenerationStats, Run
    from sllm.targets.base import RemoteStats, Target

__all__ = ["main"]

_FAILED = 2
_INTERRUPTED = 128 + signal.SIGINT
_READER_GONE = 128 + signal.SIGPIPE

_GRACE_SECONDS = 0.7
"""How long a Ctrl-C may take to end the program in good order."""


class _Notes(logging.Handler):
    """Shows the library's warnings as notes; llama.cpp's own only to who debugs."""

    def __init__(self, out: Output, *, debug: bool) -> None:
        super().__init__(logging.INFO if debug else logging.WARNING)
        self._out = out
        self._debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        if self._debug or not record.name.startswith("sllm.llama_cpp"):
            self._out.note(f"sllm: {record.levelname.lower()}: {one_line(record.getMessage())}")


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_FAILED, f"sllm: {one_line(message)} (see {self.prog} --help)\n")


def _whole(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer from ``low`` to what C takes."""
    high = 2**31 - 1

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range, expected {low} to {high}")
        return value

    return convert


def _number(*, above_zero: bool) -> Callable[[str], float]:
    """A type for argparse: seconds and the like, finite, 0 or more."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            raise argparse.ArgumentTypeError(
                f"{text} is out of range, expected {'more than 0' if above_zero else '0 or more'}"
            )
        return value

    return convert


def _tail(text: str) -> int | None:
    """A type for argparse: a number of layers, or none."""
    return None if text == "none" else _whole(0)(text)


def _layers(text: str) -> tuple[int, int]:
    """A type for argparse: START:STOP."""
    start, colon, stop = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers, expected START:STOP")
    return _whole(0)(start), _whole(0)(stop)


_SHOWN = "(default: %(default)s)"
_MODEL = "a GGUF file or hf://owner/repo/file.gguf"
_THREADS = "CPU threads of each of the models (default: all cores)"
_URI = f"the sllm:// line that the worker printed; @FILE: a file with it; left out: what ${VARIABLE} holds"
_SECRET = (
    "A worker's sllm:// line is a secret, and the machine's other users can see command lines:"
    f" @FILE and the environment variable {VARIABLE} keep it to yourself."
)


def _parser() -> _Parser:
    parser = _Parser(
        prog="sllm",
        description="Text from a language model, sooner with a draft model, exactly the target's own.",
        epilog="Exit status: 0; 1 where the demo's texts differ, or it has sent something private; 2 after an"
        " error (SLLM_DEBUG=1 shows more); 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    version = f"sllm {sllm.__version__} (llama.cpp {sllm.llama_cpp_commit})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(
        name: str, run: Callable[[argparse.Namespace, Output], int], help_text: str, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help_text, description=help_text, epilog=epilog, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    _add_demo(
        command("demo", demo.demo, "Show it all on this machine: a worker, a slow link, a draft, a table.")
    )
    _add_run(command("run", _run, "Write the text behind a prompt.", _SECRET))
    asking = command("ask", cli_ask.ask, "Answer a request here or in a cloud, by tiers.", cli_ask.EPILOG)
    cli_ask.add_arguments(asking, _whole, _MODEL, _URI)
    _add_worker(
        command(
            "worker",
            cli_remote.worker,
            "Serve a model to clients over the network.",
            "The one line on stdout, sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT, is what a client needs, and a"
            " secret. SIGTERM and Ctrl-C let running texts end for a while and hand the others back: their"
            " clients go on elsewhere, or when the worker is back.",
        )
    )
    cli_rpc.add_rpc_server(
        command(
            "rpc-server",
            cli_rpc.rpc_server,
            "Serve this machine's devices by ggml's RPC, on loopback.",
            "The line on stdout is HOST:PORT. For other machines use sllm worker --rpc, which relays to such"
            " a server over TLS with a token.",
        )
    )
    status = command("status", cli_remote.status, "Show what a worker is doing.", _SECRET)
    status.add_argument("--json", action="store_true", help="as a JSON object")
    ping = command("ping", cli_remote.ping, "Measure the link to a worker and show what it offers.", _SECRET)
    for one in (status, ping):
        one.add_argument("uri", metavar="URI", nargs="?", help=_URI)
        one.add_argument(
            "--timeout", metavar="SECONDS", type=_number(above_zero=True), default=10.0, help=_SHOWN
        )
    calibrate = command(
        "calibrate",
        cli_triage.calibrate_command,
        "Find out from labelled requests when a small model may answer by itself.",
        cli_triage.FORMAT,
    )
    cli_triage.add_arguments(calibrate, _whole, _MODEL)
    cli_doctor.add_arguments(
        command(
            "doctor",
            cli_doctor.run,
            "Look at this build and this machine, and say what is not right.",
            cli_doctor.EPILOG,
        )
    )
    command("devices", _devices, "List the devices that models can run on.")
    inspect = command("inspect", _inspect, "Say what is in a model file.")
    inspect.add_argument("model", metavar="GGUF", help=_MODEL)
    inspect.add_argument("--json", action="store_true", help="as a JSON object")
    cli_layers.add_split(
        command("split", cli_layers.split, "Write layers of a model into files of their own.")
    )
    cli_layers.add_audit(
        command("audit", cli_layers.audit, "Attack a split of your own: which tokens do hidden states tell?"),
        _whole,
    )
    cli_layers.add_codec_report(
        command(
            "codec-report", cli_layers.codec_report, "Measure what the codecs of a split do to the text."
        ),
        _whole,
    )
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", default=demo.PROMPT, help="what to answer")
    add("-n", "--max-tokens", metavar="N", type=_whole(1), default=96, help="at most N tokens (default: 96)")
    add("--temperature", metavar="T", type=float, default=0.4, help=_SHOWN)
    add("--seed", metavar="N", type=int, default=1, help=_SHOWN)
    add(
        "--rtt",
        metavar="MS",
        type=_number(above_zero=False),
        default=50.0,
        help="the link's round trip in milliseconds (default: 50)",
    )
    add(
        "--unpaced",
        action="store_true",
        help="let the models be as quick as they are; else each pass of the target takes"
        f" {demo.PASS_SECONDS * 1e3:.0f} ms and each drafted token {demo.DRAFT_SECONDS * 1e3:.0f} ms,"
        " as those of large models do",
    )
    add(
        "--threads",
        metavar="N",
        type=_whole(1),
        help=_THREADS,
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="the prompt; '-', or none and a pipe: stdin")
    add("--target", metavar="GGUF", help=f"{_MODEL} (default: the package's own small model)")
    add("--remote", metavar="URI", nargs="?", const="", help=f"a worker: {_URI}")
    add(
        "--draft",
        metavar="GGUF|ngram|none",
        help=f"{_MODEL}, prompt lookup, or nothing (default: the package's own if the target has its"
        " vocabulary, else none)",
    )
    add("--chat", action="store_true", help="PROMPT is a message, for the chat template")
    add("-n", "--max-tokens", metavar="N", type=_whole(1), help="at most N tokens")
    add("--stop", metavar="S", action="append", default=[], help="end before S; may be repeated")
    default = sllm.SamplingParams()
    sampling = parser.add_argument_group("sampling")
    for option, metavar, kind, value in [
        ("--temperature", "T", float, default.temperature),
        ("--top-k", "K", int, default.top_k),
        ("--top-p", "P", float, default.top_p),
        ("--min-p", "P", float, default.min_p),
        ("--seed", "N", int, default.seed),
    ]:
        sampling.add_argument(option, metavar=metavar, type=kind, default=value, help=_SHOWN)
    sampling.add_argument("--grammar-file", metavar="FILE", help="a GBNF grammar that the text must match")
    add(
        "--rpc",
        metavar="HOST:PORT|URI",
        help="run layers of --target (see --n-gpu-layers) on the devices of an RPC server, or of a worker"
        " that was started with --rpc (its sllm:// line, or @FILE)",
    )
    link = parser.add_argument_group("link (with --remote)")
    link.add_argument(
        "--no-run-ahead",
        action="store_true",
        help="let the worker compute only what is asked for: fewer passes, cheaper, and slower",
    )
    link.add_argument(
        "--on-loss",
        choices=("wait", "raise", "local"),
        help="when the link is lost: connect again and go on; give up; or meanwhile show what the draft"
        " says alone, on a terminal, until the worker takes over again (default: wait)",
    )
    link.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=_number(above_zero=True),
        help="give the text up after so long without a link (default: 60)",
    )
    split = parser.add_argument_group(
        "split by layers (with --target, and --remote for a worker that was started with --layers)"
    )
    split.add_argument("--head", metavar="N", type=_whole(0), help="the first N layers run here")
    split.add_argument(
        "--tail",
        metavar="N|none",
        type=_tail,
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
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--n-ctx",
        metavar="N",
        type=_whole(1),
        help="positions of the context (with --remote: the draft's)",
    )
    machine.add_argument(
        "--threads",
        metavar="N",
        type=_whole(1),
        help=_THREADS,
    )
    machine.add_argument(
        "--n-gpu-layers",
        metavar="N",
        type=_whole(0),
        help="layers of the target on GPUs; 0: nothing, the draft neither (default: all)",
    )
    add("--stats", action="store_true", help="say on stderr what it took")


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="GGUF", nargs="?", help=f"{_MODEL} (default: the package's own small model)")
    add("--draft", metavar="GGUF", help=f"{_MODEL}: the worker drafts, too, where a client has no hint")
    add(
        "--layers",
        metavar="START:STOP",
        nargs="?",
        const=True,
        default=False,
        type=_layers,
        help="serve these layers of the model, and no texts (sllm run --head); without a range: those that"
        " clients ask for. Of a file of some layers (sllm split), they must be in it",
    )
    add(
        "--rpc",
        action="store_true",
        help="keep an RPC server on loopback, too, for clients that run a model themselves and want this"
        " machine's devices for it; whoever has the token can use it",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=f"127.0.0.1:{DEFAULT_PORT}",
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
        help="what clients must know; made where there is none (default: one kept in --state)",
    )
    network.add_argument("--cert", metavar="FILE", help="a certificate chain, PEM (default: one of our own)")
    network.add_argument("--key", metavar="FILE", help="its key, PEM")
    network.add_argument(
        "--state",
        metavar="DIR",
        help="where token and certificate are kept (default: $SLLM_STATE, or sllm in your state folder)",
    )
    network.add_argument("--insecure", action="store_true", help="no TLS, no token; loopback only")
    limits = parser.add_argument_group("limits")
    sessions, queue = Limits.sessions, Limits.queue
    limits.add_argument(
        "--sessions", metavar="N", type=_whole(1), default=sessions, help=f"texts at once {_SHOWN}"
    )
    limits.add_argument(
        "--queue", metavar="N", type=_whole(0), default=queue, help=f"texts that may wait {_SHOWN}"
    )
    limits.add_argument(
        "--n-ctx",
        metavar="N",
        type=_whole(1),
        help="positions of a text (default: the model's, up to 4096)",
    )
    limits.add_argument("--max-prompt", metavar="N", type=_whole(1), help="tokens (default: --n-ctx)")
    limits.add_argument("--no-grammars", action="store_true", help="take none from clients")
    limits.add_argument(
        "--drain",
        metavar="SECONDS",
        type=_number(above_zero=False),
        default=10.0,
        help="how long texts may go on after SIGTERM or Ctrl-C (default: 10)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--threads",
        metavar="N",
        type=_whole(1),
        help=_THREADS,
    )
    machine.add_argument(
        "--n-gpu-layers",
        metavar="N",
        type=_whole(0),
        help="layers of the model on GPUs; 0: nothing, the draft neither (default: all)",
    )
    machine.add_argument(
        "--exact",
        action="store_true",
        help="flash attention and a q8_0 KV cache: half the memory, and on a CPU with q8_0 or q4_0 weights a"
        " text is to the last bit what it is without drafts and neighbours",
    )
    # For the demo and benchmarks: a stand-in for a larger model, and a worker that ends with its parent.
    add(
        "--pass-seconds",
        type=_number(above_zero=False),
        default=0.0,
        metavar="SECONDS",
        help=argparse.SUPPRESS,
    )
    add("--until-eof", action="store_true", help=argparse.SUPPRESS)


# ---- sllm run


def _run(args: argparse.Namespace, out: Output) -> int:
    sampling = sllm.SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        grammar=None if args.grammar_file is None else _read_grammar(args.grammar_file),
    )
    if "" in args.stop:
        raise CommandError("--stop is empty")
    uris = None if args.remote is None else cli_remote.addresses(args.remote)
    if uris is not None and args.target is not None and args.head is None:
        raise CommandError("--target and --remote exclude each other, except for a split: name --head")
    if args.head is not None and uris is None:
        raise CommandError("--head splits a model with a worker: name that by --remote")
    text = read_prompt(args.prompt, "run")
    with ExitStack() as stack:
        if uris is not None and args.head is not None:
            model, target, draft = _open_split(uris, args, sampling, stack)
        elif uris is None:
            model, target, draft = _open_local(args, sampling, stack)
        else:
            model, target, draft = _open_remote(uris, args, sampling, stack)
        prompt = _as_message(model, text) if args.chat else text
        drafter: sllm.Model | ModelDrafter | str | None = draft
        if isinstance(draft, sllm.Model) and (
            args.threads is not None or isinstance(target, (sllm.RemoteTarget, sllm.SplitTarget))
        ):
            n_ctx = min(n for n in (args.n_ctx, draft.n_ctx_train, 4096) if n)
            drafter = stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=args.threads))
        stream = stack.enter_context(
            sllm.generate(
                target, prompt, draft=drafter, sampling=sampling, max_tokens=args.max_tokens, stop=args.stop
            )
        )
        answer = _Answer(out)
        for run in stream:
            answer.show(run)
        out.end_line()
        if args.stats:
            for line in _summary(stream.stats):
                out.note(line)
    return 0


_Opened = tuple[sllm.Model, "sllm.Model | Target", "sllm.Model | str | None"]


def _open_local(args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack) -> _Opened:
    """A model of this machine: the model, the target, and what is to draft."""
    for option in ("no_run_ahead", "on_loss", "deadline"):
        if getattr(args, option):
            raise CommandError(f"--{option.replace('_', '-')} is for --remote alone")
    ours = args.target is None
    name = embedded.TARGET if ours else args.target
    if args.rpc is not None:
        isolated = cli_rpc.local_target(args, name, exact.SETTINGS if ours else {}, stack)
        if sampling.grammar is not None:
            _check_grammar(isolated.model, sampling, args.grammar_file)
        return isolated.model, isolated, _open_draft(args, embedded.DRAFT if ours else None, stack)
    model = stack.enter_context(sllm.Model(name, n_gpu_layers=args.n_gpu_layers))
    if sampling.grammar is not None:
        _check_grammar(model, sampling, args.grammar_file)
    draft = _open_draft(args, embedded.DRAFT if ours else None, stack)
    if not ours and args.n_ctx is None and args.threads is None:
        # generate() makes the context to the text's measure, and shares out the cores.
        return model, model, draft
    settings = exact.SETTINGS if ours else {}
    target = sllm.LocalTarget(model, n_ctx=args.n_ctx, n_threads=args.threads, **settings)
    return model, stack.enter_context(target), draft


def _open_remote(
    uris: list[str], args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack
) -> _Opened:
    """A model of a worker: its vocabulary, the target, and what is to draft."""
    if args.rpc is not None:
        raise CommandError("--rpc is for models that run here, and --remote names one that does not")
    cli_remote.quiet_grpc()
    on_loss, deadline = args.on_loss or "wait", args.deadline or 60.0
    remote = stack.enter_context(sllm.connect(uris, on_loss=on_loss, deadline=deadline))
    model = remote.vocabulary_model()
    if sampling.grammar is not None:
        _check_grammar(model, sampling, args.grammar_file)
    default = None
    if args.draft is None:
        with sllm.Model(embedded.DRAFT, vocab_only=True) as ours:
            if ours.vocab.fingerprint == remote.info.vocab_fingerprint:
                default = embedded.DRAFT
    draft = _open_draft(args, default, stack)
    if on_loss == "local" and draft is None:
        raise CommandError(
            "--on-loss local lets the draft go on alone, and there is none: name it by --draft"
        )
    return model, remote.target(run_ahead=not args.no_run_ahead), draft


def _open_split(
    uris: list[str], args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack
) -> _Opened:
    """A model whose ends are here and whose middle is a worker's."""
    cli_remote.quiet_grpc()
    if args.no_run_ahead or args.on_loss == "local":
        raise CommandError("--no-run-ahead and --on-loss local are not for a split by layers")
    on_loss, deadline = args.on_loss or "wait", args.deadline or 60.0
    remote = stack.enter_context(sllm.connect(uris, on_loss=on_loss, deadline=deadline))
    ours = args.target is None
    name = embedded.TARGET if ours else args.target
    target = stack.enter_context(
        sllm.SplitTarget(
            name,
            head=args.head,
            tail=args.tail,
            middle=remote,
            codec=args.codec,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            **(exact.SETTINGS if ours else {}),
        )
    )
    model = stack.enter_context(sllm.Model(name, vocab_only=True))
    if sampling.grammar is not None:
        _check_grammar(model, sampling, args.grammar_file)
    return model, target, _open_draft(args, embedded.DRAFT if ours else None, stack)


def _open_draft(args: argparse.Namespace, default: Path | None, stack: ExitStack) -> sllm.Model | str | None:
    """What ``--draft`` names."""
    name: str | os.PathLike[str] | None = default if args.draft is None else args.draft
    if name is None or name == "none":
        return None
    if name == "ngram":
        return "ngram"
    try:
        return stack.enter_context(sllm.Model(name, n_gpu_layers=0 if args.n_gpu_layers == 0 else None))
    except sllm.ModelLoadError as error:
        raise CommandError(f"--draft: {error} (or ngram, or none)") from error


class _Answer:
    """Shows a text run by run. What the draft says alone without a link may have to be taken back: it is for
    terminals, where it can be told apart.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._line = ""  # what is certain of the last line
        self._unverified = 0  # tokens shown

    def show(self, run: Run) -> None:
        """Show one run."""
        out = self._out
        if run.source == "local":
            if out.terminal:
                if not self._unverified and not out.colour:
                    out.text("[")
                out.text(run.text, style=DIM)
                self._unverified += len(run.tokens)
            return
        if self._unverified:
            if not out.colour:
                out.text("]")
            out.end_line()
            n = count(self._unverified, "token")
            out.note(f"sllm: the link is back; withdrawn: the last {n}, which the draft wrote alone")
            out.text(self._line)
            self._unverified = 0
        out.text(run.text)
        self._line = (self._line + run.text).rpartition("\n")[2]


def _read_grammar(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_grammar(model: sllm.Model, sampling: sllm.SamplingParams, name: str) -> None:
    """Compile the grammar; llama.cpp's parser tells what is wrong with it on descriptor 2, nowhere else."""
    with tempfile.TemporaryFile() as told:
        stderr = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            model.compiled(sampling)
        except ValueError as error:
            told.seek(0)
            lines = told.read().decode("utf-8", "replace").splitlines()
            reason = lines[0].removeprefix("parse: ") if lines else error
            raise CommandError(f"{name}: {reason}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _as_message(model: sllm.Model, text: str) -> npt.NDArray[np.int32]:
    """A prompt of one message by the user."""
    return model.chat([{"role": "user", "content": text}])


def _summary(stats: GenerationStats) -> list[str]:
    """The figures of a text, for people."""
    lines = [
        f"prompt: {count(stats.n_prompt, 'token')}, {stats.prompt_seconds:.2f} s",
        f"text: {count(stats.n_tokens, 'token')}, {stats.seconds:.2f} s, {stats.tokens_per_s:.1f} tokens/s",
        f"passes of the target: {stats.n_passes}, {stats.passes_per_token:.2f} per token",
    ]
    if stats.n_drafted:
        accepted = f"{stats.n_accepted} of {stats.n_drafted} accepted ({stats.acceptance:.2f})"
        lines.append(f"draft: {accepted}, {stats.draft_seconds:.2f} s")
    if stats.remote is not None:
        lines += _link_summary(stats, stats.remote)
    full = "--n-ctx" if stats.remote is None else "the worker's"
    reasons = {
        "eog": "the model ended the text",
        "length": "--max-tokens",
        "context": f"the context is full ({full})",
        "stop": "--stop",
    }
    return [*lines, f"ended by: {reasons.get(stats.finish_reason or '', stats.finish_reason)}"]


def _link_summary(stats: GenerationStats, remote: RemoteStats) -> list[str]:
    """What a worker and the way to it had to do with it."""
    up, down = size(remote.bytes_up), size(remote.bytes_down)
    per_token = (remote.bytes_up + remote.bytes_down) / max(stats.n_tokens, 1)
    round_trip = f"{remote.round_trip * 1e3:.1f} ms round trip, " if remote.round_trip else ""
    by = stats.tokens_by_source
    sources = [f"{by['draft']} drafted here", f"{by['target']} the target's own"]
    if by["worker draft"]:
        sources.insert(1, f"{by['worker draft']} drafted by the worker")
    carried = (
        f"{up} of messages up, {down} down, {per_token:.0f} bytes per token, {count(remote.n_hints, 'hint')}"
    )
    lines = [
        f"tokens: {', '.join(sources)}",
        f"link: {round_trip}{carried}",
        f"lost to rejections: {stats.wasted_seconds:.2f} s of the draft's time",
    ]
    if remote.n_reconnects or stats.n_local:
        lost = f"{count(remote.n_reconnects, 'time')}, {remote.lost_seconds:.2f} s"
        local = f"; {count(stats.n_local, 'token')} by the draft alone, withdrawn" if stats.n_local else ""
        lines.append(f"link lost: {lost}{local}")
    if remote.queued_seconds >= 0.1:
        lines.append(f"waited for a place: {remote.queued_seconds:.2f} s")
    return lines


# ---- sllm devices, sllm inspect


def _devices(args: argparse.Namespace, out: Output) -> int:  # noqa: ARG001
    rows = [("", "name", "type", "free", "total", "description")]
    for device in devices():
        free, total = (size(n) if n else "-" for n in (device.memory_free, device.memory_total))
        rows.append((str(device.index), device.name, device.type, free, total, device.description))
    for line in table(rows, right=(0, 3, 4)):
        out.line(line)
    return 0


def _inspect(args: argparse.Namespace, out: Output) -> int:
    with sllm.Model(args.model, n_gpu_layers=0) as model:
        found: dict[str, Any] = {
            "file": str(model.path),
            "file_bytes": model.path.stat().st_size,
            "architecture": model.architecture,
            "description": model.description,
            "name": model.metadata.get("general.name"),
            "n_params": model.n_params,
            "size_bytes": model.size_bytes,
            "n_layer": model.n_layer,
            "n_embd": model.n_embd,
            "n_head": model.n_head,
            "n_head_kv": model.n_head_kv,
            "n_ctx_train": model.n_ctx_train,
            "n_vocab": model.vocab.n_tokens,
            "vocab_fingerprint": _fingerprint(model),
            "chat_template": "tokenizer.chat_template" in model.metadata,
            "can_rollback": model.can_rollback,
            "exact": not (obstacles := exact.obstacles(model.path)),
            "exact_obstacles": list(obstacles),
        }
        if args.json:
            out.line(json.dumps(found, indent=2))
            return 0
        rows = [
            ("file", f"{found['file']} ({size(found['file_bytes'])})"),
            ("architecture", found["architecture"]),
            ("description", found["description"]),
            ("name", found["name"] or "-"),
            ("parameters", f"{parameters(model.n_params)} in {size(model.size_bytes)}"),
            ("layers", str(model.n_layer)),
            ("width", str(model.n_embd)),
            ("heads", f"{model.n_head}, {model.n_head_kv} of keys and values"),
            ("context", f"{model.n_ctx_train} tokens"),
            ("vocabulary", f"{model.vocab.n_tokens} tokens"),
            ("fingerprint", found["vocab_fingerprint"] or "-"),
            ("chat template", "yes" if found["chat_template"] else "no"),
            ("speculation", "yes" if model.can_rollback else "no: it cannot take back single tokens"),
            (
                "exact",
                "no: " + "; ".join(obstacles) if obstacles else "yes, with flash attention and a q8_0 cache",
            ),
        ]
    for line in table([(name, one_line(value)) for name, value in rows]):
        out.line(line)
    return 0


def _fingerprint(model: sllm.Model) -> str | None:
    try:
        return model.vocab.fingerprint
    except (sllm.UnsupportedModelError, ValueError):
        return None  # a file of layers alone has no vocabulary


# ---- what they share


def _reason(error: Exception) -> str:
    """An exception as one line that needs no knowledge of Python."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    text = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if text else ''}{text}"
    if text and isinstance(error, (sllm.SllmError, OSError, ValueError, TypeError)):
        return text
    return f"{type(error).__name__}: {text} (unexpected; SLLM_DEBUG=1 shows where)"


@contextmanager
def _interrupts() -> Iterator[None]:
    """Keep the promise that Ctrl-C ends the program within a second.

    Python raises KeyboardInterrupt between two steps of its own, and a load or a decode lets it do so now and
    then: nearly always the program ends in good order. A call that does not come back in time (megabytes to
    tokenize, a driver) is left where it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGINT and not over.wait(_GRACE_SECONDS):
                    os._exit(_INTERRUPTED)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="sllm-interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)
        watcher.join()


@contextmanager
def _shown_log(out: Output, *, debug: bool) -> Iterator[None]:
    logger = logging.getLogger("sllm")
    level = logger.level
    handler = _Notes(out, debug=debug)
    logger.addHandler(handler)
    if debug:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    debug = bool(os.environ.get("SLLM_DEBUG"))
    out = Output()
    try:
        with _interrupts(), _shown_log(out, debug=debug):
            try:
                args = _parser().parse_args(argv)
            except SystemExit as ended:  # --help, --version, or an error that was told
                out.flush()
                return ended.code if isinstance(ended.code, int) else _FAILED
            status: int = args.run(args, out)
            return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: nothing but the way out is left
        with suppress(WriteError):
            if out.terminal:
                out.end_line()
        return _INTERRUPTED
    except WriteError as error:
        if error.reader_gone:
            return _READER_GONE
        out.note(f"sllm: cannot write to stdout: {error.reason}")
        return _FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: a person gets a line, not a traceback
        with suppress(WriteError):
            if out.terminal:
                out.end_line()
        told = hide_tokens(traceback.format_exc().rstrip()) if debug else f"sllm: {_reason(error)}"
        out.note(told)
        return _FAILED

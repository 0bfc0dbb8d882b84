"""The program ``sllm``: it finds the command, runs it, and turns its errors into an exit status.

Text goes to stdout as it comes; everything about it goes to stderr. An error is one line there and exit
status 2, Ctrl-C is exit status 130 within a second, and a reader that goes away (``sllm run ... | head -1``)
ends the program without a message.

A command is a module of this package that has ``EPILOG`` (the end of its ``--help``, or None),
``add_arguments(parser)`` and ``run(args, out)``, which returns the exit status. Only the module of the
command that was named is imported, since the others may take seconds to import, or need packages that are not
installed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.arguments import FAILED, Parser
from sllm.cli.console import Output, Progress, WriteError, hide_tokens, one_line
from sllm.cli.signals import INTERRUPTED, ended_by_interrupt
from sllm.errors import SllmError
from sllm.progress import told_to

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["main"]

_READER_GONE = 128 + signal.SIGPIPE

# The module of each command, and what `sllm --help` says of it.
_COMMANDS = {
    "demo": ("sllm.cli.demo", "Show it all on this machine: a worker, a slow link, a draft, a table."),
    "run": ("sllm.cli.run", "Write the text that follows a prompt."),
    "ask": ("sllm.cli.ask", "Answer a request here or in a cloud, by tiers."),
    "worker": ("sllm.cli.worker", "Serve a model to clients over the network."),
    "worker token": (
        "sllm.cli.worker_token",
        "Add, limit, rotate and revoke the tokens of a worker's users.",
    ),
    "rpc-server": ("sllm.cli.rpc_server", "Serve this machine's devices by ggml's RPC, on loopback."),
    "status": ("sllm.cli.status", "Show what a worker is doing."),
    "ping": ("sllm.cli.ping", "Measure the link to a worker or a serving engine and show what it offers."),
    "calibrate": (
        "sllm.cli.calibrate",
        "Find out from labelled requests when a small model may answer by itself.",
    ),
    "doctor": ("sllm.cli.doctor", "Examine this build and this machine, and say what is wrong with them."),
    "devices": ("sllm.cli.devices", "List the devices that models can run on."),
    "inspect": ("sllm.cli.inspect_model", "Say what is in a model file."),
    "split": ("sllm.cli.split", "Write layers of a model into files of their own."),
    "audit": ("sllm.cli.audit", "Attack a split of your own: which tokens do hidden states tell?"),
    "codec-report": ("sllm.cli.codec_report", "Measure what the codecs of a split do to the text."),
}


class _ShowVersion(argparse.Action):
    """``--version``; a class, so that the compiled core is asked only when the version is to be shown."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser._print_message(f"sllm {sllm.__version__} (llama.cpp {sllm.llama_cpp_commit})\n", sys.stdout)
        parser.exit()


def _parser(named: str | None) -> Parser:
    """The parser of the command line, with the arguments of the command ``named`` alone."""
    parser = Parser(
        prog="sllm",
        description="Text from a language model, sooner with a draft model, exactly the target's own.",
        epilog="Exit status: 0; 1 where the demo's texts differ, or it has sent something private, and where"
        " a worker is not healthy; 2 after an error (SLLM_DEBUG=1 shows more); 70 where a worker had to be"
        " ended hard; 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show program's version number and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (module_name, help_text) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if name == named:
            module = import_module(module_name)
            command.epilog = module.EPILOG
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    # No option before the command takes a value, so the command is the first word that is not an option.
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    if " ".join(argv[at : at + 2]) in _COMMANDS:  # of two words
        argv = [*argv[:at], " ".join(argv[at : at + 2]), *argv[at + 2 :]]
    named = argv[at] if at < len(argv) else None
    parser = _parser(named)
    args, left = parser.parse_known_args(argv)
    if left and isinstance(getattr(args, "prompt", None), list) and not any(w.startswith("-") for w in left):
        # Behind an option, argparse no longer counts words to the ones before it. What they are is for the
        # command to say: a model's name and a prompt, or the words of a prompt, which are not to be repeated.
        args.prompt += left
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


# ---- warnings and errors


class _Notes(logging.Handler):
    """Shows the library's warnings as notes; those of llama.cpp only with ``SLLM_DEBUG``."""

    def __init__(self, out: Output, *, debug: bool) -> None:
        super().__init__(logging.INFO if debug else logging.WARNING)
        self._out = out
        self._debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        if self._debug or not record.name.startswith("sllm.llama_cpp"):
            self._out.note(f"sllm: {record.levelname.lower()}: {one_line(record.getMessage())}")


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


def _reason(error: Exception) -> str:
    """An exception as one line that needs no knowledge of Python."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    text = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if text else ''}{text}"
    if text and (isinstance(error, (SllmError, OSError, ValueError, TypeError)) or _names_an_extra(error)):
        return text
    return f"{type(error).__name__}: {text} (unexpected; SLLM_DEBUG=1 shows where)"


def _names_an_extra(error: Exception) -> bool:
    """Whether the message says which package is missing and what to type; see :func:`sllm.extras.needs`."""
    return isinstance(error, ImportError) and isinstance(error.__cause__, ModuleNotFoundError)


# ---- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    debug = bool(os.environ.get("SLLM_DEBUG"))
    out = Output()
    try:
        with (
            ended_by_interrupt(),
            _shown_log(out, debug=debug),
            told_to(lambda what: Progress(out, what)),
        ):
            try:
                args: Any = _parse(sys.argv[1:] if argv is None else argv)
            except SystemExit as ended:  # --help, --version, or an error that has been reported
                out.flush()
                return ended.code if isinstance(ended.code, int) else FAILED
            status: int = args.run(args, out)
            return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: only the way out is left
        with suppress(WriteError):
            if out.terminal:
                out.end_line()
        return INTERRUPTED
    except WriteError as error:
        if error.reader_gone:
            return _READER_GONE
        out.note(f"sllm: cannot write to stdout: {error.reason}")
        return FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: a person gets a line, not a traceback
        with suppress(WriteError):
            if out.terminal:
                out.end_line()
        out.note(hide_tokens(traceback.format_exc().rstrip()) if debug else f"sllm: {_reason(error)}")
        return FAILED

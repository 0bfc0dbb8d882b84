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
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.arguments import FAILED, Parser
from sllm.cli.console import Output, Progress, WriteError, hide_tokens, one_line, reason
from sllm.cli.signals import INTERRUPTED, ended_by_interrupt
from sllm.engine.model_name import looks_like_model
from sllm.progress import told_to

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["main"]

_READER_GONE = 128 + signal.SIGPIPE

# The module of each command, and what `sllm --help` says of it, by what the commands are for.
_PURPOSES = {
    "Text": {
        "chat": ("sllm.cli.chat", "A conversation in the terminal; sllm MODEL is short for it."),
        "run": ("sllm.cli.run", "Write the text that follows a prompt."),
        "ask": ("sllm.cli.ask", "Answer a request here or in a cloud, by tiers."),
        "plan": ("sllm.cli.plan", "Predict which way to a text is the fastest here."),
        "demo": ("sllm.cli.demo", "Show it all on this machine: a worker, a slow link, a draft."),
    },
    "Workers": {
        "worker": ("sllm.cli.worker", "Serve a model to clients over the network."),
        "serve": ("sllm.cli.serve", "Serve a model, a split or tiers as OpenAI's API."),
        "worker token": ("sllm.cli.worker_token", "Add, limit, rotate and revoke the tokens of users."),
        "status": ("sllm.cli.status", "Show what a worker is doing."),
        "ping": ("sllm.cli.ping", "Measure the link to a worker or a serving engine."),
        "rpc-server": ("sllm.cli.rpc_server", "Serve this machine's devices by ggml's RPC, on loopback."),
    },
    "Models": {
        "inspect": ("sllm.cli.inspect_model", "Say what is in a model file."),
        "split": ("sllm.cli.split", "Write layers of a model into files of their own."),
        "audit": ("sllm.cli.audit", "Attack a split of your own: do hidden states tell the text?"),
        "codec-report": ("sllm.cli.codec_report", "Measure what the codecs of a split do to the text."),
        "calibrate": ("sllm.cli.calibrate", "Find out when a small model may answer by itself."),
    },
    "This machine": {
        "doctor": ("sllm.cli.doctor", "Examine this build and this machine; say what is wrong."),
        "devices": ("sllm.cli.devices", "List the devices that models can run on."),
    },
}
_COMMANDS = {name: told for commands in _PURPOSES.values() for name, told in commands.items()}

# What other programs call an option that has another name here.
_OPTIONS = {"--model": "--target", "-m": "--target", "--ctx-size": "--n-ctx", "-c": "--n-ctx"}


class _ShowVersion(argparse.Action):
    """``--version``; a class, so that the compiled core is asked only when the version is to be shown."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser._print_message(f"sllm {sllm.__version__} (llama.cpp {sllm.llama_cpp_commit})\n", sys.stdout)
        parser.exit()


class _MainParser(Parser):
    """The parser of the whole command line, whose help groups the commands."""

    def format_help(self) -> str:
        """The help, within 80 columns."""
        width = max(map(len, _COMMANDS))
        lines = [
            "usage: sllm MODEL          a conversation with it",
            "       sllm COMMAND ...    sllm COMMAND --help tells the rest",
            "",
            *textwrap.wrap(self.description or "", 79),
        ]
        for purpose, commands in _PURPOSES.items():
            lines += ["", f"{purpose}:"]
            lines += [f"  {name:<{width}}  {what}" for name, (_, what) in commands.items()]
        lines += ["", f"  {'--version':<{width}}  Show the version of sllm, and llama.cpp's."]
        return "\n".join([*lines, "", *textwrap.wrap(self.epilog or "", 79), ""])


def _parser(named: str | None) -> tuple[Parser, Parser | None]:
    """The parser of the command line, with the arguments of the command ``named`` alone; and that one's."""
    parser = _MainParser(
        prog="sllm",
        description="Text from a language model, sooner with a draft model, exactly the target's own. MODEL"
        " is a GGUF file, owner/repo:QUANT or another name of the Hugging Face hub.",
        epilog="Exit status: 0; 1 where the demo's texts differ, or it has sent something private, and where"
        " a worker is not healthy; 2 after an error (SLLM_DEBUG=1 shows more); 70 where a worker had to be"
        " ended hard; 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show program's version number and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=Parser)
    found = None
    for name, (module_name, help_text) in _COMMANDS.items():
        command = commands.add_parser(
            name, prog=f"sllm {name}", help=help_text, description=help_text, allow_abbrev=False
        )
        if name == named:
            module = import_module(module_name)
            command.epilog = module.EPILOG
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            found = command
    return parser, found


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if argv and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    # No option before the command takes a value, so the command is the first word that is not an option.
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    if " ".join(argv[at : at + 2]) in _COMMANDS:  # of two words
        argv = [*argv[:at], " ".join(argv[at : at + 2]), *argv[at + 2 :]]
    named = argv[at] if at < len(argv) else None
    if at == 0 and named is not None and named not in _COMMANDS and looks_like_model(named):
        argv, named = ["chat", *argv], "chat"
    parser, command = _parser(named)
    if not argv:
        parser.print_help()
        parser.exit()
    if at and not {"-h", "--help", "--version"}.intersection(argv[:at]):
        model = next((word for word in argv[at:] if word not in _COMMANDS and looks_like_model(word)), None)
        meant = f"{named if command is not None else 'chat'} {argv[0]} ..."
        if _OPTIONS.get(argv[0], argv[0]) == "--target" and model is not None:
            meant = shlex.quote(model)
        parser.error(f"{argv[0]} is no option of sllm itself: was `sllm {meant}` meant?")
    if named is not None and command is None and not at:
        parser.error(_no_command(named))
    args, left = parser.parse_known_args(argv)
    words = getattr(args, "prompt", getattr(args, "model", None))
    if left and isinstance(words, list) and not any(word.startswith("-") for word in left):
        # Behind an option, argparse no longer counts words to the ones before it. What they are is for the
        # command to say: a model's name and a prompt, or the words of a prompt, which are not to be repeated.
        words += left
    elif left:
        (command or parser).error(f"unrecognized arguments: {' '.join(left)}{_meant_option(left, command)}")
    return args


def _no_command(word: str) -> str:
    """What to say of a word that is no command and no model: what was meant."""
    shown = shlex.quote(word)
    if Path(word).is_file():
        return f"{shown} is no command, and no model: it is not a GGUF file"
    if "/" in word:
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", word)
        meant = f"; was `sllm hf://{word}` meant, which is on the hub?" if on_hub else ""
        return f"{shown} is no command, and there is no model of that name{meant}"
    close = difflib.get_close_matches(word, _COMMANDS, n=1)
    return f"{shown} is no command" + (f": was `sllm {close[0]}` meant?" if close else "")


def _meant_option(words: Sequence[str], command: Parser | None) -> str:
    """Which of the command's options was meant by the first unknown one; empty, where no other is like it."""
    word = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    known = [] if command is None else list(command._option_string_actions)
    if word is None:
        return ""
    if (same := _OPTIONS.get(word)) in known:
        return f"; was {same} meant?"
    # What somebody has begun to type counts more than what looks alike.
    begun = [option for option in known if option.startswith(word[:5]) and len(word) >= 5]
    within = [option for option in known if word.startswith("--") and word[1:] in option]  # as a part of it
    close = (
        difflib.get_close_matches(word, begun, n=1, cutoff=0)
        or within
        or difflib.get_close_matches(word, known, n=1)
    )
    return f"; was {' or '.join(close)} meant?" if close else ""


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


# ---- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    debug = bool(os.environ.get("SLLM_DEBUG"))
    out = Output()
    signals: list[int] = []
    try:
        with (
            ended_by_interrupt() as signals,
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
        if signals:  # it has come of a KeyboardInterrupt
            return INTERRUPTED
        out.note(hide_tokens(traceback.format_exc().rstrip()) if debug else f"sllm: {reason(error)}")
        return FAILED

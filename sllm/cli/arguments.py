"""What the commands' arguments share: the parser, the converters of single values, options of several
commands.

A converter is what argparse takes as ``type=``: a function of the text that was typed. It raises
``argparse.ArgumentTypeError`` with a message that says what was found and what was expected.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, NoReturn

from sllm.cli.console import one_line
from sllm.hosts import host_port

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEFAULT",
    "ENGINE",
    "ENGINE_KEY_VARIABLE",
    "ENGINE_SECRET",
    "FAILED",
    "MODEL",
    "NO_HOPS",
    "REMOTE_VARIABLE",
    "SECRET",
    "URI",
    "Parser",
    "add_engine_model",
    "add_gpu_layers",
    "add_json",
    "add_remote",
    "add_threads",
    "add_worker",
    "device_names",
    "endpoint",
    "hop",
    "layer_counts",
    "layer_range",
    "layers_or_none",
    "number",
    "share",
    "utf8",
    "whole",
]

FAILED = 2
"""The exit status after an error."""

REMOTE_VARIABLE = "SLLM_REMOTE"
"""The environment variable that may hold a worker's address; other users of the machine cannot see it."""

ENGINE_KEY_VARIABLE = "SLLM_ENGINE_KEY"
"""The environment variable that may hold the key of a serving engine."""

DEFAULT = "(default: %(default)s)"
NO_HOPS = "none"
"""As ``--hops``: hidden states do not go from worker to worker."""

MODEL = "a GGUF file, owner/repo:QUANT, or hf:// or ms://owner/repo/file.gguf"
URI = (
    f"the sllm:// line that the worker printed; @FILE: a file with it; left out: what ${REMOTE_VARIABLE}"
    " holds"
)
ENGINE = (
    "a serving engine that runs somewhere: vLLM, SGLang or llama-server, by an address such as"
    " http://host:8000/v1"
)
ENGINE_SECRET = f"The key of a serving engine, where it asks for one, is taken from {ENGINE_KEY_VARIABLE}."
SECRET = (
    "A worker's sllm:// line is a secret, and the machine's other users can see command lines:"
    f" @FILE and the environment variable {REMOTE_VARIABLE} keep it to yourself."
)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """End with the exit status of an error."""
        self.exit(FAILED, f"sllm: {one_line(message)} (see {self.prog} --help)\n")


# ---- converters


def utf8(typed: str) -> str:
    """Text, which is UTF-8 whatever the locale makes Python take an argument for."""
    try:
        return os.fsencode(typed).decode("utf-8")
    except UnicodeDecodeError as error:  # a shell passes any bytes
        raise argparse.ArgumentTypeError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def whole(low: int) -> Callable[[str], int]:
    """A converter to an integer from ``low`` to the largest ``int`` of C."""
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


def number(*, above_zero: bool) -> Callable[[str], float]:
    """A converter to a finite number of 0 or more, such as seconds."""

    def convert(text: str) -> float:
        value = _float(text)
        if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            expected = "more than 0" if above_zero else "0 or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    return convert


def share(text: str) -> float:
    """A number between 0 and 1, neither of them included."""
    value = _float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, expected more than 0 and less than 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def layers_or_none(text: str) -> int | None:
    """A number of layers, or the word ``none``."""
    return None if text == "none" else whole(0)(text)


def layer_range(text: str) -> tuple[int, int]:
    """``START:STOP``; whether the model has such layers is checked where it is open."""
    start, colon, stop = text.partition(":")
    if not (colon and _is_count(start) and _is_count(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of layers, expected START:STOP")
    return int(start), int(stop)


def layer_counts(text: str) -> list[int]:
    """``N,N,...``: numbers of layers."""
    items = text.split(",")
    if not all(_is_count(item) for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of layers, such as 6,18,1")
    return [int(item) for item in items]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def endpoint(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``, both parts required."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def device_names(text: str) -> list[str]:
    """``NAME,NAME,...``: devices of this machine, and ``rpc://HOST[:PORT]`` for those of an RPC server."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or "rpc://" in names:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of devices, such as CPU,rpc://10.0.0.2:50052"
        )
    return names


def hop(text: str) -> str | None:
    """Where a worker reaches the next one: ``HOST:PORT``, :data:`NO_HOPS`, or None for ``same``."""
    if text in ("same", NO_HOPS):
        return None if text == "same" else text
    try:
        return host_port(*endpoint(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, and neither same nor none") from None


# ---- options of several commands


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``."""
    parser.add_argument("--json", action="store_true", help="as a JSON object")


def add_remote(group: argparse._ActionsContainer, what: str) -> None:
    """Declare ``--remote``, whose help is ``what``; :func:`~sllm.cli.addresses.worker_addresses` reads it."""
    group.add_argument("--remote", metavar="URI", nargs="?", const="", action="append", help=what)


def add_threads(group: argparse._ActionsContainer, *, models: int = 1) -> None:
    """Declare ``--threads``, for a command that computes with so many models."""
    of = " of each of the models" if models > 1 else ""
    group.add_argument("--threads", metavar="N", type=whole(1), help=f"CPU threads{of} (default: all cores)")


def add_gpu_layers(group: argparse._ActionsContainer, *, of: str = "", draft: bool = False) -> None:
    """Declare ``--n-gpu-layers``.

    Args:
        group: where it is declared.
        of: which model, where there are several, such as " of the target".
        draft: whether 0 keeps the draft from the GPUs, too.

    """
    neither = ", the draft neither" if draft else ""
    group.add_argument(
        "--n-gpu-layers",
        metavar="N",
        type=whole(0),
        help=f"layers{of} on GPUs; 0: nothing{neither} (default: all)",
    )


def add_engine_model(group: argparse._ActionsContainer) -> None:
    """Declare ``--engine-model``."""
    group.add_argument(
        "--engine-model", metavar="NAME", help="the model's name there (default: the first that it serves)"
    )


def add_worker(parser: argparse.ArgumentParser, *, several: bool = False, also: str = "") -> None:
    """Declare ``URI`` and ``--timeout``, of commands that ask a worker.

    Args:
        parser: of the command.
        several: whether it may be several workers.
        also: what else may be asked.

    """
    more = ". It may be several workers" if several else ""
    parser.add_argument("uri", metavar="URI", nargs="*" if several else "?", help=f"{URI}{more}{also}")
    seconds = number(above_zero=True)
    parser.add_argument("--timeout", metavar="SECONDS", type=seconds, default=10.0, help=DEFAULT)

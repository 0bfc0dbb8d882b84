"""Addresses and keys of workers and engines as they are given to the command line."""

from __future__ import annotations

import os
from pathlib import Path

from sllm.cli.arguments import ENGINE_KEY_VARIABLE, REMOTE_VARIABLE
from sllm.cli.console import CommandError

__all__ = ["engine_key", "worker_addresses"]


def engine_key() -> str | None:
    """The key of a serving engine, which the command line has no place for."""
    return os.environ.get(ENGINE_KEY_VARIABLE) or None


def worker_addresses(given: str | None) -> list[str]:
    """The addresses that ``URI``, ``@FILE`` or nothing on the command line stand for.

    Raises:
        CommandError: there is none; the message repeats nothing that may be a token.

    """
    text = given or os.environ.get(REMOTE_VARIABLE, "")
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
            f"there is no address of a worker: name its sllm:// line, @FILE with it, or set {REMOTE_VARIABLE}"
        )
    if not text.startswith("sllm://"):
        raise CommandError(
            "the address of a worker begins with sllm:// (the line that it printed) or @ (a file with it);"
            f" to use what {REMOTE_VARIABLE} holds, leave it out, and write --remote after the prompt"
        )
    return [text]

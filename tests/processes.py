"""Running the command line as a process: what its tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import time

ONE = ("--threads", "1")  # threads that wait by spinning starve each other where tests share the cores
PATIENCE = 10.0  # seconds; what a person gets is one, but not on a machine that does three other things

# Does not end of its own accord: a word for ever.
ENDLESS = 'root ::= "again " root\n'


def environment(**more: str) -> dict[str, str]:
    """The environment of a process whose warnings are errors, whose output is UTF-8 and in colour."""
    ours = ("NO_COLOR", "SLLM_DEBUG", "SLLM_REMOTE", "PYTHONUNBUFFERED")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {**kept, "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "utf-8", "TERM": "xterm", **more}


def one_line(stderr: str) -> str:
    """The one line of an error, without its beginning."""
    assert stderr.startswith("sllm: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    return stderr.removeprefix("sllm: ").removesuffix("\n")


def first_byte(process: subprocess.Popen[bytes]) -> bytes:
    """The first byte of its stdout and not one more, which ``communicate()`` would not see."""
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1)


def interrupt(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Send Ctrl-C; the process ends soon, with 130, and says nothing about it."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < PATIENCE
    assert process.returncode == 130, (process.returncode, stdout, stderr)
    assert b"Traceback" not in stderr
    return stdout.decode(), stderr.decode()


def read_terminal(controller: int) -> bytes:
    """What comes through a pseudo-terminal until its other side is closed; closes this side."""
    seen = b""
    try:
        while block := os.read(controller, 4096):
            seen += block
    except OSError:  # how Linux tells the end of a terminal
        pass
    finally:
        os.close(controller)
    return seen

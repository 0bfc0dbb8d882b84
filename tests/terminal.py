"""A program in a terminal of its own, with a person in front of it: keys in, what is shown out."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from processes import environment

if TYPE_CHECKING:
    import pathlib

    from typing_extensions import Self

ENTER, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\x03", "\x04", "\x1b\r"
PATIENCE = 60.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-_])")

# The pseudo-terminal becomes the controlling one, so that Ctrl-C is a signal.
_START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
{before}
from sllm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """``sllm`` with these arguments in a pseudo-terminal; a context manager that ends it.

    Args:
        folder: where it runs, and where it keeps its state.
        args: of the command line.
        before: code that runs first.
        more: variables of the environment.

    """

    def __init__(self, folder: pathlib.Path, *args: str, before: str = "", **more: str) -> None:
        self._controller, terminal = pty.openpty()
        env = environment(SLLM_STATE=str(folder / "state"), PROMPT_TOOLKIT_NO_CPR="1", **more)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(before=before), *args],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            cwd=folder,
            env=env,
        )
        os.close(terminal)
        self.raw = ""
        self._seen = 0  # up to where expect() has got

    @property
    def shown(self) -> str:
        """All that was shown, without colours and movements."""
        return _ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._controller, text.encode())

    def paste(self, text: str) -> None:
        """Paste as terminals do that mark what is pasted."""
        self.type("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def expect(self, words: str, patience: float = PATIENCE) -> str:
        """Wait until ``words`` are shown, after what was expected last; returns what comes before them."""
        until = time.monotonic() + patience
        while (at := self.shown.find(words, self._seen)) < 0:
            assert time.monotonic() < until, f"{words!r} was not shown after: {self.shown[self._seen :]!r}"
            assert self._read(0.1), f"it has ended without {words!r}: {self.shown[self._seen :]!r}"
        before = self.shown[self._seen : at]
        self._seen = at + len(words)
        return before

    def ended(self) -> int:
        """Wait for the end; returns the exit status."""
        until = time.monotonic() + PATIENCE
        while self._read(0.1):
            assert time.monotonic() < until, f"it does not end: {self.shown[self._seen :]!r}"
        return self.process.wait(PATIENCE)

    def _read(self, seconds: float) -> bool:
        """Take in what is shown within some seconds; whether the other side is still there."""
        if not select.select([self._controller], [], [], seconds)[0]:
            return True
        try:
            block = os.read(self._controller, 65536)
        except OSError:  # how Linux tells the end of a terminal
            return False
        self.raw += block.decode("utf-8", "replace")
        return bool(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._controller)

"""A Python process of our own that ends with this one: what may die without its caller runs in one."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO, Any

from sllm.engine.handle import Closing
from sllm.errors import SllmError

__all__ = ["Child", "ChildEndedError", "begin"]

log = logging.getLogger("sllm.rpc")

# The first line of stdin says what to run. The folder that -c has put first is not to be imported from: a
# checkout has a folder sllm/ that is not what is installed, and what lies in others is anybody's.
_BOOT = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import importlib, json
told = json.loads(sys.stdin.buffer.readline())
sys.path[:] = told["path"]
module, _, name = told["entry"].partition(":")
getattr(importlib.import_module(module), name)(told["parent"], **told["options"])
"""

_KEPT_LINES = 30


class ChildEndedError(SllmError, RuntimeError):
    """The process has ended; the message says how, and what it said last."""


class Child(Closing):
    """A process that calls ``entry`` (``"module:function"``) with the parent's process id and ``options``
    (JSON, or it is a TypeError). It ends when :meth:`close` is called and when this process ends, however
    that does: its stdin does, or its parent is another.

    The function begins by calling :func:`begin`, which returns how it tells things to :meth:`hear`.
    """

    def __init__(self, entry: str, options: dict[str, Any]) -> None:
        if not sys.executable:
            raise ChildEndedError("there is no Python to start: sys.executable is empty")
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._heard = b""
        path = [os.path.abspath(part) for part in sys.path]  # noqa: PTH100 - "" is the current folder
        told = {"path": path, "entry": entry, "parent": os.getpid(), "options": options}
        line = json.dumps(told).encode() + b"\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        self._closed = False
        super().__init__()
        # Nothing of the thread leads back to this object, or it could never be found forgotten.
        self._reader = threading.Thread(
            target=_read_stderr,
            args=(self._process.stderr, self._lines, self._process.pid),
            name="sllm-child",
            daemon=True,
        )
        self._reader.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # hear() tells
            self._process.stdin.write(line)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return not self._closed and self._process.poll() is None

    def has_ended(self, timeout: float) -> bool:
        """Whether it ends within ``timeout`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return not self.alive

    def hear(self, timeout: float | None = None) -> Any:
        """The next thing that the child tells.

        Raises:
            ChildEndedError: it has ended before.
            TimeoutError: nothing in ``timeout`` seconds.

        """
        assert self._process.stdout is not None
        until = None if timeout is None else time.monotonic() + timeout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            if not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError(f"the child process said nothing for {timeout:g} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise ChildEndedError(self.last_words())
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def last_words(self, timeout: float = 2.0) -> str:
        """How the child ended, and the line that it said last, in one line."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self._reader.join(timeout)
        code = self._process.returncode
        if code is None:
            how = "is still running"
        else:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        said = f": {self._lines[-1]}" if self._lines else ""
        return f"the process {self.pid} {how}{said}"

    def close(self) -> None:
        """End the child and wait until it is gone. More calls do nothing."""
        if self._closed or self._in_fork:
            return
        self._closed = True
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        process.stdout.close()
        process.stderr.close()

    def __repr__(self) -> str:
        return f"child process {self.pid}"


def _read_stderr(stderr: IO[bytes], lines: deque[str], pid: int) -> None:
    """Keep the last lines that a child writes, and log all."""
    rest = b""
    while data := stderr.read(65536):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            _note(line, lines, pid)
    _note(rest, lines, pid)


def _note(line: bytes, lines: deque[str], pid: int) -> None:
    text = line.decode("utf-8", "replace").strip()
    if text:
        lines.append(text)
        log.debug("%d: %s", pid, text)


class begin:  # noqa: N801 - a function with a memory
    """The child's side: from here on the process ends with its parent.

    ``tell(something)`` sends something (JSON) to :meth:`Child.hear`. What anything else writes to stdout goes
    to stderr, and so to the parent's log.

    Not by PR_SET_PDEATHSIG: that fires when the thread ends that started the child, and only on Linux. The
    parent's id is looked at as well as stdin, whose other end a fork of the parent may hold.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._stdout = os.dup(1)
        os.dup2(2, 1)
        threading.Thread(target=self._watch, name="sllm-lifeline", daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            if select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
                break
        os._exit(0)  # the main thread may be inside C for ever

    def tell(self, something: Any) -> None:
        """Send something to the parent."""
        os.write(self._stdout, json.dumps(something).encode() + b"\n")

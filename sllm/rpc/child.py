"""Child processes that end with this one, for code that may crash without taking its caller along."""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from sllm.engine.handle import Closing, join
from sllm.errors import ModelLoadError, RPCError, SllmError, UnsupportedModelError, VocabMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["MAX_MESSAGE", "Child", "ChildEndedError", "ParentLink", "error_of", "leave_no_core_file"]

log = logging.getLogger("sllm.rpc")

# The first line of stdin says what to run. The current folder, which -c puts first on the path, is removed:
# in a checkout it has a folder sllm/ that is not what is installed, and elsewhere it may hold anything.
_BOOT = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import importlib, json
start = json.loads(sys.stdin.buffer.readline())
sys.path[:] = start["path"]
module, _, name = start["entry"].partition(":")
getattr(importlib.import_module(module), name)(start["parent"], **start["options"])
"""

_KEPT_LINES = 30
_MAX_LINE = 1 << 16
"""Bytes of a line on stderr; a child that a client has got the better of writes what it likes."""

MAX_MESSAGE = 2000
"""Characters of an error or a line of a log; what goes through a pipe at once has 4096 bytes at most."""

_ERRORS: dict[str, type[Exception]] = {
    "RPCError": RPCError,
    "VocabMismatchError": VocabMismatchError,
    "UnsupportedModelError": UnsupportedModelError,
    "ModelLoadError": ModelLoadError,
    "PermissionError": PermissionError,
    "OSError": OSError,
    "ImportError": ImportError,
    "MemoryError": MemoryError,
    "TypeError": TypeError,
    "ValueError": ValueError,
}
"""Errors of a child that its parent raises as they are; those that others derive from come last."""


def error_of(message: Mapping[str, str]) -> Exception:
    """What the parent raises after :meth:`ParentLink.send_error`; an SllmError where the kind is another."""
    return _ERRORS.get(message["error"], SllmError)(message["message"])


class ChildEndedError(SllmError, RuntimeError):
    """The process has ended; the message says how, and the last line of its stderr."""


class Child(Closing):
    """A process that calls ``entry`` (``"module:function"``) with the parent's process id and ``options``.

    It ends when :meth:`close` is called and when this process ends in whatever way: its stdin is then at its
    end, or its parent is another. The function makes a :class:`ParentLink` first.

    Args:
        entry: what to call.
        options: its arguments, as JSON.
        environment: the child's variables; None: this process's.
        descriptors: that it shares under the same numbers, besides stdin, stdout and stderr.

    Raises:
        ChildEndedError: there is no Python to start.
        TypeError: ``options`` are not JSON.

    """

    def __init__(
        self,
        entry: str,
        options: dict[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        if not sys.executable:
            raise ChildEndedError("there is no Python to start: sys.executable is empty")
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._received = b""
        path = [os.path.abspath(part) for part in sys.path]  # noqa: PTH100 - "" is the current folder
        start = {"path": path, "entry": entry, "parent": os.getpid(), "options": options}
        line = json.dumps(start).encode() + b"\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        self._closed = False
        super().__init__()
        # The thread holds no reference to this object, which could otherwise never be collected.
        self._reader = threading.Thread(
            target=_read_stderr,
            args=(self._process.stderr, self._lines, self._process.pid),
            name="sllm-child",
            daemon=True,
        )
        self._reader.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # receive() raises
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

    def receive(self, timeout: float | None = None) -> Any:
        """The next message of the child.

        Raises:
            ChildEndedError: it has ended before sending one.
            TimeoutError: none came in ``timeout`` seconds.

        """
        assert self._process.stdout is not None
        until = None if timeout is None else time.monotonic() + timeout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            if not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError(f"the child process said nothing for {timeout:g} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise ChildEndedError(self.exit_reason())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def send(self, message: Any) -> None:
        """Send something that JSON can express to the child, which has sent something before: until then what
        starts it may read ahead. One that has ended gets nothing.
        """
        assert self._process.stdin is not None
        line = json.dumps(message).encode() + b"\n"
        with suppress(BrokenPipeError, ValueError):  # ValueError: closed meanwhile, by another thread
            self._process.stdin.write(line)

    def exit_reason(self, timeout: float = 2.0) -> str:
        """How the child ended, and the last line of its stderr, in one line."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        join(self._reader, timeout)
        code = self._process.returncode
        if code is None:
            how = "is still running"
        else:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        last = f": {self._lines[-1]}" if self._lines else ""
        return f"the process {self.pid} {how}{last}"

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
        join(self._reader)
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
            _keep_line(line, lines, pid)
        rest = rest[:_MAX_LINE]
    _keep_line(rest, lines, pid)


def _keep_line(line: bytes, lines: deque[str], pid: int) -> None:
    text = line.decode("utf-8", "replace").strip()
    if text:
        lines.append(text)
        log.debug("%d: %s", pid, text)


class ParentLink:
    """The child's side: ends the process with its parent, and sends messages to :meth:`Child.receive`.

    What else is written to stdout goes to stderr, and so to the parent's log.

    The parent is not watched by PR_SET_PDEATHSIG: that fires when the thread ends that started the child, and
    exists only on Linux. The parent's id is checked as well as stdin, whose other end a fork of the parent
    may hold open.

    Args:
        parent: the parent's process id.
        on_message: called with what :meth:`Child.send` sends, on a thread of the link.

    """

    def __init__(self, parent: int, on_message: Callable[[Any], object] = lambda _message: None) -> None:
        self._parent = parent
        self._on_message = on_message
        self._stdout = os.dup(1)
        os.dup2(2, 1)
        threading.Thread(target=self._watch, name="sllm-parent-watch", daemon=True).start()

    def _watch(self) -> None:
        rest = b""
        while os.getppid() == self._parent:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            data = os.read(0, 4096)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._on_message(json.loads(line))
        os._exit(0)  # the main thread may never return from C

    def send(self, message: Any) -> None:
        """Send something that JSON can express to the parent."""
        os.write(self._stdout, json.dumps(message).encode() + b"\n")

    def send_error(self, error: Exception) -> None:
        """Send an error for the parent to raise: its kind as ``"error"``, its text as ``"message"``."""
        name = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "SllmError")
        self.send({"error": name, "message": (str(error) or type(error).__name__)[:MAX_MESSAGE]})


def leave_no_core_file() -> None:
    """Let this process end without one: llama.cpp may call abort(), and gigabytes take longer than all the
    rest.
    """
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

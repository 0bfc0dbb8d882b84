"""A file with a line of JSON for each call: who called, how much it came to, how it ended. No text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from typing import Any

from sllm.engine.handle import join

__all__ = ["STDERR", "AccessLog"]

log = logging.getLogger("sllm.worker")

STDERR = "-"
"""In place of a file's name."""

_WAITING = 4096
"""Records that may wait for a slow disk; further ones are lost, and counted."""

_LAST_SECONDS = 2.0
"""How long :meth:`AccessLog.close` waits for the disk."""


class AccessLog:
    """Appends records to a file, on a thread of its own: a disk that is full or slow costs records, and
    nothing else.

    The file is opened again when another one, or none, is found under its name: whoever rotates it needs to
    tell nobody. It is created readable by its owner alone.

    Args:
        path: of the file; :data:`STDERR` is this process's stderr.

    Raises:
        OSError: the file cannot be opened.

    Attributes:
        lost: records that could not be written.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.lost = 0
        self._path = None if path == STDERR else os.fspath(path)
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._file = 2 if self._path is None else _opened(self._path)
        self._broken = False  # writing has failed, and that was logged
        self._torn = False  # the file ends in a part of a line
        self._thread = threading.Thread(target=self._run, name="sllm-access-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; never waits. From any thread."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what waits, and end; two seconds at most. More calls do nothing."""
        with contextlib.suppress(queue.Full):  # the thread hangs in a write
            self._records.put(None, timeout=_LAST_SECONDS)
        join(self._thread, _LAST_SECONDS)

    # ---- on the thread

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            self._take(record)
        if self._path is not None and self._file >= 0:
            os.close(self._file)

    def _take(self, record: dict[str, Any]) -> None:
        try:
            self._append(json.dumps(record).encode() + b"\n")
        except OSError as error:
            self.lost += 1
            if not self._broken:  # once, and not for each call while a disk is full
                log.warning("the access log cannot be written: %s", error.strerror or error)
            self._broken = True
        else:
            self._broken = False

    def _append(self, line: bytes) -> None:
        self._follow_rotation()
        data = b"\n" + line if self._torn else line
        n = os.write(self._file, data)
        self._torn = self._torn if n == 0 else data[n - 1 : n] != b"\n"
        if n < len(data):  # the disk is full; the next write says so
            n += os.write(self._file, data[n:])
            self._torn = n < len(data)
        if n < len(data):
            raise OSError(0, "only a part of a line was written")

    def _follow_rotation(self) -> None:
        if self._path is None:
            return
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):  # noqa: PTH116
                    return
            os.close(self._file)
            self._file = -1
        self._file, self._torn = _opened(self._path), False


def _opened(path: str) -> int:
    # O_NONBLOCK: a named pipe without a reader is an error, and not a wait.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)

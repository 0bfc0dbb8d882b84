"""Watches a worker from beside: a pass that hangs, and a certificate that was renewed."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sllm.engine.handle import join

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from sllm.worker.progress import Progress

__all__ = ["HUNG", "HardStop", "Watch", "end_process"]

log = logging.getLogger("sllm.worker")

HUNG = 70
"""The exit status of a process that ended because something in it did not: EX_SOFTWARE of ``sysexits.h``."""

_TICK_SECONDS = 1.0


def end_process(why: str) -> None:
    """End this process at once, with the status :data:`HUNG` and one line on stderr: no handler, finalizer or
    buffer of it can wait for what hangs. Children of :mod:`sllm.rpc` end by themselves when it is gone.
    """
    with suppress(OSError):
        os.write(2, f"sllm: {why}; the process ends\n".encode())
    os._exit(HUNG)


class HardStop:
    """Ends the process if what is to end in good order does not. A context manager around all that may hang;
    nothing happens before :meth:`arm`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._until: float | None = None
        self._over = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        """From now on the block has so many seconds to end, and no more than it had before."""
        until = time.monotonic() + seconds
        with self._changed:
            self._until = until if self._until is None else min(until, self._until)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sllm-hard-stop", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        with self._changed:
            while not self._over and self._until is not None:
                left = self._until - time.monotonic()
                if left <= 0:
                    end_process("it has not ended in the time for it")
                self._changed.wait(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._thread is not None:
            join(self._thread)


class Watch:
    """Looks once a second whether the step under way takes too long, on a thread of its own.

    Time that the whole process was stopped (a suspended machine, ``kill -STOP``) does not count: between two
    looks no more than two seconds pass for it.

    Args:
        progress: of the loop that is watched.
        on_change: called with whether a step hangs, whenever that changes, on the watch's thread.
        grace: seconds after which a step that hangs ends the process; None: it never does.
        chores: called at every look.

    Attributes:
        hung: whether the step under way takes longer than it may.

    """

    def __init__(
        self,
        progress: Progress,
        on_change: Callable[[bool], object],
        *,
        grace: float | None = None,
        chores: Callable[[], object] = lambda: None,
    ) -> None:
        self.hung = False
        self._progress = progress
        self._on_change = on_change
        self._grace = grace
        self._chores = chores
        self._over = threading.Event()
        self._step = 0  # the one that is timed
        self._seconds = 0.0  # that it has taken
        self._hung_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="sllm-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. More calls do nothing."""
        self._over.set()
        join(self._thread)

    def _run(self) -> None:
        limit = self._progress.limit
        waits = [limit] if limit is not None else []
        waits += [] if self._grace is None else [self._grace]
        tick = min([_TICK_SECONDS, *(max(seconds / 4, 0.01) for seconds in waits)])
        last = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            self._look(min(now - last, 2 * tick))
            last = now
            try:
                self._chores()
            except Exception:
                log.exception("a chore of the watch failed")

    def _look(self, passed: float) -> None:
        progress = self._progress
        step, under_way = progress.n_begun, progress.began is not None
        if not under_way or step != self._step:
            self._step, self._seconds, self._hung_seconds = step, 0.0, 0.0
        else:
            self._seconds += passed
        hung = under_way and self._seconds > progress.allowed
        if hung != self.hung:
            self.hung = hung
            if hung:
                log.error("a pass has taken %.0f s and counts as hung", self._seconds)
            else:
                log.warning("the pass that counted as hung has ended")
            self._on_change(hung)
        if not hung:
            return
        self._hung_seconds += passed
        if self._grace is not None and self._hung_seconds > self._grace:
            end_process(f"a pass has not ended in {self._seconds:.0f} s")

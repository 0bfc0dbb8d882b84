"""The lifetime of whatever holds a process, a port or memory outside Python: one base class."""

from __future__ import annotations

import atexit
import itertools
import os
import warnings
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from sllm.errors import ClosedError

if TYPE_CHECKING:
    import threading

    from typing_extensions import Self

__all__ = ["Closing", "join"]


class Closing:
    """Base of objects that are closed explicitly, and that only the process that made them may use.

    It gives them ``with``, an error for use after ``close()`` or in a forked child, and a ResourceWarning
    where one is forgotten. A subclass defines :attr:`closed`, :meth:`close` and ``__repr__``, and calls
    ``super().__init__()`` as soon as there is something to close: an object whose constructor fails before
    that is not complained about.
    """

    _current_pid = os.getpid()
    """Kept, since hot paths compare with it and a system call would take longer than the rest of them."""

    _pid = 0  # of the process that made this object; 0: its constructor has not finished

    _close_at_exit = True
    """Whether to close what is forgotten before the interpreter is taken down: a finalizer that runs later
    may wait for threads that are gone, or for one that cannot start any more. Objects of the C core need no
    thread of Python to be freed."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        if self._close_at_exit:
            _remember(self)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the object holds. Further calls, and calls in a forked child, do nothing."""
        raise NotImplementedError

    @property
    def _in_fork(self) -> bool:
        """Whether this process is a fork of the one that made the object."""
        return self._pid != Closing._current_pid

    def _check_open(self) -> None:
        """Raise if the object cannot be used any more.

        Raises:
            ClosedError: after ``close()``, or in a process forked after the object was made (threads, devices
                and connections do not survive a fork).

        """
        if self.closed:
            raise ClosedError(f"{type(self).__name__} is closed")
        if self._in_fork:
            raise ClosedError(
                f"{type(self).__name__} belongs to process {self._pid}"
                f" and was used in its fork {os.getpid()}; make a new one there"
            )

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close_forgotten()

    def _close_forgotten(self) -> None:
        if self._pid == os.getpid() and not self.closed:
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=3)
            finally:  # a filter may make an error of the warning
                self.close()


# ---- the end of the interpreter

_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Closing] = weakref.WeakValueDictionary()


def _remember(closing: Closing) -> None:
    number = next(_numbers)
    if number == 0:
        # Not on import: the last function registered runs first, and this one has to run before the core
        # shuts down.
        atexit.register(_close_all)
    _open[number] = closing


def _close_all() -> None:
    """Close what was left open, the newest first: it may use what is older.

    Threads that are no daemons have ended by now, and with them whatever they did with these objects.
    """
    for _, closing in sorted(_open.items(), key=lambda item: item[0], reverse=True):
        # Errors have nobody left to catch them, and the others are to be closed all the same. One that a
        # filter has made of the warning is such an error, too.
        with suppress(Exception):
            closing._close_forgotten()


def _after_fork() -> None:
    Closing._current_pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def join(thread: threading.Thread, timeout: float | None = None) -> None:
    """Wait for the end of a thread, for at most ``timeout`` seconds.

    Where Ctrl-C has come while it was being started there is nothing to wait for: ``Thread.join()`` would
    raise a RuntimeError in place of the KeyboardInterrupt, and leave open what was to be closed next.
    """
    if thread.ident is not None:
        thread.join(timeout)

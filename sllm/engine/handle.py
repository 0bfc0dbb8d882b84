"""The lifetime of whatever holds a process, a port or memory outside Python: one base class."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from sllm.errors import ClosedError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing"]


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

    def __init__(self) -> None:
        self._pid = os.getpid()

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
        if self._pid == os.getpid() and not self.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def _after_fork() -> None:
    Closing._current_pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

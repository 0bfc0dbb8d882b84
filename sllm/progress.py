"""Who is told how far something has come that takes its time: a load, a download, a measurement.

Whoever calls is told by the ``progress`` that it passes; otherwise nobody is, so that a program that embeds
the library has its terminal to itself. The commands ask for what nobody else is told (:func:`told_to`), and
show it.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Shares = Callable[[float], object]
    Watcher = Callable[[str], AbstractContextManager[Shares]]

__all__ = ["step", "told_to"]

_watcher: ContextVar[Watcher | None] = ContextVar("sllm_progress", default=None)


@contextmanager
def told_to(watcher: Watcher) -> Iterator[None]:
    """Within it, in this thread: what has no ``progress`` of its own is told to what ``watcher(what)`` gives
    when it begins.
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


@contextmanager
def step(what: str, progress: Shares | None) -> Iterator[Shares | None]:
    """Around something that takes its time: what is to be called with 0.0 .. 1.0, None for nothing.

    Args:
        what: in a few words, such as ``"loading model.gguf"``.
        progress: what the caller wants to be called; None: whoever watches.

    """
    watcher = _watcher.get()
    if progress is not None or watcher is None:
        yield progress
        return
    with watcher(what) as shares:
        yield shares

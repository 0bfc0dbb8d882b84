"""Signals that end a program: Ctrl-C for any command, and those that a server ends on in good order."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["INTERRUPTED", "ended_by_interrupt", "ending_signals", "interrupts_call", "uninterrupted"]

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C."""

_GRACE_SECONDS = 0.7
"""How long after a Ctrl-C the program may take to end in good order."""


@contextmanager
def ended_by_interrupt() -> Iterator[list[int]]:
    """Keep the promise that Ctrl-C ends the program within a second.

    Python raises KeyboardInterrupt between two steps of its own, and a load or a decode lets it do so now and
    then: nearly always the program ends in good order. A call that does not come back in time (megabytes to
    tokenize, a driver) is left where it is, and the process ends.

    Yields:
        The signals that have come, none at first: code that runs then may make another exception of the
        KeyboardInterrupt (the import of NumPy's core makes an ImportError), and that one is no error.

    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def interrupt(number: int, _frame: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGINT and not over.wait(_GRACE_SECONDS):
                    os._exit(INTERRUPTED)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="sllm-interrupts", daemon=True)
    watcher.start()
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # elsewhere it is ignored, or somebody's own
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)
        join(watcher)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait: in the middle of Popen() it would leave a child that nobody ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def interrupts_call(pressed: Callable[[], object]) -> Iterator[None]:
    """Let a Ctrl-C call ``pressed``, on the main thread between two steps of Python, and end nothing: what
    :func:`ended_by_interrupt` promises does not hold within.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGINT, lambda _number, _frame: pressed())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


@contextmanager
def ending_signals(*, watch_stdin: bool) -> Iterator[Callable[[float], int | None]]:
    """Hold back SIGINT, SIGTERM and SIGHUP; yields a function that waits for one of them.

    The function takes a timeout in seconds and returns the signal's number, or None after the timeout. With
    ``watch_stdin`` the end of stdin counts as SIGTERM: the program that started this one has ended.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = [reader, 0] if watch_stdin else [reader]

    def received(timeout: float) -> int | None:
        readable = select.select(watched, [], [], timeout)[0]
        if reader in readable:
            return os.read(reader, 1)[0]
        if 0 in readable and not os.read(0, 4096):
            watched.remove(0)
            return signal.SIGTERM
        return None

    before: dict[signal.Signals, Any] = {}
    # Where the caller has had them ignored (nohup, a shell script's background), they stay ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda _number, _frame: None)
    # From here on ended_by_interrupt() does not see them.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)

"""The compiled core: ``ffi`` and ``lib``, and what every call through them needs.

One table turns status codes into exceptions, one class owns a C object, and a few functions check arrays
before a pointer is taken. No other module imports ``sllm._core``.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import threading
from typing import TYPE_CHECKING, Any

from sllm.engine import cpu
from sllm.engine._cuda import missing_device, missing_library
from sllm.engine.handle import Closing
from sllm.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextFullError,
    InferenceError,
    ModelLoadError,
    SllmError,
    UnsupportedModelError,
)

cpu.choose()  # or UnsupportedCPUError: the extension may not even be loaded where its kernels cannot run
try:
    from sllm._core import ffi, lib
except ImportError as error:
    advice = missing_library(str(error))
    if advice is None:
        raise
    raise ImportError(advice, name=error.name, path=error.path) from error

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = [
    "Handle",
    "check",
    "checked_int",
    "checked_seconds",
    "ffi",
    "keep_exception",
    "lib",
    "read_text",
    "take_log",
    "unusable_backends",
]

log = logging.getLogger("sllm.llama_cpp")

unusable_backends: dict[str, str] = {}
"""Backends of this build that have no device here, and why, as far as llama.cpp's log has told."""

_ERRORS: dict[int, type[Exception]] = {
    lib.SLLM_ERR_INVALID: ValueError,
    lib.SLLM_ERR_LOAD: ModelLoadError,
    lib.SLLM_ERR_UNSUPPORTED: UnsupportedModelError,
    lib.SLLM_ERR_FULL: ContextFullError,
    lib.SLLM_ERR_BUSY: BusyError,
    lib.SLLM_ERR_CANCELLED: CancelledError,
    lib.SLLM_ERR_COMPUTE: InferenceError,
    lib.SLLM_ERR_NO_MEMORY: MemoryError,
    lib.SLLM_ERR_GRAMMAR: ValueError,
    lib.SLLM_ERR_INTERNAL: InferenceError,
    lib.SLLM_ERR_CLOSED: ClosedError,
}

# An exception that a callback from C raised on this thread, until the call that it stopped returns.
_raised = threading.local()


def keep_exception(_type: object, value: BaseException, _traceback: object) -> None:
    """What a callback raised is raised by :func:`check`, when the call that it stopped returns."""
    _raised.exception = value


@ffi.def_extern(name="sllm_py_interrupted", error=1, onerror=keep_exception)  # type: ignore[untyped-decorator]
def _interrupted(_user_data: object) -> int:
    # Running any bytecode on the main thread lets a pending signal handler run, KeyboardInterrupt's among
    # them; it then leaves this function as an exception. Other threads have no signals to wait for.
    return 0 if threading.current_thread() is threading.main_thread() else 2


@ffi.def_extern(name="sllm_py_progress", error=0, onerror=keep_exception)  # type: ignore[untyped-decorator]
def _progress(progress: float, user_data: object) -> int:
    callback: Callable[[float], Any] | None = ffi.from_handle(user_data)
    if callback is not None:
        callback(progress)
    return 1


lib.sllm_set_interrupt_callback(lib.sllm_py_interrupted, ffi.NULL)
atexit.register(
    lib.sllm_shutdown
)  # daemon threads may be inside the core, whose static objects exit() destroys


def check(status: int, about: str = "") -> None:
    """Raise the exception that ``status`` stands for, or return if it is SLLM_OK.

    An exception that a callback raised meanwhile (a progress callback, a signal handler) is raised as it is.
    """
    if status == lib.SLLM_OK:
        return
    exception = getattr(_raised, "exception", None)
    if exception is not None:
        _raised.exception = None
        raise exception
    text = ffi.string(lib.sllm_last_error()).decode("utf-8", "replace")
    raise _ERRORS.get(status, SllmError)(f"{about}: {text}" if about else text)


def _note_missing_device(line: str) -> None:
    """Tell, once, that ``line`` means that all is computed on the CPU, which llama.cpp does not say."""
    told = missing_device(line)
    if told is None or told[0] in unusable_backends:
        return
    name, why = told
    unusable_backends[name] = why
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # as whoever set it knows
    logging.getLogger("sllm").log(
        logging.INFO if hidden else logging.WARNING,
        "this build has %s, and it found no device here: %s",
        name,
        why,
    )


def take_log(*, expected: str | None = None) -> None:
    """Hand the lines that llama.cpp logged since the last call to ``sllm.llama_cpp``, without those
    that have the words ``expected``.
    """
    levels = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
    buffer = ffi.new("char[2048]")
    while level := lib.sllm_log_next(buffer, len(buffer)):
        text = ffi.string(buffer).decode("utf-8", "replace").rstrip()
        if text and (expected is None or expected not in text):
            log.log(levels.get(level, logging.INFO), "%s", text)
            _note_missing_device(text)
    wanted = log.getEffectiveLevel()
    lib.sllm_log_set_level(1 if wanted <= logging.DEBUG else 2 if wanted <= logging.INFO else 3)


def read_text(get: Callable[[Any, int], int]) -> str | None:
    """The text of a C getter that fills a buffer and returns the whole length, or None where it returns
    -1.
    """
    size = get(ffi.NULL, 0)
    if size < 0:
        return None
    buffer = ffi.new("char[]", size + 1)
    get(buffer, size + 1)
    text: bytes = ffi.string(buffer)
    return text.decode("utf-8", "replace")


def checked_int(value: Any, name: str, low: int = -(2**31), high: int = 2**31 - 1) -> int:
    """``value``, if it is an integer in ``low..high``.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {low} <= {name} <= {high}")
    return number


def checked_seconds(value: object, name: str) -> float:
    """``value``, if it is a number of seconds above 0 and below 1e6.

    Raises:
        ValueError: it is not.

    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < 1e6):
        raise ValueError(f"{name} is {value!r}, expected a number of seconds > 0")
    return float(value)


class Handle(Closing):
    """Owner of one C object: closed once, not used after that, and not used in a forked child.

    The object is freed with its last reference, so one that another thread has just passed to C outlives
    ``close()``.

    Args:
        pointer: the C object.
        free: frees it; called once, in the process that made it.

    """

    _close_at_exit = False

    def __init__(self, pointer: Any, free: Callable[[Any], object]) -> None:
        pid = os.getpid()

        def free_here(raw: Any) -> None:
            if os.getpid() == pid:
                free(raw)

        self._pointer = ffi.gc(pointer, free_here)
        super().__init__()

    @property
    def _live(self) -> Any:
        """The C pointer.

        Raises:
            ClosedError: after ``close()``, or in a process forked after the object was made.

        """
        pointer = self._pointer
        if pointer is None or self._pid != Closing._current_pid:
            self._check_open()
        return pointer

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._pointer is None

    def close(self) -> None:
        """Free what the object holds. More calls do nothing."""
        self._pointer = None

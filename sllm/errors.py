"""The exceptions that sllm raises.

Each one derives from :class:`SllmError` and from the builtin that a caller would catch for the same trouble,
so ``except OSError`` around a model load and ``except ConnectionError`` around a remote call work without
importing anything from here::

    SllmError
    +-- ModelLoadError          (OSError)              a file is missing, unreadable or not a model
    +-- VocabMismatchError      (ValueError)           target and draft do not share a vocabulary
    +-- ContextFullError        (RuntimeError)         the tokens do not fit; nothing was decoded
    +-- InferenceError          (RuntimeError)         llama.cpp could not compute a batch
    +-- CancelledError          (RuntimeError)         cancel() was called
    +-- BusyError               (RuntimeError)         in use by another thread, or no place is free
    +-- ClosedError             (ValueError)           used after close(), or in a forked process
    +-- RemoteError             (ConnectionError)      a worker cannot be reached, or answered with an error
    |   +-- AuthError           (PermissionError)      wrong token, or another certificate
    |   +-- RPCError                                   a ggml RPC server is lost or of another version
    +-- UnsupportedCPUError     (ImportError)          the CPU cannot run this build's kernels
    +-- BackendError            (ImportError)          a module with kernels is missing
    +-- UnsupportedModelError   (NotImplementedError)  the architecture cannot do this
    +-- LeakError               (RuntimeError)         something private was about to leave; it did not
"""

from __future__ import annotations

__all__ = [
    "AuthError",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ContextFullError",
    "InferenceError",
    "LeakError",
    "ModelLoadError",
    "RPCError",
    "RemoteError",
    "SllmError",
    "UnsupportedCPUError",
    "UnsupportedModelError",
    "VocabMismatchError",
]


class SllmError(Exception):
    """Base of every exception that sllm raises on its own account."""


class ModelLoadError(SllmError, OSError):
    """A model file is missing, unreadable or not a model; carries llama.cpp's own error lines."""


class VocabMismatchError(SllmError, ValueError):
    """Two models that must share a vocabulary do not; the message names the first token that differs."""


class ContextFullError(SllmError, RuntimeError):
    """The tokens do not fit into what is left of the context; nothing was decoded."""


class InferenceError(SllmError, RuntimeError):
    """llama.cpp could not compute a batch; the memory was put back to its committed length."""


class CancelledError(SllmError, RuntimeError):
    """``cancel()`` was called while a decode was under way; the memory is back at its committed length."""


class BusyError(SllmError, RuntimeError):
    """A second thread entered an object that serves one thread at a time."""


class ClosedError(SllmError, ValueError):
    """The object was used after ``close()``, or in a process forked after it was made."""


class RemoteError(SllmError, ConnectionError):
    """The remote side could not be reached, went away, or answered with an error."""


class AuthError(RemoteError, PermissionError):
    """The remote side refused the token, or its certificate does not have the pinned fingerprint."""


class RPCError(RemoteError):
    """A ggml RPC server could not be reached, speaks another protocol version, or went away.

    Attributes:
        tokens: where a text of an isolated :class:`~sllm.LocalTarget` was cut off: the ids that had been
            committed after the prompt, so that it can go on elsewhere after prompt and tokens.
        text: what they say.

    """

    tokens: tuple[int, ...] = ()
    text: str = ""


class UnsupportedCPUError(SllmError, ImportError):
    """The CPU lacks instructions that the build's kernels use; ``import sllm`` raises it before any of them
    runs.
    """


class BackendError(SllmError, ImportError):
    """A module with kernels is missing, or the dynamic linker does not take it."""


class UnsupportedModelError(SllmError, NotImplementedError):
    """The model's architecture cannot do what was asked of it."""


class LeakError(SllmError, RuntimeError):
    """Text about to leave the machine still holds something private; nothing was sent."""

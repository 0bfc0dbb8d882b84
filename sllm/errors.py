"""The exceptions that sllm raises.

Each one derives from :class:`SllmError` and from the builtin exception that a caller would expect for the
same problem, so ``except OSError`` around a model load and ``except ConnectionError`` around a remote call
work without importing anything from here::

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
    +-- UndecidedError          (ValueError)           an engine gives too few log-probabilities to select
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
    "UndecidedError",
    "UnsupportedCPUError",
    "UnsupportedModelError",
    "VocabMismatchError",
]


class SllmError(Exception):
    """Base class of all exceptions that sllm defines.

    Examples:
        >>> try:
        ...     sllm.Model("nothing.gguf")
        ... except sllm.SllmError as error:
        ...     print(type(error).__name__, isinstance(error, OSError))
        ModelLoadError True

    """


class ModelLoadError(SllmError, OSError):
    """A model file is missing, unreadable or not a model; carries llama.cpp's own error lines.

    Examples:
        >>> sllm.Model("nothing.gguf")
        Traceback (most recent call last):
            ...
        sllm.errors.ModelLoadError: nothing.gguf does not exist, expected a GGUF file

    """


class VocabMismatchError(SllmError, ValueError):
    """Two models that must share a vocabulary do not; the message names the first token that differs.

    Examples:
        >>> with sllm.Model(sllm.embedded.DRAFT) as model:
        ...     try:
        ...         model.vocab.check_same(model.vocab)
        ...         print("the same")
        ...     except sllm.VocabMismatchError as error:
        ...         print(error)  # names the first token that differs
        the same

    """


class ContextFullError(SllmError, RuntimeError):
    """The tokens do not fit into what is left of the context; nothing was decoded.

    Examples:
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, model.context(n_ctx=256) as context:
        ...     try:
        ...         context.decode([5] * 257)
        ...     except sllm.ContextFullError as error:
        ...         print(str(error).partition(":")[0])
        257 tokens at position 0 do not fit

    """


class InferenceError(SllmError, RuntimeError):
    """llama.cpp could not compute a batch; the memory was put back to its committed length.

    Examples:
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, model.context(n_ctx=64) as context:
        ...     none = {token: -float("inf") for token in range(model.vocab.n_tokens)}
        ...     try:
        ...         context.verify([0], [5], sampling=sllm.SamplingParams(logit_bias=none))
        ...     except sllm.InferenceError as error:
        ...         print(str(error).partition(":")[0])
        no token can be selected

    """


class CancelledError(SllmError, RuntimeError):
    """``cancel()`` was called during a decode; the memory is back at its committed length.

    Examples:
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, model.context(n_ctx=64) as context:
        ...     context.cancel()  # a call that another thread is inside would raise it; here there is none
        ...     context.decode([5, 6])

    """


class BusyError(SllmError, RuntimeError):
    """A second thread entered an object that serves one thread at a time; or a worker has no free place for a
    text, or the user of a token has reached a limit.

    Attributes:
        retry_after: seconds after which a retry may succeed, if known; else None.

    Examples:
        >>> with sllm.LocalTarget(sllm.embedded.DRAFT) as target:
        ...     with sllm.generate(target, "Once"):
        ...         try:
        ...             sllm.generate(target, "Twice")
        ...         except sllm.BusyError as error:
        ...             print(str(error).partition(";")[0])
        this target has a generation open

    """

    retry_after: float | None = None


class ClosedError(SllmError, ValueError):
    """The object was used after ``close()``, or in a process forked after it was made.

    Examples:
        >>> model = sllm.Model(sllm.embedded.DRAFT)
        >>> model.close()
        >>> model.vocab.encode("Once")
        Traceback (most recent call last):
            ...
        sllm.errors.ClosedError: Model is closed

    """


class RemoteError(SllmError, ConnectionError):
    """The remote side could not be reached, went away, or answered with an error.

    Examples:
        >>> try:
        ...     sllm.connect("sllm://127.0.0.1:1#insecure", timeout=0.5)
        ... except sllm.RemoteError:
        ...     print("nobody there")
        nobody there

    """


class AuthError(RemoteError, PermissionError):
    """The remote side refused the token, or its certificate does not have the pinned fingerprint.

    Examples:
        >>> with sllm.Worker(sllm.embedded.DRAFT, token="the-right-token-of-it") as worker:
        ...     try:
        ...         sllm.connect(worker.uri.replace("the-right", "the-wrong"))
        ...     except sllm.AuthError as error:
        ...         print("refused" if "token" in str(error) else error)
        refused

    """


class RPCError(RemoteError):
    """A ggml RPC server could not be reached, speaks another protocol version, or went away.

    Attributes:
        tokens: if a text of an isolated :class:`~sllm.LocalTarget` was interrupted: the ids committed after
            the prompt. Another target can continue the text after prompt and tokens.
        text: the text of these tokens.

    Examples:
        >>> try:
        ...     sllm.rpc.add_server("127.0.0.1:1")
        ... except sllm.RPCError as error:
        ...     print("nothing listens there" in str(error))
        True

    """

    tokens: tuple[int, ...] = ()
    text: str = ""


class UnsupportedCPUError(SllmError, ImportError):
    """The CPU lacks instructions that the build's kernels use; ``import sllm`` raises it before any of them
    runs.

    Examples:
        >>> issubclass(sllm.UnsupportedCPUError, ImportError)
        True

    """


class BackendError(SllmError, ImportError):
    """A module with kernels is missing, or the dynamic linker cannot load it.

    Examples:
        >>> issubclass(sllm.BackendError, ImportError)
        True

    """


class UnsupportedModelError(SllmError, NotImplementedError):
    """The model's architecture cannot do what was asked of it.

    Examples:
        >>> with sllm.LayerRange(sllm.embedded.DRAFT, 0, 1) as layers:
        ...     try:
        ...         layers.context.decode([5])
        ...     except sllm.UnsupportedModelError as error:
        ...         print(str(error).partition(":")[0])
        these layers end before the model's output

    """


class UndecidedError(SllmError, ValueError):
    """A serving engine returns too few log-probabilities of a position for these sampling parameters: a token
    that is not among them might be the one to select. Nothing is guessed.

    Examples:
        >>> issubclass(sllm.UndecidedError, ValueError)
        True

    """


class LeakError(SllmError, RuntimeError):
    """Text about to leave the machine still holds something private; nothing was sent.

    Examples:
        >>> vault = sllm.Vault()
        >>> masked = vault.mask("Call 13800138000.")
        >>> try:
        ...     sllm.privacy.egress_check("Call 1380 0138 000.", vault)
        ... except sllm.LeakError:
        ...     print("stays here")
        stays here

    """

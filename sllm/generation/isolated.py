"""A model in a process of its own, so that what kills that process does not kill this one."""

from __future__ import annotations

import os
import resource
import tempfile
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from sllm.engine.devices import Device, server_of
from sllm.engine.model import Model
from sllm.errors import AuthError, ModelLoadError, RemoteError, RPCError, SllmError, UnsupportedModelError
from sllm.remote.connection import connect
from sllm.remote.target import RemoteGeneration, RemoteTarget
from sllm.rpc.child import Child, ChildEndedError, begin

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams

__all__ = ["IsolatedGeneration", "IsolatedTarget"]

_LOST_STATUS = 75
"""Exit status of a process that has lost an RPC server; its last words say which and how."""

_KEEPALIVE_SECONDS = 10.0
"""For a child that hangs as a whole."""

_ERRORS: dict[str, type[Exception]] = {
    "ModelLoadError": ModelLoadError,
    "UnsupportedModelError": UnsupportedModelError,
    "RPCError": RPCError,
    "ValueError": ValueError,
    "TypeError": TypeError,
    "MemoryError": MemoryError,
}
"""What a load in the child may fail with, and is raised as here."""


class IsolatedTarget(RemoteTarget):
    """A model in a child process, which is a worker for this process alone: on loopback, by TLS and a random
    token, since other users of the machine can reach its port.

    Args:
        path: the model's file, of this machine.
        model_options, context_options: as for :class:`~sllm.Model` and :class:`~sllm.Context`, JSON but for
            the devices.
        deadline: seconds for which an RPC server may owe an answer.

    Raises:
        RPCError: an RPC server is not there, or was lost during the load.
        ModelLoadError, UnsupportedModelError, ValueError, TypeError, MemoryError: as for Model and Context.

    """

    def __init__(
        self,
        path: Path,
        model_options: dict[str, Any],
        context_options: dict[str, Any],
        *,
        deadline: float,
    ) -> None:
        devices: Sequence[Device | str] | None = model_options.get("devices")
        self._described: dict[str, str] = {}  # endpoints that say nothing of where they lead to
        if devices is not None:
            for device in devices:
                if isinstance(device, Device) and device.endpoint not in (None, *device.description.split()):
                    self._described[str(device.endpoint)] = device.description
            names = [device.name if isinstance(device, Device) else device for device in devices]
            model_options = {**model_options, "devices": names}
        if model_options.get("tensor_split") is not None:
            split = [float(part) for part in model_options["tensor_split"]]
            model_options = {**model_options, "tensor_split": split}
        with ExitStack() as stack:
            # Vocabulary and metadata, without the weights.
            self.model = stack.enter_context(Model(path, vocab_only=True))
            # The folder holds token and certificate, which a running worker does not look at again.
            with tempfile.TemporaryDirectory(prefix="sllm-isolated-") as state:
                options = {
                    "path": str(path),
                    "state": state,
                    "model_options": model_options,
                    "context_options": context_options,
                    "deadline": deadline,
                }
                self._child = stack.enter_context(Child("sllm.generation.isolated:_serve", options))
                uri = self._hear(path)
            try:
                remote = stack.enter_context(
                    connect(uri, on_loss="raise", timeout=30, keepalive=_KEEPALIVE_SECONDS)
                )
            except RemoteError as error:
                raise RPCError(f"{path.name}: {error}; {self._child.last_words()}") from error
            remote.vocabulary.adopt(self.model)  # closed with it
            self._closing = stack.pop_all()
        super().__init__(remote)

    def _hear(self, path: Path) -> str:
        """The worker's address, once the model is loaded."""
        try:
            told = self._child.hear()
        except ChildEndedError:
            raise RPCError(f"{path.name}: {self.last_words()}") from None
        if "error" in told:
            raise _ERRORS.get(told["error"], SllmError)(told["message"])
        uri: str = told["uri"]
        return uri

    @property
    def pid(self) -> int:
        """The process id of the child."""
        return self._child.pid

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> IsolatedGeneration:
        """See :meth:`~sllm.targets.base.Target.open`.

        Raises:
            RPCError: the child has ended.
            ContextFullError, ValueError: as for RemoteTarget.

        """
        prompt = self.checked_prompt(tokens)
        self.model.compiled(sampling)  # a bad grammar is told here, as by a target in this process
        if not self._child.alive:
            raise RPCError(f"{self.model.path.name}: {self.last_words()}; make a new target")
        return IsolatedGeneration(self, prompt, sampling, max_tokens)

    def last_words(self) -> str:
        """Why the child has ended."""
        words = self._child.last_words()
        # The sentence alone, where it has ended by itself and says why.
        words = words.partition(f"ended with status {_LOST_STATUS}: ")[2] or words
        known = [text for endpoint, text in self._described.items() if f" {endpoint} " in words]
        return f"{words} ({known[0]})" if known else words

    def close(self) -> None:
        """Hang up and end the child. More calls do nothing."""
        self._closing.close()

    def __repr__(self) -> str:
        return f"<isolated {self.model.path.name!r} in process {self._child.pid}>"


class IsolatedGeneration(RemoteGeneration):
    """A text of an :class:`IsolatedTarget`: what ends the child is raised as RPCError."""

    def __init__(
        self,
        target: IsolatedTarget,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._target = target
        super().__init__(target, prompt, sampling, max_tokens)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, RemoteError) and not isinstance(error, (AuthError, RPCError)):
            error = self._as_loss(error)
        # What the child refuses begins with its address, which means nothing to the caller.
        _, prefix, text = str(error).partition(f"{self._link.endpoint}: ")
        if prefix and str(error).startswith(prefix):
            error = type(error)(f"{self._target.model.path.name}: {text}")
        super()._fail(error)

    def _as_loss(self, error: RemoteError) -> RPCError:
        target, tokens = self._target, tuple(self._text[self._start :])
        alive = target._child.alive and not target._child.has_ended(1.0)
        why = str(error) if alive else target.last_words()
        loss = RPCError(
            f"{target.model.path.name}: {why}; {len(tokens)} tokens had been committed, see .tokens and .text"
        )
        loss.tokens, loss.text = tokens, self._vocab.decode(list(tokens))
        return loss


# ---- the child


def _serve(
    parent: int,
    *,
    path: str,
    state: str,
    model_options: dict[str, Any],
    context_options: dict[str, Any],
    deadline: float,
) -> None:
    """What the child process runs."""
    ours = begin(parent)
    from sllm.rpc.front import Front
    from sllm.worker.server import Limits, Worker

    with suppress(ValueError, OSError):
        # llama.cpp may end in abort(), and a core file of gigabytes would take longer than all the rest.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def lost(reason: str) -> None:
        os.write(2, reason.encode("utf-8", "replace") + b"\n")
        os._exit(_LOST_STATUS)

    fronts: dict[str, Front] = {}
    names = model_options.get("devices")
    try:
        if names is not None:
            for i, name in enumerate(names):
                server = server_of(name)
                if server is None:
                    continue
                index, endpoint = server
                if endpoint not in fronts:
                    fronts[endpoint] = Front(endpoint, deadline=deadline, on_loss=lost)
                names[i] = f"RPC{index}[{fronts[endpoint].endpoint}]"
        model = Model(path, **model_options)
        limits = Limits(sessions=1, queue=4, max_grammar=1 << 17, hints_per_s=1 << 20, idle_seconds=1e8)
        worker = Worker(model, state=state, limits=limits, **context_options)
    except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
        ours.tell({"error": _kind(error), "message": str(error) or type(error).__name__})
        os._exit(1)
    ours.tell({"uri": worker.uri})
    worker.wait()  # for ever: the process ends with its parent


def _kind(error: Exception) -> str:
    return next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "SllmError")

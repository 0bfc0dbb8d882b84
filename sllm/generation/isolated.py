"""A model in a child process, so that a crash there does not end this process."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sllm.engine.devices import Device
from sllm.engine.model import Model
from sllm.errors import AuthError, RemoteError, RPCError
from sllm.remote.connection import connect
from sllm.remote.target import RemoteGeneration, RemoteTarget
from sllm.rpc.child import Child, ChildEndedError, ParentLink, error_of, leave_no_core_file
from sllm.rpc.front import through_fronts
from sllm.worker.passes import Limits
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams

__all__ = ["IsolatedGeneration", "IsolatedTarget"]

_LOST_STATUS = 75
"""Exit status of a child that has lost an RPC server; the last line of its stderr says which and how."""

_KEEPALIVE_SECONDS = 10.0
"""Between pings, which notice a child that hangs as a whole."""


_ENDING_SECONDS = 5.0
"""For a child whose connection has ended to be gone: a busy machine takes its time to clear it away."""


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
        self._descriptions: dict[str, str] = {}  # of endpoints that do not say where they lead to, as relays
        if devices is not None:
            for device in devices:
                if isinstance(device, Device) and device.endpoint not in (None, *device.description.split()):
                    self._descriptions[str(device.endpoint)] = device.description
            names = [device.name if isinstance(device, Device) else device for device in devices]
            model_options = {**model_options, "devices": names}
        if model_options.get("tensor_split") is not None:
            split = [float(part) for part in model_options["tensor_split"]]
            model_options = {**model_options, "tensor_split": split}
        with ExitStack() as stack:
            # Vocabulary and metadata, without the weights.
            self.model = stack.enter_context(Model(path, vocab_only=True))
            # The folder holds token and certificate, which a running worker does not read again.
            with tempfile.TemporaryDirectory(prefix="sllm-isolated-") as state:
                options = {
                    "path": str(path),
                    "state": state,
                    "model_options": model_options,
                    "context_options": context_options,
                    "deadline": deadline,
                }
                self._child = stack.enter_context(Child("sllm.generation.isolated:_serve", options))
                uri = self._receive_uri(path)
            try:
                remote = stack.enter_context(
                    connect(uri, on_loss="raise", timeout=30, keepalive=_KEEPALIVE_SECONDS)
                )
            except RemoteError as error:
                raise RPCError(f"{path.name}: {error}; {self._child.exit_reason()}") from error
            remote.vocabulary.adopt(self.model)  # closed with it
            self._closing = stack.pop_all()
        super().__init__(remote)

    def _receive_uri(self, path: Path) -> str:
        """The worker's address, once the model is loaded."""
        try:
            reply = self._child.receive()
        except ChildEndedError:
            raise RPCError(f"{path.name}: {self.exit_reason()}") from None
        if "error" in reply:
            raise error_of(reply)
        uri: str = reply["uri"]
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
        self.model.compiled(sampling)  # reject a bad grammar here, as a target in this process does
        if not self._child.alive:
            raise RPCError(f"{self.model.path.name}: {self.exit_reason()}; make a new target")
        return IsolatedGeneration(self, prompt, sampling, max_tokens)

    def exit_reason(self) -> str:
        """Why the child has ended."""
        reason = self._child.exit_reason()
        # Only the sentence of lost(), where that has ended it.
        reason = reason.partition(f"ended with status {_LOST_STATUS}: ")[2] or reason
        known = [text for endpoint, text in self._descriptions.items() if f" {endpoint} " in reason]
        return f"{reason} ({known[0]})" if known else reason

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
            error = self._as_rpc_error(error)
        # The child's errors begin with its address, which means nothing to the caller.
        _, prefix, text = str(error).partition(f"{self._link.endpoint}: ")
        if prefix and str(error).startswith(prefix):
            error = type(error)(f"{self._target.model.path.name}: {text}")
        super()._fail(error)

    def _as_rpc_error(self, error: RemoteError) -> RPCError:
        target, tokens = self._target, tuple(self._text[self._start :])
        alive = target._child.alive and not target._child.has_ended(_ENDING_SECONDS)
        why = str(error) if alive else target.exit_reason()
        loss = RPCError(
            f"{target.model.path.name}: {why}; {len(tokens)} tokens had been committed, see .tokens and .text"
        )
        loss.tokens, loss.text = tokens, self._vocab.decode(tokens, goes_on=True)
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
    link = ParentLink(parent)
    leave_no_core_file()

    def lost(reason: str) -> None:
        os.write(2, reason.encode("utf-8", "replace") + b"\n")
        os._exit(_LOST_STATUS)

    try:
        if model_options.get("devices") is not None:
            model_options["devices"], _fronts = through_fronts(
                model_options["devices"], deadline=deadline, on_loss=lost
            )
        model = Model(path, **model_options)
        limits = Limits(sessions=1, queue=4, max_grammar=1 << 17, hints_per_s=1 << 20, idle_seconds=1e8)
        worker = Worker(model, mtp=False, state=state, limits=limits, **context_options)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        link.send_error(error)
        os._exit(1)
    link.send({"uri": worker.uri})
    worker.wait()  # forever: the process ends with its parent

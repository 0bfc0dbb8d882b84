"""What answers at a worker's port while the process with its model is away."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from sllm.engine.handle import Closing
from sllm.errors import ClosedError
from sllm.extras import needs
from sllm.wire.protocol import SERVICE, abort
from sllm.worker.access_log import AccessLog
from sllm.worker.calls import Calls
from sllm.worker.certificate import Certificate
from sllm.worker.open_port import NO_ACCESS_CONTROL, Offer, access_of, listen
from sllm.worker.service import Health
from sllm.worker.users import Users

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    import os

    from sllm.worker.monitoring import Monitoring
    from sllm.worker.passes import Limits

__all__ = ["Standby"]

_MAX_BYTES = 16 << 20
"""Of a message: more than the longest prompt takes, which is to be refused for what the reason says."""


class Standby(Closing):
    """Refuses every call with the token by what :attr:`reason` says, in the status for which clients come
    again or go elsewhere (UNAVAILABLE); its health is that of a worker that takes no texts.

    Args:
        model_name: for the figures and the access log.
        host, port: the worker's.
        token, tokens, certificate, state, insecure: as for :class:`~sllm.Worker`.
        limits: how many connections there may be.
        monitoring: where figures and the access log are wanted.
        reason: why the worker is away.

    Raises:
        OSError: the address is in use, or a file cannot be read.
        PermissionError: other users of this machine may read or replace the key or the token.

    Attributes:
        reason: what clients are told; it may be set anew.

    """

    def __init__(
        self,
        model_name: str,
        *,
        host: str,
        port: int,
        token: str | None,
        tokens: str | os.PathLike[str] | None,
        certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None,
        state: str | os.PathLike[str] | None,
        insecure: bool,
        limits: Limits,
        monitoring: Monitoring,
        reason: str,
    ) -> None:
        self.reason = reason
        self._closed = False
        access = NO_ACCESS_CONTROL if insecure else access_of(token, tokens, certificate, state)
        health = Health()
        health.set(serving=False)
        with ExitStack() as stack:
            users = Users(access.token, access.tokens, open_to_all=insecure)
            stack.callback(users.close)
            log = None
            if monitoring.access_log is not None:
                log = AccessLog(monitoring.access_log)
                stack.callback(log.close)
            calls = Calls(model_name, log, users.name_of)
            if monitoring.metrics is not None:
                from sllm.worker.metrics import FiguresAway, MetricsServer  # needs an extra

                stack.callback(MetricsServer(*monitoring.metrics, FiguresAway({"model": model_name})).close)
            shown = None if access.certificate is None else Certificate(*access.certificate, certificate)
            offer = Offer(_Refusals(self._refuse), limits, _MAX_BYTES)
            listen(offer, health, calls, users, access, shown, host, port, stack)
            self._stack = stack.pop_all()
        super().__init__()

    def _refuse(self, _requests: Any, context: grpc.ServicerContext) -> NoReturn:
        abort(context, ClosedError(self.reason))

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Give the port free. More calls do nothing."""
        if self._closed or self._in_fork:
            return
        self._closed = True
        self._stack.close()

    def __repr__(self) -> str:
        return f"<standby: {self.reason}>"


class _Refusals(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """One handler for all methods of the protocol, whatever they take and return."""

    def __init__(self, refuse: Any) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(refuse)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See :class:`grpc.GenericRpcHandler`."""
        return self._handler if handler_call_details.method.startswith(f"/{SERVICE}/") else None

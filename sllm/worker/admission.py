"""Which calls with the token are answered, and what the open port hears of them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sllm.errors import BusyError
from sllm.extras import needs
from sllm.wire.protocol import abort
from sllm.worker.calls import behaviour_of, handler_like

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.worker.listener import Listener

__all__ = ["Admission"]


class Admission:
    """Bounds how many calls with the token are answered at once, and tells the listener whose they are.

    gRPC has a bound of its own, but it counts every call, also those without the token.

    Args:
        n_calls: answered at once.
        listener: carries the connections that calls come over; None: gRPC listens itself.

    """

    def __init__(self, n_calls: int, listener: Listener | None) -> None:
        self._n_calls = n_calls
        self._listener = listener
        self._lock = threading.Lock()
        self._n_running = 0

    def refuse(self, peer: str) -> None:
        """A call without the token came from ``peer`` (:meth:`grpc.ServicerContext.peer`)."""
        if self._listener is not None:
            self._listener.refuse(peer)

    def guarded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that does what ``handler`` does where the call is admitted."""
        run = behaviour_of(handler)

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with self._admitted(context):
                return run(request, context)

        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._admitted(context):
                yield from run(request, context)

        behaviour = answers if handler.response_streaming else answer
        return handler_like(handler, behaviour, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _admitted(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold one of the places for calls; ends the call where there is none."""
        if self._listener is not None and not self._listener.admit(context.peer()):
            abort(context, BusyError("the worker has as many connections as it takes"))
        with self._lock:
            full = self._n_running >= self._n_calls
            self._n_running += not full
        if full:
            abort(context, BusyError(f"the worker answers {self._n_calls} calls at once, and has them"))
        try:
            yield
        finally:
            with self._lock:
                self._n_running -= 1

"""The worker's end of a relay: an RPC server that no port leads to, and calls that carry its connections."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import Closing
from sllm.errors import BusyError, RPCError
from sllm.rpc.cache import DEFAULT_BYTES
from sllm.rpc.loopback import shut_down
from sllm.rpc.pieces import pieces
from sllm.rpc.server import RPCServer
from sllm.wire.protocol import abort, forget, pb

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    import grpc

    from sllm.rpc.confine import Confinement

__all__ = ["Relay"]

log = logging.getLogger("sllm.worker")

_TURN_SECONDS = 5.0
"""How long a connection waits until the previous one, which its client has just closed, has ended."""


class Relay(Closing):
    """An RPC server that one client at a time reaches through ``Relay`` of ``sllm.proto``, and nobody else.

    A client can crash the server, which is a process of its own; whoever has had memory there takes it along,
    and the next one gets another.

    Args:
        n_threads: CPU threads of the server; None: all cores.
        cache_size: bytes of the weights that it keeps.

    """

    def __init__(self, n_threads: int | None, cache_size: int = DEFAULT_BYTES) -> None:
        self._n_threads = n_threads
        self._cache_size = cache_size
        self._lock = threading.Lock()  # guards _server and _closed
        self._turn = threading.Lock()  # held by the connection that uses the server
        self._closed = False
        self._server = self._start()
        super().__init__()

    def _start(self) -> RPCServer:
        return RPCServer(port=None, n_threads=self._n_threads, cache_size=self._cache_size, one_client=True)

    @property
    def confinement(self) -> Confinement:
        """What keeps the server's process from doing more than it should."""
        return self._server.confinement

    def _running(self) -> RPCServer:
        with self._lock:
            if self._closed:
                raise RPCError("the worker is ending")
            if not self._server.alive:
                log.debug("starting an RPC server for the next client")
                self._server.close()
                self._server = self._start()
            return self._server

    def serve(
        self, requests: Iterator[pb.Piece | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.Piece]:
        """Carry one connection to the server over one call."""
        if not self._turn.acquire(timeout=_TURN_SECONDS):
            abort(context, BusyError("the RPC server serves another client, and takes one at a time"))
        try:
            # Before the process is done with this connection it is not known whether it serves another.
            connection = self._running().connect(on_done=self._turn.release)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status
            self._turn.release()
            trouble = error if isinstance(error, RPCError) else RPCError(f"no RPC server: {error}")
            abort(context, trouble)
        over = _HangUp(connection)
        if not context.add_callback(over):
            over()
            return
        threading.Thread(target=_send_up, args=(requests, connection), name="sllm-relay", daemon=True).start()
        try:
            yield from pieces(connection)
        finally:
            over()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the server. More calls do nothing."""
        if self._in_fork:
            return
        with self._lock:
            self._closed = True
            self._server.close()

    def __repr__(self) -> str:
        return f"<relay to {self._server!r}>"


class _HangUp:
    """Closes the connection when it is first called: at the end of the call or of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._done = False

    def __call__(self) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
        shut_down(self._connection)
        self._connection.close()


def _send_up(requests: Iterator[Any], connection: socket.socket) -> None:
    """Send to the server what the client sends, until the call ends: one piece at a time, so that a server
    that is slow to read holds up the client instead of filling memory.
    """
    try:
        for piece in requests:
            if not isinstance(piece, pb.Piece):
                break
            connection.sendall(piece.data)
        connection.shutdown(socket.SHUT_WR)
    except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
        log.debug("a relay's client went away: %s", type(forget(error)).__name__)
        shut_down(connection)

"""A client's end of a relay: a loopback port that leads to the RPC server of a worker."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import join
from sllm.errors import RemoteError
from sllm.extras import needs
from sllm.rpc.loopback import LOOPBACK, LoopbackPort, shut_down
from sllm.rpc.pieces import pieces
from sllm.wire.protocol import RELAY_OPTIONS, failure, method, pb

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from sllm.remote.link import WorkerLink

__all__ = ["RelayEnd"]

log = logging.getLogger("sllm.remote")


class RelayEnd:
    """Listens on loopback, and carries each connection over a separate stream (``Relay`` in
    ``sllm.proto``), on a channel that it does not share with texts.

    No token is needed here: see :class:`~sllm.rpc.loopback.LoopbackPort` for who can use the port.

    Args:
        link: to the worker.

    Raises:
        AuthError, RemoteError: the worker cannot be reached, or has another certificate.

    Attributes:
        port: where it listens, on 127.0.0.1.
        error: why the last stream was refused or has broken; None: it has not.

    """

    host = LOOPBACK

    def __init__(self, link: WorkerLink) -> None:
        self._worker = link.endpoint
        self._metadata = link.metadata
        self._channel = link.open_channel(link.timeout, RELAY_OPTIONS)
        self._stub = self._channel.stream_stream(
            method("Relay"), pb.Piece.SerializeToString, pb.Piece.FromString
        )
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._under_way: dict[socket.socket, Any] = {}  # connection -> its call, or None before that
        self._threads: set[threading.Thread] = set()
        self.error: Exception | None = None
        self._port = LoopbackPort(self._take, "sllm-relay-port")
        self.port: int = self._port.port

    @property
    def endpoint(self) -> str:
        """``HOST:PORT``, for :func:`sllm.rpc.add_server`."""
        return self._port.endpoint

    def _take(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._carry, args=(connection,), name="sllm-relay-connection", daemon=True
        )
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._under_way[connection] = None
            self._threads.add(thread)
        thread.start()

    def _carry(self, connection: socket.socket) -> None:
        call: Any = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            call = self._stub(pieces(connection), metadata=self._metadata)
            with self._lock:
                self._under_way[connection] = call
                closed = self._closed
            if closed:
                call.cancel()
            for piece in call:
                connection.sendall(piece.data)
        except grpc.RpcError as error:
            if not self._closed:
                self.error = failure(error, self._worker) or RemoteError(
                    f"the link to {self._worker} was lost: {error.details()}"
                )
                log.warning("the relay to an RPC server has ended: %s", self.error)
        except (OSError, ValueError) as error:  # this side has hung up, or the channel is closed
            log.debug("a relay has ended: %s", error)
        finally:
            shut_down(connection)  # the thread that sends is in recv()
            if call is not None:
                call.cancel()
            with self._lock:
                self._under_way.pop(connection, None)
                self._threads.discard(threading.current_thread())
            connection.close()

    def close(self) -> None:
        """End every connection. More calls do nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            under_way, threads = dict(self._under_way), list(self._threads)
        self._port.hang_up()
        for connection, call in under_way.items():
            shut_down(connection)
            if call is not None:
                call.cancel()
        self._port.join()
        for thread in threads:
            join(thread, 5)
        self._channel.close()

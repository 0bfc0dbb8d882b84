"""A connection to an RPC server as messages of ``Relay`` (``sllm.proto``), for both ends of a relay."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sllm.wire.protocol import PIECE_BYTES, pb

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

__all__ = ["pieces"]

log = logging.getLogger("sllm.rpc")


def pieces(connection: socket.socket) -> Iterator[pb.Piece]:
    """What is received, as it arrives, until the connection ends. grpc asks for the next message when it has
    sent the last one, so that a slow link holds up the sender.
    """
    try:
        while data := connection.recv(PIECE_BYTES):
            yield pb.Piece(data=data)
    except OSError as error:
        log.debug("a relayed connection has ended: %s", error)

"""A connection as the messages of a relay."""

from __future__ import annotations

import socket
import threading

from sllm.rpc.loopback import shut_down
from sllm.rpc.pieces import pieces
from sllm.wire.protocol import PIECE_BYTES


def test_everything_arrives_in_bounded_pieces() -> None:
    data = bytes(range(256)) * 4096
    one, other = socket.socketpair()

    def send() -> None:
        one.sendall(data)
        one.close()

    thread = threading.Thread(target=send)
    thread.start()
    found = [piece.data for piece in pieces(other)]
    thread.join()
    other.close()
    assert b"".join(found) == data
    assert max(map(len, found)) <= PIECE_BYTES


def test_shutting_down_ends_the_one_who_waits() -> None:
    one, other = socket.socketpair()
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.extend(piece.data for piece in pieces(other)))
    thread.start()
    shut_down(other)
    thread.join(60)
    assert not thread.is_alive()
    assert found == []
    shut_down(other)  # once more does no harm
    one.close()
    other.close()
    assert list(pieces(other)) == []  # an error, which ends it as well

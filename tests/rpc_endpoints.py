"""What can be at an RPC endpoint, and how to see that it is gone."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from listeners import accepting
from remote_worker import PATIENCE

from sllm.engine import ggml_rpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


HELLO, DEVICE_COUNT, DEVICE_MEMORY = 14, 15, 11


OURS = bytes(ggml_rpc.version())


def gone(pid: int) -> bool:
    """Whether a process has ended; one whose parent has gone may wait for somebody to notice."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def refuses(endpoint: str) -> bool:
    host, port = ggml_rpc.split(endpoint)
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """An endpoint where every connection is handed to ``answer``, and then closed."""
    with accepting(answer) as port:
        yield f"127.0.0.1:{port}"


def greeted(connection: socket.socket) -> bytes:
    """A request, whole."""
    head = connection.recv(9, socket.MSG_WAITALL)
    size = struct.unpack("<Q", head[1:])[0] if len(head) == 9 else 0
    return head + (connection.recv(size, socket.MSG_WAITALL) if 0 < size < 1 << 26 else b"")


def said(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


class Fake:
    """Speaks the protocol, and says what a test wants it to; None: hangs up.

    Args:
        answers: what to say to each command.

    """

    def __init__(self, **answers: bytes | None) -> None:
        self.answers: dict[int, bytes | None] = {
            HELLO: said(OURS + bytes(25)),
            DEVICE_COUNT: said(struct.pack("<I", 1)),
            DEVICE_MEMORY: said(struct.pack("<QQ", 1000, 2000)),
        }
        names = {"hello": HELLO, "count": DEVICE_COUNT, "memory": DEVICE_MEMORY}
        self.answers |= {names[name]: answer for name, answer in answers.items()}

    def __call__(self, connection: socket.socket) -> None:
        while request := greeted(connection):
            answer = self.answers.get(request[0])
            if answer is None:
                return
            connection.sendall(answer)

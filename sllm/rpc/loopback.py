"""A port on loopback for programs of this user."""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoopbackPort", "shut_down"]


class LoopbackPort:
    """Listens on 127.0.0.1 and hands each connection of this user to a function, on a thread of its own.

    Connections of other users of the machine are refused where the system tells whose one is (Linux does);
    elsewhere every program on it can connect.

    Args:
        serve: called with one connection after the other, which it closes.
        name: of the thread.

    Attributes:
        host, port: where it listens.

    """

    host = "127.0.0.1"

    def __init__(self, serve: Callable[[socket.socket], object], name: str) -> None:
        self._serve = serve
        self._listener = socket.create_server((self.host, 0), backlog=8)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """``HOST:PORT``."""
        return f"{self.host}:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if _same_user(connection):
                self._serve(connection)
            else:
                connection.close()

    def hang_up(self) -> None:
        """Accept no more connections; those accepted already stay open."""
        shut_down(self._listener)
        self._listener.close()

    def join(self) -> None:
        """Wait for the thread, at most 5 seconds."""
        self._thread.join(5)


def shut_down(connection: socket.socket) -> None:
    """End a connection in both directions, which wakes a thread that is in ``recv()``: closing would not."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _same_user(connection: socket.socket) -> bool:
    """Whether the other end of a loopback connection belongs to this user; True where the system does not
    tell (it does on Linux).
    """

    def written(address: tuple[str, int]) -> str:
        number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
        return f"{number:08X}:{address[1]:04X}"

    try:
        ours, theirs = written(connection.getsockname()), written(connection.getpeername())
        lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return True
    owners = {(fields[1], fields[2]): int(fields[7]) for fields in map(str.split, lines)}
    return (ours, theirs) not in owners or owners.get((theirs, ours)) == os.getuid()

"""A port for programs of this user."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.engine.handle import join

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LOOPBACK", "TELLS_USERS", "LoopbackPort", "keep_alive", "shut_down"]

log = logging.getLogger("sllm.rpc")

LOOPBACK = "127.0.0.1"

TELLS_USERS = sys.platform == "linux"
"""Whether the system tells which user a connection on loopback belongs to."""


class LoopbackPort:
    """Listens on loopback and hands each connection of this user to a function, on a thread of its own.

    Connections of other users of the machine are refused where the system tells whose one is
    (:data:`TELLS_USERS`: Linux does); elsewhere every program on it can connect.

    Args:
        serve: called with one connection after the other, which it closes.
        name: of the thread.
        host: an IPv4 address of this machine.
        port: 0: any that is free.
        for_all: take connections of everybody, as from other machines.

    Raises:
        OSError: the address is in use, or not this machine's.

    Attributes:
        host, port: where it listens.

    """

    def __init__(
        self,
        serve: Callable[[socket.socket], object],
        name: str,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        for_all: bool = False,
    ) -> None:
        self._serve = serve
        self._for_all = for_all
        self.host = host
        self._listener = socket.create_server((host, port), backlog=8)
        _listeners.add(self._listener)
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
            if self._for_all or _same_user(connection):
                self._serve(connection)
            else:
                log.warning("another user of this machine was refused on %s", self.endpoint)
                connection.close()

    def hang_up(self) -> None:
        """Accept no more connections; those accepted already stay open. More calls do nothing."""
        shut_down(self._listener)
        self._listener.close()

    def join(self) -> None:
        """Wait for the thread, at most 5 seconds."""
        join(self._thread, 5)


_listeners: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _after_fork() -> None:
    """A fork of this process would keep ports open at which nobody answers."""
    for listener in list(_listeners):
        listener.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def shut_down(connection: socket.socket) -> None:
    """End a connection in both directions, which wakes a thread that is in ``recv()``: closing would not."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def keep_alive(connection: socket.socket) -> None:
    """Let the system detect within some 15 seconds that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPALIVE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _same_user(connection: socket.socket) -> bool:
    """Whether the other end of a loopback connection belongs to this user; True where the system does not
    tell. An end that is not listed has been closed meanwhile, or is not on this machine.
    """
    if not TELLS_USERS:
        return True
    try:
        us, them = _written(connection.getsockname()), _written(connection.getpeername())
        # A program may use an IPv6 socket for IPv4 addresses, which is in the other list.
        for name, prefix in (("tcp", ""), ("tcp6", "0000000000000000FFFF0000")):
            for line in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if (fields[1], fields[2]) == (prefix + them, prefix + us):
                    return int(fields[7]) == os.getuid()
    except OSError as error:
        log.warning("cannot tell whose a connection is: %s", error)
    return False


def _written(address: tuple[str, int]) -> str:
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"

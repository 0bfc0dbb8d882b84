"""Connections on their way to the process that serves them, and files of the cache on theirs."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from sllm.engine.handle import join
from sllm.rpc.loopback import shut_down

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.rpc.cache import TensorCache

__all__ = ["Handover"]

log = logging.getLogger("sllm.rpc")

_ASK = struct.Struct("<cB6xQQ32s")
"""From the process: what, whether the client has had memory, a size, a name (FNV-1a), a digest (SHA-256)."""

_TELL = struct.Struct("<c7xQ")
"""To the process, with or without a descriptor: what, and the size of the file. See csrc/rpc_server.cpp."""


class Handover:
    """The end in this process of the Unix socket to the one that serves (csrc/rpc_server.cpp).

    One connection at a time goes over as a descriptor; the process itself opens none. The tensors that it
    wants to read or to keep it asks for here: it gets files that are open, one by one, and knows no folder.
    What it says is not trusted: a client may have got the better of it.

    Args:
        control: the socket; is closed with this.
        cache: of weights, or None.
        once: whether the process ends behind a client that has had memory there.
        on_end: called on a thread of this object when the process has ended, or is about to.

    """

    def __init__(
        self,
        control: socket.socket,
        cache: TensorCache | None,
        *,
        once: bool,
        on_end: Callable[[], object],
    ) -> None:
        self._control = control
        self._cache = cache
        self._once = once
        self._on_end = on_end
        self._turn = threading.Lock()  # held for a connection from when it is handed over until it is done
        self._done = threading.Event()
        self.ended = False
        self._thread = threading.Thread(target=self._listen, name="sllm-rpc-handover", daemon=True)
        self._thread.start()

    def serve(self, connection: socket.socket) -> None:
        """Hand over a connection, which is closed here, and wait until it is done."""
        with self._turn, connection:
            self._done.clear()
            if self.ended:
                return
            try:
                socket.send_fds(self._control, [_TELL.pack(b"N", 0)], [connection.fileno()])
            except OSError as error:
                log.debug("a connection to the RPC server has come too late: %s", error)
                return
            connection.close()  # or the client would not notice when the process ends
            self._done.wait()

    def _listen(self) -> None:
        """What the process asks, until it ends."""
        try:
            while (message := self._receive()) is not None:
                kind, used, size, name, digest = _ASK.unpack(message)
                if kind == b"D":
                    self._end_of_client()
                    if used and self._once:
                        break
                    self._done.set()
                else:
                    self._answer(kind, size, name, digest)
        except OSError as error:
            log.debug("the RPC server's process has gone: %s", error)
        finally:
            self.ended = True
            self._end_of_client()
            self._done.set()
            self._on_end()

    def _receive(self) -> bytes | None:
        message = b""
        while len(message) < _ASK.size:
            part = self._control.recv(_ASK.size - len(message))
            if not part:
                return None
            message += part
        return message

    def _end_of_client(self) -> None:
        if self._cache is not None:
            self._cache.abandon()
            with suppress(OSError):
                self._cache.prune()

    def _answer(self, kind: bytes, size: int, name: int, digest: bytes) -> None:
        if kind == b"C" and self._cache is not None:
            self._cache.commit()
        elif kind == b"A" and self._cache is not None:
            self._cache.abandon()
        elif kind in (b"L", b"N", b"S"):
            self._send(self._file(kind, size, name, digest))

    def _file(self, kind: bytes, size: int, name: int, digest: bytes) -> tuple[int, int] | None:
        if self._cache is None:
            return None
        if kind == b"S":
            descriptor = self._cache.begin(size)
            return None if descriptor is None else (descriptor, size)
        return self._cache.find(digest) if kind == b"L" else self._cache.find_named(name)

    def _send(self, file: tuple[int, int] | None) -> None:
        if file is None:
            self._control.sendall(_TELL.pack(b"-", 0))
            return
        descriptor, size = file
        try:
            socket.send_fds(self._control, [_TELL.pack(b"Y", size)], [descriptor])
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Hang up. The process should have been ended before."""
        shut_down(self._control)
        join(self._thread)
        self._control.close()

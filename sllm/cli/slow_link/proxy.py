"""The thread of a link: it accepts connections, and moves what is due."""

from __future__ import annotations

import errno
import itertools
import logging
import select
import socket
import threading
from contextlib import suppress
from selectors import EVENT_READ
from typing import TYPE_CHECKING

from sllm.cli.slow_link.connection import Connection, Shared, with_buffers

if TYPE_CHECKING:
    from sllm.cli.slow_link.connection import Addresses
    from sllm.cli.slow_link.settings import Settings

__all__ = ["Proxy", "resolve"]

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.01
"""Before accepting is tried again where the process was out of descriptors."""

_FD_SETSIZE = 1024
"""The descriptors that ``select()`` can wait for are below this."""


def resolve(target: tuple[str, int]) -> Addresses:
    """All addresses of a target, so that the thread has no names to look up.

    Raises:
        OSError: the host is not known.
        ValueError: the port is out of range.

    """
    host, port = target
    if not 0 <= port < 1 << 16:  # some resolvers take it modulo 65536
        raise ValueError(f"port is {port}, expected 0 to 65535")
    return [(found[0], found[4]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Proxy:
    """All of a link that its thread works on.

    Every access is under ``lock``, which the thread gives away only while it waits: so the methods of
    :class:`Link` act at once, on the calling thread.
    """

    def __init__(
        self,
        settings: Settings,
        targets: Addresses,
        listen: tuple[str, int],
        seed: int,
    ) -> None:
        self.shared = Shared(settings, targets, seed)
        self.lock = threading.Lock()
        self._selector = self.shared.selector
        self._clock = self.shared.clock
        self._n_accepted = itertools.count()
        self._stopping = False
        self._listener: socket.socket | None = None
        self._waker, self._woken = socket.socketpair()
        try:
            if self._selector.fileno() >= _FD_SETSIZE or self._woken.fileno() >= _FD_SETSIZE:
                raise OSError(errno.EMFILE, f"a link needs a file descriptor below {_FD_SETSIZE}")
            self._waker.setblocking(False)
            self._woken.setblocking(False)
            self._selector.register(self._woken, EVENT_READ, lambda _events: None)
            (self._family, self.address), *_ = resolve(listen)
            self.up()
        except BaseException:
            self._release()
            raise

    # ---- the thread

    def run(self) -> None:
        """Run the thread until :meth:`stop`."""
        try:
            while True:
                with self.lock:
                    self._drain()
                    if self._stopping:
                        return
                    stalled = self._clock.stalled
                    timeout = None if stalled else self._step()
                # Python's epoll counts whole milliseconds; select() counts microseconds, and can wait for the
                # epoll itself.
                select.select([self._woken if stalled else self._selector], [], [], timeout)
        finally:
            with self.lock:
                self._release()

    def _step(self) -> float | None:
        """Do what can be done now; the seconds until there is something to do anyway."""
        for key, events in self._selector.select(0):
            key.data(events)
        return self._clock.run_due()

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        with suppress(OSError):  # full, so it will wake; or closed, so it has ended
            self._waker.send(b"\0")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def stop(self) -> None:
        """End the thread. Takes no lock: see ``Link.__del__``."""
        self._stopping = True
        self.wake()

    def _release(self) -> None:
        for connection in list(self.shared.connections):
            connection.reset()
        self._clock.clear()
        if self._listener is not None:
            self._listener.close()
        self._waker.close()
        self._woken.close()
        self._selector.close()

    # ---- what Link's methods do

    def cut(self) -> None:
        """See ``Link.cut``."""
        self._accept()  # a client may have connected without the thread having seen it
        for connection in list(self.shared.connections):
            connection.cut()

    def down(self) -> None:
        """See ``Link.down``."""
        if self._listener is not None:
            self._accept()
            listener, self._listener = self._listener, None
            with suppress(KeyError):  # it rests: see _accept()
                self._selector.unregister(listener)
            listener.close()

    def up(self) -> None:
        """See ``Link.up``."""
        if self._listener is not None:
            return
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with_buffers(listener)
            listener.bind(self.address)
            listener.listen(512)
            self.address = listener.getsockname()
            self._selector.register(listener, EVENT_READ, lambda _events: self._accept())
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    # ---- connections

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # gone before it was accepted
            except OSError as error:
                log.debug("a link cannot accept a connection now: %s", error.strerror)
                # Out of descriptors, most likely. It stays ready, and would keep the thread busy.
                with suppress(KeyError):
                    self._selector.unregister(self._listener)
                    self._clock.at(self._clock.now() + _RETRY_SECONDS, self._accept_again)
                return
            self.shared.counts["connections"] += 1
            Connection(self.shared, client, next(self._n_accepted))

    def _accept_again(self) -> None:
        if self._listener is not None and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, EVENT_READ, lambda _events: self._accept())

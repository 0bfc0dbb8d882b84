"""The emulated link as its users hold it."""

from __future__ import annotations

import math
import os
import threading
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from sllm.cli.slow_link.proxy import Proxy, resolve
from sllm.cli.slow_link.settings import LinkStats, Settings
from sllm.engine.handle import join
from sllm.errors import ClosedError
from sllm.hosts import host_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

__all__ = ["Link"]

_T = TypeVar("_T")


def _seconds(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, expected seconds, 0 or more")
    return float(value)


def _seconds_or_none(name: str, value: float | None) -> float | None:
    return None if value is None else _seconds(name, value)


def _rate(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected megabits per second above 0, or None for no limit")
    return float(value)


def _count_or_none(name: str, value: int | None) -> int | None:
    if value is not None and not (isinstance(value, int) and value >= 0):
        raise ValueError(f"{name} is {value}, expected a whole number of bytes, 0 or more, or None")
    return value


class _Setting(Generic[_T]):
    """An attribute of :class:`Link` that is checked whenever it is set, and read by its thread."""

    def __init__(self, check: Callable[[str, _T], _T]) -> None:
        self._check = check

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, link: None, owner: type) -> Self: ...
    @overload
    def __get__(self, link: Link, owner: type) -> _T: ...
    def __get__(self, link: Link | None, owner: type) -> Self | _T:
        if link is None:
            return self
        value: _T = getattr(link._settings, self._name)
        return value

    def __set__(self, link: Link, value: _T) -> None:
        setattr(link._settings, self._name, self._check(self._name, value))


class Link:
    """An emulated network link in front of ``target``; a context manager.

    Bytes arrive whole, in order, and never sooner than on the link asked for; they leave within about a
    millisecond of their time on a machine with a core to spare. (Other threads of the same process that
    compute in Python can hold the interpreter for 5 ms at a time: where that matters, run the link as a
    process of its own.) Each direction is one wire that all connections share. A connection has only so much
    under way: what fills the wire (a link without a rate counts as 1 Gbit/s) and some 256 kB more, besides
    what the sockets' buffers hold; then its sender has to wait. Opening one takes a round trip, as on a real
    link: though a client's ``connect()`` returns at once, its first bytes leave two delays later.

    Where one end half-closes or resets a connection, the other learns of it after the delay. A target that
    refuses a connection resets the client's.

    All methods may be called from any thread, and have taken effect when they return.

    Args:
        target: host and port of what is at the far end; the host may be a name.
        delay: seconds that a byte takes one way, so half the round trip.
        mbit_s: megabits (10^6) per second in each direction; None is no limit.
        jitter: up to this many seconds more, drawn evenly for each chunk; the order of bytes is kept.
        seed: of the jitter.
        cut_after: seconds after which each connection dies; None is never. A change holds for new
            connections.
        cut_after_bytes: how many bytes each connection hands on, both ways together, before it dies, even
            in the middle of a message; None is any number. Those bytes reach a receiver that reads them
            within a second.
        host, port: where to listen; port 0 is any free one.

    Raises:
        OSError: a host is not known, the port is taken, or the process has too many files open.
        ValueError: a number is out of range.

    """

    delay = _Setting(_seconds)
    """Seconds that a byte takes one way. May be set while the link runs, and holds for what is sent then."""
    jitter = _Setting(_seconds)
    """Seconds by which a byte may come later. May be set, too."""
    mbit_s = _Setting(_rate)
    """Megabits per second in each direction, or None. May be set, too."""
    cut_after = _Setting(_seconds_or_none)
    """Seconds after which a connection dies, or None. May be set, too, for connections to come."""
    cut_after_bytes = _Setting(_count_or_none)
    """Bytes after which a connection dies, or None. May be set, too."""

    def __init__(
        self,
        target: tuple[str, int],
        *,
        delay: float = 0.0,
        mbit_s: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
        cut_after: float | None = None,
        cut_after_bytes: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._settings = Settings()
        self.delay = delay
        self.jitter = jitter
        self.mbit_s = mbit_s
        self.cut_after = cut_after
        self.cut_after_bytes = cut_after_bytes
        self._target = target
        self._pid = os.getpid()
        self._closed = False
        self._proxy = proxy = Proxy(self._settings, resolve(target), (host, port), seed)
        self.host: str = proxy.address[0]
        """Where the link listens, as a number."""
        self.port: int = proxy.address[1]
        """The port that it listens on."""
        # Of the proxy alone: a thread that knew the link would keep it alive. A daemon, because a link that
        # nobody closed is no reason to keep the process alive either.
        self._thread = threading.Thread(target=proxy.run, name="sllm-link", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> LinkStats:
        """What was carried since the link was made, or since :meth:`reset_stats`."""
        with self._proxy.lock:
            return LinkStats(**self._proxy.shared.counts)

    def reset_stats(self) -> LinkStats:
        """Start counting at 0 again; the counts until now."""
        with self._proxy.lock:
            shared = self._proxy.shared
            before, shared.counts = shared.counts, asdict(LinkStats())
        return LinkStats(**before)

    def stall(self) -> None:
        """Let nothing move and nothing close: what is under way stays where it is, and the time of the link
        (``cut_after``, too) stands still. Clients can connect, as far as they can tell.

        Raises:
            ClosedError: after ``close()``; so do the other methods that change something.

        """
        self._control(lambda proxy: proxy.shared.clock.stall())

    def resume(self) -> None:
        """End what :meth:`stall` began."""
        self._control(lambda proxy: proxy.shared.clock.resume())

    def cut(self) -> None:
        """Reset all connections, both ends, now. What is under way is lost; new connections are welcome."""
        self._control(Proxy.cut)

    def down(self) -> None:
        """Refuse new connections until :meth:`up`. Those there are stay (see :meth:`cut`)."""
        self._control(Proxy.down)

    def up(self) -> None:
        """Accept connections again, on the same port.

        Raises:
            OSError: the port has been taken in the meantime.

        """
        self._control(Proxy.up)

    def retarget(self, target: tuple[str, int]) -> None:
        """Lead new connections to another target.

        Raises:
            OSError: the host is not known.
            ValueError: the port is out of range.

        """
        addresses = resolve(target)

        def change(proxy: Proxy) -> None:
            proxy.shared.targets = addresses

        self._control(change)
        self._target = target

    def _control(self, change: Callable[[Proxy], None]) -> None:
        with self._proxy.lock:
            if (
                self._closed
            ):  # set before the thread is told to end, so while it is not set the thread is there
                raise ClosedError("the link is closed")
            change(self._proxy)
        self._proxy.wake()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._closed

    def close(self) -> None:
        """Reset all connections and stop listening; the thread and the sockets are gone then. More calls do
        nothing.
        """
        self._closed = True
        self._proxy.stop()
        join(self._thread)

    def __enter__(self) -> Self:
        if self._closed:
            raise ClosedError("the link is closed")
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_thread") and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            # Not close(): at the end of the interpreter the thread may be frozen, and at any other time this
            # may be running on it.
            self._proxy.stop()

    def __repr__(self) -> str:
        rate = "" if self.mbit_s is None else f", {self.mbit_s:g} Mbit/s"
        return (
            f"<sllm.cli.slow_link.Link {host_port(self.host, self.port)} -> {host_port(*self._target)},"
            f" {self.delay * 1e3:g} ms{rate}{', closed' if self._closed else ''}>"
        )

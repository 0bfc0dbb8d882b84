"""The open port: what stands between strangers and gRPC."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm import hosts
from sllm.engine._ffi import ffi, lib
from sllm.engine.handle import join
from sllm.worker.rate import Rate
from sllm.worker.socket_folder import SocketFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.worker.passes import Limits

__all__ = ["Listener", "ListenerStats"]

log = logging.getLogger("sllm.worker")

_STRANGER_BYTES = 24 << 10
"""What gRPC is shown of a client before it has seen its token. A TLS handshake takes 3 KB of it; the first
call's headers may share a TLS record of 16 KB with data.
"""

_REFUSED_BYTES = 88 << 10
"""What gRPC is shown more of a client with a token after each call for which there was no place. What that
has sent already is on its way still, a window of HTTP/2 at most (64 KB), and gRPC throws it away: unless it
is carried, no later call of this connection gets there. A call without the token earns nothing.
"""

_SHARE = 2
"""One address has one of so many parts of the strangers' places, of which each takes gRPC 300 KB."""

_ACCEPTS_PER_ADDRESS = 20
_BURST_SECONDS = 10.0
"""Connections and refused calls of one address per second, on average, and how many seconds' worth in one
burst. One that comes to nothing takes 1.4 ms of a core, half of it for TLS: with 50 a second from each of
four addresses the texts of others took 3 times as long on two cores that had more to do.
"""

_ADMITTED_PER_ADDRESS = 50
"""Connections of one address per second that show a token and so do not count among these."""

_REFUSALS = 16
"""Calls without the token that one connection may make: enough for a client to hear what is wrong."""

_ACCEPTS = 400
"""Connections per second, on average; those that are closed at once count, too."""

_PATIENCE = 5.0
"""Seconds for what takes none: gRPC accepting on this machine, threads ending."""


@dataclass
class ListenerStats:
    """Running figures of the open port.

    Attributes:
        accepted: connections.
        admitted: those of clients that have shown a token.
        refused: those that were closed at once, because their address had too many lately.
        evicted: strangers that had to make room for others.
        cut: strangers whose time was over.

    """

    accepted: int = 0
    admitted: int = 0
    refused: int = 0
    evicted: int = 0
    cut: int = 0


@dataclass
class _Neighbour:
    """What an address, or the network of an IPv6 address, has taken of the strangers' places."""

    n_strangers: int = 0
    rate: Rate = field(default_factory=lambda: Rate(_ACCEPTS_PER_ADDRESS, _BURST_SECONDS))
    admitted: Rate = field(default_factory=lambda: Rate(_ADMITTED_PER_ADDRESS))


@dataclass(eq=False)
class _Place:
    """One connection.

    Attributes:
        number: as gRPC's name of the peer ends.
        client: the connection of the client.
        address: whose share it takes.
        shown: host and port of the client.
        neighbour: that share.
        n_refused: calls without the token.
        standing: ``enum sllm_client``, which the C core reads while it carries.
        max_bytes: what is carried of a stranger, which it reads as well.

    """

    number: str
    client: socket.socket
    address: str
    shown: str
    neighbour: _Neighbour
    n_refused: int = 0
    standing: Any = field(default_factory=lambda: ffi.new("int32_t *", lib.SLLM_CLIENT_STRANGER))
    max_bytes: Any = field(default_factory=lambda: ffi.new("int64_t *", _STRANGER_BYTES))

    @property
    def is_stranger(self) -> bool:
        """Whether the client has shown no token."""
        admitted: bool = self.standing[0] == lib.SLLM_CLIENT_ADMITTED
        return not admitted


class Listener:
    """Accepts connections and carries them to gRPC, which listens at :attr:`endpoint`, where nobody else on
    this machine reaches it.

    A client is a stranger until a call with the token came over its connection. Of a stranger gRPC is shown
    24 KiB, so that whatever it sends costs little; it is gone after ``limits.stranger_seconds``, and soon
    after some calls without the token. Strangers have ``limits.strangers`` places, and one address (of IPv6:
    one network of 64 bits) has half of them. When they run out, the stranger that came first makes room,
    the address's own where its share has run out. Who comes too often is not let in for a while.

    Args:
        host, port: where to listen.
        limits: how many connections there may be.

    Raises:
        OSError: the address is in use, or not this machine's.

    Attributes:
        endpoint: where gRPC is to listen.
        port: the one in use.
        stats: running figures.

    """

    def __init__(self, host: str, port: int, limits: Limits) -> None:
        self.stats = ListenerStats()
        self._limits = limits
        self._lock = threading.Lock()  # guards all that follows
        self._places: dict[str, _Place] = {}  # by number, the oldest first
        self._serving: list[threading.Thread] = []  # those that have lost their places, too
        self._neighbours: dict[str, _Neighbour] = {}
        self._closed = False
        self._pace = Rate(_ACCEPTS)  # of the threads that accept
        self._numbers = itertools.count()
        self._sockets = list(_bound(host, port))
        self.port: int = self._sockets[0].getsockname()[1]
        self._folder = SocketFolder()
        self._path = str(self._folder.path / "grpc")
        self.endpoint = f"unix:{self._path}"
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Accept connections from now on; gRPC has to listen already."""
        for one in self._sockets:
            thread = threading.Thread(target=self._accept, args=(one,), name="sllm-listener", daemon=True)
            thread.start()
            self._threads.append(thread)

    # ---- what gRPC's calls tell

    def admit(self, peer: str) -> bool:
        """A call with the token came from ``peer``, gRPC's name of a connection; False: its connection has no
        place among the admitted ones.
        """
        with self._lock:
            place = self._places.get(_number(peer))
            if place is None or not place.is_stranger:
                return True  # gone already, or known
            if sum(not other.is_stranger for other in self._places.values()) >= self._limits.connections:
                place.max_bytes[0] += _REFUSED_BYTES
                return False
            place.standing[0] = lib.SLLM_CLIENT_ADMITTED
            place.neighbour.n_strangers -= 1
            if place.neighbour.admitted.take():
                place.neighbour.rate.give_back()
            self.stats.admitted += 1
            return True

    def refuse(self, peer: str) -> None:
        """A call without the token came from ``peer``; after some of them it has to go."""
        with self._lock:
            place = self._places.get(_number(peer))
            if place is not None and place.is_stranger:
                place.n_refused += 1
                place.neighbour.rate.charge()
                if place.n_refused >= _REFUSALS:
                    place.standing[0] = lib.SLLM_CLIENT_REFUSED

    def address_of(self, peer: str) -> str:
        """The host and the port of the client that gRPC calls ``peer``; nothing where it has gone."""
        with self._lock:
            place = self._places.get(_number(peer))
        return "" if place is None else place.shown

    # ---- connections

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, address = listening.accept()
            except OSError as error:
                if self._closed:
                    return
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room()
                time.sleep(0.05)
                continue
            self.stats.accepted += 1
            if not self._enter(client, address):
                self.stats.refused += 1
                client.close()
            if not self._pace.take():
                time.sleep(0.02)

    def _enter(self, client: socket.socket, peer: tuple[Any, ...]) -> bool:
        """Give a connection a place and a thread; False: its address has come too often."""
        address = _network(peer[0])
        with self._lock:
            neighbour = self._neighbour(address)
            if not neighbour.rate.take() or self._closed:
                return False
            share = max(1, self._limits.strangers // _SHARE)
            strangers = [place for place in self._places.values() if place.is_stranger]
            if neighbour.n_strangers >= share:
                self._evict(next(place for place in strangers if place.neighbour is neighbour))
            elif len(strangers) >= self._limits.strangers:
                self._evict(strangers[0])
            place = _Place(
                str(next(self._numbers)), client, address, hosts.host_port(peer[0], peer[1]), neighbour
            )
            self._places[place.number] = place
            neighbour.n_strangers += 1
        thread = threading.Thread(target=self._serve, args=(place,), name="sllm-connection", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._leave(place)
            return True
        with self._lock:
            self._serving = [*(one for one in self._serving if one.is_alive()), thread]
        return True

    def _neighbour(self, address: str) -> _Neighbour:
        if len(self._neighbours) >= 1024:  # as many as come within seconds; forget those that are gone
            self._neighbours = {
                name: one for name, one in self._neighbours.items() if one.n_strangers or not one.rate.is_full
            }
        return self._neighbours.setdefault(address, _Neighbour())

    def _make_room(self) -> None:
        """Let the oldest stranger go: the process has no more files, or the system no memory."""
        with self._lock:
            oldest = next((place for place in self._places.values() if place.is_stranger), None)
            if oldest is not None:
                self._evict(oldest)

    def _evict(self, place: _Place) -> None:
        """Take a stranger's place; its thread closes the connection."""
        del self._places[place.number]
        place.neighbour.n_strangers -= 1
        self.stats.evicted += 1
        _hang_up(place.client)

    def _leave(self, place: _Place, *, cut: int = 0) -> None:
        with self._lock:
            self.stats.cut += cut
            if self._places.pop(place.number, None) is not None and place.is_stranger:
                place.neighbour.n_strangers -= 1
            place.client.close()

    def _serve(self, place: _Place) -> None:
        """Carry one connection to its end, on a thread of its own."""
        cut = 0
        try:
            place.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._to_grpc(place.number) as server:
                cut = lib.sllm_carry(
                    place.client.fileno(),
                    server.fileno(),
                    place.standing,
                    place.max_bytes,
                    int(self._limits.stranger_seconds * 1000),
                )
        except OSError as error:
            log.debug("a connection could not be served: %s", error.strerror)
        finally:
            self._leave(place, cut=cut)

    def _to_grpc(self, number: str) -> socket.socket:
        """A connection to gRPC, which knows the peer by the name that this end is bound to."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = self._folder.path / number
        try:
            server.bind(str(name))
            server.settimeout(_PATIENCE)
            server.connect(self._path)
        except BaseException:
            server.close()
            raise
        finally:
            name.unlink(missing_ok=True)
        return server

    # ---- the end

    def hang_up(self) -> None:
        """Accept no more connections; those accepted already stay open."""
        self._closed = True
        for one in self._sockets:
            _hang_up(one)
            one.close()
        for thread in self._threads:
            join(thread, _PATIENCE)

    def close(self) -> None:
        """Close every connection, after gRPC has closed its ends; more calls do nothing."""
        self.hang_up()
        until = time.monotonic() + _PATIENCE
        with self._lock:
            serving = self._serving
        for thread in serving:
            join(thread, max(0.0, until - time.monotonic()))
        with self._lock:
            for place in self._places.values():
                _hang_up(place.client)
        self._folder.close()


def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Listening sockets at every address of a host."""
    endpoint = hosts.host_port(host, port)
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, _, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind)
            bound.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            taken = bound[0].getsockname()[1] if len(bound) > 1 else port
            one.bind((address[0], taken, *address[2:]))
            one.listen(128)
    except OSError as error:
        for one in bound:
            one.close()
        raise OSError(
            f"cannot listen on {endpoint}: is the port in use, and the host this machine?"
        ) from error
    yield from bound


def _number(peer: str) -> str:
    """Which connection gRPC's name of a peer stands for."""
    return peer.rpartition("/")[2]


def _network(address: str) -> str:
    """What shares its places: an IPv4 address, or the 64 bits that an IPv6 subscriber has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
        found = found.ipv4_mapped
    return str(found)


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

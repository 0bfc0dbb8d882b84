"""Which addresses a worker may be told to connect to.

A client names the worker that is to get the rows next. Left to it alone, a worker would knock at any door of
its own network for whoever has a token, so its owner says which ones there are.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm import hosts
from sllm.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
    IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

__all__ = ["ANYWHERE", "Destinations"]

ANYWHERE = "*"
"""Every address but this machine's own, those of the link alone, and those of no machine."""


@dataclass(frozen=True)
class _Entry:
    """One of the addresses: a name, a network, or neither for :data:`ANYWHERE`. ``port`` None: any."""

    name: str | None
    network: IPNetwork | None
    port: int | None

    def has(self, address: IPAddress) -> bool:
        """Whether an address is one of these, whatever its port."""
        if self.network is not None:
            return address in self.network
        return self.name is None and not _is_special(address)


class Destinations:
    """Where a worker may connect to.

    Args:
        entries: ``HOST``, ``HOST:PORT``, ``NETWORK/BITS``, ``NETWORK/BITS:PORT``, an IPv6 one in brackets
            where a port follows, or :data:`ANYWHERE`.

    Raises:
        ValueError: something else.

    Examples:
        >>> Destinations(["10.1.0.0/16:50051"]).resolve("10.1.2.3", 50051)
        '10.1.2.3'
        >>> Destinations(["10.1.0.0/16:50051"]).resolve("10.1.2.3", 22)
        Traceback (most recent call last):
            ...
        sllm.errors.RemoteError: 10.1.2.3:22 is not an address that this worker may connect to (--hops)

    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = [_parsed(entry) for entry in entries]

    def __bool__(self) -> bool:
        return bool(self._entries)

    def resolve(self, host: str, port: int) -> str:
        """The IP address of a host that may be connected to. It is this one that is to be used: a name may
        mean another one the next time.

        Raises:
            RemoteError: there is none.

        """
        entries = [entry for entry in self._entries if entry.port in (None, port)]
        named = any(entry.name == host.lower() for entry in entries)
        others = [entry for entry in entries if entry.name is None]
        if named or others:  # no name is looked up for nothing
            for address in _addresses(host, port):
                if named or any(entry.has(address) for entry in others):
                    return str(address)
        raise RemoteError(
            f"{hosts.host_port(host, port)} is not an address that this worker may connect to (--hops)"
        )


def _parsed(text: str) -> _Entry:
    if not isinstance(text, str):
        raise TypeError(f"limits.hops holds {type(text).__name__}, expected str")
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?|([0-9a-fA-F:./]+)", text)
    host = "" if found is None else found[1] or found[2] or found[4]
    port = None if found is None or found[3] is None else int(found[3])
    if host and port != 0 and (port or 1) < 1 << 16:
        if host == ANYWHERE:
            return _Entry(None, None, port)
        try:
            return _Entry(None, ipaddress.ip_network(host), port)
        except ValueError:
            if re.fullmatch(r"[A-Za-z_][\w.-]*|\d[\w.-]*[A-Za-z][\w.-]*", host, re.ASCII):
                return _Entry(host.lower(), None, port)
    raise ValueError(
        f"limits.hops holds {text!r}, expected HOST, HOST:PORT, NETWORK/BITS, NETWORK/BITS:PORT or {ANYWHERE}"
    )


def _addresses(host: str, port: int) -> Iterator[IPAddress]:
    """What a host's name means now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for *_, where in found:
        address = ipaddress.ip_address(str(where[0]).partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        yield mapped or address


def _is_special(address: IPAddress) -> bool:
    """Whether something else than another machine is behind an address: this one, or what a network keeps
    for itself, such as the metadata of a cloud.
    """
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address.is_reserved
    )

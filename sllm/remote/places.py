"""The workers that an address names: one, or, of a name with several addresses in DNS, one at each.

gRPC looks names up by itself, and a channel goes to the first of a name's addresses that answers (its policy
``pick_first``, with RFC 8305's head starts for two families). That is right where a name stands for one
worker that has an IPv4 and an IPv6 address, and that is left to it. A name with two or more addresses of one
family, as Kubernetes gives a headless service, stands for as many workers; each gets a channel of its own,
for the reasons that :mod:`sllm.remote.fleet` has.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sllm.wire.auth import Address

__all__ = ["Place", "places", "places_of_name"]


@dataclass(frozen=True)
class Place:
    """Where one worker is.

    Attributes:
        address: its own.
        name: the name in DNS that stands for it and for others, which a certificate has to be valid for where
            the address has no fingerprint; None: the address's host stands for it alone.

    """

    address: Address
    name: str | None = None


def places(address: Address) -> list[Place]:
    """Where the workers are that an address names, at least one.

    Examples:
        >>> from sllm.wire.auth import Address
        >>> [place.address.endpoint for place in places(Address("127.0.0.1", 50051))]
        ['127.0.0.1:50051']

    """
    found = places_of_name(address)
    return found if len(found) > 1 else [Place(address)]


def places_of_name(address: Address) -> list[Place]:
    """The workers at the addresses that the host of an address has in DNS, each by its number; empty: it is
    no name, or it has none now.
    """
    if _is_literal(address.host):
        return []
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:  # connecting says so
        return []
    hosts: dict[int, list[str]] = {}
    for family, _, _, _, numbers in found:
        if numbers[0] not in hosts.setdefault(family, []):
            hosts[family].append(str(numbers[0]))
    # The family with several, and of two the one that RFC 6724 puts first: the other has the same workers.
    chosen = next((several for several in hosts.values() if len(several) > 1), next(iter(hosts.values()), []))
    return [Place(replace(address, host=host), address.host) for host in chosen]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True

"""Names of hosts: ``HOST:PORT`` as text, and whether a host is this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["DEFAULT_PORT", "host_port", "is_loopback", "split_host_port"]


DEFAULT_PORT = 50051


def host_port(host: str, port: int) -> str:
    """``HOST:PORT``, or ``[IPV6]:PORT``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``HOST`` or ``:PORT`` (every interface) as (host, port).

    Raises:
        ValueError: not such a pair.

    """
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit("//"), None
    if parts.path or parts.query or parts.fragment or "@" in text or (not parts.hostname and port is None):
        raise ValueError(f"{text!r} is not HOST:PORT")
    return parts.hostname or "0.0.0.0", default_port if port is None else port


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine and nothing but: a loopback address, or ``localhost``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

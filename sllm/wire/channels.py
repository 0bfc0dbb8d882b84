"""Channels to workers: what both ends of every connection have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.extras import needs
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

__all__ = ["open_channel"]


def open_channel(
    address: auth.Address,
    timeout: float,
    *,
    keepalive: float,
    certificates: MutableMapping[str, bytes],
    server_name: str | None = None,
    options: Sequence[tuple[str, int]] = (),
) -> grpc.Channel:
    """A new channel. Nothing but the certificate, where one is pinned, has crossed the link yet.

    Args:
        address: of the worker.
        timeout: seconds for the certificate to come.
        keepalive: seconds of silence after which the other side is asked whether it is still there; as many
            later the link counts as lost.
        certificates: those that are known (PEM), by fingerprint; one that had to be fetched is added.
        server_name: what the certificate has to be valid for, where none is pinned; None: the address's host.
        options: gRPC's, besides those of every channel.

    Raises:
        AuthError: another certificate.
        RemoteError: nobody answers there.

    """
    milliseconds = int(keepalive * 1000)
    settings: list[tuple[str, Any]] = [
        *CHANNEL_OPTIONS,
        *options,
        ("grpc.use_local_subchannel_pool", 1),  # a new channel means a new connection
        ("grpc.enable_retries", 0),  # streams are resumed by ResumableStream
        # Where gRPC connects again by itself, it is to find a worker that is back: its own pauses grow to 2
        # minutes, in which calls fail.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),  # grpc/grpc#39239: it alone ends a connection
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", 1 << 22),
    ]
    if address.insecure:
        return grpc.insecure_channel(address.endpoint, settings)
    if address.fingerprint is None:
        if server_name is not None:
            settings.append(("grpc.ssl_target_name_override", server_name))
        return grpc.secure_channel(address.endpoint, grpc.ssl_channel_credentials(), settings)
    pem = certificates.get(address.fingerprint)
    if pem is None:
        pem = certificates[address.fingerprint] = auth.fetch_certificate(address, timeout)
    credentials, name = auth.client_credentials(pem)
    settings.append(("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(address.endpoint, credentials, settings)

"""The port that a worker opens: who may call there, and gRPC's server behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sllm import folders, hosts
from sllm.extras import needs
from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS
from sllm.wire.tokens import checked_token, load_or_make_token
from sllm.worker.admission import Admission
from sllm.worker.call_threads import CallThreads
from sllm.worker.listener import Listener
from sllm.worker.service import Authentication
from sllm.worker.token_file import FILE_NAME

with needs("remote"):
    import grpc
    from grpc_health.v1 import health_pb2_grpc

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack

    from sllm.worker.calls import Calls
    from sllm.worker.certificate import Certificate
    from sllm.worker.feeds import Feeds
    from sllm.worker.passes import Limits
    from sllm.worker.service import Health
    from sllm.worker.users import Users

__all__ = ["NO_ACCESS_CONTROL", "Access", "Offer", "access_of", "check_reachable", "listen"]

_METADATA_BYTES = 4096
"""Of a call's headers, as HTTP/2 counts them; those of our clients take 400, and a long token its length.
What goes beyond it is refused, and beyond twice as much for certain: between the two gRPC draws lots.
"""


# ---- who may call


@dataclass(frozen=True)
class Access:
    """What clients must know and what they check, and how the server proves it.

    Attributes:
        token: what clients must know; None: anybody may call.
        tokens: the file of further tokens; None: there are none.
        certificate: a certificate chain and its key (PEM); None: no TLS.
        fingerprint: of the certificate.

    """

    token: str | None = None
    tokens: Path | None = None
    certificate: tuple[bytes, bytes] | None = None
    fingerprint: str | None = None


NO_ACCESS_CONTROL = Access()


def check_reachable(
    host: str, port: int, token: str | None, tokens: object, certificate: object, *, insecure: bool
) -> None:
    """Refuse an address and secrets that do not go together.

    Raises:
        ValueError: says which.

    """
    if insecure and not hosts.is_loopback(host):
        raise ValueError(
            f"insecure is for loopback alone, and the worker is to listen on {host};"
            " leave it out, or use 127.0.0.1"
        )
    if insecure and any(given is not None for given in (token, tokens, certificate)):
        raise ValueError("insecure means neither a token nor a certificate; leave it out to use yours")
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}, expected 0 to 65535")


def access_of(
    token: str | None,
    tokens: str | os.PathLike[str] | None,
    certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None,
    state: str | os.PathLike[str] | None,
) -> Access:
    """What was given; what was not is made once and kept in ``state``."""
    folder = Path(state) if state is not None else folders.state_folder()
    if tokens is None and token is None:
        tokens = folder / FILE_NAME
    token = load_or_make_token(folder / "token") if token is None else checked_token(token)
    if certificate is None:
        chain, key = auth.load_or_make_certificate(folder)
    else:
        chain, key = Path(certificate[0]).read_bytes(), folders.read_private(Path(certificate[1]))
        if not auth.belong_together(chain, key):
            raise ValueError(
                f"{certificate[0]} and {certificate[1]} are no certificate (PEM) and its key"
                " (without a password)"
            )
    named = None if tokens is None else Path(tokens)
    return Access(token, named, (chain, key), auth.fingerprint(chain))


# ---- the server


@dataclass(frozen=True)
class Offer:
    """What is behind the port.

    Attributes:
        handlers: of the methods of ``sllm.proto``.
        limits: how much of it clients may use.
        max_bytes: the largest message that clients send.
        options: gRPC's, besides those of every worker.
        feeds: what other workers may bring; None: nothing.

    """

    handlers: grpc.GenericRpcHandler[Any, Any]
    limits: Limits
    max_bytes: int
    options: Sequence[tuple[str, int]] = ()
    feeds: Feeds | None = None


def listen(
    offer: Offer,
    health: Health,
    calls: Calls,
    users: Users,
    access: Access,
    certificate: Certificate | None,
    host: str,
    port: int,
    stack: ExitStack,
) -> int:
    """Serve until ``stack`` is closed; the port."""
    limits = offer.limits
    n_calls = limits.sessions + limits.queue + 8 + (0 if offer.feeds is None else limits.sessions)
    n_streams = max(32, n_calls)  # of one connection
    executor = stack.enter_context(CallThreads("sllm-worker"))
    # Without a token nothing tells a client from a stranger, and only programs of this machine come.
    listener = None if access.token is None else Listener(host, port, limits)
    if listener is not None:
        stack.callback(listener.close)
        calls.peer_of = listener.address_of
    server = grpc.server(
        cast("ThreadPoolExecutor", executor),  # of which gRPC uses submit() alone
        handlers=[offer.handlers],
        interceptors=[
            calls,
            Authentication(users, health, Admission(n_calls, listener), offer.feeds),
        ],
        # Calls with the token are counted by Admission; what strangers have under way takes nothing of that.
        maximum_concurrent_rpcs=n_calls + limits.strangers * n_streams,
        options=[
            *CHANNEL_OPTIONS,
            *offer.options,
            ("grpc.so_reuseport", 0),  # a second worker on the same port is an error
            ("grpc.max_receive_message_length", offer.max_bytes),
            ("grpc.max_metadata_size", _METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
            ("grpc.max_concurrent_streams", n_streams),
            ("grpc.server_handshake_timeout_ms", 10_000),
            # Clients may ping every second to see whether the connection stands; the worker pings, too.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),  # grpc/grpc#39239: it alone ends a connection
        ],
    )
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    endpoint = hosts.host_port(host, port) if listener is None else listener.endpoint
    try:
        if certificate is None:
            bound = server.add_insecure_port(endpoint)
        else:
            bound = server.add_secure_port(endpoint, certificate.credentials())
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {endpoint}: is the port in use, and the host this machine?"
        ) from error
    if bound == 0:
        raise OSError(f"cannot listen on {endpoint}")
    server.start()
    stack.callback(_stop, server)
    if listener is None:
        return bound
    stack.callback(listener.hang_up)
    listener.start()
    return listener.port


def _stop(server: grpc.Server) -> None:
    """Stop the server, and wait until it has."""
    try:
        stopped = server.stop(grace=0.5)
    except RuntimeError:  # its thread for the grace cannot start: the interpreter is ending
        stopped = server.stop(grace=None)
    stopped.wait()

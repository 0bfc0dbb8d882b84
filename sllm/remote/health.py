"""Whether a worker takes texts, as a probe asks: without its token."""

from __future__ import annotations

import time
from dataclasses import replace

from sllm.errors import RemoteError
from sllm.extras import needs
from sllm.wire import auth
from sllm.wire.channels import open_channel

with needs("remote"):
    import grpc
    from grpc_health.v1 import health_pb2

__all__ = ["is_serving"]


def is_serving(address: auth.Address, timeout: float) -> bool:
    """Ask a worker for its health, by ``grpc.health.v1``.

    No secret is sent and the answer is none, so where the address has no fingerprint, any certificate will
    do: a probe on the worker's own machine needs to know nothing but the port.

    Args:
        address: of the worker; its token is not used.
        timeout: seconds.

    Returns:
        False where it answers that it takes no texts: it ends, or a pass hangs.

    Raises:
        AuthError: another certificate than the address names.
        RemoteError: nobody answers, or not a worker.

    """
    until = time.monotonic() + timeout
    certificates: dict[str, bytes] = {}
    if not address.insecure and address.fingerprint is None:
        certificate = auth.fetch_certificate(address, timeout)
        fingerprint = auth.fingerprint(certificate)
        certificates[fingerprint] = certificate
        address = replace(address, fingerprint=fingerprint)
    channel = open_channel(address, timeout, keepalive=timeout, certificates=certificates)
    with channel:
        ask = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        try:
            reply = ask(health_pb2.HealthCheckRequest(), timeout=max(until - time.monotonic(), 0.1))
        except grpc.RpcError as error:
            raise RemoteError(
                f"{address.endpoint} does not say how it is: {error.details() or error.code().name}"
            ) from error
    serving: bool = reply.status == health_pb2.HealthCheckResponse.SERVING
    return serving

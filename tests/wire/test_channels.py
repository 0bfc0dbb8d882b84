"""Channels to workers: how they behave where nobody answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from remote_worker import wait_until

from sllm.wire.auth import Address
from sllm.wire.channels import open_channel
from sllm.wire.protocol import method


def test_a_worker_that_is_away_is_looked_for_often() -> None:
    """gRPC's own pauses would make 8 attempts of 43 seconds and more."""
    came: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as port:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    came.append(port.accept()[0])
                    came[-1].close()

        there = threading.Thread(target=hang_up)
        there.start()
        address = Address("127.0.0.1", port.getsockname()[1], insecure=True)
        with open_channel(address, 1.0, keepalive=10.0, certificates={}) as channel:
            ask: Any = channel.unary_unary(method("Info"), None, None)
            call = ask.future(b"", wait_for_ready=True)
            wait_until(lambda: len(came) >= 8, "attempts to connect", 30.0)
            call.cancel()
        port.shutdown(socket.SHUT_RDWR)
        there.join()

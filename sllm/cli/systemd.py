"""What a service manager wants to hear: messages of sd_notify(3), datagrams to ``$NOTIFY_SOCKET``."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Notifier"]

log = logging.getLogger("sllm.cli")


class Notifier:
    """Tells systemd how the service is; does nothing where nobody listens.

    Args:
        environ: where the manager has left its address.

    Attributes:
        interval: seconds within which ``WATCHDOG=1`` has to be told; None: nobody waits for it.

    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.interval: float | None = None
        microseconds = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if self._address and ours and microseconds.isascii() and microseconds.isdigit():
            self.interval = int(microseconds) / 1e6 or None

    def tell(self, state: str) -> None:
        """Send ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``, or several lines of such."""
        if self._address[:1] not in ("/", "@"):
            return
        name = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_manager:
                to_manager.setblocking(False)
                to_manager.sendto(state.encode(), name)
        except OSError as error:
            log.debug("the service manager cannot be told %s: %s", state, error)

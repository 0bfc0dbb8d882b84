"""A web site on loopback, for the tests of downloads: what the stand-ins for both hubs share."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["LoopbackSite", "SiteHandler"]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for them and none is left behind

    def __init__(self, site: LoopbackSite, handler: type[SiteHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.site = site

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.site.errors.append(sys.exc_info()[1])


class LoopbackSite:
    """A site on a free port; a context manager.

    Attributes:
        connections: that are open; :meth:`close` ends those that a client keeps for its next request.
        errors: that a handler has raised.

    """

    def __init__(self, handler: type[SiteHandler]) -> None:
        self.connections: set[socket.socket] = set()
        self.errors: list[BaseException | None] = []
        self._server = _Server(self, handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SiteHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.site.connections.add(self.connection)

    def finish(self) -> None:
        self.server.site.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer a request."""
        raise NotImplementedError

    def start(self, status: int, headers: dict[str, str], n_bytes: int) -> None:
        """The head of an answer with a body of so many bytes."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def break_off(self) -> None:
        """End the connection in the middle of a body."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

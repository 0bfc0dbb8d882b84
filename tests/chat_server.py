"""An endpoint of our own that speaks chat completions with server-sent events, on loopback."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Messages: TypeAlias = list[dict[str, Any]]


class ChatServer:
    """Answers with what ``answer`` makes of the messages, three characters at a time.

    Attributes:
        received: every byte that came in, of all connections.
        requests: the bodies, as JSON.
        fault: None; an HTTP status, for which the body quotes the request; or ``"break"`` (the connection
            ends within the answer), ``"cut"`` (the same, where nothing says how long the answer would be),
            ``"garbage"`` (an event that is no JSON), ``"event"`` (an event that tells of an error).

    """

    def __init__(self, answer: Callable[[Messages], str]) -> None:
        self.answer = answer
        self.received = bytearray()
        self.requests: list[dict[str, Any]] = []
        self.fault: int | str | None = None
        self._failed: list[str] = []
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while outer._serve(self):
                    pass

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = False
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                error = sys.exc_info()[1]
                if not isinstance(error, OSError):  # a client may leave within an answer
                    outer._failed.append(repr(error))

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _serve(self, handler: socketserver.StreamRequestHandler) -> bool:
        """Answer one request; whether there may be another on this connection."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = handler.rfile.readline()
            if not line:
                return False
            head += line
        self.received += head
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if line)
        body = handler.rfile.read(int(fields[b"content-length"]))
        self.received += body
        assert head.startswith(b"POST /v1/chat/completions ")
        assert fields[b"authorization"] == b"bearer sk-test"
        asked = json.loads(body)
        assert asked["stream"] is True
        self.requests.append(asked)
        if isinstance(self.fault, int):
            told = json.dumps({"error": {"message": f"cannot take {body.decode()}"}}).encode()
            handler.wfile.write(
                b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (self.fault, len(told))
                + told
            )
            return True
        framed = self.fault != "cut"
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            + (b"Transfer-Encoding: chunked\r\n\r\n" if framed else b"Connection: close\r\n\r\n")
        )

        def send(event: str) -> None:
            data = f"data: {event}\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if framed else data)

        said = self.answer(asked["messages"])
        pieces = [said[at : at + 3] for at in range(0, len(said), 3)]
        send(_chunk({"role": "assistant", "content": ""}))
        for n, piece in enumerate(pieces):
            if n == 2 and self.fault is not None:
                if self.fault == "garbage":
                    send("{no JSON: " + said)
                if self.fault == "event":
                    send(json.dumps({"error": {"message": f"overloaded by {said}"}}))
                return False
            send(_chunk({"content": piece}))
        send(_chunk({}, "stop"))
        usage = {"prompt_tokens": 5, "completion_tokens": len(pieces), "total_tokens": 5 + len(pieces)}
        send(json.dumps({**json.loads(_chunk({})), "choices": [], "usage": usage}))
        send("[DONE]")
        handler.wfile.write(b"0\r\n\r\n")
        return True

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # and wait for its threads
        assert self._failed == []

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _chunk(delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps(
        {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "big", "choices": [choice]}
    )

"""What crosses the wire, counted: totals for the figures, and a record of each call for the access log.

An interceptor of gRPC looks at the messages on their way: neither the service nor the schedulers know of it.
Of their contents only numbers are kept: how many tokens, rows and bytes.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from sllm.extras import needs
from sllm.wire.protocol import method, pb

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sllm.worker.access_log import AccessLog

    Metadata = Sequence[tuple[str, str | bytes]]

__all__ = ["KINDS", "REFUSALS", "Calls", "Totals", "behaviour_of", "handler_like"]

KINDS = {
    **{method(name): name.lower() for name in ("Generate", "Score", "Layers", "Feed", "Relay")},
    **{method(name): name.lower() for name in ("Info", "Vocabulary", "Status", "Echo")},
    "/grpc.health.v1.Health/Check": "health",
    "/grpc.health.v1.Health/Watch": "health",
}
"""Methods, and what they are called in the figures and the log; ``"other"`` is every other one."""

REFUSALS = {
    "UNAUTHENTICATED": "token",
    "PERMISSION_DENIED": "not_allowed",
    "RESOURCE_EXHAUSTED": "busy",
    "OUT_OF_RANGE": "too_long",
    "INVALID_ARGUMENT": "invalid",
    "UNIMPLEMENTED": "not_offered",
    "FAILED_PRECONDITION": "other_model",
    "UNAVAILABLE": "ending",
}
"""gRPC's codes, and what the worker means by them (:func:`sllm.wire.protocol.abort`); ``"failed"`` is every
other one."""

_STRANGERS_PER_SECOND = 10
"""Records of calls without the token that go into the log; the others are only counted."""


@dataclass
class Totals:
    """What calls came to.

    Attributes:
        bytes_in, bytes_out: of messages, without what TLS and HTTP/2 add.
        round_trips: messages that ask for an answer: openings, hints, rows, single requests.
        calls: by kind (:data:`KINDS`).
        ended: texts, sequences and scores, by how they ended.
        refused: calls, by the reason (:data:`REFUSALS`).
        user_tokens: tokens committed, by the name of a token of access.

    """

    bytes_in: int = 0
    bytes_out: int = 0
    round_trips: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    user_tokens: Counter[str] = field(default_factory=Counter)


class Calls(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Counts calls; the first of the interceptors, so that it sees what the others refuse.

    Args:
        model_name: for the records.
        log: where the records go; None: nowhere.
        user_of: the name of the token that a call's metadata carry; None: it has no name. Names become labels
            of figures, so they have to be few: configured ones, never a client's own words.

    Attributes:
        peer_of: the address of a client, from gRPC's name of it.

    """

    def __init__(
        self,
        model_name: str,
        log: AccessLog | None = None,
        user_of: Callable[[Metadata], str | None] = lambda _metadata: None,
    ) -> None:
        self.peer_of: Callable[[str], str] = _address
        self._model_name = model_name
        self._log = log
        self._user_of = user_of
        self._lock = threading.Lock()
        self._totals = Totals()  # of calls that have ended
        self._live: set[_Call] = set()
        self._second = 0
        self._strangers = 0  # in this second
        self._unlogged = 0

    def totals(self) -> Totals:
        """What all calls have come to so far, those under way included."""
        with self._lock:
            ended, live = self._totals, list(self._live)
            found = Totals(
                ended.bytes_in,
                ended.bytes_out,
                ended.round_trips,
                ended.calls.copy(),
                ended.ended.copy(),
                ended.refused.copy(),
                ended.user_tokens.copy(),
            )
        for call in live:
            _add(found, call)
        return found

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See :class:`grpc.ServerInterceptor`."""
        handler = continuation(handler_call_details)
        if handler is None:  # no such method; gRPC answers
            with self._lock:
                self._totals.calls["other"] += 1
                self._totals.refused[REFUSALS["UNIMPLEMENTED"]] += 1
            return None
        kind = KINDS.get(handler_call_details.method, "other")
        return _Call(self, kind, self._user_of(handler_call_details.invocation_metadata or ())).handler(
            handler
        )

    # ---- from a call

    def begun(self, call: _Call) -> None:
        """The call's messages count from now on."""
        with self._lock:
            self._live.add(call)

    def over(self, call: _Call) -> None:
        """The call has ended."""
        with self._lock:
            if call not in self._live:
                return
            self._live.discard(call)
            _add(self._totals, call)
            code = call.code
            if code is not None:
                self._totals.refused[REFUSALS.get(code, "failed")] += 1
            if call.kind in ("generate", "score", "layers") and code != "UNAUTHENTICATED":
                self._totals.ended[call.how_it_ended] += 1
        if self._log is not None and call.kind != "health":
            self._write(self._log, call)

    def _write(self, log: AccessLog, call: _Call) -> None:
        record = call.record(self._model_name)
        if call.code == "UNAUTHENTICATED":
            with self._lock:
                second = int(time.monotonic())
                if second != self._second:
                    self._second, self._strangers = second, 0
                self._strangers += 1
                if self._strangers > _STRANGERS_PER_SECOND:
                    self._unlogged += 1
                    return
                record["unlogged"], self._unlogged = self._unlogged, 0
        log.write(record)


def behaviour_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    """What a handler calls, with a request, or an iterator of them, and the context."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def handler_like(
    handler: grpc.RpcMethodHandler[Any, Any], behaviour: Any, parse: Any, write: Any
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind, unary or streaming each way, that calls ``behaviour``."""
    up = "stream" if handler.request_streaming else "unary"
    down = "stream" if handler.response_streaming else "unary"
    found: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{up}_{down}_rpc_method_handler")(
        behaviour, parse, write
    )
    return found


def _address(peer: str) -> str:
    """The host and the port in gRPC's name of a peer."""
    kind, _, rest = peer.partition(":")
    return unquote(rest) if kind in ("ipv4", "ipv6") else peer


def _add(totals: Totals, call: _Call) -> None:
    totals.bytes_in += call.bytes_in
    totals.bytes_out += call.bytes_out
    totals.round_trips += call.round_trips
    totals.calls[call.kind] += 1
    if call.user is not None:
        totals.user_tokens[call.user] += call.tokens_out


class _Call:
    """One call: its handler counts what passes. What goes up is counted by one thread, what comes down by
    another.
    """

    def __init__(self, calls: Calls, kind: str, user: str | None) -> None:
        self.kind = kind
        self.user = user
        self.bytes_in = self.bytes_out = self.round_trips = 0
        self.tokens_in = self.tokens_out = self.reused = self.rows = self.passes = 0
        self.reason: str | None = None  # of Done
        self._calls = calls
        self._context: grpc.ServicerContext | None = None
        self._peer = ""
        self._time = datetime.datetime.now(datetime.timezone.utc)
        self._began = time.monotonic()
        self._code: str | None = None  # once it is over
        self._answered = False  # the answer is complete
        self._failed = False

    def handler(self, inner: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler ``inner``, counted."""
        counted = self._stream if inner.response_streaming else self._single
        up, down = self._up(inner.request_deserializer), self._down(inner.response_serializer)
        return handler_like(inner, counted(behaviour_of(inner)), up, down)

    @property
    def code(self) -> str | None:
        """The name of gRPC's status code where the call failed."""
        context: Any = self._context  # whose code() has no types
        if context is None:
            return self._code
        code = context.code()
        if code is None or code is grpc.StatusCode.OK:
            return "INTERNAL" if self._failed else None
        return str(code.name)

    @property
    def how_it_ended(self) -> str:
        """The reason of Done; why the call failed; ``"ok"``; or ``"gone"``, as its client was."""
        if self.code is not None:
            return REFUSALS.get(self.code, "failed")
        return self.reason or ("ok" if self._answered else "gone")

    def record(self, model_name: str) -> dict[str, Any]:
        """A line of the access log: numbers and names, nothing of a text."""
        return {
            "time": self._time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "peer": self._peer,
            "user": self.user,
            "kind": self.kind,
            "model": model_name,
            "ended": self.how_it_ended,
            "seconds": round(time.monotonic() - self._began, 3),
            "tokens_in": self.tokens_in,
            "tokens_reused": self.reused,
            "tokens_out": self.tokens_out,
            "rows": self.rows,
            "passes": self.passes,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }

    # ---- the handler

    def _begin(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._peer = self._calls.peer_of(context.peer())
        self._calls.begun(self)
        if not context.add_callback(self._over):
            self._over()  # the client is gone already

    def _over(self) -> None:
        self._calls.over(self)
        # The context holds the handler, and that this: gRPC counts a call among the streams of its connection
        # until the context is freed, so that calls left to the garbage collector would use these up.
        self._code, self._context = self.code, None

    def _stream(self, run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def counted(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._begin(context)
            try:
                found = run(request, context)
                if found is not None:  # a handler that aborts returns nothing
                    yield from found
            except Exception:
                self._failed = True
                raise
            self._answered = True

        return counted

    def _single(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(request: Any, context: grpc.ServicerContext) -> Any:
            self._begin(context)
            try:
                answer = run(request, context)
            except Exception:
                self._failed = True
                raise
            self._answered = True
            return answer

        return counted

    def _up(self, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        def counted(data: bytes) -> Any:
            self.bytes_in += len(data)
            self.round_trips += 1
            message = data if parse is None else parse(data)
            self._count_up(message)
            return message

        return counted

    def _down(self, write: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
        def counted(message: Any) -> bytes:
            data: bytes = message if write is None else write(message)
            self.bytes_out += len(data)
            self._count_down(message)
            return data

        return counted

    def _count_up(self, message: Any) -> None:
        if isinstance(message, pb.Up) and message.WhichOneof("kind") == "open":
            self.tokens_in += len(message.open.tokens)
        elif isinstance(message, pb.ScoreRequest):
            self.tokens_in += len(message.tokens)
        elif isinstance(message, pb.FeedUp) or (
            isinstance(message, pb.LayersUp) and message.WhichOneof("kind") == "rows"
        ):
            self.tokens_in += message.rows.n_rows

    def _count_down(self, message: Any) -> None:
        if isinstance(message, pb.ScoreReply):
            self.passes, self.rows, self.reused = 1, len(message.logprobs), message.n_reused
        if not isinstance(message, (pb.Down, pb.LayersDown)):
            return
        kind = message.WhichOneof("kind")
        if kind == "commit":
            self.passes += 1
            self.rows += 1 + message.commit.n_verified
            self.tokens_out += len(message.commit.tokens)
        elif kind == "rows" and isinstance(message, pb.LayersDown):
            self.passes += 1
            self.rows += message.rows.n_rows
        elif kind == "opened":
            opened = message.opened
            self.reused = opened.n_reused if isinstance(opened, pb.Opened) else opened.length
        elif kind == "done":
            self.reason = message.done.reason

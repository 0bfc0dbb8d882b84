"""gRPC service: authentication, parsing, replies."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sllm.engine import gguf
from sllm.engine.grammar import have_grammars
from sllm.engine.sampling import SamplingParams
from sllm.errors import AuthError, ClosedError, RemoteError
from sllm.extras import needs
from sllm.targets.base import Commit
from sllm.wire.protocol import (
    FEATURES,
    PIECE_BYTES,
    PROTOCOL,
    SERVICE,
    OtherModelError,
    abort,
    forget,
    from_sampling,
    hint_parents,
    method,
    not_offered,
    padded,
    pb,
)
from sllm.worker.rate import Rate
from sllm.worker.scheduler import Scheduler
from sllm.worker.session import Draining, Finished, Opened, Scored, Session
from sllm.worker.token_file import DEFAULT_NAME

with needs("remote"):
    import grpc
    from google.protobuf.message import DecodeError
    from grpc_health.v1 import health, health_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from sllm.engine.model import Model
    from sllm.worker.admission import Admission
    from sllm.worker.feeds import Feeds
    from sllm.worker.passes import SchedulerStats
    from sllm.worker.relay import Relay
    from sllm.worker.users import Account, Users

__all__ = [
    "Authentication",
    "Health",
    "Service",
    "begin_call",
    "check_version",
    "echo",
    "microseconds",
    "parser",
    "serialize",
    "status_reply",
    "unary",
    "unary_stream",
]

log = logging.getLogger("sllm.worker")

_MAX_ECHO = 1 << 20
_FEED = method("Feed")

_M = TypeVar("_M")
_T = TypeVar("_T")


class Health:
    """grpc.health.v1, for the worker as a whole.

    Attributes:
        servicer: for the server.
        reply: the answer to a check, serialized.
        serving: what it says.

    """

    def __init__(self) -> None:
        self.servicer = health.HealthServicer()
        self.reply = b""
        self.serving = True
        self._lock = threading.Lock()
        self._takes_texts, self._hung = True, False
        self.set(serving=True)

    def set(self, *, serving: bool) -> None:
        """Whether the worker takes texts."""
        with self._lock:
            self._takes_texts = serving
            self._publish()

    def set_hung(self, *, hung: bool) -> None:
        """Whether a pass hangs; the worker is not serving meanwhile."""
        with self._lock:
            self._hung = hung
            self._publish()

    def _publish(self) -> None:
        self.serving = self._takes_texts and not self._hung
        reply = health_pb2.HealthCheckResponse
        status = reply.SERVING if self.serving else reply.NOT_SERVING
        self.servicer.set("", status)
        self.reply = reply(status=status).SerializeToString()


class Authentication(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Rejects every call without the token, except checks of the worker's health.

    Such calls are answered at once, whatever they send or fail to send, so that none of them holds a thread
    or counts among the concurrent calls for long. Health can therefore be checked without the token but not
    watched, and the answer is that of the worker as a whole.

    Args:
        users: who may call.
        health: answers the checks.
        admission: of the calls that carry it.
        feeds: what other workers may bring by a capability; None: nothing.

    """

    def __init__(
        self, users: Users, health: Health, admission: Admission, feeds: Feeds | None = None
    ) -> None:
        self._users = users
        self._feeds = feeds
        self._admission = admission

        def refuse(_requests: Any, context: grpc.ServicerContext) -> None:
            admission.refuse(context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")

        def check(_requests: Any, _context: grpc.ServicerContext) -> Iterator[bytes]:
            yield health.reply

        # Handlers of streams do not wait for a first message.
        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)
        self._check = grpc.stream_stream_rpc_method_handler(check)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See :class:`grpc.ServerInterceptor`."""
        header = dict(handler_call_details.invocation_metadata or ()).get("authorization")
        if self._feeds is not None and handler_call_details.method == _FEED:  # no token is of use there
            known = self._feeds.knows(header)
        else:
            known = self._users.knows(header)
        if not known:
            if handler_call_details.method == "/grpc.health.v1.Health/Check":
                return self._check
            return self._refusal
        handler = continuation(handler_call_details)
        return None if handler is None else self._admission.guarded(handler)


@dataclass(frozen=True)
class _Identity:
    """Constants of a running worker that take a while to compute."""

    model_name: str
    model_id: str
    vocab_fingerprint: str
    vocabulary: bytes

    @classmethod
    def of(cls, model: Model) -> _Identity:
        path: Path = model.path
        return cls(
            path.name,
            model.id,
            model.vocab.fingerprint,
            zlib.compress(gguf.vocabulary_only(path), level=6),
        )


class Service:
    """The methods of ``sllm.proto`` over a :class:`Scheduler`."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        users: Users,
        n_ctx: int,
        *,
        own_draft: bool,
        software: str,
        relay: Relay | None = None,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._users = users
        self._n_ctx = n_ctx
        self._software = software
        self._identity = _Identity.of(model)
        self._features = list(FEATURES)
        if scheduler.limits.max_grammar and have_grammars():
            self._features += ["grammar", "json-schema"]
            model.grammars.load()  # a second for a large vocabulary: not of a client's time
        if own_draft:
            self._features.append("worker-draft")
        if scheduler.can_branch:
            self._features.append("trees")
        self._relay = relay
        if relay is not None:
            self._features.append("rpc")
        self._started = time.monotonic()
        self._instance = secrets.randbits(64) or 1

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """For :meth:`grpc.Server.add_generic_rpc_handlers`."""
        idle = self._scheduler.limits.idle_seconds
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Info": unary(self._info, pb.InfoRequest, idle),
                "Status": unary(self._status, pb.StatusRequest, idle),
                "Echo": unary(echo, pb.EchoRequest, idle),
                "Vocabulary": unary_stream(self._vocabulary, pb.VocabularyRequest, idle),
                "Score": unary(self._score, pb.ScoreRequest, idle),
                "Generate": grpc.stream_stream_rpc_method_handler(self._generate, parser(pb.Up), serialize),
                "Relay": grpc.stream_stream_rpc_method_handler(self._relayed, parser(pb.Piece), serialize),
            },
        )

    def _info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        check_version(request, context)
        limits = self._scheduler.limits
        allowance = self._caller(context).allowance
        return pb.InfoReply(
            protocol=PROTOCOL,
            features=[name for name in self._features if allowance.offers(name)],
            software=self._software,
            model_name=self._identity.model_name,
            model_id=self._identity.model_id,
            vocab_fingerprint=self._identity.vocab_fingerprint,
            n_vocab=self._model.vocab.n_tokens,
            n_ctx=self._n_ctx,
            sessions=min(limits.sessions, allowance.sessions or limits.sessions),
            n_params=self._model.n_params,
            size_bytes=self._model.size_bytes,
            max_prompt=min(filter(None, (self._n_ctx, limits.max_prompt, allowance.max_prompt))),
            max_hint=limits.max_hint,
            chat_template=self._model.chat_template or "",
            instance=self._instance,
        )

    def _caller(self, context: grpc.ServicerContext) -> Account:
        try:
            return self._users.caller(context)
        except AuthError as error:  # it was valid when the call began
            abort(context, error)

    def _vocabulary(
        self, _request: pb.VocabularyRequest, _context: grpc.ServicerContext
    ) -> Iterator[pb.Piece]:
        data = self._identity.vocabulary
        for begin in range(0, len(data), PIECE_BYTES):
            yield pb.Piece(data=data[begin : begin + PIECE_BYTES])

    def _relayed(
        self, requests: Iterator[pb.Piece | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.Piece]:
        if self._relay is None:
            abort(context, not_offered(["rpc"]))
        try:
            visit = self._users.visit(context)
        except AuthError as error:
            abort(context, error)
        if not visit.account.allowance.rpc:
            abort(context, not_offered(["rpc"]))
        visit.when_revoked(lambda _error: context.cancel())  # type: ignore[no-untyped-call]
        yield from self._relay.serve(requests, context)

    def _status(self, _request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        now = time.monotonic()
        caller = self._caller(context)
        user = caller.name
        running = [
            pb.SessionStatus(
                n_prompt=s.n_prompt,
                n_tokens=len(s.text) - s.n_prompt,
                n_passes=s.n_passes,
                n_drafted=s.n_drafted,
                n_accepted=s.n_accepted,
                seconds=now - s.created,
            )
            for s in self._scheduler.running()
            if user in (s.user, DEFAULT_NAME)  # the worker's own token shows everybody's, others their user's
        ]
        scheduler = self._scheduler
        reply = status_reply(scheduler.stats, self._started, running, scheduler.n_queued)
        reply.free, reply.draining = scheduler.n_free(caller), scheduler.draining
        return reply

    def _score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreReply:
        try:
            visit = self._users.visit(context)
            self._check_model(request.model_id)
            session = self._scheduler.submit(
                self._tokens(request.tokens),
                len(request.tokens),
                SamplingParams(),
                None,
                run_ahead=False,
                score_from=request.start,
                account=visit.account,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status
            abort(context, error)
        visit.when_revoked(session.refuse)
        if not context.add_callback(session.cancel):
            session.cancel()  # the client is gone already
        scored: Scored | None = None
        for event in session.events():
            if isinstance(event, Scored):
                scored = event
            elif isinstance(event, Finished) and event.error is not None:
                abort(context, event.error)
        if scored is None:
            abort(context, ClosedError("the worker is ending; go on elsewhere"))
        return pb.ScoreReply(
            logprobs=scored.logprobs.tolist(),
            ranks=scored.ranks.tolist(),
            n_reused=scored.n_reused,
            compute_us=microseconds(scored.seconds),
        )

    def _check_model(self, model_id: str) -> None:
        if model_id and model_id != self._identity.model_id:
            raise OtherModelError(f"the worker now has another model, {self._identity.model_name}")

    def _tokens(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        tokens = np.array(ids, dtype=np.int64)
        if len(tokens) and int(tokens.max()) >= self._scheduler.n_vocab:
            raise ValueError(
                f"the prompt holds ids that are not in the vocabulary of {self._scheduler.n_vocab} tokens"
            )
        return tokens.astype(np.int32)

    # ---- one text

    def _generate(
        self, requests: Iterator[pb.Up | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.Down]:
        trouble: list[Exception] = []
        session = begin_call(
            requests,
            context,
            lambda first: self._begin(first, context),
            lambda session: self._read(session, requests, trouble),
            self._scheduler.limits.idle_seconds,
            "a text begins with Open",
        )
        for event in session.events():
            if isinstance(event, Opened):
                yield pb.Down(
                    opened=pb.Opened(
                        n_reused=event.n_reused,
                        prompt_us=microseconds(event.prompt_seconds),
                        queued_us=microseconds(event.queued_seconds),
                    )
                )
            elif isinstance(event, Commit):
                hint = session.newest
                yield pb.Down(
                    commit=pb.Commit(
                        pos=event.pos,
                        tokens=event.tokens,
                        n_accepted=event.n_accepted,
                        n_verified=event.n_verified,
                        own_draft=event.own_draft,
                        n_own_verified=event.n_own_verified,
                        n_own_accepted=event.n_own_accepted,
                        pass_us=microseconds(event.seconds),
                        hint_id=hint.id,
                        hint_age_us=microseconds(time.monotonic() - hint.received) if hint.id else 0,
                    )
                )
            elif isinstance(event, Draining):
                yield pb.Down(draining=pb.Draining(milliseconds=min(int(event.seconds * 1e3), 2**32 - 1)))
            elif isinstance(event, Finished):
                failed = trouble.pop(0) if trouble else event.error
                if failed is not None:
                    abort(context, failed)
                yield pb.Down(done=pb.Done(reason=event.reason))

    def _open(self, message: pb.Open, account: Account) -> Session:
        unknown = [name for name in message.require if name not in self._features]
        if unknown:
            raise not_offered(unknown)
        self._check_model(message.model_id)
        return self._scheduler.submit(
            self._tokens(message.tokens),
            message.start,
            from_sampling(message.sampling),
            message.max_tokens or None,
            run_ahead=message.run_ahead,
            text_id=message.text_id,
            account=account,
        )

    def _begin(self, first: pb.Up | None, context: grpc.ServicerContext) -> Session:
        if first is None or first.WhichOneof("kind") != "open":
            raise ValueError("a text begins with Open")
        visit = self._users.visit(context)
        session = self._open(first.open, visit.account)
        visit.when_revoked(session.refuse)
        session.on_stuck = context.cancel
        if not context.add_callback(session.cancel):
            session.cancel()  # the client is gone already
        return session

    def _read(
        self, session: Session, requests: Iterator[pb.Up | ValueError], trouble: list[Exception]
    ) -> None:
        """Take the client's hints until it cancels or the call ends."""
        rate = Rate(self._scheduler.limits.hints_per_s)
        try:
            for message in requests:
                if isinstance(message, pb.Up) and message.WhichOneof("kind") == "cancel":
                    session.cancel()
                    return
                hint = self._checked_hint(message, rate)
                # Ids beyond int32 are outside the vocabulary and end their branch; see Session.usable_hint().
                session.hint(hint.pos, hint.tokens, hint.id, hint_parents(hint))
        except ValueError as error:
            trouble.append(forget(error))
            session.cancel()
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            log.debug("a client went away: %s", type(forget(error)).__name__)

    def _checked_hint(self, message: pb.Up | ValueError, rate: Rate) -> pb.Hint:
        limits = self._scheduler.limits
        if isinstance(message, ValueError):
            raise message
        if message.WhichOneof("kind") != "hint":
            raise ValueError("after Open only Hint and Cancel may come")
        if len(message.hint.tokens) > limits.max_hint:
            raise ValueError(
                f"a hint has {len(message.hint.tokens)} tokens, and the worker takes {limits.max_hint}"
            )
        if not rate.take():
            raise ValueError(f"the worker takes {limits.hints_per_s} hints per second and got more")
        return message.hint


def check_version(request: pb.InfoRequest, context: grpc.ServicerContext) -> None:
    """Reject a client that speaks another version of the protocol."""
    if request.protocol != PROTOCOL:
        abort(
            context,
            RemoteError(
                f"the client speaks version {request.protocol} of the protocol and the worker {PROTOCOL};"
                " install the same version of sllm on both"
            ),
        )


def status_reply(
    stats: SchedulerStats, started: float, running: list[pb.SessionStatus], n_queued: int = 0
) -> pb.StatusReply:
    """The running figures of a worker that has run since ``started`` (``time.monotonic()``)."""
    return pb.StatusReply(
        uptime_s=time.monotonic() - started,
        sessions=len(running),
        queued=n_queued,
        sessions_total=stats.sessions_total,
        refused=stats.refused,
        passes=stats.passes,
        tokens=stats.tokens,
        drafted=stats.drafted,
        accepted=stats.accepted,
        own_drafted=stats.own_drafted,
        own_accepted=stats.own_accepted,
        prompt_tokens=stats.prompt_tokens,
        reused_tokens=stats.reused_tokens,
        rows=stats.rows,
        batch_sizes=list(stats.batch_sizes),
        busy_s=stats.busy_seconds,
        running=running,
    )


def begin_call(
    requests: Iterator[_M | ValueError],
    context: grpc.ServicerContext,
    begin: Callable[[_M | None], _T],
    read: Callable[[_T], None],
    seconds: float,
    expected: str,
) -> _T:
    """Read the messages of a call on a thread of its own, which ends with the call at the latest.

    Args:
        requests: the messages, or the errors of parsing them.
        context: the call; it is aborted where ``begin`` raises or the first message does not arrive.
        begin: makes something of the first message (None: the call has ended), on that thread.
        read: takes the rest of the messages, with what ``begin`` has returned.
        seconds: for the first message to arrive.
        expected: which message the call begins with, as a sentence for the client.

    Returns:
        What ``begin`` has returned.

    """
    opening: queue.SimpleQueue[_T | Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            first = next(requests, None)
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            forget(error)
            first = None
        if isinstance(first, ValueError):
            opening.put(first)
            return
        opening.put(None)  # what follows may take longer
        try:
            begun = begin(first)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status
            opening.put(error)
            return
        opening.put(begun)
        read(begun)

    threading.Thread(target=run, name="sllm-session", daemon=True).start()
    try:
        found = opening.get(timeout=seconds)
    except queue.Empty:
        abort(context, ValueError(f"{expected}, and none came in {seconds:g} seconds"))
    if found is None:
        found = opening.get()
    if isinstance(found, Exception):
        abort(context, found)
    assert found is not None
    return found


def echo(request: pb.EchoRequest, context: grpc.ServicerContext) -> pb.EchoReply:
    """Reply with as many bytes as were asked for."""
    if request.reply_bytes > _MAX_ECHO:
        abort(context, ValueError(f"reply_bytes is {request.reply_bytes}, expected at most {_MAX_ECHO}"))
    return pb.EchoReply(padding=bytes(request.reply_bytes))


def unary(run: Callable[..., Any], request: Any, seconds: float) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of a call with one request, which has to arrive within ``seconds``, and one reply."""

    def checked(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        return run(_only(messages, context, request, seconds), context)

    # gRPC's own handlers of one request would hold a thread for as long as it does not come.
    return grpc.stream_unary_rpc_method_handler(checked, parser(request), serialize)


def unary_stream(run: Callable[..., Any], request: Any, seconds: float) -> grpc.RpcMethodHandler[Any, Any]:
    """As :func:`unary`, with many replies."""

    def checked(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        yield from run(_only(messages, context, request, seconds), context)

    return grpc.stream_stream_rpc_method_handler(checked, parser(request), serialize)


def _only(messages: Iterator[Any], context: grpc.ServicerContext, request: Any, seconds: float) -> Any:
    """The one message of a call; ends the call if it cannot be parsed or does not arrive in time."""
    name = request.DESCRIPTOR.name

    def begin(message: Any) -> Any:
        if message is None:
            raise ValueError(f"the call ended before its {name}")
        return message

    expected = f"the call needs {_article(name)} {name}"
    return begin_call(messages, context, begin, lambda _message: None, seconds, expected)


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def parser(kind: Any) -> Callable[[bytes], Any]:
    """A parser of messages that returns the error for bytes it cannot parse: the client gets it as a status,
    where grpc would log the traceback of an exception and report an internal error.
    """

    def parse(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return ValueError(f"not a {kind.DESCRIPTOR.name} message of version {PROTOCOL} of the protocol")

    return parse


def serialize(message: Any) -> bytes:
    """A reply as bytes, padded where its type has padding."""
    sized = isinstance(message, (pb.Piece, pb.EchoReply)) or (  # of the size they have
        isinstance(message, pb.LayersDown) and bool(message.rows.data)
    )
    data: bytes = (message if sized else padded(message)).SerializeToString()
    return data


def microseconds(seconds: float) -> int:
    """Seconds for a uint32 of microseconds."""
    return min(int(seconds * 1e6), 2**32 - 1)

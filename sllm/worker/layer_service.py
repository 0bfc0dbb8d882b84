"""gRPC service of a worker of layers: hidden states in, hidden states or tokens out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from sllm.engine import gguf
from sllm.engine.grammar import have_grammars
from sllm.engine.tree import is_chain
from sllm.errors import AuthError, RemoteError, SllmError
from sllm.extras import needs
from sllm.wire import codec
from sllm.wire.protocol import NOISES, PROTOCOL, SERVICE, abort, forget, from_sampling, not_offered, pb
from sllm.worker.destinations import Destinations
from sllm.worker.feeds import Feed, Feeds
from sllm.worker.hops import Hop, Hops
from sllm.worker.layer_scheduler import LayerScheduler, RangeKey
from sllm.worker.layer_sequence import LayerAnswer, LayerRequest, LayerSequence
from sllm.worker.service import (
    begin_call,
    check_version,
    echo,
    microseconds,
    parser,
    serialize,
    status_reply,
    unary,
)

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.worker.users import Account, Users

__all__ = ["LayerService"]

log = logging.getLogger("sllm.worker")

FEATURES = ("layers", "early-rows", "hop-in", "status", "echo", *NOISES)
"""What every worker of layers offers; ``"json-schema"``, ``"hop-out"`` and ``"trees"`` depend on its options
and its model."""


class LayerService:
    """The methods of ``sllm.proto`` over a :class:`LayerScheduler`.

    Attributes:
        feeds: what other workers may bring.

    """

    def __init__(self, scheduler: LayerScheduler, users: Users, *, software: str) -> None:
        self._scheduler = scheduler
        self._users = users
        self._software = software
        grammars = scheduler.limits.max_grammar and have_grammars()
        self._features = [*FEATURES, "json-schema"] if grammars else list(FEATURES)
        self.feeds = Feeds()
        self._hops = Hops(Destinations(scheduler.limits.hops), scheduler.limits.sessions)
        if self._hops.allowed:
            self._features.append("hop-out")
        if scheduler.can_branch:
            self._features.append("trees")
        self._model_id = gguf.model_id(scheduler.file.paths[0])
        self._started = time.monotonic()

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """For :meth:`grpc.Server.add_generic_rpc_handlers`."""
        idle = self._scheduler.limits.idle_seconds
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Info": unary(self._info, pb.InfoRequest, idle),
                "Status": unary(self._status, pb.StatusRequest, idle),
                "Echo": unary(echo, pb.EchoRequest, idle),
                "Layers": grpc.stream_stream_rpc_method_handler(self._layers, parser(pb.LayersUp), serialize),
                "Feed": grpc.stream_stream_rpc_method_handler(self._feed, parser(pb.FeedUp), serialize),
                "Generate": grpc.stream_stream_rpc_method_handler(_no_texts, parser(pb.Up), serialize),
                "Vocabulary": grpc.stream_stream_rpc_method_handler(
                    _no_texts, parser(pb.VocabularyRequest), serialize
                ),
            },
        )

    def close(self) -> None:
        """Hang up on other workers. More calls do nothing."""
        self._hops.close()

    def _info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        check_version(request, context)
        scheduler = self._scheduler
        file = scheduler.file
        start, stop = scheduler.fixed or (file.layers.start, file.layers.stop)
        return pb.InfoReply(
            protocol=PROTOCOL,
            features=self._features,
            software=self._software,
            model_name=file.paths[0].name,
            model_id=self._model_id,
            n_ctx=scheduler.n_ctx,
            sessions=scheduler.limits.sessions,
            layers=pb.LayersInfo(
                n_layer=file.n_layer,
                n_embd=file.n_embd,
                start=start,
                stop=stop,
                fixed=scheduler.fixed is not None,
                output=file.output is not None and stop == file.n_layer,
                max_rows=scheduler.max_rows,
            ),
        )

    def _status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.StatusReply:
        running = [pb.SessionStatus(n_tokens=sequence.length) for sequence in self._scheduler.running()]
        return status_reply(self._scheduler.stats, self._started, running)

    # ---- one sequence

    def _layers(
        self, requests: Iterator[pb.LayersUp | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.LayersDown]:
        trouble: list[Exception] = []
        scheduler = self._scheduler
        stream = begin_call(
            requests,
            context,
            lambda first: self._begin(first, context),
            lambda stream: self._read(stream, requests, context, trouble),
            scheduler.limits.idle_seconds,
            "a sequence begins with LayersOpen",
        )
        sequence, hop = stream.sequence, stream.hop
        yield pb.LayersDown(opened=pb.LayersOpened(length=sequence.n_kept, n_ctx=scheduler.n_ctx))
        try:
            for answer in sequence.answers():
                if hop is None:
                    yield _message(answer, stream.encoding)
                else:
                    hop.send(_rows(answer, stream.encoding))
        except Exception as error:  # noqa: BLE001 - the client gets a status
            trouble.append(error)
        finally:
            stream.close()
        if trouble:
            abort(context, trouble.pop(0))
        if sequence.ended in ("idle", "closing", "hop", "feed"):
            yield pb.LayersDown(done=pb.Done(reason=sequence.ended))

    def _open(self, message: pb.LayersOpen, account: Account) -> _Stream:
        file = self._scheduler.file
        if message.model_id != self._model_id:
            raise RemoteError(f"the worker has layers of another model, {file.paths[0].name}")
        if message.codec not in codec.CODECS:
            raise not_offered([f"codec {message.codec}"])
        codec.row_bytes(message.codec, file.n_embd)
        if message.HasField("next"):
            if not self._hops.allowed:
                raise not_offered(["hop-out"])
            if message.output:
                raise ValueError("after the output there are no layers: the rows have no next worker")
        sequence = self._scheduler.open(
            RangeKey(message.start, message.stop, message.output),
            message.sequence_id,
            from_sampling(message.sampling) if message.output else None,
            message.text_start,
            account,
        )
        stream = _Stream(sequence, message.codec)
        try:
            self._connect(stream, message)
        except BaseException:
            sequence.detach()
            stream.close()
            raise
        return stream

    def _connect(self, stream: _Stream, message: pb.LayersOpen) -> None:
        """Find the workers that the rows come from and go to, where these are not the client."""
        sequence = stream.sequence

        if message.HasField("held") and message.held > sequence.n_kept:
            sequence.end("idle")  # what the client has sent already leaves a gap
        if message.accept:
            digest = bytes(message.accept)
            feed = Feed(
                sequence.user, lambda *rows: self._submit(stream, *rows), partial(sequence.end, "feed")
            )
            self.feeds.register(digest, feed)
            stream.feed, stream.forget = feed, lambda: self.feeds.drop(digest)
        if message.HasField("next"):
            stream.hop = self._hops.open(message.next, partial(sequence.end, "hop"))

    def _begin(self, first: pb.LayersUp | None, context: grpc.ServicerContext) -> _Stream:
        if first is None or first.WhichOneof("kind") != "open":
            raise ValueError("a sequence begins with LayersOpen")
        visit = self._users.visit(context)
        stream = self._open(first.open, visit.account)
        sequence = stream.sequence
        visit.when_revoked(sequence.tell)
        sequence.on_stuck = context.cancel

        def gone() -> None:
            sequence.detach()
            stream.close()

        if not context.add_callback(gone):
            gone()  # the client is gone already
        return stream

    def _read(
        self,
        stream: _Stream,
        requests: Iterator[pb.LayersUp | ValueError],
        context: grpc.ServicerContext,
        trouble: list[Exception],
    ) -> None:
        """Take the client's rows until it cancels or the call ends."""
        sequence = stream.sequence
        try:
            for message in requests:
                if isinstance(message, ValueError):
                    raise ValueError(*message.args)  # not itself, which would hold this frame that holds it
                kind = message.WhichOneof("kind")
                if kind == "cancel":
                    sequence.release()
                    return
                if kind != "rows":
                    raise ValueError("after LayersOpen only Rows and Cancel may come")
                if stream.feed is None:
                    sequence.submit(self._request(message.rows, message.rows, stream.encoding))
                else:
                    if message.rows.data:
                        raise ValueError("rows that another worker brings come without data from the client")
                    self._check(message.rows)
                    stream.feed.announce(message.rows)
            sequence.finish()
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            if context.is_active() and sequence.ended is None:
                if isinstance(error, (SllmError, ValueError)):
                    forget(error)
                trouble.append(error)
            else:
                forget(error)
            sequence.end("refused")

    def _check(self, asked: pb.Rows) -> None:
        """Reject what no request may be."""
        if not 1 <= asked.n_rows <= self._scheduler.max_rows:
            raise ValueError(f"{asked.n_rows} rows at once, expected 1 to {self._scheduler.max_rows}")
        if len(asked.parents) >= asked.n_rows:
            raise ValueError(f"{len(asked.parents)} parents for {asked.n_rows} rows: one is before a tree")

    def _request(self, asked: pb.Rows, brought: pb.Rows, encoding: str, spent: float = 0.0) -> LayerRequest:
        """What is to be computed: as it was asked for, with the numbers that came."""
        self._check(asked)
        hidden = codec.decode(brought.data, asked.n_rows, self._scheduler.file.n_embd, encoding)
        parents = () if is_chain(asked.parents) else tuple(asked.parents)
        return LayerRequest(
            asked.pos, hidden, asked.silent, tuple(asked.tokens), asked.n_select, parents, spent
        )

    # ---- rows from the worker before

    def _feed(
        self, requests: Iterator[pb.FeedUp | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.FeedDown]:
        headers = dict(context.invocation_metadata() or ())
        try:
            feed = self.feeds.claim(headers.get("authorization"))
        except AuthError as error:
            abort(context, error)
        try:
            feed.attach(context.cancel)
            yield pb.FeedDown()
            for message in requests:
                if isinstance(message, ValueError):
                    break
                feed.bring(message.rows)
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            forget(error)
        finally:
            feed.lose()

    def _submit(self, stream: _Stream, asked: pb.Rows, brought: pb.Rows) -> bool:
        """Have rows computed that another worker has brought; whether they are those that were asked for."""
        sequence = stream.sequence
        if (brought.pos, brought.n_rows) != (asked.pos, asked.n_rows):
            return False
        try:
            request = self._request(asked, brought, stream.encoding, brought.compute_us * 1e-6)
        except ValueError as error:
            log.info("rows of another worker are invalid: %s", forget(error))
            return False
        try:
            sequence.submit(request)
        except (SllmError, ValueError) as error:  # which the client is to hear of, and not the other worker
            sequence.tell(forget(error))
        return True


@dataclass
class _Stream:
    """One call of ``Layers``.

    Attributes:
        sequence: what is computed.
        encoding: of hidden states.
        feed: brings the rows; None: the client does.
        hop: takes them on; None: they go back to the client.
        forget: makes the capability void that the feed was registered with.

    """

    sequence: LayerSequence
    encoding: str
    feed: Feed | None = None
    hop: Hop | None = None
    forget: Callable[[], object] = lambda: None

    def close(self) -> None:
        """End what leads to other workers. More calls do nothing."""
        self.forget()
        if self.feed is not None:
            self.feed.close()
        if self.hop is not None:
            self.hop.close()


def _message(answer: LayerAnswer, encoding: str) -> pb.LayersDown:
    if answer.tokens:
        return pb.LayersDown(
            commit=pb.Commit(
                pos=answer.pos,
                tokens=answer.tokens,
                n_accepted=answer.n_accepted,
                n_verified=answer.n_verified,
                pass_us=microseconds(answer.seconds),
            )
        )
    return pb.LayersDown(rows=_rows(answer, encoding))


def _rows(answer: LayerAnswer, encoding: str) -> pb.Rows:
    return pb.Rows(
        pos=answer.pos,
        n_rows=answer.n_rows,
        data=b"" if answer.hidden is None else codec.encode(answer.hidden, encoding),
        compute_us=microseconds(answer.seconds),
    )


def _no_texts(_request: Any, context: grpc.ServicerContext) -> NoReturn:
    abort(context, not_offered(["texts: it serves layers of a model; use SplitTarget(middle=...)"]))

"""gRPC service of a worker of layers: hidden states in, hidden states or tokens out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from sllm.engine import gguf
from sllm.engine.grammar import have_grammars
from sllm.errors import RemoteError, SllmError
from sllm.extras import needs
from sllm.wire import codec
from sllm.wire.protocol import PROTOCOL, SERVICE, abort, forget, from_sampling, not_offered, pb
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
    from collections.abc import Iterator

    from sllm.worker.users import Account, Users

__all__ = ["LayerService"]

FEATURES = ("layers", "status", "echo")
"""What every worker of layers offers; ``"json-schema"`` depends on its options."""


class LayerService:
    """The methods of ``sllm.proto`` over a :class:`LayerScheduler`."""

    def __init__(self, scheduler: LayerScheduler, users: Users, *, software: str) -> None:
        self._scheduler = scheduler
        self._users = users
        self._software = software
        grammars = scheduler.limits.max_grammar and have_grammars()
        self._features = [*FEATURES, "json-schema"] if grammars else list(FEATURES)
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
                "Generate": grpc.stream_stream_rpc_method_handler(_no_texts, parser(pb.Up), serialize),
                "Vocabulary": grpc.stream_stream_rpc_method_handler(
                    _no_texts, parser(pb.VocabularyRequest), serialize
                ),
            },
        )

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
        sequence, encoding = begin_call(
            requests,
            context,
            lambda first: self._begin(first, context),
            lambda opened: self._read(*opened, requests, context, trouble),
            scheduler.limits.idle_seconds,
            "a sequence begins with LayersOpen",
        )
        yield pb.LayersDown(opened=pb.LayersOpened(length=sequence.n_kept, n_ctx=scheduler.n_ctx))
        try:
            for answer in sequence.answers():
                yield _message(answer, encoding)
        except Exception as error:  # noqa: BLE001 - the client gets a status
            trouble.append(error)
        if trouble:
            abort(context, trouble.pop(0))
        if sequence.ended in ("idle", "closing"):
            yield pb.LayersDown(done=pb.Done(reason=sequence.ended))

    def _open(self, message: pb.LayersOpen, account: Account) -> tuple[LayerSequence, str]:
        file = self._scheduler.file
        if message.model_id != self._model_id:
            raise RemoteError(f"the worker has layers of another model, {file.paths[0].name}")
        if message.codec not in codec.CODECS:
            raise not_offered([f"codec {message.codec}"])
        codec.row_bytes(message.codec, file.n_embd)
        sequence = self._scheduler.open(
            RangeKey(message.start, message.stop, message.output),
            message.sequence_id,
            from_sampling(message.sampling) if message.output else None,
            message.text_start,
            account,
        )
        return sequence, message.codec

    def _begin(self, first: pb.LayersUp | None, context: grpc.ServicerContext) -> tuple[LayerSequence, str]:
        if first is None or first.WhichOneof("kind") != "open":
            raise ValueError("a sequence begins with LayersOpen")
        visit = self._users.visit(context)
        sequence, encoding = self._open(first.open, visit.account)
        visit.when_revoked(sequence.tell)
        sequence.on_stuck = context.cancel
        if not context.add_callback(sequence.detach):
            sequence.detach()  # the client is gone already
        return sequence, encoding

    def _read(
        self,
        sequence: LayerSequence,
        encoding: str,
        requests: Iterator[pb.LayersUp | ValueError],
        context: grpc.ServicerContext,
        trouble: list[Exception],
    ) -> None:
        """Take the client's rows until it cancels or the call ends."""
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
                sequence.submit(self._request(message.rows, encoding))
            sequence.finish()
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            if context.is_active() and sequence.ended is None:
                if isinstance(error, (SllmError, ValueError)):
                    forget(error)
                trouble.append(error)
            else:
                forget(error)
            sequence.end("refused")

    def _request(self, rows: pb.Rows, encoding: str) -> LayerRequest:
        if not 1 <= rows.n_rows <= self._scheduler.max_rows:
            raise ValueError(f"{rows.n_rows} rows at once, expected 1 to {self._scheduler.max_rows}")
        hidden = codec.decode(rows.data, rows.n_rows, self._scheduler.file.n_embd, encoding)
        return LayerRequest(rows.pos, hidden, rows.silent, tuple(rows.tokens), rows.n_select)


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
    return pb.LayersDown(
        rows=pb.Rows(
            pos=answer.pos,
            n_rows=answer.n_rows,
            data=b"" if answer.hidden is None else codec.encode(answer.hidden, encoding),
            compute_us=microseconds(answer.seconds),
        )
    )


def _no_texts(_request: Any, context: grpc.ServicerContext) -> NoReturn:
    abort(context, not_offered(["texts: it serves layers of a model; use SplitTarget(middle=...)"]))

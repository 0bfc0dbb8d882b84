"""The wire's side of a worker of layers: hidden states in, hidden states or tokens out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from sllm.engine import gguf
from sllm.errors import RemoteError
from sllm.wire import codec
from sllm.wire.protocol import PROTOCOL, SERVICE, abort, from_sampling, not_offered, pb
from sllm.worker.layer_scheduler import LayerAnswer, LayerRequest, LayerScheduler, LayerSequence, RangeKey
from sllm.worker.service import check_version, echo, microseconds, parser, serialize, unary

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LayerService"]

log = logging.getLogger("sllm.worker")

FEATURES = ("layers", "status", "echo")


class LayerService:
    """The methods of ``sllm.proto`` over a :class:`LayerScheduler`."""

    def __init__(self, scheduler: LayerScheduler, *, software: str) -> None:
        self._scheduler = scheduler
        self._software = software
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
            features=FEATURES,
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
        stats = self._scheduler.stats
        running = self._scheduler.running()
        return pb.StatusReply(
            uptime_s=time.monotonic() - self._started,
            sessions=len(running),
            sessions_total=stats.sessions_total,
            refused=stats.refused,
            passes=stats.passes,
            tokens=stats.tokens,
            drafted=stats.drafted,
            accepted=stats.accepted,
            reused_tokens=stats.reused_tokens,
            rows=stats.rows,
            batch_sizes=list(stats.batch_sizes),
            busy_s=stats.busy_seconds,
            running=[pb.SessionStatus(n_tokens=sequence.length) for sequence in running],
        )

    # ---- one sequence

    def _layers(
        self, requests: Iterator[pb.LayersUp | ValueError], context: grpc.ServicerContext
    ) -> Iterator[pb.LayersDown]:
        trouble: list[Exception] = []
        opening: queue.SimpleQueue[tuple[LayerSequence, str] | Exception | None] = queue.SimpleQueue()
        # Daemonic: it ends with the call at the latest.
        threading.Thread(
            target=self._read, args=(requests, context, opening, trouble), name="sllm-sequence", daemon=True
        ).start()
        idle = self._scheduler.limits.idle_seconds
        try:
            opened = opening.get(timeout=idle)
        except queue.Empty:
            opened = ValueError(f"a sequence begins with LayersOpen, and none came in {idle:g} seconds")
        if opened is None:
            opened = opening.get()  # it has spoken; loading the layers may take long
        if isinstance(opened, Exception):
            abort(context, opened)
        assert opened is not None
        sequence, encoding = opened
        scheduler = self._scheduler
        yield pb.LayersDown(opened=pb.LayersOpened(length=sequence.n_kept, n_ctx=scheduler.n_ctx))
        try:
            for answer in sequence.answers():
                yield _message(answer, encoding)
        except Exception as error:  # noqa: BLE001 - the client gets a status
            trouble.append(error)
        if trouble:
            abort(context, trouble[0])
        if sequence.ended in ("idle", "closing"):
            yield pb.LayersDown(done=pb.Done(reason=sequence.ended))

    def _open(self, message: pb.LayersOpen) -> tuple[LayerSequence, str]:
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
        )
        return sequence, message.codec

    def _read(
        self,
        requests: Iterator[pb.LayersUp | ValueError],
        context: grpc.ServicerContext,
        opening: queue.SimpleQueue[tuple[LayerSequence, str] | Exception | None],
        trouble: list[Exception],
    ) -> None:
        """Take what the client says, on a thread of its own, until the call ends."""
        try:
            first = next(requests, None)
            opening.put(None)
            if isinstance(first, ValueError):
                raise first
            if first is None or first.WhichOneof("kind") != "open":
                raise ValueError("a sequence begins with LayersOpen")
            sequence, encoding = self._open(first.open)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status
            opening.put(error)
            return
        sequence.on_stuck = context.cancel
        opening.put((sequence, encoding))
        if not context.add_callback(sequence.detach):
            sequence.detach()  # the client is gone already
        try:
            for message in requests:
                if isinstance(message, ValueError):
                    raise message
                kind = message.WhichOneof("kind")
                if kind == "cancel":
                    sequence.release()
                    return
                if kind != "rows":
                    raise ValueError("behind LayersOpen only Rows and Cancel may come")
                sequence.submit(self._request(message.rows, encoding))
            sequence.finish()
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the call is over
            if context.is_active() and sequence.ended is None:
                trouble.append(error)
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

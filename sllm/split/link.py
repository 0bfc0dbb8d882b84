"""The client's end of a worker of layers: rows go out, answers come back in order, and a lost link costs a
re-send.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import DecodeError

from sllm.errors import BusyError, CancelledError, ClosedError, RemoteError
from sllm.remote.stream import Reconnection
from sllm.wire import auth, codec
from sllm.wire.protocol import failure, method, pb, to_sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc
    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams
    from sllm.remote.connection import Remote
    from sllm.targets.base import RemoteStats

__all__ = ["Answer", "LayerLink"]

log = logging.getLogger("sllm.remote")

_T = TypeVar("_T")

_MESSAGE_BYTES = 1 << 20
"""Of rows in one message, at most."""

_GOODBYE_SECONDS = 1.0
"""For the worker to end a stream that is not needed any more."""


@dataclass(frozen=True)
class Answer:
    """What a worker made of the rows of one :meth:`LayerLink.send`.

    Attributes:
        pos: of the first row, or of the first selected token.
        hidden: float32 (n, n_embd), or None where the rows were silent or tokens were selected.
        tokens: what the worker selected, if it was to.
        n_accepted: how many of these had been drafted.

    """

    pos: int
    hidden: npt.NDArray[np.float32] | None
    tokens: tuple[int, ...]
    n_accepted: int


@dataclass
class _Sent:
    """Rows that were not answered yet."""

    message: pb.LayersUp
    at: float


class LayerLink:
    """One sequence on a worker of layers. One thread at a time, but for :meth:`cancel`.

    It keeps what it has sent, encoded, so that after a lost link the worker gets again, to the bit, what it
    does not have any more.

    Args:
        remote: the connection.
        start, stop, output: which layers, and whether the model's output is there, too.
        encoding: a name of :data:`sllm.wire.codec.CODECS`.
        on_loss: ``"wait"`` or ``"raise"``.

    """

    def __init__(
        self, remote: Remote, start: int, stop: int, *, output: bool, encoding: str, on_loss: str
    ) -> None:
        info = remote.info.layers
        assert info is not None
        self._remote = remote
        self._range = (start, stop, output)
        self._encoding = encoding
        self._on_loss = on_loss
        if info.n_embd < 1 or info.max_rows < 1:
            raise RemoteError(
                f"{remote.address.endpoint} says that it takes {info.max_rows} hidden states of"
                f" {info.n_embd} numbers at once"
            )
        self._n_embd = info.n_embd
        self._row = codec.row_bytes(encoding, self._n_embd)
        self._sequence_id = secrets.randbits(64) or 1
        self._kept = bytearray()  # the rows at all positions so far
        self._tokens: list[int] = []  # with an output, theirs
        self._sampling: pb.Sampling | None = None
        self._text_start = 0
        self._unanswered: deque[_Sent] = deque()
        self._refills: deque[tuple[int, int]] = deque()  # positions and rows that were sent again
        self._idle = False  # the worker has ended a stream as idle, and nothing was answered since
        self._outbox: queue.SimpleQueue[pb.LayersUp | None] | None = None
        self._call: Any = None
        self._channel: grpc.Channel | None = None
        self._gone = threading.Event()
        self._cancelled = False
        self._stats: RemoteStats
        self._reconnection: Reconnection
        self.max_rows = max(1, min(info.max_rows, _MESSAGE_BYTES // self._row))

    def begin(
        self, keep: int, stats: RemoteStats, sampling: SamplingParams | None = None, text_start: int = 0
    ) -> None:
        """Start a text that has its first ``keep`` positions in common with the one before."""
        del self._kept[keep * self._row :], self._tokens[keep:]
        self._unanswered.clear()
        self._idle = False
        self._stats = stats
        self._gone = threading.Event()
        self._cancelled = False
        self._reconnection = Reconnection(self._remote, self._gone, stats)
        self._sampling = None if sampling is None else to_sampling(sampling)
        self._text_start = text_start

    def send(
        self,
        pos: int,
        hidden: npt.NDArray[np.float32],
        *,
        tokens: list[int] | None = None,
        n_select: int = 0,
        silent: bool = False,
    ) -> None:
        """Send rows, without waiting. Whatever was at or behind ``pos`` is void.

        Args:
            pos: of the first row.
            hidden: float32 (n, n_embd), n <= :attr:`max_rows`.
            tokens: with an output, those of the rows.
            n_select: the last so many rows are the text's last token and what is drafted behind it.
            silent: the hidden states that come out are not needed.

        Raises:
            ValueError: numbers that are not finite, or too large for the codec.

        """
        data = codec.encode(hidden, self._encoding)
        del self._kept[pos * self._row :]
        self._kept += data
        if tokens is not None:
            self._tokens[pos:] = tokens
        message = pb.LayersUp(
            rows=pb.Rows(
                pos=pos, n_rows=len(hidden), data=data, silent=silent, tokens=tokens or (), n_select=n_select
            )
        )
        self._unanswered.append(_Sent(message, time.perf_counter()))
        if self._outbox is not None:
            self._put(message)

    def connect(self) -> None:
        """Open the stream, if it is not open.

        Raises:
            As :meth:`receive`.

        """
        self._lasting(lambda: None)

    def receive(self) -> Answer:
        """The answer to the first rows that were not answered yet; connects, and connects again, as needed.

        Raises:
            CancelledError: :meth:`cancel` was called.
            RemoteError: the link is lost for good, or the worker does not do what was agreed.
            BusyError, ValueError, ContextFullError: what the worker refused with.

        """
        return self._lasting(self._next)

    def _lasting(self, step: Callable[[], _T]) -> _T:
        """``step`` on an open stream, for as long as it takes to find one."""
        channel = self._remote._live()
        while True:
            trouble: object
            opened = False
            try:
                if self._call is None:
                    self._connect(channel)
                opened = True
                return step()
            except _Broken as broken:
                trouble = broken.args[0]
            self._hang_up_call()
            if self._cancelled:
                raise CancelledError("the generation was cancelled")
            if self._gone.is_set() or self._remote.closed:
                raise ClosedError("the connection is closed")
            if trouble is _IDLE:
                if not self._idle:  # it has heard nothing for long, or so it says
                    self._idle = True
                    continue
                trouble = "the worker takes every stream for idle"
            if trouble is _MOVED:
                channel = self._remote._live()
                continue
            endpoint = self._remote.address.endpoint
            busy = isinstance(trouble, BusyError) and self._reconnection.lost
            if isinstance(trouble, Exception) and not busy:
                self._unanswered.clear()
                raise trouble
            if self._reconnection.lose() and self._on_loss != "raise":
                log.warning("the link to %s is lost: %s", endpoint, trouble)
            if self._on_loss == "raise":
                self._unanswered.clear()
                raise RemoteError(f"the link to {endpoint} was lost: {trouble}")
            found = self._reconnection.again(channel, trouble, busy=busy, elsewhere=not opened)
            if found is None:
                raise CancelledError("the generation was cancelled")
            channel = found

    def cancel(self) -> None:
        """End a :meth:`receive` on another thread."""
        self._cancelled = True
        self._gone.set()
        call = self._call
        if call is not None:
            call.cancel()

    def suspend(self) -> None:
        """End the stream; the worker keeps what it has for a while."""
        self._unanswered.clear()
        self._hang_up_call()

    def release(self) -> None:
        """End the stream; the worker need not keep anything."""
        if self._outbox is not None:
            self._outbox.put(pb.LayersUp(cancel=pb.Cancel()))
            self._outbox.put(None)
            self._outbox = None
            timer = threading.Timer(_GOODBYE_SECONDS, self._call.cancel)
            timer.start()
            try:  # the worker ends the stream when it has seen it
                for _ in self._call:
                    pass
            except Exception as error:  # noqa: BLE001 - a lost link does as well
                log.debug("a sequence was not released: %s", type(error).__name__)
            finally:
                timer.cancel()
                timer.join()
        self.suspend()
        self._kept.clear()
        self._tokens.clear()

    # ---- for the connection

    def _hang_up(self) -> None:
        self._gone.set()
        call = self._call
        if call is not None:
            call.cancel()

    def _join(self) -> None:
        """There is no thread."""

    # ---- the stream

    def _put(self, message: pb.LayersUp) -> None:
        assert self._outbox is not None
        self._stats.bytes_up += message.ByteSize()
        self._outbox.put(message)

    def _connect(self, channel: grpc.Channel) -> None:
        start, stop, output = self._range
        remote = self._remote
        self._outbox = queue.SimpleQueue()
        outgoing: Iterator[pb.LayersUp] = iter(self._outbox.get, None)
        # What comes is parsed in _read(): grpc leaves a call open whose answer it could not parse.
        stream = channel.stream_stream(method("Layers"), pb.LayersUp.SerializeToString, None)
        self._put(
            pb.LayersUp(
                open=pb.LayersOpen(
                    model_id=remote.info.model_id,
                    start=start,
                    stop=stop,
                    output=output,
                    codec=self._encoding,
                    sampling=self._sampling,
                    text_start=self._text_start,
                    sequence_id=self._sequence_id,
                )
            )
        )
        try:
            call = stream(outgoing, metadata=auth.bearer(remote.address.token), wait_for_ready=False)
        except ValueError:  # closed: somebody else has renewed it, or close() was called
            self._outbox = None
            raise _Broken("the channel was closed" if channel is remote._channel else _MOVED) from None
        self._call, self._channel = call, channel
        remote._streams.add(self)
        if self._gone.is_set():
            call.cancel()  # type: ignore[no-untyped-call]
        first_message = self._read()
        if first_message.WhichOneof("kind") != "opened":
            raise _Broken(RemoteError(f"{remote.address.endpoint} answers before it has opened the sequence"))
        opened = first_message.opened
        if opened.n_ctx < max(1, len(self._kept) // self._row):
            raise _Broken(RemoteError(f"{remote.address.endpoint} holds only {opened.n_ctx} positions"))
        # What was answered is there, unless it was lost; what was not is sent again in any case.
        end = len(self._kept) // self._row
        first = min((sent.message.rows.pos for sent in self._unanswered), default=end)
        self._stats.n_reused = max(self._stats.n_reused, min(opened.length, first))
        self._refills.clear()
        for pos in range(min(opened.length, first), first, self.max_rows):
            n = min(self.max_rows, first - pos)
            data = bytes(self._kept[pos * self._row : (pos + n) * self._row])
            rows = pb.Rows(pos=pos, n_rows=n, data=data, silent=True, tokens=self._tokens[pos : pos + n])
            self._put(pb.LayersUp(rows=rows))
            self._refills.append((pos, n))
        for sent in self._unanswered:
            sent.at = time.perf_counter()
            self._put(sent.message)

    def _next(self) -> Answer:
        endpoint = self._remote.address.endpoint
        while self._refills:
            again = self._read().rows
            if (again.pos, again.n_rows) != self._refills[0]:
                raise _Broken(_wrong_rows(endpoint, again, *self._refills[0]))
            self._refills.popleft()
        message = self._read()
        arrived = time.perf_counter()
        sent = self._unanswered[0]
        asked = sent.message.rows
        if message.WhichOneof("kind") == "commit":
            commit, n = message.commit, asked.n_select
            at, tokens = asked.pos + asked.n_rows - n + 1, tuple(commit.tokens)
            if not n or commit.pos != at or not 1 <= len(tokens) <= n or commit.n_accepted != len(tokens) - 1:
                raise _Broken(RemoteError(f"{endpoint} selected {len(tokens)} tokens at {commit.pos}"))
            answer = Answer(at, None, tokens, commit.n_accepted)
            seconds = commit.pass_us * 1e-6
        else:
            rows = message.rows
            if (rows.pos, rows.n_rows) != (asked.pos, asked.n_rows) or asked.n_select:
                raise _Broken(_wrong_rows(endpoint, rows, asked.pos, asked.n_rows, asked.n_select))
            hidden = None
            if not asked.silent and not self._range[2]:
                try:
                    hidden = codec.decode(rows.data, rows.n_rows, self._n_embd, self._encoding)
                except ValueError as error:
                    raise _Broken(
                        RemoteError(f"{endpoint} sent hidden states that are none: {error}")
                    ) from None
            answer = Answer(rows.pos, hidden, (), 0)
            seconds = rows.compute_us * 1e-6
        self._unanswered.popleft()
        self._idle = False
        self._stats.observe_round_trip(arrived - sent.at - seconds)
        self._remote._round_trip = self._stats.round_trip
        self._reconnection.progress()
        return answer

    def _read(self) -> pb.LayersDown:
        """The next message, of those that answer something."""
        import grpc

        endpoint = self._remote.address.endpoint
        try:
            message = pb.LayersDown.FromString(next(self._call))
        except DecodeError:
            raise _Broken(RemoteError(f"{endpoint} sent what is no message of layers")) from None
        except StopIteration:
            raise _Broken("the worker ended the stream") from None
        except grpc.RpcError as error:
            raise _Broken(failure(error, endpoint) or error.details() or error.code().name.lower()) from None
        self._stats.bytes_down += message.ByteSize()
        kind = message.WhichOneof("kind")
        if kind == "done":
            reason = message.done.reason
            if reason == "idle":
                raise _Broken(_IDLE)
            if reason != "closing":
                raise _Broken(
                    RemoteError(f"{endpoint} ended the sequence for a reason unknown here: {reason!r}")
                )
            raise _Broken("the worker is ending")
        self._reconnection.find()
        return message

    def _hang_up_call(self) -> None:
        call, outbox, channel = self._call, self._outbox, self._channel
        self._call = self._outbox = self._channel = None
        if outbox is not None:
            outbox.put(None)
        if call is not None:
            call.cancel()
        self._remote._streams.discard(self)
        if channel is not None:
            self._remote._retire(channel)


def _wrong_rows(endpoint: str, rows: pb.Rows, pos: int, n_rows: int, n_select: int = 0) -> RemoteError:
    found = f"{rows.n_rows} rows at {rows.pos}" if rows.n_rows else "no rows"
    expected = f"{n_rows} rows at {pos}" if n_select == 0 else f"a selection among {n_select} rows"
    return RemoteError(f"{endpoint} answered {found}, expected {expected}")


class _Broken(Exception):  # noqa: N818 - it never leaves this module
    """The stream has ended: why, an exception for the caller, or :data:`_IDLE` or :data:`_MOVED`."""


_IDLE = object()
"""The worker has ended a stream on which nothing came."""

_MOVED = object()
"""The connection has another channel by now."""

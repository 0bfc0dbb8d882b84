"""The client's end of a worker of layers: rows go out, answers come back in order, and after a lost link the
worker gets again what it no longer has.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sllm.errors import CancelledError, ClosedError, RemoteError
from sllm.extras import needs
from sllm.remote.stream import ResumableStream, RetryError, StoppedError, StreamLostError
from sllm.targets.base import RemoteStats
from sllm.wire import codec
from sllm.wire.protocol import check_offered, pb, to_sampling

with needs("remote"):
    from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc
    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams
    from sllm.remote.link import WorkerLink

__all__ = ["LayerAnswer", "LayerLink"]

log = logging.getLogger("sllm.remote")

_T = TypeVar("_T")

_MESSAGE_BYTES = 1 << 20
"""Of rows in one message, at most."""

_GOODBYE_SECONDS = 1.0
"""For the worker to end a stream that is not needed any more."""


@dataclass(frozen=True)
class LayerAnswer:
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
class _SentRows:
    """Rows that were not answered yet."""

    message: pb.LayersUp
    at: float


class LayerLink:
    """One sequence on a worker of layers. One thread at a time, but for :meth:`cancel`.

    It keeps the rows that it has sent, encoded, so that after a lost link the worker gets exactly those bytes
    again which it no longer has.

    Args:
        link: to the worker.
        start, stop, output: which layers, and whether the model's output is there, too.
        encoding: a name of :data:`sllm.wire.codec.CODECS`.
        on_loss: ``"wait"`` or ``"raise"``.

    Raises:
        RemoteError: the worker takes rows of no numbers, or none at once.

    Attributes:
        max_rows: rows in one message, at most.

    """

    def __init__(
        self, link: WorkerLink, start: int, stop: int, *, output: bool, encoding: str, on_loss: str
    ) -> None:
        info = link.info.layers
        assert info is not None
        if info.n_embd < 1 or info.max_rows < 1:
            raise RemoteError(
                f"{link.endpoint} offers to take {info.max_rows} hidden states of"
                f" {info.n_embd} numbers at once"
            )
        self._link = link
        self._range = (start, stop, output)
        self._encoding = encoding
        self._on_loss = on_loss
        self._n_embd = info.n_embd
        self._row = codec.row_bytes(encoding, self._n_embd)
        self.max_rows = max(1, min(info.max_rows, _MESSAGE_BYTES // self._row))
        self._sequence_id = secrets.randbits(64) or 1
        self._kept = bytearray()  # the rows at all positions so far
        self._tokens: list[int] = []  # with an output, theirs
        self._unanswered: deque[_SentRows] = deque()
        self._refills: deque[tuple[int, int]] = deque()  # positions and rows that were sent again
        self._idle = False  # the worker has ended a call as idle, and nothing was answered since
        self._outbox: queue.SimpleQueue[pb.LayersUp | None] | None = None  # while a call is open
        self.begin(0, RemoteStats())

    def begin(
        self, keep: int, stats: RemoteStats, sampling: SamplingParams | None = None, text_start: int = 0
    ) -> None:
        """Start a text that has its first ``keep`` positions in common with the one before."""
        del self._kept[keep * self._row :], self._tokens[keep:]
        self._unanswered.clear()
        self._idle = False
        self._stats = stats
        self._cancelled = False
        self._stream = ResumableStream(self._link, stats, self._on_loss)
        if sampling is not None:
            check_offered(sampling, self._link.info.features)
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
        """Send rows, without waiting. They replace whatever was at ``pos`` and after it.

        Args:
            pos: of the first row.
            hidden: float32 (n, n_embd), n <= :attr:`max_rows`.
            tokens: with an output, those of the rows.
            n_select: the last so many rows are the text's last token and what is drafted after it.
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
        self._unanswered.append(_SentRows(message, time.perf_counter()))
        if self._outbox is not None:
            self._put(message)

    def connect(self) -> None:
        """Open the stream, if it is not open.

        Raises:
            As :meth:`receive`.

        """
        self._with_reconnect(lambda: None)

    def receive(self) -> LayerAnswer:
        """The answer to the first rows that were not answered yet; connects, and connects again, as needed.

        Raises:
            CancelledError: :meth:`cancel` was called.
            ClosedError: the connection is closed.
            RemoteError: the link is lost for good, or the worker breaks the protocol.
            BusyError, ValueError, ContextFullError: what the worker refused with.

        """
        return self._with_reconnect(self._next)

    def _with_reconnect(self, step: Callable[[], _T]) -> _T:
        """The result of ``step`` on an open call, which is opened as often as it breaks."""

        def attempt(channel: grpc.Channel) -> _T:
            if self._stream.call is None:
                self._connect(channel)
            return step()

        try:
            return self._stream.run(attempt)
        except StoppedError:
            self.suspend()
            if self._cancelled:
                raise CancelledError("the generation was cancelled") from None
            raise ClosedError("the connection is closed") from None
        except BaseException:
            self.suspend()
            raise

    def cancel(self) -> None:
        """End a :meth:`receive` on another thread."""
        self._cancelled = True
        self._stream.stop()

    def suspend(self) -> None:
        """End the call; the worker keeps what it has for a while."""
        self._unanswered.clear()
        self._stream.suspend()

    def release(self) -> None:
        """End the call; the worker need not keep anything."""
        call = self._stream.call
        if call is not None and self._outbox is not None:
            self._outbox.put(pb.LayersUp(cancel=pb.Cancel()))
            self._outbox.put(None)
            timer = threading.Timer(_GOODBYE_SECONDS, call.cancel)
            timer.start()
            try:  # the worker ends the call when it has seen it
                for _ in call:
                    pass
            except Exception as error:  # noqa: BLE001 - a lost link does as well
                log.debug("a sequence was not released: %s", type(error).__name__)
            finally:
                timer.cancel()
                timer.join()
        self.suspend()
        self._kept.clear()
        self._tokens.clear()

    # ---- the call

    def _put(self, message: pb.LayersUp) -> None:
        assert self._outbox is not None
        self._stats.bytes_up += message.ByteSize()
        self._outbox.put(message)

    def _end_outgoing(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.put(None)

    def _connect(self, channel: grpc.Channel) -> None:
        """Open the call, and send again what the worker does not have."""
        endpoint = self._link.endpoint
        self._open(channel)
        first_message = self._read()
        if first_message.WhichOneof("kind") != "opened":
            raise RemoteError(f"{endpoint} answers before it has opened the sequence")
        opened = first_message.opened
        if opened.n_ctx < max(1, len(self._kept) // self._row):
            raise RemoteError(f"{endpoint} holds only {opened.n_ctx} positions")
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

    def _open(self, channel: grpc.Channel) -> None:
        start, stop, output = self._range
        self._outbox = queue.SimpleQueue()
        outgoing: Iterator[pb.LayersUp] = iter(self._outbox.get, None)
        self._put(
            pb.LayersUp(
                open=pb.LayersOpen(
                    model_id=self._link.info.model_id,
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
        # What comes is parsed in _read(): gRPC leaves a call open whose answer it could not parse.
        self._stream.open_call(
            channel,
            "Layers",
            outgoing,
            pb.LayersUp.SerializeToString,
            None,
            end_outgoing=self._end_outgoing,
        )

    def _next(self) -> LayerAnswer:
        endpoint = self._link.endpoint
        while self._refills:
            refilled = self._read().rows
            if (refilled.pos, refilled.n_rows) != self._refills[0]:
                raise _wrong_rows(endpoint, refilled, *self._refills[0])
            self._refills.popleft()
        message = self._read()
        arrived = time.perf_counter()
        sent = self._unanswered[0]
        asked = sent.message.rows
        if message.WhichOneof("kind") == "commit":
            answer = self._selection(message.commit, asked)
            seconds = message.commit.pass_us * 1e-6
        else:
            answer = self._hidden_states(message.rows, asked)
            seconds = message.rows.compute_us * 1e-6
        self._unanswered.popleft()
        self._idle = False
        self._stats.observe_round_trip(arrived - sent.at - seconds)
        self._link.round_trip = self._stats.round_trip
        self._stream.progress()
        return answer

    def _selection(self, commit: pb.Commit, asked: pb.Rows) -> LayerAnswer:
        """The tokens that the worker selected."""
        n, tokens = asked.n_select, tuple(commit.tokens)
        at = asked.pos + asked.n_rows - n + 1
        if not n or commit.pos != at or not 1 <= len(tokens) <= n or commit.n_accepted != len(tokens) - 1:
            raise RemoteError(f"{self._link.endpoint} selected {len(tokens)} tokens at {commit.pos}")
        return LayerAnswer(at, None, tokens, commit.n_accepted)

    def _hidden_states(self, rows: pb.Rows, asked: pb.Rows) -> LayerAnswer:
        """What came out of the worker's layers."""
        endpoint = self._link.endpoint
        if (rows.pos, rows.n_rows) != (asked.pos, asked.n_rows) or asked.n_select:
            raise _wrong_rows(endpoint, rows, asked.pos, asked.n_rows, asked.n_select)
        hidden = None
        if not asked.silent and not self._range[2]:
            try:
                hidden = codec.decode(rows.data, rows.n_rows, self._n_embd, self._encoding)
            except ValueError as error:
                raise RemoteError(f"{endpoint} sent invalid hidden states: {error}") from None
        return LayerAnswer(rows.pos, hidden, (), 0)

    def _read(self) -> pb.LayersDown:
        """The next message, of those that answer something."""
        endpoint = self._link.endpoint
        try:
            message = pb.LayersDown.FromString(next(self._stream.call))
        except DecodeError:
            raise RemoteError(f"{endpoint} sent a message that is not one of layers") from None
        except StopIteration:
            raise StreamLostError("the worker ended the stream") from None
        self._stats.bytes_down += message.ByteSize()
        if message.WhichOneof("kind") == "done":
            reason = message.done.reason
            if reason == "closing":
                raise StreamLostError("the worker is ending")
            if reason != "idle":
                raise RemoteError(f"{endpoint} ended the sequence for a reason unknown here: {reason!r}")
            if self._idle:
                raise StreamLostError("the worker takes every stream for idle")
            self._idle = True
            raise RetryError
        self._stream.mark_found()
        return message


def _wrong_rows(endpoint: str, rows: pb.Rows, pos: int, n_rows: int, n_select: int = 0) -> RemoteError:
    found = f"{rows.n_rows} rows at {rows.pos}" if rows.n_rows else "no rows"
    expected = f"{n_rows} rows at {pos}" if n_select == 0 else f"a selection among {n_select} rows"
    return RemoteError(f"{endpoint} answered {found}, expected {expected}")

"""The client's end of workers of layers: rows go out, answers come back in order, and after a lost link the
workers get again what they no longer have.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sllm.engine.handle import join
from sllm.errors import CancelledError, ClosedError, RemoteError
from sllm.extras import needs
from sllm.remote.stream import ResumableStream, RetryError, StoppedError, StreamLostError, WorkerEndingError
from sllm.split.chain import obstacle
from sllm.targets.base import RemoteStats
from sllm.targets.tree import TokenTree
from sllm.wire import auth, codec
from sllm.wire.protocol import check_offered, padded, pb, to_sampling

with needs("remote"):
    import grpc
    from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams
    from sllm.split.chain import Part

__all__ = ["HopLostError", "LayerAnswer", "LayerLink", "TreesLostError"]

log = logging.getLogger("sllm.remote")

_T = TypeVar("_T")

_MESSAGE_BYTES = 1 << 20
"""Of rows in one message, at most."""

_GOODBYE_SECONDS = 1.0
"""For the worker to end a stream that is not needed any more."""


_CAUSE_SECONDS = 2.0
"""For a worker to say why its rows do not reach the next one, which has said that they do not."""

_WAITED_SECONDS = 0.0002
"""Whoever has waited so long for an answer was there when it came."""

_NO_ROWS = "the rows of the worker before come no more"


class HopLostError(Exception):
    """Raised by a :class:`LayerLink`: rows do not get from one worker to the next, though both answer.

    Attributes:
        part: the worker that they do not leave.

    """

    def __init__(self, part: Part, reason: str) -> None:
        super().__init__(reason)
        self.part = part


class TreesLostError(Exception):
    """Raised by a :class:`LayerLink`: a tree cannot be sent (again), as a worker takes none now."""


_NOBODY = -1


class _OtherStreamError(Exception):
    """Raised on the stream of one worker: that of worker ``index`` has to mend ``error``, or, where it is
    :data:`_NOBODY`, none can.
    """

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(index)
        self.index = index
        self.error = error


@dataclass(frozen=True)
class LayerAnswer:
    """What the workers made of the rows of one :meth:`LayerLink.send`.

    Attributes:
        pos: of the first row, or of the first selected token.
        hidden: float32 (n, n_embd), or None where the rows were silent or tokens were selected.
        tokens: what the last worker selected, if it was to.
        n_accepted: how many of these had been drafted.
        seconds: for which the last worker has computed.

    """

    pos: int
    hidden: npt.NDArray[np.float32] | None
    tokens: tuple[int, ...]
    n_accepted: int
    seconds: float = 0.0


@dataclass
class _SentRows:
    """Rows that were not answered yet.

    Attributes:
        asked: what the last worker is asked, without the numbers.
        data: the numbers, which the first worker gets.
        at: when they were sent.
        alone: no others were on their way.

    """

    asked: pb.Rows
    data: bytes
    at: float
    alone: bool


class _Stage:
    """One worker of a link: its stream, and what it has said in the call that is open."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.stream: ResumableStream
        self.outbox: queue.SimpleQueue[pb.LayersUp | None] | None = None  # while a call is open
        self.opened = self.lacks = False
        self.idled = False  # it has ended a call as idle, and nothing was answered since
        self.reader: threading.Thread | None = None  # of all but the last

    @property
    def endpoint(self) -> str:
        return self.part.link.endpoint

    @property
    def early(self) -> bool:
        """Whether it takes rows before it has answered."""
        return "early-rows" in self.part.link.info.features

    def end_outgoing(self) -> None:
        outbox, self.outbox = self.outbox, None
        if outbox is not None:
            outbox.put(None)

    def hang_up(self) -> None:
        """End the call, and wait until nobody reads it."""
        self.stream.hang_up()
        reader, self.reader = self.reader, None
        if reader is not None:
            join(reader)

    def check_opened(self, message: pb.LayersDown, n_positions: int) -> int:
        """How many positions a worker says it has, in its first message."""
        if message.WhichOneof("kind") != "opened":
            raise RemoteError(f"{self.endpoint} answers before it has opened the sequence")
        if message.opened.n_ctx < max(1, n_positions):
            raise RemoteError(f"{self.endpoint} holds only {message.opened.n_ctx} positions")
        self.opened = True
        return message.opened.length


class LayerLink:
    """One sequence on a worker of layers, or on several of which each passes the rows on to the next and the
    last one answers. One thread at a time, but for :meth:`cancel`.

    It keeps the rows that it has sent, encoded, so that after a lost link the first worker gets exactly those
    bytes again which it, or one after it, no longer has.

    Of several workers each has a stream with the client. On it all but the first are told which rows will
    come, and by whose hands: of a capability that is made anew for each stream they get the hash, and the
    worker before gets the capability. Nobody waits for an answer before the rows are on their way, but for
    a worker that brings some to another one for the first time.

    Args:
        parts: the workers.
        encoding: a name of :data:`sllm.wire.codec.CODECS`.
        before: links to the same workers, some to each, over which rows went until now: those that they have
            kept are this one's.

    Raises:
        RemoteError: a worker takes rows of no numbers, or none at once.

    Attributes:
        parts: as given.
        max_rows: rows in one message, at most.

    """

    def __init__(self, parts: Sequence[Part], *, encoding: str, before: Sequence[LayerLink] = ()) -> None:
        most = []
        offers = [(part, offer.layers) for part in parts for offer in part.route.fleet.offers]
        for part, info in offers:
            assert info is not None
            if info.n_embd < 1 or info.max_rows < 1:
                raise RemoteError(
                    f"{part.link.endpoint} offers to take {info.max_rows} hidden states of"
                    f" {info.n_embd} numbers at once"
                )
            self._n_embd = info.n_embd
            most.append(info.max_rows)
        self.parts = list(parts)
        self._stages = [_Stage(part) for part in parts]
        self._last = self._stages[-1]
        self._encoding = encoding
        self._row = codec.row_bytes(encoding, self._n_embd)
        self.max_rows = max(1, min(*most, _MESSAGE_BYTES // self._row))
        self._kept = bytearray()  # the rows at all positions so far
        self._tokens: list[int] = []  # with an output, theirs
        self._unanswered: deque[_SentRows] = deque()
        self._n_void = 0  # the first so many of them, whose answers nobody needs
        self._refills: deque[tuple[int, int]] = deque()  # positions and rows that were sent again
        self._lock = threading.Condition()  # over what follows, which the readers write
        self._trouble: _OtherStreamError | None = None  # the first one of this attempt
        self._hop_trouble: dict[int, str] = {}  # workers whose rows do not reach the next, and why
        self._lacking: int | None = None  # a worker has only so many positions
        self._held = 0  # positions that the workers were taken to have when the calls were opened
        self.begin(0, RemoteStats(), lost={})  # which is no text's beginning
        self.suspend()
        if before:  # what enters the first worker, and the tokens of the last one, which may have the output
            self._kept, self._tokens = before[0]._kept.copy(), before[-1]._tokens.copy()

    def begin(
        self,
        keep: int,
        stats: RemoteStats,
        sampling: SamplingParams | None = None,
        text_start: int = 0,
        lost: Mapping[Part, float] | None = None,
    ) -> None:
        """Start a text that has its first ``keep`` positions in common with the one before; with ``lost``,
        which :attr:`lost` of the links before has told, start the same text anew.
        """
        del self._kept[keep * self._row :], self._tokens[keep:]
        self._unanswered.clear()
        self._n_void = 0
        self._hopped = False  # rows got through, and no hop has failed since
        self._lacking = None
        self._stats = stats
        self._cancelled = False
        for stage in self._stages:
            stage.idled = False
            part = stage.part
            part.route.begin(stay=keep > 0, again=lost is not None)
            since = None if lost is None else lost.get(part)
            stage.stream = ResumableStream(part.route, stats, part.on_loss, lost_since=since)
        if sampling is not None:
            check_offered(sampling, self._last.part.link.info.features)
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
        parents: Sequence[int] = (),
    ) -> None:
        """Send rows, without waiting. They replace whatever was at ``pos`` and after it.

        Args:
            pos: of the first row.
            hidden: float32 (n, n_embd), n <= :attr:`max_rows`.
            tokens: with an output, those of the rows.
            n_select: the last so many rows are the text's last token and what is drafted after it.
            silent: the hidden states that come out are not needed.
            parents: of a tree: for each of the last rows, which of these it follows; -1: the row before them.
                Its main path counts as what is at the positions after that. For links that take trees
                (:attr:`can_branch`).

        Raises:
            ValueError: numbers that are not finite, or too large for the codec.
            TreesLostError: a tree, and a worker takes none.

        """
        data = codec.encode(hidden, self._encoding)
        n_known = len(hidden) - len(parents)
        nodes = TokenTree(tuple(range(n_known, len(hidden))), tuple(parents)).main_path()
        stays = [*range(n_known), *nodes]
        del self._kept[pos * self._row :]
        for i in stays:
            self._kept += data[i * self._row : (i + 1) * self._row]
        if tokens is not None:
            self._tokens[pos:] = [tokens[i] for i in stays]
        asked = pb.Rows(
            pos=pos,
            n_rows=len(hidden),
            silent=silent,
            tokens=tokens or (),
            n_select=n_select,
            parents=parents,
        )
        sent = _SentRows(asked, data, time.perf_counter(), not self._unanswered)
        self._unanswered.append(sent)
        if self._last.outbox is not None:
            self._put_rows(sent.asked, data)

    @property
    def lost(self) -> dict[Part, float]:
        """Whose links are lost at the moment, and since when (``time.monotonic()``)."""
        found = {stage.part: stage.stream.lost_since for stage in self._stages}
        return {part: since for part, since in found.items() if since is not None}

    @property
    def can_branch(self) -> bool:
        """Whether all workers take trees; others may be in their places after a lost link."""
        return all("trees" in part.link.info.features for part in self.parts)

    def void(self) -> None:
        """Nobody needs what comes of the rows that were not answered yet."""
        self._n_void = len(self._unanswered)

    def connect(self) -> None:
        """Open the streams, if they are not open.

        Raises:
            As :meth:`receive`.

        """
        self._with_reconnect(lambda: None)

    def receive(self) -> LayerAnswer:
        """The answer to the first rows that were not answered yet; connects, and connects again, as needed.

        Raises:
            CancelledError: :meth:`cancel` was called.
            ClosedError: a connection is closed.
            RemoteError: a link is lost for good, or a worker breaks the protocol.
            BusyError, ValueError, ContextFullError: what a worker refused with.
            HopLostError: rows do not get from one worker to the next.
            TreesLostError: the link was lost, and a worker that is there now takes no trees.

        """
        return self._with_reconnect(self._next)

    def _with_reconnect(self, step: Callable[[], _T]) -> _T:
        """The result of ``step`` on open calls, which are opened as often as one of them breaks."""
        try:
            return self._run(0, [], step)
        except BaseException as error:
            self.suspend()
            reason = error.error if isinstance(error, _OtherStreamError) else error
            if isinstance(reason, StoppedError):
                if self._cancelled:
                    raise CancelledError("the generation was cancelled") from None
                raise ClosedError("the connection is closed") from None
            if reason is error:
                raise
            raise reason from None

    def _run(self, i: int, channels: list[grpc.Channel], step: Callable[[], _T]) -> _T:
        """``step`` with a channel to each worker: ``channels`` to those before the ``i``-th. Each waits for
        its own worker, and what has befallen another one's is for that to mend.
        """

        def attempt(channel: grpc.Channel) -> _T:
            found = [*channels, channel]
            if i + 1 == len(self._stages):
                return self._attempt(found, step)
            try:
                return self._run(i + 1, found, step)
            except _OtherStreamError as error:
                if error.index == i:
                    raise error.error from None
                raise
            except Exception as error:  # noqa: BLE001 - this stream must not take it for its own
                raise _OtherStreamError(_NOBODY, error) from None

        return self._stages[i].stream.run(attempt)

    def _attempt(self, channels: list[grpc.Channel], step: Callable[[], _T]) -> _T:
        if any(stage.stream.call is None for stage in self._stages):
            self._open_all(channels)
        try:
            return step()
        except grpc.RpcError:
            self._raise_trouble()
            raise

    def _raise_trouble(self) -> None:
        """Raise what has befallen another worker's stream, if anything has."""
        with self._lock:
            trouble = self._trouble
        if trouble is not None:
            raise trouble

    def cancel(self) -> None:
        """End a :meth:`receive` on another thread."""
        self._cancelled = True
        for stage in self._stages:
            stage.stream.stop()

    def suspend(self) -> None:
        """End the calls; the workers keep what they have for a while."""
        self._unanswered.clear()
        self._n_void = 0
        for stage in self._stages:
            stage.hang_up()
            stage.stream.suspend()
            stage.part.route.end()

    def release(self) -> None:
        """End the calls; the workers need not keep anything."""
        open_ones = [s for s in self._stages if s.stream.call is not None and s.outbox is not None]
        for stage in open_ones:
            assert stage.outbox is not None
            stage.outbox.put(padded(pb.LayersUp(cancel=pb.Cancel())))
            stage.outbox.put(None)
        for stage in open_ones:
            call = stage.stream.call
            timer = threading.Timer(_GOODBYE_SECONDS, call.cancel)
            timer.start()
            try:  # the worker ends the call when it has seen it
                if stage.reader is not None:
                    join(stage.reader)
                else:
                    for _ in call:
                        pass
            except Exception as error:  # noqa: BLE001 - a lost link does as well
                log.debug("a sequence was not released: %s", type(error).__name__)
            finally:
                timer.cancel()
                join(timer)
        self.suspend()
        self._kept.clear()
        self._tokens.clear()

    # ---- the calls

    def _put(self, stage: _Stage, message: pb.LayersUp) -> None:
        assert stage.outbox is not None
        self._stats.bytes_up += message.ByteSize()
        stage.outbox.put(message)

    def _put_rows(self, asked: pb.Rows, data: bytes) -> None:
        """Rows to the first worker, and to the others which rows these are."""
        if asked.parents and not self.can_branch:
            raise TreesLostError
        for stage in self._stages:
            rows = pb.Rows(pos=asked.pos, n_rows=asked.n_rows, parents=asked.parents)
            if stage is self._last:
                rows.CopyFrom(asked)
            if stage is self._stages[0]:
                rows.data = data
            message = pb.LayersUp(rows=rows)
            self._put(stage, message if rows.data else padded(message))

    def _open_all(self, channels: list[grpc.Channel]) -> None:
        """Open the calls, and send again what a worker does not have."""
        for stage in self._stages:
            stage.hang_up()
        with self._lock:
            self._trouble = None
            self._hop_trouble = {}
            lacking = self._lacking
        for _ in range(self._n_void):  # which the workers need not compute again
            self._unanswered.popleft()
        self._n_void = 0
        end = len(self._kept) // self._row
        first = min((sent.asked.pos for sent in self._unanswered), default=end)
        held = first if lacking is None else min(first, lacking)
        capability = b""
        for i, (stage, channel) in enumerate(zip(self._stages, channels, strict=True)):
            message = self._opening(stage, held, capability)
            if stage is not self._last:
                capability = secrets.token_bytes(auth.CAPABILITY_BYTES)
                self._name_next(message, i, capability)
            self._open(stage, channel, padded(message))
            if stage is not self._last:
                self._watch(i, stage, held)
        self._raise_trouble()
        self._held = held
        if not self._last.early:
            length = self._last.check_opened(self._read(), end)
            self._note_reused(length, held)
            held = min(held, length)
        self._refills.clear()
        for pos in range(held, first, self.max_rows):
            n = min(self.max_rows, first - pos)
            data = bytes(self._kept[pos * self._row : (pos + n) * self._row])
            self._put_rows(pb.Rows(pos=pos, n_rows=n, silent=True, tokens=self._tokens[pos : pos + n]), data)
            self._refills.append((pos, n))
        for sent in self._unanswered:
            sent.at, sent.alone = time.perf_counter(), False
            self._put_rows(sent.asked, sent.data)

    def _opening(self, stage: _Stage, held: int, capability: bytes) -> pb.LayersUp:
        part = stage.part
        return pb.LayersUp(
            open=pb.LayersOpen(
                model_id=part.link.info.model_id,
                start=part.start,
                stop=part.stop,
                output=part.output,
                codec=self._encoding,
                sampling=self._sampling if part.output else None,
                text_start=self._text_start if part.output else 0,
                sequence_id=stage.part.sequence_id,
                held=held if stage.early else None,
                accept=hashlib.sha256(capability).digest() if capability else b"",
            )
        )

    def _name_next(self, message: pb.LayersUp, i: int, capability: bytes) -> None:
        """Tell a worker where the next one is."""
        part, following = self.parts[i], self.parts[i + 1]
        reason = obstacle(part, following)  # there may be another worker now than at the beginning
        if reason is not None:
            raise HopLostError(part, reason)
        host, port = following.seen_at
        digest = bytes.fromhex(following.link.address.fingerprint or "")
        message.open.next.CopyFrom(pb.Hop(host=host, port=port, fingerprint=digest, capability=capability))

    def _open(self, stage: _Stage, channel: grpc.Channel, message: pb.LayersUp) -> None:
        stage.opened = stage.lacks = False
        stage.outbox = queue.SimpleQueue()
        outgoing: Iterator[pb.LayersUp] = iter(stage.outbox.get, None)
        self._put(stage, message)
        # What comes is parsed in _parsed(): gRPC leaves a call open whose answer it could not parse.
        try:
            stage.stream.open_call(
                channel,
                "Layers",
                outgoing,
                pb.LayersUp.SerializeToString,
                None,
                end_outgoing=stage.end_outgoing,
            )
        except Exception as error:
            if stage is self._last:
                raise
            raise _OtherStreamError(self._stages.index(stage), error) from None

    # ---- those that do not answer

    def _watch(self, i: int, stage: _Stage, held: int) -> None:
        """Read a call that only tells of trouble, on a thread of its own."""
        call = stage.stream.call

        def read() -> None:
            try:
                self._listen(i, stage, call, held)
            except Exception as error:  # noqa: BLE001 - the thread of the text is to hear of it
                self._note_trouble(i, call, error)

        stage.reader = threading.Thread(target=read, name="sllm-hop-reader", daemon=True)
        stage.reader.start()

    def _listen(self, i: int, stage: _Stage, call: Any, held: int) -> None:
        for data in call:
            message = self._parsed(stage, data)
            kind = message.WhichOneof("kind")
            if kind == "done":
                if message.done.reason == "hop":
                    self._note_hop(i, "it cannot reach the next worker, or is not let in there")
                    return
                if message.done.reason == "feed":
                    if self._known_cause() is None:
                        self._note_hop(i - 1, _NO_ROWS)
                    return
                self._end(stage, message.done.reason)
            if stage.opened:
                raise RemoteError(f"{stage.endpoint} answers rows that were to go to the next worker")
            self._note_length(stage, stage.check_opened(message, len(self._kept) // self._row), held)
            self._note_hop()
        raise StreamLostError("the worker ended the stream")

    def _note_trouble(self, i: int, call: Any, error: Exception) -> None:
        """Let the thread that waits for the last worker know."""
        with self._lock:
            if self._trouble is not None or call is not self._stages[i].stream.call:
                return
            self._trouble = _OtherStreamError(i, error)
            self._lock.notify_all()
            last = self._last.stream.call
        if last is not None:  # else it is about to be opened, and the trouble looked at
            last.cancel()

    def _note_hop(self, i: int | None = None, reason: str = "") -> None:
        """A worker cannot bring rows to the next one, or ``None`` of them says something new. It is the way
        between them that is at fault where both answer; else it is the one that does not.
        """
        with self._lock:
            if i is not None:
                self._hop_trouble.setdefault(i, reason)
            found = next((j for j in self._hop_trouble if self._both_opened(j)), None)
        if found is not None:
            self._note_trouble(found, self._stages[found].stream.call, self._hop_error(found))

    def _both_opened(self, i: int) -> bool:
        return self._stages[i].opened and self._stages[i + 1].opened

    def _hop_error(self, i: int) -> Exception:
        if self._hopped:  # it has worked: once more
            self._hopped = False
            return RetryError()
        return HopLostError(self.parts[i], self._hop_trouble[i])

    def _note_length(self, stage: _Stage, length: int, held: int) -> None:
        """A worker has so many positions, and was taken to have ``held``."""
        if length < held:
            stage.lacks = True
            with self._lock:
                self._lacking = length if self._lacking is None else min(self._lacking, length)

    # ---- the one that does

    def _next(self) -> LayerAnswer:
        endpoint = self._last.endpoint
        while self._refills:
            refilled = self._answer().rows
            if (refilled.pos, refilled.n_rows) != self._refills[0]:
                raise _wrong_rows(endpoint, refilled, *self._refills[0])
            self._refills.popleft()
        while self._n_void:
            self._take_answer()
            self._n_void -= 1
        return self._take_answer()

    def _take_answer(self) -> LayerAnswer:
        """The answer to the first rows that were not answered yet."""
        asked_at = time.perf_counter()
        message = self._answer()
        arrived = time.perf_counter()
        sent = self._unanswered[0]
        asked = sent.asked
        if message.WhichOneof("kind") == "commit":
            answer = self._selection(message.commit, asked)
            seconds = message.commit.pass_us * 1e-6
        else:
            answer = self._hidden_states(message.rows, asked)
            seconds = message.rows.compute_us * 1e-6
        self._unanswered.popleft()
        self._hopped = len(self._stages) > 1
        with self._lock:
            self._lacking = None
        # What had come before it was asked for says nothing of the link, nor what has queued there.
        waited = sent.alone and arrived - asked_at > _WAITED_SECONDS
        if waited or self._stats.round_trip == 0.0:
            self._stats.observe_round_trip(arrived - sent.at - seconds)
        for stage in self._stages:
            stage.idled = False
            stage.stream.mark_found()
            stage.stream.progress()
        self._last.part.link.round_trip = self._stats.round_trip
        return replace(answer, seconds=seconds)

    def _selection(self, commit: pb.Commit, asked: pb.Rows) -> LayerAnswer:
        """The tokens that the worker selected."""
        n, tokens = asked.n_select, tuple(commit.tokens)
        at = asked.pos + asked.n_rows - n + 1
        if not n or commit.pos != at or not 1 <= len(tokens) <= n or commit.n_accepted != len(tokens) - 1:
            raise RemoteError(f"{self._last.endpoint} selected {len(tokens)} tokens at {commit.pos}")
        return LayerAnswer(at, None, tokens, commit.n_accepted)

    def _hidden_states(self, rows: pb.Rows, asked: pb.Rows) -> LayerAnswer:
        """What came out of the worker's layers."""
        endpoint = self._last.endpoint
        if (rows.pos, rows.n_rows) != (asked.pos, asked.n_rows) or asked.n_select:
            raise _wrong_rows(endpoint, rows, asked.pos, asked.n_rows, asked.n_select)
        hidden = None
        if not asked.silent and not self._last.part.output:
            try:
                hidden = codec.decode(rows.data, rows.n_rows, self._n_embd, self._encoding)
            except ValueError as error:
                raise RemoteError(f"{endpoint} sent invalid hidden states: {error}") from None
        return LayerAnswer(rows.pos, hidden, (), 0)

    def _answer(self) -> pb.LayersDown:
        """The next message that answers rows."""
        stage = self._last
        message = self._read()
        if not stage.opened:  # rows were sent without waiting for it
            length = stage.check_opened(message, len(self._kept) // self._row)
            self._note_length(stage, length, self._held)
            self._note_reused(length, self._held)
            self._note_hop()
            message = self._read()
        return message

    def _note_reused(self, length: int, held: int) -> None:
        self._stats.n_reused = max(self._stats.n_reused, min(length, held))

    def _read(self) -> pb.LayersDown:
        """The next message of the last worker, but for the end."""
        stage = self._last
        try:
            message = self._parsed(stage, next(stage.stream.call))
        except StopIteration:
            raise StreamLostError("the worker ended the stream") from None
        self._stats.bytes_down += message.ByteSize()
        if message.WhichOneof("kind") == "done":
            reason = message.done.reason
            if reason == "feed" and len(self._stages) > 1:
                raise self._feed_lost()
            self._end(stage, reason)
        stage.stream.mark_found()
        return message

    def _feed_lost(self) -> Exception:
        """Why rows do not reach the last worker, which the one before had reached."""
        known = self._known_cause()
        if known is not None:
            return known
        i = len(self._stages) - 2
        with self._lock:
            self._hop_trouble.setdefault(i, _NO_ROWS)
        return self._hop_error(i)

    def _known_cause(self) -> _OtherStreamError | None:
        """What a worker before has to say, of which it is the consequence that its rows come no more."""
        with self._lock:
            self._lock.wait_for(lambda: self._trouble is not None, _CAUSE_SECONDS)
            return self._trouble

    def _parsed(self, stage: _Stage, data: bytes) -> pb.LayersDown:
        try:
            return pb.LayersDown.FromString(data)
        except DecodeError:
            raise RemoteError(f"{stage.endpoint} sent a message that is not one of layers") from None

    def _end(self, stage: _Stage, reason: str) -> None:
        """A worker has ended the call."""
        if reason == "closing":
            raise WorkerEndingError
        if reason != "idle":
            raise RemoteError(f"{stage.endpoint} ended the sequence for a reason unknown here: {reason!r}")
        if not stage.lacks:  # else it has said what it has, which is what it gets next
            if stage.idled:
                raise StreamLostError("the worker takes every stream for idle")
            stage.idled = True
        raise RetryError


def _wrong_rows(endpoint: str, rows: pb.Rows, pos: int, n_rows: int, n_select: int = 0) -> RemoteError:
    found = f"{rows.n_rows} rows at {rows.pos}" if rows.n_rows else "no rows"
    expected = f"{n_rows} rows at {pos}" if n_select == 0 else f"a selection among {n_select} rows"
    return RemoteError(f"{endpoint} answered {found}, expected {expected}")

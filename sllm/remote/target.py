"""A worker on another machine as the source of truth: a text by the remote protocol."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.arrays import int32_array
from sllm.engine.sampling import SamplingParams
from sllm.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextFullError,
    RemoteError,
)
from sllm.remote.stream import Reconnection
from sllm.targets.base import Commit, RemoteStats
from sllm.wire import auth
from sllm.wire.protocol import failure, method, padded, pb, to_sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import grpc
    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.engine.vocab import Vocab
    from sllm.remote.connection import Remote
    from sllm.targets.base import Scores

__all__ = ["RemoteGeneration", "RemoteTarget", "checked_on_loss"]

log = logging.getLogger("sllm.remote")

_ON_LOSS = ("wait", "raise", "local")


def checked_on_loss(value: str) -> str:
    """``value``, if it says what to do when the link is lost.

    Raises:
        ValueError: it does not.

    """
    if value not in _ON_LOSS:
        raise ValueError(f"on_loss is {value!r}, expected one of {', '.join(_ON_LOSS)}")
    return value


class RemoteTarget:
    """A worker as a target, made by :meth:`Remote.target`. Several texts at once are fine; the worker says
    how many.
    """

    def __init__(self, remote: Remote, *, run_ahead: bool = True, on_loss: str | None = None) -> None:
        self.remote = remote
        self.run_ahead = run_ahead
        self.on_loss = remote.on_loss if on_loss is None else checked_on_loss(on_loss)

    @property
    def vocab(self) -> Vocab:
        """The worker's vocabulary; see :attr:`Remote.vocab`."""
        return self.remote.vocab

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> RemoteGeneration:
        """Send the prompt and return the generation behind it, without waiting for the worker.

        What the worker refuses is raised by the first commit: BusyError (no place), ValueError (a bad
            grammar), RemoteError.

        Raises:
            ContextFullError: the prompt is longer than the worker takes.
            ValueError: no tokens, or one that is none.

        """
        return RemoteGeneration(self, self.checked_prompt(tokens), sampling, max_tokens)

    def checked_prompt(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """``tokens``, if the worker takes them for a prompt; raises as :meth:`open` does."""
        prompt = int32_array(tokens, "tokens")
        info = self.remote.info
        if len(prompt) == 0:
            raise ValueError("the prompt has no tokens")
        if len(prompt) > info.max_prompt:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens, and the worker takes {info.max_prompt}"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= info.n_vocab:
            raise ValueError(f"the prompt holds ids that are not in the vocabulary of {info.n_vocab} tokens")
        return prompt

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation; see :meth:`Remote.chat`."""
        return self.remote.chat(messages, add_generation_prompt=add_generation_prompt)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the worker finds ``tokens[start:]``; see :meth:`Remote.score`."""
        return self.remote.score(tokens, start)

    def close(self) -> None:
        """Nothing to free: texts and connection close by themselves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sllm.RemoteTarget {self.remote.address.endpoint}>"


class _Outbox:
    """What goes up during one call: Open, then always the newest hint alone. grpc iterates over it on a
    thread of its own.
    """

    def __init__(self, first: pb.Up, stats: RemoteStats) -> None:
        self._first: pb.Up | None = first
        self._stats = stats
        self._hint: pb.Up | None = None
        self._closed = False
        self._changed = threading.Condition()
        self.sent: dict[int, float] = {}  # hint id -> when it was taken; the newest few

    def put(self, hint: pb.Up) -> None:
        """Replace the hint that was not sent yet."""
        with self._changed:
            self._hint = hint
            self._changed.notify()

    def close(self) -> None:
        """End the iteration."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[pb.Up]:
        return self

    def __next__(self) -> pb.Up:
        with self._changed:
            while self._first is None and self._hint is None and not self._closed:
                self._changed.wait()
            if self._closed:
                raise StopIteration
            message, self._first = self._first, None
            if message is None:
                message, self._hint = self._hint, None
                assert message is not None
                self.sent[message.hint.id] = time.perf_counter()
                while len(self.sent) > 256:
                    del self.sent[next(iter(self.sent))]
                self._stats.n_hints += 1
            self._stats.bytes_up += message.ByteSize()
            return message


class RemoteGeneration:
    """A text of a :class:`RemoteTarget`; see :class:`~sllm.targets.base.PipelinedGeneration`.

    A thread of its own keeps the stream to the worker: it takes commits as they come, whether or not they are
    being read (a text is bounded), and when the link is lost it connects again and goes on behind the last
    token that arrived. (A position and a seed decide every token, so nothing is lost or said twice.)
    """

    def __init__(
        self,
        target: RemoteTarget,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        remote = target.remote
        self._remote = remote
        self._vocab = remote.vocab
        self._sampling = to_sampling(sampling)
        self._text: list[int] = prompt.tolist()  # the stream's thread alone
        self._start = len(prompt)
        self._text_id = secrets.randbits(64) or 1
        self.run_ahead = target.run_ahead
        self.on_loss = target.on_loss
        self._asked_end = None if max_tokens is None else self._start + max_tokens
        self.closed = False
        self.remote = RemoteStats(round_trip=remote._round_trip)
        self.opened_at: float | None = None
        self.finish_reason: str | None = None
        self._commits: deque[Commit] = deque()
        self._error: Exception | None = None
        self._n_opened = 0  # how many calls the worker has answered
        self._hint_id = 0
        self._heard_hint_id = 0  # the newest one that the worker had when it committed
        self._hint: tuple[int, list[int]] | None = None
        self._outbox: _Outbox | None = None
        self._call: Any = None
        self._channel: grpc.Channel | None = None  # while the call is on
        self._woken = self._done = self._ended = self._cancelled = False
        self._changed = threading.Condition()
        self._gone = threading.Event()
        self._reconnection = Reconnection(remote, self._gone, self.remote)
        if self._start >= self.end:
            self._finish()
            self._ended = True
        self._thread = threading.Thread(target=self._run, name="sllm-remote", daemon=True)
        if not self._ended:
            remote._streams.add(self)
            self._thread.start()

    # ---- for the caller

    @property
    def end(self) -> int:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        n_ctx = max(self._remote.info.n_ctx, len(self._text))  # of the worker that has the text now
        return n_ctx if self._asked_end is None else min(self._asked_end, n_ctx)

    @property
    def max_hint(self) -> int:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        return self._remote.info.max_hint

    @property
    def lost(self) -> bool:
        """Whether there is no link at the moment."""
        return self._reconnection.lost

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Commit:
        while True:
            commit = self.poll(None)
            if commit is not None:
                return commit
            if self.finish_reason is not None:
                raise StopIteration

    def poll(self, timeout: float | None = 0.0) -> Commit | None:
        """See :meth:`~sllm.targets.base.PipelinedGeneration.poll`."""
        self._check_process()
        with self._changed:
            if self.finish_reason is not None:
                return None
            if timeout != 0.0:
                self._changed.wait_for(
                    lambda: self._commits or self._error or self._done or self._ended or self._woken, timeout
                )
            self._woken = False
            if self._commits:
                commit = self._commits.popleft()
                if self._vocab.is_eog(commit.tokens[-1]):
                    self.finish_reason = "eog"
                elif commit.pos + len(commit.tokens) >= self.end:
                    self._finish()
                return commit
            if self._cancelled:
                raise CancelledError("the generation was cancelled")
            if self._error is not None:
                raise self._error
            if self._ended:
                raise ClosedError("the generation is closed")
            if self._done:
                self.finish_reason = "context"  # of a worker with less than the one that was asked
            return None

    def _finish(self) -> None:
        self.finish_reason = "length" if self.end == self._asked_end else "context"

    def _check_process(self) -> None:
        if self._remote._pid != os.getpid():
            raise ClosedError(f"the generation belongs to process {self._remote._pid}")

    def wake(self) -> None:
        """Let a blocked :meth:`poll` return; from any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def hint(self, pos: int, tokens: Sequence[int]) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`."""
        self._check_process()
        with self._changed:
            self._hint = (pos, list(tokens))
            self._hint_id += 1
            if self._outbox is not None:
                self._outbox.put(self._hint_message())
            self._changed.notify_all()

    def _hint_message(self) -> pb.Up:
        assert self._hint is not None
        pos, tokens = self._hint
        tokens = tokens[: self.max_hint]
        n_vocab = self._remote.info.n_vocab
        good = next((i for i, t in enumerate(tokens) if not 0 <= t < n_vocab), len(tokens))
        return padded(pb.Up(hint=pb.Hint(pos=pos, tokens=tokens[:good], id=self._hint_id)))

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`."""
        self._check_process()
        with self._changed:
            if self._ended:
                return
            self._cancelled = True
        self._hang_up()

    def close(self) -> None:
        """End the stream and its thread. More calls do nothing."""
        self.closed = True
        if self._remote._pid != os.getpid():
            return  # it is the parent's
        self._hang_up()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            # In the middle of connecting again it may take longer; Remote.close() waits for it.
            self._thread.join(0.5)

    def _hang_up(self) -> None:
        with self._changed:
            self._ended = True
            self._gone.set()
            call, outbox = self._call, self._outbox
            self._changed.notify_all()
        if outbox is not None:
            outbox.close()
        if call is not None:
            call.cancel()

    def _join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the stream's thread

    def _run(self) -> None:
        try:
            self._stream()
        except Exception as error:  # noqa: BLE001 - whatever ends the thread must reach the caller
            self._fail(error)
        finally:
            self._remote._streams.discard(self)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._error is None and not self._ended:
                self._error = error
            self._changed.notify_all()

    def _stream(self) -> None:
        remote, reconnection = self._remote, self._reconnection
        channel = remote._live()
        while not self._gone.is_set():
            n_opened = self._n_opened
            trouble = self._attempt(channel)
            if self._gone.is_set():
                return
            if trouble is _DONE or self._complete():
                with self._changed:
                    self._done = True
                    self._changed.notify_all()
                return
            if trouble is _MOVED:
                channel = remote._live()
                continue
            if trouble is _IDLE:
                self._wait_for_hint()
                continue
            busy = isinstance(trouble, BusyError) and self.lost
            if isinstance(trouble, Exception) and not busy:
                self._fail(trouble)
                return
            self._lose(trouble)
            if self.on_loss == "raise":
                self._fail(RemoteError(f"the link to {remote.address.endpoint} was lost: {trouble}"))
                return
            # For whatever reason, a worker that has not even opened the text is not there.
            elsewhere = self._n_opened == n_opened
            found = reconnection.again(channel, trouble, busy=busy, elsewhere=elsewhere)
            if found is None:
                return
            channel = found

    def _lose(self, trouble: object) -> None:
        with self._changed:
            news = self._reconnection.lose()
            self._woken = self._woken or news
            self._changed.notify_all()
        if news and self.on_loss != "raise":
            log.warning("the link to %s is lost: %s", self._remote.address.endpoint, trouble)

    def _found(self) -> None:
        if self.lost:
            with self._changed:
                self._woken = self._reconnection.find() or self._woken
                self._changed.notify_all()

    def _complete(self) -> bool:
        """Whether all of the text has arrived."""
        text = self._text
        return len(text) > self._start and (len(text) >= self.end or self._vocab.is_eog(text[-1]))

    def _wait_for_hint(self) -> None:
        """The worker has given up a text that nobody asked to go on with; it goes on when somebody does."""
        if self._gone.wait(Reconnection.FIRST_PAUSE) or self.run_ahead:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._hint_id > self._heard_hint_id)

    def _attempt(self, channel: grpc.Channel) -> Exception | str | object:
        """One call. Returns _DONE, _IDLE, _MOVED, an exception for the caller, or why the link was lost."""
        import grpc

        address = self._remote.address
        opening = pb.Open(
            tokens=self._text,
            start=self._start,
            sampling=self._sampling,
            max_tokens=0 if self._asked_end is None else self._asked_end - len(self._text),
            run_ahead=self.run_ahead,
            model_id=self._remote.info.model_id,
            text_id=self._text_id,
        )
        outbox = _Outbox(padded(pb.Up(open=opening)), self.remote)
        stream = channel.stream_stream(method("Generate"), pb.Up.SerializeToString, pb.Down.FromString)
        try:
            call = stream(outbox, metadata=auth.bearer(address.token), wait_for_ready=False)
        except ValueError:  # closed: another text of this connection has renewed it, or close() was called
            return "the channel was closed" if channel is self._remote._channel else _MOVED
        with self._changed:
            self._call, self._outbox, self._channel = call, outbox, channel
            if self._hint is not None:
                outbox.put(self._hint_message())
            ended = self._ended
        if ended:
            call.cancel()  # type: ignore[no-untyped-call]
        try:
            for message in call:
                self.remote.bytes_down += message.ByteSize()
                kind = message.WhichOneof("kind")
                if kind == "commit":
                    self._found()
                    self._take(message.commit, outbox)
                elif kind == "opened":
                    self._found()
                    self._n_opened += 1
                    if self.opened_at is not None:
                        continue
                    self.opened_at = time.perf_counter()
                    self.remote.prompt_seconds = message.opened.prompt_us * 1e-6
                    self.remote.queued_seconds = message.opened.queued_us * 1e-6
                    self.remote.n_reused = message.opened.n_reused
                elif kind == "done":
                    return self._end_of(message.done.reason)
        except grpc.RpcError as error:
            if self._ended:
                return _DONE
            return failure(error, address.endpoint) or error.details() or error.code().name.lower()
        finally:
            outbox.close()
            call.cancel()  # type: ignore[no-untyped-call]
            with self._changed:
                self._call = self._outbox = self._channel = None
            self._remote._retire(channel)
        return "the worker ended the stream"

    def _take(self, message: pb.Commit, outbox: _Outbox) -> None:
        known, room = len(self._text), self.end - len(self._text)
        n_vocab = self._remote.info.n_vocab
        if message.pos != known or not 1 <= len(message.tokens) <= room or max(message.tokens) >= n_vocab:
            raise RemoteError(
                f"{self._remote.address.endpoint} committed {len(message.tokens)} tokens at {message.pos},"
                f" expected 1 to {room} valid ones at {known}"
            )
        tokens = tuple(message.tokens)
        sent = outbox.sent.get(message.hint_id)
        if sent is not None:
            self.remote.observe_round_trip(time.perf_counter() - sent - message.hint_age_us * 1e-6)
            self._remote._round_trip = self.remote.round_trip
        if message.own_draft:
            self.remote.n_own_draft += message.n_accepted
        commit = Commit(
            message.pos,
            tokens,
            min(message.n_accepted, len(tokens) - 1),  # the last one is always the target's own
            message.n_verified,
            message.pass_us * 1e-6,
        )
        with self._changed:
            self._heard_hint_id = message.hint_id
            self._reconnection.progress()
            self._text.extend(tokens)
            self._commits.append(commit)
            self._changed.notify_all()

    def _end_of(self, reason: str) -> Exception | str | object:
        if reason == "context" or (reason in ("eog", "length") and self._complete()):
            return _DONE
        if reason == "closing":
            return "the worker is ending"
        if reason == "idle":
            return _IDLE
        return RemoteError(f"{self._remote.address.endpoint} ended the text: {reason}")


_DONE = object()
"""A stream that came to its end."""

_MOVED = object()
"""No stream, because the connection has another channel by now."""

_IDLE = object()
"""A stream that the worker has ended because nobody asked for more."""

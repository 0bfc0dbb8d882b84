"""A worker on another machine as the target: texts over the remote protocol."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sllm.engine.arrays import int32_array
from sllm.engine.sampling import SamplingParams, check_grammar
from sllm.errors import CancelledError, ClosedError, ContextFullError, RemoteError
from sllm.remote.hedge import FirstAnswers, checked_hedge
from sllm.remote.route import Route
from sllm.remote.stream import (
    FIRST_PAUSE,
    ResumableStream,
    RetryError,
    StoppedError,
    StreamLostError,
    WorkerEndingError,
    checked_on_loss,
)
from sllm.targets.base import Commit, RemoteStats
from sllm.targets.tree import TokenTree
from sllm.wire.protocol import check_offered, padded, pb, required, to_hint, to_sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import grpc
    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from sllm.engine.vocab import Vocab
    from sllm.messages import ChatOptions
    from sllm.remote.fleet import Fleet
    from sllm.remote.hedge import Answer
    from sllm.remote.link import WorkerLink
    from sllm.targets.base import Scores

__all__ = ["RemoteGeneration", "RemoteTarget", "TextConnection"]


class TextConnection(Protocol):
    """What a text needs of a connection to a worker: :class:`~sllm.remote.connection.Remote` has it."""

    fleet: Fleet
    on_loss: str
    hedge: bool | float

    @property
    def vocab(self) -> Vocab:
        """The worker's vocabulary."""

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation."""

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the worker finds ``tokens[start:]``."""


class RemoteTarget:
    """One or several workers with the same model as a target, made by :meth:`Remote.target`. It serves as
    many texts at once as the workers have sessions.

    Examples:
        >>> with sllm.Worker(sllm.embedded.TARGET) as worker, sllm.connect(worker.uri) as remote:
        ...     stream = sllm.generate(remote.target(), "Once upon a time", draft="ngram", max_tokens=8)
        ...     len(stream.text()) > 0, isinstance(remote.target(), sllm.RemoteTarget)
        (True, True)

    """

    def __init__(
        self,
        remote: TextConnection,
        *,
        run_ahead: bool = True,
        on_loss: str | None = None,
        hedge: bool | float | None = None,
    ) -> None:
        self.remote = remote
        self.run_ahead = run_ahead
        self.hedge = remote.hedge if hedge is None else checked_hedge(hedge)
        self.on_loss = remote.on_loss if on_loss is None else checked_on_loss(on_loss)

    @property
    def vocab(self) -> Vocab:
        """The worker's vocabulary; see :attr:`Remote.vocab`."""
        return self.remote.vocab

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> RemoteGeneration:
        """Send the prompt, int32 (n,), and return the generation after it, without waiting for the worker.

        If the worker refuses the text, the generation's first ``__next__`` raises the error: BusyError (no
        place), ValueError (a bad grammar), RemoteError.

        Raises:
            ContextFullError: the prompt is longer than the worker takes.
            ValueError: no tokens, or one outside the vocabulary, or a bad grammar or JSON Schema.
            UnsupportedModelError: a JSON Schema for a worker that does not support them.

        """
        check_grammar(sampling)
        offers = self.remote.fleet.offers
        check_offered(sampling, {name for info in offers for name in info.features})
        return RemoteGeneration(self, self.checked_prompt(tokens), sampling, max_tokens)

    def checked_prompt(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """``tokens`` as int32 (n,), if the worker takes them as a prompt; raises as :meth:`open` does."""
        prompt = int32_array(tokens, "tokens")
        offers = self.remote.fleet.offers
        n_most, n_vocab = max(info.max_prompt for info in offers), offers[0].n_vocab
        if len(prompt) == 0:
            raise ValueError("the prompt has no tokens")
        if len(prompt) > n_most:
            raise ContextFullError(f"the prompt has {len(prompt)} tokens, and the worker takes {n_most}")
        if int(prompt.min()) < 0 or int(prompt.max()) >= n_vocab:
            raise ValueError(f"the prompt holds ids that are not in the vocabulary of {n_vocab} tokens")
        return prompt

    @property
    def chat_template(self) -> str | None:
        """The worker's chat template, a Jinja2 text, or None."""
        return self.remote.fleet.link.info.chat_template

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation; see :meth:`Remote.chat`."""
        return self.remote.chat(messages, **options)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the worker finds ``tokens[start:]``; see :meth:`Remote.score`."""
        return self.remote.score(tokens, start)

    def close(self) -> None:
        """Do nothing: texts and the connection are closed separately."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sllm.RemoteTarget {self.remote.fleet.link.endpoint}>"


class RemoteGeneration:
    """A text of a :class:`RemoteTarget`; see :class:`~sllm.targets.base.PipelinedGeneration`.

    Its own thread keeps the stream to the worker: it takes commits as they come, whether or not they are
    being read (a text is bounded). When the link is lost it connects again, to this worker or to another one,
    and continues after the last token that arrived: a position and a seed decide every token, so none is lost
    or sent twice.
    """

    def __init__(
        self,
        target: RemoteTarget,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._remote = target.remote  # keeps the connection open
        self._vocab = target.vocab
        self._sampling = to_sampling(sampling)
        self._required = required(sampling)
        self._text: list[int] = prompt.tolist()  # the stream's thread alone
        self._start = len(prompt)
        self._text_id = secrets.randbits(64) or 1
        self.run_ahead = target.run_ahead
        self.on_loss = target.on_loss
        self._requested_end = None if max_tokens is None else self._start + max_tokens
        self._hedge = target.hedge
        self._route = Route(
            target.remote.fleet, text=lambda: self._text, needs=self._required, end=lambda: self.end
        )
        self.closed = False
        self.remote = RemoteStats(round_trip=self._link.round_trip)
        self.opened_at: float | None = None
        self.finish_reason: str | None = None
        self._commits: deque[Commit] = deque()
        self._error: Exception | None = None
        self._hint_id = 0
        self._heard_hint_id = 0  # the newest one that the worker had when it committed
        self._hint: tuple[int, TokenTree] | None = None
        self._outbox: _Outbox | None = None  # while a call is open
        self._woken = self._done = self._cancelled = False
        self._heard = False  # a worker has answered
        self._changed = threading.Condition()
        self._stream = ResumableStream(self._route, self.remote, self.on_loss, self.wake)
        if self._start >= self.end:
            self._finish()
            self._stream.stop()
        else:
            self._stream.start(self._run, "sllm-remote")

    @property
    def _link(self) -> WorkerLink:
        """To the worker that has the text now."""
        return self._route.link

    # ---- for the caller

    @property
    def end(self) -> int:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        # Of the worker that has the text now, or before that of the one that has most.
        offers = [self._link.info] if self._heard else [self._link.info, *self._route.fleet.offers]
        n_ctx = max(len(self._text), *(info.n_ctx for info in offers))
        return n_ctx if self._requested_end is None else min(self._requested_end, n_ctx)

    @property
    def can_branch(self) -> bool:
        """See :attr:`~sllm.targets.base.Generation.can_branch`: as the worker says that has the text now."""
        return "trees" in self._link.info.features

    @property
    def learnt(self) -> dict[str, Any]:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        return self._link.learnt

    @property
    def max_hint(self) -> int:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        return self._link.info.max_hint

    @property
    def lost(self) -> bool:
        """Whether there is no link at the moment."""
        return self._stream.lost

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
        stopped = self._stream.stopped
        with self._changed:
            if self.finish_reason is not None:
                return None
            if timeout != 0.0:
                self._changed.wait_for(
                    lambda: self._commits or self._error or self._done or stopped.is_set() or self._woken,
                    timeout,
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
            if stopped.is_set():
                raise ClosedError("the generation is closed")
            if self._done:
                self.finish_reason = "context"  # of a worker with a shorter one than the first had
            return None

    def _finish(self) -> None:
        self.finish_reason = "length" if self.end == self._requested_end else "context"

    def _check_process(self) -> None:
        if self._link.pid != os.getpid():
            raise ClosedError(f"the generation belongs to process {self._link.pid}")

    def wake(self) -> None:
        """Let a blocked :meth:`poll` return; from any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`."""
        self._check_process()
        tree = TokenTree.of(tokens, parents)
        with self._changed:
            self._hint = (pos, tree)
            self._hint_id += 1
            if self._outbox is not None:
                self._outbox.put(self._hint_message())
            self._changed.notify_all()

    def _hint_message(self) -> pb.Up:
        assert self._hint is not None
        pos, tree = self._hint
        if not self.can_branch:
            tree = TokenTree.chain(tree.main_path())
        tree = tree.usable(self._link.info.n_vocab, self.max_hint, self.max_hint)
        parents = None if tree.is_chain else tree.parents
        return padded(pb.Up(hint=to_hint(pos, tree.tokens, parents, self._hint_id)))

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`."""
        self._check_process()
        with self._changed:
            if self._stream.stopped.is_set():
                return
            self._cancelled = True
        self._stream.stop()

    def close(self) -> None:
        """End the stream and its thread. More calls do nothing."""
        self.closed = True
        if self._link.pid != os.getpid():
            return  # it is the parent's
        self._stream.stop()
        # In the middle of connecting again it may take longer; Remote.close() waits for it.
        self._stream.join(0.5)

    # ---- the stream's thread

    def _run(self) -> None:
        try:
            self._route.begin()
            self._stream.run(self._attempt)
        except StoppedError:
            return
        except Exception as error:  # noqa: BLE001 - whatever ends the thread must reach the caller
            self._fail(error)
        else:
            with self._changed:
                self._done = True
                self._changed.notify_all()
        finally:
            self._route.end()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._error is None and not self._stream.stopped.is_set():
                self._error = error
            self._changed.notify_all()

    def _attempt(self, channel: grpc.Channel) -> None:
        """One call, which returns when the text is complete."""
        try:
            reason = self._read_commits(channel)
        except Exception:
            if self._complete():  # nothing is missing, so nobody needs to know
                return
            raise
        if reason == "context" or self._complete():
            return
        if reason == "idle":
            self._wait_for_hint()
            raise RetryError
        if reason == "moved":
            raise RetryError
        if reason == "closing":
            raise WorkerEndingError
        raise RemoteError(f"{self._link.endpoint} ended the text: {reason}")

    def _complete(self) -> bool:
        """Whether all of the text has arrived."""
        text = self._text
        return len(text) > self._start and (len(text) >= self.end or self._vocab.is_eog(text[-1]))

    def _wait_for_hint(self) -> None:
        """Wait until somebody wants more of a text that the worker gave up because nobody had asked for
        more.
        """
        stopped = self._stream.stopped
        if stopped.wait(FIRST_PAUSE) or self.run_ahead:
            return
        with self._changed:
            self._changed.wait_for(lambda: stopped.is_set() or self._hint_id > self._heard_hint_id)

    def _opening(self) -> pb.Up:
        opening = pb.Open(
            tokens=self._text,
            start=self._start,
            sampling=self._sampling,
            require=self._required,
            max_tokens=0 if self._requested_end is None else self._requested_end - len(self._text),
            run_ahead=self.run_ahead,
            model_id=self._link.info.model_id,
            text_id=self._text_id,
        )
        return padded(pb.Up(open=opening))

    def _read_commits(self, channel: grpc.Channel) -> str:
        """Open the text on a channel and take what comes; the worker's reason for ending the stream, or
        "moved": it has been left for another one.
        """
        stream = self._stream
        outbox = _Outbox(self._opening(), self.remote)
        call = stream.open_call(
            channel,
            "Generate",
            outbox,
            pb.Up.SerializeToString,
            pb.Down.FromString,
            end_outgoing=outbox.close,
        )
        with self._changed:
            self._outbox = outbox
            if self._hint is not None:
                outbox.put(self._hint_message())
        try:
            messages: Iterator[pb.Down] = call
            if self._hedge and not self._heard and not self._route.fleet.is_one:
                outbox, messages = self._race(outbox, call)
            for message in messages:
                self._heard = True
                if self._is_first_answer(message):
                    self._route.first_answer()
                self.remote.bytes_down += message.ByteSize()
                kind = message.WhichOneof("kind")
                if kind == "commit":
                    stream.mark_found()
                    self._take(message.commit, outbox)
                elif kind == "opened":
                    stream.mark_found()
                    self._take_opened(message.opened)
                elif kind == "draining":
                    self._route.fleet.note_draining(self._link)
                    if not self._ends_within(message.draining.milliseconds * 1e-3) and self._route.leave():
                        return "moved"
                elif kind == "done":
                    return str(message.done.reason)
            raise StreamLostError("the worker ended the stream")
        finally:
            with self._changed:
                self._outbox = None
            stream.hang_up()

    def _ends_within(self, seconds: float) -> bool:
        """Whether the text will probably be at its end in ``seconds``: as fast as it was so far."""
        n_tokens = len(self._text) - self._start
        if self.opened_at is None or n_tokens == 0:
            return False
        elapsed = time.perf_counter() - self.opened_at
        return (self.end - len(self._text)) * elapsed / n_tokens <= seconds

    def _race(self, outbox: _Outbox, call: Any) -> tuple[_Outbox, Iterator[pb.Down]]:
        """Ask a second worker, too, if the first one does not answer in time; what goes up to and comes down
        from the one that answers first. The other call is ended.
        """
        answers = FirstAnswers(self._is_first_answer)
        answers.watch(call)
        rival: _Rival | None = None
        try:
            answer = answers.wait(self._route.patience if self._hedge is True else float(self._hedge))
            if answer is None:
                rival = self._open_rival()
                if rival is not None:
                    answers.watch(rival.call)
                answer = answers.wait(None)
            if rival is not None:
                assert answer is not None
                if answer.error is not None:  # the other one may yet
                    other = answers.wait(None)
                    assert other is not None
                    answer = other if other.error is None or other.call is call else answer
                outbox = self._decide(answer, outbox, rival)
        except BaseException:
            call.cancel()
            raise
        finally:
            if rival is not None:
                self._stream.end_rival(rival.call, won=self._stream.call is rival.call)
            answers.close()
        assert answer is not None
        return outbox, _answered(answer)

    def _is_first_answer(self, message: pb.Down) -> bool:
        """Whether a message is what a text waits for: its first tokens, or without run-ahead, where these
        need a hint, that the prompt is computed.
        """
        return message.WhichOneof("kind") != "opened" or not self.run_ahead

    def _open_rival(self) -> _Rival | None:
        """The call of a second worker; None: there is none that may have the text."""
        link = None if self._stream.stopped.is_set() else self._route.rival()
        if link is None:
            return None
        channel = link.live()
        outbox = _Outbox(self._opening(), self.remote)
        call = self._stream.open_rival(
            channel, link, "Generate", outbox, pb.Up.SerializeToString, pb.Down.FromString
        )
        self.remote.n_hedged += 1
        return _Rival(call, channel, link, outbox)

    def _decide(self, answer: Answer, outbox: _Outbox, rival: _Rival) -> _Outbox:
        """End the call that has lost; what goes up to the other one."""
        first = self._link
        won = answer.call is rival.call
        self.remote.hedge_tokens += self._route.fleet.n_to_compute(first if won else rival.link, self._text)
        if not won:
            rival.outbox.close()
            return outbox
        self.remote.n_hedges_won += 1
        self._stream.adopt(rival.call, rival.link, rival.channel, rival.outbox.close)
        with self._changed:
            self._outbox = rival.outbox
            if self._hint is not None:
                rival.outbox.put(self._hint_message())
        return rival.outbox

    def _take_opened(self, message: pb.Opened) -> None:
        self._route.opened(len(self._text), message.n_reused, message.prompt_us * 1e-6)
        if self.opened_at is not None:
            return
        self.opened_at = time.perf_counter()
        self.remote.prompt_seconds = message.prompt_us * 1e-6
        self.remote.queued_seconds = message.queued_us * 1e-6
        self.remote.n_reused = message.n_reused

    def _take(self, message: pb.Commit, outbox: _Outbox) -> None:
        known, room = len(self._text), self.end - len(self._text)
        n_vocab = self._link.info.n_vocab
        if message.pos != known or not 1 <= len(message.tokens) <= room or max(message.tokens) >= n_vocab:
            raise RemoteError(
                f"{self._link.endpoint} committed {len(message.tokens)} tokens at {message.pos},"
                f" expected 1 to {room} valid ones at {known}"
            )
        tokens = tuple(message.tokens)
        sent = outbox.sent.get(message.hint_id)
        if sent is not None:
            self.remote.observe_round_trip(time.perf_counter() - sent - message.hint_age_us * 1e-6)
            self._link.round_trip = self.remote.round_trip
        n_accepted = min(message.n_accepted, len(tokens) - 1)  # the last one is always the target's own
        older = (
            message.own_draft and not message.n_own_verified
        )  # a worker that says no more than whose it was
        commit = Commit(
            message.pos,
            tokens,
            n_accepted,
            message.n_verified,
            message.pass_us * 1e-6,
            n_accepted if older else min(message.n_own_accepted, n_accepted),
            message.n_verified if older else min(message.n_own_verified, message.n_verified),
        )
        self.remote.n_own_draft += commit.n_own_accepted
        with self._changed:
            self._heard_hint_id = message.hint_id
            self._stream.progress()
            self._text.extend(tokens)
            self._commits.append(commit)
            self._changed.notify_all()


@dataclass(frozen=True)
class _Rival:
    """A call to a second worker for the same text."""

    call: Any
    channel: grpc.Channel
    link: WorkerLink
    outbox: _Outbox


def _answered(answer: Answer) -> Iterator[pb.Down]:
    """What comes of a call of which the first answer has been read."""
    if answer.error is not None:
        if isinstance(answer.error, StopIteration):
            return iter(())
        raise answer.error
    return itertools.chain(answer.messages, answer.call)


class _Outbox:
    """What goes up during one call: Open, then always the newest hint alone. gRPC iterates over it on a
    separate thread.
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

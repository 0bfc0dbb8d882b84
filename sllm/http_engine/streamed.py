"""One text of an engine that selects with its own seeded noise: its stream, ahead of which a draft jumps."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm.errors import BusyError, CancelledError, ClosedError, RemoteError
from sllm.http_engine.generation import EngineStats
from sllm.http_engine.selection import RowSelector, first_k
from sllm.http_engine.transport import Call, HttpStatusError, Reply
from sllm.targets.base import Commit
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.dialect import SamplingDialect
    from sllm.http_engine.generation import Engine
    from sllm.http_engine.transport import EventStream

__all__ = ["StreamStats", "StreamedGeneration"]

_MAX_JUMP = 16
"""Drafted tokens that a jump goes over, at most."""

_SURE = 0.5
"""The least chance that all of a jump's tokens hold."""

_MEMORY = 0.95
"""What a token weighs in the draft's record after one more."""

_LEAD, _LEAD_OF_VARYING = 0.01, 0.25
"""A jump goes over a token whose score is so far above any other's: an engine rounds in another way, and one
that is not batch-invariant differs from itself.
"""

_MAX_FAILED = 8
"""So many streams that break off without a token, one after the other, are enough."""


@dataclass
class StreamStats(EngineStats):
    """What a text that an engine streams has cost.

    Attributes:
        n_jumps: streams that were begun behind drafted tokens.
        n_jumped: tokens that came ahead of the stream before.
        n_disagreed: positions at which two of the engine's answers were not the same. Then there are no more
            jumps in this text.

    """

    n_jumps: int = 0
    n_jumped: int = 0
    n_disagreed: int = 0


class _Tagged:
    """Puts the events of one request where those of all are waited for."""

    def __init__(self, events: queue.SimpleQueue[tuple[object, Any]], source: object) -> None:
        self._events = events
        self._source = source

    def put(self, event: Any) -> None:
        self._events.put((self._source, event))


@dataclass(eq=False)
class _Source:
    """One stream of the engine.

    Attributes:
        start: the position of its first token.
        assumed: the drafted tokens right before that, which are not known to be the text yet.
        tokens: what has come.

    """

    start: int
    assumed: list[int]
    call: Call
    read: Callable[[Any], list[int]]
    stream: EventStream | None = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def close(self) -> None:
        self.ended = True
        if self.stream is not None:
            self.stream.close()


@dataclass(eq=False)
class _Check:
    """A request for the rows along a drafted chain."""

    text: list[int]
    chain: list[int]
    call: Call
    sent_at: float = field(default_factory=time.monotonic)


class StreamedGeneration:
    """One text of an :class:`~sllm.EngineTarget` whose engine selects with the noise of the parameters
    (``SamplingParams(noise=...)``), or with sllm's by a plugin; see
    :class:`~sllm.targets.base.PipelinedGeneration`.

    What the engine streams is the text. Where a draft is sure of what comes, and the round trip is worth it,
    a second stream begins behind the drafted tokens, and one request asks for the rows along them: once the
    tokens hold, by these rows or because the first stream has come there, the second stream is the text. The
    first one ends when the second is ahead, so a text is never later than by its first stream alone.

    **Experimental with an engine's own noise.** That a row selects here what the engine's kernel selects is
    tested against what vLLM's and SGLang's own code gives on a CPU, and vLLM's server was compared from end
    to end on one, its kernels interpreted (``benchmarks/engines``). On a GPU nothing is proved: there a
    kernel may round in another way, and an engine that is not batch-invariant gives other numbers for the
    same text when it is computed as a prompt. Where two answers of the engine differ, the text goes on with
    the one that came first, and ``remote.n_disagreed`` counts it.

    Args:
        engine: what decides.
        dialect: what asks it.
        prompt: token ids.
        sampling: how the engine selects.
        max_tokens: at most so many; None: until the model ends or the context is full.
        invariant: whether the engine says that its numbers do not depend on what else it computes.

    Attributes:
        remote: what it has cost.

    """

    run_ahead = True
    on_loss = "wait"
    can_branch = False

    def __init__(
        self,
        engine: Engine,
        dialect: SamplingDialect,
        prompt: list[int],
        sampling: SamplingParams,
        max_tokens: int | None,
        *,
        invariant: bool,
    ) -> None:
        self._engine = engine
        self._dialect = dialect
        self._sampling = sampling
        self._selector = RowSelector(engine.model, sampling, len(prompt))
        self._k = first_k(sampling, engine.max_logprobs)
        self._lead = _LEAD if invariant else _LEAD_OF_VARYING
        if sampling.noise == "sllm":
            self._lead = 0.0  # the same arithmetic on both sides
        self._text = list(prompt)
        self._requested_end = None if max_tokens is None else len(prompt) + max_tokens
        self.end = engine.n_ctx if self._requested_end is None else min(self._requested_end, engine.n_ctx)
        self._events: queue.SimpleQueue[tuple[object, Any]] = queue.SimpleQueue()
        self._sources: list[_Source] = []  # the one that is the text first
        self._check: _Check | None = None
        self._jumps = True
        self._n_failed = 0
        self._guess: tuple[int, list[int]] = (0, [])  # what the newest hint says, and from where on
        self._right, self._seen = 0.0, 0.0  # drafted tokens that held, and that were compared
        self._token_seconds = 0.0  # between tokens of the stream
        self._fresh: list[int] = []  # of the text: not given to the caller yet
        self._n_accepted = self._n_verified = 0  # of these
        self._cancelled = False
        self._closed = False
        self._progress_at = self._news_at = time.monotonic()
        self.finish_reason: str | None = None
        self.opened_at: float | None = None
        self.remote: StreamStats = StreamStats(round_trip=engine.round_trip)
        self._check_end()
        if self.finish_reason is None:
            self._begin([])

    @property
    def learnt(self) -> dict[str, Any]:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        return self._engine.learnt

    @property
    def max_hint(self) -> int:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        return 2 * _MAX_JUMP

    @property
    def lost(self) -> bool:
        """Whether no stream is on its way."""
        return not self._sources

    # ---- what is asked for

    def _begin(self, chain: list[int]) -> None:
        """Begin a stream after the text and a drafted chain."""
        start = len(self._text) + len(chain)
        n = min(self.end - start, self._dialect.stream_tokens)
        source = _Source(start, list(chain), Call(self.remote), self._dialect.sample_reader())
        asked = self._dialect.sample_request([*self._text, *chain], n, self._sampling)
        self.remote.n_requests += 1
        self._sources.append(source)
        link = self._engine.link
        source.stream = link.stream(*asked, call=source.call, events=_Tagged(self._events, source))

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`: a jump begins where it is worth it."""
        tree = TokenTree.of(tokens, parents)
        chain = list(tree.main_path())
        known = self._text[pos:] if 0 <= pos <= len(self._text) else None
        if known is None or chain[: len(known)] != known[: len(chain)]:
            return
        chain = chain[len(known) :]
        self._guess = (len(self._text), chain)
        if self.opened_at is None or not self._jumps or self._check is not None or self._assumed():
            return
        length = self._worth(chain)
        if length:
            self._jump(chain[:length])

    def _worth(self, chain: list[int]) -> int:
        """How many tokens of a chain to jump over; 0: it is not worth it.

        What a jump gives comes a round trip and a pass later. By then the stream has brought some tokens, so
        a jump over fewer would bring nothing.
        """
        vocab, room = self._engine.model.vocab, self.end - len(self._text) - 1
        n, holds = 0, 1.0
        sure = (self._right + 1) / (self._seen + 2)
        for token in chain[: min(room, _MAX_JUMP)]:
            holds *= sure
            if holds < _SURE or not 0 <= token < vocab.n_tokens or vocab.is_eog(token):
                break
            n += 1
        return n if n > self._distance() else 0

    def _distance(self) -> float:
        """Tokens that the stream brings until a new request is answered."""
        pace = self._token_seconds
        return 1 + self.remote.round_trip / pace if pace > 0 else float("inf")

    def _jump(self, chain: list[int]) -> None:
        check = _Check(list(self._text), chain, Call(self.remote))
        self.remote.n_jumps += 1
        self.remote.n_hints += 1
        self._begin(chain)
        self._check = check
        self._ask(check)

    def _ask(self, check: _Check) -> None:
        asked = self._dialect.rows_request(check.text, check.chain, self._k)
        self.remote.n_requests += 1
        self._engine.link.begin(*asked, call=check.call, done=_Tagged(self._events, check).put)

    def _assumed(self) -> bool:
        """Whether a stream is waiting for its drafted tokens to hold."""
        return any(source.assumed for source in self._sources)

    # ---- what comes

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
        """See :class:`~sllm.targets.base.PipelinedGeneration`.

        Raises:
            RemoteError, BusyError: the engine has been lost, or without a place, to the end of the deadline.
            AuthError: it refuses the key.
            CancelledError, ClosedError: the generation was cancelled, or closed.

        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._closed:
                raise ClosedError("the generation is closed")
            if self._cancelled:
                raise CancelledError("the generation was cancelled")
            done = self.finish_reason is not None  # what comes now is not of the text
            woken = self._take_events(time.monotonic() if done else until)
            if self._fresh:
                return self._commit()
            if woken or self.finish_reason is not None:
                return None
            if until is not None and time.monotonic() >= until:
                return None

    def _take_events(self, until: float | None) -> bool:
        """Take what has come, and wait for the first of it; whether :meth:`wake` was called."""
        woken = False
        wait = None if until is None else max(until - time.monotonic(), 0.0)
        try:
            item: tuple[object, Any] | None = self._events.get(timeout=wait) if wait != 0 else None
            while True:
                if item is None:
                    item = self._events.get_nowait()
                source, event = item
                item = None
                if isinstance(source, _Source):
                    self._on_stream(source, event)
                elif isinstance(source, _Check):
                    self._on_check(source, event)
                else:
                    woken = True
        except queue.Empty:
            return woken

    def _commit(self) -> Commit:
        now = time.monotonic()
        tokens, self._fresh = tuple(self._fresh), []
        pos = len(self._text) - len(tokens)
        seconds = now - self._progress_at
        self._progress_at = now
        accepted, self._n_accepted = min(self._n_accepted, len(tokens)), 0
        verified, self._n_verified = self._n_verified, 0
        return Commit(pos, tokens, accepted, max(verified, accepted), seconds)

    def _on_stream(self, source: _Source, event: Any) -> None:
        if source.ended:
            return
        if event is None or isinstance(event, BaseException):
            self._on_end(source, event)
            return
        tokens = source.read(event)
        now = time.monotonic()
        if tokens:
            if self.opened_at is None:
                self.opened_at = time.perf_counter()
            elif source is self._sources[0] and source.tokens:
                pace = (now - self._news_at) / len(tokens)
                known = self._token_seconds
                self._token_seconds = pace if known == 0 else known + 0.1 * (pace - known)
            if source is self._sources[0]:
                self._news_at = now
            source.tokens += tokens
            self._collect()

    def _on_end(self, source: _Source, error: BaseException | None) -> None:
        """A stream is over: it had come to what it was asked for, or it broke off."""
        source.close()
        self._sources.remove(source)
        if source.tokens:
            self._n_failed = 0
        if error is None and not source.tokens and not self._sources:
            # It ends where the text is, with a token that it does not tell.
            self._check = _Check(list(self._text), [], Call(self.remote))
            self._ask(self._check)
            return
        if error is not None and not self._sources:
            self._wait_or_raise(error)
        self._go_on()

    def _wait_or_raise(self, error: BaseException) -> None:
        """The only stream broke off: a new one may do, within the deadline, if it was not refused."""
        lost = isinstance(error, RemoteError) and not isinstance(error, (HttpStatusError, PermissionError))
        waited = time.monotonic() - self._progress_at
        if not (lost or isinstance(error, BusyError)) or waited > self._engine.link.deadline:
            raise error
        self._n_failed += 1
        if self._n_failed > _MAX_FAILED:
            raise error
        if self._n_failed > 1:
            time.sleep(0.02 * self._n_failed)
        self.remote.n_reconnects += 1

    def _go_on(self) -> None:
        """Begin a stream where the text is, if none is on its way there."""
        if self.finish_reason is None and all(source.assumed for source in self._sources):
            self._begin([])
            self._sources.sort(key=lambda source: bool(source.assumed))

    def _on_check(self, check: _Check, answer: Any) -> None:
        """The rows along a chain have come: which of its tokens hold."""
        if check is not self._check:
            return
        self._check = None
        if not isinstance(answer, Reply):
            self._on_no_rows(check, answer)
            return
        self.remote.observe_round_trip(time.monotonic() - check.sent_at - self._token_seconds)
        rows = self._dialect.rows(answer.value, check.chain, self._k)
        found: list[int] = []
        for place, row in enumerate(rows):
            token = self._selector.select(row, [*check.text, *check.chain[:place]])
            if token is None or (check.chain and self._selector.lead < self._lead):
                break
            found.append(token)
            if place == len(check.chain) or token != check.chain[place]:
                break
        self.remote.n_decided = self._selector.n_decided
        n_known = len(self._text) - len(check.text)
        if found[:n_known] != self._text[len(check.text) :][: len(found)]:
            self._disagree()
            return
        if not check.chain and not found:
            raise RemoteError(f"{self._engine.link.endpoint} ends its stream without a token")
        fresh = found[n_known:]
        if fresh:
            held = sum(a == b for a, b in zip(found, check.chain, strict=False))
            self._n_accepted += max(held - n_known, 0)
            self._n_verified += max(len(check.chain) - n_known, 0)
            self.remote.n_jumped += len(fresh)
            self._extend(fresh)
            self._collect()
            behind = len(self._text) - max((s.end for s in self._sources if not s.assumed), default=0)
            if self.finish_reason is None and not self._assumed() and behind > self._distance():
                self._begin([])

    def _on_no_rows(self, check: _Check, error: Any) -> None:
        """A request for rows has failed: the streams say how the text goes on, where there is one."""
        if not check.chain or not isinstance(error, (CancelledError, RemoteError, BusyError)):
            raise error
        if isinstance(error, HttpStatusError):
            self._jumps = False

    def _disagree(self) -> None:
        self.remote.n_disagreed += 1
        self._jumps = False
        for source in [source for source in self._sources if source.assumed]:
            self._drop(source)

    # ---- the text

    def _extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text, up to its end."""
        for token in tokens:
            if self.finish_reason is not None:
                return
            self._compare(token)
            self._text.append(token)
            self._fresh.append(token)
            if self._engine.model.vocab.is_eog(token):
                self.finish_reason = "eog"
            else:
                self._check_end()
        if self.finish_reason is not None:
            self._hang_up()

    def _compare(self, token: int) -> None:
        """Keep the draft's record."""
        begin, guess = self._guess
        place = len(self._text) - begin
        if 0 <= place < len(guess):
            right = guess[place] == token
            self._right = self._right * _MEMORY + right
            self._seen = self._seen * _MEMORY + 1
            if not right:
                self._guess = (0, [])

    def _check_end(self) -> None:
        if len(self._text) >= self.end:
            self.finish_reason = "length" if self.end == self._requested_end else "context"

    def _collect(self) -> None:
        """Take from the streams what is the text, and end those that are not, or not any more."""
        grew = True
        while grew and self.finish_reason is None:
            grew = False
            for source in list(self._sources):
                self._verify(source)
                ahead = source.end - len(self._text)
                if source in self._sources and not source.assumed and 0 < ahead <= len(source.tokens):
                    if source is not self._sources[0]:
                        self.remote.n_jumped += ahead
                    self._extend(source.tokens[-ahead:])
                    grew = True
        if self.finish_reason is not None:
            return
        leaders = [s for s in self._sources if s.tokens and not s.assumed and s.end == len(self._text)]
        if leaders:
            for source in [s for s in self._sources if not s.assumed and s is not leaders[0]]:
                self._drop(source)
            self._sources.sort(key=lambda source: bool(source.assumed))
        self._go_on()

    def _verify(self, source: _Source) -> None:
        """Whether what a stream goes on from, and what it has brought, is the text as far as is known."""
        text, begin = self._text, source.start - len(source.assumed)
        theirs = [*source.assumed, *source.tokens]
        if text[begin : begin + len(theirs)] != theirs[: max(len(text) - begin, 0)]:
            if not source.assumed:
                self.remote.n_disagreed += 1
                self._jumps = False
            self._drop(source)
        elif source.assumed and len(text) >= source.start:
            source.assumed = []

    def _drop(self, source: _Source) -> None:
        source.close()
        self._sources.remove(source)

    # ---- the end

    def wake(self) -> None:
        """See :class:`~sllm.targets.base.PipelinedGeneration`."""
        self._events.put((None, None))

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`."""
        self._cancelled = True
        self.wake()

    def _hang_up(self) -> None:
        for source in list(self._sources):
            self._drop(source)
        if self._check is not None:
            self._check.call.cancel()
            self._check = None

    def close(self) -> None:
        """End what the engine computes for this text. More calls do nothing."""
        self._closed = True
        self._hang_up()

"""A text of an engine: the requests of each round, and the tokens selected from the rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm.errors import SllmError, UndecidedError
from sllm.http_engine.run_length import RunLength
from sllm.http_engine.selection import RowSelector, first_k, is_plain_greedy, undecided
from sllm.http_engine.transport import Call, HttpStatusError, LinkLostError, limit_of
from sllm.targets.base import RemoteStats
from sllm.targets.lockstep import LockstepGeneration, Verified

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.model import Model
    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.dialect import Dialect
    from sllm.http_engine.rows import Row
    from sllm.http_engine.transport import EngineLink, EventStream
    from sllm.targets.tree import TokenTree

__all__ = ["Engine", "EngineGeneration", "EngineStats"]


@dataclass
class EngineStats(RemoteStats):
    """Statistics of a text of an engine.

    Attributes:
        n_requests: requests for rows, including repeated ones.
        n_decided: positions at which all tokens that could be selected were known.
        n_certified: positions at which they were not, but no other token could be selected with its noise
            (:func:`sllm_select_known` in ``csrc/sllm.h``).
        n_raised: positions for which more log-probabilities had to be requested.
        n_tied: positions at which the engine may have left out tokens exactly as likely as the last one that
            counts; their order is up to the engine.

    """

    n_requests: int = 0
    n_decided: int = 0
    n_certified: int = 0
    n_raised: int = 0
    n_tied: int = 0


@dataclass
class Engine:
    """What the texts of one engine share.

    Attributes:
        link: the connections.
        dialect: what asks it.
        model: with the vocabulary.
        n_ctx: positions of a text.
        max_logprobs: log-probabilities of a position that it gives at most; the size of the vocabulary, where
            no limit is known.
        max_chain: drafted tokens that one request checks at most.
        round_trip: seconds, measured when it was found.
        learnt: see :class:`~sllm.targets.base.PipelinedGeneration`.

    """

    link: EngineLink
    dialect: Dialect
    model: Model
    n_ctx: int
    max_logprobs: int
    max_chain: int
    round_trip: float
    learnt: dict[str, Any] = field(default_factory=dict)


class EngineGeneration(LockstepGeneration):
    """One text of an :class:`~sllm.EngineTarget`; see :class:`~sllm.targets.base.Generation`.

    With a hint, one request asks for the rows after the text and after each token of the hint. Without one,
    the engine goes on by itself, and its likeliest tokens are the hint: where they are the text (temperature
    0), it streams to its end; else some tokens with their rows, up to the first that is not the one selected.

    Args:
        engine: what decides.
        prompt: token ids.
        sampling: how tokens are selected.
        max_tokens: at most so many; None: until the model ends or the context is full.
        logprobs: how many to ask for at first; None: as many as the parameters are likely to need.
        run: tokens that the engine may go on by itself, at a temperature above 0.

    Attributes:
        remote: what it has cost.

    """

    own_pace = True
    _GAIN = 1.2
    """A hint has to promise so many times the tokens of a stream, which is lost with what is on its way."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        sampling: SamplingParams,
        max_tokens: int | None,
        logprobs: int | None,
        run: int,
    ) -> None:
        super().__init__(engine.model.vocab, prompt, max_tokens, engine.n_ctx, engine.max_chain)
        self._engine = engine
        self._sampling = sampling
        self._selector = RowSelector(engine.model, sampling, len(prompt))
        self._k = first_k(sampling, engine.max_logprobs) if logprobs is None else logprobs
        self._streams = is_plain_greedy(sampling)
        self._run = RunLength(run)
        self._hints_held, self._hints_tried = 4.0, 5.0  # of hinted tokens that were reached
        self._pace: float | None = None  # seconds between the tokens of a stream
        self._read_at: float | None = None  # when the last of its tokens were read
        self._computed = False  # the prompt: until then a hint would have it computed once for each token
        self._stream: EventStream | None = None
        self._failed: SllmError | None = None  # what a stream ended with, to be raised in the next round
        self._read: Callable[[Any], tuple[list[Row], bool]] | None = None
        self.remote: EngineStats = EngineStats(round_trip=engine.round_trip)
        self._call = Call(self.remote)

    @property
    def ready(self) -> bool:
        """See :attr:`~sllm.targets.lockstep.LockstepGeneration.ready`."""
        return self._stream is not None and self._stream.ready

    def hint(
        self,
        pos: int,
        tokens: Sequence[int],
        parents: Sequence[int] | None = None,
        *,
        n_first: int | None = None,
    ) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`; nothing is sent before an answer has come."""
        del n_first
        if self._computed and self._is_worth(len(tokens)):
            super().hint(pos, tokens, parents)

    def _is_worth(self, n: int) -> bool:
        """Whether a request for ``n`` hinted tokens is likely to bring more tokens per second than the stream
        that it would end, whose tokens are the text.
        """
        if not self._streams:
            return True
        if self._pace is None:
            return False
        share = min(self._hints_held / self._hints_tried, 0.99)
        tokens = (1 - share ** (n + 1)) / (1 - share)
        return tokens * self._pace > self._GAIN * (self._engine.round_trip + self._pace)

    def _verify(self, tree: TokenTree) -> Verified:
        if tree:
            self._drop_stream()
            self.remote.n_hints += 1
            chain = list(tree.tokens)
            tokens, n_held = self._select(self._rows(self._text, chain, self._k), chain)
            self._hints_held += n_held
            self._hints_tried += min(n_held + 1, len(chain))
            return Verified(tokens, n_held, len(chain))
        tokens = self._by_itself()
        self._computed = True
        return Verified(tokens, 0, 0)

    # ---- what is asked for

    def _rows(self, text: list[int], chain: list[int], k: int) -> list[Row]:
        """The rows after the text and after each token of a chain."""
        engine = self._engine
        self.remote.n_requests += 1
        reply = engine.link.request(*engine.dialect.rows_request(text, chain, k), call=self._call)
        return engine.dialect.rows(reply.value, chain, k)

    def _by_itself(self) -> tuple[int, ...]:
        """Tokens with which the engine goes on by itself, one at least."""
        room = self._end - len(self._text)
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
        stream = self._stream or self._open_stream(room)
        rows: list[Row] = []
        goes_on = True
        try:
            while goes_on and len(rows) < room and (not rows or stream.ready):
                found, goes_on = self._next_rows(stream)
                rows += found
        except SllmError as error:
            if not rows:
                raise
            self._failed, goes_on = error, False  # what came before it comes first
        self._observe_pace(len(rows))
        if not goes_on:
            self._drop_stream()
        if not rows:  # it ended here, or withholds the next row
            return self._select(self._rows(self._text, [], self._k), [])[0]
        tokens, n_held = self._select(rows[:room], [row.sampled for row in rows])
        if n_held < len(rows):
            self._drop_stream()
        self._run.observe(n_held, min(n_held + 1, len(rows)))
        return tokens

    def _observe_pace(self, n: int) -> None:
        """``n`` tokens of a stream were read; the first ones waited for it to begin."""
        now, before = time.perf_counter(), self._read_at
        self._read_at = now if n else None
        if before is not None and n:
            each = (now - before) / n
            self._pace = each if self._pace is None else 0.8 * self._pace + 0.2 * each

    def _open_stream(self, room: int) -> EventStream:
        dialect = self._engine.dialect
        self.remote.n_requests += 1
        self._read_at = None
        if self._streams:
            asked = dialect.stream_request(self._text, min(room, dialect.stream_tokens), self._k)
            self._read = dialect.stream_reader(self._k)
        else:
            asked = dialect.run_request(self._text, self._run.choose(room), self._k)
            self._read = dialect.run_reader(self._k)
        self._stream = self._engine.link.stream(*asked, call=self._call)
        return self._stream

    def _next_rows(self, stream: EventStream) -> tuple[list[Row], bool]:
        """The rows of the next event, and whether there will be more."""
        assert self._read is not None
        try:
            event = stream.get()
        except LinkLostError:  # the next request goes on from here
            self.remote.n_reconnects += 1
            event = None
        return ([], False) if event is None else self._read(event)

    def _drop_stream(self) -> None:
        """Read no more of it; a run ends by itself, and its connection stays."""
        if self._stream is not None:
            if self._streams:
                self._stream.close()
            else:
                self._stream.leave()
            self._stream = None

    # ---- what is selected

    def _select(self, rows: list[Row], drafted: Sequence[int | None]) -> tuple[tuple[int, ...], int]:
        """The tokens that rows select, up to the first that is not the drafted one, and how many of the
        drafted ones held.
        """
        text, n_held = list(self._text), 0
        for place, row in enumerate(rows):
            token = self._selector.select(row, text)
            if token is None:
                try:
                    token = self._select_from_more(text, len(row.tokens))
                except UndecidedError:
                    if place == 0:
                        raise
                    break  # what is certain comes first, and then the error
            text.append(token)
            holds = place < len(drafted) and token == drafted[place]
            n_held += holds
            if not holds or self._vocab.is_eog(token):
                break
        self.remote.n_decided = self._selector.n_decided
        self.remote.n_certified = self._selector.n_certified
        self.remote.n_tied = self._selector.n_tied
        return tuple(text[len(self._text) :]), n_held

    def _select_from_more(self, text: list[int], k: int) -> int:
        """The token after ``text``, for which ``k`` log-probabilities were not enough.

        Raises:
            UndecidedError: nor are as many as the engine gives.

        """
        engine = self._engine
        self.remote.n_raised += 1
        while k < engine.max_logprobs:
            k = min(4 * k, engine.max_logprobs)
            try:
                row = self._rows(text, [], k)[0]
            except HttpStatusError as error:
                limit = limit_of(error)
                if limit is None or not 1 <= limit < k:
                    raise
                engine.max_logprobs = k = limit  # a limit beyond what was tried
                row = self._rows(text, [], k)[0]
            token = self._selector.select(row, text)
            if token is not None:
                n_positions = self._selector.n_decided + self._selector.n_certified
                if 8 * self.remote.n_raised > n_positions > 8:  # more at once is less than twice
                    self._k = min(2 * self._k, engine.max_logprobs)
                return token
        raise undecided(
            self._sampling, engine.max_logprobs, engine.link.endpoint, engine.dialect.max_logprobs_option
        )

    # ---- the end

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`: the request under way ends with its
        connection.
        """
        self._cancelled = True
        self._call.cancel()

    def close(self) -> None:
        """End what the engine computes for this text. More calls do nothing."""
        self.closed = True
        if self._stream is not None:
            self._stream.close()
            self._stream = None

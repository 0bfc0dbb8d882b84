"""The texts of a request, piece by piece, as they are written."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sllm.generation.async_turns import AsyncTurns
from sllm.generation.text_stream import RunStream, TextStream
from sllm.openai_server.asked import Asked, ChatAsked, CompletionAsked
from sllm.openai_server.tool_calls import DemandedCall, ToolCalls

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

    from sllm.generation.text_stream import Run
    from sllm.openai_server.logprobs import TokenLogprob
    from sllm.openai_server.source import Place, Prompt, Source

__all__ = ["Piece", "Usage", "Writing"]

_T = TypeVar("_T")

_ENDS = {"eog": "stop", "stop": "stop", "length": "length", "context": "length", None: "stop"}
"""How OpenAI calls the reasons for which a text ends."""


@dataclass
class Piece:
    """Some of a text.

    Attributes:
        index: which of the request's texts.
        text: of the answer.
        reasoning: what comes before it.
        calls: of tools, in OpenAI's form.
        logprobs: of its tokens, where asked for.
        finish_reason: of the last piece, as OpenAI calls it.
        account: who has answered, with the last piece of a hybrid's answer.

    """

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    account: Mapping[str, Any] | None = None

    def add(self, more: Piece) -> None:
        """Go on with the next piece of the same text."""
        self.text += more.text
        self.reasoning += more.reasoning
        self.calls += more.calls
        self.logprobs += more.logprobs
        self.finish_reason = more.finish_reason
        self.account = more.account

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason)


@dataclass
class Usage:
    """What the texts of a request have taken, in tokens.

    Attributes:
        prompt, cached: of the prompts, and of these what was in memory already.
        completion, reasoning: of the texts, and of these what came before the answers.
        known: whether they were counted: a hybrid's models have prompts of their own.

    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    known: bool = True

    def as_object(self) -> dict[str, Any] | None:
        """As OpenAI has it."""
        if not self.known:
            return None
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Writing:
    """Writes the texts of a request, one after the other, at a place.

    Args:
        source: what answers.
        asked: the request.
        place: of the source's places.

    Attributes:
        usage: so far.

    """

    def __init__(self, source: Source, asked: Asked, place: Place) -> None:
        self._source, self._asked, self._place = source, asked, place
        self._turns = AsyncTurns()
        self.usage = Usage()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all texts. Where the task is cancelled, what is computed ends.

        Raises:
            SllmError, ValueError, TypeError: as :func:`sllm.generate` and :meth:`sllm.Model.chat`.

        """
        source, asked = self._source, self._asked
        try:
            prompts = await self._call(lambda: source.prompts(asked))
            for i, prompt in enumerate(prompts):
                for number in range(asked.n):
                    text = self._text(prompt, number, i * asked.n + number)
                    async with aclosing(text) as pieces:
                        async for piece in pieces:
                            yield piece
        finally:
            self._turns.close()

    async def _call(self, work: Callable[[], _T]) -> _T:
        return await self._turns.call(work, lambda: self._source.cancel(self._place))

    async def _text(self, prompt: Prompt, number: int, index: int) -> AsyncGenerator[Piece, None]:
        source, asked = self._source, self._asked
        if prompt.tokens is None:
            self.usage.known = False
        elif number == 0:
            self.usage.prompt += len(prompt.tokens)
        # 1. The prompt, where it is to be repeated.
        if isinstance(asked, CompletionAsked) and asked.echo:
            echo = Piece(index, prompt.text)
            if (n_top := asked.logprobs) is not None:
                echo.logprobs = await self._call(lambda: source.prompt_logprobs(prompt, n_top))
            yield echo
            if asked.max_tokens == 0:
                yield Piece(index, finish_reason="length")
                return
        # 2. Open the text: the prompt is computed.
        opened: list[RunStream] = []
        try:
            await self._call(lambda: opened.append(source.open(asked, prompt, number, self._place)))
        except BaseException:
            for stream in opened:  # it was open when the task was cancelled
                stream.close()
            raise
        # 3. Its runs.
        async with opened[0] as stream:
            async for piece in self._written(stream, prompt, number, index):
                yield piece

    async def _written(
        self, stream: RunStream, prompt: Prompt, number: int, index: int
    ) -> AsyncIterator[Piece]:
        source, asked = self._source, self._asked
        calls = self._reader()
        tokens: list[int] = []
        ended = False  # here, before the model has ended it
        async for run in stream:
            tokens += run.tokens
            piece = self._piece(run, index, calls)
            if (n_top := asked.logprobs) is not None and run.tokens:
                found = await self._call(partial(source.logprobs, prompt, tokens, len(run.tokens), n_top))
                if run.kind == "text" or isinstance(asked, CompletionAsked):
                    piece.logprobs = found
            if piece.calls and isinstance(asked, ChatAsked) and not asked.several_calls:
                del piece.calls[1:]
                ended = True
            if piece:
                yield piece
            if ended:
                break
        last = Piece(index)
        if calls is not None and not ended:
            last.text, last.calls = calls.finish()
        reason = None
        if isinstance(stream, TextStream):
            stats = stream.stats
            self.usage.completion += stats.n_tokens
            if number == 0:  # the others are written after the same prompt
                self.usage.cached += stats.n_reused
            reason = stats.finish_reason
        elif asked.max_tokens is not None and len(tokens) >= asked.max_tokens:
            reason = "length"  # a hybrid does not say
        last.finish_reason = _ENDS[reason]
        if calls is not None and calls.n_calls:
            last.finish_reason = "tool_calls"
        last.account = source.account(stream)
        yield last

    def _reader(self) -> ToolCalls | DemandedCall | None:
        """What takes calls out of a text; None: there are none in it."""
        asked = self._asked
        if not isinstance(asked, ChatAsked) or not asked.tools:
            return None
        if asked.demands_call:
            return DemandedCall()
        names = [tool["function"]["name"] for tool in asked.tools]
        return ToolCalls(names) if self._source.reads_calls(asked) else None

    def _piece(self, run: Run, index: int, calls: ToolCalls | DemandedCall | None) -> Piece:
        """What of a run is sent."""
        if isinstance(self._asked, CompletionAsked):
            return Piece(index, run.text)
        # A text that is held to a schema is the answer from its first token on, also where the prompt ends
        # with the mark that reasoning begins with.
        if run.kind == "reasoning" and self._asked.schema_from is None:
            self.usage.reasoning += len(run.tokens)
            return Piece(index, reasoning=run.text)
        if run.kind == "control":
            return Piece(index)
        if calls is None:
            return Piece(index, run.text)
        text, found = calls.feed(run.text)
        return Piece(index, text, calls=found)

"""OpenAI's reply objects: a whole answer, and the chunks of one that is streamed."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

from sllm.openai_server.asked import Asked, ChatAsked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.openai_server.logprobs import TokenLogprob
    from sllm.openai_server.writing import Piece, Usage

__all__ = ["ChatReply", "CompletionReply", "Reply", "reply_for"]


class Reply(Protocol):
    """Makes the objects of one reply."""

    def whole(self, texts: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The reply to a request that does not stream."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece of a stream."""

    def last(self, usage: Usage) -> list[dict[str, Any]]:
        """What comes after all texts, before the stream's end."""


def reply_for(asked: Asked, model: str) -> Reply:
    """The maker of the objects that a request is replied to with."""
    return ChatReply(asked, model) if isinstance(asked, ChatAsked) else CompletionReply(asked, model)


class _Reply:
    """What replies of both kinds share.

    Args:
        asked: the request.
        model: the name to show.

    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices, **more}
        if self._asked.include_usage:
            chunk.setdefault("usage", None)
        return chunk

    def _whole(self, texts: Sequence[Piece], choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        found = {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.as_object()}
        accounts = [text.account for text in texts if text.account is not None]
        return {**found, "sllm": accounts[0]} if accounts else found

    def last(self, usage: Usage) -> list[dict[str, Any]]:
        """See :meth:`Reply.last`."""
        return [self._chunk([], usage=usage.as_object())] if self._asked.include_usage else []


class ChatReply(_Reply):
    """Objects of ``/v1/chat/completions``; see :class:`Reply`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: Asked, model: str) -> None:
        super().__init__(asked, model)
        self._begun: set[int] = set()

    def whole(self, texts: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """See :meth:`Reply.whole`."""
        choices = []
        for text in texts:
            message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
            if text.reasoning:
                message["reasoning_content"] = text.reasoning
            if text.calls:
                message["content"] = text.text or None
                message["tool_calls"] = [
                    {key: value for key, value in call.items() if key != "index"} for call in text.calls
                ]
            choices.append(
                {
                    "index": text.index,
                    "message": message,
                    "logprobs": self._logprobs(text),
                    "finish_reason": text.finish_reason,
                }
            )
        return self._whole(texts, choices, usage)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See :meth:`Reply.chunks`."""
        found = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            found.append(self._delta(piece.index, {"role": "assistant", "content": ""}))
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = piece.calls
        if delta or piece.logprobs:
            found.append(self._delta(piece.index, delta, logprobs=self._logprobs(piece)))
        if piece.finish_reason is not None:
            more: dict[str, Any] = {} if piece.account is None else {"sllm": piece.account}
            found.append(self._delta(piece.index, {}, finish_reason=piece.finish_reason, **more))
        return found

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk([choice], **more)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        return {"content": [one.as_chat() for one in piece.logprobs], "refusal": None}


class CompletionReply(_Reply):
    """Objects of ``/v1/completions``; see :class:`Reply`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, model: str) -> None:
        super().__init__(asked, model)
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """See :meth:`Reply.whole`."""
        return self._whole(texts, [self._choice(text) for text in texts], usage)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See :meth:`Reply.chunks`."""
        return [self._chunk([self._choice(piece)])]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        offset = self._offsets.get(piece.index, 0)
        offsets = []
        for one in piece.logprobs:
            offsets.append(offset)
            offset += len(one.text)
        self._offsets[piece.index] = offset
        return {
            "tokens": [one.text for one in piece.logprobs],
            "token_logprobs": [one.logprob for one in piece.logprobs],
            "top_logprobs": [_named(one) for one in piece.logprobs],
            "text_offset": offsets,
        }


def _named(one: TokenLogprob) -> dict[str, float | None] | None:
    """The likeliest tokens of a position, and the one that is there, by their texts."""
    if one.logprob is None:
        return None
    return {other.text: other.logprob for other in reversed((*one.top, one))}

"""How the chats of one template become tokens of one vocabulary, and with which tokens an answer ends.

A vocabulary has control tokens, which are parsed only where that is asked for, and user-defined tokens, which
llama.cpp parses everywhere: runs of spaces, but in some files also ``<|User|>`` and ``<think>``. The latter
are *markers* if the template's own text has them, and then no message yields them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import chat_template
from sllm.engine.chat_guard import checked_pieces, pieces_in
from sllm.engine.vocab import CONTROL, EOG, USER_DEFINED
from sllm.errors import SllmError, UnsupportedModelError
from sllm.messages import REASONING_FIELDS

if TYPE_CHECKING:
    import numpy.typing as npt

    from sllm.engine.vocab import Vocab

__all__ = ["MAX_ENDS", "ChatTokens"]

MAX_ENDS = 8
"""Tokens that may end turns, of all templates of a model."""

# What the probing conversations say: words that stand in no template and are left alone by all.
_ASKED, _THOUGHT, _ANSWERED, _CALLED, _AGAIN = "qzaskzq", "qzthinkzq", "qzanswerzq", "qzcallzq", "qzagainzq"

# Before a text that goes on: such a byte merges with nothing.
_GOES_ON = "\x02"


class ChatTokens:
    """The tokens of one template's chats; any number of threads may use it.

    Attributes:
        pieces: the texts of the tokens that no message yields: control tokens, and the template's markers.
        ends: ids of the tokens that end an assistant's turn in the template, at most 8; what ends an answer
            in text comes first.

    """

    def __init__(self, vocab: Vocab, template: str) -> None:
        self._vocab = vocab
        self._template = template
        self._bos, self._eos = (
            "" if token is None else vocab.decode([token], special=True, goes_on=True)
            for token in (vocab.bos, vocab.eos)
        )
        self._control = frozenset(vocab.tokens_with(CONTROL).tolist())
        special = checked_pieces(vocab.special_pieces)
        # A word is no marker, nor is one character: there may be no other token for it.
        texts = (vocab.decode([token], goes_on=True) for token in vocab.tokens_with(USER_DEFINED).tolist())
        defined = checked_pieces([text for text in texts if len(text) > 1 and not text.strip().isalnum()])
        own = [*chat_template.literals_of(template), self._bos, self._eos, *self._probes.values()]
        markers = {text[i:j] for text in own for i, j in pieces_in(text, defined)}
        # SentencePiece writes a space as this letter, in control tokens as well.
        self.pieces = special | markers | {piece.replace("▁", " ") for piece in special}
        ids = {self._single(piece) for piece in markers} - {-1}
        self._barred = np.array(sorted(self._control | ids), dtype=np.int32)
        self.ends = self._find_ends(self.pieces | defined)

    # ---- tokens

    def encode(self, segments: Sequence[tuple[str, bool]]) -> npt.NDArray[np.int32]:
        """The tokens of what :func:`sllm.engine.chat_template.segments` returned, int32 (n,).

        Raises:
            UnsupportedModelError: a message has a character that the vocabulary can write only as a control
                token.

        """
        parts = [
            self._parsed(text, first=i == 0) if special else self._plain(text, first=i == 0)
            for i, (text, special) in enumerate(segments)
        ]
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)

    def _parsed(self, text: str, *, first: bool) -> npt.NDArray[np.int32]:
        """A text whose control tokens and markers are the template's."""
        tokens = self._tokens(text, first=first, parse_special=True)
        own = _apart(text, self.pieces)
        if self._n_barred(tokens) <= len(own):
            return tokens
        # The tokeniser has made one of what is between: of merges, or of a text that it normalises.
        parts, done = [], 0
        for begin, end in [*own, (len(text), len(text))]:
            if begin > done:
                parts.append(self._plain(text[done:begin], first=first and done == 0))
            if end > begin:
                parts.append(self._tokens(text[begin:end], first=first and begin == 0, parse_special=True))
            done = end
        return np.concatenate(parts)

    def _plain(self, text: str, *, first: bool) -> npt.NDArray[np.int32]:
        """A text in which nothing is a control token or a marker: it is cut within what would be one."""
        tokens = self._tokens(text, first=first, parse_special=False)
        if not self._n_barred(tokens):
            return tokens
        if len(text) == 1:
            return self._as_bytes(text)
        cuts = sorted({begin + 1 for begin, _ in pieces_in(text, self.pieces) if begin + 1 < len(text)})
        bounds = [0, *(cuts or [len(text) // 2]), len(text)]
        parts = [text[i:j] for i, j in itertools.pairwise(bounds)]
        return np.concatenate([self._plain(part, first=first and i == 0) for i, part in enumerate(parts)])

    def _as_bytes(self, char: str) -> npt.NDArray[np.int32]:
        tokens = [self._byte_tokens.get(byte) for byte in char.encode("utf-8", "replace")]
        if None in tokens:
            raise UnsupportedModelError(
                f"the vocabulary has no token for {char!r} but one that controls the chat;"
                " take it out of the messages"
            )
        return np.array(tokens, dtype=np.int32)

    def _tokens(self, text: str, *, first: bool, parse_special: bool) -> npt.NDArray[np.int32]:
        """The tokens of a text; unless it is the first, without the space that some put before one."""
        encode = functools.partial(self._vocab.encode, add_special=False, parse_special=parse_special)
        if first or not self._vocab.space_prefix:
            return encode(text)
        before, tokens = encode(_GOES_ON), encode(_GOES_ON + text)
        stands = tokens[: len(before)].tolist() == before.tolist()
        return tokens[len(before) :] if stands else encode(text)

    def _n_barred(self, tokens: npt.NDArray[np.int32]) -> int:
        return int(np.isin(tokens, self._barred).sum())

    @functools.cached_property
    def _byte_tokens(self) -> dict[int, int]:
        barred = set(self._barred.tolist())
        found = {}
        for token in range(self._vocab.n_tokens):
            piece = self._vocab.piece(token)
            if len(piece) == 1 and token not in barred:
                found[piece[0]] = token
        return found

    def _single(self, piece: str) -> int:
        """The token that a piece is parsed as, or -1."""
        tokens = self._vocab.encode(piece, add_special=False, parse_special=True)
        return int(tokens[0]) if len(tokens) == 1 else -1

    # ---- what the template writes around messages

    @functools.cached_property
    def _probes(self) -> dict[str, str]:
        """Conversations as the template renders them, by name."""
        asked, again = {"role": "user", "content": _ASKED}, {"role": "user", "content": _AGAIN}
        reasoned = dict.fromkeys(REASONING_FIELDS, _THOUGHT)
        function = {"name": "look_up", "arguments": {"what": _CALLED}}
        call: dict[str, Any] = {
            "role": "assistant",
            "tool_calls": [{"id": "probe0001", "type": "function", "function": function}],
        }
        result = {"role": "tool", "name": "look_up", "tool_call_id": "probe0001", "content": "found"}
        answer = {"role": "assistant", "content": _ANSWERED}
        conversations = {
            "system": [{"role": "system", "content": "x"}, asked],
            "turn": [asked, answer, again],
            "reasoned": [asked, {**answer, **reasoned}],
            "reasoned call": [asked, {**call, **reasoned}],
            "answer and call": [asked, {**call, "content": _ANSWERED}],
            "all": [asked, {**call, **reasoned, "content": _ANSWERED}, result],
            "call": [asked, call],
            "result": [asked, call, result],
        }
        found = dict.fromkeys(conversations, "")
        for name, messages in conversations.items():
            if name == "reasoned" and not any(found.values()):
                break  # it will not take the others, either, and each may take the time that a template has
            tools = any("tool_calls" in message for message in messages)
            prompt = name == "system"
            # Some templates are for tools alone.
            found[name] = self._rendered(messages, prompt, tools) or self._rendered(
                messages, prompt, not tools
            )
        return found

    def _rendered(self, messages: list[dict[str, Any]], prompt: bool, with_tools: bool) -> str:
        """A probing conversation; nothing where the template does not take it."""
        schema = {"type": "object", "properties": {"what": {"type": "string"}}}
        tool = {"name": "look_up", "description": "", "parameters": schema}
        try:
            return chat_template.render(
                self._template,
                messages,
                bos_token=self._bos,
                eos_token=self._eos,
                add_generation_prompt=prompt,
                tools=[{"type": "function", "function": tool}] if with_tools else None,
            )
        except (SllmError, ValueError):
            return ""

    def _find_ends(self, pieces: frozenset[str]) -> tuple[int, ...]:
        """What ends a turn: the token behind an answer that a user's message follows, and the one behind a
        tool call that its result follows.
        """
        eog = set(self._vocab.tokens_with(EOG).tolist())
        within = set()
        for text in self._probes.values():
            places = [text.find(word) for word in (_THOUGHT, _ANSWERED, _CALLED) if word in text]
            if len(places) > 1:
                turn = text[min(places) : max(places)]
                within |= {
                    turn[i:j] for i, j in pieces_in(turn, pieces) if self._single(turn[i:j]) not in eog
                }
        ends: dict[int, None] = {}
        after = self._probes["turn"].partition(_ANSWERED)[2].partition(_AGAIN)[0]
        first = self._first_of(_leading(after, pieces), within)
        ends |= dict.fromkeys(first)
        call, result = self._probes["call"].rstrip(), self._probes["result"]
        if _CALLED in call and result.startswith(call):
            closing = {self._single(call[i:j]) for i, j in pieces_in(call, pieces) if j == len(call)} - {-1}
            if not ends.keys() & closing and not eog & closing:
                found = self._first_of(_leading(result[len(call) :], pieces), within)
                ends |= dict.fromkeys(token for token in found if token in self._control)
        return tuple(ends)[:MAX_ENDS]

    def _first_of(self, pieces: Iterable[str], within: set[str]) -> list[int]:
        """The first of the pieces that is a control token, else the first; none of those within a turn."""
        tokens = [token for piece in pieces if piece not in within and (token := self._single(piece)) >= 0]
        return ([token for token in tokens if token in self._control] or tokens)[:1]


def _apart(text: str, pieces: frozenset[str]) -> list[tuple[int, int]]:
    """Where pieces stand in a text, the longest at each place, without those that begin within another."""
    found: list[tuple[int, int]] = []
    for begin, end in pieces_in(text, pieces):
        if not found or begin >= found[-1][1]:
            found.append((begin, end))
    return found


def _leading(text: str, pieces: frozenset[str]) -> list[str]:
    """The pieces that a text begins with, with white space between them."""
    found = []
    done = 0
    for begin, end in _apart(text, pieces):
        if text[done:begin].strip():
            break
        found.append(text[begin:end])
        done = end
    return found

"""The vocabulary of a model."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine._ffi import Handle, check, checked_int, ffi, lib
from sllm.engine.arrays import int32_array
from sllm.errors import VocabMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt


__all__ = ["Vocab"]

CONTROL, EOG, BYTE, USER_DEFINED, UNUSED, UNKNOWN = 1, 2, 4, 8, 16, 32
"""Kinds of tokens, as bits; see :meth:`Vocab.tokens_with`."""

_log = logging.getLogger("sllm")
_warned_missing: set[str] = set()


class Vocab:
    """The vocabulary of a model. Any number of threads may use it.

    Attributes:
        name: its name in error messages: the file, or the worker.
        n_tokens: number of tokens; ids are 0 <= id < n_tokens.
        bos, eos, pad: ids of special tokens, or None where the file has none (llama.cpp then takes token
            11 of a BPE vocabulary, a comma or the like, for BOS and EOS).
        eot: the token that ends an assistant's turn, according to the chat template, or else to the file.
        add_bos, add_eos: whether ``encode(add_special=True)`` adds them.
        turn_ends: ``turn_ends()`` are the tokens that end an assistant's turn in the model's chat templates,
            found by rendering conversations when it is first called.
        space_prefix: whether ``encode`` puts a space before a text, in the way of SentencePiece.

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET, vocab_only=True) as model:
        ...     model.vocab.decode(model.vocab.encode("你好, world"))
        '你好, world'

    """

    def __init__(self, model: Handle, info: Any, name: str, turn_ends: Callable[[], tuple[int, ...]]) -> None:
        """Read it from a loaded model."""

        def special(token: int) -> int | None:
            return token if token >= 0 else None

        self._model = model
        self.name = name
        self.n_tokens: int = info.n_vocab
        self.bos = special(info.bos)
        self.eos = special(info.eos)
        self._eot = special(info.eot)
        self.turn_ends = turn_ends
        self.pad = special(info.pad)
        missing = [
            f"{what} (tokenizer.ggml.{key}_token_id)"
            for what, key, lacks in (
                ("no token that ends a text", "eos", info.made_up >= 0),
                ("no token to begin a text with, which it asks for", "bos", info.add_bos and info.bos < 0),
            )
            if lacks
        ]
        if missing and name not in _warned_missing:
            _warned_missing.add(name)
            _log.warning("%s names %s; none is taken in its place", name, ", and ".join(missing))
        self.add_bos = bool(info.add_bos) and self.bos is not None
        self.add_eos = bool(info.add_eos) and self.eos is not None
        self.space_prefix = bool(info.space_prefix)
        self._pieces: dict[int, bytes] = {}
        self._ends: frozenset[int] | None = None  # what ends a generation
        self._fingerprint: str | None = None

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> npt.NDArray[np.int32]:
        """Tokenise (``llama_tokenize``); returns int32 (n,).

        ``add_special`` adds BOS or EOS if the model uses them; ``parse_special`` parses the text of control
        tokens as these tokens (do not use it for untrusted text, which could then end a turn). User-defined
        tokens are parsed in any text; :meth:`sllm.Model.chat` makes sure that no message can write a role
        with them.

        Raises:
            TypeError: ``text`` is not a str.
            UnsupportedModelError: the file has no vocabulary.

        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        data = text.encode("utf-8", "surrogatepass" if text.isascii() else "replace")
        capacity = len(data) + 8  # a token takes at least a byte, besides the special ones
        pointer = self._model._live
        count = ffi.new("int32_t *")
        while True:
            tokens = np.empty(capacity, dtype=np.int32)
            check(
                lib.sllm_tokenize(
                    pointer,
                    data,
                    len(data),
                    add_special,
                    parse_special,
                    ffi.from_buffer("int32_t[]", tokens),
                    capacity,
                    count,
                )
            )
            if count[0] <= capacity:
                return tokens[: count[0]].copy()
            capacity = count[0]

    def decode(self, tokens: npt.ArrayLike, *, special: bool = False, goes_on: bool = False) -> str:
        """The text of tokens: their pieces, joined, with bytes that are not valid UTF-8 replaced by U+FFFD.

        Control tokens have text only with ``special``. Nothing is cleaned up (``llama_detokenize`` takes
        spaces out before ``!`` and ``'s``), so that ``decode(encode(text))`` is the text, except for what a
        tokeniser itself drops. SentencePiece vocabularies put a space before a text, which is left out here,
        unless the tokens continue a text (``goes_on``), where the space belongs to it.

        Raises:
            ValueError: an id outside the vocabulary.

        """
        array = int32_array(tokens, "tokens")
        capacity = 16 * len(array) + 64
        count = ffi.new("int32_t *")
        while True:
            buffer = ffi.new("char[]", capacity)
            check(
                lib.sllm_detokenize(
                    self._model._live,
                    ffi.from_buffer("int32_t[]", array),
                    len(array),
                    special,
                    goes_on,
                    buffer,
                    capacity,
                    count,
                )
            )
            if count[0] <= capacity:
                text: bytes = ffi.buffer(buffer, count[0])[:]
                return text.decode("utf-8", "replace")
            capacity = count[0]

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for in running text; none for control tokens
        (``llama_token_to_piece``).

        Raises:
            ValueError: no such token.

        """
        found = self._pieces.get(token)
        if found is None:
            checked_int(token, "token")
            found = self._pieces[token] = self._piece(token, special=False)
        return found

    def _piece(self, token: int, *, special: bool) -> bytes:
        count = ffi.new("int32_t *")
        capacity = 64
        while True:
            buffer = ffi.new("char[]", capacity)
            check(lib.sllm_token_piece(self._model._live, token, special, buffer, capacity, count))
            if count[0] <= capacity:
                piece: bytes = ffi.buffer(buffer, count[0])[:]
                return piece
            capacity = count[0]

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation: EOS, the ends of a turn that llama.cpp knows, and those that
        end an assistant's turn in the model's chat template.

        Raises:
            ValueError: no such token.

        """
        # Asked for every token: not of C, since each such call lets other threads take Python's lock.
        ends, token = self._ends, checked_int(token, "token")
        self._model._live  # noqa: B018 - or the error of a closed model
        if ends is None:
            self._attr(token)
            ends = self._ends = frozenset([*self.tokens_with(EOG).tolist(), *self.turn_ends()])
        if not 0 <= token < self.n_tokens:
            raise self._no_such(token)
        return token in ends

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, which has no text of its own.

        Raises:
            ValueError: no such token.

        """
        return bool(self._attr(token) & CONTROL)

    def _attr(self, token: int) -> int:
        bits: int = lib.sllm_token_attr(self._model._live, checked_int(token, "token"))
        if bits < 0:
            raise self._no_such(token)
        return bits

    def _no_such(self, token: int) -> ValueError:
        return ValueError(f"token {token} is not in the vocabulary of {self.n_tokens} tokens")

    @property
    def eot(self) -> int | None:
        """See the class."""
        ends = self.turn_ends()
        return ends[0] if ends else self._eot

    def tokens_with(self, kinds: int) -> npt.NDArray[np.int32]:
        """The tokens of any of these kinds (``CONTROL | EOG``) according to the file, int32 (n,)."""
        pointer = self._model._live
        tokens = np.empty(lib.sllm_tokens_with(pointer, kinds, ffi.NULL, 0), dtype=np.int32)
        lib.sllm_tokens_with(pointer, kinds, ffi.from_buffer("int32_t[]", tokens), len(tokens))
        return tokens

    @property
    def special_pieces(self) -> list[str]:
        """The texts of all tokens that are parsed only with ``parse_special``, as chat templates write
        them.
        """
        tokens = self.tokens_with(CONTROL | EOG | UNUSED | UNKNOWN)
        found = (self._piece(token, special=True) for token in tokens.tolist())
        return [piece.decode("utf-8", "replace") for piece in found if piece]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every token's text and kind, in order: equal for models that share a
        vocabulary.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for token in range(self.n_tokens):
                piece, attr = self._entry(token)
                digest.update(len(piece).to_bytes(4, "little") + attr.to_bytes(1, "little") + piece)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _entry(self, token: int) -> tuple[bytes, int]:
        """What makes a token the same token in two vocabularies."""
        return self._piece(token, special=True), self._attr(token) & (CONTROL | EOG)

    def check_same(self, other: Vocab) -> None:
        """Compare token by token; a shared prefix is enough, since some files pad their vocabulary.

        Raises:
            VocabMismatchError: names the first token that differs.

        """
        if self is other:
            return
        if self.n_tokens == other.n_tokens and self.fingerprint == other.fingerprint:
            return
        for token in range(min(self.n_tokens, other.n_tokens)):
            mine, theirs = self._entry(token), other._entry(token)
            if mine != theirs:
                raise VocabMismatchError(
                    f"token {token} is {mine[0]!r} in {self.name}"
                    f" and {theirs[0]!r} in {other.name}"
                    + (" (of different kinds)" if mine[0] == theirs[0] else "")
                    + "; target and draft must share a vocabulary"
                )

    def __repr__(self) -> str:
        return f"<sllm.Vocab of {self.n_tokens} tokens>"

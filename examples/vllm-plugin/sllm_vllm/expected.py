"""What a client expects of a text, followed along the text as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Expectation"]


class Expectation:
    """A draft, and where in it the text is.

    While the text is the draft's, it goes on with what comes next. Once it differs, the draft says nothing
    until the text's last tokens are found in it again: a changed word, a left-out sentence and an inserted
    one cost a few tokens and not the rest (as with OpenAI's predicted outputs, or prompt lookup in the draft
    alone).
    """

    N_FOUND = 3
    """So many last tokens of the text have to be found in the draft."""

    def __init__(self, tokens: Sequence[int], pos: int) -> None:
        """``tokens`` are expected from position ``pos`` of the text on."""
        self._tokens = list(tokens)
        self._next: int | None = 0  # where in the draft the text is; None: it has left it
        self._length = pos
        self._tail: list[int] = []
        self._where: dict[tuple[int, ...], list[int]] | None = None  # made when it first does
        self._left_at = 0

    @property
    def length(self) -> int:
        """Up to which position of the text it has been followed."""
        return self._length

    def follow(self, tokens: Sequence[int]) -> None:
        """The text has these tokens at ``length`` and behind."""
        for token in tokens:
            self._length += 1
            self._tail = [*self._tail, token][-self.N_FOUND :]
            if (
                self._next is not None
                and self._next < len(self._tokens)
                and self._tokens[self._next] == token
            ):
                self._next += 1
                continue
            if self._next is not None:
                self._left_at, self._next = self._next, None
            self._next = self._found()

    def ahead(self, n: int) -> list[int]:
        """The next tokens, as far as the draft says; at most ``n``."""
        return [] if self._next is None else self._tokens[self._next : self._next + n]

    def _found(self) -> int | None:
        """Behind the text's last tokens in the draft, at the place nearest to where the text left it."""
        if len(self._tail) < self.N_FOUND:
            return None
        if self._where is None:
            self._where = {}
            for end in range(self.N_FOUND, len(self._tokens)):
                self._where.setdefault(tuple(self._tokens[end - self.N_FOUND : end]), []).append(end)
        ends = self._where.get(tuple(self._tail))
        return min(ends, key=lambda end: abs(end - self._left_at)) if ends else None

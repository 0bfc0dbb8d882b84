"""Putting values back into a stream of text, wherever the other side wrote one of our placeholders.

What counts as a placeholder: kind, index and nonce exactly as issued, and around and between them what models
and Markdown do to them: any case, full-width characters, spaces inside, ``_`` escaped, replaced by ``-`` or
    lost,
zeros before the index, brackets missing, full-width or escaped. The index is compared as a number and the
nonce letter by letter; nothing is guessed.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from sllm.privacy.text import fold_char

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.privacy.vault import Vault

__all__ = ["Restorer"]

_OPEN = frozenset("[［【〔")
_CLOSE = frozenset("]］】〕")
_SPACE = frozenset(" \t\u00a0\u3000\u200b\u200c\u200d\u2060\ufeff\u202f")
_JOINER = frozenset("_-*‐‑–＿－")
_ESCAPE = "\\"
# Bounds of what is skipped, so that what is held back is bounded too.
_MAX_SPACES = 2
_MAX_ZEROS = 6
_DIGITS = frozenset("0123456789")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_WORD = _LETTERS | _DIGITS | {"_"}

# The shape of a placeholder that is not ours, back from its closing bracket; or of one with our nonce.
_STRANGE = re.compile(
    r"[\[［【〔] ?[^\W\d_]{1,16}[_ -]{1,2}[0-9]{1,9}[_ -]{1,2}[a-z][a-z0-9]{3,11} ?\Z", re.I
)
_STRANGE_OWN = re.compile(r"(?<![^\W_])([^\W\d_]{1,16})[\\_ *-]{0,4}([0-9]{1,9})[\\_ *-]{0,4}\Z")
_BRACKET = re.compile(r"[\[\]]")
_CLOSING = re.compile(r"[\]］】〕]")
_TAIL = 80


@functools.lru_cache(maxsize=256)
def _starts(firsts: str) -> re.Pattern[str]:
    wide = "".join(chr(ord(char) + offset) for char in firsts for offset in (0, -32, 0xFEE0, 0xFEC0))
    return re.compile(rf"[\\\[［【〔]|(?<![A-Za-z0-9_])[{wide}]")


@functools.lru_cache(maxsize=256)
def _ends(nonces: tuple[str, ...]) -> re.Pattern[str]:
    """Characters at which something that looks like a placeholder can end."""
    return re.compile(rf"[\]］】〕{''.join({nonce[-1] + nonce[-1].upper() for nonce in nonces})}]")


class _UndecidedError(Exception):
    """What was received so far does not decide it."""


class Restorer:
    """Restores the placeholders of a vault in text that comes in pieces.

    ``feed`` hands back all that is certain; held back is only what could still become a placeholder that was
    issued. Together the pieces are the same however the text was cut. Restored values are never looked at
    again, so a value that contains the text of a placeholder stays what it is.

    Args:
        vault: whose placeholders; those that it issues later are restored too.

    Attributes:
        n_restored: placeholders replaced so far.
        n_unknown: what looks like a placeholder and was never issued; it stays as it is.

    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._held = ""
        self._before = ""  # the last character in front of what is held
        self._depth = 0  # brackets open on this line
        self._tail = ""  # the last of the raw text, for counting
        self._final = False
        self.n_restored = 0
        self.n_unknown = 0

    def __repr__(self) -> str:
        return (
            f"<Restorer: {self.n_restored} restored, {self.n_unknown} unknown, {len(self._held)} "
            f"characters held>"
        )

    def feed(self, chunk: str) -> str:
        """Takes the next piece, and hands back the restored text that is certain by now.

        Raises:
            ValueError: after :meth:`finish`.
            TypeError: no text.

        """
        if not isinstance(chunk, str):
            raise TypeError(f"expected a text, got {type(chunk).__name__}")
        if self._final:
            raise ValueError("the text was finished; a new text needs a new Restorer")
        self._count(chunk)
        return self._scan(self._held + chunk)

    def finish(self) -> str:
        """The text is over: hands back what is left."""
        if self._final:
            return ""
        self._final = True
        return self._scan(self._held)

    def _scan(self, text: str) -> str:
        if not self._vault.first_letters:
            self._held = ""
            self._pass(text)
            return text
        # A placeholder can begin at a bracket, its escape, or the first letter of a kind.
        starts = _starts(self._vault.first_letters)
        out: list[str] = []
        at = 0  # up to here everything was handed on
        search = 0
        while True:
            found = starts.search(text, search)
            if found is None:
                break
            i = found.start()
            before = text[i - 1] if i else self._before
            self._pass(text[at:i])
            out.append(text[at:i])
            at = i
            try:
                match = self._match(text, i, before)
            except _UndecidedError:
                self._held = text[i:]
                return "".join(out)
            if match is None:
                search = i + 1
                continue
            end, value = match
            out.append(value)
            self.n_restored += 1
            at = search = end
            self._before = text[end - 1]
        self._held = ""
        self._pass(text[at:])
        out.append(text[at:])
        return "".join(out)

    def _pass(self, text: str) -> None:
        """Notes what was handed on unchanged."""
        if not text:
            return
        self._before = text[-1]
        line = text.rfind("\n")
        if line >= 0:
            self._depth = 0
            text = text[line + 1 :]
        for bracket in _BRACKET.finditer(text):
            self._depth = self._depth + 1 if bracket[0] == "[" else max(0, self._depth - 1)

    def _match(self, text: str, i: int, before: str) -> tuple[int, str] | None:
        """The placeholder that begins at ``i``: where it ends, and its value."""
        vault = self._vault

        def at(j: int) -> str:
            if j < len(text):
                return text[j]
            if self._final:
                return ""
            raise _UndecidedError

        def folded(j: int) -> str:
            char = at(j)
            return fold_char(char) if char else ""

        def skip(j: int) -> int:
            for _ in range(_MAX_SPACES):
                if at(j) not in _SPACE:
                    break
                j += 1
            return j

        def joint(j: int) -> int:
            j = skip(j)
            for _ in range(2):
                if at(j) == _ESCAPE:
                    j += 1
            if at(j) in _JOINER:
                j += 1
            return skip(j)

        j = i
        escaped = at(j) == _ESCAPE
        if escaped:
            j += 1
        opened = at(j) in _OPEN
        if opened:
            j = skip(j + 1)
        elif escaped or (before and fold_char(before) in _WORD):
            return None
        kind = ""
        while (char := folded(j)) in _LETTERS:
            kind += char
            if kind not in vault.kind_prefixes:
                return None
            j += 1
        indices = vault.index_prefixes.get(kind)
        if indices is None:
            return None
        j = joint(j)
        for _ in range(_MAX_ZEROS):
            if folded(j) != "0":
                break
            j += 1
        number = ""
        while (char := folded(j)) in _DIGITS:
            number += char
            if number not in indices:
                return None
            j += 1
        if not number:
            return None
        j = joint(j)
        nonces = vault.nonces_of(kind, int(number))
        nonce = ""
        while nonce not in nonces:
            nonce += folded(j) or "\n"
            if not any(other.startswith(nonce) for other in nonces):
                return None
            j += 1
        if folded(j)[:1] in _WORD:
            return None
        value = vault.value(kind, int(number), nonce)
        if value is None:
            return None
        return self._close(at, skip, j, opened=opened, escaped=escaped, value=value)

    def _close(
        self,
        at: Callable[[int], str],
        skip: Callable[[int], int],
        j: int,
        *,
        opened: bool,
        escaped: bool,
        value: str,
    ) -> tuple[int, str] | None:
        """The end of a placeholder whose nonce ends at ``j``."""
        k = skip(j) if opened else j
        escape = at(k) == _ESCAPE
        closed = at(k + escape) in _CLOSE
        if escaped and not (closed and escape):
            # The backslash is the text's own; the bracket behind it begins the placeholder.
            return None
        if closed and not opened and at(k + escape) == "]" and not escape and self._depth > 0:
            # It closes a bracket that was open before.
            closed = False
        return (k + escape + 1 if closed else j), value

    def _count(self, chunk: str) -> None:
        """Counts what looks like a placeholder and is none, at the character that ends it."""
        vault = self._vault
        text = self._tail + chunk
        start = len(self._tail)
        nonces = vault.nonces
        if not _ends(nonces).search(chunk):
            self._tail = text[-_TAIL:]
            return
        lower = text.lower() if len(text.lower()) == len(text) else text
        for nonce in nonces:
            at = lower.find(nonce, max(0, start - len(nonce) + 1))
            while at >= 0:
                end = at + len(nonce)
                if end > start:
                    shape = _STRANGE_OWN.search(text[max(0, at - 48) : at])
                    if shape and vault.value(shape[1].lower(), int(shape[2]), nonce) is None:
                        self.n_unknown += 1
                at = lower.find(nonce, at + 1)
        for close in _CLOSING.finditer(text, start):
            shape = _STRANGE.search(text[max(0, close.start() - 60) : close.start()])
            if shape and not any(nonce in shape[0].lower() for nonce in nonces):
                self.n_unknown += 1
        self._tail = text[-_TAIL:]

"""Placeholders: what stands for the private values of one conversation, issued and looked up.

A placeholder is ``[KIND_INDEX_NONCE]``, such as ``[EMAIL_1_k7q4]``: a model can see what it stands for and
that two mentions are the same. The nonce is drawn at random and occurs nowhere in the text that is masked;
where a later text does contain one, that piece of text is itself masked under a new nonce, so a nonce in
masked text is always one of ours and restoring is exact whatever the user wrote.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from sllm.privacy.findings import LITERAL, Finding

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from sllm.privacy.text import View

__all__ = ["InMemory", "Masked", "MaskedMessages", "Placeholders"]

# Without vowels, so that no word results; without 0, 1, l and o, which are mistaken for one another.
_LETTERS = "bcdfghjkmnpqrtvwxz"
_DIGITS = "23456789"


@dataclass(frozen=True)
class Masked:
    """A text in which placeholders stand for what is private.

    Attributes:
        text: with placeholders.
        counts: kind -> how many ranges were masked.

    """

    text: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class MaskedMessages:
    """Messages of a conversation, masked.

    Attributes:
        messages: copies, in the order given.
        counts: kind -> how many ranges were masked in all of them.

    """

    messages: list[dict[str, Any]]
    counts: Mapping[str, int]


class InMemory:
    """Holds secrets, and so can be neither copied nor pickled."""

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} holds secrets in memory only: it cannot be copied or pickled"
        )

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse


class Placeholders(InMemory):
    """The placeholders of one conversation, and the values that they stand for.

    Those that issue placeholders take turns (:class:`~sllm.privacy.Vault` holds a lock); looking up is safe
    from any thread. A :class:`~sllm.privacy.Restorer` reads them while more are issued.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all of them: placeholders issued so far can no longer be restored."""
        self._entries: dict[str, tuple[str, int]] = {}  # value -> kind, index
        self._last: Counter[str] = Counter()  # kind -> highest index
        self._issued: dict[tuple[str, int, str], str] = {}  # kind (lower case), index, nonce -> value
        self._nonces: tuple[str, ...] = ()  # the newest is last
        # For restoring piece by piece: what begins an issued placeholder.
        self._kind_prefixes: set[str] = set()
        self._first_letters = ""
        self._index_prefixes: dict[str, set[str]] = {}
        self._nonces_of: dict[tuple[str, int], list[str]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many different values have a placeholder."""
        return dict(Counter(kind for kind, _ in self._entries.values() if kind != LITERAL))

    # ---- issuing ------------------------------------------------------------------------------------------

    def issue(self, value: str, kind: str) -> str:
        """The placeholder of a value, with the newest nonce; the value keeps its first kind and index."""
        nonce = self._nonces[-1]
        if value not in self._entries:
            self._last[kind] += 1
            self._entries[value] = kind, self._last[kind]
        kind, index = self._entries[value]
        lower = kind.lower()
        if (lower, index, nonce) not in self._issued:
            self._issued[lower, index, nonce] = value
            self._nonces_of.setdefault((lower, index), []).append(nonce)
            self._kind_prefixes.update(lower[:i] for i in range(1, len(lower) + 1))
            self._first_letters = "".join(sorted({lower[0], *self._first_letters}))
            number = str(index)
            self._index_prefixes.setdefault(lower, set()).update(
                number[:i] for i in range(1, len(number) + 1)
            )
        return f"[{kind}_{index}_{nonce}]"

    def add_nonce(self, texts: Sequence[str]) -> None:
        """Adds a nonce that is in none of the (folded) texts, nor contains another or is part of one."""
        length = 4
        while True:
            for _ in range(20):
                nonce = "".join(secrets.choice(_DIGITS if i % 2 else _LETTERS) for i in range(length))
                if any(nonce in other or other in nonce for other in self._nonces):
                    continue
                if not any(nonce in text for text in texts):
                    self._nonces = (*self._nonces, nonce)
                    return
            length += 1

    # ---- looking up ---------------------------------------------------------------------------------------

    @property
    def nonces(self) -> tuple[str, ...]:
        """Nonces in use, the newest last."""
        return self._nonces

    @property
    def values(self) -> Set[str]:
        """Every value that has a placeholder."""
        return self._entries.keys()

    @property
    def kind_prefixes(self) -> Set[str]:
        """Every beginning of a kind (lower case) of which a placeholder was issued."""
        return self._kind_prefixes

    @property
    def first_letters(self) -> str:
        """The first letters (lower case) of the kinds of which a placeholder was issued."""
        return self._first_letters

    @property
    def index_prefixes(self) -> Mapping[str, Set[str]]:
        """Kind (lower case) -> every beginning of an index that was issued, in decimal."""
        return self._index_prefixes

    def nonces_of(self, kind: str, index: int) -> Sequence[str]:
        """The nonces with which a kind (lower case) and index were issued."""
        return self._nonces_of.get((kind, index), ())

    def value(self, kind: str, index: int, nonce: str) -> str | None:
        """What a placeholder stands for, or None if it was not issued; ``kind`` in lower case."""
        return self._issued.get((kind, index, nonce))

    def find_nonces(self, view: View) -> list[Finding]:
        """Where a folded text holds a nonce that is in use, as findings of the kind ``LITERAL``."""
        found = []
        for nonce in self._nonces:
            at = view.text.find(nonce)
            while at >= 0:
                found.append(Finding(*view.span(at, at + len(nonce)), LITERAL, 0.0))
                at = view.text.find(nonce, at + 1)
        return found

    def blanked(self, text: str) -> str:
        """The text with each placeholder that stands exactly as issued replaced by as many NUL characters as
        its value has: what is left is searched for leaks.
        """
        if not self._nonces:
            return text
        pattern = re.compile(r"\[([A-Z]{2,16})_([0-9]{1,9})_(" + "|".join(self._nonces) + r")\]")

        def nul(match: re.Match[str]) -> str:
            value = self._issued.get((match[1].lower(), int(match[2]), match[3]))
            return match[0] if value is None else "\0" * len(value)

        return pattern.sub(nul, text)

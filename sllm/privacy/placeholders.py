"""Placeholders for the private values of one conversation: issuing and look-up.

A placeholder is ``[KIND_INDEX_NONCE]``, such as ``[EMAIL_1_k7q4]``: a model can see its kind, and that two
mentions are the same value. Indices are counted over all kinds, so index and nonce identify the value even if
a model changes the kind (``[MAIL_1_k7q4]``). The nonce is random and does not occur in the text that is
masked. If a later text contains a nonce, that piece of text is itself masked under a new nonce, so a nonce in
masked text is always one of ours and restoring is exact whatever the user wrote.

One value may be written in several ways: a number with and without spaces, plain and in JSON. These share an
index, so that a model sees that they are the same, but have a nonce each, so that each is restored as it was.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sllm.privacy.findings import KINDS, LITERAL, Finding
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from sllm.privacy.text import View

__all__ = ["Form", "InMemory", "Masked", "MaskedMessages", "Placeholders"]

# Without vowels, so that no word results; without 0, 1, l and o, which are mistaken for one another.
_LETTERS = "bcdfghjkmnpqrtvwxz"
_DIGITS = "23456789"
# Kinds that may be said of the same value.
_ALIKE = (
    {"NAME", "ORG", "USER"},
    {"EMAIL", "URL", "USER"},
    {"ADDRESS", "GEO", "PLACE"},
    {"DEVICE", "IP", "MAC"},
    {"PLATE", "VIN"},
    {"SECRET", "WALLET"},
    {"ACCOUNT", "CARD", "COMPANYID", "IBAN", "IDCARD", "LICENCE", "NATIONALID", "PASSPORT", "SSN"},
)
_DIGIT = lazy(r"\d")
# From so many digits on a value of digits and signs is the same whatever stands between them.
_MANY_DIGITS = 7


@dataclass(frozen=True)
class Masked:
    """A text with placeholders for what is private.

    Attributes:
        text: the text with placeholders.
        counts: kind -> number of masked ranges.

    """

    text: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class MaskedMessages:
    """Messages of a conversation, masked.

    Attributes:
        messages: copies, in the order given.
        counts: kind -> number of masked ranges in all of them.

    """

    messages: list[dict[str, Any]]
    counts: Mapping[str, int]


class Form(NamedTuple):
    """How a private value was written.

    Attributes:
        text: as it stands in ordinary text.
        in_json: as it stood in a JSON string, where that is not how :func:`json.dumps` writes ``text``; None:
            it is, or it stood elsewhere.
        is_scalar: whether it stood in JSON without quotes: a number.

    """

    text: str
    in_json: str | None = None
    is_scalar: bool = False


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

    Attributes:
        nonces: those in use, the newest last.
        kinds: those of which a placeholder was issued, in lower case.

    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all of them: placeholders issued so far can no longer be restored."""
        self._things: dict[str, int] = {}  # what is the same has one index
        self._kinds: list[str] = []  # of each index, which begin with 1
        self._forms: dict[Form, str] = {}  # form -> placeholder
        self._issued: dict[tuple[int, str], Form] = {}  # index, nonce -> form
        self._nonces_of: dict[int, list[str]] = {}
        self.nonces: tuple[str, ...] = ()
        self.kinds: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many different things have a placeholder; a value in several forms is one."""
        return dict(Counter(kind for kind in self._kinds if kind != LITERAL))

    # ---- issuing ------------------------------------------------------------------------------------------

    def issue(self, form: Form, kind: str, texts: Sequence[str], same_as: str | None = None) -> str:
        """The placeholder of a value; it keeps the first one that it got.

        Args:
            form: the value.
            kind: of :data:`~sllm.privacy.findings.KINDS`; a thing keeps its first one.
            texts: the (folded) texts that are being masked, for a new nonce.
            same_as: what it is, for values that are written otherwise and mean the same; None: what the value
                says by itself (:func:`_thing`).

        """
        if form not in self._forms:
            thing = _thing(form.text) if same_as is None else same_as
            if thing not in self._things:
                self._kinds.append(kind)
                self._things[thing] = len(self._kinds)
            index = self._things[thing]
            kind = self._kinds[index - 1]
            taken = self._nonces_of.setdefault(index, [])
            nonce = next((one for one in reversed(self.nonces) if one not in taken), None)
            # An older nonce may be a word of the texts, where it is masked itself; either way it is ours.
            nonce = self.add_nonce(texts) if nonce is None else nonce
            self._forms[form] = f"[{kind}_{index}_{nonce}]"
            self._issued[index, nonce] = form
            taken.append(nonce)  # after that, for whoever reads it meanwhile
            if kind.lower() not in self.kinds:
                self.kinds = (*self.kinds, kind.lower())
        return self._forms[form]

    def add_nonce(self, texts: Sequence[str]) -> str:
        """Adds a new nonce and returns it: one that is in none of the (folded) texts, nor contains another or
        is part of one.
        """
        length = 4
        while True:
            for _ in range(20):
                nonce = "".join(secrets.choice(_DIGITS if i % 2 else _LETTERS) for i in range(length))
                if any(nonce in other or other in nonce for other in self.nonces):
                    continue
                if not any(nonce in text for text in texts):
                    self.nonces = (*self.nonces, nonce)
                    return nonce
            length += 1

    # ---- looking up ---------------------------------------------------------------------------------------

    @property
    def values(self) -> Set[str]:
        """Every value that has a placeholder, as ordinary text."""
        return {form.text for form in list(self._forms)}

    def nonces_of(self, index: int) -> Sequence[str]:
        """The nonces with which an index was issued."""
        return self._nonces_of.get(index, ())

    def form(self, kind: str, index: int, nonce: str) -> Form | None:
        """What a placeholder stands for, by index and nonce; None: nothing, or nothing that is certain.

        A kind that was issued, but not for this index, contradicts it: small models mix up numbers sooner
        than words. Then it is the one thing of that kind, if there is one with this nonce. Of our own kinds
        (:data:`~sllm.privacy.findings.KINDS`) one that was not issued contradicts it as well, unless it may
        be said of the same value: a model that adds ``[PHONE_1_k7q4]`` to a contact means no name.

        Args:
            kind: in lower case; any other word says nothing.
            index: one that was issued.
            nonce: as it was read.

        """
        kinds, issued = self._kinds, self._issued  # of before or after clear()
        if index > len(kinds):
            return None
        own = kinds[index - 1]
        if kind != own.lower():
            same = [at for at, one in enumerate(kinds, 1) if one.lower() == kind]
            if same:
                forms = [issued[at, nonce] for at in same if (at, nonce) in issued]
                return forms[0] if len(forms) == 1 else None
            named = kind.upper()
            if own in KINDS and named in KINDS and not any({own, named} <= alike for alike in _ALIKE):
                return None
        return issued.get((index, nonce))

    def find_nonces(self, view: View) -> list[Finding]:
        """Where a folded text holds a nonce that is in use, as findings of the kind ``LITERAL``."""
        nonces = re.finditer("|".join(self.nonces), view.text) if self.nonces else ()
        return [Finding(*view.span(*nonce.span()), LITERAL, 0.0) for nonce in nonces]

    def blanked(self, text: str) -> str:
        """The text with each placeholder that stands exactly as issued replaced by as many NUL characters as
        its value has: what is left is searched for leaks.
        """
        if not self.nonces:
            return text
        pattern = re.compile(r"\[[A-Z]{2,16}_([0-9]{1,9})_(" + "|".join(self.nonces) + r")\]")

        def nul(match: re.Match[str]) -> str:
            form = self._issued.get((int(match[1]), match[2]))
            if form is None or self._forms[form] != match[0]:
                return match[0]
            return "\0" * len(form.text)

        return pattern.sub(nul, text)


def _thing(value: str) -> str:
    """What values have in common that are the same in another case, width or grouping of digits."""
    folded = unicodedata.normalize("NFKC", value).casefold()
    digits = "".join(_DIGIT.findall(folded))
    if len(digits) >= _MANY_DIGITS and not any(char.isalpha() for char in folded):
        return digits
    return " ".join(folded.split())

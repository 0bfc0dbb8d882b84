"""Findings, the interface of detectors, and the limit of their work on one text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator, Sequence

    from sllm.privacy.text import View

__all__ = [
    "KINDS",
    "LITERAL",
    "Budget",
    "Detector",
    "Finding",
    "LabelScorer",
    "Reach",
    "in_original",
    "reach_of",
]

KINDS = {
    "ACCOUNT": "account, member, policy, patient or employee number",
    "ADDRESS": "postal address or a part of one",
    "BIRTHDATE": "date of birth",
    "CARD": "bank card",
    "COMPANYID": "统一社会信用代码, company or VAT number",
    "DEVICE": "IMEI or serial number",
    "EMAIL": "e-mail address",
    "GEO": "coordinates",
    "IBAN": "international bank account number",
    "IDCARD": "身份证, identity card of Hong Kong, Macau and Taiwan",
    "IP": "IPv4 or IPv6 address",
    "LICENCE": "driving licence",
    "MAC": "hardware address",
    "NAME": "person",
    "NATIONALID": "national identity, tax or health number",
    "ORG": "organisation",
    "PASSPORT": "passport or travel permit",
    "PHONE": "telephone or fax number",
    "PLACE": "town, district, country or another place with a name",
    "PLATE": "vehicle registration",
    "SECRET": "password, key, token or code",
    "SSN": "social security number",
    "URL": "address with credentials in it",
    "USER": "user name or messenger handle",
    "VIN": "vehicle identification number",
    "WALLET": "address of a crypto currency",
}
"""The kinds that the detectors here name, each with what it stands for. They become part of placeholders, so
they are plain capital letters; other detectors may name further kinds of that form."""
# The kind of a piece of the user's text that looks like a part of a placeholder: it is masked so that
# restoring is exact, and is no secret.
LITERAL = "TEXT"


@dataclass(frozen=True, slots=True)
class Finding:
    """A range of a text that holds something private.

    Attributes:
        start: first offset, in the text that was given.
        end: offset after the last character.
        kind: one of :data:`KINDS`, or another word of 2 to 16 capital letters A-Z.
        score: how sure the detector is, in (0, 1].
        checked: whether a checksum or another deterministic check of the value itself agreed.

    """

    start: int
    end: int
    kind: str
    score: float = 1.0
    checked: bool = False


def in_original(found: Iterable[Finding], view: View) -> Iterator[Finding]:
    """Findings in a view, with their offsets in the text that it is of."""
    if view.offsets is None:
        yield from found
        return
    for one in found:
        start, end = view.span(one.start, one.end)
        yield replace(one, start=start, end=end)


Reach = Literal["words", "sentence", "far"]


@runtime_checkable
class Detector(Protocol):
    """Anything that finds private ranges in a text.

    After masking, a text is searched again where masking can make a detector find more than before. Its
    optional attribute ``reach`` says where that is: ``"words"``, near masked values that adjoin anything but
    ordinary words, for detectors that judge values by their form and the adjoining characters;
    ``"sentence"``, in sentences with masked values, for detectors that read each sentence by itself;
    ``"far"``, the default, near all masked values.
    """

    def detect(self, text: str) -> Sequence[Finding]:
        """Findings in any order, possibly overlapping; raises an error rather than silently leaving something
        out.
        """
        ...


def reach_of(detector: Detector) -> Reach:
    """The detector's ``reach``, or ``"far"``."""
    reach = getattr(detector, "reach", None)
    return "words" if reach == "words" else "sentence" if reach == "sentence" else "far"


@runtime_checkable
class LabelScorer(Protocol):
    """Anything that computes how likely each of several labels is as the continuation of a prompt.

    :class:`~sllm.Triage` and :class:`~sllm.privacy.ModelDetector` ask one, such as
    :class:`sllm.triage.ContextScorer`.
    """

    def label_logprobs(self, prompt: str, labels: Sequence[str]) -> Sequence[float]:
        """Natural logarithm of the probability of each label right after the prompt, one for each label."""
        ...


# How many candidates of one kind are judged: so many in any text, and one more for each so many characters.
_FREE = 10_000
_PER = 40


class Budget:
    """How many candidates of one kind are judged in one text, whichever patterns found them.

    The number grows with the text, and everything after the last candidate judged counts as found. So a text
    made of nothing but beginnings of values costs time linear in its length with a small factor, and leaks
    nothing: where it was not searched it is masked. Ordinary prose and ordinary tables stay far below.

    Args:
        text: the text that is searched.

    """

    def __init__(self, text: str) -> None:
        self._left = _FREE + len(text) // _PER
        self._end = self._unseen = len(text)

    @property
    def spent(self) -> bool:
        """Whether there was a candidate that could no longer be judged."""
        return self._left < 0

    def spend(self, start: int) -> bool:
        """Takes the candidate that begins at an offset; False once none is left, and then the caller judges
        no more from there on.
        """
        self._left -= 1
        if self._left < 0:
            self._unseen = min(self._unseen, start)
        return self._left >= 0

    def each(self, candidates: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
        """The candidates that may be judged."""
        for candidate in candidates:
            if not self.spend(candidate.start()):
                return
            yield candidate

    def rest(self, kind: str) -> Iterator[Finding]:
        """The part of the text that was not judged, as one finding; nothing if all of it was."""
        if self._left < 0:
            yield Finding(self._unseen, self._end, kind, 0.5)

"""What every detector hands back, and what a detector is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KINDS", "Detector", "Finding", "LabelScorer"]

# The kinds that the detectors here name, each with what it stands for. They become part of placeholders, so
# they are plain capital letters; detectors of others may name further kinds of that form.
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
    "PLATE": "vehicle registration",
    "SECRET": "password, key, token or code",
    "SSN": "social security number",
    "URL": "address with credentials in it",
    "USER": "user name or messenger handle",
    "VIN": "vehicle identification number",
    "WALLET": "address of a crypto currency",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A range of a text that holds something private.

    Attributes:
        start: first offset, in the text that was given.
        end: offset behind the last character.
        kind: one of :data:`KINDS`, or another word of 2 to 16 capital letters A-Z.
        score: how sure the detector is, in (0, 1].
        checked: whether a checksum or another deterministic check of the value itself agreed.

    """

    start: int
    end: int
    kind: str
    score: float = 1.0
    checked: bool = False


@runtime_checkable
class Detector(Protocol):
    """Anything that finds private ranges in a text."""

    def detect(self, text: str) -> Sequence[Finding]:
        """Findings in any order, overlapping or not; raises rather than leaving something out in silence."""
        ...


@runtime_checkable
class LabelScorer(Protocol):
    """Anything that says how likely each of several labels is as the continuation of a prompt: what
    :class:`~sllm.Triage` and :class:`~sllm.privacy.ModelDetector` ask, such as
    :class:`sllm.triage.ContextScorer`.
    """

    def label_logprobs(self, prompt: str, labels: Sequence[str]) -> Sequence[float]:
        """Natural logarithm of the probability of each label right after the prompt, one for each label."""
        ...

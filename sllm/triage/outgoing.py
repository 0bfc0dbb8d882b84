"""What of a request may leave the machine: what is private is masked, and what is sent is checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sllm.errors import LeakError
from sllm.privacy import Detector, Restorer, Vault, egress_check

if TYPE_CHECKING:
    from sllm.privacy import Masked, MaskedMessages
    from sllm.triage.time_limit import TimeLimit

__all__ = ["ContainsPrivate", "LocalOnly", "Outgoing", "PrivacyMode", "find_private"]

log = logging.getLogger("sllm.hybrid")

PrivacyMode = Literal["local", "deidentify", "refuse"]
"""What becomes of a private request; :class:`~sllm.Hybrid` says more."""

_T = TypeVar("_T")


class LocalOnly(Exception):  # noqa: N818 - no error: the reason not to use the cloud
    """Why nothing may be sent; the text may be shown."""


class ContainsPrivate(LocalOnly):
    """What was to be sent contains something private."""


def find_private(
    messages: Sequence[Mapping[str, Any]], detectors: Sequence[Detector], limit: TimeLimit
) -> tuple[list[str], str | None]:
    """The kinds of all that the detectors find in messages, and what went wrong on the way, or None.

    Where something went wrong, something is taken to be there.

    Raises:
        TypeError: messages that contain something other than text, numbers, lists and mappings.

    """
    probe = Vault(detectors)
    try:
        counts = _in_time(limit, lambda: probe.mask_messages(messages)).counts
    except TypeError:
        raise
    except LocalOnly as reason:
        return ["SOMETHING"], f"failed closed: {reason}"
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing may leave the machine for it
        return ["SOMETHING"], f"failed closed: {type(error).__name__}"
    return [kind for kind, n in counts.items() for _ in range(n)], None


def _in_time(limit: TimeLimit, search: Callable[[], _T]) -> _T:
    """What ``search`` returns or raises.

    Raises:
        LocalOnly: a detector takes too long; one that hangs must not hold an answer.

    """
    try:
        return limit.run(search)
    except TimeoutError as error:
        raise LocalOnly(f"a detector: {error}") from None


class Outgoing:
    """What one request may send, masked by the conversation's vault.

    Args:
        vault: of the conversation.
        detectors: for the last check.
        limit: for the detectors.
        privacy: with anything but ``"deidentify"``, nothing that contains something private is sent.
        grammar: whether the answer has to keep to a grammar; nothing that was masked is sent then.

    """

    def __init__(
        self,
        vault: Vault,
        detectors: Sequence[Detector],
        limit: TimeLimit,
        privacy: PrivacyMode,
        *,
        grammar: bool,
    ) -> None:
        self.vault = vault
        self._detectors = detectors
        self._limit = limit
        self._privacy = privacy
        self._grammar = grammar

    def mask_messages(self, messages: Sequence[Mapping[str, Any]]) -> MaskedMessages:
        """The conversation with placeholders for what is private.

        Raises:
            LocalOnly: it cannot be masked, or may not be sent masked.

        """
        try:
            masked = _in_time(self._limit, lambda: self.vault.mask_messages(messages))
        except LeakError as error:
            raise ContainsPrivate(f"it cannot be masked ({type(error).__name__})") from None
        self._check_masked(masked.counts, "it")
        return masked

    def mask_answer(self, text: str) -> Masked:
        """A local answer with placeholders for what is private.

        Raises:
            LocalOnly: as :meth:`mask_messages`.

        """
        try:
            masked = _in_time(self._limit, lambda: self.vault.mask(text))
        except LeakError as error:
            raise ContainsPrivate(f"the answer cannot be masked ({type(error).__name__})") from None
        self._check_masked(masked.counts, "the answer")
        return masked

    def _check_masked(self, counts: Mapping[str, int], what: str) -> None:
        if counts and self._privacy != "deidentify":
            raise ContainsPrivate(f"something private was found in {what}")
        if counts and self._grammar:
            # It may demand eleven digits where a placeholder stands, or not the escapes that a value needs.
            raise LocalOnly("a grammar holds for values, and what was masked comes back as a placeholder")

    def restorer(self) -> Restorer:
        """What puts the values back in place of the placeholders of an answer."""
        return Restorer(self.vault.placeholders)

    def egress_check(self, text: str) -> None:
        """The last check of a text that is about to be sent.

        Raises:
            LocalOnly: something private is in it, or a detector takes too long.

        """
        try:
            _in_time(self._limit, lambda: egress_check(text, self.vault, detectors=self._detectors))
        except LeakError as error:
            log.warning("nothing was sent: %s", error)
            raise ContainsPrivate("the last check before sending found something private") from None

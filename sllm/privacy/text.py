"""Views of a text: rewritten for searching, with the offsets of what each character came from.

A phone number may come in full-width digits, with zero-width characters or in Chinese numerals. Searching
runs over a view in which all of that is written in ASCII, and what is found there is mapped back to offsets
in the original. The views: :func:`plain` for detectors (keeps case and length wherever it can),
:func:`folded` for comparing with known values (compatibility decomposition and case folding), and
:func:`decoded` for what is written in escapes of JSON, URLs and HTML. :func:`encoded` and :func:`unpacked`
read what is written in base64 and hexadecimal.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import json
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    _Offsets = Sequence[int] | npt.NDArray[np.intp]

__all__ = [
    "View",
    "compact",
    "decoded",
    "encoded",
    "fold_char",
    "folded",
    "joined_numbers",
    "plain",
    "unpacked",
]

# Characters without width: soft hyphen, joiners, direction marks, byte order mark, variation selectors.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef"
)

_SPACES = "\u00a0\u2000-\u200a\u202f\u205f\u3000"
_DASHES = "\u2010-\u2015\u2212\ufe58\ufe63"
# ASCII punctuation that is part of identifiers, in its full-width form. The full-width comma and the like
# end a clause in Chinese and stay what they are.
_SIGNS = "＠．＿－＋／：＃（）＝＆％＼［］＜＞"
_NUMERALS = str.maketrans("零〇一二三四五六七八九幺", "0012345678" + "91")
_NUMERAL_RUN = lazy("[零〇一二三四五六七八九幺]{7,}")
# Digits of every script, full-width and mathematical letters, and the classes above.
_CHANGING = lazy(
    f"[{_INVISIBLE}{_SPACES}{_DASHES}{_SIGNS}０-９Ａ-Ｚａ-ｚ\u0660-\u0669\u06f0-\u06f9\u07c0-\u07c9\u0966-\u096f"
    "\u09e6-\u09ef\u0a66-\u0a6f\u0ae6-\u0aef\u0b66-\u0b6f\u0be6-\u0bef\u0c66-\u0c6f\u0ce6-\u0cef\u0d66-\u0d6f"
    "\u0e50-\u0e59\u0ed0-\u0ed9\u0f20-\u0f29\u1040-\u1049\u17e0-\u17e9\u1810-\u1819①-⑨\U0001d400-\U0001d7ff]"
)
_FORM = lazy(f"(?P<gone>[{_INVISIBLE}])|(?P<space>[{_SPACES}])|(?P<dash>[{_DASHES}])")
_FORMS = {"gone": "", "space": " ", "dash": "-"}


class View:
    """A text as written for searching.

    Args:
        text: what to search.
        offsets: for each character of ``text`` the offset in the original that it came from, or what returns
            that once it is asked for; None where the two have the same offsets.
        ends: for each character the offset after what it came from; None where that is one character.

    """

    def __init__(
        self, text: str, offsets: _Offsets | Callable[[], _Offsets] | None, ends: _Offsets | None = None
    ) -> None:
        self.text = text
        self._offsets = offsets
        self.ends = ends

    @property
    def offsets(self) -> _Offsets | None:
        """Where each character came from; None: the original has the same offsets."""
        if callable(self._offsets):
            self._offsets = self._offsets()
        return self._offsets

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The original's half-open range that became ``text[start:end]``, which must not be empty."""
        offsets = self.offsets
        if offsets is None:
            return start, end
        last = int(offsets[end - 1]) + 1 if self.ends is None else self.ends[end - 1]
        return int(offsets[start]), int(last)


def _replaced(view: View, pattern: re.Pattern[str], put: Callable[[str], str]) -> View:
    """A view with what a pattern matches replaced by other characters."""
    pieces: list[str] = []
    starts: list[int] = []
    stops: list[int] = []
    last = 0
    moved = False
    for match in pattern.finditer(view.text):
        start, end = match.span()
        chars = put(match[0])
        if chars == match[0]:
            continue
        moved = moved or len(chars) != end - start
        pieces += (view.text[last:start], chars)
        starts += (*range(last, start), *[start] * len(chars))
        stops += (*range(last + 1, start + 1), *[end] * len(chars))
        last = end
    if not last:
        return view
    text = "".join([*pieces, view.text[last:]])
    if not moved:
        return View(text, view.offsets, view.ends)
    starts.extend(range(last, len(view.text)))
    stops.extend(range(last + 1, len(view.text) + 1))
    offsets, ends = view.offsets, view.ends
    if offsets is not None and ends is not None:
        starts = [int(offsets[i]) for i in starts]
        stops = [int(ends[i - 1]) for i in stops]
    return View(text, starts, stops)


# Stands for a character that a view leaves out: an ASCII one that texts hardly have.
_GONE = "\x1f"


def _gone(match: re.Match[str]) -> str:
    return _GONE * len(match[0])


def _without(view: View, marked: str) -> View:
    """A view without the characters in place of which a text of the same length has :data:`_GONE`."""

    def offsets() -> _Offsets:
        kept = np.flatnonzero(np.frombuffer(marked.encode("utf-32-le", "surrogatepass"), "<u4") != ord(_GONE))
        return kept if view.offsets is None else np.asarray(view.offsets)[kept]

    return View(marked.replace(_GONE, ""), offsets)


@functools.lru_cache(maxsize=4096)
def _plain_char(char: str) -> str:
    kind = _FORM.match(char)
    if kind and kind.lastgroup:
        return _FORMS[kind.lastgroup]
    digit = unicodedata.digit(char, None)
    if digit is not None:
        return str(digit)
    form = unicodedata.normalize("NFKC", char)
    return form if len(form) == 1 else char


def _with_numerals(view: View) -> View:
    """A view with runs of Chinese numerals as digits."""
    view.text = _NUMERAL_RUN.sub(lambda match: match[0].translate(_NUMERALS), view.text)
    return view


def plain(text: str) -> View:
    """The view that detectors search: full-width forms, foreign digits, unusual spaces and dashes as ASCII,
    runs of seven or more Chinese numerals as digits, zero-width characters gone.
    """
    if text.isascii():
        return View(text, None)
    return _with_numerals(_replaced(View(text, None), _CHANGING, _plain_char))


@functools.lru_cache(maxsize=65536)
def fold_char(char: str) -> str:
    """One character as it is compared: compatibility form, decomposed, case folded; "" if it has no width."""
    kind = _FORM.match(char)
    if kind and kind["gone"]:
        return ""
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    form = unicodedata.normalize("NFKD", char).casefold()
    # Case folding may undo the decomposition, and the other way round.
    return unicodedata.normalize("NFKD", form).casefold()


# Neither ASCII nor plain Han, nor what stands for invalid bytes: characters that folding may change.
_FOLDING = lazy("[^\x00-\x7f\u3001\u3002\u4e00-\u9fff\ufffd]")


def folded(text: str) -> View:
    """The view in which known values are searched; see :func:`fold_char`."""
    if text.isascii():
        return View(text.lower(), None)
    view = _replaced(View(text, None), _FOLDING, fold_char)
    return _with_numerals(View(view.text.lower(), view.offsets, view.ends))


# What may stand between the digits of a number.
_IN_NUMBER = lazy(r"[ \t\r\n\-._()/,:+\"'*]{1,5}(?=[0-9])(?<=[0-9][ \t\r\n\-._()/,:+\"'*])")
# What is written between the letters of a word without ending it: spaces, Markdown and joining signs, tags,
# combining marks. The signs that end a clause are not among them.
_BETWEEN = lazy("[\\s_.*~`'\"/\\\\+|()\\[\\]{}#=&<>\u00b7\u2022\u0300-\u036f-]")
_LAST_BETWEEN = 0x3000
_TAG = lazy(r"</?[A-Za-z][^<>\n]{0,40}>")
# Cyrillic and Greek letters that are drawn as Latin ones (case folded).
_LOOKALIKES = str.maketrans("аеорсухіјѕһԁԛԝкмнтвαεορυχικνητ", "aeopcyxijshdqwkmhtbaeopuxiknht")


@functools.cache
def _closing() -> dict[int, Any]:
    """For :meth:`str.translate`: what letters become, and what is between them."""
    between = [code for code in range(_LAST_BETWEEN + 1) if _BETWEEN.match(chr(code))]
    return {**_LOOKALIKES, **dict.fromkeys(between, _GONE)}


def compact(view: View) -> View:
    """A folded view with the letters and digits moved together: spaces, signs, tags and accents between them
    gone, letters of other scripts that look Latin made so. For comparing values that were spelled out or
    broken.
    """
    text = _TAG.sub(_gone, view.text) if "<" in view.text else view.text
    return _without(view, text.translate(_closing()))


def joined_numbers(view: View) -> View:
    """A view without what stands between the digits of numbers."""
    return _without(view, _IN_NUMBER.sub(_gone, view.text))


_HEX_DIGIT = "[0-9A-Fa-f]"


def _bytes(byte: str, between: str = "") -> str:
    """A pattern of the bytes of one character, each written with a sign and two hexadecimal digits."""
    return (
        rf"{byte}[C-Fc-f]{_HEX_DIGIT}(?:{between}{byte}[89ABab]{_HEX_DIGIT}){{1,3}}|{byte}{_HEX_DIGIT}{{2}}"
    )


_HEX_BYTES = _bytes(r"\\x")
_PAIR = rf"\\u[dD][89ABab]{_HEX_DIGIT}{{2}}\\u[dD][C-Fc-f]{_HEX_DIGIT}{{2}}"
_JSON_ESCAPE = lazy(rf"{_PAIR}|\\u{_HEX_DIGIT}{{4}}|\\[\"\\/bfnrt]")
_ESCAPE = lazy(
    rf"{_PAIR}|\\u{_HEX_DIGIT}{{4}}|\\[\"\\/bfnrt]|\\u\{{{_HEX_DIGIT}{{1,6}}\}}|\\U{_HEX_DIGIT}{{8}}"
    rf"|{_HEX_BYTES}|\\3[0-7]{{2}}(?:\\2[0-7]{{2}}){{1,3}}|\\[0-3][0-7]{{2}}"
)
_PERCENT = lazy(_bytes("%"))
_QUOTED = lazy(_bytes("=", r"(?:=\r?\n)*") + r"|=\r?\n")
# What says that a text is of mail: its header, an encoded word, the bytes of a character, a line that is
# broken within a word. Without it, exp=1718622000123 is the value of a key.
_OF_MAIL = lazy(
    r"quoted-printable|=\?[A-Za-z0-9-]{1,20}\?[Qq]\?|=3D[A-Z\"']|(?:=[89A-F][0-9A-F]){2}|[^\s=]=\r?\n[^\s=]",
    re.I,
)
_ENTITY = lazy(r"&(?:#[0-9]{1,7};?|#[xX][0-9a-fA-F]{1,6};?|[A-Za-z][A-Za-z0-9]{1,24};)")
# JSON within JSON within JSON: a tool's arguments in a message in a request.
_LEVELS = 3


@functools.lru_cache(maxsize=4096)
def _unescaped(written: str) -> str:
    if _JSON_ESCAPE.fullmatch(written):
        # Half of a surrogate pair is not a character.
        return _SURROGATE.sub("\ufffd", json.loads(f'"{written}"'))
    if written[1] in "uU":
        point = int(written.strip("\\uU{}"), 16)
        return _SURROGATE.sub("\ufffd", chr(min(point, sys.maxunicode)))
    if written[1] == "x":
        return _of_bytes(bytes.fromhex(written.replace("\\x", "")))
    return _of_bytes(bytes(int(octal, 8) for octal in written.split("\\")[1:]))


def _of_bytes(data: bytes) -> str:
    """UTF-8, or Latin-1 where it is invalid."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


_AROUND_BYTES = str.maketrans("", "", "%=\r\n")


def _unquoted(written: str) -> str:
    return _of_bytes(bytes.fromhex(written.translate(_AROUND_BYTES)))


_SURROGATE = lazy("[\ud800-\udfff]")
# What writes characters otherwise: JSON and program code, URLs, HTML, mail (quoted-printable).
_ENCODINGS: tuple[tuple[str, re.Pattern[str], Callable[[str], str]], ...] = (
    ("\\", _ESCAPE, _unescaped),
    ("%", _PERCENT, _unquoted),
    ("&", _ENTITY, html.unescape),
    ("=", _QUOTED, _unquoted),
)


def decoded(text: str) -> Iterator[View]:
    """The text without the escapes of JSON and program code, of URLs, of HTML and of mail: a view for each
    that changes it.
    """
    for sign, pattern, put in _ENCODINGS:
        if sign not in text or (sign == "=" and not _OF_MAIL.search(text)):
            continue
        view = View(text, None)
        for _ in range(_LEVELS):
            inner = _replaced(view, pattern, put)
            if inner is view:
                break
            view = inner
            yield view


_BASE64 = lazy(r"[A-Za-z0-9+/_-]{8,}")
_HEX = lazy(r"[0-9a-fA-F](?<![0-9a-fA-F].)[0-9a-fA-F](?:[ :,-]?[0-9a-fA-F]{2}){5,}(?![0-9a-fA-F])")
_GAPS = str.maketrans("", "", " :,-")
_URL_SAFE = str.maketrans("-_", "+/")


# Shorter ones hold no value that could be told from words.
_ENCODED = lazy(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{16,}={0,2}")
_TEXT_ONLY = lazy(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]+\Z")


def encoded(text: str) -> Iterator[tuple[int, int, str]]:
    """Runs of base64 that hold text, in UTF-8: start, end, and the text. Words hardly ever do."""
    for run in _ENCODED.finditer(text):
        body = run[0].rstrip("=").translate(_URL_SAFE)
        try:
            inner = base64.b64decode(body + "=" * (-len(body) % 4)).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
        if _TEXT_ONLY.match(inner):
            yield run.start(), run.end(), inner


def unpacked(text: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Runs of base64 and hexadecimal digits: their range, and all that they may hold as text, with U+FFFD for
    bytes that are not UTF-8.
    """
    for run in _BASE64.finditer(text):
        body = run[0].translate(_URL_SAFE)
        # Letters before it may have shifted the run.
        parts = [body[shift:] for shift in range(4)]
        held = b"\n".join(binascii.a2b_base64(part + "AAA"[: -len(part) % 4]) for part in parts)
        yield run.span(), held.replace(b"\0", b"").decode("utf-8", "replace")
    for run in _HEX.finditer(text):
        # UTF-16 of ASCII has a zero byte for each character.
        data = bytes.fromhex(run[0].translate(_GAPS)).replace(b"\0", b"")
        yield run.span(), data.decode("utf-8", "replace")

"""Views of a text: rewritten for searching, with the offsets of what each character came from.

A phone number may come in full-width digits, with zero-width characters or in Chinese numerals. Searching
runs over a view in which all of that is written in ASCII, and what is found there is mapped back to offsets
in the original. The views: :func:`plain` for detectors (keeps case and length wherever it can),
:func:`folded` for comparing with known values (compatibility decomposition and case folding), and
:func:`decoded` and :func:`packed` for what is written in escapes of JSON, URLs and HTML, or in base64 and
hexadecimal.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

__all__ = [
    "View",
    "compact",
    "decoded",
    "encoded",
    "fold_char",
    "folded",
    "plain",
    "unpacked",
    "without",
]

# Characters without width: soft hyphen, joiners, direction marks, byte order mark, variation selectors.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef"
)
INVISIBLE = lazy(f"[{_INVISIBLE}]+")

_SPACES = "\u00a0\u2000-\u200a\u202f\u205f\u3000"
_DASHES = "\u2010-\u2015\u2212\ufe58\ufe63"
# ASCII punctuation that is part of identifiers, in its full-width form. The full-width comma and the like
# end a clause in Chinese and stay what they are.
_SIGNS = "＠．＿－＋／：＃（）＝＆％＼［］＜＞"
_NUMERALS = str.maketrans("零〇一二三四五六七八九幺", "0012345678" + "91")
_NUMERAL_RUN = lazy("[零〇一二三四五六七八九幺]{7,}")
# Digits of every script, full-width and mathematical letters, and the classes above.
_CHANGING = lazy(
    f"[{_SPACES}{_DASHES}{_SIGNS}０-９Ａ-Ｚａ-ｚ\u0660-\u0669\u06f0-\u06f9\u07c0-\u07c9\u0966-\u096f"
    "\u09e6-\u09ef\u0a66-\u0a6f\u0ae6-\u0aef\u0b66-\u0b6f\u0be6-\u0bef\u0c66-\u0c6f\u0ce6-\u0cef\u0d66-\u0d6f"
    "\u0e50-\u0e59\u0ed0-\u0ed9\u0f20-\u0f29\u1040-\u1049\u17e0-\u17e9\u1810-\u1819①-⑨\U0001d400-\U0001d7ff]"
)
_SPACE_OR_DASH = lazy(f"[{_SPACES}]|([{_DASHES}])")


@dataclass(frozen=True)
class View:
    """A text as written for searching.

    Attributes:
        text: what to search.
        offsets: for each character of ``text`` the offset in the original that it came from; None where the
            two have the same offsets.
        ends: for each character the offset after what it came from; None where that is one character.

    """

    text: str
    offsets: Sequence[int] | npt.NDArray[np.intp] | None
    ends: Sequence[int] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The original's half-open range that became ``text[start:end]``, which must not be empty."""
        if self.offsets is None:
            return start, end
        last = int(self.offsets[end - 1]) + 1 if self.ends is None else self.ends[end - 1]
        return int(self.offsets[start]), last


@functools.lru_cache(maxsize=4096)
def _plain_char(char: str) -> str:
    kind = _SPACE_OR_DASH.fullmatch(char)
    if kind:
        return "-" if kind[1] else " "
    digit = unicodedata.digit(char, None)
    if digit is not None:
        return str(digit)
    form = unicodedata.normalize("NFKC", char)
    return form if len(form) == 1 else char


def without(view: View, pattern: re.Pattern[str]) -> View:
    """A view without what a pattern matches."""
    keep = np.ones(len(view.text), bool)
    for gap in pattern.finditer(view.text):
        keep[gap.start() : gap.end()] = False
    offsets = np.flatnonzero(keep)
    if view.offsets is not None:
        offsets = np.asarray(view.offsets)[offsets]
    return View(pattern.sub("", view.text), offsets)


_FEW = 100


def plain(text: str) -> View:
    """The view that detectors search: full-width forms, foreign digits, unusual spaces and dashes as ASCII,
    runs of seven or more Chinese numerals as digits, zero-width characters gone.
    """
    if text.isascii():
        return View(text, None)
    chars = set(text)
    view = without(View(text, None), INVISIBLE) if any(map(INVISIBLE.match, chars)) else View(text, None)
    changed = view.text
    changing = [char for char in chars if _CHANGING.match(char)]
    if len(changing) <= _FEW:
        # A few passes in C instead of a Python call for each character.
        for char in changing:
            changed = changed.replace(char, _plain_char(char))
    else:
        changed = _CHANGING.sub(lambda m: _plain_char(m[0]), changed)
    changed = _NUMERAL_RUN.sub(lambda m: m[0].translate(_NUMERALS), changed)
    return View(changed, view.offsets)


@functools.lru_cache(maxsize=65536)
def fold_char(char: str) -> str:
    """One character as it is compared: compatibility form, decomposed, case folded; "" if it has no width."""
    if INVISIBLE.fullmatch(char):
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
    pieces: list[str] = []
    offsets: list[int] = []
    last = 0
    moved = False
    for match in _FOLDING.finditer(text):
        at = match.start()
        form = fold_char(match[0])
        pieces += (text[last:at].lower(), form)
        offsets.extend(range(last, at))
        offsets.extend([at] * len(form))
        moved = moved or len(form) != 1
        last = at + 1
    pieces.append(text[last:].lower())
    offsets.extend(range(last, len(text)))
    body = _NUMERAL_RUN.sub(lambda m: m[0].translate(_NUMERALS), "".join(pieces))
    return View(body, offsets if moved else None)


# What is written between the letters of a word without ending it: spaces, Markdown and joining signs, tags,
# combining marks. The signs that end a clause are not among them.
_BETWEEN = lazy(
    "(?:</?[A-Za-z][^<>\n]{0,40}>|[\\s_.*~`'\"/\\\\+|()\\[\\]{}#=&<>\u00b7\u2022\u0300-\u036f-])+"
)
# Cyrillic and Greek letters that are drawn as Latin ones (case folded).
_LOOKALIKES = str.maketrans("аеорсухіјѕһԁԛԝкмнтвαεορυχικνητ", "aeopcyxijshdqwkmhtbaeopuxiknht")


def compact(view: View) -> View:
    """A folded view with the letters and digits moved together: spaces, signs, tags and accents between them
    gone, letters of other scripts that look Latin made so. For comparing values that were spelled out or
    broken.
    """
    close = without(view, _BETWEEN)
    return close if close.text.isascii() else View(close.text.translate(_LOOKALIKES), close.offsets)


_ESCAPE = lazy(
    r"\\(?:u([0-9a-fA-F]{4})(?:\\u([dD][c-fC-F][0-9a-fA-F]{2}))?|([\"\\/bfnrt])|"
    r"(?:u\{([0-9a-fA-F]{1,6})\}|U([0-9a-fA-F]{8})))"
    r"|((?:\\x[0-9a-fA-F]{2})+)|((?:\\[0-3][0-7]{2})+)"
)
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_PERCENT = lazy(r"(?:%[0-9A-Fa-f]{2})+")
# Quoted-printable, as in mail.
_QUOTED = lazy(r"(?:=[0-9A-F]{2}|=\r?\n)+")
# What says that a text is of mail: its header, an encoded word, the bytes of a character, a line that is
# broken within a word. Without it, exp=1718622000123 is the value of a key.
_OF_MAIL = lazy(
    r"quoted-printable|=\?[A-Za-z0-9-]{1,20}\?[Qq]\?|=3D[A-Z\"']|(?:=[89A-F][0-9A-F]){2}|[^\s=]=\r?\n[^\s=]",
    re.I,
)
_QUOTED_BYTE = lazy(r"=(?:([0-9A-F]{2})|\r?\n)")
_ENTITY = lazy(r"&(?:#[0-9]{1,7};?|#[xX][0-9a-fA-F]{1,6};?|[A-Za-z][A-Za-z0-9]{1,24};)")
# JSON within JSON within JSON: a tool's arguments in a message in a request.
_LEVELS = 3


def _unescaped(match: re.Match[str]) -> list[tuple[str, int]]:
    high, low, simple, braced, long, hexes, octals = match.groups()
    width = match.end() - match.start()
    if simple:
        return [(_SIMPLE.get(simple, simple), width)]
    if hexes:
        return _of_bytes(bytes.fromhex(hexes.replace("\\x", "")), 4)
    if octals:
        return _of_bytes(bytes(int(octals[i + 1 : i + 4], 8) for i in range(0, len(octals), 4)), 4)
    if braced or long:
        point = int(braced or long, 16)
        good = point < 0x110000 and not 0xD800 <= point < 0xE000
        return [(chr(point) if good else "\ufffd", width)]
    code = int(high, 16)
    if 0xD800 <= code < 0xDC00 and low:
        return [(chr(0x10000 + ((code - 0xD800) << 10) + (int(low, 16) - 0xDC00)), width)]
    # Half of a surrogate pair is not a character.
    first = "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
    return [(first, width - 6), ("\ufffd", 6)] if low else [(first, width)]


def _unquoted(match: re.Match[str]) -> list[tuple[str, int]]:
    return _of_bytes(bytes.fromhex(match[0].replace("%", "")), 3)


def _of_bytes(data: bytes, width: int) -> list[tuple[str, int]]:
    """The characters of UTF-8, or of Latin-1 where it is invalid; each byte was ``width`` characters."""
    try:
        return [(char, width * len(char.encode())) for char in data.decode()]
    except UnicodeDecodeError:
        return [(chr(byte), width) for byte in data]


def _printable(match: re.Match[str]) -> list[tuple[str, int]]:
    data = bytearray()
    widths: list[int] = []  # of each byte, with the soft line breaks before it
    left = 0
    for piece in _QUOTED_BYTE.finditer(match[0]):
        if piece[1]:
            data.append(int(piece[1], 16))
            widths.append(3 + left)
            left = 0
        else:
            left += len(piece[0])
    chars = []
    at = 0
    for char, n_bytes in _of_bytes(bytes(data), 1):
        chars.append((char, sum(widths[at : at + n_bytes])))
        at += n_bytes
    if left:
        chars.append(("\u200b", left))
    return chars


def _entity(match: re.Match[str]) -> list[tuple[str, int]]:
    char = html.unescape(match[0])
    return [(char, len(match[0]))] if len(char) == 1 and not 0xD800 <= ord(char) < 0xE000 else []


def _replaced(
    view: View, pattern: re.Pattern[str], put: Callable[[re.Match[str]], list[tuple[str, int]]]
) -> View:
    """A view with matches of a pattern replaced by characters, each with the length it came from."""
    pieces: list[str] = []
    starts: list[int] = []
    stops: list[int] = []
    last = 0
    for match in pattern.finditer(view.text):
        chars = put(match)
        if not chars:
            continue
        at = match.start()
        pieces.append(view.text[last:at])
        starts.extend(range(last, at))
        stops.extend(range(last + 1, at + 1))
        for char, width in chars:
            pieces.append(char)
            starts.append(at)
            at += width
            stops.append(at)
        last = match.end()
    if not last:
        return view
    pieces.append(view.text[last:])
    starts.extend(range(last, len(view.text)))
    stops.extend(range(last + 1, len(view.text) + 1))
    if view.offsets is not None and view.ends is not None:
        starts = [view.offsets[i] for i in starts]
        stops = [view.ends[i - 1] for i in stops]
    return View("".join(pieces), starts, stops)


def decoded(text: str) -> Iterator[View]:
    """The text without the escapes of JSON and program code, of URLs, of HTML and of mail: a view for each
    that changes it.
    """
    for sign, pattern, put in (
        ("\\", _ESCAPE, _unescaped),
        ("%", _PERCENT, _unquoted),
        ("&", _ENTITY, _entity),
        ("=", _QUOTED, _printable),
    ):
        if sign not in text:
            continue
        if sign == "=" and not _OF_MAIL.search(text):
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

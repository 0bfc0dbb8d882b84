"""The last check: nothing that a vault holds, and nothing that looks private, is in what is about to be sent."""

from __future__ import annotations

import base64
import binascii
import html
import re
import urllib.parse
from collections import Counter
from typing import TYPE_CHECKING

from sllm.errors import LeakError
from sllm.privacy.vault import detect_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sllm.privacy.findings import Detector
    from sllm.privacy.vault import Vault

__all__ = ["egress_check"]

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})(?:\\u([dD][c-fC-F][0-9a-fA-F]{2}))?|x([0-9a-fA-F]{2})|([\"\\/bfnrt]))")
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{8,}")
_HEX = re.compile(r"(?<![0-9a-fA-F])(?:[0-9a-fA-F]{2}){4,}(?![0-9a-fA-F])")
_URL_SAFE = str.maketrans("-_", "+/")


def _unescape(match: re.Match[str]) -> str:
    high, low, byte, simple = match.groups()
    if simple:
        return _SIMPLE.get(simple, simple)
    if byte:
        return chr(int(byte, 16))
    code = int(high, 16)
    if 0xD800 <= code < 0xDC00 and low:
        return chr(0x10000 + ((code - 0xD800) << 10) + (int(low, 16) - 0xDC00))
    # Half of a pair is no character; what it hides is no value of ours either.
    rest = "\ufffd" if low and not 0xDC00 <= int(low, 16) else ""
    return ("\ufffd" if 0xD800 <= code < 0xE000 else chr(code)) + rest


def _decoded(text: str) -> Iterator[str]:
    """The text under the encodings that text is sent in, where they change it."""
    seen = {text}
    for one in (
        _ESCAPE.sub(_unescape, text) if "\\" in text else text,
        urllib.parse.unquote_plus(text, errors="replace") if "%" in text or "+" in text else text,
        html.unescape(text) if "&" in text else text,
    ):
        if one not in seen:
            seen.add(one)
            yield one


def _packed(text: str) -> Iterator[str]:
    """What runs of base64 and hexadecimal digits hold."""
    pieces = []
    for run in _BASE64.finditer(text):
        body = run[0].translate(_URL_SAFE)
        # Letters in front of it may have shifted the run.
        for shift in range(4):
            part = body[shift:]
            part = part[: len(part) - (len(part) % 4 == 1)]
            try:
                pieces.append(base64.b64decode(part + "=" * (-len(part) % 4)).decode("utf-8", "replace"))
            except binascii.Error:
                continue
    pieces.extend(bytes.fromhex(run[0]).decode("utf-8", "replace") for run in _HEX.finditer(text))
    if pieces:
        yield "\n".join(pieces)


def egress_check(data: str | bytes, vault: Vault, detectors: Sequence[Detector] | None = None) -> None:
    """Raises unless ``data`` may leave the machine.

    Placeholders as the vault issued them are taken out first. The rest must hold no value of the vault: compared
    by compatibility form and without case, without zero-width characters, numbers by their digits alone, also
    behind JSON, percent and HTML escapes, in base64 and in hexadecimal. And the detectors must find nothing in it, nor
    behind its escapes.

    Args:
        data: everything that is about to be sent: text, or its UTF-8.
        vault: of the conversation.
        detectors: for the second scan; None is the vault's own, an empty sequence leaves only the comparison.

    Raises:
        LeakError: something private is in it, it is no UTF-8, or a detector failed. The message names kinds
            and counts, never values.
        TypeError: neither text nor bytes.

    """
    if isinstance(data, bytes | bytearray | memoryview):
        failed = False
        text = ""
        try:
            text = bytes(data).decode()
        except UnicodeDecodeError:
            failed = True
        if failed:
            raise LeakError(f"{len(data)} bytes about to be sent are no UTF-8, so nothing says what is in them")
    elif isinstance(data, str):
        text = data
    else:
        raise TypeError(f"expected text or bytes, got {type(data).__name__}")
    rest = vault.blanked(text)
    known = vault.known()
    found: Counter[str] = Counter()
    used = vault.detectors if detectors is None else tuple(detectors)
    for form in (rest, *_decoded(rest)):
        spans = {(start, end): kind for start, end, kind in known.find(form)}
        for one in detect_all(used, form):
            spans.setdefault((one.start, one.end), one.kind)
        found |= Counter(spans.values())
    if len(known):
        for form in _packed(rest):
            found |= Counter(kind for _, _, kind in known.find(form))
    if found:
        what = ", ".join(f"{n} of kind {kind}" for kind, n in sorted(found.items()))
        raise LeakError(f"text about to be sent still holds {what}; nothing was sent; mask it with the conversation's Vault")

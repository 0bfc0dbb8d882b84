"""The last check: text to be sent contains no value of the vault and nothing that looks private."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sllm.errors import LeakError
from sllm.privacy.detect import search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.privacy.findings import Detector
    from sllm.privacy.vault import Vault

__all__ = ["egress_check"]


def egress_check(data: str | bytes, vault: Vault, detectors: Sequence[Detector] | None = None) -> None:
    """Raises unless ``data`` may leave the machine.

    Placeholders issued by the vault are removed first. The rest must contain no value of the vault, compared
    by compatibility form, ignoring case and zero-width characters, numbers by their digits alone, also under
    JSON, percent and HTML escapes, in base64 and in hexadecimal. And the detectors must find nothing in it,
    with or without its escapes.

    Args:
        data: everything that is about to be sent: text, or its UTF-8.
        vault: the vault of the conversation.
        detectors: for the second scan; None means those of the vault, an empty sequence leaves only the
            comparison.

    Raises:
        LeakError: something private is in it, it is not UTF-8, or a detector failed. The message names kinds
            and counts, never values.
        TypeError: neither text nor bytes.

    """
    text = _text(data)
    rest = vault.placeholders.blanked(text)
    used = vault.detectors if detectors is None else tuple(detectors)
    spans = {(one.start, one.end): one.kind for one in vault.find_known(rest)}
    for one in search(used, rest):
        spans.setdefault((one.start, one.end), one.kind)
    found = Counter(spans.values())
    if found:
        what = ", ".join(f"{n} of kind {kind}" for kind, n in sorted(found.items()))
        raise LeakError(
            f"text about to be sent still holds {what}; nothing was sent;"
            f" mask it with the conversation's Vault"
        )


def _text(data: str | bytes) -> str:
    if isinstance(data, str):
        return data
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"expected text or bytes, got {type(data).__name__}")
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        pass
    # Outside of the handler: the decoding error, which quotes the data, would hang on to this one.
    raise LeakError(f"{len(data)} bytes about to be sent are no UTF-8, so nothing says what is in them")

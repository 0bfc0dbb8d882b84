"""What a file is that was taken for a model and is none, told from its first bytes."""

from __future__ import annotations

import re

__all__ = ["N_BYTES", "not_gguf"]

N_BYTES = 4096
"""Bytes of a file's beginning that tell what it is."""

_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, or look for the model as GGUF"
_EXTRACT = "extract it, and name the GGUF file inside"
_AGAIN = "download the file again, with a token where it asks to log in"

_MAGIC = [
    (b"\x1f\x8b", f"a gzip archive; {_EXTRACT}"),
    (b"PK\x03\x04", f"a zip archive, or a PyTorch checkpoint, which is one; extract it, or {_CONVERT}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive; {_EXTRACT}"),
    (b"\xfd7zXZ\x00", f"an xz archive; {_EXTRACT}"),
    (b"BZh", f"a bzip2 archive; {_EXTRACT}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_EXTRACT}"),
    (b"\x80\x02", f"a pickled PyTorch checkpoint; {_CONVERT}"),
    (b"\x89HDF\r\n", f"an HDF5 file; {_CONVERT}"),
    *((magic, f"of the format before GGUF; {_CONVERT}") for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
]
"""How files of other kinds begin. The last four are ggml's older ones, whose magic is a little-endian number
(``ggml``, ``ggmf``, ``ggjt``, ``ggla``)."""

_TAR_AT = 257
_LFS = re.compile(rb"version https?://\S+/spec/v\d+\n(?s:.*?)^size (?P<size>\d+)$", re.MULTILINE)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_MOST_SHOWN = 60


def not_gguf(head: bytes) -> str:
    """What follows "is not a GGUF file: ", for a file that begins with ``head``: what it is instead, and what
    to do about it.

    A Git LFS pointer, a web page, XML, JSON or other text that a server sent in place of the file, an
    archive, a checkpoint of another format, a file of zeros. Of anything else, its first four bytes are said.

    Args:
        head: up to :data:`N_BYTES` of the file's beginning, not empty.

    Examples:
        >>> from sllm.engine.file_kind import not_gguf
        >>> not_gguf(b"<!DOCTYPE html><title>Sign in</title>").partition(";")[0]
        "it is an HTML page ('Sign in')"

    """
    pointer = _LFS.match(head)
    if pointer:
        return (
            f"it is a Git LFS pointer, which stands for {int(pointer['size']):,} bytes that are elsewhere;"
            " run `git lfs pull` where it lies, or download the file itself"
        )
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return f"it is a safetensors file; {_CONVERT}"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"it is {what}"
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        return f"it is a tar archive; {_EXTRACT}"
    if len(head) >= 32 and not any(head):
        return "it begins with zeros, as a download does that has not ended; let it end, or download it again"
    text = head.decode("utf-8-sig", "replace").lstrip()
    lower = text.lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower[:1000]:
        title = _TITLE.search(text)
        shown = f" ({_shown(title[1])!r})" if title and title[1].strip() else ""
        return f"it is an HTML page{shown}; {_AGAIN}"
    if lower.startswith("<?xml"):
        return f"it is XML ({_shown(text)!r}); {_AGAIN}"
    if text.startswith(("{", "[")) and "\ufffd" not in text[:200]:
        return f"it is JSON ({_shown(text)!r}); {_AGAIN}"
    return f"it begins with {head[:4]!r}, expected b'GGUF'"


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_SHOWN else line[: _MOST_SHOWN - 3] + "..."

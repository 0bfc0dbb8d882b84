"""The saved state of a sequence: a header of our own before what ``llama_state_seq_get_data`` gives."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["pack", "unpack"]

_MAGIC = b"sllmseq1"
"""Says which version of the layout it is."""

_HEADER = struct.Struct("<8s32sII")
"""The magic, the vocabulary's fingerprint, the number of tokens, and CRC-32 of all that follows."""


def pack(fingerprint: str, tokens: npt.NDArray[np.int32], state: bytes) -> bytes:
    """The bytes to keep: header, ``tokens``, int32 (n,), and llama.cpp's ``state``."""
    body = tokens.tobytes() + state
    return _HEADER.pack(_MAGIC, bytes.fromhex(fingerprint), len(tokens), zlib.crc32(body)) + body


def unpack(data: bytes, fingerprint: str) -> tuple[npt.NDArray[np.int32], bytes]:
    """The tokens, int32 (n,), and llama.cpp's state.

    Raises:
        ValueError: not such bytes, damaged, or of a model with another vocabulary.

    """
    if len(data) < _HEADER.size or data[:8] != _MAGIC:
        raise ValueError("not a state saved by this version of sllm")
    _magic, found, n_tokens, crc = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if len(body) < 4 * n_tokens or zlib.crc32(body) != crc:
        raise ValueError("the saved state is damaged: its checksum does not match")
    if found.hex() != fingerprint:
        raise ValueError("the saved state belongs to a model with another vocabulary")
    return np.frombuffer(body[: 4 * n_tokens], dtype=np.int32), bytes(body[4 * n_tokens :])

"""Hidden states as bytes: what crosses the link of a model that is split by layers.

===========  ===============================================  =================
name         what it is                                       bytes of a row
===========  ===============================================  =================
``"f32"``    float32, little-endian: nothing is lost          4 n_embd
``"f16"``    float16, little-endian                           2 n_embd
``"q8"``     int8, and one float32 scale for the row (absmax  n_embd + 4
             / 127)
``"q4"``     4 bits, and one float16 scale for each 32        0.5625 n_embd
             numbers (the largest of them, with its sign,
             / -8)
===========  ===============================================  =================

The scale of q4 has a sign so that the largest number of a block gets the code -8 and all 16 codes are used,
as in ggml's Q4_0: on hidden states a fifth less squared error than absmax / 7 makes, though a number of the
other sign that is as large loses an eighth.

All but f32 change the numbers, so the text is that of a slightly different model; ``sllm codec-report``
measures by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["CODECS", "across", "decode", "encode", "row_bytes"]

CODECS = ("f32", "f16", "q8", "q4")
"""The names, in the order of the bytes that they take."""

_BLOCK = 32  # numbers that share a scale in q4


def row_bytes(codec: str, n_embd: int) -> int:
    """Bytes of one encoded row.

    Raises:
        ValueError: no such codec, or one that cannot take rows of this width.

    """
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")
    if codec == "q4":
        if n_embd % _BLOCK:
            raise ValueError(f"codec q4 takes rows of a multiple of {_BLOCK} numbers, not {n_embd}; use q8")
        return n_embd // 2 + n_embd // _BLOCK * 2
    return {"f32": 4 * n_embd, "f16": 2 * n_embd, "q8": n_embd + 4}[codec]


def encode(rows: npt.NDArray[np.float32], codec: str) -> bytes:
    """``rows``, float32 (n, n_embd), as ``n * row_bytes(codec, n_embd)`` bytes.

    Raises:
        ValueError: a number that is not finite, or too large for float16.

    """
    row_bytes(codec, rows.shape[1])
    rows = np.ascontiguousarray(rows)
    peak = np.abs(rows).max(axis=1, initial=0.0)
    if not np.isfinite(peak).all():
        row = int(np.flatnonzero(~np.isfinite(peak))[0])
        raise ValueError(f"row {row} of the hidden states holds a number that is not finite")
    if codec == "f32":
        return rows.astype("<f4", copy=False).tobytes()
    if codec == "f16":
        if peak.max(initial=0.0) > np.finfo(np.float16).max:
            raise ValueError(
                f"a hidden state of {peak.max():g} is too large for float16; use codec q8 or f32"
            )
        return rows.astype("<f2").tobytes()
    if codec == "q8":
        scale = (peak / 127).astype("<f4")
        # 127 times a scale that was rounded up may be more than a float32 holds.
        most = np.float32(np.finfo(np.float32).max / 127)
        scale = np.minimum(scale, np.nextafter(most, np.float32(0))).astype("<f4")
        codes = np.rint(rows / np.where(scale > 0, scale, 1)[:, None]).clip(-127, 127).astype(np.int8)
        return np.concatenate([scale[:, None].view(np.int8), codes], axis=1).tobytes()
    n, width = rows.shape
    blocks = rows.reshape(n, width // _BLOCK, _BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    if np.abs(largest).max(initial=0.0) / 8 > np.finfo(np.float16).max:
        raise ValueError(f"a hidden state of {peak.max():g} is too large for codec q4; use q8 or f32")
    scale = (largest / -8).astype("<f2")
    divisor = np.where(scale != 0, scale, 1).astype(np.float32)[:, :, None]
    digits = (np.rint(blocks / divisor).clip(-8, 7).astype(np.int8) + 8).astype(np.uint8).reshape(n, width)
    packed = digits[:, 0::2] | (digits[:, 1::2] << 4)
    return np.concatenate([scale.view(np.uint8).reshape(n, 2 * scale.shape[1]), packed], axis=1).tobytes()


def decode(data: bytes, n_rows: int, n_embd: int, codec: str) -> npt.NDArray[np.float32]:
    """The inverse of :func:`encode`, as far as there is one: float32 (n_rows, n_embd).

    Raises:
        ValueError: not as many bytes as so many rows have, or numbers that are not finite.

    """
    size = row_bytes(codec, n_embd)
    if len(data) != n_rows * size:
        raise ValueError(
            f"{n_rows} rows of {n_embd} numbers are {n_rows * size} bytes as {codec}, not {len(data)}"
        )
    if codec == "f32":
        rows = np.frombuffer(data, dtype="<f4").reshape(n_rows, n_embd).astype(np.float32)
    elif codec == "f16":
        rows = np.frombuffer(data, dtype="<f2").reshape(n_rows, n_embd).astype(np.float32)
    else:
        raw = np.frombuffer(data, dtype=np.uint8).reshape(n_rows, size)
        if codec == "q8":
            scale = np.ascontiguousarray(raw[:, :4]).view("<f4").astype(np.float32)
            digits = raw[:, 4:].view(np.int8).astype(np.float32)
        else:
            n_scales = n_embd // _BLOCK
            halves = np.ascontiguousarray(raw[:, : 2 * n_scales]).view("<f2").astype(np.float32)
            scale = halves.repeat(_BLOCK, axis=1)
            packed = raw[:, 2 * n_scales :]
            digits = np.stack([packed & 15, packed >> 4], axis=2).reshape(n_rows, n_embd).astype(np.float32)
            digits -= 8
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            rows = digits * scale
    if not np.isfinite(rows).all():
        raise ValueError("the hidden states hold a number that is not finite")
    return rows


def across(rows: npt.NDArray[np.float32], codec: str) -> npt.NDArray[np.float32]:
    """``rows``, float32 (n, n_embd), as they are on the other side of the link.

    Raises:
        ValueError: as :func:`encode`.

    """
    return decode(encode(rows, codec), len(rows), rows.shape[1], codec)

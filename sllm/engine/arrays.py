"""Arrays and numbers that callers hand over: checked before a pointer of theirs is taken."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt


__all__ = [
    "FLOAT32",
    "INT32",
    "common_prefix",
    "float32_array",
    "hidden_array",
    "int32_array",
    "int_list",
    "positions",
    "ragged_int32",
]


INT32 = np.dtype(np.int32)
FLOAT32 = np.dtype(np.float32)


def int32_array(value: npt.ArrayLike, name: str) -> npt.NDArray[np.int32]:
    """``value`` as a one-dimensional contiguous int32 array, without a copy if it is one.

    Raises:
        TypeError: an array of another dtype, or a sequence of anything but integers.
        ValueError: another number of dimensions, not contiguous, or a value beyond int32.

    """
    if isinstance(value, np.ndarray):
        if value.dtype != INT32:
            raise TypeError(f"{name} has dtype {value.dtype}, expected int32")
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {value.shape}, expected one dimension")
        if not value.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous; pass np.ascontiguousarray({name})")
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is text, expected token ids (see Vocab.encode)")
    try:
        items = [operator.index(v) for v in value]  # type: ignore[union-attr,arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int32 array or a sequence of integers") from None
    try:
        return np.array(items, dtype=np.int32)
    except OverflowError:
        raise ValueError(f"{name} holds a value that does not fit into int32") from None


def int_list(value: npt.ArrayLike, name: str) -> list[int]:
    """``value`` as a list of integers, which may be ``value`` itself: for the few numbers of a call, where
    making an array of them takes longer than all that is done with it.

    Checked as by :func:`int32_array`, except that integers of a list may be beyond int32: cffi raises
    OverflowError when they are passed to C.
    """
    given: object = value
    if type(given) is list:
        for item in given:
            if type(item) is not int:
                break
        else:
            return given
    array = int32_array(value, name)
    items: list[int] = array.tolist()
    return items


def float32_array(value: npt.ArrayLike, name: str) -> npt.NDArray[np.float32]:
    """``value`` as a one-dimensional contiguous float32 array; numbers and sequences of numbers are
    converted.
    """
    array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one dimension")
    return array


def ragged_int32(
    rows: Iterable[npt.ArrayLike], n_rows: int, name: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """``n_rows`` token arrays of any lengths, laid end to end, and their lengths."""
    arrays = [int32_array(row, name) for row in rows]
    if len(arrays) != n_rows:
        raise ValueError(f"{name} has {len(arrays)} rows, expected one for each of {n_rows} sequences")
    lengths = np.array([len(a) for a in arrays], dtype=np.int32)
    flat = (
        arrays[0] if len(arrays) == 1 else np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    )
    return flat, lengths


def positions(pos: int | npt.ArrayLike | None, n_seqs: int, name: str) -> list[int]:
    """``n_seqs`` positions as sllm.h takes them."""
    if pos is None:
        return [-1] * n_seqs
    items = [int(pos)] if isinstance(pos, (int, np.integer)) else int_list(pos, name)
    if len(items) != n_seqs:
        raise ValueError(f"{name} has {len(items)} items, expected one for each of {n_seqs} sequences")
    for item in items:
        if item < 0:
            raise ValueError(f"{name} is {item}, expected 0 <= {name}")
    return items


def hidden_array(value: object, n_rows: int | None, n_embd: int) -> npt.NDArray[np.float32]:
    """Hidden states, checked: a contiguous float32 array (n_rows, n_embd), n_rows None: any number.

    Raises:
        TypeError: no float32 array.
        ValueError: another shape, or not contiguous.

    """
    if not isinstance(value, np.ndarray) or value.dtype != FLOAT32:
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"hidden is {found}, expected a float32 array")
    if value.ndim != 2 or value.shape[1] != n_embd or (n_rows is not None and len(value) != n_rows):
        expected = f"({'n' if n_rows is None else n_rows}, {n_embd})"
        raise ValueError(f"hidden has shape {value.shape}, expected {expected}")
    if not value.flags.c_contiguous:
        raise ValueError("hidden is not contiguous; pass np.ascontiguousarray(hidden)")
    return value


def common_prefix(a: Sequence[int] | npt.NDArray[Any], b: Sequence[int] | npt.NDArray[Any]) -> int:
    """How many items two texts begin with alike."""
    n = min(len(a), len(b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        differ = np.flatnonzero(a[:n] != b[:n])
        return int(differ[0]) if len(differ) else n
    return next((i for i, (mine, other) in enumerate(zip(a, b, strict=False)) if mine != other), n)

"""A tagger of characters that the C core runs: a bidirectional GRU with a CRF (``csrc/tagger.cpp``)."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import check, ffi, lib, read_text
from sllm.engine.arrays import INT32, int32_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["MOST_CHARACTERS", "Tagger"]

MOST_CHARACTERS = 1 << 16
"""Of one sequence."""


class Tagger:
    """The weights of a tagger, in memory. There is nothing to close, and any thread or fork may use it.

    Args:
        path: a GGUF of the layout that ``csrc/sllm.h`` describes at ``sllm_tagger_load``.

    Attributes:
        labels: what each character is labelled with, by the number of the label.

    Raises:
        ModelLoadError: the file cannot be read, is cut short, or is something else.
        UnsupportedModelError: its layout is of another version.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        out = ffi.new("sllm_tagger **")
        check(lib.sllm_tagger_load(os.fsencode(path), out), f"cannot load {os.fspath(path)}")
        self._pointer = ffi.gc(out[0], lib.sllm_tagger_free)
        self.labels: tuple[str, ...] = tuple(
            read_text(partial(lib.sllm_tagger_label, self._pointer, n)) or ""
            for n in range(lib.sllm_tagger_n_labels(self._pointer))
        )

    def __repr__(self) -> str:
        return f"<Tagger with {len(self.labels)} labels>"

    def run(self, text: str, lengths: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The likeliest labels of the characters of sentences.

        Python's lock is not held meanwhile; Ctrl-C ends it.

        Args:
            text: the sentences, one after the other.
            lengths: int32 (n,), the characters of each, at most :data:`MOST_CHARACTERS`; in sum those of
                ``text``.

        Returns:
            int32 (n_chars,): a number in :attr:`labels` for each character of ``text``.

        Raises:
            ValueError: lengths below 0 or too large, or that are not those of ``text``.

        """
        sizes = int32_array(lengths, "lengths")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(
            np.uint32, copy=False
        )
        n_chars = int(sizes.sum(dtype=np.int64)) if not (sizes < 0).any() else -1
        if n_chars != len(codes):
            raise ValueError(f"lengths are those of {n_chars} characters, expected the text's {len(codes)}")
        labels = np.empty(len(codes), dtype=INT32)
        check(
            lib.sllm_tagger_run(
                self._pointer,
                len(sizes),
                ffi.from_buffer("int32_t[]", sizes),
                ffi.from_buffer("uint32_t[]", codes),
                ffi.from_buffer("int32_t[]", labels, require_writable=True),
            )
        )
        return labels

"""What a context holds of each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import Handle, check, checked_int, ffi, lib

if TYPE_CHECKING:
    import numpy.typing as npt


__all__ = ["Memory"]


class Memory:
    """The KV cache or recurrent state of a :class:`~sllm.Context`'s sequences (llama.cpp's memory).

    A write at position p discards everything at or after p; a write that repeats what is there computes
    nothing. So a rollback needs no call here: the next write says where it begins.
    """

    def __init__(self, context: Handle, n_ctx_seq: int, n_seq_max: int) -> None:
        self._context = context
        self._n_ctx_seq = n_ctx_seq
        self._n_seq_max = n_seq_max

    def length(self, seq_id: int = 0) -> int:
        """The number of committed tokens, which is the position of the next one."""
        out = ffi.new("int32_t *")
        check(lib.sllm_memory_length(self._context._live, checked_int(seq_id, "seq_id"), out))
        return int(out[0])

    def tokens(self, seq_id: int = 0) -> npt.NDArray[np.int32]:
        """The committed tokens, int32 (length,)."""
        array = np.empty(self._n_ctx_seq, dtype=np.int32)
        out = ffi.new("int32_t *")
        check(
            lib.sllm_memory_tokens(
                self._context._live,
                checked_int(seq_id, "seq_id"),
                ffi.from_buffer("int32_t[]", array),
                len(array),
                out,
            )
        )
        return array[: out[0]].copy()

    def truncate(self, seq_id: int, pos: int) -> None:
        """Discard everything at or after ``pos``. If ``pos`` is further back than the memory can roll back
        (see ``Context.can_rollback``), some of the tokens before it are computed again at the next write.

        Raises:
            ValueError: ``pos`` is negative or beyond the length.

        """
        check(
            lib.sllm_memory_truncate(
                self._context._live, checked_int(seq_id, "seq_id"), checked_int(pos, "pos")
            )
        )

    def copy(self, source: int, target: int) -> None:
        """Make sequence ``target`` a copy of ``source``, replacing its contents."""
        check(
            lib.sllm_memory_copy(
                self._context._live, checked_int(source, "source"), checked_int(target, "target")
            )
        )

    def clear(self, seq_id: int | None = None) -> None:
        """Clear one sequence, or all of them."""
        check(
            lib.sllm_memory_clear(
                self._context._live, -1 if seq_id is None else checked_int(seq_id, "seq_id", 0)
            )
        )

    def __repr__(self) -> str:
        state = "closed" if self._context.closed else f"{self._n_seq_max} sequences"
        return f"<sllm.Memory, {state}>"

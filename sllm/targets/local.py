"""A model on this machine as the source of truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sllm._ffi import int32_array
from sllm.errors import BusyError, ContextFullError
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.context import Context
    from sllm.model import Model, Vocab
    from sllm.sampling import SamplingParams

__all__ = ["LocalGeneration", "LocalTarget"]


class LocalTarget:
    """A :class:`~sllm.Model` as a target, with a context of its own. One generation at a time.

    What the prompt shares with the text before it stays computed, so a conversation costs only its new part.

    Args:
        model: the model; stays the caller's to close.
        n_ctx, n_batch, n_ubatch, n_threads, n_threads_batch, flash_attn, type_k, type_v, offload_kqv: as for
            :class:`~sllm.Context`. For a text that does not depend on the draft to the last bit on the CPU,
            use q8_0 or q4_0 weights and ``flash_attn=True, type_k="q8_0", type_v="q8_0"``; otherwise a
            near-tie may fall the other way.

    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kqv: bool = True,
    ) -> None:
        self.model = model
        self.context: Context = model.context(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            offload_kqv=offload_kqv,
        )
        self._generation: LocalGeneration | None = None

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self.model.vocab

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> LocalGeneration:
        """Compute the prompt but for its last token, and return the generation behind it.

        Raises:
            ContextFullError: the prompt does not fit.
            BusyError: another generation is open.
            ValueError: no tokens, or one that is none.

        """
        if self._generation is not None and not self._generation.closed:
            raise BusyError("this target has a generation open; close it first, or make another LocalTarget")
        prompt = int32_array(tokens, "tokens")
        if len(prompt) == 0:
            raise ValueError("the prompt has no tokens")
        if len(prompt) > self.context.n_ctx_seq:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.context.n_ctx_seq}"
            )
        self.model.compiled(sampling)  # a bad grammar is told before the prompt is computed
        self.model.vocab.is_eog(int(prompt[-1]))  # the one token that is computed later has to be one, too
        self.context.decode(prompt[:-1], pos=0)
        self._generation = LocalGeneration(self.context, prompt, sampling, max_tokens)
        return self._generation

    def close(self) -> None:
        """Free the context. More calls do nothing."""
        if self._generation is not None:
            self._generation.close()
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sllm.LocalTarget of {self.model.path.name!r}{', closed' if self.context.closed else ''}>"


class LocalGeneration(LockstepGeneration):
    """One text of a :class:`LocalTarget`; see :class:`~sllm.targets.base.Generation`."""

    def __init__(
        self,
        context: Context,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        super().__init__(
            context.model.vocab, prompt.tolist(), max_tokens, context.n_ctx_seq, context.n_outputs_max - 1
        )
        self._context = context
        self._sampling = sampling

    @property
    def can_verify(self) -> bool:
        """Whether hints help: not for models that cannot roll back."""
        return self._context.model.can_rollback

    def _verify(self, chain: list[int]) -> tuple[tuple[int, ...], int]:
        verdict = self._context.verify(
            [0],
            self._text[-1:],
            [chain] if chain else None,
            sampling=self._sampling,
            pos=len(self._text) - 1,
            start=self._start,
        )
        n_accepted = int(verdict.n_accepted[0])
        return tuple(verdict.tokens[0, : n_accepted + 1].tolist()), n_accepted

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`."""
        if self.closed:
            return  # the context may be at work for another generation by now
        self._cancelled = True
        if not self._context.closed:
            self._context.cancel()

    def close(self) -> None:
        """Let the target open another generation. More calls do nothing."""
        self.closed = True

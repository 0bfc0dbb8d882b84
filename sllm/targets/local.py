"""A model on this machine as the source of truth."""

from __future__ import annotations

import time
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from sllm._ffi import int32_array
from sllm.errors import BusyError, CancelledError, ClosedError, ContextFullError
from sllm.targets.base import Commit

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class LocalGeneration:
    """A text of a :class:`LocalTarget`; see :class:`~sllm.targets.base.Generation`."""

    def __init__(
        self,
        context: Context,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._context = context
        self._sampling = sampling
        self._text: list[int] = prompt.tolist()
        self._start = len(prompt)
        self._asked_end = None if max_tokens is None else self._start + max_tokens
        self._end = context.n_ctx_seq if self._asked_end is None else min(self._asked_end, context.n_ctx_seq)
        self._hint: tuple[int, list[int]] = (0, [])
        self._cancelled = False
        self._is_eog = context.model.vocab.is_eog
        self.closed = False
        self.finish_reason: str | None = None
        self._check_end()

    def _check_end(self) -> None:
        if len(self._text) >= self._end:
            self.finish_reason = "length" if self._end == self._asked_end else "context"

    @property
    def can_verify(self) -> bool:
        """Whether hints help: not for models that cannot roll back."""
        return self._context.model.can_rollback

    def __iter__(self) -> LocalGeneration:
        return self

    def hint(self, pos: int, tokens: Sequence[int]) -> None:
        """See :meth:`~sllm.targets.base.Generation.hint`."""
        self._hint = (pos, list(tokens))

    def _candidate(self) -> list[int]:
        """What the hint says behind the committed text, if it agrees with that."""
        pos, tokens = self._hint
        if not tokens:
            return []
        self._hint = (0, [])
        known = len(self._text) - pos
        if pos < 0 or known < 0 or tokens[:known] != self._text[pos:]:
            return []
        room = min(self._end - len(self._text) - 1, self._context.n_outputs_max - 1)
        n_tokens = self._context.model.vocab.n_tokens
        valid = takewhile(lambda token: 0 <= token < n_tokens, tokens[known : known + max(room, 0)])
        return list(valid)

    def __next__(self) -> Commit:
        if self.closed:
            raise ClosedError("the generation is closed")
        if self._cancelled:
            raise CancelledError("the generation was cancelled")
        if self.finish_reason is not None:
            raise StopIteration
        pos = len(self._text)
        chain = self._candidate()
        began = time.perf_counter()
        verdict = self._context.verify(
            [0],
            self._text[-1:],
            [chain] if chain else None,
            sampling=self._sampling,
            pos=pos - 1,
            start=self._start,
        )
        seconds = time.perf_counter() - began
        n_accepted = int(verdict.n_accepted[0])
        tokens = tuple(verdict.tokens[0, : n_accepted + 1].tolist())
        self._text.extend(tokens)
        if self._is_eog(tokens[-1]):
            self.finish_reason = "eog"
        else:
            self._check_end()
        return Commit(pos, tokens, n_accepted, len(chain), seconds)

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

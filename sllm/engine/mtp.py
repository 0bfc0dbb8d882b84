"""A model's own heads for multi-token prediction (MTP), as its draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.engine._ffi import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.layers import Embedding
    from sllm.engine.sampling import SamplingParams

__all__ = ["Heads", "has_mtp"]


def has_mtp() -> bool:
    """Whether this build can draft with MTP heads: not where it links an installed llama.cpp that does not
    export what they need.

    Examples:
        >>> from sllm.engine.mtp import has_mtp
        >>> has_mtp()
        True

    """
    return bool(lib.sllm_has_mtp())


class Heads:
    """The heads that a model brings for multi-token prediction, drafting for one of its contexts.

    Models such as Qwen3.5, GLM-4.5 and DeepSeek-V3 were trained with a small layer that takes a token and
    the hidden state before it, and foretells the token after (2412.19437, section 2.2). Its draft costs one
    layer a token, and neither a second model nor a second prompt. What the heads keep (a KV cache of one
    layer, and a few hidden states) follows the context's memory by itself, and lives as long as the context.

    Drafting is batched over sequences, and selects with the target's position-keyed noise, as
    :meth:`Context.draft <sllm.Context.draft>` does.

    They draft for a whole model in this process (``generate(draft="mtp")``) or in a worker, and for a model
    that is split between machines where its last layers are here (:class:`~sllm.LayerRange` with ``output``
    and ``load_mtp``). EAGLE-3 and DFlash, drafts in a file of their own that read hidden states of several
    layers, are not supported.

    Args:
        context: of a model with a single head (:attr:`Model.n_mtp <sllm.Model>`), or of its last layers. Its
            memory is empty afterwards, unless the heads were made before.
        embedding: of last layers, whose file has none: that of the whole model. A row of it is read from its
            file for each drafted token, so that it takes no memory; it may be closed from here on.

    Raises:
        UnsupportedModelError: the model has no head, or several, llama.cpp does not compute with it, or this
            build cannot (:func:`has_mtp`); or the layers end before the output.
        ValueError: logits that the context has returned are still referred to; or of layers, no
            ``embedding`` of the same model is given.
        MemoryError, BusyError, ClosedError.

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model, model.context(n_ctx=256) as context:
        ...     try:
        ...         sllm.engine.mtp.Heads(context)
        ...     except sllm.UnsupportedModelError as error:
        ...         print(str(error).partition(" (")[0])
        target.gguf: there are no MTP heads among the weights

    """

    def __init__(self, context: Context, embedding: Embedding | None = None) -> None:
        self.context = context
        where = ffi.NULL
        if embedding is not None:
            found, expected = (embedding.n_tokens, embedding.n_embd), (context._n_vocab, context.model.n_embd)
            if found != expected:
                raise ValueError(
                    f"embedding has {found[0]} rows of {found[1]}, and the model of {context.model.path.name}"
                    f" {expected[0]} of {expected[1]}"
                )
            where = embedding.as_c()
        check(lib.sllm_mtp_open(context._live, where), context.model.path.name)

    def draft(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        *,
        n_max: int | Sequence[int] = 4,
        p_min: float | Sequence[float] = 0.0,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pos: int | Sequence[int] | None = None,
        start: int | Sequence[int] | None = None,
    ) -> Draft:
        """Draft up to ``n_max`` tokens for each of B sequences, one batched pass of the head a token.

        The context's memory holds the text in front of ``pos``; its ``verify`` comes next. A second call that
        passes what the first has drafted goes on from there.

        Args:
            seq_ids: B distinct sequences.
            tokens: (B,) the last committed token of each, not in memory yet; or B arrays of that token and
                an unconfirmed chain to go on from.
            n_max, p_min, sampling, start: as in :meth:`Context.draft <sllm.Context.draft>`.
            pos: where the committed token goes, at most the committed length; None: there. What the context
                holds at and after it is void.

        Returns:
            The chains. One ends early after an end-of-generation token, at the end of the context, and after
            :meth:`Context.cancel <sllm.Context.cancel>`.

        Raises:
            ValueError, TypeError, ContextFullError, CancelledError (before anything was drafted), BusyError,
            InferenceError, ClosedError.

        """
        return self.context._drafted(lib.sllm_mtp_draft, seq_ids, tokens, n_max, p_min, sampling, pos, start)

    def cancel(self) -> None:
        """Let a draft that another thread is now making end early."""
        self.context.cancel()

    def __repr__(self) -> str:
        return f"<sllm.engine.mtp.Heads of {self.context!r}>"

"""A model on this machine as the source of truth."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from sllm.engine import hub
from sllm.engine._ffi import checked_int, checked_seconds
from sllm.engine.arrays import common_prefix, int32_array
from sllm.engine.devices import server_of
from sllm.engine.model import Model
from sllm.engine.mtp import Heads
from sllm.engine.params import ContextParams, LoadParams, changes, parse_both
from sllm.errors import BusyError, ContextFullError, UnsupportedModelError
from sllm.targets.base import Scores
from sllm.targets.lockstep import LockstepGeneration, Verified

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from sllm.engine.context import Context
    from sllm.engine.params import ContextOptions, LoadOptions
    from sllm.engine.sampling import SamplingParams
    from sllm.engine.vocab import Vocab
    from sllm.generation.isolated import IsolatedGeneration, IsolatedTarget
    from sllm.messages import ChatOptions
    from sllm.targets.tree import TokenTree

    class _LocalOptions(LoadOptions, ContextOptions):
        pass


__all__ = ["LocalGeneration", "LocalTarget"]


class LocalTarget:
    """A :class:`~sllm.Model` as a target, with a context of its own. One generation at a time.

    The prefix that a prompt shares with the previous text is not computed again, so each turn of a
    conversation only computes its new tokens.

    **Isolated**, the model runs in a child process, used over a local socket like a worker. If that process
    ends (llama.cpp aborts it when an RPC server is lost), the text being read raises :class:`~sllm.RPCError`
    with what had been committed (its ``tokens`` and ``text``), and this process continues. It can resume the
    text on another target: prompt and tokens are the new prompt, and with the same ``sampling`` the text is
    what it would have been. The isolated target itself can no longer be used.

    Args:
        model: a model, which the caller closes; or the path of one, which is loaded for this target and freed
            with it.
        isolated: run the model, which must be given as a path, in a child process; None: if ``devices`` names
            devices of RPC servers.
        deadline: isolated: seconds without an answer after which an RPC server counts as lost.
        options: how to load the model, if it is a path (:class:`~sllm.engine.params.LoadParams`, without
            ``progress`` and ``vocab_only``), and how to compute (:class:`~sllm.engine.params.ContextParams`,
            without ``n_seq_max``, ``n_outputs_max`` and ``kv_unified``). For a text that on the CPU is the
            same with any draft, to the last bit, use q8_0 or q4_0 weights and ``flash_attn=True,
            type_k="q8_0", type_v="q8_0"``; otherwise a near-tie may fall the other way.

    Raises:
        RPCError: isolated: an RPC server cannot be reached, or the process has ended while it loaded the
            model.
        TypeError, ValueError: an argument of another type or out of range.

    Attributes:
        model: the model; isolated: only its vocabulary and metadata.
        isolated: whether it runs in a child process.

    Examples:
        >>> with sllm.LocalTarget(sllm.embedded.TARGET, n_ctx=512) as target:
        ...     stream = sllm.generate(target, "Once upon a time", draft="ngram", max_tokens=8)
        ...     len(stream.text()) > 0, stream.stats.n_tokens <= 8
        (True, True)

    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        *,
        isolated: bool | None = None,
        deadline: float = 60.0,
        **options: Unpack[_LocalOptions],
    ) -> None:
        loading, computing = parse_both(
            options,
            LoadParams(),
            ContextParams(),
            without=("progress", "vocab_only", "n_seq_max", "n_outputs_max", "kv_unified"),
        )
        if isolated is None:
            isolated = any(server_of(device) is not None for device in loading.devices or ())
        self.isolated = isolated
        self._generation: LocalGeneration | IsolatedGeneration | None = None
        self._process: IsolatedTarget | None = None
        self._context: Context | None = None
        self._heads: Heads | None = None
        self._own: Model | None = None
        if isinstance(model, Model):
            _check_loaded(isolated, loading)
            self.model = model
        elif isolated:
            deadline = checked_seconds(deadline, "deadline")
            from sllm.generation.isolated import IsolatedTarget

            path = hub.resolve(model).absolute()
            self._process = IsolatedTarget(path, changes(loading), changes(computing), deadline=deadline)
            self.model = self._process.model
            return
        else:
            self.model = self._own = Model(model, loading)
        try:
            self._context = self.model.context(computing)
        except BaseException:
            if self._own is not None:
                self._own.close()
            raise

    @property
    def context(self) -> Context:
        """The context.

        Raises:
            UnsupportedModelError: isolated: it is in the other process.

        """
        if self._context is None:
            raise UnsupportedModelError("the context of an isolated LocalTarget is in a process of its own")
        return self._context

    def heads(self) -> Heads:
        """The model's own heads for multi-token prediction, which draft for this target from now on.

        The first call empties the context, so that the next prompt is computed as a whole.

        Raises:
            UnsupportedModelError: the model has no heads that can draft; isolated: they are in the other
                process.
            BusyError: a generation is open.

        """
        if self._process is not None:
            raise UnsupportedModelError(
                "the MTP heads of an isolated LocalTarget are in a process of their own; use another draft"
            )
        if self._heads is None:
            self._check_idle()
            self._heads = Heads(self.context)
        return self._heads

    def _check_idle(self) -> None:
        if self._generation is not None and not self._generation.closed:
            raise BusyError("this target has a generation open; close it first, or make another LocalTarget")

    @property
    def pid(self) -> int:
        """The id of the process in which the model runs."""
        return os.getpid() if self._process is None else self._process.pid

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self.model.vocab

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> LocalGeneration | IsolatedGeneration:
        """Compute the prompt except for its last token, and return the generation after it; isolated, without
        waiting for the prompt.

        Raises:
            ContextFullError: the prompt does not fit.
            BusyError: another generation is open.
            RPCError: isolated: the process has ended.
            ValueError: no tokens, or one outside the vocabulary.

        """
        self._check_idle()
        if self._process is not None:
            self._generation = self._process.open(tokens, sampling, max_tokens)
            return self._generation
        prompt = int32_array(tokens, "tokens")
        if len(prompt) == 0:
            raise ValueError("the prompt has no tokens")
        if len(prompt) > self.context.n_ctx_seq:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.context.n_ctx_seq}"
            )
        self.model.compiled(sampling)  # rejects a bad grammar before the prompt is computed
        self.model.vocab.is_eog(int(prompt[-1]))  # the one token that is computed later has to be one, too
        n_shared = common_prefix(self.context.memory.tokens(0), prompt[:-1])
        self.context.decode(prompt[:-1], pos=0)
        self._generation = LocalGeneration(self.context, prompt, sampling, max_tokens, n_shared)
        return self._generation

    def cancel(self) -> None:
        """End what another thread computes here, such as a prompt in :func:`~sllm.generate`, which raises
        CancelledError there. From any thread; later calls are not affected.
        """
        if self._context is None:
            if self._generation is not None:
                self._generation.cancel()
        elif not self._context.closed:
            self._context.cancel()

    @property
    def chat_template(self) -> str | None:
        """The file's chat template; see :attr:`sllm.Model.chat_template`."""
        return self.model.chat_template

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation by the file's chat template; see :meth:`sllm.Model.chat`."""
        return self.model.chat(messages, **options)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the model finds ``tokens[start:]``, in one pass; see :class:`~sllm.targets.base.Scorer`.

        Raises:
            ContextFullError: the text does not fit.
            BusyError: a generation is open.
            RPCError: isolated: the process has ended.
            ValueError: a token outside the vocabulary, or no ``1 <= start < n``.

        """
        self._check_idle()
        text = int32_array(tokens, "tokens")
        checked_int(start, "start", 1, max(len(text) - 1, 1))
        if self._process is not None:
            return self._process.score(text, start)
        if len(text) - 1 > self.context.n_ctx_seq:
            raise ContextFullError(
                f"the text has {len(text)} tokens, and the context holds {self.context.n_ctx_seq}"
            )
        began = time.perf_counter()
        known = self.context.memory.tokens(0)
        n_reused = common_prefix(known, text[: start - 1])
        self.context.decode(text[: start - 1], pos=0)
        logprobs, ranks = self.context.token_logprobs(text[start - 1 :], pos=start - 1)
        return Scores(logprobs, ranks, n_reused, time.perf_counter() - began)

    def close(self) -> None:
        """Free the context, and the model that was loaded for it. More calls do nothing."""
        if self._generation is not None:
            self._generation.close()
        if self._process is not None:
            self._process.close()
        if self._context is not None:
            self._context.close()
        if self._own is not None:
            self._own.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self.model.closed if self._context is None else self._context.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" in process {self.pid}" if self.isolated else ""
        return f"<sllm.LocalTarget of {self.model.path.name!r}{where}{', closed' if self.closed else ''}>"


def _check_loaded(isolated: bool, loading: LoadParams) -> None:
    """Reject what makes no sense with a model that is loaded already."""
    if isolated:
        raise TypeError("a loaded Model lives in this process; isolated=True takes the path of one")
    given = changes(loading)
    if given:
        raise TypeError(
            f"{', '.join(given)} belong to loading, and the Model is loaded; pass its path instead"
        )


class LocalGeneration(LockstepGeneration):
    """One text of a :class:`LocalTarget`; see :class:`~sllm.targets.base.Generation`."""

    def __init__(
        self,
        context: Context,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
        n_shared: int = 0,
    ) -> None:
        self.n_shared = n_shared
        super().__init__(
            context.model.vocab,
            prompt.tolist(),
            max_tokens,
            context.n_ctx_seq,
            context.max_draft,
            can_branch=context.can_branch,
        )
        self._context = context
        self._sampling = sampling

    def _verify(self, tree: TokenTree) -> Verified:
        verdict = self._context.verify(
            [0],
            self._text[-1:],
            [tree.tokens] if tree else None,
            parents=None if tree.is_chain else [tree.parents],
            sampling=self._sampling,
            pos=len(self._text) - 1,
            start=self._start,
        )
        n_accepted = int(verdict.n_accepted[0])
        tokens = tuple(verdict.tokens[0, : n_accepted + 1].tolist())
        return Verified(tokens, n_accepted, len(tree))

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

"""``generate()``: one function for every target and every drafter."""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sllm.draft.drafters import CallableDrafter, Drafter, ModelDrafter, MtpDrafter, NGramDrafter
from sllm.engine.arrays import int32_array
from sllm.engine.cpu import available_cores
from sllm.engine.model import Model
from sllm.engine.params import context_length
from sllm.engine.sampling import SamplingParams
from sllm.errors import UnsupportedModelError
from sllm.generation.alternating import AlternatingRuns
from sllm.generation.local import LocalTarget
from sllm.generation.pipelined import PipelinedRuns
from sllm.generation.text_stream import GenerationStats, TextBuilder, TextStream
from sllm.targets.base import Generation, MtpTarget, PipelinedGeneration, RemoteWork, Target
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

__all__ = ["can_overlap", "generate", "make_drafter", "share_cores"]

log = logging.getLogger("sllm")

_DRAFTS = 'a Model, "mtp", "ngram", a callable or None'


# The whole way in one function, so that it reads as the algorithm; half of it is the docstring.
def generate(
    target: Target | Model,
    prompt: str | npt.NDArray[np.int32] | Sequence[int],
    *,
    draft: Model | Drafter | Callable[..., Any] | str | None = None,
    sampling: SamplingParams | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = (),
    special: bool = False,
) -> TextStream:
    """Generate the target's text after ``prompt``, faster with a draft.

    The text is a function of the target's weights, the prompt and ``sampling`` alone. The draft changes how
    fast it comes, never what it says (up to floating-point rounding: :class:`~sllm.LocalTarget` says when it
    is equal to the last bit).

    Args:
        target: what decides the text. A :class:`~sllm.Model` gets a :class:`~sllm.LocalTarget` for this one
            text, which computes the whole prompt; for a conversation make one yourself, so that each turn
            only computes its new tokens. ``connect(uri).target()`` is a model on another machine. If the
            target has a ``chat_template``, reasoning marks that the template writes as plain text are
            recognised (:class:`Run`), besides those that are tokens.
        prompt: text, or token ids, such as :meth:`Model.chat <sllm.Model.chat>` and the ``chat()`` of targets
            make from messages. Control tokens in text are not parsed.
        draft: a small :class:`~sllm.Model` with the same vocabulary, ``"mtp"`` (the target's own heads for
            multi-token prediction, :class:`sllm.engine.mtp.Heads`; for a model in this process, or one that
            is split with its last layers here), ``"ngram"`` (prompt lookup), a callable ``(tokens, n_max) ->
            tokens``, a drafter of :mod:`sllm.draft.drafters`, or None.
        sampling: None: ``SamplingParams()``.
        max_tokens: maximum number of tokens, >= 1; None: until the model ends or the context is full.
        stop: strings that end the text; they are not part of it. None: no such string.
        special: show control tokens in the text, such as the one that ends it; ``stop`` then also matches
            them.

    Returns:
        An iterator of :class:`Run` with ``.text()`` and ``.stats``, for ``async for`` as well (this function
        itself computes the prompt of a local target before it returns). The caller closes the models and
        targets that it passes in.

    Raises:
        ValueError, TypeError: an argument out of range or of another type, such as messages for the prompt.
        VocabMismatchError: target and draft do not share a vocabulary.
        UnsupportedModelError: ``"mtp"``, but the target has no heads here.
        ContextFullError: the prompt does not fit.
        BusyError: the target has no free place for another text. Errors of a remote target (refusals, and
            RemoteError when it is lost) are raised when the text is read.

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model, sllm.Model(sllm.embedded.DRAFT) as small:
        ...     stream = sllm.generate(model, "Once upon a time", draft=small, max_tokens=16)
        ...     text = stream.text()
        >>> bool(text), stream.stats.n_passes < stream.stats.n_tokens
        (True, True)

    """
    # 1. Check what was given, before anything is computed.
    sampling = SamplingParams() if sampling is None else sampling
    stops = _checked_stops(stop)
    max_tokens = _checked_count(max_tokens)
    _check(target, sampling)
    _check_prompt(prompt, target)
    vocab = target.vocab
    vocab.turn_ends()  # found on the first call, which is not to fall into the first passes
    tokens = vocab.encode(prompt) if isinstance(prompt, str) else int32_array(prompt, "prompt")
    if len(tokens) == 0:
        raise ValueError("the prompt has no tokens")

    stats = GenerationStats(n_prompt=len(tokens))
    with ExitStack() as stack:
        # 2. Models become a target and a drafter of this one text.
        target_threads, draft_threads = share_cores(target, draft)
        if isinstance(target, Model):
            n_ctx = _positions(target, len(tokens), max_tokens)
            n_rollback = 0 if draft is None else None  # snapshots cost a plain token some percent
            target = stack.enter_context(
                LocalTarget(target, n_ctx=n_ctx, n_threads=target_threads, n_rollback=n_rollback)
            )
        drafter = make_drafter(draft, target, draft_threads, stack)
        # 3. Both read the prompt.
        began = time.perf_counter()
        generation = target.open(tokens, sampling, max_tokens)
        stack.callback(generation.close)
        if isinstance(generation, LockstepGeneration):
            stats.n_reused = generation.n_shared
        if isinstance(drafter, MtpDrafter) and isinstance(generation, LockstepGeneration):
            drafter.seq_id = generation.seq_id
        if drafter is not None:
            drafter.open(tokens.tolist(), sampling)
        stats.prompt_seconds = time.perf_counter() - began
        # 4. A thread for the draft, where it can work while the target does.
        executor = None
        pipelined = generation if isinstance(generation, PipelinedGeneration) else None
        if drafter is not None and (pipelined is not None or can_overlap(target, drafter, generation)):
            executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sllm-draft"))
            stack.callback(drafter.cancel)  # or the executor would wait for it
        # 5. The loop: in turns, or each at its own pace where the target is a round trip away.
        text = tokens.tolist()
        shown = TextBuilder.after(text, vocab, stops, getattr(target, "chat_template", None), special)
        if pipelined is not None:
            pipeline = PipelinedRuns(pipelined, drafter, executor, text, shown, stats, began)
            stack.callback(pipeline.stop)
            runs = pipeline.runs()
        else:
            end = None if max_tokens is None else len(tokens) + max_tokens
            runs = AlternatingRuns(generation, drafter, executor, text, shown, stats, end).runs()

        def cancel() -> None:
            generation.cancel()
            if drafter is not None:
                drafter.cancel()  # it may be reading the prompt

        return TextStream(runs, stats, stack.pop_all(), cancel)


def _check(target: object, sampling: object) -> None:
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling is {sampling!r}, expected SamplingParams")
    if not isinstance(target, (Model, Target)):
        meant = "; its target() is one" if callable(getattr(target, "target", None)) else _file_hint(target)
        raise TypeError(f"target is {target!r}, expected a Model or a Target{meant}")


def _file_hint(given: object) -> str:
    """What to say where the name of a file stands for a model."""
    if not isinstance(given, (str, os.PathLike)):
        return ""
    return f"; sllm.Model({os.fspath(given)!r}) opens a file"


def _check_prompt(prompt: object, target: Model | Target) -> None:
    """Raises TypeError, with what to do, where the prompt is a conversation (its messages, or one of them),
    or neither a text nor tokens.
    """
    several = isinstance(prompt, Sequence) and any(isinstance(item, Mapping) for item in prompt)
    if several or isinstance(prompt, Mapping):
        found, given = ("a list of messages", "messages") if several else ("a message", "[message]")
        name = "model" if isinstance(target, Model) else "target"
        raise TypeError(
            f"the prompt is {found}, expected a text or token ids: use {name}.chat({given}), which makes the"
            " prompt of a conversation"
        )
    if prompt is None or isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"the prompt is {type(prompt).__name__}, expected a text (str) or token ids")


def _checked_stops(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, (bytes, bytearray)) or not isinstance(stop, Iterable):
        raise TypeError(f"stop is {stop!r}, expected a text or a list of texts")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("stop holds something that is not a text, or an empty one")
    return stops


def _checked_count(max_tokens: object) -> int | None:
    if max_tokens is None:
        return None
    try:
        count = 0 if isinstance(max_tokens, bool) else operator.index(max_tokens)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, expected an integer >= 1 or None")
    return count


def _positions(model: Model, n_prompt: int, max_tokens: int | None) -> int:
    """Positions for one text: what it may need, room for 256 tokens at least, within what was trained."""
    trained = model.n_ctx_train or context_length(0)
    wanted = context_length(0) if max_tokens is None else n_prompt + max_tokens + 1
    return max(min(trained, wanted), min(trained, n_prompt + 256))


def share_cores(target: Target | Model, draft: object) -> tuple[int | None, int | None]:
    """Number of threads for a target and a draft model that get contexts here; None: the default.

    ggml's threads spin while they wait, so two contexts that compute at once must not have more threads than
    there are cores. With few cores the two take turns and each uses all cores instead.
    """
    cores = available_cores()
    if not isinstance(target, Model) or not isinstance(draft, Model) or cores < 4:
        return None, None
    for_draft = max(1, cores // 4)
    return cores - for_draft, for_draft


def can_overlap(target: Target, drafter: Drafter, generation: Generation) -> bool:
    """Whether the draft can continue while the target verifies, without taking the target's cores."""
    if isinstance(generation, RemoteWork) and isinstance(drafter, ModelDrafter):
        return True  # it waits for the link most of the time
    if not isinstance(target, LocalTarget) or target.isolated or not isinstance(drafter, ModelDrafter):
        return False
    busy = 1 if target.model.offloaded else max(target.context.n_threads, target.context.n_threads_batch)
    return busy + drafter.context.n_threads <= available_cores()


def make_drafter(draft: object, target: Target, n_threads: int | None, stack: ExitStack) -> Drafter | None:
    """What ``generate(draft=...)`` means; contexts made here are closed with ``stack``."""
    if draft is None:
        return None
    model = draft if isinstance(draft, Model) else draft.model if isinstance(draft, ModelDrafter) else None
    if model is not None:
        target.vocab.check_same(model.vocab)
    if isinstance(draft, Model):
        local = target if isinstance(target, LocalTarget) and not target.isolated else None
        n_ctx = context_length(draft.n_ctx_train)
        if local is not None:
            n_ctx = min(draft.n_ctx_train or context_length(0), local.context.n_ctx_seq)
        return stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=n_threads))
    if isinstance(draft, str):
        if draft == "mtp":
            return _heads_of(target)
        if draft != "ngram":
            raise ValueError(f"draft is {draft!r}, expected {_DRAFTS}{_file_hint(draft)}")
        return NGramDrafter()
    if isinstance(draft, Drafter):
        return draft
    if callable(draft):
        return CallableDrafter(draft)
    raise TypeError(f"draft is {draft!r}, expected {_DRAFTS}{_file_hint(draft)}")


def _heads_of(target: Target) -> MtpDrafter:
    """The target's own heads, which read what the last layer of the model computes."""
    if isinstance(target, MtpTarget):
        return MtpDrafter(target.heads())
    raise UnsupportedModelError(
        f'draft="mtp" is for a model whose last layers are here, and the target is a {type(target).__name__}:'
        " a worker drafts with the heads of its model by itself (sllm worker --mtp)"
    )

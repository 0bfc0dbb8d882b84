"""``generate()``: one loop for every target and every drafter."""

from __future__ import annotations

import codecs
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm._ffi import int32_array
from sllm.context import available_cores
from sllm.draft_length import DraftLength
from sllm.drafters import CallableDrafter, Drafter, ModelDrafter, NGramDrafter
from sllm.model import Model
from sllm.sampling import SamplingParams
from sllm.targets.base import Commit, Generation, Target
from sllm.targets.local import LocalTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.model import Vocab

__all__ = ["GenerationStats", "Run", "TextStream", "generate"]

log = logging.getLogger("sllm")
_told_no_rollback: set[str] = set()


@dataclass(frozen=True)
class Run:
    """Some tokens of the text, in order, with no gap to the run before.

    Attributes:
        pos: the absolute position of the first token.
        tokens: the token ids.
        text: what becomes readable with them. A character whose bytes are spread over tokens, and what could
            become a stop string, comes with a later run; joined, the texts are the text.
        n_accepted: how many of the tokens had been drafted.
        source: ``"draft"`` (drafted and accepted), ``"target"`` (the target's own) or ``"local"`` (the draft
            alone, unverified).

    """

    pos: int
    tokens: tuple[int, ...]
    text: str
    n_accepted: int
    source: str


@dataclass
class GenerationStats:
    """What a generation has cost so far. Times are seconds.

    Attributes:
        n_prompt: tokens of the prompt.
        n_tokens: tokens committed.
        n_passes: passes of the target behind the prompt.
        n_drafted: drafted tokens that the target checked.
        n_accepted: of these, accepted ones.
        prompt_seconds: until the prompt was computed.
        target_seconds: in passes of the target.
        draft_seconds: spent waiting for the draft.
        seconds: from the end of the prompt to the last commit, the reader's own time left out.
        finish_reason: ``"eog"``, ``"length"``, ``"context"``, ``"stop"`` (a stop string), or None as long as
            it goes on.

    """

    n_prompt: int = 0
    n_tokens: int = 0
    n_passes: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    prompt_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str | None = None

    @property
    def acceptance(self) -> float:
        """Accepted tokens per checked drafted token; 0 where none was drafted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def passes_per_token(self) -> float:
        """Passes of the target for each token; 1 without speculation."""
        return self.n_passes / self.n_tokens if self.n_tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens per second behind the prompt."""
        return self.n_tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Text:
    """Turns tokens into text: no character split, nothing of a stop string shown."""

    vocab: Vocab
    stop: Sequence[str]
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    held: str = ""
    stopped: bool = False

    def feed(self, token: int) -> str:
        """The text that is certain with this token."""
        self.held += self.decoder.decode(self.vocab.piece(token))
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            self.held, shown = "", self.held[: min(found)]
            return shown
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def finish(self) -> str:
        """What is left at the end."""
        shown = self.held + self.decoder.decode(b"", final=True)
        self.held = ""
        return "" if self.stopped else shown


class TextStream:
    """A text being generated: an iterator of :class:`Run`, made by :func:`generate`.

    Iterating to the end, :meth:`close`, leaving a ``with`` block, an exception on the way and forgetting the
    object all free what the generation holds.

    Attributes:
        stats: running figures.

    """

    def __init__(self, runs: Iterator[Run], stats: GenerationStats, resources: ExitStack) -> None:
        self.stats = stats
        self._runs = runs
        self._resources = resources

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Run:
        try:
            return next(self._runs)
        except BaseException:
            self.close()  # also at the end of the text
            raise

    def text(self) -> str:
        """The rest of the text, generated to its end."""
        return "".join(run.text for run in self)

    def close(self) -> None:
        """Stop generating. More calls do nothing."""
        self._runs = iter(())
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_resources"):
            self.close()

    def __repr__(self) -> str:
        return f"<sllm.TextStream, {self.stats.n_tokens} tokens, {self.stats.finish_reason or 'going on'}>"


def generate(
    target: Target | Model,
    prompt: str | npt.NDArray[np.int32] | Sequence[int],
    *,
    draft: Model | Drafter | Callable[..., Any] | str | None = None,
    sampling: SamplingParams | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
) -> TextStream:
    """Generate the target's text behind ``prompt``, sooner with a draft.

    The text is a function of the target's weights, the prompt and ``sampling`` alone. The draft changes when
    it comes, never what it
    says (up to floating point: see :class:`~sllm.LocalTarget` for when that is to the last bit).

    Args:
        target: what decides the text. A :class:`~sllm.Model` gets a :class:`~sllm.LocalTarget` for this one
            text.
        prompt: text, or token ids such as :meth:`Model.chat <sllm.Model.chat>` makes. Control tokens in text
            are not parsed.
        draft: a small :class:`~sllm.Model` with the same vocabulary, ``"ngram"`` (prompt lookup), a callable
            ``(tokens, n_max) -> tokens``, a drafter of :mod:`sllm.drafters`, or None.
        sampling: None: ``SamplingParams()``.
        max_tokens: at most so many tokens, >= 1; None: until the model ends or the context is full.
        stop: strings that end the text; they are not part of it.

    Returns:
        An iterator of :class:`Run` with ``.text()`` and ``.stats``. Models and targets passed in stay the
        caller's to close.

    Raises:
        ValueError, TypeError: an argument out of range or of another type.
        VocabMismatchError: target and draft do not share a vocabulary.
        ContextFullError: the prompt does not fit.

    """
    if sampling is None:
        sampling = SamplingParams()
    elif not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling is {sampling!r}, expected SamplingParams")
    if max_tokens is not None and (
        isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
    ):
        raise ValueError(f"max_tokens is {max_tokens!r}, expected an integer >= 1 or None")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("stop holds something that is no text, or empty")
    if not isinstance(target, (Model, Target)):
        raise TypeError(f"target is {target!r}, expected a Model or a Target")
    vocab = target.vocab
    tokens = vocab.encode(prompt) if isinstance(prompt, str) else int32_array(prompt, "prompt")
    if len(tokens) == 0:
        raise ValueError("the prompt has no tokens")

    stats = GenerationStats(n_prompt=len(tokens))
    with ExitStack() as stack:
        target_threads, draft_threads = _share_cores(target, draft)
        if isinstance(target, Model):
            n_ctx_train = target.n_ctx_train or 4096
            n_ctx = min(n_ctx_train, 4096 if max_tokens is None else len(tokens) + max_tokens + 1)
            n_ctx = max(n_ctx, min(n_ctx_train, len(tokens) + 256))
            target = stack.enter_context(LocalTarget(target, n_ctx=n_ctx, n_threads=target_threads))
        drafter = _make_drafter(draft, target, draft_threads, stack)
        began = time.perf_counter()
        generation = target.open(tokens, sampling, max_tokens)
        stack.callback(generation.close)
        if drafter is not None:
            drafter.open(tokens.tolist(), sampling)
        stats.prompt_seconds = time.perf_counter() - began
        executor = None
        if drafter is not None and _can_overlap(target, drafter):
            executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sllm-draft"))
        runs = _runs(generation, drafter, executor, tokens.tolist(), _Text(vocab, stops), stats)
        return TextStream(runs, stats, stack.pop_all())


def _share_cores(target: Target | Model, draft: object) -> tuple[int | None, int | None]:
    """Threads for a target and a draft model that get contexts here; None: the default.

    ggml's threads spin while they wait, so two contexts at work at once must not have more of them than there
    are cores. With few cores the two take turns with all of them instead.
    """
    cores = available_cores()
    if not isinstance(target, Model) or not isinstance(draft, Model) or cores < 4:
        return None, None
    for_draft = max(1, cores // 4)
    return cores - for_draft, for_draft


def _can_overlap(target: Target, drafter: Drafter) -> bool:
    """Whether the draft can go on while the target verifies without taking its cores."""
    if not isinstance(target, LocalTarget) or not isinstance(drafter, ModelDrafter):
        return False
    busy = 1 if target.model.offloaded else max(target.context.n_threads, target.context.n_threads_batch)
    return busy + drafter.context.n_threads <= available_cores()


def _make_drafter(draft: object, target: Target, n_threads: int | None, stack: ExitStack) -> Drafter | None:
    """What ``generate(draft=...)`` means; contexts made here are closed with ``stack``."""
    if draft is None:
        return None
    model = draft if isinstance(draft, Model) else draft.model if isinstance(draft, ModelDrafter) else None
    if model is not None:
        target.vocab.check_same(model.vocab)
    unable = [m for m in (model, getattr(target, "model", None)) if m is not None and not m.can_rollback]
    if unable:
        name = unable[0].path.name
        if name not in _told_no_rollback:
            _told_no_rollback.add(name)
            log.warning(
                "%s (%s) cannot take back single tokens; generating without speculation",
                name,
                unable[0].architecture,
            )
        return None
    if isinstance(draft, Model):
        n_ctx = min(
            draft.n_ctx_train or 4096, target.context.n_ctx_seq if isinstance(target, LocalTarget) else 4096
        )
        return stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=n_threads))
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f'draft is {draft!r}, expected a Model, "ngram", a callable or None')
        return NGramDrafter()
    if isinstance(draft, Drafter):
        return draft
    if callable(draft):
        return CallableDrafter(draft)
    raise TypeError(f'draft is {draft!r}, expected a Model, "ngram", a callable or None')


def _runs(
    generation: Generation,
    drafter: Drafter | None,
    executor: ThreadPoolExecutor | None,
    text: list[int],
    shown: _Text,
    stats: GenerationStats,
) -> Iterator[Run]:
    """The hint loop: draft, hint, take what the target commits, keep what of the draft still holds."""
    length = DraftLength()
    chain: list[int] = []
    stats.finish_reason = generation.finish_reason  # a prompt may leave no room for a text
    while generation.finish_reason is None:
        began = time.perf_counter()
        ahead = None
        spent = 0.0  # on drafting
        settled = True  # a round in which the draft had to read a prompt tells nothing about the next
        if drafter is not None:
            n_max, p_min = length.choose() if drafter.adaptive else (DraftLength.LIMIT, 0.0)
            wanted = n_max - len(chain)
            if wanted > 0:
                new = drafter.draft(text, chain, wanted, p_min)
                spent = time.perf_counter() - began
                stats.draft_seconds += spent
                settled = drafter.n_caught_up <= DraftLength.LIMIT
                if settled:
                    length.observe_draft(len(new) + (len(new) < wanted), spent)
                chain += new
            del chain[n_max:]
            generation.hint(len(text), chain)
            if executor is not None and chain:
                ahead = executor.submit(drafter.draft, text, list(chain), n_max + 1, p_min)
        try:
            commit = next(generation)
        finally:
            if ahead is not None and drafter is not None:
                drafter.cancel()
                chain = chain + ahead.result()
        seconds = time.perf_counter() - began
        length.observe_pass(commit.n_verified, commit.n_accepted, commit.seconds)
        if settled and (commit.n_verified > 0 or spent > 0.05 * commit.seconds):
            length.observe_round(len(commit.tokens), seconds)
        stats.n_passes += 1
        stats.n_drafted += commit.n_verified
        stats.n_accepted += commit.n_accepted
        stats.target_seconds += commit.seconds
        stats.seconds += seconds

        text.extend(commit.tokens)
        n_new = len(commit.tokens)
        chain = chain[n_new:] if tuple(chain[:n_new]) == commit.tokens else []
        yield from _split(commit, generation, shown, stats)
        if shown.stopped:
            return


def _split(commit: Commit, generation: Generation, shown: _Text, stats: GenerationStats) -> Iterator[Run]:
    """One commit as a run of accepted tokens and a run of the target's own."""
    parts = [("draft", commit.pos, commit.tokens[: commit.n_accepted])]
    parts.append(("target", commit.pos + commit.n_accepted, commit.tokens[commit.n_accepted :]))
    for source, pos, tokens in parts:
        used: list[int] = []
        text = ""
        for token in tokens:
            used.append(token)
            text += shown.feed(token)
            if shown.stopped:
                break
        if not used:
            continue
        stats.n_tokens += len(used)
        if shown.stopped:
            stats.finish_reason = "stop"
        elif source == "target" and generation.finish_reason is not None:
            stats.finish_reason = generation.finish_reason
            text += shown.finish()
        yield Run(pos, tuple(used), text, len(used) if source == "draft" else 0, source)
        if shown.stopped:
            return

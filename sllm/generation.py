"""``generate()``: one loop for every target and every drafter."""

from __future__ import annotations

import codecs
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

from sllm._ffi import int32_array
from sllm.context import available_cores
from sllm.draft_ahead import DraftAhead
from sllm.draft_length import DraftLength
from sllm.drafters import CallableDrafter, Drafter, ModelDrafter, NGramDrafter
from sllm.model import Model
from sllm.sampling import SamplingParams
from sllm.targets.base import Commit, Generation, PipelinedGeneration, RemoteStats, Target
from sllm.targets.local import LocalTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

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
            alone, unverified, while the link to a remote target is lost).
        withdrawn: the ``"local"`` runs before this one that no longer count: this run stands where they
            began.

    """

    pos: int
    tokens: tuple[int, ...]
    text: str
    n_accepted: int
    source: str
    withdrawn: tuple[Run, ...] = ()


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
        draft_seconds: spent waiting for the draft; with a remote target, which nobody waits for: the draft's
            time at work.
        wasted_seconds: of the draft's time, what went into tokens that were rejected, or void behind rejected
            ones (remote targets).
        seconds: from the end of the prompt to the last commit, the reader's own time left out (with a remote
            target it counts: the text goes on meanwhile).
        n_local: unverified tokens that were shown while the link was lost.
        remote: what the link to a remote target has cost; None for others.
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
    wasted_seconds: float = 0.0
    seconds: float = 0.0
    n_local: int = 0
    remote: RemoteStats | None = None
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

    def copy(self) -> _Text:
        """The same state, to go on with on trial."""
        twin = _Text(self.vocab, self.stop, held=self.held, stopped=self.stopped)
        twin.decoder.setstate(self.decoder.getstate())
        return twin

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
        """The rest of the text, generated to its end, without what was withdrawn on the way."""
        parts: list[str] = []
        for run in self:
            del parts[max(0, len(parts) - len(run.withdrawn)) :]
            parts.append(run.text)
        return "".join(parts)

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
            text; ``connect(uri).target()`` is a model on another machine.
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
        BusyError: the target has no place for another text. A remote target's refusals and its loss
            (RemoteError) are raised where the text is being read.

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
        pipelined = generation if isinstance(generation, PipelinedGeneration) else None
        if drafter is not None and (pipelined is not None or _can_overlap(target, drafter)):
            executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sllm-draft"))
            stack.callback(drafter.cancel)  # or the executor would wait for it
        text, shown = tokens.tolist(), _Text(vocab, stops)
        if pipelined is not None:
            pipeline = _PipelinedRuns(pipelined, drafter, executor, text, shown, stats, began)
            stack.callback(pipeline.stop)
            runs = pipeline.runs()
        else:
            runs = _runs(generation, drafter, executor, text, shown, stats)
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


class _Prefix(Sequence[int]):
    """The first items of a list that only ever grows, to be read by another thread without a copy."""

    def __init__(self, items: list[int], length: int) -> None:
        self._items = items
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self._items[start:stop:step]
        return self._items[range(self._length)[index]]


class _PipelinedRuns:
    """The hint loop for a target that is a round trip away: nobody waits for anybody.

    Commits come when they come. Meanwhile the draft goes on along its own chain, on a thread of its own, and
    the whole chain is sent whenever it has grown. A commit that disagrees makes the chain void, and drafting
    starts again from the truth.
    """

    def __init__(
        self,
        generation: PipelinedGeneration,
        drafter: Drafter | None,
        executor: ThreadPoolExecutor | None,
        text: list[int],
        shown: _Text,
        stats: GenerationStats,
        began: float,
    ) -> None:
        self._began = began
        self._pid = os.getpid()
        self._stopped = False
        self._generation = generation
        self._drafter = drafter
        self._executor = executor
        self._text = text
        self._shown = shown
        self._stats = stats
        self._ahead = DraftAhead(run_ahead=generation.run_ahead)
        self._chain: list[int] = []  # drafted behind the text, unconfirmed
        self._probs: list[float] = []  # what the draft says of them
        self._draft: Future[tuple[list[int], list[float], float]] | None = None  # on its way
        self._draft_pos = 0  # and where its tokens go
        self._draft_void = False  # a commit has disagreed with what it goes on from
        self._exhausted = drafter is None  # the draft has nothing to say behind this chain
        self._hinted: tuple[int, int] | None = None  # end of the text and of the chain as last sent
        self._hinted_at = self._news_at = time.perf_counter()
        self._local: list[Run] = []  # shown while the link is lost
        self._local_shown: _Text | None = None
        stats.remote = generation.remote

    def runs(self) -> Iterator[Run]:
        """The text, run by run."""
        generation, stats = self._generation, self._stats
        began = self._began
        stats.finish_reason = generation.finish_reason
        while generation.finish_reason is None:
            commit = generation.poll(0.0)
            if commit is None:
                self._take_draft()
                self._draft_more()
                yield from self._show_local()
                commit = generation.poll(self._send_hint())
            if commit is None:
                continue
            self._news_at = time.perf_counter()
            if stats.n_passes == 0:
                opened = generation.opened_at or self._news_at
                stats.prompt_seconds = opened - began
                began = opened
            stats.seconds = self._news_at - began
            self._apply(commit)
            withdrawn, self._local, self._local_shown = tuple(self._local), [], None
            for run in _split(commit, generation, self._shown, stats):
                yield replace(run, withdrawn=withdrawn) if withdrawn else run
                withdrawn = ()
            if self._shown.stopped:
                return
        if stats.finish_reason is None:  # it ended behind a commit that did not look like the last
            stats.finish_reason = generation.finish_reason
            rest = self._shown.finish()
            if rest:
                yield Run(len(self._text), (), rest, 0, "target")

    def stop(self) -> None:
        """Let a draft that is being made end."""
        self._stopped = True
        if self._pid != os.getpid() or self._drafter is None or self._executor is None:
            return  # after a fork the thread is the parent's
        try:
            idle = self._executor.submit(lambda: None)
        except RuntimeError:  # the interpreter is ending and has waited for the draft already
            return
        while not idle.done():
            self._drafter.cancel()  # again and again: what is cancelled before it begins is not cancelled
            wait([idle], timeout=0.02)

    # -- the draft

    def _draft_more(self) -> None:
        drafter, executor = self._drafter, self._executor
        if self._draft is not None or self._exhausted or drafter is None or executor is None:
            return
        if self._stopped or len(self._text) + len(self._chain) >= self._generation.end:
            return
        if not self._goes_alone() and not self._ahead.worth_more(
            self._probs, time.perf_counter() - self._news_at
        ):
            return
        text, chain, n = _Prefix(self._text, len(self._text)), list(self._chain), self._ahead.step

        def draft() -> tuple[list[int], list[float], float]:
            began = time.perf_counter()
            if self._stopped:
                return [], [], 0.0
            tokens = drafter.draft(text, chain, n, 0.0)
            seconds = time.perf_counter() - began
            settled = drafter.n_caught_up <= DraftLength.LIMIT  # else it was mostly the reading of a prompt
            probs = list(getattr(drafter, "probs", ()))[: len(tokens)]
            return tokens, probs, seconds if settled else 0.0

        self._draft = executor.submit(draft)
        self._draft_pos = len(text) + len(chain)
        self._draft_void = False
        self._draft.add_done_callback(lambda _: self._generation.wake())

    def _take_draft(self) -> None:
        """What the draft has made, if it has, behind the chain."""
        if self._draft is None or not self._draft.done():
            return
        tokens, probs, seconds = self._draft.result()
        self._draft = None
        self._stats.draft_seconds += seconds
        if seconds:
            self._ahead.observe_draft(max(len(tokens), 1), seconds)
        n_drafted, tokens = len(tokens), self._usable(tokens)
        if len(probs) < len(tokens):
            probs = [self._ahead.acceptance] * len(tokens)
        passed = len(self._text) - self._draft_pos  # tokens that were committed meanwhile
        if (
            not self._draft_void
            and passed > 0
            and tokens[:passed] != self._text[self._draft_pos :][: len(tokens)]
        ):
            self._draft_void = True
        if self._draft_void:
            self._stats.wasted_seconds += seconds
            return
        if not tokens:
            self._exhausted = True
            return
        self._chain += tokens[max(passed, 0) :]
        self._probs += probs[max(passed, 0) : len(tokens)]
        if len(tokens) < n_drafted or self._shown.vocab.is_eog(tokens[-1]):
            self._exhausted = True

    def _usable(self, tokens: list[int]) -> list[int]:
        """What of a draft can be text: up to the first id that is no token, and to the end of the text."""
        vocab, room = self._shown.vocab, max(self._generation.end - self._draft_pos, 0)
        usable: list[int] = []
        for token in tokens[:room]:
            if not 0 <= token < vocab.n_tokens:
                break
            usable.append(token)
            if vocab.is_eog(token):
                break
        return usable

    def _apply(self, commit: Commit) -> None:
        """Add a commit to the text, and keep of the chain what still holds."""
        stats, ahead = self._stats, self._ahead
        tokens = list(commit.tokens)
        n = len(tokens)
        n_right = ahead.observe_truth(self._chain, self._probs, tokens)
        ahead.observe_pass(commit.seconds)
        ahead.observe_round_trip(self._generation.remote.round_trip)
        stats.n_passes += 1
        stats.n_drafted += commit.n_verified
        stats.n_accepted += commit.n_accepted
        stats.target_seconds += commit.seconds
        self._text.extend(tokens)
        if n_right < min(n, len(self._chain)):
            stats.wasted_seconds += (len(self._chain) - n_right) * ahead.draft_seconds
            self._chain, self._probs = [], []
            self._draft_void = True
            self._hinted = None
            self._exhausted = self._drafter is None
        else:
            if n >= len(self._chain):
                self._exhausted = self._drafter is None
            del self._chain[:n], self._probs[:n]

    # -- the hints

    def _send_hint(self) -> float | None:
        """Send the chain if it is time to; returns how long to wait at most for news, None: any time."""
        state = (len(self._text), len(self._text) + min(len(self._chain), self._generation.max_hint))
        if state == self._hinted or self._generation.lost:
            return None
        now = time.perf_counter()
        if self._chain:
            grown = self._hinted is None or state[1] > self._hinted[1]
            wait = self._hinted_at + self._ahead.interval - now
            if grown and (wait <= 0 or self._draft is None):
                self._hint(state, now)
            elif grown:
                return wait
            elif not self._generation.run_ahead and self._draft is None:
                return None  # the worker has all of this chain
        elif not self._generation.run_ahead and self._draft is None:
            self._hint(state, now)  # nothing to say, but the target waits to be asked
        return None

    def _hint(self, state: tuple[int, int], now: float) -> None:
        self._generation.hint(len(self._text), self._chain)
        self._hinted, self._hinted_at = state, now

    # -- without a link

    def _goes_alone(self) -> bool:
        return self._generation.lost and self._generation.on_loss == "local"

    def _show_local(self) -> Iterator[Run]:
        """What the draft says alone while the link is lost."""
        if not self._goes_alone() or self._drafter is None:
            return
        if self._local_shown is None:
            self._local_shown = self._shown.copy()
        n_shown = sum(len(run.tokens) for run in self._local)
        for i in range(n_shown, len(self._chain)):
            if self._local_shown.stopped:
                self._exhausted = True
                return
            text = self._local_shown.feed(self._chain[i])
            run = Run(len(self._text) + i, (self._chain[i],), text, 0, "local")
            self._local.append(run)
            self._stats.n_local += 1
            yield run


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

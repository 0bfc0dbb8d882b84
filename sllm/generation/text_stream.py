"""A text on its way to its reader: runs of tokens, what becomes readable with them, and the figures."""

from __future__ import annotations

import codecs
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import ExitStack

    from typing_extensions import Self

    from sllm.engine.vocab import Vocab
    from sllm.targets.base import Commit, Generation, RemoteStats

__all__ = ["GenerationStats", "Run", "RunStream", "TextBuilder", "TextStream", "committed_runs"]


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

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model, sllm.Model(sllm.embedded.DRAFT) as small:
        ...     runs = list(sllm.generate(model, "Once upon a time", draft=small, max_tokens=16))
        >>> sum(len(run.tokens) for run in runs) <= 16, {run.source for run in runs} <= {"draft", "target"}
        (True, True)

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
        n_passes: passes of the target after the prompt.
        n_drafted: drafted tokens that the target checked.
        n_accepted: of these, accepted ones.
        prompt_seconds: until the prompt was computed.
        target_seconds: in passes of the target.
        draft_seconds: spent waiting for the draft; with a remote target, which nobody waits for: the draft's
            time at work.
        wasted_seconds: of the draft's time, what went into tokens that were rejected, or void after rejected
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

    def count(self, commit: Commit) -> None:
        """Count the pass that a commit came from."""
        self.n_passes += 1
        self.n_drafted += commit.n_verified
        self.n_accepted += commit.n_accepted
        self.target_seconds += commit.seconds

    @property
    def acceptance(self) -> float:
        """Accepted tokens per checked drafted token; 0 where none was drafted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Committed tokens by what proposed them: ``"draft"``, ``"worker draft"`` (the remote side's own) and
        ``"target"``.
        """
        drafted = min(self.n_accepted, self.n_tokens)  # a stop string may cut off some
        own = min(self.remote.n_own_draft, drafted) if self.remote is not None else 0
        return {"draft": drafted - own, "worker draft": own, "target": self.n_tokens - drafted}

    @property
    def passes_per_token(self) -> float:
        """Passes of the target for each token; 1 without speculation."""
        return self.n_passes / self.n_tokens if self.n_tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens per second after the prompt."""
        return self.n_tokens / self.seconds if self.seconds else 0.0


@dataclass
class TextBuilder:
    """Turns tokens into text: no character split, nothing of a stop string shown."""

    vocab: Vocab
    stop: Sequence[str]
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    held: str = ""
    stopped: bool = False

    def copy(self) -> TextBuilder:
        """The same state, to go on with on trial."""
        twin = TextBuilder(self.vocab, self.stop, held=self.held, stopped=self.stopped)
        twin.decoder.setstate(self.decoder.getstate())
        return twin

    def feed(self, token: int) -> str:
        """The text that is certain with this token."""
        if not self.stop:
            return self.decoder.decode(self.vocab.piece(token))
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


class RunStream:
    """An iterator of :class:`Run` that holds resources.

    Iterating to the end, :meth:`close`, leaving a ``with`` block, an exception on the way and forgetting the
    object all free what it holds.
    """

    def __init__(self, runs: Iterator[Run], resources: ExitStack) -> None:
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
        # While Python ends, other threads stand still, and with them the locks that closing would wait for.
        if hasattr(self, "_resources") and not sys.is_finalizing():
            self.close()


class TextStream(RunStream):
    """A text being generated, made by :func:`generate`.

    Attributes:
        stats: running figures.

    """

    def __init__(self, runs: Iterator[Run], stats: GenerationStats, resources: ExitStack) -> None:
        super().__init__(runs, resources)
        self.stats = stats

    def __repr__(self) -> str:
        return f"<sllm.TextStream, {self.stats.n_tokens} tokens, {self.stats.finish_reason or 'going on'}>"


def committed_runs(
    commit: Commit, generation: Generation, shown: TextBuilder, stats: GenerationStats
) -> Iterator[Run]:
    """One commit as a run of accepted tokens and a run of the target's own."""
    n, pos = commit.n_accepted, commit.pos
    for source, begin, tokens in (("draft", pos, commit.tokens[:n]), ("target", pos + n, commit.tokens[n:])):
        if not tokens:
            continue
        text = ""
        for i, token in enumerate(tokens, 1):
            text += shown.feed(token)
            if shown.stopped:
                tokens = tokens[:i]
                break
        stats.n_tokens += len(tokens)
        if shown.stopped:
            stats.finish_reason = "stop"
        elif source == "target" and generation.finish_reason is not None:
            stats.finish_reason = generation.finish_reason
            text += shown.finish()
        yield Run(begin, tokens, text, len(tokens) if source == "draft" else 0, source)
        if shown.stopped:
            return

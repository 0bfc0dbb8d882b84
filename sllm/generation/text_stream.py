"""A text on its way to its reader: runs of tokens, the text that they complete, and statistics."""

from __future__ import annotations

import codecs
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sllm.generation.async_turns import AsyncTurns
from sllm.generation.reasoning import Reader, SpelledMarks, starts_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import ExitStack

    from typing_extensions import Self

    from sllm.engine.vocab import Vocab
    from sllm.generation.reasoning import Kind, Part
    from sllm.targets.base import Commit, Generation, RemoteStats

__all__ = [
    "GenerationStats",
    "Run",
    "RunBuilder",
    "RunStream",
    "TextBuilder",
    "TextStream",
    "committed_runs",
]


@dataclass(frozen=True)
class Run:
    """Some tokens of the text, in order, directly after those of the previous run.

    Attributes:
        pos: the absolute position of the first token.
        tokens: the token ids; empty if text of one kind was completed by a token of another.
        text: the text that these tokens complete. A character whose bytes are spread over several tokens, and
            the possible beginning of a stop string, come with a later run; joined, these strings are the
            text.
        n_accepted: how many of the tokens were drafted.
        source: ``"draft"`` (drafted and accepted), ``"target"`` (the target's own) or ``"local"`` (the draft
            alone, unverified, while the link to a remote target is lost).
        withdrawn: the ``"local"`` runs before this one that no longer count: this run stands where they
            began.
        kind: ``"text"`` (the answer), ``"reasoning"`` (the model's marked reasoning before it) or
            ``"control"`` (the marks themselves, and other control tokens). A run is of one kind.

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model, sllm.Model(sllm.embedded.DRAFT) as small:
        ...     runs = list(sllm.generate(model, "Once upon a time", draft=small, max_tokens=16))
        >>> sum(len(run.tokens) for run in runs) <= 16, {run.source for run in runs} <= {"draft", "target"}
        (True, True)
        >>> "".join(run.text for run in runs if run.kind == "text")[:1]
        ' '

    """

    pos: int
    tokens: tuple[int, ...]
    text: str
    n_accepted: int
    source: str
    withdrawn: tuple[Run, ...] = ()
    kind: Kind = "text"


@dataclass
class GenerationStats:
    """Statistics of a generation so far. Times are in seconds.

    Attributes:
        n_prompt: tokens of the prompt.
        n_reused: of these, tokens that the target still had in memory; 0 for a serving engine, which does not
            report it. Models that roll back with checkpoints may compute some of them again.
        n_tokens: tokens committed.
        n_passes: passes of the target after the prompt.
        n_drafted: drafted tokens that the target checked.
        n_accepted: of these, the accepted ones.
        prompt_seconds: until the prompt was computed; in a split including the first token, which comes with
            it.
        target_seconds: in passes of the target.
        draft_seconds: spent waiting for the draft; with a remote target, where nothing waits for it: the
            draft's computing time.
        wasted_seconds: the part of the draft's time spent on tokens that were rejected, or follow rejected
            ones (remote targets).
        seconds: from the end of the prompt to the last commit, without the reader's own time (with a remote
            target including it, since the text continues meanwhile).
        n_local: unverified tokens that were shown while the link was lost.
        remote: statistics of the link to a remote target; None for others.
        finish_reason: ``"eog"``, ``"length"``, ``"context"``, ``"stop"`` (a stop string), or None while it
            continues.

    """

    n_prompt: int = 0
    n_reused: int = 0
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
        """Accepted tokens per checked drafted token; 0 if none was drafted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Committed tokens by source: ``"draft"``, ``"worker draft"`` (the remote side's own) and
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
    """Turns tokens into text and says what each part of it is: no character split, nothing of a stop string
    shown.

    Attributes:
        vocab: the vocabulary.
        stop: strings that end the text.
        reader: says what each token is.
        special: whether control tokens are shown.
        spelled: finds marks of reasoning that are no tokens.
        held: what may be a part of a stop string.
        stopped: whether one was found.

    """

    vocab: Vocab
    stop: Sequence[str]
    reader: Reader
    special: bool = False
    spelled: SpelledMarks = field(default_factory=lambda: SpelledMarks(()))
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    held: list[Part] = field(default_factory=list)
    stopped: bool = False

    @classmethod
    def after(
        cls, prompt: Sequence[int], vocab: Vocab, stop: Sequence[str], template: str | None, special: bool
    ) -> TextBuilder:
        """For the text after a prompt, by a model with this chat template."""
        reader = Reader(vocab, template)
        return cls(vocab, stop, reader, special, SpelledMarks(reader.spelled, reader.open(prompt)))

    def copy(self) -> TextBuilder:
        """The same state, to go on with on trial."""
        twin = replace(self, reader=self.reader.copy(), spelled=self.spelled.copy(), held=list(self.held))
        twin.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        twin.decoder.setstate(self.decoder.getstate())
        return twin

    def feed(self, token: int) -> tuple[Kind, list[Part]]:
        """What the token is, and the text that is certain with it."""
        before = self.reader.state
        kind = self.reader.read(token)
        piece = self.vocab.piece(token)
        if self.special and kind == "control" and not piece:
            piece = self.vocab._piece(token, special=True)
        text = self.decoder.decode(piece)
        parts: list[Part] = [(kind, text)] if text else []
        if kind == "control" and parts:
            own = piece.decode("utf-8", "replace")
            if text != own and text.endswith(own):  # the rest of a character that was left unfinished
                parts = [(before, text[: -len(own)]), (kind, own)]
        shown = self._marked(self._certain(parts) if self.stop else parts)
        return self.spelled.state if kind == "text" else kind, shown

    def _certain(self, parts: list[Part]) -> list[Part]:
        """What is no part of a stop string."""
        self.held += parts
        text = "".join(text for _, text in self.held)
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self.held = _cut(self.held, min(found))[0], []
            return shown
        shown, self.held = _cut(self.held, len(text) - starts_with(text, self.stop))
        return shown

    def _marked(self, parts: list[Part]) -> list[Part]:
        found = [marked for part in parts for marked in self.spelled.feed(part)]
        return [*found, *self.spelled.finish()] if self.stopped else found

    def finish(self) -> list[Part]:
        """What is left at the end."""
        rest: list[Part] = [*self.held, (self.reader.state, self.decoder.decode(b"", final=True))]
        self.held = []
        if self.stopped:
            return []
        return [part for part in (*self._marked(rest), *self.spelled.finish()) if part[1]]


def _cut(parts: list[Part], n: int) -> tuple[list[Part], list[Part]]:
    """Parts up to character ``n``, and the others."""
    first: list[Part] = []
    second: list[Part] = []
    for kind, text in parts:
        first += [(kind, text[:n])] if text[:n] else []
        second += [(kind, text[max(n, 0) :])] if text[max(n, 0) :] else []
        n = max(n - len(text), 0)
    return first, second


class RunBuilder:
    """Collects tokens and what becomes readable with them into runs of one kind.

    Args:
        pos: the position of the first token.
        source: as :attr:`Run.source`.

    """

    def __init__(self, pos: int, source: str) -> None:
        self._pos = pos
        self._source = source
        self._found: list[tuple[Kind, list[int], list[str]]] = []

    def add(self, kind: Kind, parts: Sequence[Part], token: int | None = None) -> None:
        """Add a token of a kind, and text, with the last part of which the token stands."""
        for part in parts:
            self._of(part[0])[2].append(part[1])
        if token is not None:
            self._of(parts[-1][0] if parts else kind)[1].append(token)

    def _of(self, kind: Kind) -> tuple[Kind, list[int], list[str]]:
        if not self._found or self._found[-1][0] != kind:
            self._found.append((kind, [], []))
        return self._found[-1]

    def runs(self) -> Iterator[Run]:
        """What was added, as runs."""
        pos = self._pos
        for kind, tokens, texts in self._found:
            n_accepted = len(tokens) if self._source == "draft" else 0
            yield Run(pos, tuple(tokens), "".join(texts), n_accepted, self._source, kind=kind)
            pos += len(tokens)


class RunStream:
    """An iterator of :class:`Run` that holds resources; also an asynchronous iterator, for asyncio and trio.

    The resources are freed at the end of the iteration, by :meth:`close`, at the end of a ``with`` block, by
    an exception, and when the object is garbage-collected. ``async for`` computes on a thread of the stream's
    own; cancelling the task ends the text.

    Args:
        runs: the runs to iterate over.
        resources: closed at the end.
        cancel: ends a blocked ``runs``, from any thread; None: a cancelled task waits for its next run.

    """

    def __init__(
        self, runs: Iterator[Run], resources: ExitStack, cancel: Callable[[], None] | None = None
    ) -> None:
        self._runs = runs
        self._resources = resources
        self._cancel = cancel
        self._turns: AsyncTurns | None = None
        self._read: list[Run] = []  # without what was withdrawn

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Run:
        try:
            run = next(self._runs)
        except BaseException:
            self.close()  # also at the end of the text
            raise
        del self._read[max(0, len(self._read) - len(run.withdrawn)) :]
        self._read.append(run)
        return run

    @property
    def message(self) -> dict[str, str]:
        """What has been read so far as an assistant's message, to be appended to those that it answers:
        ``role``, ``content``, and ``reasoning_content`` if there was reasoning. It contains neither control
        tokens nor what a draft wrote alone without a link.

        Examples:
            >>> with sllm.LocalTarget(sllm.embedded.TARGET) as target:
            ...     messages = [{"role": "user", "content": "Tell me a story."}]
            ...     answer = sllm.generate(target, target.chat(messages), max_tokens=8)
            ...     text = answer.text()
            ...     messages.append(answer.message)
            >>> messages[1] == {"role": "assistant", "content": text}
            True

        """
        said = [run for run in self._read if run.source != "local"]
        content = "".join(run.text for run in said if run.kind == "text")
        reasoning = "".join(run.text for run in said if run.kind == "reasoning")
        message = {"role": "assistant", "content": content}
        return message | ({"reasoning_content": reasoning} if reasoning else {})

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Run:
        if self._turns is None:
            self._turns = AsyncTurns()
        try:
            run = await self._turns.call(lambda: next(self, None), self._cancel or _nothing)
        except BaseException:
            self.close()
            raise
        if run is None:
            raise StopAsyncIteration
        return run

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.close()

    def text(self) -> str:
        """The rest of the text, generated to its end, without withdrawn runs."""
        parts: list[str] = []
        for run in self:
            del parts[max(0, len(parts) - len(run.withdrawn)) :]
            parts.append(run.text)
        return "".join(parts)

    def cancel(self) -> None:
        """End the text, from any thread: the thread that waits for the next run soon gets CancelledError."""
        if self._cancel is not None:
            self._cancel()

    def close(self) -> None:
        """Stop generating. More calls do nothing."""
        self._runs = iter(())
        self._resources.close()
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()

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
        stats: statistics so far.

    """

    def __init__(
        self,
        runs: Iterator[Run],
        stats: GenerationStats,
        resources: ExitStack,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(runs, resources, cancel)
        self.stats = stats

    def __repr__(self) -> str:
        return f"<sllm.TextStream, {self.stats.n_tokens} tokens, {self.stats.finish_reason or 'going on'}>"


def _nothing() -> None:
    """Where nothing can be cancelled."""


def committed_runs(
    commit: Commit, generation: Generation, shown: TextBuilder, stats: GenerationStats
) -> Iterator[Run]:
    """One commit as runs of accepted tokens and runs of the target's own."""
    n, pos = commit.n_accepted, commit.pos
    for source, begin, tokens in (("draft", pos, commit.tokens[:n]), ("target", pos + n, commit.tokens[n:])):
        found = RunBuilder(begin, source)
        ends = source == "target" and generation.finish_reason is not None
        for i, token in enumerate(tokens, 1):
            kind, parts = shown.feed(token)
            stats.n_tokens += 1
            if shown.stopped:
                found.add(kind, parts, token)
                stats.finish_reason = "stop"
                break
            rest = shown.finish() if ends and i == len(tokens) else []
            if kind == "control" and not parts:  # a mark that is not shown comes after the text's last part
                found.add(kind, rest)
                rest = []
            found.add(kind, parts, token)
            found.add(kind, rest)
        if tokens and ends and not shown.stopped:
            stats.finish_reason = generation.finish_reason
        yield from found.runs()
        if shown.stopped:
            return

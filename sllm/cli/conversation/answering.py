"""Where the answers of a conversation come from, and how one is read so that Ctrl-C ends it and nothing else.

An answer is computed on a thread of its own: no KeyboardInterrupt is raised in the middle of the library,
where it may leave something half done that the next answer needs. The main thread shows what comes, and
cancels.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import sllm
from sllm.cli.console import count
from sllm.cli.run_report import summary
from sllm.cli.signals import interrupts_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sllm.draft.drafters import ModelDrafter
    from sllm.engine.model import Model
    from sllm.generation.text_stream import GenerationStats, Run, TextStream
    from sllm.targets.base import Target
    from sllm.triage.answer import Answer
    from sllm.triage.hybrid import Hybrid

__all__ = ["Answers", "HybridAnswers", "ModelAnswers", "read_answer"]

_AGAIN_SECONDS = 0.02
"""How often what is to end is cancelled again: what had not begun is not cancelled."""

_PATIENCE_SECONDS = 2.0
"""After so long, one more Ctrl-C gives up on an answer that does not end."""


class Answers(Protocol):
    """What answers the messages of a conversation. One answer at a time."""

    n_ctx: int | None
    """Positions of a conversation; None: not known."""

    def n_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """The length of the prompt that these messages make."""

    def runs(self, messages: Sequence[Mapping[str, Any]], attempt: int) -> Iterator[Run]:
        """The answer as it comes; ``attempt`` counts the answers to the same messages, from 0."""

    def cancel(self) -> None:
        """End what another thread computes for the answer, which raises CancelledError; from any thread."""

    def message(self) -> dict[str, str] | None:
        """The last answer, or what there was of it, as a message; None: it has not begun."""

    def status(self) -> list[str]:
        """What the last answer has cost, in a few words each."""

    def details(self) -> list[str]:
        """The same in lines, with all figures."""

    def begin_anew(self) -> None:
        """Another conversation begins."""


@dataclass
class ModelAnswers:
    """Answers by a target.

    Attributes:
        model: makes prompts of messages.
        target: writes.
        draft: makes it sooner; None: nothing does.
        sampling: of the first answer to a message; another one has another seed.
        max_tokens: of an answer.
        stop: texts that end one.
        variables: what the chat template is told.
        n_ctx: as :attr:`Answers.n_ctx`.

    """

    model: Model
    target: Target
    draft: ModelDrafter | str | None
    sampling: sllm.SamplingParams
    max_tokens: int | None
    stop: Sequence[str]
    variables: Mapping[str, Any]
    n_ctx: int | None
    _stream: TextStream | None = None
    _stats: GenerationStats | None = None

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        return self.model.chat(messages, variables=self.variables)

    def n_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """See :meth:`Answers.n_tokens`."""
        return len(self._prompt(messages))

    def runs(self, messages: Sequence[Mapping[str, Any]], attempt: int) -> Iterator[Run]:
        """See :meth:`Answers.runs`."""
        self._stream = self._stats = None
        stream = sllm.generate(
            self.target,
            self._prompt(messages),
            draft=self.draft,
            sampling=replace(self.sampling, seed=(self.sampling.seed + attempt) % 2**64),
            max_tokens=self.max_tokens,
            stop=self.stop,
        )
        self._stream, self._stats = stream, stream.stats
        with stream:
            yield from stream

    def cancel(self) -> None:
        """See :meth:`Answers.cancel`."""
        if self._stream is not None:
            self._stream.cancel()
        elif callable(cancel := getattr(self.target, "cancel", None)):
            cancel()  # it is computing the prompt

    def message(self) -> dict[str, str] | None:
        """See :meth:`Answers.message`."""
        return None if self._stream is None else self._stream.message

    def status(self) -> list[str]:
        """See :meth:`Answers.status`."""
        stats = self._stats
        if stats is None:
            return []
        told = [count(stats.n_tokens, "token"), f"{stats.tokens_per_s:.1f} tokens/s"]
        if stats.n_drafted:
            told.append(f"{stats.acceptance:.0%} of the draft accepted")
        if stats.remote is not None and stats.remote.round_trip:
            told.append(f"{stats.remote.round_trip * 1e3:.0f} ms round trip")
        if self.n_ctx is not None:
            told.append(f"{stats.n_prompt + stats.n_tokens} of {self.n_ctx} positions")
        ends = {"length": "--max-tokens", "stop": "--stop", "context": "the context is full"}
        if stats.finish_reason in ends:
            told.append(f"ended by: {ends[stats.finish_reason]}")
        return told

    def details(self) -> list[str]:
        """See :meth:`Answers.details`."""
        return [] if self._stats is None else summary(self._stats)

    def begin_anew(self) -> None:
        """See :meth:`Answers.begin_anew`."""


@dataclass
class HybridAnswers:
    """Answers by tiers, as ``sllm ask`` gives them.

    Attributes:
        hybrid: it.
        model: that answers here, and whose prompt a conversation has to fit into.
        n_ctx: as :attr:`Answers.n_ctx`.
        explained: makes lines of an answer's account.

    """

    hybrid: Hybrid
    model: Model
    n_ctx: int | None
    explained: Callable[[Answer], list[str]]
    _answer: Answer | None = None

    def n_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """See :meth:`Answers.n_tokens`."""
        return len(self.model.chat(_without_reasoning(messages)))

    def runs(self, messages: Sequence[Mapping[str, Any]], attempt: int) -> Iterator[Run]:
        """See :meth:`Answers.runs`; another answer has the same seed."""
        del attempt
        self._answer = None
        self._answer = answer = self.hybrid.ask(_without_reasoning(messages))
        with answer:
            yield from answer

    def cancel(self) -> None:
        """See :meth:`Answers.cancel`."""
        self.hybrid.cancel()

    def message(self) -> dict[str, str] | None:
        """See :meth:`Answers.message`."""
        return None if self._answer is None else self._answer.message

    def status(self) -> list[str]:
        """See :meth:`Answers.status`."""
        answer = self._answer
        if answer is None:
            return []
        told = [
            f"tier {int(answer.grade.tier)}, {answer.grade.privacy}",
            " > ".join(answer.route) or "no answer",
        ]
        if answer.masked:
            told.append(f"{count(sum(answer.masked.values()), 'value')} masked")
        if answer.stats.cloud_in:
            told.append(f"cloud: {answer.stats.cloud_in} + {count(answer.stats.cloud_out, 'token')}")
        told.append(f"{answer.stats.seconds:.1f} s")
        return told + [reason for reason in answer.reasons if "does not answer" in reason]

    def details(self) -> list[str]:
        """See :meth:`Answers.details`."""
        return [] if self._answer is None else self.explained(self._answer)

    def begin_anew(self) -> None:
        """See :meth:`Answers.begin_anew`: what was masked is forgotten."""
        self.hybrid.new_conversation()


def _without_reasoning(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as any cloud takes them."""
    return [{key: message[key] for key in ("role", "content")} for message in messages]


# ---- reading one


class _Pressed:
    """Ctrl-C."""


@dataclass
class _Ended:
    """The end of the answer, and what it ended with."""

    error: BaseException | None


def read_answer(
    answers: Answers,
    messages: Sequence[Mapping[str, Any]],
    attempt: int,
    show: Callable[[Run], None],
    *,
    interruptible: bool,
) -> bool:
    """Show an answer as it comes.

    Args:
        answers: where it comes from.
        messages: the conversation.
        attempt: as for :meth:`Answers.runs`.
        show: called with each run.
        interruptible: Ctrl-C ends the answer; else it is a KeyboardInterrupt.

    Returns:
        Whether it came to its end: it was not interrupted.

    Raises:
        KeyboardInterrupt: also where an interrupted answer does not end, and Ctrl-C is pressed again.
        Exception: what the answer ended with, or ``show`` has raised.

    """
    events: SimpleQueue[Run | _Pressed | _Ended] = SimpleQueue()

    def work() -> None:
        try:
            for run in answers.runs(messages, attempt):
                events.put(run)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other thread is to raise it
            events.put(_Ended(error))
        else:
            events.put(_Ended(None))

    thread = threading.Thread(target=work, name="sllm-answer", daemon=True)
    with ExitStack() as stack:
        if interruptible:
            # Of all queues, this one alone may be filled by a signal handler that interrupts its reader.
            stack.enter_context(interrupts_call(lambda: events.put(_Pressed())))
        thread.start()
        stack.callback(_end, thread, answers)
        pressed_at: float | None = None
        while True:
            try:
                event = events.get(timeout=None if pressed_at is None else _AGAIN_SECONDS)
            except Empty:
                answers.cancel()
                continue
            if isinstance(event, _Ended):
                if event.error is not None and pressed_at is None:
                    raise event.error
                return pressed_at is None
            if not isinstance(event, _Pressed):
                show(event)
                continue
            if pressed_at is not None and time.monotonic() - pressed_at > _PATIENCE_SECONDS:
                raise KeyboardInterrupt
            pressed_at = pressed_at or time.monotonic()
            answers.cancel()


def _end(thread: threading.Thread, answers: Answers) -> None:
    """End an answer's thread; one that does not end in time is left to itself."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while thread.is_alive() and time.monotonic() < until:
        thread.join(_AGAIN_SECONDS)
        if thread.is_alive():
            answers.cancel()

"""The hint loop of :func:`sllm.generate` for targets that are asked pass by pass."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sllm.draft.drafters import draft_probs
from sllm.draft.length import DraftLength
from sllm.generation.text_stream import committed_runs
from sllm.targets.base import RemoteWork
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future, ThreadPoolExecutor

    from sllm.draft.drafters import Drafter
    from sllm.generation.text_stream import GenerationStats, Run, TextBuilder
    from sllm.targets.base import Commit, Generation

__all__ = ["AlternatingRuns"]


class AlternatingRuns:
    """Draft and target in turns: draft, hint, take what the target commits, keep what still holds.

    Args:
        generation: the target's side.
        drafter: who proposes; None: the target alone.
        executor: one thread, for the draft to go on while the target verifies; None: they take turns.
        text: the prompt's tokens, which grow by those that are committed.
        shown: makes text of tokens.
        stats: running figures.
        end: the text ends before this position, if not sooner; None: where the target ends it.

    """

    def __init__(
        self,
        generation: Generation,
        drafter: Drafter | None,
        executor: ThreadPoolExecutor | None,
        text: list[int],
        shown: TextBuilder,
        stats: GenerationStats,
        end: int | None,
    ) -> None:
        self._generation = generation
        self._drafter = drafter
        self._executor = executor
        self._text = text
        self._shown = shown
        self._stats = stats
        self._end = end
        self._length = DraftLength(
            generation.max_chain if isinstance(generation, LockstepGeneration) else DraftLength.LIMIT
        )
        self._chain: list[int] = []  # drafted after the text
        self._probs: list[float] = []  # and the draft's probability of each
        self._spent = 0.0  # seconds of drafting in this round
        self._settled = True  # a round in which the draft had to read a prompt says nothing about the next
        if isinstance(generation, RemoteWork):
            stats.remote = generation.remote

    def runs(self) -> Iterator[Run]:
        """The text, run by run."""
        generation, stats = self._generation, self._stats
        stats.finish_reason = generation.finish_reason  # a prompt may leave no room for a text
        while generation.finish_reason is None:
            began = time.perf_counter()
            ahead = None
            ready = isinstance(generation, LockstepGeneration) and generation.ready
            if self._drafter is not None and not ready:
                # 1. Draft as many tokens as are worth their time.
                n_shown = self._draft(self._drafter)
                # 2. Hint: those of them that are worth verifying.
                generation.hint(len(self._text), self._chain[:n_shown])
                # 3. Go on drafting on another thread while the target verifies.
                ahead = self._draft_ahead(self._drafter, n_shown)
            # 4. The target commits what it selects itself.
            try:
                commit = next(generation)
            finally:
                if ahead is not None and self._drafter is not None:
                    self._drafter.cancel()
                    self._take(self._drafter, ahead.result())
            seconds = time.perf_counter() - began
            # 5. Learn what drafts cost and how often they hold.
            if not ready:
                self._learn(commit, seconds)
            stats.count(commit)
            stats.seconds += seconds
            # 6. Keep what of the chain still holds, and give out the text.
            self._text.extend(commit.tokens)
            n_new = len(commit.tokens)
            holds = tuple(self._chain[:n_new]) == commit.tokens
            self._chain = self._chain[n_new:] if holds else []
            self._probs = self._probs[n_new:] if holds else []
            yield from committed_runs(commit, generation, self._shown, stats)
            if self._shown.stopped:
                return

    def _draft(self, drafter: Drafter) -> int:
        """Lengthen the chain by what is worth its time; returns how many tokens of it are worth verifying."""
        length = self._length
        self._spent, self._settled = 0.0, True
        if drafter.adaptive and not length.begin():
            return 0
        while True:
            wanted, p_min = (length.limit - len(self._chain), 0.0)
            if drafter.adaptive:
                wanted, p_min = length.more(self._probs)
            if self._end is not None:  # the last token is the target's own
                wanted = min(wanted, self._end - len(self._text) - len(self._chain) - 1)
            if wanted <= 0:
                break
            asked = time.perf_counter()
            new = drafter.draft(self._text, self._chain, wanted, p_min)
            took = time.perf_counter() - asked
            self._spent += took
            if drafter.n_caught_up > DraftLength.LIMIT:
                self._settled = False
            else:
                length.observe_draft(len(new) + (len(new) < wanted), took)
            self._take(drafter, new)
            if len(new) < wanted:
                break
        return length.keep(self._probs) if drafter.adaptive else len(self._chain)

    def _draft_ahead(self, drafter: Drafter, n_shown: int) -> Future[list[int]] | None:
        if self._executor is None or (n_shown == 0 and self._stats.n_passes > 0):
            return None
        # One token stands for the target's own. Over a link it is time that is left over; here it would be
        # taken from the target.
        n_ahead = 1 + (self._length.limit if self._stats.remote is not None else n_shown)
        return self._executor.submit(drafter.draft, self._text, list(self._chain), n_ahead, 0.0)

    def _take(self, drafter: Drafter, new: list[int]) -> None:
        """Add what was drafted to the chain, with the drafter's probabilities, where it gives any."""
        self._chain += new
        self._probs += draft_probs(drafter, len(new))

    def _learn(self, commit: Commit, seconds: float) -> None:
        length, stats = self._length, self._stats
        if self._drafter is not None:
            length.observe_pass(commit.n_verified, commit.seconds)
            length.observe_truth(self._chain, self._probs, commit.tokens)
            if self._settled and (commit.n_verified > 0 or self._spent > 0.05 * commit.seconds):
                length.observe_round(len(commit.tokens), seconds)
        stats.draft_seconds += self._spent

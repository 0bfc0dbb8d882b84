"""The hint loop of :func:`sllm.generate` for targets that are asked pass by pass."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sllm.draft.drafters import drafts_trees
from sllm.draft.length import DraftLength
from sllm.draft.linked import LinkedPassTimes
from sllm.generation.rounds import ChainRounds, Rounds, TreeRounds
from sllm.generation.text_stream import committed_runs
from sllm.targets.base import RemoteWork
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

    from sllm.draft.drafters import Drafter
    from sllm.generation.text_stream import GenerationStats, Run, TextBuilder
    from sllm.targets.base import Generation

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
        self._text = text
        self._shown = shown
        self._stats = stats
        if isinstance(generation, RemoteWork):
            stats.remote = generation.remote
        self._rounds: Rounds | None = None
        if drafter is not None:
            self._rounds = _rounds(generation, drafter, executor, end, stats)

    def runs(self) -> Iterator[Run]:
        """The text, run by run."""
        generation, stats, rounds = self._generation, self._stats, self._rounds
        stats.finish_reason = generation.finish_reason  # a prompt may leave no room for a text
        while generation.finish_reason is None:
            began = time.perf_counter()
            # What is there already is read first: a draft for it would be in vain.
            drafting = None if isinstance(generation, LockstepGeneration) and generation.ready else rounds
            # 1. Draft what is worth its time, and hint what of it is worth verifying.
            if drafting is not None:
                drafting.propose(generation, self._text)
            # 2. The target commits what it selects itself.
            try:
                commit = next(generation)
            finally:
                if drafting is not None:
                    drafting.settle()
            seconds = time.perf_counter() - began
            # 3. Learn what drafts cost and how often they hold; keep what still holds.
            if drafting is not None:
                drafting.learn(commit, seconds)
                stats.draft_seconds += drafting.spent
            stats.count(commit)
            stats.seconds += seconds
            # 4. Give out the text.
            self._text.extend(commit.tokens)
            yield from committed_runs(commit, generation, self._shown, stats)
            if self._shown.stopped:
                return


def _rounds(
    generation: Generation,
    drafter: Drafter,
    executor: ThreadPoolExecutor | None,
    end: int | None,
    stats: GenerationStats,
) -> Rounds:
    """Trees, where both sides know them; else chains."""
    limit = generation.max_chain if isinstance(generation, LockstepGeneration) else DraftLength.LIMIT
    if generation.can_branch and drafts_trees(drafter):
        times = None
        if isinstance(generation, RemoteWork):
            remote = generation.remote
            times = LinkedPassTimes(lambda: remote.round_trip)
        return TreeRounds(drafter, limit, end, times)
    own_pace = isinstance(generation, LockstepGeneration) and generation.own_pace
    return ChainRounds(drafter, executor, limit, end, stats, own_pace=own_pace)

"""What a draft does in one round of the hint loop whose target is asked pass by pass."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sllm.draft.drafters import draft_probs
from sllm.draft.growth import Shape, TreeGrowth
from sllm.draft.length import DraftLength
from sllm.draft.tree import DraftedTree
from sllm.engine.tree import MAX_NODES
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from sllm.draft.drafters import Drafter, TreeDrafter
    from sllm.draft.length import PassTimes
    from sllm.generation.text_stream import GenerationStats
    from sllm.targets.base import Commit, Generation

__all__ = ["ChainRounds", "Rounds", "TreeRounds", "may_grow", "tells_of_drafts"]


class Rounds(Protocol):
    """One round after the other: propose, verify, settle, learn."""

    spent: float
    """Seconds of drafting in this round."""

    def propose(self, generation: Generation, text: Sequence[int]) -> None:
        """Draft what is worth its time, and hint what of it is worth verifying."""

    def settle(self) -> None:
        """The target has verified, or has failed: end what the draft has done meanwhile."""

    def learn(self, commit: Commit, seconds: float) -> None:
        """What came of it, in a round of so many seconds."""


class TreeRounds:
    """Trees for a target that checks all their branches.

    Where the target's answer takes long to come, the tree grows meanwhile, and what goes on from what was
    sent is sent behind it (:meth:`LockstepGeneration.push`). What is left of the tree after a commit is gone
    on with.

    Args:
        drafter: who proposes.
        limit: tokens that one pass of the target can check.
        end: the text ends before this position, if not sooner; None: where the target ends it.
        times: will hold what the target's passes take; None: as for a target that is here.

    """

    def __init__(
        self, drafter: TreeDrafter, limit: int, end: int | None, times: PassTimes | None = None
    ) -> None:
        self._drafter = drafter
        self._growth = TreeGrowth(limit, times)
        self._end = end
        self._tree = DraftedTree()
        self._shown = DraftedTree()
        self._n_again = 0  # accepted tokens that the next pass computes once more
        self._settled = True  # a round in which the draft had to read a prompt says nothing about the next
        self._far = False  # whether there was time to draft while the target was waited for
        self._step_seconds = 0.0  # of growing further
        self.spent = 0.0

    def propose(self, generation: Generation, text: Sequence[int]) -> None:
        """See :meth:`Rounds.propose`."""
        drafter, growth = self._drafter, self._growth
        self.spent, self._settled = 0.0, True
        self._shown = DraftedTree()
        # The last token is the target's own.
        room = self.LARGEST if self._end is None else self._end - len(text) - 1
        if (drafter.adaptive and not growth.begin()) or room < 1:
            self._tree = DraftedTree()
            return
        at_first = min(room, growth.DEEPEST)
        shape = growth.shape(at_first) if drafter.adaptive else growth.everything(at_first)
        self._tree = replace(
            self._tree, n_passes=0
        )  # what was drafted while the target was waited for is free
        under_way = isinstance(generation, LockstepGeneration) and generation.under_way
        if not under_way and len(self._tree) < growth.limit:
            anew = not self._tree.tokens
            drafted, seconds = self._draft(text, shape)
            if drafter.n_caught_up > DraftLength.LIMIT:
                self._settled = False
            elif anew:
                growth.observe_draft(drafted, seconds)
        self._shown = (
            growth.keep(self._tree)
            if drafter.adaptive
            else self._tree.take(self._tree.likeliest(growth.limit))
        )
        self._go_on(generation, text, shape, room)

    def _go_on(self, generation: Generation, text: Sequence[int], shape: Shape, room: int) -> None:
        """Hint the tree, and let it grow until the target may answer."""
        grows = True
        while True:
            shown = self._shown
            if not isinstance(generation, LockstepGeneration) or generation.max_hint == generation.max_chain:
                generation.hint(len(text), shown.tokens, shown.parents)
            else:
                hinted = shown.merged(self._tree.take(self._worth_sending()))
                n = min(generation.max_hint, len(hinted))
                generation.hint(len(text), hinted.tokens[:n], hinted.parents[:n], n_first=len(shown))
            left = generation.push() if isinstance(generation, LockstepGeneration) else 0.0
            self._far = left > 0
            if not grows or left <= 2 * self._step_seconds or not may_grow(self._tree, self._growth):
                return
            n_inner = len(set(self._tree.parents))
            n_passes = min(self.STEP, room)
            _, seconds = self._draft(text, Shape(n_passes, shape.width, self.LARGEST, self._growth.P_MIN))
            self._step_seconds = max(seconds, 0.8 * self._step_seconds)
            grows = len(set(self._tree.parents)) > n_inner

    REACHED = 0.05
    """The chance of the main path's end, of a tree that grows."""

    STEP = 8
    """Passes of the draft between two looks at what can be sent."""

    _WORTH = 0.05
    """A less likely token is not sent ahead."""

    LARGEST = 128
    """Tokens of a tree: what else may follow comes too late, or is too unlikely."""

    MOST_KNOWN = 64
    """Tokens of a tree that the draft goes on from; as many as may be new find room beside them."""

    def _worth_sending(self) -> list[int]:
        chances = self._tree.chances()
        return [i for i in self._tree.likeliest(len(self._tree)) if chances[i] >= self._WORTH]

    def _draft(self, text: Sequence[int], shape: Shape) -> tuple[DraftedTree, float]:
        """Draft on from the tree; returns what was drafted, and the seconds that it took."""
        asked = time.perf_counter()
        known = None
        if self._tree.tokens:
            known = self._tree.take(self._tree.likeliest(self.MOST_KNOWN))
            shape = shape._replace(n_nodes=min(len(known) + shape.n_nodes, MAX_NODES))
        drafted = self._drafter.draft_tree(text, shape, known)
        tree = drafted.merged(self._tree) if known is not None else drafted
        self._tree = tree.take(tree.likeliest(self.LARGEST))
        seconds = time.perf_counter() - asked
        self.spent += seconds
        return drafted, seconds

    def settle(self) -> None:
        """See :meth:`Rounds.settle`: there is nothing to end."""

    def learn(self, commit: Commit, seconds: float) -> None:
        """See :meth:`Rounds.learn`."""
        growth = self._growth
        growth.observe_pass(commit.n_verified + self._n_again, _seconds_of_pass(commit))
        growth.observe_truth(self._tree, commit.tokens)
        self._n_again = self._shown.n_beside(commit.tokens[: commit.n_accepted])  # the others stay in memory
        if self._settled and tells_of_drafts(commit.n_verified, self.spent, commit.seconds):
            growth.observe_round(len(commit.tokens), seconds)
        self._tree = self._tree.after(commit.tokens) if self._far else DraftedTree()


class ChainRounds:
    """Chains, and the draft going on while the target verifies.

    Args:
        drafter: who proposes.
        executor: one thread, for the draft to go on while the target verifies; None: they take turns.
        limit: tokens that one pass of the target can check.
        end: the text ends before this position, if not sooner; None: where the target ends it.
        stats: running figures.
        own_pace: as of the generation (:class:`~sllm.targets.lockstep.LockstepGeneration`).

    """

    def __init__(
        self,
        drafter: Drafter,
        executor: ThreadPoolExecutor | None,
        limit: int,
        end: int | None,
        stats: GenerationStats,
        *,
        own_pace: bool = False,
    ) -> None:
        self._drafter = drafter
        self._executor = executor
        self._length = DraftLength(limit, own_pace=own_pace)
        self._end = end
        self._stats = stats
        self._chain: list[int] = []  # drafted after the text
        self._probs: list[float] = []  # and the draft's probability of each
        self._ahead: Future[list[int]] | None = None
        self._settled = True  # a round in which the draft had to read a prompt says nothing about the next
        self.spent = 0.0

    def propose(self, generation: Generation, text: Sequence[int]) -> None:
        """See :meth:`Rounds.propose`."""
        # 1. Draft as many tokens as are worth their time.
        n_shown = self._draft(text)
        # 2. Hint: those of them that are worth verifying.
        generation.hint(len(text), self._chain[:n_shown])
        # 3. Go on drafting on another thread while the target verifies.
        if self._executor is not None and (n_shown > 0 or self._stats.n_passes == 0):
            # One token stands for the target's own. Over a link it is time that is left over; here it would
            # be taken from the target.
            n_ahead = 1 + (self._length.limit if self._stats.remote is not None else n_shown)
            self._ahead = self._executor.submit(self._drafter.draft, text, list(self._chain), n_ahead, 0.0)

    def _draft(self, text: Sequence[int]) -> int:
        """Lengthen the chain by what is worth its time; returns how many tokens of it are worth verifying."""
        length, drafter = self._length, self._drafter
        self.spent, self._settled = 0.0, True
        if drafter.adaptive and not length.begin():
            return 0
        while True:
            wanted, p_min = (length.limit - len(self._chain), 0.0)
            if drafter.adaptive:
                wanted, p_min = length.more(self._probs)
            if self._end is not None:  # the last token is the target's own
                wanted = min(wanted, self._end - len(text) - len(self._chain) - 1)
            if wanted <= 0:
                break
            asked = time.perf_counter()
            new = drafter.draft(text, self._chain, wanted, p_min)
            took = time.perf_counter() - asked
            self.spent += took
            if drafter.n_caught_up > DraftLength.LIMIT:
                self._settled = False
            else:
                length.observe_draft(len(new) + (len(new) < wanted), took)
            self._take(new)
            if len(new) < wanted:
                break
        return length.keep(self._probs) if drafter.adaptive else len(self._chain)

    def _take(self, new: list[int]) -> None:
        """Add what was drafted to the chain, with the drafter's probabilities, where it gives any."""
        self._chain += new
        self._probs += draft_probs(self._drafter, len(new))

    def settle(self) -> None:
        """See :meth:`Rounds.settle`."""
        if self._ahead is not None:
            self._drafter.cancel()
            ahead, self._ahead = self._ahead, None
            self._take(ahead.result())

    def learn(self, commit: Commit, seconds: float) -> None:
        """See :meth:`Rounds.learn`."""
        # 1. What drafts cost and how often they hold.
        length = self._length
        length.observe_pass(commit.n_verified, _seconds_of_pass(commit))
        length.observe_truth(self._chain, self._probs, commit.tokens)
        if self._settled and tells_of_drafts(commit.n_verified, self.spent, commit.seconds):
            length.observe_round(len(commit.tokens), seconds)
        # 2. What of the chain still holds.
        n_new = len(commit.tokens)
        holds = tuple(self._chain[:n_new]) == commit.tokens
        self._chain = self._chain[n_new:] if holds else []
        self._probs = self._probs[n_new:] if holds else []


def may_grow(tree: DraftedTree, growth: TreeGrowth) -> bool:
    """Whether what may follow the tree's main path is likely enough to be of use. Else it seldom is, and a
    draft that keeps the cores busy delays the answer.
    """
    return len(tree) < TreeRounds.LARGEST and growth.chance_of_main_path(tree) >= TreeRounds.REACHED


def tells_of_drafts(n_verified: int, spent: float, seconds: float) -> bool:
    """Whether a round says what drafting brings: drafted tokens were verified in its pass of so many seconds,
    or drafting took (``spent``) more than a twentieth of these.
    """
    return n_verified > 0 or spent > 0.05 * seconds


def _seconds_of_pass(commit: Commit) -> float:
    """What a pass took; of one without a draft, what each token of it took: an engine that goes on by itself
    gives several at once.
    """
    return commit.seconds if commit.n_verified else commit.seconds / len(commit.tokens)

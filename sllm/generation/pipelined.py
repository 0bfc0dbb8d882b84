"""The hint loop of :func:`sllm.generate` for targets that are a round trip away."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from sllm.draft.ahead import DraftAhead
from sllm.draft.confidence import UNKNOWN_PROB
from sllm.draft.drafters import ModelDrafter, draft_probs, drafts_trees
from sllm.draft.length import DraftLength
from sllm.draft.payoff import Payoff
from sllm.draft.streak import Streak
from sllm.draft.tree import DraftedTree
from sllm.generation.text_stream import GenerationStats, Run, RunBuilder, TextBuilder, committed_runs
from sllm.generation.tree_ahead import TreeAhead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from sllm.draft.drafters import Drafter
    from sllm.targets.base import Commit, PipelinedGeneration

__all__ = ["PipelinedRuns"]


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


_AHEAD = "passes and round trip"


def _payoff(generation: PipelinedGeneration, drafter: Drafter | None) -> Payoff:
    """That of this kind of drafts for this target, kept where other texts find it."""
    kind = f"payoff of {type(drafter).__name__}"
    if isinstance(drafter, ModelDrafter):
        kind += f" {drafter.model.path}"
    found: Payoff = generation.learnt.setdefault(kind, Payoff())
    return found


class PipelinedRuns:
    """The hint loop for a target that is a round trip away: nobody waits for anybody.

    Commits come when they come. Meanwhile the draft goes on along its own chain, on a thread of its own, and
    the whole chain is sent whenever it has grown. A commit that disagrees makes the chain void, and drafting
    starts again from the truth. Where the target checks several branches at once, it is a tree that grows
    (:class:`~sllm.generation.tree_ahead.TreeAhead`), and a commit leaves what of it agrees; the chain is its
    main path.
    """

    def __init__(
        self,
        generation: PipelinedGeneration,
        drafter: Drafter | None,
        executor: ThreadPoolExecutor | None,
        text: list[int],
        shown: TextBuilder,
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
        self._payoff = _payoff(generation, drafter)
        # A target that waits for hints has to have them, and what costs nothing takes nothing.
        self._weighs = generation.run_ahead and drafter is not None and drafter.adaptive
        self._counted = False  # as a text of the payoff's
        like = generation.learnt.get(_AHEAD)
        self._ahead = DraftAhead(run_ahead=generation.run_ahead, like=like)
        self._chain: list[int] = []  # drafted after the text, unconfirmed
        self._probs: list[float] = []  # what the draft says of them
        self._trees: TreeAhead | None = TreeAhead() if drafts_trees(drafter) else None
        self._draft: Future[tuple[DraftedTree, float]] | None = None  # on its way
        self._draft_is_tree = False
        self._draft_pos = 0  # and where its tokens go
        self._draft_void = False  # a commit has disagreed with what it goes on from
        self._streak = Streak()
        self._ready = False  # the draft has read what there was to read before its first token
        self._exhausted = drafter is None  # the draft has nothing to say after this chain
        # End of the text, and of the chain (or the tree's number) as last sent.
        self._hinted: tuple[int, int] | None = None
        self._hinted_at = self._news_at = time.perf_counter()
        self._local: list[Run] = []  # shown while the link is lost
        self._local_shown: TextBuilder | None = None
        stats.remote = generation.remote

    def runs(self) -> Iterator[Run]:
        """The text, run by run."""
        try:
            yield from self._runs()
        finally:
            self._generation.learnt[_AHEAD] = self._ahead
            if self._counted:
                self._counted = False
                self._payoff.end()

    def _runs(self) -> Iterator[Run]:
        generation, stats = self._generation, self._stats
        began = self._began
        stats.finish_reason = generation.finish_reason
        while generation.finish_reason is None:
            # 1. News from the target comes first.
            commit = generation.poll(0.0)
            if commit is None:
                # 2. Take what the draft has made meanwhile, and let it go on along its own chain.
                self._take_draft()
                self._draft_more()
                # 3. While the link is lost, the draft may speak alone.
                yield from self._show_local()
                # 4. Send the chain where it has grown, and wait: for news, or until the next hint is due.
                commit = generation.poll(self._send_hint())
            if commit is None:
                continue
            # 5. A commit: what of the chain agrees stays, what was shown without the target is withdrawn.
            self._news_at = time.perf_counter()
            if stats.n_passes == 0:
                opened = generation.opened_at or self._news_at
                stats.n_reused = stats.remote.n_reused if stats.remote is not None else 0
                stats.prompt_seconds = opened - began
                began = opened
            stats.seconds = self._news_at - began
            self._apply(commit)
            withdrawn, self._local, self._local_shown = tuple(self._local), [], None
            for run in committed_runs(commit, generation, self._shown, stats):
                yield replace(run, withdrawn=withdrawn) if withdrawn else run
                withdrawn = ()
            if self._shown.stopped:
                return
        if stats.finish_reason is None:  # it ended after a commit that did not look like the last
            stats.finish_reason = generation.finish_reason
            last = RunBuilder(len(self._text), "target")
            last.add("text", self._shown.finish())
            yield from last.runs()

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

    def _branches(self) -> bool:
        """Whether trees are drafted now: without a link it is the draft's own text that counts."""
        return self._trees is not None and self._generation.can_branch and not self._goes_alone()

    def _draft_more(self) -> None:
        drafter, executor = self._drafter, self._executor
        if self._draft is not None or self._exhausted or drafter is None or executor is None:
            return
        room = self._generation.end - len(self._text)
        branches = self._branches()
        if self._stopped or room <= (0 if branches else len(self._chain)):
            return
        probs = () if branches else self._probs
        if not self._goes_alone() and not (
            self._may_draft() and self._ahead.worth_more(probs, time.perf_counter() - self._news_at)
        ):
            return
        text, chain, n = _Prefix(self._text, len(self._text)), list(self._chain), self._ahead.step
        unknown = self._streak.prob
        shape, known = None, None
        if branches and self._trees is not None:
            shape = self._trees.shape(room, self._ahead.pass_seconds, self._ahead.draft_seconds)
            if shape is None:
                self._exhausted = True
                return
            known = self._trees.known()

        def draft() -> tuple[DraftedTree, float]:
            began = time.perf_counter()
            if self._stopped:
                return DraftedTree(), 0.0
            if shape is not None and drafts_trees(drafter):
                drafted = drafter.draft_tree(text, shape, known)
            else:
                tokens = drafter.draft(text, chain, n, 0.0)
                probs = draft_probs(drafter, len(tokens), unknown)
                drafted = DraftedTree.chain(tokens, probs, max(len(tokens), 1))
            seconds = time.perf_counter() - began
            settled = drafter.n_caught_up <= DraftLength.LIMIT  # else it was mostly the reading of a prompt
            return drafted, seconds if settled else 0.0

        self._draft = executor.submit(draft)
        self._draft_is_tree = shape is not None
        self._draft_pos = len(text) + (0 if shape is not None else len(chain))
        self._draft_void = False
        self._draft.add_done_callback(lambda _: self._generation.wake())

    def _take_draft(self) -> None:
        """Add what the draft has made to the chain or the tree, if it has ended."""
        if self._draft is None or not self._draft.done():
            return
        drafted, seconds = self._draft.result()
        self._draft = None
        self._ready = True
        self._stats.draft_seconds += seconds
        if seconds and drafted.n_passes:
            self._ahead.observe_draft(drafted.n_passes, seconds)
        if self._draft_is_tree and self._trees is not None:
            if self._trees.take(drafted, self._text[self._draft_pos :]):
                self._chain, self._probs = self._trees.main_path()
            else:
                self._stats.wasted_seconds += seconds
                self._exhausted = not drafted.tokens
            return
        probs = list(drafted.shares)
        n_drafted, tokens = len(drafted), self._usable(list(drafted.tokens))
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
        """What of a draft can be text: up to the first id outside the vocabulary, or the text's end."""
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
        trees = self._trees if self._trees is not None and self._trees.tree.tokens else None
        if trees is None:
            n_right = ahead.observe_truth(self._chain, self._probs, tokens)
            for token, true in zip(self._chain[: n_right + 1], tokens, strict=False):
                self._streak.observe(token == true)
        else:
            n_right = self._follow(trees, tokens)
        hinted = commit.n_verified > commit.n_own_verified
        ahead.observe_pass(commit.seconds, None if hinted else n)
        ahead.observe_round_trip(self._generation.remote.round_trip)
        stats.count(commit)
        self._weigh(n)
        self._text.extend(tokens)
        if trees is not None:
            self._exhausted, self._draft_void = False, True  # of a chain that went on from another one
            # What is left is known to the target, unless there was more than a hint could hold.
            known = bool(self._chain) and self._hinted is not None and not trees.was_cut
            self._hinted = (len(self._text), trees.version) if known else None
        elif n_right < min(n, len(self._chain)):
            stats.wasted_seconds += (len(self._chain) - n_right) * ahead.draft_seconds
            self._chain, self._probs = [], []
            self._draft_void = True
            self._hinted = None
            self._exhausted = self._drafter is None
        else:
            if n >= len(self._chain):
                self._exhausted = self._drafter is None
            del self._chain[:n], self._probs[:n]

    def _follow(self, trees: TreeAhead, tokens: list[int]) -> int:
        """Keep of the tree what still holds; returns how many tokens were on one of its paths."""
        n_right = trees.follow(tokens)
        # A token that no branch has is as wrong as one of a chain.
        path = [*tokens[:n_right], -1]
        self._ahead.observe_truth(path, [UNKNOWN_PROB] * len(path), tokens)
        self._chain, self._probs = trees.main_path()
        return n_right

    # -- whether drafting pays

    def _may_draft(self) -> bool:
        """Whether the draft may work now, by what it has given and taken so far."""
        if not self._weighs:
            return True
        return self._payoff.drafting or (self._payoff.prepares and not self._ready)

    def _weigh(self, n_tokens: int) -> None:
        """A commit of so many tokens has come: with drafts, or without."""
        if not self._weighs:
            return
        payoff, lag = self._payoff, self._generation.remote.round_trip
        if not self._counted:
            self._counted = True
            payoff.begin()
        drafting = payoff.drafting
        unclear = not self._ready or lag == 0.0 if drafting else self._draft is not None
        payoff.observe(n_tokens, self._news_at, None if unclear else lag)
        if drafting and not payoff.drafting and not payoff.prepares:
            self._ready = False  # it falls behind the text

    # -- the hints

    def _send_hint(self) -> float | None:
        """Send the chain if it is time to; returns how long to wait at most for news, None: any time."""
        if self._weighs and not self._payoff.drafting:
            if self._hinted is not None and not self._generation.lost:
                self._generation.hint(len(self._text), [])  # the target is to do without from now on
                self._hinted = None
            return None
        trees = self._trees if self._branches() and self._trees is not None else None
        size = len(self._text) + min(len(self._chain), self._generation.max_hint)
        state = (len(self._text), size if trees is None else trees.version)
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
        if self._branches() and self._trees is not None and self._trees.tree.tokens:
            tree = self._trees.hint(self._generation.max_hint, self._ahead.n_passed(now - self._news_at))
            self._generation.hint(len(self._text), tree.tokens, tree.parents)
        else:
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
            told = RunBuilder(len(self._text) + i, "local")
            told.add(*self._local_shown.feed(self._chain[i]), self._chain[i])
            runs = list(told.runs())
            self._local += runs
            self._stats.n_local += 1
            yield from runs

"""How large a tree to draft, and which of its tokens to show: as long as a chain's, from measured costs."""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from sllm.draft.length import DraftPays, PassTimes
from sllm.draft.tree import DraftedTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Shape", "Shares", "TreeGrowth", "likeliest_first", "n_worth_showing"]


class Shape(NamedTuple):
    """How a tree is to be drafted.

    Attributes:
        n_passes: of the draft's model at most; no branch gets longer.
        width: tokens that one pass computes.
        n_nodes: tokens of the tree at most.
        p_min: no pass goes on behind a token whose chance is smaller.

    """

    n_passes: int
    width: int
    n_nodes: int
    p_min: float


_EDGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)

_WORTH = 10.0
"""What a drafter says is worth so many tokens of counting."""

_KEEP = 0.98
"""What is left of the past with each token of the text."""


class Shares:
    """What the shares that a drafter gives its tokens are worth, learnt while a text is written.

    A share is calibrated on pairs of models that are like most (benchmarks/RESULTS.md, "Trees"). Counting how
    often tokens of about this share were the target's, apart for a drafter's own choices and for its
    runners-up, corrects it where a pair is unlike those.
    """

    def __init__(self) -> None:
        # The past fades as what is new weighs more.
        self._weight = 1.0
        n = len(_EDGES) + 1
        self._right = [[0.0] * n, [0.0] * n]  # of runners-up, of first choices
        self._said = [[0.0] * n, [0.0] * n]  # the sums of their shares

    def corrected(self, share: float, first: bool) -> float:
        """The chance that a token is the target's, to which the drafter gave ``share`` and which is its own
        choice (``first``) or a runner-up.
        """
        i = bisect(_EDGES, share)
        prior = _WORTH * self._weight
        return min(share * (prior + self._right[first][i]) / (prior + self._said[first][i]), 0.999)

    def chances(self, tree: DraftedTree) -> tuple[list[float], list[bool]]:
        """For each token of a tree the chance that the text comes to it, and whether it is on the main path
        (see :class:`~sllm.targets.tree.TokenTree`).
        """
        chances: list[float] = []
        main: list[bool] = []
        for share, parent, first in zip(tree.shares, tree.parents, tree.firsts(), strict=True):
            chance = self.corrected(share, first)
            chances.append(chance if parent < 0 else chance * chances[parent])
            main.append(first and (parent < 0 or main[parent]))
        return chances, main

    def observe(self, tree: DraftedTree, truth: Sequence[int]) -> list[int]:
        """Compare a tree with what came in its place; returns the places of the tokens that hold."""
        firsts = tree.firsts()
        path: list[int] = []
        at = -1
        for true in truth:
            holds = -1
            self._weight /= _KEEP
            for i in range(at + 1, len(tree)):
                if tree.parents[i] == at:
                    share = tree.shares[i]
                    j = bisect(_EDGES, share)
                    self._said[firsts[i]][j] += share * self._weight
                    if tree.tokens[i] == true:
                        self._right[firsts[i]][j] += self._weight
                        holds = i
            if holds < 0:
                break
            path.append(holds)
            at = holds
        if self._weight > 1e6:
            for counts in (*self._right, *self._said):
                counts[:] = [count / self._weight for count in counts]
            self._weight = 1.0
        return path


def likeliest_first(chances: Sequence[float]) -> list[int]:
    """The places of a tree's tokens by their chances: parents come before their children."""
    return sorted(range(len(chances)), key=lambda i: (-chances[i], i))


def n_worth_showing(tokens: Sequence[tuple[float, bool]], rows: Iterable[float]) -> int:
    """How many of a tree's tokens, likeliest first, bring more than their rows cost.

    Args:
        tokens: of each its chance, and whether it is on the main path.
        rows: what each row costs, in tokens that its time would bring otherwise.

    """
    gain, best_gain, best = 0.0, 0.0, 0
    for n, ((chance, main), row) in enumerate(zip(tokens, rows), 1):  # noqa: B905 - there may be more rows
        # A token beside the main path is computed again with the next pass, if it holds.
        gain += chance - row if main else chance * (1 - row) - row
        if gain > best_gain:
            best, best_gain = n, gain
    return best


class _Width:
    """What trees of one width have brought: running means of the tokens that are likely to hold, of those
    that were worth showing, and of the passes of the draft.
    """

    _NEW = 0.15

    def __init__(self) -> None:
        self.n = 0  # rounds
        self._holds = self._shown = self._passes = 0.0

    def add(self, holds: float, shown: int, n_passes: int) -> None:
        """One more tree."""
        self.n += 1
        new = max(self._NEW, 1 / self.n)
        self._holds += new * (holds - self._holds)
        self._shown += new * (shown - self._shown)
        self._passes += new * (n_passes - self._passes)

    def rate(self, costs: Sequence[float], pass_seconds: float) -> float:
        """The tokens per second to expect."""
        return (1 + self._holds) / (costs[round(self._shown)] + self._passes * pass_seconds)


class TreeGrowth(DraftPays):
    """Chooses how trees are drafted and what of them is verified, from measured acceptance and costs.

    The chances of a tree's tokens add up to the number of tokens that it is likely to bring. So a token is
    shown as long as its chance exceeds what its row takes of the target's time, in tokens that this time
    would bring otherwise: on a machine whose rows cost little that is a wide tree, elsewhere often a chain.
    By the same measure a tree is not drafted on behind tokens whose chance is below what a pass of the draft
    takes (to stop there is optimal for chains: 2405.19715). Whether a pass computes a few tokens or one is
    tried, and now and then again.

    Args:
        limit: tokens that the target can check in one pass.
        times: as for :class:`DraftPays`.

    """

    LIMIT = 32
    """No tree is larger. Where rows cost nothing, twice as many bring a tenth more."""

    WIDTHS = (1, 4)
    """Rows of a draft's pass. More than four bring nothing, two a little less than four."""

    DEEPEST = 16
    """Passes of a draft at most."""

    P_MIN = 0.02
    """Nothing is computed behind a token that is less likely, whatever a pass costs."""

    _FIRST = 2
    """Passes of a tree as long as it is not known what they cost."""

    _STEP = 4
    """So many tokens are shown at first, and then at most twice as many as ever before: what rows cost shows
    before they are many.
    """

    _ROUNDS = 2
    """Trees of each width that are tried at first."""

    _EXPLORE_EVERY = 24
    """Of so many rounds with a draft one tries the other width."""

    _DECIDE_EVERY = 4
    """So many rounds keep one shape: choosing takes as long as a pass of a tiny model."""

    def __init__(self, limit: int = LIMIT, times: PassTimes | None = None) -> None:
        super().__init__(times)
        self.limit = min(limit, self.LIMIT)
        self._widths = {width: _Width() for width in self.WIDTHS}
        self._draft = PassTimes()  # by width
        self._shares = Shares()
        self._costs: list[float] = []  # of passes of 1, 2, ... rows; empty: to be made out anew
        self._rate = 0.0  # tokens per second to expect; 0: unknown
        self._shape: Shape | None = None  # which stays for some rounds
        self._n_shaped = 0
        self._most = 0  # tokens that a pass has verified
        self._asked = Shape(0, 1, 0, 0.0)

    def _loses(self) -> bool:
        """See :meth:`DraftPays._loses`. A draft whose passes take as long as the target's gains nothing,
        however many of its tokens hold: the first try shows it.
        """
        if self._rounds and self._draft.seen and self._draft.estimate(1) >= self._pass.estimate(1):
            return True
        return super()._loses()

    def shape(self, room: int) -> Shape:
        """How to draft the next tree, which may get ``room`` tokens deep."""
        for width in reversed(self.WIDTHS):
            if self._widths[width].n < self._ROUNDS:
                shape = self._shaped(width)
                self._asked = shape._replace(n_passes=min(shape.n_passes, room))
                return self._asked
        explores = self._n_rounds % self._EXPLORE_EVERY == 0
        self._n_shaped += 1
        if self._shape is None or explores or self._n_shaped % self._DECIDE_EVERY == 0:
            self._shape = self._decided(explores)
        shape = self._shape
        if explores:
            self._shape = None
        self._asked = shape._replace(n_passes=min(shape.n_passes, room))
        return self._asked

    def _decided(self, explores: bool) -> Shape:
        costs = self._row_costs()
        rated = [(of.rate(costs, self._draft_pass(width)), width) for width, of in self._widths.items()]
        rated.sort(reverse=True)
        self._rate = rated[0][0]
        return self._shaped(rated[1 if explores else 0][1])

    def _shaped(self, width: int) -> Shape:
        # A pass computes the `width` likeliest tokens, and half of the places are filled with such as are
        # just worth it.
        costs = self._row_costs()
        rate = self._rate or 1 / costs[0]
        worth = rate * (2 * self._draft_pass(width) / (1 + width) + costs[1] - costs[0])
        n_passes = self.DEEPEST if self._draft.seen else self._FIRST
        return Shape(n_passes, width, self.limit, min(max(worth, self.P_MIN), 0.8))

    def _draft_pass(self, width: int) -> float:
        """Seconds of a pass of the draft; 0: not known yet."""
        return self._draft.estimate(width) if self._draft.seen else 0.0

    def everything(self, room: int) -> Shape:
        """The largest tree, whatever it costs."""
        return Shape(min(self.DEEPEST, room), self.WIDTHS[-1], self.limit, self.P_MIN)

    def keep(self, tree: DraftedTree) -> DraftedTree:
        """The tokens that the target should check, likeliest first."""
        if not tree.tokens:
            return tree
        chances, main = self._shares.chances(tree)
        order = likeliest_first(chances)[: min(self.limit, max(self._STEP, 2 * self._most))]
        costs = self._row_costs()
        rate = self._rate or 1 / costs[0]
        rows = [rate * (after - before) for before, after in pairwise(costs)]
        best = n_worth_showing([(chances[i], main[i]) for i in order], rows)
        shown = order[: max(best, 1)]  # a try that shows nothing can only fail
        if self._asked.n_passes > self._FIRST:  # the first one was only to learn what a pass costs
            self._widths[self._asked.width].add(sum(chances[i] for i in shown), len(shown), tree.n_passes)
        return tree.take(shown)

    def chance_of_main_path(self, tree: DraftedTree) -> float:
        """How likely all of a tree's main path is to hold."""
        chance = 1.0
        for place in tree.main_places():
            chance *= self._shares.corrected(tree.shares[place], first=True)
        return chance

    def _row_costs(self) -> list[float]:
        if not self._costs:
            self._costs = self._pass.up_to(self.limit + 2)
        return self._costs

    # ---- what is measured

    def observe_draft(self, tree: DraftedTree, seconds: float) -> None:
        """Drafting the tree that was asked for last took so long."""
        if tree.n_passes > 0:
            self._draft.add(self._asked.width, seconds / tree.n_passes)

    def observe_truth(self, tree: DraftedTree, truth: Sequence[int]) -> list[int]:
        """In the place of a drafted ``tree`` came the tokens ``truth``, also of such as were not shown.

        Returns the places of those that hold.
        """
        return self._shares.observe(tree, truth)

    def observe_pass(self, n_verified: int, seconds: float) -> None:
        """See :meth:`DraftPays.observe_pass`; tokens that were computed again count as well."""
        super().observe_pass(n_verified, seconds)
        self._costs = []
        self._most = max(self._most, n_verified)

"""Draft and target in turns, simulated: a target that is called pass by pass.

The rules are the runtime's own: :class:`~sllm.draft.length.DraftLength` says how long a chain is and
:class:`~sllm.draft.growth.TreeGrowth` how large a tree, as in :mod:`sllm.generation.rounds`. They are given
the measured times of passes. On average the result is equation 1 of Leviathan et al. (2211.17192) over the
time of a round, in which k drafted tokens, each right with probability a, give ``(1 - a^(k+1)) / (1 - a)``
tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sllm.draft.growth import Shape, TreeGrowth
from sllm.draft.length import DraftLength
from sllm.draft.linked import LinkedPassTimes
from sllm.draft.tree import DraftedTree
from sllm.generation.rounds import TreeRounds, may_grow, tells_of_drafts
from sllm.planning.events import Simulated
from sllm.planning.recorded import Replay

if TYPE_CHECKING:
    from sllm.draft.length import PassTimes
    from sllm.planning.recorded import Recorded

__all__ = ["chains", "trees"]


def chains(
    text: Recorded,
    passes: PassTimes,
    draft: PassTimes,
    *,
    limit: int = DraftLength.LIMIT,
    overlaps: bool = False,
    far: bool = False,
    own_pace: float | None = None,
) -> Simulated:
    """Simulate a text that is drafted by chains.

    Args:
        text: as recorded.
        passes: time of a pass of the target by number of rows, including the round trip.
        draft: time of a pass of the draft by number of rows.
        limit: drafted tokens that one pass checks.
        overlaps: whether drafting goes on while the target verifies.
        far: whether there is a link in between, so that drafting may continue without limit.
        own_pace: time per token for tokens that come without a pass of their own, if there are any.

    """
    length, replay = DraftLength(limit, own_pace=own_pace is not None), Replay(text, draft)
    n_tokens = len(text.truth)
    seconds = 0.0
    pos = n_passes = n_hints = n_rows = n_accepted = 0
    chain: list[int] = []
    probs: list[float] = []
    while pos < n_tokens:
        drafting, drafts = 0.0, length.begin()
        while drafts:
            wanted, p_min = length.more(probs)
            wanted = min(wanted, n_tokens - pos - len(chain) - 1)
            if wanted <= 0:
                break
            new, new_probs, took = replay.chain(pos, chain, wanted, p_min)
            length.observe_draft(len(new) + (len(new) < wanted), took)
            drafting += took
            chain += new
            probs += new_probs
            if len(new) < wanted:
                break
        n_shown = min(length.keep(probs), len(chain)) if drafts else 0
        right = _n_right(text, pos, chain[:n_shown])
        answer = passes.estimate(n_shown + 1) if n_shown or own_pace is None else own_pace
        if overlaps and (n_shown > 0 or n_passes == 0):
            most = 1 + (length.limit if far else n_shown)
            new, new_probs, _ = replay.chain(pos, chain, min(most, int(answer / draft.estimate(1))))
            chain += new
            probs += new_probs
        truth = text.truth[pos : pos + right + 1]
        length.observe_pass(n_shown, answer)
        length.observe_truth(chain, probs, truth)
        if tells_of_drafts(n_shown, drafting, answer):
            length.observe_round(len(truth), drafting + answer)
        holds = tuple(chain[: len(truth)]) == truth
        chain, probs = (chain[len(truth) :], probs[len(truth) :]) if holds else ([], [])
        seconds += drafting + answer
        pos += right + 1
        n_passes += 1
        n_hints += n_shown > 0
        n_rows += n_shown
        n_accepted += right
    return Simulated(n_tokens, seconds, n_passes, n_hints, replay.n_drafted, n_accepted, n_rows)


def _n_right(text: Recorded, pos: int, chain: list[int]) -> int:
    """How many tokens of a chain are the text's own, the last of which is the target's in any case."""
    n = 0
    while n < len(chain) and pos + n + 1 < len(text.truth) and chain[n] == text.truth[pos + n]:
        n += 1
    return n


def trees(
    text: Recorded,
    passes: PassTimes,
    draft: PassTimes,
    *,
    limit: int = TreeGrowth.LIMIT,
    round_trip: float = 0.0,
) -> Simulated:
    """Simulate a text that is drafted by trees.

    Args:
        text, passes, draft: as for :func:`chains`.
        limit: drafted tokens that one pass checks.
        round_trip: the part of a pass that is the round trip, during which the tree grows. Windows sent ahead
            are not simulated: the real text may be faster.

    """
    growth = TreeGrowth(limit, LinkedPassTimes(lambda: round_trip) if round_trip else None)
    replay = Replay(text, draft)
    n_tokens = len(text.truth)
    seconds = 0.0
    pos = n_passes = n_hints = n_rows = n_accepted = n_again = 0
    tree = DraftedTree()
    while pos < n_tokens:
        shown, drafting = DraftedTree(), 0.0
        room = n_tokens - pos - 1
        width = growth.WIDTHS[-1]
        if growth.begin() and room > 0:
            shape = growth.shape(min(room, growth.DEEPEST))
            width, tree = shape.width, replace(tree, n_passes=0)
            if len(tree) < growth.limit:
                anew, known = not tree.tokens, tree
                drafted, drafting = replay.tree(pos, _with_room(shape, known), known)
                tree = drafted.merged(known)
                if anew:
                    growth.observe_draft(drafted, drafting)
            shown = growth.keep(tree)
        else:
            tree = DraftedTree()
        answer = passes.estimate(1 + len(shown) + n_again)
        if round_trip and shown.tokens:
            tree = _grown(tree, answer, width, replay, pos, growth)
        n = len(shown.path(text.truth[pos : n_tokens - 1]))
        truth = text.truth[pos : pos + n + 1]
        growth.observe_pass(len(shown) + n_again, answer)
        growth.observe_truth(tree, truth)
        n_rows += len(shown) + n_again
        n_again = shown.n_beside(truth[:n])
        if tells_of_drafts(len(shown), drafting, answer):
            growth.observe_round(len(truth), drafting + answer)
        tree = tree.after(truth) if round_trip else DraftedTree()
        seconds += drafting + answer
        pos += n + 1
        n_passes += 1
        n_hints += len(shown) > 0
        n_accepted += n
    return Simulated(n_tokens, seconds, n_passes, n_hints, replay.n_drafted, n_accepted, n_rows)


def _with_room(shape: Shape, known: DraftedTree) -> Shape:
    return shape._replace(n_nodes=len(known) + shape.n_nodes)


def _grown(
    tree: DraftedTree, left: float, width: int, replay: Replay, pos: int, growth: TreeGrowth
) -> DraftedTree:
    """What becomes of a tree in ``left`` seconds."""
    while may_grow(tree, growth):
        n_inner = len(set(tree.parents))
        known = tree.take(tree.likeliest(TreeRounds.MOST_KNOWN))
        drafted, took = replay.tree(
            pos, Shape(TreeRounds.STEP, width, TreeRounds.LARGEST, growth.P_MIN), known
        )
        left -= took
        if left < 0:
            break
        tree = drafted.merged(tree)
        tree = tree.take(tree.likeliest(TreeRounds.LARGEST))
        if len(set(tree.parents)) <= n_inner:
            break
    return tree

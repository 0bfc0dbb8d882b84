"""TreeAhead: what a draft grows while its hints travel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from oracles import EXACT, PLAIN, make_prompt, one_by_one

from sllm.draft.drafters import ModelDrafter
from sllm.draft.growth import Shape
from sllm.draft.tree import DraftedTree
from sllm.engine.context import MOST_DRAFTED
from sllm.engine.tree import MAX_NODES
from sllm.generation.tree_ahead import MOST_SHOWN, TreeAhead
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from sllm.engine.model import Model


def test_a_tree_goes_on_over_commits(target_model: Model, draft_model: Model) -> None:
    """Step by step, from what a commit leaves: the same tree as one that is drafted there from its root."""
    text = make_prompt(target_model, 6, seed=4).tolist()
    truth = one_by_one(target_model, np.array(text, dtype=np.int32), PLAIN, 12)
    trees = TreeAhead()
    with ModelDrafter(draft_model, n_ctx=256, **EXACT) as drafter:
        drafter.open(text, PLAIN)
        n_right = 0
        for token in truth:
            while (shape := trees.shape(100, 0.02, 0.01)) is not None:
                before = set(ways(trees.tree))
                assert trees.take(drafter.draft_tree(text, shape, trees.known()), [])
                assert before <= set(ways(trees.tree)) or len(trees.tree) == MOST_DRAFTED
            whole = drafter.draft_tree(text, Shape(8, TreeAhead.WIDTH, MAX_NODES, TreeAhead.P_MIN))
            for way, share in ways(whole).items():
                assert abs(ways(trees.tree).get(way, share) - share) < 1e-3
            text = [*text, token]
            n_right += trees.follow([token])
        assert 0 < n_right < len(truth) + 1


def ways(tree: DraftedTree) -> dict[tuple[int, ...], float]:
    return {
        tuple(tree.tokens[i] for i in tree.way_to(place)): tree.shares[place] for place in range(len(tree))
    }


def test_a_draft_from_before_a_commit_gives_what_comes_after_it() -> None:
    trees = TreeAhead()
    assert trees.shape(0, 0.03, 0.01) is None  # no room
    drafted = DraftedTree((1, 2, 3, 4), (-1, 0, 0, 1), (0.8, 0.5, 0.4, 0.9), 3)
    assert not trees.take(drafted, [7])  # the text went another way
    assert trees.version == 0
    assert trees.take(drafted, [1])
    assert sorted(trees.tree.tokens) == [2, 3, 4]
    assert trees.main_path() == ([2, 4], [0.5, 0.9])
    assert trees.follow([3]) == 1
    assert trees.tree.tokens == ()
    assert trees.follow([3]) == 0


def test_a_hint_is_a_tree_without_what_is_late() -> None:
    trees = TreeAhead()
    n = 200
    chain = DraftedTree.chain(range(1000, 1000 + n), [0.9] * n).merged(
        DraftedTree((200, 201), (-1, 0), (0.5, 0.5)).merged(DraftedTree((300,), (-1,), (0.7,)))
    )
    assert trees.take(chain, [])
    hint = trees.hint(1000, 1)
    TokenTree(hint.tokens, hint.parents)  # raises where it is none
    assert len(hint) == MOST_SHOWN
    assert 300 not in hint.tokens  # the target will be past it
    assert 201 in hint.tokens
    assert 300 in trees.hint(1000, 0).tokens
    assert len(trees.hint(3, 0)) == 3
    assert trees.hint(3, 200).tokens == ()

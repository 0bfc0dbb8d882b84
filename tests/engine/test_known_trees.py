"""Context.draft(known=): a tree goes on from nodes that are known already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from oracles import EXACT, PLAIN, make_prompt

from sllm.draft.tree import DraftedTree

if TYPE_CHECKING:
    from sllm.engine.model import Model


@pytest.mark.parametrize(
    "known",
    [
        [([1, 1], [-1, -1])],
        [([5], [3])],
        [([5, 6], [-1])],
        [([5], [-1]), ([5], [-1])],
        [([10**6], [-1])],
        [(list(range(41)), list(range(-1, 40)))],
    ],
    ids=["twice the same", "no parent", "lengths", "too many", "no token", "too large"],
)
def test_what_is_no_tree_is_refused_and_harms_nothing(draft_model: Model, known: Any) -> None:
    prompt = make_prompt(draft_model, 5, seed=1)
    with draft_model.context(n_ctx=64, **EXACT) as context:
        how: dict[str, Any] = {"n_max": 3, "width": 4, "n_nodes": 40, "sampling": PLAIN}
        before = context.draft([0], [prompt], **how)
        with pytest.raises(ValueError, match=r"known|token|node"):
            context.draft([0], [prompt[-1:]], pos=len(prompt) - 1, known=known, **how)
        after = context.draft([0], [prompt[-1:]], pos=len(prompt) - 1, **how)
        assert before.tokens.tolist() == after.tokens.tolist()
        with pytest.raises(ValueError, match="chain"):
            context.draft([0], [prompt[-1:]], pos=len(prompt) - 1, known=[([], [])])


def test_one_pass_goes_on_where_the_last_call_ended(draft_model: Model) -> None:
    prompt = make_prompt(draft_model, 5, seed=2)
    how: dict[str, Any] = {"width": 4, "n_nodes": 200, "p_min": 0.0, "sampling": PLAIN}
    with draft_model.context(n_ctx=64, **EXACT) as context:
        first = DraftedTree.of_draft(context.draft([0], [prompt], n_max=3, **how), 0)
        known = first.take([i for i in range(len(first)) if i in first.parents or i < 2])
        drafts = context.draft(
            [0], [prompt[-1:]], pos=len(prompt) - 1, n_max=1, known=[(known.tokens, known.parents)], **how
        )
        assert drafts.n_passes == 1
        assert context.memory.length(0) == len(prompt)
        second = DraftedTree.of_draft(drafts, 0)
        shares = {
            tuple(second.tokens[i] for i in second.way_to(place)): second.shares[place]
            for place in range(len(second))
        }
        for place in range(len(first)):
            way = tuple(first.tokens[i] for i in first.way_to(place))
            assert shares[way] == pytest.approx(first.shares[place], abs=1e-4)
        assert all(place in second.parents for place in (second.path([known.tokens[0]])))

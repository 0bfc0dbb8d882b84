"""What the branches of hints are worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft.streak import HintTrust
from sllm.targets.tree import TokenTree
from sllm.worker.branches import Branches

FAN = TokenTree((1, 2, 3, 4, 5, 6), (-1, -1, -1, 0, 0, 3))
"""Three ways to begin; after the first one two more, and one token after the first of these."""


def taught(truths: list[list[int]], tree: TokenTree = FAN) -> Branches:
    branches = Branches(HintTrust())
    for truth in truths:
        branches.observe_truth(tree, truth)
    return branches


def test_a_chain_is_worth_what_its_tokens_were() -> None:
    chain, trust, alone = TokenTree.chain(range(8)), HintTrust(), HintTrust()
    branches = Branches(trust)
    for n in (8, 3, 0, 8, 5):
        truth = [*range(n), 99]
        branches.observe_truth(chain, truth)
        alone.observe_truth(chain.tokens, truth)
    assert trust.chance == alone.chance
    assert branches.worths(chain) == pytest.approx([alone.chance**n for n in range(1, 9)])


def test_runners_up_that_are_right_become_worth_more() -> None:
    fan = TokenTree((1, 2, 3), (-1, -1, -1))
    before = taught([], fan).worths(fan)
    assert before[0] > before[1] > before[2] > 0
    assert sum(before) < 1
    second = taught([[2, 9]] * 30).worths(fan)
    assert second[1] > before[1]
    assert second[0] == second[1]  # the first one is hardly ever right, and is checked with the other
    none = taught([[9]] * 30).worths(fan)
    assert none[1] < before[1] and none[2] < before[2]


@examples(100)
@given(
    truths=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), max_size=30),
    parents=st.lists(st.integers(0, 9), max_size=10),
)
def test_worths_fall_and_are_chances(truths: list[list[int]], parents: list[int]) -> None:
    tree = TokenTree(tuple(range(len(parents))), tuple(min(p, i) - 1 for i, p in enumerate(parents)))
    worths = taught(truths).worths(tree)
    assert len(worths) == len(tree)
    assert all(0 <= worth <= 1 for worth in worths)
    assert worths == sorted(worths, reverse=True)
    assert sum(worths) <= 1 + max(tree.depths(), default=0) + 1e-9  # one token for each position at most

"""DraftedTree: what agrees with a text stays, and two trees become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree


@st.composite
def trees(draw: st.DrawFn, most: int = 24) -> DraftedTree:
    """Any tree of tokens 0 to 5; no parent has the same token twice."""
    tokens: list[int] = []
    parents: list[int] = []
    for i in range(draw(st.integers(0, most))):
        parent = draw(st.integers(-1, i - 1))
        taken = {tokens[k] for k in range(i) if parents[k] == parent}
        free = [token for token in range(6) if token not in taken]
        if not free:
            break
        parents.append(parent)
        tokens.append(draw(st.sampled_from(free)))
    shares = draw(st.lists(st.floats(0, 1), min_size=len(tokens), max_size=len(tokens)))
    return DraftedTree(tuple(tokens), tuple(parents), tuple(shares))


def ways(tree: DraftedTree) -> dict[tuple[int, ...], float]:
    """Each token as the whole way to it, with its share there."""
    return {
        tuple(tree.tokens[i] for i in tree.way_to(place)): tree.shares[place] for place in range(len(tree))
    }


@given(trees(), st.lists(st.integers(0, 5), max_size=4))
@examples(200)
def test_what_comes_after_is_what_stood_behind(tree: DraftedTree, committed: list[int]) -> None:
    n = len(committed)
    wanted = {way[n:]: share for way, share in ways(tree).items() if way[:n] == tuple(committed) and way[n:]}
    assert ways(tree.after(committed)) == wanted
    path = tree.path(committed)
    assert [tree.tokens[place] for place in path] == committed[: len(path)]


@given(trees(), trees())
@examples(200)
def test_two_trees_as_one_have_the_ways_of_both(one: DraftedTree, other: DraftedTree) -> None:
    both = one.merged(other)
    TokenTree(both.tokens, both.parents)  # raises where it is no tree
    for way, share in ways(both).items():
        assert share == max(tree[way] for tree in (ways(one), ways(other)) if way in tree)
    assert set(ways(both)) == set(ways(one)) | set(ways(other))


@given(trees(), st.integers(0, 30))
@examples(200)
def test_the_likeliest_are_a_tree_and_likelier_than_the_others(tree: DraftedTree, n: int) -> None:
    places = tree.likeliest(n)
    part = tree.take(places)
    TokenTree(part.tokens, part.parents)
    chances = tree.chances()
    assert len(part) == min(n, len(tree))
    rest = set(range(len(tree))) - set(places)
    assert all(chances[place] >= chances[other] for place in places for other in rest)


def test_first_choices_are_those_that_stand_first() -> None:
    tree = DraftedTree((1, 2, 3, 4), (-1, -1, 1, 1), (0.5, 0.4, 0.6, 0.3))
    assert tree.firsts() == [True, False, True, False]
    assert list(tree.depths()) == [0, 0, 1, 1]
    assert tree.chances() == pytest.approx([0.5, 0.4, 0.24, 0.12])

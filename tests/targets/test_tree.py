"""Trees of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.engine.tree import MAX_NODES, is_chain
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

N_VOCAB = 5


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any tree; small numbers, so that paths meet."""
    found: list[tuple[int, int]] = []
    for i in range(draw(st.integers(0, 12))):
        node = draw(st.integers(-1, N_VOCAB)), draw(st.integers(-1, i - 1) | st.just(i - 1))
        if node[1] < len(found) and node not in found:
            found.append(node)
    return TokenTree(tuple(token for token, _ in found), tuple(parent for _, parent in found))


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """The way to each token, in order, as a plain recursion finds it."""

    def way(i: int) -> tuple[int, ...]:
        return () if i < 0 else (*way(tree.parents[i]), tree.tokens[i])

    return [way(i) for i in range(len(tree))]


def beginnings(found: Sequence[tuple[int, ...]]) -> bool:
    """Whether of each path also its beginning is among those before it."""
    return all(len(path) == 1 or path[:-1] in found[:i] for i, path in enumerate(found))


@examples(200)
@given(tree=trees(), committed=st.lists(st.integers(0, N_VOCAB), max_size=4))
def test_what_follows_after_some_tokens_are_the_paths_that_begin_with_them(
    tree: TokenTree, committed: list[int]
) -> None:
    n, wanted = len(committed), tuple(committed)
    rest = tree.after(committed)
    if wanted and wanted not in paths(tree):
        assert rest is None
    else:
        assert rest is not None
        assert paths(rest) == [path[n:] for path in paths(tree) if path[:n] == wanted and len(path) > n]


@examples(200)
@given(tree=trees(), n_deep=st.integers(-1, 8), n_tokens=st.integers(-1, 14))
def test_what_can_be_verified_keeps_the_order_and_every_way(
    tree: TokenTree, n_deep: int, n_tokens: int
) -> None:
    found = paths(tree.usable(N_VOCAB, n_deep, n_tokens))
    every = [
        path for path in paths(tree) if len(path) <= n_deep and all(0 <= token < N_VOCAB for token in path)
    ]
    assert found == every[: max(n_tokens, 0)]
    assert beginnings(found)


@examples(200)
@given(tree=trees(), n=st.integers(-1, 14))
def test_the_head_of_a_tree_is_a_tree(tree: TokenTree, n: int) -> None:
    assert paths(tree.head(n)) == paths(tree)[: max(n, 0)]
    assert tree.depths() == tuple(len(path) - 1 for path in paths(tree))


@examples(200)
@given(tree=trees())
def test_the_main_path_is_one_of_first_tokens(tree: TokenTree) -> None:
    main, found = tree.main_path(), paths(tree)
    at: tuple[int, ...] = ()
    while True:
        after = [path for path in found if path[:-1] == at]
        if not after:
            break
        at = after[0]
    assert main == at
    assert TokenTree.chain(main).is_chain
    assert tree.is_chain == (len(main) == len(tree) and tree.parents == tuple(range(-1, len(tree) - 1)))


@pytest.mark.parametrize(
    ("tokens", "parents", "said"),
    [
        ((1, 2), (-1,), "2 tokens and 1 parents"),
        ((1,), (0,), "the parent 0"),
        ((1, 2), (1, 0), "the parent 1"),
        ((1, 2), (-1, 1), "the parent 1"),
        ((1, 2), (-1, -2), "the parent -2"),
        ((1, 2), (-1, 2**40), "the parent"),
        ((1, 2, 2), (-1, 0, 0), "same parent"),
        ((1, 1), (-1, -1), "same parent"),
        (tuple(range(MAX_NODES + 1)), (-1,) * (MAX_NODES + 1), f"at most {MAX_NODES}"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenTree(tokens, parents)
    with pytest.raises(ValueError, match=said):
        TokenTree.of(tokens, parents)


def test_a_chain_may_be_longer_than_a_tree() -> None:
    chain = TokenTree.of(range(1000), None)
    assert chain.is_chain and is_chain(chain.parents)
    assert chain == TokenTree.of(range(1000), range(-1, 999))
    assert chain.after([0, 1, 2]) == TokenTree.chain(range(3, 1000))

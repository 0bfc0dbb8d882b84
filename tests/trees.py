"""Trees of tokens for tests: random ones, of which some path may be the text itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main_path", "n_right", "random_tree", "shuffled"]


def random_tree(
    rng: np.random.Generator, n_nodes: int, truth: Sequence[int], n_vocab: int
) -> tuple[list[int], list[int]]:
    """Tokens and parents of up to ``n_nodes`` nodes. One that comes after a beginning of ``truth`` goes on
    with it in about half the cases, as first child or not.
    """
    tokens: list[int] = []
    parents: list[int] = []
    said: list[int] = []  # how much of the truth the path to a node says; -1: it says something else
    siblings: set[tuple[int, int]] = set()
    deep = rng.random()  # how often the newest node is the parent
    for _ in range(n_nodes):
        newest = len(tokens) - 1
        parent = newest if rng.random() < deep else int(rng.integers(-1, len(tokens)))
        at = 0 if parent < 0 else said[parent]
        follows = 0 <= at < len(truth)
        token = truth[at] if follows and rng.random() < 0.5 else int(rng.integers(0, n_vocab))
        if (parent, token) not in siblings:
            siblings.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            said.append(at + 1 if follows and token == truth[at] else -1)
    return tokens, parents


def shuffled(
    rng: np.random.Generator, tokens: Sequence[int], parents: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The same tree in another order, parents still before their children."""
    place: dict[int, int] = {-1: -1}
    left = set(range(len(tokens)))
    order: list[int] = []
    while left:
        at = int(rng.choice(sorted(i for i in left if parents[i] in place)))
        place[at] = len(order)
        order.append(at)
        left.discard(at)
    return [tokens[i] for i in order], [place[parents[i]] for i in order]


def main_path(tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The tokens of each node's first child, from the root on."""
    path: list[int] = []
    at = -1
    while at in parents:
        at = list(parents).index(at)
        path.append(tokens[at])
    return path


def n_right(tokens: Sequence[int], parents: Sequence[int], truth: Sequence[int]) -> int:
    """How many tokens of ``truth`` a path of the tree says, from the root on."""
    at, n = -1, 0
    for token in truth:
        found = [i for i in range(len(tokens)) if parents[i] == at and tokens[i] == token]
        if not found:
            break
        at, n = found[0], n + 1
    return n

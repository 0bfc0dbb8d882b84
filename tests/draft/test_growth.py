"""TreeGrowth and Shares: simulated targets and drafts with known costs, and what is chosen for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.draft.growth import Shape, Shares, TreeGrowth
from sllm.draft.tree import DraftedTree


@dataclass
class World:
    """A target and a draft whose costs are known, and whose shares say what they are worth.

    After each token there are candidates whose shares are one of ``kinds``; the text goes on with one of
    them, or with something else.
    """

    target: float = 1.0
    """Seconds of a pass for one token, and that each further row adds:"""
    row: float = 0.0
    draft: float = 0.05
    """Seconds of a draft's pass, and that each further row adds:"""
    draft_row: float = 0.0
    kinds: tuple[tuple[float, ...], ...] = ((0.6, 0.15, 0.1, 0.05), (0.9, 0.04), (0.35, 0.25, 0.1, 0.1))
    worth: float = 1.0
    """How often tokens are right, in parts of what their shares say."""
    seed: int = 1

    def shares(self, way: tuple[int, ...]) -> tuple[float, ...]:
        return self.kinds[hash((self.seed, way)) % len(self.kinds)]

    def drafted(self, shape: Shape) -> DraftedTree:
        """As ``Context.draft`` makes trees."""
        found: list[tuple[float, tuple[int, ...], float]] = []

        def add(way: tuple[int, ...], chance: float) -> None:
            found.extend((chance * s, (*way, i), s) for i, s in enumerate(self.shares(way)))

        add((), 1.0)
        computed: set[tuple[int, ...]] = set()
        n_passes = 1
        while n_passes < shape.n_passes:
            found.sort(key=lambda one: -one[0])
            open_ways = [o for o in found[: shape.n_nodes] if o[1] not in computed and o[0] >= shape.p_min]
            if not open_ways:
                break
            for chance, way, _ in open_ways[: shape.width]:
                computed.add(way)
                add(way, chance)
            n_passes += 1
        found.sort(key=lambda one: (-one[0], len(one[1])))
        kept = found[: shape.n_nodes]
        places = {(): -1, **{way: i for i, (_, way, _) in enumerate(kept)}}
        return DraftedTree(
            tuple(way[-1] for _, way, _ in kept),
            tuple(places[way[:-1]] for _, way, _ in kept),
            tuple(share for _, _, share in kept),
            n_passes,
        )

    def truth(self, rng: random.Random) -> list[int]:
        """With which candidates the text goes on; -1: with something else."""
        way: tuple[int, ...] = ()
        while len(way) < 40:
            at = rng.random() / self.worth if self.worth else 1.0
            for i, share in enumerate(self.shares(way)):
                at -= share
                if at < 0:
                    way = (*way, i)
                    break
            else:
                return [*way, -1]
        return list(way)

    def run(self, growth: TreeGrowth, n_tokens: int) -> tuple[float, list[int]]:
        """The rate that ``growth`` gets, and how many tokens it shows to the target in each round."""
        rng = random.Random(self.seed)
        seconds, done = 0.0, 0
        chosen = []
        while done < n_tokens:
            took = 0.0
            tree = shown = DraftedTree()
            drafts = growth.begin()
            if drafts:
                shape = growth.shape(40)
                assert 1 <= shape.n_passes <= TreeGrowth.DEEPEST
                assert 0 < shape.p_min <= 0.8
                tree = self.drafted(shape)
                took = tree.n_passes * (self.draft + self.draft_row * (shape.width - 1))
                growth.observe_draft(tree, took)
                shown = growth.keep(tree)
            chosen.append(len(shown))
            truth = self.truth(rng)
            n = len(shown.path(truth)) + 1
            verifying = self.target + self.row * len(shown)
            growth.observe_pass(len(shown), verifying)
            growth.observe_truth(tree, truth[:n])
            if drafts:
                growth.observe_round(n, took + verifying)
            seconds += took + verifying
            done += n
        return done / seconds, chosen

    def fixed(self, shape: Shape, n_tokens: int) -> float:
        """The rate of one shape for all rounds."""
        rng = random.Random(self.seed)
        tree = self.drafted(shape)
        seconds, done = 0.0, 0
        while done < n_tokens:
            done += len(tree.path(self.truth(rng))) + 1
            seconds += tree.n_passes * (self.draft + self.draft_row * (shape.width - 1))
            seconds += self.target + self.row * len(tree)
        return done / seconds


SHAPES = [Shape(p, w, n, 0.02) for p in (1, 2, 4, 8) for w in (1, 4) for n in (1, 2, 4, 8, 16, 32)]


@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(draft=0.2),
        World(draft=0.05, row=0.01, draft_row=0.01),
        World(draft=0.1, row=0.05, draft_row=0.05),
        World(draft=0.05, row=0.2),
        World(kinds=((0.97, 0.01), (0.9, 0.05)), row=0.1),
    ],
    ids=["free rows", "slow draft", "cheap rows", "dear rows", "dearer rows", "a good draft"],
)
def test_it_comes_close_to_the_best_fixed_shape(world: World) -> None:
    best = max(world.fixed(shape, 2000) for shape in SHAPES)
    rate, _ = world.run(TreeGrowth(), 2000)
    assert rate > 0.85 * best


def test_where_rows_are_free_trees_are_wide_and_where_they_are_dear_they_are_chains() -> None:
    _, free = World().run(TreeGrowth(), 500)
    _, dear = World(row=0.4).run(TreeGrowth(), 500)
    assert sum(free) / len(free) > 20
    assert sum(dear) / len(dear) < 4


@pytest.mark.parametrize("world", [World(worth=0.0), World(draft=2.0), World(row=1.0, draft=0.5)])
def test_where_trees_lose_they_are_given_up(world: World) -> None:
    rate, chosen = world.run(TreeGrowth(), 2000)
    assert rate > 0.95 / world.target
    assert sum(n > 0 for n in chosen) < 0.1 * len(chosen)


@pytest.mark.parametrize("worth", [0.3, 1.0])
def test_shares_are_corrected_by_what_was_seen(worth: float) -> None:
    world, shares, rng = World(kinds=((0.6, 0.3),), worth=worth), Shares(), random.Random(3)
    tree = world.drafted(Shape(8, 4, 32, 0.0))
    for _ in range(400):
        shares.observe(tree, world.truth(rng))
    assert shares.corrected(0.6, True) == pytest.approx(0.6 * worth, abs=0.12)
    assert shares.corrected(0.3, False) == pytest.approx(0.3 * worth, abs=0.12)
    assert shares.corrected(1.0, True) < 1


def test_no_round_asks_for_or_shows_more_than_it_may() -> None:
    growth = TreeGrowth(limit=5)
    assert not growth.begin()  # a plain pass first
    growth.observe_pass(0, 1.0)
    for room in (1, 3, 40):
        assert growth.begin()
        shape = growth.shape(room)
        assert 1 <= shape.n_passes <= room
        assert shape.n_nodes <= 5
        tree = World().drafted(Shape(8, 4, 32, 0.02))
        kept = growth.keep(tree)
        assert 1 <= len(kept) <= 5
        assert [i for i in range(len(kept)) if kept.parents[i] >= i] == []
        growth.observe_draft(tree, 0.1)
        growth.observe_pass(len(kept), 1.0)
    assert growth.keep(DraftedTree()) == DraftedTree()


@given(st.data())
@examples(30)
def test_whatever_is_measured_what_is_shown_is_a_tree(data: st.DataObject) -> None:
    growth = TreeGrowth()
    seconds = st.floats(0, 10)
    rng = random.Random(data.draw(st.integers(0, 99)))
    world = World(seed=rng.randrange(99))
    for _ in range(20):
        tree = shown = DraftedTree()
        if growth.begin():
            tree = world.drafted(growth.shape(data.draw(st.integers(1, 50))))
            growth.observe_draft(tree, data.draw(seconds))
            shown = growth.keep(tree)
            assert 1 <= len(shown) <= growth.limit
            assert all(parent < place for place, parent in enumerate(shown.parents))
            growth.observe_round(1, data.draw(seconds))
        growth.observe_pass(len(shown), data.draw(seconds))
        growth.observe_truth(tree, world.truth(rng))

"""What a draft proposes along a text: recorded once, and replayed in the simulations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from sllm.draft.tree import DraftedTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.draft.growth import Shape
    from sllm.draft.length import PassTimes

__all__ = ["Position", "Recorded", "Replay"]

_RUNNERS_UP = (0.4, 0.25, 0.15)
"""The chance that the first runner-up is right where the draft's own choice is not, and so on: what pairs of
models have in common (benchmarks/RESULTS.md, "Trees").
"""


@dataclass(frozen=True)
class Position:
    """What the draft proposes at a position of the text.

    Attributes:
        tokens: its proposals: its own choice, then the runners-up under the same noise.
        shares: its probability for each (:attr:`sllm.draft.tree.DraftedTree.shares`).
        prob: the probability of its own choice (:attr:`sllm.Draft.probs`).

    """

    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    prob: float


@dataclass(frozen=True)
class Recorded:
    """A text of the target, and what the draft proposes at each of its positions.

    Attributes:
        truth: the target's tokens.
        positions: the draft's proposals, one for each token.

    """

    truth: tuple[int, ...]
    positions: tuple[Position, ...]

    @classmethod
    def of_outcomes(cls, outcomes: Sequence[bool], probs: Sequence[float]) -> Recorded:
        """A text on which the draft's single choice is right where ``outcomes`` is true."""
        positions = [Position((int(right),), (p,), p) for right, p in zip(outcomes, probs, strict=True)]
        return cls((1,) * len(outcomes), tuple(positions))

    @classmethod
    def drawn(cls, acceptance: float, n_tokens: int, seed: int = 0) -> Recorded:
        """A text on which the draft's own choice is right with probability ``acceptance``, and its runners-up
        as often as measured on real models.
        """
        rng = random.Random(seed)
        shares = (acceptance, *((1 - acceptance) * share for share in _RUNNERS_UP))
        position = Position(tuple(range(len(shares))), shares, acceptance)
        others = len(shares)  # the token that the draft does not name
        chances = [*shares, max(1 - sum(shares), 0.0)]
        truth = rng.choices(range(others + 1), chances, k=n_tokens)
        return cls(tuple(truth), (position,) * n_tokens)

    @property
    def acceptance(self) -> float:
        """The share of positions at which the draft's own choice is the target's."""
        right = [
            true in position.tokens[:1] for true, position in zip(self.truth, self.positions, strict=True)
        ]
        return sum(right) / max(len(right), 1)

    def repeated(self, n_tokens: int) -> Recorded:
        """A text of ``n_tokens``: this one again and again."""
        n = -(-n_tokens // max(len(self.truth), 1))
        return Recorded((self.truth * n)[:n_tokens], (self.positions * n)[:n_tokens])


class Replay:
    """A draft of a recorded text: it says the same again, and as soon as it would.

    Behind a wrong token nobody knows what it would have said. There, what it says at another position stands
    in, the same one whenever it is the same token.

    Args:
        text: as recorded.
        times: what passes of the draft take by their rows.

    """

    def __init__(self, text: Recorded, times: PassTimes) -> None:
        self._text = text
        self._times = times
        self.n_drafted = 0

    def chain(
        self, pos: int, chain: Sequence[int], n_max: int, p_min: float = 0.0
    ) -> tuple[list[int], list[float], float]:
        """As :meth:`Drafter.draft <sllm.draft.drafters.Drafter.draft>` behind ``pos`` tokens of the text:
        the tokens, their probabilities, and seconds.
        """
        at = pos
        for token in chain:
            at = self._behind(at, token)
        tokens: list[int] = []
        probs: list[float] = []
        n_passes = 0
        while len(tokens) < n_max:
            said = self._said(at)
            if said is None or not said.tokens:
                break
            n_passes += 1
            if said.prob < p_min:
                break
            tokens.append(said.tokens[0])
            probs.append(said.prob)
            at = self._behind(at, said.tokens[0])
        self.n_drafted += len(tokens)
        return tokens, probs, max(n_passes, 1) * self._times.estimate(1)

    def tree(self, pos: int, shape: Shape, known: DraftedTree | None = None) -> tuple[DraftedTree, float]:
        """As :meth:`TreeDrafter.draft_tree <sllm.draft.drafters.TreeDrafter.draft_tree>`, and seconds."""
        known = known or DraftedTree()
        tokens, parents, shares = list(known.tokens), list(known.parents), list(known.shares)
        chances = known.chances()
        places = {(parent, token): i for i, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
        ats: list[int] = []
        for token, parent in zip(tokens, parents, strict=True):
            ats.append(self._behind(pos if parent < 0 else ats[parent], token))
        new: list[tuple[float, int]] = []  # not computed yet, likeliest first

        def compute(place: int) -> None:
            said = self._said(pos if place < 0 else ats[place])
            for token, share in zip(said.tokens, said.shares, strict=True) if said is not None else ():
                if (place, token) not in places:
                    chance = share * (1.0 if place < 0 else chances[place])
                    places[place, token] = len(tokens)
                    heappush(new, (-chance, len(tokens)))
                    tokens.append(token)
                    parents.append(place)
                    shares.append(share)
                    chances.append(chance)
                    ats.append(self._behind(pos if place < 0 else ats[place], token))

        # 1. The first pass computes the last token of the text, and what is known besides.
        for place in range(-1, len(known)):
            compute(place)
        n_passes, seconds = 1, self._times.estimate(1 + len(known))
        # 2. Each further one the likeliest tokens of all branches.
        while n_passes < shape.n_passes and new and -new[0][0] >= shape.p_min:
            rows = [heappop(new)[1]]
            while len(rows) < shape.width and new and -new[0][0] >= shape.p_min:
                rows.append(heappop(new)[1])
            for place in rows:
                compute(place)
            n_passes += 1
            seconds += self._times.estimate(len(rows))
        # 3. The likeliest of all are the tree.
        tree = DraftedTree(tuple(tokens), tuple(parents), tuple(shares), n_passes)
        tree = tree.take(tree.likeliest(shape.n_nodes))
        self.n_drafted += max(len(tree) - len(known), 0)
        return tree, seconds

    # A place in the text is its position; off the text, a negative number that follows from the way there.

    def _behind(self, at: int, token: int) -> int:
        if at >= len(self._text.truth):
            return at
        if at >= 0 and self._text.truth[at] == token:
            return at + 1
        return -1 - (31 * abs(at) + 7 * token + 1) % (1 << 31)

    def _said(self, at: int) -> Position | None:
        """What the draft says there; None: the text is at its end."""
        positions = self._text.positions
        if at >= len(positions):
            return None
        return positions[at if at >= 0 else -at % len(positions)]

"""How far a worker drafts for the texts of a pass, whose drafts and rows all of them wait for."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import TYPE_CHECKING

from sllm.draft.length import PassTimes
from sllm.worker.sharing import coarse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["OWN_CHANCES", "Chance", "DraftBudget", "Part", "Plan", "Text"]

OWN_CHANCES = {1: 0.7, 4: 0.8}
"""What a draft of passes of so many rows is taken for at first."""

_KEEP = 0.98
"""What is left of the past with each token."""

_FORGET = 1 / 64
"""Of what is known of a draft that is not made, this part is forgotten with each pass: it may be right again.
"""

_WORTH = 3.0
"""Tokens that the beginning is worth."""

_CLEARLY = 0.05
"""The logarithm of how much quicker a pass with drafts has to promise to be, for each of its texts."""

_TRIES = 3
"""Drafts before what they take is believed: the first may have had to wait for something."""

_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
"""Passes without drafts after which one is tried; the pause grows as tries fail."""

_LONG = 2.0
"""So many times as long as without drafts a pass is taken to be at first."""

_ITERATIONS = 5

_EXPLORE_EVERY = 32
"""Of so many passes with drafts one is drafted with the width that is not the best."""


class Chance:
    """The chance that what a draft says next is drafted and right, where what it has said before was.

    Args:
        start: what it is taken for at first.

    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._right, self._seen = _WORTH * start, _WORTH

    @property
    def value(self) -> float:
        """The running share."""
        return self._right / self._seen

    def observe(self, n_right: int, *, ended: bool) -> None:
        """So many tokens, one after the other, were right; then (``ended``) one was wrong, or not drafted."""
        for right in [True] * n_right + [False] * ended:
            self._right = self._right * _KEEP + right
            self._seen = self._seen * _KEEP + 1

    def forget(self) -> None:
        """A pass was made without this draft."""
        self._right += _FORGET * self._seen * (self._start - self.value)


@dataclass(frozen=True)
class Text:
    """What may be drafted for one text.

    Attributes:
        n_tokens: that it is likely to get from a pass without its draft.
        weight: the chance that it comes to where its draft begins; 0: nothing can be drafted for it.
        chance: that each further token of the draft is right, by the width of the draft.
        room: tokens in a row that it may draft.

    """

    n_tokens: float
    weight: float
    chance: Mapping[int, Chance]
    room: int


@dataclass(frozen=True)
class Part:
    """What a plan says for one text.

    Attributes:
        depth: in how many passes of the draft it takes part.
        row: what a row of the target's pass costs it, in tokens that its time would bring otherwise.
        least: the chance from which on a token is worth its part of another pass of the draft.

    """

    depth: int = 0
    row: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What to draft.

    Attributes:
        width: rows of each text in a pass of the draft.
        parts: for each text.
        worth: the logarithm of how much quicker texts come than without drafts, all of them added up.
        seconds: what the pass takes, drafting included.

    """

    width: int
    parts: tuple[Part, ...]
    worth: float = 0.0
    seconds: float = 0.0


class DraftBudget:
    """Decides how deep to draft for which of the texts of a pass.

    A token that is drafted for one text holds up all of them: by its row in the target's pass, by its row in
    the draft's, and where nobody else goes on so far, by a whole pass of the draft. What is looked for is the
    largest sum of the logarithms of the texts' speeds (proportional fairness: Kelly, European Transactions
    on Telecommunications 8, 1997), so that what one text gains is not taken from others that lose more, in
    proportion. The time of a pass counts by its logarithm, too; its tangent where the last plan ended prices
    a second, and what is best at that price is better, until nothing is (majorize and minimize: Hunter and
    Lange, The American Statistician 58, 2004). With many texts, and where rows take long, nothing may be
    worth drafting.

    Args:
        passes: what the target's passes take by their rows, all texts together. Others measure it.
        widths: of the draft's passes for one text.

    Attributes:
        usual: what the chances of all texts so far have come to, by width.

    """

    DEEPEST = 16
    """Passes of the draft at most."""

    def __init__(self, passes: PassTimes, widths: tuple[int, ...] = (1,)) -> None:
        self.passes = passes
        self.widths = widths
        self.usual = {width: Chance(OWN_CHANCES[width]) for width in widths}
        self._draft = PassTimes()  # by its rows
        self._shown: dict[int, float] = {}  # by width: rows of the target for each row's pass of the draft
        self._n_drafted = self._n_tries = self._n_idle = 0
        self._pause = _FIRST_PAUSE  # passes without drafts until the next try

    def plan(self, texts: Sequence[Text], n_rows: int) -> Plan:
        """What to draft for ``texts``, all those of a pass, which has ``n_rows`` without their drafts."""
        none = Plan(self.widths[0], (Part(),) * len(texts))
        able = [text.weight > 0 and text.room > 0 for text in texts]
        if not any(able) or not self.passes.seen:
            return none  # what not drafting costs has to be seen first
        if self._n_tries < _TRIES or self.passes.most <= n_rows:
            # What a draft and its rows take is not known yet: one token for each shows it.
            return Plan(self.widths[0], tuple(Part(int(one)) for one in able))
        plan = self._worth_it(texts, n_rows)
        if plan is not None:
            self._n_idle, self._pause = 0, _FIRST_PAUSE
            return plan
        self._n_idle += 1
        if self._n_idle < self._pause:
            return none
        # Things may have changed, or have been measured in a bad moment: one text tries.
        self._n_idle, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        tries = max(
            (i for i, one in enumerate(able) if one), key=lambda i: texts[i].chance[self.widths[0]].value
        )
        return Plan(self.widths[0], tuple(Part(int(i == tries)) for i in range(len(texts))))

    def _worth_it(self, texts: Sequence[Text], n_rows: int) -> Plan | None:
        """The best plan that is clearly better than no drafts, or now and then another one."""
        plans = sorted((self._best(texts, n_rows, width) for width in self.widths), key=lambda p: -p.worth)
        if plans[0].worth <= len(texts) * _CLEARLY:
            return None
        self._n_drafted += 1
        return plans[-1 if self._n_drafted % _EXPLORE_EVERY == 0 and plans[-1].worth > 0 else 0]

    def _best(self, texts: Sequence[Text], n_rows: int, width: int) -> Plan:
        plain = self.passes.estimate(n_rows)
        best = Plan(width, (Part(),) * len(texts), seconds=plain)
        # From above: where a second is dear nothing seems worth it that all texts together could do.
        seconds = _LONG * plain
        for _ in range(_ITERATIONS):
            plan = self._at_price(texts, n_rows, width, len(texts) / seconds)
            if plan.worth > best.worth:
                best = plan
            if abs(plan.seconds - seconds) < 1e-3 * seconds:
                break
            seconds = plan.seconds
        return best

    def _at_price(self, texts: Sequence[Text], n_rows: int, width: int, rate: float) -> Plan:
        """What is best where each second costs ``rate``, in logarithms of speed."""
        shown = self._shown.get(width, 1.0)
        estimate = self.passes.estimate
        plain = estimate(n_rows)
        # What one more row takes, as far as half as many rows again let tell.
        more = 1 + n_rows // 2
        row = max(0.0, (estimate(n_rows + more) - plain) / more)
        # A pass of the draft for one text, and each other text in it.
        first = self._draft.estimate(width)
        other = max(0.0, self._draft.estimate(width * len(texts)) - first) / max(1, len(texts) - 1)
        own_seconds = shown * row + other
        n_tokens = [text.n_tokens for text in texts]
        gains = [text.weight for text in texts]
        going = [i for i, text in enumerate(texts) if text.weight > 0]
        depths = best_depths = [0] * len(texts)
        best_tokens, seconds, best_seconds = n_tokens, plain, plain
        gain = value = best = best_gain = drafting = rows = 0.0
        for depth in range(1, self.DEEPEST + 1):
            going = [i for i in going if depth <= texts[i].room]
            for i in going:
                gains[i] *= texts[i].chance[width].value
            going = [i for i in going if gains[i] > rate * own_seconds * n_tokens[i]]
            if not going:
                break
            rows += shown * len(going)
            drafting += first + other * (len(going) - 1)
            before, seconds = seconds, max(seconds, drafting + estimate(n_rows + round(rows)))
            n_tokens, depths = n_tokens.copy(), depths.copy()
            brings = 0.0
            for i in going:
                brings += log1p(gains[i] / n_tokens[i])
                n_tokens[i] += gains[i]
                depths[i] = depth
            gain += brings
            value += brings - rate * (seconds - before)
            if value > best:
                best, best_gain, best_seconds, best_depths, best_tokens = (
                    value,
                    gain,
                    seconds,
                    depths,
                    n_tokens,
                )
        share = other + (first - other) / max(1, sum(depth > 0 for depth in best_depths))
        # Of the rows of a wide pass half are just worth it.
        least = rate * (2 * share / (1 + width) + row)
        parts = tuple(
            Part(depth, rate * row * n, least * n) for depth, n in zip(best_depths, best_tokens, strict=True)
        )
        return Plan(width, parts, best_gain - len(texts) * log(best_seconds / plain), best_seconds)

    def observe(self, width: int, n_texts: int, n_passes: int, n_shown: int, seconds: float) -> None:
        """Drafting for so many texts took ``seconds`` in ``n_passes`` passes of the draft; ``n_shown`` of
        their tokens the target checks.
        """
        if n_passes > 0:
            self._n_tries += 1
            self._draft.add(coarse(width * n_texts), seconds / n_passes)
            shown = n_shown / (n_texts * n_passes)
            self._shown[width] = shown + 0.9 * (self._shown.get(width, shown) - shown)

"""Which of several workers takes a text: the one whose first token is expected soonest.

What is expected is a round trip, the computing of those tokens of the prompt that the worker does not have
in memory, and the wait for a place. Round trips and free places are measured (:mod:`sllm.remote.fleet`), the
cost of a prompt's token is what earlier prompts took there. What a worker has in memory is not asked: to ask,
even by a hash, would tell it about texts that it does not get. The client remembers instead which texts went
where, and forgets one when the worker says that it had less of it (``Opened.n_reused``). So one process knows
of its own texts, and of no others.

Among workers that are expected to answer about as soon, the one with the largest share of its places free is
taken, and at random where that is the same: many clients that know the same would else all go to one (gRPC's
``shuffle_address_list`` is there for the same reason).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine.arrays import common_prefix

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["KEEP_SECONDS", "Kept", "Lateness", "Standing", "best", "expected"]

KEEP_SECONDS = 600.0
"""How long a text counts as being in a worker's memory: the default of workers' ``Limits.keep_seconds``."""

_TOKEN_SECONDS = 1e-3
"""Of computing for each token of a prompt, before any was measured."""

_TEXT_SECONDS = 5.0
"""How long a text keeps its place, before any was measured."""

_ALIKE_SHARE, _ALIKE_SECONDS = 0.2, 0.01
"""Two expectations are alike where they differ by no more than this share of the shorter one, and so many
seconds: measurements are not that exact.
"""


_RATIOS, _FEWEST_RATIOS, _USUAL_RATIO = 200, 20, 3.0
"""So many first answers are remembered, from so many on they count, and what is taken before."""

_LEAST_SECONDS = 0.02
"""An answer is not late before."""


class Kept:
    """Texts that a worker probably has in memory.

    Args:
        n_most: so many, the places that the worker has.

    """

    def __init__(self, n_most: int) -> None:
        self._n_most = max(1, n_most)
        self._texts: list[tuple[npt.NDArray[np.int32], float]] = []  # the oldest first

    def put(self, text: Sequence[int], now: float) -> None:
        """The worker has had ``text``; one that it goes on from is that text no longer."""
        new = np.array(text, dtype=np.int32)
        kept = [(old, at) for old, at in self._texts if common_prefix(old, new) < len(old)]
        self._texts = [*kept, (new, now)][-self._n_most :]

    def n_held(self, text: npt.NDArray[np.int32], now: float) -> int:
        """How many tokens of ``text``, int32 (n,), it probably has, from the first on; the last one is always
        computed.
        """
        self._texts = [(old, at) for old, at in self._texts if now - at <= KEEP_SECONDS]
        return max((min(common_prefix(old, text), len(text) - 1) for old, _ in self._texts), default=0)

    def correct(self, text: npt.NDArray[np.int32], n_reused: int) -> None:
        """The worker had ``n_reused`` tokens of ``text``; what would have been more is there no longer."""
        self._texts = [(old, at) for old, at in self._texts if common_prefix(old, text[:-1]) <= n_reused]

    def clear(self) -> None:
        """The worker has been started anew."""
        self._texts.clear()


@dataclass
class Standing:
    """What is known of a worker. Times are in seconds.

    Attributes:
        n_places: texts at once.
        round_trip: measured; 0: not yet.
        token_seconds: of computing for each token of a prompt; 0: not measured yet.
        text_seconds: how long a text keeps its place; 0: not measured yet.
        n_free: places that were free when it was looked at; None: it does not say.
        n_queued: texts that waited for one.
        looked: when that was.
        n_ours: texts of this fleet there now.
        n_ours_then: and when it was looked at.
        full_until: it has refused a text for lack of a place, and is not asked before.
        kept: what it probably has in memory.

    """

    n_places: int = 1
    round_trip: float = 0.0
    token_seconds: float = 0.0
    text_seconds: float = 0.0
    n_free: int | None = None
    n_queued: int = 0
    looked: float = float("-inf")
    n_ours: int = 0
    n_ours_then: int = 0
    full_until: float = float("-inf")
    kept: Kept = field(default_factory=lambda: Kept(1))

    @property
    def n_left(self) -> int:
        """Places that are probably free; below 0: so many texts wait for one."""
        if self.n_free is None:
            return self.n_places - self.n_ours
        return self.n_free - self.n_queued - (self.n_ours - self.n_ours_then)

    def observe_look(
        self, seconds: float, n_free: int | None, n_queued: int, n_ours: int, now: float
    ) -> None:
        """It was looked at when ``n_ours`` texts of ours were there: a round trip of ``seconds``."""
        self.round_trip = seconds if self.round_trip == 0.0 else 0.75 * self.round_trip + 0.25 * seconds
        self.n_free, self.n_queued, self.n_ours_then, self.looked = n_free, n_queued, n_ours, now
        if n_free:
            self.full_until = now

    def observe_prompt(self, n_tokens: int, seconds: float) -> None:
        """``n_tokens`` of a prompt took ``seconds`` of computing."""
        if n_tokens >= 8 and seconds > 0:  # fewer say more of the pass than of a token
            self.token_seconds = _smoothed(self.token_seconds, seconds / n_tokens)

    def observe_text(self, seconds: float) -> None:
        """A text has had a place for ``seconds``."""
        self.text_seconds = _smoothed(self.text_seconds, seconds)


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else 0.75 * old + 0.25 * new


class Lateness:
    """How much later than expected first answers come, and from when on one is late: after the 95th
    percentile, as Dean and Barroso have it (The Tail at Scale, CACM 56(2), 2013), so that few texts are asked
    for twice.

    Examples:
        >>> lateness = Lateness()
        >>> for i in range(100):
        ...     lateness.observe(0.1 + 0.001 * i, 0.1)
        >>> round(lateness.late_after(0.2), 2)
        0.39

    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_RATIOS)

    def observe(self, seconds: float, expected_seconds: float) -> None:
        """An answer has come after ``seconds``."""
        self._ratios.append(seconds / max(expected_seconds, _LEAST_SECONDS))

    def late_after(self, expected_seconds: float) -> float:
        """Seconds after which an answer is late."""
        known = sorted(self._ratios)
        ratio = known[int(0.95 * len(known))] if len(known) >= _FEWEST_RATIOS else _USUAL_RATIO
        return max(ratio * max(expected_seconds, _LEAST_SECONDS), _LEAST_SECONDS)


def expected(
    standing: Standing, text: npt.NDArray[np.int32], now: float, token_seconds: float = 0.0
) -> float:
    """Seconds until the first token after ``text``, int32 (n,), is expected.

    ``token_seconds`` is what a prompt's token takes where this worker was not measured yet, 0: nowhere.
    """
    n_new = len(text) - standing.kept.n_held(text, now)
    each = standing.token_seconds or token_seconds or _TOKEN_SECONDS
    n_before = 1 - standing.n_left  # texts that have to end before this one begins
    wait = max(0, n_before) * (standing.text_seconds or _TEXT_SECONDS) / standing.n_places
    return standing.round_trip + n_new * each + max(wait, standing.full_until - now, 0.0)


def best(
    standings: Sequence[Standing], text: npt.NDArray[np.int32], now: float, rng: random.Random
) -> int | None:
    """Which of the workers is to take ``text``, int32 (n,); None: there are none.

    Examples:
        >>> import random
        >>> near, far = Standing(n_places=4, round_trip=0.01), Standing(n_places=4, round_trip=0.2)
        >>> best([far, near], np.arange(50, dtype=np.int32), 0.0, random.Random(0))
        1
        >>> far.kept = Kept(4)
        >>> far.kept.put(range(5000), 0.0)
        >>> best([far, near], np.arange(4000, dtype=np.int32), 0.0, random.Random(0))
        0

    """
    if not standings:
        return None
    measured = sorted(one.token_seconds for one in standings if one.token_seconds)
    typical = measured[len(measured) // 2] if measured else 0.0
    seconds = [expected(one, text, now, typical) for one in standings]
    least = min(seconds)
    alike = [i for i, s in enumerate(seconds) if s - least <= _ALIKE_SHARE * least + _ALIKE_SECONDS]
    free = {i: max(standings[i].n_left, 0) / standings[i].n_places for i in alike}
    most = max(free.values())
    return rng.choice([i for i in alike if free[i] == most])

"""How many tokens to draft: enough to gain, never so many that drafting loses."""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftLength", "PassTimes"]


class PassTimes:
    """Running medians of what a pass takes by its number of rows; a median, because one descheduled pass
    would spoil a mean.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._counts: list[int] = []

    def add(self, count: int, seconds: float) -> None:
        """A pass of ``count`` rows took ``seconds``."""
        times = self._seen.get(count)
        if times is None:
            times = self._seen[count] = deque(maxlen=9)
            insort(self._counts, count)
        times.append(seconds)
        self._medians[count] = median(times)

    def known(self, count: int) -> bool:
        """Whether a pass of ``count`` rows was seen."""
        return count in self._medians

    def estimate(self, count: int) -> float:
        """The time of ``count`` rows, between and beyond what was seen on a line through the two nearest
        counts.
        """
        if count in self._medians:
            return self._medians[count]
        counts = self._counts
        if len(counts) == 1:
            # Nothing is known of the slope: that of a pass that is bound by reading the weights, nearly flat.
            only, more = self._medians[counts[0]], 0.05 * (count - counts[0])
            return only * (1 + more) if more >= 0 else only / (1 - more)
        above = min(bisect(counts, count), len(counts) - 1)
        low, high = counts[max(above - 1, 0)], counts[max(above, 1)]
        slope = max(0.0, (self._medians[high] - self._medians[low]) / (high - low))
        return max(self._medians[low] + slope * (count - low), 1e-9)


class DraftLength:
    """Chooses the length of the next draft from measured acceptance and costs.

    With acceptance a for each token, a pass that verifies k drafted tokens commits (1 - a^(k+1)) / (1 - a) of
    them on average (2211.17192, equation 1). The length is the one with the most committed tokens per
    second, out of what a pass of k + 1 rows and a pass of the draft were measured to take. Whether to draft
    at
    all is not left to that model: where the last rounds with a draft committed fewer tokens per second than
    plain passes do, drafting pauses, and what follows a pause is a short try; pauses grow as tries fail.
    """

    LIMIT = 16
    """No draft is longer: beyond this a chain is too seldom accepted to its end."""

    _SHORTEST_PAUSE = 32
    _LONGEST_PAUSE = 512

    def __init__(self) -> None:
        self._pass = PassTimes()
        self._draft_passes: deque[float] = deque(maxlen=15)  # seconds each
        self._accepted = 2.1  # a prior of .7, worth three tokens
        self._tried = 3.0
        self._confidence = 2.1 / 3.0  # the draft's own mean probability of its tokens, a running mean
        self._rounds: deque[tuple[int, float]] = deque(maxlen=12)  # with a draft: tokens committed, seconds
        self._pause = 0  # plain rounds that are left
        self._next_pause = self._SHORTEST_PAUSE
        self._since_plain = 0

    @property
    def acceptance(self) -> float:
        """The running estimate of the share of drafted tokens that are accepted where they are reached."""
        return min(self._accepted / self._tried, 0.999)

    def _expected_rate(self, n: int) -> float:
        """Committed tokens per second to expect when drafting ``n``."""
        a = self.acceptance
        seconds = self._pass.estimate(n + 1) + n * median(self._draft_passes)
        return (1 - a ** (n + 1)) / (1 - a) / seconds

    def _loses(self) -> bool:
        """Whether the last rounds with a draft were no faster than plain passes.

        The median of the times on both sides: on a busy machine a sum is mostly what others did. In doubt
        they lose: a round costs a little more than what is measured of it.
        """
        if len(self._rounds) < 4:
            return False
        tokens = sum(n for n, _ in self._rounds) / len(self._rounds)
        return tokens / median(s for _, s in self._rounds) < 1.02 / self._pass.estimate(1)

    def choose(self) -> tuple[int, float]:
        """The length of the next draft (0: none), and the probability below which it should end
        (``p_min``).
        """
        if not self._pass.known(1):
            return 0, 0.0  # one plain pass says what not drafting costs
        if self._pause > 0:
            self._pause -= 1
            return 0, 0.0
        if self._loses():
            self._rounds.clear()
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, self._LONGEST_PAUSE)
            return 0, 0.0
        if len(self._rounds) == self._rounds.maxlen:
            self._next_pause = self._SHORTEST_PAUSE
        if self._since_plain > 128:
            return 0, 0.0  # what not drafting costs grows with the text
        if not self._draft_passes:
            return 4, 0.0
        best = max(range(1, self.LIMIT + 1), key=self._expected_rate)
        # One more token pays while its chance of being accepted exceeds its cost, in tokens that the time
        # would buy otherwise.
        row = (self._pass.estimate(best + 1) - self._pass.estimate(1)) / best
        cost = (median(self._draft_passes) + row) * self._expected_rate(best)
        # A draft that is right more often than it believes is held to what it believes.
        modesty = min(1.0, self._confidence / self.acceptance)
        return best, min(max(cost, 0.0), 0.8) * modesty

    def observe_confidence(self, probs: Sequence[float]) -> None:
        """The draft gave its tokens these probabilities."""
        for prob in probs:
            self._confidence += 0.05 * (prob - self._confidence)

    def observe_draft(self, n_passes: int, seconds: float) -> None:
        """The draft took ``n_passes`` passes of its model in ``seconds``."""
        if n_passes > 0:
            self._draft_passes.append(seconds / n_passes)

    def observe_pass(self, n_verified: int, n_accepted: int, seconds: float) -> None:
        """The target verified ``n_verified`` drafted tokens in one pass, and accepted the first
        ``n_accepted``.
        """
        self._pass.add(n_verified + 1, seconds)
        if n_verified == 0:
            self._since_plain = 0
            return
        self._since_plain += 1
        tried = n_accepted + (n_accepted < n_verified)
        keep = 0.98**tried
        self._accepted = self._accepted * keep + n_accepted
        self._tried = self._tried * keep + tried

    def observe_round(self, n_tokens: int, seconds: float) -> None:
        """A round with a draft, also one that proposed nothing, committed ``n_tokens`` in ``seconds``."""
        self._rounds.append((n_tokens, seconds))

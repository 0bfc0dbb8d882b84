"""How many tokens to draft: enough to gain, never so many that drafting loses."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["DraftLength"]


class _Times:
    """Running medians of a cost that depends on a count; a median, because one descheduled pass would spoil a
    mean.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def add(self, count: int, seconds: float) -> None:
        times = self._seen.setdefault(count, deque(maxlen=9))
        times.append(seconds)
        self._medians[count] = median(times)

    def known(self, count: int) -> bool:
        return count in self._medians

    def estimate(self, count: int) -> float:
        """The time of ``count``, between and beyond what was seen on a line through the two nearest
        counts.
        """
        if count in self._medians:
            return self._medians[count]
        counts = sorted(self._medians)
        if len(counts) == 1:
            # Nothing is known of the slope: that of a pass that is bound by reading the weights, nearly flat.
            return self._medians[counts[0]] * (1 + 0.05 * (count - counts[0]))
        above = next((i for i, c in enumerate(counts) if c > count), len(counts) - 1)
        low, high = counts[max(above - 1, 0)], counts[max(above, 1)]
        slope = max(0.0, (self._medians[high] - self._medians[low]) / (high - low))
        return max(self._medians[low] + slope * (count - low), 1e-9)


class DraftLength:
    """Chooses the length of the next draft from measured acceptance and costs.

    With acceptance a for each token, a pass that verifies k drafted tokens commits (1 - a^(k+1)) / (1 - a) of
    them on average (2211.17192, equation 1). The length is the one with the most committed tokens per second,
    out of what a pass of k + 1 rows and a drafted token were measured to take. Where no length beats plain
    decoding nothing is drafted, but for a try now and then, which grow rarer as they fail.
    """

    LIMIT = 16
    """No draft is longer: beyond this a chain is too seldom accepted to its end."""

    def __init__(self) -> None:
        self._pass = _Times()
        self._draft_times: deque[float] = deque(maxlen=15)  # seconds per drafted token
        self._accepted = 2.1  # a prior of .7, worth three tokens
        self._tried = 3.0
        self._rounds = 0
        self._pause = 0  # rounds without drafting that are left
        self._next_pause = 32
        self._plain_rounds_ago = 0

    @property
    def acceptance(self) -> float:
        """The running estimate of the share of drafted tokens that are accepted where they are reached."""
        return min(self._accepted / self._tried, 0.999)

    def _rate(self, n: int) -> float:
        """Expected committed tokens per second when drafting ``n``."""
        a = self.acceptance
        seconds = self._pass.estimate(n + 1) + n * median(self._draft_times)
        return (1 - a ** (n + 1)) / (1 - a) / seconds

    def choose(self) -> tuple[int, float]:
        """The length of the next draft (0: none), and the probability below which drafting should stop
        (``p_min``).
        """
        self._rounds += 1
        self._plain_rounds_ago += 1
        if not self._pass.known(1):
            return 0, 0.0  # one plain pass says what not drafting costs
        if len(self._draft_times) < 2:
            return 4, 0.0
        if self._pause > 0:
            self._pause -= 1
            return 0, 0.0
        if self._plain_rounds_ago > 128:
            return 0, 0.0
        plain = self._rate(0)
        best = max(range(1, self.LIMIT + 1), key=self._rate)
        if self._rate(best) < 1.02 * plain:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, 512)
            return 3, 0.0
        self._next_pause = 32
        rate = self._rate(best)
        row = (self._pass.estimate(best + 1) - self._pass.estimate(1)) / best
        return best, min(max((median(self._draft_times) + row) * rate, 0.0), 0.8)

    def observe_draft(self, n_tokens: int, seconds: float) -> None:
        """``n_tokens`` were drafted in ``seconds``."""
        if n_tokens > 0:
            self._draft_times.append(seconds / n_tokens)

    def observe_pass(self, n_verified: int, n_accepted: int, seconds: float) -> None:
        """The target verified ``n_verified`` drafted tokens in one pass, and accepted the first
        ``n_accepted``.
        """
        self._pass.add(n_verified + 1, seconds)
        if n_verified == 0:
            self._plain_rounds_ago = 0
            return
        tried = n_accepted + (n_accepted < n_verified)
        keep = 0.98**tried
        self._accepted = self._accepted * keep + n_accepted
        self._tried = self._tried * keep + tried

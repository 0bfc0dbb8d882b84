"""How many tokens to draft: enough to gain, never so many that drafting loses."""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from sllm.draft.confidence import Confidence

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftLength", "DraftPays", "PassTimes"]

_SHORTEST = 1e-9  # seconds: clocks may say that something took no time


class PassTimes:
    """What a pass takes by its number of rows: running medians, because one descheduled pass would spoil a
    mean.

    One pass alone makes no number of rows dear: the first of a text may have waited for a stream to open, and
    a number that looks dear would not be tried again. Where it took much longer than the numbers around it
    let expect, what they let expect stands until a second pass says the same.
    """

    _OUTLIER = 1.5

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._counts: list[int] = []
        self._alone: set[int] = set()  # counts of which one pass was seen
        self._times: dict[int, float] = {}  # without outliers; empty: to be made out anew

    def add(self, count: int, seconds: float) -> None:
        """A pass of ``count`` rows took ``seconds``."""
        times = self._seen.get(count)
        if times is None:
            times = self._seen[count] = deque(maxlen=9)
            insort(self._counts, count)
            self._alone.add(count)
        else:
            self._alone.discard(count)
        times.append(max(seconds, _SHORTEST))
        self._medians[count] = median(times) if len(times) > 2 else min(times)
        self._times = {}

    @property
    def seen(self) -> bool:
        """Whether any pass was seen."""
        return bool(self._counts)

    def known(self, count: int) -> bool:
        """Whether a pass of ``count`` rows was seen."""
        return count in self._medians

    def estimate(self, count: int) -> float:
        """The time of ``count`` rows, between and beyond what was seen on a line through the two nearest
        counts.
        """
        times = self._made_out()
        return times[count] if count in times else _on_line(count, self._counts, times)

    def up_to(self, count: int) -> list[float]:
        """The estimates for 1, 2, ... ``count`` rows."""
        times, counts = self._made_out(), self._counts
        return [times[n] if n in times else _on_line(n, counts, times) for n in range(1, count + 1)]

    def _made_out(self) -> dict[int, float]:
        if self._times:
            return self._times
        medians = self._medians
        self._times = times = dict(medians)
        if len(medians) > 1:
            for count in self._alone:
                others = [other for other in self._counts if other != count]
                expected = _on_line(count, others, medians)
                if medians[count] > self._OUTLIER * expected:
                    times[count] = expected
        return times


def _on_line(count: int, counts: list[int], times: dict[int, float]) -> float:
    """What ``times`` of ``counts``, which are in order, say of another count."""
    if len(counts) == 1:
        # Nothing is known of the slope: that of a pass that is bound by reading the weights, nearly flat.
        only, more = times[counts[0]], 0.05 * (count - counts[0])
        return only * (1 + more) if more >= 0 else only / (1 - more)
    above = bisect(counts, count)
    if above == len(counts):
        low, near = counts[-2], counts[-1]
        high = near
    else:
        low = near = counts[above - 1] if above > 0 else counts[0]
        high = counts[above] if above > 0 else counts[1]
    slope = (times[high] - times[low]) / (high - low)
    seconds = times[near] + slope * (count - near) if slope > 0 else times[near]
    return seconds if seconds > _SHORTEST else _SHORTEST


class DraftPays:
    """Whether to draft at all, from what rounds with a draft and plain passes have brought.

    That is not left to a model of costs: where the last rounds with a draft committed fewer tokens per second
    than plain passes do, drafting pauses, and what follows a pause is a short try; pauses grow as tries fail.
    So what it costs the target to take rejected tokens back (a pass may have to compute those before them
    again) is measured, not known.

    Args:
        times: will hold what the target's passes take; None: as for a target that is here.
        own_pace: whether plain tokens come otherwise than by passes of one row
            (:attr:`LockstepGeneration.own_pace <sllm.targets.lockstep.LockstepGeneration.own_pace>`).

    """

    _TRIES = 4
    """Rounds with a draft, at first and after a pause, before they are judged."""

    _SHORTEST_PAUSE = 32
    _LONGEST_PAUSE = 512

    def __init__(self, times: PassTimes | None = None, *, own_pace: bool = False) -> None:
        self._pass = times or PassTimes()
        self._plain = PassTimes() if own_pace else self._pass  # with one row
        self._rounds: deque[tuple[int, float]] = deque(maxlen=12)  # with a draft: tokens committed, seconds
        self._n_rounds = 0  # with a draft
        self._pause = 0  # plain rounds that are left
        self._next_pause = self._SHORTEST_PAUSE
        self._since_plain = 0

    def begin(self) -> bool:
        """Whether the next round is to draft. To be asked once a round, before what else depends on it."""
        if not self._plain.known(1):
            return False  # one plain pass says what not drafting costs
        if self._pause > 0:
            self._pause -= 1
            return False
        if self._loses():
            self._rounds.clear()
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, self._LONGEST_PAUSE)
            return False
        if len(self._rounds) == self._rounds.maxlen:
            self._next_pause = self._SHORTEST_PAUSE
        if self._since_plain > 128:
            return False  # what not drafting costs grows with the text
        self._n_rounds += 1
        return True

    def _loses(self) -> bool:
        """Whether the last rounds with a draft were no faster than plain passes.

        The median of the times on both sides: on a busy machine a sum is mostly what others did. In doubt
        they lose: a round costs a little more than what is measured of it.
        """
        if len(self._rounds) < self._TRIES:
            return False
        tokens = sum(n for n, _ in self._rounds) / len(self._rounds)
        return tokens / median(s for _, s in self._rounds) < 1.02 / self._plain.estimate(1)

    def observe_pass(self, n_verified: int, seconds: float) -> None:
        """The target verified ``n_verified`` drafted tokens in one pass."""
        (self._pass if n_verified else self._plain).add(n_verified + 1, seconds)
        self._since_plain = self._since_plain + 1 if n_verified else 0

    def observe_round(self, n_tokens: int, seconds: float) -> None:
        """A round with a draft, also one that proposed nothing, committed ``n_tokens`` in ``seconds``."""
        self._rounds.append((n_tokens, max(seconds, _SHORTEST)))


class DraftLength(DraftPays):
    """Chooses how much is drafted in the next round, from measured acceptance and costs.

    A chain goes on, and is shown to the target, as long as what one more token is likely to bring exceeds
    what it costs: its chance to hold with all before it, against the row that the target's pass gets longer
    by and the pass of the draft, in tokens that this time would bring otherwise. (To stop where the chance of
    the whole chain falls below a threshold is optimal: 2405.19715.) The chance of a token that is drafted
    comes from the draft's probability of it (:class:`~.confidence.Confidence`), and that of one to come
    is the acceptance a so far; with it, k drafted tokens bring (1 - a^(k+1)) / (1 - a) with the target's own
    (2211.17192, equation 1), from which follows what time is worth.

    Tokens below some probability are not drafted (``p_min``), so nothing would be learnt about them. The
    first tokens of a text are therefore drafted whatever their probability, and shown as if it said nothing;
    and now and then a round drafts such tokens and shows only what pays: the first one that is not shown is
    compared with what the target says in its place.

    Args:
        limit: tokens that the target can check in one pass; no chain is longer.

    """

    LIMIT = 16
    """No chain is longer: beyond this one is too seldom accepted to its end."""

    _FIRST = 4
    """Tokens to draft as long as it is not known what that costs."""

    _LEARN = 16
    """So many tokens are tried at first whatever their probability."""

    _EXPLORE_EVERY = 16
    """Of so many rounds with a draft one is for learning what unlikely tokens are worth."""

    def __init__(self, limit: int = LIMIT, *, own_pace: bool = False) -> None:
        super().__init__(own_pace=own_pace)
        self.limit = min(limit, self.LIMIT)
        self._costs: list[float] = []  # of passes of 1, 2, ... rows; empty: to be made out anew
        self._draft_passes: deque[float] = deque(maxlen=15)  # seconds each
        self._draft_seconds = 0.0  # their median
        self._rate = 0.0  # tokens per second to expect; 0: to be made out anew
        self._confidence = Confidence()

    # ---- what follows from what is measured

    @property
    def acceptance(self) -> float:
        """The running estimate of the share of drafted tokens that are accepted where they are reached."""
        return self._confidence.acceptance

    def _make_out(self) -> None:
        """What passes cost, and what drafting as much as is best brings."""
        if not self._costs:
            times = self._pass if self._pass.seen else self._plain
            self._costs = times.up_to(self.limit + 1)
            self._costs[0] = self._plain.estimate(1)
            self._rate = 0.0
        if not self._rate:
            a, tokens, holds, drafting = self.acceptance, 0.0, 1.0, 0.0
            for seconds in self._costs:
                tokens += holds
                rate = tokens / (seconds + drafting)
                if rate > self._rate:
                    self._rate = rate
                holds *= a
                drafting += self._draft_seconds

    def expected(self, given: Sequence[float], *, drafts: bool) -> float:
        """Tokens per second, as far as is known, of a round that checks tokens which somebody else proposes.

        Args:
            given: the chance of each of them to hold where the ones before it do; as many are checked as is
                best.
            drafts: the draft goes on after all of them. With none given, that is a round of drafts alone.

        """
        self._make_out()
        holds, tokens, seconds, best = 1.0, 1.0, 0.0, 0.0
        n_given = min(len(given), self.limit)
        chances = [*given[:n_given], *([self.acceptance] * (self.limit - n_given) if drafts else ())]
        if drafts and n_given:
            seconds = self._draft_seconds  # the draft has to read them
        for n, chance in enumerate([*chances, 0.0]):
            if n >= n_given or not drafts:
                best = max(best, tokens / (self._costs[n] + seconds))
            holds *= chance
            tokens += holds
            if n >= n_given:
                seconds += self._draft_seconds
        return best

    @property
    def tried(self) -> bool:
        """Whether it is known what a draft takes."""
        return bool(self._draft_passes)

    def more(self, probs: Sequence[float] = (), *, after: int = 0, holds: float = 1.0) -> tuple[int, float]:
        """How to draft on after a chain to whose tokens the draft gave ``probs``.

        Args:
            probs: of the draft's own tokens.
            after: so many tokens of somebody else stand before these, and ``holds`` is the chance that all of
                them do.

        Returns:
            How many tokens (0: the chain is long enough), and the probability below which the draft should
            end before that (``p_min``).

        """
        n_chain = after + len(probs)
        room = self.limit - n_chain
        if room <= 0:
            return 0, 0.0
        if not self._draft_passes:
            return min(self._FIRST, room), 0.0
        self._make_out()
        costs, rate, a = self._costs, self._rate, self.acceptance
        holds = chain_holds = holds * self._confidence.of_chain(probs)
        gain = best_gain = 0.0
        best = 0
        for n in range(1, room + 1):
            holds *= a
            gain += holds - rate * (costs[n_chain + n] - costs[n_chain + n - 1] + self._draft_seconds)
            if gain > best_gain:
                best, best_gain = n, gain
        if best == 0:
            if n_chain > 0:
                return 0, 0.0
            best = 1
        if self._tries:
            return best, 0.0
        row = (costs[n_chain + best] - costs[n_chain]) / best
        return best, min(self._confidence.least(rate * (self._draft_seconds + row) / chain_holds), 0.8)

    @property
    def _learns(self) -> bool:
        return self._confidence.n_seen < self._LEARN

    @property
    def _tries(self) -> bool:
        """Whether this round drafts tokens whatever their probability, to learn what that says."""
        return self._learns or len(self._rounds) < self._TRIES or self._n_rounds % self._EXPLORE_EVERY == 0

    def keep(self, probs: Sequence[float], *, after: int = 0, holds: float = 1.0) -> int:
        """How many tokens of a chain to whose tokens the draft gave ``probs`` the target should check;
        ``after`` and ``holds`` as for :meth:`more`.
        """
        shown = probs[: self.limit - after]
        chances = [self._confidence.chance(prob) for prob in shown]
        best = self._best(chances, after, holds)
        if self._learns:  # what it says may be of no account
            same = [self.acceptance] * len(shown)
            best = max(best, min(len(shown), self._FIRST), self._best(same, after, holds))
        elif self._tries:
            best = max(best, min(len(shown), 1))  # a try that shows nothing can only fail
        return best

    def _best(self, chances: list[float], after: int, holds: float) -> int:
        """How many tokens with these chances bring more than their rows cost."""
        self._make_out()
        costs, rate = self._costs, self._rate
        gain, best_gain, best = 0.0, 0.0, 0
        for i, chance in enumerate(chances):
            holds *= chance
            gain += holds - rate * (costs[after + i + 1] - costs[after + i])
            if gain > best_gain:
                best, best_gain = i + 1, gain
        return best

    # ---- what is measured

    def observe_draft(self, n_passes: int, seconds: float) -> None:
        """The draft took ``n_passes`` passes of its model in ``seconds``."""
        if n_passes > 0:
            self._draft_passes.append(seconds / n_passes)
            self._draft_seconds = median(self._draft_passes)
            self._rate = 0.0

    def observe_truth(self, chain: Sequence[int], probs: Sequence[float], truth: Sequence[int]) -> None:
        """In the place of ``chain``, to whose tokens the draft gave ``probs``, came the tokens ``truth``.

        Tokens that the target was not shown count as well.
        """
        self._confidence.observe_truth(chain, probs, truth)
        self._rate = 0.0

    def observe_pass(self, n_verified: int, seconds: float) -> None:
        """See :meth:`DraftPays.observe_pass`."""
        super().observe_pass(n_verified, seconds)
        self._costs = []

"""When to go on drafting after tokens that are not confirmed yet: for targets that are a round trip away."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from sllm.draft.confidence import Confidence

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftAhead"]


class DraftAhead:
    """Decides whether one more token after an unconfirmed chain is worth drafting, and when a hint is worth
    sending.

    The target is at work meanwhile. While a hint travels and the news of what the target knew travels back, a
    target that runs ahead commits ``round trip / pass time`` tokens by itself. A chain helps only beyond
    these. So a chain of n tokens is gone on with as long as it is likely enough that the chain holds to where
    it overtakes the target, a distance of ``round trip / (pass time - draft time per token)`` tokens; a draft
    that is not faster than the target never does. (Where the target drafts by itself, the pass time is that
    for each of its tokens.)

    How likely a token is to hold follows from the draft's probability of it
    (:class:`~sllm.draft.confidence.Confidence`).

    Args:
        run_ahead: whether the target goes on without hints. Else it waits for them, and nothing has to be
            overtaken.

    """

    LIMIT = 64
    """No chain is longer."""

    WORTH = 0.08
    """A token that is less likely to be of use is not drafted: it would mostly cost bytes and rows of the
    target's passes.
    """

    _TRY_EVERY = 32
    """Passes without a draft after which one is tried all the same."""

    def __init__(self, *, run_ahead: bool) -> None:
        self._run_ahead = run_ahead
        self._passes: deque[float] = deque(maxlen=15)
        self._drafts: deque[float] = deque(maxlen=15)
        self._alone = 1.0  # tokens that a pass without hints commits
        self._round_trip = 0.0
        self._confidence = Confidence(0.9)  # hopeful: too little drafted would never be found out
        self._passes_since_draft = 0

    # ---- what is measured

    def observe_draft(self, n_tokens: int, seconds: float) -> None:
        """The draft made ``n_tokens`` in ``seconds``."""
        self._passes_since_draft = 0
        if n_tokens > 0:
            self._drafts.append(seconds / n_tokens)

    def observe_pass(self, seconds: float, alone: int | None = 1) -> None:
        """A pass of the target took ``seconds``, and committed ``alone`` tokens without any hint (more than
        one, where the target drafts by itself); None: it had a hint.
        """
        self._passes.append(seconds)
        self._passes_since_draft += 1
        if alone is not None:
            self._alone += 0.2 * (alone - self._alone)

    def observe_round_trip(self, seconds: float) -> None:
        """The current estimate of the round trip."""
        self._round_trip = seconds

    def observe_truth(self, chain: Sequence[int], probs: Sequence[float], truth: Sequence[int]) -> int:
        """Compare a chain with what came in its place; returns how many tokens hold."""
        return self._confidence.observe_truth(chain, probs, truth)

    # ---- what follows

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that hold where the ones before them do."""
        return self._confidence.acceptance

    def confidence(self, probs: Sequence[float]) -> float:
        """The chance that a whole chain holds, of which the draft has said ``probs``."""
        return self._confidence.of_chain(probs)

    def distance(self, waited: float = 0.0) -> float:
        """How long a chain must be to overtake the target, in tokens; infinite where it cannot.

        ``waited`` are the seconds since the newest news of the target.
        """
        if not self._run_ahead or not self._passes:
            return 0.0
        gain = self.pass_seconds / self._alone - self.draft_seconds
        lag = self._round_trip + min(waited, self._round_trip + self.pass_seconds)
        return lag / gain if gain > 0 else float("inf")

    def n_passed(self, waited: float) -> int:
        """So many tokens at least a target that runs ahead will have committed when it hears of a hint that
        is sent now, ``waited`` seconds after the newest news of it.
        """
        if not self._run_ahead or not self._passes:
            return 0
        return int((self._round_trip + waited) / max(self.pass_seconds, 1e-9))

    def worth_more(self, probs: Sequence[float], waited: float = 0.0) -> bool:
        """Whether to draft on after a chain of which the draft has said ``probs``."""
        n = len(probs)
        if n >= self.LIMIT:
            return False
        if self._passes_since_draft > self._TRY_EVERY:
            return True  # times and texts change; what a short chain is worth shows when the truth comes
        missing = max(1.0, self.distance(waited) - n)
        if missing > self.LIMIT:
            return False
        return bool(self.confidence(probs) * self.acceptance**missing >= self.WORTH)

    @property
    def pass_seconds(self) -> float:
        """What a pass of the target takes; 0 as long as nothing is known."""
        return median(self._passes) if self._passes else 0.0

    @property
    def draft_seconds(self) -> float:
        """What the draft takes for a token; 0 as long as nothing is known."""
        return median(self._drafts) if self._drafts else 0.0

    @property
    def step(self) -> int:
        """Tokens to draft at a time: two milliseconds' worth, so that a fast draft is not all overhead."""
        return max(1, min(8, int(0.002 / self.draft_seconds))) if self._drafts else 1

    @property
    def interval(self) -> float:
        """Seconds between hints: a target looks at the newest one when it begins a pass, so more than a few
        per pass are waste.
        """
        return min(max(self.pass_seconds / 4, 0.001), 0.02)

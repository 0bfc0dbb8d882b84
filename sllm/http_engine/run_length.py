"""How many tokens an engine is to go on by itself where there is no draft, its own being the draft."""

from __future__ import annotations

from sllm.draft.length import PassTimes

__all__ = ["RunLength"]


class RunLength:
    """Chooses the length of the next run from how often the engine's tokens were the ones selected, and from
    what runs have taken: the most tokens per second, as :class:`~sllm.draft.length.DraftLength` does for
    drafts, here with rows that cost a pass each.

    Args:
        most: no run is longer.

    """

    _DECAY = 0.97

    def __init__(self, most: int) -> None:
        self._most = most
        self._times = PassTimes()
        self._held = self._tried = 1.0  # one that held, so that the first runs are long
        self._to_try = [most, max(most // 2, 1)]  # two lengths say what a row costs

    def choose(self, room: int) -> int:
        """The length of the next run, at most ``room``, which is 1 or more."""
        if self._to_try:
            return min(self._to_try[0], room)
        share = self._held / self._tried
        tokens, holds, best, length = 0.0, 1.0, 0.0, 1
        for n in range(1, min(self._most, room) + 1):
            tokens += holds
            holds *= share
            rate = tokens / self._times.estimate(n)
            if rate > best:
                best, length = rate, n
        return length

    def observe(self, length: int, seconds: float | None, n_held: int) -> None:
        """A run of ``length`` rows took ``seconds`` (None: with a prompt, which says nothing about others),
        and the first ``n_held`` of its tokens were the ones selected.
        """
        if seconds is not None:
            self._times.add(length, seconds)
            if self._to_try:
                del self._to_try[0]
        self._held = self._DECAY * self._held + n_held
        self._tried = self._DECAY * self._tried + min(n_held + 1, length)

"""How far an engine is to go on by itself where there is no draft, its likeliest tokens being the draft."""

from __future__ import annotations

import math

__all__ = ["RunLength"]


class RunLength:
    """Chooses the length of the next run from how often the engine's tokens were the ones selected.

    Its tokens are read as they come, and the next run is asked for at the first that is not the one selected;
    so a longer run takes no longer, and what it wastes are the engine's passes after that token. A run is as
    long as its last token still has some chance to be reached.

    Args:
        most: no run is longer.

    """

    _CHANCE = 0.1
    _DECAY = 0.97

    def __init__(self, most: int) -> None:
        self._most = most
        self._held, self._tried = 1.0, 2.0

    def choose(self, room: int) -> int:
        """The length of the next run, at most ``room``, which is 1 or more."""
        share = min(self._held / self._tried, 0.999)
        reached = math.ceil(math.log(self._CHANCE) / math.log(share)) if share > 0 else 1
        return max(1, min(reached, self._most, room))

    def observe(self, n_held: int, n_tried: int) -> None:
        """Of ``n_tried`` tokens the first ``n_held`` were the ones selected."""
        decay = self._DECAY**n_tried
        self._held = decay * self._held + n_held
        self._tried = decay * self._tried + n_tried

"""When and where the worker drafts trees for a text, from what they have cost and brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.growth import TreeGrowth
from sllm.draft.length import PassTimes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CLEARLY", "SHORT", "TreePlan"]

SHORT = 4
"""After fewer hinted tokens a draft of which nothing is known may show what it takes."""

CLEARLY = 1.05
"""So much more than the hint alone a draft has to promise, since the hint is there already."""

_NEW = 0.15
"""What the newest round weighs in a running mean."""


class TreePlan:
    """What a session's rounds with trees of the worker have cost and brought.

    Args:
        limit: drafted tokens that one pass can check.

    Attributes:
        growth: how trees are drafted, and how much of them is checked.

    """

    def __init__(self, limit: int) -> None:
        self._passes = PassTimes()
        self.growth = TreeGrowth(limit, self._passes)
        self._gain = self._rows = self._seconds = 0.0  # running means of a tree that was alone
        self._n_alone = 0

    def observe_alone(self, n_accepted: int, n_rows: int, seconds: float) -> None:
        """A tree without a hint beside it was drafted in so many seconds; of its ``n_rows`` tokens in a pass
        ``n_accepted`` were right.
        """
        self._n_alone += 1
        weight = max(_NEW, 1 / self._n_alone)
        self._gain += weight * (n_accepted - self._gain)
        self._rows += weight * (n_rows - self._rows)
        self._seconds += weight * (seconds - self._seconds)

    def place(self, chances: Sequence[float], beside: float, end: float) -> str | None:
        """Where a tree is of more use than it costs beside a hint, tokens per second compared.

        Args:
            chances: of the hint's tokens to be accepted, all of which will be checked.
            beside: that none of those at the end of the text is right.
            end: that of the last token of its main path; 0: nothing can follow that.

        Returns:
            ``"root"``: at the end of the text; ``"end"``: at that of the main path; None: nowhere.

        """
        if self._n_alone == 0 or not self._passes.seen:
            # Nothing is known of it yet: it may show what it takes after a short hint.
            return "end" if end > 0 and len(chances) < SHORT else None
        alone = (1 + sum(chances)) / self._passes.estimate(1 + len(chances))
        # Where the hint is wrong from the start, the tree has the text for itself, as it has after its end.
        at_root = beside * self._gain
        rows = 1 + len(chances) + round(self._rows)
        both = (1 + sum(chances) + max(at_root, end * self._gain)) / (
            self._passes.estimate(rows) + self._seconds
        )
        if both <= CLEARLY * alone:
            return None
        return "root" if at_root >= end * self._gain else "end"

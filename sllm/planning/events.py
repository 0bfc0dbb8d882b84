"""The clock of the simulations, and what comes of one."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Events", "Simulated"]


class Events:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Let ``call`` happen so much later; in order, where at the same time."""
        self._n += 1
        heappush(self._queue, (self.now + seconds, self._n, call))

    def next(self) -> None:
        """Go on to what happens next.

        Raises:
            RuntimeError: nothing will.

        """
        if not self._queue:
            raise RuntimeError("both sides wait for the other: the depth rule allows not even one token")
        self.now, _, call = heappop(self._queue)
        call()


@dataclass(frozen=True)
class Simulated:
    """How a text of ``n_tokens`` came about.

    Attributes:
        n_tokens: of the text.
        seconds: from its beginning to its last token; the prompt is on both sides before that.
        n_passes: of the target.
        n_hints: messages with drafts.
        n_drafted: tokens that were drafted.
        n_accepted: drafted tokens that a pass has checked and found right.
        n_rows: drafted tokens that were checked, and accepted ones that were computed once more.
        bytes_up: of hints, as messages, where they were sent as such.

    """

    n_tokens: int
    seconds: float
    n_passes: int
    n_hints: int
    n_drafted: int
    n_accepted: int
    n_rows: int = 0
    bytes_up: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds

    @property
    def passes_per_token(self) -> float:
        """Passes of the target for each token."""
        return self.n_passes / self.n_tokens

    @property
    def hints_per_token(self) -> float:
        """Hints for each token."""
        return self.n_hints / self.n_tokens

    @property
    def n_wasted(self) -> int:
        """Drafted tokens that were wrong, or behind a wrong one, or right and too late."""
        return self.n_drafted - self.n_accepted

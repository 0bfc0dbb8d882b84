"""The clock of the simulations, and their result."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Events", "Simulated"]


class Events:
    """A queue of events in simulated time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Schedule ``call`` after a delay; calls at the same time run in order."""
        self._n += 1
        heappush(self._queue, (self.now + seconds, self._n, call))

    def next(self) -> None:
        """Advance to the next event.

        Raises:
            RuntimeError: there is none.

        """
        if not self._queue:
            raise RuntimeError("both sides wait for the other: the depth rule allows not even one token")
        self.now, _, call = heappop(self._queue)
        call()


@dataclass(frozen=True)
class Simulated:
    """The result of a simulated text.

    Attributes:
        n_tokens: tokens of the text.
        seconds: from its beginning to its last token; the prompt has been computed on both sides before.
        n_passes: passes of the target.
        n_hints: messages with drafts.
        n_drafted: drafted tokens.
        n_accepted: drafted tokens that a pass has checked and found right.
        n_rows: drafted tokens that were checked, and accepted ones that were computed again.
        bytes_up: bytes of hint messages, if hints were sent.

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
        """Drafted tokens that were wrong, or after a wrong one, or right but too late."""
        return self.n_drafted - self.n_accepted

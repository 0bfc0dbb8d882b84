"""Whether the thread that computes gets on: how long its step under way has taken, and how long it may."""

from __future__ import annotations

import statistics
from collections import deque
from time import monotonic

__all__ = ["Progress"]

_LEAST_SECONDS = 60.0
"""What any step may take: machines are paused, memory is swapped, drivers start up."""

_SLOWER = 10.0
"""How many times as long as usual a step may take beyond that."""

_FIRST_BYTES_PER_SECOND = 5e7
"""Before steps were measured: a machine that reads a model of 5 GB from its disk, and computes a first chunk
with it, in 100 s is slow, and not hung."""

_MEASURED = 16
"""Steps that have to be measured before the model's size does not count any more."""


class Progress:
    """The steps of a loop, timed. One thread calls :meth:`begin` and :meth:`end`; any other may ask.

    The seconds that a step may take scale with the machine: to compute many rows at once takes no longer than
    to compute them one by one, so the usual time of a row times the most rows of a step bounds what a step
    should need. A step may take 10 times that and a minute, and as long as there are no measurements a minute
    and 20 s for each GB of weights.

    Attributes:
        limit: seconds that a step may take; None: found as above.
        most_rows: of one step.
        size_bytes: of the weights.
        n_begun: steps so far.
        began: when the step under way began, by ``time.monotonic()``; None: the loop waits for work.

    Examples:
        >>> from sllm.worker.progress import Progress
        >>> progress = Progress()
        >>> progress.size_bytes = 10**9
        >>> progress.allowed
        80.0

    """

    def __init__(self) -> None:
        self.limit: float | None = None
        self.most_rows = 1
        self.size_bytes = 0
        self.n_begun = 0
        self.began: float | None = None
        self._paces: deque[float] = deque(maxlen=64)  # seconds for a row

    def begin(self) -> None:
        """A step begins."""
        self.n_begun += 1
        self.began = monotonic()

    def end(self, n_rows: int) -> None:
        """The step has ended, and has computed ``n_rows`` rows."""
        if n_rows > 0 and self.began is not None:
            self._paces.append((monotonic() - self.began) / n_rows)
        self.began = None

    @property
    def allowed(self) -> float:
        """Seconds that a step may take."""
        if self.limit is not None:
            return self.limit
        paces = self._paces.copy()  # as a whole: the other thread appends
        measured = _SLOWER * self.most_rows * statistics.median(paces) if paces else 0.0
        first = self.size_bytes / _FIRST_BYTES_PER_SECOND if len(paces) < _MEASURED else 0.0
        return _LEAST_SECONDS + max(measured, first)

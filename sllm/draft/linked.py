"""What a pass of a target takes that is reached over a link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.length import PassTimes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LinkedPassTimes"]


class LinkedPassTimes(PassTimes):
    """What a pass over a link takes by its number of rows: a time that is the same for all, and as much again
    for each row, on the link and where it is computed.

    Medians for each number of rows, as they serve for a target that is here, would show how the link's time
    varies, which is more than many rows take. On a line through all passes that evens out; how steep it is
    shows once there were passes of different sizes.

    Args:
        round_trip: asks for the part of a pass's seconds in which rows are neither computed nor carried, as
            far as it is known.

    """

    _KEEP = 0.98
    """What is left of the past with each pass."""

    _PRIOR_ROW = 0.05
    """What a row adds to a pass that is bound by reading the weights, as a part of it; until that is seen."""

    _PRIOR_WEIGHT = 300.0
    """Of that guess at most: in squares of rows, as the passes that are seen weigh by how far their sizes
    differ.
    """

    _PRIOR_SPREAD = 0.5
    """So far off is the guess thought to be, as a part of it: the less the times of passes vary besides, the
    less it weighs (the posterior of a slope with a normal prior).
    """

    _FEW = 4
    """So many passes do not show how much their times vary."""

    _SLOWEST = 2.0
    """A pass that took so many times what was expected counts as if it had taken just that."""

    def __init__(self, round_trip: Callable[[], float]) -> None:
        super().__init__()
        self._round_trip = round_trip
        # Sums over passes: rows and seconds.
        self._n = self._x = self._y = self._xx = self._xy = self._yy = 0.0

    def add(self, count: int, seconds: float) -> None:
        """See :meth:`PassTimes.add`."""
        if self._n >= 1:
            seconds = min(seconds, self._SLOWEST * self.estimate(count))
        super().add(count, seconds)
        sums = (self._n, self._x, self._y, self._xx, self._xy, self._yy)
        new = (1.0, count, seconds, count * count, count * seconds, seconds * seconds)
        self._n, self._x, self._y, self._xx, self._xy, self._yy = (
            self._KEEP * old + one for old, one in zip(sums, new, strict=True)
        )

    def row_seconds(self) -> float:
        """What one more row takes."""
        mean = self._y / self._n
        prior = self._PRIOR_ROW * max(mean - self._round_trip(), 0.0)
        # Sums about the means; rounding may leave a little less than nothing of them.
        spread = max(self._xx - self._x * self._x / self._n, 0.0)
        together = self._xy - self._x * mean
        weight = self._PRIOR_WEIGHT
        if self._n >= self._FEW and prior > 0:
            fitted = together * together / spread if spread > 0 else 0.0
            varies = max(self._yy - self._y * mean - fitted, 0.0) / (self._n - 2)
            weight = min(weight, varies / (self._PRIOR_SPREAD * prior) ** 2)
        if spread + weight <= 0:
            return prior
        return max((together + weight * prior) / (spread + weight), 0.0)

    def estimate(self, count: int) -> float:
        """See :meth:`PassTimes.estimate`."""
        return self.up_to(count)[-1]

    def up_to(self, count: int) -> list[float]:
        """See :meth:`PassTimes.up_to`."""
        row = self.row_seconds()
        first = max((self._y - row * self._x) / self._n + row, 1e-9)
        return [first + row * n for n in range(count)]

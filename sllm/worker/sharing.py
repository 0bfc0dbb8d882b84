"""How the texts of a worker share its time: none gets less than half of what is its due.

Of n texts at work each is due 1/n of the speed that it would have alone. What holds a text up is the length
of a *round*, the prompt tokens and the pass that come between two of its tokens; so a round may take so long
that a text with one row in each pass still gets more than half of its due, and within that the long prompts
and the long hints get what they can. On a GPU, where a pass of many rows takes little longer than one of a
single row, that is as much as ever; on a CPU, where rows cost nearly all the time, it is much less.

Passes are measured, not modelled (:class:`~sllm.draft.length.PassTimes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.length import PassTimes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AWAY_SECONDS", "FIRST_ROWS", "ROUND", "Shares", "coarse", "divide", "most_rows"]

ROUND = 1.6
"""Passes of a single row that a round may take, for each of the texts: at 2 those of one row would get just
half of their due, and measurements are not that exact.
"""

AWAY_SECONDS = 1.0
"""A text whose client was heard of so recently may go on at any moment."""

_WORTH = 4.0
"""Prompts wait until a chunk may take as long as so many passes of a single row: what every pass costs,
however few its rows (the weights are read), would else be the larger part of it.
"""

FIRST_ROWS = 16
"""For each text, as long as nothing is known of their cost."""


def most_rows(times: PassTimes, least: int, most: int, seconds: float) -> int:
    """How many rows from ``least`` to ``most`` a pass may have that is to take ``seconds``; ``least`` where
    even they take longer.

    Examples:
        >>> times = PassTimes()
        >>> for n in (1, 10, 100):
        ...     times.add(n, 1 + 0.1 * n)
        >>> most_rows(times, 1, 200, 4.0), most_rows(times, 5, 200, 0.1), most_rows(times, 1, 20, 60.0)
        (30, 5, 20)

    """
    low, high = least, max(least, most)
    while low < high:
        middle = (low + high + 1) // 2
        if times.estimate(middle) <= seconds * (1 + 1e-9):
            low = middle
        else:
            high = middle - 1
    return low


def coarse(n_rows: int) -> int:
    """A number of rows, rounded down by an eighth at most: there are few of these, so that each is measured
    often.

    Examples:
        >>> coarse(15), coarse(23), coarse(511)
        (15, 22, 480)

    """
    step = 1 << max(0, n_rows.bit_length() - 4)
    return n_rows - n_rows % step


def divide(wanted: Sequence[int], n_rows: int) -> list[int]:
    """Rows for each of those who want some: equally many, and what one does not want goes to the others.

    That is max-min fairness (Bertsekas and Gallager, Data Networks, section 6.5.2). All together they are
    ``n_rows`` at most, or one for each where those are more.

    Examples:
        >>> divide([500, 2, 30], 64)
        [32, 2, 30]

    """
    found = [0] * len(wanted)
    left = n_rows
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for n_done, i in enumerate(order):
        found[i] = min(wanted[i], max(1, left // (len(order) - n_done)))
        left -= found[i]
    return found


class Shares:
    """What a worker's rounds cost, and how many rows of what they may have.

    Attributes:
        passes: what passes took by their rows.
        prompts: what chunks of prompts took.

    """

    def __init__(self) -> None:
        self.passes = PassTimes()
        self.prompts = PassTimes()
        self._credit = 0.0  # seconds of prompts that are due between passes; below 0: they had more

    @property
    def _due(self) -> float:
        """Seconds of a round for each text."""
        return ROUND * self.passes.estimate(1)

    def pass_rows(self, n_texts: int, n_prompts: int, draft_seconds: float, most: int) -> int:
        """Rows, drafted ones included, that a pass of ``n_texts`` may have.

        Args:
            n_texts: the texts in it.
            n_prompts: others whose prompts are being computed.
            draft_seconds: what the worker's own drafts for it took.
            most: rows that can be computed at once.

        """
        if n_texts + n_prompts < 2 or not self.passes.seen:
            return most
        return min(most, most_rows(self.passes, n_texts, most, n_texts * self._due - draft_seconds))

    def prompt_rows(self, n_prompts: int, n_ready: int, n_away: int, most: int) -> int:
        """Tokens of prompts to be computed now; 0: none before the next pass.

        Args:
            n_prompts: whose they are.
            n_ready: texts in the pass that follows.
            n_away: texts whose clients may ask for one at any moment.
            most: tokens that there are, or that may be computed at once.

        """
        if n_ready + n_away == 0:
            self._credit = 0.0
            return most
        if not self.passes.seen or not self.prompts.seen:
            return min(most, FIRST_ROWS * n_prompts)
        if n_ready == 0:  # nobody waits yet; who comes now is to wait for a round
            self._credit = max(self._credit, (n_prompts + n_away) * self._due)
        rows = most_rows(self.prompts, min(n_prompts, most), most, self._credit)
        enough = rows == most and self._credit > 0
        if n_ready > 0 and not enough and self._credit < _WORTH * self.passes.estimate(1):
            return 0
        return rows

    def observe_prompts(self, n_rows: int, seconds: float) -> None:
        """A chunk of prompts took so long."""
        self.prompts.add(coarse(n_rows), seconds)
        self._credit -= seconds

    def observe_pass(
        self, n_rows: int, seconds: float, draft_seconds: float, *, n_texts: int, n_prompts: int
    ) -> None:
        """A pass of ``n_texts`` took so long, with what the drafts for it took."""
        self.passes.add(n_rows, seconds - draft_seconds)
        if n_prompts == 0:
            self._credit = 0.0
            return
        due = self._due
        self._credit += (n_texts + n_prompts) * due - min(seconds, n_texts * due)
        # Prompts that had a slow moment do not pay for it for ever, nor save up for one.
        bound = 2 * _WORTH * (n_texts + n_prompts) * due
        self._credit = min(max(self._credit, -bound), bound)

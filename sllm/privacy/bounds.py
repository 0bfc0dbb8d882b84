"""How much work one text may cost: candidates are judged up to a number that grows with the text, and what
lies behind the last of them counts as found.

So a text made of nothing but beginnings of values costs time linear in its length with a small factor, and
leaks nothing: it is masked where nobody looked. Ordinary prose and ordinary tables stay far below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator

__all__ = ["Budget"]

# Candidates of one kind: so many in any text, and one more for so many characters.
_FREE = 10_000
_PER = 40


class Budget:
    """Counts candidates of one kind in one text, of however many patterns.

    Args:
        text: the text that is searched.

    """

    def __init__(self, text: str) -> None:
        self._left = _FREE + len(text) // _PER
        self._end = self._unseen = len(text)

    @property
    def spent(self) -> bool:
        """Whether there was a candidate that could not be judged any more."""
        return self._left < 0

    def spend(self, start: int) -> bool:
        """Takes the candidate that begins at an offset; False once none is left, and then the caller looks at
        no more from there on.
        """
        self._left -= 1
        if self._left < 0:
            self._unseen = min(self._unseen, start)
        return self._left >= 0

    def each(self, candidates: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
        """Those that may be judged."""
        for candidate in candidates:
            if not self.spend(candidate.start()):
                return
            yield candidate

    def rest(self, kind: str) -> Iterator[Finding]:
        """What nobody looked at, as one finding; none if everything was judged."""
        if self._left < 0:
            yield Finding(self._unseen, self._end, kind, 0.5)

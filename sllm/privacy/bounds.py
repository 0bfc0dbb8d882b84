"""How much work one text may cost: candidates are judged up to a number that grows with the text, and what
lies behind the last of them counts as found.

So a text made of nothing but beginnings of values costs time linear in its length with a small factor, and
leaks nothing: it is masked where nobody looked. Ordinary prose and ordinary tables stay far below.
"""

from __future__ import annotations

__all__ = ["Budget"]

# Candidates of one kind: so many in any text, and one more for so many characters.
_FREE = 10_000
_PER = 40


class Budget:
    """Counts candidates of one kind in one text.

    Args:
        text: the text that is searched.

    Attributes:
        left: how many candidates may still be judged.

    """

    def __init__(self, text: str) -> None:
        self.left = _FREE + len(text) // _PER

    def spend(self) -> bool:
        """Takes one candidate; False once none is left, and then the caller counts the rest as found."""
        self.left -= 1
        return self.left >= 0

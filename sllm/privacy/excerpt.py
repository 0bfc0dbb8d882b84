"""The parts of a text around masked ranges, as one text: only there can detectors find more after masking."""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sllm.privacy.names.word_lists import not_a_common_word
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sllm.privacy.findings import Finding, Reach

__all__ = ["Excerpt", "around"]

# As far from a range its masking can lay something open; and what is read around that, which is more than any
# detector here looks to the left and right of a value: then to the end of the word and, if near, of the line.
_NEAR = 256
_MARGIN = _NEAR + 512
_LONGEST_WORD = 8192
_LONGEST_LINE = 256
_SPACE = lazy(r"\s")
# So many words on each side of a range tell whether its masking can lay open a value beside it.
_N_WORDS = 3
_WORDS_WITHIN = 64
_WORD = lazy(r"[(\"'*]{0,2}([A-Za-z][a-z'-]{0,15})?[.,;:!?)\"'*]{0,3}")
_OPENS = frozenset(" \t\r\n(\"'*")
_SENTENCE_END = lazy("[\n。！？!?]")
# No value, no table and no list goes on across it.
_BETWEEN = "\n\0\n\n"


@dataclass(frozen=True)
class Excerpt:
    """Parts of a text, one after another.

    Attributes:
        text: the parts, with lines between them that belong to nothing.
        parts: start and end of each in the whole text.
        near: ranges of the whole text, in order, that findings count in; at the edges of the parts words that
            rule them out may be cut off.

    """

    text: str
    parts: Sequence[tuple[int, int]]
    near: Sequence[tuple[int, int]]

    def back(self, findings: Sequence[Finding]) -> Iterator[Finding]:
        """Findings in the excerpt as findings in the whole text; one that reaches over several parts becomes
        one in each.
        """
        ends = [end for _, end in self.near]
        sizes = (end - start + len(_BETWEEN) for start, end in self.parts)
        starts = [0, *itertools.accumulate(sizes)][:-1]  # of each part, in the excerpt
        for one in findings:
            n = bisect.bisect_right(starts, one.start) - 1
            while n < len(starts) and starts[n] < one.end:
                low, high = self.parts[n]
                start = max(low, low + one.start - starts[n])
                end = min(high, low + one.end - starts[n])
                at = bisect.bisect_right(ends, start)
                if start < end and at < len(ends) and self.near[at][0] < end:
                    yield replace(one, start=start, end=end)
                n += 1


def around(text: str, ranges: Sequence[tuple[int, int]], reach: Reach = "far") -> Excerpt:
    """The parts of a text in which a detector may find more after masking than before.

    Args:
        text: with NUL characters for what is masked.
        ranges: what was masked, in order, not overlapping.
        reach: the detector's reach; see :class:`~sllm.privacy.findings.Detector`.

    """
    if reach == "words":
        is_ordinary = functools.cache(_is_ordinary)  # gone with this call: they are words of the user
        ranges = [one for one in ranges if not _is_among_words(text, *one, is_ordinary)]
    ends = [found.end() for found in _SENTENCE_END.finditer(text)] if reach == "sentence" else []
    parts: list[tuple[int, int]] = []
    for start, end in ranges:
        if reach == "sentence":
            before, after = bisect.bisect_right(ends, start), bisect.bisect_left(ends, end)
            low = ends[before - 1] if before else 0
            high = ends[after] if after < len(ends) else len(text)
        else:
            low, high = _left(text, start), _right(text, end)
        if parts and low <= parts[-1][1]:
            parts[-1] = parts[-1][0], max(high, parts[-1][1])
        else:
            parts.append((low, high))
    if sum(end - start for start, end in parts) > 0.8 * len(text):
        return Excerpt(text, [(0, len(text))], [(0, len(text))])
    near = parts if reach == "sentence" else [(start - _NEAR, end + _NEAR) for start, end in ranges]
    return Excerpt(_BETWEEN.join([text[start:end] for start, end in parts]), parts, near)


def _is_among_words(text: str, start: int, end: int, is_ordinary: Callable[[str], bool]) -> bool:
    """Whether ordinary words stand on both sides of a range, up to the next range: no part of a value that
    was ruled out, or read otherwise, because of what is masked now.
    """
    left = text[max(0, start - _WORDS_WITHIN) : start].rpartition("\0")[2]
    right = text[end : end + _WORDS_WITHIN].partition("\0")[0]
    return (
        (not left or left[-1] in _OPENS)
        and all(map(is_ordinary, left.split()[-_N_WORDS:]))
        and all(map(is_ordinary, right.split()[:_N_WORDS]))
        and (not right or not right[0].isalnum())
    )


def _is_ordinary(word: str) -> bool:
    """Whether it is a word in small letters, or one that is no name, with signs of sentences around it."""
    found = _WORD.fullmatch(word)
    if found is None:
        return False
    return not found[1] or found[1].islower() or not not_a_common_word(found[1])


def _left(text: str, at: int) -> int:
    at = max(0, at - _MARGIN)
    line = text.rfind("\n", max(0, at - _LONGEST_LINE), at)
    if line >= 0:
        return line + 1
    low = max(0, at - _LONGEST_WORD)
    spaces = [text.rfind(space, low, at) for space in " \n\t"]
    return max(*spaces, low - 1) + 1


def _right(text: str, at: int) -> int:
    at = min(len(text), at + _MARGIN)
    line = text.find("\n", at, at + _LONGEST_LINE)
    if line >= 0:
        return line
    space = _SPACE.search(text, at, at + _LONGEST_WORD)
    return space.start() if space else min(len(text), at + _LONGEST_WORD)

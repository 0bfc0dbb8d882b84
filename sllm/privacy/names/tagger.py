"""Names in Chinese prose, found by a tagger that the C core runs; needs the extra ``names``."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from sllm.engine.tagger import Tagger
from sllm.privacy.findings import Finding, in_original
from sllm.privacy.names import lac
from sllm.privacy.regex import lazy
from sllm.privacy.text import plain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from sllm.privacy.findings import Reach

__all__ = ["TaggerDetector"]

_HAN = lazy("[\u3400-\u9fff]")
# Sentences and the cells of tables, and where one is long, parts that end after a comma or a space if there
# is any.
_END = "\\n\\t|。！？!?"
_SENTENCE = lazy(
    rf"[^{_END}]{{1,255}}(?:[{_END}][{_END} *]{{0,8}}|\Z|(?<=[，,；;、：:\s]))"
    rf"|[^{_END}]{{1,255}}|[{_END}][{_END} *]*"
)
# The tags of LAC for each kind; names of people and places in lower case are those of its parts of speech.
_TAGS = {"NAME": ("PER", "nr"), "ORG": ("ORG", "nt"), "PLACE": ("LOC", "ns")}
_SCORE = 0.6
_WITHHELD = "某"
_JOINTS = "·•・"
_JOINT = lazy(f"[{_JOINTS}]")  # within names of other peoples: 买买提·艾力
# A surname alone is left to the words around it. Names of places and organisations may hold letters.
_PERSON = lazy(rf"[\u3400-\u9fff]{{2,8}}|[\u3400-\u9fff]{{1,8}}(?:[{_JOINTS}][\u3400-\u9fff]{{1,8}}){{1,4}}")
_OTHER = lazy(r".*[\u3400-\u9fff].*")
# The first letters of kinds, of neighbours.
_RUN = lazy(r"([A-Z])\1*(?:-\1+)*")
_NAME = lazy(r"[^\W_](?:.*[^\W_])?")


class TaggerDetector:
    """People, organisations and places in Chinese prose, as a sequence tagger sees them.

    A bidirectional GRU with a CRF reads each sentence that has Chinese characters in it, some 10 microseconds
    for a character on one core. It finds names that nothing announces, which
    :class:`~sllm.privacy.NameDetector` cannot; and it takes no part in other languages.

    Args:
        kinds: which to look for, of ``"NAME"`` (people), ``"ORG"`` (organisations) and ``"PLACE"`` (places).
        weights: a file of the layout that ``csrc/sllm.h`` describes, with the labels of LAC; None: those that
            the package ``jieba`` carries (``pip install 'sllm[names]'``), converted on first use.

    Raises:
        ImportError: no weights were named and the package is not installed.
        ModelLoadError: the weights cannot be read, or are not those of the version that is known.
        ValueError: another kind.

    """

    reach: Reach = "sentence"

    def __init__(
        self, kinds: Collection[str] = ("NAME",), *, weights: str | os.PathLike[str] | None = None
    ) -> None:
        unknown = sorted(set(kinds) - set(_TAGS))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; a tagger knows {sorted(_TAGS)}")
        self._tagger = _shared() if weights is None else Tagger(weights)
        of_tag = {tag: kind for kind, tags in _TAGS.items() if kind in kinds for tag in tags}
        labels = [label.removesuffix("-B").removesuffix("-I") for label in self._tagger.labels]
        self._kinds = [of_tag.get(label, "") for label in labels]

    def detect(self, text: str) -> list[Finding]:
        """Findings of the kinds asked for, in the order of their starts, without overlaps."""
        if text.isascii() or not _HAN.search(text):
            return []
        view = plain(text)
        # What is masked already becomes a person whose name is withheld, as Chinese writes one: so the rest
        # of the sentence is to the tagger what it was.
        body = view.text.replace("\0", _WITHHELD)
        sentences = [one for one in _SENTENCE.finditer(body) if _HAN.search(one[0])]
        labels = self._tagger.run("".join(one[0] for one in sentences), [len(one[0]) for one in sentences])
        found: list[Finding] = []
        at = 0
        for sentence in sentences:
            first = sentence.start()
            for start, end, kind in self._names(sentence[0], labels[at : at + len(sentence[0])].tolist()):
                if "\0" not in view.text[first + start : first + end]:
                    found.append(Finding(first + start, first + end, kind, _SCORE))
            at += len(sentence[0])
        return list(in_original(found, view))

    def _names(self, sentence: str, labels: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """The names of a sentence: start, end and kind. Parts of one kind that nothing but a joint separates
        are one name, without the signs at its ends; it has the form of one.
        """
        kinds = [self._kinds[label] for label in labels]
        marks = "".join(kind[:1] or " " for kind in kinds)
        for joint in _JOINT.finditer(sentence):
            marks = marks[: joint.start()] + (marks[joint.start()].strip() or "-") + marks[joint.end() :]
        for run in _RUN.finditer(marks):
            kind = kinds[run.start()]
            name = _NAME.search(sentence, *run.span())
            if name and (_PERSON if kind == "NAME" else _OTHER).fullmatch(sentence, *name.span()):
                yield *name.span(), kind


@functools.cache
def _shared() -> Tagger:
    """One in a process: the weights are 13 MB."""
    return Tagger(lac.weights())

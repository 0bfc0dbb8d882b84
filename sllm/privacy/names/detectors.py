"""Names of people and organisations: by the words around them, or by asking a language model.

:class:`NameDetector` needs no model and finds only what is clear from its context. :class:`ModelDetector`
lets a scorer judge candidates one by one: it compares the probabilities of labels, and parses no generated
text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding, LabelScorer, in_original
from sllm.privacy.names import chinese, english
from sllm.privacy.names.word_lists import trimmed
from sllm.privacy.regex import Patterns
from sllm.privacy.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sllm.privacy.findings import Reach

__all__ = ["ModelDetector", "NameDetector"]

_LATIN, _HAN = Patterns("names_en"), Patterns("names_zh")


class NameDetector:
    """People and companies with a cue in the text: 姓名, 我叫, 王先生, my name is, Mr, Dear, a label, Inc.,
    有限公司.

    Names in prose without a cue need a :class:`~sllm.privacy.TaggerDetector`, a
    :class:`~sllm.privacy.CensusDetector` or a :class:`ModelDetector`.
    """

    reach: Reach = "words"

    def detect(self, text: str) -> list[Finding]:
        """Findings of kinds NAME and ORG."""
        view = plain(text)
        return list(in_original(self._scan(view.text), view))

    def _scan(self, text: str) -> Iterator[Finding]:
        yield from english.scan(text)
        if not text.isascii() and _HAN.char.search(text):
            yield from chinese.scan(text)


_KINDS = ("NAME", "ORG", "ADDRESS")
# The question to a scorer, what stands for a candidate when it is asked of nothing, and the labels.
_ENGLISH = (
    'Text: {before}"{span}"{after}\nIn the text above, "{span}" is',
    "...",
    (" a person's name", " the name of an organisation", " a postal address", " an ordinary word"),
)
_CHINESE = (
    "文本：{before}「{span}」{after}\n在上面的文本中，「{span}」是",
    "……",
    ("人名", "机构名称", "地址", "普通词语"),
)


class ModelDetector:
    """Names, organisations and addresses, judged by a language model.

    Candidates are found by rule (a surname and one or two characters, runs of capitalised words, suffixes
    such as 公司 and University), and each is put to the model in its sentence: the log-probabilities of four
    labels are compared, after subtracting what the model gives them for an empty candidate (contextual
    calibration, Zhao et al. 2021, arXiv:2102.09690).

    Args:
        scorer: the model; see :class:`~sllm.privacy.findings.LabelScorer`.
        threshold: probability of being a name, organisation or address, among the labels, from which a
            candidate counts.
        max_candidates: candidates judged per text; further ones count as found without asking, so that a long
            text takes bounded time and leaks nothing.
        window: characters of context on each side that are shown to the model.

    """

    def __init__(
        self, scorer: LabelScorer, *, threshold: float = 0.5, max_candidates: int = 256, window: int = 60
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected a probability between 0 and 1")
        if max_candidates < 0 or window < 0:
            raise ValueError(
                f"max_candidates is {max_candidates} and window {window}, expected no negative numbers"
            )
        self._scorer = scorer
        self._threshold = threshold
        self._max = max_candidates
        self._window = window
        self._neutral: dict[str, list[float]] = {}

    def detect(self, text: str) -> list[Finding]:
        """Findings of kinds NAME, ORG and ADDRESS.

        Raises:
            ValueError: the scorer gave another number of scores than there are labels, or NaN.
            Exception: whatever the scorer raises.

        """
        view = plain(text)
        judged: list[tuple[float, Finding]] = []
        for n, (start, end, kind) in enumerate(self._candidates(view.text)):
            if n >= self._max:
                judged.append((self._threshold, Finding(start, end, kind, self._threshold)))
                continue
            shares = self._judge(view.text, start, end)
            best = max(range(3), key=shares.__getitem__)
            score = sum(shares[:3])
            if score >= self._threshold:
                judged.append((score, Finding(start, end, _KINDS[best], min(score, 1.0))))
        # Of candidates that overlap (张伟, 张伟东) the likelier one is kept.
        judged.sort(key=lambda pair: (-pair[0], pair[1].start - pair[1].end))
        taken: list[Finding] = []
        for _, one in judged:
            if all(one.end <= other.start or other.end <= one.start for other in taken):
                taken.append(one)
        return sorted(in_original(taken, view), key=lambda one: one.start)

    def _candidates(self, text: str) -> list[tuple[int, int, str]]:
        found: dict[tuple[int, int], str] = dict.fromkeys(chinese.candidates(text), "NAME")
        for pattern, kind in ((_HAN.organisation, "ORG"), (_HAN.address, "ADDRESS")):
            for match in pattern.finditer(text):
                found.setdefault(match.span(), kind)
        for match in _LATIN.candidate.finditer(text):
            span = trimmed(match[0], match.start())
            if span:
                found.setdefault(span, "NAME")
        return sorted((start, end, kind) for (start, end), kind in found.items())

    def _score(self, prompt: str, labels: Sequence[str]) -> list[float]:
        scores = [float(score) for score in self._scorer.label_logprobs(prompt, labels)]
        if len(scores) != len(labels):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(labels)} labels")
        if any(math.isnan(score) or score == math.inf for score in scores):
            raise ValueError("the scorer gave a score that is no log-probability")
        return scores

    def _judge(self, text: str, start: int, end: int) -> list[float]:
        """The calibrated probability of each label; they sum to 1."""
        span = text[start:end]
        prompt, none, labels = _CHINESE if _HAN.char.search(span) else _ENGLISH
        neutral = self._neutral.get(none)
        if neutral is None:
            neutral = self._score(prompt.format(before="", span=none, after=""), labels)
            self._neutral[none] = neutral
        before = text[max(0, start - self._window) : start].replace("\n", " ")
        after = text[end : end + self._window].replace("\n", " ")
        scores = self._score(prompt.format(before=before, span=span, after=after), labels)
        shifted = [s - n if n > -math.inf else s for s, n in zip(scores, neutral, strict=True)]
        top = max(shifted)
        if top == -math.inf:
            raise ValueError("the scorer finds every label impossible")
        weights = [math.exp(value - top) for value in shifted]
        return [weight / sum(weights) for weight in weights]

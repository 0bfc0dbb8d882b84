"""The second half of ``sllm demo``: who answers a request, and what of it leaves the machine.

Nothing is staged: the embedded target grades with the profile that comes with it, the worker of the demo is
the cloud, and what is shown of the link is what was handed to the connection.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import sllm
from sllm import embedded
from sllm.cli.console import count, one_line, table
from sllm.remote.target import RemoteGeneration, RemoteTarget
from sllm.triage.calibration import Profile
from sllm.triage.hybrid import Hybrid
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import Triage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from sllm.cli.console import Output
    from sllm.engine.sampling import SamplingParams
    from sllm.remote.connection import Remote
    from sllm.targets.base import Commit, Scores

__all__ = ["PRIVATE", "REQUESTS", "Private", "show_triage"]

REQUESTS = (
    "What comes after spring?",
    "德国的首都是哪里？",
    "Translate into Chinese: The girl is reading in the library.",
    "翻译成英文：猫在厨房里睡觉。",
    "Prove that the square root of 47 is irrational.",
    "证明根号47是无理数。",
)
"""Two for each tier. The profile of the embedded target lets no answer of tier 2 go without verification."""


@dataclass(frozen=True)
class Private:
    """A private request.

    Attributes:
        text: in the manner of those that the embedded pair was trained on.
        secrets: what of it must not leave the machine; invented, as all numbers with 555-01 and all of the
            pattern 1xx 0000 xxxx are.

    """

    text: str
    secrets: tuple[str, str]


PRIVATE = {
    "en": Private(
        "Write a polite reply to this message:\nHello, this is Clara Brook. I have lost my umbrella, please"
        " call me if you find it. My phone number is 415-555-0162.",
        ("Clara Brook", "415-555-0162"),
    ),
    "zh": Private(
        "请给这条消息写一个有礼貌的回复：\n您好，我是王芳。我的雨伞丢了，如果您找到了，请给我打电话。"
        "我的电话是13800000162。",
        ("王芳", "13800000162"),
    ),
}
"""By language."""

_MAX_TOKENS = 96
_HARD = 3  # the tier of what the pair has no answer to


def show_triage(remote: Remote, small: sllm.Model, n_threads: int, out: Output, language: str) -> bool:
    """Ask the requests with ``remote`` as the cloud, and write who answered them and what was sent.

    Args:
        remote: a worker.
        small: the embedded target, which grades, and which answers what stays here.
        n_threads: CPU threads of each context.
        out: where to write.
        language: of :data:`PRIVATE`.

    Returns:
        Whether nothing private was sent.

    """
    out.paragraph(
        "Who answers: the target here grades every request, and the worker, with the same weights, is the"
        " cloud. The requests are of the small world that it was trained on; to the hard ones it has no"
        " answer, there as here."
    )
    private = PRIVATE[language]
    tapped = _TappedTarget(remote)
    with ExitStack() as stack:
        scorer = stack.enter_context(ContextScorer(small, n_threads=n_threads))
        # The pair is too small to judge privacy: the detectors decide alone.
        triage = Triage(scorer, Policy(ask_privacy=False), Profile.load(embedded.TARGET_PROFILE))
        hybrid = stack.enter_context(
            Hybrid(
                small,
                cloud=tapped,
                triage=triage,
                privacy="deidentify",
                max_tokens=_MAX_TOKENS,
                n_threads=n_threads,
            )
        )
        asked = [_ask(hybrid, tapped, text) for text in (*REQUESTS, private.text)]
    rows = [("tier", "route", "cloud tokens", "request")]
    for one in asked:
        rows.append((str(one.tier), one.route, str(one.cloud_tokens), one_line(one.request)))
        shown = one_line(one.answer) if one.tier < _HARD else "(not shown: nothing of use)"
        rows.append(("", "", "", f"-> {shown}"))
    for line in table(rows, right=(0, 2), columns=out.columns):
        out.line(line)
    out.line()
    for first, text in _private_lines(asked[-1]):
        out.paragraph(text, first)
    sent = [text for one in asked for text in one.sent]
    n_leaks = sum(any(_holds(text, value) for value in private.secrets) for text in sent)
    if n_leaks:
        out.note(f"sllm: private values are in {n_leaks} of {count(len(sent), 'text')} for the worker")
        return False
    texts = count(len(sent), "text")
    out.paragraph(
        f"Of {texts} that the connection was handed for the worker, none holds the name or the number."
    )
    return True


@dataclass(frozen=True)
class _Asked:
    """A request, what became of it, and what crossed the link for it."""

    request: str
    tier: int
    route: str
    cloud_tokens: int
    answer: str
    reasons: tuple[str, ...]
    n_restored: int
    sent: tuple[str, ...]
    received: str
    n_kept: int  # of an answer from here that was verified, the tokens that stood
    n_checked: int


def _ask(hybrid: Hybrid, tapped: _TappedTarget, request: str) -> _Asked:
    tapped.sent.clear()
    tapped.received.clear()
    hybrid.new_conversation()
    with hybrid.ask([{"role": "user", "content": request}]) as answer:
        text = answer.text()
    stats = answer.stats
    return _Asked(
        request,
        int(answer.grade.tier),  # where the small model was not sure of its answer, the tier after that
        " > ".join(answer.route),
        stats.cloud_in + stats.cloud_out,
        text,
        tuple(answer.reasons),
        stats.n_restored,
        tuple(tapped.sent),
        tapped.vocab.decode(tapped.received, goes_on=True),
        stats.n_kept,
        stats.n_checked,
    )


def _private_lines(one: _Asked) -> list[tuple[str, str]]:
    """One request as it was asked, sent, answered and shown; each with what stands before it."""
    lines = [("asked here:  ", one_line(one.request))]
    if not one.sent:
        return [*lines, ("", f"nothing of it was sent: {one_line('; '.join(one.reasons))}")]
    lines.append(("sent:        ", one_line(one.sent[0])))
    if one.n_checked:
        verdict = f"{one.n_kept} of the {one.n_checked} tokens of the answer from here stand"
        lines.append(("verdict:     ", verdict))
    if one.received:
        lines.append(("came back:   ", one_line(one.received)))
    lines.append(("shown here:  ", one_line(one.answer)))
    if not one.n_restored:
        return [*lines, ("", "The answer holds no placeholder that was sent, so none was put back.")]
    return [*lines, ("", f"{count(one.n_restored, 'placeholder')} put back.")]


def _holds(text: str, value: str) -> bool:
    """Whether a text holds a value as it is, or its digits whatever stands between them."""
    digits = re.sub("[^0-9]", "", value)
    return value in text or (digits != "" and digits in re.sub("[^0-9]", "", text))


# ---- what is sent


class _TappedTarget(RemoteTarget):
    """A worker; all that is sent to it is recorded."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote)
        self.sent: list[str] = []
        self.received: list[int] = []

    def record(self, tokens: Iterable[int]) -> None:
        """Record tokens that are about to be sent, as text."""
        self.sent.append(self.vocab.decode(np.array(list(tokens), dtype=np.int32), special=True))

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> RemoteGeneration:
        """See :meth:`RemoteTarget.open`."""
        self.record(tokens.tolist())
        return _TappedGeneration(self, self.checked_prompt(tokens), sampling, max_tokens)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """See :meth:`RemoteTarget.score`."""
        self.record(tokens.tolist())
        return super().score(tokens, start)


class _TappedGeneration(RemoteGeneration):
    """A text of a tapped target."""

    def __init__(
        self,
        target: _TappedTarget,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._tapped = target
        super().__init__(target, prompt, sampling, max_tokens)

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See :meth:`RemoteGeneration.hint`."""
        self._tapped.record(tokens)
        super().hint(pos, tokens, parents)

    def poll(self, timeout: float | None = 0.0) -> Commit | None:
        """See :meth:`RemoteGeneration.poll`."""
        commit = super().poll(timeout)
        if commit is not None:
            self._tapped.received.extend(commit.tokens)
        return commit

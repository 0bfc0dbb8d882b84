"""The second half of ``sllm demo``: who answers a request, and what of it leaves the machine.

Nothing is staged: the embedded target grades with the profile that comes with it, the worker of the demo is
the cloud, and what is shown of the link is what was handed to the connection.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

import sllm
from sllm import embedded
from sllm.calibration import Profile
from sllm.console import count, one_line, table
from sllm.hybrid import Hybrid
from sllm.targets.remote import RemoteGeneration, RemoteTarget
from sllm.triage import ContextScorer, Policy, Triage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from sllm.console import Output
    from sllm.sampling import SamplingParams
    from sllm.targets.base import Commit, Scores
    from sllm.targets.connection import Remote
    from sllm.triage import Verify

__all__ = ["PRIVATE", "REQUESTS", "SECRET", "show_triage"]

REQUESTS: tuple[tuple[str, Verify], ...] = (
    ("What is the capital of Germany?", "uncertain"),
    ("德国的首都是哪里？", "uncertain"),
    ("What is 3 + 4?", "uncertain"),
    ("一个星期有几天？", "always"),
    ("Prove that the square root of 47 is irrational.", "uncertain"),
    ("证明根号47是无理数。", "uncertain"),
)
"""Requests, and whether the cloud verifies an answer of tier 2 always or by the profile. The profile of the
embedded target has no threshold for that, so every such answer is verified.
"""

SECRET = "13900001234"
"""Invented, as all numbers of the pattern 1xx 0000 xxxx are here."""

PRIVATE = f"这条消息里的电话是多少？\n合同纠纷已经仲裁。请打{SECRET}联系我。"
"""A private request of tier 3: which phone number is in this message?"""

_MAX_TOKENS = 48

_PLACEHOLDER = re.compile(r"\[[A-Z]+_[0-9]+_[a-z0-9]+\]")


def show_triage(remote: Remote, small: sllm.Model, n_threads: int, out: Output) -> bool:
    """Ask the requests with ``remote`` as the cloud, and write who answered them and what was sent.

    Args:
        remote: a worker.
        small: the embedded target, which grades, and which answers what stays here.
        n_threads: CPU threads of each context.
        out: where to write.

    Returns:
        Whether nothing private was sent.

    """
    out.line(
        "Who answers: the target here grades every request, and the worker, with the same weights, is the"
    )
    out.line("cloud. So small a model has no answer to the hard ones, there as here.")
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
        asked = [_ask(hybrid, tapped, text, verify) for text, verify in (*REQUESTS, (PRIVATE, "uncertain"))]
    rows = [("tier", "route", "cloud tokens", "request")]
    rows += [(str(one.tier), one.route, str(one.cloud_tokens), one_line(one.request)) for one in asked]
    for line in table(rows, right=(0, 2)):
        out.line(line)
    out.line()
    for line in _private_lines(asked[-1]):
        out.line(line)
    sent = [text for one in asked for text in one.sent]
    n_leaks = sum(_holds(text, SECRET) for text in sent)
    if n_leaks:
        out.note(f"sllm: the private number is in {n_leaks} of {count(len(sent), 'text')} for the worker")
        return False
    out.line(
        f"Of {count(len(sent), 'text')} that the connection was handed for the worker, none holds the number."
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


def _ask(hybrid: Hybrid, tapped: _TappedTarget, request: str, verify: Verify) -> _Asked:
    tapped.sent.clear()
    tapped.received.clear()
    hybrid.verify = verify
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
        tapped.vocab.decode(np.array(tapped.received, dtype=np.int32)),
    )


def _private_lines(one: _Asked) -> list[str]:
    """One request as it was asked, sent, answered and shown."""
    lines = [f"asked here:  {one_line(one.request)}"]
    if not one.sent:
        return [*lines, f"nothing of it was sent: {one_line('; '.join(one.reasons))}"]
    lines += [
        f"sent:        {one_line(one.sent[0])}",
        f"came back:   {one_line(one.received)}",
        f"shown here:  {one_line(one.answer)}",
    ]
    if not one.n_restored:
        return [*lines, "The answer holds no placeholder that was sent, so none was put back."]
    put_back = count(one.n_restored, "placeholder")
    lines.append(
        f"{put_back} put back. A grammar lets the worker write only those that it was sent: left to itself,"
    )
    lines.append("a model this small drops the end of one, and then there is nothing to put back.")
    return lines


def _holds(text: str, value: str) -> bool:
    """Whether a text holds a value as it is, or its digits whatever stands between them."""
    digits = re.sub("[^0-9]", "", value)
    return value in text or (digits != "" and digits in re.sub("[^0-9]", "", text))


# ---- what is sent


class _TappedTarget(RemoteTarget):
    """A worker that writes no placeholder but those that it was sent, and all that it is sent is noted."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote)
        self.sent: list[str] = []
        self.received: list[int] = []

    def note(self, tokens: Iterable[int]) -> str:
        """Note tokens that are about to be sent; returns them as text."""
        text = self.vocab.decode(np.array(list(tokens), dtype=np.int32), special=True)
        self.sent.append(text)
        return text

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> RemoteGeneration:
        """See :meth:`RemoteTarget.open`."""
        issued = sorted(set(_PLACEHOLDER.findall(self.note(tokens.tolist()))))
        if issued:
            sampling = replace(sampling, grammar=_grammar(issued))
            self.sent.append(sampling.grammar or "")
        return _TappedGeneration(self, self.checked_prompt(tokens), sampling, max_tokens)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """See :meth:`RemoteTarget.score`."""
        self.note(tokens.tolist())
        return super().score(tokens, start)


class _TappedGeneration(RemoteGeneration):
    """A text of it."""

    def __init__(
        self,
        target: _TappedTarget,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._tapped = target
        super().__init__(target, prompt, sampling, max_tokens)

    def hint(self, pos: int, tokens: Sequence[int]) -> None:
        """See :meth:`RemoteGeneration.hint`."""
        self._tapped.note(tokens)
        super().hint(pos, tokens)

    def poll(self, timeout: float | None = 0.0) -> Commit | None:
        """See :meth:`RemoteGeneration.poll`."""
        commit = super().poll(timeout)
        if commit is not None:
            self._tapped.received.extend(commit.tokens)
        return commit


def _grammar(issued: Sequence[str]) -> str:
    """Any text in which a bracket opens nothing but one of these placeholders.

    A model of five million weights cuts a placeholder down to the form that it was trained on, which has no
    nonce and which nobody puts a value in for.
    """
    options = " | ".join(f'"{one}"' for one in issued)
    return f"root ::= ([^\\[【<] | placeholder)*\nplaceholder ::= {options}\n"

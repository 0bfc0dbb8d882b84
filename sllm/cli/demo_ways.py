"""The ways over a link that ``sllm demo`` compares: each writes the same text, and is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.engine import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.cli.slow_link import Link
    from sllm.draft.growth import Shape
    from sllm.draft.tree import DraftedTree
    from sllm.generation.text_stream import Run
    from sllm.remote.connection import Remote

__all__ = [
    "DRAFT_SECONDS",
    "PASS_SECONDS",
    "PacedDrafter",
    "Stage",
    "WrittenText",
    "draft_then_wait",
    "pipelined",
    "written_alone",
]

PASS_SECONDS = 0.030
"""What a pass of a large model on a GPU takes."""

DRAFT_SECONDS = 0.010
"""What a token of a small model on a laptop takes."""

_WAIT_DRAFT = 8
"""Tokens that draft-then-wait drafts at a time."""


class PacedDrafter(ModelDrafter):
    """Takes its time for each token, as a larger model does."""

    seconds_per_token = 0.0

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`~sllm.draft.drafters.Drafter.draft`."""
        began = time.perf_counter()
        tokens = super().draft(text, chain, n_max, p_min)
        self._wait(began, len(tokens))
        return tokens

    def draft_tree(self, text: Sequence[int], shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        """See :meth:`~sllm.draft.drafters.TreeDrafter.draft_tree`: a pass takes as long as a token."""
        began = time.perf_counter()
        tree = super().draft_tree(text, shape, known)
        self._wait(began, tree.n_passes)
        return tree

    def _wait(self, began: float, n_passes: int) -> None:
        time.sleep(max(0.0, began + self.seconds_per_token * n_passes - time.perf_counter()))


@dataclass(frozen=True)
class WrittenText:
    """The demo's text by one of the ways, and what it took.

    Attributes:
        how: the name of the way.
        tokens: of the answer.
        n_passes: passes of the target.
        seconds: from the opening of the text to its last token.
        n_bytes: on the wire, both ways.
        finish_reason: as :attr:`sllm.GenerationStats.finish_reason` has it.

    """

    how: str
    tokens: tuple[int, ...]
    n_passes: int = 0
    seconds: float = 0.0
    n_bytes: int = 0
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second; 0 where no time was measured."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Stage:
    """What the ways share."""

    remote: Remote
    link: Link
    drafter: PacedDrafter
    prompt: npt.NDArray[np.int32]
    sampling: sllm.SamplingParams
    max_tokens: int


def pipelined(
    how: str,
    stage: Stage,
    *,
    draft: bool,
    run_ahead: bool = True,
    show: Callable[[Run], None] = lambda _run: None,
) -> WrittenText:
    """The text by generate()."""
    stage.link.reset_stats()
    tokens: list[int] = []
    with sllm.generate(
        stage.remote.target(run_ahead=run_ahead),
        stage.prompt,
        draft=stage.drafter if draft else None,
        sampling=stage.sampling,
        max_tokens=stage.max_tokens,
    ) as stream:
        for run in stream:
            tokens.extend(run.tokens)
            show(run)
        stats = stream.stats
        return WrittenText(
            how, tuple(tokens), stats.n_passes, stats.seconds, _carried(stage.link), stats.finish_reason
        )


def draft_then_wait(how: str, stage: Stage) -> WrittenText:
    """The text by what others do over a network: draft a few tokens, send them, wait for the verdict."""
    stage.link.reset_stats()
    text: list[int] = stage.prompt.tolist()
    n_prompt, n_passes, began, ended = len(text), 0, 0.0, 0.0
    generation = stage.remote.target(run_ahead=False).open(stage.prompt, stage.sampling, stage.max_tokens)
    try:
        stage.drafter.open(text, stage.sampling)
        while generation.finish_reason is None:
            chain = stage.drafter.draft(text, [], _WAIT_DRAFT, 0.0)
            generation.hint(len(text), chain)
            # Usually one pass: the worker may check a long hint in parts.
            waiting = True
            while waiting and generation.finish_reason is None:
                commit = next(generation)
                n_passes += 1
                n, ended = len(commit.tokens), time.perf_counter()
                began = began or generation.opened_at or ended
                text.extend(commit.tokens)
                waiting = len(chain) > n and tuple(chain[:n]) == commit.tokens
                del chain[:n]
    finally:
        generation.close()
    return WrittenText(how, tuple(text[n_prompt:]), n_passes, ended - began, _carried(stage.link))


def written_alone(model: sllm.Model, stage: Stage, n_threads: int) -> WrittenText:
    """The text of the target alone, on this machine, with nothing in between."""
    with sllm.LocalTarget(model, n_threads=n_threads, **exact.SETTINGS) as target:
        stream = sllm.generate(target, stage.prompt, sampling=stage.sampling, max_tokens=stage.max_tokens)
        return WrittenText("target alone", tuple(token for run in stream for token in run.tokens))


def _carried(link: Link) -> int:
    """Bytes on the wire, both ways, TLS and HTTP/2 included."""
    stats = link.stats
    return stats.bytes_up + stats.bytes_down

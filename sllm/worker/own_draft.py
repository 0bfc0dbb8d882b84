"""The worker's own draft, a small model beside the big one or the big one's own heads, for texts whose
clients send no usable hints.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm.errors import CancelledError, SllmError
from sllm.targets.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.mtp import Heads
    from sllm.worker.session import Session, TextSlot

__all__ = ["HeadsDraft", "Job", "OwnDraft"]

log = logging.getLogger("sllm.worker")


@dataclass(eq=False)
class Job:
    """One session's part of a pass.

    Attributes:
        slot, session: whose it is.
        hint: usable tokens of the newest hint, and ``hint_id``, its number.
        draft: the tokens that the pass verifies: the beginning of ``hint`` or of ``proposed``.
        proposed: what the worker's own draft says, with its probabilities ``probs``.

    """

    slot: TextSlot
    session: Session
    hint: TokenTree
    hint_id: int
    draft: TokenTree = field(default_factory=TokenTree)
    proposed: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)


class OwnDraft:
    """Drafts for the sessions of a scheduler (co-located speculation), on the scheduler's thread.

    What it cannot do for a text (a token or a logit bias that its vocabulary lacks, a text longer than its
    context), that text goes on without.

    Args:
        context: of the smaller model, with a sequence for each of the scheduler's slots.

    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def follow(self, slot: TextSlot, session: Session, chunk: npt.NDArray[np.int32]) -> None:
        """Compute a part of a prompt, int32 (n,), which the big model has just computed."""
        if not session.can_draft or slot.n_in_draft != session.n_computed:
            return
        try:
            self.context.decode([chunk], seq_id=[slot.seq_id], pos=[slot.n_in_draft])
            slot.n_in_draft += len(chunk)
        except CancelledError:
            raise
        except (SllmError, ValueError) as error:
            _give_up(session, error)

    def copy(self, source: TextSlot, target: TextSlot) -> None:
        """Give ``target`` the memory of ``source``."""
        target.n_in_draft = 0
        if source.n_in_draft > 0:
            self.context.memory.copy(source.seq_id, target.seq_id)
            target.n_in_draft = source.n_in_draft

    def forget(self, slot: TextSlot) -> None:
        """Free the memory of a sequence."""
        slot.n_in_draft = 0
        self.context.memory.clear(slot.seq_id)

    def propose(self, jobs: Sequence[Job]) -> tuple[list[Job], float]:
        """Draft where the client has sent nothing usable and drafting is likely to pay.

        Returns:
            The jobs that have ``proposed`` and ``draft`` now, and the seconds that it took.

        """
        # 1. Where, how many tokens, and down to which probability?
        wanted: list[tuple[Job, int, float]] = []
        for job in jobs:
            session = job.session
            room = min(session.end, self.context.n_ctx_seq) - len(session.text) - 1
            if session.can_draft and not job.hint and room > 0 and session.draft_length.begin():
                n_max, p_min = session.draft_length.more()
                wanted.append((job, min(n_max, room), p_min))
        if not wanted:
            return [], 0.0
        # 2. All together; where that fails, one by one: one text's trouble is not the others'.
        began = time.perf_counter()
        drafted: list[Job] = []
        try:
            drafted = self._draft(wanted)
        except CancelledError:
            raise
        except (SllmError, ValueError):
            for one in wanted:
                try:
                    drafted += self._draft([one])
                except CancelledError:  # noqa: PERF203
                    raise
                except (SllmError, ValueError) as error:
                    _give_up(one[0].session, error)
        # 3. What did it cost?
        seconds = time.perf_counter() - began
        for job in drafted:
            job.session.draft_length.observe_draft(max(len(job.proposed), 1), seconds)
        return drafted, seconds

    def _begins(self, job: Job) -> int:
        """From which position on a text has to be given to what drafts."""
        return job.slot.n_in_draft

    def _drafts(self, jobs: Sequence[Job], **arguments: Any) -> Draft:
        drafts = self.context.draft(**arguments)
        for job in jobs:
            job.slot.n_in_draft = len(job.session.text)
        return drafts

    def _draft(self, wanted: list[tuple[Job, int, float]]) -> list[Job]:
        jobs = [job for job, _, _ in wanted]
        drafts = self._drafts(
            jobs,
            seq_ids=[job.slot.seq_id for job in jobs],
            tokens=[job.session.text[self._begins(job) :] for job in jobs],
            n_max=[n_max for _, n_max, _ in wanted],
            p_min=[p_min for _, _, p_min in wanted],
            sampling=[job.session.sampling for job in jobs],
            pos=[self._begins(job) for job in jobs],
            start=[job.session.start for job in jobs],
        )
        for row, job in enumerate(jobs):
            job.proposed = drafts.tokens[row, : drafts.lengths[row]].tolist()
            job.probs = drafts.probs[row, : drafts.lengths[row]].tolist()
            job.draft = TokenTree.chain(job.proposed[: job.session.draft_length.keep(job.probs)])
        return jobs


class HeadsDraft(OwnDraft):
    """Drafts by the big model's own heads for multi-token prediction, which follow its memory by themselves.

    Args:
        heads: of the scheduler's context.

    """

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads.context)
        self._heads = heads

    def follow(self, slot: TextSlot, session: Session, chunk: npt.NDArray[np.int32]) -> None:
        """The heads have followed."""

    def copy(self, source: TextSlot, target: TextSlot) -> None:
        """The heads have copied what they hold with the context's memory."""

    def forget(self, slot: TextSlot) -> None:
        """The heads have forgotten it with the context's memory."""

    def _begins(self, job: Job) -> int:
        return len(job.session.text) - 1

    def _drafts(self, jobs: Sequence[Job], **arguments: Any) -> Draft:  # noqa: ARG002
        return self._heads.draft(**arguments)


def _give_up(session: Session, error: Exception) -> None:
    session.can_draft = False
    log.info("the worker cannot draft for a text (%s)", type(error).__name__)

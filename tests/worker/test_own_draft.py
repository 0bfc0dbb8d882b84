"""What a pass verifies where both sides have drafted: whichever is likelier to be right now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sllm.draft.length import DraftLength
from sllm.draft.streak import HintTrust
from sllm.targets.tree import TokenTree
from sllm.worker.own_draft import Job, OwnDraft
from sllm.worker.passes import Pace

PASS, DRAFT, ROW = 0.03, 0.003, 0.0005
N_VOCAB = 100


def learnt(*, acceptance: float, draft_seconds: float = DRAFT, tried: bool = True) -> DraftLength:
    """What a session knows of the worker's draft, which is right so often (in tenths)."""
    length = DraftLength(16)
    for n in (0, 1, 2, 4, 8, 16, 0):
        length.observe_pass(n, PASS + n * ROW)
        length.observe_pass(n, PASS + n * ROW)
    if tried:
        length.observe_draft(1, draft_seconds)
    for i in range(300):
        right = (i * 7) % 10 < round(10 * acceptance)
        length.observe_truth([1], [acceptance], [1 if right else 2])
    return length


def trusted(*, right: bool) -> HintTrust:
    trust = HintTrust()
    for _ in range(40):
        trust.observe_truth([1], [1 if right else 2])
    return trust


def job_of(n_hint: int, *, right: bool, length: DraftLength, token: int = 1) -> Job:
    session: Any = SimpleNamespace(hint_trust=trusted(right=right), draft_length=length)
    hint = TokenTree.chain([token] * n_hint)
    return Job(SimpleNamespace(), session, hint, 1, draft=hint, n_hinted=n_hint)  # type: ignore[arg-type]


@pytest.fixture
def own() -> OwnDraft:
    model = SimpleNamespace(vocab=SimpleNamespace(n_tokens=N_VOCAB))
    return OwnDraft(SimpleNamespace(model=model), Pace())  # type: ignore[arg-type]


def test_without_a_hint_the_worker_drafts(own: OwnDraft) -> None:
    job = job_of(0, right=True, length=learnt(acceptance=0.7))
    assert own._begin(job)
    assert job.n_hinted == 0


def test_a_long_hint_that_is_likely_is_taken_as_it_is(own: OwnDraft) -> None:
    job = job_of(16, right=True, length=learnt(acceptance=0.7))
    assert not own._begin(job)
    assert (job.draft, job.n_hinted) == (job.hint, 16)


def test_the_worker_goes_on_where_a_short_one_ends(own: OwnDraft) -> None:
    job = job_of(2, right=True, length=learnt(acceptance=0.9))
    assert own._begin(job)
    assert (job.draft, job.n_hinted) == (job.hint, 2)


def test_but_not_after_tokens_that_its_draft_does_not_have(own: OwnDraft) -> None:
    """Its own draft is right seldom enough for the hint alone to be better."""
    job = job_of(2, right=True, length=learnt(acceptance=0.3), token=N_VOCAB)
    assert not own._begin(job)
    assert job.draft == job.hint


def test_a_hint_that_is_likely_to_be_wrong_gives_way(own: OwnDraft) -> None:
    job = job_of(16, right=False, length=learnt(acceptance=0.8))
    assert own._begin(job)
    assert (job.draft, job.n_hinted) == (TokenTree(), 0)


def test_a_draft_that_is_dear_does_not_replace_a_hint_that_is_there(own: OwnDraft) -> None:
    job = job_of(4, right=True, length=learnt(acceptance=0.9, draft_seconds=PASS))
    assert not own._begin(job)
    assert job.draft == job.hint


@pytest.mark.parametrize(("n_hint", "drafts"), [(1, True), (8, False)])
def test_of_what_was_never_tried_nothing_is_expected(own: OwnDraft, n_hint: int, drafts: bool) -> None:
    """But it may go on after a short hint."""
    job = job_of(n_hint, right=True, length=learnt(acceptance=0.9, tried=False))
    assert own._begin(job) == drafts
    assert (job.draft, job.n_hinted) == (job.hint, n_hint)


class Drafting:
    """A context that drafts what it is told."""

    n_ctx_seq = 1000
    model = SimpleNamespace(vocab=SimpleNamespace(n_tokens=N_VOCAB))

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def draft(self, seq_ids: list[int], tokens: Any, **_options: Any) -> Any:
        n = len(self._tokens)
        rows = np.array([self._tokens] * len(seq_ids), dtype=np.int32)
        return SimpleNamespace(tokens=rows, lengths=np.array([n]), probs=np.full((1, n), 0.95))


@pytest.mark.parametrize(
    ("proposed", "n_hinted"),
    [([1, 1, 1], 16), ([1, 1, 2], 0), ([2, 1, 1], 0)],
    ids=["same", "other", "wrong"],
)
def test_a_doubted_hint_that_the_draft_agrees_with_is_taken_after_all(
    proposed: list[int], n_hinted: int
) -> None:
    """It says more than the draft has had the time for."""
    job = job_of(16, right=False, length=learnt(acceptance=0.9))
    job.session.text, job.session.start, job.session.sampling = [5, 6], 0, None  # type: ignore[assignment]
    job.session.end, job.session.can_draft = 500, True
    job.slot.seq_id, job.slot.n_in_draft = 0, 1
    own = OwnDraft(Drafting(proposed), Pace())  # type: ignore[arg-type]
    drafted, _ = own.propose([job])
    assert drafted == [job]
    assert job.proposed == proposed
    assert (job.n_hinted, job.own_from) == (n_hinted, 0)
    assert job.draft == (job.hint if n_hinted else TokenTree.chain(proposed))


def test_a_draft_reads_a_long_text_before_it_drafts() -> None:
    """In parts, so that nobody waits long, and not what it will read along anyway."""
    read: list[tuple[int, int]] = []

    class Reading(Drafting):
        def decode(self, tokens: list[Any], *, seq_id: list[int], pos: list[int]) -> None:
            read.append((pos[0], len(tokens[0])))

    job = job_of(0, right=True, length=learnt(acceptance=0.9))
    job.session.text, job.session.start, job.session.sampling = [5] * 700, 0, None  # type: ignore[assignment]
    job.session.end, job.session.can_draft = 900, True
    job.slot.seq_id, job.slot.n_in_draft = 0, 100
    own = OwnDraft(Reading([1, 1]), Pace())  # type: ignore[arg-type]
    for _ in range(2):
        assert own.propose([job]) == ([], 0.0)
    drafted, _ = own.propose([job])
    assert drafted == [job]
    assert read == [(100, 256), (356, 256), (612, 55)]

"""What a pass verifies where both sides have drafted: whichever is likelier to be right now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sllm.draft.confidence import Confidence
from sllm.draft.length import PassTimes
from sllm.draft.streak import HintTrust
from sllm.targets.tree import TokenTree
from sllm.worker.branches import Branches
from sllm.worker.draft_budget import Chance
from sllm.worker.own_draft import Job, OwnDraft
from sllm.worker.passes import Pace

PASS, DRAFT, ROW = 0.03, 0.003, 0.0005
N_VOCAB = 100


def trusted(*, right: bool) -> HintTrust:
    trust = HintTrust()
    for _ in range(40):
        trust.observe_truth([1], [1 if right else 2])
    return trust


def job_of(n_hint: int, *, right: bool, acceptance: float = 0.8, token: int = 1) -> Job:
    """Of a text whose hints are right or wrong, and to which what the worker drafts is right so often."""
    trust = trusted(right=right)
    session: Any = SimpleNamespace(
        text=[5, 6],
        start=0,
        end=500,
        sampling=None,
        can_draft=True,
        hint_trust=trust,
        branches=Branches(trust),
        own_trust=Confidence(acceptance),
        own_chances={1: Chance(acceptance)},
    )
    hint = TokenTree.chain([token] * n_hint)
    slot: Any = SimpleNamespace(seq_id=0, n_in_draft=1)
    return Job(slot, session, hint, 1, draft=hint)


class Drafting:
    """A context that drafts what it is told."""

    n_ctx_seq = 1000
    model = SimpleNamespace(vocab=SimpleNamespace(n_tokens=N_VOCAB))

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self.read: list[tuple[int, int]] = []

    def draft(self, seq_ids: list[int], tokens: Any, n_max: list[int], **_options: Any) -> Any:
        n = len(self._tokens)
        rows = np.array([self._tokens] * len(seq_ids), dtype=np.int32)
        lengths = np.minimum(n, n_max)
        return SimpleNamespace(tokens=rows, lengths=lengths, probs=np.full((len(seq_ids), n), 0.97))

    def decode(self, tokens: list[Any], *, seq_id: list[int], pos: list[int]) -> None:
        self.read.append((pos[0], len(tokens[0])))


def own(tokens: list[int], *, row: float = ROW, draft: float = DRAFT) -> OwnDraft:
    """A worker's draft that says these tokens; what passes take is known."""
    times = PassTimes()
    for n in (1, 2, 4, 8, 16, 32, 64):
        times.add(n, PASS + n * row)
        times.add(n, PASS + n * row)
    found = OwnDraft(Drafting(tokens), Pace(), times)  # type: ignore[arg-type]
    for n in (1, 4, 16):
        found._budget.observe(1, n, 1, n, draft)
        found._budget.observe(1, n, 1, n, draft)
    return found


def test_without_a_hint_the_worker_drafts() -> None:
    job = job_of(0, right=True)
    drafted, _ = own([1, 2, 3]).propose([job])
    assert drafted == [job]
    assert (job.draft, job.own, job.n_hinted) == (TokenTree.chain([1, 2, 3]), {0, 1, 2}, 0)


def test_a_long_hint_that_is_likely_is_taken_as_it_is() -> None:
    job = job_of(16, right=True)
    job.session.hint_trust = trusted(right=True)
    assert own([1] * 8, draft=PASS).propose([job]) == ([], 0.0)
    assert (job.draft, job.own) == (job.hint, set())


def test_the_worker_goes_on_where_a_short_one_ends() -> None:
    job = job_of(2, right=True, acceptance=0.9)
    own([7, 8, 9]).propose([job])
    assert job.n_hinted == 2
    assert job.draft == TokenTree.chain([1, 1, 7, 8, 9])
    assert job.own == {2, 3, 4}


def test_but_not_after_tokens_that_its_draft_does_not_have() -> None:
    job = job_of(2, right=True, acceptance=0.9, token=N_VOCAB)
    assert own([7, 8]).propose([job]) == ([], 0.0)
    assert job.draft == job.hint


def test_a_hint_that_is_not_worth_checking_gives_way() -> None:
    job = job_of(16, right=False)
    job.draft = TokenTree()  # what the scheduler makes of it
    own([2, 2]).propose([job])
    assert job.draft == TokenTree.chain([2, 2])
    job = job_of(16, right=True, acceptance=0.3)  # likelier than what would be drafted
    job.draft = TokenTree()
    assert own([2, 2]).propose([job]) == ([], 0.0)


def test_a_draft_that_is_dear_is_not_made() -> None:
    for n_hint in (0, 2):
        job = job_of(n_hint, right=True)
        assert own([1, 1], draft=4 * PASS).propose([job]) == ([], 0.0)
        assert job.draft == job.hint


@pytest.mark.parametrize(
    ("proposed", "taken"),
    [([1, 1, 1], True), ([1, 1, 2], False), ([2, 1, 1], False)],
    ids=["same", "other", "wrong"],
)
def test_a_doubted_hint_that_the_draft_agrees_with_is_taken_after_all(
    proposed: list[int], taken: bool
) -> None:
    """It says more than the draft has had the time for."""
    job = job_of(16, right=False, acceptance=0.9)
    job.draft = TokenTree()
    drafted, _ = own(proposed).propose([job])
    assert drafted == [job]
    assert job.proposed == proposed
    assert job.n_hinted == 0
    assert job.draft == (job.hint if taken else TokenTree.chain(proposed))
    assert job.own == (set() if taken else {0, 1, 2})


def test_what_is_learnt_of_a_text_is_kept_for_the_next() -> None:
    draft = own([1, 2, 3])
    first = job_of(0, right=True)
    for truth in ([1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 3, 5]) * 5:
        first.draft, first.own = TokenTree(), set()
        draft.propose([first])
        draft.learn(first, truth[: 1 + len(first.draft)])
    second = job_of(0, right=True)
    second.session.own_chances.clear()
    draft.propose([second])
    assert second.session.own_chances[1].value == pytest.approx(draft._budget.usual[1].value)
    assert draft._budget.usual[1].value > 0.7
    for _ in range(15):
        first.draft, first.own = TokenTree(), set()
        draft.propose([first])
        draft.learn(first, [9])
    assert first.session.own_chances[1].value < 0.5


def test_a_draft_reads_a_long_text_before_it_drafts() -> None:
    """In parts, so that nobody waits long, and not what it will read along anyway."""
    job = job_of(0, right=True)
    job.session.text = [5] * 700
    job.session.end = 900
    job.slot.n_in_draft = 100
    draft = own([1, 1])
    for _ in range(2):
        assert draft.propose([job]) == ([], 0.0)
    drafted, _ = draft.propose([job])
    assert drafted == [job]
    assert draft.context.read == [(100, 256), (356, 256), (612, 55)]  # type: ignore[attr-defined]


def test_of_a_text_for_which_nothing_is_drafted_nothing_is_read() -> None:
    job = job_of(0, right=True)
    job.session.text = [5] * 700
    job.session.end = 900
    draft = own([1, 1], draft=4 * PASS)
    assert draft.propose([job]) == ([], 0.0)
    assert not draft.context.read  # type: ignore[attr-defined]

"""Trees of the worker's own draft, alone and beside what a client hints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples
from trees import random_tree

from sllm.draft.streak import HintTrust
from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree
from sllm.worker.branches import Branches
from sllm.worker.own_draft import Job
from sllm.worker.passes import Pace
from sllm.worker.tree_draft import TreeDraft
from sllm.worker.tree_plan import TreePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

PASS, DRAFT = 0.03, 0.003
N_VOCAB = 100


def plan(
    *, n_accepted: int = 3, row: float = 0.0002, draft: float = 4 * DRAFT, tried: bool = True
) -> TreePlan:
    """What a session knows whose own trees bring so many tokens, at these costs."""
    found = TreePlan(32)
    for n in (0, 1, 4, 16, 32, 0):
        found.growth.observe_pass(n, PASS + n * row)
        found.growth.observe_pass(n, PASS + n * row)
    if tried:
        for _ in range(8):
            found.observe_alone(n_accepted, 8, draft)
    return found


def job_of(hint: TokenTree, what: TreePlan, *, right: bool) -> Job:
    trust = HintTrust()
    for _ in range(40):
        trust.observe_truth([1], [1 if right else 2])
    session: Any = SimpleNamespace(hint_trust=trust, branches=Branches(trust), tree_plan=what)
    return Job(SimpleNamespace(), session, hint, 1, draft=hint)  # type: ignore[arg-type]


@pytest.fixture
def own() -> TreeDraft:
    model = SimpleNamespace(vocab=SimpleNamespace(n_tokens=N_VOCAB))
    return TreeDraft(SimpleNamespace(model=model), Pace())  # type: ignore[arg-type]


def chain(n: int, token: int = 1) -> TokenTree:
    return TokenTree.chain([token] * n)


def test_without_a_hint_the_worker_drafts_from_the_text_on(own: TreeDraft) -> None:
    job = job_of(TokenTree(), plan(), right=True)
    assert own._begin_beside(job)
    assert job.n_hinted == 0


def test_a_doubtful_hint_gets_branches_beside_it(own: TreeDraft) -> None:
    job = job_of(chain(4), plan(), right=False)
    assert own._begin_beside(job)
    assert (job.n_hinted, job.draft) == (0, chain(4))


def test_a_short_hint_that_is_likely_is_gone_on_with(own: TreeDraft) -> None:
    job = job_of(chain(2), plan(), right=True)
    assert own._begin_beside(job)
    assert job.n_hinted == 2
    # Of a tree the main path is.
    job = job_of(TokenTree((1, 2, 3, 4), (-1, -1, 0, 0)), plan(), right=True)
    assert own._begin_beside(job)
    assert job.n_hinted == 2


def test_what_was_never_tried_may_show_what_it_takes_after_a_short_hint(own: TreeDraft) -> None:
    job = job_of(chain(1), plan(tried=False), right=True)
    assert own._begin_beside(job)
    assert job.n_hinted == 1


@pytest.mark.parametrize(
    ("hint", "what", "right"),
    [
        (chain(16), plan(), True),  # long, and right
        (chain(2), plan(n_accepted=0), True),  # the draft is never right
        (chain(4), plan(draft=4 * PASS), False),  # it takes too long
        (chain(4), plan(n_accepted=1, row=PASS), False),  # rows do
        (chain(4), plan(tried=False), False),  # nothing is known of it
        (chain(2, N_VOCAB), plan(), True),  # its vocabulary lacks what it would have to read
    ],
)
def test_what_brings_less_than_it_costs_is_not_drafted(
    own: TreeDraft, hint: TokenTree, what: TreePlan, right: bool
) -> None:
    job = job_of(hint, what, right=right)
    assert not own._begin_beside(job)
    assert job.draft == hint


def paths(tree: TokenTree | DraftedTree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((token,) if parent < 0 else (*found[parent], token))
    return set(found)


@examples(100)
@given(seed=st.integers(0, 2**32 - 1), n_most=st.integers(0, 40), goes_on=st.booleans())
def test_hint_and_draft_are_branches_of_one_tree(seed: int, n_most: int, goes_on: bool) -> None:
    """Common beginnings are there once, and of each token it is known whose it is."""
    rng = np.random.default_rng(seed)
    truth: Sequence[int] = rng.integers(0, 4, 8).tolist()
    hint = TokenTree.of(*random_tree(rng, int(rng.integers(1, 14)), truth, 4))
    if not hint:
        return
    job = job_of(hint, plan(), right=bool(rng.random() < 0.5))
    job.n_most = n_most
    job.n_hinted = len(hint.main_path()) if goes_on else 0
    tokens, parents = random_tree(rng, int(rng.integers(0, 14)), truth[job.n_hinted :], 4)
    job.tree = DraftedTree(tuple(tokens), tuple(parents), tuple(rng.random(len(tokens)).tolist()), 3)
    kept = paths(job.session.tree_plan.growth.keep(job.tree))
    draft = TreeDraft(SimpleNamespace(), Pace())  # type: ignore[arg-type]
    draft._add(job)
    before = hint.main_path()[: job.n_hinted]
    both = paths(hint) | {(*before, *path) for path in kept}
    found = paths(job.draft)
    assert found <= both
    assert len(found) == len(job.draft) == min(len(both), n_most, 32)
    alone = {path for path in found if path not in paths(hint)}
    assert len(alone) == len(job.own)
    for place in job.own:
        way, at = [], place
        while at >= 0:
            way.append(job.draft.tokens[at])
            at = job.draft.parents[at]
        assert tuple(reversed(way)) in alone

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

from sllm.draft.growth import Shares, likeliest_first, n_worth_showing
from sllm.draft.streak import HintTrust
from sllm.draft.tree import DraftedTree
from sllm.targets.tree import TokenTree
from sllm.worker.branches import Branches
from sllm.worker.draft_budget import Part
from sllm.worker.own_draft import Job
from sllm.worker.passes import Pace
from sllm.worker.tree_draft import TreeDraft

if TYPE_CHECKING:
    from collections.abc import Sequence

N_VOCAB = 100


def job_of(hint: TokenTree, *, right: bool) -> Job:
    trust = HintTrust()
    for _ in range(40):
        trust.observe_truth([1], [1 if right else 2])
    session: Any = SimpleNamespace(hint_trust=trust, branches=Branches(trust), own_shares=Shares())
    return Job(SimpleNamespace(), session, hint, 1, draft=hint)  # type: ignore[arg-type]


@pytest.fixture
def own() -> TreeDraft:
    model = SimpleNamespace(vocab=SimpleNamespace(n_tokens=N_VOCAB))
    return TreeDraft(SimpleNamespace(model=model), Pace())  # type: ignore[arg-type]


def chain(n: int, token: int = 1) -> TokenTree:
    return TokenTree.chain([token] * n)


def test_without_a_hint_the_worker_drafts_from_the_text_on(own: TreeDraft) -> None:
    job = job_of(TokenTree(), right=True)
    assert own._place(job) == 1.0
    assert job.n_hinted == 0


def test_a_doubtful_hint_gets_branches_beside_it(own: TreeDraft) -> None:
    job = job_of(chain(4), right=False)
    assert own._place(job) > 0.5
    assert (job.n_hinted, job.draft) == (0, chain(4))


def test_a_hint_that_is_likely_is_gone_on_with(own: TreeDraft) -> None:
    job = job_of(chain(2), right=True)
    short = own._place(job)
    assert job.n_hinted == 2
    # Of a tree the main path is.
    job = job_of(TokenTree((1, 2, 3, 4), (-1, -1, 0, 0)), right=True)
    assert own._place(job) > 0.5
    assert job.n_hinted == 2
    # The longer it is, the less likely is it to hold to its end.
    job = job_of(chain(12), right=True)
    assert own._place(job) < short


def test_nothing_follows_what_the_drafts_vocabulary_lacks(own: TreeDraft) -> None:
    job = job_of(chain(2, N_VOCAB), right=True)
    assert own._place(job) < 0.2
    assert job.n_hinted == 0


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
    job = job_of(hint, right=bool(rng.random() < 0.5))
    job.n_most = n_most
    job.n_hinted = len(hint.main_path()) if goes_on else 0
    tokens, parents = random_tree(rng, int(rng.integers(0, 14)), truth[job.n_hinted :], 4)
    job.tree = DraftedTree(tuple(tokens), tuple(parents), tuple(rng.random(len(tokens)).tolist()), 3)
    job.part = Part(depth=3, row=float(rng.choice([0.0, 0.05, 0.3])))
    chances, main = job.session.own_shares.chances(job.tree)
    order = likeliest_first(chances)[:32]
    n = n_worth_showing([(chances[i], main[i]) for i in order], [job.part.row] * len(order))
    kept = paths(job.tree.take(order[:n]))
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

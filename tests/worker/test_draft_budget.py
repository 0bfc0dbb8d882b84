"""How far a worker drafts for several texts at once: as many tokens as are worth the time of all of them."""

from __future__ import annotations

import itertools
import threading
from math import log
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, examples

import sllm
from sllm.draft.length import PassTimes
from sllm.targets.base import Commit
from sllm.worker.draft_budget import Chance, DraftBudget, Text
from sllm.worker.own_draft import OwnDraft
from sllm.worker.passes import Limits
from sllm.worker.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.engine.model import Model

PASS, ROW, DRAFT, DRAFT_ROW = 0.03, 0.001, 0.003, 0.0001
MANY = 64


def text(right: float, *, weight: float = 1.0, room: int = 100, n_tokens: float = 1.0) -> Text:
    """A text of which what is drafted is right so often."""
    return Text(n_tokens, weight, {1: Chance(right)}, room)


def budget(row: float = ROW, draft: float = DRAFT) -> DraftBudget:
    """One that has seen what passes take, of any number of rows."""
    times = PassTimes()
    for n in (1, 4, 16, MANY, 4 * MANY):
        times.add(n, PASS + n * row)
        times.add(n, PASS + n * row)
    found = DraftBudget(times)
    for n in (1, 4, 16, MANY):
        found.observe(1, n, 1, n, draft + n * DRAFT_ROW)
        found.observe(1, n, 1, n, draft + n * DRAFT_ROW)
    return found


def worth(texts: list[Text], depths: tuple[int, ...], row: float = ROW, draft: float = DRAFT) -> float:
    """What drafting so deep is worth, by the definition."""
    total, n = 0.0, len(texts)
    for one, depth in zip(texts, depths, strict=True):
        gain = sum(one.weight * one.chance[1].value ** k for k in range(1, depth + 1))
        total += log((one.n_tokens + gain) / one.n_tokens)
    rows = sum(depths)
    drafting = sum(draft + sum(depth >= k for depth in depths) * DRAFT_ROW for k in range(1, max(depths) + 1))
    seconds = PASS + (n + rows) * row + drafting
    return total - n * log(seconds / (PASS + n * row))


@examples(60)
@given(
    rights=st.lists(st.floats(0.05, 0.97), min_size=1, max_size=3),
    row=st.sampled_from([0.0, 0.0005, 0.003, 0.02]),
    draft=st.sampled_from([0.0005, 0.003, 0.02]),
)
def test_nothing_else_is_worth_much_more(rights: list[float], row: float, draft: float) -> None:
    texts = [text(right) for right in rights]
    plan = budget(row, draft).plan(texts, len(texts))
    found = worth(texts, tuple(part.depth for part in plan.parts), row, draft)
    best = max(worth(texts, depths, row, draft) for depths in itertools.product(range(7), repeat=len(texts)))
    assert found >= best - 0.06 * len(texts)


def depths_of(n_texts: int, right: float = 0.85, **costs: float) -> list[int]:
    plan = budget(**costs).plan([text(right)] * n_texts, n_texts)
    return [part.depth for part in plan.parts]


def test_the_more_texts_the_less_is_drafted() -> None:
    deepest = [max(depths_of(n, 0.7)) for n in (2, 4, 8, 16, 32, MANY)]
    assert deepest == sorted(deepest, reverse=True)
    assert deepest[0] >= 3
    assert deepest[-1] == 0


def test_where_rows_cost_nothing_many_texts_draft_as_well() -> None:
    assert max(depths_of(MANY, 0.7, row=0.0)) >= 2


def test_nobody_drafts_alone_for_what_holds_up_many() -> None:
    one, others = text(0.95), [text(0.0)] * 30
    assert max(part.depth for part in budget().plan([one, *others[:1]], 2).parts) > 0
    assert max(part.depth for part in budget().plan([one, *others], 31).parts) == 0


def test_a_text_that_a_draft_is_seldom_right_about_takes_no_part() -> None:
    plan = budget().plan([text(0.9), text(0.9), text(0.1), text(0.9, weight=0.0), text(0.9, room=0)], 5)
    assert [part.depth > 0 for part in plan.parts] == [True, True, False, False, False]


def test_a_text_that_gets_more_pays_more_for_a_row() -> None:
    well, badly = budget().plan([text(0.95), text(0.6)], 2).parts
    assert well.depth > badly.depth > 0
    assert well.row > badly.row > 0
    assert well.least > badly.least > 0


def test_what_is_not_known_is_tried_with_one_token() -> None:
    times = PassTimes()
    new = DraftBudget(times)
    texts = [text(0.9)] * 4
    assert not any(part.depth for part in new.plan(texts, 4).parts)  # what no draft costs is not known
    times.add(4, PASS)
    assert [part.depth for part in new.plan(texts, 4).parts] == [1] * 4
    for seconds in (10 * PASS, DRAFT, DRAFT):  # the first one had to wait for something
        new.observe(1, 4, 1, 4, seconds)
        assert [part.depth for part in new.plan(texts, 4).parts] == [1] * 4  # nor what its rows take is
    times.add(8, PASS)
    assert min(part.depth for part in new.plan(texts, 4).parts) > 1


def test_what_was_given_up_is_tried_again_ever_less_often() -> None:
    dear = budget(draft=10 * PASS)
    texts = [text(0.9), text(0.95)]
    depths = [[part.depth for part in dear.plan(texts, 2).parts] for _ in range(2000)]
    tries = [i for i, found in enumerate(depths) if any(found)]
    assert all(depths[i] == [0, 1] for i in tries)  # by the one that is likelier to be right
    gaps = [b - a for a, b in itertools.pairwise([-1, *tries])]
    assert gaps == [32, 64, 128, 256, 512, 512]
    for _ in range(9):
        dear.observe(1, 1, 1, 1, DRAFT)
        dear.observe(1, 2, 1, 2, DRAFT)
    assert min(part.depth for part in dear.plan(texts, 2).parts) > 1


def test_a_chance_fades_and_comes_back() -> None:
    chance = Chance(0.8)
    for _ in range(50):
        chance.observe(0, ended=True)
    low = chance.value
    assert low < 0.1
    for _ in range(400):
        chance.forget()
    assert 0.75 < chance.value <= 0.8
    chance.observe(6, ended=False)
    assert chance.value > 0.8


# ---- in a worker


@pytest.fixture
def crowd(
    target_model: Model, draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Scheduler, Any]]:
    """A worker by whose clock passes take what they should, and a function that has it tell so many texts at
    once and returns how many of its own tokens a pass had for each text.
    """
    monkeypatch.setattr(Scheduler, "_pass_time", lambda _, _began, n_rows: PASS + n_rows * ROW)
    monkeypatch.setattr(
        OwnDraft, "_draft_time", lambda _, _began, n_passes, n_rows: n_passes * (DRAFT + n_rows * DRAFT_ROW)
    )
    n_most = 40
    options: dict[str, Any] = {"n_ctx": 64 * n_most, "n_seq_max": n_most, **EXACT}
    with target_model.context(**options) as context, draft_model.context(**options) as draft:
        scheduler = Scheduler(context, Limits(sessions=n_most), draft=draft)
        # What is compared is what its clock says, not what this machine has made of it.
        monkeypatch.setattr(type(scheduler._payoff), "drafting", True)
        prompt = target_model.vocab.encode("Once upon a time, there was a little fox.")

        def tell(n_texts: int, n_tokens: int = 24) -> tuple[float, list[int]]:
            passes, before = 0, scheduler.stats.own_drafted
            sessions = [
                scheduler.submit(
                    prompt,
                    len(prompt),
                    sllm.SamplingParams(temperature=0.8, seed=i, logit_bias=ends(target_model)),
                    n_tokens,
                    run_ahead=True,
                )
                for i in range(n_texts)
            ]
            found: list[list[int]] = [[] for _ in sessions]

            def read(i: int) -> None:
                nonlocal passes
                for event in sessions[i].events():
                    if isinstance(event, Commit):
                        passes += 1
                        found[i] += event.tokens

            threads = [threading.Thread(target=read, args=(i,)) for i in range(n_texts)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [len(one) for one in found] == [n_tokens] * n_texts
            return (scheduler.stats.own_drafted - before) / passes, found[0]

        try:
            yield scheduler, tell
        finally:
            scheduler.close()


def ends(model: Model) -> list[tuple[int, float]]:
    """A bias under which no text ends of its own accord."""
    return [(token, -100.0) for token in range(model.vocab.n_tokens) if model.vocab.is_eog(token)]


def test_a_full_worker_drafts_less_and_an_empty_one_again(crowd: tuple[Scheduler, Any]) -> None:
    _, tell = crowd
    tell(2)  # learns what things cost
    few, alone = tell(3)
    many, among_many = tell(40)
    again, afterwards = tell(3)
    assert many < 0.35 * few
    assert again > 0.7 * few
    assert alone == among_many == afterwards

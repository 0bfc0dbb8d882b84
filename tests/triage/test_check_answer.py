"""Scoring a text that is there already, and letting a target say how far an answer stands."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, GREEDY, PLAIN, examples, fresh_logits, log_softmax, make_prompt, one_by_one
from remote_worker import FakeWorker, WorkerProcess

import sllm
from sllm import embedded
from sllm.draft.drafters import AnswerDrafter
from sllm.targets.base import Scorer, Scores
from sllm.triage.check_answer import Acceptance, check_answer
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote

N_CTX = 512


@pytest.fixture(scope="module")
def worker(target_model: Model) -> Iterator[Worker]:
    with Worker(
        target_model, insecure=True, n_ctx=N_CTX, limits=Limits(sessions=3, prefill=32), **EXACT
    ) as made:
        yield made


@pytest.fixture
def remote(worker: Worker) -> Iterator[Remote]:
    with sllm.connect(worker.uri) as connection:
        yield connection


def expected_scores(model: Model, text: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    rows = fresh_logits(model, text)[start - 1 : -1]
    chosen = rows[np.arange(len(rows)), text[start:]]
    logprobs = log_softmax(rows)[np.arange(len(rows)), text[start:]]
    return logprobs, (rows > chosen[:, None]).sum(axis=1)


def targets(model: Model, remote: Remote) -> Iterator[tuple[str, Any]]:
    with sllm.LocalTarget(model, n_ctx=N_CTX, **EXACT) as local:
        yield "local", local
    yield "remote", remote.target()
    with (
        Worker(embedded.TARGET, layers=True, insecure=True, n_ctx=N_CTX, **EXACT) as layers,
        sllm.connect(layers.uri) as middle,
        sllm.SplitTarget(
            embedded.TARGET, head=2, tail=1, middle=middle, codec="f32", n_ctx=N_CTX, **EXACT
        ) as split,
    ):
        yield "split", split


# ---- scores


@pytest.mark.parametrize(("n", "start"), [(2, 1), (40, 1), (40, 39), (90, 33), (400, 20)])
def test_scores_are_those_of_the_model(target_model: Model, remote: Remote, n: int, start: int) -> None:
    text = make_prompt(target_model, n, n)
    logprobs, ranks = expected_scores(target_model, text, start)
    for name, target in targets(target_model, remote):
        assert isinstance(target, Scorer), name
        for _ in range(2):  # the second time most of it is in memory
            found = target.score(text, start)
            np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4, err_msg=name)
            assert (found.ranks == ranks).all(), name
            assert found.logprobs.dtype == np.float32
            assert found.ranks.dtype == np.int32
        assert found.n_reused == start - 1, name


def test_what_was_scored_is_gone_on_from(target_model: Model, worker: Worker, remote: Remote) -> None:
    text = make_prompt(target_model, 200, 5)
    remote.score(text, 100)
    before = worker.stats.rows, worker.stats.reused_tokens
    target = remote.target()
    stream = sllm.generate(target, text[:150], sampling=GREEDY, max_tokens=8)
    found = [token for run in stream for token in run.tokens]
    assert found == one_by_one(target_model, text[:150], GREEDY, 8, N_CTX)
    assert stream.stats.remote is not None
    assert stream.stats.remote.n_reused == 149
    assert worker.stats.reused_tokens - before[1] >= 149


def test_texts_go_on_while_others_are_scored(target_model: Model, worker: Worker, remote: Remote) -> None:
    prompt = target_model.vocab.encode("Once upon a time")
    sampling = sllm.SamplingParams(seed=3)
    expected = one_by_one(target_model, prompt, sampling, 60, N_CTX)
    text = make_prompt(target_model, 300, 6)
    logprobs, _ = expected_scores(target_model, text, 1)
    found: list[Scores] = []
    thread = threading.Thread(target=lambda: found.extend(remote.score(text, 1) for _ in range(4)))
    thread.start()
    stream = sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=60)
    assert [token for run in stream for token in run.tokens] == expected
    thread.join()
    assert len(found) == 4
    for scores in found:
        np.testing.assert_allclose(scores.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "start", "kind"),
    [
        ([1, 2, 3], 0, ValueError),
        ([1, 2, 3], 3, ValueError),
        ([1], 1, ValueError),
        ([], 1, ValueError),
        ([1, -2, 3], 1, ValueError),
        ([1, 99999, 3], 1, ValueError),
        ([1, 2, 3], 1.5, TypeError),
        ([1] * 600, 5, sllm.ContextFullError),
    ],
)
def test_what_cannot_be_scored(
    target_model: Model, remote: Remote, tokens: list[int], start: Any, kind: type[Exception]
) -> None:
    for name, target in targets(target_model, remote):
        with pytest.raises(kind):
            target.score(np.array(tokens, dtype=np.int32), start)
        assert len(target.score(np.array([1, 2, 3], dtype=np.int32), 1).logprobs) == 2, name


def test_a_target_with_a_text_open_scores_nothing(target_model: Model) -> None:
    with sllm.LocalTarget(target_model, n_ctx=64) as target:
        generation = target.open(make_prompt(target_model, 3, 1), GREEDY, 4)
        with pytest.raises(sllm.BusyError):
            target.score(make_prompt(target_model, 5, 1), 2)
        generation.close()
        target.score(make_prompt(target_model, 5, 1), 2)


def test_a_worker_without_a_place(target_model: Model) -> None:
    limits = Limits(sessions=1, queue=0)
    with (
        Worker(target_model, insecure=True, n_ctx=64, limits=limits, pass_seconds=0.05) as worker,
        sllm.connect(worker.uri) as connection,
    ):
        vocab = target_model.vocab
        ends = {token: -math.inf for token in range(vocab.n_tokens) if vocab.is_eog(token)}
        endless = sllm.SamplingParams(temperature=0, logit_bias=ends)
        generation = connection.target().open(make_prompt(target_model, 3, 1), endless, None)
        next(generation)
        with pytest.raises(sllm.BusyError):
            connection.score(make_prompt(target_model, 5, 1), 2)
        generation.close()


def test_a_worker_that_does_not_score(target_model: Model) -> None:
    with (
        FakeWorker(target_model) as fake,
        sllm.connect(fake.uri) as connection,
        pytest.raises(sllm.UnsupportedModelError, match="does not score"),
    ):
        connection.score(make_prompt(target_model, 5, 1), 2)


def test_a_worker_that_dies(target_model: Model, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path) as process, sllm.connect(process.uri) as connection:
        text = make_prompt(target_model, 50, 1)
        connection.score(text, 2)
        process.kill()
        with pytest.raises(sllm.RemoteError):
            connection.score(text, 2)


# ---- answers


def answer_of(model: Model, prompt: np.ndarray, n: int) -> np.ndarray:
    return np.array(one_by_one(model, prompt, GREEDY, n, N_CTX), dtype=np.int32)


def test_the_targets_own_answer_stands(target_model: Model, remote: Remote) -> None:
    prompt = target_model.chat([{"role": "user", "content": "What comes after spring?"}])
    answer = answer_of(target_model, prompt, 30)
    for name, target in targets(target_model, remote):
        checked = check_answer(target, prompt, answer)
        assert checked.stands, name
        assert checked.n_kept == len(answer)
        assert (checked.scores.ranks == 0).all()


@examples(8)
@given(seed=st.integers(0, 1000))
def test_an_altered_answer_stands_up_to_there(target_model: Model, remote: Remote, seed: int) -> None:
    prompt = target_model.vocab.encode("Once upon a time there was a fox. One day")
    answer = answer_of(target_model, prompt, 30)
    rng = np.random.default_rng(seed)
    at = int(rng.integers(0, len(answer)))
    rows = fresh_logits(target_model, np.concatenate([prompt, answer[:at]]))[-1]
    altered = answer.copy()
    altered[at] = int(np.argsort(rows)[rng.integers(0, 2000)])  # one of the unlikeliest
    target = remote.target()
    checked = check_answer(target, prompt, altered)
    assert checked.n_kept == at
    # From there on it is the target's own text, and the rest of the answer comes in few passes.
    begin = np.concatenate([prompt, altered[:at]])
    drafter = AnswerDrafter(altered.tolist(), len(prompt))
    stream = sllm.generate(target, begin, draft=drafter, sampling=GREEDY, max_tokens=len(answer) - at)
    found = [token for run in stream for token in run.tokens]
    assert found == answer[at:].tolist()
    assert stream.stats.n_accepted <= len(found)


def test_the_rest_of_an_answer_saves_passes(target_model: Model) -> None:
    prompt = target_model.vocab.encode("Once upon a time there was a fox. One day")
    answer = answer_of(target_model, prompt, 40)
    altered = answer.copy()
    altered[5] = (altered[5] + 1) % target_model.vocab.n_tokens
    with sllm.LocalTarget(target_model, n_ctx=N_CTX, **EXACT) as target:
        drafter = AnswerDrafter(altered.tolist(), len(prompt))
        begin = np.concatenate([prompt, answer[:5]])
        stream = sllm.generate(target, begin, draft=drafter, sampling=GREEDY, max_tokens=35)
        assert [token for run in stream for token in run.tokens] == answer[5:].tolist()
        assert stream.stats.n_passes <= 8


def test_a_drafter_of_an_answer() -> None:
    drafter = AnswerDrafter([10, 11, 12, 13, 14, 15, 16], 3)
    drafter.open([1, 2, 3], GREEDY)
    assert drafter.draft([1, 2, 3], [], 4, 0.0) == [10, 11, 12, 13]
    assert drafter.draft([1, 2, 3, 10, 11], [], 3, 0.0) == [12, 13, 14]
    assert drafter.draft([1, 2, 3, 10], [11], 3, 0.0) == [12, 13, 14]
    assert drafter.draft([1, 2, 3, 10, 11, 99], [], 3, 0.0) == [13, 14, 15]  # one replaced
    assert drafter.draft([1, 2, 3, 10, 11, 98, 99], [], 3, 0.0) == [14, 15, 16]  # two
    assert drafter.draft([1, 2, 3, 10, 11, 13], [], 3, 0.0) == [14, 15, 16]  # one left out
    assert drafter.draft([1, 2, 3, 10, 11, 99, 12], [], 3, 0.0) == [13, 14, 15]  # one put in
    assert drafter.draft([1, 2, 3, 99], [], 3, 0.0) == [11, 12, 13]  # the first replaced
    assert drafter.draft([1, 2, 3, 10, 11], [99], 3, 0.0) == [13, 14, 15]
    assert drafter.draft([1, 2, 3, 10, 11, 95, 96, 97, 98, 99], [], 3, 0.0) == []  # it is another text
    assert drafter.draft([1, 2, 3, 10, 99, 11, 12], [], 3, 0.0) == [13, 14, 15]  # a token more than there was
    assert drafter.draft([1, 2, 3, 12, 13], [], 9, 0.0) == [14, 15, 16]  # and two fewer
    assert drafter.draft([1, 2, 3, 10, 11, 12, 13, 14, 15, 16], [], 3, 0.0) == []
    assert "7 tokens" in repr(drafter)
    for wrong in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="n_min is"):
            AnswerDrafter([1], wrong[0], n_min=wrong[1])


class TwoAgree(AnswerDrafter):
    """Goes on only where the last two tokens stand in the answer."""

    _STRAY = 0


def passes(drafter: AnswerDrafter, start: int, truth: list[int], n_max: int = 16) -> int:
    """Passes of a target that writes ``truth``, by the hint loop of :func:`sllm.generate`."""
    text, chain, n = [0] * start, list[int](), 0
    while len(text) - start < len(truth):
        if len(chain) < n_max:
            chain = chain + drafter.draft(text, chain, n_max - len(chain), 0.0)
        rest = truth[len(text) - start :]
        right = next((i for i, pair in enumerate(zip(chain, rest, strict=False)) if pair[0] != pair[1]), None)
        new = rest[: (min(len(chain), len(rest)) if right is None else right) + 1]
        text += new
        chain = chain[len(new) :] if chain[: len(new)] == new else []
        n += 1
    return n


def edited(rng: np.random.Generator, answer: list[int], kinds: str, rate: float) -> list[int]:
    """The answer with some tokens replaced, inserted or deleted, one to three at a time."""
    text: list[int] = []
    i = 0
    while i < len(answer):
        if rng.random() >= rate:
            text.append(answer[i])
            i += 1
            continue
        kind, n = kinds[int(rng.integers(len(kinds)))], int(rng.choice([1, 1, 1, 2, 3]))
        if kind in "ri":
            text += rng.integers(0, 2000, n).tolist()
        if kind in "rd":
            i += n
    return text


def test_passes_after_one_edit() -> None:
    answer = list(range(100, 164))
    whole = passes(AnswerDrafter(answer, 3), 3, answer)
    assert whole == 4  # 16 hinted tokens and one more each
    for truth in (
        [*answer[:20], 7, *answer[21:]],
        [*answer[:20], 7, 8, *answer[22:]],
        [*answer[:20], *answer[21:]],
        [*answer[:20], *answer[24:]],
        [*answer[:20], 7, *answer[20:]],
    ):
        ours, theirs = (passes(kind(answer, 3), 3, truth) for kind in (AnswerDrafter, TwoAgree))
        assert ours <= whole + 2
        assert ours < theirs


@pytest.mark.parametrize(
    ("kinds", "saved"), [("r", 0.2), ("i", 0.05), ("d", 0.05), ("rid", 0.1)], ids=["r", "i", "d", "all"]
)
def test_passes_after_many_edits(kinds: str, saved: float) -> None:
    rng = np.random.default_rng(5)
    for rate in (0.02, 0.08, 0.2):
        ours = theirs = 0
        for _ in range(40):
            # Few tokens are frequent, as in texts.
            answer = np.minimum(rng.zipf(1.3, 200), 1999).tolist()
            truth = edited(rng, answer, kinds, rate)
            ours += passes(AnswerDrafter(answer, 3), 3, truth)
            theirs += passes(TwoAgree(answer, 3), 3, truth)
        print(f"edits {kinds}, {rate:.0%} of the tokens: {ours} passes, {theirs} where two have to agree")
        assert ours < (1 - saved) * theirs
    other = rng.integers(2000, 4000, 200).tolist()
    assert passes(AnswerDrafter(answer, 3), 3, other) == len(other)


# ---- the threshold


def scores(logprobs: list[float], ranks: list[int]) -> Scores:
    return Scores(np.array(logprobs, dtype=np.float32), np.array(ranks, dtype=np.int32), 0, 0.0)


def test_what_stands() -> None:
    one = scores([-0.1, -3.0, -5.0, -0.2], [0, 2, 9, 0])
    assert Acceptance(-4.0).n_standing(one) == 2
    assert Acceptance(-2.0).n_standing(one) == 1
    assert Acceptance(-2.0, max_rank=3).n_standing(one) == 2
    assert Acceptance(-2.0, max_rank=10).n_standing(one) == 4
    assert Acceptance(-math.inf).n_standing(one) == 4
    assert Acceptance(0.0, max_rank=0).n_standing(one) == 0
    assert Acceptance(-math.inf).n_standing(scores([-1.0, math.nan], [0, 0])) == 1
    for wrong in (0.1, math.nan):
        with pytest.raises(ValueError, match="min_logprob"):
            Acceptance(wrong)
    with pytest.raises(ValueError, match="max_rank"):
        Acceptance(-1.0, -1)


def test_a_fitted_threshold_lets_right_answers_stand() -> None:
    rng = np.random.default_rng(0)
    answers = [
        scores((-rng.exponential(1.5, 20)).tolist(), rng.integers(0, 4, 20).tolist()) for _ in range(400)
    ]
    accept = Acceptance.fitted(answers[:200], keep=0.9)
    share = np.mean([accept.n_standing(one) == 20 for one in answers[200:]])
    assert 0.8 < share < 0.98
    assert Acceptance.fitted([scores([-1.0], [0])]).min_logprob == 0.0
    with pytest.raises(ValueError, match="at least one answer"):
        Acceptance.fitted([])
    with pytest.raises(ValueError, match="keep is 1"):
        Acceptance.fitted(answers, keep=1.0)


def test_there_has_to_be_something_to_check(target_model: Model) -> None:
    with sllm.LocalTarget(target_model, n_ctx=64) as target:
        for prompt, answer in (([], [1]), ([1], [])):
            with pytest.raises(ValueError, match="at least one token"):
                check_answer(target, prompt, answer)
    assert PLAIN.temperature == 1.0

"""A worker that drafts with its model's own heads: many texts at once, with hints and without."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EXACT, one_by_one
from random_models import HEADS, N_VOCAB

import sllm
from sllm.engine.mtp import Heads, has_mtp
from sllm.targets.base import Commit
from sllm.worker.passes import Limits
from sllm.worker.scheduler import Scheduler
from sllm.worker.session import Finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.worker.session import Session

N_CTX = 256
PASS_SECONDS = 0.01
"""A stand-in for a larger model, beside which what the heads take is little."""

pytestmark = pytest.mark.skipif(not has_mtp(), reason="this build cannot draft with MTP heads")


@pytest.fixture(scope="module", params=["glm4moe, head", "qwen35, head"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = random_models.make_agreeing(replace(HEADS[request.param], routers="q8_0"))
    return file.write(tmp_path_factory.mktemp("models") / "agreeing.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[sllm.Model]:
    with sllm.Model(path) as model:
        yield model


def sampling_of(model: sllm.Model, seed: int, **more: Any) -> sllm.SamplingParams:
    ends = [(token, -np.inf) for token in range(N_VOCAB) if model.vocab.is_eog(token)]
    return sllm.SamplingParams(temperature=1.0, seed=seed, logit_bias=ends, **more)


def read(session: Session, found: list[int], hints: list[int] | None = None) -> Finished:
    """Take a text's events; ``hints``: what is hinted after each of them, right to the text's end."""
    sent = 0
    for event in session.events():
        if isinstance(event, Finished):
            return event
        if isinstance(event, Commit):
            found += event.tokens
        if hints is not None:
            sent += 1
            session.hint(session.n_prompt + len(found), hints[len(found) : len(found) + 5], sent)
    raise AssertionError("no end has come")


def test_many_texts_at_once(model: sllm.Model) -> None:
    """More texts than places, of which every third has hints, and one a grammar."""
    rng = np.random.default_rng(2)
    shared = rng.integers(10, N_VOCAB, 70)
    prompts = [
        np.concatenate([shared[: 35 * (i % 3)], rng.integers(10, N_VOCAB, 1 + 9 * i)]).astype(np.int32)
        for i in range(7)
    ]
    samplings = [sampling_of(model, i) for i in range(6)] + [
        sampling_of(model, 6, grammar='root ::= ("a" | "th" | " ")*')
    ]
    wanted = [one_by_one(model, p, s, 30) for p, s in zip(prompts, samplings, strict=True)]
    limits = Limits(sessions=3, prefill=32)
    with model.context(n_ctx=3 * N_CTX, n_seq_max=3, n_batch=64, **EXACT) as context:
        scheduler = Scheduler(context, limits, draft=Heads(context), pass_seconds=PASS_SECONDS)
        try:
            texts: list[list[int]] = [[] for _ in prompts]
            threads = []
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                session = scheduler.submit(prompt, len(prompt), sampling, 30, run_ahead=True)
                hints = wanted[i] if i % 3 == 0 else None
                threads.append(threading.Thread(target=read, args=(session, texts[i], hints)))
                threads[-1].start()
            for thread in threads:
                thread.join()
        finally:
            scheduler.close()
        assert texts == wanted
        stats = scheduler.stats
        # How much is drafted, and so how far ahead, follows what passes took.
        assert stats.own_accepted > 0.15 * stats.own_drafted > 0
        assert stats.accepted - stats.own_accepted > 0  # clients' hints
        assert stats.drafted >= stats.own_drafted


def test_the_next_turn_finds_the_heads_where_the_text_is(model: sllm.Model) -> None:
    """A prompt that begins with a text that is still in memory, and one that shares half of it."""
    rng = np.random.default_rng(4)
    first = rng.integers(10, N_VOCAB, 60).astype(np.int32)
    with model.context(n_ctx=2 * N_CTX, n_seq_max=2, **EXACT) as context:
        scheduler = Scheduler(context, Limits(sessions=2), draft=Heads(context), pass_seconds=PASS_SECONDS)
        try:
            for prompt in (
                first,
                np.concatenate([first, first[:9]]),
                np.concatenate([first[:30], first[:7]]),
            ):
                for seed in (0, 1):
                    sampling = sampling_of(model, seed)
                    session = scheduler.submit(prompt, len(prompt), sampling, 24, run_ahead=True)
                    text: list[int] = []
                    read(session, text)
                    assert text == one_by_one(model, prompt, sampling, 24)
        finally:
            scheduler.close()
        assert scheduler.stats.reused_tokens > 0
        assert scheduler.stats.own_accepted > 0


def test_over_the_network(path: Path, model: sllm.Model, command: Callable[..., Any]) -> None:
    """By default where there is a head; the client and ``sllm status`` see whose drafts were accepted."""
    prompt = np.random.default_rng(5).integers(10, N_VOCAB, 40).astype(np.int32)
    sampling = sampling_of(model, 7)
    wanted = one_by_one(model, prompt, sampling, 40)
    options: dict[str, Any] = {"n_ctx": N_CTX, "insecure": True, "pass_seconds": PASS_SECONDS, **EXACT}
    with sllm.Worker(path, **options) as worker, sllm.connect(worker.uri) as remote:
        assert "worker-draft" in remote.info.features
        stream = sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=40)
        assert [token for run in stream for token in run.tokens] == wanted
        assert stream.stats.tokens_by_source["worker draft"] == worker.stats.own_accepted > 0
        assert worker.stats.passes == worker.stats.tokens - worker.stats.own_accepted  # each saves a pass
        shown = json.loads(command("status", "--json", worker.uri).stdout)
        assert shown["own_accepted"] == worker.stats.own_accepted
        lines = command("status", worker.uri).stdout
        assert f"{worker.stats.own_accepted} of {worker.stats.own_drafted} accepted" in lines
    with sllm.Worker(path, mtp=False, **options) as worker, sllm.connect(worker.uri) as remote:
        assert "worker-draft" not in remote.info.features
        stream = sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=40)
        assert [token for run in stream for token in run.tokens] == wanted
        assert stream.stats.n_accepted == worker.stats.own_drafted == 0
        assert "none: it has no draft" in command("status", worker.uri).stdout


def test_what_does_not_go_together_is_refused(path: Path, command: Callable[..., Any]) -> None:
    with pytest.raises(sllm.UnsupportedModelError, match="no MTP heads"):
        sllm.Worker(sllm.embedded.TARGET, mtp=True, insecure=True)
    with pytest.raises(ValueError, match="two drafts"):
        sllm.Worker(path, mtp=True, draft=path, insecure=True)
    with pytest.raises(ValueError, match="layers"):
        sllm.Worker(path, mtp=True, layers=(0, 2), insecure=True)
    for more in (["--draft", str(path)], ["--layers", "0:2"]):
        ended = command("worker", str(path), "--mtp", *more)
        assert ended.returncode != 0
        assert "leave one of them out" in ended.stderr
    ended = command("worker", "--mtp", "--listen", "127.0.0.1:0", "--insecure")
    assert ended.returncode != 0
    assert "no MTP heads" in ended.stderr


def test_heads_that_cannot_draft_do_not_keep_a_worker_from_serving(tmp_path: Path) -> None:
    shape = replace(HEADS["glm4moe, head"], n_heads=2)
    path = random_models.write(tmp_path / "two.gguf", shape)
    with sllm.Worker(path, insecure=True, n_ctx=64) as worker, sllm.connect(worker.uri) as remote:
        assert "worker-draft" not in remote.info.features

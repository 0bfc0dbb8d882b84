"""Hybrid and recurrent models at both ends of a link: the text is the target's own,
whatever is taken back.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EXACT
from random_models import EVERY, N_VOCAB

import sllm
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N_CTX = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("models")


@pytest.fixture(
    scope="module", params=["gemma3", "qwen35", "qwen35, recompute", "lfm2", "granitehybrid", "mamba2"]
)
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A target, the draft, and how the worker's context computes."""
    name, _, recompute = request.param.partition(", ")
    shape = replace(EVERY[name], routers="q8_0")
    paths = [folder / f"{name}-{seed}.gguf" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        random_models.write(path, shape, seed=seed)
    return paths[0], paths[1], {"n_rollback": 0} if recompute else {}


def told(stream: Any) -> list[int]:
    return [token for run in stream for token in run.tokens]


def test_texts_over_a_link_are_the_targets_own(case: tuple[Path, Path, dict[str, Any]], folder: Path) -> None:
    """Three clients at once with drafts that are right, wrong and half right; one goes away in the middle and
    comes back; then each begins its text with most of another's."""
    path, other_path, options = case
    rng = random.Random(4)
    with sllm.Model(path) as model, sllm.Model(other_path) as stranger:
        ends = [(token, -np.inf) for token in range(N_VOCAB) if model.vocab.is_eog(token)]
        prompts = [[rng.randrange(10, N_VOCAB) for _ in range(n)] for n in (40, 25, 60)]
        prompts += [prompts[0][:30] + prompts[1], prompts[2][:55], prompts[1] + prompts[2][:20]]
        samplings = [
            sllm.SamplingParams(temperature=t, seed=s, logit_bias=ends)
            for s, t in enumerate([0, 1, 0.7, 0.8, 0, 1])
        ]
        with sllm.LocalTarget(model, n_ctx=N_CTX, **EXACT) as target:
            expected = [
                told(sllm.generate(target, prompt, sampling=sampling, max_tokens=40))
                for prompt, sampling in zip(prompts, samplings, strict=True)
            ]
        limits = Limits(sessions=3, prefill=16)
        with (
            Worker(
                path, state=folder, n_ctx=N_CTX, limits=limits, pass_seconds=0.004, **EXACT, **options
            ) as worker,
            sllm.connect(worker.uri) as remote,
        ):

            def text(i: int) -> list[int]:
                drafts: list[Any] = [
                    model,
                    stranger,
                    "ngram",
                    lambda text, _n: (prompts[i] + expected[i])[len(text) :],
                ]
                draft = drafts[i % 4]
                if i == 2:
                    with sllm.generate(
                        remote.target(), prompts[i], draft=draft, sampling=samplings[i], max_tokens=40
                    ) as left:
                        next(left)
                return told(
                    sllm.generate(
                        remote.target(), prompts[i], draft=draft, sampling=samplings[i], max_tokens=40
                    )
                )

            with ThreadPoolExecutor(3) as clients:
                assert list(clients.map(text, range(6))) == expected
            assert worker.stats.accepted > 0


def test_a_worker_drafts_for_itself(case: tuple[Path, Path, dict[str, Any]], folder: Path) -> None:
    path, _, options = case
    prompt = list(range(20, 60))
    with sllm.Model(path) as model:
        ends = [(token, -np.inf) for token in range(N_VOCAB) if model.vocab.is_eog(token)]
        sampling = sllm.SamplingParams(temperature=1, seed=8, logit_bias=ends)
        with sllm.LocalTarget(model, n_ctx=N_CTX, **EXACT) as target:
            expected = told(sllm.generate(target, prompt, sampling=sampling, max_tokens=60))
        limits = Limits(sessions=2)
        with (
            Worker(
                path,
                draft=path,
                state=folder,
                n_ctx=N_CTX,
                limits=limits,
                pass_seconds=0.02,
                **EXACT,
                **options,
            ) as worker,
            sllm.connect(worker.uri) as remote,
        ):
            for _ in range(2):
                stream = sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=60)
                assert told(stream) == expected
            assert worker.stats.accepted > 30  # the draft is the target itself

"""Another engine's noise crosses the wire, and goes to no worker that would pass over it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from oracles import EXACT, PLAIN, one_by_one
from raw_client import TOKEN, Client, Code, opening

import sllm
from sllm import embedded
from sllm.wire import protocol
from sllm.wire.protocol import pb
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SAMPLINGS = [replace(PLAIN, noise=noise, seed=6, top_k=40, temperature=0.8) for noise in ("vllm", "sglang")]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    state: Path = tmp_path_factory.mktemp("state")
    with Worker(embedded.TARGET, state=state, n_ctx=256, token=TOKEN, **EXACT) as worker:
        yield worker


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda sampling: sampling.noise)
def test_a_remote_text_is_the_local_one(
    worker: Worker,
    target_model: sllm.Model,
    draft_model: sllm.Model,
    sampling: sllm.SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = draft_model.vocab.encode("Once upon a time")
    wanted = one_by_one(target_model, prompt, sampling, 40, n_ctx=256)
    assert wanted != one_by_one(target_model, prompt, replace(sampling, noise="sllm"), 40, n_ctx=256)
    with sllm.connect(worker.uri) as remote:
        stream = sllm.generate(remote.target(), prompt, draft=draft_model, sampling=sampling, max_tokens=40)
        assert [token for run in stream for token in run.tokens] == wanted
        # A worker of an earlier version would select with its own noise.
        link = remote.target().remote.link
        feature = f"noise-{sampling.noise}"
        older = tuple(name for name in link.info.features if name != feature)
        assert len(older) < len(link.info.features)
        monkeypatch.setattr(link, "info", replace(link.info, features=older))
        with pytest.raises(sllm.UnsupportedModelError, match=feature):
            sllm.generate(remote.target(), prompt, sampling=sampling, max_tokens=3)


def test_it_crosses_as_it_is() -> None:
    for sampling in SAMPLINGS:
        message = pb.Sampling.FromString(protocol.to_sampling(sampling).SerializeToString())
        assert protocol.from_sampling(message) == replace(sampling, temperature=message.temperature)
    assert protocol.to_sampling(PLAIN).noise == ""


def test_one_that_is_not_known_is_refused(worker: Worker) -> None:
    with Client(worker.address) as client:
        message = opening(sampling=PLAIN)
        message.open.sampling.noise = "tensorrt"
        code, details = client.generate(message).end()
        assert code is Code.INVALID_ARGUMENT
        assert "'tensorrt'" in details

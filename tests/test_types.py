"""What type checkers see of the package: this file is one of those that mypy reads, strictly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from oracles import EXACT
from typing_extensions import assert_type

import sllm
from sllm import embedded
from sllm.generation.text_stream import GenerationStats, Run, TextStream
from sllm.remote.connection import Remote, WorkerInfo, WorkerState
from sllm.targets.base import RemoteStats


def tell(target: sllm.Target, draft: sllm.Model) -> TextStream:
    return sllm.generate(target, "Once", draft=draft, max_tokens=4)


def test_what_is_called_has_the_types_of_the_reference(draft_model: sllm.Model) -> None:
    with (
        sllm.Worker(embedded.TARGET, insecure=True, n_ctx=64, **EXACT) as worker,
        sllm.connect(worker.uri) as remote,
    ):
        assert isinstance(assert_type(remote, Remote), Remote)
        assert isinstance(assert_type(remote.info, WorkerInfo), WorkerInfo)
        assert isinstance(assert_type(remote.workers, list[WorkerState])[0], WorkerState)
        target = assert_type(remote.target(), sllm.RemoteTarget)
        stream = assert_type(sllm.generate(target, "Once", max_tokens=4), TextStream)
        assert isinstance(stream, TextStream)
        assert all(isinstance(assert_type(run, Run), sllm.Run) for run in stream)
        stats = assert_type(stream.stats, GenerationStats)
        assert isinstance(assert_type(stats.remote, RemoteStats | None), RemoteStats)
        assert tell(target, draft_model).text()
    tokens = assert_type(draft_model.vocab.encode("Once"), npt.NDArray[np.int32])
    assert tokens.dtype == np.int32


def test_a_name_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(AttributeError):
        _ = sllm.conect  # type: ignore[attr-defined]

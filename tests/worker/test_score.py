"""A worker's scores: chunks, cancelled and killed calls, others at work beside, and replies that lie."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from oracles import EXACT, GREEDY, fresh_logits, log_softmax, make_prompt, one_by_one
from remote_worker import PATIENCE, FakeWorker, WorkerProcess, wait_until

import sllm
from sllm.wire.protocol import SERVICE, pb
from sllm.worker.server import Limits, Worker


def truth(model: Any, text: Any, start: int) -> Any:
    rows = fresh_logits(model, text)[start - 1 : -1]
    return log_softmax(rows)[np.arange(len(rows)), text[start:]]


@pytest.mark.parametrize("prefill", [1, 7, 64, 1000])
@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize("own_draft", [False, True])
def test_chunk_sizes(
    target_model: Any, draft_model: Any, prefill: int, sessions: int, own_draft: bool
) -> None:
    text = make_prompt(target_model, 150, 1)
    wanted = truth(target_model, text, 30)
    draft = draft_model if own_draft else None
    limits = Limits(sessions=sessions, prefill=prefill)
    with (
        Worker(target_model, insecure=True, n_ctx=256, limits=limits, draft=draft, **EXACT) as w,
        sllm.connect(w.uri) as remote,
    ):
        for _ in range(2):
            np.testing.assert_allclose(remote.score(text, 30).logprobs, wanted, atol=1e-4)
        stream = sllm.generate(remote.target(), text[:90], sampling=GREEDY, max_tokens=20)
        assert [t for r in stream for t in r.tokens] == one_by_one(target_model, text[:90], GREEDY, 20)
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reused == 89


def slow_worker(model: Any, **limits: Any) -> Worker:
    limits = {"prefill": 1, **limits}
    return Worker(model, insecure=True, n_ctx=512, limits=Limits(**limits), pass_seconds=0.005, **EXACT)


def scoring(w: Worker) -> bool:
    return any(s.scores_next and s.scores for s in w._scheduler.running())


@pytest.mark.parametrize("how", ["close connection", "timeout"])
def test_cancelled_client(target_model: Any, how: str) -> None:
    text = make_prompt(target_model, 500, 2)
    with slow_worker(target_model, sessions=1, queue=0) as w:
        with sllm.connect(w.uri) as remote, ThreadPoolExecutor(1) as ex:
            seconds = 0.05 if how == "timeout" else None
            f = ex.submit(remote.score, text, 1, timeout=seconds)
            wait_until(lambda: scoring(w) or f.done())
            begun = scoring(w)  # a busy machine may use up the seconds before
            if how == "close connection":
                assert begun
                remote.close()
            with pytest.raises((sllm.ClosedError, sllm.RemoteError)):
                f.result(PATIENCE)
        wait_until(lambda: not w._scheduler.running())
        n = len(w._scheduler._slots[0].held)
        assert begun <= n < 499, n
        with sllm.connect(w.uri) as remote:
            np.testing.assert_allclose(
                remote.score(text, 3).logprobs, truth(target_model, text, 3), atol=1e-4
            )


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_killed_mid_score(target_model: Any, tmp_path: Any, how: str) -> None:
    text = make_prompt(target_model, 500, 2)
    with (
        WorkerProcess(tmp_path, limits={"prefill": 1}, pass_seconds=0.02) as p,
        sllm.connect(p.uri) as remote,
        ThreadPoolExecutor(1) as ex,
    ):
        f = ex.submit(remote.score, text, 1)
        with sllm.connect(p.uri) as other:
            wait_until(lambda: f.done() or other.status().sessions > 0)
        assert not f.done()
        getattr(p, how)()
        with pytest.raises(sllm.RemoteError):
            f.result(PATIENCE)


def test_worker_closed_mid_score(target_model: Any) -> None:
    text = make_prompt(target_model, 500, 2)
    w = slow_worker(target_model)
    with w, sllm.connect(w.uri) as remote, ThreadPoolExecutor(1) as ex:
        f = ex.submit(remote.score, text, 1)
        wait_until(lambda: scoring(w))
        w.close()
        with pytest.raises(sllm.RemoteError):
            f.result(PATIENCE)


def test_others_are_not_stalled(target_model: Any) -> None:
    """Between two chunks of scoring there is a pass for those at work, and their text is the same."""
    text = make_prompt(target_model, 400, 2)
    sampling = sllm.SamplingParams(
        seed=3,
        logit_bias={t: -np.inf for t in range(target_model.vocab.n_tokens) if target_model.vocab.is_eog(t)},
    )
    limits = Limits(prefill=4, sessions=2)
    with (
        Worker(target_model, insecure=True, n_ctx=512, limits=limits, **EXACT) as w,
        sllm.connect(w.uri) as remote,
        ThreadPoolExecutor(1) as ex,
    ):
        stream = sllm.generate(remote.target(), [5, 6], sampling=sampling, max_tokens=450)
        found = list(next(stream).tokens)
        before = w.stats.passes
        ex.submit(remote.score, text, 1).result(PATIENCE)
        n_passes = w.stats.passes - before
        found += [t for r in stream for t in r.tokens]
        assert n_passes >= 90
        assert found == one_by_one(target_model, [5, 6], sampling, 450)


class Liar(FakeWorker):
    def __init__(self, model: Any, reply: Any) -> None:
        super().__init__(model, info={"features": ["generate", "score"]})
        data = reply if isinstance(reply, bytes) else reply.SerializeToString()
        h = {
            "Score": grpc.unary_unary_rpc_method_handler(
                lambda r, c: data, pb.ScoreRequest.FromString, lambda x: x
            )
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, h),))


@pytest.mark.parametrize(
    ("lp", "ranks"),
    [
        ([-1.0], [0]),
        ([-1.0] * 3, [0] * 3),
        ([-1.0] * 2, [0]),
        ([], []),
        ([-1.0, float("nan")], [0, 0]),
        ([-1.0, float("inf")], [0, 0]),
        ([-1.0, -1.0], [0, 2**31]),
        ([5.0, -1.0], [0, 0]),
        ([-1.0, -1.0], [0, 99999]),
    ],
)
def test_lying_replies(target_model: Any, lp: Any, ranks: Any) -> None:
    with (
        Liar(target_model, pb.ScoreReply(logprobs=lp, ranks=ranks)) as fake,
        sllm.connect(fake.uri) as remote,
        pytest.raises(sllm.RemoteError),
    ):
        remote.score(np.array([1, 2, 3], dtype=np.int32), 1)


def test_garbage_reply(target_model: Any) -> None:
    with (
        Liar(target_model, b"\xff\xff") as fake,
        sllm.connect(fake.uri) as remote,
        pytest.raises(sllm.RemoteError),
    ):
        remote.score(np.array([1, 2, 3], dtype=np.int32), 1)


def test_bad_ids_leave_memory_as_it_was(target_model: Any) -> None:
    with target_model.context(n_ctx=256, **EXACT) as c:
        c.decode([5, 6, 7, 8])
        for bad in ([6, 99999], [6, -1], [6] * 400):
            with pytest.raises((ValueError, sllm.ContextFullError)):
                c.token_logprobs(np.array(bad, dtype=np.int32), pos=1)
            assert c.memory.tokens(0).tolist() == [5, 6, 7, 8], bad

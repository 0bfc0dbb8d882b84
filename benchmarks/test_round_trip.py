"""Five ways to a text of one pair of models by the round trip to the machine that has the larger one: the
picture of the README.

Streaming; a draft on the worker; hints from here, chains and trees; and llama.cpp's layers over RPC. All are
paced, so what is seen is the number of round trips and passes that a text takes. Worker, RPC server and links
are processes of their own; every text is compared token by token.

``python -m benchmarks report FILE --picture OUT.svg`` draws what ``--benchmark-json FILE`` has kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

import sllm
from sllm.embedded import DRAFT, TARGET
from sllm.worker.passes import Pace

from .far_end import LinkProcess, WorkerProcess
from .measure import Benchmark, RemoteFigures, Sample, Tokens, joined, sample_of
from .test_both_sides import OWN_DRAFT_SECONDS, Workers, in_turns, ratio
from .test_remote import (
    DRAFT_SECONDS,
    MAX_TOKENS,
    PASS_SECONDS,
    SAMPLING,
    SETTINGS,
    Client,
    PacedChains,
    RemoteReport,
    Texts,
    drafting,
    n_rounds,
    texts,
)

__all__ = ["texts"]  # a fixture

pytestmark = pytest.mark.timeout(3600)

RTTS_MS = (0, 10, 20, 50, 100, 150, 200)
RPC_HEAD = 2
"""Layers that stay here, as in a split; the others and the output are the RPC server's."""


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    pace = Pace(PASS_SECONDS, draft_seconds=OWN_DRAFT_SECONDS)
    settings: dict[str, Any] = {"sessions": 4, "n_ctx": 512, "pace": pace, **SETTINGS}
    with (
        WorkerProcess(TARGET, **settings) as plain,
        WorkerProcess(TARGET, draft=DRAFT, draft_threads=1, **settings) as with_draft,
    ):
        yield Workers(plain, with_draft)


@pytest.fixture(scope="module")
def rpc_server() -> Iterator[sllm.rpc.RPCServer]:
    with sllm.rpc.RPCServer(cache=False) as server:
        yield server


@contextmanager
def over_rpc(port: int, n_layer: int) -> Iterator[sllm.LocalTarget]:
    devices = sllm.rpc.add_server(f"127.0.0.1:{port}")
    with sllm.LocalTarget(
        TARGET, devices=devices, n_gpu_layers=n_layer + 1 - RPC_HEAD, isolated=False, n_ctx=512, **SETTINGS
    ) as target:
        yield target


def text_over_rpc(target: sllm.LocalTarget, prompt: Tokens, max_tokens: int, pause: float) -> Sample:
    """A pass at a time; ``pause`` is what the larger model's pass takes beyond this one's."""
    tokens: list[int] = []
    began = time.perf_counter()
    with sllm.generate(target, prompt, sampling=SAMPLING, max_tokens=max_tokens) as stream:
        for run in stream:
            time.sleep(pause)
            tokens += run.tokens
    return sample_of(stream.stats, tokens, time.perf_counter() - began)


@pytest.fixture(scope="module")
def rpc_pause(rpc_server: sllm.rpc.RPCServer, embedded_target: sllm.Model, texts: Texts) -> float:
    """What is missing of a paced pass where the RPC server is at no distance."""
    with over_rpc(int(rpc_server.endpoint.rpartition(":")[2]), embedded_target.n_layer) as target:
        text_over_rpc(target, texts.prompts[0], 8, 0.0)
        sample = text_over_rpc(target, texts.prompts[0], MAX_TOKENS, 0.0)
    return max(PASS_SECONDS - sample.seconds / sample.n_passes, 0.0)


@pytest.mark.parametrize("rtt_ms", RTTS_MS)
def test_round_trip(
    benchmark: Benchmark,
    report_remote: RemoteReport,
    workers: Workers,
    rpc_server: sllm.rpc.RPCServer,
    rpc_pause: float,
    texts: Texts,
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    rtt_ms: int,
) -> None:
    """30 ms a pass, 10 ms a token drafted here, 3 ms one drafted on the worker; two texts of 72 tokens."""
    rtt = rtt_ms / 1e3
    with ExitStack() as stack:
        enter = stack.enter_context
        trees = enter(drafting(embedded_draft, paced=True))
        chains = enter(drafting(embedded_draft, paced=True, kind=PacedChains))

        def client(worker: WorkerProcess, drafter: Any) -> Client:
            link = enter(LinkProcess(worker.port, rtt=rtt))
            return Client(enter(sllm.connect(worker.uri_behind(link))), link, drafter, SAMPLING, rtt)

        def all_texts(text: Callable[[Tokens], Sample]) -> Callable[[], Sample]:
            return lambda: joined([text(prompt) for prompt in texts.prompts])

        plain, own = client(workers.plain, trees), client(workers.drafting, trees)
        by_chains = client(workers.plain, chains)
        ways = {
            "stream": all_texts(lambda prompt: plain.text("stream", prompt, MAX_TOKENS)),
            "worker's draft": all_texts(lambda prompt: own.text("stream", prompt, MAX_TOKENS)),
            "hints, chains": all_texts(lambda prompt: by_chains.text("run-ahead", prompt, MAX_TOKENS)),
            "hints, trees": all_texts(lambda prompt: plain.text("run-ahead", prompt, MAX_TOKENS)),
        }
        taken = in_turns(benchmark, ways, n_rounds(3), timed="hints, trees")

        rpc_link = enter(LinkProcess(int(rpc_server.endpoint.rpartition(":")[2]), rtt=rtt))
        target = enter(over_rpc(rpc_link.port, embedded_target.n_layer))
        text_over_rpc(target, texts.prompts[0], 8, rpc_pause)  # what it sets up at the first passes
        rpc_link.reset()
        over = all_texts(lambda prompt: text_over_rpc(target, prompt, MAX_TOKENS, rpc_pause))
        taken["llama.cpp RPC"] = [over() for _ in taken["stream"]]
        round_trips = rpc_link.turns() / 2 / sum(sample.n_tokens for sample in taken["llama.cpp RPC"])

    assert {sample.texts for samples in taken.values() for sample in samples} == {texts.expected}
    figures = []
    for name, samples in taken.items():
        whole = joined(samples)
        one = RemoteFigures(
            rtt_ms=rtt_ms,
            mbit_s=None,
            paced=True,
            mode=name,
            tokens_per_s=whole.tokens_per_s,
            acceptance=whole.n_accepted / whole.n_drafted if whole.n_drafted else None,
            passes_per_token=whole.n_passes / whole.n_tokens,
            ratio_vs_stream=ratio(samples, taken["stream"]),
        )
        if name == "llama.cpp RPC":
            one.more["round_trips_per_token"] = round_trips
        figures.append(one)
    figures.sort(key=lambda one: one.mode != "hints, trees")  # what is timed is the first
    figures[0].more |= {
        "pair": "the embedded pair",
        "pair_acceptance": texts.acceptance,
        "n_texts": len(texts.prompts),
        "max_tokens": MAX_TOKENS,
        "temperature": SAMPLING.temperature,
        "pass_ms": PASS_SECONDS * 1e3,
        "draft_ms": DRAFT_SECONDS * 1e3,
        "worker_draft_ms": OWN_DRAFT_SECONDS * 1e3,
    }
    report_remote(figures)

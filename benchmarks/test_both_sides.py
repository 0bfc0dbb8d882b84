"""Drafts on the worker, on the client, on both and on neither, over the same links; and how many clients one
worker serves at 25 tokens/s each.

Workers and links are processes of their own; every text is compared token by token.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import sllm
from sllm.draft.drafters import Drafter, NGramDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.worker.passes import Pace

from .far_end import LinkProcess, WorkerProcess
from .measure import Benchmark, RemoteFigures, Sample, Tokens, generated, joined, local_target
from .test_remote import (
    AT_LEAST_STREAMING,
    MAX_TOKENS,
    PASS_SECONDS,
    RTTS_MS,
    SAMPLING,
    SETTINGS,
    Client,
    PacedChains,
    RemoteReport,
    Way,
    drafting,
    n_rounds,
)

pytestmark = pytest.mark.timeout(3600)

PACES = pytest.mark.parametrize("paced", [False, True], ids=["unpaced", "paced"], indirect=True)

OWN_DRAFT_SECONDS = 0.003
"""Of a token: a small model on the big machine; a client's takes ``DRAFT_SECONDS``."""

WAYS: dict[str, tuple[bool, Way]] = {
    "stream": (False, "stream"),
    "worker's draft": (True, "stream"),
    "hints alone": (False, "run-ahead"),
    "both": (True, "run-ahead"),
}
"""Whether the worker has a draft of its own, and what the client does. Drafts of models are trees."""

CHAINS = "both, the client's a chain"

GAIN_ON_OWN_DOCUMENTS = 1.1
GAIN_UP_TO_MS = 50

Turns = dict[str, list[Sample]]


@pytest.fixture(scope="module")
def paced(request: pytest.FixtureRequest) -> bool:
    value: bool = request.param
    return value


@dataclass(frozen=True)
class Workers:
    """One without a draft, and one with."""

    plain: WorkerProcess
    drafting: WorkerProcess


@pytest.fixture(scope="module")
def workers(paced: bool) -> Iterator[Workers]:
    pace = Pace(PASS_SECONDS, draft_seconds=OWN_DRAFT_SECONDS) if paced else Pace()
    settings: dict[str, Any] = {"sessions": max(SESSIONS), "n_ctx": 512, "pace": pace, **SETTINGS}
    with (
        WorkerProcess(TARGET, **settings) as plain,
        WorkerProcess(TARGET, draft=DRAFT, draft_threads=1, **settings) as with_draft,
    ):
        yield Workers(plain, with_draft)


def in_turns(
    benchmark: Benchmark, ways: dict[str, Callable[[], Sample]], rounds: int, *, timed: str = "both"
) -> Turns:
    """The samples of each way; ``timed`` is what the benchmark times."""
    taken: Turns = {name: [] for name in ways}
    for run in [*ways.values()] * 2:  # nobody is the first, and the first texts learn what drafting is worth
        run()

    def take(name: str) -> None:
        taken[name].append(ways[name]())

    def others() -> None:
        for name in ways:
            if name != timed:
                take(name)

    benchmark.pedantic(lambda: take(timed), setup=others, rounds=rounds, iterations=1, warmup_rounds=0)
    if not all(taken.values()):  # --benchmark-disable runs no setup
        others()
    return taken


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """The median over rounds."""
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True))


def figures_of(taken: Turns, **where: Any) -> list[RemoteFigures]:
    """Those of "both" first. The best that it is compared with does without the client's draft."""
    speed = {name: statistics.median(s.tokens_per_s for s in samples) for name, samples in taken.items()}
    best = max(("stream", "worker's draft"), key=lambda name: speed[name])
    found = []
    for name, samples in taken.items():
        whole = joined(samples)
        figures = RemoteFigures(
            mode=name,
            tokens_per_s=speed[name],
            acceptance=whole.n_accepted / whole.n_drafted if whole.n_drafted else None,
            passes_per_token=whole.n_passes / whole.n_tokens,
            ratio_vs_stream=ratio(samples, taken["stream"]),
            mbit_s=None,
            **where,
        )
        figures.more["ratio_vs_best"] = ratio(samples, taken[best])
        figures.more["best"] = best
        figures.more["ratio_vs_own_draft"] = ratio(samples, taken["worker's draft"])
        found.append(figures)
    found.sort(key=lambda figures: figures.mode != "both")
    ours = found[0]
    ours.aims_at(
        f">= {AT_LEAST_STREAMING} of the better of streaming and the worker's draft",
        ours.more["ratio_vs_best"] >= AT_LEAST_STREAMING,
    )
    return found


@dataclass
class Sides:
    """A client of each worker, over links of the same length; and ``chains``, one of the drafting worker's
    whose own drafts are no trees.
    """

    clients: dict[bool, Client]
    chains: Client | None = None

    def ways(self, prompts: Sequence[Tokens], max_tokens: int) -> dict[str, Callable[[], Sample]]:
        """Each tells all the texts, one after the other."""

        def of(client: Client, way: Way) -> Callable[[], Sample]:
            return lambda: joined([client.text(way, prompt, max_tokens) for prompt in prompts])

        found = {name: of(self.clients[own_draft], way) for name, (own_draft, way) in WAYS.items()}
        if self.chains is not None:
            found[CHAINS] = of(self.chains, "run-ahead")
        return found


def sides(
    stack: ExitStack,
    workers: Workers,
    drafter: Drafter,
    rtt: float,
    sampling: sllm.SamplingParams = SAMPLING,
    links: dict[bool, LinkProcess] | None = None,
    chains: Drafter | None = None,
) -> Sides:
    """Connections that ``stack`` closes."""
    clients = {}
    for own_draft, worker in ((False, workers.plain), (True, workers.drafting)):
        link = links[own_draft] if links else stack.enter_context(LinkProcess(worker.port, rtt=rtt))
        remote = stack.enter_context(sllm.connect(worker.uri_behind(link)))
        clients[own_draft] = Client(remote, link, drafter, sampling, rtt)
    return Sides(clients, None if chains is None else Client(remote, link, chains, sampling, rtt))


# --- one text at a time ---


@pytest.fixture(scope="module")
def prompts(embedded_target: sllm.Model) -> list[Tokens]:
    story = "Once upon a time, there was a little fox who lived near the river."
    chat = embedded_target.chat(
        [{"role": "user", "content": "Tell me a story about a little mouse and a lamp."}]
    )
    return [embedded_target.vocab.encode(story), chat]


def expected(
    model: sllm.Model, prompts: Sequence[Tokens], max_tokens: int, sampling: sllm.SamplingParams = SAMPLING
) -> tuple[tuple[int, ...], ...]:
    with local_target(model, n_threads=1) as target:
        return generated(target, prompts, sampling=sampling, max_tokens=max_tokens).texts


@PACES
@pytest.mark.parametrize("rtt_ms", RTTS_MS)
def test_a_model_on_either_side(
    benchmark: Benchmark,
    report_remote: RemoteReport,
    workers: Workers,
    paced: bool,
    prompts: list[Tokens],
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    rtt_ms: int,
) -> None:
    """The same small model on the worker (3 ms a token, where it is paced) and on the client (10 ms)."""
    truth = expected(embedded_target, prompts, MAX_TOKENS)
    with ExitStack() as stack:
        drafter = stack.enter_context(drafting(embedded_draft, paced=paced))
        chains = stack.enter_context(drafting(embedded_draft, paced=paced, kind=PacedChains))
        ways = sides(stack, workers, drafter, rtt_ms / 1e3, chains=chains).ways(prompts, MAX_TOKENS)
        taken = in_turns(benchmark, ways, n_rounds(2 if paced else 11))
    assert {sample.texts for samples in taken.values() for sample in samples} == {truth}
    report_remote(figures_of(taken, rtt_ms=rtt_ms, paced=paced))


@PACES
@pytest.mark.parametrize("rtt_ms", RTTS_MS)
def test_documents_of_the_clients_own(
    benchmark: Benchmark,
    report_remote: RemoteReport,
    workers: Workers,
    paced: bool,
    prompts: list[Tokens],
    embedded_target: sllm.Model,
    rtt_ms: int,
) -> None:
    """Half of the text stands word for word in documents that only the client has: it looks them up. The text
    is sampled from the whole distribution, so that it says what a small model does not expect.
    """
    n = 144
    vocab = embedded_target.vocab
    ends = [(token, -np.inf) for token in range(vocab.n_tokens) if vocab.is_eog(token)]
    sampling = sllm.SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3, logit_bias=ends)
    truth = expected(embedded_target, prompts[:1], n, sampling)
    documents = [truth[0][start : start + 40] for start in (20, 96)]
    with ExitStack() as stack:
        drafter = NGramDrafter(documents=documents)
        ways = sides(stack, workers, drafter, rtt_ms / 1e3, sampling).ways(prompts[:1], n)
        taken = in_turns(benchmark, ways, n_rounds(2 if paced else 11))
    assert {sample.texts for samples in taken.values() for sample in samples} == {truth}
    figures = figures_of(taken, rtt_ms=rtt_ms, paced=paced)
    if paced and rtt_ms <= GAIN_UP_TO_MS:
        gain = figures[0].more["ratio_vs_own_draft"]
        figures[0].aims_at(f">= {GAIN_ON_OWN_DOCUMENTS} x the worker's draft", gain >= GAIN_ON_OWN_DOCUMENTS)
    report_remote(figures)


# --- several texts at once ---

SESSIONS = (1, 2, 4, 8)


def all_at_once(runs: Sequence[Callable[[], Sample]]) -> list[Sample]:
    """What they come to when they begin at the same time, each on a thread of its own."""
    found: list[Sample | None] = [None] * len(runs)
    barrier = threading.Barrier(len(runs))

    def one(i: int) -> None:
        barrier.wait()
        found[i] = runs[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [sample for sample in found if sample is not None]


def as_one(samples: Sequence[Sample]) -> Sample:
    """Texts that were told at the same time."""
    whole = joined(samples)
    whole.seconds = max(sample.seconds for sample in samples)
    return whole


@PACES
@pytest.mark.parametrize("sessions", SESSIONS)
def test_sessions(
    benchmark: Benchmark,
    report_remote: RemoteReport,
    workers: Workers,
    paced: bool,
    prompts: list[Tokens],
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    sessions: int,
) -> None:
    """As many clients of one worker, 20 ms away, each with a text and a draft of its own."""
    rtt_ms, max_tokens, prompt = 20, 64, prompts[1]
    samplings = [sllm.SamplingParams(temperature=0.8, seed=10 + i) for i in range(sessions)]
    with local_target(embedded_target, n_threads=1) as target:
        truth = tuple(
            generated(target, [prompt], sampling=s, max_tokens=max_tokens).texts[0] for s in samplings
        )
    with ExitStack() as stack:
        links = {
            own_draft: stack.enter_context(LinkProcess(worker.port, rtt=rtt_ms / 1e3))
            for own_draft, worker in ((False, workers.plain), (True, workers.drafting))
        }
        clients = [
            sides(
                stack,
                workers,
                stack.enter_context(drafting(embedded_draft, paced=paced)),
                rtt_ms / 1e3,
                sampling,
                links,
            ).ways([prompt], max_tokens)
            for sampling in samplings
        ]
        ways = {name: (lambda name=name: as_one(all_at_once([c[name] for c in clients]))) for name in WAYS}
        taken = in_turns(benchmark, ways, n_rounds(3 if paced else 9))
    assert {sample.texts for samples in taken.values() for sample in samples} == {truth}
    figures = figures_of(taken, rtt_ms=rtt_ms, paced=paced)
    for one in figures:
        one.more["sessions"] = sessions
    report_remote(figures)


# --- how many clients ---

CLIENTS = (1, 4, 8, 12, 16, 24, 32)
ENOUGH = 25.0  # tokens per second
CAPACITY_PACE = Pace(PASS_SECONDS, 0.001, OWN_DRAFT_SECONDS, 0.0001)
"""A worker to which each row of a pass, its draft's too, costs a thirtieth of what reading the weights does:
between a GPU, where rows are all but free, and a CPU.
"""


@pytest.mark.parametrize("where", ["nobody", "worker", "clients"])
def test_capacity(
    benchmark: Benchmark,
    report_values: Callable[[dict[str, Any], dict[str, bool]], None],
    prompts: list[Tokens],
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    where: str,
) -> None:
    """Clients 20 ms away, each with a text of its own and, where they draft, 10 ms for a token."""
    n_tokens, prompt, rtt = 72, prompts[0], 0.02
    settings: dict[str, Any] = {"sessions": max(CLIENTS), "n_ctx": 128, "pace": CAPACITY_PACE, **SETTINGS}
    if where == "worker":
        settings |= {"draft": DRAFT, "draft_threads": 1}
    samplings = [sllm.SamplingParams(temperature=0.8, seed=10 + i) for i in range(max(CLIENTS))]
    with local_target(embedded_target, n_threads=1) as target:
        truth = [generated(target, [prompt], sampling=s, max_tokens=n_tokens).texts[0] for s in samplings]
    served: dict[int, int] = {}
    slowest: dict[int, float] = {}
    with ExitStack() as stack:
        worker = stack.enter_context(WorkerProcess(TARGET, **settings))
        link = stack.enter_context(LinkProcess(worker.port, rtt=rtt))
        runs: list[Callable[[], Sample]] = []
        for sampling in samplings:
            remote = stack.enter_context(sllm.connect(worker.uri_behind(link)))
            drafter = stack.enter_context(drafting(embedded_draft, paced=True))
            client = Client(remote, link, drafter, sampling, rtt)
            way: Way = "run-ahead" if where == "clients" else "stream"
            runs.append(lambda client=client, way=way: client.text(way, prompt, n_tokens))
        all_at_once(runs[:4])  # the first texts learn what drafting is worth

        def measure() -> None:
            for n in CLIENTS:
                samples = all_at_once(runs[:n])
                assert [sample.texts[0] for sample in samples] == truth[:n]
                served[n] = sum(sample.tokens_per_s >= ENOUGH for sample in samples)
                slowest[n] = min(sample.tokens_per_s for sample in samples)

        benchmark.pedantic(measure, setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0)
    report_values(
        {
            "clients_at_25": max(served.values()),
            "all_at_25": max((n for n in CLIENTS if served[n] == n), default=0),
            "served": served,
            "slowest_tokens_per_s": {n: round(speed, 1) for n, speed in slowest.items()},
        },
        {},
    )

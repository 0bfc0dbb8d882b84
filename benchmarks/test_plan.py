"""What ``sllm.plan()`` predicts, and what the same ways then do over the same link.

Workers and links are processes of their own. Behind the links everything is paced as a large target and a
laptop's draft are (30 ms a pass, 10 ms a token drafted here, 3 ms one drafted on the worker); here and in a
split, models are as fast as this machine makes them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.planning.ways import Plan
from sllm.worker.passes import Pace

from . import models, smollm2
from .far_end import LinkProcess, WorkerProcess
from .measure import Benchmark
from .test_both_sides import OWN_DRAFT_SECONDS
from .test_remote import DRAFT_SECONDS, PASS_SECONDS, SAMPLING, SETTINGS, PacedDrafter, drafting, n_rounds

pytestmark = pytest.mark.timeout(3600)

RTTS_MS = (0, 20, 50, 100)
MAX_TOKENS = 128
WITHIN = 1.3
BEST_WITHIN = 0.9

ASKED = (
    "Tell me a story about a little mouse and a lamp.",
    "Tell me about a dog who finds a red ball in the garden.",
)
LIKE = (
    "Tell me a story about a rabbit and the moon.",
    "Tell me about a girl who plants a small tree.",
    "Tell me a story about a fox who looks for its way home.",
)
"""What is asked of plan(): of the kind that is then asked, and none of it."""

PROMPTS = [[{"role": "user", "content": asked}] for asked in LIKE]


class Chains(PacedDrafter):
    """Chains, a token at a time, so that a draft that is cancelled ends as soon as a slow one's would."""

    def __init__(self, model: sllm.Model) -> None:
        super().__init__(model, 0.0, n_ctx=1024, trees=False, **SETTINGS)
        self._cancelled = threading.Event()

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        self._cancelled.clear()
        tokens: list[int] = []
        probs: list[float] = []
        caught_up = 0
        while len(tokens) < n_max and not self._cancelled.is_set():
            began = time.perf_counter()
            new = super().draft(text, [*chain, *tokens], 1, p_min)
            caught_up = caught_up or self.n_caught_up
            self._cancelled.wait(max(began + DRAFT_SECONDS - time.perf_counter(), 0.0))
            if not new:
                break
            tokens += new
            probs += self.probs
        self.probs, self.n_caught_up = probs, caught_up
        return tokens

    def cancel(self) -> None:
        self._cancelled.set()
        super().cancel()


Values = Callable[[dict[str, Any], dict[str, bool]], None]


def speed(target: Any, prompts: Sequence[Any], draft: Any, sampling: sllm.SamplingParams) -> float:
    """Tokens per second after the prompt, all texts together."""
    n = seconds = 0.0
    for prompt in prompts:
        with sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=MAX_TOKENS) as stream:
            for _ in stream:
                pass
        n += stream.stats.n_tokens
        seconds += stream.stats.seconds
    return n / seconds


def way(target: Any, draft: Any, sampling: sllm.SamplingParams) -> Callable[[Sequence[Any]], float]:
    return lambda prompts: speed(target, prompts, draft, sampling)


def compared(
    benchmark: Benchmark,
    hand_in: Values,
    predict: Callable[[], Plan],
    ways: dict[str, Callable[[Sequence[Any]], float]],
    prompts: dict[str, list[Any]],
) -> None:
    """Predict, then measure each way in turns; the prediction is what the benchmark times.

    ``ratio`` is measured to predicted after the prompts that plan() had, of whose texts it has seen a part;
    ``ratio_others`` after other ones, where texts differ, too.
    """
    plans: list[Plan] = []
    benchmark.pedantic(
        lambda: plans.append(predict()), setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0
    )
    for run in ways.values():  # the first text with a target finds out whether a draft pays
        run(prompts["others"][:1])
    taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in ways} for kind in prompts}
    for _ in range(n_rounds(1)):
        for kind, several in prompts.items():
            for name, run in ways.items():
                taken[kind][name].append(run(several))
    predicted = {way.name: way.tokens_per_s or 0.0 for way in plans[-1].ways if way.name in ways}
    assert all(predicted.values()), str(plans[-1])
    measured, others = (
        {name: statistics.median(values) for name, values in taken[kind].items()}
        for kind in ("planned", "others")
    )
    named = max(predicted, key=lambda name: predicted[name])
    best = max(measured, key=lambda name: measured[name])
    ratio = {name: measured[name] / predicted[name] for name in ways}
    hand_in(
        {
            "predicted": predicted,
            "measured": measured,
            "ratio": ratio,
            "best_predicted": named,
            "best_measured": best,
            "of_best": measured[named] / measured[best],
            "measured_others": others,
            "ratio_others": {name: others[name] / predicted[name] for name in ways},
            "of_best_others": others[named] / max(others.values()),
            "seconds_and_shares": plans[-1].measured,
        },
        {
            "the best way named is the best, or within 10 % of it": measured[named]
            >= BEST_WITHIN * measured[best],
            f"all within a factor of {WITHIN}": all(1 / WITHIN <= r <= WITHIN for r in ratio.values()),
        },
    )


def chats(target: Any) -> dict[str, list[Any]]:
    """The prompts in tokens."""
    return {
        kind: [target.chat([{"role": "user", "content": asked}]) for asked in several]
        for kind, several in (("planned", LIKE), ("others", ASKED))
    }


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[bool, WorkerProcess]]:
    pace = Pace(PASS_SECONDS, draft_seconds=OWN_DRAFT_SECONDS)
    with (
        WorkerProcess(TARGET, n_ctx=1024, pace=pace, **SETTINGS) as plain,
        WorkerProcess(TARGET, n_ctx=1024, pace=pace, draft=DRAFT, draft_threads=1, **SETTINGS) as drafts,
    ):
        yield {False: plain, True: drafts}


@pytest.mark.parametrize("own", [False, True], ids=["plain", "worker's draft"])
@pytest.mark.parametrize("rtt_ms", RTTS_MS)
def test_worker(
    benchmark: Benchmark,
    report_values: Values,
    workers: dict[bool, WorkerProcess],
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    rtt_ms: int,
    own: bool,
) -> None:
    with ExitStack() as stack:
        trees = stack.enter_context(drafting(embedded_draft, paced=True))
        chains = stack.enter_context(Chains(embedded_draft))
        link = stack.enter_context(LinkProcess(workers[own].port, rtt=rtt_ms / 1e3))
        uri = workers[own].uri_behind(link)
        target = stack.enter_context(sllm.connect(uri)).target()
        names = ("worker, stream", "worker, hints (chain)", "worker, hints (tree)")
        if own:
            names = ("worker, its own draft", "both sides (chain)", "both sides (tree)")
        compared(
            benchmark,
            report_values,
            lambda: sllm.plan(trees, remote=uri, prompts=PROMPTS, sampling=SAMPLING, max_tokens=MAX_TOKENS),
            {
                name: way(target, draft, SAMPLING)
                for name, draft in zip(names, (None, chains, trees), strict=True)
            },
            chats(embedded_target),
        )


@pytest.mark.parametrize("rtt_ms", RTTS_MS)
def test_split(
    benchmark: Benchmark,
    report_values: Values,
    embedded_target: sllm.Model,
    embedded_draft: sllm.Model,
    rtt_ms: int,
) -> None:
    pace = Pace(PASS_SECONDS)
    with ExitStack() as stack:
        worker = stack.enter_context(WorkerProcess(TARGET, n_ctx=1024, pace=pace, layers=True, n_threads=1))
        trees = stack.enter_context(drafting(embedded_draft, paced=True))
        chains = stack.enter_context(Chains(embedded_draft))
        link = stack.enter_context(LinkProcess(worker.port, rtt=rtt_ms / 1e3))
        uri = worker.uri_behind(link)
        middle = stack.enter_context(sllm.connect(uri))
        split = stack.enter_context(sllm.SplitTarget(TARGET, head=1, tail=1, middle=middle, n_threads=1))
        compared(
            benchmark,
            report_values,
            lambda: sllm.plan(
                trees, target=TARGET, layers=uri, prompts=PROMPTS, sampling=SAMPLING, max_tokens=MAX_TOKENS
            ),
            {
                name: way(split, draft, SAMPLING)
                for name, draft in zip(
                    ("split", "split, draft (chain)", "split, draft (tree)"),
                    (None, chains, trees),
                    strict=True,
                )
            },
            chats(embedded_target),
        )


def here(
    benchmark: Benchmark, hand_in: Values, target: Path, draft: Path, sampling: sllm.SamplingParams
) -> None:
    """On this machine, as ``generate()`` does it with two models."""
    with ExitStack() as stack:
        big, small = stack.enter_context(sllm.Model(target)), stack.enter_context(sllm.Model(draft))
        chains = stack.enter_context(ModelDrafter(small, n_ctx=1024, trees=False))
        compared(
            benchmark,
            hand_in,
            lambda: sllm.plan(small, target=big, prompts=PROMPTS, sampling=sampling, max_tokens=MAX_TOKENS),
            {
                name: way(big, one, sampling)
                for name, one in (
                    ("here", None),
                    ("here, draft (chain)", chains),
                    ("here, draft (tree)", small),
                )
            },
            chats(big),
        )


def test_here(benchmark: Benchmark, report_values: Values) -> None:
    """A target of seven times the weights and the same text, so that a draft can pay."""
    big = models.inflated(TARGET, n_added=24, n_ff=2048)
    here(benchmark, report_values, big, DRAFT, SAMPLING)


def test_real_model_here(benchmark: Benchmark, report_values: Values) -> None:
    """SmolLM2-135M, and its first layers as the draft."""
    found = smollm2.find()
    if found is None:
        pytest.skip(smollm2.MISSING)
    here(benchmark, report_values, found, models.first_layers(found, 10), SAMPLING)

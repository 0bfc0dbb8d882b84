"""What triage and privacy cost and save: a grade, scanning and restoring, and a mix of 300 requests.

The issue names no peer. A grade stands beside the control that costs nothing, prompt length alone, and beside
what one token of an answer costs; the pipeline beside sending everything to the cloud.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sllm
from sllm.calibration import Profile, auroc
from sllm.embedded import TARGET_PROFILE
from sllm.hybrid import Hybrid
from sllm.privacy import Restorer, Vault, default_detectors, egress_check
from sllm.triage import ContextScorer, Policy, Triage

from .measure import GREEDY, TYPE_KV, Benchmark

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[1]
SHORT = "What does a cow eat?"
LONG = "Tell me a story. " + "One day the fox met a bear near the old mill and they walked home. " * 15

# --- a grade ---


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("policy", ["default", "findings alone", "findings alone, no rotations"])
@pytest.mark.parametrize("name", ["draft", "target"])
def test_grade(
    benchmark: Benchmark,
    embedded_draft: sllm.Model,
    embedded_target: sllm.Model,
    name: str,
    policy: str,
    length: str,
) -> None:
    model = embedded_draft if name == "draft" else embedded_target
    chosen = Policy(ask_privacy=policy == "default", rotations="no rotations" not in policy)
    text = SHORT if length == "short" else LONG
    with (
        ContextScorer(model, n_threads=1) as scorer,
        sllm.LocalTarget(model, n_ctx=1024, n_threads=1) as target,
    ):
        triage = Triage(scorer, chosen)
        prompt = model.chat([{"role": "user", "content": text}])
        seconds: list[float] = []
        token_seconds: list[float] = []
        counts: list[int] = []

        def grade() -> None:
            scorer.label_logprobs("another request", ["yes", "no"])  # nothing of this one is in memory
            before, began = scorer.n_computed, time.perf_counter()
            found = triage.assess([{"role": "user", "content": text}], findings=())
            seconds.append(time.perf_counter() - began)
            counts.append(scorer.n_computed - before)
            assert found.tier == 2  # without a profile nothing else is promised
            stream = sllm.generate(target, prompt, sampling=GREEDY, max_tokens=8)
            stream.text()
            token_seconds.append(1 / max(stream.stats.tokens_per_s, 1e-9))

        benchmark.pedantic(grade, setup=lambda: None, rounds=15, iterations=1, warmup_rounds=2)
    benchmark.extra_info.update(
        model=name,
        policy=policy,
        n_prompt=len(prompt),
        ms_per_grade=statistics.median(seconds) * 1e3,
        tokens_per_grade=statistics.median(counts),
        in_tokens_of_an_answer=statistics.median(s / t for s, t in zip(seconds, token_seconds, strict=True)),
    )


# --- privacy ---


def _corpus(n: int) -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import privacy_corpus
    finally:
        sys.path.pop(0)
    return "\n".join(case.text for case in privacy_corpus.cases(n, seed=3))


PROSE_ZH = "春天来了，小狐狸在河边遇见了一只小熊。它们一起走过森林，看见树上的苹果红了。"
PROSE_EN = "One day the fox met a bear near the old mill, and they walked home through the rain. "
TEXTS: dict[str, Callable[[], str]] = {
    "english": lambda: PROSE_EN * 1200,
    "chinese": lambda: PROSE_ZH * 1200,
    "code": lambda: (ROOT / "sllm" / "worker" / "scheduler.py").read_text(encoding="utf-8") * 3,
    "private": lambda: _corpus(2500),
    "hostile digits": lambda: "1234567890" * 100_000,
    "hostile dashes": lambda: "1-" * 500_000,
    "hostile at": lambda: "a@" * 500_000,
    "hostile dots": lambda: "a." * 500_000,
    "hostile iban": lambda: "GB82 " * 200_000,
    "hostile han": lambda: "路" * 1_000_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_scan(benchmark: Benchmark, name: str) -> None:
    text = TEXTS[name]()
    detectors = default_detectors()
    found: list[int] = []

    def scan() -> None:
        found.append(sum(len(list(detector.detect(text))) for detector in detectors))

    rounds = 1 if name.startswith("hostile") else 5
    seconds = _cpu(benchmark, scan, rounds)
    assert len(set(found)) == 1
    assert found[0] > 1000 if name == "private" else found[0] >= 0
    benchmark.extra_info.update(
        text=name, n_chars=len(text), n_found=found[0], us_per_char=1e6 * seconds / len(text)
    )


@pytest.mark.parametrize("what", ["mask", "egress_check", "restore", "restore in pieces of 4"])
@pytest.mark.parametrize("name", ["english", "chinese", "code", "private"])
def test_mask_and_restore(benchmark: Benchmark, name: str, what: str) -> None:
    text = TEXTS[name]()[:40_000]
    vault = Vault()
    masked = vault.mask(text).text
    pieces = [masked[i : i + 4] for i in range(0, len(masked), 4)]

    def run() -> None:
        if what == "mask":
            Vault().mask(text)
        elif what == "egress_check":
            egress_check(masked, vault)
        else:
            restorer = Restorer(vault)
            parts = pieces if "pieces" in what else [masked]
            assert "".join([*map(restorer.feed, parts), restorer.finish()]) == text

    seconds = _cpu(benchmark, run, 3)
    benchmark.extra_info.update(
        text=name, what=what, n_values=len(vault), us_per_char=1e6 * seconds / len(text)
    )


def _cpu(benchmark: Benchmark, run: Callable[[], None], rounds: int) -> float:
    """The median of the processor's seconds: other programs do not count."""
    spent: list[float] = []

    def timed() -> None:
        began = time.process_time()
        run()
        spent.append(time.process_time() - began)

    benchmark.pedantic(timed, setup=lambda: None, rounds=rounds, iterations=1, warmup_rounds=0)
    return statistics.median(spent)


# --- the whole pipeline ---

N_REQUESTS, N_PRIVATE = 300, 60
MAX_TOKENS = 24


@dataclass(frozen=True)
class Request:
    text: str
    right: tuple[str, ...] = ()  # answers that are; none: nothing that these models could say
    private: bool = False


@dataclass
class Totals:
    tiers: Counter[int] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)  # cloud tokens by route
    everything: Counter[str] = field(default_factory=Counter)  # had all been sent, by route
    kept_first: list[bool] = field(default_factory=list)  # whether tier 1's answers were right
    grade_seconds: list[float] = field(default_factory=list)
    easy: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    hard: list[bool] = field(default_factory=list)


def requests() -> Iterator[Request]:
    """The mix of ``training/requests.py``, and among it private texts in Chinese and English."""
    sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]
    try:
        import privacy_corpus
        from requests import answers, row  # type: ignore[import-untyped, attr-defined, unused-ignore]
    except ImportError:  # another package of that name was there first
        import importlib.util

        spec = importlib.util.spec_from_file_location("labelled_requests", ROOT / "training" / "requests.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answers, row = module.answers, module.row
        import privacy_corpus
    finally:
        del sys.path[:2]
    known = answers()
    private = list(privacy_corpus.cases(N_PRIVATE, seed=11))
    step = N_REQUESTS // N_PRIVATE
    for i in range(N_REQUESTS):
        if i % step == 0:
            yield Request(private[i // step].text, private=True)
        else:
            one = row("pipeline", i, known)
            yield Request(one["prompt"], tuple(one["reference"]))


@pytest.mark.parametrize("verify", ["uncertain", "never"])
def test_pipeline(
    benchmark: Benchmark, embedded_target: sllm.Model, embedded_draft: sllm.Model, verify: Any
) -> None:
    totals = Totals()
    settings: dict[str, Any] = {"flash_attn": True, "type_k": TYPE_KV, "type_v": TYPE_KV, "n_threads": 1}
    mix = list(requests())
    assert embedded_draft.vocab.n_tokens == embedded_target.vocab.n_tokens
    with ExitStack() as stack:
        scorer = stack.enter_context(ContextScorer(embedded_target, n_threads=1))
        triage = Triage(scorer, Policy(ask_privacy=False), Profile.load(TARGET_PROFILE))
        worker = stack.enter_context(sllm.Worker(embedded_target, insecure=True, n_ctx=1024, **settings))
        remote = stack.enter_context(sllm.connect(worker.uri))
        hybrid = stack.enter_context(
            Hybrid(
                embedded_target,
                cloud=remote.target(),
                triage=triage,
                privacy="deidentify",
                verify=verify,
                sampling=GREEDY,
                max_tokens=MAX_TOKENS,
                n_threads=1,
            )
        )

        def run() -> None:
            for request in mix:
                _ask(hybrid, embedded_target, request, totals)

        benchmark.pedantic(run, setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0)
    n = len(mix)
    spent, everything = sum(totals.spent.values()), sum(totals.everything.values())
    info = {
        "verify": verify,
        "ms_per_grade": statistics.median(totals.grade_seconds) * 1e3,
        **{f"share_tier{tier}": totals.tiers[tier] / n for tier in (1, 2, 3)},
        "cloud_tokens": spent,
        "cloud_tokens_of_sending_everything": everything,
        "cloud_tokens_saved": 1 - spent / everything,
        "saved_by_route": {
            route: 1 - totals.spent[route] / total for route, total in sorted(totals.everything.items())
        },
        "routes": dict(totals.routes),
        "tier1_wrong": totals.kept_first.count(False),
        "tier1_answers": len(totals.kept_first),
        "auroc_of_the_grade": auroc(totals.easy, [not hard for hard in totals.hard]),
        "auroc_of_length": auroc([-length for length in totals.lengths], [not hard for hard in totals.hard]),
    }
    benchmark.extra_info.update(info)
    print(f"\n{info}")
    assert sum(totals.tiers.values()) == n


def _ask(hybrid: Hybrid, model: sllm.Model, request: Request, totals: Totals) -> None:
    messages = [{"role": "user", "content": request.text}]
    hybrid.new_conversation()
    answer = hybrid.ask(messages)
    graded = answer.grade
    text = answer.text()
    route = " > ".join(answer.route)
    stats = answer.stats
    spent = stats.cloud_in + stats.cloud_out
    n_prompt = len(model.chat(messages))
    n_answer = len(model.vocab.encode(text, add_special=False)) + 1
    totals.tiers[1 if route == "small" else 3 if route == "cloud" else 2] += 1
    totals.routes[route] += 1
    totals.spent[route] += spent
    totals.everything[route] += n_prompt + n_answer
    totals.grade_seconds.append(stats.grade_seconds)
    if request.private:
        assert spent == 0 or answer.masked or not graded.private
        return
    if route == "small":
        totals.kept_first.append(text.strip() in request.right)
    totals.easy.append(graded.p_easy)
    totals.lengths.append(float(n_prompt))
    totals.hard.append(not request.right)

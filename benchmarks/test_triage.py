"""What triage and privacy cost and save: a grade, scanning and restoring, and a mix of 300 requests.

A grade stands beside the control that costs next to nothing, the prompt's length alone, and beside what one
token of an answer costs; scanning beside Presidio's patterns on the same texts, where it is installed; the
pipeline beside sending everything to the cloud, which is measured, and beside length alone again.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sllm
from sllm.embedded import TARGET_PROFILE
from sllm.privacy import (
    NameDetector,
    PatternDetector,
    Restorer,
    Vault,
    default_detectors,
    egress_check,
)
from sllm.privacy.detect import union
from sllm.triage.calibration import Profile, auroc
from sllm.triage.hybrid import Hybrid
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import Triage

from . import peers
from .measure import GREEDY, TYPE_KV, Benchmark

Report = Callable[[dict[str, Any], dict[str, bool]], None]

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
    report_values: Report,
    embedded_draft: sllm.Model,
    embedded_target: sllm.Model,
    name: str,
    policy: str,
    length: str,
) -> None:
    model = embedded_draft if name == "draft" else embedded_target
    chosen = Policy(ask_privacy=policy == "default", rotations="no rotations" not in policy)
    messages = [{"role": "user", "content": SHORT if length == "short" else LONG}]
    control: list[float] = []
    tokens: list[float] = []
    grades: list[float] = []
    counts: list[int] = []
    with (
        ContextScorer(model, n_threads=1) as scorer,
        sllm.LocalTarget(model, n_ctx=1024, n_threads=1) as target,
    ):
        triage = Triage(scorer, chosen)
        triage.assess(messages, findings=())  # what a request without content gives is asked once for all

        def before() -> None:
            """The control and the peer, right before a grade, so that a slow minute hits all three."""
            began = time.process_time()
            prompt = model.chat(messages)
            control.append(time.process_time() - began)
            stream = sllm.generate(target, prompt, sampling=GREEDY, max_tokens=16)
            first = next(stream)  # from here on the prompt has been read
            began = time.process_time()
            n = sum(len(run.tokens) for run in stream)
            assert n > 0, first.text
            tokens.append((time.process_time() - began) / n)
            scorer.label_logprobs("another request", ["yes", "no"])  # nothing of this one is in memory

        def grade() -> None:
            n, began = scorer.n_computed, time.process_time()
            found = triage.assess(messages, findings=())
            grades.append(time.process_time() - began)
            counts.append(scorer.n_computed - n)
            assert found.tier == 2  # without a profile nothing else is promised
            assert found.profile_id is None

        before()
        grade()
        grades.clear()
        counts.clear()
        benchmark.pedantic(grade, setup=before, rounds=15, iterations=1, warmup_rounds=0)
        n_prompt = len(model.chat(messages))
    assert len(set(counts)) == 1, counts  # the same request costs the same tokens
    assert counts[0] > n_prompt
    report_values(
        {
            "model": name,
            "policy": policy,
            "n_prompt": n_prompt,
            "ms_per_grade": statistics.median(grades) * 1e3,
            "tokens_per_grade": counts[0],
            "ms_per_token_of_an_answer": statistics.median(tokens) * 1e3,
            "ms_of_length_alone": statistics.median(control) * 1e3,
        },
        {},
    )


# --- privacy ---


US_PER_CHAR = 5.0
S_PER_MEGABYTE = 2.0


def _corpus() -> Any:
    """The generator of private texts that the tests use."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import privacy_corpus
    finally:
        sys.path.pop(0)
    return privacy_corpus


PROSE_ZH = "春天来了，小狐狸在河边遇见了一只小熊。它们一起走过森林，看见树上的苹果红了。"
PROSE_EN = "One day the fox met a bear near the old mill, and they walked home through the rain. "
TEXTS: dict[str, Callable[[], str]] = {
    "english": lambda: PROSE_EN * 1200,
    "chinese": lambda: PROSE_ZH * 1200,
    "code": lambda: (ROOT / "sllm" / "worker" / "scheduler.py").read_text(encoding="utf-8") * 3,
    "private": lambda: "\n".join(case.text for case in _corpus().cases(2500, seed=3)),
}
# One megabyte of each. Every other character begins something that might be a value.
HOSTILE = {
    "digits": "1234567890",
    "dashes": "1-",
    "at": "a@a.",
    "phones": "+1234567 ",
    "iban": "GB82 ",
    "labels": "密码：",
    "capitals": "Ab ",
    "streets": "1 Ab ",
    "names": "Name: Aa ",
    "companies": "Aa, ",
    "han": "路",
}
PIECE = 10_000


@pytest.mark.parametrize("name", TEXTS)
def test_scan(benchmark: Benchmark, report_values: Report, name: str) -> None:
    text = TEXTS[name]()
    detectors = (PatternDetector(), NameDetector())  # the tagger's figures: test_privacy.py
    found: list[int] = []

    def scan() -> None:
        found.append(sum(len(list(detector.detect(text))) for detector in detectors))

    seconds = _cpu(benchmark, scan, 5)
    assert len(set(found)) == 1
    assert found[0] > 2500 if name == "private" else found[0] == 0, found[0]
    us = 1e6 * seconds / len(text)
    report_values(
        {"text": name, "n_chars": len(text), "n_found": found[0], "us_per_char": us},
        {f"at most {US_PER_CHAR:g} us a character": us <= US_PER_CHAR},
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_scan_hostile(benchmark: Benchmark, report_values: Report, name: str) -> None:
    unit = HOSTILE[name]
    text = unit * (1_000_000 // len(unit))
    detectors = default_detectors()
    found: list[Any] = []

    def scan() -> None:
        found[:] = [one for detector in detectors for one in detector.detect(text)]

    seconds = _cpu(benchmark, scan, 1)
    assert all(0 <= one.start < one.end <= len(text) for one in found)
    report_values(
        {
            "text": name,
            "n_chars": len(text),
            "n_found": len(found),
            "us_per_char": 1e6 * seconds / len(text),
            "seconds": seconds,
        },
        {f"a megabyte in at most {S_PER_MEGABYTE:g} s": seconds <= S_PER_MEGABYTE},
    )


def test_against_presidio(benchmark: Benchmark, report_values: Report, presidio: str) -> None:
    """Values of our generator, which ours were developed with and Presidio was not: no test of merit, only
    of what is covered. A value counts as found where one range, of whatever kind, holds all of it.
    """
    corpus = _corpus()
    cases, clean = list(corpus.cases(1000, seed=3)), list(corpus.clean(500, seed=21))
    texts = [case.text for case in cases] + clean
    n_chars = sum(map(len, texts))
    detectors = default_detectors()
    ours: list[list[tuple[int, int]]] = []

    def scan() -> None:
        findings = ([one for d in detectors for one in d.detect(text)] for text in texts)
        ours[:] = [[(one.start, one.end) for one in union(found)] for found in findings]

    long = {name: make() for name, make in TEXTS.items()}
    theirs = peers.presidio(presidio, [*texts, *long.values()])
    peer_seconds = sum(theirs.seconds[: len(texts)])
    peer_long = {
        name: 1e6 * seconds / len(text)
        for (name, text), seconds in zip(long.items(), theirs.seconds[len(texts) :], strict=True)
    }
    seconds = _cpu(benchmark, scan, 3)
    us, peer_us = 1e6 * seconds / n_chars, 1e6 * peer_seconds / n_chars
    recall, peer_recall = (_recall(cases, found) for found in (ours, theirs.found[: len(texts)]))
    false, peer_false = (
        sum(map(bool, found[len(cases) :])) / len(clean) for found in (ours, theirs.found[: len(texts)])
    )
    assert min(recall.values()) > 0.95, recall
    report_values(
        {
            "peer": f"presidio-analyzer {theirs.version}, patterns only",
            "n_values": len(cases),
            "us_per_char": us,
            "peer_us_per_char": peer_us,
            "ratio": peer_us / us,
            "peer_us_per_char_of_long_texts": peer_long,
            "recall": recall,
            "peer_recall": peer_recall,
            "false_positives": false,
            "peer_false_positives": peer_false,
        },
        {},
    )


def _recall(cases: Sequence[Any], found: Sequence[Sequence[tuple[int, int]]]) -> dict[str, float]:
    """Of the values in texts with Han characters, and of those in texts without."""
    hits: dict[str, list[bool]] = {"zh": [], "en": []}
    for case, ranges in zip(cases, found, strict=False):
        language = "zh" if any("\u4e00" <= char <= "\u9fff" for char in case.text) else "en"
        for start, end, _ in case.spans:
            hits[language].append(any(a <= start and end <= b for a, b in ranges))
    return {language: sum(hit) / len(hit) for language, hit in hits.items()}


@pytest.mark.parametrize("what", ["mask", "egress_check", "restore", "restore in pieces of 4"])
@pytest.mark.parametrize("name", TEXTS)
def test_mask_and_restore(benchmark: Benchmark, report_values: Report, name: str, what: str) -> None:
    """Four conversations of ten thousand characters each: a vault is of one conversation."""
    whole = TEXTS[name]()
    texts = [whole[i : i + PIECE] for i in range(0, 4 * PIECE, PIECE)]
    vaults = [Vault() for _ in texts]
    masked = [vault.mask(text) for vault, text in zip(vaults, texts, strict=True)]
    n_values = sum(map(len, vaults))
    assert n_values > 400 if name == "private" else n_values == 0, n_values
    pieces = [[one.text[i : i + 4] for i in range(0, len(one.text), 4)] for one in masked]
    outputs: list[str] = []

    def run() -> None:
        outputs.clear()
        for i, text in enumerate(texts):
            if what == "mask":
                vaults[i] = Vault()
                outputs.append(vaults[i].mask(text).text)
            elif what == "egress_check":
                egress_check(masked[i].text, vaults[i])
            else:
                restorer = Restorer(vaults[i].placeholders)
                parts = pieces[i] if "pieces" in what else [masked[i].text]
                outputs.append("".join([*map(restorer.feed, parts), restorer.finish()]))

    seconds = _cpu(benchmark, run, 3)
    n_chars = sum(map(len, texts))
    if what != "egress_check":
        # Of what was restored already, that is what stands in links.
        outputs = [vault.restore(out, in_links=True) for vault, out in zip(vaults, outputs, strict=True)]
        assert outputs == texts  # nothing is lost on the way there and back
    if name == "private":
        # The check passed what is masked, and does not pass what is not.
        for text, vault, one in zip(texts, vaults, masked, strict=True):
            assert one.text != text
            with pytest.raises(sllm.LeakError):
                egress_check(text, vault)
    values = {"text": name, "what": what, "n_values": n_values, "us_per_char": 1e6 * seconds / n_chars}
    report_values(values, {})


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
MAX_TOKENS = 64  # the longest right answer has fewer; a cut one would count as wrong


@dataclass(frozen=True)
class Request:
    text: str
    right: tuple[str, ...] = ()  # answers that are; none: nothing that these models could say
    private: bool = False

    @property
    def kind(self) -> str:
        return "private" if self.private else "taught" if self.right else "out of reach"


@dataclass(frozen=True)
class Sent:
    """A request sent to the cloud as it is, and what came back."""

    n_prompt: int
    n_answer: int
    correct: bool

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_answer


@dataclass
class Totals:
    """What 300 answers have cost, request by request in the order of the mix."""

    routes: list[str] = field(default_factory=list)
    tiers: list[int] = field(default_factory=list)  # who has answered
    cloud_in: list[int] = field(default_factory=list)
    cloud_out: list[int] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    easiness: list[tuple[float, float]] = field(default_factory=list)  # p_easy, and 1 - p_hard
    grade_seconds: list[float] = field(default_factory=list)
    masked: Counter[str] = field(default_factory=Counter)


def _requests() -> list[Request]:
    """The mix of ``training/labelled_requests.py``, and every fifth a private text in Chinese or English."""
    sys.path.insert(0, str(ROOT / "training"))
    try:
        labelled = importlib.import_module("labelled_requests")
    finally:
        sys.path.pop(0)
    known = labelled.answers()
    private = iter(_corpus().cases(N_PRIVATE, seed=11))
    mix = []
    for i in range(N_REQUESTS):
        if i % (N_REQUESTS // N_PRIVATE) == 0:
            mix.append(Request(next(private).text, private=True))
        else:
            row = labelled.row("pipeline", i, known)
            mix.append(Request(row["prompt"], tuple(row["reference"])))
    return mix


def _right(text: str, request: Request) -> bool:
    """As ``sllm calibrate`` compares."""
    return _folded(text) in map(_folded, request.right)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".。!！")


@pytest.fixture(scope="module")
def mix() -> list[Request]:
    return _requests()


@pytest.fixture(scope="module")
def cloud(embedded_target: sllm.Model) -> Iterator[sllm.RemoteTarget]:
    """The embedded target behind a worker on loopback: as good as a cloud can be that has this text."""
    settings: dict[str, Any] = {"flash_attn": True, "type_k": TYPE_KV, "type_v": TYPE_KV, "n_threads": 1}
    with (
        sllm.Worker(embedded_target, insecure=True, n_ctx=1024, **settings) as worker,
        sllm.connect(worker.uri) as remote,
    ):
        yield remote.target()


@pytest.fixture(scope="module")
def everything(cloud: sllm.RemoteTarget, embedded_target: sllm.Model, mix: list[Request]) -> list[Sent]:
    """All of the mix sent to the cloud as it is."""
    sent = []
    for request in mix:
        prompt = embedded_target.chat([{"role": "user", "content": request.text}])
        stream = sllm.generate(cloud, prompt, sampling=GREEDY, max_tokens=MAX_TOKENS)
        text = stream.text()
        sent.append(Sent(len(prompt), stream.stats.n_tokens, _right(text, request)))
    return sent


@pytest.mark.parametrize("verify", ["uncertain", "never"])
def test_pipeline(
    benchmark: Benchmark,
    report_values: Report,
    embedded_target: sllm.Model,
    cloud: sllm.RemoteTarget,
    mix: list[Request],
    everything: list[Sent],
    verify: Any,
) -> None:
    """``small`` is the embedded target, for the shipped profile is of it; it also answers tier 2 and drafts
    for the cloud, which has the same text, so no answer gets better there: only who answers, and at what
    price, is measured.
    """
    totals = Totals()
    with ExitStack() as stack:
        scorer = stack.enter_context(ContextScorer(embedded_target, n_threads=1))
        hybrid = stack.enter_context(
            Hybrid(
                embedded_target,
                cloud=cloud,
                triage=Triage(scorer, Policy(ask_privacy=False), Profile.load(TARGET_PROFILE)),
                privacy="deidentify",
                verify=verify,
                sampling=GREEDY,
                max_tokens=MAX_TOKENS,
                n_threads=1,
            )
        )
        benchmark.pedantic(
            lambda: [_ask(hybrid, request, totals) for request in mix],
            setup=lambda: None,
            rounds=1,
            iterations=1,
            warmup_rounds=0,
        )
    n = len(mix)
    assert len(totals.tiers) == n
    spent = [a + b for a, b in zip(totals.cloud_in, totals.cloud_out, strict=True)]
    by_route = {}
    for route in sorted(set(totals.routes)):
        which = [i for i in range(n) if totals.routes[i] == route]
        by_route[route] = {
            "requests": len(which),
            "cloud_tokens_saved": _saved([spent[i] for i in which], [everything[i].n_tokens for i in which]),
        }
    values = {
        "verify": verify,
        "ms_per_grade": statistics.median(totals.grade_seconds) * 1e3,
        **{f"share_tier{tier}": totals.tiers.count(tier) / n for tier in (1, 2, 3)},
        "cloud_tokens": sum(spent),
        "cloud_tokens_of_everything": sum(one.n_tokens for one in everything),
        "cloud_tokens_saved": _saved(spent, [one.n_tokens for one in everything]),
        # What a cloud writes costs it a pass each, what it reads hardly any: they are told apart.
        "cloud_tokens_read_saved": _saved(totals.cloud_in, [one.n_prompt for one in everything]),
        "cloud_tokens_written_saved": _saved(totals.cloud_out, [one.n_answer for one in everything]),
        "by_route": by_route,
        "tiers_by_kind": {
            kind: [
                sum(mix[i].kind == kind and totals.tiers[i] == tier for i in range(n)) for tier in (1, 2, 3)
            ]
            for kind in ("taught", "out of reach", "private")
        },
        "n_masked": sum(totals.masked.values()),
        **_beside_length(mix, totals, everything),
    }
    report_values(values, {})


def _saved(spent: Sequence[int], of: Sequence[int]) -> float:
    return 1 - sum(spent) / max(sum(of), 1)


def _beside_length(mix: Sequence[Request], totals: Totals, everything: Sequence[Sent]) -> dict[str, Any]:
    """The grade and prompt length alone: how well each tells apart, and who would answer if as many of the
    shortest requests stayed in tier 1, and as many of the longest went to the cloud, as ours did.

    Private texts take no part: they have no right answer, and are sent by another rule.
    """
    which = [i for i, request in enumerate(mix) if not request.private]
    lengths = [float(everything[i].n_prompt) for i in which]
    taught = [bool(mix[i].right) for i in which]
    correct = [everything[i].correct for i in which]  # of the same model, so of the small one's own answer
    order = sorted(which, key=lambda i: (everything[i].n_prompt, i))
    ours: dict[int, list[int]] = {tier: [i for i in which if totals.tiers[i] == tier] for tier in (1, 3)}
    admitted = [i for i in which if totals.routes[i].startswith("small")]  # by the grade, whatever came then
    control = {1: order[: len(ours[1])], 3: order[len(order) - len(ours[3]) :]}
    found: dict[str, Any] = {
        "tier1_answers": len(ours[1]),
        "tier1_wrong": sum(not totals.correct[i] for i in ours[1]),
        "tier1_wrong_by_length": sum(not everything[i].correct for i in control[1]),
        "graded_tier1": len(admitted),
        "graded_tier1_wrong": sum(not everything[i].correct for i in admitted),
        "graded_tier1_wrong_by_length": sum(not everything[i].correct for i in order[: len(admitted)]),
        "tier3_requests": len(ours[3]),
        "tier3_out_of_reach": sum(not mix[i].right for i in ours[3]),
        "tier3_out_of_reach_by_length": sum(not mix[i].right for i in control[3]),
        "all_sent_right": sum(correct),
        "all_answers_right": sum(totals.correct[i] for i in which),
    }
    grades = {"p_easy": 0, "p_hard": 1}
    for label, truth in (("taught", taught), ("answer_right", correct)):
        for name, which_grade in grades.items():
            scores = [totals.easiness[i][which_grade] for i in which]
            found[f"auroc_{label}_by_{name}"] = auroc(scores, truth)
        found[f"auroc_{label}_by_length"] = auroc([-length for length in lengths], truth)
    return found


def _ask(hybrid: Hybrid, request: Request, totals: Totals) -> None:
    hybrid.new_conversation()
    began = time.process_time()
    answer = hybrid.ask([{"role": "user", "content": request.text}])
    totals.grade_seconds.append(time.process_time() - began)  # the answer is made when it is read
    graded = answer.grade
    text = answer.text()
    stats = answer.stats
    route = " > ".join(answer.route)
    totals.routes.append(route)
    totals.tiers.append({"small": 1, "cloud": 3}.get(route, 2))
    totals.cloud_in.append(stats.cloud_in)
    totals.cloud_out.append(stats.cloud_out)
    totals.correct.append(_right(text, request))
    totals.easiness.append((graded.p_easy, 1 - graded.p_hard))
    totals.masked.update(answer.masked)
    if request.private:
        assert graded.private
        assert answer.masked or stats.cloud_in + stats.cloud_out == 0  # as it is, nothing private leaves

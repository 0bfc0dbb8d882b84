"""A real model beside the embedded pair: SmolLM2-135M-Instruct, where it is installed (``smollm2.py``).

What is measured on the embedded pair elsewhere is measured on both here, with the same prompts as far as both
know what to say: plain decoding, drafts (of the target's own first layers, and prompt lookup), a worker
behind a link, a split, its codecs, its audit, grades, and texts whose private values go there and back.

Its weights are Q4_1, of which a batch of several rows and one row at a time need not be equal to the last bit
(see ``sllm inspect``), so texts with a draft and without are counted here, and not required to be equal.
"""

from __future__ import annotations

import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sllm
from sllm.draft.drafters import Drafter, ModelDrafter, NGramDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.privacy import Restorer, Vault, egress_check
from sllm.split.audit import audit
from sllm.split.codec_report import codec_report
from sllm.triage.calibration import auroc
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import Triage

from . import models, smollm2
from .far_end import LinkProcess, WorkerProcess
from .measure import (
    GREEDY,
    TYPE_KV,
    Benchmark,
    Figures,
    RemoteFigures,
    Sample,
    Tokens,
    compare,
    generated,
    local_target,
)
from .test_remote import Client, Course, figures_of

pytestmark = pytest.mark.timeout(1800)

Report = Callable[[Figures], None]
ReportValues = Callable[[dict[str, Any], dict[str, bool]], None]
RemoteReport = Callable[[Sequence[RemoteFigures]], None]

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"flash_attn": True, "type_k": TYPE_KV, "type_v": TYPE_KV, "n_threads": 1}
MAX_TOKENS = 48

PASSAGE = (
    "The fox went down to the river in the morning. The river was cold and clear. The fox saw a fish in the"
    " river, and the fish saw the fox. The fox waited for a long time, but the fish did not come."
)
CHATS = (
    "Tell me a story about a little mouse and a lamp.",
    "What does a cow eat?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Give me three tips for a good night's sleep.",
    "Describe a busy street in a big city.",
)
COPIES = (
    f"Repeat this text word for word: {PASSAGE}",
    f"Correct the spelling of this text and write it down again: {PASSAGE}",
    f"Summarise this text: {PASSAGE}",
)


@dataclass(frozen=True)
class Subject:
    """A model, and the model drafts that there are for it, by name."""

    path: Path
    drafts: dict[str, Callable[[], Path]]
    head: int

    @property
    def usual(self) -> str:
        """The draft that the other benchmarks use."""
        return next(iter(self.drafts))


def _first(path: Path, n_layer: int) -> Callable[[], Path]:
    return lambda: models.first_layers(path, n_layer)


def _subjects() -> dict[str, Subject]:
    drafts = {"trained": lambda: DRAFT} | {f"first {n}": _first(TARGET, n) for n in (2, 4, 6)}
    found = {"embedded": Subject(TARGET, drafts, 2)}
    path = smollm2.find()
    if path is not None:
        found["smollm2"] = Subject(path, {f"first {n}": _first(path, n) for n in (8, 2, 4, 15, 22, 26)}, 6)
    return found


SUBJECTS = _subjects()
NAMES = ("embedded", "smollm2")


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param not in SUBJECTS:
        pytest.skip(smollm2.MISSING)
    return SUBJECTS[request.param]


@pytest.fixture(scope="module")
def model(subject: Subject) -> Iterator[sllm.Model]:
    with sllm.Model(subject.path) as model:
        yield model


def chats(model: sllm.Model, texts: Sequence[str]) -> list[Tokens]:
    return [np.asarray(model.chat([{"role": "user", "content": text}]), dtype=np.int32) for text in texts]


@contextmanager
def drafting(subject: Subject, name: str) -> Iterator[Drafter]:
    if name == "ngram":
        yield NGramDrafter()
        return
    with (
        sllm.Model(subject.drafts[name]()) as draft,
        ModelDrafter(draft, n_ctx=1024, **SETTINGS) as drafter,
    ):
        yield drafter


def once(benchmark: Benchmark, run: Callable[[], Any]) -> Any:
    """What ``run`` returns; for counts and shares, which are the same every time."""
    return benchmark.pedantic(run, setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0)


def same_share(texts: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]) -> float:
    return statistics.mean(a == b for a, b in zip(texts, others, strict=True))


# --- plain decoding ---


def test_decode(benchmark: Benchmark, report: Report, model: sllm.Model) -> None:
    """``generate()``, selection and text included, against ``Context.decode()`` of the same tokens, which
    has the logits and selects none.
    """
    (prompt,) = chats(model, CHATS[:1])
    with local_target(model, n_threads=1) as target, model.context(n_ctx=1024, **SETTINGS) as context:
        (text,) = generated(target, [prompt], max_tokens=MAX_TOKENS).texts

        def bare() -> Sample:
            context.memory.clear()
            context.decode(prompt)
            began = time.perf_counter()
            for token in text[:-1]:
                context.decode([token], logits="last")
            return Sample(len(text) - 1, time.perf_counter() - began)

        def ours() -> Sample:
            stream = sllm.generate(target, prompt, sampling=GREEDY, max_tokens=MAX_TOKENS)
            first = next(stream)  # the prompt has been read
            began = time.perf_counter()
            tokens = [*first.tokens, *(token for run in stream for token in run.tokens)]
            return Sample(len(tokens) - len(first.tokens), time.perf_counter() - began, (tuple(tokens),))

        figures, samples, _ = compare(benchmark, ours, bare, "Context.decode()", rounds=5)
    assert {sample.texts for sample in samples} == {(text,)}
    figures.more["n_vocab"] = model.vocab.n_tokens
    report(figures)


ROWS = (1, 2, 4, 8, 16)


def test_cost_of_rows(benchmark: Benchmark, report_values: ReportValues, model: sllm.Model) -> None:
    """What a pass of several rows costs, in passes of one row: the bound on what speculation can gain."""
    (prompt,) = chats(model, CHATS[:1])
    seconds: dict[int, list[float]] = {n: [] for n in ROWS}
    with model.context(n_ctx=1024, **SETTINGS) as context:
        context.decode(prompt)

        def run() -> None:
            for n in ROWS:
                began = time.thread_time()
                context.decode(np.full(n, prompt[-1]), pos=len(prompt), logits="all")
                seconds[n].append(time.thread_time() - began)

        run()
        for taken in seconds.values():
            taken.clear()
        benchmark.pedantic(run, setup=lambda: None, rounds=15, iterations=1, warmup_rounds=0)
    one = statistics.median(seconds[1])
    report_values({f"{n} rows": statistics.median(seconds[n]) / one for n in ROWS[1:]}, {})


# --- drafts ---


def test_what_drafts_are_worth(
    benchmark: Benchmark, report_values: ReportValues, subject: Subject, model: sllm.Model
) -> None:
    """Along the target's own answers: the share of positions where a draft, behind the text itself and under
    the same noise, selects the target's token; and what the draft's weights are of the target's.
    """
    with local_target(model, n_threads=1) as target, ExitStack() as stack:
        drafters = {name: stack.enter_context(drafting(subject, name)) for name in (*subject.drafts, "ngram")}
        values = once(benchmark, lambda: _agreements(target, drafters, chats(model, CHATS)))
        for name, drafter in drafters.items():
            if isinstance(drafter, ModelDrafter):
                values[f"size of {name}"] = drafter.model.size_bytes / model.size_bytes
    report_values(values, {})


def _agreements(
    target: sllm.LocalTarget, drafters: dict[str, Drafter], prompts: Sequence[Tokens]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for temperature in (0.0, 0.7, 1.0):
        sampling = sllm.SamplingParams(temperature=temperature, seed=1)
        texts = generated(target, prompts, sampling=sampling, max_tokens=MAX_TOKENS).texts
        values[f"n_positions at {temperature:g}"] = sum(map(len, texts))
        for name, drafter in drafters.items():
            right = [
                hit
                for prompt, text in zip(prompts, texts, strict=True)
                for hit in _right(drafter, prompt, text, sampling)
            ]
            values[f"{name} at {temperature:g}"] = statistics.mean(right)
    return values


def _right(
    drafter: Drafter, prompt: Tokens, text: Sequence[int], sampling: sllm.SamplingParams
) -> list[bool]:
    drafter.open(prompt.tolist(), sampling)
    return [
        list(drafter.draft([*prompt.tolist(), *text[:i]], [], 1, 0.0))[:1] == [token]
        for i, token in enumerate(text)
    ]


@pytest.mark.parametrize("texts", ["chats", "copies"])
@pytest.mark.parametrize("draft", ["usual", "ngram"])
def test_speculation(
    benchmark: Benchmark, report: Report, subject: Subject, model: sllm.Model, draft: str, texts: str
) -> None:
    """With a draft and without, greedy, on one thread; ``copies`` are answers that repeat their prompt."""
    name = subject.usual if draft == "usual" else draft
    prompts = chats(model, CHATS if texts == "chats" else COPIES)
    with local_target(model, n_threads=1) as target, drafting(subject, name) as drafter:
        figures, ours, plain = compare(
            benchmark,
            lambda: generated(target, prompts, draft=drafter, max_tokens=MAX_TOKENS),
            lambda: generated(target, prompts, max_tokens=MAX_TOKENS),
            "generate() without a draft",
            rounds=3,
        )
    figures.more |= {"draft": name, "same_texts": same_share(_all(ours), _all(plain))}
    report(figures)


def _all(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [text for sample in samples for text in sample.texts]


# --- a worker behind a link ---


@pytest.fixture(scope="module")
def worker(subject: Subject) -> Iterator[WorkerProcess]:
    with WorkerProcess(subject.path, n_ctx=1024, **SETTINGS) as worker:
        yield worker


@pytest.mark.parametrize("draft", ["usual", "ngram"])
@pytest.mark.parametrize("texts", ["chats", "copies"])
@pytest.mark.parametrize("rtt_ms", [0, 50])
def test_worker(
    benchmark: Benchmark,
    report_remote: RemoteReport,
    subject: Subject,
    model: sllm.Model,
    worker: WorkerProcess,
    rtt_ms: int,
    texts: str,
    draft: str,
) -> None:
    """Streaming, and hints with run-ahead, taking turns; worker, link and draft share this machine."""
    rtt, name = rtt_ms / 1e3, subject.usual if draft == "usual" else draft
    prompts = chats(model, CHATS[:3] if texts == "chats" else COPIES)
    with (
        LinkProcess(worker.port, rtt=rtt) as link,
        sllm.connect(worker.uri_behind(link)) as remote,
        drafting(subject, name) as drafter,
    ):
        client = Client(remote, link, drafter, GREEDY, rtt)
        course = Course(client, prompts, MAX_TOKENS, [("stream", "stream", 0)], rounds=2)
        taken = course.run(benchmark)
    found = [
        figures_of(way, samples, taken, rtt_ms=rtt_ms, mbit_s=None, paced=False)
        for way, samples in taken.items()
    ]
    found[-1].more |= {
        "draft": name,
        "same_texts": same_share(_all(taken["run-ahead"]), _all(taken["stream"])),
    }
    report_remote([found[-1], *found[:-1]])


# --- a split ---


@pytest.mark.parametrize("codec", ["f32", "f16", "q8", "q4"])
def test_split(
    benchmark: Benchmark,
    report_values: ReportValues,
    subject: Subject,
    model: sllm.Model,
    codec: str,
) -> None:
    """First layers and the last one here, the middle in a worker: rounds and bytes with a draft and without,
    and whether the texts are the whole model's.
    """
    prompts = chats(model, CHATS[:3])
    with ExitStack() as stack:
        target = stack.enter_context(local_target(model, n_threads=1))
        expected = generated(target, prompts, max_tokens=MAX_TOKENS).texts
        worker = stack.enter_context(
            sllm.Worker(subject.path, layers=True, insecure=True, n_ctx=1024, **SETTINGS)
        )
        remote = stack.enter_context(sllm.connect(worker.uri))
        split = stack.enter_context(
            sllm.SplitTarget(
                subject.path, head=subject.head, tail=1, middle=remote, codec=codec, n_ctx=1024, **SETTINGS
            )
        )
        values: dict[str, Any] = {"codec": codec, "n_embd": model.n_embd}
        once(benchmark, lambda: _split_texts(subject, split, prompts[:1], None))
        for name in (None, subject.usual, "ngram"):
            texts, figures = _split_texts(subject, split, prompts, name)
            about = name or "no draft"
            values |= {f"{key}, {about}": value for key, value in figures.items()}
            values[f"texts of the whole model, {about}"] = same_share(texts, expected)
    report_values(values, {})


def _split_texts(
    subject: Subject, split: sllm.SplitTarget, prompts: Sequence[Tokens], name: str | None
) -> tuple[list[tuple[int, ...]], dict[str, float]]:
    texts, n_passes, n_bytes = [], 0, 0
    with ExitStack() as stack:
        drafter = None if name is None else stack.enter_context(drafting(subject, name))
        for prompt in prompts:
            stream = sllm.generate(split, prompt, draft=drafter, sampling=GREEDY, max_tokens=MAX_TOKENS)
            texts.append(tuple(token for run in stream for token in run.tokens))
            stats = stream.stats
            assert stats.remote is not None
            n_passes += stats.n_passes
            n_bytes += stats.remote.bytes_up + stats.remote.bytes_down
    n_tokens = sum(map(len, texts))
    return texts, {"tokens per round": n_tokens / n_passes, "message bytes per token": n_bytes / n_tokens}


def test_codecs(
    benchmark: Benchmark, report_values: ReportValues, subject: Subject, model: sllm.Model
) -> None:
    """``sllm codec-report`` on what the model itself has written."""
    with local_target(model, n_threads=1) as target:
        sampling = sllm.SamplingParams(temperature=0.8, seed=3)
        texts = generated(target, chats(model, CHATS), sampling=sampling, max_tokens=MAX_TOKENS).texts
    text = " ".join(model.vocab.decode(list(tokens)) for tokens in texts)
    report = once(benchmark, lambda: codec_report(subject.path, text, head=subject.head, n_threads=1))
    values: dict[str, Any] = {"n_tokens": report.n_tokens, "perplexity": report.perplexity}
    for codec in report.codecs:
        values |= {
            f"{codec.codec} row bytes": codec.row_bytes,
            f"{codec.codec} KL": codec.kl,
            f"{codec.codec} same choice": codec.same_choice,
            f"{codec.codec} perplexity": codec.perplexity / report.perplexity,
        }
    report_values(values, {})


def test_audit(
    benchmark: Benchmark, report_values: ReportValues, subject: Subject, model: sllm.Model
) -> None:
    """``sllm audit`` of the same split, on the passage; and, for what an attacker could try instead of the
    nearest embeddings, the share of the tokens among the model's own likeliest ones.
    """
    n_tokens = 16
    report = once(
        benchmark,
        lambda: audit(subject.path, PASSAGE, head=subject.head, max_tokens=n_tokens, n_threads=1),
    )
    values: dict[str, Any] = {"n_vocab": report.n_vocab, "n_candidates": report.n_candidates}
    for head in report.heads:
        values |= {
            f"after {head.layers}: nearest embedding": max(head.cosine, head.dot, head.l2),
            f"after {head.layers}: matched": head.matched,
            f"after {head.layers}: matched, true prefix": head.matched_true_prefix,
            f"after {head.layers}: among candidates": head.among_candidates,
        }
    for tail in report.tails:
        values[f"{tail.layers} left: lens"] = tail.lens
        values[f"{tail.layers} left: run"] = tail.run
    tokens = model.vocab.encode(PASSAGE)[: n_tokens + 1]
    with model.context(n_ctx=256, **SETTINGS) as context:
        rows = context.decode(tokens[:-1], logits="all")
        assert rows is not None
        ranks = [int((row > row[token]).sum()) for row, token in zip(rows, tokens[1:], strict=True)]
    values["among the model's 512 likeliest"] = statistics.mean(rank < 512 for rank in ranks)
    values["among its 16 likeliest"] = statistics.mean(rank < 16 for rank in ranks)
    report_values(values, {})


# --- grades, and private values ---

N_GRADED = 120


def _module(folder: str, name: str) -> Any:
    """A module of the tests or of the training, which are no packages."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_grades(benchmark: Benchmark, report_values: ReportValues, model: sllm.Model) -> None:
    """Without a profile: how well the labels' shares, and prompt length alone, tell easy requests from hard
    ones (English rows of ``training/labelled_requests.py``), and what a grade costs in tokens of an answer.
    """
    labelled = _module("training", "labelled_requests")
    known = labelled.answers()
    rows = (labelled.row("real model", i, known) for i in range(100 * N_GRADED))
    chosen = [row for row in rows if row["prompt"].isascii()][:N_GRADED]
    easy = [row["label"] == "easy" for row in chosen]
    with ContextScorer(model, n_threads=1) as scorer, local_target(model, n_threads=1) as target:
        triage = Triage(scorer, Policy(ask_privacy=False))
        triage.assess([{"role": "user", "content": "Hello"}], findings=())  # what all requests share
        began = time.process_time()
        grades = once(
            benchmark,
            lambda: [
                triage.assess([{"role": "user", "content": row["prompt"]}], findings=()) for row in chosen
            ],
        )
        seconds = time.process_time() - began
        plain = generated(target, chats(model, CHATS[:1]), max_tokens=MAX_TOKENS)
    lengths = [-float(len(tokens)) for tokens in chats(model, [row["prompt"] for row in chosen])]
    report_values(
        {
            "n_easy": sum(easy),
            "n_hard": len(easy) - sum(easy),
            "auroc_by_p_easy": auroc([grade.p_easy for grade in grades], easy),
            "auroc_by_p_hard": auroc([1 - grade.p_hard for grade in grades], easy),
            "auroc_by_length": auroc(lengths, easy),
            "tokens_of_an_answer_per_grade": seconds / len(chosen) * plain.tokens_per_s,
        },
        {},
    )


N_MASKED = 24
PLACEHOLDER = re.compile(r"\[[A-Z_]+_\d+_\w+\]")


def test_masked_round_trips(benchmark: Benchmark, report_values: ReportValues, model: sllm.Model) -> None:
    """English texts with private values, masked, copied by the model, and restored: how many placeholders
    come back whole, and that nothing private went there.
    """
    corpus = _module("tests", "privacy_corpus")
    texts = [case.text for case in corpus.cases(600, seed=5) if case.text.isascii()][:N_MASKED]
    with local_target(model, n_threads=1) as target:
        found = once(benchmark, lambda: [_there_and_back(target, text) for text in texts])
    sums = {name: sum(one[name] for one in found) for name in found[0]}
    report_values({"texts": len(texts), **sums}, {})


def _there_and_back(target: sllm.LocalTarget, text: str) -> dict[str, int]:
    vault = Vault()

    def restored(text: str) -> str:
        restorer = Restorer(vault.placeholders)
        return restorer.feed(text) + restorer.finish()

    masked = vault.mask(f"Repeat this text word for word: {text}").text
    egress_check(masked, vault)
    assert vault.restore(masked, in_links=True).endswith(text)
    (prompt,) = chats(target.model, [masked])
    answer = sllm.generate(target, prompt, sampling=GREEDY, max_tokens=96).text()
    back, held = restored(answer), set(PLACEHOLDER.findall(masked))
    values = [restored(placeholder) for placeholder in held]
    n_back = sum(value in back for value in values)
    return {
        "values": len(values),
        "values that came back": n_back,
        "texts with all of theirs": n_back == len(values),
        "placeholders of the model's own making": len(PLACEHOLDER.findall(back)),
    }

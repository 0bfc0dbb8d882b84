"""The share of placeholders that comes back restored from models that reword a masked text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import sllm
from sllm.embedded import DRAFT, TARGET

from . import smollm2
from .measure import Benchmark, local_target
from .rewording import CHINESE, ENGLISH, INSTRUCTIONS, SCHEMA, TO_SCHEMA, Counts, count, holds_json, masked

Report = Callable[[dict[str, Any], dict[str, bool]], None]

MAX_TOKENS = 60
MAX_TOKENS_OF_SCHEMA = 96  # enough for most instances
MODELS: dict[str, Callable[[], Path | None]] = {
    "smollm2": smollm2.find,
    "embedded target": lambda: TARGET,
    "embedded draft": lambda: DRAFT,
}


@pytest.fixture(scope="module", params=MODELS)
def target(request: pytest.FixtureRequest) -> Iterator[sllm.LocalTarget]:
    path = MODELS[request.param]()
    if path is None:
        pytest.skip(smollm2.MISSING)
    with sllm.Model(path) as model, local_target(model, n_threads=1) as target:
        yield target


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("task", [*INSTRUCTIONS, TO_SCHEMA])
def test_what_comes_back(
    benchmark: Benchmark, report_values: Report, target: sllm.LocalTarget, task: str, temperature: float
) -> None:
    """Nonces are drawn anew in each run, so counts differ a little from run to run, also without sampling."""
    if task == TO_SCHEMA:
        pytest.importorskip("llguidance", reason="needs the extra grammar")

    def run() -> list[Counts]:
        return [
            _answered(target, task, language, text, temperature, seed=n)
            for language, texts in enumerate((ENGLISH, CHINESE))
            for n, text in enumerate(texts)
        ]

    rows = benchmark.pedantic(run, setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0)
    sums = Counts.sum(rows)
    values = {
        "answers": len(rows),
        "placeholders sent": sums.sent,
        "mentions": sums.mentions,
        "exact": sums.exact,
        "restored": sums.restored,
        "in links": sums.in_links,
        "misses": sums.unknown,
        "of another kind": sums.wrong,
    }
    if sums.mentions:
        values["share restored"] = sums.restored / sums.mentions
    if "json" in task:
        values |= {"JSON before": sums.json_before, "and after": sums.json_after}
    report_values(values, {})
    assert sums.sent == 2 * 26  # each text has its placeholders, so that there is something to come back


def _answered(
    target: sllm.LocalTarget, task: str, language: int, text: str, temperature: float, seed: int
) -> Counts:
    vault, sent = masked(text)
    sampling = sllm.SamplingParams(temperature=temperature, seed=seed)
    max_tokens = MAX_TOKENS
    if task == TO_SCHEMA:
        task, max_tokens = "json", MAX_TOKENS_OF_SCHEMA
        sampling = dataclasses.replace(sampling, json_schema=SCHEMA)
    instruction = INSTRUCTIONS[task][language]
    prompt = target.model.chat([{"role": "user", "content": instruction + sent}])
    answer = sllm.generate(target, prompt, sampling=sampling, max_tokens=max_tokens).text()
    return count(vault, sent, answer)


# ---- the counting itself, on answers that are known --------------------------------------------------------


def test_masked_texts_hold_no_value() -> None:
    for text in (*ENGLISH, *CHINESE):
        vault, sent = masked(text)
        values = vault.placeholders.values
        assert 1 <= len(values) <= 6
        assert not any(value in sent for value in values)
        assert all(value in vault.restore(sent) for value in values)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("{0}, {1} et {2}", Counts(exact=3, restored=3)),
        ("Nom : NOM_1_{n}, mail [EMAIL_2_{n}]", Counts(exact=1, restored=2)),
        ("[MAIL_1_{n}] [CARD_1_{n}]", Counts(restored=1, wrong=1, unknown=1)),
        ("phone 1 {n}", Counts(restored=1)),  # of that kind there is one thing, and it is meant
        ("[NAME_9_{n}] [NAME_1_b0b0] ({n})", Counts(unknown=3)),
        ("![x](https://site.example/{0})", Counts(exact=1, in_links=1)),
        ("nothing", Counts()),
        ('{{"who": "{0}", "and": {2}}}', Counts(exact=2, restored=2)),
        ('Here: {{"who": "{0}"}} Done.', Counts(exact=1, restored=1, json_before=1, json_after=1)),
        ("[1, 2]", Counts(json_before=1, json_after=1)),
    ],
)
def test_counts(answer: str, expected: Counts) -> None:
    vault, sent = masked("«NAME:Ada Moss» has «EMAIL:ada@post.example» and «PHONE:020 7946 0000».")
    nonce = vault.placeholders.nonces[0]
    placeholders = (f"[NAME_1_{nonce}]", f"[EMAIL_2_{nonce}]", f"[PHONE_3_{nonce}]")
    found = count(vault, sent, answer.format(*placeholders, n=nonce))
    assert found == Counts.sum([expected, Counts(sent=3)])


def test_what_counts_as_json() -> None:
    texts: Sequence[tuple[str, bool]] = [
        ('{"a": [1]}', True),
        ('```json\n{"a": 1}\n```', True),
        ('{"a": ', False),
        ("no object here", False),
        ("[NAME_1_k7q4]", False),
        ("7", False),
        ("", False),
    ]
    assert [holds_json(text) for text, _ in texts] == [expected for _, expected in texts]

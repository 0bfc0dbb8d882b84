"""A serving engine behind a slow link, beside its own plain stream: how many requests a token takes, how fast
the text comes, and how much of it is certain by a certificate. The engine is the tests' own over the embedded
target, paced; engine and link are processes of their own, and every text is compared token by token.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

import sllm
from sllm.embedded import DRAFT, TARGET
from sllm.http_engine.generation import EngineStats

from .far_end import EngineProcess, LinkProcess
from .measure import GREEDY, Benchmark, Tokens
from .test_remote import PacedDrafter

pytestmark = pytest.mark.timeout(1800)

PASS_SECONDS = 0.030
DRAFT_SECONDS = 0.010
MAX_TOKENS = 64
ROUNDS = 3
PROMPTS = ("Once upon a time", "The little boat", "What comes after spring?")
SAMPLED = sllm.SamplingParams(temperature=0.8, top_k=20, seed=2)
DEFAULT = sllm.SamplingParams(seed=2)  # top_k 40, of which the engine tells 20
OPEN = sllm.SamplingParams(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0, seed=2)

SETTINGS: dict[str, Any] = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0", "n_threads": 1}

WAYS: dict[str, tuple[sllm.SamplingParams, bool]] = {
    "greedy": (GREEDY, False),
    "greedy, draft": (GREEDY, True),
    "sampled": (SAMPLED, False),
    "sampled, draft": (SAMPLED, True),
    "top_k 40, draft": (DEFAULT, True),
    "top_p alone, draft": (OPEN, True),
}


@dataclass
class Way:
    """What one way did, over all texts."""

    n_tokens: int = 0
    n_requests: int = 0
    n_certified: int = 0
    n_positions: int = 0
    n_raised: int = 0
    n_undecided: int = 0
    n_bytes: int = 0
    ratios: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)

    def info(self) -> dict[str, Any]:
        return {
            "tokens_per_s": statistics.median(self.speeds) if self.speeds else None,
            "ratio_vs_stream": statistics.median(self.ratios) if self.ratios else None,
            "requests_per_token": self.n_requests / max(self.n_tokens, 1),
            "certified_share": self.n_certified / max(self.n_positions, 1),
            "raised_share": self.n_raised / max(self.n_positions, 1),
            "undecided_texts": self.n_undecided,
            "bytes_per_token": self.n_bytes / max(self.n_tokens, 1),
        }


@contextmanager
def engine_behind(api: str, rtt: float) -> Iterator[tuple[sllm.Model, sllm.EngineTarget, int, PacedDrafter]]:
    with ExitStack() as stack:
        engine = stack.enter_context(EngineProcess(TARGET, api, pace=PASS_SECONDS, n_ctx=512))
        link = stack.enter_context(LinkProcess(engine.port, rtt=rtt))
        model = stack.enter_context(sllm.Model(TARGET))
        small = stack.enter_context(sllm.Model(DRAFT))
        drafter = stack.enter_context(PacedDrafter(small, DRAFT_SECONDS, n_ctx=512, **SETTINGS))
        target = stack.enter_context(sllm.EngineTarget(f"http://127.0.0.1:{link.port}/v1", model))
        yield model, target, link.port, drafter


def plain_stream(port: int, api: str, prompt: Tokens, n: int) -> tuple[list[int], float]:
    """The engine's own greedy stream, read by nothing of ours: its tokens, and the seconds to the last."""
    body: dict[str, Any]
    if api == "vllm":
        path, body = "/v1/completions", {"prompt": prompt.tolist(), "max_tokens": n, "logprobs": None}
        body["return_token_ids"] = True
    elif api == "sglang":
        path, body = (
            "/generate",
            {"input_ids": prompt.tolist(), "top_logprobs_num": 0, "logprob_start_len": -1},
        )
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": n, "ignore_eos": True}
    else:
        path, body = "/completion", {"prompt": prompt.tolist(), "n_predict": n}
    tokens: list[int] = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began = ended = time.perf_counter()
    body |= {"temperature": 0, "stream": True, "ignore_eos": True}
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            new = (
                event["choices"][0]["token_ids"] if event.get("choices") else event.get("tokens")
            ) or event.get("output_ids", [])[len(tokens) :]
            if new:
                tokens += new
                ended = time.perf_counter()
    connection.close()
    return tokens, ended - began


def text_of(
    target: sllm.EngineTarget, prompt: Tokens, sampling: sllm.SamplingParams, draft: Any, n: int
) -> tuple[list[int], float, EngineStats, bool]:
    """A text, the seconds to its last token, what it has cost, and whether it was decided to its end."""
    tokens: list[int] = []
    decided = True
    began = ended = time.perf_counter()
    with sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=n) as stream:
        try:
            for run in stream:
                tokens += run.tokens
                ended = time.perf_counter()
        except sllm.UndecidedError:
            decided = False
        stats = stream.stats.remote
    assert isinstance(stats, EngineStats)
    return tokens, ended - began, stats, decided


def truth(model: sllm.Model, prompt: Tokens, sampling: sllm.SamplingParams) -> list[int]:
    with (
        sllm.LocalTarget(model, n_ctx=512, **SETTINGS) as local,
        sllm.generate(local, prompt, sampling=sampling, max_tokens=MAX_TOKENS) as stream,
    ):
        return [token for run in stream for token in run.tokens]


def course(api: str, rtt_ms: float, ways: Sequence[str], benchmark: Benchmark) -> dict[str, Way]:
    """All ways over all prompts, in turns with the plain stream; the first round is not counted."""
    found = {name: Way() for name in ways}
    with engine_behind(api, rtt_ms / 1e3) as (model, target, port, drafter):
        prompts = [model.vocab.encode(text) for text in PROMPTS]
        expected = {
            (name, i): truth(model, prompt, WAYS[name][0])
            for name in ways
            for i, prompt in enumerate(prompts)
        }

        def one_round(counted: bool) -> None:
            for i, prompt in enumerate(prompts):
                _, seconds = plain_stream(port, api, prompt, MAX_TOKENS)
                plain = MAX_TOKENS / seconds
                for name in ways:
                    sampling, drafts = WAYS[name]
                    tokens, took, stats, decided = text_of(
                        target, prompt, sampling, drafter if drafts else None, MAX_TOKENS
                    )
                    assert tokens == expected[name, i][: len(tokens)]
                    assert not decided or len(tokens) == len(expected[name, i])
                    if counted and tokens:
                        _add(found[name], tokens, took, stats, plain, decided=decided)

        one_round(counted=False)
        benchmark.pedantic(
            lambda: one_round(counted=True), setup=lambda: None, rounds=ROUNDS, iterations=1, warmup_rounds=0
        )
    return found


def _add(
    way: Way, tokens: list[int], seconds: float, stats: EngineStats, plain: float, *, decided: bool
) -> None:
    way.n_tokens += len(tokens)
    way.n_requests += stats.n_requests
    way.n_certified += stats.n_certified
    way.n_positions += stats.n_certified + stats.n_decided
    way.n_raised += stats.n_raised
    way.n_undecided += not decided
    way.n_bytes += stats.bytes_up + stats.bytes_down
    if decided:
        way.speeds.append(len(tokens) / seconds)
        way.ratios.append(len(tokens) / seconds / plain)


@pytest.mark.parametrize("rtt_ms", [0, 50, 100])
def test_vllm_behind_a_link(
    benchmark: Benchmark, report_values: Callable[[dict[str, Any], dict[str, bool]], None], rtt_ms: float
) -> None:
    found = course("vllm", rtt_ms, list(WAYS), benchmark)
    values = {name: way.info() for name, way in found.items()}
    greedy, drafted = values["greedy"], values["sampled, draft"]
    aims = {"greedy >= .97 of the engine's own stream": greedy["ratio_vs_stream"] >= 0.97}
    benchmark.extra_info.update(drafted, modes=values)
    report_values({f"{name}: {key}": value for name, v in values.items() for key, value in v.items()}, aims)


@pytest.mark.parametrize("api", ["sglang", "llama-server"])
def test_other_engines_behind_50_ms(
    benchmark: Benchmark, report_values: Callable[[dict[str, Any], dict[str, bool]], None], api: str
) -> None:
    found = course(api, 50, ["greedy", "sampled", "sampled, draft"], benchmark)
    values = {name: way.info() for name, way in found.items()}
    benchmark.extra_info.update(values["sampled, draft"], modes=values)
    report_values({f"{name}: {key}": value for name, v in values.items() for key, value in v.items()}, {})

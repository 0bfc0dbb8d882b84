"""``EngineTarget`` on a running engine: are its texts the plain ones, what do they cost, and when do they
come?
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sllm
from benchmarks.engines import plain, servers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.engines.servers import Server
    from sllm.http_engine.generation import EngineStats

OPENINGS = (  # in the embedded models' small world, which is where their draft is worth something
    "Once upon a time lived a gentle little duck called Rosa.",
    "Once upon a time there lived a curious little bear named Leo.",
    "One night a great storm came.",
    "One sunny morning, Rosa walked to the pond.",
    "从前有一只小熊",
    "Leo lived by the sea.",
    "Once upon a time",
    "She had a small house in the meadow.",
    "从前",
    "Rosa had a green book. She took it everywhere.",
)


@dataclass(frozen=True)
class Case:
    """A prompt, and how tokens are selected."""

    prompt: list[int]
    sampling: sllm.SamplingParams


def cases(model: sllm.Model, n: int, temperature: float) -> list[Case]:
    """Openings in turn, each time with another seed."""
    return [
        Case(
            model.vocab.encode(OPENINGS[i % len(OPENINGS)]).tolist(),
            sllm.SamplingParams(temperature=temperature, top_k=plain.K, seed=i),
        )
        for i in range(n if temperature else min(n, len(OPENINGS)))
    ]


def ways(small: sllm.Model) -> dict[str, Any]:
    """What drafts. Without a draft it is the engine's stream at temperature 0, and runs of it elsewhere."""
    return {"none": None, "ngram": "ngram", "model": small}


def written(target: sllm.EngineTarget, case: Case, draft: Any, n: int) -> tuple[list[int], EngineStats]:
    """A text by ``generate()``, and what it has cost."""
    stream = sllm.generate(target, case.prompt, draft=draft, sampling=case.sampling, max_tokens=n)
    tokens = [token for run in stream for token in run.tokens]
    assert stream.stats.remote is not None
    return tokens, stream.stats.remote  # type: ignore[return-value]


def measure(
    server: Server,
    vocab: sllm.Model,
    small: sllm.Model,
    n_texts: int,
    n_tokens: int,
    round_trips: Sequence[float],
    n_timed: int,
) -> dict[str, Any]:
    """All figures, printed as they come.

    ``small`` drafts; ``vocab`` is the engine's vocabulary.
    """
    figures: dict[str, Any] = {"engine": server.name, "version": server.version, "rows": [], "times": []}
    n_wrong = 0
    with sllm.EngineTarget(f"http://127.0.0.1:{server.port}/v1", vocab) as target:
        print(target.info, flush=True)
        for temperature in (0.0, 0.8):
            chosen = cases(vocab, n_texts, temperature)
            expected = [
                plain.whole(server, vocab, case.prompt, n_tokens)
                if temperature == 0
                else plain.one_by_one(server, vocab, case.prompt, case.sampling, n_tokens)
                for case in chosen
            ]
            if temperature == 0:  # and the engine's own text is what its log-probabilities say
                again = [plain.one_by_one(server, vocab, c.prompt, c.sampling, n_tokens) for c in chosen[:3]]
                print(f"own text = one token for each request: {again == expected[:3]}", flush=True)
            for name, draft in ways(small).items():
                before = server.tokens_computed()
                found = [written(target, case, draft, n_tokens) for case in chosen]
                computed = server.tokens_computed() - before
                total = sum(len(tokens) for tokens, _ in found)
                wrong = [
                    (case.sampling.seed, want, tokens)
                    for case, want, (tokens, _) in zip(chosen, expected, found, strict=True)
                    if tokens != want
                ]
                n_wrong += len(wrong)
                row = {
                    "temperature": temperature,
                    "draft": name,
                    "texts": len(found),
                    "equal": len(found) - len(wrong),
                    "tokens": total,
                    "requests_per_token": round(sum(stats.n_requests for _, stats in found) / total, 3),
                    "engine_tokens_per_token": round(computed / total, 3),
                    "certified": sum(stats.n_certified for _, stats in found),
                    "raised": sum(stats.n_raised for _, stats in found),
                }
                figures["rows"].append(row)
                print(row, flush=True)
                for seed, want, tokens in wrong[:3]:
                    print(f"  text {seed}: expected {want}, found {tokens}", flush=True)
    figures["wrong"] = n_wrong
    for round_trip in round_trips:
        with servers.link(server.port, round_trip) as port:
            figures["times"] += timed(server, vocab, small, port, round_trip, n_timed, n_tokens)
    return figures


def timed(
    server: Server,
    vocab: sllm.Model,
    small: sllm.Model,
    port: int,
    round_trip: float,
    n_texts: int,
    n_tokens: int,
    temperatures: Sequence[float] = (0.0, 0.8),
) -> list[dict[str, Any]]:
    """Tokens per second of each way and of the engine's own stream, text by text in turns."""
    rows = []
    with sllm.EngineTarget(f"http://127.0.0.1:{port}/v1", vocab) as target:
        for temperature in temperatures:
            seconds = dict.fromkeys(("stream", *ways(small)), 0.0)
            n_made, n_requests = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
            for case in cases(vocab, n_texts, temperature):
                # What a plain client would do: greedily here, since a text's length is what counts.
                tokens, took = plain.stream(server, vocab, case.prompt, n_tokens, port=port)
                seconds["stream"] += took
                n_made["stream"] += len(tokens)
                for name, draft in ways(small).items():
                    began = time.perf_counter()
                    tokens, stats = written(target, case, draft, n_tokens)
                    n_requests[name] += stats.n_requests
                    seconds[name] += time.perf_counter() - began
                    n_made[name] += len(tokens)
            speeds = {name: n_made[name] / seconds[name] for name in seconds}
            for name in ways(small):
                row = {
                    "round_trip_ms": round_trip * 1e3,
                    "temperature": temperature,
                    "draft": name,
                    "requests_per_token": round(n_requests[name] / n_made[name], 3),
                    "tokens_per_s": round(speeds[name], 2),
                    "ratio_vs_stream": round(speeds[name] / speeds["stream"], 3),
                }
                rows.append(row)
                print(row, flush=True)
    return rows

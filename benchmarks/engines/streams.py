"""A text that an engine streams with its own noise, behind a slow link: with drafts, beside the plain stream.

    python -m benchmarks.engines.streams [--rtt MS ...]

The engine is the tests' own over the embedded target, 30 ms a pass; all texts are compared with its stream.
Drafts: the embedded draft, and ones that know the text and get a share of its tokens right.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import sllm
from sllm.cli.slow_link import Link
from sllm.embedded import DRAFT, TARGET

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fake_engine import FakeEngine
from oracles import PLAIN

PASS_SECONDS, N_TOKENS, ROUNDS = 0.03, 96, 3
SAMPLING = replace(PLAIN, noise="vllm", temperature=0.8, top_k=16, seed=5)


class Known:
    """Drafts from a text that is known, with mistakes in some of its tokens."""

    def __init__(self, text: list[int], right: float) -> None:
        chance = np.random.default_rng(0)
        self._text = [token if chance.random() < right else (token + 1) % 300 for token in text]

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        """What comes next, as far as is known."""
        return self._text[len(tokens) : len(tokens) + n_max]


def text_of(target: sllm.EngineTarget, prompt: Any, draft: Any) -> tuple[list[int], float, Any]:
    """A text, the seconds to its last token, and what it has cost."""
    tokens: list[int] = []
    began = ended = time.perf_counter()
    with sllm.generate(target, prompt, draft=draft, sampling=SAMPLING, max_tokens=N_TOKENS) as stream:
        for run in stream:
            tokens += run.tokens
            ended = time.perf_counter()
    return tokens, ended - began, stream.stats.remote


def main() -> None:
    """Measure, and print a line for each round trip and draft."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rtt", type=float, nargs="*", default=[0.0, 50.0, 100.0], help="milliseconds")
    options = parser.parse_args()
    with sllm.Model(TARGET) as model, sllm.Model(DRAFT) as small, FakeEngine(model, "vllm") as engine:
        prompt = model.vocab.encode("Once upon a time")
        text = list(engine.drawn(prompt.tolist(), N_TOKENS, [], SAMPLING))
        known = [*prompt.tolist(), *text]
        drafts = {"none": None, "model": small, "90%": Known(known, 0.9), "97%": Known(known, 0.97)}
        drafts["all"] = Known(known, 1.0)
        engine.pace = PASS_SECONDS
        for rtt in options.rtt:
            ratios: dict[str, list[float]] = {name: [] for name in drafts}
            costs: dict[str, Any] = {}
            with (
                Link(("127.0.0.1", engine.port), delay=rtt / 2e3) as link,
                sllm.EngineTarget(f"http://127.0.0.1:{link.port}/v1", model, experimental=True) as target,
            ):
                for _ in range(ROUNDS):
                    plain = 0.0
                    for name, draft in drafts.items():
                        tokens, seconds, costs[name] = text_of(target, prompt, draft)
                        assert tokens == text
                        plain = plain or seconds
                        ratios[name].append(plain / seconds)
            for name, found in ratios.items():
                cost = costs[name]
                print(
                    f"{rtt:3.0f} ms, draft {name:5}: {median(found):.2f} of the plain stream,"
                    f" {cost.n_jumps} jumps, {cost.n_jumped} tokens by them, {cost.n_requests} requests",
                    flush=True,
                )


if __name__ == "__main__":
    main()

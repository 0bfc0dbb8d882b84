"""Where the target's choice stands among the draft's candidates, along texts of real pairs.

Target and draft select the token at position p with the same noise G: each takes the largest of
``logit / T + G(seed, p, token)``. So the draft's runners-up by that score are where it nearly chose
otherwise, and a tree that branches into them catches much of what a chain loses. ``record()`` walks along the
target's own text and writes down, at every position, the draft's first candidates behind the true text and
which of them the target chose. A node of a tree is right if, and only if, the target's tokens have the ranks
of its path; behind a right path the draft sees the true text; so that is all that the simulation of trees
(``simulate_trees.py``) has to know.

``python -m benchmarks.ranks`` records the pairs that are here, says how often each rank is the target's, and
shows how well ``shares()`` foretells it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import sllm
from sllm.cli.console import Output, Progress
from sllm.embedded import DRAFT, TARGET
from sllm.progress import step, told_to

from .measure import TYPE_KV

N_RANKS = 8
TEMPERATURES = (0.0, 0.7, 1.0)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ranks:
    """What was recorded at ``n`` positions of one text.

    Attributes:
        rank: int32 (n,): which of the draft's candidates the target chose, from 0; -1: none of them.
        gaps: float32 (n, N_RANKS): how much lower each candidate's score is than the first one's; infinite
            where there are fewer.
        probs: float32 (n, N_RANKS): the draft's probability of each.
        tokens: int32 (n, N_RANKS): their ids; -1 where there are fewer.

    """

    rank: Ints
    gaps: Floats
    probs: Floats
    tokens: Ints

    def __len__(self) -> int:
        return len(self.rank)


# ---- the draft's candidates


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(seed: int, pos: int, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The noise of the selection for many tokens of one position: ``sllm_gumbel``, in NumPy for its speed."""
    golden = 0x9E3779B97F4A7C15
    mask = 2**64 - 1
    key = _mix(np.array([(seed + golden) & mask], dtype=np.uint64))
    key = _mix(key + np.uint64(golden * (pos + 1) & mask))
    bits = _mix(key + np.uint64(golden) * (tokens.astype(np.uint64) + np.uint64(1))) >> np.uint64(12)
    return np.asarray(-np.log(-np.log((bits.astype(np.float64) + 0.5) * 2.0**-52)))


def survivors(logits: Floats, sampling: sllm.SamplingParams) -> npt.NDArray[np.int64]:
    """The ids that top-k, top-p and min-p leave; of all samplings without penalties, biases and grammars."""
    ids = np.argsort(-logits, kind="stable")
    if sampling.temperature == 0:
        return ids
    if sampling.top_k > 0:
        ids = ids[: sampling.top_k]
    weights = np.exp((logits[ids] - logits[ids[0]]).astype(np.float64))
    if sampling.top_p < 1:
        n = int(np.searchsorted(np.cumsum(weights / weights.sum()), sampling.top_p)) + 1
        ids, weights = ids[:n], weights[:n]
    kept: npt.NDArray[np.int64] = ids[weights >= sampling.min_p]
    return kept


def candidates(
    logits: Floats, sampling: sllm.SamplingParams, pos: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The first ``N_RANKS`` for position ``pos``, by score: ids, scores, probabilities."""
    ids = survivors(logits, sampling)
    scaled = logits[ids].astype(np.float64) / (sampling.temperature or 1.0)
    weights = np.exp(scaled - scaled.max())
    scores = scaled + gumbel(sampling.seed, pos, ids) if sampling.temperature > 0 else scaled
    first = np.lexsort((ids, -scores))[:N_RANKS]
    return ids[first], scores[first], weights[first] / weights.sum()


# ---- how likely a candidate is

SCALE = 1.0
SCALE_GREEDY = 0.6
OTHERS = 0.01


def shares(gaps: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """How likely each candidate is to be the target's, from how far its score is below the first one's.

    The chance falls with the gap as if the target's scores were the draft's with Gumbel noise of this scale
    between them: ``exp(-gap / scale)``, in shares of the candidates' sum and a little for all others.
    ``python -m benchmarks.ranks`` compares that with tables of the same pairs, which know more and say no
    better.
    """
    scale = SCALE if temperature > 0 else SCALE_GREEDY
    weights = np.exp(-gaps.astype(np.float64) / scale)
    return np.asarray(weights / (weights.sum(axis=-1, keepdims=True) + OTHERS))


# ---- recording


def rank_text(rows: Floats, text: Sequence[int], start: int, sampling: sllm.SamplingParams) -> Ranks:
    """``rows`` are the draft's logits in front of each token of ``text``, which begins at ``start``."""
    n = len(text)
    tokens = np.full((n, N_RANKS), -1, dtype=np.int32)
    gaps = np.full((n, N_RANKS), np.inf, dtype=np.float32)
    probs = np.zeros((n, N_RANKS), dtype=np.float32)
    for i in range(n):
        ids, scores, chances = candidates(rows[i], sampling, start + i)
        tokens[i, : len(ids)] = ids
        gaps[i, : len(ids)] = scores[0] - scores
        probs[i, : len(ids)] = chances
    same = tokens == np.asarray(text, dtype=np.int32)[:, None]
    rank = np.where(same.any(axis=1), same.argmax(axis=1), -1).astype(np.int32)
    return Ranks(rank, gaps, probs, tokens)


def record(
    target: sllm.Context,
    draft: sllm.Context,
    prompt: Ints,
    sampling: sllm.SamplingParams,
    n_tokens: int,
) -> Ranks:
    """One text of the target of ``n_tokens``, or to its end, and what the draft says along it."""
    text = prompt.tolist()
    target.memory.clear()
    draft.memory.clear()
    if len(prompt) > 1:
        target.decode(prompt[:-1])
    while len(text) < len(prompt) + n_tokens:
        verdict = target.verify([0], [text[-1]], sampling=sampling, start=[len(prompt)])
        text.append(int(verdict.tokens[0, 0]))
        if target.model.vocab.is_eog(text[-1]):
            break
    rows = draft.decode(np.array(text[:-1], dtype=np.int32), logits="all")
    assert rows is not None
    return rank_text(rows[len(prompt) - 1 :], text[len(prompt) :], len(prompt), sampling)


# ---- the pairs


STORIES = (
    "Once upon a time, there was a little girl named Lily.",
    "One day, a boy named Tim went to the park with his dog.",
    "Tom and Sam were best friends. They liked to play",
    "The sun was hot. A big bear sat under a tree and",
    "Once there was a small bird who could not fly.",
    "Mom and Mia went to the shop to buy a red hat.",
    "In a big house by the sea lived an old cat.",
    "Ben had a new toy car. He wanted to show it to",
    "It was a cold day. Anna looked out of the window and saw",
    "A little frog lived in the pond. He was sad because",
    "Jack found a shiny stone in the garden.",
    "Sue was very hungry. She asked her mom for",
)
CHATS = (
    "Tell me a story about a little mouse and a lamp.",
    "Tell me a short story about a little fox named Pip who loses a red kite.",
    "Write a story about a brave girl.",
    "讲一个小兔子花花帮助朋友的故事。",
    "Tell me a story about a bear who wants to build a boat.",
    "Write a story about a duck and a frog who are friends.",
    "讲一个关于小猫的故事。",
    "Tell me a very short story about Leo, Ruby and a golden drum.",
    "Tell me a bedtime story about an owl.",
    "讲一个小鸟和小熊的故事。",
    "Write a story about a boy who finds a blue hat.",
    "Tell me a story about a rabbit and the sea.",
)


@dataclass(frozen=True)
class Pair:
    """A target and a draft for it.

    Attributes:
        prompts: for a temperature; several seeds go over them.
        n_tokens: of each text.
        exact: whether the KV cache is q8_0, with which a text is the same to the last bit however its tokens
            are grouped; the stories models' heads of 8 are too narrow for its blocks.

    """

    name: str
    target: Path
    draft: Path
    prompts: Callable[[sllm.Model], list[Ints]]
    n_tokens: int
    exact: bool = True

    def record(self, temperature: float, *, n_positions: int = 2400, plain: bool = True) -> list[Ranks]:
        """Texts of at least ``n_positions`` tokens in all; ``plain``: no top-k, top-p and min-p."""
        kept: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if plain else {}
        options: dict[str, Any] = {"n_threads": 1, "flash_attn": True}
        if self.exact:
            options |= {"type_k": TYPE_KV, "type_v": TYPE_KV}
        found: list[Ranks] = []
        with (
            step(f"recording {self.name}, temperature {temperature:g}", None) as told,
            sllm.Model(self.target) as target_model,
            sllm.Model(self.draft) as draft_model,
            target_model.context(n_ctx=1024, **options) as target,
            draft_model.context(n_ctx=1024, **options) as draft,
        ):
            prompts = self.prompts(target_model)
            seed = 0
            while sum(map(len, found)) < n_positions:
                sampling = sllm.SamplingParams(temperature=temperature, seed=seed + 1, **kept)
                found.append(record(target, draft, prompts[seed % len(prompts)], sampling, self.n_tokens))
                seed += 1
                if told is not None:
                    told(sum(map(len, found)) / n_positions)
                if temperature == 0 and seed == len(prompts):
                    break  # the same texts again
        return found


def _plain(texts: Sequence[str]) -> Callable[[sllm.Model], list[Ints]]:
    return lambda model: [model.vocab.encode(text) for text in texts]


def _chats(texts: Sequence[str]) -> Callable[[sllm.Model], list[Ints]]:
    return lambda model: [
        np.asarray(model.chat([{"role": "user", "content": text}]), dtype=np.int32) for text in texts
    ]


STORIES_FOLDER = "SLLM_BENCH_STORIES"
"""The variable that names the folder of the two models of the stories pair: they are not the project's."""

MISSING = f"its models are not here; {STORIES_FOLDER} names their folder"


def pairs(stories: Path | None = None) -> dict[str, Pair]:
    """The pairs that are here, by name."""
    found = {"embedded": Pair("embedded", TARGET, DRAFT, _chats(CHATS), 256)}
    folder = stories or (Path(os.environ[STORIES_FOLDER]) if STORIES_FOLDER in os.environ else None)
    if folder is not None:
        target, draft = folder / "stories260K-f32.gguf", folder / "llama2xs-tok512-280K-f32.gguf"
        if target.is_file() and draft.is_file():
            found["stories"] = Pair("stories", target, draft, _plain(STORIES), 220, exact=False)
    return found


# ---- how well the shares foretell


EDGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)
GAP_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def log_loss(chances: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """Per position: the sum over the candidates of what saying ``chances`` costs, in nats."""
    p = np.clip(chances, 1e-4, 1 - 1e-4)
    return float(-np.where(right, np.log(p), np.log(1 - p)).sum(axis=1).mean())


def in_hindsight(gaps: Floats, right: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """A table for each candidate by its gap (the first one's: to the second), of these very positions."""
    own = gaps.copy()
    own[:, 0] = gaps[:, 1]
    bins = np.digitize(own, GAP_EDGES)
    chances = np.zeros(gaps.shape)
    for i in range(N_RANKS):
        for j in range(len(GAP_EDGES) + 1):
            here = bins[:, i] == j
            chances[here, i] = (right[here, i].sum() + 0.5) / (here.sum() + 1)
    return chances


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description="How likely the draft's candidates are the target's."
    )
    parser.add_argument("--stories", type=Path, help=f"the folder of that pair (default: ${STORIES_FOLDER})")
    parser.add_argument("--positions", type=int, default=2400, help="of each pair and temperature")
    args = parser.parse_args(argv)
    here = pairs(args.stories)
    if "stories" not in here:
        print(f"stories: {MISSING}", file=sys.stderr)
    all_said, all_right = [], []
    print(
        "| pair, temperature | first | second | third | fourth | among 8"
        " | log-loss of the shares | of tables in hindsight |"
    )
    print("|---" * 8 + "|")
    for pair in here.values():
        for temperature in TEMPERATURES:
            texts = pair.record(temperature, n_positions=args.positions)
            gaps = np.concatenate([text.gaps for text in texts])
            right = np.concatenate([text.rank for text in texts])[:, None] == np.arange(N_RANKS)
            said = shares(gaps, temperature)
            all_said.append(said)
            all_right.append(right)
            means = [f"{mean:.3f}" for mean in right.mean(axis=0)[:4]]
            print(
                f"| {pair.name}, {temperature:g} | {' | '.join(means)} | {right.any(axis=1).mean():.3f}"
                f" | {log_loss(said, right):.3f} | {log_loss(in_hindsight(gaps, right), right):.3f} |"
            )
    said, right = np.concatenate(all_said), np.concatenate(all_right)
    bins = np.digitize(said, EDGES)
    print("\n| share from | candidates | mean share | right | right, firsts | right, runners-up |")
    print("|---" * 6 + "|")
    for i, low in enumerate((0.0, *EDGES)):
        at = bins == i
        cells = [
            f"{right[:, columns][at[:, columns]].mean():.3f}" if at[:, columns].any() else ""
            for columns in (slice(None), slice(1), slice(1, None))
        ]
        print(f"| {low:g} | {at.sum()} | {said[at].mean():.3f} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    with told_to(lambda what: Progress(Output(), what)):
        sys.exit(main())

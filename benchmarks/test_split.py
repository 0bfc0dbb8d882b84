"""A model split by layers whose middle is behind a slow link: with a draft and without, hidden states in
several codecs, the output here or with the worker; and llama.cpp's layer split over its RPC with as many
layers here.

Worker and link are processes of their own. With f32 every text is compared, token by token, with the whole
model's; and for every text the worker's passes are counted, of which there must be one a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import sllm
import sllm.split.target
from sllm.draft.drafters import ModelDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.engine.layers import open_layers
from sllm.remote.connection import Remote
from sllm.worker.passes import Pace

from . import models, peers, ranks
from .far_end import ClientProcess, LinkProcess, WorkerProcess
from .measure import (
    GREEDY,
    TYPE_KV,
    Benchmark,
    Sample,
    SplitFigures,
    Tokens,
    generated,
    joined,
    local_target,
    sample_of,
)

pytestmark = pytest.mark.timeout(1800)

SplitReport = Callable[[Sequence[SplitFigures]], None]

LINKS = pytest.mark.parametrize(
    ("rtt_ms", "mbit_s"),
    [(0, None), (20, None), (50, None), (100, None), (50, 50.0)],
    ids=["0ms-unlimited", "20ms-unlimited", "50ms-unlimited", "100ms-unlimited", "50ms-50mbit"],
)

SETTINGS: dict[str, Any] = {"flash_attn": True, "type_k": TYPE_KV, "type_v": TYPE_KV, "n_threads": 1}
SAMPLED = sllm.SamplingParams(temperature=0.8, seed=2)
CHUNK = sllm.split.target._CHUNK
DRAFT_OF_PEER = 8  # what llama-speculative-simple is given
PEER_TOKENS = 16  # of llama-bench

TOKENS_PER_ROUND = 3.0
GAIN_OVER_LLAMA_RPC = 3.0
GAIN_WHERE_BYTES_COUNT = 10.0
BYTES_OF_Q8 = 1.2  # times n_embd, for a position and direction
MEMORY_OFF = 0.15


# --- what is split, and how ---


@dataclass(frozen=True)
class Pair:
    """A model with the draft that it gets, and how many of its layers stay here."""

    target: Path
    draft: Path
    head: int
    tail: int
    prompts: tuple[str, ...]
    max_tokens: int


def embedded_pair() -> Pair:
    prompts = (
        "Once upon a time, there was a little fox who lived near the river.",
        "In a quiet valley there lived a brave little mouse called Emma.",
    )
    return Pair(TARGET, DRAFT, 2, 1, prompts, 96)


def tiny_pair() -> Pair:
    """The draft is the model itself: none of its tokens is ever wrong."""
    path = models.tiny_qwen2()
    return Pair(path, path, 1, 1, ("Once upon a time", "The river is wide"), 64)


PAIRS = {"embedded": embedded_pair, "tiny": tiny_pair}


@dataclass(frozen=True)
class Mode:
    codec: str
    output_here: bool = True
    drafts: bool = True
    sampling: sllm.SamplingParams = GREEDY

    @property
    def name(self) -> str:
        name = f"{'draft' if self.drafts else 'no draft'}, output {'here' if self.output_here else 'there'}"
        return name if self.sampling == GREEDY else f"{name}, temperature {self.sampling.temperature:g}"


TIMED = Mode("f16")


def modes(rtt_ms: int) -> list[Mode]:
    """All of them at 50 ms; those that are slow without a draft are few."""
    found = [TIMED, Mode("f32"), Mode("q8"), Mode("f16", drafts=False), Mode("f16", output_here=False)]
    if rtt_ms == 50:
        found += [Mode("q8", drafts=False), Mode("q8", output_here=False)]
        found += [Mode("f32", drafts=False), Mode("f32", sampling=SAMPLED)]
    return found


# --- one text ---


class Client:
    """A split model of one mode, over one link. It keeps count of what crosses and of what is asked of the
    worker.
    """

    def __init__(
        self, pair: Pair, mode: Mode, remote: Remote, link: LinkProcess, drafter: ModelDrafter, rtt: float
    ) -> None:
        self._mode = mode
        self._remote = remote
        self._link = link
        self._drafter = drafter if mode.drafts else None
        self._rtt = rtt
        tail = pair.tail if mode.output_here else None
        self.split = sllm.SplitTarget(
            pair.target, head=pair.head, tail=tail, middle=remote, codec=mode.codec, n_ctx=1024, **SETTINGS
        )
        self._held: list[int] = []
        self.n_rows = self.message_bytes_up = self.message_bytes_down = self.turns = 0

    def text(self, prompt: Tokens, max_tokens: int) -> Sample:
        """From the call to the last token, the opening of the stream and the prompt included."""
        tokens: list[int] = []
        began = ended = time.perf_counter()
        with sllm.generate(
            self.split, prompt, draft=self._drafter, sampling=self._mode.sampling, max_tokens=max_tokens
        ) as stream:
            for run in stream:
                tokens += run.tokens
                ended = time.perf_counter()
        self._stats = stats = stream.stats
        self._prompt = prompt
        return sample_of(stats, tokens, ended - began)

    def count(self) -> None:
        """From here on, for the next text."""
        self._before = self._remote.status()
        time.sleep(self._rtt + 0.02)  # what belongs to the question
        self._link.reset()

    def counted(self, sample: Sample) -> None:
        """Look at what the text has cost, and that it was one pass of the worker for each round."""
        time.sleep(self._rtt + 0.02)  # the stream's end is under way
        sample.bytes_up, sample.bytes_down = self._link.carried()
        self.turns += self._link.turns()
        after = self._remote.status()
        (text,) = sample.texts
        prompt = self._prompt.tolist()
        same = 0
        while same < min(len(prompt) - 1, len(self._held)) and prompt[same] == self._held[same]:
            same += 1
        n_prompt = len(prompt) - 1 - same
        n_chunks = -(-(n_prompt + 1) // CHUNK)  # the last of them is the first pass
        n_rows = after.rows - self._before.rows
        assert self._stats.remote is not None
        n_void = self._stats.remote.n_void  # windows that were sent ahead and that nobody needed
        n_more = after.passes - self._before.passes - (sample.n_passes - 1 + n_chunks)
        assert 0 <= n_more <= n_void
        # A side branch that was accepted crosses once more.
        n_expected = n_prompt + sample.n_passes + sample.n_drafted + self._stats.remote.n_again
        assert n_rows == n_expected or (n_void and n_rows > n_expected - n_void)
        assert self._stats.remote.n_reconnects == 0
        self._held = [*prompt, *text[:-1]]
        self.n_rows += n_rows
        self.message_bytes_up += self._stats.remote.bytes_up
        self.message_bytes_down += self._stats.remote.bytes_down


@dataclass
class Taken:
    """What a mode did: a sample for each prompt, in each round."""

    client: Client
    samples: list[Sample] = field(default_factory=list)

    def rounds(self, n: int) -> list[Sample]:
        return [joined(self.samples[i : i + n]) for i in range(0, len(self.samples), n)]


def run_course(
    benchmark: Benchmark,
    taken: dict[Mode, Taken],
    prompts: Sequence[Tokens],
    max_tokens: int,
    *,
    rounds: int,
) -> None:
    """Let all modes take turns, one prompt at a time; those without a draft in the first round only."""
    n = len(prompts)
    ours = taken[TIMED]

    def text(one: Taken) -> Sample:
        return one.client.text(prompts[len(one.samples) % n], max_tokens)

    # Nobody is the first; and the next text finds no more than this one's beginning in memory.
    for one in taken.values():
        one.client.count()
        one.client.counted(one.client.text(prompts[-1], min(max_tokens, 16)))
        one.client.n_rows = one.client.message_bytes_up = one.client.message_bytes_down = 0
        one.client.turns = 0

    def settle() -> None:  # not where it would be timed
        if ours.samples and not ours.samples[-1].bytes_down:
            ours.client.counted(ours.samples[-1])

    def others() -> None:
        settle()
        for mode, one in taken.items():
            if mode != TIMED and (mode.drafts or len(one.samples) < n):
                one.client.count()
                sample = text(one)
                one.client.counted(sample)
                one.samples.append(sample)
        ours.client.count()

    def run() -> None:
        ours.samples.append(text(ours))

    benchmark.pedantic(run, setup=others, rounds=rounds * n, iterations=1, warmup_rounds=0)
    if len(ours.samples) < n:  # --benchmark-disable runs ours once
        for one in taken.values():
            one.samples.clear()
        ours.client.count()
        ours.client.counted(text(ours))
        for _ in prompts:
            others()
            run()
    settle()


# --- over a link ---


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]()


@pytest.fixture(scope="module")
def opened(pair: Pair) -> Iterator[tuple[sllm.Model, sllm.Model]]:
    """Target and draft, whole."""
    with sllm.Model(pair.target) as target, sllm.Model(pair.draft) as draft:
        yield target, draft


@pytest.fixture(scope="module")
def workers(pair: Pair) -> Iterator[dict[bool, WorkerProcess]]:
    """One for the output here, and one that has it: a worker serves one range at a time."""
    with ExitStack() as stack:
        yield {
            output_here: stack.enter_context(
                WorkerProcess(pair.target, sessions=len(modes(50)), layers=True, n_ctx=1024, **SETTINGS)
            )
            for output_here in (True, False)
        }


@pytest.fixture(scope="module")
def rpc_port(
    pair: Pair,
    native_peers: object,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[int]:
    """llama.cpp's server. It has the large tensors in its cache: these cross no link that is measured."""
    with peers.rpc_server(tmp_path_factory.mktemp("rpc"), n_threads=1) as port:
        by_peers(pair, f"127.0.0.1:{port}", n_tokens=1)
        yield port


def by_peers(pair: Pair, endpoint: str, n_tokens: int) -> tuple[float, peers.SpeculativeRun]:
    """llama-bench and llama-speculative-simple with as many layers here as ours."""
    n_layer = open_layers(pair.target).n_layer
    common: dict[str, Any] = {"n_threads": 1, "type_kv": TYPE_KV, "rpc": endpoint}
    common["rpc_layers"] = n_layer + 1 - pair.head - pair.tail  # the output is counted
    (plain,) = peers.llama_bench(pair.target, n_gen=min(PEER_TOKENS, n_tokens), **common)
    speculative = peers.llama_speculative_simple(
        pair.target, pair.draft, pair.prompts[0], n_tokens=n_tokens, n_max=DRAFT_OF_PEER, **common
    )
    return plain, speculative


@LINKS
def test_over_a_link(
    benchmark: Benchmark,
    report_split: SplitReport,
    pair: Pair,
    opened: tuple[sllm.Model, sllm.Model],
    workers: dict[bool, WorkerProcess],
    rpc_port: int,
    rtt_ms: int,
    mbit_s: float | None,
) -> None:
    rtt = rtt_ms / 1e3
    whole, draft = opened
    n_embd = open_layers(pair.target).n_embd
    prompts = [whole.vocab.encode(prompt) for prompt in pair.prompts]
    with local_target(whole, n_threads=1) as target:
        expected = {
            sampling: generated(target, prompts, sampling=sampling, max_tokens=pair.max_tokens).texts
            for sampling in (GREEDY, SAMPLED)
        }
    with ExitStack() as stack:
        rpc_link = stack.enter_context(LinkProcess(rpc_port, rtt=rtt, mbit_s=mbit_s))
        llama_bench, speculative = by_peers(pair, f"127.0.0.1:{rpc_link.port}", pair.max_tokens)
        drafter = stack.enter_context(ModelDrafter(draft, n_ctx=1024, **SETTINGS))
        links, remotes = {}, {}
        for output_here, worker in workers.items():
            links[output_here] = stack.enter_context(LinkProcess(worker.port, rtt=rtt, mbit_s=mbit_s))
            remotes[output_here] = stack.enter_context(sllm.connect(worker.uri_behind(links[output_here])))
        taken = {}
        for mode in modes(rtt_ms):
            at = mode.output_here
            client = Client(pair, mode, remotes[at], links[at], drafter, rtt)
            stack.enter_context(client.split)
            taken[mode] = Taken(client)
        run_course(benchmark, taken, prompts, pair.max_tokens, rounds=7 if rtt_ms == 0 else 2)

    texts = {mode: {sample.texts for sample in one.rounds(len(prompts))} for mode, one in taken.items()}
    for mode, found in texts.items():
        if mode.codec == "f32":
            assert found == {expected[mode.sampling]}
        else:  # the text of another model, and the same one with a draft and without, wherever the output is
            assert len(found) == 1
            if mode.output_here:  # else the hidden states are rounded on one way alone
                assert found == texts[Mode(mode.codec)]

    where: dict[str, Any] = {"rtt_ms": rtt_ms, "mbit_s": mbit_s}
    all_figures = []
    for mode, one in taken.items():
        samples = one.rounds(len(prompts))
        total = joined(samples)
        n_rounds = total.n_passes
        figures = SplitFigures(
            **where,
            mode=mode.name,
            codec=mode.codec,
            tokens_per_s=statistics.median(sample.tokens_per_s for sample in samples),
            rounds_per_token=n_rounds / total.n_tokens,
            tokens_per_round=total.n_tokens / n_rounds,
            bytes_per_token=(total.bytes_up + total.bytes_down) / total.n_tokens,
        )
        figures.ratio_vs_llama_rpc = figures.tokens_per_s / llama_bench
        client = one.client
        up, down = (n / client.n_rows for n in (client.message_bytes_up, client.message_bytes_down))
        if mode.codec == "q8":
            assert up <= BYTES_OF_Q8 * n_embd
            assert down <= BYTES_OF_Q8 * n_embd
        figures.more |= {
            "ratio_vs_llama_rpc_speculative": figures.tokens_per_s / speculative.tokens_per_s,
            "acceptance": total.n_accepted / total.n_drafted if total.n_drafted else None,
            "message_bytes_per_position_up": up,
            "message_bytes_per_position_down": down,
            # A round is a message there and one back; what more there is are the stream's opening and its
            # end, and acknowledgements of HTTP/2.
            "turns_per_round": client.turns / n_rounds,
            "round_ms_beyond_rtt": (total.target_seconds / n_rounds - rtt) * 1e3,
            "same_text_as_whole": statistics.mean(
                a == b for a, b in zip(total.texts[: len(prompts)], expected[mode.sampling], strict=True)
            ),
        }
        all_figures.append(figures)

    ours = all_figures[0]
    assert ours.tokens_per_round is not None
    assert ours.ratio_vs_llama_rpc is not None
    ours.aims_at(f">= {TOKENS_PER_ROUND:g} tokens per round", ours.tokens_per_round >= TOKENS_PER_ROUND)
    if rtt_ms == 50:
        # With a vocabulary of thousands llama.cpp's logits are few bytes.
        costly = mbit_s is not None and whole.vocab.n_tokens > 100_000
        gain = GAIN_WHERE_BYTES_COUNT if costly else GAIN_OVER_LLAMA_RPC
        ours.aims_at(f">= {gain:g} x llama-bench --rpc", ours.ratio_vs_llama_rpc >= gain)
    text = whole.vocab.decode(list(expected[GREEDY][0]))
    same = speculative.text.startswith(text) or text.startswith(speculative.text)
    all_figures.append(
        SplitFigures(
            **where,
            mode=f"llama-speculative-simple --rpc, n_max {DRAFT_OF_PEER}",
            codec=None,
            tokens_per_s=speculative.tokens_per_s,
            rounds_per_token=speculative.passes_per_token,
            tokens_per_round=1 / speculative.passes_per_token,
            ratio_vs_llama_rpc=speculative.tokens_per_s / llama_bench,
            more={"acceptance": speculative.acceptance, "peer_same_text": same},
        )
    )
    all_figures.append(
        SplitFigures(
            **where,
            mode="llama-bench --rpc",
            codec=None,
            tokens_per_s=llama_bench,
            rounds_per_token=1.0,
            tokens_per_round=1.0,
            ratio_vs_llama_rpc=1.0,
        )
    )
    report_split(all_figures)


@pytest.mark.parametrize("codec", ["f16", "f32"])
def test_at_no_distance(
    benchmark: Benchmark,
    report_values: Callable[[dict[str, Any], dict[str, bool]], None],
    pair: Pair,
    opened: tuple[sllm.Model, sllm.Model],
    workers: dict[bool, WorkerProcess],
    rpc_port: int,
    codec: str,
) -> None:
    """The split and ``llama-bench --rpc`` in turns, over links without a delay, and without links: the median
    of the ratios. All that is left is what a round costs, and on few cores they share these.
    """
    whole, draft = opened
    prompts = [whole.vocab.encode(prompt) for prompt in pair.prompts]
    n_layers = open_layers(pair.target).n_layer + 1 - pair.head - pair.tail  # the output is counted
    rounds = 7
    with ExitStack() as stack:
        drafter = stack.enter_context(ModelDrafter(draft, n_ctx=1024, **SETTINGS))
        links = {port: stack.enter_context(LinkProcess(port)) for port in (workers[True].port, rpc_port)}
        link = links[workers[True].port]
        ways: dict[str, Callable[[], float]] = {}
        for name, uri in (("link", workers[True].uri_behind(link)), ("direct", workers[True].uri)):
            for drafts in (True, False):
                remote = stack.enter_context(sllm.connect(uri))
                client = Client(pair, Mode(codec, drafts=drafts), remote, link, drafter, 0.0)
                stack.enter_context(client.split)
                ways[f"{name}, {'draft' if drafts else 'no draft'}"] = lambda client=client: (
                    joined([client.text(prompt, pair.max_tokens) for prompt in prompts]).tokens_per_s
                )
        for name, port in (("link", links[rpc_port].port), ("direct", rpc_port)):
            ways[f"{name}, llama-bench"] = lambda port=port: peers.llama_bench(
                pair.target,
                n_gen=pair.max_tokens,
                n_threads=1,
                type_kv=TYPE_KV,
                rpc=f"127.0.0.1:{port}",
                rpc_layers=n_layers,
            )[0]
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():  # nobody is the first
            run()

        def course() -> None:
            for name, run in ways.items():
                taken[name].append(run())

        benchmark.pedantic(course, setup=lambda: None, rounds=rounds, iterations=1, warmup_rounds=0)
    values: dict[str, Any] = {name: round(statistics.median(found), 1) for name, found in taken.items()}
    ratios = {
        name: statistics.median(
            ours / theirs
            for ours, theirs in zip(found, taken[f"{name.partition(',')[0]}, llama-bench"], strict=True)
        )
        for name, found in taken.items()
        if not name.endswith("llama-bench")
    }
    values["ratio_vs_llama_rpc"] = {name: round(ratio, 2) for name, ratio in ratios.items()}
    report_values(values, {">= 1 x llama-bench --rpc at 0 ms": ratios["link, draft"] >= 1})


# --- trees ---

TREE_PACE = 0.02
"""Seconds of the worker's pass, whatever its rows: a larger model's, where rows cost next to nothing."""

TREE_TOKENS = 160
TREE_SEEDS = 5
GAIN_OF_TREES = 1.25  # on the stories pair, at temperature 1


class ChainsOnly:
    """A model that drafts chains, for the comparison: all of a :class:`ModelDrafter` but its trees."""

    def __init__(self, drafter: ModelDrafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        if name == "draft_tree":
            raise AttributeError(name)
        return getattr(self._drafter, name)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("rtt_ms", [50, 100])
@pytest.mark.parametrize("pair_name", ["stories", "embedded"])
def test_trees(
    benchmark: Benchmark, report_split: SplitReport, pair_name: str, rtt_ms: int, temperature: float
) -> None:
    """The same texts with trees and with chains, by turns, a paced worker in the middle."""
    found = ranks.pairs().get(pair_name)
    if found is None:
        pytest.skip(ranks.MISSING)
    rtt = rtt_ms / 1e3
    settings = {**SETTINGS} if found.exact else {"flash_attn": True, "n_threads": 1}
    n_layer = open_layers(found.target).n_layer
    head = 2 if n_layer > 5 else 1
    kept: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with ExitStack() as stack:
        enter = stack.enter_context
        worker = enter(
            WorkerProcess(
                found.target, layers=(head, n_layer - 1), n_ctx=512, pace=Pace(TREE_PACE), **settings
            )
        )
        link = enter(LinkProcess(worker.port, rtt=rtt))
        remote = enter(sllm.connect(worker.uri_behind(link)))
        split = enter(
            sllm.SplitTarget(
                found.target, head=head, tail=1, middle=remote, codec="f32", n_ctx=512, **settings
            )
        )
        model = enter(sllm.Model(found.draft))
        drafter = enter(ModelDrafter(model, n_ctx=512, **settings))
        ways: dict[str, Any] = {"trees": drafter, "chains": ChainsOnly(drafter)}
        prompts = found.prompts(model)
        samples: dict[str, list[Sample]] = {name: [] for name in ways}
        again: dict[str, int] = dict.fromkeys(ways, 0)

        def text(name: str, max_tokens: int = TREE_TOKENS) -> None:
            n = len(samples[name])
            sampling = sllm.SamplingParams(temperature=temperature, seed=n, **kept)
            tokens: list[int] = []
            began = time.perf_counter()
            with sllm.generate(
                split, prompts[n % len(prompts)], draft=ways[name], sampling=sampling, max_tokens=max_tokens
            ) as stream:
                for run in stream:
                    tokens += run.tokens
            seconds = time.perf_counter() - began
            stats = stream.stats
            assert stats.remote is not None
            again[name] += stats.remote.n_again
            sample = sample_of(stats, tokens, seconds)
            sample.bytes_up, sample.bytes_down = stats.remote.bytes_up, stats.remote.bytes_down
            samples[name].append(sample)

        for name in ways:  # nobody is the first
            text(name, 8)
            samples[name].clear()
            again[name] = 0
        benchmark.pedantic(
            lambda: text("trees"),
            setup=lambda: text("chains"),
            rounds=TREE_SEEDS,
            iterations=1,
            warmup_rounds=0,
        )
        if not samples["chains"]:  # --benchmark-disable runs ours once
            text("chains")

    if found.exact:
        assert [s.texts for s in samples["trees"]] == [s.texts for s in samples["chains"]]
    totals = {name: joined(taken) for name, taken in samples.items()}
    all_figures = []
    for name, total in totals.items():
        figures = SplitFigures(
            rtt_ms=rtt_ms,
            mbit_s=None,
            mode=f"{pair_name}, {name}, temperature {temperature:g}",
            codec="f32",
            tokens_per_s=total.tokens_per_s,
            rounds_per_token=total.n_passes / total.n_tokens,
            tokens_per_round=total.n_tokens / total.n_passes,
            bytes_per_token=(total.bytes_up + total.bytes_down) / total.n_tokens,
        )
        figures.more |= {
            "n_nodes": total.n_drafted / total.n_passes,
            "rows_again_per_round": again[name] / total.n_passes,
            # of neighbours in time, so that a slow minute hits both
            "ratio_vs_chain": statistics.median(
                own.tokens_per_s / chain.tokens_per_s
                for own, chain in zip(samples[name], samples["chains"], strict=True)
            ),
            "same_texts": statistics.mean(
                a.texts == b.texts for a, b in zip(samples["trees"], samples["chains"], strict=True)
            ),
            "draft_and_own_layers_ms_per_round": (total.seconds - total.target_seconds)
            / total.n_passes
            * 1e3,
        }
        all_figures.append(figures)
    if pair_name == "stories" and temperature == 1:
        ratio = all_figures[0].more["ratio_vs_chain"]
        all_figures[0].aims_at(f">= {GAIN_OF_TREES:g} x chains", ratio >= GAIN_OF_TREES)
    report_split(all_figures)


# --- a chain of workers ---

CHAIN_RTT_MS = 50
CHAIN_TOKENS = 64
CHAIN_OF_ONE = 0.9


@pytest.mark.parametrize("between_ms", [0, 50], ids=["neighbours", "50ms-apart"])
def test_chain(benchmark: Benchmark, report_split: SplitReport, between_ms: int) -> None:
    """Two workers with the layers of one, each 50 ms from here, which pass the rows on to each other, or
    whose rows go through here. Where they are 50 ms apart as well, the way through both takes 75 ms, and a
    chain can do no better than 2/3 of one worker whose rounds are as many.
    """
    pair = embedded_pair()
    rtt = CHAIN_RTT_MS / 1e3
    middle = (pair.head, open_layers(pair.target).n_layer - pair.tail)
    half = sum(middle) // 2
    settings: dict[str, Any] = {"n_ctx": 1024, "sessions": 2, "hops": ["127.0.0.1"], **SETTINGS}
    with ExitStack() as stack:
        enter = stack.enter_context
        ranges = (middle, (middle[0], half), (half, middle[1]))
        one, *two = [enter(WorkerProcess(pair.target, layers=layers, **settings)) for layers in ranges]
        links = [enter(LinkProcess(worker.port, rtt=rtt)) for worker in (one, *two)]
        between = enter(LinkProcess(two[1].port, rtt=between_ms / 1e3))
        remotes = [
            enter(sllm.connect(worker.uri_behind(link)))
            for worker, link in zip((one, *two), links, strict=True)
        ]
        ways: dict[str, dict[str, Any]] = {
            "chain of 2, hops": {"middle": remotes[1:], "hops": [f"127.0.0.1:{between.port}"]},
            "chain of 2, relayed here": {"middle": remotes[1:], "hops": False},
            "one worker": {"middle": remotes[0]},
        }
        draft = enter(sllm.Model(pair.draft))
        drafter = enter(ModelDrafter(draft, n_ctx=1024, **SETTINGS))
        splits = {
            name: enter(
                sllm.SplitTarget(
                    pair.target, head=pair.head, tail=pair.tail, codec="f32", n_ctx=1024, **way, **SETTINGS
                )
            )
            for name, way in ways.items()
        }
        prompts = [draft.vocab.encode(prompt) for prompt in pair.prompts]
        samples: dict[str, list[Sample]] = {name: [] for name in ways}
        first: dict[str, list[float]] = {name: [] for name in ways}

        def text(name: str, n_tokens: int = CHAIN_TOKENS) -> None:
            prompt = prompts[len(samples[name]) % len(prompts)]
            tokens: list[int] = []
            began = time.perf_counter()
            with sllm.generate(
                splits[name], prompt, draft=drafter, sampling=GREEDY, max_tokens=n_tokens
            ) as stream:
                for run in stream:
                    if not tokens:
                        first[name].append(time.perf_counter() - began)
                    tokens += run.tokens
                seconds = time.perf_counter() - began
            stats = stream.stats
            assert stats.remote is not None
            assert stats.remote.n_hops == ("hops" in name)
            samples[name].append(sample_of(stats, tokens, seconds))

        ours, *others = ways
        for name in ways:  # nobody is the first
            text(name, 8)
            samples[name].clear()
            first[name].clear()

        def by_others() -> None:
            for name in others:
                text(name)

        benchmark.pedantic(lambda: text(ours), setup=by_others, rounds=8, iterations=1, warmup_rounds=0)
        if not samples[others[0]]:  # --benchmark-disable runs ours once
            by_others()

    texts = {name: [sample.texts for sample in found] for name, found in samples.items()}
    assert texts[ours] == texts["one worker"] == texts["chain of 2, relayed here"]
    rates = {name: statistics.median(s.tokens_per_s for s in found) for name, found in samples.items()}
    all_figures = []
    for name, found in samples.items():
        total = joined(found)
        figures = SplitFigures(
            rtt_ms=CHAIN_RTT_MS,
            mbit_s=None,
            mode=name,
            codec="f32",
            tokens_per_s=rates[name],
            rounds_per_token=total.n_passes / total.n_tokens,
            tokens_per_round=total.n_tokens / total.n_passes,
        )
        figures.more |= {
            "between_ms": between_ms,
            "ratio_vs_one": rates[name] / rates["one worker"],
            "ratio_vs_relayed": rates[name] / rates["chain of 2, relayed here"],
            "seconds_to_first_token": statistics.median(first[name]),
            "round_trips_to_first_token": statistics.median(first[name]) / rtt,
            "round_ms": total.target_seconds / total.n_passes * 1e3,
        }
        all_figures.append(figures)
    ratio = all_figures[0].more["ratio_vs_one"]
    all_figures[0].aims_at(f">= {CHAIN_OF_ONE:g} x one worker", ratio >= CHAIN_OF_ONE)
    report_split(all_figures)


# --- a prompt ---

PROMPT_TOKENS = 512
STREAMED = "streamed"


@pytest.mark.parametrize(
    ("size", "mbit_s"),
    [("embedded", None), ("embedded", 50.0), ("half-billion", 50.0)],
    ids=["embedded-unlimited", "embedded-50mbit", "half-billion-50mbit"],
)
def test_prompt(
    benchmark: Benchmark,
    report_split: SplitReport,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    mbit_s: float | None,
) -> None:
    """512 tokens to the first token behind them, 50 ms away: chunks that follow one another closely, against
    one at a time, and all in one.
    """
    rtt_ms = 50
    path, head, rounds = (TARGET, 2, 5) if size == "embedded" else (models.random_qwen2(), 6, 1)
    rng = np.random.default_rng(0)
    # (chunk, chunks under way)
    ways = {STREAMED: (CHUNK, sllm.split.target._IN_FLIGHT), "one chunk at a time": (CHUNK, 1)}
    ways["all in one chunk"] = (PROMPT_TOKENS, 1)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    carried: dict[str, int] = {}
    with (
        WorkerProcess(path, layers=True, sessions=1, n_ctx=1024, **SETTINGS) as worker,
        LinkProcess(worker.port, rtt=rtt_ms / 1e3, mbit_s=mbit_s) as link,
        sllm.connect(worker.uri_behind(link)) as remote,
        sllm.SplitTarget(path, head=head, tail=1, middle=remote, n_ctx=1024, **SETTINGS) as split,
    ):

        def first_token(prompt: Tokens) -> int:
            with sllm.generate(split, prompt, sampling=GREEDY, max_tokens=1) as stream:
                (token,) = (token for run in stream for token in run.tokens)
            return token

        def timed(way: str, prompt: Tokens) -> int:
            with monkeypatch.context() as patch:
                for name, value in zip(("_CHUNK", "_IN_FLIGHT"), ways[way], strict=True):
                    patch.setattr(sllm.split.target, name, value)
                began = time.perf_counter()
                token = first_token(prompt)
                seconds[way].append(time.perf_counter() - began)
            return token

        def forget(prompt: Tokens) -> None:
            """Behind another first token nothing that is in memory is of use."""
            first_token((prompt[:1] + 1) % split.vocab.n_tokens)
            time.sleep(0.1)
            link.reset()

        prompts: list[Tokens] = []
        by_others: list[int] = []

        def others() -> None:
            prompts.append(rng.integers(0, split.vocab.n_tokens, PROMPT_TOKENS, dtype=np.int32))
            found = set()
            for way in ways:
                if way != STREAMED:
                    forget(prompts[-1])
                    found.add(timed(way, prompts[-1]))
                    time.sleep(0.1)
                    carried[way] = sum(link.carried())
            (token,) = found
            by_others.append(token)
            forget(prompts[-1])

        def run() -> None:
            if not prompts:  # --benchmark-disable runs no setup
                others()
            assert timed(STREAMED, prompts[-1]) == by_others[-1]

        first_token(rng.integers(0, split.vocab.n_tokens, 8, dtype=np.int32))  # the worker loads its layers
        benchmark.pedantic(run, setup=others, rounds=rounds, iterations=1, warmup_rounds=0)
        time.sleep(0.1)
        carried[STREAMED] = sum(link.carried())

    all_figures = []
    for way in ways:
        taken = statistics.median(seconds[way])
        figures = SplitFigures(
            rtt_ms=rtt_ms,
            mbit_s=mbit_s,
            mode=f"prompt, {way}",
            codec="f16",
            tokens_per_s=PROMPT_TOKENS / taken,
            bytes_per_token=carried[way] / PROMPT_TOKENS,
        )
        figures.more["seconds_to_first_token"] = taken
        figures.more["round_trips"] = taken / (rtt_ms / 1e3)
        figures.more["gain_of_streaming"] = statistics.median(
            theirs / ours for theirs, ours in zip(seconds[way], seconds[STREAMED], strict=True)
        )
        all_figures.append(figures)
    report_split(all_figures)


# --- memory ---


def test_memory(benchmark: Benchmark, report_split: SplitReport) -> None:
    """What a process has in memory that holds the local part of a model in the shape of 0.5B, and one that
    holds all of it, each after a text.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("what a process has in memory is read from Linux's /proc")
    path, head, tail, n_tokens = models.random_qwen2(), 6, 1, 16
    file = open_layers(path)
    prompt = list(range(1000, 1032))
    with (
        WorkerProcess(path, layers=True, sessions=1, n_ctx=1024, **SETTINGS) as worker,
        ClientProcess(path, "vocabulary", uri=worker.uri) as bare,
        ClientProcess(path, "whole", n_ctx=1024, **SETTINGS) as whole,
        ClientProcess(path, "whole, read", n_ctx=1024, **SETTINGS) as read,
        ClientProcess(
            path, "split", uri=worker.uri, head=head, tail=tail, codec="f32", n_ctx=1024, **SETTINGS
        ) as split,
    ):
        expected, seconds = whole.generate(prompt, n_tokens)
        assert read.generate(prompt, n_tokens)[0] == expected
        ours: list[tuple[list[int], float]] = []
        benchmark.pedantic(
            lambda: ours.append(split.generate(prompt, n_tokens)),
            setup=lambda: None,
            rounds=3,
            iterations=1,
            warmup_rounds=0,
        )
        base = bare.memory_mb()["VmRSS"]
        of_split, of_whole, of_read = split.memory_mb(), whole.memory_mb(), read.memory_mb()
    assert all(tokens == expected for tokens, _ in ours)
    layers_mb, embedding_mb = weights_mb(path)
    share = (head + tail) / file.n_layer
    weights = layers_mb * share + embedding_mb
    figures = SplitFigures(
        rtt_ms=0,
        mbit_s=None,
        mode=f"memory, {head} + {tail} of {file.n_layer} layers here",
        codec="f32",
        tokens_per_s=n_tokens / statistics.median(seconds for _, seconds in ours),
        local_rss_mb=of_split["VmRSS"],
        whole_rss_mb=of_whole["VmRSS"],
    )
    off = (of_split["VmRSS"] - base) / weights
    figures.more |= {
        "rss_without_a_model_mb": base,
        "weights_mb": layers_mb + embedding_mb,
        "expected_local_weights_mb": weights,
        "expected_local_rss_mb": base + weights,
        "local_rss_beyond_base_over_expected": off,
        "local_peak_mb": of_split["VmHWM"],
        "whole_peak_mb": of_whole["VmHWM"],
        "local_anonymous_mb": of_split["RssAnon"],
        "whole_anonymous_mb": of_whole["RssAnon"],  # the mapped file is in memory besides, and can be dropped
        "whole_read_rss_mb": of_read["VmRSS"],
    }
    figures.aims_at(f"local memory within {MEMORY_OFF:.0%} of its share", abs(off - 1) <= MEMORY_OFF)
    other = SplitFigures(
        rtt_ms=0,
        mbit_s=None,
        mode="whole model",
        codec=None,
        tokens_per_s=n_tokens / seconds,
        whole_rss_mb=of_whole["VmRSS"],
    )
    report_split([figures, other])


def weights_mb(path: Path) -> tuple[float, float]:
    """All layers, and the embedding, which is the output matrix too, in 10^6 bytes."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    return layers / 1e6, sizes["token_embd.weight"] / 1e6

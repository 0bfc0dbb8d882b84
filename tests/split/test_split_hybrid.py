"""Models whose layers hold more than attention, or do more with embeddings than others, split with a worker:
the same text, with a draft and without one, also after an interruption.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EXACT, GREEDY, PLAIN, one_by_one
from random_models import EVERY, N_VOCAB
from remote_worker import through

import sllm
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.split.attacks import match_vocabulary
from sllm.split.ends import checked_head
from sllm.targets.base import Commit
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

N_CTX = 192
SAMPLED = replace(PLAIN, temperature=0.8, seed=5)

# The cut behind the head and the one before the tail.
CUTS = {
    "qwen35": (4, 8),
    "qwen35moe": (4, 8),
    "lfm2": (3, 6),
    "nemotron_h": (4, 5),
    "granitehybrid": (3, 6),
    "mamba2": (1, 3),
    "gemma2": (2, 6),
    "glm4": (1, 3),
    "gpt2": (1, 3),
}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model that is exact: float32 routers are not, on some CPUs."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        found = folder / f"{name}.gguf"
        if not found.exists():
            shape = replace(EVERY[name], routers="q8_0")
            if name == "nemotron_h":
                shape = replace(shape, n_layer=15)
            random_models.write(found, shape)
        return found

    return path


@pytest.fixture
def workers() -> list[Worker]:
    """Those of :func:`make_split`."""
    return []


@pytest.fixture
def links() -> list[Link]:
    """Those before workers of :func:`make_split` that are asked for with ``cut``."""
    return []


@pytest.fixture
def make_split(
    path_of: Callable[[str], Path], workers: list[Worker], links: list[Link]
) -> Iterator[Callable[..., sllm.SplitTarget]]:
    """A split with a worker of the layers between."""
    with ExitStack() as stack:

        def make(name: str, **options: Any) -> sllm.SplitTarget:
            path, n = path_of(name), EVERY[name].n_layer
            head, end = CUTS[name]
            n = 15 if name == "nemotron_h" else n
            end = 10 if name == "nemotron_h" else end
            worker = stack.enter_context(
                Worker(path, layers=options.pop("layers", True), insecure=True, n_ctx=N_CTX, **EXACT)
            )
            workers.append(worker)
            uri = worker.uri
            if options.pop("cut", False):
                link = stack.enter_context(Link(("127.0.0.1", worker.address.port)))
                links.append(link)
                uri = through(link, uri)
            remote = stack.enter_context(sllm.connect(uri))
            tail = options.pop("tail", n - end)
            settings = {"head": head, "tail": tail, "codec": "f32", "n_ctx": N_CTX, **EXACT, **options}
            return stack.enter_context(sllm.SplitTarget(path, middle=remote, **settings))

        yield make


def prompt_of(n: int, seed: int = 0) -> Any:
    # A text that repeats itself, so that prompt lookup proposes something.
    return np.resize(np.random.default_rng(seed).integers(4, N_VOCAB, 9), n).astype(np.int32)


def text_of(target: sllm.Target, prompt: Any, n: int, sampling: Any, draft: Any = None) -> tuple[Any, Any]:
    stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=n)
    return [token for run in stream for token in run.tokens], stream.stats


@pytest.mark.parametrize("name", CUTS)
def test_the_text_is_that_of_the_whole_model(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget], name: str
) -> None:
    """With its own weights as a draft, which are always right, and prompt lookup, which is mostly wrong."""
    with sllm.Model(path_of(name)) as model, ModelDrafter(model, n_ctx=N_CTX) as drafter:
        drafter.adaptive = False  # as much as it can, however long it takes
        for tail in ({}, {"tail": None}):
            split = make_split(name, **tail)
            for sampling in (GREEDY, SAMPLED):
                expected = one_by_one(model, prompt_of(30), sampling, 24, N_CTX)
                assert text_of(split, prompt_of(30), 24, sampling)[0] == expected
                found, stats = text_of(split, prompt_of(30), 24, sampling, drafter)
                assert found == expected
                drafts = model.can_rollback != "recompute" and len(found) > 1  # the first comes without
                assert (stats.n_drafted > 0) == drafts
                assert text_of(split, prompt_of(30), 24, sampling, "ngram")[0] == expected


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "nemotron_h"])
def test_drafts_of_every_length_wrong_anywhere(
    path_of: Callable[[str], Path],
    make_split: Callable[..., sllm.SplitTarget],
    workers: list[Worker],
    name: str,
) -> None:
    """Rows are taken back by layers here and there, and by a worker that selects."""
    prompt, n = prompt_of(20), 120
    cases = [(k, wrong) for k in range(7) for wrong in range(k + 1)]  # wrong == k: none is
    with sllm.Model(path_of(name)) as model:
        ends = {token: -100.0 for token in range(N_VOCAB) if model.vocab.is_eog(token)}
        sampling = replace(SAMPLED, logit_bias=ends)
        expected = one_by_one(model, prompt, sampling, n, N_CTX)
    for tail in ({}, {"tail": None}):
        split = make_split(name, n_rollback=4, **tail)
        with closing(split.open(prompt, sampling, n)) as generation:
            assert generation.max_chain == 4
            text: list[int] = []
            for k, wrong in cases:
                chain = expected[len(text) : len(text) + k]
                if wrong < k:
                    chain[wrong] = (chain[wrong] + 1) % N_VOCAB
                generation.hint(len(prompt) + len(text), chain)
                commit = next(generation)
                assert (commit.n_verified, commit.n_accepted) == (min(k, 4), min(wrong, k, 4))
                text += commit.tokens
            assert text == expected[: len(text)]
        assert workers[-1].stats.sessions_total == 1  # nothing was lost and sent again


@pytest.mark.parametrize("name", ["qwen35", "nemotron_h", "granitehybrid", "glm4"])
def test_one_text_after_another(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget], name: str
) -> None:
    """One that goes on, one that leaves the other in the middle, and one that has nothing to do with it."""
    split = make_split(name)
    first = prompt_of(25)
    with sllm.Model(path_of(name)) as model:
        text = [*first, *text_of(split, first, 10, SAMPLED, "ngram")[0]]
        for prompt in (text, [*text, 7, 8, 9], text[:20], [*text[:30], 5, 6], prompt_of(12, 3), text):
            found, _ = text_of(split, prompt, 12, SAMPLED, "ngram")
            assert found == one_by_one(model, np.array(prompt, dtype=np.int32), SAMPLED, 12, N_CTX)


@pytest.mark.parametrize("name", ["qwen35", "granitehybrid", "glm4"])
def test_a_pass_that_was_interrupted_is_made_good(
    path_of: Callable[[str], Path],
    make_split: Callable[..., sllm.SplitTarget],
    workers: list[Worker],
    name: str,
) -> None:
    """No recurrent state survives that: layers here compute the text again, and a worker asks for it."""
    split = make_split(name)
    prompt, n = prompt_of(20), 16
    with sllm.Model(path_of(name)) as model:
        expected = one_by_one(model, prompt, SAMPLED, n, N_CTX)
    with closing(split.open(prompt, SAMPLED, n)) as generation:
        parts: Any = (split._head, split._tail, workers[0]._scheduler._range)
        memories = [part.memory for part in parts]
        text: list[int] = []
        for step in range(n):
            if step % 3:
                for memory in memories[step % 3 - 1 : step % 4]:
                    memory.clear()  # what an aborted decode leaves
            generation.hint(len(prompt) + len(text), expected[len(text) : len(text) + step % 3])
            text += next(generation).tokens
            if len(text) >= n:
                break
    assert text[:n] == expected


@pytest.mark.parametrize("tail", [{}, {"tail": None}], ids=["tail here", "tail there"])
@pytest.mark.parametrize("name", ["qwen35", "nemotron_h", "mamba2"])
def test_several_clients_at_once(
    path_of: Callable[[str], Path],
    make_split: Callable[..., sllm.SplitTarget],
    workers: list[Worker],
    name: str,
    tail: dict[str, Any],
) -> None:
    """Their rows go through a worker's layers together, and each takes its own back."""
    split = make_split(name, n_seq_max=3, **tail)
    prompts = [prompt_of(n, n) for n in (8, 21, 34)]
    with sllm.Model(path_of(name)) as model:
        expected = [one_by_one(model, prompt, SAMPLED, 24, N_CTX) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: text_of(split, prompt, 24, SAMPLED, "ngram")[0], prompts))
    assert found == expected
    assert workers[0].stats.sessions_total == 3  # nothing was lost and sent again


@pytest.mark.parametrize("tail", [{}, {"tail": None}], ids=["tail here", "tail there"])
@pytest.mark.parametrize("name", ["qwen35", "granitehybrid"])
def test_cuts_of_the_link_change_nothing(
    path_of: Callable[[str], Path],
    make_split: Callable[..., sllm.SplitTarget],
    links: list[Link],
    name: str,
    tail: dict[str, Any],
) -> None:
    """The worker keeps the state, drafted rows in it included, until its client returns."""
    split = make_split(name, cut=True, **tail)
    prompt = prompt_of(20)
    with sllm.Model(path_of(name)) as model:
        expected = one_by_one(model, prompt, SAMPLED, 24, N_CTX)
    for n_before in (1, 3):
        with closing(split.open(prompt, SAMPLED, 24)) as generation:
            text: list[int] = []
            for step in range(24):
                if step == n_before:
                    links[0].cut()
                generation.hint(len(prompt) + len(text), [*expected[len(text) : len(text) + 2], 9])
                text += next(generation, Commit(0, (), 0, 0, 0)).tokens
            assert text == expected
            assert generation.remote.n_reconnects == 1


def test_several_workers_share_the_layers_as_they_run_apart(tmp_path: Path) -> None:
    """Even shares of 12 layers whose kinds come back after 4 would cut at 6."""
    path = random_models.write(tmp_path / "smollm3.gguf", replace(EVERY["smollm3"], n_layer=12))
    prompt = prompt_of(10)
    with ExitStack() as stack:
        remotes = []
        for _ in range(2):
            worker = stack.enter_context(Worker(path, layers=True, insecure=True, n_ctx=N_CTX, **EXACT))
            remotes.append(stack.enter_context(sllm.connect(worker.uri)))
        settings: dict[str, Any] = {"head": 0, "codec": "f32", "n_ctx": N_CTX, **EXACT}
        with pytest.raises(ValueError, match="multiple of 4"):
            sllm.SplitTarget(path, tail=1, middle=remotes, **settings)
        split = stack.enter_context(sllm.SplitTarget(path, tail=0, middle=remotes, **settings))
        assert split.ranges == [(0, 4), (4, 12)]
        with sllm.Model(path) as model:
            expected = one_by_one(model, prompt, SAMPLED, 12, N_CTX)
        assert text_of(split, prompt, 12, SAMPLED, "ngram")[0] == expected


def test_ranges_that_do_not_run_apart_are_refused_at_once(
    make_split: Callable[..., sllm.SplitTarget], workers: list[Worker]
) -> None:
    for tail in (1, 2):
        with pytest.raises(ValueError, match=r"\[8, 1[01]\) of .*do not run apart: .* attention"):
            make_split("qwen35", head=8, tail=tail)
    assert all(worker.stats.passes == 0 for worker in workers)


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "gemma2"])
def test_the_attack_by_trying_tokens(path_of: Callable[[str], Path], name: str) -> None:
    """Its candidates do not stay in a recurrent state: with the codec that is exact, it finds every token."""
    file, tokens = open_layers(path_of(name)), prompt_of(7)
    with (
        Embedding(file) as embedding,
        LayerRange(file, 0, CUTS[name][0], n_seq_max=9, n_ctx=9 * 32, n_rollback=0, **EXACT) as layers,
    ):
        seen = layers.forward(embedding.rows(tokens))
        layers.memory.clear()
        everything = np.tile(np.arange(N_VOCAB, dtype=np.int32), (len(tokens), 1))
        found = match_vocabulary(layers, embedding, seen, everything, codec="f32")
    assert found.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("name", "tail", "head"),
    [
        ("lfm2", 2, 5),
        ("qwen35", 2, 6),
        ("qwen35", 4, 6),
        ("gemma2", 2, 4),
        ("smollm3", 4, 0),
        ("llama", 1, 2),
    ],
)
def test_the_head_by_default_is_one_that_runs_apart(
    path_of: Callable[[str], Path], name: str, tail: int, head: int
) -> None:
    file = open_layers(path_of(name))
    assert checked_head(file, None, tail) == head
    assert checked_head(file, head, tail) == head


def test_an_impossible_head_or_tail_says_what_would_do(path_of: Callable[[str], Path]) -> None:
    lfm2, smollm3 = open_layers(path_of("lfm2")), open_layers(path_of("smollm3"))
    for file, head, tail, said in (
        (lfm2, None, 1, "is recurrent, .*; the last 2 layers do"),
        (lfm2, 2, 2, "has attention, .*; the first 3 layers do"),
        (smollm3, 3, 4, "multiple of 4$"),
        (smollm3, None, 2, "; the last 4 layers do"),
    ):
        with pytest.raises(ValueError, match=said):
            checked_head(file, head, tail)


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "mamba2"])
def test_a_chain_of_workers_that_pass_rows_on(
    path_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Also where the way between them is cut: what a recurrent state cannot take back is computed anew."""
    path, (first, end) = path_of(name), CUTS[name]
    limits = Limits(hops=("127.0.0.1",))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(path, layers=cut, state=tmp_path / "state", limits=limits, n_ctx=N_CTX, **EXACT)
            )
            for cut in ((0, first), (first, end))
        ]
        remotes = [stack.enter_context(sllm.connect(worker.uri)) for worker in workers]
        link = stack.enter_context(Link(("127.0.0.1", workers[1].address.port)))
        split = stack.enter_context(
            sllm.SplitTarget(
                path,
                head=0,
                tail=EVERY[name].n_layer - end,
                middle=remotes,
                hops=[f"127.0.0.1:{link.port}"],
                codec="f32",
                n_ctx=N_CTX,
                **EXACT,
            )
        )
        model = stack.enter_context(sllm.Model(path))
        for i, cuts in enumerate(((), (3, 9))):
            prompt = prompt_of(30, i)
            expected = one_by_one(model, prompt, SAMPLED, 24, N_CTX)
            stream = sllm.generate(split, prompt, draft="ngram", sampling=SAMPLED, max_tokens=24)
            found: list[int] = []
            for run in stream:
                if any(len(found) < n <= len(found) + len(run.tokens) for n in cuts):
                    link.cut()
                found += run.tokens
            assert found == expected
            assert stream.stats.remote is not None
            assert stream.stats.remote.n_hops == 1

"""A model's own heads as the draft of a split: the tail is here, and with it the head behind it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EXACT, GREEDY, PLAIN, one_by_one
from random_models import HEADS, N_VOCAB
from remote_worker import through

import sllm
from sllm.cli.slow_link import Link
from sllm.draft.drafters import MtpDrafter
from sllm.engine.layers import open_layers
from sllm.engine.mtp import has_mtp
from sllm.targets.base import MtpTarget
from sllm.worker.server import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.jobs import Draft

N_CTX = 256
SAMPLED = replace(PLAIN, temperature=0.8, seed=5)
N_TOKENS = 30

pytestmark = pytest.mark.skipif(not has_mtp(), reason="this build cannot draft with MTP heads")


class Forced(MtpDrafter):
    """Whether a draft pays is measured, and differs from machine to machine: with this one it does."""

    adaptive = False


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model whose head agrees with it most of the time, as long as it gets the token's own embedding."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        found = folder / f"{name}.gguf"
        if not found.exists():
            shape = replace(HEADS[name], routers="q8_0")
            if name.startswith("nemotron_h"):
                shape = replace(shape, n_layer=12)  # of 8, none would be left between
            random_models.make_agreeing(shape).write(found)
        return found

    return path


def cuts_of(path: Path) -> tuple[int, int]:
    """A head and a tail of few layers that run apart from those between."""
    file = open_layers(path)
    n = file.n_layer
    return next(
        (head, tail)
        for tail in range(1, n)
        for head in range(1, n - tail)
        if not any(file.obstacle(a, b) for a, b in ((0, head), (head, n - tail), (n - tail, n)))
    )


@pytest.fixture
def make_split(path_of: Callable[[str], Path]) -> Iterator[Callable[..., sllm.SplitTarget]]:
    """A split with a worker of the layers between, and the heads loaded with its tail."""
    with ExitStack() as stack:

        def make(name: str, **options: Any) -> sllm.SplitTarget:
            path = path_of(name)
            head, tail = cuts_of(path)
            worker = stack.enter_context(Worker(path, layers=True, insecure=True, n_ctx=N_CTX, **EXACT))
            remote = stack.enter_context(sllm.connect(worker.uri))
            settings: dict[str, Any] = {"head": head, "tail": tail, "codec": "f32", "n_ctx": N_CTX}
            settings |= {"load_mtp": True, **EXACT, **options}
            return stack.enter_context(sllm.SplitTarget(path, middle=remote, **settings))

        yield make


def prompt_of(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(10, N_VOCAB, n).astype(np.int32)


def without_ends(target: sllm.Target, sampling: sllm.SamplingParams) -> sllm.SamplingParams:
    """No text of a random model shall end by itself."""
    ends = [(token, -np.inf) for token in range(N_VOCAB) if target.vocab.is_eog(token)]
    return replace(sampling, logit_bias=ends)


def text_of(
    target: sllm.Target, prompt: Any, sampling: Any, draft: Any, n: int = N_TOKENS
) -> tuple[list[int], Any]:
    stream = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=n)
    return [token for run in stream for token in run.tokens], stream.stats


@pytest.mark.parametrize("name", HEADS)
def test_the_text_is_the_same_and_as_much_of_the_draft_holds(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget], name: str
) -> None:
    """The heads draft to the token what they draft for the whole model."""
    split = make_split(name)
    assert isinstance(split, MtpTarget)
    # Takes back as many tokens as a split, unless that is told otherwise.
    with sllm.LocalTarget(path_of(name), n_ctx=N_CTX, n_rollback=4, **EXACT) as whole:
        there, here = Forced(whole.heads()), Forced(split.heads())
        prompt = prompt_of(150)  # in several chunks
        ways = [without_ends(whole, SAMPLED), without_ends(whole, GREEDY)]
        expected, _ = text_of(split, prompt, ways[0], None)
        assert text_of(split, prompt, ways[0], "mtp")[0] == expected
        for sampling in ways:
            expected, _ = text_of(whole, prompt, sampling, None)
            # The first token of a split comes with its prompt, and is not drafted.
            _, same = text_of(whole, [*prompt, expected[0]], sampling, there, N_TOKENS - 1)
            found, stats = text_of(split, prompt, sampling, here)
            assert found == expected
            if whole.model.can_rollback == "recompute":  # a split of such a model checks no drafts
                assert stats.n_drafted == 0
            else:
                assert (stats.n_drafted, stats.n_accepted) == (same.n_drafted, same.n_accepted)
                assert stats.n_tokens > 1.5 * stats.n_passes
            prompt = np.array([*prompt[:90], *expected, 20, 21], dtype=np.int32)  # leaves the text before


@pytest.mark.parametrize("name", ["glm4moe, head", "qwen35, head"])
def test_texts_that_take_turns(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget], name: str
) -> None:
    """Each in a sequence of its own, on threads of their own."""
    alone, split = make_split(name), make_split(name, n_seq_max=3)
    prompts = [prompt_of(n, n) for n in (8, 21, 34)]
    sampling = without_ends(split, SAMPLED)
    with sllm.Model(path_of(name)) as model:
        expected = [one_by_one(model, prompt, sampling, 24, N_CTX) for prompt in prompts]
    split.heads()
    drafters = [Forced(split.heads()) for _ in prompts]
    streams = [
        sllm.generate(split, prompt, draft=drafter, sampling=sampling, max_tokens=24)
        for prompt, drafter in zip(prompts, drafters, strict=True)
    ]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda stream: [token for run in stream for token in run.tokens], streams))
    assert found == expected
    assert [drafter.seq_id for drafter in drafters] == [0, 1, 2]
    for prompt, stream in zip(prompts, streams, strict=True):
        _, stats = text_of(alone, prompt, sampling, Forced(alone.heads()), 24)
        assert (stream.stats.n_drafted, stream.stats.n_accepted) == (stats.n_drafted, stats.n_accepted)
        assert stats.n_accepted > 0


def test_a_cut_of_the_link_and_an_interrupted_pass(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget]
) -> None:
    name = "qwen35, head"
    path = path_of(name)
    head, tail = cuts_of(path)
    with (
        Worker(path, layers=True, insecure=True, n_ctx=N_CTX, **EXACT) as worker,
        Link(("127.0.0.1", worker.address.port)) as link,
        sllm.connect(through(link, worker.uri)) as remote,
        sllm.SplitTarget(
            path, head=head, tail=tail, middle=remote, codec="f32", n_ctx=N_CTX, load_mtp=True, **EXACT
        ) as split,
    ):
        prompt, sampling = prompt_of(20), without_ends(split, SAMPLED)
        with sllm.Model(path) as model:
            expected = one_by_one(model, prompt, sampling, 30, N_CTX)
        assert split._tail is not None
        drafter = Forced(split.heads())
        drafter.open(prompt.tolist(), sampling)
        with closing(split.open(prompt, sampling, 30)) as generation:
            text = prompt.tolist()
            for step in range(30):
                if step == 3:
                    link.cut()
                if step == 5:
                    split._tail.memory.clear()  # what an aborted decode leaves
                generation.hint(len(text), drafter.draft(text, [], 3, 0.0))
                commit = next(generation, None)
                if commit is None:
                    break
                text += commit.tokens
            assert text[len(prompt) :][:30] == expected
            assert generation.remote.n_reconnects == 1


def test_parts_in_files_of_their_own(
    path_of: Callable[[str], Path], tmp_path: Path, make_split: Callable[..., sllm.SplitTarget]
) -> None:
    """The tail's file has the head and no embedding, which is in the file of the first layers."""
    name = "glm4moe, head"
    path = path_of(name)
    head, tail = cuts_of(path)
    n = open_layers(path).n_layer
    sllm.export_layers(path, tmp_path / "first.gguf", 0, head)
    sllm.export_layers(path, tmp_path / "last.gguf", n - tail, n)
    drafted = []
    whole = make_split(name)
    sampling = without_ends(whole, SAMPLED)
    with (
        Worker(path, layers=True, insecure=True, n_ctx=N_CTX, **EXACT) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.SplitTarget(
            tmp_path / "first.gguf",
            tail_path=tmp_path / "last.gguf",
            head=head,
            tail=tail,
            middle=remote,
            codec="f32",
            n_ctx=N_CTX,
            load_mtp=True,
            **EXACT,
        ) as parts,
    ):
        for split in (whole, parts):
            text, stats = text_of(split, prompt_of(30), sampling, Forced(split.heads()))
            drafted.append((text, stats.n_drafted, stats.n_accepted))
        (tmp_path / "first.gguf").unlink()  # it stays open
        assert text_of(parts, prompt_of(30), sampling, "mtp")[0] == drafted[0][0]
    assert drafted[0] == drafted[1]


def test_heads_cost_memory_only_where_they_are_asked_for(make_split: Callable[..., sllm.SplitTarget]) -> None:
    plain = make_split("glm4moe, head", load_mtp=False)
    loaded = make_split("glm4moe, head")
    assert loaded.size_bytes > plain.size_bytes
    with pytest.raises(sllm.UnsupportedModelError, match=r"SplitTarget\(load_mtp=True\)"):
        sllm.generate(plain, prompt_of(9), draft="mtp")
    assert plain.open(prompt_of(9), GREEDY, 3).finish_reason is None


def test_splits_without_heads_here_say_so(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget], tmp_path: Path
) -> None:
    for tail in (None, 0):
        split = make_split("glm4moe, head", tail=tail)
        with pytest.raises(sllm.UnsupportedModelError, match=f"tail={tail}"):
            sllm.generate(split, prompt_of(9), draft="mtp")
    file = random_models.make(HEADS["glm4moe, head"])
    file.tensors = {name: one for name, one in file.tensors.items() if not name.startswith(b"blk.4.")}
    path = file.write(tmp_path / "trunk.gguf")
    with (
        Worker(path, layers=True, insecure=True, n_ctx=N_CTX) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.SplitTarget(path, head=1, tail=1, middle=remote, n_ctx=N_CTX, load_mtp=True) as split,
    ):
        with pytest.raises(sllm.UnsupportedModelError, match="no MTP heads among the weights"):
            sllm.generate(split, prompt_of(9), draft="mtp")
        assert len(text_of(split, prompt_of(9), PLAIN, None, 5)[0]) > 0  # it goes on as it was
    assert path_of("glm4moe, head").exists()


def test_what_is_open_and_what_is_closed(make_split: Callable[..., sllm.SplitTarget]) -> None:
    split = make_split("glm4moe, head")
    sampling = without_ends(split, SAMPLED)
    first = sllm.generate(split, prompt_of(20), sampling=sampling, max_tokens=9)
    next(first)
    with pytest.raises(sllm.BusyError, match="open"):
        split.heads()
    first.close()
    heads = split.heads()
    assert split.heads() is heads
    stream = sllm.generate(split, prompt_of(20), draft="mtp", sampling=sampling, max_tokens=30)
    next(stream)
    heads.cancel()  # nothing is being drafted: no pass is cancelled by it
    next(stream)
    split.close()
    with pytest.raises(sllm.ClosedError):
        list(stream)
    with pytest.raises(sllm.ClosedError):
        heads.draft([0], [5])
    drafter = MtpDrafter(heads)
    drafter.cancel()
    drafter.close()
    stream.close()


def test_a_text_goes_on_while_the_drafts_of_another_are_cancelled(
    path_of: Callable[[str], Path], make_split: Callable[..., sllm.SplitTarget]
) -> None:
    split = make_split("glm4moe, head", n_seq_max=2)
    sampling = without_ends(split, SAMPLED)
    heads = split.heads()
    drafted: list[Draft] = []

    def cancel() -> None:
        for _ in range(2000):
            heads.cancel()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(cancel)
        while not done.done() or not drafted:
            text, _ = text_of(split, prompt_of(9), sampling, None, 6)
            found, _ = text_of(split, prompt_of(9), sampling, Forced(heads), 6)
            assert found == text
            drafted.append(heads.draft([1], [7], n_max=1, sampling=sampling, pos=0))
    assert path_of("glm4moe, head").exists()


def test_the_command(path_of: Callable[[str], Path], command: Callable[..., Any]) -> None:
    path = path_of("glm4moe, head")
    with Worker(path, layers=True, insecure=True, n_ctx=N_CTX) as worker:
        where = ["--remote", worker.uri, "--target", str(path), "--head", "1", "--tail", "1"]
        drafted = command("run", "Once", *where, "--n-ctx", "128", "-n", "12", "--draft", "mtp")
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout.strip()

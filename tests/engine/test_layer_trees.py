"""Trees of tokens through layers: rows with parents give what the whole model gives, to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, PLAIN, examples, make_prompt, one_by_one, without_end
from trees import main_path, n_right, random_tree, shuffled

import sllm
from sllm.engine.architectures import ARCHITECTURES
from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.engine.tree import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from oracles import Floats

BRANCHING = [name for name, shape in random_models.SHAPES.items() if shape.architecture in ARCHITECTURES]
OPTIONS: dict[str, Any] = {"n_ctx": 256, **EXACT}

Tree = tuple[list[int], list[int]]


class Pieces:
    """A model in ranges, of which the last one selects."""

    def __init__(
        self, stack: ExitStack, path: Path, vocabulary: sllm.Model, cuts: Sequence[int], **options: Any
    ) -> None:
        file = open_layers(path)
        self.embedding = stack.enter_context(Embedding(file))
        ranges = list(itertools.pairwise(cuts))
        self.ranges = [
            stack.enter_context(LayerRange(file, *ends, **{**OPTIONS, **options})) for ends in ranges[:-1]
        ]
        self.tail = stack.enter_context(
            LayerRange(
                file,
                *ranges[-1],
                output=True,
                vocabulary=vocabulary,
                **{**OPTIONS, **options, "n_batch": 512},
            )
        )

    def hidden(
        self, rows: Sequence[Sequence[int]], seqs: Sequence[int], pos: Sequence[int], trees: Sequence[Tree]
    ) -> Floats:
        """What enters the last range, for the rows and the tree of each sequence."""
        hidden = [self.embedding.rows([*row, *tokens]) for row, (tokens, _) in zip(rows, trees, strict=True)]
        ends = np.cumsum([len(one) for one in hidden])[:-1]
        for one in self.ranges:
            out = one.forward(hidden, seq_id=seqs, pos=pos, parents=[parents for _, parents in trees])
            hidden = np.split(out, ends)
        return np.concatenate(hidden)

    def verify(
        self, texts: Sequence[Sequence[int]], seqs: Sequence[int], trees: Sequence[Tree], **options: Any
    ) -> Any:
        """Rows from where the memory ends, and a tree after them."""
        pos = [self.tail.memory.length(seq) for seq in seqs]
        rows = [text[at:] for text, at in zip(texts, pos, strict=True)]
        hidden = self.hidden(rows, seqs, pos, trees)
        return self.tail.verify(
            seqs,
            rows,
            [tokens for tokens, _ in trees],
            hidden=hidden,
            parents=[parents for _, parents in trees],
            pos=pos,
            **options,
        )


@pytest.fixture
def stack() -> Any:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("name", BRANCHING)
def test_a_tree_through_layers_is_one_through_the_whole(
    random_model: Callable[..., Path], stack: ExitStack, name: str
) -> None:
    path = random_model(name)
    model = stack.enter_context(sllm.Model(path))
    sampling = without_end(model, dataclasses.replace(PLAIN, seed=3))
    prompt = make_prompt(model, 5, seed=1)
    n = len(prompt)
    wanted = one_by_one(model, prompt, sampling, 34, n_ctx=256)
    rng = np.random.default_rng(7)
    n_side = 0
    for cuts in random_models.SHAPES[name].cuts():
        pieces = Pieces(stack, path, model, cuts)
        whole = stack.enter_context(model.context(**OPTIONS))
        assert all(one.context.can_branch for one in (*pieces.ranges, pieces.tail))
        text = prompt.tolist()
        while len(text) < n + 30:
            ahead = wanted[len(text) - n :]
            tree = random_tree(rng, int(rng.integers(0, 25)), ahead, model.vocab.n_tokens)
            options: dict[str, Any] = {"sampling": sampling, "start": n, "logprobs": True}
            expected = whole.verify(
                [0], [text[whole.memory.length() :]], [tree[0]], parents=[tree[1]], **options
            )
            found = pieces.verify([text], [0], [tree], **options)
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.n_accepted, expected.n_accepted)
            assert found.logprobs is not None
            assert expected.logprobs is not None
            assert np.array_equal(found.logprobs, expected.logprobs)
            before = len(text)
            text += found.tokens[0, : found.n_accepted[0] + 1].tolist()
            assert text[n:] == wanted[: len(text) - n]
            # Of the accepted path, what is on the main path stays; the rest is to be sent again.
            shared = n_common(main_path(*tree), text[before:-1])
            assert pieces.tail.memory.length() == before + shared
            assert all(one.memory.length() >= before + shared for one in pieces.ranges)
            n_side += before + shared < len(text) - 1
    assert n_side  # or the trees were as good as chains


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "bloom", "qwen2vl"])
@examples(8)
@given(data=st.data())
def test_several_sequences_with_trees_and_chains(
    random_model: Callable[..., Path], name: str, data: st.DataObject
) -> None:
    """Ragged, in any order of sequences and of nodes, in more batches and ubatches than one."""
    n_seqs = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    options: dict[str, Any] = {
        "n_seq_max": n_seqs,
        "n_ctx": 256 * n_seqs,
        "n_ubatch": data.draw(st.sampled_from([1, 3, 8, 64])),
    }
    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(random_model(name)))
        sampling = [without_end(model, dataclasses.replace(PLAIN, seed=i)) for i in range(n_seqs)]
        prompts = [make_prompt(model, int(rng.integers(1, 9)), seed=i) for i in range(n_seqs)]
        wanted = [one_by_one(model, p, s, 14, n_ctx=256) for p, s in zip(prompts, sampling, strict=True)]
        cuts = random_models.SHAPES[name].cuts()[0]
        n_batch = data.draw(st.sampled_from([24, 64]))
        pieces = Pieces(stack, random_model(name), model, cuts, n_batch=n_batch, **options)
        texts = [p.tolist() for p in prompts]
        for _ in range(5):
            seqs = data.draw(st.permutations(range(n_seqs)))[: data.draw(st.integers(1, n_seqs))]
            seqs = [i for i in seqs if len(texts[i]) < len(prompts[i]) + 14]
            if not seqs:
                break
            trees = []
            for i in seqs:
                ahead = wanted[i][len(texts[i]) - len(prompts[i]) :]
                chain = (ahead[:3], list(range(-1, min(len(ahead), 3) - 1)))
                tree = shuffled(rng, *random_tree(rng, int(rng.integers(0, 16)), ahead, model.vocab.n_tokens))
                trees.append(chain if rng.random() < 0.3 else tree)
            found = pieces.verify(
                [texts[i] for i in seqs],
                seqs,
                trees,
                sampling=[sampling[i] for i in seqs],
                start=[len(prompts[i]) for i in seqs],
            )
            for row, (i, tree) in enumerate(zip(seqs, trees, strict=True)):
                ahead = wanted[i][len(texts[i]) - len(prompts[i]) :]
                n = int(found.n_accepted[row])
                assert n >= n_right(*tree, ahead[:-1])
                texts[i] += found.tokens[row, : n + 1].tolist()
                assert texts[i][len(prompts[i]) :][:14] == wanted[i][: len(texts[i]) - len(prompts[i])]


@examples(15)
@given(seed=st.integers(0, 999), n_nodes=st.integers(1, 64), n_ubatch=st.sampled_from([1, 7, 128]))
def test_each_row_of_a_tree_is_that_of_its_path(llama: Path, seed: int, n_nodes: int, n_ubatch: int) -> None:
    """And the memory goes on behind the main path as if there had been nothing else."""
    rng = np.random.default_rng(seed)
    n_embd, n_before = 64, int(rng.integers(1, 30))
    _, parents = shuffled(rng, *random_tree(rng, n_nodes, [], 10**6))
    rows = rng.standard_normal((n_before + len(parents), n_embd), dtype=np.float32)
    more = rng.standard_normal((3, n_embd), dtype=np.float32)
    with (
        LayerRange(llama, 1, 3, n_ubatch=n_ubatch, n_batch=128, **OPTIONS) as one,
        LayerRange(llama, 1, 3, n_batch=128, **OPTIONS) as other,
    ):
        found = one.forward(rows, parents=parents)
        main: list[int] = []
        while (main[-1] if main else -1) in parents:
            main.append(parents.index(main[-1] if main else -1))
        assert one.memory.length() == n_before + len(main)
        before = other.forward(rows[:n_before])
        assert np.array_equal(found[:n_before], before)
        for node in rng.choice(len(parents), min(len(parents), 12), replace=False).tolist():
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            expected = other.forward(rows[[n_before + i for i in path]], pos=n_before)
            assert np.array_equal(found[n_before + node], expected[-1])
        keep = int(rng.integers(0, len(main) + 1))
        other.forward(np.concatenate([rows[[n_before + i for i in main[:keep]]], more[:1]]), pos=n_before)
        one.forward(more[:1], pos=n_before + keep)
        assert one.memory.length() == other.memory.length() == n_before + keep + 1
        assert np.array_equal(one.forward(more[1:]), other.forward(more[1:]))


def test_trees_that_are_none_are_refused_and_lose_nothing(llama: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((320, 64), dtype=np.float32)
    with (
        LayerRange(llama, 1, 3, n_batch=128, **OPTIONS) as one,
        LayerRange(llama, 1, 3, **OPTIONS) as other,
    ):
        one.forward(rows[:10])
        expected = other.forward(rows[:12])[10:12]
        for parents in ([0], [-2], [-1, 1], [-1, 2, 1], [-1, -1, 2**31 - 1], [-(2**31)]):
            with pytest.raises(ValueError, match="parent"):
                one.forward(rows[10:20], parents=parents)
            assert one.memory.length() == 10
        for n, m in ((5, 5), (5, 6), (300, MAX_NODES + 1)):
            with pytest.raises(ValueError, match="tree"):
                one.forward(rows[10 : 10 + n], parents=[-1] * m)
        with pytest.raises(ValueError, match="one for each"):
            one.forward([rows[:3]], seq_id=[0], parents=[[-1], [-1]])
        with pytest.raises(TypeError, match="parents"):
            one.forward(rows[10:20], parents=[-1.5])
        assert one.memory.length() == 10
        assert np.array_equal(one.forward(rows[10:12]), expected)


def test_a_tree_that_does_not_fit_is_refused_before_anything_is_computed(llama: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((256, 64), dtype=np.float32)
    with LayerRange(llama, 1, 3, **{**OPTIONS, "n_ctx": 256}) as one:
        size = one.context.n_ctx_seq
        one.forward(rows[: size - 6])
        with pytest.raises(sllm.ContextFullError):
            one.forward(rows[:8], parents=[-1] * 7)
        with pytest.raises(sllm.ContextFullError):
            one.forward(rows[:7], parents=range(-1, 5))
        assert one.memory.length() == size - 6
        one.forward(rows[:6], parents=[-1, -1, 0, 0, 0])
        assert one.memory.length() == size - 3
        one.forward(rows[:3])
        assert one.memory.length() == size


@pytest.mark.parametrize("name", ["qwen35", "lfm2"])
def test_layers_with_a_state_hold_no_trees(random_model: Callable[..., Path], name: str) -> None:
    shape = random_models.HYBRID[name]
    start, stop = shape.cuts()[0][:2]
    with LayerRange(random_model(name), start, stop, **OPTIONS) as one:
        rows = np.random.default_rng(0).standard_normal((5, shape.n_embd), dtype=np.float32)
        assert not one.context.can_branch
        one.forward(rows)
        with pytest.raises(sllm.UnsupportedModelError, match="no trees"):
            one.forward(rows, parents=[-1, -1])
        assert one.memory.length() == 5


def test_layers_that_end_in_logits_leave_trees_to_verify(llama: Path) -> None:
    with LayerRange(llama, 2, 4, output=True, **OPTIONS) as tail:
        with pytest.raises(ValueError, match="verify"):
            tail.forward(np.ones((3, 64), dtype=np.float32), parents=[-1, -1])
        assert tail.memory.length() == 0


def test_a_tree_that_is_cancelled_leaves_what_was_there(llama: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 64), dtype=np.float32)
    with LayerRange(llama, 1, 3, **OPTIONS) as one, LayerRange(llama, 1, 3, **OPTIONS) as other:
        one.forward(rows[:20])
        for _ in range(20):
            stop = threading.Timer(0.0005, one.cancel)
            stop.start()
            try:
                one.forward(rows[20:], parents=[i // 2 - 1 for i in range(39)])
                one.memory.truncate(0, 20)
            except sllm.CancelledError:
                pass
            stop.join()
            assert one.memory.length() == 20
        assert np.array_equal(one.forward(rows[20:22]), other.forward(rows)[20:22])

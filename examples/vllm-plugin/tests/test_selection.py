"""The selection on torch's tensors is the one of sllm's core."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: it comes with vLLM")
sllm = pytest.importorskip("sllm", reason="sllm is not installed here: nothing to compare with")

from sllm_vllm.arguments import Selection  # noqa: E402
from sllm_vllm.selection import Settings, select  # noqa: E402

from sllm.engine._ffi import check, ffi, lib  # noqa: E402


@pytest.fixture(scope="module")
def model() -> object:
    with sllm.Model(sllm.embedded.TARGET, vocab_only=True) as model:
        yield model


def core(model: object, s: Selection, row: torch.Tensor, pos: int) -> int:
    params = sllm.SamplingParams(
        temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, seed=s.seed
    )
    out = ffi.new("int32_t *")
    logits = row.numpy()
    check(
        lib.sllm_select(
            model.compiled(params),
            ffi.from_buffer("float[]", logits),
            len(logits),
            pos,
            ffi.new("int32_t[]", pos),
            0,
            out,
            ffi.NULL,
        )
    )
    return int(out[0])


KINDS = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "greedy": {"temperature": 0.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "defaults": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "min_p alone": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.02},
    "top_p alone": {"temperature": 1.2, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
    "top_k alone": {"temperature": 2.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    "more than there are": {"temperature": 1.0, "top_k": 100_000, "top_p": 0.5, "min_p": 0.0},
}


@pytest.mark.parametrize("coarse", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS), ["plain", "defaults"]], ids=str)
def test_select(model: object, kinds: list[str], coarse: bool) -> None:
    """Rows of one kind of request, and batches of several; with ties, as 16-bit models have."""
    draw = random.Random(repr((kinds, coarse)))
    rng = torch.Generator().manual_seed(draw.randrange(2**31))
    n_vocab = model.vocab.n_tokens
    for _ in range(6):
        n = 12
        logits = torch.randn(n, n_vocab, generator=rng) * 4
        if coarse:
            logits = logits.bfloat16().float()
        logits[:, draw.randrange(n_vocab)] = -torch.inf
        logits[:, draw.randrange(n_vocab)] = torch.nan
        logits[:, draw.randrange(n_vocab)] = -0.0
        chosen = [
            Selection(draw.choice([0, 2**64 - 1, draw.getrandbits(64)]), **KINDS[draw.choice(kinds)])
            for _ in range(n)
        ]
        positions = [draw.randrange(1, 5000) for _ in range(n)]
        found = select(logits, torch.tensor(positions), Settings.of(chosen, torch.device("cpu")))
        expected = [core(model, s, row, pos) for s, row, pos in zip(chosen, logits, positions, strict=True)]
        assert found.tolist() == expected


def test_logits_are_left_alone(model: object) -> None:
    logits = torch.randn(3, model.vocab.n_tokens)
    before = logits.clone()
    select(logits, torch.tensor([1, 2, 3]), Settings.of([Selection(1)] * 3, torch.device("cpu")))
    assert torch.equal(logits, before)

"""What is said of exactness, and that it holds: rows one by one against rows together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from random_models import EVERY

import sllm
from sllm import embedded
from sllm.engine import cpu, exact, gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64)


def rows_of(model: sllm.Model, tokens: Any, batches: tuple[int, ...], **options: Any) -> Any:
    """Logits behind every token, computed in batches of these sizes."""
    with model.context(n_ctx=512, n_outputs_max=max(batches), **{**exact.SETTINGS, **options}) as context:
        found = []
        pos = 0
        for n in batches:
            rows = context.decode(tokens[pos : pos + n], logits="all")
            assert rows is not None
            found.append(rows.copy())
            pos += n
        return np.concatenate(found)


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_embd", [64, 256])
def test_what_has_no_obstacle_is_exact(
    random_model: Callable[..., Path], weights: str, n_threads: int, n_embd: int
) -> None:
    """Every size of batch, by whatever kernels this build has chosen here."""
    path = random_model("llama", weights=weights, n_embd=n_embd, n_ff=2 * n_embd, n_head=n_embd // 32)
    assert exact.obstacles(path) == ()
    n = sum(BATCHES)
    tokens = np.random.default_rng(0).integers(0, 256, n).astype(np.int32)
    with sllm.Model(path) as model:
        together = rows_of(model, tokens, BATCHES, n_threads=n_threads)
        alone = rows_of(model, tokens, (1,) * n, n_threads=n_threads)
    assert np.ptp(alone) > 0.1
    assert np.array_equal(together, alone)


def test_the_embedded_pair_is_exact() -> None:
    for path in (embedded.TARGET, embedded.DRAFT):
        assert exact.obstacles(path) == ()
        with sllm.Model(path) as model:
            tokens = model.vocab.encode(
                "Once upon a time there was a little fox who wanted to learn to sing."
            )
            batches = (5, 1, 3, 2)
            together = rows_of(model, tokens[: sum(batches)], batches)
            alone = rows_of(model, tokens[: sum(batches)], (1,) * sum(batches))
        assert np.array_equal(together, alone)


@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "q4_K"])
def test_other_weights_are_named(random_model: Callable[..., Path], weights: str) -> None:
    more = {"n_embd": 256, "n_ff": 256, "n_head": 8} if weights == "q4_K" else {}
    (reason,) = exact.obstacles(random_model("llama", weights=weights, **more))
    assert weights in reason
    assert "not q8_0 or q4_0" in reason


def test_routers_of_experts_are_looked_at(random_model: Callable[..., Path]) -> None:
    """They are f32 whatever the rest is."""
    (reason,) = exact.obstacles(random_model("llama, experts"))
    assert "ffn_gate_inp.weight" in reason
    assert "f32" in reason


def test_what_is_only_looked_up_is_no_product(random_model: Callable[..., Path]) -> None:
    """An embedding of its own may be of any type; as the output it may not."""
    header = gguf.read_header(random_model("llama", weights="q8_0"))
    embedding = header.tensors["token_embd.weight"]
    changed = {**header.tensors, "token_embd.weight": gguf.Tensor(embedding.dims, 0, *_rest(embedding))}
    assert 0 not in exact._product_kinds(gguf.Header(3, header.pairs, changed, 0))
    del changed["output.weight"]
    assert exact._product_kinds(gguf.Header(3, header.pairs, changed, 0))[0] == ("token_embd.weight", 1)


def _rest(tensor: gguf.Tensor) -> tuple[int, int]:
    return tensor.offset, tensor.size


def test_gpus_and_amx_are_named(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_model("llama")
    (reason,) = exact.obstacles(path, offloaded=True)
    assert "GPU" in reason
    built = cpu.Build("native", "GNU 14.2.0", amx=True, tag="", variants=())
    monkeypatch.setattr(cpu, "build", lambda: built)
    monkeypatch.setattr(cpu, "features", lambda: ("amx_int8", "sse2"))
    (reason,) = exact.obstacles(path)
    assert "SLLM_AMX=ON" in reason
    monkeypatch.setattr(cpu, "features", lambda: ("sse2",))
    assert exact.obstacles(path) == ()


def test_every_shape_that_is_tested_for_equality_says_why_it_might_not_be(
    random_model: Callable[..., Path],
) -> None:
    """Experts have routers; all others of the shapes have none but q8_0 matrices."""
    for name, shape in EVERY.items():
        routers = any("ffn_gate_inp" in tensors for tensors in shape.tensors.values())
        assert bool(exact.obstacles(random_model(name))) == routers, name


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(sllm.ModelLoadError):
        exact.obstacles(path)

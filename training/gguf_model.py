"""Read an exported GGUF back into PyTorch, dequantised: what llama.cpp computes with, up to rounding."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from model import Config, Llama


def load_gguf(path: Path) -> Llama:
    reader = gguf.GGUFReader(path)

    def value(key: str) -> float:
        return float(reader.fields[f"llama.{key}"].contents())

    model = Llama(
        Config(
            n_vocab=int(value("vocab_size")),
            n_embd=int(value("embedding_length")),
            n_layer=int(value("block_count")),
            n_head=int(value("attention.head_count")),
            n_head_kv=int(value("attention.head_count_kv")),
            n_ff=int(value("feed_forward_length")),
            n_ctx=int(value("context_length")),
            rope_freq_base=value("rope.freq_base"),
            norm_eps=value("attention.layer_norm_rms_epsilon"),
        )
    )
    weights = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    model.load_state_dict(weights)
    return model.eval()

"""A GGUF file of a Llama model as the folder that vLLM reads: safetensors, ``config.json``, the tokenizer.

Run it with the Python of the environment that has vLLM, plus gguf: ``PYTHON convert.py MODEL.gguf FOLDER``.
The weights are what the file's quantised ones stand for, in float32: both engines then compute with the same
numbers, but for the order of their sums.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER_DEFINED = 3, 4  # types of tokens (llama.h: llama_token_type)


def hf_name(name: str) -> str:
    """Of a tensor: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[-1] != "weight":
        raise SystemExit(f"{name} is no weight: only plain Llama models can be converted")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    return f"{OUTER[parts[0]]}.weight"


def halves(weight: Any, n_heads: int) -> Any:
    """Rows of a query or key matrix in Hugging Face's order: llama.cpp rotates neighbouring rows of a head,
    Hugging Face a row of its first half and one of its second.
    """
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_model(reader: Any, fields: dict[str, Any], folder: Path) -> bool:
    """Write the weights; whether the output matrix is the embedding."""
    import numpy as np
    from gguf import quants
    from safetensors.numpy import save_file

    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = halves(weight, heads[kind])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "lm_head.weight" not in tensors


def write_config(fields: dict[str, Any], folder: Path, *, tied: bool) -> None:
    """Write ``config.json``."""

    def of(name: str) -> int:
        return int(fields[f"llama.{name}"])

    theta = float(fields["llama.rope.freq_base"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("embedding_length") // of("attention.head_count"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[int(fields["tokenizer.ggml.eos_token_id"])],
        "bos_token": tokens[int(fields["tokenizer.ggml.bos_token_id"])],
        "clean_up_tokenization_spaces": False,
        **({"chat_template": t} if (t := fields.get("tokenizer.chat_template")) else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a GGUF file of a Llama model for vLLM, in float32.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    import gguf

    reader = gguf.GGUFReader(args.gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{args.gguf} is a {fields['general.architecture']} model, expected llama")
    args.folder.mkdir(parents=True, exist_ok=True)
    tied = write_model(reader, fields, args.folder)
    write_config(fields, args.folder, tied=tied)
    write_tokenizer(fields, args.folder)


if __name__ == "__main__":
    main()

"""Write a checkpoint as GGUF: architecture ``llama``, every matrix Q8_0, norms f32, tokenizer, chat format.

Parameter names in ``model.py`` are llama.cpp's tensor names already, so nothing is renamed or permuted.

The file is written under a temporary name and renamed, so that a reader never sees half of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

from model import Llama, load

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DESCRIPTION = (
    "Trained from scratch on generated text of a small invented world (stories, questions, small sums, "
    "phrase pairs, messages; English and Chinese). For demonstrations and tests; it knows nothing else."
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Path) -> None:
    data = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids: dict[str, int] = data["model"]["vocab"]
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    tokens = sorted(ids | special, key=lambda t: (ids | special)[t])
    merges = [" ".join(m) if isinstance(m, list) else m for m in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(special["<|endoftext|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_eot_token_id(special["<|im_end|>"])
    writer.add_pad_token_id(special["<|pad|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(model: Llama, tokenizer: Path, out: Path, name: str) -> None:
    c = model.c
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(name)
    writer.add_author("the sllm authors")
    writer.add_license("MIT")
    writer.add_description(DESCRIPTION)
    writer.add_languages(["en", "zh"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.n_vocab)
    writer.add_context_length(c.n_ctx)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(c.rope_freq_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    add_tokenizer(writer, tokenizer)
    for key, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        if array.ndim == 2:
            if array.shape[1] % 32:
                raise ValueError(f"{key}: rows of {array.shape[1]} values cannot be Q8_0")
            quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer.json"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="general.name")
    args = parser.parse_args()
    write(load(args.checkpoint)[0], args.tokenizer, args.out, args.name)


if __name__ == "__main__":
    main()

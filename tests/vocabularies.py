"""Vocabularies of every kind that llama.cpp knows, each a GGUF file without weights (``vocab_only=True``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from oracles import GGUF

from sllm import embedded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# src/llama-vocab.cpp at the pin, in its order: each is a way of cutting a text before BPE.
PRE_TOKENIZERS = re.findall(
    r"\S+",
    """
    default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano
    deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es
    jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4
    granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2
    deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat chatglm-bpe glm4 glm5
    viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon
    minerva-7b megrez gpt-4o llama4 kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe
    trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4
    joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2
    """,
)

WORDS = ["th", "he", "the", "in", "er", "an", "on", "re", "ou", "is", "nd", "at", "'s", "ll", "12", "st"]
"""Pieces of more than one character, also behind a space."""


def _byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes, which BPE vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in plain else next(others)) for byte in range(256)}


LETTERS = _byte_letters()
BYTE_LEVEL = ("bpe", "hybriddna", "whitespace")


def _merged(space: str) -> tuple[list[str], list[str]]:
    """Words, also behind a space, and the merges that make them letter by letter."""
    tokens: list[str] = []
    merges: list[str] = []
    for word in (word for plain in WORDS for word in (plain, space + plain)):
        for n in range(2, len(word) + 1):
            if word[:n] not in tokens:
                tokens.append(word[:n])
                merges.append(f"{word[: n - 1]} {word[n - 1]}")
    return tokens, merges


def _tokens(kind: str) -> tuple[list[tuple[str, int]], list[str]]:
    """The tokens of a kind, with their types, and the merges."""
    raw = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    if kind in BYTE_LEVEL:
        words, merges = _merged(LETTERS[32])
        return [(letter, NORMAL) for letter in LETTERS.values()] + [(word, NORMAL) for word in words], merges
    words, merges = _merged("▁")
    known = [(word, NORMAL) for word in [*(chr(code) for code in range(33, 127)), "▁", "é", "好", *words]]
    if kind == "raw-bpe":  # BPE over characters, with bytes for those that it does not know
        return [*raw, ("\n", NORMAL), *known], merges
    first = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    if kind in ("spm", "ugm"):
        return [*first, *raw, *known], []
    if kind == "plamo2":
        return [
            *first,
            ("<pad>", CONTROL),
            *raw,
            *[(text.replace("▁", " "), type_) for text, type_ in known],
        ], []
    if kind == "rwkv":
        bytes_ = [(f"\\x{byte:02x}", NORMAL) for byte in range(256)]
        return [
            first[0],
            *bytes_,
            *[(text.replace("▁", " "), NORMAL) for text, _ in known if len(text) > 1],
        ], []
    assert kind == "wpm"
    return [*first, ("[CLS]", CONTROL), ("[SEP]", CONTROL), *known], []


MODELS = {"bpe": "gpt2", "raw-bpe": "gpt2", "spm": "llama", "ugm": "t5", "wpm": "bert"}

KINDS: list[tuple[str, str]] = [
    *((kind, "") for kind in ("spm", "ugm", "wpm", "rwkv", "plamo2", "hybriddna", "whitespace")),
    *(
        ("raw-bpe" if pre in ("gemma4", "granite-embed-multi-311m", "sarvam-moe") else "bpe", pre)
        for pre in PRE_TOKENIZERS
        if pre != "whitespace"  # it is the kind of this name, which cuts no other way
    ),
]
"""Every kind, with the pre-tokenizer of those that have one."""


def write(
    path: Path,
    kind: str,
    *,
    pre: str = "default",
    extra: Iterable[tuple[str, int]] = (),
    ids: Mapping[str, str | int] | None = None,
    values: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> Path:
    """Write a vocabulary.

    ``extra`` are further tokens with their types; ``ids`` the special tokens (``{"bos": "<s>"}``: its text or
    id); ``values`` other values below ``tokenizer.ggml.`` (a bool).
    """
    tokens, merges = _tokens(kind)
    tokens += [token for token in extra if token not in tokens]
    file = GGUF(embedded.DRAFT)
    file.tensors = {}
    file.metadata = {
        key: value for key, value in file.metadata.items() if not key.startswith((b"tokenizer.", b"split."))
    }
    texts = [text for text, _ in tokens]
    below = b"tokenizer.ggml."
    file.metadata[below + b"model"] = (8, MODELS.get(kind, kind).encode())
    file.metadata[below + b"tokens"] = (9, (8, [text.encode() for text in texts]))
    file.metadata[below + b"token_type"] = (9, (5, [type_ for _, type_ in tokens]))
    if kind in (*BYTE_LEVEL, "raw-bpe"):
        file.metadata[below + b"pre"] = (
            8,
            b"whitespace" if kind == "whitespace" else pre.encode() or b"default",
        )
        file.metadata[below + b"merges"] = (9, (8, [merge.encode() for merge in merges]))
    else:
        scores = [-float(i) / 100 for i in range(len(tokens))]
        file.metadata[below + b"scores"] = (9, (6, scores))
    for name, token in (ids or {}).items():
        id_ = texts.index(token) if isinstance(token, str) else token
        file.metadata[below + f"{name}_token_id".encode()] = (4, id_)
    for name, value in (values or {}).items():
        file.metadata[below + name.encode()] = (7, value)
    if template is not None:
        file.metadata[b"tokenizer.chat_template"] = (8, template.encode())
    return file.write(path)

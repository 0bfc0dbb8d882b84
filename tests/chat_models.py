"""Models with chat templates of one's own."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import sllm
from sllm.engine import gguf

if TYPE_CHECKING:
    from pathlib import Path


HERMES = (
    "{% if tools %}<|im_start|>system\nCall tools like this: <tool_call>{} </tool_call>"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template by which calls of tools are written as Hermes and Qwen do."""


def with_templates(path: Path, templates: dict[str, str], *, weights: bool = False) -> Path:
    """A file of the embedded model's vocabulary, with these chat templates in place of its own; ``weights``:
    a file of the whole model.
    """
    header = gguf.read_header(sllm.embedded.TARGET)
    pairs = [raw for key, raw in header.pairs.items() if key != "tokenizer.chat_template"]
    pairs += [gguf.pair(key, text) for key, text in templates.items()]
    n_tensors = len(header.tensors) if weights else 0
    head = b"GGUF" + struct.pack("<IQQ", header.version, n_tensors, len(pairs)) + b"".join(pairs)
    if weights:
        whole = sllm.embedded.TARGET.read_bytes()
        described = 24 + sum(map(len, header.pairs.values()))
        head += whole[described : header.size]
        head += b"\0" * (-len(head) % 32) + whole[-(-header.size // 32) * 32 :]
    path.write_bytes(head)
    return path

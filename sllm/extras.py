"""Parts of sllm that need packages of their own: which extra brings them, said where one is missing."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needs", "package_folders"]

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


def package_folders(package: str) -> Iterator[Path]:
    """Every folder that ``import package`` could find, in the order of ``sys.path``, without importing it.

    For packages of which only files are read: a program's own ``names.py`` comes before the package ``names``
    in an import, and must not switch off what needs that package's files.
    """
    for entry in sys.path:
        spec = PathFinder.find_spec(package, [entry])
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or ())

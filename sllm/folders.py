"""Where sllm keeps files of its own, and how it writes them: as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path, user_state_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cache_folder", "replacing", "state_folder", "write_private"]


def cache_folder(name: str) -> Path:
    """The folder ``name`` in ``$SLLM_CACHE``, or in ``sllm`` in the user's cache folder (``~/.cache``, or
    ``$XDG_CACHE_HOME``; on macOS ``~/Library/Caches``). What lies there can be had again.
    """
    own = os.environ.get("SLLM_CACHE")
    return (Path(own) if own else user_cache_path("sllm")) / name


def state_folder() -> Path:
    """Where a worker keeps its certificate and token: ``$SLLM_STATE``, or ``sllm`` in the user's state folder
    (``~/.local/state``, or ``$XDG_STATE_HOME``; on macOS ``~/Library/Application Support``).
    """
    own = os.environ.get("SLLM_STATE")
    return Path(own) if own else user_state_path("sllm")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of ``path`` when the block ends; after an exception it
    is deleted, and ``path`` is as it was.

    Raises:
        OSError: the file cannot be moved.

    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_private(path: Path, data: bytes) -> bool:
    """Write a new file that only its owner can read, and the folders that lead to it; False where there is a
    file already, which stays as it is.

    Raises:
        OSError: the file cannot be written.

    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        try:
            os.link(draft, path)  # unlike rename, it does not replace what is there
        except FileExistsError:
            return False
        return True
    finally:
        draft.unlink()

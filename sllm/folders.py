"""Where sllm keeps files of its own, and how it writes them: as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path, user_state_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cache_folder", "read_private", "replacing", "state_folder", "write_private"]


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


def read_private(path: Path) -> bytes:
    """Read a file that holds a secret.

    Raises:
        PermissionError: other users may read or change it, or put another in its place: the file has
            permissions for others or is another user's, or its folder is writable by others without the
            sticky bit.
        OSError: the file cannot be read.

    """
    with path.open("rb") as file:
        if hasattr(os, "getuid"):
            _check_private(path, os.fstat(file.fileno()))
        return file.read()


def _check_private(path: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{path} holds a secret and belongs to another user (id {found.st_uid})")
    # A group that may read is allowed to a file of root: so are secrets handed to services.
    if mode & (0o037 if found.st_uid == 0 and os.getuid() != 0 else 0o077):
        raise PermissionError(
            f"{path} holds a secret, and others on this machine may use it (mode {mode:03o}): they may have"
            f" read it already; delete it and a new one is made, or chmod 600 {path}"
        )
    folder = stat.S_IMODE(path.parent.stat().st_mode)
    if folder & 0o022 and not folder & stat.S_ISVTX:
        raise PermissionError(
            f"{path} holds a secret, and others on this machine may put another in its place: the folder"
            f" {path.parent} has mode {folder:03o}; chmod 700 {path.parent}"
        )

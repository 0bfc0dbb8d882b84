"""Where sllm keeps files of its own, and how it writes them: as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path, user_state_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "cache_folder",
    "make_private_folder",
    "read_private",
    "read_trusted",
    "replacing",
    "signature",
    "state_folder",
    "write_private",
]


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
        OSError: the file cannot be written or moved; the error names ``path``, which the caller knows.

    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == os.fspath(draft):
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            draft.unlink()


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone.

    Raises:
        OSError: it cannot be made.

    """
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in [*reversed(missing), path]:
        folder.mkdir(exist_ok=True, mode=0o700)  # with parents=True, the mode would be that of the last alone


def signature(path: Path) -> tuple[int, ...] | int:
    """What tells a file from the one that was there before, its permissions included: device, inode, size,
    times of the last changes of its content and of itself in nanoseconds, mode. Where it cannot be looked at,
    the number of the error.
    """
    try:
        found = path.stat()
    except OSError as error:
        return error.errno or 0
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def write_private(path: Path, data: bytes) -> bool:
    """Write a new file that only its owner can read, and the folders that lead to it; False where there is a
    file already, which stays as it is.

    Raises:
        OSError: the file cannot be written.

    """
    make_private_folder(path.parent)
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
    """Read a file that holds a secret: a key, a token.

    Raises:
        PermissionError: other users may read or change it, or put another in its place: the file has
            permissions for others or is another user's, or a folder that leads to it is writable by others
            without the sticky bit. The message says which, and what to do.
        OSError: the file cannot be read.

    """
    return _read(path, _check_private)


def read_trusted(path: Path) -> bytes:
    """Read a file that anybody may know and its owner alone may change, since much depends on it.

    Raises:
        PermissionError: every user may change it, or put another in its place.
        OSError: the file cannot be read.

    """
    return _read(path, _check_trusted)


def _read(path: Path, check: Callable[[Path, os.stat_result], None]) -> bytes:
    with path.open("rb") as file:
        if hasattr(os, "getuid"):
            check(path, os.fstat(file.fileno()))
        return file.read()


def _check_private(path: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.getuid(), 0):
        raise PermissionError(
            f"{path} holds a secret and belongs to another user (id {found.st_uid});"
            f" chown {os.getuid()} {path}, or use a file of your own"
        )
    # A group that may read is allowed to a file of root: so are secrets handed to services.
    if mode & (0o037 if found.st_uid == 0 and os.getuid() != 0 else 0o077):
        raise PermissionError(
            f"{path} holds a secret, and others on this machine may use it (mode {mode:03o}):"
            f" chmod 600 {path}, and make another where somebody may have read this one"
        )
    _check_folders(path, "holds a secret")


def _check_trusted(path: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        raise PermissionError(
            f"{path} is to be trusted, and others on this machine may change it (mode {mode:03o}):"
            f" chmod o-w {path} once you have made sure of what it holds"
        )
    _check_folders(path, "is to be trusted")


def _check_folders(path: Path, what: str) -> None:
    """That nobody else can replace the file, or one of the folders that lead to it, also through a link.

    A folder that a group may write is refused where it is the file's own and others are in the group: users
    have groups of their own on many systems, and their folders are writable by them.
    """
    own = path.absolute().parent
    real = path.resolve().parent
    for folder in dict.fromkeys([own, real, *own.parents, *real.parents]):
        found = folder.stat()
        mode = stat.S_IMODE(found.st_mode)
        if mode & stat.S_ISVTX:
            continue  # in such a folder, /tmp for one, files are their owners'
        shared = folder in (own, real) and mode & stat.S_IWGRP and not _is_own_group(found.st_gid)
        if shared or mode & stat.S_IWOTH:
            raise PermissionError(
                f"{path} {what}, and others on this machine may put another in its place: the folder"
                f" {folder} has mode {mode:03o}; chmod go-w {folder}"
            )


def _is_own_group(gid: int) -> bool:
    """Whether nobody but this user is in a group, as far as the system's list of users says."""
    import grp
    import pwd

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:  # neither has a name, as in some containers
        return False
    members |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == gid}
    return members <= {name}

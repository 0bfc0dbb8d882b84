"""Folders of Unix sockets in the folder for temporary files, and what became of their owners."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["SocketFolder"]

log = logging.getLogger("sllm.worker")

_PREFIX = "sllm-"
_LOCK = "worker.lock"

_LONGEST = 80
"""Characters of the folder for temporary files; a Unix socket's path has about 104 at most."""


class SocketFolder:
    """A new folder that no other user can enter, for Unix sockets; gone after :meth:`close`.

    A process that is killed leaves its folder behind. The next one of the same user clears it away: a lock on
    a file in it says whether the owner lives, and ends with the process however that ends.

    Raises:
        OSError: it cannot be made.

    Attributes:
        path: the folder.

    """

    def __init__(self) -> None:
        usual = tempfile.gettempdir()
        parent = Path("/tmp" if len(usual) > _LONGEST else usual)
        _clear(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            self._lock = _locked(self.path)
        except BaseException:
            self._remove()
            raise

    def close(self) -> None:
        """Delete it. More calls do nothing."""
        self._remove()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _locked(folder: Path) -> int:
    """The descriptor of the folder's lock, which is held. It has its name only then: nobody finds one that is
    free because its owner has not come to it yet.
    """
    draft = folder / f"{_LOCK}.new"
    lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft.rename(folder / _LOCK)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _clear(parent: Path) -> None:
    """Delete this user's folders in ``parent`` whose owners are gone."""
    try:
        found = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(_PREFIX)]
    except OSError:  # a folder that one may use and not list
        return
    for folder in found:
        try:
            _clear_one(folder)
        except OSError as error:  # noqa: PERF203 - the next one may be deleted
            log.debug("%s could not be looked at or deleted: %s", folder, error.strerror)


def _clear_one(folder: Path) -> None:
    """Delete a folder if it is one of these, and its owner is gone.

    Only the user may change what is in it, or, where the parent is sticky as ``/tmp`` is, put another in its
    place; and nothing below it is followed or entered.
    """
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not ours or stat.S_IMODE(status.st_mode) != 0o700:
        return
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return  # another's, or one that is being made
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink == 0:  # another process was quicker
            return
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
        (folder / _LOCK).unlink()  # last: without it, the folder would be left for ever
        folder.rmdir()
        log.debug("%s was left by a worker that is gone; deleted", folder)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):  # its owner lives
            raise
    finally:
        os.close(lock)

"""Uploaded weights on disk: each file is named by the SHA-256 of its content, and all of them have a quota.

ggml's protocol names a tensor by FNV-1a, 64 bits, for which anybody can make another tensor of the same name.
Who asks by that could be given what another client has put there. So the name of a file is its SHA-256, which
this process has computed itself and computes again before it hands the file out, and clients of sllm ask by
it. Those of llama.cpp ask by FNV-1a; they are answered only where all clients are this user's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from sllm import folders
from sllm.engine._ffi import ffi, lib

__all__ = ["DEFAULT_BYTES", "TensorCache"]

log = logging.getLogger("sllm.rpc")

DEFAULT_BYTES = 64 << 30
"""The quota unless told otherwise: 64 GiB."""

_RESERVE = 1 << 30
"""Bytes of the disk that stay free."""

_CHUNK = 1 << 20
_OLD = 3600.0
"""Seconds after which an unfinished file belongs to nobody any more."""


class TensorCache:
    """A folder of tensors. Files that were not asked for the longest go first when it is full.

    Several processes may use one folder; each counts what it adds, and all of it now and then.

    Args:
        folder: is made, for this user alone.
        max_bytes: of all files together.
        by_name: also find tensors by FNV-1a, for clients of llama.cpp itself. Two that share a name are not
            found by it.

    Raises:
        OSError: the folder cannot be made or read.

    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_BYTES, *, by_name: bool) -> None:
        self.folder = folder.absolute()
        self.max_bytes = max_bytes
        folders.make_private_folder(self.folder)
        self._names = self.folder / "named"
        # Where others may write, they could give a name to anything.
        self._by_name = by_name and not self.folder.stat().st_mode & 0o022
        if self._by_name:
            self._names.mkdir(exist_ok=True, mode=0o700)
        self._draft: tuple[Path, int] | None = None  # being written, and how many bytes it is to have
        self._total = 0
        self._remove_old_format()
        self.prune()

    # ---- finding

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """An open file with these 32 bytes of SHA-256 and its size, or None. It has been read and hashed; one
        that is damaged is deleted.
        """
        path = self.folder / digest.hex()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found, size, _ = _hashes(descriptor, with_name=False)
            if found == digest:
                os.utime(descriptor)
                os.lseek(descriptor, 0, os.SEEK_SET)
                return descriptor, size
            log.warning("%s is not what its name says and is deleted", path)
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error.strerror or error)
        os.close(descriptor)
        return None

    def find_named(self, name: int) -> tuple[int, int] | None:
        """The same by FNV-1a, where that is allowed."""
        if not self._by_name:
            return None
        with suppress(OSError, ValueError):
            digest = bytes.fromhex((self._names / f"{name:016x}").read_text(encoding="ascii"))
            if len(digest) == 32:
                return self.find(digest)
        return None

    # ---- storing

    def begin(self, size: int) -> int | None:
        """A descriptor to write a tensor of ``size`` bytes to, or None where there is no room. The caller
        closes it and then calls :meth:`commit` or :meth:`abandon`.
        """
        self.abandon()
        if not 0 < size <= self.max_bytes:
            return None
        if self._total + size > self.max_bytes:
            self.prune(self.max_bytes - size)
        draft = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            if shutil.disk_usage(self.folder).free < size + _RESERVE:
                return None
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("a tensor is not kept in %s: %s", self.folder, error.strerror or error)
            return None
        self._draft = (draft, size)
        return descriptor

    def commit(self) -> bool:
        """Keep what has been written under the name that it turns out to have; whether it is kept."""
        if self._draft is None:
            return False
        (draft, size), self._draft = self._draft, None
        try:
            descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                digest, written, name = _hashes(descriptor, with_name=self._by_name)
            finally:
                os.close(descriptor)
            if written != size:
                return False
            target = self.folder / digest.hex()
            known = target.exists()
            draft.replace(target)
            self._total += 0 if known else size
            if self._by_name:
                self._give_name(name, digest.hex())
        except OSError as error:
            log.warning("a tensor is not kept in %s: %s", self.folder, error.strerror or error)
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def abandon(self) -> None:
        """Forget what :meth:`begin` has begun."""
        if self._draft is not None:
            with suppress(OSError):
                self._draft[0].unlink(missing_ok=True)
            self._draft = None

    def prune(self, max_bytes: int | None = None) -> None:
        """Count, and delete what was not used the longest until no more than ``max_bytes`` are left."""
        allowed = self.max_bytes if max_bytes is None else max_bytes
        now = time.time()
        kept: list[tuple[float, int, Path]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    state = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(state.st_mode):
                        continue
                    if _is_digest(entry.name):
                        kept.append((state.st_mtime, state.st_size, Path(entry.path)))
                    elif entry.name.endswith(".part") and now - state.st_mtime > _OLD:
                        Path(entry.path).unlink()
        self._total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if self._total <= allowed:
                break
            with suppress(OSError):
                path.unlink()
                self._total -= size

    # ---- names

    def _give_name(self, name: int, digest: str) -> None:
        path = self._names / f"{name:016x}"
        with suppress(FileNotFoundError):
            if path.read_text(encoding="ascii") != digest:
                digest = "two of this name"  # it says nothing any more
        with folders.replacing(path) as draft:
            draft.write_text(digest, encoding="ascii")

    def _remove_old_format(self) -> None:
        """Files of sllm 0.1, which were named by FNV-1a alone."""
        journal = self.folder / "checked.json"
        if not journal.is_file():
            return
        for path in self.folder.iterdir():
            if len(path.name) == 16 and not set(path.name) - set("0123456789abcdef") and path.is_file():
                path.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)


def _is_digest(name: str) -> bool:
    return len(name) == 64 and not set(name) - set("0123456789abcdef")


def _hashes(descriptor: int, *, with_name: bool) -> tuple[bytes, int, int]:
    """SHA-256, size and, if wanted, FNV-1a of an open file.

    It is read, not mapped: where another process shortens a file that is mapped, the reader is killed.
    """
    digest, size, name = hashlib.sha256(), 0, 0
    buffer = bytearray(_CHUNK)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        while n := file.readinto(buffer):
            part = memoryview(buffer)[:n]
            digest.update(part)
            if with_name:
                name = lib.sllm_rpc_hash(ffi.from_buffer("uint8_t[]", part), n, name)
            size += n
    return digest.digest(), size, name

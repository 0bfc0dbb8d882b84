"""Model files from ModelScope, for names that begin with ``ms://``.

The protocol is that of its SDK (``modelscope/hub/api.py``, ``file_download.py``): a listing of a repository's
files with their sizes and SHA-256 sums, and one address for each file, which answers range requests. The HTTP
client is that of ``huggingface_hub``. ``MODELSCOPE_ENDPOINT`` (an address) or ``MODELSCOPE_DOMAIN`` (a host)
names another site, such as ``www.modelscope.ai``; ``MODELSCOPE_API_TOKEN`` is the access token.

Files lie in :func:`sllm.folders.cache_folder`'s ``modelscope/owner/repo/revision``, each beside its sum as
``sha256sum`` writes it. A download that broke off goes on where it stopped, and no file has its name before
its sum has been found to be the listing's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from sllm.engine.hub_reader import PieceReader, one_line, range_of, reply, status_of
from sllm.errors import ModelLoadError
from sllm.extras import needs
from sllm.folders import cache_folder

try:
    import fcntl
except ImportError:  # where there is none, two processes that want the same file get in each other's way
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from sllm.engine.model_name import HubName

__all__ = ["ScopeReader", "fetch", "files"]

_SITE = "https://www.modelscope.cn"
_MAIN = "master"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_MOST_LISTED = 64 << 20  # bytes of a listing
_TRIES = 5  # in a row that brought nothing


@dataclass(frozen=True)
class _Entry:
    """A file of a listing; ``sha256`` in lower case, "" where the listing has none."""

    path: str
    size: int
    sha256: str


def files(name: HubName, token: str | bool | None) -> list[str]:
    """The paths of a repository's files; where the site cannot be reached, of those that are in the cache.

    Raises:
        ModelLoadError: there is no such repository, it may not be read, or neither site nor cache has it.

    """
    try:
        return list(_listing(name, token))
    except _AwayError as error:
        folder = _folder(name)
        kept = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        if not kept:
            raise ModelLoadError(f"cannot download {name.uri}: {error}") from error
        return kept


def fetch(
    name: HubName,
    filenames: list[str],
    token: str | bool | None,
    progress: Callable[[float], object] | None = None,
) -> Path:
    """Download files of one listing, or find them in the cache; the path of the first.

    Args:
        name: the repository and its revision.
        filenames: paths in the repository.
        token: the access token; None or True: ``MODELSCOPE_API_TOKEN``, if it is set; False: none.
        progress: called with 0.0 .. 1.0, of all their bytes.

    Raises:
        ModelLoadError: a file is not there, may not be read, does not arrive or is not what the listing says.

    """
    paths = [_folder(name) / filename for filename in filenames]
    try:
        listed = _listing(name, token)
    except _AwayError as error:
        if all(path.is_file() for path in paths):
            return paths[0]
        raise ModelLoadError(f"cannot download {name.uri}: {error}") from error
    wanted = [_entry(name, listed, filename) for filename in filenames]
    told = _Told(progress, sum(entry.size for entry in wanted))
    for path, entry in zip(paths, wanted, strict=True):
        _Download(name, entry, path, token, told).run()
        told.before += entry.size
    return paths[0]


class _Told:
    """Passes on how far several files together have come."""

    def __init__(self, progress: Callable[[float], object] | None, whole: int) -> None:
        self._progress, self._whole = progress, whole or 1
        self.before = 0  # bytes of the files that are there

    def __call__(self, n: int) -> None:
        """``n`` bytes of the next file are there."""
        if self._progress is not None:
            self._progress((self.before + n) / self._whole)


class ScopeReader(PieceReader):
    """Reads pieces of a file on ModelScope; the file stays the one that was listed first."""

    _setting = "MODELSCOPE_ENDPOINT"

    def __init__(self, name: HubName, token: str | bool | None) -> None:
        self._name, self._token = name, token
        self._first: _Entry | None = None
        super().__init__()

    @property
    def uri(self) -> str:
        """As an ``ms://`` URI."""
        return self._name.uri

    def _look_up(self) -> tuple[str, int]:
        assert self._name.filename is not None
        try:
            found = _entry(self._name, _listing(self._name, self._token), self._name.filename)
        except _AwayError as error:
            raise ModelLoadError(f"cannot read {self.uri}: {error}") from error
        if self._first not in (None, found):
            raise ModelLoadError(
                f"cannot read {self.uri}: it has been replaced by another file meanwhile; try again"
            )
        self._first = found
        return _address(self._name, found), found.size

    def _headers(self, url: str) -> Mapping[str, str]:
        return _headers(url, self._token)

    def _reason(self, error: Exception) -> str:
        return _reason(error, self._name, self._token)


# --- the listing ---


class _AwayError(Exception):
    """The site cannot be reached, or does not answer as it should."""


def _endpoint() -> str:
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or _SITE
    return (named if "://" in named else f"https://{named}").rstrip("/")


def _address(name: HubName, entry: _Entry) -> str:
    query = urlencode({"Revision": name.revision or _MAIN, "FilePath": entry.path})
    return f"{_endpoint()}/api/v1/models/{quote(name.repo_id)}/repo?{query}"


def _headers(url: str, token: str | bool | None) -> dict[str, str]:
    """With the token, as a bearer's and as the SDK's cookie, if ``url`` is of the site itself."""
    found = _token(token)
    if found is None or urlsplit(url).netloc != urlsplit(_endpoint()).netloc:
        return {}
    return {"Authorization": f"Bearer {found}", "Cookie": f"m_session_id={found}"}


def _token(token: str | bool | None) -> str | None:
    if isinstance(token, str):
        return token
    return None if token is False else os.environ.get("MODELSCOPE_API_TOKEN") or None


def _listing(name: HubName, token: str | bool | None) -> dict[str, _Entry]:
    """A repository's files by path.

    Raises:
        ModelLoadError: there is no such repository or revision, or it may not be read.
        _AwayError: nobody answers who knows.

    """
    with needs("hub"):
        import huggingface_hub  # noqa: F401 - its HTTP client

    query = urlencode({"Revision": name.revision or _MAIN, "Recursive": "True"})
    url = f"{_endpoint()}/api/v1/models/{quote(name.repo_id)}/repo/files?{query}"
    try:
        with reply(url, {**_headers(url, token), "Accept-Encoding": "identity"}) as (answer, pieces):
            answer.raise_for_status()
            body = bytearray()
            for piece in pieces:
                body += piece
                if len(body) > _MOST_LISTED:
                    raise ValueError(f"a listing of more than {_MOST_LISTED} bytes")
        return _entries(json.loads(body))
    except Exception as error:
        if status_of(error) in (400, 401, 403, 404):
            reason = _reason(error, name, token)
            raise ModelLoadError(f"cannot download {name.uri}: {reason}") from error
        raise _AwayError(f"{_reason(error, name, token)}; it is not in the cache") from error


def _entries(found: Any) -> dict[str, _Entry]:
    """What a listing says.

    Raises:
        ValueError: it is none.

    """
    try:
        if not isinstance(found["Data"]["Files"], list):
            raise TypeError
        entries = [
            _Entry(str(one["Path"]), int(one["Size"]), _sum(one.get("Sha256")))
            for one in found["Data"]["Files"]
            if one["Type"] != "tree"
        ]
        if any(not _stays_inside(entry.path) for entry in entries):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        told = found.get("Message") if isinstance(found, dict) else None
        raise ValueError(f"no listing of files: {str(told)[:200] if told else 'something else'}") from None
    return {entry.path: entry for entry in entries}


def _stays_inside(path: str) -> bool:
    """Whether it is a path below the folder that it starts from, on every system: files get their places by
    what a site says.
    """
    parts = path.split("/")
    return not ({"", ".", ".."} & set(parts) or re.search(r"[\\:\x00-\x1f]", path))


def _sum(value: Any) -> str:
    return value.lower() if isinstance(value, str) and _SHA256.fullmatch(value) else ""


def _entry(name: HubName, listed: Mapping[str, _Entry], filename: str) -> _Entry:
    entry = listed.get(filename)
    if entry is None:
        raise ModelLoadError(
            f"cannot download {name.uri}: {name.repo_id} has no file {filename!r} at revision"
            f" {name.revision or _MAIN!r}; look at the repository's files"
        )
    if entry.size < 0:
        raise ModelLoadError(f"cannot download {name.uri}: {_endpoint()} says that it has {entry.size} bytes")
    return entry


def _reason(error: Exception, name: HubName, token: str | bool | None) -> str:
    """What went wrong and what to do about it, in one line."""
    status = status_of(error)
    if status in (401, 403):
        who = "the token that was sent gives no access" if _token(token) else "no token was sent"
        return f"{_endpoint()} refused access, and {who}; set MODELSCOPE_API_TOKEN, or pass token="
    if status in (400, 404):
        return (
            f"{_endpoint()} has no repository {name.repo_id}, or no revision {name.revision or _MAIN!r} of"
            " it, or it is private and no token for it was sent (MODELSCOPE_API_TOKEN)"
        )
    if status is not None:
        found = f"{_endpoint()} answered with HTTP status {status}"
    elif isinstance(error, ValueError):
        found = f"{_endpoint()} does not answer as ModelScope does"
    else:
        found = f"{_endpoint()} cannot be reached"
    return f"{found} ({one_line(error)}); check the network and MODELSCOPE_ENDPOINT"


# --- a file ---


def _folder(name: HubName) -> Path:
    return cache_folder("modelscope") / name.repo_id / quote(name.revision or _MAIN, safe="")


class _Download:
    """One file on its way into the cache."""

    def __init__(
        self,
        name: HubName,
        entry: _Entry,
        path: Path,
        token: str | bool | None,
        told: _Told,
    ) -> None:
        self._name, self._entry, self._path, self._token = name.of(entry.path), entry, path, token
        self._told = told
        self._kept_sum = path.with_name(f"{path.name}.sha256")

    def run(self) -> None:
        """Raises ModelLoadError."""
        if self._is_there():
            return
        part = self._path.with_name(f".{self._path.name}.{self._entry.sha256[:16] or self._entry.size}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("a+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # of another process, which wants it, too
                if self._is_there():
                    return
                found = self._filled(file)
                file.flush()
                os.fsync(file.fileno())
                part.replace(self._path)
                self._kept_sum.write_text(f"{found}  {self._path.name}\n", encoding="utf-8")
        except ModelLoadError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _refused(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"cannot download {self._name.uri}: {reason}")

    def _is_there(self) -> bool:
        """Whether the cache has this file, and not an earlier one of its name."""
        try:
            if self._path.stat().st_size != self._entry.size:
                return False
            return self._kept_sum.read_text(encoding="utf-8").split()[:1] == [self._entry.sha256] or not (
                self._entry.sha256
            )
        except (OSError, ValueError):
            return False

    def _filled(self, file: BinaryIO) -> str:
        """Brings what is missing, and returns the sum of all."""
        digest = hashlib.sha256()
        file.seek(0)
        for kept in iter(lambda: file.read(1 << 20), b""):
            digest.update(kept)
        tries = 0
        trouble: Exception | None = None
        while file.tell() < self._entry.size:
            if tries == _TRIES:
                assert trouble is not None
                raise self._refused(_reason(trouble, self._name, self._token)) from trouble
            if tries:
                time.sleep(0.2 * 2**tries)
            before = file.tell()
            try:
                for piece in self._sent(before):
                    if piece is None:  # from the start again
                        file.truncate(0)
                        file.seek(0)
                        digest = hashlib.sha256()
                        continue
                    if file.tell() + len(piece) > self._entry.size:
                        raise OSError(f"{_endpoint()} sent more than {self._entry.size} bytes")
                    self._write(file, piece)
                    digest.update(piece)
                    self._told(file.tell())
            except ModelLoadError:
                raise
            except Exception as error:  # of whichever HTTP client huggingface_hub uses
                if status_of(error) in (400, 401, 403, 404):
                    raise self._refused(_reason(error, self._name, self._token)) from error
                trouble = error
            else:
                trouble = OSError(f"{_endpoint()} sent {file.tell()} of {self._entry.size} bytes")
            tries = tries + 1 if file.tell() <= before else 1
        found = digest.hexdigest()
        if self._entry.sha256 not in ("", found):
            file.truncate(0)
            raise self._refused(
                f"what {_endpoint()} sent has the SHA-256 sum {found}, and its listing says"
                f" {self._entry.sha256}; it was damaged on the way, or is another file: try again"
            )
        return found

    def _write(self, file: BinaryIO, piece: bytes) -> None:
        try:
            file.write(piece)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ModelLoadError:
        return self._refused(f"{self._path} cannot be written: {error.strerror or error}")

    def _sent(self, begin: int) -> Iterator[bytes | None]:
        """What comes from byte ``begin`` on; None before it where the whole file comes instead."""
        url = _address(self._name, self._entry)
        headers = {**_headers(url, self._token), "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with reply(url, headers) as (answer, pieces):
            answer.raise_for_status()
            if begin and answer.status_code == 200:
                yield None
            elif begin and (range_of(answer.headers) or (None,))[0] != begin:
                raise OSError(f"{_endpoint()} sent another range than bytes {begin} and on")
            yield from pieces

"""Model files from the Hugging Face hub and from ModelScope: :func:`download`, :func:`resolve` for all forms
of model names, and :class:`HubFile`, a remote file that is read in pieces.

The Hugging Face hub is accessed through ``huggingface_hub``, so its cache, token, ``HF_ENDPOINT``,
``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as they do everywhere else; :mod:`sllm.engine.modelscope` describes
ModelScope. It is only imported on the first download, so importing sllm opens no socket and stays fast. No
progress bar is shown; ``progress`` is called instead.

Examples:
    >>> sllm.hub.is_uri("hf://owner/repo/model.gguf"), sllm.hub.resolve("model.gguf").name
    (True, 'model.gguf')

"""

from __future__ import annotations

import inspect
import logging
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from sllm.engine import model_name, modelscope
from sllm.engine.hub_files import choose
from sllm.engine.hub_reader import PieceReader, one_line, status_of
from sllm.engine.model_name import PART, HubName
from sllm.errors import ModelLoadError
from sllm.extras import needs
from sllm.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HubFile", "download", "is_uri", "resolve"]

_log = logging.getLogger("sllm.hub")

_ANSWERS = (401, 403, 404)
"""HTTP statuses by which a hub says that there is no such thing, or not for this user."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    progress: Callable[[float], object] | None = None,
) -> pathlib.Path:
    """Download one model file, or find it in the cache, and return its path.

    A cached file costs one small request (to see whether it is still the newest), and none offline. When
    ``filename`` is the first part of a split GGUF (``...-00001-of-00003.gguf``), all parts are downloaded,
    from the same commit and into the same folder, and the first one's path is returned: llama.cpp opens the
    others by name.

    ``repo_id`` is ``"owner/repo"``, a model repository; ``filename`` the file's path inside it, with forward
    slashes; ``revision`` a branch, tag or commit, ``None`` for the main branch. ``cache_dir`` is the folder
    for the files, ``None`` for ``huggingface_hub``'s own cache. ``token`` is the access token: ``None`` or
    ``True`` sends the one that the user is logged in with, ``False`` sends none. ``local_files_only=True``
    uses only the cache; ``None`` leaves that to ``HF_HUB_OFFLINE``. ``progress`` is called with 0.0 .. 1.0
    for each file that is downloaded.

    Raises ModelLoadError, in one line and with the cause chained, when a name is malformed, when the
    repository, the revision or the file does not exist, when access is refused, or when the hub cannot be
    reached and the cache lacks the file. Raises TypeError for an argument of the wrong type.
    """
    _check_names(repo_id, filename, revision)
    _check_token(token)
    with step(f"downloading {_base(filename)}", progress) as told:
        first = _fetch(repo_id, filename, revision, cache_dir, token, local_files_only, told)
    # The path is .../snapshots/<commit>/<filename>. Asking for that commit keeps the parts of one upload
    # together, and costs no request for a part that is in the cache already.
    commit = first.parents[filename.count("/")].name
    for name in _other_parts(filename):
        with step(f"downloading {_base(name)}", progress) as told:
            _fetch(repo_id, name, commit, cache_dir, token, local_files_only, told)
    return first


def resolve(
    path: str | os.PathLike[str], *, progress: Callable[[float], object] | None = None
) -> pathlib.Path:
    """Turn a model name into a local path, downloading the file if it is on a hub.

    Accepted wherever sllm takes a model: ``hf://owner/repo[@revision]/[folder/]file.gguf`` (a slash inside
    the revision is written ``%2F``, except in ``refs/pr/N``); ``owner/repo:Q4_K_M``, ``hf.co/owner/repo`` and
    ``hf://owner/repo``, with or without a quantisation; the addresses of the hub's own pages and downloads,
    ``https://huggingface.co/owner/repo/resolve/main/file.gguf``; ``ms://`` in place of ``hf://`` for a model
    on ModelScope; ``~/file.gguf``; ``file:///path``. A ``pathlib.Path`` made of a URI, in which the two
    slashes have become one, is understood too. Everything else is a path of this machine and is returned as
    it is, whether it exists or not.

    For a repository without a quantisation, it is its only GGUF file, or the one in ``Q4_K_M`` (llama.cpp's
    and ollama's default). If a model has several files, all are downloaded, and the path is that of the
    first. ``progress`` is called with 0.0 .. 1.0 during each download.

    Raises ModelLoadError when the name is malformed or of a kind that is not understood, when it names a
    later part of a split model (llama.cpp loads one by its first part), when none or several of a
    repository's files have the quantisation (the message lists the available ones), and when the download
    fails. Raises TypeError when ``path`` is neither str nor path-like.

    Examples:
        >>> sllm.hub.resolve("file:///models/my%20model.gguf").name
        'my model.gguf'
        >>> try:
        ...     sllm.hub.resolve("https://example.com/model.gguf")
        ... except sllm.ModelLoadError as error:
        ...     print(str(error).partition(";")[0])
        cannot load https://example.com/...: sllm downloads from the Hugging Face hub and ModelScope alone

    """
    name = model_name.parse(path)
    if isinstance(name, pathlib.Path):
        return name
    _refuse_later_part(name)
    chosen = _chosen(name, None)
    assert chosen.filename is not None
    if chosen.hub == "ms":
        _check_names(chosen.repo_id, chosen.filename, chosen.revision)
        names = [chosen.filename, *_other_parts(chosen.filename)]
        with step(f"downloading {_base(chosen.filename)}", progress) as told:
            local = modelscope.fetch(chosen, names, None, told)
    else:
        local = download(chosen.repo_id, chosen.filename, revision=chosen.revision, progress=progress)
    _log.debug("%s is %s", name.uri, local)
    return local


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether a name belongs to a hub, in any of the forms that :func:`resolve` downloads.

    Raises:
        ModelLoadError: as :func:`resolve`, for a name that is malformed.

    """
    return isinstance(model_name.parse(path), HubName)


def _refuse_later_part(name: HubName) -> None:
    part = PART.fullmatch(name.filename or "")
    if part and int(part["index"]) != 1 and int(part["count"]) > 0:
        first = name.of(f"{part['stem']}-00001-of-{part['count']}.gguf")
        raise ModelLoadError(
            f"cannot load {name.uri!r}: it is part {int(part['index'])} of {int(part['count'])} of a split"
            f" model; name the first part, {first.uri}"
        )


class HubFile:
    """A file on a hub that is read in pieces by HTTP range requests instead of being downloaded as a whole.

    It has the methods of a :class:`pathlib.Path` that :mod:`sllm.engine.gguf` uses: ``name``, ``with_name``
    and ``open("rb")``. ``hf_hub_url``, ``get_hf_file_metadata`` and the session of ``huggingface_hub`` do the
    rest.

    Args:
        uri: ``hf://owner/repo[@revision]/[folder/]file.gguf``, or another name of a hub that
            :func:`resolve` understands.
        token: as for :func:`download`.

    Raises:
        ModelLoadError: no such name; or as :func:`resolve`, if it only names a repository.

    """

    def __init__(self, uri: str | os.PathLike[str], *, token: str | bool | None = None) -> None:
        found = model_name.parse(uri)
        if not isinstance(found, HubName):
            raise ModelLoadError(f"{os.fspath(uri)!r} is not on the hub; {model_name.EXPECTED}")
        _check_token(token)
        self._token = token
        self._place = _chosen(found, token)
        _check_names(self._place.repo_id, self._filename, self._place.revision)

    @property
    def _filename(self) -> str:
        assert self._place.filename is not None
        return self._place.filename

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return _base(self._filename)

    def with_name(self, name: str) -> HubFile:
        """The file with this name in the same folder."""
        folder = self._filename.rpartition("/")[0]
        return HubFile(self._place.of(f"{folder}/{name}" if folder else name).uri, token=self._token)

    def open(self, _mode: str = "rb") -> BinaryIO:
        """A reader that knows the size of the file and has not read any of it yet.

        Raises:
            ModelLoadError: as :func:`download`.

        """
        if self._place.hub == "ms":
            return cast("BinaryIO", modelscope.ScopeReader(self._place, self._token))
        reader = _HubReader(self._place.repo_id, self._filename, self._place.revision, self._token)
        self._place = HubName(*reader.about)  # no other commit from here on
        return cast("BinaryIO", reader)

    def __str__(self) -> str:
        return self._place.uri

    def __repr__(self) -> str:
        return f"<sllm.hub.HubFile {self}>"


class _HubReader(PieceReader):
    """Reads pieces of a file on the Hugging Face hub, of one commit."""

    _setting = "HF_ENDPOINT"

    def __init__(self, repo_id: str, filename: str, revision: str | None, token: str | bool | None) -> None:
        self.about = (repo_id, filename, revision)
        self._token = token
        super().__init__()

    @property
    def uri(self) -> str:
        return HubName(*self.about).uri

    def _look_up(self) -> tuple[str, int]:
        with needs("hub"):
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

        repo_id, filename, revision = self.about
        try:
            found = get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), token=self._token)
        except Exception as error:
            raise self._fail(error) from error
        if found.size is None or found.commit_hash is None:
            raise ModelLoadError(f"cannot read {self.uri}: the other side is no hub")
        if found.commit_hash != revision:
            self.about = (repo_id, filename, found.commit_hash)
            return self._look_up()
        return found.location, found.size

    def _headers(self, url: str) -> dict[str, str]:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if urlsplit(url).netloc != urlsplit(str(constants.ENDPOINT)).netloc:
            return {}
        found: dict[str, str] = build_hf_headers(token=self._token)
        return found

    def _reason(self, error: Exception) -> str:
        return _reason(error, *self.about, self._token, False)


def _bars(progress: Callable[[float], object] | None) -> Any:
    """What takes the place of ``huggingface_hub``'s progress bars: shows nothing, and tells ``progress``."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._there, self._whole = options.get("initial") or 0, options.get("total") or 0
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self._there += n or 0
            if progress is not None and self._whole:
                progress(min(self._there / self._whole, 1.0))

    return Bar


def _check_names(repo_id: str, filename: str, revision: str | None) -> None:
    """Refuse names that are no names, above all those that would leave the cache folder (``..``)."""
    for what, value in (("repo_id", repo_id), ("filename", filename), ("revision", revision)):
        if value is None and what == "revision":
            continue
        if not isinstance(value, str):
            raise TypeError(f"{what} must be a string, not {type(value).__name__}")
        pieces = value.split("/")
        found = None
        if _CONTROL.search(value):
            found = "a control character"
        elif "\\" in value:
            found = "a backslash"
        elif ".." in pieces or "." in pieces:
            found = "'.' or '..' as a part of the path"
        elif "" in pieces:
            found = "nothing" if not value else "an empty part of the path"
        elif what == "repo_id" and len(pieces) > 2:
            found = "more than one slash"
        if found:
            wanted = {
                "repo_id": "'owner/repo'",
                "filename": "the file's path inside the repository, as 'folder/file.gguf'",
                "revision": "a branch, tag or commit",
            }[what]
            raise ModelLoadError(f"cannot download: {what} {value!r} holds {found}; expected {wanted}")


def _base(filename: str) -> str:
    return filename.rpartition("/")[2]


def _check_token(token: str | bool | None) -> None:
    """Refuse a token that cannot be sent, without showing it; the HTTP client's own error would."""
    if token is None or isinstance(token, bool):
        return
    if not isinstance(token, str):
        raise TypeError(f"token must be a string, a bool or None, not {type(token).__name__}")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ModelLoadError(
            "cannot download: the token is empty or holds spaces, line ends or characters outside ASCII;"
            " expected the token as the hub showed it, without anything around it"
        )


def _other_parts(filename: str) -> list[str]:
    """The names of parts 2..n when ``filename`` is part 1 of a split model, else an empty list."""
    part = PART.fullmatch(filename)
    if part is None or int(part["index"]) != 1:
        return []
    return [
        f"{part['stem']}-{index:05d}-of-{part['count']}.gguf" for index in range(2, int(part["count"]) + 1)
    ]


def _chosen(name: HubName, token: str | bool | None) -> HubName:
    """``name`` with a file: where it has none, one of those that the repository has."""
    if name.filename is not None:
        return name
    _check_names(name.repo_id, "model.gguf", name.revision)
    filename = choose(name, _files(name, token))
    _log.info("%s: of its files, %s", name.uri, filename)
    return name.of(filename)


def _files(name: HubName, token: str | bool | None) -> list[str]:
    """The paths of a repository's files; without a hub, of those that are in the cache."""
    if name.hub == "ms":
        return modelscope.files(name, token)
    with needs("hub"):
        from huggingface_hub import HfApi, constants, errors, snapshot_download

    trouble: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            found = HfApi().model_info(name.repo_id, revision=name.revision, token=token)
        except Exception as error:
            if isinstance(error, errors.HFValidationError) or status_of(error) in _ANSWERS:
                reason = _reason(error, name.repo_id, "", name.revision, token, False)
                raise ModelLoadError(f"cannot download {name.uri}: {reason}") from error
            trouble = error
        else:
            return [file.rfilename for file in found.siblings or []]
    try:
        folder = pathlib.Path(snapshot_download(name.repo_id, revision=name.revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001 - of whichever kind: it is not in the cache
        raise ModelLoadError(f"cannot download {name.uri}: {_nowhere(trouble)}") from (trouble or error)
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _nowhere(trouble: Exception | None) -> str:
    """Why a repository's files are not known; None: nobody was asked."""
    from huggingface_hub import constants

    if trouble is None:
        return (
            "nothing of it is in the cache, and HF_HUB_OFFLINE is set; unset it and download the model once"
        )
    network = f"check the network and HF_ENDPOINT (now {constants.ENDPOINT})"
    status = status_of(trouble)
    found = f"the hub answered with HTTP status {status}" if status else "the hub cannot be reached"
    if isinstance(trouble, ValueError):  # what came is not JSON
        found = f"{constants.ENDPOINT} does not answer as a hub does"
    return f"{found} ({one_line(trouble)}), and nothing of it is in the cache; {network}"


def _fetch(
    repo_id: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool | None,
    progress: Callable[[float], object] | None,
) -> pathlib.Path:
    """One file through huggingface_hub, its errors turned into one line each."""
    with needs("hub"):
        from huggingface_hub import hf_hub_download

    how: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # earlier ones show their own bars
        how["tqdm_class"] = _bars(progress)
    try:
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            token=token,
            local_files_only=bool(local_files_only),
            **how,
        )
    # Not a list of exceptions: those of the HTTP client below huggingface_hub come through, and that client
    # is another one from version to version.
    except Exception as error:
        reason = _reason(error, repo_id, filename, revision, token, local_files_only)
        uri = HubName(repo_id, filename, revision).uri
        raise ModelLoadError(f"cannot download {uri}: {reason}") from error
    return pathlib.Path(path)


def _reason(
    error: Exception,
    repo_id: str,
    filename: str,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool | None,
) -> str:
    """What went wrong and what to do about it, in one line."""
    from huggingface_hub import constants, errors, get_token

    sent = token is not False and bool(token or get_token())
    who = "the token that was sent gives no access" if sent else "no token was sent"
    log_in = "log in with `hf auth login`, set HF_TOKEN, or pass token="
    network = f"check the network and HF_ENDPOINT (now {constants.ENDPOINT})"
    if isinstance(error, errors.GatedRepoError):  # derives from RepositoryNotFoundError, so it comes first
        return (
            f"{repo_id} is gated: access must be asked for on its page, {constants.ENDPOINT}/{repo_id}, and"
            f" {who}; ask there, then {log_in}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo_id}, or it is private and {who}; check the name, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo_id} was disabled by its owner or by the hub; use another repository"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if local_files_only:
            return "it is not in the cache, and local_files_only=True; download it without once"
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE is set; unset it and download the file once"
        if isinstance(error.__cause__, errors.FileMetadataError):
            return f"{constants.ENDPOINT} does not answer as a hub does; {network}"
        status = status_of(error.__cause__)
        found = f"the hub answered with HTTP status {status}" if status else "the hub cannot be reached"
        return f"{found} ({one_line(error.__cause__ or error)}), and the file is not in the cache; {network}"
    if isinstance(error, errors.EntryNotFoundError):
        at = revision or constants.DEFAULT_REVISION
        return f"{repo_id} has no file {filename!r} at revision {at!r}; look at the repository's files"
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no repository name ({one_line(error)}); expected 'owner/repo'"
    if status_of(error) == 401:
        return f"the hub refused access, and {who}; check the repository's name, or {log_in}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"token=True, but the user is not logged in; {log_in}"
    return f"{one_line(error)}; {network}"

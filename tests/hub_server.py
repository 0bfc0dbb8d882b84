"""A small hub on loopback, and a client process beside it, for the tests of :mod:`sllm.hub`.

:class:`HubServer` speaks the part of the hub's HTTP that ``huggingface_hub`` uses to fetch a file of a model
repository, and notes every request. :class:`HubClient` runs ``sllm.hub`` in a process of its own, because
``huggingface_hub`` reads its environment once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from loopback_site import LoopbackSite, SiteHandler

if TYPE_CHECKING:
    from types import TracebackType


@dataclass
class Repo:
    """A model repository: the files of each commit, and the names that point at commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # who may read it; None is everyone
    gated: bool = False  # with a token: the hub says "gated" instead of "not found" to everyone else

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit with these files, let ``refs`` (default: main) point at it, and return its hash."""
        commit = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        for ref in refs or ("main",):
            self.refs[ref] = commit
        return commit


@dataclass(frozen=True)
class Request:
    """One request that the server saw; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]


class HubServer(LoopbackSite):
    """A hub on a free port of loopback; a context manager.

    ``moved`` says where a file's own URL sends the client: nowhere (``None``, the body is served there), to a
    path of this hub (``"here"``, as the hub does for small files), or to ``/blobs/...`` of the ``HubServer``
    given, another origin (as the hub does for large ones).
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.blobs: dict[str, tuple[bytes, dict[str, str]]] = {}  # path: body and headers
        self.moved: HubServer | str | None = None
        self.drop_after: list[
            int
        ] = []  # the next GETs of a body break off after so many bytes, one entry for each
        self.status: int | None = None  # answer everything with this status
        self.no_ranges = False  # send files as a whole, whatever was asked for
        self.n_bytes = 0  # of files, sent
        self.plain = False  # answer as a web server that is no hub

    def repo(self, name: str) -> Repo:
        """The repository of this name, made on first use."""
        return self.repos.setdefault(name, Repo())

    def log(self) -> list[str]:
        """``"METHOD path"`` of every request since the last call."""
        lines = [f"{request.method} {request.path}" for request in self.requests]
        self.requests.clear()
        return lines


class _Handler(SiteHandler):
    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server.site, HubServer)
        return self.server.site

    def answer(self) -> None:
        hub = self.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, self.path, headers))
        path = unquote(urlsplit(self.path).path)
        if hub.status is not None:
            return self._refuse(hub.status, None, "no service now")
        if hub.plain:
            return self._send(200, {"ETag": '"page"'}, b"<html>hello</html>")
        if path in hub.blobs:
            return self._body(*hub.blobs[path])
        if path.startswith("/api/models/"):
            return self._about(*path.removeprefix("/api/models/").partition("/revision/")[::2], headers)
        name, resolve, rest = path[1:].partition("/resolve/")
        if not resolve:
            return self._refuse(404, None, "not found")
        repo = hub.repos.get(name)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if repo is None:
            return self._refuse(404 if bearer else 401, "RepoNotFound", "Repository not found")
        if repo.token is not None and bearer != repo.token:
            if repo.gated:
                return self._refuse(
                    403 if bearer else 401, "GatedRepo", f"Access to model {name} is restricted."
                )
            return self._refuse(404 if bearer else 401, "RepoNotFound", "Repository not found")
        names = sorted([*repo.refs, *repo.commits], key=len, reverse=True)
        revision = next((known for known in names if rest.startswith(f"{known}/")), None)
        if revision is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        commit = repo.refs.get(revision, revision)
        filename = rest[len(revision) + 1 :]
        data = repo.commits[commit].get(filename)
        about = {"X-Repo-Commit": commit}
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", about)
        etag = hashlib.sha256(data).hexdigest()
        own = {**about, "ETag": f'"{etag}"'}
        if hub.moved is None:
            return self._body(data, own)
        if isinstance(hub.moved, HubServer):
            hub.moved.blobs[f"/blobs/{etag}"] = (data, {"ETag": '"of the other host"'})
            about |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            return self._send(302, {**about, "Location": f"{hub.moved.endpoint}/blobs/{etag}"}, b"")
        place = f"/api/resolve-cache/models/{name}/{commit}/{filename}"
        hub.blobs[place] = (data, own)
        return self._send(307, {**about, "Location": quote(place)}, b"")

    def _about(self, name: str, revision: str, headers: dict[str, str]) -> None:
        """What there is to know of a repository; of a gated one, to everyone."""
        repo = self.hub.repos.get(name)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and bearer != repo.token and not repo.gated):
            return self._refuse(404 if bearer else 401, "RepoNotFound", "Repository not found")
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": filename} for filename in repo.commits[commit]]
        about = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

    def _body(self, data: bytes, headers: dict[str, str]) -> None:
        """The file, or the part of it that ``Range: bytes=N-`` or ``bytes=N-M`` asks for; breaks off where
        the test asks for it.
        """
        begin, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, stop = int(begin or 0), int(last or len(data) - 1) + 1
        headers = {**headers, "Accept-Ranges": "bytes"}
        status = 200
        if (start or last) and not self.hub.no_ranges:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        drops = self.hub.drop_after
        keep = drops.pop(0) if drops and self.command == "GET" else None
        self.hub.n_bytes += len(data) if self.command == "GET" else 0
        self._send(status, headers, data, keep)

    def _refuse(
        self, status: int, code: str | None, text: str, headers: dict[str, str] | None = None
    ) -> None:
        about = {**(headers or {}), "X-Error-Message": text}
        if code:
            about["X-Error-Code"] = code
        self._send(status, about, json.dumps({"error": text}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes, keep: int | None = None) -> None:
        self.start(status, headers, len(body))
        if self.command == "HEAD":
            return
        self.wfile.write(body[:keep])
        if keep is not None:
            self.break_off()


_CLIENT = """
import json, sys, time, warnings
real_sleep = time.sleep
time.sleep = lambda seconds: real_sleep(min(seconds, 0.01))  # huggingface_hub's retries take up to 23 s
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # a broken download resumes after whole chunks
import sllm
from sllm.engine import hub
from sllm.errors import ModelLoadError
def export(uri, out, start, stop):
    sllm.export_layers(uri, out, start, stop)
    return out
for line in sys.stdin:
    name, args, options = json.loads(line)
    answer = {}
    try:
        answer["path"] = str((export if name == "export" else getattr(hub, name))(*args, **options))
    except ModelLoadError as error:
        answer["error"] = str(error)
        answer["cause"] = type(error.__cause__).__name__
    print(json.dumps(answer), flush=True)
"""


class HubRefusedError(Exception):
    """``sllm.hub`` raised ModelLoadError in the client process; ``cause`` is the chained exception's type."""

    def __init__(self, text: str, cause: str) -> None:
        super().__init__(text)
        self.cause = cause


class HubClient:
    """``sllm.hub`` in a process of its own, with its own environment and cache; a context manager."""

    def __init__(self, endpoint: str, home: pathlib.Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env={
                **kept,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
                "PYTHONIOENCODING": "utf-8",
                **environment,
            },
        )
        self.stderr = ""

    def download(self, *args: str, **options: Any) -> pathlib.Path:
        """``sllm.hub.download`` over there; raises HubRefusedError where that raises ModelLoadError."""
        return self._call("download", args, options)

    def resolve(self, path: str) -> pathlib.Path:
        """``sllm.hub.resolve`` over there; raises HubRefusedError where that raises ModelLoadError."""
        return self._call("resolve", (path,), {})

    def export(self, uri: str, out: pathlib.Path, start: int, stop: int) -> pathlib.Path:
        """``sllm.export_layers`` over there; raises HubRefusedError where that raises ModelLoadError."""
        return self._call("export", (uri, str(out), start, stop), {})  # type: ignore[arg-type]

    def _call(self, name: str, args: tuple[str, ...], options: dict[str, Any]) -> pathlib.Path:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([name, args, options]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the client process ended: {self.stderr}")
        answer = json.loads(line)
        if "error" in answer:
            raise HubRefusedError(answer["error"], answer["cause"])
        return pathlib.Path(answer["path"])

    def close(self) -> None:
        """End the process; what it wrote to stderr is in ``stderr`` then."""
        if self._process.returncode is None:
            self._process.communicate(timeout=60)
            self._stderr.seek(0)
            self.stderr = self._stderr.read()
            self._stderr.close()

    def __enter__(self) -> HubClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

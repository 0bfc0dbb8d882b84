"""ModelScope on loopback, for the tests of ``ms://`` names: the two addresses that its SDK asks, and its
failures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback_site import LoopbackSite, SiteHandler


class ModelScopeServer(LoopbackSite):
    """A site on a free port; a context manager.

    Attributes:
        repos: files by path, by ``owner/repo`` and revision.
        tokens: who may read a repository that is in here.
        sums: SHA-256 sums that the listing has in place of the right ones, by path.
        moved: another site's address, where files are (as large ones are in an object store).
        drop_after: the next files break off after so many bytes, one entry for each.
        no_ranges: files come as a whole, whatever was asked for.
        pause: seconds before each 64 kB of a file.
        status: all is answered with it.
        listing: what is answered in place of a listing.
        requests: ``(path, headers)`` of each.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.tokens: dict[str, str] = {}
        self.sums: dict[str, str] = {}
        self.moved: str | None = None
        self.stored: dict[str, bytes] = {}
        self.drop_after: list[int] = []
        self.no_ranges = False
        self.pause = 0.0
        self.status: int | None = None
        self.listing: bytes | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []

    def paths(self) -> list[str]:
        """The paths asked for since the last call, without queries; files end in ``/repo``."""
        found = [urlsplit(path).path for path, _ in self.requests]
        self.requests.clear()
        return found


class _Handler(SiteHandler):
    @property
    def site(self) -> ModelScopeServer:
        assert isinstance(self.server.site, ModelScopeServer)
        return self.server.site

    def answer(self) -> None:
        site = self.site
        headers = {name.lower(): value for name, value in self.headers.items()}
        site.requests.append((self.path, headers))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if site.status is not None:
            return self._say(site.status, {"Code": site.status, "Message": "no service now"})
        if parts.path in site.stored:
            return self._body(site.stored[parts.path])
        name, _, rest = parts.path.removeprefix("/api/v1/models/").partition("/repo")
        files = site.repos.get((name, query.get("Revision", "")))
        wanted = site.tokens.get(name)
        shown = {headers.get("authorization", ""), headers.get("cookie", "")}
        if files is None or (wanted and not shown & {f"Bearer {wanted}", f"m_session_id={wanted}"}):
            message = {"Code": 10010205001, "Message": "获取模型信息失败，信息不存在", "Success": False}
            return self._say(404, message)
        if rest == "/files":
            return self._listed(files)
        data = files.get(query.get("FilePath", ""))
        if data is None:
            return self._say(404, {"Code": 10990101007, "Message": "file not exist"})
        if site.moved is not None:
            return self._send(
                302, {"Location": f"{site.moved}/store/{hashlib.sha256(data).hexdigest()}"}, b""
            )
        return self._body(data)

    def _listed(self, files: dict[str, bytes]) -> None:
        if self.site.listing is not None:
            return self._send(200, {}, self.site.listing)
        folders = {path.rpartition("/")[0] for path in files} - {""}
        listed: list[dict[str, Any]] = [
            {"Name": path, "Path": path, "Type": "tree", "Size": 0, "Sha256": ""} for path in folders
        ]
        for path, data in files.items():
            found = self.site.sums.get(path, hashlib.sha256(data).hexdigest())
            name = path.rpartition("/")[2]
            listed.append({"Name": name, "Path": path, "Type": "blob", "Size": len(data), "Sha256": found})
        return self._say(200, {"Code": 200, "Data": {"Files": listed}, "Message": "success", "Success": True})

    def _body(self, data: bytes) -> None:
        site = self.site
        begin, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        status, headers = 200, {"Accept-Ranges": "bytes"}
        if begin and not site.no_ranges:
            start, stop = int(begin), int(last or len(data) - 1) + 1
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        self._send(status, headers, data, site.drop_after.pop(0) if site.drop_after else None)

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes, keep: int | None = None) -> None:
        self.start(status, headers, len(body))
        with contextlib.suppress(OSError):  # the client has left
            for begin in range(0, len(body[:keep]), 1 << 16):
                if status in (200, 206) and "Accept-Ranges" in headers:
                    threading.Event().wait(self.site.pause)
                self.wfile.write(body[:keep][begin : begin + (1 << 16)])
            if keep is not None:
                self.break_off()

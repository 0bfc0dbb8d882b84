"""Files on a hub, read in pieces by HTTP range requests, whichever hub it is."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["PieceReader", "one_line", "range_of", "reply", "status_of"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)")
_PIECE = 1 << 16
"""Bytes of a reply that are looked at together."""

_TIMEOUT = 60.0
"""Seconds in which a server has to send something."""


class PieceReader(io.RawIOBase, ABC):
    """Reads pieces of a file: exactly what is asked for, and ahead where that goes on in order.

    Attributes:
        uri: what the user calls the file.

    Raises:
        ModelLoadError: the file cannot be had.

    """

    _LEAST, _MOST = 1 << 16, 1 << 23  # bytes of one request
    _MOST_WHOLE = 1 << 26  # bytes of a file that comes as a whole, whatever was asked for
    _TRIES = 4

    def __init__(self) -> None:
        super().__init__()
        self._at = 0
        self._held, self._held_at = b"", 0
        self._ahead = self._LEAST
        self._url, self._size = self._look_up()

    @property
    @abstractmethod
    def uri(self) -> str:
        """What the user calls the file."""

    @abstractmethod
    def _look_up(self) -> tuple[str, int]:
        """Where the bytes are at the moment, and how many."""

    @abstractmethod
    def _headers(self, url: str) -> Mapping[str, str]:
        """What to send with a request to ``url``, with the token where that is its hub."""

    @abstractmethod
    def _reason(self, error: Exception) -> str:
        """What went wrong and what to do about it, in one line."""

    @property
    @abstractmethod
    def _setting(self) -> str:
        """The environment variable that names another mirror."""

    def _fail(self, error: Exception) -> ModelLoadError:
        return ModelLoadError(f"cannot read {self.uri}: {self._reason(error)}")

    def _get(self, begin: int, size: int) -> bytes:
        end = min(begin + size, self._size)
        trouble: Exception | None = None
        for i in range(self._TRIES):
            if i:
                time.sleep(0.2 * 2**i)
                self._url = self._look_up()[0]  # links to large files expire
            headers = {**self._headers(self._url), "Accept-Encoding": "identity"}
            try:
                with reply(self._url, {**headers, "Range": f"bytes={begin}-{end - 1}"}) as (answer, pieces):
                    answer.raise_for_status()
                    first, total = self._check_reply(answer, begin, end)
                    data = _part(pieces, begin - first, end - first, total)
                if data is not None:
                    return data
                trouble = OSError(f"{self._mirror} sent more or less than {total} bytes")
            except ModelLoadError:
                raise
            except Exception as error:  # noqa: BLE001 - of whichever HTTP client huggingface_hub uses
                trouble = error
        assert trouble is not None
        raise self._fail(trouble) from trouble

    def _check_reply(self, answer: Any, begin: int, end: int) -> tuple[int, int]:
        """The offset at which a reply begins, and how many bytes it has to have, by what its header says.

        Raises:
            ModelLoadError: the other side will never send the range.
            OSError: another range.

        """
        headers = answer.headers
        whole = answer.status_code == 200
        encoding = headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise self._no_ranges(f"compresses what it sends ({encoding[:20]!r}), which nobody asked for")
        if whole and self._size > self._MOST_WHOLE:
            raise self._no_ranges("ignores the Range header and sends the whole file each time")
        if not whole and range_of(headers) != (begin, end):
            # A cache may have given what somebody else asked for.
            raise OSError(f"{self._mirror} sent another range than bytes {begin} to {end - 1}")
        length = headers.get("Content-Length", "")
        first, total = (0, self._size) if whole else (begin, end - begin)
        if length and length != str(total):
            raise OSError(f"{self._mirror} announced {length[:20]} bytes, expected {total}")
        return first, total

    @property
    def _mirror(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def _no_ranges(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"cannot read {self.uri} in pieces: {self._mirror} {what}; set {self._setting} to a mirror that"
            " sends ranges of files, or download the file and name its path"
        )

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, also behind the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or those up to the end."""
        size = min(size if size >= 0 else self._size, max(self._size - self._at, 0))
        if size == 0:
            return b""
        begin = self._at - self._held_at
        if not 0 <= begin <= len(self._held):
            self._held, self._held_at, begin = b"", self._at, 0
            self._ahead = self._LEAST
        missing = begin + size - len(self._held)
        if missing > 0:
            at = self._held_at + len(self._held)
            more = self._get(at, max(missing, self._ahead))
            self._ahead = min(2 * self._ahead, self._MOST)
            self._held, self._held_at, begin = self._held[begin:] + more, self._at, 0
        self._at += size
        return self._held[begin : begin + size]


@contextlib.contextmanager
def reply(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A reply to a GET, of which its header has come, and its body as it is sent, piece by piece.

    It goes through ``huggingface_hub``'s session, and so through its proxies and certificates. What says who
    the user is goes to no other host, where that is asked for in the end: both HTTP clients see to it.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer:
            yield answer, answer.iter_raw(_PIECE)
    else:  # requests, before huggingface_hub 1.0
        with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            yield answer, answer.raw.stream(_PIECE, decode_content=False)


def range_of(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """The first byte of a part that a reply brings, and the first one behind it; None for no part."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    return None if found is None else (int(found[1]), int(found[2]) + 1)


def _part(pieces: Iterator[bytes], begin: int, end: int, total: int) -> bytes | None:
    """Bytes ``begin`` to ``end`` of a body, and nothing else is kept; None if it has not ``total`` bytes."""
    kept = bytearray()
    n = 0
    for piece in pieces:
        kept += piece[max(begin - n, 0) : max(end - n, 0)]
        n += len(piece)
        if n > total:
            return None
    return bytes(kept) if n == total else None


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error of an HTTP client carries, if it carries one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def one_line(error: BaseException) -> str:
    """An exception's type and text on one line of bounded length."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

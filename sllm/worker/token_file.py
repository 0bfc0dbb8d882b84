"""The file of a worker's named tokens: who may use it, and how much of it.

It holds the SHA-256 of each token, never a token, and is JSON::

    {"format": 1,
     "tokens": [{"name": "alice", "sha256": "9f86...", "created": "2026-05-04T10:00:00Z",
                 "sessions": 2, "tokens_per_minute": 6000, "max_prompt": 2048, "grammars": false}]}

A limit that is left out is none. ``sllm worker token`` writes the file, as a whole or not at all, one writer
at a time; workers watch it (:mod:`sllm.worker.users`). A name that this module does not know is an error: a
misspelt limit would be none.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sllm.errors import BusyError
from sllm.folders import make_private_folder, read_private, replacing
from sllm.wire.tokens import token_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["DEFAULT_NAME", "FILE_NAME", "Allowance", "NamedToken", "TokenFile", "parse", "serialize"]

FILE_NAME = "tokens.json"
"""In a worker's folder for its state."""

DEFAULT_NAME = "default"
"""The name of who has the one token that every worker has; no token of the file can have it."""

MAX_TOKENS = 1000
"""In one file: every call is compared with each of them."""

_FORMAT = 1
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Allowance:
    """How much of a worker the user of a token may have; None: as much as anybody.

    Attributes:
        sessions: texts at once, those that wait for a place included.
        tokens_per_minute: of prompts, as far as they are not in memory, and of answers together; a minute's
            worth may come at once. Of layers: rows.
        max_prompt: tokens of a prompt.
        grammars: whether texts may have grammars.
        rpc: whether the worker's RPC server may be used, where it has one. The other limits do not hold
            there.

    Raises:
        ValueError: a limit below 1.

    """

    sessions: int | None = None
    tokens_per_minute: int | None = None
    max_prompt: int | None = None
    grammars: bool = True
    rpc: bool = True

    def __post_init__(self) -> None:
        for name in ("sessions", "tokens_per_minute", "max_prompt"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value < 1 << 31):
                raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more")
        for name in ("grammars", "rpc"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected true or false")

    def offers(self, feature: str) -> bool:
        """Whether the user may use a feature of the protocol that the worker has."""
        return {"grammar": self.grammars, "json-schema": self.grammars, "rpc": self.rpc}.get(feature, True)


@dataclass(frozen=True)
class NamedToken:
    """One token of the file.

    Attributes:
        name: whose it is.
        sha256: of the token, hex.
        created: when it was made, in UTC: ``2026-05-04T10:00:00Z``.
        allowance: what its user may use.
        previous: SHA-256 of the token before it, which is taken until ``previous_until``; None: none is.
        previous_until: in seconds since 1970.

    Raises:
        ValueError: no such name, or no SHA-256.

    """

    name: str
    sha256: str
    created: str = ""
    allowance: Allowance = Allowance()
    previous: str | None = None
    previous_until: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the name {self.name!r} is not possible, expected 1 to 64 letters, digits, '.', '_' and '-',"
                " the first a letter or a digit"
            )
        if self.name == DEFAULT_NAME:
            raise ValueError(f"the name {DEFAULT_NAME!r} is that of the worker's own token; take another")
        for digest in (self.sha256, self.sha256 if self.previous is None else self.previous):
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise ValueError(f"the token of {self.name} has no SHA-256 of 64 hexadecimal digits")
        if not isinstance(self.created, str):
            raise ValueError(f"created of {self.name} is not a text")
        if type(self.previous_until) not in (int, float) or not 0 <= self.previous_until < 1e12:
            raise ValueError(f"previous_until of {self.name} is no time")

    def digests(self, now: float) -> tuple[str, ...]:
        """The hashes of the tokens that are taken at ``now``, in seconds since 1970."""
        if self.previous is not None and now < self.previous_until:
            return self.sha256, self.previous
        return (self.sha256,)


_LIMITS = tuple(field.name for field in fields(Allowance))
_KEYS = {"name", "sha256", "created", "previous", "previous_until", *_LIMITS}


def parse(data: bytes) -> dict[str, NamedToken]:
    """The tokens of a file, by name.

    Raises:
        ValueError: it is damaged, or of a later version; the message says where, and shows no hash.

    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    try:
        whole = json.loads(data.decode("utf-8"), object_pairs_hook=_unrepeated)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(whole, dict) or set(whole) != {"format", "tokens"}:
        raise ValueError('it is not an object with "format" and "tokens"')
    if whole["format"] != _FORMAT or not isinstance(whole["tokens"], list):
        raise ValueError(f"its format is not {_FORMAT} with a list of tokens; is it of a later version?")
    if len(whole["tokens"]) > MAX_TOKENS:
        raise ValueError(f"it has {len(whole['tokens'])} tokens, expected {MAX_TOKENS} at most")
    found: dict[str, NamedToken] = {}
    digests: set[str] = set()
    for number, item in enumerate(whole["tokens"], 1):
        try:
            token = _token(item)
        except (ValueError, TypeError) as error:
            raise ValueError(f"token {number}: {error}") from None
        own = {token.sha256} | ({token.previous} if token.previous else set())
        if token.name in found or own & digests:
            raise ValueError(f"token {number}: {token.name}, or its token, is there twice")
        digests |= own
        found[token.name] = token
    return found


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice in one object")
    return found


def _token(item: object) -> NamedToken:
    if not isinstance(item, dict):
        raise ValueError("not an object")
    unknown = sorted(set(item) - _KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not known; is it of a later version?")
    if not {"name", "sha256"} <= set(item):
        raise ValueError('"name" or "sha256" is missing')
    limits = {name: item[name] for name in _LIMITS if name in item}
    rest = {name: value for name, value in item.items() if name not in _LIMITS}
    return NamedToken(**rest, allowance=Allowance(**limits))


def serialize(tokens: dict[str, NamedToken]) -> bytes:
    """A file that :func:`parse` reads as ``tokens``; what has its default value is left out."""
    items = []
    for token in tokens.values():
        item: dict[str, Any] = {"name": token.name, "sha256": token.sha256}
        for owner, names in ((token, ("created", "previous", "previous_until")), (token.allowance, _LIMITS)):
            for name in names:
                if getattr(owner, name) != getattr(type(owner), name):
                    item[name] = getattr(owner, name)
        items.append(item)
    return json.dumps({"format": _FORMAT, "tokens": items}, indent=1).encode() + b"\n"


class TokenFile:
    """Reads the file, and changes it: as a whole or not at all, one process at a time.

    Args:
        path: of the file; it and its folder need not exist.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = TokenFile(pathlib.Path(folder, "tokens.json"))
        ...     token = file.add("alice", Allowance(sessions=2))
        ...     file.read()["alice"].sha256 == token_digest(token), len(token)
        (True, 43)

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, NamedToken]:
        """The tokens, by name.

        Raises:
            FileNotFoundError: there is no file.
            PermissionError: others may read or change it.
            OSError: it cannot be read.
            ValueError: it is damaged.

        """
        data = read_private(self.path)
        try:
            return parse(data)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None

    def add(self, name: str, allowance: Allowance | None = None) -> str:
        """Make a token of 256 random bits for a new name; the token, which is kept nowhere.

        Raises:
            ValueError: an impossible name, one that is there already, too many, or a damaged file.
            BusyError: another process is changing the file.
            OSError: it cannot be read or written.

        """
        token = secrets.token_urlsafe(32)
        made = NamedToken(name, token_digest(token), _now(), allowance or Allowance())
        with self._changing(create=True) as tokens:
            if name in tokens:
                raise ValueError(f"there is a token of {name} already; rotate it, or revoke it first")
            if len(tokens) >= MAX_TOKENS:
                raise ValueError(f"{self.path} holds {MAX_TOKENS} tokens, and takes no more")
            tokens[name] = made
        return token

    def rotate(self, name: str, *, keep_seconds: float = 0.0) -> str:
        """Replace the token of a name; the new one. The old one is taken for ``keep_seconds`` more.

        Raises:
            ValueError: no such name, or a damaged file.
            BusyError, OSError: as :meth:`add`.

        """
        token = secrets.token_urlsafe(32)
        with self._changing() as tokens:
            old = self._known(tokens, name)
            kept = (old.sha256, time.time() + keep_seconds) if keep_seconds > 0 else (None, 0.0)
            tokens[name] = replace(
                old,
                sha256=token_digest(token),
                created=_now(),
                previous=kept[0],
                previous_until=round(kept[1], 3),
            )
        return token

    def limit(self, name: str, allowance: Allowance) -> None:
        """Give the token of a name other limits; raises as :meth:`rotate`."""
        with self._changing() as tokens:
            tokens[name] = replace(self._known(tokens, name), allowance=allowance)

    def revoke(self, name: str) -> None:
        """Remove the token of a name; raises as :meth:`rotate`."""
        with self._changing() as tokens:
            del tokens[self._known(tokens, name).name]

    def _known(self, tokens: dict[str, NamedToken], name: str) -> NamedToken:
        if name not in tokens:
            known = f": it has {', '.join(sorted(tokens))}" if tokens else ""
            raise ValueError(f"{self.path} has no token of {name}{known}")
        return tokens[name]

    @contextmanager
    def _changing(self, *, create: bool = False) -> Iterator[dict[str, NamedToken]]:
        """What the file holds, to be changed; it is written when the block ends without an exception."""
        if create:
            make_private_folder(self.path.parent)
        elif not self.path.exists():  # before the lock makes a file of its own beside it
            raise FileNotFoundError(f"there are no tokens in {self.path}: it does not exist")
        with self._locked():
            try:
                tokens = self.read()
            except FileNotFoundError:
                tokens = {}
            yield tokens
            self._write(serialize(tokens))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time change the file. The lock of one that dies is free again."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            until = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise BusyError(f"another process is changing {self.path}; try again") from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def _write(self, data: bytes) -> None:
        with replacing(self.path) as draft:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)  # a token that was revoked must not be back after a power failure


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

"""Tokens that clients have to show: what may be one, and the file that keeps it."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

from sllm.folders import read_private, write_private

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MIN_TOKEN", "checked_token", "is_visible", "load_or_make_token", "token_digest"]

MIN_TOKEN = 16
"""Characters; ``secrets.token_urlsafe(24)`` makes 32."""


def checked_token(token: str) -> str:
    """``token``, if it may be used as one.

    Raises:
        ValueError: too short, or not of visible ASCII characters; does not repeat it.

    """
    if len(token) < MIN_TOKEN:
        raise ValueError(f"the token has {len(token)} characters, expected {MIN_TOKEN} or more")
    if not is_visible(token):
        raise ValueError("the token has spaces, control or non-ASCII characters")
    return token


def is_visible(token: str) -> bool:
    """Whether a token is of visible ASCII characters, which fit into any header."""
    return all("!" <= c <= "~" for c in token)


def token_digest(token: str) -> str:
    """SHA-256 of a token, hex: what a server keeps of one. Tokens are made at random, so none can be guessed
    from its hash. By their hashes tokens are compared (:func:`hmac.compare_digest`), which all have one
    length: for some lengths of a token itself the comparison would take longer than for others.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def load_or_make_token(path: Path) -> str:
    """The token in a file; a new one is made and written, readable by its owner alone, where there is none.

    Raises:
        OSError: the file cannot be read or written.
        PermissionError: other users may read or replace the file (:func:`sllm.folders.read_private`).
        ValueError: what it holds is not a token.

    """
    try:
        return _read_token(path)
    except FileNotFoundError:
        token = secrets.token_urlsafe(24)
        if not write_private(path, token.encode() + b"\n"):
            return _read_token(path)  # another process has just written it
        return token


def _read_token(path: Path) -> str:
    try:
        return checked_token(read_private(path).decode().strip())
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{path} holds no token: {reason}") from None

"""Where files of sllm's own lie, and that they are written as a whole or not at all."""

from __future__ import annotations

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sllm import folders

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SLLM_CACHE", "SLLM_STATE", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_users_folders(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert folders.state_folder() == home / ".local" / "state" / "sllm"
    assert folders.cache_folder("rpc") == home / ".cache" / "sllm" / "rpc"
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "b"))
    assert folders.state_folder() == home / "a" / "sllm"
    assert folders.cache_folder("rpc") == home / "b" / "sllm" / "rpc"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert folders.state_folder() == home / ".local" / "state" / "sllm"
    assert folders.cache_folder("rpc") == home / ".cache" / "sllm" / "rpc"


def test_folders_of_ones_own(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "b"))
    monkeypatch.setenv("SLLM_STATE", str(home / "own"))
    monkeypatch.setenv("SLLM_CACHE", str(home / "cache"))
    assert folders.state_folder() == home / "own"
    assert folders.cache_folder("vocabularies") == home / "cache" / "vocabularies"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with folders.replacing(path) as draft:
        assert draft.parent == tmp_path
        draft.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyError), folders.replacing(path) as draft:
        draft.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"one"
    with folders.replacing(path) as draft:
        draft.write_bytes(b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    umask = os.umask(0)
    try:
        assert folders.write_private(path, b"secret")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not folders.write_private(path, b"other")
    assert path.read_bytes() == b"secret"
    assert list(path.parent.iterdir()) == [path]


def test_the_first_of_several_writers_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as executor:
        written = list(executor.map(lambda i: folders.write_private(path, bytes([i])), range(8)))
    assert written.count(True) == 1
    assert path.read_bytes() == bytes([written.index(True)])

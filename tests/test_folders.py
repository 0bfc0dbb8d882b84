"""Where files of sllm's own lie, and that they are written as a whole or not at all."""

from __future__ import annotations

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
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
    for wrong in (path / "below a file", tmp_path / "no folder" / "file"):
        with pytest.raises(OSError, match=rf"{wrong}'$"), folders.replacing(wrong) as draft:
            draft.write_bytes(b"nowhere")
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


def test_the_folders_of_a_private_file_are_private(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        assert folders.write_private(tmp_path / "a" / "b" / "file", b"secret")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert folders.read_private(tmp_path / "a" / "b" / "file") == b"secret"


posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions as of POSIX")


@posix
@pytest.mark.parametrize(
    ("file", "folder", "above", "what"),
    [
        (0o666, 0o700, 0o700, "chmod 600 {file}"),
        (0o644, 0o700, 0o700, "chmod 600 {file}"),
        (0o640, 0o700, 0o700, "chmod 600 {file}"),
        (0o602, 0o700, 0o700, "chmod 600 {file}"),
        (0o600, 0o777, 0o700, "chmod go-w {folder}"),
        (0o600, 0o702, 0o700, "chmod go-w {folder}"),
        (0o600, 0o700, 0o777, "chmod go-w {above}"),
        (0o400, 0o700, 0o702, "chmod go-w {above}"),
    ],
)
def test_a_secret_that_is_open_to_others(
    tmp_path: Path, file: int, folder: int, above: int, what: str
) -> None:
    path = tmp_path / "above" / "folder" / "file"
    folders.write_private(path, b"secret")
    path.chmod(file)
    path.parent.chmod(folder)
    path.parent.parent.chmod(above)
    names = {"file": path, "folder": path.parent, "above": path.parent.parent}
    with pytest.raises(PermissionError, match="others on this machine") as caught:
        folders.read_private(path)
    assert what.format(**names) in str(caught.value)
    # Also by another way to it.
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(PermissionError, match="others on this machine"):
        folders.read_private(link)


@posix
@pytest.mark.parametrize(
    ("file", "folder", "above"), [(0o600, 0o700, 0o755), (0o400, 0o1777, 0o755), (0o600, 0o755, 0o1777)]
)
def test_a_secret_that_is_not(tmp_path: Path, file: int, folder: int, above: int) -> None:
    path = tmp_path / "above" / "folder" / "file"
    folders.write_private(path, b"secret")
    path.chmod(file)
    path.parent.chmod(folder)
    path.parent.parent.chmod(above)
    assert folders.read_private(path) == b"secret"


@posix
def test_a_folder_that_a_group_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused where others are in the group."""
    path = tmp_path / "folder" / "file"
    folders.write_private(path, b"secret")
    path.parent.chmod(0o770)
    monkeypatch.setattr(folders, "_is_own_group", lambda _gid: True)
    assert folders.read_private(path) == b"secret"
    monkeypatch.setattr(folders, "_is_own_group", lambda _gid: False)
    with pytest.raises(PermissionError, match="chmod go-w"):
        folders.read_private(path)
    monkeypatch.undo()
    group = SimpleNamespace(gr_mem=["somebody"])
    monkeypatch.setattr("grp.getgrgid", lambda _gid: group)
    assert not folders._is_own_group(1)
    group.gr_mem = []
    monkeypatch.setattr("pwd.getpwall", lambda: [SimpleNamespace(pw_gid=2, pw_name="somebody")])
    assert folders._is_own_group(1)
    assert not folders._is_own_group(2)


@posix
def test_what_is_to_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    folders.write_private(path, b"known to all")
    path.chmod(0o664)
    path.parent.chmod(0o755)
    assert folders.read_trusted(path) == b"known to all"
    path.chmod(0o666)
    with pytest.raises(PermissionError, match="chmod o-w"):
        folders.read_trusted(path)
    path.chmod(0o644)
    path.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod go-w"):
        folders.read_trusted(path)
    with pytest.raises(FileNotFoundError):
        folders.read_trusted(tmp_path / "none")


def test_the_first_of_several_writers_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as executor:
        written = list(executor.map(lambda i: folders.write_private(path, bytes([i])), range(8)))
    assert written.count(True) == 1
    assert path.read_bytes() == bytes([written.index(True)])

"""The folder of a worker's Unix socket: for its user alone, and cleared away when its owner was killed."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from remote_worker import WorkerProcess

from sllm.worker.socket_folder import SocketFolder

if TYPE_CHECKING:
    from collections.abc import Callable

OWNER = """
import socket, sys, threading
from sllm.worker.socket_folder import SocketFolder
folder = SocketFolder()
with socket.socket(socket.AF_UNIX) as one:
    one.bind(str(folder.path / "grpc"))
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> object:
    """The folder for temporary files, here and in processes that are started; short, for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def owner() -> tuple[subprocess.Popen[str], Path]:
    made = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    return made, Path(made.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()


def test_it_is_private_and_goes(temporary: Path) -> None:
    with closing(SocketFolder()) as folder:
        assert folder.path.parent == temporary
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []
    folder.close()


def test_what_a_killed_owner_has_left_goes(temporary: Path) -> None:
    (dead, left), (alive, used) = owner(), owner()
    try:
        assert {left, used} == set(temporary.iterdir())
        kill(dead)
        assert left.exists()
        with closing(SocketFolder()) as folder:
            assert set(temporary.iterdir()) == {used, folder.path}
            assert (used / "grpc").is_socket()
    finally:
        kill(alive)


def test_one_of_this_process_stays(temporary: Path) -> None:
    with closing(SocketFolder()) as first, closing(SocketFolder()) as second:
        assert set(temporary.iterdir()) == {first.path, second.path}


def plain(folder: Path, name: str = "sllm-other") -> Path:
    made = folder / name
    made.mkdir(mode=0o700)
    (made / "worker.lock").touch(0o600)
    (made / "kept").touch()
    return made


def open_to_others(folder: Path) -> Path:
    made = plain(folder)
    made.chmod(0o750)
    return made


def another_name(folder: Path) -> Path:
    return plain(folder, "other-sllm")


def without_a_lock(folder: Path) -> Path:
    made = plain(folder)
    (made / "worker.lock").unlink()
    return made


def a_link_to_one(folder: Path) -> Path:
    made = plain(folder, "elsewhere")
    (folder / "sllm-link").symlink_to(made)
    return made


def a_lock_that_is_a_link(folder: Path) -> Path:
    made = without_a_lock(folder)
    (made / "worker.lock").symlink_to(made / "kept")
    return made


def a_lock_that_is_a_pipe(folder: Path) -> Path:
    made = without_a_lock(folder)
    os.mkfifo(made / "worker.lock")
    return made


def a_lock_that_is_a_folder(folder: Path) -> Path:
    made = without_a_lock(folder)
    (made / "worker.lock").mkdir()
    return made


@pytest.mark.parametrize(
    "make",
    [
        open_to_others,
        another_name,
        without_a_lock,
        a_link_to_one,
        a_lock_that_is_a_link,
        a_lock_that_is_a_pipe,
        a_lock_that_is_a_folder,
    ],
)
def test_folders_that_are_none_of_these_stay(temporary: Path, make: Callable[[Path], Path]) -> None:
    made = make(temporary)
    SocketFolder().close()
    assert (made / "kept").exists()


def test_such_a_folder_goes_otherwise(temporary: Path) -> None:
    made = plain(temporary)
    SocketFolder().close()
    assert not made.exists()


def test_what_is_below_is_not_entered(temporary: Path) -> None:
    made = plain(temporary)
    (made / "below").mkdir()
    (made / "below" / "kept").touch()
    SocketFolder().close()
    assert (made / "below" / "kept").exists()


def test_a_folder_that_cannot_be_listed(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> object:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        folder = SocketFolder()
    with closing(folder):
        assert folder.path.parent == temporary


def test_where_the_usual_folder_has_a_long_name(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with closing(SocketFolder()) as folder, socket.socket(socket.AF_UNIX) as one:
        assert folder.path.parent == Path("/tmp")
        one.bind(str(folder.path / "grpc"))


def test_a_worker_that_is_killed(temporary: Path, tmp_path: Path) -> None:
    def sockets() -> list[Path]:
        return list(temporary.glob("sllm-*"))

    with WorkerProcess(tmp_path) as first:
        assert first.uri
        (left,) = sockets()
    assert sockets() == [left]
    with WorkerProcess(tmp_path) as second:
        assert second.uri
        (used,) = sockets()
        assert used != left

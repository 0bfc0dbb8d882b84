"""Moving the pin to another release, on archives of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pinned_source import COMMIT, TREE, VENDOR, Pinned, fetch, write_archive

sys.modules.setdefault("fetch", fetch)  # what the script imports, found beside it when it is run
sys.path.insert(0, str(VENDOR))
try:
    import move_pin
finally:
    sys.path.remove(str(VENDOR))

OLD = "1" * 40


@pytest.fixture
def pinned(tmp_path: Path) -> Pinned:
    """A pin of another commit than that of the archive beside it."""
    made = Pinned.make(tmp_path)
    made.repin(commit=OLD, version="1.0.0", rpc_protocol="1.0.0", sha256="f" * 64)
    return made


def script(pinned: Pinned, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, VENDOR / "move_pin.py", "--pin", pinned.pin_file, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_pin_says_what_the_archive_says(pinned: Pinned) -> None:
    result = script(pinned, "0.0.1", "--archive", pinned.archive)
    assert result.returncode == 0, result.stderr
    assert json.loads(pinned.pin_file.read_text()) == {
        "commit": COMMIT,
        "version": "1.2.3",
        "rpc_protocol": "4.5.6",
        "package": "llama-cpp-python",
        "package_version": "0.0.1",
        "sha256": fetch.sha256_of(pinned.archive),
    }
    assert COMMIT[:9] in result.stdout
    assert pinned.ensure() is True  # fetch.py takes it


def test_documents_that_name_the_commit_move_along(pinned: Pinned, tmp_path: Path) -> None:
    readme, changes, other = tmp_path / "README.md", tmp_path / "CHANGELOG.md", tmp_path / "other.md"
    readme.write_text(f"at commit\n`{OLD}`, whose licence\n")
    changes.write_text(f"llama.cpp at commit `{OLD}` (1.0.0).\n")
    other.write_text("nothing of it\n")
    new = move_pin.read_pin(pinned.archive, pinned.pin, "0.0.1")
    changed = move_pin.move(pinned.pin_file, new, (readme, changes, other))
    assert changed == [pinned.pin_file, readme, changes]
    assert readme.read_text() == f"at commit\n`{COMMIT}`, whose licence\n"
    assert changes.read_text() == f"llama.cpp at commit `{COMMIT}` (1.2.3).\n"


def without(name: str, text: str | None = None) -> dict[str, str]:
    tree: dict[str, Any] = {**TREE, name: text}
    return {path: content for path, content in tree.items() if content is not None}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (without("ggml/include/ggml-rpc.h"), "holds no .*ggml-rpc.h"),
        (without("CMakeLists.txt", "project(other)\n"), "does not say its version"),
    ],
)
def test_other_archives_leave_the_pin_as_it_is(pinned: Pinned, files: dict[str, str], said: str) -> None:
    before = pinned.pin_file.read_text()
    write_archive(pinned.archive, files)
    with pytest.raises(fetch.FetchError, match=said):
        move_pin.read_pin(pinned.archive, pinned.pin, "0.0.1")
    assert script(pinned, "0.0.1", "--archive", pinned.archive).returncode == 1
    assert pinned.pin_file.read_text() == before


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_file_that_is_no_archive(pinned: Pinned, content: bytes) -> None:
    pinned.archive.write_bytes(content)
    result = script(pinned, "0.0.1", "--archive", pinned.archive)
    assert result.returncode == 1
    assert "is not a readable archive" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_version_that_is_not_that_of_the_archive(pinned: Pinned) -> None:
    """Its folder has the version in its name."""
    result = script(pinned, "0.0.2", "--archive", pinned.archive)
    assert result.returncode == 1
    assert "llama_cpp_python-0.0.2/" in result.stderr


def test_arguments_are_asked_for(pinned: Pinned) -> None:
    result = script(pinned)
    assert result.returncode == 2
    assert "version" in result.stderr

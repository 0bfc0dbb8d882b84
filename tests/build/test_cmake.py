"""What the build says when the machine lacks something, from small projects with the build's own modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")


def configure(folder: Path, body: str, *options: str, **environment: str) -> tuple[int, str]:
    """Configure a project of these lines; the status, and what CMake said with its lines joined."""
    assert CMAKE is not None
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\n"
        "project(tried LANGUAGES NONE)\n"
        f"list(APPEND CMAKE_MODULE_PATH {ROOT}/cmake)\n{body}\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [CMAKE, "-S", folder, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}", *options],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}, **environment},
        check=False,
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


COMPILERS = "include(BuildTools)\nsllm_require_compilers()"
HEADERS = "include(BuildTools)\nsllm_require_python_headers(Development.Module)"


@pytest.mark.parametrize(("variable", "name"), [("CC", "C"), ("CXX", "C++")])
def test_a_missing_compiler_is_named_as_one_installs_it(tmp_path: Path, variable: str, name: str) -> None:
    if shutil.which("cc") is None or shutil.which("c++") is None:
        pytest.skip("this machine has no compilers to leave out one of")
    status, said = configure(tmp_path, COMPILERS, **{variable: str(tmp_path / "no-compiler")})
    assert status != 0
    assert f"No {name} compiler was found" in said
    assert "no-compiler" in said
    for command in ("apt install g++", "dnf install gcc-c++", "xcode-select --install"):
        assert command in said
    assert "environment variable CC:" not in said


def test_a_compiler_that_only_the_interpreter_names_is_not_asked_for(tmp_path: Path) -> None:
    """Such as clang, for an interpreter that was compiled elsewhere, while gcc is here."""
    if shutil.which("cc") is None or shutil.which("c++") is None:
        pytest.skip("this machine has no compilers")
    interpreter = tmp_path / "python"
    interpreter.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        "    *\"get_config_var('CC')\"* | *\"get_config_var('CXX')\"*) echo no-compiler -pthread ;;\n"
        f'    *) exec {sys.executable} "$@" ;;\n'
        "esac\n"
    )
    interpreter.chmod(0o755)
    status, said = configure(
        tmp_path,
        COMPILERS,
        f"-DPython_EXECUTABLE={interpreter}",
        CC="no-compiler -pthread",
        CXX="no-compiler -pthread",
    )
    assert status == 0, said


def test_compilers_that_are_there_pass(tmp_path: Path) -> None:
    if shutil.which("cc") is None or shutil.which("c++") is None:
        pytest.skip("this machine has no compilers")
    status, said = configure(tmp_path, COMPILERS)
    assert status == 0, said


def test_missing_headers_are_named_with_the_interpreter(tmp_path: Path) -> None:
    status, said = configure(tmp_path, HEADERS, f"-DPython_INCLUDE_DIR={tmp_path / 'no-headers'}")
    assert status != 0
    assert "Python.h" in said
    assert sys.executable in said
    assert "apt install python3-dev" in said
    assert f"python{sys.version_info[0]}.{sys.version_info[1]}-dev" in said


def test_the_checks_come_before_the_download() -> None:
    """Nobody waits for 77 MB to be told that a compiler is missing."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    places = [
        text.index(word) for word in ("sllm_require_python_headers(", "sllm_require_compilers(", "fetch.py")
    ]
    assert places == sorted(places)

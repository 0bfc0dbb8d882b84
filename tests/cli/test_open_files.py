"""The limit of open files, which ``sllm worker`` raises."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from sllm.cli import open_files

RAISE = """
import resource
from sllm.cli.open_files import raise_file_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard), hard)
"""


def test_the_limit_becomes_the_hard_one() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY:
        pytest.skip("there is no hard limit")
    ended = subprocess.run([sys.executable, "-c", RAISE], capture_output=True, text=True, check=True)
    raised, both, hard = ended.stdout.split()
    assert (raised, both) == (hard, "True")


def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_which: int, _limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files.raise_file_limit() == 256

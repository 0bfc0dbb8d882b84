"""The memory of ``sllm worker``: the C library's arenas, which its threads share."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has arenas")

THREADS = """
import ctypes, sys, threading
if sys.argv[1] == "bound":
    from sllm.cli.allocator import bound_arenas
    print(bound_arenas())
together = threading.Barrier(13)
held = []

def allocate():
    held.append(bytes(5000))  # all at once, so that each has an arena if it may
    together.wait()
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads:
    thread.start()
together.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
assert libc.malloc_info(0, file) == 0
libc.fclose(file)
together.wait()
for thread in threads:
    thread.join()
print(open(sys.argv[2]).read().count("<heap nr="))
"""


def n_arenas(how: str, folder: object, **environment: str) -> list[str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", THREADS, how, f"{folder}/{how}.xml"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, env=ours | environment, timeout=60
    )
    return ended.stdout.split()


def test_threads_share_an_arena(tmp_path: object) -> None:
    assert int(n_arenas("not", tmp_path)[0]) > 2
    assert n_arenas("bound", tmp_path) == ["True", "2"]


def test_what_the_environment_says_counts(tmp_path: object) -> None:
    assert n_arenas("bound", tmp_path, MALLOC_ARENA_MAX="4") == ["False", "4"]

"""What a build with CUDA says on a machine that lacks something: the words, which need no such build."""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from sllm.engine._cuda import missing_device, missing_library

if TYPE_CHECKING:
    from pathlib import Path

CORE = importlib.import_module("sllm.engine._ffi")  # the attribute of that name is its ffi

NO_DRIVER = (
    "ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version"
)
NO_FILE = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (f"libcublas.so.13: {NO_FILE}", ["libcublas.so.13 is not found", "of CUDA 13", "LD_LIBRARY_PATH"]),
        (f"libcudart.so.12: {NO_FILE}", ["libcudart.so.12 is not found", "of CUDA 12"]),
        (f"libcublasLt.so.12: {NO_FILE}", ["libcublasLt.so.12 is not found"]),
        (f"libnccl.so.2: {NO_FILE}", ["libnccl.so.2 is not found", "the libraries and name"]),
        (f"libcuda.so.1: {NO_FILE}", ["the NVIDIA driver's libcuda.so.1", "GGML_CUDA_NO_VMM=ON"]),
        ("Error loading shared library libcublas.so.13: No such file (needed by _core.so)", ["of CUDA 13"]),
    ],
)
def test_a_library_is_missing(error: str, words: list[str]) -> None:
    told = missing_library(error)
    assert told is not None
    assert error in told
    for word in words:
        assert word in told


@pytest.mark.parametrize("error", ["No module named 'sllm._core'", f"libgomp.so.1: {NO_FILE}", ""])
def test_it_is_another_library(error: str) -> None:
    assert missing_library(error) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (NO_DRIVER, ("CUDA", "there is no NVIDIA driver, or it is older than the CUDA")),
        (
            "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected\n",
            ("CUDA", "the driver sees no GPU"),
        ),
        ("ggml_cuda_init: failed to initialize ROCm: out of memory\n", ("ROCm", "out of memory")),
        ("llama_init_from_model: failed to initialize the context: too large", None),
        ("ggml_cuda_init: found 1 CUDA devices", None),
    ],
)
def test_no_device(line: str, told: tuple[str, str] | None) -> None:
    found = missing_device(line)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == told[0]
        assert found[1].startswith(told[1])
        assert line.strip().rpartition(": ")[2] in found[1]  # CUDA's words too, to search for


def test_it_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(CORE, "unusable_backends", told)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for _ in range(2):
        CORE._note_missing_device(NO_DRIVER)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sllm", logging.WARNING)
    assert record.getMessage().startswith(
        "this build has CUDA, and it found no device here: there is no NVIDIA"
    )
    assert list(told) == ["CUDA"]


@pytest.mark.parametrize("devices", ["", "-1"])
def test_who_hides_the_devices_is_not_warned(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    monkeypatch.setattr(CORE, "unusable_backends", {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with caplog.at_level(logging.INFO, logger="sllm"):
        CORE._note_missing_device(NO_DRIVER)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_an_import_that_fails_says_what_to_do(tmp_path: Path) -> None:
    program = f"""
        import importlib.abc, sys

        class Loader(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "sllm._core":
                    raise ImportError("libcublas.so.13: {NO_FILE}")

        sys.meta_path.insert(0, Loader())
        import sllm
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,  # not the checkout, which has no extension
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: sllm was built with CUDA, and libcublas\.so\.13 is not found", last)

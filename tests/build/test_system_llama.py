"""A llama.cpp that is installed already, in a prefix: built from the pinned sources, linked, run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wheel_environment
from processes import environment

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "vendor/llama.cpp/source"
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(CMAKE is None, reason="CMake is not installed"),
    pytest.mark.skipif(not (SOURCE / "CMakeLists.txt").exists(), reason="llama.cpp's sources are not here"),
    pytest.mark.skipif(sys.platform != "linux", reason="written for ELF"),
]


def step(*command: str | Path, **more: str) -> None:
    result = subprocess.run(
        command, env={**os.environ, **more}, capture_output=True, text=True, errors="replace", check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a distribution installs it: shared libraries that do not say where the others are."""
    assert CMAKE is not None
    build = ROOT / "build/system-llama"
    folder = tmp_path_factory.mktemp("prefix")
    options = ["-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF"]
    options += [
        f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    ]
    step(CMAKE, "-S", SOURCE, "-B", build, *options, f"-DCMAKE_INSTALL_PREFIX={folder}")
    step(CMAKE, "--build", build, "--parallel", str(os.cpu_count() or 1))
    step(CMAKE, "--install", build, "--prefix", folder)
    return folder


CODE = """
import json
import sllm
from sllm import embedded
from sllm.engine import cpu
from sllm.engine.mtp import has_mtp
from sllm.model import devices
exact = dict(n_ctx=128, n_threads=1, flash_attn=True, type_k="q8_0", type_v="q8_0")
with sllm.LocalTarget(embedded.TARGET, **exact) as target, sllm.Model(embedded.DRAFT) as draft:
    plain = sllm.generate(target, "Once", max_tokens=16).text()
    drafted = sllm.generate(target, "Once", draft=draft, max_tokens=16).text()
lines = open("/proc/self/maps").read().split()
print(json.dumps({
    "file": sllm.__file__,
    "kind": cpu.build().kind,
    "mtp": has_mtp(),
    "devices": [device.name for device in devices()],
    "plain": plain,
    "drafted": drafted,
    "libraries": sorted({line for line in lines if "libggml" in line or "libllama" in line}),
}))
"""


def test_it_links_and_runs_without_a_word_about_paths(prefix: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    step(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, ROOT),
        *("-C", f"build-dir={tmp_path / 'build'}"),
        SLLM_USE_SYSTEM_LLAMA="ON",
        CMAKE_PREFIX_PATH=str(prefix),
    )
    python, site = wheel_environment.unpack(next(wheels.iterdir()), tmp_path / "venv")
    result = subprocess.run(
        [python, "-c", CODE],
        cwd=tmp_path,
        env={k: v for k, v in environment().items() if k not in ("LD_LIBRARY_PATH", "SLLM_CPU_VARIANT")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert Path(found["file"]).is_relative_to(site)
    assert found["kind"] == "system"
    assert found["mtp"]  # the pinned sources export what they do not declare
    assert "CPU" in found["devices"]
    assert found["drafted"] == found["plain"]
    assert found["libraries"]
    assert all(Path(name).is_relative_to(prefix) for name in found["libraries"])

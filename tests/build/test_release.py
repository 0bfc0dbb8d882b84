"""What a release is made of besides the wheel itself: packages of backends, the list of what is compiled in,
and the workflow that makes them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sllm
from sllm import embedded
from sllm.engine import cpu

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / ".github/workflows/release.yml"
PLATFORM = "manylinux_2_27_x86_64.manylinux_2_28_x86_64"


# ---- packages of backends


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    pytest.importorskip("wheel", reason="wheel is not installed (pip install 'sllm[dev]')")
    spec = importlib.util.spec_from_file_location("backend_package", ROOT / "cmake/backend_package.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    """A wheel with the files that matter here."""
    info = "sllm-1.2.3.dist-info"
    path = tmp_path / f"sllm-1.2.3-cp310-abi3-{PLATFORM}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sllm/__init__.py", "")
        archive.writestr("sllm/lib/libsllm-ggml-base-0123456789.so", b"base")
        archive.writestr("sllm/lib/libsllm-ggml-cpu-haswell.so", b"kernels")
        archive.writestr("sllm/lib/libsllm-ggml-cuda.so", b"\x7fELF cuda")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.4\nName: sllm\nVersion: 1.2.3\n")
        archive.writestr(f"{info}/licenses/LICENSE", "MIT")
        archive.writestr(f"{info}/licenses/llama.cpp/LICENSE", "MIT, too")
    return path


def test_a_backend_becomes_a_package(maker: ModuleType, portable: Path, tmp_path: Path) -> None:
    made = maker.backend_package(portable, "cuda", tmp_path / "dist")
    assert made.name == f"sllm_backend_cuda-1.2.3-py3-none-{PLATFORM}.whl"
    with zipfile.ZipFile(made) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    info = "sllm_backend_cuda-1.2.3.dist-info"
    assert set(files) == {
        "sllm_backend_cuda/__init__.py",
        "sllm_backend_cuda/libsllm-ggml-cuda.so",
        *(f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")),
        *(f"{info}/licenses/{n}" for n in ("LICENSE", "llama.cpp/LICENSE")),
    }
    metadata = Parser().parsestr(files[f"{info}/METADATA"])
    assert (metadata["Name"], metadata["Requires-Dist"]) == ("sllm-backend-cuda", "sllm==1.2.3")
    assert metadata.get_all("License-File") == ["LICENSE", "llama.cpp/LICENSE"]
    assert files[f"{info}/entry_points.txt"] == "[sllm.backends]\ncuda = sllm_backend_cuda\n"
    tags = Parser().parsestr(files[f"{info}/WHEEL"]).get_all("Tag")
    assert tags == [f"py3-none-{platform}" for platform in PLATFORM.split(".")]


def test_pip_takes_the_package(maker: ModuleType, portable: Path, tmp_path: Path) -> None:
    made = maker.backend_package(portable, "cuda", tmp_path / "dist")
    plain = made.with_name(made.name.replace(PLATFORM, "any"))  # for whatever machine this is
    made.rename(plain)
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, plain]
    if subprocess.call([sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL):
        pytest.skip("this environment has no pip")
    subprocess.run(command, check=True, capture_output=True)
    assert (target / "sllm_backend_cuda/libsllm-ggml-cuda.so").read_bytes() == b"\x7fELF cuda"


@pytest.mark.parametrize("backend", ["vulkan", "cpu", "base", "../cuda", ""])
def test_a_backend_that_is_not_there(maker: ModuleType, portable: Path, tmp_path: Path, backend: str) -> None:
    with pytest.raises(ValueError, match="there are: cuda"):
        maker.backend_package(portable, backend, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_files_that_are_no_portable_wheel(
    maker: ModuleType, portable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "sllm-1.2.3-cp310-abi3-any.whl"
    text.write_text("no archive")
    other = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other-1.0.dist-info/METADATA", "Name: other\n")
    native = tmp_path / f"sllm-1.2.4-cp310-abi3-{PLATFORM}.whl"
    with zipfile.ZipFile(portable) as source, zipfile.ZipFile(native, "w") as archive:
        for name in source.namelist():
            if "/lib/" not in name:
                archive.writestr(name, source.read(name))
    for path, said in (
        (text, "is no wheel"),
        (other, "is no wheel of sllm"),
        (native, "it is no portable build"),
        (tmp_path / "missing.whl", "No such file"),
    ):
        assert maker.main([str(path), "cuda", "--out", str(tmp_path / "dist")]) == 1
        assert said in capsys.readouterr().err


# ---- what is compiled in


def test_the_list_of_what_is_compiled_in_names_what_is_there() -> None:
    text = (ROOT / "cmake/sbom.cdx.json.in").read_text(encoding="utf-8")
    assert set(re.findall(r"@(\w+)@", text)) == {
        "PROJECT_VERSION",
        "llama_commit",
        "target_sha256",
        "draft_sha256",
    }
    listed = json.loads(text)
    refs = {c["bom-ref"] for c in listed["components"]}
    assert refs == set(listed["dependencies"][0]["dependsOn"])
    models = {c["name"] for c in listed["components"] if c["type"] == "machine-learning-model"}
    assert models == {f"sllm/embedded/{path.name}" for path in (ROOT / "sllm/embedded").glob("*.gguf")}


@pytest.mark.skipif(cpu.build().kind == "system", reason="llama.cpp is the system's, which has its own list")
def test_the_installed_package_has_the_list() -> None:
    found = [file for file in distribution("sllm").files or () if str(file).endswith("sboms/sllm.cdx.json")]
    if not found:
        pytest.skip("an editable install has none")
    listed: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
    components = {c["bom-ref"]: c for c in listed["components"]}
    assert listed["metadata"]["component"]["purl"] == f"pkg:pypi/sllm@{sllm.__version__}"
    assert components["llama.cpp"]["version"] == sllm.llama_cpp_commit
    for name, path in (("target", embedded.TARGET), ("draft", embedded.DRAFT)):
        (digest,) = components[f"embedded-{name}"]["hashes"]
        assert digest["content"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---- the workflow


def test_the_workflow_builds_what_the_documents_promise() -> None:
    text = RELEASE.read_text(encoding="utf-8")
    for machine in ("ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "windows-2025"):
        assert machine in text
    # Nothing but the last job may publish, and that one only for tags.
    publish = text[text.index("  publish:") :]
    assert text.count("id-token: write") == publish.count("id-token: write") == 1
    assert "if: github.event_name == 'push' && startsWith(github.ref, 'refs/tags/v')" in publish


@pytest.mark.parametrize(
    ("platform", "arch", "wanted"),
    [
        ("linux", "x86_64", "cp310-manylinux_x86_64"),
        ("linux", "aarch64", "cp310-manylinux_aarch64"),
        ("macos", "arm64", "cp310-macosx_arm64"),
        ("windows", "AMD64", "cp310-win_amd64"),
    ],
)
def test_one_wheel_for_each_machine(platform: str, arch: str, wanted: str) -> None:
    pytest.importorskip("cibuildwheel", reason="cibuildwheel is not installed")
    command = ["--platform", platform, "--archs", arch, "--print-build-identifiers", str(ROOT)]
    result = subprocess.run(
        [sys.executable, "-m", "cibuildwheel", *command], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [wanted]

"""What is shipped: the pin and its script, the installed package, and (marked) the sdist and the wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pinned_source import ROOT, TREE, VENDOR, Pinned, fetch, write_archive

import sllm
from sllm import _core

PIN = fetch.Pin.load()

# --- the pin and fetch.py, on an archive of our own ---


@pytest.fixture
def pinned(tmp_path: Path) -> Pinned:
    return Pinned.make(tmp_path)


def test_the_pin_is_whole() -> None:
    assert re.fullmatch("[0-9a-f]{40}", PIN.commit)
    assert re.fullmatch("[0-9a-f]{64}", PIN.sha256)
    assert re.fullmatch(r"\d+\.\d+\.\d+", PIN.rpc_protocol)


def test_fetch_fills_the_folder_once(pinned: Pinned) -> None:
    assert pinned.ensure() is True
    assert pinned.files() == set(TREE) - {"docs/build.md"} | {fetch.MANIFEST}
    assert (pinned.source / "src/llama.cpp").read_text() == "// the library\n"
    assert pinned.ensure() is False
    assert [path.name for path in pinned.source.parent.iterdir()] == ["source"]  # no scratch left behind


def test_an_empty_folder_is_filled(pinned: Pinned) -> None:
    pinned.source.mkdir(parents=True)
    assert pinned.ensure() is True


def test_a_wrong_hash_is_refused(pinned: Pinned) -> None:
    pinned.archive.write_bytes(pinned.archive.read_bytes() + b"\0")
    with pytest.raises(fetch.FetchError, match=r"not the pinned archive: sha256 [0-9a-f]{64}, expected"):
        pinned.ensure()
    assert not pinned.source.exists()


def test_a_missing_archive_is_named(pinned: Pinned) -> None:
    pinned.archive.unlink()
    with pytest.raises(fetch.FetchError, match=r"llama_cpp_python-0\.0\.1\.tar\.gz cannot be read"):
        pinned.ensure()


@pytest.mark.parametrize("field", ["version", "rpc_protocol"])
def test_a_pin_that_the_archive_belies_is_refused(pinned: Pinned, field: str) -> None:
    pinned.repin(**{field: "9.9.9"})
    with pytest.raises(
        fetch.FetchError, match=rf"pin\.json says {field} 9\.9\.9, the archive holds \d\.\d\.\d"
    ):
        pinned.ensure()
    assert not pinned.source.exists()


def test_an_archive_without_llama_cpp_is_refused(pinned: Pinned) -> None:
    pinned.repin(sha256=write_archive(pinned.archive, TREE, folder="vendor/other"))
    with pytest.raises(fetch.FetchError, match="correct the pin"):
        pinned.ensure()


def test_a_path_out_of_the_folder_is_refused(pinned: Pinned) -> None:
    pinned.repin(sha256=write_archive(pinned.archive, TREE | {"src/../../../escaped.cpp": ""}))
    with pytest.raises(fetch.FetchError, match="outside its folder"):
        pinned.ensure()
    assert not pinned.source.exists()


@pytest.mark.parametrize("harm", ["missing", "altered", "no manifest", "broken manifest"])
def test_a_half_filled_folder_is_refused_until_forced(pinned: Pinned, harm: str) -> None:
    pinned.ensure()
    hurt = pinned.source / ("src/llama.cpp" if harm in ("missing", "altered") else fetch.MANIFEST)
    if harm in ("missing", "no manifest"):
        hurt.unlink()
    else:
        hurt.write_text("[]")
    before = pinned.files()
    with pytest.raises(fetch.FetchError, match=r"is not the llama\.cpp that the pin names:(.|\n)*--force"):
        pinned.ensure()
    assert pinned.files() == before
    assert pinned.ensure(force=True) is True
    assert pinned.ensure() is False


def test_an_intact_fill_of_another_pin_is_replaced(pinned: Pinned) -> None:
    pinned.ensure()
    pinned.repin(sha256=write_archive(pinned.archive, TREE | {"src/llama.cpp": "// newer\n"}))
    assert pinned.ensure() is True
    assert (pinned.source / "src/llama.cpp").read_text() == "// newer\n"


def test_an_altered_fill_of_another_pin_is_refused(pinned: Pinned) -> None:
    pinned.ensure()
    (pinned.source / "src/llama.cpp").write_text("// someone's work\n")
    pinned.repin(commit="1" * 40)
    with pytest.raises(fetch.FetchError, match=r"src/llama\.cpp was altered"):
        pinned.ensure()


def test_the_sdists_share_builds_and_is_completed_for_the_peers(pinned: Pinned) -> None:
    pinned.ensure()
    (pinned.source / "common/common.cpp").unlink()
    (pinned.source / "vendor/stb/stb_image.h").unlink()
    assert pinned.ensure() is False
    assert pinned.ensure(peers=True) is True
    assert "common/common.cpp" in pinned.files()


def test_without_network_fetch_says_what_to_do(pinned: Pinned) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SLLM_"))
    }
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = pinned.command()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "could not be fetched" in result.stderr
    assert "--archive" in result.stderr
    assert "SLLM_LLAMA_CPP_SOURCE_DIR" in result.stderr
    assert "Traceback" not in result.stderr
    assert not pinned.source.exists()


def test_a_full_temporary_folder_is_named(
    pinned: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    result = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *command, **options: result)
    folder = tmp_path / "temporary" / "sllm-fetch"
    folder.mkdir(parents=True)
    with pytest.raises(fetch.FetchError, match=r"no space left in .*temporary; .*TMPDIR") as caught:
        fetch.download(pinned.pin, folder)
    assert "PIP_INDEX_URL" in str(caught.value)


def test_the_archive_may_come_from_the_environment(pinned: Pinned) -> None:
    environment = os.environ | {"SLLM_LLAMA_CPP_ARCHIVE": str(pinned.archive)}
    command = pinned.command()
    subprocess.run(command, env=environment, check=True)
    assert "src/llama.cpp" in pinned.files()


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None,
    reason="this is no checkout, or there is no git",
)
def test_nothing_of_llama_cpp_is_committed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "vendor"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # A patch quotes the lines around what it changes, which the MIT licence allows; no file is in it whole.
    ours = {
        name for name in tracked if re.fullmatch(r"vendor/llama\.cpp/patches/\d{4}-[a-z0-9-]+\.patch", name)
    }
    scripts = {f"vendor/llama.cpp/{name}" for name in ("fetch.py", "move_pin.py", "pin.json")}
    assert set(tracked) - ours <= scripts


# --- the installed package ---


def test_the_versions_agree() -> None:
    (declared,) = re.findall(
        '^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )
    assert sllm.__version__ == importlib.metadata.version("sllm") == declared


def test_the_commit_is_the_pinned_one_and_in_the_readmes() -> None:
    assert sllm.llama_cpp_commit == PIN.commit
    for name in ("README.md", "README.zh.md"):
        assert PIN.commit[:9] in (ROOT / name).read_text(encoding="utf-8")


def test_licences_and_types_are_installed() -> None:
    files = {str(path): path for path in importlib.metadata.files("sllm") or ()}
    (prefix,) = {name.partition(".dist-info/")[0] for name in files if ".dist-info/" in name}
    assert "MIT License" in files[f"{prefix}.dist-info/licenses/LICENSE"].read_text()
    assert "The ggml authors" in files[f"{prefix}.dist-info/licenses/llama.cpp/LICENSE"].read_text()
    package = sllm.__file__
    assert package is not None
    assert Path(package).with_name("py.typed").exists()


def test_the_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sllm")
    assert script.value == "sllm.cli.main:main"


@pytest.mark.skipif(
    shutil.which("nm") is None or sys.platform != "linux", reason="nm of an ELF system reads the symbols"
)
def test_only_the_init_function_is_exported() -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", _core.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["PyInit__core"]


IMPORT_PROBE = """
import json, sys
events = []
def hook(name, args):
    if name.startswith(("socket.", "subprocess.", "os.system")):
        events.append(name)
    elif name == "open" and isinstance(args[0], str):
        events.append("open " + args[0])
sys.addaudithook(hook)
import numpy
before = set(sys.modules)
events.clear()
import sllm
print(json.dumps({"modules": sorted(sys.modules), "new": len(set(sys.modules) - before), "events": events}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-W", "error", "-c", IMPORT_PROBE]
    environment = os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
    output = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=True
    ).stdout
    return {"home": str(home), **json.loads(output)}


def test_import_opens_no_socket_and_reads_no_config(imported: dict[str, Any]) -> None:
    assert [event for event in imported["events"] if not event.startswith("open ")] == []
    assert [event for event in imported["events"] if imported["home"] in event] == []


def test_import_leaves_heavy_packages_alone(imported: dict[str, Any]) -> None:
    heavy = {
        "google",
        "grpc",
        "huggingface_hub",
        "jinja2",
        "phonenumbers",
        "requests",
        "ssl",
        "stdnum",
        "torch",
    }
    assert heavy.isdisjoint(module.partition(".")[0] for module in imported["modules"])
    assert imported["new"] < 100  # besides numpy and what that imports


# --- the sdist and the wheel ---


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT], check=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, far from the checkout, without a network and with a git that fails."""
    folder = tmp_path_factory.mktemp("wheel")
    tools = tmp_path_factory.mktemp("tools")
    git = tools / "git"
    git.write_text("#!/bin/sh\nexit 1\n")
    git.chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SLLM_"))
    }
    environment |= {"PIP_NO_INDEX": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(sdist)]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (made,) = folder.iterdir()
    return made


@pytest.mark.packaging
@pytest.mark.timeout(3600)
def test_the_sdist_holds_the_core_of_llama_cpp_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    prefix = "vendor/llama.cpp/source/"
    manifest = json.loads((VENDOR / "source" / fetch.MANIFEST).read_text(encoding="utf-8"))
    shipped = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert shipped == set(manifest["files"]["core"]) | {fetch.MANIFEST}
    assert {"LICENSE", "README.md", "README.zh.md", "csrc/sllm.h", "sllm/py.typed"} <= names
    assert {"tests/build/test_packaging.py", "tests/test_readmes.py"} <= names
    patches = {path.relative_to(ROOT).as_posix() for path in (VENDOR / "patches").glob("*.patch")}
    assert patches == {name for name in names if name.endswith(".patch")}
    assert not [name for name in names if "/.git/" in f"/{name}/" or name.endswith((".so", ".pyc"))]


@pytest.mark.packaging
@pytest.mark.timeout(3600)
def test_the_wheel_is_built_without_network_and_git(wheel: Path) -> None:
    assert re.fullmatch(rf"sllm-{re.escape(sllm.__version__)}-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"sllm-{sllm.__version__}.dist-info"
    assert {"sllm/_core.abi3.so", "sllm/py.typed", "sllm/__init__.py"} <= names
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/llama.cpp/LICENSE"} <= names
    assert {name.partition("/")[0] for name in names} == {"sllm", info}
    embedded = {path.name for path in (ROOT / "sllm/embedded").glob("*.gguf")}
    assert embedded == {Path(name).name for name in names if name.endswith(".gguf")}


@pytest.mark.packaging
@pytest.mark.timeout(3600)
def test_the_wheel_keeps_to_the_stable_abi(wheel: Path) -> None:
    subprocess.run([sys.executable, "-m", "abi3audit", "--strict", wheel], check=True)

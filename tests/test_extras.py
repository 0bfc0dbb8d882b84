"""A part whose packages are missing says which extra brings them."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from sllm import extras
from sllm.extras import needs, package_folders


def test_a_missing_package_names_its_extra() -> None:
    wanted = pytest.raises(ImportError, match=r"no_such_package is missing, .* pip install 'sllm\[remote\]'")
    with wanted as caught, needs("remote"):
        import no_such_package.part  # type: ignore[import-not-found] # noqa: F401
    assert caught.value.name == "no_such_package"


def test_a_missing_part_of_our_own_is_no_matter_of_extras() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_part"), needs("hub"):
        importlib.import_module("sllm.no_such_part")


def test_what_is_installed_passes() -> None:
    with needs("privacy"):
        import json  # noqa: F401


def test_files_of_a_package_are_found_behind_a_program_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, other, site = tmp_path / "program", tmp_path / "other", tmp_path / "site"
    for folder in (program, other / "names", site / "names"):
        folder.mkdir(parents=True)
    for file in (program / "names.py", site / "names" / "__init__.py"):
        file.write_text("raise SystemExit('nothing is imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "gone"), *map(str, (program, other, site))])
    assert list(package_folders("names")) == [other / "names", site / "names"]
    assert list(package_folders("no_such_package")) == []


EXTRAS = {
    "remote": ["grpc", "grpc_health", "google", "cryptography"],
    "privacy": ["ahocorasick_rs", "phonenumbers", "stdnum"],
    "chat": ["prompt_toolkit"],
    "hub": ["huggingface_hub"],
    "engines": ["httpx2"],
    "serve": ["starlette", "uvicorn"],
}
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import sllm
from sllm import embedded
"""
LOCAL = """
with sllm.Model(embedded.TARGET) as target, sllm.Model(embedded.DRAFT) as draft:
    print(len(sllm.generate(target, "Once", draft=draft, max_tokens=5).text()) > 0)
    print(len(target.chat([{"role": "user", "content": "Hi"}])) > 0)
with sllm.LayerRange(embedded.TARGET, 0, 2) as layers:
    print(layers.n_embd > 0)
"""


def without(*extras: str, code: str) -> subprocess.CompletedProcess[str]:
    hidden = [name for extra in extras for name in EXTRAS[extra]]
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(hidden=hidden) + code],
        capture_output=True,
        text=True,
        check=False,
    )


def test_models_on_this_machine_need_no_extra() -> None:
    ended = without(*EXTRAS, code=LOCAL)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["True"] * 3


def test_a_conversation_needs_no_extra() -> None:
    code = """
import io
from sllm.cli.main import main
sys.stdin = io.TextIOWrapper(io.BytesIO(b"Hi\\n"))
sys.exit(main(["chat", "-n", "3", "--threads", "1"]))
"""
    ended = without(*EXTRAS, code=code)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.strip()


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("remote", "sllm.connect('sllm://127.0.0.1:1#insecure')"),
        ("remote", "sllm.Worker(embedded.DRAFT)"),
        ("remote", "sllm.SplitTarget"),
        ("privacy", "sllm.Vault().mask('13800138000')"),
        ("hub", "sllm.Model('hf://nobody/nothing/no.gguf')"),
        ("hub", "sllm.Model('nobody/nothing:Q4_K_M')"),
        ("engines", "sllm.EngineTarget"),
        ("serve", "import sllm.openai_server.server"),
    ],
)
def test_what_lacks_its_extra_says_which(extra: str, code: str) -> None:
    ended = without(extra, code=code)
    last = ended.stderr.rstrip().splitlines()[-1]
    assert last.startswith("ImportError: ") and f"pip install 'sllm[{extra}]'" in last


def test_the_extras_are_those_of_the_package() -> None:
    declared = importlib.metadata.metadata("sllm").get_all("Provides-Extra") or []
    assert {*EXTRAS, "all", "openai", "presidio", "test"} <= set(declared)
    assert set(extras._WHAT) <= set(declared)

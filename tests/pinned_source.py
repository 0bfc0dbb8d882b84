"""An archive of our own with a pin that names it, and ``vendor/llama.cpp/fetch.py`` as a module."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENDOR = ROOT / "vendor/llama.cpp"


def _load_fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sllm_fetch", VENDOR / "fetch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fetch: Any = _load_fetch()
COMMIT = "0" * 40
TREE = {
    "CMakeLists.txt": "set(LLAMA_VERSION_MAJOR 1)\nset(LLAMA_VERSION_MINOR 2)\nset(LLAMA_VERSION_PATCH 3)\n",
    "LICENSE": "MIT\n",
    "ggml/include/ggml-rpc.h": "".join(
        f"#define RPC_PROTO_{part}_VERSION    {number}\n"
        for part, number in (("MAJOR", 4), ("MINOR", 5), ("PATCH", 6))
    ),
    "src/llama.cpp": "// the library\n",
    "vendor/stb/CMakeLists.txt": "# header-only\n",
    "vendor/stb/stb_image.h": "// for the peers\n",
    "common/common.cpp": "// for the peers\n",
    "docs/build.md": "for nobody here\n",
}


def write_archive(path: Path, files: dict[str, str], folder: str = "vendor/llama.cpp") -> str:
    """A source package like the real one; its sha256."""
    root = path.name.removesuffix(".tar.gz")
    contents = {f"{root}/{folder}/{name}": text for name, text in files.items()}
    contents[f"{root}/.git/modules/vendor/llama.cpp/HEAD"] = COMMIT + "\n"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo(f"{root}/{folder}/src/link.cpp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return sha256(path.read_bytes()).hexdigest()


@dataclass
class Pinned:
    """An archive, a pin that names it, and a folder to fill."""

    archive: Path
    pin_file: Path
    source: Path
    pin: Any

    @classmethod
    def make(cls, folder: Path) -> Pinned:
        archive = folder / "llama_cpp_python-0.0.1.tar.gz"
        digest = write_archive(archive, TREE)
        pin = fetch.Pin(COMMIT, "1.2.3", "4.5.6", "llama-cpp-python", "0.0.1", digest)
        made = cls(archive, folder / "pin.json", folder / "vendor" / "source", pin)
        made.repin()
        return made

    def repin(self, **changes: str) -> None:
        self.pin = replace(self.pin, **changes)
        self.pin_file.write_text(json.dumps(asdict(self.pin)), encoding="utf-8")

    def ensure(self, **options: bool) -> bool:
        return bool(fetch.ensure(self.source, self.pin_file, archive=self.archive, **options))

    def command(self) -> list[str | Path]:
        return [sys.executable, VENDOR / "fetch.py", "--pin", self.pin_file, "--source", self.source]

    def files(self) -> set[str]:
        return {path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()}

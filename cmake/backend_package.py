"""Makes a package of its own from one backend of a portable wheel, so that not everybody downloads the
kernels of a GPU.

::

    SLLM_PORTABLE=ON CMAKE_ARGS="-DGGML_CUDA=ON" pip wheel --no-deps .
    python cmake/backend_package.py sllm-0.1.0-cp310-abi3-linux_x86_64.whl cuda --out dist

writes ``dist/sllm_backend_cuda-0.1.0-py3-none-linux_x86_64.whl``, which needs exactly that version of sllm
and brings its module through the entry points ``sllm.backends`` (docs/packaging.md).
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from wheel.wheelfile import WheelFile

__all__ = ["backend_package", "main"]

MODULE = re.compile(r"sllm/lib/(libsllm-ggml-([a-z0-9]+)\.(?:so|dylib|dll))")


def backend_package(wheel: Path, backend: str, out: Path) -> Path:
    """Write the package of a backend.

    Args:
        wheel: a portable wheel of sllm that was built with the backend.
        backend: as in the name of its module, such as ``"cuda"``.
        out: the folder to write to.

    Returns:
        The path of the package's wheel.

    Raises:
        ValueError: the file is no wheel of sllm, or has no such backend in a module of its own.

    """
    try:
        archive = zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{wheel} is no wheel: {error}") from None
    with archive:
        names = archive.namelist()
        info = next(
            (n.partition("/")[0] for n in names if re.match(r"sllm-[^/]+\.dist-info/METADATA", n)), None
        )
        if info is None or not re.fullmatch(r"sllm-[^-]+-[^-]+-[^-]+-[^-]+\.whl", wheel.name):
            raise ValueError(f"{wheel} is no wheel of sllm")
        modules = {match[2]: match for name in names if (match := MODULE.fullmatch(name))}
        if backend not in modules:
            there = ", ".join(sorted(modules)) or "none: it is no portable build (SLLM_PORTABLE=ON)"
            raise ValueError(f"{wheel.name} has no backend {backend!r} of its own; there are: {there}")
        version = Parser().parsestr(archive.read(f"{info}/METADATA").decode())["Version"]
        platforms = wheel.stem.rpartition("-")[2]  # several, with points between them, after auditwheel
        package = f"sllm_backend_{backend}"
        own = f"{package}-{version}.dist-info"
        licences = [n for n in names if n.startswith(f"{info}/licenses/") and not n.endswith("/")]
        files = {
            f"{package}/__init__.py": b"",
            f"{package}/{modules[backend][1]}": archive.read(modules[backend][0]),
            **{n.replace(info, own, 1): archive.read(n) for n in licences},
            f"{own}/METADATA": (
                f"Metadata-Version: 2.4\nName: sllm-backend-{backend}\nVersion: {version}\n"
                f"Summary: The {backend} backend of llama.cpp, for sllm\nLicense-Expression: MIT\n"
                + "".join(f"License-File: {n.partition('/licenses/')[2]}\n" for n in licences)
                + f"Requires-Python: >=3.10\nRequires-Dist: sllm=={version}\n"
            ).encode(),
            f"{own}/WHEEL": (
                f"Wheel-Version: 1.0\nGenerator: sllm {version}\nRoot-Is-Purelib: false\n"
                + "".join(f"Tag: py3-none-{platform}\n" for platform in platforms.split("."))
            ).encode(),
            f"{own}/entry_points.txt": f"[sllm.backends]\n{backend} = {package}\n".encode(),
        }
    out.mkdir(parents=True, exist_ok=True)
    made = out / f"{package}-{version}-py3-none-{platforms}.whl"
    with WheelFile(made, "w") as target:
        for name, data in files.items():
            target.writestr(name, data)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description="Make a package of one backend of a portable wheel.")
    parser.add_argument("wheel", type=Path, help="a portable wheel of sllm")
    parser.add_argument("backend", help="such as cuda or vulkan")
    parser.add_argument(
        "--out", type=Path, default=Path("dist"), help="the folder to write to (default: dist)"
    )
    options = parser.parse_args(arguments)
    try:
        print(backend_package(options.wheel, options.backend, options.out))
    except ValueError as error:
        print(f"backend_package: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

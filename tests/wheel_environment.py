"""A wheel in an environment of its own, beside the packages of this one."""

from __future__ import annotations

import sysconfig
import venv
import zipfile
from pathlib import Path

__all__ = ["unpack"]


def unpack(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Lay an environment out in ``folder``; its interpreter, and its folder of packages, which come first."""
    venv.create(folder, symlinks=True, clear=True)
    site = next((folder / "lib").iterdir()) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin/python", site

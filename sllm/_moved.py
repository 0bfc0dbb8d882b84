"""Modules under the names that the README once gave them."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["install"]

STAYS = {"sllm.hub": "sllm.engine.hub"}
"""Public under this name for good."""

MOVED = {
    "sllm.calibration": "sllm.triage.calibration",
    "sllm.exact": "sllm.engine.exact",
    "sllm.openai_cloud": "sllm.triage.openai_cloud",
}


class _OldNames(MetaPathFinder, Loader):
    """Finds a module by its old name: it is the new one."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in STAYS or fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = STAYS.get(module.__name__) or MOVED[module.__name__]
        if module.__name__ in MOVED:
            warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        # What stands here afterwards is what an import gives (importlib._bootstrap._load_unlocked).
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Make the old names importable; done once, when :mod:`sllm` is imported."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())

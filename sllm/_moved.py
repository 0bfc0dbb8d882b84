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
    """Finds a module by its old name: an empty one that looks everything up in the new one."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in STAYS or fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = STAYS.get(module.__name__) or MOVED[module.__name__]
        if module.__name__ in MOVED:
            warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(new)
        module.__doc__ = found.__doc__
        vars(module)["__getattr__"] = lambda name: getattr(found, name)
        vars(module)["__dir__"] = lambda: dir(found)


def install() -> None:
    """Make the old names importable; done once, when :mod:`sllm` is imported."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())

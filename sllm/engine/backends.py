"""The modules of a portable build: the CPU's kernels, and other backends that were compiled or installed.

Builds with a single set of kernels have everything linked into the extension, and nothing is loaded here.

A package of its own can bring a backend: it has a folder with one module or several, compiled by this very
version of sllm (docs/packaging.md), and an entry point of the group ``sllm.backends``. What was made for
another version is refused by the dynamic linker, since it asks for libraries of another name.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine import cpu
from sllm.engine._cuda import missing_library
from sllm.engine._ffi import check, ffi, lib
from sllm.errors import BackendError, ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Module", "load"]

log = logging.getLogger("sllm")


@dataclass(frozen=True)
class Module:
    """A backend's module.

    Attributes:
        name: of the backend: ``"cpu-haswell"``, ``"rpc"``, ``"cuda"``.
        path: the file.
        origin: ``"sllm"``, or the entry point of the package that brought it.
        error: why it could not be loaded, or None.

    """

    name: str
    path: Path
    origin: str
    error: str | None = None


_lock = threading.Lock()
_loaded: tuple[Module, ...] | None = None


def load() -> tuple[Module, ...]:
    """Load the modules, at the first call, and tell which there are; none in builds that need none.

    A backend that cannot be loaded is left out, with a warning in the log: a machine without its driver
    computes on the CPU.

    Raises:
        BackendError: the CPU's kernels cannot be loaded; says what the dynamic linker said.
        UnsupportedCPUError: there are none for this CPU.

    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load_all() if cpu.build().kind == "portable" else ()
        return _loaded


def _load_all() -> tuple[Module, ...]:
    modules = []
    for origin, folder in cpu.module_folders():
        for path in sorted(folder.glob(f"{cpu.PREFIX}*.so")):
            name = path.name.removeprefix(cpu.PREFIX).removesuffix(".so")
            # ggml's two libraries have the build's tag in place of a suffix
            if not name.startswith("cpu-") and not name.endswith(cpu.build().tag):
                modules.append(_loaded_or_not(Module(name, path, origin)))
    variant = cpu.choose().variant
    assert variant.path is not None
    # ggml's order: the CPU comes last, and takes what nobody else wants.
    kernels = _loaded_or_not(Module(f"cpu-{variant.name}", variant.path, "sllm"), needed=True)
    return (*modules, kernels)


def _loaded_or_not(module: Module, *, needed: bool = False) -> Module:
    try:
        check(lib.sllm_backend_load(ffi.new("char[]", os.fsencode(module.path))), str(module.path))
    except ModelLoadError as error:
        if needed:
            raise BackendError(f"the CPU's kernels cannot be loaded: {error}") from None
        why = missing_library(str(error)) or str(error)
        log.warning("the backend %s of %s is left out: %s", module.name, module.origin, why)
        return Module(module.name, module.path, module.origin, why)
    return module

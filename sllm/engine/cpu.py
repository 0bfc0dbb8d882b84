"""Which kernels of this build can run here: the CPU's features against what the kernels were compiled for.

A build has either one set of kernels, linked into the extension, or (``SLLM_PORTABLE=ON``) a *variant* for
each generation of CPUs, each a module of its own. Everything here works without ``sllm._core``, whose mere
loading could end the process where the CPU lacks an instruction: ``sllm._cpu`` is compiled for the oldest CPU
of the architecture and only asks and compares.

Features are spelled as in Linux's ``/proc/cpuinfo``: ``"avx2"``, ``"avx512_vnni"``, ``"asimddp"``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.errors import UnsupportedCPUError

try:
    from sllm._cpu import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "sllm._cpu":
        raise
    _here = Path(__file__).resolve().parents[1]
    if (_here.parent / "csrc").is_dir() and (_here.parent / "pyproject.toml").is_file():
        _why = (
            f"{_here} is sllm's source tree, which has no compiled part. Install it (pip install .) and start"
            " Python in another folder, or make an editable install (see CONTRIBUTING.md)"
        )
    else:
        _why = (
            f"the compiled part of sllm is missing in {_here}: the installation is incomplete or for another"
            f" interpreter than {sys.executable}. Install it again"
        )
    raise ImportError(_why, name="sllm._cpu") from None

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "VARIABLE",
    "Build",
    "Choice",
    "Variant",
    "available_cores",
    "brand",
    "build",
    "choose",
    "features",
    "module_folders",
]

VARIABLE = "SLLM_CPU_VARIANT"
"""The environment variable that names the variant to use in place of the best one."""

GROUP = "sllm.backends"
"""The entry points of packages that bring modules."""

PREFIX = "libsllm-ggml-"
"""How the file names of modules begin: ``libsllm-ggml-cpu-haswell.so``, ``libsllm-ggml-cuda.so``."""


@dataclass(frozen=True)
class Variant:
    """One set of CPU kernels.

    Attributes:
        name: such as ``"haswell"``; the kind of the build where that has a single set.
        needs: the CPU features that it uses.
        path: its module; None: linked into the extension, or not installed.

    """

    name: str
    needs: tuple[str, ...]
    path: Path | None = None


@dataclass(frozen=True)
class Build:
    """What was compiled.

    Attributes:
        kind: ``"native"`` (for the CPU of the machine that built it), ``"portable"`` (several variants),
            ``"generic"`` (one set, for the CPU that the build's options named) or ``"system"`` (the machine's
            own llama.cpp, of whose kernels nothing is known here).
        compiler: name and version of the C++ compiler.
        amx: whether kernels that use AMX were compiled.
        tag: what names of the build's shared libraries hold, so that nothing of another build is loaded with
            them; "" where there are none.
        variants: best first, also those that are not installed.

    """

    kind: str
    compiler: str
    amx: bool
    tag: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Choice:
    """The kernels to use here.

    Attributes:
        variant: which.
        reason: why, as a sentence's end: "the best of 13 that this CPU can run".
        passed_over: better ones, each with the features that are missing here.

    """

    variant: Variant
    reason: str
    passed_over: tuple[tuple[Variant, tuple[str, ...]], ...]


def _text(value: object) -> str:
    return str(ffi.string(value).decode("utf-8", "replace"))


@cache
def features() -> tuple[str, ...]:
    """The features of this CPU that the operating system lets programs use, sorted; none on architectures
    other than x86-64 and ARM.
    """
    return tuple(sorted(_text(lib.sllm_cpu_features()).split()))


@cache
def brand() -> str:
    """What the CPU calls itself; "" where it does not say."""
    return _text(lib.sllm_cpu_brand())


def _own_folder() -> Path:
    """Where a portable build keeps its libraries: beside the extension, which in an editable install is not
    where the Python files are.
    """
    return Path(sys.modules["sllm._cpu"].__file__ or "").parent / "lib"


@cache
def build() -> Build:
    """What was compiled; ``Variant.path`` is where a portable build itself has put a variant, if it is still
    there.
    """
    kind = _text(lib.sllm_build_kind())
    variants = []
    for entry in _text(lib.sllm_build_variants()).split(","):
        name, colon, needs = entry.partition(":")
        if colon:
            path = _own_folder() / f"{PREFIX}cpu-{name}.so"
            variants.append(Variant(name, tuple(needs.split()), path if path.exists() else None))
    if not variants:
        variants.append(Variant(kind, tuple(_text(lib.sllm_build_needs()).split())))
    # A variant that needs more has been made for a newer CPU, and runs faster on it.
    variants.sort(key=lambda variant: len(variant.needs), reverse=True)
    return Build(
        kind,
        _text(lib.sllm_build_compiler()),
        bool(lib.sllm_build_amx()),
        _text(lib.sllm_build_tag()),
        tuple(variants),
    )


def _package_folders() -> list[tuple[str, Path]]:
    """The folders of installed packages that bring modules, with the names of their entry points."""
    from importlib.metadata import entry_points  # takes long to load, and is not needed for most imports

    found = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        target = entry.load()
        file = getattr(target, "__file__", None)
        found.append((entry.name, Path(target) if file is None else Path(file).parent))
    return found


def module_folders() -> list[tuple[str, Path]]:
    """Where modules of this build may lie, each folder with what it belongs to: ``"sllm"``, or the name of an
    entry point of the group ``sllm.backends``, whose value is a package or the path of a folder. Only a
    portable build has such folders.
    """
    if build().kind != "portable":
        return []
    return [("sllm", _own_folder()), *_package_folders()]


def _missing(needs: Iterable[str]) -> tuple[str, ...]:
    have = features()
    # Nothing is known of other architectures' features, and to guess would be to refuse what may run.
    return tuple(feature for feature in needs if feature not in have) if have else ()


def _installed(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """The variants whose modules are here; packages are looked at where this one has none itself."""
    own = tuple(variant for variant in variants if variant.path is not None)
    if own:
        return own
    found = []
    folders = _package_folders()
    for variant in variants:
        for _, folder in folders:
            path = folder / f"{PREFIX}cpu-{variant.name}.so"
            if path.exists():
                found.append(Variant(variant.name, variant.needs, path))
                break
    return tuple(found)


def _described(built: Build) -> str:
    return f"this build of sllm ({built.kind}, compiled by {built.compiler})"


_ADVICE = (
    "install it again on this machine (pip install --force-reinstall --no-cache-dir .), or make one build for"
    " all machines (CMAKE_ARGS=-DSLLM_PORTABLE=ON pip install .)"
)


def choose() -> Choice:
    """The kernels to use here: the best ones that the CPU can run, or those that ``$SLLM_CPU_VARIANT`` names.

    Raises:
        UnsupportedCPUError: this CPU can run none of them, or not those that are named.

    """
    built = build()
    cpu = brand() or sys.platform
    available = _installed(built.variants) if built.kind == "portable" else built.variants
    if not available:
        raise UnsupportedCPUError(
            f"{_described(built)} has no kernels: no {PREFIX}cpu-*.so in {_own_folder()} or in a package with"
            f" an entry point of the group {GROUP}; install it again"
        )
    names = ", ".join(variant.name for variant in available)
    wanted = os.environ.get(VARIABLE)
    passed_over: list[tuple[Variant, tuple[str, ...]]] = []
    for variant in available:
        if wanted and variant.name != wanted:
            continue
        missing = _missing(variant.needs)
        if not missing:
            reason = (
                f"${VARIABLE} says so"
                if wanted
                else f"the best of {len(available)} that this CPU can run"
                if built.kind == "portable"
                else "the only kernels of this build"
            )
            return Choice(variant, reason, tuple(passed_over))
        passed_over.append((variant, missing))
    if not passed_over:
        raise UnsupportedCPUError(f"${VARIABLE} is {wanted!r}, and {_described(built)} has {names}")
    last, missing = passed_over[-1]
    which = f"the variant {last.name!r} of {_described(built)}" if wanted else _described(built)
    raise UnsupportedCPUError(
        f"{which} uses instructions that this CPU ({cpu}) does not have: {', '.join(missing)}; "
        + (f"unset ${VARIABLE}" if wanted and len(built.variants) > 1 else _ADVICE)
    )


def available_cores() -> int:
    """The processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1

"""The sandbox of the process that serves ggml's RPC, which limits a client that takes it over.

On Linux: no capabilities and no new privileges, no files but those of the system's libraries and GPU drivers
(Landlock), no programs, processes, sockets, signals to others or looks into their memory (seccomp), and where
no GPU is served no files at all once the server runs. Other systems have no equivalent that a library can
rely on: there the process can do what the user can, and says so.
"""

from __future__ import annotations

import glob
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sllm.engine import cpu
from sllm.engine._ffi import check, ffi, lib

__all__ = ["Confinement", "calls", "environment", "files"]

_VARIABLES = ("HOME", "LANG", "PATH", "TMPDIR", "TZ")
_PREFIXES = (
    *("LC_", "LD_", "DYLD_", "PYTHON", "MALLOC_", "ASAN_", "LSAN_", "UBSAN_"),
    *("GGML_", "OMP_", "GOMP_", "KMP_", "CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "MTL_", "VK_"),
    *("ONEAPI_", "SYCL_", "ZE_"),
)

_LIBRARIES = (
    *("/lib*", "/usr/lib*", "/usr/share/vulkan", "/usr/local/lib*", "/usr/local/cuda*", "/usr/local/nvidia*"),
    *("/opt/cuda*", "/opt/rocm*", "/opt/intel", "/opt/nvidia", "/opt/amdgpu", "/nix/store", "/gnu/store"),
    *("/run/nvidia*", "/run/opengl-driver", "/etc/ld.so.*", "/etc/OpenCL", "/etc/vulkan", "/etc/nvidia*"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system"),
)

_DRIVERS = ("/proc/devices", "/proc/modules", "/proc/driver", "/proc/sys", "/sys")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_GPUS = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/accel")


@dataclass(frozen=True)
class Confinement:
    """The restrictions of a process that serves RPC.

    Attributes:
        landlock: the version of Landlock that limits which files it can open; 0: none.
        seccomp: whether it is kept from starting programs or processes, from reaching others, and from
            opening sockets.
        opens_files: whether it can open files at all, as GPU drivers have to.

    """

    landlock: int
    seccomp: bool
    opens_files: bool

    @property
    def complete(self) -> bool:
        """Whether it can neither read this user's files nor reach other processes."""
        return self.seccomp and (self.landlock > 0 or not self.opens_files)

    def __str__(self) -> str:
        walls = [f"Landlock {self.landlock}"] * (self.landlock > 0) + ["seccomp"] * self.seccomp
        if self.complete:
            return f"confined by {' and '.join(walls)}"
        found = f"{walls[0]} alone" if walls else "neither Landlock nor seccomp"
        return (
            f"not confined, since there is {found}: a client that gets the better of it can do what this user"
            " can"
        )


def environment() -> dict[str, str]:
    """The variables that computing needs, of all that this process has: secrets are often among the others,
    such as the address of a worker with its token.
    """
    kept = {
        name: value for name, value in os.environ.items() if name in _VARIABLES or name.startswith(_PREFIXES)
    }
    # numpy's library would start threads, which Landlock would not bind.
    return {**kept, "OPENBLAS_NUM_THREADS": "1"}


def files() -> int:
    """Give up all files but libraries and devices, and be the first to go where memory runs out; the version
    of Landlock that sees to the files, or 0. Before there is a second thread.
    """
    with suppress(ValueError, OSError):  # a core file would hold the weights and texts of clients
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    readable, writable = _paths()
    held = ffi.new("int32_t *")
    kept = [[ffi.new("char[]", os.fsencode(path)) for path in paths] for paths in (readable, writable)]
    check(
        lib.sllm_confine_files(
            ffi.new("char *[]", kept[0]), len(kept[0]), ffi.new("char *[]", kept[1]), len(kept[1]), held
        )
    )
    return int(held[0])


def calls(*, opens_files: bool) -> bool:
    """Give up programs, processes, sockets, signals to others, and files unless ``opens_files``; whether the
    system could do that. For all threads.
    """
    held = ffi.new("int32_t *")
    check(lib.sllm_confine_calls(opens_files, held))
    return bool(held[0])


def _paths() -> tuple[list[str], list[str]]:
    """What may be read, and what may be written as well."""
    gpus = _found(_GPUS)
    readable = _found(_LIBRARIES + (_DRIVERS if gpus else ()))
    readable += [str(folder) for _, folder in cpu.module_folders()]
    # CUDA may come as packages beside this one, or in the environment's own lib/.
    readable += _found([f"{glob.escape(part)}/nvidia" for part in sys.path if os.path.isabs(part)])  # noqa: PTH117
    readable += _found([f"{glob.escape(prefix)}/lib/*.so*" for prefix in {sys.prefix, sys.base_prefix}])
    readable += [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p.startswith("/")]
    return readable, [*_DEVICES, *gpus, *(["/dev/shm"] if gpus else [])]


def _found(patterns: list[str] | tuple[str, ...]) -> list[str]:
    return [path for pattern in patterns for path in glob.glob(pattern)]  # noqa: PTH207 - absolute patterns

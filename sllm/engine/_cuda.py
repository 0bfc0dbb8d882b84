"""What a build with CUDA lacks on the machine that it runs on, in words. Nothing here needs the compiled
core: it may be the core that cannot be loaded.
"""

from __future__ import annotations

import re

__all__ = ["missing_device", "missing_library"]

_LIBRARY = re.compile(r"\blib(cuda|cudart|cublas|cublasLt|nvrtc|nccl)\.so(?:\.(\d+))?")

_NO_DEVICE = re.compile(r"ggml_cuda_init: failed to initialize (\w+): (.+)")

# What CUDA's own words for it mean.
_REASONS = {
    "CUDA driver version is insufficient for CUDA runtime version": (
        "there is no NVIDIA driver, or it is older than the CUDA that sllm was built with"
    ),
    "no CUDA-capable device is detected": "the driver sees no GPU, or CUDA_VISIBLE_DEVICES hides it",
}


def missing_library(error: str) -> str | None:
    """What to do about the loader's ``error``; None: it is not about a library of CUDA."""
    found = _LIBRARY.search(error)
    if found is None:
        return None
    library, version = found[0], found[2]
    if found[1] == "cuda":
        return (
            f"sllm was built with CUDA, and the NVIDIA driver's {library} is missing here ({error}). Install"
            " the driver; or build sllm so that it needs one only to use a GPU:"
            " pip install . -C cmake.define.GGML_CUDA=ON -C cmake.define.GGML_CUDA_NO_VMM=ON"
        )
    of = f" of CUDA {version}" if version and found[1] != "nccl" else ""
    return (
        f"sllm was built with CUDA, and {library} is not found ({error}). Install the libraries{of} and name"
        " their folder in LD_LIBRARY_PATH; or build sllm again on this machine, with or without CUDA"
    )


def missing_device(line: str) -> tuple[str, str] | None:
    """The backend (CUDA, ROCm) that ``line`` of llama.cpp's log says has no device here, and why; None: it
    says nothing of the kind.
    """
    found = _NO_DEVICE.search(line)
    if found is None:
        return None
    why = found[2].strip()
    return found[1], f"{_REASONS[why]} ({why})" if why in _REASONS else why

"""Hybrid inference over llama.cpp: a language model that runs partly on this machine and partly on a bigger
one behind a slow link.

Text from a big model, made faster by a small one and exactly the big one's own::

    import sllm

    with sllm.Model("big.gguf") as big, sllm.Model("small.gguf") as small:
        for run in sllm.generate(big, "Once upon a time", draft=small, max_tokens=256):
            print(run.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

try:
    from sllm.engine._ffi import ffi as _ffi
    from sllm.engine._ffi import lib as _lib
except ImportError as _error:
    if _error.name != "sllm._cpu":  # without that there is nothing to tell
        from sllm.cli.doctor import tell_instead

        tell_instead(_error)
    raise
from sllm import _moved
from sllm import embedded as embedded  # sllm.embedded.TARGET, sllm.embedded.DRAFT
from sllm.errors import (
    AuthError,
    BackendError,
    BusyError,
    CancelledError,
    ClosedError,
    ContextFullError,
    InferenceError,
    LeakError,
    ModelLoadError,
    RemoteError,
    RPCError,
    SllmError,
    UndecidedError,
    UnsupportedCPUError,
    UnsupportedModelError,
    VocabMismatchError,
)

if TYPE_CHECKING:
    from sllm import rpc
    from sllm.engine import hub
    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft, Verdict
    from sllm.engine.layers import LayerRange, export_layers
    from sllm.engine.model import Model
    from sllm.engine.params import ContextParams
    from sllm.engine.sampling import SamplingParams
    from sllm.engine.vocab import Vocab
    from sllm.generation.generate import generate
    from sllm.generation.local import LocalTarget
    from sllm.generation.text_stream import Run
    from sllm.http_engine.target import EngineTarget
    from sllm.planning.plan import plan
    from sllm.privacy import Vault
    from sllm.remote.connection import connect
    from sllm.remote.target import RemoteTarget
    from sllm.split.target import SplitTarget
    from sllm.targets.base import Target
    from sllm.triage import Grade, Tier, Triage
    from sllm.triage.hybrid import Hybrid
    from sllm.worker.passes import Limits
    from sllm.worker.server import Worker

__all__ = [
    "AuthError",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "Context",
    "ContextFullError",
    "ContextParams",
    "Draft",
    "EngineTarget",
    "Grade",
    "Hybrid",
    "InferenceError",
    "LayerRange",
    "LeakError",
    "Limits",
    "LocalTarget",
    "Model",
    "ModelLoadError",
    "RPCError",
    "RemoteError",
    "RemoteTarget",
    "Run",
    "SamplingParams",
    "SllmError",
    "SplitTarget",
    "Target",
    "Tier",
    "Triage",
    "UndecidedError",
    "UnsupportedCPUError",
    "UnsupportedModelError",
    "Vault",
    "Verdict",
    "Vocab",
    "VocabMismatchError",
    "Worker",
    "connect",
    "export_layers",
    "generate",
    "hub",
    "plan",
    "rpc",
]

__version__: str = _ffi.string(_lib.sllm_version()).decode()
llama_cpp_commit: str = _ffi.string(_lib.sllm_llama_cpp_commit()).decode()

logging.getLogger("sllm").addHandler(logging.NullHandler())
_moved.install()

# Imported when first used: `import sllm` checks that the core runs on this CPU and loads it, and takes no
# time for what a program does not need.
_LAZY = {
    "Context": "sllm.engine.context",
    "ContextParams": "sllm.engine.params",
    "Draft": "sllm.engine.context",
    "EngineTarget": "sllm.http_engine.target",
    "Grade": "sllm.triage",
    "Hybrid": "sllm.triage.hybrid",
    "LayerRange": "sllm.engine.layers",
    "Limits": "sllm.worker.passes",
    "LocalTarget": "sllm.generation.local",
    "Model": "sllm.engine.model",
    "RemoteTarget": "sllm.remote.target",
    "Run": "sllm.generation.text_stream",
    "SamplingParams": "sllm.engine.sampling",
    "SplitTarget": "sllm.split.target",
    "Target": "sllm.targets.base",
    "Tier": "sllm.triage",
    "Triage": "sllm.triage",
    "Vault": "sllm.privacy",
    "Verdict": "sllm.engine.context",
    "Vocab": "sllm.engine.vocab",
    "Worker": "sllm.worker.server",
    "connect": "sllm.remote.connection",
    "export_layers": "sllm.engine.layers",
    "generate": "sllm.generation.generate",
    "plan": "sllm.planning.plan",
}
_LAZY_MODULES = {"hub": "sllm.engine.hub", "rpc": "sllm.rpc"}


if not TYPE_CHECKING:  # for type checkers a name that is not above is a mistake

    def __getattr__(name: str) -> Any:
        if name in _LAZY_MODULES:
            value: Any = importlib.import_module(_LAZY_MODULES[name])
        elif name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})

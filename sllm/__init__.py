"""Hybrid inference over llama.cpp: a language model partly here and partly on a bigger machine behind a slow
link.

Text from a big model, sped up by a small one, exactly the big one's own::

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
from sllm.engine import hub
from sllm.engine.context import Context, Draft, Verdict
from sllm.engine.layers import LayerRange, export_layers
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.engine.vocab import Vocab
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
    UnsupportedCPUError,
    UnsupportedModelError,
    VocabMismatchError,
)
from sllm.generation.generate import generate
from sllm.generation.local import LocalTarget
from sllm.generation.text_stream import Run
from sllm.targets.base import Target

if TYPE_CHECKING:
    from sllm.privacy.vault import Vault
    from sllm.remote.connection import connect
    from sllm.remote.target import RemoteTarget
    from sllm.rpc import server as rpc
    from sllm.split.target import SplitTarget
    from sllm.triage.hybrid import Hybrid
    from sllm.triage.triage import Grade, Tier, Triage
    from sllm.worker.server import Worker

__all__ = [
    "AuthError",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "Context",
    "ContextFullError",
    "Draft",
    "Grade",
    "Hybrid",
    "InferenceError",
    "LayerRange",
    "LeakError",
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
    "rpc",
]

__version__: str = _ffi.string(_lib.sllm_version()).decode()
llama_cpp_commit: str = _ffi.string(_lib.sllm_llama_cpp_commit()).decode()

logging.getLogger("sllm").addHandler(logging.NullHandler())
_moved.install()

# What needs protobuf and grpc, or is not in every program's way, is imported when it is first used.
_LAZY = {
    "Grade": "sllm.triage",
    "Hybrid": "sllm.triage.hybrid",
    "RemoteTarget": "sllm.remote.target",
    "SplitTarget": "sllm.split.target",
    "Tier": "sllm.triage",
    "Triage": "sllm.triage",
    "Vault": "sllm.privacy.vault",
    "Worker": "sllm.worker.server",
    "connect": "sllm.remote.connection",
    "rpc": "sllm.rpc",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = globals()[name] = module if module.__name__ == f"sllm.{name}" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

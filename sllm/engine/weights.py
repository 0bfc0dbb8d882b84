"""The weights that llama.cpp has loaded: what a context computes with, wherever they came from."""

from __future__ import annotations

import weakref
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sllm.engine import backends
from sllm.engine._ffi import Handle, check, checked_int, ffi, lib, read_text, take_log
from sllm.engine.devices import device_indices, may_offload, use_servers
from sllm.engine.grammar import Grammars
from sllm.engine.kept import Kept
from sllm.engine.sampling import SamplingParams, compile_sampling, kept_bytes
from sllm.engine.vocab import Vocab

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sllm.engine.params import LoadParams

__all__ = ["ROLLBACK", "Weights", "c_params"]


_MAX_SAMPLINGS = 64
_MAX_SAMPLING_BYTES = 16 << 20
"""What is kept of compiled parameters that nobody uses at the moment."""

_MAX_ASKED = 1024
"""Parameters that are found by their identity."""

# What taking tokens back costs, by enum sllm_rollback.
ROLLBACK = {
    lib.SLLM_ROLLBACK_ANY: "free",
    lib.SLLM_ROLLBACK_SNAPSHOTS: "snapshots",
    lib.SLLM_ROLLBACK_CHECKPOINTS: "recompute",
}

_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}


def c_params(given: LoadParams, progress: Callable[[float], object] | None) -> tuple[Any, list[Any]]:
    """``struct sllm_model_params *`` with ``progress`` in place of that of ``given``, and what must live as
    long.

    Raises:
        TypeError, ValueError: a parameter of another type or out of range, or no such device.
        RPCError: an RPC server is not there.

    """
    if given.split_mode not in _SPLIT_MODES:
        raise ValueError(f"split_mode is {given.split_mode!r}, expected one of {', '.join(_SPLIT_MODES)}")
    backends.load()
    keep: list[Any] = [ffi.new_handle(progress)]
    params = ffi.new("struct sllm_model_params *")
    params.n_gpu_layers = (
        -1 if given.n_gpu_layers is None else checked_int(given.n_gpu_layers, "n_gpu_layers")
    )
    params.split_mode = _SPLIT_MODES[given.split_mode]
    if given.devices is not None:
        chosen = device_indices(given.devices)
        keep.append(ffi.new("int32_t[]", chosen))
        params.devices, params.n_devices = keep[-1], len(chosen)
    if given.tensor_split is not None:
        keep.append(ffi.new("float[]", [float(part) for part in given.tensor_split]))
        params.tensor_split, params.n_tensor_split = keep[-1], len(keep[-1])
    params.use_mlock = given.use_mlock
    params.check_tensors = given.check_tensors
    params.load_mtp = given.load_mtp
    params.progress = lib.sllm_py_progress
    params.progress_user_data = keep[0]
    return params, keep


class Weights(Handle):
    """A loaded ``llama_model``: its hyperparameters, vocabulary and metadata. Closing it closes its contexts.

    :class:`~sllm.Model` has these of a whole file, :class:`~sllm.LayerRange` those of some layers.

    Attributes: see :class:`~sllm.Model`.

    """

    path: Path

    def __init__(self, params: Any, given: LoadParams, about: str, *, expected: str | None = None) -> None:
        """Load by ``params``, which :func:`c_params` made of ``given``; lines of llama.cpp's log that have
        the words ``expected`` are left out.
        """
        out = ffi.new("sllm_model **")
        take_log()
        try:
            check(lib.sllm_model_load(params, out), about)
        finally:
            take_log(expected=expected)
        pointer = out[0]
        super().__init__(pointer, lib.sllm_model_free)
        self.offloaded = given.n_gpu_layers != 0 and may_offload(given.devices)
        use_servers(self, given.devices)
        info = ffi.new("struct sllm_model_info *")
        lib.sllm_model_get_info(pointer, info)
        self.n_layer: int = info.n_layer
        self.n_embd: int = info.n_embd
        self.n_head: int = info.n_head
        self.n_head_kv: int = info.n_head_kv
        self.n_ctx_train: int = max(info.n_ctx_train, 0)
        self.n_params: int = info.n_params
        self.size_bytes: int = info.size_bytes
        self.n_mtp: int = info.n_mtp
        self.can_rollback: str = ROLLBACK[info.rollback]
        self.vocab = Vocab(self, info, self.path.name, self._find_turn_ends)
        self._metadata: Mapping[str, str] | None = None
        self.grammars = Grammars(self.vocab)
        self._samplings: Kept[SamplingParams, Any] = Kept(_MAX_SAMPLINGS, _MAX_SAMPLING_BYTES)
        self._last_sampling: tuple[SamplingParams | None, Any] = (None, None)
        self._asked: dict[int, tuple[weakref.ref[SamplingParams], weakref.ref[Any]]] = {}  # by id()
        self._contexts: weakref.WeakSet[Handle] = weakref.WeakSet()

    def _find_turn_ends(self) -> tuple[int, ...]:
        """See :attr:`sllm.engine.vocab.Vocab.turn_ends`; layers have no chat template."""
        return ()

    @property
    def state_bytes(self) -> int:
        """The recurrent state of one sequence, where it is known before there is a context."""
        return 0

    @property
    def metadata(self) -> Mapping[str, str]:
        """The scalar GGUF metadata, read-only, all values as text."""
        pointer = self._live
        if self._metadata is None:
            pairs = {}
            for index in range(lib.sllm_model_meta_count(pointer)):
                key = read_text(partial(lib.sllm_model_meta_key, pointer, index))
                value = read_text(partial(lib.sllm_model_meta_value, pointer, index))
                pairs[key or ""] = value or ""
            self._metadata = MappingProxyType(pairs)
        return self._metadata

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as ``"llama"`` or ``"qwen3"``."""
        return self.metadata.get("general.architecture", "")

    @property
    def description(self) -> str:
        """Architecture, size class and quantisation in llama.cpp's words (``llama_model_desc``)."""
        return read_text(lambda text, size: lib.sllm_model_desc(self._live, text, size)) or ""

    def compiled(self, params: SamplingParams) -> Any:
        """``params`` for this vocabulary, as an owning ``sllm_sampling *``. For the next call those that
        somebody has are kept, and of the others the newest 64, or the newest of 16 MiB.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling is {params!r}, expected SamplingParams")
        if params is self._last_sampling[0]:  # hashing takes longer than all the rest of a call
            return self._last_sampling[1]
        known = self._asked.get(id(params))
        if known is not None and known[0]() is params and (compiled := known[1]()) is not None:
            return compiled
        found = self._samplings.get(params)
        if found is None:
            found = compile_sampling(self._live, params, self.grammars)
            self._samplings.put(params, found, kept_bytes(params))
        self._last_sampling = (params, found)
        if len(self._asked) >= _MAX_ASKED:
            self._asked.clear()
        self._asked[id(params)] = weakref.ref(params), weakref.ref(found)
        return found

    def close(self) -> None:
        """Free the weights, after closing every context made from them. More calls do nothing."""
        if self._pointer is not None:
            for context in list(self._contexts):
                context.close()
            self._samplings.clear()
            self._asked.clear()
            self.grammars.clear()
            self._last_sampling = (None, None)
        super().close()

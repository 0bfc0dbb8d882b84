"""How models are loaded and how contexts compute: the single list of these parameters.

Everything that makes a model or a context (:class:`~sllm.Model`, :meth:`Model.context`,
:class:`~sllm.LayerRange`, :class:`~sllm.LocalTarget`, :class:`~sllm.Worker`) takes them as keyword arguments
and passes them on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from sllm.engine._ffi import checked_int, ffi
from sllm.engine.cpu import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sllm.engine.devices import Device

__all__ = [
    "ContextOptions",
    "ContextParams",
    "LoadOptions",
    "LoadParams",
    "changes",
    "context_length",
    "parse",
    "parse_both",
]

# Threads wait for each other at every operation of a graph: measured on two cores, a second one brings
# nothing to 0.8 MB of weights, and a quarter to 5.8 MB.
_BYTES_PER_THREAD = 2_500_000

_P = TypeVar("_P")


def context_length(n_ctx_train: int) -> int:
    """Default number of positions of one text: what the model was trained for, at most 4096."""
    return min(n_ctx_train or 4096, 4096)


@dataclass(frozen=True)
class LoadParams:
    """How a model is loaded (``llama_model_params``).

    Attributes:
        n_gpu_layers: number of layers on GPUs; None: all, if there is a GPU.
        devices: the devices to use, from :func:`sllm.engine.devices.devices` or :func:`sllm.rpc.add_server`,
            or their names; None: all of this machine. With RPC servers, whose loss aborts the process, use
            :class:`~sllm.LocalTarget`.
        tensor_split: share of the model for each device.
        split_mode: ``"none"``, ``"layer"`` or ``"row"``.
        use_mmap: map the file instead of reading it.
        use_mlock: keep the weights from being swapped out.
        check_tensors: check the weights for NaN and infinities; slow.
        progress: called with 0.0 .. 1.0 while loading. An exception in it stops the load and is passed on.
        vocab_only: load only the vocabulary and the metadata, no weights; such a model has no contexts.
        load_mtp: also load the heads for multi-token prediction, if the file has them
            (:class:`sllm.engine.mtp.Heads`): one more layer for each.

    """

    n_gpu_layers: int | None = None
    devices: Sequence[Device | str] | None = None
    tensor_split: Sequence[float] | None = None
    split_mode: str = "layer"
    use_mmap: bool = True
    use_mlock: bool = False
    check_tensors: bool = False
    progress: Callable[[float], Any] | None = None
    vocab_only: bool = False
    load_mtp: bool = True


@dataclass(frozen=True)
class ContextParams:
    """How a context computes (``llama_context_params``).

    Attributes:
        n_ctx: positions in total; None: what the model was trained for, at most 4096, for each sequence. They
            are divided evenly among the sequences, unless ``kv_unified``.
        n_batch: maximum number of tokens passed to llama.cpp at once.
        n_ubatch: maximum number of tokens in one compute graph.
        n_seq_max: the number of sequences; their ids are 0 <= seq_id < n_seq_max.
        n_outputs_max: maximum number of rows of logits per call (``verify`` needs one more than the draft for
            each sequence); None: 17 per sequence, at least 64.
        n_threads, n_threads_batch: CPU threads for single tokens and for batches; None: one per core that
            this process may use, but at most one per 2.5 MB of weights.
        flash_attn: None: if the device supports it.
        type_k, type_v: ggml types of the KV cache, such as ``"f16"`` or ``"q8_0"``. With q8_0 here, q8_0 or
            q4_0 weights and flash attention, results on the CPU do not depend on how tokens are grouped into
            batches (:mod:`sllm.engine.exact`).
        offload_kqv: keep the KV cache of a layer on the GPU that has the layer.
        kv_unified: one pool of positions for all sequences. Batches of unequal lengths then take one pass
            instead of several, but other sequences can change the last bits of the logits.
        n_rollback: for hybrid models with snapshots (``can_rollback == "snapshots"``): how many of the newest
            tokens can be rolled back, and so the longest draft that is verified at once, 0 to 64. That many
            states are kept for every sequence: 19 MB each for Qwen3.5-0.8B, about 150 MB for a 27B model. 0:
            no snapshots; a rollback recomputes from a checkpoint. None: 8 for one sequence, 4 for more.

    Examples:
        >>> small = sllm.ContextParams(n_ctx=1024, n_seq_max=2)
        >>> with sllm.Model(sllm.embedded.TARGET) as model, model.context(small, n_seq_max=4) as context:
        ...     context.n_ctx, context.n_seq_max
        (1024, 4)

    """

    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_seq_max: int = 1
    n_outputs_max: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    flash_attn: bool | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    offload_kqv: bool = True
    kv_unified: bool = False
    n_rollback: int | None = None

    def as_c(self, *, n_ctx_train: int, size_bytes: int) -> tuple[Any, list[Any]]:
        """``struct sllm_context_params *`` for a model of that size, and what must live as long.

        Raises:
            TypeError, ValueError: a parameter of another type or out of range.

        """
        n_seq_max = checked_int(self.n_seq_max, "n_seq_max", 1, 256)
        n_ctx = context_length(n_ctx_train) * n_seq_max if self.n_ctx is None else self.n_ctx
        n_outputs_max = max(64, 17 * n_seq_max) if self.n_outputs_max is None else self.n_outputs_max
        n_threads = self.n_threads
        if n_threads is None:
            n_threads = min(available_cores(), max(1, size_bytes // _BYTES_PER_THREAD))
        n_more = n_threads if self.n_threads_batch is None else self.n_threads_batch
        params = ffi.new("struct sllm_context_params *")
        params.n_ctx = checked_int(n_ctx, "n_ctx", 1)
        params.n_batch = checked_int(self.n_batch, "n_batch", 1)
        params.n_ubatch = checked_int(self.n_ubatch, "n_ubatch", 1)
        params.n_seq_max = n_seq_max
        params.n_outputs_max = min(checked_int(n_outputs_max, "n_outputs_max", 1), self.n_batch)
        params.n_threads = checked_int(n_threads, "n_threads", 1)
        params.n_threads_batch = checked_int(n_more, "n_threads_batch", 1)
        params.flash_attn = -1 if self.flash_attn is None else int(self.flash_attn)
        keep = [_type_name(self.type_k, "type_k"), _type_name(self.type_v, "type_v")]
        params.type_k, params.type_v = keep
        params.offload_kqv = self.offload_kqv
        params.kv_unified = self.kv_unified
        n_rollback = self.n_rollback
        if n_rollback is None:
            n_rollback = 8 if n_seq_max == 1 else 4
        params.n_rollback = checked_int(n_rollback, "n_rollback", 0, 64)
        return params, keep


def _type_name(value: object, name: str) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected the name of a ggml type")
    if "\0" in value:
        raise ValueError(f"{name} is {value!r}, expected the name of a ggml type")
    return ffi.new("char[]", value.encode())


# The same two lists for type checkers, which take the types of keyword arguments from a TypedDict alone
# (PEP 692); tests/engine/test_params.py compares them.


class LoadOptions(TypedDict, total=False):
    """Keyword arguments that make a :class:`LoadParams`."""

    n_gpu_layers: int | None
    devices: Sequence[Device | str] | None
    tensor_split: Sequence[float] | None
    split_mode: str
    use_mmap: bool
    use_mlock: bool
    check_tensors: bool
    progress: Callable[[float], Any] | None
    vocab_only: bool
    load_mtp: bool


class ContextOptions(TypedDict, total=False):
    """Keyword arguments that make a :class:`ContextParams`."""

    n_ctx: int | None
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int | None
    n_threads: int | None
    n_threads_batch: int | None
    flash_attn: bool | None
    type_k: str
    type_v: str
    offload_kqv: bool
    kv_unified: bool
    n_rollback: int | None


def parse(options: Mapping[str, Any], given: _P, *, without: Iterable[str] = ()) -> _P:
    """The parameters ``given``, with what ``options`` say of them.

    Args:
        options: keyword arguments, of which each is a field of ``given``.
        given: a :class:`LoadParams` or :class:`ContextParams`.
        without: fields that the caller's user may not set.

    Raises:
        TypeError: an option that is no field of ``given``, or one of ``without``.

    """
    _check_names(options, _names(given) - set(without))
    return cast("_P", replace(cast("Any", given), **options))


def parse_both(
    options: Mapping[str, Any],
    loading: LoadParams,
    computing: ContextParams,
    *,
    without: Iterable[str] = (),
) -> tuple[LoadParams, ContextParams]:
    """As :func:`parse` for both at once: each option goes where it belongs."""
    load, compute = _names(loading), _names(computing)
    _check_names(options, (load | compute) - set(without))
    return (
        replace(loading, **{name: value for name, value in options.items() if name in load}),
        replace(computing, **{name: value for name, value in options.items() if name in compute}),
    )


def changes(params: LoadParams | ContextParams) -> dict[str, Any]:
    """The fields that are not at their defaults, by name."""
    return {
        field.name: value
        for field in fields(params)
        if (value := getattr(params, field.name)) != field.default
    }


def _names(given: Any) -> set[str]:
    return {field.name for field in fields(given)}


def _check_names(options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}; there are {', '.join(sorted(known))}")

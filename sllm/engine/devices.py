"""The devices that a model can be loaded on, this machine's and RPC servers'."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.engine import backends, ggml_rpc
from sllm.engine._ffi import Handle, check, checked_int, ffi, lib, take_log
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


__all__ = ["Device", "check_file", "devices", "load_params", "may_offload", "server_of", "use_servers"]


_DEVICE_TYPES = ("cpu", "gpu", "igpu", "accelerator", "other")


_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on; ``memory_free`` and ``memory_total`` are bytes, 0 where unknown.

    ``endpoint`` is that of the RPC server whose device it is (:func:`sllm.rpc.add_server`), ``index`` then
    its number there; None: a device of this machine.
    """

    index: int
    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    endpoint: str | None = None


def devices() -> list[Device]:
    """The devices of this build on this machine, in ggml's order (``ggml_backend_dev_get``).

    A backend of the build that has none here is told of as a warning of the logger ``sllm``.
    """
    backends.load()
    found = []
    for index in range(lib.sllm_device_count()):
        info = ffi.new("struct sllm_device_info *")
        check(lib.sllm_device_get(index, info))
        found.append(
            Device(
                index,
                ffi.string(info.name).decode("utf-8", "replace"),
                ffi.string(info.description).decode("utf-8", "replace"),
                _DEVICE_TYPES[info.type],
                info.memory_free,
                info.memory_total,
            )
        )
    take_log()
    return found


def check_file(path: Path) -> None:
    """Tell apart what llama.cpp would report alike."""
    try:
        if path.is_dir():
            raise ModelLoadError(f"{path} is a directory, expected a GGUF file")
        if path.exists() and not path.is_file():
            # opening a pipe would wait for somebody to write
            raise ModelLoadError(f"{path} is not a regular file, expected a GGUF file")
        with path.open("rb") as file:
            magic = file.read(4)
    except ModelLoadError:
        raise
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist, expected a GGUF file") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise ModelLoadError(f"{path!r} is no path: {error}") from None
    if not magic:
        raise ModelLoadError(f"{path} is empty, expected a GGUF file")
    if magic != b"GGUF":
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")


def load_params(
    n_gpu_layers: int | None,
    devices: Sequence[Device | str] | None,
    tensor_split: Sequence[float] | None,
    split_mode: str,
    progress: Callable[[float], Any] | None,
) -> tuple[Any, list[Any]]:
    """What every load has in common, as sllm.h's parameters, and what must live as long as these."""
    if split_mode not in _SPLIT_MODES:
        raise ValueError(f"split_mode is {split_mode!r}, expected one of {', '.join(_SPLIT_MODES)}")
    backends.load()
    keep: list[Any] = [ffi.new_handle(progress)]
    params = ffi.new("struct sllm_model_params *")
    params.n_gpu_layers = -1 if n_gpu_layers is None else checked_int(n_gpu_layers, "n_gpu_layers")
    params.split_mode = _SPLIT_MODES[split_mode]
    if devices is not None:
        chosen = _device_indices(devices)
        keep.append(ffi.new("int32_t[]", chosen))
        params.devices, params.n_devices = keep[-1], len(chosen)
    if tensor_split is not None:
        keep.append(ffi.new("float[]", [float(part) for part in tensor_split]))
        params.tensor_split, params.n_tensor_split = keep[-1], len(keep[-1])
    params.progress = lib.sllm_py_progress
    params.progress_user_data = keep[0]
    return params, keep


_SERVER_DEVICE = re.compile(r"RPC(\d{1,3})\[([^\[\]]+)\]")
"""The name of an RPC server's device."""


_with_servers: weakref.WeakKeyDictionary[Handle, set[str]] = weakref.WeakKeyDictionary()
"""Models of this process that use RPC servers, and the endpoints of these."""


def use_servers(model: Handle, wanted: Sequence[Device | str] | None) -> None:
    """Note that a model was loaded on these devices: an RPC server that one is using has no time to answer
    questions.
    """
    endpoints = _endpoints_of(wanted or ())
    if endpoints:
        _with_servers[model] = endpoints


def _name(device: Device | str) -> str:
    name = device.name if isinstance(device, Device) else device
    if not isinstance(name, str):
        raise ValueError(f"there is no device {device!r}; expected a Device or a name")
    return name


def server_of(device: Device | str) -> tuple[int, str] | None:
    """The number of an RPC server's device and the server's endpoint; None for this machine's devices."""
    found = _SERVER_DEVICE.fullmatch(_name(device))
    return None if found is None else (int(found[1]), found[2])


def _endpoints_of(wanted: Sequence[Device | str]) -> set[str]:
    """The RPC servers among the devices."""
    return {server[1] for server in map(server_of, wanted) if server is not None}


def may_offload(wanted: Sequence[Device | str] | None) -> bool:
    """Whether layers can go somewhere else than to this machine's CPU."""
    if wanted is not None and _endpoints_of(wanted):
        return True
    names = None if wanted is None else {_name(device) for device in wanted}
    return any(d.type in ("gpu", "igpu") for d in devices() if names is None or d.name in names)


def _device_indices(wanted: Sequence[Device | str]) -> list[int]:
    known = {device.name: device.index for device in devices()}
    servers: dict[str, list[int]] = {}
    indices = []
    for device in wanted:
        name, server = _name(device), server_of(device)
        if server is not None:
            index, endpoint = server
            if endpoint not in servers:
                servers[endpoint] = _server_indices(endpoint)
            if index >= len(servers[endpoint]):
                raise ValueError(f"there is no device {name!r}; the server has {len(servers[endpoint])}")
            indices.append(servers[endpoint][index])
            continue
        if name not in known:
            raise ValueError(f"there is no device {name!r}; there are {', '.join(known)}")
        indices.append(known[name])
    return indices


def _server_indices(endpoint: str) -> list[int]:
    """Hand an RPC server to llama.cpp, which would end the process were it not there."""
    if not any(endpoint in used and not model.closed for model, used in list(_with_servers.items())):
        ggml_rpc.probe(endpoint)
    return ggml_rpc.register(endpoint)

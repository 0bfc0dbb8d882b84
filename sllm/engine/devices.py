"""The devices that a model can be loaded on, this machine's and RPC servers'."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.engine import backends, ggml_rpc
from sllm.engine._ffi import Handle, check, ffi, lib, take_log

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["Device", "device_indices", "devices", "may_offload", "server_of", "use_servers"]


_DEVICE_TYPES = ("cpu", "gpu", "igpu", "accelerator", "other")


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

    A backend of the build that has no device here is a warning of the logger ``sllm``.
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


def device_indices(wanted: Sequence[Device | str]) -> list[int]:
    """Their numbers in ggml's list; RPC servers among them are registered there.

    Raises:
        ValueError: no such device.
        RPCError: an RPC server is not there.

    """
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

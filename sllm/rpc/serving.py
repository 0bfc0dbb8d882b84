"""What the process runs that serves ggml's RPC (csrc/rpc_server.cpp)."""

from __future__ import annotations

import os

from sllm.engine._ffi import check, ffi, lib
from sllm.engine.devices import devices as local_devices
from sllm.rpc import confine
from sllm.rpc.child import ParentLink

__all__ = ["serve"]


def serve(
    parent: int,
    *,
    control: int,
    cache: bool,
    once: bool,
    devices: list[str] | None,
    n_threads: int,
) -> None:
    """Open the devices, give up everything else, tell the parent, and serve what it hands over.

    Args:
        parent: the parent's process id.
        control: the descriptor of a Unix socket, whose other end is a ``Handover``.
        cache: whether there is one.
        once: whether to end behind the first client that has had memory here.
        devices: names; None: the GPUs, or the CPU where there is none.
        n_threads: of the CPU.

    """
    landlock = confine.files()
    link = ParentLink(parent)
    every = local_devices()
    if devices is None:
        chosen = [d for d in every if d.type in ("gpu", "igpu")] or [d for d in every if d.type == "cpu"]
    else:
        chosen = [d for name in devices for d in every if d.name == name]
    opened = ffi.new("sllm_rpc_server **")
    memory = ffi.new("uint64_t[]", 2 * len(chosen))
    indices = ffi.new("int32_t[]", [d.index for d in chosen])
    check(lib.sllm_rpc_server_open(n_threads, indices, len(chosen), opened, memory))
    opens_files = any(d.type != "cpu" for d in chosen)
    seccomp = confine.calls(opens_files=opens_files)
    link.send(
        {
            "memory": [[memory[2 * i], memory[2 * i + 1]] for i in range(len(chosen))],
            "confinement": {
                "landlock": landlock,
                "seccomp": seccomp,
                "opens_files": opens_files or not seccomp,
            },
        }
    )
    check(lib.sllm_rpc_server_run(opened[0], control, cache, once))
    os._exit(0)  # Python's own end would want files

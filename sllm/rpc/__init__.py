"""ggml's RPC: layers of a model on the devices of other machines, one round trip and a row of logits per
token.

On the machine with the GPU::

    sllm rpc-server

and on this one::

    devices = sllm.rpc.add_server("127.0.0.1:50052")
    with sllm.LocalTarget("big.gguf", devices=devices, n_gpu_layers=10) as target:
        print(sllm.generate(target, "Once upon a time").text())

The protocol has neither encryption nor authentication. So a server listens on loopback, for this user where
the system tells (Linux does), and in a confined process that checks what it is sent (docs/rpc.md); over a
network it is reached through a tunnel, best a worker's own: ``sllm worker --rpc`` there and
``remote.rpc_devices()`` here. Where a fast link to it is missing, a model that runs there as a whole
(:func:`sllm.connect`) or a split by layer ranges is far quicker.

llama.cpp ends the process when a server goes away. ``LocalTarget`` therefore runs models with RPC devices in
a process of their own unless told otherwise, and raises :class:`~sllm.RPCError`; a :class:`~sllm.Model` with
RPC devices lives in this process, and may take it along.

Examples:
    >>> with sllm.rpc.RPCServer(cache=False) as server:
    ...     [device.endpoint == server.endpoint for device in sllm.rpc.add_server(server.endpoint)]
    [True]

"""

from __future__ import annotations

from sllm.rpc.server import DEFAULT_PORT, RPCServer, add_server, devices

__all__ = ["DEFAULT_PORT", "RPCServer", "add_server", "devices"]

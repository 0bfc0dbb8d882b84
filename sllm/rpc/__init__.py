"""ggml's RPC: layers of a model on the devices of other machines, at a round trip and a row of logits per
token.

On the machine with the GPU::

    sllm rpc-server

and on this one::

    devices = sllm.rpc.add_server("127.0.0.1:50052")
    with sllm.LocalTarget("big.gguf", devices=devices, n_gpu_layers=10) as target:
        print(sllm.generate(target, "Once upon a time").text())

The protocol has neither encryption nor authentication. So a server listens on loopback, only for this user
where the system allows that check (Linux), in a sandboxed process that validates what it is sent
(docs/rpc.md). Over a network, use a tunnel, preferably a worker's own: ``sllm worker --rpc`` there and
``remote.rpc_devices()`` here. Without a fast link, a model that runs completely on the other machine
(:func:`sllm.connect`) or a split by layers is much faster.

llama.cpp aborts the process when a server is lost. ``LocalTarget`` therefore runs models with RPC devices in
a child process by default, and raises :class:`~sllm.RPCError`; a :class:`~sllm.Model` with RPC devices runs
in this process, which is then aborted.

Examples:
    >>> with sllm.rpc.RPCServer(cache=False) as server:
    ...     [device.endpoint == server.endpoint for device in sllm.rpc.add_server(server.endpoint)]
    [True]

"""

from __future__ import annotations

from sllm.rpc.server import DEFAULT_PORT, RPCServer, add_server, devices

__all__ = ["DEFAULT_PORT", "RPCServer", "add_server", "devices"]

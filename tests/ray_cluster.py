"""A Ray cluster of this machine alone, for tests/test_ray_serve.py: runs ``ray_serve.app`` until stdin ends.

The first argument is the folder of ``ray_serve.py``, the second what the application takes, as JSON. It
prints a line of JSON for the application and one for each line on stdin: where it is, and where its replicas
are.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys


def main() -> None:
    """See the module."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray writes what its processes log to stdout
    sys.path.insert(0, sys.argv[1])
    import ray
    import ray_serve
    from ray import serve

    application = ray_serve.app(json.loads(sys.argv[2]))
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=True,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = free_port()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application, name="sllm")
        texts = serve.get_deployment_handle("Texts", "sllm")
        print(json.dumps({"url": f"http://127.0.0.1:{port}/"}), file=answers, flush=True)
        while sys.stdin.readline():
            found = texts.broadcast("where").results(timeout_s=30, return_exceptions=True)
            print(json.dumps([one for one in found if isinstance(one, dict)]), file=answers, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """One that systems do not give out by themselves, as they do to Ray's own processes meanwhile."""
    while True:
        port = random.randrange(20000, 30000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


if __name__ == "__main__":
    main()

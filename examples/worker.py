"""The big machine's side: serve a model, and print the line that its clients need. Ctrl-C ends it.

python examples/worker.py [TARGET.gguf [HOST [PORT]]]     without arguments: the model that comes with sllm

`sllm worker` is the same with more options. The line holds a token: show it to your clients alone.
"""

import sys

import sllm
from sllm import embedded

path, host, port = (*sys.argv[1:], None, None, None)[:3]

with sllm.Worker(path or embedded.TARGET, host=host or "127.0.0.1", port=int(port or 0)) as worker:
    try:
        print(worker.uri, flush=True)
        worker.wait()
    except KeyboardInterrupt:
        worker.drain(10)  # texts that go on after it are handed back: their clients wait, or go elsewhere

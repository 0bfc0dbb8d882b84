"""The big machine's side: serve a model, and print the line that its clients need. Ctrl-C ends it.

python examples/worker.py [TARGET.gguf]     without argument: the model that comes with sllm

`sllm worker` is the same with more options. The line holds a token: show it to your clients alone.
"""

import arguments

import sllm
from sllm import embedded

[path] = arguments.parse(__doc__, "TARGET")

with sllm.Worker(path or embedded.TARGET) as worker:  # host=, port=: on loopback, any that is free
    try:
        print(worker.uri, flush=True)
        worker.wait()
    except KeyboardInterrupt:
        worker.drain(10)  # texts that go on after it are handed back: their clients wait, or go elsewhere

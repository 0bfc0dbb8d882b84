"""A worker and its client, and a slow link between: the big model's text, sooner with a small model here.

python examples/remote.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm

In earnest the worker is another machine: examples/worker.py there, or `sllm worker`.
"""

from dataclasses import replace

import arguments

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link

target_path, draft_path = arguments.parse(__doc__, "TARGET", "DRAFT")
sampling = sllm.SamplingParams(temperature=0.7, seed=1)

slow = {"pass_seconds": 0.03}  # each pass takes as long as one of a large model

with (
    sllm.Worker(target_path or embedded.TARGET, insecure=True, **slow) as worker,
    Link((worker.address.host, worker.address.port), delay=0.025, mbit_s=50) as link,  # half the round trip
    # In earnest: the line that the worker has printed, sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT
    sllm.connect(replace(worker.address, host=link.host, port=link.port).uri) as remote,
    sllm.Model(draft_path or embedded.DRAFT) as draft,
):
    prompt = remote.chat([{"role": "user", "content": "Tell me a short story about a lost kite."}])
    for small in (None, draft):
        stream = sllm.generate(remote.target(), prompt, draft=small, sampling=sampling, max_tokens=64)
        text = ""
        for run in stream:  # run.source: "draft" (drafted here and accepted there) or "target"
            print(run.text, end="", flush=True)
            text += run.text
        stats, link_stats = stream.stats, stream.stats.remote
        print(f"\n-- {'with' if small else 'no'} draft: {stats.tokens_per_s:.0f} tokens/s, ", end="")
        print(f"{stats.n_passes} passes, {link_stats.bytes_up + link_stats.bytes_down} bytes\n")

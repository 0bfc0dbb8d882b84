"""A model split by layers: the first two and the last one here, those between behind a slow link.

python examples/split.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm

In earnest the middle is another machine: `sllm worker TARGET.gguf --layers`. Hidden states cross the link,
and neither tokens nor logits; whoever has the model can usually reconstruct the text from them all the same.
"""

from dataclasses import replace

import arguments

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.engine.exact import SETTINGS

target_path, draft_path = arguments.parse(__doc__, "TARGET", "DRAFT")
target_path = target_path or embedded.TARGET
sampling = sllm.SamplingParams(temperature=0.7, seed=1)

with (
    sllm.Worker(target_path, layers=True, insecure=True, **SETTINGS) as worker,
    Link((worker.address.host, worker.address.port), delay=0.025, mbit_s=50) as link,  # half the round trip
    sllm.connect(replace(worker.address, host=link.host, port=link.port).uri) as remote,
    sllm.SplitTarget(target_path, head=2, tail=1, middle=remote, codec="f32", **SETTINGS) as target,
    sllm.Model(draft_path or embedded.DRAFT) as draft,
):
    for small in (None, draft):
        stream = sllm.generate(target, "Once upon a time", draft=small, sampling=sampling, max_tokens=64)
        for run in stream:
            print(run.text, end="", flush=True)
        stats, spent = stream.stats, stream.stats.remote
        print(f"\n-- {'with' if small else 'no'} draft: {stats.tokens_per_s:.0f} tokens/s, ", end="")
        print(f"{stats.n_passes} round trips, {spent.bytes_up + spent.bytes_down} bytes\n")

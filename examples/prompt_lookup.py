"""Drafts without a draft model: what followed the same words earlier in the text ("ngram", prompt lookup).

python examples/prompt_lookup.py [TARGET.gguf]     without argument: SmolLM2 where it is installed, or our own

They are right where an answer repeats its request: excerpts, corrections, code. A callable can draft as well.
"""

import arguments
import numpy as np

import sllm
from sllm import embedded
from sllm.engine.exact import SETTINGS

[path] = arguments.parse(__doc__, "TARGET")
request = """List the contact details in this message:
Hello, this is Clara Brook. I have lost my umbrella, please call me if you find it. \
My phone number is 415-555-0162 and my e-mail is clara.brook@example.org."""


def after_the_same_token(tokens: np.ndarray, n_max: int) -> np.ndarray:
    """Draft what followed the newest token where it stood before, if it did."""
    [places] = np.nonzero(tokens[:-1] == tokens[-1])
    return tokens[places[-1] + 1 :][:n_max] if len(places) else tokens[:0]


# Each pass takes as long as one of a large model. Those of small ones are all computing, and gain no time.
slow = {"pass_seconds": 0.05}

with (
    sllm.Worker(path or arguments.smollm2() or embedded.TARGET, insecure=True, **slow, **SETTINGS) as worker,
    sllm.connect(worker.uri) as remote,
):
    prompt = remote.chat([{"role": "user", "content": request}])
    greedy = sllm.SamplingParams(temperature=0)
    for name, draft in [("no draft", None), ("ngram", "ngram"), ("callable", after_the_same_token)]:
        stream = sllm.generate(remote.target(), prompt, draft=draft, sampling=greedy, max_tokens=64)
        text, stats = stream.text(), stream.stats
        print(f"{name:9} {stats.n_passes} passes, {stats.n_accepted} drafted tokens accepted", end="")
        print(f", {stats.tokens_per_s:.0f} tokens/s: {text!r}")

"""Drafting without a draft model: what followed the same words earlier in the text ("ngram", prompt lookup).

It pays where a text repeats itself or its prompt: summaries, edits, code. A callable can draft as well.

python examples/prompt_lookup.py [TARGET.gguf]              without argument: the model that comes with sllm
"""

import sys

import numpy as np

import sllm
from sllm import embedded

prompt = "Ada likes apples. Ben likes apples. Ada likes pears. Ben likes pears. Ada likes plums. Ben"
greedy = sllm.SamplingParams(temperature=0)


def last_again(tokens: np.ndarray, n_max: int) -> np.ndarray:
    """A drafter of one's own: guess that the newest five tokens come once more."""
    return tokens[-5:][:n_max]


with (
    sllm.Model(sys.argv[1] if len(sys.argv) > 1 else embedded.TARGET) as model,
    sllm.LocalTarget(model, flash_attn=True, type_k="q8_0", type_v="q8_0") as target,
):
    for name, draft in [("no draft", None), ("ngram", "ngram"), ("callable", last_again)]:
        stream = sllm.generate(target, prompt, draft=draft, sampling=greedy, max_tokens=64)
        text = stream.text()
        passes, accepted = stream.stats.n_passes, stream.stats.n_accepted
        print(f"{name:9} {passes:3} passes, {accepted:3} drafted tokens accepted: {text[:40]!r}...")

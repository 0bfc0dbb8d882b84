"""Text from a target model, sooner with a draft model, exactly the target's own.

python examples/speculative.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm
"""

import sys

import sllm
from sllm import embedded

target_path, draft_path = sys.argv[1:3] or (embedded.TARGET, embedded.DRAFT)
sampling = sllm.SamplingParams(temperature=0.7, seed=1)

with sllm.Model(target_path) as target, sllm.Model(draft_path) as draft:
    prompt = target.chat([{"role": "user", "content": "Tell me a short story about a lost kite."}])
    # Flash attention and a q8_0 cache: the same with a draft and without, to the last bit (weights q8_0).
    with sllm.LocalTarget(target, flash_attn=True, type_k="q8_0", type_v="q8_0") as local:
        story = sllm.generate(local, prompt, draft=draft, sampling=sampling, max_tokens=256)
        text = ""
        for run in story:  # run.source: "draft" (drafted and accepted) or "target"
            print(run.text, end="", flush=True)
            text += run.text
        alone = sllm.generate(local, prompt, sampling=sampling, max_tokens=256)
        same = alone.text() == text

stats = story.stats
print(f"\n\n{stats.n_tokens} tokens in {stats.n_passes} passes, {stats.acceptance:.0%} of the draft accepted")
print(f"{stats.tokens_per_s:.0f} tokens/s, {alone.stats.tokens_per_s:.0f} without draft; same text: {same}")

"""Text from a target and a draft model on one machine: fewer passes, and exactly the target's own text.

python examples/speculative.py [TARGET.gguf DRAFT.gguf]     without arguments: the pair that comes with sllm
"""

import arguments

import sllm
from sllm import embedded
from sllm.engine.exact import SETTINGS

target_path, draft_path = arguments.parse(__doc__, "TARGET", "DRAFT")
sampling = sllm.SamplingParams(temperature=0.7, seed=1)

# Flash attention and a q8_0 cache: the same with a draft and without, to the last bit.
with (
    sllm.LocalTarget(target_path or embedded.TARGET, **SETTINGS) as target,
    sllm.Model(draft_path or embedded.DRAFT) as draft,
):
    prompt = target.chat([{"role": "user", "content": "Tell me a short story about a lost kite."}])
    story = sllm.generate(target, prompt, draft=draft, sampling=sampling, max_tokens=256)
    text = ""
    for run in story:  # run.source: "draft" (drafted and accepted) or "target"
        print(run.text, end="", flush=True)
        text += run.text
    alone = sllm.generate(target, prompt, sampling=sampling, max_tokens=256)
    same = alone.text() == text

print(
    f"\n\n{story.stats.acceptance:.0%} of the drafted tokens were accepted; same text without draft: {same}"
)
for name, stats in [("draft", story.stats), ("no draft", alone.stats)]:
    print(f"{name:8} {stats.n_tokens} tokens in {stats.n_passes} passes, {stats.tokens_per_s:.0f} tokens/s")
if story.stats.tokens_per_s < 1.2 * alone.stats.tokens_per_s:
    print("No gain in time here: each drafted token makes a pass of so small a model longer. A pass of a")
    print("large one waits for its weights, and one of a worker for the link as well: see remote.py.")
